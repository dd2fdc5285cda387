"""Safetensors files, whose library reports a full disk in an error class of its own."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def write(path: Path, tensors: "Mapping[str, torch.Tensor]", metadata: Mapping[str, str]) -> None:
    """Write tensors, which must be contiguous, to a file; the caller makes it appear atomically.

    Raises:
        OSError: when the system refuses the write, as for any other file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, metadata=dict(metadata))
    except SafetensorError as error:
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
