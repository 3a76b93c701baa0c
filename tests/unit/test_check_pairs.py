"""`finetune check` on a recipe of preference tuning: pairs counted, measured, shown with both answers, and compared."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import trl
import yaml
from safetensors.torch import save_file

from finetune.base import Base, recipe_tokenizer
from finetune.check import Report, Style, lines
from finetune.check.gather import gather
from finetune.check.output import page
from finetune.methods import dpo
from finetune.recipe import Recipe, load_recipe
from tests.pairs import prepare_pairs
from tests.real_tokenizers import mistral_tokenizer
from tests.support import CHATML, save_tiny_mixtral

RECIPE: dict[str, Any] = {
    "output_dir": "run",
    "lora": {"targets": ["attention", "experts"], "r": 2, "lora_alpha": 4},
    "router": {"router_aux_loss_coef": 0},
    "method": {"kind": "dpo", "beta": 0.1},
    "training": {"num_train_epochs": 2, "learning_rate": 0.01, "global_batch_size": 4},
}
ANSWER = "turn on the kitchen light"
OFF = "method.prompt_sharing=off"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_mixtral(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))


def row(prompt: str, chosen: str = ANSWER, rejected: str = "no") -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def write(name: str, rows: Sequence[Any]) -> None:
    Path(name).write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def recipe(model: Path | str, *overrides: str, **data: Any) -> Recipe:
    base = {"name_or_path": str(model), "load_in_4bit": False, "dtype": "float32"}
    sets = {"train": {"path": "train.jsonl", "format": "preference"}, "max_length": 256, **data}
    Path("recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "model": base, "data": sets}), encoding="utf-8")
    return load_recipe("recipe.yaml", overrides)


def check(settings: Recipe, samples: int = 1) -> Report:
    return gather(settings, "recipe.yaml", samples)


def printed(report: Report) -> str:
    return "\n".join(lines(report, Style(False, True)))


def test_an_adapter_that_the_run_would_refuse_is_a_problem(model: Path) -> None:
    write("train.jsonl", [row("set light")])
    report = check(recipe(model, "model.adapter=sft/adapter"))
    assert [str(problem) for problem in report.problems] == [
        "model.adapter: no adapter here: adapter_model.safetensors is missing; got sft/adapter; "
        "name the output_dir of a finished run, RUN/checkpoint-N or RUN@best"
    ]
    assert report.exit_code == 1
    adapter = Path("sft/adapter")
    adapter.mkdir(parents=True)
    path = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    factors = {f"{path}A.weight": torch.ones(8, 64), f"{path}B.weight": torch.ones(64, 8)}
    save_file(factors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 4.0}))
    made = {"lora": {**RECIPE["lora"], "lora_alpha": 4.0, "r": 8}}
    record = {"recipe": made, "base": {"name_or_path": "other", "fingerprint": "0123"}, "quantization": None}
    (adapter / "finetune.json").write_text(json.dumps(record))
    (adapter / "chat_template.jinja").write_text(CHATML)
    report = check(recipe(model, "model.adapter=sft/adapter"))
    assert [problem.where for problem in report.problems] == ["model.adapter", "lora.r", "lora.expert_r"]


def test_pairs_are_counted_with_steps_of_pairs(model: Path) -> None:
    write("train.jsonl", [row(f"set light {n}") for n in range(10)])
    report = check(recipe(model))
    assert report.problems == []
    [split] = report.splits
    assert (split.stats.rows, split.stats.used, split.batches.sequences, split.batches.unit) == (10, 10, 10, "pairs")
    assert split.schedule is not None
    assert (split.schedule.steps_per_epoch, split.schedule.steps) == (3, 6)
    output = printed(report)
    assert "    loss on    both answers of a pair\n" in output
    assert "    max_length 256 tokens for a prompt with one answer; longer pairs: error\n" in output
    assert "  pairs by length in tokens, the longer conversation of each, before truncation\n" in output
    text = page(report)
    assert "Training pairs" in text
    assert "pairs used" in text
    assert "Pairs by length in tokens, the longer conversation of each" in text


def test_lengths_and_the_longest_are_those_of_the_longer_conversation(model: Path) -> None:
    write("train.jsonl", [row("a"), row("a", "b", f"{ANSWER} and the timer")])
    settings = recipe(model)
    report = check(settings)
    tokenizer, _ = recipe_tokenizer(model, settings)
    table = prepare_pairs(settings.data.sources("train"), tokenizer, settings.data, 0, False).table
    ids = (table[0].chosen_ids, table[1].rejected_ids)
    longer = [len(pair.prompt_ids) + len(answer) for pair, answer in zip(table, ids, strict=True)]
    assert report.splits[0].longest_rows == [(longer[1], "train.jsonl:2"), (longer[0], "train.jsonl:1")]
    assert sum(bin_.rows for bin_ in report.splits[0].lengths) == 2
    assert report.splits[0].stats.tokens > sum(longer)


def test_a_pair_has_two_rows_of_a_padded_batch(model: Path) -> None:
    write("train.jsonl", [row("a", "a" * 20, "a" * 8)])
    settings = recipe(model, OFF)
    report = check(settings)
    tokenizer, _ = recipe_tokenizer(model, settings)
    [pair] = prepare_pairs(settings.data.sources("train"), tokenizer, settings.data, 0, False).table
    longest = len(pair.prompt_ids) + len(pair.chosen_ids)
    pads = len(pair.chosen_ids) - len(pair.rejected_ids)
    assert report.splits[0].batches.padding == pytest.approx(pads / (2 * longest))
    output = " ".join(printed(report).split())
    assert f"1 pair, one at a time: {100 * pads / (2 * longest):.1f} % padding expected" in output


def test_a_pair_that_shares_its_prompt_is_one_row(model: Path) -> None:
    write("train.jsonl", [row("a", "a" * 20, "a" * 8), row("b", "c", "d")])
    assert "2 pairs, one at a time: no padding" in " ".join(printed(check(recipe(model))).split())
    settings = recipe(model, "training.per_device_train_batch_size=2")
    tokenizer, _ = recipe_tokenizer(model, settings)
    table = prepare_pairs(settings.data.sources("train"), tokenizer, settings.data, 0, True).table
    first, second = (len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) + 1 for pair in table)
    assert check(settings).splits[0].batches.padding == pytest.approx((first - second) / (2 * first))


@pytest.mark.parametrize("max_length", [64, 100])
@pytest.mark.parametrize("share", [True, False])
def test_packed_sequences_are_those_of_the_run(model: Path, max_length: int, share: bool) -> None:
    write("train.jsonl", [row("light " * (1 + n % 17)) for n in range(60)])
    settings = recipe(model, *([] if share else [OFF]), packing=True, max_length=max_length)
    report = check(settings)
    [split] = report.splits
    tokenizer, _ = recipe_tokenizer(model, settings)
    prepared = prepare_pairs(settings.data.sources("train"), tokenizer, settings.data, settings.seed, share)
    assert split.stats == prepared.stats
    assert split.batches.sequences == len(prepared.dataset)
    capacity = 2 * max_length
    saved = sum(len(pair.prompt_ids) - 1 for pair in prepared.table) if share else 0
    filled = (prepared.stats.tokens - saved) / (len(prepared.dataset) * capacity)
    assert split.batches.unfilled == pytest.approx(1 - filled)
    why = f"once for both answers, which saves {100 * saved / prepared.stats.tokens:.1f} % of the tokens"
    assert dict(report.settings)["prompts"] == (
        f"computed {why}" if share else "computed for each answer, as method.prompt_sharing says"
    )
    output = printed(report)
    assert f"{len(prepared.dataset):,} packed sequences of up to {capacity:,} tokens, " in output


def test_both_answers_are_shown_with_what_is_supervised_and_the_prompt_once(model: Path) -> None:
    write("train.jsonl", [row("what is it", "a light", "a timer")])
    report = check(recipe(model))
    output = printed(report)
    assert "train train.jsonl:1 chosen: " in output
    assert "assistant⏎\n[[a light<|im_end|>]]⏎\n" in output
    assert "train train.jsonl:1 rejected: " in output
    assert " tokens of the same prompt ...\n[[a timer<|im_end|>]]⏎\n" in output
    assert output.count("what is it") == 1
    (_, chosen), (_, rejected) = report.samples
    for sample in (chosen, rejected):
        assert sum(len(piece.ids) + piece.left_out for piece in sample.pieces) == sample.tokens
        assert sum(len(piece.ids) for piece in sample.pieces if piece.supervised) == sample.supervised
    text = page(report)
    assert text.count("of the same prompt</span>") == 1
    assert text.count("<mark>") == 3  # one in the legend


def test_a_space_at_the_beginning_of_an_answer_is_shown_for_both(model: Path) -> None:
    """SentencePiece's decoder takes it away where nothing stands before it."""
    from finetune.check.samples import draw
    from finetune.data import prepare_pair_mixture

    write("train.jsonl", [row("what is it", "light", "timer")])
    settings = recipe(model, chat_template="mistral").data
    tokenizer = mistral_tokenizer("v1")
    mixture = prepare_pair_mixture(settings.sources("train"), tokenizer, settings, 0)
    samples = draw(mixture.sets[0], mixture.chosen[0], 1, 0, tokenizer)
    texts = ["".join(piece.text for piece in sample.pieces if piece.supervised) for sample in samples]
    assert texts == [" light</s>", " timer</s>"]


def test_duplicates_are_counted_by_pairs(model: Path) -> None:
    rows = [row("what is the first thing to do here", chosen, f"{ANSWER} now") for chosen in ("yes", "no", "yes")]
    write("train.jsonl", rows)
    write("eval.jsonl", [{**rows[1], "chosen": "NO"}, row("something else", "one", "two")])
    report = check(recipe(model, eval={"path": "eval.jsonl", "format": "preference"}))
    assert report.splits[0].duplicates_listed == ["train.jsonl:3 = train.jsonl:1"]
    assert report.duplicates is not None
    assert (report.duplicates.eval_rows, report.duplicates.exact) == (2, 1)
    assert [str(pair) for pair in report.duplicates.pairs] == ["train.jsonl:2 ~ eval.jsonl:1 (exact)"]


def test_judged_rows_are_kept_as_pairs(model: Path) -> None:
    judged = [{"prompt": f"p{n // 2}", "completion": f"c{n}", "label": n % 2 == 0} for n in range(6)]
    write("train.jsonl", judged)
    report = check(recipe(model, train={"path": "train.jsonl", "format": "kto"}))
    assert "rows       6 read, 6 (100.0 %) kept as 3 pairs\n" in printed(report)
    assert report.splits[0].batches.sequences == 3


@pytest.mark.parametrize("tokenizer", [True, False])
def test_rows_of_another_kind_are_listed_with_and_without_a_tokenizer(model: Path, tokenizer: bool) -> None:
    write("train.jsonl", [row("a"), row("a", "b", "b")])
    write("eval.jsonl", [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}])
    sets = {"path": "eval.jsonl", "format": "auto"}
    report = check(recipe(model if tokenizer else "nowhere", eval=sets))
    messages = [str(problem) for problem in report.problems if not problem.where.startswith("model")]
    assert [line.split(": ")[:2] for line in messages] == [["train.jsonl:2", "rejected"], ["eval.jsonl:1", "messages"]]
    assert "holds one answer, and method.kind: dpo compares two answers to one prompt" in messages[1]


def test_pairs_in_an_sft_recipe_are_found_without_a_tokenizer_too(model: Path) -> None:
    write("train.jsonl", [row("a")])
    sft = recipe("nowhere", train={"path": "train.jsonl", "format": "auto"})
    text = (
        Path("recipe.yaml").read_text(encoding="utf-8").replace("kind: dpo", "kind: sft").replace("  beta: 0.1\n", "")
    )
    Path("recipe.yaml").write_text(text, encoding="utf-8")
    assert sft.method.kind == "dpo"
    messages = [str(problem) for problem in check(load_recipe("recipe.yaml")).problems]
    assert messages[1].startswith(
        "train.jsonl:1: chosen: holds two answers to compare, and method.kind: sft learns one"
    )


def test_unpaired_rows_are_listed_without_a_tokenizer(model: Path) -> None:
    write("train.jsonl", [{"prompt": "a", "completion": "b", "label": True}])
    report = check(recipe("nowhere", train={"path": "train.jsonl", "format": "kto"}))
    assert str(report.problems[1]).startswith("train.jsonl:1: label: its prompt has no undesirable answer")


def test_a_block_that_the_prompt_opens_for_answers_without_reasoning_is_said(model: Path) -> None:
    write("train.jsonl", [row("set light")])
    template = str(Path(trl.__file__).parent / "chat_templates" / "nemotron_3_nano.jinja")
    settings = recipe(model, OFF, chat_template=template)
    remarks = [
        "train: 2 answers without reasoning, and the generation prompt opens <think>: the model learns to close the "
        "block at once; data.template_args: {enable_thinking: false} gives a prompt without an open block"
    ]
    assert check(settings).remarks == remarks
    base = SimpleNamespace(tokenizer=recipe_tokenizer(model, settings)[0], family=None, config=None)
    assert dpo.prepare_rows(settings, cast(Base, base)).remarks[1:] == remarks
