"""Measuring a loaded model on text: perplexities over a token set, and log-probabilities of given texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from caddf import evaluation
from caddf.data import TokenSet
from caddf.errors import InputError
from caddf.evaluation import EvaluationConfig
from caddf.evaluation.likelihood import Likelihood, Model
from caddf.text_model import TextModel, check_seed


def windows_of(model: TextModel, data: TokenSet, split: str) -> Int[Tensor, "N L"]:
    """The windows of a split, as long as the model's context; raises `InputError` if the tokenizers differ."""
    if data.tokenizer.fingerprint != model.tokenizer.fingerprint:
        raise InputError(
            f"{data.folder} is tokenised by {data.tokenizer.name} ({data.tokenizer.fingerprint[:12]}), the model by "
            f"{model.tokenizer.name} ({model.tokenizer.fingerprint[:12]}); prepare the data with --tokenizer and the "
            "model's tokenizer.json"
        )
    return torch.from_numpy(data.split(split).windows(model.context).astype("int64"))


def evaluate(
    model: TextModel | Model,
    data: TokenSet | str | Path | Int[Tensor, "N L"],
    *,
    split: str = "validation",
    settings: EvaluationConfig | None = None,
    vocab_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Every likelihood, bound and accuracy that a model has, in nats per token with standard errors, as plain values.

    `data` is a token set (or its folder), scored in windows of the model's context, or a tensor of windows. A plain
    function `x_t -> log-probabilities` may stand in the model's place, with `vocab_size` and a tensor of windows.
    """
    settings = settings or EvaluationConfig()
    check_seed(settings.seed)
    if not isinstance(data, Tensor):
        if not isinstance(model, TextModel):
            raise InputError("data is a token set, but the model has no tokenizer; give windows of tokens [N, L]")
        data = windows_of(model, data if isinstance(data, TokenSet) else TokenSet.open(data), split)
    length = data.shape[-1]
    if settings.block_size is not None and settings.block_size > length:
        raise InputError(f"block_size is {settings.block_size}; it must lie between 1 and the window, {length}")
    if not isinstance(model, TextModel):
        return evaluation.evaluate(model, data, settings, vocab_size=vocab_size, progress=progress)
    lengths = model.tokenizer.byte_lengths
    return evaluation.evaluate(
        model.model, data, settings, byte_lengths=lengths, bound=model.bound, device=model.device, progress=progress
    )


def score(
    model: TextModel, texts: str | Sequence[str], *, likelihood: Likelihood = "causal", block_size: int | None = None
) -> list[Float[Tensor, " T"]]:
    """log p (nats) of every token of each text, from its start, under the named exact likelihood.

    Raises `InputError` where a text is empty or longer than the context: what lies before a token is part of its score.
    """
    scores = []
    for text in [texts] if isinstance(texts, str) else texts:
        tokens = model.tokenizer.encode(text)
        if not 0 < len(tokens) <= model.context:
            raise InputError(f"a text has {len(tokens)} tokens; to be scored it must have 1 to {model.context}")
        x0 = torch.tensor([tokens], device=model.device)
        scores.append(evaluation.score(model.model, x0, likelihood, block_size)[0].cpu())
    return scores
