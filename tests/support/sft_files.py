"""Fine-tunings of the tiny policy on made-up pairs."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from earl.config.schema import Config
from earl.data.grids import stored
from earl.emu3 import checkpoint
from earl.emu3.vocabulary import Vocabulary
from earl.files import manifest, tables
from earl.learner import sft

SHAPE = (2, 3)
SETTINGS = sft.Settings(
    steps=10, batch_size=5, micro_batch=8, learning_rate=1e-3, warmup_steps=2, seed=1, bfloat16=False
)


def plain_cross_entropy(batch, policy_folder):
    """One sequence at a time, logits of every token over the whole vocabulary, torch's own cross-entropy."""
    policy = checkpoint.load_policy(policy_folder, torch.float32, "cpu")
    total = 0.0
    for example in batch:
        ids = torch.from_numpy(np.concatenate([example.prompt, example.completion]))
        logits = policy(input_ids=ids[None]).logits[0, :-1]
        targets = ids[1:].clone()
        targets[: len(example.prompt) - 1] = -100
        total = total + F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    loss = total / sum(len(example.completion) for example in batch)
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in policy.named_parameters()}


def write_pairs(
    folder: Path, name: str, vocabulary: Vocabulary, rows: int = 10, long: tuple[int, ...] = (), reasoned: bool = True
) -> str:
    """Write a tokenised data set and return its path; the instructions of the rows `long` are 200 times as long."""
    file = folder / name / "0000.parquet"
    grids = np.random.default_rng(rows).integers(0, vocabulary.num_visual, (rows, 2, *SHAPE))
    columns = {
        "dataset": [name] * rows,
        "example_id": [str(i) for i in range(rows)],
        "task": [None] * rows,
        "instruction": [f"{name} {i}" * (200 if i in long else 1) for i in range(rows)],
        "reasoning": [[{"key": "box", "value": f"[0, 0, {i}, 8]"}] if reasoned else None for i in range(rows)],
        "original_tokens": [stored(pair[0], vocabulary.num_visual) for pair in grids],
        "target_tokens": [stored(pair[1], vocabulary.num_visual) for pair in grids],
        "original": [None] * rows,
        "target": [None] * rows,
    }
    tables.write_table(file, tables.TOKENISED, columns, {})
    manifest.seal(file.parent)
    return str(file.parent)


def config(folder: Path, policy: Path, data: str, packing: str = "groups", **tunings: dict) -> Config:
    """Return a configuration with these fine-tunings, each completed with what all share."""
    common = {"base_model": str(policy), "train_paths_file": [data], "coefficients": [1.0]}
    common |= {"steps": 16, "batch_size": 4, "learning_rate": 3e-3, "warmup_steps": 3, "random_seed": 1}
    return Config(
        run_name="run",
        base_exp_dir=str(folder / "runs"),
        train_paths_file=["unused"],
        val_paths_file=[],
        sft={name: common | fields for name, fields in tunings.items()},
        per_device_batch_size=3,
        packing=packing,
        max_response_tokens=64,
        model_context_size=256,
        engine="torch",
        judge="program",
        device="cpu",
        dtype="float32",
        cpu_threads=1,
    )
