"""What a report says in words, the same in the terminal and on the page."""

from finetune.check.report import Batches, Course, Split
from finetune.check.twins import NEAR, Twins
from finetune.data.tokens.stats import RowStats, SetStats

Fields = list[tuple[str, str]]
_ROUNDING = 1e-9


def set_fields(each: SetStats, split: Split) -> Fields:
    """A set: its format, what became of its rows, and what they are made of."""
    source = each.source
    fields = [("format", source.format + (f" (recognised: {source.why})" if source.why else ""))]
    fields += _row_fields(source)
    if len(split.stats.sets) > 1:
        weight = "" if each.weight is None else f"weight {each.weight:g}: "
        rows = f"{each.rows:,} row{'' if each.rows == 1 else 's'} ({percent(each.rows, split.stats.used)})"
        tokens = f"{each.tokens:,} tokens ({percent(each.tokens, split.stats.tokens)})"
        fields.append(("mixture", f"{weight}{rows}, {tokens}"))
    return [*fields, ("tokens", _tokens(each.tokens, each.supervised_tokens))]


def _row_fields(source: RowStats) -> Fields:
    """One line for each thing that befell a row, and one for all that befell none."""
    befell = {
        "bad": source.bad,
        "dropped": source.dropped,
        "truncated": source.truncated,
        "split": source.split,
        "duplicate": source.duplicates,
    }
    kept = source.rows - source.bad - source.dropped
    pieces = f" as {source.pieces:,} {'pieces' if source.split else 'pairs'}" if source.pieces != kept else ""
    fields = [("rows", f"{source.rows:,} read, {of(kept, source.rows)} kept{pieces}")]
    fields += [(name, of(count, source.rows)) for name, count in befell.items() if count]
    none = [name for name, count in befell.items() if not count]
    return [*fields, ("none", ", ".join(none))] if none else fields


def split_fields(split: Split) -> Fields:
    """What is made of all sets of a split together."""
    stats = split.stats
    fields = [("tokens", _tokens(stats.tokens, stats.supervised_tokens))] if len(stats.sets) > 1 else []
    fields.append(("batches", _batches(split.batches)))
    return fields + (_course(split.course) if split.course else [])


def length_title(split: Split) -> str:
    """What a split's lengths are lengths of."""
    of_pairs = ", the longer conversation of each" if split.batches.unit == "pairs" else ""
    return f"{split.batches.unit} by length in tokens{of_pairs}, before anything is cut"


def _batches(batches: Batches) -> str:
    if batches.unfilled is not None:
        filled = f"{100 * batches.unfilled:.2f} % unfilled"
        return f"{batches.sequences:,} packed sequences of up to {batches.capacity:,} tokens, {filled}"
    at_a_time = "one" if batches.batch == 1 else f"{batches.batch}"
    padding = batches.padding or 0.0
    expected = f"{100 * padding:.1f} % padding to be expected" if padding > _ROUNDING else "no padding"
    unit = batches.unit if batches.sequences != 1 else batches.unit[:-1]
    return f"{batches.sequences:,} {unit}, {at_a_time} at a time: {expected}"


def _course(course: Course) -> Fields:
    passes = f"{course.epochs:.2f}".rstrip("0").rstrip(".")
    epochs = f"{passes} epoch" if passes == "1" else f"{passes} epochs"
    return [
        (
            "steps",
            f"{course.steps:,} of {course.a_step:,} sequences; an epoch has {course.steps_an_epoch:,}: {epochs}",
        ),
        ("a step", f"{course.tokens_a_step:,.0f} tokens, {course.supervised_a_step:,.0f} supervised, on average"),
    ]


def _tokens(tokens: int, supervised: int) -> str:
    return f"{tokens:,}, {of(supervised, tokens)} supervised"


def of(count: int, total: int) -> str:
    """A count with its share."""
    return f"{count:,} ({percent(count, total)})"


def percent(part: int, whole: int) -> str:
    """A share; of nothing it is 0."""
    return f"{100 * part / max(whole, 1):.1f} %"


def twin_fields(twins: Twins) -> Fields:
    """How many evaluation rows stand among the training rows."""
    return [
        ("same text", f"{of(twins.exact, twins.eval_rows)}, but for case and white space"),
        ("nearly", f"{of(twins.near, twins.eval_rows)}, with {NEAR:g} or more of their word triples in common"),
    ]


def more(named: int, count: int) -> list[str]:
    """The line under a list that names fewer than there are."""
    return [f"... and {count - named:,} more"] if count > named else []
