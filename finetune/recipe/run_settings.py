"""The sections `save` and `watchdog` of a recipe: what is kept of a run, and when it stops by itself."""

from typing import Literal

from pydantic import Field

from finetune.recipe.method_settings import Section


class SaveSettings(Section):
    """The checkpoints that a run keeps."""

    keep: int = Field(
        default=2,
        ge=1,
        description="Newest checkpoints to keep, besides the one with the best evaluation, which is kept as well.",
    )


class LossSpike(Section):
    """A step whose loss is far above that of the steps before it, or is not finite."""

    action: Literal["stop", "skip_batch", "warn"] = Field(
        default="warn",
        description="What to do in a step with a loss above the ceiling. skip_batch: the weights stay as they are in "
        "this step. A loss or gradient that is not finite stops the run, unless this is skip_batch.",
    )
    ceiling: float = Field(
        default=6.0,
        gt=0,
        description="Highest loss of a step, in standard deviations above the mean of the last 50 steps (one is at "
        "least 5% of the mean); looked at after 20 steps.",
    )


class DeadExperts(Section):
    """Experts that no token of a step was routed to."""

    action: Literal["stop", "skip_batch", "warn"] = Field(
        default="warn", description="What to do in a step with a higher share of dead experts."
    )
    ceiling: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="Highest share of experts without a token, over all layers of a step. A step of fewer than 10 "
        "choices for each expert is not looked at.",
    )


class ZeroGradient(Section):
    """Steps in which nothing is learned although the loss is not 0."""

    action: Literal["stop", "warn"] = Field(
        default="stop", description="What to do once so many steps in a row had a gradient of exactly 0."
    )
    ceiling: int = Field(
        default=3, ge=1, description="Steps in a row with a gradient of exactly 0; at the run's end one is enough."
    )


class WatchdogSettings(Section):
    """What is watched in every optimizer step. The rows of a step that was noticed are written to the run folder."""

    loss_spike: LossSpike = Field(default_factory=LossSpike, description="A loss far above the steps before it.")
    dead_experts: DeadExperts = Field(
        default_factory=DeadExperts, description="A router that has collapsed onto few experts."
    )
    zero_gradient: ZeroGradient = Field(default_factory=ZeroGradient, description="A gradient of exactly 0.")
