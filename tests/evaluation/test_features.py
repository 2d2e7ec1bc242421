"""Features of a frozen backbone: equal to what the head receives, kept under a key that all of it decides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from vitrail.datasets import ImageSet, Preprocessing, batches, load_dataset
from vitrail.evaluation.features import FeatureSet, backbone_features, cached_features, has_one_head
from vitrail.models import Encoder
from vitrail.pretrained import create_model

CPU = torch.device("cpu")
PREPROCESSING = Preprocessing(img_size=(8, 8), in_chans=1, mean=(0.3,), std=(0.4,))


def model(**changes: object) -> Encoder:
    torch.manual_seed(0)
    return create_model("vit_digits", **({"embed_dim": 16, "depth": 2, "num_heads": 2} | changes))


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return load_dataset("digits").test.subset(range(100))


@contextmanager
def passes(encoder: Encoder) -> Iterator[list[int]]:
    """Sizes of the batches that pass the backbone."""
    seen: list[int] = []
    handle = encoder.get_submodule("blocks.0").register_forward_hook(lambda *args: seen.append(len(args[2])))
    try:
        yield seen
    finally:
        handle.remove()


def keep(encoder: Encoder, images: ImageSet, folder: Path | None, preprocessing: Preprocessing) -> FeatureSet:
    return cached_features(encoder, images, preprocessing, batch_size=32, device=CPU, folder=folder)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head": "mlp"},
        {"class_token": False, "pool": "seqpool"},
        {"class_token": False, "pool": "mean", "fc_norm": True},
        {"drop": 0.5, "drop_path": 0.5},
    ],
)
def test_the_head_of_the_features_is_the_model(changes: dict, images: ImageSet) -> None:
    encoder = model(**changes).train()
    head = encoder.head
    features = backbone_features(encoder, images, PREPROCESSING, batch_size=32, device=CPU)
    assert encoder.head is head
    assert encoder.training
    assert features.shape == (100, 16)
    with torch.no_grad():
        expected = encoder.eval()(PREPROCESSING.prepare(images.batch(range(100))[0]))
        torch.testing.assert_close(head(features), expected)


def test_the_head_comes_back_after_an_error(images: ImageSet) -> None:
    encoder = model()
    wrong = Preprocessing(img_size=(8, 8), in_chans=3, mean=(0.3,) * 3, std=(0.4,) * 3)
    with pytest.raises(ValueError, match="3 channels"):
        backbone_features(encoder, images, wrong, batch_size=32, device=CPU)
    assert isinstance(encoder.head, torch.nn.Linear)


def test_batches_of_features_come_in_the_order_of_the_images(images: ImageSet) -> None:
    kept = FeatureSet(features=torch.arange(100.0)[:, None], labels=images.labels)
    assert len(kept) == 100
    order = np.random.default_rng([3, 5]).permutation(100)
    for (features, labels), (_, expected), rows in zip(
        batches(kept, 32, seed=3, epoch=5),
        batches(images, 32, seed=3, epoch=5),
        order[:96].reshape(3, 32),
        strict=True,
    ):
        assert features[:, 0].tolist() == rows.tolist()
        assert torch.equal(labels, expected)


def test_what_is_kept_is_not_computed_again(images: ImageSet, tmp_path: Path) -> None:
    encoder = model()
    with passes(encoder) as seen:
        first = keep(encoder, images, tmp_path / "cache", PREPROCESSING)
        assert seen == [32, 32, 32, 4]
        second = keep(encoder, images, tmp_path / "cache", PREPROCESSING)
        encoder.reset_classifier(3)
        third = keep(encoder, images, tmp_path / "cache", PREPROCESSING)
        assert len(seen) == 4
        keep(encoder, images, None, PREPROCESSING)
        assert len(seen) == 8
    assert torch.equal(first.features, second.features)
    assert torch.equal(first.features, third.features)
    assert np.array_equal(second.labels, images.labels)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_whatever_decides_the_features_decides_the_file(images: ImageSet, tmp_path: Path) -> None:
    def files() -> int:
        return len(list(tmp_path.iterdir()))

    encoder = model()
    keep(encoder, images, tmp_path, PREPROCESSING)
    assert files() == 1
    keep(encoder, images.subset(range(99)), tmp_path, PREPROCESSING)
    assert files() == 2
    keep(encoder, images, tmp_path, Preprocessing(img_size=(8, 8), in_chans=1, mean=(0.3,), std=(0.5,)))
    assert files() == 3
    with torch.no_grad():
        encoder.blocks[1].norm1.weight[0] += 1e-6
    keep(encoder, images, tmp_path, PREPROCESSING)
    assert files() == 4
    # Equal weights, other computation.
    other = model(num_heads=4)
    other.load_state_dict(encoder.state_dict())
    keep(other, images, tmp_path, PREPROCESSING)
    assert files() == 5


def test_a_damaged_file_is_named(images: ImageSet, tmp_path: Path) -> None:
    encoder = model()
    keep(encoder, images, tmp_path, PREPROCESSING)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=rf"{path.name} cannot be read .*delete it"):
        keep(encoder, images, tmp_path, PREPROCESSING)
    np.save(path, np.zeros((3, 16), np.float32))
    with pytest.raises(ValueError, match=r"expected float32 \[100, 16\], got float32 \[3, 16\]; delete it"):
        keep(encoder, images, tmp_path, PREPROCESSING)
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="cannot be read"):
        keep(encoder, images, tmp_path, PREPROCESSING)


def test_two_heads_have_no_one_vector(images: ImageSet) -> None:
    assert has_one_head(model())
    encoder = create_model("deit_tiny_distilled_patch16_224", img_size=8, in_chans=1, depth=1, patch_size=4)
    assert not has_one_head(encoder)
    with pytest.raises(ValueError, match="several heads"):
        backbone_features(encoder, images, PREPROCESSING, batch_size=32, device=CPU)
    assert not has_one_head(create_model("crossvit_cifar"))
