"""PNG files and ICC profiles written from their definitions, so that tests know every sample and what it means."""

import struct
import zlib

import numpy as np

GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6
"""Colour types of PNG."""
CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGB_ALPHA: 4}

D50 = (0.9642, 1.0, 0.8249)
SRGB = ((0.43607, 0.38515, 0.14307), (0.22249, 0.71687, 0.06061), (0.01392, 0.09708, 0.71410))
"""XYZ under D50 of red, green and blue, as columns."""
DISPLAY_P3 = ((0.51512, 0.29198, 0.15710), (0.24120, 0.69225, 0.06657), (-0.00105, 0.04189, 0.78407))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    samples: np.ndarray,
    depth: int,
    colour: int,
    palette: np.ndarray | None = None,
    transparency: bytes | None = None,
    profile: bytes | None = None,
    before: bytes = b"",
) -> bytes:
    """Return a PNG of samples [height, width, channels] as they are stored, 0..2**depth-1."""
    height, width, _ = samples.shape
    rows = samples.reshape(height, -1)
    if depth == 16:
        packed = rows.astype(">u2").view(np.uint8)
    else:
        bits = (rows[..., None].astype(np.uint8) >> np.arange(depth - 1, -1, -1, dtype=np.uint8)) & 1
        packed = np.packbits(bits.reshape(height, -1), axis=1)
    # Each row is the difference to the one above (filter 2), so that a reader has to undo something.
    above = np.vstack([np.zeros_like(packed[:1]), packed[:-1]])
    data = b"".join(b"\x02" + row.tobytes() for row in packed - above)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
        + (chunk(b"iCCP", b"profile\0\0" + zlib.compress(profile)) if profile is not None else b"")
        + (chunk(b"PLTE", palette.astype(np.uint8).tobytes()) if palette is not None else b"")
        + (chunk(b"tRNS", transparency) if transparency is not None else b"")
        + before
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )


def tiff(
    samples: np.ndarray,
    photometric: int,
    order: str = "<",
    bits: int | None = None,
    compressed: bool = False,
    profile: bytes | None = None,
    **tags: int,
) -> bytes:
    """Return a TIFF of one strip; samples [height, width, channels] as they are stored.

    Args:
        samples: uint8 or uint16; of 12 bits an even number in a row.
        photometric: 0 white is 0, 1 black is 0, 2 RGB, 5 CMYK.
        order: ``<`` little-endian, ``>`` big-endian.
        bits: Of a sample; by default those of its type.
        compressed: With zlib, which Pillow leaves to libtiff.
        profile: An ICC profile.
        tags: ``extra`` samples and ``format`` of samples.
    """
    height, width, channels = samples.shape
    bits = bits or samples.dtype.itemsize * 8
    if bits == 12:
        wide = (samples.reshape(-1, 1) >> np.arange(11, -1, -1, dtype=np.uint16)) & 1
        data = np.packbits(wide.astype(np.uint8).reshape(-1)).tobytes()
    else:
        data = samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    data = zlib.compress(data) if compressed else data
    entries = [
        (256, 3, [width]), (257, 3, [height]), (258, 3, [bits] * channels), (259, 3, [8 if compressed else 1]),
        (262, 3, [photometric]),
        (273, 4, [8]), (277, 3, [channels]), (278, 3, [height]), (279, 4, [len(data)]),
    ]  # fmt: skip
    entries += [(338, 3, [tags["extra"]])] if "extra" in tags else []
    entries += [(339, 3, [tags["format"]] * channels)] if "format" in tags else []
    entries += [(34675, 7, list(profile))] if profile is not None else []
    start = 8 + len(data) + len(data) % 2
    beyond = start + 2 + 12 * len(entries) + 4
    listing, behind = b"", b""
    for tag, kind, values in entries:
        value = struct.pack(order + str(len(values)) + {3: "H", 4: "I", 7: "B"}[kind], *values)
        if len(value) > 4:
            value, behind = struct.pack(f"{order}I", beyond + len(behind)), behind + value
        listing += struct.pack(f"{order}HHI", tag, kind, len(values)) + value.ljust(4, b"\0")
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, start)
    body = data + b"\0" * (len(data) % 2)
    return head + body + struct.pack(f"{order}H", len(entries)) + listing + b"\0" * 4 + behind


def profile(gamma: float, primaries: tuple | None) -> bytes:
    """Return an ICC profile, version 2, of a pure gamma: RGB with these primaries, or grey without."""

    def fixed(*values: float) -> bytes:
        return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    tags = {b"wtpt": b"XYZ " + bytes(4) + fixed(*D50)}
    if primaries is None:
        tags[b"kTRC"] = curve
    else:
        for name, column in zip(b"rgb", np.array(primaries).T, strict=True):
            tags[bytes([name]) + b"XYZ"] = b"XYZ " + bytes(4) + fixed(*column)
            tags[bytes([name]) + b"TRC"] = curve
    return _profile(b"GRAY" if primaries is None else b"RGB ", b"mntr", b"XYZ ", tags)


def cmyk_profile(corners: np.ndarray) -> bytes:
    """Return an ICC profile of a printer whose colours are interpolated between the corners of its inks.

    Args:
        corners: Lab [2, 2, 2, 2, 3], by cyan, magenta, yellow and black, each 0 or full.
    """
    low, high = np.array([0, -128, -128]), np.array([100, 127, 127])
    table = ((corners.reshape(-1, 3) - low) / (high - low) * 255).round().astype(np.uint8)
    identity = np.eye(3)
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + struct.pack(">9i", *(identity * 65536).astype(int).ravel())
    straight = bytes(range(256))
    lut += straight * 4 + table.tobytes() + straight * 3
    return _profile(b"CMYK", b"prtr", b"Lab ", {b"A2B0": lut, b"A2B1": lut})


def _profile(space: bytes, kind: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    listing, data = struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        listing += name + struct.pack(">II", 128 + 4 + 12 * len(tags) + len(data), len(value))
        data += value + bytes(-len(value) % 4)
    size = struct.pack(">I", 128 + len(listing) + len(data))
    white = struct.pack(">3i", *(round(value * 65536) for value in D50))
    head = size + bytes(4) + b"\x02\x40\0\0" + kind + space + connection + bytes(12) + b"acsp" + bytes(28) + white
    return head.ljust(128, b"\0") + listing + data


def in_srgb(linear: np.ndarray, primaries: tuple | None) -> np.ndarray:
    """Return sRGB 0..255, not rounded, of linear light [..., 3] of other primaries, or of grey [..., 1]."""
    if primaries is None:
        light = np.repeat(linear, 3, axis=-1)
    else:
        light = linear @ (np.linalg.inv(np.array(SRGB)) @ np.array(primaries)).T
    light = light.clip(0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
