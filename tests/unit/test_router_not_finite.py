"""NaN and infinity in a router: refused at load by the tensor's name, and named by its layer in training."""

from pathlib import Path

import pytest
import torch

from finetune.errors import RunError, WeightsError
from tests.equivalence.sft_runs import recipe, trainer_for, write_rows
from tests.families import tiny_model
from tests.support import save_tiny_mixtral
from tests.unit.engine import base_model


@pytest.mark.parametrize(
    ("model_type", "tensor"),
    [
        ("mixtral", "model.layers.1.mlp.gate.weight"),
        ("deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias"),
        ("minimax_m2", "model.layers.1.mlp.e_score_correction_bias"),
    ],
)
def test_a_checkpoint_with_nan_in_a_router_is_refused_by_the_tensors_name(
    tmp_path: Path, model_type: str, tensor: str
) -> None:
    model = tiny_model(model_type)
    model.state_dict()[tensor].reshape(-1)[1] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(WeightsError) as caught:
        base_model(tmp_path)
    do = f"fetch the checkpoint again, or repair this tensor in {tmp_path}"
    assert str(caught.value) == f"{tensor}: holds NaN or infinity; {do}"


def test_a_run_that_stops_names_the_first_layer_whose_router_was_not_finite_and_the_micro_batchs_rows(
    tmp_path: Path,
) -> None:
    """Layer 1 alone, in the last of two micro-batches: the loss of that one is NaN, and no step is taken."""
    base = save_tiny_mixtral(tmp_path / "base", num_hidden_layers=3)
    rows = write_rows(tmp_path / "rows.jsonl")
    trainer, steps = trainer_for(recipe(base, rows, tmp_path / "run", per_device_train_batch_size=4))
    layer = trainer.model.get_base_model().model.layers[1]
    calls = []

    def spoil(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        calls.append(1)
        return (args[0] * torch.nan,) if len(calls) == 2 else args

    layer.mlp.register_forward_pre_hook(spoil)
    with pytest.raises(RunError) as caught:
        trainer.train()
    what = (
        "step 1: the loss is not finite; the optimizer step was not taken; the first router with logits that are not "
    )
    assert str(caught.value).startswith(f"{what}finite: model.layers.1.mlp.gate; rows of the step: ")
    assert len(str(caught.value).split("rows of the step: ")[1].split(";")[0].split(", ")) == 4
    assert steps.gradients == []
