"""Images as ``{bytes, path}`` structs of lossless PNG, and as uint8 arrays [height, width, 3]."""

import io

import numpy as np
from PIL import Image

from earl.data import pictures
from earl.messages.errors import EarlError


def encode(pixels: np.ndarray) -> bytes:
    """Return the PNG bytes of a uint8 array [height, width, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels, mode="RGB").save(buffer, format="PNG")
    return buffer.getvalue()


def resize(pixels: np.ndarray, longest: int) -> np.ndarray:
    """Return an image whose longer side has ``longest`` pixels, its shape kept as nearly as whole pixels allow."""
    height, width = pixels.shape[:2]
    scale = longest / max(height, width)
    if scale == 1:
        return pixels
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(pixels, mode="RGB").resize(size, Image.Resampling.LANCZOS))


def struct(data: bytes | None, name: str = "") -> dict[str, bytes | str] | None:
    """Return the value of an image column, or None for no image."""
    return None if data is None else {"bytes": data, "path": name}


def decode(data: bytes | None, where: str) -> np.ndarray:
    """Return the pixels, uint8 [height, width, 3], of an encoded image: as `earl.data.pictures.read`, of any size.

    Raises:
        EarlError: naming ``where`` the image stands, when there is none or it cannot be used.
    """
    try:
        return pictures.read(data, smallest=1)
    except pictures.Rejected as problem:
        reason = str(problem).removeprefix("does not decode: ")
        raise EarlError(f"{where}: the image does not decode ({reason}); replace it or remove its row") from problem


class Decoder:
    """Decodes images, each distinct one once: a group shares its original and target. Pixels are not to be altered."""

    def __init__(self) -> None:
        self._pixels: dict[bytes | None, np.ndarray] = {}

    def __call__(self, data: bytes | None, where: str) -> np.ndarray:
        """Return the pixels of an encoded image: see `decode`."""
        if data not in self._pixels:
            self._pixels[data] = decode(data, where)
        return self._pixels[data]
