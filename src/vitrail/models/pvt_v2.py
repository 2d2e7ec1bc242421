"""PVT v2: overlapping patches, a depth-wise convolution in the MLP, no positions, no class token.

    B batch, N patches of the stage at hand, D the stage's width

Paper: Wang et al. 2022, "PVT v2: Improved Baselines with Pyramid Vision Transformer". The zero padding of the
depth-wise convolutions is what tells the model where a patch is, so any image size works with nothing to
resample. `linear=True` is the paper's PVT v2 Li: keys from 7 x 7 regions instead of squares of fixed size.
Parameter names are timm's, so its checkpoints load strictly; SegFormer's encoder is nearly the same.

What differs from timm and the authors' code: grids that a reduction does not divide are padded, see
`vitrail.components.reduction`; where they divide, the numbers are equal.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.components.flow import AttentionStep, Flow, MergeStep, Readout, Tokens, padded_squares, squares
from vitrail.components.mlp import hidden_width
from vitrail.components.patch import PatchEmbedding
from vitrail.components.position import Grid
from vitrail.components.reduction import (
    PooledAttention,
    ReducedAttention,
    SpatialReductionAttention,
)
from vitrail.components.residual import DropPath, drop_path_rates
from vitrail.components.tap import Tap
from vitrail.models.encoder import Encoder, Features, Fill, asked_blocks
from vitrail.models.options import check_ranges


@dataclass(frozen=True, kw_only=True, slots=True)
class PVTv2Config:
    """Everything that decides a PVT v2; the defaults are PVT v2-B1. Tuples hold one value a stage."""

    img_size: int | tuple[int, int] = 224  # height and width that the variant is meant for; any other works
    patch_size: int = 4  # stride of the first stage, its kernel is 2 p - 1; each later stage halves the grid
    in_chans: int = 3
    num_classes: int = 1000  # 0: no head, the mean of the patches is returned
    embed_dims: tuple[int, ...] = (64, 128, 320, 512)
    depths: tuple[int, ...] = (2, 2, 2, 2)
    num_heads: tuple[int, ...] = (1, 2, 5, 8)
    mlp_ratios: tuple[float, ...] = (8, 8, 4, 4)
    sr_ratios: tuple[int, ...] = (8, 4, 2, 1)  # a key stands for so many rows and columns
    linear: bool = False  # PVT v2 Li: keys from 7 x 7 regions, sr_ratios are not used
    drop: float = 0.0  # after both MLP layers and the attention's projection
    attn_drop: float = 0.0
    drop_path: float = 0.0  # at the last block, growing linearly from 0 over all stages

    def __post_init__(self) -> None:
        check_ranges(self)
        for name in ("embed_dims", "num_heads", "mlp_ratios", "sr_ratios"):
            values = getattr(self, name)
            if len(values) != len(self.depths):
                raise ValueError(
                    f"{name} needs one value for each of {len(self.depths)} stages (depths), got {values}"
                )
        for dim, heads in zip(self.embed_dims, self.num_heads, strict=True):
            if dim % heads:
                raise ValueError(f"embed_dims: {dim} is not divisible by its num_heads {heads}")

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return (self.img_size, self.img_size) if isinstance(self.img_size, int) else self.img_size

    def build(self) -> PVTv2:
        """The model, freshly initialised."""
        return PVTv2(self)


class OverlappingPatches(PatchEmbedding):
    """One convolution with stride p and kernel 2 p - 1, then a LayerNorm over the channels."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__(patch_size, in_chans, embed_dim)
        kernel, padding = 2 * patch_size - 1, patch_size - 1
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel, stride=patch_size, padding=padding)
        self.norm = nn.LayerNorm(embed_dim)

    def embed(self, images: Tensor) -> Tensor:
        """Padded images or maps [B, C, H, W] -> maps [B, D, rows, columns]."""
        maps = self.proj(images.contiguous(memory_format=torch.channels_last))
        return self.norm(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvMlp(nn.Module):
    """Linear, depth-wise 3x3 convolution, GELU, linear; PVT v2 Li has a ReLU before the convolution.

    The tap `hidden` sees [B, N, hidden_dim] after the GELU.
    """

    def __init__(self, dim: int, hidden_dim: int, drop: float, relu: bool) -> None:
        super().__init__()
        self.relu = relu
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, kernel_size=3, padding=1, groups=hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)
        self.hidden = Tap()

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        x = self.fc1(x)
        if self.relu:
            x = F.relu(x)
        maps = self.dwconv(x.transpose(1, 2).unflatten(2, grid))  # [B, hidden, rows, columns], channels last
        x = maps.flatten(2).transpose(1, 2)
        return self.drop(self.fc2(self.drop(self.hidden(F.gelu(x)))))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Taps: `mid` [B, N, D] after the attention's residual sum, `out` [B, N, D] after the MLP's.
    """

    def __init__(self, config: PVTv2Config, stage: int, drop_path: float) -> None:
        super().__init__()
        dim, heads = config.embed_dims[stage], config.num_heads[stage]
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn: ReducedAttention
        if config.linear:
            self.attn = PooledAttention(dim, heads, attn_drop=config.attn_drop, drop=config.drop)
        else:
            self.attn = SpatialReductionAttention(
                dim, heads, config.sr_ratios[stage], attn_drop=config.attn_drop, drop=config.drop
            )
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ConvMlp(dim, hidden_width(dim, config.mlp_ratios[stage]), config.drop, relu=config.linear)
        self.drop_path = DropPath(drop_path)
        self.mid, self.out = Tap(), Tap()

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        x = self.mid(x + self.drop_path(self.attn(self.norm1(x), grid)))
        return self.out(x + self.drop_path(self.mlp(self.norm2(x), grid)))


class PyramidStage(nn.Module):
    """What one stage consists of; the encoder runs it. Knows its stride and width, as `Stage` does."""

    def __init__(self, config: PVTv2Config, stage: int, rates: Sequence[float]) -> None:
        super().__init__()
        self.stride, self.width = config.patch_size * 2**stage, config.embed_dims[stage]
        self.downsample = OverlappingPatches(2, config.embed_dims[stage - 1], self.width) if stage else None
        self.blocks = nn.ModuleList(Block(config, stage, rate) for rate in rates)
        self.norm = nn.LayerNorm(self.width, eps=1e-6)


class PVTv2(Encoder):
    """The encoder and its classifier.

    Taps `embed` [B, N, D] after the first patch embedding and `final` [B, N, D] after the last stage's norm,
    besides those of the blocks.
    """

    def __init__(self, config: PVTv2Config) -> None:
        super().__init__()
        self.config = config
        self.num_features = config.embed_dims[-1]
        self.patch_embed = OverlappingPatches(config.patch_size, config.in_chans, config.embed_dims[0])
        rates = iter(drop_path_rates(config.drop_path, sum(config.depths)))
        self._modules["stages"] = nn.ModuleList(
            PyramidStage(config, stage, [next(rates) for _ in range(depth)])
            for stage, depth in enumerate(config.depths)
        )
        self.embed, self.final = Tap(), Tap()
        self.apply(_initialise)
        self.reset_classifier(config.num_classes)

    @property
    def stages(self) -> Any:
        """Stride and width of each map, finest first: the modules that timm's parameter names call so."""
        return self._modules["stages"]

    def no_weight_decay(self) -> set[str]:
        """None: there are neither tokens nor positions."""
        return set()

    def block_names(self) -> tuple[str, ...]:
        """`stages.0.blocks.0`, `stages.0.blocks.1`, ..., `stages.3.blocks.1`."""
        return tuple(
            f"stages.{stage}.blocks.{block}"
            for stage, depth in enumerate(self.config.depths)
            for block in range(depth)
        )

    def flow(self, image_shape: tuple[int, int]) -> Flow:
        """Patches attend to squares of patches; between stages 2 x 2 become one, seen overlapping."""
        tokens = start = Tokens(squares(image_shape, self.config.patch_size))
        steps: list[AttentionStep | MergeStep] = []
        for name in self.block_names():
            stage, block = (int(number) for number in re.findall(r"\d+", name))
            if stage and not block:
                merged = Tokens(squares(image_shape, self.stages[stage].stride))
                steps.append(MergeStep(tokens, merged, padded_squares(tokens.grid, 2)))
                tokens = merged
            attention = self.get_submodule(f"{name}.attn")
            assert isinstance(attention, ReducedAttention)
            keys = attention.footprint(tokens.grid)
            steps.append(
                AttentionStep(f"{name}.attn", tokens, keys=None if keys.grid == tokens.grid else keys)
            )
        return Flow((start,), tuple(steps), (Readout(),))

    def layer_of(self, parameter: str) -> int:
        """Depth of a parameter.

        A later stage's patch embedding counts with the block after it, its norm with the block before it; the
        last norm is that of the head.
        """
        depths = self.config.depths
        entry = re.match(r"stages\.(\d+)\.(downsample|norm)\.", parameter)
        if entry is None:
            return super().layer_of(parameter)
        stage = int(entry[1])
        before = sum(depths[:stage])
        if entry[2] == "downsample":
            return before + 1
        return before + depths[stage] + (stage == len(depths) - 1)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a fresh one; 0: no head, `forward` gives the mean of the patches [B, D]."""
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.head.apply(_initialise)

    def patch(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Images [B, C, H, W] -> tokens of the first stage [B, N, D] and their grid."""
        return self.patch_embed(images)

    def place(self, tokens: Tensor, grid: Grid) -> Tensor:
        """No positions to add: the tokens [B, N, D] as they are."""
        return self.embed(tokens)

    def encode(self, tokens: Tensor, grid: Grid, layers: Sequence[int] = ()) -> Features:
        """Run all stages, from the tokens of the first one, [B, N, D]."""
        wanted = asked_blocks(layers, sum(self.config.depths))
        maps: list[Tensor] = []
        seen: dict[int, Features] = {}
        block_number = 0
        for stage in self.stages:
            if stage.downsample is not None:
                tokens, grid = stage.downsample(maps[-1])
            for block in stage.blocks:
                tokens = self.run_block(block, tokens, grid)
                for asked in wanted.get(block_number, ()):
                    seen[asked] = _features(stage.norm(tokens), grid)
                block_number += 1
            tokens = stage.norm(tokens)
            maps.append(tokens.transpose(1, 2).unflatten(2, grid))  # [B, D, rows, columns]
        features = _features(self.final(tokens), grid)
        return replace(features, stages=(*maps[:-1], features.map()), layers=seen)

    def forward_features(
        self,
        images: Tensor,
        *,
        keep: Tensor | None = None,
        fill: Fill | None = None,
        layers: Sequence[int] = (),
    ) -> Features:
        """Encode images [B, C, H, W]; see `Encoder.forward_features`.

        The mask and the token of `fill` are those of the first stage: [B, N] and [D]. All maps and `layers`
        are normalised, each by its stage's norm.
        """
        if keep is not None:
            raise ValueError(
                "PVT v2 cannot drop patches (its stages need the whole grid), got keep=; "
                "use fill= (SimMIM), or a ViT for keep= (MAE)"
            )
        tokens, grid = self.patch(images)
        if fill is not None:
            mask, token = fill
            tokens = torch.where(mask[:, :, None], token.to(tokens.dtype), tokens)
        return self.encode(self.place(tokens, grid), grid, layers)

    def forward_head(self, features: Features) -> Tensor:
        """Classify by the mean of the patches: features -> logits [B, K]."""
        return self.head(features.patches.mean(dim=1))


def _features(tokens: Tensor, grid: Grid) -> Features:
    return Features(patches=tokens, prefix=tokens[:, :0], grid=grid)


def _initialise(module: nn.Module) -> None:
    """As in the paper's code: truncated normal for linear layers, He's start for convolutions."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


VARIANTS: dict[str, PVTv2Config] = {
    "pvt_v2_b0": PVTv2Config(embed_dims=(32, 64, 160, 256)),
    "pvt_v2_b1": PVTv2Config(),
    "pvt_v2_b2": PVTv2Config(depths=(3, 4, 6, 3)),
    "pvt_v2_b2_li": PVTv2Config(depths=(3, 4, 6, 3), linear=True),
    "pvt_v2_b3": PVTv2Config(depths=(3, 4, 18, 3)),
    "pvt_v2_b4": PVTv2Config(depths=(3, 8, 27, 3)),
    "pvt_v2_b5": PVTv2Config(depths=(3, 6, 40, 3), mlp_ratios=(4, 4, 4, 4)),
    # For 32-pixel images (CIFAR): three stages on grids of 16, 8 and 4 cells.
    "pvt_v2_cifar": PVTv2Config(
        img_size=32,
        patch_size=2,
        num_classes=10,
        embed_dims=(48, 96, 192),
        depths=(2, 2, 2),
        num_heads=(1, 2, 4),
        mlp_ratios=(4, 4, 4),
        sr_ratios=(4, 2, 1),
    ),
}
