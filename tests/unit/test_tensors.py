"""Safetensors files: the bytes that the library writes, tensor by tensor, and their digest without a file."""

import errno
import hashlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from earl.files import tensors

GENERATOR = torch.Generator().manual_seed(0)
CASES = {
    "names out of order": {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(5), "B": torch.zeros(1)},
    "a scalar, and nothing": {"one": torch.tensor(3.5), "none": torch.zeros(0, 4)},
    "not contiguous": {"x": torch.arange(12.0).reshape(3, 4).T, "y": torch.arange(9.0)[::2]},
    "bfloat16": {f"layer.{i}": torch.randn(7, i, generator=GENERATOR).bfloat16() for i in range(12)},
    "widths mixed": {
        "byte": torch.arange(5, dtype=torch.uint8),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "single": torch.ones(3),
        "double": torch.ones(2, dtype=torch.float64),
    },
    "other alphabets": {"größe": torch.ones(2), "大": torch.zeros(3)},
}


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}, {"DCP": '{"a": [1, "ü"]}'}], ids=["none", "pt", "quotes"])
@pytest.mark.parametrize("case", CASES)
def test_the_bytes_are_those_of_the_library(tmp_path, case, metadata):
    path, given = tmp_path / "x.safetensors", CASES[case]
    entry = tensors.write(path, given, metadata)
    content = path.read_bytes()
    assert content == save({name: tensor.contiguous() for name, tensor in given.items()}, metadata or None)
    assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    with safe_open(path, framework="pt") as file:
        assert (file.metadata() or {}) == metadata
    found = load_file(path)
    assert found.keys() == given.keys()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in given.items())


@pytest.mark.parametrize("case", CASES)
def test_without_a_path_the_digest_is_the_same(tmp_path, case):
    given = CASES[case]
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in given.items()}
    with tensors.Writer(None, shapes, {"format": "pt"}) as writer:
        for name in writer.names:
            writer.put(name, given[name])
        found = writer.finish()
    assert found == tensors.write(tmp_path / "x", given, {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("b", torch.ones(2)), ("a", torch.ones(3)), ("a", torch.ones(2, dtype=torch.bfloat16)), ("c", torch.ones(2))],
)
def test_what_the_header_does_not_say_is_not_written(tmp_path, name, tensor):
    shapes = {"a": (torch.float32, (2,)), "b": (torch.float32, (2,))}
    with tensors.Writer(tmp_path / "x", shapes, {}) as writer, pytest.raises(ValueError, match="where the header has"):
        writer.put(name, tensor)


def test_a_tensor_that_is_missing_or_too_many_is_an_error(tmp_path):
    with tensors.Writer(tmp_path / "x", {"a": (torch.float32, (2,))}, {}) as writer:
        with pytest.raises(ValueError, match="'a' was not written"):
            writer.finish()
        writer.put("a", torch.ones(2))
        with pytest.raises(ValueError, match="where the header has"):
            writer.put("a", torch.ones(2))


def test_a_full_disk_is_an_error_of_the_system():
    big = {"a": torch.zeros(1000, 1000), "b": torch.zeros(1000, 1000)}
    with pytest.raises(OSError, match="No space") as caught:
        tensors.write("/dev/full", big, {})
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_nan_and_infinity_are_found_anywhere(dtype):
    plain = torch.randn(50, 3, generator=GENERATOR).to(dtype)
    assert tensors.is_finite(plain)
    assert tensors.is_finite(torch.zeros(0, dtype=dtype))
    assert tensors.is_finite(torch.full((2,), torch.finfo(dtype).max, dtype=dtype))
    for value in (float("nan"), float("inf"), -float("inf")):
        for place in (0, 70, 149):
            broken = plain.clone()
            broken.view(-1)[place] = value
            assert not tensors.is_finite(broken), (value, place)
