"""What tests/integration/test_ranks.py runs as several ranks: steps on episodes in memory, by every way to cut them up.

    forked_ranks.launch(3, "tests.support.ranks_program", <policy folder>, <out>)

Writes the metrics of each case as <out>/<case>.json, and the policy after its step beside it.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from earl.emu3 import saving
from earl.emu3.adapter import Lora
from earl.emu3.vocabulary import Vocabulary
from earl.execution import processes, ranks
from earl.execution.ranks import Ranks
from earl.files import atomic
from earl.learner import grpo, head, logprobs, objective, sharding
from earl.learner.batches import Episode
from earl.learner.settings import Settings

GROUPS, SAMPLES = 5, 2
CASES = {
    "padded, micro-batch 8": {"micro_batch": 8},
    "padded, micro-batch 1": {"micro_batch": 1},
    "packed, micro-batch 3": {"micro_batch": 3, "packed": True, "entropy_coeff": 0.1},
    "two steps, recomputed": {"micro_batch": 2, "optimizer_steps": 2, "gradient_checkpointing": True, "packed": True},
    "text only": {"micro_batch": 2, "counted": "text", "normalization": "sequences", "entropy_coeff": 0.1},
    "bfloat16": {"micro_batch": 3, "bfloat16": True, "entropy_coeff": 0.1},
    "adapter, two steps, recomputed": {"micro_batch": 2, "optimizer_steps": 2, "gradient_checkpointing": True},
    "adapter, bfloat16": {"micro_batch": 3, "bfloat16": True, "packed": True},
}
BY_BLOCKS = ("packed, micro-batch 3", "bfloat16", "adapter, bfloat16")
"""Cases whose logits are computed in several blocks."""
BLOCK = head.TOKENS, head.IDS


def episodes(vocabulary: Vocabulary) -> list[Episode]:
    """Groups of two completions of unequal length; of some no token counts."""
    return [_episode(group, sample, vocabulary) for group in range(GROUPS) for sample in range(SAMPLES)]


def _episode(group: int, sample: int, vocabulary: Vocabulary) -> Episode:
    prompt = np.random.default_rng(group).integers(0, vocabulary.size, 9 + group)
    completion = np.random.default_rng([group, sample]).integers(0, vocabulary.size, 5 + 2 * sample + group)
    forced = np.full(len(completion), group == 3 and sample == 0) | (np.arange(len(completion)) == 2)
    behavior = np.full(len(completion), -2.0 - sample, dtype=np.float32)
    names = f"{group:04d}-{sample:02d}", f"{group:04d}"
    return Episode(*names, prompt, completion, forced, behavior, (-1.0) ** sample * (1 + group))


def settings(vocabulary: Vocabulary, **changes) -> Settings:
    visual = vocabulary.first_visual, vocabulary.size
    plain = Settings(0.05, 1.0, 3, visual, logprobs.split_vocab(visual), "all", False)
    return replace(plain, options=objective.Options(ratio=True, clip_low=0.2, clip_high=0.2), **changes)


def step(policy_folder: Path, case: str, team: Ranks, out: Path) -> None:
    """An iteration of a case: its metrics and the policy that comes of it."""
    vocabulary = Vocabulary.from_folder(policy_folder)
    chosen = settings(vocabulary, **CASES[case])
    head.TOKENS, head.IDS = (7, 50) if case in BY_BLOCKS else BLOCK
    lora = Lora(3, 6) if case.startswith("adapter") else None
    if lora:
        policy = reference = sharding.load_with_adapter(policy_folder, lora, 0, team, chosen.bfloat16)
    else:
        policy = sharding.load(policy_folder, team, chosen.bfloat16)
        reference = sharding.load(policy_folder, team, chosen.bfloat16, frozen=True, offload=case.startswith("padded"))
    optimizer = grpo.new_optimizer(policy, 1e-3)
    metrics = grpo.train_iteration(policy, reference, optimizer, episodes(vocabulary), chosen, case, team)
    if team.first:
        atomic.write_text(out / f"{case}.json", json.dumps(metrics))
    with ranks.folder(out / case, team) as folder:
        saving.save_policy(policy, folder, saving.companions(policy_folder), torch.float32, team, lora)


def main(policy_folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    device = torch.device("cpu")
    if ranks.is_launched():
        with ranks.joined(device, splits_alone=True) as team:
            for case in CASES:
                step(policy_folder, case, team, out)
        return
    for case, changes in CASES.items():
        with ranks.joined(device, splits_alone=changes.get("bfloat16", False)) as team:
            step(policy_folder, case, team, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    processes.end_at_once(0)
