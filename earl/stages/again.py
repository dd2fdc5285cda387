"""Again: ask the failed judgements of a run's stored scores again, and nothing else.

It is for judgements that failed through no fault of theirs: a server that went away, answers that could not be read.
What was made from scores that change is out of date then; the next workflow makes it again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from earl import judges
from earl.config.load import read
from earl.files.layout import Run
from earl.run import claims, state
from earl.stages import rescore, score


@dataclass(frozen=True)
class Asked:
    """A file of scores in which judgements had failed, and how many still have."""

    scores: Path
    failed: int
    still: int


def run(run_path: Path, iterations: Sequence[int] = (), evaluations: Sequence[str] = ()) -> Iterator[Asked]:
    """Ask again, file by file; yield each file that had failed judgements once it is written.

    Args:
        iterations: Only of these iterations; none: of all.
        evaluations: Only of these evaluations; none: of training and of every evaluation.

    Raises:
        EarlError: a workflow is working on the run; see also `earl.stages.score.run_again`.
    """
    files = Run(Path(run_path))
    config = read(files.config)
    claims.claim(config, "score")
    with state.exclusive(files):
        judge = judges.get(config)
        for each in rescore.stored(files, files.path, iterations, evaluations):
            # A replay reads the scores of another run, which are not its own to change.
            if each.before.is_relative_to(files.path):
                failed, still = score.run_again(config, each.rollouts, each.before, judge)
                if failed:
                    yield Asked(each.before, failed, still)
