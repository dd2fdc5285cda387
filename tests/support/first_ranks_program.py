"""What tests/integration/test_learner.py runs as several ranks: of all ranks the first ones train, in memory.

    forked_ranks.launch(3, "tests.support.first_ranks_program", <first ranks>, <config>, <run>, <iterations>)

Policies are written after the last iteration alone, and once more into <run>/several. Prints, by the first rank, what
every rank knows in the end, a line each that begins with "> ".
"""

import sys
from pathlib import Path

import torch

from earl.config.load import read
from earl.emu3 import saving
from earl.execution import processes, ranks, runtime
from earl.files.layout import Run
from earl.stages import train


def several(learner: train.Learner, path: Path, team: ranks.Ranks) -> str:
    """Write the policy in bfloat16 as several files; return the digest, found without writing."""
    saving.FILE_SIZE, saving.WRITERS = 75_000, 2
    arguments = learner.companions, torch.bfloat16, team
    digest = saving.save_policy(learner.policy, None, *arguments)
    with ranks.folder(path, team) as folder:
        saving.save_policy(learner.policy, folder, *arguments)
    return digest


def main(count: int, config_file: Path, run_path: Path, iterations: int) -> None:
    config, run = read(config_file), Run(run_path)
    with ranks.joined(runtime.prepare(config), train.splits_alone(config)) as world:
        team = world.first_ranks(count)
        told = "waits"
        if team is not None:
            learner = train.load(config, run, 0, team)
            for _ in range(iterations):
                train.step(config, run, learner, team, checkpoint=False)
            train.write_checkpoint(config, run, learner, team)
            total = sum(float(weight.double().sum()) for _, weight in learner.weights(torch.float32))
            told = f"{team.rank} of {team.size}: {total!r} {several(learner, run.path / 'several', team)}"
        found = world.gather(told)
        if world.first:
            print(*(f"> {each}" for each in found), sep="\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
    processes.end_at_once(0)
