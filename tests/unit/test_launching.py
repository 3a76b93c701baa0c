"""What is refused or set before a run starts, whatever launched it."""

import json
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from finetune.environment import wait_passively
from finetune.errors import RecipeError, RunError, WeightsError
from finetune.launcher import _failed, check_launcher, launch_command
from finetune.methods.arguments import accumulation_steps, micro_batch_remarks, micro_batch_rows, sft_config
from finetune.methods.common import PreparedAudit
from finetune.moe.families import FAMILIES
from finetune.moe.nf4 import Nf4Stack
from finetune.moe.router import find_routers
from finetune.progress import SHARED, Progress, shared_file
from finetune.recipe import Recipe
from finetune.train import _reject_data_parallel
from tests.support import save_tiny_mixtral
from tests.unit.engine import trained_model
from tests.unit.test_model import recipe_for


def test_threads_wait_passively_unless_the_user_has_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    wait_passively()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    wait_passively()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


def test_one_process_that_sees_several_gpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with pytest.raises(RunError, match=r"several GPUs are visible; got 8 GPUs; use --config_file accelerate_configs/"):
        _reject_data_parallel(SimpleNamespace(num_processes=1, device=torch.device("cuda")))
    _reject_data_parallel(SimpleNamespace(num_processes=8, device=torch.device("cuda")))


@pytest.mark.parametrize(("dtype", "autocast"), [("float32", "no"), ("bfloat16", "bf16"), ("float16", "fp16")])
@pytest.mark.parametrize("launched", ["no", "bf16", "fp16", "fp8"])
def test_the_recipe_decides_the_precision_and_the_step_whatever_was_launched(
    tmp_path: Path, dtype: str, autocast: str, launched: str
) -> None:
    recipe = recipe_for(tmp_path)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": dtype})})
    environment = {
        "ACCELERATE_MIXED_PRECISION": launched,
        "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "ACCELERATE_GRADIENT_CLIPPING": "0.5",
    }
    _, lines = check_launcher(recipe, environment)
    assert environment == {"ACCELERATE_MIXED_PRECISION": autocast, "ACCELERATE_DYNAMO_BACKEND": "no"}
    said = f"accelerate: mixed_precision {launched} is not used: model.dtype {dtype} decides"
    assert lines == [
        *([] if launched in ("no", autocast) else [said]),
        "accelerate: dynamo_backend inductor is not used: the recipe, which has no compilation, decides",
        "accelerate: gradient_accumulation_steps 4 is not used: training.global_batch_size decides",
        "accelerate: gradient_clipping 0.5 is not used: training.max_grad_norm decides",
    ]
    assert check_launcher(recipe, environment)[1] == []


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        (
            ["python", "/venv/bin/accelerate", "launch", "--cpu", "-m", "finetune.train"],
            ["--cpu", "-m", "finetune.train"],
        ),
        (["python", "/venv/bin/accelerate-launch", "train.py"], ["train.py"]),
        (["python", "-m", "accelerate.commands.launch", "train.py"], ["train.py"]),
        (["python", "-m", "finetune.launcher", "--quiet", "train.py"], ["--quiet", "train.py"]),
        (["python", "/venv/bin/torchrun", "--nproc_per_node", "2", "train.py"], None),
        (["bash"], None),
    ],
)
def test_the_launcher_is_told_by_the_command_of_the_parent(words: list[str], arguments: list[str] | None) -> None:
    process = SimpleNamespace(parent=lambda: SimpleNamespace(cmdline=lambda: words))
    assert launch_command(process) == arguments


def test_the_global_batch_is_what_the_recipe_says_for_any_number_of_processes(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path)
    training = recipe.training.model_copy(update={"global_batch_size": 24, "per_device_train_batch_size": 3})
    recipe = recipe.model_copy(update={"training": training})
    assert [accumulation_steps(recipe, processes) for processes in (1, 2, 4, 8)] == [8, 4, 2, 1]


@pytest.mark.parametrize(
    ("rows", "size", "processes", "smaller"), [(8, 8, 2, 4), (2, 2, 2, 1), (12, 4, 2, 3), (14, 4, 2, 1), (8, 4, 2, 4)]
)
def test_a_step_is_cut_into_smaller_micro_batches_where_processes_need_it(
    tmp_path: Path, rows: int, size: int, processes: int, smaller: int
) -> None:
    recipe = with_sizes(tmp_path, rows, size)
    assert micro_batch_rows(recipe, processes) == smaller
    assert accumulation_steps(recipe, processes) * smaller * processes == rows
    step = f"a step of {rows} rows on {processes} processes; the result is the same"
    said = f"micro-batches of {smaller} in place of per_device_train_batch_size {size}: {step}"
    assert micro_batch_remarks(recipe, processes) == ([] if smaller == size else [said])


@pytest.mark.parametrize(("rows", "processes", "fewer"), [(8, 3, "2 processes"), (7, 2, "1 process"), (24, 5, "4 pro")])
def test_a_step_that_processes_cannot_share_says_how_many_can(
    tmp_path: Path, rows: int, processes: int, fewer: str
) -> None:
    message = (
        f"training.global_batch_size: not divisible by the number of processes, {processes}; got {rows}; start {fewer}"
    )
    with pytest.raises(RecipeError, match=message):
        accumulation_steps(with_sizes(tmp_path, rows, 1), processes)


def with_sizes(folder: Path, rows: int, size: int) -> Recipe:
    recipe = recipe_for(folder)
    sizes = {"global_batch_size": rows, "per_device_train_batch_size": size}
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=sizes)})


def test_a_trainer_that_counts_other_processes_is_refused(tmp_path: Path) -> None:
    """It would take steps of another size than the recipe's."""
    training = recipe_for(tmp_path).training.model_copy(update={"global_batch_size": 2})
    recipe = recipe_for(tmp_path).model_copy(update={"training": training})
    with pytest.raises(RunError, match=r"launcher: the trainer counts 1 processes where 2 were counted before it; l"):
        sft_config(recipe, tmp_path, {"report_to": []}, num_processes=2)


def test_a_model_without_the_routers_it_should_have_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"mlp.gate: the loaded model has no router of this name"):
        find_routers(torch.nn.Linear(1, 1), "mlp.gate")


def test_an_adapter_on_4bit_stacks_cannot_be_merged_in_memory(tmp_path: Path) -> None:
    model = trained_model(save_tiny_mixtral(tmp_path), targets=["experts"])
    with pytest.raises(WeightsError, match=r"a loaded expert stack cannot be merged in memory; use `finetune merge A"):
        model.merge_adapter()


def test_a_model_that_changed_after_the_audit_is_refused(tmp_path: Path) -> None:
    """Preparation by the launcher must leave the stacks in 4 bits, and the optimizer with the adapter's tensors."""
    recipe = recipe_for(tmp_path)
    model = trained_model(save_tiny_mixtral(tmp_path), targets=recipe.lora.targets, r=recipe.lora.r)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad])
    audit = PreparedAudit(FAMILIES["mixtral"], recipe)

    def begin(optimizer: torch.optim.Optimizer) -> None:
        audit.on_train_begin(None, None, None, model=model, optimizer=optimizer)

    begin(optimizer)
    with pytest.raises(RunError, match=r"^audit: .* the optimizer has other ones; got 1 in the optimizer, 0 of them"):
        begin(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]))
    name, stack = next((name, p) for name, p in model.named_parameters() if isinstance(p.data, Nf4Stack))
    module = model.get_submodule(name.rpartition(".")[0])
    module.register_parameter(name.rpartition(".")[2], torch.nn.Parameter(stack.data.dequantize(), requires_grad=False))
    with pytest.raises(RunError, match=r"^audit: experts: the recipe asks for nf4; got 1 tensors in float32"):
        begin(optimizer)


def test_a_process_that_has_replaced_its_launcher_knows_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_LAUNCHER", json.dumps([os.getpid(), ["--cpu", "train.py"]]))
    assert launch_command() == ["--cpu", "train.py"]
    monkeypatch.setenv("FINETUNE_LAUNCHER", json.dumps([os.getpid() + 1, ["--cpu", "train.py"]]))
    assert launch_command() is None, "the environment is handed on to what the process starts"


@pytest.mark.parametrize(
    ("code", "exit_code"), [(143, 0), (129, 0), (138, 85), (130, 130), (85, 85), (1, 1), (2, 2), (137, 137)]
)
def test_a_process_that_a_signal_ended_before_it_trained_has_the_exit_code_of_the_signal(
    code: int, exit_code: int
) -> None:
    assert _failed(1, SimpleNamespace(exitcode=code)) == exit_code


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (3, "ended (signal 9) at step 3; the same command continues"),
        (None, "ended (signal 9) while loading the base; the same command continues"),
    ],
)
def test_a_process_that_was_killed_is_named(
    step: int | None, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SHARED, "")
    monkeypatch.setenv("LOCAL_RANK", "1")
    opened = shared_file()
    progress = Progress("loading the base")
    progress.share()
    if step is not None:
        progress.begin_step(step)
    assert _failed(5, SimpleNamespace(exitcode=-9, local_rank=1), opened) == 137
    assert capsys.readouterr().err == f"\nrank 5 on {socket.gethostname()} {said}\n"


def test_a_process_that_was_killed_before_it_said_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert _failed(0, SimpleNamespace(exitcode=-11, local_rank=0)) == 139
    assert f"rank 0 on {socket.gethostname()} ended (signal 11); the same" in capsys.readouterr().err
