"""Warnings come where something is wrong, once, and not where all is well."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from vitrail.components.tap import edit, record, taps
from vitrail.config import load_config
from vitrail.explain.health import attention_collapse
from vitrail.models import Encoder, build_model
from vitrail.training import prepare, train, training_batches
from vitrail.training.checkpoint import TrainingState
from vitrail.training.loop import fit
from vitrail.training.optim import build_optimizer, learning_rate
from vitrail.training.watch import CLIPPED_RECORDS, Watch

LN10 = math.log(10)


def _record(step: int, loss: float, **changes: float) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": loss, "lr": 1e-3, "grad_norm": 1.0} | changes


def _said(watch: Watch, records: list[dict[str, Any]]) -> list[tuple[int, str]]:
    return [(record["step"], text) for record in records for text in watch.observe(record)]


def _watch(**changes: Any) -> Watch:
    return Watch(**({"total": 1000, "clip_norm": 1.0, "num_classes": 10} | changes))


def _falling(step: int) -> float:
    return 0.3 + 2.0 * math.exp(-step / 200)


def test_a_loss_that_falls_with_noise_is_left_alone() -> None:
    torch.manual_seed(0)
    noise = (1 + 0.15 * torch.randn(50)).tolist()
    records = [_record(20 * n, _falling(20 * n) * noise[n], grad_norm=3.0 * noise[n]) for n in range(1, 50)]
    assert _said(_watch(), records) == []
    assert _said(_watch(num_classes=None), records) == []


def test_a_rise_is_said_once_after_three_records_and_again_after_a_recovery() -> None:
    losses = [2.2, 1.5, 1.0, 1.9, 1.9, 1.0, *[1.9] * 6, *[1.0] * 3, *[1.9] * 4]
    said = _said(_watch(), [_record(10 * n, loss) for n, loss in enumerate(losses)])
    assert [step for step, _ in said] == [80, 170]
    assert said[0][1].startswith("the loss rises: 1.900 after 1.000; lower optim.lr")


def test_how_far_is_a_rise() -> None:
    # From chance to 1.0 the loss fell by 1.303: half of that may be lost.
    for high, expected in ((1.64, 0), (1.66, 1)):
        records = [_record(10 * n, loss) for n, loss in enumerate([2.2, 1.0, *[high] * 5])]
        assert len(_said(_watch(), records)) == expected
    # Nothing was learnt, so nothing can be lost.
    assert (
        _said(_watch(total=10**6), [_record(n, loss) for n, loss in enumerate([2.2, 2.15, *[9.0] * 5])]) == []
    )


@pytest.mark.parametrize(("classes", "first"), [(10, 2.4), (None, 7.0), (None, -0.2)])
def test_a_loss_that_does_not_move_from_chance_is_said_once(classes: int | None, first: float) -> None:
    records = [_record(20 * n, first + 0.01 * (-1) ** n * abs(first) / 2.4) for n in range(1, 40)]
    said = _said(_watch(num_classes=classes), records)
    assert [step for step, _ in said] == [160]  # a tenth of the run after step 20, and three records
    what, where = (
        ("moved from chance", "labels") if classes else ("fallen from where it began", "augmentation")
    )
    assert f"the loss has not {what}" in said[0][1]
    assert "vitrail lr-range" in said[0][1]
    assert ("labels" in said[0][1], "augmentation" in said[0][1]) == (where == "labels", where != "labels")
    fallen = [_record(record["step"], record["loss"] - 0.1 * abs(first)) for record in records[1:]]
    assert _said(_watch(num_classes=classes), [records[0], *fallen]) == []


def test_gradients_beyond_ten_times_the_clip_norm() -> None:
    def said(norms: list[float], **changes: Any) -> list[tuple[int, str]]:
        return _said(
            _watch(**changes),
            [_record(n, _falling(n), grad_norm=norm) for n, norm in enumerate(norms, start=1)],
        )

    found = said([11.0] * 40)
    assert [step for step, _ in found] == [0.9 * CLIPPED_RECORDS + 1 + 2]
    assert "gradients explode" in found[0][1]
    assert said([20.0] * 10 + [5.0] * 60) == []  # as runs begin
    assert said([9.0] * 60) == []
    assert said([11.0] * 60, clip_norm=0.0) == []


def test_gradients_that_vanish_before_anything_is_learnt() -> None:
    def said(loss: float) -> list[str]:
        records = [_record(n, loss, grad_norm=1e-9) for n in range(5)]
        return [text for _, text in _said(_watch(total=10**6), records)]

    assert len(said(2.0)) == 1
    assert said(2.0)[0].startswith("gradients vanish (norm 1.0e-09)")
    assert said(1e-5) == []  # all is learnt


def test_what_was_said_before_a_run_was_resumed_is_not_said_again() -> None:
    records = [_record(20 * n, 2.4) for n in range(1, 40)]
    resumed = _watch()
    assert len(_said(resumed, records[:20])) == 1
    assert _said(resumed, records[20:]) == []


# Collapse.


def _images(model: Encoder, count: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, model.config.in_chans, *model.config.image_shape, generator=generator)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_digits", {}),
        ("vit_digits", {"position": "relative", "registers": 2}),
        ("vit_mnist_small", {"position": "rotary"}),
        ("cct_2_3x2_32", {}),
    ],
)
def test_measures_equal_slow_loops(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = build_model(name, **options).train()
    images = _images(model, 2)
    report = attention_collapse(model, images)
    assert model.training
    assert not any(tap.watched for tap in taps(model).values())
    names = [own for own in taps(model) if own.endswith((".weights", ".out"))]
    with torch.no_grad(), record(model.eval(), *names) as seen:
        model.forward_features(images)
    assert len(report) == len(names) // 2
    for block, found in report.items():
        assert set(found) == {"entropy", "rank", "similarity"}
        weights = next(seen[own] for own in names if own.startswith(block + ".") and own.endswith(".weights"))
        rows = weights.flatten(0, 2).tolist()
        entropies = [-sum(share * math.log(share) for share in row if share > 0) for row in rows]
        assert found["entropy"] == pytest.approx(fmean(entropies) / math.log(len(rows[0])), abs=1e-5)
        cosines = [
            float(torch.cosine_similarity(tokens[i], tokens[j], dim=0))
            for tokens in seen[block + ".out"]
            for i in range(len(tokens))
            for j in range(i)
        ]
        assert found["similarity"] == pytest.approx(fmean(cosines), abs=1e-4)
        assert 0 < found["rank"] <= 1


def _collapse_warnings(model: Encoder, times: int = 2, step: int = 500) -> list[str]:
    watch = _watch()
    report = attention_collapse(model.eval(), _images(model, 16))
    records = [{"kind": "val", "step": step, "collapse": report}] * times
    return [text for _, text in _said(watch, records)]


def test_fresh_models_are_left_alone() -> None:
    for name in ("vit_digits", "vit_mnist_2blk", "cct_2_3x2_32"):
        torch.manual_seed(0)
        assert _collapse_warnings(build_model(name), times=5, step=50) == []
    small_weights = build_model("vit_digits", init="trunc_normal")
    assert _collapse_warnings(small_weights, step=90) == []
    assert "uniform" in _collapse_warnings(small_weights, step=100)[0]  # of 1000 steps


def test_scaled_queries_and_keys_are_named_as_collapse_of_the_attention() -> None:
    torch.manual_seed(0)
    model = build_model("vit_digits")
    with torch.no_grad():
        for block in (model.blocks[1], model.blocks[2]):
            block.attn.qkv.weight[:128] *= 30
    assert _collapse_warnings(model, times=1) == []  # a second evaluation must agree
    (said,) = _collapse_warnings(model, times=5)
    assert said.startswith("attention has collapsed onto single tokens in blocks.1, blocks.2:")
    assert "--model.qk_norm true" in said
    scaled_but_normalised = build_model("vit_digits", qk_norm=True)
    with torch.no_grad():
        for block in scaled_but_normalised.blocks:
            block.attn.qkv.weight[:128] *= 30
    assert _collapse_warnings(scaled_but_normalised) == []


def test_uniform_attention_is_said_only_where_every_block_has_it() -> None:
    torch.manual_seed(0)
    model = build_model("vit_digits")
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[:128] = 0
        model.blocks[0].attn.qkv.bias[:128] = 0
        assert _collapse_warnings(model) == []
        for block in model.blocks:
            block.attn.qkv.weight[:128] = 0
    (said,) = _collapse_warnings(model)
    assert said.startswith("attention is uniform in blocks.0, blocks.1, blocks.2, blocks.3:")


def test_tokens_that_are_alike_and_features_of_few_directions() -> None:
    torch.manual_seed(0)
    model = build_model("vit_digits").eval()
    watch = _watch()

    def last(change: Callable[[torch.Tensor], torch.Tensor]) -> list[str]:
        with edit(model, {"blocks.3.out": change}):
            report = attention_collapse(model, _images(model, 16))
        return [text for _, text in _said(watch, [{"kind": "val", "step": 500, "collapse": report}] * 2)]

    alike = last(lambda x: x.mean(dim=1, keepdim=True) + 0.01 * x)
    assert [text.split(" in ")[0] for text in alike] == ["the tokens of an image are all alike"]
    line = torch.randn(64)
    flat = last(lambda x: x[..., :1] * line)
    assert "the tokens of all images span few directions in blocks.3" in flat[0]


def test_signed_weights_and_single_keys() -> None:
    torch.manual_seed(0)
    model = build_model("vit_digits").eval()
    images = _images(model)
    plain = attention_collapse(model, images)
    with edit(model, {"blocks.*.attn.weights": lambda weights: -0.5 * weights}):
        negative = attention_collapse(model, images)
    assert negative["blocks.0"]["entropy"] == pytest.approx(plain["blocks.0"]["entropy"], abs=1e-5)
    one_patch = build_model(
        "vit_digits", img_size=2, patch_embed="conv", class_token=False, pool="mean"
    ).eval()
    assert set(attention_collapse(one_patch, _images(one_patch))["blocks.0"]) == {"rank"}


# Features without a classifier.


def _features(step: int, **changes: float) -> dict[str, Any]:
    found = {"feature_std": 0.5, "effective_rank": 25.0, "knn_accuracy": 0.6} | changes
    return {"kind": "val", "step": step, "collapse": {}} | found


@pytest.mark.parametrize(
    ("changes", "begins"),
    [
        (
            {"feature_std": 0.059},
            "the features of all images are nearly alike (spread 0.059): lower optim.lr",
        ),
        (
            {"effective_rank": 1.9},
            "the features use hardly more than one direction (rank 1.9): lower optim.lr",
        ),
        ({"knn_accuracy": 0.29}, "the features get worse (k-NN accuracy 29.0 % after 60.0 %): stop here"),
    ],
)
def test_features_that_collapse_are_said_after_two_evaluations(
    changes: dict[str, float], begins: str
) -> None:
    records = [_features(200), *[_features(200 + 50 * n, **changes) for n in range(1, 6)]]
    said = _said(_watch(num_classes=None), records)
    assert [step for step, _ in said] == [300]
    assert said[0][1].startswith(begins)
    # A single bad evaluation is no trend.
    assert _said(_watch(num_classes=None), [records[0], records[1], records[0], records[2]]) == []


def test_sound_features_are_left_alone() -> None:
    edge = {"feature_std": 0.061, "effective_rank": 2.1, "knn_accuracy": 0.31}
    assert _said(_watch(), [_features(200), *[_features(200 + 50 * n, **edge) for n in range(1, 6)]]) == []
    # As fresh models may be.
    assert _said(_watch(), [_features(50 + n, feature_std=0.02) for n in range(5)]) == []
    # Two classes that are told apart lie on a line.
    apart = [_features(200 + n, effective_rank=1.1, knn_accuracy=0.6 + 0.05 * n) for n in range(5)]
    assert _said(_watch(), apart) == []


@pytest.mark.parametrize(
    ("number", "sound", "collapsed", "begins"),
    [
        ("target_std", 0.31, 0.29, "the targets of all patches become alike"),
        ("teacher_entropy", 0.5, 0.009, "the teacher gives all images one answer"),
        ("teacher_entropy", 0.9975, 0.9985, "the teacher's answer is the same for all prototypes"),
    ],
)
def test_targets_that_move_with_the_model(number: str, sound: float, collapsed: float, begins: str) -> None:
    watch = _watch(num_classes=None)
    # A loss that rises and stays above where it began says nothing here.
    losses = [1.0, 0.2, *[1.5] * 40]
    assert _said(watch, [_record(20 * n, loss, **{number: sound}) for n, loss in enumerate(losses)]) == []
    said = _said(watch, [_record(900 + n, 0.1, **{number: collapsed}) for n in range(6)])
    assert [step for step, _ in said] == [902]
    assert said[0][1].startswith(begins)


# Real runs.


def _warnings_of_a_run(folder: Path, lr: float) -> list[str]:
    config = load_config(
        "digits-vit",
        {
            "model.depth": 1,
            "model.embed_dim": 32,
            "model.patch_embed": "conv",
            "optim.lr": lr,
            "train.duration": "6 epochs",
            "train.batch_size": 64,
            "train.log_every": "10 steps",
            "train.eval_every": "2 epochs",
            "train.device": "cpu",
        },
    )
    run = prepare(config)
    assert run.splits.val is not None
    images = run.preprocessing.prepare(run.splits.val.batch(range(32))[0])
    watch = Watch(total=run.plan.total, clip_norm=config.optim.clip_norm, num_classes=10)
    found: list[str] = []
    fit(
        TrainingState(task=run.task, optimizer=build_optimizer(run.task, run.model, config.optim)),
        partial(training_batches, run),
        plan=run.plan,
        schedule=learning_rate(config.optim, run.plan.total, run.plan.steps_per_epoch, 64),
        accelerator=run.accelerator,
        clip_norm=config.optim.clip_norm,
        metrics=folder / "metrics.jsonl",
        seed=0,
        evaluate=lambda model: {
            "loss": 0.0,
            "accuracy": 0.0,
            "collapse": attention_collapse(model, images),
        },
        watch=lambda record: found.extend(watch.observe(record)) or [],
    )
    return found


def test_a_healthy_run_is_silent_and_one_with_a_hundredfold_rate_is_not(tmp_path: Path) -> None:
    assert _warnings_of_a_run(tmp_path, 2e-3) == []
    said = _warnings_of_a_run(tmp_path, 0.2)
    assert any("attention has collapsed onto single tokens" in text for text in said)
    assert len(said) == len(set(said))


@pytest.mark.parametrize(("momentum", "collapses"), [(0.99, False), (0.0, True)])
def test_a_jepa_whose_target_has_no_momentum_collapses_and_says_so(
    momentum: float, collapses: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(
        "digits-jepa",
        {
            "task.momentum": momentum,
            "model.depth": 2,
            "optim.lr": 5e-3,
            "train.duration": "5 epochs",
            "train.batch_size": 64,
            "train.eval_every": "1 epoch",
            "train.device": "cpu",
        },
    )
    train(config, tmp_path / "run", command="test")
    said = " ".join(capsys.readouterr().err.split())
    assert ("warning: the features of all images are nearly alike" in said) == collapses
    assert ("warning: the targets of all patches become alike" in said) == collapses
    assert "warning: the loss" not in said
