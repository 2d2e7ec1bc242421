"""Parameter names of other libraries as rules that work in both directions.

A rule says which tensors of theirs make which of ours: `{n}` and `{m}` stand for numbers, `{p}` for weight or
bias, `{rest}` for anything. What no rule names keeps its name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Change = Callable[[Sequence[Tensor]], Sequence[Tensor]]

_PLACEHOLDERS = {"n": r"\d+", "m": r"\d+", "p": "weight|bias", "rest": ".+"}


def _as_they_are(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return tensors


@dataclass(frozen=True)
class Rule:
    """Some tensors of theirs are some tensors of ours."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    to_ours: Change = _as_they_are
    """Tensors in the order of `theirs` -> those in the order of `ours`."""
    to_theirs: Change = _as_they_are
    """The way back."""


def renamed(ours: str, theirs: str) -> Rule:
    """The same tensor under another name."""
    return Rule((ours,), (theirs,))


def joined(ours: str, *theirs: str) -> Rule:
    """Several of theirs, one under the other, are one of ours: queries, keys and values."""
    return Rule(
        (ours,),
        theirs,
        to_ours=lambda parts: [torch.cat(list(parts))],
        to_theirs=lambda whole: whole[0].chunk(len(theirs)),
    )


def translate(state: Mapping[str, Tensor], rules: Iterable[Rule], *, to_ours: bool) -> dict[str, Tensor]:
    """Rename and rearrange the tensors of a state dictionary.

    Args:
        state: Names and tensors; not changed.
        rules: Tried in this order; a tensor is used by the first that names it.
        to_ours: Read theirs, or write theirs.

    Returns:
        The tensors under the other names; those that no rule names, under their own.

    Raises:
        ValueError: Two tensors would have the same name.
    """
    left, translated = dict(state), dict[str, Tensor]()
    for rule in rules:
        source, target = (rule.theirs, rule.ours) if to_ours else (rule.ours, rule.theirs)
        change = rule.to_ours if to_ours else rule.to_theirs
        pattern = _pattern(source[0])
        for name in list(left):
            match = pattern.fullmatch(name)
            if match is None:
                continue
            places = match.groupdict()
            wanted = [template.format(**places) for template in source]
            if any(other not in left for other in wanted):
                continue
            tensors = change([left.pop(other) for other in wanted])
            for template, tensor in zip(target, tensors, strict=True):
                _put(translated, template.format(**places), tensor)
    for name, tensor in left.items():
        _put(translated, name, tensor)
    return translated


def _put(state: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    if name in state:
        raise ValueError(f"two tensors would be called {name}: weights of two models in one file")
    state[name] = tensor


def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)  # text, placeholder, text, ...
    return re.compile(
        "".join(
            f"(?P<{part}>{_PLACEHOLDERS[part]})" if number % 2 else re.escape(part)
            for number, part in enumerate(parts)
        )
    )
