"""The learner's step over fake tensors: the real modules and the real step, without a GPU, numbers or memory.

A fake tensor has shape, type and device, and its operations are those of torch, so that what is counted here is what a
rank holds. Run as a program, it reads cases as JSON from standard input and writes their peaks as JSON to standard
output: the process group that pretends to be one of several ranks then lives in no process of the caller's.

What a fake tensor cannot answer is a question about its values. Where the code asks, `Count` answers with what takes
the most memory: every token counts, and every number is finite.
"""

import dataclasses
import json
import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from earl.emu3 import adapter, vision
from earl.emu3.adapter import Lora
from earl.emu3.models import Emu3ForCausalLM, Emu3TextConfig, Emu3VQVAE, Emu3VQVAEConfig
from earl.estimate.cases import Bytes, Case, VisionCase
from earl.execution.ranks import Ranks
from earl.learner import batches, grpo, head, logprobs, sharding, trainer_state
from earl.learner.batches import Episode, MicroBatch
from earl.learner.settings import Settings

MICRO_BATCHES = 2
"""Of a step in earnest: the second one finds the gradients of the first, which a simulated one gets without it."""
WORTH_A_LOOK = 0.0001
"""Bytes of a new tensor, as a share of the peak so far, at which all are counted anew."""


def run(case: Case | VisionCase) -> Bytes:
    """Return what a rank holds. Call it in a process in which no process group is open."""
    if isinstance(case, VisionCase):
        return _vision(case)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=case.ranks)
    try:
        return step(case, FakeTensorMode(allow_non_fake_inputs=True))
    finally:
        dist.destroy_process_group()


def _vision(case: VisionCase) -> Bytes:
    """As `earl.emu3.vision` does it with a batch."""
    tokens = case.side // vision.SPATIAL_FACTOR
    size = vision.batch_size(tokens**2)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        tokenizer = Emu3VQVAE(Emu3VQVAEConfig.from_dict(json.loads(case.vision))).eval()
        count = Count()
        weights = count.hold(tokenizer.parameters(), tokenizer.buffers())
        grids, pixels = torch.zeros(size, tokens, tokens, dtype=torch.long), torch.zeros(size, 3, case.side, case.side)
        with count:
            with count.phase("decode"):
                vision.first_frames(tokenizer, grids)
            with count.phase("encode"):
                vision.tokens_of(tokenizer, pixels)
    return Bytes({"weights": weights}, dict(count.peaks))


def step(case: Case, fake: FakeTensorMode | None) -> Bytes:
    """Return what a rank holds in a step, in the process group that is open; without `fake`, do the step in earnest."""
    text = Emu3TextConfig.from_dict(json.loads(case.text))
    text.tie_word_embeddings = False
    team = Ranks(0, case.ranks, torch.device("cpu"), splits_alone=case.splits)
    settings = _settings(case, text)
    batch = batches.collate(list(_episodes(case)), settings, team.device)
    lora = Lora(*case.lora[:2], tuple(case.lora[2])) if case.lora else None
    policy = _model(text, team, case, fake, lora=lora)
    reference = None
    if case.reference:  # the policy without its adapter, where it has one
        reference = policy if lora else _model(text, team, case, fake, frozen=True)
    with fake or nullcontext():
        batch = _as_fake(batch, fake) if fake else batch
        optimizer = grpo.new_optimizer(policy, 1e-6)
        trainer_state.put_zeros(policy, optimizer, 0)
        count = Count()
        at_rest = {"weights": count.hold(policy.parameters(), policy.buffers())}
        at_rest["moments"] = count.hold(*(state.values() for state in optimizer.state.values()))
        if case.offload and not lora and reference:  # in main memory, which here is the same device
            count.leave_out(reference.parameters())
        at_rest["reference"] = count.hold(reference.parameters(), reference.buffers()) if reference else 0
        with count, grpo.ready_to_learn(policy, settings):
            _step(policy, reference, optimizer, batch, settings, count, in_earnest=fake is None)
    return Bytes(at_rest, dict(count.peaks))


def _step(
    policy: Emu3ForCausalLM,
    reference: Emu3ForCausalLM | None,
    optimizer: torch.optim.Optimizer,
    batch: MicroBatch,
    settings: Settings,
    count: "Count",
    in_earnest: bool,
) -> None:
    """As `grpo.train_iteration` does it."""
    optimizer.zero_grad(set_to_none=True)
    if not in_earnest:
        for weight in policy.parameters():
            weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
    for _ in range(MICRO_BATCHES if in_earnest else 1):
        with count.phase("forward"):
            logp, entropy, kept = grpo.completion_logprobs(policy, batch, settings)
        reference_logp = None
        if reference is not None:
            with count.phase("reference"), torch.no_grad(), adapter.disabled(reference):
                reference_logp, _, _ = grpo.completion_logprobs(reference, batch, settings, kept)
        loss = grpo.batch_loss(logp, entropy, reference_logp, batch, len(batch.targets), settings)
        with count.phase("backward"):
            loss.backward()
        del logp, entropy, kept, reference_logp, loss
    with count.phase("step"):
        grpo.optimizer_step(policy, optimizer, grpo.Totals(tokens=1), grpo.MAX_GRADIENT_NORM)


def _model(
    text: Emu3TextConfig,
    team: Ranks,
    case: Case,
    fake: FakeTensorMode | None,
    frozen: bool = False,
    lora: Lora | None = None,
) -> Emu3ForCausalLM:
    """As `sharding` loads it, with zeros in the place of a folder's weights."""
    offload = frozen and case.offload
    # Before fake tensors: the ranks are arranged by their numbers, which such tensors do not have.
    if team.splits:
        model = sharding.empty(text, team, case.bfloat16, frozen, offload, lora)
    else:
        with torch.device("meta"):
            dtype = torch.bfloat16 if frozen and case.bfloat16 else torch.float32
            model = Emu3ForCausalLM(text).to(dtype).requires_grad_(not frozen)
        if lora is not None:
            adapter.add(model, lora)
    with fake or nullcontext():
        sharding.allocate(model, team, offload)
    with fake or nullcontext(), torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    return model.eval()


def _settings(case: Case, text: Emu3TextConfig) -> Settings:
    return Settings(
        kl_coeff=1.0 if case.reference else 0.0,
        temperature=1.0,
        micro_batch=case.episodes,
        visual_range=(0, text.vocab_size),
        support=_support(case, text.vocab_size),
        counted="all",
        bfloat16=case.bfloat16,
        packed=case.packed,
        gradient_checkpointing=case.checkpointing,
    )


def _support(case: Case, ids: int) -> logprobs.Support:
    """The head goes through its ids in blocks, and takes as much for one as for many; what is kept is a bit an id."""
    whole = logprobs.Support(((0, ids),), case.top_k, case.top_p)
    return whole if whole.truncated else logprobs.Support(((0, min(ids, head.IDS)),))


def _episodes(case: Case) -> Iterator[Episode]:
    """Episodes of full length, all of whose tokens count."""
    for index in range(case.episodes):
        group = index // case.group
        yield Episode(
            f"{index:06d}",
            f"{group:06d}",
            np.full(case.prompt, group, dtype=np.int64),
            np.full(case.completion, 0, dtype=np.int64),
            np.zeros(case.completion, dtype=bool),
            np.zeros(case.completion, dtype=np.float32),
            1.0,
        )


def _as_fake(batch: MicroBatch, fake: FakeTensorMode) -> MicroBatch:
    tensors = {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    return dataclasses.replace(batch, **{name: fake.from_tensor(value) for name, value in tensors.items()})


class Count(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and keeps the most that there are in each phase.

    Attributes:
        peaks: bytes by phase.
    """

    def __init__(self) -> None:
        super().__init__()
        self._phase = ""
        self.peaks: dict[str, int] = defaultdict(int)
        self._alive: dict[int, weakref.ref] = {}
        self._left_out: set[int] = set()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what there is in the block as that of a phase."""
        self._phase = name
        self._look()
        yield
        self._look()
        self._phase = ""

    def leave_out(self, tensors: Iterable[torch.Tensor]) -> None:
        """Never count these tensors, which live as long as this object is used."""
        self._left_out |= {id(_storage(tensor)) for tensor in tensors}

    def hold(self, *groups: Iterable[Any]) -> int:
        """Count tensors that are there already; return the bytes of those that are new."""
        before = self._total()
        for tensor in (tensor for group in groups for tensor in group):
            self._add(tensor)
        return self._total() - before

    def _add(self, tensor: torch.Tensor) -> None:
        storage = _storage(tensor)
        key = id(storage)
        if key not in self._alive and key not in self._left_out:
            self._alive[key] = weakref.ref(storage, lambda _: self._alive.pop(key, None))

    def _total(self) -> int:
        storages = [found for reference in list(self._alive.values()) if (found := reference()) is not None]
        return sum(storage.nbytes() for storage in storages)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in ANSWERS and isinstance(args[0], FakeTensor):
            return ANSWERS[function](args[0])
        found = function(*args, **(kwargs or {}))
        new = 0
        for tensor in tree_iter(found):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor)
                new += tensor.nbytes
        if self._phase and new > WORTH_A_LOOK * self.peaks[self._phase]:
            self._look()
        return found

    def _look(self) -> None:
        self.peaks[self._phase] = max(self.peaks[self._phase], self._total())


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return getattr(tensor, "_local_tensor", tensor).untyped_storage()


def _everywhere(mask: torch.Tensor) -> torch.Tensor:
    return torch.stack(torch.meshgrid(*(torch.arange(n) for n in mask.shape), indexing="ij"), -1).flatten(0, -2)


def _number(scalar: torch.Tensor) -> float | bool:
    if scalar.dtype == torch.bool:
        return False
    return 1.0 if scalar.dtype.is_floating_point else 0


ANSWERS: dict[Any, Callable[[torch.Tensor], Any]] = {
    torch.ops.aten.nonzero.default: _everywhere,
    torch.ops.aten._local_scalar_dense.default: _number,
}
"""Operations that ask for values, and the answers."""


if __name__ == "__main__":
    cases = [(VisionCase if "side" in fields else Case)(**fields) for fields in json.load(sys.stdin)]
    json.dump([asdict(run(case)) for case in cases], sys.stdout)
