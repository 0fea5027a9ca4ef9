"""The shared parts of all branches: rotary positions, attention, MLP, one pre-norm layer, heads.

Shapes: B rows, n queries, m keys, H heads. A mask is boolean, True where a query may look, or what is added to
the scores; None is everywhere.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sized
from functools import partial
from typing import Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from caddf.models.config import Activation, BranchConfig

Rotation = tuple[Tensor, Tensor]
"""Cosines and (first half negated) sines `[B or 1, 1, n, size]` of the angles of a row of positions."""
KeysValues = tuple[Tensor, Tensor]
"""Keys and values `[B, H, m, size]`."""
Visible = Bool[Tensor, "..."] | Float[Tensor, "..."] | None
"""What queries see of keys, `[n, m]` or `[B, 1 or H, n, m]`."""
Crossed = tuple[Rotation, KeysValues, Visible]
"""What a layer's cross-attention reads: its queries' rotation, keys and values, and what it sees of them."""
Readout = Tensor | nn.Module
"""What makes logits of states: output embeddings `[V, D]`, or a map in their place that has a length, V."""
LevelScale = Literal["log", "linear"]
SHARPNESS, EPSILON = 1.5, 1e-6
"""Of normed queries, their root mean square; and what is added to a mean square."""
FEW = 8
"""Most states whose logits a CPU makes faster as `W x^T` than as `x W^T`: float32, twice as fast for two to four."""


def rotation(positions: Int[Tensor, "B n"] | Int[Tensor, " n"], size: int) -> Rotation:
    """The angles by which rotary embeddings of head size `size` turn each position (Su et al. 2021)."""
    frequencies = 10_000.0 ** (-torch.arange(0, size, 2, device=positions.device, dtype=torch.float64) / size)
    angles = positions.reshape(-1, 1, positions.shape[-1], 1) * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x: Float[Tensor, "B H n size"], by: Rotation | None) -> Float[Tensor, "B H n size"]:
    """Turns pairs of channels (first half with second half) by their position's angle."""
    if by is None:
        return x
    cos, sin = (angle.to(x.dtype) for angle in by)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def nearness(
    queries: Int[Tensor, "... n"], keys: Int[Tensor, "... m"], heads: int, like: Tensor, sides: bool = False
) -> Float[Tensor, "... H n m"]:
    """What is added to the scores of attention between positions, so that heads see near ones first.

    Linear biases (ALiBi, Press et al. 2022), in both directions: a head's slope times the distance from the query's
    position, or with `sides` from the one next to it, on its right or its left in turn. Slopes of the pairs of heads
    run from 2 to 1/32.
    """
    slopes, side = nearest(heads, like.device, like.dtype)
    distance = keys[..., None, None, :] - queries[..., None, :, None]
    return -slopes[:, None, None] * ((distance - side[:, None, None]) if sides else distance).abs()


@functools.cache
def nearest(heads: int, device: torch.device, dtype: torch.dtype) -> tuple[Float[Tensor, " H"], Float[Tensor, " H"]]:
    """Each head's slope, and the side to which it looks: 1 is right, -1 is left."""
    pairs = -(-heads // 2)
    with torch.inference_mode(False):
        slopes = torch.logspace(1, -5, pairs, base=2.0) if pairs > 1 else torch.tensor([0.25])
        sides = torch.tensor([1.0, -1.0]).repeat(pairs)[:heads]
        return slopes.repeat_interleave(2)[:heads].to(device, dtype), sides.to(device, dtype)


def among(scores: Float[Tensor, "... n m"], visible: Bool[Tensor, "..."] | None) -> Float[Tensor, "... n m"]:
    """`scores` of what is visible, and -inf of the rest."""
    return scores if visible is None else scores.masked_fill(~visible, -torch.inf)


def of_one_length(x: Float[Tensor, "... size"]) -> Float[Tensor, "... size"]:
    """x over its root mean square."""
    return F.rms_norm(x, x.shape[-1:], eps=EPSILON)


class Attention(nn.Module):
    """Multi-head attention of `width`-wide queries over `source_width`-wide states (eq. 11; self-attention if equal).

    Keys and values are made apart from the queries, so that callers may keep them in a cache. With `qk_norm` a head's
    queries and keys have one length each (Henry et al. 2020), and scores lie within `SHARPNESS sqrt(size)`.
    """

    def __init__(
        self, width: int, heads: int, source_width: int | None = None, bias: bool = False, qk_norm: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.size, self.qk_norm = heads, width // heads, qk_norm
        self.query = nn.Linear(width, width, bias=bias)
        self.key_value = nn.Linear(source_width or width, 2 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)

    def keys_values(self, source: Float[Tensor, "B m S"], turn: Rotation | None) -> KeysValues:
        """Keys (turned by their positions) and values of `source`."""
        keys, values = self.key_value(source).unflatten(-1, (2, self.heads, self.size)).permute(2, 0, 3, 1, 4)
        return rotate(of_one_length(keys) if self.qk_norm else keys, turn), values

    def forward(
        self,
        x: Float[Tensor, "B n D"],
        turn: Rotation | None,
        keys_values: KeysValues,
        visible: Visible = None,
        causal: bool = False,
    ) -> Float[Tensor, "B n D"]:
        """Each of x's n states reads the keys that `visible` (`[n, m]` or `[B, 1 or H, n, m]`) shows it."""
        queries = self.query(x).unflatten(-1, (self.heads, self.size)).transpose(1, 2)
        queries = rotate(SHARPNESS * of_one_length(queries) if self.qk_norm else queries, turn)
        keys, values = (part.to(queries.dtype) for part in keys_values)
        if visible is not None and visible.is_floating_point():
            visible = visible.to(queries.dtype)
            visible = visible[None] if visible.ndim == 3 else visible  # in three dimensions it would not be flash
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible, is_causal=causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear maps with an activation between them."""

    def __init__(self, width: int, hidden: int, out: int, bias: bool = False, activation: Activation = "gelu") -> None:
        super().__init__()
        self.activation = activation
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, out, bias=bias)

    def forward(self, x: Float[Tensor, "... D"], more: Float[Tensor, "... H"] | None = None) -> Float[Tensor, "... E"]:
        """`down(activation(up(x) + more))`."""
        hidden = self.up(x) if more is None else self.up(x) + more
        return self.down(F.relu(hidden).square() if self.activation == "relu2" else F.gelu(hidden, approximate="tanh"))


class Layer(nn.Module):
    """A pre-norm Transformer layer of a branch: self-attention, cross-attention where there is a source, MLP.

    Where the branch has no biases `norm_bias` and `mlp_bias` put them on the norms or the MLP alone.
    """

    def __init__(
        self, config: BranchConfig, source_width: int | None = None, *, norm_bias: bool = False, mlp_bias: bool = False
    ) -> None:
        super().__init__()
        width, heads, bias = config.width, config.heads, config.bias
        norm = partial(nn.LayerNorm, width, bias=bias or norm_bias)
        self.attention_norm = norm()
        self.attention = Attention(width, heads, bias=bias, qk_norm=config.qk_norm)
        if source_width is not None:
            self.cross_norm = norm()
            self.cross = Attention(width, heads, source_width, bias=bias)
        self.mlp_norm = norm()
        self.mlp = MLP(width, 4 * width, width, bias or mlp_bias, config.activation)

    def forward(
        self,
        x: Float[Tensor, "B n D"],
        turn: Rotation | None,
        visible: Visible = None,
        causal: bool = False,
        *,
        kept: Callable[[KeysValues], KeysValues] | None = None,
        crossed: Crossed | None = None,
        modulation: tuple[Float[Tensor, "B 1 D"], ...] | None = None,
    ) -> Float[Tensor, "B n D"]:
        """The residual stream behind this layer, of positions turned by `turn` that see what `visible` shows them.

        `kept` takes the keys and values of these positions and gives those to be read: a cache. `crossed` is what
        cross-attention reads. `modulation`: shift, scale and gate of attention, then of the MLP.
        """
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation or (None,) * 6
        h = modulate(self.attention_norm(x), shift, scale)
        keys_values = self.attention.keys_values(h, turn)
        if kept is not None:
            keys_values = kept(keys_values)
        x = x + gated(self.attention(h, turn, keys_values, visible, causal), gate)
        if crossed is not None:
            x = x + self.cross(self.cross_norm(x), *crossed)
        return x + gated(self.mlp(modulate(self.mlp_norm(x), mlp_shift, mlp_scale)), mlp_gate)


class TiedEmbedding(nn.Module):
    """Embeddings E that are held elsewhere, brought to another width (or place) by one map P: `weight` is E P^T.

    E stays where it is, and is counted and saved there alone.
    """

    def __init__(self, embedding: nn.Embedding, width: int) -> None:
        super().__init__()
        self.map = nn.Parameter(torch.empty(width, embedding.embedding_dim))
        self._of = (embedding,)  # in a tuple, which hides it from this module's parameters
        self._kept: tuple[tuple[object, ...], Tensor] | None = None
        self.reset()

    def reset(self) -> None:
        """A map that keeps the size of what it maps, on average."""
        if not self.map.is_meta:
            nn.init.normal_(self.map, std=self.map.shape[1] ** -0.5)

    @property
    def learning(self) -> bool:
        """Whether gradients are kept."""
        return torch.is_grad_enabled() and (self._of[0].weight.requires_grad or self.map.requires_grad)

    @property
    def weight(self) -> Float[Tensor, "R d"]:
        """E P^T; where nothing can be learnt it is kept, since every reading of a head asks for it."""
        table = self._of[0].weight
        if self.learning:
            return table @ self.map.t()
        which = state_of(table, self.map)
        if self._kept is None or self._kept[0] != which:
            self._kept = (which, table @ self.map.t())
        return self._kept[1]

    def forward(self, tokens: Int[Tensor, "..."]) -> Float[Tensor, "... d"]:
        """Embeddings of `tokens`; where nothing is learnt they are rows of `weight`, to the bit."""
        return F.linear(self._of[0](tokens), self.map) if self.learning else F.embedding(tokens, self.weight)


def state_of(*tensors: Tensor) -> tuple[object, ...]:
    """Which storage each tensor has and how often it was written: the same as long as it is held and its values stay.

    What may still learn is never the same: a fused step of an optimizer and a change of `.data` are not counted.
    """

    def state(tensor: Tensor) -> object:
        if (tensor if tensor._base is None else tensor._base).requires_grad:
            return object()
        return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version

    return tuple(map(state, tensors))


class LevelEmbedding(nn.Module):
    """A noise level as a vector: sines and cosines, and a small MLP (as in DiT, Peebles and Xie 2023).

    They are those of 10 log sbar, or with `scale` linear of sbar itself (Lou et al. 2024, their code).
    """

    def __init__(self, width: int, scale: LevelScale = "log", frequencies: int = 128) -> None:
        super().__init__()
        self.scale, self.frequencies = scale, frequencies
        self.up, self.down = nn.Linear(2 * frequencies, width), nn.Linear(width, width)

    def forward(self, level: Float[Tensor, " B"]) -> Float[Tensor, "B W"]:
        """Embeds sbar; log: beyond 1e-6 and 1e3, where nothing changes any more, all levels are one."""
        steps = torch.arange(self.frequencies, device=level.device, dtype=torch.float64)
        frequencies = 10_000.0 ** (-steps / self.frequencies)
        place = level if self.scale == "linear" else 10 * level.clamp(1e-6, 1e3).log()
        angles = place[:, None] * frequencies
        waves = torch.cat([angles.cos(), angles.sin()], -1).to(self.up.weight.dtype)
        return F.silu(self.down(F.silu(self.up(waves))))


class Modulation(nn.Module):
    """adaLN-zero (Peebles and Xie 2023): `parts` vectors per row from the embedded level, all 0 at the start."""

    def __init__(self, level_width: int, width: int, parts: int) -> None:
        super().__init__()
        self.parts, self.linear = parts, nn.Linear(level_width, parts * width)

    def forward(self, level: Float[Tensor, "B W"]) -> tuple[Float[Tensor, "B 1 D"], ...]:
        """Shifts, scales, gates."""
        return self.linear(level)[:, None].chunk(self.parts, -1)


def modulate(
    x: Float[Tensor, "B n D"], shift: Float[Tensor, "B 1 D"] | None, scale: Float[Tensor, "B 1 D"] | None
) -> Float[Tensor, "B n D"]:
    """x shifted and scaled, or as it is without a level."""
    return x if shift is None or scale is None else x * (1 + scale) + shift


def gated(x: Float[Tensor, "B n D"], gate: Float[Tensor, "B 1 D"] | None) -> Float[Tensor, "B n D"]:
    """x times its gate, or as it is without a level."""
    return x if gate is None else gate * x


class Layers(nn.ModuleList):
    """A stack of layers, as a list that knows what it holds."""

    def __iter__(self) -> Iterator[Layer]:
        """The layers, first to last."""
        return cast(Iterator[Layer], super().__iter__())


def initialise(module: nn.Module, layers: int) -> None:
    """GPT-2's initialisation: normal, 0.02; maps into a residual stream are smaller by sqrt(2 layers)."""
    for name, parameter in module.named_parameters():
        if parameter.ndim < 2 or parameter.is_meta:
            continue
        into_stream = name.endswith(("out.weight", "down.weight"))
        nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if into_stream else 0.02)


def states_at(states: Float[Tensor, "B n D"], where: Bool[Tensor, "B n"]) -> Float[Tensor, "N D"]:
    """The marked states, row-major; all of them without a copy."""
    return states.flatten(0, 1) if bool(where.all()) else states[where]


def logits_of(states: Float[Tensor, "N D"], tokens: Readout, bias: Float[Tensor, " V"] | None) -> Float[Tensor, "N V"]:
    """Logits of the states, in float32 or better."""
    if not isinstance(tokens, Tensor):
        logits = tokens(states)
    elif states.device.type == "cpu" and states.dtype == tokens.dtype == torch.float32 and 1 < len(states) <= FEW:
        logits = torch.mm(tokens, states.t()).t()
        logits = logits if bias is None else logits + bias
    else:
        logits = F.linear(states, tokens, bias)
    return logits if logits.dtype == torch.float64 else logits.float()


def head_log_probs(
    states: Float[Tensor, "N D"], tokens: Readout, bias: Float[Tensor, " V"] | None = None
) -> Float[Tensor, "N V"]:
    """log softmax over the V real tokens (nats), in float32 or better."""
    return F.log_softmax(logits_of(states, tokens, bias), -1)


def over_all(log_p: Float[Tensor, "N n"], small: Int[Tensor, " n"] | None, vocab_size: int) -> Float[Tensor, "N V"]:
    """Log-probabilities of all tokens: -inf outside the `small` vocabulary, where there is one."""
    if small is None:
        return log_p
    return log_p.new_full((len(log_p), vocab_size), -torch.inf).index_copy(1, small, log_p)


def head_nll(
    states: Float[Tensor, "N D"],
    tokens: Readout,
    targets: Int[Tensor, " N"],
    elements: int = 1 << 24,
    bias: Float[Tensor, " V"] | None = None,
) -> Float[Tensor, " N"]:
    """-log softmax at the targets (nats), at most `elements` logits at a time.

    Beyond one chunk the logits are made again in the backward pass, so that a large vocabulary never stands in memory.
    """

    def nll(part: Tensor, tokens: Readout, bias: Tensor | None, at: Tensor) -> Tensor:
        return F.cross_entropy(logits_of(part, tokens, bias), at, reduction="none")

    size = max(1, elements // (len(tokens) if isinstance(tokens, Tensor) else len(cast(Sized, tokens))))
    if len(states) <= size:
        return nll(states, tokens, bias, targets)
    chunks = zip(states.split(size), targets.split(size), strict=True)
    return torch.cat(
        [checkpoint(nll, part, tokens, bias, at, use_reentrant=False, preserve_rng_state=False) for part, at in chunks]
    )
