"""What a GPU will hold, from fake tensors: as a step in earnest, and as the published model was audited to."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from earl.config import load
from earl.config.schema import Config
from earl.config.sections import Lora, Sft
from earl.emu3.models import Emu3TextConfig, Emu3VQVAEConfig
from earl.estimate import cases, memory
from earl.estimate.cases import Bytes, Case, NotSimulated, simulate
from earl.execution import ranks

GPU = int(85.5e9)
TINY = {
    "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 9000, "max_position_embeddings": 512, "pad_token_id": 0,
}  # fmt: skip


def case(layers: int = 2, **changes: object) -> Case:
    text = json.dumps(Emu3TextConfig(**TINY | {"num_hidden_layers": layers}).to_dict(), default=str)
    usual = Case(text, 1, True, 4, 4, 40, 60, -1, 1.0, True, False, True, True, False)
    return dataclasses.replace(usual, **changes)


def in_earnest(asked: Case) -> Bytes:
    from earl.estimate import simulation

    with ranks.joined(torch.device("cpu"), splits_alone=asked.splits):
        return simulation.step(asked, None)


STEPS = {
    "split, bfloat16": {},
    "packed": {"packed": True},
    "no reference, nothing computed twice": {"reference": False, "checkpointing": False},
    "offloaded reference": {"offload": True},
    "whole, float32": {"splits": False, "bfloat16": False},
    "whole, bfloat16 by autocast": {"splits": False},
    "what top_p leaves": {"top_p": 0.9},
    "adapter": {"lora": (8, 16, ("q_proj", "v_proj", "down_proj"))},
    "adapter, whole, float32": {"lora": (8, 16, ("q_proj",)), "splits": False, "bfloat16": False},
}


FEW, MORE = memory.LAYERS
RANKS = {"one": case(), "four": case(ranks=4)}
DEEP = [case(FEW, ranks=2), case(MORE, ranks=2), case(12, ranks=2)]


SIDES = (256, 512)
"""Pixels of images."""


@pytest.fixture(scope="module")
def config():
    return load.validate(
        {
            "run_name": "a", "base_exp_dir": "runs", "val_paths_file": ["x"], "train_paths_file": ["x"],
            "assistant_prefill": "<|image start|>", "engine": "vllm", "reward_function_api_base": "http://judge",
        },
        "test",
    )  # fmt: skip


AUDITED = [
    (8, {}, 36.8),
    (4, {"packing": "groups", "per_device_batch_size": 4}, 54.0),
    (3, {"per_device_batch_size": 4, "reference_offload": True}, 58.0),
    (1, {}, 188.0),
]
"""Ranks, fields and GB at the peak, of episodes of 1,100 + 1,060 tokens: all layers simulated, by other code, when the
reference was float32."""


def audited(config: Config) -> list[tuple]:
    """Arguments of `memory.learner` and `memory.learner_cases`."""
    text = Emu3TextConfig()
    return [(config.model_copy(update=changes), text, count, 1100, 1060) for count, changes, _ in AUDITED]


@pytest.fixture(scope="module")
def together(config) -> None:
    """Simulate all cases in one process: most of what they cost is its start."""
    small = [*(case(**changes) for changes in STEPS.values()), *RANKS.values(), *DEEP]
    large = [one for each in audited(config) for one in memory.learner_cases(*each)]
    simulate([*small, *large, *(memory.vision_case(Emu3VQVAEConfig(), side) for side in SIDES)])


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_a_simulated_step_holds_what_a_step_in_earnest_holds(name: str, together: None) -> None:
    """Real tensors on a CPU, counted in the same way, with the gradients of a micro-batch before."""
    asked = case(**STEPS[name])
    [found], real = simulate([asked]), in_earnest(asked)
    assert found.at_rest == real.at_rest
    assert found.peaks == pytest.approx(real.peaks, rel=0.02)


@pytest.mark.slow
def test_ranks_share_what_is_at_rest(together: None) -> None:
    one, four = simulate(list(RANKS.values()))
    for part, size in one.at_rest.items():
        assert four.at_rest[part] == pytest.approx(size / 4, rel=0.01)


@pytest.mark.slow
def test_layers_that_are_not_simulated_take_what_they_would(together: None) -> None:
    """Twelve layers, by three and five."""
    few, more, whole = simulate(DEEP)
    found = memory.extrapolated(few, more, 12)
    assert found.at_rest == pytest.approx(whole.at_rest, rel=1e-6)
    assert found.peaks == pytest.approx(whole.peaks, rel=0.02)


def test_a_simulation_that_fails_says_what_it_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho another torch >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(cases.sys, "executable", str(broken))
    with pytest.raises(NotSimulated, match="another torch"):
        simulate([case(layers=7)])


@pytest.mark.slow
def test_the_published_policy_takes_what_was_audited(config, together: None) -> None:
    text = Emu3TextConfig()
    for each, (count, changes, expected) in zip(audited(config), AUDITED, strict=True):
        found = memory.learner(*each)
        halved = 0 if "reference_offload" in changes else 2 * memory.weights_of(text) / count / 1e9
        assert found.peak / 1e9 == pytest.approx(expected - halved, rel=0.1), (count, changes)
        assert sum(found.parts.values()) == found.needed
        # 5 to 10 GB beside tensors: contexts, NCCL, fragmentation.
        assert 3e9 < found.parts["overhead"] < 12e9


def test_a_fine_tuning_has_no_groups_and_no_reference_unless_it_learns_from_pairs(config) -> None:
    """And one process splits its model only for an adapter in bfloat16, or for a reference in main memory."""
    tuning = Sft(base_model="x", train_paths_file=["x"], steps=1)
    pairs = tuning.model_copy(update={"objective": "dpo", "dpo_beta": 0.1})
    adapted = tuning.model_copy(update={"lora": Lora(rank=8)})
    offloading = config.model_copy(update={"reference_offload": True})

    def of(fields: Config, tuning: Sft | None) -> tuple[int, bool, bool]:
        [one, _] = memory.learner_cases(fields, Emu3TextConfig(), 1, 10, 10, tuning)
        return one.group, one.reference, one.splits

    assert of(config, None) == (8, True, True)
    assert of(config, tuning) == (1, False, False)
    assert of(config, pairs) == (2, True, False)
    assert of(offloading, pairs) == (2, True, True)
    assert of(config, adapted) == (1, False, True)


def test_weights_of_an_adapter(config) -> None:
    """Rank x (inputs + outputs) of each target, in 32 layers: 4096 -> 4096, and 4096 -> 14336."""
    shape = Emu3TextConfig()
    chosen = config.model_copy(update={"lora": Lora(rank=16, targets=["q_proj", "up_proj"])})
    assert memory.trained_of(shape, chosen.lora) == 32 * 16 * (4096 + 4096 + 4096 + 14336)
    assert memory.trained_of(shape, None) == memory.weights_of(shape)


def test_of_its_share_vllm_has_what_the_weights_leave_for_its_cache(config) -> None:
    """2 (key, value) x 32 layers x 8 heads x 128 x 2 bytes = 131,072 a token; 16 prompts and 128 completions."""
    found = memory.engine(config, Emu3TextConfig(), GPU, 1100, 1060)
    assert found.token_bytes == 131_072
    assert found.parts["weights"] == 2 * 8_492_011_520
    assert found.cache_tokens == (int(0.3 * GPU) - 2 * 8_492_011_520 - memory.VLLM) // 131_072
    assert found.shard_tokens == 16 * 1100 + 128 * 1060
    split = config.model_copy(update={"vllm_tensor_parallel_size": 2, "rollout_shards": 4})
    found = memory.engine(split, Emu3TextConfig(), GPU, 1100, 1060)
    assert found.token_bytes == 65_536
    assert found.shard_tokens == 4 * 1100 + 32 * 1060


def test_the_torch_engine_holds_whole_rows_of_its_batch(config) -> None:
    torch_engine = config.model_copy(update={"engine": "torch", "engine_batch_size": 8})
    found = memory.engine(torch_engine, Emu3TextConfig(), GPU, 1100, 1060)
    assert found.parts["cache"] == 8 * (1100 + 2048) * 131_072
    assert found.at_rest == 0  # asleep, it waits in main memory


def test_judges_are_as_large_as_their_name_says(config) -> None:
    assert memory.judge(config, GPU) is None  # a server elsewhere
    judged = config.model_copy(update={"judge": "vllm", "judge_tensor_parallel_size": 4})
    found = memory.judge(judged, GPU)
    assert found.parts["weights"] == pytest.approx(36.7e9, rel=0.01)
    assert memory.judge_weights("someone/Chat-3.5B-it") == 3.5e9
    assert memory.judge_weights("someone/chat") is None
    assert memory.judge(judged.model_copy(update={"reward_function_api_model_name": "someone/chat"}), GPU) is None


def test_the_weights_of_a_judge_in_a_folder_are_counted(config, tmp_path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"metadata": {"total_size": 3000}}')
    assert memory.judge_weights(str(tmp_path)) == 1500


@pytest.mark.slow
def test_an_image_in_the_published_vision_tokenizer(config, together: None) -> None:
    """Four times the pixels take four times the activations; weights are 271M in float32."""
    small, large = (memory.vision(config, Emu3VQVAEConfig(), side) for side in SIDES)
    assert small.parts["vision"] == large.parts["vision"] == pytest.approx(1.08e9, rel=0.01)
    assert large.parts["activations"] == pytest.approx(4 * small.parts["activations"], rel=0.25)
    assert small.peak < 4e9
