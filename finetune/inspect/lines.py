"""The output of `finetune inspect`: labels with values, wrapped; and checked reading of the files that it shows.

A file that lacks a field gives an error line, not a traceback.
"""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.checkpoint import SUMS_FILE, verify_sums
from finetune.errors import Problem, WeightsError, printable

Line = tuple[str, str]
WIDTH = 110


def as_text(lines: Sequence[Line]) -> str:
    """Two columns."""
    left = max(len(printable(name)) for name, _ in lines)
    rows = []
    for name, text in lines:
        for number, row in enumerate(textwrap.wrap(printable(text), WIDTH - left - 2, break_on_hyphens=False) or [""]):
            rows.append(f"{printable(name) if number == 0 else '':<{left}}  {row}")
    return "\n".join(rows)


def size(nbytes: int) -> str:
    """Bytes in the unit that suits them."""
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**28 else f"{nbytes / 2**20:.1f} MiB"


def checksum_line(folder: Path) -> Line:
    """The check against the folder's list; WeightsError where a file differs from it."""
    return "checksums", "all files match" if verify_sums(folder) else f"no {SUMS_FILE} to check against"


def named(base: Mapping[str, Any]) -> str:
    """A base as a record names it."""
    print_of = base.get("fingerprint")
    known = f"fingerprint {str(print_of)[:12]}" if print_of else "no fingerprint recorded"
    found = f"{base.get('name_or_path') or 'name not recorded'}, {known}"
    source = base.get("made_from")
    if source is None:
        return found
    before = ", ".join(f"{adapter['sha256'][:12]} x {adapter['weight']:g}" for adapter in source["adapters"])
    return f"{found}: merged from {source['base_fingerprint'][:12]} with {before}"


def figures(metrics: Mapping[str, Any]) -> str:
    """Logged figures as one text."""
    shown = (f"{name} {value:.4g}" for name, value in metrics.items() if isinstance(value, int | float))
    return ", ".join(shown)


def recipe_lines(recipe: Mapping[str, Any]) -> list[Line]:
    """What a resolved recipe says of method, adapter and rows."""
    lora, method, training, data = recipe["lora"], recipe["method"], recipe["training"], recipe["data"]
    expert_r = "" if lora.get("expert_r") is None else f", experts {lora['expert_r']}"
    sources = data["train"] if isinstance(data["train"], list) else [data["train"]]
    steps = {name: training[name] for name in ("max_steps", "num_train_epochs") if training.get(name) is not None}
    parts = [f"{name} {value:g}" for name, value in (*steps.items(), ("learning_rate", training["learning_rate"]))]
    router = recipe.get("router") or {}
    return [
        ("method", ", ".join([method["kind"].upper(), *parts, f"seed {recipe['seed']}"])),
        ("LoRA", f"{', '.join(lora['targets'])}; r {lora['r']}{expert_r}, lora_alpha {lora['lora_alpha']:g}"),
        *([("router", f"router_aux_loss_coef {router['router_aux_loss_coef']:g}")] if router else []),
        ("rows", ", ".join(str(source.get("path") or source.get("id")) for source in sources)),
    ]


_DO = "copy the file again, or remove it"


@contextmanager
def reading(file: Path, writer: str) -> Iterator[None]:
    """Raise WeightsError where what is read of `file` in here lacks something, or is of another type."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"does not have the fields that {writer} writes"
        got = f"no field {error}" if isinstance(error, KeyError) else str(error)
        raise WeightsError(Problem(str(file), what, _DO, got)) from error
