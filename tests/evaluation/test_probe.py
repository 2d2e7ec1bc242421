"""Probes of frozen features: what they find on digits, and that the encoder stays as it is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from vitrail.datasets import Preprocessing, Splits, load_dataset
from vitrail.evaluation.inference import predict_logits
from vitrail.evaluation.probe import STRENGTHS, probe, without_head
from vitrail.models import Encoder, build_model


@pytest.fixture(scope="module")
def digits() -> Splits:
    return load_dataset("digits")


@pytest.fixture(scope="module")
def preprocessing(digits: Splits) -> Preprocessing:
    train = digits.train
    return Preprocessing(img_size=(8, 8), in_chans=1, mean=train.mean, std=train.std)


def model(name: str = "vit_digits", **changes: object) -> Encoder:
    torch.manual_seed(0)
    return build_model(name, **changes)


def test_against_scikit_learn_by_hand(digits: Splits, preprocessing: Preprocessing) -> None:
    encoder = model()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    found = probe(encoder, preprocessing, digits)
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    bare = without_head(encoder)

    def features(images: object) -> np.ndarray:
        return predict_logits(
            bare,
            images,
            preprocessing,
            batch_size=100,
            device=torch.device("cpu"),  # type: ignore[arg-type]
        ).numpy()

    scaler = StandardScaler().fit(features(digits.train))
    assert digits.val is not None
    scores = {}
    for strength in STRENGTHS:
        own = LogisticRegression(C=strength, max_iter=200, tol=1e-3)
        own.fit(scaler.transform(features(digits.train)), digits.train.labels)
        on_val = own.score(scaler.transform(features(digits.val)), digits.val.labels)
        scores[strength] = on_val, own.score(scaler.transform(features(digits.test)), digits.test.labels)
    best = max(scores, key=lambda strength: scores[strength][0])
    assert found.strength == best
    assert found.linear.accuracy == pytest.approx(scores[best][1])
    assert found.train_images == len(digits.train)
    assert found.test_images == len(digits.test) == 359
    assert found.dimensions == 64
    # Random features of a convolutional stem and attention still tell digits apart.
    assert found.linear.accuracy > 0.85
    assert found.knn.accuracy > 0.6
    low, high = found.linear.interval
    assert low < found.linear.accuracy < high


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("swin_cifar", {"img_size": 8, "patch_size": 1, "in_chans": 1}),
        ("crossvit_cifar", {"img_size": 32, "in_chans": 1}),
        ("deit_cifar", {"img_size": 8, "patch_size": 2, "in_chans": 1}),
        ("cait_cifar", {"img_size": 8, "patch_size": 2, "in_chans": 1}),
        ("vit_digits", {"num_classes": 0}),
    ],
)
def test_every_kind_of_model(
    name: str, changes: dict[str, object], digits: Splits, preprocessing: Preprocessing
) -> None:
    encoder = model(name, **changes)
    few = replace(
        digits,
        train=digits.train.subset(np.arange(200)),
        val=None,
        test=digits.test.subset(np.arange(50)),
    )
    sized = replace(preprocessing, img_size=encoder.config.image_shape)
    found = probe(encoder, sized, few)
    assert found.linear.accuracy > 0.3


def test_what_cannot_be_probed(digits: Splits, preprocessing: Preprocessing) -> None:
    none = replace(digits, test=digits.test.subset([]))
    with pytest.raises(ValueError, match="no test images to judge by"):
        probe(model(), preprocessing, none)
    zeros = replace(digits, train=digits.train.subset(np.flatnonzero(digits.train.labels == 0)))
    with pytest.raises(ValueError, match="two classes or more"):
        probe(model(), preprocessing, zeros)
