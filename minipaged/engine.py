"""The engine: schedule, launch, commit. One thread at a time is at a step; what others ask waits in an inbox that is emptied before each.

It owns the text as well: the scheduler asks it whether a stop string ends a sequence, outputs ask it for their texts.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING

from minipaged.config import NO_LIMIT, SamplingParams, plain_value
from minipaged.config import describe as settings_of
from minipaged.errors import InputError, RequestError
from minipaged.scheduling.plan import Pending, Runner, StepPlan
from minipaged.scheduling.request import Request, RequestOutput
from minipaged.scheduling.scheduler import Scheduler
from minipaged.text.detokenizer import Detokenizer, TextCodec

if TYPE_CHECKING:
    from minipaged.text.grammar import Grammars
    from minipaged.trace.builder import TraceBuilder


class Engine:
    """Requests in, tokens out, one step at a time.

    scheduler and runner must share block ids and slots. codec: text to tokens and back; without one, prompts are token ids. depth: steps
    kept in flight beyond the one being committed; 0 commits each step before the next is scheduled. about: what a trace says of the engine
    beside its settings (`model`, bytes a token …).

    Any thread may submit, ask, abort, change a setting and step: one is at a step, the others wait for it. Whoever steps brings everybody's
    requests on, and each change is put into the mailbox that its request was given. A forked process is refused: see `check_process`.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        *,
        codec: TextCodec | None = None,
        eos_token_ids: tuple[int, ...] = (),
        vocab_size: int | None = None,
        clock: Callable[[], int] = time.perf_counter_ns,
        about: Mapping[str, object] | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.codec = codec
        self.eos_token_ids = eos_token_ids
        # the network's, which may know more ids than the tokenizer (vocabularies are padded)
        self.vocab_size = codec.vocab_size if vocab_size is None and codec is not None else vocab_size
        self.about = dict(about or {})
        self.depth = scheduler.config.depth
        self.detokenizer = scheduler.text_stops = Detokenizer(codec) if codec is not None else None
        self._clock = clock
        self._trace: TraceBuilder | None = None
        self._grammar: Grammars | None = None
        self._in_flight: deque[tuple[StepPlan, Pending]] = deque()
        self._inbox: deque[Callable[[], object]] = deque()
        self._ids = count()
        self._mailboxes: dict[int, deque[RequestOutput]] = {}  # of requests that have not ended, by their number
        self._turns = threading.Condition()  # held for a moment, to read or write the next two
        self._stepper: int | None = None  # the thread that is at a step
        self._num_steps = 0  # that have ended
        self._process = os.getpid()

    def submit(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> int:
        """Ask for an answer; returns the request's number. RequestError, before anything is changed, if it can never be served."""
        output = self.ask(prompt, params)
        if output.error is not None:
            raise RequestError(output.error)
        return output.request_id

    def ask(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        text: str | None = None,
        mailbox: deque[RequestOutput] | None = None,
    ) -> RequestOutput:
        """As submit, but returns the output that will grow; a request that can never be served has its `error` set and nothing else.

        text: what a prompt of token ids reads, for those who show it. mailbox: each step that changes the request, whoever takes it, puts a
        snapshot of its output there.
        """
        self.check_process()
        params = params or SamplingParams()
        request = Request(next(self._ids), (), params, self.eos_token_ids)
        if self.detokenizer is not None:
            request.text_reader, request.token_text = self.detokenizer.read, self.detokenizer.token_text
        try:
            request.prompt = self._text_of(prompt, text)
            request.prompt_token_ids = tuple(self._encode(prompt))
            request.params = self._fit_context(params, request.num_prompt)
            if params.stop and self.detokenizer is not None:
                request.stop_texts = self.detokenizer.special_tokens(params.stop)
            if params.bad_words:
                if self.detokenizer is None:
                    raise RequestError("bad_words need a tokenizer, and this engine has none")
                request.bad_words = self.detokenizer.word_tokens(params.bad_words)
            if params.json_schema is not None:
                request.mask_of = self._grammars().masks(params.json_schema)
            for tokens in (params.stop_token_ids, params.allowed_token_ids or (), dict(params.logit_bias)):
                self._check_vocabulary(tokens)
            self._check_logprobs(params)
            self.scheduler.check(request)
        except InputError as error:
            request.error = str(error)
        else:
            if mailbox is not None:
                self._mailboxes[request.request_id] = mailbox
            self._inbox.append(lambda: self.scheduler.enqueue(request))
        return request.output

    def _encode(self, prompt: str | Sequence[int]) -> Sequence[int]:
        if isinstance(prompt, str):
            if self.codec is None:
                raise RequestError("this engine has no tokenizer: give the prompt as token ids")
            # A text that is far too long is refused before its tokens are made, which would take a minute for 100 MB.
            fewest, most = self.codec.fewest_tokens(prompt), self.scheduler.config.max_model_len
            if fewest > most:
                raise RequestError(
                    f"the prompt has {len(prompt):,} characters, which are at least {fewest:,} tokens; this engine's context holds {most:,}"
                )
            return self.codec.encode(prompt)
        try:
            tokens = [plain_value(token) for token in plain_value(prompt)]
        except TypeError:
            raise RequestError(f"prompt_token_ids must be a sequence of token ids, not {prompt!r}") from None
        self._check_vocabulary(tokens)
        return tokens

    @staticmethod
    def _text_of(prompt: str | Sequence[int], text: str | None) -> str | None:
        if isinstance(prompt, str):
            return prompt
        if text is not None and not isinstance(text, str):
            raise RequestError(f"the text of a prompt must be a string, not {text!r}")
        return text

    def _fit_context(self, params: SamplingParams, num_prompt: int) -> SamplingParams:
        """Answers end where the context does; those without a limit also where the pool does, so that they are not refused for its size."""
        most = self.scheduler.config.max_model_len
        if params.max_tokens == NO_LIMIT and self.scheduler.running_set.retention.keeps_all:
            size, width = self.scheduler.block_size, params.num_sequences
            usable, shared = self.scheduler.manager.usage().total - 1, num_prompt // size
            most = min(most, (shared + max(0, usable - shared) // width) * size)
        if num_prompt + params.max_tokens <= most:
            return params
        room = max(1, most - num_prompt)
        return replace(params, max_tokens=room, min_tokens=min(params.min_tokens, room))

    def _grammars(self) -> Grammars:
        """Made when the first request wants one: it reads the whole vocabulary."""
        from minipaged.text.grammar import Grammars

        if self.codec is None:
            raise RequestError("answers that follow a schema need a tokenizer, and this engine has none")
        if self._grammar is None:
            self._grammar = Grammars(self.codec, self.eos_token_ids)
        return self._grammar

    def _check_vocabulary(self, tokens: Iterable[int]) -> None:
        size = 2**31 if self.vocab_size is None else self.vocab_size
        for token in tokens:
            if isinstance(token, int) and token >= size:
                raise RequestError(f"token id {token} is outside the vocabulary (0 to {size - 1})")

    def _check_logprobs(self, params: SamplingParams) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            wanted = getattr(params, name) or 0
            if self.vocab_size is not None and wanted > self.vocab_size:
                raise RequestError(f"{name} must be at most {self.vocab_size}, the model's vocabulary, not {wanted}")

    def abort(self, request_id: int) -> None:
        """End a request wherever it is, before the next step. Does nothing if it has ended."""
        self._inbox.append(lambda: self.scheduler.abort(request_id))

    def knob(self, name: str, value: object) -> str:
        """Change a setting before the next step, and say what it is then. InputError, before anything is changed, if that cannot be."""
        from minipaged.scheduling.runtime_settings import change_of

        change = change_of(name, value)
        self.scheduler.check_setting(change)
        self._inbox.append(lambda: self.scheduler.apply(change))
        self._inbox.append(lambda: self.trace.note_change(change))
        return change.words

    @property
    def trace(self) -> TraceBuilder:
        """What each step changed, for those who subscribe. Made when it is first asked for: most runs are watched by nobody."""
        with self._turns:
            if self._trace is None:
                from minipaged.trace.builder import TraceBuilder

                self._trace = TraceBuilder(self.scheduler, self.codec, self._clock)
            return self._trace

    def describe(self) -> dict[str, object]:
        """What a trace's header says: `model`, `seed`, and under `engine` the settings."""
        scheduler, about = self.scheduler, dict(self.about)
        settings = {**settings_of(scheduler.config), "block_size": scheduler.block_size}
        settings["num_blocks"] = scheduler.manager.usage().total
        return {"model": about.pop("model", ""), "seed": scheduler.config.seed, "engine": {**settings, **about}}

    def reset_prefix_cache(self) -> bool:
        """Forget all cached content, between two steps. False, and nothing changed, while a request holds a block."""
        forgot = False

        def forget() -> list[RequestOutput]:
            nonlocal forgot
            forgot = self.scheduler.manager.reset_prefix_cache()
            return []

        self._in_turn(forget)
        return forgot

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._inbox or self._in_flight or self.scheduler.has_work)

    def check_process(self) -> None:
        """RuntimeError in a process that was forked from the engine's: it has none of the threads that compute, and would wait for ever."""
        if os.getpid() != self._process:
            raise RuntimeError(
                f"this engine belongs to process {self._process}; process {os.getpid()} was forked from it, without the threads that "
                "compute: start processes by 'spawn' and make the LLM there"
            )

    def step(self) -> list[RequestOutput]:
        """One step; returns the requests that gained a token or ended. While the flight fills up the list is empty.

        If it is cut short (ctrl+c, a device that fails) every request ends with `error`, as the next step reports, and the engine
        goes on with new ones.
        """
        return self._in_turn(self._step)

    def drain(self) -> list[RequestOutput]:
        """Commit all that is in flight, as a pause does. Cut short, it ends every request, as a step does."""
        return self._in_turn(self._drain)

    def run_until(self, done: Callable[[], bool]) -> None:
        """Step until `done()`; while another thread is at a step, that one is waited for instead. What `done` asks for must come from
        requests that have been asked. RuntimeError if nothing is left that could bring it.
        """

        def step_if_needed() -> list[RequestOutput]:
            if done():
                return []
            if not self.has_work:
                raise RuntimeError("a step was cut short before it took the request in: ask again")
            return self._step()

        self._check_caller()
        while not done():
            self._in_turn(step_if_needed, instead=True)
        with self._turns:  # seen in the middle of another thread's step, which has more to write
            seen = self._num_steps
            self._turns.wait_for(lambda: self._stepper is None or self._num_steps != seen)

    def abandon(self, outputs: Sequence[RequestOutput]) -> None:
        """End what is still running of these, and leave the engine empty of it."""
        unfinished = [output.request_id for output in outputs if not output.finished]
        for request_id in unfinished:
            self._mailboxes.pop(request_id, None)
            self.abort(request_id)
        # A generator may be collected in the middle of a step: the next one lets go of its requests.
        if unfinished and self._stepper != threading.get_ident() and os.getpid() == self._process:
            self.drain()
            self.step()

    # ---- turns

    def _in_turn(self, work: Callable[[], list[RequestOutput]], *, instead: bool = False) -> list[RequestOutput]:
        """Do a step's work while no other thread is at one. instead: a step of another thread does as well."""
        self._check_caller()
        try:
            if not self._take_turn(instead):
                return []
            outputs = work()
            if self._mailboxes:
                self._deliver(outputs)
            return outputs
        except BaseException:
            if self._stepper == threading.get_ident():
                self._give_up()
            raise
        finally:
            self._end_turn()

    def _check_caller(self) -> None:
        self.check_process()
        if self._stepper == threading.get_ident():
            raise RuntimeError("a step is under way in this thread: who is told of it must not step")

    def _take_turn(self, instead: bool) -> bool:
        """Wait until no other thread is at a step; False if `instead` and one has ended meanwhile."""
        with self._turns:
            seen = self._num_steps
            while self._stepper is not None:
                self._turns.wait()
                if instead and self._num_steps != seen:
                    return False
            self._stepper = threading.get_ident()
            return True

    def _end_turn(self) -> None:
        with self._turns:
            if self._stepper == threading.get_ident():
                self._stepper = None
                self._num_steps += 1
                self._turns.notify_all()

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        """Each change goes to whoever waits for it, as it stands now: the next step may come before it is read."""
        for output in outputs:
            mailbox = self._mailboxes.get(output.request_id)
            if mailbox is not None:
                mailbox.append(output.snapshot())
                if output.finished:
                    self._mailboxes.pop(output.request_id, None)

    # ---- the step itself

    def _step(self) -> list[RequestOutput]:
        if self._trace is not None:
            self._trace.begin()
        self._read_inbox()
        plan = self.scheduler.schedule()
        if plan is not None:
            self._in_flight.append((plan, self.runner.launch(plan)))
        outputs: list[RequestOutput] = []
        if self._in_flight and (plan is None or len(self._in_flight) > self.depth):
            oldest, pending = self._in_flight.popleft()
            outputs = self.scheduler.commit(oldest, pending.tokens())
        elif plan is None:
            outputs = self.scheduler.take_ended()
            if not outputs and self.scheduler.requests and not self.scheduler.made_way:
                raise RuntimeError("no request can go on: the scheduler is stuck")
        self._emit(plan, outputs)
        return outputs

    def _emit(self, plan: StepPlan | None, outputs: list[RequestOutput]) -> None:
        """The trace takes a step's events; where there is none, they are dropped."""
        if self._trace is not None:
            self._trace.emit(plan, outputs)
        else:
            self.scheduler.take_events()

    def _give_up(self) -> None:
        """After a step that was cut short nobody knows which keys and values were written: nothing goes on from them."""
        self._in_flight.clear()
        self.scheduler.give_up()

    def _drain(self) -> list[RequestOutput]:
        outputs: list[RequestOutput] = []
        while self._in_flight:
            if self._trace is not None:
                self._trace.begin()
            plan, pending = self._in_flight.popleft()
            changed = self.scheduler.commit(plan, pending.tokens())
            self._emit(None, changed)
            outputs.extend(changed)
        return outputs

    def _read_inbox(self) -> None:
        while self._inbox:
            self._inbox.popleft()()
