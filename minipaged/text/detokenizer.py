"""Keeps the text of every sequence beside its tokens, and ends those that reached a stop string."""

from __future__ import annotations

from typing import Protocol

from minipaged.scheduling.request import RequestOutput, Sequence, Status
from minipaged.scheduling.scheduler import Scheduler
from minipaged.text.growing import TextStream


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
    """One text stream a sequence, fed when somebody reads the text; where a stop string may end it, after every step."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec

    def read(self, sequence: Sequence) -> TextStream:
        """The sequence's text, up to its newest token."""
        request, stream = sequence.request, sequence.text_state
        if not isinstance(stream, TextStream):
            stream = TextStream(self._codec.token_bytes, request.params.stop, min_tokens=request.params.min_tokens)
            sequence.text_state = stream
        tokens = sequence.token_ids[request.num_prompt + stream.consumed :]
        ended = sequence.status is Status.FINISHED
        if ended and sequence.finish_reason == "stop" and tokens and tokens[-1] in request.stop_ids:
            tokens = tokens[:-1]  # the token that ended it is no text
        if tokens:
            stream.feed(tokens)
        if ended:
            stream.finish()
        return stream

    def look_for_stops(self, outputs: list[RequestOutput], scheduler: Scheduler) -> None:
        """End the sequences of these requests whose text has reached a stop string."""
        for output in outputs:
            if not output.request.params.stop:
                continue
            for sequence in output.request.sequences:
                if self.read(sequence).stopped:
                    if sequence.status is not Status.FINISHED:
                        scheduler.finish(sequence, "stop")
                        self.read(sequence)
                    elif sequence.finish_reason == "length":
                        sequence.finish_reason = "stop"
