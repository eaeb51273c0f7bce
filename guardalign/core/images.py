"""Bytes <-> pictures: a guarded decode to upright 8-bit RGB, thumbnails, lossless hand-over.

What leaves `decode` is what every model of the audit sees, so each choice that loses something stands here:

- **Formats** are a closed list (`FORMATS`), told apart by their first bytes, never by a name.
- **Orientation** (EXIF, XMP, AVIF's own) is applied and dropped: nothing can turn the picture a second time.
- **Transparency** (alpha, palette, colour key) is laid on white.
- **Depth**: 16-bit grey is scaled, 32-bit and floating grey stretched (`_stretched`), never clipped.
- **Colour profiles** are ignored, as the loaders of CLIP and of the LVLMs ignore them; CMYK is converted plainly.
- **Frames**: of an animation or a document of several pages the first one is audited, and `num_frames` tells.

A truncated file is an error: half a picture must not pass as audited. Knows nothing of patches, models or files.
"""

from __future__ import annotations

import ctypes
import logging
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import IO, Final

import numpy as np
from PIL import Image, ImageCms, _imaging

from guardalign.errors import RowError

FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""Formats that are read (AVIF where Pillow has it); JPEG includes the multi-picture variant MPO."""

REFUSED: Final[dict[bytes, str]] = {
    b"<svg": "an SVG drawing",
    b"<?xml": "an XML document",
    b"<!DOCTYPE": "an HTML or XML document",
    b"<html": "an HTML document",
    b"%!PS": "a PostScript document",
    b"\xc5\xd0\xd3\xc6": "a PostScript document",
    b"%PDF": "a PDF document",
    b"8BPS": "a Photoshop document",
    b"\x00\x00\x01\x00": "an icon",
    b"\xff\x4f\xff\x51": "a JPEG 2000 picture",
    b"\x00\x00\x00\x0cjP": "a JPEG 2000 picture",
    b"\xff\x0a": "a JPEG XL picture",
    b"\x00\x00\x00\x0cJXL": "a JPEG XL picture",
    b"version https://git-lfs": "a Git LFS pointer",
}
"""First bytes of common things that are not read, for the error's sentence."""

TOO_LARGE: Final = (Image.DecompressionBombError, MemoryError)
"""What Pillow raises on a picture that does not fit."""

BROKEN: Final = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    EOFError,
    OverflowError,
    ZeroDivisionError,
    RuntimeError,
    AssertionError,
    struct.error,
    zlib.error,
)
"""What Pillow raises on broken bytes.

Seen under 400,000 mutated files of all formats, and under senseless fields behind sound checksums (Pillow 13.0):
OSError, SyntaxError, ValueError, TypeError, IndexError, RuntimeError, and AssertionError (a palette picture without its
palette); the others stand in its plugins' own except clauses, or come from arithmetic on header fields.
"""

TRANSPOSES: Final[dict[int, Image.Transpose]] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what sets the picture upright; 1, absent or senseless means as it is."""

ORIENTATION: Final = 0x0112
MOST_PAGES: Final = 1000
"""Pages of a TIFF that are counted; the rest would cost a hostile file's reader minutes."""
TIFF_TILE: Final = (0x0142, 0x0143)

Opener = tuple[Callable[[IO[bytes], str | bytes], Image.Image], Callable[[bytes], bool | str] | None]
"""What opens a format, and what tells it by its first bytes."""

Image.init()  # every plugin now, in one thread: Pillow loads them lazily otherwise
warnings.filterwarnings("ignore", module=r"PIL\.")  # of broken EXIF blocks and the like; rows tell what matters
logging.getLogger("PIL").setLevel(logging.CRITICAL)  # likewise
OPENERS: Final[dict[str, Opener]] = {name: Image.OPEN[name] for name in FORMATS if name in Image.OPEN}


def _silence_libtiff() -> None:
    """libtiff writes a line to stderr for every broken file; Pillow silences its warnings, not its errors."""
    try:
        ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)
    except (OSError, AttributeError):  # this Pillow holds libtiff in another way, or not at all
        return


_silence_libtiff()


@dataclass(frozen=True)
class Decoded:
    """A picture as the models see it, with what its file said of itself."""

    picture: Image.Image
    """upright, RGB, 8 bit, without metadata; perhaps smaller than the original (`at_least`)"""
    width: int
    """of the original, upright [px]"""
    height: int
    """of the original, upright [px]"""
    num_frames: int
    """frames or pages in the file (of a TIFF at most `MOST_PAGES` are counted); the first is `picture`"""


def decode(encoded: bytes, max_pixels: int, sample_id: str, at_least: int | None = None) -> Decoded:
    """Decode one picture, or raise `RowError` ("image_unreadable", "image_too_large") naming the sample.

    `max_pixels` [px] is held against the header, before any pixel is decoded. With `at_least` [px], a JPEG may be
    decoded at 1/2, 1/4 or 1/8 of its size as long as both sides stay that long: several times faster.

    Safe in threads, and of Pillow's process-wide limits the pixel limit is not in the way: its own bomb check,
    which stands in `Image.open`, is passed by (it still binds WebP, and GIF frames, at 179 megapixels).
    """
    name = _format(encoded)
    if name is None:
        readable = ", ".join(OPENERS)
        message = f"the picture of sample {sample_id} is {_what(encoded)}; readable are {readable}"
        raise RowError("image_unreadable", message)
    try:
        with OPENERS[name][0](BytesIO(encoded), "") as opened:
            _require_pixels(opened, max_pixels, sample_id)
            return _decoded(opened, at_least)
    except TOO_LARGE as error:
        message = f"the picture of sample {sample_id} is too large for its {name} decoder ({type(error).__name__})"
        raise RowError("image_too_large", message) from error
    except BROKEN as error:
        message = f"the picture of sample {sample_id} is a broken {name} file ({type(error).__name__})"
        raise RowError("image_unreadable", message) from error


def _require_pixels(opened: Image.Image, max_pixels: int, sample_id: str) -> None:
    """Neither the picture nor, in a TIFF, one of the tiles that are decoded whole may have more pixels."""
    for of_what, (width, height) in (("", opened.size), (" a tile of", _tile(opened))):
        if width * height > max_pixels:
            has = f"has{of_what} {width} x {height} pixels; at most {max_pixels} are read"
            raise RowError("image_too_large", f"the picture of sample {sample_id} {has}")


def _tile(opened: Image.Image) -> tuple[int, int]:
    """Width, height [px] of a TIFF's tiles, which may be larger than the picture; 0, 0 for all else."""
    tags = getattr(opened, "tag_v2", {})
    width, height = tags.get(TIFF_TILE[0]), tags.get(TIFF_TILE[1])
    return (width, height) if isinstance(width, int) and isinstance(height, int) else (0, 0)


def _format(encoded: bytes) -> str | None:
    prefix = encoded[:16]
    for name, (_, accepts) in OPENERS.items():
        if accepts is not None and accepts(prefix) is True:
            return name
    return None


def _what(encoded: bytes) -> str:
    if not encoded:
        return "empty (zero bytes)"
    start = encoded[:64].lstrip(b"\xef\xbb\xbf \t\r\n")
    return next((what for magic, what in REFUSED.items() if start.startswith(magic)), "of no known format")


def _decoded(opened: Image.Image, at_least: int | None) -> Decoded:
    width, height = opened.size
    num_frames = _num_frames(opened)
    if at_least is not None:
        opened.draft(None, (at_least, at_least))
    opened.load()
    orientation = _orientation(opened)
    picture = _rgb(opened)
    if orientation in TRANSPOSES:
        picture = picture.transpose(TRANSPOSES[orientation])
    if orientation >= 5:
        width, height = height, width
    picture.info = {}
    return Decoded(picture, width, height, num_frames)


def _num_frames(opened: Image.Image) -> int:
    """Frames or pages; a TIFF's up to `MOST_PAGES`, since Pillow takes longer for each page than for the one before."""
    if opened.format != "TIFF":
        return int(getattr(opened, "n_frames", 1))
    pages = 1
    try:
        while pages < MOST_PAGES:
            opened.seek(pages)
            pages += 1
    except EOFError:
        pass
    opened.seek(0)
    return pages


def _orientation(loaded: Image.Image) -> int:
    """1 to 8, read after loading: Pillow turns TIFF itself and clears the tag. A broken EXIF block says nothing."""
    try:
        value = loaded.getexif().get(ORIENTATION, 1)
    except BROKEN:
        return 1
    return value if isinstance(value, int) and value in TRANSPOSES else 1


def _rgb(loaded: Image.Image) -> Image.Image:
    """A new 8-bit RGB picture; see the file's docstring for what happens to depth and transparency."""
    if loaded.mode.startswith("I;16"):
        return _scaled(loaded).convert("RGB")
    if loaded.mode in ("I", "F"):
        return _stretched(loaded).convert("RGB")
    if loaded.mode == "LAB":
        return _from_lab(loaded)
    if loaded.has_transparency_data:
        return _on_white(loaded.convert("RGBA"))
    return loaded.convert("RGB")


def _scaled(grey: Image.Image) -> Image.Image:
    """16 bit to 8 bit, round(v · 255 / 65535): white stays white, where Pillow's own conversion clips."""
    values = np.asarray(grey).astype(np.uint32)
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def _stretched(grey: Image.Image) -> Image.Image:
    """32-bit or floating grey to 8 bit: black = min(0, lowest), white = the first of 1 (floats), 255, 65535, highest.

    Such files carry no white point; not-a-number is black.
    """
    values = np.nan_to_num(np.asarray(grey), nan=0.0).astype(np.float64)
    black, highest = min(0.0, float(values.min())), float(values.max())
    steps = (1.0, 255.0, 65535.0) if grey.mode == "F" else (255.0, 65535.0)
    white = next((step for step in steps if highest <= step), highest)
    return Image.fromarray(np.rint((values - black) / (white - black) * 255).astype(np.uint8))


def _from_lab(lab: Image.Image) -> Image.Image:
    profiles = (ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"))
    converted = ImageCms.profileToProfile(lab, *profiles, outputMode="RGB")
    assert converted is not None  # it is None in place only
    return converted


def _on_white(rgba: Image.Image) -> Image.Image:
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def thumbnail(picture: Image.Image, size: int) -> bytes:
    """A JPEG whose longest side is at most `size` [px]; never enlarged."""
    small = picture.copy()
    small.thumbnail((size, size))
    buffer = BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def encode_png(picture: Image.Image) -> bytes:
    """The picture without loss, written fast: how a sanitized picture travels on."""
    buffer = BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
