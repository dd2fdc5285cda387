"""The images that a model judge shows, as PNG: each distinct one is resized and encoded once, and kept once."""

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from earl.files import images
from earl.judges import chat

if TYPE_CHECKING:
    from collections.abc import Hashable


class Pictures:
    """The images of one call; originals are shown with every edit of theirs, edits by several rubrics.

    Args:
        longest: Pixels of the longer side that images are resized to; None: they stay as they are.
    """

    def __init__(self, longest: int | None) -> None:
        self._longest = longest
        self._digests: dict[Hashable, str] = {}
        self._urls: dict[str, str] = {}

    def digest(self, pixels: np.ndarray) -> str:
        """Return the SHA-256 of the PNG of an image, uint8 [height, width, 3]."""
        key = (pixels.shape, hashlib.sha256(np.ascontiguousarray(pixels)).digest())
        if key not in self._digests:
            png = images.encode(pixels if self._longest is None else images.resize(pixels, self._longest))
            self._digests[key] = digest = hashlib.sha256(png).hexdigest()
            self._urls.setdefault(digest, chat.data_url(png))
        return self._digests[key]

    def url(self, digest: str) -> str:
        """Return the data URL of an image by its digest."""
        return self._urls[digest]
