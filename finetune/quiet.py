"""Floor 0: lines of other packages that tell a user nothing. Call before torch is imported; imports nothing heavy."""

import logging
import warnings


def hush() -> None:
    """Keep two lines from every start of a command; any other warning is still shown."""
    # bitsandbytes misses a package whose one kernel, 4-bit inference on a CPU, is never called here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # transformers 5 renames these for version 6, and TRL still uses the old names.
    warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
