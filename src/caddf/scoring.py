"""Measuring a loaded model on text: perplexities over a token set, and log-probabilities of given texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from caddf import evaluation
from caddf.data import TokenSet
from caddf.errors import InputError, check_arguments, check_seed
from caddf.evaluation import EvaluationConfig
from caddf.evaluation.likelihood import Likelihood
from caddf.evaluation.protocol import PRESETS, Protocol, Window, preset, windows
from caddf.evaluation.reading import Model
from caddf.text_model import TextModel, fingerprint

UNNAMED = replace(PRESETS["caddf"], split="validation")
"""What is evaluated where no protocol is named: the windows of the tables, of the validation split."""


def windows_of(model: TextModel, data: TokenSet, protocol: Protocol) -> list[Window]:
    """The windows of a token set; raises `InputError` if the tokenizers differ, or the model cannot read as far."""
    if data.tokenizer.fingerprint != model.tokenizer.fingerprint:
        raise InputError(
            f"{data.folder} is tokenised by {data.tokenizer.name} ({data.tokenizer.fingerprint[:12]}), the model by "
            f"{model.tokenizer.name} ({model.tokenizer.fingerprint[:12]}); prepare the data with --tokenizer and the "
            "model's tokenizer.json"
        )
    if protocol.length is not None and protocol.length > model.context:
        raise InputError(f"length is {protocol.length}; it must be at most the model's context, {model.context}")
    return windows(data.split(protocol.split).tokens, protocol, model.tokenizer.eos_id, model.context)


def evaluate(
    model: TextModel | Model,
    data: TokenSet | str | Path | Int[Tensor, "N L"] | Sequence[Window],
    *,
    split: str | None = None,
    protocol: Protocol | str | None = None,
    settings: EvaluationConfig | None = None,
    vocab_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Every likelihood, bound and accuracy that a model has, in nats per token with standard errors, as plain values.

    `data` is a token set (or its folder), cut and counted as `protocol` says (an object, or a preset's name; not set,
    `UNNAMED`), or windows: a tensor, or a list of `Window`. Where `split` and `settings` are given, they come before
    the protocol's split, and its samples, number of windows and seed. A plain function `x_t -> log-probabilities` may
    stand in the model's place, with `vocab_size` and windows.
    """
    check_arguments(evaluate, locals())
    if isinstance(model, str | Path):
        raise InputError(f"model is {model}; it must be a model, as caddf.load({str(model)!r}) gives one")
    if isinstance(protocol, str):
        protocol = preset(protocol)
    about: dict[str, Any] = {}
    if isinstance(data, TokenSet | str | Path):
        if not isinstance(model, TextModel):
            raise InputError("data is a token set, but the model has no tokenizer; give windows of tokens [N, L]")
        protocol = protocol or UNNAMED
        settings = settings or EvaluationConfig(
            samples=protocol.samples, max_windows=protocol.max_windows, seed=protocol.seed
        )
        check_seed(settings.seed)
        protocol = replace(
            protocol,
            length=protocol.length or model.context,
            split=split or protocol.split,
            samples=settings.samples,
            max_windows=settings.max_windows,
            seed=settings.seed,
        )
        about = {"protocol": asdict(protocol)}
        data = windows_of(model, data if isinstance(data, TokenSet) else TokenSet.open(data), protocol)
    elif (given := protocol.name if protocol else split) is not None:
        name = "protocol" if protocol else "split"
        raise InputError(f"{name} is {given}, but data is windows, which are cut already; give a token set")
    settings = settings or EvaluationConfig()
    check_seed(settings.seed)
    length = data.shape[-1] if isinstance(data, Tensor) else max((len(each.tokens) for each in data), default=0)
    if settings.block_size is not None and settings.block_size > length:
        raise InputError(f"block_size is {settings.block_size}; it must lie between 1 and the window, {length}")
    if not isinstance(model, TextModel):
        return evaluation.evaluate(model, data, settings, vocab_size=vocab_size, progress=progress)
    lengths = model.tokenizer.byte_lengths
    measured = evaluation.evaluate(
        model.model, data, settings, byte_lengths=lengths, bound=model.bound, device=model.device, progress=progress
    )
    return {**about, **of_model(model), **measured}


def of_model(model: TextModel) -> dict[str, Any]:
    """By what an evaluation is told from one of another model: its tokens, how large it is, and its weights."""
    parameters = sum(parameter.numel() for parameter in model.model.parameters())
    weights = fingerprint(model.model)
    return {"tokenizer": model.tokenizer.fingerprint, "parameters": parameters, "weights": weights}


def score(
    model: TextModel, texts: str | Sequence[str], *, likelihood: Likelihood = "causal", block_size: int | None = None
) -> list[Float[Tensor, " T"]]:
    """log p (nats) of every token of each text, from its start, under the named exact likelihood.

    Raises `InputError` where a text is empty or longer than the context: what lies before a token is part of its score.
    """
    check_arguments(score, locals())
    scores = []
    for text in [texts] if isinstance(texts, str) else texts:
        tokens = model.tokenizer.encode(text)
        if not 0 < len(tokens) <= model.context:
            raise InputError(f"a text has {len(tokens)} tokens; to be scored it must have 1 to {model.context}")
        x0 = torch.tensor([tokens], device=model.device)
        scores.append(evaluation.score(model.model, x0, likelihood, block_size)[0].cpu())
    return scores
