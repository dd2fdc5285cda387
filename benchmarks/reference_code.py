"""Imports the reference's modules from a checkout of it, with stand-ins for what they import and do not need here.

Nothing of the reference is in this repository: its functions run from the folder that the user names.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

STANDS_IN = ("_jsonnet", "datasets", "deepspeed", "evaluation", "openai", "tenacity", "tiktoken", "vllm", "wandb")
"""Top-level modules that the reference imports and that none of the compared functions needs."""


class _Anything(ModuleType):
    """A module that has every name. What is called, decorates or inherits gets something harmless."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Harmless


class _Harmless:
    """Stands for classes and for factories of decorators alike."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, function: Any = None, *args: Any, **kwargs: Any) -> Any:
        return function


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        wanted = name.partition(".")[0] in STANDS_IN
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if wanted else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Anything(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Have the modules of `STANDS_IN` replaced while the reference is imported, and no function compiled."""
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in STANDS_IN}
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        with mock.patch.object(torch, "compile", return_value=_Harmless()):
            yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] in STANDS_IN]:
            del sys.modules[name]
        sys.modules.update(hidden)


def load(folder: Path) -> SimpleNamespace:
    """Return the reference's modules: `main` (its training script), `data`, `reward`, and `sft_data`.

    Args:
        folder: a checkout of the reference.
    """
    sys.path[:0] = [str(folder), str(folder / "rl")]
    try:
        with _stand_ins():
            main = importlib.import_module("nano_aha_moment")
            data = importlib.import_module("rl.data")
            reward = importlib.import_module("rl.reward")
            path = folder / "emu3" / "train_image_editing" / "my_datasets.py"
            spec = importlib.util.spec_from_file_location("reference_sft_data", path)
            sft_data = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sft_data)
    finally:
        del sys.path[:2]
    return SimpleNamespace(main=main, data=data, reward=reward, sft_data=sft_data)


@contextmanager
def at_once() -> Iterator[None]:
    """The reference waits a second between phases; do not."""
    with mock.patch.object(time, "sleep"):
        yield
