"""MDS, the shards of the MosaicML streaming library, read without it.

A shard is `count`, `count + 1` offsets (all uint32, little-endian), the description of its columns as JSON up to the
first offset, and the rows. A row is the sizes of those of its values that have no fixed size (uint32), then the values.
`index.json` beside the shards lists them with their sizes. Source: `streaming/base/format/mds` of mosaicml/streaming.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from caddf.errors import InputError

INDEX = "index.json"
_SIZE = np.dtype("<u4")


def shard_rows(data: bytes) -> Iterator[dict[str, Any]]:
    """The rows of a shard, with those columns that are text, JSON or numbers; raises `InputError` if it is damaged."""
    try:
        count = int(np.frombuffer(data, _SIZE, 1)[0])
        offsets = np.frombuffer(data, _SIZE, count + 1, offset=_SIZE.itemsize).tolist()
        about = json.loads(data[_SIZE.itemsize * (count + 2) : offsets[0]])
        columns = list(zip(about["column_names"], about["column_encodings"], about["column_sizes"], strict=True))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"it is no MDS shard, or only part of one ({error})") from None
    if offsets[-1] != len(data):
        raise InputError(f"it has {len(data)} bytes, and as an MDS shard should have {offsets[-1]}")
    for start in offsets[:-1]:
        open_sizes = sum(size is None for _, _, size in columns)
        sizes = iter(np.frombuffer(data, _SIZE, open_sizes, start).tolist())
        start += open_sizes * _SIZE.itemsize
        row = {}
        for name, encoding, fixed in columns:
            size = next(sizes) if fixed is None else fixed
            # Pickled columns are left out with the rest: to read one is to run what it says.
            if (decode := _DECODERS.get(encoding.partition(":")[0])) is not None:
                row[name] = decode(data[start : start + size], encoding)
            start += size
        yield row


def check_index(path: Path) -> None:
    """Raises `InputError` where a shard that `index.json` lists is missing or has another size."""
    index = json.loads(path.read_text(encoding="utf-8"))
    for shard in index["shards"]:
        stored = [about for about in (shard["raw_data"], shard.get("zip_data")) if about]
        files = [(path.parent / about["basename"], about["bytes"]) for about in stored]
        if not any(file.is_file() for file, _ in files):
            raise InputError(f"{path} lists {stored[-1]['basename']}, which is not there; fetch it too")
        for file, size in files:
            if file.is_file() and file.stat().st_size != size:
                raise InputError(f"{file} has {file.stat().st_size} bytes; {path} says {size}: fetch it anew")


def _array(data: bytes, encoding: str) -> Shaped[np.ndarray, "..."]:
    """`ndarray[:dtype[:shape]]`: what the encoding leaves open stands before the values."""
    _, _, rest = encoding.partition(":")
    dtype, _, shape = rest.partition(":")
    start = 0
    if not dtype:
        dtype, start = _DTYPES[data[0]], 1
    if shape:
        sizes = [int(size) for size in shape.split(",")]
    else:
        # Number of axes, and log2 of the bytes of each size in the lowest two bits.
        axes, width = data[start] >> 2, 1 << (data[start] & 3)
        sizes = np.frombuffer(data, f"<u{width}", axes, start + 1).tolist()
        start += 1 + axes * width
    return np.frombuffer(data, np.dtype(dtype).newbyteorder("<"), offset=start).reshape(sizes)


_DTYPES = {8 * 2**k: f"uint{8 * 2**k}" for k in range(4)} | {8 * 2**k + 1: f"int{8 * 2**k}" for k in range(4)}
_DECODERS = {
    "str": lambda data, _: data.decode("utf-8"),
    "json": lambda data, _: json.loads(data),
    "int": lambda data, _: int(np.frombuffer(data, "<i8")[0]),
    "ndarray": _array,
}
