"""Ranks: the processes that share a model, and how one scheduler drives them.

Rank 0 holds the engine. It sends every StepPlan, integers alone, to the others, and all of them run it: each has its part of the model
and its heads of the KV pool, under the same block ids. Sums between the layers keep them in step. Rank 0 starts the others by itself, or
`torchrun` starts all. A rank that dies, falls silent or fails ends the run on every rank, with a word that says which and why.

With a pipeline, ranks with the same layers are a stage. Hidden states go from each rank to its counterpart in the next stage, and the
tokens that the last stage draws go back to rank 0, which keeps as many steps in flight as there are stages.

Two ways lead from rank to rank: torch.distributed (gloo or NCCL) for tensors, and a TCP connection between rank 0 and each other rank
for plans, signs of life and last words.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.rendezvous import rendezvous

from minipaged.config import ModelConfig
from minipaged.errors import InputError, RankError
from minipaged.execution.collectives import CudaCollectives, GlooCollectives, Pipe
from minipaged.execution.eager import TorchRunner
from minipaged.execution.plan_bytes import pack_plan, pack_tokens, unpack_plan, unpack_tokens
from minipaged.model.llama import Llama
from minipaged.model.split import Collectives, Part
from minipaged.scheduling.plan import Pending, StepPlan, StepTokens

BEAT_SECONDS = 1.0  # between two signs of life
SILENT_SECONDS = 7.0  # without one: the rank hangs
JOIN_SECONDS = 60.0  # to wait for all ranks at the start; those that die meanwhile are noticed at once
LONGEST = timedelta(days=1)  # that a rank may wait for one that loads or computes, and gives signs of life
LAST_WORDS_SECONDS = 2.0  # to wait for the reason after a rank's connection broke
END_SECONDS = 5.0  # for the other ranks to end by themselves

# What a message is; its body follows.
PLAN, TOKENS, ALIVE, FAILED, END = b"P", b"T", b"A", b"F", b"E"


@dataclass(frozen=True, slots=True)
class Place:
    """Which of the ranks this process is."""

    rank: int
    ranks: int
    local_rank: int  # on this host: which GPU


def place_of(ranks: int) -> Place | None:
    """This process's place among `ranks`, where torchrun (or rank 0) has started it as one of them; None for a process that is to start
    the others. InputError if it was started as one of another number.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    rank, started = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if started != ranks:
        raise InputError(
            f"{started} ranks were started, but tensor_parallel x pipeline_parallel asks for {ranks}: make them equal"
        )
    return Place(rank, started, int(os.environ.get("LOCAL_RANK", rank)))


class Ranks:
    """The ranks as one of them sees it, from joining to the end.

    part, collectives: what this rank holds of the model, and what it computes with the others. device: this rank's. failure: the word of
    what ended the run, once something has.
    """

    def __init__(self, place: Place, device: torch.device, store: Store, stages: int = 1) -> None:
        self.rank, self.size = place.rank, place.ranks
        self.device = device
        width = place.ranks // stages  # ranks of a stage; they stand together
        self.part = Part(place.rank % width, width, place.rank // width, stages)
        self.failure: str | None = None
        self._store = store
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._connections: dict[int, Connection] = {}
        self._sending = threading.Lock()
        self._stuck: set[Connection] = set()  # nobody reads what is sent there
        self._ended = threading.Event()
        self._plans: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._drawn: queue.SimpleQueue[bytes] = queue.SimpleQueue()  # rank 0: what the last stage sent

    # ---- joining

    def start_children(self, arguments: Mapping[str, Any], command: tuple[str, ...]) -> None:
        """Rank 0: start the other ranks on this host. arguments: of the LLM that each is to make; they are written to its input."""
        root = Path(__file__).resolve().parents[2]
        port = self._store.port if isinstance(self._store, TCPStore) else 0
        for rank in range(1, self.size):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(self.size),
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "PYTHONPATH": os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH")))),
            }
            if self.device.type == "cpu":  # the ranks compute at the same time, on the same cores
                environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.size)))
            child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment)
            self._children[rank] = child
            with contextlib.suppress(BrokenPipeError):  # it died already; whoever waits for it will say so
                _write_input(child, arguments)

    def join(self) -> None:
        """Connect the ranks. Afterwards the death of one is known to all. InputError if one does not come."""
        if self.rank == 0:
            self._accept()
            threading.Thread(target=self._watch, name="minipaged ranks", daemon=True).start()
        else:
            self._connect()
            for work in (self._read, self._beat):
                threading.Thread(target=work, name="minipaged ranks", daemon=True).start()
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        with self.failing_together():
            dist.init_process_group(
                backend,
                store=PrefixStore("minipaged", self._store),
                rank=self.rank,
                world_size=self.size,
                timeout=timedelta(seconds=JOIN_SECONDS),
            )
            part, group = self.part, None
            for stage in range(part.stages if part.stages > 1 else 0):  # every rank makes every group
                made = dist.new_group([stage * part.ranks + rank for rank in range(part.ranks)])
                group = made if stage == part.stage else group
            for joined in {dist.group.WORLD, group} - {None}:
                _set_pg_timeout(LONGEST, joined)
            self.collectives: Collectives = (
                CudaCollectives(part.rank, part.ranks, self.device, group)
                if self.device.type == "cuda"
                else GlooCollectives(part.rank, part.ranks, group)
            )

    def _accept(self) -> None:
        host = "127.0.0.1" if self._children else os.environ.get("MASTER_ADDR", "127.0.0.1")
        key = secrets.token_hex(16)
        with socket.create_server((host, 0)) as server:
            self._store.set("plans", json.dumps((host, server.getsockname()[1], key)))
            server.settimeout(0.2)
            deadline = time.monotonic() + JOIN_SECONDS
            while len(self._connections) < self.size - 1:
                for rank, child in self._children.items():
                    if child.poll() is not None:
                        raise InputError(f"rank {rank} {_end_of(child)} before it could join")
                if time.monotonic() > deadline:
                    missing = sorted(set(range(1, self.size)) - set(self._connections))
                    raise InputError(f"rank {missing[0]} has not joined within {JOIN_SECONDS:.0f} s")
                try:
                    taken, _ = server.accept()
                except TimeoutError:
                    continue
                connection = _connection(taken, SILENT_SECONDS)
                try:
                    deliver_challenge(connection, key.encode())
                    answer_challenge(connection, key.encode())
                    self._connections[int(connection.recv_bytes(16))] = connection
                except (OSError, EOFError, ValueError, AssertionError, AuthenticationError):  # a stranger
                    connection.close()

    def _connect(self) -> None:
        host, port, key = json.loads(self._store.get("plans"))
        connection = _connection(socket.create_connection((host, port), timeout=JOIN_SECONDS), JOIN_SECONDS)
        answer_challenge(connection, key.encode())
        deliver_challenge(connection, key.encode())
        connection.send_bytes(str(self.rank).encode())
        self._connections[0] = connection

    # ---- agreeing

    def least(self, value: int) -> int:
        """The smallest of the ranks' values."""
        with self.failing_together():
            agreed = torch.tensor([value], dtype=torch.int64)
            dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
        return int(agreed.item())

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """What is computed with the other ranks: if it fails here, all ranks end, with the word of whoever failed first."""
        try:
            yield
        except BaseException as error:
            # torch.distributed fails here because a rank is gone: then the reason is on its way.
            word_comes = isinstance(error, RuntimeError) and self._ended.wait(LAST_WORDS_SECONDS)
            self.fail(f"rank {self.rank}: {_words(error)}")
            self._leave_group()
            if word_comes and self.failure:
                raise RankError(self.failure) from error
            raise

    def check(self) -> None:
        """RankError if the run has ended."""
        if self.failure is not None:
            raise RankError(self.failure)
        if self._ended.is_set():
            raise RankError("the other ranks have been ended: this LLM was closed")

    # ---- running

    def send(self, plan: StepPlan) -> None:
        """Rank 0: every other rank is to run this plan."""
        self._send_all(PLAN + pack_plan(plan))

    def connect(self, model: Llama, config: ModelConfig) -> Pipe | None:
        """Make a filled part one model with the others'. config: the whole model's. Returns the ends to other stages, if there are any."""
        part = self.part
        part.connect(model, config, self.collectives)
        if part.stages == 1:
            return None
        before = self.rank - part.ranks if part.stage > 0 else None
        after = self.rank + part.ranks if part.stage + 1 < part.stages else None
        return Pipe(before, after, model.dtype, config.hidden_size, self.device)

    def drive(self, runner: TorchRunner) -> RankRunner:
        """Rank 0: the runner that runs plans on all ranks. The others stay in here, serve, and end the process."""
        if self.rank == 0:
            return RankRunner(runner, self)
        self.serve(runner)
        raise SystemExit(0)

    def serve(self, runner: TorchRunner) -> None:
        """The other ranks: run plans in the order in which rank 0 made them, until it ends."""
        expected: int | None = None
        drawn: queue.SimpleQueue[tuple[int, Pending]] = queue.SimpleQueue()
        answers = self.part.stages > 1 and self.rank == (self.part.stages - 1) * self.part.ranks
        if answers:
            threading.Thread(target=self._answer, args=(drawn,), name="minipaged tokens", daemon=True).start()
        with self.failing_together():
            while True:
                message = self._plans.get()
                if message[:1] == END:
                    break
                plan = unpack_plan(message[1:])
                check_order(plan, expected, runner.num_blocks())
                expected = plan.step + 1
                pending = runner.launch(plan)
                if answers:
                    drawn.put((plan.step, pending))
        self._leave_group()

    def _answer(self, drawn: queue.SimpleQueue[tuple[int, Pending]]) -> None:
        """The last stage's thread: sends what was drawn to rank 0, while the main thread launches what comes next."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # of this thread
        while True:
            step, pending = drawn.get()
            try:
                self._send_all(TOKENS + pack_tokens(step, pending.tokens()))
            except RuntimeError as error:
                self.fail(f"rank {self.rank}: {_words(error)}")
                self._die(_words(error))

    def tokens_of(self, step: int) -> StepTokens:
        """Rank 0: wait for what the last stage drew in a step. RankError if a rank is gone."""
        while True:
            try:
                found, tokens = unpack_tokens(self._drawn.get(timeout=BEAT_SECONDS / 5))
            except queue.Empty:
                self.check()
                continue
            if found == step:  # else of a step that was given up
                return tokens

    def wait_for_end(self) -> None:
        """The other ranks: until rank 0 ends, whatever it sends."""
        while self._plans.get()[:1] != END:
            pass

    def _send_all(self, message: bytes) -> None:
        with self._sending:
            for connection in self._connections.values():
                if connection in self._stuck:
                    continue
                try:
                    connection.send_bytes(message)
                except BlockingIOError:  # it is full, and whoever listens to it will say that it hangs
                    self._stuck.add(connection)
                except OSError:  # whoever listens to it has seen why
                    continue

    # ---- watching

    def _watch(self) -> None:
        """Rank 0's thread: hears the others and tells them that it lives."""
        ranks = {connection: rank for rank, connection in self._connections.items()}
        heard = dict.fromkeys(ranks.values(), time.monotonic())
        looked = time.monotonic()
        while not self._ended.is_set():
            for connection in wait(list(ranks), timeout=BEAT_SECONDS / 2):
                rank = ranks[connection]  # type: ignore[index]
                heard[rank] = time.monotonic()
                try:
                    message = connection.recv_bytes()  # type: ignore[union-attr]
                except (EOFError, OSError):
                    self.fail(f"rank {rank} {_end_of(self._children.get(rank))}")
                    return
                if message[:1] == TOKENS:
                    self._drawn.put(message[1:])
                if message[:1] == FAILED:
                    self.fail(message[1:].decode())
                    return
            now = time.monotonic()
            if now - looked > BEAT_SECONDS:
                if now - looked > 3 * BEAT_SECONDS:  # this process was stopped itself, and the others with it
                    heard = dict.fromkeys(heard, now)
                self._send_all(ALIVE)
                looked = time.monotonic()
            for rank, last in heard.items():
                if now - last > SILENT_SECONDS:
                    self.fail(f"rank {rank} hangs: no sign of life for {SILENT_SECONDS:.0f} s")
                    return

    def _read(self) -> None:
        """The thread of the other ranks that hears rank 0: plans for the main thread, and whether all is well."""
        connection, heard, looked = self._connections[0], time.monotonic(), time.monotonic()
        try:
            while True:
                if connection.poll(BEAT_SECONDS):
                    heard = time.monotonic()
                    message = connection.recv_bytes()
                    if message[:1] == FAILED:
                        self._die(message[1:].decode())
                    if message[:1] in (PLAN, END):
                        self._plans.put(message)
                    if message[:1] == END:
                        self._ended.set()
                        return
                now = time.monotonic()
                if now - looked > 3 * BEAT_SECONDS:  # this process was stopped itself
                    heard = now
                looked = now
                if now - heard > SILENT_SECONDS:
                    self._die(f"rank 0 hangs: no sign of life for {SILENT_SECONDS:.0f} s")
        except (EOFError, OSError):
            self._die("rank 0 has ended")

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            self._send_all(ALIVE)

    def fail(self, words: str) -> None:
        """End the run on all ranks. The first word counts."""
        if self._ended.is_set():
            return
        self.failure = words
        self._ended.set()
        self._send_all(FAILED + words.encode())
        if self.rank == 0:
            self._end_children(0.5)

    def _die(self, words: str) -> None:
        """The end of a rank that is not the first: its main thread may be waiting for a rank that is gone."""
        print(f"minipaged rank {self.rank} ends: {words}", file=sys.stderr, flush=True)
        os._exit(1)

    # ---- the end

    def close(self) -> None:
        """Rank 0: end the other ranks and wait for them. Does nothing the second time."""
        if not self._ended.is_set():
            self._ended.set()
            self._send_all(END)
            self._leave_group()  # as the others do now: NCCL takes its connections down together
            self._end_children(END_SECONDS)
        for connection in self._connections.values():
            connection.close()

    def _leave_group(self) -> None:
        # After a failure NCCL would wait for a rank that is gone; its connections end with the process.
        if dist.is_initialized() and (self.failure is None or self.device.type == "cpu"):
            dist.destroy_process_group()

    def _end_children(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for child in self._children.values():
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def check_order(plan: StepPlan, expected: int | None, num_blocks: int) -> None:
    """RankError for a plan that is not the one after the last, or that names a block which this rank's pool has not."""
    if expected is not None and plan.step != expected:
        raise RankError(f"step {plan.step} came where step {expected} was due: the ranks are out of step")
    if plan.tables.size and int(plan.tables.max()) >= num_blocks:
        raise RankError(f"step {plan.step} names block {int(plan.tables.max())}, and this rank's pool has {num_blocks}")


class RankRunner:
    """Rank 0's runner: sends each plan to the other ranks, and runs its own part of it (scheduling.plan.Runner)."""

    def __init__(self, runner: TorchRunner, ranks: Ranks) -> None:
        self.runner = runner
        self.ranks = ranks
        self.close = weakref.finalize(self, ranks.close)  # also at the end of the process

    def num_blocks(self) -> int:
        """Blocks in the pool of every rank, the null block included."""
        return self.runner.num_blocks()

    def launch(self, plan: StepPlan) -> Pending:
        """Start a step on all ranks. RankError if one of them is gone."""
        self.ranks.check()
        # ctrl+c between the sending and the running would leave the ranks out of step: it comes after both.
        with _interrupted_later(), self.ranks.failing_together():
            self.ranks.send(plan)
            pending = self.runner.launch(plan)
        return RankPending(pending, self.ranks) if self.runner.pipe is None else StagePending(plan.step, self.ranks)


class RankPending:
    """A step launched on all ranks: on GPUs a rank that is gone would be waited for without an end, so this looks now and then."""

    def __init__(self, pending: Pending, ranks: Ranks) -> None:
        self._pending, self._ranks = pending, ranks
        self._done: torch.cuda.Event | None = None
        if ranks.device.type == "cuda":
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    def tokens(self) -> StepTokens:
        """Wait for the step. RankError if a rank is gone."""
        while self._done is not None and not self._done.query():  # type: ignore[no-untyped-call]
            self._ranks.check()
            time.sleep(2e-5)
        return self._pending.tokens()


class StagePending:
    """A step of a pipeline: its tokens come from the last stage."""

    def __init__(self, step: int, ranks: Ranks) -> None:
        self._step, self._ranks = step, ranks

    def tokens(self) -> StepTokens:
        """Wait for the step. RankError if a rank is gone."""
        return self._ranks.tokens_of(self._step)


def start_ranks(
    ranks: int,
    device: torch.device,
    arguments: Mapping[str, Any],
    *,
    stages: int = 1,
    command: tuple[str, ...] = (sys.executable, "-m", "minipaged.rank_process"),
) -> Ranks:
    """Join the ranks that were started with this process, or start them. ranks: of all `stages`. device: cpu or cuda, of which each rank
    takes its own.

    InputError says what is missing, before anything is started where that can be known.
    """
    if dist.is_initialized():
        raise InputError("this process has ranks already (torch.distributed is initialized): close the other LLM first")
    place = place_of(ranks)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1 if place is not None else ranks))
    if device.index is not None:
        raise InputError(
            f"device must be auto, cpu or cuda with tensor_parallel, not {device}: each rank takes a GPU of its own"
        )
    if device.type == "cuda":
        found = torch.cuda.device_count()
        if found < max(local, 1 + (place.local_rank if place is not None else 0)):
            raise InputError(
                f"{ranks} ranks need {local} GPUs on this host, and torch sees {found}: lower tensor_parallel"
            )
        device = torch.device("cuda", place.local_rank if place is not None else 0)
    joined = Ranks(place or Place(0, ranks, 0), device, _store(place, ranks), stages)
    try:
        if place is None:
            joined.start_children(arguments, command)
        joined.join()
    except BaseException:
        joined.close()
        raise
    return joined


def _store(place: Place | None, ranks: int) -> Store:
    """Where ranks find each other: of torchrun, or one of rank 0's at a free port."""
    timeout = timedelta(seconds=JOIN_SECONDS)
    if place is None:
        listener = socket.create_server(("127.0.0.1", 0))  # a socket of torch's own would listen to every network
        port = listener.getsockname()[1]
        return TCPStore(
            *("127.0.0.1", port, ranks),
            is_master=True,
            wait_for_workers=False,
            timeout=timeout,
            master_listen_fd=listener.detach(),
        )
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    store: Store
    try:
        store, _, _ = next(rendezvous("env://", place.rank, ranks, timeout=timeout))
    except (dist.DistError, ValueError) as error:
        raise InputError(f"rank {place.rank} cannot meet the others at {where}: {_words(error)}") from None
    return store


def _connection(taken: socket.socket, seconds: float) -> Connection:
    """Messages over a socket, each sent at once. BlockingIOError where one is under way and does not move for so many seconds."""
    taken.settimeout(None)
    for way in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
        taken.setsockopt(socket.SOL_SOCKET, way, struct.pack("ll", int(seconds), 0))
    taken.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Connection(taken.detach())


def _write_input(child: subprocess.Popen[bytes], arguments: Mapping[str, Any]) -> None:
    if child.stdin is not None:
        child.stdin.write(json.dumps(dict(arguments)).encode())
        child.stdin.close()


def _end_of(child: subprocess.Popen[bytes] | None) -> str:
    """How a rank ended, as far as its parent knows."""
    try:
        code = None if child is None else child.wait(LAST_WORDS_SECONDS)
    except subprocess.TimeoutExpired:
        code = None
    if code is None:
        return "has closed its connection"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def _words(error: BaseException) -> str:
    """An error in one line."""
    first = (str(error).splitlines() or [""])[0]
    return first if isinstance(error, InputError | RankError) else f"{type(error).__name__}: {first}".rstrip(": ")


@contextlib.contextmanager
def _interrupted_later() -> Iterator[None]:
    """Hold ctrl+c back until the end of the block. Only the main thread is interrupted by it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda *what: held.append(what))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held and callable(before):
            before(*held[0])
