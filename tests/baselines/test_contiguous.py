"""The reserving systems under the real scheduler: every request is answered the same, only memory and order differ."""

from __future__ import annotations

from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minipaged.baselines.contiguous import Ask, ContiguousBlockManager
from minipaged.baselines.systems import RESERVING
from minipaged.config import EngineConfig, SamplingParams
from minipaged.engine import Engine
from minipaged.errors import InputError, RequestError
from minipaged.lab.simulation.hardware import find_gpu
from minipaged.lab.simulation.simulated_runner import SimulatedRunner
from minipaged.memory.block_manager import BlockManager
from minipaged.model.loading.shapes import shape
from minipaged.scheduling.plan import StepPlan
from minipaged.scheduling.request import RequestOutput
from minipaged.scheduling.scheduler import Scheduler

MAX_LEN, BLOCK_SIZE = 64, 4


class Watch(SimulatedRunner):
    """Checks every plan against the manager: tables are consecutive, rows never overlap, copies come before what they feed."""

    manager: ContiguousBlockManager
    most_rows = 0
    tables: dict[int, tuple[int, ...]]

    def launch(self, plan: StepPlan):  # type: ignore[no-untyped-def]
        seen: set[int] = set()
        for row, seq_id in enumerate(plan.seq_ids.tolist()):
            table = self.manager.table(seq_id)
            need = -(-int(plan.starts[row] + plan.lengths[row]) // BLOCK_SIZE)
            assert len(table) >= need, "a row writes past its reservation"
            assert plan.tables[row, :need].tolist() == list(table[:need])
            assert not seen & set(table), "two rows hold one block"
            assert 0 not in table
            seen |= set(table)
            if self.manager.system != "tgi-paged":
                assert list(table) == list(range(table[0], table[0] + len(table))), "a reservation is not consecutive"
        self.most_rows = max(self.most_rows, len(plan.seq_ids))
        return super().launch(plan)


def build(system: str, num_blocks: int = 65) -> tuple[Engine, ContiguousBlockManager, Watch]:
    manager = ContiguousBlockManager(num_blocks, BLOCK_SIZE, system, max_len=MAX_LEN)
    config = EngineConfig(max_num_seqs=32, max_num_batched_tokens=256, max_model_len=MAX_LEN)
    scheduler = Scheduler(config, cast(BlockManager, manager), BLOCK_SIZE)

    def ask(seq_id: int) -> Ask:
        params = scheduler.sequences[seq_id].request.params
        return Ask(params.max_tokens, params.max_tokens, params.num_sequences)

    manager.ask_of = ask
    runner = Watch(shape("toy"), find_gpu("l4"), num_blocks=num_blocks, block_size=BLOCK_SIZE)
    runner.manager = manager
    return Engine(scheduler, runner), manager, runner


def serve(engine: Engine, requests: list[tuple[int, int, int]]) -> list[RequestOutput]:
    outputs = []
    for i, (prompt, length, samples) in enumerate(requests):
        params = SamplingParams(max_tokens=length, ignore_eos=True, n=samples, temperature=float(samples > 1))
        outputs.append(engine.ask([(7 * i + j) % 250 for j in range(prompt)], params))
    for _ in range(5000):
        if not engine.has_work:
            return outputs
        engine.step()
    raise AssertionError("the requests never end")


REQUESTS = st.lists(
    st.tuples(st.integers(1, 30), st.integers(1, 20), st.sampled_from([1, 1, 2, 3])), min_size=1, max_size=10
)


@settings(max_examples=25, deadline=None)
@given(system=st.sampled_from(sorted(RESERVING)), requests=REQUESTS)
def test_every_request_is_answered_and_the_pool_comes_back(system: str, requests: list[tuple[int, int, int]]) -> None:
    engine, manager, _ = build(system)
    for output, (_, length, samples) in zip(serve(engine, requests), requests, strict=True):
        if output.error is None:
            assert [len(answer.token_ids) for answer in output.outputs] == [length] * samples
        else:
            assert samples > 1, "a single sequence of at most a context must fit"
    usage = manager.usage()
    assert (usage.free, usage.referenced) == (64, 0)
    assert manager._free == set(range(1, 65))


def test_orca_max_runs_four_where_four_contexts_fit_and_webui_one() -> None:
    many = [(8, 6, 1)] * 12
    rows = {}
    for system in sorted(RESERVING):
        engine, _, runner = build(system)
        serve(engine, many)
        rows[system] = runner.most_rows
    assert rows["orca-max"] == rows["fastertransformer"] == 4
    assert rows["webui"] == 1
    assert rows["orca-oracle"] == rows["tgi-paged"] == 12


def test_p3_nobody_joins_a_static_batch_under_the_scheduler() -> None:
    engine, manager, _ = build("static")
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    first = engine.ask([1, 2, 3], params)
    engine.step()
    late = engine.ask([4, 5], params)
    while not first.finished:
        engine.step()
        assert not late.outputs[0].token_ids, "P3: a request joined a running batch"
    while engine.has_work:
        engine.step()
    assert late.finished
    assert manager.usage().referenced == 0


def test_a_request_that_never_fits_is_refused_at_the_door() -> None:
    engine, _, _ = build("orca-max", num_blocks=10)
    with pytest.raises(RequestError, match="pool"):
        engine.submit([1, 2, 3], SamplingParams(max_tokens=4))
    engine, _, _ = build("orca-max")
    with pytest.raises(RequestError):
        engine.submit([1], SamplingParams(max_tokens=4, n=5, temperature=1.0))


def test_forks_copy_what_the_parent_wrote() -> None:
    manager = ContiguousBlockManager(65, BLOCK_SIZE, "orca-oracle", max_len=MAX_LEN)
    manager.ask_of = lambda seq_id: Ask(10, 10, 3)
    taken = manager.allocate(0, [1, 2, 3, 4, 5, 6])
    assert taken is not None
    assert len(taken.new_blocks) == 2
    manager.mark_computed(0, [1, 2, 3, 4, 5, 6])
    manager.fork(0, 1)
    manager.fork(0, 2)
    for child in (1, 2):
        grown = manager.append(child, 2)
        assert grown is not None
        assert grown.copies == tuple(zip(taken.new_blocks, manager.table(child), strict=True))
        assert manager.append(child, 1) is not None
    with pytest.raises(InputError, match="beam"):
        manager.fork(0, 3)
    assert manager.append(0, 100) is None
    for seq_id in (2, 0, 1):
        manager.free(seq_id)
    assert manager.usage().referenced == 0
    with pytest.raises(KeyError):
        manager.free(0)


def test_bad_calls_are_named() -> None:
    manager = ContiguousBlockManager(65, BLOCK_SIZE, "static", max_len=MAX_LEN)
    with pytest.raises(InputError, match="ask_of"):
        manager.allocate(0, [1])
    with pytest.raises(InputError, match="unknown system"):
        ContiguousBlockManager(65, BLOCK_SIZE, "vllm")
    manager.ask_of = lambda seq_id: Ask(4, 4)
    assert manager.allocate(0, [1, 2]) is not None
    with pytest.raises(InputError, match="in use"):
        manager.allocate(0, [1])
    with pytest.raises(InputError, match="room for 2 tokens"):
        manager.mark_computed(0, [1, 2, 3])
