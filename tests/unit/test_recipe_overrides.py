"""`key.path=value` on the command line."""

from pathlib import Path

import pytest

from finetune.cli.main import main
from tests.unit.recipe_writing import SOUND, RecipeFile, changed


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RecipeFile:
    return RecipeFile(tmp_path, monkeypatch)


def test_an_override_replaces_a_value_and_is_read_as_yaml_1_2(recipe_file: RecipeFile) -> None:
    recipe = recipe_file.load(
        SOUND,
        "lora.r=32",
        "training.learning_rate=2e-4",
        "lora.targets=[attention, router]",
        "output_dir=no",
        "training.max_steps=null",
        "training.num_train_epochs=2",
    )
    assert (recipe.lora.r, recipe.training.learning_rate, recipe.output_dir) == (32, 2e-4, "no")
    assert recipe.lora.targets == ["attention", "router"]
    assert (recipe.training.max_steps, recipe.training.num_train_epochs) == (None, 2.0)


def test_an_override_may_name_a_key_or_section_that_the_file_lacks(recipe_file: RecipeFile) -> None:
    recipe = recipe_file.load(
        SOUND,
        "data.eval.path=held-out.jsonl",
        "data.eval.format=messages",
        "logging.run_name=a=b",
        "training.trainer_args={adam_beta2: 0.99}",
    )
    assert [data_set.path for data_set in recipe.data.sources("eval")] == ["held-out.jsonl"]
    assert recipe.logging.run_name == "a=b"
    assert recipe.training.trainer_args == {"adam_beta2": 0.99}


def test_an_override_can_supply_what_the_file_leaves_out(recipe_file: RecipeFile) -> None:
    assert (
        recipe_file.load(changed(("  name_or_path: some/model\n", "")), "model.name_or_path=x").model.name_or_path
        == "x"
    )
    assert recipe_file.load(
        changed(("router:\n  router_aux_loss_coef: 0.02\n", "router:\n")), "router.router_aux_loss_coef=0"
    ).router


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["lora.r=0"], "command line: lora.r: out of range; got 0; write an integer from 1 to 1024"),
        (
            ["lora.rank=4"],
            "command line: lora.rank: unknown key: another tool's name for a setting; got 4; write lora.r",
        ),
        (
            ["lr=1e-4"],
            "command line: lr: unknown key: another tool's name for a setting; got 0.0001; "
            "write training.learning_rate",
        ),
        (["trainning.x=1"], 'command line: trainning: unknown key; got {"x": 1}; did you mean training?'),
        (
            ["data.eval.path=x"],
            "command line: data.eval.format: required key is missing; "
            "add it: one of auto, messages, sharegpt, alpaca, prompt_completion, dolly, oasst, text, rendered, "
            "preference, ultrafeedback, alpaca_dpo, hh, orca_dpo, sharegpt_dpo, kto",
        ),
        (["lora"], 'command line: not an override; got "lora"; write key.path=value, for example lora.r=32'),
        (["lora..r=1"], 'command line: not an override; got "lora..r=1"; write key.path=value, for example lora.r=32'),
        (
            ["--lora.r=4"],
            'command line: not an override; got "--lora.r=4"; '
            "remove the dashes: write key.path=value, for example lora.r=32",
        ),
        (["lora.r="], 'command line: lora.r: no value after `=`; got "lora.r="; write a value, or null for none'),
        (["lora.r=4", "lora.r=8"], 'command line: lora.r: given twice; got "lora.r=8"; keep one of the two'),
        (["lora.r.x=4"], "command line: lora.r.x: lora.r is a value, not a section; got 8; name a key that exists"),
        (
            ["output_dir=a: b"],
            'command line: output_dir: not a single value; got "output_dir=a: b"; '
            "quote text that holds `: `; write lists as [a, b] and mappings as {a: b}",
        ),
        (
            ["output_dir=!!python/name:os.system x"],
            'command line: output_dir: YAML tags are not allowed; got "output_dir=!!python/name:os.system x"; '
            "remove the tag: values are plain, or quote the value",
        ),
    ],
)
def test_a_wrong_override_gives_exactly_this_line(
    recipe_file: RecipeFile, overrides: list[str], complaint: str
) -> None:
    assert recipe_file.problems(SOUND, *overrides) == [complaint]


def test_a_list_that_is_not_closed_is_an_error(recipe_file: RecipeFile) -> None:
    (line,) = recipe_file.problems(SOUND, "lora.targets=[attention")
    assert line.startswith("command line: lora.targets: not valid YAML: ")


def test_the_home_folder_in_every_path_of_the_recipe_and_of_the_command_line(
    recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", "/people/ann")
    there = changed(("runs/test", "~/runs"), ("some/model", "~/model"), ("path: rows.jsonl", "path: ~/rows/*.jsonl"))
    recipe = recipe_file.load(
        there,
        "model.adapter=~/adapter",
        "data.chat_template=~/chat.jinja",
        "data.eval={path: ~/eval.jsonl, format: messages}",
    )
    paths = [recipe.output_dir, recipe.model.name_or_path, recipe.model.adapter, recipe.data.chat_template]
    paths += [source.path for which in ("train", "eval") for source in recipe.data.sources(which)]
    assert paths == [
        f"/people/ann/{name}" for name in ("runs", "model", "adapter", "chat.jinja", "rows/*.jsonl", "eval.jsonl")
    ]
    assert main(["inspect", "~/nothing"]) != 0
    assert "/people/ann/nothing" in capsys.readouterr().err
