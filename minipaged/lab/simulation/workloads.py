"""Traffic: when requests arrive and how long their prompts and answers are.

Lengths are log-normal, cut to
a range, with the centre solved so that the mean after the cut is the published one (PagedAttention paper, section
6.1); arrivals are a Poisson process.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from minipaged.config import check_int, check_real
from minipaged.errors import InputError

IntColumn = npt.NDArray[np.int64]
FloatColumn = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """Requests as columns, in order of arrival. Lengths are tokens, arrivals seconds."""

    name: str
    arrivals: FloatColumn  # [requests]
    prompts: IntColumn  # [requests] shared prefix included
    outputs: IntColumn  # [requests] what the model will in truth answer
    max_new: int  # the most tokens a client asks for: what a system that cannot know the answer must assume
    samples: int = 1  # sequences a request runs side by side: parallel samples, or beams
    beams: bool = False  # whether those sequences are beams, which fork and die at every token
    prefix: int = 0  # leading prompt tokens that are the same in every request

    def __len__(self) -> int:
        return len(self.arrivals)

    def head(self, count: int) -> Workload:
        """The first `count` requests."""
        return replace(self, arrivals=self.arrivals[:count], prompts=self.prompts[:count], outputs=self.outputs[:count])


@dataclass(frozen=True, slots=True)
class Lengths:
    """Log-normal lengths of which only those within [low, high] are kept, centred so that the mean of the kept ones is
    `mean`. `sigma` is the spread of the logarithm before the cut.
    """

    mean: float
    sigma: float
    low: int
    high: int

    def __post_init__(self) -> None:
        check_int("low", self.low, 1)
        check_int("high", self.high, self.low + 1)
        check_real("sigma", self.sigma, 0.05, 4.0)
        if not self.low < self.mean < (self.low + self.high) / 2:
            raise InputError(f"mean must lie between {self.low} and half of {self.low + self.high}, not {self.mean:g}")

    def draw(self, rng: np.random.Generator, count: int) -> IntColumn:
        """`count` lengths; a longer draw starts with the shorter one."""
        mu, kept, found = self._mu(), list[IntColumn](), 0
        while found < count:
            lengths = np.rint(np.exp(mu + self.sigma * rng.standard_normal(4096))).astype(np.int64)
            kept.append(lengths[(lengths >= self.low) & (lengths <= self.high)])
            found += len(kept[-1])
        return np.concatenate(kept)[:count]

    def _mu(self) -> float:
        """The centre: bisection on the mean of the kept lengths, which grows with mu."""
        below, above = math.log(self.low) - self.sigma, math.log(self.high) + self.sigma
        for _ in range(80):
            middle = (below + above) / 2
            if self._kept_mean(middle) < self.mean:
                below = middle
            else:
                above = middle
        return (below + above) / 2

    def _kept_mean(self, mu: float) -> float:
        a, b = (math.log(self.low) - mu) / self.sigma, (math.log(self.high) - mu) / self.sigma
        kept = _normal(b) - _normal(a)
        return math.exp(mu + self.sigma**2 / 2) * (_normal(b - self.sigma) - _normal(a - self.sigma)) / kept


def _normal(x: float) -> float:
    """The standard normal distribution function."""
    return 0.5 * math.erfc(-x / math.sqrt(2))


@dataclass(frozen=True, slots=True)
class Dataset:
    """Prompt and answer lengths that belong together."""

    prompt: Lengths
    output: Lengths
    max_new: int


# The means are the paper's. It prints no spreads: these were chosen so that Fig. 2 and the batches of Orca in Fig.
# 13 come out (mean batch and split of the pool depend on E[o^2] / E[o] and on how much lies past 512).
SHAREGPT = Dataset(Lengths(161.31, 1.0, 4, 1024), Lengths(337.99, 1.2, 4, 1250), max_new=1250)
ALPACA = Dataset(Lengths(19.31, 0.6, 4, 512), Lengths(58.45, 0.9, 2, 512), max_new=512)
CONTEXT = 2048  # of OPT and LLaMA: an answer is cut where prompt and answer reach it


def poisson_arrivals(rng: np.random.Generator, rate: float, count: int) -> FloatColumn:
    """Seconds of `count` arrivals at `rate` a second; all at 0 when the rate is infinite (a queue that never
    empties).
    """
    if rate == math.inf:
        return np.zeros(count)
    check_real("rate", rate, 0.0, open_low=True)
    return np.cumsum(rng.exponential(1.0 / rate, count))


def dataset_workload(
    name: str, data: Dataset, *, rate: float, count: int, seed: int = 0, samples: int = 1, beams: bool = False
) -> Workload:
    """Draws of one dataset. The lengths depend on the seed alone, not on the rate, so that a sweep compares like
    with like.
    """
    check_int("count", count, 1)
    check_int("samples", samples, 1, 64)
    prompts = data.prompt.draw(np.random.default_rng([seed, 1]), count)
    outputs = np.minimum(data.output.draw(np.random.default_rng([seed, 2]), count), CONTEXT - prompts)
    arrivals = poisson_arrivals(np.random.default_rng([seed, 3]), rate, count)
    return Workload(name, arrivals, prompts, outputs, data.max_new, samples, beams)


def shared_prefix(prefix: int, *, rate: float, count: int, seed: int = 0) -> Workload:
    """Translation behind a few-shot prompt that all requests share: 80 tokens (one example) or 341 (five), section 6.4.

    The paper does not print the sentence lengths of WMT16 En-De; 30 tokens in and 40 out are assumed here.
    """
    check_int("prefix", prefix, 1, 1536)
    data = Dataset(Lengths(30, 0.5, 4, 256), Lengths(40, 0.5, 4, 256), max_new=256)
    plain = dataset_workload(f"prefix-{prefix}", data, rate=rate, count=count, seed=seed)
    return replace(plain, prompts=plain.prompts + prefix, prefix=prefix)


def chatbot(*, rate: float, count: int, seed: int = 0, mean_rounds: float = 8.0, history: int = 1024) -> Workload:
    """Every round of a conversation is a request whose prompt is the talk so far, cut to its last `history` tokens
    (section 6.5).

    Rounds a conversation are geometric; the paper says only that most prompts fill the 1024 tokens. No KV is kept
    between rounds.
    """
    check_real("mean_rounds", mean_rounds, 1.0)
    base = dataset_workload("chatbot", SHAREGPT, rate=rate, count=count, seed=seed)
    starts = np.random.default_rng([seed, 4]).random(count) < 1.0 / mean_rounds
    prompts = np.empty(count, np.int64)
    talk = 0
    for i, (new, asked, answered) in enumerate(zip(starts, base.prompts.tolist(), base.outputs.tolist(), strict=True)):
        talk = asked if new else talk + asked
        prompts[i] = min(history, talk)
        talk += answered
    outputs = np.minimum(base.outputs, history)
    order = np.random.default_rng([seed, 5]).permutation(count)  # many people talk at once
    return replace(base, prompts=prompts[order], outputs=outputs[order], max_new=history)


def uniform(*, rate: float, count: int, seed: int = 0) -> Workload:
    """Prompts and answers uniform from 100 to 1024, those of nano-vllm's benchmark."""
    rng = np.random.default_rng([seed, 6])
    lengths = rng.integers(100, 1025, (2, count))
    return Workload("uniform", poisson_arrivals(rng, rate, count), lengths[0], lengths[1], 1024)


Maker = Callable[[float, int, int], Workload]

WORKLOADS: dict[str, Maker] = {
    "sharegpt": lambda rate, count, seed: dataset_workload("sharegpt", SHAREGPT, rate=rate, count=count, seed=seed),
    "alpaca": lambda rate, count, seed: dataset_workload("alpaca", ALPACA, rate=rate, count=count, seed=seed),
    "alpaca-n2": lambda r, c, s: dataset_workload("alpaca-n2", ALPACA, rate=r, count=c, seed=s, samples=2),
    "alpaca-n4": lambda r, c, s: dataset_workload("alpaca-n4", ALPACA, rate=r, count=c, seed=s, samples=4),
    "alpaca-n6": lambda r, c, s: dataset_workload("alpaca-n6", ALPACA, rate=r, count=c, seed=s, samples=6),
    "alpaca-beam2": lambda r, c, s: dataset_workload(
        "alpaca-beam2", ALPACA, rate=r, count=c, seed=s, samples=2, beams=True
    ),
    "alpaca-beam4": lambda r, c, s: dataset_workload(
        "alpaca-beam4", ALPACA, rate=r, count=c, seed=s, samples=4, beams=True
    ),
    "alpaca-beam6": lambda r, c, s: dataset_workload(
        "alpaca-beam6", ALPACA, rate=r, count=c, seed=s, samples=6, beams=True
    ),
    "prefix-80": lambda rate, count, seed: shared_prefix(80, rate=rate, count=count, seed=seed),
    "prefix-341": lambda rate, count, seed: shared_prefix(341, rate=rate, count=count, seed=seed),
    "chatbot": lambda rate, count, seed: chatbot(rate=rate, count=count, seed=seed),
    "uniform": lambda rate, count, seed: uniform(rate=rate, count=count, seed=seed),
}


def make_workload(name: str, *, rate: float, count: int, seed: int = 0) -> Workload:
    """The workload of that name. Raises InputError that lists the known ones."""
    maker = WORKLOADS.get(name)
    if maker is None:
        raise InputError(
            f"unknown workload {name!r}; known: {', '.join(WORKLOADS)}, or the path of a .csv or .jsonl trace"
        )
    check_int("seed", seed, 0)
    return maker(rate, check_int("requests", count, 1), seed)


TimedRequest = tuple[list[int], int]  # prompt token ids, output length


def engine_requests(name: str) -> list[TimedRequest]:
    """The exact requests that the engines are timed on, from fixed seeds: a name of ENGINE_REQUESTS, or `bN` for N equal
    ones (128 in, 256 out).

    Python's own generator is used in a fixed order of calls, so the token ids are the same on every machine.
    """
    if name in ENGINE_REQUESTS:
        return ENGINE_REQUESTS[name]()
    if name[:1] == "b" and name[1:].isdecimal() and int(name[1:]) > 0:
        return _equal_requests(int(name[1:]), 128, 256, seed=2)
    raise InputError(
        f"unknown workload {name!r}; known: {', '.join(ENGINE_REQUESTS)}, or b followed by a batch size, such as b32"
    )


def _token_ids(rng: random.Random, count: int, *, low: int) -> list[int]:
    return [rng.randint(low, 10000) for _ in range(count)]


def _nano_requests() -> list[TimedRequest]:
    """nano-vllm's bench.py: 256 sequences, prompt and output lengths uniform from 100 to 1024; all the prompts are
    drawn first.
    """
    rng = random.Random(0)
    prompts = [_token_ids(rng, rng.randint(100, 1024), low=0) for _ in range(256)]
    return [(prompt, rng.randint(100, 1024)) for prompt in prompts]


def _equal_requests(count: int, prompt: int, output: int, *, seed: int, shared: int = 0) -> list[TimedRequest]:
    """`count` requests of the same lengths; the first `shared` tokens of the prompts are the same too."""
    rng = random.Random(seed)
    prefix = _token_ids(rng, shared, low=5)
    return [(prefix + _token_ids(rng, prompt - shared, low=5), output) for _ in range(count)]


def _length(rng: random.Random, mean: float, sigma: float, low: int, high: int) -> int:
    """A log-normal length whose mean is `mean` before the cut to [low, high]; rounded down."""
    return max(low, min(high, int(rng.lognormvariate(math.log(mean) - sigma * sigma / 2, sigma))))


def _sharegpt_requests(count: int, *, seed: int) -> list[TimedRequest]:
    """Log-normal lengths with means near 161 in and 338 out before the cut to [4, 1024]."""
    rng = random.Random(seed)
    return [
        (_token_ids(rng, _length(rng, 161, 1.0, 4, 1024), low=5), _length(rng, 338, 0.9, 4, 1024)) for _ in range(count)
    ]


def _chat_requests(count: int, *, seed: int) -> list[TimedRequest]:
    """A chat server's mix: short questions, talks that have gone on for a while, long texts to work on; answers of all lengths."""
    rng = random.Random(seed)
    kinds = ((0.5, 80, 0.7), (0.4, 700, 0.6), (0.1, 2200, 0.3))  # share of the requests, mean and spread of the prompt
    found = []
    for _ in range(count):
        ((_, mean, sigma),) = rng.choices(kinds, [share for share, _, _ in kinds])
        found.append((_token_ids(rng, _length(rng, mean, sigma, 4, 3000), low=5), _length(rng, 330, 0.9, 4, 1024)))
    return found


ENGINE_REQUESTS: dict[str, Callable[[], list[TimedRequest]]] = {
    "nano": _nano_requests,
    "sharegpt": lambda: _sharegpt_requests(256, seed=1),
    "chat": lambda: _chat_requests(256, seed=3),
    "long": lambda: _equal_requests(48, 3000, 256, seed=4),
    "context": lambda: _equal_requests(32, 3900, 16, seed=5),
    "prefix": lambda: _equal_requests(128, 1560, 128, seed=6, shared=1500),
}
