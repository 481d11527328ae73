"""`minipaged doctor`: what it says is true here, extras are not needed, and a broken package is a finding."""

from __future__ import annotations

import builtins
import importlib.metadata
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import minipaged
from minipaged.api import LLM
from minipaged.cli import doctor
from minipaged.cli.doctor import EXTRAS, examine, report
from minipaged.errors import InputError

ROOT = Path(minipaged.__file__).resolve().parents[1]


def test_extras_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(EXTRAS) == set(project["optional-dependencies"])


def test_what_it_says_is_true() -> None:
    found = {finding.name: finding for finding in examine()}
    assert str(Path(minipaged.__file__).parent) in found["minipaged"].state
    assert found["torch"].state.startswith(importlib.metadata.version("torch"))
    assert found["textual"].state == importlib.metadata.version("textual")


def test_a_missing_extra_is_named_with_its_packages_and_does_not_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        "torch>=2.9",
        "textual-serve>=1.1 ; extra == 'web'",
        'no-such-package ; extra == "web"',
        "pytest; extra == 'test'",
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "no-such-package" else "1.0")
    monkeypatch.setattr(doctor, "_model", lambda: doctor.Finding("model", "there"))
    web = next(finding for finding in examine() if finding.name == "[web]")
    assert web.state == "for the screen in a browser: no-such-package not installed"
    assert web.mend == f"{sys.executable} -m pip install no-such-package"
    assert report() == 0
    assert "– [web]" in capsys.readouterr().out


def test_a_missing_package_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    have = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "gguf" else have(name))
    monkeypatch.setattr(doctor, "_model", lambda: doctor.Finding("model", "in [/home] \x1b[2J"))
    assert report() == 1
    out = capsys.readouterr().out
    assert "✗ gguf" in out
    assert "in [/home] \ufffd[2J" in out


def test_a_torch_that_cannot_be_imported_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def broken(name: str, *rest: Any) -> Any:
        if name == "torch":
            raise OSError("libcudart.so.13: cannot open\nshared object file")
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", broken)
    (torch,) = doctor._torch()
    assert torch.state == "cannot be imported: libcudart.so.13: cannot open shared object file"
    assert "--force-reinstall torch" in torch.mend


def test_a_folder_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    assert "not installed by pip" in doctor._extra("web", "the screen in a browser").state


@pytest.mark.parametrize("choice", ["torch", "cuda"])
def test_the_kernels_that_are_asked_for(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIPAGED_KERNELS", choice)
    finding = doctor._kernels()
    assert bool(finding.mend) == (choice != "torch")
    assert f"MINIPAGED_KERNELS={choice}".replace("'", "") in finding.state.replace("'", "")
    if finding.mend:
        with pytest.raises(InputError, match="must be torch or triton"):
            LLM("toy", num_blocks=4)
