"""Stages that runs share, as the rules need them: what each reads, and whose configuration it reads it by."""

import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from earl.config import paths
from earl.config.schema import Config
from earl.files import manifest
from earl.run.plan import Plan


@dataclass(frozen=True)
class Shared:
    """One shared stage, with the plan of a run that needs it. Any will do: they agree in what the stage depends on."""

    stage: paths.SharedStage
    plan: Plan
    inputs: list[str]
    """Files that stand for what it reads."""

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def config(self) -> Config:
        return self.plan.config

    @property
    def config_file(self) -> str:
        return self.plan.run.config.as_posix()

    @property
    def raw(self) -> str:
        """The raw file that is tokenised, or the user's folder or pattern of files."""
        return paths.raw_file(self.config, self.name).as_posix()

    @property
    def pairs(self) -> str:
        """The options that say which pairs of the shapes world a raw file holds."""
        raw = self.config.raw_datasets[self.name]
        tasks = ["--tasks", ",".join(raw.tasks)] if raw.tasks else []
        return shlex.join(["--count", f"{raw.count}", "--seed", f"{raw.seed}", *tasks])

    @property
    def from_hub(self) -> str:
        """The command, without its output, that brings data or a checkpoint from the hub."""
        wanted = self.stage.conversion
        if wanted is None:
            return shlex.join([*(["data", "fetch"] if self.stage.stage == "fetch" else ["download"]), self.name])
        words = ["convert", "model", wanted.source]
        for option in ("revision", "tokenizer"):
            if value := getattr(wanted, option):
                words += [f"--{option}", value]
        return shlex.join([*words, *(["--vision"] if wanted.vision else [])])


class SharedStages:
    """All stages that the runs of a workflow share, by output."""

    def __init__(self, plans: Mapping[str, Plan]) -> None:
        self._found = {
            output: (stage, plan)
            for plan in plans.values()
            for output, stage in paths.shared_stages(plan.config).items()
        }

    def __iter__(self) -> Iterator[Path]:
        return iter(self._found)

    @cached_property
    def folders(self) -> list[str]:
        """The folders of all shared outputs, one a ``base_exp_dir``: values of the wildcard ``shared``."""
        return sorted({output.parent.parent.as_posix() for output in self})

    @cached_property
    def names(self) -> list[str]:
        """The last parts of all shared outputs without a suffix: values of the wildcard ``name``."""
        return [output.name.removesuffix(".parquet") for output in self]

    def at(self, wildcards: Any, kind: str) -> Shared:
        """Return the stage of the wildcards ``shared`` and ``name`` with an output of this kind."""
        path = Path(wildcards.shared) / kind / wildcards.name
        stage, plan = self._found[path if path in self._found else path.with_name(f"{path.name}.parquet")]
        return Shared(stage, plan, list(map(self.file_of, stage.inputs)))

    def file_of(self, path: Path) -> str:
        """Return the file that is there once ``path`` is complete: a sealed folder's manifest, or the file itself."""
        is_folder = path in self._found and self._found[path][0].stage != "raw"
        return (path / manifest.NAME if is_folder else path).as_posix()

    def missing(self) -> list[Path]:
        """Return the outputs that are still to be made, in an order that is the same for all workflows."""
        return [path for path in sorted(self._found) if not os.path.exists(self.file_of(path))]

    def data(self, config: Config, references: list[str]) -> list[str]:
        """Return the files that stand for tokenised data sets."""
        return [self.file_of(paths.resolve(config, reference)) for reference in references]

    def starting_policy(self, config: Config) -> Path:
        return paths.policy_folder(config, config.model_path)

    def vision_tokenizer(self, config: Config) -> list[str]:
        """Return the file that stands for a vision tokenizer that the workflow makes; none where it is the user's."""
        folder = paths.vision_tokenizer_folder(config)
        return [self.file_of(folder)] if folder in self._found else []
