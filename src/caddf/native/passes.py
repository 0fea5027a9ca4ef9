"""Passes of a few positions over caches through the C kernels: the causal branch, a window of drafts, a chain's step.

What is asked of them is what the modules do, in float32; the modules stay the reference. Matrices are held a second
time, in the order in which the kernels read them; where weights have changed that is done anew with the next cache.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from caddf.caches import Caches, KVCache, Slots
from caddf.models.causal import CausalBranch
from caddf.models.chain import DraftChain
from caddf.models.diffusion import DiffusionBranch
from caddf.models.layers import Attention, Layer, nearest, state_of
from caddf.native.build import library
from caddf.quantise import Quantisation, integers

WIDEST = 96
"""Most positions of a pass; beyond, matrix products of many rows are the faster ones."""
ALONE = 1 << 20
"""Bytes of weights below which a pass is one thread's: others would wait longer than they work."""
NEAR = 24 << 20
"""Bytes of a model up to which its weights stay in a processor's caches; beyond, they are fetched ahead."""
KINDS: tuple[Quantisation | None, ...] = (None, "bf16", "int8")
"""Of weights, each of half the bytes of the one before."""

Biases = tuple[Tensor, Tensor] | None
"""Slopes and sides of an attention's heads (`layers.nearest`)."""

_pointer, _number = ctypes.c_void_p, ctypes.c_int64


class _Map(ctypes.Structure):
    _fields_ = (
        ("panels", _pointer), ("scales", _pointer), ("bias", _pointer), ("out", _number), ("in", _number),
        ("type", _number), ("far", _number),
    )  # fmt: skip


class _Norm(ctypes.Structure):
    _fields_ = (("weight", _pointer), ("bias", _pointer), ("epsilon", ctypes.c_double))


class _Cache(ctypes.Structure):
    _fields_ = (("keys", _pointer), ("values", _pointer), ("slots", _number))


class _Attention(ctypes.Structure):
    _fields_ = (
        ("norm", _Norm), ("query", _Map), ("key_value", _Map), ("out", _Map), ("heads", _number),
        ("slope", _pointer), ("side", _pointer),
    )  # fmt: skip


class _Layer(ctypes.Structure):
    _fields_ = (("self", _Attention), ("cross", _Attention), ("mlp_norm", _Norm), ("up", _Map), ("down", _Map))


class _Stack(ctypes.Structure):
    _fields_ = (
        ("layers", _pointer), ("count", _number), ("width", _number), ("hidden", _number), ("before_norm", _Norm),
        ("join", _Map), ("norm", _Norm), ("exchange", _pointer), ("exchanges", _number), ("exchange_width", _number),
        ("context", _number),
    )  # fmt: skip


class _Pass(ctypes.Structure):
    _fields_ = (
        ("rows", _number), ("n", _number), ("x", _pointer), ("before", _pointer), ("positions", _pointer),
        ("alike", _number), ("cos", _pointer), ("sin", _pointer), ("own", _Cache), ("source", _Cache),
        ("until", _pointer), ("source_context", _number), ("exchange", _Cache), ("exchange_cos", _pointer),
        ("exchange_sin", _pointer), ("threads", _number),
    )  # fmt: skip


class _Draft(ctypes.Structure):
    _fields_ = (
        ("rows", _number), ("width", _number), ("count", _number), ("states", _pointer), ("before", _pointer),
        ("first", _pointer), ("u", _pointer), ("embedding", _pointer), ("head", _Map), ("ids", _pointer),
        ("vocabulary", _number), ("temperature", ctypes.c_double), ("least", ctypes.c_double), ("cache", _Cache),
        ("cos", _pointer), ("sin", _pointer), ("tokens", _pointer), ("q", _pointer), ("drafts", _pointer),
        ("threads", _number),
    )  # fmt: skip


class Weights:
    """Structures of C that point to weights, and what must live as long as they do.

    Matrices are copied into panels, of the `kind` that they were rounded to (None: float32). `far` says that the model
    they are of is larger than caches are.
    """

    def __init__(self, kind: Quantisation | None = None, far: bool = False) -> None:
        self.kind, self.far, self.bytes = kind, far, 0
        self.kept: list[Any] = []

    def map(self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None = None) -> _Map:
        """A linear map, its matrix in panels of 16 outputs."""
        (out, width), scales, weight = weight.shape, None, weight.detach()
        if self.kind == "int8":
            weight, scales = integers(weight)
            scales = F.pad(scales, (0, -out % 64))
        elif self.kind == "bf16":
            weight = weight.bfloat16()
        panels = F.pad(weight, (0, 0, 0, -out % 64)).view(-1, 16, width).transpose(1, 2).contiguous()
        self.kept += [panels, scales, bias]
        self.bytes += panels.numel() * panels.element_size()
        which = KINDS.index(self.kind)
        return _Map(panels.data_ptr(), _address(scales), _address(bias), out, width, which, self.far)

    def linear(self, module: nn.Linear) -> _Map:
        """That of a module."""
        return self.map(module.weight, module.bias)

    def norm(self, module: nn.LayerNorm) -> _Norm:
        """A layer norm."""
        self.kept += [module.weight, module.bias]
        return _Norm(_address(module.weight), _address(module.bias), module.eps)

    def attention(self, norm: nn.LayerNorm, module: Attention, biases: Biases) -> _Attention:
        """Attention behind its norm; `biases` are slopes and sides of its heads."""
        self.kept.append(biases)
        slope, side = biases or (None, None)
        return _Attention(
            self.norm(norm), self.linear(module.query), self.linear(module.key_value), self.linear(module.out),
            module.heads, _address(slope), _address(side),
        )  # fmt: skip

    def layer(self, module: Layer, crossed: bool, biases: Sequence[Biases] = (None, None)) -> _Layer:
        """A layer; `biases` are those of its attention to its own kind, and across."""
        return _Layer(
            self.attention(module.attention_norm, module.attention, biases[0]),
            self.attention(module.cross_norm, module.cross, biases[1]) if crossed else _Attention(),
            self.norm(module.mlp_norm), self.linear(module.mlp.up), self.linear(module.mlp.down),
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
        layers: Sequence[_Layer],
        norm: nn.LayerNorm,
        context: int,
        join: tuple[nn.LayerNorm, nn.Linear] | None = None,
        exchange: Sequence[Attention] = (),
    ) -> None:
        self.weights, self.run = weights, cast(Callable[..., int], library().caddf_stack)
        self.width, hidden = norm.normalized_shape[0], layers[0].up.out
        maps = [
            _Attention(key_value=weights.linear(attention.key_value), heads=attention.heads) for attention in exchange
        ]
        self.stack = _Stack(
            weights.array(_Layer, layers), len(layers), self.width, hidden,
            weights.norm(join[0]) if join else _Norm(), weights.linear(join[1]) if join else _Map(),
            weights.norm(norm), weights.array(_Attention, maps), len(maps),
            maps[0].key_value.out // 2 if maps else 0, context,
        )  # fmt: skip

    def __call__(
        self,
        x: Float[Tensor, "B n D"],
        positions: Int[Tensor, "B n"] | Int[Tensor, " n"],
        own: KVCache,
        *,
        turns: bool,
        before: Float[Tensor, "B n D"] | None = None,
        source: KVCache | None = None,
        until: Int[Tensor, " B"] | None = None,
        source_context: int = 0,
        exchange: KVCache | None = None,
        angles: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "B n D"]:
        """`x` after all layers, in its own place; keys and values are written into `own`, and `exchange` where given.

        `turns` says whether attention is rotary, by the angles of `own` or by `angles`.
        """
        x, positions = x.contiguous(), positions.contiguous()
        cos, sin = (angles or own.turns or (None, None)) if turns else (None, None)
        before = before if before is None else before.contiguous()
        exchange_cos, exchange_sin = (exchange.turns if exchange is not None else None) or (None, None)
        given = _Pass(
            x.shape[0], x.shape[1], x.data_ptr(), _address(before), positions.data_ptr(), positions.ndim == 1,
            _address(cos), _address(sin), _cache(own), _cache(source), _address(until), source_context,
            _cache(exchange), _address(exchange_cos), _address(exchange_sin),
            threads_for(self.weights.bytes, x.shape[0] * x.shape[1]),
        )  # fmt: skip
        if self.run(ctypes.addressof(self.stack), ctypes.addressof(given)):
            raise MemoryError("the kernels' working memory could not be had")
        return x


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _cache(cache: KVCache | None) -> _Cache:
    return _Cache() if cache is None else _Cache(cache.keys.data_ptr(), cache.values.data_ptr(), cache.length)


def _readable(*modules: nn.Module | None) -> bool:
    """Whether the kernels can read the modules' weights: float32 on a CPU, in plain maps, heads that fit."""
    parameters = [parameter for module in modules if module is not None for parameter in module.parameters()]
    heads = [part for module in modules if module is not None for part in module.modules()]
    return (
        all(p.dtype == torch.float32 and p.device.type == "cpu" and p.is_contiguous() for p in parameters)
        and all(part.size <= 256 for part in heads if isinstance(part, Attention))
        and all(isinstance(part.query, nn.Linear) for part in heads if isinstance(part, Attention))
    )


class Native:
    """A model's passes through the kernels: each gives None where a pass is not theirs, for the modules to do it."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.kind = cast(Any, model), cast("Quantisation | None", getattr(model, "weights_kind", None))
        size = sum(p.numel() for p in model.parameters()) * (4 >> KINDS.index(self.kind))
        self.weights = partial(Weights, self.kind, size > NEAR)
        self.context = cast(int, model.config.context)  # type: ignore[union-attr]
        self.branch = cast(CausalBranch, model.causal)
        diffusion, of = getattr(model, "diffusion", None), self.model.tokens_of
        self.diffusion: DiffusionBranch | None = diffusion if diffusion is not None and diffusion.mutual else None
        self.heads: dict[str, nn.Module] = {
            head: NativeHead(partial(of, head), self.weights) for head in self.model.heads
        }
        if getattr(model, "draft_tokens", None) is not None:
            self.heads["chain"] = NativeHead(self.model.small_table, self.weights)
        self._laid_out: tuple[tuple[int, int], ...] | None = None
        self._causal: StackPass | None = None
        self._window: StackPass | None = None
        self._chain: StackPass | None = None
        library()  # raises

    def refresh(self) -> None:
        """Lays the weights out for the kernels, if they have changed since that was done: with each new cache."""
        which = state_of(*self.model.parameters())
        if which == self._laid_out:
            return
        self._laid_out, branch, chain = which, self.branch, getattr(self.model, "chain", None)
        exchange = [layer.cross for layer in self.diffusion.layers] if self.diffusion is not None else []
        weights = self.weights()
        layers = [weights.layer(layer, False) for layer in branch.layers]
        self._causal = StackPass(weights, layers, branch.norm, self.context, exchange=exchange)
        if self.diffusion is not None:
            self._window = _window_pass(self.weights(), self.diffusion)
        if isinstance(chain, DraftChain):
            weights = self.weights()
            join = (chain.before_norm, chain.join)
            self._chain = StackPass(weights, [weights.layer(chain.layer, False)], chain.norm, self.context, join)

    @property
    def bytes(self) -> int:
        """Of the matrices of all passes, once they are laid out; those of a head are when it is first read."""
        passes = [each for each in (self._causal, self._window, self._chain) if each is not None]
        return sum(each.weights.bytes for each in passes)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied model has weights of its own, which these passes do not read."""
        return None

    @staticmethod
    def suits(model: nn.Module) -> bool:
        """Whether the kernels can do this model's passes over caches."""
        branch, diffusion = getattr(model, "causal", None), getattr(model, "diffusion", None)
        plain = isinstance(branch, CausalBranch) and not hasattr(branch.layers[0], "cross")
        return plain and _readable(branch, diffusion, getattr(model, "chain", None))

    def causal(self, inputs: Int[Tensor, "B n"], slots: Slots, caches: Caches) -> Float[Tensor, "B n D"] | None:
        """h_trans of `slots` over the causal branch's cache, and what the diffusion branch reads of it."""
        if self._causal is None or not _few(inputs) or (self.branch.table is not None and slots.upto > self.context):
            return None
        x = F.embedding(inputs, self.branch.embedding.weight)
        if self.branch.table is not None:
            x = x + self.branch.table(slots.positions)
        rotary = self.branch.table is None
        return self._causal(x, slots.positions, caches.causal, turns=rotary, exchange=caches.exchange)

    def window(
        self, canvas: Int[Tensor, "B n"], positions: Int[Tensor, "B n"], until: Int[Tensor, " B"], caches: Caches
    ) -> Float[Tensor, "B n d"] | None:
        """h_cad of a window per row, each position seeing all of it and the causal states up to slot `until`."""
        if self._window is None or self.diffusion is None or caches.exchange is None or not _few(canvas):
            return None
        config, (rows, n) = self.diffusion.config, canvas.shape
        x = F.embedding(canvas, self.diffusion.embedding.weight)
        own = x.new_empty(2, config.layers, rows, config.heads, n, config.width // config.heads)
        return self._window(
            x, positions, KVCache(own[0], own[1]), turns=True, angles=caches.exchange.turns, source=caches.exchange,
            until=until.expand(rows).contiguous(), source_context=self.context,
        )  # fmt: skip

    def chain(
        self, h_cad: Float[Tensor, "B n d"], before: Float[Tensor, "B n d"], slots: Slots, cache: KVCache
    ) -> Float[Tensor, "B n d"] | None:
        """Draft states at `slots` of each row's window."""
        if self._chain is None or not _few(h_cad[..., 0]):
            return None
        return self._chain(h_cad.clone(), slots.positions, cache, turns=True, before=before)

    def drafts(
        self,
        h_cad: Float[Tensor, "B k d"],
        x: Int[Tensor, "B T"],
        start: Int[Tensor, " B"],
        n: Int[Tensor, " B"],
        u: Float[Tensor, "B m"],
        cache: KVCache,
        *,
        temperature: float,
        least: float,
    ) -> tuple[Int[Tensor, "B m"], Float[Tensor, "B m V"], Int[Tensor, " B"]] | None:
        """m drafts of each row from position n on, one after the other: tokens, q, and how many are to be verified.

        `h_cad` is of the window from `start` on, before n stand the tokens `x`, and `u` has a uniform for each draft.
        Drafting ends when the product of the largest draft probabilities falls below `least`, never without a draft.
        """
        if self._chain is None or self.diffusion is None or not _few(h_cad[..., 0]):
            return None
        (rows, count), width, small = u.shape, h_cad.shape[1], self.model.draft_tokens
        before = self.model.before(x, (start[:, None] + torch.arange(width)).expand(rows, -1))
        first = (n - start).clamp(0, width - 1)
        head = cast(NativeHead, self.heads["draft" if small is None else "chain"]).tokens()
        table = self.diffusion.embedding.weight
        tokens, q = before.new_empty(rows, count), u.new_zeros(rows, count, self.model.vocab_size)
        h_cad, before, first, u = (given.contiguous() for given in (h_cad, before, first, u))
        drafted, (cos, sin) = torch.empty_like(first), cache.turns or (None, None)
        given = _Draft(
            rows, width, count, h_cad.data_ptr(), before.data_ptr(), first.data_ptr(), u.data_ptr(),
            table.data_ptr(), head, _address(small), self.model.vocab_size, temperature, least, _cache(cache),
            _address(cos), _address(sin), tokens.data_ptr(), q.data_ptr(), drafted.data_ptr(),
            threads_for(self._chain.weights.bytes + 4 * head.out * table.shape[1], rows),
        )  # fmt: skip
        if library().caddf_draft(ctypes.addressof(self._chain.stack), ctypes.addressof(given)):
            raise MemoryError("the kernels' working memory could not be had")
        return tokens, q, drafted


def _window_pass(weights: Weights, diffusion: DiffusionBranch) -> StackPass:
    config = diffusion.config
    biases: tuple[Biases, Biases] = (None, None)
    if config.alibi:
        slopes, sides = nearest(config.heads, torch.device("cpu"), torch.float32)
        biases = (slopes, sides), (slopes, torch.zeros_like(sides))
    layers = [weights.layer(layer, True, biases) for layer in diffusion.layers]
    return StackPass(weights, layers, diffusion.norm, 0)


def threads_for(weights: int, positions: int) -> int:
    """How many threads a pass of so many positions over so many bytes of weights is worth."""
    return 1 if weights * -(-positions // 4) < ALONE else torch.get_num_threads()


def _few(positions: Tensor) -> bool:
    return positions.numel() <= WIDEST and not torch.is_grad_enabled()


class NativeHead(nn.Module):
    """A head's logits: through the kernels for a few states, whose bits do not depend on how many are read together."""

    def __init__(self, table: Callable[[], Float[Tensor, "V D"]], weights: Callable[[], Weights] = Weights) -> None:
        super().__init__()
        self.table, self.weights = table, weights
        self.held: tuple[tuple[tuple[int, int], ...], Weights, _Map] | None = None

    def tokens(self) -> _Map:
        """The map of states to logits, of the weights as they are now."""
        table = self.table()
        which = state_of(table)
        if self.held is None or self.held[0] != which:
            weights = self.weights()
            self.held = (which, weights, weights.map(table))
        return self.held[2]

    def __len__(self) -> int:
        """V."""
        return len(self.table())

    def forward(self, states: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """`states E^T`."""
        table = self.table()
        if len(states) > WIDEST or torch.is_grad_enabled() or not len(states):
            return F.linear(states, table)
        tokens = self.tokens()
        states, logits = states.contiguous(), states.new_empty(len(states), len(table))
        threads = threads_for(table.numel() * 4, len(states))
        library().caddf_map(
            ctypes.addressof(tokens), len(states), states.data_ptr(), logits.data_ptr(), threads
        )  # fmt: skip
        return logits
