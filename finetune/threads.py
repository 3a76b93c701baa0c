"""Floor 0: how the CPU's threads wait for each other. Call before torch is imported; imports nothing heavy itself."""

import os


def wait_passively() -> None:
    """Let idle OpenMP threads sleep instead of spin, unless the user has decided otherwise.

    A training step on the CPU joins its threads some ten thousand times. With spinning, the default of the OpenMP
    runtime that torch ships, one other busy process on the machine made a step 9 times slower (`benchmarks/LOG.md`).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
