"""`minipaged serve --tui`: the screen in front of a server that runs in a process of its own."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from minipaged.cli.serve import KEY_VARIABLE, serve_with_screen
from minipaged.serving.http.server import Address, listen
from minipaged.tui import run
from tests.serving.engines import scripted
from tests.serving.running import serving


def test_a_taken_port_is_told_and_the_other_server_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(run, "run_screen", lambda source: shown.append(source) or 0)
    with serving(scripted) as other:
        monkeypatch.setattr(sys, "argv", ["minipaged", "serve", "toy", "--tui", "--port", str(other.port)])
        assert serve_with_screen("127.0.0.1", other.port, "") == 2
    assert not shown
    assert f"port {other.port}: Address already in use; choose another --port" in capsys.readouterr().err


@pytest.mark.slow
def test_the_screen_is_attached_to_the_server_that_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the key from the environment."""
    models: list[str] = []

    def look(source: Any) -> int:
        source.wait(lambda: source.ready)
        models.append(source.header.model)
        source.close()
        return 0

    monkeypatch.setattr(run, "run_screen", look)
    monkeypatch.setenv(KEY_VARIABLE, "sesame")
    free = listen(Address(port=0))
    port = free.getsockname()[1]
    free.close()
    words = ["serve", "toy", "--tui", "--device", "cpu", "--num-blocks", "64", "--port", str(port)]
    monkeypatch.setattr(sys, "argv", ["minipaged", *words])
    assert serve_with_screen("127.0.0.1", port, "") == 0
    assert models == ["toy"]
    listen(Address(port=port)).close()  # it has ended
