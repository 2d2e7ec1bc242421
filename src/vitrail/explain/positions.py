"""What a model knows about where a patch is, whichever way it was told.

    N = rows * columns patches, D width, H heads

Every way gives each place a vector, and all that is shown follows from the scalar products of those vectors:

| kind | ways | the vector of a place |
|---|---|---|
| added | learned, learned_2d, sincos_1d, sincos_2d, sine | what is added to the patch |
| rotary | rotary | the cosines and sines of its angles, over the root of their number |
| bias | relative (ViT), Swin's tables, Swin V2's network | what all heads and blocks add to its scores |

The cosine similarity of added positions is figure 7 (centre) of Dosovitskiy et al. 2021. That of rotary ones
is the mean cosine of the angles by which one place is turned against the other: how much of a random query is
left after the relative rotation (Su et al. 2021). Biases say how much a place prefers each
other one (Liu et al. 2021, equation 4); a constant added to all of them changes no softmax, so those of each
head are centred, and two places are alike where they prefer the same patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vitrail.models.encoder import Encoder


@dataclass(frozen=True, kw_only=True, eq=False)
class Positions:
    """The places of a grid, compared by the vectors that stand for them."""

    kind: Literal["added", "rotary", "bias"]
    """How the model is told."""
    products: Tensor
    """Scalar products [rows, columns, rows, columns] of the vectors of all pairs of places."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns; with biases within windows those of a window."""
        return self.products.shape[0], self.products.shape[1]

    @property
    def similarity(self) -> Tensor:
        """Cosine of all pairs, [rows, columns, rows, columns], -1 to 1; 0 where a vector is zero."""
        norms = self.norms.flatten()
        lengths = (norms[:, None] * norms).clamp(min=torch.finfo(norms.dtype).tiny)
        return (self._matrix / lengths).clamp(-1, 1).reshape(self.products.shape)

    @property
    def norms(self) -> Tensor:
        """Length of each place's vector, [rows, columns]."""
        return self._matrix.diagonal().clamp(min=0).sqrt().reshape(self.grid)

    @property
    def row_norms(self) -> Tensor:
        """Mean length in each row, [rows]."""
        return self.norms.mean(dim=1)

    @property
    def column_norms(self) -> Tensor:
        """Mean length in each column, [columns]."""
        return self.norms.mean(dim=0)

    def principal_components(self) -> tuple[Tensor, Tensor]:
        """The places in the plane in which their vectors vary most.

        The eigenvectors of the centred products give what PCA of the vectors gives (Gower 1966). The sign of
        an axis makes its largest coordinate positive, the first of equal ones. Positions by formula vary as
        much along some axes as along others: which come first, and how they are turned, rounding decides.

        Returns:
            Coordinates [rows, columns, 2] and the share of the variance on each axis, [2]; zeros, but for
            rounding, where the vectors span fewer axes.
        """
        centred = self._matrix.cpu().double()
        centred = centred - centred.mean(dim=0)
        centred = centred - centred.mean(dim=1, keepdim=True)
        values, vectors = torch.linalg.eigh(centred)  # ascending
        values, vectors = values.flip(0).clamp(min=0)[:2], vectors.flip(1)[:, :2]
        # Grids are symmetric, so two places may be equally far out but for rounding: the first one counts.
        sizes = vectors.abs()
        outermost = (sizes > 0.999 * sizes.amax(dim=0)).int().argmax(dim=0, keepdim=True)  # [1, 2]
        coordinates = vectors * vectors.gather(0, outermost).sign() * values.sqrt()
        shares = values / centred.trace().clamp(min=torch.finfo(torch.double).tiny)
        missing = 2 - len(values)  # a grid of one place has one axis
        coordinates, shares = F.pad(coordinates, (0, missing)), F.pad(shares, (0, missing))
        return coordinates.reshape(*self.grid, 2).to(self.products), shares.to(self.products)

    @property
    def _matrix(self) -> Tensor:
        return self.products.flatten(2).flatten(0, 1)  # [N, N]


@torch.no_grad()
def read_positions(model: Encoder, grid: tuple[int, int]) -> Positions:
    """How a model tells places apart; for every kind of position.

    Args:
        model: Any encoder; only its positions are read.
        grid: Rows and columns of the patches (of a pyramid: of its first stage; of CrossViT: of the large
            branch); positions are resampled where the model was made for others. Biases within windows are
            those of a window: the first block's, over all blocks whose windows are as large.

    Raises:
        ValueError: Rows or columns below 1, or a model that is told nothing.
    """
    if min(grid) < 1:
        raise ValueError(f"grid: expected at least 1 row and 1 column, got {grid}")
    table = model.position_table(grid)
    if table is not None:
        return Positions(kind="added", products=_products(table, grid))
    rotation = model.position_rotation(grid)
    if rotation is not None:
        vectors = torch.cat(rotation, dim=1)  # [N, 2 pairs]
        return Positions(kind="rotary", products=_products(vectors, grid) / rotation[0].shape[1])
    biases = list(model.position_bias(grid).values())
    if biases:
        products = _bias_products(biases[0])
        for bias in biases[1:]:
            if bias.shape[1:] == biases[0].shape[1:]:
                products += _bias_products(bias)
        return Positions(kind="bias", products=products)
    raise ValueError(
        f"{type(model).__name__} is not told where a patch is: no position is added to patches or to scores, "
        "nor turns queries and keys (padding of convolutions can still tell it)"
    )


def _products(vectors: Tensor, grid: tuple[int, int]) -> Tensor:
    """Of one vector a place, [N, D] -> [rows, columns, rows, columns]."""
    vectors = vectors.float()
    return (vectors @ vectors.T).reshape(*grid, *grid)


def _bias_products(bias: Tensor) -> Tensor:
    """Of the centred biases of one block, by offset, [H, 2 r - 1, 2 c - 1] -> [r, c, r, c]."""
    grid = (bias.shape[1] + 1) // 2, (bias.shape[2] + 1) // 2
    row, column = (
        places[:, None] - places + len(places) - 1
        for places in (torch.arange(size, device=bias.device) for size in grid)
    )
    pairs = bias.float()[:, row[:, None, :, None], column[None, :, None, :]]  # [H, r, c, r, c]
    asked = pairs.flatten(3).flatten(1, 2)  # [H, N, N]: the last axis lists the patches that are asked
    asked = asked - asked.mean(dim=2, keepdim=True)
    return _products(asked.transpose(0, 1).flatten(1), grid)
