"""A tokenizer from GGUF metadata.

Knows the two kinds that Llama-style models use: byte-level BPE (`gpt2`), whose pre-tokenizer GGUF only names, and
SentencePiece BPE (`llama`), whose merges follow from the scores. Everything else is refused by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from minipaged.errors import ModelError

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
GPT_2 = ("default", "gpt-2")


def build_tokenizer(metadata: dict[str, Any], path: Path) -> Tokenizer:
    """The tokenizer that `tokenizer.ggml.*` describes; ModelError names a kind that is not supported."""
    kind = metadata.get("tokenizer.ggml.model")
    tokens = _texts(metadata, "tokenizer.ggml.tokens", path)
    if kind == "gpt2":
        tokenizer = _byte_level(metadata, tokens, path)
    elif kind == "llama":
        tokenizer = _sentencepiece(metadata, tokens, path)
    else:
        raise ModelError(f"{path}: tokenizer.ggml.model {kind!r} is not supported; gpt2 (byte-level BPE) and llama are")
    _add_special_tokens(tokenizer, metadata, tokens)
    if metadata.get("tokenizer.ggml.add_bos_token", kind == "llama"):
        _add_bos(tokenizer, metadata, tokens, path)
    return tokenizer


def _byte_level(metadata: dict[str, Any], tokens: list[str], path: Path) -> Tokenizer:
    merges = _merges(metadata, path)
    name = metadata.get("tokenizer.ggml.pre", "default")
    vocab = {token: index for index, token in enumerate(tokens)}
    try:
        model = models.BPE(vocab=vocab, merges=merges, ignore_merges=SPLITS.get(name) == LLAMA_3)
    except Exception as error:  # the tokenizers package raises plain Exception
        raise ModelError(f"{path}: tokenizer.ggml.merges do not fit the tokens: {error}") from None
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = _pre_tokenizer(name, path)
    tokenizer.decoder = decoders.ByteLevel()
    if SPLITS.get(name) == QWEN_2:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _pre_tokenizer(name: str, path: Path) -> pre_tokenizers.PreTokenizer:
    """How text is cut before merging. GGUF gives only a name, so an unknown name cannot be guessed at."""
    if name in GPT_2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in DIGIT_SPLITTERS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    if name in SPLITS:
        split = pre_tokenizers.Split(Regex(SPLITS[name]), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    known = ", ".join((*GPT_2, *DIGIT_SPLITTERS, *SPLITS))
    raise ModelError(f"{path}: tokenizer.ggml.pre {name!r} is not supported; {known} are")


def _sentencepiece(metadata: dict[str, Any], tokens: list[str], path: Path) -> Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise ModelError(f"{path}: tokenizer.ggml.scores must give one score for each of the {len(tokens)} tokens")
    vocab = {token: index for index, token in enumerate(tokens)}
    unknown = tokens[_index(metadata, "unknown", len(tokens), default=0)]
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


def _add_bos(tokenizer: Tokenizer, metadata: dict[str, Any], tokens: list[str], path: Path) -> None:
    if "tokenizer.ggml.bos_token_id" not in metadata:
        raise ModelError(f"{path}: tokenizer.ggml.add_bos_token is set, but tokenizer.ggml.bos_token_id is missing")
    index = _index(metadata, "bos", len(tokens), default=0)
    piece = tokens[index]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[piece, "$A"], pair=[piece, "$A", "$B"], special_tokens=[(piece, index)]
    )


def _index(metadata: dict[str, Any], kind: str, num_tokens: int, *, default: int) -> int:
    value = metadata.get(f"tokenizer.ggml.{kind}_token_id", default)
    if not isinstance(value, int) or not 0 <= value < num_tokens:
        raise ModelError(f"tokenizer.ggml.{kind}_token_id must be from 0 to {num_tokens - 1}, not {value!r}")
    return value


def _merges(metadata: dict[str, Any], path: Path) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    for merge in _texts(metadata, "tokenizer.ggml.merges", path):
        left, _, right = merge.partition(" ")
        merges.append((left, right))
    return merges


def _texts(metadata: dict[str, Any], key: str, path: Path) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not value or not isinstance(value[0], str):
        raise ModelError(f"{path}: metadata {key} is missing or is no list of texts")
    return value
