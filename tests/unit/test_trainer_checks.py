"""What TRL's arguments, the optimizer, the schedule and the loader refuse or ignore: one line each, before loading."""

from pathlib import Path
from typing import Any

import pytest

from finetune.errors import RecipeError
from finetune.methods.trainer_checks import check_schedule, check_trainer
from finetune.recipe import Recipe
from finetune.recipe.trainer_args import OPTIMIZERS, REFUSED_OPTIMIZERS
from tests.equivalence.dpo_runs import dpo_recipe
from tests.equivalence.sft_runs import recipe as sft_recipe

MISSING = {"adamw_anyprecision", "adamw_torch_4bit", "adamw_torch_8bit", "grokadamw", "stable_adamw"}


def recipe(**training: Any) -> Recipe:
    return sft_recipe(Path("base"), Path("rows"), Path("out"), **{"lr_scheduler_type": "cosine", **training})


def refused(settings: Recipe, num_processes: int | None = None) -> list[str]:
    with pytest.raises(RecipeError) as raised:
        check_trainer(settings, num_processes)
    return str(raised.value).splitlines()


def check_both(settings: Recipe, steps: int) -> None:
    check_trainer(settings)
    check_schedule(settings, steps)


ARGUMENTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "several at once": (
        {"trainer_args": {"adam_beta1": 1.5, "adam_epsilon": -1, "dataloader_prefetch_factor": 2}},
        [
            "dataloader_prefetch_factor: refused: --dataloader_prefetch_factor can only be set when data is loaded in "
            "a different process, i.e. when --dataloader_num_workers > 0; got 2; write another value, or remove it",
            "adam_epsilon: refused: Invalid epsilon value: -1; got -1; write another value, or remove it",
            "adam_beta1: refused: Invalid beta parameter at index 0: 1.5; got 1.5; write another value, or remove it",
        ],
    ),
    "bitsandbytes": (
        {"optim": "paged_adamw_8bit", "trainer_args": {"adam_beta2": 2}},
        ["adam_beta2: refused: Invalid beta parameter at index 1: 2; got 2; write another value, or remove it"],
    ),
    "workers that stay": (
        {"trainer_args": {"dataloader_persistent_workers": True}},
        [
            "dataloader_persistent_workers: refused: persistent_workers option needs num_workers > 0; got True; "
            "write another value, or remove it"
        ],
    ),
    "a metric": (
        {"trainer_args": {"metric_for_best_model": "accuracy"}},
        [
            "metric_for_best_model: no evaluation reports this metric; got accuracy; "
            "write one of eval_loss, eval_mean_token_accuracy, eval_entropy"
        ],
    ),
    "an option of another optimizer": (
        {"trainer_args": {"optim_args": "momentum=0.9"}},
        ["optim_args: the optimizer adamw_torch has no option momentum; got momentum=0.9; remove it"],
    ),
    "options": (
        {"optim": "sgd", "trainer_args": {"adam_beta1": 0.8, "optim_args": "momentum=0.9, weight_decay=1,momentun=0"}},
        [
            "adam_beta1: the optimizer sgd does not use it; got 0.8; remove it",
            "optim_args: the recipe has its own key for this; got weight_decay=1; "
            "remove it and write training.weight_decay",
            "optim_args: the optimizer sgd has no option momentun; got momentun=0; remove it",
        ],
    ),
    "options that need another": (
        {"optim": "sgd", "trainer_args": {"optim_args": "nesterov=true"}},
        [
            "optim_args: refused: Nesterov momentum requires a momentum and zero dampening; got nesterov=true; "
            "write another value, or remove it"
        ],
    ),
    "an option that a step cannot use": (
        {"optim": "rmsprop_bnb", "trainer_args": {"optim_args": "alpha=0.9"}},
        [
            "optim_args: refused: '<=' not supported between instances of 'float' and 'str'; got alpha=0.9; "
            "write another value, or remove it"
        ],
    ),
    "modules that no optimizer reads": (
        {"trainer_args": {"optim_target_modules": "all-linear"}},
        [
            "optim_target_modules: only the optimizers galore and apollo use it, which cannot train an adapter; "
            "got all-linear; remove it"
        ],
    ),
    "settings of another schedule": (
        {"trainer_args": {"lr_scheduler_kwargs": '{"min_lr": 0}'}},
        [
            "lr_scheduler_kwargs: refused: get_cosine_schedule_with_warmup() got an unexpected keyword argument "
            "'min_lr'; got {\"min_lr\": 0}; write another value, or remove it"
        ],
    ),
    "a compiler": (
        {"trainer_args": {"torch_compile_backend": "fast"}},
        [
            "torch_compile_backend: refused: 'FAST' is not a valid DynamoBackend; got fast; "
            "write another value, or remove it"
        ],
    ),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_what_the_trainer_would_refuse_or_ignore_is_one_line(case: str) -> None:
    training, lines = ARGUMENTS[case]
    assert refused(recipe(**training)) == [f"training.trainer_args.{line}" for line in lines]


def test_a_schedule_that_lacks_its_settings_is_refused_with_what_to_write() -> None:
    for name, settings, said in (
        ("cosine_with_min_lr", '{"min_lr_rate": 0.1}', "One of min_lr or min_lr_rate should be set through the `lr_"),
        (
            "warmup_stable_decay",
            '{"num_decay_steps": 100}',
            "get_wsd_schedule() missing 1 required positional argument",
        ),
    ):
        (line,) = refused(recipe(lr_scheduler_type=name))
        assert line.startswith(f"training.lr_scheduler_type: refused: {said}")
        assert line.endswith(f"; got {name}; write training.trainer_args.lr_scheduler_kwargs, such as '{settings}'"), (
            "advice that works"
        )
        sound = recipe(lr_scheduler_type=name, trainer_args={"lr_scheduler_kwargs": settings})
        check_trainer(sound)
        assert check_schedule(sound, 300) == []


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - REFUSED_OPTIMIZERS.keys()))
def test_every_optimizer_is_built_or_its_package_named(name: str) -> None:
    """Also with options that it reads: they are not taken for unknown ones."""
    if name in MISSING:
        (line,) = refused(recipe(optim=name))
        assert line.startswith("training.optim: needs the package ")
        assert f", which is not installed; got {name}; " in line
        assert line.endswith(", or write adamw_torch")
        return
    read = {"sgd": "momentum=0.9, nesterov=true", "rmsprop": "centered=false", "adagrad": "lr_decay=0.1"}
    read |= {"ademamix": "alpha=5.0", "paged_ademamix_8bit": "t_alpha=100"}
    arguments = {"optim_args": read[name]} if name in read else {}
    betas = {"adam_beta1": 0.8} if "adam" in name or "lion" in name else {}
    check_trainer(recipe(optim=name, trainer_args={**arguments, **betas}))


def test_settings_of_a_machine_are_checked_where_the_run_starts() -> None:
    settings = recipe(trainer_args={"tf32": True, "ddp_backend": "gloo"})
    check_trainer(settings)
    lines = refused(settings, num_processes=1)
    assert lines[0] == (
        "training.trainer_args.ddp_backend: one process has no other to connect to; got gloo; remove it"
    )
    assert [line.partition(": ")[0] for line in lines[1:]] in ([], ["training.trainer_args.tf32"])


def test_the_metrics_are_those_of_the_method() -> None:
    settings = dpo_recipe(Path("base"), Path("pairs"), Path("out"))
    training = settings.training.model_copy(update={"trainer_args": {"metric_for_best_model": "rewards/margin"}})
    (line,) = refused(settings.model_copy(update={"training": training}))
    assert "got rewards/margin; write one of eval_loss, eval_rewards/chosen, eval_rewards/rejected" in line


def test_warm_up_evaluations_and_checkpoints_beyond_the_run_are_said_with_numbers() -> None:
    settings = recipe(warmup_steps=10, eval_steps=7, save_steps=1000, with_eval=True)
    assert check_schedule(settings, 6) == [
        "training.warmup_steps: 10 of a run of 6 steps: the rate reaches 0.025, not 0.05",
        "training.eval_steps: 7 of a run of 6 steps: the only evaluation is at the end",
        "training.save_steps: 1,000 of a run of 6 steps: there is no checkpoint before the end",
    ]
    assert check_schedule(settings, 1000) == []
    with pytest.raises(RecipeError) as raised:
        check_schedule(settings, 1)
    assert str(raised.value) == (
        "training.warmup_steps: the rate is 0 in the only step: nothing would be trained; got 10; "
        "write 0, or give the run more steps"
    )


@pytest.mark.parametrize(
    ("name", "settings", "problem"),
    [
        (
            "cosine_with_min_lr",
            '{"min_lr": 0.1}',
            "the schedule rises above training.learning_rate 0.05; got up to 0.099",
        ),
        ("polynomial", '{"lr_end": -0.1}', "the schedule falls below 0; got down to -0.095; write other values"),
        ("polynomial", '{"lr_end": 0.2}', "refused: lr_end (0.2) must be smaller than initial lr (0.05); got "),
        ("greedy", '{"min_lr": 0.1}', "the schedule rises above training.learning_rate 0.05; got up to 0.1; "),
        ("reduce_lr_on_plateau", '{"factor": 2}', "refused: Factor should be < 1.0; got "),
    ],
)
def test_a_schedule_stays_between_0_and_the_rate(name: str, settings: str, problem: str) -> None:
    wrong = recipe(lr_scheduler_type=name, trainer_args={"lr_scheduler_kwargs": settings}, eval_steps=5, with_eval=True)
    with pytest.raises(RecipeError) as raised:
        check_both(wrong, 30)
    assert str(raised.value).startswith(f"training.trainer_args.lr_scheduler_kwargs: {problem}")
