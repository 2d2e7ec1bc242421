"""`vitrail models`: list the models with their parameters, cost and published accuracy."""

from __future__ import annotations

import argparse
import json
import shutil

from vitrail.cli.words import Verbs

_LISTED_WEIGHTS = 24
"""So many sources of weights `vitrail models` lists below its table; of more it only says where they are."""


def add(verbs: Verbs) -> None:
    """Add `models` to the verbs."""
    parser = verbs.add_parser("models", help="list the models: parameters, cost, published accuracy")
    parser.add_argument(
        "pattern", nargs="?", default="*", help="shell-style pattern ('vit_*_224'), or a part of the name"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(act=run)


def run(options: argparse.Namespace) -> None:
    """Print the models of a pattern, and where few are found, the weights that there are of them."""
    from vitrail.models.catalogue import find_variants, table
    from vitrail.pretrained.weights import weights_of

    found = find_variants(options.pattern)
    if options.json:
        listed = [variant.to_dict() | {"weights": weights_of(variant.name)} for variant in found]
        print(json.dumps(listed, indent=2))
        return
    print(table(found, shutil.get_terminal_size().columns))
    lines = [f"  {source}" for variant in found for source in weights_of(variant.name)]
    if 0 < len(lines) <= _LISTED_WEIGHTS:
        print("\nweights, for --model.pretrained and `vitrail download`")
        print("\n".join(lines))
    elif lines:
        print("\n`vitrail models NAME` also lists a model's weights")
