"""Only near names are suggested, wherever a name is not known."""

import pytest

from earl.config import load
from earl.config.schema import Config
from earl.messages import names
from earl.messages.errors import EarlError

FIELDS = list(Config.model_fields)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("run_nam", "run_name"),
        ("learnig_rate", "learning_rate"),
        ("temprature", "temperature"),
        ("num_iteration", "num_iterations"),
        ("batch_size", "engine_batch_size"),
        ("judge_sample", "judge_samples"),
    ],
)
def test_a_near_name_is_suggested(given, meant) -> None:
    assert names.near(given, FIELDS) == meant
    assert names.hint(given, FIELDS, "elsewhere") == f"did you mean {meant}?"


@pytest.mark.parametrize("given", ["x", "foo", "epochs", "gpus", "verbose", "", "количество"])
def test_no_name_is_suggested_that_is_not_near(given) -> None:
    assert names.near(given, FIELDS) is None
    assert names.hint(given, FIELDS, "elsewhere") == "elsewhere"
    assert names.hint(given, ["one", "two"], "elsewhere") == "there are one, two"
    assert names.near(given, []) is None


def error_of(overrides: dict) -> str:
    with pytest.raises(EarlError) as raised:
        load.load("config/demo.jsonnet", overrides)
    return str(raised.value)


def test_of_a_configuration() -> None:
    assert "field temprature (in --set) is unknown; did you mean temperature?" in error_of({"temprature": 1})
    far = error_of({"verbose": True})
    assert "field verbose (in --set) is unknown; earl/config/schema.py lists all fields" in far
    assert "mean" not in far


def test_of_a_section() -> None:
    message = error_of({"raw_datasets.shapes_rl.cout": 3})
    assert "raw_datasets.shapes_rl.cout" in message
    assert "did you mean count?" in message
    message = error_of({"judge_gate.zzz": 3})
    assert "zzz" in message
    assert "there are pairs" in message
    assert "did you mean" not in message
