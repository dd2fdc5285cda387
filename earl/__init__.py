"""EARL: reinforcement learning for autoregressive image editing, as a pipeline of file-level stages."""

import hashlib
from functools import cache
from pathlib import Path

__version__ = "0.1.0"


@cache
def code_version() -> str:
    """Return ``"<version>+<12 hex digits>"``; the digits are a SHA-256 over the package's Python sources.

    Every file a stage writes carries it, so that results of different code can be told apart.
    """
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for source in sorted(root.rglob("*.py")):
        digest.update(source.relative_to(root).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(source.read_bytes()).digest())
    return f"{__version__}+{digest.hexdigest()[:12]}"
