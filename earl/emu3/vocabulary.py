"""The vocabulary: text ids, special ids and the block of visual ids, resolved from the tokenizer."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from earl.files import manifest, remedies
from earl.messages.errors import EarlError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Names in Emu3's tokenizer of the roles in the image grammar.
ROLES = {
    "pad": "<|endoftext|>",
    "bos": "<|extra_203|>",
    "eos": "<|extra_204|>",
    "boi": "<|image start|>",
    "img": "<|image token|>",
    "eoi": "<|image end|>",
    "eol": "<|extra_200|>",
    "eof": "<|extra_201|>",
}


def visual_token(index: int) -> str:
    """Return the name of visual token ``index`` (a codebook index)."""
    return f"<|visual token {index:06d}|>"


@dataclass(frozen=True)
class Vocabulary:
    """Token ids by role. Text ids lie below ``first_visual``; visual token ``i`` is ``first_visual + i``."""

    text: "Tokenizer"
    pad: int
    bos: int
    eos: int
    boi: int
    img: int
    eoi: int
    eol: int
    eof: int
    first_visual: int
    num_visual: int
    digest: str
    """SHA-256 of ``tokenizer.json``, in hexadecimal."""

    @classmethod
    def from_folder(cls, folder: Path | str) -> "Vocabulary":
        """Read ``tokenizer.json`` of a policy or tokenizer folder; a process parses the same content once.

        Raises:
            EarlError: when the folder or the file is missing or damaged, a role's token is unknown, or the visual ids
                are not one block that ends the vocabulary.
        """
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            remedies.check_policy_folder(path.parent)
            raise EarlError(
                f"{path}: does not exist; the folder needs the tokenizer of its policy beside the weights. A published "
                "checkpoint gets one by `earl convert model`"
            )
        with manifest.reading(path.parent, [path.name]):
            content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if digest not in _parsed:
            _parsed[digest] = cls._from_tokenizer(_tokenizer(content, path), path, digest)
        return _parsed[digest]

    @classmethod
    def _from_tokenizer(cls, tokenizer: "Tokenizer", path: Path, digest: str) -> "Vocabulary":
        roles = {role: tokenizer.token_to_id(name) for role, name in ROLES.items()}
        for role, token_id in roles.items():
            if token_id is None:
                raise EarlError(f"{path}: has no token {ROLES[role]!r} ({role}); it is not an Emu3 tokenizer")
        # Some libraries write visual tokens as ordinary ones, which `encode_plain` would take for what they say.
        added = tokenizer.get_added_tokens_decoder().values()
        tokenizer.add_special_tokens([one for one in added if not one.special and one.content.startswith("<|")])
        first, count = _visual_block(tokenizer, path)
        if max(roles.values()) >= first:
            raise EarlError(f"{path}: a special token's id lies among the visual ids, which start at {first}")
        return cls(text=tokenizer, first_visual=first, num_visual=count, digest=digest, **roles)

    @property
    def size(self) -> int:
        """Number of ids: text and visual."""
        return self.first_visual + self.num_visual

    def encode(self, text: str) -> list[int]:
        """Return the ids of a template text; special tokens written in it are recognised, none are added."""
        return self.text.encode(text, add_special_tokens=False).ids

    def encode_plain(self, text: str) -> list[int]:
        """Return the ids of a user's text: what looks like a special token in it stays ordinary text."""
        self.text.encode_special_tokens = True
        try:
            return self.encode(text)
        finally:
            self.text.encode_special_tokens = False

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens included."""
        return self.text.decode(list(token_ids), skip_special_tokens=False)


_parsed: dict[str, Vocabulary] = {}
"""By digest of ``tokenizer.json``: parsing Emu3's takes seconds, and every policy of a run has the same one."""


def _tokenizer(content: bytes, path: Path) -> "Tokenizer":
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_buffer(content)
    except Exception as error:  # the library has no narrower class
        raise EarlError(f"{path}: does not load ({error}); copy the tokenizer again") from error


def write_tokenizer(tokenizer: "Tokenizer", folder: Path, longest: int) -> None:
    """Write ``tokenizer.json``, and ``tokenizer_config.json`` with which transformers and vLLM load it.

    Args:
        tokenizer: Holds the tokens of `ROLES`.
        folder: An existing folder.
        longest: Longest sequence of its model, in tokens.
    """
    settings = {f"{role}_token": ROLES[role] for role in ("pad", "bos", "eos")}
    settings |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": longest,
        "clean_up_tokenization_spaces": False,
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _visual_block(tokenizer: "Tokenizer", path: Path) -> tuple[int, int]:
    first = tokenizer.token_to_id(visual_token(0))
    if first is None:
        raise EarlError(f"{path}: has no token {visual_token(0)!r}; it is not an Emu3 tokenizer")
    count = tokenizer.get_vocab_size(with_added_tokens=True) - first
    last = tokenizer.token_to_id(visual_token(count - 1)) if count > 0 else None
    if last != first + count - 1:
        raise EarlError(
            f"{path}: the visual tokens must be one block of ids that ends the vocabulary; "
            f"{visual_token(0)!r} is {first}, and {visual_token(count - 1)!r} is {last}, not {first + count - 1}"
        )
    return first, count
