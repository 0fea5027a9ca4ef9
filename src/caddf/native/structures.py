"""The structures of the kernels in C, field by field, as `layout.c` has them once more for `compare`."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

from jaxtyping import Int
from torch import Tensor

from caddf.caches import KVCache
from caddf.categorical import Warp

_pointer, _number = ctypes.c_void_p, ctypes.c_int64


class CMap(ctypes.Structure):
    """A linear map over panels."""

    _fields_ = (
        ("panels", _pointer), ("scales", _pointer), ("bias", _pointer), ("out", _number), ("in", _number),
        ("type", _number), ("far", _number),
    )  # fmt: skip


class CNorm(ctypes.Structure):
    """A layer norm."""

    _fields_ = (("weight", _pointer), ("bias", _pointer), ("epsilon", ctypes.c_double))


class CCache(ctypes.Structure):
    """Keys and values of all layers."""

    _fields_ = (("keys", _pointer), ("values", _pointer), ("slots", _number))


class CAttention(ctypes.Structure):
    """Attention behind its norm."""

    _fields_ = (
        ("norm", CNorm), ("query", CMap), ("key_value", CMap), ("out", CMap), ("heads", _number),
        ("slope", _pointer), ("side", _pointer), ("sharpness", ctypes.c_double),
    )  # fmt: skip


class CLayer(ctypes.Structure):
    """A Transformer layer."""

    _fields_ = (
        ("self", CAttention), ("cross", CAttention), ("mlp_norm", CNorm), ("up", CMap), ("down", CMap),
        ("activation", _number),
    )  # fmt: skip


class CStack(ctypes.Structure):
    """A stack of layers."""

    _fields_ = (
        ("layers", _pointer), ("count", _number), ("width", _number), ("hidden", _number), ("before_norm", CNorm),
        ("join", CMap), ("norm", CNorm), ("exchange", _pointer), ("exchanges", _number), ("exchange_width", _number),
        ("context", _number),
    )  # fmt: skip


class CPass(ctypes.Structure):
    """A pass through a stack."""

    _fields_ = (
        ("rows", _number), ("n", _number), ("x", _pointer), ("before", _pointer), ("positions", _pointer),
        ("alike", _number), ("cos", _pointer), ("sin", _pointer), ("own", CCache), ("source", CCache),
        ("until", _pointer), ("source_context", _number), ("exchange", CCache), ("exchange_cos", _pointer),
        ("exchange_sin", _pointer), ("threads", _number), ("lengths", _pointer), ("first", _pointer),
    )  # fmt: skip


class CFusion(ctypes.Structure):
    """The fusion of the branches."""

    _fields_ = (
        ("cross", CAttention), ("up", CMap), ("own", CMap), ("down", CMap), ("norm", CNorm), ("width", _number),
        ("own_width", _number),
    )  # fmt: skip


class CFusing(ctypes.Structure):
    """A pass through it."""

    _fields_ = (
        ("rows", _number), ("n", _number), ("x", _pointer), ("positions", _pointer), ("slot", _pointer),
        ("from", _pointer), ("to", _pointer), ("cos", _pointer), ("sin", _pointer), ("canvas", CCache),
        ("own", _pointer), ("threads", _number), ("first", _pointer),
    )  # fmt: skip


class CPreparing(ctypes.Structure):
    """What the fusion reads of a canvas."""

    _fields_ = (
        ("fusion", _pointer), ("rows", _number), ("n", _number), ("states", _pointer), ("positions", _pointer),
        ("into", _pointer), ("cos", _pointer), ("sin", _pointer), ("canvas", CCache), ("made", _pointer),
        ("first", _pointer),
    )  # fmt: skip


class CWarp(ctypes.Structure):
    """A warp of logits."""

    _fields_ = (
        ("temperature", ctypes.c_double), ("top_p", ctypes.c_double), ("min_p", ctypes.c_double), ("top_k", _number),
        ("banned", _pointer), ("bans", _number),
    )  # fmt: skip


class CDraft(ctypes.Structure):
    """Drafts of a chain."""

    _fields_ = (
        ("rows", _number), ("width", _number), ("count", _number), ("counts", _pointer), ("states", _pointer),
        ("before", _pointer),
        ("earlier", _pointer), ("first", _pointer), ("heard", _pointer), ("u", _pointer), ("embedding", _pointer),
        ("shifted", _pointer), ("head", CMap), ("ids", _pointer), ("given", _pointer), ("warp", CWarp),
        ("vocabulary", _number), ("least", ctypes.c_double), ("cache", CCache),
        ("cos", _pointer), ("sin", _pointer), ("tokens", _pointer), ("q", _pointer), ("drafts", _pointer),
        ("threads", _number),
    )  # fmt: skip


class CCanvas(ctypes.Structure):
    """The canvases of a fused target."""

    _fields_ = (
        ("fusion", _pointer), ("fusing", _pointer), ("block", _number), ("seen", _pointer), ("stack", _pointer),
        ("pass", _pointer), ("mask", _pointer), ("start", _pointer), ("into", _pointer),
    )  # fmt: skip


class CRound(ctypes.Structure):
    """A round of speculation, or one token of each row."""

    _fields_ = (
        ("rows", _number), ("length", _number), ("size", _number), ("mask", _number), ("bos", _number),
        ("lookup", _number), ("copies", _number), ("most", _number), ("renew", _number), ("since", _pointer),
        ("before", _pointer), ("lengths", _pointer), ("n", _pointer), ("held", _pointer), ("active", _pointer),
        ("causal", _pointer), ("window", _pointer), ("chain", _pointer), ("pass", _pointer), ("look", _pointer),
        ("draft", _pointer), ("canvas", _pointer), ("head", CMap), ("warp", CWarp),
        ("head_threads", _number), ("embedding", _pointer), ("shifted", _pointer), ("table", _pointer),
        ("logits", _pointer), ("u", _pointer), ("places", _number), ("x", _pointer), ("drafts", _pointer),
        ("fresh", _pointer), ("corrected", _pointer), ("next", _pointer), ("read", _pointer), ("work", _pointer),
    )  # fmt: skip


MIRRORED = [each for each in list(globals().values()) if isinstance(each, type) and issubclass(each, ctypes.Structure)]


class _Place(ctypes.Structure):
    """An entry of `layout.c`."""

    _fields_ = (("structure", ctypes.c_char_p), ("field", ctypes.c_char_p), ("offset", _number), ("size", _number))


def compare(library: ctypes.CDLL, structures: Iterable[type[ctypes.Structure]] = MIRRORED) -> None:
    """Raises `RuntimeError` where one of `structures` is not laid out as the library's."""
    there: dict[str, dict[str, tuple[int, int]]] = {}
    count = _number.in_dll(library, "caddf_places").value
    for place in (_Place * count).in_dll(library, "caddf_layout"):
        there.setdefault(f"C{place.structure.decode()}", {})[place.field.decode()] = place.offset, place.size
    for each in structures:
        fields = ((name, getattr(each, name)) for name, *_ in each._fields_)
        mine = {name: (field.offset, field.size) for name, field in fields} | {"": (0, ctypes.sizeof(each))}
        theirs = there.get(each.__name__, {})
        if mine != theirs:
            wrong = ", ".join(name or "its size" for name in mine | theirs if mine.get(name) != theirs.get(name))
            raise RuntimeError(f"{each.__name__} of structures.py is not laid out as in the kernels in C: {wrong}")


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's numbers are; NULL for none."""
    return None if tensor is None else tensor.data_ptr()


def warp_of(warp: Warp, banned: Int[Tensor, " N"]) -> CWarp:
    """A warp as C sees it; `banned` are the logits of its banned tokens, which the caller holds."""
    return CWarp(warp.temperature, warp.top_p, warp.min_p, warp.top_k, banned.data_ptr(), len(banned))


def cache_of(cache: KVCache | None) -> CCache:
    """A cache as C sees it; all NULL for none."""
    return CCache() if cache is None else CCache(cache.keys.data_ptr(), cache.values.data_ptr(), cache.length)
