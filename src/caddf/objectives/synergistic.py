"""CAD-DF's mixture: denoising (eq. 5), infilling (eq. 6) and blocks (eq. 6 in blocks), in shares of each batch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from caddf.errors import Checked, InputError, a_share, at_least
from caddf.forward_process import mask_tokens
from caddf.interface import AnyOrder, Block, Infill, LanguageModel, Pattern
from caddf.objectives.distillation import Distillation, Divergence
from caddf.objectives.forms import Form, denoising
from caddf.objectives.heads import Term
from caddf.objectives.loss import Times, weights_like, whole
from caddf.objectives.reading import ByReadings, Reading
from caddf.schedules import ScheduleName


@dataclass(frozen=True)
class SynergisticConfig(Checked):
    """Shares of the rows of a batch, and weights of the heads.

    denoise: share of the rows that are denoised, besides what else they are for: the causal head learns from every row.
        Where infill and block are 0, all of them.
    infill: share of the rows that are infilled left to right; this and the next are normalised to sum to one.
    block: share of the rows that are infilled in blocks.
    denoising: the denoising loss.
    schedule: of t-DCE.
    times: how the noise levels of a batch are drawn.
    all_masked: share of infill canvases that are all masked, which is where decoding starts.
    revealed: share of blocks whose first tokens are revealed, as after an accepted draft; the rest is all masked.
    revealed_most: most tokens that are revealed; not set, all of a block but one. A window of drafts that slides
        (target causal) always starts with one.
    draft_weight: of the draft head's loss beside the fused head's.
    causal_weight: of the causal head's loss beside the fused head's.
    draft_decay: weight of a draft's loss over that of the draft before it in the block.
    distill: share of a block's draft loss that is the divergence from the head that verifies the drafts, the rest being
        the cross-entropy of the text.
    distill_form: kl (from that head to the drafts), or tv, the share of drafts that it would reject.
    distill_from: that head.
    """

    denoise: float = 0.2
    infill: float = 0.1
    block: float = 0.9
    denoising: Form = "lambda-dce"
    schedule: ScheduleName = "loglinear"
    times: Times = "stratified"
    all_masked: float = 0.5
    revealed: float = 0.3
    revealed_most: int | None = None
    draft_weight: float = 0.5
    causal_weight: float = 2.0
    draft_decay: float = 1.0
    distill: float = 0.0
    distill_form: Divergence = "kl"
    distill_from: Literal["causal", "fused"] = "causal"

    def __post_init__(self) -> None:
        super().__post_init__()
        shares = (self.denoise, self.infill, self.block)
        if min(shares) < 0 or sum(shares) == 0:
            raise InputError(
                f"denoise, infill and block are {shares}; shares must be 0 or more, and one of them above 0"
            )
        a_share(self, "denoise", "all_masked", "revealed", "draft_decay", "distill")
        at_least(1, self, "revealed_most", note="revealed 0 reveals none")
        at_least(0, self, "draft_weight", "causal_weight")


class Synergistic(ByReadings):
    """The mixture of `config`; a model's draft head is trained on every row, its causal head wherever the prefix is x0.

    Only masked positions are scored by the fused and the draft head: an unmasked token is in its own `h_cad`, and
    scoring it would train copying. The loss is the sum of the readings' (nats per token), each times its share of the
    batch's rows; rows that are denoised besides count in two.
    """

    def __init__(self, config: SynergisticConfig, block_size: int) -> None:
        self.config, self.block_size = config, block_size
        self.denoising = denoising(config.denoising, config.schedule, config.times)

    def readings(self, model: LanguageModel, x0: Int[Tensor, "B L"], generator: torch.Generator) -> list[Reading]:
        """One of each kind that has rows."""
        config, none = self.config, x0[:0]
        share = config.denoise if config.infill + config.block else 1.0
        denoised, infilled, blocks = x0[len(x0) - whole(len(x0) * share, generator) :], none, none
        if config.infill + config.block:
            count = whole(len(x0) * config.infill / (config.infill + config.block), generator)
            infilled, blocks = x0[:count], x0[count:]
        if "fused" not in model.heads:  # nothing reads left to right: what would be infilled is denoised
            denoised, infilled = torch.cat([infilled, denoised]), none
        return [
            dataclasses.replace(reading(model, rows, generator), share=len(rows) / len(x0))
            for reading, rows in ((self._denoise, denoised), (self._infill, infilled), (self._block, blocks))
            if len(rows)
        ]

    def _denoise(self, model: LanguageModel, x0: Int[Tensor, "B L"], generator: torch.Generator) -> Reading:
        """Eq. 5: `prefix = x_t`, weighted as the denoising loss says."""
        x_t, weight = self.denoising.draw(x0, model.mask_id, generator)
        return self._reading(model, x0, x_t, x_t, AnyOrder(), "denoise", weight)

    def _infill(self, model: LanguageModel, x0: Int[Tensor, "B L"], generator: torch.Generator) -> Reading:
        """Eq. 6: `prefix = x0`, the canvas masked at a random rate or wholly."""
        rate = torch.rand(len(x0), generator=generator, dtype=torch.float64)
        whole = torch.rand(len(x0), generator=generator) < self.config.all_masked
        canvas = mask_tokens(x0, torch.where(whole, 1.0, rate), model.mask_id, generator)
        return self._reading(model, x0, x0, canvas, Infill(), "infill")

    def _block(self, model: LanguageModel, x0: Int[Tensor, "B L"], generator: torch.Generator) -> Reading:
        """Eq. 6 in blocks: each all masked, or but for its first j tokens, j ~ U{1..k-1} (or up to `revealed_most`)."""
        config, pattern, positions = self.config, Block(self.block_size), torch.arange(x0.shape[1])
        index, shape = pattern.index(positions), (len(x0), -(-x0.shape[1] // self.block_size))
        most = min(config.revealed_most or self.block_size, self.block_size - 1)
        count = torch.randint(1, max(2, most + 1), shape, generator=generator)
        count = count * (torch.rand(shape, generator=generator) < config.revealed) * (self.block_size > 1)
        nth = positions - pattern.start(positions) - count[:, index]
        canvas = torch.where((nth < 0).to(x0.device), x0, model.mask_id)
        decay = config.draft_decay ** nth.clamp(min=0).double()
        return self._reading(model, x0, x0, canvas, pattern, "block", drafts=decay)

    def _reading(
        self,
        model: LanguageModel,
        x0: Int[Tensor, "B L"],
        prefix: Int[Tensor, "B L"],
        canvas: Int[Tensor, "B L"],
        pattern: Pattern,
        name: str,
        weight: Float[Tensor, " B"] | None = None,
        drafts: Float[Tensor, "B L"] | None = None,
    ) -> Reading:
        """What each head is scored on in one reading; without `weight`, the mean over the masked positions.

        `drafts` are the weights of a block's drafts in theirs.
        """
        config = self.config
        masked, everywhere = canvas == model.mask_id, weights_like(x0, 1.0)

        def mean(each: Bool[Tensor, "B L"] | Float[Tensor, "B L"] = masked) -> Float[Tensor, "B L"]:
            if weight is not None:
                return each * weights_like(x0, weight[:, None])
            each = each.to(everywhere)
            return each / each.sum().clamp(min=torch.finfo(each.dtype).tiny)

        terms = {model.denoiser: Term(mean())}
        names: dict[str, str] = {model.denoiser: name}
        distillation = None
        if model.denoiser != "draft":
            each = masked if drafts is None else masked * drafts.to(everywhere)
            small = getattr(model, "draft_tokens", None)
            if small is not None and model.chained and isinstance(pattern, Block):  # what it lacks is not scored
                each = each * torch.isin(x0, small)
            terms["draft"], names["draft"] = Term(mean(each), config.draft_weight), f"{name}_draft"
            if drafts is not None and config.distill:
                distillation = Distillation(config.distill, config.distill_from, config.distill_form)
        if "causal" in model.heads and not isinstance(pattern, AnyOrder):
            terms["causal"], names["causal"] = Term(everywhere, config.causal_weight), f"{name}_causal"
        names = {head: names.get(head, f"{name}_{head}") for head in (*terms, "distill")}
        return Reading(x0, prefix, canvas, pattern, terms, names, distillation)
