"""Blocks on disk: they survive the engine, and whatever happens to the folder costs a computation and a word, never a wrong text."""

from __future__ import annotations

import errno
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


@pytest.mark.parametrize("kept", ["auto", "int8", pytest.param("fp8", marks=pytest.mark.slow)])
@pytest.mark.parametrize("retention", [None, "window:24", "sinks:4+window:24"])
@pytest.mark.parametrize(
    "params",
    [GREEDY, SamplingParams(max_tokens=6, n=3, temperature=0.9, seed=5), SamplingParams(max_tokens=6, beam_width=3)],
    ids=["greedy", "samples", "beams"],
)
def test_L36_L55_L70_blocks_survive_the_engine(tmp_path: Path, kept: str, retention: str | None, params: Any) -> None:
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
        loaded = LoadedModel(CONFIG, Llama.random(CONFIG, 4, torch.float32, "cpu", std=0.2).pack(), ByteTokenizer(257))
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


def test_a_full_disk_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DiskStore(tmp_path, 10**9, bytes(32))

    asked = threading.Event()

    def full(source: object, target: object) -> None:
        asked.wait()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("minipaged.execution.disk_store.os.replace", full)
    store.write_behind(lambda: [(KEY, b"abc"), (OTHER, b"def")])
    with pytest.warns(UserWarning, match="the disk is full: nothing more is written") as said:
        release_and_flush(asked, store)
    assert len(said) == 1
    assert store.read(KEY, 3) is None
    assert not list(tmp_path.iterdir())
    store.close()


def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be used: File exists: name another folder"):
        DiskStore(tmp_path / "file", 10**9, bytes(32))
    with pytest.raises(InputError, match="disk_gb must be"):
        CacheConfig(disk_cache=str(tmp_path), disk_gb=0.0)
    with pytest.raises(InputError, match="leave enable_prefix_caching on"):
        CacheConfig(disk_cache=str(tmp_path), enable_prefix_caching=False)


class Trusting(DiskStore):
    """A store that believes what it reads."""

    def read(self, key: bytes, num_bytes: int) -> bytes | None:
        """The content, whatever it is."""
        data = (self.folder / self._name(key)).read_bytes()[-num_bytes:]
        return data.ljust(num_bytes, b"\0")


def test_a_store_that_checks_nothing_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = ask(engine_of(tmp_path))
    for path in files_of(tmp_path):
        data = path.read_bytes()
        path.write_bytes(data[:100] + bytes(len(data) - 100))
    monkeypatch.setattr("minipaged.execution.disk_store.DiskStore", Trusting)
    assert ask(engine_of(tmp_path)) != (expected, 0)
