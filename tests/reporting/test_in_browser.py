"""Pages in headless Chromium, which runs their scripts, without network; skipped where it is missing."""

from __future__ import annotations

import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.explain.test_attention import lively

from vitrail.datasets import Preprocessing
from vitrail.reporting.explanation import write_explanation

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--virtual-time-budget=20000"
)

POINT_AT_THE_LAST_PATCH = """
const waiting = setInterval(() => {
  const section = document.querySelector("section[data-ready]");
  if (!section) return;
  clearInterval(waiting);
  const canvas = section.querySelector(".stage canvas"), box = canvas.getBoundingClientRect();
  const before = section.querySelector(".says").textContent;
  const at = { clientX: box.right - 2, clientY: box.bottom - 2, bubbles: true };
  canvas.dispatchEvent(new PointerEvent("pointermove", at));
  const during = section.querySelector(".says").textContent;
  canvas.dispatchEvent(new PointerEvent("pointerleave", at));
  const after = section.querySelector(".says").textContent;
  const kinds = getComputedStyle(section.querySelector(".kind").parentElement).display;
  const found = document.createElement("output");
  found.textContent = [before, during, after, kinds].join("|");
  document.body.append(found);
}, 50);
"""


def opened(page: Path, folder: Path, script: str) -> str:
    """The page's HTML after its own scripts and one more have run; an error of theirs fails."""
    errors = 'window.onerror = (what) => { document.title = "FAILED " + what; };'
    text = page.read_text()
    copy = folder / "copy.html"
    copy.write_text(
        text.replace("<head>", f"<head><script>{errors}</script>", 1).replace(
            "</body>", f"<script>{script}</script></body>"
        )
    )
    assert CHROMIUM is not None
    words = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={folder / 'profile'}", "--dump-dom", copy.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    assert "<title>FAILED" not in done.stdout, re.findall("<title>.*?</title>", done.stdout)
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize(
    ("name", "kinds", "patches"), [("vit_cifar", "none", "8 x 8"), ("diffvit_cifar", "grid", "8 x 8")]
)
def test_pointing_at_a_patch_shows_what_it_attends_to(
    name: str, kinds: str, patches: str, tmp_path: Path
) -> None:
    model = lively(name, {})
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(
        tmp_path / "picture.png"
    )
    C = model.config.in_chans
    found = write_explanation(
        tmp_path / "out",
        [tmp_path / "picture.png"],
        model=model,
        preprocessing=Preprocessing(
            img_size=model.config.image_shape, in_chans=C, mean=(0.5,) * C, std=(0.25,) * C
        ),
        classes=tuple(map(str, range(10))),
        title="t",
    )
    html = opened(found.page, tmp_path, POINT_AT_THE_LAST_PATCH)
    (says,) = re.findall("<output>(.*?)</output>", html, flags=re.DOTALL)
    before, during, after, shown = unescape(says).split("|")
    assert before == after
    assert before.startswith(("The class token gives", "The mean of all patches gives"))
    assert during.startswith(f"The patch in row 8, column 8 of {patches} gives")
    # Which map to look at is asked only where there are several.
    assert shown == kinds
