"""A report as one self-contained HTML page: no network, no script."""

from importlib.resources import files
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from finetune.check.report import Report
from finetune.check.samples import Piece, Sample, shown
from finetune.check.wording import duplicate_fields, length_title, more, of, percent, set_fields, split_fields
from finetune.files import write_text


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
