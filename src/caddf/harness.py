"""The model `caddf` of lm-evaluation-harness: its tasks under a named likelihood and a named decoder.

    python -m caddf.harness run --model caddf --model_args pretrained=RUN,likelihood=block --tasks lambada_openai

is the harness's own command line, which then knows this model; in Python, importing this module is enough. It needs
the extra `lm-eval`.
"""

from __future__ import annotations

import json
import sys
import zlib
from typing import Any, cast, get_args

import torch
from jaxtyping import Bool, Float, Int
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from caddf.categorical import RowGenerators, Warp
from caddf.decoding import Confidence, Task
from caddf.errors import InputError, at_least, check_seed
from caddf.evaluation import diffusion_bound
from caddf.evaluation.likelihood import Likelihood, read_exact
from caddf.evaluation.reading import Readout
from caddf.evaluation.suite import window_generator
from caddf.generation import decoder_of, generate
from caddf.interface import LanguageModel
from caddf.text_model import DType, TextModel, load

Request = tuple[Any, list[int], list[int]]
"""What the harness calls it, the tokens that are given, and those that are scored."""
LIKELIHOODS = (*get_args(Likelihood), "diffusion")


@register_model("caddf")
class HarnessModel(TemplateLM):
    """A model as the harness asks it: log-likelihoods of continuations and of whole texts, and generation.

    pretrained: a run, a model folder or a name on the hub, read to `device` as `dtype`; or a model that is loaded.
    likelihood: `causal`, `ar` or `block` (blocks of `block_size`), which are exact; or `diffusion`: minus the upper
        bound on the nats of the scored tokens given the others, over all their orders, from `samples` Monte-Carlo
        samples. Not set, `causal` where the model has it, else `diffusion`.
    decoder: of generation, a name of `caddf.decoding.DECODERS`, with its own `settings`; not set, the method's.
    max_length: longest row in tokens; not set, the context. max_gen_toks: new tokens, where a task does not say.
    batch_size: rows at once; no result depends on it. seed: of all noise and draws.

    A row begins as in training, after the `<|endoftext|>` that models here read by themselves. What is given is cut
    from the left to fit; a text longer than `max_length` is scored in the harness's windows, each a row of its own.
    The greedy flag says whether the continuation is what the model writes when it always takes the arg max: left to
    right under an exact likelihood, the surest position first under `diffusion`.

    Raises `InputError` where the model lacks the likelihood, or settings are wrong.
    """

    def __init__(
        self,
        pretrained: str | TextModel,
        likelihood: str | None = None,
        decoder: str | None = None,
        block_size: int | None = None,
        samples: int = 32,
        max_length: int | None = None,
        max_gen_toks: int = 64,
        batch_size: int = 1,
        device: str = "auto",
        dtype: DType = "float32",
        seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal():
            raise InputError(f"batch_size is {batch_size}; it must be a number of rows")
        self.batch_size = int(batch_size)
        at_least(1, batch_size=self.batch_size, samples=samples, max_gen_toks=max_gen_toks)
        check_seed(seed)
        if device == "cuda:0" and not torch.cuda.is_available():  # the harness's word where nobody named a device
            device = "auto"
        self.samples, self.max_gen_toks, self.seed = samples, max_gen_toks, seed
        self.text_model = (
            pretrained if isinstance(pretrained, TextModel) else load(pretrained, device=device, dtype=dtype)
        )
        for name, value in (("max_length", max_length), ("block_size", block_size)):
            if value is not None and not 1 <= value <= self.text_model.context:
                raise InputError(f"{name} is {value}; it must lie between 1 and the context, {self.text_model.context}")
        self.model = cast(LanguageModel, self.text_model.model)
        self.max_length = max_length or self.text_model.context
        self.block_size = block_size
        self.likelihood = likelihood or ("causal" if "causal" in self.model.heads else "diffusion")
        self._check_likelihood()
        self.decoder = decoder or self.text_model.decoder
        chosen = decoder_of(self.decoder, settings)
        if block_size is not None and hasattr(chosen, "block_size"):
            settings["block_size"] = block_size
        self.settings = settings

    def _check_likelihood(self) -> None:
        if self.likelihood not in LIKELIHOODS:
            raise InputError(f"likelihood is {self.likelihood}; it must be one of {', '.join(LIKELIHOODS)}")
        if self.likelihood != "diffusion":
            self._exact(torch.zeros(1, 1, dtype=torch.int64, device=self.device))
        elif self.model.denoiser == "causal":
            raise InputError("likelihood is diffusion; this model only reads left to right, so it must be causal")

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.text_model.device

    @property
    def eot_token_id(self) -> int:
        """`<|endoftext|>`, which text is never encoded to."""
        return self.text_model.tokenizer.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of `string`; no special ones are ever added."""
        return self.text_model.tokenizer.encode(string)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results."""
        return {
            "likelihood": self.likelihood,
            "decoder": self.decoder,
            "decoder_settings": self.settings,
            "max_length": self.max_length,
            "samples": self.samples if self.likelihood == "diffusion" else 1,
        }

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p (nats) of each text: the sum over the harness's windows, which score every token once."""
        windows: list[Request] = []
        text_of: list[int] = []
        for i, request in enumerate(requests):
            (text,) = request.args
            cut = get_rolling_token_windows(self.tok_encode(text), self.eot_token_id, self.max_length, context_len=1)
            windows += [(None, *make_disjoint_window(window)) for window in cut]
            text_of += [i] * (len(windows) - len(text_of))
        totals = [0.0] * len(requests)
        for i, (nats, _) in zip(text_of, self._measured(windows, disable_tqdm, greedy=False), strict=True):
            totals[i] += nats
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """log p (nats) of each continuation, and whether it is the greedy one."""
        if self.likelihood == "diffusion" and self.text_model.bound is not None:
            raise InputError(
                f"likelihood is diffusion; {self.text_model.about['method']} says of no continuation whether it is the "
                "greedy one: take tasks of type loglikelihood_rolling or generate_until"
            )
        results = self._measured(requests, disable_tqdm, greedy=True)
        for (name, _, _), result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", name, result)
        return results

    def _measured(self, requests: list[Request], quiet: bool, greedy: bool) -> list[tuple[float, bool]]:
        """Rows are read together with others of their length and number of scored tokens."""
        alike: dict[tuple[int, int], list[int]] = {}
        rows: list[list[int]] = []
        for i, (_, given, scored) in enumerate(requests):
            if not 1 <= len(scored) <= self.max_length:
                raise InputError(
                    f"a continuation has {len(scored)} tokens; to be scored it must have 1 to {self.max_length}"
                )
            given = given[1:] if given[:1] == [self.eot_token_id] else given  # the model reads it by itself
            rows.append([*given, *scored][-self.max_length :])
            alike.setdefault((len(rows[i]), len(scored)), []).append(i)
        results = [(0.0, False)] * len(requests)
        with tqdm(total=len(requests), desc=self.likelihood, disable=quiet) as bar:
            for (length, count), indices in alike.items():
                last = torch.arange(length, device=self.device) >= length - count
                for start in range(0, len(indices), self.batch_size):
                    batch = indices[start : start + self.batch_size]
                    x0 = torch.tensor([rows[i] for i in batch], device=self.device)
                    nats, best = self._read(x0, last.expand_as(x0), greedy)
                    for i, cost, is_best in zip(batch, nats.tolist(), best.tolist(), strict=True):
                        results[i] = (-cost, is_best)
                    bar.update(len(batch))
        return results

    @torch.inference_mode()
    def _read(
        self, x0: Int[Tensor, "B L"], scored: Bool[Tensor, "B L"], greedy: bool
    ) -> tuple[Float[Tensor, " B"], Bool[Tensor, " B"]]:
        """Nats of the scored tokens of each row, and whether they are the greedy ones (false where not asked)."""
        if self.likelihood != "diffusion":
            out = self._exact(x0)
            return out.nats.where(scored, 0).sum(-1), ((out.best == x0) | ~scored).all(-1)
        # A row's noise comes from its tokens, whatever it is asked together with.
        noise = [window_generator(self.seed, zlib.crc32(row.cpu().numpy().tobytes())) for row in x0]
        bound = self.text_model.bound or diffusion_bound
        nats = bound(self.model, x0, self.samples, noise, scored=scored).mean(-1)
        return nats, self._surest_first(x0, scored) if greedy else torch.zeros(len(x0), dtype=torch.bool)

    def _exact(self, x0: Int[Tensor, "B L"]) -> Readout:
        return read_exact(self.model, x0, cast(Likelihood, self.likelihood), self.block_size)

    def _surest_first(self, x0: Int[Tensor, "B L"], scored: Bool[Tensor, "B L"]) -> Bool[Tensor, " B"]:
        """Whether the scored tokens are what confidence decoding writes, a token at a time, up to the first mistake."""
        mask_id = self.model.mask_id

        def wrong(x: Int[Tensor, "B L"]) -> Bool[Tensor, " B"]:
            return ((x != x0) & (x != mask_id)).any(1)

        lengths = torch.full((len(x0),), x0.shape[1], device=x0.device)
        canvas, generators = torch.where(scored, mask_id, x0), RowGenerators(self.seed, len(x0))
        task = Task(canvas, lengths, mask_id, generators, Warp(temperature=0), wrong, template=True)
        *_, last = Confidence(threshold=2.0)(self.model, task)
        return (last.tokens == x0).all(1)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, up to a stop string, `<|endoftext|>` or `max_gen_toks`.

        `temperature` and `do_sample` are the task's (greedy, if it does not say), and so are `top_k`, `top_p`, `min_p`
        and settings of the decoder. Request i draws from `seed + i`, counted among those of its settings.
        """
        alike: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc=self.decoder, disable=disable_tqdm) as bar:
            for key, indices in alike.items():
                options: dict[str, Any] = {**normalize_gen_kwargs(json.loads(key), self.max_gen_toks)}
                warm = 1.0 if options.pop("do_sample") else 0.0
                temperature = float(options.pop("temperature", warm))
                stop, new = options.pop("until"), options.pop("max_gen_toks")
                if new >= self.max_length:
                    raise InputError(f"max_gen_toks is {new}; it must leave room for a prompt in {self.max_length}")
                for start in range(0, len(indices), self.batch_size):
                    batch = indices[start : start + self.batch_size]
                    prompts = [self._fitting(requests[i].args[0], self.max_length - new) for i in batch]
                    *_, last = generate(
                        self.text_model, prompts, decoder=self.decoder, max_new_tokens=new, temperature=temperature,
                        stop=stop, seed=self.seed + start, **{**self.settings, **options},
                    )  # fmt: skip
                    for i, text in zip(batch, last.texts, strict=True):
                        texts[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.update(len(batch))
        return texts

    def _fitting(self, text: str, room: int) -> str:
        """The end of `text` that has at most `room` tokens."""
        tokens = self.tok_encode(text)
        while len(tokens) > room:
            kept = b"".join(self.text_model.tokenizer.token_bytes[i] for i in tokens[-room:])
            text = kept.decode(errors="ignore")  # a character that is cut in two goes
            tokens = self.tok_encode(text)
        return text


def main() -> int:
    """The harness's command line; bad input is one sentence, and exit code 2, as with `caddf`."""
    try:
        cli_evaluate()
    except InputError as error:
        print(f"caddf: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
