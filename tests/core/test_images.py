"""Whatever bytes come in, an upright 8-bit RGB picture or a `RowError` comes out."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from guardalign.core.images import FORMATS, OPENERS, ORIENTATION, decode, encode_png, thumbnail
from guardalign.errors import RowError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

LIMIT = 1_000_000
WIDTH, HEIGHT = 60, 44

STEPS = np.random.default_rng(0).integers(0, 256, (11, 15, 3), dtype=np.uint8)
PICTURE = Image.fromarray(np.kron(STEPS, np.ones((4, 4, 1), dtype=np.uint8)))
TURNED = PICTURE.rotate(180)


def encoded(picture: Image.Image, name: str, **options: Any) -> bytes:
    """The file's bytes; copies are saved, since saving as MPO leaves traces on the pictures."""
    buffer = BytesIO()
    if "append_images" in options:
        options["append_images"] = [frame.copy() for frame in options["append_images"]]
    picture.copy().save(buffer, name, **options)
    return buffer.getvalue()


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags.tobytes()


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def grey16() -> np.ndarray:
    return np.linspace(0, 65535, WIDTH * HEIGHT).astype(np.uint16).reshape(HEIGHT, WIDTH)


def lab() -> Image.Image:
    profiles = (ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"))
    converted = ImageCms.profileToProfile(PICTURE, *profiles, outputMode="LAB")
    assert converted is not None
    return converted


def texts() -> PngImagePlugin.PngInfo:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("comment", "words " * 20)
    chunks.add_text("more", "words " * 200, zip=True)
    return chunks


FILES: dict[str, bytes] = {
    "jpeg": encoded(PICTURE, "JPEG", quality=95),
    "jpeg progressive": encoded(PICTURE, "JPEG", progressive=True, exif=exif(6)),
    "jpeg cmyk": encoded(PICTURE.convert("CMYK"), "JPEG"),
    "jpeg grey": encoded(PICTURE.convert("L"), "JPEG"),
    "mpo": encoded(PICTURE, "MPO", save_all=True, append_images=[TURNED]),
    "png": encoded(PICTURE, "PNG", exif=exif(3), pnginfo=texts()),
    "png palette": encoded(PICTURE.quantize(16), "PNG", transparency=0),
    "png bits": encoded(PICTURE.convert("1"), "PNG"),
    "png grey alpha": encoded(PICTURE.convert("LA"), "PNG"),
    "png 16 bit": encoded(Image.fromarray(grey16()), "PNG"),
    "apng": encoded(PICTURE, "PNG", save_all=True, append_images=[TURNED]),
    "webp": encoded(PICTURE, "WEBP", exif=exif(8)),
    "webp lossless": encoded(PICTURE.convert("RGBA"), "WEBP", lossless=True),
    "webp animated": encoded(PICTURE, "WEBP", save_all=True, append_images=[TURNED]),
    "gif": encoded(PICTURE, "GIF"),
    "gif animated": encoded(PICTURE, "GIF", save_all=True, append_images=[TURNED]),
    "bmp": encoded(PICTURE, "BMP"),
    "bmp palette": encoded(PICTURE.quantize(16), "BMP"),
    "tiff": encoded(PICTURE, "TIFF"),
    "tiff lzw": encoded(PICTURE, "TIFF", compression="tiff_lzw"),
    "tiff jpeg": encoded(PICTURE, "TIFF", compression="jpeg"),
    "tiff fax": encoded(PICTURE.convert("1"), "TIFF", compression="group4"),
    "tiff float": encoded(Image.fromarray(grey16().astype(np.float32)), "TIFF"),
    "tiff lab": encoded(lab(), "TIFF"),
    "tiff pages": encoded(PICTURE, "TIFF", save_all=True, append_images=[TURNED, TURNED]),
}
if "AVIF" in OPENERS:
    FILES["avif"] = encoded(PICTURE, "AVIF", exif=exif(5))


@pytest.mark.parametrize("name", FILES)
def test_every_format_and_mode_becomes_plain_rgb(name: str) -> None:
    decoded = decode(FILES[name], LIMIT, "a1")
    assert type(decoded.picture) is Image.Image and decoded.picture.mode == "RGB"
    assert decoded.picture.size == (decoded.width, decoded.height)
    assert sorted(decoded.picture.size) == [HEIGHT, WIDTH]
    assert not decoded.picture.info and not decoded.picture.getexif()


@pytest.mark.parametrize("name", ["png", "bmp", "tiff", "tiff lzw", "tiff pages", "webp lossless", "apng"])
def test_lossless_formats_come_back_bit_for_bit(name: str) -> None:
    expected = TURNED if name == "png" else PICTURE
    assert decode(FILES[name], LIMIT, "a1").picture.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("name", "num_frames"),
    [
        ("jpeg", 1),
        ("mpo", 2),
        ("png", 1),
        ("apng", 2),
        ("webp", 1),
        ("webp animated", 2),
        ("gif", 1),
        ("gif animated", 2),
        ("bmp", 1),
        ("tiff", 1),
        ("tiff pages", 3),
    ],
)
def test_the_first_frame_is_audited_and_the_others_are_counted(name: str, num_frames: int) -> None:
    decoded = decode(FILES[name], LIMIT, "a1")
    assert decoded.num_frames == num_frames
    if num_frames > 1:
        first, last = (np.abs(pixels(decoded.picture) - pixels(frame)).mean() for frame in (PICTURE, TURNED))
        assert first < last / 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
def test_all_orientations_come_out_upright(name: str, orientation: int) -> None:
    if name not in OPENERS:
        pytest.skip("this Pillow has no AVIF")
    options: dict[str, Any] = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(name, {})
    source = encoded(PICTURE, name, exif=exif(orientation), **options)
    decoded = decode(source, LIMIT, "a1")
    with Image.open(BytesIO(source)) as opened:
        opened.load()
        reference = ImageOps.exif_transpose(opened).convert("RGB")
    assert decoded.picture.tobytes() == reference.tobytes()
    assert (decoded.width, decoded.height) == reference.size == ((HEIGHT, WIDTH) if orientation >= 5 else PICTURE.size)
    assert decoded.picture.getexif().get(ORIENTATION) is None, "a second reader would turn it again"


@pytest.mark.parametrize(
    "block", [b"Exif\x00\x00", b"Exif\x00\x00II*\x00\xff\xff\xff\xff", b"Exif\x00\x00nonsense", exif(77)]
)
def test_a_senseless_exif_block_is_no_orientation(block: bytes) -> None:
    assert decode(encoded(PICTURE, "PNG", exif=block), LIMIT, "a1").picture.tobytes() == PICTURE.tobytes()


@pytest.mark.parametrize("name", FILES)
def test_a_cut_file_never_passes_as_another_picture(name: str) -> None:
    whole = FILES[name]
    expected = decode(whole, LIMIT, "a1").picture.tobytes()
    for length in {*range(0, len(whole), max(1, len(whole) // 60)), *range(len(whole) - 12, len(whole))}:
        try:
            cut = decode(whole[:length], LIMIT, "a1")
        except RowError as error:
            assert error.kind in ("image_unreadable", "image_too_large")
        else:
            assert cut.picture.tobytes() == expected, f"{length} of {len(whole)} bytes gave another picture"


def edits() -> st.SearchStrategy[list[tuple[float, bytes, int]]]:
    """Where (as a share of the file), what to write there, how many bytes to drop."""
    return st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=6), st.integers(0, 8)), min_size=1, max_size=6)


def mutated(whole: bytes, changes: list[tuple[float, bytes, int]]) -> bytes:
    for share, written, dropped in changes:
        at = int(share * len(whole))
        whole = whole[:at] + written + whole[at + dropped :]
    return whole


def check_mutations(examples: int) -> Callable[[], None]:
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(sorted(FILES)), edits(), st.sampled_from([None, 16]))
    def mutations(name: str, changes: list[tuple[float, bytes, int]], at_least: int | None) -> None:
        try:
            decoded = decode(mutated(FILES[name], changes), LIMIT, "a1", at_least)
        except RowError as error:
            assert error.kind in ("image_unreadable", "image_too_large")
        else:
            assert decoded.picture.mode == "RGB" and decoded.width * decoded.height <= LIMIT

    return mutations


def test_broken_bytes_end_as_a_row_error() -> None:
    check_mutations(1500)()


@pytest.mark.slow
def test_broken_bytes_end_as_a_row_error_at_length() -> None:
    check_mutations(30_000)()


@pytest.mark.parametrize(
    ("bytes_", "said"),
    [
        (b"", "zero bytes"),
        (b"\xef\xbb\xbf <svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9", "PostScript"),
        (b"%PDF-1.7", "PDF"),
        (b"8BPS\x00\x01" + bytes(40), "Photoshop"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS"),
        (b"no picture at all", "no known format"),
        (FILES["png"][1:], "no known format"),
    ],
)
def test_what_is_not_read_is_named_with_the_sample(bytes_: bytes, said: str) -> None:
    with pytest.raises(RowError, match=said) as caught:
        decode(bytes_, LIMIT, "a17")
    assert caught.value.kind == "image_unreadable"
    assert "sample a17 " in str(caught.value) and "\n" not in str(caught.value)


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises width x height pixels and holds none."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + b"\0\0\0\0IDAT"


def test_pixels_are_counted_before_they_are_decoded() -> None:
    with pytest.raises(RowError, match="100000 x 100000 pixels; at most 1000000") as caught:
        decode(png_header(100_000, 100_000), LIMIT, "a1")
    assert caught.value.kind == "image_too_large"
    with pytest.raises(RowError) as caught:
        decode(FILES["jpeg"], WIDTH * HEIGHT - 1, "a1", at_least=8)
    assert caught.value.kind == "image_too_large"
    assert decode(FILES["jpeg"], WIDTH * HEIGHT, "a1").width == WIDTH


def test_our_limit_rules_and_not_the_one_of_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert decode(FILES["png"], LIMIT, "a1").width == WIDTH


def test_a_text_bomb_in_a_png_is_refused() -> None:
    bomb = b"zTXt" + b"k\x00\x00" + zlib.compress(bytes(50_000_000), 9)
    chunk = struct.pack(">I", len(bomb) - 4) + bomb + struct.pack(">I", zlib.crc32(bomb))
    whole = FILES["apng"]
    with pytest.raises(RowError) as caught:
        decode(whole[:33] + chunk + whole[33:], LIMIT, "a1")
    assert caught.value.kind == "image_unreadable"


def test_transparency_is_laid_on_white() -> None:
    clear = PICTURE.convert("RGBA")
    clear.putalpha(0)
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    for name in ("PNG", "WEBP", "TIFF"):
        assert (pixels(decode(encoded(clear, name), LIMIT, "a1").picture) == 255).all(), name
    assert decode(encoded(half, "PNG"), LIMIT, "a1").picture.getpixel((0, 0)) == (255, 127, 127)
    keyed = {"P": encoded(palette, "PNG", transparency=1), "gif": encoded(palette, "GIF", transparency=1)}
    keyed["L"] = encoded(Image.new("L", (4, 4), 7), "PNG", transparency=7)
    keyed["RGB"] = encoded(Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    for name, source in keyed.items():
        assert (pixels(decode(source, LIMIT, "a1").picture) == 255).all(), name
    opaque = PICTURE.convert("RGBA")
    assert decode(encoded(opaque, "PNG"), LIMIT, "a1").picture.tobytes() == PICTURE.tobytes()


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    values = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    for name in ("PNG", "TIFF"):
        picture = decode(encoded(Image.fromarray(values), name), LIMIT, "a1").picture
        assert np.array_equal(pixels(picture)[..., 0], values // 257), name
    ramp = pixels(decode(FILES["png 16 bit"], LIMIT, "a1").picture)[..., 1]
    assert np.abs(ramp - grey16() / 257).max() <= 0.5 + 1e-9


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0, np.nan], [0, 128, 255, 0]),
        ([0.0, 100.0, 255.0, 7.4], [0, 100, 255, 7]),
        ([0.0, 65535.0, 257.0, 514.0], [0, 255, 1, 2]),
        ([-1.0, 1.0, 0.0, 0.5], [0, 255, 128, 191]),
        ([0.0, 1e9, 5e8, 0.0], [0, 255, 128, 0]),
        ([0.0, 0.0, 0.0, 0.0], [0, 0, 0, 0]),
        ([0.0, np.inf, -np.inf, np.nan], [128, 255, 0, 128]),
    ],
)
def test_floating_grey_is_stretched(values: list[float], expected: list[int]) -> None:
    source = encoded(Image.fromarray(np.array([values], dtype=np.float32)), "TIFF")
    assert pixels(decode(source, LIMIT, "a1").picture)[0, :, 0].tolist() == expected


def test_32_bit_grey_is_stretched() -> None:
    source = encoded(Image.fromarray(np.array([[0, 2**31 - 1, 2**30, 5]], dtype=np.int32)), "TIFF")
    assert pixels(decode(source, LIMIT, "a1").picture)[0, :, 0].tolist() == [0, 255, 128, 0]


def test_cmyk_and_lab_keep_their_colours() -> None:
    for name in ("jpeg cmyk", "tiff lab"):
        assert np.abs(pixels(decode(FILES[name], LIMIT, "a1").picture) - pixels(PICTURE)).mean() < 12, name
    adobe = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red = decode(encoded(adobe, "JPEG", quality=100), LIMIT, "a1").picture.getpixel((8, 8))
    assert isinstance(red, tuple) and red[0] > 250 and max(red[1:]) < 5


def test_a_colour_profile_changes_nothing() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for block in (profile, b"no profile"):
        source = encoded(PICTURE, "PNG", icc_profile=block)
        assert decode(source, LIMIT, "a1").picture.tobytes() == PICTURE.tobytes()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 400), st.sampled_from([1, 6]))
def test_a_reduced_jpeg_keeps_both_sides_long_enough(width: int, height: int, at_least: int, turn: int) -> None:
    source = encoded(Image.new("RGB", (width, height), "red"), "JPEG", exif=exif(turn))
    decoded, full = decode(source, 90_000, "a1", at_least), decode(source, 90_000, "a1")
    assert (decoded.width, decoded.height) == full.picture.size == (full.width, full.height)
    for reduced, original in zip(decoded.picture.size, full.picture.size, strict=True):
        assert reduced >= min(at_least, original)
    factor = next(f for f in (8, 4, 2, 1) if f == 1 or min(width, height) // f >= at_least)
    assert decoded.picture.width == -(-decoded.width // factor)


def test_at_least_leaves_other_formats_alone() -> None:
    assert decode(FILES["webp lossless"], LIMIT, "a1", at_least=4).picture.tobytes() == PICTURE.tobytes()


def test_threads_decode_what_one_thread_decodes() -> None:
    sources = list(FILES.values()) * 8
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda source: decode(source, LIMIT, "a1").picture.tobytes(), sources))
    assert together == [decode(source, LIMIT, "a1").picture.tobytes() for source in sources]


def test_a_one_pixel_picture_is_a_picture() -> None:
    for name in OPENERS:
        assert decode(encoded(Image.new("RGB", (1, 1), "white"), name), LIMIT, "a1", at_least=224).width == 1


def test_a_picture_handed_on_as_png_is_the_same_picture() -> None:
    assert decode(encode_png(PICTURE), LIMIT, "a1").picture.tobytes() == PICTURE.tobytes()


def test_a_thumbnail_is_small_and_never_enlarged() -> None:
    small = decode(thumbnail(PICTURE, 30), LIMIT, "a1")
    assert (small.width, small.height) == (30, 22)
    same = decode(thumbnail(PICTURE, 500), LIMIT, "a1")
    assert (same.width, same.height) == PICTURE.size == (WIDTH, HEIGHT)


def test_the_list_of_formats_is_what_this_pillow_opens() -> None:
    assert set(FORMATS) - set(OPENERS) <= {"AVIF"}
