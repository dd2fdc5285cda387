"""Bytes that a run writes and keeps."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from earl.config import paths
from earl.config.references import STAGE
from earl.estimate import memory, models
from earl.run import plan, segments
from earl.run.state import Retention

if TYPE_CHECKING:
    from transformers import Emu3TextConfig

    from earl.config.schema import Config

PIXEL_BYTES = 1.6
"""Of a lossless image of a scene, a pixel."""
TOKEN_BYTES = 8
"""Of a token of a completion: its id, compressed, and its log-prob."""
SCORE_BYTES = 2_000
"""Of a judge's answers to an episode, in words."""


@dataclass(frozen=True)
class Disk:
    """Bytes of a run.

    Attributes:
        checkpoint: of `policy/` and `trainer/` together.
        iteration: of rollouts, scores and `train/` of one iteration.
        evaluations: of all evaluations; 0 where nobody knows how many prompts they have.
        shared: of models that are converted or fine-tuned before the run, while they are made.
        checkpoints: how many the run keeps at its end.
        most_checkpoints: how many there are at once, the one that is being written included.
        written: of all checkpoints together that the run writes.
    """

    checkpoint: int
    iteration: int
    evaluations: int
    shared: int
    checkpoints: int
    most_checkpoints: int
    written: int
    iterations: int

    @property
    def at_end(self) -> int:
        """What the run and what it started from take when it is complete."""
        return self.shared + self.evaluations + self.iterations * self.iteration + self.checkpoints * self.checkpoint

    @property
    def needed(self) -> int:
        """What has to be free before it starts."""
        most = max(self.checkpoints, self.most_checkpoints)
        return self.shared + self.evaluations + self.iterations * self.iteration + most * self.checkpoint


def of(config: "Config", text: "Emu3TextConfig", by_segment: bool, evaluated: int = 0) -> Disk:
    """Return what a run takes.

    Args:
        by_segment: a segment writes some checkpoints, by stage every iteration does.
        evaluated: episodes of all evaluations of the run.
    """
    image = int(PIXEL_BYTES * config.image_area)
    length = models.lengths(config)
    episodes, prompts = config.most_episodes, config.most_prompts
    # An image that several rows have is stored once: those of a group share original and target.
    episode = image + length.completion * TOKEN_BYTES + SCORE_BYTES
    iteration = episodes * episode + 2 * prompts * image
    kept, most, count = checkpoints(config, by_segment)
    size = checkpoint_bytes(config, text)
    return Disk(
        size,
        iteration,
        evaluated * (episode + image),
        shared_bytes(config),
        kept,
        most,
        count * size,
        config.num_iterations,
    )


def notes(config: "Config", taken: Disk) -> list[str]:
    """Return whether the file system of `base_exp_dir` has less room than what the run still writes."""
    folder = Path(config.base_exp_dir).absolute()
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free, needed = shutil.disk_usage(place).free, taken.needed - written(config)
    if free >= needed:
        return []
    return [
        f"base_exp_dir {config.base_exp_dir}: {free / 1e9:,.0f} GB are free of the {needed / 1e9:,.0f} GB that the "
        "run still writes; see keep_checkpoints_every_n_iterations"
    ]


def written(config: "Config") -> int:
    """Return the bytes that a run has on disk."""
    files = plan.folder(config).rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file() and not file.is_symlink())


def checkpoint_bytes(config: "Config", text: "Emu3TextConfig") -> int:
    """Bytes of a checkpoint: of each weight that is trained its value, Adam's two moments, and its float32 value where
    the policy's is rounded."""
    each = {"float32": 4 + 8, "bfloat16": 2 + 8 + 4}[config.policy_dtype]
    return each * memory.trained_of(text, config.lora)


def checkpoints(config: "Config", by_segment: bool) -> tuple[int, int, int]:
    """Return how many checkpoints a run keeps, has at once while one is written, and writes in all."""
    retention, last = Retention.of(config), config.num_iterations
    kept: list[int] = []
    most = written = 0
    for index in range(1, last + 1):
        end = min(last, -(-index // config.segment_length) * config.segment_length)
        if by_segment and not segments.has_checkpoint(config, index, end):
            continue
        written += 1
        most = max(most, len(kept) + 1)
        kept = [one for one in kept if retention.keeps(one, index)] + [index]
    return len(kept), most, written


def shared_bytes(config: "Config") -> int:
    """Bytes of the models that are made before the run and are not there yet."""
    total = 0
    for output, stage in paths.shared_stages(config).items():
        if output.exists():
            continue
        if stage.stage == "convert" and stage.conversion and not stage.conversion.vision:
            total += 4 * memory.weights_of(models.text(config, stage.name))
        elif stage.stage == "sft":
            text = models.text(config, f"{STAGE}sft/{stage.name}")
            # The policy, and a checkpoint with its successor.
            trained = memory.trained_of(text, config.sft[stage.name].lora)
            total += 4 * memory.weights_of(text) + 2 * 12 * trained
    return total
