"""What tests/integration/test_sft_ranks.py runs as several ranks: a step of gradient descent as long as the gradient.

    forked_ranks.launch(3, "tests.support.sft_ranks_program", <policy folder>, <out>)

Adam would hide a gradient that is a multiple of the right one. Writes the loss of each case as <out>/<case>.json, and
the policy after its step beside it.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from earl.emu3 import saving
from earl.emu3.vocabulary import Vocabulary
from earl.execution import processes, ranks
from earl.execution.ranks import Ranks
from earl.files import atomic
from earl.learner import grpo, sft, sharding

SETTINGS = sft.Settings(
    steps=1, batch_size=4, micro_batch=1, learning_rate=1.0, warmup_steps=0, seed=1, bfloat16=False,
    max_gradient_norm=None,
)  # fmt: skip
BOUND = 0.01
"""Norm that the gradient is clipped to in the case `clipped`; in the others it is as long as it comes."""
CASES = {
    "padded": {},
    "packed": {"packed": True, "micro_batch": 2, "gradient_checkpointing": True},
    "clipped": {"max_gradient_norm": BOUND},
    "fewer sequences than ranks": {"batch_size": 2},
    "dpo": {"dpo_beta": 0.5, "micro_batch": 2},
    "dpo_packed": {"dpo_beta": 0.5, "micro_batch": 2, "packed": True},
}


def examples(vocabulary: Vocabulary, count: int, pairs: bool) -> list[sft.Example]:
    """Sequences whose completions have 2, 11, 20, 29 ... tokens: no two ranks have as many.

    In pairs the worse ones have 7 tokens.
    """
    rng = np.random.default_rng(0)
    found = [
        sft.Example(rng.integers(0, vocabulary.size, 6), rng.integers(0, vocabulary.size, 2 + 9 * place))
        for place in range(count)
    ]
    return [replace(one, rejected=rng.integers(0, vocabulary.size, 7)) for one in found] if pairs else found


def step(policy_folder: Path, case: str, team: Ranks, out: Path) -> None:
    settings = replace(SETTINGS, **CASES[case])
    policy = sharding.load(policy_folder, team, bfloat16=False)
    reference = sharding.load(policy_folder, team, bfloat16=False, frozen=True) if settings.dpo_beta else None
    batch = examples(Vocabulary.from_folder(policy_folder), settings.batch_size, pairs=reference is not None)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    with grpo.ready_to_learn(policy, settings.objective):
        loss, *_ = sft.train_step(policy, optimizer, batch, settings, 0, team, reference)
    with ranks.folder(out / case, team) as folder:
        saving.save_policy(policy, folder, saving.companions(policy_folder), team=team)
    if team.first:
        atomic.write_text(out / f"{case}.json", json.dumps(loss))


def steps(policy_folder: Path, out: Path) -> None:
    """Take the step of each case, as one rank of those there are."""
    with ranks.joined(torch.device("cpu")) as team:
        for case in CASES:
            step(policy_folder, case, team, out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    steps(Path(sys.argv[1]), Path(sys.argv[2]))
    processes.end_at_once(0)
