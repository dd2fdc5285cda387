"""`earl doctor`: what a stage would find on this node, checked before a run depends on it.

Runs as one process, or as one of several ranks (`--processes`, or torchrun), which are then checked together: do they
reach each other, have a GPU each, see each other's files and locks, and have the same versions and time. A check
returns whether it passed, None where there was nothing to check, and what it saw.
"""

import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from earl.doctor import judge, machine, network, together
from earl.doctor.wanted import Wanted
from earl.messages.redaction import redacted


@dataclass(frozen=True)
class Finding:
    """What a check found."""

    check: str
    passed: bool | None
    detail: str


def examine(wanted: Wanted) -> list[tuple[str, Finding]]:
    """Run all checks and return each finding with where it was made.

    Rank 0 gets those of all ranks and the others their own; where the ranks do not reach each other, each its own.
    """
    ranks = together.Ranks()
    checks: dict[str, Callable[[], tuple[bool | None, str]]] = {
        "network": network.check,
        "all reduce": lambda: together.all_reduce(ranks),
        "versions": lambda: together.versions(ranks),
        "gpus": lambda: machine.gpus(wanted),
        "memory": lambda: machine.memory(wanted),
        "shared memory": lambda: machine.shared_memory(wanted),
        "disk": lambda: machine.disk(wanted),
        "clock": lambda: together.clock(wanted, ranks),
        "shared files": lambda: together.shared_files(wanted, ranks),
        "judge": lambda: judge.check(wanted),
    }
    if ranks.count == 1:
        checks["fit"] = lambda: machine.fit(wanted)  # Ranks do not wait for each other as long as that takes.
    place = f"{socket.gethostname()} rank {ranks.rank}" if ranks.count > 1 else socket.gethostname()
    mine = [(place, guarded(name, check)) for name, check in checks.items()]
    try:
        everywhere = ranks.gather(mine)
    except RuntimeError:
        everywhere = [mine]
    ranks.disconnect()
    return [item for findings in everywhere for item in findings] if ranks.rank == 0 else mine


def fit(wanted: Wanted) -> list[tuple[str, Finding]]:
    """Return whether stages fit on this node's GPUs: what ranks leave out of `examine`."""
    return [(socket.gethostname(), guarded("fit", lambda: machine.fit(wanted)))]


def guarded(name: str, check: Callable[[], tuple[bool | None, str]]) -> Finding:
    """Run a check; what it raises is what it found."""
    try:
        return Finding(name, *check())
    except Exception as error:
        # Whatever a broken node raises is what is to be reported.
        return Finding(name, False, redacted(f"{type(error).__name__}: {error}"))


def table(found: Iterable[tuple[str, Finding]]) -> str:
    """Return findings as lines for a terminal."""
    marks = {True: "ok", False: "FAILED", None: "-"}
    return "\n".join(f"{place:<20} {item.check:<13} {marks[item.passed]:<7} {item.detail}" for place, item in found)
