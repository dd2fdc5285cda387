"""torchvision, torchaudio and torchcodec where their native code does not load beside the torch that is installed.

A CPU build of vLLM pulls in their CUDA builds, whose libraries need CUDA's. Then importing them fails, and with them
most of transformers and of vLLM, which import whatever is installed. Nothing here needs what those libraries hold, so:

* torchvision becomes importable once the operators it registers meta kernels for are declared; their implementation
  stays missing. Its image transforms, which Qwen2.5-VL's processor uses, are plain torch and work.
* torchaudio and torchcodec are hidden from this process, as if they were not installed.

Where the libraries load, or torch is a GPU build, nothing changes.
"""

import importlib.util
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_LIBRARIES = {
    "torchvision": "_C.so",
    "torchaudio": "lib/_torchaudio*.so",
    "torchcodec": "libtorchcodec_image*.so",
}
_TORCHVISION_OPERATORS = ("nms", "qnms")


@cache
def work_around() -> "torch.library.Library | None":
    """Make transformers and vLLM importable in this process; call it before the first import of either.

    Returns:
        The library of declared operators, which the cache keeps alive; None where there was nothing to declare.
    """
    import torch

    if torch.version.cuda is not None or torch.version.hip is not None:
        return None
    declared = None
    for package, pattern in _LIBRARIES.items():
        if package in sys.modules or not _is_broken(package, pattern):
            continue
        if package == "torchvision":
            declared = torch.library.Library("torchvision", "DEF")
            for operator in _TORCHVISION_OPERATORS:
                declared.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        else:
            # Python's own mark of a module that cannot be imported: `find_spec` answers that there is none.
            sys.modules[package] = None
    return declared


def _is_broken(package: str, pattern: str) -> bool:
    """Return whether a package is installed and one of its libraries does not load."""
    import torch

    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return False
    for library in Path(spec.origin).parent.glob(pattern):
        try:
            torch.ops.load_library(library)
        except OSError:
            return True
    return False
