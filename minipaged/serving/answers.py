"""The engine's end of a server: requests under tickets, and what each step added to their answers, as rows of one ANSWERS record.

A ticket is the server's number for a request. Rows, in the order they happen:

    accepted  ticket, most tokens of an answer, number    it is queued; the trace has it under that number
    refused   ticket, why                                 it can never be served; nothing more comes
    started   ticket, tokens found in the prefix cache    it runs for the first time
    prompt    ticket, log-probabilities of its prompt     one entry a token; None for the first
    grew      ticket, answer, text, tokens, log-probabilities or None, finish reason or "", what stopped it
    ended     ticket, why it failed or None, tokens drawn for it in all

An entry lists [token, logprob, rank] of the token itself and of the likeliest ones. Text is sent once nothing can change it: a stop string
that may be arriving and part of a character are held back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from minipaged.config import SamplingParams
from minipaged.scheduling.request import CompletionOutput, RequestOutput, Sequence, TokenLogprobs
from minipaged.trace import packing
from minipaged.trace.file import Kind, Record

if TYPE_CHECKING:
    from minipaged.engine import Engine
    from minipaged.scheduling.request import Request
    from minipaged.scheduling.scheduler import Scheduler
    from minipaged.text.grammar import Grammar

GAUGES_EVERY = 0.5  # seconds between two accounts of the queues and the pool
ALIVE = ("", None)
RECORD_WEIGHT = (
    1 << 20
)  # characters, tokens and log-probabilities of a record: below packing.MAX_BODY_BYTES, however they are written
SCHEMA_READERS = 2  # threads that read schemas, so that a large one does not hold up all others
LOWEST_LOGPROB = -9999.0  # stands for minus infinity, which JSON cannot write
Row = list[Any]
Entry = list[list[float]]  # of one token: [token, logprob, rank], itself first


class Asked:
    """One request: its output, and how much of each of its answers was sent."""

    __slots__ = ("output", "prompt_sent", "ranked", "sent", "started", "ticket")

    def __init__(self, ticket: int, output: RequestOutput) -> None:
        params = output.request.params
        self.ticket = ticket
        self.output = output
        self.started = False
        self.prompt_sent = params.prompt_logprobs is None
        # The best answers are known at the end: nothing of them is sent before.
        self.ranked = params.beam_width is not None or (params.best_of or 0) > params.n
        self.sent: dict[int, tuple[int, int]] = {}  # answer -> characters, tokens; an answer that has ended stays


class Answers:
    """The requests that a server asked of this engine. `take` gives the rows since the last call.

    later: has the engine's loop call something between two steps; may itself be called from any thread.
    """

    def __init__(self, engine: Engine, later: Callable[[Callable[[], None]], None]) -> None:
        self._engine = engine
        self._later = later
        self._readers = ThreadPoolExecutor(SCHEMA_READERS, "schemas")
        self._reading: set[int] = set()  # tickets whose schemas are being read
        self._rows: list[Row] = []
        self._by_ticket: dict[int, Asked] = {}
        self._by_request: dict[int, Asked] = {}
        self._not_started: dict[int, Asked] = {}
        self._gauges_at = 0.0

    def ask(self, ticket: int, tokens: Seq[int], params: Mapping[str, Any]) -> None:
        """Queue a request for the engine's next step, or refuse it. One with a schema is queued once that was read, beside the steps."""
        schema = params.get("json_schema")
        if schema is None:
            self._queue(ticket, tokens, params)
        else:
            self._reading.add(ticket)
            self._readers.submit(self._read, schema, ticket, tokens, params)

    def _read(self, schema: str, ticket: int, tokens: Seq[int], params: Mapping[str, Any]) -> None:
        """In a thread of its own."""
        try:
            grammar = self._engine.read_schema(schema)
        except Exception as error:
            words = _words(error)
            self._later(lambda: self._refuse(ticket, words))
        else:
            self._later(lambda: self._queue_read(ticket, tokens, params, grammar))

    def _queue_read(self, ticket: int, tokens: Seq[int], params: Mapping[str, Any], grammar: Grammar) -> None:
        if ticket in self._reading:  # else nobody waits any more
            self._reading.discard(ticket)
            self._queue(ticket, tokens, params, grammar)

    def _refuse(self, ticket: int, why: str) -> None:
        self._reading.discard(ticket)
        self._rows.append(["refused", ticket, why])

    def _queue(self, ticket: int, tokens: Seq[int], params: Mapping[str, Any], grammar: Grammar | None = None) -> None:
        try:
            output = self._engine.ask(tokens, SamplingParams(**params), grammar=grammar)
        except (
            Exception
        ) as error:  # whatever one request brings, it must not end everybody's engine; nothing is queued yet
            self._refuse(ticket, _words(error))
            return
        if output.error is not None:
            self._rows.append(["refused", ticket, output.error])
            return
        asked = Asked(ticket, output)
        self._by_ticket[ticket] = self._by_request[output.request_id] = self._not_started[ticket] = asked
        self._rows.append(["accepted", ticket, output.request.params.max_tokens, output.request_id])

    def cancel(self, ticket: int) -> None:
        """Nobody waits for this answer any more."""
        self._reading.discard(ticket)
        asked = self._by_ticket.get(ticket)
        if asked is not None:
            self._forget(asked)
            self._engine.abort(asked.output.request_id)

    def _forget(self, asked: Asked) -> None:
        del self._by_ticket[asked.ticket], self._by_request[asked.output.request_id]
        self._not_started.pop(asked.ticket, None)

    def grow(self, outputs: Iterable[RequestOutput]) -> None:
        """Take in the outputs that a step changed."""
        if self._not_started:
            self._note_starts()
        for output in outputs:
            asked = self._by_request.get(output.request_id)
            if asked is not None:
                self._note_growth(asked)

    def _note_starts(self) -> None:
        started = [a for a in self._not_started.values() if a.output.num_cached_tokens is not None]
        for asked in started:
            del self._not_started[asked.ticket]
            self._rows.append(["started", asked.ticket, asked.output.num_cached_tokens])

    def _note_growth(self, asked: Asked) -> None:
        output, request = asked.output, asked.output.request
        if not asked.prompt_sent and (request.sequences[0].num_output or output.finished):
            asked.prompt_sent = True
            self._rows.append(["prompt", asked.ticket, [_entry(e) for e in request.prompt_logprobs]])
        finished = output.finished
        if not asked.ranked:
            self._add_growth(asked, request)
        elif finished:
            for answer in output.outputs:
                logprobs = None if answer.logprobs is None else [_entry(e) for e in answer.logprobs]
                self._rows.append(
                    ["grew", asked.ticket, answer.index, answer.text, answer.token_ids, logprobs, *_end_of(answer)]
                )
        if finished:
            drawn = sum(sequence.num_output for sequence in request.sequences)
            self._rows.append(["ended", asked.ticket, output.error, drawn])
            self._forget(asked)

    def _add_growth(self, asked: Asked, request: Request) -> None:
        wants_logprobs = request.params.logprobs is not None
        for sequence in request.sequences:
            characters, tokens = asked.sent.get(sequence.index, (0, 0))
            drawn = sequence.token_ids[request.num_prompt + tokens :]
            finished = sequence.finished
            if characters < 0 or not (drawn or finished):
                continue
            text, stable = "", 0
            if request.text_reader is not None:
                state = request.text_reader(sequence)
                text, stable = state.text[max(0, characters) : state.stable], state.stable
            logprobs = [_entry(e) for e in sequence.logprobs[tokens:]] if wants_logprobs else None
            # Once an answer has ended, -1 characters: nothing more is sent of it.
            asked.sent[sequence.index] = (-1 if finished else max(characters, stable), tokens + len(drawn))
            self._rows.append(
                [
                    "grew",
                    asked.ticket,
                    sequence.index,
                    text,
                    drawn,
                    logprobs,
                    *(_end_of(sequence) if finished else ALIVE),
                ]
            )

    @property
    def has_rows(self) -> bool:
        """Whether something waits to be sent."""
        return bool(self._rows)

    def account(self) -> None:
        """Have the gauges sent with the next rows: how things stand before the engine waits."""
        self._gauges_at = 0.0

    def take(self, now: float) -> Record | None:
        """Rows that were not taken yet, as many as a record has room for, with the gauges when they are due; None if there is nothing to
        say.

        now: seconds of time.monotonic, a clock that all processes of a machine share.
        """
        due = now - self._gauges_at >= GAUGES_EVERY
        if not self._rows and not due:
            return None
        weight = count = 0
        while count < len(self._rows) and (not count or weight + _weight(self._rows[count]) <= RECORD_WEIGHT):
            weight += _weight(self._rows[count])
            count += 1
        head: dict[str, Any] = {"at": now, "rows": self._rows[:count]}
        if due:
            self._gauges_at = now
            head["gauges"] = gauges(self._engine.scheduler)
        self._rows = self._rows[count:]
        return Record(Kind.ANSWERS, 0, packing.pack(head, {}, level=0))


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__


def _weight(row: Row) -> int:
    """About how much there is to write of a row."""
    if row[0] == "grew":
        _, _, _, text, tokens, logprobs, _, _ = row
        return 1 + len(text) + len(tokens) + sum(map(len, logprobs or ()))
    return 1 + sum(len(entry or ()) for entry in row[2]) if row[0] == "prompt" else 1


def _end_of(answer: CompletionOutput | Sequence) -> tuple[str, int | str | None]:
    """How it ended, and what stopped it."""
    return answer.finish_reason, answer.stop_reason


def _entry(logprobs: TokenLogprobs | None) -> Entry | None:
    if logprobs is None:
        return None
    return [[token, e.logprob if math.isfinite(e.logprob) else LOWEST_LOGPROB, e.rank] for token, e in logprobs.items()]


def gauges(scheduler: Scheduler) -> dict[str, int]:
    """How the queues and the pool stand, and what was counted since the start: Prometheus' view, without a trace."""
    usage, counters, size = scheduler.manager.usage(), scheduler.counters, scheduler.block_size
    entries, ends = 0, dict[int, int]()  # block table entries; filled slots of blocks that are not full
    for request in scheduler.running:
        for sequence in request.alive:
            table = scheduler.manager.table(sequence.seq_id) if sequence.slot >= 0 else ()
            entries += len(table)
            for index in range(sequence.num_computed // size, len(table)):
                if table[index]:  # 0 is the null block
                    filled = max(0, sequence.num_computed - index * size)
                    ends[table[index]] = max(filled, ends.get(table[index], 0))
    return {
        "running": len(scheduler.running),
        "waiting": len(scheduler.waiting),
        "swapped": len(scheduler.swapped),
        "total_blocks": usage.total - usage.null,
        "free_blocks": usage.free - usage.cached,
        "cached_blocks": usage.cached,
        "referenced_blocks": usage.referenced,
        "pinned_blocks": usage.pinned,
        "host_blocks": usage.host_total - usage.host_free,
        "shared_saved_blocks": max(0, entries - usage.referenced),
        "tail_slots": sum(size - filled for filled in ends.values()),
        "preemptions": counters.preemptions,
        "hit_tokens": counters.hit_tokens,
        "queried_tokens": counters.queried_tokens,
        "generated_tokens": counters.generated_tokens,
        "computed_tokens": counters.computed_tokens,
        "copies": counters.copies,
    }
