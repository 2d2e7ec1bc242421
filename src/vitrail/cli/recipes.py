"""`vitrail recipes`: list the recipes."""

from __future__ import annotations

import argparse

from vitrail.cli.words import Verbs


def add(verbs: Verbs) -> None:
    """Add `recipes` to the verbs."""
    parser = verbs.add_parser("recipes", help="list the recipes")
    parser.set_defaults(act=run)


def run(_options: argparse.Namespace) -> None:
    """Print each recipe's name and its first line."""
    from vitrail.config import list_recipes

    recipes = list_recipes()
    width = max(len(name) for name in recipes)
    for name, about in recipes.items():
        print(f"{name:<{width}}  {about}")
