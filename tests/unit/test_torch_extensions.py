"""Packages whose native code does not load are hidden; sound ones stay, and so does all beside GPU builds of torch."""

import importlib.util
import sys

import pytest
import torch

from earl.execution import torch_extensions

NAME = "a_package_with_native_code"


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / NAME
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch_extensions, "_LIBRARIES", {NAME: "*.so"})
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield folder
    sys.modules.pop(NAME, None)


def is_found():
    torch_extensions.work_around.__wrapped__()
    return importlib.util.find_spec(NAME) is not None


def test_a_package_with_a_broken_library_counts_as_not_installed(package):
    (package / "native.so").write_bytes(b"not a library")
    assert not is_found()
    with pytest.raises(ImportError):
        __import__(NAME)


def test_a_sound_package_stays(package):
    assert is_found()


def test_beside_a_gpu_build_of_torch_nothing_is_touched(package, monkeypatch):
    (package / "native.so").write_bytes(b"not a library")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert is_found()
