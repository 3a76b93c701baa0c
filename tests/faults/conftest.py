"""One warm process for all faults of a worker, and the runs that they happen to."""

from collections.abc import Iterator

import pytest

from tests.faults.harness import SEED, Commands
from tests.faults.runs import DPO, Undisturbed, make_run, undisturbed


def pytest_report_header() -> str:
    return f"faults: FAULTS_SEED={SEED}"


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    commands = Commands(tmp_path_factory.mktemp("commands"))
    yield commands
    commands.close()


@pytest.fixture(scope="session")
def sft(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """An undisturbed SFT run."""
    return undisturbed(make_run(commands, tmp_path_factory.mktemp("sft")), tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="session")
def dpo(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """An undisturbed DPO run with a precomputed reference."""
    run = make_run(commands, tmp_path_factory.mktemp("dpo"), **DPO)
    return undisturbed(run, tmp_path_factory.mktemp("undisturbed"))
