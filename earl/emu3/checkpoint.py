"""Policies and vision tokenizers on disk, and the one place where stages take them into memory.

Policies are loaded as `Emu3ForCausalLM`, vision tokenizers as `Emu3VQVAE`, from safetensors alone: no pickle, no
remote code. Every stage takes its models here, so that a process that stays could hold on to them.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from earl.emu3.vocabulary import Vocabulary
from earl.errors import EarlError
from earl.files import manifest

if TYPE_CHECKING:
    import torch
    from transformers import Emu3ForCausalLM, Emu3VQVAE

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


def load_policy(folder: Path | str, dtype: "torch.dtype", device: "torch.device | str") -> "Emu3ForCausalLM":
    """Return the policy of a folder, in evaluation mode.

    Raises:
        EarlError: when the folder is missing, incomplete, or holds weights that are not finite or too few for its
            tokenizer.
    """
    import torch
    from transformers import Emu3ForCausalLM

    folder = _checked(folder)
    try:
        model = Emu3ForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise EarlError(f"{folder}: does not load as Emu3ForCausalLM ({error})") from error
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise EarlError(f"{folder}: weight {name!r} is not finite; go back to an earlier checkpoint")
    vocabulary = Vocabulary.from_folder(folder)
    if model.config.vocab_size < vocabulary.size:
        raise EarlError(
            f"{folder}: the model has {model.config.vocab_size} ids but its tokenizer {vocabulary.size}; "
            "use the tokenizer that the model was trained with"
        )
    return model.to(device).eval()


def save_policy(model: "Emu3ForCausalLM", folder: Path | str, tokenizer_from: Path | str) -> str:
    """Write a policy into an existing folder, beside a copy of another policy's tokenizer; return its digest.

    The caller gives a folder that `earl.files.atomic.folder` made, so that a policy appears complete or not at all.
    """
    folder, tokenizer_from = Path(folder), Path(tokenizer_from)
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (tokenizer_from / name).is_file() and not (folder / name).exists():
            shutil.copyfile(tokenizer_from / name, folder / name)
    return manifest.seal(folder)


def load_vision_tokenizer(folder: Path | str, device: "torch.device | str") -> "Emu3VQVAE":
    """Return the vision tokenizer of a folder in float32 and evaluation mode.

    Raises:
        EarlError: when the folder is missing or does not load.
    """
    import torch
    from transformers import Emu3VQVAE

    folder = _checked(folder)
    try:
        model = Emu3VQVAE.from_pretrained(folder, dtype=torch.float32, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise EarlError(f"{folder}: does not load as Emu3VQVAE ({error})") from error
    return model.to(device).eval()


def _checked(folder: Path | str) -> Path:
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise EarlError(f"{folder}: holds no config.json; give the folder of a checkpoint")
    if (folder / manifest.NAME).is_file():
        manifest.check(folder)
    return folder
