"""Paths of a configuration that name an output of the pipeline or a file of the package instead of a place on disk."""

from typing import TYPE_CHECKING

from earl.config.checks import wrong
from earl.data import catalogue

if TYPE_CHECKING:
    from earl.config.schema import Config
    from earl.config.sections import Sft

STAGE = "stage:"
"""Prefix of a path that names an output of the pipeline: ``stage:tokenise/<raw dataset>``, ``stage:fetch/<published
data set>``, ``stage:select/<selection>``, ``stage:sft/<name>``, ``stage:shapes-policy``."""
PACKAGE = "package:"
"""Prefix of a path inside the installed package: ``package:shapes/vision_tokenizer``."""


def _path_fields(config: "Config") -> dict[str, str]:
    """Return every path field that may hold a reference to a stage or the package, by dotted name."""
    fields = {name: getattr(config, name) for name in ("model_path", "tokenizer_path", "vision_tokenizer_path")}
    lists = {"train_paths_file": config.train_paths_file, "val_paths_file": config.val_paths_file}
    lists |= {f"evaluations.{name}.paths_file": one.paths_file for name, one in config.evaluations.items()}
    for name, tuning in config.sft.items():
        fields[f"sft.{name}.base_model"] = tuning.base_model
        lists[f"sft.{name}.train_paths_file"] = tuning.train_paths_file
        if tuning.validation:
            lists[f"sft.{name}.validation.paths_file"] = tuning.validation.paths_file
    for name, paths in lists.items():
        fields |= {f"{name}.{index}": path for index, path in enumerate(paths)}
    return fields


def check(config: "Config") -> None:
    """Raise where a reference names no stage or entry that there is, or fine-tunings follow one another in a circle."""
    for field, path in _path_fields(config).items():
        if not path.startswith(STAGE):
            continue
        stage, _, name = path.removeprefix(STAGE).partition("/")
        allowed = _allowed(field)
        if stage not in allowed or (stage != "fetch" and (stage == "shapes-policy") == bool(name)):
            raise wrong(field, f"is `{path}`, which is not one of: " + ", ".join(_references(config, allowed)))
        for described in _STAGE_OF:
            known = getattr(config, described)
            if stage == _STAGE_OF[described] and name not in known:
                raise wrong(field, f"is `{path}`, but {described} has only: {', '.join(known) or '(nothing)'}")
        published = [one.name for one in catalogue.entries().values() if one.kind == "tokenised"]
        if stage == "fetch" and name not in published:
            raise wrong(field, f"is `{path}`, but the published tokenised data sets are: {', '.join(published)}")
        compares = config.judge == "program" or config.reward_compute_ground_score
        if stage == "select" and compares and not field.startswith("sft."):
            raise wrong(
                field,
                f"is `{path}`, whose edits a policy has sampled, but the judge compares with them (judge `program`, or "
                "reward_compute_ground_score); name the data that the run drew from",
            )
        tuning = config.sft[field.split(".")[1]] if field.startswith("sft.") else None
        if tuning and tuning.objective == "dpo" and stage in ("tokenise", "fetch"):
            raise wrong(field, f"is `{path}`, but objective is `dpo`, which needs pairs: stage:select/<selection>")
    _check_chains(config.sft)
    for name in fine_tunings(config):
        validation = config.sft[name].validation
        if validation and not (validation.paths_file or config.val_paths_file):
            raise wrong(
                "val_paths_file",
                f"is empty, but sft.{name}.validation takes examples of it; name data, or set that field to null",
            )


def fine_tunings(config: "Config") -> list[str]:
    """Return the names of the fine-tunings that RL starts from, one after the other, the last one first."""
    found, reference = [], config.model_path
    while reference.startswith(f"{STAGE}sft/"):
        found.append(reference.removeprefix(f"{STAGE}sft/"))
        reference = config.sft[found[-1]].base_model
    return found


_STAGE_OF = {"raw_datasets": "tokenise", "selections": "select", "sft": "sft"}
"""Fields whose entries `stage:<stage>/<name>` refers to."""


def _allowed(field: str) -> set[str]:
    if "paths_file" in field:
        return {"tokenise", "fetch", "select"}
    # A fine-tuning may start from a checkpoint that is converted with this tokenizer, so it cannot give it.
    return {"shapes-policy"} if field == "tokenizer_path" else {"sft", "shapes-policy"}


def _references(config: "Config", stages: set[str]) -> list[str]:
    if "tokenise" in stages:
        raw = [f"{STAGE}tokenise/{name}" for name in config.raw_datasets] or [f"{STAGE}tokenise/<raw dataset>"]
        selected = [f"{STAGE}select/{name}" for name in config.selections]
        return [*raw, f"{STAGE}fetch/<published data set>", *selected]
    tunings = [f"{STAGE}sft/{name}" for name in config.sft] or [f"{STAGE}sft/<name>"] if "sft" in stages else []
    return [*tunings, f"{STAGE}shapes-policy"]


def _check_chains(sft: "dict[str, Sft]") -> None:
    """Fine-tunings may follow one another, but none may come before itself."""
    for first, tuning in sft.items():
        seen = [first]
        while tuning.base_model.startswith(f"{STAGE}sft/"):
            name = tuning.base_model.removeprefix(f"{STAGE}sft/")
            if name in seen:
                chain = " from ".join([*seen, name])
                raise wrong(f"sft.{first}.base_model", f"leads in a circle: {chain}; let one start from a folder")
            seen.append(name)
            tuning = sft[name]
