"""Options of every task: what is not of their kind gets one line that says what was expected."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from vitrail.models import build_model
from vitrail.tasks import TASKS, build_task

OPTIONS = [
    (name, option)
    for name, kind in TASKS.items()
    for option in inspect.signature(kind).parameters
    if option != "model"
]


@pytest.mark.parametrize(("name", "option"), OPTIONS)
@pytest.mark.parametrize("value", [{"no": "value"}, "surely not"])
def test_values_of_another_kind_are_refused(name: str, option: str, value: Any) -> None:
    model = build_model("vit_mnist_2blk", embed_dim=16, num_heads=2)
    with pytest.raises(ValueError, match=rf"task {name}, option {option}: .*, got {value!r}"):
        build_task(name, model, **{option: value})


def test_what_yaml_takes_for_text_or_a_list_fits() -> None:
    task: Any = build_task("mae", build_model("vit_mnist_2blk"), ratio="1e-1", decoder_depth=1.0)
    assert task.ratio == 0.1
    assert len(task.decoder.blocks) == 1
    assert build_model("vit_mnist_2blk", img_size=[28, 35], depth="1").config.image_shape == (28, 35)
