"""The stages that runs share, as the rules need them."""

import os
import shlex
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from earl.config import paths
from earl.config.schema import Config
from earl.files import manifest
from earl.run import selections
from earl.run.plan import Plan


class Shared:
    """All shared stages that runs need. The wildcards `shared` and `name` name one, together with its kind.

    ``kind`` is the folder below ``<base_exp_dir>/shared`` that a stage writes to.
    """

    def __init__(self, plans: Mapping[str, Plan]) -> None:
        self.plans = plans
        # By output, with a plan that needs it. Any will do: they agree in what the stage depends on.
        self.stages = {
            output: (stage, plan)
            for plan in plans.values()
            for output, stage in paths.shared_stages(plan.config).items()
        }

    @cached_property
    def folders(self) -> list[str]:
        return sorted({output.parent.parent.as_posix() for output in self.stages})

    @cached_property
    def names(self) -> list[str]:
        return [output.name.removesuffix(".parquet") for output in self.stages]

    def file_of(self, path: Path) -> str:
        """Return the file that is there once ``path`` is complete: a sealed folder's manifest, or the file itself."""
        is_folder = path in self.stages and self.stages[path][0].stage != "raw"
        return (path / manifest.NAME if is_folder else path).as_posix()

    def missing(self, outputs: Collection[str]) -> list[Path]:
        """Return those of the outputs of jobs that are still to be made, in the same order for all workflows."""
        wanted = [path for path in sorted(self.stages) if not {path.as_posix(), self.file_of(path)}.isdisjoint(outputs)]
        return [path for path in wanted if not os.path.exists(self.file_of(path))]

    def data(self, config: Config, references: list[str]) -> list[str]:
        """Return the files that stand for tokenised data sets."""
        return [self.file_of(paths.resolve(config, reference)) for reference in references]

    def vision_tokenizer(self, config: Config) -> list[str]:
        """Return the file that stands for a vision tokenizer that the workflow makes; none where it is the user's."""
        folder = paths.vision_tokenizer_folder(config)
        return [self.file_of(folder)] if folder in self.stages else []

    def _at(self, w: Any, kind: str) -> tuple[paths.SharedStage, Plan]:
        path = Path(w.shared) / kind / w.name
        return self.stages[path if path in self.stages else path.with_name(f"{path.name}.parquet")]

    def inputs(self, w: Any, kind: str) -> list[str]:
        stage, plan = self._at(w, kind)
        if stage.stage == "select":
            found = selections.inputs(plan.config.selections[stage.name], self.plans.values())
            return [path.as_posix() for path in found]
        return list(map(self.file_of, stage.inputs))

    def config(self, w: Any, kind: str) -> Config:
        return self._at(w, kind)[1].config

    def command(self, w: Any, kind: str) -> str:
        """Return the words after ``earl`` that make an output, but for ``--out``."""
        stage, plan = self._at(w, kind)
        frozen = ["--config", plan.run.config.as_posix()]
        match kind:
            case "raw":
                raw = plan.config.raw_datasets[stage.name]
                words = ["shapes", "raw", "--count", raw.count, "--seed", raw.seed]
                words += ["--tasks", ",".join(raw.tasks)] if raw.tasks else []
                for name in ("unchanged_fraction", "damaged_fraction"):
                    words += [f"--{name.replace('_', '-')}", fraction] if (fraction := getattr(raw, name)) else []
            case "policy":
                words = ["shapes", "policy", "--seed", paths.SHAPES_POLICY_SEED]
            case "download":
                words = ["download", stage.name]
            case "fetched":
                words = ["data", "fetch", stage.name]
            case "convert":
                wanted = stage.conversion
                words = ["convert", "model", wanted.source, *(["--vision"] if wanted.vision else [])]
                options = {"--revision": wanted.revision, "--tokenizer": wanted.tokenizer}
                words += [word for name, value in options.items() if value for word in (name, value)]
            case "tokenised":
                words = ["tokenise", *frozen, "--dataset", stage.name]
                words += ["--raw", paths.raw_file(plan.config, stage.name).as_posix()]
            case "selected":
                words = ["select", *frozen, "--name", stage.name]
            case "sft":
                words = ["sft", *frozen, "--name", stage.name]
        return shlex.join(map(str, words))
