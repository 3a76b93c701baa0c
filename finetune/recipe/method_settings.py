"""What is trained for: one section a method, told apart by `kind`. Names are TRL's own."""

from typing import Annotated, Literal

from pydantic import Field

from finetune.recipe.section import Section

PairLoss = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]
Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]


class SftSettings(Section):
    """Supervised fine-tuning: cross entropy on the assistant's tokens."""

    kind: Literal["sft"] = Field(description="The training method.")


class DpoSettings(Section):
    """Direct preference optimisation (arXiv 2305.18290) on pairs of answers to one prompt."""

    kind: Literal["dpo"] = Field(description="The training method.")
    beta: float = Field(
        gt=0,
        description="How strongly the model is held to its reference; for the loss ipo its regularisation (tau). The "
        "paper and most recipes take 0.1.",
    )
    loss_type: list[PairLoss] = Field(
        default=["sigmoid"],
        min_length=1,
        description="TRL's losses by its names; several are added up by `loss_weights`. sft: the mean cross entropy of "
        "the chosen answers (the RPO term); sigmoid_norm and ipo: log-probabilities a token. aot and aot_unpaired sort "
        "the pairs of a micro-batch, so they alone depend on how a step is cut.",
    )
    loss_weights: list[Annotated[float, Field(gt=0)]] | None = Field(
        default=None, description="One weight for each entry of `loss_type`; null: 1 each."
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="For robust the assumed share of pairs whose labels are swapped (below 0.5), for exo_pair its "
        "epsilon (above 0; the paper takes 1e-3), and for aot and aot_unpaired as in DPO.",
    )
    ld_alpha: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Weight of the tokens by which one answer is longer than the other (LD-DPO, arXiv 2409.06411); "
        "null: 1.",
    )
    f_divergence_type: Divergence = Field(
        default="reverse_kl", description="Divergence from the reference (f-DPO, arXiv 2309.16240)."
    )
    f_alpha_divergence_coef: float = Field(
        default=0.5, gt=0, description="Alpha of f_divergence_type: alpha_divergence."
    )
    use_weighting: bool = Field(
        default=False, description="Weigh each pair by the model's own probability of it (WPO, arXiv 2406.11827)."
    )
    discopop_tau: float = Field(default=0.05, gt=0, description="Temperature of the loss discopop.")
    reference: Literal["precomputed", "live"] = Field(
        default="precomputed",
        description="When the reference's log-probabilities are computed. precomputed: once, before the first step, "
        "kept in the run folder and continued there after a kill; live: in every step, for nearly half as much again "
        "of its time. The reference is the model as training finds it: the base, with `model.adapter` if there is one.",
    )
    prompt_sharing: Literal["auto", "off"] = Field(
        default="auto",
        description="auto: the prompt of a pair is computed once for both answers (arXiv 2410.20305) where the "
        "architecture's attention can express it and the prompts are long enough to pay; the run says which. The "
        "gradients are the same.",
    )
