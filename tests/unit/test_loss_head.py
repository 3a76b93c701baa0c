"""TRL's fused head on the CPU, in tiles that fit it: the same figures and gradients, for this model alone."""

import inspect
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
import trl.trainer.utils
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from finetune.data.tokens.collators import supervised_positions
from finetune.methods.loss_head import TILE, fit_head
from finetune.upstream import UpstreamError
from tests.families import save_tiny
from tests.unit.pairs import FIELDS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Granite divides its logits; the vocabulary is no multiple of a tile."""
    return save_tiny("granitemoe", tmp_path_factory.mktemp("base"), vocab_size=2 * TILE + 100)


def with_head(folder: Path, fitted: bool) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    add_fused_lm_head(model, outputs=FIELDS)
    if fitted:
        fit_head(model)
    return model


def scores_and_gradients(
    model: Any, labels: torch.Tensor, supervised: torch.Tensor | None = None
) -> tuple[Any, dict[str, torch.Tensor]]:
    ids = torch.arange(10, 10 + labels.numel()).view_as(labels)
    positions = {} if supervised is None else {"supervised": supervised}
    output = model(input_ids=ids, labels=labels, fused_lm_head=True, **positions)
    (output.loss + 0.1 * output.entropy.sum()).backward()
    return output, {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("given", [False, True])
def test_smaller_tiles_and_given_positions_change_nothing(folder: Path, given: bool) -> None:
    labels = torch.tensor([[-100, -100, 5, TILE, 7], [-100, 2 * TILE + 99, TILE - 1, -100, -100]])
    theirs, wanted = scores_and_gradients(with_head(folder, fitted=False), labels)
    positions = supervised_positions(labels[:, 1:]) if given else None
    ours, gradients = scores_and_gradients(with_head(folder, fitted=True), labels, positions)
    for name in FIELDS:
        supervised = theirs.label_mask
        torch.testing.assert_close(ours[name][supervised], theirs[name][supervised], atol=1e-5, rtol=1e-5)
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), abs=1e-6)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("given", [False, True])
def test_a_batch_without_a_supervised_token_has_a_loss_and_gradients_of_0(folder: Path, given: bool) -> None:
    labels = torch.full((2, 5), -100)
    positions = supervised_positions(labels[:, 1:]) if given else None
    output, gradients = scores_and_gradients(with_head(folder, fitted=True), labels, positions)
    assert output.loss.item() == 0
    assert all(not gradient.any() for gradient in gradients.values())


def test_it_is_for_one_model_alone(folder: Path) -> None:
    other, fitted = with_head(folder, fitted=False), with_head(folder, fitted=True)
    assert trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE > TILE
    assert other.forward.__func__.__globals__ is vars(trl.trainer.utils)
    # Trainers read what the forward takes.
    assert inspect.signature(fitted.forward) == inspect.signature(other.forward)
    ids = torch.tensor([[10, 11, 12]])
    torch.testing.assert_close(fitted(input_ids=ids).logits, other(input_ids=ids).logits, atol=0, rtol=0)


def test_a_head_that_looks_up_other_names_is_refused() -> None:
    def forward(self: Any, _use_triton: bool = False) -> int:
        return len(FIELDS)

    class Model:
        pass

    model: Any = Model()
    model.parameters = lambda: iter([torch.zeros(1)])
    model.forward = MethodType(forward, model)
    with pytest.raises(
        UpstreamError,
        match=r"no longer reads _CHUNKED_LOGPROB_CHUNK_SIZE and _Chunked.* and _use_triton .*; pip install trl==",
    ):
        fit_head(model)
