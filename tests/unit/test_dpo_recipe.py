"""Recipes of `method.kind: dpo`: what may be written, and each mistake with its line."""

from pathlib import Path

import pytest

from finetune.recipe import DpoSettings, dump_recipe
from finetune.recipe.trainer_args import reserved
from tests.unit.recipe_writing import RecipeFile, changed

PAIRS = ("format: messages", "format: preference")


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RecipeFile:
    return RecipeFile(tmp_path, monkeypatch)


def dpo(*lines: str, after: str = "") -> str:
    """A sound DPO recipe with more lines in its method section."""
    return changed(("kind: sft", "\n  ".join(["kind: dpo", "beta: 0.1", *lines])), PAIRS, after=after)


def test_the_defaults_are_plain_dpo(recipe_file: RecipeFile) -> None:
    method = recipe_file.load(dpo()).method
    assert isinstance(method, DpoSettings)
    assert (method.beta, method.loss_type, method.reference, method.prompt_sharing) == (
        0.1,
        ["sigmoid"],
        "precomputed",
        "auto",
    )


def test_everything_is_written_out_and_read_back(recipe_file: RecipeFile) -> None:
    lines = ("loss_type: [sigmoid, sft]", "loss_weights: [1, 0.2]", "ld_alpha: 0.5", "reference: live")
    recipe = recipe_file.load(dpo(*lines), "model.adapter=runs/sft/adapter")
    assert recipe_file.load(dump_recipe(recipe)) == recipe
    assert recipe.model.adapter == "runs/sft/adapter"


MISTAKES = {
    "no beta": (
        changed(("kind: sft", "kind: dpo"), PAIRS),
        "recipe.yaml:12: method.beta: required key is missing; add it: a number above 0",
    ),
    "beta of 0": (
        dpo().replace("beta: 0.1", "beta: 0"),
        "recipe.yaml:14: method.beta: out of range; got 0; write a number above 0",
    ),
    "a loss that TRL does not have": (
        dpo("loss_type: [sigmoyd]"),
        'recipe.yaml:15: method.loss_type[0]: not one of the known values; got "sigmoyd"; write a list of sigmoid, '
        "hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard, aot, aot_unpaired, apo_zero, apo_down, discopop, "
        "sft, sigmoid_norm; did you mean sigmoid?",
    ),
    "a loss that is no list": (
        dpo("loss_type: ipo"),
        'recipe.yaml:15: method.loss_type: wrong type; got "ipo"; write a list of sigmoid, hinge, ipo, exo_pair, '
        "nca_pair, robust, bco_pair, sppo_hard, aot, aot_unpaired, apo_zero, apo_down, discopop, sft, sigmoid_norm; "
        "a single one is written [ipo]",
    ),
    "a loss twice": (
        dpo("loss_type: [ipo, ipo]"),
        'recipe.yaml:15: method.loss_type[1]: listed twice; got "ipo"; keep one of the two, with the sum of their '
        "weights",
    ),
    "weights for other losses": (
        dpo("loss_type: [sigmoid, sft]", "loss_weights: [1.0]"),
        "recipe.yaml:16: method.loss_weights: needs one weight for each of sigmoid, sft; got [1.0]; write 2 numbers",
    ),
    "weights for one loss": (
        dpo("loss_weights: [1.0, 2.0]"),
        "recipe.yaml:15: method.loss_weights: needs one weight for each of sigmoid; got [1.0, 2.0]; write one number",
    ),
    "a weight of 0": (
        dpo("loss_type: [sigmoid, sft]", "loss_weights: [1.0, 0]"),
        "recipe.yaml:16: method.loss_weights[1]: out of range; got 0; write a list, each a number above 0 or null",
    ),
    "exo_pair without smoothing": (
        dpo("loss_type: [exo_pair]", "label_smoothing: 0"),
        "recipe.yaml:16: method.label_smoothing: the loss exo_pair needs a value above 0; got 0; write 1e-3, "
        "as in its paper",
    ),
    "too many swapped labels": (
        dpo("loss_type: [robust]", "label_smoothing: 0.5"),
        "recipe.yaml:16: method.label_smoothing: the loss robust needs a value below 0.5: "
        "from 0.5 on most labels would be swapped; got 0.5; write the share of pairs that are labelled wrongly, "
        "such as 0.1",
    ),
    "smoothing that nothing uses": (
        dpo("label_smoothing: 0.1"),
        "recipe.yaml:15: method.label_smoothing: has no effect: sigmoid does not use it; got 0.1; remove it, or add "
        "robust or exo_pair to method.loss_type",
    ),
    "a divergence without a reading": (
        dpo("loss_type: [sigmoid, apo_zero]", "f_divergence_type: js_divergence"),
        "recipe.yaml:16: method.f_divergence_type: the losses apo_zero are defined for reverse_kl only; got "
        '"js_divergence"; write reverse_kl, or take them out of method.loss_type',
    ),
    "pairs that are sorted one by one": (
        dpo("loss_type: [aot]"),
        "recipe.yaml:19: training.per_device_train_batch_size: the loss aot sorts the pairs of a micro-batch: "
        "with one pair it equals sigmoid; got 1; write 8, or write method.loss_type: [sigmoid]",
    ),
    "weighted pairs that are sorted": (
        dpo("loss_type: [aot]", "use_weighting: true", after="  per_device_train_batch_size: 2\n"),
        "recipe.yaml:16: method.use_weighting: aot sorts the pairs, so a pair cannot be weighted; got true; "
        "write false",
    ),
    "a weight of pairs on tokens": (
        dpo("loss_type: [sigmoid, sft]", "use_weighting: true"),
        "recipe.yaml:16: method.use_weighting: sft is a mean over tokens, so a pair cannot be weighted; got true; "
        "write false, or take it out of method.loss_type",
    ),
    "a temperature of another loss": (
        dpo("discopop_tau: 0.1"),
        "recipe.yaml:15: method.discopop_tau: has no effect; got 0.1; remove it, or write method.loss_type: [discopop]",
    ),
    "an alpha of another divergence": (
        dpo("f_alpha_divergence_coef: 0.3"),
        "recipe.yaml:15: method.f_alpha_divergence_coef: has no effect; got 0.3; remove it, or write "
        "method.f_divergence_type: alpha_divergence",
    ),
    "TRL's name of the reference": (
        dpo("precompute_ref_log_probs: true"),
        "recipe.yaml:15: method.precompute_ref_log_probs: unknown key: another tool's name for a setting; got true; "
        "write method.reference: precomputed, or method.reference: live for false",
    ),
    "a second model": (
        dpo("ref_model: some/model"),
        "recipe.yaml:15: method.ref_model: unknown key: the reference is the base as it is loaded, or the adapter that "
        'the run starts from; got "some/model"; remove it; a run starts from an earlier adapter with model.adapter',
    ),
    "axolotl's adapter": (
        dpo(after="adapter: qlora\n"),
        "recipe.yaml:22: adapter: unknown key: always LoRA here, QLoRA with model.load_in_4bit: true; got "
        '"qlora"; remove it; an earlier adapter to start from is named in model.adapter',
    ),
    "a setting of the method among the trainer's": (
        dpo(after="  trainer_args: {beta: 0.2}\n"),
        "recipe.yaml:22: training.trainer_args.beta: the recipe has its own key for this; got 0.2; remove it: "
        "method.beta is given",
    ),
    "a reference that moves": (
        dpo(after="  trainer_args: {sync_ref_model: true}\n"),
        "recipe.yaml:22: training.trainer_args.sync_ref_model: set by this program: the reference is "
        "the model before training and does not change; got true; remove it",
    ),
    "a field that DPOConfig does not have": (
        dpo(after="  trainer_args: {adam_beta_2: 0.9}\n"),
        "recipe.yaml:22: training.trainer_args.adam_beta_2: DPOConfig has no such field; got 0.9; did you mean "
        "adam_beta2?",
    ),
}


@pytest.mark.parametrize(("text", "complaint"), MISTAKES.values(), ids=MISTAKES)
def test_one_mistake_gives_exactly_this_line(recipe_file: RecipeFile, text: str, complaint: str) -> None:
    assert recipe_file.problems(text) == [complaint]


def test_a_trainer_argument_of_dpo_alone_is_taken_by_dpo_alone(recipe_file: RecipeFile) -> None:
    line = "  trainer_args: {dataloader_num_workers: 2}\n"
    assert recipe_file.load(dpo(after=line)).training.trainer_args == {"dataloader_num_workers": 2}
    assert "disable_dropout" in reserved("dpo")
    assert "disable_dropout" not in reserved("sft")
