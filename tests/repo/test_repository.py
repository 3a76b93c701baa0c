"""Rules of the repository: sizes of files and functions, contents of tracked files, dependencies and their pins."""

import ast
import re
import subprocess
import sys
import tomllib
import warnings
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from finetune.cli.main import COMMANDS, main
from tests.support import save_tiny_mixtral

ROOT = Path(__file__).resolve().parents[2]
LISTED = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
TRACKED = [path for name in LISTED.split("\0") if name and (path := ROOT / name).is_file()]
SOURCES = [path for path in TRACKED if path.suffix == ".py" and path.is_relative_to(ROOT / "finetune")]
MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 50
WITH_CUDA = {"triton"}  # comes with torch where there is CUDA; nothing imports it elsewhere

# In pieces, so that this file does not forbid itself.
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|ro" + r"ot|home)/")
UNFINISHED = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code_lines(text: str, first: int, last: int) -> int:
    """Lines that hold code or documentation: without blank ones and comments."""
    lines = (line.strip() for line in text.splitlines()[first - 1 : last])
    return sum(bool(line) and not line.startswith("#") for line in lines)


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_files_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {node.name: code_lines(text, node.lineno, node.end_lineno or 0) for node in functions}
    assert {key: length for key, length in lengths.items() if length > MAX_FUNCTION_LINES} == {}


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 120] == []


@pytest.mark.parametrize("pattern", [MACHINE_PATH, UNFINISHED], ids=["paths of one machine", "unfinished work"])
def test_no_tracked_file_holds(pattern: re.Pattern[str]) -> None:
    found = []
    for path in TRACKED:
        text = path.read_bytes().decode("utf-8", errors="replace")
        found += [f"{name(path)}: {match.group()}" for match in pattern.finditer(text)]
    assert found == []


def test_no_weights_pickles_or_large_files_are_tracked() -> None:
    heavy = [name(path) for path in TRACKED if path.stat().st_size > 2 * 2**20]
    weights = [name(path) for path in TRACKED if path.suffix in {".safetensors", ".bin", ".pt", ".pkl", ".gguf"}]
    assert heavy + weights == []


@pytest.mark.parametrize("module", ["finetune.errors", "finetune.recipe", "finetune.cli.main"])
def test_a_recipe_can_be_checked_without_importing_torch(module: str) -> None:
    code = f"import sys, {module}; print([heavy for heavy in ('torch', 'transformers') if heavy in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


HEAVY = (
    "torch",
    "transformers",
    "datasets",
    "peft",
    "bitsandbytes",
    "trl",
    "torch._dynamo",
    "transformers.modeling_utils",
)


@pytest.mark.parametrize(
    ("commands", "loaded"),
    [
        (["families"], [[]]),
        (["schema"], [[]]),
        (["upcycle --help"], [[]]),
        # The second one's packages beside those of the first, in one process: starting it is what takes long.
        (
            ["inspect CHECKPOINT", "template CHECKPOINT"],
            [["torch"], ["torch", "transformers", "datasets"]],
        ),
    ],
    ids=lambda value: value[0] if value and isinstance(value[0], str) else None,
)
def test_a_command_loads_the_packages_that_it_uses(
    commands: list[str], loaded: list[list[str]], tmp_path: Path
) -> None:
    """Half of a short command's time went to PEFT, bitsandbytes and torch's compiler, which it never used."""
    folder = str(save_tiny_mixtral(tmp_path)) if "CHECKPOINT" in commands[0] else ""
    words = [command.replace("CHECKPOINT", folder).split() for command in commands]
    code = (
        "import contextlib, sys\nfrom finetune.cli.main import main\n"
        f"for words in {words!r}:\n"
        "    with contextlib.suppress(SystemExit): main(words)\n"
        f"    print('loaded', [heavy for heavy in {HEAVY!r} if heavy in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert [line for line in done.stdout.splitlines() if line.startswith("loaded ")] == [
        f"loaded {packages}" for packages in loaded
    ]


@pytest.mark.parametrize("command", [command.__name__.rpartition(".")[2] for command in COMMANDS])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0
    assert f"usage: finetune {command}" in capsys.readouterr().out


def test_every_dependency_is_pinned_inside_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    versions = {canonicalize_name(package): version for package, version in pins.items()}
    for text in [*project["dependencies"], *(text for extra in extras for text in extra)]:
        wanted = Requirement(text)
        assert versions[canonicalize_name(wanted.name)] in wanted.specifier


def test_what_the_package_imports_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *project["optional-dependencies"]["gguf"]]
    declared = {canonicalize_name(Requirement(text).name) for text in texts}
    imported = set()
    for node in (node for path in SOURCES for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))):
        if isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
    distributions = packages_distributions()
    outside = imported - sys.stdlib_module_names - {"finetune"} - WITH_CUDA
    assert {module for module in outside if not declared & set(map(canonicalize_name, distributions[module]))} == set()


def test_the_version_is_said_once() -> None:
    from finetune import __version__

    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == __version__


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=name)
def test_accelerate_reads_each_config_and_leaves_precision_to_the_recipe(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.mixed_precision == "no"
    assert config.num_processes == yaml.safe_load(path.read_text())["num_processes"]


@pytest.mark.parametrize("module", ["finetune.moe.nf4", "tests.unit.test_nf4"])
def test_a_warning_raised_by_our_own_code_is_an_error(module: str) -> None:
    with pytest.raises(DeprecationWarning):
        warnings.warn_explicit("old", DeprecationWarning, "file.py", 1, module=module)
    with warnings.catch_warnings(record=True) as seen:
        warnings.warn_explicit("old", DeprecationWarning, "file.py", 1, module="torch.jit")
    assert len(seen) == 1
