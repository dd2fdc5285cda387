"""Fixtures that several files of unit tests share."""

import pytest

from tests.support import experiments


@pytest.fixture
def data(tmp_path, vocabulary):
    """Return a function that writes a tokenised data set of made-up pairs and returns its folder."""
    from tests.support import sft_files

    return lambda name, *args, **fields: sft_files.write_pairs(tmp_path, name, vocabulary, *args, **fields)


@pytest.fixture
def make(tmp_path, policy_folder, data):
    """Return a function that gives a configuration with these fine-tunings, each completed with what all share."""
    from tests.support import sft_files

    simple = data("simple")
    return lambda packing="groups", **tunings: sft_files.config(tmp_path, policy_folder, simple, packing, **tunings)


@pytest.fixture
def seen(monkeypatch):
    """Instead of fine-tuning, keep every training sequence of the mixture, in the list that this returns."""
    from earl.learner import sft

    found = []

    def look(policy, sequence, count, *_):
        found.extend(sequence(index) for index in range(count))
        return sft.Progress(1, [0.0])

    monkeypatch.setattr(sft, "fine_tune", look)
    return found


@pytest.fixture
def variables(monkeypatch):
    """Set the variables that the shipped experiments name."""
    for name, value in experiments.VARIABLES.items():
        monkeypatch.setenv(name, value)
