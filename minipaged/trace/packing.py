"""Record bodies as bytes: a JSON head and named little-endian columns, compressed.

A body is zlib(u32 length of head, head, columns one after another); the head's "columns" lists [name, dtype,
length]. Empty columns are left out. A reader takes the columns it knows by name and keeps the rest with the record.
No pickle: a trace may come from anywhere. codec.py says what the columns mean.
"""

from __future__ import annotations

import json
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from minipaged.errors import TraceError

Array = npt.NDArray[Any]
Columns = dict[str, Array]
Head = dict[str, Any]

MAX_BODY_BYTES = 1 << 26  # uncompressed; a larger one is damage or malice
MAX_HEAD_BYTES = 1 << 22
_U32 = struct.Struct("<I")
_write_json = json.JSONEncoder(separators=(",", ":")).encode
_DTYPES = frozenset({"<i8", "<i4", "<f8", "|u1", "<u2", "<u4", "<u8"})


def pack(head: Head, columns: Columns, *, level: int = 1) -> bytes:
    """A record's body. level: zlib's; 0 for a stream that goes no farther than to another process."""
    kept = [(name, column) for name, column in columns.items() if len(column)]
    head = {**head, "columns": [[name, column.dtype.str, len(column)] for name, column in kept]}
    text = _write_json(head).encode()
    return zlib.compress(b"".join([_U32.pack(len(text)), text, *(column.tobytes() for _, column in kept)]), level)


def unpack(body: bytes, *, most: int = MAX_HEAD_BYTES) -> tuple[Head, Columns]:
    """Head and columns of a body. Raises TraceError if it is not one. most: bytes of a head; a process of our own may send more."""
    try:
        raw = _inflate(body)
        (size,) = _U32.unpack_from(raw)
        head = read_json(raw[4 : 4 + size]) if size <= most else {}
        columns: Columns = {}
        offset = 4 + size
        for name, dtype, length in head.pop("columns"):
            if dtype not in _DTYPES:
                raise TraceError(f"a trace column of type {dtype!r:.20} cannot be read")
            if type(name) is not str or type(length) is not int or length < 0:
                raise TraceError("a trace record does not name its columns")
            column = np.frombuffer(raw, dtype, length, offset)
            columns[name] = column
            offset += column.nbytes
        return head, columns
    except TraceError:
        raise
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TraceError(f"a trace record cannot be read: {error}") from None


def read_json(text: bytes) -> Any:
    """What a JSON text says. ValueError or RecursionError if it is none; Infinity and NaN are no JSON."""
    return json.loads(text, parse_constant=_refuse)


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no number")


def recompress(body: bytes) -> bytes:
    """A body that was packed at level 0, smaller. Raises TraceError if it is none."""
    return zlib.compress(_inflate(body), 1)


def _inflate(body: bytes) -> bytes:
    try:
        stream = zlib.decompressobj()
        raw = stream.decompress(body, MAX_BODY_BYTES)
    except zlib.error as error:
        raise TraceError(f"a trace record cannot be read: {error}") from None
    if not stream.eof:
        raise TraceError(f"a trace record is cut short or larger than {MAX_BODY_BYTES} bytes")
    return raw
