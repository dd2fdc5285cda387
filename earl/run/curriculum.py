"""A curriculum: which prompts an iteration passes over, since their last groups taught nothing.

The ledger of an iteration is a pure function of `train/episodes.parquet` of the iterations before it, of as many as
`curriculum.rest_iterations`: what is older has no say. Prompts are told apart by what the policy sees of them
(`earl.emu3.sequence.digest`), not by names that a data set may give twice.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from earl.files import tables
from earl.files.layout import Run
from earl.messages.errors import EarlError

if TYPE_CHECKING:
    from earl.config.schema import Config
    from earl.config.sections import Curriculum


@dataclass(frozen=True)
class Ledger:
    """The prompts that rest in an iteration, by their digests."""

    resting: frozenset[str]

    @property
    def digest(self) -> str:
        return hashlib.sha256("\n".join(sorted(self.resting)).encode()).hexdigest()


def ledger(config: "Config", run: Run, iteration: int) -> Ledger | None:
    """Return what the iterations before one say, each of which has been trained; None where there is no curriculum.

    Raises:
        EarlError: the episodes of one are missing, damaged or of a version that did not tell prompts apart.
    """
    if config.curriculum is None:
        return None
    check(config, run, iteration, iteration - 1)
    last: dict[str, bool] = {}  # whether the last groups of a prompt were of no use
    for index in range(iteration - 1, _first(config.curriculum, iteration) - 1, -1):
        found: dict[str, bool] = {}
        for prompt, useless in _groups(run.iteration(index).episodes, config.curriculum):
            found[prompt] = found.get(prompt, True) and useless
        last = found | last
    return Ledger(frozenset(prompt for prompt, useless in last.items() if useless))


def check(config: "Config", run: Run, first: int, newest: int) -> None:
    """Check that the episodes are there which ledgers are made of, those of iteration ``first`` and of later ones.

    Args:
        newest: the newest iteration that has been trained. From ``first`` on, those without metrics are made anew.

    Raises:
        EarlError: they are not.
    """
    for index in range(_first(config.curriculum, first), newest + 1) if config.curriculum else ():
        current = run.iteration(index)
        if not current.episodes.is_file() and (index < first or current.metrics.is_file()):
            raise EarlError(
                f"{current.episodes}: is missing, but curriculum goes by it; earl rewind --run {run.path} --iteration "
                f"{index} has it trained again"
            )


def _first(curriculum: "Curriculum", iteration: int) -> int:
    """Return the first iteration that the ledger of one is made of."""
    return max(1, iteration - curriculum.rest_iterations)


def _groups(episodes: Path, curriculum: "Curriculum") -> Iterator[tuple[str, bool]]:
    """Yield each group's prompt, and whether the group was of no use."""
    columns = ["group_id", "prompt_digest", "reward", "advantage"]
    groups: dict[str, list[dict]] = {}
    for row in tables.read_table(episodes, tables.EPISODES, columns).to_pylist():
        groups.setdefault(row["group_id"], []).append(row)
    for rows in groups.values():
        rewards = [row["reward"] for row in rows if row["reward"] is not None]
        # Components of a reward may differ where their sum does not, and have advantages then.
        alike = len(rewards) > 1 and len(set(rewards)) == 1 and not any(row["advantage"] for row in rows)
        yield rows[0]["prompt_digest"], alike or not curriculum.allows(rewards)
