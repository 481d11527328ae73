"""Heavy hitters over pages against a dense simulation, at every step: what each layer and KV head keeps, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipaged.config import SamplingParams
from minipaged.memory.retention import Retention
from minipaged.scheduling.request import RequestOutput
from tests.exactness.retained import TINY, engine_of, heaviest_by_definition, kept_by_engine, run_watched, tiny_model
from tests.kernels.paged_cases import examples

MODEL = tiny_model()
KINDS = {
    "greedy": SamplingParams(max_tokens=16, ignore_eos=True),
    "samples": SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=10, ignore_eos=True),
}
CLOSE = 1e-5  # scores that differ by less may be in either order: the engine adds up in another one


@dataclass
class Compared:
    """How many states were compared, and how many were left out behind two scores that are too close."""

    states: int = 0
    left_out: int = 0
    evicted: int = 0


def assert_as_simulated(runner: Any, retention: Retention, most: float = 1e-3) -> Compared:
    """Every hidden state and every kept set is the simulation's, up to the first close decision of each sequence."""
    count = Compared()
    states: dict[int, list[Any]] = {}
    for sequence, start, hidden in runner.seen:
        states.setdefault(id(sequence), [sequence]).append((start, hidden))
    for key, (sequence, *rows) in states.items():
        expected, sets = heaviest_by_definition(
            runner.model, sequence.token_ids, retention, sequence.request.num_prompt
        )
        margins = np.min([head.margins for layer in sets for head in layer], axis=0)
        close = np.flatnonzero(margins < CLOSE)
        last = (
            int(close[0]) if len(close) else len(sequence.token_ids)
        )  # its query is as it should be, what it keeps may not be
        for start, hidden in rows:
            sound = max(0, min(len(hidden), last + 1 - start))
            count.states += sound
            count.left_out += len(hidden) - sound
            far = (hidden[:sound] - expected[start : start + sound]).abs().max().item() if sound else 0.0
            assert far < most, f"sequence {sequence.seq_id}, positions from {start}: {far:g} from the definition"
        for query, layers in runner.kept.get(key, {}).items():
            if query < last:
                wanted = [[np.flatnonzero(head.kept[query]).tolist() for head in layer] for layer in sets]
                assert layers == wanted, f"sequence {sequence.seq_id}: what is kept behind position {query}"
                count.evicted += query + 1 - len(layers[0][0])
    return count


@st.composite
def workloads(draw: st.DrawFn) -> list[tuple[list[int], SamplingParams]]:
    prompts = st.lists(st.integers(0, 66), min_size=1, max_size=26)
    return [(draw(prompts), KINDS[draw(st.sampled_from(sorted(KINDS)))]) for _ in range(draw(st.integers(1, 3)))]


arrangements = st.fixed_dictionaries(
    {
        "block_size": st.sampled_from([1, 2, 4, 5, 16]),
        "num_host_blocks": st.sampled_from([0, 150]),
        "preemption": st.sampled_from(["recompute", "swap"]),
        "policy": st.sampled_from(["fcfs", "priority"]),
        "max_num_batched_tokens": st.sampled_from([4, 9, 500]),
        "depth": st.sampled_from([0, 1]),
    }
)


def tight_pool(retention: Retention, asked: list[tuple[list[int], SamplingParams]], block_size: int) -> int:
    """Blocks that just hold the largest request."""
    return 1 + max(
        retention.most_blocks_of_request(len(prompt), params.max_tokens, params.num_sequences, block_size)
        for prompt, params in asked
    )


@examples(9)
@given(
    retention=st.builds(Retention, heavy=st.integers(1, 9), recent=st.integers(1, 9)),
    asked=workloads(),
    arrangement=arrangements,
    slack=st.sampled_from([0, 2, 200]),
)
def test_L59_L72_heavy_hitters_are_the_simulation(
    retention: Retention, asked: list[tuple[list[int], SamplingParams]], arrangement: dict[str, Any], slack: int
) -> None:
    """Whatever the blocks, chunks, samples and preemptions: each KV head keeps what the simulation keeps, and each position is computed
    from that alone."""
    pool = tight_pool(retention, asked, arrangement["block_size"]) + slack
    engine, runner = engine_of(MODEL, retention, num_blocks=pool, **arrangement)
    with kept_by_engine(runner):
        run_watched(engine, asked, retention)
        assert engine.scheduler.manager.usage().cached == 0, "L58: what no other sequence may read can be found"
    assert_as_simulated(runner, retention)


def test_L72_swapped_sequences_keep_their_scores() -> None:
    """In a pool that holds one of four, all are swapped out and in again and keep what they would have kept."""
    retention = Retention(heavy=6, recent=4)
    asked = [([n, *(i * n % 50 for i in range(9 + n))], replace(KINDS["greedy"], max_tokens=22)) for n in (1, 2, 3, 5)]
    for policy in ("fcfs", "priority"):
        limits = {"num_host_blocks": 60, "preemption": "recompute", "policy": policy}
        engine, runner = engine_of(MODEL, retention, num_blocks=13, block_size=2, max_num_batched_tokens=6, **limits)
        with kept_by_engine(runner):
            ranked = [(prompt, replace(params, priority=-n)) for n, (prompt, params) in enumerate(asked)]
            run_watched(engine, ranked, retention)
        counters = engine.scheduler.counters
        assert counters.swaps == counters.preemptions > 0
        compared = assert_as_simulated(runner, retention)
        assert compared.left_out == 0
        assert compared.evicted > 300


def test_without_a_host_pool_nobody_is_sent_away() -> None:
    """Only as many are let in as the pool holds to their ends; all of them end."""
    retention = Retention(heavy=4, recent=4)
    asked = [([n, *range(20)], replace(KINDS["greedy"], priority=-n)) for n in range(5)]
    for policy in ("fcfs", "priority"):
        engine, runner = engine_of(MODEL, retention, num_blocks=14, block_size=4, policy=policy)
        with kept_by_engine(runner):
            outputs = run_watched(engine, asked, retention)
        assert all(len(output.outputs[0].token_ids) == 16 for output in outputs)
        assert engine.scheduler.counters.preemptions == 0
        assert assert_as_simulated(runner, retention).left_out == 0


def test_L59_a_sequence_holds_its_budget_in_fixed_blocks() -> None:
    """Once its prompt is computed its table never changes, and holds heavy + recent slots."""
    retention = Retention(heavy=8, recent=8)
    engine, _ = engine_of(MODEL, retention, num_blocks=14, block_size=4)
    output, tables = engine.ask([i % 60 for i in range(50)], replace(KINDS["greedy"], max_tokens=60)), set()
    while engine.has_work:
        engine.step()
        for sequence in engine.scheduler.sequences.values():
            if sequence.num_output:
                tables.add(engine.scheduler.manager.table(sequence.seq_id))
    assert len(output.outputs[0].token_ids) == 60
    assert [len(table) for table in tables] == [4]
    # A prompt that the pool cannot hold, though it holds the budget, is refused with the reason.
    refused = engine.ask(list(range(60)), KINDS["greedy"])
    assert refused.error is not None
    assert "h2o:8+8" in refused.error


def test_beams_are_refused_by_name() -> None:
    engine, _ = engine_of(MODEL, Retention(heavy=8, recent=8))
    refused = engine.ask([1, 2, 3], SamplingParams(beam_width=2, max_tokens=4))
    assert refused.error is not None
    assert "beam_width does not go with retention h2o:8+8" in refused.error


@pytest.mark.parametrize("kept_as", ["int8", "float8_e4m3fn"])
def test_L60_L72_with_a_quantized_cache(kept_as: str) -> None:
    """Scales move with what stays: the text is the same in a tight pool, by small chunks and blocks and after swaps, as in a roomy one."""
    retention = Retention(heavy=7, recent=6)
    asked = [([n, *(i % 50 for i in range(22 + n))], params) for n, params in enumerate([*KINDS.values()] * 2)]

    def texts(**arrangement: Any) -> list[list[list[int]]]:
        engine, _ = engine_of(MODEL, retention, kept_as=kept_as, **arrangement)
        outputs: list[RequestOutput] = run_watched(engine, asked, retention)
        assert bool(engine.scheduler.counters.swaps) == ("num_blocks" in arrangement)
        return [[o.token_ids for o in output.outputs] for output in outputs]

    tight = tight_pool(retention, asked, 2)
    expected = texts(block_size=16)
    assert texts(block_size=2, num_blocks=tight, num_host_blocks=99, max_num_batched_tokens=9) == expected


def test_layers_without_rope_and_wide_groups() -> None:
    """One KV head for all queries, and a layer that knows no positions."""
    model = tiny_model(replace(TINY, unrotated_layers=(1,), num_kv_heads=1))
    retention = Retention(heavy=3, recent=4)
    engine, runner = engine_of(model, retention, block_size=4, num_blocks=30, max_num_batched_tokens=9)
    with kept_by_engine(runner):
        run_watched(engine, [([i % 50 for i in range(20)], KINDS["greedy"]), ([3], KINDS["greedy"])], retention)
    assert assert_as_simulated(runner, retention).evicted > 100
