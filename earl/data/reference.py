"""The reference's pre-tokenised data: one pickled dict an example, listed in a ``tokenized_datalist.json``.

Where the files lie, `earl.data.datalist` says. Needed are the fields ``original_image``, ``edited_image`` and
``instruction``. An example without ``edit_id`` has the name of its file. It has reasoning where ``CoT`` is a dict with
any values that are not None; a missing, empty or textual ``CoT`` is none.

A pickle can run any code when it is loaded. So files of ``torch.save`` are read by torch's weights-only loader, which
knows tensors and plain values alone, and bare pickles by one as strict; both are extended by what numpy needs for
integer arrays. Whatever else a pickle asks for is refused before anything runs.
"""

import math
import pickle
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from earl.data import datalist
from earl.data.example import Example, has_words, is_unicode
from earl.data.grids import grid
from earl.files import remedies
from earl.messages.errors import EarlError

_INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


class ReferenceDataset:
    """The reference's data set. Files are opened one by one, when their row is read."""

    def __init__(self, path: Path, codebook_size: int | None = None) -> None:
        self.path = path
        self._codebook_size = codebook_size
        self._list = datalist.read(path)
        self.name = self._list.dataset

    def __len__(self) -> int:
        return len(self._list.names)

    def file(self, row: int) -> Path:
        """Return the file that holds a row."""
        return self._list.file(row)

    def __getitem__(self, row: int) -> Example:
        """Read one example.

        Raises:
            IndexError: when there is no such row.
            EarlError: naming the file and the field, when the file is missing, damaged or asks to run code, or a field
                is missing, of the wrong type, or a token lies outside the codebook.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"{self.path}: row {row} of {len(self)}")
        path = self.file(row)
        values = load_pickled(path)
        tokens = {}
        for name in ("original_image", "edited_image"):
            values_of = _field(values, name, path)
            tokens[name] = grid(values_of, f"{path}: field {name!r}", self._codebook_size)
        return Example(
            dataset=self.name,
            example_id=_id(values.get("edit_id"), path) or self._list.example_id(row),
            task=None,
            instruction=_instruction(_field(values, "instruction", path), path),
            reasoning=_reasoning(values.get("CoT"), path),
            original_tokens=tokens["original_image"],
            target_tokens=tokens["edited_image"],
            original=None,
            target=None,
        )


def load_pickled(path: Path) -> dict[str, Any]:
    """Return the dict in a ``.pth`` file without running code from it.

    Raises:
        EarlError: naming the file, when it is missing, damaged, no dict, or holds more than plain values and arrays.
    """
    try:
        if remedies.is_pointer(path):
            raise EarlError(f"{path}: {remedies.described(path)}")
        values = _load_bare(path) if _is_bare(path) else _load_torch(path)
    except FileNotFoundError as error:
        raise EarlError(f"{path}: does not exist, though tokenized_datalist.json lists it") from error
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        what = f"asks for {wanted[1]}, which may run code" if wanted else "is damaged or holds more than plain values"
        raise EarlError(f"{path}: {what}; nothing was run. Do not trust where it came from") from error
    except EarlError:
        raise
    except Exception as error:  # A damaged pickle can fail in any way; each means the same to the user.
        raise EarlError(f"{path}: is damaged or no pickle ({type(error).__name__}: {error})") from error
    if not isinstance(values, dict):
        raise EarlError(f"{path}: holds a {type(values).__name__}, not a dict")
    return values


def _is_bare(path: Path) -> bool:
    """Return whether a file is a pickle and nothing else: neither a zip archive of torch.save nor its older format."""
    import torch

    magic = torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")
    with path.open("rb") as stream:
        head = stream.read(32)
    return not head.startswith(b"PK") and magic not in head


def _load_torch(path: Path) -> Any:
    import torch

    with torch.serialization.safe_globals([(value, name) for name, value in _allowed().items()]):
        return torch.load(path, map_location="cpu", weights_only=True)


class _FromBuffer:
    """How arrays come out of pickles of protocol 5. An object without attributes, where numpy has a function."""

    __slots__ = ()

    def __call__(self, buffer: bytes, dtype: Any, shape: tuple[int, ...], order: str) -> Any:
        return np.frombuffer(buffer, dtype=dtype).reshape(shape, order=order)


class _Bare(pickle.Unpickler):
    """Builds plain values and arrays of numbers. What it may call keeps no state that a pickle could change."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.numeric", "numpy._core.numeric") and name == "_frombuffer":
            return _FromBuffer()
        found = _allowed().get(f"{module}.{name}")
        if found is None:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return found


def _load_bare(path: Path) -> Any:
    with path.open("rb") as stream:
        return _Bare(stream).load()


@cache
def _allowed() -> dict[str, Any]:
    """Return what integer arrays are made of, by the name that pickles use."""
    import _codecs

    from numpy._core import multiarray

    integers = {type(np.dtype(name)) for name in _INTEGERS}
    names = {f"{kind.__module__}.{kind.__name__}": kind for kind in (np.ndarray, np.dtype, *integers)}
    # Files written with numpy 1 name the module numpy.core.
    for module in ("core", "_core"):
        for name in ("_reconstruct", "scalar"):
            names[f"numpy.{module}.multiarray.{name}"] = getattr(multiarray, name)
    return names | {"_codecs.encode": _codecs.encode}


def _field(values: dict[str, Any], name: str, path: Path) -> Any:
    if name not in values:
        raise EarlError(f"{path}: field {name!r} is missing; the file has {', '.join(map(str, values))}")
    return values[name]


def _id(value: Any, path: Path) -> str:
    """Return an id, which may be a text or any library's whole number; empty where there is none."""
    import torch

    if value is None:
        return ""
    if isinstance(value, np.ndarray | np.generic | torch.Tensor):
        # A number may be wrapped in an array of one.
        value = value.item() if math.prod(value.shape) == 1 else value.tolist()
    if isinstance(value, str):
        return _text(value, "edit_id", path)
    if not isinstance(value, int) or isinstance(value, bool):
        raise EarlError(
            f"{path}: field 'edit_id' is a {type(value).__name__} where a text or a whole number is expected"
        )
    return str(value)


def _instruction(value: Any, path: Path) -> str:
    text = _text(value, "instruction", path)
    if not has_words(text):
        raise EarlError(f"{path}: field 'instruction' is empty; leave the example out (`earl convert data` can)")
    return text


def _text(value: Any, name: str, path: Path) -> str:
    if not isinstance(value, str):
        raise EarlError(f"{path}: field {name!r} is a {type(value).__name__} where text is expected")
    if not is_unicode(value):
        raise EarlError(f"{path}: field {name!r} is no text: it holds half of a surrogate pair")
    return value


def _reasoning(value: Any, path: Path) -> list[tuple[str, str]] | None:
    """Return the (key, text) pairs of a dict; None where there are none, so that nobody trains on an empty thought."""
    if value is None or isinstance(value, str):
        return None
    if not isinstance(value, dict):
        raise EarlError(f"{path}: field 'CoT' is a {type(value).__name__} where a dict of text is expected")
    pairs = []
    for key, text in value.items():
        if text is not None:
            written = str(text) if isinstance(text, int | float) else text
            pairs.append((_text(key, "CoT", path), _text(written, f"CoT.{key!s}", path)))
    return pairs or None
