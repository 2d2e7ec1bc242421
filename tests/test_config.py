"""The run config: values from recipes and dotted keys, and one line for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from vitrail.config import RunConfig, list_recipes, load_config, parse_value, steps


@pytest.mark.parametrize("name", sorted(list_recipes()))
def test_every_recipe_loads_and_comes_back_from_its_yaml(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert load_config(path) == config
    assert len(list_recipes()[name]) > 20  # the header says what the recipe is


def test_dotted_keys_are_typed() -> None:
    config = load_config(
        "mnist-vit",
        {
            "optim.lr": "3e-4",
            "optim.betas": "[0.8, 0.9]",
            "train.progressive": '{"0%": 20}',
            "model.depth": "3",
            "task.label_smoothing": "0.1",
            "augment.flip": "true",
        },
    )
    assert config.optim.lr == 3e-4
    assert config.optim.betas == (0.8, 0.9)
    assert config.train.progressive == {"0%": 20}
    assert config.model.options == {"depth": 3}
    assert config.task.options == {"label_smoothing": 0.1}
    assert config.augment.flip is True


@pytest.mark.parametrize(
    ("text", "value"),
    [("3e-4", 3e-4), ("1E5", 1e5), ("5", 5), ("true", True), ("5 epochs", "5 epochs"), ("a: [", "a: [")],
)  # fmt: skip
def test_values_are_read_as_people_mean_them(text: str, value: object) -> None:
    assert parse_value(text) == value


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"optim.lrr": 1}, "unknown option --optim.lrr: did you mean --optim.lr or"),
        ({"optm.lr": 1}, "unknown option --optm.lr: did you mean --optim.lr or"),
        ({"lr": 1}, r"unknown option --lr: did you mean --optim.lr\?$"),
        ({"out": 1}, r"unknown option --out: did you mean --output or --train.output\?$"),
        ({"zzz": 1}, "unknown option --zzz: see vitrail train --help"),
        ({"optim.lr": "fast"}, "^optim.lr: expected a valid number, got 'fast'$"),
        (
            {"optim.name": "adma"},
            r"^optim.name: expected 'adamw' or 'muon', got 'adma'; did you mean adamw\?$",
        ),
        ({"optim.lr": -1}, "optim.lr: .*greater than 0"),
        ({"train.duration": "5"}, "train.duration: expected a number with a unit.*got 5"),
        (
            {"train.duration": "5 weeks"},
            r"train.duration: expected a number with a unit \([^)]*\), got '5 weeks'$",
        ),
        ({"optim.schedule": "cosin"}, "optim.schedule: .*'cosine'"),
        ({"train.batch_size": 0}, "train.batch_size"),
    ],
)
def test_mistakes_get_one_line(overrides: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_config(None, overrides)
    assert "\n" not in str(error.value)


def test_unknown_recipe_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown recipe 'mnist-vti': did you mean mnist-vit"):
        load_config("mnist-vti")
    with pytest.raises(ValueError, match="no recipe file"):
        load_config(tmp_path / "none.yaml")
    for content in ("a: [", "- 1", "", "train: 3"):
        path = tmp_path / "bad.yaml"
        path.write_text(content)
        with pytest.raises(ValueError) as error:  # noqa: PT011
            load_config(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("duration", "expected"),
    [("5 epochs", 500), ("1 epoch", 100), ("500 steps", 500), ("10%", 30), ("12800 images", 100),
     ("1k steps", 1000), ("0.128M images", 1000), ("0.5 epochs", 50)],
)  # fmt: skip
def test_durations_become_steps(duration: str, expected: int) -> None:
    assert steps(duration, batch_size=128, steps_per_epoch=100, total=300) == expected


def test_percent_of_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="percentage of itself"):
        steps("10%", batch_size=1, steps_per_epoch=1)


def test_every_option_is_described() -> None:
    for section in RunConfig.model_fields.values():
        for name, field in section.annotation.model_fields.items():
            assert field.description, name


def test_the_config_is_plain_yaml() -> None:
    assert yaml.safe_load(RunConfig().to_yaml())["data"]["name"] == "digits"
