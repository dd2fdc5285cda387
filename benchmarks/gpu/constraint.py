"""What the grid constraint costs at the published vocabulary, and whether the host waits for the device in it."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING

import torch

from benchmarks.gpu import models
from benchmarks.gpu.context import Context
from benchmarks.gpu.results import Range
from earl.emu3 import grid
from earl.engines import SamplingParams, torch_engine, vllm_process

if TYPE_CHECKING:
    from transformers import Emu3TextConfig

    from earl.engines.vllm_constraint import GridConstraintV2

INTERFACES = {
    "vllm.v1.sample.logits_processor.interface": ("LogitsProcessor", "MoveDirectionality"),
    "vllm.v1.worker.gpu.sample.logits_processor.interface": ("LogitsProcessor",),
}
"""What `earl.engines.vllm_constraint` needs of vLLM: classes to derive from."""
PROMPT = 8


def run(context: Context) -> None:
    rows = 8 if context.small else 256
    with context.attempt("vLLM's constraint"), vllm_process.vllm_torch(context.device.type):
        _vllm(context, rows)
    with context.attempt("the torch engine's constraint and draw"):
        _torch(context, 8 if context.small else 32)


def _vllm(context: Context, rows: int) -> None:
    if importlib.util.find_spec("vllm") is None:
        _stand_in()
        context.note("vLLM", "is not installed; its interfaces' empty classes stand in for them")
    else:
        vllm_process.prepare_process(context.kind)
    from earl.engines import vllm_constraint

    device, config = context.device, models.text_config(context.small, 1)
    ids, size = models.vocabulary(config), (4, 4)
    processor, on_cpu = (_processor(vllm_constraint, config, where, rows) for where in (device, torch.device("cpu")))
    # One row before its image, and one at each position of it and behind it.
    positions = torch.arange(rows) % (grid.shortest_completion(size) + 1)
    for one in (processor, on_cpu):
        for row in range(rows):
            one.add_request(row, SimpleNamespace(extra_args=vllm_constraint.extra_args(size)))
        one.apply_staged_writes()
        one.image_places[:] = torch.where(positions > 0, PROMPT, -1).to(one.image_places)
    found, expected = (_apply(one, positions, config.vocab_size, ids.bos) for one in (processor, on_cpu))
    equal = torch.equal(found().cpu(), expected())
    context.require("vLLM's constraint: mask equal to the CPU's", equal, str(equal), "equal")
    _arrives_without_waiting(context, processor, vllm_constraint.extra_args(size), rows)
    with _no_waiting(context):
        found()
    seconds = context.seconds(found, 20)
    name = f"vLLM's constraint at {rows} rows"
    context.measure(name, 1000 * seconds, "ms", Range(high=0.6), "the host waits for nothing")


def _stand_in() -> None:
    """Make what `INTERFACES` names importable as empty classes."""
    for name, classes in INTERFACES.items():
        package = ""
        for part in name.split("."):
            package = f"{package}.{part}" if package else part
            sys.modules[package] = sys.modules.get(package) or ModuleType(package)
        for each in classes:
            setattr(sys.modules[name], each, type(each, (), {"UNIDIRECTIONAL": None}))


def _processor(module: ModuleType, config: "Emu3TextConfig", device: torch.device, rows: int) -> "GridConstraintV2":
    ids = models.vocabulary(config)
    requests = SimpleNamespace(
        device=device,
        max_num_reqs=rows,
        vocab_size=config.vocab_size,
        all_token_ids=SimpleNamespace(gpu=torch.zeros(rows, 4096, dtype=torch.int32, device=device)),
        prompt_len=SimpleNamespace(gpu=torch.full((rows,), PROMPT, dtype=torch.int32, device=device)),
        prefill_len=SimpleNamespace(gpu=torch.full((rows,), PROMPT, dtype=torch.int32, device=device)),
    )
    # Its constructor reads the vocabulary from a folder.
    original, module.Vocabulary = module.Vocabulary, SimpleNamespace(from_folder=lambda folder: ids)
    try:
        return module.GridConstraintV2(SimpleNamespace(model_config=SimpleNamespace(model="")), requests)
    finally:
        module.Vocabulary = original


def _apply(
    processor: "GridConstraintV2", positions: torch.Tensor, vocabulary: int, token: int
) -> Callable[[], torch.Tensor]:
    """Return a call of the constraint on logits of all rows."""
    device, rows = processor.grids.device, len(positions)
    batch = SimpleNamespace(
        expanded_idx_mapping=torch.arange(rows, device=device),
        input_ids=torch.full((rows,), token, device=device),
        pos=(PROMPT - 1 + positions).to(device),
    )
    logits = torch.zeros(rows, vocabulary, device=device)
    return lambda: processor.apply(logits, batch)


@contextmanager
def _no_waiting(context: Context) -> Iterator[None]:
    """Within the block, an operation that makes the host wait for the device raises an error."""
    if context.device.type == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _arrives_without_waiting(context: Context, processor: "GridConstraintV2", extra_args: dict, rows: int) -> None:
    places = processor.image_places.clone()
    with context.attempt("vLLM's constraint: requests arrive"):
        for row in range(rows):
            processor.add_request(row, SimpleNamespace(extra_args=extra_args))
        with _no_waiting(context):
            processor.apply_staged_writes()
        context.require("vLLM's constraint: requests arrive", True, "the host waits for nothing", "no synchronisation")
    processor.image_places[:] = places


def _torch(context: Context, rows: int) -> None:
    device, config = context.device, models.text_config(context.small, 1)
    forbidden = grid.forbidden_table(models.vocabulary(config), config.vocab_size).to(device)
    kinds = torch.full((rows,), grid.VISUAL, device=device)
    logits = torch.randn(rows, config.vocab_size, device=device)
    noise, params = torch.rand(rows, dtype=torch.float64, device=device), SamplingParams(temperature=1.0)
    mask = context.seconds(lambda: logits.masked_fill(forbidden[kinds], -torch.inf), 20)
    draw = context.seconds(lambda: torch_engine.sample(logits, noise, params), 20)
    context.measure(f"torch engine: constraint at {rows} rows", 1000 * mask, "ms", Range(high=0.5))
    context.measure(f"torch engine: draw at {rows} rows", 1000 * draw, "ms", Range(high=3))
