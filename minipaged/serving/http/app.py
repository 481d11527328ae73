"""The server's routes, as one plain ASGI application over an engine link."""

from __future__ import annotations

import asyncio
import hmac
import re
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol
from urllib.parse import parse_qs
from uuid import uuid4

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST

from minipaged import __version__
from minipaged.page.page import part
from minipaged.serving.http import completions, dialects, fields
from minipaged.serving.http.asgi import (
    JSON_TYPE,
    PING,
    ClientLeftError,
    Headers,
    Receive,
    Scope,
    Send,
    event,
    header,
    read_body,
    respond,
    respond_json,
    send_part,
    start_events,
)
from minipaged.serving.http.completions import Codec, Job, Limits
from minipaged.serving.http.errors import ApiError, bad_request
from minipaged.serving.http.link import EngineLink
from minipaged.serving.http.mailbox import Growth, Signal
from minipaged.serving.http.metrics import Metrics
from minipaged.serving.http.watch import BlockView, Feed
from minipaged.trace import packing
from minipaged.trace.file import Kind, Record

PING_SECONDS = 10.0  # of silence in a stream
PAGE = Path(__file__).with_name("page.html")  # its colours and its map are those of the page of a recorded run
# It takes nothing from elsewhere and sends nothing elsewhere.
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"
)
OPEN_ROUTES = ("/health", "/version")  # without a key
Handler = Callable[["Call"], Awaitable[None]]


@cache
def _page() -> bytes:
    text = PAGE.read_text(encoding="utf-8")
    return text.replace("/* look.css */", part("look.css")).replace("/* map.js */", part("map.js")).encode()


@dataclass(frozen=True, slots=True)
class Options:
    """What the server was started with. model: the name that the engine was given; names: what clients may call it."""

    model: str
    names: tuple[str, ...]
    keys: tuple[str, ...] = ()
    max_waiting: int = 1024
    metrics_prefix: str = "minipaged"
    show_prompts: bool = False  # to those who look on


class Writer(Protocol):
    """Makes bytes of a job's answers. Its class has the static method error(ApiError), which makes an error's body."""

    def whole(self) -> completions.JSON:
        """The document of a finished request."""
        ...

    def opening(self) -> bytes:
        """The first bytes of a stream."""
        ...

    def growth(self, index: int, growth: Growth) -> bytes:
        """What a choice gained."""
        ...

    def closing(self) -> bytes:
        """The last bytes."""
        ...

    def failure(self, error: ApiError) -> bytes:
        """The last bytes of a stream that is not finished."""
        ...


@dataclass(slots=True)
class Call:
    """One request on its way through a handler."""

    scope: Scope
    receive: Receive
    send: Send
    headers: Headers  # that the answer will have
    started: bool = False  # whether the answer has begun
    error: Callable[[ApiError], completions.JSON] = completions.Chunks.error  # an error's body in this route's dialect
    failure: Callable[[ApiError], bytes] = completions.Chunks.failure  # the same as the last event of a stream

    async def body(self) -> dict[str, object]:
        """The request's JSON object."""
        return fields.read_json(await read_body(self.scope, self.receive))

    async def reply(self, document: object) -> None:
        """Answer with a document."""
        self.started = True
        await respond_json(self.send, document, self.headers)


class App:
    """The application. `link` is None until the engine's process was started."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.metrics = Metrics(options.metrics_prefix, options.names[0])
        self.link: EngineLink | None = None
        self.draining = False
        self.feed: Feed | None = None
        self.created = int(time.time())
        self._keys = [key.encode() for key in options.keys]
        self.routes: dict[str, dict[str, Handler]] = {
            "/health": {"GET": self.health},
            "/ping": {"GET": self.health, "POST": self.health},
            "/version": {"GET": self.version},
            "/metrics": {"GET": self.show_metrics},
            "/v1/models": {"GET": self.models},
            "/v1/chat/completions": {"POST": self.chat},
            "/v1/completions": {"POST": self.complete},
            "/v1/messages": {"POST": self.messages},
            "/v1/messages/count_tokens": {"POST": self.count_tokens},
            "/v1/responses": {"POST": self.respond_to},
            "/tokenize": {"POST": self.tokenize},
            "/detokenize": {"POST": self.detokenize},
            "/tokenizer_info": {"GET": self.tokenizer_info},
            "/trace": {"GET": self.trace},
            "/blocks": {"GET": self.blocks},
            "/": {"GET": self.page},
        }

    # ---- from a request to its handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's entry. Whatever happens, the client gets a status and JSON."""
        if scope["type"] != "http":
            raise RuntimeError(f"{scope['type']} is not served here")
        given = header(scope, b"x-request-id")
        request_id = given if re.fullmatch(r"[\x21-\x7e]{1,128}", given) else uuid4().hex
        call = Call(scope, receive, send, {"x-request-id": request_id})
        try:
            await self._handler(scope)(call)
        except ClientLeftError:
            return
        except ApiError as error:
            if error.status != 404:
                self.metrics.refused[error.status] += 1
            await self._tell(call, error)
        except Exception as error:
            traceback.print_exc()
            await self._tell(call, ApiError(500, f"the server failed: {type(error).__name__}", code="internal_error"))

    async def _tell(self, call: Call, error: ApiError) -> None:
        if not call.started:
            body = msgspec.json.encode(call.error(error))
            await respond(call.send, error.status, body, {**JSON_TYPE, **call.headers, **error.headers})
        else:  # clients take a stream that merely ends for a finished one
            await send_part(call.send, call.failure(error), last=True)

    def _handler(self, scope: Scope) -> Handler:
        path, method = scope["path"], scope["method"]
        if self._keys and path not in OPEN_ROUTES:
            self._check_key(scope)
        route = self.routes.get(path)
        if route is None and path.startswith("/v1/models/"):
            route = {"GET": self.model}
        if route is None:
            raise ApiError(404, f"there is no {method} {path[:200]}", code="not_found")
        handler = route.get("GET" if method == "HEAD" else method)
        if handler is None:
            allowed = ", ".join([*route, *(["HEAD"] if "GET" in route else [])])
            raise ApiError(405, f"{path} takes {allowed}, not {method}", headers={"allow": allowed})
        return handler

    def _check_key(self, scope: Scope) -> None:
        given = header(scope, b"authorization")
        if not given and scope["path"] == "/":  # a browser's address line has no headers
            given = f"Bearer {parse_qs(scope['query_string'].decode('latin-1')).get('key', [''])[0]}"
        kind, _, token = given.partition(" ")
        token = token.strip() if kind.lower() == "bearer" else header(scope, b"x-api-key")
        known = [
            hmac.compare_digest(token.encode("utf-8", "replace"), key) for key in self._keys
        ]  # all of them, always
        if not any(known):
            raise ApiError(
                401,
                "the API key is missing or wrong: send Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    # ---- what the engine must be

    def _ready(self) -> EngineLink:
        """The link, where requests can be taken."""
        link = self.link
        if link is not None and link.dead:
            raise ApiError(503, f"the engine died: {link.dead}", code="engine_dead")
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        if link is None or not link.ready:
            raise ApiError(503, f"the model is loading: {link.stage if link else 'starting'}", code="loading")
        return link

    @property
    def _settings(self) -> dict[str, int]:
        link = self.link
        return {name: v for name, v in link.header.engine.items() if isinstance(v, int)} if link is not None else {}

    def _limits(self) -> Limits:
        settings = self._settings
        keeps_all = self.link is None or self.link.header.engine.get("retention", "all") == "all"
        return Limits(settings["max_model_len"], settings["block_size"], settings["num_blocks"] if keeps_all else None)

    def _check_model(self, name: object) -> str:
        """The served name that a request means. 404 for another."""
        if name is None or name == "":
            return self.options.names[0]
        if name not in self.options.names:
            known = ", ".join(self.options.names)
            raise ApiError(
                404, f"there is no model {str(name)[:100]!r}; there is {known}", param="model", code="model_not_found"
            )
        return str(name)

    # ---- small routes

    async def health(self, call: Call) -> None:
        """200 when the engine answers."""
        link = self._ready()
        if not await link.answers():
            raise ApiError(503, f"the engine has not answered for {time.monotonic() - link.heard_at:.0f} seconds")
        await call.reply({"status": "ok"})

    async def version(self, call: Call) -> None:
        """Ours."""
        await call.reply({"version": __version__})

    async def show_metrics(self, call: Call) -> None:
        """Prometheus' text."""
        call.started = True
        headers = {**call.headers, "content-type": CONTENT_TYPE_LATEST}
        await respond(call.send, 200, self.metrics.exposition(), headers)

    async def models(self, call: Call) -> None:
        """The list of one model, under each of its names."""
        await call.reply({"object": "list", "data": [self._describe(name) for name in self.options.names]})

    async def model(self, call: Call) -> None:
        """One of them."""
        await call.reply(self._describe(self._check_model(call.scope["path"].removeprefix("/v1/models/"))))

    def _describe(self, name: str) -> dict[str, object]:
        length = self._settings.get("max_model_len")
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "minipaged",
            "root": self.options.model,
            "max_model_len": length,
        }

    async def tokenize(self, call: Call) -> None:
        """Text or messages to token ids, as vLLM answers."""
        codec: Codec = self._ready().codec
        asked, ignored = fields.read_fields(await call.body(), fields.TokenizeRequest)
        self._check_model(asked.model)
        if asked.messages is not None:
            _, tokens = await completions.chat_tokens(asked, codec)
        elif asked.prompt is not None:
            text, special = asked.prompt, asked.add_special_tokens is not False
            tokens = await completions.off_loop(len(text), lambda: codec.encode(text, add_special=special))
        else:
            raise bad_request("prompt or messages is missing", "prompt")
        strings = None
        if asked.return_token_strs:
            strings = [codec.token_bytes(token, skip_special=False).decode("utf-8", "replace") for token in tokens]
        call.headers.update(fields.ignored_header(ignored))
        length = self._settings["max_model_len"]
        await call.reply({"count": len(tokens), "max_model_len": length, "tokens": tokens, "token_strs": strings})

    async def detokenize(self, call: Call) -> None:
        """Token ids to text, special tokens included."""
        codec: Codec = self._ready().codec
        asked, _ = fields.read_fields(await call.body(), fields.DetokenizeRequest)
        self._check_model(asked.model)
        for token in asked.tokens:
            if not 0 <= token < codec.vocab_size:
                raise bad_request(f"token id {token} is outside the vocabulary (0 to {codec.vocab_size - 1})", "tokens")
        tokens = asked.tokens
        text = await completions.off_loop(len(tokens), lambda: codec.decode(tokens, skip_special=False))
        await call.reply({"prompt": text})

    async def tokenizer_info(self, call: Call) -> None:
        """What lm-eval asks before it begins."""
        codec = self._ready().codec

        def named(token: int | None) -> str | None:
            return (
                None if token is None else str(codec.token_bytes(token, skip_special=False).decode("utf-8", "replace"))
            )

        ends = tuple(codec.eos_token_ids)
        template = codec.chat_template
        await call.reply(
            {
                "tokenizer_class": type(codec).__name__,
                "vocab_size": codec.vocab_size,
                "model_max_length": self._settings["max_model_len"],
                "bos_token": named(codec.bos_token_id),
                "eos_token": named(ends[0] if ends else None),
                "pad_token": None,
                "unk_token": None,
                "chat_template": None if template is None else template.source,
            }
        )

    # ---- looking on

    def _feed(self) -> Feed:
        link = self._ready()
        if self.feed is None:
            self.feed = Feed(link, show_text=self.options.show_prompts)
        return self.feed

    async def page(self, call: Call) -> None:
        """The blocks live, for people without a terminal."""
        call.started = True
        headers = {**call.headers, "content-type": "text/html; charset=utf-8", "content-security-policy": PAGE_POLICY}
        await respond(call.send, 200, _page(), headers)

    async def blocks(self, call: Call) -> None:
        """What the page draws, as a stream of documents."""
        feed = self._feed()
        watcher = feed.join()
        watch = asyncio.ensure_future(_watch(call.receive, watcher.signal))
        try:
            call.started = True
            await start_events(call.send, call.headers)
            async for document in BlockView(self._ready(), watcher).frames():
                if watcher.signal.gone or self.draining:
                    break
                await send_part(call.send, event(document))
            await send_part(call.send, b"", last=True)
        finally:
            watch.cancel()
            feed.leave(watcher)

    async def trace(self, call: Call) -> None:
        """The live record stream, as `minipaged tui --attach` reads it."""
        feed = self._feed()
        watcher = feed.join()
        watch = asyncio.ensure_future(_watch(call.receive, watcher.signal))
        try:
            call.started = True
            kind = [(b"content-type", b"application/octet-stream"), (b"cache-control", b"no-cache")]
            await call.send({"type": "http.response.start", "status": 200, "headers": kind})
            await send_part(
                call.send,
                feed.header.to_bytes() + Record(Kind.HEADER, 0, packing.pack(feed.header.to_json(), {})).to_bytes(),
            )
            while not (watcher.signal.gone or self.draining):
                await watcher.signal.wait_for(1.0)
                records = watcher.take()
                if records:
                    await send_part(call.send, b"".join([record.to_bytes() for record in records]))
            await send_part(call.send, b"", last=True)
        finally:
            watch.cancel()
            feed.leave(watcher)

    # ---- completions

    async def chat(self, call: Call) -> None:
        """POST /v1/chat/completions."""
        await self._complete(call, completions.prepare_chat)

    async def complete(self, call: Call) -> None:
        """POST /v1/completions."""
        await self._complete(call, completions.prepare_completion)

    async def messages(self, call: Call) -> None:
        """POST /v1/messages, as Anthropic has it."""
        await self._complete(call, completions.prepare_chat, dialects.Messages, dialects.chat_of_messages)

    async def count_tokens(self, call: Call) -> None:
        """POST /v1/messages/count_tokens."""
        call.error = dialects.Messages.error
        chat = dialects.chat_of_messages(await call.body(), counting=True)
        codec: Codec = self._ready().codec
        self._check_model(chat["model"])
        asked, _ = fields.read_fields(chat, fields.ChatRequest)
        _, tokens = await completions.chat_tokens(asked, codec)
        await call.reply({"input_tokens": len(tokens)})

    async def respond_to(self, call: Call) -> None:
        """POST /v1/responses, as far as it needs no memory."""
        await self._complete(call, completions.prepare_chat, dialects.Response, dialects.chat_of_response)

    async def _complete(
        self,
        call: Call,
        prepare: Callable[[completions.JSON, Codec, Limits, str], Awaitable[Job]],
        write: Callable[[Job], Writer] = completions.Chunks,
        translate: Callable[[completions.JSON], completions.JSON] | None = None,
    ) -> None:
        """From a body to an answer. translate: makes the body of a chat completion of another dialect's."""
        call.error = write.error  # type: ignore[attr-defined]  # every writer is a class with this static method
        data = await call.body()
        if translate is not None:
            call.headers.update(fields.ignored_header(dialects.ignored(data, translate)))
            data = translate(data)
        link = self._ready()
        model = self._check_model(data.get("model"))
        job = await prepare(data, link.codec, self._limits(), model)
        writer = write(job)
        call.headers.update(fields.ignored_header(job.ignored))
        signal = self.ask(job, call)
        watch = asyncio.ensure_future(_watch(call.receive, signal))
        try:
            await self._accepted(job, signal)
            if job.stream:
                await self._stream(call, job, signal, writer)
            else:
                while not job.ended:
                    await _next(signal)
                failure = job.failure()
                if failure is not None:
                    raise failure
                await call.reply(writer.whole())
        finally:
            watch.cancel()
            signal.close()
            self.cancel(job)

    def ask(self, job: Job, call: Call) -> Signal:
        """Send a job's prompts to the engine. 429 where the queue has no place for them."""
        link = self._ready()
        places = link.num_places(self._settings["max_num_seqs"], self.options.max_waiting)
        if len(job.prompts) > places:
            raise ApiError(
                429,
                f"the queue is full: {link.num_waiting} requests wait, {self.options.max_waiting} may",
                code="queue_full",
            )
        signal = Signal()
        for prompt in job.prompts:
            ticket = prompt.ticket = link.ask(prompt.tokens, job.params, job.width, signal, whole=not job.stream)
            ticket.client = ":".join(map(str, call.scope.get("client") or ("",)))
            ticket.method, ticket.request_id = call.scope["path"], call.headers["x-request-id"]
        return signal

    def cancel(self, job: Job) -> None:
        """What of it has not ended ends."""
        for prompt in job.prompts:
            if self.link is not None and prompt.ticket is not None:
                self.link.cancel(prompt.ticket)

    async def _accepted(self, job: Job, signal: Signal) -> None:
        """Until the engine has taken all prompts. The refusal of one is the job's."""
        while not all(p.ticket is not None and (p.ticket.accepted or p.ticket.ended) for p in job.prompts):
            await _next(signal)
            failure = job.failure()
            if failure is not None:
                raise failure

    async def _stream(self, call: Call, job: Job, signal: Signal, writer: Writer) -> None:
        call.started, call.failure = True, writer.failure
        await start_events(call.send, call.headers)
        signal.listen(PING_SECONDS)
        opening = writer.opening()
        if opening:
            await send_part(call.send, opening)
        while True:
            found = b"".join([writer.growth(index, growth) for index, growth in job.take()])
            ended = job.ended
            if found:
                await send_part(call.send, found)
            if ended:
                break
            await _next(signal, call.send)
        failure = job.failure()
        if failure is not None:
            raise failure
        await send_part(call.send, writer.closing(), last=True)


async def _next(signal: Signal, send: Send | None = None) -> None:
    """Until something came. ClientLeftError if it was the client's end; a stream is kept alive by comments meanwhile."""
    await signal.wait()
    if signal.quiet and send is not None:
        signal.quiet = False
        await send_part(send, PING)
    if signal.gone:
        raise ClientLeftError


async def _watch(receive: Receive, signal: Signal) -> None:
    """Notice that the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
    signal.gone = True
    signal.set()


def names_of(model: str, served: Sequence[str]) -> tuple[str, ...]:
    """What clients may call the model: the names that were given, else its own."""
    return tuple(served) or (model.rstrip("/").rsplit("/", 1)[-1] or model,)
