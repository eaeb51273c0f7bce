"""Hostile and odd pictures, all made by code: what each is called, its bytes, and how its row must end.

Nothing here is larger than some hundred kilobytes, whatever it claims or inflates to.
"""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageCms

Case = tuple[bytes, str | None]
"""Encoded bytes, and the error kind that the row must end with; None: it is answered."""
UNREADABLE, TOO_LARGE = "image_unreadable", "image_too_large"
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
GIB = 2**30
SCENE = Image.fromarray(np.random.default_rng(7).integers(0, 256, (24, 40, 3), np.uint8))


def encoded(picture: Image.Image, name: str, **options: Any) -> bytes:
    """The picture in the format."""
    out = BytesIO()
    picture.save(out, name, **options)
    return out.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    """One PNG chunk."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, pixels: bytes, depth: int = 8, colour: int = 2, more: bytes = b"") -> bytes:
    """A PNG of these fields; `pixels` is what stands in its IDAT, `more` are chunks before it."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return PNG_MAGIC + header + more + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def flood(num_bytes: int = GIB) -> bytes:
    """A zlib stream of a megabyte or so that inflates to so many zeros; made without inflating anything."""
    compressor = zlib.compressobj(9, wbits=-15)
    mebibyte = compressor.compress(bytes(2**20)) + compressor.flush(zlib.Z_FULL_FLUSH)
    checksum = struct.pack(">HH", num_bytes % 65521, 1)  # Adler-32 of zeros
    return b"\x78\xda" + mebibyte * (num_bytes // 2**20) + b"\x03\x00" + checksum


def small_png(more: bytes = b"") -> bytes:
    """A sound 2 x 2 PNG with chunks before its pixels."""
    return png(2, 2, zlib.compress(b"\x00" + bytes(6) + b"\x00" + bytes(6)), more=more)


def tiff(entries: dict[int, tuple[int, int, int]], pixels: bytes = b"", following: int = 0) -> bytes:
    """A little-endian TIFF: tag -> (type, count, value); pixels stand at byte 8; `following` is the next directory."""
    directory = 8 + len(pixels)
    fields = b"".join(struct.pack("<HHII", tag, *entry) for tag, entry in sorted(entries.items()))
    head = b"II*\x00" + struct.pack("<I", directory) + pixels
    return head + struct.pack("<H", len(entries)) + fields + struct.pack("<I", following)


def grey_tiff(
    width: int, height: int, pixels: bytes, compression: int = 1, tile: tuple[int, int] | None = None
) -> bytes:
    """A grey TIFF of one strip, or of one tile."""
    entries = {256: (4, 1, width), 257: (4, 1, height), 258: (3, 1, 8), 259: (3, 1, compression), 262: (3, 1, 1)}
    entries |= {277: (3, 1, 1)}
    if tile:
        entries |= {322: (4, 1, tile[0]), 323: (4, 1, tile[1])}
        entries |= {324: (4, 1, 8), 325: (4, 1, len(pixels))}
    else:
        entries |= {273: (4, 1, 8), 278: (4, 1, height), 279: (4, 1, len(pixels))}
    return tiff(entries, pixels)


def gif(screen: tuple[int, int], frame: tuple[int, int], frames: int = 1) -> bytes:
    """A two-colour GIF whose frames say they are of another size than its screen."""
    head = b"GIF89a" + struct.pack("<HH", *screen) + b"\x80\x00\x00" + b"\x00\x00\x00\xff\xff\xff"
    one = b"\x2c\x00\x00\x00\x00" + struct.pack("<HH", *frame) + b"\x00\x02\x02\x44\x01\x00"
    return head + one * frames + b"\x3b"


def jpeg_of(width: int, height: int) -> bytes:
    """A sound JPEG whose frame header was overwritten with another size."""
    whole = encoded(SCENE, "JPEG")
    at = whole.index(b"\xff\xc0") + 5
    return whole[:at] + struct.pack(">HH", height, width) + whole[at + 4 :]


def webp_of(width: int, height: int) -> bytes:
    """An animated WebP whose canvas was overwritten with another size."""
    frames = [SCENE, SCENE.rotate(180)]
    whole = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    at = whole.index(b"VP8X") + 12
    return whole[:at] + struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3] + whole[at + 6 :]


def bmp_of(width: int, height: int) -> bytes:
    """A BMP whose header was overwritten with another size."""
    whole = encoded(SCENE, "BMP")
    return whole[:18] + struct.pack("<ii", width, height) + whole[26:]


def exif(orientation: int) -> bytes:
    """An EXIF block."""
    block = Image.Exif()
    block[0x0112] = orientation
    return block.tobytes()


def bombs() -> dict[str, Case]:
    """Small files that claim, or inflate to, far more than is read by default (100 megapixels)."""
    text = b"Comment\x00\x00" + flood()
    international = b"Comment\x00\x01\x00\x00\x00" + flood()
    return {
        "png-huge-header": (png(2**31 - 1, 2**31 - 1, b""), TOO_LARGE),
        "png-wide-header": (png(2**31 - 1, 1, b""), TOO_LARGE),
        "png-million-pixels-square": (png(1_000_000, 1_000_000, flood(2**26), 1, 0), TOO_LARGE),
        "png-pixels-inflate-to-a-gib": (png(2, 2, flood()), None),
        "png-text-inflates-to-a-gib": (small_png(chunk(b"zTXt", text)), UNREADABLE),
        "png-text-in-text": (small_png(chunk(b"zTXt", b"k\x00\x00" + zlib.compress(flood()))), UNREADABLE),
        "png-international-text-inflates": (small_png(chunk(b"iTXt", international)), UNREADABLE),
        "png-profile-inflates": (small_png(chunk(b"iCCP", b"p\x00\x00" + flood())), UNREADABLE),
        "png-a-thousand-texts": (small_png(chunk(b"zTXt", b"k\x00\x00" + flood(2**20)) * 200), UNREADABLE),
        "png-long-text": (small_png(chunk(b"tEXt", b"Comment\x00" + b"a" * 900_000)), None),
        "gif-huge-screen": (gif((65535, 65535), (65535, 65535)), TOO_LARGE),
        "gif-huge-frame": (gif((4, 4), (65535, 65535)), TOO_LARGE),
        "gif-many-frames": (gif((1, 1), (1, 1), 3000), None),
        "jpeg-huge": (jpeg_of(65500, 65500), TOO_LARGE),
        "webp-huge": (webp_of(16383, 16383), TOO_LARGE),
        "webp-larger-than-webp": (webp_of(2**24, 2**24), TOO_LARGE),
        "bmp-huge": (bmp_of(2**30, 2**30), TOO_LARGE),
        "tiff-huge": (grey_tiff(2**31 - 1, 2**31 - 1, b"\x00" * 9), TOO_LARGE),
        "tiff-huge-tile": (grey_tiff(8, 8, flood(2**27), 8, (13_312, 13_312)), TOO_LARGE),
        "tiff-tile-too-huge-to-think-of": (grey_tiff(8, 8, flood(2**20), 8, (2**31, 2**31)), TOO_LARGE),
        "tiff-strip-inflates": (grey_tiff(8, 8, flood(), 8), None),
    }


def shapes() -> dict[str, Case]:
    """No pixels, one line of pixels, more lines than a header can mean."""
    line = Image.new("RGB", (65535, 1), (200, 30, 40))
    return {
        "png-0x0": (png(0, 0, zlib.compress(b"")), UNREADABLE),
        "png-0x9": (png(0, 9, zlib.compress(bytes(9))), UNREADABLE),
        "gif-0x0": (gif((0, 0), (0, 0)), UNREADABLE),
        "bmp-0x0": (bmp_of(0, 0), UNREADABLE),
        "bmp-negative": (bmp_of(-40, 24), TOO_LARGE),
        "jpeg-0x0": (jpeg_of(0, 0), UNREADABLE),
        "tiff-0x0": (grey_tiff(0, 0, b""), UNREADABLE),
        "png-65535x1": (encoded(line, "PNG"), None),
        "png-1x65535": (encoded(line.transpose(Image.Transpose.ROTATE_90), "PNG"), None),
        "jpeg-65500x1": (encoded(line.crop((0, 0, 65500, 1)), "JPEG"), None),
        "one-pixel": (encoded(Image.new("RGB", (1, 1)), "PNG"), None),
    }


def cut() -> dict[str, Case]:
    """Files that end too early: within the header, the tables, the pixels, the trailer."""
    wholes = {name: encoded(SCENE, name) for name in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")}
    shares = {"header": 0.01, "tables": 0.2, "half": 0.5, "pixels": 0.9}
    return {
        f"{name.lower()}-cut-in-{place}": (whole[: int(len(whole) * share) + 4], UNREADABLE)
        for name, whole in wholes.items()
        for place, share in shares.items()
    }


def posing() -> dict[str, Case]:
    """What is no picture, or says that it is another one."""
    svg = b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'><script>alert(1)</script></svg>"
    jpeg, sound = encoded(SCENE, "JPEG"), encoded(SCENE, "PNG")
    return {
        "empty": (b"", UNREADABLE),
        "one-byte": (b"\x89", UNREADABLE),
        "html": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", UNREADABLE),
        "svg": (svg, UNREADABLE),
        "svg-behind-png-magic": (PNG_MAGIC + svg, UNREADABLE),
        "svg-after-xml-and-byte-order-mark": (b"\xef\xbb\xbf<?xml version='1.0'?>" + svg, UNREADABLE),
        "jpeg-behind-png-magic": (PNG_MAGIC + jpeg, UNREADABLE),
        "wrong-magic": (b"\x88" + sound[1:], UNREADABLE),
        "zeros": (bytes(4096), UNREADABLE),
        "text": ("Ignore this picture. \x1b[2J\u202e".encode(), UNREADABLE),
        "picture-and-then-html": (sound + b"<html>", None),
        "tiff-directory-that-leads-to-itself": (tiff({256: (4, 1, 4), 257: (4, 1, 4)}, following=8), UNREADABLE),
    }


def unusual() -> dict[str, Case]:
    """Pictures that are sound, or sound enough."""
    frames = [SCENE.rotate(90 * turn) for turn in range(3)]
    series: dict[str, Any] = {"save_all": True, "append_images": frames[1:]}
    sixteen = Image.fromarray((np.arange(24 * 40, dtype=np.uint32) * 68 % 65536).astype(np.uint16).reshape(24, 40))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    palette = SCENE.quantize(16)
    rotated = {f"exif-{turn}": (encoded(SCENE, "JPEG", exif=exif(turn)), None) for turn in range(1, 9)}
    broken_exif = {
        "exif-cut": b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x50\x00",
        "exif-of-99": exif(99),
        "exif-nonsense": b"Exif\x00\x00" + bytes(range(256)),
        "exif-points-outside": b"Exif\x00\x00MM\x00*\x7f\xff\xff\xff",
    }
    return {
        "gif-animated": (encoded(frames[0], "GIF", **series), None),
        "webp-animated": (encoded(frames[0], "WEBP", **series), None),
        "png-animated": (encoded(frames[0], "PNG", **series), None),
        "jpeg-cmyk": (encoded(SCENE.convert("CMYK"), "JPEG"), None),
        "jpeg-grey": (encoded(SCENE.convert("L"), "JPEG"), None),
        "png-16-bit": (encoded(sixteen, "PNG"), None),
        "png-grey-with-alpha": (encoded(SCENE.convert("LA"), "PNG"), None),
        "png-palette-with-clear-entries": (encoded(palette, "PNG", transparency=bytes(range(16))), None),
        "tiff-float": (encoded(SCENE.convert("F"), "TIFF"), None),
        "jpeg-profile": (encoded(SCENE, "JPEG", icc_profile=profile), None),
        "jpeg-broken-profile": (encoded(SCENE, "JPEG", icc_profile=profile[:77]), None),
        "png-broken-profile": (encoded(SCENE, "PNG", icc_profile=b"no profile at all"), None),
        **rotated,
        **{name: (encoded(SCENE, "JPEG", exif=block), None) for name, block in broken_exif.items()},
        **{f"png-{name}": (encoded(SCENE, "PNG", exif=block), None) for name, block in broken_exif.items()},
    }


def pictures() -> dict[str, Case]:
    """All of them."""
    return bombs() | shapes() | cut() | posing() | unusual()
