"""Files of weights from a stream of tensors, a file in memory at a time, and the index that names them."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from earl.emu3 import saving
from earl.files import manifest, tensors

if TYPE_CHECKING:
    import torch


def write(
    folder: Path, weights: "Iterable[tuple[str, torch.Tensor]]", stem: str = "model", *, indexed: bool = False
) -> dict[str, manifest.Entry]:
    """Write weights to safetensors files of about `saving.FILE_SIZE` bytes; return the entries of what was written.

    Args:
        folder: An existing folder.
        weights: Names and weights, in the order in which they are written.
        stem: What names of files begin with.
        indexed: Whether there is an index also where there is one file, so that readers who take all files of a folder
            where there is none leave others alone.

    Raises:
        OSError: the system refuses a write.
    """
    files: list[tuple[list[str], int, manifest.Entry]] = []
    for number, group in enumerate(_groups(weights)):
        entry = tensors.write(folder / f"{number:05d}.partial", group, {"format": "pt"})
        files.append((list(group), sum(weight.nbytes for weight in group.values()), entry))
    if not files:
        return {}
    named = indexed or len(files) > 1
    entries, places = {}, {}
    for number, (names, _, entry) in enumerate(files):
        name = f"{stem}-{number + 1:05d}-of-{len(files):05d}.safetensors" if named else f"{stem}.safetensors"
        (folder / f"{number:05d}.partial").rename(folder / name)
        entries[name] = entry
        places |= dict.fromkeys(names, name)
    if named:
        index = {"metadata": {"total_size": sum(size for _, size, _ in files)}, "weight_map": places}
        data = (json.dumps(index, indent=1, sort_keys=True) + "\n").encode()
        (folder / index_name(stem)).write_bytes(data)
        entries[index_name(stem)] = manifest.entry_of(data)
    return entries


def index_name(stem: str) -> str:
    """Return the name of the index of files whose names begin with `stem`."""
    return f"{stem}.safetensors.index.json"


def _groups(weights: "Iterable[tuple[str, torch.Tensor]]") -> "Iterator[dict[str, torch.Tensor]]":
    group: dict[str, torch.Tensor] = {}
    for name, weight in weights:
        if group and sum(other.nbytes for other in group.values()) + weight.nbytes > saving.FILE_SIZE:
            yield group
            group = {}
        group[name] = weight.contiguous()
    if group:
        yield group
