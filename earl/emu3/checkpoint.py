"""Policies and vision tokenizers on disk, and the one place where stages take them into memory.

Policies are loaded as `Emu3ForCausalLM`, vision tokenizers as `Emu3VQVAE`, from safetensors alone: no pickle, no
remote code.

A policy folder holds the text model alone (`Emu3ForCausalLM`), text model and vision tokenizer together
(`Emu3ForConditionalGeneration`), of which only the text model is taken, or an adapter (`earl.emu3.adapter`).
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from earl.emu3 import adapter
from earl.emu3.vocabulary import Vocabulary, visual_token
from earl.execution.ranks import Ranks
from earl.files import manifest, remedies, tensors
from earl.messages.errors import EarlError

if TYPE_CHECKING:
    import torch
    from safetensors import safe_open
    from transformers import Emu3ForCausalLM, Emu3TextConfig, Emu3VQVAE

VISION_TYPE = "emu3_vqgan"
"""`model_type` of a vision tokenizer."""
CODEBOOK_SIZE = 32768
"""Of a vision tokenizer whose configuration leaves it out: transformers' default, and Emu3's."""
INDEX = "model.safetensors.index.json"
_PREFIXES = {
    "text_model.lm_head.": "lm_head.",
    "text_model.model.": "model.",
    "model.text_model.": "model.",
    "vqmodel.": None,
    "model.vqmodel.": None,
}
"""Prefixes of weights in `Emu3ForConditionalGeneration`, and what `Emu3ForCausalLM` has instead; None: nothing."""


def text_weight_name(name: str) -> str | None:
    """Return the name in `Emu3ForCausalLM` of a weight of either format; None where it is not the text model's."""
    for prefix, replacement in _PREFIXES.items():
        if name.startswith(prefix):
            return None if replacement is None else replacement + name.removeprefix(prefix)
    return name


def text_config(folder: Path | str) -> "Emu3TextConfig":
    """Return the configuration of the text model in a policy folder of either format.

    Raises:
        EarlError: when the folder holds no Emu3.
    """
    from earl.emu3.models import Emu3TextConfig

    fields = config_fields(Path(folder))
    fields = dict(fields.get("text_config", fields))
    # Where the code of a repository lies, which nothing here may run, and which files transformers is to read.
    for foreign in ("auto_map", "transformers_weights"):
        fields.pop(foreign, None)
    config = Emu3TextConfig.from_dict(fields)
    config.architectures = ["Emu3ForCausalLM"]
    return config


def check_policy(folder: Path | str) -> Vocabulary:
    """Check all that can be wrong with a policy folder before an engine takes it; return its vocabulary.

    The files of a sealed folder are hashed. Who sealed it has found its weights finite; those of another folder are
    read for that. With an adapter, all of it is done for its base, too.

    Raises:
        EarlError: when the folder is missing, incomplete, or holds files that are not what its manifest says, weights
            that are not finite or not those that its configuration asks for, or a tokenizer that the model was not
            made for.
    """
    with reading_policy(folder) as vocabulary:
        base = adapter.base_of(folder)
        if not _is_sealed(base):
            _check_finite(base, ((text_weight_name(name), weight) for _, name, weight in weights(base)))
    return vocabulary


@contextmanager
def reading_policy(folder: Path | str, team: Ranks | None = None) -> Iterator[Vocabulary]:
    """Check a policy folder as `check_policy` does, its contents while the body reads them; yield its vocabulary.

    What is not looked at is whether the weights of a folder that nobody sealed are finite.

    Args:
        folder: The folder.
        team: The ranks that read it together; each hashes its share of the files.

    Raises:
        EarlError: see `check_policy`.
    """
    share = {"rank": team.rank, "ranks": team.size} if team else {}
    with ExitStack() as stack:
        if adapter.is_adapter(folder):
            base = adapter.base_of(folder)
            stack.enter_context(reading_policy(base, team))
            if not _is_sealed(base):
                adapter.check_base(folder)
        stack.enter_context(manifest.reading(check_files(folder), **share))
        vocabulary = check_identity(folder)
        _check_shapes(Path(folder), text_config(folder))
        yield vocabulary


def _is_sealed(folder: Path | str) -> bool:
    return (Path(folder) / manifest.NAME).is_file()


def _check_finite(folder: Path | str, named: "Iterable[tuple[str | None, torch.Tensor]]") -> None:
    """Look for NaN and infinity in weights, which have the names of `Emu3ForCausalLM`; None: none of its own."""
    for name, weight in named:
        if name is not None and not tensors.is_finite(weight):
            [file] = [path for path in _weight_files(Path(folder)) if name in map(text_weight_name, _shapes(path))]
            raise EarlError(f"{file}: weight {name!r} is not finite; go back to an earlier checkpoint")


def check_identity(folder: Path | str) -> Vocabulary:
    """Check what a policy folder says that it is, without reading weights; return its vocabulary.

    Raises:
        EarlError: when the folder is missing or incomplete, holds no Emu3 policy, or a tokenizer that the model was
            not made for.
    """
    folder = check_files(folder)
    fields = config_fields(folder)
    if fields["model_type"] == VISION_TYPE:
        raise EarlError(f"{folder}: is a vision tokenizer (model_type {VISION_TYPE!r}); give the folder of a policy")
    vocabulary = Vocabulary.from_folder(folder)
    _check_ids(folder, fields, vocabulary)
    return vocabulary


def load_policy(
    folder: Path | str, dtype: "torch.dtype", device: "torch.device | str", lora: adapter.Lora | None = None
) -> "Emu3ForCausalLM":
    """Return the policy of a folder, in evaluation mode; an adapter is not merged with its base.

    Args:
        lora: Give a policy of full weights an adapter of zeros.

    Raises:
        EarlError: see `check_policy`.
    """
    from earl.emu3.models import Emu3ForCausalLM

    renamed = {f"^{prefix}": replacement for prefix, replacement in _PREFIXES.items() if replacement is not None}
    with reading_policy(folder):
        base, config = adapter.base_of(folder), text_config(folder)
        try:
            model = Emu3ForCausalLM.from_pretrained(
                base, config=config, dtype=dtype, key_mapping=renamed, local_files_only=True, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            raise EarlError(f"{base}: does not load as Emu3ForCausalLM ({error})") from error
        lora = adapter.settings(folder) or lora
        if lora is not None:
            adapter.add(model, lora)
        if adapter.is_adapter(folder):
            read_adapter(folder, model)
        model = model.to(device).eval()
    if not _is_sealed(base):
        _check_finite(base, adapter.base_weights(model).items())
    return model


def read_adapter(folder: Path | str, model: "Emu3ForCausalLM") -> None:
    """Fill the adapter of a model, which may be split over ranks, from a policy folder.

    Raises:
        EarlError: see `check_policy`; the base is not read here.
    """
    with manifest.reading(check_files(folder)):
        _check_shapes(Path(folder), text_config(folder))
        adapter.fill(model, ((name, weight) for _, name, weight in weights(folder)))


def read_weights(folder: Path | str, weights: "dict[str, torch.Tensor]", team: Ranks) -> None:
    """Fill the weights of an `Emu3ForCausalLM` by name from a policy folder.

    Of weights that are split over ranks, all of which must call this, each reads its own part alone.

    Raises:
        EarlError: see `check_policy`.
    """
    import torch.distributed.checkpoint as dcp

    with reading_policy(folder, team):
        stored = {text_weight_name(name): name for path in _weight_files(Path(folder)) for name in _shapes(path)}
        wanted = {stored[name]: weight for name, weight in weights.items()}
        reader = dcp.HuggingFaceStorageReader(str(folder))
        dcp.load(wanted, storage_reader=reader, no_dist=not team.splits, process_group=team.group)
    if not _is_sealed(folder):
        _check_finite(folder, ((name, tensors.own_part(weight)) for name, weight in weights.items()))


def load_vision_tokenizer(folder: Path | str, device: "torch.device | str") -> "Emu3VQVAE":
    """Return the vision tokenizer of a folder in float32 and evaluation mode.

    Raises:
        EarlError: when the folder is missing, does not load, or holds files that are not what its manifest says.
    """
    folder = check_files(folder)
    with manifest.reading(folder):
        return _read_vision_tokenizer(folder, device)


def check_vision_tokenizer(folder: Path | str) -> int:
    """Check that a folder says it is a vision tokenizer; return the size of its codebook.

    Raises:
        EarlError: when it is missing or is none.
    """
    fields = config_fields(check_files(folder))
    if fields["model_type"] != VISION_TYPE:
        raise EarlError(
            f"{folder}: is of model_type {fields['model_type']!r}, no Emu3VQVAE; `earl convert model` makes one from a "
            "published checkpoint"
        )
    return fields.get("codebook_size", CODEBOOK_SIZE)


def _read_vision_tokenizer(folder: Path, device: "torch.device | str") -> "Emu3VQVAE":
    import torch

    from earl.emu3.models import Emu3VQVAE

    check_vision_tokenizer(folder)
    try:
        model, found = Emu3VQVAE.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise EarlError(f"{folder}: does not load as Emu3VQVAE ({error})") from error
    # The library would give what is missing random values.
    if found["missing_keys"]:
        raise EarlError(f"{folder}: weight {min(found['missing_keys'])!r} is missing; copy the checkpoint again")
    return model.to(device).eval()


def weights(folder: Path | str) -> Iterator[tuple[Path, str, "torch.Tensor"]]:
    """Yield every weight of a checkpoint, one after the other: its file, its name, and itself.

    Raises:
        EarlError: when there are no safetensors, or a file is missing or damaged.
    """
    for path in _weight_files(Path(folder)):
        for name, weight in _tensors(path):
            yield path, name, weight


def check_files(folder: Path | str) -> Path:
    """Check that a checkpoint's files are there, as far as names and sizes tell; return its folder."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise EarlError(f"{folder}: holds no config.json; give the folder of a checkpoint")
    remedies.refuse_pointers(folder)
    if (folder / manifest.NAME).is_file():
        manifest.check(folder)
    return folder


def config_fields(folder: Path) -> dict:
    """Return the fields of a checkpoint's ``config.json``, of whatever Emu3 it holds.

    Raises:
        EarlError: when it cannot be read or is of another model.
    """
    path = folder / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EarlError(f"{path}: cannot be read ({error}); give the folder of a checkpoint") from error
    if not str(fields.get("model_type")).lower().startswith("emu3"):
        raise EarlError(f"{path}: model_type is {fields.get('model_type')!r}; it must be an Emu3")
    return fields


def _check_ids(folder: Path, fields: dict, vocabulary: Vocabulary) -> None:
    """Compare the ids that a policy's configuration mentions with those of the tokenizer beside it."""
    remedy = "use the tokenizer that the model was trained with"
    text = fields.get("text_config", fields)
    size = text.get("vocab_size", 0)
    if size < vocabulary.size:
        raise EarlError(f"{folder}: the model has {size} ids but its tokenizer {vocabulary.size}; {remedy}")
    for role in ("pad", "bos", "eos"):
        found, expected = text.get(f"{role}_token_id"), getattr(vocabulary, role)
        if expected not in (found if isinstance(found, list) else [expected if found is None else found]):
            raise EarlError(
                f"{folder}: {role}_token_id is {found} in config.json but {expected} in tokenizer.json; {remedy}"
            )
    for name, found in (fields.get("vocabulary_map") or {}).items():
        if name == visual_token(0) and found != vocabulary.first_visual:
            raise EarlError(
                f"{folder}: {name} is {found} in config.json's vocabulary_map but {vocabulary.first_visual} in "
                f"tokenizer.json; {remedy}"
            )


def _check_shapes(folder: Path, config: "Emu3TextConfig") -> None:
    """Compare names and shapes of the weights, from the headers of the files, with what the configuration asks for."""
    import torch

    from earl.emu3.models import Emu3ForCausalLM

    lora = adapter.settings(folder)
    with torch.device("meta"):
        model = Emu3ForCausalLM(config)
        if lora is not None:
            adapter.add(model, lora)
    wanted = {name: list(weight.shape) for name, weight in (adapter.weights(model) or model.state_dict()).items()}
    if config.tie_word_embeddings and lora is None:
        del wanted["lm_head.weight"]
    for path in _weight_files(folder):
        for name, found in _shapes(path).items():
            shape = wanted.pop(text_weight_name(name), found)
            if shape != found:
                raise EarlError(
                    f"{path}: weight {name!r} has shape {found} where {folder / 'config.json'} asks for {shape}; copy "
                    "the checkpoint again"
                )
    if wanted:
        raise EarlError(
            f"{folder}: weight {min(wanted)!r} is missing, {len(wanted)} of them in all; copy the checkpoint again"
        )


def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a policy, all of which exist."""
    index = folder / INDEX
    names = {adapter.WEIGHTS if adapter.is_adapter(folder) else "model.safetensors"}
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise EarlError(f"{index}: is damaged ({error!r}); copy the checkpoint again") from error
    for name in sorted(names):
        if not (folder / name).is_file():
            raise EarlError(f"{folder / name}: is missing, so the policy is incomplete; copy the checkpoint again")
    return [folder / name for name in sorted(names)]


@contextmanager
def _opened(path: Path) -> Iterator["safe_open"]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise EarlError(f"{path}: does not load ({error}); copy the checkpoint again") from error


def _shapes(path: Path) -> dict[str, list[int]]:
    with _opened(path) as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  (not a dictionary)


def _tensors(path: Path) -> Iterator[tuple[str, "torch.Tensor"]]:
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118  (not a dictionary)
            yield name, file.get_tensor(name)
