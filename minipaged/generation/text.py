"""Text that grows token by token: bytes are held back until they are whole characters, and a stop string ends the text before itself."""

from __future__ import annotations

from collections.abc import Callable


class TextStream:
    """The text of one sequence.

    token_bytes: the exact bytes of one token; stop: strings that end the text. While a stop string may still be arriving, the part of it
    that has arrived is held back from `stable`.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], stop: tuple[str, ...] = ()) -> None:
        self._token_bytes = token_bytes
        self._stop = stop
        self._pending = b""
        self.text = ""
        self.stable = 0  # characters of `text` that no stop string can take back
        self.stopped = False
        self.consumed = 0  # tokens read

    def feed(self, tokens: list[int]) -> None:
        """Read more tokens."""
        if self.stopped:
            return
        self.consumed += len(tokens)
        self._pending += b"".join(self._token_bytes(token) for token in tokens)
        whole = _whole_characters(self._pending)
        searched_from = max(0, len(self.text) - max(map(len, self._stop), default=1) + 1)
        self.text += self._pending[:whole].decode("utf-8", errors="replace")
        self._pending = self._pending[whole:]
        self._find_stop(searched_from)
        self.stable = len(self.text) - (0 if self.stopped else self._held_back())

    def finish(self) -> None:
        """No more tokens: what was held back is text now."""
        if not self.stopped:
            self.text += self._pending.decode("utf-8", errors="replace")
            self._pending = b""
        self.stable = len(self.text)

    def fork(self) -> TextStream:
        """The same text, to grow another way."""
        twin = TextStream(self._token_bytes, self._stop)
        twin._pending, twin.text, twin.stable = self._pending, self.text, self.stable
        twin.stopped, twin.consumed = self.stopped, self.consumed
        return twin

    def _find_stop(self, start: int) -> None:
        places = [(self.text.find(s, start), s) for s in self._stop]
        found = min((place for place, _ in places if place >= 0), default=-1)
        if found >= 0:
            self.text = self.text[:found]
            self.stopped = True

    def _held_back(self) -> int:
        """Length of the longest end of the text that could begin a stop string."""
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
