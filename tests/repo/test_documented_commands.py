"""Every command in the README and in docs/ exists, and every make command is run somewhere."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from finetune.cli.main import build_parser
from finetune.recipe import load_recipe
from tests.readme import COMMANDS, PAGES, ROOT, shell_commands

MAX_README_LINES, MAX_README_COLUMNS = 150, 120

# make's commands -> the file that runs it, and words of that file which do. All others are run by
# tests/end_to_end/test_readme_commands.py, as they are written.
RUN_BY = {
    "make install": ("Makefile", "check: install"),
    "make check": ("Makefile", "test: check"),
    "make test": (".ci/run", "make test"),
    "make quickstart": ("Makefile", "-m benchmarks.quickstart\n"),
    "make quickstart-dpo": ("Makefile", "-m benchmarks.quickstart_dpo"),
}


def test_commands_are_found_in_their_blocks() -> None:
    text = "```sh\n# why\nmake a && make b  # note\nfinetune merge \\\n    x\n```\n```yaml\nmodel: y\n```\n"
    assert shell_commands(text) == ["make a", "make b", "finetune merge x"]


def test_the_readme_is_short() -> None:
    lines = PAGES[0].read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MAX_README_LINES
    assert [line for line in lines if len(line) > MAX_README_COLUMNS] == []


def test_the_readme_shows_commands() -> None:
    assert COMMANDS


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make ")])
def test_a_shown_make_command_is_run_somewhere(command: str) -> None:
    assert command in RUN_BY, "add it to RUN_BY with the file that runs it"


@pytest.mark.parametrize(("path", "words"), RUN_BY.values(), ids=RUN_BY)
def test_the_table_is_true(path: str, words: str) -> None:
    assert words in (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_shown_command_is_spelt_right(command: str) -> None:
    """Its target or subcommand exists and takes these options; its recipe is valid with these overrides."""
    program, *words = shlex.split(command)
    if program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words == ["--help"]:
        pass  # exits at once
    elif program == "finetune":
        arguments = build_parser().parse_args(words)
        if arguments.command == "train":
            load_recipe(ROOT / arguments.recipe, arguments.overrides)
    elif program == "accelerate":
        module = words.index("finetune.train")
        load_recipe(ROOT / words[module + 1], words[module + 2 :])
        if "--config_file" in words:
            assert (ROOT / words[words.index("--config_file") + 1]).is_file()


def test_the_shown_sections_of_a_recipe_are_valid(tmp_path: Path) -> None:
    """Merged into those of a shipped recipe."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES[1:])
    blocks = re.findall(r"^```yaml\n(.*?)^```", text, re.M | re.S)
    assert len(blocks) >= 3
    for number, block in enumerate(blocks):
        whole = yaml.safe_load((ROOT / "recipes/mixtral-8x7b/sft-qlora.yaml").read_text(encoding="utf-8"))
        for section, values in yaml.safe_load(block).items():
            whole[section] = {**whole.get(section, {}), **values}
        whole["training"]["learning_rate"] = 2e-4  # text to PyYAML
        (tmp_path / f"{number}.yaml").write_text(yaml.safe_dump(whole).replace("0.0002", "2e-4"), encoding="utf-8")
        load_recipe(tmp_path / f"{number}.yaml")


def test_the_recipe_of_the_readme_is_complete(tmp_path: Path) -> None:
    block = re.search(r"^```yaml\n(.*?)^```", PAGES[0].read_text(encoding="utf-8"), re.M | re.S)
    assert block
    (tmp_path / "recipe.yaml").write_text(block.group(1), encoding="utf-8")
    load_recipe(tmp_path / "recipe.yaml")
