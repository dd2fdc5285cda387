"""Experiments for the tests of the configuration: the smallest one, and the variables that the shipped ones name."""

import json
from pathlib import Path

import pytest

from earl.config import load
from earl.messages.errors import EarlError

VARIABLES = {
    "APP__DATA_DIR": "/data",
    "APP__BASE_EXP_DIR": "/experiments",
    "APP__RUN_NAME": "trial",
    "APP__REWARD_FUNCTION_API_BASE": "http://judge:4877",
}
MINIMAL = {"run_name": "a", "base_exp_dir": "runs", "train_paths_file": ["x"], "val_paths_file": [], "judge": "program"}
ASKED = {"judge": "openai", "reward_function_api_base": "http://localhost:1"}
"""A judge that says what it is asked for alone."""


def experiment(folder: Path, **fields: object) -> Path:
    path = folder / "x.jsonnet"
    path.write_text(json.dumps(MINIMAL | fields))
    return path


def error_of(path: Path, **overrides: object) -> str:
    with pytest.raises(EarlError) as caught:
        load.load(path, overrides)
    return str(caught.value)
