"""Mutated files of every kind, seeded and counted: a clean refusal or a model that runs, within a second and 200 MB, and nothing else.

In the continuous check 60 of each kind; `-m slow` runs a thousand of each and prints what became of them.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from minipaged.errors import InputError
from minipaged.model.llama import Llama
from minipaged.model.loading import zoo
from minipaged.model.loading.tokenizer import IdTokenizer
from tests.model.tiny import CONFIGS, dense_logits, make_model, reference_logits, save_folder
from tests.model.tiny_gguf import write_gguf

MOST_SECONDS = 1.0  # of processor time
MOST_BYTES = 200 * 2**20
FEW, MANY = 60, 1000
CORPUS = ["the cat sat on the mat", "hello world, hello there", "übung macht den meister", "1 2 3 go"]
NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 48, 2**31, 2**32, 2**63, 10**30, 10**400, -(10**30), 0.0, 0.5, -1.5, 1e308),
    *(float("nan"), float("inf"), "", "x", "\ud800", "\x1b[2J", "default", "a" * 10_000, "../../etc/passwd"),
    *([], [1], ["x"], [[]], [None] * 50, {}, {"type": "yarn"}, {"content": 5}, {"": {}}, [{"name": "default"}]),
)
Mutate = Callable[[Path, random.Random], None]


FAMILIES = ("llama 3 rope", "granite", "smollm 3 by list", "phi 4 mini", "qwen 3 yarn")


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of several families, in shards and with a tokenizer; beside the first its model as a GGUF file."""
    folders = []
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp("sound")
        config = CONFIGS[family]
        save_folder(type(config)(**(config.to_dict() | {"vocab_size": 320})), folder, max_shard_size="60KB")
        save_tokenizer(folder)
        folders.append(folder)
    write_gguf(folders[0] / "model.gguf", make_model(CONFIGS["gqa"]))
    return folders


def save_tokenizer(folder: Path) -> None:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>", "<unk>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>", "add_bos_token": True}
    added = {"0": {"content": "<s>", "special": True}}
    config = names | {"chat_template": template, "added_tokens_decoder": added, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(names))


def spoil_bytes(data: bytes, rng: random.Random, end: int | None = None) -> bytes:
    """A few bytes, or a number of eight, changed, or a piece cut out, doubled or moved."""
    spoilt, end = bytearray(data), end or len(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(min(end, len(spoilt)))
        match rng.randrange(6):
            case 0 | 1 | 2:
                spoilt[at] = rng.choice((0, 1, 34, 44, 58, 91, 123, 127, 128, 255, rng.randrange(256)))
            case 3:
                number = rng.choice((0, 1, 2**16, 2**31, 2**32, 2**40, 2**63, 2**64 - 1, rng.getrandbits(64)))
                spoilt[at : at + 8] = number.to_bytes(8, "little")
            case 4 if len(spoilt) > 200:
                del spoilt[at : at + rng.choice((1, 2, 8, 100))]
            case 5:
                spoilt[at:at] = spoilt[at : at + rng.choice((1, 8, 40))]
    return bytes(spoilt[: rng.randrange(len(spoilt))] if rng.random() < 0.1 else spoilt)


def spoil_json(value: Any, rng: random.Random) -> Any:
    """One value somewhere inside replaced, removed, renamed or given to its neighbour."""
    places: list[tuple[Any, Any]] = []

    def walk(inside: Any) -> None:
        keys = list(inside) if isinstance(inside, dict) else range(min(len(inside), 30))
        for key in keys[:400] if isinstance(keys, list) else keys:
            places.append((inside, key))
            if isinstance(inside[key], dict | list):
                walk(inside[key])

    walk(value)
    for _ in range(rng.randint(1, 3)):
        inside, key = rng.choice(places)
        if not (key in inside if isinstance(inside, dict) else key < len(inside)):
            continue
        match rng.randrange(6):
            case 0 | 1 | 2:
                inside[key] = rng.choice(NASTY)
            case 3:
                del inside[key]
            case 4:
                other, there = rng.choice(places)
                if there in other if isinstance(other, dict) else there < len(other):
                    inside[key] = json.loads(json.dumps(other[there]))
            case 5 if isinstance(inside, dict):
                inside[rng.choice((key + "x", "rope_scaling", "head_dim", "type", ""))] = inside.pop(key)
    return value


def spoil_file(path: Path, rng: random.Random, *, as_json: bool, end: int | None = None) -> None:
    data = path.read_bytes()
    if as_json and rng.random() < 0.85:
        path.write_text(json.dumps(spoil_json(json.loads(data), rng)))
    else:
        path.write_bytes(spoil_bytes(data, rng, end))


def spoil_gguf(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(spoil_bytes(data, rng, len(data) // 6 if rng.random() < 0.9 else None))


def spoil_weights(folder: Path, rng: random.Random) -> None:
    if rng.random() < 0.4:
        spoil_file(folder / "model.safetensors.index.json", rng, as_json=True)
        return
    path = rng.choice(sorted(folder.glob("*.safetensors")))
    length = int.from_bytes(path.read_bytes()[:8], "little")
    spoil_file(path, rng, as_json=False, end=8 + length if rng.random() < 0.7 else None)


def spoil_config(folder: Path, rng: random.Random) -> None:
    spoil_file(folder / rng.choice(("config.json",) * 4 + ("generation_config.json",)), rng, as_json=True)


def spoil_tokenizer(folder: Path, rng: random.Random) -> None:
    names = ("tokenizer.json",) * 3 + ("tokenizer_config.json", "special_tokens_map.json")
    spoil_file(folder / rng.choice(names), rng, as_json=True)


KINDS: dict[str, tuple[Mutate, str]] = {
    "gguf": (spoil_gguf, "*.gguf"),
    "safetensors": (spoil_weights, "*"),
    "config": (spoil_config, "*"),
    "tokenizer": (spoil_tokenizer, "*"),
}


def peak_bytes() -> int:
    """The most memory that this process has held since `forget_peak`."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def differs_from_transformers(folder: Path, model: Llama) -> bool:
    """Whether transformers loads the same folder and computes something else. (What it cannot load it has no say in.)"""
    tokens = [5, 4, 9, 3, 77, 200, 31]
    try:
        reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        expected = reference_logits(reference, tokens)
    except Exception:
        return False
    return not torch.allclose(dense_logits(model, tokens), expected, rtol=1e-3, atol=1e-3, equal_nan=True)


def outcome(path: Path) -> str:
    """`runs`, or the refusal; whatever else is raised goes through."""
    try:
        loaded = zoo.load(str(path), device="cpu")
        if isinstance(loaded.tokenizer, IdTokenizer):
            tokens = [1, 2, 3]
        else:
            tokens = loaded.tokenizer.encode("hello <s> über\n")
            loaded.tokenizer.decode(range(-1, loaded.tokenizer.vocab_size + 1))
            if loaded.tokenizer.chat_template is not None:
                loaded.tokenizer.chat([{"role": "user", "content": "Hi"}])
        tokens = [token for token in tokens if token < loaded.config.vocab_size] or [0]
        assert dense_logits(loaded.model, tokens).shape == (len(tokens), loaded.config.vocab_size)
    except InputError as error:
        return str(error)
    return "runs"


def run(kind: str, count: int, sounds: list[Path], place: Path) -> Counter[str]:
    """Spoil and load `count` times. Each refusal is one line, and each case keeps to its time and memory."""
    mutate, pattern = KINDS[kind]
    seen: Counter[str] = Counter()
    for number in range(count):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        sound = sounds[number % len(sounds) if kind == "config" else 0]
        for file in sound.glob(pattern):
            shutil.copy(file, place)
        target = place / "model.gguf" if kind == "gguf" else place
        mutate(target, random.Random(f"{kind} {number}"))
        size = sum(file.stat().st_size for file in place.iterdir())
        forget_peak()
        before, start = peak_bytes(), time.process_time()
        found = outcome(target)
        seconds, grown = time.process_time() - start, peak_bytes() - before
        if kind == "config" and found == "runs":
            model = zoo.load(str(target), device="cpu").model
            assert not differs_from_transformers(target, model), (
                f"{kind} {number}: {(target / 'config.json').read_text()}"
            )
        assert "\n" not in found, f"{kind} {number}: {found}"
        assert seconds < MOST_SECONDS, f"{kind} {number}: {seconds:.2f} s"
        assert grown < MOST_BYTES + size, f"{kind} {number}: {grown:,} bytes"
        seen["runs" if found == "runs" else "refused"] += 1
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_mutated_files(kind: str, sounds: list[Path], tmp_path: Path) -> None:
    assert {outcome(sounds[0] / "model.gguf"), *map(outcome, sounds)} == {"runs"}
    seen = run(kind, FEW, sounds, tmp_path / "spoilt")
    assert min(seen["runs"], seen["refused"]) >= 3, "the mutations reach what they should and leave something whole"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_mutated_files(kind: str, sounds: list[Path], tmp_path: Path) -> None:
    print(f"\n{kind}: {dict(run(kind, MANY, sounds, tmp_path / 'spoilt'))}")
