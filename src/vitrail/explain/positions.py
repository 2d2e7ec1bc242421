"""What a model learnt about where a patch is: similarity of its position embeddings."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vitrail.models.encoder import Encoder


@torch.no_grad()
def position_similarity(model: Encoder, grid: tuple[int, int]) -> Tensor:
    """Cosine similarity between the position embeddings of all pairs of patches.

    This is figure 7 (centre) of Dosovitskiy et al. 2021: after training, close patches have similar
    embeddings, and rows and columns show.

    Args:
        model: A model that adds positions to its patches.
        grid: Rows and columns; positions are resampled where the model was made for others.

    Returns:
        [rows, columns, rows, columns], -1 to 1; entry [i, j, k, l] compares patch (i, j) with patch (k, l).

    Raises:
        ValueError: The model adds no positions to its patches.
    """
    table = model.position_table(grid)
    if table is None:
        raise ValueError(
            f"{type(model).__name__} adds no position embedding to its patches: "
            "it has none, or relative or rotary ones"
        )
    directions = F.normalize(table.float(), dim=1)  # [N, D]
    return (directions @ directions.T).reshape(*grid, *grid)
