"""A narrow transformer that says what is at places of which nothing is seen: MAE's decoder, JEPA's predictor.

    B batch, n seen patches, P prefix tokens, m wanted places, D width of the encoder, d of the predictor

Papers: He et al. 2022 (MAE, section 3, "MAE decoder"); Assran et al. 2023 (I-JEPA, section 3, "Prediction").
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitrail.components.attention import Attention
from vitrail.components.mlp import Mlp
from vitrail.models.encoder import Features
from vitrail.tasks.masking import take

_HEAD_WIDTH = 32
"""Of MAE's decoder (512 by 16 heads) and of I-JEPA's predictor for ViT-B (384 by 12)."""


class PredictorBlock(nn.Module):
    """Pre-norm attention and MLP, as in the ViT."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        """[B, L, d] -> [B, L, d], or of the first `queries` tokens only."""
        x = x[:, :queries] + self.attn(self.norm1(x), queries=queries)
        return x + self.mlp(self.norm2(x))


class Predictor(nn.Module):
    """Tokens of what is seen -> a prediction for each wanted place.

    A mask token stands for each wanted place; positions tell which one it is. Attention does not care for
    the order of tokens, so the wanted ones come first and nothing is sorted back into the grid; the last
    block computes only them.
    """

    def __init__(
        self, encoder_dim: int, dim: int, depth: int, num_heads: int | None, output_dim: int
    ) -> None:
        """A predictor.

        Args:
            encoder_dim: D.
            dim: d, a multiple of 4 (positions) and of the heads.
            depth: Number of blocks.
            num_heads: None: heads of width 32, or the next wider ones that fit.
            output_dim: Values predicted for each place.

        Raises:
            ValueError: Sizes that do not fit.
        """
        super().__init__()
        if dim < 4 or dim % 4 or depth < 1 or (num_heads is not None and (num_heads < 1 or dim % num_heads)):
            raise ValueError(
                "a decoder or predictor needs a width that is a multiple of 4 and of its heads, and 1 block "
                f"or more; got width {dim}, {num_heads or 'default'} heads, {depth} blocks"
            )
        if num_heads is None:
            num_heads = max(heads for heads in range(1, max(dim // _HEAD_WIDTH, 1) + 1) if dim % heads == 0)
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.empty(dim))
        self.blocks = nn.ModuleList(PredictorBlock(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, output_dim)
        self.apply(_initialise)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, seen: Features, keep: Tensor, wanted: Tensor, positions: Tensor) -> Tensor:
        """Predict.

        Args:
            seen: The encoder's view of the patches `keep`; its prefix takes part, without positions.
            keep: [B, n] places of what was seen.
            wanted: [B, m] places to predict.
            positions: [1, N, d] for all places of the grid.

        Returns:
            [B, m, output_dim].
        """
        positions = positions.expand(len(keep), -1, -1)
        shown = self.embed(seen.patches)
        shown = shown + take(positions, keep).to(shown.dtype)
        asked = self.mask_token.to(shown.dtype) + take(positions, wanted).to(shown.dtype)
        x = torch.cat([asked, self.embed(seen.prefix), shown], dim=1)
        count = wanted.shape[1]
        for block in self.blocks[:-1]:
            x = block(x)
        return self.head(self.norm(self.blocks[-1](x, count)))


def _initialise(module: nn.Module) -> None:
    """Linear layers start as in the ViT (MAE, appendix A.1: Xavier uniform)."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
