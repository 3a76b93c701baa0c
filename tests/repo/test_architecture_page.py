"""docs/architecture.md agrees with the import contract in pyproject.toml and with the files that exist."""

import re
import tomllib
from pathlib import Path

import pytest

from tests.readme import PAGES, ROOT

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
    paths = {name: ROOT / ("tests" if name in tests else "finetune") / name for name in named}
    assert len(paths) > 40
    missing = [name for name, path in paths.items() if not path.exists()]
    assert not missing, ", ".join(missing)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "architecture.md"], ids=lambda page: page.name)
def test_every_file_named_on_another_page_exists(page: Path) -> None:
    """There paths are relative to the repository. What a command writes is outside these folders."""
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:finetune|tests|benchmarks|data|recipes|accelerate_configs)/[\w./-]+)`", text)
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing, ", ".join(missing)


def test_every_top_level_package_and_module_is_described() -> None:
    packages = {f"{path.parent.name}/" for path in (ROOT / "finetune").glob("*/__init__.py")}
    modules = {path.name for path in (ROOT / "finetune").glob("*.py") if path.name != "__init__.py"}
    assert {name for name in packages | modules if f"| `{name}` |" not in PAGE} == set()
