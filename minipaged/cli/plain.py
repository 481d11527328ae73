"""The same run as the screen's, as plain lines: what happened to the blocks, then the texts. For pipes and logs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from minipaged.cli.progress import status_line
from minipaged.cli.terminal import complain
from minipaged.config import SamplingParams
from minipaged.engine import Engine
from minipaged.scheduling.request import RequestOutput
from minipaged.text.safe import printable
from minipaged.trace.events import StepDelta

TOLD = frozenset(
    {"fork", "copy", "cache_hit", "preempt", "evict", "swap_out", "swap_in", "spill", "host_hit", "finish"}
)
EVERY = 16  # steps between two lines of gauges
WIDEST_PROMPT = 60  # characters of a prompt that stand over its answer


def run_plain(
    factory: Callable[..., Engine],
    asked: tuple[tuple[str, SamplingParams], ...],
    *,
    steps: int | None,
    record: Path | None,
) -> int:
    """Run every prompt to its end (or for `steps` steps) and print what the screen would show."""
    with status_line() as progress:
        engine = factory(progress=progress)
    engine.trace.subscribe(_say)
    recording = Recording(engine, record) if record is not None else None
    outputs = [engine.ask(prompt, params) for prompt, params in asked]
    taken = 0
    try:
        while engine.has_work and (steps is None or taken < steps):
            engine.step()
            taken += 1
    finally:
        if recording is not None:
            recording.close()
    _print_texts(outputs)
    if any(output.error for output in outputs):
        return 2
    return 1 if recording is not None and recording.failed else 0


class Recording:
    """A run's trace on its way to a file. Where the file cannot be written any more it ends with a word, and the run goes on."""

    def __init__(self, engine: Engine, path: Path) -> None:
        from minipaged.trace.file import open_recorder

        self.failed = False
        recorder = open_recorder(path, engine, report=self._fail)
        engine.trace.subscribe(recorder.write)
        self.close = recorder.close

    def _fail(self, sentence: str) -> None:
        self.failed = True
        complain(sentence)


def _say(delta: StepDelta) -> None:
    stats = delta.stats
    for event in delta.events:
        if event.kind in TOLD:
            print(
                f"step {delta.step:4} · {describe(event.kind, event.sequence, event.block, event.other, event.amount)}"
            )
    if delta.step % EVERY == 0:
        used = stats.total_blocks - 1 - stats.free_blocks
        waste = 100 * stats.tail_slots / (used * stats.block_size) if used else 0.0
        print(
            f"step {delta.step:4} · {used}/{stats.total_blocks - 1} blocks · waste {waste:.1f} % · "
            f"{len(delta.queues.running)} running · {stats.num_waiting} waiting · "
            f"{stats.shared_saved_blocks} blocks saved by sharing",
            flush=True,
        )


def describe(kind: str, sequence: int, block: int, other: int, amount: int) -> str:
    """One event in plain words."""
    words = {
        "fork": f"sequence {sequence} shares the blocks of sequence {other}",
        "copy": f"sequence {sequence} writes the shared block {block}: copied to {other}",
        "cache_hit": f"sequence {sequence} finds block {block} in the prefix cache",
        "preempt": f"sequence {sequence} makes way ({amount} tokens computed)",
        "evict": f"cached block {block} is handed out again",
        "swap_out": f"sequence {sequence}: block {block} moves to host block {other}",
        "swap_in": f"sequence {sequence}: host block {other} comes back as block {block}",
        "spill": f"cached block {block} goes on as host block {other}",
        "host_hit": f"sequence {sequence} finds host block {other} in the prefix cache: it comes back as block {block}",
        "finish": f"sequence {sequence} is complete ({amount} tokens)",
    }
    return words.get(kind, kind)


def _print_texts(outputs: list[RequestOutput]) -> None:
    for output in outputs:
        prompt = printable(" ".join((output.prompt or "").split()))
        if output.error:
            print(f"\n{end_of(prompt, WIDEST_PROMPT)}\n  refused: {printable(output.error)}")
        for sequence in output.request.sequences:  # by number, as the lines above name them
            text = printable(" ".join(sequence.text.split()))
            print(f"\nsequence {sequence.seq_id} · {end_of(prompt, WIDEST_PROMPT)}\n  {text}")


def end_of(text: str, width: int) -> str:
    """The last words of a text in at most `width` characters, after … where some were left out."""
    if len(text) <= width:
        return text
    end = text[-(width - 1) :]
    _, space, words = end.partition(" ")
    return "…" + (words if space and not text[-width].isspace() else end)
