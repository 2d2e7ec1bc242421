"""A study as data: which runs are trained, what is measured on them, and what they are asked.

A study is a YAML file:

    title: Masked, contrastive, or both?
    about: One paragraph.
    values: {model.img_size: 28}                  # of all runs, below their own
    quick: {train.duration: 40 steps}             # with --quick, above their own
    parts:
      - title: Pre-training
        runs:
          mae: {recipe: mnist-mae}
          tuned: {recipe: mnist-vit, seeds: 3, model.pretrained: "{mae}"}     # starts from an earlier run
          again: {like: tuned, optim.lr: 1.0e-3}  # another run with some values changed
        measures:
          - {kind: probe}
    questions:
      - ask: Does the smaller rate help?
        parts: [{run: again, than: tuned, of: test, by: 0.01}]                # by one point or more

Keys with a dot are values of the run's config, those without say where it comes from. `{name}` in
`model.pretrained` and `task.teacher` is an earlier run: that with the same seed, or its only one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vitrail.config import RunConfig, load_config, nearest, read_yaml
from vitrail.evaluation.corruptions import CORRUPTIONS
from vitrail.models import model_config
from vitrail.tasks import find_task
from vitrail.training import architecture

_REFERENCE = re.compile(r"^\{(.+)\}$")
_REFERRING = ("model.pretrained", "task.teacher")

NUMBERS: dict[str, tuple[str, ...]] = {
    "probe": ("linear", "knn"),
    "dense": ("r2",),
    "heads": ("distance",),
    "robustness": (*CORRUPTIONS, "mean"),
}
"""Kind of a measure -> what it can find."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Measure(_Part):
    """Something that is measured on the finished runs of a part."""

    kind: Literal["probe", "dense", "heads", "robustness"]
    """probe: neighbours and a linear classifier on frozen features; dense: a linear probe of single patches;
    heads: how far attention reaches; robustness: accuracy on damaged images."""
    name: str = ""
    """What it is called; its kind when not given."""
    dataset: str | None = None
    """Of probe: other images than the run's own; left out with --quick."""
    train_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Of probe: share of the training images that the probe learns from."""
    corruptions: tuple[str, ...] = tuple(CORRUPTIONS)
    """Of robustness: which damage."""

    @property
    def title(self) -> str:
        """The name, or the kind."""
        return self.name or self.kind

    def numbers(self) -> tuple[str, ...]:
        """What it finds."""
        return (*self.corruptions, "mean") if self.kind == "robustness" else NUMBERS[self.kind]


class Claim(_Part):
    """That one run has more of something than another."""

    run: str
    than: str
    of: str
    """test, val, or a number of a measure: `probe.linear`."""
    by: float = 0.0
    """At least by so much; below zero: not less by more than that."""


class Question(_Part):
    """Something that the study is asked; yes where all claims hold, no where one does not."""

    ask: str
    parts: Annotated[tuple[Claim, ...], Field(min_length=1)]


class _PartOfStudy(_Part):
    title: str
    about: str = ""
    runs: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    measures: tuple[Measure, ...] = ()


class _StudyFile(_Part):
    title: str
    about: str
    values: dict[str, Any] = {}
    quick: dict[str, Any] = {}
    parts: Annotated[tuple[_PartOfStudy, ...], Field(min_length=1)]
    questions: tuple[Question, ...] = ()


class _Origin(_Part):
    recipe: str | None = None
    like: str | None = None
    seeds: Annotated[int, Field(ge=1)] | None = None
    label: str | None = None


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One run of a study: a config with several seeds."""

    name: str
    label: str
    recipe: str
    values: dict[str, Any]
    """What it changes in the recipe."""
    seeds: int
    configs: tuple[RunConfig, ...] = ()
    """One a seed, with the folders of earlier runs in place of their names."""
    folders: tuple[Path, ...] = ()
    """Run folders, one a seed."""
    model: str = ""
    """Name of the architecture."""
    options: dict[str, Any]
    """And its options, as far as the config tells."""


@dataclass(frozen=True, kw_only=True)
class PlannedPart:
    """Runs that stand in one table, and what is measured on them."""

    title: str
    about: str
    runs: tuple[Planned, ...]
    measures: tuple[Measure, ...]


@dataclass(frozen=True, kw_only=True)
class Study:
    """Everything that a study will do, checked."""

    name: str
    title: str
    about: str
    parts: tuple[PlannedPart, ...]
    questions: tuple[Question, ...]
    quick: bool
    """A try with very short runs, whose answers prove nothing."""
    left_out: tuple[str, ...] = ()
    """Measures that it leaves out: those on other images, with --quick or where these cannot be had."""

    @property
    def runs(self) -> tuple[Planned, ...]:
        """The runs of all parts, in the order in which they are made."""
        return tuple(run for part in self.parts for run in part.runs)

    def without(self, measures: Collection[Measure]) -> Study:
        """The same without some of its measures."""
        parts = tuple(
            replace(part, measures=tuple(own for own in part.measures if own not in measures))
            for part in self.parts
        )
        return replace(self, parts=parts, left_out=(*self.left_out, *(own.title for own in measures)))


def plan_study(
    name: str | Path,
    folder: Path,
    *,
    overrides: Mapping[str, Any] | None = None,
    seeds: int | None = None,
    quick: bool = False,
) -> Study:
    """Read a study and check every config in it; nothing is trained or written.

    Args:
        name: One that comes with the package (`vitrail study` lists them), or a YAML file.
        folder: Where the run folders will lie.
        overrides: Dotted keys for all runs, above everything that the study says.
        seeds: Number of seeds of every run, instead of the study's own.
        quick: A try: with the study's `quick` values and one seed, and without measures on other data sets.

    Raises:
        ValueError: No such study, or anything in it that does not fit, in one line.
    """
    if seeds is not None and seeds < 1:
        raise ValueError(f"seeds: expected at least 1, got {seeds}")
    overrides = dict(overrides or {})
    for key, option in (("train.seed", "--seeds N"), ("train.output", "--output FOLDER")):
        if key in overrides:
            raise ValueError(
                f"a study holds several runs, each with a {key} of its own: give {option} instead"
            )
    try:
        file = _StudyFile.model_validate(read_yaml(name, "studies", "study"))
    except ValidationError as error:
        raise ValueError(f"study {name}: {_first(error)}") from None
    above = (file.quick if quick else {}) | overrides
    seeds = seeds or (1 if quick else None)
    planned: dict[str, Planned] = {}
    parts = []
    for part in file.parts:
        for run, content in part.runs.items():
            if run in planned:
                raise ValueError(f"study {name}: there are two runs {run}")
            try:
                planned[run] = _planned(run, content, planned, folder, file.values, above, seeds)
            except ValueError as error:
                raise ValueError(f"study {name}, run {run}: {error}") from None
        for measure in part.measures:
            _check_measure(f"study {name}, {part.title}", measure, [planned[run] for run in part.runs])
        parts.append(
            PlannedPart(
                title=part.title,
                about=part.about,
                runs=tuple(planned[run] for run in part.runs),
                measures=part.measures,
            )
        )
    for question in file.questions:
        for claim in question.parts:
            _check_claim(f"study {name}, {question.ask!r}", claim, parts)
    study = Study(
        name=Path(name).stem,
        title=file.title,
        about=" ".join(file.about.split()),
        parts=tuple(parts),
        questions=file.questions,
        quick=quick,
    )
    elsewhere = [own for part in parts for own in part.measures if own.dataset]
    return study.without(elsewhere) if quick else study


def _planned(
    name: str,
    content: dict[str, Any],
    earlier: Mapping[str, Planned],
    folder: Path,
    below: Mapping[str, Any],
    above: Mapping[str, Any],
    seeds: int | None,
) -> Planned:
    try:
        origin = _Origin.model_validate({key: value for key, value in content.items() if "." not in key})
    except ValidationError as error:
        raise ValueError(_first(error)) from None
    if (origin.recipe is None) == (origin.like is None):
        raise ValueError("expected either recipe: NAME, or like: RUN")
    recipe, count, values = origin.recipe, origin.seeds, dict(below)
    if origin.like is not None:
        other = _earlier(origin.like, earlier)
        recipe, values = other.recipe, dict(other.values)
        count = count or other.seeds
    assert recipe is not None
    values |= {key: value for key, value in content.items() if "." in key}
    count = seeds or count or 1
    shown = values | dict(above)
    configs = []
    for seed in range(count):
        found = shown | {"train.seed": seed}
        for key in _REFERRING:
            if (reference := _referred(found.get(key))) is not None:
                other = _earlier(reference, earlier)
                if count > other.seeds > 1:
                    raise ValueError(f"{reference} has {other.seeds} seeds, {name} {count}")
                found[key] = str(other.folders[seed if other.seeds > 1 else 0])
        configs.append(load_config(recipe, found))
    start = _referred(shown.get("model.pretrained"))
    if start is None:
        model, options, _ = architecture(configs[0])
    else:
        # What it starts from need not be there yet; its architecture is known.
        other, section = _earlier(start, earlier), configs[0].model
        model, options = other.model, other.options | section.options
        if section.name not in (None, model):
            raise ValueError(f"{start} is a {model}, not a {section.name}")
    model_config(model, **options)  # refuses options that do not fit
    find_task(configs[0].task.name)
    return Planned(
        name=name,
        label=origin.label or name,
        recipe=recipe,
        values=values,
        seeds=count,
        configs=tuple(configs),
        folders=tuple(folder / name / f"seed{seed}" for seed in range(count)),
        model=model,
        options=options,
    )


def _first(error: ValidationError) -> str:
    """Where the first mistake is, and what."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _referred(value: Any) -> str | None:
    """The name in `{name}`; None for anything else."""
    found = _REFERENCE.match(value) if isinstance(value, str) else None
    return None if found is None else found[1]


def _earlier(name: str, earlier: Mapping[str, Planned]) -> Planned:
    if name not in earlier:
        raise ValueError(f"no earlier run {name!r}: {nearest(name, earlier)}")
    return earlier[name]


def _check_measure(where: str, measure: Measure, runs: list[Planned]) -> None:
    for corruption in measure.corruptions:
        if corruption not in CORRUPTIONS:
            raise ValueError(
                f"{where}: unknown corruption {corruption!r}: {nearest(corruption, CORRUPTIONS)}"
            )
    for run in runs:
        if measure.kind == "robustness" and not find_task(run.configs[0].task.name).classifies:
            raise ValueError(f"{where}: {run.name} is no classifier, so it has no robustness")


def _check_claim(where: str, claim: Claim, parts: list[PlannedPart]) -> None:
    measured = {run.name: part.measures for part in parts for run in part.runs}
    for run in (claim.run, claim.than):
        if run not in measured:
            raise ValueError(f"{where}: no run {run!r}: {nearest(run, measured)}")
        known = ["test", "val", *(f"{own.title}.{name}" for own in measured[run] for name in own.numbers())]
        if claim.of not in known:
            raise ValueError(f"{where}: {run} has no {claim.of!r}: {nearest(claim.of, known)}")
