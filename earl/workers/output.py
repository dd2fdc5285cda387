"""What a worker prints on behalf of a command, on its way to the one who asked."""

import os
import secrets
import sys
import threading
from collections.abc import Callable

from earl.workers import channel

_PART = 2**14
"""Bytes of output in one message."""


class Output:
    """Whatever this process and the processes below it print, sent to a receiver as it comes, or into a log."""

    def __init__(self, end: Callable[[], None]) -> None:
        """Capture nothing yet. `end` ends this process: it is called where what is printed can go nowhere."""
        self.receiver: channel.Channel | None = None
        self._end = end
        self._sending = threading.Lock()
        self._marker = b"\0" + secrets.token_hex(16).encode() + b"\0"
        self._drained = {1: threading.Event(), 2: threading.Event()}

    def capture(self, log_path: str) -> None:
        """From here on take what is written to standard output and error."""
        self._log = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        sys.stdout.flush()
        sys.stderr.flush()
        for stream in (1, 2):
            source, sink = os.pipe()
            os.dup2(sink, stream)
            os.close(sink)
            threading.Thread(target=self._pump, args=(stream, source), name=f"output-{stream}", daemon=True).start()

    def drain(self) -> None:
        """Wait until the receiver has been sent all that was printed so far."""
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, drained in self._drained.items():
            drained.clear()
            os.write(stream, self._marker)
            drained.wait()

    def _pump(self, stream: int, source: int) -> None:
        try:
            self._pass_all_on(stream, source)
        finally:
            self._end()  # The receiver is gone, or the log cannot be written: the stage would wait here for ever.

    def _pass_all_on(self, stream: int, source: int) -> None:
        held = b""
        while data := os.read(source, _PART):
            held += data
            while self._marker in held:
                before, _, held = held.partition(self._marker)
                self._pass_on(stream, before)
                self._drained[stream].set()
            ready = len(held) - _overlap(held, self._marker)
            self._pass_on(stream, held[:ready])
            held = held[ready:]

    def _pass_on(self, stream: int, data: bytes) -> None:
        if not data:
            return
        receiver = self.receiver
        if receiver is None:
            os.write(self._log, data)
            return
        with self._sending:
            receiver.send({"stream": stream, "text": data.decode("utf-8", "surrogateescape")})


def _overlap(data: bytes, marker: bytes) -> int:
    """Return how many bytes at the end of ``data`` may be the beginning of ``marker``."""
    return next((n for n in range(min(len(marker) - 1, len(data)), 0, -1) if data.endswith(marker[:n])), 0)
