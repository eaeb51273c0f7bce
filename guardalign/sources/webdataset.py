"""WebDataset tars: members of one key are one sample, a picture with a .txt or a .json beside it.

A key is a member's name up to the first dot of its last part. The prompt is a field of the .json or the whole .txt;
where both are there they agree, or the sample is an error row. Which member is the picture, `members` says. The plan
walks the headers and notes where each shard starts; a read seeks there. Nothing is ever unpacked to disk; samples with
links, devices or names that lead out of a folder are error rows.
"""

from __future__ import annotations

import dataclasses
import os
import posixpath
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import IO, Any, ClassVar

import pyarrow as pa

from guardalign.config import InputConfig
from guardalign.errors import InputError, RowError
from guardalign.sources.contract import Outline, Plan, Shard, Span
from guardalign.sources.files import ListedFile, list_files, open_input, printable
from guardalign.sources.left_out import LeftOut, note_of_left_out
from guardalign.sources.magic import LONGEST, refuse_compressed
from guardalign.sources.members import MemberCensus, pictures_among
from guardalign.sources.planning import URLS, IdLedger, ShardCutter, find_columns, named, refuse_empty, text_fields
from guardalign.sources.records import LONGEST_LINE, json_object
from guardalign.sources.rows import InputRow, bare, checked, failed, location, to_table, whole
from guardalign.sources.tables import as_text

_NAME = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]+)$")
_DEFAULT_PROMPT = InputConfig().prompt_column
_BLOCK = 512


@dataclass(frozen=True, slots=True)
class _Part:
    """A member of a sample."""

    key: str
    extension: str
    member: tarfile.TarInfo


@dataclass(frozen=True)
class _TarSample:
    """The members of one key, and the tar to read them from."""

    key: str
    parts: tuple[_Part, ...]
    tar: tarfile.TarFile

    @property
    def offset(self) -> int:
        """Where its first header starts [bytes]."""
        return self.parts[0].member.offset

    @property
    def endings(self) -> list[str]:
        """Of its members, in order, lower case."""
        return [part.extension for part in self.parts]

    def content(self, extension: str) -> bytes | None:
        """The bytes of the member with this extension; None without one."""
        for part in self.parts:
            if part.extension == extension:
                file = self.tar.extractfile(part.member)
                return None if file is None else file.read()
        return None


@dataclass(frozen=True)
class WebdatasetSource:
    """A tar, a folder, a glob or a list of them. `image_column`, if set, is the extension of the picture."""

    config: InputConfig
    meaningless: ClassVar[tuple[str, ...]] = ("split", "revision", "subset", "image_root", *URLS)

    def plan(self, shard_rows: int, limit: int | None) -> Plan:
        """See `Source.plan`."""
        left_out: list[LeftOut] = []
        listed = self._list(left_out)
        cutter, ids, keys = ShardCutter(shard_rows), IdLedger(), IdLedger()
        present: dict[str, None] = {}
        census = MemberCensus(self.config.image_column)
        numbers: dict[str, int] = {}
        strangers: list[str] = []
        for file, sample in islice(self._walk(listed, strangers), limit):
            row, fields = self._words(file.name, sample)
            present |= dict.fromkeys(fields)
            census.add(sample.endings)
            ids.add(row.sample_id)
            keys.add(row.source)
            number = numbers.get(file.name, 0)
            cutter.add(file.uri, file.name, number, offset=sample.offset)
            numbers[file.name] = number + 1
        refuse_empty(self.config, cutter.num_rows)
        notes = (*self._check_columns(present, census), *census.notes(), *_note_of(strangers))
        notes += note_of_left_out(left_out, (".tar",))
        keys.refuse_duplicates(lambda: ((row.source, row.source) for row in self._rows(listed, limit)))
        ids.refuse_duplicates(lambda: ((row.sample_id, row.source) for row in self._rows(listed, limit)))
        files = tuple(file.as_input for file in listed)
        return Plan(cutter.shards(), cutter.num_rows, files, text_fields(self.config), notes)

    def _list(self, left_out: list[LeftOut]) -> tuple[ListedFile, ...]:
        listed = list_files(self.config.path, (".tar", ".tar.gz", ".tgz"), left_out)
        for file in listed:
            if file.name.lower().endswith((".gz", ".tgz")):
                raise InputError(f"{file.name} is compressed, so shards cannot seek in it: unpack it to a plain .tar")
        return listed

    def _walk(
        self, listed: Sequence[ListedFile], strangers: list[str] | None = None
    ) -> Iterator[tuple[ListedFile, _TarSample]]:
        """All samples; the names of members that belong to none go to `strangers`."""
        for file in listed:
            with open_input(file.uri, file.name) as opened:
                for sample in _samples(opened, file.name, strangers):
                    yield file, sample

    def _rows(self, listed: Sequence[ListedFile], limit: int | None) -> Iterator[InputRow]:
        return (self._words(file.name, sample)[0] for file, sample in islice(self._walk(listed), limit))

    def _check_columns(self, fields: Mapping[str, None], census: MemberCensus) -> tuple[str, ...]:
        """Notes on the columns: a .txt is the prompt unless another column was asked for, pictures are members."""
        there = {**fields, **census.endings}
        if self.config.prompt_column == _DEFAULT_PROMPT and "txt" in census.endings:
            there[_DEFAULT_PROMPT] = None
        if census.has_pictures:
            there[self.config.image_column] = None
        else:
            there.pop(self.config.image_column, None)
        return find_columns(self.config, there).notes

    def read(self, shard: Shard) -> pa.Table:
        """See `Source.read`."""
        rows = []
        for span in shard.spans:
            with open_input(span.uri, span.name) as opened:
                opened.seek(span.offset)
                for sample in islice(_samples(opened, span.name), span.num_rows):
                    rows.append(self._with_picture(self._words(span.name, sample)[0], sample))
        return whole(to_table(rows, text_fields(self.config)), shard)

    def outline(self, shard: Shard) -> Outline:
        """See `Source.outline`."""
        rows, spans = [], []
        for span in shard.spans:
            with open_input(span.uri, span.name) as opened:
                opened.seek(span.offset)
                for number, sample in zip(span.rows, _samples(opened, span.name), strict=False):
                    row, _ = self._words(span.name, sample)
                    rows.append(InputRow(row.sample_id, row.source))
                    spans.append(Span(span.uri, span.name, number, 1, sample.offset))
        return Outline(whole(bare(rows, text_fields(self.config)), shard), tuple(spans))

    def _words(self, file_name: str, sample: _TarSample) -> tuple[InputRow, Mapping[str, Any]]:
        """The sample's row without its picture, and the fields of its .json."""
        place = location(file_name, sample.key)
        blank = InputRow(place, place, passthrough=(None,) * len(self.config.passthrough))
        fields: Mapping[str, Any] = {}
        try:
            _refuse_unsafe(sample, place)
            fields = _fields(sample, place)
            return checked(self._interpret(sample, fields, place)), fields
        except RowError as error:
            return failed(blank, error), fields

    def _interpret(self, sample: _TarSample, fields: Mapping[str, Any], place: str) -> InputRow:
        config = self.config
        cell = {name: as_text(value) for name, value in fields.items()}
        return InputRow(
            sample_id=cell.get(config.id_column or "") or place,
            source=place,
            prompt=self._prompt(sample, fields, place),
            category=cell.get(config.category_column or ""),
            label=cell.get(config.label_column or ""),
            passthrough=tuple(cell.get(name) for name in config.passthrough),
        )

    def _prompt(self, sample: _TarSample, fields: Mapping[str, Any], place: str) -> str | None:
        """The .json's field, or the .txt; both only where they say the same."""
        column = self.config.prompt_column
        prompt = fields.get(column)
        if not isinstance(prompt, str | None):
            raise RowError("row_unreadable", f"the field {column} of sample {place} holds no text")
        content = sample.content("txt") if column == _DEFAULT_PROMPT else None
        text = None if content is None else content.decode("utf-8-sig", "surrogateescape")
        if prompt is None or text is None:
            return text if prompt is None else prompt
        if prompt.strip() != text.strip():
            sentence = f"sample {place} has one prompt in its .txt and another in its .json; keep one of them"
            raise RowError("row_unreadable", sentence)
        return prompt

    def _with_picture(self, row: InputRow, sample: _TarSample) -> InputRow:
        pictures = pictures_among(sample.endings, self.config.image_column)
        if row.error is not None or not pictures:
            return row
        if len(pictures) > 1:
            sentence = (
                f"sample {row.sample_id} has {len(pictures)} pictures; input.image_column names one by its ending"
            )
            return failed(row, RowError("row_unreadable", sentence))
        return dataclasses.replace(row, image=sample.content(pictures[0]))


def _refuse_unsafe(sample: _TarSample, place: str) -> None:
    if sample.key.startswith("/") or ".." in sample.key.split("/"):
        raise RowError("row_unreadable", f"sample {place} has a member name that leads out of its folder")
    if not all(part.member.isreg() for part in sample.parts):
        raise RowError("row_unreadable", f"sample {place} has a member that is a link or a device, not a file")
    if any(part.member.issparse() for part in sample.parts):
        raise RowError("row_unreadable", f"sample {place} has a member with holes (GNU sparse); pack it without")
    if len(set(sample.endings)) < len(sample.parts):
        raise RowError("row_unreadable", f"sample {place} has two members of one ending")
    if any(part.extension in ("txt", "json") and part.member.size > LONGEST_LINE for part in sample.parts):
        raise RowError("row_unreadable", f"sample {place} has a text of more than {LONGEST_LINE:,} bytes")


def _fields(sample: _TarSample, place: str) -> Mapping[str, Any]:
    text = sample.content("json")
    fields = {} if text is None else json_object(text)
    if fields is None:
        raise RowError("row_unreadable", f"the .json of sample {place} is no JSON object in UTF-8")
    return fields


def _note_of(strangers: Sequence[str]) -> tuple[str, ...]:
    """The sentence about members without a key or an extension; none when there are none."""
    if not strangers:
        return ()
    subject = "1 tar member belongs" if len(strangers) == 1 else f"{len(strangers):,} tar members belong"
    return (f"{subject} to no sample (no extension, or no name before it): {named(strangers)}",)


class _Bounded:
    """A file that is never asked for more bytes than it has: memory for them is taken first, whatever a header says."""

    def __init__(self, file: IO[bytes]) -> None:
        here, self._file = file.tell(), file
        self.size = file.seek(0, os.SEEK_END)
        file.seek(here)
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        """At most so many bytes."""
        return self._file.read(max(min(size, self.size - self.tell()), 0))


def _samples(opened: IO[bytes], name: str, strangers: list[str] | None = None) -> Iterator[_TarSample]:
    """The samples from where `opened` stands, in order; reads headers only. Raises `InputError` for a damaged tar."""
    try:
        bounded = _Bounded(opened)
        with tarfile.open(fileobj=bounded, mode="r:") as tar:  # type: ignore[call-overload]  # reads, seeks and tells
            for key, parts in groupby(_parts(tar, bounded, name, strangers), key=lambda part: part.key):
                yield _TarSample(key, tuple(parts), tar)
    except (tarfile.TarError, ValueError, OverflowError) as error:
        opened.seek(0)
        refuse_compressed(opened.read(LONGEST), name)
        raise InputError(f"{name} is no plain, complete tar file: {error}") from error
    except RecursionError:  # tarfile calls itself for each
        raise InputError(f"{name} is no sound tar file: too many headers stand before a member") from None


def _parts(tar: tarfile.TarFile, opened: _Bounded, name: str, strangers: list[str] | None) -> Iterator[_Part]:
    end = 0
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # it would keep every header
        _refuse_senseless(tar, member, end, opened.size, name)
        end = tar.offset
        match = _NAME.match(member.name)
        if member.isdir():
            continue
        if match and not posixpath.basename(member.name).startswith("__"):
            yield _Part(printable(match[1]), printable(match[2]).lower(), member)
        elif strangers is not None:
            strangers.append(printable(member.name))
    _refuse_damaged_end(tar, opened, name)


def _refuse_senseless(tar: tarfile.TarFile, member: tarfile.TarInfo, end: int, size: int, name: str) -> None:
    """A member that ends before it begins sends a walk back, for ever; what holds for all is not seen from a shard."""
    if member.size < 0 or not end < tar.offset <= size + _BLOCK:
        raise InputError(f"{name} is no complete tar file: the member at byte {member.offset:,} ends outside of it")
    for field in ("path", "size", "linkpath", "hdrcharset"):
        if field in tar.pax_headers:
            raise InputError(f"{name} has a global header that sets the {field} of all members: pack it without")


def _refuse_damaged_end(tar: tarfile.TarFile, opened: _Bounded, name: str) -> None:
    """A header that is no header ends a walk without a word: what follows would be lost."""
    opened.seek(tar.offset)
    block = opened.read(_BLOCK)
    if block.strip(b"\0"):
        raise InputError(f"{name} is damaged at byte {tar.offset:,}: the rest of it cannot be read")
