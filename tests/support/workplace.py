"""A folder to run the workflow in, with stages that only write digests."""

import json
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from earl.files import manifest, tables
from earl.files.layout import Run
from tests.support.forked import Forked, environment

ROOT = Path(__file__).parents[2]
STUB = f"{sys.executable} {Path(__file__).with_name('stage_stub.py')}"

EXPERIMENT = {
    "run_name": "a",
    "base_exp_dir": "runs",
    "train_paths_file": ["train.parquet"],
    "val_paths_file": ["held_out.parquet"],
    "model_path": "model",
    "tokenizer_path": "model",
    "vision_tokenizer_path": "package:shapes/vision_tokenizer",
    "engine": "torch",
    "judge": "program",
    "image_area": 64 * 64,
    "num_iterations": 3,
    "cpu_threads": 1,
    "keep_checkpoints_every_n_iterations": None,
    "save_checkpoints_every_n_iterations": None,
}


def write_tokenised(path: Path, dataset: str, rows: int = 16) -> None:
    """Write a tokenised data set of so many rows, in the size of the shapes world; as raw pairs it has rows alone."""
    columns: dict[str, list] = {name: [None] * rows for name in tables.TOKENISED.names}
    columns |= {"dataset": [dataset] * rows, "example_id": list(map(str, range(rows))), "instruction": ["edit"] * rows}
    grids = [{"height": 8, "width": 8, "ids": bytes(64)}] * rows
    columns |= {"original_tokens": grids, "target_tokens": grids}
    tables.write_table(path, tables.TOKENISED, columns, {"dataset": dataset})


class Workplace:
    """A folder with a model, data and experiments, and Snakemake to run in it."""

    profile: str | None = None
    """Beside ``profiles/default``, which Snakemake takes without being told."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "model").mkdir()
        for name in ("config.json", "tokenizer.json"):
            shutil.copy(ROOT / "earl" / "shapes" / "base_policy" / name, path / "model")
        for name in ("train", "held_out"):
            write_tokenised(path / f"{name}.parquet", name)

    def experiment(self, name: str, **fields: object) -> str:
        (self.path / f"{name}.jsonnet").write_text(json.dumps(EXPERIMENT | {"run_name": name} | fields))
        return f"{name}.jsonnet"

    def start(self, experiment: str, *options: str, env: dict[str, str] | None = None, **config: object) -> Forked:
        """Start Snakemake; its commands go to ``log.txt``."""
        settings = {"experiment": experiment, "earl_command": STUB} | config
        arguments = ["--snakefile", ROOT / "workflow" / "Snakefile"]
        arguments += ["--profile", ROOT / "profiles" / self.profile] if self.profile else []
        arguments += [*options, "--config", *(f"{key}={value}" for key, value in settings.items())]
        inherited = environment(STUB_LOG=self.path / "log.txt")
        return Forked("snakemake", arguments, self.path, inherited | (env or {}))

    def run(self, experiment: str, *options: str, fails: bool = False, **config: object) -> str:
        (self.path / "log.txt").unlink(missing_ok=True)
        started = self.start(experiment, *options, **config)
        output, _ = started.communicate(timeout=180)
        assert (started.returncode != 0) == fails, output
        return output

    def commands(self) -> list[str]:
        """Return what the stages since the last :meth:`run` began were asked to do."""
        log = self.path / "log.txt"
        return log.read_text().splitlines() if log.is_file() else []

    def stages(self) -> list[str]:
        """Return the commands other than the housekeeping at the end."""
        return [line for line in self.commands() if line.split()[0] not in ("prune", "verify", "report")]

    def kinds(self) -> list[str]:
        """Return the names of these commands alone."""
        return [line.split()[0] for line in self.stages()]

    def folder(self, name: str) -> Run:
        return Run(self.path / "runs" / name)

    def policy(self, name: str, index: int) -> str:
        return manifest.digest_folder(self.folder(name).iteration(index).policy)

    def shapes_experiment(self, name: str, **fields: object) -> str:
        """An experiment of one iteration whose data and starting policy the pipeline makes."""
        sft = {"base_model": "stage:shapes-policy", "train_paths_file": ["stage:tokenise/pairs"], "steps": 1}
        made = {
            "raw_datasets": {"pairs": {"source": "shapes", "count": 16, "seed": 1}},
            "train_paths_file": ["stage:tokenise/pairs"],
            "model_path": "stage:sft/s",
            "sft": {"s": sft},
            "num_iterations": 1,
        }
        return self.experiment(name, **made | fields)


def job_counts(output: str) -> dict[str, int]:
    table = output.split("Job stats:")[1].split("\n\n")[0]
    return {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE)}


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
