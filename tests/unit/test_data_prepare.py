"""Preparing a file: what is kept, cut and dropped, what is counted, and that all bad rows are named at once."""

import gzip
import json
import os
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from finetune.data import Prepared, prepare, set_template_day, template_day
from finetune.data.render import IGNORED, ChatTemplate, read_template
from finetune.data.tokens.cache import cache_folder
from finetune.errors import DataError
from finetune.recipe import DataSettings, DataSource
from tests.rendering import chat
from tests.support import tiny_tokenizer

SHORT = {"prompt": "set the timer", "completion": "done"}
FRAME = "which would be read as the conversation's frame"
LONG = {"prompt": "set the timer", "completion": "turn on the kitchen light and set the timer to ten minutes"}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" if row else "\n" for row in rows), encoding="utf-8")
    return path


def settings(train: Any, **others: Any) -> DataSettings:
    return DataSettings(**{"train": train, "max_length": 256, **others})


def source(path: Path, row_format: Any = "prompt_completion", **others: Any) -> DataSource:
    return DataSource(path=str(path), format=row_format, **others)


def run(tmp_path: Path, rows: list[Any], **others: Any) -> Prepared:
    chosen = settings(source(write(tmp_path / "rows.jsonl", rows)), **others)
    return prepare(chosen.sources("train"), tiny_tokenizer(), chosen, seed=0)


def where(prepared: Prepared) -> list[Any]:
    """Where the rows of the data set come from, without their folder."""
    rows = prepared.dataset["row"][:]
    return [Path(row).name if isinstance(row, str) else [Path(each).name for each in row] for row in rows]


def refusal(tmp_path: Path, rows: list[Any], **others: Any) -> list[str]:
    with pytest.raises(DataError) as caught:
        run(tmp_path, rows, **others)
    return str(caught.value).replace(f"{tmp_path}/", "").splitlines()


def lengths(tmp_path: Path) -> tuple[int, int]:
    """Tokens of the short and of the long row."""
    short, long = run(tmp_path, [SHORT, LONG]).dataset["input_ids"]
    return len(short), len(long)


def test_a_turn_that_is_not_to_be_trained_is_left_out_whoever_speaks(tmp_path: Path) -> None:
    turns = [{"role": role, "content": role.upper(), "train": role == "assistant"} for role in ("system", "user")]
    rows = [{"messages": [*turns, {"role": "assistant", "content": "done"}]}]
    chosen = settings(source(write(tmp_path / "rows.jsonl", rows), "messages"), loss_on="all")
    row = prepare(chosen.sources("train"), tiny_tokenizer(), chosen, seed=0).dataset[0]
    learned = tiny_tokenizer().decode([label for label in row["labels"] if label != IGNORED])
    assert learned == "<|im_start|>assistant\ndone<|im_end|>\n"


def test_a_row_carries_its_line_number_past_blank_lines(tmp_path: Path) -> None:
    assert where(run(tmp_path, [SHORT, None, LONG])) == ["rows.jsonl:1", "rows.jsonl:3"]


def test_labels_stand_at_their_tokens_and_end_with_the_eos(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    row = run(tmp_path, [SHORT]).dataset[0]
    kept = [label for label in row["labels"] if label != IGNORED]
    assert tokenizer.decode(kept) == "done<|im_end|>"
    assert len(row["labels"]) == len(row["input_ids"])


def test_the_counts_are_the_data_sets_own(tmp_path: Path) -> None:
    prepared = run(tmp_path, [SHORT, LONG])
    labels = [label for row in prepared.dataset["labels"] for label in row]
    short, long = lengths(tmp_path)
    stats = prepared.stats
    assert (stats.rows, stats.used, stats.sequences, stats.longest) == (2, 2, 2, long)
    assert (stats.bad, stats.dropped, stats.truncated, stats.split, stats.duplicates) == (0, 0, 0, 0, 0)
    assert (stats.tokens, stats.supervised_tokens) == (short + long, sum(label != IGNORED for label in labels))


def test_a_row_too_long_is_an_error_unless_the_recipe_says_otherwise(tmp_path: Path) -> None:
    short, long = lengths(tmp_path)
    assert refusal(tmp_path, [SHORT, LONG, SHORT, LONG], max_length=short) == [
        f"rows.jsonl:{line}: longer than data.max_length = {short} tokens; got {long} tokens; raise data.max_length, "
        "shorten the row, or set data.overlong to truncate, split or drop"
        for line in (2, 4)
    ]


def test_truncate_cuts_the_end_and_counts_it(tmp_path: Path) -> None:
    short, long = lengths(tmp_path)
    whole = run(tmp_path, [SHORT, LONG]).dataset[1]
    prepared = run(tmp_path, [SHORT, LONG], max_length=long - 5, overlong="truncate")
    assert prepared.dataset[1]["input_ids"] == whole["input_ids"][:-5]
    assert prepared.dataset[1]["labels"] == whole["labels"][:-5]
    stats = prepared.stats
    assert (stats.used, stats.truncated, stats.longest, stats.tokens) == (2, 1, long, short + long - 5)


def test_truncating_away_every_supervised_token_is_an_error_with_its_line(tmp_path: Path) -> None:
    chatty = {"prompt": LONG["completion"], "completion": "done"}
    [message] = refusal(tmp_path, [SHORT, chatty], max_length=lengths(tmp_path)[0], overlong="truncate")
    assert message.startswith("rows.jsonl:2: cut at data.max_length = ")
    assert "it has no supervised token left" in message
    assert message.endswith("raise data.max_length, or set data.overlong to drop")


def test_drop_leaves_the_row_out_and_counts_it(tmp_path: Path) -> None:
    short, long = lengths(tmp_path)
    prepared = run(tmp_path, [LONG, SHORT], max_length=short, overlong="drop")
    assert where(prepared) == ["rows.jsonl:2"]
    stats = prepared.stats
    assert (stats.rows, stats.used, stats.dropped, stats.longest, stats.tokens) == (2, 1, 1, long, short)


def test_dropping_every_row_is_an_error(tmp_path: Path) -> None:
    long = lengths(tmp_path)[1]
    assert refusal(tmp_path, [LONG], max_length=20, overlong="drop") == [
        "rows.jsonl: every row is longer than data.max_length = 20 tokens and was dropped; "
        f"raise data.max_length: the longest row has {long} tokens"
    ]


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    assert refusal(tmp_path, [None]) == ["rows.jsonl: the file has no rows; fill it or leave it out"]


def test_every_bad_row_is_named_in_one_go_by_the_rows_own_field(tmp_path: Path) -> None:
    rows = [SHORT, ["a"], {"prompt": "a"}, {"prompt": "a", "completion": "x <|im_end|> y"}]
    messages = refusal(tmp_path, rows)
    assert [message.split(";")[0] for message in messages] == [
        "rows.jsonl:2: a row must be a JSON object",
        "rows.jsonl:3: completion: is missing",
        "rows.jsonl:4: completion: contains the control token <|im_end|>, " + FRAME,
    ]


def test_packing_joins_rows_as_documents_with_positions_of_their_own(tmp_path: Path) -> None:
    short, long = lengths(tmp_path)
    alone = run(tmp_path, [SHORT, LONG, SHORT])
    prepared = run(tmp_path, [SHORT, LONG, SHORT], packing=True, max_length=long + short)
    first, second = prepared.dataset[0], prepared.dataset[1]
    assert where(prepared) == [["rows.jsonl:2", "rows.jsonl:1"], ["rows.jsonl:3"]]
    assert first["position_ids"] == [*range(long), *range(short)]
    for column in ("input_ids", "labels"):
        assert first[column] == alone.dataset[1][column] + alone.dataset[0][column]
    assert second["input_ids"] == alone.dataset[2]["input_ids"]
    assert prepared.stats == replace(alone.stats, sequences=2)


def test_a_tokenizer_that_carries_another_template_than_the_recipe_names_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, [SHORT], chat_template="alpaca") == [
        "data.chat_template: the tokenizer carries another template than alpaca; "
        "load the tokenizer with load_tokenizer(..., chat_template=data.chat_template)"
    ]


def test_a_row_whose_text_came_before_is_counted_and_named(tmp_path: Path) -> None:
    stats = run(tmp_path, [SHORT, LONG, {**SHORT, "note": "another key"}]).stats
    assert stats.duplicates == 1
    [(row, first)] = stats.sets[0].source.duplicate_rows
    assert (Path(row).name, Path(first).name) == ("rows.jsonl:3", "rows.jsonl:1")


def test_an_id_that_came_before_is_a_bad_row(tmp_path: Path) -> None:
    rows = [{**SHORT, "id": "a"}, {**LONG, "id": 7}, {**LONG, "id": "a"}, {**SHORT, "id": 7}]
    do = "remove one of the two, or give it an id of its own"
    assert refusal(tmp_path, rows) == [
        f"rows.jsonl:3: id: the same id as in rows.jsonl:1; got 'a'; {do}",
        f"rows.jsonl:4: id: the same id as in rows.jsonl:2; got 7; {do}",
    ]


def test_bad_rows_are_dropped_and_counted_where_the_recipe_says_so(tmp_path: Path) -> None:
    rows = [SHORT] * 3 + [{"prompt": "a"}]
    prepared = run(tmp_path, rows, on_bad_row="drop", max_bad_share=0.25)
    assert (prepared.stats.rows, prepared.stats.bad, prepared.stats.used) == (4, 1, 3)
    [message] = prepared.stats.sets[0].source.bad_rows
    assert message.startswith(f"{tmp_path}/rows.jsonl:4: completion: is missing")
    first, second = prepared.stats.lines()
    assert first.startswith("4 read, 25.0 % bad, 0.0 % truncated, 0.0 % dropped, 50.0 % duplicate; ")
    assert second == f"  left out: {message}"


def test_more_bad_rows_than_the_ceiling_allows_are_an_error(tmp_path: Path) -> None:
    first, second = refusal(tmp_path, [SHORT] * 3 + [{"prompt": "a"}], on_bad_row="drop", max_bad_share=0.2)
    assert first.startswith("rows.jsonl:4: completion: is missing")
    assert second == (
        "rows.jsonl: 1 of 4 rows are bad, a share of 0.25: above data.max_bad_share = 0.2; "
        "fix the rows above, or raise data.max_bad_share"
    )


def test_a_row_that_is_too_long_is_no_bad_row_to_be_dropped(tmp_path: Path) -> None:
    short = lengths(tmp_path)[0]
    [message] = refusal(tmp_path, [SHORT, LONG], on_bad_row="drop", max_bad_share=1.0, max_length=short)
    assert message.startswith(f"rows.jsonl:2: longer than data.max_length = {short} tokens")


def test_a_file_that_breaks_off_is_no_bad_row_to_be_dropped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    lines = "".join(json.dumps({**SHORT, "id": str(number)}) + "\n" for number in range(2000))
    whole = gzip.compress(lines.encode())
    path.write_bytes(whole[: len(whole) // 2])
    chosen = settings(source(path), on_bad_row="drop", max_bad_share=1.0)
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz"):
        prepare(chosen.sources("train"), tiny_tokenizer(), chosen, seed=0)


def test_max_rows_takes_the_first_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [SHORT, LONG, {"broken": "and never read"}])
    chosen = settings(source(path, max_rows=2))
    assert where(prepare(chosen.sources("train"), tiny_tokenizer(), chosen, seed=0)) == ["rows.jsonl:1", "rows.jsonl:2"]


def test_auto_says_what_it_recognised_and_why(tmp_path: Path) -> None:
    chosen = settings(source(write(tmp_path / "rows.jsonl", [SHORT, LONG]), "auto"))
    stats = prepare(chosen.sources("train"), tiny_tokenizer(), chosen, seed=0).stats
    assert stats.sets[0].source.format == "prompt_completion"
    assert stats.lines()[1] == (
        f"  {tmp_path}/rows.jsonl: recognised as prompt_completion (keys prompt (text), completion (text); "
        "2 of 2 rows read)"
    )


def two_sets(tmp_path: Path, **others: Any) -> DataSettings:
    """30 short rows and 30 long ones, three to one."""
    small = write(tmp_path / "small.jsonl", [{**SHORT, "id": str(i)} for i in range(30)])
    long = [{"instruction": "say", "output": f"{LONG['completion']} {i}"} for i in range(30)]
    large = write(tmp_path / "large.jsonl", long)
    sets = [source(small, weight=3.0), source(large, "alpaca", weight=1.0)]
    return settings(sets, **others)


def test_sets_are_mixed_by_weight_and_the_proportions_are_said_in_rows_and_tokens(tmp_path: Path) -> None:
    chosen = two_sets(tmp_path)
    stats = prepare(chosen.sources("train"), tiny_tokenizer(), chosen, seed=0).stats
    assert [each.rows for each in stats.sets] == [30, 10]
    first, second = (each.tokens for each in stats.sets)
    share = 100 * first / (first + second)
    assert [line.replace(f"{tmp_path}/", "") for line in stats.lines()[1:]] == [
        f"  small.jsonl, weight 3: 30 rows (75.0 %), {first:,} tokens ({share:.1f} %)",
        f"  large.jsonl, weight 1: 10 rows (25.0 %), {second:,} tokens ({100 - share:.1f} %)",
    ]


@pytest.mark.parametrize("packing", [False, True])
def test_a_mixture_is_the_same_for_the_same_seed_and_another_for_another(tmp_path: Path, packing: bool) -> None:
    chosen = two_sets(tmp_path, packing=packing)
    one, again, other = (
        prepare(chosen.sources("train"), tiny_tokenizer(), chosen, seed=seed).dataset["row"][:] for seed in (1, 1, 2)
    )
    assert one == again != other


def test_a_weight_too_small_for_a_single_row_is_an_error(tmp_path: Path) -> None:
    small = write(tmp_path / "small.jsonl", [SHORT])
    chosen = settings([source(small, weight=1.0), source(small, weight=0.1)])
    with pytest.raises(DataError, match=r"its weight is so small that none of its 1 rows is used; raise its weight"):
        prepare(chosen.sources("train"), tiny_tokenizer(), chosen, seed=0)


def test_what_is_wrong_in_several_sets_is_said_at_once(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", [{"prompt": "a"}])
    other = write(tmp_path / "other.jsonl", [{"completion": "a"}])
    chosen = settings([source(one), source(other)])
    with pytest.raises(DataError) as caught:
        prepare(chosen.sources("train"), tiny_tokenizer(), chosen, seed=0)
    assert [Path(problem.where.partition(": ")[0]).name for problem in caught.value.problems] == [
        "one.jsonl:1",
        "other.jsonl:1",
    ]


def entries() -> set[str]:
    return {path.name for path in cache_folder().iterdir()}


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))


def test_prepared_rows_are_used_again(tmp_path: Path, fresh_cache: None) -> None:
    one = run(tmp_path, [SHORT, LONG, LONG], packing=True)
    before = {path: path.stat().st_mtime_ns for path in cache_folder().rglob("*")}
    again = run(tmp_path, [SHORT, LONG, LONG], packing=True)
    assert {path: path.stat().st_mtime_ns for path in cache_folder().rglob("*")} == before
    assert again.stats == one.stats
    assert again.dataset[:] == one.dataset[:]


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 200},
        {"overlong": "truncate"},
        {"overlong": "split"},
        {"loss_on": "all"},
        {"system": "merge_into_first_user"},
        {"on_bad_row": "drop"},
        {"max_bad_share": 0.5, "on_bad_row": "drop"},
        {"chat_template": "alpaca"},
        {"train": {"columns": {"prompt": "question"}}},
        {"train": {"roles": {"customer": "user"}}},
        {"train": {"max_rows": 2}},
        {"train": {"format": "auto"}},
    ],
    ids=str,
)
def test_rows_of_other_settings_are_never_used(tmp_path: Path, fresh_cache: None, change: dict[str, Any]) -> None:
    rows = [{**SHORT, "question": "what else?"}, LONG | {"question": "and then?"}]
    path = write(tmp_path / "rows.jsonl", rows)

    def prepared(**others: Any) -> None:
        source_of = {"path": str(path), "format": "prompt_completion", **others.pop("train", {})}
        chosen = settings(DataSource(**source_of), **others)
        tokenizer = tiny_tokenizer()
        if chosen.chat_template:
            tokenizer.chat_template = read_template(chosen.chat_template)
        prepare(chosen.sources("train"), tokenizer, chosen, seed=0)

    prepared()
    [first] = entries()
    prepared(**change)
    assert len(entries() - {first}) == 1


def test_rows_of_another_content_tokenizer_or_template_are_never_used(tmp_path: Path, fresh_cache: None) -> None:
    path = write(tmp_path / "rows.jsonl", [SHORT])
    chosen = settings(source(path))
    bare, other_template, other_vocabulary = tiny_tokenizer(), tiny_tokenizer(), tiny_tokenizer()
    other_template.chat_template = bare.chat_template.replace("<|im_end|>\\n", "<|im_end|>")
    other_vocabulary.add_tokens(["timer"])
    for number, tokenizer in enumerate((bare, other_template, other_vocabulary), start=1):
        prepare(chosen.sources("train"), tokenizer, chosen, seed=0)
        assert len(entries()) == number
    stamp = path.stat()
    path.write_text(path.read_text().replace("done", "gone"))  # the same size, and the same time
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    prepare(chosen.sources("train"), bare, chosen, seed=0)
    assert len(entries()) == 4


def test_the_digest_of_a_set_is_that_of_its_tokens_and_labels(tmp_path: Path, fresh_cache: None) -> None:
    def digest(rows: list[Any], **others: Any) -> str:
        return str(run(tmp_path, rows, **others).stats.as_dict()["sets"][0]["digest"])

    plain = digest([SHORT, LONG])
    assert digest([{**SHORT, "note": "not read"}, LONG]) == plain
    assert len({plain, digest([LONG, SHORT]), digest([SHORT, LONG], loss_on="all")}) == 3


def test_rows_that_bear_another_file_s_name_are_never_used(tmp_path: Path, fresh_cache: None) -> None:
    chosen = settings(source(tmp_path / "*.jsonl"))
    write(tmp_path / "one.jsonl", [SHORT])
    assert where(prepare(chosen.sources("train"), tiny_tokenizer(), chosen, seed=0)) == ["one.jsonl:1"]
    (tmp_path / "one.jsonl").rename(tmp_path / "two.jsonl")
    assert where(prepare(chosen.sources("train"), tiny_tokenizer(), chosen, seed=0)) == ["two.jsonl:1"]


@pytest.mark.parametrize(("writes_the_day", "passes"), [(False, 1), (True, 2)])
def test_rows_that_say_another_day_are_never_used(
    tmp_path: Path, fresh_cache: None, writes_the_day: bool, passes: int
) -> None:
    path = write(tmp_path / "rows.jsonl", [SHORT])
    chosen, tokenizer = settings(source(path)), tiny_tokenizer()
    if writes_the_day:
        tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + tokenizer.get_chat_template()
    for day in ("2025-01-01", "2025-01-02", "2025-01-01"):
        set_template_day(tokenizer, day)
        assert template_day(tokenizer) == (day if writes_the_day else None)
        [row] = prepare(chosen.sources("train"), tokenizer, chosen, seed=0).dataset
        written = f"{day[-2:]} Jan 2025" if writes_the_day else "<|im_start|>"
        assert tokenizer.decode(row["input_ids"]).startswith(written)
    assert len(entries()) == passes


def test_without_a_day_a_template_writes_today() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d') }}" + tokenizer.get_chat_template()
    before, text, after = date.today(), ChatTemplate(tokenizer, "X").text(chat("a", "b").messages), date.today()
    assert text[:10] in (before.isoformat(), after.isoformat())


def test_a_set_with_bad_rows_leaves_nothing_in_the_cache(tmp_path: Path, fresh_cache: None) -> None:
    refusal(tmp_path, [SHORT, {"prompt": "a"}])
    assert entries() == set()


@pytest.mark.parametrize("packing", [False, True])
def test_the_number_of_threads_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: bool) -> None:
    files = []
    for parallel in ("false", "true"):
        monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / parallel))
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", parallel)
        chosen = two_sets(tmp_path, packing=packing)
        prepare(chosen.sources("train"), tiny_tokenizer(), chosen, seed=0)
        found = sorted(path for path in (tmp_path / parallel).rglob("*") if path.is_file())
        files.append({str(path.relative_to(tmp_path / parallel)): path.read_bytes() for path in found})
    assert files[0] == files[1]


def test_a_file_that_changes_while_it_is_read_is_an_error(
    tmp_path: Path, fresh_cache: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class WithAWriter(tqdm):  # type: ignore[type-arg]
        """A progress bar beside which somebody appends to the file."""

        def update(self, n: float | None = 1) -> bool | None:
            with (tmp_path / "rows.jsonl").open("a") as file:
                file.write("\n")
            return super().update(n)

    monkeypatch.setattr("finetune.data.tokens.tokenize_rows.tqdm", WithAWriter)
    assert refusal(tmp_path, [SHORT]) == [
        "rows.jsonl: changed while it was read; run again when no process writes to it"
    ]
    assert entries() == set()


def test_pieces_of_a_split_row_without_anything_supervised_are_counted(tmp_path: Path) -> None:
    asked = {"prompt": " ".join([LONG["completion"]] * 8), "completion": "done"}
    limit = lengths(tmp_path)[0]
    prepared = run(tmp_path, [SHORT, asked], max_length=limit, overlong="split")
    source = prepared.stats.sets[0].source
    assert (source.split, source.pieces, prepared.stats.used) == (1, 2, 2)
    assert source.pieces_left_out == -(-source.longest // limit) - 1 > 0
    assert prepared.stats.lines()[1] == (
        f"  left out: {source.pieces_left_out} unsupervised pieces of split rows of {tmp_path}/rows.jsonl"
    )


def test_a_row_that_is_dropped_is_no_duplicate(tmp_path: Path) -> None:
    short = lengths(tmp_path)[0]
    assert run(tmp_path, [SHORT, LONG, LONG], max_length=short, overlong="drop").stats.duplicates == 0
