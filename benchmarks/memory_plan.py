"""`python -m benchmarks.memory_plan`: what a GPU needs for long rows of Mixtral, by arithmetic, as a table.

One row of T tokens a micro-batch, 4-bit base, LoRA on attention and experts, `gradient_checkpointing: full`. Terms
that grow with T x H and lie outside of the experts are two constants, measured (`benchmarks/long_context.py`); all else
follows from shapes. Not counted: the CUDA context, the allocator's gaps, buffers of collective operations.

T tokens, K experts a token, R = T*K rows, n rows of a piece, E experts, H hidden, I intermediate, L layers,
V vocabulary.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig, MixtralConfig

from finetune.moe.engine.routed_rows import pieces_of

GB = 1e9
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes of a 4-bit value with its share of the block maxima
LAYER = 37  # bytes for each of T x H that a layer has saved when its experts' backward begins, in bfloat16
ATTENTION = 55  # bytes for each of T x H in the rest of that layer's backward, the experts gone
TILE = 4096 * 32768  # logits that TRL's fused head has at once, on a GPU
ADAM = 8  # bytes a trained value: two moments in float32
Gate = Literal["triton", "torch", "cpu"]
"""What computes the element-wise step: the fused kernels, torch's operations on a GPU, or those on a CPU."""


@dataclass(frozen=True)
class Sizes:
    """What the plan reads of a Mixtral's configuration."""

    hidden: int
    intermediate: int
    layers: int
    experts: int
    top_k: int
    key_values: int  # features of all key heads
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> "Sizes":
        """From a transformers config."""
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            config.hidden_size,
            config.intermediate_size,
            config.num_hidden_layers,
            config.num_local_experts,
            config.num_experts_per_tok,
            head * config.num_key_value_heads,
            config.vocab_size,
        )

    @property
    def layer_values(self) -> int:
        """Quantised values of a layer: attention and experts."""
        attention = 2 * self.hidden * (self.hidden + self.key_values)
        return attention + 3 * self.experts * self.hidden * self.intermediate

    @property
    def dense_values(self) -> int:
        """Values that stay in 16 bits: embeddings, head, routers, norms."""
        return 2 * self.vocabulary * self.hidden + self.layers * self.hidden * (self.experts + 2) + self.hidden

    def lora_values(self, rank: int) -> int:
        """Trained values of a layer."""
        attention = 6 * self.hidden + 2 * self.key_values  # q, k, v, o: inputs and outputs
        return rank * (attention + self.experts * (2 * self.hidden + 3 * self.intermediate))


MIXTRAL_8X7B = Sizes(4096, 14336, 32, 8, 2, 1024, 32000)
MIXTRAL_8X22B = Sizes(6144, 16384, 56, 8, 2, 1024, 32768)


def experts_backward(sizes: Sizes, tokens: int, rank: int, pieces: int, value: int = 2, gate: Gate = "triton") -> float:
    """Most bytes that the experts' backward holds besides its inputs `x`, `g`, router weights and factors.

    A single piece also has `u` saved, and one dequantised stack at a time; several have both stacks, and `u` of one
    piece. `value`: bytes a value.
    """
    H, I, E = sizes.hidden, sizes.intermediate, sizes.experts  # noqa: E741
    rows = -(-tokens // pieces) * sizes.top_k
    up, down = 2 * value * E * H * I, value * E * H * I
    sums = 4 * tokens * H + 4 * rank * E * (2 * H + 3 * I)  # of dx and of the factors' gradients, in float32
    if pieces == 1:
        return sums + max(_at_gate(sizes, rows, value, gate), 4 * value * rows * I + value * rows * H + up)
    return sums + up + down + _of_piece(sizes, rows, value, gate)


def loop_backward(sizes: Sizes, tokens: int, rank: int, rows: int, value: int = 2, gate: Gate = "triton") -> float:
    """The same of the loop over experts, for many rows; `rows` of its largest chunk, at most 16,384 on a GPU."""
    one_expert = 3 * value * sizes.hidden * sizes.intermediate
    factors = value * rank * sizes.experts * (2 * sizes.hidden + 3 * sizes.intermediate)
    return 4 * tokens * sizes.hidden + factors + one_expert + _of_piece(sizes, rows, value, gate)


def _of_piece(sizes: Sizes, rows: int, value: int, gate: Gate) -> float:
    """The larger of the element-wise step, and `du`, `dx`, `x` and a copy of `dx` in the order of tokens."""
    at_dx = 2 * value * rows * sizes.intermediate + 3 * value * rows * sizes.hidden
    return max(_at_gate(sizes, rows, value, gate), at_dx)


def _at_gate(sizes: Sizes, rows: int, value: int, gate: Gate) -> float:
    """`u`, `dh`, `du` of the fused kernels, or `u`, `dh`, `silu`, `h` and products in float32; and `g`."""
    products = {"triton": 0, "torch": 8 if value == 2 else 4, "cpu": 12 if value == 2 else 4}[gate]
    return rows * sizes.intermediate * (5 * value + products) + value * rows * sizes.hidden


def activations(sizes: Sizes, tokens: int, rank: int, pieces: int, gate: Gate = "triton") -> dict[str, float]:
    """Bytes of a micro-batch in bfloat16, by what holds them, the router's balance term apart."""
    width = tokens * sizes.hidden
    experts = LAYER * width + experts_backward(sizes, tokens, rank, pieces, gate=gate)
    head = 2 * min(TILE, tokens * sizes.vocabulary) + 12 * width
    return {
        "inputs and routing of each layer": sizes.layers * (2.0 * width + 40 * tokens * sizes.top_k),
        "backward of a layer": max(experts, ATTENTION * width, head),
    }


def plan(sizes: Sizes, tokens: int, rank: int, shard: int = 1) -> dict[str, float]:
    """Bytes by what holds them, in bfloat16; `shard`: processes that share base, adapter and optimizer state (FSDP2).

    The last line is the sum. "backward of a layer" is the largest of its experts, the rest of it, and the loss head.
    """
    lora = sizes.lora_values(rank)
    pieces = pieces_of(tokens * sizes.top_k, 2 * sizes.intermediate)
    lines = {
        "base in 4 bits": sizes.layers * sizes.layer_values * NF4 / shard,
        "embeddings, head, routers, norms": 2.0 * sizes.dense_values,
        "adapter, its gradients, Adam": sizes.layers * lora * (4 + 4 + ADAM) / shard,
        "two gathered layers": 0.0 if shard == 1 else 2 * (sizes.layer_values * NF4 + 4 * lora) + 4 * lora,
        "router logits for the balance term": 8.0 * sizes.layers * tokens * sizes.experts,
        **activations(sizes, tokens, rank, pieces),
    }
    return lines | {"sum": sum(lines.values())}


def markdown(columns: dict[str, dict[str, float]]) -> str:
    """The plans side by side, in GB, as a table for the docs."""
    names = list(next(iter(columns.values())))
    lines = [f"| GB | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    lines += [f"| {name} | {' | '.join(f'{column[name] / GB:.1f}' for column in columns.values())} |" for name in names]
    return "\n".join(lines)


def shipped() -> dict[str, dict[str, float]]:
    """The columns of docs/long-context.md: rank 16."""
    return {
        "8x7B, 8k, one GPU": plan(MIXTRAL_8X7B, 2**13, 16),
        "8x7B, 32k, one GPU": plan(MIXTRAL_8X7B, 2**15, 16),
        "8x22B, 8k, sharded over 8": plan(MIXTRAL_8X22B, 2**13, 16, shard=8),
        "8x22B, 32k, sharded over 8": plan(MIXTRAL_8X22B, 2**15, 16, shard=8),
    }


def main() -> None:
    """The docs' table, or the plan of one configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="folder or config.json of a Mixtral (default: the docs' table)")
    parser.add_argument("--tokens", type=int, default=2**15, help="tokens of a micro-batch (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank (default: %(default)s)")
    parser.add_argument("--shard", type=int, default=1, help="processes of a sharded base (default: %(default)s)")
    args = parser.parse_args()
    if args.config is None:
        print(markdown(shipped()))
        return
    config = AutoConfig.from_pretrained(args.config)
    if not isinstance(config, MixtralConfig):
        raise SystemExit(f"{args.config} is a {config.model_type}; the plan knows Mixtral's layers only")
    label = f"{args.tokens} tokens, {args.shard} processes"
    print(markdown({label: plan(Sizes.of(config), args.tokens, args.rank, args.shard)}))


if __name__ == "__main__":
    main()
