"""A run of six iterations whose files have a few bytes, for the tests of what holds a run together."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from earl import code_version
from earl.config.freeze import config_digest, frozen_text
from earl.config.schema import Config
from earl.files import manifest
from earl.files.layout import Run
from earl.run import state, verify


def make_config(tmp_path: Path, **fields: object) -> Config:
    defaults = {
        "run_name": "a", "base_exp_dir": str(tmp_path), "train_paths_file": [str(tmp_path / "train.parquet")],
        "val_paths_file": [str(tmp_path / "held_out.parquet")], "judge": "program", "num_iterations": 6,
        "keep_checkpoints_every_n_iterations": None, "save_checkpoints_every_n_iterations": None,
        "vision_tokenizer_path": "package:shapes/vision_tokenizer",
    }  # fmt: skip
    return Config.model_validate(defaults | fields)


def checkpoint(run: Run, index: int) -> str:
    """Write a complete checkpoint; return the policy's digest."""
    for folder in (run.iteration(index).policy, run.iteration(index).trainer):
        folder.mkdir(parents=True)
        (folder / "weights").write_text(f"{folder.name} {index}")
        manifest.seal(folder)
    return manifest.digest_folder(run.iteration(index).policy)


def write(tmp_path: Path, **fields: object) -> Run:
    """Write the run with all its checkpoints, as stages leave it."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    for name in ("train", "held_out"):
        (tmp_path / f"{name}.parquet").write_text("prompts")
    config = make_config(tmp_path, **fields)
    made = Run(tmp_path / "a")
    state.start(made, model)
    made.config.write_text(frozen_text(config))
    policy = manifest.digest_folder(model)
    for index in range(1, 7):
        iteration = made.iteration(index)
        for path in (iteration.rollouts(0), iteration.scores(0), iteration.episodes):
            path.parent.mkdir(parents=True)
            path.write_text(f"{path.parent.name} {index}")
        told = {"policy_digest": policy, "config_digest": config_digest(config)}
        pq.write_table(pa.table({"x": [index]}).replace_schema_metadata(told), iteration.rollouts(0))
        inputs = {"policy": policy, "rollouts": [manifest.digest_file(iteration.rollouts(0))]}
        inputs["scores"] = [manifest.digest_file(iteration.scores(0))]
        inputs["reference"] = manifest.digest_folder(model)
        policy = checkpoint(made, index)
        metrics = {"inputs": inputs, "policy_digest": policy, "config_digest": config_digest(config)}
        metrics["episodes_digest"] = manifest.digest_file(iteration.episodes)
        iteration.metrics.write_text(json.dumps(metrics | {"code_version": code_version()}))
    return made


def edit_metrics(run: Run, index: int, **fields: object) -> None:
    path = run.iteration(index).metrics
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def problems(run: Run, deep: bool = False) -> list[tuple[str, str]]:
    found = verify.verify(run, deep=deep).problems
    return [(Path(item.file).relative_to(run.path).as_posix(), item.problem) for item in found]
