"""The page of `vitrail analyze`: right numbers against what the models' own parts give, whole, and honest."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from tests.explain.test_attention import lively

from vitrail.cli import main
from vitrail.datasets import ImageSet, Preprocessing
from vitrail.explain import draw
from vitrail.explain.embedding import embed_features
from vitrail.explain.features import layer_vectors
from vitrail.explain.heads import head_importance, head_statistics
from vitrail.explain.positions import Positions, read_positions
from vitrail.explain.similarity import layer_similarity
from vitrail.models import Encoder, build_model
from vitrail.pretrained import save_model
from vitrail.reporting.analysis import Analysis, Subject, analyse, compare, near_and_far
from vitrail.reporting.analysis_figures import spread_names
from vitrail.reporting.analysis_page import write_analysis

NAMES = tuple(f"digit {number}" for number in range(10))
PICTURES = {"cka", "colours", "depth", "distances", "heads", "images", "nearest", "pca", "tsne"}


@pytest.fixture(autouse=True)
def _coarse_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw, "DPI", 60)


def digits(count: int = 120, **changes: Any) -> ImageSet:
    data = load_digits()
    pixels = (data.images[:count, None] * 15.9).astype(np.uint8)
    return ImageSet.from_arrays(
        pixels, data.target[:count], **({"classes": NAMES, "name": "digits", "split": "test"} | changes)
    )


def subject(model: Encoder | None = None, images: ImageSet | None = None) -> Subject:
    model = model or lively("vit_digits", {"depth": 3})
    C = model.config.in_chans
    return Subject(
        title="my model",
        model=model,
        preprocessing=Preprocessing(
            img_size=model.config.image_shape, in_chans=C, mean=(0.5,) * C, std=(0.25,) * C
        ),
        classes=NAMES,
        images=digits() if images is None else images,
    )


@pytest.fixture(scope="module")
def found() -> Analysis:
    return analyse(subject(), images=100, seed=3)


def inputs_of(own: Subject, found: Analysis) -> tuple[torch.Tensor, torch.Tensor]:
    pixels, labels = own.images.batch(found.numbers)
    return own.preprocessing.prepare(pixels), labels


def test_which_images(found: Analysis) -> None:
    assert len(set(found.numbers.tolist())) == len(found.numbers) == 100
    assert found.numbers.tolist() != sorted(found.numbers.tolist())
    assert np.array_equal(found.labels, digits().labels[found.numbers])
    assert found.chance == np.bincount(found.labels).max() / 100
    again, other = (analyse(subject(), images=100, seed=seed) for seed in (3, 4))
    assert again.to_dict() == found.to_dict()
    assert set(other.numbers.tolist()) != set(found.numbers.tolist())


def test_numbers_are_those_of_the_model(found: Analysis) -> None:
    own = subject()
    inputs, labels = inputs_of(own, found)
    with torch.no_grad():
        answers = own.model(inputs).argmax(dim=1)
    assert found.answers is not None
    assert found.answers.tolist() == answers.tolist()
    assert found.accuracy == pytest.approx(float((answers == labels).float().mean()))
    assert found.layers[-1].lens == found.accuracy
    vectors = layer_vectors(own.model, inputs)
    last = embed_features(vectors[-1].token, labels, method="tsne", seed=3)
    assert found.tsne.knn_accuracy == last.knn_accuracy == found.layers[-1].token
    assert found.tsne.silhouette == pytest.approx(last.silhouette, abs=1e-6)
    for layer, vector in zip(found.layers, vectors, strict=True):
        assert layer.patches == embed_features(vector.patches, labels).knn_accuracy
    assert (
        found.pixel_knn == embed_features(own.images.batch(found.numbers)[0].flatten(1), labels).knn_accuracy
    )
    assert torch.equal(found.pixels, own.preprocessing.denormalise(inputs))
    torch.testing.assert_close(found.cka, layer_similarity(own.model, inputs.split(64)).values)


def test_heads_are_those_of_the_model(found: Analysis) -> None:
    own = subject()
    inputs, labels = inputs_of(own, found)
    statistics = head_statistics(own.model, [inputs])
    lost = head_importance(own.model, [(inputs, labels)])
    assert found.head_images == found.switched_images == 100
    assert len(found.heads) == sum(len(layer.distance) for layer in statistics)
    for head in found.heads:
        expected = statistics[head.layer]
        assert head.module == expected.layer
        for name in ("distance", "entropy", "position", "prefix"):
            assert getattr(head, name) == pytest.approx(float(getattr(expected, name)[head.number]), abs=1e-5)
        both = [head.lost_accuracy, head.lost_log_probability]
        assert both == pytest.approx(lost[head.module][head.number].tolist(), abs=1e-5)
        assert f"layer {head.layer + 1}, head {head.number + 1}" == head.name


def test_a_model_that_is_right_about_everything() -> None:
    plain = subject()
    pixels, _ = plain.images.batch(range(120))
    with torch.no_grad():
        answers = plain.model(plain.preprocessing.prepare(pixels)).argmax(dim=1)
    images = ImageSet.from_arrays(pixels.numpy(), answers.numpy(), classes=NAMES, name="own", split="test")
    found = analyse(replace(plain, images=images), images=120, seed=0)
    assert found.accuracy == 1.0
    assert all(own.recall == 1.0 for own in found.found_classes)
    assert all(own.lost_accuracy >= 0.0 for own in found.heads if own.lost_accuracy is not None)
    assert "answers 100.0 % of these 120 images rightly" in found.text()


def test_classes_and_their_nearest(found: Analysis) -> None:
    own = subject()
    inputs, labels = inputs_of(own, found)
    features = layer_vectors(own.model, inputs)[-1].read.double()
    means = {int(one): features[labels == one].mean(dim=0) for one in labels.unique()}
    assert [row.name for row in found.found_classes] == [NAMES[one] for one in sorted(means)]
    for row in found.found_classes:
        number = NAMES.index(row.name)
        apart = {
            other: float((means[number] - mean).norm()) for other, mean in means.items() if other != number
        }
        nearest = min(apart, key=lambda other: apart[other])
        assert (row.closest, row.count) == (NAMES[nearest], int((labels == number).sum()))
        assert row.apart == pytest.approx(apart[nearest], rel=1e-4)
        assert found.answers is not None
        assert row.recall == pytest.approx((found.answers[labels == number] == number).mean())


def test_nearest_patches_come_from_different_other_images(found: Analysis) -> None:
    own = subject()
    inputs, _ = inputs_of(own, found)
    layer = found.nearest_layer
    assert layer == 1  # the head reads the class token: patches of the last of three layers count for nothing
    with torch.no_grad():
        seen = own.model.forward_features(inputs, layers=(layer,)).layers[layer].map()
    directions = torch.nn.functional.normalize(seen, dim=1)
    assert len({found.labels[query.image] for query in found.queries}) == 5
    for query in found.queries:
        assert len({match.image for match in query.matches} | {query.image}) == 7
        asked = directions[query.image, :, query.row, query.column]
        best = torch.einsum("bdrc,d->brc", directions, asked).flatten(1).amax(dim=1)
        best[query.image] = -2.0
        values, order = best.sort(descending=True)
        assert [match.image for match in query.matches] == order[:6].tolist()
        assert [match.similarity for match in query.matches] == pytest.approx(values[:6].tolist(), abs=1e-5)
    patches = inputs[found.queries[0].image, 0].unfold(0, 2, 2).unfold(1, 2, 2)
    spread = patches.var(dim=(2, 3), correction=0)
    query = found.queries[0]
    assert spread[query.row, query.column] == spread.max()


def test_near_and_far_by_loops() -> None:
    positions = read_positions(lively("vit_digits", {}), (3, 5))
    beside, far = [], []
    for a in range(3):
        for b in range(5):
            for c in range(3):
                for d in range(5):
                    value = float(positions.similarity[a, b, c, d])
                    if abs(a - c) + abs(b - d) == 1:
                        beside.append(value)
                    if (a - c) ** 2 + (b - d) ** 2 >= 2.5**2:
                        far.append(value)
    assert near_and_far(positions) == pytest.approx((np.mean(beside), np.mean(far)), abs=1e-6)
    single = Positions(kind="added", products=torch.ones(1, 1, 1, 1))
    assert all(map(math.isnan, near_and_far(single)))


def test_many_classes_are_thinned_out() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (600, 1, 8, 8), dtype=np.uint8)
    images = ImageSet.from_arrays(pixels, np.arange(600) % 60, name="many", split="test")
    found = analyse(subject(images=images), images=60, seed=0)
    assert len(np.unique(found.labels)) == 6
    assert found.drawn() == "60 test images, of 6 of the 60 classes, drawn with seed 0"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("cait_cifar", {"depth": 2}),
        ("pvt_cifar", {}),
        ("swin_mnist_2blk", {}),
        ("cct_2_3x2_32", {"position": "none"}),
    ],
)
def test_a_whole_page_of_every_architecture(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = lively(name, changes)
    C = model.config.in_chans
    images = digits(24, classes=("<b>zero</b>", "$1$", *NAMES[2:]))
    pixels = np.repeat(images.images, C, axis=1)
    images = ImageSet.from_arrays(pixels, images.labels, classes=images.classes, name="<i>set", split="test")
    own = replace(subject(model, images), classes=images.classes, title="a <model>")
    written = write_analysis(str(tmp_path / "out"), own, images=24, seed=1)
    page = written.page.read_text()
    assert written.page.stat().st_size < 5_000_000
    assert not re.findall(r"""(?:src|href)=["'](?!data:)|<script|<b>|<i>|<model>""", page)
    assert "&lt;b&gt;zero" in page
    told = {"positions", "places"} if "position" not in changes else set()
    pictures = PICTURES | told
    assert {own.name for own in (tmp_path / "out").iterdir()} == {
        "analysis.html",
        "analysis.json",
        *(f"{picture}.png" for picture in pictures),
    }
    assert page.count("data:image/png;base64,") == len(pictures)
    numbers = json.loads((tmp_path / "out" / "analysis.json").read_text(), parse_constant=pytest.fail)
    assert numbers == written.found.to_dict()
    assert len(numbers["layers"]) == len(model.block_names())
    steps = model.flow(model.config.image_shape).attentions
    assert len(numbers["heads"]) == sum(model.get_submodule(step.name).num_heads for step in steps)  # type: ignore[misc]
    for row in numbers["heads"]:
        step = next(step for step in steps if step.name == row["module"])
        assert (row["distance"] is None) == step.class_only or step.asked is not None
    for sentence in written.found.findings().values():
        assert "nan" not in sentence.split()
        assert sentence.endswith(".")


@pytest.mark.parametrize("kind", ["other classes", "no names", "no head"])
def test_without_answers(kind: str) -> None:
    own = subject()
    if kind == "no head":
        own = replace(subject(build_model("vit_digits", num_classes=0).eval()), classes=())
        reason = "the model has no head for classes"
    elif kind == "no names":
        own, reason = (
            replace(own, classes=()),
            "the model's classes, which have no names, are not the 10 of digits",
        )
    else:
        own, reason = replace(own, classes=("a", "b")), "the model's 2 classes are not the 10 of digits"
    found = analyse(own, images=40, seed=0)
    numbers = found.to_dict()
    assert numbers["accuracy"] is numbers["answers"] is None
    assert numbers["no_answers"] == reason
    assert numbers["switched_off_images"] == 0
    assert all(row["lost_accuracy"] is row["lost_log_probability"] is None for row in numbers["heads"])
    assert all(row["own_head"] is None for row in numbers["layers"])
    assert f"The model's accuracy is left out: {reason}." in found.text()
    assert 0 <= numbers["features"]["knn_accuracy"] <= 1


def test_the_page_says_that_accuracy_is_left_out(tmp_path: Path) -> None:
    own = replace(subject(), classes=("a", "b"))
    page = write_analysis(tmp_path, own, images=40, seed=0).page.read_text()
    assert "the model&#39;s 2 classes are not the 10 of digits" in page
    assert "of 4 of the 10 classes" in page
    assert "most and the least needed" not in page


def test_two_models_beside_each_other(tmp_path: Path) -> None:
    first = subject()
    same = compare(first, replace(subject(), title="the same"), images=40, seed=0)
    torch.testing.assert_close(same.cka.diagonal(), torch.ones(3, dtype=torch.double))
    assert same.agreement == 1.0
    model = lively("vit_mnist_2blk", {})
    second = replace(subject(model), title="<other>")
    written = write_analysis(tmp_path, first, second, images=40, seed=0)
    assert written.comparison is not None
    assert written.comparison.cka.shape == (3, 2)
    one, two = written.comparison.first, written.comparison.second
    assert one.to_dict() == same.first.to_dict()
    assert np.array_equal(one.numbers, two.numbers)
    numbers = json.loads((tmp_path / "analysis.json").read_text())
    assert numbers["against"]["accuracy"] == two.accuracy
    assert numbers["against"]["cka_across"] == written.comparison.cka.tolist()
    assert one.answers is not None
    assert two.answers is not None
    assert numbers["against"]["agreement"] == float((one.answers == two.answers).mean())
    assert {"against_cka.png", "against_depth.png"} <= {own.name for own in tmp_path.iterdir()}
    page = written.page.read_text()
    assert "&lt;other&gt;" in page
    assert "<other>" not in page
    other = replace(second, images=digits(50))
    with pytest.raises(ValueError, match="compared on the same images, got 120 and 50"):
        compare(first, other, images=40, seed=0)


def test_names_on_the_map_do_not_lie_on_each_other() -> None:
    middles = np.random.default_rng(0).normal(size=(12, 2)).astype(np.float32) * 0.05
    size = np.array([1.0, 1.0], dtype=np.float32)
    places = spread_names(middles, size)
    assert np.array_equal(places[:, 0], middles[:, 0].astype(np.float64))
    for first in range(12):
        for second in range(first):
            across, up = np.abs(places[first] - places[second])
            assert across >= 0.16 or up >= 0.042 - 1e-9


def test_nothing_is_written_where_something_is_wrong(tmp_path: Path) -> None:
    single = digits(classes=NAMES)
    one_class = single.subset(np.flatnonzero(single.labels == 3).tolist() * 8)
    bad = subject(lively("vit_digits", {}))
    with torch.no_grad():
        next(bad.model.parameters()).fill_(math.nan)
    for own, options, message in (
        (subject(images=one_class), {}, "images of at least two classes"),
        (subject(images=digits(19)), {}, "digits has 19 test images: an analysis needs at least 20"),
        (subject(), {"images": 19}, "images: expected at least 20, got 19"),
        (subject(), {"seed": -1}, "seed: expected 0 or more, got -1"),
        (bad, {}, "the features are not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            write_analysis(tmp_path / "out", own, **options)
    assert not (tmp_path / "out").exists()


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    own = subject()
    for name in ("first", "second"):
        save_model(
            Path(name),
            own.model,
            name="vit_digits",
            classes=tuple("0123456789"),
            preprocessing=own.preprocessing.to_dict(),
        )
    main(["analyze", "first", "digits", "--images", "100", "--against", "second", "--seed", "2"])
    printed = capsys.readouterr().out
    assert "first on digits: 100 test images, drawn with seed 2" in printed
    assert "They give the same answer to 100.0 % of the images." in printed
    assert printed.endswith("page analysis/first-digits/analysis.html\n")
    assert json.loads(Path("analysis/first-digits/analysis.json").read_text())["seed"] == 2
    for wrong, message in (
        ("nothing digits", "no run or model folder|nothing"),
        ("first digit", "no folder and no data set 'digit'"),
        ("first digits --images 5", "images: expected at least 20, got 5"),
        ("first digits --images many", "argument --images: invalid int value: 'many'"),
        ("first digits --seed -1", "seed: expected 0 or more, got -1"),
        ("first digits --against third", "third"),
        ("first", "the following arguments are required: DATASET"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["analyze", *wrong.split(), *(["--output", "wrong"] if " " in wrong else [])])
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert re.search(message, said)
        assert said.count("\n") == 1
    assert not Path("wrong").exists()
