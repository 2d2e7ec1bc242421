"""CaiT: deep transformers that first work on the patches alone and then let a class token read them.

    B batch, N patches, D width, H heads, d = D / H head width

Paper: Touvron et al. 2021, "Going deeper with Image Transformers". Three ideas: LayerScale (a learned factor
for each channel of each branch, starting near zero), class attention (in the last blocks only the class token
asks, and only it changes) and, between heads, talking-heads attention (Shazeer et al. 2020). Parameter names
are timm's, so its checkpoints load strictly.

The class token has no position and does not exist in the patch blocks. As in the authors' code, the drop-path
rate is the same in all patch blocks, and the class-attention blocks have neither drop-path nor dropout. The
published weights were trained with distillation. Other image sizes: positions are resampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitrail.components.attention import attend, split_heads
from vitrail.components.flow import AttentionStep, Flow, Readout, Tokens, squares
from vitrail.components.mlp import Mlp, hidden_width
from vitrail.components.patch import ConvPatchEmbedding, patch_grid
from vitrail.components.position import Grid, TableLayout, resample_table
from vitrail.components.residual import DropPath
from vitrail.components.tap import Tap
from vitrail.models.encoder import Encoder, Features, Fill, Stage, asked_blocks
from vitrail.models.options import check_ranges


@dataclass(frozen=True, kw_only=True, slots=True)
class CaiTConfig:
    """Everything that decides a CaiT; the defaults are CaiT-XXS24 at 224 pixels."""

    img_size: int | tuple[int, int] = 224  # height and width; other sizes work too, positions are resampled
    patch_size: int = 16
    in_chans: int = 3
    num_classes: int = 1000  # 0: no head, the class token is returned
    embed_dim: int = 192
    depth: int = 24  # blocks among the patches
    class_depth: int = 2  # class-attention blocks after them
    num_heads: int = 4
    mlp_ratio: float = 4.0
    layer_scale: float = (
        1e-5  # where LayerScale starts; the paper: 0.1 up to 18 blocks, 1e-5 to 24, 1e-6 beyond
    )
    drop: float = 0.0  # patch blocks: after the positions, both MLP layers and the attention's projection
    attn_drop: float = 0.0  # patch blocks: of the mixed weights
    drop_path: float = 0.0  # the same at every patch block

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not divisible by num_heads {self.num_heads}")

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return (self.img_size, self.img_size) if isinstance(self.img_size, int) else self.img_size

    @property
    def grid(self) -> Grid:
        """Rows and columns of patches at `img_size`."""
        return patch_grid(*self.image_shape, self.patch_size)

    def build(self) -> CaiT:
        """The model, freshly initialised."""
        return CaiT(self)


def mix_heads(x: Tensor, mixer: nn.Linear, scale: float = 1.0) -> Tensor:
    """Every head becomes `scale` times a weighted sum of all heads, plus a bias; [B, H, L, S] stays.

    One product [H, H] times [H, L * S] an image: several times as fast as `mixer` on transposed heads.
    """
    weight = mixer.weight.expand(x.shape[0], -1, -1)
    mixed = torch.baddbmm(mixer.bias[None, :, None], weight, x.flatten(2), alpha=scale)  # [B, H, L * S]
    return mixed.unflatten(2, x.shape[2:])


class TalkingHeadsAttention(nn.Module):
    """Self-attention whose heads are mixed before and after the softmax (Shazeer et al. 2020).

    The fused kernel knows no mixing, so the logits are always formed and the taps see what is used: `scores`
    the logits after the first mixing, `weights` the weights after the second (both [B, H, N, N]; because of
    the second mixing rows do not sum to one, and weights may be negative). Otherwise the taps are those of
    `vitrail.components.attention.Attention`.
    """

    def __init__(self, dim: int, num_heads: int, attn_drop: float, drop: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj_l = nn.Linear(num_heads, num_heads)
        self.proj_w = nn.Linear(num_heads, num_heads)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop)
        self.query, self.key, self.value = Tap(), Tap(), Tap()
        self.scores, self.weights, self.mixed = Tap(), Tap(), Tap()

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=2))
        q, k, v = self.query(q), self.key(k), self.value(v)
        logits = self.scores(mix_heads(q @ k.transpose(-2, -1), self.proj_l, scale=q.shape[-1] ** -0.5))
        weights = self.weights(mix_heads(logits.softmax(dim=-1), self.proj_w))
        mixed = self.attn_drop(weights) @ v
        return self.proj_drop(self.proj(self.mixed(mixed.transpose(1, 2).flatten(2))))


class ClassAttention(nn.Module):
    """Attention in which the first token alone asks, and all are asked (Touvron et al. 2021, section 3).

    Taps: `query` [B, H, 1, d], `key` and `value` [B, H, 1 + N, d], `scores` and `weights` [B, H, 1, 1 + N],
    `mixed` [B, 1, D].
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.query, self.key, self.value = Tap(), Tap(), Tap()
        self.scores, self.weights, self.mixed = Tap(), Tap(), Tap()

    def forward(self, x: Tensor) -> Tensor:
        """Class token and patches [B, 1 + N, D] -> [B, 1, D]."""
        mixed = attend(
            self.query(split_heads(self.q(x[:, :1]), self.num_heads)),
            self.key(split_heads(self.k(x), self.num_heads)),
            self.value(split_heads(self.v(x), self.num_heads)),
            scores=self.scores,
            weights=self.weights,
        )
        return self.proj(self.mixed(mixed.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """x + gamma_1 * attention(norm(x)), then x + gamma_2 * mlp(norm(x)), among the patches.

    Taps: `mid` [B, N, D] after the attention's residual sum, `out` [B, N, D] after the MLP's.
    """

    def __init__(self, config: CaiTConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = TalkingHeadsAttention(dim, config.num_heads, config.attn_drop, config.drop)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden_width(dim, config.mlp_ratio), config.drop)
        self.gamma_1 = nn.Parameter(torch.full((dim,), config.layer_scale))
        self.gamma_2 = nn.Parameter(torch.full((dim,), config.layer_scale))
        self.drop_path = DropPath(config.drop_path)
        self.mid, self.out = Tap(), Tap()

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        x = self.mid(torch.addcmul(x, self.gamma_1, self.drop_path(self.attn(self.norm1(x)))))
        return self.out(torch.addcmul(x, self.gamma_2, self.drop_path(self.mlp(self.norm2(x)))))


class ClassBlock(nn.Module):
    """The same for the class token alone, which reads itself and the patches; the patches stay as they are.

    Taps: `mid` and `out` [B, 1, D].
    """

    def __init__(self, config: CaiTConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = ClassAttention(dim, config.num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden_width(dim, config.mlp_ratio))
        self.gamma_1 = nn.Parameter(torch.full((dim,), config.layer_scale))
        self.gamma_2 = nn.Parameter(torch.full((dim,), config.layer_scale))
        self.mid, self.out = Tap(), Tap()

    def forward(self, token: Tensor, patches: Tensor) -> Tensor:
        """Class token [B, 1, D] and patches [B, N, D] -> class token [B, 1, D]."""
        read = self.attn(self.norm1(torch.cat([token, patches], dim=1)))
        token = self.mid(torch.addcmul(token, self.gamma_1, read))
        return self.out(torch.addcmul(token, self.gamma_2, self.mlp(self.norm2(token))))


class CaiT(Encoder):
    """The encoder and its classifier.

    Taps `embed` [B, N, D] after the positions and `final` [B, 1 + N, D] after the last norm, besides those of
    the blocks.
    """

    def __init__(self, config: CaiTConfig) -> None:
        super().__init__()
        self.config = config
        self.num_features = dim = config.embed_dim
        self.patch_embed = ConvPatchEmbedding(config.patch_size, config.in_chans, dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid[0] * config.grid[1], dim))
        self.pos_drop = nn.Dropout(config.drop)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks_token_only = nn.ModuleList(ClassBlock(config) for _ in range(config.class_depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.embed, self.final = Tap(), Tap()
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.apply(_initialise)
        self.reset_classifier(config.num_classes)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """One map: the patches."""
        return (Stage(self.config.patch_size, self.config.embed_dim),)

    def no_weight_decay(self) -> set[str]:
        """The class token and the positions."""
        return {"cls_token", "pos_embed"}

    def block_names(self) -> tuple[str, ...]:
        """`blocks.0`, ..., `blocks.23`, `blocks_token_only.0`, `blocks_token_only.1`."""
        among_patches = (f"blocks.{number}" for number in range(self.config.depth))
        return (
            *among_patches,
            *(f"blocks_token_only.{number}" for number in range(self.config.class_depth)),
        )

    def flow(self, image_shape: tuple[int, int]) -> Flow:
        """Patches attend to patches; then the class token, which waited, asks itself and them."""
        tokens = Tokens(squares(image_shape, self.config.patch_size), prefix=1)
        names, depth = self.block_names(), self.config.depth
        among_patches = (AttentionStep(f"{name}.attn", tokens, skipped=1) for name in names[:depth])
        asking = (AttentionStep(f"{name}.attn", tokens, class_only=True) for name in names[depth:])
        return Flow((tokens,), (*among_patches, *asking), (Readout(prefix=1),))

    def layer_of(self, parameter: str) -> int:
        """Depth of a parameter; the class token counts with the first block that it enters."""
        return self.config.depth + 1 if parameter == "cls_token" else super().layer_of(parameter)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a fresh one; 0: no head, `forward` gives the class token [B, D]."""
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.head.apply(_initialise)

    def patch(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Images [B, C, H, W] -> tokens [B, N, D] and the grid (rows, columns)."""
        return self.patch_embed(images)

    def place(self, tokens: Tensor, grid: Grid, keep: Tensor | None = None) -> Tensor:
        """Add positions, drop what is not kept: [B, N, D] -> [B, n, D]."""
        tokens = tokens + resample_table(self.pos_embed, self.config.grid, grid)
        if keep is not None:
            tokens = tokens.gather(1, keep[:, :, None].expand(-1, -1, tokens.shape[2]))
        return self.embed(self.pos_drop(tokens))

    def encode(self, tokens: Tensor, grid: Grid, layers: Sequence[int] = ()) -> Features:
        """Run the blocks: patches [B, N, D] -> normalised features."""
        wanted = asked_blocks(layers, self.config.depth + self.config.class_depth)
        seen: dict[int, Features] = {}

        def features(token: Tensor, patches: Tensor) -> Features:
            return Features(patches=self.norm(patches), prefix=self.norm(token), grid=grid)

        for number, block in enumerate(self.blocks):
            tokens = self.run_block(block, tokens)
            for asked in wanted.get(number, ()):
                seen[asked] = features(tokens[:, :0], tokens)
        token = self.cls_token.repeat(tokens.shape[0], 1, 1).to(tokens.dtype)
        for number, block in enumerate(self.blocks_token_only, start=self.config.depth):
            token = self.run_block(block, token, tokens)
            for asked in wanted.get(number, ()):
                seen[asked] = features(token, tokens)
        final = self.final(self.norm(torch.cat([token, tokens], dim=1)))
        return Features(patches=final[:, 1:], prefix=final[:, :1], grid=grid, layers=seen)

    def forward_features(
        self,
        images: Tensor,
        *,
        keep: Tensor | None = None,
        fill: Fill | None = None,
        layers: Sequence[int] = (),
    ) -> Features:
        """Encode images [B, C, H, W]; see `Encoder.forward_features`.

        Layers count the patch blocks first, then the class-attention blocks; before those there is no prefix.
        """
        tokens, grid = self.patch(images)
        if fill is not None:
            mask, token = fill
            tokens = torch.where(mask[:, :, None], token.to(tokens.dtype), tokens)
        return self.encode(self.place(tokens, grid, keep), grid, layers)

    def forward_head(self, features: Features) -> Tensor:
        """Classify by the class token: features -> logits [B, K]."""
        return self.head(features.prefix[:, 0])

    def position_layouts(self) -> dict[str, TableLayout]:
        """`pos_embed`: patches only."""
        return {"pos_embed": TableLayout(self.config.grid)}

    def position_table(self, grid: Grid) -> Tensor:
        """The positions that are added to the patches, [N, D]."""
        return resample_table(self.pos_embed, self.config.grid, grid)[0]


def _initialise(module: nn.Module) -> None:
    """Linear layers as in the authors' code; the patch embedding keeps PyTorch's start."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def _size(dim: int, depth: int, num_heads: int, img_size: int, layer_scale: float = 1e-5) -> CaiTConfig:
    return CaiTConfig(
        embed_dim=dim, depth=depth, num_heads=num_heads, img_size=img_size, layer_scale=layer_scale
    )


VARIANTS: dict[str, CaiTConfig] = {
    "cait_xxs24_224": _size(192, 24, 4, 224),
    "cait_xxs24_384": _size(192, 24, 4, 384),
    "cait_xxs36_224": _size(192, 36, 4, 224),
    "cait_xxs36_384": _size(192, 36, 4, 384),
    "cait_xs24_384": _size(288, 24, 6, 384),
    "cait_s24_224": _size(384, 24, 8, 224),
    "cait_s24_384": _size(384, 24, 8, 384),
    "cait_s36_384": _size(384, 36, 8, 384, layer_scale=1e-6),
    "cait_m36_384": _size(768, 36, 16, 384, layer_scale=1e-6),
    "cait_m48_448": _size(768, 48, 16, 448, layer_scale=1e-6),
    # For 32-pixel images (CIFAR).
    "cait_cifar": CaiTConfig(
        img_size=32,
        patch_size=4,
        num_classes=10,
        embed_dim=128,
        depth=8,
        num_heads=4,
        mlp_ratio=2.0,
        layer_scale=0.1,
    ),
}
