"""The HTTP application: bodies in, jobs to the worker, JSON and server-sent events out."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any

from jinja2 import Environment, PackageLoader
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from caddf.decoding import DECODERS
from caddf.errors import InputError
from caddf.generation import decoder_of, generate, revises
from caddf.scoring import score
from caddf.serving.requests import Body, Completion, Rows, Score, read
from caddf.serving.worker import Busy, Call, Job, Step, Worker
from caddf.text_model import TextModel
from caddf.version import installed_version

Values = dict[str, Any]
TEXTS, LARGEST = 128, 1 << 22
"""Of a request: texts, and bytes of its body, at most."""
COSTS = ("evaluations", "rounds", "copied_rounds", "tokens_per_evaluation", "cache_hit_rate", "tokens_per_second")
"""Of `Snapshot.results`, what is told of a text besides what OpenAI's format has."""


def application(model: TextModel, name: str, *, rows: int = 8, waiting: int = 64, longest: int = 4096) -> Starlette:
    """Serves `model` under `name`: batches of at most `rows` rows, with at most `waiting` requests behind them.

    A request has at most `TEXTS` texts, each continued by at most `longest` tokens.
    """
    worker = Worker(partial(generate, model), rows, waiting)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        worker.start()
        yield
        await run_in_threadpool(worker.stop)

    served = _Served(model, name, worker, longest)
    routes = [
        Route("/", served.page),
        Route("/health", served.health),
        Route("/v1/models", served.models),
        Route("/v1/completions", served.completions, methods=["POST"]),
        Route("/v1/frames", served.frames, methods=["POST"]),
        Route("/v1/score", served.score, methods=["POST"]),
    ]
    said = {kind: _said for kind in (InputError, Busy, HTTPException, Exception)}
    made = Starlette(routes=routes, lifespan=lifespan, exception_handlers=said)
    made.state.worker = worker
    return made


class _Served:
    """What the routes do."""

    def __init__(self, model: TextModel, name: str, worker: Worker, longest: int) -> None:
        self.model, self.name, self.worker, self.longest = model, name, worker, longest
        self.about = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "caddf"}

    async def page(self, _: Request) -> Response:
        """A page to try the model on."""
        template = Environment(loader=PackageLoader("caddf"), autoescape=True).get_template("serve.html")
        fills = self.model.model.heads != {"causal"}
        shown = {"name": self.name, "fills": fills, "decoder": self.model.decoder, "decoders": sorted(DECODERS)}
        return HTMLResponse(template.render(shown))

    async def health(self, _: Request) -> Response:
        """That it is there."""
        return JSONResponse({"status": "ok", "model": self.name, "caddf": installed_version()})

    async def models(self, _: Request) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self.about]})

    async def completions(self, request: Request) -> Response:
        """OpenAI's completions; with `stream` the text as it stands, of which nothing is taken back."""
        asked, rows = await self._wanted(request)
        if asked.stream and (asked.template is not None or asked.suffix is not None):
            raise InputError("stream is true, beside a hole, which is not filled left to right; /v1/frames streams it")
        decoder = asked.decoder or self.model.decoder
        if asked.stream and revises(self.model, decoder_of(decoder, dict(asked.settings))):
            raise InputError(
                f"stream is true, beside decoder {decoder}, which draws again what stands; /v1/frames does"
            )
        about = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time())}
        about |= {"model": self.name, "seed": rows.seeds[0]}
        if asked.stream:
            usage = bool(asked.stream_options.get("include_usage"))
            return await self._streamed(rows, partial(self._chunk, rows, about, [""] * len(rows.texts), usage))
        last: list[Values] = []
        async with aclosing(self._steps(rows, lambda step: _results(step) if step.last else [])) as steps:
            async for step in steps:
                last = step
                if await request.is_disconnected():
                    return Response()  # to nobody
        choices = [
            {**_choice(index, rows.told(result["text"]), result["ended_by"]), "statistics": _costs(result)}
            for index, result in enumerate(last)
        ]
        return JSONResponse({**about, "choices": choices, "usage": _usage(rows, last)})

    def _chunk(self, rows: Rows, about: Values, sent: list[str], usage: bool, step: Step) -> list[Values]:
        """What is new in each text since the chunk before."""
        results = _results(step) if step.last else []
        choices = []
        for index, row in enumerate(step.rows):
            text = step.frame.texts[row]
            if text != sent[index] or step.last:
                why = results[index]["ended_by"] if step.last else None
                choices.append(_choice(index, text[len(sent[index]) :], why))
                sent[index] = text
        chunks = [{**about, "choices": choices}] if choices else []
        if step.last and usage:
            chunks.append({**about, "choices": [], "usage": _usage(rows, results)})
        return chunks

    async def frames(self, request: Request) -> Response:
        """Every step of the decoder: the canvas token by token, and what it cost so far."""
        _, rows = await self._wanted(request)

        def frame(step: Step) -> list[Values]:
            shown = [
                {"pieces": step.frame.pieces(row), "text": rows.told(result["text"]), **_costs(result)}
                | {"tokens": result["tokens"], "seed": result["seed"], "ended_by": result["ended_by"]}
                for row, result in zip(step.rows, _results(step), strict=True)
            ]
            return [{"rows": shown}]

        return await self._streamed(rows, frame)

    async def score(self, request: Request) -> Response:
        """Log-probabilities (nats) of the tokens of texts under an exact likelihood."""
        asked = await self._asked(request, Score)
        texts = [asked.text] if isinstance(asked.text, str) else list(asked.text)
        if len(texts) > TEXTS:
            raise InputError(f"text holds {len(texts)} texts; a request has at most {TEXTS}")

        def scored() -> list[Values]:
            nats: list[list[float]] = []
            for text in texts:
                if call.cancelled.is_set():
                    return []
                nats += [each.tolist() for each in score(self.model, text, likelihood=asked.likelihood)]
            decode, encode = self.model.tokenizer.decode, self.model.tokenizer.encode
            return [
                {"text": text, "tokens": [decode([token]) for token in encode(text)], "log_probs": each}
                | {"total": sum(each)}
                for text, each in zip(texts, nats, strict=True)
            ]

        told, tell = _told()
        call = Call(scored, tell)
        self.worker.submit(call)
        try:
            scores = await told.get()
        finally:
            call.cancelled.set()
        if isinstance(scores, Exception):
            raise scores
        return JSONResponse({"model": self.name, "likelihood": asked.likelihood, "scores": scores})

    async def _asked(self, request: Request, kind: type[Body]) -> Body:
        raw = bytearray()
        async for part in request.stream():
            raw += part
            if len(raw) > LARGEST:
                raise HTTPException(413, f"the body has more than {LARGEST} bytes")
        try:
            body = json.loads(raw)
            json.dumps(body, ensure_ascii=False).encode()  # raises for half a character
        except (ValueError, RecursionError) as error:
            raise InputError(f"the body is no JSON: {error}") from None
        asked = read(body, kind)
        if (wanted := getattr(asked, "model", None)) not in (None, self.name):
            raise HTTPException(404, f"model is {wanted}; this server has {self.name}")
        return asked

    async def _wanted(self, request: Request) -> tuple[Completion, Rows]:
        """What is to be written; raises `InputError` for what the decoder, the model or this server does not do."""
        asked = await self._asked(request, Completion)
        given = asked.template if asked.prompt is None else asked.prompt
        count = asked.n * (1 if isinstance(given, str) else len(given or ()))
        if count > TEXTS:
            raise InputError(f"the prompts and n make {count} texts; a request has at most {TEXTS}")
        if (asked.max_tokens or 0) > self.longest:
            raise InputError(f"max_tokens is {asked.max_tokens}; this server writes at most {self.longest}")
        rows = asked.rows()
        await run_in_threadpool(lambda: generate(self.model, **rows.with_([])))
        return asked, rows

    async def _steps(self, rows: Rows, value: Callable[[Step], Any]) -> AsyncGenerator[Any]:
        """What `value` makes of each step, as it is made. Whoever stops asking cancels the job."""
        told, tell = _told()
        job = Job(rows, lambda step: (value(step), step.last), tell)
        self.worker.submit(job)
        try:
            last = False
            while not last:
                step = await told.get()
                if isinstance(step, Exception):
                    raise step
                made, last = step
                yield made
        finally:
            job.cancelled.set()

    async def _streamed(self, rows: Rows, value: Callable[[Step], list[Values]]) -> Response:
        """Server-sent events: a list of values a step, and `[DONE]` at the end."""
        steps = self._steps(rows, value)
        first = await anext(steps)  # what is refused is refused with a status

        async def events() -> AsyncIterator[str]:
            try:
                for each in first:
                    yield _event(each)
                async for step in steps:
                    for each in step:
                        yield _event(each)
            except Exception as error:
                yield _event(_error(error)[0])
            finally:
                await steps.aclose()
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


def _told() -> tuple[asyncio.Queue[Any], Callable[[Any], None]]:
    """A queue of this event loop, and what puts a value in it from another thread."""
    queue: asyncio.Queue[Any] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def tell(what: Any) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, what)

    return queue, tell


def _results(step: Step) -> list[Values]:
    """Of a request's rows, with the tokens that were `given`."""
    rows, mask_id = step.frame.rows, step.frame.task.mask_id
    given = [sum(token != mask_id for token in rows[r].tokens) for r in step.rows]
    return [{**result, "given": count} for result, count in zip(step.frame.results(step.rows), given, strict=True)]


def _usage(rows: Rows, results: list[Values]) -> Values:
    """Tokens of prompts, each once, and of what was written."""
    given, written = sum(each["given"] for each in results[:: rows.n]), sum(each["tokens"] for each in results)
    return {"prompt_tokens": given, "completion_tokens": written, "total_tokens": given + written}


def _costs(result: Values) -> Values:
    return {name: result[name] for name in COSTS}


def _choice(index: int, text: str, why: str | None) -> Values:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": why}


def _event(value: Values) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _error(error: Exception) -> tuple[Values, int]:
    """What is said of an error, and the status."""
    status, kind, message = 500, "server_error", f"{type(error).__name__}: {error}"
    if isinstance(error, HTTPException):
        status, kind, message = error.status_code, "invalid_request_error", error.detail
    elif isinstance(error, InputError):
        status, kind, message = 400, "invalid_request_error", " ".join(str(error).split())
    elif isinstance(error, Busy):
        status, kind, message = 503, "overloaded_error", str(error)
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}, status


async def _said(_: Request, error: Exception) -> Response:
    body, status = _error(error)
    return JSONResponse(body, status, headers={"Retry-After": "5"} if status == 503 else None)
