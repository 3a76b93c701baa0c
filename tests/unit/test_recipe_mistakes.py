"""Every mistake in a recipe, and the line it is answered with."""

import re
from pathlib import Path

import pytest

from finetune.errors import RecipeError
from finetune.recipe import load_recipe
from finetune.recipe.other_tools import FOREIGN
from finetune.recipe.yaml import MAX_BYTES
from tests.unit.recipe_writing import SOUND, RecipeFile, changed


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RecipeFile:
    return RecipeFile(tmp_path, monkeypatch)


def test_a_valid_recipe_loads_and_reads_1e3_as_a_number(recipe_file: RecipeFile) -> None:
    recipe = recipe_file.load(SOUND)
    assert recipe.training.learning_rate == 0.001
    assert recipe.lora.lora_alpha == 16.0
    assert recipe.logging.report_to == "auto"


SINGLE_MISTAKES = {
    "unknown key": (
        changed(("  r: 8", "  r: 8\n  lora_alfa: 3")),
        "recipe.yaml:9: lora.lora_alfa: unknown key; got 3; did you mean lora.lora_alpha?",
    ),
    "unknown section": (
        changed(after="trainning: {}\n"),
        "recipe.yaml:21: trainning: unknown key; got {}; did you mean training?",
    ),
    "unknown key like nothing": (
        changed(("kind: sft", "kind: sft\n  zzz: 1")),
        "recipe.yaml:14: method.zzz: unknown key; got 1; write one of kind",
    ),
    "misspelt key of another section": (
        changed(after="learning_rat: 1\n"),
        "recipe.yaml:21: learning_rat: unknown key; got 1; did you mean training.learning_rate?",
    ),
    "key of another section": (
        changed(after="warmup_steps: 3\n"),
        "recipe.yaml:21: warmup_steps: this key does not belong at the top level; got 3; write training.warmup_steps",
    ),
    "key of several sections": (
        changed(after="format: messages\n"),
        'recipe.yaml:21: format: this key does not belong at the top level; got "messages"; '
        "remove it: data.train.format is given",
    ),
    "float for an integer": (
        changed(("r: 8", "r: 3.7")),
        "recipe.yaml:8: lora.r: wrong type; got 3.7; write an integer from 1 to 1024",
    ),
    "whole float for an integer": (
        changed(("r: 8", "r: 16.0")),
        "recipe.yaml:8: lora.r: wrong type; got 16.0; write an integer from 1 to 1024; 16 without a decimal point",
    ),
    "bool for an integer": (
        changed(("r: 8", "r: true")),
        "recipe.yaml:8: lora.r: wrong type; got true; write an integer from 1 to 1024",
    ),
    "bool for a float": (
        changed(("lora_alpha: 16", "lora_alpha: true")),
        "recipe.yaml:9: lora.lora_alpha: wrong type; got true; write a number above 0",
    ),
    "text for a bool": (
        changed(after="").replace("max_length: 256", 'max_length: 256\n  packing: "yes"'),
        'recipe.yaml:17: data.packing: wrong type; got "yes"; write true or false; '
        "without quotes; yes, no, on and off are text",
    ),
    "YAML 1.1 bool": (
        changed(("load_in_4bit: true", "load_in_4bit: on")),
        'recipe.yaml:4: model.load_in_4bit: wrong type; got "on"; write true or false; '
        "without quotes; yes, no, on and off are text",
    ),
    "quoted number": (
        changed(("1e-3", '"1e-3"')),
        'recipe.yaml:19: training.learning_rate: wrong type; got "1e-3"; write a number above 0; '
        "without quotes or a unit",
    ),
    "number for text": (
        changed(("name_or_path: some/model", "name_or_path: 7")),
        "recipe.yaml:3: model.name_or_path: wrong type; got 7; write text; put quotes around it",
    ),
    "empty text": (
        changed(("output_dir: runs/test", 'output_dir: ""')),
        'recipe.yaml:1: output_dir: out of range; got ""; write text',
    ),
    "out of range": (
        changed(("r: 8", "r: 0")),
        "recipe.yaml:8: lora.r: out of range; got 0; write an integer from 1 to 1024",
    ),
    "infinite": (
        changed(("1e-3", "1e999")),
        "recipe.yaml:19: training.learning_rate: out of range; got .inf; write a number above 0",
    ),
    "not a number": (
        changed(("0.02", ".nan")),
        "recipe.yaml:11: router.router_aux_loss_coef: out of range; got .nan; write a number of at least 0",
    ),
    "unknown choice": (
        changed(("format: messages", "format: mesages")),
        'recipe.yaml:15: data.train.format: not one of the known values; got "mesages"; '
        "write one of auto, messages, sharegpt, alpaca, prompt_completion, dolly, oasst, text, rendered, "
        "preference, ultrafeedback, alpaca_dpo, hh, orca_dpo, sharegpt_dpo, kto; did you mean messages?",
    ),
    "another tool's name for a section": (
        changed(("max_length: 256", "max_length: 256\n  chat_template_kwargs: {enable_thinking: false}")),
        "recipe.yaml:17: data.chat_template_kwargs: unknown key: another tool's name for a setting; "
        'got {"enable_thinking": false}; write data.template_args',
    ),
    "a variable of the template": (
        changed(("max_length: 256", "max_length: 256\n  enable_thinking: false")),
        "recipe.yaml:17: data.enable_thinking: unknown key: a variable of the chat template; "
        "got false; write data.template_args.enable_thinking",
    ),
    "choice under another name": (
        changed(("dtype: float32", "dtype: bf16")),
        'recipe.yaml:5: model.dtype: not one of the known values; got "bf16"; '
        "write one of float32, bfloat16, float16; here it is called bfloat16",
    ),
    "missing key, at the line of its section": (
        changed(("  lora_alpha: 16\n", "")),
        "recipe.yaml:6: lora.lora_alpha: required key is missing; add it: a number above 0",
    ),
    "missing section": (
        changed(("method:\n  kind: sft\n", "")),
        "recipe.yaml:1: method: required section is missing; add it with kind",
    ),
    "section without keys": (
        changed(("  kind: sft\n", "")),
        "recipe.yaml:12: method.kind: required key is missing; add it: one of sft, dpo",
    ),
    "section that is text": (
        changed(("method:\n  kind: sft\n", "method: sft\n")),
        'recipe.yaml:12: method: wrong type; got "sft"; write a section with kind; for example method: {kind: sft}',
    ),
    "one name for a list": (
        changed(after="logging: {report_to: wandb}\n"),
        'recipe.yaml:21: logging.report_to: wrong type; got "wandb"; '
        "write a list of wandb, trackio, tensorboard or one of auto, none; a single one is written [wandb]",
    ),
    "wrong name in a list": (
        changed(after="logging: {report_to: [wandbb]}\n"),
        'recipe.yaml:21: logging.report_to[0]: not one of the known values; got "wandbb"; '
        "write a list of wandb, trackio, tensorboard or one of auto, none; did you mean wandb?",
    ),
    "number among the targets": (
        changed(("[attention, experts]", "[attention, experts, 3]")),
        "recipe.yaml:7: lora.targets[2]: wrong type; got 3; write a list of names",
    ),
    "beta in SFT": (
        changed(("kind: sft", "kind: sft\n  beta: 0.1")),
        "recipe.yaml:14: method.beta: a setting of method.kind: dpo; got 0.1; "
        "remove it, or train on pairs of answers with kind: dpo",
    ),
    "a method that is not offered": (
        changed(("kind: sft", "kind: grpo")),
        'recipe.yaml:13: method.kind: not one of the known values; got "grpo"; write one of sft, dpo',
    ),
    "duplicate key": (
        changed(("  r: 8", "  r: 8\n  r: 16")),
        "recipe.yaml:9: lora.r: duplicate key; keep one of the two; the first is on line 8",
    ),
    "duplicate section": (
        changed(after="lora: {r: 4}\n"),
        "recipe.yaml:21: lora: duplicate key; keep one of the two; the first is on line 6",
    ),
    "tag that would run code": (
        changed(("runs/test", '!!python/object/apply:os.system ["touch harmed"]')),
        "recipe.yaml:1: output_dir: YAML tags are not allowed; got !!python/object/apply:os.system; "
        "remove the tag: values are plain",
    ),
    "harmless tag": (
        changed(("r: 8", "r: !!int 8")),
        "recipe.yaml:8: lora.r: YAML tags are not allowed; got !!int; remove the tag: values are plain",
    ),
    "anchor": (
        changed(("r: 8", "r: &rank 8")),
        "recipe.yaml:8: lora.r: YAML anchors are not allowed; got &rank; "
        "remove it and write the value out where it is used",
    ),
    "key that is a number": (
        changed(("kind: sft", "kind: sft\n  1: 2")),
        "recipe.yaml:14: method: a key is not text; got 1; write keys as plain words",
    ),
    "second document": (
        changed(after="---\nlora: {}\n"),
        "recipe.yaml:21: a second document begins here; keep one recipe a file: remove the `---` and what follows",
    ),
    "empty file": (
        "# nothing\n",
        "recipe.yaml:1: a recipe is a mapping; got an empty file; write `key: value` lines, as in recipes/",
    ),
    "a list": ("[a]", 'recipe.yaml:1: a recipe is a mapping; got ["a"]; write `key: value` lines, as in recipes/'),
}


@pytest.mark.parametrize(("text", "complaint"), SINGLE_MISTAKES.values(), ids=SINGLE_MISTAKES)
def test_one_mistake_gives_exactly_this_line(recipe_file: RecipeFile, text: str, complaint: str) -> None:
    assert recipe_file.problems(text) == [complaint]
    assert not Path("harmed").exists()


def test_all_mistakes_are_reported_at_once_in_the_order_of_the_file(recipe_file: RecipeFile) -> None:
    text = changed(("r: 8", "r: 3.7"), ("dtype: float32", "dtype: half"), after="lora_r: 8\nseed: -1\n")
    lines = recipe_file.problems(text, "training.max_steps=0", "data.overlong=skip")
    assert [line.split(": ")[:2] for line in lines] == [
        ["recipe.yaml:5", "model.dtype"],
        ["recipe.yaml:8", "lora.r"],
        ["recipe.yaml:21", "lora_r"],
        ["recipe.yaml:22", "seed"],
        ["command line", "data.overlong"],
        ["command line", "training.max_steps"],
    ]


@pytest.mark.parametrize("key", sorted(FOREIGN))
def test_a_foreign_key_is_explained_in_any_section(recipe_file: RecipeFile, key: str) -> None:
    for text in (changed(after=f"{key}: 1\n"), changed(("  r: 8", f"  r: 8\n  {key}: 1"))):
        (line,) = recipe_file.problems(text)
        advice = re.match(r"(?:remove it and )?write ([\w.]+)", FOREIGN[key].do)
        given = advice is not None and f"  {advice[1].rpartition('.')[2]}:" in SOUND
        do = f"remove it: {advice[1]} is given" if advice is not None and given else FOREIGN[key].do
        assert line.endswith(f"{key}: unknown key: {FOREIGN[key].what}; got 1; {do}")


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("lora_r", "lora.r"),
        ("base_model", "model.name_or_path"),
        ("dataset_mixture", "data.train"),
        ("max_seq_length", "data.max_length"),
        ("num_epochs", "training.num_train_epochs"),
        ("micro_batch_size", "training.per_device_train_batch_size"),
        ("gradient_accumulation_steps", "training.global_batch_size"),
        ("lora_target_modules", "lora.targets"),
        ("learning_rate", "training.learning_rate"),
        ("torch_dtype", "model.dtype"),
        ("sample_packing", "data.packing"),
        ("sequence_len", "data.max_length"),
        ("wandb_project", "logging.project"),
        ("chat_template_kwargs", "data.template_args"),
        ("pad_token", "model.pad_token"),
    ],
)
def test_the_right_key_is_named_for_a_foreign_one(recipe_file: RecipeFile, key: str, ours: str) -> None:
    (line,) = recipe_file.problems(changed(after=f"{key}: 1\n"))
    assert line.endswith((f"; write {ours}", f"; remove it: {ours} is given"))


def test_a_mapping_of_special_tokens_names_the_keys_for_them(recipe_file: RecipeFile) -> None:
    (line,) = recipe_file.problems(changed(after='special_tokens: {pad_token: "<pad>"}\n'))
    assert line.endswith(
        "write model.pad_token or model.eos_token; a token that the vocabulary lacks in model.added_tokens, too"
    )


def test_notation_that_is_not_yaml_names_its_line(recipe_file: RecipeFile) -> None:
    (line,) = recipe_file.problems(changed(("[attention, experts]", "[attention, experts")))
    assert line.startswith("recipe.yaml:8: not valid YAML: ")
    (line,) = recipe_file.problems(changed(("  r: 8", "\tr: 8")))
    assert line.startswith("recipe.yaml:8: not valid YAML: ")


def test_files_that_are_no_recipes(recipe_file: RecipeFile) -> None:
    with pytest.raises(RecipeError, match=r"missing\.yaml: cannot be read: No such file or directory; give the path"):
        load_recipe("missing.yaml")
    with pytest.raises(RecipeError, match="cannot be read: it is a folder, not a regular file"):
        load_recipe(".")
    recipe_file.path.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(RecipeError, match=r"recipe\.yaml: larger than 65536 bytes; give a recipe"):
        load_recipe(recipe_file.path)
    recipe_file.path.write_bytes(b"a: 1\nb: \xff\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml:2: not UTF-8 text; save the file as UTF-8"):
        load_recipe(recipe_file.path)
    recipe_file.path.write_bytes(b"a: 1\nb: \x07\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml:2: not valid YAML: a control character"):
        load_recipe(recipe_file.path)


def test_a_newline_in_a_key_stays_on_one_line(recipe_file: RecipeFile) -> None:
    (line,) = recipe_file.problems(changed(after='"a\\nb": "c\\nd"\n'))
    assert '"a\\nb": unknown key; got "c\\nd"' in line
