"""The stages together, from raw data to evaluation: what the run's files promise."""

import dataclasses
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from earl.emu3 import sequence, vision
from earl.emu3.vocabulary import Vocabulary
from earl.files import images, manifest, tables
from earl.files.layout import Run
from earl.messages.errors import EarlError
from earl.stages import generate, prompts, score, train
from tests.support import bare_loop


@pytest.fixture
def run(small_run):
    """A finished run of two iterations, made in this process."""
    return small_run


def without_origin(path):
    """Return a table's rows: its metadata names run and shard, which may differ."""
    return pq.read_table(path).replace_schema_metadata(None)


def test_every_promised_file_is_there_and_says_where_it_comes_from(run, small_config):
    config = small_config("plain")
    for index in (1, 2):
        files = run.iteration(index)
        rollouts = tables.read_table(files.rollouts(0), tables.ROLLOUTS)
        origin = tables.read_metadata(files.rollouts(0))
        assert origin["policy_digest"] == manifest.digest_folder(run.iteration(index - 1).policy)
        assert (origin["run"], origin["iteration"], origin["shard"]) == ("plain", str(index), "0")
        assert rollouts.num_rows == config.episodes_per_iteration
        scores = tables.read_table(files.scores(0), tables.SCORES)
        assert scores["episode_id"].equals(rollouts["episode_id"])
        assert tables.read_metadata(files.scores(0))["rollouts_digest"] == manifest.digest_file(files.rollouts(0))
        metrics = json.loads(files.metrics.read_text())
        assert metrics["iteration"] == index
        manifest.check(files.policy, deep=True)
        manifest.check(files.trainer, deep=True)
    assert run.iteration(0).policy.is_symlink()
    for name in config.evaluations:
        for index in (0, 2):
            assert json.loads(run.evaluation(name, index).summary.read_text())["n"] == 4


def test_rollouts_hold_what_the_policy_saw_and_did(run):
    rows = tables.read_table(run.iteration(1).rollouts(0), tables.ROLLOUTS).to_pylist()
    vocabulary = Vocabulary.from_folder(run.iteration(0).policy)
    assert [row["episode_id"] for row in rows[:5]] == [
        "000001-0000-00",
        "000001-0000-01",
        "000001-0000-02",
        "000001-0000-03",
        "000001-0001-00",
    ]
    for row in rows:
        assert len(row["completion_token_ids"]) == len(row["behavior_logprobs"])
        assert max(row["behavior_logprobs"]) <= 0
        assert vocabulary.decode(row["prompt_token_ids"]).endswith(row["instruction"] + "<|image start|>")
        tokens = sequence.parse_completion(row["completion_token_ids"], vocabulary)
        assert (row["edited"] is None) == (tokens is None)
        for name in ("original", "target"):
            assert images.decode(row[name]["bytes"], name).shape == (64, 64, 3)
    assert len({row["example_id"] for row in rows}) == 4, "prompts are drawn without replacement"


def test_policies_load_in_transformers_alone(run):
    from transformers import AutoTokenizer, Emu3ForCausalLM

    folder = run.iteration(2).policy
    model, tokenizer = Emu3ForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.get_output_embeddings().weight.isfinite().all()
    assert tokenizer.convert_tokens_to_ids("<|image token|>") == Vocabulary.from_folder(folder).img


@pytest.mark.slow
def test_shards_change_no_episode_and_no_policy(run, small_config):
    shards = 4
    cut = bare_loop.run_all(small_config("in-shards", rollout_shards=shards, evaluations={}))
    for index in (1, 2):
        files, whole = cut.iteration(index), run.iteration(index)
        for kind in ("rollouts", "scores"):
            parts = [without_origin(getattr(files, kind)(shard)) for shard in range(shards)]
            assert pa.concat_tables(parts).equals(without_origin(getattr(whole, kind)(0)))
            groups = [set(part["group_id"].to_pylist()) for part in parts]
            assert len(set().union(*groups)) == sum(map(len, groups)), "groups never straddle shards"
        assert without_origin(files.episodes).equals(without_origin(whole.episodes))
        assert manifest.digest_folder(files.policy) == manifest.digest_folder(whole.policy)


def test_a_stage_run_again_writes_the_same_bytes(run, small_config, tmp_path):
    files, config = run.iteration(2), small_config("plain")
    generate.run(config, 2, 0, generate.Sampler.load(config, run.iteration(1).policy), tmp_path / "rollouts.parquet")
    score.run(config, tmp_path / "rollouts.parquet", tmp_path / "scores.parquet")
    assert (tmp_path / "rollouts.parquet").read_bytes() == files.rollouts(0).read_bytes()
    assert (tmp_path / "scores.parquet").read_bytes() == files.scores(0).read_bytes()


@pytest.mark.slow
def test_what_is_decoded_and_encoded_for_rollouts(run, small_config, tmp_path, monkeypatch):
    """Edits once each; an original and its target once a prompt, and only where the data hold tokens alone."""
    config = small_config("plain")
    sampler = generate.Sampler.load(config, run.iteration(0).policy)
    encoded, grids = [], []
    encode, decode = images.encode, vision.decode
    monkeypatch.setattr(images, "encode", lambda pixels: encoded.append(1) or encode(pixels))
    monkeypatch.setattr(vision, "decode", lambda model, tokens: grids.append(len(tokens)) or decode(model, tokens))
    of_iteration = prompts.of_iteration
    episodes, asked = config.episodes_per_iteration, config.prompts_per_iteration
    for name, blank in (("with pictures", {}), ("without", {"original": None, "target": None})):

        def drawn(*arguments, blank=blank):
            found = of_iteration(*arguments)
            examples = [(index, example._replace(**blank)) for index, example in found.examples]
            return dataclasses.replace(found, examples=examples)

        monkeypatch.setattr(prompts, "of_iteration", drawn)
        generate.run(config, 1, 0, sampler, tmp_path / f"{name}.parquet")
        edits = episodes - tables.read_table(tmp_path / f"{name}.parquet", tables.ROLLOUTS)["edited"].null_count
        assert sum(encoded) == sum(grids) == edits + (2 * asked if blank else 0)
        encoded.clear()
        grids.clear()


def test_another_reward_needs_only_train(run, small_config):
    copy = Run(run.path.with_name("another-reward"))
    shutil.copytree(run.path / "iterations", copy.path / "iterations", symlinks=True)
    config = small_config("plain", reward_final_reward="ground_score", reward_compute_ground_score=True)
    train.run(config, copy.path, 1)
    episodes = pq.read_table(copy.iteration(1).episodes).to_pylist()
    rewards = {row["episode_id"]: row["reward"] for row in episodes}
    for row in tables.read_table(run.iteration(1).scores(0), tables.SCORES).to_pylist():
        assert rewards[row["episode_id"]] == (row["ground_score"] if row["status"] == "ok" else 0)


def test_other_seeds_give_other_episodes(run, small_config):
    config = small_config("plain", random_seed=43)
    out = run.path.parent / "other.parquet"
    generate.run(config, 1, 0, generate.Sampler.load(config, run.iteration(0).policy), out)
    found = tables.read_table(out, tables.ROLLOUTS, ["completion_token_ids"])
    assert not found.equals(tables.read_table(run.iteration(1).rollouts(0), tables.ROLLOUTS, found.column_names))


def test_what_did_not_finish_is_not_shown_to_the_judge(run, small_config, tmp_path):
    config = small_config("plain", max_response_tokens=20, emu3_use_logit_processor=False)
    generate.run(config, 1, 0, generate.Sampler.load(config, run.iteration(0).policy), tmp_path / "rollouts.parquet")
    score.run(config, tmp_path / "rollouts.parquet", tmp_path / "scores.parquet")
    rollouts = tables.read_table(tmp_path / "rollouts.parquet", tables.ROLLOUTS).to_pylist()
    scores = tables.read_table(tmp_path / "scores.parquet", tables.SCORES).to_pylist()
    assert "length" in {row["finish_reason"] for row in rollouts}
    assert all(row["edited"] is None for row in rollouts)
    assert {row["status"] for row in scores} == {"no_image"}
    assert all(row["edit_success"] is None for row in scores)


def test_an_image_that_does_not_decode_is_named(run, small_config, tmp_path):
    source = pq.read_table(run.iteration(1).rollouts(0))
    judged = [row is not None for row in source["edited"].to_pylist()]
    row = judged.index(True, 3)
    pictures = source["original"].to_pylist()
    pictures[row]["bytes"] = b"not a picture"
    column = source.schema.get_field_index("original")
    pq.write_table(source.set_column(column, "original", pa.array(pictures)), tmp_path / "rollouts.parquet")
    with pytest.raises(EarlError, match=rf"rollouts.parquet: column 'original', row {row}: the image does not decode"):
        score.run(small_config("plain"), tmp_path / "rollouts.parquet", tmp_path / "scores.parquet")
    assert not (tmp_path / "scores.parquet").exists()


@pytest.mark.parametrize(("prompts", "shards", "per_batch"), [(16, 4, 4), (16, 3, 2), (10, 2, 4), (7, 7, 1)])
def test_shards_are_whole_batches_and_cover_all_prompts(prompts, shards, per_batch):
    parts = [generate.shard_slice(prompts, shards, shard, per_batch) for shard in range(shards)]
    assert [index for part in parts for index in part] == list(range(prompts))
    assert all(part.start % per_batch == 0 for part in parts)
    assert all(len(part) for part in parts)


def test_more_shards_than_batches_is_an_error():
    with pytest.raises(EarlError, match="rollout_shards is 4, but 16 prompts make only 2 batches of 8"):
        generate.shard_slice(16, 4, 0, 8)


@pytest.mark.parametrize(("engine", "shards", "lengths"), [("torch", 2, [2, 2]), ("vllm", 4, [1] * 4)])
def test_shards_are_cut_between_batches_of_the_torch_engine_and_between_prompts_for_vllm(
    small_config, engine, shards, lengths
):
    config = small_config("cut", engine=engine, engine_batch_size=8, rollout_shards=shards)  # 4 prompts, 4 samples each
    assert [len(generate.shard_of(config, shard)) for shard in range(shards)] == lengths


def test_pictures_survive_the_way_to_disk():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(images.decode(images.encode(pixels), "here"), pixels)
