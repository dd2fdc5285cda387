"""Writing a policy folder by all ranks, and the digest of one that is not written.

Weights are gathered one after another; the rank that writes their file takes them to main memory and hashes them.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from earl.emu3 import adapter
from earl.emu3 import merge as merging
from earl.emu3.checkpoint import INDEX
from earl.execution import ranks
from earl.execution.ranks import Ranks
from earl.files import manifest, tensors
from earl.messages.errors import EarlError

if TYPE_CHECKING:
    import torch
    from transformers import Emu3ForCausalLM, Emu3TextConfig

COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"),
    *(adapter.CONFIG, adapter.BASE),
)
"""Files of a policy folder that training does not change."""
FILE_SIZE = 2**30
"""Bytes of weights in a file, unless one weight has more. Many files are shared out evenly over ranks and threads."""
WRITERS = 4
"""Files that a rank writes at the same time; hashing releases Python's lock."""


def companions(folder: Path | str) -> dict[str, bytes]:
    """Return the files of a policy folder that training does not change, by name.

    Raises:
        EarlError: when one is not what the folder's manifest says.
    """
    with manifest.reading(folder, COMPANIONS):
        return {name: (Path(folder) / name).read_bytes() for name in COMPANIONS if (Path(folder) / name).is_file()}


def save_policy(
    model: "Emu3ForCausalLM",
    folder: Path | None,
    beside: Mapping[str, bytes],
    dtype: "torch.dtype | None" = None,
    team: Ranks | None = None,
    merge: "adapter.Lora | None" = None,
) -> str:
    """Write and seal a policy, and return its digest; without a folder, return the digest that it would have.

    All ranks of a model that is split call this. Rank r writes every size-th file of weights from the r-th, and holds
    a tensor or two of each that it writes at the moment.

    Args:
        model: The policy. Of one with an adapter (`earl.emu3.adapter`), the adapter is written.
        folder: An existing folder that `earl.files.atomic.folder` made, so that the policy appears whole or not at
            all. Other files in it belong to the policy and its digest. None: nothing is written.
        beside: Files that stand beside the weights, see `companions`.
        dtype: Of the weights in the files; by default that of the model.
        team: The ranks; None: this process alone.
        merge: Settings of the model's adapter, to write the sum with its base instead of the adapter.

    Raises:
        EarlError: a weight is not finite.
        OSError: the system refuses a write, of any rank.
    """
    own = {} if merge else adapter.weights(model)
    parameters = merging.merged(model, merge) if merge else own or dict(model.named_parameters())
    first = next(iter(model.parameters()))
    dtype, team = dtype or first.dtype, team or ranks.alone(first.device)
    sizes = {name: weight.numel() * dtype.itemsize for name, weight in parameters.items()}
    files = {adapter.WEIGHTS: list(own)} if own else _files(sizes)
    texts = dict(beside) | _texts(model, files, sizes, dtype)
    if folder and team.first:
        for name, data in texts.items():
            (folder / name).write_bytes(data)
    entries = {name: manifest.entry_of(data) for name, data in texts.items()}
    entries |= _write_weights(parameters, files, folder, dtype, team)
    if folder is None:
        return manifest.digest_of(entries)
    return team.of_first(manifest.seal(folder, entries) if team.first else "")


def config_text(config: "Emu3TextConfig", dtype: "torch.dtype | None") -> str:
    """Return `config.json` of a policy with weights of `dtype`; None: the configuration does not say.

    transformers' auto classes find Emu3's text model only through `model_type` emu3, whose section `text_config`
    describes it. Earlier folders have the fields of that section at the top level; `checkpoint.text_config` reads both.
    """
    text = copy.deepcopy(config)
    text.dtype = dtype
    fields = json.loads(text.to_json_string())
    common = {name: fields[name] for name in ("dtype", "transformers_version") if name in fields}
    for name in ("architectures", "transformers_version"):
        fields.pop(name, None)
    whole = {"architectures": ["Emu3ForCausalLM"], "model_type": "emu3", "text_config": fields} | common
    return json.dumps(whole, indent=2, sort_keys=True) + "\n"


def whole_weights(model: "Emu3ForCausalLM", dtype: "torch.dtype | None" = None) -> Iterator[tuple[str, "torch.Tensor"]]:
    """Yield the weights one by one, by name, whole and on their device, as `dtype` or as they are.

    Of a model with an adapter these are the adapter's alone, by their names in a file. All ranks of a model that is
    split over them must go through this together.
    """
    for name, weight in (adapter.weights(model) or dict(model.named_parameters())).items():
        whole = _whole(weight)
        yield name, whole.to(dtype or whole.dtype)


def _whole(weight: "torch.Tensor | merging.Merged") -> "torch.Tensor":
    return (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).detach()


def _files(sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """Return the files, and the weights of each: a new one where the weights before, in bytes, fill FILE_SIZE."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if filled and filled + size > FILE_SIZE:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{k:05d}-of-{len(groups):05d}.safetensors": names for k, names in enumerate(groups, start=1)}


def _texts(
    model: "Emu3ForCausalLM", files: Mapping[str, list[str]], sizes: Mapping[str, int], dtype: "torch.dtype"
) -> dict[str, bytes]:
    """Return the configuration and, of several files of weights, their index."""
    texts = {"config.json": config_text(model.config, dtype)}
    if len(files) > 1:
        total = sum(sizes.values())
        places = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        texts[INDEX] = json.dumps(index, indent=1, sort_keys=True) + "\n"
    return {name: text.encode() for name, text in texts.items()}


def _write_weights(
    parameters: "Mapping[str, torch.Tensor | merging.Merged]",
    files: Mapping[str, list[str]],
    folder: Path | None,
    dtype: "torch.dtype",
    team: Ranks,
) -> dict[str, manifest.Entry]:
    """Write the files of weights, some at a time, and return their entries on every rank."""
    own = _OwnFiles(folder, {name: (dtype, weight.shape) for name, weight in parameters.items()})
    names, together = list(files), team.size * WRITERS
    for start in range(0, len(names), together):
        chosen = {file: sorted(files[file]) for file in names[start : start + together]}
        with own.written({file: chosen[file] for file in list(chosen)[team.rank :: team.size]}):
            # A weight of each file in turn, so that all writers are busy.
            for row in zip_longest(*chosen.values()):
                for file, name in zip(chosen, row, strict=True):
                    if name is not None:
                        own.put(file, name, _whole(parameters[name]))
    found = team.gather((own.entries, own.problem))
    for _, problem in found:
        if problem is not None:
            raise problem
    return {file: entry for entries, _ in found for file, entry in entries.items()}


class _OwnFiles:
    """The files that this rank writes.

    Attributes:
        entries: Of the files that are complete.
        problem: The first error. It is not raised here: the other ranks go on to gather weights, with this one.
    """

    def __init__(self, folder: Path | None, shapes: "Mapping[str, tuple[torch.dtype, torch.Size]]") -> None:
        self.entries: dict[str, manifest.Entry] = {}
        self.problem: Exception | None = None
        self._folder, self._shapes = folder, shapes
        self._writers: dict[str, tensors.Writer] = {}

    @contextmanager
    def written(self, files: Mapping[str, list[str]]) -> Iterator[None]:
        """Open files, with the names of their weights, for the body to `put` them, and complete them at its end."""
        self._writers = {}
        with ExitStack() as stack:
            with self._trying():
                for file, names in files.items():
                    path, shapes = self._folder and self._folder / file, {name: self._shapes[name] for name in names}
                    self._writers[file] = stack.enter_context(tensors.Writer(path, shapes, {"format": "pt"}))
            yield
            with self._trying():
                for file, writer in self._writers.items() if self.problem is None else ():
                    self.entries[file] = writer.finish()

    def put(self, file: str, name: str, weight: "torch.Tensor") -> None:
        """Write the next weight of a file, if the file is one of this rank's."""
        if file not in self._writers or self.problem is not None:
            return
        weight = weight.to(self._shapes[name][0])
        with self._trying():
            if not tensors.is_finite(weight):
                raise EarlError(
                    f"weight {name!r} is not finite, so the policy was not written; go back to an earlier checkpoint "
                    "and lower learning_rate"
                )
            self._writers[file].put(name, weight)

    @contextmanager
    def _trying(self) -> Iterator[None]:
        try:
            yield
        except (OSError, EarlError) as error:
            self.problem = self.problem or error
