"""A study from its plan to its report: train or read every run, measure, answer the questions.

    runs/study-<name>/
      <run>/seed0/       a run folder, with measures/ of the study
      report.html        the question, the tables, the figures, what the numbers say
      study.json         the same numbers
      study.csv          one line a run

Whatever was stopped goes on when the same command is given again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vitrail.datasets import load_section
from vitrail.files import write_whole
from vitrail.studies.compare import NAMES, Row, runs_csv
from vitrail.studies.intervals import Estimate, difference, joined
from vitrail.studies.measure import kept, measured, unit_of
from vitrail.studies.plan import Claim, Planned, PlannedPart, Question, Study
from vitrail.studies.runs import finish_run, is_finished
from vitrail.training import estimate

Verdict = Literal["yes", "no", "undecided", "not measured"]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the numbers say to a question."""

    ask: str
    verdict: Verdict
    sentences: tuple[str, ...]
    """One a claim, with the numbers that it was decided by."""

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values, ready for JSON."""
        return {"ask": self.ask, "verdict": self.verdict, "sentences": list(self.sentences)}


@dataclass(frozen=True, kw_only=True)
class PartResult:
    """One table of a study: its runs, and what was measured on them."""

    plan: PlannedPart
    rows: tuple[Row, ...]
    measured: tuple[dict[str, Estimate], ...]
    """For each row: `probe.linear` and so on, over the seeds."""

    @property
    def numbers(self) -> tuple[str, ...]:
        """Names of all that was measured on any row."""
        return tuple(dict.fromkeys(name for own in self.measured for name in own))


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """A finished study."""

    study: Study
    command: str
    parts: tuple[PartResult, ...]
    answers: tuple[Answer, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        """Of all parts."""
        return tuple(row for part in self.parts for row in part.rows)

    def text(self) -> str:
        """The answers, for a terminal."""
        lines = []
        for answer in self.answers:
            lines.append(f"{answer.ask} {answer.verdict.capitalize()}.")
            lines += [f"  {sentence}" for sentence in answer.sentences]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """All numbers, ready for JSON."""
        return {
            "study": self.study.name,
            "command": self.command,
            "parts": [
                {
                    "title": part.plan.title,
                    "runs": [
                        row.to_dict() | {"measured": {name: own.to_dict() for name, own in found.items()}}
                        for row, found in zip(part.rows, part.measured, strict=True)
                    ],
                }
                for part in self.parts
            ],
            "answers": [answer.to_dict() for answer in self.answers],
        }


def run_study(study: Study, *, command: str, say: Callable[[str], None]) -> StudyResult:
    """Bring every run of a study to its end, measure, and answer its questions.

    Measures on other images are left out where these cannot be had: the rest is worth having, and the same
    command measures them once the images are there.

    Args:
        study: From `plan_study`.
        command: What the manifests and the report state as the command.
        say: Told in a line what comes next.

    Raises:
        ValueError: A folder holds another run, or as `train`.
        KeyboardInterrupt: Ctrl-C; the run at hand was saved.
    """
    study = _with_data_at_hand(study, say)
    total, count = sum(run.seeds for run in study.runs), 0
    parts = []
    for part in study.parts:
        rows, numbers = [], []
        for planned in part.runs:
            runs, found = [], []
            for config, folder in zip(planned.configs, planned.folders, strict=True):
                count += 1
                say(f"{count} of {total}: {planned.label}, seed {config.train.seed}: {_state(folder)}")
                run = finish_run(config, folder, command=command)
                runs.append(run)
                found.append(
                    {
                        f"{measure.title}.{name}": own
                        for measure in part.measures
                        for name, own in measured(run, measure).items()
                    }
                )
            rows.append(Row(name=planned.label, runs=tuple(runs)))
            numbers.append({name: joined([own[name] for own in found]) for name in found[0]})
        parts.append(PartResult(plan=part, rows=tuple(rows), measured=tuple(numbers)))
    known = _known(parts)
    return StudyResult(
        study=study,
        command=command,
        parts=tuple(parts),
        answers=tuple(
            answer(question, known, {run.name: run.label for run in study.runs})
            for question in study.questions
        ),
    )


def _with_data_at_hand(study: Study, say: Callable[[str], None]) -> Study:
    """A study without the measures whose images cannot be had; found out before anything is trained.

    Images that every run was measured on already need not be there.
    """
    absent = []
    for part in study.parts:
        for measure in part.measures:
            folders = [folder for run in part.runs for folder in run.folders]
            if measure.dataset is None or all(kept(folder, measure) for folder in folders):
                continue
            wanted = part.runs[0].configs[0].data.model_copy(update={"name": measure.dataset})
            try:
                load_section(wanted)
            except ValueError as error:
                say(f"{measure.title} left out, which the same command measures later: {error}")
                absent.append(measure)
    return study.without(absent)


def write_numbers(folder: Path, found: StudyResult) -> None:
    """Write `study.json` and `study.csv` into a folder that is there."""
    write_whole(folder / "study.json", json.dumps(found.to_dict(), indent=1) + "\n")
    write_whole(folder / "study.csv", runs_csv(found.rows))


def answer(
    question: Question, known: Mapping[str, Mapping[str, Estimate]], labels: Mapping[str, str]
) -> Answer:
    """Decide a question: yes where all claims hold, no where one does not, else undecided.

    Args:
        question: With its claims.
        known: Run -> number -> value.
        labels: Run -> what it is called.
    """
    verdicts, sentences = [], []
    for claim in question.parts:
        verdict, sentence = decide(claim, known, labels)
        verdicts.append(verdict)
        alone = len(question.parts) == 1 or verdict == "not measured"
        sentences.append(sentence if alone else f"{sentence} {verdict.capitalize()}.")
    order: tuple[Verdict, ...] = ("no", "not measured", "undecided", "yes")
    found = next(verdict for verdict in order if verdict in verdicts)
    return Answer(ask=question.ask, verdict=found, sentences=tuple(sentences))


def decide(
    claim: Claim, known: Mapping[str, Mapping[str, Estimate]], labels: Mapping[str, str]
) -> tuple[Verdict, str]:
    """Whether a claim holds, and a sentence with the numbers that say so.

    It holds where the whole interval of the difference lies at or above what was claimed, it does not where
    the whole interval lies below.
    """
    unit = unit_of(claim.of)
    first, second = (known[run].get(claim.of) for run in (claim.run, claim.than))
    name = unit.name[0].upper() + unit.name[1:]
    if first is None or second is None:
        return "not measured", f"{name} of {labels[claim.run]} and {labels[claim.than]}: not measured."
    gap = difference(first, second)
    verdict: Verdict = "yes" if gap.low >= claim.by else "no" if gap.high < claim.by else "undecided"
    wanted = ""
    if claim.by > 0:
        wanted = f" Asked for: {unit.gap(claim.by)} more."
    elif claim.by < 0:
        wanted = f" Asked for: not more than {unit.gap(-claim.by)} less."
    sign, more = (1, "more") if gap.value >= 0 else (-1, "less")
    low, high = sorted((sign * gap.low, sign * gap.high))
    return verdict, (
        f"{name}: {unit.text(first.value)} ({labels[claim.run]}) against {unit.text(second.value)} "
        f"({labels[claim.than]}), which is "
        f"{unit.gap(abs(gap.value))} {more} (95 % interval {unit.number(low)} to {unit.number(high)}; "
        f"{'1 seed' if gap.seeds == 1 else f'{gap.seeds} seeds'}).{wanted}"
    )


def outline(study: Study, *, timed: bool = True) -> str:
    """What a study would do: every run, what it costs, and what is there already.

    Args:
        study: From `plan_study`.
        timed: Also time a few steps of each run that is not finished, for an estimate of the whole.
    """
    lines, seconds = [study.title], 0.0
    for part in study.parts:
        lines.append(f"{part.title}:")
        for planned in part.runs:
            counted = Counter(_state(folder) for folder in planned.folders)
            states = ", ".join(f"{count} {state}" for state, count in counted.items())
            config = planned.configs[0]
            what = f"{planned.recipe}, task {config.task.name}, {config.train.duration}"
            left = sum(not is_finished(folder) for folder in planned.folders)
            line = f"  {planned.label}: {planned.model}, {what}; {states}"
            if timed and left:
                cost = estimate(_standing_alone(planned))
                own = cost.seconds_per_epoch * cost.steps / cost.steps_per_epoch
                seconds += own * left
                line += f"; {cost.parameters:,} parameters, about {own:.0f} s each"
            lines.append(line)
        lines += [f"  measures: {', '.join(own.title for own in part.measures)}"] if part.measures else []
    if timed:
        lines.append(f"about {seconds / 60:.0f} minutes of training left, without evaluation")
    return "\n".join(lines)


def _standing_alone(planned: Planned) -> Any:
    """A config that costs about the same and needs no earlier run."""
    config = planned.configs[0]
    model = {**planned.options, "name": planned.model, "pretrained": None}
    update: dict[str, Any] = {"model": config.model.model_validate(model)}
    if config.task.name == "distill":
        update["task"] = config.task.model_validate({"name": "classify"})
    return config.model_copy(update=update)


def _state(folder: Path) -> str:
    if is_finished(folder):
        return "finished"
    return "goes on" if (folder / "checkpoints" / "last.pt").is_file() else "to be trained"


def _known(parts: list[PartResult]) -> dict[str, dict[str, Estimate]]:
    """Run -> number -> value; test and val are those by which a classifier is judged."""
    known: dict[str, dict[str, Estimate]] = {}
    for part in parts:
        for planned, row, found in zip(part.plan.runs, part.rows, part.measured, strict=True):
            scores = {"test": row.test, "val": row.val}
            known[planned.name] = found | {name: own for name, own in scores.items() if own is not None}
    return known


def score_name(part: PartResult) -> str:
    """What the runs of a part are judged by."""
    return " and ".join(name for score, name in NAMES.items() if any(row.score == score for row in part.rows))
