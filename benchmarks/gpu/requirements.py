"""What EARL counts on: what must work, and what must fail for a measure against it to make sense."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.gpu.context import Context, described

FORKED = """
import multiprocessing, torch
{before}
def use():
    torch.zeros(1, device="cuda").item()
process = multiprocessing.get_context("{method}").Process(target=use)
if __name__ == "__main__":
    process.start(); process.join(); raise SystemExit(abs(process.exitcode))
"""
NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"


def run(context: Context) -> None:
    if not context.small:
        _processes(context)
    device = context.device  # which turns deterministic algorithms on, as in every stage
    context.note("deterministic algorithms", f"{torch.are_deterministic_algorithms_enabled()}, on {device}")
    for name, operation in operations(context).items():
        with context.attempt(f"deterministic {name}"):
            first, again = operation(), operation()
            context.synchronize()
            equal = torch.equal(first, again)
            context.require(
                f"deterministic {name}", equal, "equal bits" if equal else "other bits", "equal bits, twice"
            )
    with context.attempt("bfloat16 product summed to float32"):
        _wide_product(context)
    with context.attempt("TF32"):
        found = torch.backends.cuda.matmul.allow_tf32
        context.require("TF32 of float32 products", not found, "on" if found else "off", "off: float32 is float32")
        context.note("TF32 of convolutions", "on" if torch.backends.cudnn.allow_tf32 else "off")


def _processes(context: Context) -> None:
    """A child that is forked after CUDA was asked cannot use it; vLLM's workers are spawned for that reason."""
    for name, before, method, environment, works in (
        ("fork, then CUDA", "", "fork", {}, True),
        ("fork after is_available()", "torch.cuda.is_available()", "fork", {}, False),
        ("fork after is_available() by NVML", "torch.cuda.is_available()", "fork", {NVML: "1"}, True),
        ("fork after CUDA was used", "torch.zeros(1, device='cuda')", "fork", {NVML: "1"}, False),
        ("spawn after CUDA was used", "if __name__ == '__main__': torch.zeros(1, device='cuda')", "spawn", {}, True),
    ):
        with context.attempt(name):
            status = _status(context, FORKED.format(before=before, method=method), environment)
            expected = "works" if works else "fails, so that workers must be spawned"
            found = "works" if status == 0 else f"fails (status {status})"
            if works:
                context.require(name, status == 0, found, expected)
            else:
                context.note(name, f"{found}; expected: {expected}")


def _status(context: Context, program: str, environment: dict[str, str]) -> int:
    path = context.path.with_name("forked.py")  # `spawn` imports the program again
    path.write_text(program, encoding="utf-8")
    clean = {name: value for name, value in os.environ.items() if name != NVML}
    try:
        done = subprocess.run([sys.executable, str(path)], env=clean | environment, capture_output=True, timeout=60)
    finally:
        path.unlink()
    return done.returncode


def operations(context: Context) -> dict[str, Callable[[], torch.Tensor]]:
    """Return operations of sampler and learner that torch once had, or has, no deterministic kernel for."""
    device, small = context.device, context.small
    rows, ids = 32, 600 if small else 184_622
    heads, completion, whole = (2, 16, 40) if small else (32, 1060, 2160)
    probabilities = torch.rand(rows, ids, dtype=torch.float64, device=device)
    index = torch.randint(0, 100, (4096,), device=device)
    unique = torch.randperm(100, device=device)[:50]
    values = torch.randn(4096, 64, device=device)

    def gradient(function: Callable[[torch.Tensor], torch.Tensor], *shape: int) -> torch.Tensor:
        torch.manual_seed(0)
        leaf = torch.randn(*shape, device=device, requires_grad=True)
        function(leaf).square().sum().backward()
        return leaf.grad

    def attend(queries: int, x: torch.Tensor) -> torch.Tensor:
        """The learner's two calls of torch's attention: a row by itself, and a completion that sees its prompt."""
        x, keys = x.bfloat16(), x.shape[2]
        if queries == keys:
            return F.scaled_dot_product_attention(x, x, x, is_causal=True).float()
        mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
        return F.scaled_dot_product_attention(x[:, :, -queries:], x, x, attn_mask=mask).float()

    def scattered() -> torch.Tensor:
        zeros = torch.zeros(rows, ids, dtype=torch.bool, device=device)
        return zeros.scatter(1, index[:rows, None], torch.ones(rows, 1, dtype=torch.bool, device=device))

    def put() -> torch.Tensor:
        return torch.zeros(100, 64, device=device).index_put_((unique,), values[:50])

    return {
        "cumsum in float64": lambda: probabilities.cumsum(-1),
        "searchsorted": lambda: torch.searchsorted(probabilities.cumsum(-1), probabilities[:, :1].contiguous()),
        "sort": lambda: probabilities.sort(dim=-1, descending=True).values,
        "scatter of booleans": scattered,
        "index_put": put,
        "index_add": lambda: torch.zeros(100, 64, device=device).index_add(0, index, values),
        "gradient of indexing": lambda: gradient(lambda x: x[index], 100, 64),
        "gradient of index_copy": lambda: gradient(lambda x: x.index_copy(0, unique, x[unique].exp()), 100, 64),
        "gradient of gather": lambda: gradient(lambda x: x.gather(1, index[:100, None] % 64), 100, 64),
        "gradient of embedding": lambda: gradient(lambda x: F.embedding(index, x), 100, 64),
        "gradient of repeat_interleave": lambda: gradient(lambda x: x.repeat_interleave(4, dim=1), 1, 8, 64, 64),
        "gradient of causal attention": lambda: gradient(partial(attend, whole), 1, heads, whole, 128),
        "gradient of masked attention": lambda: gradient(partial(attend, completion), 1, heads, whole, 128),
    }


def _wide_product(context: Context) -> None:
    """What lets a learner in bfloat16 have logits that are not rounded to it."""
    one, other = (torch.randn(64, 64, device=context.device, dtype=torch.bfloat16) for _ in range(2))
    try:
        found = torch.mm(one, other, out_dtype=torch.float32)
    except (RuntimeError, NotImplementedError) as error:
        if context.small:
            context.note("bfloat16 product summed to float32", f"not on a CPU ({described(error)[:60]})")
            return
        raise
    gap = (found - one.float() @ other.float()).abs().max().item()
    context.require("bfloat16 product summed to float32", gap < 1e-3, f"{gap:.1e} from float32's", "at most 0.001")
