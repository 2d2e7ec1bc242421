"""Parameter groups and the learning rate at every step."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from vitrail.config import OptimSection
from vitrail.models import build_model
from vitrail.training.muon import orthogonalise
from vitrail.training.optim import build_optimizer, freeze, gradient_norms, learning_rate, parameter_groups


def _rates(total: int = 100, **changes: object) -> list[float]:
    section = OptimSection(lr=1.0, warmup="10 steps", **changes)
    at = learning_rate(section, total, steps_per_epoch=20, batch_size=8)
    return [at(step) for step in range(total)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "rsqrt", "wsd"])
def test_warmup_is_linear_and_reaches_the_peak(schedule: str) -> None:
    rates = _rates(schedule=schedule)
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(rates) == pytest.approx(1.0)
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(rates[10:]))


def test_shapes_follow_their_formulas() -> None:
    cosine = _rates(schedule="cosine", final_lr=0.1)
    assert cosine[55] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert cosine[-1] == pytest.approx(0.1, abs=1e-3)
    assert _rates(schedule="linear")[55] == pytest.approx(0.5)
    assert set(_rates(schedule="constant")[10:]) == {1.0}
    assert _rates(schedule="rsqrt")[39] == pytest.approx(0.5)
    wsd = _rates(schedule="wsd")
    assert set(wsd[10:82]) == {1.0}
    assert wsd[-1] < 0.06


def test_no_warmup_starts_at_the_peak() -> None:
    at = learning_rate(OptimSection(lr=0.5, warmup="0%"), 10, steps_per_epoch=5, batch_size=1)
    assert at(0) == 0.5


def test_only_matrices_decay() -> None:
    model = build_model("vit_mnist_2blk", layer_scale=0.1, registers=1)
    decayed, plain = parameter_groups(model, model, weight_decay=0.05)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)].rpartition(".")[2] for p in decayed["params"]} == {"weight"}
    assert all("norm" not in names[id(p)] for p in decayed["params"])
    kept = {names[id(p)] for p in plain["params"]}
    assert {"cls_token", "reg_token", "pos_embed", "norm.weight", "blocks.0.ls1.gamma", "head.bias"} <= kept
    assert decayed["weight_decay"] == 0.05
    assert plain["weight_decay"] == 0.0
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_frozen_parameters_are_left_out_and_frozen_parts_evaluate() -> None:
    model = build_model("vit_mnist_2blk", drop=0.5)
    freeze(model, ["patch_embed.*", "blocks.0.*"])
    optimizer = build_optimizer(model, model, OptimSection())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    frozen = {name for name, p in model.named_parameters() if id(p) not in held}
    assert frozen == {
        name for name, _ in model.named_parameters() if name.startswith(("patch_embed.", "blocks.0."))
    }
    model.train()
    assert not model.blocks[0].mlp.drop.training
    assert model.blocks[1].mlp.drop.training
    only_head = build_model("vit_mnist_2blk")
    freeze(only_head, ["!head.*"])
    assert [name for name, p in only_head.named_parameters() if p.requires_grad] == [
        "head.weight",
        "head.bias",
    ]
    with pytest.raises(
        ValueError,
        match=r"no parameter matches 'block\.0\.\*'; did you mean blocks\.0\.\*\? "
        r"the model's layers are blocks\.0\.\*,.* cls_token,",
    ):
        freeze(build_model("vit_mnist_2blk"), ["block.0.*"])
    with pytest.raises(ValueError, match="leaves nothing to train"):
        freeze(build_model("vit_mnist_2blk"), ["*"])


def test_layer_decay_scales_each_depth() -> None:
    model = build_model("vit_mnist_2blk")
    groups = parameter_groups(model, model, weight_decay=0.1, layer_decay=0.5)
    share = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    by_name = {name: share[id(p)] for name, p in model.named_parameters()}
    assert by_name["pos_embed"] == by_name["patch_embed.proj.weight"] == 0.125
    assert by_name["blocks.0.mlp.fc1.weight"] == by_name["blocks.0.norm1.bias"] == 0.25
    assert by_name["blocks.1.attn.qkv.weight"] == 0.5
    assert by_name["norm.weight"] == by_name["head.weight"] == 1.0
    assert len(share) == len(by_name)
    assert {decay[id(model.pos_embed)], decay[id(model.head.bias)]} == {0.0}
    assert decay[id(model.head.weight)] == 0.1


def test_gradient_norms_are_those_of_the_layers() -> None:
    model = build_model("vit_mnist_2blk")
    model(torch.randn(2, 1, 28, 28)).square().sum().backward()
    norms = gradient_norms(model)
    assert list(norms) == ["cls_token", "pos_embed", "patch_embed", "blocks.0", "blocks.1", "norm", "head"]
    expected = sum(p.grad.square().sum() for p in model.blocks[1].parameters()).sqrt()
    torch.testing.assert_close(norms["blocks.1"], expected)
    total = sum(norm.square() for norm in norms.values()).sqrt()
    torch.testing.assert_close(total, torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))


def test_muon_takes_the_matrices_and_adamw_the_rest() -> None:
    for name, excluded in {
        "cct_4_3x2_32": {"classifier.fc.weight", "classifier.attention_pool.weight"},
        "pvt_v2_cifar": {"head.weight"},
        "swin_mnist_2blk": {"head.fc.weight"},
    }.items():
        model = build_model(name)
        groups = parameter_groups(model, model, weight_decay=0.1, layer_decay=0.5, muon=True)
        by_muon = {id(p): group.get("muon", False) for group in groups for p in group["params"]}
        taken = {own for own, p in model.named_parameters() if by_muon[id(p)]}
        assert taken == {
            own
            for own, p in model.named_parameters()
            if p.ndim in (2, 4) and own not in excluded and "dwconv" not in own and "table" not in own
        }
        plain = parameter_groups(model, model, weight_decay=0.1, layer_decay=0.5)
        of_plain = {id(p): (g["weight_decay"], g["lr_scale"]) for g in plain for p in g["params"]}
        assert of_plain == {id(p): (g["weight_decay"], g["lr_scale"]) for g in groups for p in g["params"]}


def test_muon_equals_torchs_on_matrices_and_adamw_elsewhere() -> None:
    section = OptimSection(name="muon", lr=1e-2, weight_decay=0.1)
    ours, theirs = build_model("vit_mnist_2blk"), build_model("vit_mnist_2blk")
    theirs.load_state_dict(ours.state_dict())
    optimizer = build_optimizer(ours, ours, section)
    groups = parameter_groups(theirs, theirs, weight_decay=0.1, muon=True)
    matrices = [p for group in groups if group.get("muon") for p in group["params"] if p.ndim == 2]
    others = [group for group in groups if not group.get("muon")]
    muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=1e-2, fused=True)
    begin = {name: p.detach().clone() for name, p in ours.named_parameters()}
    for step in range(3):
        for mine, peer in zip(ours.parameters(), theirs.parameters(), strict=True):
            generator = torch.Generator().manual_seed(100 * mine.numel() + step)
            mine.grad = torch.randn(mine.shape, generator=generator)
            peer.grad = mine.grad.clone()
        for each in (optimizer, muon, adamw):
            each.step()
    of_matrices = {id(p) for p in matrices}
    compared = 0
    for (name, mine), peer in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if id(peer) in of_matrices:  # torch multiplies in bfloat16
            moved, expected = mine - begin[name], peer - begin[name]
            assert torch.nn.functional.cosine_similarity(moved.flatten(), expected.flatten(), dim=0) > 0.999
            torch.testing.assert_close(moved.norm(), expected.norm(), rtol=0.02, atol=0.0)
            compared += 1
        elif name != "patch_embed.proj.weight":  # a convolution, which torch's does not take
            assert torch.equal(mine, peer), name
    assert compared == 8


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (32, 32)])
def test_orthogonalised_matrices_keep_their_directions(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    values = torch.linalg.diagonal(left.T @ orthogonalise(matrix) @ right.T)
    assert values.min() > 0.6
    assert values.max() < 1.3
    off = left.T @ orthogonalise(matrix) @ right.T - torch.diag(values)
    assert off.abs().max() < 1e-4
    torch.testing.assert_close(orthogonalise(1e3 * matrix), orthogonalise(matrix), atol=1e-4, rtol=0.0)
    assert torch.equal(orthogonalise(torch.zeros(shape)), torch.zeros(shape))
