"""Write a tiny Qwen2.5-VL with random weights: a judge that runs anywhere, in every respect but judgement.

    python scripts/write_tiny_judge.py runs/tiny-judge

It has the architecture, file layout, chat form and special tokens of Qwen/Qwen2.5-VL and 0.7 million parameters. As
in Qwen's tokenizer every digit is a token of its own, so that 10 takes two. The bytes depend on the seed alone.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from earl.execution import torch_extensions
from earl.files import atomic, manifest
from earl.statistics import seeds

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{% if part['type'] in ['image', 'image_url'] %}<|vision_start|><|image_pad|><|vision_end|>\
{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TEXTS = (
    "The picture before the edit. The picture after the edit. The instruction was carried out: some of it, all of it.",
    '{"reasoning": "nothing else has changed", "edit_success": 1, "overedit": 2, "naturalness": 3, "artifacts": 4}',
    "Give two whole numbers, from 0 to 10: 5, 6, 7, 8, 9.",
)
CONTEXT = 4096
HEAD = 32


def build_tokenizer() -> Any:
    """A byte-level BPE of a few hundred ids; single digits, Qwen's special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    pieces = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pieces)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        TEXTS * 3, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    return tokenizer


def build_model(tokenizer: Any, seed: int) -> Any:
    """A `Qwen2_5_VLForConditionalGeneration` of two layers each for text and vision."""
    torch_extensions.work_around()
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    def ids(*names: str) -> dict[str, int]:
        return {name: tokenizer.token_to_id(f"<|{text}|>") for name, text in (one.split("=") for one in names)}

    heads, width = 4, 4 * HEAD
    text = {
        "vocab_size": 64 * -(-tokenizer.get_vocab_size() // 64),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        # Time, height and width each turn a part of the HEAD / 2 pairs of a head.
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        **ids("bos_token_id=endoftext", "eos_token_id=im_end"),
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "out_hidden_size": width,
        "fullatt_block_indexes": [1],
        "window_size": 112,
    }
    tokens = ids(
        "image_token_id=image_pad",
        "video_token_id=video_pad",
        "vision_start_token_id=vision_start",
        "vision_end_token_id=vision_end",
    )
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.seed("tiny judge", seed))
        return Qwen2_5_VLForConditionalGeneration(config).float().eval()


def write_judge(folder: Path | str, seed: int = 0) -> None:
    """Write the model, its tokenizer and its image processor as a sealed folder, as a published checkpoint has them."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed)
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "min_pixels": 4 * 28 * 28,
        "max_pixels": 64 * 28 * 28,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    names = {
        "tokenizer_class": "Qwen2TokenizerFast",
        "chat_template": TEMPLATE,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": list(SPECIAL[1:]),
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    with atomic.folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save(str(temporary / "tokenizer.json"))
        for name, content in (("tokenizer_config.json", names), ("preprocessor_config.json", processor)):
            text = json.dumps(content, indent=2, sort_keys=True) + "\n"
            (temporary / name).write_text(text, encoding="utf-8")
        manifest.seal(temporary)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_judge(arguments.folder, arguments.seed)
