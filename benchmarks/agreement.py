"""How far sampler and learner agree in a token's log-prob, by engine and type, with logits rounded and not.

    OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/agreement.py

The same tokens as the engine and the learner see them, and how many completions differ when requests come in another
order, that is, in other batches. `dtype: 'bfloat16'` is measured with logits in float32, as they are, and with logits
that both sides round to bfloat16, as a head does by itself. Two policies: the one that ships with the package; and one
of 32,768 visual tokens, as many as Emu3's, and width 512, with random weights and a head that gives a visual token an
entropy of some 3 nats. A learner splits its models, here over one rank.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from earl.emu3 import float32, grid, saving, sequence
from earl.emu3.vocabulary import Vocabulary
from earl.engines import Completion, Engine, Request, SamplingParams, vllm_engine
from earl.engines.torch_engine import TorchEngine
from earl.execution import ranks
from earl.files import atomic
from earl.learner import batches, grpo, logprobs, sharding
from earl.learner.settings import Settings
from earl.shapes import policy as shapes

SIZE, SAMPLES = (8, 8), 8
WIDTH, CODES = 512, 32768
HEAD = 0.14
"""Standard deviation of the wide policy's head; that of its logits is this times the root of the width."""
CPU = torch.device("cpu")
KINDS = {"float32": ("float32", False), "bfloat16, logits rounded": ("bfloat16", True), "bfloat16": ("bfloat16", False)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--layers", type=int, default=4, help="of the wide policy")
    parser.add_argument("--types", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--policies", nargs="+", choices=("shapes", "wide"), default=["shapes", "wide"])
    parser.add_argument("--engines", nargs="+", choices=("torch", "vllm"), default=["torch", "vllm"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    columns = "| policy | engine | type | log-prob difference, mean | largest | entropy | changed by another order |"
    print(f"{columns}\n|{'---|' * 7}")
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.policies:
            policy = shapes.BASE_POLICY if name == "shapes" else write_wide(Path(folder), arguments.layers)
            for engine in arguments.engines:
                for kind in arguments.types:
                    dtype, rounded = KINDS[kind]
                    row = agreement(policy, engine, dtype, rounded, arguments.prompts)
                    print(f"| {name} | {engine} | {kind} | {row} |", flush=True)


def write_wide(folder: Path, layers: int) -> Path:
    """Write the wide policy, with the shapes world's tokenizer, and return its folder."""
    from transformers import Emu3ForCausalLM

    from earl.emu3.vocabulary import write_tokenizer

    with mock.patch.object(shapes, "CODES", CODES):
        tokenizer = shapes.build_tokenizer()
    config = shapes.build_model(tokenizer, 0).config
    config.update({"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": layers})
    config.update({"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": WIDTH // 8})
    torch.manual_seed(0)
    model = Emu3ForCausalLM(config).float()
    with torch.no_grad():
        model.lm_head.weight.normal_(std=HEAD)
        for weight in model.parameters():
            weight.copy_(weight.bfloat16())  # as published weights are
    with atomic.folder(folder / "wide") as temporary:
        model.generation_config.save_pretrained(temporary)
        write_tokenizer(tokenizer, temporary, shapes.MAX_LENGTH)
        saving.save_policy(model, temporary, {})
    return folder / "wide"


def agreement(policy: Path, engine: str, dtype: str, rounded: bool, count: int) -> str:
    """Return mean and largest difference, the tokens' mean entropy, and the share of completions an order changes."""
    vocabulary = Vocabulary.from_folder(policy)
    rng = np.random.default_rng(0)
    size = vocabulary.size - vocabulary.first_visual
    prefill = f"<|image start|>{SIZE[0]}*{SIZE[1]}"
    prompts = [
        sequence.prompt_ids(rng.integers(0, size, SIZE), "remove the red circle", prefill, vocabulary)
        for _ in range(count)
    ]
    requests = [Request(ids, SIZE, range(SAMPLES * k, SAMPLES * (k + 1))) for k, ids in enumerate(prompts)]
    params = SamplingParams(temperature=1.0, max_tokens=96)
    with rounding(rounded):
        sampler = make(engine, dtype)
        sampler.load(policy)
        groups = sampler.generate(requests, params)
        again = sampler.generate(requests[::-1], params)[::-1]
        sampler.close()
        differences, entropy = compare(policy, vocabulary, requests, groups, dtype)
    pairs = [(a, b) for one, other in zip(groups, again, strict=True) for a, b in zip(one, other, strict=True)]
    changed = np.mean([a.token_ids != b.token_ids for a, b in pairs])
    return f"{differences.mean():.1e} | {differences.max():.1e} | {entropy:.2f} | {changed:.0%} of {len(pairs)}"


@contextmanager
def rounding(rounded: bool) -> Iterator[None]:
    """Have both engines and the learner round logits to bfloat16."""
    exact, options = float32.logits, vllm_engine.llm_options
    if not rounded:
        yield
        return
    with (
        mock.patch.object(float32, "logits", lambda *factors: exact(*factors).bfloat16().float()),
        mock.patch.object(vllm_engine, "llm_options", lambda *a: options(*a) | {"hf_overrides": None}),
    ):
        yield


def make(engine: str, dtype: str) -> Engine:
    if engine == "torch":
        return TorchEngine(CPU, getattr(torch, dtype), SAMPLES, 512, constrained=True)
    return vllm_engine.VllmEngine(vllm_engine.Settings("cpu", dtype, context=512, memory_share=0.05))


def compare(
    policy: Path,
    vocabulary: Vocabulary,
    requests: Sequence[Request],
    groups: Sequence[Sequence[Completion]],
    dtype: str,
) -> tuple[torch.Tensor, float]:
    """Return the absolute differences of the chosen tokens, in nats, and their mean entropy."""
    episodes = [
        batches.Episode(
            episode_id=f"{index:04d}-{sample}",
            group_id=f"{index:04d}",
            prompt=np.array(request.prompt_token_ids),
            completion=np.array(completion.token_ids),
            forced=grid.kinds_of_completion(completion.token_ids, SIZE, vocabulary) >= grid.FIRST_FORCED,
            behavior_logprobs=np.array(completion.logprobs, dtype=np.float32),
            advantage=0.0,
        )
        for index, (request, group) in enumerate(zip(requests, groups, strict=True))
        for sample, completion in enumerate(group)
    ]
    visual = (vocabulary.first_visual, vocabulary.size)
    bfloat16 = dtype == "bfloat16"
    settings = Settings(0.0, 1.0, SAMPLES, visual, logprobs.split_vocab(visual), "all", bfloat16, packed=True)
    differences, entropies = [], []
    with ranks.joined(CPU, splits_alone=bfloat16) as team, torch.no_grad():
        learner = sharding.load(policy, team, bfloat16)
        for batch, _ in batches.micro_batches(episodes, settings, team):
            logp, entropy, _ = grpo.completion_logprobs(learner, batch, settings)
            differences.append((logp - batch.behavior_logprobs).abs())
            entropies.append(entropy)
    return torch.cat(differences), torch.cat(entropies).mean().item()


if __name__ == "__main__":
    main()
