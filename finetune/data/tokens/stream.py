"""Rows -> token ids, in order and in bounded memory: while one chunk is tokenised the next is read and rendered.

The tokenizer is Rust, spreads a chunk over all cores and holds no lock of Python's meanwhile. Two threads beside this
one are enough: what one chunk's tokens still need in Python is done while the next chunk is tokenised. The result
cannot depend on how many cores there are.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from finetune.data.render import Rendered, Renderer, Rendering
from finetune.data.rows import RowError
from finetune.data.tokens.examples import Item, Wrong
from finetune.data.tokens.kinds import Kind, Side

CHUNK_ROWS = 512
CHUNK_CHARACTERS = 1 << 19
_TOKENISERS = 2
_AHEAD = 3  # chunks that wait for the tokenizer; more would only hold memory


@dataclass(frozen=True)
class Tokenised:
    """An item with its text and the tokens of its sides, or with what is wrong with it."""

    item: Item
    text: str
    result: tuple[Rendered, ...] | Wrong


@dataclass(frozen=True)
class _Job:
    """An item with its sides and their texts, or with what is wrong with it."""

    item: Item
    sides: tuple[Side, ...] = ()
    texts: tuple[Rendering, ...] = ()
    wrong: Wrong | None = None


Chunk = list[_Job]


def tokenised(items: Iterable[Item], kind: Kind, renderer: Renderer) -> Iterator[Tokenised]:
    """Every item, in order."""
    waiting: deque[tuple[Chunk, Future[list[Rendered | RowError]]]] = deque()
    with ThreadPoolExecutor(_TOKENISERS, thread_name_prefix="tokeniser") as pool:
        for chunk in _chunks(items, kind, renderer):
            texts = [text for job in chunk for text in job.texts]
            waiting.append((chunk, pool.submit(renderer.tokenise, texts)))
            if len(waiting) > _AHEAD:
                yield from _finished(*waiting.popleft())
        while waiting:
            yield from _finished(*waiting.popleft())


def _chunks(items: Iterable[Item], kind: Kind, renderer: Renderer) -> Iterator[Chunk]:
    chunk: Chunk = []
    characters = 0
    for item in items:
        job = _job(item, kind, renderer)
        chunk.append(job)
        characters += sum(len(text.text) for text in job.texts)
        if len(chunk) == CHUNK_ROWS or characters > CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _job(item: Item, kind: Kind, renderer: Renderer) -> _Job:
    if isinstance(item.example, Wrong):
        return _Job(item, wrong=item.example)
    try:
        sides = kind.sides(item.example)
        return _Job(item, sides, tuple(_render(side, renderer) for side in sides))
    except RowError as error:
        return _Job(item, wrong=item.wrong(error))


def _render(side: Side, renderer: Renderer) -> Rendering:
    try:
        return renderer.render(side.example)
    except RowError as error:
        error.field = side.place(error.field)
        raise


def _finished(chunk: Chunk, future: Future[list[Rendered | RowError]]) -> Iterator[Tokenised]:
    results = iter(future.result())
    for job in chunk:
        if job.wrong is not None:
            yield Tokenised(job.item, "", job.wrong)
            continue
        text = "\0".join(text.text for text in job.texts)
        yield Tokenised(job.item, text, _result(job, list(islice(results, len(job.sides)))))


def _result(job: _Job, results: Sequence[Rendered | RowError]) -> tuple[Rendered, ...] | Wrong:
    """The tokens of all sides, or what is wrong with the first that has none."""
    rows = []
    for side, result in zip(job.sides, results, strict=True):
        if isinstance(result, RowError):
            result.field = side.place(result.field)
            return job.item.wrong(result)
        rows.append(result)
    return tuple(rows)
