"""The texts of a report, the same in the terminal and on the page."""

from finetune.check.report import Batches, Schedule, Split
from finetune.check.twins import NEAR, Duplicates
from finetune.data.tokens.stats import RowStats, SetStats

Fields = list[tuple[str, str]]
_ROUNDING = 1e-9


def set_fields(data_set: SetStats, split: Split) -> Fields:
    """A data set: its format, how many rows were kept, and its tokens."""
    source = data_set.source
    fields = [("format", source.format + (f" (recognised: {source.why})" if source.why else ""))]
    fields += _row_fields(source)
    if len(split.stats.sets) > 1:
        weight = "" if data_set.weight is None else f"weight {data_set.weight:g}: "
        rows = f"{data_set.rows:,} row{'' if data_set.rows == 1 else 's'} ({percent(data_set.rows, split.stats.used)})"
        tokens = f"{data_set.tokens:,} tokens ({percent(data_set.tokens, split.stats.tokens)})"
        fields.append(("mixture", f"{weight}{rows}, {tokens}"))
    return [*fields, ("tokens", _tokens(data_set.tokens, data_set.supervised_tokens))]


def _row_fields(source: RowStats) -> Fields:
    """Rows read and kept, a line for each count above 0, and one that names the counts that are 0."""
    counts = {
        "bad": source.bad,
        "dropped": source.dropped,
        "truncated": source.truncated,
        "split": source.split,
        "duplicate": source.duplicates,
    }
    kept = source.rows - source.bad - source.dropped
    pieces = f" as {source.pieces:,} {'pieces' if source.split else 'pairs'}" if source.pieces != kept else ""
    fields = [("rows", f"{source.rows:,} read, {of(kept, source.rows)} kept{pieces}")]
    fields += [(name, of(count, source.rows)) for name, count in counts.items() if count]
    none = [name for name, count in counts.items() if not count]
    return [*fields, ("none", ", ".join(none))] if none else fields


def split_fields(split: Split) -> Fields:
    """Tokens, batches and steps of all data sets of a split together."""
    stats = split.stats
    fields = [("tokens", _tokens(stats.tokens, stats.supervised_tokens))] if len(stats.sets) > 1 else []
    fields.append(("batches", _batches(split.batches)))
    return fields + (_schedule(split.schedule) if split.schedule else [])


def length_title(split: Split) -> str:
    """The title of a split's histogram."""
    of_pairs = ", the longer conversation of each" if split.batches.unit == "pairs" else ""
    return f"{split.batches.unit} by length in tokens{of_pairs}, before truncation"


def _batches(batches: Batches) -> str:
    if batches.unfilled is not None:
        filled = f"{100 * batches.unfilled:.2f} % unfilled"
        return f"{batches.sequences:,} packed sequences of up to {batches.capacity:,} tokens, {filled}"
    per_batch = "one" if batches.batch == 1 else f"{batches.batch}"
    padding = batches.padding or 0.0
    expected = f"{100 * padding:.1f} % padding expected" if padding > _ROUNDING else "no padding"
    unit = batches.unit if batches.sequences != 1 else batches.unit[:-1]
    return f"{batches.sequences:,} {unit}, {per_batch} at a time: {expected}"


def _schedule(schedule: Schedule) -> Fields:
    passes = f"{schedule.epochs:.2f}".rstrip("0").rstrip(".")
    epochs = f"{passes} epoch" if passes == "1" else f"{passes} epochs"
    return [
        (
            "steps",
            f"{schedule.steps:,} of {schedule.sequences_per_step:,} sequences; "
            f"an epoch has {schedule.steps_per_epoch:,}: {epochs}",
        ),
        (
            "per step",
            f"{schedule.tokens_per_step:,.0f} tokens, {schedule.supervised_per_step:,.0f} supervised, on average",
        ),
    ]


def _tokens(tokens: int, supervised: int) -> str:
    return f"{tokens:,}, {of(supervised, tokens)} supervised"


def of(count: int, total: int) -> str:
    """A count with its share."""
    return f"{count:,} ({percent(count, total)})"


def percent(part: int, whole: int) -> str:
    """`part` of `whole` in percent; 0 if `whole` is 0."""
    return f"{100 * part / max(whole, 1):.1f} %"


def duplicate_fields(duplicates: Duplicates) -> Fields:
    """How many evaluation rows also appear in the training set."""
    exact, near = (of(count, duplicates.eval_rows) for count in (duplicates.exact, duplicates.near))
    return [
        ("exact", f"{exact}, up to case and white space"),
        ("near", f"{near}, with {NEAR:g} or more of their word triples in common"),
    ]


def more(listed: int, count: int) -> list[str]:
    """The line under a list that is not complete."""
    return [f"... and {count - listed:,} more"] if count > listed else []
