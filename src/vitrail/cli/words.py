"""What several verbs do with their words: argparse with errors of one line, recipes with dotted keys."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

if TYPE_CHECKING:
    from vitrail.config import RunConfig

Verbs: TypeAlias = "argparse._SubParsersAction[Parser]"
"""What a verb adds its parser to: what `add_subparsers` gives, a class that argparse does not name."""

SOURCES = "a run or model folder, a file, an address, timm:NAME.TAG, torchvision:NAME, owner/name on the hub"
"""Where weights come from, for help."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, with the nearest verb where one was mistyped."""

    def error(self, message: str) -> NoReturn:
        """Raise the message as ValueError, which `main` prints."""
        raise ValueError(f"{message}; see `{self.prog} --help`")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            import difflib

            near = difflib.get_close_matches(str(value), list(action.choices), n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(action.choices)}"
            what = action.option_strings[0] if action.option_strings else "verb"
            raise ValueError(f"unknown {what} {value!r}: {hint}")


def split_recipe(words: list[str]) -> tuple[str | None, list[str]]:
    """[RECIPE] and flags -> the recipe, None where the first word is a flag, and the flags."""
    if words and not words[0].startswith("-"):
        return words[0], words[1:]
    return None, words


def parse_overrides(words: Sequence[str]) -> dict[str, str]:
    """`--section.key value`, `--section.key=value` and the short forms -> dotted key to text.

    A value that is true or false may be left out: then it is true.

    Raises:
        ValueError: A word where a flag was expected, or a flag without a value.
    """
    from vitrail.config import SHORT_KEYS, RunConfig

    switches = {key for _, section in RunConfig() for key, value in section if isinstance(value, bool)}
    found: dict[str, str] = {}
    position = 0
    while position < len(words):
        word = words[position]
        if not word.startswith("--"):
            raise ValueError(f"expected --section.key VALUE, got {word!r}")
        name, equals, value = word[2:].partition("=")
        key = name.replace("-", "_")
        if not equals:
            following = words[position + 1] if position + 1 < len(words) else None
            if following is not None and not following.startswith("--"):
                value, position = following, position + 1
            elif key.rpartition(".")[2] in switches:
                value = "true"
            else:
                raise ValueError(f"--{name} needs a value")
        if key == "epochs":
            value = f"{value} epochs"
        found[SHORT_KEYS.get(key, key)] = value
        position += 1
    return found


def read_config(
    own: argparse.ArgumentParser, words: list[str]
) -> tuple[str | None, argparse.Namespace, RunConfig]:
    """[RECIPE] and flags -> the recipe, the verb's own options, and the config of recipe and dotted keys."""
    from vitrail.config import load_config

    recipe, flags = split_recipe(words)
    options, rest = own.parse_known_args(flags)
    return recipe, options, load_config(recipe, parse_overrides(rest))


def run_name(config: RunConfig, recipe: str | None) -> str:
    """What a run is called that was given no folder: as its recipe, else as its model."""
    if recipe:
        return Path(recipe).stem
    if config.model.name:
        return config.model.name
    return "run" if config.model.pretrained is None else f"{Path(config.model.pretrained).stem}-tuned"
