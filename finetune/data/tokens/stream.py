"""Rows -> token ids, in order and in bounded memory: while one chunk is tokenised the next is read and rendered.

The tokenizer is Rust, spreads a chunk over all cores and holds no lock of Python's meanwhile. Two threads beside this
one are enough: what one chunk's tokens still need in Python is done while the next chunk is tokenised. The result
cannot depend on how many cores there are.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from finetune.data.formats import Reader
from finetune.data.render import Rendered, Renderer, Rendering
from finetune.data.rows import Row, RowError
from finetune.data.types import Conversation, Document

CHUNK_ROWS = 512
CHUNK_CHARACTERS = 1 << 19
Chunk = list[tuple[Row, Rendering | RowError]]
_TOKENISERS = 2
_AHEAD = 3  # chunks that wait for the tokenizer; more would only hold memory


@dataclass(frozen=True)
class Tokenised:
    """A row with its text and tokens, or with what is wrong with it."""

    row: Row
    text: str
    result: Rendered | RowError


def tokenised(rows: Iterable[Row], reader: Reader, renderer: Renderer) -> Iterator[Tokenised]:
    """Every row, in order."""
    waiting: deque[tuple[Chunk, Future[list[Rendered | RowError]]]] = deque()
    with ThreadPoolExecutor(_TOKENISERS, thread_name_prefix="tokeniser") as pool:
        for chunk in _chunks(rows, reader, renderer):
            texts = [rendering for _, rendering in chunk if isinstance(rendering, Rendering)]
            waiting.append((chunk, pool.submit(renderer.tokenise, texts)))
            if len(waiting) > _AHEAD:
                yield from _finished(*waiting.popleft(), reader)
        while waiting:
            yield from _finished(*waiting.popleft(), reader)


def _chunks(rows: Iterable[Row], reader: Reader, renderer: Renderer) -> Iterator[Chunk]:
    chunk: Chunk = []
    characters = 0
    for row in rows:
        rendering = _rendering(row, reader, renderer)
        chunk.append((row, rendering))
        characters += len(rendering.text) if isinstance(rendering, Rendering) else 0
        if len(chunk) == CHUNK_ROWS or characters > CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _rendering(row: Row, reader: Reader, renderer: Renderer) -> Rendering | RowError:
    if isinstance(row.value, RowError):
        return row.value
    try:
        example = reader(row.value)
    except RowError as error:
        return error
    if not isinstance(example, Conversation | Document):
        do = "use it with preference tuning, or name the file's true data format"
        return RowError(None, "holds two answers to compare or a judged one, and one answer a row is trained", do)
    try:
        return renderer.render(example)
    except RowError as error:
        return _located(error, row, reader)


def _located(error: RowError, row: Row, reader: Reader) -> RowError:
    """The renderer's complaint about a turn, by the names of the file's own columns."""
    assert isinstance(row.value, dict)
    return RowError(reader.locate(row.value, error.field), error.what, error.do, error.got)


def _finished(chunk: Chunk, future: Future[list[Rendered | RowError]], reader: Reader) -> Iterator[Tokenised]:
    results = iter(future.result())
    for row, rendering in chunk:
        if isinstance(rendering, RowError):
            yield Tokenised(row, "", rendering)
            continue
        result = next(results)
        yield Tokenised(row, rendering.text, _located(result, row, reader) if isinstance(result, RowError) else result)
