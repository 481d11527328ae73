"""What belongs to a block travels with it: copies and swaps move every tensor of the pool, the scales of quantized KV as well.

A prefix hit moves nothing: whoever finds a block reads its number in every tensor. So scales can only be lost where blocks are copied or
swapped; the mutants at the end do that, and the test must find each.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minipaged.execution.paged_kv import PagedKV
from minipaged.model.loading.shapes import shape
from minipaged.scheduling.plan import Pairs

BLOCKS, HOST = 6, 4
MOVES = st.lists(st.tuples(st.sampled_from(["copy", "out", "in"]), st.integers(0, 5), st.integers(0, 5)), max_size=12)


def with_scales(kind: type[PagedKV]) -> PagedKV:
    """A pool of int8 codes and their scales, every block of every tensor another."""
    store = kind(shape("toy"), BLOCKS, 2, num_host_blocks=HOST, kept_as="int8")
    for at, tensor in enumerate((*store.tensors.values(), *store.host.values())):
        for block, content in enumerate(tensor):
            content.copy_((torch.arange(content.numel()) * (block + 1) + 7 * at).reshape(content.shape) % 127)
    return store


def follow(kind: type[PagedKV], moves: list[tuple[str, int, int]]) -> None:
    """The moves on a pool, and on lists that remember which block each block's content came from."""
    store, first = with_scales(kind), with_scales(PagedKV)
    device, host = [("device", i) for i in range(BLOCKS)], [("host", i) for i in range(HOST)]
    for move, source, target in moves:
        if move == "copy" and source != target:
            store.copy(((source, target),))
            device[target] = device[source]
        elif move == "out" and target < HOST:
            store.swap_out(((source, target),))
            host[target] = device[source]
        elif move == "in" and source < HOST:
            store.swap_in(((source, target),))
            device[target] = host[source]
    for name in store.tensors:
        began = {"device": first.tensors[name], "host": first.host[name]}
        for place, now, came in (("device", store.tensors, device), ("host", store.host, host)):
            for block, (where, i) in enumerate(came):
                assert torch.equal(now[name][block], began[where][i]), (
                    f"{name} of {place} block {block} did not come along"
                )


@given(MOVES)
def test_L70_all_tensors_of_a_block_travel_together(moves: list[tuple[str, int, int]]) -> None:
    follow(PagedKV, moves)


class ScalesLostInCopies(PagedKV):
    """A copy moves keys and values and leaves the scales behind."""

    def copy(self, pairs: Pairs) -> None:
        kept = self.tensors["value_scale.0"].clone()
        super().copy(pairs)
        self.tensors["value_scale.0"].copy_(kept)


class ScalesLostInSwaps(PagedKV):
    """A block comes back from the host with the scales of whoever was there before."""

    def swap_in(self, pairs: Pairs) -> None:
        kept = self.tensors["value_scale.0"].clone()
        super().swap_in(pairs)
        self.tensors["value_scale.0"].copy_(kept)


class ValuesStay(PagedKV):
    """A swap moves the keys only."""

    def swap_out(self, pairs: Pairs) -> None:
        kept = self.host["value.0"].clone()
        super().swap_out(pairs)
        self.host["value.0"].copy_(kept)


@pytest.mark.parametrize("mutant", [ScalesLostInCopies, ScalesLostInSwaps, ValuesStay])
def test_L70_what_is_left_behind_is_found(mutant: type[PagedKV]) -> None:
    with pytest.raises(AssertionError, match="did not come along"):
        follow(mutant, [("copy", 1, 2), ("out", 2, 0), ("in", 0, 3)])
