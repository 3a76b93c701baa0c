"""Private names of other packages are used through `finetune/upstream.py`, where they are listed and checked."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"accelerate", "bitsandbytes", "datasets", "peft", "torch", "trackio", "transformers", "trl", "wandb"}
INTERNAL = (
    "datasets.packaged_modules",
    "trackio.utils",
    "transformers.conversion_mapping",
    "transformers.core_model_loading",
    "transformers.integrations.gguf",
    "wandb.sdk",
)


def private_uses(source: str) -> Iterator[str]:
    """Imports of underscore names and internal modules, and underscore attributes of what is imported."""
    tree = ast.parse(source)
    imported = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name, alias in zip(names, getattr(node, "names", ()), strict=False):
            if name.partition(".")[0] not in PACKAGES:
                continue
            imported.add((alias.asname or alias.name).partition(".")[0])
            if any(_is_private(part) for part in name.split(".")) or name.startswith(INTERNAL):
                yield name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr) and _root(node) in imported:
            yield ast.unparse(node)


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _root(node: ast.AST) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("path", sorted((ROOT / "finetune").rglob("*.py")), ids=lambda path: path.stem)
def test_no_private_name_outside_upstream(path: Path) -> None:
    if path.name != "upstream.py":
        assert not list(private_uses(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "source",
    [
        "from torch.utils import _pytree",
        "from torch.utils._python_dispatch import TorchDispatchMode",
        "import torch\ntorch._C.f()",
        "from transformers.core_model_loading import WeightConverter",
        "from transformers import Trainer as T\nT._save",
    ],
)
def test_a_private_name_is_seen(source: str) -> None:
    assert list(private_uses(source))
