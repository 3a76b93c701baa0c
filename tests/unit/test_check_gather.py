"""A recipe and its rows -> a report: all problems at once, nothing but config and tokenizer of the model, the cache."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trl
import yaml

from finetune.base import Base, checkpoint_family, recipe_tokenizer
from finetune.check import Report, Style, lines
from finetune.check.gather import gather
from finetune.check.output import page
from finetune.errors import DataError, RecipeError
from finetune.methods import sft
from finetune.recipe import Recipe, load_recipe
from tests.support import save_tiny_mixtral

TRL = Path(trl.__file__).parent / "chat_templates"
RECIPE: dict[str, Any] = {
    "model": {"load_in_4bit": False, "dtype": "float32"},
    "lora": {"targets": ["attention", "experts"], "r": 2, "lora_alpha": 4},
    "router": {"router_aux_loss_coef": 0},
    "method": {"kind": "sft"},
    "training": {
        "num_train_epochs": 2,
        "learning_rate": 0.01,
        "global_batch_size": 4,
        "per_device_train_batch_size": 2,
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_mixtral(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))


def write(name: str, rows: Sequence[dict[str, Any] | str]) -> None:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    Path(name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def turns(user: str, assistant: Any = "done") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def recipe(model: Path | str, *overrides: str, **data: Any) -> Recipe:
    sections = {"train": {"path": "train.jsonl", "format": "messages"}, "max_length": 256, **data}
    whole = {**RECIPE, "output_dir": "run", "model": {**RECIPE["model"], "name_or_path": str(model)}, "data": sections}
    Path("recipe.yaml").write_text(yaml.safe_dump(whole), encoding="utf-8")
    return load_recipe("recipe.yaml", overrides)


def check(settings: Recipe, samples: int = 1) -> Report:
    return gather(settings, "recipe.yaml", samples)


def problems(report: Report) -> list[str]:
    return [str(problem) for problem in report.problems]


def test_rows_are_counted_drawn_and_compared(model: Path) -> None:
    write("train.jsonl", [turns(f"turn on light {n}") for n in range(9)])
    write("eval.jsonl", [turns("Turn on  light 4"), turns("what is it")])
    report = check(recipe(model, eval={"path": "eval.jsonl", "format": "auto"}), samples=3)
    assert (report.problems, report.exit_code) == ([], 0)
    train, evaluation = report.splits
    assert (train.name, train.stats.rows, train.stats.used, train.stats.sequences) == ("train", 9, 9, 9)
    assert train.schedule is not None
    assert (train.schedule.steps_per_epoch, train.schedule.steps) == (3, 6)
    assert evaluation.stats.sets[0].source.format == "messages"
    assert evaluation.stats.sets[0].source.why
    assert [split for split, _ in report.samples] == ["train"] * 3 + ["eval"] * 2
    for split, sample in report.samples:
        text = "".join(piece.text for piece in sample.pieces)
        supervised = "".join(piece.text for piece in sample.pieces if piece.supervised)
        assert text.startswith("<|im_start|>user\n")
        assert supervised == "done<|im_end|>"
        assert sample.where.startswith(f"{split}.jsonl:")
    assert report.duplicates is not None
    assert [str(pair) for pair in report.duplicates.pairs] == ["train.jsonl:5 ~ eval.jsonl:1 (exact)"]


def test_the_seed_of_the_recipe_draws_the_samples(model: Path) -> None:
    write("train.jsonl", [turns(f"light {n}") for n in range(50)])

    def drawn(seed: int) -> list[str]:
        return [sample.where for _, sample in check(recipe(model, f"seed={seed}"), samples=5).samples]

    assert drawn(1) == drawn(1) != drawn(2)


def test_a_second_check_takes_the_rows_from_the_cache(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("train.jsonl", [turns("light")])
    check(recipe(model))
    assert "Tokenising train.jsonl" in capsys.readouterr().err
    assert check(recipe(model, "training.learning_rate=0.5")).splits[0].stats.rows == 1
    assert "Tokenising" not in capsys.readouterr().err


def test_packed_sequences_are_those_of_the_run(model: Path) -> None:
    from finetune.base import recipe_tokenizer
    from finetune.data import prepare

    write("train.jsonl", [turns("light " * (1 + n % 17)) for n in range(60)])
    settings = recipe(model, packing=True, max_length=128)
    split = check(settings).splits[0]
    tokenizer, _ = recipe_tokenizer(model, settings)
    prepared = prepare(settings.data.sources("train"), tokenizer, settings.data, settings.seed)
    assert split.stats == prepared.stats
    assert split.batches.sequences == len(prepared.dataset)
    filled = sum(len(row["input_ids"]) for row in prepared.dataset)
    assert split.batches.unfilled == pytest.approx(1 - filled / (len(prepared.dataset) * 128))


def test_bad_rows_of_all_sets_are_listed_at_once(model: Path) -> None:
    write("train.jsonl", [turns("light"), turns("light", None), "{", turns("light", True)])
    write("eval.jsonl", [{"messages": []}])
    report = check(recipe(model, eval={"path": "eval.jsonl", "format": "messages"}))
    assert report.exit_code == DataError.exit_code
    assert [line.partition(": ")[0] for line in problems(report)] == [
        "train.jsonl:2",
        "train.jsonl:3",
        "train.jsonl:4",
        "eval.jsonl:1",
    ]
    assert problems(report)[2].startswith("train.jsonl:4: messages[1].content: ")
    assert problems(report)[2].count("; ") >= 2  # what; got; do


def test_many_bad_rows_are_listed_and_the_rest_counted(model: Path) -> None:
    write("train.jsonl", [turns("light", None)] * 1010)
    messages = problems(check(recipe(model)))
    assert len(messages) == 1001
    assert messages[999].startswith("train.jsonl:1000: ")
    assert messages[1000].startswith("train.jsonl: 10 more rows are wrong")


def test_dropped_rows_are_listed_up_to_max_bad_share(model: Path) -> None:
    write("train.jsonl", [turns("light"), turns("light", None), turns("two"), turns("three")])
    report = check(recipe(model, on_bad_row="drop", max_bad_share=0.25))
    assert report.exit_code == 0
    assert report.splits[0].stats.bad == 1
    assert [row.partition(": ")[0] for row in report.splits[0].bad_listed] == ["train.jsonl:2"]
    assert report.remarks == ["train: 1 bad row left out"]
    report = check(recipe(model, on_bad_row="drop", max_bad_share=0.2))
    assert report.exit_code == 1
    assert "max_bad_share" in problems(report)[-1]


def test_recipe_model_template_and_rows_are_all_checked(model: Path) -> None:
    write("train.jsonl", [turns("light", None)])
    settings = recipe(model, "router=null", "lora.targets=[attention]", max_length=600)
    report = check(settings)
    assert report.exit_code == RecipeError.exit_code
    messages = problems(report)
    assert [line.partition(": ")[0] for line in messages] == ["router", "data.max_length", "train.jsonl:1"]
    assert "512 positions" in messages[1]


@pytest.mark.parametrize("what", ["no model", "no template"])
def test_without_a_tokenizer_the_rows_are_still_read(model: Path, what: str) -> None:
    write("train.jsonl", [turns("light", None), turns("light")])
    write("eval.jsonl", ["{", turns("light")])
    sets = {"eval": {"path": "eval.jsonl", "format": "auto"}}
    if what == "no model":
        report = check(recipe("nowhere", **sets))
        first = "model.name_or_path"
    else:
        report = check(recipe(model, chat_template="missing.jinja", **sets))
        first = "data.chat_template"
    assert report.exit_code == 1
    assert [line.partition(": ")[0] for line in problems(report)] == [first, "train.jsonl:1", "eval.jsonl:1"]


def test_rows_that_fit_no_format_are_reported_without_a_tokenizer_too(model: Path) -> None:
    write("train.jsonl", [{"a": 1}, "{"])
    messages = problems(check(recipe("nowhere", train={"path": "train.jsonl", "format": "auto"})))
    assert messages[1].startswith("train.jsonl:2: ")
    assert messages[2].startswith("train.jsonl: the rows fit no format")
    messages = problems(check(recipe("nowhere", train={"path": "other.jsonl", "format": "auto"})))
    assert messages[1].startswith("other.jsonl: ")


def test_a_row_longer_than_the_positions_of_the_model_is_refused_by_training_too(tmp_path: Path) -> None:
    write("train.jsonl", [turns("light")])
    small = save_tiny_mixtral(tmp_path / "small", max_position_embeddings=64)
    with pytest.raises(
        RecipeError, match=r"^data\.max_length: longer than the 64 positions .*; got 65; write at most 64"
    ):
        checkpoint_family(small, recipe(small, max_length=65))
    assert checkpoint_family(small, recipe(small, max_length=64))
    config = json.loads((small / "config.json").read_text())
    config["rope_parameters"] |= {"rope_type": "linear", "factor": 2.0}
    (small / "config.json").write_text(json.dumps(config))
    assert checkpoint_family(small, recipe(small, max_length=128))


def test_of_a_checkpoint_on_the_hub_only_the_small_files_are_needed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub cache as it is after those were fetched, with the network off."""
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            (snapshot / path.name).write_bytes(path.read_bytes())
    refs = tmp_path / "hub" / "models--owner--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    for name, value in (("HF_HUB_CACHE", str(tmp_path / "hub")), ("HF_HUB_OFFLINE", True)):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    write("train.jsonl", [turns("light")])
    assert problems(check(recipe("owner/name"))) == []
    messages = problems(check(recipe("owner/name", "router=null", "lora.targets=[attention]")))
    assert [line.partition(": ")[0] for line in messages] == ["router"]


def test_the_trainer_s_settings_are_checked_and_the_schedule_held_against_the_steps(model: Path) -> None:
    write("train.jsonl", [turns(f"turn on light {n}") for n in range(9)])
    report = check(recipe(model, "training.trainer_args={adam_beta1: 1.5}", "training.warmup_steps=60"))
    assert problems(report) == [
        "training.trainer_args.adam_beta1: refused: Invalid beta parameter at index 0: 1.5; got 1.5; "
        "write another value, or remove it"
    ]
    assert report.exit_code == 2
    report = check(recipe(model, "training.warmup_steps=60", "training.save_steps=6"))
    assert (report.problems, report.remarks) == (
        [],
        ["training.warmup_steps: 60 of a run of 6 steps: the rate reaches 0.000833, not 0.01"],
    )
    report = check(recipe(model, "training.warmup_steps=60", "training.max_steps=1", "training.num_train_epochs=null"))
    assert problems(report)[0].startswith("training.warmup_steps: the rate is 0 in the only step")


def two_answers(first: str) -> dict[str, Any]:
    return {"messages": [*turns(first)["messages"], *turns("two")["messages"]]}


def test_what_opens_and_ends_an_answer_and_what_conversations_became(model: Path) -> None:
    write("train.jsonl", [two_answers("a"), two_answers("b"), turns("three")])
    report = check(recipe(model, chat_template=str(TRL / "qwen3.jinja")))
    shown = dict(report.settings)
    assert shown["opens"].startswith("<|im_start|>assistant⏎ (not supervised")
    assert shown["header"].startswith("<think>⏎⏎</think>⏎⏎ (supervised")
    assert shown["ends"] == "<|im_end|> (supervised)"
    output = "\n".join(lines(report, Style(False, True))).replace("\n               ", " ")
    assert "    rows       3 read, 3 (100.0 %) kept as 5 examples\n" in output
    assert "    examples   2 conversations became 4 examples: the template rewrites earlier answers\n" in output
    assert "2 conversations became 4 examples: the template rewrites earlier answers" in page(report)
    assert report.remarks == []


def test_a_block_that_the_prompt_opens_for_answers_without_reasoning_is_said(model: Path) -> None:
    write("train.jsonl", [turns("one"), turns("two")])
    write("eval.jsonl", [turns("three")])
    sources = {
        "eval": {"path": "eval.jsonl", "format": "messages"},
        "chat_template": str(TRL / "nemotron_3_nano.jinja"),
    }
    said = "the generation prompt opens <think>: the model learns to close the block at once"
    offer = "data.template_args: {enable_thinking: false} gives a prompt without an open block"
    remarks = [
        f"train: 2 answers without reasoning, and {said}; {offer}",
        f"eval: 1 answer without reasoning, and {said}; {offer}",
    ]
    opened = recipe(model, **sources)
    report = check(opened)
    assert report.remarks == remarks
    assert all(escape(remark) in page(report) for remark in remarks)
    base = SimpleNamespace(tokenizer=recipe_tokenizer(model, opened)[0])
    assert sft.prepare_rows(opened, cast(Base, base)).remarks == remarks
    closed = check(recipe(model, **sources, template_args={"enable_thinking": False}))
    assert (closed.remarks, closed.problems) == ([], [])
    misspelt = check(recipe(model, **sources, template_args={"enable_thinkin": False}))
    assert [problem.partition(": ")[0] for problem in problems(misspelt)] == ["data.template_args.enable_thinkin"]
    assert misspelt.exit_code == 2


def test_marks_of_rendered_rows_are_what_opens_and_ends_an_answer(model: Path) -> None:
    write("train.jsonl", [{"text": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>"}])
    source = {"path": "train.jsonl", "format": "rendered", "response_template": "<|im_start|>assistant\n"}
    shown = check(recipe(model, train=source)).settings
    assert ("opens", "<|im_start|>assistant⏎ (not supervised) in train.jsonl") in shown
    assert ("ends", "<|im_end|> (supervised) in train.jsonl") in shown
    assert [name for name, _ in shown].count("opens") == 1
