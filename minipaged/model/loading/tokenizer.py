"""Text <-> token ids, for any model.

Here: what every tokenizer does, plain bytes for models without one, and ids alone. Those read from files: subword_tokenizer.py.
`token_bytes` gives each token's exact bytes, so that a text stream can wait until a character is whole.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from minipaged.errors import ModelError, RequestError

if TYPE_CHECKING:
    from minipaged.model.loading.chat_template import ChatTemplate, Message


class Tokenizer(ABC):
    """What an engine needs of a tokenizer."""

    vocab_size: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    chat_template: ChatTemplate | None = None

    @abstractmethod
    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of `text`.

        `add_special` adds what the model wants around a text (a BOS, if any); leave it out for a rendered chat, whose
        template has written it. `parse_special` reads "<|im_end|>" and the like in the text as the special tokens that
        they name; without it they are plain characters. RequestError if `text` is no text or is not valid Unicode.
        """

    def fewest_tokens(self, text: str) -> int:
        """A number that the tokens of `text` reach at least, found without making them; 0 where nothing is known."""
        return 0

    @abstractmethod
    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        """The exact bytes that one token stands for; none for a special token (unless wanted) or for an unused id."""

    def decode(self, token_ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `token_ids`; bytes that make no character become U+FFFD."""
        joined = b"".join(self.token_bytes(token, skip_special=skip_special) for token in token_ids)
        return joined.decode("utf-8", errors="replace")

    def chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        values: Mapping[str, Any] | None = None,
    ) -> str:
        """Messages ({"role": ..., "content": ...}) as the text this model was trained to continue; encode it with
        `add_special=False`. values: further variables for the template. ModelError if the model has no chat template,
        RequestError if it refuses the messages."""
        if self.chat_template is None:
            raise ModelError("this model has no chat template; give it plain text (--raw), or choose an instruct model")
        return self.chat_template.render(messages, add_generation_prompt=add_generation_prompt, values=values)


class IdTokenizer(Tokenizer):
    """Stands in for a tokenizer that is not there: prompts must be token ids, and each token is shown as its number."""

    def __init__(self, vocab_size: int, why: str, eos_token_ids: Sequence[int] = ()) -> None:
        self.vocab_size, self._why = vocab_size, why
        self.eos_token_ids = tuple(eos_token_ids)
        self.bos_token_id = None

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        check_text(text)
        raise RequestError(f"{self._why}; give the prompt as token ids")

    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        return f"<{token_id}>".encode() if 0 <= token_id < self.vocab_size else b""


class ByteTokenizer(Tokenizer):
    """Each byte is its own token, then an end; ids beyond (of models drawn at random) are shown as their number."""

    def __init__(self, vocab_size: int = 257) -> None:
        if vocab_size < 257:
            raise ModelError(f"a byte tokenizer needs a vocabulary of at least 257, not {vocab_size}")
        self.vocab_size = vocab_size
        self.eos_token_ids = (256,)
        self.bos_token_id = None

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        check_text(text)
        return list(text.encode("utf-8"))

    def fewest_tokens(self, text: str) -> int:
        return len(text)

    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        if 0 <= token_id < 256:
            return bytes((token_id,))
        if token_id == 256:
            return b"" if skip_special else b"<end>"
        return f"<{token_id}>".encode() if 256 < token_id < self.vocab_size else b""


def check_text(text: object) -> None:
    """Raise RequestError unless `text` is a string that UTF-8 can write (no half of a surrogate pair)."""
    if not isinstance(text, str):
        raise RequestError(f"a prompt must be text, not {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(f"the prompt is not valid Unicode: a lone surrogate at character {error.start}") from None
