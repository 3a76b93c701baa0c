"""The generation config of an upcycled checkpoint."""

from pathlib import Path
from typing import Any

from finetune.files import write_json


def write_generation_config(folder: Path, settings: dict[str, Any], eos: int | list[int] | None = None) -> None:
    """Write the special tokens that `generate` needs; `eos` replaces the config's if chats end with another token."""
    fields = {name: settings[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if eos is not None:
        fields["eos_token_id"] = eos
    write_json(folder / "generation_config.json", {name: value for name, value in fields.items() if value is not None})
