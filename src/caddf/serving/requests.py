"""What may be asked of a server: the bodies of its requests, checked, and the rows of a batch that they stand for."""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from caddf.errors import Checked, InputError, at_least, check_seed, check_types, nearest
from caddf.evaluation.likelihood import Likelihood
from caddf.generation import HOLE, NEW, SETTINGS

Kind = Literal["prompt", "template"]
Body = TypeVar("Body", bound=Checked)
OF_ALL = ("model", "prompt", "template", "decoder", *SETTINGS)
"""What is not a setting of one decoder."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (),
    "presence_penalty": (0,),
}
"""Settings of OpenAI's that are not built, and what they may be set to, since it changes nothing; null always may."""


def read(body: Any, kind: type[Body]) -> Body:
    """A request of that kind; raises `InputError` where `body`, parsed JSON, is none. null is as if not set."""
    if not isinstance(body, dict):
        raise InputError(f"the body is {type(body).__name__}; it must be a JSON object")
    given = {name: value for name, value in body.items() if value is not None and name != "user"}
    known = [each.name for each in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in [*given]:
        if name in NEUTRAL and name not in known:
            if given.pop(name) not in NEUTRAL[name]:
                raise InputError(f"{name} is {json.dumps(body[name])}, which this server does not do; leave it out")
        elif name not in known:
            raise InputError(f"there is no setting {name}{nearest(name, known)}; there are {', '.join(known)}")
    return kind(**given)


@dataclass(frozen=True)
class Rows:
    """Rows that can be decoded in one batch with others of the same `sampling`, each as it would be alone.

    `new` has the tokens that each prompt is continued by, and is empty for templates. `n` rows in a row are of one
    prompt. `before` and `after` are what a text begins and ends with that is not to be told.
    """

    kind: Kind
    texts: list[str]
    seeds: list[int]
    new: list[int]
    sampling: dict[str, Any]
    n: int = 1
    before: int = 0
    after: int = 0

    def with_(self, others: list[Rows]) -> dict[str, Any]:
        """The arguments of `caddf.generate` for these and others."""
        every = [self, *others]
        arguments = {self.kind: [text for each in every for text in each.texts], **self.sampling}
        arguments["seed"] = [seed for each in every for seed in each.seeds]
        if self.new:
            arguments["max_new_tokens"] = [new for each in every for new in each.new]
        return arguments

    def joins(self, other: Rows) -> bool:
        """Whether the two can share a batch."""
        return (self.kind, self.sampling) == (other.kind, other.sampling)

    def told(self, text: str) -> str:
        """Of a row's text what was asked for."""
        return text[self.before : len(text) - self.after]


@dataclass(frozen=True)
class Completion(Checked):
    """`POST /v1/completions`: OpenAI's names, and what CAD-DF does besides.

    model: the name under which the model is served.
    prompt: text to continue, or several.
    suffix: what comes after the hole: `max_tokens` tokens are written between prompt and suffix, exactly so many.
    template: text with holes, `[MASK:24]`, instead of a prompt; or several.
    max_tokens: tokens to write (64).
    temperature, top_k, top_p, min_p: of what is drawn, as in caddf generate.
    n: texts for each prompt or template.
    seed: of the first text; each of the others has the next. Not set: one is drawn, and told.
    stop: strings that end a text.
    stream: send what is written as it stands, as server-sent events.
    stream_options: include_usage tells the tokens at the end of a stream.
    decoder: a name of caddf generate --decoder; not set, the model's own.
    settings: of that decoder, by name.
    """

    model: str | None = None
    prompt: str | tuple[str, ...] | None = None
    suffix: str | None = None
    template: str | tuple[str, ...] | None = None
    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    n: int = 1
    seed: int | None = None
    stop: str | tuple[str, ...] = ()
    stream: bool = False
    stream_options: Mapping[str, Any] = field(default_factory=dict)
    decoder: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("stream_options", "settings"):
            if not isinstance(getattr(self, name), dict):
                raise InputError(f"{name} is {getattr(self, name)!r}; it must be an object")
        check_types({"include_usage": bool}, self.stream_options, "stream_options.")
        for name in self.settings:
            if name in OF_ALL:
                raise InputError(f"settings has {name}, which is not a decoder's own; give it beside settings")
        at_least(1, self, "n", "max_tokens")
        if self.seed is not None:
            check_seed(self.seed)
        if (self.prompt is None) == (self.template is None):
            raise InputError("give either a prompt or a template")
        for name in ("suffix", "max_tokens", "stop"):
            if self.template is not None and getattr(self, name) not in (None, ()):
                raise InputError(f"{name} is set, beside a template, whose holes say what is written; leave it out")
        if self.suffix is None:
            return
        if not isinstance(self.prompt, str):
            raise InputError("suffix is set, beside several prompts; give one")
        if self.stop:
            raise InputError("stop is set, beside a suffix, which max_tokens are written before; leave it out")
        for name, text in (("prompt", self.prompt), ("suffix", self.suffix)):
            if (hole := HOLE.search(text)) is not None:
                raise InputError(f"{name} has {hole[0]}, which would be a hole; give a template instead")

    def rows(self) -> Rows:
        """What is to be written; without a `seed` another one each time."""
        new = NEW if self.max_tokens is None else self.max_tokens
        sampling: dict[str, Any] = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        sampling |= {"decoder": self.decoder, **self.settings}
        kind: Kind = "prompt"
        before, after, given = 0, 0, self.prompt
        if self.template is not None:
            kind, given = "template", self.template
        elif self.suffix is not None:
            kind, given = "template", f"{self.prompt}[MASK:{new}]{self.suffix}"
            before, after = len(str(self.prompt)), len(self.suffix)
        else:
            sampling["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        texts = [text for text in ([given] if isinstance(given, str) else given or ()) for _ in range(self.n)]
        first = secrets.randbelow(2**32) if self.seed is None else self.seed
        seeds = [first + i for i in range(len(texts))]
        many = [new] * len(texts) if kind == "prompt" else []
        return Rows(kind, texts, seeds, many, sampling, self.n, before, after)


@dataclass(frozen=True)
class Score(Checked):
    """`POST /v1/score`: log-probabilities of given texts.

    model: the name under which the model is served.
    text: a text, or several.
    likelihood: causal, ar or block, all of which are exact.
    """

    text: str | tuple[str, ...] = ()
    model: str | None = None
    likelihood: Likelihood = "causal"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.text:
            raise InputError("text is not given; give a text, or a list of texts")
