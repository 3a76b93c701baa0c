"""A report of `finetune check` as text for the terminal, and as one HTML page; both with the same words.

Text is 80 columns wide unless a file name is longer. The page is self-contained: no network, no script.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby, starmap
from pathlib import Path
from textwrap import fill
from typing import TextIO

from jinja2 import Environment, StrictUndefined

from finetune.check.check_report import Batches, Bin, Report, Schedule, Split
from finetune.check.duplicates import NEAR, Duplicates
from finetune.check.samples import Piece, Sample, printable, shown
from finetune.check.shown_template import ShownTemplate
from finetune.data.tokens.stats import RowStats, SetStats, counted
from finetune.files import write_text

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
    unit = "pieces" if source.split else "examples" if source.split_conversations else "pairs"
    pieces = f" as {source.pieces:,} {unit}" if source.pieces != kept else ""
    fields = [("rows", f"{source.rows:,} read, {of(kept, source.rows)} kept{pieces}")]
    if source.split_conversations:
        fields.append(("examples", _examples(source)))
    fields += [(name, of(count, source.rows)) for name, count in counts.items() if count]
    none = [name for name, count in counts.items() if not count]
    return [*fields, ("none", ", ".join(none))] if none else fields


def _examples(source: RowStats) -> str:
    """What conversations became whose answers cannot be learned in one text."""
    conversations = counted(source.split_conversations, "conversation")
    examples = counted(source.split_examples, "example")
    left_out = f", and {source.examples_left_out:,} too long ones were left out" if source.examples_left_out else ""
    return f"{conversations} became {examples}: the template rewrites earlier answers{left_out}"


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


WIDTH = 80
_BAR = 48
_SHOWN_PIECES = 500  # pieces of a sample; the page shows more

_GREEN, _MAGENTA, _BOLD, _RESET = "\x1b[32m", "\x1b[35m", "\x1b[1m", "\x1b[0m"


@dataclass(frozen=True)
class Style:
    """Output style of a terminal: colour or brackets, block characters or ASCII."""

    colour: bool
    blocks: bool

    @classmethod
    def of(cls, stream: TextIO, environment: Mapping[str, str]) -> "Style":
        """Colour on a terminal only, and not if NO_COLOR is set (https://no-color.org)."""
        plain = environment.get("NO_COLOR") or environment.get("TERM") == "dumb"
        return cls(stream.isatty() and not plain, (stream.encoding or "").lower().startswith("utf"))

    def __call__(self, code: str, text: str) -> str:
        return f"{code}{text}{_RESET}" if self.colour else text


def lines(report: Report, style: Style) -> Iterator[str]:
    """The report, top to bottom."""
    yield style(_BOLD, printable(report.title))
    yield from (_field(name, value) for name, value in report.settings)
    for split in report.splits:
        yield from ("", style(_BOLD, split.name))
        yield from _split(split, report.max_length, style)
    if duplicates := report.duplicates:
        yield from ("", style(_BOLD, "evaluation rows that also appear in the training set"))
        yield from (_field(name, value) for name, value in duplicate_fields(duplicates))
        yield from _listed("", [str(pair) for pair in duplicates.pairs], duplicates.exact + duplicates.near)
    yield from _samples(report, style)
    if report.remarks:
        yield from ("", style(_BOLD, "warnings"), *(f"    {printable(remark)}" for remark in report.remarks))
    if not report.problems:
        yield from ("", report.verdict)


def _split(split: Split, limit: int, style: Style) -> Iterator[str]:
    for data_set in split.stats.sets:
        yield f"  {printable(data_set.name)}"
        yield from (_field(name, value) for name, value in set_fields(data_set, split))
    if len(split.stats.sets) > 1:
        yield "  together"
    yield from (_field(name, value) for name, value in split_fields(split))
    yield from ("", f"  {length_title(split)}", *_bars(split.lengths, limit, style))
    yield from _listed("longest rows", split.longest_listed, 0)
    yield from _listed("duplicate rows", split.duplicates_listed, split.stats.duplicates)
    yield from _listed("bad rows, left out", split.bad_listed, split.stats.bad)


def _bars(bins: Sequence[Bin], limit: int, style: Style) -> Iterator[str]:
    most = max((bin_.rows for bin_ in bins), default=0)
    width = len(f"{max((bin_.last for bin_ in bins), default=0):,}")
    for before, bin_ in zip([None, *bins], bins, strict=False):
        if before is not None and before.last == limit:
            yield "    " + f" data.max_length = {limit:,} ".center(WIDTH - 8, "-")
        bar = _bar(bin_.rows / most, style)
        yield f"    {bin_.first:>{width},} - {bin_.last:>{width},} {bin_.rows:>9,} {bar}".rstrip()


def _bar(part: float, style: Style) -> str:
    eighths = max(round(part * _BAR * 8), int(part > 0))
    if not style.blocks:
        return "#" * -(-eighths // 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _samples(report: Report, style: Style) -> Iterator[str]:
    yield from _listed_samples(
        "samples", [(f"{name} {sample.where}", sample) for name, sample in report.samples], style
    )


def _listed_samples(title: str, samples: Sequence[tuple[str, Sample]], style: Style) -> Iterator[str]:
    if not samples:
        return
    marks = "green" if style.colour else "[[in double brackets]]"
    yield from ("", style(_BOLD, title) + f"  (supervised tokens are {marks})")
    for heading, sample in samples:
        yield f"--- {printable(heading)}: {of(sample.supervised, sample.tokens)} supervised ".ljust(WIDTH, "-")
        yield from _text(sample, style).removesuffix("\n").split("\n")
    yield "-" * WIDTH


def template_lines(template: ShownTemplate, title: str, style: Style) -> Iterator[str]:
    """A template, top to bottom: how it frames an answer, its examples, and what it refuses."""
    yield style(_BOLD, printable(title))
    yield from (_field(name, value) for name, value in template.fields())
    yield from _listed_samples("examples", [(sample.where, sample) for sample in template.samples], style)
    if template.refused:
        yield from ("", style(_BOLD, "refused"))
        yield from (_field(name, reason) for name, reason in template.refused)


def _text(sample: Sample, style: Style) -> str:
    """The text of a sample; supervised tokens are marked, special tokens and white space are visible."""
    out = []
    for supervised, run in groupby(_cut(sample.pieces), key=lambda piece: piece.supervised):
        pieces = list(run)
        coloured = groupby(zip(pieces, shown(pieces), strict=True), key=lambda shown_piece: _colour(shown_piece[0]))
        text = "".join(_coloured(code, "".join(starmap(_piece, same)), style) for code, same in coloured)
        out.append(f"[[{text}]]" if supervised and not style.colour else text)
    return "".join(out)


def _cut(pieces: list[Piece]) -> list[Piece]:
    if len(pieces) <= _SHOWN_PIECES:
        return pieces
    head, tail = pieces[: 2 * _SHOWN_PIECES // 3], pieces[-_SHOWN_PIECES // 3 :]
    left_out = sum(len(piece.ids) + piece.left_out for piece in pieces[len(head) : -len(tail)])
    return [*head, Piece("", (), False, left_out=left_out), *tail]


def _piece(piece: Piece, text: str) -> str:
    return f"\n... {piece.left_out:,} tokens {piece.gap} ...\n" if piece.left_out else text


def _colour(piece: Piece) -> str:
    colour = _GREEN if piece.supervised else _MAGENTA if piece.special else ""
    return colour + (_BOLD if piece.special else "")


def _coloured(code: str, text: str, style: Style) -> str:
    # Line by line: a pager resets the colour at the end of a line.
    return "\n".join(style(code, line) if line and code else line for line in text.split("\n"))


def _listed(title: str, rows: Sequence[str], count: int) -> Iterator[str]:
    """The listed rows under a title, and how many more there are."""
    if rows and title:
        yield f"  {title}"
    yield from (f"    {printable(row)}" for row in [*rows, *more(len(rows), count)])


def _field(name: str, value: str) -> str:
    return fill(
        printable(value),
        WIDTH,
        initial_indent=f"    {name:<10} ",
        subsequent_indent=" " * 15,
        break_long_words=False,
        break_on_hyphens=False,
    )


def write_page(report: Report, path: Path) -> None:
    """Write the page atomically."""
    write_text(path, page(report))


def page(report: Report) -> str:
    """The page as HTML. Everything from the recipe or the rows is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {
        "duplicate_fields": duplicate_fields,
        "length_title": length_title,
        "more": more,
        "of": of,
        "percent": percent,
        "set_fields": set_fields,
        "split_fields": split_fields,
        "runs": _runs,
    }
    template = environment.from_string((files(__package__) / "page.html.jinja").read_text(encoding="utf-8"))
    # JSON can contain a lone surrogate, which UTF-8 cannot encode.
    return template.render(report=report).encode("utf-8", "replace").decode("utf-8")


def _runs(sample: Sample) -> list[tuple[bool, list[tuple[Piece, str]]]]:
    """Runs of pieces with the same supervision, each piece with its text as it is shown."""
    runs = []
    for supervised, group in groupby(sample.pieces, key=lambda piece: piece.supervised):
        pieces = list(group)
        runs.append((supervised, list(zip(pieces, shown(pieces), strict=True))))
    return runs
