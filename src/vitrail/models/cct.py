"""Compact transformers: a convolutional tokeniser, few layers, and pooling over the sequence.

    B batch, C channels, N tokens, D width, K classes

Paper: Hassani et al. 2021, "Escaping the Big Data Paradigm with Compact Transformers". `cct_7_3x1_32` is 7
layers behind one 3x3 convolution at 32 pixels, `cvt_7_4_32` 7 layers on plain patches of 4 x 4 pixels. timm
has neither; names of models and parameters are those of the authors' code (SHI-Labs/Compact-Transformers),
and so are the blocks, whose second norm stands in the residual stream:

    x = norm1(x + attention(pre_norm(x)))
    x = x + linear2(gelu(linear1(x)))

Those names give the taps theirs: `classifier.blocks.3.self_attn.weights`, `classifier.blocks.3.hidden`.

What differs: positions are resampled on other grids (the authors' models take one size), CVT pads to whole
patches, and sine positions are a buffer, not a frozen parameter. Dropout rates are 0 until a recipe sets
them; the authors train with attn_drop 0.1 and drop_path 0.1.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.components.attention import Attention
from vitrail.components.flow import AttentionStep, Flow, Readout, Tokens, squares
from vitrail.components.mlp import hidden_width
from vitrail.components.position import Grid, TableLayout, resample_table
from vitrail.components.residual import DropPath, drop_path_rates
from vitrail.components.tap import Tap
from vitrail.models.encoder import Encoder, Features, Fill, Stage, asked_blocks
from vitrail.models.options import check_ranges


@dataclass(frozen=True, kw_only=True, slots=True)
class CCTConfig:
    """Everything that decides a compact transformer; the defaults are CCT-14/7x2 at 224 pixels."""

    img_size: int | tuple[int, int] = 224  # height and width; other sizes work too, positions are resampled
    tokenizer: Literal["conv", "patch"] = "conv"  # conv: convolution, ReLU, pooling (CCT); patch: CVT
    kernel_size: int = 7  # of the convolutions, odd; of a patch
    num_convs: int = 2  # convolutions, each followed by ReLU and 3x3 max-pooling with stride 2; patch: 1
    in_chans: int = 3
    num_classes: int = 1000  # 0: no head, the pooled features are returned
    embed_dim: int = 384
    depth: int = 14
    num_heads: int = 6
    mlp_ratio: float = 3.0
    position: Literal["learned", "sine", "none"] = "learned"
    drop: float = 0.0  # after the positions, both MLP layers and the attention's projection
    attn_drop: float = 0.0
    drop_path: float = 0.0  # at the last block, growing linearly from 0

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not divisible by num_heads {self.num_heads}")
        if self.tokenizer == "conv" and self.kernel_size % 2 == 0:
            raise ValueError(f"tokenizer 'conv' needs an odd kernel_size, got {self.kernel_size}")
        if self.tokenizer == "patch" and self.num_convs != 1:
            raise ValueError(f"tokenizer 'patch' is one convolution, got num_convs {self.num_convs}")

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return (self.img_size, self.img_size) if isinstance(self.img_size, int) else self.img_size

    @property
    def conv_stride(self) -> int:
        """Stride of a convolution: 1 for 3x3, 2 for 7x7 (authors' code)."""
        return max(1, self.kernel_size // 2 - 1) if self.tokenizer == "conv" else self.kernel_size

    @property
    def stride(self) -> int:
        """Pixels of the image a cell of the grid."""
        return (2 * self.conv_stride) ** self.num_convs if self.tokenizer == "conv" else self.kernel_size

    @property
    def grid(self) -> Grid:
        """Rows and columns of tokens at `img_size`."""
        rows, columns = (-(-size // self.stride) for size in self.image_shape)
        return rows, columns

    def build(self) -> CCT:
        """The model, freshly initialised."""
        return CCT(self)


class Tokenizer(nn.Module):
    """Images to a map of tokens: convolutions with ReLU and max-pooling, or plain patches."""

    def __init__(self, config: CCTConfig) -> None:
        super().__init__()
        self.in_chans, self.stride = config.in_chans, config.stride
        convolutional = config.tokenizer == "conv"
        widths = [config.in_chans, *[64] * (config.num_convs - 1), config.embed_dim]
        self.conv_layers = nn.Sequential()
        for narrow, wide in itertools.pairwise(widths):
            convolution = nn.Conv2d(
                narrow,
                wide,
                config.kernel_size,
                config.conv_stride,
                padding=config.kernel_size // 2 if convolutional else 0,
                bias=not convolutional,
            )
            nn.init.kaiming_normal_(convolution.weight)
            layer = nn.Sequential(convolution)
            if convolutional:
                # The authors have the ReLU first: the same numbers and gradients, from four times the values.
                layer.extend([nn.MaxPool2d(kernel_size=3, stride=2, padding=1), nn.ReLU(inplace=True)])
            self.conv_layers.append(layer)

    def forward(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Images [B, C, H, W] -> tokens [B, N, D] and the grid (rows, columns)."""
        if images.ndim != 4 or images.shape[1] != self.in_chans:
            raise ValueError(
                f"expected images [B, {self.in_chans}, H, W], got {list(images.shape)}; convert the images, "
                "or build the model with another in_chans"
            )
        maps = self.conv_layers(images)
        return maps.flatten(2).transpose(1, 2), (maps.shape[2], maps.shape[3])


class Block(nn.Module):
    """The authors' block. Taps: `mid` [B, N, D] after norm1, `hidden` after the GELU, `out` [B, N, D]."""

    def __init__(self, config: CCTConfig, drop_path: float) -> None:
        super().__init__()
        dim = config.embed_dim
        hidden_dim = hidden_width(dim, config.mlp_ratio)
        self.pre_norm = nn.LayerNorm(dim)
        self.self_attn = Attention(
            dim, config.num_heads, qkv_bias=False, attn_drop=config.attn_drop, drop=config.drop
        )
        self.linear1 = nn.Linear(dim, hidden_dim)
        self.norm1 = nn.LayerNorm(dim)
        self.linear2 = nn.Linear(hidden_dim, dim)
        self.dropout = nn.Dropout(config.drop)
        self.drop_path = DropPath(drop_path)
        self.mid, self.hidden, self.out = Tap(), Tap(), Tap()

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        x = self.mid(self.norm1(x + self.drop_path(self.self_attn(self.pre_norm(x)))))
        hidden = self.dropout(self.hidden(F.gelu(self.linear1(x))))
        return self.out(x + self.drop_path(self.dropout(self.linear2(hidden))))


class Classifier(nn.Module):
    """What the authors' parameter names put behind `classifier.`: positions, blocks, norm, pooling, head."""

    def __init__(self, config: CCTConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.positional_emb: Tensor
        if config.position == "learned":
            self.positional_emb = nn.Parameter(torch.empty(1, config.grid[0] * config.grid[1], dim))
            nn.init.trunc_normal_(self.positional_emb, std=0.2)
        elif config.position == "sine":
            self.register_buffer("positional_emb", sine_positions(config.grid, dim))
        self.blocks = nn.ModuleList(
            Block(config, rate) for rate in drop_path_rates(config.drop_path, config.depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.attention_pool = nn.Linear(dim, 1)
        self.fc: nn.Module = nn.Identity()


class CCT(Encoder):
    """The encoder and its classifier.

    Taps, besides those of the blocks: `embed` and `final` [B, N, D], and `pool_shares` [B, N, 1], with which
    sequence pooling weighs the tokens.
    """

    after_blocks: ClassVar[tuple[str, ...]] = (
        "classifier.norm",
        "classifier.attention_pool",
        "classifier.fc",
    )
    head_names: ClassVar[tuple[str, ...]] = ("classifier.fc.",)

    def __init__(self, config: CCTConfig) -> None:
        super().__init__()
        self.config = config
        self.num_features = config.embed_dim
        self.tokenizer = Tokenizer(config)
        self.classifier = Classifier(config)
        self.pos_drop = nn.Dropout(config.drop)
        self.embed, self.final, self.pool_shares = Tap(), Tap(), Tap()
        self.classifier.apply(_initialise)
        self.reset_classifier(config.num_classes)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """One map: the tokens."""
        return (Stage(self.config.stride, self.config.embed_dim),)

    def no_weight_decay(self) -> set[str]:
        """Positions, where they are learned."""
        return {name for name, _ in self.named_parameters() if name == "classifier.positional_emb"}

    def block_names(self) -> tuple[str, ...]:
        """`classifier.blocks.0`, `classifier.blocks.1`, ..."""
        return tuple(f"classifier.blocks.{number}" for number in range(len(self.classifier.blocks)))

    def flow(self, image_shape: tuple[int, int]) -> Flow:
        """All tokens attend to all; a cell is what the strides leave (the convolutions see a little more)."""
        tokens = Tokens(squares(image_shape, self.config.stride))
        steps = tuple(AttentionStep(f"{name}.self_attn", tokens) for name in self.block_names())
        return Flow((tokens,), steps, (Readout(shares="pool_shares"),))

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a fresh one; 0: no head, `forward` gives the pooled features [B, D]."""
        head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.classifier.fc = head.apply(_initialise)

    def patch(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Images [B, C, H, W] -> tokens [B, N, D] and the grid (rows, columns)."""
        if self.config.tokenizer == "patch":
            height, width = images.shape[-2:]
            images = F.pad(images, (0, -width % self.config.stride, 0, -height % self.config.stride))
        return self.tokenizer(images)

    def place(self, tokens: Tensor, grid: Grid, keep: Tensor | None = None) -> Tensor:
        """Add positions, drop what is not kept: [B, N, D] -> [B, n, D]."""
        positions = self.position_table(grid)
        if positions is not None:
            tokens = tokens + positions
        if keep is not None:
            tokens = tokens.gather(1, keep[:, :, None].expand(-1, -1, tokens.shape[2]))
        return self.embed(self.pos_drop(tokens))

    def encode(self, tokens: Tensor, grid: Grid, layers: Sequence[int] = ()) -> Features:
        """Run the blocks: tokens [B, n, D] -> normalised features."""
        wanted = asked_blocks(layers, len(self.classifier.blocks))

        def features(x: Tensor, seen: dict[int, Features]) -> Features:
            return Features(patches=x, prefix=x[:, :0], grid=grid, layers=seen)

        seen: dict[int, Features] = {}
        for number, block in enumerate(self.classifier.blocks):
            tokens = self.run_block(block, tokens)
            for asked in wanted.get(number, ()):
                seen[asked] = features(self.classifier.norm(tokens), {})
        return features(self.final(self.classifier.norm(tokens)), seen)

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
        return self.encode(self.place(tokens, grid, keep), grid, layers)

    def forward_head(self, features: Features) -> Tensor:
        """Pool over the sequence with learned shares (paper, section 3.2) and classify -> logits [B, K]."""
        shares = self.classifier.attention_pool(features.patches).softmax(dim=1)  # [B, N, 1]
        shares = self.pool_shares(shares)
        return self.classifier.fc((shares.transpose(1, 2) @ features.patches)[:, 0])

    def position_layouts(self) -> dict[str, TableLayout]:
        """`classifier.positional_emb`, where it learns: patches only."""
        if self.config.position != "learned":
            return {}
        return {"classifier.positional_emb": TableLayout(self.config.grid)}

    def position_table(self, grid: Grid) -> Tensor | None:
        """The positions that are added to the tokens, [N, D]; None for position 'none'."""
        config = self.config
        if config.position == "none":
            return None
        table: Tensor = self.classifier.positional_emb
        if config.position == "learned":
            return resample_table(table, config.grid, grid)[0]
        return (table if grid == config.grid else sine_positions(grid, config.embed_dim).to(table))[0]


def sine_positions(grid: Grid, dim: int) -> Tensor:
    """Sine and cosine of the token's number in turn (Vaswani et al. 2017, section 3.5), [1, N, D]."""
    numbers, channels = torch.arange(grid[0] * grid[1]), torch.arange(dim)
    angles = numbers[:, None] / 10_000 ** (channels // 2 * 2 / dim)
    return torch.where(channels % 2 == 0, angles.sin(), angles.cos())[None]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


WIDTHS = {2: (128, 2, 1.0), 4: (128, 2, 1.0), 6: (256, 4, 2.0), 7: (256, 4, 2.0), 14: (384, 6, 3.0)}
"""embed_dim, num_heads and mlp_ratio by depth (paper, table 1)."""


def _cct(
    depth: int,
    kernel_size: int,
    num_convs: int,
    img_size: int,
    tokenizer: Literal["conv", "patch"] = "conv",
    position: Literal["learned", "sine"] = "learned",
) -> CCTConfig:
    embed_dim, num_heads, mlp_ratio = WIDTHS[depth]
    return CCTConfig(
        img_size=img_size,
        tokenizer=tokenizer,
        kernel_size=kernel_size,
        num_convs=num_convs,
        num_classes=10 if img_size == 32 else 1000,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=mlp_ratio,
        position=position,
    )


VARIANTS: dict[str, CCTConfig] = {
    "cct_2_3x2_32": _cct(2, 3, 2, 32),
    "cct_4_3x2_32": _cct(4, 3, 2, 32),
    "cct_6_3x1_32": _cct(6, 3, 1, 32),
    "cct_6_3x1_32_sine": _cct(6, 3, 1, 32, position="sine"),
    "cct_6_3x2_32": _cct(6, 3, 2, 32),
    "cct_7_3x1_32": _cct(7, 3, 1, 32),
    "cct_7_3x1_32_sine": _cct(7, 3, 1, 32, position="sine"),
    "cct_7_3x2_32": _cct(7, 3, 2, 32),
    "cct_7_7x2_224": _cct(7, 7, 2, 224),
    "cct_14_7x2_224": _cct(14, 7, 2, 224),
    "cct_14_7x2_384": _cct(14, 7, 2, 384),
    "cvt_6_4_32": _cct(6, 4, 1, 32, tokenizer="patch"),
    "cvt_7_4_32": _cct(7, 4, 1, 32, tokenizer="patch"),
}
