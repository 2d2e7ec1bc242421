"""Swin Transformer: a pyramid of stages whose blocks attend within shifted windows.

    B batch, N tokens of a stage's grid, n tokens of a window, W windows an image, D width, H heads

Paper: Liu et al. 2021, "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows". Parameter
names are timm's, so its checkpoints load strictly. What differs from the released code in padding, masks and
small grids is said in `vitrail.components.window`; at sizes that are whole numbers of windows the logits are
the same. Its absolute positions (an option that no released model uses) are left out.

`WindowEncoder` is what both versions of Swin share; `vitrail.models.swin_v2` has the second one's blocks.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitrail.components.attention import Attention
from vitrail.components.flow import AttentionStep, Flow, MergeStep, Readout, Tokens, padded_squares, squares
from vitrail.components.mlp import Mlp, hidden_width
from vitrail.components.patch import ConvPatchEmbedding, patch_grid
from vitrail.components.position import Grid, TableLayout
from vitrail.components.residual import DropPath, drop_path_rates
from vitrail.components.tap import Tap
from vitrail.components.window import (
    WindowLayout,
    WindowPartition,
    attend_with_learned_bias,
    offset_bias,
    offset_index,
)
from vitrail.models.encoder import Encoder, Features, Fill, Stage, asked_blocks, bias_by_offset
from vitrail.models.options import check_ranges


@dataclass(frozen=True, kw_only=True, slots=True)
class SwinConfig:
    """Everything that decides a Swin; the defaults are Swin-T at 224 pixels."""

    img_size: int | tuple[int, int] = 224  # height and width; other sizes work too, this one is fastest
    patch_size: int = 4
    in_chans: int = 3
    num_classes: int = 1000  # 0: no head, the pooled features are returned
    embed_dim: int = 96  # of the first stage; doubles from stage to stage
    depths: tuple[int, ...] = (2, 2, 6, 2)  # blocks of each stage; every second one is shifted
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7  # tokens a side; shrinks to the grid where that is smaller
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    drop: float = 0.0  # after both MLP layers and the attention's projection
    attn_drop: float = 0.0
    drop_path: float = 0.0  # at the last block, growing linearly from 0

    def __post_init__(self) -> None:
        check_ranges(self)
        if len(self.num_heads) != len(self.depths):
            raise ValueError(
                f"num_heads {self.num_heads} and depths {self.depths} need one number for each stage"
            )
        for width, heads in zip(self.widths, self.num_heads, strict=True):
            if width % heads:
                raise ValueError(f"width {width} of a stage is not divisible by its num_heads {heads}")

    @property
    def image_shape(self) -> Grid:
        """Height and width in pixels."""
        return (self.img_size, self.img_size) if isinstance(self.img_size, int) else self.img_size

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each stage."""
        return tuple(self.embed_dim * 2**stage for stage in range(len(self.depths)))

    @property
    def grids(self) -> tuple[Grid, ...]:
        """Rows and columns of each stage at `img_size`."""
        grids = [patch_grid(*self.image_shape, self.patch_size)]
        for _ in self.depths[1:]:
            grids.append(patch_grid(*grids[-1], 2))
        return tuple(grids)

    def build(self) -> WindowEncoder:
        """The model, freshly initialised."""
        return Swin(self)


class SwinPatchEmbedding(ConvPatchEmbedding):
    """One convolution with kernel and stride p, then a norm."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__(patch_size, in_chans, embed_dim)
        self.norm = nn.LayerNorm(embed_dim)

    def embed(self, images: Tensor) -> Tensor:
        """Padded images [B, C, H, W] -> maps [B, D, rows, columns], channels last: as tokens need them."""
        return super().embed(images.contiguous(memory_format=torch.channels_last))

    def forward(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Images [B, C, H, W] -> normalised tokens [B, N, D] and the grid (rows, columns)."""
        tokens, grid = super().forward(images)
        return self.norm(tokens), grid


def merge_neighbours(x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
    """Lay 2 x 2 neighbours side by side: [B, N, D] -> [B, N / 4, 4 D] and the new grid.

    Odd grids are padded with zeros. The neighbours are taken column by column, as in the released weights.
    """
    rows, columns = patch_grid(*grid, 2)
    x = x.unflatten(1, grid)
    if grid != (2 * rows, 2 * columns):
        x = nn.functional.pad(x, (0, 0, 0, grid[1] % 2, 0, grid[0] % 2))
    x = x.unflatten(2, (columns, 2)).unflatten(1, (rows, 2))  # [B, rows, 2, columns, 2, D]
    return x.permute(0, 1, 3, 4, 2, 5).flatten(3).flatten(1, 2), (rows, columns)


class PatchMerging(nn.Module):
    """Half the rows and columns, twice the width: 2 x 2 neighbours, norm, linear (section 3.1)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """[B, N, D] -> [B, N / 4, 2 D] and the new grid."""
        merged, grid = merge_neighbours(x, grid)
        return self.reduction(self.norm(merged)), grid


class WindowAttention(Attention):
    """Self-attention within a window, with a learned bias for each head and offset (equation 4).

    `window` is the one that is mostly used, `table_window` the largest, whose offsets have a bias each.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: Grid,
        table_window: Grid,
        *,
        qkv_bias: bool,
        attn_drop: float,
        drop: float,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            qkv_bias=qkv_bias,
            attn_drop=attn_drop,
            drop=drop,
            core=attend_with_learned_bias,
        )
        self.window, self.table_window = window, table_window
        offsets = (2 * table_window[0] - 1) * (2 * table_window[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.empty(offsets, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.index: Tensor
        self.register_buffer("index", offset_index(window, table_window), persistent=False)

    def bias(self, window: Grid) -> Tensor:
        """[H, n, n] for a window that is not larger than the table's."""
        index = self.index
        if window != self.window:
            index = offset_index(window, self.table_window).to(index.device)
        return offset_bias(self.relative_position_bias_table, index)


class SwinBlock(nn.Module):
    """Pre-norm block: x + attention(norm(x)) within windows, then x + mlp(norm(x)) (equation 3).

    Taps: `mid` and `out` [B, N, D] after the residual sums, in the order of the image; those of the attention
    are per window: `attn.weights` [B * W, H, n, n].
    """

    def __init__(self, config: SwinConfig, stage: int, shifted: bool, drop_path: float) -> None:
        super().__init__()
        dim, largest = config.widths[stage], (config.window_size, config.window_size)
        self.windows = WindowPartition(config.grids[stage], largest, shifted)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(
            dim,
            config.num_heads[stage],
            self.windows.usual.window,
            largest,
            qkv_bias=config.qkv_bias,
            attn_drop=config.attn_drop,
            drop=config.drop,
        )
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden_width(dim, config.mlp_ratio), config.drop)
        self.drop_path = DropPath(drop_path)
        self.mid, self.out = Tap(), Tap()

    def layout(self, grid: Grid) -> WindowLayout:
        """How this block cuts a grid of its stage into windows."""
        return self.windows.layout(grid)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        windows = self.windows(grid)
        parts = windows.partition(self.norm1(x))  # [B * W, n, D]
        bias = windows.masked(self.attn.bias(windows.layout.window), parts.shape[0])
        attended = windows.reverse(self.attn(parts, bias=bias))
        x = self.mid(x + self.drop_path(attended))
        return self.out(x + self.drop_path(self.mlp(self.norm2(x))))


class SwinStage(nn.Module):
    """What one stage consists of: merging (not in the first) and blocks; the encoder runs them."""

    def __init__(self, downsample: nn.Module | None, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)

    def enter(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """Tokens [B, N, D] and grid of the stage before -> those of this one."""
        return (x, grid) if self.downsample is None else self.downsample(x, grid)


class WindowEncoder(Encoder):
    """Patches, stages, norm and classifier, for both versions of Swin.

    Taps `embed` [B, N, D] of the first stage and `final` [B, N, D] of the last, besides those of the blocks.
    """

    block: ClassVar[type[nn.Module]]
    """Called with the config, number of the stage, whether it is shifted, and rate of DropPath."""
    merging: ClassVar[type[nn.Module]]
    """Called with the width of the finer stage."""
    without_decay: ClassVar[tuple[str, ...]]
    """Parts of the names of the parameters without weight decay."""

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        self.config = config
        self.num_features = config.widths[-1]
        self.patch_embed = SwinPatchEmbedding(config.patch_size, config.in_chans, config.embed_dim)
        rates = iter(drop_path_rates(config.drop_path, sum(config.depths)))
        self.layers = nn.ModuleList(
            SwinStage(
                self.merging(config.widths[stage - 1]) if stage else None,
                [self.block(config, stage, number % 2 == 1, next(rates)) for number in range(depth)],
            )
            for stage, depth in enumerate(config.depths)
        )
        self.norm = nn.LayerNorm(self.num_features)
        self.embed, self.final = Tap(), Tap()
        self.apply(self._initialise)
        self.reset_classifier(config.num_classes)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Strides p, 2 p, 4 p, ..."""
        return tuple(
            Stage(self.config.patch_size * 2**number, width)
            for number, width in enumerate(self.config.widths)
        )

    def no_weight_decay(self) -> set[str]:
        """The parameters of the position bias."""
        return {
            name for name, _ in self.named_parameters() if any(part in name for part in self.without_decay)
        }

    def block_names(self) -> tuple[str, ...]:
        """`layers.0.blocks.0`, ..., stage by stage."""
        return tuple(
            f"layers.{stage}.blocks.{number}"
            for stage, depth in enumerate(self.config.depths)
            for number in range(depth)
        )

    def flow(self, image_shape: tuple[int, int]) -> Flow:
        """Patches attend within windows; between stages 2 x 2 become one."""
        tokens = start = Tokens(squares(image_shape, self.config.patch_size))
        steps: list[AttentionStep | MergeStep] = []
        for name in self.block_names():
            stage, block = (int(number) for number in re.findall(r"\d+", name))
            if stage and not block:
                merged = Tokens(squares(image_shape, self.stages[stage].stride))
                steps.append(MergeStep(tokens, merged, padded_squares(tokens.grid, 2)))
                tokens = merged
            windows = self.get_submodule(f"{name}.windows")
            assert isinstance(windows, WindowPartition)
            steps.append(AttentionStep(f"{name}.attn", tokens, windows=windows.layout(tokens.grid)))
        return Flow((start,), tuple(steps), (Readout(),))

    def layer_of(self, parameter: str) -> int:
        """Depth of a parameter; a merging belongs to the block that follows it."""
        stage, merging, _ = parameter.partition(".downsample.")
        return super().layer_of(f"{stage}.blocks.0." if merging else parameter)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a fresh one; 0: no head, `forward` gives the pooled features [B, D]."""
        fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.head = nn.Sequential(OrderedDict(fc=fc))
        self.head.apply(self._initialise)

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
        number = 0
        for stage in self.layers:
            assert isinstance(stage, SwinStage)
            tokens, grid = stage.enter(tokens, grid)
            for block in stage.blocks:
                tokens = self.run_block(block, tokens, grid)
                for asked in wanted.get(number, ()):
                    seen[asked] = _features(self.norm(tokens) if stage is self.layers[-1] else tokens, grid)
                number += 1
            maps.append(tokens.transpose(1, 2).unflatten(2, grid))  # [B, D, rows, columns]
        return replace(_features(self.final(self.norm(tokens)), grid), stages=tuple(maps), layers=seen)

    def forward_features(
        self,
        images: Tensor,
        *,
        keep: Tensor | None = None,
        fill: Fill | None = None,
        layers: Sequence[int] = (),
    ) -> Features:
        """Encode images [B, C, H, W]; see `Encoder.forward_features`.

        The mask and the token of `fill` are those of the first stage: [B, N] and [D]. There is one norm, as
        wide as the last stage: `patches` and those `layers` that belong to the last stage are normalised, the
        other `layers` and all `stages` are what the blocks give (as timm's `forward_intermediates`).
        """
        if keep is not None:
            raise ValueError(
                f"{type(self).__name__} cannot drop patches (its windows need the whole grid), got keep=; "
                "use fill= (SimMIM), or a ViT for keep= (MAE)"
            )
        tokens, grid = self.patch(images)
        if fill is not None:
            mask, token = fill
            tokens = torch.where(mask[:, :, None], token.to(tokens.dtype), tokens)
        return self.encode(self.place(tokens, grid), grid, layers)

    def forward_head(self, features: Features) -> Tensor:
        """Mean of the patches, then the classifier: features -> logits [B, K]."""
        return self.head(features.patches.mean(dim=1))

    def position_bias(self, grid: Grid) -> dict[str, Tensor]:
        """The bias of each block within its windows; `grid` is that of the first stage."""
        found: dict[str, Tensor] = {}
        block: Any  # what `self.block` makes
        for number, stage in enumerate(self.layers):
            assert isinstance(stage, SwinStage)
            if number:
                grid = patch_grid(*grid, 2)
            for position, block in enumerate(stage.blocks):
                window = block.layout(grid).window
                found[f"layers.{number}.blocks.{position}"] = bias_by_offset(block.attn.bias(window), window)
        return found

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class Swin(WindowEncoder):
    """Swin Transformer, version 1."""

    block = SwinBlock
    merging = PatchMerging
    without_decay = ("relative_position_bias_table",)

    def position_layouts(self) -> dict[str, TableLayout]:
        """The table of offsets of each block; its size depends on that of the windows."""
        layout = TableLayout((2 * self.config.window_size - 1,) * 2)
        return {f"{name}.attn.relative_position_bias_table": layout for name in self.block_names()}


def _features(tokens: Tensor, grid: Grid) -> Features:
    return Features(patches=tokens, prefix=tokens[:, :0], grid=grid)


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "small": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "base": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
    "large": {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)},
}

VARIANTS: dict[str, SwinConfig] = {
    **{f"swin_{size}_patch4_window7_224": SwinConfig(**SIZES[size]) for size in SIZES},
    **{
        f"swin_{size}_patch4_window12_384": SwinConfig(img_size=384, window_size=12, **SIZES[size])
        for size in ("base", "large")
    },
    # Digits of 28 pixels. Patches of 4 make a grid of 7 x 7, which is one window: the second block has
    # nothing to shift. Patches of 2 make 2 x 2 windows, and there it shifts.
    **{
        name: SwinConfig(
            img_size=28,
            patch_size=patch_size,
            in_chans=1,
            num_classes=10,
            embed_dim=64,
            depths=(2,),
            num_heads=(4,),
        )
        for name, patch_size in (("swin_mnist_2blk", 4), ("swin_mnist_2blk_patch2", 2))
    },
    # For 32-pixel images (CIFAR): grids of 16 x 16 and 8 x 8 patches, 4 x 4 and 2 x 2 windows.
    "swin_cifar": SwinConfig(
        img_size=32,
        patch_size=2,
        num_classes=10,
        embed_dim=64,
        depths=(2, 4),
        num_heads=(2, 4),
        window_size=4,
    ),
}
