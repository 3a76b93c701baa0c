"""The files of accelerate_configs/clusters: what each starts on two machines of eight GPUs.

Slurm, SkyPilot, Kubernetes and Ray are not here. The shell parts run with programs of those names that write down how
they were called; what they call is read by this package's own parser. Field names are those that each documents.
"""

import importlib.util
import os
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from finetune.cli.main import build_parser
from finetune.parallelism import Parallelism, launch_arguments, read_parallelism

CLUSTERS = Path(__file__).resolve().parents[2] / "accelerate_configs" / "clusters"
ROOT = CLUSTERS.parents[1]
SLURM = {"SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_ID": "20007", "SLURM_JOB_NUM_NODES": "2"}
SKY = {
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NUM_GPUS_PER_NODE": "8",
    "SKYPILOT_NODE_RANK": "1",
    "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n",
}


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """`finetune` writes its arguments, one a line, and exits with $CODE; `srun` runs the last task of the step."""
    folder = tmp_path / "bin"
    folder.mkdir()
    texts = {
        "finetune": f"printf '%s\\n' \"$@\" >{tmp_path}/called; exit ${{CODE:-0}}",
        "srun": 'shift; export SLURM_NODEID=1; exec "$@"',
        "scontrol": f'if [ "$1" = show ]; then printf "node0\\nnode1\\n"; else echo "$@" >{tmp_path}/requeued; fi',
    }
    for name, text in texts.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return folder


def shell(programs: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{programs}:/usr/bin:/bin", **variables}
    return subprocess.run(["bash", *command], env=environment, cwd=ROOT, capture_output=True, text=True)


def checked(arguments: list[str], rank: int, host: str) -> Any:
    """Arguments of `finetune train` that start machine `rank` of two with eight GPUs, sharded within each machine."""
    args = build_parser().parse_args(arguments)
    assert (args.num_machines, args.num_processes, args.machine_rank, args.main_process_ip) == (2, 16, rank, host)
    assert 1024 < args.main_process_port < 65536
    flags = ["--config_file", str(args.config_file), "--num_processes", "16", "--main_process_ip", host]
    assert read_parallelism({"WORLD_SIZE": "16"}, [*flags, "-m", "finetune.train", "r"]) == Parallelism(16, 8)
    assert launch_arguments([*flags, "-m", "finetune.train", "r"]).num_machines == 2
    return args


@pytest.mark.parametrize("code", [0, 85, 1])
def test_the_slurm_job_queues_itself_again_when_the_run_asks_for_it(programs: Path, tmp_path: Path, code: int) -> None:
    script = str(CLUSTERS / "slurm.sbatch")
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    done = shell(programs, script, "recipe.yaml", "seed=1 2", CODE=str(code), **SLURM)
    assert done.returncode == (0 if code == 85 else code), done.stderr
    arguments = (tmp_path / "called").read_text().splitlines()
    assert arguments[:3] == ["train", "recipe.yaml", "seed=1 2"], "words stay whole"
    assert checked(arguments, 1, "node0").main_process_port == 20007
    requeued = tmp_path / "requeued"
    assert requeued.is_file() == (code == 85)
    assert not requeued.is_file() or requeued.read_text() == "requeue 20007\n"


def test_the_slurm_job_asks_for_a_signal_that_reaches_the_run() -> None:
    lines = (CLUSTERS / "slurm.sbatch").read_text().splitlines()
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if line.startswith("#SBATCH"))
    assert options["signal"] == "USR1@300", "with B: before it only this shell would have it"
    assert {"requeue", "open-mode", "nodes", "ntasks-per-node", "gpus-per-node", "time"} <= options.keys()
    assert options["ntasks-per-node"] == "1"


def test_the_slurm_job_says_how_it_is_called(programs: Path) -> None:
    done = shell(programs, str(CLUSTERS / "slurm.sbatch"), **SLURM)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: sbatch slurm.sbatch recipe.yaml")


def test_the_skypilot_task(programs: Path, tmp_path: Path) -> None:
    task = yaml.safe_load((CLUSTERS / "skypilot.yaml").read_text())
    assert task.keys() == {"name", "num_nodes", "resources", "workdir", "volumes", "envs", "setup", "run"}
    assert task["resources"].keys() == {"infra", "accelerators", "job_recovery"}
    assert task["resources"]["job_recovery"] == {"max_restarts_on_errors": 3, "recover_on_exit_codes": [85]}
    assert all(isinstance(value, str) for value in task["envs"].values())
    done = shell(programs, "-c", task["run"], **task["envs"], **SKY)
    assert done.returncode == 0, done.stderr
    arguments = (tmp_path / "called").read_text().splitlines()
    assert checked(arguments, 1, "10.0.0.1").recipe == Path("/shared/recipe.yaml")
    assert task["num_nodes"] == int(SKY["SKYPILOT_NUM_NODES"])


def test_the_kubeflow_job_says_what_hsdp_yaml_says() -> None:
    job = yaml.safe_load((CLUSTERS / "kubeflow-trainjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    spec, trainer = job["spec"], job["spec"]["trainer"]
    assert spec.keys() == {"runtimeRef", "trainer", "runtimePatches"}
    assert trainer.keys() == {"image", "numNodes", "numProcPerNode", "command", "args", "env", "resourcesPerNode"}
    environment = {variable["name"]: variable["value"] for variable in trainer["env"]}
    assert all(isinstance(value, str) for value in environment.values()), "Kubernetes takes no numbers"
    processes = trainer["numNodes"] * trainer["numProcPerNode"]
    config = yaml.safe_load((CLUSTERS.parent / "hsdp.yaml").read_text())
    assert processes == config["num_processes"]
    assert read_parallelism({**environment, "WORLD_SIZE": str(processes)}) == Parallelism(16, 8)
    assert trainer["command"] == ["torchrun"]
    module = trainer["args"].index("-m")
    assert trainer["args"][module : module + 2] == ["-m", "finetune.train"]
    gpus = trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    assert gpus == trainer["resourcesPerNode"]["requests"]["nvidia.com/gpu"] == str(trainer["numProcPerNode"])
    patched = spec["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]
    pod = patched["template"]["spec"]["template"]["spec"]
    assert patched["name"] == pod["containers"][0]["name"] == "node"
    assert "env" not in pod["containers"][0], "Kubeflow refuses it for this container"
    assert pod["terminationGracePeriodSeconds"] > int(trainer["args"][trainer["args"].index("--shutdown-timeout") + 1])


@pytest.fixture
def ray_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ray_train", CLUSTERS / "ray_train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_ray_script_starts_the_launcher_on_each_machine(
    ray_script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"recipe": "r.yaml", "overrides": ["seed=1"], "machines": 2, "gpus": 8, "config": ray_script.CONFIG}
    address = {"host": "10.0.0.1", "port": ray_script.free_port()}
    command = ray_script.launch_command(settings, 1, address)
    assert command[1:4] == ["-m", "finetune.cli.main", "train"]
    monkeypatch.chdir(ROOT)
    assert checked(command[3:], 1, "10.0.0.1").overrides == ["seed=1"]
    for name in (*ray_script.OF_RAY, ray_script.DEVICE):
        monkeypatch.setenv(name, "1")
    left = ray_script.environment()
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "ACCELERATE_TORCH_DEVICE"} & left.keys()
    assert left["PATH"] == os.environ["PATH"]


def test_ray_takes_what_the_script_gives_it() -> None:
    """Where Ray is installed, which this program does not need."""
    train = pytest.importorskip("ray.train")
    torch = pytest.importorskip("ray.train.torch")
    pytest.importorskip("ray.train.collective").broadcast_from_rank_zero  # noqa: B018
    scaling = train.ScalingConfig(
        num_workers=2, use_gpu=True, resources_per_worker={"GPU": 8, "CPU": 32}, placement_strategy="STRICT_SPREAD"
    )
    failure = train.FailureConfig(max_failures=3)
    torch.TorchTrainer(
        print,
        train_loop_config={},
        torch_config=torch.TorchConfig(backend="gloo"),
        scaling_config=scaling,
        run_config=train.RunConfig(storage_path="/tmp", failure_config=failure),
    )
