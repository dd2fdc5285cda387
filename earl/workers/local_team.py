"""Ranks that a learner's worker starts on its machine and keeps for its next commands, instead of torchrun's."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from signal import Signals

from earl import residents
from earl.launchers import child, local
from earl.workers import RANKS, channel, client, pool


def run(argv: Sequence[str], size: int) -> int | None:
    """Run a command by as many ranks, which stay; return its exit status, or None where they cannot do it.

    They take the place of the learner that this process itself may have kept, and of ranks of another number.
    """
    residents.take("reference", None)
    try:
        return residents.get("learner", (RANKS, size), lambda: LocalTeam(size)).run(argv)
    except channel.ProtocolError as error:
        print(f"{size} ranks that stay: {error}; starting others", file=sys.stderr)
        residents.take("learner", None)
        return None


class LocalTeam:
    """A worker of several ranks, all children of this process."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._pool = pool.Pool(os.environ[pool.VARIABLE])
        self._slot = self._pool.slot(RANKS)
        self._ranks: list[subprocess.Popen] = []

    def run(self, argv: Sequence[str]) -> int:
        """Run a command, by new ranks where there are none any more: they end when idle for long, or with one of them.

        Raises:
            ProtocolError: they do not come up, or end for no reason that can be told.
        """
        worker = self._reach()
        try:
            return client.show(worker, argv)
        except channel.ProtocolError:
            # Of any other rank's end the first one tells.
            with contextlib.suppress(subprocess.TimeoutExpired):
                if (status := self._ranks[0].wait(pool.GRACE)) < 0:
                    print(f"error: rank 0 of {self.size} was ended by {Signals(-status).name}", file=sys.stderr)
                    return 1
            raise

    def _reach(self) -> channel.Channel:
        if self._ranks:
            with contextlib.suppress(channel.ProtocolError):
                return self._connect()
        self._end()
        self._start()
        return self._connect()

    def _connect(self) -> channel.Channel:
        record = self._slot.record()
        if record is None:
            raise channel.ProtocolError(f"they do not come up, see {self._slot.file('log')}")
        return channel.connect(record["address"], self._pool.secret)

    def _start(self) -> None:
        """Start all, and wait until the first of them listens, which it does when all are there, or one ends."""
        command = [sys.executable, "-m", "earl", "worker", "--pool", self._pool.path, "--name", self._slot.name]
        with open(self._slot.file("log"), "ab") as log:
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            self._ranks = [child.start(command, variables, **streams) for variables in local.rank_variables(self.size)]
        while self._slot.record() is None and all(rank.poll() is None for rank in self._ranks):
            time.sleep(0.05)

    def _end(self) -> None:
        for rank in self._ranks:
            child.end(rank)
            rank.wait()
        self._ranks = []
        self._slot.clear()

    def close(self) -> None:
        """End all ranks."""
        self._end()
        self._slot.release()
