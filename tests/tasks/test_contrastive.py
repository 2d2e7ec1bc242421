"""Contrastive losses: the formulas, word by word; what pulls and what pushes; that they teach something."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torch.nn import functional as F

from vitrail.models import build_model
from vitrail.tasks.contrastive import (
    ClassifyInfoNCE,
    InfoNCE,
    SupCon,
    alignment_and_uniformity,
    nt_xent,
    similarities,
    spread,
    sup_con,
)

# One small model of each architecture, without a class token among them.
MODELS = {
    "vit_mnist_2blk": {"depth": 1},
    "vit_mnist_small": {"depth": 1},
    "deit_cifar": {"depth": 1},
    "cct_2_3x2_32": {},
    "cait_xxs24_224": {"img_size": 32, "depth": 1, "patch_size": 8},
    "crossvit_9_240": {"img_size": 48, "embed_dim": (12, 24), "depth": 1, "branch_depth": (1, 1)},
    "diffvit_small_patch16_224": {"img_size": 32, "depth": 1},
    "swin_tiny_patch4_window7_224": {"img_size": 32, "depths": (1, 1, 1, 1), "embed_dim": 24},
    "swinv2_tiny_window8_256": {"img_size": 32, "depths": (1, 1, 1, 1), "embed_dim": 24},
    "pvt_tiny": {"img_size": 32, "depths": (1, 1, 1, 1)},
    "pvt_v2_b0": {"img_size": 32, "depths": (1, 1, 1, 1)},
}


def _pair(count: int, dim: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, count, dim, generator=generator, dtype=torch.float64)
    return first, second


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def _nt_xent_by_loops(first: Tensor, second: Tensor, temperature: float) -> float:
    """SimCLR, algorithm 1."""
    count = len(first)
    z = [view[k] for k in range(count) for view in (first, second)]
    total = 0.0
    for i in range(2 * count):
        j = i + 1 if i % 2 == 0 else i - 1
        below = sum(math.exp(_cosine(z[i], z[k]) / temperature) for k in range(2 * count) if k != i)
        total -= math.log(math.exp(_cosine(z[i], z[j]) / temperature) / below)
    return total / (2 * count)


def _sup_con_by_loops(first: Tensor, second: Tensor, labels: list[int], temperature: float) -> float:
    """Khosla et al. 2020, equation 2."""
    z, y = [*first, *second], [*labels, *labels]
    total = 0.0
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        positives = [p for p in others if y[p] == y[i]]
        below = sum(math.exp(_cosine(z[i], z[a]) / temperature) for a in others)
        inner = sum(math.log(math.exp(_cosine(z[i], z[p]) / temperature) / below) for p in positives)
        total -= inner / len(positives)
    return total / len(z)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_nt_xent_is_the_papers_loop(temperature: float) -> None:
    first, second = _pair(6)
    assert float(nt_xent(first, second, temperature)) == pytest.approx(
        _nt_xent_by_loops(first, second, temperature), abs=1e-6
    )


def test_nt_xent_of_two_pairs_by_hand() -> None:
    # Each view equals its partner and is at a right angle to the other image's: cosines 1, 0, 0.
    first = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    expected = -math.log(math.e / (math.e + 2.0))
    assert float(nt_xent(first, 5.0 * first, 1.0)) == pytest.approx(expected, abs=1e-6)
    # Swapped partners: the positive has cosine 0, one of the negatives 1.
    swapped = -math.log(1.0 / (math.e + 2.0))
    assert float(nt_xent(first, first.flip(0), 1.0)) == pytest.approx(swapped, abs=1e-6)


@pytest.mark.parametrize("labels", [[0, 1, 0, 2, 1], [3, 3, 3, 3, 3], [0, 1, 2, 3, 4]])
def test_sup_con_is_the_papers_loop(labels: list[int]) -> None:
    first, second = _pair(5)
    expected = _sup_con_by_loops(first, second, labels, 0.3)
    assert float(sup_con(first, second, torch.tensor(labels), 0.3)) == pytest.approx(expected, abs=1e-6)


def test_sup_con_with_one_positive_is_nt_xent() -> None:
    first, second = _pair(8)
    labels = torch.randperm(8)
    torch.testing.assert_close(sup_con(first, second, labels, 0.2), nt_xent(first, second, 0.2))


def test_the_loss_does_not_know_order_views_or_lengths() -> None:
    first, second = _pair(6)
    order = torch.randperm(6)
    loss = nt_xent(first, second, 0.2)
    torch.testing.assert_close(nt_xent(first[order], second[order], 0.2), loss)
    torch.testing.assert_close(nt_xent(second, first, 0.2), loss)
    torch.testing.assert_close(nt_xent(3.0 * first, 0.1 * second, 0.2), loss)
    assert not torch.isclose(nt_xent(first[order], second, 0.2), loss)


def test_a_step_pulls_partners_together_and_pushes_others_apart() -> None:
    first, second = (view.requires_grad_() for view in _pair(8))
    nt_xent(first, second, 0.5).backward()
    with torch.no_grad():
        moved = [view - 0.5 * view.grad for view in (first, second) if view.grad is not None]
        before, other = similarities(first, second, 1.0)
        after, _ = similarities(*moved, 1.0)
        (near, apart), (nearer, further) = (
            alignment_and_uniformity(logits, other, 1.0) for logits in (before, after)
        )
    assert nearer < near
    assert further < apart


def test_half_precision_around_it_changes_nothing() -> None:
    first, second = (view.float() for view in _pair(6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = nt_xent(first, second, 0.05)
    torch.testing.assert_close(inside, nt_xent(first, second, 0.05), atol=0.0, rtol=0.0)


def test_alignment_and_uniformity_are_wang_and_isolas() -> None:
    first, second = _pair(5)
    logits, other = similarities(first, second, 0.3)
    alignment, uniformity = alignment_and_uniformity(logits, other, 0.3)
    a, b = (F.normalize(view, dim=1) for view in (first, second))
    assert float(alignment) == pytest.approx(float((a - b).norm(dim=1).pow(2).mean()), abs=1e-6)
    kernels = [
        math.exp(-2.0 * float((x - y).pow(2).sum()))
        for i, pair in enumerate(zip(a, b, strict=True))
        for k, rest in enumerate(zip(a, b, strict=True))
        if i != k
        for x in pair
        for y in rest
    ]
    assert float(uniformity) == pytest.approx(math.log(sum(kernels) / len(kernels)), abs=1e-6)


def test_spread_tells_collapse() -> None:
    torch.manual_seed(0)
    assert float(spread(torch.randn(4000, 64))) == pytest.approx(1.0, abs=0.01)
    assert float(spread(torch.ones(16, 64) * torch.rand(16, 1))) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(("name", "changes"), MODELS.items(), ids=MODELS.keys())
def test_every_architecture_takes_a_step(name: str, changes: dict) -> None:
    torch.manual_seed(0)
    model = build_model(name, **changes)
    task = InfoNCE(model, projection_dim=16)
    views = torch.randn(2, 2, model.config.in_chans, *model.config.image_shape)
    output = task({"views": views}, 0)
    assert output.keys() == {"loss", "alignment", "uniformity", "feature_std"}
    assert all(value.ndim == 0 and value.isfinite() for value in output.values())
    output["loss"].backward()
    # DDP waits for each of them.
    assert [name for name, own in task.named_parameters() if own.requires_grad and own.grad is None] == []
    assert task.trained() is model
    with torch.no_grad():
        assert model(views[:, 0]).shape == (2, model.num_features)
    # What is saved builds the same model again.
    assert model.config.build().state_dict().keys() == model.state_dict().keys()


def test_infonce_is_the_loss_of_the_projected_embeddings() -> None:
    torch.manual_seed(0)
    model = build_model("vit_mnist_2blk")
    task = InfoNCE(model, temperature=0.2, projection_dim=24, hidden_dim=40)
    assert [tuple(own.shape) for own in task.projection.parameters()] == [(40, 64), (40,), (24, 40), (24,)]
    views = torch.randn(5, 2, 1, 28, 28)
    first, second = (
        task.projection(model.forward_features(views[:, number]).prefix[:, 0]) for number in (0, 1)
    )
    torch.testing.assert_close(task({"views": views}, 0)["loss"], nt_xent(first, second, 0.2))
    labelled = SupCon(model, temperature=0.2, projection_dim=24, hidden_dim=40)
    labelled.load_state_dict(task.state_dict())
    labels = torch.tensor([0, 1, 1, 2, 0])
    torch.testing.assert_close(
        labelled({"views": views, "targets": labels}, 0)["loss"], sup_con(first, second, labels, 0.2)
    )


class Guarded(dict):
    """A batch whose labels nobody may read."""

    def __getitem__(self, key: str) -> Tensor:
        assert key != "targets", "a label was read"
        return super().__getitem__(key)


def test_infonce_reads_no_label() -> None:
    assert not InfoNCE.needs_labels
    assert SupCon.needs_labels
    task = InfoNCE(build_model("vit_mnist_2blk"))
    task(Guarded(views=torch.randn(2, 2, 1, 28, 28), targets=torch.zeros(2)), 0)
    with pytest.raises(AssertionError, match="a label was read"):
        SupCon(build_model("vit_mnist_2blk"))(
            Guarded(views=torch.randn(2, 2, 1, 28, 28), targets=torch.zeros(2)), 0
        )


@pytest.mark.parametrize("name", ["vit_mnist_2blk", "vit_mnist_small", "crossvit_9_240"])
def test_infonce_beside_classification(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(name, num_classes=10, **MODELS[name])
    task = ClassifyInfoNCE(model, weight=0.3, label_smoothing=0.1, projection_dim=16).eval()
    views = torch.randn(4, 2, model.config.in_chans, *model.config.image_shape)
    labels = torch.tensor([1, 2, 2, 7])
    output = task({"views": views, "targets": labels}, 0)
    logits = [model(views[:, number]) for number in (0, 1)]
    classify = torch.stack([F.cross_entropy(one, labels, label_smoothing=0.1) for one in logits]).mean()
    seen = [model.forward_features(views[:, number]) for number in (0, 1)]
    tokens = [one.prefix[:, 0] if one.prefix.shape[1] else one.patches.mean(dim=1) for one in seen]
    infonce = nt_xent(task.projection(tokens[0]), task.projection(tokens[1]), 0.1)
    torch.testing.assert_close(output["classify_loss"], classify)
    torch.testing.assert_close(output["infonce_loss"], infonce)
    torch.testing.assert_close(output["loss"], classify + 0.3 * infonce)
    shares = F.one_hot(labels, 10).float()
    torch.testing.assert_close(task({"views": views, "targets": shares}, 0)["loss"], output["loss"])
    output["loss"].backward()
    assert [name for name, own in task.named_parameters() if own.requires_grad and own.grad is None] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"temperature must be above 0, got 0\.0"),
        ({"temperature": math.nan}, "temperature must be above 0, got nan"),
        ({"projection_dim": 0}, "projection_dim must be at least 1, got 0"),
        ({"hidden_dim": 0}, "hidden_dim must be at least 1, got 0"),
    ],
)
@pytest.mark.parametrize("kind", [InfoNCE, SupCon, ClassifyInfoNCE])
def test_bad_options_are_told_in_one_line(kind: type, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        kind(build_model("vit_mnist_2blk"), **options)


def test_bad_weights_and_batches_are_told_in_one_line() -> None:
    for options in ({"weight": -0.1}, {"label_smoothing": 1.0}):
        with pytest.raises(ValueError, match=rf"^{next(iter(options))} must .*, got -?\d\.\d$"):
            ClassifyInfoNCE(build_model("vit_mnist_2blk"), **options)
    with pytest.raises(ValueError, match="needs at least 2 images at a time, got 1: raise the batch size"):
        nt_xent(torch.randn(1, 4), torch.randn(1, 4), 0.1)
    with pytest.raises(
        ValueError, match="supcon needs labels, got shares of classes: switch mixup and cutmix"
    ):
        sup_con(torch.randn(4, 4), torch.randn(4, 4), torch.rand(4, 10), 0.1)


def test_infonce_teaches_what_neighbours_find() -> None:
    """k-NN on digits: after some dozens of steps the neighbours are of the same class more often."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8.0 - 1.0
    torch.manual_seed(0)
    model = build_model("vit_digits", depth=1)
    task = InfoNCE(model, temperature=0.2)

    def accuracy() -> float:
        with torch.no_grad():
            features = F.normalize(model.eval()(pixels), dim=1).numpy()
        model.train()
        half = np.arange(len(labels)) % 2 == 0
        neighbours = KNeighborsClassifier(5).fit(features[half], labels[half])
        return float(neighbours.score(features[~half], labels[~half]))

    def view(batch: Tensor) -> Tensor:
        """Shifted by up to a pixel, and noisy."""
        padded = F.pad(batch, (1, 1, 1, 1), value=-1.0)
        down, right = torch.randint(0, 3, (2,)).tolist()
        return padded[:, :, down : down + 8, right : right + 8] + 0.3 * torch.randn_like(batch)

    before, losses = accuracy(), []
    optimizer = torch.optim.AdamW(task.parameters(), lr=3e-3)
    for step in range(40):
        batch = pixels[torch.randperm(len(pixels))[:128]]
        views = torch.stack([torch.cat([view(part) for part in batch.split(32)]) for _ in range(2)], dim=1)
        output = task({"views": views}, step)
        output["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(output["loss"].detach()))
    assert losses[-1] < 0.8 * losses[0]
    after = accuracy()
    assert after > before + 0.04, (before, after)
