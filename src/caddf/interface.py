"""The one signature that every model, objective, bound and decoder speaks.

A *language model* maps two rows of tokens to states, and states to log-probabilities where somebody reads them:

    states, caches = model(prefix, canvas, pattern)
    log_q = model.log_probs(states, where, head)

`prefix` is what is read left to right, `canvas` what is read in any order, and `pattern` says what the pair means.
A plain function `x_t -> log-probabilities` becomes such a model through `caddf.denoiser.as_model`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

from caddf.categorical import Warp
from caddf.errors import InputError, at_least

Head = Literal["fused", "draft", "causal"]


@dataclass(frozen=True, eq=False)
class AnyOrder:
    """Eq. 5: `prefix` and `canvas` are the same `x_t`; every output depends on its unmasked part alone.

    `level` is sbar(t) of each row, for networks that are told the time; the dual branch needs no time.
    """

    level: Float[Tensor, " B"] | None = None


@dataclass(frozen=True)
class Infill:
    """Eq. 6: `prefix` is `x0`, the canvas is read in both directions; output i sees `x0[<i]` and the canvas."""


@dataclass(frozen=True)
class Block:
    """Eq. 6 in blocks of `size`; output i sees `x0[<i]` and the canvas of its own block.

    What the canvas holds in earlier blocks is ignored: there it is the prefix that counts. Blocks are counted from
    `offset` (0 in training and in the block likelihood; positions before it are a short block of their own).
    """

    size: int
    offset: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.offset < self.size:
            at_least(1, block_size=self.size)
            raise InputError(f"block offset is {self.offset}; it must lie in [0, {self.size})")

    def index(self, positions: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """The number of the block that each of `positions` lies in (-1 before the offset)."""
        return (positions - self.offset).div(self.size, rounding_mode="floor")

    def start(self, positions: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """First position of the block that each of `positions` lies in."""
        return (self.index(positions) * self.size + self.offset).clamp(min=0)


Pattern = AnyOrder | Infill | Block


@runtime_checkable
class LanguageModel(Protocol):
    """What objectives, bounds and decoders ask of a model.

    `vocab_size` is V, the number of real tokens; `mask_id` is V and never gets probability.
    `heads` names what can be read: `draft` (proposals from the canvas), `causal` (the causal branch's own head) and
    `fused`. `denoiser` names the head that is q(x0 | x_t) under `AnyOrder`. `chained` says whether a draft depends on
    the drafts before it in its block, in the prefix. `block_size` is the size of the blocks it was trained in.
    A model may say besides whether it is `sliding`: if not, windows of drafts are blocks, before which it reads clean
    ones; and whether it `fuses`: if not, the fused head is the causal one where the prefix is x0.
    """

    vocab_size: int
    mask_id: int
    heads: frozenset[Head]
    denoiser: Head
    chained: bool
    block_size: int

    def __call__(
        self, prefix: Int[Tensor, "B L"], canvas: Int[Tensor, "B L"], pattern: Pattern, caches: Any = None
    ) -> tuple[Any, Any]:
        """States of all positions, and the caches (None where none were given)."""

    def log_probs(self, states: Any, where: Bool[Tensor, "B L"], head: Head = "fused") -> Float[Tensor, "N V"]:
        """Log-probabilities (nats) at the positions marked in `where`, row-major; normalised over the V real tokens."""

    def nll(
        self, states: Any, where: Bool[Tensor, "B L"], targets: Int[Tensor, "B L"], head: Head = "fused"
    ) -> Float[Tensor, " N"]:
        """`-log_probs` (nats) of `targets` at the positions in `where`, without keeping all logits in memory."""


@dataclass(frozen=True)
class Projection:
    """What makes a head's logits of all positions: `states @ tokens.T + bias`, of `small` alone where it names tokens.

    A model that gives it, by `projection(states, head)`, is trained without its logits ever standing in memory.
    """

    states: Float[Tensor, "B L D"]
    tokens: Float[Tensor, "V D"]
    bias: Float[Tensor, " V"] | None = None
    small: Int[Tensor, " V"] | None = None


@dataclass(frozen=True)
class Drafting:
    """How rounds of left-to-right decoding are drafted.

    size: of a window; 0: nothing is drafted, and a round is one token.
    most: drafts of a round of a chain.
    renew: a chain goes on in its window as long as so many places of it are left, and has a new one read after that.
    least: drafting ends when the product of the largest draft probabilities falls below this.
    lookup: drafts are copied where so many last tokens have stood before (`decoding.lookup`); 0: never.
    copies: as many are copied as have matched, at most so many; but never fewer than a window has.
    proposes: whether a round makes drafts of its own, in windows; else they are copied, or there are none.
    """

    size: int = 0
    most: int = 0
    renew: int = 1
    least: float = 0.0
    lookup: int = 0
    copies: int = 0
    proposes: bool = False

    @property
    def places(self) -> int:
        """Drafts of a round, its own or copied ones, at most."""
        return max(self.size, self.copies if self.lookup else 0)

    @property
    def uniforms(self) -> int:
        """Numbers that a row's round is drawn by: its own drafts, what stands of drafts, and what follows them."""
        return self.size + self.places + 1


ONE_TOKEN = Drafting()
"""No drafts."""


@dataclass(frozen=True)
class Round:
    """What one round of left-to-right decoding made of its rows.

    tokens: what stands, `[M]` behind it.
    fresh: what of it was filled in.
    drafts: what was drafted, `[M]` elsewhere.
    corrected: where a token stands in place of a rejected draft.
    n: the first open positions, T where there is none.
    read: how many slots of the caches hold.
    work: passes of the causal and the diffusion branch, token-positions that they read and would have without caches,
        rounds, and rounds whose drafts were copied, of each row (`decoding.task.Counts`).
    """

    tokens: Int[Tensor, "B T"]
    fresh: Bool[Tensor, "B T"]
    drafts: Int[Tensor, "B T"]
    corrected: Bool[Tensor, "B T"]
    n: Int[Tensor, " B"]
    read: Int[Tensor, " B"]
    work: Int[Tensor, "6 B"]


Uniforms = Callable[[Bool[Tensor, " B"], int], Float[Tensor, "B m"]]
"""`(rows, m)`: the next m uniforms of each of `rows`."""

Rounds = Callable[[Int[Tensor, "B T"], Int[Tensor, " B"], Bool[Tensor, " B"], Int[Tensor, " B"], Uniforms], Round]
"""`(tokens, n, rows, read, uniforms)`: one round of `rows`, of which n are the first open positions and the slots below
`read` hold, all before n among them; the next goes on from what it leaves. It takes `Drafting.uniforms` numbers of each
row: for its drafts, for what stands of drafts, and for the token behind."""


class BlockReader(LanguageModel, Protocol):
    """A model that reads blocks over a cache of the clean blocks before them."""

    def allocate_blocks(self, rows: int, length: int, chained: bool = False) -> Any:
        """An empty cache of clean blocks for the slots 0 to `length - 1`; None where the network reads none.

        Also None where drafts chain, unless the caller makes the chain's steps (`chained`).
        """

    def read_blocks(self, canvas: Int[Tensor, "B n"], positions: Int[Tensor, "B n"], pattern: Block, cache: Any) -> Any:
        """Draft states at `positions`, each seeing its own block and the cached ones; writes what it reads."""

    def window_of(self, states: Float[Tensor, "B k d"], start: Int[Tensor, " B"]) -> Any:
        """What is seen of windows from `start` on whose states were read by `read_blocks`."""


class Incremental(LanguageModel, Protocol):
    """A model that also reads left to right piece by piece, over caches that the caller holds.

    Slot i predicts position i and reads token i-1; a slot may be read when all slots before it have been. Reading a
    slot again, after its token changed, overwrites it, so going back costs nothing.
    """

    def incremental(self, pattern: Pattern) -> bool:
        """Whether `encode` and the fused head can work over caches under `pattern`."""

    def allocate(self, rows: int, length: int) -> Any:
        """Empty caches for the slots 0 to `length - 1`."""

    def read(self, tokens: Int[Tensor, "B T"], positions: Int[Tensor, "B n"] | Int[Tensor, " n"], caches: Any) -> Any:
        """States of the slots `positions`, of each row or consecutive ones that are the same for all rows."""

    def fuse(self, states: Any, positions: Int[Tensor, "B n"] | Int[Tensor, " n"], caches: Any, seen: Any) -> Any:
        """The states that `read` gave of the slots `positions`, fused with what is `seen` of the canvas."""

    def encode(
        self,
        canvas: Int[Tensor, "B n"],
        start: Int[Tensor, " B"],
        lengths: Int[Tensor, " B"],
        pattern: Pattern,
        caches: Any,
        proposing: bool = False,
    ) -> Any:
        """What is seen of one window of canvas per row, from position `start`, over slots that have been read.

        `start` is each row's, or one for all. Under `Block` the window is a block, and the slots up to `start` must
        have been read; under `Infill` it is the whole row (up to `lengths`), and the slots up to its first masked
        position must have been. `proposing`: nothing but drafts will be read of it.
        """

    def prepare(self, seen: Any, caches: Any) -> Any:
        """What is seen, readier for `fuse`, which reads it for every token."""

    def beside(self, one: Any, two: Any, positions: Int[Tensor, "B n"] | Int[Tensor, " n"]) -> Any:
        """What is seen of two blocks, prepared, as one: outputs at `positions` of each row see their own block's.

        They begin in either block and may go on in the one behind, which is then the other.
        """

    def choose(self, new: Bool[Tensor, " B"], one: Any, other: Any) -> Any:
        """What is seen of windows: of the `new` rows' in `one`, of the rest in `other`."""

    def draft(self, seen: Any, tokens: Int[Tensor, "B T"]) -> Any:
        """Draft states of the window; a chain reads the drafts in `tokens` before each position."""

    def allocate_drafts(self, rows: int, size: int) -> Any:
        """An empty cache for the drafts of a window of `size`; None where they do not chain."""

    def draft_step(
        self, seen: Any, tokens: Int[Tensor, "B T"], places: Int[Tensor, "B n"] | Int[Tensor, " n"], cache: Any
    ) -> Any:
        """Draft states at `places` of the window alone, over a cache of those before: what `draft` gives there.

        They are each row's, or consecutive ones that are the same for all rows.
        """

    def draw_drafts(
        self,
        seen: Any,
        tokens: Int[Tensor, "B T"],
        start: Int[Tensor, " B"],
        n: Int[Tensor, " B"],
        u: Float[Tensor, "B m"],
        cache: Any,
        *,
        warp: Warp,
        least: float,
        given: Int[Tensor, "B m"] | None = None,
    ) -> tuple[Int[Tensor, "B m"], Float[Tensor, "B m V"], Int[Tensor, " B"]] | None:
        """m drafts of each row from position n on, in a window from `start` on: all steps of a chain at one go.

        Where `given` is not -1 that token stands already, and drafts behind it hear it. Gives the tokens, by inverse
        CDF of the uniforms `u`, q (float64), and how many are to be verified: drafting ends when the product of the
        largest draft probabilities falls below `least`, never without a draft. None where the model draws nothing
        itself.
        """

    def rounds(
        self,
        lengths: Int[Tensor, " B"],
        drafting: Drafting,
        caches: Any,
        *,
        warp: Warp,
        over: Any = None,
        template: bool = False,
    ) -> Rounds | None:
        """Whole rounds over `caches`, for rows of these lengths; None where the model has none.

        The target is causal, or fused `over` each block's all-masked start (a `Block`) or over what is seen of one
        canvas. Windows slide (`decoding.speculative`). In a `template` tokens are given behind the first open position.
        """
