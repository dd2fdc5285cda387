"""A worker that is several ranks: the first takes commands as any worker does, all run them, and all end together.

Rank 0 has a connection to each of the others, which need not be on its machine (`channel`; they find it by the store
that torch.distributed's ranks meet at). One way go command lines; the other way goes what a rank printed, and its exit
status. A connection that breaks off is a process that has ended, and ends the one at its other side. So no rank is left
behind, and none waits in a sum for one that is gone.
"""

import collections
import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from earl.execution import ranks
from earl.workers import TOGETHER, channel
from earl.workers.output import Output

Stage = Callable[[Sequence[str]], int]
"""Runs a command line and returns its exit status."""
Said = Iterable[tuple[int, bytes]]
"""Standard output (1) or error (2), and what was written there."""

_ADDRESS = "leader"
"""Where the store has rank 0's address."""
_PARTS = 64
"""Messages of output that are held for a rank; before them, what it printed is dropped."""
_MOMENT = 1.0
"""Seconds in which the end of a process shows on all its connections."""
_LOOPBACK = ("127.0.0.1", "localhost")


class Leader:
    """Rank 0's side."""

    def __init__(self, secret: bytes) -> None:
        """Wait until all other ranks are here.

        Args:
            secret: the pool's, which they have to know.
        """
        store, _, self.size = ranks.meeting()
        host = os.environ["MASTER_ADDR"]
        # A name may lead to another address here than elsewhere; a stranger gets nowhere without the secret.
        listener, address = channel.listen(f"tcp:{host if host in _LOOPBACK else ''}:0")
        store.set(_ADDRESS, f"tcp:{host}:{address.rpartition(':')[2]}")
        others: dict[int, _Other] = {}
        with listener:
            while len(others) < self.size - 1:
                connection, _ = listener.accept()
                with contextlib.suppress(channel.ProtocolError, KeyError):
                    other = _Other(channel.accept(connection, secret))
                    others[other.rank] = other
        self._others = [others[rank] for rank in sorted(others)]
        self._changed = threading.Condition()

    def watch(self, failed: Callable[[Said, int], None]) -> None:
        """From here on call `failed` once another rank has failed or ended, with what is to be told and the status.

        It is called in a thread of its own, and has to end this process.
        """
        for other in self._others:
            threading.Thread(target=self._hear, args=(other, failed), name=f"rank-{other.rank}", daemon=True).start()

    def run(self, argv: Sequence[str], stage: Stage) -> int:
        """Run a command on all ranks; return 0 if all say so, or this rank's failure, which it has told itself.

        Where another rank fails this does not return: see `watch`.
        """
        if argv[0] not in TOGETHER:
            return stage(argv)
        for other in self._others:
            other.is_done = False
            with contextlib.suppress(channel.ProtocolError):  # Its thread notices, too.
                other.channel.send({"argv": list(argv)})
        status = stage(argv)
        if status == 0:
            self._wait_for(lambda: all(other.is_done for other in self._others))
            self._show_what_others_said()
        elif self._wait_for(lambda: any(other.is_gone for other in self._others), _MOMENT):
            time.sleep(ranks.PATIENCE)  # This rank failed since it lost that one, which is what is being told.
        return status

    def _wait_for(self, condition: Callable[[], bool], seconds: float | None = None) -> bool:
        with self._changed:
            return self._changed.wait_for(condition, seconds)

    def _show_what_others_said(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        for other in self._others:
            for stream, data in other.said:
                os.write(stream, data)
            other.said.clear()

    def _hear(self, other: "_Other", failed: Callable[[Said, int], None]) -> None:
        try:
            status, told = other.listen(self._changed)
        except channel.ProtocolError:
            with self._changed:
                other.is_gone = True
                self._changed.notify_all()
            failed([(2, f"error: rank {other.rank} of {self.size} is gone\n".encode())], 1)
        else:
            if not told:
                time.sleep(ranks.PATIENCE)  # Rank 0 meets the same, which it says and ends.
            failed(other.said, status)


class _Other:
    """Another rank, as rank 0 knows it."""

    def __init__(self, connection: channel.Channel) -> None:
        """Raises ProtocolError or KeyError where it does not say which rank it is."""
        self.channel = connection
        self.rank = int(connection.receive()["rank"])
        connection.socket.settimeout(None)
        self.said: collections.deque[tuple[int, bytes]] = collections.deque(maxlen=_PARTS)
        self.is_done = True
        self.is_gone = False

    def listen(self, changed: threading.Condition) -> tuple[int, bool]:
        """Take in what it says until a command fails; return the status, and whether this rank is to tell of it.

        Raises:
            ProtocolError: it has ended.
        """
        while True:
            message = self.channel.receive()
            if "text" in message:
                self.said.append((message["stream"], message["text"].encode("utf-8", "surrogateescape")))
            elif message["status"]:
                return message["status"], message["tells"]
            else:
                with changed:
                    self.is_done = True
                    changed.notify_all()


def follow(secret: bytes, log: str, stage: Stage) -> NoReturn:
    """Be a rank other than the first: run what rank 0 hands on, until rank 0 ends.

    Args:
        secret: the pool's.
        log: file for what is printed between commands.
    """
    store, rank, _ = ranks.meeting()
    leader = channel.connect(store.get(_ADDRESS).decode(), secret)
    leader.send({"rank": rank})
    leader.socket.settimeout(None)
    _Follower(leader, stage).work(log)


class _Follower:
    """The side of any other rank."""

    def __init__(self, leader: channel.Channel, stage: Stage) -> None:
        self.leader, self.stage = leader, stage
        self.output = Output(self.end)
        self.busy = False
        self.commands: queue.SimpleQueue[list[str]] = queue.SimpleQueue()

    def work(self, log: str) -> NoReturn:
        self.output.capture(log)
        threading.Thread(target=self._take_commands, name="end-with-leader", daemon=True).start()
        while True:
            argv = self.commands.get()
            self.output.receiver = self.leader
            status = self.stage(argv)
            self.output.drain()
            self.output.receiver = None
            self.busy = bool(status)
            with contextlib.suppress(channel.ProtocolError):  # The other thread notices, too.
                self.leader.send({"status": status, "tells": bool(status) and ranks.failed_together()})

    def _take_commands(self) -> None:
        with contextlib.suppress(channel.ProtocolError):
            while True:
                argv = self.leader.receive()["argv"]
                self.busy = True
                self.commands.put(argv)
        self.end()

    def end(self) -> NoReturn:
        os._exit(int(self.busy))
