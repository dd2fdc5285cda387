"""The worker's side: takes one command after another and runs it as `earl` would, in a process that stays.

A worker ends when it has been idle for long, when it is told to, and with the process that its pool belongs to. It also
ends, at once, when the client of the command in hand is gone: a stage never goes on without the one who asked for it,
who may be asking again.
"""

import contextlib
import gc
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from earl import processes, residents
from earl.errors import EarlError
from earl.launchers import squeue
from earl.workers import KINDS, channel, client, pool

log = logging.getLogger(__name__)

_PART = 2**14
"""Bytes of output in one message."""


def serve(folder: str, name: str, host: str | None = None) -> None:
    """Serve a pool's clients under a name until there is a reason to end.

    Args:
        folder: the pool.
        name: ``<kind>-<number>``.
        host: address to listen at for other machines; by default that of the node of a Slurm job, elsewhere a socket
            in the pool's folder.

    Raises:
        EarlError: there is no such pool or kind, or a worker of this name already runs.
    """
    found = pool.Pool(folder)
    slot = pool.Slot(found, name)
    try:
        secret, settings = found.secret, found.settings
        is_job = settings["starts"] == pool.SLURM
        # A job's environment is not that of the client that had it started, which says what it wants.
        identity = slot.wanted() if is_job else client.identity()
    except (OSError, ValueError, KeyError) as error:
        raise EarlError(f"{folder}: is no pool of workers ({error}); the workflow opens one") from error
    kind = name.rpartition("-")[0].partition(".")[0]
    if kind not in KINDS.values():
        raise EarlError(f"--name {name}: must be one of {', '.join(sorted(set(KINDS.values())))}, with -<number>")
    # A bare descriptor is closed by nothing but the end of the process.
    with processes.lock(found.file(f"{name}.worker"), patience=0) as lock:
        os.dup(lock.fileno())
    # Its client did not pass this on: what it does to a stage, which just ends, is not enough here.
    os.environ[processes.WATCHED] = settings["owner"]
    processes.end_when(found.is_over, 1.0 if is_job else 0.25, first=found.remove_if_over)
    try:
        host = host or (squeue.this_node() if is_job else None)
        listener, address = channel.listen(f"unix:{slot.file('sock')}" if host is None else f"tcp:{host}:0")
        worker = _Worker(found, kind, secret)
        slot.announce(address, identity)
        # The client that started this process waits for this line, or for its end.
        print("listening", flush=True)
        worker.output.capture(slot.file("log"))
        worker.work(listener, settings["idle_seconds"])
    finally:
        # Where the pool is over, the thread that is removing it would be cut off by the end of this one.
        found.remove_if_over()
    worker.end()


class _Worker:
    """Takes commands of one kind from a listening socket."""

    def __init__(self, found: pool.Pool, kind: str, secret: bytes) -> None:
        self.pool, self.kind, self.secret = found, kind, secret
        self.output = _Output(self.end)
        self.busy = False
        signal.signal(signal.SIGTERM, self.end)

    def end(self, *_: object) -> None:
        """End at once, without the seconds that a regular end takes to unload libraries."""
        if not self.busy:
            residents.clear()  # What is kept may have files of its own to remove.
            gc.collect()
        # Another thread may be removing the pool; this one must not end the process before that is done.
        self.pool.remove_if_over()
        os._exit(int(self.busy))

    def work(self, listener: socket.socket, idle_seconds: float) -> None:
        listener.settimeout(idle_seconds)
        while True:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                log.info("idle for %g s", idle_seconds)
                return
            try:
                self._take(channel.accept(connection, self.secret))
            except channel.ProtocolError as error:
                log.warning("a client was turned away: %s", error)
            finally:
                connection.close()

    def _take(self, asking: channel.Channel) -> None:
        argv = asking.receive().get("argv")
        if not isinstance(argv, list) or not all(isinstance(word, str) for word in argv):
            asking.send({"refused": "argv is not a list of text"})
        elif not argv or KINDS.get(argv[0]) != self.kind:
            asking.send({"refused": f"not a command for a worker that holds the {self.kind}"})
        else:
            self._run(asking, argv)

    def _run(self, asking: channel.Channel, argv: list[str]) -> None:
        asking.socket.settimeout(None)
        self.busy = True
        watch = threading.Thread(target=self._end_with, args=(asking,), name="end-with-client", daemon=True)
        watch.start()
        try:
            self.output.receiver = asking
            with self.pool.writing(argv):
                status = run(argv)
            self.output.drain()
        finally:
            self.output.receiver = None
        self.busy = False
        asking.send({"status": status})
        with contextlib.suppress(OSError):
            asking.socket.shutdown(socket.SHUT_RDWR)
        watch.join()

    def _end_with(self, asking: channel.Channel) -> None:
        """Wait for the client to break off, which it does only once it has the status."""
        with contextlib.suppress(OSError):
            asking.socket.recv(1)
        if self.busy:
            self.end()


def run(argv: Sequence[str]) -> int:
    """Run a command as a process of its own would, and return its exit status; after a failure nothing is kept."""
    from earl import cli

    _as_new()
    try:
        status = cli.call(argv)
    except Exception:
        traceback.print_exc()
        status = 1
    if status:
        residents.clear()
        gc.collect()
    return status


def _as_new() -> None:
    """Set torch's random numbers back to where a process starts with them, and give back memory that is not used."""
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return
    torch.set_rng_state(torch.Generator().get_state())
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class _Output:
    """Whatever this process and the processes below it print, sent to the client in hand as it comes, or into a log."""

    def __init__(self, end: Callable[[], None]) -> None:
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
        """Wait until the client has been sent all that was printed so far."""
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
            self._end()  # The client is gone, or the log cannot be written: the stage would wait here for ever.

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
