"""Pairs in three layouts: the same log-probabilities and the same gradients."""

from typing import Any

import numpy as np
import pytest
import torch
from trl.trainer.utils import add_fused_lm_head

from finetune.data.tokens.pair_batches import PairCollator, PairLayout
from finetune.data.tokens.pairs import TokenPair
from finetune.methods.pair_scores import score_pairs
from finetune.moe.lora import add_adapter
from tests.support import save_tiny_mixtral, tiny_tokenizer
from tests.unit.engine import base_model, lora_settings

LAYOUTS: tuple[PairLayout, ...] = ("padded", "flat", "shared")


def pair(prompt: int, chosen: int, rejected: int, seed: int) -> TokenPair:
    """Random ids; the second token of an answer of three or more is not supervised."""
    random = np.random.default_rng(seed)
    ids = [random.integers(4, 500, length, dtype=np.int32) for length in (prompt, chosen, rejected)]
    labels = [each.copy() for each in ids[1:]]
    for each in labels:
        if len(each) > 2:
            each[1] = -100
    return TokenPair(ids[0], ids[1], labels[0], ids[2], labels[1], f"pairs.jsonl:{seed}")


PAIRS = [pair(6, 4, 7, 1), pair(1, 3, 2, 2), pair(9, 1, 5, 3)]
PACKED = [{"pairs": [0, 1], "split": "train"}, {"pairs": [2], "split": "train"}]


def batch_of(layout: PairLayout, features: Any = PACKED, pairs: Any = PAIRS) -> dict[str, Any]:
    return PairCollator(tiny_tokenizer(), {"train": pairs}, layout)(features)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    base = base_model(save_tiny_mixtral(tmp_path_factory.mktemp("base")), load_in_4bit=False)
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs"))
    adapted = add_adapter(base, lora_settings())
    torch.manual_seed(0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted.train()


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, leaves = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, leaves, materialize_grads=True, allow_unused=True), strict=True))


def test_all_layouts_score_and_learn_the_same(model: Any) -> None:
    outputs = {layout: score_pairs(model, batch_of(layout), "sdpa") for layout in LAYOUTS}
    coefficient = torch.randn(6, 7, generator=torch.Generator().manual_seed(0))
    learnt = {layout: gradients(model, (each.log_probs * coefficient).sum()) for layout, each in outputs.items()}
    for layout in ("flat", "shared"):
        for name in ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs"):
            torch.testing.assert_close(outputs[layout][name], outputs["padded"][name], atol=1e-5, rtol=1e-5)
        for name, wanted in learnt["padded"].items():
            assert (learnt[layout][name] - wanted).abs().max() <= 1e-5 * wanted.abs().max() + 1e-9, name
