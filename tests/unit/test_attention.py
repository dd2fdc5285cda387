"""Which kernel attends: torch's own, or flash-attn where what it is asked for is really there."""

import sys

import pytest
import torch
import torch.nn.functional as F

from earl.learner import attention
from earl.messages.errors import EarlError

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FLASH_ATTN_2 = "def flash_attn_func(): ..."
"""The part of the package that matters here; other distributions have a module of this name, too."""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A function that installs a package flash_attn with this text, beside a GPU of this compute capability."""

    def forget():
        attention._flash_problem.cache_clear()
        attention._warn.cache_clear()
        sys.modules.pop("flash_attn", None)

    def install(text, capability=(9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Test T4")
        if text is not None:
            (tmp_path / "flash_attn").mkdir()
            (tmp_path / "flash_attn" / "__init__.py").write_text(text)
            monkeypatch.syspath_prepend(tmp_path)

    forget()
    yield install
    forget()


def test_where_it_is_there_auto_takes_it(package):
    package(FLASH_ATTN_2)
    assert attention.choose("auto", GPU, True) == attention.choose("flash", GPU, True) == "flash"
    assert attention.choose("sdpa", GPU, True) == "sdpa"


@pytest.mark.parametrize(
    ("text", "capability", "reason"),
    [
        (None, (9, 0), "it is not installed"),
        ("", (9, 0), "ImportError: cannot import name 'flash_attn_func' from 'flash_attn'"),
        ("import flash_attn_2_cuda", (9, 0), "ModuleNotFoundError: No module named 'flash_attn_2_cuda'"),
        ("raise ImportError('undefined symbol: _ZN3c104cuda')", (9, 0), "ImportError: undefined symbol: _ZN3c104cuda"),
        ("raise RuntimeError('built for CUDA 12')", (9, 0), "RuntimeError: built for CUDA 12"),
        (FLASH_ATTN_2, (7, 5), "needs a GPU of compute capability 8.0 or newer, not Test T4"),
    ],
    ids=["absent", "flash-attn-4", "no kernels", "another torch", "another CUDA", "old GPU"],
)
def test_where_it_cannot_compute_the_reason_is_said(package, caplog, text, capability, reason):
    package(text, capability)
    with pytest.raises(EarlError, match="set it to 'auto' or 'sdpa'") as raised:
        attention.choose("flash", GPU, True)
    assert reason in str(raised.value)
    for _ in range(2):
        assert attention.choose("auto", GPU, True) == "sdpa"
    told = [message for message in caplog.messages if "flash-attn is installed, but" in message]
    assert len(told) == (text is not None), "once, and not where nobody installed it"
    assert all(reason in message for message in told)


@pytest.mark.parametrize(
    ("device", "bfloat16", "needs"),
    [
        (CPU, True, "needs a GPU;"),
        (GPU, False, "needs dtype bfloat16;"),
        (CPU, False, "needs a GPU and dtype bfloat16;"),
    ],
)
def test_elsewhere_it_is_not_even_imported(package, caplog, device, bfloat16, needs):
    package("raise AssertionError")
    assert attention.choose("auto", device, bfloat16) == "sdpa"
    with pytest.raises(EarlError, match=f"attention is 'flash', which {needs}"):
        attention.choose("flash", device, bfloat16)
    assert not caplog.messages


def test_the_mask_that_a_gpu_takes_means_the_same():
    query, key, value = (torch.randn(1, 2, length, 8) for length in (5, 9, 9))
    masks = [attention._last_queries(5, 9, device) for device in (CPU, GPU)]
    found = [F.scaled_dot_product_attention(query, key, value, attn_mask=mask) for mask in masks]
    assert torch.equal(*found)
    assert [row.sum().item() for row in masks[0]] == [5, 6, 7, 8, 9]
