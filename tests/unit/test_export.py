"""An exported policy: its files, what they say, and what is refused. tests/integration/test_export.py uses it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from earl.emu3 import checkpoint, export, published, saving, tiktoken_files
from earl.emu3.vocabulary import Vocabulary
from earl.files import atomic, manifest
from earl.messages.errors import EarlError
from earl.shapes import policy
from earl.stages.tokenise import scaled_size
from tests.support import emu3_files
from tests.support.workplace import ROOT

USE = export.Use(image_area=64 * 64, prefill="<|image start|>{H}*{W}", sampling={"do_sample": True, "temperature": 0.6})


def stored(folder: Path, stem: str) -> dict[str, torch.Tensor]:
    """Return the weights that an index of a folder lists."""
    places = json.loads((folder / f"{stem}.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for file in sorted(set(places.values())):
        with safe_open(folder / file, framework="pt") as weights:
            assert {name for name, place in places.items() if place == file} == set(weights.keys())
            found |= {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    return found


@pytest.fixture(scope="module")
def exported(policy_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "model"
    export.write(policy_folder, policy.VISION_TOKENIZER, folder, USE)
    return folder


def test_two_sets_of_files_hold_the_policy_and_one_the_vision_tokenizer(exported, policy_folder):
    model = dict(checkpoint.load_policy(policy_folder, torch.float32, "cpu").named_parameters())
    tokenizer = {name: weight for _, name, weight in checkpoint.weights(policy.VISION_TOKENIZER)}
    whole, text = stored(exported, "model"), stored(exported, "causal_lm")
    assert text.keys() == model.keys()
    assert all(torch.equal(text[name], weight) for name, weight in model.items())
    assert {name for name in whole if name.startswith("model.vqmodel.")} == {f"model.vqmodel.{n}" for n in tokenizer}
    for name, weight in whole.items():
        own = checkpoint.text_weight_name(name)
        assert torch.equal(weight, tokenizer[name.removeprefix("model.vqmodel.")] if own is None else model[own])
    assert len(whole) == len(model) + len(tokenizer)
    again = checkpoint.weights(exported / "vision_tokenizer")
    assert all(torch.equal(weight, tokenizer[name]) for _, name, weight in again)


def test_it_is_sealed_and_equal_inputs_give_equal_bytes(exported, policy_folder, tmp_path):
    assert manifest.check(exported, deep=True) == sum(path.is_file() for path in exported.rglob("*")) - 1
    again = export.write(policy_folder, policy.VISION_TOKENIZER, tmp_path / "again", USE)
    assert again == manifest.digest_folder(exported)


def test_it_may_be_started_from(exported, policy_folder):
    """It is a policy folder of the format with a vision tokenizer, and so is what is trained from it."""
    assert checkpoint.check_policy(exported).size == Vocabulary.from_folder(policy_folder).size
    left, right = (checkpoint.load_policy(folder, torch.float32, "cpu") for folder in (exported, policy_folder))
    assert saving.config_text(left.config, torch.float32) == saving.config_text(right.config, torch.float32)
    beside = saving.companions(policy_folder)
    assert saving.save_policy(left, None, beside) == saving.save_policy(right, None, beside)


def test_large_weights_are_in_files_of_their_own(policy_folder, tmp_path, monkeypatch, exported):
    monkeypatch.setattr(saving, "FILE_SIZE", 150_000)
    export.write(policy_folder, policy.VISION_TOKENIZER, tmp_path / "model", USE)
    names = sorted(path.name for path in (tmp_path / "model").glob("causal_lm-*"))
    assert names[0] == f"causal_lm-00001-of-{len(names):05d}.safetensors"
    assert len(names) > 3
    for stem in ("model", "causal_lm"):
        found, expected = stored(tmp_path / "model", stem), stored(exported, stem)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


def test_in_another_type_the_vision_tokenizer_stays_as_it_is(policy_folder, exported, tmp_path):
    folder = tmp_path / "model"
    export.write(policy_folder, policy.VISION_TOKENIZER, folder, USE, torch.bfloat16)
    expected = stored(exported, "model")
    for name, weight in stored(folder, "model").items():
        same = expected[name] if name.startswith("model.vqmodel.") else expected[name].bfloat16()
        assert weight.dtype == same.dtype
        assert torch.equal(weight, same)
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == "bfloat16"


def test_a_weight_that_is_too_large_for_the_type_is_refused(policy_folder, tmp_path):
    model = checkpoint.load_policy(policy_folder, torch.float32, "cpu")
    with torch.no_grad():
        model.model.norm.weight[3] = 3.4e38
    with atomic.folder(tmp_path / "large") as folder:
        saving.save_policy(model, folder, saving.companions(policy_folder))
    with pytest.raises(EarlError, match=r"'model\.norm\.weight' is not finite as torch\.bfloat16"):
        export.write(tmp_path / "large", policy.VISION_TOKENIZER, tmp_path / "out", USE, torch.bfloat16)
    assert not (tmp_path / "out").exists()


def test_without_the_second_copy_the_class_that_needs_it_fails(policy_folder, tmp_path):
    """Its weights would be random otherwise, with a warning."""
    from transformers import AutoModelForCausalLM

    export.write(policy_folder, policy.VISION_TOKENIZER, tmp_path / "model", USE, causal_lm=False)
    assert not list((tmp_path / "model").glob("causal_lm*"))
    with pytest.raises(ValueError, match=r"causal_lm\.safetensors\.index\.json"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert "were left out" in (tmp_path / "model" / "README.md").read_text()


def test_an_unused_token_stands_for_an_image_where_there_is_one(policy_folder, tmp_path):
    """As in transformers' own checkpoints, which call it <image>; the small world has none to spare."""
    emu3_files.write_vocabulary(tmp_path, emu3_files.ranks_of(["red circle"], 300), 16)
    text = tiktoken_files.build_tokenizer(tmp_path).to_str()
    for name, content in (("<|extra_0|>", text), ("<image>", text.replace("<|extra_0|>", "<image>"))):
        (tmp_path / "tokenizer.json").write_text(content)
        assert export.placeholder(Vocabulary.from_folder(tmp_path)) == name
    assert export.placeholder(Vocabulary.from_folder(policy_folder)) == "<|extra_200|>"


def test_settings_of_training_become_those_of_generation(exported, policy_folder):
    found = json.loads((exported / "generation_config.json").read_text())
    known = Vocabulary.from_folder(policy_folder)
    assert (found["do_sample"], found["temperature"]) == (True, 0.6)
    assert (found["bos_token_id"], found["eos_token_id"], found["pad_token_id"]) == (known.bos, known.eos, known.pad)


def test_images_of_the_size_that_data_are_tokenised_at_stay_as_they_are(exported):
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(exported)
    for shape in ((64, 64), (96, 40), (40, 104)):
        assert scaled_size(*shape, 64 * 64, 8) == shape
        image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
        found = processor(images=[Image.fromarray(image)], return_tensors="pt")
        assert found.image_sizes.tolist() == [list(shape)]
        assert np.allclose(found.pixel_values[0].permute(1, 2, 0).numpy(), image / 127.5 - 1, atol=1e-6)


def test_another_vision_tokenizer_is_refused(policy_folder, tmp_path):
    emu3_files.write_vision_vq(tmp_path / "vq")
    published.convert(tmp_path / "vq", tmp_path / "vision")
    with pytest.raises(EarlError, match=r"has 256 visual tokens, but .*vision has \d+ codes"):
        export.write(policy_folder, tmp_path / "vision", tmp_path / "out", USE)


class TestCommand:
    def test_of_a_run(self, earl, new_run, policy_folder, tmp_path):
        """The newest policy on disk, which has to be the one on record."""
        _, run = new_run(image_area=64 * 64, vision_tokenizer_path="package:shapes/vision_tokenizer", top_k=7)
        shutil.copytree(policy_folder, run.iteration(2).policy)
        digest = manifest.digest_folder(policy_folder)
        run.iteration(2).trainer.mkdir()
        manifest.seal(run.iteration(2).trainer)
        metrics = {"policy_digest": digest, "inputs": {"policy": digest}}
        atomic.write_text(run.iteration(2).metrics, json.dumps(metrics))
        done = earl("export", "--run", run.path, "--out", tmp_path / "out")
        assert done.returncode == 0, done.stderr
        card = (tmp_path / "out" / "README.md").read_text()
        assert "# run, iteration 2" in card
        assert digest in card
        assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["top_k"] == 7
        assert earl("export", "--policy", run.iteration(2).policy, "--out", tmp_path / "again").returncode == 0
        assert manifest.digest_folder(tmp_path / "again") == manifest.digest_folder(tmp_path / "out")
        done = earl("export", "--run", run.path, "--iteration", 1, "--out", tmp_path / "one")
        assert "iteration 1 has not been trained" in done.stderr
        atomic.write_text(run.iteration(2).metrics, json.dumps(metrics | {"policy_digest": "0" * 64}))
        done = earl("export", "--run", run.path, "--out", tmp_path / "out")
        assert "says 000000000000" in done.stderr
        assert (tmp_path / "out" / "README.md").read_text() == card

    def test_of_a_folder(self, earl, tmp_path):
        arguments = ["export", "--policy", policy.BASE_POLICY, "--out", tmp_path / "out"]
        done = earl(*arguments)
        assert "give --config, the experiment that this policy was trained by" in done.stderr
        assert earl(*arguments, "--config", ROOT / "config" / "demo.jsonnet", "--dtype", "float32").returncode == 0
        assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"

    def test_a_policy_of_a_run_is_not_replaced(self, earl, tmp_path, policy_folder):
        shutil.copytree(policy_folder, tmp_path / "policy")
        digest = manifest.seal(tmp_path / "policy")
        arguments = ["export", "--policy", tmp_path / "policy", "--config", ROOT / "config" / "demo.jsonnet"]
        done = earl(*arguments, "--out", tmp_path / "policy")
        assert f"{tmp_path / 'policy'}: is there already and no export" in done.stderr
        assert manifest.digest_folder(tmp_path / "policy") == digest

    @pytest.mark.parametrize("wrong", [[], ["--run", "r", "--policy", "p"], ["--policy", "p", "--iteration", "1"]])
    def test_one_of_the_two(self, earl, tmp_path, wrong):
        done = earl("export", "--out", tmp_path / "out", *wrong)
        assert "give either --run" in done.stderr
