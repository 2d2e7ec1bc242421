"""Token merging and early exit: what must not change, what must become less, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.adaptive import EarlyExit, MergedViT, adaptive_curve, fit_early_exit, merge_similar
from vitrail.adaptive.curve import macs_by_exit
from vitrail.datasets import Preprocessing, load_dataset
from vitrail.evaluation.cost import count_macs
from vitrail.models import build_model
from vitrail.models.vit import ViT

POOLS: dict[str, dict[str, object]] = {
    "cls": {},
    "registers": {"registers": 2},
    "distilled": {"distillation": True},
    "mean": {"class_token": False, "pool": "mean"},
    "fc_norm": {"class_token": False, "pool": "mean", "fc_norm": True},
    "seqpool": {"class_token": False, "pool": "seqpool"},
}


def vit(**changes: object) -> ViT:
    """A small one, with random weights in every parameter: 4 x 4 patches, 3 blocks."""
    settings: dict[str, object] = {
        "depth": 3,
        "embed_dim": 24,
        "num_heads": 3,
        "img_size": 16,
        "patch_size": 4,
    }
    model = build_model("vit_cifar_plain", **(settings | changes)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    assert isinstance(model, ViT)
    return model


def slow_merge(tokens: Tensor, sizes: Tensor, keys: Tensor, count: int, prefix: int) -> tuple[Tensor, Tensor]:
    """Section 3 of the paper, one image and one pair at a time."""
    all_tokens, all_sizes = [], []
    for token, size, key in zip(tokens, sizes, keys, strict=True):
        seekers = list(range(prefix, len(token), 2))
        sought = list(range(prefix + 1, len(token), 2))
        best = {}
        for one in seekers:
            likeness = [float(F.cosine_similarity(key[one], key[other], dim=0)) for other in sought]
            best[one] = max(likeness), sought[likeness.index(max(likeness))]
        ranked = sorted(seekers, key=lambda one: -best[one][0])
        groups = {other: [other] for other in sought}
        for one in ranked[:count]:
            groups[best[one][1]].append(one)
        order = [[own] for own in range(prefix)] + [[own] for own in ranked[count:]] + list(groups.values())
        all_sizes.append(torch.stack([size[own].sum(dim=0) for own in order]))
        all_tokens.append(
            torch.stack([(token[own] * size[own]).sum(dim=0) / size[own].sum() for own in order])
        )
    return torch.stack(all_tokens), torch.stack(all_sizes)


@pytest.mark.parametrize("patches", [9, 10])
@pytest.mark.parametrize("prefix", [0, 2])
def test_merging_is_that_of_the_paper(patches: int, prefix: int) -> None:
    tokens, keys = torch.randn(2, 3, prefix + patches, 7).unbind()
    sizes = torch.randint(1, 5, (3, prefix + patches, 1)).float()
    for count in (0, 1, 3):
        found = merge_similar(tokens, sizes, keys, count, prefix)
        expected = slow_merge(tokens, sizes, keys, count, prefix)
        if count:
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert found[0].shape == (3, prefix + patches - count, 7)
        torch.testing.assert_close(found[1].sum(dim=1), sizes.sum(dim=1))


def test_at_most_half_of_the_patches_are_merged() -> None:
    tokens = torch.randn(2, 1 + 9, 4)
    found, sizes = merge_similar(tokens, torch.ones(2, 10, 1), tokens, 100, 1)
    assert found.shape == (2, 10 - 4, 4)
    assert torch.equal(found[:, 0], tokens[:, 0])
    assert sizes.sum() == 20


@pytest.mark.parametrize("pool", POOLS)
def test_nothing_merged_changes_nothing(pool: str) -> None:
    model, images = vit(**POOLS[pool]), torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(MergedViT(model, 0)(images), model(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pool", POOLS)
def test_merging_equal_patches_changes_nothing(pool: str) -> None:
    """Tokens that are equal stay equal, and a merged one counts as often as it stands for."""
    model = vit(position="none", **POOLS[pool])
    images = torch.randn(3, 3, 4, 4).repeat(1, 1, 4, 4)
    merged = MergedViT(model, 3)
    torch.testing.assert_close(merged(images), model(images), atol=1e-4, rtol=1e-4)
    other = torch.randn(3, 3, 16, 16)
    assert (merged(other) - model(other)).abs().max() > 1e-2


def test_merging_at_another_size() -> None:
    model, images = vit(), torch.randn(2, 3, 20, 28)
    torch.testing.assert_close(MergedViT(model, 0)(images), model(images), atol=1e-5, rtol=1e-5)
    assert MergedViT(model, 5)(images).shape == (2, 10)


def test_multiply_adds_of_merging_are_those_of_fewer_tokens() -> None:
    model, merged, D = vit(), 3, 24
    found = count_macs(MergedViT(model, merged), (3, 16, 16))
    expected, L = 16 * 48 * D, 17
    for _ in range(3):
        expected += 4 * L * D * D + 2 * L * L * D  # projections, both attention products
        seeking = (L - 1 + 1) // 2
        expected += seeking * (L - 1 - seeking) * (D // 3)  # what is like what
        L -= merged
        expected += 2 * L * D * 2 * D
    assert found == expected + 10 * D
    assert found < count_macs(model, (3, 16, 16))


def exits(model: ViT) -> dict[int, nn.Linear]:
    return {number: nn.Linear(model.num_features, 10) for number in range(len(model.blocks) - 1)}


@pytest.mark.parametrize("pool", POOLS)
def test_who_is_never_sure_gets_the_models_answer(pool: str) -> None:
    model, images = vit(**POOLS[pool]), torch.randn(4, 3, 16, 16)
    logits, left = EarlyExit(model, exits(model), 1.1).answer(images)
    torch.testing.assert_close(logits, model(images), atol=1e-5, rtol=1e-5)
    assert left.tolist() == [2] * 4


@torch.no_grad()
@pytest.mark.parametrize("pool", POOLS)
def test_an_image_leaves_where_it_would_alone(pool: str) -> None:
    model, images = vit(**POOLS[pool]), torch.randn(20, 3, 16, 16)
    heads = exits(model)
    sure = torch.cat(
        [
            heads[number](_pooled(model, images, number)).softmax(dim=1).amax(dim=1)[:, None]
            for number in range(2)
        ],
        dim=1,
    )
    ranked = sure[:, 0].sort().values
    way = EarlyExit(model, heads, float(ranked[9] + ranked[10]) / 2)
    logits, left = way.answer(images)
    expected = [0 if one >= way.threshold else 1 if two >= way.threshold else 2 for one, two in sure.tolist()]
    assert left.tolist() == expected
    assert 0 in expected
    assert len(set(expected)) > 1
    alone = torch.cat([way(image[None]) for image in images])
    torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-5)
    assert way.at(0.0).answer(images)[1].tolist() == [0] * 20


def _pooled(model: ViT, images: Tensor, block: int) -> Tensor:
    features = model.forward_features(images, layers=[block]).layers[block]
    return model.fc_norm(model.pool(features))


def test_multiply_adds_of_exits_add_up() -> None:
    model = vit()
    way = EarlyExit(model, exits(model), 0.5)
    found = macs_by_exit(way, (3, 16, 16))
    assert int(found[-1]) == count_macs(model, (3, 16, 16)) + 2 * 10 * 24
    assert found.diff().min() > 0


def test_exits_of_digits_and_their_curve() -> None:
    splits = load_dataset("digits")
    model = build_model("vit_digits", depth=3)
    preprocessing = Preprocessing(img_size=(8, 8), in_chans=1, mean=splits.train.mean, std=splits.train.std)
    way = fit_early_exit(model, splits.train, preprocessing)
    first = way.at(0.0)
    images = preprocessing.prepare(torch.from_numpy(splits.test.images))
    right = (first(images).argmax(dim=1) == torch.from_numpy(splits.test.labels)).float().mean()
    assert right > 0.85  # of random features
    curve = adaptive_curve(model, preprocessing, splits, merged=[2], thresholds=[0.5, 0.99])
    none, merged, eager, careful = curve.points
    assert (none.method, merged.method, eager.method) == ("none", "merging", "early exit")
    assert none.agreement == 1.0
    assert merged.macs < none.macs
    assert eager.macs < careful.macs
    assert 1 <= eager.depth < careful.depth <= 3
    assert eager.accuracy > none.accuracy  # the untrained model guesses
    text = curve.text()
    assert f"{100 * eager.accuracy:.2f}%" in text
    assert len(text.splitlines()) == 2 + 4
    assert curve.to_dict()["points"][1]["setting"] == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MergedViT(build_model("swin_cifar"), 1), "plain ViT with a classifier, got Swin"),
        (lambda: MergedViT(vit(position="rotary", embed_dim=48), 1), "got 'rotary'"),
        (lambda: MergedViT(vit(attention="sparse_local"), 1), "got 'sparse_local'"),
        (lambda: MergedViT(vit(num_classes=0), 1), "has none"),
        (lambda: MergedViT(vit(), -1), "expected 0 patches"),
        (lambda: EarlyExit(vit(), {2: nn.Linear(24, 10)}, 0.5), "expected blocks 0 to 1, got 2"),
    ],
)
def test_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_exits_need_two_blocks_and_all_classes() -> None:
    splits = load_dataset("digits")
    preprocessing = Preprocessing(img_size=(8, 8), in_chans=1, mean=splits.train.mean, std=splits.train.std)
    with pytest.raises(ValueError, match="two blocks or more"):
        fit_early_exit(build_model("vit_digits", depth=1), splits.train, preprocessing)
    some = splits.train.subset((splits.train.labels != 7).nonzero()[0])
    with pytest.raises(ValueError, match="none of class 7"):
        fit_early_exit(build_model("vit_digits"), some, preprocessing)
    with pytest.raises(ValueError, match="no test images"):
        adaptive_curve(
            build_model("vit_digits"), preprocessing, dataclasses.replace(splits, test=splits.test.subset([]))
        )
