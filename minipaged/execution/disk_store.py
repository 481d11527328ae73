"""A folder of blocks, one file each, that outlives the process: written behind by a thread, checked whenever one is read.

A file's name is SHA-256 over what the block depends on (the model, dtypes, block size, policy: the fingerprint) and the block's own key,
which covers its tokens, all that came before them, and the salt. Files are 0600 and the folder is made 0700: they hold prompts. Several
processes may share a folder, and several models: each file is written under another name and then renamed, and what is not found is a miss.
"""

from __future__ import annotations

import errno
import os
import queue
import threading
import warnings
import weakref
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from minipaged.errors import InputError

MAGIC = b"minipaged-kv-01\n"  # with the version of the format
SUFFIX = ".kv"
_DIGEST = 32
_HEAD = len(MAGIC) + 2 * _DIGEST
MOST_WAITING = 256  # batches of blocks that wait to be written; more are not kept

Blocks = Callable[[], list[tuple[bytes, bytes]]]  # waits for the blocks' content, and returns (key, content) of each


class DiskStore:
    """Blocks by key. folder: made if it is not there; limit_bytes: beyond these, the least recently used are deleted, whoever wrote them;
    fingerprint: 32 bytes that name everything beside the key that the content depends on. InputError for a folder that cannot be used."""

    def __init__(self, folder: str | Path, limit_bytes: int, fingerprint: bytes) -> None:
        self.folder = Path(folder).expanduser()
        self.limit_bytes = limit_bytes
        self._fingerprint = fingerprint
        self._prefix = fingerprint[:8].hex() + "-"
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = sorted((entry.stat().st_mtime_ns, entry.name, entry.stat().st_size) for entry in self._entries())
        except OSError as error:
            raise InputError(
                f"disk_cache: {self.folder} cannot be used: {error.strerror}: name another folder"
            ) from None
        if not os.access(self.folder, os.R_OK | os.W_OK | os.X_OK):
            raise InputError(f"disk_cache: {self.folder} cannot be written: name another folder")
        self._sizes = {name: size for _, name, size in found}  # the least recently used first
        self.total_bytes = sum(self._sizes.values())
        self._lock = threading.Lock()  # over the two above
        foreign = sum(not name.startswith(self._prefix) for name in self._sizes)
        if foreign:
            self._warn(f"{foreign:,} of its blocks are of another model, format or version, and are left alone")
        self._waiting: queue.Queue[Blocks | None] = queue.Queue(MOST_WAITING)
        self._full = False  # nothing more is written
        self._writer = threading.Thread(target=self._write_on, name="minipaged-disk", daemon=True)
        self._writer.start()
        self._finish = weakref.finalize(self, _finish, self._waiting, self._writer)

    def _entries(self) -> list[os.DirEntry[str]]:
        with os.scandir(self.folder) as entries:
            return [entry for entry in entries if entry.name.endswith(SUFFIX) and entry.is_file(follow_symlinks=False)]

    def _warn(self, words: str) -> None:
        warnings.warn(f"disk_cache {self.folder}: {words}", stacklevel=2)

    def _name(self, key: bytes) -> str:
        return self._prefix + sha256(self._fingerprint + key).hexdigest() + SUFFIX

    def __contains__(self, key: bytes) -> bool:
        return self._name(key) in self._sizes

    def read(self, key: bytes, num_bytes: int) -> bytes | None:
        """The block's content, so many bytes; None if it is not there, or is not whole (which is said, and the file deleted)."""
        name = self._name(key)
        path = self.folder / name
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            self._forget(name)  # another process may have deleted it
            return None
        content = data[_HEAD:]
        head = MAGIC + self._fingerprint + sha256(key + content).digest()
        if data[:_HEAD] != head or len(content) != num_bytes:
            self._warn(f"{name} is damaged, and is computed anew")
            self._forget(name)
            path.unlink(missing_ok=True)
            return None
        with self._lock:
            size = self._sizes.pop(name, None)
            self._sizes[name] = len(data)  # the most recently used
            self.total_bytes += len(data) - (size or 0)
        return content

    def write_behind(self, blocks: Blocks) -> None:
        """Let the thread write these. Where it cannot keep up they are not kept."""
        if not self._full:
            try:
                self._waiting.put_nowait(blocks)
            except queue.Full:
                return

    def flush(self) -> None:
        """Wait until all that was given is written."""
        self._waiting.join()

    def close(self) -> None:
        """Write what waits, and end the thread."""
        self._finish()

    # ---- the thread

    def _write_on(self) -> None:
        while True:
            blocks = self._waiting.get()
            try:
                if blocks is None:
                    return
                for key, content in blocks():
                    self._write(key, content)
            except Exception as error:  # a dead thread would let flush wait for ever
                self._full = True
                self._warn(f"{error}: nothing more is written in this run")
            finally:
                self._waiting.task_done()

    def _write(self, key: bytes, content: bytes) -> None:
        name = self._name(key)
        if name in self._sizes or self._full:
            return
        data = MAGIC + self._fingerprint + sha256(key + content).digest() + content
        self._make_room(len(data))
        if self.total_bytes + len(data) > self.limit_bytes:
            return
        path = self.folder / f".{name}.{os.getpid()}"
        try:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb") as file:
                file.write(data)
            os.replace(path, self.folder / name)
        except OSError as error:
            self._full = True
            path.unlink(missing_ok=True)
            why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error.strerror)
            self._warn(f"{why}: nothing more is written in this run")
            return
        with self._lock:
            self._sizes[name] = len(data)
            self.total_bytes += len(data)

    def _make_room(self, num_bytes: int) -> None:
        while self._sizes and self.total_bytes + num_bytes > self.limit_bytes:
            oldest = next(iter(self._sizes))
            self._forget(oldest)
            (self.folder / oldest).unlink(missing_ok=True)

    def _forget(self, name: str) -> None:
        with self._lock:
            self.total_bytes -= self._sizes.pop(name, 0)


def _finish(waiting: queue.Queue[Blocks | None], writer: threading.Thread) -> None:
    waiting.put(None)
    if writer is not threading.current_thread():
        writer.join()
