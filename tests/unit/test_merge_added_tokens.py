"""Merging an adapter with rows of added tokens: longer matrices, their tokenizer, and a proof that can fail."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from finetune.adapters.whole_tensors import TokenRows
from finetune.checkpoint import fingerprint
from finetune.errors import WeightsError
from finetune.merge import MergeReport, merge, proof
from finetune.moe.lora import grow_vocabulary
from tests.support import tiny_tokenizer
from tests.unit.added_tokens import BASES, IDS, KNOWN, MARKS, NEW, TURNS, base_of, recipe_for, saved
from tests.unit.merge_adapters import load, tensors

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PEFT_ROWS = "base_model.model.{}.token_adapter.trainable_tokens_delta"


def made(folder: Path, kind: str = "untied", dtype: str = "float32") -> tuple[Path, Path]:
    """A base and an adapter of it with rows for two tokens."""
    base = base_of(folder / "base", kind, dtype)
    return base, saved(recipe_for(base, folder / "turns.jinja"), folder / "adapter", fingerprint(base))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return made(tmp_path_factory.mktemp("pristine"))


@pytest.fixture
def base_and_adapter(pristine: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """The base, which no merge changes, and a copy of its adapter."""
    base, adapter = pristine
    return base, shutil.copytree(adapter, tmp_path / "adapter")


def merged(adapter: Path, **options: Any) -> MergeReport:
    return merge(adapter, adapter.parent / "merged", show_progress=False, **options)


def refusal(adapter: Path, **options: Any) -> str:
    with pytest.raises(WeightsError) as caught:
        merged(adapter, **options)
    assert not (adapter.parent / "merged").exists()
    return str(caught.value)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(IDS).logits[0]
    return result


def adapted(base: Path, adapter: Path) -> torch.Tensor:
    """Logits of stock PEFT on a base that was made as long as its tokenizer."""
    from peft import PeftModel

    model = load(base)
    if NEW[1] >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(NEW[1] + 1)
    return logits(PeftModel.from_pretrained(model, adapter))


def edit(file: Path, **changes: Any) -> None:
    """Change values of a JSON file; of an adapter's settings as in a folder whose record does not repeat them."""
    if file.name == "adapter_config.json":
        edit(file.with_name("finetune.json"), settings=None, sha256=None)
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}), encoding="utf-8")


def edit_rows(adapter: Path, module: str, value: torch.Tensor | None) -> None:
    edit(adapter / "finetune.json", sha256=None)
    file = adapter / "adapter_model.safetensors"
    held = load_file(file)
    held.pop(PEFT_ROWS.format(module), None)
    if value is not None:
        held[PEFT_ROWS.format(module)] = value
    save_file(held, file)


@pytest.mark.parametrize("kind", BASES)
def test_merged_equals_the_adapter_on_new_tokens(kind: str, tmp_path: Path) -> None:
    base, adapter = made(tmp_path, kind)
    report = merged(adapter)
    found = logits(load(tmp_path / "merged"))
    torch.testing.assert_close(found, adapted(base, adapter), atol=1e-4, rtol=1e-4)
    before, after = tensors(base), tensors(tmp_path / "merged")
    assert before.keys() == after.keys()
    for key in {EMBEDDING, HEAD} & set(before):
        length = max(len(before[key]), NEW[1] + 1)
        assert after[key].shape == (length, 64)
        others = [row for row in range(len(before[key])) if row not in NEW]
        assert torch.equal(after[key][others], before[key][others])
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["vocab_size"] == len(after[EMBEDDING])
    assert report.added_tokens == 2
    assert report.proof.changed == report.targeted
    assert report.logits.added_error_mean is not None
    assert report.logits.added_error_mean < 1e-4
    assert "added tokens" in report.table()


def test_a_tied_checkpoint_that_holds_its_matrix_twice_stays_one(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "tied")
    held = load_file(base / "model.safetensors")
    save_file({**held, HEAD: held[EMBEDDING].clone()}, base / "model.safetensors", metadata={"format": "pt"})
    adapter = saved(recipe_for(base, tmp_path / "turns.jinja"), tmp_path / "adapter", fingerprint(base))
    merged(adapter)
    after = tensors(tmp_path / "merged")
    assert torch.equal(after[HEAD], after[EMBEDDING])
    torch.testing.assert_close(logits(load(tmp_path / "merged")), adapted(base, adapter), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_a_16_bit_base_takes_rows_that_are_rounded_once(dtype: str | None, tmp_path: Path) -> None:
    _, adapter = made(tmp_path, "one row to spare", "bfloat16")
    report = merged(adapter, dtype=dtype)
    rows = load_file(adapter / "adapter_model.safetensors")[PEFT_ROWS.format("lm_head")]
    found = tensors(tmp_path / "merged")[HEAD][NEW]
    assert found.dtype == (torch.float32 if dtype else torch.bfloat16)
    assert torch.equal(found, rows.to(found.dtype))
    assert report.logits.added_error_mean is not None
    assert report.logits.added_mean is not None
    assert report.logits.added_error_mean < 0.02 * report.logits.added_mean


def test_what_stands_beside_the_weights_knows_the_tokens(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "untied")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "temperature": 0.7, "do_sample": True}))
    adapter = saved(recipe_for(base, tmp_path / "turns.jinja"), tmp_path / "adapter", fingerprint(base))
    merged(adapter)
    out = tmp_path / "merged"
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.convert_tokens_to_ids(MARKS) == NEW
    assert (tokenizer.eos_token_id, tokenizer.chat_template) == (NEW[1], TURNS)
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == NEW[1]
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [NEW[1], 2], "temperature": 0.7, "do_sample": True}


def test_settings_that_stop_there_already_stay_as_they_are(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "untied")
    text = json.dumps({"eos_token_id": [2, NEW[1]]})
    (base / "generation_config.json").write_text(text)
    adapter = saved(recipe_for(base, tmp_path / "turns.jinja"), tmp_path / "adapter", fingerprint(base))
    merged(adapter)
    assert (tmp_path / "merged" / "generation_config.json").read_text() == text


def test_the_base_tokenizer_does_not_know_the_trained_tokens(base_and_adapter: tuple[Path, Path]) -> None:
    base, adapter = base_and_adapter
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (adapter / name).unlink()
    assert refusal(adapter).splitlines()[0] == (
        f"{base}: the adapter was trained with <|turn|> as token {KNOWN}; got no such token here; "
        "copy the whole adapter folder of the run, its tokenizer included"
    )
    (adapter / "finetune.json").unlink()
    assert refusal(adapter, base=base) == (
        f"{base}: the adapter has rows of tokens that this tokenizer lacks; got token {KNOWN}; "
        "give the adapter folder its tokenizer"
    )


def test_a_tokenizer_that_numbers_them_otherwise(base_and_adapter: tuple[Path, Path]) -> None:
    _, adapter = base_and_adapter
    other = tiny_tokenizer()
    other.add_tokens(MARKS[::-1], special_tokens=True)
    other.save_pretrained(adapter)
    assert f"the adapter was trained with <|turn|> as token {KNOWN}; got token {KNOWN + 1} here" in refusal(adapter)


def test_a_tokenizer_with_more_tokens_than_rows(base_and_adapter: tuple[Path, Path]) -> None:
    _, adapter = base_and_adapter
    other = AutoTokenizer.from_pretrained(adapter)
    other.add_tokens(["<|more|>"], special_tokens=True)
    other.save_pretrained(adapter)
    found = f"a token is outside the model's vocabulary; got id {KNOWN + 2} for {KNOWN + 2} entries"
    assert found in refusal(adapter)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (None, "trainable_token_indices: does not say which tokens the rows belong to; got model.embed_tokens"),
        ({"model.embed_tokens": NEW}, "does not say which tokens the rows belong to; got lm_head"),
        ({"model.embed_tokens": [NEW[0]] * 2, "lm_head": NEW}, "must name each token once, by its number; got [2"),
        ({"model.embed_tokens": NEW[:1], "lm_head": NEW}, "got [2, 64] for 1 tokens and rows of 64"),
        (
            {"model.embed_tokens": NEW, "lm_head": NEW, "wte": NEW},
            "no rows for a matrix that its settings name; got wte",
        ),
        (
            {"model.embed_tokens": [KNOWN, KNOWN + 2], "lm_head": [KNOWN, KNOWN + 2]},
            f"leaves rows of {EMBEDDING} that neither the base nor the adapter has; got row {KNOWN + 1}",
        ),
        (
            {"model.embed_tokens": NEW, "lm_head": [5, 6]},
            f"embedding and head would differ in their rows; got {EMBEDDING} {KNOWN + 2}, {HEAD} {KNOWN}",
        ),
    ],
    ids=["none", "no head", "twice", "too few", "another matrix", "a gap", "head stays short"],
)
def test_settings_that_do_not_fit_the_rows(
    base_and_adapter: tuple[Path, Path], indices: dict[str, list[int]] | None, message: str
) -> None:
    _, adapter = base_and_adapter
    edit(adapter / "adapter_config.json", trainable_token_indices=indices)
    assert message in refusal(adapter)


@pytest.mark.parametrize(
    ("module", "value", "message"),
    [
        ("lm_head", None, "has no rows for a matrix that its settings name; got lm_head"),
        ("lm_head", torch.ones(2, 32), "got [2, 32] for 2 tokens and rows of 64"),
        ("lm_head", torch.ones(2, 64, dtype=torch.int64), "rows are not a floating-point matrix; got I64[2, 64]"),
        ("lm_head", torch.full((2, 64), torch.nan), "lm_head.weight: merged tensor is not finite"),
    ],
    ids=["absent", "narrow", "integers", "not finite"],
)
def test_rows_that_do_not_fit_the_base(
    base_and_adapter: tuple[Path, Path], module: str, value: torch.Tensor | None, message: str
) -> None:
    _, adapter = base_and_adapter
    edit_rows(adapter, module, value)
    assert message in refusal(adapter)


@pytest.mark.parametrize(("kind", "module"), [("tied", "lm_head"), ("untied", "model.norm")])
def test_rows_of_a_matrix_that_the_base_does_not_have(kind: str, module: str, tmp_path: Path) -> None:
    _, adapter = made(tmp_path, kind)
    edit_rows(adapter, module, torch.ones(2, 64))
    indices = json.loads((adapter / "adapter_config.json").read_text())["trainable_token_indices"]
    edit(adapter / "adapter_config.json", trainable_token_indices={**indices, module: NEW})
    assert f"{module}: rows of a matrix that the base does not have; merge into the base" in refusal(adapter)


# The proof must be able to fail: each of these breaks the arithmetic once.


@pytest.mark.parametrize("kind", ["untied", "rows to spare"])
def test_rows_that_were_not_put_in_place_are_seen(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, adapter = made(tmp_path, kind)
    monkeypatch.setattr(TokenRows, "put", lambda self, rows, start: torch.zeros_like(rows) if start >= KNOWN else rows)
    message = "rows of added tokens are in the wrong place; report this bug"
    assert message in refusal(adapter)


@pytest.mark.parametrize("module", ["model.embed_tokens", "lm_head"])
def test_the_logits_see_rows_in_the_wrong_order(
    module: str, base_and_adapter: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, adapter = base_and_adapter
    put = TokenRows.put

    def swapped(self: TokenRows, rows: torch.Tensor, start: int) -> torch.Tensor:
        tokens = self.tokens[::-1] if self.key == f"{module}.weight" else self.tokens
        return put(TokenRows(self.key, self.info, tokens, self.base_rows), rows, start)

    monkeypatch.setattr(TokenRows, "put", swapped)
    assert "rows of added tokens are in the wrong place" in refusal(adapter)
    monkeypatch.setattr(proof, "prove_rows", lambda *_: None)
    assert "logits of the added tokens differ from base + adapter" in refusal(adapter)


def test_a_config_that_keeps_the_old_size_is_seen(
    base_and_adapter: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, adapter = base_and_adapter
    monkeypatch.setattr("finetune.merge.job.vocab_size", lambda *_: KNOWN)
    assert f"a token is outside the model's vocabulary; got id {NEW[1]} for {KNOWN} entries" in refusal(adapter)
    monkeypatch.setattr("finetune.merge.job.check_tokenizer", lambda *_: None)
    with pytest.raises(WeightsError, match="mismatched_sizes"):
        merged(adapter)
    assert not (adapter.parent / "merged").exists()


def test_the_base_is_never_changed(base_and_adapter: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = base_and_adapter
    shutil.copytree(base, tmp_path / "copy")
    merged(adapter)
    assert all((base / file.name).read_bytes() == file.read_bytes() for file in (tmp_path / "copy").iterdir())
    model = load(base)
    grow_vocabulary(model, NEW)
    assert len(model.lm_head.weight) == KNOWN + 2
