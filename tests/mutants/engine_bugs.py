"""Bugs of an engine with several callers (L69), each put into the real classes. The docstring is the bug; a named law must find it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from minipaged.engine import Engine
from minipaged.scheduling.request import CompletionOutput, RequestOutput


class NewsForWhoStepsOnly(Engine):
    """A change is delivered to the stream that takes the step; where somebody else steps, the others' changes are lost."""

    _reading: frozenset[int] = frozenset()  # the mailboxes of whoever waits in run_until

    def run_until(self, done: Callable[[], bool]) -> None:
        cells = [cell.cell_contents for cell in getattr(done, "__closure__", None) or ()]
        self._reading = frozenset(id(value) for value in cells if isinstance(value, deque))
        super().run_until(done)

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        super()._deliver([o for o in outputs if id(self._mailboxes.get(o.request_id)) in self._reading])


class NewestChangeOnly(Engine):
    """A mailbox keeps the newest change of each step: who does not look after every step misses the others."""

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            mailbox = self._mailboxes.get(output.request_id)
            if mailbox is not None:
                mailbox.clear()
        super()._deliver(outputs)


class OneMailboxForAll(Engine):
    """The engine knows one mailbox, the newest: whoever streamed before is forgotten."""

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        newest = max(self._mailboxes)
        super()._deliver([o for o in outputs if o.request_id == newest])


class TheEndIsNotDelivered(Engine):
    """After a step that failed nobody is told that all requests have ended."""

    def _give_up(self) -> None:
        super()._give_up()
        self._mailboxes.clear()


class LeavingTakesAll(Engine):
    """A stream that is left ends everybody's requests."""

    def abandon(self, outputs: object) -> None:
        super().abandon([request.output for request in self.scheduler.requests.values()])


class StepsInsideAStep(Engine):
    """Whoever is told of a step may take one: steps are nested."""

    def _check_caller(self) -> None:
        self._stepper = None


class LiveOutputInTheMailbox(Engine):
    """What a stream is given is the live output, which grows while it is kept."""

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            mailbox = self._mailboxes.get(output.request_id)
            if mailbox is not None:
                mailbox.append(output)
                if output.finished:
                    self._mailboxes.pop(output.request_id, None)


class LiveLogprobs(RequestOutput):
    """An answer's log-probabilities are the live list and no copy: they grow in what was handed out before."""

    __slots__ = ()

    @property
    def outputs(self) -> list[CompletionOutput]:
        chosen = [s for s in self.request.sequences if s.finish_reason != "pruned"]
        return [
            answer._replace(logprobs=sequence.logprobs)
            for answer, sequence in zip(super().outputs, chosen, strict=True)
        ]


ENGINES: list[tuple[type[Engine], str]] = [
    (NewsForWhoStepsOnly, "test_L69_generate_inside_a_stream_takes_nothing_from_it"),
    (NewestChangeOnly, "test_L69_generate_inside_a_stream_takes_nothing_from_it"),
    (OneMailboxForAll, "test_L69_a_stream_that_is_left_takes_nothing_from_another"),
    (TheEndIsNotDelivered, "test_L69_a_step_that_fails_ends_the_requests_of_all"),
    (LeavingTakesAll, "test_L69_a_stream_that_is_left_takes_nothing_from_another"),
    (StepsInsideAStep, "test_L69_who_is_told_of_a_step_may_not_step"),
    (LiveOutputInTheMailbox, "test_L69_what_a_stream_gave_never_changes"),
]
OUTPUTS: list[tuple[type[RequestOutput], str]] = [(LiveLogprobs, "test_L69_what_a_stream_gave_never_changes")]
