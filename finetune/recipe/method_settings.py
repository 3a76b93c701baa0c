"""The section `method` of a recipe, selected by `kind`, with TRL's names; and the base of all sections."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Text = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """Strict, frozen, no unknown keys, no infinities."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


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
        description="Strength of the KL penalty to the reference; for the loss ipo its regularisation (tau). The "
        "paper and most recipes use 0.1.",
    )
    loss_type: list[PairLoss] = Field(
        default=["sigmoid"],
        min_length=1,
        description="TRL's losses by its names; several are summed with `loss_weights`. sft: the mean cross entropy of "
        "the chosen answers (the RPO term); sigmoid_norm and ipo: log-probabilities per token. aot and aot_unpaired "
        "sort the pairs of a micro-batch, so only they depend on how a step is split into micro-batches.",
    )
    loss_weights: list[Annotated[float, Field(gt=0)]] | None = Field(
        default=None, description="One weight per entry of `loss_type`; null: 1 each."
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="For robust the assumed share of pairs with swapped labels (below 0.5), for exo_pair its epsilon "
        "(above 0; the paper uses 1e-3), for aot and aot_unpaired as in cDPO.",
    )
    ld_alpha: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Weight of the tokens beyond the length of the shorter answer (LD-DPO, arXiv 2409.06411); null: 1.",
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
        "and kept in the run folder, where an interrupted pass continues; live: in every step, which takes nearly 1.5 "
        "times as long. The reference is the model before training: the base, with `model.adapter` if given.",
    )
    prompt_sharing: Literal["auto", "off"] = Field(
        default="auto",
        description="auto: compute the prompt of a pair once for both answers (arXiv 2410.20305) if the architecture's "
        "attention supports it and the prompts are long enough to gain from it; the run prints its choice. The "
        "gradients are the same.",
    )
