"""The profile adds up, finds delays that were put in, and counts operators as torch dispatches them."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vitrail.config import RunConfig, load_config
from vitrail.datasets import ImageSet
from vitrail.training import prepare, training_batches
from vitrail.training import profile as profile_module
from vitrail.training.average import MovingAverage
from vitrail.training.mixing import Mix
from vitrail.training.profile import PARTS, Operator, TrainingProfile, profile_training


def _config(**changes: Any) -> RunConfig:
    tiny = {"model.depth": 1, "model.embed_dim": 16, "model.num_heads": 2, "train.device": "cpu"}
    return load_config("digits-vit", tiny | {key.replace("__", "."): value for key, value in changes.items()})


def test_shares_add_up_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = profile_training(_config(), steps=5)
    assert list(found.shares) == list(PARTS)
    assert sum(found.shares.values()) == pytest.approx(100, abs=1e-6)
    assert all(share > 0 for share in found.shares.values())
    assert (found.device, found.precision, found.batch_size, found.busy) == ("cpu", "fp32", 32, None)
    assert found.images_per_second == pytest.approx(32_000 / found.milliseconds)
    assert list(tmp_path.iterdir()) == []
    stored = json.loads(json.dumps(found.to_dict()))
    assert stored["advice"] == found.advice()
    text = found.text()
    assert all(name in text for name in PARTS.values())
    assert found.operators[0].name in text


def test_without_a_moving_average_it_takes_no_time() -> None:
    assert profile_training(_config(train__ema=0.0), steps=5).shares["average"] == 0.0


@pytest.mark.parametrize(
    ("part", "owner", "name"),
    [
        ("data", ImageSet, "batch"),
        ("augmentation", Mix, "__call__"),
        ("optimiser", torch.optim.AdamW, "_init_group"),
        ("average", MovingAverage, "update"),
    ],
)
def test_a_delay_is_found_in_its_part(
    part: str, owner: type, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds, original = 0.2, getattr(owner, name)  # far above what a busy machine adds to another part

    def slow(self: Any, *arguments: Any, **named: Any) -> Any:
        time.sleep(seconds)
        return original(self, *arguments, **named)

    monkeypatch.setattr(owner, name, slow)
    found = profile_training(_config(), steps=5)
    assert found.milliseconds * found.shares[part] / 100 >= 1000 * seconds
    assert max(found.shares, key=lambda own: found.shares[own]) == part
    assert PARTS[part] in found.advice()[0]


def test_operators_are_counted_as_torch_dispatches_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_module, "_MOST_OPERATORS", 1000)  # which take longest depends on the machine

    class Count(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: Counter[str] = Counter()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen[func.overloadpacket.__name__] += 1
            return func(*args, **(kwargs or {}))

    config = _config(model__depth=2)
    run = prepare(config)
    batch = next(training_batches(run, 0))
    with Count() as count:
        run.task.train()(batch, 0)["loss"].backward()
    calls = {own.name: own.calls for own in profile_training(config, steps=5).operators}
    compared = {"mm", "addmm", "native_layer_norm", "convolution_backward", "gelu"} & set(calls)
    assert compared >= {"mm", "addmm", "native_layer_norm", "gelu"}
    assert {name: calls[name] for name in compared} == {name: count.seen[name] for name in compared}


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="steps: expected at least 5, got 1"):
        profile_training(_config(), steps=1)


def _profile(**changes: Any) -> TrainingProfile:
    shares = dict.fromkeys(PARTS, 0.0) | changes.pop("shares", {})
    shares["forward"] = 100 - sum(shares.values())
    operator = Operator(name="mm", calls=10, milliseconds=1.0, share=100.0)
    defaults: dict[str, Any] = {
        "device": "cpu", "precision": "fp32", "batch_size": 32, "milliseconds": 20.0,
        "operators": (operator,), "operator_us": 100.0, "busy": None,
    }  # fmt: skip
    return TrainingProfile(**(defaults | changes | {"shares": shares}))


@pytest.mark.parametrize(
    ("changes", "part", "advice"),
    [
        ({"shares": {"data": 21.0}}, "wait for data 21 %", "--data.storage memory"),
        ({"shares": {"augmentation": 40.0}}, "augmentation 40 %", "RandAugment"),
        ({"shares": {"clip": 12.0}}, "clipping 12 %", "--optim.clip_norm 0"),
        ({"shares": {"logging": 6.0}}, "logging 6 %", "--train.log_every"),
        ({"shares": {"optimiser": 20.0, "average": 11.0}}, "31 %", "larger --train.batch_size"),
        ({"operator_us": 8.0}, "8 microseconds", "--train.compile true"),
        ({"device": "cuda:0", "precision": "bf16", "busy": 30.0}, "computes 30 %", "--train.compile true"),
        (
            {"device": "cuda:0", "precision": "fp32", "busy": 90.0},
            "float32 on a GPU",
            "--train.precision bf16",
        ),
        ({}, "100 %", "only a smaller model"),
        ({"shares": {"data": 20.0, "augmentation": 30.0, "clip": 10.0, "logging": 5.0}}, "35 %", "only a"),
    ],
)
def test_advice_fits_what_was_measured(changes: dict[str, Any], part: str, advice: str) -> None:
    (line,) = _profile(**changes).advice()
    assert part in line
    assert advice in line


def test_what_promises_most_comes_first() -> None:
    lines = _profile(shares={"data": 25.0, "augmentation": 60.0}).advice()
    assert [line.split(" %")[0].split()[-1] for line in lines] == ["60", "25"]
