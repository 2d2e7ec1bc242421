"""Warnings while a run goes on: divergence, a loss that never moves, gradients, collapse of the attention and
of features that are learnt without labels.

Nothing here costs a step anything: `Watch` reads the records that the loop writes anyway, and
`attention_collapse` runs at evaluation points, one forward pass of a small fixed batch.

Sources: Zhai et al. 2023, "Stabilizing Transformer Training by Preventing Attention Entropy Collapse"; Dong
et al. 2021, "Attention is not all you need: pure attention loses rank doubly exponentially with depth"
(tokens that become all alike; others call it oversmoothing); Roy and Vetterli 2007, "The effective rank";
Chen and He 2021, "Exploring Simple Siamese Representation Learning" (collapse of features, and its measure);
Caron et al. 2021, DINO, section 5.3 (both ways in which a teacher collapses).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from vitrail.explain.health import (
    HIGH_ENTROPY,
    HIGH_SIMILARITY,
    LOW_ENTROPY,
    LOW_RANK,
    CollapseReport,
)

PATIENCE = {"train": 3, "val": 2}
"""Records in a row that must agree before something is said, and before it may be said again: a training
record is the mean over few steps, and a single bad batch is no trend; evaluations are rarer and steadier."""
LOST_SHARE = 0.5
"""Divergence: this share of what the loss had fallen is lost again. Larger images, or stronger augmentation
from some point on, cost less."""
LEARNT_SHARE = 0.1
"""How far the loss must have fallen, as a share of where it began, before it can be said to rise."""
STUCK_SHARE = 0.1
"""Stuck: the share of the run over which the loss has not fallen; the usual warm-up takes half of that."""
STUCK_RECORDS = 5
"""And the least number of records, for short runs."""
MOVED = 0.02
"""A loss this far below chance, as a share of chance, has moved: noise of a mean over 50 steps is smaller."""
CLIPPED = 10.0
"""Exploding gradients: norms beyond `clip_norm` by this factor ..."""
CLIPPED_SHARE, CLIPPED_RECORDS = 0.9, 20
"""... in more than this share of this many records. Early norms of 10 to 20 are normal, for some records."""
VANISHED = 1e-6
"""A gradient norm below this, over even 10,000 weights, is 1e-8 a weight: AdamW's epsilon, below which its
steps shrink."""
LOW_SPREAD = 0.06
"""Features whose spread over the sphere lies below this have collapsed. Measured on digits: fresh models have
0.11 to 0.7, sound runs of every task 0.26 and more, collapsed ones (learning rate ten to a hundred times too
high, a target encoder without momentum) 0.005 to 0.05 from the second epoch on."""
LOW_DIRECTIONS = 2.0
"""Effective rank of features that lie on little more than a line; two classes, well told apart, need no more,
so it counts only where the neighbours have not become better either."""
LOW_TARGET = 0.3
"""Standard deviation of JEPA's targets, 1 at best; sound runs have 0.55 to 0.88, collapsed ones up to 0.2."""
TEACHER_ENTROPY = (0.01, 0.998)
"""Of DINO's teacher, over its largest: below, one prototype answers for all images; above, all answer alike.
Sound runs begin at 0.4 and come up to 0.98, collapsed ones reach 0.999."""
FOLLOWED = ("target_std", "teacher_entropy")
"""Numbers of tasks whose targets move with the model: there a loss may rise while all is well, and fall while
everything collapses."""


class Watch:
    """Reads the records of a run and says what is wrong with it, each thing once.

    It is said again only where it was right in between, for as many records (`PATIENCE`). A resumed run shows
    it the records before: what was said then is not said again.

    Args:
        total: Steps of the whole run.
        clip_norm: Largest gradient norm; 0: no clipping, and no warning about it.
        num_classes: K of a classification, whose loss by chance is ln K; None: what the loss was first is
            what it is measured against.
    """

    def __init__(self, *, total: int, clip_norm: float, num_classes: int | None = None) -> None:
        self.total, self.clip_norm = total, clip_norm
        self._by_labels = num_classes is not None
        self._chance = None if num_classes is None else math.log(num_classes)
        self._first_neighbours: float | None = None
        self._best_neighbours = 0.0
        self._lowest = math.inf
        self._flat_since: int | None = None
        self._flat_records = 0
        self._clipped: deque[bool] = deque(maxlen=CLIPPED_RECORDS)
        self._alarms: dict[str, _Alarm] = {}

    def observe(self, record: Mapping[str, Any]) -> list[str]:
        """Take in a record ("train", or "val" with a `CollapseReport` under "collapse").

        A "val" record of features without a classifier also has "feature_std", "effective_rank" and
        "knn_accuracy".

        Returns:
            Warnings, each one line with advice; mostly none.
        """
        if record["kind"] == "train":
            found = self._training(record)
        elif "collapse" in record:
            early = record["step"] < STUCK_SHARE * self.total
            found = _collapse(record["collapse"], early=early)
            if "feature_std" in record:
                found |= self._features(record, early=early)
        else:
            return []
        warnings = []
        for name, text in found.items():
            alarm = self._alarms.setdefault(name, _Alarm(PATIENCE[record["kind"]]))
            if alarm.rings(text is not None) and text is not None:
                warnings.append(text)
        return warnings

    def _training(self, record: Mapping[str, Any]) -> dict[str, str | None]:
        """Every check by name, with its warning or None."""
        loss, step = record["loss"], record["step"]
        if self._chance is None:
            self._chance = loss
        chance = self._chance
        self._lowest = min(self._lowest, loss)
        found = {
            "exploded": self._exploded(record["grad_norm"]),
            "vanished": self._vanished(record, chance),
        }
        if any(name in record for name in FOLLOWED):
            return found | _followed(record)
        return found | {
            "diverged": self._diverged(loss, chance),
            "stuck": self._stuck(loss, chance, step, record["lr"]),
        }

    def _diverged(self, loss: float, chance: float) -> str | None:
        fallen = chance - self._lowest
        if fallen < LEARNT_SHARE * abs(chance) or loss < self._lowest + LOST_SHARE * fallen:
            return None
        return (
            f"the loss rises: {loss:.3f} after {self._lowest:.3f}; lower optim.lr, lengthen optim.warmup, or "
            "lower optim.clip_norm"
        )

    def _stuck(self, loss: float, chance: float, step: int, rate: float) -> str | None:
        if loss < chance - MOVED * abs(chance):
            self._flat_since, self._flat_records = None, 0
            return None
        if self._flat_since is None:
            self._flat_since = step
        self._flat_records += 1
        if self._flat_records < STUCK_RECORDS or step - self._flat_since < STUCK_SHARE * self.total:
            return None
        what, first, look = (
            "fallen from where it began",
            "first",
            "whether the augmentation leaves enough to see",
        )
        if self._by_labels:
            what, first, look = "moved from chance", "chance", "whether images and labels belong together"
        return (
            f"the loss has not {what} ({loss:.3f}, {first} {chance:.3f}) since step "
            f"{self._flat_since} at a learning rate of {rate:.1e}; lower optim.lr or lengthen optim.warmup "
            f"(`vitrail lr-range` finds a rate), and look {look}"
        )

    def _exploded(self, norm: float) -> str | None:
        if not self.clip_norm:
            return None
        self._clipped.append(norm > CLIPPED * self.clip_norm)
        share = sum(self._clipped) / CLIPPED_RECORDS
        if share <= CLIPPED_SHARE:
            return None
        return (
            f"gradients explode: {100 * share:.0f} % of the last {CLIPPED_RECORDS} norms are more than "
            f"{CLIPPED:g} times optim.clip_norm (now {norm:.1f}); lower optim.lr, lengthen optim.warmup, or "
            "try qk_norm"
        )

    def _vanished(self, record: Mapping[str, Any], chance: float) -> str | None:
        if record["grad_norm"] >= VANISHED or record["loss"] < LEARNT_SHARE * chance:  # or all is learnt
            return None
        return (
            f"gradients vanish (norm {record['grad_norm']:.1e}) at a loss of {record['loss']:.3f}; lower "
            "optim.lr, try another model.init, or look for parts that are cut off from the loss"
        )

    def _features(self, record: Mapping[str, Any], *, early: bool) -> dict[str, str | None]:
        """Every sign that features become worth less, with its warning or None."""
        spread, rank, now = (record[key] for key in ("feature_std", "effective_rank", "knn_accuracy"))
        first = self._first_neighbours = now if self._first_neighbours is None else self._first_neighbours
        best = self._best_neighbours = max(self._best_neighbours, now)
        advice = (
            "lower optim.lr, lengthen optim.warmup, take a larger train.batch_size, or bring the task's "
            "momentum or temperature back to its default"
        )
        return {
            "spread": f"the features of all images are nearly alike (spread {spread:.3f}): {advice}"
            if spread < LOW_SPREAD and not early
            else None,
            "directions": f"the features use hardly more than one direction (rank {rank:.1f}): {advice}"
            if rank < LOW_DIRECTIONS and now <= first and not early
            else None,
            "neighbours": f"the features get worse (k-NN accuracy {100 * now:.1f} % after "
            f"{100 * best:.1f} %): stop here, lower optim.lr, or shorten train.duration"
            if now < LOST_SHARE * best
            else None,
        }


def _followed(record: Mapping[str, Any]) -> dict[str, str | None]:
    """Signs that targets which move with the model have collapsed, with the warning or None."""
    found: dict[str, str | None] = {}
    if (deviation := record.get("target_std")) is not None:
        found["targets"] = (
            f"the targets of all patches become alike (deviation {deviation:.2f}, 1 at best): raise "
            "task.momentum (0.996), or lower optim.lr"
            if deviation < LOW_TARGET
            else None
        )
    if (entropy := record.get("teacher_entropy")) is not None:
        low, high = TEACHER_ENTROPY
        found["one prototype"] = (
            f"the teacher gives all images one answer (entropy {entropy:.3f}): raise "
            "task.teacher_temperature, or let its centre follow faster (lower task.centre_momentum)"
            if entropy < low
            else None
        )
        found["no answer"] = (
            f"the teacher's answer is the same for all prototypes (entropy {entropy:.3f}): lower "
            "task.teacher_temperature or optim.lr, or raise task.momentum"
            if entropy > high
            else None
        )
    return found


def _collapse(report: CollapseReport, *, early: bool) -> dict[str, str | None]:
    """Every sign of collapse by name, with its warning or None."""

    def blocks(measure: str, bad: Callable[[float], bool]) -> tuple[list[str], int]:
        values = {name: own[measure] for name, own in report.items() if measure in own}
        return [name for name, value in values.items() if bad(value)], len(values)

    def line(names: list[str], what: str, advice: str) -> str | None:
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        return f"{what} in {shown}: {advice}" if names else None

    single, _ = blocks("entropy", lambda value: value < LOW_ENTROPY)
    uniform, attentions = blocks("entropy", lambda value: value > HIGH_ENTROPY)
    flat, _ = blocks("rank", lambda value: value < LOW_RANK)
    alike, _ = blocks("similarity", lambda value: value > HIGH_SIMILARITY)
    return {
        "single": line(
            single,
            "attention has collapsed onto single tokens",
            "lower optim.lr, lengthen optim.warmup, or take --model.qk_norm true",
        ),
        # A uniform block among others mixes tokens, and does so usefully.
        "uniform": line(
            uniform if len(uniform) == attentions and not early else [],
            "attention is uniform",
            "raise optim.lr or train longer, or take --model.init xavier",
        ),
        "flat": line(
            flat,
            "the tokens of all images span few directions",
            "lower optim.lr, lengthen optim.warmup, or take LayerScale (--model.layer_scale 1e-4)",
        ),
        "alike": line(
            alike,
            "the tokens of an image are all alike",
            "lower optim.lr, or take LayerScale (--model.layer_scale 1e-4) or fewer blocks",
        ),
    }


class _Alarm:
    """Rings when something is bad `patience` times in a row, and again only after it was good as often."""

    def __init__(self, patience: int) -> None:
        self._patience, self._on, self._against = patience, False, 0

    def rings(self, bad: bool) -> bool:
        self._against = self._against + 1 if bad != self._on else 0
        if self._against < self._patience:
            return False
        self._on, self._against = bad, 0
        return bad
