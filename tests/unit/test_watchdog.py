"""The watchdog: which steps it notices, what it does then, and that a skipped step changes nothing."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import TrainerCallback

from finetune.errors import RunError
from finetune.methods.watchdog import FIRST, SHOWN_LINES, SKIPPED_IN_A_ROW, RankRows, StepFigures, Watchdog
from finetune.moe.balance import CHOICES_PER_EXPERT, StepBalance
from finetune.recipe.run_settings import WatchdogSettings
from tests.equivalence.sft_runs import recipe, trainer_for, write_rows
from tests.support import save_tiny_mixtral

ROWS = [
    RankRows([["a:1", "a:2"], ["a:3"]], [2.0, math.nan], "layers.1.gate"),
    RankRows([["b:1"], []], [2.0, 2.0], None),
]
STEADY = [2.0 + 0.1 * (-1) ** step for step in range(FIRST)]


def watchdog(folder: Path, **settings: dict[str, Any]) -> Watchdog:
    return Watchdog(WatchdogSettings.model_validate(settings), folder)


def look(dog: Watchdog, losses: Sequence[float], start: int = 1, last: int = 100, **figures: Any) -> list[int]:
    """The steps, with these losses, that the watchdog skips."""
    made = {"gradient_norm": 1.0, **figures}
    return [
        number
        for number, loss in enumerate(losses, start)
        if dog.skips(StepFigures(number, last, loss, **made), lambda: ROWS)
    ]


def noticed(dog: Watchdog) -> list[dict[str, Any]]:
    return [json.loads(line) for line in dog.path.read_text().splitlines()] if dog.path.exists() else []


def test_a_loss_far_above_the_last_steps_is_noticed_with_the_rows_of_every_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dog = watchdog(tmp_path)
    assert look(dog, [*STEADY, 2.5, 3.0]) == []
    (line,) = noticed(dog)
    assert line["ceiling"] == pytest.approx(2.89, abs=0.01)  # the mean and six standard deviations
    assert line == {
        **{"step": FIRST + 2, "what": "loss_spike", "value": 3.0, "ceiling": line["ceiling"], "action": "warn"},
        "rows": [["a:1", "a:2"], ["a:3"], ["b:1"], []],
    }
    assert capsys.readouterr().err == (
        f"step 22: the loss 3 is above 2.89, far from the steps before it; its rows are in {dog.path}\n"
    )


@pytest.mark.parametrize(
    "losses",
    [
        [2.0] * (FIRST - 1) + [50.0],  # too few steps to compare with
        [-1.0 + 0.01 * (-1) ** step for step in range(40)] + [-0.9],  # negative losses, a small move
        [1e-4] * 40 + [1.2e-4],  # converged
        [3.0 * 0.93**step for step in range(60)],
        [0.0] * 60,
    ],
)
def test_losses_that_are_fine_are_not_noticed(tmp_path: Path, losses: list[float]) -> None:
    dog = watchdog(tmp_path)
    look(dog, losses)
    assert noticed(dog) == []


def test_a_spike_stops_or_skips_as_the_recipe_says(tmp_path: Path) -> None:
    assert look(watchdog(tmp_path, loss_spike={"action": "skip_batch"}), [*STEADY, 9.0, 2.0]) == [FIRST + 1]
    with pytest.raises(RunError) as caught:
        look(watchdog(tmp_path, loss_spike={"action": "stop", "ceiling": 3}), [*STEADY, 2.5])
    assert str(caught.value) == (
        f"step 21: the loss 2.5 is above 2.3, far from the steps before it; the optimizer step was not taken; its rows "
        f"are in {tmp_path / 'noticed.jsonl'}; look at these rows, lower training.learning_rate, or set "
        "watchdog.loss_spike.action=skip_batch"
    )


@pytest.mark.parametrize("figure", ["loss", "gradient_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stops_unless_it_is_skipped(tmp_path: Path, figure: str, value: float) -> None:
    figures: dict[str, Any] = {"loss": 2.0, "gradient_norm": 1.0, figure: value}
    step = StepFigures(1, 9, **figures)
    for action in ("stop", "warn"):
        with pytest.raises(RunError, match="is not finite; the optimizer step was not taken; the first router"):
            watchdog(tmp_path, loss_spike={"action": action}).skips(step, lambda: ROWS)
    dog = watchdog(tmp_path / "skip", loss_spike={"action": "skip_batch"})
    dog.path.parent.mkdir()
    assert dog.skips(step, lambda: ROWS)
    name = figure.replace("_", " ")
    assert [(line["what"], line["value"], line["ceiling"]) for line in noticed(dog)] == [
        (f"{name} not finite", str(value), None)
    ]
    # The gradient scaler of float16 handles its overflows itself; a loss is never one.
    scaled = replace(step, scaled=True)
    assert dog.skips(scaled, lambda: ROWS) == (figure == "loss")


def test_the_message_names_the_rows_of_the_micro_batch_that_is_not_finite(tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught:
        look(watchdog(tmp_path), [math.nan])
    assert "not finite: layers.1.gate; rows of the step: a:3; got nan; look at" in str(caught.value)
    with pytest.raises(RunError, match=r"rows of the step: a:1, a:2, a:3, b:1; got inf; look at"):
        look(watchdog(tmp_path), [2.0], gradient_norm=math.inf)


@pytest.mark.parametrize(
    ("norms", "losses", "stops"),
    [
        ([1, 0, 0, 0, 0], [2, 2, 2, 2, 2], 4),
        ([0, 0, 1, 0, 0, 1], [2] * 6, None),
        ([1, 1, 1, 1, 1, 0], [2] * 6, 6),  # at the end one step is enough: the adapter would be saved
        ([0, 0, 0, 0, 0, 0], [0] * 6, None),  # nothing left to learn
        ([0, 0, 0], [2] * 3, 3),
    ],
)
@pytest.mark.parametrize("action", ["stop", "warn"])
def test_only_steps_without_gradient_and_with_a_loss_count(
    tmp_path: Path, norms: list[float], losses: list[float], stops: int | None, action: str
) -> None:
    dog = watchdog(tmp_path, zero_gradient={"action": action})
    message = ""
    for number, (norm, loss) in enumerate(zip(norms, losses, strict=True), start=1):
        try:
            assert not dog.skips(StepFigures(number, 6, loss, norm), lambda: ROWS)
        except RunError as error:
            message = str(error)
            break
    assert [(line["step"], line["action"]) for line in noticed(dog)] == ([(stops, action)] if stops else [])
    assert bool(message) == (action == "stop" and stops is not None)
    if message:
        never = "add to lora.targets: what is adapted does not change the answers of these rows"
        assert message.endswith(never) == (norms[0] == 0)


def test_a_router_that_has_collapsed_is_noticed(tmp_path: Path) -> None:
    dog = watchdog(tmp_path, dead_experts={"action": "skip_batch", "ceiling": 0.5})
    assert look(dog, [2.0], dead_experts=0.5) == []
    assert look(dog, [2.0], dead_experts=0.75) == [1]
    assert [(line["what"], line["value"], line["ceiling"]) for line in noticed(dog)] == [("dead_experts", 0.75, 0.5)]
    with pytest.raises(RunError, match=r"^step 1: 75.0% of the experts got no token, more than 25.0%; the optimizer"):
        look(watchdog(tmp_path, dead_experts={"action": "stop", "ceiling": 0.25}), [2.0], dead_experts=0.75)


def test_dead_experts_are_counted_over_ranks_and_only_in_steps_with_enough_choices() -> None:
    balance = StepBalance([1, 1], 4, torch.device("cpu"))
    balance._sums[0, 4:8] = torch.tensor([4.0 * CHOICES_PER_EXPERT, 0, 0, 0])
    balance._sums[1, 4:8] = torch.tensor([4.0 * CHOICES_PER_EXPERT - 1, 0, 0, 0])  # too few to say
    elsewhere = torch.zeros_like(balance._sums)
    elsewhere[0, 5] = 1
    assert balance.dead_share(lambda sums: sums).item() == 3 / 8
    balance.begin_step(torch.tensor(10))
    balance._sums[0, 4:8] = torch.tensor([4.0 * CHOICES_PER_EXPERT, 0, 0, 0])
    assert balance.dead_share(lambda sums: sums + elsewhere).item() == 2 / 8


def test_a_run_that_skips_every_step_is_stopped(tmp_path: Path) -> None:
    dog = watchdog(tmp_path, loss_spike={"action": "skip_batch"})
    with pytest.raises(RunError) as caught:
        look(dog, [2.0, *[math.nan] * 99])
    assert len(noticed(dog)) == SKIPPED_IN_A_ROW
    assert str(caught.value) == (
        "step 11: 10 steps in a row were skipped, the last because the loss is not finite (nan): nothing is learned; "
        f"look at the rows in {dog.path}, and start anew with a lower training.learning_rate"
    )
    with pytest.raises(RunError, match="3 steps in a row were skipped"):
        look(watchdog(tmp_path, loss_spike={"action": "skip_batch"}), [math.nan] * 3, last=3)


def test_many_warnings_are_written_and_few_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dog = watchdog(tmp_path)
    look(dog, [2.0] * 9, dead_experts=0.9)
    shown = capsys.readouterr().err.splitlines()
    assert len(noticed(dog)) == 9
    assert len(shown) == SHOWN_LINES
    assert shown[-1].endswith("; further ones are only written there")


def test_a_continued_run_decides_as_an_uninterrupted_one(tmp_path: Path) -> None:
    """Cut before, at and after the noticed steps; the state goes through JSON, repeated steps leave no second line."""
    losses = [*STEADY, 9.0, *STEADY, math.nan, math.nan, 9.0]
    settings = {"loss_spike": {"action": "skip_batch"}, "zero_gradient": {"action": "warn"}}
    whole = watchdog(tmp_path, **settings)
    skipped = look(whole, losses, gradient_norm=0.0)
    assert skipped[:3] == [FIRST + 1, 2 * FIRST + 2, 2 * FIRST + 3]
    lines = noticed(whole)
    assert [line["step"] for line in lines if line["what"] == "zero_gradient"] == [3]
    for cut in (0, 1, FIRST, FIRST + 1, 2 * FIRST + 2, len(losses) - 1):
        first, second = watchdog(tmp_path, **settings), watchdog(tmp_path, **settings)
        first.path.unlink()
        before = look(first, losses[:cut], gradient_norm=0.0)
        state = json.loads(json.dumps(first.state_dict()))
        look(first, losses[cut:], start=cut + 1, gradient_norm=0.0)  # went on after its checkpoint, and was killed
        second.load_state_dict(state)
        second.begin(cut)
        assert before + look(second, losses[cut:], start=cut + 1, gradient_norm=0.0) == skipped
        assert noticed(second) == lines
        assert second.state_dict() == whole.state_dict()


def test_a_step_without_a_gradient_cannot_be_skipped() -> None:
    with pytest.raises(ValidationError, match="'stop' or 'warn'"):
        WatchdogSettings.model_validate({"zero_gradient": {"action": "skip_batch"}})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_mixtral(tmp_path_factory.mktemp("watchdog") / "base")


def state_of(trainer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights, optimizer state and the router's frequencies, copied."""
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter.detach().clone()
    for index, state in trainer.optimizer.state_dict()["state"].items():
        nested = state.get("__bnb_optimizer_quant_state__", {})  # where the 8-bit optimizer keeps its own
        for name, value in ({key: value for key, value in state.items() if value is not nested} | nested).items():
            yield f"{index}.{name}", torch.as_tensor(value).clone()
    yield "frequency", trainer.router_term.balance.frequency_LE.clone()


class Spoiled(TrainerCallback):  # type: ignore[misc]
    """Makes the loss of some steps NaN, by one of the two micro-batches; keeps the state after each step."""

    def __init__(self, trainer: Any, steps: set[int]) -> None:
        self.trainer, self.steps = trainer, steps
        self.logs: list[dict[str, float]] = []
        self.after: list[dict[str, torch.Tensor]] = []
        self.rates: list[float] = []
        trainer.model.get_base_model().model.layers[1].mlp.register_forward_pre_hook(self._spoil)
        trainer.add_callback(self)

    def _spoil(self, _module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        last_micro_batch = len(self.trainer._step_losses) == 1
        bad = self.trainer.state.global_step + 1 in self.steps and last_micro_batch
        return (args[0] * torch.nan,) if bad else args

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        self.logs.append(dict(logs))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.after.append(dict(state_of(self.trainer)))
        self.rates.append(self.trainer.lr_scheduler.get_last_lr()[0])


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_bnb_8bit", "sgd"])
def test_a_skipped_step_leaves_everything_as_it_was_and_is_in_no_figure(base: Path, tmp_path: Path, optim: str) -> None:
    training: dict[str, Any] = {
        **{"max_steps": 4, "logging_steps": 2, "per_device_train_batch_size": 4, "optim": optim},
        **{"lr_scheduler_type": "linear", "weight_decay": 0.1},
        "trainer_args": {"optim_args": "momentum=0.9"} if optim == "sgd" else {},
    }
    settings = recipe(base, write_rows(tmp_path / "rows.jsonl"), tmp_path / "run", **training)
    trainer, steps = trainer_for(settings)
    trainer.remove_callback(steps)
    trainer.watchdog = watchdog(tmp_path, loss_spike={"action": "skip_batch"})
    seen = Spoiled(trainer, {2})
    result = trainer.train()
    first, second, third, _ = seen.after
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert [name for name in second if "lora_B" in name and torch.equal(second[name], third[name])] == []
    assert trainer.state.global_step == 4
    assert seen.rates == pytest.approx([0.0375, 0.025, 0.0125, 0.0])
    (line,) = noticed(trainer.watchdog)
    assert (line["step"], line["what"], line["action"]) == (2, "loss not finite", "skip_batch")
    assert [len(rows) for rows in line["rows"]] == [4, 4]
    one, two = seen.logs[0], seen.logs[1]
    assert all(math.isfinite(one[key]) for key in ("loss", "ce_loss", "entropy", "balance_loss"))
    for log in (one, two):  # the means of one step and of two
        assert log["loss"] == pytest.approx(log["ce_loss"] + 0.1 * log["balance_loss"], abs=1e-5)
    assert math.isfinite(result.training_loss)
