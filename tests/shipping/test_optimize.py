"""`vitrail optimize`: the compiled model gives the model's answers, and nothing else's."""

import json
import shutil

import pytest
import torch
from torch.nn import functional as F

from vitrail import cli
from vitrail.datasets import Preprocessing, load_dataset
from vitrail.models import build_model
from vitrail.pretrained import load_model, save_model
from vitrail.pretrained.compiled import CompiledModel, load_compiled
from vitrail.serving import Predictor
from vitrail.shipping.int8 import quantise
from vitrail.shipping.optimize import Candidate, Optimized, choose, optimize

pytestmark = pytest.mark.usefixtures("own_cache")

TINY = {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 32, "depth": 1, "num_heads": 2}
PREPARED = Preprocessing(img_size=(16, 16), in_chans=1, mean=(0.5,), std=(0.5,))


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits", img_size=16)


@pytest.fixture(scope="module")
def source(tmp_path_factory, digits):
    """A model that knows its digits: answers of a fresh one would be a matter of the last bits."""
    torch.manual_seed(0)
    model = build_model("vit_tiny_patch16_224", num_classes=10, **TINY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        pixels, labels = digits.train.batch(torch.randint(len(digits.train), (64,)).numpy())
        loss = F.cross_entropy(model(PREPARED.prepare(pixels)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write(folder, model)
    return folder


@pytest.fixture(scope="module", params=["float32", "int8"])
def optimized(request, tmp_path_factory, source, digits):
    if request.param == "int8":
        pytest.importorskip("torchao")
    output = tmp_path_factory.mktemp("out") / "fast"
    return optimize(load_model(source), output, precision=request.param, data=digits, batch=4)


def write(folder, model):
    classes = tuple(map(str, range(model.config.num_classes)))
    name = "vit_tiny_patch16_224"
    save_model(folder, model, name=name, classes=classes, preprocessing=PREPARED.to_dict())


def test_the_compiled_model_gives_the_models_answers(optimized, digits):
    chosen, folder = optimized.chosen, optimized.folder
    compiled, model = load_compiled(folder), load_model(folder).model
    images = PREPARED.prepare(digits.test.batch(range(300))[0])
    with torch.no_grad():
        expected, came = model(images), compiled(images)
        for B in (1, 3):
            assert torch.allclose(compiled(images[:B]), came[:B], atol=1e-4)
        assert torch.allclose(compiled(images.repeat(4, 1, 1, 1)), came.repeat(4, 1), atol=1e-4)
    difference = (came - expected).abs().max() / expected.abs().max()
    if chosen.precision == "float32":
        assert difference < 1e-5
    else:
        assert 1e-4 < difference < 0.1  # int8 leaves its mark
    assert (came.argmax(1) == expected.argmax(1)).float().mean() >= 0.98
    assert chosen.agreement >= 0.98
    assert chosen.cosine > 0.99
    assert chosen.speed_up_quartiles[0] <= chosen.speed_up <= chosen.speed_up_quartiles[1]
    assert optimized.judged_on == "256 test images of digits"


def test_predictor_and_evaluate_use_it(optimized, digits, capsys):
    predictor = Predictor.from_source(optimized.folder)
    assert isinstance(predictor.compiled, CompiledModel)
    images = PREPARED.prepare(digits.test.batch(range(2))[0])
    with torch.no_grad():
        shares = predictor.compiled(images).softmax(dim=1).max(dim=1).values
    found = predictor.classified(["a", "b"], images, top=1)
    assert [one.probabilities[0] for one in found] == shares.tolist()
    ordinary = Predictor(predictor.model, predictor.preprocessing, predictor.classes)
    assert ordinary.fingerprint != predictor.fingerprint
    cli.main(["evaluate", str(optimized.folder), "--dataset", "digits", "--json"])
    accuracy = json.loads(capsys.readouterr().out)["accuracy"]
    images = PREPARED.prepare(digits.test.batch(range(len(digits.test)))[0])
    with torch.no_grad():
        right = predictor.compiled(images).argmax(dim=1).numpy() == digits.test.labels
    assert accuracy == right.mean() > 0.8


@pytest.fixture
def copied(optimized, tmp_path):
    return shutil.copytree(optimized.folder, tmp_path / "copy")


def change(folder, **machine):
    record = json.loads((folder / "optimized.json").read_text())
    record["machine"] |= machine
    (folder / "optimized.json").write_text(json.dumps(record))


def test_what_is_not_for_this_machine_or_was_changed_is_refused(copied, monkeypatch, tmp_path):
    assert load_compiled(copied) is not None
    with pytest.raises(ValueError, match=r"compiled for images \[1, 16, 16\], got \[1, 8, 8\]"):
        load_compiled(copied)(torch.zeros(1, 1, 8, 8))
    with monkeypatch.context() as patch:
        patch.setenv("VITRAIL_CACHE", str(tmp_path / "another user"))
        with pytest.raises(
            ValueError, match="made by somebody else or changed since; run `vitrail optimize`"
        ):
            load_compiled(copied)
    record = (copied / "optimized.json").read_text()
    features = json.loads(record)["machine"]["cpu_features"]
    change(copied, cpu_features=[*features, "avx4096"])
    with pytest.raises(ValueError, match="compiled for a CPU that has avx4096; run `vitrail optimize` again"):
        Predictor.from_source(copied)
    change(copied, cpu_features=features[1:])
    with pytest.raises(ValueError, match="changed since"):
        load_compiled(copied)
    change(copied, torch="1.0")
    with pytest.raises(ValueError, match=r"compiled by torch 1\.0, and this is"):
        load_compiled(copied)
    (copied / "optimized.json").write_text("{")
    with pytest.raises(ValueError, match=r"optimized\.json is damaged"):
        load_compiled(copied)
    (copied / "optimized.json").write_text(record)
    for name in ("model.safetensors", "optimized.pt2"):
        content = (copied / name).read_bytes()
        (copied / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(ValueError, match="changed since"):
            load_compiled(copied)
        (copied / name).write_bytes(content)
    assert load_compiled(copied) is not None
    (copied / "optimized.json").unlink()
    assert load_compiled(copied) is None


def candidate(precision, speed_up, agreement):
    return Candidate(
        precision=precision,
        speed_up=speed_up,
        speed_up_quartiles=(speed_up, speed_up),
        seconds=1.0,
        agreement=agreement,
        cosine=1.0,
        compile_s=1.0,
    )


def test_the_fastest_that_agrees_is_chosen():
    float32, bf16, int8 = (
        candidate("float32", 1.5, 1.0),
        candidate("bf16", 2.0, 0.99),
        candidate("int8", 3.0, 0.979),
    )
    best, notes = choose("auto", [float32, bf16, int8], agreement=None, judged_on="images")
    assert best == bf16
    assert notes == ["int8 keeps the most probable class of 97.9 % of images, expected 98 %: not taken"]
    assert choose("auto", [float32, bf16, int8], agreement=0.9, judged_on="images") == (int8, [])
    assert choose("auto", [float32, bf16, int8], agreement=1.0, judged_on="images")[0] == float32
    with pytest.raises(ValueError, match=r"int8 keeps .* 97\.9 % of images, expected 98 %; try another"):
        choose("int8", [int8], agreement=None, judged_on="images")


def test_eager_stays_where_nothing_is_faster():
    slow = candidate("float32", 0.9, 1.0)
    best, (note,) = choose("auto", [slow], agreement=None, judged_on="images")
    assert best is None
    assert note == "float32 is slower than eager float32 on this machine"
    assert choose("float32", [slow], agreement=None, judged_on="images") == (slow, [note])


def test_int8_of_a_convolutional_stem_is_quiet():
    pytest.importorskip("torchao")
    model = build_model("vit_cifar", embed_dim=32, num_heads=2, depth=1).eval()
    images = torch.randn(8, 3, 32, 32)
    with torch.no_grad():  # a warning would be an error here
        found, expected = quantise(model, [images])(images), model(images)
    assert F.cosine_similarity(found, expected).min() > 0.98


def test_what_cannot_end_well_is_refused_at_once(source, digits, tmp_path):
    def refused(model=source, output=tmp_path / "out", **options):
        with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is compared by the caller)
            optimize(load_model(model), output, **options)
        assert not (tmp_path / "out").exists()
        return str(error.value)

    for precision in ("bf16", "fp16", "int8"):
        assert refused(precision=precision) == (
            f"{precision} is judged on real images: add --calibrate DATASET"
        )
    assert refused(batch=0) == "--batch: expected 1 or more, got 0"
    assert refused(agreement=98.0) == "--agreement: expected a share above 0 and up to 1, got 98.0"
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    assert refused(output=full) == f"{full} is not an empty folder: choose another --output"
    headless = build_model("vit_tiny_patch16_224", **TINY, num_classes=0)
    write(tmp_path / "headless", headless)
    assert "no head" in refused(model=tmp_path / "headless")
    few = type(digits)(train=digits.train, val=None, test=digits.test.subset(range(199)))
    assert "has 199 test images, and agreement needs 200" in refused(data=few)


def test_no_precision_below_float32_without_images(monkeypatch, capsys, source, tmp_path):
    with pytest.raises(SystemExit) as left:
        cli.main(["optimize", str(source), "--precision", "int8", "--output", str(tmp_path / "out")])
    assert left.value.code == 2
    expected = "vitrail: int8 is judged on real images: add --calibrate DATASET\n"
    assert capsys.readouterr().err == expected


def test_the_text_says_what_was_measured(tmp_path):
    found = Optimized(
        folder=tmp_path,
        chosen=None,
        candidates=(candidate("float32", 0.9, 1.0),),
        eager_s=0.01,
        batch=8,
        judged_on="256 test images of digits",
        notes=("a note",),
    )
    lines = found.text().splitlines()
    assert lines[0] == "a note"
    assert lines[1].endswith(" 10.00 ms  float32, a batch of 8")
    assert "0.90 x as fast" in lines[2]
    assert lines[-2] == "chosen eager float32: nothing that was tried is faster here"
