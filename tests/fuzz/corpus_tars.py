"""Hostile and damaged tars, all made by code: what each is called, its bytes, and how an audit of it must end."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence

from tests.fuzz.corpus_tables import SECRET, Rows, TableCase, answered

Member = tuple[str, bytes]
TEXT = b"What is shown?"
BLOCK = 512


def member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, **more: object) -> tarfile.TarInfo:
    """A header."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(content)
    for field, value in more.items():
        setattr(info, field, value)
    return info


def tar(parts: Sequence[tuple[tarfile.TarInfo, bytes]], kind: int = tarfile.PAX_FORMAT) -> bytes:
    """A whole tar."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=kind) as opened:
        for info, content in parts:
            opened.addfile(info, io.BytesIO(content))
    return out.getvalue()


def with_neighbours(*parts: tuple[tarfile.TarInfo, bytes]) -> bytes:
    """The members between two sound samples, `first` and `last`."""
    return tar([(member("first.txt", TEXT), TEXT), *parts, (member("last.txt", TEXT), TEXT)])


def padded(content: bytes) -> bytes:
    """Filled up to whole blocks."""
    return content + bytes(-len(content) % BLOCK)


def header(name: bytes, kind: bytes, size: int, more: bytes = b"") -> bytes:
    """A raw header with a sound checksum; `more` is what stands from byte 257 on. Sizes may be negative."""
    number = b"%011o\0" % size if size >= 0 else b"\xff" * 4 + size.to_bytes(8, "big", signed=True)
    fields = name.ljust(100, b"\0") + b"0000644\0" * 3 + number + b"00000000000\0"
    block = (fields + b" " * 8 + kind + bytes(100) + (more or b"ustar\x0000")).ljust(BLOCK, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def raw(*parts: bytes) -> bytes:
    """Raw blocks between two sound samples, `first` and `last`."""
    first = header(b"first.txt", b"0", len(TEXT)) + padded(TEXT)
    return first + b"".join(parts) + tar([(member("last.txt", TEXT), TEXT)])


def sparse(real_size: int) -> bytes:
    """An old GNU sparse member of one block that says it is a file of so many bytes."""
    spans = b"%011o\0%011o\0" % (0, BLOCK)
    more = (b"ustar  \0" + bytes(121) + spans).ljust(226, b"\0") + b"%011o\0" % real_size
    return header(b"hole.txt", b"S", BLOCK, more) + padded(b"x" * BLOCK)


def pax(records: dict[str, str], kind: bytes = b"x") -> bytes:
    """A raw extended header."""
    lines = b""
    for name, value in records.items():
        body = f" {name}={value}\n".encode()
        size = len(body) + len(str(len(body) + len(str(len(body)))))
        lines += str(size).encode() + body
    return header(b"pax", kind, len(lines)) + padded(lines)


def names() -> dict[str, TableCase]:
    """Members that lead out, that are no files, or that stand twice."""
    lost, good = "row_unreadable", answered("{name}#first", "{name}#last")

    def beside(key: str, *parts: tuple[tarfile.TarInfo, bytes]) -> tuple[bytes, Rows]:
        return with_neighbours(*parts), good | {f"{{name}}#{key}": lost}

    secret, text = SECRET.encode(), (member("a.txt", TEXT), TEXT)
    cases = {
        "absolute": beside("/etc/a", (member("/etc/a.txt", secret), secret)),
        "out-of-its-folder": beside("../../a", (member("../../a.txt", secret), secret)),
        "out-within": beside("b/../../a", (member("b/../../a.txt", secret), secret)),
        "link": beside("a", (member("a.txt", kind=tarfile.SYMTYPE, linkname="/etc/passwd"), b"")),
        "hard-link": beside("a", (member("a.txt", kind=tarfile.LNKTYPE, linkname="first.txt"), b"")),
        "device": beside("a", (member("a.txt", kind=tarfile.CHRTYPE, devmajor=1, devminor=5), b"")),
        "pipe": beside("a", (member("a.txt", kind=tarfile.FIFOTYPE), b"")),
        "unknown-type": beside("a", (member("a.txt", kind=b"?"), b"")),
        "text-twice": beside("a", text, (member("a.txt", secret), secret)),
        "text-twice-in-other-case": beside("a", text, (member("a.TXT", secret), secret)),
        "sample-twice": (with_neighbours(text, (member("b.txt", TEXT), TEXT), text), None, "stands twice"),
        "name-with-escapes": (
            with_neighbours((member("\x1b[2J\n.txt", TEXT), TEXT)),
            good | answered("{name}#\x1b[2J\n"),
        ),
        "name-of-5000": (
            with_neighbours((member("x" * 5000 + ".txt", TEXT), TEXT)),
            good | answered("{name}#" + "x" * 5000),
        ),
        "text-of-no-encoding": beside("a", (member("a.txt", b"\xff\xfe" + secret), b"\xff\xfe" + secret)),
        "no-samples": (tar([(member("README", TEXT), TEXT)]), None, "nothing to audit"),
        "folders-only": (tar([(member("d", kind=tarfile.DIRTYPE), b"")]), None, "nothing to audit"),
    }
    return {f"tar-{name}": TableCase(".tar", *case) for name, case in cases.items()}


def bombs() -> dict[str, TableCase]:
    """Headers that claim too much, lead back, or follow each other without end."""
    lost, good = "row_unreadable", answered("{name}#first", "{name}#last")
    loop = header(b"././@LongLink", b"L", 9) + padded(b"long.txt\0")
    body = padded(TEXT)
    cases = {
        "sparse-of-a-gib": (raw(sparse(2**30)), good | {"{name}#hole": lost}),
        "sparse-of-eight-gib": (raw(sparse(2**33 - 1)), good | {"{name}#hole": lost}),
        "pax-size": (raw(pax({"size": str(2**60)}), header(b"a.txt", b"0", 5), body), None, "tar"),
        "pax-negative-size": (raw(pax({"size": "-2048"}), header(b"a.txt", b"0", 5), body), None, "tar"),
        "pax-size-of-words": (raw(pax({"size": "much"}), header(b"a.txt", b"0", 14), body), None, ""),
        "pax-many-records": (
            raw(pax({f"k{number}": "v" * 90 for number in range(9000)}), header(b"a.txt", b"0", 14), body),
            good | answered("{name}#a"),
        ),
        "pax-header-says-a-gib": (raw(header(b"pax", b"x", 2**30), padded(b"9 a=b\n")), None, "tar"),
        "pax-sparse": (
            raw(
                pax({"GNU.sparse.map": "0,14", "GNU.sparse.size": str(2**40), "GNU.sparse.numblocks": "1"}),
                header(b"a.txt", b"0", 14),
                body,
            ),
            good | {"{name}#a": lost},
        ),
        "pax-for-all-renames": (raw(pax({"path": "same.txt"}, b"g"), header(b"a.txt", b"0", 14), body), None, "global"),
        "pax-for-all-comments": (
            raw(pax({"comment": "c"}, b"g"), header(b"a.txt", b"0", 14), body),
            good | answered("{name}#a"),
        ),
        "negative-size": (raw(header(b"a.txt", b"0", -1024), body), None, "tar"),
        "long-names-without-end": (raw(loop * 3000, header(b"a.txt", b"0", 14), body), None, "tar"),
        "pax-without-end": (raw(pax({"comment": "x"}) * 3000, header(b"a.txt", b"0", 14), body), None, "tar"),
    }
    return {f"tar-{name}": TableCase(".tar", *case) for name, case in cases.items()}


def damaged() -> dict[str, TableCase]:
    """Tars that end too early, or hold something else."""
    whole = tar([(member(f"{number}.txt", TEXT * 60), TEXT * 60) for number in range(5)])
    cases = {
        "cut-in-header": (whole[: 1536 + 200], None, "tar"),
        "cut-in-member": (whole[: 1536 + 700], None, "tar"),
        "without-end": (whole[: 1536 * 5], answered(*(f"{{name}}#{number}" for number in range(5)))),
        "damaged-header": (whole[:1536] + b"\x01" * BLOCK + whole[2048:], None, "damaged"),
        "checksum-wrong": (whole[:1700] + b"9" + whole[1701:], None, ""),
        "compressed": (b"\x1f\x8b\x08" + bytes(900), None, "tar"),
        "text": (b"no tar at all " * 100, None, "tar"),
        "zero-bytes": (b"", None, "tar"),
        "zeros": (bytes(10_240), None, ""),
    }
    return {f"tar-{name}": TableCase(".tar", *case) for name, case in cases.items()}


def tars() -> dict[str, TableCase]:
    """All of them."""
    return names() | bombs() | damaged()
