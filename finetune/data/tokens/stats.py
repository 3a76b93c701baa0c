"""Counts of the rows and tokens of a prepared data set."""

import heapq
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

NAMED = 20
"""So many longest rows and duplicates are named; the rest is counted."""


def counted(number: int, what: str) -> str:
    """`1 example`, `2 examples`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


@dataclass
class RowStats:
    """How many rows of one source were read, left out, cut and kept.

    `rows` read = `bad` (left out by `on_bad_row: drop`) + `dropped` (too long) + those that are kept, as one piece each
    or, if `split`, as several; `truncated` and `split` are among the kept. `pieces_left_out`: pieces in which nothing
    is supervised. `tokens` and `supervised_tokens` count what is kept. `lengths`: rows by their length in tokens before
    anything is cut. `duplicates`: kept rows whose text came before. `placeholders`: kept rows with a message that is a
    word for nothing (`nan`, `None`, `NULL`), as an empty cell becomes in some exports. `split_conversations`: rows that
    became `split_examples` examples, because the template rewrites earlier answers; `examples_left_out`: further ones
    that are too long. `without_reasoning`: supervised answers that have none.

    A pair is one piece; its `tokens` are those of both conversations, its length is that of the longer one. Two rows of
    judged answers make one.
    """

    rows: int = 0
    bad: int = 0
    dropped: int = 0
    truncated: int = 0
    split: int = 0
    pieces: int = 0
    pieces_left_out: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    duplicates: int = 0
    placeholders: int = 0
    split_conversations: int = 0
    split_examples: int = 0
    examples_left_out: int = 0
    without_reasoning: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    longest_rows: list[tuple[int, str]] = field(default_factory=list)  # (tokens, file:line), longest first
    duplicate_rows: list[tuple[str, str]] = field(default_factory=list)  # (file:line, file:line of the first)
    bad_rows: list[str] = field(default_factory=list)  # messages
    format: str = ""  # what was named, or recognised
    why: str | None = None  # how it was recognised
    digest: str = ""  # SHA-256 of the token ids and labels that are kept

    @property
    def longest(self) -> int:
        """Tokens of the longest row, before anything is cut; 0 without rows."""
        return max(self.lengths, default=0)

    def count_length(self, tokens: int, where: str) -> None:
        """Count a row that could be tokenised."""
        self.lengths[tokens] += 1
        entry = (tokens, where)
        if len(self.longest_rows) < NAMED:
            heapq.heappush(self.longest_rows, entry)
        elif tokens > self.longest_rows[0][0]:
            heapq.heapreplace(self.longest_rows, entry)

    def count_duplicate(self, where: str, first: str, rows: int = 1) -> None:
        """Count a row, or the rows of a pair, whose text came before."""
        self.duplicates += rows
        if len(self.duplicate_rows) < NAMED:
            self.duplicate_rows.append((where, first))

    def as_json(self) -> dict[str, Any]:
        """For the cache; `from_json` reads it back."""
        longest = sorted(self.longest_rows, key=lambda entry: -entry[0])
        return {**asdict(self), "lengths": sorted(self.lengths.items()), "longest_rows": longest}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "RowStats":
        """The stats that `as_json` wrote."""
        pairs = {key: [tuple(entry) for entry in values[key]] for key in ("longest_rows", "duplicate_rows")}
        return cls(**{**values, "lengths": Counter(dict(values["lengths"])), **pairs})


@dataclass(frozen=True)
class SetStats:
    """One source's part in the data set: `rows` and `tokens` used, repeated ones as often as they are; its weight."""

    name: str
    weight: float | None
    rows: int
    tokens: int
    supervised_tokens: int
    source: RowStats
    content: str = ""  # fingerprint of the source's rows, before they are tokenised


@dataclass(frozen=True)
class DataStats:
    """The contents of a prepared data set and their sources. `sequences` is its length: packing joins rows."""

    sets: list[SetStats]
    sequences: int

    @property
    def rows(self) -> int:
        """Rows read, of all sources."""
        return self._sum("rows")

    @property
    def bad(self) -> int:
        """Rows left out by `on_bad_row: drop`."""
        return self._sum("bad")

    @property
    def dropped(self) -> int:
        """Rows left out because they are too long."""
        return self._sum("dropped")

    @property
    def truncated(self) -> int:
        """Rows that were cut at the end."""
        return self._sum("truncated")

    @property
    def split(self) -> int:
        """Rows that were cut into pieces."""
        return self._sum("split")

    @property
    def duplicates(self) -> int:
        """Rows whose text came before in their source."""
        return self._sum("duplicates")

    @property
    def placeholders(self) -> int:
        """Rows with a message that is a word for nothing."""
        return self._sum("placeholders")

    @property
    def longest(self) -> int:
        """Tokens of the longest row before anything is cut."""
        return max(set_stats.source.longest for set_stats in self.sets)

    @property
    def used(self) -> int:
        """Rows (or pieces) in the data set."""
        return sum(set_stats.rows for set_stats in self.sets)

    @property
    def tokens(self) -> int:
        """Tokens in the data set."""
        return sum(set_stats.tokens for set_stats in self.sets)

    @property
    def supervised_tokens(self) -> int:
        """Tokens in the data set that carry a loss."""
        return sum(set_stats.supervised_tokens for set_stats in self.sets)

    def _sum(self, name: str) -> int:
        return sum(getattr(set_stats.source, name) for set_stats in self.sets)

    def as_dict(self) -> dict[str, Any]:
        """For the audit file."""
        totals = ("rows", "bad", "dropped", "truncated", "split", "duplicates", "longest", "used", "tokens")
        of_set = ("name", "rows", "tokens", "supervised_tokens", "weight", "content")
        return {
            **{name: getattr(self, name) for name in (*totals, "supervised_tokens", "sequences")},
            "sets": [
                {**{name: getattr(one, name) for name in of_set}, "digest": one.source.digest} for one in self.sets
            ],
        }

    def lines(self) -> list[str]:
        """As it is printed: what was read and is used; of each set its proportion, recognised format and bad rows."""
        total = max(self.rows, 1)
        counts = {"bad": self.bad, "truncated": self.truncated, "split": self.split, "dropped": self.dropped}
        counts |= {"duplicate": self.duplicates, "with nan, None or NULL as a message": self.placeholders}
        shares = [f"{100 * count / total:.1f} % {name}" for name, count in counts.items() if count or name in _ALWAYS]
        share = 100 * self.supervised_tokens / max(self.tokens, 1)
        first = (
            f"{self.rows:,} read, {', '.join(shares)}; {self.tokens:,} tokens in {self.sequences:,} sequences, "
            f"{self.supervised_tokens:,} supervised ({share:.1f} %)"
        )
        return [first, *(line for set_stats in self.sets for line in self._set_lines(set_stats))]

    def _set_lines(self, set_stats: SetStats) -> list[str]:
        """Its proportion among others, the format that was recognised, and the rows that were left out."""
        bad, idle = set_stats.source.bad - len(set_stats.source.bad_rows), set_stats.source.pieces_left_out
        split, examples = set_stats.source.split_conversations, set_stats.source.split_examples
        long = set_stats.source.examples_left_out
        return [
            *([self._proportion(set_stats)] if len(self.sets) > 1 else []),
            *(
                [f"  {set_stats.name}: recognised as {set_stats.source.format} ({set_stats.source.why})"]
                if set_stats.source.why
                else []
            ),
            *(
                [
                    f"  {set_stats.name}: {counted(split, 'conversation')} became {counted(examples, 'example')}, "
                    "because the chat template rewrites earlier answers"
                ]
                if split
                else []
            ),
            *([f"  left out: {long:,} of these examples of {set_stats.name}, too long"] if long else []),
            *([f"  left out: {idle:,} unsupervised pieces of split rows of {set_stats.name}"] if idle else []),
            *(f"  left out: {row}" for row in set_stats.source.bad_rows),
            *([f"  left out: {bad:,} more rows of {set_stats.name}"] if bad else []),
        ]

    def _proportion(self, set_stats: SetStats) -> str:
        weight = "" if set_stats.weight is None else f", weight {set_stats.weight:g}"
        return (
            f"  {set_stats.name}{weight}: {set_stats.rows:,} rows ({100 * set_stats.rows / self.used:.1f} %), "
            f"{set_stats.tokens:,} tokens ({100 * set_stats.tokens / self.tokens:.1f} %)"
        )


_ALWAYS = ("truncated", "dropped")
