"""`caddf serve`."""

from __future__ import annotations

import os
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from caddf.commands.options import compile_option, reading_options
from caddf.errors import InputError, at_least, installed
from caddf.settings import parse
from caddf.text_model import load


def serve(parser: ArgumentParser, arguments: list[str]) -> int:
    """Runs `caddf serve` until it is interrupted, and returns its exit code."""
    add = parser.add_argument
    add("model", type=str, help="a run, a model folder, or OWNER/NAME on the hub")
    add("--host", type=str, default="127.0.0.1", metavar="ADDRESS",
        help="where it listens; 0.0.0.0 is the whole network, which may then use it")  # fmt: skip
    add("--port", type=int, default=8000, metavar="INT", help="of that address; 0 is any that is free")
    add("--name", type=str | None, metavar="NAME", help="what requests call the model; not set, its folder's name")
    add("--rows", type=int, default=8, metavar="INT", help="texts that are decoded together, of one request or more")
    add("--waiting", type=int, default=64, metavar="INT", help="requests that may wait; others are told to come again")
    add("--longest", type=int, default=4096, metavar="INT", help="tokens that a text may be continued by")
    reading_options(parser)
    compile_option(parser)
    values = parse(parser, arguments)
    at_least(1, rows=values.rows, waiting=values.waiting, longest=values.longest)
    for package in ("starlette", "uvicorn"):
        installed(package, "serve", "caddf serve needs")
    if not 0 <= values.port < 2**16:
        raise InputError(f"port is {values.port}; it must lie between 0 and {2**16 - 1}")
    import uvicorn

    from caddf.serving.app import application

    try:
        listening = socket.create_server((values.host, values.port))
    except OSError as error:
        named = isinstance(error, socket.gaierror) or not error.errno
        reason = (error.strerror or error) if named else os.strerror(error.errno or 0)
        raise InputError(f"host and port are {values.host} and {values.port}, which cannot be used: {reason}") from None
    with listening:
        model = load(
            values.model, device=values.device, dtype=values.dtype, quantize=values.quantize, compile=values.compile
        )
        name = values.name or Path(values.model).resolve().name
        app = application(model, name, rows=values.rows, waiting=values.waiting, longest=values.longest)
        host, port = listening.getsockname()[:2]
        print(f"{name} at http://{host}:{port} (Ctrl-C stops)", file=sys.stderr, flush=True)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)

        class Server(uvicorn.Server):
            """Tells everybody at once that it ends."""

            def handle_exit(self, sig: int, frame: Any) -> None:
                app.state.worker.close()
                super().handle_exit(sig, frame)

        with suppress(KeyboardInterrupt):  # which is how it ends
            Server(config).run(sockets=[listening])
        if app.state.worker.thread.is_alive():  # in a step that takes long, which nobody waits for
            os._exit(0)
    return 0
