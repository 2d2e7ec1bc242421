"""The Vision Transformer for clips: the patches of all frames are one sequence, in which all attend to all.

    B batch, T frames, t frames a tubelet, C channels, H x W pixels, N patches, P prefix tokens, D width

Papers: Tong et al. 2022, "VideoMAE" (joint space-time attention, tubelets, mean of the patches); Arnab et al.
2021, "ViViT" (tubelets; weights of an image model for each frame of a tubelet); Bertasius et al. 2021, "Is
Space-Time Attention All You Need?" (TimeSformer: learned positions of space plus learned ones of time).

The blocks are those of `vitrail.models.vit`, and so are the names of the parameters: with tubelet 1 and
learned positions a ViT's weights serve as they are, `time_embed` is all that they lack. The patch embedding
takes the frames of a tubelet as channels, t * C of them, frame by frame, which is the same as the papers'
three-dimensional convolution.

What differs: keys have a bias, as in the ViT (VideoMAE has none; it adds the same to all scores of a query
and changes nothing), and the patches are normalised before their mean is taken, in pre-training and
classification alike, so that one leads to the other with all weights.

An image is a clip that stands still: it is repeated `num_frames` times. So everything that looks at images
serves these models too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vitrail.components.flow import AttentionStep, Flow, Footprint, Readout, Tokens, squares
from vitrail.components.patch import ConvPatchEmbedding
from vitrail.components.position import Grid, SinCosPosition1d, TableLayout, resample_table
from vitrail.components.residual import drop_path_rates
from vitrail.components.space_time import ClipGrid, SinCosPosition3d, moments
from vitrail.components.tap import Tap
from vitrail.models.encoder import Encoder, Features, Fill, Stage, asked_blocks
from vitrail.models.options import check_ranges
from vitrail.models.vit import Block, ViTConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoViTConfig:
    """Everything that decides a video ViT; the defaults are VideoMAE's ViT-B for 16 frames of 224 pixels."""

    img_size: int | tuple[int, int] = 224  # height and width; other sizes work too, positions are resampled
    patch_size: int = 16
    num_frames: int = 16  # other numbers work too, positions in time are resampled
    tubelet: int = 2  # frames that a patch spans
    in_chans: int = 3
    num_classes: int = 400  # 0: no head, the pooled features are returned
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    position: Literal["learned", "sincos_1d", "sincos_3d"] = "sincos_1d"  # 1d: the number in the sequence
    class_token: bool = False
    pool: Literal["cls", "mean"] = "mean"
    qkv_bias: bool = True
    drop: float = 0.0  # after the positions, both MLP layers and the attention's projection
    attn_drop: float = 0.0
    drop_path: float = 0.0  # at the last block, growing linearly from 0

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.num_frames % self.tubelet:
            raise ValueError(f"num_frames {self.num_frames} is not divisible by tubelet {self.tubelet}")
        _ = self.frame  # which checks the rest

    @property
    def frame(self) -> ViTConfig:
        """The ViT of one frame, whose blocks these are."""
        return ViTConfig(
            img_size=self.img_size,
            patch_size=self.patch_size,
            in_chans=self.in_chans,
            num_classes=self.num_classes,
            embed_dim=self.embed_dim,
            depth=self.depth,
            num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio,
            class_token=self.class_token,
            pool=self.pool,
            qkv_bias=self.qkv_bias,
            drop=self.drop,
            attn_drop=self.attn_drop,
            drop_path=self.drop_path,
        )

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.frame.image_shape

    @property
    def grid(self) -> ClipGrid:
        """Moments, rows and columns of patches at `num_frames` and `img_size`."""
        return (self.num_frames // self.tubelet, *self.frame.grid)

    def build(self) -> VideoViT:
        """The model, freshly initialised."""
        return VideoViT(self)


class VideoViT(Encoder):
    """The encoder of clips and its classifier. Taps are the ViT's."""

    def __init__(self, config: VideoViTConfig) -> None:
        super().__init__()
        self.config = config
        self.num_features = dim = config.embed_dim
        count, rows, columns = config.grid
        self.patch_embed = ConvPatchEmbedding(config.patch_size, config.tubelet * config.in_chans, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if config.class_token else None
        self.pos_embed: nn.Parameter | nn.Module
        self.time_embed: nn.Parameter | None = None
        if config.position == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, self.num_prefix + rows * columns, dim))
            self.time_embed = nn.Parameter(torch.zeros(1, count, dim))
        elif config.position == "sincos_1d":
            self.pos_embed = SinCosPosition1d(dim)
        else:
            self.pos_embed = SinCosPosition3d(dim)
        self.pos_drop = nn.Dropout(config.drop)
        self.blocks = nn.ModuleList(
            Block(config.frame, layer, rate)
            for layer, rate in enumerate(drop_path_rates(config.drop_path, config.depth))
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.embed, self.final = Tap(), Tap()
        self.apply(_initialise)
        self.reset_classifier(config.num_classes)
        for parameter, std in ((self.cls_token, 1e-6), (self.pos_embed, 0.02), (self.time_embed, 0.02)):
            if isinstance(parameter, nn.Parameter):
                nn.init.trunc_normal_(parameter, std=std)

    @property
    def num_prefix(self) -> int:
        """1 with a class token, else 0."""
        return int(self.config.class_token)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """One map: the patches."""
        return (Stage(self.config.patch_size, self.config.embed_dim),)

    def no_weight_decay(self) -> set[str]:
        """Token and positions."""
        learnt = ("cls_token", "pos_embed", "time_embed")
        return {name for name, _ in self.named_parameters() if name in learnt}

    def block_names(self) -> tuple[str, ...]:
        """`blocks.0`, `blocks.1`, ..."""
        return tuple(f"blocks.{number}" for number in range(len(self.blocks)))

    def flow(self, image_shape: tuple[int, int]) -> Flow:
        """All patches attend to all, for clips of `num_frames`.

        The grid is that of the moments below each other, so that maps show one after the other; painted on
        the frame, they lie over each other and their mean is seen.
        """
        frame = squares(image_shape, self.config.patch_size)
        tokens = Tokens(Footprint(frame.rows * self.config.grid[0], frame.columns), self.num_prefix)
        steps = tuple(AttentionStep(f"{name}.attn", tokens) for name in self.block_names())
        return Flow((tokens,), steps, (Readout(prefix=1 if self.config.pool == "cls" else 0),))

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a fresh one; 0: no head, `forward` gives the pooled features [B, D]."""
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.head.apply(_initialise)

    def patch(self, images: Tensor) -> tuple[Tensor, ClipGrid]:
        """Clips [B, T, C, H, W], or images [B, C, H, W] that stand still -> tokens [B, N, D] and the grid.

        Raises:
            ValueError: Another rank, other channels, or frames that do not make whole tubelets.
        """
        if images.ndim not in (4, 5):
            raise ValueError(
                f"expected clips [B, T, {self.config.in_chans}, H, W] or images "
                f"[B, {self.config.in_chans}, H, W], got {list(images.shape)}"
            )
        clips = images
        if images.ndim == 4:
            clips = images[:, None].expand(-1, self.config.num_frames, -1, -1, -1)
        if clips.shape[2] != self.config.in_chans:
            raise ValueError(
                f"expected clips [B, T, {self.config.in_chans}, H, W], got {list(clips.shape)}; convert the "
                "frames, or build the model with another in_chans"
            )
        made = moments(clips, self.config.tubelet)  # [B, M, t * C, H, W]
        count = made.shape[1]
        tokens, (rows, columns) = self.patch_embed(made.flatten(0, 1))  # [B * M, rows * columns, D]
        return tokens.unflatten(0, (-1, count)).flatten(1, 2), (count, rows, columns)

    def place(self, tokens: Tensor, grid: ClipGrid, keep: Tensor | None = None) -> Tensor:
        """Add positions, drop what is not kept, prepend the class token: [B, N, D] -> [B, P + N, D]."""
        tokens = tokens + self._positions(grid)
        if keep is not None:
            tokens = tokens.gather(1, keep[:, :, None].expand(-1, -1, tokens.shape[2]))
        if self.cls_token is not None:
            first: Tensor = self.cls_token
            if isinstance(self.pos_embed, nn.Parameter):
                first = first + self.pos_embed[:, :1]
            tokens = torch.cat([first.expand(tokens.shape[0], -1, -1).to(tokens.dtype), tokens], dim=1)
        return self.embed(self.pos_drop(tokens))

    def forward_features(
        self,
        images: Tensor,
        *,
        keep: Tensor | None = None,
        fill: Fill | None = None,
        layers: Sequence[int] = (),
    ) -> Features:
        """Encode clips [B, T, C, H, W], or images that stand still; see `Encoder.forward_features`."""
        wanted = asked_blocks(layers, len(self.blocks))
        tokens, grid = self.patch(images)
        if fill is not None:
            mask, token = fill
            tokens = torch.where(mask[:, :, None], token.to(tokens.dtype), tokens)
        x = self.place(tokens, grid, keep)

        def features(x: Tensor, seen: dict[int, Features]) -> Features:
            first = self.num_prefix
            return Features(patches=x[:, first:], prefix=x[:, :first], grid=grid, layers=seen)

        seen: dict[int, Features] = {}
        for number, block in enumerate(self.blocks):
            x = self.run_block(block, x, grid[1:])
            for asked in wanted.get(number, ()):
                seen[asked] = features(self.norm(x), {})
        return features(self.final(self.norm(x)), seen)

    def forward_head(self, features: Features) -> Tensor:
        """Class token or mean of the patches, and the classifier: features -> logits [B, K]."""
        read = features.prefix[:, 0] if self.config.pool == "cls" else features.patches.mean(dim=1)
        return self.head(read)

    def position_table(self, grid: Grid) -> Tensor:
        """The positions that are added to the patches, [N, D], of the moments below each other (`flow`)."""
        count = self.config.grid[0]
        return self._positions((count, grid[0] // count, grid[1]))[0]

    def position_layouts(self) -> dict[str, TableLayout]:
        """The learned positions of space and of time."""
        if self.config.position != "learned":
            return {}
        count, rows, columns = self.config.grid
        return {
            "pos_embed": TableLayout((rows, columns), first=self.num_prefix),
            "time_embed": TableLayout((count, 1)),
        }

    def _positions(self, grid: ClipGrid) -> Tensor:
        """Positions of the patches, [1, N, D]."""
        count, rows, columns = grid
        if isinstance(self.pos_embed, SinCosPosition1d):
            return self.pos_embed((count * rows, columns))
        if not isinstance(self.pos_embed, nn.Parameter):
            return self.pos_embed(grid)
        assert self.time_embed is not None
        own = self.config.grid
        space = resample_table(self.pos_embed[:, self.num_prefix :], own[1:], (rows, columns))
        time = resample_table(self.time_embed, (own[0], 1), (count, 1))
        return (time[:, :, None] + space[:, None]).flatten(1, 2)


def _initialise(module: nn.Module) -> None:
    """Linear layers start as in the ViT."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


VARIANTS: dict[str, VideoViTConfig] = {
    # VideoMAE's, with the head for Kinetics-400.
    "video_vit_small_patch16_224": VideoViTConfig(embed_dim=384, num_heads=6),
    "video_vit_base_patch16_224": VideoViTConfig(),
    # Three frames of 28 pixels; every frame has patches of its own.
    "video_vit_28": VideoViTConfig(
        img_size=28,
        patch_size=7,
        num_frames=3,
        tubelet=1,
        in_chans=1,
        num_classes=10,
        embed_dim=64,
        depth=3,
        num_heads=4,
        mlp_ratio=2.0,
        position="learned",
    ),
}
