"""The loss without a full logits tensor: TRL's fused head, as it comes and as the trainers have it here, beside logits.

T tokens, all of them supervised, which is the fused head's worst case; V entries of the vocabulary, H hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import MixtralForCausalLM
from trl.trainer.utils import add_fused_lm_head

from benchmarks.harness import Bar, interleaved
from benchmarks.memory import transient_bytes
from benchmarks.mixtral import mixtral_config
from benchmarks.shapes import Shape
from finetune.methods.loss_head import fit_head

LOGITS, TRL, OURS = "full logits", "TRL's fused head", "fused head here"
PEAK_BAR = 0.15
OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")  # what DPO asks of the head


@dataclass(frozen=True)
class HeadShape:
    """One batch that reaches the head. `arms`: TRL's own holds gibibytes at more tokens. `timed`: few tokens alone."""

    tokens: int
    vocabulary: int
    hidden: int = 512
    arms: tuple[str, ...] = (LOGITS, OURS)
    timed: bool = False

    @property
    def label(self) -> str:
        """`T4096 V32000 H512`."""
        return f"T{self.tokens} V{self.vocabulary} H{self.hidden}"


SHAPES = (HeadShape(1024, 32000, arms=(LOGITS, TRL, OURS), timed=True), HeadShape(4096, 32000), HeadShape(4096, 49152))


def head_arms(shape: HeadShape) -> dict[str, Callable[[], torch.Tensor]]:
    """Log-probabilities of all targets and the gradient of the hidden states, from a model without layers.

    Each arm gives the log-probabilities; AssertionError where they disagree.
    """
    config = mixtral_config(Shape(shape.hidden, 64, 2, 1, shape.tokens, 1), layers=0, vocabulary=shape.vocabulary)
    torch.manual_seed(0)
    models: dict[str, Any] = {name: MixtralForCausalLM(config) for name in (LOGITS,)}
    weights = models[LOGITS].requires_grad_(False).state_dict()
    for name in shape.arms:
        if name == LOGITS:
            continue
        with torch.device("meta"):
            models[name] = MixtralForCausalLM(config)
        models[name].model.rotary_emb = models[LOGITS].model.rotary_emb
        models[name].load_state_dict(weights, assign=True)
        models[name].requires_grad_(False)
        add_fused_lm_head(models[name], outputs=OUTPUTS)
        if name == OURS:
            fit_head(models[name])
    hidden_1TH = torch.randn(1, shape.tokens, shape.hidden).requires_grad_()
    target_1T = torch.randint(shape.vocabulary, (1, shape.tokens))

    def step(name: str) -> torch.Tensor:
        hidden_1TH.grad = None
        if name == LOGITS:
            logits_1TV = models[name](inputs_embeds=hidden_1TH, use_cache=False).logits
            scores_1T = logits_1TV.log_softmax(-1).gather(-1, target_1T.unsqueeze(-1)).squeeze(-1)
            del logits_1TV
        else:
            output = models[name](inputs_embeds=hidden_1TH, shift_labels=target_1T, fused_lm_head=True)
            scores_1T = output.log_probs
        scores_1T.sum().backward()
        found: torch.Tensor = scores_1T.detach()
        return found

    arms: dict[str, Callable[[], torch.Tensor]] = {name: lambda name=name: step(name) for name in shape.arms}  # type: ignore[misc]
    scores = {name: arm() for name, arm in arms.items()}
    for found in scores.values():
        torch.testing.assert_close(found, scores[LOGITS], atol=1e-4, rtol=1e-4)
    return arms


def head_bars(shape: HeadShape, peaks: dict[str, int]) -> list[Bar]:
    """Peak beside that of the full logits; the bar is for the head that the trainers use."""
    return [
        Bar(
            f"{name} / {LOGITS}, peak",
            shape.label,
            peak / peaks[LOGITS],
            "<=",
            PEAK_BAR if name == OURS else None,
            "memory",
        )
        for name, peak in peaks.items()
        if name != LOGITS
    ]


def measure_heads(repeats: int, shapes: Sequence[HeadShape] = SHAPES) -> tuple[list[Bar], list[dict[str, Any]]]:
    """Bars and raw figures, shape by shape."""
    bars: list[Bar] = []
    raw: list[dict[str, Any]] = []
    for shape in shapes:
        arms = head_arms(shape)
        peaks = {name: transient_bytes(arm) for name, arm in arms.items()}
        bars += head_bars(shape, peaks)
        print(f"\n=== loss head, forward and backward: {shape.label}", flush=True)
        for name, peak in peaks.items():
            print(f"  {name:<36}{peak / 2**20:>9.1f} MiB")
        raw.append({**vars(shape), "peak_bytes": peaks})
        if shape.timed:
            timings = interleaved(arms, repeats)
            raw[-1]["seconds"] = timings.seconds
            bars += [
                Bar(f"{name} / {LOGITS}, time", shape.label, timings.ratio(name, LOGITS), "<=", None, "time")
                for name in arms
                if name != LOGITS
            ]
    return bars, raw
