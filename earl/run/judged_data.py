"""Whether the judge `program` can judge a run's prompts: it measures pictures of the shapes world against a target.

The first example of a data set tells, be it raw or tokenised. Of data on the hub that are not downloaded yet, only
the size that images are resized to is known.
"""

from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from earl.config import paths
from earl.config.references import STAGE
from earl.config.schema import Config
from earl.data.raw import RawRow, RawSource
from earl.data.selection import Selection
from earl.data.tokenised import open_dataset
from earl.emu3.vision import SPATIAL_FACTOR
from earl.files import hub_names, manifest, pictures
from earl.judges import program
from earl.messages.errors import EarlError
from earl.shapes import world

_NO_TARGETS = "has no target images, which edits are compared with"
_REMEDY = "set judge to `openai` or `vllm`, which ask a model (docs/judges.md), or name data of the shapes world"


def problems(config: Config, drawn: Iterable[paths.Mixed]) -> Iterator[tuple[str, str]]:
    """Yield a field's dotted name and what is wrong with it, for each data set that the judge `program` fails on.

    Args:
        drawn: what training and evaluations draw their prompts from. The data are there, or the pipeline makes them.
    """
    if config.judge != "program":
        return
    look = cache(lambda reference: _problem(config, reference))
    for data in drawn:
        for reference in dict.fromkeys(data.references):
            if problem := look(reference):
                yield (
                    data.field,
                    f"names {reference!r}, which {problem}; the judge `program` knows the shapes world only: {_REMEDY}",
                )


def _problem(config: Config, reference: str) -> str | None:
    folder = paths.resolve(config, reference)
    if not reference.startswith(STAGE) or (folder / manifest.NAME).is_file():
        return _of_tokenised(folder)
    stage, _, name = reference.removeprefix(STAGE).partition("/")
    if stage == "fetch":
        return "is a published data set of photographs"
    if stage == "select":  # Its pictures are those of a run.
        return None
    side = int(config.image_area**0.5 / SPATIAL_FACTOR + 0.5) * SPATIAL_FACTOR
    if side != world.SIZE:
        return (
            f"is resized to image_area = {config.image_area} pixels, while pictures of the shapes world have "
            f"{world.SIZE**2} (set image_area to that if these are some)"
        )
    row = _first_raw(config, name)
    if row is None:
        return None
    return _of_image(row.original) or (None if row.has_edited else _NO_TARGETS)


def _of_tokenised(path: Path) -> str | None:
    try:
        example = open_dataset(path)[0]
    except EarlError:  # Whoever draws from it says so better.
        return None
    height, width = (SPATIAL_FACTOR * side for side in example.original_tokens.shape)
    if (height, width) != (world.SIZE, world.SIZE):
        return f"holds an image of {width}x{height} pixels, not {world.SIZE}x{world.SIZE}"
    if example.target is None and example.target_tokens is None:
        return _NO_TARGETS
    return _of_image(example.original)


def _of_image(data: bytes | None) -> str | None:
    """Return why an encoded image is not of the shapes world; None where it may be, or cannot be looked at."""
    try:
        return program.foreign(pictures.read(data))
    except pictures.Rejected:
        return None


def _first_raw(config: Config, name: str) -> RawRow | None:
    """Return the first pair that is to be tokenised; None where it is generated, not here yet, or cannot be read.

    What cannot be read is for the tokenising to refuse, which names the column and what could be done.
    """
    raw = config.raw_datasets[name]
    if raw.path is None:
        return None
    if hub_names.data_files(raw.path) and not (paths.raw_file(config, name) / manifest.NAME).is_file():
        return None
    try:
        source = RawSource(paths.raw_file(config, name), raw.columns, Selection.of(raw))
        return next(source.read(source.windows(1)[0], 1))[0]
    except EarlError:
        return None
