"""What the workflow asks of a segment before it starts."""

import pytest

from earl.config.schema import Config
from earl.messages.errors import EarlError
from earl.run import segments


def make_config(**fields: object) -> Config:
    defaults = {"run_name": "a", "base_exp_dir": "runs", "train_paths_file": ["a.parquet"], "judge": "program"}
    return Config.model_validate(defaults | {"val_paths_file": ["b.parquet"]} | fields)


def test_ranks_are_those_that_train_unless_more_are_asked_for():
    assert segments.processes(make_config()) == 1
    assert segments.processes(make_config(train_processes=3)) == 3
    assert segments.processes(make_config(train_processes=3, segment_processes=8)) == 8


def test_an_engine_over_several_gpus_is_for_stages():
    segments.check(make_config())
    with pytest.raises(EarlError, match=r"^vllm_tensor_parallel_size is 2, .*granularity=stage"):
        segments.check(make_config(vllm_tensor_parallel_size=2))


def test_advice_about_idle_ranks_is_what_the_plan_accepts():
    """16 prompts of 8 episodes: 4 batches of 32 episodes, 2 of 64, 1 of 128."""

    def told(ranks: int, batch: int, **fields: int) -> str | None:
        config = make_config(engine="torch", engine_batch_size=batch, segment_processes=ranks, **fields)
        return segments.idle_ranks(config, ranks)

    assert told(1, 128) is None
    assert told(2, 64) == "1 of 2 ranks never sample, since rollout_shards is 1; raise it to 2"
    assert told(2, 128) == "1 of 2 ranks never sample, since rollout_shards is 1; lower segment_processes to 1"
    both = "3 of 4 ranks never sample, since rollout_shards is 1; raise it to 2; lower segment_processes to 2"
    assert told(4, 64) == both
    assert told(2, 128, train_processes=2).endswith("; an iteration has only 1 shard for the ranks that train")
    make_config(engine="torch", engine_batch_size=64, segment_processes=2, rollout_shards=2)
    with pytest.raises(ValueError, match="only 1 batch"):
        make_config(engine="torch", engine_batch_size=128, rollout_shards=2)


def test_where_checkpoints_are_written_worked_out_by_hand():
    fields = {"save_checkpoints_every_n_iterations": None, "keep_checkpoints_every_n_iterations": None}
    config = make_config(num_iterations=30, segment_checkpoint_every_n_iterations=4, **fields)
    assert [i for i in range(1, 11) if segments.has_checkpoint(config, i, last=10)] == [4, 8, 10]
    kept = config.model_copy(update={"save_checkpoints_every_n_iterations": 3})
    assert [i for i in range(1, 11) if segments.has_checkpoint(kept, i, last=10)] == [3, 4, 6, 8, 9, 10]
    assert segments.has_checkpoint(config, 30, last=31), "the last iteration of the run is kept"


def test_policies_that_are_evaluated_worked_out_by_hand():
    evaluation = {"prompts": 4, "paths_file": ["c.parquet"]}
    evaluations = {"a": {**evaluation, "every_n_iterations": 2}, "b": {**evaluation, "every_n_iterations": 3}}
    config = make_config(num_iterations=7, evaluations=evaluations)
    found = {index: config.evaluations_at(index) for index in range(8)}
    assert found == {0: ["a", "b"], 1: [], 2: ["a"], 3: ["b"], 4: ["a"], 5: [], 6: ["a", "b"], 7: ["a", "b"]}
