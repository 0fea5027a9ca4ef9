"""Passes of a few positions over caches through the C kernels: the causal branch, a window of drafts, the fusion.

What is asked of them is what the modules do, in float32; the modules stay the reference. Matrices are held a second
time, in the order in which the kernels read them; where weights have changed that is done anew with the next cache.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from caddf.caches import KVCache
from caddf.models.fusion import CrossFusion
from caddf.models.layers import SHARPNESS, Attention, KeysValues, Layer, state_of
from caddf.native.build import library
from caddf.native.structures import (
    CAttention,
    CCache,
    CFusing,
    CFusion,
    CLayer,
    CMap,
    CNorm,
    CPass,
    CPreparing,
    CStack,
    address,
    cache_of,
)
from caddf.quantise import Quantisation, integers

WIDEST = 512
"""Most positions of a pass; at about twice as many a BLAS is as fast."""
ALONE = 1 << 20
"""Bytes of weights below which a pass is one thread's: others would wait longer than they work."""
ACTIVATIONS = {"gelu": 1, "relu2": 2}
"""Their numbers in `maps.c`."""
KINDS: tuple[Quantisation | None, ...] = (None, "bf16", "int8")
"""Of weights, each of half the bytes of the one before."""

Biases = tuple[Tensor, Tensor] | None
"""Slopes and sides of an attention's heads (`layers.nearest`)."""


class Weights:
    """Structures of C that point to weights, and what must live as long as they do.

    Matrices are copied into panels, of the `kind` that they were rounded to (None: float32). `far` says that the model
    they are of is larger than caches are.
    """

    def __init__(self, kind: Quantisation | None = None, far: bool = False) -> None:
        self.kind, self.far, self.bytes = kind, far, 0
        self.kept: list[Any] = []

    def map(self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None = None) -> CMap:
        """A linear map, its matrix in panels of 16 outputs; int8 of two inputs at a time."""
        (out, width), scales, weight = weight.shape, None, weight.detach()
        if self.kind == "int8":
            weight, scales = integers(weight)
            scales = F.pad(scales, (0, -out % 64))
        elif self.kind == "bf16":
            weight = weight.bfloat16()
        together = 2 if self.kind == "int8" else 1
        panels = F.pad(weight, (0, -width % together, 0, -out % 64))
        panels = panels.view(len(panels) // 16, 16, -1, together).transpose(1, 2).contiguous()
        self.kept += [panels, scales, bias]
        self.bytes += panels.numel() * panels.element_size()
        which = KINDS.index(self.kind)
        return CMap(
            panels=panels.data_ptr(), scales=address(scales), bias=address(bias), out=out, type=which, far=self.far,
            **{"in": width},
        )  # fmt: skip

    def linear(self, module: nn.Linear) -> CMap:
        """That of a module."""
        return self.map(module.weight, module.bias)

    def norm(self, module: nn.LayerNorm) -> CNorm:
        """A layer norm."""
        self.kept += [module.weight, module.bias]
        return CNorm(address(module.weight), address(module.bias), module.eps)

    def attention(self, norm: nn.LayerNorm, module: Attention, biases: Biases) -> CAttention:
        """Attention behind its norm; `biases` are slopes and sides of its heads."""
        self.kept.append(biases)
        slope, side = biases or (None, None)
        return CAttention(
            norm=self.norm(norm), query=self.linear(module.query), key_value=self.linear(module.key_value),
            out=self.linear(module.out), heads=module.heads, slope=address(slope), side=address(side),
            sharpness=SHARPNESS if module.qk_norm else 0,
        )  # fmt: skip

    def layer(self, module: Layer, crossed: bool, biases: Sequence[Biases] = (None, None)) -> CLayer:
        """A layer; `biases` are those of its attention to its own kind, and across."""
        return CLayer(
            self.attention(module.attention_norm, module.attention, biases[0]),
            self.attention(module.cross_norm, module.cross, biases[1]) if crossed else CAttention(),
            self.norm(module.mlp_norm), self.linear(module.mlp.up), self.linear(module.mlp.down),
            ACTIVATIONS[module.mlp.activation],
        )  # fmt: skip

    def array(self, kind: type[ctypes.Structure], items: Sequence[ctypes.Structure]) -> int:
        """The address of an array of structures."""
        held = (kind * len(items))(*items)
        self.kept.append(held)
        return ctypes.addressof(held)


class StackPass:
    """A stack of layers, and how a pass runs through it."""

    def __init__(
        self,
        weights: Weights,
        layers: Sequence[CLayer],
        norm: nn.LayerNorm,
        context: int,
        join: tuple[nn.LayerNorm, nn.Linear] | None = None,
        exchange: Sequence[Attention] = (),
    ) -> None:
        self.weights, self.run = weights, cast(Callable[..., int], library().caddf_stack)
        self.width, hidden = norm.normalized_shape[0], layers[0].up.out
        maps = [
            CAttention(key_value=weights.linear(attention.key_value), heads=attention.heads) for attention in exchange
        ]
        self.stack = CStack(
            layers=weights.array(CLayer, layers), count=len(layers), width=self.width, hidden=hidden,
            before_norm=weights.norm(join[0]) if join else CNorm(), join=weights.linear(join[1]) if join else CMap(),
            norm=weights.norm(norm), exchange=weights.array(CAttention, maps), exchanges=len(maps),
            exchange_width=maps[0].key_value.out // 2 if maps else 0, context=context,
        )  # fmt: skip

    def __call__(
        self,
        x: Float[Tensor, "B n D"],
        positions: Int[Tensor, "B n"] | Int[Tensor, " n"],
        own: KVCache,
        *,
        turns: bool,
        source: KVCache | None = None,
        until: Int[Tensor, " B"] | None = None,
        source_context: int = 0,
        exchange: KVCache | None = None,
        angles: tuple[Tensor, Tensor] | None = None,
        lengths: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B n D"]:
        """`x` after all layers, in its own place; keys and values are written into `own`, and `exchange` where given.

        `turns` says whether attention is rotary, by the angles of `own` or by `angles`; in a window the first
        `lengths` places of a row see each other (not set, all).
        """
        x, positions = x.contiguous(), positions.contiguous()
        cos, sin = (angles or own.turns or (None, None)) if turns else (None, None)
        exchange_cos, exchange_sin = (exchange.turns if exchange is not None else None) or (None, None)
        given = CPass(
            rows=x.shape[0], n=x.shape[1], x=x.data_ptr(), positions=positions.data_ptr(),
            alike=positions.ndim == 1, cos=address(cos), sin=address(sin), own=cache_of(own), source=cache_of(source),
            until=address(until), source_context=source_context, exchange=cache_of(exchange),
            exchange_cos=address(exchange_cos), exchange_sin=address(exchange_sin),
            threads=threads_for(self.weights.bytes, x.shape[0] * x.shape[1]), lengths=address(lengths),
        )  # fmt: skip
        if self.run(ctypes.addressof(self.stack), ctypes.addressof(given)):
            raise MemoryError("the kernels' working memory could not be had")
        return x


class FusionPass:
    """The fusion of the branches."""

    def __init__(self, weights: Weights, fusion: CrossFusion, biases: Biases) -> None:
        self.weights = weights
        cross, mixer = fusion.cross, fusion.mixer
        weights.kept.append(biases)
        attention = CAttention(
            query=weights.linear(cross.query), key_value=weights.linear(cross.key_value), out=weights.linear(cross.out),
            heads=cross.heads, slope=address(biases and biases[0]), side=address(biases and biases[1]),
        )  # fmt: skip
        own = CMap() if mixer.own is None else weights.linear(mixer.own)
        self.width, self.heads = mixer.norm.normalized_shape[0], cross.heads
        self.own_width = 0 if mixer.own is None else mixer.own.in_features
        self.fusion = CFusion(
            cross=attention, up=weights.linear(mixer.mlp.up), own=own, down=weights.linear(mixer.mlp.down),
            norm=weights.norm(mixer.norm), width=self.width, own_width=self.own_width,
        )  # fmt: skip

    def prepare(
        self, states: Float[Tensor, "B m d"], positions: Int[Tensor, "B m"], turns: tuple[Tensor, Tensor]
    ) -> KeysValues:
        """Keys and values of the states of a canvas."""
        rows, count = positions.shape
        states, positions, into = states.contiguous(), positions.contiguous(), positions.new_zeros(rows)
        keys, values = states.new_empty(2, rows, self.heads, count, self.width // self.heads)
        made = states.new_empty(rows, count, 2 * self.width)
        given = CPreparing(
            fusion=ctypes.addressof(self.fusion), rows=rows, n=count, states=states.data_ptr(),
            positions=positions.data_ptr(), into=into.data_ptr(), cos=address(turns[0]), sin=address(turns[1]),
            canvas=CCache(keys.data_ptr(), values.data_ptr(), count), made=made.data_ptr(),
        )  # fmt: skip
        library().caddf_prepare(ctypes.addressof(given), threads_for(self.weights.bytes, rows * count))
        return keys, values

    def __call__(
        self,
        x: Float[Tensor, "B n D"],
        positions: Int[Tensor, "B n"],
        turns: tuple[Tensor, Tensor],
        canvas: KeysValues,
        own: Float[Tensor, "B m d"],
        slots: Int[Tensor, "3 B n"],
    ) -> Float[Tensor, "B n D"]:
        """Fused states over the keys and values and the states of m slots.

        `slots` are that at which each position stands, and the first that it sees and the end of those.
        """
        x, own, slots = x.clone(memory_format=torch.contiguous_format), own.contiguous(), slots.contiguous()
        slot, since, end = map(address, slots)
        given = CFusing(
            rows=x.shape[0], n=x.shape[1], x=x.data_ptr(), positions=positions.data_ptr(), slot=slot, to=end,
            cos=address(turns[0]), sin=address(turns[1]),
            canvas=CCache(canvas[0].data_ptr(), canvas[1].data_ptr(), canvas[0].shape[2]), own=own.data_ptr(),
            threads=threads_for(self.weights.bytes, x.shape[0] * x.shape[1]), **{"from": since},
        )  # fmt: skip
        if library().caddf_fuse(ctypes.addressof(self.fusion), ctypes.addressof(given)):
            raise MemoryError("the kernels' working memory could not be had")
        return x


def threads_for(weights: int, positions: int) -> int:
    """How many threads a pass of so many positions over so many bytes of weights is worth."""
    return 1 if weights * -(-positions // 4) < ALONE else torch.get_num_threads()


def few(positions: Tensor) -> bool:
    """Whether a pass of so many positions is one for the kernels."""
    return positions.numel() <= WIDEST and not torch.is_grad_enabled()


class NativeHead(nn.Module):
    """A head's logits: through the kernels for a few states, whose bits do not depend on how many are read together."""

    def __init__(self, table: Callable[[], Float[Tensor, "V D"]], weights: Callable[[], Weights] = Weights) -> None:
        super().__init__()
        self.table, self.weights = table, weights
        self.held: tuple[tuple[object, ...], tuple[CMap, Weights, Tensor]] | None = None

    def tokens(self) -> tuple[CMap, Weights, Tensor]:
        """The map of states to logits, of the weights as they are now, and what must live as long as it is used."""
        table, weights = self.table(), self.weights()
        which = (*state_of(table), weights.kind)
        if self.held is None or self.held[0] != which:
            self.held = (which, (weights.map(table), weights, table))  # the table, so that no other is where it was
        return self.held[1]

    def __len__(self) -> int:
        """V."""
        return len(self.table())

    def forward(self, states: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """`states E^T`."""
        table = self.table()
        readable = table.dtype == states.dtype == torch.float32 and table.device.type == "cpu"
        if not readable or len(states) > WIDEST or torch.is_grad_enabled() or not len(states):
            return F.linear(states, table)
        held = self.tokens()
        states, logits = states.contiguous(), states.new_empty(len(states), len(table))
        threads = threads_for(table.numel() * 4, len(states))
        library().caddf_map(
            ctypes.addressof(held[0]), len(states), states.data_ptr(), logits.data_ptr(), threads
        )  # fmt: skip
        return logits
