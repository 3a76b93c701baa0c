"""Processes that may not use the network, and what they tried: `tests/network_guard` watches them."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GUARD = ROOT / "tests" / "network_guard"
SILENCED = (
    *("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "WANDB_MODE"),
    *("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK"),
)
"""Variables of the tests, or of the machine, with which nothing would be proven."""


def guarded(log: Path, **variables: str) -> dict[str, str]:
    """The environment of a process that is watched, and so are its children; `log` gets what they did."""
    kept = {name: value for name, value in os.environ.items() if name not in SILENCED}
    path = f"{GUARD}{os.pathsep}{ROOT}"
    return {**kept, "PYTHONPATH": path, "NETWORK_LOG": str(log), **variables}


def went_away(log: Path) -> list[str]:
    """What a watched process looked up, connected to or sent to beyond this machine."""
    lines = log.read_text(encoding="utf-8").splitlines()
    assert any(line.startswith("guard ") for line in lines), "no process was watched"
    return [line.removeprefix("away ") for line in lines if line.startswith("away ")]
