"""The demo, cut down until tests can afford a whole run."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "config" / "demo.jsonnet"

SMALL = {
    "raw_datasets.shapes_sft.count": 32,
    "raw_datasets.shapes_rl.count": 24,
    "raw_datasets.shapes_heldout.count": 8,
    "sft.shapes.steps": 4,
    "sft.shapes.batch_size": 8,
    "episodes_per_iteration": 16,
    "generations_per_sample": 4,
    "per_device_batch_size": 8,
    "engine_batch_size": 4,
    "rollout_shards": 1,
    "train_processes": 1,
    "num_iterations": 2,
    "evaluations.heldout.prompts": 4,
    "evaluations.heldout_greedy.prompts": 4,
}
"""A whole run takes seconds: what it learns is of no interest, what it writes is."""

SHORT = {name: value for name, value in SMALL.items() if not name.startswith("evaluations.")}
SHORT |= {"evaluations": {}, "num_iterations": 2, "engine_batch_size": 16}
"""Shorter still, without evaluations, and all completions in one batch."""
