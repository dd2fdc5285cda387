"""Makes the files of small evaluations, for the tests of the stages that read them."""

import json
from functools import cache
from pathlib import Path

import numpy as np

from earl.config import load
from earl.config.schema import Config
from earl.files import images, manifest, tables
from earl.stages import evaluate

ROOT = Path(__file__).parents[2]
ALL = ("edit_success", "overedit", "naturalness", "artifacts")


def demo_config(**overrides) -> Config:
    return _demo(json.dumps(overrides)).model_copy(deep=True)


@cache
def _demo(overrides: str) -> Config:
    return load.load(ROOT / "config" / "demo.jsonnet", json.loads(overrides)).config


def episode(prompt: int, scores: float | tuple | None, sample: int = 0, **other) -> dict:
    """One episode; ``scores`` are the four sub-scores (or one for all of them), None where nothing was judged."""
    scores = scores if isinstance(scores, tuple) else (scores,) * 4
    blank = images.struct(images.encode(np.full((4, 4, 3), prompt, np.uint8)))
    row = {
        "episode_id": f"p-{prompt:04d}-{sample:02d}",
        "group_id": f"p-{prompt:04d}",
        "sample_index": sample,
        "dataset": "heldout",
        "example_id": f"e{prompt}",
        "task": "add",
        "instruction": f"Instruction {prompt}",
        "prompt_token_ids": [1],
        "completion_token_ids": [2, 3],
        "behavior_logprobs": [-1.0, -1.0],
        "finish_reason": "stop",
        "completion_text": "",
        "original": blank,
        "target": blank,
        "edited": blank,
        "status": "ok",
        "ground_score": None,
        "raw": None,
        "judge": "program",
    }
    return row | dict(zip(ALL, scores, strict=True)) | other


def write_inputs(folder: Path, iteration: int, episodes: list[dict], reverse: bool = False) -> tuple[Path, Path]:
    """Write rollouts and scores; with ``reverse`` the scores stand in the opposite order."""
    folder.mkdir(parents=True, exist_ok=True)
    rollouts, scores = folder / f"{iteration:06d}.rollouts.parquet", folder / f"{iteration:06d}.scores.parquet"
    columns = {name: [row[name] for row in episodes] for name in tables.ROLLOUTS.names}
    tables.write_table(rollouts, tables.ROLLOUTS, columns, {"policy_digest": "ab12", "run": "r"}, largest_token=300)
    judged = episodes[::-1] if reverse else episodes
    columns = {name: [row[name] for row in judged] for name in tables.SCORES.names}
    tables.write_table(scores, tables.SCORES, columns, {"rollouts_digest": manifest.digest_file(rollouts)})
    return rollouts, scores


def write_evaluation(run: Path, name: str, iteration: int, episodes: list[dict], config: Config) -> Path:
    folder = run / "evaluations" / name
    rollouts, scores = write_inputs(folder, iteration, episodes)
    evaluate.run(config, name, iteration, rollouts, scores, folder / f"{iteration:06d}.parquet")
    return folder / f"{iteration:06d}.parquet"
