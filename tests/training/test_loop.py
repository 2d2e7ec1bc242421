"""What the loop does besides the plain step: micro-batches, early stopping, Ctrl-C, folders in use."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from vitrail.config import RunConfig, load_config
from vitrail.models import build_model
from vitrail.training import loop as training_loop
from vitrail.training import train

TINY = {
    "model.depth": 2,
    "model.embed_dim": 16,
    "model.num_heads": 2,
    "model.patch_embed": "conv",  # the stem's batch normalisation would see the micro-batches
    "train.duration": "2 epochs",
    "train.batch_size": 256,
    "train.log_every": "1 step",
    "train.device": "cpu",
}


def _config(changes: dict[str, object]) -> RunConfig:
    return load_config("digits-vit", TINY | changes)


def _losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "train"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "run"
    train(_config({}), folder, command="")
    return folder


@pytest.mark.parametrize(
    "changes",
    [{"train.micro_batch": 100}, {"train.micro_batch": 1000}, {"train.recompute": True}],
    ids=["micro-batches", "one micro-batch", "recompute"],
)
def test_memory_savers_change_nothing_but_rounding(changes: dict, plain: Path, tmp_path: Path) -> None:
    train(_config(changes), tmp_path / "run", command="")
    assert _losses(tmp_path / "run") == pytest.approx(_losses(plain), abs=1e-5)
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path / "run", plain))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-3, rtol=1e-3)


def test_recomputed_gradients_are_the_same() -> None:
    model = build_model("vit_cifar", drop=0.1, drop_path=0.3, attn_drop=0.1)
    images = torch.randn(4, 3, 32, 32)
    gradients = []
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()
        torch.manual_seed(0)
        model(images).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_run_stops_when_it_gets_no_better_and_keeps_the_best(tmp_path: Path) -> None:
    stuck = {"optim.lr": 1e-12, "train.duration": "50 epochs", "train.patience": 3}
    stuck["train.eval_every"] = "1 epoch"
    result = train(_config(stuck), tmp_path / "run", command="")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["steps"] == 5 * 4  # the first evaluation is the best, three more are no better
    assert manifest["best_step"] == 5
    best = torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)["best_weights"]
    assert all(torch.equal(best[name], value) for name, value in result.model.state_dict().items())
    train(_config(stuck | {"train.resume": True}), tmp_path / "run", command="")
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["steps"] == 20


def test_ctrl_c_finishes_the_step_saves_and_goes_on(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms, before = training_loop.gradient_norms, signal.getsignal(signal.SIGINT)
    calls = []

    def interrupted(model: torch.nn.Module) -> dict:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return norms(model)

    with monkeypatch.context() as patch:
        patch.setattr(training_loop, "gradient_norms", interrupted)
        with pytest.raises(KeyboardInterrupt, match="stopped after step 3 of 10, saved"):
            train(_config({}), tmp_path / "run", command="")
    assert signal.getsignal(signal.SIGINT) is before
    train(_config({"train.resume": True}), tmp_path / "run", command="")
    assert _losses(tmp_path / "run") == _losses(plain)


def test_ctrl_c_while_the_last_step_is_saved_is_not_lost(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = training_loop.save_checkpoint

    def interrupted(folder: Path, state: Any) -> None:
        if state.step == 10:
            os.kill(os.getpid(), signal.SIGINT)
        save(folder, state)

    with monkeypatch.context() as patch:
        patch.setattr(training_loop, "save_checkpoint", interrupted)
        with pytest.raises(KeyboardInterrupt, match="stopped after step 10 of 10, saved"):
            train(_config({}), tmp_path / "run", command="")
    train(_config({"train.resume": True}), tmp_path / "run", command="")
    assert _losses(tmp_path / "run") == _losses(plain)


def test_two_runs_do_not_share_a_folder(plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with (
        FileLock(folder / ".lock"),
        pytest.raises(ValueError, match=r"another run is writing into .*run; wait for its end"),
    ):
        train(_config({}), folder, command="")
    train(_config({}), folder, command="")
    assert _losses(folder) == _losses(plain)
    assert not (folder / ".lock").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"run folder .*file/run cannot be made: Not a directory"):
        train(_config({}), tmp_path / "file" / "run", command="")


def test_fine_tuning_takes_over_architecture_and_preprocessing(plain: Path, tmp_path: Path) -> None:
    config = load_config(
        None,
        {
            "model.pretrained": str(plain),
            "data.name": "digits",
            "train.duration": "2 steps",
            "optim.freeze": "!head.*",
            "train.device": "cpu",
        },
    )
    result = train(config, tmp_path / "tuned", command="")
    before = load_file(plain / "model" / "model.safetensors")
    after = result.model.state_dict()
    assert result.model.config.embed_dim == 16
    stored = json.loads((plain / "model" / "config.json").read_text())["preprocessing"]
    assert result.preprocessing.to_dict() == stored
    assert all(torch.equal(before[name], after[name]) for name in before if not name.startswith("head."))
    assert not torch.equal(before["head.weight"], after["head.weight"])
    other = load_config(None, {"model.pretrained": str(plain), "model.name": "vit_mnist_2blk"})
    with pytest.raises(ValueError, match=r"holds a vit_digits, not a vit_mnist_2blk; leave model\.name out"):
        train(other, tmp_path / "no", command="")
