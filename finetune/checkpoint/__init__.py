"""Safetensors checkpoints on disk, read and written tensor by tensor, without a model and without mmap."""

from finetune.checkpoint.hub import resolve_checkpoint
from finetune.checkpoint.integrity import SUMS_FILE, fingerprint, listed_bytes, listed_files, verify_sums, write_sums
from finetune.checkpoint.model_config import announced_dtype, differing_settings, forward_settings
from finetune.checkpoint.output_folder import (
    check_output_free,
    new_folder,
    sync_files,
    temporary_folder,
)
from finetune.checkpoint.reader import CheckpointReader, TensorInfo, read_json
from finetune.checkpoint.writer import CheckpointWriter, TensorSpec

__all__ = [
    "SUMS_FILE",
    "CheckpointReader",
    "CheckpointWriter",
    "TensorInfo",
    "TensorSpec",
    "announced_dtype",
    "check_output_free",
    "differing_settings",
    "fingerprint",
    "forward_settings",
    "listed_bytes",
    "listed_files",
    "new_folder",
    "read_json",
    "resolve_checkpoint",
    "sync_files",
    "temporary_folder",
    "verify_sums",
    "write_sums",
]
