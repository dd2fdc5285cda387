"""The learner side by side with the reference's way: tokens per second and peak memory of one gradient.

    PYTHONPATH=. python benchmarks/learner.py --completions 2

One group: a prompt and its completions, in sizes of EARL on Emu3 (1,060 tokens for 256x256 pixels, 184,622 ids) on a
model of few and narrow layers, whose head is most of the work. The reference's way takes one row an episode, the logits
of the whole row and a log-softmax over the whole vocabulary; completions are of one length here, so that nothing is
padded, and micro-batches of one row unless --micro-batch says more (EARL's configurations have 8). The kind way is the
same with logits of the completion alone. A gradient is there when the measured part begins, as in every micro-batch but
the first. Every case runs in a process of its own, since a process never gives its peak back; the policy gradient has
no KL term.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from resource import RUSAGE_SELF, getrusage

import numpy as np
import torch

from earl.execution.ranks import alone
from earl.learner import batches, grpo, logprobs, objective
from earl.learner.settings import Settings

VISUAL = (151_854, 184_622)
PROMPT, COMPLETION, VISUAL_TOKENS = 1_100, 1_060, 1_024
CASES = {
    "reference": "reference's way: whole rows, whole vocabulary",
    "kind": "reference's way, kindly: completions, whole vocabulary",
    "blocks": "ours: whole vocabulary, head by blocks",
    "split": "ours: split vocabulary, head by blocks",
    "packed": "ours: split vocabulary, head by blocks, prompt shared",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--completions", type=int, default=4)
    parser.add_argument("--micro-batch", type=int, default=1, help="rows; the packed case always takes the whole group")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--case", choices=CASES, help="run this case alone, in this process, and print JSON")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(arguments)))
        return
    print(f"torch {torch.__version__}, {vars(arguments)}\n")
    columns = ("", "tokens per CPU second", "peak GiB", "imports", "model, gradient", "the rest", "loss", "norm")
    print("|", " | ".join(columns), "|")
    print("|---|---|---|---|---|---|---|---|")
    for case in arguments.cases:
        command = [sys.executable, __file__, "--case", case]
        for option in ("completions", "micro-batch", "repeats", "width", "layers"):
            command += [f"--{option}", str(getattr(arguments, option.replace("-", "_")))]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rest = found["peak"] - found["imports"] - found["model"]
        memory = " | ".join(f"{part:.2f}" for part in (found["peak"], found["imports"], found["model"], rest))
        line = f"| {CASES[case]} | {found['tokens_per_s']:.0f} | {memory} | {found['loss']:.6f} | {found['norm']:.5f} |"
        print(line, flush=True)


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Median speed of the repeats, peak resident memory in GiB, and the loss and gradient norm as a check.

    Speed is by CPU time, with one thread, so that other work on a shared machine counts little.
    """
    torch.set_num_threads(1)
    import earl.emu3.models  # noqa: F401  (what it takes is no part of the model)

    imports = getrusage(RUSAGE_SELF).ru_maxrss / 2**20
    model = make_model(arguments.width, arguments.layers)
    episodes = make_episodes(arguments.completions)
    settings = Settings(
        kl_coeff=0.0,
        temperature=1.0,
        micro_batch=arguments.completions if arguments.case == "packed" else arguments.micro_batch,
        visual_range=VISUAL,
        support=logprobs.split_vocab(VISUAL) if arguments.case in ("split", "packed") else logprobs.FULL,
        counted="all",
        bfloat16=False,
        packed=arguments.case == "packed",
    )
    function = {"reference": reference_loss, "kind": kind_loss}.get(arguments.case, our_loss)
    speeds = []
    for _ in range(arguments.repeats):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        started, loss = time.process_time(), 0.0
        for batch, _ in batches.micro_batches(episodes, settings, alone(model.device), arguments.case):
            part = function(model, batch, settings, COMPLETION * len(episodes))
            part.backward()
            loss += part.item()
        speeds.append(COMPLETION * len(episodes) / (time.process_time() - started))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "tokens_per_s": statistics.median(speeds),
        "peak": getrusage(RUSAGE_SELF).ru_maxrss / 2**20,
        "imports": imports,
        "model": 2 * 4 * parameters / 2**30,
        "loss": loss,
        "norm": torch.nn.utils.get_total_norm(parameter.grad for parameter in model.parameters()).item(),
    }


def our_loss(model: torch.nn.Module, batch: batches.MicroBatch, settings: Settings, denominator: int) -> torch.Tensor:
    logp, _, _ = grpo.completion_logprobs(model, batch, settings)
    return grpo.batch_loss(logp, None, batch, denominator, settings)


def reference_loss(
    model: torch.nn.Module, batch: batches.MicroBatch, settings: Settings, denominator: int
) -> torch.Tensor:
    """Logits of all ids at every token of the row, a log-softmax over them, one of each kept, the prompt's left out."""
    logits = model(input_ids=batch.input_ids, use_cache=False).logits.float() / settings.temperature
    found = torch.log_softmax(logits[:, :-1].contiguous(), -1)
    found = found.gather(2, batch.input_ids[:, 1:].unsqueeze(2)).flatten()
    # A token is predicted one place before its own, so a row has one prediction less than places.
    predictions = batch.places - batch.places // batch.input_ids.shape[1]
    return objective.grpo_loss(found[predictions], batch.advantages, denominator)


def kind_loss(model: torch.nn.Module, batch: batches.MicroBatch, settings: Settings, denominator: int) -> torch.Tensor:
    """Logits of all ids at every completion token, a log-softmax over them, one of each row kept."""
    hidden = model.model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden.flatten(0, 1)[batch.places]).float() / settings.temperature
    logp = torch.log_softmax(logits, -1).gather(1, batch.targets.unsqueeze(1)).squeeze(1)
    return objective.grpo_loss(logp, batch.advantages, denominator)


def make_model(width: int, layers: int) -> torch.nn.Module:
    from earl.emu3.models import Emu3ForCausalLM, Emu3TextConfig

    torch.manual_seed(0)
    config = Emu3TextConfig(
        vocab_size=VISUAL[1],
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=PROMPT + COMPLETION,
        pad_token_id=0,
    )
    return Emu3ForCausalLM(config).eval()


def make_episodes(completions: int) -> list[batches.Episode]:
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, VISUAL[1], PROMPT)
    return [
        batches.Episode(
            episode_id=f"0-{sample}",
            group_id="0",
            prompt=prompt,
            completion=np.concatenate(
                [rng.integers(*VISUAL, VISUAL_TOKENS), rng.integers(0, VISUAL[0], COMPLETION - VISUAL_TOKENS)]
            ),
            forced=np.zeros(COMPLETION, dtype=bool),
            behavior_logprobs=np.zeros(COMPLETION, dtype=np.float32),
            advantage=(-1.0) ** sample,
        )
        for sample in range(completions)
    ]


if __name__ == "__main__":
    main()
