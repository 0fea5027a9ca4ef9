"""What networks are made of: settings, their checks, and the presets of the dual branch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, Self, get_type_hints

from caddf.errors import Checked, InputError, at_least

Activation = Literal["gelu", "relu2"]


@dataclass(frozen=True)
class BranchConfig(Checked):
    """One stack of Transformer layers.

    `positions` is `rotary`, or `learned` (GPT-2's absolute table, which ends at the context length). `bias` puts biases
    on the linear maps and norms, as GPT-2 has. `alibi` adds `layers.nearness` to the scores of attention in both
    directions: within the diffusion branch, and between it and the causal branch (which has no use for it itself).
    `activation` is between the two maps of its MLPs: `gelu`, or `relu2`, max(x, 0)^2 (So et al. 2021).
    `qk_norm` gives queries and keys of self-attention one length.
    `token_shift` adds to each of the causal branch's inputs a map of the one before it, so that two tokens are read
    before there is any attention (after the token shift of RWKV, Peng et al. 2023); a chain of drafts hears two, too.
    """

    layers: int
    width: int
    heads: int
    positions: Literal["rotary", "learned"] = "rotary"
    bias: bool = False
    alibi: bool = False
    token_shift: bool = False
    activation: Activation = "gelu"
    qk_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "layers", "width", "heads")
        if self.width % self.heads or self.width // self.heads % 2:
            raise InputError(
                f"width {self.width} over {self.heads} heads gives no even head size; choose a width that is an even "
                "multiple of heads"
            )


@dataclass(frozen=True)
class NetworkConfig(Checked):
    """What all networks have: V real tokens, of which `[M]` is none, and a context.

    Where they have embeddings of more tokens, `rows`, those beyond V never get probability; `bos_id` is a real token.
    """

    vocab_size: int
    context: int

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "vocab_size", "context")
        rows, bos_id = getattr(self, "rows", self.vocab_size + 1), getattr(self, "bos_id", 0)
        if not rows:
            rows = -(-(self.vocab_size + 1) // 8) * 8
            object.__setattr__(self, "rows", rows)
        if rows <= self.vocab_size:
            raise InputError(
                f"rows is {rows}; {self.vocab_size} tokens and the mask need at least {self.vocab_size + 1}"
            )
        if not 0 <= bos_id < self.vocab_size:
            raise InputError(f"bos_id is {bos_id}; it must be one of the {self.vocab_size} tokens")

    @property
    def mask_id(self) -> int:
        """The id of `[M]`: V."""
        return self.vocab_size

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and YAML."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`; raises `InputError` on unknown or missing settings."""
        branches = [name for name, kind in get_type_hints(cls).items() if kind in (BranchConfig, BranchConfig | None)]
        try:
            made = {name: BranchConfig(**values[name]) for name in branches if values[name] is not None}
            return cls(**{**values, **made})
        except (KeyError, TypeError) as error:
            raise InputError(f"the model's settings do not fit this version: {error}") from None


@dataclass(frozen=True)
class ModelConfig(NetworkConfig):
    """The dual-branch model (eqs. 5-7, 10-12; sizes of the paper's Table 5 under `PRESETS`).

    vocab_size: V, the real tokens; `[M]` has id V; embedding tables have `rows` rows, of which those beyond V never get
        probability. bos_id: the token before position 0.
    causal: the causal branch, or None ("off": the diffusion branch with its draft head alone).
    fusion: `late` (eq. 10, after the last causal layer), `layers` (eq. 7 too: cross-attention in every causal layer),
        or `none` (no cross-attention).
    own_state: the fusion reads the canvas state of its own position, too, which cross-attention has to find (eq. 10
        has what is found alone); `none` reads nothing else.
    exchange: `one_way` (the causal branch reads the diffusion branch) or `mutual` (and the reverse; needs `late`).
    embeddings: `separate` for each branch, or `tied` (the diffusion branch's are the causal branch's under one map).
    draft: `factorised`, or `chained` (one light causal layer over the drafts of a block).
    draft_vocab: how many tokens, the most frequent ones, a chain drafts from; None is all.
    block_size: k, the size of a block in training, in the block likelihood and in block decoding.
    """

    diffusion: BranchConfig
    causal: BranchConfig | None
    bos_id: int = 0
    rows: int = 0
    fusion: Literal["late", "layers", "none"] = "late"
    exchange: Literal["one_way", "mutual"] = "mutual"
    draft: Literal["factorised", "chained"] = "factorised"
    block_size: int = 8
    draft_vocab: int | None = None
    embeddings: Literal["separate", "tied"] = "separate"
    own_state: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.block_size <= self.context:
            raise InputError(f"block_size is {self.block_size}; it must lie between 1 and the context, {self.context}")
        if self.draft_vocab is not None:
            if not 1 <= self.draft_vocab <= self.vocab_size:
                raise InputError(
                    f"draft_vocab is {self.draft_vocab}; it must lie between 1 and the {self.vocab_size} tokens"
                )
            if self.draft != "chained" or self.causal is None:
                raise InputError(
                    f"draft_vocab is {self.draft_vocab}, which is for chained drafts that a causal branch verifies; "
                    "set draft to chained and causal to on, or leave draft_vocab out"
                )
        if self.embeddings == "tied" and self.causal is None:
            raise InputError("embeddings is tied without a causal branch to be tied to; set embeddings to separate")
        if self.own_state and (self.causal is None or self.fusion == "none"):
            raise InputError(
                "own_state is true without cross-attention beside which it would be read; leave it out with causal off "
                "or fusion none"
            )
        if self.exchange == "mutual" and self.causal is not None and self.fusion != "late":
            raise InputError(
                f"exchange is mutual with fusion {self.fusion}; mutual exchange needs fusion late, since with "
                f"{self.fusion} the causal states are not free of the canvas"
                if self.fusion == "layers"
                else "exchange is mutual with fusion none; without cross-attention set exchange to one_way"
            )


@dataclass(frozen=True)
class Preset:
    """A named size: the branches, the context it is trained at, and the published training settings."""

    causal: BranchConfig
    diffusion: BranchConfig
    context: int
    batch: int
    steps: int
    warmup: int
    learning_rate: float
    tokenizer: str

    @property
    def vocab_size(self) -> int:
        """V of the preset's tokenizer."""
        return 50_257 if self.tokenizer == "gpt2" else int(self.tokenizer.removeprefix("bpe:"))


PRESETS: dict[str, Preset] = {
    "debug": Preset(BranchConfig(2, 32, 2), BranchConfig(1, 32, 2), 32, 8, 100, 10, 3e-3, "bpe:512"),
    "demo": Preset(BranchConfig(4, 192, 6), BranchConfig(2, 128, 4), 256, 8, 800, 80, 2e-3, "bpe:4096"),
    "tiny": Preset(BranchConfig(6, 384, 6), BranchConfig(3, 256, 4), 1024, 16, 20_000, 500, 1e-3, "bpe:8192"),
    # Table 5.
    "small": Preset(BranchConfig(12, 768, 12), BranchConfig(6, 512, 8), 1024, 128, 250_000, 10_000, 1e-4, "gpt2"),
    "medium": Preset(BranchConfig(20, 1440, 24), BranchConfig(10, 1024, 16), 4096, 128, 250_000, 10_000, 5e-5, "gpt2"),
}
"""Sizes; the last two are the paper's Table 5 as written (sequence length as in the table)."""
