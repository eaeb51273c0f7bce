"""Files that hold the SHA-256 of all their own bytes, so that one of them alone tells that it is whole.

    JSON       the checksum of all the rest is the last entry
    Parquet    the footer's key-value metadata hold it, and it is taken with zeros in its own place

A Parquet file's pages have checksums of their own besides, for those who read a part of it. Knows nothing of folders.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

CHECKSUM: Final = "checksum"
"""Key of a JSON file's own checksum."""
SEAL: Final = "guardalign.seal"
"""Key of a Parquet file's own checksum."""
_ZEROS: Final = b"0" * 64
_MARK: Final = SEAL.encode() + b"\x18" + bytes([len(_ZEROS)])
"""What stands before its digits: the key, then the value's place and length as Thrift's compact protocol has them."""


def sha256(content: bytes) -> str:
    """In hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def as_json(content: Mapping[str, Any]) -> bytes:
    """A JSON file."""
    return json.dumps(content, indent=1, ensure_ascii=False).encode()


def sealed_json(content: Mapping[str, Any]) -> bytes:
    """A JSON file with the SHA-256 of all the rest of it as its last entry."""
    rest = {key: value for key, value in content.items() if key != CHECKSUM}
    return as_json(rest | {CHECKSUM: sha256(as_json(rest))})


def is_whole_json(file: bytes, content: Mapping[str, Any]) -> bool:
    """Whether the file, which says `content`, is what `sealed_json` made, byte for byte."""
    try:
        return file == sealed_json(content)
    except UnicodeEncodeError:  # half a character: nothing that was ever written
        return False


def sealed_parquet(table: pa.Table) -> bytes:
    """A Parquet file (zstd, one row group) with its seal, and a checksum on every page."""
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, table.schema, compression="zstd", write_page_checksum=True) as writer:
        writer.write_table(table, row_group_size=max(table.num_rows, 1))
        writer.add_key_value_metadata({SEAL: _ZEROS.decode()})
    content = buffer.getvalue()
    begin = content.rindex(_MARK + _ZEROS) + len(_MARK)
    return content[:begin] + sha256(content).encode() + content[begin + len(_ZEROS) :]


def is_whole_parquet(content: bytes) -> bool:
    """Whether the file is what `sealed_parquet` made, byte for byte; False for one without a seal."""
    mark = content.rfind(_MARK)
    if mark < 0:
        return False
    begin = mark + len(_MARK)
    end = begin + len(_ZEROS)
    return content[begin:end] == sha256(content[:begin] + _ZEROS + content[end:]).encode()
