"""Rollouts with PyTorch and transformers alone: batches of a fixed shape.

A completion depends on its prompt, its seed and the batch it stands in, bit for bit: batches are cut at multiples
of ``batch_size`` samples and the last one is filled up, so shards that begin at such a multiple change nothing.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from earl.emu3 import adapter, checkpoint, float32, truncation
from earl.emu3 import grid as grid_rules
from earl.emu3.models import Emu3ForCausalLM
from earl.emu3.vocabulary import Vocabulary
from earl.engines import Completion, Request, SamplingParams, checked, memory_errors, room
from earl.execution import runtime
from earl.files import manifest
from earl.messages.errors import EarlError
from earl.statistics import seeds

if TYPE_CHECKING:
    from earl.config.schema import Config


class TorchEngine:
    """See the module.

    Args:
        device: Where to compute.
        dtype: Type of the weights.
        batch_size: Samples in a batch, always.
        context: Longest sequence, prompt and completion together, in tokens.
        constrained: Whether to apply the grid constraint of `earl.emu3.grid`.
        lora: Settings of the adapter that `update` gets the weights of; None: of all weights.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        batch_size: int,
        context: int,
        constrained: bool,
        lora: adapter.Lora | None = None,
    ) -> None:
        self.device, self.dtype, self.lora = device, dtype, lora
        self.batch_size, self.context, self.constrained = batch_size, context, constrained
        self.policy: Emu3ForCausalLM | None = None
        self.vocabulary: Vocabulary | None = None
        self._digest: str | None = None
        self._sleeps = False

    @classmethod
    def from_config(cls, config: "Config") -> "TorchEngine":
        """Return an engine with the configuration's settings."""
        return cls(
            device=runtime.prepare(config),
            dtype=runtime.dtype(config.dtype),
            batch_size=config.engine_batch_size,
            context=config.model_context_size,
            constrained=config.emu3_use_logit_processor,
            lora=config.lora and config.lora.settings,
        )

    def load(self, policy: Path) -> None:
        digest = manifest.digest_folder(checkpoint.check_files(policy))
        if digest == self._digest:
            self.wake()
            return
        self.close()
        with memory_errors("use a device with more memory"):
            self.policy = checkpoint.load_policy(policy, self.dtype, self.device, self.lora)
        self.vocabulary = Vocabulary.from_folder(policy)
        self.forbidden = grid_rules.forbidden_table(self.vocabulary, self.policy.config.vocab_size).to(self.device)
        self._digest = digest

    @torch.no_grad()
    def update(self, weights: Iterable[tuple[str, torch.Tensor]], digest: str) -> None:
        self.wake()
        parameters = adapter.weights(self._loaded()) or dict(self._loaded().named_parameters())
        self._digest = None
        try:
            for name, weight in checked(weights, {name: own.shape for name, own in parameters.items()}):
                parameters[name].copy_(weight)
        except BaseException:
            self.close()  # Some of the weights are the old ones.
            raise
        self._digest = digest

    def sleep(self) -> None:
        self._move(torch.device("cpu"), sleeps=True)

    def wake(self) -> None:
        self._move(self.device, sleeps=False)

    def _move(self, device: torch.device, sleeps: bool) -> None:
        if self.policy is None or self.device.type == "cpu" or sleeps == self._sleeps:
            return
        with memory_errors("use a device with more memory"):
            self.policy.to(device)
        self._sleeps = sleeps
        torch.cuda.empty_cache()

    def close(self) -> None:
        self.policy, self._digest, self._sleeps = None, None, False
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _loaded(self) -> Emu3ForCausalLM:
        if self.policy is None:
            raise EarlError("no policy is loaded; load one first")
        if self._sleeps:
            raise EarlError("the engine sleeps; wake it first")
        return self.policy

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[list[Completion]]:
        self._loaded()
        for request in requests:
            room(request, params, self.context)  # Refuses what cannot be sampled before any time is spent.
        total = sum(len(request.seeds) for request in requests)
        completions: list[list[Completion]] = []
        remedy = f"lower engine_batch_size ({self.batch_size}) or max_response_tokens ({params.max_tokens})"
        with (
            memory_errors(remedy),
            tqdm(total=total, desc="generate", unit="completion", mininterval=2) as progress,
        ):
            for batch in _batches(requests, self.batch_size):
                completions.extend(self._generate_batch(batch, params))
                progress.update(sum(len(request.seeds) for request in batch))
        return completions

    def _generate_batch(self, batch: list[Request], params: SamplingParams) -> list[list[Completion]]:
        samples = len(batch[0].seeds)
        wanted = len(batch)
        batch = batch + [batch[-1]] * (self.batch_size // samples - wanted)
        hidden, cache, state = self._prefill(batch, params.max_tokens)
        noise = _uniform_noise(batch, params.max_tokens, self.device)
        limits = [room(request, params, self.context) for request in batch for _ in request.seeds]
        tokens, logprobs = self._decode(hidden, cache, state, noise, params, limits)
        flat = [
            _completion(row_tokens[:limit], row_logprobs[:limit], self.vocabulary.eos)
            for row_tokens, row_logprobs, limit in zip(tokens.tolist(), logprobs.tolist(), limits, strict=True)
        ]
        return [flat[i * samples : (i + 1) * samples] for i in range(wanted)]

    def _prefill(self, batch: list[Request], max_tokens: int) -> tuple[torch.Tensor, "KeyValueCache", "_State"]:
        """Run each prompt once and copy its cache to its samples; prompts are padded on the left."""
        samples = len(batch[0].seeds)
        lengths = torch.tensor([len(request.prompt_token_ids) for request in batch])
        width = int(lengths.max())
        ids = torch.full((len(batch), width), self.vocabulary.pad)
        for row, request in enumerate(batch):
            ids[row, width - lengths[row] :] = torch.as_tensor(request.prompt_token_ids)
        valid = torch.arange(width) >= (width - lengths)[:, None]
        # A padded query may see itself alone, since a row of the softmax must not be empty.
        mask = (valid[:, None, :] & torch.ones(width, width).tril().bool()) | torch.eye(width).bool()
        positions = (torch.arange(width) - (width - lengths)[:, None]).clamp_min(0)
        cache = KeyValueCache()
        hidden = self._forward(ids.to(self.device), positions.to(self.device), mask[:, None].to(self.device), cache)
        rows = torch.arange(len(batch)).repeat_interleave(samples).to(self.device)
        cache.spread(samples, max_tokens)
        state = _State(
            visible=torch.cat([valid, torch.ones(len(batch), max_tokens, dtype=torch.bool)], 1).to(self.device)[rows],
            filled=width,
            next_position=lengths.to(self.device)[rows],
            grid=torch.tensor([request.grid for request in batch], device=self.device)[rows],
        )
        return hidden[rows], cache, state

    def _forward(
        self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, cache: "KeyValueCache"
    ) -> torch.Tensor:
        """Return the hidden state of the last position, [rows, width]."""
        output = self.policy.model(
            input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True
        )
        return output.last_hidden_state[:, -1]

    def _decode(
        self,
        hidden: torch.Tensor,
        cache: "KeyValueCache",
        state: "_State",
        noise: torch.Tensor,
        params: SamplingParams,
        limits: Sequence[int],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens and log-probs, [rows, max_tokens]; what follows ``eos`` or a row's limit is padding."""
        rows = len(hidden)
        vocabulary = self.vocabulary
        tokens = torch.full((rows, params.max_tokens), vocabulary.pad, device=self.device)
        logprobs = torch.zeros(rows, params.max_tokens, device=self.device)
        since_img = torch.full((rows,), -1, device=self.device)
        done = torch.zeros(rows, dtype=torch.bool, device=self.device)
        last = torch.tensor(limits, device=self.device) - 1
        for step in range(params.max_tokens):
            kind = grid_rules.kind_at(since_img, state.grid[:, 0], state.grid[:, 1])
            if not self.constrained:
                kind = torch.full_like(kind, grid_rules.FREE)
            logits = float32.logits(hidden, self.policy.lm_head.weight).masked_fill_(self.forbidden[kind], -torch.inf)
            token, logprob = sample(logits, noise[:, step], params)
            token = torch.where(done, vocabulary.pad, token)
            tokens[:, step] = token
            logprobs[:, step] = torch.where(done, 0.0, logprob)
            since_img = torch.where(since_img >= 0, since_img + 1, (token == vocabulary.img).int() - 1)
            done |= (token == vocabulary.eos) | (last <= step)
            # The host looks at `done` once in 16 tokens, so that a GPU is not held up at every one.
            if step + 1 == max(limits) or (step % 16 == 15 and bool(done.all())):
                break
            mask = state.visible[:, None, None, : state.filled + step + 1]
            hidden = self._forward(token[:, None], (state.next_position + step)[:, None], mask, cache)
        return tokens, logprobs


class KeyValueCache:
    """Keys and values of every layer, [rows, heads, positions, width]; of a cache it has what the model calls.

    The static one of transformers takes its memory once, too, but attention then reads what is not filled yet.
    """

    def __init__(self) -> None:
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._filled: list[int] = []

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Append to a layer, and return all that it holds."""
        if layer == len(self._layers):
            self._layers.append((keys, values))
            self._filled.append(keys.shape[2])
            return keys, values
        begin = self._filled[layer]
        end = self._filled[layer] = begin + keys.shape[2]
        for held, new in zip(self._layers[layer], (keys, values), strict=True):
            held[:, :, begin:end] = new
        return tuple(held[:, :, :end] for held in self._layers[layer])

    def spread(self, samples: int, further: int) -> None:
        """Repeat every row so often, and take the memory for so many further positions."""
        self._layers = [tuple(_spread(held, samples, further) for held in layer) for layer in self._layers]


def _spread(held: torch.Tensor, samples: int, further: int) -> torch.Tensor:
    rows, heads, filled, width = held.shape
    spread = held.new_empty(rows * samples, heads, filled + further, width)
    spread.view(rows, samples, heads, -1, width)[..., :filled, :] = held[:, None]
    return spread


class _State:
    """What decoding needs to know of the prefill, by row (one a sample)."""

    def __init__(self, visible: torch.Tensor, filled: int, next_position: torch.Tensor, grid: torch.Tensor) -> None:
        self.visible, self.filled = visible, filled
        self.next_position, self.grid = next_position, grid


def _batches(requests: Sequence[Request], batch_size: int) -> Iterator[list[Request]]:
    """Cut requests into batches of ``batch_size`` samples.

    Raises:
        EarlError: when the number of samples differs between requests or does not divide the batch size.
    """
    counts = {len(request.seeds) for request in requests}
    if len(counts) > 1:
        raise EarlError(f"the torch engine wants equally many samples of every prompt, not {sorted(counts)}")
    for samples in counts:
        if batch_size % samples:
            raise EarlError(
                f"engine_batch_size is {batch_size}, which is no multiple of the {samples} samples of a prompt; "
                f"set it to a multiple of {samples}"
            )
        step = batch_size // samples
        for start in range(0, len(requests), step):
            yield list(requests[start : start + step])


def _uniform_noise(batch: Sequence[Request], max_tokens: int, device: torch.device) -> torch.Tensor:
    """Return float64 [rows, max_tokens] in [0, 1): each row from its own seed."""
    rows = [
        torch.from_numpy(seeds.generator("tokens", seed).random(max_tokens))
        for request in batch
        for seed in request.seeds
    ]
    return torch.stack(rows).to(device)


def sample(logits: torch.Tensor, noise: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token a row by inverting the cumulative distribution.

    Args:
        logits: float32 [rows, ids], -inf where an id is not allowed.
        noise: float64 [rows], uniform in [0, 1).
        params: Temperature and truncation.

    Returns:
        Token ids, int64 [rows], and their log-probs, float32 [rows], under the distribution drawn from.
    """
    if params.temperature == 0:
        return logits.argmax(-1), torch.zeros_like(logits[:, 0])
    logprobs = truncate(torch.log_softmax(logits / params.temperature, -1), params)
    cumulative = logprobs.double().exp().cumsum(-1)
    total = cumulative[:, -1]
    # Strictly below the total, or rounding could point past the last id that has any probability.
    threshold = torch.minimum(noise * total, torch.nextafter(total, torch.zeros_like(total)))
    token = torch.searchsorted(cumulative, threshold[:, None], right=True)
    return token[:, 0], logprobs.gather(-1, token)[:, 0]


def truncate(logprobs: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Return log-probs [rows, ids] restricted to the top k, then to the top p, and normalised again."""
    if not truncation.is_on(params.top_k, params.top_p):
        return logprobs
    kept = truncation.kept_ids(logprobs, params.top_k, params.top_p)
    return torch.log_softmax(logprobs.masked_fill(~kept, -torch.inf), -1)


def _completion(tokens: list[int], logprobs: list[float], eos: int) -> Completion:
    if eos in tokens:
        end = tokens.index(eos) + 1
        return Completion(tokens[:end], logprobs[:end], "stop")
    return Completion(tokens, logprobs, "length")
