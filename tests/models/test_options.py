"""Options of every architecture: whatever is given, a model comes out or one line says what is wrong."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from vitrail.models import VARIANTS, build_model, model_config

ONE_OF_EACH = {type(config): name for name, config in VARIANTS.items()}.values()
VALUES = [-1, 0, 3, 0.3, 1e-9, math.nan, math.inf, True, False, (), (2, 0), "text", None, {}]


def _outcome(name: str, option: str, value: Any) -> Exception | None:
    try:
        with torch.device("meta"):
            build_model(name, **{option: value})
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_any_value_of_any_option_builds_or_is_refused_in_one_line(name: str) -> None:
    options = [field.name for field in dataclasses.fields(model_config(name))]
    outcomes = {(own, repr(value)): _outcome(name, own, value) for own in options for value in VALUES}
    refused = {key: error for key, error in outcomes.items() if error is not None}
    assert {key for key in outcomes if key[1] in ("{}", "'text'")} <= refused.keys()
    wrong = {key: error for key, error in refused.items() if type(error) is not ValueError}
    assert not wrong
    assert not [error for error in refused.values() if "\n" in str(error)]
