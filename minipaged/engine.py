"""The engine: schedule, launch, commit. One thread owns it; what others ask of it waits in an inbox that is emptied before each step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import count

from minipaged.config import SamplingParams
from minipaged.config import describe as settings_of
from minipaged.errors import InputError, RequestError
from minipaged.execution.runner import Pending, Runner
from minipaged.scheduling import knobs
from minipaged.scheduling.plan import StepPlan
from minipaged.scheduling.request import Request, RequestOutput
from minipaged.scheduling.scheduler import Scheduler
from minipaged.text.detokenizer import Detokenizer, TextCodec
from minipaged.trace.builder import TraceBuilder


class Engine:
    """Requests in, tokens out, one step at a time.

    scheduler and runner must share block ids and slots. codec: text to tokens and back; without one, prompts are token ids. depth: steps
    kept in flight beyond the one being committed; 0 commits each step before the next is scheduled. about: what a trace says of the engine
    beside its settings (`model`, bytes a token …).
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
        self.detokenizer = Detokenizer(codec) if codec is not None else None
        self.trace = TraceBuilder(scheduler, codec, clock)
        self._in_flight: deque[tuple[StepPlan, Pending]] = deque()
        self._inbox: deque[Callable[[], object]] = deque()
        self._ids = count()

    def submit(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> int:
        """Ask for an answer; returns the request's number. RequestError, before anything is changed, if it can never be served."""
        output = self.ask(prompt, params)
        if output.error is not None:
            raise RequestError(output.error)
        return output.request_id

    def ask(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, *, text: str | None = None
    ) -> RequestOutput:
        """As submit, but returns the output that will grow; a request that can never be served has its `error` set and nothing else.

        text: what a prompt of token ids reads, for those who show it.
        """
        text = prompt if isinstance(prompt, str) else text
        request = Request(next(self._ids), (), params or SamplingParams(), self.eos_token_ids, text)
        request.text_reader = self.detokenizer.read if self.detokenizer is not None else None
        try:
            request.prompt_token_ids = tuple(self._encode(prompt))
            self._check_vocabulary(request.params.stop_token_ids)
            self._check_logprobs(request.params)
            self.scheduler.check(request)
        except InputError as error:
            request.error = str(error)
        else:
            self._inbox.append(lambda: self.scheduler.add(request))
        return request.output

    def _encode(self, prompt: str | Sequence[int]) -> Sequence[int]:
        if isinstance(prompt, str):
            if self.codec is None:
                raise RequestError("this engine has no tokenizer: give the prompt as token ids")
            return self.codec.encode(prompt)
        try:
            tokens = list(prompt)
        except TypeError:
            raise RequestError(f"prompt_token_ids must be a sequence of token ids, not {prompt!r}") from None
        self._check_vocabulary(tokens)
        return tokens

    def _check_vocabulary(self, tokens: Sequence[int]) -> None:
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
        """Turn a setting before the next step, and say what it is then. InputError, before anything is changed, if that cannot be."""
        turn = knobs.check(self.scheduler, name, value)
        self._inbox.append(lambda: knobs.apply(self.scheduler, turn))
        self._inbox.append(lambda: self.trace.note_turn(turn))
        return turn.words

    def describe(self) -> dict[str, object]:
        """What a trace's header says: `model`, `seed`, and under `engine` the settings."""
        scheduler, about = self.scheduler, dict(self.about)
        settings = {**settings_of(scheduler.config), "block_size": scheduler.block_size}
        settings["num_blocks"] = scheduler.manager.usage().total
        return {"model": about.pop("model", ""), "seed": scheduler.config.seed, "engine": {**settings, **about}}

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._inbox or self._in_flight or self.scheduler.has_work)

    def step(self) -> list[RequestOutput]:
        """One step; returns the requests that gained a token or ended. While the flight fills up the list is empty.

        If it is cut short (ctrl+c, a device that fails) every request ends with `error`, as the next step reports, and the engine
        goes on with new ones.
        """
        try:
            return self._step()
        except BaseException:
            self._give_up()
            raise

    def _step(self) -> list[RequestOutput]:
        self.trace.begin()
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
            if not outputs and self.scheduler.requests:
                raise RuntimeError("no request can go on: the scheduler is stuck")
        if self.detokenizer is not None:
            self.detokenizer.look_for_stops(outputs, self.scheduler)
        self.trace.publish(plan, outputs)
        return outputs

    def _give_up(self) -> None:
        """After a step that was cut short nobody knows which keys and values were written: nothing goes on from them."""
        self._in_flight.clear()
        self.scheduler.give_up()

    def drain(self) -> list[RequestOutput]:
        """Commit all that is in flight, as a pause does. Cut short, it ends every request, as a step does."""
        try:
            return self._drain()
        except BaseException:
            self._give_up()
            raise

    def _drain(self) -> list[RequestOutput]:
        outputs: list[RequestOutput] = []
        while self._in_flight:
            self.trace.begin()
            plan, pending = self._in_flight.popleft()
            changed = self.scheduler.commit(plan, pending.tokens())
            if self.detokenizer is not None:
                self.detokenizer.look_for_stops(changed, self.scheduler)
            self.trace.publish(None, changed)
            outputs.extend(changed)
        return outputs

    def _read_inbox(self) -> None:
        while self._inbox:
            self._inbox.popleft()()
