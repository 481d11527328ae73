"""A scheduler's law that fails leaves a replay: the world of its last run is run once more, with a recorder listening.

Worlds are deterministic, so nothing has to be recorded while the laws are tried.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from minipaged.trace.file import Header, open_recorder
from tests.laws.token_world import World


def leave_replay(world: World, path: Path, finding: str) -> str:
    """Record the world's run, up to the step in which it fails or breaks a law. Returns the command that shows it.

    finding: what the screen says of the last step.
    """
    again = World(
        world.block_manager,
        world.scheduler,
        num_blocks=world.num_blocks,
        block_size=world.block_size,
        num_host_blocks=world.num_host_blocks,
        watermark=world.watermark,
        prefix_caching=world.prefix_caching,
        limits=world.limits,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    recorder = open_recorder(path, again.engine, Header(model="the spec", finding=finding))
    again.engine.trace.subscribe(recorder.write)
    with contextlib.suppress(Exception):  # a law that is watched in every step fails here again
        again.run(world.workload, most_steps=world.judged)
    recorder.close()
    return f"minipaged tui --replay {path}"
