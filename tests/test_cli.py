"""The command line as people use it: in a process of its own, with typing errors and without network."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from vitrail.cli import main
from vitrail.cli.words import parse_overrides
from vitrail.models import build_model
from vitrail.pretrained import save_model

ROOT = Path(__file__).parent.parent
Run = Callable[[str], tuple[int, str, str]]
TINY = "--epochs 2 --model.depth 4 --model.embed_dim 16 --batch_size 256 --train.device cpu"


@pytest.fixture(scope="module")
def work_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs in runs/demo and runs/digits-mae, a digit to classify, and a folder of pictures."""
    folder = tmp_path_factory.mktemp("work")
    words = [sys.executable, "-m", "vitrail", *shlex.split(f"train digits-vit --output runs/demo {TINY}")]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^test accuracy \d+\.\d\d % .* 359 images\)$", done.stdout, re.MULTILINE)
    assert done.stdout.endswith("report runs/demo/report.html\n")
    main(shlex.split(f"train digits-mae --output {folder}/runs/digits-mae {TINY}"))
    pixels = (load_digits().images[7] * 15.9).astype("uint8")
    (folder / "docs" / "images").mkdir(parents=True)
    Image.fromarray(pixels).save(folder / "docs" / "images" / "digit.png")
    _write_photos(folder / "photos")
    return folder


def _write_photos(folder: Path) -> None:
    """Class folders of pictures of unequal size: stripes and noise."""
    random = np.random.default_rng(0)
    for label in ("noise", "stripes"):
        (folder / label).mkdir(parents=True)
        for number in range(20):
            array = random.integers(0, 256, (40 + number, 48, 3), dtype=np.uint8)
            if label == "stripes":
                array[::4] = 255
            Image.fromarray(array).save(folder / label / f"{number}.png")


@pytest.fixture
def run(
    work_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], tuple[int, str, str]]:
    """Run a command line in the work_folder -> exit code, what it printed, what it said on standard error."""
    monkeypatch.chdir(work_folder)

    def command(line: str) -> tuple[int, str, str]:
        code = 0
        try:
            main(shlex.split(line))
        except SystemExit as stop:
            code = int(stop.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return command


def test_help_is_quick_and_needs_no_torch() -> None:
    times = []
    for _ in range(5):
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "vitrail", "--help"], capture_output=True, text=True, check=True
        )
        times.append(time.perf_counter() - began)
    files = {path.stem for path in (ROOT / "src" / "vitrail" / "cli").glob("*.py")}
    verbs = {name.replace("_", "-") for name in files - {"__init__", "words", "images"}}
    assert set(re.findall(r"^    (\S+) ", done.stdout, re.MULTILINE)) == verbs
    assert min(times) < 0.5
    code = (
        "import sys\nfrom vitrail.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.splitlines()[-1] == "False"


def test_a_run_leaves_a_report_and_is_not_overwritten(work_folder: Path, run: Run) -> None:
    assert "confusion" in (work_folder / "runs" / "demo" / "report.html").read_text().lower()
    assert (work_folder / "runs" / "demo" / "figures" / "attention.png").stat().st_size > 5_000
    code, _, said = run(f"train digits-vit --output runs/demo {TINY}")
    assert code == 2
    assert "not empty" in said


def test_evaluate_predict_and_report_use_the_run(work_folder: Path, run: Run) -> None:
    _, table, _ = run("evaluate runs/demo")
    assert "359 images" in table
    assert len(re.findall(r"^\d +3\d ", table, re.MULTILINE)) == 10
    numbers = json.loads(run("evaluate runs/demo/model --dataset digits --json")[1])
    manifest = json.loads((work_folder / "runs" / "demo" / "manifest.json").read_text())
    assert numbers["accuracy"] == manifest["test_accuracy"]
    assert re.match(r"docs/images/digit.png  \d \d+\.\d %", run("predict runs/demo docs/images/digit.png")[1])
    found = json.loads(run("predict runs/demo docs/images/digit.png --json --top 10")[1])
    assert sum(entry["confidence"] for entry in found["predictions"]) == pytest.approx(1.0, abs=1e-4)
    (work_folder / "runs" / "demo" / "report.html").unlink()
    assert run("report runs/demo")[1] == "report runs/demo/report.html\n"
    assert (work_folder / "runs" / "demo" / "report.html").exists()


def test_a_model_of_another_library_is_evaluated_as_it_is(work_folder: Path, run: Run) -> None:
    name = "vit_tiny_patch16_224"
    model = build_model(
        name, depth=1, img_size=8, patch_size=4, embed_dim=24, num_heads=2, in_chans=1, num_classes=10
    )
    prepared = {"img_size": [8, 8], "in_chans": 1, "mean": [0.3], "std": [0.4], "interpolation": "bicubic"}
    classes = json.loads((work_folder / "runs" / "demo" / "model" / "config.json").read_text())["classes"]
    save_model("part", model, name=name, classes=classes, preprocessing=prepared)
    said = run("convert part theirs --to timm")[2]
    assert said == "vitrail: preprocessing: crop_ratio is missing\n"
    save_model("ours", model, name=name, classes=classes, preprocessing=prepared | {"crop_ratio": 1.0})
    assert run("convert ours theirs --to timm")[0] == 0
    found = [json.loads(run(f"evaluate {own} --dataset digits --json")[1]) for own in ("ours", "theirs")]
    assert found[0]["accuracy"] == found[1]["accuracy"]
    for verb in ("summary", "bench"):
        said = run(f"{verb} ./theirs")[2]
        assert "theirs holds a model of timm or transformers; `vitrail convert ./theirs FOLDER`" in said


def test_a_dry_run_trains_nothing(work_folder: Path, run: Run) -> None:
    code, shown, _ = run(f"train digits-vit --output runs/dry {TINY} --dry-run")
    assert code == 0
    assert re.search(r"^parameters +[\d,]+$", shown, re.MULTILINE)
    assert re.search(r"estimated time +[\d.]+ s an epoch", shown)
    assert "name: vit_digits" in shown
    assert not (work_folder / "runs" / "dry").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("trian digits-vit", "unknown verb 'trian': did you mean train"),
        ("data photos --foo 1", "unrecognized arguments: --foo 1; see `vitrail data --help`"),
        ("data photso", r"no folder and no data set 'photso'; did you mean photos\?$"),
        ("data docs/images/digit.png", "docs/images/digit.png is a file: expected a folder of images"),
        ("data runs/demo", "runs/demo is a run folder, not a folder of images"),
        ("data photos --sheet sheet.txt", "expected a name that ends in .png, got sheet.txt"),
        ("data photos --sheet none/sheet.png", "--sheet none/sheet.png: no folder none"),
        ("convert runs/demo out --to tim", "unknown --to 'tim': did you mean timm"),
        ("train digits-vti", "unknown recipe 'digits-vti': did you mean digits-vit"),
        ("train digits-vit --optim.lrr 1", "unknown option --optim.lrr: did you mean --optim.lr"),
        ("train digits-vit --modle x", "unknown option --modle: did you mean --model"),
        ("train digits-vit --model vit_digit", "unknown model 'vit_digit': did you mean vit_digits"),
        ("train digits-vit --dataset digit", "digit.*did you mean.*digits"),
        ("train digits-vit --optim.lr", "--optim.lr needs a value"),
        ("train digits-vit lr=1", "expected --section.key VALUE, got 'lr=1'"),
        ("train digits-vit --epochs many", "train.duration: expected a number with a unit"),
        ("train nowhere/config.yaml", "no recipe file"),
        ("sweep digits-vit", "needs what to vary"),
        ("sweep digits-vit --over depth", "expected section.key=VALUE"),
        ("sweep digits-vit --over model.depth=1,2 --seeds few", "--seeds: expected a whole number"),
        ("sweep digits-vit --over model.depht=1,2 --output runs/s", "no option 'depht': did you mean depth"),
        (
            "sweep digits-vit --variants augment",
            "unknown set of variants 'augment': did you mean augmentation",
        ),
        ("evaluate nowhere", "no run or model folder nowhere"),
        ("evaluate", "required: RUN"),
        ("predict nowhere a.png", "no run or model folder nowhere"),
        ("predict runs/demo missing.png", "missing.png"),
        ("report nowhere", "no run or model folder"),
        ("models 'swim*'", "no model matches 'swim*': did you mean swin"),
        ("evaluate runs/demo --dataset mnist --root .", "put .*parquet"),
        (
            "evaluate runs/demo --dataset photos",
            r"classes \(0, 1, 2, ...\) are not the 2 of photos \(noise, stripes\)$",
        ),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(
    command: str, message: str, run: Run, work_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VITRAIL_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(work_folder / "hub"))
    code, _, said = run(command)
    assert code == 2
    assert said.startswith("vitrail: ")
    assert said.count("\n") == 1
    assert re.search(message.replace("*'", r"\*'"), said)


def test_the_version_and_nothing_at_all(run: Run) -> None:
    assert run("--version") == (0, f"vitrail {version('vitrail')}\n", "")
    code, shown, said = run("")
    assert (code, said) == (0, "")
    assert shown.startswith("usage: vitrail")


def test_predict_takes_folders_and_names_what_cannot_be_read(work_folder: Path, run: Run) -> None:
    folder = work_folder / "mixed"
    folder.mkdir()
    for name in ("b.png", "a.PNG"):
        (folder / name).write_bytes((work_folder / "docs" / "images" / "digit.png").read_bytes())
    (folder / "notes.txt").write_text("not an image, and not called one")
    assert [line.split("  ")[0] for line in run("predict runs/demo mixed")[1].splitlines()] == [
        "mixed/a.PNG",
        "mixed/b.png",
    ]
    (folder / "broken.jpg").write_text("<html>")
    code, shown, said = run("predict runs/demo mixed missing.png mixed/a.PNG --top 1")
    assert code == 2
    assert [line.split("  ")[0] for line in shown.splitlines()] == [
        "mixed/a.PNG",
        "mixed/b.png",
        "mixed/a.PNG",
    ]
    assert said == (
        "vitrail: mixed/broken.jpg: expected an image, got a file of another kind; "
        "missing.png: no such image file\n"
    )
    (work_folder / "hollow").mkdir()
    assert run("predict runs/demo hollow") == (2, "", "vitrail: hollow: no image files in this folder\n")


def test_predict_writes_a_table_and_goes_on_with_it(work_folder: Path, run: Run) -> None:
    folder = work_folder / "table"
    folder.mkdir()
    for name in ("a.png", "b.png", "c.png"):
        (folder / name).write_bytes((work_folder / "docs" / "images" / "digit.png").read_bytes())
    code, shown, said = run("predict runs/demo table --output x.csv --top 2 --batch_size 2")
    assert (code, said) == (0, "")
    assert re.fullmatch(r"3 images in [\d.]+ s, [\d.]+ images a second, 0 broken: x\.csv\n", shown)
    content = (work_folder / "x.csv").read_text()
    assert content.startswith("source,class_1,probability_1,class_2,probability_2,error,model\ntable/a.png,")
    for name in ("d", "e", "f", "g"):
        (folder / f"{name}.jpg").write_text("<html>")
    code, shown, said = run("predict runs/demo table --output x.csv --top 2 --batch_size 3")
    assert code == 2
    assert re.fullmatch(r"4 images in .* a second, 3 were there before, 4 broken: x\.csv\n", shown)
    kind = "expected an image, got a file of another kind"
    assert said == (
        f"vitrail: table/d.jpg: {kind}; table/e.jpg: {kind}; table/f.jpg: {kind}; and 1 more; x.csv has the "
        "reason of each under error\n"
    )
    assert (work_folder / "x.csv").read_text().startswith(content)
    for words, message in (
        ("--output x.csv --top 3", "vitrail: x.csv does not begin with the columns of --top 3; give"),
        ("--output y.jsonl --json", "vitrail: --json prints and --output writes: leave one out"),
        ("--output y.txt", "vitrail: --output y.txt: expected a name that ends in .jsonl, .csv, .parquet"),
    ):
        code, shown, said = run(f"predict runs/demo table {words}")
        assert (code, shown, said.count("\n")) == (2, "", 1)
        assert said.startswith(message)
    assert not (work_folder / "y.jsonl").exists()


def test_resuming_a_finished_run_leaves_it_as_it_is(work_folder: Path, run: Run) -> None:
    folder = work_folder / "runs" / "demo"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code, shown, said = run("train --output runs/demo --resume --optim.lr 3e-5")
    assert code == 0
    assert shown.startswith("already finished: nothing was trained\ntest accuracy ")
    assert "without effect on a finished run: optim.lr 3e-05 (it was 0.002)\n" in said
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_an_error_of_the_system_names_the_file(work_folder: Path, run: Run) -> None:
    (work_folder / "folder.png").mkdir()
    assert run("data digits --sheet folder.png")[2] == "vitrail: folder.png: Is a directory\n"


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown recipe"):
        main(["train", "nothing", "--debug"])


def test_the_exact_command_of_the_mission_parses() -> None:
    words = "--model vit_base --dataset imagenet --epochs 100 --batch_size 256 --learning-rate 1e-3"
    assert parse_overrides(shlex.split(words)) == {
        "model.name": "vit_base",
        "data.name": "imagenet",
        "train.duration": "100 epochs",
        "train.batch_size": "256",
        "optim.lr": "1e-3",
    }
    assert parse_overrides(["--train.resume", "--optim.lr=3", "--data.shuffle-frames"]) == {
        "train.resume": "true",
        "optim.lr": "3",
        "data.shuffle_frames": "true",
    }


def test_lists(capsys: pytest.CaptureFixture[str]) -> None:
    main(["models", "vit_base_patch16_*"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["vit_base_patch16_224", "86,567,656", "17.564", "224", "79.15", "AugReg1k"]
    assert lines[6].split() == ["vit_base_patch16_384", "86,859,496", "55.484", "384", "81.1", "AugReg1k"]
    assert lines[7] == ""
    main(["recipes"])
    assert "digits-vit" in capsys.readouterr().out
    main(["train", "mnist-vit", "--help"])
    shown = capsys.readouterr().out
    assert "--optim.lr [" in shown
    assert "vit_mnist_2blk" in shown


def _readme_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line.removeprefix("vitrail ") for line in lines if line.startswith("vitrail ")]


def test_the_readme_has_commands() -> None:
    assert len(_readme_commands()) >= 6


@pytest.mark.parametrize("command", _readme_commands())
def test_readme_commands_run(command: str, run: Run) -> None:
    if command.startswith("train"):
        command += " --dry-run"
    if command.startswith("sweep"):
        command += f" {TINY}"
    if command.startswith("bench"):
        command += " --repetitions 1 --batch 1 --size 32"
    code, _, said = run(command)
    if "put " in said and "parquet" in said:
        pytest.skip("the data set of this command is not at hand")
    assert code == 0, said


def test_readme_python_runs(work_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work_folder)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_every_picture_of_the_readme_is_there() -> None:
    pictures = re.findall(r'(?:!\[[^]]*\]\(|src=")([^)"]+)', (ROOT / "README.md").read_text())
    assert len(pictures) >= 3
    for picture in pictures:
        assert (ROOT / picture).is_file(), picture


def test_models_by_a_part_of_the_name_and_as_json(run: Run) -> None:
    assert [line.split()[0] for line in run("models mnist")[1].splitlines()[1:]] == [
        "swin_mnist_2blk",
        "swin_mnist_2blk_patch2",
        "vit_mnist_2blk",
        "vit_mnist_small",
    ]
    (found,) = json.loads(run("models deit_tiny_patch16_224 --json")[1])
    assert found["parameters"] == 5_717_416
    assert found["image_shape"] == [3, 224, 224]
    assert found["top1"] == [
        {
            "percent": 72.2,
            "recipe": "DeiT",
            "about": "ImageNet-1k, 300 epochs (Touvron et al. 2021); the authors' repository",
        }
    ]


def test_summary_of_a_name_a_run_and_a_changed_model(run: Run) -> None:
    shown = run("summary vit_mnist_2blk")[1]
    assert "105,098 parameters, 1,795,968 MACs for one image of 1x28x28" in shown
    assert "qkv" not in shown
    assert "qkv" in run("summary vit_mnist_2blk --depth 3")[1]
    for folder in ("runs/demo", "runs/demo/model"):
        # TINY: four blocks of width 16 on 8 x 8 digits.
        tree = json.loads(run(f"summary {folder} --json --depth 1")[1])
        blocks = [own for own in tree["model"]["parts"] if own["kind"] == "Block"]
        assert [own["shapes"] for own in blocks] == [[[1, 17, 16]]] * 4
        assert tree["image_shape"] == [1, 8, 8]
    larger = json.loads(run("summary vit_digits --img-size 16 8 --model.depth 2 --json --depth 1")[1])
    assert larger["image_shape"] == [1, 16, 8]
    assert [own["shapes"] for own in larger["model"]["parts"] if own["kind"] == "Block"] == [
        [[1, 33, 64]]
    ] * 2
    assert "--model.KEY VALUE" in run("summary --help")[1]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("summary", "required: MODEL"),
        ("summary vit_digit", "unknown model 'vit_digit': did you mean vit_digits"),
        ("summary runs/nowhere", "no run or model folder runs/nowhere"),
        ("summary photos", "photos holds no model"),
        (
            "summary vit_digits --img-size 1 2 3",
            "--img-size: expected one number or height and width, got 1 2 3",
        ),
        ("summary vit_digits --img-size 0", "--img-size: expected"),
        ("summary vit_digits --depth -1", "--depth: expected 0 or more"),
        ("summary vit_digits --optim.lr 1", "unknown option --optim.lr"),
        ("summary vit_digits --model.depht 1", "no option 'depht': did you mean depth"),
    ],
)
def test_mistakes_with_summary(command: str, message: str, run: Run) -> None:
    code, _, said = run(command)
    assert code == 2
    assert said.startswith("vitrail: ")
    assert said.count("\n") == 1
    assert message in said


def test_a_model_larger_than_the_memory_gets_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "digits-vit", "--model.embed_dim", "4000000", "--train.output", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stop:
        main(words)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said == "vitrail: out of memory: take smaller batches, smaller images or a smaller model\n"
    assert not (tmp_path / "run").exists()
