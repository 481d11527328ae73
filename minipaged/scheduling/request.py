"""What was asked (Request), one line of tokens (Sequence), and what comes back (RequestOutput).

Text is made by whoever owns it: the engine gives a request a `text_reader`, which is called when somebody reads a text.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple, Protocol

from minipaged.errors import RequestError

if TYPE_CHECKING:
    from minipaged.config import SamplingParams
    from minipaged.memory.blocks import PrefixHit
    from minipaged.scheduling.beam import BeamSearch
    from minipaged.scheduling.plan import IntArray


class Status(Enum):
    """Where a sequence is. FINISHED covers every end; its finish_reason tells which."""

    WAITING = "waiting"
    RUNNING = "running"
    SWAPPED = "swapped"
    FINISHED = "finished"


class Logprob(NamedTuple):
    """The log-softmax of the raw logits at one token, the token's rank (1 is the most likely) and its text (None without a tokenizer)."""

    logprob: float
    rank: int
    decoded_token: str | None = None


TokenLogprobs = dict[int, Logprob]  # token id -> its log-probability


class TextState(Protocol):
    """The text of a sequence as far as it was read."""

    text: str
    stable: int  # characters of it that no stop string can take back
    stopped_by: str | None  # the stop string that ended it


class Progress(Protocol):
    """The batch's columns that hold the progress of scheduled sequences, by slot."""

    num_computed: IntArray
    num_published: IntArray


class Sequence:
    """One line of tokens: the prompt, then what was drawn.

    token_ids[:num_computed] have their KV written, or a step that was scheduled writes it; token_ids[num_computed:] are still to be
    computed. Progress has one home at a time: the batch's columns while the sequence has a slot, this object while it has none.
    """

    __slots__ = (
        "_columns",
        "_num_computed",
        "_num_published",
        "cumulative_logprob",
        "finish_reason",
        "forks_at",
        "forks_from",
        "grammar_state",
        "index",
        "left_at",
        "logprobs",
        "num_cached",
        "parent",
        "request",
        "seq_id",
        "slot",
        "status",
        "text_state",
        "token_ids",
    )

    def __init__(
        self, seq_id: int, request: Request, token_ids: list[int], *, index: int = 0, parent: int = -1
    ) -> None:
        self.seq_id = seq_id
        self.request = request
        self.token_ids = token_ids
        self.index = index  # which of the request's samples
        self.parent = parent  # the sequence this one was forked from; -1: none
        self.status = Status.WAITING
        self.slot = -1  # its row of the batch; -1: none
        self._columns: Progress | None = None
        self._num_computed = self._num_published = 0
        self.num_cached = 0  # tokens found in the prefix cache when it was last admitted
        # Steps that had been launched when it last left the batch: it comes back once all of them are committed.
        self.left_at = 0
        # After a recompute: it is forked again from this sequence, once that has computed `forks_at` tokens. None: it stands on its own.
        self.forks_from: Sequence | None = None
        self.forks_at = 0
        self.finish_reason = ""
        self.cumulative_logprob = 0.0
        self.logprobs: list[TokenLogprobs] = []
        self.text_state: TextState | None = None  # kept here by whoever reads text
        self.grammar_state: object = None  # kept here by whoever knows which tokens may come next

    # ---- progress

    @property
    def num_computed(self) -> int:
        """Leading tokens whose KV is written, or will be by a step that was scheduled."""
        return self._num_computed if self._columns is None else int(self._columns.num_computed[self.slot])

    @property
    def num_published(self) -> int:
        """Leading tokens that were published: the block manager has them."""
        return self._num_published if self._columns is None else int(self._columns.num_published[self.slot])

    def restart(self, num_computed: int) -> None:
        """So many tokens are computed and published: what a prefix cache or a parent gave, or nothing. It must have no slot."""
        self._num_computed = self._num_published = num_computed

    def enter(self, columns: Progress, slot: int) -> None:
        """The batch's columns hold its progress from now on."""
        columns.num_computed[slot], columns.num_published[slot] = self._num_computed, self._num_published
        self._columns, self.slot = columns, slot

    def leave(self) -> None:
        """It has no slot any more and keeps its progress itself."""
        self._num_computed, self._num_published = self.num_computed, self.num_published
        self._columns, self.slot = None, -1

    # ---- text

    @property
    def text(self) -> str:
        """The text so far; "" where nobody reads text."""
        state = self._read_text()
        return state.text if state is not None else ""

    @property
    def stable_text(self) -> int:
        """Characters of `text` that no stop string can take back."""
        state = self._read_text()
        return state.stable if state is not None else 0

    def _read_text(self) -> TextState | None:
        reader = self.request.text_reader
        return None if reader is None else reader(self)

    def text_token_ids(self, start: int) -> list[int]:
        """The drawn tokens from number `start` on that are text: a stop token that ended the sequence is none."""
        tokens = self.token_ids[self.request.num_prompt + start :]
        stopped = self.finished and self.finish_reason == "stop" and tokens and tokens[-1] in self.request.stop_ids
        return tokens[:-1] if stopped and not self.request.params.include_stop_str_in_output else tokens

    @property
    def stop_reason(self) -> int | str | None:
        """What ended it, where its request names it: the stop string, or the token of stop_token_ids. None for the model's own end."""
        if not self.finished or self.finish_reason != "stop":
            return None
        request, last = self.request, self.token_ids[-1]
        if last in request.stop_ids:
            return request.stop_texts.get(last, last if last in request.params.stop_token_ids else None)
        state = self._read_text()
        return None if state is None else state.stopped_by

    # ---- what was drawn

    @property
    def finished(self) -> bool:
        """Whether it has ended."""
        return self.status is Status.FINISHED

    @property
    def output_token_ids(self) -> list[int]:
        """The tokens drawn so far."""
        return self.token_ids[self.request.num_prompt :]

    @property
    def num_output(self) -> int:
        """How many tokens were drawn so far."""
        return len(self.token_ids) - self.request.num_prompt

    def __repr__(self) -> str:
        return f"Sequence({self.seq_id}, {self.status.value}, {len(self.token_ids)} tokens)"


@dataclass(eq=False)
class Request:
    """What was asked, and the sequences that answer it."""

    request_id: int
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    eos_token_ids: tuple[int, ...] = ()
    prompt: str | None = None
    arrival: int = -1  # set by the scheduler: the order in which requests were added
    sequences: list[Sequence] = field(default_factory=list)  # alive or finished, in the order they were born
    # Whether it has several sequences yet: once its prompt is computed, each of its n samples or beams has its own.
    forked: bool = False
    reserved_slots: list[int] = field(default_factory=list)  # for sequences that are still to be forked
    prefix: PrefixHit | None = None  # the keys of the tokens that it is admitted with, while it waits
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    beams: BeamSearch | None = None
    hypotheses: list[Sequence] = field(default_factory=list)  # beams that ended, by their number
    error: str | None = None
    text_reader: Callable[[Sequence], TextState] | None = None  # brings a sequence's text up to its tokens
    token_text: Callable[[int], str] | None = None  # what one token reads
    stop_texts: dict[int, str] = field(default_factory=dict)  # stop strings that are special tokens, by their ids
    bad_words: tuple[tuple[int, ...], ...] = ()  # as tokens
    mask_of: Callable[[Sequence], bytes] | None = (
        None  # which tokens may come next, where a grammar says so: a bit a token
    )
    num_cached_tokens: int | None = None  # of the prompt, found in the prefix cache when it was first admitted
    output: RequestOutput = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.output = RequestOutput(self)
        self.prompt_token_ids = tuple(self.prompt_token_ids)

    def check(self) -> None:
        """Raise RequestError for a number that is none, and for a prompt that is empty or has something else than token ids."""
        number = self.request_id
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 2**63:
            raise RequestError(f"request_id must be a whole number from 0 to {2**63 - 1}, not {number!r}")
        if not self.prompt_token_ids:
            raise RequestError("the prompt is empty: give at least one token")
        for token in self.prompt_token_ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < 2**31:
                raise RequestError(f"prompt_token_ids must be whole numbers from 0 to {2**31 - 1}, not {token!r}")
        for token in self.params.stop_token_ids:
            if token >= 2**31:
                raise RequestError(f"stop_token_ids must be from 0 to {2**31 - 1}, not {token}")

    @property
    def num_prompt(self) -> int:
        """Tokens in the prompt."""
        return len(self.prompt_token_ids)

    @property
    def service_key(self) -> tuple[int, int]:
        """Smaller is served first; the priority counts under the priority policy only."""
        return (self.params.priority, self.arrival)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a sequence."""
        eos = () if self.params.ignore_eos else self.eos_token_ids
        return frozenset(eos) | frozenset(self.params.stop_token_ids) | self.stop_texts.keys()

    def logprob(self, token: int, value: float, rank: int) -> Logprob:
        """An entry of TokenLogprobs."""
        return Logprob(float(value), int(rank), None if self.token_text is None else self.token_text(token))

    @property
    def alive(self) -> list[Sequence]:
        """The sequences that have not ended."""
        return [s for s in self.sequences if not s.finished]

    @property
    def to_fork(self) -> list[Sequence]:
        """Those of them that are to be forked again from another, after a recompute."""
        return [s for s in self.alive if s.forks_from is not None]

    @property
    def finished(self) -> bool:
        """Whether every sequence has ended, or the request was refused. One that still waits to be queued has no sequence yet."""
        return self.error is not None or (bool(self.sequences) and all(s.finished for s in self.sequences))


class CompletionOutput(NamedTuple):
    """One answer as it was when it was asked for; it never changes. finish_reason: stop, length, abort, error, or "" while it grows.
    stop_reason: the stop string or the token of stop_token_ids that ended it; None for any other end.
    """

    index: int  # type: ignore[assignment]  # the field's usual name, though tuples have a method of it
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None  # None where no log-probabilities were asked for
    logprobs: list[TokenLogprobs] | None
    finish_reason: str
    stop_reason: int | str | None = None


class RequestOutput:
    """A live view of a request: reads what stands there when it is asked. While the request grows it is for the thread that steps alone,
    since reading text makes it; others read a snapshot.
    """

    __slots__ = ("request",)

    def __init__(self, request: Request) -> None:
        self.request = request

    @property
    def request_id(self) -> int:
        """The number that submit returned."""
        return self.request.request_id

    @property
    def prompt(self) -> str | None:
        """The prompt's text, where it came as text."""
        return self.request.prompt

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        """The prompt as the model reads it."""
        return self.request.prompt_token_ids

    @property
    def prompt_logprobs(self) -> list[TokenLogprobs | None] | None:
        """Entry i: the log-probability of prompt token i given those before it; None for the first."""
        return None if self.request.params.prompt_logprobs is None else list(self.request.prompt_logprobs)

    @property
    def num_cached_tokens(self) -> int | None:
        """Tokens of the prompt that the prefix cache had when it was first admitted; None while it waits."""
        return self.request.num_cached_tokens

    @property
    def error(self) -> str | None:
        """Why this request was refused, or why no token could be drawn for it; None for any other."""
        return self.request.error

    @property
    def finished(self) -> bool:
        """Whether every answer is complete."""
        return self.request.finished

    @property
    def outputs(self) -> list[CompletionOutput]:
        """The answers: the n samples in order, or the n best of best_of or of the beams, best first."""
        request, params = self.request, self.request.params
        chosen: Seq[Sequence] = [s for s in request.sequences if s.finish_reason != "pruned"]
        if params.beam_width is not None:
            chosen = sorted(chosen, key=lambda s: -beam_score(s))[: params.n]
        elif params.best_of is not None and params.best_of > params.n:
            chosen = sorted(chosen, key=lambda s: -s.cumulative_logprob)[: params.n]
        logged = params.logprobs is not None
        scored = logged or params.best_of is not None or params.beam_width is not None
        return [
            CompletionOutput(
                index=i,
                text=s.text,
                token_ids=s.output_token_ids,
                cumulative_logprob=s.cumulative_logprob if scored else None,
                logprobs=list(s.logprobs) if logged else None,
                finish_reason=s.finish_reason,
                stop_reason=s.stop_reason,
            )
            for i, s in enumerate(chosen)
        ]

    def snapshot(self) -> RequestOutput:
        """The output as it stands now: it never changes, and any thread may read it."""
        return _Snapshot(self)

    def __repr__(self) -> str:
        return f"RequestOutput(request_id={self.request_id}, finished={self.finished}, outputs={self.outputs})"


class _Snapshot(RequestOutput):
    """What an output was at one time."""

    __slots__ = ("_error", "_finished", "_outputs", "_prompt_logprobs")

    def __init__(self, live: RequestOutput) -> None:
        super().__init__(live.request)
        self._finished, self._error = live.finished, live.error
        self._outputs, self._prompt_logprobs = live.outputs, live.prompt_logprobs

    @property
    def prompt_logprobs(self) -> list[TokenLogprobs | None] | None:
        return self._prompt_logprobs

    @property
    def error(self) -> str | None:
        return self._error

    @property
    def finished(self) -> bool:
        return self._finished

    @property
    def outputs(self) -> list[CompletionOutput]:
        return self._outputs

    def snapshot(self) -> RequestOutput:
        return self


def beam_score(sequence: Sequence) -> float:
    """Cumulative log-probability over length ** length_penalty (Wu et al. 2016, as transformers computes it)."""
    return sequence.cumulative_logprob / float(max(1, sequence.num_output) ** sequence.request.params.length_penalty)
