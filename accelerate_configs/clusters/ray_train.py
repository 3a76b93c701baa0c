"""Ray Train: a run on several machines, one Ray worker a machine, which starts this package's own launcher there.

    python accelerate_configs/clusters/ray_train.py /shared/recipe.yaml --machines 2 --gpus 8

Recipe, rows, base and output_dir lie on a file system that all machines share, and the package is installed on each.
A worker that is lost ends the others; Ray starts all of them again, and the run continues from its newest checkpoint.
"""

import argparse
import os
import socket
import subprocess
import sys
from typing import Any

CONFIG = "accelerate_configs/hsdp.yaml"

# Ray's own process group has other ranks: one a machine.
OF_RAY = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
DEVICE = "ACCELERATE_TORCH_DEVICE"  # Ray's choice for one process a worker


def launch_command(settings: dict[str, Any], rank: int, address: dict[str, Any]) -> list[str]:
    """What one machine starts; `address`: host and port of machine 0."""
    flags = {
        "config_file": settings["config"],
        "num_machines": settings["machines"],
        "num_processes": settings["machines"] * settings["gpus"],
        "machine_rank": rank,
        "main_process_ip": address["host"],
        "main_process_port": address["port"],
    }
    words = [f"--{name}={value}" for name, value in flags.items()]
    return [sys.executable, "-m", "finetune.cli.main", "train", settings["recipe"], *settings["overrides"], *words]


def environment() -> dict[str, str]:
    """This worker's environment without what Ray says about its own process group."""
    return {name: value for name, value in os.environ.items() if name not in (*OF_RAY, DEVICE)}


def train_on_machine(settings: dict[str, Any]) -> None:
    """Runs in each Ray worker."""
    import ray
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    rank = ray.train.get_context().get_world_rank()
    mine = {"host": ray.util.get_node_ip_address(), "port": free_port()} if rank == 0 else None
    command = launch_command(settings, rank, broadcast_from_rank_zero(mine))
    subprocess.run(command, env=environment(), cwd=settings["folder"], check=True)


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def main() -> None:
    """Start one worker a machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--machines", type=int, default=2)
    parser.add_argument("--gpus", type=int, default=8, help="of each machine")
    parser.add_argument("--cpus", type=int, default=32, help="of each machine")
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--storage", default="/shared/ray", help="folder of Ray's own notes, on all machines")
    args = parser.parse_intermixed_args()

    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    trainer = TorchTrainer(
        train_on_machine,
        train_loop_config={**vars(args), "folder": os.getcwd()},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(
            num_workers=args.machines,
            use_gpu=True,
            resources_per_worker={"GPU": args.gpus, "CPU": args.cpus},
            placement_strategy="STRICT_SPREAD",
        ),
        run_config=RunConfig(storage_path=args.storage, failure_config=FailureConfig(max_failures=3)),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
