"""The reference of DPO: the model as training finds it, whatever training has done since."""

from pathlib import Path

import pytest
import torch

from finetune.base import read_base
from finetune.errors import RunError
from finetune.methods.dpo import check_start
from finetune.methods.dpo_trainer import MoeDpoTrainer
from finetune.model import adapt, load_base, save_adapter, snapshot_adapter
from tests.equivalence.dpo_runs import dpo_recipe, dpo_run, dpo_trainer, write_pairs
from tests.equivalence.sft_runs import assert_same_steps

KEYS = ("loss", "dpo_loss", "rewards/margins", "logps/chosen")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


@pytest.fixture(scope="module")
def initial_adapter(base: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter as an SFT run saves it, which changes the model."""
    folder = tmp_path_factory.mktemp("initial")
    recipe = dpo_recipe(base, pairs, folder, lora={"targets": ["attention", "experts"]})
    record = read_base(recipe)
    model = adapt(load_base(record, recipe.model), record, recipe)
    disturb(model)
    save_adapter(snapshot_adapter(model, record.family), folder, recipe, record)
    record.tokenizer.save_pretrained(folder)
    return folder


def disturb(model: torch.nn.Module, by: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += by * torch.randn(parameter.shape, generator=generator).to(parameter.device)


def trainer_from(base: Path, pairs: Path, out: Path, initial_adapter: Path | None, **changes: object) -> MoeDpoTrainer:
    method = {"reference": changes.pop("reference", "precomputed")}
    lora = {"targets": ["attention", "experts"], "lora_dropout": changes.pop("lora_dropout", 0.0)}
    model = {"adapter": None if initial_adapter is None else str(initial_adapter)}
    return dpo_trainer(dpo_recipe(base, pairs, out, method, lora=lora, model=model, **changes))[0]


def test_the_initial_adapter_is_start_and_reference(
    base: Path, pairs: Path, initial_adapter: Path, tmp_path: Path
) -> None:
    fresh = trainer_from(base, pairs, tmp_path / "fresh", None)
    continued = trainer_from(base, pairs, tmp_path / "continued", initial_adapter)
    kept, before = (trainer.data_collator.reference["train"] for trainer in (continued, fresh))
    assert abs(kept - before).max() > 0.1, "not the base"
    inputs = continued.batch_of("train", [[0], [1], [2]])
    torch.testing.assert_close(
        continued.reference_logps(inputs)[:3].cpu(), torch.tensor(kept[:3, 0]), atol=1e-5, rtol=0
    )


def test_values_do_not_depend_on_where_a_killed_run_stopped(base: Path, pairs: Path, tmp_path: Path) -> None:
    """Bit for bit: the batches are those of the whole split, also where a kill left a part of one."""
    settings = dpo_recipe(base, pairs, tmp_path, per_device_train_batch_size=4)
    uninterrupted = dpo_trainer(settings)[0].data_collator.reference["train"]
    path = tmp_path / "reference" / "train.0.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:6]) + lines[6][:10])
    continued = dpo_trainer(settings)[0].data_collator.reference["train"]
    assert (continued == uninterrupted).all()
    assert path.read_text().splitlines(keepends=True) == lines


@pytest.mark.parametrize("from_adapter", [False, True])
def test_the_reference_stays_what_it_was_while_the_model_moves(
    base: Path, pairs: Path, initial_adapter: Path, tmp_path: Path, from_adapter: bool
) -> None:
    trainer = trainer_from(base, pairs, tmp_path, initial_adapter if from_adapter else None, reference="live")
    inputs = trainer.batch_of("train", [[0], [1], [2]])
    before = trainer.reference_logps(inputs)
    trained = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
    trainer.train()
    assert torch.equal(trainer.reference_logps(inputs), before)
    now = [p for p in trainer.model.parameters() if p.requires_grad]
    assert len(now) == len(trained), "the same parameters train"
    assert all(not torch.equal(p, was) for p, was in zip(now, trained, strict=True)), "the model has moved and stays so"


def test_live_and_precomputed_agree_from_an_initial_adapter(
    base: Path, pairs: Path, initial_adapter: Path, tmp_path: Path
) -> None:
    runs = [
        dpo_run(
            dpo_recipe(
                base,
                pairs,
                tmp_path / reference,
                {"reference": reference},
                lora={"targets": ["attention", "experts"]},
                model={"adapter": str(initial_adapter)},
            )
        )
        for reference in ("live", "precomputed")
    ]
    assert_same_steps(runs[0], runs[1], KEYS)


def test_the_reference_sees_no_dropout(base: Path, pairs: Path, initial_adapter: Path, tmp_path: Path) -> None:
    """Nor does it change what training drops: the generator is left as it was."""
    exact = trainer_from(base, pairs, tmp_path / "exact", initial_adapter)
    trainer = trainer_from(base, pairs, tmp_path / "dropped", initial_adapter, lora_dropout=0.5, reference="live")
    trainer.model.train()
    inputs = trainer.batch_of("train", [[0], [1], [2]])
    state = torch.get_rng_state()
    logps = trainer.reference_logps(inputs).cpu()
    assert torch.equal(torch.get_rng_state(), state)
    kept = torch.tensor(exact.data_collator.reference["train"][:3])
    torch.testing.assert_close(logps, kept.T.reshape(-1), atol=1e-4, rtol=0)
    assert trainer.model.training
    trainer.train()
    first = trainer.state.log_history[0]
    assert abs(first["rewards/margins"]) > 1e-3, "the policy does drop"


@pytest.mark.parametrize("reference", ["live", "precomputed"])
def test_a_model_that_does_not_start_as_its_reference_is_refused(
    base: Path, pairs: Path, tmp_path: Path, reference: str
) -> None:
    trainer = trainer_from(base, pairs, tmp_path, None, reference=reference)
    disturb(trainer.model)
    with pytest.raises(RunError) as caught:
        check_start(trainer, [[0], [1]])
    message = str(caught.value)
    assert f"{pairs}:" in message
    assert "before the first step this pair's reward margin is not 0 within 0.0001" in message
    assert "what differs is the adapter: the one that is trained does not start as the reference's" in message
    assert "remove the folder reference/ of the run so that it is computed again" in message


def test_kept_values_that_are_not_this_models_are_refused(base: Path, pairs: Path, tmp_path: Path) -> None:
    trainer = trainer_from(base, pairs, tmp_path, None)
    trainer.data_collator.reference["train"][1, 0] += 0.01
    with pytest.raises(RunError) as caught:
        check_start(trainer, [[0], [1]])
    assert f"{pairs}:2: before the first step" in str(caught.value)
    assert "what differs is the base: its log-probabilities are not those that were kept" in str(caught.value)
    assert "got -0.005" in str(caught.value)


def test_in_16_bits_a_margin_may_come_from_other_micro_batches(base: Path, pairs: Path, tmp_path: Path) -> None:
    """As after a run that did not fit, started again with a smaller one on the reference that it left."""
    trainer, _ = dpo_trainer(dpo_recipe(base, pairs, tmp_path, model={"dtype": "bfloat16"}))
    trainer.data_collator.reference["train"][1, 0] += 0.1
    with pytest.raises(RunError) as caught:
        check_start(trainer, [[0], [1]])
    assert "(in 16 bits it is enough that they were computed in other micro-batches); got -0.0" in str(caught.value)
    assert "remove the folder reference/ of the run so that it is computed again" in str(caught.value)
