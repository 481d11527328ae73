"""The laws of a paged engine, one sentence each, and where each of them is tested. Data and a search; it runs nothing.

A test says which laws it checks in its name, or in the id of a parameter: `test_L07_...`, `pytest.param(..., id="L16-order")`.
So `pytest -k L07` runs law 7.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple


class Law(NamedTuple):
    """One thing that must hold. Groups follow the parts of an engine."""

    id: str
    group: str
    sentence: str


_POOL, _FORK, _PREFIX = "pool and counts", "fork and copy-on-write", "prefix cache"
_SCHEDULER, _RETENTION, _DEVICES = "scheduler", "retention and quantization", "devices and kernels"
_SHARING, _OUTPUTS = "sharing", "outputs and the server"

LAWS: tuple[Law, ...] = (
    Law("L01", _POOL, "Free, referenced and null blocks add up to the pool after every operation."),
    Law("L02", _POOL, "A block's count is the number of table entries and pins that name it, and never negative."),
    Law("L03", _POOL, "Freeing what is free raises; ending a request twice does nothing."),
    Law("L04", _POOL, "A block can be handed out exactly when its count is 0, cached or not."),
    Law("L05", _POOL, "Free blocks keep their recorded order, and leave the middle of the line in constant time."),
    Law("L06", _POOL, "The null block is never handed out, freed, hashed or counted as free."),
    Law("L07", _POOL, "A failed call changes nothing: no touch, no eviction, no leak."),
    Law("L08", _POOL, "The capacity check counts found blocks that could be evicted exactly once."),
    Law("L09", _POOL, "Two logical blocks that are not shared never lie in one physical block."),
    Law("L10", _POOL, "A table has as many entries as its tokens and reserved places need, no more, no fewer."),
    Law("L11", _POOL, "A new block is taken exactly when need exceeds have."),
    Law("L12", _FORK, "A fork allocates nothing and adds one holder to each of the parent's blocks."),
    Law("L13", _FORK, "A write copies its block when it is shared and partly filled, and only then."),
    Law("L14", _FORK, "A copy is returned as (source, destination), moves one count, and no destination is a source."),
    Law("L15", _FORK, "The last sharer writes in place."),
    Law(
        "L16",
        _FORK,
        "A step runs swap-outs, swap-ins, copies and writes in this order, and no batch reads what it writes.",
    ),
    Law(
        "L17",
        _FORK,
        "n sharers of a partial tail make at most n - 1 copies, and none when the prompt fills its blocks.",
    ),
    Law("L18", _FORK, "A beam step forks its winners before it frees its losers, and what nobody holds comes back."),
    Law("L19", _FORK, "Beams are the same with sharing on, with sharing off, and after a preemption."),
    Law("L20", _FORK, "Freeing parent or child leaves the other whole."),
    Law("L21", _PREFIX, "Only full blocks are hashed."),
    Law("L22", _PREFIX, "A key covers the block's tokens, all that came before, and the extras."),
    Law("L23", _PREFIX, "A hit is a prefix: the first miss ends it."),
    Law("L24", _PREFIX, "A full hit leaves at least one token to compute."),
    Law("L25", _PREFIX, "A salt in the first block isolates everything after it."),
    Law("L26", _PREFIX, "Keys are cryptographic: no choice of tokens makes two contents collide."),
    Law("L27", _PREFIX, "A request that needs prompt log-probabilities fills the cache and does not read it."),
    Law("L28", _PREFIX, "Tokens that are not accepted yet are never hashed."),
    Law(
        "L29",
        _PREFIX,
        "No hit names a block before the step that writes it is planned, nor after its writer has left that step.",
    ),
    Law("L30", _PREFIX, "What is evicted is the least recently used block, the deepest of those freed together."),
    Law("L31", _PREFIX, "Found blocks are protected before anything is allocated."),
    Law("L32", _PREFIX, "Handing a cached block out again erases its key."),
    Law("L33", _PREFIX, "Of blocks with the same content the one published first, of those left, is found."),
    Law("L34", _PREFIX, "The cache is not reset while a request holds blocks."),
    Law("L35", _PREFIX, "The hit rate counts tokens; a resumed request's own blocks are counted apart."),
    Law("L36", _PREFIX, "Outputs are the same with the cache on and off."),
    Law("L37", _SCHEDULER, "A step stays within its token budget and its limit of sequences."),
    Law("L38", _SCHEDULER, "Any way of chunking the prompt gives the same output."),
    Law("L39", _SCHEDULER, "Those that run come before those that wait; a step that preempted admits nobody."),
    Law(
        "L40",
        _SCHEDULER,
        "First come, first served: the latest arrival makes way, and victims queue in order of arrival.",
    ),
    Law("L41", _SCHEDULER, "A request that can never fit is refused when it is submitted, and the queue moves on."),
    Law("L42", _SCHEDULER, "The watermark gates admission, never growth, and never an idle engine."),
    Law("L43", _SCHEDULER, "While a request lives, every step computes, finishes or refuses something."),
    Law("L44", _SCHEDULER, "The earliest request is never preempted for a later one, and each ends in bounded steps."),
    Law("L45", _SCHEDULER, "The most urgent is served first; a victim gives back all that this step had given it."),
    Law("L46", _SCHEDULER, "Preemption by recompute leaves the final text unchanged."),
    Law(
        "L47", _SCHEDULER, "A swap moves each shared block once, keeps the sharing, and out then in changes no content."
    ),
    Law("L48", _SCHEDULER, "When the host pool is full, that request alone is recomputed."),
    Law("L49", _SCHEDULER, "A swap-in needs its blocks, its next step's, and the watermark unless nothing runs."),
    Law("L50", _SCHEDULER, "Swapped requests return before new ones start; under priorities both are one queue."),
    Law("L51", _SCHEDULER, "The sequences of a request are scheduled, swapped and resumed together."),
    Law("L52", _SCHEDULER, "A block that a step copies or swaps from is not handed out again within it."),
    Law("L53", _SCHEDULER, "An abort in any state returns everything."),
    Law("L54", _SCHEDULER, "The same seed and arrivals give the same blocks, schedule and events."),
    Law("L55", _SCHEDULER, "Outputs do not depend on the schedule."),
    Law("L56", _RETENTION, "Blocks outside a sliding window go back once, and few enough stay."),
    Law("L57", _RETENTION, "With attention sinks, positions are those inside the cache, and whole sink blocks stay."),
    Law("L58", _RETENTION, "What is computed after an eviction is never published."),
    Law(
        "L59",
        _RETENTION,
        "Heavy hitters stay within their budget, and a shared block is never taken from its other owner.",
    ),
    Law(
        "L60",
        _RETENTION,
        "Scales live with their quantized block, travel wherever it goes, and every read applies them.",
    ),
    Law("L61", _DEVICES, "Every tensor-parallel rank sees the same block ids, and the pool is the smallest of them."),
    Law(
        "L62",
        _DEVICES,
        "Pipeline stages share block ids, and each stage is done with a block before it is reused there.",
    ),
    Law("L63", _DEVICES, "Kernels do not care which physical blocks hold what, and never read unused slots."),
    Law("L64", _DEVICES, "Every kernel equals its torch twin for all shapes it accepts."),
    Law(
        "L65", _SHARING, "Equal prefixes are computed once, in one call, one step or one flight, by chunks of any size."
    ),
    Law("L66", _SHARING, "Equal content made twice is remembered twice, and no live table is rewritten to join it."),
    Law("L67", _SHARING, "A preempted group resumes as one sequence and forks again where its outputs part."),
    Law("L68", _SHARING, "What can be held, shared as it will be, is admitted, and its prompt is hashed once."),
    Law(
        "L69", _OUTPUTS, "An output handed out never changes, and every consumer sees each change of its own requests."
    ),
    Law("L70", _RETENTION, "Every tensor of the KV store follows its block through copy, fork, swap, hit and rank."),
    Law(
        "L71", _RETENTION, "With sinks and windows the output is a dense reference's with the same mask and positions."
    ),
    Law(
        "L72", _RETENTION, "Heavy hitters keep the set that a dense simulation keeps, by scores of the sequence's own."
    ),
    Law("L73", _DEVICES, "Any number of ranks gives one rank's text, and the death of one ends all with a word."),
    Law("L74", _OUTPUTS, "A client that goes away gives its blocks back, and a server's answers are the library's."),
    Law("L75", _OUTPUTS, "Nothing read from a file, a socket or a model reaches a terminal unescaped."),
)

_ID = re.compile(r"(?<![A-Za-z0-9])L\d\d(?![0-9])")
_TEST = re.compile(r"^\s*def (test_\w+)", re.MULTILINE)


def tests_of(folder: Path) -> dict[str, list[str]]:
    """For each law, the tests under `folder` that check it, as "spec/test_pool.py::test_L01_..."; laws without a test have an empty list.

    Raises FileNotFoundError if there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    found: dict[str, list[str]] = {law.id: [] for law in LAWS}
    for path in sorted(folder.rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        starts = [(match.start(), match.group(1)) for match in _TEST.finditer(text)]
        name = path.relative_to(folder).as_posix()
        for law, place in _places(text, starts):
            if law in found and f"{name}::{place}" not in found[law]:
                found[law].append(f"{name}::{place}")
    return found


def _places(text: str, starts: list[tuple[int, str]]) -> list[tuple[str, str]]:
    """(law, test) for every id in a test's name, and for every id="L.." of a parameter, which belongs to the test that follows it."""
    places = [(law, name) for _, name in starts for law in re.findall(r"(?<=_)L\d\d(?=_|$)", name)]
    for match in re.finditer(r"""id=f?["']([^"']*)["']""", text):
        test = next((name for at, name in starts if at > match.start()), None)
        if test is not None:
            places.extend((law, test) for law in _ID.findall(match.group(1)))
    return places
