"""Chat and plain completions: from a request's fields to prompts, and from what answers gain to the JSON that clients read.

1) `prepare` makes a Job of a body: prompts as token ids, sampling parameters, limits checked.
2) The app asks the engine for each prompt and hands over what comes.
3) The Job writes chunks for a stream, or one document at the end.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar
from uuid import uuid4

import msgspec

from minipaged.config import NO_LIMIT
from minipaged.errors import InputError
from minipaged.scheduling.validation import Room
from minipaged.serving.http import fields
from minipaged.serving.http.asgi import DONE, event
from minipaged.serving.http.errors import ApiError, bad_request
from minipaged.serving.http.mailbox import Entry, Growth, Ticket
from minipaged.text.grammar import ANY_OBJECT

MOST_LOGPROBS = 1 << 20  # that an answer lists, of its prompt or of itself: a document of some 100 MB
LONG_TEXT = 4096  # characters: longer prompts are tokenized in a thread, so that streams go on meanwhile
Result = TypeVar("Result")
JSON = dict[str, Any]


class Codec(Protocol):
    """The model's tokenizer."""

    vocab_size: int
    chat_template: Any

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Text to tokens."""
        ...

    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        """The bytes of one token."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Tokens to text."""
        ...

    def chat(self, messages: Any, add_generation_prompt: bool = True, *, values: Any = None) -> str:
        """The text that a template makes of a conversation."""
        ...


@dataclass(slots=True)
class Prompt:
    """One prompt of a request, and the ticket that it is asked under."""

    tokens: list[int]
    text: str | None
    ticket: Ticket | None = None


@dataclass(slots=True)
class Answer:
    """What was written of one answer."""

    text: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Entry] = field(default_factory=list)
    num_tokens: int = 0
    offset: int = 0  # characters of the tokens whose log-probabilities were written
    finish: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class Job:
    """One request for completions."""

    chat: bool
    model: str
    prompts: list[Prompt]
    params: JSON
    codec: Codec
    n: int = 1
    width: int = 1  # sequences that each prompt runs at once
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    logprobs: int | None = None  # how many of the likeliest tokens stand beside each; None: no log-probabilities
    echo: bool = False
    no_answer: bool = False  # max_tokens 0: the prompt is scored, and nothing is added
    prompt_logprobs: bool = False
    return_token_ids: bool = False
    ignored: list[str] = field(default_factory=list)
    id: str = ""
    created: int = 0
    answers: dict[int, Answer] = field(default_factory=dict)

    def open(self) -> None:
        """It is complete: it gets its name, and an empty answer for each choice."""
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid4().hex}"
        self.created = int(time.time())
        self.answers = {i: Answer() for i in range(len(self.prompts) * self.n)}

    # ---- what comes

    def take(self) -> list[tuple[int, Growth]]:
        """What the answers gained since the last call, by choice."""
        found = []
        for i, prompt in enumerate(self.prompts):
            if prompt.ticket is not None and prompt.ticket.growth:
                for index, growth in prompt.ticket.take().items():
                    answer = self.answers[i * self.n + index]
                    answer.num_tokens += len(growth.tokens)
                    if growth.finish:
                        answer.finish, answer.stop_reason = growth.finish, growth.stop_reason
                    found.append((i * self.n + index, growth))
        return found

    @property
    def ended(self) -> bool:
        """Whether nothing more comes."""
        return all(prompt.ticket is not None and prompt.ticket.ended for prompt in self.prompts)

    def failure(self) -> ApiError | None:
        """Why an answer will not be finished, if one will not."""
        for prompt in self.prompts:
            ticket = prompt.ticket
            if ticket is not None and ticket.refused is not None:
                return bad_request(ticket.refused)
            if ticket is not None and ticket.ended and (ticket.error is not None or ticket.finish == "error"):
                return ApiError(ticket.status, ticket.error or "the engine's step failed", code="engine_error")
        return None

    # ---- one document

    def whole(self) -> JSON:
        """The document of a finished request."""
        for index, growth in self.take():
            answer = self.answers[index]
            answer.text.append(growth.text)
            answer.tokens += growth.tokens
            answer.logprobs += growth.logprobs
        return {
            **self._head("chat.completion" if self.chat else "text_completion"),
            "choices": [self._choice(index, answer) for index, answer in self.answers.items()],
            "usage": self.usage(),
            **self._prompt_extras(),
        }

    def _prompt_extras(self) -> JSON:
        """What chat completions say of their one prompt, outside the choices."""
        if not self.chat:
            return {}
        extras: JSON = {"prompt_logprobs": self._prompt_entries(self.prompts[0])} if self.prompt_logprobs else {}
        if self.return_token_ids:
            extras["prompt_token_ids"] = self.prompts[0].tokens
        return extras

    def _choice(self, index: int, answer: Answer) -> JSON:
        prompt = self.prompts[index // self.n]
        text = "" if self.no_answer else "".join(answer.text)
        tokens, entries = ([], []) if self.no_answer else (answer.tokens, answer.logprobs)
        finish = _finish(answer.finish)
        choice: JSON = {"index": index, "finish_reason": finish, "stop_reason": answer.stop_reason}
        if self.chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
            choice["logprobs"] = None if self.logprobs is None else self._chat_logprobs(tokens, entries)
        else:
            choice["text"] = (self.prompt_text(prompt) if self.echo else "") + text
            choice["logprobs"] = self._text_logprobs(answer, prompt, tokens, entries)
            if self.prompt_logprobs:
                choice["prompt_logprobs"] = self._prompt_entries(prompt)
        if self.return_token_ids:
            choice["token_ids"] = tokens
            if not self.chat:
                choice["prompt_token_ids"] = prompt.tokens
        return choice

    def usage(self) -> JSON:
        """Tokens of all prompts, and all that was drawn, ends and losing samples included."""
        tickets = [prompt.ticket for prompt in self.prompts if prompt.ticket is not None]
        read = sum(len(prompt.tokens) for prompt in self.prompts)
        drawn = sum(ticket.drawn for ticket in tickets)
        if not self.ended:  # so far
            drawn = sum(answer.num_tokens for answer in self.answers.values())
        drawn = 0 if self.no_answer else drawn
        cached = sum(ticket.cached for ticket in tickets)
        return {
            "prompt_tokens": read,
            "completion_tokens": drawn,
            "total_tokens": read + drawn,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    # ---- a stream

    def first_chunks(self) -> list[JSON]:
        """What a stream begins with: who speaks, or the prompt where it is echoed."""
        if self.chat:
            start = {"role": "assistant", "content": ""}
            return [
                self._chunk({"index": i, "delta": start, "logprobs": None, "finish_reason": None}) for i in self.answers
            ]
        return []

    def echo_chunk(self, index: int) -> JSON:
        """The prompt of a choice, once its log-probabilities are there."""
        prompt, answer = self.prompts[index // self.n], self.answers[index]
        choice: JSON = {"index": index, "text": self.prompt_text(prompt), "finish_reason": None}
        choice["logprobs"] = self._text_logprobs(answer, prompt, [], [])
        return self._chunk(choice)

    def chunk(self, index: int, growth: Growth) -> JSON | None:
        """What a choice gained; None where nothing of it can be told yet. The one that ends it names the reason."""
        answer = self.answers[index]
        text = "" if self.no_answer else growth.text
        tells = text or growth.finish or ((growth.logprobs or self.return_token_ids) and growth.tokens)
        if not tells:
            return None
        tokens, entries = ([], []) if self.no_answer else (growth.tokens, growth.logprobs)
        choice: JSON = {"index": index, "finish_reason": _finish(growth.finish or None)}
        if growth.finish:
            choice["stop_reason"] = growth.stop_reason
        if self.chat:
            choice["delta"] = {"content": text} if text else {}
            choice["logprobs"] = None if self.logprobs is None else self._chat_logprobs(tokens, entries)
        else:
            choice["text"] = text
            choice["logprobs"] = self._text_logprobs(answer, None, tokens, entries)
        if self.return_token_ids:
            choice["token_ids"] = tokens
        return self._chunk(choice)

    def last_chunk(self) -> JSON | None:
        """The usage, where it was asked for."""
        if not self.include_usage:
            return None
        return {**self._head(self._chunk_kind), "choices": [], "usage": self.usage()}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _head(self, kind: str) -> JSON:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, choice: JSON) -> JSON:
        chunk = {**self._head(self._chunk_kind), "choices": [choice]}
        if self.continuous_usage:
            chunk["usage"] = self.usage()
        elif self.include_usage:
            chunk["usage"] = None
        return chunk

    # ---- tokens and log-probabilities

    def prompt_text(self, prompt: Prompt) -> str:
        """The prompt as text, also where it came as token ids."""
        return prompt.text if prompt.text is not None else self.codec.decode(prompt.tokens, skip_special=False)

    def _token_text(self, token: float) -> str:
        return self.codec.token_bytes(int(token), skip_special=False).decode("utf-8", errors="replace")

    def _chat_logprobs(self, tokens: list[int], entries: list[Entry]) -> JSON:
        content = []
        for _token, entry in zip(tokens, entries, strict=True):
            ranked = sorted(entry, key=lambda e: (-e[1], e[2]))
            top = [self._chat_token(*e) for e in ranked] if self.logprobs else []
            content.append({**self._chat_token(*entry[0]), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _chat_token(self, token: float, logprob: float, rank: float) -> JSON:
        spelled = self.codec.token_bytes(int(token), skip_special=False)
        return {"token": spelled.decode("utf-8", errors="replace"), "logprob": logprob, "bytes": list(spelled)}

    def _text_logprobs(
        self, answer: Answer, prompt: Prompt | None, tokens: list[int], entries: list[Entry]
    ) -> JSON | None:
        """prompt: one whose tokens stand before the others', if it is echoed."""
        if self.logprobs is None:
            return None
        rows: list[tuple[int, Entry | None]] = list(zip(tokens, entries, strict=True))
        if self.echo and prompt is not None and prompt.ticket is not None:
            scored = prompt.ticket.prompt_logprobs or []
            rows = [*zip(prompt.tokens, scored, strict=True), *rows]
        found: JSON = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for token, entry in rows:
            text = self._token_text(token)
            found["text_offset"].append(answer.offset)
            found["tokens"].append(text)
            found["token_logprobs"].append(None if entry is None else entry[0][1])
            found["top_logprobs"].append(None if entry is None else self._top(entry))
            answer.offset += len(text)
        return found

    def _top(self, entry: Entry) -> dict[str, float]:
        """Texts and their log-probabilities, likeliest first; of tokens that read alike the likeliest counts."""
        top: dict[str, float] = {}
        for token, logprob, _ in sorted(entry, key=lambda e: (-e[1], e[2])):
            top.setdefault(self._token_text(token), logprob)
        return top

    def _prompt_entries(self, prompt: Prompt) -> list[JSON | None] | None:
        """vLLM's prompt_logprobs."""
        scored = prompt.ticket.prompt_logprobs if prompt.ticket is not None else None
        if scored is None:
            return None
        return [
            None if entry is None else {str(int(t)): self._vllm_entry(t, lp, r) for t, lp, r in entry}
            for entry in scored
        ]

    def _vllm_entry(self, token: float, logprob: float, rank: float) -> JSON:
        return {"logprob": logprob, "rank": int(rank), "decoded_token": self._token_text(token)}


def _finish(reason: str | None) -> str | None:
    return reason or None


class Chunks:
    """The writer that completions have: a document, or events without names and [DONE]."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._echoed: set[int] = set()

    def whole(self) -> JSON:
        """The document of a finished request."""
        return self._job.whole()

    def opening(self) -> bytes:
        """The first bytes of a stream."""
        return b"".join(map(event, self._job.first_chunks()))

    def growth(self, index: int, growth: Growth) -> bytes:
        """What a choice gained."""
        before = b""
        if self._job.echo and index not in self._echoed:
            self._echoed.add(index)
            before = event(self._job.echo_chunk(index))
        chunk = self._job.chunk(index, growth)
        return before if chunk is None else before + event(chunk)

    def closing(self) -> bytes:
        """The last bytes."""
        last = self._job.last_chunk()
        return (b"" if last is None else event(last)) + DONE

    @staticmethod
    def error(error: ApiError) -> JSON:
        """An error's body."""
        return error.body

    @staticmethod
    def failure(error: ApiError) -> bytes:
        """The last bytes of a stream that is not finished."""
        return event(error.body)


# ---- from a body to a job


async def off_loop(size: int, call: Callable[[], Result]) -> Result:
    """The call's result; it runs in a thread where so many characters are long work. A refusal of the tokenizer's is a 400."""
    try:
        if size < LONG_TEXT:
            return call()
        return await asyncio.get_running_loop().run_in_executor(None, call)
    except InputError as error:
        raise bad_request(str(error)) from None


async def prepare_chat(data: JSON, codec: Codec, room: Room, model: str) -> Job:
    """A job of the body of /v1/chat/completions. ApiError says what is wrong with it."""
    asked, ignored = fields.read_fields(data, fields.ChatRequest)
    top = asked.top_logprobs
    if top is not None and not 0 <= top <= fields.MAX_TOP_LOGPROBS:
        raise bad_request(f"top_logprobs must be from 0 to {fields.MAX_TOP_LOGPROBS}, not {top}", "top_logprobs")
    if top and not asked.logprobs:
        raise bad_request("top_logprobs needs logprobs to be true", "top_logprobs")
    logprobs = (top or 0) if asked.logprobs else None
    text, tokens = await chat_tokens(asked, codec)
    job = Job(chat=True, model=model, prompts=[Prompt(tokens, text)], params={}, codec=codec, logprobs=logprobs)
    most = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    _finish_job(job, asked, ignored, room, most)
    return job


async def chat_tokens(asked: fields.ChatRequest | fields.TokenizeRequest, codec: Codec) -> tuple[str, list[int]]:
    """The text that the model's template makes of the messages, and its tokens."""
    messages = fields.conversation(asked.messages or [])
    if codec.chat_template is None:
        raise bad_request("this model has no chat template: use /v1/completions", "messages")
    goes_on = bool(asked.continue_final_message)
    opens = not goes_on if asked.add_generation_prompt is None else asked.add_generation_prompt
    if goes_on and opens:
        raise bad_request(
            "continue_final_message and add_generation_prompt exclude each other", "continue_final_message"
        )

    def render() -> tuple[str, list[int]]:
        text = codec.chat(messages, opens, values=asked.chat_template_kwargs)
        if goes_on:  # what the template writes behind the last message's text is for a turn that is over
            last = messages[-1]["content"].strip()
            end = text.rfind(last) + len(last)
            if end < len(last):
                raise bad_request("the model's template changes the last message: it cannot be continued", "messages")
            text = text[:end]
        return text, codec.encode(text, add_special=bool(getattr(asked, "add_special_tokens", False)))

    return await off_loop(sum(len(message["content"]) for message in messages), render)


async def prepare_completion(data: JSON, codec: Codec, room: Room, model: str) -> Job:
    """A job of the body of /v1/completions. ApiError says what is wrong with it."""
    asked, ignored = fields.read_fields(data, fields.CompletionRequest)
    if asked.logprobs is not None and not 0 <= asked.logprobs <= 100:
        raise bad_request(f"logprobs must be from 0 to 100, not {asked.logprobs}", "logprobs")
    prompts = []
    special = asked.add_special_tokens is not False
    for given in _prompts(asked.prompt):
        if isinstance(given, str):
            text: str = given

            def encode(text: str = text) -> list[int]:
                return codec.encode(text, add_special=special)

            prompts.append(Prompt(await off_loop(len(text), encode), text))
        else:
            prompts.append(Prompt(given, None))
    echo = bool(asked.echo)
    job = Job(chat=False, model=model, prompts=prompts, params={}, codec=codec, logprobs=asked.logprobs, echo=echo)
    most = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    most = fields.DEFAULT_COMPLETION_TOKENS if most is None else most
    if most == 0 and echo:
        job.no_answer, most = True, 1
    absent = asked.max_tokens is None and asked.max_completion_tokens is None
    _finish_job(job, asked, ignored, room, most, cut=absent)
    return job


def _prompts(given: str | list[Any] | None) -> list[str | list[int]]:
    """Prompts as a list. A list of whole numbers is one prompt."""
    if given is None or given == []:
        raise bad_request("prompt must be text, token ids, or a list of either", "prompt")
    if isinstance(given, str):
        return [given]
    listed = [given] if all(_is_token(item) for item in given) else given
    most = 2**31 - 1  # beyond any vocabulary, and within what travels to the engine
    for item in listed:
        if isinstance(item, list) and any(_is_token(t) and not 0 <= t <= most for t in item):
            raise bad_request(f"prompt holds token ids outside 0 to {most}", "prompt")
        if not isinstance(item, str) and not (isinstance(item, list) and item and all(_is_token(t) for t in item)):
            raise bad_request("prompt must be text, token ids, or a list of either", "prompt")
    return listed


def _is_token(item: object) -> bool:
    return isinstance(item, int) and not isinstance(item, bool)


def _schema_of(asked: fields.ResponseFormat | None) -> str | None:
    """The JSON schema that answers must follow, as text; None for any text."""
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return ANY_OBJECT
    if asked.type != "json_schema":
        kind = asked.type[:40]
        raise bad_request(f"response_format {kind!r} is not supported", "response_format", "unsupported_parameter")
    schema = (asked.json_schema or {}).get("schema")
    if not isinstance(schema, dict):
        raise bad_request("response_format.json_schema.schema must be an object", "response_format")
    return msgspec.json.encode(schema).decode()


def _finish_job(
    job: Job, asked: fields.Common, ignored: list[str], room: Room, most: int | None, *, cut: bool = False
) -> None:
    """Parameters and limits. most: tokens of an answer, None for all that fit; cut: a limit that nobody gave may be lowered."""
    scored = asked.prompt_logprobs
    if job.echo and job.logprobs is not None:
        scored = max(job.logprobs, scored or 0)
    job.params = fields.sampling_params(asked, logprobs=job.logprobs, prompt_logprobs=scored, most=most)
    schema = _schema_of(asked.response_format)
    if schema is not None:
        job.params["json_schema"] = schema
    job.prompt_logprobs = asked.prompt_logprobs is not None
    job.n = job.params.get("n", 1)
    job.width = job.params.get("beam_width") or job.params.get("best_of") or job.n
    if job.prompt_logprobs and asked.stream:
        raise bad_request("prompt_logprobs cannot be streamed", "prompt_logprobs")
    for prompt in job.prompts:
        if not prompt.tokens:
            raise bad_request("the prompt is empty: give at least one token", "messages" if job.chat else "prompt")
        longest = room.most_tokens(len(prompt.tokens), job.width)
        if longest < 1:
            slots = "" if room.num_blocks is None else f" and the pool {(room.num_blocks - 1) * room.block_size}"
            fits_once = job.width > 1 and room.most_tokens(len(prompt.tokens), 1) >= 1
            each = f" of each of {job.width} answers" if fits_once else ""
            raise bad_request(
                f"the prompt has {len(prompt.tokens)} tokens; the context holds {room.context}{slots}, answers included{each}",
                "n" if fits_once else "messages" if job.chat else "prompt",
                "context_length_exceeded",
            )
        if most is not None and most > longest:
            if not cut:
                name = "max_completion_tokens" if asked.max_completion_tokens is not None else "max_tokens"
                raise bad_request(
                    f"{name} may be at most {longest} after a prompt of {len(prompt.tokens)} tokens, not {most}",
                    name,
                    "context_length_exceeded",
                )
            job.params["max_tokens"] = longest
        longest = longest if most is None else most
        for name, listed, tokens in (
            ("prompt_logprobs", scored, len(prompt.tokens)),
            ("logprobs", job.logprobs, longest),
        ):
            if listed is not None and (listed + 1) * tokens > MOST_LOGPROBS:
                raise bad_request(f"{name} {listed} of {tokens} tokens are too many: lower one of them", name)
    if most is None:
        job.params["max_tokens"] = NO_LIMIT
    options = asked.stream_options or fields.StreamOptions()
    job.stream = bool(asked.stream)
    job.continuous_usage = bool(options.continuous_usage_stats)
    job.include_usage = bool(options.include_usage)
    job.return_token_ids = bool(asked.return_token_ids)
    job.ignored = ignored
    job.open()
