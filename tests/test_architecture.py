"""The house: imports run one way, nothing happens at import, no peer in the models."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "vitrail"

# docs/architecture.md, section 1: what a part may import of the others.
MAY_IMPORT = {
    "config": set(),
    "files": set(),
    "malloc": set(),
    "noise": set(),
    "processes": set(),
    "torchvision_ops": set(),
    "components": set(),
    "models": {"components"},
    "pretrained": {"models", "components.position", "files", "noise", "torchvision_ops"},
    "datasets": {"config"},
    "tasks": {"components", "models.encoder", "models.options", "config", "processes"},
    "training": {
        "models",
        "tasks",
        "datasets",
        "pretrained",
        "evaluation",
        "components.tap",
        "explain.health",
        "config",
        "files",
        "processes",
    },
    "evaluation": {"models.encoder", "datasets", "components", "files", "processes", "torchvision_ops"},
    "explain": {"components.flow", "components.tap", "models.encoder"},
    "reporting": {"explain", "evaluation", "datasets", "models.encoder", "components.tap", "config", "files"},
    "studies": {
        "config",
        "datasets",
        "evaluation",
        "explain",
        "files",
        "models",
        "pretrained",
        "tasks",
        "training",
    },
    "serving": {"models", "pretrained", "datasets", "explain", "files"},
    "shipping": {"models", "pretrained", "datasets", "evaluation", "components", "files", "noise"},
    "bench": {
        "models",
        "pretrained",
        "evaluation",
        "explain.draw",
        "training.manifest",
        "shipping.export",
        "files",
        "malloc",
        "torchvision_ops",
    },
    "adaptive": {"models", "components.tap", "datasets", "evaluation", "explain.draw"},
}
FREE = {"cli", "quickstart", "__init__", "__main__"}


def _imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_run_one_way(path: Path) -> None:
    part = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if part in FREE:
        return
    for name in _imports(path):
        if not name.startswith("vitrail.") or name.count(".") < 1:
            continue
        inside = name.removeprefix("vitrail.")
        other = inside.split(".")[0]
        allowed = MAY_IMPORT[part]
        assert other == part or any(
            inside == may or inside.startswith(may + ".") or may.startswith(inside + ".") for may in allowed
        ), f"{path.relative_to(SOURCE)} must not import {name}"


def test_models_import_no_peer() -> None:
    for folder in ("components", "models"):
        for path in (SOURCE / folder).rglob("*.py"):
            roots = {name.split(".")[0] for name in _imports(path)}
            assert not roots & {"timm", "transformers", "torchvision", "accelerate"}, path


def test_only_the_front_door_imports_the_command_line() -> None:
    for path in _files():
        if path.relative_to(SOURCE).parts[0] not in {"cli", "__main__.py"}:
            assert not any(f"{name}.".startswith("vitrail.cli.") for name in _imports(path)), path


def test_every_part_is_in_the_table() -> None:
    parts = {path.relative_to(SOURCE).parts[0].removesuffix(".py") for path in _files()}
    assert parts == set(MAY_IMPORT) | FREE


def test_import_loads_no_torch() -> None:
    code = "import sys, vitrail, vitrail.cli, vitrail.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_command_line_loads_only_the_standard_library() -> None:
    code = (
        "import sys; before = set(sys.modules); import vitrail.cli\n"
        "print({name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout == "{'vitrail'}\n"


def test_models_on_the_disk_need_nothing_that_speaks_to_the_network() -> None:
    code = (
        "import sys, vitrail.serving\n"
        "print({'huggingface_hub', 'httpx2', 'sklearn', 'matplotlib', 'pyarrow'} & set(sys.modules))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout == "set()\n"


def test_public_names_exist() -> None:
    import vitrail

    for name in vitrail.__all__:
        assert getattr(vitrail, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'creat_model'"):
        vitrail.creat_model  # noqa: B018


def test_no_helpers_and_no_relative_utils() -> None:
    forbidden = {"utils", "helpers", "misc", "common"}
    assert not forbidden & {path.stem for path in _files()}
