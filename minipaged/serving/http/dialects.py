"""Two other ways to ask for a chat: Anthropic's messages and OpenAI's responses. Text only, and nothing is remembered.

Both are translated: their body becomes that of a chat completion, and what the Job says becomes their documents and events.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from minipaged.serving.http import fields
from minipaged.serving.http.completions import Job
from minipaged.serving.http.errors import ApiError, bad_request
from minipaged.serving.http.mailbox import Growth

JSON = dict[str, Any]
Event = tuple[str, JSON]  # its name, and its data
ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
}
ANTHROPIC_TYPES |= {429: "rate_limit_error", 503: "overloaded_error"}


def ignored(data: JSON, translate: object) -> list[str]:
    """Fields of such a body that nobody reads."""
    kind = MessagesRequest if translate is chat_of_messages else ResponsesRequest
    return [name for name in data if name not in kind.__struct_fields__ and name not in fields.ACCEPTED]


class NamedEvents:
    """A writer of a job whose stream has events with names."""

    job: Job

    def begin(self) -> Iterator[Event]:
        """What a stream begins with."""
        raise NotImplementedError

    def grow(self, growth: Growth) -> Iterator[Event]:
        """What the answer gained."""
        raise NotImplementedError

    def end(self) -> Iterator[Event]:
        """The last words."""
        raise NotImplementedError

    def fail(self, error: ApiError) -> Event:
        """What a stream is told instead of its end."""
        raise NotImplementedError

    def opening(self) -> bytes:
        """The first bytes of a stream."""
        return b"".join(map(_named, self.begin()))

    def growth(self, index: int, growth: Growth) -> bytes:
        """What a choice gained: there is one."""
        return b"".join(map(_named, self.grow(growth)))

    def closing(self) -> bytes:
        """The last bytes."""
        return b"".join(map(_named, self.end()))

    def failure(self, error: ApiError) -> bytes:
        """The last bytes of a stream that is not finished."""
        return _named(self.fail(error))


def _named(event: Event) -> bytes:
    name, data = event
    return b"event: %s\ndata: %s\n\n" % (name.encode(), msgspec.json.encode({"type": name, **data}))


# ---- Anthropic


class MessagesRequest(msgspec.Struct, kw_only=True):
    """POST /v1/messages and /v1/messages/count_tokens."""

    messages: list[fields.ChatMessage]
    model: str | None = None
    max_tokens: int | None = None
    system: str | list[dict[str, Any]] | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None


def chat_of_messages(data: JSON, *, counting: bool = False) -> JSON:
    """The chat completion that a body of /v1/messages asks for."""
    if data.get("thinking") == {"type": "disabled"}:
        data = {**data, "thinking": None}
    asked, _ = fields.read_fields(data, MessagesRequest)
    if asked.max_tokens is None and not counting:
        raise bad_request("max_tokens is missing", "max_tokens")
    messages = [
        {"role": m.role, "content": fields.text_of(m.content, f"messages[{i}].content")}
        for i, m in enumerate(asked.messages)
    ]
    for i, message in enumerate(messages):
        if message["role"] not in ("user", "assistant"):
            raise bad_request(f"messages[{i}].role must be user or assistant", f"messages[{i}].role")
    if asked.system:
        messages.insert(0, {"role": "system", "content": fields.text_of(asked.system, "system")})
    chat: JSON = {"messages": messages, "model": asked.model, "max_tokens": asked.max_tokens, "stream": asked.stream}
    chat |= {"stop": asked.stop_sequences, "temperature": asked.temperature, "top_p": asked.top_p, "top_k": asked.top_k}
    if messages and messages[-1]["role"] == "assistant":  # the answer goes on where this one ends
        chat |= {"continue_final_message": True, "add_generation_prompt": False}
    return chat


class Messages(NamedEvents):
    """What a job says, as Anthropic has it."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def whole(self) -> JSON:
        """The message."""
        document = self.job.whole()
        choice = document["choices"][0]
        content = [{"type": "text", "text": choice["message"]["content"]}]
        return {**self._message(content), **self._stop(), "usage": self._usage()}

    def _message(self, content: list[JSON]) -> JSON:
        return {
            "id": f"msg_{self.job.id[9:]}",
            "type": "message",
            "role": "assistant",
            "model": self.job.model,
            "content": content,
        }

    def _stop(self) -> JSON:
        answer = self.job.answers[0]
        by_text = answer.finish == "stop" and isinstance(answer.stop_reason, str)
        reason = "max_tokens" if answer.finish == "length" else "stop_sequence" if by_text else "end_turn"
        return {"stop_reason": reason, "stop_sequence": answer.stop_reason if by_text else None}

    def _usage(self) -> JSON:
        usage = self.job.usage()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"] - cached,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": usage["completion_tokens"],
        }

    def begin(self) -> Iterator[Event]:
        """What a stream begins with."""
        message = {**self._message([]), "stop_reason": None, "stop_sequence": None, "usage": self._usage()}
        yield "message_start", {"message": message}
        yield "content_block_start", {"index": 0, "content_block": {"type": "text", "text": ""}}

    def grow(self, growth: Growth) -> Iterator[Event]:
        """What the answer gained."""
        if growth.text:
            yield "content_block_delta", {"index": 0, "delta": {"type": "text_delta", "text": growth.text}}

    def end(self) -> Iterator[Event]:
        """The last words."""
        yield "content_block_stop", {"index": 0}
        yield "message_delta", {"delta": self._stop(), "usage": self._usage()}
        yield "message_stop", {}

    @staticmethod
    def error(error: ApiError) -> JSON:
        """An error's body."""
        kind = ANTHROPIC_TYPES.get(error.status, "api_error")
        return {"type": "error", "error": {"type": kind, "message": error.message}}

    def fail(self, error: ApiError) -> Event:
        """What a stream is told instead of its end."""
        return "error", {"error": self.error(error)["error"]}


# ---- responses


class ResponsesRequest(msgspec.Struct, kw_only=True):
    """POST /v1/responses, as far as it needs no memory."""

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    truncation: str | None = None
    include: list[str] | None = None


def chat_of_response(data: JSON) -> JSON:
    """The chat completion that a body of /v1/responses asks for."""
    asked, _ = fields.read_fields(data, ResponsesRequest)
    for name in ("previous_response_id", "conversation", "background"):
        if getattr(asked, name):
            raise bad_request(f"{name} is not supported: this server keeps nothing", name, "unsupported_parameter")
    if asked.reasoning and any(value is not None for value in asked.reasoning.values()):
        raise bad_request("reasoning is not supported by this server", "reasoning", "unsupported_parameter")
    form = (asked.text or {}).get("format")
    if isinstance(form, dict) and form.get("type") == "json_schema":
        form = {"type": "json_schema", "json_schema": form}
    messages: list[JSON] = [{"role": "system", "content": asked.instructions}] if asked.instructions else []
    if isinstance(asked.input, str):
        messages.append({"role": "user", "content": asked.input})
    else:
        for i, item in enumerate(asked.input):
            if item.get("type", "message") != "message":
                raise bad_request(
                    f"input[{i}]: an item of type {str(item['type'])[:40]!r} is not supported", f"input[{i}]"
                )
            messages.append({"role": item.get("role"), "content": item.get("content")})
    chat: JSON = {
        "messages": messages,
        "model": asked.model,
        "max_tokens": asked.max_output_tokens,
        "stream": asked.stream,
    }
    return {**chat, "temperature": asked.temperature, "top_p": asked.top_p, "response_format": form}


class Response(NamedEvents):
    """What a job says, as /v1/responses has it."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.id, self._item = f"resp_{job.id[9:]}", f"msg_{job.id[9:]}"
        self._text = ""
        self._number = -1

    def whole(self) -> JSON:
        """The response."""
        self._text = self.job.whole()["choices"][0]["message"]["content"]
        return self._document(self._status(), [self._message(self._status())], usage=True)

    def _status(self) -> str:
        return "incomplete" if self.job.answers[0].finish == "length" else "completed"

    def _part(self) -> JSON:
        return {"type": "output_text", "text": self._text, "annotations": [], "logprobs": []}

    def _message(self, status: str) -> JSON:
        content = [self._part()] if status != "in_progress" else []
        return {"id": self._item, "type": "message", "role": "assistant", "status": status, "content": content}

    def _document(self, status: str, output: list[JSON], *, usage: bool = False) -> JSON:
        document: JSON = {"id": self.id, "object": "response", "created_at": self.job.created, "status": status}
        document |= {"model": self.job.model, "output": output, "error": None, "instructions": None, "metadata": {}}
        document["incomplete_details"] = {"reason": "max_output_tokens"} if status == "incomplete" else None
        document |= {"parallel_tool_calls": False, "tool_choice": "none", "tools": [], "store": False}
        document |= {"temperature": None, "top_p": None, "previous_response_id": None, "usage": None}
        if usage:
            counts = self.job.usage()
            document["usage"] = {
                "input_tokens": counts["prompt_tokens"],
                "input_tokens_details": counts["prompt_tokens_details"],
                "output_tokens": counts["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": counts["total_tokens"],
            }
        return document

    def _event(self, name: str, **data: Any) -> Event:
        self._number += 1
        return name, {"sequence_number": self._number, **data}

    def begin(self) -> Iterator[Event]:
        """What a stream begins with."""
        yield self._event("response.created", response=self._document("in_progress", []))
        yield self._event("response.in_progress", response=self._document("in_progress", []))
        yield self._event("response.output_item.added", output_index=0, item=self._message("in_progress"))
        yield self._event("response.content_part.added", **self._place(), part=self._part())

    def _place(self) -> JSON:
        return {"item_id": self._item, "output_index": 0, "content_index": 0}

    def grow(self, growth: Growth) -> Iterator[Event]:
        """What the answer gained."""
        if growth.text:
            self._text += growth.text
            yield self._event("response.output_text.delta", **self._place(), delta=growth.text, logprobs=[])

    def end(self) -> Iterator[Event]:
        """The last words."""
        status = self._status()
        yield self._event("response.output_text.done", **self._place(), text=self._text, logprobs=[])
        yield self._event("response.content_part.done", **self._place(), part=self._part())
        yield self._event("response.output_item.done", output_index=0, item=self._message(status))
        yield self._event(f"response.{status}", response=self._document(status, [self._message(status)], usage=True))

    @staticmethod
    def error(error: ApiError) -> JSON:
        """An error's body."""
        return error.body

    def fail(self, error: ApiError) -> Event:
        """What a stream is told instead of its end."""
        return self._event("error", code=str(error.code or error.status), message=error.message, param=error.param)
