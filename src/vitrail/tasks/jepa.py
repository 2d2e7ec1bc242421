"""I-JEPA: the features of hidden blocks are predicted from the rest of the image, not their pixels.

    B batch, N patches, M target blocks of m patches each, D width

Paper: Assran et al. 2023, "Self-Supervised Learning from Images with a Joint-Embedding Predictive
Architecture". The context encoder sees what no target block covers; the target encoder, a moving average of
it, sees the whole image; a predictor is asked for each block in turn.

What differs: the loss is the mean of the squared differences over blocks, patches and channels, where the
paper sums over the patches of a block and over channels (a constant factor); targets are layer-normalised
without parameters, which the paper does not tell, so that their scale cannot shrink; a class token and
registers, where the encoder has them, take part in the prediction; `block_masking` tells how the masks
differ; pixels outside the context are zero, for convolutional stems.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.components.patch import patch_grid
from vitrail.components.position import SinCosPosition2d
from vitrail.models.encoder import Encoder
from vitrail.tasks.contrastive import without_classifier
from vitrail.tasks.masking import block_masking, hide, take
from vitrail.tasks.predictor import Predictor
from vitrail.tasks.reach import freeze_unreached, one_patch_features
from vitrail.tasks.task import Batch, Task


class JEPA(Task):
    """Predict the features of hidden blocks."""

    def __init__(
        self,
        model: Encoder,
        *,
        targets: int = 4,
        momentum: float = 0.996,
        predictor_dim: int | None = None,
        predictor_depth: int | None = None,
        predictor_heads: int | None = None,
    ) -> None:
        """I-JEPA around an encoder.

        Args:
            model: The context encoder, one that can drop patches; it loses its classifier.
            targets: Number of target blocks, M.
            momentum: Share of the target encoder that a step keeps, at the start; it grows linearly to 1 at
                the end of the run.
            predictor_dim: Width of the predictor; None: half of the encoder's, in steps of 32 and at most
                384: the paper's for ViT-B and larger.
            predictor_depth: Blocks of the predictor; None: half of the encoder's, at most 12 (the paper's for
                ViT-B to ViT-H).
            predictor_heads: None: heads of width 32 (the paper's for ViT-B).

        Raises:
            ValueError: A value out of range, or an encoder that needs all patches.
        """
        super().__init__()
        if targets < 1:
            raise ValueError(f"targets must be at least 1, got {targets}")
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"momentum must lie in [0, 1], got {momentum}")
        features = one_patch_features(model, "jepa")
        freeze_unreached(without_classifier(model), features.patches, features.prefix)
        (stride, width), depth = model.stages[0], len(model.block_names())
        if predictor_dim is None:
            predictor_dim = min(max(round(width / 64), 1) * 32, 384)
        if predictor_depth is None:
            predictor_depth = min(max(depth // 2, 1), 12)
        self.model, self.patch_size = model, stride
        self.target = copy.deepcopy(model).requires_grad_(False)
        self.target.eval()
        self.predictor = Predictor(width, predictor_dim, predictor_depth, predictor_heads, width)
        self.position = SinCosPosition2d(predictor_dim)
        self.count, self.momentum = targets, momentum
        self._step, self._total_steps = 0, 0

    def begin(self, total_steps: int) -> None:
        """Let the momentum reach 1 at the end of a run; without it, it stays what it is."""
        self._total_steps = total_steps

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Batch with `images` [B, C, H, W] -> "loss", "target_std", "ema_gap".

        "target_std" is the deviation of a channel of the targets over patches and images, 1 at best; towards
        0 all patches look alike: collapse. "ema_gap" is the distance of both encoders' parameters, as a share
        of their norm.
        """
        images = batch["images"]
        self._step = step
        grid = patch_grid(images.shape[2], images.shape[3], self.patch_size)
        blocks = block_masking(len(images), grid, self.count)
        context, places = (part.to(images.device, non_blocking=True) for part in blocks)
        with torch.no_grad():
            features = self.target.forward_features(images).patches.float()  # [B, N, D]
            features = F.layer_norm(features, features.shape[2:])
            wanted = take(features, places.flatten(1))  # [B, M * m, D]
            health = {"target_std": features.flatten(0, 1).std(dim=0).mean(), "ema_gap": self._gap()}
        prediction = self.predict(images, context, places).float()
        return {"loss": F.mse_loss(prediction.flatten(1, 2), wanted), **health}

    def predict(self, images: Tensor, context: Tensor, places: Tensor) -> Tensor:
        """The predicted features of blocks.

        Args:
            images: [B, C, H, W].
            context: [B, n] patches that the encoder sees.
            places: [B, M, m] patches of each block.

        Returns:
            [B, M, m, D].
        """
        seen = self.model.forward_features(hide(images, context, self.patch_size), keep=context)
        positions = self.position(seen.grid)
        # The blocks of an image are asked for one by one: no mask token hears of those of other blocks.
        by_block = [self.predictor(seen, context, block, positions) for block in places.unbind(1)]
        return torch.stack(by_block, dim=1)

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the target encoder towards the context encoder; counters (batch normalisation) are copied."""
        done = self._step / self._total_steps if self._total_steps else 0.0
        momentum = self.momentum + (1.0 - self.momentum) * done
        own, followed = _parameters(self.target), _parameters(self.model)
        torch._foreach_lerp_(own, followed, 1.0 - momentum)
        for mine, other in zip(self.target.buffers(), self.model.buffers(), strict=True):
            mine.copy_(other)

    def trained(self) -> Encoder:
        """The target encoder, which the paper evaluates."""
        return self.target

    def _gap(self) -> Tensor:
        own, followed = _parameters(self.target), _parameters(self.model)
        apart = nn.utils.get_total_norm(torch._foreach_sub(own, followed))
        return apart / nn.utils.get_total_norm(followed)


def _parameters(model: Encoder) -> list[Tensor]:
    return [parameter.detach() for parameter in model.parameters()]
