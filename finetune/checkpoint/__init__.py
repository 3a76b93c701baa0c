"""Floor 2: safetensors checkpoints on disk, read and written tensor by tensor, without a model and without mmap."""

from finetune.checkpoint.fingerprint import fingerprint
from finetune.checkpoint.folder import new_folder, require_free_disk
from finetune.checkpoint.reader import CheckpointReader, TensorInfo, read_json
from finetune.checkpoint.writer import CheckpointWriter, TensorSpec

__all__ = [
    "CheckpointReader",
    "CheckpointWriter",
    "TensorInfo",
    "TensorSpec",
    "fingerprint",
    "new_folder",
    "read_json",
    "require_free_disk",
]
