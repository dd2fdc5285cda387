"""Advantages: numbers worked out by hand, invariances, and values equal to TRL's and to verl's published formulas."""

from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from earl.config.schema import Config
from earl.learner import advantage, episodes
from earl.messages.errors import EarlError


def test_advantages_by_hand():
    rewards = torch.tensor([1.0, 3.0, 8.0, 8.0, 5.0])
    groups = torch.tensor([0, 0, 1, 1, 2])
    used = torch.ones(5, dtype=torch.bool)
    found = advantage.group_advantages(rewards, groups, used)
    # Group 0: mean 2, population std 1. Group 1: equal rewards. Group 2: alone.
    expected = [-1 / 1.0001, 1 / 1.0001, 0, 0, 0]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_advantages_without_division_keep_the_units_of_the_rewards():
    rewards = torch.tensor([1.0, 3.0, 9.75, 10.0, float("nan")])
    groups, used = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([True, True, True, True, False])
    found = advantage.group_advantages(rewards, groups, used, "mean")
    torch.testing.assert_close(found, torch.tensor([-1.0, 1.0, -0.125, 0.125, 0.0], dtype=torch.float64))


def test_unused_episodes_touch_neither_their_group_nor_get_an_advantage():
    rewards = torch.tensor([1.0, float("nan"), 3.0])
    used = torch.tensor([True, False, True])
    found = advantage.group_advantages(rewards, torch.zeros(3, dtype=torch.long), used)
    expected = [-1 / 1.0001, 0, 1 / 1.0001]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_zero_std_groups():
    rewards = torch.tensor([2.0, 2.0, 1.0, 2.0, 9.0, 1.0, 7.0])
    groups = torch.tensor([0, 0, 1, 1, 2, 2, 3])
    used = torch.tensor([True, True, True, True, True, False, False])
    assert advantage.zero_std_groups(rewards, groups, used).tolist() == [True, False, True, True]


def test_leave_one_out_advantages_by_hand():
    rewards = torch.tensor([1.0, 3.0, 8.0, 9.0, 5.0, float("nan")])
    groups, used = torch.tensor([0, 0, 0, 1, 2, 2]), torch.tensor([True] * 5 + [False])
    found = advantage.group_advantages(rewards, groups, used, "leave_one_out")
    # Group 0: 1 - 5.5, 3 - 4.5, 8 - 2. Groups 1 and 2 have one used episode each.
    torch.testing.assert_close(found, torch.tensor([-4.5, -1.5, 6.0, 0, 0, 0], dtype=torch.float64))


def test_equal_rewards_give_nothing_at_all():
    """The mean of three times 0.1 is not 0.1 in binary, and Adam would blow up what rounding leaves."""
    rewards, groups, used = torch.full((3,), 0.1, dtype=torch.float64), torch.zeros(3, dtype=torch.long), torch.ones(3)
    assert (rewards.sum() / 3 != rewards[0]).item()
    for kind in ("mean_std", "mean", "leave_one_out"):
        assert advantage.group_advantages(rewards, groups, used.bool(), kind).tolist() == [0, 0, 0]


# Components

COMPONENTS = torch.tensor([[1.0, 5], [3, 5], [2, 0], [2, 4], [float("nan"), 7]])
PAIRS, USED = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([True] * 4 + [False])


def test_component_advantages_by_hand():
    """Group 0 differs in the first component alone, std 1; group 1 in the second alone, std 2."""
    found = advantage.component_advantages(COMPONENTS, [1.0, 3.0], PAIRS, USED)
    first, second = 1 / 1.0001, 3 * 2 / 2.0001
    std = ((2 * first**2 + 2 * second**2) / 4) ** 0.5 + 1e-4
    expected = [-first / std, first / std, -second / std, second / std, 0]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_a_component_in_other_units_counts_as_much():
    expected = advantage.component_advantages(COMPONENTS, [1.0, 1.0], PAIRS, USED)
    found = advantage.component_advantages(COMPONENTS * torch.tensor([1.0, 100.0]), [1.0, 1.0], PAIRS, USED)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert expected[2].item() == pytest.approx(-1, abs=1e-3)


def test_two_ways_to_one_total_do_not_look_alike():
    """Rewards 1 + 2 and 2 + 1: their sums are equal and teach nothing, their components do where they weigh unlike."""
    components, groups, used = torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.zeros(2, dtype=torch.long), torch.ones(2)
    assert advantage.group_advantages(components.sum(1), groups, used.bool()).tolist() == [0, 0]
    assert advantage.component_advantages(components, [2.0, 1.0], groups, used.bool())[1] > 0.99


def test_nothing_to_tell_apart_is_no_division_by_zero():
    components, groups = torch.full((4, 2), 0.1), torch.tensor([0, 0, 1, 1])
    for used in (torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)):
        assert advantage.component_advantages(components, [1.0, 1.0], groups, used).tolist() == [0] * 4


# From scored rollouts

SCORES = {"edit_success": 6.0, "overedit": 4.0, "naturalness": 9.0, "artifacts": 10.0, "ground_score": None}


def row(group, sample, **changes):
    return {
        "episode_id": f"{group}-{sample}",
        "group_id": str(group),
        "prompt_token_ids": [1],
        "completion_token_ids": [1, 2],
        "completion_text": "",
        "finish_reason": "stop",
        "status": "ok",
        **SCORES,
        **changes,
    }


def outcomes(rows, **fields):
    config = Config(
        run_name="a",
        base_exp_dir="runs",
        train_paths_file=["x"],
        val_paths_file=[],
        judge="program",
        max_failed_fraction=0.5,
        advantage_components={"semantic_consistency": 1.0, "perceptual_quality": 1.0},
        **fields,
    )
    return episodes.reward_all(episodes.Source(rows, [], [], None), config, "iteration")


def test_components_of_scored_rollouts_by_hand():
    """SC, PQ = min of their pairs: 4, 9 and 6, 9; an unfinished image has 0, 0; a failed judgement stays out."""
    found = outcomes(
        [
            row(0, 0),
            row(0, 1, overedit=7.0),
            row(1, 0),
            row(1, 1, finish_reason="length"),
            row(1, 2, status="failed", **dict.fromkeys(SCORES)),
        ]
    )
    assert [outcome.components for outcome in found[:4]] == [
        {"semantic_consistency": 4.0, "perceptual_quality": 9.0},
        {"semantic_consistency": 6.0, "perceptual_quality": 9.0},
        {"semantic_consistency": 4.0, "perceptual_quality": 9.0},
        {"semantic_consistency": 0.0, "perceptual_quality": 0.0},
    ]
    # Group 0 differs in one component, group 1 in both: -1, 1, 2, -2 before they are scaled.
    scale = (2.5) ** 0.5
    advantages = [outcome.advantage for outcome in found]
    assert advantages[:4] == pytest.approx([-1 / scale, 1 / scale, 2 / scale, -2 / scale], abs=1e-3)
    assert advantages[4] is None
    assert [outcome.reward for outcome in found[2:]] == [6.0, 0.0, None]
    metrics = episodes.metrics(found)
    assert metrics["zero_std_fraction"] == 0.0
    assert metrics["zero_std_fraction_semantic_consistency"] == 0.0
    assert metrics["zero_std_fraction_perceptual_quality"] == 0.5


def test_a_group_counts_as_equal_where_all_its_components_are():
    """Rewards 6 and 6 by other ways: sqrt(4 * 9) and sqrt(9 * 4)."""
    swapped = {"edit_success": 9.0, "overedit": 9.0, "naturalness": 4.0, "artifacts": 4.0}
    metrics = episodes.metrics(outcomes([row(0, 0), row(0, 1, **swapped), row(1, 0), row(1, 1)]))
    assert metrics["zero_std_fraction"] == 0.5


def test_masked_groups_leave_the_step_but_not_the_figures():
    """Group 0 is equal in all components, group 1 has one judged episode, group 2 differs."""
    rows = [
        *(row(0, 0), row(0, 1), row(1, 0), row(1, 1, status="failed", **dict.fromkeys(SCORES))),
        *(row(2, 0), row(2, 1, overedit=7.0)),
    ]
    kept, masked = outcomes(rows), outcomes(rows, zero_variance_groups="mask")
    failed, equal = "judgement failed", "the rewards of its group are all equal"
    assert [outcome.reason for outcome in kept] == [None, None, None, failed, None, None]
    assert [outcome.reason for outcome in masked] == [equal, equal, equal, failed, None, None]
    assert [outcome.reward for outcome in masked] == [outcome.reward for outcome in kept]
    # Components are scaled to unit size over the episodes of the step: the only two there are.
    assert [outcome.advantage for outcome in masked[:4]] == [None] * 4
    assert [outcome.advantage for outcome in masked[4:]] == pytest.approx([-1, 1], abs=1e-3)
    figures = [episodes.metrics(found) for found in (kept, masked)]
    unlike = {name for name in figures[0] if figures[0][name] != figures[1][name]}
    assert unlike == {"used_episodes", "trained_groups", "zero_variance_episodes", "completion_tokens"}
    assert [found["trained_groups"] for found in figures] == [3, 1]
    assert [found["used_episodes"] for found in figures] == [5, 2]
    assert [found["zero_variance_episodes"] for found in figures] == [0, 3]
    assert [found["completion_tokens"] for found in figures] == [10, 4]
    assert figures[1]["zero_std_fraction"] == pytest.approx(2 / 3)


def test_a_component_without_its_score_is_named():
    rows = [row(0, 0, ground_score=5.0), row(0, 1, ground_score=5.0, overedit=None)]
    with pytest.raises(EarlError, match="episode 0-1: score overedit is missing, and the reward 'semantic_consis"):
        outcomes(rows, reward_final_reward="ground_score", reward_compute_ground_score=True)


# Oracles


@pytest.fixture
def rewards():
    """Six groups of four samples, two components of unlike size and spread."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(24, 2, generator=generator) * torch.tensor([1.0, 10.0]) + torch.tensor([0.0, 3.0])


def trl_advantages(rewards, weights, **options):
    """GRPOTrainer's advantages of given rewards: its method, on a stand-in that generates and rewards nothing."""
    from trl import GRPOTrainer

    count, components = rewards.shape
    trainer = MagicMock()
    trainer.accelerator = SimpleNamespace(device=torch.device("cpu"), process_index=0, gather=lambda x: x)
    trainer.environment_factories = trainer.environments = trainer.tools = None
    trainer._generate = lambda prompts: ([[1]] * count, [[2]] * count, None, ["x"] * count, None, {}, None, None)
    trainer._tokenizer.pad_token_id = 0
    trainer.pad_to_multiple_of = None
    trainer.mask_truncated_completions = trainer.use_vllm = False
    trainer.args.steps_per_generation = trainer.num_iterations = trainer.args.gradient_accumulation_steps = 1
    trainer.beta = 0.0
    trainer._calculate_rewards = lambda *arguments: rewards
    trainer.num_generations = 4
    trainer.reward_weights = torch.tensor(weights)
    trainer.reward_funcs = trainer.reward_func_names = [str(index) for index in range(components)]
    trainer._pending_extra_logs, trainer._pending_metrics = {}, {}
    for name, value in options.items():
        setattr(trainer, name, value)
    return GRPOTrainer._generate_and_score_completions(trainer, [{"prompt": "p"}] * count)["advantages"].double()


GROUPS_OF_FOUR, ALL = torch.arange(24) // 4, torch.ones(24, dtype=torch.bool)


@pytest.mark.slow
def test_component_advantages_equal_trls(rewards):
    """Which divides by sample standard deviations: the groups' cancel, that of all 24 episodes remains."""
    expected = trl_advantages(rewards, [1.0, 0.5], multi_objective_aggregation="normalize_then_sum")
    found = advantage.component_advantages(rewards, [1.0, 0.5], GROUPS_OF_FOUR, ALL)
    torch.testing.assert_close(found * (23 / 24) ** 0.5, expected, atol=2e-3, rtol=1e-3)
    assert expected.abs().max() > 1


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "scale", "factor"), [("mean", "none", 1.0), ("mean_std", "group", (3 / 4) ** 0.5)])
def test_advantages_equal_trls(rewards, kind, scale, factor):
    options = {"multi_objective_aggregation": "sum_then_normalize", "scale_rewards": scale}
    expected = trl_advantages(rewards, [1.0, 0.5], **options)
    total = rewards @ torch.tensor([1.0, 0.5])
    found = advantage.group_advantages(total, GROUPS_OF_FOUR, ALL, kind)
    torch.testing.assert_close(factor * found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["mean_std", "mean", "leave_one_out"])
def test_advantages_equal_verls_published_formulas(rewards, kind):
    """verl/trainer/ppo/core_algos.py, January 2026: grpo with and without norm_adv_by_std_in_grpo, and rloo. Its
    standard deviation is the sample's, its epsilon 1e-6."""
    scores = rewards[:, 1].double()
    found = advantage.group_advantages(scores, GROUPS_OF_FOUR, ALL, kind)
    expected = np.zeros(24)
    for index, score in enumerate(scores.tolist()):
        group = scores.numpy()[4 * (index // 4) :][:4]
        expected[index] = {
            "mean": score - group.mean(),
            "mean_std": (score - group.mean()) / (group.std(ddof=1) + 1e-6),
            "leave_one_out": score * 4 / 3 - group.mean() * 4 / 3,
        }[kind]
        if kind == "mean_std":
            found[index] *= (group.std() + 1e-4) / (group.std(ddof=1) + 1e-6)
    torch.testing.assert_close(found, torch.from_numpy(expected))
