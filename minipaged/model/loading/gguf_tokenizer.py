"""A tokenizer from GGUF metadata.

There are the two kinds that Llama-style models use: byte-level BPE (`gpt2`), whose pre-tokenizer GGUF only names, and
SentencePiece BPE (`llama`), whose merges follow from the scores. Everything else is refused by name.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from minipaged.errors import ModelError

LOG = logging.getLogger("minipaged")
CONTROL, USER_DEFINED, BYTE = 3, 4, 6  # tokenizer.ggml.token_type
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {"llama-bpe": LLAMA_3, "llama3": LLAMA_3, "llama-v3": LLAMA_3, "qwen2": QWEN_2, "tekken": TEKKEN}
DIGIT_SPLITTERS = ("smollm", "starcoder", "refact", "command-r")  # one digit at a time, then GPT-2's own split
# llama.cpp's `default`: each pattern cuts what the one before left.
DEFAULT_SPLITS = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)
BOS_IMPLIED = ("llama-bpe", "llama3", "llama-v3", "tekken")  # llama.cpp begins texts with the BOS and ignores merges
SENTENCEPIECE_IDS = {"unknown": 0, "bos": 1, "eos": 2}
END_KINDS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
# Tokens that end generation by their text alone, as in llama.cpp (`special_eog_ids`). Of its tokens for filling in the middle only
# those count that the metadata names: transformers goes on after the others, and so do models that use them as text.
END_TEXTS = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "</s>"),
        *("<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>"),
    )
)


def build_tokenizer(metadata: dict[str, Any], path: Path) -> Tokenizer:
    """The tokenizer that `tokenizer.ggml.*` describes; ModelError names a kind that is not supported."""
    kind = metadata.get("tokenizer.ggml.model")
    tokens = _texts(metadata, "tokenizer.ggml.tokens", path)
    if kind == "gpt2":
        tokenizer = _byte_level(metadata, tokens, path)
    elif kind == "llama":
        tokenizer = _sentencepiece(metadata, tokens, path)
    else:
        raise ModelError(
            f"{path}: tokenizer.ggml.model {kind!r:.60} is not supported; gpt2 (byte-level BPE) and llama are"
        )
    _add_special_tokens(tokenizer, metadata, tokens)
    implied = kind == "llama" or metadata.get("tokenizer.ggml.pre") in BOS_IMPLIED
    bos = _framing_token(metadata, "bos", tokens, path, implied=implied)
    eos = _framing_token(metadata, "eos", tokens, path, implied=False)
    _frame_texts(tokenizer, bos, eos)
    return tokenizer


def _frame_texts(tokenizer: Tokenizer, bos: str | None, eos: str | None) -> None:
    """Let the tokenizer put these tokens before and behind a text."""
    texts = [text for text in (bos, eos) if text is not None]
    ids = [(text, tokenizer.token_to_id(text)) for text in dict.fromkeys(texts)]
    before, behind = ([] if text is None else [text] for text in (bos, eos))
    single = [*before, "$A", *behind]
    pair = [*single, *(f"{text}:1" for text in before), "$B:1", *(f"{text}:1" for text in behind)]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)


def special_token(metadata: Mapping[str, Any], kind: str) -> int | None:
    """The id of the token of a kind (bos, eos, eot ...), where the file or, for SentencePiece, its tradition names one."""
    default = SENTENCEPIECE_IDS.get(kind) if metadata.get("tokenizer.ggml.model") == "llama" else None
    value = metadata.get(f"tokenizer.ggml.{kind}_token_id", default)
    return value if isinstance(value, int) and value >= 0 and not isinstance(value, bool) else None


def end_tokens(metadata: Mapping[str, Any], path: Path) -> tuple[int, ...]:
    """Where generation ends, as in llama.cpp: the tokens that the metadata names, then those whose text says it.

    ModelError if one that is named is no token.
    """
    tokens = metadata.get("tokenizer.ggml.tokens")
    tokens = tokens if isinstance(tokens, list) else []
    for kind in END_KINDS:
        token = special_token(metadata, kind)
        if token is not None and tokens and token >= len(tokens):
            raise ModelError(f"{path}: tokenizer.ggml.{kind}_token_id {token} is none of the {len(tokens)} tokens")
    named = [token for kind in END_KINDS if (token := special_token(metadata, kind)) is not None]
    said = [index for index, token in enumerate(tokens) if token in END_TEXTS]
    return tuple(dict.fromkeys((*named, *said)))


def _byte_level(metadata: dict[str, Any], tokens: list[str], path: Path) -> Tokenizer:
    merges = _merges(metadata, path)
    name = metadata.get("tokenizer.ggml.pre")
    if name is None:
        LOG.warning(
            "%s: tokenizer.ggml.pre is missing: texts are cut in llama.cpp's default way, perhaps not this model's",
            path,
        )
        name = "default"
    vocab = {token: index for index, token in enumerate(tokens)}
    try:
        model = models.BPE(vocab=vocab, merges=merges, ignore_merges=name in BOS_IMPLIED)
    except Exception as error:  # the tokenizers package raises plain Exception
        raise ModelError(f"{path}: tokenizer.ggml.merges do not fit the tokens: {error}") from None
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = _pre_tokenizer(name, path)
    tokenizer.decoder = decoders.ByteLevel()
    if SPLITS.get(name) == QWEN_2:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _pre_tokenizer(name: Any, path: Path) -> pre_tokenizers.PreTokenizer:
    """How text is cut before merging. GGUF gives only a name, so an unknown name cannot be guessed at."""
    if name == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "default":
        cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in DEFAULT_SPLITS]
        return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    if name in DIGIT_SPLITTERS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    if isinstance(name, str) and name in SPLITS:
        split = pre_tokenizers.Split(Regex(SPLITS[name]), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    known = ", ".join(("default", "gpt-2", *DIGIT_SPLITTERS, *SPLITS))
    raise ModelError(f"{path}: tokenizer.ggml.pre {name!r:.60} is not supported; {known} are")


def _sentencepiece(metadata: dict[str, Any], tokens: list[str], path: Path) -> Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise ModelError(f"{path}: tokenizer.ggml.scores must give one score for each of the {len(tokens)} tokens")
    vocab = {token: index for index, token in enumerate(tokens)}
    unknown = tokens[_index(metadata, "unknown", len(tokens), path)]
    model = models.BPE(
        vocab=vocab, merges=_merges_by_score(vocab, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    prefix = "first" if metadata.get("tokenizer.ggml.add_space_prefix", True) else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=prefix, split=False)
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix == "first":
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merges_by_score(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece merges whichever adjacent pair forms the best-scored token: every split of a token into two tokens is
    a merge, ranked by the score of the whole."""
    ranked: list[tuple[float, int, int, str, str]] = []
    for token, index in vocab.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                ranked.append((-scores[index], vocab[left], vocab[right], left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _add_special_tokens(tokenizer: Tokenizer, metadata: dict[str, Any], tokens: list[str]) -> None:
    kinds = metadata.get("tokenizer.ggml.token_type") or []
    marked = list(zip(tokens, kinds, strict=False))
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t, kind in marked if kind == CONTROL]
    )
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t, kind in marked if kind == USER_DEFINED])


def _framing_token(metadata: dict[str, Any], kind: str, tokens: list[str], path: Path, *, implied: bool) -> str | None:
    """The token that a text begins (bos) or ends (eos) with, if the file wants one or says nothing and one is implied."""
    wanted = metadata.get(f"tokenizer.ggml.add_{kind}_token", implied)
    if not wanted:
        return None
    index = special_token(metadata, kind)
    if index is None and f"tokenizer.ggml.add_{kind}_token" not in metadata:
        LOG.warning("%s: texts should begin with a %s, but tokenizer.ggml.%s_token_id is missing", path, kind, kind)
        return None
    if index is None:
        raise ModelError(
            f"{path}: tokenizer.ggml.add_{kind}_token is set, but tokenizer.ggml.{kind}_token_id is missing"
        )
    if index >= len(tokens):
        raise ModelError(f"{path}: tokenizer.ggml.{kind}_token_id must be from 0 to {len(tokens) - 1}, not {index}")
    return tokens[index]


def _index(metadata: dict[str, Any], kind: str, num_tokens: int, path: Path) -> int:
    value = special_token(metadata, kind)
    if value is None or value >= num_tokens:
        raise ModelError(
            f"{path}: tokenizer.ggml.{kind}_token_id must be from 0 to {num_tokens - 1}, not {value!r:.60}"
        )
    return value


def _merges(metadata: dict[str, Any], path: Path) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    for merge in _texts(metadata, "tokenizer.ggml.merges", path):
        left, _, right = merge.partition(" ")
        merges.append((left, right))
    return merges


def _texts(metadata: dict[str, Any], key: str, path: Path) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise ModelError(f"{path}: metadata {key} is missing or is no list of texts")
    return value
