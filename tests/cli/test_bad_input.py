"""Whatever a user gets wrong is one line that names it, exit code 2, and no traceback."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from minipaged.api import LLM
from minipaged.cli.main import app
from minipaged.cli.terminal import run_guarded
from minipaged.config import SamplingParams
from minipaged.errors import InputError, RequestError

TOY = ["--model", "toy", "--raw"]


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    try:
        code = run_guarded(partial(app, args=list(args)))
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["generate", "x", "--model", "nope"], "nope"),
        (["generate", ""], "empty"),
        (["generate", "x", "--n", "0"], "n must be from 1 to 1024, not 0"),
        (["generate", "x", "--temperature", "-1"], "temperature must be at least 0, not -1"),
        (["generate", "x", "--temperature", "nan"], "temperature"),
        (["generate", "x", "--top-p", "1.5"], "top_p must be above 0 and at most 1, not 1.5"),
        (["generate", "x", "--block-size", "0"], "block_size must be from 1 to 256, not 0"),
        (["generate", "x", "--max-tokens", "-3"], "max_tokens must be at least 1, not -3"),
        (["generate", "x", "--dtype", "float8"], "dtype"),
        (["generate", "x", "--device", "tpu"], "device"),
        (["generate", "x", "--num-blocks", "1"], "num_blocks must be at least 2, not 1"),
        (["generate", "x" * 20, *TOY, "--num-blocks", "2"], "pool has 1"),
        (["generate", "x" * 5000, *TOY], "context"),
        (["tui", "--replay", "no-such-file.trace"], "no-such-file.trace"),
        (["tui", "--prompts", "no-such-file.txt"], "no-such-file.txt"),
        (["tui", "--scenario", "opera"], "orca"),
        (["tui", "--steps", "0"], "steps must be at least 1, not 0"),
        (["tui", "--size", "wide"], "120x40"),
        (["tui", "--record", "no/such/folder/run.trace"], "does not exist"),
        (["generate", "x", *TOY, "--retention", "window:0"], "window of a retention policy must be from 1"),
        (["generate", "x", *TOY, "--retention", "sinks:4"], "sinks need a window"),
        (["generate", "x", *TOY, "--retention", "sinks:0+window:64"], "window:64 says the same"),
        (["generate", "x", *TOY, "--retention", "h2o:512"], "sinks:S+window:W or h2o:HEAVY+RECENT"),
        (["generate", "x", *TOY, "--retention", "h2o:0+512"], "window:512 says the same"),
        (["generate", "x", *TOY, "--retention", "h2o:512+0"], "recent tokens beside heavy hitters must be from 1"),
        (["generate", "x", *TOY, "--retention", "h2o:4+4"], "less than a block (16 tokens)"),
        (["generate", "x", *TOY, "--retention", "window:-4"], "all, window:W, sinks:S+window:W"),
        (["generate", "x", *TOY, "--retention", "window:8"], "less than a block (16 tokens)"),
        (["generate", "x", *TOY, "--retention", "window:99999999999"], "must be from 1 to"),
        (["tui", "--scenario", "cow", "--retention", "window:64"], "takes no --retention"),
        (["generate", "x", "--no-such-option"], "no-such-option"),
        (["generate"], "PROMPT"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str], args: list[str], named: str) -> None:
    code, _, err = run(capsys, *args)
    assert code == 2
    assert named in err
    assert "Traceback" not in err
    if "option" not in named and named != "PROMPT":  # usage errors are framed by the parser
        told = [line for line in err.splitlines() if line.startswith("minipaged: ")]
        assert len(told) == 1


def hf_folder(folder: Path) -> Path:
    from tests.exactness.test_tiny_models import SHAPES, tiny_llama

    tiny_llama(folder, SHAPES["gqa"])
    return folder


def truncate(folder: Path) -> None:
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1000])


def drop_field(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["hidden_size"]
    (folder / "config.json").write_text(json.dumps(config))


def to_pickle(folder: Path) -> None:
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    torch.save({"w": torch.zeros(1)}, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("spoil", "named"), [(truncate, "safetensors"), (drop_field, "hidden_size"), (to_pickle, "pytorch_model.bin")]
)
def test_damaged_folders(capsys: pytest.CaptureFixture[str], tmp_path: Path, spoil: Any, named: str) -> None:
    spoil(hf_folder(tmp_path))
    code, _, err = run(capsys, "generate", "x", "--model", str(tmp_path))
    assert code == 2
    assert named in err
    assert "Traceback" not in err


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64, b"not a model at all"])
def test_corrupt_gguf(capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    code, _, err = run(capsys, "generate", "x", "--model", str(path))
    assert code == 2
    assert "broken.gguf" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("content", [b"", b"{}", b"hello, I am no trace", b"\x00" * 100])
def test_a_replay_that_is_none(capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.trace"
    path.write_bytes(content)
    code, _, err = run(capsys, "tui", "--replay", str(path), "--headless")
    assert code == 2
    assert "broken.trace" in err
    assert "Traceback" not in err


def test_one_bad_prompt_does_not_stop_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "generate", "good", "x" * 5000, "fine", *TOY, "--max-tokens", "4", "--json")
    answers = json.loads(out)["answers"]
    assert code == 2
    assert [bool(a["error"]) for a in answers] == [False, True, False]
    assert len(answers[0]["outputs"][0]["token_ids"]) == len(answers[2]["outputs"][0]["token_ids"]) == 4
    assert "context" in err


def test_the_python_api_says_the_same() -> None:
    llm = LLM("toy", num_blocks=40)
    with pytest.raises(RequestError, match="empty"):
        llm.generate("")
    with pytest.raises(RequestError, match="outside the vocabulary"):
        llm.generate({"prompt_token_ids": [10**6]})
    with pytest.raises(RequestError, match="prompt_token_ids"):
        llm.generate({"text": "x"})
    with pytest.raises(InputError, match="max_tokens"):
        SamplingParams(max_tokens=True)
    good, bad = llm.generate(["hello", "x" * 5000], SamplingParams(max_tokens=3))
    assert good.finished
    assert bad.error is not None
    assert llm.engine.scheduler.manager.usage().referenced == 0
