"""`python -m benchmarks.long_context`: memory of long rows on this CPU, beside the arithmetic of `memory_plan`.

The experts' backward of grouped products, whole and cut; whole steps of a scaled Mixtral; the attention mask of packed
rows; and the time of a cut. Small shapes that keep Mixtral's ratios, LoRA on attention and every expert. Writes a JSON
file.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils.checkpoint import checkpoint
from transformers.masking_utils import create_causal_mask
from trl.trainer.utils import add_fused_lm_head

from benchmarks import arms
from benchmarks.harness import REPEATS, Bar, interleaved, provenance, table, write_result
from benchmarks.memory import transient_bytes
from benchmarks.memory_plan import Sizes, activations, experts_backward, loop_backward, shipped
from benchmarks.mixtral import adapt_mixtral, mixtral_config, random_mixtral
from benchmarks.shapes import Shape, draw_routing
from finetune.methods.loss_head import fit_head
from finetune.moe import experts as engine
from finetune.moe.checkpointing import enable_checkpointing, kept_routing
from finetune.moe.engine.routed_rows import ChunkSize

RESULT = Path("benchmarks/results/long-context-cpu.json")
VOCABULARY = 32  # small: on a CPU the head has eight tiles at once, on a GPU one
EXPERTS = (
    (Shape(128, 448, 8, 2, 1024, 16), 4),
    (Shape(128, 448, 8, 2, 2048, 16), 8),
    (Shape(192, 672, 8, 2, 1024, 8), 2),
)
STEPS = (
    (Shape(128, 448, 8, 2, 512, 8), 2, 2),
    (Shape(128, 448, 8, 2, 1024, 8), 2, 4),
    (Shape(192, 672, 8, 2, 1024, 8), 3, 2),
)
TIMED = Shape(256, 896, 8, 2, 4096, 16)


@contextmanager
def grouped_pieces(pieces: int) -> Iterator[None]:
    """Compute as a Hopper GPU does, with the rows in so many pieces."""
    with (
        patch.object(engine, "_grouped_products", lambda _: True),
        patch.object(engine, "pieces_of", lambda *_: pieces),
    ):
        yield


@contextmanager
def loop_rows(rows: int) -> Iterator[None]:
    """Many rows in a loop over experts, as on GPUs before Hopper: chunks of one expert, of at most `rows` rows."""
    size = ChunkSize(shared=1, single=rows)
    with patch.object(engine, "pieces_of", lambda *_: 2), patch.object(ChunkSize, "for_columns", lambda *_: size):
        yield


def sizes_of(shape: Shape, layers: int = 1) -> Sizes:
    """The plan's view of a scaled Mixtral."""
    return Sizes.of(mixtral_config(shape, layers, VOCABULARY))


def checkpointed(arm: arms.Arm) -> torch.Tensor:
    """The output of one layer's experts under full checkpointing."""
    for tensor in (arm.inputs.x_TH, arm.inputs.weight_TK, *arm.lora.values()):
        tensor.grad = None
    output: torch.Tensor = checkpoint(arm.forward, use_reentrant=False, context_fn=kept_routing)
    return output


def measure_experts(shape: Shape, pieces: int, dtype: torch.dtype) -> dict[str, float]:
    """Peak of the experts' backward and its plan; recompute included where it saves something of all rows."""
    arm = arms.build(arms.OURS, shape, arms.make_inputs(shape, draw_routing(shape), dtype))
    with grouped_pieces(pieces):
        arm.step()
        output = checkpointed(arm)
        measured = transient_bytes(partial(output.backward, arm.inputs.grad_TH))
    planned = experts_backward(sizes_of(shape), shape.tokens, shape.rank, pieces, dtype.itemsize, "cpu")
    return {"measured_bytes": measured, "planned_bytes": planned, "measured / planned": measured / planned}


def measure_loop(shape: Shape, rows: int, dtype: torch.dtype) -> dict[str, float]:
    """The same of the loop over experts, with chunks of at most `rows` rows."""
    routing = draw_routing(shape)
    arm = arms.build(arms.OURS, shape, arms.make_inputs(shape, routing, dtype))
    with loop_rows(rows):
        arm.step()
        output = checkpointed(arm)
        measured = transient_bytes(partial(output.backward, arm.inputs.grad_TH))
    largest = min(rows, int(torch.bincount(routing.index_TK.reshape(-1)).max()))
    planned = loop_backward(sizes_of(shape), shape.tokens, shape.rank, largest, dtype.itemsize, "cpu")
    return {"measured_bytes": measured, "planned_bytes": planned, "measured / planned": measured / planned}


def scaled_model(shape: Shape, layers: int) -> Callable[[], None]:
    """One step, loss and backward, of a random Mixtral in bfloat16 with TRL's head and full checkpointing."""
    model = adapt_mixtral(random_mixtral(mixtral_config(shape, layers, VOCABULARY), torch.bfloat16, "cpu"), shape.rank)
    add_fused_lm_head(model.get_base_model())
    fit_head(model.get_base_model())
    enable_checkpointing(model, "full")
    ids = torch.randint(0, VOCABULARY, (1, shape.tokens), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        scores = model(input_ids=ids, labels=ids, use_cache=False, fused_lm_head=True)
        (-scores.log_probs.sum()).backward()

    step()
    model.zero_grad(set_to_none=True)
    return step


def measure_step(shape: Shape, layers: int, pieces: int) -> dict[str, float]:
    """Peak of a whole step, the adapter's gradients included, and its plan."""
    with grouped_pieces(pieces):
        measured = transient_bytes(scaled_model(shape, layers))
    sizes = sizes_of(shape, layers)
    held = activations(sizes, shape.tokens, shape.rank, pieces, gate="cpu")
    planned = sum(held.values()) + 4 * layers * sizes.lora_values(shape.rank)
    return {"measured_bytes": measured, "planned_bytes": planned, "measured / planned": measured / planned}


def measure_mask(tokens: int) -> dict[str, float]:
    """What transformers' mask of a packed row holds, and holds at most while it is made, in bytes a pair of tokens."""
    config = mixtral_config(Shape(64, 64, 4, 2, tokens, 8), 1, VOCABULARY)
    config._attn_implementation = "sdpa"
    positions = torch.arange(tokens // 4).repeat(4)[None]
    masks: list[torch.Tensor] = []

    def make() -> None:
        embeds = torch.empty(1, tokens, 64)
        masks.append(create_causal_mask(config, embeds, None, cache=None, position_ids=positions))

    peak = transient_bytes(make)
    return {"kept": masks[0].nbytes / tokens**2, "peak": peak / tokens**2}


def measure_time(shape: Shape, pieces: int, repeats: int) -> list[Bar]:
    """Whole, cut, and cut under full checkpointing, in float32 on one thread."""
    arm = arms.build(arms.OURS, shape, arms.make_inputs(shape, draw_routing(shape), torch.float32))

    def step(pieces: int, full: bool) -> None:
        with grouped_pieces(pieces):
            output = checkpointed(arm) if full else arm.forward()
            output.backward(arm.inputs.grad_TH)  # type: ignore[no-untyped-call]

    cases = {f"{n} piece{'s' * (n > 1)}, {'full' if f else 'none'}": (n, f) for n in (1, pieces) for f in (False, True)}
    timings = interleaved({name: partial(step, *case) for name, case in cases.items()}, repeats)
    return [
        Bar(f"{pieces} pieces / whole, experts, {mode}", shape.label, ratio, "<=", limit, "time")
        for mode, limit in (("none", 1.1), ("full", 1.0))
        if (ratio := timings.ratio(f"{pieces} pieces, {mode}", f"1 piece, {mode}"))
    ]


def measure(repeats: int) -> dict[str, Any]:
    """Everything, printed as it comes."""
    result: dict[str, Any] = {"experts": [], "loop": [], "steps": [], "mask": {}}
    for dtype in (torch.float32, torch.bfloat16):
        for shape, cut in EXPERTS:
            for pieces in (1, cut):
                found = measure_experts(shape, pieces, dtype)
                result["experts"].append({"shape": shape.label, "pieces": pieces, "dtype": str(dtype), **found})
                print(f"experts {shape.label}, {pieces} pieces, {dtype}: {found['measured / planned']:.3f} of the plan")
            found = measure_loop(shape, shape.rows, dtype)
            result["loop"].append({"shape": shape.label, "rows": shape.rows, "dtype": str(dtype), **found})
            print(f"loop {shape.label}, {shape.rows} rows, {dtype}: {found['measured / planned']:.3f} of the plan")
    for shape, layers, pieces in STEPS:
        found = measure_step(shape, layers, pieces)
        result["steps"].append({"shape": shape.label, "layers": layers, "pieces": pieces, **found})
        print(
            f"step {shape.label} L{layers}, {pieces} pieces: {found['measured / planned']:.3f} of the plan", flush=True
        )
    for tokens in (1024, 2048):
        result["mask"][str(tokens)] = measure_mask(tokens)
    print(f"mask of a packed row, bytes a pair of tokens: {result['mask']}")
    bars = measure_time(TIMED, 4, repeats)
    print(table(bars))
    return result | {"bars": [bar.record() for bar in bars]}


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULT, help="result file (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="interleaved rounds (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    measured_on = provenance(0)
    what = "peak bytes of torch's CPU allocator beside the plan's; ratios of processor time"
    result = {"what": what, "command": "python -m benchmarks.long_context", **measure(args.repeats), "plan": shipped()}
    write_result(args.output, result | {"provenance": measured_on | {"finished": provenance(0)["finished"]}})


if __name__ == "__main__":
    main()
