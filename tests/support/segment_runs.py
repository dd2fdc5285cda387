"""Small runs for the tests of segments: four iterations of four groups of two, in four shards, two evaluations."""

import shutil
from pathlib import Path

from earl.config import freeze, load
from earl.config.schema import Config
from earl.files import manifest
from earl.files.layout import Run
from tests.support import bare_loop, copier
from tests.support.demo import DEMO, SMALL

LAST = 4
SETTINGS = SMALL | {
    "run_name": "a",
    "num_iterations": LAST,
    "episodes_per_iteration": 8,
    "generations_per_sample": 2,
    "engine_batch_size": 2,
    "rollout_shards": 4,
    "segment_checkpoint_every_n_iterations": 2,
    "save_checkpoints_every_n_iterations": 2,
    "keep_checkpoints_every_n_iterations": 2,
    "evaluations.heldout.every_n_iterations": 2,
    "evaluations.heldout_greedy.every_n_iterations": 3,
    "evaluations.heldout.prompts": 2,
    "evaluations.heldout_greedy.prompts": 2,
}
UNLIKE = {"start.json", "performance.json"}
"""Files that hold a path or a time."""


def configure(base: Path, **changes: object) -> Config:
    return load.load(DEMO, SETTINGS | copier.fields("model_path") | {"base_exp_dir": str(base)} | changes).config


def begin(base: Path, like: Run | None = None, **changes: object) -> Run:
    """Start a run of the same name in another folder, with the data that another one has made."""
    if like is not None:
        shutil.copytree(like.path.parent / "shared", base / "shared")
    return bare_loop.start(configure(base, **changes))


def reconfigure(run: Run, **changes: object) -> Config:
    """Give a run other free settings."""
    config = load.read(run.config).model_copy(update=changes)
    freeze.write(config, run.config)
    return config


def command(run: Run, to: int) -> list[str]:
    return ["iterate", "--run", str(run.path), "--to", str(to)]


def contents(run: Run) -> dict[str, str]:
    """Digest of every file of the iterations and evaluations, by path."""
    files = [path for kind in ("iterations", "evaluations") for path in (run.path / kind).rglob("*")]
    return {
        path.relative_to(run.path).as_posix(): manifest.digest_file(path)
        for path in files
        if path.is_file() and path.name not in UNLIKE
    }


def assert_same(run: Run, by_stage: Run, checkpoints: tuple[int, ...] = (2, LAST)) -> None:
    """A run has the files of one made by stage, byte for byte, and of the checkpoints those that are to be there."""

    def wanted(path: str) -> bool:
        parts = path.split("/")
        return parts[0] != "iterations" or parts[2] not in ("policy", "trainer") or int(parts[1]) in checkpoints

    assert contents(run) == {path: digest for path, digest in contents(by_stage).items() if wanted(path)}
