"""Prompt to a stream of frames: text, what was drafted and accepted on the way, and what it cost."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from caddf.categorical import RowGenerators, Warp
from caddf.decoding import (
    DECODERS,
    Ancestral,
    Autoregressive,
    D3PMUniform,
    Decoder,
    FirstHitting,
    Frame,
    Gaussian,
    Hybrid,
    Remasking,
    SemiAutoregressive,
    Speculative,
    Task,
)
from caddf.decoding.confidence import SurestFirst
from caddf.decoding.rates import Rates
from caddf.decoding.task import NO_TOKEN, DecodingError
from caddf.errors import InputError, at_least, check_arguments, check_seed
from caddf.interface import LanguageModel
from caddf.models.plaid import Plaid
from caddf.snapshots import Row, Snapshot, StopWords
from caddf.text_model import TextModel

HOLE, WIDTH = re.compile(r"\[MASK\b([^\[\]]*)\]"), re.compile(r"(?::([0-9]{1,99}))?")
"""A hole of a template, and what may stand in it: `[MASK]` is one token wide, `[MASK:24]` twenty-four."""

REVISING = (Remasking, D3PMUniform, Gaussian)
"""Decoders that may draw again what stands, up to their last step."""
WITHOUT_TIME = (Ancestral, FirstHitting, Remasking, SemiAutoregressive, SurestFirst, Hybrid)
"""Decoders that tell a network no time."""
NEW = 64
"""Tokens that a prompt is continued by where nothing is said."""
SETTINGS = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop")
"""What `generate` takes for every decoder."""


def decoder_of(name: str, settings: dict[str, Any], besides: Sequence[str] = ()) -> Decoder:
    """The decoder of that name with these settings; raises `InputError` for a name or setting that is not there.

    `besides` are the settings that the caller takes itself, which the error names too.
    """
    if name not in DECODERS:
        raise InputError(f"decoder is {name}; it must be one of {', '.join(DECODERS)}")
    known = [field.name for field in dataclasses.fields(DECODERS[name]) if field.name != "until"]  # type: ignore[arg-type]
    for setting in settings:
        if setting not in known:
            has = f"has {', '.join(known)}" if known else "has none"
            has += f", and all decoders have {', '.join(besides)}" if besides else ""
            raise InputError(f"{setting} is set, but the decoder {name} has no such setting; it {has}")
    return DECODERS[name](**settings)


def revises(model: TextModel, decoder: Decoder) -> bool:
    """Whether a token that stands may be drawn again: nothing is final then before the last step."""
    return isinstance(decoder, REVISING) or getattr(model.model, "process", "") == "uniform"


def generate(
    model: TextModel,
    prompt: str | Sequence[str] | None = None,
    *,
    template: str | Sequence[str] | None = None,
    decoder: str | None = None,
    max_new_tokens: int | Sequence[int] | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | Sequence[int] = 0,
    stop: str | Sequence[str] = (),
    **settings: Any,
) -> Iterator[Snapshot]:
    """Continues prompts, or fills the holes of templates, frame by frame; the last frame is complete.

    `prompt` and `template` are a text or several, one row of a batch each; row r draws from `seed + r`, or from its own
    of several, and gets what it would get alone. `decoder` is a name of `caddf.decoding.DECODERS` (not set, the
    method's), `settings` are its own. A prompt is continued by `max_new_tokens` (64; several: a number for each), and
    `<|endoftext|>` or one of the strings of `stop` ends its row. In a template `<|endoftext|>` is never drawn.

    Text needs a tokenizer: a plain function `x_t -> log-probabilities` is given to a decoder of `caddf.decoding`
    itself, as `caddf.interface.as_model(function, V)`, with a `Task` of token ids.

    Raises `InputError`, before anything is decoded, for settings that are wrong, a prompt that does not fit the
    context (left to right one may be longer where positions are not learned: attention slides over it), and a template
    without a hole.
    """
    check_arguments(generate, {name: value for name, value in locals().items() if name != "settings"})
    if (prompt is None) == (template is None):
        raise InputError("give either a prompt or a template")
    for name, set_ in (("max_new_tokens", max_new_tokens is not None), ("stop", bool(stop))):
        if set_ and template is not None:
            raise InputError(f"{name} is set, beside a template, whose holes say what is written; leave it out")
    if template is not None and settings.get("target") == "causal":
        raise InputError("target is causal, beside a template, of which it sees nothing behind a hole; leave it out")
    words = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in words:
        raise InputError("stop holds an empty string, which every text contains; give the text that ends a row")
    filling = template is not None
    chosen = decoder_of(decoder or model.decoder, settings, SETTINGS)
    if (size := settings.get("block_size")) is not None and not 1 <= size <= model.context:
        raise InputError(f"block_size is {size}; it must lie between 1 and the context, {model.context}")
    if isinstance(chosen, Gaussian) != isinstance(model.model, Plaid):
        name = decoder or model.decoder
        raise InputError(
            f"decoder is {name}; this model, which is of PLAID's kind, has gaussian alone"
            if isinstance(model.model, Plaid)
            else f"decoder is {name}, which is PLAID's alone; this model is of another kind"
        )
    _check_heads(model, decoder or model.decoder, chosen, filling)
    given = template if filling else prompt
    assert given is not None
    texts = [given] if isinstance(given, str) else list(given)
    if not texts:
        raise InputError("no prompt is given; a batch needs at least one row")
    at_least(1, max_new_tokens=max_new_tokens)
    new = _each("max_new_tokens", NEW if max_new_tokens is None else max_new_tokens, len(texts), step=0)
    seeds = _each("seed", seed, len(texts), step=1)
    for each in seeds:
        check_seed(each)
    # Left to right the attention window slides over what is longer than the context; a canvas cannot, and no window
    # whose positions are learned.
    slides = isinstance(chosen, Autoregressive | Speculative) and model.slides and not filling
    longest = None if slides else model.context
    if filling:
        rows = [_template(model, text) for text in texts]
    else:
        rows = [_prompt(model, text, many, longest) for text, many in zip(texts, new, strict=True)]
    banned = (model.tokenizer.eos_id,) if filling else ()
    warp = Warp(temperature, top_k, top_p, min_p, banned)
    return _stream(model, rows, chosen, warp, filling, words, seeds)


def _each(name: str, given: int | Sequence[int], rows: int, step: int) -> list[int]:
    """A number for each row: those given, or one for the first and `step` more for each of the next."""
    numbers = list(given) if isinstance(given, Sequence) else [given + step * r for r in range(rows)]
    if len(numbers) != rows:
        raise InputError(f"{name} has {len(numbers)} values for {rows} rows; give one for all, or one for each")
    return numbers


def _check_heads(model: TextModel, name: str, chosen: Decoder, filling: bool) -> None:
    """Raises `InputError` for a decoder, or a template, that asks for what this kind of model does not do."""
    network, has, method = model.model, model.model.heads, model.about.get("method")
    own = f"this {f'{method} ' if method else ''}model's own decoder is {model.decoder}"
    if isinstance(chosen, D3PMUniform) and model.decoder != name:
        raise InputError(f"decoder is {name}, which is for models of D3PM's uniform chain alone; {own}")
    uniform = model.decoder == "d3pm_uniform" or getattr(network, "process", "") == "uniform"
    if uniform and not isinstance(chosen, D3PMUniform if model.decoder == "d3pm_uniform" else Rates):
        raise InputError(f"decoder is {name}, which starts from masks, of which this model knows nothing; {own}")
    if network.denoiser == "causal" and not isinstance(chosen, Autoregressive | Speculative):
        raise InputError(f"decoder is {name}; this model reads left to right alone: {own}")
    if getattr(network.config, "time", False) and isinstance(chosen, WITHOUT_TIME):
        raise InputError(f"decoder is {name}, which knows no time, of which this model is told; {own}")
    if isinstance(chosen, Hybrid) and chosen.anchor and "fused" not in has:
        raise InputError(f"decoder is {name}; this model does not fill in left to right over a canvas: {own}")
    if isinstance(chosen, Autoregressive | Speculative) and "causal" not in has:
        raise InputError(f"decoder is {name}; this model does not read left to right: {own}")
    if isinstance(chosen, Autoregressive | Speculative) and chosen.target not in has:
        raise InputError(f"target is {chosen.target}; this model has the heads {', '.join(sorted(has))}")
    if isinstance(chosen, Speculative) and "draft" not in has and not chosen.lookup:
        raise InputError(f"decoder is {name}, lookup 0; this model has nothing to draft with but its text: {own}")
    if isinstance(chosen, Speculative):
        chosen.drafting(cast(LanguageModel, network))
    if filling and has == {"causal"}:
        raise InputError("a template is given to a model that reads left to right alone; give a prompt")


def _prompt(model: TextModel, text: str, new: int, longest: int | None) -> Row:
    tokens = model.tokenizer.encode(text)
    if longest is not None and len(tokens) >= longest:
        raise InputError(
            f"the prompt has {len(tokens)} tokens; with this decoder and model it must be shorter than the context, "
            f"{longest}"
        )
    if longest is not None and len(tokens) + new > longest:
        raise InputError(
            f"the prompt's {len(tokens)} tokens and max_new_tokens {new} make {len(tokens) + new}; with this decoder "
            f"and model they must fit the context, {longest}"
        )
    return Row(text, tokens + [model.model.mask_id] * new)


def _template(model: TextModel, text: str) -> Row:
    tokens: list[int] = []
    at = 0
    for hole in HOLE.finditer(text):
        if (given := WIDTH.fullmatch(hole[1])) is None:
            raise InputError(f"the template's {hole[0]} is no hole; write [MASK], or [MASK:24] for a hole of 24 tokens")
        width = int(given[1] or 1)
        if not 1 <= width <= model.context:
            raise InputError(f"the template's {hole[0]} is {width} wide; it must lie between 1 and {model.context}")
        tokens += model.tokenizer.encode(text[at : hole.start()])
        tokens += [model.model.mask_id] * width
        if len(tokens) > model.context:
            raise InputError(f"the template has {len(tokens)} tokens or more; it must fit the context, {model.context}")
        at = hole.end()
    tokens += model.tokenizer.encode(text[at:])
    if model.model.mask_id not in tokens:
        raise InputError("the template has no [MASK] to fill; write [MASK:24] for a hole of 24 tokens")
    if len(tokens) > model.context:
        raise InputError(f"the template has {len(tokens)} tokens; it must fit the context, {model.context}")
    return Row(text, tokens)


def _stream(
    model: TextModel,
    rows: list[Row],
    decoder: Decoder,
    warp: Warp,
    filling: bool,
    stop: tuple[str, ...],
    seeds: list[int],
) -> Iterator[Snapshot]:
    lengths = torch.tensor([len(row.tokens) for row in rows], device=model.device)
    mask_id, eos_id = model.model.mask_id, model.tokenizer.eos_id
    tokens = torch.full((len(rows), int(lengths.max())), mask_id, device=model.device)
    for r, row in enumerate(rows):
        tokens[r, : len(row.tokens)] = torch.tensor(row.tokens)
    wanted = tokens == mask_id
    stops = [StopWords(stop, model.tokenizer) for _ in rows]

    def finished(x: Int[Tensor, "B L"]) -> Bool[Tensor, " B"]:
        """A row whose new text, up to its first open position, holds `<|endoftext|>` or a stop string."""
        if filling:
            return torch.zeros(len(x), dtype=torch.bool, device=x.device)
        ended = ((x == eos_id) & wanted).any(1)
        if not stop and not ended.any():
            return ended
        reached = (x != mask_id).long().cumprod(1).bool() & wanted
        ended = (reached & (x == eos_id)).any(1)
        for r in range(len(x)) if stop else ():
            ended[r] |= stops[r].met(x[r, reached[r]].tolist())
        return ended

    task = Task(tokens, lengths, mask_id, RowGenerators(0, seeds), warp, finished, filling)
    flops = model.model.flops_per_position()
    cost = flops.get("diffusion", 0.0) / flops["causal"] if "causal" in flops else 1.0
    seconds, written = 0.0, tokens
    frames = _final(decoder(cast(LanguageModel, model.model), task), revises(model, decoder))
    if (native := getattr(model.model, "native", None)) is not None:
        native.refresh()  # once for a model, as loading it is, and no part of decoding
    while True:
        begun = time.perf_counter()
        with torch.inference_mode():
            step = next(frames, None)
        seconds += time.perf_counter() - begun
        if step is None:
            if bool(task.unfinished(written).any()):
                raise DecodingError(NO_TOKEN)
            return
        frame, final = step
        written = frame.tokens
        yield Snapshot(frame, rows, task, model.tokenizer, stop, seeds, seconds, cost, final)


def _final(frames: Iterator[Frame], revised: bool) -> Iterator[tuple[Frame, bool]]:
    """Each frame, and whether what stands in it stays: where it may be `revised`, in the last alone."""
    before: Frame | None = None
    for frame in frames:
        frame = dataclasses.replace(frame, counts=frame.counts.copy())  # the decoder goes on counting
        if not revised:
            yield frame, True
        elif before is not None:
            yield before, False
        before = frame
    if revised and before is not None:
        yield before, True
