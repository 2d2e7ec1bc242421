"""CrossViT: two branches that see an image in small and in large patches and exchange their class tokens.

    B batch, C channels, K classes; of a branch: N patches, D width, L = 1 + N tokens, H heads

Paper: Chen et al. 2021, "CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification".
Branch 0 is the paper's S-branch (small patches, narrow), branch 1 its L-branch (large patches, wide). A
multi-scale block runs each branch's own blocks, then lets the class token of each ask the patches of the
other (equations 3 to 5). The dagger models (`stem="conv"`) embed patches with three convolutions. Names of
models and parameters are timm's.

Each branch sees the whole image in a size of its own: the large one at 224 where the small one has 240 pixels
(bicubic, as in the authors' code), so that whole patches fill both. Other image sizes are scaled by the same
factors and padded to whole patches, and the positions are resampled; timm resizes every image to the native
size instead.

`TwoBranchFeatures`: `patches`, `prefix` and `grid` are those of the large branch, `small` holds those of the
small one, and `stages` has both as maps, the finer first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.components.attention import Attention
from vitrail.components.cross_attention import CrossAttention
from vitrail.components.flow import AttentionStep, Flow, Readout, Tokens, even
from vitrail.components.mlp import Mlp, hidden_width
from vitrail.components.patch import ConvPatchEmbedding, PatchEmbedding, patch_grid
from vitrail.components.position import Grid, TableLayout, resample_table
from vitrail.components.residual import DropPath, drop_path_rates
from vitrail.components.tap import Tap
from vitrail.models.encoder import Encoder, Features, Fill, Stage, asked_blocks
from vitrail.models.options import check_ranges

Pair = tuple[int, int]
SMALL, LARGE = 0, 1


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossViTConfig:
    """Everything that decides a CrossViT; pairs are (small, large branch). The defaults are CrossViT-S."""

    img_size: int | tuple[int, int] = 240  # height and width; other sizes work too, positions are resampled
    img_scale: tuple[float, float] = (1.0, 224 / 240)  # each branch resizes the image by this factor
    patch_size: Pair = (12, 16)
    in_chans: int = 3
    num_classes: int = 1000  # 0: no head, the two class tokens are returned side by side
    embed_dim: Pair = (192, 384)
    depth: int = 3  # multi-scale blocks
    branch_depth: Pair = (1, 4)  # blocks of each branch in a multi-scale block
    num_heads: Pair = (6, 6)
    mlp_ratio: float = 4.0
    stem: Literal["patch", "conv"] = "patch"  # conv: three convolutions (dagger), for patches of 12 and 16
    qkv_bias: bool = True
    drop: float = 0.0  # after the positions, both MLP layers and the attentions' projections
    attn_drop: float = 0.0
    drop_path: float = 0.0  # at the last block, growing linearly from 0

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.stem == "conv" and not set(self.patch_size) <= set(STEM_STRIDES):
            raise ValueError(
                f"stem 'conv' is for patches of 12 and 16 pixels, got {self.patch_size}; take stem 'patch'"
            )

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return (self.img_size, self.img_size) if isinstance(self.img_size, int) else self.img_size

    def branch_shape(self, branch: int, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels in which a branch sees an image."""
        scale = self.img_scale[branch]
        return int(height * scale), int(width * scale)

    def grid(self, branch: int) -> Grid:
        """Rows and columns of a branch's patches at `img_size`."""
        return patch_grid(*self.branch_shape(branch, *self.image_shape), self.patch_size[branch])

    def build(self) -> CrossViT:
        """The model, freshly initialised."""
        return CrossViT(self)


@dataclass(frozen=True, kw_only=True)
class TwoBranchFeatures(Features):
    """Features of the large branch, with those of the small branch beside."""

    small: Features


STEM_STRIDES = {12: ((4, 3), (3, 0), (1, 1)), 16: ((4, 3), (2, 1), (2, 1))}
"""Stride and padding of the three convolutions of the dagger models, by patch size (paper, section 4.3)."""


class StemEmbedding(PatchEmbedding):
    """Three convolutions (7x7, 3x3, 3x3) with ReLU between them, together of stride p."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__(patch_size, in_chans, embed_dim)
        widths = (in_chans, embed_dim // 4, embed_dim // 2, embed_dim)
        self.proj = nn.Sequential()
        for step, (stride, padding) in enumerate(STEM_STRIDES[patch_size]):
            if step:
                self.proj.append(nn.ReLU(inplace=True))
            kernel = 3 if step else 7
            self.proj.append(nn.Conv2d(widths[step], widths[step + 1], kernel, stride, padding))

    def embed(self, images: Tensor) -> Tensor:
        """Padded images [B, C, H, W] -> maps [B, D, rows, columns]."""
        return self.proj(images)


class Block(nn.Module):
    """A branch's own pre-norm block, as in ViT. Taps: `mid`, `out` [B, L, D]."""

    def __init__(self, config: CrossViTConfig, branch: int, drop_path: float) -> None:
        super().__init__()
        dim = config.embed_dim[branch]
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(
            dim,
            config.num_heads[branch],
            qkv_bias=config.qkv_bias,
            attn_drop=config.attn_drop,
            drop=config.drop,
        )
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden_width(dim, config.mlp_ratio), config.drop)
        self.drop_path = DropPath(drop_path)
        self.mid, self.out = Tap(), Tap()

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        x = self.mid(x + self.drop_path(self.attn(self.norm1(x))))
        return self.out(x + self.drop_path(self.mlp(self.norm2(x))))


class CrossBlock(nn.Module):
    """The class token asks itself and the patches of another branch; no MLP. Tap: `out` [B, 1, D]."""

    def __init__(self, config: CrossViTConfig, branch: int, drop_path: float) -> None:
        super().__init__()
        dim = config.embed_dim[branch]
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = CrossAttention(
            dim,
            config.num_heads[branch],
            qkv_bias=config.qkv_bias,
            attn_drop=config.attn_drop,
            drop=config.drop,
        )
        self.drop_path = DropPath(drop_path)
        self.out = Tap()

    def forward(self, class_token: Tensor, patches: Tensor) -> Tensor:
        """[B, 1, D], [B, N, D] -> [B, 1, D]."""
        context = self.norm1(torch.cat([class_token, patches], dim=1))
        return self.out(class_token + self.drop_path(self.attn(context[:, :1], context)))


class MultiScaleBlock(nn.Module):
    """Both branches' own blocks, then the exchange (paper, figure 4).

    `projs[b]` brings the class token of branch b to the width of the other branch, whose patches `fusion[b]`
    lets it ask; `revert_projs[b]` brings it back.
    """

    def __init__(self, config: CrossViTConfig, rates: list[float]) -> None:
        super().__init__()
        dims = config.embed_dim
        self.blocks = nn.ModuleList(
            nn.Sequential(*(Block(config, branch, rates[i]) for i in range(config.branch_depth[branch])))
            for branch in (SMALL, LARGE)
        )
        self.projs = nn.ModuleList(_projection(dims[branch], dims[1 - branch]) for branch in (SMALL, LARGE))
        self.fusion = nn.ModuleList(CrossBlock(config, 1 - branch, rates[-1]) for branch in (SMALL, LARGE))
        self.revert_projs = nn.ModuleList(
            _projection(dims[1 - branch], dims[branch]) for branch in (SMALL, LARGE)
        )

    def forward(self, small: Tensor, large: Tensor) -> tuple[Tensor, Tensor]:
        """[B, L0, D0], [B, L1, D1] -> the same shapes."""
        tokens = self.blocks[SMALL](small), self.blocks[LARGE](large)
        (small_class, small), (large_class, large) = (x.split((1, x.shape[1] - 1), dim=1) for x in tokens)
        small_class = self._exchange(SMALL, small_class, large)
        large_class = self._exchange(LARGE, large_class, small)
        return torch.cat([small_class, small], dim=1), torch.cat([large_class, large], dim=1)

    def _exchange(self, branch: int, class_token: Tensor, patches: Tensor) -> Tensor:
        """The class token [B, 1, D] of a branch, after it asked the patches [B, N', D'] of the other."""
        asked = self.fusion[branch](self.projs[branch](class_token), patches)
        return self.revert_projs[branch](asked)


def _projection(width: int, new_width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width, eps=1e-6), nn.GELU(), nn.Linear(width, new_width))


class CrossViT(Encoder):
    """The encoder and its two heads.

    Taps: `embed`, `final` [B, L, D] of the large branch and `embed_small`, `final_small` of the small one,
    besides those of the blocks (`blocks.1.blocks.0.2.attn.weights`: second multi-scale block, small branch,
    third block) and of the exchange (`blocks.1.fusion.0.attn.weights` [B, H, 1, 1 + N]: the class token of
    the small branch over itself and the patches of the large one).
    """

    def __init__(self, config: CrossViTConfig) -> None:
        super().__init__()
        self.config = config
        self.num_features = sum(config.embed_dim)
        embedding = {"patch": ConvPatchEmbedding, "conv": StemEmbedding}[config.stem]
        for branch in (SMALL, LARGE):
            rows, columns = config.grid(branch)
            dim = config.embed_dim[branch]
            self.register_parameter(f"cls_token_{branch}", nn.Parameter(torch.zeros(1, 1, dim)))
            self.register_parameter(
                f"pos_embed_{branch}", nn.Parameter(torch.zeros(1, 1 + rows * columns, dim))
            )
        self.patch_embed = nn.ModuleList(
            embedding(size, config.in_chans, dim)
            for size, dim in zip(config.patch_size, config.embed_dim, strict=True)
        )
        self.pos_drop = nn.Dropout(config.drop)
        deepest = max(config.branch_depth)
        rates = drop_path_rates(config.drop_path, config.depth * deepest)
        self.blocks = nn.ModuleList(
            MultiScaleBlock(config, rates[i * deepest : (i + 1) * deepest]) for i in range(config.depth)
        )
        self.norm = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6) for dim in config.embed_dim)
        self.embed, self.final, self.embed_small, self.final_small = Tap(), Tap(), Tap(), Tap()
        self.apply(_initialise)
        self.reset_classifier(config.num_classes)
        for name, parameter in self.named_parameters():
            if name.startswith(("cls_token", "pos_embed")):
                nn.init.trunc_normal_(parameter, std=0.02)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Two maps, small patches first; strides in pixels of the image, rounded."""
        config = self.config
        strides = (
            round(size / scale) for size, scale in zip(config.patch_size, config.img_scale, strict=True)
        )
        return tuple(Stage(stride, dim) for stride, dim in zip(strides, config.embed_dim, strict=True))

    def no_weight_decay(self) -> set[str]:
        """Tokens and positions."""
        return {name for name, _ in self.named_parameters() if name.startswith(("cls_token", "pos_embed"))}

    def block_names(self) -> tuple[str, ...]:
        """The multi-scale blocks: `blocks.0`, `blocks.1`, `blocks.2`."""
        return tuple(f"blocks.{number}" for number in range(len(self.blocks)))

    def flow(self, image_shape: tuple[int, int]) -> Flow:
        """In each block both branches by themselves, then each class token asks the other's patches."""
        config = self.config
        branches = []
        for branch in (SMALL, LARGE):
            height, width = config.branch_shape(branch, *image_shape)
            grid = patch_grid(height, width, config.patch_size[branch])
            branches.append(Tokens(even(grid, image_shape), prefix=1))
        steps = []
        for name in self.block_names():
            for branch in (SMALL, LARGE):
                steps += [
                    AttentionStep(f"{name}.blocks.{branch}.{number}.attn", branches[branch], branch)
                    for number in range(config.branch_depth[branch])
                ]
            for branch in (SMALL, LARGE):
                other = 1 - branch
                steps.append(
                    AttentionStep(
                        f"{name}.fusion.{branch}.attn",
                        branches[branch],
                        branch,
                        class_only=True,
                        asked=(other, branches[other]),
                    )
                )
        return Flow(tuple(branches), tuple(steps), (Readout(SMALL, prefix=1), Readout(LARGE, prefix=1)))

    def reset_classifier(self, num_classes: int) -> None:
        """Two fresh heads; 0: none, `forward` gives both class tokens side by side, [B, D0 + D1]."""
        self.head = nn.ModuleList(
            nn.Linear(dim, num_classes) if num_classes else nn.Identity() for dim in self.config.embed_dim
        ).apply(_initialise)

    def patch(self, images: Tensor, branch: int) -> tuple[Tensor, Grid]:
        """Images [B, C, H, W] -> the tokens [B, N, D] and the grid of a branch."""
        height, width = images.shape[-2:]
        seen = self.config.branch_shape(branch, height, width)
        if seen != (height, width):
            images = F.interpolate(images, size=seen, mode="bicubic", align_corners=False)
        return self.patch_embed[branch](images)

    def place(self, tokens: Tensor, grid: Grid, branch: int) -> Tensor:
        """Prepend the class token, add positions: [B, N, D] -> [B, L, D]."""
        positions = self.get_parameter(f"pos_embed_{branch}")
        first = self.get_parameter(f"cls_token_{branch}") + positions[:, :1]
        tokens = tokens + resample_table(positions[:, 1:], self.config.grid(branch), grid)
        tokens = torch.cat([first.expand(tokens.shape[0], -1, -1).to(tokens.dtype), tokens], dim=1)
        return (self.embed_small, self.embed)[branch](self.pos_drop(tokens))

    def forward_features(
        self,
        images: Tensor,
        *,
        keep: Tensor | None = None,
        fill: Fill | None = None,
        layers: Sequence[int] = (),
    ) -> TwoBranchFeatures:
        """Encode images [B, C, H, W]; see `Encoder.forward_features`.

        `fill` counts the patches of the large branch and replaces them; patches of the small branch that
        touch a masked one become zero, so that neither branch sees what is masked. `layers` counts the
        multi-scale blocks.
        """
        if keep is not None:
            raise ValueError(
                "CrossViT cannot drop patches (its two branches have different grids); use fill= (SimMIM)"
            )
        wanted = asked_blocks(layers, len(self.blocks))
        (small, small_grid), (large, grid) = self.patch(images, SMALL), self.patch(images, LARGE)
        if fill is not None:
            mask, token = fill
            large = torch.where(mask[:, :, None], token.to(large.dtype), large)
            touched = F.adaptive_max_pool2d(mask.unflatten(1, grid)[:, None].to(small.dtype), small_grid)
            small = small * (1 - touched.flatten(2).transpose(1, 2))  # [B, N0, D0] * [B, N0, 1]
        small, large = self.place(small, small_grid, SMALL), self.place(large, grid, LARGE)
        seen: dict[int, Features] = {}
        for number, block in enumerate(self.blocks):
            small, large = self.run_block(block, small, large)
            for asked in wanted.get(number, ()):
                seen[asked] = _features(self.norm[0](small), small_grid, self.norm[1](large), grid)
        small, large = self.final_small(self.norm[0](small)), self.final(self.norm[1](large))
        return dataclasses.replace(_features(small, small_grid, large, grid), layers=seen)

    def forward_head(self, features: Features) -> Tensor:
        """The mean of both heads on their class tokens: features -> logits [B, K]."""
        assert isinstance(features, TwoBranchFeatures)
        tokens = features.small.prefix[:, 0], features.prefix[:, 0]
        outputs = [head(token) for head, token in zip(self.head, tokens, strict=True)]
        if isinstance(self.head[0], nn.Identity):
            return torch.cat(outputs, dim=1)
        return torch.stack(outputs).mean(dim=0)

    def position_layouts(self) -> dict[str, TableLayout]:
        """`pos_embed_0` and `pos_embed_1`: class token, then patches."""
        return {
            f"pos_embed_{branch}": TableLayout(self.config.grid(branch), first=1) for branch in (SMALL, LARGE)
        }

    def position_table(self, grid: Grid) -> Tensor:
        """The positions that are added to the patches of the large branch, [N, D]."""
        table = self.get_parameter(f"pos_embed_{LARGE}")[:, 1:]
        return resample_table(table, self.config.grid(LARGE), grid)[0]


def _features(small: Tensor, small_grid: Grid, large: Tensor, grid: Grid) -> TwoBranchFeatures:
    """From normalised tokens [B, L, D] of both branches."""
    small_features = Features(patches=small[:, 1:], prefix=small[:, :1], grid=small_grid)
    features = Features(patches=large[:, 1:], prefix=large[:, :1], grid=grid)
    return TwoBranchFeatures(
        patches=features.patches,
        prefix=features.prefix,
        grid=grid,
        stages=(small_features.map(), features.map()),
        small=small_features,
    )


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _crossvit(
    dim: int,
    large_depth: int,
    num_heads: int,
    mlp_ratio: float,
    stem: Literal["patch", "conv"] = "patch",
    img_size: Literal[240, 408] = 240,
) -> CrossViTConfig:
    return CrossViTConfig(
        img_size=img_size,
        img_scale=(1.0, {240: 224, 408: 384}[img_size] / img_size),
        embed_dim=(dim, 2 * dim),
        branch_depth=(1, large_depth),
        num_heads=(num_heads, num_heads),
        mlp_ratio=mlp_ratio,
        stem=stem,
    )


VARIANTS: dict[str, CrossViTConfig] = {
    "crossvit_tiny_240": _crossvit(96, 4, 3, 4.0),
    "crossvit_small_240": _crossvit(192, 4, 6, 4.0),
    "crossvit_base_240": _crossvit(384, 4, 12, 4.0),
    "crossvit_9_240": _crossvit(128, 3, 4, 3.0),
    "crossvit_15_240": _crossvit(192, 5, 6, 3.0),
    "crossvit_18_240": _crossvit(224, 6, 7, 3.0),
    "crossvit_9_dagger_240": _crossvit(128, 3, 4, 3.0, "conv"),
    "crossvit_15_dagger_240": _crossvit(192, 5, 6, 3.0, "conv"),
    "crossvit_18_dagger_240": _crossvit(224, 6, 7, 3.0, "conv"),
    "crossvit_15_dagger_408": _crossvit(192, 5, 6, 3.0, "conv", 408),
    "crossvit_18_dagger_408": _crossvit(224, 6, 7, 3.0, "conv", 408),
    # For 32 pixels (CIFAR): both branches see the image as it is.
    "crossvit_cifar": CrossViTConfig(
        img_size=32,
        img_scale=(1.0, 1.0),
        patch_size=(2, 4),
        num_classes=10,
        embed_dim=(64, 128),
        branch_depth=(1, 2),
        num_heads=(2, 4),
        mlp_ratio=2.0,
    ),
}
