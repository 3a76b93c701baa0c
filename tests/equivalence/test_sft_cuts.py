"""Equivalence classes of SFT through the real trainer: what must not change the result does not."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from finetune.data import Collator, load_tokenizer, prepare
from finetune.errors import RunError
from finetune.methods.router_term import RouterTerm
from finetune.methods.sft import MoeSftTrainer, sft_config
from finetune.model import load_model
from finetune.moe.families import FAMILIES
from finetune.recipe import Recipe
from tests.support import save_tiny_mixtral

WORDS = ["turn", "the", "light", "on", "in", "the", "kitchen", "and", "set", "a", "timer", "for", "ten", "minutes"]


@dataclass
class Steps(TrainerCallback):  # type: ignore[misc]
    """What the trainer had at each optimizer step: gradients by name, and the logged values."""

    model: Any
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)
    logs: list[dict[str, float]] = field(default_factory=list)
    max_grad_norm: float = 1e9

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        named = self.model.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.requires_grad})

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        self.logs.append(dict(logs))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_mixtral(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of different lengths, so that each cut pads differently."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [
        {"prompt": " ".join(WORDS[: 2 + i % 9]), "completion": " ".join(WORDS[i % 5 : i % 5 + 1 + i % 4])}
        for i in range(32)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def recipe(base: Path, rows: Path, out: Path, **training: Any) -> Recipe:
    data = {"path": str(rows), "format": "prompt_completion"}
    packing = training.pop("packing", False)
    with_eval = training.pop("with_eval", False)
    return Recipe.model_validate(
        {
            "output_dir": str(out),
            "model": {"name_or_path": str(base), "load_in_4bit": True, "dtype": "float32"},
            "lora": {"targets": ["attention", "experts", "router"], "r": 4, "lora_alpha": 8.0},
            "router": {"router_aux_loss_coef": training.pop("coefficient", 0.1)},
            "method": {"kind": "sft"},
            "data": {"train": data, "eval": data if with_eval else None, "max_length": 256, "packing": packing},
            "training": {
                "max_steps": 3,
                "learning_rate": 0.05,
                "lr_scheduler_type": "constant",
                "global_batch_size": 8,
                "per_device_train_batch_size": 8,
                "gradient_checkpointing": False,
                "max_grad_norm": 1e9,
                **training,
            },
            "logging": {"report_to": "none"},
        }
    )


def trainer_for(recipe: Recipe) -> tuple[MoeSftTrainer, Steps]:
    """The trainer as `finetune.train` builds it."""
    torch.manual_seed(recipe.seed)
    folder = Path(recipe.model.name_or_path)
    tokenizer = load_tokenizer(str(folder), None, None)
    model = load_model(folder, recipe)
    moe = FAMILIES["mixtral"].moe
    assert moe is not None
    assert recipe.router is not None
    steps = Steps(model)
    trainer = MoeSftTrainer(
        model=model,
        router_term=RouterTerm(model, moe, recipe.router.router_aux_loss_coef),
        args=sft_config(recipe, Path(recipe.output_dir), {"report_to": [], "disable_tqdm": True}, 1),
        processing_class=tokenizer,
        data_collator=Collator(tokenizer),
        train_dataset=prepare(recipe.data.train, tokenizer, recipe.data).dataset,
        eval_dataset=recipe.data.eval and prepare(recipe.data.eval, tokenizer, recipe.data).dataset,
        callbacks=[steps],
    )
    return trainer, steps


def run(recipe: Recipe) -> Steps:
    trainer, steps = trainer_for(recipe)
    trainer.train()
    return steps


def assert_same_steps(one: Steps, other: Steps, keys: Sequence[str] = ("loss", "ce_loss", "balance_loss")) -> None:
    """Loss, its parts and every gradient of every step, within 1e-5."""
    assert len(one.gradients) == len(other.gradients) == 3
    for ours, theirs in zip(one.gradients, other.gradients, strict=True):
        for name, gradient in ours.items():
            torch.testing.assert_close(gradient, theirs[name], atol=1e-5, rtol=1e-4, msg=name)
    for ours_log, theirs_log in zip(one.logs[:3], other.logs[:3], strict=True):
        for key in keys:
            assert ours_log[key] == pytest.approx(theirs_log[key], abs=1e-5), key


@pytest.fixture(scope="module")
def whole(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Steps:
    """Three steps of one micro-batch of eight rows."""
    return run(recipe(base, rows, tmp_path_factory.mktemp("whole")))


@pytest.mark.parametrize("size", [1, 4])
def test_micro_batches_do_not_change_the_step(base: Path, rows: Path, tmp_path: Path, whole: Steps, size: int) -> None:
    assert_same_steps(whole, run(recipe(base, rows, tmp_path, per_device_train_batch_size=size)))


def test_checkpointing_does_not_change_the_step(base: Path, rows: Path, tmp_path: Path, whole: Steps) -> None:
    assert_same_steps(whole, run(recipe(base, rows, tmp_path, gradient_checkpointing=True)))


def test_the_balance_term_reaches_the_gradient(base: Path, rows: Path, tmp_path: Path, whole: Steps) -> None:
    """From the second step on; in the first the frequencies are uniform and the term is a constant."""
    without = run(recipe(base, rows, tmp_path, coefficient=0.0))
    name = next(name for name in whole.gradients[0] if ".mlp.gate." in name and "lora_B" in name)
    torch.testing.assert_close(whole.gradients[0][name], without.gradients[0][name], atol=1e-6, rtol=1e-4)
    assert (whole.gradients[1][name] - without.gradients[1][name]).abs().max() > 1e-4
    assert without.logs[1]["loss"] == pytest.approx(without.logs[1]["ce_loss"], abs=1e-6)
    assert without.logs[1]["balance_loss"] > 0


def test_the_loss_is_cross_entropy_plus_the_weighted_term(whole: Steps) -> None:
    """In the first step the term that is minimised is its uniform value: top_k."""
    assert whole.logs[0]["loss"] == pytest.approx(whole.logs[0]["ce_loss"] + 0.1 * 2.0, abs=1e-5)


def test_the_evaluation_loss_is_cross_entropy_over_all_supervised_tokens(
    base: Path, rows: Path, tmp_path: Path
) -> None:
    """Not a mean of batch means, and without the balance term."""
    values = []
    for size in (1, 8):
        settings = recipe(base, rows, tmp_path / str(size), per_device_train_batch_size=size, with_eval=True)
        trainer, _ = trainer_for(settings)
        values.append(trainer.evaluate()["eval_loss"])
    total, count = 0.0, 0
    model = trainer.model.eval()
    for row in trainer.eval_dataset:
        labels = torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        count += int((labels != -100).sum())
    assert values == pytest.approx([total / count] * 2, abs=1e-5)


def test_adapter_weights_stay_in_32_bits(base: Path, rows: Path, tmp_path: Path) -> None:
    trainer, _ = trainer_for(recipe(base, rows, tmp_path))
    kinds = {p.dtype for p in trainer.model.parameters() if p.requires_grad}
    assert kinds == {torch.float32}
    factor = next(p for name, p in trainer.model.named_parameters() if "lora_A" in name)
    assert not torch.equal(factor, factor.bfloat16().float())


@pytest.mark.parametrize("where", ["loss", "gradient norm"])
def test_a_value_that_is_not_finite_stops_before_the_step_and_names_it(
    base: Path, rows: Path, tmp_path: Path, where: str
) -> None:
    trainer, steps = trainer_for(recipe(base, rows, tmp_path))
    factor = next(p for name, p in trainer.model.named_parameters() if "lora_B" in name)
    if where == "loss":
        factor.data.fill_(math.inf)
    else:
        factor.register_hook(lambda gradient: gradient * math.inf)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_A" in name}
    with pytest.raises(RunError) as caught:
        trainer.train()
    message = str(caught.value)
    assert message.startswith(f"step 1: the {where} is not finite; the optimizer step was not taken; lines of the")
    lines = message.split("training file: ")[1].split(";")[0].split(", ")
    assert len(lines) == 8
    assert {int(line) for line in lines} <= set(range(1, 33))
    assert steps.gradients == []
    assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters() if name in before)


def test_a_resumed_run_is_the_uninterrupted_one(base: Path, rows: Path, tmp_path: Path, whole: Steps) -> None:
    """Adapter, optimizer, schedule, data order and the balance frequencies all continue."""
    first = recipe(base, rows, tmp_path, save_steps=2)
    trainer_for(first)[0].train()
    trainer, steps = trainer_for(first)
    trainer.run_from(tmp_path / "checkpoint-2")
    assert len(steps.gradients) == 1
    assert steps.logs[0]["num_tokens"] == whole.logs[2]["num_tokens"]
    for name, gradient in whole.gradients[2].items():
        torch.testing.assert_close(steps.gradients[0][name], gradient, atol=1e-5, rtol=1e-4)


def test_a_checkpoint_of_the_last_step_is_taken_over_without_another_step(
    base: Path, rows: Path, tmp_path: Path
) -> None:
    """As after a kill between the last checkpoint and the adapter."""
    settings = recipe(base, rows, tmp_path, save_steps=3)
    finished, _ = trainer_for(settings)
    finished.run_from(None)
    trainer, steps = trainer_for(settings)
    trainer.run_from(tmp_path / "checkpoint-3")
    assert steps.gradients == []
    wanted = dict(finished.model.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, wanted[name]), name


def test_a_run_that_takes_fewer_steps_than_it_should_is_an_error(base: Path, rows: Path, tmp_path: Path) -> None:
    trainer, _ = trainer_for(recipe(base, rows, tmp_path))
    trainer.args.dataloader_drop_last = True
    trainer.train_dataset = trainer.train_dataset.select(range(3))
    with pytest.raises(RunError, match=r"training: the run stopped before its 3 steps; nothing was saved; got 0 steps"):
        trainer.run_from(None)
