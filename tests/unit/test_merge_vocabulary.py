"""Adapters of embeddings and heads: factors, whole matrices, and what tied ones need."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from finetune.merge import merge
from tests.support import save_tiny_mixtral
from tests.unit.merge_adapters import load, logits

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
