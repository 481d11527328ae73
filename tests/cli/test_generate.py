"""`minipaged generate`: each flag does what it says, or is refused, or is said to change nothing."""

from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from minipaged import __version__
from minipaged.api import LLM
from minipaged.cli import generate as module
from minipaged.cli.main import app
from minipaged.cli.terminal import run_guarded
from minipaged.config import SamplingParams
from minipaged.model.loading.chat_template import ChatTemplate

PROMPT = "hello"


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("toy", num_blocks=200, device="cpu")


@pytest.fixture
def run(llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Exit code, standard output and standard error of `generate` with the toy."""

    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(module, "load", lambda model, settings: llm)
        code = run_guarded(partial(app, args=["generate", *args]))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def answer(llm: LLM, **params: Any) -> Any:
    return llm.generate(PROMPT, SamplingParams(**params))[0].outputs[0]


def test_a_stop_string_ends_the_answer_before_itself(run: Any, llm: LLM) -> None:
    text = answer(llm, max_tokens=40).text
    stop = text[20:23]
    code, out, _ = run(PROMPT, "--max-tokens", "40", "--stop", "QQ", "--stop", stop)
    assert code == 0
    assert out == text[: text.index(stop)] + "\n"


@pytest.mark.parametrize(
    ("flags", "params"),
    [
        (["--min-p", "0.4"], {"min_p": 0.4}),
        (["--top-k", "3"], {"top_k": 3}),
        (["--top-p", "0.3"], {"top_p": 0.3}),
        (["--repetition-penalty", "1.8"], {"repetition_penalty": 1.8}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_flags_of_sampling_reach_the_sampler(run: Any, llm: LLM, flags: list[str], params: dict[str, Any]) -> None:
    drawn = {"max_tokens": 40, "temperature": 1.5, "seed": 3}
    expected = answer(llm, **drawn, **params).token_ids
    assert expected != answer(llm, **drawn).token_ids
    code, out, err = run(PROMPT, "--max-tokens", "40", "--temperature", "1.5", "--seed", "3", "--json", *flags)
    assert code == 0
    assert json.loads(out)["answers"][0]["outputs"][0]["token_ids"] == expected
    assert "nothing" not in err


def test_logprobs_stand_in_the_json(run: Any, llm: LLM) -> None:
    code, out, _ = run(PROMPT, "--max-tokens", "5", "--logprobs", "2", "--json")
    told = json.loads(out)["answers"][0]["outputs"][0]
    expected = answer(llm, max_tokens=5, logprobs=2)
    assert code == 0
    assert told["token_ids"] == expected.token_ids
    assert told["cumulative_logprob"] == pytest.approx(expected.cumulative_logprob)
    for row, known, token in zip(told["logprobs"], expected.logprobs, expected.token_ids, strict=True):
        assert {int(key): (value["logprob"], value["rank"]) for key, value in row.items()} == {
            key: value[:2] for key, value in known.items()
        }
        assert str(token) in row
    plain = json.loads(run(PROMPT, "--max-tokens", "5", "--json")[1])["answers"][0]["outputs"][0]
    assert not {"logprobs", "cumulative_logprob"} & set(plain), "none were asked for"


def test_a_file_of_prompts_comes_after_those_given(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("one\n# a comment\n\ntwo [/b]\n")
    code, out, _ = run("zero", "--prompts-file", str(path), "--max-tokens", "2")
    assert code == 0
    assert [line for line in out.splitlines() if line.startswith("── ")] == ["── zero", "── one", "── two [/b]"]
    path.write_text("# nothing\n")
    assert run("--prompts-file", str(path))[0] == 2


def test_the_system_prompt_goes_through_the_template(run: Any, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}")
    monkeypatch.setattr(llm.tokenizer, "chat_template", template)
    code, out, _ = run(PROMPT, "--system", "Be brief.", "--max-tokens", "20")
    assert code == 0
    expected = llm.generate("system=Be brief.;user=hello;", SamplingParams(max_tokens=20))[0].outputs[0].text
    assert out == expected + "\n"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--logprobs", "2"], "--logprobs needs --json"),
        (["--system", "x", "--raw"], "--system needs the model's chat template"),
        (["--system", "x"], "no chat template"),
        (["--stop", ""], "stop must be non-empty"),
        (["--min-p", "2"], "min_p must be at least 0 and at most 1"),
        (["--repetition-penalty", "0"], "repetition_penalty must be above 0"),
        (["--prompts-file", "no-such-file"], "no-such-file"),
        (["--logprobs", "101", "--json"], "logprobs must be from 0 to 100"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused(run: Any, flags: list[str], named: str) -> None:
    code, out, err = run(PROMPT, *flags)
    assert (code, out) == (2, "")
    assert err.startswith("minipaged: ")
    assert named in err
    assert err.count("\n") == 1


GREEDY = "at temperature 0 the most likely token is always taken"


@pytest.mark.parametrize(
    ("flags", "warning"),
    [
        (["--top-p", "0.5"], f"--top-p changes nothing: {GREEDY}"),
        (["--top-k", "5", "--min-p", "0.1", "--seed", "0"], f"--top-k and --min-p and --seed change nothing: {GREEDY}"),
        (["--n", "2"], f"--n changes nothing: {GREEDY}"),
        (["--beam-width", "2", "--seed", "1"], "--seed changes nothing: a beam search draws nothing"),
        (["--beam-width", "2", "--n", "2"], None),
        (["--temperature", "1", "--top-p", "0.5", "--top-k", "5", "--seed", "1", "--n", "2"], None),
        (["--repetition-penalty", "1.5"], None),
        ([], None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_that_change_nothing_are_named_in_one_line(run: Any, flags: list[str], warning: str | None) -> None:
    code, _, err = run(PROMPT, "--max-tokens", "2", *flags)
    assert code == 0
    assert [line for line in err.splitlines() if line.startswith("minipaged: ")] == (
        [f"minipaged: {warning}"] if warning else []
    )


def test_a_refused_prompt_is_told_in_one_safe_line(run: Any) -> None:
    code, _, err = run("\x1b[2J[/b]" + "x" * 5000, "fine", "--max-tokens", "2")
    told = next(line for line in err.splitlines() if line.startswith("minipaged: "))
    assert code == 2
    assert "[/b]" in told
    assert "\x1b" not in err


def test_standard_input_is_a_prompt(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    assert run("-", "--max-tokens", "3")[1] == run("hello", "--max-tokens", "3")[1]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_guarded(partial(app, args=["--version"])) == 0
    assert capsys.readouterr().out == f"minipaged {__version__}\n"


def test_the_users_block_manager_is_compared_with_minipageds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second line, of the same run under minipaged's; what fails in the user's class ends the run with its line."""
    path = tmp_path / "my.py"
    head = "from minipaged.memory.block_manager import BlockManager\nclass Mine(BlockManager):\n"
    command = ["generate", PROMPT, "--model", "toy", "--num-blocks", "40", "--max-tokens", "8"]
    command += ["--block-manager", f"{path}:Mine"]
    path.write_text(head + "    pass\n", encoding="utf-8")
    assert run_guarded(partial(app, args=command)) == 0
    mine, ours = capsys.readouterr().err.splitlines()[-2:]
    assert mine.partition(" blocks")[2] == ours.partition(" blocks")[2]
    assert ours.startswith("minipaged's manager, the same text: ")
    path.write_text(head + "    def append(self, *a):\n        raise KeyError(3)\n", encoding="utf-8")
    assert run_guarded(partial(app, args=command)) == 1
    assert (
        "your block manager failed in Mine.append: KeyError: 3 (my.py:4: raise KeyError(3))" in capsys.readouterr().err
    )
