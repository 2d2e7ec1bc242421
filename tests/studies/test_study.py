"""Studies: what they refuse before anything is trained, that they go on, and that their answers follow."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.studies.conftest import TINY

from vitrail.cli import main
from vitrail.config import shipped_yaml
from vitrail.studies import outline, plan_study, run_study, write_study
from vitrail.studies.intervals import Estimate, over_seeds, share
from vitrail.studies.plan import Claim, Question
from vitrail.studies.study import answer, decide

QUICK = "--data.name digits --train.device cpu --quick"
SMALL: dict[str, Any] = {
    "title": "Does it help?",
    "about": "A try.",
    "values": TINY,
    "parts": [
        {
            "title": "Without labels",
            "runs": {"masked": {"recipe": "digits-mae", "label": "MAE"}},
            "measures": [
                {"kind": "probe"},
                {"kind": "probe", "name": "elsewhere", "dataset": "nowhere/to/be/found"},
                {"kind": "dense"},
                {"kind": "heads"},
            ],
        },
        {
            "title": "With labels",
            "runs": {
                "scratch": {"recipe": "digits-vit", "seeds": 2, "data.train_fraction": 0.2},
                "tuned": {"like": "scratch", "model.pretrained": "{masked}", "optim.layer_decay": 0.75},
                "taught": {"recipe": "digits-distill", "task.teacher": "{tuned}", "seeds": 2},
            },
            "measures": [{"kind": "robustness", "corruptions": ["noise", "occlusion"]}],
        },
    ],
    "questions": [
        {"ask": "Does MAE help?", "parts": [{"run": "tuned", "than": "scratch", "of": "test", "by": 0.01}]},
        {
            "ask": "Is it as robust?",
            "parts": [
                {"run": "tuned", "than": "scratch", "of": f"robustness.{name}", "by": -0.05}
                for name in ("noise", "occlusion", "mean")
            ],
        },
    ],
}


def _file(folder: Path, content: Any) -> Path:
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def _changed(**changes: Any) -> dict[str, Any]:
    """The small study with other values at dotted places, such as `parts__0__runs__masked`."""
    content: dict[str, Any] = json.loads(json.dumps(SMALL))
    for place, value in changes.items():
        *parents, last = place.split("__")
        branch: Any = content
        for parent in parents:
            branch = branch[int(parent) if parent.isdigit() else parent]
        branch[last] = value
    return content


# Plans.


def test_runs_refer_to_earlier_runs_of_the_same_seed(tmp_path: Path) -> None:
    study = plan_study(_file(tmp_path, SMALL), tmp_path / "out")
    masked, scratch, tuned, taught = study.runs
    assert [run.name for run in study.runs] == ["masked", "scratch", "tuned", "taught"]
    assert [run.seeds for run in study.runs] == [1, 2, 2, 2]
    assert [config.train.seed for config in tuned.configs] == [0, 1]
    assert tuned.folders[1] == tmp_path / "out" / "tuned" / "seed1"
    # One seed serves both, two stay in their pairs.
    assert {config.model.pretrained for config in tuned.configs} == {str(masked.folders[0])}
    assert [config.task.options["teacher"] for config in taught.configs] == [
        str(own) for own in tuned.folders
    ]
    # like: everything but what is changed.
    assert tuned.configs[0].data.train_fraction == scratch.configs[0].data.train_fraction == 0.2
    assert (tuned.configs[0].optim.layer_decay, scratch.configs[0].optim.layer_decay) == (0.75, 1.0)
    assert tuned.options["embed_dim"] == 16


def test_what_the_command_line_says_stands_above_the_study(tmp_path: Path) -> None:
    content = _changed(quick={"train.duration": "3 steps"}, parts__1__runs__tuned={
        "like": "scratch", "train.duration": "9 epochs",
    })  # fmt: skip
    path = _file(tmp_path, content)

    def durations(**options: Any) -> list[str]:
        found = plan_study(path, tmp_path / "out", **options)
        return [run.configs[0].train.duration for run in found.runs]

    assert durations() == ["2 epochs", "2 epochs", "9 epochs", "2 epochs"]
    assert durations(quick=True) == ["3 steps"] * 4
    assert durations(quick=True, overrides={"train.duration": "1 epoch"}) == ["1 epoch"] * 4
    assert [run.seeds for run in plan_study(path, tmp_path / "out", quick=True).runs] == [1, 1, 1, 1]
    assert [run.seeds for run in plan_study(path, tmp_path / "out", seeds=3).runs] == [3, 3, 3, 3]


def test_a_quick_study_leaves_out_other_data_sets(tmp_path: Path) -> None:
    measures = [{"kind": "probe"}, {"kind": "probe", "name": "clothes", "dataset": "fashion_mnist"}]
    path = _file(tmp_path, _changed(parts__0__measures=measures))
    whole, quick = (plan_study(path, tmp_path / "out", quick=own) for own in (False, True))
    assert [own.title for own in whole.parts[0].measures] == ["probe", "clothes"]
    assert [own.title for own in quick.parts[0].measures] == ["probe"]
    assert (whole.left_out, quick.left_out) == ((), ("clothes",))


MASKED, SCRATCH, TUNED, TAUGHT = (
    "parts__0__runs__masked",
    *(f"parts__1__runs__{name}" for name in ("scratch", "tuned", "taught")),
)
MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({MASKED: {"recipe": "digits-mea"}}, "run masked: unknown recipe 'digits-mea': did you mean"),
    ({MASKED: {}}, "run masked: expected either recipe: NAME, or like: RUN"),
    ({MASKED: {"recipe": "digits-mae", "sede": 1}}, "run masked: sede: Extra inputs"),
    ({MASKED: {"recipe": "digits-mae", "seeds": 0}}, "run masked: seeds: Input should be"),
    ({MASKED: {"recipe": "digits-mae", "optim.rl": 1}}, "run masked: unknown option --optim.rl"),
    ({MASKED: {"recipe": "digits-mae", "task.name": "mea"}}, "run masked: unknown task 'mea'"),
    ({SCRATCH: {"like": "maskd"}}, "run scratch: no earlier run 'maskd': did you mean masked"),
    ({SCRATCH: {"recipe": "digits-vit", "model.pretrained": "{tuned}"}}, "scratch: no earlier run 'tuned'"),
    (
        {TAUGHT: {"recipe": "digits-distill", "task.teacher": "{scratch}", "seeds": 3}},
        "run taught: scratch has 2 seeds, taught 3",
    ),
    (
        {TUNED: {"like": "scratch", "model.pretrained": "{masked}", "model.depht": 3}},
        "run tuned: model vit_digits has no option 'depht'",
    ),
    ({"parts__1__runs__masked": {"recipe": "digits-mae"}}, "there are two runs masked"),
    ({"parts__0__measures": [{"kind": "porbe"}]}, "parts.0.measures.0.kind: Input should be 'probe'"),
    ({"parts__0__measures": [{"kind": "robustness"}]}, "Without labels: masked is no classifier"),
    (
        {"parts__1__measures": [{"kind": "robustness", "corruptions": ["nosie"]}]},
        "With labels: unknown corruption 'nosie': did you mean noise",
    ),
    (
        {"questions": [{"ask": "?", "parts": [{"run": "tuend", "than": "scratch", "of": "test"}]}]},
        "'?': no run 'tuend': did you mean tuned",
    ),
    (
        {"questions": [{"ask": "?", "parts": [{"run": "tuned", "than": "masked", "of": "dense.r2"}]}]},
        "'?': tuned has no 'dense.r2'",
    ),
    ({"questions": [{"ask": "?", "parts": []}]}, "questions.0.parts: Tuple should have at least 1 item"),
    ({"parts": []}, "parts: Tuple should have at least 1 item"),
    ({"titel": "?"}, "titel: Extra inputs are not permitted"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_what_does_not_fit_is_said_before_anything_is_trained(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = _file(tmp_path, _changed(**changes))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        plan_study(path, tmp_path / "out")
    assert str(error.value).startswith(f"study {path}")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", list(shipped_yaml("studies")))
def test_studies_of_the_package_fit(name: str, tmp_path: Path) -> None:
    study = plan_study(name, tmp_path)
    assert len(study.questions) >= 8
    assert {claim.run for question in study.questions for claim in question.parts} <= {
        run.name for run in study.runs
    }
    assert {config.data.name for run in study.runs for config in run.configs} == {"mnist"}
    for run in study.runs:
        assert (run.options["img_size"], run.model in {"vit_mnist_2blk", "swin_mnist_2blk"}) == (28, True)


def test_the_shipped_studies_say_what_the_mission_asks(tmp_path: Path) -> None:
    runs = {run.name: run for run in plan_study("mae-infonce", tmp_path).runs}
    masked = runs["mae"].configs[0]
    assert (masked.task.name, masked.task.options["ratio"], masked.train.duration) == (
        "mae",
        0.5,
        "12 epochs",
    )
    both = runs["both"].configs[0]
    assert both.task.name == "mae_infonce"
    assert (both.task.options.get("mae_weight", 0.8), both.task.options.get("infonce_weight", 0.2)) == (
        0.8,
        0.2,
    )
    taught = {run.name: run for run in plan_study("vit-swin", tmp_path).runs}["distilled"]
    assert taught.model == "swin_mnist_2blk"
    options = taught.configs[1].task.options
    assert (options["alpha"], options["temperature"]) == (1.0, 4.0)
    assert options["teacher"] == str(tmp_path / "vit" / "seed1")


# Answers.

LABELS = {"a": "A", "b": "B"}


def _decided(first: Estimate, second: Estimate, by: float = 0.0, of: str = "test") -> tuple[str, str]:
    return decide(Claim(run="a", than="b", of=of, by=by), {"a": {of: first}, "b": {of: second}}, LABELS)


def test_a_claim_holds_where_the_whole_interval_does() -> None:
    high, low = over_seeds([0.95, 0.951, 0.949]), over_seeds([0.90, 0.901, 0.899])
    assert _decided(high, low) == (
        "yes",
        "Test accuracy: 95.00 % (A) against 90.00 % (B), which is 5.00 points more (95 % interval "
        "4.77 to 5.23; 3 seeds).",
    )
    assert _decided(low, high) == (
        "no",
        "Test accuracy: 90.00 % (A) against 95.00 % (B), which is 5.00 points less (95 % interval "
        "4.77 to 5.23; 3 seeds).",
    )
    for by, verdict in ((0.047, "yes"), (0.05, "undecided"), (0.053, "no"), (-0.1, "yes")):
        found, sentence = _decided(high, low, by)
        assert found == verdict
        assert sentence.endswith(
            f"Asked for: {100 * by:.2f} points more."
            if by > 0
            else "Asked for: not more than 10.00 points less."
        )
    assert _decided(low, high, -0.053)[0] == "yes"
    assert _decided(low, high, -0.047)[0] == "no"
    assert _decided(share(0.9, 100), share(0.88, 100))[0] == "undecided"
    assert _decided(share(0.9, 10_000), share(0.88, 10_000))[1].endswith("1 seed).")


def test_numbers_have_their_unit() -> None:
    first, second = (Estimate(value=own, low=own - 0.01, high=own + 0.01, seeds=1) for own in (9.5, 8.0))
    assert _decided(first, second, of="heads.distance")[1].startswith(
        "Reach of attention: 9.50 pixels (A) against 8.00 pixels (B), which is 1.50 pixels more "
        "(95 % interval 1.49 to 1.51"
    )
    assert _decided(first, second, of="dense.r2")[1].startswith("Edges told by single patches, R²: 9.500 (A)")
    assert _decided(first, second, of="clothes.linear")[1].startswith("Clothes, linear classifier: 950.00 %")
    assert _decided(first, second, of="robustness.noise")[1].startswith("Accuracy under noise: 950.00 %")


def test_a_question_needs_all_its_claims() -> None:
    up, down = over_seeds([0.95, 0.951]), over_seeds([0.5, 0.501])
    wide = over_seeds([0.2, 0.9])

    def verdict(*pairs: tuple[Estimate, Estimate] | None) -> str:
        known: dict[str, dict[str, Estimate]] = {"a": {}, "b": {}}
        claims = []
        for number, pair in enumerate(pairs):
            name = f"m{number}.linear"
            claims.append(Claim(run="a", than="b", of=name))
            if pair is not None:
                known["a"][name], known["b"][name] = pair
        return answer(Question(ask="?", parts=tuple(claims)), known, LABELS).verdict

    assert verdict((up, down), (up, down)) == "yes"
    assert verdict((up, down), (down, up)) == "no"
    assert verdict((up, down), (wide, up)) == "undecided"
    assert verdict((wide, up), (down, up)) == "no"
    assert verdict((up, down), None) == "not measured"


# Whole studies.


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small study, interrupted in its second run by a signal, and gone on with."""
    folder = tmp_path_factory.mktemp("small")
    path = _file(folder, SMALL)
    words = [sys.executable, "-m", "vitrail", "study", str(path), "--output", str(folder / "out")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    second = folder / "out" / "scratch" / "seed0"
    with subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # Tests may have been started with Ctrl-C ignored, as what runs in the background is.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as run:
        for _ in range(1200):
            if (second / "config.yaml").is_file():
                break
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        said = run.communicate(timeout=120)[1]
        assert run.returncode == 130
    assert f"go on with: {' '.join(['vitrail study', *words[4:]])}" in " ".join(said.split())
    assert (folder / "out" / "masked" / "seed0" / "manifest.json").is_file()
    assert not (second / "manifest.json").exists()
    return folder


def test_the_outline_tells_what_would_be_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["study", str(_file(tmp_path, SMALL)), "--output", str(tmp_path / "out"), "--dry-run"])
    said = capsys.readouterr().out
    assert "tuned: vit_digits, digits-vit, task classify, 2 epochs; 2 to be trained;" in said
    assert re.search(r"about \d+ minutes of training left", said)
    assert not (tmp_path / "out").exists()


def test_an_interrupted_study_goes_on_and_answers(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = small / "out"
    before = (out / "masked" / "seed0" / "model" / "model.safetensors").stat().st_mtime_ns
    main(["study", str(small / "small.yaml"), "--output", str(out)])
    said = capsys.readouterr().out
    absent = "elsewhere left out, which the same command measures later: "
    assert said.startswith(absent)
    assert "\n1 of 7: MAE, seed 0: finished\n2 of 7: scratch, seed 0: " in said
    assert (out / "masked" / "seed0" / "model" / "model.safetensors").stat().st_mtime_ns == before
    assert re.search(r"^Does MAE help\? (Yes|No|Undecided)\.$", said, re.MULTILINE)
    assert said.endswith(f"report {out / 'report.html'}\n")

    found = json.loads((out / "study.json").read_text())
    rows = {row["name"]: row for part in found["parts"] for row in part["runs"]}
    assert list(rows) == ["MAE", "scratch", "tuned", "taught"]
    for name, row in rows.items():
        manifests = [json.loads((Path(own) / "manifest.json").read_text()) for own in row["folders"]]
        key = "knn_accuracy" if name == "MAE" else "test_accuracy"
        assert row["test"]["value"] == pytest.approx(sum(own[key] for own in manifests) / len(manifests))
    assert set(rows["MAE"]["measured"]) == {"probe.linear", "probe.knn", "dense.r2", "heads.distance"}
    assert set(rows["taught"]["measured"]) == {f"robustness.{own}" for own in ("noise", "occlusion", "mean")}
    assert 0.0 < rows["MAE"]["measured"]["heads.distance"]["value"] < 8.0
    kept = json.loads((out / "scratch" / "seed1" / "measures" / "robustness.json").read_text())
    first = json.loads((out / "scratch" / "seed0" / "measures" / "robustness.json").read_text())
    assert rows["scratch"]["measured"]["robustness.noise"]["value"] == pytest.approx(
        (kept["numbers"]["noise"]["value"] + first["numbers"]["noise"]["value"]) / 2
    )
    for own in found["answers"]:
        assert own["verdict"] in {"yes", "no", "undecided"}
    assert (out / "study.csv").read_text().count("\n") == 8

    # Once more: nothing is trained or measured again, and the numbers are the same.
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("measures/*.json")}
    assert len(stamps) == 3 + 6
    study = plan_study(small / "small.yaml", out)
    write_study(out, run_study(study, command=found["command"], say=lambda line: None))
    assert json.loads((out / "study.json").read_text()) == found
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert "0 minutes of training left" in outline(study)

    # The report holds everything, and needs nothing else.
    page = (out / "report.html").read_text()

    class Reader(HTMLParser):
        sources: list[str] = []  # noqa: RUF012
        text = ""

        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            assert tag not in {"script", "link", "iframe"}
            self.sources += [value or "" for name, value in attributes if name in {"src", "href"}]

        def handle_data(self, data: str) -> None:
            self.text += data

    reader = Reader()
    reader.feed(page)
    assert "prove nothing" not in page
    assert "because the images could not be had: elsewhere." in reader.text
    assert len(reader.sources) == 4
    assert all(source.startswith("data:image/png;base64,") for source in reader.sources)
    for own in found["answers"]:
        assert own["ask"] in reader.text
        assert all(sentence in reader.text for sentence in own["sentences"])
    assert f"{100 * rows['tuned']['test']['value']:.2f} (" in reader.text

    # What was measured while the images were there stays.
    probe = json.loads((out / "masked" / "seed0" / "measures" / "probe.json").read_text())
    probe["asked"] |= {"name": "elsewhere", "dataset": "nowhere/to/be/found"}
    (out / "masked" / "seed0" / "measures" / "elsewhere.json").write_text(json.dumps(probe))
    again = run_study(study, command="", say=lambda line: None)
    assert again.study.left_out == ()
    assert again.parts[0].measured[0]["elsewhere.linear"].value == probe["numbers"]["linear"]["value"]

    # A measure that is asked otherwise is measured anew.
    other = _changed(parts__1__measures=[{"kind": "robustness", "corruptions": ["blur"]}], questions=[])
    again = plan_study(_file(small, other), out)
    result = run_study(again, command="", say=lambda line: None)
    assert set(result.parts[1].measured[0]) == {"robustness.blur", "robustness.mean"}

    # A folder with runs of another study is left alone.
    changed = plan_study(_file(small, SMALL), out, overrides={"optim.lr": 0.5})
    with pytest.raises(ValueError, match=r"masked/seed0 holds a run with another config \(optim\.lr\)"):
        run_study(changed, command="", say=lambda line: None)


@pytest.mark.parametrize("name", list(shipped_yaml("studies")))
def test_studies_of_the_package_run_on_digits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VITRAIL_DATA", raising=False)
    tiny = '--train.duration "2 steps" --train.batch_size 32 --train.eval_every "2 steps"'
    main(shlex.split(f"study {name} {QUICK} {tiny}"))
    study = plan_study(name, tmp_path)
    found = json.loads((tmp_path / "runs" / f"study-{name}" / "study.json").read_text())
    assert sum(len(part["runs"]) for part in found["parts"]) == len(study.runs)
    assert len(found["answers"]) == len(study.questions)
    page = (tmp_path / "runs" / f"study-{name}" / "report.html").read_text()
    assert "whose answers prove nothing" in page
    assert capsys.readouterr().out.endswith(f"report runs/study-{name}/report.html\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("study mae-infonec", "unknown study 'mae-infonec': did you mean mae-infonce?"),
        ("study nothing.yaml", "no study file nothing.yaml"),
        ("study vit-swin --seeds two", "argument --seeds: invalid int value: 'two'"),
        ("study vit-swin --seeds 0", "seeds: expected at least 1, got 0"),
        (
            "study vit-swin --seed 1",
            "a study holds several runs, each with a train.seed of its own: give --seeds N",
        ),
        ("study vit-swin --optim.rl 1", "study vit-swin, run vit: unknown option --optim.rl: did you mean"),
        (
            "study vit-swin --model.depht 1",
            "study vit-swin, run vit: model vit_mnist_2blk has no option 'depht'",
        ),
        ("study vit-swin again", "expected --section.key VALUE, got 'again'"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(
    line: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(line))
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert said.err.startswith(f"vitrail: {message}")
    assert said.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_study_of_the_documentation_fits(tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent.parent / "docs" / "studies.md").read_text()
    (tmp_path / "written.yaml").write_text(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0])
    study = plan_study(tmp_path / "written.yaml", tmp_path / "out")
    assert [(run.label, run.seeds) for run in study.runs] == [("masked", 1), ("scratch", 3), ("from MAE", 3)]
    runs = sum(run.seeds for run in plan_study("mae-infonce", tmp_path).runs)
    assert f"{runs} runs on MNIST" in text


def test_help_lists_the_studies(capsys: pytest.CaptureFixture[str]) -> None:
    for line in (["study"], ["study", "--help"]):
        main(line)
        said = capsys.readouterr().out
        for name, text in shipped_yaml("studies").items():
            assert re.search(rf"^  {name} +{re.escape(text.splitlines()[0][2:])}$", said, re.MULTILINE)
