"""What tests run as several ranks and in their own process: each rank samples its own prompts, with its own vLLM.

    forked_ranks.launch(2, "tests.support.sampling_program", <policy folder>, <other policy>, <out>)

`sample_by` of a process that is no rank does what both do, one after the other. It writes `<out>/<rank>.json`:
completions of the first policy, of the second one's weights taken from memory, and of the first one loaded anew after
it was closed.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from earl.emu3 import checkpoint, sequence
from earl.emu3.vocabulary import Vocabulary
from earl.engines import Completion, Engine, Request, SamplingParams
from earl.execution import processes, ranks

RANKS = 2
PARAMS = SamplingParams(temperature=1.0, max_tokens=80)


def requests(rank: int, vocabulary: Vocabulary) -> list[Request]:
    """The second rank has more to do, and larger images."""
    shapes = [(2, 3), (4, 4), (3, 2)] if rank else [(2, 2)]
    tokens = [np.random.default_rng([rank, index]).integers(0, 256, shape) for index, shape in enumerate(shapes)]
    return [
        Request(sequence.prompt_ids(grid, "remove it", "<|image start|>", vocabulary), grid.shape, [rank, 9 + index])
        for index, grid in enumerate(tokens)
    ]


def weights(policy: Path) -> list[tuple[str, torch.Tensor]]:
    model = checkpoint.load_policy(policy, torch.float32, "cpu")
    return [(name, weight.detach()) for name, weight in model.named_parameters()]


def sample_by(sampler: Engine, policy: Path, other: Path, out: Path) -> None:
    """Sample as one rank of those there are, or as all of them where there are none."""
    vocabulary = Vocabulary.from_folder(policy)
    with ranks.joined(torch.device("cpu")) as team:
        own = [team.rank] if team.size > 1 else range(RANKS)

        def sample() -> list[list[list[Completion]]]:
            return [sampler.generate(requests(rank, vocabulary), PARAMS) for rank in own]

        sampler.load(policy)
        found = [sample()]
        sampler.update(weights(other), "of the other")
        found.append(sample())
        sampler.close()
        assert team.gather(team.rank) == list(range(team.size)), "the ranks are still joined"
        sampler.load(policy)
        found.append(sample())
        sampler.close()
        for index, rank in enumerate(own):
            steps = [[[vars(one) for one in group] for group in step[index]] for step in found]
            (out / f"{rank}.json").write_text(json.dumps(steps))


def main(arguments: list[str]) -> None:
    from earl.engines import vllm_engine

    torch.set_num_threads(1)
    settings = vllm_engine.Settings(device="cpu", dtype="float32", context=512, memory_share=0.02)
    sample_by(vllm_engine.VllmEngine(settings), *map(Path, arguments))


if __name__ == "__main__":
    main(sys.argv[1:])
    processes.end_at_once(0)
