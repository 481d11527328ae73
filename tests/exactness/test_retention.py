"""Windows and sinks over pages against their definitions, at every step: any block size, chunks, preemption, forks and cached prefixes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipaged.config import SamplingParams
from minipaged.memory.retention import KEEP_ALL, Retention
from tests.exactness.retained import TINY, assert_as_defined, engine_of, run_watched, tiny_model
from tests.kernels.paged_cases import examples

MODEL = tiny_model()
GREEDY = SamplingParams(max_tokens=30, ignore_eos=True)
KINDS = {
    "greedy": SamplingParams(max_tokens=20, ignore_eos=True),
    "samples": SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=14, ignore_eos=True),
    "beams": SamplingParams(beam_width=3, max_tokens=10, ignore_eos=True),
}


@st.composite
def workloads(draw: st.DrawFn) -> list[tuple[list[int], SamplingParams]]:
    stem = draw(st.lists(st.integers(0, 66), min_size=1, max_size=30))
    asked = []
    for _ in range(draw(st.integers(1, 3))):
        tail = draw(st.lists(st.integers(0, 66), max_size=12))
        asked.append((stem[: draw(st.integers(1, len(stem)))] + tail, KINDS[draw(st.sampled_from(sorted(KINDS)))]))
    return asked


arrangements = st.fixed_dictionaries(
    {
        "block_size": st.sampled_from([1, 2, 4, 5, 16]),
        "num_host_blocks": st.sampled_from([0, 100]),
        "prefix_caching": st.booleans(),
        "preemption": st.sampled_from(["recompute", "swap"]),
        "max_num_batched_tokens": st.sampled_from([4, 9, 500]),
        "depth": st.sampled_from([0, 1]),
    }
)


def tight_pool(retention: Retention, asked: list[tuple[list[int], SamplingParams]], arrangement: dict[str, Any]) -> int:
    """Blocks that just hold the largest request."""
    size, chunk = arrangement["block_size"], arrangement["max_num_batched_tokens"]
    return 1 + max(
        retention.most_blocks_of_request(len(prompt), params.max_tokens, params.num_sequences, size, chunk)
        for prompt, params in asked
    )


@examples(12)
@given(window=st.integers(1, 24), asked=workloads(), arrangement=arrangements, slack=st.sampled_from([0, 3, 200]))
def test_L56_L71_a_window_is_its_definition(
    window: int, asked: list[tuple[list[int], SamplingParams]], arrangement: dict[str, Any], slack: int
) -> None:
    """Where blocks go back behind a window, every position is computed as if no memory had ever been given back."""
    retention = Retention(window)
    engine, runner = engine_of(
        MODEL, retention, num_blocks=tight_pool(retention, asked, arrangement) + slack, **arrangement
    )
    run_watched(engine, asked, retention)
    run_watched(engine, asked, retention)  # once more, with what the prefix cache has kept
    assert_as_defined(runner, MODEL, retention)


def test_L56_a_long_stream_needs_a_short_table() -> None:
    """What a sequence holds, in the pool and in its table, does not grow with its length."""
    retention = Retention(10)
    engine, runner = engine_of(MODEL, retention, block_size=4, num_blocks=8, max_num_batched_tokens=4)
    most = 0
    output = engine.ask([1, 2, 3], replace(GREEDY, max_tokens=300))
    while engine.has_work:
        engine.step()
        most = max(most, engine.scheduler.manager.usage().referenced)
    assert len(output.outputs[0].token_ids) == 300
    assert most <= -(-(10 - 1) // 4) + 1
    assert runner.widest <= -(-(10 - 1) // 4) + 2  # the block that the next token is written to
    assert_as_defined(runner, MODEL, retention)


def test_a_long_prompt_needs_no_room_for_all_of_itself() -> None:
    """Admission counts the window and a chunk; what holds less is refused."""
    retention = Retention(8)
    prompt = [i % 60 for i in range(200)]
    engine, runner = engine_of(MODEL, retention, block_size=4, num_blocks=8, max_num_batched_tokens=8)
    run_watched(engine, [(prompt, GREEDY)], retention)
    assert_as_defined(runner, MODEL, retention)
    small, _ = engine_of(MODEL, retention, block_size=4, num_blocks=5, max_num_batched_tokens=8)
    output = small.ask(prompt, GREEDY)
    assert output.error is not None
    assert "window:8" in output.error
    assert "max_num_batched_tokens" in output.error


def test_L23_a_hit_needs_only_the_blocks_of_the_window() -> None:
    """The prefix cache answers with null entries for what the window has left behind, whether it is still there or not."""
    retention = Retention(6)
    prompt = [i % 60 for i in range(41)]
    engine, runner = engine_of(MODEL, retention, block_size=4, num_blocks=40)
    run_watched(engine, [(prompt, replace(GREEDY, max_tokens=1))], retention)
    manager = engine.scheduler.manager
    assert manager.match_prefix(prompt) == 40
    engine.scheduler.manager.begin_step()
    found = manager.allocate(10**6, prompt)
    assert found is not None
    assert found.cached_tokens == 40
    assert [i for i, block in enumerate(manager.table(10**6)) if block] == [8, 9, 10]
    manager.free(10**6)
    # Hand out all blocks but the window's two: the rest of the prefix is lost, and the hit is as long.
    keep = [manager.lookup(prompt).find(41)[i] for i in (8, 9)]
    for block in keep:
        manager.pin(block)
    other = [61] * (4 * manager.usage().free)
    manager.allocate(10**6 + 1, other, read_cache=False)
    manager.free(10**6 + 1)
    for block in keep:
        manager.unpin(block)
    assert manager.match_prefix(prompt) == 40
    [output] = run_watched(engine, [(prompt, GREEDY)], retention)
    assert output.num_cached_tokens == 40
    assert_as_defined(runner, MODEL, retention)


@pytest.mark.parametrize("full", [(), (1,), (0, 2)], ids=["every-layer", "one-full", "two-full"])
def test_windows_by_layer(full: tuple[int, ...]) -> None:
    """A model's own windows: the mask is each layer's, and blocks go back only if every layer has a window."""
    model = tiny_model(replace(TINY, sliding_window=7, full_layers=full))
    retention = KEEP_ALL if full else Retention(7)
    engine, runner = engine_of(model, retention, block_size=4, num_blocks=30, max_num_batched_tokens=9)
    run_watched(engine, [([i % 50 for i in range(20)], GREEDY), ([3], GREEDY)], retention)
    assert_as_defined(runner, model, retention)


SINKS = st.builds(Retention, window=st.integers(1, 24), sinks=st.integers(1, 9))


@examples(12)
@given(retention=SINKS, asked=workloads(), arrangement=arrangements, slack=st.sampled_from([0, 3, 200]))
def test_L57_L58_L71_sinks_are_their_definition(
    retention: Retention, asked: list[tuple[list[int], SamplingParams]], arrangement: dict[str, Any], slack: int
) -> None:
    """StreamingLLM over pages: every position of every step as the definition has it, with the positions within the cache."""
    pool = tight_pool(retention, asked, arrangement) + slack
    engine, runner = engine_of(MODEL, retention, num_blocks=pool, **arrangement)
    run_watched(engine, asked, retention)
    run_watched(engine, asked, retention)
    assert_as_defined(runner, MODEL, retention)


def test_L57_a_stream_behind_sinks_has_no_end() -> None:
    """Far beyond what the model's context holds, with a table of a few blocks; the sinks' whole blocks stay."""
    model = tiny_model(replace(TINY, max_position=24))
    retention = Retention(14, 5)
    engine, runner = engine_of(model, retention, block_size=4, num_blocks=10, max_num_batched_tokens=6)
    output, first = engine.ask([1, 2, 3], replace(GREEDY, max_tokens=300)), ()
    while engine.has_work:
        engine.step()
        for sequence in engine.scheduler.sequences.values():
            table = engine.scheduler.manager.table(sequence.seq_id)
            if len(table) == 2:
                first = table[:2]
            assert table[:2] == first or len(table) < 2
            assert sum(map(bool, table)) <= retention.most_blocks(303, 4, 6)
    assert len(output.outputs[0].token_ids) == 300
    assert runner.widest <= 2 + -(-(14 - 1) // 4) + 2
    assert_as_defined(runner, model, retention)


@pytest.mark.parametrize("retention", [Retention(9, 3), Retention(9)], ids=str)
def test_layers_without_rope(retention: Retention) -> None:
    """What knows no distances sees the sinks as they are."""
    model = tiny_model(replace(TINY, unrotated_layers=(1,)))
    engine, runner = engine_of(model, retention, block_size=4, num_blocks=30, max_num_batched_tokens=9)
    run_watched(engine, [([i % 50 for i in range(20)], GREEDY), ([3], GREEDY)], retention)
    assert_as_defined(runner, model, retention)


def test_L58_nothing_is_published_behind_sinks_once_a_block_went() -> None:
    retention = Retention(8, 4)
    engine, _ = engine_of(MODEL, retention, block_size=4, num_blocks=60, max_num_batched_tokens=4)
    prompt = [i % 60 for i in range(60)]
    run_watched(engine, [(prompt, GREEDY)], retention)
    # Blocks 0 to 3 were full before the first one went, when 16 tokens were computed.
    published = engine.scheduler.manager.match_prefix(prompt)
    assert published <= 16


@pytest.mark.parametrize("prefix_caching", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("kept_as", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("retention", [Retention(9), Retention(9, 3)], ids=str)
def test_L60_L71_with_a_quantized_cache_samples_beams_and_preemption(
    retention: Retention, kept_as: str, prefix_caching: bool
) -> None:
    """All that goes together: the text is the same in a tight pool, by small chunks and blocks, as in a roomy one."""
    asked = [([n, *(i % 50 for i in range(22 + n))], params) for n, params in enumerate([*KINDS.values()] * 2)]

    def texts(**arrangement: Any) -> list[list[list[int]]]:
        options = {"kept_as": kept_as, "prefix_caching": prefix_caching, **arrangement}
        engine, _ = engine_of(MODEL, retention, **options)
        found = []
        for _ in range(2):
            outputs = run_watched(engine, asked, retention)
            found += [[o.token_ids for o in output.outputs] for output in outputs]
        if arrangement.get("num_blocks"):
            assert engine.scheduler.counters.preemptions > 0
        return found

    expected = texts(block_size=16)
    for preemption in ("recompute", "swap"):
        tight: dict[str, Any] = {"block_size": 2, "max_num_batched_tokens": 9, "num_host_blocks": 99}
        tight["num_blocks"] = tight_pool(retention, asked, tight)
        assert texts(preemption=preemption, **tight) == expected
