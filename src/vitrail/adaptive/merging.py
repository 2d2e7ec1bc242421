"""Token merging: in each block of a trained plain ViT, patches that are alike become one. Nothing is trained.

    B images, L tokens of which the first P are the prefix, D width, d head width, r merged in a block

Paper: Bolya et al. 2023, "Token Merging: Your ViT But Faster" (section 3). Every second patch looks for the
most similar one among the others, by the attention's keys; the r best pairs become their mean, weighted by
the number of patches that each stands for, and attention counts a token as many times as that (equation 1).

What differs from the paper: class token, distillation token and registers take no part in the matching (there
the class token is one of the first half that is never merged), and mean and sequence pooling weigh tokens by
the patches they stand for, so that merging equal patches changes no answer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.adaptive.plain import plain_vit
from vitrail.components.tap import record
from vitrail.models import Encoder
from vitrail.models.encoder import Features
from vitrail.models.vit import Block


def merge_similar(
    tokens: Tensor, sizes: Tensor, keys: Tensor, count: int, num_prefix: int
) -> tuple[Tensor, Tensor]:
    """Merge the most similar pairs of patches (section 3, "bipartite soft matching").

    Args:
        tokens: [B, L, D], the prefix first.
        sizes: How many patches each stands for, [B, L, 1].
        keys: What similarity is measured by (cosine), [B, L, d].
        count: r; at most half of the patches are merged.
        num_prefix: P, tokens that stay as they are.

    Returns:
        Tokens [B, L - r, D] and sizes [B, L - r, 1]: prefix, patches that looked and stayed, patches that
        were looked at.
    """
    seeking = tokens[:, num_prefix::2].shape[1]
    count = min(count, tokens.shape[1] - num_prefix - seeking)
    if count < 1:
        return tokens, sizes
    directions = F.normalize(keys[:, num_prefix:], dim=2)
    similarity = directions[:, ::2] @ directions[:, 1::2].transpose(1, 2)  # [B, seeking, sought]
    best, partner = similarity.max(dim=2)
    order = best.argsort(dim=1, descending=True)
    leaving, staying = order[:, :count], order[:, count:]

    sums = torch.cat([tokens * sizes, sizes], dim=2)  # [B, L, D + 1]
    seekers, sought = sums[:, num_prefix::2], sums[:, num_prefix + 1 :: 2]
    sought = sought.scatter_add(
        1, _rows(partner.gather(1, leaving), sums), seekers.gather(1, _rows(leaving, sums))
    )
    sums = torch.cat([sums[:, :num_prefix], seekers.gather(1, _rows(staying, sums)), sought], dim=1)
    sizes = sums[:, :, -1:]
    return sums[:, :, :-1] / sizes, sizes


def _rows(index: Tensor, like: Tensor) -> Tensor:
    """[B, n] -> [B, n, D] for `gather` and `scatter_add` on whole tokens."""
    return index[:, :, None].expand(-1, -1, like.shape[2])


class MergedViT(nn.Module):
    """A trained ViT whose blocks merge r patches each: images [B, C, H, W] -> logits [B, K].

    It shares the model's weights; with r = 0 its logits are the model's.
    """

    def __init__(self, model: Encoder, merged: int) -> None:
        """Merge `merged` patches after the attention of each block.

        Raises:
            ValueError: A model that tokens cannot be merged in, or a negative number.
        """
        super().__init__()
        if merged < 0:
            raise ValueError(f"merged: expected 0 patches a block or more, got {merged}")
        self.model = plain_vit(model).eval()
        self.merged = merged

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, K]."""
        model = self.model
        tokens, grid = model.patch(images)
        tokens = model.place(tokens, grid)
        sizes = tokens.new_ones(*tokens.shape[:2], 1)
        with record(model, "blocks.*.attn.key") as seen:
            for number, block in enumerate(model.blocks):
                assert isinstance(block, Block)
                alone = sizes.shape[1] == model.config.num_prefix + grid[0] * grid[1]
                counted = None if alone else sizes.log().transpose(1, 2)[:, None]  # [B, 1, 1, L]
                tokens = tokens + block.ls1(block.attn(block.norm1(tokens), bias=counted))
                keys = seen[f"blocks.{number}.attn.key"].mean(
                    dim=1
                )  # over the heads: [B, H, L, d] -> [B, L, d]
                tokens, sizes = merge_similar(tokens, sizes, keys, self.merged, model.config.num_prefix)
                tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
        return self._answer(model.norm(tokens), sizes, grid)

    def _answer(self, tokens: Tensor, sizes: Tensor, grid: tuple[int, int]) -> Tensor:
        model, num_prefix = self.model, self.model.config.num_prefix
        features = Features(patches=tokens[:, num_prefix:], prefix=tokens[:, :num_prefix], grid=grid)
        if model.config.pool == "cls":
            return model.forward_head(features)
        shares = sizes[:, num_prefix:]
        if model.attention_pool is not None:
            shares = (
                shares * (scores := model.attention_pool(features.patches)).sub(scores.amax(1, True)).exp()
            )
        pooled = (shares * features.patches).sum(dim=1) / shares.sum(dim=1)
        logits: Tensor = model.head(model.fc_norm(pooled))
        return logits
