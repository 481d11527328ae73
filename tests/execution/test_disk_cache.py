"""Blocks on disk: they survive the engine, and whatever happens to the folder costs a computation and a word, never a wrong text."""

from __future__ import annotations

import errno
import gc
import os
import stat
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from minipaged.assembly import build_engine, connect_disk
from minipaged.config import CacheConfig, EngineConfig, SamplingParams
from minipaged.engine import Engine
from minipaged.errors import InputError
from minipaged.execution.disk_store import DiskStore
from minipaged.execution.disk_tier import DiskTier
from minipaged.model.llama import Llama
from minipaged.model.loading.tokenizer import ByteTokenizer
from minipaged.model.loading.zoo import LoadedModel
from tests.execution.test_host_cache import COMBINATIONS, KINDS
from tests.execution.test_quantized_engine import CONFIG, LOADED

GREEDY = SamplingParams(max_tokens=8, ignore_eos=True)
PROMPT = [(7 * i + 3) % 250 for i in range(40)]
KEY, OTHER = bytes(32), bytes([1] * 32)


def engine_of(folder: Path | None, *, gb: float = 1.0, loaded: LoadedModel = LOADED, **settings: Any) -> Engine:
    """An engine on the CPU; blocks of 4 tokens."""
    pool = CacheConfig(4, 60, 60, **settings, disk_cache=None if folder is None else str(folder), disk_gb=gb)
    config = EngineConfig(max_model_len=256)
    engine = build_engine(loaded, pool, config, device=torch.device("cpu"), dtype="float32")
    if folder is not None:
        connect_disk(engine, loaded, pool, engine.runner.kv, dtype="float32")  # type: ignore[attr-defined]
    return engine


def ask(
    engine: Engine, params: SamplingParams = GREEDY, prompt: list[int] = PROMPT
) -> tuple[list[list[int]], int | None]:
    """The texts, and how many tokens of the prompt were found. What was computed is on disk afterwards."""
    output = engine.ask(prompt, params)
    while engine.has_work:
        engine.step()
    assert output.error is None, output.error
    if isinstance(engine.scheduler.disk, DiskTier):
        engine.scheduler.disk.store.flush()
    return [list(sample.token_ids) for sample in output.outputs], output.num_cached_tokens


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.kv"))


def release_and_flush(event: threading.Event, store: DiskStore) -> None:
    event.set()
    store.flush()


@pytest.mark.parametrize(("kind", "kept", "retention"), COMBINATIONS)
def test_L36_L55_L70_blocks_survive_the_engine(tmp_path: Path, kind: str, kept: str, retention: str | None) -> None:
    params = KINDS[kind]
    settings: dict[str, Any] = {"kv_cache_dtype": kept, "retention": retention}
    expected, _ = ask(engine_of(None, **settings), params)
    first = engine_of(tmp_path / "new", **settings)
    assert ask(first, params)[0] == expected
    again = engine_of(tmp_path / "new", **settings)
    texts, found = ask(again, params)
    assert texts == expected
    if retention is None:
        assert found == 36
        assert again.scheduler.counters.disk_hit_tokens == 36


def test_files_are_the_owners_alone(tmp_path: Path) -> None:
    ask(engine_of(tmp_path / "new"))
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    files = files_of(tmp_path / "new")
    assert len(files) >= 10
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert not list((tmp_path / "new").glob(".*"))  # nothing half written


@pytest.mark.parametrize("damage", ["cut", "longer", "a bit", "empty", "another's"])
def test_damaged_files_cost_a_computation_and_a_word(tmp_path: Path, damage: str) -> None:
    expected, _ = ask(engine_of(tmp_path))
    files = files_of(tmp_path)
    contents = [path.read_bytes() for path in files]
    for path, data in zip(files, contents, strict=True):
        flipped = data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]
        other = contents[0] if path != files[0] else contents[1]
        path.write_bytes(
            {"cut": data[:-7], "longer": data + b"x", "a bit": flipped, "empty": b"", "another's": other}[damage]
        )
    with pytest.warns(UserWarning, match="is damaged, and is computed anew"):
        texts, found = ask(engine_of(tmp_path))
    assert (texts, found) == (expected, 0)


@pytest.mark.parametrize("changed", ["weights", "dtype", "rope", "salt"])
def test_blocks_of_another_model_are_never_read(tmp_path: Path, changed: str) -> None:
    ask(engine_of(tmp_path))
    loaded, settings, params = LOADED, {}, GREEDY
    if changed == "weights":
        # One bit of one number, in the middle of a matrix.
        model = Llama.random(CONFIG, 3, torch.float32, "cpu", std=0.2)
        weight = max(model.parameters(), key=torch.Tensor.numel).detach()
        weight.view(torch.int32).flatten()[len(weight.flatten()) // 2 + 1] ^= 1
        loaded = LoadedModel(CONFIG, model.pack(), ByteTokenizer(257))
    elif changed == "rope":
        from dataclasses import replace

        loaded = LoadedModel(replace(CONFIG, rope_theta=5e5), LOADED.model, ByteTokenizer(257))
    elif changed == "dtype":
        settings = {"kv_cache_dtype": "int8"}
    else:
        params = SamplingParams(max_tokens=8, ignore_eos=True, cache_salt="x")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine = engine_of(tmp_path, loaded=loaded, **settings)  # type: ignore[arg-type]
    assert any("another model" in str(w.message) for w in caught) == (changed != "salt")
    assert ask(engine, params)[1] == 0


def test_the_least_recently_used_are_deleted(tmp_path: Path) -> None:
    engine = engine_of(tmp_path)
    ask(engine)
    size = files_of(tmp_path)[0].stat().st_size
    small = engine_of(tmp_path, gb=5.5 * size / 1e9)
    ask(small, prompt=PROMPT[::-1])
    assert sum(path.stat().st_size for path in files_of(tmp_path)) <= 5.5 * size


def test_a_file_that_another_process_deleted_is_a_miss(tmp_path: Path) -> None:
    expected, _ = ask(engine_of(tmp_path))
    engine = engine_of(tmp_path)
    for path in files_of(tmp_path):
        path.unlink()
    assert ask(engine) == (expected, 0)


def test_two_engines_share_a_folder(tmp_path: Path) -> None:
    one, two = engine_of(tmp_path), engine_of(tmp_path)
    assert ask(one)[0] == ask(two)[0]
    assert ask(engine_of(tmp_path))[1] == 36


def store_of(folder: Path, limit_bytes: int = 10**9, **settings: Any) -> DiskStore:
    return DiskStore(folder, limit_bytes, bytes(32), **settings)


def put(store: DiskStore, *keys: bytes, size: int = 1000) -> None:
    store.write_behind(lambda: [(key, key[:1] * size) for key in keys], len(keys), size * len(keys))
    store.flush()


def test_two_processes_together_keep_within_the_limit(tmp_path: Path) -> None:
    limit = 20_000
    stores = [store_of(tmp_path, limit) for _ in range(2)]
    for i in range(60):
        put(stores[i % 2], bytes([i]) * 32)
        assert sum(path.stat().st_size for path in files_of(tmp_path)) <= limit * (1 + 2 / 16)
    assert stores[0].read(bytes([59]) * 32, 1000) == bytes([59]) * 1000
    assert stores[0].read(bytes([0]) * 32, 1000) is None


def test_what_waits_is_bounded_in_bytes(tmp_path: Path) -> None:
    """While the thread is held up, the engine goes on, names what is to be written, and counts what it has lost."""
    engine, go_on = engine_of(None), threading.Event()
    manager, kv = engine.scheduler.manager, engine.runner.kv  # type: ignore[attr-defined]
    store = store_of(tmp_path, waiting_bytes=30_000)
    engine.scheduler.disk = tier = DiskTier(store, manager, kv)
    store.write_behind(lambda: [go_on.wait()][:0], 0, 1)  # type: ignore[arg-type, return-value]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for start in range(8):  # the pool holds five of them
            output = engine.ask([(start * 29 + i) % 250 for i in range(40)], GREEDY)
            while not output.finished:
                engine.step()
            assert store._writer._bytes <= 30_000
        go_on.set()
        tier.close()
    assert [str(w.message).partition(": ")[2] for w in said] == [
        "blocks that leave the pool before the disk has room for them are not kept"
    ]
    assert store.num_dropped > 0
    assert len(files_of(tmp_path)) > 30


def test_a_store_that_nobody_holds_writes_what_waits_and_ends_its_thread(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    store = store_of(tmp_path)
    thread = next(t for t in threading.enumerate() if t not in before)
    store.write_behind(lambda: [(KEY, b"abc")], 1, 3)
    del store
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()
    assert len(files_of(tmp_path)) == 1


def test_what_lies_in_the_folder_is_not_trusted(tmp_path: Path) -> None:
    """Links are not followed, pipes not waited for, huge files not read, and files of other names not deleted."""
    secret = tmp_path / "secret"
    secret.write_text("x")
    folder = tmp_path / "cache"
    store = store_of(folder, 10_000)
    put(store, KEY)
    name = files_of(folder)[0].name
    for kind in ("link", "pipe", "huge", "folder"):
        path = folder / name
        path.unlink()
        if kind == "link":
            path.symlink_to(secret)
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "huge":
            with path.open("wb") as file:
                file.truncate(2**40)
        else:
            path.mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert store_of(folder, 10_000).total_bytes == 0
            assert store_of(folder, 10_000).read(KEY, 1000) is None
        if path.is_dir():
            path.rmdir()
        path.touch()
    assert secret.read_text() == "x"
    others = folder / "mine.kv"
    others.write_bytes(bytes(50_000))
    small = store_of(folder, 3_000)
    for i in range(6):
        put(small, bytes([i]) * 32)
    assert others.exists()


def test_what_was_left_half_written_is_deleted(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    put(store, KEY)
    name = files_of(tmp_path)[0].name
    old, new = tmp_path / f".{name}.77", tmp_path / f".{name}.78"
    old.write_bytes(b"x")
    new.write_bytes(b"x")
    os.utime(old, (0, 0))
    store_of(tmp_path)
    assert (old.exists(), new.exists()) == (False, True)


def test_a_block_beyond_the_limit_drives_out_nothing(tmp_path: Path) -> None:
    store = store_of(tmp_path, 5_000)
    put(store, KEY)
    put(store, OTHER, size=9_000)
    assert store.read(KEY, 1000) is not None


def test_warnings_made_errors_do_not_stop_the_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: object, target: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("minipaged.execution.disk_store.os.replace", full)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = store_of(tmp_path)
        put(store, KEY)
        put(store, OTHER)  # would wait for ever
    assert store.num_dropped == 2


def test_a_full_disk_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DiskStore(tmp_path, 10**9, bytes(32))

    asked = threading.Event()

    def full(source: object, target: object) -> None:
        asked.wait()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("minipaged.execution.disk_store.os.replace", full)
    store.write_behind(lambda: [(KEY, b"abc"), (OTHER, b"def")], 2, 6)
    with pytest.warns(UserWarning, match="the disk is full: nothing more is written") as said:
        release_and_flush(asked, store)
    assert len(said) == 1
    assert store.read(KEY, 3) is None
    assert not list(tmp_path.iterdir())
    assert store.num_dropped == 2
    store.close()


def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be used: File exists: name another folder"):
        DiskStore(tmp_path / "file", 10**9, bytes(32))
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(InputError, match="everybody may write"):
        DiskStore(tmp_path / "open", 10**9, bytes(32))
    with pytest.raises(InputError, match="disk_gb must be"):
        CacheConfig(disk_cache=str(tmp_path), disk_gb=0.0)
    with pytest.raises(InputError, match="leave enable_prefix_caching on"):
        CacheConfig(disk_cache=str(tmp_path), enable_prefix_caching=False)


class Trusting(DiskStore):
    """A store that believes what it reads."""

    def read(self, key: bytes, num_bytes: int) -> bytes | None:
        """The content, whatever it is."""
        data = (self.folder / self._folder.name_of(key)).read_bytes()[-num_bytes:]
        return data.ljust(num_bytes, b"\0")


def test_a_store_that_checks_nothing_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = ask(engine_of(tmp_path))
    for path in files_of(tmp_path):
        data = path.read_bytes()
        path.write_bytes(data[:100] + bytes(len(data) - 100))
    monkeypatch.setattr("minipaged.execution.disk_store.DiskStore", Trusting)
    assert ask(engine_of(tmp_path)) != (expected, 0)
