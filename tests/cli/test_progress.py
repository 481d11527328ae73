"""The line of progress that slow commands show."""

from __future__ import annotations

import io

from rich.console import Console

from minipaged.cli.progress import status_line


def test_progress_on_a_terminal_and_in_a_log() -> None:
    for is_terminal in (True, False):
        written = io.StringIO()
        with status_line(Console(file=written, force_terminal=is_terminal, width=80)) as report:
            for done in range(0, 5_000_000, 1_000_000):
                report("downloading", done, 4_000_000)
            report("waiting for another pull", 0, 0)
        assert "downloading" in written.getvalue()
        if not is_terminal:
            assert written.getvalue() == "downloading\nwaiting for another pull\n"
