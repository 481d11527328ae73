"""Laws of the memory that are shown best by themselves (properties*.py). Each docstring is the law in one sentence."""

from __future__ import annotations

import pytest

from tests.laws import properties, properties_cache, properties_sharing, properties_steps
from tests.laws.call_replay import noting


@pytest.fixture(scope="session")
def block_manager_class(block_manager_class: type) -> type:
    """What --block-manager names, its calls noted for a replay."""
    return noting(block_manager_class)


def test_L05_eviction_follows_the_recorded_order(block_manager_class: type) -> None:
    """The free list's order is the recorded one under any mix of push, pop and remove."""
    properties.eviction_follows_the_recorded_order(block_manager_class)


def test_L05_leaving_the_middle_takes_constant_time(block_manager_class: type) -> None:
    """Removal from the middle of the free list is O(1)."""
    properties.leaving_the_middle_takes_constant_time(block_manager_class)


def test_L07_failing_touches_nothing(block_manager_class: type) -> None:
    """A failed allocation changes nothing: no touch, no eviction, no leak, whatever part of it had succeeded."""
    properties_cache.failing_touches_nothing(block_manager_class)


def test_L08_an_idle_pool_takes_what_fits(block_manager_class: type) -> None:
    """The capacity check counts hit blocks that are themselves evictable exactly once."""
    properties.idle_pool_takes_what_fits(block_manager_class)


def test_L16_given_up_copies_read_the_original(block_manager_class: type) -> None:
    """A fork of a block whose copy is pending copies from the original."""
    properties.given_up_copies_read_the_original(block_manager_class)


def test_L16_L20_the_original_is_kept_for_who_may_come_back(block_manager_class: type) -> None:
    """A block that a pending copy was made from is not written where the copy's writer may come back to."""
    properties.the_original_is_kept_for_who_may_come_back(block_manager_class)


def test_L17_n_sharers_copy_n_minus_1_times(block_manager_class: type) -> None:
    """n sharers of a partial tail cost at most n - 1 copies; a prompt that fills its blocks costs none."""
    properties.sharers_copy_once_less(block_manager_class)


def test_L18_beams_fork_before_losers_are_freed(block_manager_class: type) -> None:
    """A beam step forks the winners before it frees the losers; blocks that reach 0 come back."""
    properties.beams_share_what_they_can(block_manager_class)


def test_L21_L24_L27_L28_full_blocks_and_no_others_are_found(block_manager_class: type) -> None:
    """Only full blocks of reported tokens are hashed, by requests that do not read the cache too; one token is left to compute."""
    properties_cache.full_blocks_and_no_others_are_found(block_manager_class)


def test_L22_L25_prefixes_and_salts_are_part_of_the_key(block_manager_class: type) -> None:
    """The same tokens behind another prefix never match, and a salt isolates everything after it."""
    properties_cache.prefixes_and_salts_are_part_of_the_key(block_manager_class)


def test_L23_the_first_miss_ends_a_hit_though_more_is_cached(block_manager_class: type) -> None:
    """A hit is a prefix: the first miss ends it."""
    properties_cache.the_first_miss_ends_a_hit(block_manager_class)


def test_L29_L32_rewritten_blocks_are_not_found(block_manager_class: type) -> None:
    """No hit names a block whose content has changed."""
    properties_cache.rewritten_blocks_are_not_found(block_manager_class)


def test_L22_L47_swapped_sequences_go_on_publishing(block_manager_class: type) -> None:
    """Keys travel with a swapped sequence: what it computes later is found behind what it computed before."""
    properties_cache.swapped_sequences_go_on_publishing(block_manager_class)


def test_L26_chosen_tokens_do_not_collide(block_manager_class: type) -> None:
    """A digest collision is harmless: the key is cryptographic, never the built-in hash."""
    properties.keys_survive_chosen_tokens(block_manager_class)


def test_L30_the_tail_leaves_first(block_manager_class: type) -> None:
    """Blocks are freed tail first, so that the deepest go first on a tie."""
    properties.tail_leaves_first(block_manager_class)


def test_L33_L66_equal_content_is_remembered_twice(block_manager_class: type) -> None:
    """Duplicate contents: the first published is found, then the others; evicting one loses nothing, and no table is rewritten."""
    properties_sharing.equal_content_is_remembered_twice(block_manager_class)


def test_L65_equal_prefixes_are_computed_once(block_manager_class: type) -> None:
    """In one step or several, by chunks of any size: what is computed is the union of the prefixes."""
    properties_sharing.equal_prefixes_are_computed_once(block_manager_class)


def test_L29_a_withdrawn_writer_takes_its_promise_back(block_manager_class: type) -> None:
    """No hit names a block whose writer left the step that was to write it."""
    properties_sharing.a_withdrawn_writer_takes_its_promise_back(block_manager_class)


def test_L29_a_writer_whose_block_was_hit_stays(block_manager_class: type) -> None:
    """A hit in a step binds the writer to that step."""
    properties_sharing.a_writer_whose_block_was_hit_stays(block_manager_class)


def test_L16_L29_what_a_step_writes_is_not_forked_in_it(block_manager_class: type) -> None:
    """Copies run before writes, so nothing that the step is to write may be copied in it."""
    properties_sharing.what_a_step_writes_is_not_forked_in_it(block_manager_class)


def test_L14_L16_a_promise_keeps_its_copy(block_manager_class: type) -> None:
    """A copy can be given up until the plan is final, though its writer has named what it will write."""
    properties_sharing.a_promise_keeps_its_copy_until_the_plan_is_final(block_manager_class)


def test_L29_L68_a_handle_finds_what_is_there_now(block_manager_class: type) -> None:
    """A handle keeps a prompt's keys and never a block."""
    properties_sharing.a_handle_finds_what_is_there_now(block_manager_class)


def test_L68_what_can_be_held_is_admitted(block_manager_class: type) -> None:
    """NEVER only if the request, with its own sharing, cannot fit an empty pool."""
    properties_sharing.what_can_be_held_is_admitted(block_manager_class)


def test_L68_a_prompt_is_hashed_once(block_manager_class: type) -> None:
    """Looked up, asked about, allocated and published: one hash a block."""
    properties_sharing.a_prompt_is_hashed_once(block_manager_class)


def test_L47_out_then_in_is_the_identity(block_manager_class: type) -> None:
    """A swap moves each shared block once and keeps the sharing; out then in is the identity on contents."""
    properties_steps.swapping_is_the_identity(block_manager_class)


def test_L47_what_others_hold_stays(block_manager_class: type) -> None:
    """A block that others hold is copied out and stays."""
    properties_steps.what_others_hold_stays(block_manager_class)


def test_L49_swap_in_leaves_room_for_the_next_step(block_manager_class: type) -> None:
    """Swap-in needs its blocks plus those of its next step, plus the watermark."""
    properties_steps.swap_in_leaves_room_for_the_next_step(block_manager_class)


def test_L49_an_idle_pool_has_no_watermark(block_manager_class: type) -> None:
    """The watermark does not keep a swapped request out while nothing runs."""
    properties_steps.swap_in_ignores_the_watermark_when_idle(block_manager_class)


def test_L52_sources_wait_for_the_next_step(block_manager_class: type) -> None:
    """A block that a step copies or swaps from is not handed out again within that step."""
    properties_steps.sources_wait_for_the_next_step(block_manager_class)


def test_L16_L52_host_blocks_serve_one_swap_a_step(block_manager_class: type) -> None:
    """Inside a step's swaps no host block is written twice, or both read and written."""
    properties_steps.host_blocks_serve_one_swap_a_step(block_manager_class)


def test_L53_an_abort_between_fork_and_write(block_manager_class: type) -> None:
    """An abort in any state, between fork and write too, returns everything."""
    properties_steps.aborts_return_everything(block_manager_class)


def test_L56_windows_stay_small(block_manager_class: type) -> None:
    """Blocks wholly outside the window go back once; live blocks are at most ceil((W - 1) / B) + 1 beyond the chunk."""
    properties_steps.windows_stay_small(block_manager_class)
