"""Provenance of a run: its inputs and software, enough to repeat it and to explain a different result."""

import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

PACKAGES = (
    "moe-finetune",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "numpy",
    "peft",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "triton",
    "trl",
)


def collect_provenance(base: Mapping[str, Any], seed: int, command_line: list[str]) -> dict[str, Any]:
    """`base` holds name_or_path and fingerprint of the base checkpoint. Sizes are bytes; the time is UTC, ISO 8601."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command_line": list(command_line),
        "seed": seed,
        "base": dict(base),
        "git": _toolkit_commit(Path(__file__).resolve()),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "hardware": _hardware(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _toolkit_commit(source: Path) -> dict[str, Any] | None:
    """Commit of the checkout that `source` is tracked in, and whether it has changes; None outside of a checkout.

    Tracked, not merely inside: a virtual environment may lie in somebody else's repository.
    """

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(source.parent), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", source.name) is None or (commit := git("rev-parse", "HEAD")) is None:
        return None
    return {"commit": commit, "dirty": bool(git("status", "--porcelain"))}


def _hardware() -> dict[str, Any]:
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "machine": platform.machine(),
        "system": platform.platform(terse=True),
        "cpu_count": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [torch.cuda.get_device_name(index) for index in gpus],
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }
