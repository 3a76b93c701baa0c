"""The trainer's loss and every gradient against DPO written down plainly: float64, stock transformers and PEFT, one
conversation at a time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import logsigmoid
from transformers import MixtralForCausalLM

from tests.equivalence.dpo_runs import dpo_recipe, dpo_trainer, write_pairs

BETA = 0.5
Tensors = tuple[torch.Tensor, ...]


def sequence(model: Any, prompt: Any, ids: Any, labels: Any) -> tuple[torch.Tensor, int]:
    """Summed log-probability of an answer, and its tokens; what the template writes after the end token is none."""
    tokens = torch.tensor([[*prompt.tolist(), *ids.tolist()]])
    logps = model(input_ids=tokens).logits[0].log_softmax(-1)
    learned = [i for i, label in enumerate(labels.tolist()) if label != -100]
    total = sum((logps[len(prompt) + i - 1, int(ids[i])] for i in learned), torch.zeros(()).double())
    return total, len(learned)


def sigmoid(c: Tensors, r: Tensors, n: list[Any]) -> torch.Tensor:
    return -logsigmoid(BETA * (c[0] - c[1] - r[0] + r[1]))


def ipo(c: Tensors, r: Tensors, n: list[Any]) -> torch.Tensor:
    loss: torch.Tensor = ((c[0] - c[1]) / n[0] - (r[0] - r[1]) / n[1] - 1 / (2 * BETA)) ** 2
    return loss


def sigmoid_norm(c: Tensors, r: Tensors, n: list[Any]) -> torch.Tensor:
    return -logsigmoid(BETA * ((c[0] - c[1]) / n[0] - (r[0] - r[1]) / n[1]))


def robust(c: Tensors, r: Tensors, n: list[Any]) -> torch.Tensor:
    margin = BETA * (c[0] - c[1] - r[0] + r[1])
    loss: torch.Tensor = (-0.9 * logsigmoid(margin) + 0.1 * logsigmoid(-margin)) / 0.8
    return loss


CASES: dict[str, tuple[dict[str, Any], Callable[..., torch.Tensor], float]] = {
    "sigmoid": ({}, sigmoid, 0.0),
    "ipo": ({"loss_type": ["ipo"]}, ipo, 0.0),
    "length-normalised": ({"loss_type": ["sigmoid_norm"]}, sigmoid_norm, 0.0),
    "robust": ({"loss_type": ["robust"], "label_smoothing": 0.1}, robust, 0.0),
    "with the SFT term": ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]}, sigmoid, 0.7),
}


@pytest.mark.parametrize("size", [8, 2])
@pytest.mark.parametrize(("method", "pair_loss", "sft"), CASES.values(), ids=CASES)
def test_loss_and_gradients_are_those_of_the_formula(
    base: Path, tmp_path: Path, method: dict[str, Any], pair_loss: Callable[..., torch.Tensor], sft: float, size: int
) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", count=8)
    settings = dpo_recipe(
        base,
        pairs,
        tmp_path / "run",
        {"beta": BETA, **method},
        router={"router_aux_loss_coef": 0.0},
        model={"load_in_4bit": False},
        max_steps=1,
        per_device_train_batch_size=size,
    )
    trainer, steps = dpo_trainer(settings)
    table = trainer.data_collator._tables["train"]
    generator = torch.Generator().manual_seed(3)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.device)
    trainer.model.save_pretrained(tmp_path / "adapter")
    trainer.train()

    stock = MixtralForCausalLM.from_pretrained(base, dtype=torch.float64, experts_implementation="eager")
    model = PeftModel.from_pretrained(stock, tmp_path / "adapter", is_trainable=True).double().eval()
    losses, nll, tokens = [], torch.zeros((), dtype=torch.float64), 0
    for index in range(len(table)):
        pair = table[index]
        with torch.no_grad(), model.disable_adapter():
            reference = [sequence(model, pair.prompt_ids, *answer)[0] for answer in pair.answers]
        (chosen, n_chosen), (rejected, n_rejected) = (
            sequence(model, pair.prompt_ids, *answer) for answer in pair.answers
        )
        losses.append(pair_loss((chosen, reference[0]), (rejected, reference[1]), [n_chosen, n_rejected]))
        nll, tokens = nll - chosen, tokens + n_chosen
    loss = torch.stack(losses).mean() + sft * nll / tokens
    loss.backward()  # type: ignore[no-untyped-call]

    assert steps.logs[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    wanted = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert wanted.keys() == steps.gradients[0].keys()
    for name, gradient in steps.gradients[0].items():
        scale = wanted[name].abs().max()
        assert scale > 0, name
        assert (gradient.double().cpu() - wanted[name]).abs().max() <= 2e-4 * scale, name
