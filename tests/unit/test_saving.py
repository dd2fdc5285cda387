"""Policy folders: their digest without writing them, and what is refused when they are written or read."""

import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from earl.emu3 import checkpoint, saving, vocabulary
from earl.emu3.models import Emu3ForCausalLM
from earl.emu3.vocabulary import Vocabulary
from earl.files import atomic, manifest
from earl.messages.errors import EarlError


@pytest.fixture
def model(policy_folder):
    return checkpoint.load_policy(policy_folder, torch.float32, "cpu")


@pytest.fixture
def beside(policy_folder):
    return saving.companions(policy_folder)


@pytest.mark.parametrize("size", [saving.FILE_SIZE, 300_000, 1])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_the_digest_of_a_policy_that_is_not_written_is_that_of_one_that_is(
    model, beside, tmp_path, monkeypatch, size, dtype
):
    monkeypatch.setattr(saving, "FILE_SIZE", size)
    expected = saving.save_policy(model, None, beside, dtype)
    with atomic.folder(tmp_path / "policy") as folder:
        assert saving.save_policy(model, folder, beside, dtype) == expected
    assert manifest.digest_folder(tmp_path / "policy") == expected
    manifest.check(tmp_path / "policy", deep=True)
    found = Emu3ForCausalLM.from_pretrained(tmp_path / "policy", dtype="auto")
    assert next(found.parameters()).dtype == (dtype or torch.float32)
    for name, weight in model.named_parameters():
        assert torch.equal(found.get_parameter(name), weight.to(dtype or torch.float32)), name


def test_files_have_the_bytes_that_the_library_would_write(model, beside, tmp_path):
    saving.save_policy(model, tmp_path, beside)
    save_file(
        {name: weight.detach() for name, weight in model.named_parameters()}, tmp_path / "other", {"format": "pt"}
    )
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "other").read_bytes()


def test_writing_and_loading_again_and_again_changes_no_byte(policy_folder, tmp_path):
    """So a policy that stays in memory has the digest of one that is written and loaded after every step."""
    folders = [policy_folder, *(tmp_path / name for name in ("first", "second", "third"))]
    for before, after in itertools.pairwise(folders):
        after.mkdir()
        saving.save_policy(checkpoint.load_policy(before, torch.float32, "cpu"), after, saving.companions(before))
    kept = saving.save_policy(
        checkpoint.load_policy(policy_folder, torch.float32, "cpu"), None, saving.companions(policy_folder)
    )
    assert [manifest.digest_folder(folder) for folder in folders[1:]] == [kept] * 3


def test_a_folder_of_the_earlier_format_is_read_and_becomes_one_of_the_present(policy_folder, model, beside, tmp_path):
    """Its `config.json` had the fields of the text model at the top level."""
    old = shutil.copytree(policy_folder, tmp_path / "old")
    whole = json.loads((old / "config.json").read_text())
    flat = whole["text_config"] | {"architectures": ["Emu3ForCausalLM"], "transformers_version": "5.19.0"}
    (old / "config.json").write_text(json.dumps(flat))
    manifest.seal(old)
    assert checkpoint.check_policy(old) == checkpoint.check_policy(policy_folder)
    assert checkpoint.text_config(old).to_dict() == checkpoint.text_config(policy_folder).to_dict()
    again = checkpoint.load_policy(old, torch.float32, "cpu")
    assert saving.save_policy(again, None, beside) == saving.save_policy(model, None, beside)


def test_the_auto_classes_find_the_policy(policy_folder, model):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    found, notes = AutoModelForCausalLM.from_pretrained(policy_folder, output_loading_info=True)
    assert not any(notes.values()), notes
    assert type(found) is Emu3ForCausalLM
    assert AutoConfig.from_pretrained(policy_folder).architectures == ["Emu3ForCausalLM"]
    assert all(torch.equal(found.get_parameter(name), weight) for name, weight in model.named_parameters())
    vocabulary, text = Vocabulary.from_folder(policy_folder), "Remove the red circle!"
    assert AutoTokenizer.from_pretrained(policy_folder)(text).input_ids == vocabulary.encode(text)


def test_files_beside_the_weights_come_along_and_another_ones_content_counts(model, beside, tmp_path):
    assert beside.keys() >= {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    (tmp_path / "sft.json").write_text("{}")
    digest = saving.save_policy(model, tmp_path, beside)
    assert digest != saving.save_policy(model, None, beside)
    manifest.check(tmp_path, deep=True)
    assert "sft.json" in json.loads((tmp_path / manifest.NAME).read_text())["files"]
    assert {name: (tmp_path / name).read_bytes() for name in beside} == beside


@pytest.mark.parametrize(
    ("value", "dtype"), [(float("nan"), None), (float("inf"), torch.bfloat16), (3.4e38, torch.bfloat16)]
)
def test_weights_that_are_not_finite_are_not_written(model, beside, tmp_path, value, dtype):
    """The largest float32 numbers are infinite in bfloat16."""
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 5] = value
    complaint = r"weight 'model\.layers\.1\.mlp\.up_proj\.weight' is not finite, so the policy was not written"
    with pytest.raises(EarlError, match=complaint), atomic.folder(tmp_path / "policy") as folder:
        saving.save_policy(model, folder, beside, dtype)
    assert not list(tmp_path.iterdir())
    with pytest.raises(EarlError, match=complaint):
        saving.save_policy(model, None, beside, dtype)


def test_who_sealed_a_policy_has_looked_at_its_weights_and_of_another_they_are_looked_at(policy_folder, tmp_path):
    broken = shutil.copytree(policy_folder, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["lm_head.weight"][-1, -1] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    manifest.seal(broken)
    checkpoint.load_policy(broken, torch.float32, "cpu")
    (broken / manifest.NAME).unlink()
    complaint = r"broken/model\.safetensors: weight 'lm_head\.weight' is not finite"
    with pytest.raises(EarlError, match=complaint):
        checkpoint.load_policy(broken, torch.float32, "cpu")
    with pytest.raises(EarlError, match=complaint):
        checkpoint.check_policy(broken)


def test_a_seal_that_knows_digests_still_looks_at_sizes(tmp_path):
    (tmp_path / "a").write_text("abc")
    (tmp_path / "b").write_text("b")
    entries = {"a": manifest.entry_of(b"abc")}
    digest = manifest.seal(tmp_path, entries)
    assert digest == manifest.digest_of(entries | {"b": manifest.entry_of(b"b")})
    manifest.check(tmp_path, deep=True)
    (tmp_path / "a").write_text("ab")
    with pytest.raises(EarlError, match=r"a: has 2 bytes where 3 were written"):
        manifest.seal(tmp_path, entries)


def test_equal_tokenizers_are_parsed_once(policy_folder, tmp_path, monkeypatch):
    parsed = []

    def parse(content, path):
        parsed.append(path)
        return plain(content, path)

    plain = vocabulary._tokenizer
    monkeypatch.setattr(vocabulary, "_tokenizer", parse)
    monkeypatch.setattr(vocabulary, "_parsed", {})
    copy = shutil.copytree(policy_folder, tmp_path / "copy")
    first = Vocabulary.from_folder(policy_folder)
    assert Vocabulary.from_folder(copy) is first
    checkpoint.check_policy(copy)
    assert parsed == [policy_folder / "tokenizer.json"]
    content = json.loads((copy / "tokenizer.json").read_text())
    (copy / "tokenizer.json").write_text(json.dumps(content, indent=1))
    manifest.seal(copy)
    assert Vocabulary.from_folder(copy) is not first
    assert len(parsed) == 2
