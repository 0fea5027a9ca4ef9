"""One bidirectional Transformer over the canvas: denoisers that are told the time (or not), and score networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from caddf.errors import InputError, at_least
from caddf.interface import AnyOrder, Block, Head, Pattern, Projection
from caddf.models.config import BranchConfig, NetworkConfig
from caddf.models.diffusion import DiffusionBranch
from caddf.models.layers import LevelScale, head_log_probs, head_nll


@dataclass(frozen=True)
class SingleConfig(NetworkConfig):
    """The diffusion branch alone.

    vocab_size, bos_id, rows, context: as in `ModelConfig`.
    time: whether the network is told sbar; level_width: how wide its embedding is (SEDD's code has 128); level_scale:
        whether that is of sbar itself (`linear`, as there) or of its logarithm.
    score: None for a denoiser, q(x0 | x_t); for a score network whether its output is log s itself (`unscaled`), or
        log s without its known factor of time (`scaled`; absorbing alone).
    process: the chain whose scores a score network gives; a denoiser of any chain may leave it as it is.
    norm_bias, mlp_bias: biases on the norms, or in the MLPs, where the branch has none elsewhere.
    tied: whether a denoiser's head is its embedding; if not, and in a score network, it is linear with a bias.
    """

    branch: BranchConfig
    bos_id: int = 0
    rows: int = 0
    time: bool = True
    level_width: int = 128
    score: Literal["scaled", "unscaled"] | None = None
    process: Literal["absorbing", "uniform"] = "absorbing"
    level_scale: LevelScale = "log"
    norm_bias: bool = False
    mlp_bias: bool = False
    tied: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "level_width")
        if self.score == "scaled" and self.process == "uniform":
            raise InputError("score is scaled with process uniform, whose scores have no factor of time; set unscaled")
        if self.score is not None and not self.time:
            raise InputError("time is false with a score; a score depends on the time, so set it to true")


@dataclass(frozen=True)
class SingleStates:
    """States of all positions, and what they were made of."""

    draft: Float[Tensor, "B L d"]
    canvas: Int[Tensor, "B L"]
    level: Float[Tensor, " B"] | None


class SingleBranch(nn.Module):
    """A denoiser q(x0_i | x_t, sbar), a `caddf.interface.LanguageModel` under `AnyOrder(sbar)`.

    Without time a canvas says all there is to know, so that it also has the readings in which the canvas is read both
    ways: `Infill`, and `Block` where one block is the whole row.
    """

    def __init__(self, config: SingleConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size, self.mask_id = config.vocab_size, config.mask_id
        self.diffusion = DiffusionBranch(
            config.branch,
            config.rows,
            level_width=config.level_width if config.time else None,
            level_scale=config.level_scale,
            norm_bias=config.norm_bias,
            mlp_bias=config.mlp_bias,
        )
        self.output: nn.Linear | None = None
        if config.score is not None or not config.tied:  # 0 at first, as in the authors' code
            self.output = nn.Linear(config.branch.width, config.vocab_size)
            nn.init.zeros_(self.output.weight)
            nn.init.zeros_(self.output.bias)
        self.heads: frozenset[Head] = frozenset({"draft"})
        self.denoiser: Head = "draft"
        self.chained, self.block_size = False, config.context

    def forward(
        self, prefix: Int[Tensor, "B L"], canvas: Int[Tensor, "B L"], pattern: Pattern, caches: None = None
    ) -> tuple[SingleStates, None]:
        """States of all positions of the canvas.

        Raises `InputError` under a pattern that it cannot read, without the level where the network is told it, and for
        rows beyond the context.
        """
        length, level = canvas.shape[1], pattern.level if isinstance(pattern, AnyOrder) else None
        if self.config.time and not isinstance(pattern, AnyOrder):
            raise InputError(
                f"the pattern is {type(pattern).__name__}; a network that is told the time has AnyOrder alone"
            )
        if isinstance(pattern, Block) and (pattern.offset or pattern.size < length):
            raise InputError(
                f"the block size is {pattern.size} in a row of {length} tokens; this network reads whole rows both "
                "ways, so leave it unset"
            )
        if length > self.config.context:
            raise InputError(f"a row has {length} tokens; the context ends at {self.config.context}")
        if self.config.time and level is None:
            raise InputError("level is not set; a network that is told the time needs sbar of each row")
        positions = torch.arange(length, device=canvas.device)
        return SingleStates(self.diffusion(canvas, positions, level=level), canvas, level), None

    def log_probs(self, states: SingleStates, where: Bool[Tensor, "B L"], head: Head = "draft") -> Float[Tensor, "N V"]:
        """log q(x0_i | x_t) (nats) at the positions in `where`, over the V real tokens."""
        made = self.projection(states, head)
        return head_log_probs(made.states[where], made.tokens, made.bias)

    def nll(
        self, states: SingleStates, where: Bool[Tensor, "B L"], targets: Int[Tensor, "B L"], head: Head = "draft"
    ) -> Float[Tensor, " N"]:
        """`-log_probs` (nats) of `targets`, in chunks of logits."""
        made = self.projection(states, head)
        return head_nll(made.states[where], made.tokens, targets[where], bias=made.bias)

    def projection(self, states: SingleStates, head: Head) -> Projection:
        """What makes the logits of all positions."""
        if head not in self.heads:
            raise InputError(f"head is {head}; a single branch has draft alone")
        if self.output is None:
            return Projection(states.draft, self.diffusion.embedding.weight[: self.vocab_size])
        return Projection(states.draft, self.output.weight, self.output.bias)

    def parameter_counts(self) -> dict[str, int]:
        """Parameters per part, the embeddings (and a linear head) apart, and in all."""
        total = sum(p.numel() for p in self.parameters())
        tables = [self.diffusion.embedding, *([self.output] if self.output is not None else [])]
        embeddings = sum(p.numel() for table in tables for p in table.parameters())
        return {"embeddings": embeddings, "diffusion": total - embeddings, "total": total}

    def flops_per_position(self, context: int | None = None) -> dict[str, float]:
        """Floating-point operations of a forward pass per position, its head included."""
        counts, branch, seen = self.parameter_counts(), self.config.branch, context or self.config.context
        told = sum(
            p.numel() for name, p in self.diffusion.named_parameters() if "level" in name or "modulation" in name
        )
        weights = counts["diffusion"] - told + self.vocab_size * branch.width  # the level costs once a row, not a token
        return {"diffusion": 2.0 * weights + 4 * seen * branch.width * branch.layers}

    def cached_per_position(self) -> int:
        """Nothing is kept."""
        return 0


class ScoreNetwork(SingleBranch):
    """SEDD's network (Lou, Meng and Ermon 2024): a `caddf.concrete_score.ScoreModel`.

    For the absorbing process its posterior is that of its scores, `q_v = s_v / sum s`. For the uniform one the
    posterior is no softmax of an output, so that it has no head to read: its scores are all it gives.
    """

    output: nn.Linear

    def __init__(self, config: SingleConfig) -> None:
        super().__init__(config)
        self.process = config.process

    def log_scores(self, states: SingleStates, where: Bool[Tensor, "B L"]) -> Float[Tensor, "N V"]:
        """log s at the positions in `where`, in float32 or better.

        Scaled: `output - log(e^sbar - 1) - log V`, so that an output of 0 is the uniform posterior (authors'
        `scale_by_sigma`). Uniform: 0 at the token that stands there, whose score is 1.
        """
        logits = self.output(states.draft[where])
        log_s: Tensor = logits if logits.dtype == torch.float64 else logits.float()
        if self.config.score == "scaled":
            assert states.level is not None
            shift = (torch.expm1(states.level) * self.vocab_size).log()
            log_s = log_s - shift[where.nonzero()[:, 0]][:, None].to(log_s)
        return log_s.scatter(-1, states.canvas[where][:, None], 0.0) if self.process == "uniform" else log_s

    def projection(self, states: SingleStates, head: Head) -> Projection:
        """What makes the posterior's logits, which are the absorbing process's log-scores up to a constant."""
        if self.process == "uniform":
            raise InputError("process is uniform; its score network has no q(x0 | x_t) to read (absorbing has)")
        return super().projection(states, head)


def build_single(config: SingleConfig) -> SingleBranch:
    """The network of a configuration: a score network where it has a score, else a denoiser."""
    return SingleBranch(config) if config.score is None else ScoreNetwork(config)
