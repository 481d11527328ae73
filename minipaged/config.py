"""The settings of an engine, a cache, a model and a request. Each is checked when it is made, and frozen: to change one, make another.

Imports no torch, so that wrong settings are refused at once.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from minipaged.errors import InputError

DType = Literal["float32", "float16", "bfloat16"]
Batching = Literal["continuous", "static", "one"]
BATCHING: tuple[Batching, ...] = ("continuous", "static", "one")
Order = Literal["fcfs", "priority"]
ORDERS: tuple[Order, ...] = ("fcfs", "priority")
Preemption = Literal["auto", "recompute", "swap"]
PREEMPTION: tuple[Preemption, ...] = ("auto", "recompute", "swap")
DTYPES: tuple[DType, ...] = ("float32", "float16", "bfloat16")
DTYPE_BYTES: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "float8_e4m3fn": 1}
Weights = Literal["auto", "packed", "dense"]
WEIGHTS: tuple[Weights, ...] = ("auto", "packed", "dense")
KVCacheDType = Literal["auto", "int8", "fp8"]
KV_CACHE_DTYPES: tuple[KVCacheDType, ...] = ("auto", "int8", "fp8")
SCALE_BYTES = 4  # of quantized keys or values: one scale for each token and KV head
MARK_BYTES = 8  # of heavy hitters: a score and a position for each token and KV head
MAX_BLOCK_SIZE = 256
NO_LIMIT = 2**31 - 1  # what max_tokens=None is kept as: an engine ends every answer at the end of its context
DEFAULT_MODEL = "smollm2-135m"
Progress = Callable[[str, int, int], None]  # progress(what is going on, how much is done, how much there is)


def plain_value(value: Any) -> Any:
    """A number, or a sequence of them, as plain Python where it comes from numpy or is a tensor; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") and hasattr(value, "dtype") else value


def check_int(name: str, value: object, low: int, high: int | None = None) -> int:
    """Return `value` if it is a whole number in [low, high]; otherwise say what was given and what is allowed."""
    span = f"at least {low}" if high is None else f"from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{name} must be a whole number {span}, not {value!r}")
    if value < low or (high is not None and value > high):
        raise InputError(f"{name} must be {span}, not {value}")
    return value


def check_real(name: str, value: object, low: float, high: float = math.inf, *, open_low: bool = False) -> float:
    """Return `value` as a float if it is a finite number in the range; otherwise say what was given and what is allowed."""
    span = f"{'above' if open_low else 'at least'} {low:g}" + ("" if high == math.inf else f" and at most {high:g}")
    if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
        raise InputError(f"{name} must be a finite number {span}, not {value!r:.40}")
    if value < low or value > high or (open_low and value == low):
        raise InputError(f"{name} must be {span}, not {value:g}")
    return float(value)


def _is_finite(value: int | float) -> bool:
    """Whether a float can hold the value: a whole number may be larger than any float."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def check_choice(name: str, value: object, allowed: Iterable[object]) -> None:
    """Raise unless `value` is one of `allowed`."""
    names = tuple(allowed)
    if not isinstance(value, str | int | float | None) or value not in names:
        raise InputError(f"{name} must be one of {', '.join(map(str, names))}, not {value!r}")


def check_bool(name: str, value: object) -> None:
    """Raise unless `value` is True or False."""
    if not isinstance(value, bool):
        raise InputError(f"{name} must be true or false, not {value!r}")


# Far above any real model: a damaged config is refused before its sizes are multiplied or allocated.
MAX_SIZES = {
    "vocab_size": 2**26,
    "hidden_size": 2**20,
    "intermediate_size": 2**24,
    "num_layers": 2**14,
    "num_heads": 2**14,
    "num_kv_heads": 2**14,
    "head_dim": 2**13,
    "max_position": 2**31 - 1,
}
MAX_ROPE_FACTOR, MAX_ROPE_THETA = 1e6, 1e15


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama 3's stretch of the rotary frequencies (Llama 3.1 report, section 3.2; Hugging Face `rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int

    def __post_init__(self) -> None:
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            check_real(name, getattr(self, name), 0.0, MAX_ROPE_FACTOR, open_low=True)
        if self.high_freq_factor <= self.low_freq_factor:
            raise InputError(
                f"high_freq_factor ({self.high_freq_factor:g}) must be above low_freq_factor ({self.low_freq_factor:g})"
            )
        check_int("original_max_position", self.original_max_position, 1, MAX_SIZES["max_position"])


@dataclass(frozen=True, slots=True)
class RopeDivisors:
    """A stretch that divides each rotary frequency by a number of its own, and scales queries and keys as they turn by
    `attention_factor`: linear rope, YaRN and LongRoPE all end in this form."""

    divisors: tuple[float, ...]  # one for each pair of dimensions that turns
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        for divisor in self.divisors:
            check_real("a divisor of rope frequencies", divisor, 0.0, MAX_ROPE_FACTOR, open_low=True)
        check_real("attention_factor", self.attention_factor, 0.0, MAX_ROPE_FACTOR, open_low=True)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a LLaMA-style decoder.

    Flags tell the families apart: Llama 1-3, SmolLM2 and 3, Mistral, Qwen 2.5 and 3, Granite, Seed-OSS, Phi-3 and 4. The network
    itself knows nothing of the multipliers: they are worked into the weights when these are loaded (loading/weights.py).
    """

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int  # context length, in tokens
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | RopeDivisors | None = None
    rotary_dim: int | None = (
        None  # leading dimensions of each head that turn; None for all (Phi-4-mini turns three quarters)
    )
    unrotated_layers: tuple[int, ...] = ()  # layers without rope (SmolLM3)
    sliding_window: int | None = (
        None  # tokens that a query sees, itself included (Mistral 7B v0.1); None: all before it
    )
    full_layers: tuple[
        int, ...
    ] = ()  # layers that see everything in spite of the window (Qwen 2 and 3 below max_window_layers)
    tie_embeddings: bool = False
    attention_bias: bool = False  # a bias on q, k and v (Qwen 2.5)
    output_bias: bool = False  # a bias on the attention's output projection too (`attention_bias` of a Llama config)
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head's q and k before rope (Qwen 3)
    embedding_multiplier: float = 1.0  # of the hidden states after the embedding (the four of Granite)
    residual_multiplier: float = 1.0  # of what each attention and MLP adds
    attention_multiplier: float | None = None  # of the scores; None for 1 / sqrt(head_dim)
    logits_divisor: float = 1.0
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def __post_init__(self) -> None:
        for name, most in MAX_SIZES.items():
            check_int(name, getattr(self, name), 1, most)
        check_real("rms_norm_eps", self.rms_norm_eps, 0.0, 1.0)
        check_real("rope_theta", self.rope_theta, 0.0, MAX_ROPE_THETA, open_low=True)
        if self.num_heads % self.num_kv_heads:
            raise InputError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.head_dim % 2:
            raise InputError(f"head_dim must be even for rotary positions, not {self.head_dim}")
        if self.rotary_dim is not None and (check_int("rotary_dim", self.rotary_dim, 2, self.head_dim) % 2):
            raise InputError(f"rotary_dim must be even, not {self.rotary_dim}")
        pairs = (self.rotary_dim or self.head_dim) // 2
        if isinstance(self.rope_scaling, RopeDivisors) and len(self.rope_scaling.divisors) != pairs:
            raise InputError(f"rope scaling has {len(self.rope_scaling.divisors)} divisors for {pairs} frequencies")
        for name in ("unrotated_layers", "full_layers"):
            for layer in getattr(self, name):
                check_int(name, layer, 0, self.num_layers - 1)
        if self.sliding_window is not None:
            check_int("sliding_window", self.sliding_window, 1, MAX_SIZES["max_position"])
        for name in ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_divisor"):
            if getattr(self, name) is not None:
                check_real(name, getattr(self, name), 0.0, MAX_ROPE_FACTOR, open_low=True)

    @property
    def group_size(self) -> int:
        """Query heads that read one KV head: 1 is MHA, num_heads is MQA."""
        return self.num_heads // self.num_kv_heads

    def window_of(self, layer: int) -> int | None:
        """Tokens that a query of this layer sees, itself included; None: all before it."""
        return None if layer in self.full_layers else self.sliding_window

    def kv_bytes_per_token(self, dtype: str = "bfloat16", *, heavy_hitters: bool = False) -> int:
        """Bytes of keys and values that one token holds over all layers, and of their scales where one byte is an element:
        2 * layers * kv_heads * (head_dim * bytes + bytes of a scale). heavy_hitters: with a score and a position for each KV head.
        """
        element = DTYPE_BYTES[dtype]
        head = self.head_dim * element + (SCALE_BYTES if element == 1 else 0)
        return self.num_layers * self.num_kv_heads * (2 * head + (MARK_BYTES if heavy_hitters else 0))

    def num_parameters(self) -> int:
        """Weights of the network, embeddings counted once when tied."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        per_layer = (
            self.hidden_size * (2 * q + 2 * kv) + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        )
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return per_layer * self.num_layers + embeddings + self.hidden_size


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """The pool of KV blocks. `num_blocks` includes block 0, the null block.

    kv_cache_dtype: what keys and values are kept as: auto (the model's dtype), or int8 or fp8 (e4m3) with a scale for each token and
    KV head.
    """

    block_size: int = 16
    num_blocks: int = 512
    num_host_blocks: int = 0
    enable_prefix_caching: bool = True
    watermark: float = 0.01
    kv_cache_dtype: KVCacheDType = "auto"
    # By memory/retention.py: all, window:W, sinks:S+window:W, h2o:HEAVY+RECENT; None: as the model's own windows allow.
    retention: str | None = None
    disk_cache: str | None = None  # the folder for blocks that outlive the process
    disk_gb: float = 10.0

    def __post_init__(self) -> None:
        check_choice("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        check_int("block_size", self.block_size, 1, MAX_BLOCK_SIZE)
        check_int("num_blocks", self.num_blocks, 2)
        check_int("num_host_blocks", self.num_host_blocks, 0)
        check_bool("enable_prefix_caching", self.enable_prefix_caching)
        check_real("watermark", self.watermark, 0.0, 0.5)
        check_real("disk_gb", self.disk_gb, 0.0, open_low=True)
        if self.disk_cache is not None and (
            not isinstance(self.disk_cache, str | os.PathLike) or not str(self.disk_cache)
        ):
            raise InputError(f"disk_cache must be a folder, not {self.disk_cache!r}")
        if self.disk_cache is not None and not self.enable_prefix_caching:
            raise InputError("disk_cache keeps cached prefixes: leave enable_prefix_caching on, or disk_cache out")

    def kv_dtype(self, dtype: str) -> str:
        """The dtype that keys and values of a model of `dtype` are kept as, by torch's name."""
        return {"auto": dtype, "int8": "int8", "fp8": "float8_e4m3fn"}[self.kv_cache_dtype]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How requests become steps."""

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_model_len: int = 2048
    policy: Order = "fcfs"
    preemption: Preemption = "auto"
    batching: Batching = "continuous"  # who may join the running: anybody, nobody once they write, nobody at all
    depth: int = 0  # steps in flight beyond the one being committed: 0 plain, 1 overlap
    pipeline_parallel: int = 1  # stages; above 1, steps in flight have no drawing sequence in common
    seed: int = 0

    def __post_init__(self) -> None:
        check_int("max_num_seqs", self.max_num_seqs, 1)
        check_int("max_num_batched_tokens", self.max_num_batched_tokens, 1)
        check_int("max_model_len", self.max_model_len, 1)
        check_choice("policy", self.policy, ORDERS)
        check_choice("preemption", self.preemption, PREEMPTION)
        check_choice("batching", self.batching, BATCHING)
        check_int("depth", self.depth, 0, 64)
        check_int("pipeline_parallel", self.pipeline_parallel, 1, 64)
        check_int("seed", self.seed, -(2**63), 2**63 - 1)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """What one request asks of generation. Names and meanings are those of vLLM and the OpenAI API.

    `temperature` 0 is greedy. Sample i of a request draws from the stream (seed, i, position), so a rerun is equal and the
    n samples differ. Raises InputError naming the value and the allowed range.

    Numbers may be numpy's or a tensor's, lists any sequence. What other engines say otherwise is taken as they mean it: `max_tokens` None
    or beyond the context is the end of the context, `top_k` -1 all tokens, `seed` -1 or None one of the engine's, `stop` None no string.
    `skip_special_tokens` False writes special tokens into the text; `include_stop_str_in_output` keeps the stop string, or the stop token's
    text, at its end. `logprobs` k asks for each token's log-probability and those of the k likeliest, up to 100; `prompt_logprobs` the
    same of the prompt. `best_of` draws so many samples and returns the `n` best. `beam_width` searches instead of sampling, and
    `length_penalty` and `early_stopping` are transformers'. `cache_salt` keeps a prompt's blocks apart from those of other salts.

    What changes the logits of a draw, in this order: only `allowed_token_ids` can be drawn (None: all), `bad_words` cannot, `logit_bias`
    {token: number} is added, `repetition_penalty` divides what the prompt or the answer has (Keskar et al. 2019), `presence_penalty` is
    taken off what the answer has and `frequency_penalty` once for each time (OpenAI's). Log-probabilities are those before all of it.

    `json_schema` (a schema as JSON text) makes each answer a document that follows it: tokens that cannot come next are not drawn. It needs
    the package llguidance.
    """

    n: int = 1
    best_of: int | None = None
    max_tokens: int = 64
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    beam_width: int | None = None
    length_penalty: float = 1.0
    early_stopping: bool = False
    priority: int = 0
    cache_salt: str | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] | Mapping[int, float] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    json_schema: str | None = None  # JSON: each answer is a document that follows it (extra `structured`)

    def __post_init__(self) -> None:
        self._normalise_numbers()
        check_int("n", self.n, 1, 1024)
        if self.best_of is not None:
            check_int("best_of", self.best_of, self.n, 1024)
        check_int("max_tokens", self.max_tokens, 1)
        check_int("min_tokens", self.min_tokens, 0, self.max_tokens)
        check_real("temperature", self.temperature, 0.0)
        check_real("top_p", self.top_p, 0.0, 1.0, open_low=True)
        check_int("top_k", self.top_k, 0)
        check_real("min_p", self.min_p, 0.0, 1.0)
        check_real("repetition_penalty", self.repetition_penalty, 0.0, open_low=True)
        if self.seed is not None:
            check_int("seed", self.seed, -(2**63), 2**63 - 1)
        for name in ("presence_penalty", "frequency_penalty"):
            check_real(name, getattr(self, name), -2.0, 2.0)
        self._normalise_words("stop")
        self._normalise_words("bad_words")
        self._normalise_tokens("stop_token_ids")
        self._normalise_logit_bias()
        if self.allowed_token_ids is not None:
            self._normalise_tokens("allowed_token_ids")
            if not self.allowed_token_ids:
                raise InputError("allowed_token_ids must name a token at least, or be None for all")
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            check_bool(name, getattr(self, name))
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) == -1:
                raise InputError(f"{name}=-1, the whole vocabulary, is not offered: ask for 0 to 100")
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 0, 100)
        check_real("length_penalty", self.length_penalty, -100.0, 100.0)
        check_bool("early_stopping", self.early_stopping)
        check_int("priority", self.priority, -(2**31), 2**31 - 1)
        if self.cache_salt is not None and not isinstance(self.cache_salt, str):
            raise InputError(f"cache_salt must be text, not {self.cache_salt!r}")
        if self.json_schema is not None and not isinstance(self.json_schema, str):
            raise InputError(f"json_schema must be the schema as JSON text, not {self.json_schema!r:.80}")
        if self.beam_width is not None:
            self._check_beams()

    def _normalise_numbers(self) -> None:
        """Numbers of numpy and of tensors become Python's, other engines' ways to say "no limit" become ours."""
        for field in fields(self):
            object.__setattr__(self, field.name, plain_value(getattr(self, field.name)))
        for name, said, meant in (("max_tokens", None, NO_LIMIT), ("top_k", -1, 0), ("seed", -1, None)):
            if getattr(self, name) == said:
                object.__setattr__(self, name, meant)

    def _normalise_words(self, name: str) -> None:
        """Texts become a tuple of them; one alone and None are taken too."""
        given = getattr(self, name)
        given = () if given is None else given
        if not isinstance(given, str | tuple | list):
            raise InputError(f"{name} must be a list, not {given!r}")
        words = (given,) if isinstance(given, str) else tuple(given)
        if any(not isinstance(word, str) or not word for word in words):
            raise InputError(f"{name} must be non-empty strings, not {given!r}")
        object.__setattr__(self, name, words)

    def _normalise_tokens(self, name: str) -> None:
        """Token ids become a tuple of them; None is taken too."""
        given = getattr(self, name)
        given = () if given is None else given
        if not isinstance(given, tuple | list):
            raise InputError(f"{name} must be a list, not {given!r}")
        tokens = tuple(map(plain_value, given))
        for token in tokens:
            check_int(name, token, 0)
        object.__setattr__(self, name, tokens)

    def _normalise_logit_bias(self) -> None:
        """A mapping, or pairs, become pairs in the order of their tokens. JSON writes the tokens as texts."""
        given = self.logit_bias or ()
        pairs = given.items() if isinstance(given, Mapping) else given
        try:
            biases = {int(token) if isinstance(token, str) else plain_value(token): bias for token, bias in pairs}
        except (TypeError, ValueError):
            raise InputError(f"logit_bias must be {{token id: number}}, not {given!r}") from None
        for token, bias in biases.items():
            check_int("logit_bias", token, 0)
            biases[token] = check_real(f"logit_bias of token {token}", plain_value(bias), -100.0, 100.0)
        object.__setattr__(self, "logit_bias", tuple(sorted(biases.items())))

    def _check_beams(self) -> None:
        width = check_int("beam_width", self.beam_width, 1, 1024)
        if self.n > width:
            raise InputError(
                f"n ({self.n}) must be at most beam_width ({width}): a beam search returns its n best beams"
            )
        plain = SamplingParams.__dataclass_fields__
        for name in ("temperature", "top_p", "top_k", "min_p", "best_of"):
            if getattr(self, name) != plain[name].default:
                raise InputError(f"{name} must keep its default with beam_width: a beam search does not sample")

    @property
    def num_sequences(self) -> int:
        """Sequences that run side by side for this request: beams, or samples drawn."""
        return self.beam_width if self.beam_width is not None else (self.best_of or self.n)

    @property
    def greedy(self) -> bool:
        """Whether the next token is the most likely one."""
        return self.temperature == 0.0


LOGIT_CHANGES = (  # what SamplingParams does to logits beside temperature and truncation
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "json_schema",
)


def describe(config: ModelConfig | CacheConfig | EngineConfig) -> dict[str, object]:
    """A config as plain values, for a trace header or a results file."""
    return {f.name: getattr(config, f.name) for f in fields(config)}


def parse_offload(wish: str | float) -> float | None:
    """GB (1e9 bytes) of weights to keep on the host, 0 for none; None for what does not fit (`auto`). InputError for anything else."""
    if wish == "auto":
        return None
    if wish == "none":
        return 0.0
    try:
        size = float(wish) if not isinstance(wish, bool) else math.nan
    except (TypeError, ValueError):
        size = math.nan
    if not 0.0 <= size < math.inf:
        raise InputError(f"offload_weights must be auto, none or a number of GB, not {wish!r}")
    return size
