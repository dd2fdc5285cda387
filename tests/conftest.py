"""Fixtures shared by tests: a tiny policy, its vocabulary, the shipped vision tokenizer."""

import os

# Before torch is imported anywhere: threads that wait must not spin, least of all when tests run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

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
        embedding = model.model.embed_tokens.weight
        for before, after in zip(chain, chain[1:], strict=False):
            model.lm_head.weight[after] += 8 * torch.nn.functional.normalize(embedding[before], dim=0)
    with atomic.folder(blank.parent / "policy") as folder:
        checkpoint.save_policy(model, folder, tokenizer_from=blank)
    return blank.parent / "policy"


@pytest.fixture(scope="session")
def vocabulary(policy_folder):
    return Vocabulary.from_folder(policy_folder)
