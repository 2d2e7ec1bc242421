"""Early exit: an image leaves a trained plain ViT after the first block whose classifier is sure enough.

    B images, D width, K classes

Papers: Teerapittayanon et al. 2016, "BranchyNet" (exits by confidence); Schwartz et al. 2020, "The Right Tool
for the Job" (the largest probability as confidence). What differs: the backbone stays as it is, and the
classifiers of the exits are fitted on its frozen features, by logistic regression; so the last answer is the
model's own, and only images that leave early can change theirs.

Images that have left are taken out of the batch: the time saved is real at every batch size.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from vitrail.adaptive.plain import plain_vit
from vitrail.datasets import Images, Preprocessing
from vitrail.evaluation.inference import predict_logits
from vitrail.models import Encoder
from vitrail.models.encoder import Features
from vitrail.models.vit import ViT

_MOST_IMAGES = 10_000
_STRENGTH, _ITERATIONS = 0.1, 200  # scikit-learn's C, and steps of its solver


class EarlyExit(nn.Module):
    """A trained ViT with exits: images [B, C, H, W] -> logits [B, K]. It shares the model's weights."""

    def __init__(self, model: Encoder, exits: Mapping[int, nn.Linear], threshold: float) -> None:
        """Put exits after some blocks.

        Args:
            model: Plain ViT with a classifier.
            exits: Number of a block, from 0 -> classifier of the features after it, D -> K.
            threshold: An image leaves where its largest probability is at least this; above 1: none does.

        Raises:
            ValueError: A model without such blocks, or a block that does not exist or is the last.
        """
        super().__init__()
        self.model = plain_vit(model).eval()
        depth = len(self.model.blocks)
        if wrong := [block for block in exits if not 0 <= block < depth - 1]:
            raise ValueError(f"exits: expected blocks 0 to {depth - 2}, got {wrong[0]}")
        self.exits = nn.ModuleDict({str(block): head for block, head in sorted(exits.items())})
        self.threshold = threshold

    def at(self, threshold: float) -> EarlyExit:
        """The same exits with another threshold."""
        changed = copy.copy(self)
        changed.threshold = threshold
        return changed

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, K]."""
        return self.answer(images)[0]

    def answer(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, K], and after which block each image left [B]."""
        model, last = self.model, len(self.model.blocks) - 1
        tokens, grid = model.patch(images)
        tokens = model.place(tokens, grid)
        logits = tokens.new_empty(len(tokens), model.config.num_classes)
        left_after = torch.full((len(tokens),), last, device=tokens.device)
        here = torch.arange(len(tokens), device=tokens.device)
        for number, block in enumerate(model.blocks):
            # All that the classifier reads of the last block is the prefix, where it reads that.
            asking = model.config.num_prefix if number == last and model.config.pool == "cls" else None
            tokens = block(tokens, grid, queries=asking)
            if str(number) not in self.exits:
                continue
            answers = self.exits[str(number)](pooled_after(model, tokens, grid))
            sure = answers.softmax(dim=1).amax(dim=1) >= self.threshold
            logits[here[sure]], left_after[here[sure]] = answers[sure], number
            here, tokens = here[~sure], tokens[~sure]
            if not len(here):
                return logits, left_after
        logits[here] = model.forward_head(_features(model, tokens, grid))
        return logits, left_after


def pooled_after(vit: ViT, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """What the model's head would receive if the blocks ended here: [B, L, D] -> [B, D]."""
    pooled: Tensor = vit.fc_norm(vit.pool(_features(vit, tokens, grid)))
    return pooled


def _features(vit: ViT, tokens: Tensor, grid: tuple[int, int]) -> Features:
    tokens, num_prefix = vit.norm(tokens), vit.config.num_prefix
    return Features(patches=tokens[:, num_prefix:], prefix=tokens[:, :num_prefix], grid=grid)


class _EveryDepth(nn.Module):
    """Pooled features after all blocks but the last, side by side: images -> [B, (depth - 1) D]."""

    def __init__(self, model: ViT) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        tokens, grid = self.model.patch(images)
        tokens = self.model.place(tokens, grid)
        found = []
        for block in self.model.blocks[:-1]:
            tokens = block(tokens, grid)
            found.append(pooled_after(self.model, tokens, grid))
        return torch.cat(found, dim=1)


def fit_early_exit(
    model: Encoder,
    images: Images,
    preprocessing: Preprocessing,
    *,
    threshold: float = 0.9,
    batch_size: int = 500,
) -> EarlyExit:
    """Fit an exit after every block but the last, on frozen features.

    Args:
        model: Trained plain ViT with a classifier.
        images: Labelled images; those that the model was not trained on give better calibrated exits. At most
            10,000 of them are used.
        preprocessing: How images become the model's input.
        threshold: See `EarlyExit`.
        batch_size: Images at a time.

    Raises:
        ValueError: A model without such blocks, of one block, or images that lack a class of the model's.
    """
    vit = plain_vit(model)
    depth, width, classes = len(vit.blocks), vit.num_features, vit.config.num_classes
    if depth < 2:
        raise ValueError("early exit needs two blocks or more, got a model of one")
    some = images.subset(np.random.default_rng(0).permutation(len(images))[:_MOST_IMAGES])
    if len(missing := sorted(set(range(classes)) - set(some.labels.tolist()))):
        raise ValueError(
            f"{images.name}: expected images of all {classes} classes, got none of class {missing[0]}"
        )
    found = predict_logits(
        _EveryDepth(vit).eval(), some, preprocessing, batch_size=batch_size, device=torch.device("cpu")
    )
    features = found.unflatten(1, (depth - 1, width)).numpy()
    exits = {}
    for block in range(depth - 1):
        scaler = StandardScaler().fit(features[:, block])
        fitted = LogisticRegression(C=_STRENGTH, max_iter=_ITERATIONS, tol=1e-3).fit(
            scaler.transform(features[:, block]), some.labels
        )
        # One linear layer for both: w (x - mean) / scale + b.
        weight = torch.from_numpy(fitted.coef_ / scaler.scale_)
        bias = torch.from_numpy(fitted.intercept_) - weight @ torch.from_numpy(scaler.mean_)
        if classes == 2:  # scikit-learn keeps the second class's logit alone
            weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
        head = nn.Linear(width, classes)
        with torch.no_grad():
            head.weight.copy_(weight)
            head.bias.copy_(bias)
        exits[block] = head
    return EarlyExit(vit, exits, threshold).eval()
