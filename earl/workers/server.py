"""The worker's side: takes one command after another and runs it as `earl` would, in a process that stays.

A worker ends when it has been idle for long, when it is told to, and with the process that its pool belongs to. It also
ends, at once, when the client of the command in hand is gone: a stage never goes on without the one who asked for it,
who may be asking again.
"""

import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterable, Sequence
from typing import Any

from earl import residents
from earl.execution import processes
from earl.launchers import squeue
from earl.messages.errors import EarlError
from earl.workers import KINDS, RANKS, channel, client, pool, team
from earl.workers.output import Output

log = logging.getLogger(__name__)


def serve(folder: str, name: str, host: str | None = None) -> None:
    """Serve a pool's clients under a name until there is a reason to end; as one of several ranks, take part in that.

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
        identity = slot.wanted() or client.identity()
    except (OSError, ValueError, KeyError) as error:
        raise EarlError(f"{folder}: is no pool of workers ({error}); the workflow opens one") from error
    kind, kinds = name.rpartition("-")[0].partition(".")[0], {*KINDS.values(), RANKS}
    if kind not in kinds:
        raise EarlError(f"--name {name}: must be one of {', '.join(sorted(kinds))}, with -<number>")
    rank, size = (int(os.environ.get(variable, default)) for variable, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if rank == 0:
        # A bare descriptor is closed by nothing but the end of the process. Who just looks has the lock for a moment.
        with processes.lock(found.file(f"{name}.worker"), patience=1.0) as lock:
            os.dup(lock.fileno())
    # Its client did not pass this on: what it does to a stage, which just ends, is not enough here.
    os.environ[processes.WATCHED] = settings["owner"]
    os.environ[pool.VARIABLE] = found.path
    residents.stays = True
    processes.end_when(found.is_over, 1.0 if is_job else 0.25, first=found.remove_if_over)
    if rank > 0:
        team.follow(secret, slot.file(f"{rank}.log"), run)
    try:
        leader = team.Leader(secret) if size > 1 else None
        host = host or (squeue.this_node() if is_job else None)
        listener, address = channel.listen(f"unix:{slot.file('sock')}" if host is None else f"tcp:{host}:0")
        worker = _Worker(found, kind, secret, leader)
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

    def __init__(self, found: pool.Pool, kind: str, secret: bytes, leader: team.Leader | None) -> None:
        self.pool, self.kind, self.secret, self.leader = found, kind, secret, leader
        self.output = Output(self.end)
        self.busy = False
        self._asking: channel.Channel | None = None
        self._answering = threading.Lock()
        signal.signal(signal.SIGTERM, self.end)
        if leader is not None:
            leader.watch(self._end_of_rank)

    def end(self, *_: object) -> None:
        """End at once, without the seconds that a regular end takes to unload libraries; other ranks end with this."""
        if not self.busy and self.leader is None:
            residents.clear()  # What is kept may have files or processes of its own.
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
        elif not argv or KINDS.get(argv[0]) != ("learner" if self.kind == RANKS else self.kind):
            asking.send({"refused": f"not a command for a worker that holds the {self.kind}"})
        else:
            self._run(asking, argv)

    def _run(self, asking: channel.Channel, argv: list[str]) -> None:
        asking.socket.settimeout(None)
        self._asking, self.busy = asking, True
        watch = threading.Thread(target=self._end_with, args=(asking,), name="end-with-client", daemon=True)
        watch.start()
        status = 1
        try:
            self.output.receiver = asking
            with self._writing(argv):
                status = run(argv) if self.leader is None else self.leader.run(argv, run)
            with self._answering:
                self._answer(status)
        finally:
            self.output.receiver = None
            if status and self.leader is not None:
                self.end()  # Ranks that failed may be waiting for each other, and hold what this one has let go of.
        watch.join()

    def _writing(self, argv: list[str]) -> contextlib.AbstractContextManager[None]:
        """Keep others from what the command writes. The learner that ranks belong to does that for them."""
        return contextlib.nullcontext() if self.kind == RANKS else self.pool.writing(argv)

    def _answer(self, status: int) -> None:
        """Tell the client how its command ended, after all that was printed."""
        self.output.drain()
        self.output.receiver = None
        self.busy = False
        self._asking.send({"status": status})
        with contextlib.suppress(OSError):
            self._asking.socket.shutdown(socket.SHUT_RDWR)

    def _end_of_rank(self, said: Iterable[tuple[int, bytes]], status: int) -> None:
        """End with another rank that has failed or is gone; tell the client of it, if one waits.

        The main thread may be waiting for that rank for ever.
        """
        with self._answering:
            try:
                if self.busy:
                    for stream, data in said:
                        os.write(stream, data)
                    self._answer(status)
            finally:
                self.end()

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
