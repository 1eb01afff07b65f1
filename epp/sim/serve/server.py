"""A simulated vLLM over HTTP: an engine in real time behind the API that clients and pickers know.

In: HTTP/1.1 requests. Out: what vLLM would answer, at the pace of the engine's profile.
Rules here:
- Every answer carries `x-served-by: host:port`, so that tests and the demo see where a request went.
- A client that leaves aborts its request in the engine.
- Faults are drawn for requests to a model and for the metrics page; `POST /faults` changes them while it runs.
- Leaving `serve_model` is a server's death: its connections are cut, nothing is finished.
Rejected: raw asyncio protocols. Measured on two shared cores: 0.4 ms of CPU against 0.9 ms for a stream of 25 chunks,
which is 3 % of a core at the demo's 56 requests a second; not worth an HTTP parser of our own.
"""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from random import Random
from typing import Final, NoReturn

import msgspec
from aiohttp import web

from epp.endpoints.table import address_text
from epp.errors import ConfigError, Refusal
from epp.sim import text
from epp.sim.profile import EngineProfile, load_profile
from epp.sim.serve import answers
from epp.sim.serve.answers import Answer, ChatAnswer, CompletionAnswer, MessagesAnswer, Usage
from epp.sim.serve.asks import Ask, UnknownModel, read_chat, read_completion, read_messages
from epp.sim.serve.driver import Driver, Stream
from epp.sim.serve.faults import Fault, Faults, MetricsFault, parse_faults
from epp.sim.serve.page import Page
from epp.sim.vllm import Engine, EngineRequest

MAX_BODY_BYTES: Final = 64 * 1024 * 1024
AT_ONCE: Final = 0.001
"""Seconds that aiohttp gives handlers to finish; 0 would be for ever."""

Said = Callable[[int, str, str, str | None], bytes]


class Dialect(msgspec.Struct, frozen=True):
    """How one path is read and answered."""

    read: Callable[[bytes], Ask]
    answer: Callable[[str, str, int, str, bool], Answer]
    error: Said


DIALECTS: Final = {
    "/v1/chat/completions": Dialect(read_chat, ChatAnswer, answers.openai_error),
    "/v1/completions": Dialect(read_completion, CompletionAnswer, answers.openai_error),
    "/v1/messages": Dialect(read_messages, MessagesAnswer, answers.anthropic_error),
}


class ModelServer:
    """One simulated server. Made by `serve_model`."""

    def __init__(
        self, profile: EngineProfile, served_model: str, adapters: Sequence[str], faults: Faults, seed: int
    ) -> None:
        self.address = ""
        """"ip:port"; known once it listens."""
        self.faults = faults
        self.driver = Driver(Engine(profile))
        self._profile = profile
        self._model = served_model
        self._adapters = tuple(adapters)
        self._rng = Random(seed)
        self._page = Page(profile, served_model)
        self._created = int(time.time())

    def __repr__(self) -> str:
        return f"<ModelServer [Address: {self.address} | Model: {self._model} | {self.driver.engine!r}]>"

    def application(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        for path in DIALECTS:
            app.router.add_post(path, self._generate)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/faults", self._set_faults)
        return app

    # -- requests to a model -------------------------------------------------------------------------------------

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        dialect = DIALECTS[request.path]
        body = await request.read()
        fault = self.faults.draw(self._rng)
        if fault is not None:
            return await self._fail(request, fault, dialect)
        try:
            ask = dialect.read(body)
            stream = self.driver.submit(self._engine_request(ask))
        except Refusal as refusal:
            said = dialect.error(refusal.status, refusal.message, *answers.error_kind(refusal))
            return self._json(said, refusal.status)
        finish = "stop" if ask.stopped else "length"
        key, model = stream.request.id, ask.model or self._model
        answer = dialect.answer(key, model, int(time.time()), finish, ask.include_usage)
        try:
            if ask.stream:
                return await self._stream(request, stream, answer)
            await stream.at_least(ask.max_tokens)
            return self._json(answer.whole(_usage(stream)))
        finally:
            self.driver.leave(stream, finish)

    def _engine_request(self, ask: Ask) -> EngineRequest:
        """Raises: UnknownModel."""
        if ask.model not in ("", self._model, *self._adapters):
            raise UnknownModel(f"The model `{ask.model}` does not exist. Valid aliases: {self._model}.")
        adapter = ask.model if ask.model in self._adapters else ""
        size = self._profile.block_size
        return EngineRequest(
            id=f"{self._rng.getrandbits(64):016x}",
            prompt_tokens=text.count_tokens(ask.prompt),
            output_tokens=ask.max_tokens,
            keys=text.block_keys(text.with_answer(ask.prompt, ask.max_tokens - 1), size, adapter, ask.salt),
            adapter=adapter,
        )

    async def _stream(self, request: web.Request, stream: Stream, answer: Answer) -> web.StreamResponse:
        headers = {"content-type": "text/event-stream; charset=utf-8", "x-served-by": self.address}
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        total = stream.request.output_tokens
        seen, has = 0, await stream.at_least(1)
        chunk = answer.opening(_usage(stream))
        while has < total:
            await response.write(chunk + answer.tokens(seen, has))
            chunk = b""
            seen, has = has, await stream.at_least(has + 1)
        chunk += answer.tokens(seen, total - 1) if seen < total - 1 else b""
        await response.write(chunk + answer.closing(_usage(stream)))
        await response.write_eof()
        return response

    async def _fail(self, request: web.Request, fault: Fault, dialect: Dialect) -> web.StreamResponse:
        if fault is Fault.STALL:
            await _forever()
        if fault is Fault.ERROR:
            return self._json(dialect.error(500, "simulated failure", "InternalServerError", None), 500)
        response = web.StreamResponse(headers={"x-served-by": self.address})
        if fault is Fault.CUT:
            await response.prepare(request)
        _cut(request)
        return response

    # -- the rest ------------------------------------------------------------------------------------------------

    async def _models(self, request: web.Request) -> web.Response:
        cards = answers.model_list(self._model, self._adapters, self._created, self._profile.kv_tokens)
        return self._json(cards)

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(headers={"x-served-by": self.address})

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        wrong = self.faults.metrics
        if wrong is MetricsFault.HANG:
            await _forever()
        if wrong is MetricsFault.DIE:
            _cut(request)
        headers = {"content-type": "text/plain; version=0.0.4; charset=utf-8", "x-served-by": self.address}
        if wrong is MetricsFault.GARBAGE:
            return web.Response(body=self._rng.randbytes(4096), headers=headers)
        page = self._page.render(self.driver.engine.stats(), self.driver.counters, time.time())
        return web.Response(body=page, headers=headers)

    async def _set_faults(self, request: web.Request) -> web.Response:
        try:
            self.faults = msgspec.json.decode(await request.read(), type=Faults)
        except msgspec.DecodeError as error:
            return self._json(answers.openai_error(400, str(error), "BadRequestError", None), 400)
        return self._json(msgspec.json.encode(self.faults))

    def _json(self, body: bytes, status: int = 200) -> web.Response:
        headers = {"content-type": "application/json", "x-served-by": self.address}
        return web.Response(body=body, status=status, headers=headers)


@asynccontextmanager
async def serve_model(
    host: str,
    port: int,
    profile: EngineProfile,
    *,
    served_model: str,
    adapters: Sequence[str] = (),
    faults: Faults | None = None,
    seed: int = 0,
) -> AsyncIterator[ModelServer]:
    """Serve until the block is left; then the server dies.

    Args:
        host: an IP address.
        port: 0: any free one; `ModelServer.address` tells.
        seed: of faults and request ids.

    Raises:
        ConfigError: the port is taken, or the address is not one of this machine.
    """
    server = ModelServer(profile, served_model, adapters, faults or Faults(), seed)
    runner = web.AppRunner(server.application(), access_log=None, handler_cancellation=True, shutdown_timeout=AT_ONCE)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        try:
            await site.start()
        except OSError as error:
            raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}; choose another port") from error
        server.address = address_text(*runner.addresses[0][:2])
        driving = asyncio.create_task(server.driver.run())
        driving.add_done_callback(_tell)
        try:
            yield server
        finally:
            driving.cancel()
    finally:
        await runner.cleanup()


async def run_model_servers(
    host: str, port: int, count: int, engine: str, model: str, adapters: Sequence[str], faults: str, seed: int
) -> int:
    """Serve `count` of them until SIGTERM or SIGINT: the command `epp model-server`, whose help has the parameters.

    Prints one line of JSON, `{"addresses": ["ip:port", ...]}`, once all of them listen.

    Returns:
        The exit code.

    Raises:
        ConfigError: a port is taken, no such engine profile, or faults that are none.
    """
    profile, wrong = load_profile(engine), parse_faults(faults)
    stopped = asyncio.Event()
    for stop in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(stop, stopped.set)
    async with AsyncExitStack() as stack:
        addresses = []
        for number in range(count):
            serving = serve_model(
                host,
                port + number if port else 0,
                profile,
                served_model=model,
                adapters=adapters,
                faults=wrong,
                seed=seed + number,
            )
            addresses.append((await stack.enter_async_context(serving)).address)
        print(json.dumps({"addresses": addresses}), flush=True)
        await stopped.wait()
    return 0


def _tell(driving: asyncio.Task[None]) -> None:
    """An engine that breaks is a mistake of ours: requests to it would hang without a word."""
    if not driving.cancelled() and (error := driving.exception()) is not None:
        message = "the engine of a simulated server broke; its requests will hang"
        driving.get_loop().call_exception_handler({"message": message, "exception": error, "task": driving})


def _usage(stream: Stream) -> Usage:
    return Usage(stream.request.prompt_tokens, stream.request.output_tokens, stream.cached)


def _cut(request: web.Request) -> None:
    """A connection reset, as a process that dies leaves it."""
    if request.transport is not None:
        request.transport.abort()


async def _forever() -> NoReturn:
    await asyncio.get_running_loop().create_future()
    raise AssertionError("nobody sets this future")
