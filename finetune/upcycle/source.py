"""Open the dense model to upcycle."""

from pathlib import Path

from finetune.errors import Problem, WeightsError
from finetune.upcycle.dense import DenseSource, check_tensors

GGUF_MAGIC = b"GGUF"


def open_source(path: Path, dtype: str | None) -> DenseSource:
    """A Hugging Face folder or a GGUF file, checked to be a dense Llama or Mistral model. Raises WeightsError."""
    source: DenseSource
    if path.is_file():
        _check_gguf_file(path)
        from finetune.upcycle.gguf_file import GgufSource

        source = GgufSource(path, dtype)
    else:
        _check_folder(path)
        from finetune.upcycle.huggingface import HuggingFaceSource

        source = HuggingFaceSource(path, dtype)
    check_tensors(source)
    return source


def _check_gguf_file(path: Path) -> None:
    with path.open("rb") as stream:
        magic = stream.read(4)
    if magic != GGUF_MAGIC:
        do = "give a .gguf file, or the folder that holds config.json and safetensors"
        raise WeightsError(Problem(str(path), "is neither a folder nor a GGUF file", do))


def _check_folder(path: Path) -> None:
    do = "give a local folder with config.json and safetensors, or a .gguf file (nothing is downloaded)"
    if not path.exists():
        raise WeightsError(Problem(str(path), "does not exist", do))
    if not (path / "config.json").is_file():
        files = sorted(file.name for file in path.glob("*.gguf"))
        hint = "; ".join(f"give {path / name} instead" for name in files[:3]) or do
        raise WeightsError(Problem(str(path), "holds no config.json", hint))
