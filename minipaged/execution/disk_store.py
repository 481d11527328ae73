"""A folder of blocks, one file each, that outlives the process: written behind by a thread, checked whenever one is read.

A file's name is SHA-256 over what the block depends on (the model, dtypes, block size, policy: the fingerprint) and the block's own key,
which covers its tokens, all that came before them, and the salt. Files are 0600 and the folder is made 0700: they hold prompts. Several
processes may share a folder, and several models: each file is written under another name and then renamed, and what is not found is a miss.

The checksum finds damage, not malice: whoever may write in the folder can put false blocks there. So a folder that everybody may write
in is refused, links are not followed, and a file is never read beyond the size that it must have.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import re
import stat
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path

from minipaged.errors import InputError

MAGIC = b"minipaged-kv-01\n"  # with the version of the format
SUFFIX = ".kv"
_DIGEST = 32
_HEAD = len(MAGIC) + 2 * _DIGEST
_NAME = re.compile(r"[0-9a-f]{16}-[0-9a-f]{64}\.kv")  # nothing else in the folder is counted, read or deleted
_UNFINISHED = re.compile(r"\.[0-9a-f]{16}-[0-9a-f]{64}\.kv\.[0-9]+")
UNFINISHED_SECONDS = 3600.0  # so old, whoever was writing the file has ended
WAITING_BYTES = 2**30  # of blocks that wait to be written
LOOKS = 16  # a process looks what others wrote whenever it has written this part of the limit

Blocks = Callable[[], Iterable[tuple[bytes, bytes]]]  # waits for the blocks' content, and yields (key, content) of each


class Folder:
    """Blocks by key, read and written at once. Writing is one thread's; the rest may be another's."""

    def __init__(self, path: Path, limit_bytes: int, fingerprint: bytes) -> None:
        self.path, self.limit_bytes = path, limit_bytes
        self.stopped = False  # nothing more is written
        self._fingerprint = fingerprint
        self._prefix = fingerprint[:8].hex() + "-"
        self._lock = threading.Lock()  # over the sizes and their sum
        self._sizes: dict[str, int] = {}  # the least recently used first
        self.total_bytes = 0
        self._unseen_bytes = 0  # written since the folder was looked through
        self._look()

    def _look(self) -> None:
        """What is there now, whoever wrote it; what was left half written long ago is deleted."""
        found, too_large = [], 0
        with os.scandir(self.path) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # deleted by another process
                    about = entry.stat(follow_symlinks=False)
                    if _UNFINISHED.fullmatch(entry.name) and time.time() - about.st_mtime > UNFINISHED_SECONDS:
                        os.unlink(entry.path)
                    elif _NAME.fullmatch(entry.name) and stat.S_ISREG(about.st_mode):
                        # One that alone exceeds the limit would otherwise drive out all others.
                        too_large += about.st_size > self.limit_bytes
                        if about.st_size <= self.limit_bytes:
                            found.append((about.st_mtime_ns, entry.name, about.st_size))
        with self._lock:
            self._sizes = {name: size for _, name, size in sorted(found)}
            self.total_bytes = sum(self._sizes.values())
            self._unseen_bytes = 0
        if too_large:
            self.say(
                f"{too_large:,} of its files are larger than disk_gb allows for all, and are left out of the count"
            )

    def num_foreign(self) -> int:
        """Blocks of another fingerprint."""
        return sum(not name.startswith(self._prefix) for name in self._sizes)

    def say(self, words: str) -> None:
        """A warning; never an exception, even where warnings are made errors: it may be the writer's thread that speaks."""
        with contextlib.suppress(Warning):
            warnings.warn(f"disk_cache {self.path}: {words}", stacklevel=2)

    def name_of(self, key: bytes) -> str:
        """The file of a block."""
        return self._prefix + sha256(self._fingerprint + key).hexdigest() + SUFFIX

    def __contains__(self, key: bytes) -> bool:
        return self.name_of(key) in self._sizes

    def read(self, key: bytes, num_bytes: int) -> bytes | None:
        """The block's content, so many bytes; None if it is not there, or is not whole (which is said, and the file deleted)."""
        name = self.name_of(key)
        path = self.path / name
        try:
            data = _read_file(path, _HEAD + num_bytes)
        except OSError:
            self._forget(name)  # another process may have deleted it
            return None
        if data is None or data[:_HEAD] != self._head(key, data[_HEAD:]):
            self.say(f"{name} is damaged, and is computed anew")
            self._delete(name)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        with self._lock:
            self.total_bytes += len(data) - self._sizes.pop(name, 0)
            self._sizes[name] = len(data)  # the most recently used
        return data[_HEAD:]

    def _head(self, key: bytes, content: bytes) -> bytes:
        return MAGIC + self._fingerprint + _digest(key, content)

    def write(self, key: bytes, content: bytes) -> None:
        """Keep a block, unless it is there already or larger than the limit. Older ones make room. OSError if it cannot be written."""
        name, size = self.name_of(key), _HEAD + len(content)
        if name in self._sizes or size > self.limit_bytes:
            return
        if LOOKS * (self._unseen_bytes + size) > self.limit_bytes:
            self._look()
        while self._sizes and self.total_bytes + size > self.limit_bytes:
            self._delete(next(iter(self._sizes)))
        path = self.path / f".{name}.{os.getpid()}"
        try:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb") as file:
                file.write(self._head(key, content))
                file.write(content)
            os.replace(path, self.path / name)
        except OSError:
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        with self._lock:
            self._sizes[name] = size
            self.total_bytes += size
            self._unseen_bytes += size

    def _delete(self, name: str) -> None:
        self._forget(name)
        (self.path / name).unlink(missing_ok=True)

    def _forget(self, name: str) -> None:
        with self._lock:
            self.total_bytes -= self._sizes.pop(name, 0)


class DiskStore:
    """A folder of blocks, and the thread that writes what it is given.

    folder: made if it is not there; limit_bytes: beyond these, the least recently used are deleted, whoever wrote them. Each process
    looks through the folder again when it has written a sixteenth of the limit, so N of them may exceed it by N sixteenths for a while.
    fingerprint: 32 bytes that name everything beside the key that the content depends on; waiting_bytes: of blocks that wait for the
    thread. InputError for a folder that cannot be used.
    """

    def __init__(
        self, folder: str | Path, limit_bytes: int, fingerprint: bytes, *, waiting_bytes: int = WAITING_BYTES
    ) -> None:
        path = Path(folder).expanduser()
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if path.stat().st_mode & stat.S_IWOTH:
                raise InputError(
                    f"disk_cache: everybody may write in {path}, so also false blocks: name another folder, or chmod o-w {path}"
                )
            self._folder = Folder(path, limit_bytes, fingerprint)
        except OSError as error:
            raise InputError(f"disk_cache: {path} cannot be used: {error.strerror}: name another folder") from None
        if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
            raise InputError(f"disk_cache: {path} cannot be written: name another folder")
        foreign = self._folder.num_foreign()
        if foreign:
            self._folder.say(
                f"{foreign:,} of its blocks are of another model, format or version: they are not read, and make room like the others"
            )
        self._dropped = 0
        self._writer = Writer(self._folder, waiting_bytes)
        # The thread knows the folder alone, so a store that nobody needs any more is collected, and what waits is written then.
        thread = threading.Thread(target=self._writer.run, name="minipaged-disk", daemon=True)
        thread.start()
        self._finish = weakref.finalize(self, _finish, self._writer, thread)

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return self._folder.path

    @property
    def total_bytes(self) -> int:
        """Of all files, as far as this process knows."""
        return self._folder.total_bytes

    @property
    def num_dropped(self) -> int:
        """Blocks that were to be kept and are not."""
        return self._dropped + self._writer.num_lost

    def __contains__(self, key: bytes) -> bool:
        return key in self._folder

    def read(self, key: bytes, num_bytes: int) -> bytes | None:
        """The block's content, so many bytes; None if it is not there, or is not whole (which is said, and the file deleted)."""
        return self._folder.read(key, num_bytes)

    def has_room(self, num_bytes: int) -> bool:
        """Whether the thread may be given so many bytes more now. With nothing waiting it may, however many they are."""
        return self._writer.has_room(num_bytes)

    def write_behind(self, blocks: Blocks, num_blocks: int, num_bytes: int) -> None:
        """Let the thread write these."""
        self._writer.put(blocks, num_blocks, num_bytes)

    def drop(self, num_blocks: int) -> None:
        """Count blocks whose content was gone before the thread had room for them. The first time it is said."""
        if num_blocks and not self._dropped and not self._folder.stopped:
            self._folder.say("blocks that leave the pool before the disk has room for them are not kept")
        self._dropped += num_blocks

    def flush(self) -> None:
        """Wait until all that was given is written."""
        self._writer.waiting.join()

    def close(self) -> None:
        """Write what waits, and end the thread."""
        self._finish()


class Writer:
    """What waits to be written, bounded in bytes, and the thread's work."""

    def __init__(self, folder: Folder, most_bytes: int) -> None:
        self.waiting: queue.Queue[tuple[Blocks, int, int] | None] = queue.Queue()
        self.num_lost = 0  # blocks given, and not written for an error
        self._folder, self._most_bytes = folder, most_bytes
        self._bytes = 0
        self._lock = threading.Lock()

    def has_room(self, num_bytes: int) -> bool:
        """Whether so many bytes more may wait."""
        return not self._bytes or self._bytes + num_bytes <= self._most_bytes

    def put(self, blocks: Blocks, num_blocks: int, num_bytes: int) -> None:
        """Give the thread blocks."""
        with self._lock:
            self._bytes += num_bytes
        self.waiting.put((blocks, num_blocks, num_bytes))

    def run(self) -> None:
        """The thread: write until None comes."""
        while (given := self.waiting.get()) is not None:
            self._write(*given)
            with self._lock:
                self._bytes -= given[2]
            del given  # the content
            self.waiting.task_done()
        self.waiting.task_done()

    def _write(self, blocks: Blocks, num_blocks: int, num_bytes: int) -> None:
        left = num_blocks
        try:
            if not self._folder.stopped:
                for key, content in blocks():
                    self._folder.write(key, content)
                    left -= 1
        except Exception as error:  # a dead thread would let flush wait for ever
            self._folder.stopped = True
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            why = "the disk is full" if full else (isinstance(error, OSError) and error.strerror) or error
            self._folder.say(f"{why}: nothing more is written in this run")
        self.num_lost += left


def _finish(writer: Writer, thread: threading.Thread) -> None:
    writer.waiting.put(None)
    if thread is not threading.current_thread():
        thread.join()


def _digest(key: bytes, content: bytes) -> bytes:
    digest = sha256(key)
    digest.update(content)
    return digest.digest()


def _read_file(path: Path, num_bytes: int) -> bytes | None:
    """A file of exactly so many bytes; None for any other, of which nothing is read. OSError for a link."""
    # Without O_NONBLOCK a pipe of that name would be waited for.
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode) or about.st_size != num_bytes:
            return None
        data = file.read(num_bytes)
        return data if len(data) == num_bytes else None
