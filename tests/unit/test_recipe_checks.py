"""What must hold between settings."""

from pathlib import Path

import pytest

from finetune.recipe import dump_recipe
from finetune.recipe.lora_targets import FRIENDLY_TARGETS
from tests.unit.recipe_writing import SOUND, RecipeFile, changed

TARGETS = "[attention, experts]"


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RecipeFile:
    return RecipeFile(tmp_path, monkeypatch)


def training(*lines: str) -> str:
    return SOUND + "".join(f"  {line}\n" for line in lines)


CONFLICTS = {
    "nothing to train": (
        changed((TARGETS, "[]")),
        "recipe.yaml:7: lora.targets: nothing to train; got []; write what to adapt, such as [attention, experts]",
    ),
    "target named twice": (
        changed((TARGETS, "[attention, experts, attention]")),
        'recipe.yaml:7: lora.targets[2]: listed twice; got "attention"; keep one of the two',
    ),
    "a balance term that nothing can follow": (
        changed((TARGETS, "[lm_head]")),
        "recipe.yaml:11: router.router_aux_loss_coef: the balance term has no effect: the router is frozen and "
        "nothing before a router is trained; got 0.02; write 0, or add router, attention or experts to lora.targets",
    ),
    "a z-loss that nothing can follow": (
        changed(
            (TARGETS, "[lm_head]"),
            ("  router_aux_loss_coef: 0.02", "  router_z_loss_coef: 0.01\n  router_aux_loss_coef: 0"),
        ),
        "recipe.yaml:11: router.router_z_loss_coef: the z-loss has no effect: the router is frozen and "
        "nothing before a router is trained; got 0.01; write 0, or add router, attention or experts to lora.targets",
    ),
    "experts without the router section": (
        changed(("router:\n  router_aux_loss_coef: 0.02\n", "")),
        "recipe.yaml:1: router: section is missing, and lora.targets names experts; "
        "add router.router_aux_loss_coef: a number of at least 0 (0 trains without the balance term); "
        "for a dense model remove experts from lora.targets",
    ),
    "dropout on the router": (
        changed((TARGETS, "[attention, router]"), ("  r: 8", "  r: 8\n  lora_dropout: 0.05")),
        "recipe.yaml:9: lora.lora_dropout: the router's adapter has no dropout: it is added to the weight, not to the "
        "output; got 0.05; write 0, or take router out of lora.targets",
    ),
    "a rank for experts that are not adapted": (
        changed((TARGETS, "[attention]"), ("  r: 8", "  r: 8\n  expert_r: 4")),
        "recipe.yaml:9: lora.expert_r: no experts are adapted; got 4; add experts to lora.targets or remove this key",
    ),
    "a choice of experts that are not adapted": (
        changed((TARGETS, "[attention]"), ("  r: 8", "  r: 8\n  experts: auto\n  experts_share: 0.5")),
        "recipe.yaml:9: lora.experts: no experts are adapted; got auto; add experts to lora.targets "
        "or remove this key and lora.experts_share",
    ),
    "a choice of experts without its share": (
        changed(("  r: 8", "  r: 8\n  experts: auto")),
        "recipe.yaml:6: lora.experts_share: required with lora.experts: auto; "
        "add lora.experts_share: the share of each layer's score "
        "that the adapted experts must reach (0 to 1)",
    ),
    "a share of experts that are all adapted": (
        changed(("  r: 8", "  r: 8\n  experts_share: 0.5")),
        "recipe.yaml:9: lora.experts_share: has no effect: every expert is adapted; got 0.5; "
        "write lora.experts: auto, or remove this key",
    ),
    "a score for experts that are all adapted": (
        changed(("  r: 8", "  r: 8\n  experts: all\n  experts_score: token")),
        'recipe.yaml:10: lora.experts_score: has no effect: every expert is adapted; got "token"; '
        "write lora.experts: auto with lora.experts_share, or remove this key",
    ),
    "a share above the whole": (
        changed(("  r: 8", "  r: 8\n  experts: auto\n  experts_share: 1.5")),
        "recipe.yaml:10: lora.experts_share: out of range; got 1.5; write a number above 0 and of at most 1 or null",
    ),
    "no length": (
        changed(("  max_steps: 30\n", "")),
        "recipe.yaml:17: training: the length of the run is missing; "
        "write exactly one of max_steps and num_train_epochs",
    ),
    "two lengths": (
        training("num_train_epochs: 1"),
        "recipe.yaml:21: training.num_train_epochs: the length of the run is given twice; "
        "got max_steps: 30 and num_train_epochs: 1; "
        "keep one of the two; null removes the other",
    ),
    "a micro-batch that does not divide the step": (
        training("per_device_train_batch_size: 3"),
        "recipe.yaml:21: training.per_device_train_batch_size: does not divide global_batch_size 16; got 3; "
        "write a divisor, such as 2",
    ),
    "a micro-batch larger than the step": (
        training("per_device_train_batch_size: 32"),
        "recipe.yaml:21: training.per_device_train_batch_size: does not divide global_batch_size 16; got 32; "
        "write a divisor, such as 16",
    ),
    "warm-up that is ignored": (
        training("lr_scheduler_type: constant", "warmup_steps: 5"),
        "recipe.yaml:22: training.warmup_steps: the scheduler `constant` ignores it; got 5; "
        "write lr_scheduler_type: constant_with_warmup, or remove warmup_steps",
    ),
    "evaluation of nothing": (
        training("eval_steps: 5"),
        "recipe.yaml:21: training.eval_steps: there is no data to evaluate on; got 5; "
        "add data.eval with path (or id) and format, or remove eval_steps",
    ),
    "optimizer": (
        training("optim: adamw_troch"),
        'recipe.yaml:21: training.optim: transformers has no such optimizer; got "adamw_troch"; '
        "did you mean adamw_torch?",
    ),
    "an optimizer that cannot work": (
        training("optim: galore_adamw"),
        "recipe.yaml:21: training.optim: compresses the gradients of whole weight matrices, and here only the adapter, "
        'which is small, is trained; got "galore_adamw"; write adamw_torch or another optimizer',
    ),
    "an optimizer without gradients": (
        training("optim: lomo"),
        "recipe.yaml:21: training.optim: changes the weights in the backward pass: no gradient is left to add up over "
        'micro-batches or to clip; got "lomo"; write adamw_torch or another optimizer',
    ),
    "an optimizer that averages": (
        training("optim: schedule_free_adamw"),
        "recipe.yaml:21: training.optim: trains other weights than it averages: checkpoints and the adapter would hold "
        'those that are not averaged; got "schedule_free_adamw"; write adamw_torch or another optimizer',
    ),
    "a schedule by evaluations that there are not": (
        training("lr_scheduler_type: reduce_lr_on_plateau"),
        "recipe.yaml:21: training.lr_scheduler_type: lets evaluations change the rate, and there are none; "
        'got "reduce_lr_on_plateau"; add data.eval and training.eval_steps, or write another scheduler',
    ),
    "settings of a schedule that has none": (
        training("lr_scheduler_type: constant", "trainer_args: {lr_scheduler_kwargs: '{\"min_lr\": 0}'}"),
        "recipe.yaml:22: training.trainer_args.lr_scheduler_kwargs: the scheduler `constant` takes none; "
        'got "{\\"min_lr\\": 0}"; remove it, or write another training.lr_scheduler_type',
    ),
    "settings of a schedule that are no JSON": (
        training("trainer_args: {lr_scheduler_kwargs: min_lr=0}"),
        "recipe.yaml:21: training.trainer_args.lr_scheduler_kwargs: not the JSON text of a mapping; "
        """got "min_lr=0"; write JSON in single quotes, such as '{"min_lr_rate": 0.1}'""",
    ),
    "options of the optimizer": (
        training("trainer_args: {optim_args: momentum}"),
        'recipe.yaml:21: training.trainer_args.optim_args: not a list of name=value; got "momentum"; '
        "write name=value, several with commas between them",
    ),
    "early stopping without evaluations": (
        training("early_stopping_patience: 3"),
        "recipe.yaml:21: training.early_stopping_patience: no evaluation before the end would stop the run; got 3; "
        "add data.eval and training.eval_steps, or remove it",
    ),
    "a value that would be taken for the default": (
        training("trainer_args: {train_sampling_strategy: by_length}"),
        'recipe.yaml:21: training.trainer_args.train_sampling_strategy: no such value; got "by_length"; '
        "write one of random, sequential, group_by_length, batch_rebalance",
    ),
    "a number that the trainer does not check": (
        training("trainer_args: {eval_accumulation_steps: 0}"),
        "recipe.yaml:21: training.trainer_args.eval_accumulation_steps: out of range; got 0; "
        "write a number of at least 1",
    ),
    "a first evaluation of nothing": (
        training("trainer_args: {eval_on_start: true}"),
        "recipe.yaml:21: training.trainer_args.eval_on_start: there is no data to evaluate on; got true; "
        "add data.eval, or remove it",
    ),
    "chat template": (
        changed(("max_length: 256", "max_length: 256\n  chat_template: llama-3")),
        'recipe.yaml:17: data.chat_template: neither a shipped template nor a .jinja file; got "llama-3"; '
        "write one of chatml, mistral, mistral-v3, mistral-v3-tekken, mistral-v7, mistral-v7-tekken, mistral-v11, "
        "mistral-v13, mistral-v15, alpaca, or the path of a .jinja file",
    ),
    "empty list of dashboards": (
        changed(after="logging: {report_to: []}\n"),
        "recipe.yaml:21: logging.report_to: empty list; got []; write none, auto, or a list such as [wandb]",
    ),
    "dashboard named twice": (
        changed(after="logging: {report_to: [wandb, wandb]}\n"),
        'recipe.yaml:21: logging.report_to[1]: listed twice; got "wandb"; keep one of the two',
    ),
}


@pytest.mark.parametrize(("text", "complaint"), CONFLICTS.values(), ids=CONFLICTS)
def test_a_conflict_gives_exactly_this_line(recipe_file: RecipeFile, text: str, complaint: str) -> None:
    assert recipe_file.problems(text) == [complaint]


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("all-linear", "it would also train the router and leave out the stacked experts"),
        ("w1", "write experts"),
        ("w2", "write experts"),
        ("w3", "write experts"),
        ("gate_up_proj", "write experts"),
        ("block_sparse_moe.experts.3.w1", "write experts"),
        ("mlp.experts.down_proj", "write experts"),
        ("mlp.gate", "write router"),
        ("gate", "write router"),
        ("self_attn", "write attention"),
        ("q", "write q_proj"),
        ("Attention", "did you mean attention?"),
        (".*proj", "without patterns"),
    ],
)
def test_the_right_target_is_named_for_a_wrong_one(recipe_file: RecipeFile, name: str, advice: str) -> None:
    (line,) = recipe_file.problems(changed((TARGETS, f'[attention, "{name}"]')))
    assert line.startswith(f'recipe.yaml:7: lora.targets[1]: not a target; got "{name}"; ')
    assert advice in line


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (
            "resume_from_checkpoint: true",
            "unknown key: a run continues by itself since training.resume took its place; got true; remove it, or "
            "write training.resume: never to start anew, or the path of one of the run's checkpoints",
        ),
        (
            "trainer_args: {load_best_model_at_end: true}",
            "set by this program: the best checkpoint is kept beside the last one, and RUN@best names it for merge, "
            "export and evaluate; got true; remove it",
        ),
        ("save_total_limit: 2", "unknown key: another tool's name for a setting; got 2; write save.keep"),
        (
            "trainer_args: {ddp_timeout: 60}",
            "the recipe has its own key for this; got 60; remove it and write training.rank_timeout",
        ),
    ],
)
def test_how_runs_were_resumed_and_saved_before_is_known(recipe_file: RecipeFile, line: str, complaint: str) -> None:
    (found,) = recipe_file.problems(training(line))
    assert found.endswith(f": {complaint}")


@pytest.mark.parametrize("name", [*FRIENDLY_TARGETS, "q_proj", "embed_tokens", "self_attn.o_proj", "qkv_proj"])
def test_training_anything_before_a_router_can_follow_the_balance_term(recipe_file: RecipeFile, name: str) -> None:
    assert recipe_file.load(changed((TARGETS, f"[{name}]"))).lora.targets == [name]


def test_a_balance_coefficient_of_zero_needs_nothing_trained(recipe_file: RecipeFile) -> None:
    recipe_file.load(changed((TARGETS, "[lm_head]"), ("0.02", "0")))


def test_dropout_is_fine_on_attention_and_experts(recipe_file: RecipeFile) -> None:
    recipe = recipe_file.load(changed((TARGETS, "[attention, experts]"), ("  r: 8", "  r: 8\n  lora_dropout: 0.05")))
    assert recipe.lora.lora_dropout == 0.05


def test_a_share_of_one_and_the_settings_of_a_resolved_recipe_are_fine(recipe_file: RecipeFile) -> None:
    auto = "  r: 8\n  experts: auto\n  experts_share: 1\n  experts_score: token\n  experts_tokens: 4096"
    assert recipe_file.load(changed(("  r: 8", auto))).lora.experts_share == 1.0
    recipe_file.load(dump_recipe(recipe_file.load(SOUND)))


def test_a_dense_recipe_needs_no_router(recipe_file: RecipeFile) -> None:
    assert (
        recipe_file.load(changed((TARGETS, "[attention, mlp]"), ("router:\n  router_aux_loss_coef: 0.02\n", ""))).router
        is None
    )


def test_checks_do_not_repeat_reported_problems(recipe_file: RecipeFile) -> None:
    text = training("per_device_train_batch_size: x", "num_train_epochs: -1")
    assert [line.split(": ")[1] for line in recipe_file.problems(text)] == [
        "training.per_device_train_batch_size",
        "training.num_train_epochs",
    ]


@pytest.mark.parametrize(
    ("argument", "complaint"),
    [
        ("adam_beta_2: 0.9", "SFTConfig has no such field; got 0.9; did you mean adam_beta2?"),
        ("zzz: 1", "SFTConfig has no such field; got 1; write one of SFTConfig's fields"),
        ('adam_beta2: "0.9"', 'wrong type; got "0.9"; write a value of SFTConfig\'s type: float'),
        ("eval_accumulation_steps: true", "wrong type; got true; write a value of SFTConfig's type: int | None"),
        ("bf16: true", "the recipe has its own key for this; got true; remove it: model.dtype is given"),
        ("max_steps: 3", "the recipe has its own key for this; got 3; remove it: training.max_steps is given"),
        ("push_to_hub: true", "set by this program: a run uploads nothing; got true; remove it"),
        ("lora_alpha: 3", "the recipe has this key itself; got 3; remove it: lora.lora_alpha is given"),
        ("num_epochs: 3", "another tool's name for a setting; got 3; write training.num_train_epochs"),
        ("adam_beta2: [1]", "wrong type; got [1]; write text, numbers, true, false or null"),
        (
            "lr_scheduler_kwargs: {min_lr: 0}",
            """wrong type; got {"min_lr": 0}; write it as JSON text: '{"min_lr": 0}'""",
        ),
        (
            "optim_args: {momentum: 0.9, dampening: 0}",
            'wrong type; got {"momentum": 0.9, "dampening": 0}; write it as text: momentum=0.9, dampening=0',
        ),
    ],
)
def test_trainer_args_are_checked_against_the_trainers_fields(
    recipe_file: RecipeFile, argument: str, complaint: str
) -> None:
    name = argument.partition(":")[0]
    lines = recipe_file.problems(training(f"trainer_args: {{{argument}}}"))
    assert lines == [f"recipe.yaml:21: training.trainer_args.{name}: {complaint}"]


def test_trainer_args_passes_fields_that_the_recipe_has_no_key_for(recipe_file: RecipeFile) -> None:
    recipe = recipe_file.load(
        training("trainer_args: {adam_beta2: 0.99, eval_accumulation_steps: 2, dataloader_num_workers: 0}")
    )
    assert recipe.training.trainer_args == {
        "adam_beta2": 0.99,
        "eval_accumulation_steps": 2,
        "dataloader_num_workers": 0,
    }
