"""Equivalence classes of SFT through the real trainer: what must not change the result does not."""

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from finetune.errors import RunError
from finetune.methods.arguments import EVALUATION_TOKENS, evaluation_metrics, evaluation_rows
from tests.equivalence.sft_runs import (
    TIMINGS,
    Steps,
    assert_changes_nothing,
    assert_same_steps,
    padded_with_eos,
    recipe,
    run,
    trainer_for,
)


@pytest.fixture(scope="module")
def whole(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Steps:
    """Three steps of one micro-batch of eight rows."""
    return run(recipe(base, rows, tmp_path_factory.mktemp("whole")))


@pytest.mark.parametrize("size", [1, 4])
def test_micro_batches_do_not_change_the_step(base: Path, rows: Path, tmp_path: Path, whole: Steps, size: int) -> None:
    assert_same_steps(whole, run(recipe(base, rows, tmp_path, per_device_train_batch_size=size)))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_token_figures_are_means_over_the_tokens_of_a_step(
    base: Path, rows: Path, tmp_path: Path, whole: Steps, size: int
) -> None:
    """Not means of the means of micro-batches, in training and in evaluation."""
    trainer, cut = trainer_for(recipe(base, rows, tmp_path, per_device_train_batch_size=size, with_eval=True))
    trainer.train()
    assert [log["num_tokens"] for log in cut.logs[:3]] == [log["num_tokens"] for log in whole.logs[:3]]
    for key in ("mean_token_accuracy", "entropy"):
        values = [log[key] for log in cut.logs[:3]]
        assert values == pytest.approx([log[key] for log in whole.logs[:3]], abs=1e-5), key
        assert values[2] > 0, key
    evaluations = []
    for trainer.args.per_device_eval_batch_size in (size, 8):
        evaluations.append(trainer.evaluate())
    for key in ("eval_mean_token_accuracy", "eval_entropy"):
        assert evaluations[0][key] == pytest.approx(evaluations[1][key], abs=1e-5), key
        assert evaluations[0][key] > 0
    known = {f"eval_{name}" for name in evaluation_metrics("sft")}
    assert {name for name in evaluations[0] if name not in TIMINGS} == known, "what metric_for_best_model may name"


@pytest.mark.parametrize("packing", [False, True])
def test_the_pad_token_may_be_the_eos(base: Path, rows: Path, tmp_path: Path, packing: bool) -> None:
    runs, batches = [], []
    for changed in (lambda given: given, padded_with_eos):
        trainer, steps = trainer_for(changed(recipe(base, rows, tmp_path, packing=packing, with_eval=True)))
        batches.append(next(iter(trainer.get_train_dataloader())))
        trainer.train()
        runs.append((steps, {key: value for key, value in trainer.evaluate().items() if key not in TIMINGS}))
    (own, own_evaluation), (eos, eos_evaluation) = runs
    assert_same_steps(own, eos)
    assert own_evaluation == pytest.approx(eos_evaluation, abs=1e-6)
    separate, shared = batches
    padding = separate["weight"] == 0
    assert padding.any()
    assert set(separate["input_ids"][padding].tolist()) == {3}
    assert set(shared["input_ids"][padding].tolist()) == {2}
    assert (shared["labels"] == 2).sum() >= len(shared["rows"]), "an EOS is learned at the end of every answer"
    assert all(torch.equal(shared[key], separate[key]) for key in ("labels", "supervised", "weight"))


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointing_does_not_change_the_step(
    base: Path, rows: Path, tmp_path: Path, whole: Steps, mode: str
) -> None:
    assert_same_steps(whole, run(recipe(base, rows, tmp_path, gradient_checkpointing=mode)))


def test_the_balance_term_reaches_the_gradient(base: Path, rows: Path, tmp_path: Path, whole: Steps) -> None:
    """From the second step on; in the first the frequencies are uniform and the term is a constant."""
    without = run(recipe(base, rows, tmp_path, router={"router_aux_loss_coef": 0.0}))
    name = next(name for name in whole.gradients[0] if ".mlp.gate." in name and "lora_B" in name)
    torch.testing.assert_close(whole.gradients[0][name], without.gradients[0][name], atol=1e-6, rtol=1e-4)
    assert (whole.gradients[1][name] - without.gradients[1][name]).abs().max() > 1e-4
    assert without.logs[1]["loss"] == pytest.approx(without.logs[1]["ce_loss"], abs=1e-6)
    assert without.logs[1]["balance_loss"] > 0


def test_the_loss_is_cross_entropy_plus_the_weighted_term(whole: Steps) -> None:
    """In the first step the term that is minimised is its uniform value: top_k."""
    assert whole.logs[0]["loss"] == pytest.approx(whole.logs[0]["ce_loss"] + 0.1 * 2.0, abs=1e-5)


@pytest.mark.parametrize("packing", [False, True])
def test_the_evaluation_loss_is_cross_entropy_over_all_supervised_tokens(
    base: Path, rows: Path, tmp_path: Path, packing: bool
) -> None:
    """Not a mean of batch means, without the balance term, and the same for every batch size."""
    trainer, _ = trainer_for(recipe(base, rows, tmp_path, with_eval=True, packing=packing, max_length=64))
    values = []
    for size in (1, 3, trainer.args.per_device_eval_batch_size):
        trainer.args.per_device_eval_batch_size = size
        values.append(trainer.evaluate()["eval_loss"])
    total, count = 0.0, 0
    model = trainer.model.eval()
    for document in documents_of(trainer.eval_dataset):
        ids, labels = torch.tensor(document, device=model.device)
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum").item()
        count += int((labels[1:] != -100).sum())
    assert values == pytest.approx([total / count] * 3, abs=1e-5)


def documents_of(dataset: Any) -> Iterator[tuple[list[int], list[int]]]:
    """Ids and labels of each conversation, also of those that share a packed row."""
    for row in dataset:
        positions = row.get("position_ids", range(len(row["input_ids"])))
        cuts = [*(place for place, position in enumerate(positions) if position == 0), len(positions)]
        for start, end in pairwise(cuts):
            yield row["input_ids"][start:end], row["labels"][start:end]


def test_an_evaluation_batch_has_some_thousand_tokens_or_the_rows_of_training(tmp_path: Path) -> None:
    def rows_of(packing: bool = True, max_length: int = 64, **changes: Any) -> int:
        settings = recipe(tmp_path, tmp_path, tmp_path, packing=packing, max_length=max_length, **changes)
        return evaluation_rows(settings)

    assert rows_of() == rows_of(packing=False) == EVALUATION_TOKENS // 64 == 32
    assert rows_of(max_length=EVALUATION_TOKENS, per_device_train_batch_size=4) == 4
    assert rows_of(max_length=10 * EVALUATION_TOKENS, per_device_train_batch_size=1) == 1
    assert rows_of(attn_implementation="flash_attention_2") == 32


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_micro_batch_without_rows_changes_nothing(base: Path, rows: Path, tmp_path: Path, attention: str) -> None:
    trainer, _ = trainer_for(recipe(base, rows, tmp_path, attn_implementation=attention, with_eval=True))
    assert_changes_nothing(trainer)


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
    assert message.startswith(f"step 1: the {where} is not finite; the optimizer step was not taken; ")
    assert ("the first router with logits that are not finite: model.layers.0.mlp.gate;" in message) == (
        where == "loss"
    )
    places = message.split("rows of the step: ")[1].split(";")[0].split(", ")
    assert len(places) == 8
    assert {(place.rpartition(":")[0], int(place.rpartition(":")[2]) <= 32) for place in places} == {(str(rows), True)}
    assert steps.gradients == []
    assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters() if name in before)


def test_a_run_that_has_stopped_learning_is_stopped(base: Path, rows: Path, tmp_path: Path) -> None:
    """As after a rate that breaks the model: the gradient is exactly 0 and the loss is not."""
    trainer, steps = trainer_for(recipe(base, rows, tmp_path, max_steps=9))
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient: gradient * (not steps.logs))
    with pytest.raises(RunError) as caught:
        trainer.train()
    assert [log["grad_norm"] > 0 for log in steps.logs] == [True, False, False]
    message = str(caught.value)
    assert message.startswith(
        "step 4: the gradient is exactly 0 from step 2 on: nothing is learned any more, and no adapter was saved; got "
        "loss "
    )
    assert message.endswith(", gradient norm 0; start anew with a lower training.learning_rate")


def test_a_run_that_takes_fewer_steps_than_it_should_is_an_error(base: Path, rows: Path, tmp_path: Path) -> None:
    trainer, _ = trainer_for(recipe(base, rows, tmp_path))
    trainer.add_callback(_Stops())
    with pytest.raises(RunError, match=r"training: the run stopped before its 3 steps; nothing was saved; got 1 steps"):
        trainer.run_from(None)


class _Stops(TrainerCallback):  # type: ignore[misc]
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = True
