"""The Vision Transformer, with its embedding, positions, attention and pooling as switches of one model.

    B batch, N patches, P prefix tokens (class token, distillation token, registers), L = P + N, D width,
    H heads

Papers: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words" (ViT); Darcet et al. 2023, "Vision
Transformers Need Registers"; Hassani et al. 2021 (sequence pooling); Touvron et al. 2021 (DeiT: a second
token and head that learn from a teacher). Parameter names are timm's, so its checkpoints load strictly.

What differs from the paper: the head is one linear layer (the paper's pre-training head has a hidden tanh
layer; `head="mlp"` gives a hidden GELU layer). `prefix_position=False` adds positions to the patches only and
prepends the prefix afterwards (timm: `no_embed_class`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from vitrail.components.attention import Attention, AttentionCore, attend
from vitrail.components.differential import DifferentialAttention
from vitrail.components.flow import AttentionStep, Flow, Readout, Tokens, squares
from vitrail.components.linear_attention import attend_linear
from vitrail.components.mlp import Mlp, SwiGLU, hidden_width
from vitrail.components.patch import PATCH_EMBEDDINGS, patch_grid
from vitrail.components.position import (
    Grid,
    LearnedPosition2d,
    RelativePositionBias,
    RotaryPosition2d,
    SinCosPosition1d,
    SinCosPosition2d,
    TableLayout,
    resample_table,
)
from vitrail.components.residual import DropPath, LayerScale, drop_path_rates
from vitrail.components.sparse import SparsePattern, attend_top_k, top_k_density
from vitrail.components.tap import Tap
from vitrail.models.encoder import Encoder, Features, Fill, Stage, asked_blocks, bias_by_offset
from vitrail.models.options import check_ranges


@dataclass(frozen=True, kw_only=True, slots=True)
class ViTConfig:
    """Everything that decides a ViT; the defaults are ViT-B/16 at 224 pixels."""

    img_size: int | tuple[int, int] = 224  # height and width; other sizes work too, positions are resampled
    patch_size: int = 16
    in_chans: int = 3
    num_classes: int = 1000  # 0: no head, the pooled features are returned
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12  # differential attention: half of a baseline's, each has two maps
    attention: Literal["full", "differential", "sparse_topk", "sparse_local", "sparse_axial", "linear"] = (
        "full"
    )
    top_k: int = 16  # sparse_topk: how many patches each patch sees
    reach: int = 2  # sparse_local: patches see this many rows and columns around them
    mlp_ratio: float = 4.0
    mlp: Literal["gelu", "swiglu"] = "gelu"
    patch_embed: Literal["conv", "linear", "overlap", "stem"] = "conv"
    position: Literal["none", "learned", "learned_2d", "sincos_1d", "sincos_2d", "relative", "rotary"] = (
        "learned"
    )
    prefix_position: bool = True  # learned positions have rows for the prefix tokens too (the paper)
    class_token: bool = True
    distillation: bool = False  # a second token, with a head of its own that learns from a teacher (DeiT)
    registers: int = 0
    pool: Literal["cls", "mean", "seqpool"] = "cls"
    fc_norm: bool = False  # normalise after pooling instead of before (timm's mean-pooled models)
    head: Literal["linear", "mlp"] = "linear"
    init: Literal["xavier", "trunc_normal"] = "xavier"  # the paper's; or 0.02 everywhere (DeiT, timm)
    qkv_bias: bool = True
    qk_norm: bool = False
    layer_scale: float | None = None  # initial value; None: no LayerScale
    drop: float = 0.0  # after the positions, both MLP layers and the attention's projection
    attn_drop: float = 0.0
    drop_path: float = 0.0  # at the last block, growing linearly from 0

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not divisible by num_heads {self.num_heads}")
        if self.pool == "cls" and not self.class_token:
            raise ValueError("pool 'cls' needs class_token=True; without one take pool 'mean' or 'seqpool'")
        if self.distillation and self.pool != "cls":
            raise ValueError(f"distillation needs pool 'cls', got {self.pool!r}")
        if self.attention == "linear" and (self.position in ("relative", "rotary") or self.attn_drop):
            raise ValueError(
                "attention 'linear' forms no scores: it needs attn_drop 0 and a position that is added to "
                f"tokens, got position {self.position!r} and attn_drop {self.attn_drop}"
            )

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return (self.img_size, self.img_size) if isinstance(self.img_size, int) else self.img_size

    @property
    def grid(self) -> Grid:
        """Rows and columns of patches at `img_size`."""
        return patch_grid(*self.image_shape, self.patch_size)

    @property
    def num_prefix(self) -> int:
        """Class token, distillation token, registers."""
        return int(self.class_token) + int(self.distillation) + self.registers

    @property
    def map_dim(self) -> int:
        """Width of the queries and keys of one attention map."""
        return self.embed_dim // self.num_heads // (2 if self.attention == "differential" else 1)

    def build(self) -> ViT:
        """The model, freshly initialised."""
        return ViT(self)


class Block(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)) (ViT, equations 2 and 3).

    Taps: `mid` [B, L, D] after the attention's residual sum, `out` [B, L, D] after the MLP's.
    """

    def __init__(self, config: ViTConfig, layer: int, drop_path: float) -> None:
        super().__init__()
        dim = config.embed_dim
        mlp = {"gelu": Mlp, "swiglu": SwiGLU}[config.mlp]
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = _attention(config, layer)
        self.ls1 = nn.Identity() if config.layer_scale is None else LayerScale(dim, config.layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = mlp(dim, hidden_width(dim, config.mlp_ratio), config.drop)
        self.ls2 = nn.Identity() if config.layer_scale is None else LayerScale(dim, config.layer_scale)
        self.drop_path = DropPath(drop_path)
        self.rel_pos = (
            RelativePositionBias(config.grid, config.num_heads, config.num_prefix)
            if config.position == "relative"
            else None
        )
        self.mid, self.out = Tap(), Tap()

    def forward(
        self,
        x: Tensor,
        grid: Grid,
        index: Tensor | None = None,
        pattern: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        queries: int | None = None,
    ) -> Tensor:
        """[B, L, D] -> [B, L, D], or [B, queries, D].

        Args:
            x: Prefix tokens, then patches.
            grid: The full grid of patches.
            index: [B, L] places of the tokens in the full sequence, where some were dropped.
            pattern: Added to the scores: -inf at pairs that sparse attention does not use.
            rotary: Cosines and sines for `Attention`.
            queries: How many tokens, from the first on, are computed; None: all.
        """
        bias = pattern
        if self.rel_pos is not None:
            relative = _pick_pairs(self.rel_pos(grid), index)
            bias = relative if pattern is None else relative + pattern
        attended = self.attn(self.norm1(x), bias=bias, rotary=rotary, queries=queries)
        x = self.mid(x[:, :queries] + self.drop_path(self.ls1(attended)))
        return self.out(x + self.drop_path(self.ls2(self.mlp(self.norm2(x)))))


def _attention(config: ViTConfig, layer: int) -> Attention | DifferentialAttention:
    """The attention of a block; `layer` counts from 0."""
    dim, heads = config.embed_dim, config.num_heads
    bias, norm, drop, attn_drop = config.qkv_bias, config.qk_norm, config.drop, config.attn_drop
    if config.attention == "differential":
        return DifferentialAttention(
            dim, heads, layer=layer, qkv_bias=bias, qk_norm=norm, attn_drop=attn_drop, drop=drop
        )
    core: AttentionCore = attend
    if config.attention == "linear":
        core = attend_linear
    elif config.attention == "sparse_topk":
        core = partial(attend_top_k, count=config.top_k, num_prefix=config.num_prefix)
    return Attention(dim, heads, qkv_bias=bias, qk_norm=norm, attn_drop=attn_drop, drop=drop, core=core)


class ViT(Encoder):
    """The encoder and its classifier.

    Taps, besides those of the blocks: `embed` and `final` [B, L, D], and `pool_shares` [B, N, 1], with which
    sequence pooling weighs the patches.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.num_features = dim = config.embed_dim
        self.patch_embed = PATCH_EMBEDDINGS[config.patch_embed](config.patch_size, config.in_chans, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if config.class_token else None
        self.dist_token = nn.Parameter(torch.zeros(1, 1, dim)) if config.distillation else None
        self.reg_token = nn.Parameter(torch.zeros(1, config.registers, dim)) if config.registers else None
        self.pos_embed: nn.Parameter | nn.Module | None = None
        if config.position == "learned":
            rows = config.grid[0] * config.grid[1] + (config.num_prefix if config.prefix_position else 0)
            self.pos_embed = nn.Parameter(torch.zeros(1, rows, dim))
        elif config.position == "learned_2d":
            self.pos_embed = LearnedPosition2d(config.grid, dim)
        elif config.position == "sincos_1d":
            self.pos_embed = SinCosPosition1d(dim)
        elif config.position == "sincos_2d":
            self.pos_embed = SinCosPosition2d(dim)
        self.rotary = (
            RotaryPosition2d(config.map_dim, config.num_prefix) if config.position == "rotary" else None
        )
        self.pattern: SparsePattern | None = None
        if config.attention == "sparse_local":
            self.pattern = SparsePattern("local", config.grid, config.num_prefix, config.reach)
        elif config.attention == "sparse_axial":
            self.pattern = SparsePattern("axial", config.grid, config.num_prefix, config.reach)
        self.pos_drop = nn.Dropout(config.drop)
        self.blocks = nn.ModuleList(
            Block(config, layer, rate)
            for layer, rate in enumerate(drop_path_rates(config.drop_path, config.depth))
        )
        self.norm = nn.Identity() if config.fc_norm else nn.LayerNorm(dim, eps=1e-6)
        self.attention_pool = nn.Linear(dim, 1) if config.pool == "seqpool" else None
        self.fc_norm = nn.LayerNorm(dim, eps=1e-6) if config.fc_norm else nn.Identity()
        self.embed, self.final = Tap(), Tap()
        self.pool_shares = Tap() if config.pool == "seqpool" else None
        self.apply(self._initialise)
        self.reset_classifier(config.num_classes)
        for parameter, std in (
            (self.cls_token, 1e-6),
            (self.dist_token, 0.02),
            (self.reg_token, 1e-6),
            (self.pos_embed, 0.02),
        ):
            if isinstance(parameter, nn.Parameter):
                nn.init.trunc_normal_(parameter, std=std)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """One map: the patches."""
        return (Stage(self.config.patch_size, self.config.embed_dim),)

    def no_weight_decay(self) -> set[str]:
        """Tokens and positions."""
        tokens = ("cls_token", "dist_token", "reg_token", "pos_embed", "relative_position_bias_table")
        return {name for name, _ in self.named_parameters() if any(token in name for token in tokens)}

    def block_names(self) -> tuple[str, ...]:
        """`blocks.0`, `blocks.1`, ..."""
        return tuple(f"blocks.{number}" for number in range(len(self.blocks)))

    def flow(self, image_shape: tuple[int, int]) -> Flow:
        """All tokens attend to all, block by block; a cell is a patch."""
        stride = self.config.patch_size
        tokens = Tokens(squares(image_shape, stride), self.config.num_prefix)
        read = Readout()
        if self.config.pool == "cls":
            read = Readout(prefix=2 if self.config.distillation else 1)
        elif self.config.pool == "seqpool":
            read = Readout(shares="pool_shares")
        return Flow(
            (tokens,), tuple(AttentionStep(f"{name}.attn", tokens) for name in self.block_names()), (read,)
        )

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a fresh one; 0: no head, `forward` gives the pooled features [B, D]."""
        self.head = self._new_head(num_classes)
        self.head_dist = self._new_head(num_classes) if self.config.distillation else None

    def _new_head(self, num_classes: int) -> nn.Module:
        dim = self.num_features
        head: nn.Module = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        if num_classes and self.config.head == "mlp":
            head = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), head)
        return head.apply(self._initialise)

    def patch(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Images [B, C, H, W] -> tokens [B, N, D] and the grid (rows, columns)."""
        return self.patch_embed(images)

    def place(self, tokens: Tensor, grid: Grid, keep: Tensor | None = None) -> Tensor:
        """Add positions, drop what is not kept, prepend the prefix: [B, N, D] -> [B, L, D]."""
        patches_position, prefix_position = self._positions(grid)
        if patches_position is not None:
            tokens = tokens + patches_position
        if keep is not None:
            tokens = tokens.gather(1, keep[:, :, None].expand(-1, -1, tokens.shape[2]))
        prefix = (self.cls_token, self.dist_token, self.reg_token)
        if self.config.num_prefix:
            first = torch.cat([token for token in prefix if token is not None], dim=1)
            if prefix_position is not None:
                first = first + prefix_position
            tokens = torch.cat([first.expand(tokens.shape[0], -1, -1).to(tokens.dtype), tokens], dim=1)
        return self.embed(self.pos_drop(tokens))

    def encode(
        self,
        tokens: Tensor,
        grid: Grid,
        keep: Tensor | None = None,
        layers: Sequence[int] = (),
        queries: int | None = None,
    ) -> Features:
        """Run the blocks: tokens [B, L, D] -> normalised features.

        With `queries`, the last block computes only that many tokens, from the first on.
        """
        depth, num_prefix = len(self.blocks), self.config.num_prefix
        wanted = asked_blocks(layers, depth)
        index = None
        if keep is not None:
            prefix = torch.arange(num_prefix, device=keep.device).expand(keep.shape[0], -1)
            index = torch.cat([prefix, keep + num_prefix], dim=1)  # [B, L]
        pattern = None if self.pattern is None else _pick_pairs(self.pattern(grid), index)
        rotary = None
        if self.rotary is not None:
            cosine, sine = self.rotary(grid)
            rotary = _pick_tokens(cosine, index), _pick_tokens(sine, index)

        def features(x: Tensor, seen: dict[int, Features]) -> Features:
            return Features(patches=x[:, num_prefix:], prefix=x[:, :num_prefix], grid=grid, layers=seen)

        seen: dict[int, Features] = {}
        for number, block in enumerate(self.blocks):
            asking = queries if number == depth - 1 else None
            tokens = self.run_block(block, tokens, grid, index, pattern, rotary, asking)
            for asked in wanted.get(number, ()):
                seen[asked] = features(self.norm(tokens), {})
        return features(self.final(self.norm(tokens)), seen)

    def forward_features(
        self,
        images: Tensor,
        *,
        keep: Tensor | None = None,
        fill: Fill | None = None,
        layers: Sequence[int] = (),
    ) -> Features:
        """Encode images [B, C, H, W]; see `Encoder.forward_features`."""
        tokens, grid = self.patch(images)
        if fill is not None:
            mask, token = fill
            tokens = torch.where(mask[:, :, None], token.to(tokens.dtype), tokens)
        return self.encode(self.place(tokens, grid, keep), grid, keep, layers)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, K].

        Class and distillation token are all that their heads read, so the last block computes nothing else,
        unless somebody looks at that block: the logits are the same, a two-block model trains a third faster,
        ViT-S/16 by some per cent.
        """
        tokens, grid = self.patch(images)
        read = None
        if self.config.pool == "cls" and not self._watched_at_the_end():
            read = 2 if self.config.distillation else 1
        return self.forward_head(self.encode(self.place(tokens, grid), grid, queries=read))

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            if self.config.init == "xavier":
                nn.init.xavier_uniform_(module.weight)
            else:
                nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def _watched_at_the_end(self) -> bool:
        last = (tap for tap in self.blocks[-1].modules() if isinstance(tap, Tap))
        return self.final.watched or any(tap.watched for tap in last)

    def forward_head(self, features: Features) -> Tensor:
        """Pool and classify: features -> logits [B, K]; with distillation the mean of both heads."""
        if self.config.distillation:
            return torch.stack(self.forward_heads(features)).mean(dim=0)
        return self.head(self.fc_norm(self.pool(features)))

    def forward_heads(self, features: Features) -> tuple[Tensor, Tensor]:
        """Logits [B, K] from the class token, and [B, K] from the distillation token.

        Raises:
            ValueError: The model has no distillation token.
        """
        if self.head_dist is None:
            raise ValueError("this model has no distillation token; build it with distillation=True")
        class_token, distillation_token = self.fc_norm(features.prefix[:, :2]).unbind(1)
        return self.head(class_token), self.head_dist(distillation_token)

    def pool(self, features: Features) -> Tensor:
        """One vector an image, [B, D]: class token, mean of the patches, or sequence pooling."""
        if self.config.pool == "cls":
            return features.prefix[:, 0]
        if self.attention_pool is None or self.pool_shares is None:
            return features.patches.mean(dim=1)
        shares = self.pool_shares(self.attention_pool(features.patches).softmax(dim=1))  # [B, N, 1]
        return (shares.transpose(1, 2) @ features.patches)[:, 0]

    def attention_density(self, grid: Grid) -> float:
        """Share of the pairs of tokens that attention uses on a grid, in (0, 1]; 1 unless it is sparse."""
        if self.pattern is not None:
            return self.pattern.density(grid)
        if self.config.attention == "sparse_topk":
            return top_k_density(grid, self.config.num_prefix, self.config.top_k)
        return 1.0

    def position_table(self, grid: Grid) -> Tensor | None:
        """The positions that are added to the patches, [N, D]; None for none, relative and rotary."""
        table, _ = self._positions(grid)
        return None if table is None else table[0]

    def position_bias(self, grid: Grid) -> dict[str, Tensor]:
        """The relative positions of each block, for pairs of patches."""
        found: dict[str, Tensor] = {}
        for name in self.block_names():
            relative = self.get_submodule(name).rel_pos
            if relative is not None:
                assert isinstance(relative, RelativePositionBias)
                pairs = relative(grid)[0, :, self.config.num_prefix :, self.config.num_prefix :]
                found[name] = bias_by_offset(pairs, grid)
        return found

    def position_rotation(self, grid: Grid) -> tuple[Tensor, Tensor] | None:
        """The rotary positions; both channels of a pair turn by one angle."""
        if self.rotary is None:
            return None
        cosine, sine = self.rotary(grid)
        patches = slice(self.config.num_prefix, None)
        return cosine[0, 0, patches, ::2], sine[0, 0, patches, ::2]

    def position_layouts(self) -> dict[str, TableLayout]:
        """`pos_embed`, or its rows and columns, or the table of relative positions of each block."""
        config = self.config
        rows, columns = config.grid
        if config.position == "learned":
            prefix = config.num_prefix if config.prefix_position else 0
            return {"pos_embed": TableLayout(config.grid, first=prefix)}
        if config.position == "learned_2d":
            return {
                "pos_embed.row": TableLayout((rows, 1)),
                "pos_embed.column": TableLayout((columns, 1)),
            }
        if config.position == "relative":
            layout = TableLayout((2 * rows - 1, 2 * columns - 1), last=3 if config.num_prefix else 0)
            return {f"{name}.rel_pos.relative_position_bias_table": layout for name in self.block_names()}
        return {}

    def _positions(self, grid: Grid) -> tuple[Tensor | None, Tensor | None]:
        """Positions of the patches [1, N, D] and of the prefix [1, P, D], each None where there are none."""
        if self.pos_embed is None:
            return None, None
        if not isinstance(self.pos_embed, nn.Parameter):
            return self.pos_embed(grid), None
        num_prefix = self.config.num_prefix if self.config.prefix_position else 0
        patches = resample_table(self.pos_embed[:, num_prefix:], self.config.grid, grid)
        return patches, self.pos_embed[:, :num_prefix] if num_prefix else None


def _pick_tokens(table: Tensor, index: Tensor | None) -> Tensor:
    """[1, 1, L, d] -> [B, 1, n, d], the rows of `index` [B, n]."""
    return table if index is None else table[0, 0][index][:, None]


def _pick_pairs(bias: Tensor, index: Tensor | None) -> Tensor:
    """[1, H, L, L] -> [B, H, n, n], the rows and columns of `index` [B, n]."""
    if index is None:
        return bias
    return bias[0][:, index[:, :, None], index[:, None, :]].transpose(0, 1)


def _sizes(dim: int, depth: int, num_heads: int, *patches: tuple[int, int]) -> dict[str, ViTConfig]:
    return {
        f"patch{patch_size}_{img_size}": ViTConfig(
            embed_dim=dim, depth=depth, num_heads=num_heads, patch_size=patch_size, img_size=img_size
        )
        for patch_size, img_size in patches
    }


VARIANTS: dict[str, ViTConfig] = (
    {
        f"vit_{size}_{suffix}": config
        for size, configs in {
            "tiny": _sizes(192, 12, 3, (16, 224), (16, 384)),
            "small": _sizes(384, 12, 6, (8, 224), (16, 224), (16, 384), (32, 224), (32, 384)),
            "base": _sizes(768, 12, 12, (8, 224), (16, 224), (16, 384), (32, 224), (32, 384)),
            "large": _sizes(1024, 24, 16, (16, 224), (16, 384), (32, 224), (32, 384)),
            "huge": _sizes(1280, 32, 16, (14, 224)),
        }.items()
        for suffix, config in configs.items()
    }
    | {
        # DINOv2 (Oquab et al. 2023), trained without labels at 518 pixels; reg4: with four registers.
        f"vit_{size}_patch14_{registers}dinov2": ViTConfig(
            img_size=518,
            patch_size=14,
            num_classes=0,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            registers=4 if registers else 0,
            prefix_position=not registers,
            layer_scale=1e-5,
            init="trunc_normal",
        )
        for size, (embed_dim, depth, num_heads) in {
            "small": (384, 12, 6),
            "base": (768, 12, 12),
            "large": (1024, 24, 16),
        }.items()
        for registers in ("", "reg4_")
    }
    | {
        # Small models for small images: 8 (scikit-learn's digits), 28 (MNIST) and 32 pixels (CIFAR).
        "vit_digits": ViTConfig(
            img_size=8,
            patch_size=2,
            in_chans=1,
            num_classes=10,
            embed_dim=64,
            depth=4,
            num_heads=4,
            mlp_ratio=2.0,
            patch_embed="stem",
        ),
        "vit_mnist_2blk": ViTConfig(
            img_size=28, patch_size=7, in_chans=1, num_classes=10, embed_dim=64, depth=2, num_heads=4
        ),
        "vit_mnist_small": ViTConfig(
            img_size=28,
            patch_size=4,
            in_chans=1,
            num_classes=10,
            embed_dim=64,
            depth=3,
            num_heads=4,
            mlp_ratio=2.0,
            patch_embed="stem",
            class_token=False,
            pool="seqpool",
        ),
        "vit_cifar_plain": ViTConfig(
            img_size=32, patch_size=4, num_classes=10, embed_dim=192, depth=6, num_heads=4, mlp_ratio=2.0
        ),
        "vit_cifar": ViTConfig(
            img_size=32,
            patch_size=4,
            num_classes=10,
            embed_dim=128,
            depth=2,
            num_heads=4,
            mlp_ratio=2.0,
            patch_embed="stem",
            class_token=False,
            pool="seqpool",
        ),
    }
)
