"""Which answer of a model is explained: the score of one class for each image.

All methods that explain an answer share one signature, `method(model, images, target=None, ...)`: `images`
[B, C, H, W] are normalised, as for the model itself. They explain the logit, not the probability: a
probability also rises where the evidence for other classes falls, and where it is close to one its gradient
is close to zero (Simonyan et al. 2014, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vitrail.models.encoder import Encoder

Target = int | Tensor | None
"""One class for all images, one class for each image [B], or None: the class that the model predicts."""


def class_scores(model: Encoder, images: Tensor, target: Target = None) -> tuple[Tensor, Tensor]:
    """The logit of the class that is explained, for each image.

    Args:
        model: A model with a head; it answers in the mode in which it is.
        images: [B, C, H, W], normalised.
        target: See `Target`.

    Returns:
        The logits [B], with their gradient history, and the classes [B].

    Raises:
        ValueError: The model has no head, or the class does not exist.
    """
    return scores_of(model, model(images), target)


def scores_of(model: Encoder, logits: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """`class_scores` from logits [B, K] that the model gave."""
    if not model.has_head:
        raise ValueError(
            f"{type(model).__name__} has no head, so there is no class to explain; "
            "build it with num_classes, or call reset_classifier and train the head"
        )
    B, K = logits.shape
    if target is None:
        classes = logits.detach().argmax(dim=1)
    else:
        classes = torch.as_tensor(target)  # a number is looked at where it is, and no device waited for
        if classes.is_floating_point() or classes.dtype == torch.bool or classes.shape not in ((), (B,)):
            raise ValueError(
                f"target: expected one class, or one for each of {B} images, got {classes.dtype} of shape "
                f"{list(classes.shape)}"
            )
        for number in classes.flatten().tolist():
            if not 0 <= number < K:
                raise ValueError(f"no class {number}: the model has {K}, expected 0 to {K - 1}")
        classes = classes.long().to(logits.device).expand(B)
    return logits.gather(1, classes[:, None])[:, 0], classes


def baseline_of(images: Tensor, baseline: Tensor | float) -> Tensor:
    """What stands where nothing shall be seen, as images [B, C, H, W].

    Args:
        images: [B, C, H, W].
        baseline: A number, a colour [C, 1, 1], or images. Normalised images have 0 for the mean colour.

    Raises:
        ValueError: It does not fit the images.
    """
    values = torch.as_tensor(baseline).to(images)
    try:
        return values.expand_as(images)
    except RuntimeError:
        raise ValueError(
            f"baseline: expected a number, a colour [{images.shape[1]}, 1, 1] or images "
            f"{list(images.shape)}, got {list(values.shape)}"
        ) from None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the while; afterwards every part is in the mode in which it was."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
