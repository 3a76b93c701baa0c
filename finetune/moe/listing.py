"""The table of architectures as text, for `finetune families`: supported ones, their limits, and unsupported ones."""

from finetune.moe.families import FAMILIES, REFUSED
from finetune.moe.layout import Family, MoeLayout

_HEADINGS = ("model_type", "experts on disk", "router", "lora.targets")


def families_table() -> str:
    """Supported architectures, one per line, notes on some of them, and unsupported ones with the reason."""
    mixtures = [family for family in FAMILIES.values() if family.moe is not None]
    dense = [family.model_type for family in FAMILIES.values() if family.moe is None]
    rows = [_HEADINGS, *(_row(family, family.moe) for family in mixtures if family.moe is not None)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(
        [
            *lines,
            "",
            "Of each, model.load_in_4bit stores all experts in 4 bits, and all other targets but the router.",
            f"Dense models on the same path: {', '.join(dense)} (lora.targets: attention, mlp).",
            "",
            "To know",
            *(f"  {family.model_type}: {note}" for family in mixtures for note in _notes(family)),
            "",
            "Refused before anything is loaded",
            *(f"  {name}: {reason}" for name, reason in REFUSED.items()),
        ]
    )


def _row(family: Family, moe: MoeLayout) -> tuple[str, ...]:
    on_disk = "one tensor an expert" if moe.per_expert else "one tensor a layer"
    on_disk += ", transposed" if moe.transposed else ""
    on_disk += ", biases" if moe.biases else ""
    router = moe.scores + (" + correction bias" if moe.correction_bias else "")
    return family.model_type, on_disk, router, ", ".join(family.targets)


def _notes(family: Family) -> list[str]:
    """The limits of one architecture, including those implied by its other fields."""
    notes = list(family.limits)
    if len(family.attn_implementations) == 1:
        notes.append(f"model.attn_implementation must be {family.attn_implementations[0]}")
    if family.unpackable:
        notes.append(f"data.packing must be false: {family.unpackable}")
    return notes
