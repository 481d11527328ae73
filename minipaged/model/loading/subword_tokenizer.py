"""Tokenizers of the `tokenizers` package: from a Hugging Face folder's tokenizer.json, or from the metadata of a GGUF file."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from minipaged.errors import ModelError
from minipaged.model.loading.chat_template import ChatTemplate
from minipaged.model.loading.gguf_tokenizer import build_tokenizer, special_token
from minipaged.model.loading.hf_config import read_json
from minipaged.model.loading.keys import TOKENIZER_KEYS, check_keys
from minipaged.model.loading.tokenizer import Tokenizer, check_text

LONG_TEXT = 4096  # characters: longer texts take milliseconds
SPACE = "▁"  # how SentencePiece writes a space
SPACES = "".join(char for char in map(chr, range(0x3001)) if char.isspace())  # the first ten are ASCII
LOG = logging.getLogger("minipaged")
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
SPECIAL_LISTS = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")


class SubwordTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` package."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        source: Path,
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | None = None,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        named = dict(special_tokens or {})
        self._made_of = (source, named, chat_template, tuple(eos_token_ids))
        self._backend = backend
        self._added = backend.get_added_tokens_decoder()
        self._spelling, self._drops_space = _spelling(backend, source)
        self._bytes: dict[int, bytes] = {}
        self._lock = threading.Lock()
        self._warned = False
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        eos = backend.token_to_id(named["eos_token"]) if "eos_token" in named else None
        self.eos_token_ids = tuple(eos_token_ids) or (() if eos is None else (eos,))
        self.bos_token_id = backend.token_to_id(named["bos_token"]) if "bos_token" in named else None
        self.chat_template = None if chat_template is None else ChatTemplate(chat_template, named)

    def __reduce__(self) -> tuple[Callable[..., SubwordTokenizer], tuple[object, ...]]:
        return _from_json, (self._backend.to_str(), *self._made_of)

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        check_text(text)
        with self._lock:  # the switch belongs to the whole backend
            self._backend.encode_special_tokens = not parse_special
            if len(text) < LONG_TEXT:
                tokens = list(self._backend.encode(text, add_special_tokens=add_special).ids)
            else:  # of the two calls this one lets other threads run meanwhile
                tokens = list(self._backend.encode_batch([text], add_special_tokens=add_special)[0].ids)
        if add_special and self.bos_token_id is not None and tokens[:2] == [self.bos_token_id] * 2:
            return self._without_second_bos(tokens)
        return tokens

    def fewest_tokens(self, text: str) -> int:
        longest = self._most_characters
        if not longest or len(text) <= longest:
            return 0
        # Spaces beside a token may be swallowed by it, or dropped before the cut: only what is none counts.
        return (len(text) - sum(map(text.count, SPACES[:10] if text.isascii() else SPACES))) // longest

    @cached_property
    def _most_characters(self) -> int:
        """Characters that are no spaces which one token may stand for; 0 where there is no such number."""
        parts = json.loads(self._backend.to_str())
        model, steps = parts["model"], _steps(parts["normalizer"]) + _steps(parts["pre_tokenizer"])
        may_join = model.get("unk_token") is not None and model.get("fuse_unk") and not model.get("byte_fallback")
        if model.get("type") != "BPE" or may_join or any(step not in _KEEP_TEXT for step in steps):
            return 0
        # Composition (NFC) makes one character of up to four.
        return 4 * max(map(len, self._backend.get_vocab(with_added_tokens=True)))

    def _without_second_bos(self, tokens: list[int]) -> list[int]:
        """A text that begins with the BOS by itself, as a rendered chat does, gets no other one before it."""
        if not self._warned:
            self._warned = True
            LOG.warning("the prompt begins with the model's BOS by itself (a rendered chat?); a second one is left out")
        return tokens[1:]

    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        added = self._added.get(token_id)
        if added is not None:
            return b"" if skip_special and added.special else str(added.content).encode("utf-8")
        if token_id not in self._bytes:
            piece = self._backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
            self._bytes[token_id] = b"" if piece is None else self._spelling(piece)
        return self._bytes[token_id]

    def decode(self, token_ids: Iterable[int], *, skip_special: bool = True) -> str:
        """As `Tokenizer.decode`; the space that SentencePiece puts before a text is left out."""
        text = super().decode(token_ids, skip_special=skip_special)
        return text.removeprefix(" ") if self._drops_space else text


def _from_json(
    backend: str, source: Path, named: Mapping[str, str], chat_template: str | None, eos_token_ids: Sequence[int]
) -> SubwordTokenizer:
    """A tokenizer as another process had it."""
    return SubwordTokenizer(
        tokenizers.Tokenizer.from_str(backend),
        source,
        special_tokens=named,
        chat_template=chat_template,
        eos_token_ids=eos_token_ids,
    )


def folder_tokenizer(folder: Path, eos_token_ids: Sequence[int] = ()) -> SubwordTokenizer:
    """The tokenizer of a Hugging Face folder: tokenizer.json, with names and chat template from tokenizer_config.json."""
    path = folder / "tokenizer.json"
    if not path.exists():
        raise ModelError(
            f"{folder}: holds no tokenizer.json; save the tokenizer there with transformers' save_pretrained"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers package raises plain Exception
        raise ModelError(f"{path}: not a tokenizer that can be read: {_one_line(error)}") from None
    backend.no_truncation()
    backend.no_padding()
    config_path, map_path = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    config = read_json(config_path) if config_path.exists() else {}
    if map_path.exists():  # as in transformers: it has the last word unless the config lists the added tokens
        names = read_json(map_path)
        config = config | names if "added_tokens_decoder" not in config else names | config
    check_keys(config, TOKENIZER_KEYS, config_path)
    named = _named_tokens(config)
    _add_listed_tokens(backend, config, named, config_path)
    _mark_special_tokens(backend, config, config_path)
    _warn_of_other_frames(backend, config, named, config_path)
    return SubwordTokenizer(
        backend,
        path,
        special_tokens=named,
        chat_template=_folder_template(folder, config),
        eos_token_ids=eos_token_ids,
    )


def _add_listed_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], named: Mapping[str, str], path: Path
) -> None:
    """The tokens that tokenizer_config.json adds to those of tokenizer.json, each under the id that it gives."""
    listed = config.get("added_tokens_decoder") or {}
    fields = ("single_word", "lstrip", "rstrip", "normalized", "special")
    try:
        tokens = {
            int(index): tokenizers.AddedToken(token["content"], **{name: bool(token.get(name)) for name in fields})
            for index, token in listed.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ModelError(f"{path}: added_tokens_decoder must give a token with its content for each id") from None
    known = backend.get_added_tokens_decoder()
    for index, token in sorted(tokens.items()):
        if repr(known.get(index)) != repr(token):
            backend.add_tokens([token])
        if backend.token_to_id(token.content) != index:
            raise ModelError(
                f"{path}: added_tokens_decoder gives {token.content!r:.40} the id {index}, which tokenizer.json does not"
            )
    for name in ("bos_token", "eos_token"):
        if name in named and backend.token_to_id(named[name]) is None:
            raise ModelError(f"{path}: {name} is {named[name]!r:.40}, which is no token of tokenizer.json")


def _mark_special_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any], path: Path) -> None:
    """Tokens that tokenizer_config.json calls special are: a text is cut at them, and an answer's text leaves them out. As in transformers,
    one that tokenizer.json adds as an ordinary token is made special only if it has a name. ModelError for one that tokenizer.json
    does not have: it would be given a new id, which no network was trained on.
    """
    for name in SPECIAL_LISTS:
        listed = config.get(name) or []
        has_names = isinstance(listed, dict)
        listed = listed.values() if isinstance(listed, dict) else listed
        if not isinstance(listed, Iterable):
            raise ModelError(f"{path}: {name} must be a list of tokens, not {listed!r:.40}")
        for token in listed:
            text = token.get("content") if isinstance(token, dict) else token
            if not isinstance(text, str) or not text:
                raise ModelError(f"{path}: {name} must be a list of tokens, not of {token!r:.40}")
            index = backend.token_to_id(text)
            if index is None:
                raise ModelError(f"{path}: {name} has {text!r:.40}, which is no token of tokenizer.json")
            known = backend.get_added_tokens_decoder().get(index)
            if known is None or (has_names and not known.special):
                backend.add_special_tokens([text])


def _warn_of_other_frames(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], named: Mapping[str, str], path: Path
) -> None:
    """What stands around a text is tokenizer.json's to say, as in transformers 5; version 4 went by add_bos_token and
    add_eos_token, so a line is logged where these say something else."""
    frame = backend.encode("").tokens
    found = {"bos_token": frame[:1] == [named.get("bos_token")], "eos_token": frame[-1:] == [named.get("eos_token")]}
    for name, adds in found.items():
        wanted = config.get(f"add_{name}")
        if name in named and wanted is not None and bool(wanted) != adds:
            what = "adds one" if adds else "adds none"
            LOG.warning("%s: add_%s is %r, but tokenizer.json %s and has the last word", path, name, wanted, what)


def gguf_tokenizer(metadata: dict[str, Any], path: Path, eos_token_ids: Sequence[int] = ()) -> SubwordTokenizer:
    """The tokenizer inside a GGUF file."""
    backend = build_tokenizer(metadata, path)
    ids = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    named: dict[str, str] = {}
    for name, key in ids.items():
        token = special_token(metadata, key)
        piece = backend.id_to_token(token) if token is not None else None
        if piece is not None:
            named[name] = piece
    template = metadata.get("tokenizer.chat_template")
    return SubwordTokenizer(
        backend,
        path,
        special_tokens=named,
        chat_template=template if isinstance(template, str) else None,
        eos_token_ids=eos_token_ids,
    )


# Steps of a tokenizer after which every character that is no space is still there.
_KEEP_TEXT = (
    "NFC",
    "NFKC",
    "NFD",
    "NFKD",
    "Lowercase",
    "Prepend",
    "spaces by ▁",
    "ByteLevel",
    "Metaspace",
    "Split",
    "Digits",
)


def _steps(part: Any) -> list[str]:
    """The names of a normalizer's or a pre-tokenizer's steps."""
    if part is None:
        return []
    if part.get("type") == "Sequence":
        return [name for step in part.get("normalizers") or part.get("pretokenizers") or () for name in _steps(step)]
    name = str(part.get("type"))
    if name == "Replace" and part.get("pattern") == {"String": " "} and part.get("content") == SPACE:
        return ["spaces by ▁"]
    return [name + (" removed" if part.get("behavior") == "Removed" else "")]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token and the like: plain text, or an object with a content."""
    named: dict[str, str] = {}
    for name in SPECIAL_NAMES:
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str) and value:
            named[name] = value
    return named


def _folder_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template: a file of its own (transformers 5), or a field that holds one or a list of named ones."""
    file = folder / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{file}: cannot be read: {error}") from None
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _spelling(backend: tokenizers.Tokenizer, source: Path) -> tuple[Callable[[str], bytes], bool]:
    """How pieces spell bytes, as the tokenizer's decoder tells, and whether a text's first space is the tokenizer's own."""
    decoder = getattr(backend, "decoder", None)
    described = "" if decoder is None else decoder.__getstate__().decode("utf-8")
    kinds = set(re.findall(r'"type":\s*"(\w+)"', described))
    if "ByteLevel" in kinds:
        return _spell_bytes, False
    if kinds & {"ByteFallback", "Metaspace"}:
        return _spell_pieces, bool(kinds & {"Strip", "Metaspace"})
    found = ", ".join(sorted(kinds)) or "none"
    raise ModelError(f"{source}: its decoder ({found}) is not supported; ByteLevel and ByteFallback are")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for the 256 bytes: printable ones stand for themselves, the others take the letters from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF_LETTER = _byte_alphabet()


def _spell_bytes(piece: str) -> bytes:
    if all(letter in BYTE_OF_LETTER for letter in piece):
        return bytes(BYTE_OF_LETTER[letter] for letter in piece)
    return piece.encode("utf-8")


def _spell_pieces(piece: str) -> bytes:
    byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace(SPACE, " ").encode("utf-8")
