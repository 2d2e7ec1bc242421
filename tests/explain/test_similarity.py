"""CKA against the formulas of its papers, written out; the Jensen-Shannon distance against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from torch import Tensor, nn

from vitrail.components.tap import taps
from vitrail.explain.similarity import BatchedCKA, jensen_shannon, layer_similarity, linear_cka
from vitrail.models import build_model, list_models


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def related(images: int, channels: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two representations that share something."""
    first = numbers(images, channels, seed=seed)
    return first, first[:, :3] @ numbers(3, 7, seed=9) + numbers(images, 7, seed=seed + 100)


def cka_by_hand(x: Tensor, y: Tensor) -> float:
    """Kornblith et al. 2019: tr(K H L H) / sqrt(tr(K H K H) tr(L H L H))."""
    n = len(x)
    H = torch.eye(n, dtype=torch.float64) - 1 / n
    K, L = x @ x.T, y @ y.T
    return float((K @ H @ L @ H).trace() / ((K @ H @ K @ H).trace() * (L @ H @ L @ H).trace()).sqrt())


def hsic_by_hand(x: Tensor, y: Tensor) -> float:
    """Song et al. 2012, equation 5: the unbiased estimate, term by term."""
    n = len(x)
    K, L = ((values @ values.T).fill_diagonal_(0) for values in (x, y))
    one = torch.ones(n, dtype=torch.float64)
    terms = (
        (K @ L).trace()
        + (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2))
        - 2 / (n - 2) * (one @ K @ L @ one)
    )
    return float(terms / (n * (n - 3)))


def unbiased_by_hand(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Nguyen et al. 2021, equation 3, batches weighted by their images."""

    def mean(values: list[float]) -> float:
        return sum(value * len(x) for value, (x, _) in zip(values, pairs, strict=True))

    cross = mean([hsic_by_hand(x, y) for x, y in pairs])
    own = mean([hsic_by_hand(x, x) for x, _ in pairs]) * mean([hsic_by_hand(y, y) for _, y in pairs])
    return cross / math.sqrt(own)


@pytest.mark.parametrize("channels", [5, 200])  # products over channels, and over images
def test_linear_cka_is_the_formula(channels: int) -> None:
    x, y = related(40, channels)
    assert linear_cka(x, y) == pytest.approx(cka_by_hand(x, y), rel=1e-9)
    assert linear_cka(x, x) == pytest.approx(1)
    wide = numbers(40, 3, 50, seed=4)
    assert linear_cka(x, wide) == pytest.approx(cka_by_hand(x, wide.flatten(1)), rel=1e-9)


def rotation(channels: int) -> Tensor:
    return torch.linalg.qr(numbers(channels, channels, seed=7)).Q


def test_rotation_scale_and_shift_change_nothing_but_a_linear_map_does() -> None:
    x, y = related(40, 12)
    moved = -3.5 * x @ rotation(12) + numbers(12, seed=8)
    assert linear_cka(moved, y) == pytest.approx(linear_cka(x, y), rel=1e-9)
    stretched = x * torch.tensor([30.0] + [1.0] * 11)
    assert abs(linear_cka(stretched, y) - linear_cka(x, y)) > 0.1
    batched = [BatchedCKA() for _ in range(2)]
    batched[0].add([x], [y])
    batched[1].add([moved], [y])
    torch.testing.assert_close(batched[0].result(), batched[1].result(), atol=1e-6, rtol=0)


def test_one_batch_is_the_unbiased_formula_on_all_data() -> None:
    x, y = related(40, 12)
    counted = BatchedCKA()
    counted.add([x, y], [y, x, x[:, :4]])
    found = counted.result()
    assert found.shape == (2, 3)
    assert float(found[0, 0]) == pytest.approx(unbiased_by_hand([(x, y)]), rel=1e-5)
    assert float(found[0, 2]) == pytest.approx(unbiased_by_hand([(x, x[:, :4])]), rel=1e-5)
    assert float(found[0, 1]) == pytest.approx(1)
    assert float(found[1, 0]) == pytest.approx(1)


def test_batches_count_by_their_images() -> None:
    pairs = [related(images, 12, seed=images) for images in (30, 12, 5)]
    counted = BatchedCKA()
    for x, y in pairs:
        counted.add([x], [y])
    counted.add([numbers(3, 12)], [numbers(3, 7)])  # too few for an estimate
    assert counted.images == 47
    assert counted.result().item() == pytest.approx(unbiased_by_hand(pairs), rel=1e-5)


def test_chance_is_zero_in_batches_where_plain_cka_is_not() -> None:
    x, y = numbers(400, 300), numbers(400, 300, seed=1)
    counted = BatchedCKA()
    for first, second in zip(x.split(20), y.split(20), strict=True):
        counted.add([first], [second])
    assert linear_cka(x[:20], y[:20]) > 0.8
    assert abs(counted.result().item()) < 0.05


def test_what_is_alike_for_all_images() -> None:
    x = numbers(37, 6)
    alike = (1000 * numbers(6, seed=3)).expand(37, 6)
    assert (alike - alike.mean(dim=0)).any()  # but for rounding
    counted = BatchedCKA()
    counted.add([x, alike], [x])
    assert counted.result()[0].item() == pytest.approx(1)
    assert counted.result()[1].isnan()
    with pytest.raises(ValueError, match="the second representation is the same for all 37 images"):
        linear_cka(x, alike)


def test_bad_representations() -> None:
    with pytest.raises(ValueError, match="of the same images are compared, got 4 and 5"):
        linear_cka(numbers(4, 2), numbers(5, 2))
    counted = BatchedCKA()
    with pytest.raises(ValueError, match=r"got 1 and 1, of \[4, 5\] images"):
        counted.add([numbers(4, 2)], [numbers(5, 2)])
    with pytest.raises(ValueError, match="at least one on each side; got 0 and 1"):
        counted.add([], [numbers(5, 2)])
    with pytest.raises(ValueError, match="not finite"):
        counted.add([numbers(5, 2)], [numbers(5, 2) * torch.nan])
    counted.add([numbers(3, 2)], [numbers(3, 2)])
    with pytest.raises(ValueError, match="no batch of at least 4 images"):
        counted.result()


ARCHITECTURES = [*list_models("*cifar*"), "vit_mnist_2blk", "swin_mnist_2blk", "cct_2_3x2_32"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layers_of_every_architecture(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(name)
    first, second = (
        torch.randn(count, model.config.in_chans, 19, 26, generator=torch.Generator().manual_seed(count))
        for count in (6, 5)
    )
    model.train()
    part = next(model.children())
    part.eval()
    modes = [module.training for module in model.modules()]
    found = layer_similarity(model, iter([first, second, first[:3]]))
    assert modes == [module.training for module in model.modules()]
    assert not any(tap.watched for tap in taps(model).values())
    assert all(parameter.grad is None for parameter in model.parameters())
    depth = len(model.block_names())
    assert found.layers == found.other_layers == tuple(range(depth))
    assert found.images == 11
    torch.testing.assert_close(found.values.diagonal(), torch.ones(depth, dtype=torch.float64))
    torch.testing.assert_close(found.values, found.values.T)
    model.eval()
    with torch.no_grad():
        seen = [model.forward_features(images, layers=(0, depth - 1)).layers for images in (first, second)]
    pairs = [
        tuple(
            torch.cat([layers[n].prefix, layers[n].patches], dim=1).flatten(1).double()
            for n in (0, depth - 1)
        )
        for layers in seen
    ]
    expected = unbiased_by_hand([(x, y) for x, y in pairs])
    assert found.values[0, -1].item() == pytest.approx(expected, abs=1e-4)


def test_two_models() -> None:
    torch.manual_seed(0)
    vit, swin = build_model("vit_cifar"), build_model("swin_cifar")
    batches = [torch.randn(6, 3, 16, 16) for _ in range(2)]
    found = layer_similarity(vit, batches, swin)
    assert found.values.shape == (2, 6)
    assert (found.layers, found.other_layers) == ((0, 1), (0, 1, 2, 3, 4, 5))
    torch.testing.assert_close(layer_similarity(swin, batches, vit).values, found.values.T)
    twin = build_model("vit_cifar")
    twin.load_state_dict(vit.state_dict())
    torch.testing.assert_close(
        layer_similarity(vit, batches, twin).values, layer_similarity(vit, batches).values
    )


def test_dropout_takes_no_part() -> None:
    torch.manual_seed(0)
    model = build_model("vit_mnist_2blk", drop=0.5)
    images = torch.randn(6, 1, 28, 28)
    expected = layer_similarity(model.eval(), [images]).values
    assert torch.equal(layer_similarity(model.train(), [images]).values, expected)


def test_modes_after_an_error() -> None:
    model = build_model("vit_cifar").train()
    with pytest.raises(ValueError, match="expected images"):
        layer_similarity(model, [torch.randn(8, 1, 32, 32)])
    assert all(module.training for module in model.modules() if not isinstance(module, nn.Identity))
    with pytest.raises(ValueError, match="no batch of at least 4 images"):
        layer_similarity(model, [])


def test_jensen_shannon_is_scipys_in_bits() -> None:
    p, q = numbers(6, 9).abs(), numbers(6, 9, seed=1).abs()
    expected = [jensenshannon(one, other, base=2) for one, other in zip(p.numpy(), q.numpy(), strict=True)]
    np.testing.assert_allclose(jensen_shannon(p, q).numpy(), expected, rtol=1e-9)
    np.testing.assert_allclose(jensen_shannon(5 * p, q).numpy(), expected, rtol=1e-9)
    np.testing.assert_allclose(jensen_shannon(p.float(), q.float()).numpy(), expected, rtol=1e-4)


def test_jensen_shannon_is_a_distance_from_0_to_1() -> None:
    p = numbers(8, 5).abs()
    pairs = jensen_shannon(p[:, None], p[None])
    assert pairs.shape == (8, 8)
    assert torch.equal(pairs.diagonal(), torch.zeros(8, dtype=torch.float64))
    torch.testing.assert_close(pairs, pairs.T)
    assert (pairs[:, :, None] <= pairs[:, None] + pairs.T[None] + 1e-12).all()  # d(i,j) <= d(i,k) + d(k,j)
    one, other = torch.tensor([0.5, 0.5, 0.0, 0.0]), torch.tensor([0.0, 0.0, 0.0, 1.0])
    assert jensen_shannon(one, other).item() == pytest.approx(1)


@pytest.mark.parametrize("bad", [[0.5, -0.5, 1.0], [0.0, 0.0, 0.0], [1.0, math.nan, 0.0]])
def test_bad_distributions(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="the second distribution has values that are negative or not"):
        jensen_shannon(torch.ones(3), torch.tensor(bad))
