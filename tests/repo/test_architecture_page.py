"""docs/architecture.md agrees with the import contract in pyproject.toml and with the files that exist."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_the_layer_table_is_the_import_contract() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = project["tool"]["importlinter"]["contracts"][0]["layers"]
    rows = re.findall(r"^\| (\d+) \| (.+?) \|$", PAGE, re.MULTILINE)
    shown = [set(re.findall(r"`(\w+)`", names)) for _, names in rows]
    assert shown == [set(layer.split(" | ")) for layer in layers]
    assert [int(number) for number, _ in rows] == list(range(len(layers), 0, -1))


def test_every_named_package_and_module_exists() -> None:
    named = re.findall(r"`((?:\w+/)+(?:\w+\.py)?|\w+\.py)`", PAGE)
    tests = {"unit/", "properties/", "equivalence/", "end_to_end/", "repo/", "gpu/"}
    roots = {name: ROOT / ("tests" if name in tests else "finetune") / name for name in named}
    assert len(roots) > 20
    assert [name for name, path in roots.items() if not path.exists()] == []


def test_every_top_level_package_is_named() -> None:
    packages = {path.parent.name for path in (ROOT / "finetune").glob("*/__init__.py")}
    assert {package for package in packages if f"`{package}/`" not in PAGE} == set()
