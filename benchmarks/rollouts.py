"""What the grid constraint costs vLLM.

Tokens per second with the constraint, without it, and with a naive one, which loops over requests in Python and builds
each mask anew; in turns, in one engine, by batch size. Speed is counted in CPU seconds of this process; run it on one
thread. Other work on the machine still slows it down, so each run also tells which share of its own time went into the
constraint.

    OMP_NUM_THREADS=1 PYTHONPATH=. taskset -c 1 python benchmarks/rollouts.py
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from earl.emu3 import checkpoint, sequence
from earl.emu3.vocabulary import Vocabulary
from earl.engines import vllm_engine, vllm_process
from tests.support import policies

BATCHES = (16, 32, 64, 128, 256)
TOKENS = 80
SIZE = (8, 8)
VARIANTS = ("none", "constraint", "naive")


def write_policy(folder: Path) -> Path:
    """The shapes world's policy with random weights, taught how an image begins."""

    def size_and_img_follow_boi(model: Any, vocabulary: Vocabulary) -> None:
        policies.teach(model, [vocabulary.boi, *vocabulary.encode("8*8"), vocabulary.img], strength=8)

    return policies.write(folder, size_and_img_follow_boi)


def prompts(vocabulary: Vocabulary, count: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [
        sequence.prompt_ids(rng.integers(0, 256, SIZE), "remove the red circle", "<|image start|>", vocabulary)
        for _ in range(count)
    ]


def run(llm: Any, policy: Path, variant: str, batch: int) -> tuple[float, float]:
    """Return the tokens per CPU second of a batch of completions of equal length, and the constraint's share of it."""
    from vllm import SamplingParams as VllmSamplingParams

    from benchmarks.rollouts_processors import Switch
    from earl.engines import vllm_constraint

    vocabulary = Vocabulary.from_folder(policy)
    requests = [{"prompt_token_ids": ids} for ids in prompts(vocabulary, batch // 8) for _ in range(8)]
    params = [
        VllmSamplingParams(
            max_tokens=TOKENS,
            ignore_eos=True,
            logprobs=0,
            detokenize=False,
            seed=seed,
            extra_args=vllm_constraint.extra_args(SIZE),
        )
        for seed in range(batch)
    ]
    Switch.active, Switch.seconds = variant, 0.0
    with vllm_process.vllm_torch("cpu"):
        start = time.process_time()
        outputs = llm.generate(requests, params, use_tqdm=False)
        seconds = time.process_time() - start
    assert all(len(output.outputs[0].token_ids) == TOKENS for output in outputs)
    return batch * TOKENS / seconds, Switch.seconds / seconds


def compare_speeds(policy: Path, rounds: int) -> None:
    settings = vllm_engine.Settings("cpu", "float32", context=256)
    options = vllm_engine.llm_options(settings, checkpoint.text_config(policy), settings.lora)
    options["logits_processors"] = ["benchmarks.rollouts_processors:Switch"]
    from vllm import LLM

    llm = LLM(model=str(policy), **options)
    run(llm, policy, "constraint", max(BATCHES))  # for what is done once, and for the cache of prompts
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for index in range(rounds):
        order = VARIANTS[index % 3 :] + VARIANTS[: index % 3]
        for batch in BATCHES:
            for variant in order:
                found.setdefault((variant, batch), []).append(run(llm, policy, variant, batch))
        print(f"round {index + 1} of {rounds}", flush=True)
    print(
        "\n| completions | none, tok/s | constraint | naive | time in constraint | in naive |"
        "\n|---|---|---|---|---|---|"
    )
    for batch in BATCHES:
        speeds, shares = zip(
            *([statistics.median(values) for values in zip(*found[v, batch], strict=True)] for v in VARIANTS),
            strict=True,
        )
        print(f"| {batch} | " + " | ".join(f"{s:.0f}" for s in speeds) + f" | {shares[1]:.1%} | {shares[2]:.1%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        policy = write_policy(Path(folder) / "policy")
        compare_speeds(policy, arguments.rounds)


if __name__ == "__main__":
    main()
