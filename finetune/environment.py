"""Settings of the process: waiting threads, telemetry, hidden log lines. Call before torch is imported; imports nothing heavy."""

import logging
import os
import warnings


def wait_passively() -> None:
    """Let idle OpenMP threads sleep instead of spin, unless the user has decided otherwise.

    A training step on the CPU joins its threads some ten thousand times. With spinning, the default of the OpenMP
    runtime that torch ships, one other busy process on the machine made a step 9 times slower (`benchmarks/LOG.md`).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def no_telemetry() -> None:
    """Keep Hugging Face's packages from reporting to their server, unless the user has decided otherwise.

    Without it TRL reports architecture, GPU and number of processes of each run, and every request to the hub, also one
    that the recipe asks for, first fetches a list of programs (`/api/agent-harnesses`) to name the one that it runs in.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def hush() -> None:
    """Keep two lines from every start of a command; any other warning is still shown."""
    # bitsandbytes misses a package whose one kernel, 4-bit inference on a CPU, is never called here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # transformers 5 renames these for version 6, and TRL still uses the old names.
    warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
