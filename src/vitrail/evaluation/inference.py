"""Running a model over a whole image set."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitrail.datasets import Images, Preprocessing, batches
from vitrail.processes import gather_rows, own_rows, world


@torch.no_grad()  # not inference_mode: the buffers of a sharded model could not be written to afterwards
def predict_logits(
    model: nn.Module, images: Images, preprocessing: Preprocessing, *, batch_size: int, device: torch.device
) -> Tensor:
    """Logits of every image in the order of the set.

    Args:
        model: Gives logits [B, K]; it is put into evaluation mode for the while and back afterwards.
        images: Any set whose images the preprocessing fits.
        preprocessing: Resizes and normalises the batches.
        batch_size: Images at a time.
        device: Where to run.

    Returns:
        float32 [N, K] on the CPU. Several processes share the work, and each gets the whole result.
    """
    was_training = model.training
    model.eval()
    own = images.subset(own_rows(len(images))) if world() > 1 else images
    logits = torch.cat(
        [
            model(preprocessing.prepare(batch.to(device))).float()
            for batch, _ in batches(own, batch_size, seed=0, epoch=0, shuffle=False, drop_last=False)
        ]
    )
    model.train(was_training)
    return gather_rows(logits)[: len(images)].cpu()
