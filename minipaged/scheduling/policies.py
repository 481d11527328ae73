"""Choices that a scheduler makes: the order of service and the queue that keeps it, who may join, and how a victim leaves."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from minipaged.config import EngineConfig, check_real
from minipaged.scheduling.request import Request

ServiceKey = tuple[int, int]


def service_key_of(policy: str) -> Callable[[Request], ServiceKey]:
    """The order of service: under fcfs the arrival alone, under priority the smaller number first, then the arrival."""
    if policy == "priority":
        return lambda request: request.service_key
    return lambda request: (0, request.arrival)


class RequestQueue:
    """A priority queue whose members can leave from the middle: push and pop are O(log n), remove is O(1)."""

    def __init__(self, service_key: Callable[[Request], ServiceKey], members: Iterable[Request] = ()) -> None:
        self._service_key = service_key
        self._heap: list[tuple[ServiceKey, int, int, Request]] = []  # service key, request id, ticket, request
        self._members: dict[int, int] = {}  # request id -> the ticket of its entry; others of it are left over
        self._tickets = count()
        for request in members:
            self.push(request)

    def push(self, request: Request) -> None:
        """Take a request in at its place in the order of service. ValueError if it is here already."""
        if request.request_id in self._members:
            raise ValueError(f"request {request.request_id} is queued already")
        ticket = self._members[request.request_id] = next(self._tickets)
        heapq.heappush(self._heap, (self._service_key(request), request.request_id, ticket, request))

    def reorder(self, service_key: Callable[[Request], ServiceKey]) -> None:
        """Another order of service for those that are here and those that come."""
        self._service_key = service_key
        members = list(self)
        self._heap.clear()
        self._members.clear()
        for request in members:
            self.push(request)

    def peek(self) -> Request | None:
        """The next request, or None."""
        heap = self._heap
        while heap and not self._counts(heap[0]):
            heapq.heappop(heap)  # it left from the middle
        return heap[0][3] if heap else None

    def _counts(self, entry: tuple[ServiceKey, int, int, Request]) -> bool:
        """Whether this is its request's entry, and not one that the request has left."""
        return self._members.get(entry[1]) == entry[2]

    def pop(self) -> Request:
        """Take the next request out. IndexError if there is none."""
        request = self.peek()
        if request is None:
            raise IndexError("pop from an empty queue")
        heapq.heappop(self._heap)
        del self._members[request.request_id]
        return request

    def remove(self, request: Request) -> None:
        """Take a request out, wherever it stands. KeyError if it is not here."""
        del self._members[request.request_id]
        if len(self._heap) > 64 and len(self._heap) > 2 * len(self._members):
            self._heap = [entry for entry in self._heap if self._counts(entry)]
            heapq.heapify(self._heap)

    def __contains__(self, request: Request) -> bool:
        return request.request_id in self._members

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Request]:
        """In serving order."""
        return (entry[3] for entry in sorted(self._heap, key=lambda e: e[:3]) if self._counts(entry))


def may_join(batching: str, request: Request, running: Sequence[Request]) -> bool:
    """Whether a request may start beside those that run.

    continuous: always (Orca's iteration-level batching); static: until one of them has drawn a token, so a batch stays as it was
    put together; one: only if there are none. Whoever has drawn a token was let in before and may always come back.
    """
    if batching == "continuous" or any(sequence.num_output for sequence in request.sequences):
        return True
    if batching == "one":
        return not running
    return not any(sequence.num_output for other in running for sequence in other.sequences)


@dataclass(frozen=True, slots=True)
class PreemptionCost:
    """What it costs to bring a victim back.

    A swap moves each of its blocks twice over the host link: 2 * blocks * seconds_per_block, plus a fixed cost a transfer. A recompute runs
    its tokens through the model again: tokens * seconds_per_token, plus a fixed cost a pass; tokens whose blocks are in the prefix cache
    (and stay there) would be free, but no one can promise that they stay, so they count. Both sides of the trade-off are in the paper's
    section 4.5 and figure 19: swapping suffers from small blocks (many small transfers), recomputing does not.
    """

    seconds_per_block: float = 2.6e-5  # 16 tokens * 30 KiB over 20 GB/s, and a few microseconds for the call
    seconds_per_token: float = 4.0e-6
    seconds_per_transfer: float = 2.0e-5
    seconds_per_pass: float = 2.0e-3

    def __post_init__(self) -> None:
        for name in ("seconds_per_block", "seconds_per_token", "seconds_per_transfer", "seconds_per_pass"):
            check_real(name, getattr(self, name), 0.0)

    def swap_is_cheaper(self, num_blocks: int, num_tokens: int) -> bool:
        """Whether moving `num_blocks` distinct blocks out and in beats recomputing `num_tokens`."""
        swap = 2 * (num_blocks * self.seconds_per_block + self.seconds_per_transfer)
        return swap < num_tokens * self.seconds_per_token + self.seconds_per_pass


def wants_swap(config: EngineConfig, cost: PreemptionCost, num_blocks: int, num_tokens: int) -> bool:
    """Whether a victim of this size leaves by swap (True) or by recompute (False). One that has computed nothing has nothing to move."""
    if not num_blocks:
        return False
    if config.preemption == "auto":
        return cost.swap_is_cheaper(num_blocks, num_tokens)
    return config.preemption == "swap"
