"""What `vitrail bench` states: times in turns, true peaks, peers with the same logits, one set of numbers."""

import csv
import importlib.util
import json
import math
import re
import statistics
import time
from dataclasses import replace

import pytest
import torch

import vitrail.bench.peers as peers_module
from vitrail.bench.bench import checked, run_bench, table_csv, write_bench
from vitrail.bench.measure import (
    Gain,
    Settings,
    bfloat16_gain,
    find_models,
    make_pass,
    measure,
    peaks_here,
    placed,
    training_step,
    weights_mib,
)
from vitrail.bench.memory import PeakMemory, peak_growth, printed_by
from vitrail.bench.peers import OURS, RUNTIMES, contest, input_shape, random_model
from vitrail.bench.scaling import TrainingTime, _points, fit_power_law, run_scaling, write_scaling
from vitrail.cli import main
from vitrail.evaluation.timing import in_turns, median_ratio, product, product_rate, summary
from vitrail.models.catalogue import PARAMETERS_AND_MACS
from vitrail.pretrained.folder import save_model

CPU = torch.device("cpu")
QUICK = Settings(batches=(1, 2), repetitions=2, warmup=0)
TINY = {"img_size": 32, "depth": 1}


@pytest.fixture(autouse=True)
def _small_products(monkeypatch):
    monkeypatch.setattr(Settings, "product_size", 64)
    monkeypatch.setattr("vitrail.bench.measure._GAIN_SIZE", 64)


@pytest.fixture
def _peaks_of_this_process(monkeypatch):
    """A process of its own takes seconds to start; `test_the_command_prints_json` has one."""
    monkeypatch.setattr("vitrail.bench.measure.peak_memory", peaks_here)


def failed(capsys, *words):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *words])
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip()


def test_acts_take_turns_in_a_rotating_order():
    order = []
    acts = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = in_turns(acts, 3, warmup=1, wait=lambda: order.append("."))
    assert "".join(order).replace(".", "") == "cab" + "abc" + "bca" + "cab"
    assert order.count(".") == 12
    assert {name: len(own) for name, own in seconds.items()} == dict.fromkeys("abc", 3)


def test_more_turns_until_they_have_lasted_long_enough():
    assert len(in_turns({"a": lambda: time.sleep(0.01)}, 2, lasting=0.1)["a"]) in range(5, 11)
    assert len(in_turns({"a": lambda: None}, 2, lasting=1e9)["a"]) == 40


def test_summary_and_ratio():
    found = summary([4.0, 1.0, 2.0, 3.0, 5.0])
    assert (found["median_s"], found["min_s"], found["quartiles_s"]) == (3.0, 1.0, [2.0, 4.0])
    assert summary([2.0])["quartiles_s"] == [2.0, 2.0]
    # Each repetition by itself: the ratio of the medians would be 10 / 3.
    assert median_ratio([2.0, 30.0, 10.0], [1.0, 3.0, 20.0]) == 2.0


def test_the_ceiling_is_that_of_a_product_timed_by_hand():
    left, right = torch.randn(2, 256, 256)
    times = in_turns({"ours": product(256, torch.float32, CPU)}, 15)["ours"]
    by_hand = []
    for _ in range(15):
        began = time.perf_counter()
        torch.mm(left, right)
        by_hand.append(time.perf_counter() - began)
    assert 0.2 < product_rate(256, times) / (2 * 256**3 / statistics.median(by_hand)) < 5
    assert product_rate(100, [0.5, 0.1, 0.9]) == 4e6


def test_peak_memory_counts_what_is_gone_again_but_not_what_was_before():
    before = torch.ones(64 * 2**18)  # 64 MiB
    del before
    peak = PeakMemory(CPU)
    assert peak.grown() < 8
    kept = torch.ones(16 * 2**18)
    gone = torch.ones(32 * 2**18)
    del gone
    assert 46 < peak.grown() < 60
    del kept
    assert 30 < peak_growth(lambda: torch.ones(32 * 2**18), times=2) < 50


def test_a_process_that_fails_is_one_line():
    assert printed_by("-c", "print(6 * 7)") == "42"
    with pytest.raises(ValueError, match=r"measures memory failed: RuntimeError: no room$"):
        printed_by("-c", "raise RuntimeError('no room')")


def test_peak_of_a_model_holds_its_weights_and_grows_with_the_batch():
    settings = replace(QUICK, batches=(16, 1))
    changes = {"img_size": 64, "depth": 2}
    found = peaks_here("vit_tiny_patch16_224", changes, OURS, settings)
    assert list(found) == [1, 16]
    weights = weights_mib(random_model("vit_tiny_patch16_224", changes))
    assert weights <= found[1] < found[16]
    training = peaks_here("vit_tiny_patch16_224", changes, OURS, replace(settings, training=True))
    assert training[16] > weights + 0.9 * weights  # gradients are as large as the weights


@pytest.mark.parametrize(
    ("name", "changes", "peers"),
    [
        ("vit_small_patch16_224", TINY, ("timm", "transformers", "torchvision")),
        ("diffvit_small_patch16_224", TINY, ("timm",)),
        ("cct_7_3x1_32", {"img_size": 16, "depth": 1}, ("vit-pytorch",)),
        ("vit_tiny_patch16_224", {**TINY, "num_classes": 7, "in_chans": 1, "drop_path": 0.5}, ("timm",)),
    ],
)
def test_peers_give_our_logits(name, changes, peers):
    missing = [peer for peer in peers if importlib.util.find_spec(peer.replace("-", "_")) is None]
    if missing:
        pytest.skip(f"not installed: {missing}")
    found = contest(name, changes, peers)
    assert list(found.models) == [OURS, *peers]
    assert found.absent == {}
    assert all(0 <= difference < 1e-4 for difference in found.logit_differences.values())
    images = torch.randn(3, *input_shape(found.models[OURS].config))
    ours, *theirs = (model.eval()(images) for model in found.models.values())
    assert all(torch.allclose(ours, own, atol=1e-4) for own in theirs)
    for model in found.models.values():  # so that a training step is the same work
        assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("peer", RUNTIMES)
def test_runtimes_give_our_logits(peer):
    pytest.importorskip("onnxscript")
    pytest.importorskip(peer)
    # Batch normalisation, as in this stem, differs between training and inference.
    found = contest("vit_digits", {"depth": 1}, (peer,))
    assert found.absent == {}
    assert found.logit_differences[peer] < 1e-4
    images = torch.randn(3, 1, 8, 8)
    ours, theirs = (placed(model, QUICK) for model in found.models.values())
    with torch.no_grad():
        assert torch.allclose(ours(images), theirs(images), atol=1e-4)


@pytest.mark.parametrize("asked", [{"training": True}, {"dtype": "bfloat16"}])
@pytest.mark.usefixtures("_peaks_of_this_process")
def test_runtimes_infer_in_float32_only(asked):
    found = measure("vit_digits", {"depth": 1}, replace(QUICK, batches=(1,), against=RUNTIMES, **asked))
    assert [timing.library for timing in found.timings] == [OURS]
    assert found.absent == dict.fromkeys(RUNTIMES, "it is measured at inference in float32 on a CPU only")


def test_a_peer_that_cannot_take_part_says_why(monkeypatch):
    found = contest(
        "pvt_tiny", {"depths": (1, 1, 1, 1), "img_size": 64}, ("timm", "torchvision", "vit-pytorch")
    )
    assert list(found.models) == [OURS]
    assert found.absent["timm"] == "timm has no pvt_tiny"
    assert found.absent["torchvision"] == "torchvision has no PVT"
    assert "only CCT" in found.absent["vit-pytorch"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert contest("vit_digits", {}, ("timm",)).absent == {"timm": "not installed: pip install timm"}


def test_another_model_is_not_timed(monkeypatch):
    monkeypatch.setitem(peers_module._BUILDERS, "timm", lambda name, ours: random_model(name, {}))
    monkeypatch.setattr(peers_module, "TOLERANCE", 0.0)
    found = contest("vit_digits", {}, ("timm",))
    assert list(found.models) == [OURS]
    assert found.absent["timm"].startswith("its logits differ from ours by")


@pytest.mark.usefixtures("_peaks_of_this_process")
def test_measurement_of_a_variant():
    found = measure("vit_mnist_2blk", {}, QUICK)
    assert (found.parameters, found.macs_per_image) == PARAMETERS_AND_MACS["vit_mnist_2blk"]
    assert found.image_shape == (1, 28, 28)
    assert [(timing.library, timing.batch) for timing in found.timings] == [(OURS, 1), (OURS, 2)]
    for timing in found.timings:
        row = timing.to_dict()
        median = statistics.median(timing.seconds)
        assert len(timing.seconds) == 2
        assert row["ms_per_batch"] == pytest.approx(1000 * median)
        assert row["ms_per_image"] == pytest.approx(1000 * median / timing.batch)
        assert row["images_per_second"] == pytest.approx(timing.batch / median)
        rate = 2 * found.macs_per_image * timing.batch / median
        assert timing.share_of_ceiling == pytest.approx(rate / found.ceiling[timing.batch])
        assert timing.peak_mib >= found.weights_mib


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("training", [False, True])
def test_passes_leave_weights_and_no_gradients(dtype, training):
    settings = replace(QUICK, dtype=dtype, training=training)
    model = placed(random_model("vit_digits", {"num_classes": 0}), settings)
    assert next(model.parameters()).dtype == (torch.float32 if training else getattr(torch, dtype))
    before = [parameter.clone() for parameter in model.parameters()]
    make_pass(model, 2, (1, 8, 8), settings)()
    assert all(map(torch.equal, before, model.parameters()))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_step_with_an_optimizer_changes_the_weights():
    model = random_model("vit_digits", {}).train()
    before = model.head.weight.clone()
    step = training_step(
        model, torch.randn(4, 1, 8, 8), optimizer=torch.optim.SGD(model.parameters(), lr=0.1)
    )
    step()
    assert not torch.equal(before, model.head.weight)


@pytest.mark.usefixtures("_peaks_of_this_process")
def test_json_csv_and_table_hold_the_same_numbers(tmp_path):
    lines = []
    found = run_bench("vit_digits", replace(QUICK, against=("vit-pytorch",)), lines.append)
    assert write_bench(tmp_path, found).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"bench.{kind}" for kind in ("csv", "json", "png", "svg")
    ]
    stored = json.loads((tmp_path / "bench.json").read_text())
    (model,) = stored["models"]
    rows = list(csv.DictReader((tmp_path / "bench.csv").read_text().splitlines()))
    text = "\n".join(lines)
    printed = re.findall(r"^vitrail +(\d+) +([\d.]+) +\([\d.-]+\) +([\d.]+) +([\d.]+) +(\d+) %", text, re.M)
    assert len(printed) == len(rows) == len(model["timings"]) == 2
    for shown, row, timing in zip(printed, rows, model["timings"], strict=True):
        assert int(shown[0]) == int(row["batch"]) == timing["batch"]
        for number, key, digits in zip(
            shown[1:4], ("ms_per_batch", "ms_per_image", "images_per_second"), (2, 2, 1), strict=True
        ):
            assert number == f"{timing[key]:.{digits}f}"
            assert float(row[key]) == timing[key]
        assert shown[4] == f"{100 * timing['share_of_ceiling']:.0f}"
        assert row["threads"] == str(torch.get_num_threads())
    assert f"{torch.get_num_threads()} thread" in text
    assert f"{model['parameters']:,} parameters" in text
    assert "vit-pytorch takes no part: of vit-pytorch's models only CCT" in text
    assert "bfloat16: " in text


def test_bfloat16_gain_is_told_or_why_there_is_none():
    assert Gain(ratio=1.9, why_none="").text().startswith("bfloat16: matrix products run 1.90 times as fast")
    none = Gain(ratio=0.25, why_none="so it is").text()
    assert "no gain here, matrix products take 4.0 times as long" in none
    assert none.endswith("so it is")
    measured = bfloat16_gain(CPU)
    assert measured.ratio > 0
    assert bool(measured.why_none) == (measured.ratio <= 1)


def test_float16_on_a_cpu_becomes_bfloat16_with_a_reason():
    said = []
    settings = checked(replace(QUICK, dtype="float16", batches=(4, 1, 4)), said.append)
    assert (settings.dtype, settings.batches) == ("bfloat16", (4, 1))
    assert len(said) == 1
    assert "bfloat16 is measured instead" in said[0]


def test_models_by_name_pattern_and_folder(tmp_path):
    assert find_models("vit_tiny") == [("vit_tiny_patch16_224", {})]
    assert [name for name, _ in find_models("swinv2_ci*")] == ["swinv2_cifar"]
    model = random_model("vit_digits", {"depth": 1})
    prepared = {"img_size": [8, 8], "in_chans": 1}
    save_model(
        tmp_path / "run" / "model", model, name="vit_digits", classes=("a",) * 10, preprocessing=prepared
    )
    ((name, changes),) = find_models(str(tmp_path / "run"))
    assert name == "vit_digits"
    assert random_model(name, changes).config == model.config


@pytest.mark.parametrize("exponent", [-1.0, 0.5, 2.0])
def test_a_power_law_is_fitted_exactly(exponent):
    values = [3, 4, 7, 20]
    found, fit = fit_power_law(values, [0.7 * value**exponent for value in values])
    assert found == pytest.approx(exponent, abs=1e-12)
    assert fit == pytest.approx(1.0)
    assert fit_power_law([1, 2, 4], [5.0, 5.0, 5.0]) == (0.0, 1.0)
    assert fit_power_law([1, 2, 4], [1.0, 9.0, 2.0])[1] < 0.9


def test_training_time_counts_whole_batches():
    found = TrainingTime(images=101, epochs=30, batch=10, seconds_per_step=2.0, hardware="a loom")
    assert (found.seconds_per_epoch, found.seconds) == (22.0, 660.0)
    assert "30 epochs of 101 images would take 11.0 min (22.0 s an epoch) on a loom" in found.text()


def test_scaling_keeps_the_proportions_of_stages():
    points = _points("pvt_v2_b2", {}, Settings(batches=(2, 4)))
    assert [value for value, _, _ in points["image side"]] == [112, 224, 336, 448]
    assert [(value, batch) for value, _, batch in points["batch"]] == [(2, 2), (4, 4), (8, 8), (16, 16)]
    assert [changes["depths"][2] for _, changes, _ in points["depth"]] == [3, 6, 9, 12]
    assert [changes["embed_dims"] for _, changes, _ in points["width"]][2] == (96, 192, 480, 768)
    assert [value for value, _, _ in points["width"]] == [512, 1024, 1536, 2048]
    assert [value for value, _, _ in _points("vit_digits", {"depth": 1}, QUICK)["depth"]] == [1, 2]


def test_scaling(tmp_path):
    lines, name = [], "vit_digits"
    settings = Settings(batches=(1, 2), repetitions=1, warmup=0)
    found = run_scaling(name, settings, lines.append, dataset_size=100, epochs=3)
    grown = {growth.what: growth for growth in found.growths}
    assert list(grown) == ["image side", "batch", "depth", "width"]
    batch = grown["batch"]
    assert batch.values == (1, 2, 4, 8)
    assert batch.macs == tuple(number * PARAMETERS_AND_MACS[name][1] for number in (1, 2, 4, 8))
    assert batch.macs_exponent == pytest.approx(1.0)
    assert 1.5 < grown["width"].macs_exponent < 2.0
    for growth in found.growths:
        assert (growth.exponent, growth.fit) == fit_power_law(growth.values, growth.seconds)
        assert f"time ~ {growth.what} ^ {growth.exponent:.2f}" in "\n".join(lines)
    assert found.training_time.seconds == pytest.approx(3 * 50 * found.training_time.seconds_per_step)
    assert found.machine["cpu"] in found.training_time.hardware
    write_scaling(tmp_path, found)
    stored = json.loads((tmp_path / "scaling.json").read_text())
    assert stored["training_time"]["seconds"] == found.training_time.seconds
    assert [own["exponent"] for own in stored["growths"]] == [own.exponent for own in found.growths]
    rows = list(csv.DictReader((tmp_path / "scaling.csv").read_text().splitlines()))
    assert len(rows) == sum(len(growth.values) for growth in found.growths)
    assert math.isclose(float(rows[0]["ms_per_batch"]), 1000 * found.growths[0].seconds[0])


def test_csv_quotes_what_needs_it():
    assert table_csv([{"a": "x,y", "b": None}]) == 'a,b\n"x,y",\n'


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["vit_tny"], "unknown model 'vit_tny': did you mean pvt_tiny"),
        (["nothing*"], "no model matches 'nothing*'"),
        (["no/such"], "no/such"),
        (["vit_digits", "--against", "tim"], "--against: expected some of timm, transformers, torchvision"),
        (["vit_digits", "--batch", "1,x"], "--batch: expected whole numbers with commas between, got '1,x'"),
        (["vit_digits", "--batch", "0"], "--batch: expected whole numbers from 1 on, got 0"),
        (["vit_digits", "--repetitions", "0"], "--repetitions: expected whole numbers from 1 on, got 0"),
        (["vit_digits", "--size", "0"], "--size: expected pixels of a side, 1 or more, got 0"),
        (["vit_digits", "--dtype", "int8"], "--dtype: expected one of float32, bfloat16, float16"),
        (["vit_digits", "--device", "tpu"], "--device: expected cpu"),
        (["vit_digits", "--threads", "0"], "--threads: expected a whole number from 1 on, got 0"),
        (["vit_digits", "--epochs", "3"], "--dataset-size and --epochs are of the training that --scaling"),
        (["vit_digits", "--scaling", "--epochs", "0"], "--epochs: expected a whole number from 1 on, got 0"),
        (["vit_digits", "--scaling", "--against", "timm"], "leave out --against"),
        (["vit_*", "--scaling"], "--scaling takes one model"),
    ],
)
def test_bad_input_is_one_line(words, message, capsys, tmp_path):
    said = failed(capsys, *words, "--output", str(tmp_path / "out"))
    assert message in said
    assert "\n" not in said
    assert not (tmp_path / "out").exists()


def test_the_command_prints_json(capsys):
    main(["bench", "vit_digits", "--batch", "2", "--repetitions", "1", "--json", "--train"])
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["training"]
    (model,) = found["models"]
    assert model["timings"][0]["peak_mib"] > model["weights_mib"]
    assert model["flops_per_image"] == 2 * PARAMETERS_AND_MACS["vit_digits"][1]
