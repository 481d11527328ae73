"""The fields of a request: read, checked, and made into SamplingParams. Names and meanings are OpenAI's, further ones vLLM's.

A field that would change the text and is not honoured here is an error; any other unknown one is ignored, and named in a response header.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, TypeVar

import msgspec

from minipaged.config import SamplingParams
from minipaged.errors import InputError
from minipaged.serving.http.errors import ApiError, bad_request

MAX_STOPS = 16
MAX_STOP_LENGTH = 4096  # characters
MAX_TOP_LOGPROBS = 20
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's

# Taken and without effect on the text: who asks, what is kept, which tier serves.
ACCEPTED = frozenset(
    (
        *(
            "user",
            "metadata",
            "store",
            "service_tier",
            "safety_identifier",
            "prompt_cache_key",
            "prompt_cache_retention",
        ),
        *("parallel_tool_calls", "request_id", "return_tokens_as_token_ids", "kv_transfer_params"),
    )
)
# They would change the text, and nobody here honours them. A value that says "no" is accepted.
NOT_HONOURED = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "suffix": (None, ""),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "verbosity": (None,),
    "web_search_options": (None,),
    "thinking": (None,),
    "chat_template": (None,),
    "documents": (None, []),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "structured_outputs": (None,),
    "logits_processors": (None, []),
    "logit_processors": (None, []),
    "bad_words_ids": (None, []),
    "truncate_prompt_tokens": (None,),
    "mm_processor_kwargs": (None,),
    "typical_p": (None, 1),
    "mirostat": (None, 0),
}


class StreamOptions(msgspec.Struct):
    """What a stream says beside its text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class ResponseFormat(msgspec.Struct):
    """text, json_object or json_schema."""

    type: str
    json_schema: dict[str, Any] | None = None


class Common(msgspec.Struct, kw_only=True):
    """The fields of both completions. Null is absent."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    best_of: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    length_penalty: float | None = None
    early_stopping: bool | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: int | None = None
    priority: int | None = None
    cache_salt: str | None = None
    return_token_ids: bool | None = None
    use_beam_search: bool | None = None
    add_special_tokens: bool | None = None
    response_format: ResponseFormat | None = None


class ChatMessage(msgspec.Struct):
    """One message of a conversation."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[Any] | None = None
    tool_call_id: str | None = None


class ChatRequest(Common, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionRequest(Common, kw_only=True):
    """POST /v1/completions. prompt: text, token ids, or a list of either."""

    prompt: str | list[Any] | None = None
    logprobs: int | None = None
    echo: bool | None = None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /tokenize: a prompt, or messages as chat completions take them."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /detokenize."""

    tokens: list[int]
    model: str | None = None


# Fields that SamplingParams has under the same name, with the same meaning.
SAME = {f.name for f in dataclasses.fields(SamplingParams)}.intersection(Common.__struct_fields__) - {
    *("max_tokens", "stop", "logit_bias", "prompt_logprobs"),
}
Fields = TypeVar("Fields", bound=msgspec.Struct)


def read_json(body: bytes) -> dict[str, Any]:
    """The object that a body holds. A 400 if it is none: not JSON, too deep, a number that is none, half a surrogate pair."""
    try:
        data = msgspec.json.decode(body)
    except RecursionError:
        raise bad_request("the body is nested too deeply") from None
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise bad_request(f"the body is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise bad_request("the body must be a JSON object")
    return data


def read_fields(data: dict[str, Any], kind: type[Fields]) -> tuple[Fields, list[str]]:
    """The fields, and the names of those that are ignored. A 400 names the one that is wrong."""
    known = set(kind.__struct_fields__)
    ignored = []
    for name, value in data.items():
        if name in known:
            continue
        if name in NOT_HONOURED:
            if value not in NOT_HONOURED[name]:
                raise bad_request(f"{name} is not supported by this server", name, "unsupported_parameter")
        elif name not in ACCEPTED:
            ignored.append(name)
    try:
        return msgspec.convert(data, kind), ignored
    except RecursionError:
        raise bad_request("the body is nested too deeply") from None
    except msgspec.ValidationError as error:
        raise _plain_error(str(error)) from None


def _plain_error(text: str) -> ApiError:
    """msgspec's error with the field in front."""
    what, _, path = text.replace("`", "").partition(" - at ")
    path = path.removeprefix("$").removeprefix(".").replace("[...]", "")
    missing = re.search(r"required field (\w+)", what)
    param = path or (missing[1] if missing else "")
    return bad_request(f"{param}: {what[:1].lower()}{what[1:]}" if param else what, param or None)


def ignored_header(names: list[str]) -> dict[str, str]:
    """The header that names ignored fields; a name that no header could hold is left out."""
    plain = [name for name in names[:20] if re.fullmatch(r"[\w.-]{1,64}", name, re.ASCII)]
    return {"x-minipaged-ignored": ", ".join(plain)} if plain else {}


def sampling_params(
    fields: Common, *, logprobs: int | None, prompt_logprobs: int | None, most: int | None
) -> dict[str, Any]:
    """The SamplingParams of a request, those that differ from the defaults. A 400 names what is wrong. most: max_tokens; None: no limit."""
    stops = [fields.stop] if isinstance(fields.stop, str) else fields.stop or []
    if len(stops) > MAX_STOPS:
        raise bad_request(f"stop takes at most {MAX_STOPS} strings, not {len(stops)}", "stop")
    if any(len(stop) > MAX_STOP_LENGTH for stop in stops):
        raise bad_request(f"stop takes strings of at most {MAX_STOP_LENGTH} characters", "stop")
    stops = [stop for stop in stops if stop]
    params: dict[str, Any] = {"max_tokens": most, "stop": stops, "temperature": 1.0}
    params["logprobs"], params["prompt_logprobs"] = logprobs, prompt_logprobs
    for name in SAME:
        value = getattr(fields, name)
        if value is not None:
            params[name] = value
    if fields.logit_bias:
        params["logit_bias"] = list(fields.logit_bias.items())
    if fields.use_beam_search:
        params["beam_width"] = params.pop("best_of", None) or fields.n or 1
        if fields.temperature is None or fields.temperature == 0:
            params["temperature"] = 0.0
    try:
        checked = SamplingParams(**params)
    except (InputError, TypeError, OverflowError) as error:
        word = str(error).split(" ", 1)[0]
        raise bad_request(str(error), word if word in params else None) from None
    plain = SamplingParams()
    return {name: getattr(checked, name) for name in params if getattr(checked, name) != getattr(plain, name)}


def conversation(messages: list[ChatMessage]) -> list[dict[str, str]]:
    """Messages as chat templates read them. A 400 names the part that is no text."""
    if not messages:
        raise bad_request("messages must hold at least one message", "messages")
    found = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if message.tool_calls or message.role in ("tool", "function"):
            raise bad_request(f"{where}: tools are not supported by this server", where, "unsupported_parameter")
        role = "system" if message.role == "developer" else message.role
        found.append({"role": role, "content": text_of(message.content, f"{where}.content")})
    return found


def text_of(content: str | list[dict[str, Any]] | None, where: str) -> str:
    """The text of a content: text itself, nothing, or parts that are all text."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for i, part in enumerate(content):
        kind, text = part.get("type"), part.get("text")
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            at = f"{where}[{i}]"
            raise bad_request(f"{at}: a part of type {str(kind)[:40]!r} is not supported; only text is", at)
        texts.append(text)
    return "".join(texts)
