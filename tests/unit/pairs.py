"""Pairs, batches of them, and models that score them, for the tests of DPO's layouts."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from trl.trainer.utils import add_fused_lm_head

from finetune.data.tokens.collators import PairCollator, PairLayout
from finetune.data.types import TokenPair
from finetune.methods.loss_head import fit_head
from tests.bases import with_lora
from tests.support import tiny_tokenizer
from tests.unit.engine import base_model, lora_settings

LAYOUTS: tuple[PairLayout, ...] = ("padded", "packed", "flat", "shared")
FIELDS = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
TOKENIZER = tiny_tokenizer()


def token_pair(prompt: int, chosen: int, rejected: int, seed: int) -> TokenPair:
    """Random ids; of an answer of three tokens or more the second is not supervised."""
    random = np.random.default_rng(seed)
    ids = [random.integers(4, 500, length, dtype=np.int32) for length in (prompt, chosen, rejected)]
    labels = [answer.copy() for answer in ids[1:]]
    for answer in labels:
        if len(answer) > 2:
            answer[1] = -100
    return TokenPair(ids[0], ids[1], labels[0], ids[2], labels[1], f"pairs.jsonl:{seed}")


PAIRS = [token_pair(9, 4, 7, 1), token_pair(1, 3, 2, 2), token_pair(12, 1, 5, 3)]
LONGEST = max(len(pair.prompt_ids) + len(ids) for pair in PAIRS for ids, _ in pair.answers)
PACKED = [{"pairs": [0, 1], "split": "train"}, {"pairs": [2], "split": "train"}]


def pair_batch(layout: PairLayout, pairs: list[TokenPair] = PAIRS, features: Any = PACKED) -> dict[str, Any]:
    """A micro-batch; of all three pairs by default, two of them in one feature."""
    return PairCollator(TOKENIZER, {"train": pairs}, layout)(features)


def scoring_model(folder: Path, load_in_4bit: bool = False, **lora: Any) -> Any:
    """An adapted model with TRL's fused head, whose factors are not zero."""
    base = base_model(folder, load_in_4bit)
    add_fused_lm_head(base, outputs=FIELDS)
    fit_head(base)
    model = with_lora(base, lora_settings(**lora))
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def scores_alone(model: Any, pairs: list[TokenPair] = PAIRS) -> torch.Tensor:
    """Log-probabilities `[2B, W]` from the model's own logits, one document at a time, in a plain loop."""
    answers = [pair.answers[number] for number in (0, 1) for pair in pairs]
    rows = []
    for pair, (ids, labels) in zip([*pairs, *pairs], answers, strict=True):
        document = torch.tensor(np.concatenate([pair.prompt_ids, ids])).long()[None]
        logits = model(input_ids=document, use_cache=False).logits[0].log_softmax(-1)
        row = logits.new_zeros(max(len(ids) for ids, _ in answers))
        for number, label in enumerate(labels.tolist()):
            if label != -100:
                row[number] = logits[len(pair.prompt_ids) - 1 + number, label]
        rows.append(row)
    return torch.stack(rows)


def gradients(model: Any, log_probs: torch.Tensor, extra: torch.Tensor | float = 0.0) -> dict[str, torch.Tensor]:
    """Of a random linear function of the log-probabilities plus `extra`, for every trained parameter."""
    coefficient = torch.randn(log_probs.shape, generator=torch.Generator().manual_seed(0)).to(log_probs)
    names, leaves = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    loss = (log_probs * coefficient).sum() + extra
    return dict(zip(names, torch.autograd.grad(loss, leaves, materialize_grads=True, allow_unused=True), strict=True))


def assert_same_gradients(
    got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float = 1e-5
) -> None:
    """Each within `tolerance` of its own largest value; and there are some."""
    assert got.keys() == wanted.keys()
    assert sum(value.abs().max() > 1e-3 for value in wanted.values()) > len(wanted) / 2
    for name, value in wanted.items():
        assert (got[name] - value).abs().max() <= tolerance * value.abs().max() + 1e-9, name
