"""Laws that the state machine watches (machine.py): after every call of any mix of calls, on any small pool.

A failure leaves a replay, and its message the command that shows it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

Obeys = Callable[[str], None]
pytestmark = pytest.mark.timeout(7200)  # the long profile


def test_L01_pool_adds_up(obeys: Obeys) -> None:
    """Free + referenced + null = total, after every operation."""
    obeys("L01")


def test_L02_counts_are_table_entries_and_pins(obeys: Obeys) -> None:
    """A block's count is the number of table entries and pins that name it."""
    obeys("L02")


def test_L03_freeing_twice_raises(obeys: Obeys) -> None:
    """Freeing what is free, or using what was freed, raises and changes nothing."""
    obeys("L03")


def test_L04_a_block_is_free_exactly_at_count_0(obeys: Obeys) -> None:
    """A block can be handed out exactly when its count is 0; a cached one waits there as an eviction candidate."""
    obeys("L04")


def test_L06_the_null_block_stays_out_of_it(obeys: Obeys) -> None:
    """The null block is never handed out, freed, hashed or counted as free."""
    obeys("L06")


def test_L07_a_failed_call_changes_nothing(obeys: Obeys) -> None:
    """A call that finds no room, or is refused, leaves tables, counts, cache and eviction order as they were."""
    obeys("L07")


def test_L08_found_blocks_count_once(obeys: Obeys) -> None:
    """The capacity check counts found blocks that could themselves be evicted exactly once."""
    obeys("L08")


def test_L09_no_two_contents_in_one_block(obeys: Obeys) -> None:
    """Two logical blocks that are not shared never lie in one physical block."""
    obeys("L09")


def test_L10_table_length(obeys: Obeys) -> None:
    """A table has exactly ceil((tokens held or promised room) / B) entries."""
    obeys("L10")


def test_L11_need_minus_have(obeys: Obeys) -> None:
    """A new block is taken exactly when need exceeds have."""
    obeys("L11")


def test_L12_fork_counts(obeys: Obeys) -> None:
    """A fork allocates nothing, and every distinct block of the parent gains exactly 1."""
    obeys("L12")


def test_L13_copy_when_shared_and_partly_filled(obeys: Obeys) -> None:
    """A write copies the block when and only when it is shared and partly filled."""
    obeys("L13")


def test_L14_after_a_copy(obeys: Obeys) -> None:
    """After a copy the new block has count 1, the old one lost 1, the pair is returned, and no destination is a source."""
    obeys("L14")


def test_L15_the_last_sharer_writes_in_place(obeys: Obeys) -> None:
    """A block with one holder left is written in place."""
    obeys("L15")


def test_L16_batches_do_not_read_what_they_write(obeys: Obeys) -> None:
    """Within a step's swap-outs, swap-ins and copies no block is both source and destination; a given-up copy's source is the original."""
    obeys("L16")


def test_L20_freeing_one_leaves_the_others_whole(obeys: Obeys) -> None:
    """Freeing parent or child leaves tables and contents of the others as they were."""
    obeys("L20")


def test_L21_only_full_blocks_are_hashed(obeys: Obeys) -> None:
    """Only full blocks are published, and every full block's content can then be found."""
    obeys("L21")


def test_L22_a_key_covers_all_before_it(obeys: Obeys) -> None:
    """A block is found by its tokens, all that came before, and the salt, and by nothing less."""
    obeys("L22")


def test_L23_the_first_miss_ends_a_hit(obeys: Obeys) -> None:
    """A hit is a prefix."""
    obeys("L23")


def test_L24_one_token_is_left_to_compute(obeys: Obeys) -> None:
    """A hit on n tokens is at most floor((n - 1) / B) * B tokens."""
    obeys("L24")


def test_L25_a_salt_isolates(obeys: Obeys) -> None:
    """Nothing cached under one salt, or none, is found under another."""
    obeys("L25")


def test_L27_filling_without_reading(obeys: Obeys) -> None:
    """A request that does not read the cache finds nothing in it, yet fills it."""
    obeys("L27")


def test_L28_only_accepted_tokens_are_hashed(obeys: Obeys) -> None:
    """Tokens that were written and not yet reported are never hashed."""
    obeys("L28")


def test_L29_no_hit_before_the_write(obeys: Obeys) -> None:
    """A block that can be found holds what it is found by when the step that is planned has run, and is not written later; who leaves
    the step takes back what it was to write, unless somebody counts on it."""
    obeys("L29")


def test_L30_eviction_order(obeys: Obeys) -> None:
    """What is evicted is the least recently used cached block, the deepest of those freed together."""
    obeys("L30")


def test_L31_found_blocks_are_protected_first(obeys: Obeys) -> None:
    """A new table begins with the blocks that were found, and they keep their content."""
    obeys("L31")


def test_L32_handing_out_erases_the_key(obeys: Obeys) -> None:
    """A cached block that is handed out again can no longer be found."""
    obeys("L32")


def test_L33_the_first_published_is_found(obeys: Obeys) -> None:
    """Of blocks with equal content the one published first, of those left, is the one that is found."""
    obeys("L33")


def test_L34_no_reset_while_blocks_are_held(obeys: Obeys) -> None:
    """Resetting the cache is refused while a request holds blocks, and else forgets everything."""
    obeys("L34")


def test_L35_hits_count_tokens(obeys: Obeys) -> None:
    """An allocation reports its hits in tokens: whole blocks, exactly those it shares."""
    obeys("L35")


def test_L36_contents_do_not_depend_on_the_cache(obeys: Obeys) -> None:
    """Every sequence reads the dense model's values, with the cache on and off."""
    obeys("L36")


def test_L41_never_is_what_no_empty_pool_holds(obeys: Obeys) -> None:
    """Admission is NEVER exactly when all samples at full length, sharing their prompt's full blocks, exceed the pool."""
    obeys("L41")


def test_L42_the_watermark_gates_admission(obeys: Obeys) -> None:
    """Admission leaves the watermark free unless no sequence holds blocks; growth does not look at it."""
    obeys("L42")


def test_L47_a_swap_moves_each_block_once(obeys: Obeys) -> None:
    """A swap moves each shared block once, keeps the sharing, and out then in changes no content."""
    obeys("L47")


def test_L49_swap_in_needs_its_next_step(obeys: Obeys) -> None:
    """A swap-in needs its blocks, those of its next step, and the watermark unless nothing holds blocks."""
    obeys("L49")


def test_L52_sources_are_not_handed_out(obeys: Obeys) -> None:
    """A block that a step copies or swaps from is not handed out again within that step."""
    obeys("L52")


def test_L53_everything_comes_back(obeys: Obeys) -> None:
    """When all sequences have ended, in whatever state they were, both pools are free."""
    obeys("L53")


def test_L54_the_same_calls_give_the_same_blocks(obeys: Obeys) -> None:
    """Two managers that hear the same calls give the same results and tell the same events."""
    obeys("L54")


def test_L56_released_entries_go_back_once(obeys: Obeys) -> None:
    """A released entry is null from then on, its block loses one holder, and only full entries can be released."""
    obeys("L56")


def test_L58_nothing_is_published_after_an_eviction(obeys: Obeys) -> None:
    """A sequence that has released an entry publishes nothing it computes afterwards."""
    obeys("L58")


def test_L65_what_a_step_writes_can_be_shared_in_it(obeys: Obeys) -> None:
    """A full block can be found from the moment at which the step that writes it is planned, by whoever comes in from then on."""
    obeys("L65")


def test_L66_equal_content_is_remembered_twice(obeys: Obeys) -> None:
    """Every full block of every sequence can be found, whoever else holds the same content; nobody's leaving takes that away."""
    obeys("L66")


def test_L68_what_can_be_held_is_admitted(obeys: Obeys) -> None:
    """Admission is NEVER only if the request, with its own sharing, cannot fit an empty pool."""
    obeys("L68")


def test_events_rebuild_the_tables(obeys: Obeys) -> None:
    """The block tables can be rebuilt from the events alone."""
    obeys("EVENTS")
