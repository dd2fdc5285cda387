"""The reference's loss, advantages, rewards and SFT sequences beside ours: its own functions, on the same episodes.

    PYTHONPATH=. python benchmarks/reference_parity.py --reference ../EARL

The reference (mair-lab/EARL) is a checkout of the user's. Ends in a table: what was compared, the difference in
numbers, and what explains it. The policy is the one that ships with the package, in float32; eight episodes are sampled
from it with an image at once, and eight that reason first, some of which are cut off.
"""

import argparse
import json
import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import reference_code
from earl.config import paths
from earl.emu3 import checkpoint, grid, sequence
from earl.emu3.vocabulary import ROLES, Vocabulary
from earl.engines import Request, SamplingParams
from earl.engines.torch_engine import TorchEngine
from earl.judges import answers
from earl.judges.rubric import Rubric
from earl.learner import advantage, batches, grpo, logprobs, objective, sft
from earl.learner.settings import Settings
from earl.messages.errors import EarlError
from earl.statistics import rewards

POLICY = Path(paths.__file__).parent.parent / "shapes" / "base_policy"
SHAPE, PROMPTS, SAMPLES = (8, 8), 4, 2
KL_COEFF = 0.05
SEED = 1


class Row(NamedTuple):
    """A line of the table."""

    what: str
    reference: str
    ours: str
    why: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--reference", type=Path, required=True, help="a checkout of mair-lab/EARL")
    reference = reference_code.load(parser.parse_args().reference.resolve())
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    vocabulary = Vocabulary.from_folder(POLICY)
    rows = [*token_counts(reference, vocabulary)]
    for kind, prefill in (("at once", ROLES["boi"]), ("reasoning", sequence.START_THINKING)):
        episodes = sampled(vocabulary, prefill)
        for counted in ("all", "text", "visual"):
            rows += losses(reference, vocabulary, episodes, counted, f"{kind}, {counted} tokens")
    rows += [*advantages(reference), *final_rewards(reference), *read_answers(reference)]
    rows += [*sft_sequences(reference, vocabulary), *sft_loss(reference, vocabulary), *schedule()]
    print("| compared | reference | ours | why |\n|---|---|---|---|")
    for row in rows:
        print("|", " | ".join(row), "|")


# Loss


def sampled(vocabulary: Vocabulary, prefill: str) -> list[batches.Episode]:
    """Episodes of the shipped policy, in pairs of one prompt, with advantages of rewards drawn at random."""
    rng = np.random.default_rng(SEED)
    prompts = [
        sequence.prompt_ids(rng.integers(0, vocabulary.num_visual, SHAPE), "remove the red circle", prefill, vocabulary)
        for _ in range(PROMPTS)
    ]
    engine = TorchEngine(torch.device("cpu"), torch.float32, batch_size=8, context=512, constrained=True)
    engine.load(POLICY)
    requests = [Request(prompt, SHAPE, [2 * index, 2 * index + 1]) for index, prompt in enumerate(prompts)]
    found = []
    for index, group in enumerate(engine.generate(requests, SamplingParams(1.0, max_tokens=150))):
        scores = torch.from_numpy(rng.uniform(0, 10, SAMPLES))
        everyone = torch.zeros(SAMPLES, dtype=torch.int64), torch.ones(SAMPLES, dtype=torch.bool)
        for sample, value in enumerate(advantage.group_advantages(scores, *everyone).tolist()):
            ids = np.array(group[sample].token_ids)
            forced = grid.kinds_of_completion(ids, SHAPE, vocabulary) >= grid.FIRST_FORCED
            behavior = np.array(group[sample].logprobs, dtype=np.float32)
            names = f"{index}-{sample}", str(index)
            found.append(batches.Episode(*names, np.array(prompts[index]), ids, forced, behavior, value))
    return found


def processor_of(reference: Any, vocabulary: Vocabulary) -> SimpleNamespace:
    """What the reference's functions ask of its processor, answered by its own methods."""
    bounds = {"vision_start_index": vocabulary.first_visual, "vision_end_index": vocabulary.size - 1}
    own = reference.main.Emu3RLProcessor
    return SimpleNamespace(
        **bounds,
        get_vision_start_index=lambda: vocabulary.first_visual,
        compute_image_mask=lambda ids: own.compute_image_mask(SimpleNamespace(**bounds), ids),
    )


def kind_mask(image_mask: Tensor, counted: str) -> Tensor:
    """The factor that the reference's main function multiplies the completion mask by."""
    return {"all": torch.ones_like(image_mask), "text": 1 - image_mask, "visual": image_mask}[counted]


def token_counts(reference: Any, vocabulary: Vocabulary) -> Iterator[Row]:
    """What a text-only iteration divides by, at the published size: 32 x 32 visual tokens."""
    processor = processor_of(reference, vocabulary)
    image = sequence.image_ids(np.zeros((32, 32), dtype=np.int64), vocabulary)[1:]
    visual = vocabulary.first_visual, vocabulary.size
    for words in (0, 200, 400):
        completion = [*[1] * words, *image, vocabulary.eos]
        theirs = int((1 - processor.compute_image_mask(completion)).sum())
        ours = int(objective.kind_mask(torch.tensor(completion), visual, "text").sum())
        factor = len(completion) / ours
        yield Row(
            f"tokens that a text-only iteration divides by, {words} of reasoning, 32 x 32",
            str(theirs),
            str(ours),
            f"35 of them end rows and image; of all {len(completion)} completion tokens it is one in {factor:.1f}",
        )


def losses(
    reference: Any, vocabulary: Vocabulary, episodes: Sequence[batches.Episode], counted: str, name: str
) -> Iterator[Row]:
    """Loss and gradient of an iteration, the reference's in three steps towards ours."""
    frozen = checkpoint.load_policy(POLICY, torch.float32, "cpu").requires_grad_(False)
    with torch.no_grad():
        frozen.lm_head.weight.mul_(0.97)
    theirs, plain = (
        reference_gradient(reference, vocabulary, episodes, counted, frozen, whole) for whole in (False, True)
    )
    visual = vocabulary.first_visual, vocabulary.size
    settings = Settings(KL_COEFF, 1.0, 3, visual, logprobs.split_vocab(visual), counted, False)
    ours = our_gradient(episodes, settings, frozen)
    unforced = [replace(episode, forced=np.zeros_like(episode.forced)) for episode in episodes]
    as_theirs = our_gradient(unforced, settings, frozen)
    steps = [f"with forced tokens in our sum {distance(as_theirs, theirs)}"]
    if counted != "all":
        steps.append(f"and every token in its attention {distance(as_theirs, plain)}")
    reasons = {
        "all": "we leave forced tokens out of the sum",
        "text": "the same; and it hides the visual tokens from attention, so that forced ones see another context",
        "visual": "it hides the text tokens from attention and closes the gap in positions: visual tokens are scored "
        "in a context in which they were not sampled",
    }
    values = (f"loss {loss:.6f}, gradient {gradient.norm():.5f}" for loss, gradient in (theirs, ours))
    yield Row(f"loss, {name}", *values, f"{reasons[counted]}: gradients differ by {distance(ours, theirs)}; "
              + ", ".join(steps))  # fmt: skip


Found = tuple[float, Tensor]


def distance(one: Found, other: Found) -> str:
    """The difference of two gradients, relative to the second."""
    return f"{((one[1] - other[1]).norm() / other[1].norm()).item():.1e}"


def our_gradient(episodes: Sequence[batches.Episode], settings: Settings, frozen: Any) -> Found:
    policy = checkpoint.load_policy(POLICY, torch.float32, "cpu")
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    with mock.patch.object(grpo, "MAX_GRADIENT_NORM", math.inf):
        found = grpo.train_iteration(policy, frozen, optimizer, episodes, settings, description=None)
    return found["loss"], torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])


def reference_gradient(
    reference: Any,
    vocabulary: Vocabulary,
    episodes: Sequence[batches.Episode],
    counted: str,
    frozen: Any,
    whole_attention: bool,
) -> Found:
    """Loss and gradient by the reference's collator, log-probs and loss, micro-batches of three.

    Args:
        whole_attention: every completion token takes part in attention, whichever kind trains.
    """
    processor = processor_of(reference, vocabulary)
    completions = [episode.completion.tolist() for episode in episodes]
    inputs = reference.data.Emu3PPOCollator(None)(
        [episode.prompt for episode in episodes],
        completions,
        [[episode.advantage] * len(ids) for episode, ids in zip(episodes, completions, strict=True)],
        [processor.compute_image_mask(ids) for ids in completions],
        torch.device("cpu"),
    )
    every = inputs["completion_mask"]
    inputs["completion_mask"] = every * kind_mask(inputs["completion_image_mask"], counted)
    args = SimpleNamespace(temperature=1.0, separate_language_and_vision_vocabs=True, kl_coeff=KL_COEFF)
    log_probs = reference.main.compute_token_log_probs
    total, loss = inputs["completion_mask"].sum(), 0.0
    policy = checkpoint.load_policy(POLICY, torch.float32, "cpu")
    for start in range(0, len(episodes), 3):
        batch = {name: value[start : start + 3] for name, value in inputs.items()}
        seen = every[start : start + 3] if whole_attention else batch["completion_mask"]

        def with_attention(*, model: Any, inputs: dict[str, Tensor], seen: Tensor = seen, **others: Any) -> Tensor:
            found = log_probs(model=model, inputs=inputs | {"completion_mask": seen}, **others)
            return found * inputs["completion_mask"]

        with torch.no_grad():
            chosen = {"temperature": 1.0, "separate_language_and_vision_vocabs": True}
            start_of_vision = {"vision_start_index": vocabulary.first_visual}
            batch["ref_log_probs"] = with_attention(model=frozen, inputs=batch, **chosen, **start_of_vision)
        with mock.patch.object(reference.main, "compute_token_log_probs", with_attention):
            part, _ = reference.main.compute_pg_loss(policy, processor, batch, total, args)
        part.backward()
        loss += part.item()
    return loss, torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])


# Advantages and rewards


def advantages(reference: Any) -> Iterator[Row]:
    """Of the reference's own function that makes episodes, with a sampler and a judge that give what is wanted."""
    rng = np.random.default_rng(SEED)
    groups = {
        "64 groups of 8, rewards drawn at random": rng.uniform(0, 10, (64, 8)),
        "64 groups of 6 equal rewards": np.repeat(rng.uniform(0, 10, (64, 1)), 6, axis=1),
    }
    for name, values in groups.items():
        theirs = reference_advantages(reference, values)
        index = torch.arange(len(values)).repeat_interleave(values.shape[1])
        used = torch.ones(values.size, dtype=torch.bool)
        ours = advantage.group_advantages(torch.from_numpy(values.ravel()), index, used)
        equal = "equal" in name
        yield Row(
            f"advantages, {name}",
            f"largest {np.abs(theirs).max():.2g}",
            f"largest {ours.abs().max():.2g}",
            f"differ by {np.abs(theirs - ours.numpy()).max():.1e}"
            + (": rounding in the mean, divided by 1e-4; ours are exactly 0" if equal else ""),
        )


def reference_advantages(reference: Any, values: np.ndarray) -> np.ndarray:
    groups, samples = values.shape
    outputs = [
        SimpleNamespace(
            prompt_token_ids=[1], outputs=[SimpleNamespace(token_ids=[1], finish_reason="stop") for _ in range(samples)]
        )
        for _ in range(groups)
    ]
    processor = SimpleNamespace(
        prepare_initial_inputs_for_vllm=lambda prompts: ((), {}), compute_image_mask=lambda ids: np.zeros(len(ids))
    )
    with reference_code.at_once():
        episodes, _ = reference.main.create_training_episodes(
            samples=[{}] * groups,
            processor=processor,
            inference_engine=SimpleNamespace(generate=lambda: outputs, sleep=lambda level: None),
            reward_function=lambda **_: [{"final_reward": value} for value in values.ravel()],
            tokenizer=SimpleNamespace(batch_decode=lambda ids, **_: [""] * len(ids)),
            args=SimpleNamespace(generations_per_sample=samples),
            iteration=0,
        )
    return np.array([one[0] for one in episodes["advantages"]])


class Judge:
    """Answers in the place of the reference's client: to each edit its scores, or a text as it is."""

    def __init__(self, said: Sequence[tuple[str, str, str]]) -> None:
        self.said = said

    def call_chat(self, queries: list[dict], **_: Any) -> list[Any]:
        found = []
        for query in queries:
            content = query["messages"][-1]["content"]
            edit = int(content[-1]["image_url"]["url"].rpartition(",")[2])
            kind = 2 if len(query["messages"]) == 2 else 0 if len(content) == 3 else 1
            message = SimpleNamespace(content=self.said[edit][kind])
            found.append(SimpleNamespace(choices=[SimpleNamespace(message=message)]))
        return found


def reference_rewards(
    reference: Any, said: Sequence[tuple[str, str, str]], finished: Sequence[str], images: Sequence[Any], which: str
) -> list[dict[str, float]]:
    args = SimpleNamespace(
        reward_compute_viescore=True, reward_compute_ground_score="ground" in which, reward_final_reward=which
    )
    processor = SimpleNamespace(
        decode_to_images_from_token_ids=lambda grids: [0] * len(grids), decode_to_images=lambda texts: list(images)
    )
    function = reference.reward.ImageEditingRewardFunction(
        "http://nowhere", "judge", processor, ensure_api_running=False, enable_logging=False, args=args
    )
    samples = [{"instruction": "", "original_image": None, "edited_image": None}] * len(said)
    with (
        mock.patch.object(reference.reward, "OpenAIApiInference", return_value=Judge(said)),
        mock.patch.object(reference.reward, "encode_pil_image", str),
        mock.patch("builtins.print"),
    ):
        return function(completions=[""] * len(said), finish_reasons=finished, samples=samples)


def final_rewards(reference: Any) -> Iterator[Row]:
    """Rewards of 200 judged episodes, some without an image, some cut off."""
    rng = np.random.default_rng(SEED)
    scores = rng.integers(0, 11, (200, 5)).tolist()
    finished = ["length" if index % 7 == 0 else "stop" for index in range(200)]
    images = [None if index % 5 == 0 else index for index in range(200)]
    said = [(f'{{"score": [{a}, {b}]}}', f'{{"score": [{c}, {d}]}}', f"<score>{e}</score>") for a, b, c, d, e in scores]
    names = (*rewards.SUB_SCORES, "ground_score")
    for which in rewards.FINAL_REWARDS:
        theirs = [row["final_reward"] for row in reference_rewards(reference, said, finished, images, which)]
        ours = [
            rewards.episode_reward(
                dict(zip(names, values, strict=True))
                | {"finish_reason": reason, "status": "no_image" if image is None else "ok"},
                which,
            )
            for values, reason, image in zip(scores, finished, images, strict=True)
        ]
        yield Row(
            f"reward `{which}`, 200 episodes",
            f"mean {np.mean(theirs):.6f}",
            f"mean {np.mean(ours):.6f}",
            f"differ by {np.abs(np.subtract(theirs, ours)).max():.1e}",
        )


ANSWERS = {
    "a number out of range": '{"score": [15, 8], "reasoning": ""}',
    "one number of two": '{"score": 7, "reasoning": ""}',
    "three numbers": '{"score": [7, 8, 1], "reasoning": ""}',
    "a list alone": "[7, 8]",
    "halves": '{"score": [7.5, 8], "reasoning": ""}',
    "a negative number": '{"score": [-1, 8], "reasoning": ""}',
}


def read_answers(reference: Any) -> Iterator[Row]:
    """Answers of a judge that are not what it was asked for; the other question is answered with 9 and 9."""
    rubric = Rubric(
        name="SC", images=["edited"], scores=["edit_success", "overedit"], lowest=0, highest=10, prompt="?",
        score_list="score",
    )  # fmt: skip
    for name, text in ANSWERS.items():
        try:
            (row,) = reference_rewards(reference, [(text, '{"score": [9, 9]}', "")], ["stop"], [0], "viescore")
            theirs = f"reward {row['final_reward']:.2f}"
        except Exception as error:
            theirs = f"{type(error).__name__}: the run ends"
        try:
            read = {**answers.parse(text, "stop", rubric), "naturalness": 9, "artifacts": 9}
            ours = f"reward {rewards.viescore(read):.2f}"
        except answers.Unusable as error:
            ours = f"asked again, then left out: {error}"
        yield Row(f"answer: {name}", theirs, ours, "nothing is guessed, and nothing outside 0..10 is taken")


# Fine-tuning


def tokenizer_of(folder: Path) -> Any:
    """Return our tokenizer under the names that the reference's data set asks for."""
    from transformers import PreTrainedTokenizerFast

    names = {"bos_token": ROLES["bos"], "eos_token": ROLES["eos"]}
    found = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **names)
    for role in ("boi", "img", "eoi", "eol", "eof"):
        object.__setattr__(found, f"{role}_token", ROLES[role])
    return found


CASES = {
    "an image at once": ("remove the red circle", None, []),
    "reasoning": ("move it", {"plan": "the circle is at [8, 8, 24, 24]", "scene": "two shapes"}, ["plan", "scene"]),
    "chosen keys in another order": ("move it", {"plan": "first", "why": "x", "scene": " a\n"}, ["scene", "plan"]),
    "reasoning of 3,000 characters": ("move it", {"plan": "word " * 600}, ["plan"]),
    "reasoning that ends in a full stop": ("move it", {"plan": "It moves."}, ["plan"]),
    "an instruction that writes a special token": (f"say {ROLES['eoi']}", None, []),
}


def sft_sequences(reference: Any, vocabulary: Vocabulary) -> Iterator[Row]:
    """Ids of fine-tuning sequences, and which of them count in the loss."""
    rng = np.random.default_rng(SEED)
    reasons = {
        "an instruction that writes a special token": "a user's text stays text: the reference gives it the token's id",
    }
    for name, (instruction, thought, keys) in CASES.items():
        images = [rng.integers(0, vocabulary.num_visual, SHAPE) for _ in range(2)]
        found = reference_sample(reference, vocabulary, images, instruction, thought, keys)
        pairs = [(key, thought[key]) for key in keys] if thought else None
        ids, start = sequence.sft_ids(images[0], instruction, images[1], pairs, vocabulary)
        theirs, counted = found["input_ids"].tolist(), int((found["labels"] != -100).sum())
        same = theirs == ids and counted == len(ids) - start
        differing = sum(one != other for one, other in zip(theirs, ids, strict=False)) + abs(len(theirs) - len(ids))
        yield Row(
            f"SFT ids, {name}",
            f"{len(theirs)} ids, {counted} count",
            f"{len(ids)} ids, {len(ids) - start} count",
            "all equal" if same else f"{differing} ids differ: {reasons.get(name, 'UNEXPLAINED')}",
        )


def reference_sample(
    reference: Any,
    vocabulary: Vocabulary,
    images: Sequence[np.ndarray],
    instruction: str,
    thought: dict[str, str] | None,
    keys: list[str],
) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        example = {"original_image": images[0], "edited_image": images[1], "instruction": instruction, "CoT": thought}
        torch.save(example, f"{folder}/0.pth")
        listed = Path(folder) / "list.json"
        listed.write_text(json.dumps({"prefix": folder, "path_list": ["0.pth"]}))
        arguments = SimpleNamespace(
            random_seed=42,
            data_paths=[str(listed)],
            coefficients=[1.0],
            cot_keys=keys,
            ignore_index=-100,
            codebook_size=vocabulary.num_visual,
            visual_token_pattern="<|visual token {token_id:0>6d}|>",
        )
        with mock.patch("builtins.print"):
            return reference.sft_data.Emu3FeatureDataset(arguments, False, tokenizer_of(POLICY))[0]


def sft_loss(reference: Any, vocabulary: Vocabulary) -> Iterator[Row]:
    """Loss of a step on 8 sequences of unequal lengths: its collator, and cross-entropy as its model takes it."""
    rng = np.random.default_rng(SEED)
    samples = []
    for index in range(8):
        images = [rng.integers(0, vocabulary.num_visual, SHAPE) for _ in range(2)]
        thought = {"plan": "word " * 15 * index}
        samples.append(reference_sample(reference, vocabulary, images, "move it", thought, ["plan"]))
    policy = checkpoint.load_policy(POLICY, torch.float32, "cpu")
    examples = []
    for sample in samples:
        start = int((sample["labels"] == -100).sum())
        examples.append(sft.Example(*np.split(sample["input_ids"].numpy(), [start])))
    settings = sft.Settings(8, 8, 8, 1e-4, 0, 1, False)
    ours = sft.validation_loss(policy, examples, settings)
    for size in (2, 8):
        theirs = np.mean([reference_cross_entropy(reference, policy, samples[i : i + size]) for i in range(0, 8, size)])
        why = "the mean over micro-batches of each one's mean, where ours is over all tokens of the step"
        yield Row(
            f"SFT loss of 8 sequences, {size} in a micro-batch",
            f"{theirs:.6f}",
            f"{ours:.6f}",
            f"differ by {abs(theirs - ours):.1e}" + (f": {why}" if size < 8 else ""),
        )


def reference_cross_entropy(reference: Any, policy: Any, samples: list[dict[str, Tensor]]) -> float:
    batch = reference.sft_data.Emu3FeatureDataset.collate_fn(samples)
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = policy(**batch).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).item()


def schedule() -> Iterator[Row]:
    """Rates of the published recipe over 11,600 steps, the reference's by transformers, as its trainer makes them."""
    from transformers import get_scheduler

    steps = 11_600
    settings = sft.Settings(steps, 64, 2, 1e-4, 30, 1, False, final_learning_rate=1e-5)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
    scheduler = get_scheduler("cosine_with_min_lr", optimizer, 30, steps, scheduler_specific_kwargs={"min_lr": 1e-5})
    theirs = []
    for _ in range(steps):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    ours = [sft.learning_rate(step, settings) for step in range(steps)]
    apart = np.abs(np.subtract(theirs, ours))
    yield Row(
        "SFT rate, 11,600 steps",
        f"{theirs[0]:.1e} at first, {theirs[-1]:.2e} at last",
        f"{ours[0]:.1e} at first, {ours[-1]:.2e} at last",
        f"differ by {apart[30:].max():.1e} after the warm-up; in it ours is one step ahead, so that no step has rate 0",
    )


if __name__ == "__main__":
    try:
        main()
    except EarlError as error:
        raise SystemExit(f"reference_parity: {error}") from error
