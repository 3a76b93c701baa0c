"""Two lines of other packages are hushed, and no others."""

import logging
import warnings

import pytest

from finetune.environment import hush


def test_known_noise_is_hushed_and_everything_else_is_shown(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        hush()
        warnings.warn("`gradient_checkpointing` is deprecated and will be removed in v6.", FutureWarning, stacklevel=1)
        warnings.warn("`is_gradient_checkpointing` is deprecated and will be", FutureWarning, stacklevel=1)
        warnings.warn("`something_else` is deprecated", FutureWarning, stacklevel=1)
        logger.warning("Failed to load CPU gemm_4bit_forward")
        logger.error("a kernel crashed")
    logger.setLevel(level)
    assert [str(warning.message) for warning in shown] == ["`something_else` is deprecated"]
    assert caplog.messages == ["a kernel crashed"]
