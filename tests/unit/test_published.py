"""Emu3 as it is published: small files in the exact formats become folders that stages read, and no code runs."""

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from earl.emu3 import checkpoint, published, sequence, tiktoken_files, vision
from earl.emu3.vocabulary import ROLES, Vocabulary
from earl.files import manifest
from earl.messages.errors import EarlError
from tests.support import emu3_files

TEXTS = [
    "Remove the red circle, it's 2024!\n",
    "l'été où  les naïfs dansent 12*34",
    "把红色的圆圈去掉",
    "<|start thinking|>",
]
VISUAL = 16


@pytest.fixture(scope="module")
def ranks() -> list[bytes]:
    found = emu3_files.ranks_of(TEXTS, 400)
    assert len(found) == 337
    return found


@pytest.fixture(scope="module")
def original(ranks: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the format of BAAI/Emu3-Gen."""
    folder = tmp_path_factory.mktemp("published") / "Emu3-Gen"
    emu3_files.write_policy(folder, len(ranks), VISUAL)
    emu3_files.write_vocabulary(folder, ranks, VISUAL)
    return folder


@pytest.fixture(scope="module")
def oracle(ranks: list[bytes]) -> tiktoken.Encoding:
    return oracle_of(ranks)


def oracle_of(ranks: list[bytes]) -> tiktoken.Encoding:
    """The library that the published tokenizer calls, set up as it does."""
    names = [*tiktoken_files._FIRST_SPECIAL, *emu3_files.special_names(VISUAL)]
    return tiktoken.Encoding(
        "emu3",
        pat_str=tiktoken_files._WORDS,
        mergeable_ranks={token: rank for rank, token in enumerate(ranks)},
        special_tokens={name: len(ranks) + index for index, name in enumerate(names)},
    )


@pytest.fixture(scope="module")
def vocabulary(converted: Path) -> Vocabulary:
    return Vocabulary.from_folder(converted)


@pytest.fixture(scope="module")
def converted(original: Path) -> Path:
    folder = original.parent / "policy"
    published.convert(original, folder)
    return folder


class TestVocabularyFiles:
    def test_ids_of_the_published_size_are_those_of_the_specification(self, tmp_path: Path) -> None:
        # As many tokens as the published file has; which bytes they stand for does not matter here.
        ranks = [bytes([byte]) for byte in range(256)]
        ranks += [b"ab" + number.to_bytes(3, "big") for number in range(151_643 - 256)]
        emu3_files.write_vocabulary(tmp_path, ranks, 32_768)
        tokenizer = tiktoken_files.build_tokenizer(tmp_path)
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        found = Vocabulary.from_folder(tmp_path)
        assert (found.boi, found.img, found.eoi) == (151_852, 151_851, 151_853)
        assert (found.eol, found.eof) == (151_846, 151_847)
        assert (found.bos, found.eos, found.pad) == (151_849, 151_850, 151_643)
        assert (found.first_visual, found.num_visual, found.size) == (151_854, 32_768, 184_622)

    @settings(deadline=None, max_examples=300)
    @given(st.lists(st.sampled_from([*TEXTS, "red circle", " ", "\n", "é", "e\u0301", "7"]) | st.text(max_size=8)))
    def test_text_becomes_the_ids_that_tiktoken_gives(self, vocabulary, oracle, parts: list[str]) -> None:
        text = "".join(parts)
        assert vocabulary.encode_plain(text) == oracle.encode_ordinary(unicodedata.normalize("NFC", text))
        written = f"{ROLES['boi']}{text}{ROLES['img']}<|visual token 000003|>{ROLES['eos']}"
        expected = oracle.encode(unicodedata.normalize("NFC", written), allowed_special="all")
        assert vocabulary.encode(written) == expected
        assert vocabulary.decode(expected) == oracle.decode(expected)

    def test_reasoning_and_its_end_are_one_string_as_in_the_reference(self, tmp_path: Path) -> None:
        """A full stop and the `<` after it are one token of the published file, and of this one."""
        ranks = emu3_files.ranks_of(["It moves.<|end thinking|>"], 400)
        oracle, end = oracle_of(ranks), "<|end thinking|>"
        assert oracle.encode_ordinary(f".{end}") != oracle.encode_ordinary(".") + oracle.encode_ordinary(end)
        emu3_files.write_vocabulary(tmp_path, ranks, VISUAL)
        tiktoken_files.build_tokenizer(tmp_path).save(str(tmp_path / "tokenizer.json"))
        grid = np.zeros((2, 2), dtype=np.int64)
        found = Vocabulary.from_folder(tmp_path)
        ids, start = sequence.sft_ids(grid, "Go", grid, [("plan", "It moves."), ("why", " <|image end|>?\n")], found)
        text = f" Let's think step by step. <|start thinking|> plan: It moves. why: <|image end|>?{end}"
        assert ids[start : ids.index(found.boi, start)] == oracle.encode_ordinary(text)

    @pytest.mark.parametrize(
        ("file", "change", "part"),
        [
            ("emu3.tiktoken", lambda text: text + "!!!! 400\n", "line 338 is no token in base64"),
            ("emu3.tiktoken", lambda text: text + "QUJDREU=\n", "line 338 is no token in base64"),
            ("emu3.tiktoken", lambda text: text + "QUJDREU= 7\n", "ranks are not 0, 1, 2"),
            ("emu3.tiktoken", lambda text: "", "ranks are not 0, 1, 2"),
            ("emu3.tiktoken", lambda text: "QQ== 0\n", "no token for byte 0"),
            ("emu3_vision_tokens.txt", lambda text: text + "<|image end|>\n", "'<|image end|>' twice"),
        ],
    )
    def test_damage_is_named(self, ranks, tmp_path: Path, file: str, change, part: str) -> None:
        emu3_files.write_vocabulary(tmp_path, ranks, VISUAL)
        (tmp_path / file).write_text(change((tmp_path / file).read_text()))
        with pytest.raises(EarlError) as error:
            tiktoken_files.build_tokenizer(tmp_path)
        assert file in str(error.value)
        assert part in str(error.value)

    def test_a_missing_file_is_named(self, ranks, tmp_path: Path) -> None:
        emu3_files.write_vocabulary(tmp_path, ranks, VISUAL)
        (tmp_path / "emu3_vision_tokens.txt").unlink()
        with pytest.raises(EarlError, match=r"emu3_vision_tokens\.txt: cannot be read"):
            tiktoken_files.build_tokenizer(tmp_path)


class TestPolicy:
    def test_weights_and_settings_are_kept(self, original: Path, converted: Path) -> None:
        manifest.check(converted, deep=True)
        stored = {}
        for file in original.glob("*.safetensors"):
            stored |= load_file(file)
        model = checkpoint.load_policy(converted, torch.float32, "cpu")
        assert stored.keys() == model.state_dict().keys()
        for name, weight in model.state_dict().items():
            assert np.array_equal(weight.numpy(), stored[name])
        assert model.config.rope_parameters["rope_theta"] == 1_000_000
        assert (model.config.num_key_value_heads, model.config.rms_norm_eps) == (2, 1e-5)
        assert not any("auto_map" in path.read_text() for path in converted.glob("*.json"))
        assert not list(converted.glob("*.py"))

    def test_it_loads_in_transformers(self, converted: Path, vocabulary: Vocabulary) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(converted)
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
            vocabulary.bos,
            vocabulary.eos,
            vocabulary.pad,
        )
        assert tokenizer("red circle").input_ids == vocabulary.encode_plain("red circle")

    def test_it_computes(self, converted: Path, vocabulary: Vocabulary) -> None:
        prompt = sequence.prompt_ids(np.zeros((2, 2), int), "remove it", ROLES["boi"], vocabulary)
        model = checkpoint.load_policy(converted, torch.float32, "cpu")
        logits = model(torch.tensor([prompt])).logits
        assert logits.shape == (1, len(prompt), vocabulary.size)
        assert logits.isfinite().all()

    def test_the_tokenizer_may_come_from_elsewhere(self, original: Path, ranks, tmp_path: Path) -> None:
        bare = tmp_path / "sft-simple"
        emu3_files.write_policy(bare, len(ranks), VISUAL, shards=1)
        with pytest.raises(EarlError, match=r"holds neither tokenizer\.json nor emu3\.tiktoken; give --tokenizer"):
            published.convert(bare, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        published.convert(bare, tmp_path / "out", tokenizer_from=original)
        assert checkpoint.check_policy(tmp_path / "out").num_visual == VISUAL
        assert (tmp_path / "out" / "model.safetensors").is_file()

    def test_a_tokenizer_of_another_model_is_refused(self, original: Path, ranks, tmp_path: Path) -> None:
        emu3_files.write_vocabulary(tmp_path / "other", ranks[:-1], VISUAL)
        with pytest.raises(EarlError, match="use the tokenizer that the model was trained with"):
            published.convert(original, tmp_path / "out", tokenizer_from=tmp_path / "other")

    def test_a_missing_shard_is_named(self, ranks, tmp_path: Path) -> None:
        folder = tmp_path / "in"
        emu3_files.write_policy(folder, len(ranks), VISUAL)
        emu3_files.write_vocabulary(folder, ranks, VISUAL)
        (folder / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(EarlError, match=r"model-00002-of-00002\.safetensors: is missing"):
            published.convert(folder, tmp_path / "out")

    def test_a_stage_says_how_to_convert(self, original: Path) -> None:
        with pytest.raises(EarlError, match="`earl convert model`"):
            checkpoint.check_policy(original)


class TestVisionTokenizer:
    def test_it_computes_what_the_published_class_computes(self, tmp_path: Path) -> None:
        recorded = emu3_files.write_vision_vq(tmp_path / "in")
        published.convert(tmp_path / "in", tmp_path / "out")
        model = checkpoint.load_vision_tokenizer(tmp_path / "out", "cpu")
        image = torch.from_numpy(emu3_files.vision_image())
        with torch.inference_mode():
            tokens = model.encode(image, image_sizes=torch.tensor([image.shape[-2:]])).image_tokens[0]
            pixels = model.decode(torch.tensor([recorded["tokens"]]))
        assert tokens.tolist() == recorded["tokens"]
        found = pixels[0, :, ::16, ::16].reshape(3, -1)
        assert np.allclose(found.numpy(), recorded["pixels"], atol=1e-4)

    def test_unconverted_it_is_refused_not_filled_with_random_weights(self, tmp_path: Path) -> None:
        emu3_files.write_vision_vq(tmp_path / "in")
        with pytest.raises(EarlError, match="'Emu3VisionVQ', no Emu3VQVAE; `earl convert model`"):
            checkpoint.load_vision_tokenizer(tmp_path / "in", "cpu")

    def test_a_missing_weight_is_named(self, tmp_path: Path) -> None:
        emu3_files.write_vision_vq(tmp_path / "in")
        weights = load_file(tmp_path / "in" / "model.safetensors")
        del weights["decoder.mid.attn_1.q.bias"]
        save_file(weights, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(EarlError, match=r"'decoder\.middle_block\.attn_1\.q_proj\.bias' is missing"):
            published.convert(tmp_path / "in", tmp_path / "out")
        assert not (tmp_path / "out").exists()


class TestBothTogether:
    @pytest.fixture
    def both(self, converted: Path, tmp_path: Path) -> Path:
        """A checkpoint in the format of the -hf repositories, as transformers writes it."""
        from transformers import Emu3ForConditionalGeneration

        from earl.emu3.models import Emu3Config

        emu3_files.write_vision_vq(tmp_path / "vq")
        published.convert(tmp_path / "vq", tmp_path / "vision")
        policy = checkpoint.load_policy(converted, torch.float32, "cpu")
        vision_tokenizer = checkpoint.load_vision_tokenizer(tmp_path / "vision", "cpu")
        vocabulary = Vocabulary.from_folder(converted)
        names = {name: vocabulary.text.token_to_id(name) for name in vocabulary.text.get_vocab()}
        config = Emu3Config(
            text_config=policy.config.to_dict(), vq_config=vision_tokenizer.config.to_dict(), vocabulary_map=names
        )
        model = Emu3ForConditionalGeneration(config)
        model.model.text_model.load_state_dict(policy.model.state_dict())
        model.lm_head.load_state_dict(policy.lm_head.state_dict())
        model.model.vqmodel.load_state_dict(vision_tokenizer.state_dict())
        model.save_pretrained(tmp_path / "hf", max_shard_size="100KB")
        vocabulary.text.save(str(tmp_path / "hf" / "tokenizer.json"))
        return tmp_path / "hf"

    def test_it_is_taken_apart(self, both: Path, converted: Path, tmp_path: Path) -> None:
        published.convert(both, tmp_path / "policy")
        published.convert(both, tmp_path / "vision again", vision=True)
        left, right = (checkpoint.load_policy(f, torch.float32, "cpu") for f in (tmp_path / "policy", converted))
        assert all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))
        image = [np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)]
        tokens = [
            vision.encode(checkpoint.load_vision_tokenizer(tmp_path / name, "cpu"), image)[0]
            for name in ("vision", "vision again")
        ]
        assert np.array_equal(*tokens)

    def test_a_policy_holds_no_vision_tokenizer(self, converted: Path, tmp_path: Path) -> None:
        with pytest.raises(EarlError, match="holds no vision tokenizer"):
            published.convert(converted, tmp_path / "out", vision=True)


def test_the_command_runs_no_code_of_the_repository(earl: Callable, original: Path, tmp_path: Path) -> None:
    done = earl("convert", "model", original, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "remote code ran" not in done.stdout + done.stderr
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["Emu3ForCausalLM"]


def test_only_data_is_downloaded(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = {}

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(original)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert published.located("BAAI/Emu3-Gen", "v1") == original
    assert (asked["name"], asked["revision"]) == ("BAAI/Emu3-Gen", "v1")
    kept = [path.name for path in original.iterdir() if any(path.match(pattern) for pattern in asked["patterns"])]
    assert {"config.json", "emu3.tiktoken", "emu3_vision_tokens.txt", "model-00001-of-00002.safetensors"} <= set(kept)
    assert not any(name.endswith((".py", ".bin", ".pth")) for name in kept)


def test_a_name_that_the_hub_does_not_know_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def download(*_, **__) -> str:
        raise OSError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(EarlError, match="mair-lab/none: is no folder, and could not be downloaded"):
        published.located("mair-lab/none")
