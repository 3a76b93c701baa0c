"""Whole DPO steps of a small 4-bit Mixtral: the prompt once for both answers, against once for each.

p tokens of a prompt, c of each answer.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from trl.trainer.utils import add_fused_lm_head

from benchmarks.harness import Bar, Timings, interleaved
from benchmarks.mixtral import adapt_mixtral, mixtral_config, random_mixtral
from benchmarks.shapes import Shape
from finetune.data.tokens.collators import PairCollator, PairLayout
from finetune.data.types import TokenPair
from finetune.methods.loss_head import fit_head
from finetune.methods.pairs import score_pairs

LAYOUTS: tuple[PairLayout, ...] = ("padded", "flat", "shared")
MODEL, LAYERS, VOCABULARY = Shape(256, 512, 8, 2, 1024, 8), 2, 2048
GAIN_BAR = 0.9  # share of the ratio of tokens that the time must gain


@dataclass(frozen=True)
class SharingCase:
    """A micro-batch of `pairs` pairs with p = `prompt` and c = `answer`, one pair a row or all packed into one."""

    prompt: int
    answer: int
    pairs: int = 2
    packed: bool = False

    @property
    def label(self) -> str:
        """`p384 c64, 2 pairs`."""
        return f"p{self.prompt} c{self.answer}, {self.pairs} pairs{' packed' if self.packed else ''}"

    def make_pairs(self) -> list[TokenPair]:
        """Random ids."""
        random = np.random.default_rng(0)

        def draw(length: int) -> Any:
            return random.integers(4, VOCABULARY, length, dtype=np.int32)

        made = []
        for number in range(self.pairs):
            chosen, rejected = draw(self.answer), draw(self.answer)
            made.append(TokenPair(draw(self.prompt), chosen, chosen, rejected, rejected, f"random:{number}"))
        return made


CASES = (SharingCase(384, 64), SharingCase(192, 192))


def scoring_mixtral(quantised: bool = True) -> Any:
    """A small Mixtral with TRL's fused head and LoRA on attention and experts, in float32."""
    config = mixtral_config(MODEL, LAYERS, VOCABULARY)
    base = random_mixtral(config, torch.float32, "cpu", quantised, quantised)
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    fit_head(base)
    return adapt_mixtral(base, MODEL.rank)


def sharing_arms(model: Any, case: SharingCase, attention: str = "sdpa") -> dict[str, Callable[[], torch.Tensor]]:
    """One step in each layout: forward, and backward of the difference between chosen and rejected answers.

    Raises AssertionError where the layouts disagree: the race would not be fair.
    """
    pairs = case.make_pairs()
    cuts = [list(range(case.pairs))] if case.packed else [[number] for number in range(case.pairs)]
    features = [{"pairs": cut, "split": "train"} for cut in cuts]
    tokenizer = SimpleNamespace(pad_token_id=0)

    def step(batch: dict[str, Any]) -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        scores: torch.Tensor = score_pairs(model, batch, attention).log_probs
        chosen_B, rejected_B = scores.sum(-1).chunk(2)
        (rejected_B - chosen_B).mean().backward()  # type: ignore[no-untyped-call]
        return scores.detach()

    arms: dict[str, Callable[[], torch.Tensor]] = {
        name: partial(step, PairCollator(tokenizer, {"train": pairs}, name)(features)) for name in LAYOUTS
    }
    results = {name: arm() for name, arm in arms.items()}
    for scores in results.values():
        torch.testing.assert_close(scores, results["padded"], atol=1e-4, rtol=1e-4)
    return arms


def sharing_gain(pairs: Iterable[TokenPair]) -> float:
    """Tokens of all documents, over those that are left where every pair shares its prompt."""
    plain = shared = 0
    for pair in pairs:
        answers = len(pair.chosen_ids) + len(pair.rejected_ids)
        plain += 2 * len(pair.prompt_ids) + answers
        shared += len(pair.prompt_ids) + 1 + answers
    return plain / max(shared, 1)


def sharing_bars(case: SharingCase, timings: Timings) -> list[Bar]:
    """The gain in time over each plain layout as a share of the gain in tokens."""
    tokens = sharing_gain(case.make_pairs())
    return [
        Bar(
            f"gain of shared prompts over {name} / gain in tokens",
            case.label,
            timings.ratio(name, "shared") / tokens,
            ">=",
            GAIN_BAR,
            "time",
        )
        for name in ("padded", "flat")
    ]


def measure_sharing(repeats: int, cases: Sequence[SharingCase] = CASES) -> tuple[list[Bar], list[dict[str, Any]]]:
    """Bars and raw figures, case by case."""
    model = scoring_mixtral()
    bars: list[Bar] = []
    raw: list[dict[str, Any]] = []
    for case in cases:
        timings = interleaved(sharing_arms(model, case), repeats)
        bars += sharing_bars(case, timings)
        tokens = sharing_gain(case.make_pairs())
        gains = {name: timings.ratio(name, "shared") for name in ("padded", "flat")}
        raw.append({**vars(case), "gain_in_tokens": tokens, "gain_in_time": gains, "seconds": timings.seconds})
        print(f"\n=== shared prompts, whole steps of a Mixtral: {case.label}; {tokens:.3f} times fewer tokens")
        for name in LAYOUTS:
            gain = f"{gains[name]:>9.3f} times the time of shared" if name in gains else ""
            print(f"  {name:<10}{1e3 * timings.median(name):>9.1f} ms{gain}")
    return bars, raw
