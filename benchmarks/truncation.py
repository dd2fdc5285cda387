"""Log-probs of the torch engine under top_k and top_p against the learner's over `logprob_support: 'sampled'`.

    PYTHONPATH=. python benchmarks/truncation.py

The learner finds again, from logits of its own, which ids the sampler kept; this says how close the two come.
"""

import tempfile
from pathlib import Path

import torch
from tests.test_objective_logprobs import rollouts

from earl.emu3 import checkpoint, grid
from earl.emu3.vocabulary import Vocabulary
from earl.engines import SamplingParams
from earl.engines.torch_engine import TorchEngine
from earl.learner import grpo
from earl.learner.logprobs import Support
from earl.learner.settings import Settings
from tests.support import policies

TRUNCATIONS = [(1.0, -1), (0.9, -1), (0.7, -1), (1.0, 5), (1.0, 50), (0.8, 12)]
TEMPERATURE = 0.8


def mismatch(policy: Path, vocabulary: Vocabulary, dtype: torch.dtype, top_p: float, top_k: int) -> str:
    """Mean and largest difference in nats over the counted tokens of 8 completions."""
    engine = TorchEngine(torch.device("cpu"), dtype, batch_size=8, context=512, constrained=True)
    episodes = rollouts(engine, policy, vocabulary, SamplingParams(TEMPERATURE, top_p, top_k, max_tokens=60))
    support = Support(tuple(grid.free_ranges(vocabulary).values()), top_k, top_p)
    visual = (vocabulary.first_visual, vocabulary.size)
    settings = Settings(0.0, TEMPERATURE, 3, visual, support, "all", dtype == torch.bfloat16)
    # Rounded, as the engine has them.
    learner = checkpoint.load_policy(policy, dtype, "cpu").float()
    found = grpo.train_iteration(learner, None, torch.optim.SGD(learner.parameters(), lr=0.0), episodes, settings)
    return f"{found['logprob_mismatch_mean']:.2g}, {found['logprob_mismatch_max']:.2g}"


def main() -> None:
    torch.set_num_threads(1)
    print("| top_p, top_k | float32 | bfloat16 |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        policy = policies.write(Path(folder) / "picky", policies.be_picky)
        vocabulary = Vocabulary.from_folder(policy)
        for top_p, top_k in TRUNCATIONS:
            found = (mismatch(policy, vocabulary, dtype, top_p, top_k) for dtype in (torch.float32, torch.bfloat16))
            print(f"| {top_p:g}, {top_k} | {' | '.join(found)} |", flush=True)


if __name__ == "__main__":
    main()
