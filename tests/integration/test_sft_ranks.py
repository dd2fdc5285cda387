"""Fine-tuning by several ranks: real processes, on the CPU, against one process."""

import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from earl import cli
from earl.config import freeze
from earl.config.schema import Config
from earl.data.grids import stored
from earl.files import manifest, tables
from tests.support import forked_ranks, sft_ranks_program
from tests.support.forked import Forked

pytestmark = pytest.mark.slow
STEPS = 12


def flat(folder: Path) -> torch.Tensor:
    weights = load_file(folder / "model.safetensors")
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


# A step in memory


def test_ranks_change_loss_and_gradient_by_rounding_alone(policy_folder, tmp_path):
    """Four micro-batches on three ranks, of unequal numbers of tokens; also two, so that a rank has none."""
    start, alone, out = flat(policy_folder), tmp_path / "alone", tmp_path / "three"
    for folder in (alone, out):
        folder.mkdir()
    sft_ranks_program.steps(policy_folder, alone)
    forked_ranks.launch(3, sft_ranks_program.__name__, policy_folder, out)
    for case in sft_ranks_program.CASES:
        loss, expected = (json.loads((folder / f"{case}.json").read_text()) for folder in (out, alone))
        assert loss == pytest.approx(expected, rel=1e-5), case
        update, wanted = (flat(folder / case) - start for folder in (out, alone))
        assert (update - wanted).norm() < 1e-4 * wanted.norm(), case
    assert (flat(out / "padded") - start).norm() > 10 * sft_ranks_program.BOUND
    assert (flat(out / "clipped") - start).norm() == pytest.approx(sft_ranks_program.BOUND, rel=1e-3)


# The stage, as the workflow's rule runs it


@pytest.fixture
def earl(tmp_path, policy_folder, vocabulary):
    """Return a function that gives the arguments of a fine-tuning by a number of ranks into `tmp_path / out`."""
    rows = 10
    grids = np.random.default_rng(0).integers(0, vocabulary.num_visual, (rows, 2, 2, 3))
    columns = {
        "dataset": ["pairs"] * rows,
        "example_id": [str(i) for i in range(rows)],
        "task": [None] * rows,
        "instruction": [f"edit {i}" for i in range(rows)],
        # Of unequal lengths, so that ranks have unequal numbers of counted tokens.
        "reasoning": [[{"key": "box", "value": "[0, 0, 8, 8] " * (1 + i % 4)}] for i in range(rows)],
        "original_tokens": [stored(pair[0], vocabulary.num_visual) for pair in grids],
        "target_tokens": [stored(pair[1], vocabulary.num_visual) for pair in grids],
        "original": [None] * rows,
        "target": [None] * rows,
    }
    data = tmp_path / "pairs"
    tables.write_table(data / "0000.parquet", tables.TOKENISED, columns, {})
    manifest.seal(data)
    tuning = {"base_model": str(policy_folder), "train_paths_file": [str(data)], "coefficients": [1.0]}
    tuning |= {"reasoning": True, "batch_size": 5, "learning_rate": 3e-4, "warmup_steps": 3, "random_seed": 1}
    tuning |= {"weight_decay": 0.1, "validation": {"paths_file": [str(data)], "examples": 7, "every_n_steps": 5}}

    def command(ranks: int, out: str, steps: int = STEPS) -> list[str]:
        config = Config(
            run_name="run",
            base_exp_dir=str(tmp_path / "runs"),
            train_paths_file=["unused"],
            val_paths_file=[],
            sft={"one": tuning | {"steps": steps}},
            train_processes=ranks,
            per_device_batch_size=1,
            max_response_tokens=64,
            model_context_size=256,
            engine="torch",
            judge="program",
            device="cpu",
            dtype="float32",
            cpu_threads=1,
        )
        file = tmp_path / f"{ranks}.json"
        freeze.write(config, file)
        return ["sft", "--config", str(file), "--name", "one", "--out", str(tmp_path / out)]

    return command


def done_here(command: list[str]) -> Path:
    """Run a command of one process in this one; return its folder."""
    assert cli.call(command) == 0
    return Path(command[-1])


def kill_after_a_checkpoint(command: list[str]) -> Path:
    """End a command, and so its ranks, without warning; return the folder of its checkpoints."""
    partial = Path(f"{command[-1]}.partial")
    process = Forked("earl", command)
    while process.poll() is None and not list(partial.glob("step-*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(60)  # which ranks hold open until they have ended, too
    assert process.returncode == -signal.SIGKILL
    assert not Path(command[-1]).exists()
    return partial


def test_two_ranks_end_where_one_process_does_also_killed_and_with_another_number(
    earl, tmp_path, policy_folder, caplog
):
    start = flat(policy_folder)
    alone, together = done_here(earl(1, "alone")), tmp_path / "together"
    said = forked_ranks.launch(2, "earl", *earl(2, together.name))
    assert f"{STEPS} steps by 2 ranks" in said
    assert said.count("by 2 ranks") == 1, "the first rank says it for all"
    wanted = flat(alone) - start

    partial = kill_after_a_checkpoint(earl(2, "killed"))
    parts = sorted(path.name for path in next(partial.glob("step-*")).glob("*.safetensors"))
    assert parts == ["optimizer-00001-of-00002.safetensors", "optimizer-00002-of-00002.safetensors"]
    shutil.copytree(partial, tmp_path / "fewer.partial")
    assert "resumed at step" in forked_ranks.launch(2, "earl", *earl(2, "killed"))
    assert manifest.digest_folder(tmp_path / "killed") == manifest.digest_folder(together)
    with caplog.at_level("INFO", logger="earl"):
        fewer = done_here(earl(1, "fewer"))
    assert "resumed at step" in caplog.text

    curves = {name: json.loads((tmp_path / name / "sft.json").read_text()) for name in ("alone", "together")}
    assert len(curves["alone"]["loss"]) == STEPS
    for name in ("loss", "gradient_norm", "learning_rate"):
        assert curves["together"][name] == pytest.approx(curves["alone"][name], rel=1e-3), name
    held_out = [curves[name]["validation"]["loss"] for name in ("together", "alone")]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-4)
    for folder in (together, fewer):
        assert (flat(folder) - start - wanted).norm() < 1e-3 * wanted.norm(), folder
    assert not list(tmp_path.glob("*.partial"))
