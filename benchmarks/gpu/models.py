"""Models of the published sizes with random weights, and episodes for them. On a CPU everything is small.

Nothing is read or downloaded: what is measured depends on sizes alone.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch

from earl.emu3.models import Emu3ForCausalLM, Emu3TextConfig
from earl.emu3.vocabulary import Vocabulary
from earl.learner.batches import Episode

if TYPE_CHECKING:
    from earl.engines import Request

SPREAD = 4.0
"""Standard deviation of the logits: an entropy of some nats over the visual ids, as a trained policy has, where random
weights of the usual size would leave the distribution flat and rounding without consequence."""


def text_config(small: bool, layers: int) -> Emu3TextConfig:
    """The published policy's configuration with fewer layers; it has 32."""
    width = {}
    if small:
        width = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
        width |= {"vocab_size": 600, "max_position_embeddings": 512, "pad_token_id": 3, "bos_token_id": 1}
        width |= {"eos_token_id": 2}
    return Emu3TextConfig(num_hidden_layers=layers, tie_word_embeddings=False, **width)


def vocabulary(config: Emu3TextConfig) -> Vocabulary:
    """The ids of the published vocabulary, or of a small one, by role; it cannot encode text."""
    if config.vocab_size < 1000:
        roles = {"pad": 3, "bos": 1, "eos": 2, "boi": 4, "img": 5, "eoi": 6, "eol": 7, "eof": 8}
        return Vocabulary(text=None, first_visual=88, num_visual=512, digest="", **roles)
    return Vocabulary(
        digest="",
        text=None,
        pad=151643,
        bos=151849,
        eos=151850,
        boi=151852,
        img=151851,
        eoi=151853,
        eol=151846,
        eof=151847,
        first_visual=151854,
        num_visual=32768,
    )


def policy(config: Emu3TextConfig, device: torch.device, dtype: torch.dtype) -> Emu3ForCausalLM:
    """A policy on a device, in evaluation mode."""
    with torch.device("meta"):
        model = Emu3ForCausalLM(config).to(dtype)
    model.to_empty(device=device)
    # Buffers are computed where the module is made.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return filled(model)


def filled(model: Emu3ForCausalLM) -> Emu3ForCausalLM:
    """Give a model, which may be split over ranks, random weights, and put it into evaluation mode."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            own = weight.to_local() if hasattr(weight, "to_local") else weight
            if weight.ndim == 1:
                own.fill_(1.0)
            elif name == "lm_head.weight":
                own.normal_(0.0, SPREAD * model.config.hidden_size**-0.5)
            else:
                own.normal_(0.0, 0.02)
    return model.eval()


def layer_weights(config: Emu3TextConfig) -> int:
    """Return the weights of the matrices of one layer."""
    head = config.hidden_size // config.num_attention_heads
    attention = 2 * config.hidden_size * head * (config.num_attention_heads + config.num_key_value_heads)
    return attention + 3 * config.hidden_size * config.intermediate_size


def lengths(small: bool) -> tuple[int, int]:
    """Tokens of a prompt and of a completion: 256 x 256 pixels with an instruction, and their edit."""
    return (40, 24) if small else (1100, 1060)


def episodes(config: Emu3TextConfig, prompts: int, completions: int, small: bool) -> list[Episode]:
    """Groups of completions of random visual tokens, which nobody sampled."""
    ids, (prompt, completion) = vocabulary(config), lengths(small)
    rng = np.random.default_rng(0)
    found = []
    for group in range(prompts):
        start = rng.integers(0, ids.first_visual, prompt)
        for sample in range(completions):
            found.append(
                Episode(
                    episode_id=f"{group:03d}-{sample:03d}",
                    group_id=f"{group:03d}",
                    prompt=start,
                    completion=rng.integers(ids.first_visual, ids.size, completion),
                    forced=np.zeros(completion, dtype=bool),
                    behavior_logprobs=np.full(completion, -3.0, dtype=np.float32),
                    advantage=(-1.0) ** sample,
                )
            )
    return found


def requests(config: Emu3TextConfig, prompts: int, samples: int, small: bool) -> "list[Request]":
    """Prompts of random text for a torch engine as `engine` makes it."""
    from earl.engines import Request

    ids, rng = vocabulary(config), np.random.default_rng(0)
    grid = (4, 4) if small else (32, 32)
    return [
        Request(
            rng.integers(9, ids.first_visual if small else ids.pad, lengths(small)[0]).tolist(),
            grid,
            range(samples * index, samples * (index + 1)),
        )
        for index in range(prompts)
    ]
