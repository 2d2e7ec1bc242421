"""Whole runs on the embedded digits: they learn, repeat, resume exactly, and leave what they promise."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vitrail.config import RunConfig, list_recipes, load_config
from vitrail.pretrained import save_model
from vitrail.training import estimate, prepare, train, training_batches
from vitrail.training import loop as training_loop
from vitrail.training.average import MovingAverage
from vitrail.training.checkpoint import TrainingState
from vitrail.training.setup import make_plan

TINY = {
    "model.depth": 1,
    "model.embed_dim": 16,
    "model.num_heads": 2,
    "train.duration": "3 epochs",
    "train.batch_size": 256,
    "train.log_every": "2 steps",
    "train.eval_every": "1 epoch",
    "train.save_every": "4 steps",
    "train.device": "cpu",
}


def _config(**changes: object) -> RunConfig:
    return load_config("digits-vit", TINY | {key.replace("__", "."): value for key, value in changes.items()})


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def _same(a: Path, b: Path) -> bool:
    first, second = _weights(a), _weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    train(_config(), folder, command="test")
    return folder


def test_a_run_leaves_what_it_promises(finished: Path) -> None:
    names = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    assert names == {
        "config.yaml", "augmented.npy", "metrics.jsonl", "manifest.json", "checkpoints/last.pt",
        "checkpoints/previous.pt", "model/config.json", "model/model.safetensors",
        "evaluation/digits-test.json", "evaluation/digits-test.npz", "evaluation/digits-test-confusion.csv",
    }  # fmt: skip
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    train_records = [record for record in records if record["kind"] == "train"]
    assert [record["step"] for record in train_records] == list(range(1, 16))
    assert [record["step"] for record in records if record["kind"] == "val"] == [5, 10, 15]
    assert all(math.isfinite(record["loss"]) and record["images_per_second"] > 0 for record in train_records)
    assert train_records[-1]["grad_norms"]["blocks.0"] > 0
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["images_seen"] == 15 * 256
    assert manifest["training_petaflop"] == pytest.approx(6 * manifest["macs_per_image"] * 15 * 256 / 1e15)
    assert manifest["versions"]["torch"]


def test_the_same_seed_gives_the_same_weights_and_another_does_not(finished: Path, tmp_path: Path) -> None:
    train(
        load_config(finished / "config.yaml", {"train.output": str(tmp_path / "a")}),
        tmp_path / "a",
        command="",
    )
    assert _same(finished, tmp_path / "a")
    train(_config(train__seed=1), str(tmp_path / "b"), command="")
    assert not _same(finished, tmp_path / "b")


ALL_ON = {
    "train__ema": 0.9,
    "model__drop": 0.1,
    "model__drop_path": 0.2,
    "augment__mixup": 0.2,
    "augment__cutmix": 1.0,
    "augment__erase": 0.3,
    "augment__randaugment": 1,
    "augment__crop": 1,
}


@pytest.mark.parametrize("stop_after", [4, 8, 12])
def test_an_interrupted_run_resumes_to_the_same_bits(
    stop_after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(_config(**ALL_ON), tmp_path / "whole", command="")

    save = training_loop.save_checkpoint

    def save_then_stop(folder: Path, state: TrainingState) -> None:
        save(folder, state)
        if state.step == stop_after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training_loop, "save_checkpoint", save_then_stop)
        with pytest.raises(KeyboardInterrupt):
            train(_config(**ALL_ON), tmp_path / "cut", command="")
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as log:
        log.write('{"kind": "train", "step": 99, "loss": 1}\n{"kind": "tra')  # what a killed run leaves
    train(_config(**ALL_ON, train__resume=True), tmp_path / "cut", command="")
    assert _same(tmp_path / "whole", tmp_path / "cut")

    def losses(folder: Path) -> list[tuple]:
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [(record["kind"], record["step"], record["loss"]) for record in records]

    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_resuming_needs_a_checkpoint_that_fits(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no run folder .* to resume"):
        train(_config(train__resume=True), tmp_path / "none", command="")
    assert not (tmp_path / "none").exists()
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="belongs to another model"):
        train(_config(train__resume=True, model__depth=2), finished, command="")
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_a_finished_run_that_is_resumed_stays_as_it_is(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    result = train(_config(train__resume=True, optim__lr=0.5), finished, command="")
    assert result.already_finished
    assert result.metrics.accuracy == json.loads((finished / "manifest.json").read_text())["test_accuracy"]
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
    assert "without effect on a finished run: optim.lr 0.5 (it was 0.002)\n" in capsys.readouterr().err
    # What was killed between its last checkpoint and its test is tested; what is to run longer goes on.
    own = shutil.copytree(finished, tmp_path / "own")
    (own / "manifest.json").unlink()
    assert not train(_config(train__resume=True), own, command="").already_finished
    assert _same(own, finished)
    capsys.readouterr()
    longer = _config(train__resume=True, train__duration="4 epochs")
    assert not train(longer, own, command="").already_finished
    assert "goes on after step 15 with: train.duration 4 epochs (it was 3 epochs)" in capsys.readouterr().err
    assert json.loads((own / "manifest.json").read_text())["steps"] == 20


def test_a_run_says_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(_config(), tmp_path / "run", command="")
    first, *said = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"vit_digits, [\d,]+ parameters, on digits \(1,293 train, 145 val, 359 test images\); cpu; "
        f"into {tmp_path}/run",
        first,
    )
    evaluations = [line for line in said if "val loss" in line]
    assert len(evaluations) == 3
    assert all(re.search(r"  loss \d\.\d{4}  val loss \d", line) for line in evaluations)


def _write_pictures(folder: Path, classes: int, count: int, side: int, *, red: int | None = None) -> None:
    random = np.random.default_rng(0)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(0, 256, (side, side + 10, 3), dtype=np.uint8)
            if red is not None:
                pixels[..., 0] = red
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{number}.png")


def test_what_surprises_in_a_folder_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # One channel has one value everywhere: its standard deviation is 0.
    _write_pictures(tmp_path / "photos", 2, 10, 40, red=100)
    (tmp_path / "photos" / "class0" / "cut.png").write_bytes(b"")
    folder = {"data__name": str(tmp_path / "photos"), "data__broken": "skip", "train__duration": "3 steps"}
    result = train(_config(**folder), tmp_path / "run", command="")
    assert result.preprocessing.std[0] == 1.0
    assert result.preprocessing.std[1] == pytest.approx(0.1, abs=0.1)
    said = capsys.readouterr().err
    assert f"1 broken image is left out ({tmp_path}/photos/class0/cut.png: expected an image, got an" in said
    assert (
        "\npictures of about 40 pixels are seen at 8 x 8: choose a larger model or --model.img_size\n" in said
    )
    train(_config(**folder, model__img_size=10), tmp_path / "larger", command="")
    assert "are seen at" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("classes", "count", "message"),
    [
        (1, 10, r"photos has one class only \(class0\)"),
        (2, 1, "photos has too few images: 2 for training and none to test with; expected 5 or more of each"),
    ],
)
def test_data_that_cannot_be_learnt_are_refused(
    classes: int, count: int, message: str, tmp_path: Path
) -> None:
    _write_pictures(tmp_path / "photos", classes, count, 12)
    with pytest.raises(ValueError, match=message):
        train(_config(data__name=str(tmp_path / "photos")), tmp_path / "run", command="")
    assert not (tmp_path / "run").exists()


def test_two_images_a_class_train_without_validation(tmp_path: Path) -> None:
    _write_pictures(tmp_path / "photos", 2, 2, 12)
    run = prepare(_config(data__name=str(tmp_path / "photos")))
    assert (len(run.splits.train), run.splits.val, len(run.splits.test)) == (2, None, 2)


@pytest.mark.parametrize(
    ("duration", "log_every", "expected"),
    [("10 steps", "50 steps", 1), ("200 steps", "50 steps", 10), ("1000 steps", "50 steps", 50),
     ("5000 steps", "50 steps", 50), ("200 steps", "3 steps", 3)],
)  # fmt: skip
def test_a_short_run_has_twenty_records(duration: str, log_every: str, expected: int) -> None:
    section = load_config(None, {"train.duration": duration, "train.log_every": log_every}).train
    assert make_plan(section, 1_000).log_every == expected


def test_a_full_folder_is_not_touched(finished: Path, tmp_path: Path) -> None:
    before = _weights(finished)
    with pytest.raises(ValueError, match=r"not empty: go on with --resume"):
        train(_config(), finished, command="")
    assert all(torch.equal(before[key], value) for key, value in _weights(finished).items())
    with pytest.raises(ValueError, match="unknown model"):
        train(_config(train__overwrite=True, model__name="vit_nothing"), finished, command="")
    assert (finished / "model" / "model.safetensors").exists()
    other = tmp_path / "letters"
    other.mkdir()
    (other / "dear.txt").write_text("keep me")
    with pytest.raises(ValueError, match="not a run folder"):
        train(_config(train__overwrite=True), other, command="")
    assert (other / "dear.txt").read_text() == "keep me"


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    config = _config(
        optim__lr=1e30, optim__clip_norm=0, train__save_every="1 step", train__log_every="1 step"
    )
    with pytest.raises(
        ValueError,
        match=r"(the loss became (nan|inf)|the gradient is not finite) in step \d+ \(learning rate",
    ) as error:
        train(config, tmp_path / "run", command="")
    assert "\n" not in str(error.value)
    assert "lower optim.lr" in str(error.value)
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)
    assert state["step"] >= 1
    assert all(torch.isfinite(value).all() for value in state["task"].values())


def test_clipping_bounds_the_gradient(tmp_path: Path) -> None:
    seen = []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, *args: object) -> object:
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        seen.append(torch.nn.utils.get_total_norm(grads).item())
        return step(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", watched)
        train(_config(optim__clip_norm=0.05), tmp_path / "run", command="")
    assert len(seen) == 15
    assert max(seen) <= 0.05 + 1e-4


def test_batches_start_anywhere_and_resize_progressively() -> None:
    run = prepare(
        _config(train__progressive={"0%": 4, "50%": 8}, augment__mixup=0.5, **{"augment__stop_at": "80%"})
    )
    whole = list(training_batches(run, 0))
    assert len(whole) == 15
    assert [batch["images"].shape[-1] for batch in whole] == [4] * 8 + [8] * 7
    assert [batch["targets"].ndim for batch in whole] == [2] * 12 + [1] * 3
    for late, early in zip(training_batches(run, 7), whole[7:], strict=True):
        assert torch.equal(late["images"], early["images"])
        assert torch.equal(late["targets"], early["targets"])


def test_the_moving_average_is_the_formula() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.BatchNorm1d(1))
    average = MovingAverage(model, 0.9)
    expected = None
    for n in range(30):
        with torch.no_grad():
            model[0].weight.normal_()
        model(torch.randn(4, 2))
        average.update()
        decay = min(0.9, (1 + n) / (10 + n))
        weight = model[0].weight.detach()
        expected = weight.clone() if n == 0 else decay * expected + (1 - decay) * weight
    torch.testing.assert_close(average.model[0].weight, expected)
    assert average.model[1].num_batches_tracked == 30
    assert not average.model[0].weight.requires_grad


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_there_is_not_replaced_silently() -> None:
    with pytest.raises(ValueError, match=r"train\.device cuda is not here: accelerate offers"):
        prepare(_config(train__device="cuda"))


def test_bfloat16_follows_float32(tmp_path: Path) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        train(_config(train__precision=precision), tmp_path / precision, command="")
        records = [
            json.loads(line) for line in (tmp_path / precision / "metrics.jsonl").read_text().splitlines()
        ]
        losses[precision] = [record["loss"] for record in records if record["kind"] == "train"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["bf16"] != losses["fp32"]


@pytest.mark.parametrize("name", sorted(list_recipes()))
def test_every_recipe_builds(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(name, {"train.batch_size": 8})
    monkeypatch.chdir(tmp_path)
    try:
        if (teacher := str(config.task.options.get("teacher"))).startswith("runs/"):
            # The recipe of the teacher has the name of its run folder.
            taught = prepare(load_config(Path(teacher).name))
            save_model(
                Path(teacher) / "model",
                taught.model,
                name=str(taught.config.model.name),
                classes=taught.splits.train.classes,
                preprocessing=taught.preprocessing.to_dict(),
            )
        cost = estimate(config, timed_steps=1)
    except ValueError as error:
        if "VITRAIL_DATA" in str(error) or str(error).startswith("imagenet: expected"):
            pytest.skip(f"{config.data.name} is not at hand")
        raise
    assert cost.parameters < 2_000_000  # the recipes for small images; those for ImageNet were skipped
    assert cost.seconds_per_epoch > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__name": "vit_digit"}, "unknown model 'vit_digit': did you mean vit_digits"),
        ({"data__name": "minst"}, "minst.*mnist"),
        ({"task__name": "clasify"}, "unknown task 'clasify': did you mean classify"),
        ({"task__smoothing": 0.1}, "task classify has no option 'smoothing': did you mean label_smoothing"),
        ({"task__label_smoothing": 2.0}, "label_smoothing must lie in"),
        ({"model__num_classes": 3}, "num_classes 3 does not fit digits, which has 10"),
        ({"model__in_chans": 3}, "model.in_chans 3 does not fit digits, which has 1"),
        ({"train__precision": "fp16"}, "fp16 needs a GPU"),
        ({"train__device": "tpu"}, "train.device"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as error:
        train(_config(**changes), tmp_path / "run", command="")
    assert "\n" not in str(error.value)
