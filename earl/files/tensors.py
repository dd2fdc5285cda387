"""Safetensors files, written and hashed tensor by tensor.

The bytes are those that the safetensors library writes. That takes all tensors of a file in memory, and has them read
back for their digest; the `Writer` here holds a few at a time, hashes what it writes, and without a path hashes
what it would write.
"""

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Self

from earl.files import manifest

if TYPE_CHECKING:
    import torch

_TYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
"""What headers call the types of torch."""

_CHUNK = 2**20
"""Bytes that are hashed and then written: so few stay in the processor's cache between the two."""

_BACKLOG = 2**27
"""Bytes of tensors that may wait to be written, beside the one that was put last."""


class Writer:
    """Writes one file, in a thread of its own; the caller makes the file appear atomically.

    Attributes:
        names: the tensors in the order in which `put` takes them.
    """

    def __init__(
        self,
        path: Path | None,
        tensors: "Mapping[str, tuple[torch.dtype, Sequence[int]]]",
        metadata: Mapping[str, str],
    ) -> None:
        """Begin a file with its header.

        Args:
            path: where to write; None: only compute the digest.
            tensors: type and shape of each tensor, by name.
            metadata: texts for the header.

        Raises:
            OSError: the system refuses the write.
        """
        # The widest first, as the format recommends: each then starts at a multiple of its width.
        self.names = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))
        self._left = [(name, *tensors[name]) for name in reversed(self.names)]
        self._stream = open(path, "wb") if path else None  # noqa: SIM115 - closed by `__exit__`
        self._digest, self._size = hashlib.sha256(), 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="safetensors")
        self._pending: deque[tuple[Future[None], int]] = deque()
        self._append(_header(self.names, tensors, metadata))

    def put(self, name: str, tensor: "torch.Tensor") -> None:
        """Append the next tensor of `names`, from any device.

        Raises:
            OSError: the system refused a write.
            ValueError: it is another tensor, or of another type or shape, than the header says.
        """
        import torch

        found = name, tensor.dtype, tuple(tensor.shape)
        expected, dtype, shape = self._left.pop() if self._left else ("nothing", None, ())
        if found != (expected, dtype, tuple(shape)):
            raise ValueError(f"{found} is written where the header has {(expected, dtype, tuple(shape))}")
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        self._pending.append((self._thread.submit(self._append, data), len(data)))
        while len(self._pending) > 1 and sum(size for _, size in self._pending) > _BACKLOG:
            self._wait()

    def finish(self) -> manifest.Entry:
        """Complete the file and return its digest and size.

        Raises:
            OSError: the system refused a write.
            ValueError: a tensor of `names` is missing.
        """
        if self._left:
            raise ValueError(f"tensor {self._left[-1][0]!r} was not written")
        while self._pending:
            self._wait()
        if self._stream:
            self._stream.flush()
            os.fsync(self._stream.fileno())
        return {"sha256": self._digest.hexdigest(), "size": self._size}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()
        if self._stream:
            self._stream.close()

    def _append(self, data: bytes | memoryview) -> None:
        for start in range(0, len(data), _CHUNK):
            chunk = data[start : start + _CHUNK]
            self._digest.update(chunk)
            if self._stream:
                self._stream.write(chunk)
        self._size += len(data)

    def _wait(self) -> None:
        """Wait for the tensor that was put first."""
        future, _ = self._pending.popleft()
        future.result()


def write(path: Path, tensors: "Mapping[str, torch.Tensor]", metadata: Mapping[str, str]) -> manifest.Entry:
    """Write tensors to a file and return its digest and size; the caller makes it appear atomically.

    Raises:
        OSError: the system refuses the write.
    """
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    with Writer(path, shapes, metadata) as writer:
        for name in writer.names:
            writer.put(name, tensors[name])
        return writer.finish()


def own_part(tensor: "torch.Tensor") -> "torch.Tensor":
    """Return a tensor, or this rank's part of one that is split over ranks."""
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach()


def is_finite(tensor: "torch.Tensor") -> bool:
    """Return whether a tensor holds neither NaN nor infinity, on its device.

    The extremes say so without a tensor of as many truth values; NaN anywhere makes both NaN.
    """
    if not tensor.numel():
        return True
    low, high = tensor.detach().aminmax()
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _header(
    names: Sequence[str], tensors: "Mapping[str, tuple[torch.dtype, Sequence[int]]]", metadata: Mapping[str, str]
) -> bytes:
    """Return the length of the JSON, in 8 bytes, and the JSON, which spaces fill to a multiple of 8 bytes."""
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in names:
        dtype, shape = tensors[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        kind = _TYPES[str(dtype).removeprefix("torch.")]
        entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
