"""DPO on one GPU at Mixtral-8x7B's shapes: `python -m benchmarks.gpu_pairs`, beside SFT on the same tokens.

bf16, random NF4 weights, full recomputation, forward and backward. Needs trl besides what `make bench-gpu` needs.
`--dry-run` takes tiny shapes on the CPU: it shows that the program runs, its figures mean nothing.
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.nn.functional import logsigmoid
from trl.trainer.utils import add_fused_lm_head

from benchmarks.gpu_run import GIB
from benchmarks.harness import Bar, interleaved, provenance, table, wall_clock
from benchmarks.memory import cuda_transient_bytes, transient_bytes
from benchmarks.mixtral import adapt_mixtral, mixtral_config, random_mixtral
from benchmarks.plan import DRY, H200, Plan
from benchmarks.prompt_sharing import sharing_gain
from finetune.data.tokens.collators import PairCollator, PairLayout
from finetune.data.types import TokenPair
from finetune.files import write_json
from finetune.methods.loss_head import fit_head
from finetune.methods.pairs import score_pairs
from finetune.methods.reference import Reference
from finetune.moe.checkpointing import enable_checkpointing

RESULT = Path("benchmarks/results/dpo-gpu.json")
PAIRS, PROMPT, ANSWER, BETA, ROUNDS = 4, 768, 256, 0.1, 5
DRY_LENGTHS = 12, 4
OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")
Step = Callable[[], None]


def draw_pairs(plan: Plan, prompt: int, answer: int) -> list[TokenPair]:
    """Random ids, every answer token supervised."""
    random = np.random.default_rng(0)
    made = []
    for number in range(PAIRS):
        ids = [random.integers(4, plan.vocabulary, length, dtype=np.int32) for length in (prompt, answer, answer)]
        made.append(TokenPair(ids[0], ids[1], ids[1], ids[2], ids[2], f"random:{number}"))
    return made


def build_arms(model: Any, plan: Plan, pairs: list[TokenPair]) -> dict[str, Step]:
    """Steps by name; all on the same pairs."""
    tokenizer = SimpleNamespace(pad_token_id=0)
    features = [{"pairs": [number], "split": "train"} for number in range(PAIRS)]
    reference = Reference(model, fresh=True)

    def batch(layout: PairLayout) -> dict[str, Any]:
        multiple = 8 if plan.device == "cuda" else 1
        made = PairCollator(tokenizer, {"train": pairs}, layout, pad_to_multiple_of=multiple)(features)
        return {name: each.to(plan.device) if hasattr(each, "to") else each for name, each in made.items()}

    def autocast() -> Any:
        return torch.autocast("cuda", torch.bfloat16) if plan.device == "cuda" else nullcontext()

    def dpo(inputs: dict[str, Any], live: bool) -> None:
        model.zero_grad(set_to_none=True)
        with autocast():
            kept = torch.zeros(2 * PAIRS, device=plan.device)
            if live:
                with reference.active() as policy:
                    kept = score_pairs(policy, inputs, "sdpa").log_probs.sum(1)
            chosen_B, rejected_B = (score_pairs(model, inputs, "sdpa").log_probs.sum(1) - kept).chunk(2)
        (-logsigmoid(BETA * (chosen_B - rejected_B)).mean()).backward()  # type: ignore[no-untyped-call]

    padded = batch("padded")
    labels = torch.nn.functional.pad(padded["shift_labels"], (1, 0), value=-100)[:, :-1]

    def sft() -> None:
        model.zero_grad(set_to_none=True)
        with autocast():
            loss = model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"], labels=labels).loss
        loss.backward()

    return {
        "SFT": sft,
        "DPO padded": partial(dpo, padded, False),
        "DPO flat": partial(dpo, batch("flat"), False),
        "DPO shared": partial(dpo, batch("shared"), False),
        "DPO padded, live": partial(dpo, padded, True),
        "DPO shared, live": partial(dpo, batch("shared"), True),
    }


def measure(plan: Plan, prompt: int, answer: int) -> tuple[list[Bar], dict[str, Any]]:
    """Bars and raw figures."""
    base = random_mixtral(
        mixtral_config(plan.shape(plan.tokens[0]), plan.whole[0], plan.vocabulary), _dtype(plan), plan.device
    )
    add_fused_lm_head(base, outputs=OUTPUTS)
    fit_head(base)
    model = adapt_mixtral(base, plan.rank)
    enable_checkpointing(model, "full")
    pairs = draw_pairs(plan, prompt, answer)
    arms = build_arms(model, plan, pairs)
    timings = interleaved(arms, ROUNDS, wall_clock, at_least=0.0)
    transient = cuda_transient_bytes if plan.device == "cuda" else transient_bytes
    peaks = {name: transient(step) for name, step in arms.items()}
    resident = torch.cuda.memory_allocated() if plan.device == "cuda" else 0
    plain = PAIRS * 2 * (prompt + answer)
    for name in arms:
        seconds = timings.median(name)
        print(f"  {name:<18}{plain / seconds:>9,.0f} plain tokens/s{peaks[name] / GIB:>8.2f} GiB beyond what stays")
    at = f"{plan.whole[0]} layers, {PAIRS} pairs, p{prompt} c{answer}"
    gain = sharing_gain(pairs)
    lines = [
        Bar("DPO, precomputed / SFT, time", at, timings.ratio("DPO padded", "SFT"), "<=", 1.05, "time"),
        Bar("DPO, live / SFT, time", at, timings.ratio("DPO padded, live", "SFT"), "<=", 1.40, "time"),
        Bar("DPO / SFT, peak memory", at, _ratio(peaks, "DPO padded", resident), "<=", 1.10, "memory"),
        Bar("DPO, live / SFT, peak memory", at, _ratio(peaks, "DPO padded, live", resident), "<=", 1.10, "memory"),
        Bar(
            "gain of shared prompts / in tokens",
            at,
            timings.ratio("DPO padded", "DPO shared") / gain,
            ">=",
            0.9,
            "time",
        ),
        Bar("DPO shared / SFT, time", at, timings.ratio("DPO shared", "SFT"), "<=", None, "time"),
    ]
    return lines, {"seconds": timings.seconds, "beyond_bytes": peaks, "resident_bytes": resident, "token_gain": gain}


def _ratio(peaks: dict[str, int], arm: str, resident: int) -> float:
    return (resident + peaks[arm]) / (resident + peaks["SFT"])


def _dtype(plan: Plan) -> torch.dtype:
    return torch.bfloat16 if plan.device == "cuda" else torch.float32


def main() -> None:
    """Measure, print the table and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULT, help="result file (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    args = parser.parse_args()
    plan, lengths = (DRY, DRY_LENGTHS) if args.dry_run else (H200, (PROMPT, ANSWER))
    bars, raw = measure(plan, *lengths)
    print(table(bars))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.output, {"bars": [bar.record() for bar in bars], "raw": raw, "provenance": provenance(0)})


if __name__ == "__main__":
    main()
