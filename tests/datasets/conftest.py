"""Tiny data sets in the hub's layout, and a cache of the test's own."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vitrail.datasets import SOURCES

# So that tests can import odd_images, which lies beside them.
sys.path.append(str(Path(__file__).parent))


def _png(array: np.ndarray) -> bytes:
    """Encode uint8 [C, H, W] without loss."""
    picture = Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _write_parquet(
    path: Path,
    columns: dict[str, list[Any]],
    features: dict[str, Any] | None = None,
    rows_a_group: int | None = None,
) -> None:
    """Write columns as the hub does; `image` and `img` are lists of encoded bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for name, values in columns.items():
        if name in ("image", "img"):
            kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            arrays[name] = pa.array([{"bytes": value, "path": None} for value in values], kind)
        else:
            arrays[name] = pa.array(values)
    table = pa.table(arrays)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=rows_a_group)


def _write_source(folder: Path, name: str, train: int = 40, test: int = 20) -> dict[str, np.ndarray]:
    """Write random images of a source with the right columns; gives the pixels of each split."""
    source = SOURCES[name]
    rng = np.random.default_rng(0)
    pixels = {}
    for split, n in (("train", train), ("test", test)):
        pixels[split] = rng.integers(0, 256, (n, *source.shape), dtype=np.uint8)
        columns: dict[str, list[Any]] = {source.image_column: [_png(image) for image in pixels[split]]}
        features: dict[str, Any] = {source.image_column: {"_type": "Image"}}
        twins = [twin for twin in SOURCES.values() if twin.hub_id == source.hub_id]
        for twin in twins:
            columns[twin.label_column] = [i % len(twin.classes) for i in range(n)]
            features[twin.label_column] = {"_type": "ClassLabel", "names": list(twin.classes)}
        _write_parquet(folder / f"{split}-00000-of-00001.parquet", columns, features)
    return pixels


@pytest.fixture
def png() -> Callable[[np.ndarray], bytes]:
    return _png


@pytest.fixture
def write_parquet() -> Callable[..., None]:
    return _write_parquet


@pytest.fixture
def write_source() -> Callable[..., dict[str, np.ndarray]]:
    return _write_source


@pytest.fixture
def real_data() -> Path:
    """The root with real data; tests that use it keep the machine's cache, which only content decides."""
    root = os.environ.get("VITRAIL_DATA")
    if not root:
        pytest.skip("VITRAIL_DATA is not set")
    return Path(root)


@pytest.fixture(autouse=True)
def _own_places(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads the network, and only those on real data read the machine's data and cache."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if "real_data" not in request.fixturenames:
        monkeypatch.delenv("VITRAIL_DATA", raising=False)
        monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
