"""Answers by content: what was asked before, with the same pictures, words, model and seed, is not asked again.

One SQLite file for all runs of a folder; stages that run side by side may use it at once. A key is the digest of all
that an answer depends on, image bytes among it, never of a path. Only whole answers are kept: what failed is asked
again when a stage runs again.
"""

import contextlib
import errno
import json
import sqlite3
from pathlib import Path
from typing import Any

from earl.messages.errors import EarlError
from earl.messages.text import encodable

_PATIENCE = 60.0
"""Seconds to wait for another process that is writing."""
_AT_ONCE = 64
"""Answers in one transaction."""
_FORBIDDEN = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_READONLY)


class Cache:
    """A mapping from keys to JSON values, on disk."""

    def __init__(self, path: Path) -> None:
        """Open the file, or make it.

        Raises:
            EarlError: when it is no such file or cannot be written.
        """
        self._path, self._new = path, {}
        with self._errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, timeout=_PATIENCE)
            with self._database:
                self._database.execute(
                    "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID"
                )

    def get(self, key: str) -> Any | None:
        """Return what is kept under a key, or None."""
        if key in self._new:
            return self._new[key]
        with self._errors():
            row = self._database.execute("SELECT value FROM answers WHERE key = ?", (key,)).fetchone()
            if row is None:
                return None
            value = json.loads(row[0])
            # Earlier versions kept halves of surrogate pairs, too.
            return json.loads(encodable(json.dumps(value, ensure_ascii=False))) if "\\ud" in row[0] else value

    def drop(self, key: str) -> None:
        """Forget what is kept under a key."""
        self._new.pop(key, None)
        with self._errors(), self._database:
            self._database.execute("DELETE FROM answers WHERE key = ?", (key,))

    def put(self, key: str, value: Any) -> None:
        """Keep a value; it is on disk after some more of them, or `flush`. What is there already stays."""
        self._new[key] = value
        if len(self._new) >= _AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Bring everything to disk."""
        rows = [(key, json.dumps(value, allow_nan=False)) for key, value in self._new.items()]
        with self._errors(), self._database:
            self._database.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?)", rows)
        self._new.clear()

    @contextlib.contextmanager
    def _errors(self) -> Any:
        try:
            yield
        except (sqlite3.Error, OSError, ValueError) as error:
            reason = f"the store of judgements cannot be used ({error})"
            raise EarlError(f"{self._path}: {reason}; {_remedy(error)}") from error


def _remedy(error: Exception) -> str:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the primary one
    if code == sqlite3.SQLITE_FULL or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return "free space, then run the stage again"
    if isinstance(error, OSError) or code in _FORBIDDEN:
        return "check the folder's permissions, or set judge_cache=false"
    if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_PROTOCOL):
        return "free space, or set judge_cache=false where its file system has no locks"
    return "remove the file, or set judge_cache=false"
