"""The settings of the rows: one data set or a list of them, files or the hub, and what must hold between them."""

import json
from pathlib import Path

import pytest

from finetune.recipe import dump_recipe, json_schema, load_recipe
from finetune.recipe.other_tools import FOREIGN_IN_SOURCE
from finetune.recipe.row_formats import PAIR_FORMATS, hub_id_in_url, is_hub_id, looks_like_hub_id, looks_like_path
from tests.unit.recipe_writing import SOUND, RecipeFile, changed

ONE = "{path: rows.jsonl, format: messages}"
FORMATS = (
    "auto, messages, sharegpt, alpaca, prompt_completion, dolly, oasst, text, rendered, "
    "preference, ultrafeedback, alpaca_dpo, hh, orca_dpo, sharegpt_dpo, kto"
)
TWO = "[{path: a.jsonl, format: messages}, {path: b.jsonl, format: alpaca}]"
WEIGHTED = "[{path: a, format: text, weight: 1}, {id: b/c, format: text, weight: 2}]"


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RecipeFile:
    return RecipeFile(tmp_path, monkeypatch)


def train(written: str, *others: str) -> str:
    """The sound recipe with other data sets to train on, and further lines of the section `data`."""
    lines = "".join(f"\n  {line}" for line in others)
    return changed((ONE, written), ("max_length: 256", f"max_length: 256{lines}"))


def test_one_data_set_is_a_list_of_one_to_the_code(recipe_file: RecipeFile) -> None:
    recipe = recipe_file.load(SOUND)
    (source,) = recipe.data.sources("train")
    assert (source.path, source.format, source.split, source.columns) == ("rows.jsonl", "messages", "train", {})
    assert recipe.data.sources("eval") == ()


def test_a_list_of_data_sets_keeps_its_order(recipe_file: RecipeFile) -> None:
    recipe = recipe_file.load(train(TWO, f"eval: {TWO}"))
    for which in ("train", "eval"):
        assert [(data_set.path, data_set.format) for data_set in recipe.data.sources(which)] == [
            ("a.jsonl", "messages"),
            ("b.jsonl", "alpaca"),
        ]


def test_a_data_set_of_the_hub_and_renamed_columns(recipe_file: RecipeFile) -> None:
    hub = "{id: some-owner/a_set, config: main, split: test, revision: abc, streaming: true, format: text"
    (source,) = recipe_file.load(train(f"{hub}, columns: {{text: body}}, max_rows: 5}}", "loss_on: all")).data.sources(
        "train"
    )
    assert (source.id, source.config, source.split, source.revision) == ("some-owner/a_set", "main", "test", "abc")
    assert (source.streaming, source.columns, source.max_rows) == (True, {"text": "body"}, 5)


@pytest.mark.parametrize(
    "written", [ONE, TWO, "[{path: a, format: text, weight: 1}, {path: b, format: text, weight: 2}]"]
)
def test_a_dumped_recipe_with_data_sets_reads_back_the_same(recipe_file: RecipeFile, written: str) -> None:
    before = recipe_file.load(train(written, "loss_on: all"))
    assert recipe_file.load(dump_recipe(before)) == before


MISTAKES = {
    "misspelt key of the only data set": (
        train("{pat: rows.jsonl, path: a, format: messages}"),
        'recipe.yaml:15: data.train.pat: unknown key; got "rows.jsonl"; did you mean data.train.path?',
    ),
    "misspelt key in a list": (
        train("\n    - {path: a, format: messages}\n    - {path: b, formt: messages, format: alpaca}"),
        'recipe.yaml:17: data.train[1].formt: unknown key; got "messages"; did you mean data.train.format?',
    ),
    "missing key in a list": (
        train("\n    - path: a\n      format: messages\n    - path: b"),
        f"recipe.yaml:18: data.train[1].format: required key is missing; add it: one of {FORMATS}",
    ),
    "wrong type in a list": (
        train("[{path: a, format: messages}, {path: 3, format: alpaca}]"),
        "recipe.yaml:15: data.train[1].path: wrong type; got 3; write text or null; put quotes around it",
    ),
    "out of range in a list": (
        train("[{path: a, format: messages, max_rows: 0}, {path: b, format: alpaca}]"),
        "recipe.yaml:15: data.train[0].max_rows: out of range; got 0; write an integer of at least 1 or null",
    ),
    "unknown choice in a list": (
        train("[{path: a, format: sharegtp}]"),
        'recipe.yaml:15: data.train[0].format: not one of the known values; got "sharegtp"; '
        f"write one of {FORMATS}; did you mean sharegpt?",
    ),
    "another tool's value": (
        changed(("max_length: 256", "max_length: 256\n  overlong: skip")),
        'recipe.yaml:17: data.overlong: not one of the known values; got "skip"; '
        "write one of error, truncate, drop, split; here it is called drop",
    ),
    "columns that are no names": (
        train("[{path: a, format: alpaca, columns: {output: 3}}]"),
        "recipe.yaml:15: data.train[0].columns.output: wrong type; got 3; write a mapping of names to names",
    ),
    "neither path nor id": (
        train("{format: messages}"),
        "recipe.yaml:15: data.train: no data set is named; "
        "add path: a file, a glob or a folder; or id: owner/name of a data set on the hub",
    ),
    "path and id": (
        train("{path: a, id: b/c, format: messages}"),
        'recipe.yaml:15: data.train.id: two data sets in one; got path: "a" and id: "b/c"; '
        "keep one of the two, or write a list of both",
    ),
    "a path as id": (
        train("{id: data/rows.jsonl, format: messages}"),
        'recipe.yaml:15: data.train.id: looks like a path of files; got "data/rows.jsonl"; '
        "write path: data/rows.jsonl in place of id",
    ),
    "an id without owner": (
        train("{id: gsm8k, format: messages}"),
        'recipe.yaml:15: data.train.id: not the name of a data set on the hub; got "gsm8k"; '
        "write owner/name, as on its page; files are given with path",
    ),
    "an address as id": (
        train('{id: "https://hub.example/datasets/owner/name/tree", format: messages}'),
        'recipe.yaml:15: data.train.id: a URL, not a name; got "https://hub.example/datasets/owner/name/tree"; '
        "write id: owner/name",
    ),
    "a hub address as path": (
        train('{path: "hf://datasets/owner/name", format: messages}'),
        'recipe.yaml:15: data.train.path: a URL, not a path; got "hf://datasets/owner/name"; '
        "write id: owner/name in place of path",
    ),
    "another address as path": (
        train('{path: "s3://bucket/rows.jsonl", format: messages}'),
        'recipe.yaml:15: data.train.path: a URL, not a path; got "s3://bucket/rows.jsonl"; '
        "download it first, and write the path of the file",
    ),
    "a column for a field that the format has not": (
        train("{path: a, format: alpaca, columns: {answer: reply}}"),
        'recipe.yaml:15: data.train.columns.answer: the format alpaca has no such field; got "reply"; '
        "write {field: column of the file}; its fields are instruction, output, input, system, history, reasoning",
    ),
    "a role that is none": (
        train("{path: a, format: messages, roles: {customer: boss}}"),
        'recipe.yaml:15: data.train.roles.customer: not one of the known values; got "boss"; write a mapping of names '
        "to system, user, assistant, tool",
    ),
    "roles of a format without messages": (
        train("{path: a, format: alpaca, roles: {customer: user}}"),
        'recipe.yaml:15: data.train.roles: the format alpaca has no messages that say who speaks; got {"customer": '
        '"user"}; remove it; it is for messages, sharegpt, prompt_completion, preference, ultrafeedback, alpaca_dpo, '
        "sharegpt_dpo, kto",
    ),
    "columns the wrong way round": (
        train("{path: a, format: alpaca, columns: {answer: output}}"),
        'recipe.yaml:15: data.train.columns.answer: the format alpaca has no such field; got "output"; '
        "write output: answer, the format's name first",
    ),
    "columns of an unknown format": (
        train("{path: a, format: auto, columns: {output: answer}}"),
        "recipe.yaml:15: data.train.columns: renames the fields of a format, which format: auto does not name; "
        'got {"output": "answer"}; write the format',
    ),
    "the same data set twice": (
        train("[{path: a, format: messages}, {path: a, format: messages, split: train, max_rows: 3}]"),
        'recipe.yaml:15: data.train[1]: the same data set as data.train[0]; got "a"; '
        "keep one of the two; a weight lets a data set be drawn more often",
    ),
    "a weight that one lacks": (
        train("[{path: a, format: messages}, {path: b, format: messages, weight: 2}]"),
        "recipe.yaml:15: data.train[0].weight: missing, and data.train[1] has one; "
        "add a weight to every data set of the list, or to none",
    ),
    "a weight of the only data set": (
        train("{path: a, format: messages, weight: 2}"),
        "recipe.yaml:15: data.train.weight: has no effect: it is a share among several data sets; got 2; "
        "remove it, or write a list of data sets",
    ),
    "a weight in a list of one": (
        train("[{path: a, format: messages, weight: 2}]"),
        "recipe.yaml:15: data.train[0].weight: has no effect: it is a share among several data sets; got 2; "
        "remove it, or write a list of data sets",
    ),
    "a weight of evaluation": (
        train(ONE, "eval: {path: b, format: messages, weight: 1}"),
        "recipe.yaml:17: data.eval.weight: has no effect: an evaluation uses every row once; got 1; remove it",
    ),
    "a strategy without weights": (
        train(TWO, "stopping_strategy: all_exhausted"),
        "recipe.yaml:17: data.stopping_strategy: has no effect: no data set has a weight, so each row "
        'is used once per epoch; got "all_exhausted"; add a weight to every data set of data.train, or remove this key',
    ),
    "a ceiling that nothing reaches": (
        train(ONE, "max_bad_share: 0.1"),
        "recipe.yaml:17: data.max_bad_share: has no effect: any bad row is an error; got 0.1; "
        "write data.on_bad_row: drop, or remove this key",
    ),
    "plain text and a loss on answers": (
        train("[{path: a, format: messages}, {path: b, format: text}]"),
        "recipe.yaml:15: data.train[1].format: plain text has no answers: all of its tokens are supervised; "
        "got text, and data.loss_on: assistant; write data.loss_on: all, for all data sets of the recipe",
    ),
    "rendered text without a mark": (
        train("{path: a, format: rendered}"),
        "recipe.yaml:15: data.train.response_template: missing: nothing says where the answers of rendered text begin; "
        'name the text before every answer, for example "[/INST]"; or write data.loss_on: all',
    ),
    "rendered text with a mark that has no effect": (
        train('{path: a, format: rendered, response_template: "[/INST]"}', "loss_on: all"),
        "recipe.yaml:15: data.train.response_template: has no effect: data.loss_on: all learns every token; "
        'got "[/INST]"; remove it, or write data.loss_on: assistant',
    ),
    "rendered text with an end that has no effect": (
        train('{path: a, format: rendered, response_end: "</s>"}', "loss_on: all"),
        "recipe.yaml:15: data.train.response_end: has no effect: data.loss_on: all learns every token; "
        'got "</s>"; remove it',
    ),
    "rendered text and a loss on completions": (
        train('{path: a, format: rendered, response_template: "[/INST]"}', "loss_on: completion"),
        "recipe.yaml:17: data.loss_on: rendered text has no user messages to count from; got completion; "
        "write assistant (every answer), last_assistant or all",
    ),
    "a mark of answers in messages": (
        train('{path: a, format: messages, response_template: "[/INST]"}'),
        "recipe.yaml:15: data.train.response_template: only for text that already has its marks; "
        'got "[/INST]"; remove it, or write format: rendered',
    ),
    "pairs of answers in SFT": (
        train("{path: a, format: orca_dpo}"),
        "recipe.yaml:15: data.train.format: pairs of answers are for preference tuning; "
        'method.kind: sft takes one answer per row; got "orca_dpo"; '
        "write method.kind: dpo, or give rows with one answer each, "
        "for example as messages",
    ),
    "an empty list": (
        train("[]"),
        "recipe.yaml:15: data.train: empty list; got []; write a section with path, id, config, split, revision, "
        "streaming, format, columns, ignore_columns, roles, response_template, response_end, weight, max_rows, or a "
        "list of such sections",
    ),
    "a file name alone": (
        train("rows.jsonl"),
        'recipe.yaml:15: data.train: wrong type; got "rows.jsonl"; write a section with path, id, config, split, '
        "revision, streaming, format, columns, ignore_columns, roles, response_template, response_end, weight, "
        "max_rows, or a list of such sections; "
        "for example {path: rows.jsonl, format: auto}",
    ),
    "file names in a list": (
        train("[{path: a, format: messages}, b.jsonl]"),
        'recipe.yaml:15: data.train[1]: wrong type; got "b.jsonl"; write a section with path, id, config, split, '
        "revision, streaming, format, columns, ignore_columns, roles, response_template, response_end, weight, "
        "max_rows, or a list of such sections; "
        "for example {path: b.jsonl, format: auto}",
    ),
    "no data set at all": (
        changed((f"  train: {ONE}\n", "")),
        "recipe.yaml:14: data.train: required section is missing; add it with path (or id), format",
    ),
}


@pytest.mark.parametrize(("text", "complaint"), MISTAKES.values(), ids=MISTAKES)
def test_one_mistake_in_the_data_settings_gives_exactly_this_line(
    recipe_file: RecipeFile, text: str, complaint: str
) -> None:
    assert recipe_file.problems(text) == [complaint]


@pytest.mark.parametrize("name", PAIR_FORMATS)
def test_every_format_of_two_answers_is_refused_in_sft(recipe_file: RecipeFile, name: str) -> None:
    (line,) = recipe_file.problems(train(f"{{path: a, format: {name}}}"))
    assert "data.train.format: pairs of answers are for preference tuning" in line


@pytest.mark.parametrize("key", ["config: x", "split: test", "revision: x", "streaming: true"])
def test_hub_settings_are_rejected_for_files(recipe_file: RecipeFile, key: str) -> None:
    (line,) = recipe_file.problems(train(f"[{{path: a/b, format: messages, {key}}}, {{path: b, format: messages}}]"))
    name, value = key.split(": ")
    got = value if value == "true" else f'"{value}"'
    assert line == (
        f"recipe.yaml:15: data.train[0].{name}: only for data sets on the hub; got {got}; "
        "remove it, or write id in place of path"
    )


def test_the_same_file_read_by_other_columns_is_another_data_set(recipe_file: RecipeFile) -> None:
    there = "{path: a, format: prompt_completion, columns: {prompt: english, completion: french}}"
    back = "{path: a, format: prompt_completion, columns: {prompt: french, completion: english}}"
    assert len(recipe_file.load(train(f"[{there}, {back}]")).data.sources("train")) == 2


def test_a_mixture_may_repeat_its_smaller_sets(recipe_file: RecipeFile) -> None:
    weighted = "[{path: a, format: messages, weight: 0.5}, {path: b, format: messages, weight: 2}]"
    recipe = recipe_file.load(train(weighted, "stopping_strategy: all_exhausted"))
    assert [data_set.weight for data_set in recipe.data.sources("train")] == [0.5, 2.0]


@pytest.mark.parametrize("key", sorted(FOREIGN_IN_SOURCE))
def test_a_foreign_key_of_a_data_set_is_explained(recipe_file: RecipeFile, key: str) -> None:
    (line,) = recipe_file.problems(train(f"[{{path: a, format: messages, {key}: 1}}]"))
    foreign = FOREIGN_IN_SOURCE[key]
    do = "remove it: format is given" if foreign.do == "write format" else foreign.do
    assert line == f"recipe.yaml:15: data.train[0].{key}: unknown key: {foreign.what}; got 1; {do}"


@pytest.mark.parametrize(
    ("key", "do"),
    [
        ("dataset_name", "write data.train.id"),
        ("dataset_mixture", "remove it: data.train is given"),
        ("datasets", "remove it: data.train is given"),
        ("val_set_size", "write data.eval"),
        ("train_on_inputs", "write data.loss_on: all"),
        ("assistant_only_loss", "remove it: assistant is the default of data.loss_on"),
        ("cutoff_len", "remove it: data.max_length is given"),
    ],
)
def test_the_right_data_setting_is_named_for_a_foreign_one(recipe_file: RecipeFile, key: str, do: str) -> None:
    (line,) = recipe_file.problems(changed(("max_length: 256", f"max_length: 256\n  {key}: 1")))
    assert f"; {do}" in line


def test_hub_names_and_paths_are_told_apart_by_their_form() -> None:
    assert is_hub_id("owner/a_set.v1")
    assert not is_hub_id("a/b/c")
    assert looks_like_hub_id("owner/name")
    assert not looks_like_hub_id("data/rows.jsonl")
    assert all(looks_like_path(name) for name in ("./a", "/a/b", "~/a", "a/b.csv", "a/*", "rows.json.gz"))
    assert not looks_like_path("owner/name")
    assert hub_id_in_url("ftp://somewhere/rows") is None


def test_the_schema_allows_one_data_set_or_a_list_and_path_or_id() -> None:
    schema = json_schema()
    one, many = schema["$defs"]["DataSettings"]["properties"]["train"]["oneOf"]
    assert one == {"$ref": "#/$defs/DataSource"}
    assert many == {"items": {"$ref": "#/$defs/DataSource"}, "minItems": 1, "type": "array"}
    assert [each["required"] for each in schema["$defs"]["DataSource"]["oneOf"]] == [["path"], ["id"]]
    assert json.loads(json.dumps(schema)) == schema


def test_a_list_in_a_file_is_read_from_the_file(recipe_file: RecipeFile) -> None:
    recipe_file.path.write_text(
        train("\n    - {path: a, format: auto}\n    - {path: b, format: auto}"), encoding="utf-8"
    )
    assert len(load_recipe(recipe_file.path).data.sources("train")) == 2
