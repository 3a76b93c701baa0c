"""What came with a model and another wrote: read here, validated before a library sees it."""

from finetune.model_files.config import (
    CHOOSES_CODE,
    CONFIG_FILE,
    build_config,
    check_model_folder,
    check_values,
    load_config,
    read_config,
    vocabulary_size,
    without_code,
)
from finetune.model_files.settings import FETCH_AGAIN, first_line, read_object, read_settings, reading
from finetune.model_files.tokenizer import read_tokenizer

__all__ = [
    "CHOOSES_CODE",
    "CONFIG_FILE",
    "FETCH_AGAIN",
    "build_config",
    "check_model_folder",
    "check_values",
    "first_line",
    "load_config",
    "read_config",
    "read_object",
    "read_settings",
    "read_tokenizer",
    "reading",
    "vocabulary_size",
    "without_code",
]
