"""Small files in the formats that Emu3 is published in."""

import base64
import json
import zlib
from pathlib import Path

import numpy as np

VISION_VQ = Path(__file__).parents[1] / "data" / "emu3_vision_vq.json"
"""Of a small model of BAAI's class `Emu3VisionVQ` with the weights of `vision_weights`: configuration, names and shapes
of the weights, the tokens that it gave `vision_image()`, and pixels that it gave those tokens."""


def vision_weights(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Return random weights that follow from their names; variances and the weights of norms are near 1."""
    weights = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if name.endswith("num_batches_tracked"):
            weights[name] = np.array(7)
        elif name.endswith("running_var"):
            weights[name] = rng.uniform(0.5, 1.5, shape).astype(np.float32)
        elif name == "quantize.embedding.weight":
            weights[name] = rng.normal(0, 0.5, shape).astype(np.float32)
        elif len(shape) > 1:
            weights[name] = rng.normal(0, 1.5 * np.prod(shape[1:]) ** -0.5, shape).astype(np.float32)
        else:
            weights[name] = rng.normal(1 if name.endswith("weight") else 0, 0.1, shape).astype(np.float32)
    return weights


def vision_image() -> np.ndarray:
    """Return pixels in -1..1, float32 [1, 3, 48, 64]."""
    return np.random.default_rng(5).uniform(-1, 1, (1, 3, 48, 64)).astype(np.float32)


def write_vision_vq(folder: Path) -> dict:
    """Write a checkpoint in the format of BAAI/Emu3-VisionTokenizer and return the content of `VISION_VQ`."""
    from safetensors.numpy import save_file

    recorded = json.loads(VISION_VQ.read_text())
    folder.mkdir(parents=True)
    config = recorded["config"] | {
        "architectures": ["Emu3VisionVQModel"],
        "auto_map": {"AutoModel": "modeling_emu3visionvq.Emu3VisionVQModel"},
        "dropout": 0.0,
        "model_type": "Emu3VisionVQ",
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(vision_weights(recorded["weights"]), folder / "model.safetensors", metadata={"format": "pt"})
    return recorded


def ranks_of(texts: list[str], size: int) -> list[bytes]:
    """Return the tokens of a byte-level BPE that is trained on texts, by rank."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    names = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return [bytes(byte_of[character] for character in name) for name, _ in names]


def special_names(visual: int) -> list[str]:
    """Return the lines of emu3_vision_tokens.txt for a codebook of ``visual`` codes."""
    names = ["<|image token|>", "<|image start|>", "<|image end|>"]
    return [*names, *(f"<|visual token {index:06d}|>" for index in range(visual))]


def write_vocabulary(folder: Path, ranks: list[bytes], visual: int) -> None:
    """Write a tokenizer in the format of BAAI/Emu3-Gen."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks)]
    (folder / "emu3.tiktoken").write_text("".join(lines))
    (folder / "emu3_vision_tokens.txt").write_text("\n".join(special_names(visual)) + "\n")
    config = {
        "auto_map": {"AutoTokenizer": ["tokenization_emu3.Emu3Tokenizer", None]},
        "bos_token": "<|extra_203|>",
        "eos_token": "<|extra_204|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Emu3Tokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_policy(folder: Path, ranks: int, visual: int, shards: int = 2) -> dict[str, np.ndarray]:
    """Write weights and configuration in the format of BAAI/Emu3-Gen, and a file of code that must never run."""
    from safetensors.numpy import save_file

    first = ranks + 208
    hidden, inner, heads, layers = 32, 48, 4, 2
    size = first + 3 + visual
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (size, hidden), "lm_head.weight": (size, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for name, rows in (("q", hidden), ("k", hidden // 2), ("v", hidden // 2), ("o", hidden)):
            shapes[f"{at}self_attn.{name}_proj.weight"] = (rows, hidden)
        shapes |= {f"{at}mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{at}mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{at}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    shapes["model.norm.weight"] = (hidden,)
    weights = {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
    config = {
        "architectures": ["Emu3ForCausalLM"],
        "attention_dropout": 0.1,
        "auto_map": {
            "AutoConfig": "configuration_emu3.Emu3Config",
            "AutoModelForCausalLM": "modeling_emu3.Emu3ForCausalLM",
        },
        "boi_token_id": first + 1,
        "bos_token_id": ranks + 206,
        "eof_token_id": ranks + 204,
        "eoi_token_id": first + 2,
        "eol_token_id": ranks + 203,
        "eos_token_id": ranks + 207,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "image_area": 518400,
        "img_token_id": first,
        "initializer_range": 0.02,
        "intermediate_size": inner,
        "max_position_embeddings": 9216,
        "model_type": "Emu3",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": heads // 2,
        "pad_token_id": ranks,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.44.0",
        "use_cache": True,
        "vocab_size": size,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_emu3.py").write_text("raise SystemExit('remote code ran')\n")
    (folder / "configuration_emu3.py").write_text("raise SystemExit('remote code ran')\n")
    names = list(weights)
    parts = {f"model-{n + 1:05d}-of-{shards:05d}.safetensors": names[n::shards] for n in range(shards)}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return weights
