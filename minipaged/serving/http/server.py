"""The server process: a socket, an event loop, the engine's process, and how all three end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import uvicorn

from minipaged.errors import InputError
from minipaged.serving.child import EngineChild
from minipaged.serving.http.app import App, Options
from minipaged.serving.http.limits import LimitedProtocol
from minipaged.serving.http.link import EngineLink

KEEP_ALIVE_SECONDS = 75  # longer than nginx keeps an idle connection to a server behind it
LAST_WORDS_SECONDS = 0.5  # to write error events once all must end
READY = "is ready; ctrl+c ends it"  # the end of the line that says so
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen. drain: seconds that requests have to end after the first signal."""

    host: str = "127.0.0.1"
    port: int = 8000
    drain: float = 10.0


class _Server(uvicorn.Server):
    """uvicorn's, but signals are ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(
    factory: Callable[..., Any], arguments: Mapping[str, Any], options: Options, address: Address, say: Say
) -> int:
    """Serve until a signal or the engine's death; returns the exit code. say: prints a line for the user. InputError if the port is taken.

    factory, arguments: as EngineChild takes them.
    """
    listener = listen(address)
    try:
        child = EngineChild(factory, arguments)
    except BaseException:
        listener.close()
        raise
    run = Run(child, options, address, say)
    try:
        return asyncio.run(run.main(listener))
    finally:
        run.close()


def listen(address: Address) -> socket.socket:
    """A socket on that address. InputError if it cannot be."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    # The protocol is named because asyncio sends small packets at once only where it is: else a head waits 40 ms for its body's sake.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address.host, address.port))
        listener.listen(2048)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(
            f"cannot listen on {address.host} port {address.port}: {reason}; choose another --port"
        ) from None
    return listener


class Run:
    """One run of the server."""

    def __init__(self, child: EngineChild, options: Options, address: Address, say: Say) -> None:
        self.child, self.options, self.address = child, options, address
        self.app = App(options)
        self._say = say
        self._code = 0
        self._signals = 0
        self._server: _Server | None = None
        self._background: set[asyncio.Task[None]] = set()
        self._was_ready = False

    async def main(self, listener: socket.socket) -> int:
        """Until the end."""
        link = EngineLink(self.child, self.app.metrics, self._engine_changed)
        await link.open()
        self.app.link = link
        config = uvicorn.Config(
            self.app,
            http=LimitedProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
        )
        self._server = _Server(config)
        loop = asyncio.get_running_loop()
        for asked in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            with contextlib.suppress(RuntimeError, ValueError, NotImplementedError):  # not the main thread
                loop.add_signal_handler(asked, self._signalled)
        await self._server.serve(sockets=[listener])
        for task in list(self._background):
            task.cancel()
        link.hang_up()
        return self._code

    @property
    def url(self) -> str:
        """Where clients find it."""
        host = f"[{self.address.host}]" if ":" in self.address.host else self.address.host
        return f"http://{host}:{self.address.port}"

    def _engine_changed(self) -> None:
        """The engine is ready, or dead."""
        link = self.app.link
        if link is None:
            return
        if link.dead:
            self._code = 2 if link.input_error else 1
            words = "" if link.input_error else self.child.last_words()
            self._say(link.dead + (f" ({words})" if words and words not in link.dead else ""))
            self._later(self._leave())
        elif not self._was_ready:
            self._was_ready = True
            self._say(f"{', '.join(self.options.names)}: {self.url}/v1 {READY}")

    # ---- the end

    def _signalled(self) -> None:
        self._signals += 1
        if self._signals == 1:
            waiting = len(self.app.link.tickets) if self.app.link is not None else 0
            if waiting:
                self._say(
                    f"{waiting} requests have {self.address.drain:g} seconds to end; a second signal ends them at once"
                )
            self._later(self._drain())
        else:
            self._later(self._leave())

    async def _drain(self) -> None:
        """Take nothing new; what runs may end."""
        self.app.draining = True
        if self._server is not None:
            self._server.should_exit = True
        await asyncio.sleep(self.address.drain)
        await self._leave()

    async def _leave(self) -> None:
        """Tell every client that its answer will not be finished, and go."""
        self.app.draining = True
        if self.app.link is not None:
            self.app.link.end_all("the server is shutting down")
        if self._server is not None:
            self._server.should_exit = True
            await asyncio.sleep(LAST_WORDS_SECONDS)
            self._server.force_exit = True

    def _later(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def close(self) -> None:
        """See the engine's process out."""
        with contextlib.suppress(OSError, ValueError):
            self.child.commands.close()
        with contextlib.suppress(OSError, ValueError):
            self.child.records.close()
        self.child.see_out()
