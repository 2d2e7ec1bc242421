"""The Pyramid Vision Transformer: four stages that halve the grid, attention to a reduced grid of keys.

    B batch, N patches of the stage at hand, L = N tokens (1 + N in the last stage), D the stage's width

Paper: Wang et al. 2021, "Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without
Convolutions". Parameter names are those of the authors' code (`patch_embed1`, `pos_embed1`,
`block1.0.attn.sr`), so its checkpoints load strictly; transformers calls it `PvtForImageClassification`.

The class token enters in the last stage only, where nothing is reduced. Other image sizes: positions are
resampled, each stage by itself; images and maps that a patch size does not divide are padded on the right and
below. What differs from the authors' code: it drops the rest instead of padding, and resamples bilinearly;
at sizes that divide, with the native positions, the numbers are equal.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitrail.components.flow import AttentionStep, Flow, MergeStep, Readout, Tokens, padded_squares, squares
from vitrail.components.mlp import Mlp, hidden_width
from vitrail.components.patch import PatchEmbedding, patch_grid
from vitrail.components.position import Grid, TableLayout, resample_table
from vitrail.components.reduction import ReducedAttention, SpatialReductionAttention
from vitrail.components.residual import DropPath, drop_path_rates
from vitrail.components.tap import Tap
from vitrail.models.encoder import Encoder, Features, Fill, Stage, asked_blocks
from vitrail.models.options import check_ranges


@dataclass(frozen=True, kw_only=True, slots=True)
class PVTConfig:
    """Everything that decides a PVT; the defaults are PVT-Tiny. Tuples hold one value a stage."""

    img_size: int | tuple[int, int] = 224  # height and width; other sizes work too, positions are resampled
    patch_size: int = 4  # of the first stage; each later one merges 2 x 2 cells
    in_chans: int = 3
    num_classes: int = 1000  # 0: no head, the class token is returned
    embed_dims: tuple[int, ...] = (64, 128, 320, 512)
    depths: tuple[int, ...] = (2, 2, 2, 2)
    num_heads: tuple[int, ...] = (1, 2, 5, 8)
    mlp_ratios: tuple[float, ...] = (8, 8, 4, 4)
    sr_ratios: tuple[int, ...] = (8, 4, 2, 1)  # a key stands for so many rows and columns; last stage: 1
    drop: float = 0.0  # after the positions, both MLP layers and the attention's projection
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
        if self.sr_ratios[-1] != 1:
            raise ValueError(
                f"the last of sr_ratios must be 1, for the class token has no place on a grid; "
                f"got {self.sr_ratios[-1]}"
            )

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return (self.img_size, self.img_size) if isinstance(self.img_size, int) else self.img_size

    @property
    def grids(self) -> tuple[Grid, ...]:
        """Rows and columns of each stage at `img_size`."""
        strides = (self.patch_size * 2**stage for stage in range(len(self.depths)))
        return tuple(patch_grid(*self.image_shape, stride) for stride in strides)

    def build(self) -> PVT:
        """The model, freshly initialised."""
        return PVT(self)


class NormedPatchEmbedding(PatchEmbedding):
    """One convolution with kernel and stride p, then a LayerNorm over the channels."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__(patch_size, in_chans, embed_dim)
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(embed_dim)

    def embed(self, images: Tensor) -> Tensor:
        """Padded images or maps [B, C, H, W] -> maps [B, D, rows, columns]."""
        maps = self.proj(images.contiguous(memory_format=torch.channels_last))
        return self.norm(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Taps: `mid` [B, L, D] after the attention's residual sum, `out` [B, L, D] after the MLP's.
    """

    def __init__(self, config: PVTConfig, stage: int, drop_path: float) -> None:
        super().__init__()
        dim = config.embed_dims[stage]
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SpatialReductionAttention(
            dim,
            config.num_heads[stage],
            config.sr_ratios[stage],
            attn_drop=config.attn_drop,
            drop=config.drop,
        )
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden_width(dim, config.mlp_ratios[stage]), config.drop)
        self.drop_path = DropPath(drop_path)
        self.mid, self.out = Tap(), Tap()

    def forward(self, x: Tensor, grid: Grid, queries: int | None = None) -> Tensor:
        """[B, L, D] -> [B, L, D], or with `queries` the first so many tokens of it."""
        x = self.mid(x[:, :queries] + self.drop_path(self.attn(self.norm1(x), grid, queries)))
        return self.out(x + self.drop_path(self.mlp(self.norm2(x))))


class PVT(Encoder):
    """The encoder and its classifier.

    Taps `embed` [B, N, D] after the first stage's positions and `final` [B, 1 + N, D] after the last norm,
    besides those of the blocks.
    """

    patch_embed1: NormedPatchEmbedding
    pos_embed1: nn.Parameter

    def __init__(self, config: PVTConfig) -> None:
        super().__init__()
        self.config = config
        self.num_stages = len(config.depths)
        self.num_features = config.embed_dims[-1]
        widths = (config.in_chans, *config.embed_dims)
        rates = iter(drop_path_rates(config.drop_path, sum(config.depths)))
        for stage, (rows, columns) in enumerate(config.grids):
            number, is_last = stage + 1, stage == self.num_stages - 1
            patches = NormedPatchEmbedding(2 if stage else config.patch_size, widths[stage], widths[number])
            positions = torch.zeros(1, rows * columns + is_last, widths[number])
            blocks = (Block(config, stage, next(rates)) for _ in range(config.depths[stage]))
            self.add_module(f"patch_embed{number}", patches)
            self.register_parameter(f"pos_embed{number}", nn.Parameter(positions))
            self.add_module(f"block{number}", nn.ModuleList(blocks))
            nn.init.trunc_normal_(self.get_parameter(f"pos_embed{number}"), std=0.02)
        self.pos_drop = nn.Dropout(config.drop)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.num_features))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.norm = nn.LayerNorm(self.num_features, eps=1e-6)
        self.embed, self.final = Tap(), Tap()
        self.apply(_initialise)
        self.reset_classifier(config.num_classes)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Four maps; the last one is normalised, as the head reads it."""
        return tuple(
            Stage(self.config.patch_size * 2**stage, width)
            for stage, width in enumerate(self.config.embed_dims)
        )

    def no_weight_decay(self) -> set[str]:
        """The class token and the positions."""
        return {"cls_token"} | {f"pos_embed{number + 1}" for number in range(self.num_stages)}

    def block_names(self) -> tuple[str, ...]:
        """`block1.0`, `block1.1`, ..., `block4.1`."""
        return tuple(
            f"block{stage}.{block}"
            for stage, depth in enumerate(self.config.depths, start=1)
            for block in range(depth)
        )

    def flow(self, image_shape: tuple[int, int]) -> Flow:
        """Patches attend to squares of patches; between stages 2 x 2 become one, before the last the class
        token joins.
        """
        tokens = start = Tokens(squares(image_shape, self.config.patch_size))
        steps: list[AttentionStep | MergeStep] = []
        for name in self.block_names():
            stage, block = (int(number) for number in re.findall(r"\d+", name))  # stages count from 1
            if stage > 1 and not block:
                cells = squares(image_shape, self.stages[stage - 1].stride)
                merged = Tokens(cells, prefix=int(stage == self.num_stages))
                steps.append(MergeStep(tokens, merged, padded_squares(tokens.grid, 2)))
                tokens = merged
            attention = self.get_submodule(f"{name}.attn")
            assert isinstance(attention, ReducedAttention)
            keys = attention.footprint(tokens.grid)
            steps.append(
                AttentionStep(f"{name}.attn", tokens, keys=None if keys.grid == tokens.grid else keys)
            )
        return Flow((start,), tuple(steps), (Readout(prefix=1),))

    def layer_of(self, parameter: str) -> int:
        """Depth of a parameter; what leads into a later stage counts with the stage's first block."""
        entry = re.match(r"(?:patch|pos)_embed(\d+)", parameter)
        stage = self.num_stages if parameter == "cls_token" else int(entry[1]) if entry else 1
        return super().layer_of(f"block{stage}.0.weight" if stage > 1 else parameter)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a fresh one; 0: no head, `forward` gives the class token [B, D]."""
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.head.apply(_initialise)

    def patch(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Images [B, C, H, W] -> tokens of the first stage [B, N, D] and their grid."""
        return self.patch_embed1(images)

    def place(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Add the first stage's positions: [B, N, D] -> [B, N, D]."""
        return self.embed(self._enter(1, tokens, grid))

    def encode(
        self, tokens: Tensor, grid: Grid, layers: Sequence[int] = (), queries: int | None = None
    ) -> Features:
        """Run all stages, from the tokens of the first one, [B, N, D].

        With `queries`, the last block computes only that many tokens, from the first on, and the last map
        is left out.
        """
        depth = sum(self.config.depths)
        wanted = asked_blocks(layers, depth)
        maps: list[Tensor] = []
        seen: dict[int, Features] = {}
        block_number = 0
        for number in range(1, self.num_stages + 1):
            if number > 1:
                tokens, grid = getattr(self, f"patch_embed{number}")(maps[-1])
                tokens = self._enter(number, tokens, grid)
            for block in getattr(self, f"block{number}"):
                asking = queries if block_number == depth - 1 else None
                tokens = self.run_block(block, tokens, grid, asking)
                for asked in wanted.get(block_number, ()):
                    seen[asked] = self._features(number, tokens, grid)
                block_number += 1
            if number < self.num_stages:
                maps.append(tokens.transpose(1, 2).unflatten(2, grid))  # [B, D, rows, columns]
        tokens = self.final(self.norm(tokens))
        if queries is None:
            maps.append(tokens[:, 1:].transpose(1, 2).unflatten(2, grid))
        return Features(
            patches=tokens[:, 1:], prefix=tokens[:, :1], grid=grid, stages=tuple(maps), layers=seen
        )

    def forward_features(
        self,
        images: Tensor,
        *,
        keep: Tensor | None = None,
        fill: Fill | None = None,
        layers: Sequence[int] = (),
    ) -> Features:
        """Encode images [B, C, H, W]; see `Encoder.forward_features`.

        The mask and the token of `fill` are those of the first stage: [B, N] and [D]. `layers` in the last
        stage are normalised and have the class token; those of the stages before have neither.
        """
        if keep is not None:
            raise ValueError(
                "PVT cannot drop patches (its stages need the whole grid), got keep=; "
                "use fill= (SimMIM), or a ViT for keep= (MAE)"
            )
        tokens, grid = self.patch(images)
        if fill is not None:
            mask, token = fill
            tokens = torch.where(mask[:, :, None], token.to(tokens.dtype), tokens)
        return self.encode(self.place(tokens, grid), grid, layers)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, K].

        The class token is all that the head reads, so the last block computes nothing else, unless somebody
        looks at that block.
        """
        tokens, grid = self.patch(images)
        last = self.get_submodule(self.block_names()[-1])
        watched = any(isinstance(tap, Tap) and tap.watched for tap in (self.final, *last.modules()))
        return self.forward_head(self.encode(self.place(tokens, grid), grid, queries=None if watched else 1))

    def forward_head(self, features: Features) -> Tensor:
        """Classify by the class token: features -> logits [B, K]."""
        return self.head(features.prefix[:, 0])

    def position_layouts(self) -> dict[str, TableLayout]:
        """`pos_embed1`, ...: patches; in the last stage the class token before them."""
        return {
            f"pos_embed{number}": TableLayout(grid, first=int(number == self.num_stages))
            for number, grid in enumerate(self.config.grids, start=1)
        }

    def position_table(self, grid: Grid) -> Tensor:
        """The positions that are added to the patches of the first stage, [N, D]."""
        return resample_table(self.pos_embed1, self.config.grids[0], grid)[0]

    def _enter(self, number: int, tokens: Tensor, grid: Grid) -> Tensor:
        """Add a stage's positions, and in the last stage the class token: [B, N, D] -> [B, L, D]."""
        table = getattr(self, f"pos_embed{number}")
        native = self.config.grids[number - 1]
        if number < self.num_stages:
            return self.pos_drop(tokens + resample_table(table, native, grid))
        tokens = torch.cat(
            [
                (self.cls_token + table[:, :1]).expand(tokens.shape[0], -1, -1).to(tokens.dtype),
                tokens + resample_table(table[:, 1:], native, grid),
            ],
            dim=1,
        )
        return self.pos_drop(tokens)

    def _features(self, number: int, tokens: Tensor, grid: Grid) -> Features:
        """What a block of stage `number` gave."""
        if number < self.num_stages:
            return Features(patches=tokens, prefix=tokens[:, :0], grid=grid)
        tokens = self.norm(tokens)
        return Features(patches=tokens[:, 1:], prefix=tokens[:, :1], grid=grid)


def _initialise(module: nn.Module) -> None:
    """Linear layers as in the authors' code; their convolutions keep PyTorch's start."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


VARIANTS: dict[str, PVTConfig] = {
    "pvt_tiny": PVTConfig(depths=(2, 2, 2, 2)),
    "pvt_small": PVTConfig(depths=(3, 4, 6, 3)),
    "pvt_medium": PVTConfig(depths=(3, 4, 18, 3)),
    "pvt_large": PVTConfig(depths=(3, 8, 27, 3)),
    # For 32-pixel images (CIFAR): three stages on grids of 16, 8 and 4 cells.
    "pvt_cifar": PVTConfig(
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
