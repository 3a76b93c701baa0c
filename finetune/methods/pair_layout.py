"""How pairs are laid out in a micro-batch: the same for the run and for `finetune check`."""

from typing import Any

from finetune.data import PairMixture
from finetune.data.tokens.collators import PairLayout
from finetune.moe.layout import Family
from finetune.moe.prompt_sharing import prompt_sharing_refusal
from finetune.recipe import DpoSettings, Recipe

MIN_GAIN = 1.1
"""Prompts are shared if that reduces the tokens by at least this factor; below it the attention mask costs more."""


def pair_layout(recipe: Recipe, family: Family, config: Any, mixture: PairMixture) -> tuple[PairLayout, str]:
    """The layout for these training pairs, and a remark on how their prompts are computed and why."""
    method, data = recipe.method, recipe.data
    assert isinstance(method, DpoSettings)
    plain: PairLayout = "flat" if data.packing else "padded"
    if method.prompt_sharing == "off":
        return plain, "computed for each answer, as method.prompt_sharing says"
    refusal = prompt_sharing_refusal(family, config, recipe.model.attn_implementation, data.max_length)
    if refusal is not None:
        return plain, f"computed for each answer; {family.model_type} cannot share them: {refusal}"
    gain = float(mixture.places(False).sum() / mixture.places(True).sum())
    saved = f"{100 * (1 - 1 / gain):.1f} % of the tokens"
    if gain < MIN_GAIN:
        return plain, f"computed for each answer; sharing them would save {saved}"
    return "shared", f"computed once for both answers, which saves {saved}"
