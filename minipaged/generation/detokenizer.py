"""Keeps the text of every sequence beside its tokens, and ends those that reached a stop string."""

from __future__ import annotations

from typing import Protocol

from minipaged.generation.text import TextStream
from minipaged.scheduling.request import RequestOutput, Sequence, Status
from minipaged.scheduling.scheduler import Scheduler


class TextCodec(Protocol):
    """Text to tokens and back."""

    @property
    def vocab_size(self) -> int:
        """Tokens that exist."""
        ...

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """The exact bytes of one token; b"" for a special token."""
        ...


class Detokenizer:
    """One text stream a sequence, fed with what was drawn since the last step."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._streams: dict[int, dict[int, TextStream]] = {}  # request -> sequence -> stream

    def update(self, outputs: list[RequestOutput], scheduler: Scheduler) -> None:
        """Bring the text of these requests up to their tokens; a stop string ends its sequence."""
        for output in outputs:
            request = output.request
            streams = self._streams.setdefault(request.request_id, {})
            for sequence in request.sequences:
                stream = streams.get(sequence.seq_id)
                if stream is None:
                    params = request.params
                    stream = TextStream(self._codec.token_bytes, params.stop, min_tokens=params.min_tokens)
                    streams[sequence.seq_id] = stream
                self._advance(sequence, stream, scheduler)
            if request.finished:
                del self._streams[request.request_id]

    @staticmethod
    def _advance(sequence: Sequence, stream: TextStream, scheduler: Scheduler) -> None:
        request = sequence.request
        tokens = sequence.token_ids[request.num_prompt + stream.consumed :]
        ended = sequence.status is Status.FINISHED
        if ended and sequence.finish_reason == "stop" and tokens and tokens[-1] in request.stop_ids:
            tokens = tokens[:-1]  # the token that ended it is no text
        if tokens:
            stream.feed(tokens)
        if stream.stopped and not ended:
            scheduler.finish(sequence, "stop")
        elif stream.stopped and sequence.finish_reason == "length":
            sequence.finish_reason = "stop"
        if sequence.status is Status.FINISHED:
            stream.finish()
        sequence.text = stream.text
        sequence.stable_text = stream.stable
