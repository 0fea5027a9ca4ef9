"""PLAID's network (Gulrajani & Hashimoto 2023): embeddings, a learned noise schedule, and p(x0_i | z_t).

Section numbers are the paper's; what it leaves open is as in its code (igul222/plaid, `lib/models.py`). The layers are
those of the other branches, with their widths and initialisation in place of muP and scaled residuals.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from caddf.errors import InputError, at_least
from caddf.models.config import BranchConfig, NetworkConfig
from caddf.models.layers import Layer, Layers, head_log_probs, head_nll, initialise, rotation

FREQUENCIES = 32
"""Sines and cosines each of the network's noise level."""


@dataclass(frozen=True)
class PlaidConfig(NetworkConfig):
    """A bidirectional Transformer over noisy embeddings; defaults are PLAID's.

    vocab_size: V; there is no mask among the embeddings, and `[M]`, id V, marks what a decoder is to fill.
    embedding_width: dimensions of the embeddings that are diffused.
    gamma_0, gamma_1: where the learned end points of the schedule start.
    schedule_width: hidden units of the noise schedule.
    """

    branch: BranchConfig
    embedding_width: int = 16
    gamma_0: float = -3.0
    gamma_1: float = 6.0
    schedule_width: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "embedding_width", "schedule_width")
        if not self.gamma_0 < self.gamma_1:
            raise InputError(f"gamma_0 is {self.gamma_0} and gamma_1 {self.gamma_1}; noise must rise from one to other")
        for name, right in (("positions", "rotary"), ("activation", "gelu"), ("qk_norm", False)):
            if getattr(self.branch, name) != right:
                raise InputError(f"{name} is {getattr(self.branch, name)}; in PLAID's network it is {right}")


class MonotoneSchedule(nn.Module):
    """The share of the way from gamma_0 to gamma_1 that is gone at t: a rising function of [0, 1] onto itself.

    One hidden layer whose weights are positive (VDM, section 3.2; PLAID's code has tanh units), shifted and scaled to
    meet its ends exactly; in float64. Weights are kept as vectors: they do not decay.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.shift, self.outer = (nn.Parameter(torch.randn(width)) for _ in range(3))

    def forward(self, t: Float[Tensor, " B"]) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """The share at `t`, and its slope."""
        w, b, v = F.softplus(self.inner.double()), self.shift.double(), F.softplus(self.outer.double())
        times = torch.cat([t.double(), t.new_tensor([0.0, 1.0], dtype=torch.float64)])
        hidden = torch.tanh(w * (times[:, None] - 0.5) + b)
        height = (hidden * v).sum(-1)
        at, start, end = height[:-2], height[-2], height[-1]
        slope = ((1 - hidden[:-2].square()) * w * v).sum(-1)
        return (at - start) / (end - start), slope / (end - start)


@dataclass(frozen=True)
class PlaidStates:
    """What a pass leaves to be read: logits are `features @ tokens.T`, xhat averages `embeddings`."""

    features: Float[Tensor, "B L D"]
    tokens: Float[Tensor, "V D"]
    embeddings: Float[Tensor, "V d"]


class Plaid(nn.Module):
    """`forward(z, gamma, embeddings, estimate)`, a `caddf.evaluation.plaid.GaussianModel`.

    It reads noised embeddings, not tokens: none of the heads and readings of a `LanguageModel` is there.
    """

    heads: frozenset[str] = frozenset()
    denoiser = "draft"
    chained = False
    block_size = 1
    # The code trains what is diffused, and how fast, at 1e-2 where the network is trained at 1.4e-3.
    rate_scales: ClassVar[dict[str, float]] = dict.fromkeys(
        ("embedding", "gamma_0", "gamma_1", "progress"), 1e-2 / 1.4e-3
    )

    def __init__(self, config: PlaidConfig) -> None:
        super().__init__()
        branch = config.branch
        self.config, self.vocab_size, self.mask_id = config, config.vocab_size, config.mask_id
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_width)
        self.gamma_0 = nn.Parameter(torch.tensor(float(config.gamma_0)))
        self.gamma_1 = nn.Parameter(torch.tensor(float(config.gamma_1)))
        self.progress = MonotoneSchedule(config.schedule_width)
        self.entry = nn.Linear(config.embedding_width, branch.width, bias=False)
        self.estimate = nn.Linear(config.embedding_width, branch.width, bias=False)
        self.time = nn.Linear(2 * FREQUENCIES, branch.width, bias=False)
        self.layers = Layers(Layer(branch) for _ in range(branch.layers))
        self.norm = nn.LayerNorm(branch.width, bias=branch.bias)
        self.readout = nn.Embedding(config.vocab_size, branch.width)
        initialise(self, branch.layers)
        with torch.no_grad():
            self.embedding.weight.copy_(F.normalize(torch.randn_like(self.embedding.weight), dim=-1))
            nn.init.normal_(self.entry.weight, std=config.embedding_width**-0.5)
            for start_at_zero in (self.estimate, self.time, self.readout):
                start_at_zero.weight.zero_()

    # What is diffused, and how fast.

    def embeddings(self) -> Float[Tensor, "V d"]:
        """The embeddings, of length one (section 3), in float64."""
        return F.normalize(self.embedding.weight.double(), dim=-1)

    def schedule(self, t: Float[Tensor, " B"]) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """The share of the way from gamma_0 to gamma_1 that is gone at `t`, and its slope, in float64."""
        return self.progress(t)

    def ends(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """gamma_0 and gamma_1, in float64."""
        return self.gamma_0.double(), self.gamma_1.double()

    # The network.

    def forward(
        self,
        z: Float[Tensor, "B L d"],
        gamma: Float[Tensor, " B"],
        embeddings: Float[Tensor, "V d"],
        estimate: Float[Tensor, "B L d"] | None = None,
    ) -> PlaidStates:
        """States of z_t at noise level `gamma`.

        The output prior is part of the logits: log q(z_i | x_i = v) is alpha/sigma^2 <z_i, e_v> up to a constant, since
        all e_v have length one; added to the network's logits it makes p(x0_i | z_t) right for each position by itself,
        and leaves to the network what the others say of it (section 3). Raises `InputError` beyond the context.
        """
        if z.shape[1] > self.config.context:
            raise InputError(
                f"a row has {z.shape[1]} tokens; PLAID reads both ways up to the context, {self.config.context}"
            )
        kind, width = self.entry.weight.dtype, self.config.embedding_width
        level = gamma[:, None, None]
        signal, noise = torch.sigmoid(-level), torch.sigmoid(level)  # alpha^2, sigma^2
        estimate = torch.zeros_like(z) if estimate is None else estimate
        with torch.autocast(z.device.type, enabled=False):
            x = self.entry((z / (signal / width + noise).sqrt()).to(kind))  # unit variance in each dimension
            x = x + self.estimate((estimate * math.sqrt(width)).to(kind)) + self.time(self._waves(level).to(kind))
        turn = rotation(torch.arange(z.shape[1], device=z.device), self.config.branch.width // self.config.branch.heads)
        for layer in self.layers:
            x = layer(x, turn)
        exact = torch.promote_types(kind, torch.float32)
        features = torch.cat([self.norm(x).to(exact), (signal.sqrt() / noise * z).to(exact)], -1)
        embeddings = embeddings.to(exact)
        return PlaidStates(features, torch.cat([self.readout.weight.to(exact), embeddings], -1), embeddings)

    @staticmethod
    def _waves(level: Float[Tensor, "B 1 1"]) -> Float[Tensor, "B 1 w"]:
        """Sines and cosines of the noise level, of frequencies e^-5 to e^5 (the code's choice)."""
        angles = level * torch.linspace(-5, 5, FREQUENCIES, dtype=level.dtype, device=level.device).exp()
        return torch.cat([angles.sin(), angles.cos()], -1)

    # Heads, in float32 or better whatever the layers are computed in.

    def log_probs(self, states: PlaidStates, where: Bool[Tensor, "B L"]) -> Float[Tensor, "N V"]:
        """log p(x0_i | z_t) (nats) at the positions in `where`."""
        with torch.autocast(states.features.device.type, enabled=False):
            return head_log_probs(states.features[where], states.tokens)

    def nll(self, states: PlaidStates, where: Bool[Tensor, "B L"], targets: Int[Tensor, "B L"]) -> Float[Tensor, " N"]:
        """`-log_probs` (nats) of `targets` at the positions in `where`, in chunks of logits."""
        with torch.autocast(states.features.device.type, enabled=False):
            return head_nll(states.features[where], states.tokens, targets[where])

    def mean(self, states: PlaidStates, where: Bool[Tensor, "B L"], elements: int = 1 << 24) -> Float[Tensor, "N d"]:
        """xhat, the embedding expected under p(x0_i | z_t) (categorical reparameterisation, section 3).

        At most `elements` logits at a time; beyond one chunk they are made again in the backward pass.
        """

        def expected(part: Tensor, tokens: Tensor, embeddings: Tensor) -> Tensor:
            return head_log_probs(part, tokens).exp() @ embeddings

        features, size = states.features[where], max(1, elements // self.vocab_size)
        with torch.autocast(features.device.type, enabled=False):
            if len(features) <= size:
                return expected(features, states.tokens, states.embeddings)
            parts = [
                checkpoint(
                    expected, part, states.tokens, states.embeddings, use_reentrant=False, preserve_rng_state=False
                )
                for part in features.split(size)
            ]
        return torch.cat(parts)

    # What it costs.

    def parameter_counts(self) -> dict[str, int]:
        """Parameters per part, and in all; the readout, which has a row per token, counts among the embeddings."""
        counts = {
            "embeddings": self.embedding.weight.numel() + self.readout.weight.numel(),
            "schedule": sum(p.numel() for p in (self.gamma_0, self.gamma_1, *self.progress.parameters())),
        }
        total = sum(p.numel() for p in self.parameters())
        return {**counts, "diffusion": total - sum(counts.values()), "total": total}

    def flops_per_position(self, context: int | None = None) -> dict[str, float]:
        """Floating-point operations of one pass over `context` positions, per position, the head and xhat included.

        Self-conditioning makes it two passes, of which the first is forward only.
        """
        branch, context = self.config.branch, context or self.config.context
        head = self.vocab_size * (branch.width + 2 * self.config.embedding_width)
        layers = self.parameter_counts()["diffusion"]
        return {"diffusion": 2.0 * (layers + head) + 4 * context * branch.width * branch.layers}

    def cached_per_position(self) -> int:
        """Nothing: every step changes all of z."""
        return 0
