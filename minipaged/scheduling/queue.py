"""Requests in the order they are served."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from itertools import count

from minipaged.scheduling.policies import Rank
from minipaged.scheduling.request import Request


class RequestQueue:
    """A priority queue whose members can leave from the middle: push and pop are O(log n), remove is O(1)."""

    def __init__(self, rank: Callable[[Request], Rank], members: Iterable[Request] = ()) -> None:
        self._rank = rank
        self._heap: list[tuple[Rank, int, int, Request]] = []  # rank, request id, ticket, request
        self._members: dict[int, int] = {}  # request id -> the ticket of its entry; others of it are left over
        self._tickets = count()
        for request in members:
            self.push(request)

    def push(self, request: Request) -> None:
        """Take a request in at its rank. ValueError if it is here already."""
        if request.request_id in self._members:
            raise ValueError(f"request {request.request_id} is queued already")
        ticket = self._members[request.request_id] = next(self._tickets)
        heapq.heappush(self._heap, (self._rank(request), request.request_id, ticket, request))

    def reorder(self, rank: Callable[[Request], Rank]) -> None:
        """Another order of service for those that are here and those that come."""
        self._rank = rank
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

    def _counts(self, entry: tuple[Rank, int, int, Request]) -> bool:
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
