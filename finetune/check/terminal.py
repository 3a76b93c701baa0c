"""A report as lines of text, 80 columns wide unless a file name is longer."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, starmap
from textwrap import fill
from typing import TextIO

from finetune.check.figures import Bin
from finetune.check.report import Report, Split
from finetune.check.samples import Piece, Sample, shown
from finetune.check.wording import duplicate_fields, length_title, more, of, set_fields, split_fields

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
    yield style(_BOLD, report.title)
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
        yield from ("", style(_BOLD, "warnings"), *(f"    {remark}" for remark in report.remarks))
    if not report.problems:
        yield from ("", report.verdict)


def _split(split: Split, limit: int, style: Style) -> Iterator[str]:
    for data_set in split.stats.sets:
        yield f"  {data_set.name}"
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
    if not report.samples:
        return
    marks = "green" if style.colour else "[[in double brackets]]"
    yield from ("", style(_BOLD, "samples") + f"  (supervised tokens are {marks})")
    for split_name, sample in report.samples:
        yield f"--- {split_name} {sample.where}: {of(sample.supervised, sample.tokens)} supervised ".ljust(WIDTH, "-")
        yield from _text(sample, style).removesuffix("\n").split("\n")
    yield "-" * WIDTH


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
    yield from (f"    {row}" for row in [*rows, *more(len(rows), count)])


def _field(name: str, value: str) -> str:
    return fill(
        value,
        WIDTH,
        initial_indent=f"    {name:<10} ",
        subsequent_indent=" " * 15,
        break_long_words=False,
        break_on_hyphens=False,
    )
