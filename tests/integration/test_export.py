"""An exported model, and a policy folder, in processes without this package: transformers' auto classes, and vLLM."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from earl import cli
from earl.emu3 import checkpoint, sequence, vision
from earl.emu3.vocabulary import Vocabulary
from earl.engines import Request, SamplingParams
from earl.engines.torch_engine import TorchEngine
from earl.shapes import policy, world
from tests.support.workplace import ROOT

pytestmark = pytest.mark.slow

MAX_TOKENS = 96
PREFILL = "<|image start|>"
TEXT = "Remove the red circle<|image start|>8*8<|image token|>"


@pytest.fixture(scope="module")
def edit() -> world.Edit:
    return world.edit(11, 0, ("remove",))


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """The shipped base policy, which edits some pictures, in float32."""
    folder = tmp_path_factory.mktemp("exports") / "model"
    words = ["export", "--policy", policy.BASE_POLICY, "--out", folder]
    words += ["--config", ROOT / "config" / "demo.jsonnet", "--dtype", "float32"]
    assert cli.call(list(map(str, words))) == 0
    return folder


@pytest.fixture(scope="module")
def request_of(exported, edit, tmp_path_factory) -> dict[str, Any]:
    """What `exported_program` and `vllm_program` are asked."""
    folder = tmp_path_factory.mktemp("request")
    Image.fromarray(world.render(edit.original)).save(folder / "original.png")
    return {
        "exported": str(exported),
        "policy": str(policy.BASE_POLICY),
        "original": str(folder / "original.png"),
        "edited": str(folder / "edited.png"),
        "instruction": edit.instruction,
        "max_tokens": MAX_TOKENS,
        "text": TEXT,
        "dtype": "auto",
    }


def run(program: str, asked: dict[str, Any], folder: Path, **env: str) -> dict[str, Any]:
    (folder / "request.json").write_text(json.dumps(asked))
    command = [sys.executable, str(ROOT / "tests" / "support" / program), "request.json", "result.json"]
    done = subprocess.run(command, cwd=folder, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def tokens(edit) -> np.ndarray:
    tokenizer = checkpoint.load_vision_tokenizer(policy.VISION_TOKENIZER, "cpu")
    return vision.encode(tokenizer, [world.render(edit.original)])[0]


def completion(tokens: np.ndarray, instruction: str, constrained: bool) -> list[int]:
    """What the engine samples at temperature 0."""
    engine = TorchEngine(torch.device("cpu"), torch.float32, batch_size=1, context=320, constrained=constrained)
    engine.load(policy.BASE_POLICY)
    prompt = sequence.prompt_ids(tokens, instruction, PREFILL, Vocabulary.from_folder(policy.BASE_POLICY))
    request = Request(prompt, tokens.shape, [0])
    ((found,),) = engine.generate([request], SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS))
    return found.token_ids


def test_transformers_loads_it_and_does_what_the_engine_does(request_of, edit, exported, tokens, tmp_path):
    found = run("exported_program.py", request_of, tmp_path)
    assert found["class"] == "Emu3ForConditionalGeneration"
    assert found["exported"]["class"] == found["policy"]["class"] == "Emu3ForCausalLM"
    vocabulary = Vocabulary.from_folder(policy.BASE_POLICY)
    prompt = sequence.prompt_ids(tokens, edit.instruction, PREFILL, vocabulary)
    assert found["prompt"] == found["prompt_bfloat16"] == prompt
    assert found["written"] == completion(tokens, edit.instruction, constrained=True)
    free = completion(tokens, edit.instruction, constrained=False)
    assert found["exported"]["completion"] == found["policy"]["completion"] == free
    assert found["exported"]["text_ids"] == found["policy"]["text_ids"] == vocabulary.encode(TEXT)
    grid = sequence.parse_completion(found["written"], vocabulary)
    expected = vision.decode(checkpoint.load_vision_tokenizer(policy.VISION_TOKENIZER, "cpu"), [grid])[0]
    picture = np.asarray(Image.open(request_of["edited"])).astype(int)
    assert np.abs(picture - expected).max() <= 1  # the processor cuts what is rounded here


SITE = f"""
import runpy, sys
sys.modules["earl"] = None
operators = runpy.run_path({str(ROOT / "earl" / "execution" / "torch_extensions.py")!r})["work_around"]()
"""
"""What every process of vLLM does first."""


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_loads_it_and_reads_images_and_their_tokens_alike(request_of, edit, tokens, tmp_path):
    """By its own path for models of transformers."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)
    env = {"PYTHONPATH": str(tmp_path / "site"), "VLLM_PLUGINS": "", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    vocabulary = Vocabulary.from_folder(policy.BASE_POLICY)
    prompt = sequence.prompt_ids(tokens, edit.instruction, PREFILL, vocabulary)
    found = run("exported_vllm_program.py", request_of | {"prompt": prompt}, tmp_path, **env)
    hidden = [vocabulary.eol if token >= vocabulary.first_visual else token for token in prompt]
    assert found["prompt"] == hidden
    assert found["of_image"] == found["of_tokens"] == completion(tokens, edit.instruction, constrained=False)
