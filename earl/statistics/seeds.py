"""Counter-based randomness: a seed is a hash of where a draw stands, never of how many came before it.

The parts name the place, for example ``("rollout", run_seed, iteration, prompt, sample)``. So resuming replays
nothing, and neither shards nor the order of requests change a draw.
"""

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def _digest(parts: tuple[int | str, ...], size: int) -> int:
    # repr tells 1 from "1", and the separator keeps ("a", "b") apart from ("ab",).
    text = "\x1f".join(repr(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=size).digest(), "little")


def seed(*parts: int | str) -> int:
    """Return a seed in 0..2**63 - 1 (fits a signed 64-bit integer, as engines want it)."""
    return _digest(parts, 8) >> 1


def generator(*parts: int | str) -> "np.random.Generator":
    """Return a Philox generator keyed by the 128-bit hash of ``parts``."""
    import numpy as np

    return np.random.Generator(np.random.Philox(key=_digest(parts, 16)))
