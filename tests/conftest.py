"""Every test runs offline, on one thread a process, without any of the user's own settings."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

# Set before torch, transformers or wandb are imported; processes that a test starts inherit all of it.
_HOME = Path(tempfile.mkdtemp(prefix="moe-finetune-tests-"))
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
os.environ.update(
    HOME=str(_HOME),
    XDG_CACHE_HOME=str(_HOME / ".cache"),
    XDG_CONFIG_HOME=str(_HOME / ".config"),
    NETRC=str(_HOME / ".netrc"),
    HF_HOME=str(_HOME / "hf"),
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    WANDB_MODE="offline",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
)
for _name in ("WANDB_API_KEY", "WANDB_BASE_URL", "TRACKIO_DIR", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
    os.environ.pop(_name, None)

import pytest


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository root."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _nothing_has_run_here() -> None:
    """What an earlier test has trained in this process is not the run that a message is about."""
    from finetune.progress import PROGRESS, Progress

    vars(PROGRESS).update(vars(Progress()))


# Directories by how long one file takes: with two workers the last files should be short ones.
SLOWEST_FIRST = ("faults", "end_to_end", "equivalence", "properties", "unit", "repo", "gpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the slow files first; a worker that takes one of them last would leave the other one idle."""
    tests = Path(__file__).parent
    items.sort(key=lambda item: SLOWEST_FIRST.index(item.path.relative_to(tests).parts[0]))
