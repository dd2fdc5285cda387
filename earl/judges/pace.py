"""How fast a server is asked: as many questions at once as it bears, and one pause for all when it says to wait.

The limit follows TCP's rule (AIMD): halved when the server is overloaded, once for all questions that were under way
then, and raised by a sixteenth of the most for every round of answers. Time is the event loop's.
"""

import asyncio
import heapq
import itertools
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

LEAST = 1.0


class Pace:
    """Lets questions pass, those first that were tried least, so that none that cannot be answered holds up the others.

    Args:
        most: questions under way at most.
        pause: seconds of the first pause of an overloaded server that names none, and of the longest.
    """

    def __init__(self, most: int, pause: tuple[float, float]) -> None:
        self.limit = float(most)
        self.served = asyncio.get_running_loop().time()
        """When the server last dealt with a question, whatever it said."""
        self._most, self._pause = most, pause
        self._busy, self._streak = 0, 0
        self._until = self._lowered = float("-inf")
        self._queue: list[tuple[int, int, int, asyncio.Future[None]]] = []
        self._counter = itertools.count()

    @asynccontextmanager
    async def turn(self, tries: int, index: int) -> AsyncIterator[None]:
        """Wait until a question may be asked; it counts as under way until the block ends."""
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._queue, (tries, index, next(self._counter), place))
        self._admit()
        try:
            await place
            yield
        finally:
            if place.done() and not place.cancelled():
                self._busy -= 1
            self._admit()

    def overloaded(self, started: float, wish: float | None = None) -> None:
        """Ask less from here on, and nothing for a while.

        Args:
            started: when the try began that met an overloaded server.
            wish: seconds that the server wants to be left alone. Where it has answered no one since the last pause, the
                next is twice as long, whatever it wishes.
        """
        now = asyncio.get_running_loop().time()
        self.lower(started)
        first, longest = self._pause
        pause = max(wish or 0.0, min(longest, first * 2.0 ** min(self._streak - 1, 30)))
        # Clients that were told the same do not all come back at once.
        self._until = max(self._until, now + pause * (1 + random.random() / 10))
        asyncio.get_running_loop().call_at(self._until, self._admit)

    def lower(self, started: float) -> None:
        """Halve the limit, unless that was done since a try began."""
        if started > self._lowered:
            self.limit = max(LEAST, min(self.limit, self._busy) / 2)
            self._lowered = asyncio.get_running_loop().time()
            self._streak += 1

    def answered(self) -> None:
        """Note that the server has dealt with a question, and raise the limit a little."""
        self.limit = min(float(self._most), self.limit + max(1.0, self._most / 16) / self.limit)
        self.served, self._streak = asyncio.get_running_loop().time(), 0

    def _admit(self) -> None:
        if asyncio.get_running_loop().time() < self._until:
            return
        while self._queue and self._busy < int(self.limit):
            *_, place = heapq.heappop(self._queue)
            if not place.done():
                self._busy += 1
                place.set_result(None)
