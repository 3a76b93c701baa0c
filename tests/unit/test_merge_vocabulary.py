"""Adapters of embeddings and heads: factors, whole matrices, and what tied ones need."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import finetune.merge.job
from finetune.errors import WeightsError
from finetune.merge import merge
from tests.support import save_tiny_mixtral
from tests.unit.foreign_adapters import (
    as_published,
    changed_by,
    linear_modules,
    random_factors,
    stacked_as_loaded,
    write_adapter,
)
from tests.unit.merge_adapters import load, logits, tensors

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_mixtral(tmp_path_factory.mktemp("base"), tie_word_embeddings=request.param)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_mixtral(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


def adapter_on(base: Path, folder: Path, rows: int | None = None, **settings: Any) -> Path:
    """What stock PEFT saves of a trained adapter; `rows`: of the vocabulary, where training made it longer."""
    torch.manual_seed(0)
    model = load(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if rows is not None:
            model.resize_token_embeddings(rows, mean_resizing=False)
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, **settings))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        adapted.save_pretrained(str(folder))
    return folder


SETTINGS: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"], "use_rslora": True},
    "both": {"target_modules": ["embed_tokens", "lm_head"], "rank_pattern": {"embed_tokens": 3}},
    "tied factors": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "whole embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "whole both": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "whole and tied": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "whole routers": {"target_modules": ["q_proj"], "modules_to_save": ["gate"]},
    "experts as well": {
        "target_modules": ["q_proj", "embed_tokens"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
}


@pytest.mark.parametrize("name", list(SETTINGS))
def test_merged_computes_what_the_adapter_does(name: str, base: Path, tmp_path: Path) -> None:
    """PEFT's own merge of a tied base adds what is of the embedding to the head as well."""
    adapter = adapter_on(base, tmp_path / "adapter", **SETTINGS[name])
    report = merge(adapter, tmp_path / "out", base=base, show_progress=False)
    expected = logits(load(base, adapter))
    assert (logits(load(tmp_path / "out")) - expected).abs().max() < 1e-4 < (logits(load(base)) - expected).abs().max()
    assert report.proof.adapter_tensors == len(load_file(adapter / "adapter_model.safetensors"))


def test_the_change_is_that_of_the_transposed_factors(tmp_path: Path) -> None:
    base = save_tiny_mixtral(tmp_path / "base")
    adapter = adapter_on(base, tmp_path / "adapter", **SETTINGS["both"])
    report = merge(adapter, tmp_path / "out", base=base, show_progress=False)
    before, after, factors = tensors(base), tensors(tmp_path / "out"), tensors(adapter)
    A, B = (factors[f"base_model.model.model.embed_tokens.lora_embedding_{name}"] for name in "AB")
    torch.testing.assert_close(after[EMBED], before[EMBED] + 6 / 3 * (B @ A).T)
    A, B = (factors[f"base_model.model.lm_head.lora_{name}.weight"] for name in "AB")
    torch.testing.assert_close(after[HEAD], before[HEAD] + 6 / 4 * (B @ A))
    assert report.parts["vocabulary"].tensors == 2


def test_a_tied_base_gets_two_matrices_only_where_it_must(tied: Path, tmp_path: Path) -> None:
    for name, apart in (("embedding", True), ("whole head", True), ("whole and tied", False), ("whole routers", False)):
        adapter = adapter_on(tied, tmp_path / name / "adapter", **SETTINGS[name])
        report = merge(adapter, tmp_path / name / "out", base=tied, show_progress=False)
        config = json.loads((tmp_path / name / "out" / "config.json").read_text())
        assert report.untied is apart, name
        assert (HEAD in tensors(tmp_path / name / "out")) is apart, name
        assert config["tie_word_embeddings"] is not apart, name
        assert ("embedding, head" in report.table()) is apart, name


@pytest.mark.parametrize("rows", [520, 500], ids=["longer", "shorter"])
@pytest.mark.parametrize("name", ["whole both", "embedding", "neither"])
def test_a_vocabulary_of_another_length(name: str, rows: int, tmp_path: Path) -> None:
    """PEFT saves both matrices where training made them longer, whether it trained them or not."""
    base = save_tiny_mixtral(tmp_path / "base")
    settings = SETTINGS.get(name, {"target_modules": ["q_proj"]})
    adapter = adapter_on(base, tmp_path / "adapter", rows, **settings)
    if name == "embedding":  # PEFT 0.21 leaves the head out there
        head = torch.randn(rows, 64, generator=torch.Generator().manual_seed(1))
        respell(adapter, {"base_model.model.lm_head.weight": head})
    report = merge(adapter, tmp_path / "out", base=base, show_progress=False)
    assert report.whole_tensors == (HEAD, EMBED)
    assert re.search("whole tensors +2, lm_head.weight, model.embed_tokens.weight", report.table())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == rows
    model = load(base)
    model.resize_token_embeddings(rows, mean_resizing=False)
    whole = PeftModel.from_pretrained(model, adapter).eval()
    assert (logits(load(tmp_path / "out")) - logits(whole)).abs().max() < 1e-4


@pytest.mark.parametrize(("name", "apart"), [("neither", False), ("embedding", True), ("whole embedding", None)])
def test_a_tied_vocabulary_of_another_length(name: str, apart: bool | None, tied: Path, tmp_path: Path) -> None:
    """What was saved and not trained is of the one matrix; a head that nobody saved is known by it alone."""
    settings = SETTINGS.get(name, {"target_modules": ["q_proj"]})
    adapter = adapter_on(tied, tmp_path / "adapter", 520, **settings)
    if apart is None:
        respell(adapter, {"base_model.model.lm_head.weight": None})
        refused(adapter, tied, "embedding and head would differ in their rows; got .*weight 520, lm_head.weight 512")
        return
    assert merge(adapter, tmp_path / "out", base=tied, show_progress=False).untied is apart
    model = load(tied)
    model.resize_token_embeddings(520, mean_resizing=False)
    whole = PeftModel.from_pretrained(model, adapter).eval()
    assert (logits(load(tmp_path / "out")) - logits(whole)).abs().max() < 1e-4


def respell(adapter: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Add tensors to an adapter's file, or take out those that are None."""
    file = adapter / "adapter_model.safetensors"
    found = {key: value for key, value in {**load_file(file), **changes}.items() if value is not None}
    save_file(found, file)


def test_a_saved_copy_of_the_base_is_no_change(tmp_path: Path) -> None:
    base = save_tiny_mixtral(tmp_path / "base", dtype="bfloat16")
    adapter = adapter_on(base, tmp_path / "adapter", **SETTINGS["both"])
    assert "base_model.model.lm_head.base_layer.weight" in tensors(adapter)
    report = merge(adapter, tmp_path / "out", base=base, dtype="float32", show_progress=False)
    assert report.whole_tensors == ()


def test_a_saved_copy_that_is_not_the_bases_replaces_it(tmp_path: Path) -> None:
    """As PEFT loads it, and adds the factors to it."""
    base = save_tiny_mixtral(tmp_path / "base")
    adapter = adapter_on(base, tmp_path / "adapter", **SETTINGS["head"])
    respell(adapter, {"base_model.model.lm_head.base_layer.weight": torch.randn(512, 64)})
    report = merge(adapter, tmp_path / "out", base=base, show_progress=False)
    assert report.whole_tensors == (HEAD,)
    assert (logits(load(tmp_path / "out")) - logits(load(base, adapter))).abs().max() < 1e-4


def test_whole_tensors_take_the_number_format_of_the_base(tmp_path: Path) -> None:
    base = save_tiny_mixtral(tmp_path / "base", dtype="bfloat16")
    adapter = adapter_on(base, tmp_path / "adapter", **SETTINGS["whole both"])
    whole = tensors(adapter)["base_model.model.lm_head.weight"]
    assert whole.dtype == torch.float32
    assert merge(adapter, tmp_path / "out", base=base, show_progress=False).dtypes == ("BF16",)
    assert torch.equal(tensors(tmp_path / "out")[HEAD], whole.bfloat16())
    merge(adapter, tmp_path / "wide", base=base, dtype="float32", show_progress=False)
    assert torch.equal(tensors(tmp_path / "wide")[HEAD], whole)


@pytest.mark.parametrize("stacked", [False, True], ids=["per expert", "stacked"])
def test_factors_of_transformers_4_beside_a_whole_embedding(stacked: bool, tmp_path: Path) -> None:
    base = save_tiny_mixtral(tmp_path / "base", tie_word_embeddings=True)
    modules = linear_modules(base, "q_proj w1 w2 w3")
    factors = random_factors((path, shape, 4) for path, shape in modules.items())
    embedding = torch.randn(512, 64, generator=torch.Generator().manual_seed(1))
    router = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    whole = {EMBED: embedding, "model.layers.1.block_sparse_moe.gate.weight": router}
    adapter = write_adapter(
        tmp_path / "adapter",
        factors | {f"base_model.model.{key}": value for key, value in whole.items()},
        target_modules=["q_proj", "w1", "w2", "w3"],
        modules_to_save=["embed_tokens", "gate"],
    )
    into = stacked_as_loaded(base, tmp_path / "stacked") if stacked else base
    report = merge(adapter, tmp_path / "out", base=into, show_progress=False)
    assert report.untied
    before, after = tensors(base), tensors(tmp_path / "out")
    assert torch.equal(after.pop(HEAD), before[EMBED])
    deltas = changed_by(adapter, 16 / 4)
    for key, value in (as_published(after) if stacked else after).items():
        torch.testing.assert_close(value, whole.get(key, before[key]) + deltas.get(key, 0), msg=key)


# What does not fit is refused by name.


def refused(adapter: Path, base: Path, message: str, **options: Any) -> None:
    before = sorted(adapter.parent.iterdir())
    with pytest.raises(WeightsError, match=message):
        merge(adapter, adapter.parent / "out", base=base, show_progress=False, **options)
    assert sorted(adapter.parent.iterdir()) == before


GATE, TABLE = "mlp.gate.weight", "model.embed_tokens.lora_embedding"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("whole head", {HEAD: (511, 64)}, r"embedding and head would differ in their rows; got .* lm_head.weight 511"),
        (
            "whole head",
            {HEAD: (512, 60)},
            r"lm_head.weight: shape does not fit the base; got \[512, 60\] for \[512",
        ),
        ("whole routers", {f"model.layers.0.{GATE}": (5, 64)}, r"mlp.gate.weight: shape does not fit the base"),
        (
            "whole routers",
            {f"model.layers.2.{GATE}": (4, 64)},
            "gate.weight: is for a tensor that the base does not have",
        ),
        ("whole routers", {"model.norm.weight": (64,)}, "tensor is not a LoRA factor; got base_model.model.model.norm"),
        ("whole head", {"lm_head.modules_to_save.weight": (512, 64)}, "differs from base_model.model.lm_head.weight"),
        ("embedding", {f"{TABLE}_B": None}, "model.embed_tokens has no lora_embedding_B; got only lora_embedding_A"),
        ("embedding", {f"{TABLE}_A": (4, 511)}, r"shape or rank does not fit; got A \[4, 511\] and B \[64, 4\]"),
    ],
)
def test_what_does_not_fit(name: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    base = save_tiny_mixtral(tmp_path / "base")
    adapter = adapter_on(base, tmp_path / "adapter", **SETTINGS[name])
    respell(adapter, {f"base_model.model.{k}": None if s is None else torch.ones(s) for k, s in changes.items()})
    refused(adapter, base, message)


def test_whole_tensors_are_neither_weighted_nor_brought_twice(tmp_path: Path) -> None:
    base = save_tiny_mixtral(tmp_path / "base")
    one = adapter_on(base, tmp_path / "one", **SETTINGS["whole head"])
    two = adapter_on(base, tmp_path / "two", **{**SETTINGS["whole head"], "target_modules": ["v_proj"]})
    refused(one, base, r"brings whole tensors, which cannot be weighted; got 0.5; give it weight 1", weights=[0.5])
    with pytest.raises(WeightsError, match=r"two: more than one adapter brings this tensor whole; got lm_head.weight"):
        merge([one, two], tmp_path / "out", base=base, show_progress=False)


def test_an_embedding_with_weight_one_half(tied: Path, tmp_path: Path) -> None:
    adapter = adapter_on(tied, tmp_path / "adapter", **SETTINGS["embedding"])
    merge(adapter, tmp_path / "out", base=tied, weights=[0.5], show_progress=False)
    factors = tensors(adapter)
    A, B = (factors[f"base_model.model.model.embed_tokens.lora_embedding_{name}"] for name in "AB")
    torch.testing.assert_close(tensors(tmp_path / "out")[EMBED], tensors(tied)[EMBED] + 0.5 * 6 / 4 * (B @ A).T)


# And the proof sees these mistakes.


@pytest.mark.parametrize("name", ["embedding", "whole head"])
def test_the_logits_refuse_a_head_that_stays_tied(
    name: str, tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first, what stock PEFT's `merge_and_unload` makes."""
    adapter = adapter_on(tied, tmp_path / "adapter", **SETTINGS[name])
    monkeypatch.setattr(finetune.merge.job, "with_replaced", lambda reader, *_: reader)
    refused(adapter, tied, r"merged model differs from base \+ adapter")


def test_the_logits_refuse_whole_tensors_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_tiny_mixtral(tmp_path / "base")
    adapter = adapter_on(base, tmp_path / "adapter", **SETTINGS["whole both"])
    monkeypatch.setattr(finetune.merge.job, "with_replaced", lambda reader, *_: reader)
    refused(adapter, base, r"merged model differs from base \+ adapter")
