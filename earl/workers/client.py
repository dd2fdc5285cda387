"""The client's side: what a stage's command does where its workflow has a pool. Imports nothing heavy.

A worker that is lost does not fail the stage: once it is sure that the worker is dead, the command goes on in this
process, as it would without a pool. Outputs appear only complete, so nothing of the worker's is in the way.
"""

import hashlib
import json
import os
import resource
import sys
from collections.abc import Sequence
from typing import IO, Protocol

from earl import code_version
from earl.execution import processes
from earl.workers import KINDS, channel, pool

_VARYING = ("PWD", "OLDPWD", "SHLVL", "_", "TQDM_MININTERVAL", "LOGNAME", pool.VARIABLE, processes.WATCHED)
"""Environment variables that may differ between a worker and its client: a stage does not depend on them. Commands set
some of them for themselves."""


class Starter(Protocol):
    """Starts and ends the workers of a pool."""

    def start(self, slot: pool.Slot) -> None:
        """Start a worker and wait until it listens, or has ended."""
        ...

    def end(self, slot: pool.Slot) -> None:
        """Make sure that no worker is alive here.

        Raises:
            EarlError: it does not end.
        """
        ...


def run(argv: Sequence[str]) -> int | None:
    """Have a worker of this machine run a command; return its exit status, or None where it is to be run here.

    In the latter case this process keeps other writers of the pool from the same output until it ends.
    """
    if not argv or argv[0] not in KINDS or "--help" in argv:
        return None
    if "WORLD_SIZE" in os.environ:  # One of several ranks; the command that started them may be in a worker itself.
        return None
    found = pool.from_environment()
    if found is None:
        return None
    processes.end_with_workflow()
    return ask(found, KINDS[argv[0]], argv, Twins())


def ask(found: pool.Pool, kind: str, argv: Sequence[str], starter: Starter) -> int | None:
    """Have a worker of a kind run a command; return its exit status, or None where the worker was lost.

    In the latter case it is sure that the worker is dead, and this process keeps other writers of the pool from the
    same output until it ends.

    Raises:
        EarlError: the worker was lost, and goes on though it was ended.
    """
    slot = found.slot(kind)
    try:
        return _ask(slot, argv, starter)
    except channel.ProtocolError as error:
        print(f"{slot.name}: {error}; going on without it", file=sys.stderr, flush=True)
        if not found.is_over():
            starter.end(slot)
            _hold_output(found, argv)
        return None
    finally:
        slot.release()


def identity() -> dict[str, str]:
    """Return what a worker has to have in common with its client for a stage to be the same in both."""
    varying = {name: value for name, value in os.environ.items() if name not in _VARYING}
    umask = os.umask(0o077)
    os.umask(umask)
    limits = [
        resource.getrlimit(getattr(resource, name)) for name in sorted(vars(resource)) if name.startswith("RLIMIT_")
    ]
    process = [sys.executable, sorted(varying.items()), umask, limits]
    return {
        "code": code_version(),
        "folder": os.getcwd(),
        "process": hashlib.sha256(json.dumps(process).encode()).hexdigest(),
    }


def _ask(slot: pool.Slot, argv: Sequence[str], starter: Starter) -> int:
    """Have the slot's worker run a command.

    Raises:
        ProtocolError: no worker comes up, it breaks off, or it does not take the command.
    """
    return show(_reach(slot, starter), argv)


def show(worker: channel.Channel, argv: Sequence[str]) -> int:
    """Send a command to a worker and show what it prints; return the exit status.

    Raises:
        ProtocolError: the worker breaks off, or it does not take the command.
    """
    try:
        worker.socket.settimeout(None)
        worker.send({"argv": list(argv)})
        while True:
            message = worker.receive()
            if "text" in message:
                _write(message["stream"], message["text"].encode("utf-8", "surrogateescape"))
            elif "refused" in message:
                raise channel.ProtocolError(f"refuses ({message['refused']})")
            else:
                return int(message["status"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise channel.ProtocolError(f"the worker's answer is none ({error!r})") from error
    finally:
        worker.close()


def _reach(slot: pool.Slot, starter: Starter) -> channel.Channel:
    """Return a channel to the slot's worker. One of another identity, or that does not answer, is replaced."""
    record, wanted = slot.record(), identity()
    if record is not None and record["identity"] == wanted:
        try:
            return channel.connect(record["address"], slot.pool.secret)
        except channel.ProtocolError:
            pass  # It was idle for long, or was killed.
    starter.end(slot)
    starter.start(slot)
    record = slot.record()
    if record is None:
        raise channel.ProtocolError(f"the worker does not come up, see {slot.file('log')}")
    return channel.connect(record["address"], slot.pool.secret)


class Twins:
    """Starts a worker as this process's twin, on the same machine and with the same environment.

    Args:
        gpus: how many GPUs of its own the worker has for as long as it lives; 0 leaves it those of this process.
    """

    def __init__(self, gpus: int = 0) -> None:
        self.gpus = gpus

    def start(self, slot: pool.Slot) -> None:
        """See :class:`Starter`.

        The worker gets a session of its own, so that a signal to the client's group does not reach it, and no file of
        the client's: whoever reads what the client prints must not wait for the worker's end.

        Raises:
            EarlError: the machine has fewer GPUs than are asked for.
        """
        import subprocess

        slot.want(identity())
        taken, shown = self._take_gpus(slot.pool)
        command = [sys.executable, "-m", "earl", "worker", "--pool", slot.pool.path, "--name", slot.name]
        environment = {name: value for name, value in os.environ.items() if name != processes.WATCHED}
        with open(slot.file("log"), "ab") as log:
            started = subprocess.Popen(
                command,
                env=environment | shown,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                pass_fds=[lock.fileno() for lock in taken],
            )
        for lock in taken:  # From here on the worker holds them.
            lock.close()
        with started.stdout as listening:
            listening.readline()

    def _take_gpus(self, of: pool.Pool) -> tuple[list[IO[str]], dict[str, str]]:
        """Wait for GPUs, those of idle workers if need be; return their locks, and the variable that shows them."""
        if not self.gpus:
            return [], {}
        from earl.launchers import gpus

        taken = gpus.take(self.gpus, of.end_an_idle_worker)
        return list(taken.values()), gpus.shown(taken)

    def end(self, slot: pool.Slot) -> None:
        """See :class:`Starter`."""
        slot.end()


def _write(stream: int, data: bytes) -> None:
    while data:
        data = data[os.write(stream, data) :]


def _hold_output(found: pool.Pool, argv: Sequence[str]) -> None:
    _held.append(found.writing(argv))
    _held[-1].__enter__()


_held: list = []
"""Locks that last until this process ends."""
