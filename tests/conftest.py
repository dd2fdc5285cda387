"""Fixtures shared by tests: a tiny policy, its vocabulary, the shipped vision tokenizer."""

import os

# Before torch is imported anywhere: threads that wait must not spin, least of all when tests run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import itertools

import pytest

from earl.emu3.vocabulary import Vocabulary


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory):
    """A policy with random weights that knows one thing: after ``boi`` comes ``8*8`` and then ``img``."""
    import torch

    from earl.emu3 import checkpoint
    from earl.files import atomic
    from earl.shapes import policy

    blank = tmp_path_factory.mktemp("policies") / "blank"
    policy.write_policy(blank, seed=0)
    vocabulary = Vocabulary.from_folder(blank)
    model = checkpoint.load_policy(blank, torch.float32, "cpu")
    chain = [vocabulary.boi, *vocabulary.encode("8*8"), vocabulary.img]
    with torch.no_grad():
        # All embeddings share a common part; what tells tokens apart is the rest.
        embedding = model.model.embed_tokens.weight - model.model.embed_tokens.weight.mean(0)
        for before, after in itertools.pairwise(chain):
            model.lm_head.weight[after] += 8 * torch.nn.functional.normalize(embedding[before], dim=0)
    with atomic.folder(blank.parent / "policy") as folder:
        checkpoint.save_policy(model, folder, tokenizer_from=blank)
    return blank.parent / "policy"


@pytest.fixture(scope="session")
def vocabulary(policy_folder):
    return Vocabulary.from_folder(policy_folder)


SMALL = {
    "raw_datasets.shapes_sft.count": 32,
    "raw_datasets.shapes_rl.count": 24,
    "raw_datasets.shapes_heldout.count": 8,
    "sft.steps": 40,
    "sft.batch_size": 8,
    "episodes_per_iteration": 16,
    "generations_per_sample": 4,
    "per_device_batch_size": 8,
    "engine_batch_size": 4,
    "rollout_shards": 1,
    "num_iterations": 2,
    "evaluations.heldout.prompts": 4,
    "evaluations.heldout_greedy.prompts": 4,
}
"""The demo, cut down until a whole run takes seconds: what is learned is of no interest, what is written is."""


@pytest.fixture(scope="session")
def small_config(tmp_path_factory):
    """Return the small demo's configuration, all its variants under one folder of shared stages."""
    from pathlib import Path

    from earl.config import load

    base = tmp_path_factory.mktemp("runs")
    demo = Path(__file__).parent.parent / "config" / "demo.jsonnet"

    def make(run_name, **overrides):
        changes = {name.replace("__", "."): value for name, value in overrides.items()}
        return load.load(demo, {**SMALL, "base_exp_dir": str(base), "run_name": run_name, **changes}).config

    return make
