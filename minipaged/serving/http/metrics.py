"""What Prometheus is told, under vLLM's names, so that boards made for vLLM work.

Counted in plain numbers, and made into families when somebody asks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest

if TYPE_CHECKING:
    from minipaged.serving.http.mailbox import Ticket

# vLLM's buckets, in seconds.
_FIRST = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
_BETWEEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_WHOLE = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
BLOCK_STATES = ("free", "cached", "referenced", "pinned", "host")


class Histogram:
    """How often a duration fell into each bucket."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """One more."""
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._sum += seconds

    def buckets(self) -> tuple[list[tuple[str, float]], float]:
        """Prometheus' cumulative buckets, and the sum."""
        total, found = 0, []
        for bound, count in zip((*map(float, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            found.append((str(bound), float(total)))
        return found, self._sum


class Metrics:
    """All counts of one server. prefix: what stands before each name, minipaged or vllm."""

    def __init__(self, prefix: str, model: str) -> None:
        self.prefix, self.model = prefix, model
        self.gauges: dict[str, int] = {}  # the engine's newest account of its queues and its pool
        self.waiting: Callable[[], int] = lambda: 0  # requests that have not started, as the server counts them
        self.inter_token = Histogram(_BETWEEN)
        self.histograms = {
            "time_to_first_token_seconds": (Histogram(_FIRST), "From a request's arrival to its first token."),
            "inter_token_latency_seconds": (self.inter_token, "Between two tokens of an answer."),
            "e2e_request_latency_seconds": (Histogram(_WHOLE), "From a request's arrival to its end."),
            "request_queue_time_seconds": (Histogram(_WHOLE), "From a request's arrival to its start."),
            "request_prefill_time_seconds": (Histogram(_WHOLE), "From a request's start to its first token."),
            "request_decode_time_seconds": (Histogram(_WHOLE), "From a request's first token to its last."),
        }
        self.success: Counter[str] = Counter()
        self.refused: Counter[int] = Counter()
        self.prompt_tokens = 0
        self.first_token = self.histograms["time_to_first_token_seconds"][0].observe
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def finished(self, reason: str) -> None:
        """An answer has ended."""
        if reason in ("stop", "length"):
            self.success[reason] += 1

    def ended(self, ticket: Ticket, finish: str) -> None:
        """A request has ended, all answers of it."""
        if finish == "abort":
            self.success["abort"] += 1
        spans = {"e2e_request_latency_seconds": (ticket.asked_at, ticket.last_at)}
        spans["request_queue_time_seconds"] = (ticket.asked_at, ticket.started_at)
        spans["request_prefill_time_seconds"] = (ticket.started_at, ticket.first_at)
        spans["request_decode_time_seconds"] = (ticket.first_at, ticket.last_at)
        for name, (start, end) in spans.items():
            if start and end:
                self.histograms[name][0].observe(max(0.0, end - start))

    def collect(self) -> Iterator[Metric]:
        """The families, as prometheus_client asks for them."""
        gauges = self.gauges
        usable = max(1, gauges.get("total_blocks", 0))
        running, swapped = gauges.get("running", 0), gauges.get("swapped", 0)
        yield self._gauge("num_requests_running", "Requests in the batch.", running)
        yield self._gauge("num_requests_waiting", "Requests that wait to start.", self.waiting())
        yield self._gauge("num_requests_swapped", "Requests in host memory.", swapped)
        used = gauges.get("referenced_blocks", 0)
        yield self._gauge("kv_cache_usage_perc", "Share of the pool that sequences hold, 0 to 1.", used / usable)
        family = GaugeMetricFamily(
            self._name("kv_blocks"), "Blocks of the KV pool by state.", labels=["model_name", "state"]
        )
        for state in BLOCK_STATES:
            family.add_metric([self.model, state], gauges.get(f"{state}_blocks", 0))
        yield family
        saved = gauges.get("shared_saved_blocks", 0)
        yield self._gauge("kv_blocks_saved_by_sharing", "Block table entries less distinct blocks.", saved)
        yield self._gauge("kv_tail_slots", "Slots of held blocks that hold no token.", gauges.get("tail_slots", 0))
        for name, text, value in (
            ("prefix_cache_queries", "Prompt tokens looked up.", gauges.get("queried_tokens", 0)),
            ("prefix_cache_hits", "Prompt tokens found.", gauges.get("hit_tokens", 0)),
            ("num_preemptions", "Requests sent away for lack of blocks.", gauges.get("preemptions", 0)),
            ("prompt_tokens", "Prompt tokens of requests that have started.", self.prompt_tokens),
            ("generation_tokens", "Tokens drawn.", gauges.get("generated_tokens", 0)),
        ):
            counter = CounterMetricFamily(self._name(name), text, labels=["model_name"])
            counter.add_metric([self.model], value)
            yield counter
        success = CounterMetricFamily(
            self._name("request_success"), "Answers by how they ended.", labels=["model_name", "finished_reason"]
        )
        for reason in ("stop", "length", "abort"):
            success.add_metric([self.model, reason], self.success[reason])
        yield success
        refused = CounterMetricFamily(
            self._name("requests_refused"), "Requests refused, by status.", labels=["model_name", "status"]
        )
        for status, count in sorted(self.refused.items()):
            refused.add_metric([self.model, str(status)], count)
        yield refused
        for name, (histogram, text) in self.histograms.items():
            made = HistogramMetricFamily(self._name(name), text, labels=["model_name"])
            buckets, total = histogram.buckets()
            made.add_metric([self.model], buckets, total)
            yield made

    def _name(self, name: str) -> str:
        return f"{self.prefix}:{name}"

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(self._name(name), text, labels=["model_name"])
        family.add_metric([self.model], value)
        return family

    def exposition(self) -> bytes:
        """The text that a scrape gets."""
        return generate_latest(self._registry)
