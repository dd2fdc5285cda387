"""What a command says on standard error: no secrets, and plain lines where nobody watches a terminal.

A log is read later and often by another program. So without a terminal progress bars, our own and those of libraries,
become a complete line every `SECONDS` and one at their end.
"""

import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, TextIO

from earl.messages.redaction import redacted

SECONDS = 30.0
"""Between two lines of progress."""
_MOVES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
"""Escape sequences, by which progress bars move the cursor."""


class Console:
    """A text stream in front of another one. A terminal gets everything as it comes, secrets aside.

    Args:
        stream: where text goes.
        clock: seconds, for tests.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock, self._lock = stream, clock, threading.RLock()
        self._is_terminal = stream.isatty()
        self.has_bars = True
        """Whether progress bars become lines, where there is no terminal."""
        self._text, self._bar, self._shown_at = "", "", clock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._lock:
            if self._is_terminal:
                self._stream.write(redacted(text))
            elif "\r" in (plain := text.replace("\r\n", "\n")):
                self._progress(plain)
            elif self._bar and not self._text and "\n" in plain and not _MOVES.sub("", plain).strip("\n"):
                self._show(self._bar)
            else:
                *lines, self._text = (self._text + _MOVES.sub("", plain)).split("\n")
                for line in lines:
                    self._stream.write(f"{redacted(line)}\n")
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Hand on what has come, a line without its end too, but no progress: that would be a line each time."""
        with self._lock:
            self._stream.write(redacted(self._text))
            self._text = ""
            self._stream.flush()

    def _progress(self, text: str) -> None:
        """Take a bar's new state, the last one of several; show it if the last line was long ago."""
        states = [state.strip() for state in re.split(r"[\r\n]", _MOVES.sub("", text))]
        self._bar = next((state for state in reversed(states) if state), "")
        if self._bar and (text.endswith("\n") or self._clock() - self._shown_at >= SECONDS):
            self._show(self._bar)

    def _show(self, bar: str) -> None:
        if self.has_bars:
            self._stream.write(f"{redacted(bar)}\n")
        self._bar, self._shown_at = "", self._clock()


def leave_out_bars() -> None:
    """Show no progress bars unless standard error is a terminal: for a command whose log tells its progress itself."""
    if isinstance(sys.stderr, Console):
        sys.stderr.has_bars = False


def set_up() -> None:
    """Make standard error a `Console` and log there: INFO of our own, of libraries only what warns."""
    sys.stderr = Console(sys.stderr)
    if not sys.stderr.isatty():
        # For bars of processes that a library starts; tqdm reads it when it is imported.
        os.environ.setdefault("TQDM_MININTERVAL", str(SECONDS))
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("earl").setLevel(logging.INFO)
