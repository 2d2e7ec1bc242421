"""The command line: `vitrail VERB ...`, a file each verb, which parses, calls the library and prints.

Each has `add`, which adds it to the help with the flags that it has, and `run`. `words` and `images` hold
what several verbs share. Only the standard library is imported before a verb runs, so that help and typing
errors answer at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from vitrail.cli import (
    adaptive,
    analyze,
    bench,
    compare,
    convert,
    data,
    download,
    evaluate,
    explain,
    export,
    lr_range,
    models,
    optimize,
    predict,
    probe,
    profile,
    recipes,
    report,
    study,
    summary,
    sweep,
    train,
)
from vitrail.cli.words import Parser
from vitrail.malloc import keep_freed_memory

_VERBS = (
    train,
    sweep,
    study,
    compare,
    profile,
    lr_range,
    evaluate,
    probe,
    adaptive,
    predict,
    explain,
    analyze,
    report,
    data,
    models,
    optimize,
    bench,
    summary,
    convert,
    export,
    download,
    recipes,
)
"""In the order of the help."""

_READ_WORDS = {
    "train": train.run,
    "sweep": sweep.run,
    "study": study.run,
    "profile": profile.run,
    "lr-range": lr_range.run,
    "summary": summary.run,
}
"""These take any dotted key as a flag, which argparse cannot know, and so read their words themselves."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; leaves with exit code 2 and one line on an error of the user's."""
    keep_freed_memory()
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    try:
        _run([word for word in words if word != "--debug"])
    except BrokenPipeError:
        # Whoever read the output has gone (as in `vitrail models | head`): nothing is left to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt as stopped:
        how = str(stopped) or "interrupted; a training run goes on from its last checkpoint with --resume"
        _fail(how, code=130)
    except (ValueError, OSError) as error:
        if debug:
            raise
        if isinstance(error, OSError) and error.filename:
            _fail(f"{error.filename}: {error.strerror}")
        _fail(" ".join(str(error).split()))
    except (RuntimeError, MemoryError) as error:
        from vitrail.training.memory import is_out_of_memory

        if debug or not is_out_of_memory(error):
            raise
        _fail("out of memory: take smaller batches, smaller images or a smaller model")


def _run(words: list[str]) -> None:
    reads_words = _READ_WORDS.get(words[0].replace("_", "-")) if words else None
    if reads_words is not None:
        reads_words(words[1:])
        return
    parser = Parser(
        prog="vitrail",
        description="Build, train, measure and look inside Vision Transformers.",
        epilog="`vitrail VERB --help` tells more. First steps: vitrail train digits-vit",
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    verbs = parser.add_subparsers(metavar="VERB", parser_class=Parser)
    for verb in _VERBS:
        verb.add(verbs)
    options, rest = parser.parse_known_args(words)
    if rest:
        raise ValueError(f"unrecognized arguments: {' '.join(rest)}; see `vitrail {words[0]} --help`")
    if options.version:
        from importlib.metadata import version

        print(f"vitrail {version('vitrail')}")
    elif "act" in options:
        options.act(options)
    else:
        parser.print_help()


def _fail(message: str, code: int = 2) -> NoReturn:
    print(f"vitrail: {message}", file=sys.stderr)
    raise SystemExit(code)
