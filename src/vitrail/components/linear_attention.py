"""Attention whose time and memory grow with the number of tokens, not with its square.

    B batch, H heads, L query tokens, S key tokens, d head width, e width of a value

Paper: Katharopoulos et al. 2020, "Transformers are RNNs: Fast Autoregressive Transformers with Linear
Attention", equations 4 to 7: exp(q k^T) is replaced by a product phi(q) phi(k)^T of features, so that the
products can be taken in the other order, phi(q) (phi(k)^T v), and the L x S matrix is never formed.
Others call it kernel attention or efficient attention.

What differs: nothing is causal, and there is no 1 / sqrt(d). The fused kernel has no place here; the matrix
is formed only where somebody watches it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vitrail.components.tap import Tap


def positive_features(x: Tensor) -> Tensor:
    """The feature map elu(x) + 1 (Katharopoulos et al. 2020, equation 7): positive, of the same shape."""
    return F.elu(x) + 1


def attend_linear(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scores: Tap,
    weights: Tap,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """phi(q) (phi(k)^T v) / (phi(q) sum phi(k)); a drop-in for `vitrail.components.attention.attend`.

    Args:
        query: [B, H, L, d].
        key: [B, H, S, d].
        value: [B, H, S, e].
        scores: Tap on phi(q) phi(k)^T, positive, [B, H, L, S]; watching it selects the explicit path.
        weights: Tap on the scores divided by their row sums, so that rows sum to one; the same.
        bias: Must be None: there are no scores to add it to.
        dropout: Must be 0: there are no weights to drop.

    Returns:
        [B, H, L, e].

    Raises:
        ValueError: A bias or dropout.
    """
    if bias is not None or dropout:
        raise ValueError(
            "linear attention never forms the weights: it takes no bias, mask or dropout of them; "
            "take another attention, or positions that are added to the tokens and attn_drop=0"
        )
    query, key = positive_features(query), positive_features(key)
    # Features below the smallest number are 0: a token that is 0 in all channels must not become 0/0.
    tiny = torch.finfo(query.dtype).tiny
    if scores.watched or weights.watched:
        similarities = scores(query @ key.transpose(-2, -1))
        shares = weights(similarities / similarities.sum(dim=-1, keepdim=True).clamp_min(tiny))
        return shares @ value
    sums = query @ key.sum(dim=2, keepdim=True).transpose(-2, -1)  # [B, H, L, 1]
    return query @ (key.transpose(-2, -1) @ value) / sums.clamp_min(tiny)
