"""Rows of embedding and head for added tokens: how they start, that only they are trained, what is saved of them."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from finetune.data import load_tokenizer
from finetune.errors import RecipeError
from finetune.model import adapt, load_base
from finetune.moe import lora
from finetune.moe.audit import audit_model, audit_table, differences
from finetune.moe.checkpointing import enable_checkpointing
from finetune.moe.families import FAMILIES
from finetune.moe.lora import grow_vocabulary
from finetune.recipe import Recipe
from tests.bases import base_at, load_folder, with_lora
from tests.families import CONFIGS, save_tiny
from tests.support import save_tiny_mixtral
from tests.unit.added_tokens import BASES, IDS, KNOWN, MARKS, NEW, base_of, recipe_for, saved, settings, trained
from tests.unit.engine import lora_settings
from tests.unit.merge_adapters import load

OLD_IDS = torch.arange(4, 44)[None]


def recipe_of(base: Path) -> Recipe:
    return recipe_for(base, base.parent / "turns.jinja")


def matrices(model: Any) -> dict[str, torch.Tensor]:
    """Embedding and head as they are stored, without the rows that PEFT keeps apart; one of the two where tied."""
    names = ("embed_tokens", "lm_head")
    return {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if any(part in name for part in names) and "trainable_tokens" not in name
    }


@pytest.mark.parametrize("kind", BASES)
def test_new_rows_start_as_the_mean_of_the_known_and_no_other_row_changes(kind: str, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", kind)
    before, after = matrices(load_folder(base, settings(base))), matrices(load_folder(base, settings(base), NEW))
    assert len(after) == (1 if kind == "tied" else 2)
    for name, matrix in after.items():
        assert len(matrix) == max(len(before[name]), NEW[1] + 1)
        others = [row for row in range(len(before[name])) if row not in NEW]
        assert torch.equal(matrix[others], before[name][others])
        mean = before[name][:KNOWN].mean(0)
        torch.testing.assert_close(matrix[NEW], torch.stack([mean, mean]))


def test_a_new_row_is_trained_even_if_the_base_pads_with_its_id(tmp_path: Path) -> None:
    """transformers gives such a row of the embedding no gradient."""
    base = save_tiny_mixtral(tmp_path / "base", vocab_size=512, pad_token_id=NEW[0])
    model = with_lora(load_folder(base, settings(base), NEW), lora_settings(), NEW)
    model(input_ids=IDS, labels=IDS).loss.backward()
    rows = [p for name, p in model.named_parameters() if p.requires_grad and "embed_tokens" in name]
    assert [bool(row.any()) for p in rows for row in p.grad] == [True, True]


def test_they_start_the_same_whatever_was_drawn_before(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "untied")
    one = matrices(load_folder(base, settings(base), NEW))
    torch.rand(7)
    other = matrices(load_folder(base, settings(base), NEW))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", BASES)
def test_a_fresh_adapter_with_new_rows_is_the_base_on_everything_known(kind: str, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", kind)
    with torch.no_grad():
        plain = load_folder(base, settings(base))(input_ids=OLD_IDS).logits
        record = base_at(base, settings(base), NEW)
        model = adapt(load_base(record, settings(base)), record, recipe_of(base)).eval()
        grown = model(input_ids=OLD_IDS)
    assert torch.equal(grown.logits[..., :KNOWN], plain[..., :KNOWN])


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_only_the_new_rows_are_trained_beside_the_factors(kind: str, load_in_4bit: bool, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", kind)
    model = with_lora(load_folder(base, settings(base, load_in_4bit), NEW), lora_settings(), NEW)
    before = {name: matrix.clone() for name, matrix in matrices(model).items()}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name}
    assert {tuple(p.shape) for p in trainable.values()} == {(2, 64)}
    assert len(trainable) == (1 if kind == "tied" else 2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.5)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum(1).min() > 0 for p in trainable.values())
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(matrix, before[name]) for name, matrix in matrices(model).items())
    assert all((p - before_rows(before, name)).abs().sum(1).min() > 0 for name, p in trainable.items())


def before_rows(matrices: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Where the rows that PEFT calls `name` started."""
    module = name.split(".token_adapter.")[0]
    return next(matrix[NEW] for other, matrix in matrices.items() if other.startswith(module))


def test_without_added_tokens_nothing_of_the_vocabulary_is_trained_or_resized(tmp_path: Path) -> None:
    base = save_tiny_mixtral(tmp_path / "base", vocab_size=KNOWN)
    model = with_lora(load_folder(base, settings(base)), lora_settings())
    assert all(len(matrix) == KNOWN for matrix in matrices(model).values())
    parts = audit_model(model, FAMILIES["mixtral"])
    assert [(parts[part].trained, parts[part].rows) for part in ("embeddings", "head")] == [(0, 0), (0, 0)]
    assert [str(problem) for problem in differences(parts, lora_settings(), True, "float32", added_tokens=2)] == [
        f"audit: {part}: the recipe adds 2 tokens, so 2 rows are to be trained; got 0 rows; report this"
        for part in ("embeddings", "head")
    ]


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_the_audit_counts_the_rows(kind: str, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", kind)
    model = with_lora(load_folder(base, settings(base), NEW), lora_settings(), NEW)
    parts = audit_model(model, FAMILIES["mixtral"])
    assert differences(parts, lora_settings(), True, "float32", added_tokens=2) == []
    wanted = {"embeddings": 2} if kind == "tied" else {"embeddings": 2, "head": 2}
    assert {name: part.as_dict()["rows"] for name, part in parts.items() if part.rows} == wanted
    assert {name: part.trained for name, part in parts.items() if part.rows} == dict.fromkeys(wanted, 2 * 64)
    assert "2 rows" in audit_table(parts)
    (line, *_) = map(str, differences(parts, lora_settings(), True, "float32"))
    assert line == "audit: embeddings: the recipe adds 0 tokens, so 0 rows are to be trained; got 2 rows; report this"


def test_the_audit_names_a_head_that_was_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of(tmp_path / "base", "untied")
    original = lora.vocabulary_modules

    def without_head(model: Any) -> dict[str, Any]:
        return {name: module for name, module in original(model).items() if name != "lm_head"}

    model = load_folder(base, settings(base), NEW)
    monkeypatch.setattr(lora, "vocabulary_modules", without_head)
    model = with_lora(model, lora_settings(), NEW)
    (problem,) = differences(audit_model(model, FAMILIES["mixtral"]), lora_settings(), True, "float32", 2)
    assert str(problem) == "audit: head: the recipe adds 2 tokens, so 2 rows are to be trained; got 0 rows; report this"


def test_rows_of_a_16_bit_model_are_trained_in_32_bits(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "untied", "bfloat16")
    model = with_lora(load_folder(base, settings(base, dtype="bfloat16"), NEW), lora_settings(), NEW)
    kept = {name: p.dtype for name, p in model.named_parameters() if "trainable_tokens" in name}
    assert set(kept.values()) == {torch.float32}
    assert {matrix.dtype for matrix in matrices(model).values()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_checkpointing_gives_the_rows_the_same_gradients(kind: str, tmp_path: Path) -> None:
    model = trained(recipe_of(base_of(tmp_path / "base", kind))).train()
    gradients = []
    for mode in ("none", "full", "selective"):
        enable_checkpointing(model, mode)
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append([p.grad.clone() for name, p in model.named_parameters() if "trainable_tokens" in name])
    assert len(gradients[0]) == (1 if kind == "tied" else 2)
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0])


@pytest.mark.parametrize("kind", BASES)
def test_the_saved_adapter_is_read_by_stock_peft_on_a_base_made_as_long(kind: str, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", kind)
    recipe = recipe_of(base)
    recipe = recipe.model_copy(update={"model": settings(base, load_in_4bit=False)})
    adapter = saved(recipe, tmp_path / "adapter", "0")
    held = load_file(adapter / "adapter_model.safetensors")
    rows = {name: tensor.shape for name, tensor in held.items() if ".lora_" not in name}
    assert set(rows.values()) == {(2, 64)}, "not the whole embedding"
    assert json.loads((adapter / "finetune.json").read_text())["added_tokens"] == dict(zip(MARKS, NEW, strict=True))
    # As docs/added-tokens.md tells a user.
    tokenizer = load_tokenizer(str(adapter), None, None)
    stock = load(base)
    if len(tokenizer) > stock.get_input_embeddings().num_embeddings:
        stock.resize_token_embeddings(len(tokenizer))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = PeftModel.from_pretrained(stock, adapter).eval()
    with torch.no_grad():
        ours, theirs = trained(recipe)(input_ids=IDS).logits, stock(input_ids=IDS).logits
    assert ours.shape == theirs.shape
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


def test_stock_peft_says_so_where_the_base_was_not_made_longer(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "untied")
    adapter = saved(recipe_of(base), tmp_path / "adapter", "0")
    with pytest.raises(IndexError):
        load(base, adapter)


def test_a_head_with_a_bias_is_refused(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "untied")
    model = load_folder(base, settings(base))
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(KNOWN))
    with pytest.raises(RecipeError, match=r"model.added_tokens: the head of mixtral has a bias, or is no linear layer"):
        grow_vocabulary(model, NEW)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_every_architecture_takes_new_rows(model_type: str, tmp_path: Path) -> None:
    base = save_tiny(model_type, tmp_path / "base")
    family = FAMILIES[model_type]
    new, ids = [512, 513], torch.tensor([[512, 40, 41, 513, 42]])
    model_settings = settings(base).model_copy(update={"attn_implementation": family.attn_implementations[0]})
    model = load_folder(base, model_settings, new)
    lora = lora_settings(targets=["attention"])
    adapted = with_lora(model, lora, new)
    adapted(input_ids=ids, labels=ids).loss.backward()
    rows = [p for name, p in adapted.named_parameters() if "trainable_tokens_delta" in name]
    assert rows
    assert all(p.grad.abs().sum(1).min() > 0 for p in rows)
    assert [str(problem) for problem in differences(audit_model(adapted, family), lora, True, "float32", 2)] == []
