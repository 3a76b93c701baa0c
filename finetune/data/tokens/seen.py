"""Which keys came before, for any number of rows in bounded memory: an index on disk that is gone with the process."""

import hashlib
import sqlite3
from types import TracebackType


class Seen:
    """Remembers where each key came first. Keys are kept as 64-bit hashes, SQLite spills what its cache cannot hold."""

    def __init__(self) -> None:
        # The empty name is SQLite's own: a temporary file, unlinked at once.
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("CREATE TABLE seen (key INTEGER PRIMARY KEY, place TEXT)")
        self._database.execute("BEGIN")

    def __enter__(self) -> "Seen":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._database.close()

    def first(self, key: str, place: str) -> str | None:
        """The place at which `key` came before; None, and `place` is remembered, if it is new."""
        digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        number = int.from_bytes(digest, "big", signed=True)
        insert = "INSERT OR IGNORE INTO seen VALUES (?, ?)"
        if self._database.execute(insert, (number, place)).rowcount:
            return None
        earlier: str = self._database.execute("SELECT place FROM seen WHERE key = ?", (number,)).fetchone()[0]
        return earlier
