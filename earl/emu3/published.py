"""Emu3 as it is published, turned once into folders that every stage, transformers and vLLM read.

Three formats, told apart by ``model_type`` in config.json; all are read as data, safetensors and JSON, and no code of
a repository runs.

::

    Emu3            BAAI/Emu3-Gen, BAAI/Emu3-Stage1 and what was trained from them: a policy
    Emu3VisionVQ    BAAI/Emu3-VisionTokenizer: a vision tokenizer, whose weights have other names in transformers
    emu3            ...-hf, `Emu3ForConditionalGeneration`: a policy and a vision tokenizer together
"""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from earl.emu3 import checkpoint, tiktoken_files, weight_files
from earl.emu3.saving import config_text
from earl.emu3.vocabulary import write_tokenizer
from earl.files import atomic, manifest, remedies
from earl.files.hub_names import Conversion
from earl.messages import network
from earl.messages.errors import EarlError

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import Emu3VQVAEConfig

WANTED_FILES = ("*.json", "*.safetensors", tiktoken_files.RANKS, tiktoken_files.SPECIAL)
"""What is downloaded of a repository: no code and no pickles."""
TOKENIZER_FILES = ("tokenizer.json", tiktoken_files.RANKS, tiktoken_files.SPECIAL)
"""What is downloaded of a repository whose tokenizer alone is wanted."""

_VISION_FIELDS = {
    "codebook_size": "codebook_size",
    "embed_dim": "embed_dim",
    "z_channels": "latent_channels",
    "double_z": "double_latent",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "temporal_downsample_factor": "temporal_downsample_factor",
    "ch": "base_channels",
    "ch_mult": "channel_multiplier",
    "num_res_blocks": "num_res_blocks",
    "attn_resolutions": "attn_resolutions",
}
"""Fields of `Emu3VisionVQ`, and what `Emu3VQVAEConfig` calls them."""
_VISION_NAMES = (
    (r"\.mid\.attn_1\.norm\.", ".middle_block.attn_norm."),
    (r"\.mid\.", ".middle_block."),
    (r"\.attn\.(\d+)\.norm\.", r".attn_norms.\1."),
    (r"^encoder\.down\.", "encoder.down_block.down."),
    (r"^decoder\.up\.", "decoder.up_block.up."),
    (r"(\.attn(?:\.\d+|_1))\.([qkv])\.", r"\1.\2_proj."),
    (r"(\.attn(?:\.\d+|_1))\.proj_out\.", r"\1.out_proj."),
)
_PROJECTION = re.compile(r"\.(?:[qkv]|out)_proj\.weight$")
_VISION_PREFIX = re.compile(r"^(?:model\.)?vqmodel\.")

Rename = "Callable[[str, torch.Tensor], tuple[str, torch.Tensor] | None]"


def located(source: str, revision: str | None = None, wanted: Sequence[str] = WANTED_FILES) -> Path:
    """Return the folder of a checkpoint: ``source`` itself, or the download of the repository of this name.

    Args:
        source: Folder, or name on the hub.
        revision: Of the repository; by default its main one.
        wanted: Patterns of the files that are downloaded.

    Raises:
        EarlError: when there is no such folder and the hub does not give it.
    """
    if Path(source).is_dir():
        return Path(source)
    import huggingface_hub

    with network.failures(f"{source}: is no folder, and could not be downloaded as a repository", network.CHECK_HUB):
        return Path(huggingface_hub.snapshot_download(source, revision=revision, allow_patterns=list(wanted)))


def make(wanted: Conversion, out: Path) -> str:
    """Find or download a published checkpoint and `convert` it; return the digest of the folder ``out``.

    Raises:
        EarlError: see `located` and `convert`.
    """
    tokenizer_from = located(wanted.tokenizer, wanted=TOKENIZER_FILES) if wanted.tokenizer else None
    return convert(located(wanted.source, wanted.revision), out, tokenizer_from, wanted.vision)


def convert(source: Path, out: Path, tokenizer_from: Path | None = None, vision: bool = False) -> str:
    """Write a published checkpoint as a policy folder or a vision tokenizer's; return its digest.

    Holds the weights of one of the new files at a time. The result is loaded and checked as far as a stage would.

    Args:
        source: Folder in one of the formats above.
        out: The folder to write, sealed.
        tokenizer_from: Folder of a policy's tokenizer, in any of the formats; by default ``source``.
        vision: Of a checkpoint with both, write the vision tokenizer instead of the policy.

    Raises:
        EarlError: naming the file, when something is missing, damaged, or not what its configuration says.
    """
    for folder in filter(None, (source, tokenizer_from)):
        remedies.refuse_pointers(folder)
    fields = checkpoint.config_fields(source)
    with atomic.folder(out) as temporary, manifest.reading(source), manifest.reading(tokenizer_from or source):
        if fields["model_type"] == "Emu3VisionVQ" or vision:
            entries = _write_vision_tokenizer(source, fields, temporary)
            checkpoint.load_vision_tokenizer(temporary, "cpu")
        else:
            entries = _write_policy(source, tokenizer_from or source, temporary)
            checkpoint.check_policy(temporary)
        return manifest.seal(temporary, entries)


def vision_weight(name: str, weight: "torch.Tensor") -> tuple[str, "torch.Tensor"]:
    """Return name and value in `Emu3VQVAE` of a weight of `Emu3VisionVQ`.

    The same computation in other modules: attention's 1 x 1 convolutions became linear layers, and its norms stand
    beside it.
    """
    for pattern, replacement in _VISION_NAMES:
        name = re.sub(pattern, replacement, name)
    if _PROJECTION.search(name) and weight.ndim == 4:
        weight = weight.flatten(1)
    return name, weight


def _write_policy(source: Path, tokenizer_from: Path, out: Path) -> dict[str, manifest.Entry]:
    config = checkpoint.text_config(source)
    (out / "config.json").write_text(config_text(config, config.dtype), encoding="utf-8")
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", out / "generation_config.json")
    write_tokenizer(_tokenizer(tokenizer_from), out, config.max_position_embeddings)

    def rename(name: str, weight: "torch.Tensor") -> tuple[str, "torch.Tensor"] | None:
        own = checkpoint.text_weight_name(name)
        return None if own is None else (own, weight)

    return _write_weights(source, out, rename)


def _write_vision_tokenizer(source: Path, fields: dict[str, Any], out: Path) -> dict[str, manifest.Entry]:
    from earl.emu3.models import Emu3VQVAEConfig

    if fields["model_type"] == "Emu3VisionVQ":
        config, rename = _vision_config(fields), vision_weight
    elif isinstance(fields.get("vq_config"), dict):
        config, rename = Emu3VQVAEConfig.from_dict(fields["vq_config"]), _inner_vision_weight
    else:
        raise EarlError(f"{source}: holds no vision tokenizer; its model_type is {fields['model_type']!r}")
    config.architectures = ["Emu3VQVAE"]
    config.save_pretrained(out)
    return _write_weights(source, out, rename)


def _vision_config(fields: dict[str, Any]) -> "Emu3VQVAEConfig":
    from earl.emu3.models import Emu3VQVAEConfig

    known = {own: fields[name] for name, own in _VISION_FIELDS.items() if name in fields}
    config = Emu3VQVAEConfig(**known)
    # Attention is as wide as the innermost level, with one head.
    config.hidden_size = config.base_channels * config.channel_multiplier[-1]
    return config


def _inner_vision_weight(name: str, weight: "torch.Tensor") -> tuple[str, "torch.Tensor"] | None:
    return (_VISION_PREFIX.sub("", name), weight) if _VISION_PREFIX.match(name) else None


def _tokenizer(folder: Path) -> "Tokenizer":
    from tokenizers import Tokenizer

    if (folder / "tokenizer.json").is_file():
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    if tiktoken_files.is_here(folder):
        return tiktoken_files.build_tokenizer(folder)
    raise EarlError(
        f"{folder}: holds neither tokenizer.json nor {tiktoken_files.RANKS}; give --tokenizer, such as BAAI/Emu3-Gen"
    )


def _write_weights(source: Path, out: Path, rename: Rename) -> dict[str, manifest.Entry]:
    """Write renamed weights, those left out for which ``rename`` returns None; return the entries of their files."""
    renamed = (rename(name, weight) for _, name, weight in checkpoint.weights(source))
    entries = weight_files.write(out, filter(None, renamed))
    if not entries:
        raise EarlError(f"{source}: holds none of the weights that are wanted")
    return entries
