"""Prototype: one packed row over several processes, Ulysses style (arXiv 2309.14509). Not part of the product.

    torchrun --standalone --nproc_per_node 2 -m benchmarks.sequence_parallel

Each process holds an equal run of a row's tokens, for everything except attention. There an all-to-all gives it all
tokens of a part of the heads, attention runs with the mask of the whole packed row, and a second all-to-all gives the
tokens back. An attention function and a mask function on transformers' interfaces are all that the model needs. Loss,
balance term and gradients are compared with those of one process on the whole row.

S tokens of a row, s of a process, N processes, D features of a head.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.harness import provenance, write_result
from benchmarks.memory import transient_bytes
from benchmarks.mixtral import adapt_mixtral, mixtral_config, random_mixtral
from benchmarks.shapes import Shape
from finetune.moe.checkpointing import enable_checkpointing

NAME = "ulysses"
RESULT = Path("benchmarks/results/sequence-parallel-cpu.json")
MODEL, LAYERS, VOCABULARY = Shape(64, 128, 4, 2, 256, 8), 2, 128
DOCUMENTS = (70, 1, 113, 72)  # tokens of the documents of a row; the cut between two processes lies inside of one
COEFFICIENT = 0.02  # of the balance term
AGREEMENT = 1e-5  # of the largest value


class _Exchange(torch.autograd.Function):
    """Cut `scattered` into one part a process, and join along `gathered` what the others send."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scattered: int, gathered: int) -> torch.Tensor:
        ctx.axes = scattered, gathered
        sent = torch.stack(x.chunk(distributed.get_world_size(), scattered))
        received = torch.empty_like(sent)
        distributed.all_to_all_single(received, sent)
        return torch.cat(received.unbind(0), gathered)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scattered, gathered = ctx.axes
        return _Exchange.apply(grad_outputs[0], gathered, scattered), None, None  # type: ignore[no-untyped-call]


def exchange(x: torch.Tensor, scattered: int, gathered: int) -> torch.Tensor:
    """An all-to-all with a gradient."""
    result: torch.Tensor = _Exchange.apply(x, scattered, gathered)  # type: ignore[no-untyped-call]
    return result


@dataclass(frozen=True)
class Ulysses:
    """The attention of one batch; `mask_SS`: which token sees which in the whole row."""

    mask_SS: torch.Tensor

    @classmethod
    def packed(cls, positions_S: torch.Tensor) -> "Ulysses":
        """A token sees the tokens before it in its document; documents begin at position 0."""
        document_S = (positions_S == 0).cumsum(0)
        place_S = torch.arange(len(positions_S))
        return cls((document_S[:, None] == document_S) & (place_S[:, None] >= place_S))

    def attention(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _: None, **settings: Any
    ) -> tuple[torch.Tensor, None]:
        """`query [B, heads, s, D]`, `key` and `value [B, key heads, s, D]` to `[B, s, heads, D]`.

        Key heads that the processes do not divide are repeated until they do.
        """
        assert not settings["dropout"]
        assert not settings.get("sliding_window")
        processes = distributed.get_world_size()
        repeats = processes // math.gcd(key.shape[1], processes)
        key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)
        heads = [exchange(x, 1, 2) for x in (query, key, value)]
        groups = heads[0].shape[1] // heads[1].shape[1]
        mixed = functional.scaled_dot_product_attention(
            heads[0],
            repeat_kv(heads[1], groups),
            repeat_kv(heads[2], groups),
            attn_mask=self.mask_SS[None, None],
            scale=settings["scaling"],
        )
        return exchange(mixed, 2, 1).transpose(1, 2), None


@contextmanager
def sequence_parallel(model: Any, positions_S: torch.Tensor) -> Iterator[None]:
    """Run `model` on this process's tokens of a row with these positions."""
    config = model.get_base_model().config
    ALL_ATTENTION_FUNCTIONS.register(NAME, Ulysses.packed(positions_S).attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, lambda *_, **__: None)  # the attention function has its own
    before, config._attn_implementation = config._attn_implementation, NAME
    try:
        yield
    finally:
        config._attn_implementation = before


@dataclass(frozen=True)
class Part:
    """A process's tokens `[1, s]`: labels are shifted before the cut, as the next token may lie on another process."""

    ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    supervised: int  # labels of the whole row
    tokens: int  # of the whole row

    def cut(self, rank: int, processes: int) -> "Part":
        """The equal run of tokens of one process."""
        ids, labels, positions = (x.chunk(processes, 1)[rank] for x in (self.ids, self.labels, self.positions))
        return Part(ids, labels, positions, self.supervised, self.tokens)


def packed_row() -> Part:
    """Random documents in one row."""
    positions = torch.cat([torch.arange(length) for length in DOCUMENTS])[None]
    ids = torch.randint(0, VOCABULARY, positions.shape, generator=torch.Generator().manual_seed(0))
    labels = functional.pad(ids.masked_fill(positions == 0, -100)[:, 1:], (0, 1), value=-100)
    return Part(ids, labels, positions, int((labels >= 0).sum()), ids.numel())


def summed(value: torch.Tensor) -> torch.Tensor:
    """Over all processes; a constant for autograd."""
    total = value.detach().clone()
    distributed.all_reduce(total)
    return total


def loss_of(model: Any, part: Part, total: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """This part's share of cross entropy and balance term: the shares of all parts add up to the row's.

    `E * sum_e f_e P_e` needs the frequencies of the whole row; the probabilities are a mean, whose shares add up.
    """
    outputs = model(input_ids=part.ids, position_ids=part.positions, use_cache=False, output_router_logits=True)
    loss = functional.cross_entropy(outputs.logits[0].float(), part.labels[0], reduction="sum") / part.supervised
    for logits_TE in outputs.router_logits:
        probability_TE = logits_TE.float().softmax(-1)
        experts = probability_TE.shape[1]
        chosen = probability_TE.topk(MODEL.top_k).indices.reshape(-1)
        frequency_E = total(torch.bincount(chosen, minlength=experts).float()) / part.tokens
        loss = loss + COEFFICIENT * experts * (frequency_E * probability_TE.sum(0) / part.tokens).sum()
    return loss


def gradients_of(
    model: Any, part: Part, total: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Loss and the adapter's gradients, summed over the processes, and the step's peak bytes on this one."""
    losses: list[torch.Tensor] = []

    def step() -> None:
        losses[:] = [loss_of(model, part, total)]
        losses[0].backward()  # type: ignore[no-untyped-call]

    model.zero_grad(set_to_none=True)
    step()  # warm
    losses.clear()
    model.zero_grad(set_to_none=True)
    peak = transient_bytes(step)
    named = {name: total(value.grad) for name, value in model.named_parameters() if value.grad is not None}
    return total(losses[0]), named, peak


def compare(key_heads: int, mode: Any) -> dict[str, Any]:
    """Largest differences to one process, over the largest value; peaks of one process and of this one."""
    config = mixtral_config(MODEL, LAYERS, VOCABULARY)
    config.num_key_value_heads = key_heads
    model = adapt_mixtral(random_mixtral(config, torch.float32, "cpu"), MODEL.rank)
    enable_checkpointing(model, mode)
    row = packed_row()
    loss, wanted, alone = gradients_of(model, row, torch.Tensor.detach)
    with sequence_parallel(model, row.positions[0]):
        part = row.cut(distributed.get_rank(), distributed.get_world_size())
        got_loss, got, peak = gradients_of(model, part, summed)
    assert got.keys() == wanted.keys()
    differences = {name: float((got[name] - wanted[name]).abs().max() / wanted[name].abs().max()) for name in wanted}
    return {
        "key_heads": key_heads,
        "checkpointing": mode,
        "loss": float((got_loss - loss).abs() / loss.abs()),
        "gradients": max(differences.values()),
        "tensors": len(differences),
        "peak of a process / of one process alone": peak / alone,
    }


def main() -> None:
    """Compare and, on the first process, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULT, help="result file (default: %(default)s)")
    args = parser.parse_args()
    distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    measured_on = provenance(0)
    cases = [compare(*case) for case in ((4, "none"), (2, "full"), (1, "full"))]
    if distributed.get_rank() == 0:
        processes = distributed.get_world_size()
        for case in cases:
            print(f"{processes} processes, {case}", flush=True)
        command = f"torchrun --standalone --nproc_per_node {processes} -m benchmarks.sequence_parallel"
        result = {"what": "a packed row over processes beside one process", "command": command, "processes": processes}
        write_result(args.output, result | {"cases": cases, "provenance": measured_on})
    distributed.destroy_process_group()
    if any(case[what] > AGREEMENT for case in cases for what in ("loss", "gradients")):
        raise SystemExit(f"sequence_parallel: differs from one process by more than {AGREEMENT}")


if __name__ == "__main__":
    main()
