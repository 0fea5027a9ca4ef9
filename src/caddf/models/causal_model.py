"""The causal branch as a model of its own: what a GPT-2 is, behind the same signature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from caddf.caches import Caches, Slots
from caddf.categorical import Warp
from caddf.errors import InputError, at_least
from caddf.interface import Block, Drafting, Head, Infill, Pattern, Projection, Rounds
from caddf.models.causal import CausalBranch, tokens_before
from caddf.models.config import BranchConfig, NetworkConfig
from caddf.models.layers import Readout, head_log_probs, head_nll, states_at
from caddf.models.states import States

if TYPE_CHECKING:
    from caddf.graphs import Graphs
    from caddf.native import Native


@dataclass(frozen=True)
class CausalConfig(NetworkConfig):
    """A causal Transformer alone; the settings are those of `ModelConfig`."""

    branch: BranchConfig
    bos_id: int = 0
    rows: int = 0
    block_size: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "block_size")


class CausalModel(nn.Module):
    """GPT-2 (Radford et al. 2019), a `caddf.interface.LanguageModel` that has the causal head alone."""

    heads: frozenset[Head] = frozenset({"causal"})
    denoiser: Head = "causal"
    chained = False

    def __init__(self, config: CausalConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = self.mask_id = config.vocab_size
        self.block_size = config.block_size
        self.causal = CausalBranch(config.branch, config.rows, config.context)
        self.native: Native | None = None  # passes of a few positions, in another form than the modules'
        self.graphs: Graphs | None = None  # whole rounds

    def forward(
        self, prefix: Int[Tensor, "B L"], canvas: Int[Tensor, "B L"], pattern: Pattern, caches: Caches | None = None
    ) -> tuple[States, Caches | None]:
        """States of all positions; the canvas is not read. Raises `InputError` under `AnyOrder`, which it cannot do."""
        if not isinstance(pattern, Infill | Block):
            raise InputError("a causal model reads left to right; it has no any-order reading")
        inputs = F.pad(prefix[:, :-1], (1, 0), value=self.config.bos_id)
        slots = Slots.whole(torch.arange(prefix.shape[1], device=prefix.device))
        return States(None, None, self.causal(inputs, slots, None if caches is None else caches.causal)), caches

    def incremental(self, pattern: Pattern) -> bool:
        """No canvas to encode: only the causal head reads over caches."""
        return False

    def allocate(self, rows: int, length: int) -> Caches:
        """Empty caches for `rows` rows and the slots 0 to `length - 1`."""
        if self.native is not None:
            self.native.refresh()
        return Caches(self.causal.allocate(rows, length))

    def read(
        self,
        tokens: Int[Tensor, "B T"],
        positions: Int[Tensor, "B n"] | Int[Tensor, " n"] | Slots,
        caches: Caches,
    ) -> States:
        """States of the slots `positions`, whose keys and values go into `caches`."""
        slots = positions if isinstance(positions, Slots) else Slots.of(positions)
        inputs = tokens_before(tokens, slots, self.config.bos_id)
        earlier = self.causal.earlier(tokens, slots, self.config.bos_id)
        if self.native is not None and (states := self.native.causal(inputs, slots, caches, earlier)) is not None:
            return States(None, None, states)
        return States(None, None, self.causal(inputs, slots, caches.causal, earlier=earlier))

    def rounds(
        self,
        lengths: Int[Tensor, " B"],
        drafting: Drafting,
        caches: Caches,
        *,
        warp: Warp,
        over: None = None,
        template: bool = False,
    ) -> Rounds | None:
        """Whole rounds of the causal target at one go, where there are kernels or graphs for it."""
        whole = self.native or self.graphs
        if whole is None:
            return None
        return whole.rounds(lengths, drafting, caches, warp=warp, over=over, template=template)

    def log_probs(self, states: States, where: Bool[Tensor, "B L"], head: Head = "causal") -> Float[Tensor, "N V"]:
        """Log-probabilities (nats) at the positions in `where`, normalised over V in float32 or better."""
        return head_log_probs(*self._head(states, where, head))

    def nll(
        self, states: States, where: Bool[Tensor, "B L"], targets: Int[Tensor, "B L"], head: Head = "causal"
    ) -> Float[Tensor, " N"]:
        """`-log_probs` (nats) of `targets` at the positions in `where`, in chunks of logits."""
        return head_nll(*self._head(states, where, head), targets[where])

    def projection(self, states: States, head: Head) -> Projection:
        """What makes the logits of all positions."""
        if head != "causal" or states.causal is None:
            raise InputError(f"head is {head}; a causal model has the head causal alone")
        return Projection(states.causal, self.tokens_of(head))

    def tokens_of(self, head: Head) -> Float[Tensor, "V D"]:
        """The head's output embeddings: the rows of the V real tokens alone."""
        return self.causal.embedding.weight[: self.vocab_size]

    def _head(self, states: States, where: Bool[Tensor, "B L"], head: Head) -> tuple[Tensor, Readout]:
        made, readouts = self.projection(states, head), {} if self.native is None else self.native.heads
        return states_at(made.states, where), readouts.get(head, made.tokens)

    def parameter_counts(self) -> dict[str, int]:
        """Parameters per part, and in all."""
        tables = [self.causal.embedding, *([self.causal.table] if self.causal.table is not None else [])]
        embeddings = sum(table.weight.numel() for table in tables)
        total = sum(p.numel() for p in self.parameters())
        return {"embeddings": embeddings, "causal": total - embeddings, "total": total}

    def flops_per_position(self, context: int | None = None) -> dict[str, float]:
        """Floating-point operations of a forward pass per position, its head included."""
        branch, seen = self.config.branch, context or self.config.context
        matrices = self.parameter_counts()["causal"] + self.vocab_size * branch.width
        return {"causal": 2.0 * matrices + 2 * seen * branch.width * branch.layers}

    def cached_per_position(self) -> int:
        """Numbers that decoding keeps of each position: keys and values."""
        return 2 * self.config.branch.layers * self.config.branch.width
