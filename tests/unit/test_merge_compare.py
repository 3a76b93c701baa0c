"""`--compare`: loss and KL of the merges into both bases, and what they say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy, log_softmax

from finetune.errors import FinetuneError
from finetune.merge import merge
from finetune.merge.compare import Rows, advice, compare_rows, divergence
from finetune.merge.dequantized_base import DequantizedReader
from finetune.merge.report import Candidate, MergeReport
from finetune.moe.families import FAMILIES
from finetune.moe.lora import factor_stacks
from tests.families import save_tiny
from tests.support import CHATML, save_tiny_mixtral, tiny_tokenizer
from tests.unit.four_bits import adapter_in_4_bits, loaded_in_4_bits
from tests.unit.merge_adapters import load, tensors

ASKED = [{"role": "user", "content": "light"}]
WORDS = ["turn", "the", "light", "on", "in", "the", "kitchen", "and", "set", "a", "timer", "for", "ten", "minutes"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_mixtral(tmp_path_factory.mktemp("mixtral"), dtype="bfloat16")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter_in_4_bits(base, tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of different lengths, so that they fill one another up."""
    rows = [{"prompt": " ".join(WORDS[: 2 + n]), "completion": " ".join(WORDS[: 1 + n % 4])} for n in range(7)]
    return written(tmp_path_factory.mktemp("data") / "rows.jsonl", *rows)


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@torch.no_grad()
def by_hand(trained: Any, merged: Any, rows: Rows) -> tuple[float, float, float]:
    """Loss of both and mean KL(trained || merged), from whole models, row by row."""
    losses, others, kl, count = 0.0, 0.0, 0.0, 0
    for ids, labels in rows:
        one, two = (model(ids[None]).logits[0, :-1].double() for model in (trained, merged))
        counted = labels[1:] != -100
        losses += cross_entropy(one, labels[1:], reduction="sum").item()
        others += cross_entropy(two, labels[1:], reduction="sum").item()
        p, q = log_softmax(one[counted], -1), log_softmax(two[counted], -1)
        kl += (p.exp() * (p - q)).sum().item()
        count += int(counted.sum())
    return losses / count, others / count, kl / count


@pytest.fixture(scope="module")
def reports(
    base: Path, adapter: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, MergeReport]]:
    """Merges into both bases, each of which measures both."""
    found = {}
    for into in ("original", "dequantized"):
        folder = tmp_path_factory.mktemp(into) / "out"
        found[into] = folder, merge(adapter, folder, into=into, compare=data, show_progress=False)
    return found


@pytest.mark.parametrize("into", ["original", "dequantized"])
def test_the_figures_are_those_of_whole_models(
    into: str, base: Path, adapter: Path, data: Path, reports: dict[str, tuple[Path, MergeReport]]
) -> None:
    rows = compare_rows(data, 128, adapter, base)
    folder, report = reports[into]
    trained = PeftModel.from_pretrained(loaded_in_4_bits(base), adapter).eval()
    factor_stacks(trained)  # PEFT's own forward needs dense stacks
    loss, merged_loss, kl = by_hand(trained, load(folder), rows)
    compare = report.compare
    assert compare is not None
    assert compare.trained_loss == pytest.approx(loss, rel=1e-5)
    assert compare.into[into].loss == pytest.approx(merged_loss, rel=1e-5)
    assert compare.into[into].kl == pytest.approx(kl, rel=1e-3)
    assert (compare.rows, compare.tokens) == (7, sum(int((labels[1:] != -100).sum()) for _, labels in rows))


def test_both_merges_are_measured_whichever_is_written(reports: dict[str, tuple[Path, MergeReport]]) -> None:
    (first, one), (second, other) = reports.values()
    assert one.compare == other.compare
    assert (one.into, other.into) == ("original", "dequantized")
    assert any(not torch.equal(value, tensors(second)[key]) for key, value in tensors(first).items())
    # Into what was trained only the rounding to 16 bits is left; the other base was moved by more than the delta.
    assert one.compare is not None
    assert one.compare.into["dequantized"].kl < 0.01 * one.compare.into["original"].kl
    assert "KL" in one.table()
    assert json.loads((first / "merge-report.json").read_text())["compare"]["advice"] == one.compare.advice


def test_the_ratio_is_what_nf4_moved_over_what_the_adapter_does(
    base: Path, reports: dict[str, tuple[Path, MergeReport]]
) -> None:
    folder, report = reports["dequantized"]
    seen, plain = DequantizedReader(base, FAMILIES["mixtral"], torch.float32), tensors(base)
    merged = tensors(folder)
    assert report.compare is not None
    assert set(report.compare.shift) == {"attention", "experts"}  # routers are adapted and not quantised
    for part, word in (("attention", "self_attn"), ("experts", "experts")):
        keys = [key for key in seen.quantized if word in key]
        shift = sum((plain[key].float() - seen.read(key)).square().sum().item() for key in keys)
        delta = sum((merged[key].float() - seen.read(key)).square().sum().item() for key in keys)
        assert report.compare.shift[part] == pytest.approx((shift / delta) ** 0.5, rel=0.01)


def test_one_merge_only_of_an_adapter_that_was_trained_in_16_bits(base: Path, data: Path, tmp_path: Path) -> None:
    adapter = adapter_in_4_bits(base, tmp_path / "adapter", dtype=None)
    report = merge(adapter, tmp_path / "out", compare=data, show_progress=False)
    assert report.compare is not None
    assert (set(report.compare.into), report.compare.shift) == ({"original"}, {})
    assert "only into original was measured: the adapter was trained on the 16-bit base" in report.table()


def test_other_architectures(data: Path, tmp_path: Path) -> None:
    """Embeddings that are scaled, logits that are divided, experts in one tensor."""
    base = save_tiny("granitemoe", tmp_path / "base")
    adapter = adapter_in_4_bits(base, tmp_path / "adapter")
    report = merge(adapter, tmp_path / "out", compare=data, compare_rows=3, show_progress=False)
    rows = compare_rows(data, 3, adapter, base)
    trained = PeftModel.from_pretrained(loaded_in_4_bits(base), adapter).eval()
    factor_stacks(trained)  # PEFT's own forward needs dense stacks
    loss, merged_loss, kl = by_hand(trained, load(tmp_path / "out"), rows)
    assert report.compare is not None
    found = report.compare.into["original"]
    assert (report.compare.trained_loss, found.loss) == pytest.approx((loss, merged_loss), rel=1e-4)
    assert found.kl == pytest.approx(kl, rel=1e-2)
    assert report.compare.rows == 3


def test_the_divergence_is_from_what_was_trained() -> None:
    trained, merged = torch.tensor([[0.9, 0.1]]).double().log(), torch.tensor([[0.5, 0.5]]).double().log()
    assert divergence(trained, merged) == pytest.approx(0.3681, abs=1e-4)  # the other way round 0.5108
    assert divergence(trained, trained) == 0


def test_the_advice_follows_from_the_figures() -> None:
    low, high, mixed = Candidate(0.1, 0.01), Candidate(0.2, 0.02), Candidate(0.05, 0.03)
    assert advice({"original": high, "dequantized": low}, None).startswith("merge --into dequantized: lower loss")
    assert advice({"original": low, "dequantized": high}, None).startswith("merge --into original: lower loss")
    said = advice({"original": mixed, "dequantized": low}, None)
    assert said == "--into original has the lower loss on these rows, --into dequantized is closer to what was trained"


def test_rows_are_read_as_training_read_its_own(base: Path, tmp_path: Path) -> None:
    """Loss and template of the recipe; of the file it names also the columns, of another what they tell."""
    adapter = adapter_in_4_bits(base, tmp_path / "adapter")
    turns = [{"role": role, "content": "light"} for role in ("user", "assistant") * 2]
    data = written(tmp_path / "rows.jsonl", {"messages": turns})
    counts = []
    for loss_on in ("assistant", "last_assistant"):
        section = {"train": {"path": str(data), "format": "messages"}, "loss_on": loss_on, "max_length": 64}
        record = json.loads((adapter / "finetune.json").read_text())
        (adapter / "finetune.json").write_text(json.dumps({**record, "recipe": {"data": section}}))
        [(_, labels)] = compare_rows(data, 1, adapter, base)
        counts.append(int((labels != -100).sum()))
    assert counts[0] == 2 * counts[1] > 0


def test_rows_are_rendered_with_the_variables_of_the_training(base: Path, tmp_path: Path) -> None:
    adapter = adapter_in_4_bits(base, tmp_path / "adapter")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if quick %}light {% endif %}" + CHATML
    tokenizer.save_pretrained(adapter)
    data = written(tmp_path / "rows.jsonl", {"prompt": "set", "completion": "on"})
    lengths = []
    for args in ({}, {"template_args": {"quick": True}}):
        record = json.loads((adapter / "finetune.json").read_text())
        (adapter / "finetune.json").write_text(json.dumps({**record, **args}))
        [(ids, _)] = compare_rows(data, 1, adapter, adapter)
        lengths.append(len(ids))
    assert lengths[1] == lengths[0] + len(tiny_tokenizer().encode("light "))


def test_of_pairs_the_chosen_answers_are_measured(base: Path, adapter: Path, tmp_path: Path) -> None:
    pair = {"prompt": "light", "chosen": "on and on", "rejected": "off"}
    single = {"prompt": "light", "completion": "on and on"}
    [chosen] = compare_rows(written(tmp_path / "pairs.jsonl", pair), 1, adapter, base)
    [row] = compare_rows(written(tmp_path / "rows.jsonl", single), 1, adapter, base)
    assert all(torch.equal(one, other) for one, other in zip(chosen, row, strict=True))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "no such data file"),
        (
            [{"messages": [*ASKED, {"role": "assistant", "content": "on", "train": False}]}],
            "no assistant message is learned",
        ),
        ([{"what": "is this"}], "the rows fit no format"),
    ],
    ids=["no such file", "nothing supervised", "no format"],
)
def test_data_that_nothing_can_be_measured_on(
    rows: list[dict[str, Any]] | None, message: str, adapter: Path, tmp_path: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    if rows is not None:
        written(data, *rows)
    with pytest.raises(FinetuneError, match=message) as caught:
        merge(adapter, tmp_path / "out", compare=data, show_progress=False)
    print(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()
