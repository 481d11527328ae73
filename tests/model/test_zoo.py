"""Names of models: what each form gives, and what is said of the ones that are none."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from minipaged import LLM, SamplingParams
from minipaged.errors import InputError, ModelError, RequestError
from minipaged.model.loading import zoo
from minipaged.model.loading.shapes import SHAPES, SIMULATED_ONLY, shape
from tests.model.tiny import CONFIGS, dense_logits, drawn_tokens, save_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole tiny model with a tokenizer of 90 letters."""
    save_folder(CONFIGS["gqa"], tmp_path)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:90]
    backend = Backend(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_toy_is_the_same_everywhere_and_says_words() -> None:
    first, again = zoo.load("toy", device="cpu"), zoo.load("toy", device="cpu")
    tokens = first.tokenizer.encode("once upon a time")
    assert torch.equal(dense_logits(first.model, tokens), dense_logits(again.model, tokens))
    for _ in range(60):
        tokens.append(int(dense_logits(first.model, tokens)[-1].argmax()))
    said = first.tokenizer.decode(tokens[16:])
    assert set(said) <= set("abcdefghijklmnopqrstuvwxyz ")
    assert len(set(said)) > 6
    assert dense_logits(first.model, tokens).std() > 0.1


def test_toy_attends_to_everything_before() -> None:
    """A change of the first token is seen in what comes long after: so a wrong page anywhere shows in the text."""
    model = zoo.load("toy", device="cpu").model
    tokens = drawn_tokens(200, 256)
    changed = [(tokens[0] + 1) % 256, *tokens[1:]]
    assert (dense_logits(model, tokens)[-1] - dense_logits(model, changed)[-1]).abs().max() > 1e-3


def test_random_shapes_by_seed() -> None:
    tokens = drawn_tokens(4, 200)
    first, again, other = (zoo.load("random:toy", device="cpu", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(dense_logits(first.model, tokens), dense_logits(again.model, tokens))
    assert not torch.equal(dense_logits(first.model, tokens), dense_logits(other.model, tokens))
    assert first.config == shape("toy")


def test_a_folder(folder: Path) -> None:
    stages: list[tuple[str, int, int]] = []
    loaded = zoo.load(str(folder), device="cpu", dtype="float32", progress=lambda *stage: stages.append(stage))
    tokens = loaded.tokenizer.encode("AB!")
    assert loaded.tokenizer.decode(tokens) == "AB!"
    assert dense_logits(loaded.model, tokens).shape == (3, 97)
    assert stages[-1][1] == stages[-1][2] > 0
    half = zoo.load(str(folder), device="cpu", dtype=torch.bfloat16).model
    assert half.dtype == torch.bfloat16
    assert dense_logits(half, tokens).dtype == torch.float32


def test_a_tokenizer_of_another_model(folder: Path) -> None:
    backend = Backend(models.BPE(vocab={f"t{index}": index for index in range(98)}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    with pytest.raises(ModelError, match=r"98 tokens.*only 97"):
        zoo.load(str(folder), device="cpu")


@pytest.mark.parametrize("name", ["gpt-5", "", "random"])
def test_unknown_names_list_the_known_ones(name: str) -> None:
    with pytest.raises(ModelError) as caught:
        zoo.load(name, device="cpu")
    message = str(caught.value)
    for word in (repr(name), "smollm2-135m", "toy", ".gguf", "hf:org/name", "random:SHAPE", "llama-7b"):
        assert word in message
    assert "opt-13b" not in message
    assert "\n" not in message


@pytest.mark.parametrize("path", ["nowhere/model.gguf", "./nope"])
def test_a_path_that_is_not_there_is_called_one(path: str) -> None:
    with pytest.raises(ModelError) as caught:
        zoo.load(path, device="cpu")
    assert str(caught.value).startswith(f"{path}: there is no such file or folder; give a folder")
    for word in ("smollm2-135m", "toy", ".gguf", "hf:org/name"):
        assert word in str(caught.value)


def test_unknown_and_simulated_shapes() -> None:
    with pytest.raises(ModelError, match=r"'random:gpt-5'.*llama-7b"):
        zoo.load("random:gpt-5", device="cpu")
    with pytest.raises(ModelError, match="simulator only"):
        zoo.load("random:opt-13b", device="cpu")
    assert shape("random:LLaMA-7B") == shape("llama-7b")


@pytest.mark.parametrize("dtype", ["float64", "int8", "half", "", torch.float64, 16], ids=repr)
def test_unknown_dtypes(dtype: Any) -> None:
    with pytest.raises(InputError, match="dtype must be auto, float32, float16, bfloat16"):
        zoo.load("toy", device="cpu", dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "", "meta", "cpu:x", "cuda:99", None], ids=repr)
def test_unknown_devices(device: Any) -> None:
    with pytest.raises(InputError, match="device"):
        zoo.load("toy", device=device)


def test_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = types.ModuleType("huggingface_hub")
    asked: list[tuple[str, list[str]]] = []
    loud: list[bool] = []  # whether the client's own words would be printed meanwhile

    def snapshot_download(repository: str, *, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        loud.append(logging.getLogger("huggingface_hub.utils._http").isEnabledFor(logging.WARNING))
        if repository == "org/gone":
            raise OSError("We couldn't connect\nto the hub")
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download, raising=False)
    monkeypatch.setattr(hub, "hf_hub_download", lambda repository, name: str(folder / name), raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert zoo.load("hf:org/tiny", device="cpu").config.vocab_size == 97
    assert asked[0][0] == "org/tiny"
    assert not any("bin" in pattern or "pt" in pattern for pattern in asked[0][1])
    with pytest.raises(ModelError, match=r"hf:org/gone.*couldn't connect to the hub"):
        zoo.load("hf:org/gone", device="cpu")
    assert loud == [False, False]
    assert logging.getLogger("huggingface_hub.utils._http").isEnabledFor(logging.WARNING)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelError, match="pip install huggingface_hub"):
        zoo.load("hf:org/tiny", device="cpu")


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("smollm2-135m", 0.1345),
        ("llama-7b", 6.738),
        ("llama-13b", 13.016),
        ("llama-33b", 32.53),
        ("llama-65b", 65.29),
        ("llama-70b", 68.98),
        ("llama-3-8b", 8.03),
        ("llama-3.2-1b", 1.236),
        ("mistral-7b", 7.248),
        ("qwen2.5-7b", 7.616),
        ("qwen3-0.6b", 0.596),
        ("qwen3-8b", 8.19),
        ("opt-13b", 12.85),
        ("opt-66b", 65.7),
        ("opt-175b", 175.0),
        ("falcon-40b", 41.3),
    ],
)
def test_shapes_hold_the_published_number_of_parameters(name: str, billions: float) -> None:
    assert shape(name).num_parameters() / 1e9 == pytest.approx(billions, rel=5e-3)


def test_shapes_need_no_torch() -> None:
    code = "import sys, minipaged.model.loading.shapes as s; s.shape('opt-13b'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(zoo.__file__).parents[2], check=False).returncode == 0


def test_every_shape_is_listed_under_its_own_name() -> None:
    assert all(config.name == name for name, config in SHAPES.items())
    assert set(SHAPES) > SIMULATED_ONLY


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        zoo.load(str(tmp_path), device="cpu")


def test_a_folder_without_a_tokenizer_runs_on_token_ids(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    llm = LLM(str(folder), device="cpu", num_blocks=20)
    output = llm.generate({"prompt_token_ids": [5, 96, 7]}, SamplingParams(max_tokens=3, ignore_eos=True))[0].outputs[0]
    assert output.text == "".join(f"<{token}>" for token in output.token_ids)
    with pytest.raises(RequestError, match=r"no tokenizer\.json.*token ids"):
        llm.generate("hello")


def test_ids_past_the_tokenizer_but_inside_the_network_are_prompts(folder: Path) -> None:
    """Vocabularies are padded: this tokenizer has 90 tokens, the network 97."""
    llm = LLM(str(folder), device="cpu", num_blocks=20)
    assert llm.generate({"prompt_token_ids": [90, 96]}, SamplingParams(max_tokens=1))[0].outputs[0].token_ids
    with pytest.raises(RequestError, match="token id 97 is outside the vocabulary"):
        llm.generate({"prompt_token_ids": [97]})


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
def test_logprobs_beyond_the_vocabulary_are_refused_in_plain_words(folder: Path, name: str) -> None:
    llm = LLM(str(folder), device="cpu", num_blocks=20)
    with pytest.raises(RequestError, match=f"{name} must be at most 97, the model's vocabulary, not 98"):
        llm.generate("AB", SamplingParams(max_tokens=1, **{name: 98}))
    output = llm.generate("AB", SamplingParams(max_tokens=1, **{name: 97}))[0]
    entries = output.outputs[0].logprobs if name == "logprobs" else output.prompt_logprobs[1:]
    assert len(entries[0]) >= 97


def test_an_end_that_only_the_tokenizer_names(folder: Path) -> None:
    """Without it an answer would never stop (vLLM takes the tokenizer's as well)."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": None}))
    (folder / "generation_config.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "A"}))
    loaded = zoo.load(str(folder), device="cpu")
    assert loaded.config.eos_token_ids == (loaded.tokenizer.encode("A")[0],)


def test_the_hub_is_asked_for_the_config_before_the_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = types.ModuleType("huggingface_hub")
    asked: list[str] = []

    def hf_hub_download(repository: str, name: str) -> str:
        asked.append(name)
        return str(folder / name)

    def snapshot_download(repository: str, *, allow_patterns: list[str]) -> str:
        asked.append("weights")
        return str(folder)

    monkeypatch.setattr(hub, "hf_hub_download", hf_hub_download, raising=False)
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download, raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    path = folder / "config.json"
    sound = path.read_text()
    path.write_text(json.dumps(json.loads(sound) | {"model_type": "mixtral", "num_local_experts": 8}))
    with pytest.raises(ModelError, match=r"'mixtral' is not supported.*a mixture of experts"):
        zoo.load("hf:org/name", device="cpu")
    assert asked == ["config.json"]
    path.write_text(sound)
    zoo.load("hf:org/name", device="cpu")
    assert asked == ["config.json", "config.json", "weights"]
