"""Runs for the train stage: a tiny random policy and made-up rollouts and scores."""

import json
from pathlib import Path

import numpy as np

from earl.config import freeze
from earl.config.schema import Config
from earl.emu3 import sequence
from earl.files import images, manifest, tables
from earl.files.layout import Run
from earl.stages import train

GROUPS, SAMPLES = 4, 2
SHAPE = (2, 3)
INSTRUCTIONS = ("paint it red", "remove the large blue circle", "swap them", "add a square below")
PIXEL = images.struct(images.encode(np.zeros((8, 8, 3), dtype=np.uint8)))


def make_config(folder: Path, **changes) -> Config:
    values = {
        "run_name": "run",
        "base_exp_dir": str(folder),
        "train_paths_file": ["unused.parquet"],
        "val_paths_file": [],
        "model_path": "unused",
        "assistant_prefill": "<|image start|>",
        "learning_rate": 1e-5,
        "kl_coeff": 0.01,
        "per_device_batch_size": 3,
        "episodes_per_iteration": GROUPS * SAMPLES,
        "generations_per_sample": SAMPLES,
        "max_response_tokens": 64,
        "model_context_size": 256,
        "engine": "torch",
        "engine_batch_size": SAMPLES,
        "judge": "program",
        "device": "cpu",
        "dtype": "float32",
        "cpu_threads": 1,
        "max_failed_fraction": 0.25,
        "parity_tolerance": None,  # most behaviour log-probs here are made up
    }
    return Config(**(values | changes))


def new_run(folder: Path, policy: Path, name: str = "run", **changes) -> tuple[Config, Run]:
    """Make a run folder with a frozen configuration and the starting policy."""
    run = Run(folder / name)
    config = make_config(folder, **changes)
    run.iteration(0).path.mkdir(parents=True)
    run.iteration(0).policy.symlink_to(policy)
    freeze.write(config, run.config)
    return config, run


def write_inputs(run: Run, iteration: int, vocabulary, shards: int = 1, edit=lambda row: None) -> None:
    """Write the rollouts and scores of an iteration in `shards` files; `edit` changes a row (both tables' columns)."""
    rows = [made_up_row(iteration, group, sample, vocabulary) for group in range(GROUPS) for sample in range(SAMPLES)]
    for row in rows:
        edit(row)
    size = len(rows) // shards
    current = run.iteration(iteration)
    policy_digest = manifest.digest_folder(run.iteration(iteration - 1).policy)
    for shard in range(shards):
        part = rows[shard * size : (shard + 1) * size]
        columns = {name: [row[name] for row in part] for name in {*tables.ROLLOUTS.names, *tables.SCORES.names}}
        metadata = {"run": "run", "iteration": str(iteration), "shard": str(shard), "policy_digest": policy_digest}
        tables.write_table(current.rollouts(shard), tables.ROLLOUTS, columns, metadata, vocabulary.size - 1)
        write_scores(run, iteration, shard, columns)


def write_scores(run: Run, iteration: int, shard: int, columns: dict[str, list], **more: str) -> None:
    current = run.iteration(iteration)
    metadata = {"rollouts_digest": manifest.digest_file(current.rollouts(shard)), **more}
    tables.write_table(current.scores(shard), tables.SCORES, columns, metadata)


def made_up_row(iteration: int, group: int, sample: int, vocabulary) -> dict:
    rng = np.random.default_rng([iteration, group, sample])
    original = np.random.default_rng([iteration, group]).integers(0, vocabulary.num_visual, SHAPE)
    prompt = sequence.prompt_ids(original, INSTRUCTIONS[group], "<|image start|>", vocabulary)
    image = sequence.image_ids(rng.integers(0, vocabulary.num_visual, SHAPE), vocabulary)
    completion = [*image[1:], vocabulary.eos]
    scores = rng.integers(0, 11, 5).tolist()
    return {
        "episode_id": f"{iteration:06d}-{group:04d}-{sample:02d}",
        "group_id": f"{iteration:06d}-{group:04d}",
        "sample_index": sample,
        "dataset": "made up",
        "example_id": str(group),
        "task": None,
        "instruction": INSTRUCTIONS[group],
        "prompt_token_ids": prompt,
        "completion_token_ids": completion,
        "behavior_logprobs": [-1.0] * len(completion),
        "finish_reason": "stop",
        "completion_text": "",
        "original": PIXEL,
        "target": None,
        "edited": PIXEL,
        "status": "ok",
        **dict(zip(("edit_success", "overedit", "naturalness", "artifacts", "ground_score"), scores, strict=True)),
        "raw": "",
        "judge": "hand",
    }


def made_of(run: Run, iteration: int) -> dict[str, str]:
    """Digests of everything that training an iteration leaves behind, but the names of its input files."""
    current = run.iteration(iteration)
    metrics = json.loads(current.metrics.read_text())
    del metrics["inputs"]
    return {
        "policy": manifest.digest_folder(current.policy),
        "trainer": manifest.digest_folder(current.trainer),
        "episodes": manifest.digest_file(current.episodes),
        "metrics": json.dumps(metrics),
    }


def train_iterations(config: Config, run: Run, vocabulary, count: int, shards: int = 1) -> None:
    for iteration in range(1, count + 1):
        write_inputs(run, iteration, vocabulary, shards)
        train.run(config, run.path, iteration)
