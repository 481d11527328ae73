"""The queue of waiting requests: its order, and what it lets go of."""

from __future__ import annotations

import gc
import weakref

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from minipaged.config import SamplingParams
from minipaged.scheduling.policies import RequestQueue
from minipaged.scheduling.request import Request


@given(seed=st.integers(0, 10**6), leave=st.sampled_from([0, 40, 90, 130]))
def test_a_queue_keeps_its_order_when_many_leave(seed: int, leave: int) -> None:
    """Ranks in no order, most members gone from the middle, and one that comes back under its number."""
    rng = np.random.default_rng(seed)
    queue = RequestQueue(lambda request: request.service_key)
    requests = [Request(i, (1,), SamplingParams(priority=int(p))) for i, p in enumerate(rng.integers(-50, 50, 140))]
    for request in requests:
        queue.push(request)
    gone = [requests[i] for i in rng.permutation(140)[:leave]]
    for request in gone:
        queue.remove(request)
        assert request not in queue
    stay = sorted((r for r in requests if r not in gone), key=lambda r: (r.service_key, r.request_id))
    assert len(queue) == len(stay)
    assert list(queue) == stay
    assert [queue.pop() for _ in stay] == stay
    assert queue.peek() is None
    queue.push(requests[3])
    assert queue.peek() is requests[3]


def test_a_queue_lets_go_of_those_that_left() -> None:
    """Requests that leave from the middle are not kept in memory until the queue's head comes to them."""
    queue = RequestQueue(lambda request: request.service_key)
    requests = [Request(i, (1,), SamplingParams(), arrival=i) for i in range(1000)]
    for request in requests:
        queue.push(request)
    left = [weakref.ref(request) for request in requests[1:-5]]
    for request in requests[1:-5]:
        queue.remove(request)
    del requests, request
    gc.collect()
    assert sum(one() is not None for one in left) <= 64
    assert [one.request_id for one in queue] == [0, 995, 996, 997, 998, 999]


def test_whoever_comes_back_to_a_queue_stands_once_at_its_new_place() -> None:
    queue = RequestQueue(lambda request: request.service_key)
    requests = [Request(i, (1,), SamplingParams(), arrival=i) for i in range(3)]
    for request in requests:
        queue.push(request)
    queue.remove(requests[0])
    requests[0].arrival = 9
    queue.push(requests[0])
    assert [one.request_id for one in queue] == [1, 2, 0]
    assert [queue.pop().request_id for _ in range(3)] == [1, 2, 0]
    assert queue.peek() is None
