"""One decoding: from prompts to tokens, what it took, and how good the tokens are."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from itertools import islice
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from caddf.benchmarks.measure import now
from caddf.categorical import RowGenerators, Warp
from caddf.data import TokenSet
from caddf.decoding import Counts, Decoder, Task
from caddf.decoding.task import hit_rate
from caddf.errors import InputError
from caddf.evaluation import estimate, score
from caddf.evaluation.likelihood import Likelihood
from caddf.experiment import Network
from caddf.interface import LanguageModel
from caddf.models.backbone import DualBranch
from caddf.models.causal_model import CausalModel
from caddf.native.model import PROPOSED
from caddf.text_model import TextModel
from caddf.tokenizer import Tokenizer

WARM_UP = 8
"""Frames of a warm-up."""


@dataclass(frozen=True)
class Prompts:
    """Beginnings of rows: of held-out text, where there is a token set, else random tokens."""

    data: TokenSet | None
    split: str
    context: int
    new_tokens: int

    def take(self, turn: int, rows: int, vocab_size: int, seed: int) -> Int[Tensor, "B P"]:
        """The rows of one round: windows spread over the split, others in each round."""
        length = self.context - self.new_tokens
        if self.data is None:
            generator = torch.Generator().manual_seed(seed + turn)
            return torch.randint(vocab_size, (rows, length), generator=generator)
        windows = self.data.split(self.split).windows(self.context)
        # Steps of the golden ratio: however many are taken, they lie evenly.
        share = (torch.arange(turn * rows, (turn + 1) * rows, dtype=torch.float64) + 0.5) * 0.618_033_988_749_895 % 1
        chosen = windows[(share * len(windows)).long().numpy()]
        return torch.from_numpy(chosen[:, :length].astype("int64"))


def task_of(
    network: Network, prompts: Int[Tensor, "B P"], new_tokens: int, temperature: float, seed: int, device: torch.device
) -> Task:
    """Prompts to be continued by `new_tokens` each, whatever they hold: no row ends early."""
    wanted = torch.full((len(prompts), new_tokens), network.mask_id)
    tokens = torch.cat([prompts, wanted], 1).to(device)
    lengths = torch.full((len(tokens),), tokens.shape[1], device=device)
    return Task(tokens, lengths, network.mask_id, RowGenerators(seed, len(tokens)), Warp(temperature))


@dataclass(frozen=True)
class Run:
    """What a decoding gave, and what it took."""

    tokens: Int[Tensor, "B T"]
    counts: Counts
    seconds: float


@torch.inference_mode()
def run(decoder: Decoder, network: Network, task: Task) -> Run:
    """Decodes to the end, on the clock."""
    begun = now(task.tokens.device)
    last = deque(decoder(cast(LanguageModel, network), task), maxlen=1).pop()
    return Run(last.tokens, last.counts, now(task.tokens.device) - begun)


@torch.inference_mode()
def warm_up(decoder: Decoder, network: Network, task: Task) -> None:
    """The first frames, off the clock."""
    deque(islice(decoder(cast(LanguageModel, network), task), WARM_UP), maxlen=0)


def account(network: Network, ran: Run, new_tokens: int, drafts: int = 0) -> dict[str, float]:
    """One run's figures per row of the batch: speed, passes, tokens per pass and round, cache hits.

    drafts: of a chain, in a round that does not copy its own.

    `tokens_per_evaluation` counts a diffusion pass at its floating-point operations per position over the causal
    branch's; `tokens_per_second` is of the whole batch.
    """
    counts, rows, flops = ran.counts, len(ran.tokens), network.flops_per_position()
    causal, diffusion, computed, needed, rounds, copied = counts.all.double().mean(1).tolist()
    cost = flops.get("diffusion", 0.0) / flops["causal"] if causal and "causal" in flops else 1.0
    return {
        "seconds": ran.seconds,
        "tokens_per_second": rows * new_tokens / ran.seconds,
        "causal_evaluations": causal,
        "diffusion_evaluations": diffusion,
        "tokens_per_evaluation": new_tokens / (causal + diffusion * cost),
        "tokens_per_round": new_tokens / rounds if rounds else None,
        "copied_share": copied / rounds if rounds else None,
        "cache_hit_rate": hit_rate(computed, needed),
        "passes_causal": counts.causal.max().item(),
        "passes_diffusion": counts.diffusion.max().item(),
        "passes_draft": drafts * (counts.rounds - counts.copied).max().item(),
    }


def weights_read(network: Network, fused: bool, drafts: bool) -> dict[str, int]:
    """Bytes of weights that a pass of each branch reads: its layers, and the rows of the heads that are read.

    `fused`: the causal branch's states are fused, `drafts`: the diffusion branch's own head is read. Embedding tables
    are read in a few rows alone, which count for nothing; a chain is read, with its head, for every draft (`draft`).
    """
    native = getattr(network, "native", None)
    sizes = {"bf16": 2, "int8": 1}
    rounded = None if native is None else sizes.get(native.kind)
    each = rounded or next(network.parameters()).element_size()
    chained = isinstance(network, DualBranch) and network.chained
    proposing = sizes[PROPOSED] if native is not None and chained else each

    def size(*modules: nn.Module | None, each: int = each) -> int:
        whole = [p for module in modules if module is not None for p in module.parameters()]
        return sum(p.numel() * each if p.ndim > 1 else p.nbytes for p in whole)

    if isinstance(network, DualBranch):
        branch, config, causal = network.diffusion, network.config, 0
        head = proposing * (config.draft_vocab or network.vocab_size) * config.diffusion.width
        head += size(network.chain, each=proposing)
        if network.causal is not None:
            causal = size(network.causal.layers, network.causal.norm, network.fusion if fused else None)
            causal += each * network.vocab_size * network.causal.config.width
        diffusion = size(branch.layers, branch.norm, each=each if fused else proposing)
        if network.chained:
            return {"causal": causal, "diffusion": diffusion, "draft": head * drafts}
        return {"causal": causal, "diffusion": diffusion + head * drafts}
    head = each * network.vocab_size * network.config.branch.width
    if isinstance(network, CausalModel):
        return {"causal": size(network.causal.layers, network.causal.norm) + head}
    return {"diffusion": each * network.parameter_counts()["diffusion"] + head}


def weights_held(network: Network) -> int:
    """Bytes of all weights, and of the kernels' copies."""
    native = getattr(network, "native", None)
    copies: int = native.bytes if native is not None else 0
    return copies + sum(p.nbytes for p in network.parameters())


def bandwidth_share(read: dict[str, int], figures: dict[str, float], bandwidth: float) -> float:
    """Bytes of weights read in all passes, over what the memory could have delivered meanwhile."""
    whole = sum(figures.get(f"passes_{part}", 0.0) * size for part, size in read.items())
    return whole / (figures["seconds"] * bandwidth)


# Quality.


def unigram_entropy(tokens: Int[Tensor, "B N"]) -> float:
    """Entropy (nats) of the tokens of each row, as a bag; the mean over rows."""
    entropies = []
    for row in tokens:
        share = row.unique(return_counts=True)[1].double() / len(row)
        entropies.append(torch.special.entr(share).sum().item())
    return sum(entropies) / len(entropies)


@dataclass(frozen=True)
class Judge:
    """A causal model that others' text is scored by: exp of its mean nats per new token, given the prompt."""

    name: str
    model: TextModel

    @torch.inference_mode()
    def nll(self, tokenizer: Tokenizer, tokens: Int[Tensor, "B T"], prompt: int) -> float:
        """Nats per token of the judge, over what comes after the first `prompt` tokens of `tokenizer`.

        Text of another tokenizer than its own is decoded, and prompt and continuation tokenised anew, each by itself.
        Raises `InputError` where it cannot read as far.
        """
        most = math.inf if self.model.slides else self.model.context
        own, nats, count = self.model.tokenizer, 0.0, 0
        same = own.fingerprint == tokenizer.fingerprint
        for row in tokens.tolist():
            given, new = row[:prompt], row[prompt:]
            if not same:
                given, new = (own.encode(tokenizer.decode(part)) for part in (given, new))
            if len(given + new) > most:
                raise InputError(
                    f"judge is {self.name}, which reads {most} tokens at most; a text has {len(given + new)} of its "
                    "tokens: give a judge of a longer context, or a smaller --context"
                )
            x0 = torch.tensor([given + new], device=self.model.device)
            nats -= score(cast(LanguageModel, self.model.model), x0, "causal")[0, len(given) :].sum().item()
            count += len(new)
        return nats / max(count, 1)


def exact_ppl(network: Network, windows: Int[Tensor, "N L"], target: str, device: torch.device) -> float:
    """The exact perplexity of what a decoder's target is: `causal`, or `fused` in blocks (likelihood `block`)."""
    likelihood: Likelihood = "causal" if target == "causal" else "block"
    nats: list[Float[Tensor, " B"]] = []
    with torch.inference_mode():
        for x0 in windows.to(device).split(8):
            nats.append(-score(cast(LanguageModel, network), x0, likelihood).sum(-1).cpu())
    return estimate(torch.cat(nats), windows.shape[1]).ppl


def check_tokenizer(name: str, tokenizer: Tokenizer | None, data: TokenSet, setting: str = "data") -> None:
    """Raises `InputError` where `setting`, a token set, is not in the model's tokens."""
    if tokenizer is not None and tokenizer.fingerprint != data.tokenizer.fingerprint:
        raise InputError(
            f"{setting} is {data.folder}, tokenised by {data.tokenizer.name}; {name} needs its own tokenizer, "
            f"{tokenizer.name}: prepare the data with --tokenizer and the model's tokenizer.json"
        )
