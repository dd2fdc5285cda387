"""Packed beside padded rows: an iteration's step as the ten experiments have it, shrunk for a CPU.

    OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/packing.py

Groups of eight completions, micro-batch, KL term with its reference, recomputed layers and split vocabulary are as in
config/sft_s__rl_s.jsonnet. Emu3 is shrunk eightfold in width, ids, prompt and completion, so that layers, attention and
head have about the shares of the work that they have in Emu3, and to 8 of its 32 layers. Without reasoning all
completions have the same length, so that padded rows hold no padding: what packing saves is the prompt, computed once
instead of eight times. Float32 and one thread; seconds are CPU time. Each step runs in a process of its own, in turns;
the peak is what the process takes beyond its two models.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from earl.config import load
from earl.learner import grpo, logprobs
from earl.learner.batches import Episode
from earl.learner.performance import Clock
from earl.learner.settings import Settings

EXPERIMENT = Path(__file__).parents[1] / "config" / "sft_s__rl_s.jsonnet"
FIRST_VISUAL, IDS, WIDTH, INNER, HEADS, KEY_HEADS = 151_854, 184_622, 4096, 14_336, 32, 8
PROMPT, COMPLETION, VISUAL_TOKENS = 1_100, 1_060, 1_024
"""Tokens of an edit of 256 x 256 pixels; the completion's others are text."""
SHRUNK = 8
CASES = ("padded", "packed")
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shrunk", type=int, default=SHRUNK)
    parser.add_argument("--case", choices=CASES, help="do this step alone, in this process, and print JSON")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(step(arguments)))
        return
    print(f"torch {torch.__version__}, {vars(arguments)}\n")
    print("| | tokens through the layers | CPU seconds | episodes a CPU second | peak, MiB | loss | gradient norm |")
    print("|---|---|---|---|---|---|---|")
    found = [(case, json.loads(run(case))) for _ in range(arguments.repeats) for case in CASES]
    for case in CASES:
        measured = [one for name, one in found if name == case]
        seconds, peak = (statistics.median(one[name] for one in measured) for name in ("seconds", "peak"))
        one = measured[0]
        row = f"{one['tokens']} | {seconds:.1f} | {one['episodes'] / seconds:.2f} | {peak / 2**20:.0f}"
        print(f"| {case} | {row} | {one['loss']:.6f} | {one['gradient_norm']:.5f} |")


def run(case: str) -> str:
    command = [sys.executable, __file__, *sys.argv[1:], "--case", case]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def step(arguments: argparse.Namespace) -> dict[str, float]:
    """Do a step that moves nothing; return CPU seconds, bytes at the peak, and loss and gradient norm as a check."""
    torch.set_num_threads(1)
    settings = of_experiment(FIRST_VISUAL // arguments.shrunk, IDS // arguments.shrunk)
    settings = replace(settings, packed=arguments.case == "packed")
    policy, reference = (make_model(arguments.layers, arguments.shrunk, seed) for seed in (0, 1))
    reference.requires_grad_(False)
    episodes = make_episodes(arguments.groups, settings, arguments.shrunk)
    optimizer, clock = torch.optim.SGD(policy.parameters(), lr=0.0), Clock(CPU)
    with clock.phase("at rest"):
        pass
    started = time.process_time()
    metrics = grpo.train_iteration(policy, reference, optimizer, episodes, settings, "step", clock=clock)
    return {
        "seconds": time.process_time() - started,
        "peak": max(clock.peaks.values()) - clock.peaks["at rest"],
        "tokens": tokens(episodes, settings.packed),
        "episodes": len(episodes),
        "loss": metrics["loss"],
        "gradient_norm": metrics["gradient_norm"],
    }


def of_experiment(first_visual: int, ids: int) -> Settings:
    """Return the learner's settings of the experiment, in float32."""
    for name in ("RUN_NAME", "BASE_EXP_DIR", "DATA_DIR"):
        os.environ.setdefault(f"APP__{name}", "unused")
    os.environ.setdefault("APP__REWARD_FUNCTION_API_BASE", "http://unused:1")
    config = load.load(EXPERIMENT).config
    return Settings(
        kl_coeff=config.kl_coeff,
        temperature=config.temperature,
        micro_batch=config.per_device_batch_size,
        visual_range=(first_visual, ids),
        support=logprobs.split_vocab((first_visual, ids)),
        counted="all",
        bfloat16=False,
        gradient_checkpointing=config.gradient_checkpointing,
    )


def make_model(layers: int, shrunk: int, seed: int) -> torch.nn.Module:
    from earl.emu3.models import Emu3ForCausalLM, Emu3TextConfig

    torch.manual_seed(seed)
    config = Emu3TextConfig(
        vocab_size=IDS // shrunk,
        hidden_size=WIDTH // shrunk,
        intermediate_size=INNER // shrunk,
        num_hidden_layers=layers,
        num_attention_heads=HEADS // shrunk,
        num_key_value_heads=max(1, KEY_HEADS // shrunk),
        max_position_embeddings=PROMPT + COMPLETION,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return Emu3ForCausalLM(config).float().eval()


def make_episodes(groups: int, settings: Settings, shrunk: int) -> list[Episode]:
    rng = np.random.default_rng(0)
    first, ids = settings.visual_range
    visual, length = VISUAL_TOKENS // shrunk, COMPLETION // shrunk
    return [
        Episode(
            episode_id=f"{group}-{sample}",
            group_id=str(group),
            prompt=prompt,
            completion=np.concatenate([rng.integers(first, ids, visual), rng.integers(0, first, length - visual)]),
            forced=np.zeros(length, dtype=bool),
            behavior_logprobs=np.zeros(length, dtype=np.float32),
            advantage=(-1.0) ** sample,
        )
        for group in range(groups)
        for prompt in [rng.integers(0, ids, PROMPT // shrunk)]
        for sample in range(settings.micro_batch)
    ]


def tokens(episodes: list[Episode], packed: bool) -> int:
    """Return how many tokens go through the layers."""
    prompts = {episode.group_id: episode for episode in episodes}.values() if packed else episodes
    return sum(len(one.prompt) for one in prompts) + sum(len(one.completion) for one in episodes)


if __name__ == "__main__":
    main()
