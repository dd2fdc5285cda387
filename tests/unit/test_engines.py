"""What every rollout engine promises, shown on each of them."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from earl.emu3 import checkpoint, grid, saving, sequence
from earl.engines import Request, SamplingParams, checked
from earl.learner import logprobs
from earl.messages.errors import EarlError
from tests.support import policies
from tests.support.distributions import truncated_softmax
from tests.support.engines import ENGINES

FREE = SamplingParams(temperature=1.0, max_tokens=80)
AT_ONCE = "<|image start|>"


@pytest.fixture(scope="module", params=ENGINES)
def engine(request):
    return request.getfixturevalue(f"{request.param}_engine")


@pytest.fixture
def loaded(engine, policy_folder):
    """The engine with the policy that knows how an image begins."""
    engine.load(policy_folder)
    return engine


@pytest.fixture(scope="session")
def thinker(tmp_path_factory):
    """A policy that ends its reasoning, of a few words or none, and then begins an image."""

    def think(model, vocabulary):
        end = vocabulary.encode(sequence.END_THINKING)
        size_and_img = [vocabulary.boi, *vocabulary.encode("8*8"), vocabulary.img]
        policies.teach(model, [vocabulary.encode(sequence.START_THINKING)[-1], *end, *size_and_img], strength=9)

    return policies.write(tmp_path_factory.mktemp("policies") / "thinker", think)


def request_of(vocabulary, shape, seeds, prefill=AT_ONCE, instruction="remove the red circle"):
    tokens = np.random.default_rng(sum(shape)).integers(0, 256, shape)
    return Request(sequence.prompt_ids(tokens, instruction, prefill, vocabulary), shape, seeds)


@pytest.fixture(scope="module")
def requests(vocabulary):
    """Six prompts of different lengths and grids, two samples each."""
    shapes = [(3, 3), (2, 5), (4, 2), (1, 1), (3, 3), (5, 4)]
    return [
        request_of(vocabulary, shape, [10 * i, 10 * i + 1], instruction="remove the red circle" * (i % 3))
        for i, shape in enumerate(shapes)
    ]


def flat(completions):
    return [completion for group in completions for completion in group]


def test_completions_are_valid_images_of_the_originals_size(loaded, requests, vocabulary):
    for request, group in zip(requests, loaded.generate(requests, FREE), strict=True):
        for completion in group:
            assert completion.finish_reason == "stop"
            assert completion.token_ids[-1] == vocabulary.eos
            assert sequence.parse_completion(completion.token_ids, vocabulary).shape == request.grid


def test_grids_are_valid_with_and_without_reasoning_side_by_side(engine, thinker, vocabulary):
    rng = np.random.default_rng(5)
    prefills = [AT_ONCE, sequence.START_THINKING]
    mixed = [
        request_of(vocabulary, tuple(rng.integers(1, 9, 2).tolist()), [2 * i, 2 * i + 1], prefills[i % 2])
        for i in range(24)
    ]
    engine.load(thinker)
    images, lengths_of_text = 0, set()
    for request, group in zip(mixed, engine.generate(mixed, dataclasses.replace(FREE, max_tokens=120)), strict=True):
        for completion in group:
            ids = completion.token_ids
            kinds = grid.kinds_of_completion(ids, request.grid, vocabulary)
            assert grid.allowed_masks(vocabulary)[kinds, ids].all()
            if vocabulary.img in ids and completion.finish_reason == "stop":
                images += 1
                lengths_of_text.add(ids.index(vocabulary.img))
                assert sequence.parse_completion(ids, vocabulary).shape == request.grid
    assert images >= 24, "most completions hold an image"
    assert len(lengths_of_text) >= 3, "images begin at many places"


def test_a_completion_that_is_too_long_is_cut(loaded, vocabulary):
    short = dataclasses.replace(FREE, max_tokens=6)
    for completion in flat(loaded.generate([request_of(vocabulary, (2, 2), [1, 2])], short)):
        assert completion.finish_reason == "length"
        assert len(completion.token_ids) == len(completion.logprobs) == 6


def test_a_completion_depends_on_its_seed_alone(loaded, requests, record_property):
    """Bit for bit in the torch engine; in vLLM up to rounding, which may rarely move a draw across its boundary."""
    together = loaded.generate(requests, FREE)
    aligned = loaded.generate(requests[:4], FREE) + loaded.generate(requests[4:], FREE)
    backwards = loaded.generate(requests[::-1], FREE)[::-1]
    if type(loaded).__name__ == "TorchEngine":
        assert together == aligned
    for again in (aligned, backwards):
        differing = np.mean([a.token_ids != b.token_ids for a, b in zip(flat(together), flat(again), strict=True)])
        record_property("share of differing completions", float(differing))
        assert differing <= 0.1
    other = loaded.generate([dataclasses.replace(r, seeds=[s + 1000 for s in r.seeds]) for r in requests], FREE)
    assert flat(other) != flat(together)


def test_log_probs_are_those_that_the_learner_computes(loaded, requests, policy_folder, vocabulary):
    policy = checkpoint.load_policy(policy_folder, torch.float32, "cpu")
    params = dataclasses.replace(FREE, temperature=0.7)
    support = logprobs.split_vocab((vocabulary.first_visual, vocabulary.size))
    differences = []
    for request, group in zip(requests, loaded.generate(requests, params), strict=True):
        for completion in group:
            ids = torch.tensor([[*request.prompt_token_ids, *completion.token_ids]])
            with torch.no_grad():
                logits = policy(ids).logits[0, len(request.prompt_token_ids) - 1 : -1]
            expected, _ = logprobs.token_logprobs(logits, ids[0, -len(completion.token_ids) :], 0.7, support)
            forced = grid.kinds_of_completion(completion.token_ids, request.grid, vocabulary) >= grid.FIRST_FORCED
            found = np.array(completion.logprobs)
            assert (found[forced] == 0).all()
            differences.append(np.abs(found - expected.numpy())[~forced])
    assert np.concatenate(differences).mean() < 1e-5


@pytest.mark.parametrize(("top_p", "top_k"), [(0.7, -1), (1.0, 12), (0.7, 12)])
def test_log_probs_are_those_of_the_truncated_distribution(loaded, requests, policy_folder, vocabulary, top_p, top_k):
    policy = checkpoint.load_policy(policy_folder, torch.float32, "cpu")
    request = requests[0]
    truncated = SamplingParams(0.8, top_p=top_p, top_k=top_k, max_tokens=80)
    for completion in flat(loaded.generate([request], truncated)):
        ids = torch.tensor([[*request.prompt_token_ids, *completion.token_ids]])
        with torch.no_grad():
            logits = policy(ids).logits[0, len(request.prompt_token_ids) - 1 : -1].double().numpy()
        kinds = grid.kinds_of_completion(completion.token_ids, request.grid, vocabulary)
        logits[~grid.allowed_masks(vocabulary)[kinds]] = -np.inf
        expected = [
            np.log(truncated_softmax(row / 0.8, top_p, top_k)[token])
            for row, token in zip(logits, completion.token_ids, strict=True)
        ]
        assert np.abs(np.array(completion.logprobs) - expected).max() < 1e-3


def test_greedy_equals_transformers_generate_under_the_same_constraint(loaded, requests, policy_folder, vocabulary):
    from transformers import LogitsProcessorList

    policy = checkpoint.load_policy(policy_folder, torch.float32, "cpu")
    masks = torch.from_numpy(grid.allowed_masks(vocabulary))
    for request in requests[:3]:
        length = len(request.prompt_token_ids)

        def constrain(ids, scores, request=request, length=length):
            generated = ids[0, length:].tolist()
            k = len(generated) - generated.index(vocabulary.img) - 1 if vocabulary.img in generated else -1
            return scores.masked_fill(~masks[int(grid.kind_at(np.array(k), *request.grid))], -torch.inf)

        expected = policy.generate(
            torch.tensor([request.prompt_token_ids]),
            attention_mask=torch.ones(1, length),
            do_sample=False,
            max_new_tokens=64,
            eos_token_id=vocabulary.eos,
            logits_processor=LogitsProcessorList([constrain]),
        )[0, length:].tolist()
        greedy = loaded.generate([request], SamplingParams(temperature=0, max_tokens=64))
        assert flat(greedy)[0].token_ids == expected
        assert set(flat(greedy)[0].logprobs) == {0.0}


def test_weights_swapped_in_place_give_what_a_fresh_load_gives(loaded, requests, thinker, policy_folder):
    before = loaded.generate(requests, FREE)
    loaded.load(thinker)
    assert flat(loaded.generate(requests, FREE)) != flat(before)
    loaded.load(policy_folder)
    after = loaded.generate(requests, FREE)
    assert [c.token_ids for c in flat(after)] == [c.token_ids for c in flat(before)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_from_memory_give_what_their_folder_gives(
    engine, requests, thinker, policy_folder, trained, tmp_path, dtype
):
    """Bit for bit, whichever type the folder has (`policy_dtype`), and although the names come in another order."""
    saving.save_policy(trained, tmp_path, saving.companions(thinker), dtype)
    engine.load(tmp_path)
    expected = engine.generate(requests, FREE)
    engine.load(policy_folder)
    before = engine.generate(requests, FREE)
    engine.update(reversed(list(weights_of(trained, dtype))), "the digest of that folder")
    assert engine.generate(requests, FREE) == expected != before
    engine.load(policy_folder)
    assert engine.generate(requests, FREE) == before


@pytest.fixture(scope="module")
def trained(thinker):
    """A policy in float32, as a learner holds it: its weights are no bfloat16 numbers."""
    policy = checkpoint.load_policy(thinker, torch.float32, "cpu")
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.01 * torch.randn_like(weight)
    return policy


def weights_of(policy, dtype=torch.float32):
    return ((name, weight.detach().to(dtype)) for name, weight in policy.named_parameters())


def test_all_weights_are_asked_for_once(loaded, trained):
    """Other ranks gather each weight together with this one."""
    asked = []

    def gathered():
        for name, weight in weights_of(trained):
            asked.append(name)
            yield name, weight
        asked.append("end")

    loaded.update(gathered(), "digest")
    assert asked == [*(name for name, _ in trained.named_parameters()), "end"]


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda w: w["a"].fill_(torch.nan), "weight 'a' is not finite"),
        (lambda w: w["a"][0].fill_(-torch.inf), "weight 'a' is not finite"),
        (lambda w: w.pop("b"), "weight 'b' is missing, 1 of them in all"),
        (lambda w: w.update(x=torch.zeros(1)), "weight 'x' is not one of the policy that is loaded"),
        (lambda w: w.update(a=torch.zeros(2)), r"weight 'a' has shape \[2\], not \[3, 2\]"),
    ],
)
def test_weights_that_do_not_fit_are_named(spoil, complaint):
    weights = {"a": torch.ones(3, 2), "b": torch.ones(1, dtype=torch.bfloat16)}
    shapes = {name: weight.shape for name, weight in weights.items()}
    assert list(checked(weights.items(), shapes)) == list(weights.items())
    spoil(weights)
    with pytest.raises(EarlError, match=complaint):
        list(checked(weights.items(), shapes))


def test_nothing_is_sampled_from_weights_of_which_some_were_refused(engine, requests, policy_folder, trained):
    engine.load(policy_folder)
    before = engine.generate(requests[:2], FREE)
    with pytest.raises(EarlError, match=r"weight 'lm_head.weight' is missing"):
        engine.update(list(weights_of(trained))[:-1], "digest")
    with pytest.raises(EarlError, match="no policy is loaded"):
        engine.generate(requests[:2], FREE)
    with pytest.raises(EarlError, match="no policy is loaded"):
        engine.update(weights_of(trained), "digest")
    engine.load(policy_folder)
    assert engine.generate(requests[:2], FREE) == before


def test_sleep_changes_no_completion(loaded, requests):
    before = loaded.generate(requests[:2], FREE)
    loaded.sleep()
    loaded.sleep()
    loaded.wake()
    assert loaded.generate(requests[:2], FREE) == before


def test_a_closed_engine_loads_again(engine, requests, policy_folder):
    engine.load(policy_folder)
    before = engine.generate(requests[:2], FREE)
    engine.close()
    engine.close()
    with pytest.raises(EarlError, match="no policy is loaded"):
        engine.generate(requests[:2], FREE)
    engine.load(policy_folder)
    assert engine.generate(requests[:2], FREE) == before


def test_both_checkpoint_formats_load(engine, requests, policy_folder, tmp_path):
    """`Emu3ForConditionalGeneration` as published: other names, and a vision tokenizer's weights beside them."""
    engine.load(policy_folder)
    expected = engine.generate(requests[:2], FREE)
    weights = load_file(policy_folder / "model.safetensors")
    for prefix in ("text_model.", "model.text_model."):
        folder = tmp_path / prefix
        shutil.copytree(policy_folder, folder)
        (folder / "manifest.json").unlink()
        whole = json.loads((folder / "config.json").read_text()) | {"architectures": ["Emu3ForConditionalGeneration"]}
        (folder / "config.json").write_text(json.dumps(whole))
        renamed = {conditional_name(name, prefix): weight for name, weight in weights.items()}
        renamed["vqmodel.post_quant_conv.weight" if prefix == "text_model." else "model.vqmodel.x"] = torch.zeros(3)
        save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
        engine.load(folder)
        assert [c.token_ids for c in flat(engine.generate(requests[:2], FREE))] == [c.token_ids for c in flat(expected)]


def conditional_name(name, prefix):
    if prefix == "text_model.":  # as published
        return prefix + name
    # as transformers names them in memory
    return name if name.startswith("lm_head") else prefix + name.removeprefix("model.")


def edit_config(folder, **fields):
    """Change fields of the text model."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["text_config"] |= fields
    path.write_text(json.dumps(config))


def make_llama(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def edit_weights(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def cut_into_shards(folder):
    """Two shards and their index; the second is lost."""
    names = sorted(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), r"tokenizer.json: does not exist"),
        (lambda f: (f / "model.safetensors").unlink(), r"model.safetensors: is missing"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), r"model.safetensors: does not load"),
        (lambda f: (f / "config.json").unlink(), r"holds no config.json"),
        (make_llama, r"config.json: model_type is 'llama'; it must be an Emu3"),
        (cut_into_shards, r"model-00002-of-00002.safetensors: is missing, so the policy is incomplete"),
        (
            lambda f: edit_weights(f, lambda w: w["model.layers.1.mlp.up_proj.weight"][0].fill_(torch.nan)),
            r"model.safetensors: weight 'model.layers.1.mlp.up_proj.weight' is not finite",
        ),
        (lambda f: edit_weights(f, lambda w: w.pop("model.norm.weight")), r"weight 'model.norm.weight' is missing"),
        (
            lambda f: edit_config(f, intermediate_size=64),
            r"weight .* has shape \[.*128.*\] where .* asks for \[.*64.*\]",
        ),
        (lambda f: edit_config(f, eos_token_id=3), r"eos_token_id is 3 in config.json but \d+ in tokenizer.json"),
        (lambda f: edit_config(f, vocab_size=600), r"the model has 600 ids but its tokenizer 7\d\d"),
    ],
)
def test_a_broken_policy_folder_is_named(engine, policy_folder, tmp_path, spoil, complaint):
    broken = tmp_path / "policy"
    shutil.copytree(policy_folder, broken)
    (broken / "manifest.json").unlink()
    spoil(broken)
    with pytest.raises(EarlError, match=complaint):
        engine.load(broken)


def test_prompts_longer_than_the_context_are_refused(loaded, requests):
    long = dataclasses.replace(requests[0], prompt_token_ids=[*requests[0].prompt_token_ids] * 30)
    with pytest.raises(EarlError, match=r"a prompt has \d{3} tokens, .* no room .* model_context_size \(512\)"):
        loaded.generate([requests[0], long], FREE)


def test_a_completion_ends_where_the_context_does(loaded, requests):
    """As vLLM has it: the request is capped, its finish_reason is `length`, and what fits is what would have come."""
    whole = requests[5]  # 5 rows of 4: 28 tokens at least
    padding = whole.prompt_token_ids[-1:] * (512 - 20 - len(whole.prompt_token_ids))
    near_the_end = dataclasses.replace(whole, prompt_token_ids=[*padding, *whole.prompt_token_ids])
    with_room = SamplingParams(temperature=1.0, max_tokens=20)
    [capped, other] = loaded.generate([near_the_end, requests[1]], FREE)
    [shorter, _] = loaded.generate([near_the_end, requests[1]], with_room)
    assert [len(one.token_ids) for one in capped] == [20, 20]
    assert {one.finish_reason for one in capped} == {"length"}
    assert [one.token_ids for one in capped] == [one.token_ids for one in shorter]
    assert {one.finish_reason for one in other} == {"stop"}, "a neighbour has its own room"
