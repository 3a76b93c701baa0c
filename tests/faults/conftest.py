"""One warm process for all faults of a worker, and the folders in which its commands run."""

from collections.abc import Iterator

import pytest

from tests.faults.harness import SEED, Commands


def pytest_report_header() -> str:
    return f"faults: FAULTS_SEED={SEED}"


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    commands = Commands(tmp_path_factory.mktemp("commands"))
    yield commands
    commands.close()
