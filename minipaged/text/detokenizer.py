"""The text of every sequence beside its tokens, made when somebody reads it, and whether a stop string has ended it.

The Detokenizer keeps one TextStream a sequence, which holds bytes back until they are whole characters, and ends the text before a stop
string.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from minipaged.errors import RequestError


class TextCodec(Protocol):
    """Text to tokens and back."""

    @property
    def vocab_size(self) -> int:
        """Tokens that exist."""
        ...

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """The tokens of a prompt, or of a bare text without what the model wants around it."""
        ...

    def fewest_tokens(self, text: str) -> int:
        """A number that the tokens of `text` reach at least, found at once; 0 where nothing is known."""
        ...

    def token_bytes(self, token: int, *, skip_special: bool = True) -> bytes:
        """The exact bytes of one token; b"" for a special token, unless those are wanted."""
        ...


class TextSource(Protocol):
    """What is read of a sequence to make its text."""

    request: Any  # with `params`
    text_state: Any  # the stream is kept here

    @property
    def finished(self) -> bool:
        """Whether no more tokens come."""
        ...

    def text_token_ids(self, start: int) -> list[int]:
        """The drawn tokens that are text, from number `start` on."""
        ...


class Detokenizer:
    """One text stream a sequence, fed when somebody reads the text; where a stop string may end it, after every token."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec

    def read(self, sequence: TextSource) -> TextStream:
        """The sequence's text, up to its newest token."""
        stream = sequence.text_state
        if not isinstance(stream, TextStream):
            params = sequence.request.params
            token_bytes = self._codec.token_bytes
            stream = sequence.text_state = TextStream(
                token_bytes if params.skip_special_tokens else partial(token_bytes, skip_special=False),
                params.stop,
                min_tokens=params.min_tokens,
                keep_stop=params.include_stop_str_in_output,
            )
        tokens = sequence.text_token_ids(stream.consumed)
        if tokens:
            stream.feed(tokens)
        if sequence.finished:
            stream.finish()
        return stream

    def token_text(self, token: int) -> str:
        """What one token reads by itself, special ones too; bytes that make no character become U+FFFD."""
        return self._codec.token_bytes(token, skip_special=False).decode("utf-8", errors="replace")

    def special_tokens(self, texts: tuple[str, ...]) -> dict[int, str]:
        """Those of the texts that are a special token of the model, by its id: no text of an answer ever has them."""
        found: dict[int, str] = {}
        for text in texts:
            spelled = text.encode()
            for token in self._encode(text):
                if self._codec.token_bytes(token, skip_special=False) == spelled and not self._codec.token_bytes(token):
                    found[token] = text
        return found

    def word_tokens(self, words: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        """Each word as tokens, and as those that it has behind a space where they are as many, and others (vLLM's rule for bad words)."""
        found: list[tuple[int, ...]] = []
        for word in words:
            bare, spaced = (tuple(self._encode(space + word.lstrip())) for space in ("", " "))
            found.append(bare)
            if len(spaced) == len(bare) and spaced[:1] != bare[:1]:
                found.append(spaced)
        return tuple(word for word in found if word)

    def _encode(self, text: str) -> list[int]:
        """The tokens of a bare text; none where there is no tokenizer but for ids."""
        try:
            return self._codec.encode(text, add_special=False)
        except RequestError:
            return []

    def stopped(self, sequence: TextSource) -> bool:
        """Whether a stop string stands in the text."""
        return self.read(sequence).stopped


class TextStream:
    """The text of one sequence.

    token_bytes: the exact bytes of one token; stop: strings that end the text; min_tokens: a stop string counts once it ends in the text of
    a later token than that; keep_stop: the text ends behind the stop string, not before it. While a stop string may still be arriving, the
    part of it that has arrived is held back from `stable`.
    """

    def __init__(
        self,
        token_bytes: Callable[[int], bytes],
        stop: tuple[str, ...] = (),
        *,
        min_tokens: int = 0,
        keep_stop: bool = False,
    ) -> None:
        self._token_bytes = token_bytes
        self._stop = stop
        self._min_tokens = min_tokens
        self._keep_stop = keep_stop
        self._pending = b""
        self.text = ""
        self.stable = 0  # characters of `text` that no stop string can take back
        self.stopped_by: str | None = None  # the stop string that has ended the text
        self.consumed = 0  # tokens read

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self.stopped_by is not None

    @property
    def whole(self) -> bool:
        """Whether all that was read is text: no part of a character is held back."""
        return not self._pending

    def feed(self, tokens: list[int]) -> None:
        """Read more tokens."""
        if self.stopped:
            return
        early = max(0, min(self._min_tokens - self.consumed, len(tokens)))
        self.consumed += len(tokens)
        if early:
            self._read(tokens[:early])
        searched = len(self.text)
        if early < len(tokens):
            self._read(tokens[early:] if early else tokens)
            if self._stop:
                self._find_stop(searched)
        self.stable = len(self.text) - (self._held_back() if self._stop and not self.stopped else 0)

    def _read(self, tokens: list[int]) -> None:
        """The whole characters of more tokens become text."""
        self._pending += b"".join(map(self._token_bytes, tokens))
        if self._pending.isascii():  # each byte is a character
            self.text += self._pending.decode("ascii")
            self._pending = b""
            return
        whole = _whole_characters(self._pending)
        self.text += self._pending[:whole].decode("utf-8", errors="replace")
        self._pending = self._pending[whole:]

    def finish(self) -> None:
        """No more tokens: what was held back is text now."""
        if not self.stopped:
            self.text += self._pending.decode("utf-8", errors="replace")
            self._pending = b""
        self.stable = len(self.text)

    def _find_stop(self, searched: int) -> None:
        """End the text before the first stop string that ends past its first `searched` characters."""
        places = [(self.text.find(stop, max(0, searched - len(stop) + 1)), stop) for stop in self._stop]
        found, stop = min((place for place in places if place[0] >= 0), key=lambda place: place[0], default=(-1, ""))
        if found >= 0:
            self.text = self.text[: found + len(stop) if self._keep_stop else found]
            self.stopped_by = stop

    def _held_back(self) -> int:
        """Length of the longest end of the text that could begin a stop string, and would be taken back with it."""
        if self._keep_stop:
            return 0
        longest = 0
        for stop in self._stop:
            for n in range(min(len(stop) - 1, len(self.text)), longest, -1):
                if self.text.endswith(stop[:n]):
                    longest = n
                    break
        return longest


def _whole_characters(data: bytes) -> int:
    """Leading bytes of `data` up to a last UTF-8 character that may still be growing."""
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if byte & 0b1100_0000 == 0b1100_0000:  # a first byte: how long will it be?
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) - back if length > back and byte < 0xF8 else len(data)
        if byte < 0x80:
            break
    return len(data)
