"""Places compared by what the model is told about them, for every way of telling it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor
from torch.nn import functional as F

from vitrail.components.position import rotate
from vitrail.explain.positions import Positions, read_positions
from vitrail.models import Encoder, build_model

ADDED = ["learned", "learned_2d", "sincos_1d", "sincos_2d"]


def tiny(**changes: Any) -> Encoder:
    torch.manual_seed(0)
    return build_model("vit_digits", **({"embed_dim": 16, "num_heads": 2, "depth": 2} | changes))


@pytest.mark.parametrize("position", ["learned", "learned_2d", "sincos_2d"])
def test_cosine_of_every_pair(position: str) -> None:
    model = tiny(position=position)
    found = read_positions(model, (4, 4)).similarity
    table = model.position_table((4, 4))
    assert table is not None
    table = table.detach()
    assert found.shape == (4, 4, 4, 4)
    for row, column, other_row, other_column in [(0, 0, 3, 2), (1, 2, 1, 3), (2, 1, 0, 0)]:
        expected = F.cosine_similarity(table[4 * row + column], table[4 * other_row + other_column], dim=0)
        torch.testing.assert_close(found[row, column, other_row, other_column], expected)
    torch.testing.assert_close(found.reshape(16, 16).diagonal(), torch.ones(16))


def test_another_grid() -> None:
    model = build_model("vit_digits", depth=1)
    assert read_positions(model, (3, 5)).similarity.shape == (3, 5, 3, 5)


@pytest.mark.parametrize("position", ADDED)
def test_norms_and_plane_are_those_of_the_table(position: str) -> None:
    model = tiny(position=position)
    table = model.position_table((3, 5))
    assert table is not None
    table = table.detach()
    found = read_positions(model, (3, 5))
    assert (found.kind, found.grid) == ("added", (3, 5))
    norms = table.norm(dim=1).reshape(3, 5)
    torch.testing.assert_close(found.norms, norms, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.row_norms, torch.stack([row.mean() for row in norms]))
    torch.testing.assert_close(found.column_norms, torch.stack([column.mean() for column in norms.T]))
    coordinates, shares = found.principal_components()
    reference = PCA(2, svd_solver="full").fit(table.double().numpy())
    expected = torch.from_numpy(reference.transform(table.double().numpy())).float().reshape(3, 5, 2)
    torch.testing.assert_close(
        shares, torch.from_numpy(reference.explained_variance_ratio_).float(), atol=1e-4, rtol=1e-4
    )
    for axis in range(2):
        own, theirs = coordinates[..., axis], expected[..., axis]
        assert next(value for value in own.flatten() if value.abs() > 0.99 * own.abs().max()) > 0
        sign = torch.sign((own * theirs).sum())
        torch.testing.assert_close(own, sign * theirs, atol=2e-3 * float(theirs.abs().max()), rtol=0)


@pytest.mark.parametrize("registers", [0, 2])
def test_rotary_similarity_is_what_a_rotation_leaves_of_a_query(registers: int) -> None:
    model = tiny(position="rotary", registers=registers)
    found = read_positions(model, (3, 4))
    assert found.kind == "rotary"
    d, prefix = 8, 1 + registers
    cosine, sine = (part[:, :, prefix:] for part in model.get_submodule("rotary")((3, 4)))
    units = torch.eye(d)[:, None, None].expand(d, 1, 12, d)  # every unit vector at every place
    turned = rotate(units, cosine, sine)[:, 0]  # [d, N, d]
    expected = torch.einsum("upe,uqe->pq", turned, turned) / d
    torch.testing.assert_close(found.similarity.reshape(12, 12), expected)
    torch.testing.assert_close(found.norms, torch.ones(3, 4))
    # The angle between two places depends on their offset only.
    torch.testing.assert_close(found.similarity[0, 0, 1, 2], found.similarity[1, 1, 2, 3])


def bias_similarity(pairs: list[Tensor]) -> Tensor:
    """By hand, from what is added to scores, [H, N, N] a block: how alike rows are."""
    N = pairs[0].shape[1]
    expected = torch.empty(N, N)
    rows = [torch.cat([head[i] - head[i].mean() for block in pairs for head in block]) for i in range(N)]
    for i in range(N):
        for j in range(N):
            expected[i, j] = F.cosine_similarity(rows[i], rows[j], dim=0)
    return expected


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_relative_bias_of_vit(grid: tuple[int, int], class_token: bool) -> None:
    model = tiny(position="relative", class_token=class_token, pool="mean")
    prefix = int(class_token)
    with torch.no_grad():
        pairs = [
            model.get_submodule(f"blocks.{n}.rel_pos")(grid)[0, :, prefix:, prefix:].detach() for n in (0, 1)
        ]
        offsets = model.position_bias(grid)
    assert list(offsets) == ["blocks.0", "blocks.1"]
    check_offsets(offsets["blocks.1"], pairs[1], grid)
    found = read_positions(model, grid)
    assert (found.kind, found.grid) == ("bias", grid)
    N = grid[0] * grid[1]
    torch.testing.assert_close(found.similarity.reshape(N, N), bias_similarity(pairs))


def check_offsets(offsets: Tensor, pairs: Tensor, window: tuple[int, int]) -> None:
    """Below and right of the middle the patch that asks lies below and right of the one asked."""
    rows, columns = window
    assert offsets.shape == (len(pairs), 2 * rows - 1, 2 * columns - 1)
    for i in range(rows * columns):
        for j in range(rows * columns):
            down, right = i // columns - j // columns, i % columns - j % columns
            assert torch.equal(offsets[:, rows - 1 + down, columns - 1 + right], pairs[:, i, j])


@pytest.mark.parametrize("name", ["swin_cifar", "swinv2_cifar"])
@pytest.mark.parametrize(("grid", "windows"), [((16, 16), [(4, 4), (4, 4)]), ((5, 3), [(4, 3), (3, 2)])])
def test_bias_within_windows(name: str, grid: tuple[int, int], windows: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    model = build_model(name)
    by_block = model.position_bias(grid)
    assert tuple(by_block) == model.block_names()
    first = []
    for block, offsets in by_block.items():
        window = windows[int(block.split(".")[1])]
        with torch.no_grad():
            pairs = model.get_submodule(f"{block}.attn").bias(window)  # type: ignore[operator]
        check_offsets(offsets, pairs, window)
        if window == windows[0]:
            first.append(pairs)
    found = read_positions(model, grid)
    assert (found.kind, found.grid) == ("bias", windows[0])
    N = windows[0][0] * windows[0][1]
    torch.testing.assert_close(found.similarity.reshape(N, N), bias_similarity(first), atol=1e-5, rtol=1e-4)


def test_a_bias_that_falls_with_distance_makes_near_places_alike() -> None:
    model = build_model("swin_cifar")
    offsets = torch.cartesian_prod(torch.arange(-3.0, 4), torch.arange(-3.0, 4))
    for name, parameter in model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            parameter.data = -offsets.norm(dim=1)[:, None].expand(-1, parameter.shape[1]).clone()
    similarity = read_positions(model, (16, 16)).similarity[0, 0]
    assert similarity[0, 0] == pytest.approx(1)
    assert similarity[0, 0] > similarity[0, 1] > similarity[0, 2] > similarity[0, 3] > similarity[3, 3]


@pytest.mark.parametrize(
    ("name", "changes"),
    [("vit_digits", {"position": "none"}), ("cct_2_3x2_32", {"position": "none"}), ("pvt_v2_cifar", {})],
)
def test_a_model_that_is_told_nothing_says_so(name: str, changes: dict[str, Any]) -> None:
    model = build_model(name, **changes)
    with pytest.raises(ValueError, match=f"{type(model).__name__} is not told where a patch is"):
        read_positions(model, (4, 4))


@pytest.mark.parametrize(
    "name",
    ["vit_cifar", "deit_cifar", "diffvit_cifar", "cait_cifar", "crossvit_cifar", "pvt_cifar", "swin_cifar",
     "swinv2_cifar", "cct_2_3x2_32", "cct_6_3x1_32_sine"],
)  # fmt: skip
@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (7, 3)])
def test_every_architecture_on_any_grid(name: str, grid: tuple[int, int]) -> None:
    model = build_model(name).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = read_positions(model, grid)
    rows, columns = found.grid
    assert found.grid == (min(grid[0], 4), min(grid[1], 4)) if found.kind == "bias" else found.grid == grid
    assert found.similarity.shape == (rows, columns, rows, columns)
    assert found.similarity.abs().max() <= 1
    coordinates, shares = found.principal_components()
    assert coordinates.shape == (rows, columns, 2)
    assert coordinates.isfinite().all()
    assert shares.sum() <= 1 + 1e-5
    assert (found.row_norms.shape, found.column_norms.shape) == ((rows,), (columns,))
    assert not found.products.requires_grad
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_zero_vectors_are_like_nothing() -> None:
    found = Positions(kind="added", products=torch.zeros(2, 2, 2, 2))
    assert torch.equal(found.similarity, torch.zeros(2, 2, 2, 2))
    coordinates, shares = found.principal_components()
    assert torch.equal(coordinates, torch.zeros(2, 2, 2))
    assert torch.equal(shares, torch.zeros(2))


def test_bad_grid() -> None:
    with pytest.raises(ValueError, match=r"at least 1 row and 1 column, got \(0, 4\)"):
        read_positions(tiny(), (0, 4))
