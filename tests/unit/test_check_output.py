"""A report in the terminal and as a page: what is marked, what is escaped, how wide it is."""

import io
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.check.check_report import Report, batches_of, split_of
from finetune.check.duplicates import Duplicates, Pair
from finetune.check.output import Style, lines, page, write_page
from finetune.check.samples import Piece, Sample
from finetune.data.tokens.stats import DataStats, RowStats, SetStats
from finetune.errors import Problem
from finetune.recipe import Recipe, load_recipe

ROOT = Path(__file__).resolve().parents[2]
EVIL = '<script>alert("1")</script>&amp;'
PLAIN, MARKS, COLOUR = Style(False, False), Style(False, True), Style(True, True)


def recipe(*overrides: str) -> Recipe:
    return load_recipe(ROOT / "recipes" / "quickstart" / "sft-qlora.yaml", overrides)


def rows(name: str, lengths: list[int], **counts: Any) -> RowStats:
    tokens = sum(lengths)
    return RowStats(
        **{
            "rows": len(lengths),
            "pieces": len(lengths),
            "tokens": tokens,
            "supervised_tokens": tokens // 4,
            "lengths": Counter(lengths),
            "longest_rows": [(max(lengths), f"{name}:1")],
            "format": "messages",
            **counts,
        }
    )


def split(name: str, settings: Recipe, weight: float | None = None, **counts: Any) -> Any:
    lengths = [20] * 30 + [100] * 10
    source = rows("a.jsonl", lengths, **counts)
    sets = [SetStats("a.jsonl", weight, 40, source.tokens, source.supervised_tokens, source)]
    if weight is not None:
        other = rows("b.jsonl", [10] * 10)
        sets.append(SetStats("b.jsonl", 1.0, 10, 100, 25, other))
        lengths += [10] * 10
    sequences = 8 if settings.data.packing else len(lengths)
    batches = batches_of(np.array(lengths, dtype=np.int32), sequences, settings)
    return split_of(name, DataStats(sets, sequences), batches, settings)


def report(settings: Recipe, **parts: Any) -> Report:
    return Report("recipe.yaml", [("model", "m")], settings.data.max_length, **parts)


def printed(results: Report, style: Style = MARKS) -> str:
    return "\n".join(lines(results, style))


def sample(*parts: tuple[str, bool], special: str = "<|im_end|>") -> Sample:
    pieces = [Piece(text, (7,), supervised, text == special) for text, supervised in parts]
    return Sample("a.jsonl:3", pieces, 20, 5)


def test_counts_of_rows_are_printed_with_shares() -> None:
    output = printed(report(recipe(), splits=[split("train", recipe(), bad=1, dropped=2, duplicates=4, rows=43)]))
    for line in (
        "rows       43 read, 40 (93.0 %) kept",
        "bad        1 (2.3 %)",
        "dropped    2 (4.7 %)",
        "duplicate  4 (9.3 %)",
        "none       truncated, split",
        "tokens     1,600, 400 (25.0 %) supervised",
    ):
        assert f"    {line}\n" in output
    assert "    train: 1 bad row left out, 2 rows too long and dropped, 4 duplicate rows\n" in output


def test_packing_padding_and_steps_are_those_of_the_trainer() -> None:
    packed = recipe("training.max_steps=6")
    assert "8 packed sequences of up to 256 tokens, 21.88 % unfilled" in printed(
        report(packed, splits=[split("train", packed)])
    )
    padded = recipe("data.packing=false", "training.max_steps=null", "training.num_train_epochs=2.5")
    output = printed(report(padded, splits=[split("train", padded), split("eval", padded)]))
    assert output.count("40 rows, 2 at a time: 27.8 % padding expected") == 2
    assert "steps      50 of 2 sequences; an epoch has 20: 2.5 epochs" in output
    once = recipe("data.packing=false", "training.max_steps=null", "training.num_train_epochs=1")
    assert "an epoch has 20: 1 epoch\n" in printed(report(once, splits=[split("train", once)]))
    assert "per step   80 tokens, 20 supervised, on average" in output
    assert output.count("per step ") == 1  # nothing is stepped over evaluation rows
    single = recipe("data.packing=false", "training.per_device_train_batch_size=1")
    assert "40 rows, one at a time: no padding" in printed(report(single, splits=[split("train", single)]))


def test_a_mixture_shows_each_part_in_rows_and_tokens() -> None:
    output = printed(report(recipe(), splits=[split("train", recipe(), weight=3.0)]))
    assert "mixture    weight 3: 40 rows (80.0 %), 1,600 tokens (94.1 %)" in output
    assert "mixture    weight 1: 10 rows (20.0 %), 100 tokens (5.9 %)" in output
    assert "tokens     1,700, 425 (25.0 %) supervised" in output


def test_the_histogram_marks_the_limit_and_fits_the_terminal() -> None:
    settings = recipe("data.max_length=64")
    results = report(settings, splits=[split("train", settings)])
    bars = [line for line in printed(results).split("\n") if re.match(r" +\d+ - ", line) or "max_length = 64" in line]
    assert [re.sub(r"[█-▏]+|-{3,}", "#", bar).split() for bar in bars] == [
        ["17", "-", "32", "30", "#"],
        ["33", "-", "64", "0"],
        ["#", "data.max_length", "=", "64", "#"],
        ["65", "-", "128", "10", "#"],
    ]
    assert max(len(line) for line in printed(results).split("\n")) <= 80
    assert printed(results, PLAIN).isascii()


def test_samples_are_marked_without_colour() -> None:
    results = report(
        recipe(), samples=[("train", sample(("Hi ", False), ("there\n", True), ("<|im_end|>", True), ("\n", False)))]
    )
    assert "Hi·[[there⏎\n<|im_end|>]]⏎\n" in printed(results)


def test_samples_are_coloured_line_by_line_on_a_terminal() -> None:
    results = report(recipe(), samples=[("train", sample(("Hi", False), ("a\nb", True), ("<|im_end|>", True)))])
    assert "Hi\x1b[32ma⏎\x1b[0m\n\x1b[32mb\x1b[0m\x1b[32m\x1b[1m<|im_end|>\x1b[0m" in printed(results, COLOUR)


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environment", "colour"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False), ({"NO_COLOR": ""}, True)],
)
def test_colour_is_used_on_terminals_without_no_color(environment: dict[str, str], colour: bool) -> None:
    assert Style.of(Terminal(io.BytesIO(), encoding="utf-8"), environment) == Style(colour, True)
    assert Style.of(io.TextIOWrapper(io.BytesIO(), encoding="ascii"), environment) == Style(False, False)


def test_a_long_sample_is_cut_in_the_terminal() -> None:
    results = report(recipe(), samples=[("train", sample(*[("a", False)] * 3000, ("end", True)))])
    assert "... 2,501 tokens left out ..." in printed(results)
    assert "[[end]]" in printed(results)
    assert page(results).count(">a</span>") == 3000


def test_a_report_ends_with_its_warnings() -> None:
    clean = report(recipe(), splits=[split("train", recipe())])
    assert printed(clean).endswith("\nNo problems found: every row can be trained on.")
    duplicates = Duplicates(40, 2, 1, 5, [Pair("a.jsonl:1", "e.jsonl:2", 0.934, exact=False)])
    results = report(recipe(), duplicates=duplicates)
    assert "    a.jsonl:1 ~ e.jsonl:2 (0.93)\n    ... and 2 more\n" in printed(results)
    assert "3 of 40 evaluation rows also appear in the training set (exact or near duplicates)" in printed(results)
    assert "No errors found" in printed(results)
    assert "No problems found" not in printed(results)
    assert " found: " not in printed(report(recipe(), problems=[Problem("a.jsonl:1", "is bad", "fix it")]))


class Parsed(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: Counter[str] = Counter()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes.update(name for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


def everything() -> Report:
    bad = [f"a.jsonl:9: {EVIL}: is bad; fix it"]
    settings = recipe("data.max_length=64")
    results = report(
        settings,
        splits=[split("train", settings, bad=1, bad_rows=bad, why=EVIL, duplicates=1, duplicate_rows=[(EVIL, "b")])],
    )
    results.title = EVIL
    results.samples = [
        ("train", sample((EVIL, True), (" שלום 👩‍🚒 \u202e\x1b\ud800", False), ("<|im_end|>", True), ("", False)))
    ]
    results.samples[0][1].pieces[3] = Piece("", (), False, left_out=1234)
    results.duplicates = Duplicates(1, 1, 0, 1, [Pair(EVIL, "e.jsonl:1", 1.0, exact=True)])
    return results


def test_the_page_needs_nothing_else_and_escapes_everything(tmp_path: Path) -> None:
    write_page(everything(), tmp_path / "check.html")
    text = (tmp_path / "check.html").read_text(encoding="utf-8")
    parsed = Parsed(text)
    assert {"script", "link", "img", "iframe"}.isdisjoint(parsed.tags)
    assert {"src", "href", "onclick"}.isdisjoint(parsed.attributes)
    assert not re.search(r"https?:|url\(|@import", text)
    assert parsed.text.count(EVIL) >= 6
    assert (parsed.tags["h1"], parsed.tags["mark"]) == (1, 3)  # one in the legend
    assert "·שלום 👩‍🚒 <U+202E>␛<U+D800>" in parsed.text
    assert 'class="special" title="id 7"' in text
    assert "1,234 tokens left out" in parsed.text
    assert [path.name for path in tmp_path.iterdir()] == ["check.html"]


def test_names_of_files_and_columns_do_not_reach_the_terminal_as_commands() -> None:
    name, settings = "a\n\x1b[31m\x9b\u202eb.jsonl", recipe()
    kept = split(
        "train", settings, bad=1, bad_rows=[f"{name}:1: bad"], why=name, duplicates=1, duplicate_rows=[(name, "b")]
    )
    kept.stats.sets[0] = replace(kept.stats.sets[0], name=name)
    results = report(settings, splits=[kept], samples=[("train", Sample(name, [], 1, 1))], reasoning_remarks=[name])
    results.title, results.duplicates = name, Duplicates(1, 1, 0, 1, [Pair(name, "e.jsonl:1", 1.0, exact=True)])
    output = printed(results)
    assert not {"\x1b", "\x9b", "\u202e"} & set(output)
    assert output.count("a⏎␛[31m<U+009B><U+202E>b.jsonl") == 8


def test_the_page_lists_all_problems() -> None:
    problems = [Problem(f"a.jsonl:{n}", f"is <bad> {n}", "fix it") for n in range(1000)]
    parsed = Parsed(page(report(recipe(), problems=problems)))
    assert "A run would not start: 1,000 problems." in parsed.text
    assert "a.jsonl:999: is <bad> 999; fix it" in parsed.text


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
def test_the_page_is_never_wider_than_its_window(tmp_path: Path) -> None:
    results = everything()
    results.samples.append(("train", sample(("x" * 5000, True))))
    # The page has no script of its own: copies get one that measures, in frames as wide as a desktop and a phone.
    measure = (
        "<script>d = document.documentElement; parent.document.title += ` ${d.scrollWidth}/${innerWidth}`</script>"
    )
    copy = escape(page(results).replace("</body>", measure + "</body>"))
    frames = [
        f'<iframe srcdoc="{copy}" style="width: {width}px; border: 0" height=9999></iframe>' for width in (1200, 390)
    ]
    (tmp_path / "frames.html").write_text("<!doctype html><meta charset=utf-8>" + "".join(frames), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [str(BROWSER), *options, (tmp_path / "frames.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = re.search("<title>(.*)</title>", done.stdout)
    assert title is not None
    assert sorted(title[1].split()) == ["1200/1200", "390/390"]
