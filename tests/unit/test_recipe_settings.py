"""The settings: frozen, strict, written out and read back unchanged; their surface changes only on purpose."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError

from finetune.errors import Problem, RecipeError
from finetune.recipe import LoraSettings, Recipe, dump_recipe, load_recipe
from finetune.recipe.schema import settings
from tests.unit.recipe_writing import SOUND, RecipeFile

ROOT = Path(__file__).resolve().parents[2]

SURFACE = """
output_dir seed
model model.name_or_path model.revision model.adapter model.load_in_4bit model.dtype model.attn_implementation
model.added_tokens model.eos_token model.pad_token
lora lora.targets lora.r lora.lora_alpha lora.expert_r lora.expert_lora_alpha
lora.experts lora.experts_share lora.experts_score lora.experts_tokens lora.lora_dropout lora.use_rslora
router router.router_aux_loss_coef router.balance router.scope router.router_z_loss_coef router.bias_update_rate
method method.kind method.beta method.loss_type method.loss_weights method.label_smoothing method.ld_alpha
method.f_divergence_type method.f_alpha_divergence_coef method.use_weighting method.discopop_tau
method.reference method.prompt_sharing
data
data.train data.train.path data.train.id data.train.config data.train.split data.train.revision data.train.streaming
data.train.format data.train.columns data.train.ignore_columns data.train.roles
data.train.response_template data.train.response_end data.train.weight data.train.max_rows
data.eval data.eval.path data.eval.id data.eval.config data.eval.split data.eval.revision data.eval.streaming
data.eval.format data.eval.columns data.eval.ignore_columns data.eval.roles
data.eval.response_template data.eval.response_end data.eval.weight data.eval.max_rows
data.on_bad_row data.max_bad_share data.stopping_strategy data.loss_on data.system
data.max_length data.overlong data.max_row_characters data.chat_template data.template_args data.train_on_reasoning
data.packing
training training.max_steps training.num_train_epochs training.learning_rate training.global_batch_size
training.per_device_train_batch_size training.lr_scheduler_type training.warmup_steps training.weight_decay
training.max_grad_norm training.optim training.gradient_checkpointing training.logging_steps training.eval_steps
training.save_steps training.early_stopping_patience training.resume training.rank_timeout training.trainer_args
save save.keep
watchdog watchdog.loss_spike watchdog.loss_spike.action watchdog.loss_spike.ceiling
watchdog.dead_experts watchdog.dead_experts.action watchdog.dead_experts.ceiling
watchdog.zero_gradient watchdog.zero_gradient.action watchdog.zero_gradient.ceiling
logging logging.report_to logging.project logging.run_name logging.wandb_mode
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    return RecipeFile(tmp_path, monkeypatch).load(SOUND)


def test_the_surface_of_the_settings_is_frozen() -> None:
    assert list(settings()) == SURFACE.split(), "a new key needs a test, a description and a line of the changelog"


def test_every_setting_is_described() -> None:
    assert [path for path, setting in settings().items() if len(setting.description) < 8] == []


def test_nothing_that_decides_the_result_has_a_default() -> None:
    decisive = (
        "model.name_or_path data.train.format lora.r lora.targets lora.lora_alpha training.learning_rate "
        "data.max_length"
    )
    assert all(settings()[path].required for path in decisive.split())


def test_a_recipe_cannot_be_changed(recipe: Recipe) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        recipe.lora.r = 4


def test_sections_can_be_built_in_code_and_keep_their_ranges() -> None:
    assert LoraSettings(targets=["attention"], r=4, lora_alpha=8).lora_alpha == 8.0
    with pytest.raises(ValidationError):
        LoraSettings(targets=["attention"], r=0, lora_alpha=8)


floats = st.floats(allow_nan=False, allow_infinity=False)
tricky = st.sampled_from(
    ["2e-4", "no", "~", "0o17", "1.0", "true", "", "- a", "a: b", "# x", "1" * 80, "\x85", "a\u2028b"]
) | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)  # which no recipe takes


@given(text=tricky.filter(bool), number=floats)
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
def test_a_dumped_recipe_reads_back_the_same(recipe: Recipe, text: str, number: float) -> None:
    logging = recipe.logging.model_copy(update={"run_name": text})
    training = recipe.training.model_copy(update={"trainer_args": {"adam_beta2": number, "length_column_name": text}})
    before = recipe.model_copy(update={"logging": logging, "training": training})
    Path("dumped.yaml").write_text(dump_recipe(before), encoding="utf-8")
    assert load_recipe("dumped.yaml") == before


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


@given(keys=st.lists(st.sampled_from(list(settings())), min_size=1, max_size=4, unique=True), value=values)
@hypothesis_settings(deadline=None, max_examples=200)
def test_any_value_at_any_key_loads_or_is_a_recipe_error(keys: list[str], value: object) -> None:
    written = json.dumps(value).replace("NaN", ".nan").replace("Infinity", ".inf")
    recipe = ROOT / "recipes/quickstart/sft-qlora.yaml"
    complaints: tuple[Problem, ...] = ()
    try:
        load_recipe(recipe, [f"{key}={written}" for key in keys])
    except RecipeError as error:
        complaints = error.problems
    assert all("\n" not in str(complaint) for complaint in complaints)


def test_a_bad_recipe_is_refused_within_a_second_and_without_torch(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(SOUND + "  trainer_args: {bogus: 1}\n  optim: adamw\n", encoding="utf-8")
    program = (
        "import sys, time\n"
        "from finetune.errors import Problem, RecipeError\n"
        "from finetune.recipe import load_recipe\n"
        "try:\n    load_recipe(sys.argv[1], ['lora.r=0'])\n"
        "except RecipeError as error:\n    print(len(error.problems))\n"
        "print(time.process_time())\n"
        "print([name for name in ('torch', 'transformers', 'trl', 'numpy') if name in sys.modules])\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    problems, seconds, imported = run.stdout.splitlines()
    assert (problems, imported) == ("3", "[]")
    # The CPU time of the whole process, interpreter included: a shared machine makes the wall clock say nothing.
    assert float(seconds) < 1
