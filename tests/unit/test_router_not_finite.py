"""NaN and infinity in a router: refused at load by the tensor's name, and named by its layer in training."""

import re
from pathlib import Path

import pytest
import torch

from finetune.errors import RunError, WeightsError
from finetune.moe.families import FAMILIES
from finetune.moe.router import refuse_non_finite_routers
from tests.equivalence.sft_runs import recipe, trainer_for, write_rows
from tests.families import tiny_model
from tests.support import save_tiny_mixtral
from tests.unit.engine import base_model


def test_a_checkpoint_with_nan_in_a_router_is_refused_by_the_tensors_name(tmp_path: Path) -> None:
    save_tiny_mixtral(tmp_path / "sound")
    model = base_model(tmp_path / "sound", load_in_4bit=False)
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight[2, 5:8] = torch.nan
        model.model.layers[0].mlp.gate.weight[0, 0] = torch.inf
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(WeightsError) as caught:
        base_model(tmp_path / "broken")
    do = f"fetch the checkpoint again, or repair this tensor in {tmp_path / 'broken'}"
    assert str(caught.value).splitlines() == [
        f"model.layers.0.mlp.gate.weight: the router's values are not all finite; got 1 of 256 NaN or infinite; {do}",
        f"model.layers.1.mlp.gate.weight: the router's values are not all finite; got 3 of 256 NaN or infinite; {do}",
    ]


@pytest.mark.parametrize(
    ("model_type", "tensor"),
    [
        ("deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias"),
        ("minimax_m2", "model.layers.1.mlp.e_score_correction_bias"),
        ("ernie4_5_moe", "model.layers.2.mlp.gate.moe_statics.e_score_correction_bias"),
        ("gpt_oss", "model.layers.0.mlp.router.bias"),
        ("hunyuan_v1_moe", "model.layers.0.mlp.gate.wg.weight"),
    ],
)
def test_biases_and_weights_of_every_kind_of_router_are_looked_at(model_type: str, tensor: str) -> None:
    model, moe = tiny_model(model_type), FAMILIES[model_type].moe
    assert moe is not None
    refuse_non_finite_routers(model, moe, "base")
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    named[tensor].data.reshape(-1)[1] = torch.nan
    with pytest.raises(WeightsError, match=re.escape(f"{tensor}: the router's values are not all finite; got 1 of")):
        refuse_non_finite_routers(model, moe, "base")


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
    assert str(caught.value).startswith(f"{what}finite: model.layers.1.mlp.gate; lines of the training file: ")
    assert len(str(caught.value).split("training file: ")[1].split(";")[0].split(", ")) == 4
    assert steps.gradients == []
