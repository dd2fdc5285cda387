"""Emu3's tokenizer from the vocabulary files that BAAI publishes, which are data: no code of the repository runs.

::

    emu3.tiktoken             a token's bytes in base64 and its rank, one a line; the rank is its id
    emu3_vision_tokens.txt    one special token a line: <|image token|>, <|image start|>, ..., the visual tokens

Ids go on from the last rank: <|endoftext|>, <|im_start|>, <|im_end|>, <|extra_0|> .. <|extra_204|>, then the lines of
the second file. With the 151,643 ranks of the published file this gives the ids that BAAI/Emu3 was trained with.
"""

import base64
import binascii
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from earl.messages.errors import EarlError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

RANKS = "emu3.tiktoken"
SPECIAL = "emu3_vision_tokens.txt"
_FIRST_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{index}|>" for index in range(205)))
# How the published tokenizer cuts text into words; digits stand alone.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def is_here(folder: Path) -> bool:
    """Return whether a folder holds the vocabulary files."""
    return (folder / RANKS).is_file()


def build_tokenizer(folder: Path) -> "Tokenizer":
    """Return the tokenizer that the vocabulary files of a folder describe.

    Raises:
        EarlError: naming file and line, when one of them is missing or damaged, or ranks are not 0, 1, 2, ...
    """
    from tokenizers import normalizers
    from transformers.convert_slow_tokenizer import TikTokenConverter

    ranks = _ranks(folder / RANKS)
    names = [*_FIRST_SPECIAL, *(line.strip() for line in _lines(folder / SPECIAL) if line.strip())]
    (commonest, times), *_ = Counter(names).most_common(1)
    if times > 1:
        raise EarlError(f"{folder / SPECIAL}: names {commonest!r} twice; download it again")

    class Converter(TikTokenConverter):
        """Takes the ranks that were read here: the library's own reader needs tiktoken and names no line."""

        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            return ranks

    tokenizer = Converter(folder / RANKS, pattern=_WORDS, extra_special_tokens=names).converted()
    # The published tokenizer composes characters before it cuts.
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise EarlError(f"{path}: line {number} is no token in base64 and a rank; download it again") from error
    if not ranks or sorted(ranks.values()) != list(range(len(ranks))):
        raise EarlError(f"{path}: its ranks are not 0, 1, 2, ..., each once; download it again")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise EarlError(f"{path}: has no token for byte {missing[0]}; download it again")
    return ranks


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EarlError(f"{path}: cannot be read ({error}); it belongs beside {RANKS}") from error
