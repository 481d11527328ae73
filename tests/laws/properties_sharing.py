"""Laws of sharing within one step, of equal content, and of admission, as functions of a block manager class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

from hypothesis import example, given
from hypothesis import strategies as st

from minipaged.memory import blocks, tables
from minipaged.memory.types import Admission
from tests.laws.properties import PROMPT, SIZE, Make, computed

STEPS = st.integers(1, 8)


def planning(make: Make, *args: Any, **settings: Any) -> Any:
    """A manager whose caller ends its plans, in the middle of the first."""
    manager = make(*args, **settings)
    manager.end_step()
    manager.begin_step()
    return manager


def equal_prefixes_are_computed_once(make: Make) -> None:
    """L65: of prompts that come in one after another, in one step or several, by chunks of any size, each full block is computed once."""

    @given(
        PROMPT, st.lists(st.lists(st.integers(0, 1), max_size=4), min_size=1, max_size=4), SIZE, STEPS, st.booleans()
    )
    def check(common: list[int], tails: list[list[int]], size: int, chunk: int, one_step: bool) -> None:
        manager = planning(make, 512, size)
        known: set[tuple[int, ...]] = set()  # prefixes that end where a block ends
        for seq, prompt in enumerate([*common, *tail, 2] for tail in tails):
            hit = manager.lookup(prompt)
            done = min(len(prompt), hit.num_tokens + chunk)
            got = manager.allocate(seq, prompt, num_tokens=done, hit=hit)
            expected = max(end for end in range(0, len(prompt), size) if not end or tuple(prompt[:end]) in known)
            assert got.cached_tokens == expected, f"{prompt} found {got.cached_tokens} of {expected} tokens"
            manager.mark_computed(seq, prompt[got.cached_tokens : done])
            while done < len(prompt):
                if not one_step:
                    manager.end_step()
                    manager.begin_step()
                more = prompt[done : done + chunk]
                manager.append(seq, len(more))
                manager.mark_computed(seq, more)
                done += len(more)
            known |= {tuple(prompt[:end]) for end in range(size, len(prompt) + 1, size)}

    check()


def a_withdrawn_writer_takes_its_promise_back(make: Make) -> None:
    """L29: who leaves the step it was to write in can no longer be found there; who leaves when the plan is final, still can."""

    @given(PROMPT, SIZE, st.sampled_from(["free", "truncate", "swap_out"]), st.booleans(), st.integers(0, 15))
    def check(prompt: list[int], size: int, way: str, final: bool, before: int) -> None:
        manager = planning(make, 64, size, num_host_blocks=64)
        before %= len(prompt)
        manager.allocate(0, prompt)
        manager.mark_computed(0, prompt[:before])
        manager.end_step()
        manager.begin_step()
        manager.mark_computed(0, prompt[before:])
        handle = manager.lookup([*prompt, 9])
        assert handle.num_tokens == len(prompt) // size * size
        if final:
            manager.end_step()
        leave(manager, way, before)
        expected = len(prompt) if final else before
        assert handle.num_tokens == expected // size * size
        if way != "swap_out" or not final:
            assert manager.match_prefix([*prompt, 9]) == expected // size * size

    check()


def leave(manager: Any, way: str, before: int) -> None:
    """Sequence 0 leaves the step, one way or another."""
    if way == "free":
        manager.free(0)
    elif way == "truncate":
        manager.truncate(0, before)
    else:
        assert manager.swap_out([0]) is not None


def a_writer_whose_block_was_hit_stays(make: Make) -> None:
    """L29: once somebody counts on what a step is to write, its writer cannot leave that step, and the refusal changes nothing."""

    @given(st.integers(1, 3), SIZE, st.sampled_from(["free", "truncate", "swap_out"]), st.booleans())
    def check(num_full: int, size: int, way: str, reader_leaves: bool) -> None:
        manager = planning(make, 64, size, num_host_blocks=64)
        prompt = [1] * (num_full * size)
        manager.allocate(0, prompt)
        manager.mark_computed(0, prompt)
        assert manager.allocate(1, [*prompt, 2]).cached_tokens == len(prompt)
        manager.take_events()
        before = (manager.table(0), manager.table(1), manager.usage())
        refused(lambda: leave(manager, way, 0))
        assert (manager.table(0), manager.table(1), manager.usage(), manager.take_events()) == (*before, ())
        assert manager.swap_out([1]) is None, "a swap-out would read the block before it is written"
        if size > 1:
            refused(lambda: manager.truncate(1, size - 1))  # its next write would copy the block before it is written
        if reader_leaves:
            manager.free(1)
        else:
            manager.end_step()
        leave(manager, way, 0)
        found = 0 if reader_leaves else len(prompt)
        assert manager.match_prefix([*prompt, 2]) == found

    check()


def refused(call: Callable[[], object]) -> None:
    """The call must raise a ValueError."""
    try:
        call()
    except ValueError:
        return
    raise AssertionError("it was accepted")


def what_a_step_writes_is_not_forked_in_it(make: Make) -> None:
    """L29, L16: copies run before writes, so a sequence is forked, and its entries are released, when the plan is final."""

    @given(PROMPT, SIZE)
    def check(prompt: list[int], size: int) -> None:
        manager = planning(make, 64, size)
        manager.allocate(0, prompt)
        manager.mark_computed(0, prompt)
        refused(lambda: manager.fork(0, 1))
        refused(lambda: manager.release(0, [0]))
        manager.end_step()
        manager.fork(0, 1)
        assert manager.table(1) == manager.table(0)

    check()


def a_promise_keeps_its_copy_until_the_plan_is_final(make: Make) -> None:
    """L14, L16: a sequence that copied, named what it will write, and leaves the step all the same has its original back."""

    @given(st.integers(2, 5), st.booleans())
    def check(size: int, final: bool) -> None:
        manager = planning(make, 16, size)
        computed(manager, 0, [1] * (size - 1))
        manager.end_step()
        manager.fork(0, 1)
        manager.begin_step()
        before = manager.table(0)
        assert manager.append(0, 1).copies
        manager.mark_computed(0, [2])
        if final:
            manager.end_step()
        manager.truncate(0, size - 1)
        assert (manager.table(0) == before) is not final
        found = manager.match_prefix([*[1] * (size - 1), 2, 3])
        assert found == (size if final else 0)

    check()


def equal_content_is_remembered_twice(make: Make) -> None:
    """L33, L66: equal tokens computed side by side: tables stay, the first published is found, and when it is evicted the others are."""

    @given(st.integers(1, 3), SIZE, st.permutations(range(3)), st.permutations(range(3)))
    def check(num_full: int, size: int, order: list[int], leaving: list[int]) -> None:
        manager = make(3 * num_full + 1, size)
        prompt = [1] * (num_full * size)
        manager.begin_step()
        for seq in range(3):
            manager.allocate(seq, prompt)
        held = {seq: manager.table(seq) for seq in range(3)}
        for seq in order:
            manager.mark_computed(seq, prompt)
        assert held == {seq: manager.table(seq) for seq in range(3)}, "live tables are never rewritten"
        left = list(order)
        for gone in leaving:
            hit = manager.allocate(8, [*prompt, 2], num_tokens=len(prompt))
            found = -1 if hit is None else hit.cached_tokens
            assert found == len(prompt), f"of {order} {left} are left, and hold it"
            assert manager.table(8) == held[left[0]], f"published in the order {order}, of which {left} are left"
            manager.free(8)
            manager.free(gone)
            left.remove(gone)
            evicting = manager.allocate(10 + gone, [5] * len(prompt))
            assert set(evicting.new_blocks) == set(held[gone])
        assert manager.match_prefix([*prompt, 2]) == 0

    check()


def what_can_be_held_is_admitted(make: Make) -> None:
    """L68: samples of one prompt are refused exactly if their shared blocks and their own tails exceed an empty pool; what is not
    refused can be held."""

    @example(5, 4, 3, 4, 7)  # each sample has a tail of its own: they need 7 blocks and not 5
    @given(st.integers(1, 14), st.integers(1, 6), st.integers(1, 4), SIZE, st.integers(2, 24))
    def check(prompt: int, new: int, samples: int, size: int, num_blocks: int) -> None:
        manager = make(num_blocks, size, watermark=0.0)
        shared = prompt // size
        needed = shared + samples * (-(-(prompt + new) // size) - shared)
        asked = manager.can_admit(prompt, new, num_sequences=samples)
        assert (asked is Admission.NEVER) == (needed > num_blocks - 1), f"{asked}: {needed} of {num_blocks - 1}"
        if asked is Admission.NEVER:
            return
        assert asked is Admission.OK
        manager.begin_step()
        computed(manager, 0, [1] * prompt)
        for sample in range(1, samples):
            manager.fork(0, sample)
        for step in range(new):
            manager.begin_step()
            for sample in range(samples):
                assert manager.append(sample, 1) is not None
                manager.mark_computed(sample, [sample + step])
        assert manager.usage().referenced <= needed

    check()


def a_prompt_is_hashed_once(make: Make) -> None:
    """L68: from the first look to its last published block a prompt's blocks are each hashed once, however often it is asked about."""

    @given(PROMPT, SIZE, st.integers(0, 3), st.integers(0, 16))
    def check(prompt: list[int], size: int, questions: int, cached: int) -> None:
        manager = make(64, size)
        manager.begin_step()
        if prompt[:cached]:
            computed(manager, 0, prompt[:cached])
        with (
            mock.patch.object(blocks, "next_key", wraps=blocks.next_key) as asked,
            mock.patch.object(tables, "next_key", asked),
        ):
            hit = manager.lookup(prompt)
            for _ in range(questions):
                manager.can_admit(len(prompt), 3, hit=hit)
                assert hit.num_tokens == min(cached, len(prompt) - 1) // size * size
            got = manager.allocate(1, prompt, hit=hit)
            looked = asked.call_count
            manager.mark_computed(1, prompt[got.cached_tokens :])
        found = got.cached_tokens // size
        assert looked <= found + 1, "one more is asked for, which nobody has"
        assert asked.call_count <= len(prompt) // size + 1

    check()


def a_handle_finds_what_is_there_now(make: Make) -> None:
    """L29, L68: a handle keeps keys and no blocks: what was evicted since is not found, what was published since is."""

    @given(st.integers(1, 3), SIZE, st.sampled_from([None, "a"]), st.sampled_from([None, "a"]))
    def check(num_full: int, size: int, salt: str | None, own: str | None) -> None:
        manager = make(num_full + 2, size)
        prompt = [1] * (num_full * size)
        handle = manager.lookup([*prompt, 2], salt=salt)
        manager.begin_step()
        assert handle.num_tokens == 0
        computed(manager, 0, prompt, salt=salt)
        assert handle.num_tokens == len(prompt)
        got = manager.allocate(1, [*prompt, 2], num_tokens=len(prompt), salt=own, hit=handle) if own == salt else None
        assert own != salt or got.cached_tokens == len(prompt)
        if got is not None:
            manager.free(1)
        manager.free(0)
        manager.begin_step()
        assert manager.allocate(2, [*prompt, 2], num_tokens=0, salt=own, hit=handle).cached_tokens == 0
        manager.free(2)
        computed(manager, 3, [3] * ((num_full + 1) * size))
        assert handle.num_tokens == 0
        assert manager.allocate(4, [*prompt, 2], num_tokens=0, hit=handle).cached_tokens == 0
        refused(lambda: manager.allocate(5, [*prompt, 3], num_tokens=0, hit=handle))
        refused(lambda: manager.can_admit(1, hit=prompt))

    check()
