"""A worker of several ranks whose stage does what its command line says, to see what ranks do among each other.

    RANK=... WORLD_SIZE=... MASTER_ADDR=... MASTER_PORT=... python -m tests.support.team_program <pool> <name>

A word of the command line is ``<rank>:<deed>``: say, fail, fail-together (after all have joined, as the first to
fail), wait (for ever), die.
"""

import os
import signal
import sys
import threading

from earl.execution import ranks
from earl.workers import server


def stage(argv: list[str]) -> int:
    rank = os.environ["RANK"]
    for word in argv[1:]:
        who, deed = word.split(":")
        if who == rank:
            status = do(deed, rank)
            if status:
                return status
    return 0


def do(deed: str, rank: str) -> int:
    if deed == "wait":
        threading.Event().wait()
    elif deed == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif deed == "say":
        print(f"rank {rank} speaks")
    else:
        if deed == "fail-together":
            ranks._is_first_to_fail(ranks.meeting()[0])
        print(f"error: rank {rank} fails", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    server.run = stage
    server.serve(*sys.argv[1:])
