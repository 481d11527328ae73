"""What code written for other engines passes in, and what it reads from the outputs: taken as they mean it, or refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from minipaged.api import LLM
from minipaged.config import SamplingParams
from minipaged.errors import InputError, RequestError
from minipaged.model.loading.tokenizer import ByteTokenizer
from minipaged.text.detokenizer import Detokenizer

SHORT = SamplingParams(max_tokens=6, ignore_eos=True)
IDS = [5, 6, 7, 8]


@pytest.fixture
def llm() -> LLM:
    return LLM("toy", num_blocks=64, block_size=4)


def answer(llm: LLM, prompt: Any, params: SamplingParams = SHORT) -> list[int]:
    (output,) = llm.generate(prompt, params)
    return output.outputs[0].token_ids


def test_sampling_params_and_use_tqdm(llm: LLM) -> None:
    wanted = answer(llm, "hello")
    assert llm.generate("hello", sampling_params=SHORT, use_tqdm=False)[0].outputs[0].token_ids == wanted
    assert llm.generate(["hello"], SHORT, True)[0].outputs[0].token_ids == wanted
    assert [o.outputs[0].token_ids for o in llm.stream("hello", sampling_params=SHORT)][-1] == wanted
    with pytest.raises(RequestError, match="params and sampling_params are the same"):
        llm.generate("hello", SHORT, sampling_params=SHORT)


@pytest.mark.parametrize(
    "prompt",
    [
        IDS,
        tuple(IDS),
        range(5, 9),
        np.array(IDS),
        list(np.array(IDS, np.int32)),
        torch.tensor(IDS),
        [IDS],
        np.array([IDS]),
        [torch.tensor(IDS)],
        {"prompt_token_ids": np.array(IDS)},
        [{"prompt_token_ids": list(torch.tensor(IDS))}],
    ],
    ids=repr,
)
def test_token_ids_in_any_form_are_one_prompt(llm: LLM, prompt: Any) -> None:
    assert llm.generate(prompt, SHORT)[0].prompt_token_ids == (5, 6, 7, 8)
    assert answer(llm, prompt) == answer(llm, {"prompt_token_ids": IDS})


def test_several_prompts_in_any_form(llm: LLM) -> None:
    outputs = llm.generate([IDS, "text", {"prompt": "text"}, np.array([9])], SHORT)  # type: ignore[list-item]
    assert [o.prompt_token_ids for o in outputs] == [(5, 6, 7, 8), tuple(b"text"), tuple(b"text"), (9,)]
    assert [o.prompt_token_ids for o in llm.generate(np.array([IDS, IDS]), SHORT)] == [(5, 6, 7, 8)] * 2  # type: ignore[arg-type]


@pytest.mark.parametrize("prompt", [[1.5, 2], [True, False], np.array([1.5]), [[1.5]], [IDS, 5], [-1]], ids=repr)
def test_what_is_no_prompt_is_refused(llm: LLM, prompt: Any) -> None:
    with pytest.raises(RequestError):
        llm.generate(prompt, SHORT)
    assert not llm.engine.has_work


def test_numbers_of_numpy_and_tensors() -> None:
    asked = SamplingParams(
        n=np.int64(2),  # type: ignore[arg-type]
        max_tokens=np.int32(5),  # type: ignore[arg-type]
        temperature=np.float32(0.5),  # type: ignore[arg-type]
        top_p=torch.tensor(0.5),  # type: ignore[arg-type]
        seed=torch.tensor(7),  # type: ignore[arg-type]
        ignore_eos=np.bool_(True),  # type: ignore[arg-type]
        stop_token_ids=np.array([3, 4]),  # type: ignore[arg-type]
    )
    assert asked == SamplingParams(
        n=2, max_tokens=5, temperature=0.5, top_p=0.5, seed=7, ignore_eos=True, stop_token_ids=(3, 4)
    )
    assert type(asked.n) is int
    assert type(asked.temperature) is float
    assert type(asked.stop_token_ids[0]) is int


def test_other_engines_words_for_no_limit() -> None:
    asked = SamplingParams(top_k=-1, seed=-1, stop=None, stop_token_ids=None)  # type: ignore[arg-type]
    assert asked == SamplingParams()
    with pytest.raises(InputError, match="logprobs=-1, the whole vocabulary, is not offered: ask for 0 to 100"):
        SamplingParams(logprobs=-1)


@pytest.mark.parametrize("most", [None, 10**6])
def test_an_answer_without_a_limit_ends_with_the_context(most: Any) -> None:
    llm = LLM("toy", num_blocks=64, block_size=4, max_model_len=40)
    (output,) = llm.generate([IDS], SamplingParams(max_tokens=most, min_tokens=3, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 36
    assert output.outputs[0].finish_reason == "length"
    too_long = llm.generate([IDS, [1] * 40], SamplingParams(max_tokens=most, ignore_eos=True))[1]
    assert "context holds 40" in (too_long.error or "")


@pytest.mark.parametrize("n", [1, 3])
def test_an_answer_without_a_limit_ends_with_a_pool_that_is_smaller(n: int) -> None:
    """8 blocks of 4: the prompt's one full block is held once, the other seven by 1 or 3."""
    llm = LLM("toy", num_blocks=9, block_size=4, watermark=0.0)
    params = SamplingParams(max_tokens=None, n=n, temperature=1.0, ignore_eos=True)  # type: ignore[arg-type]
    (output,) = llm.generate([[1, 2, 3, 4, 5]], params)
    assert {len(o.token_ids) for o in output.outputs} == {4 * (1 + 7 // n) - 5}
    with pytest.raises(RequestError, match="raise num_blocks"):
        llm.generate("hello", SamplingParams(max_tokens=100))


def test_settings_of_other_engines() -> None:
    with pytest.warns(UserWarning, match="trust_remote_code is ignored"):
        LLM("toy", num_blocks=8, enforce_eager=True, gpu_memory_utilization=0.5, trust_remote_code=True)
    for setting, value, named in (
        ("tensor_parallel_size", 0, "tensor_parallel_size must be from 1 to 64, not 0"),
        ("gpu_memory_utilization", 1.5, "gpu_memory_utilization must be above 0 and at most 1"),
        ("enforce_eager", "yes", "enforce_eager must be true or false"),
    ):
        with pytest.raises(InputError, match=named):
            LLM("toy", **{setting: value})  # type: ignore[arg-type]


def test_cached_tokens_and_a_cache_that_is_forgotten(llm: LLM) -> None:
    prompt = list(range(1, 14))
    assert [llm.generate(prompt, SHORT)[0].num_cached_tokens for _ in range(2)] == [0, 12]
    assert llm.reset_prefix_cache()
    assert llm.generate(prompt, SHORT)[0].num_cached_tokens == 0
    stream = llm.stream(prompt, SHORT)
    next(stream)
    assert not llm.reset_prefix_cache()
    assert len(list(stream)) == 5


def test_the_reason_of_a_stop(llm: LLM) -> None:
    tokens = answer(llm, "hello")
    (stopped,) = llm.generate("hello", SamplingParams(stop_token_ids=(tokens[2],), ignore_eos=True))
    first = tokens.index(tokens[2])
    assert stopped.outputs[0].token_ids == tokens[: first + 1]
    assert stopped.outputs[0].stop_reason == tokens[2]
    assert llm.generate("hello", SHORT)[0].outputs[0].stop_reason is None
    llm.engine.eos_token_ids = (tokens[2],)
    ended = llm.generate("hello", SamplingParams(max_tokens=6))[0].outputs[0]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", None)


class Scripted(ByteTokenizer):
    """Every drawn token is a letter of `said` by its number in the answer's order, and `special` reads <|im_end|>."""

    def __init__(self, names: dict[int, bytes], special: int) -> None:
        super().__init__()
        self.names, self.special = names, special

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        ends = text.endswith("<|im_end|>")
        return [*super().encode(text.removesuffix("<|im_end|>")), *([self.special] if ends else ())]

    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        if token_id == self.special:
            return b"" if skip_special else b"<|im_end|>"
        return self.names.get(token_id, b"?")


def scripted(llm: LLM, prompt: str) -> list[int]:
    """Let the answer to the prompt read "abcd…", one letter a token, its fourth token being special."""
    tokens = answer(llm, prompt)
    assert len(set(tokens)) == 6, "the toy repeats itself: take another prompt"
    codec = Scripted({token: bytes([97 + i]) for i, token in enumerate(tokens)}, tokens[3])
    llm.engine.detokenizer = llm.engine.scheduler.text_stops = Detokenizer(codec)
    return tokens


@pytest.fixture
def prompt(llm: LLM) -> str:
    """One whose six tokens differ."""
    return next(text for text in map(str, range(200)) if len(set(answer(llm, text))) == 6)


def test_a_stop_string_that_is_a_special_token_stops(llm: LLM, prompt: str) -> None:
    tokens = scripted(llm, prompt)
    for stop in ("<|im_end|>", ["x", "<|im_end|>"]):
        (output,) = llm.generate(prompt, SamplingParams(max_tokens=6, stop=stop, ignore_eos=True))  # type: ignore[arg-type]
        said = output.outputs[0]
        assert said.token_ids == tokens[:4]
        assert (said.text, said.finish_reason, said.stop_reason) == ("abc", "stop", "<|im_end|>")


def test_special_tokens_and_stop_strings_in_the_text(llm: LLM, prompt: str) -> None:
    scripted(llm, prompt)

    def said(**options: Any) -> tuple[str, int | str | None]:
        completion = llm.generate(prompt, SamplingParams(max_tokens=6, ignore_eos=True, **options))[0].outputs[0]
        return completion.text, completion.stop_reason

    assert said() == ("abcef", None)
    assert said(skip_special_tokens=False) == ("abc<|im_end|>ef", None)
    assert said(stop=("bc", "x")) == ("a", "bc")
    assert said(stop="bc", include_stop_str_in_output=True) == ("abc", "bc")
    assert said(stop="<|im_end|>", include_stop_str_in_output=True, skip_special_tokens=False) == (
        "abc<|im_end|>",
        "<|im_end|>",
    )


def test_what_a_stream_calls_certain_stays_with_a_stop_string_that_is_kept(llm: LLM, prompt: str) -> None:
    scripted(llm, prompt)
    params = SamplingParams(max_tokens=6, stop="bcx", include_stop_str_in_output=True, ignore_eos=True)
    texts = [output.outputs[0].text for output in llm.stream(prompt, params)]
    assert texts == ["a", "ab", "abc", "abc", "abce", "abcef"]


def test_logprobs_name_their_tokens(llm: LLM, prompt: str) -> None:
    tokens = scripted(llm, prompt)
    params = SamplingParams(max_tokens=6, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    (output,) = llm.generate(prompt, params)
    logprobs = output.outputs[0].logprobs
    assert logprobs is not None
    assert [entry[token].decoded_token for entry, token in zip(logprobs, tokens, strict=True)] == [
        *("a", "b", "c", "<|im_end|>", "e", "f")
    ]
    assert all(value.decoded_token for entry in logprobs for value in entry.values())


def test_a_bias_in_any_form_is_the_same() -> None:
    """JSON writes token ids as texts."""
    wanted = SamplingParams(logit_bias=((3, 1.0), (7, -2.0)))
    for given in ({7: -2, 3: 1}, {"7": -2.0, "3": 1.0}, [(7, -2.0), (3, np.float32(1.0))], {np.int64(3): 1, 7: -2}):
        assert SamplingParams(logit_bias=given) == wanted  # type: ignore[arg-type]
    assert SamplingParams(logit_bias=None, bad_words=None) == SamplingParams()  # type: ignore[arg-type]


@pytest.mark.parametrize("overlap", [0, 1])
def test_a_bad_word_is_never_finished(overlap: int) -> None:
    """Its last token is forbidden behind the others in the answer; the prompt does not count, nor does a part of the word."""
    llm = LLM("toy", num_blocks=64, block_size=4, overlap=overlap)
    for text in map(str, range(500)):
        free = answer(llm, text)
        at = next((i for i in range(1, 6) if all(33 <= t < 127 for t in free[i - 1 : i + 1])), 0)
        if at:
            break
    pair = chr(free[at - 1]) + chr(free[at])
    (output,) = llm.generate(text, SamplingParams(max_tokens=40, bad_words=(pair, "zzz"), ignore_eos=True))
    tokens = output.outputs[0].token_ids
    assert tokens[:at] == free[:at]
    assert tokens[at] != free[at]
    assert bytes(map(ord, pair)) not in bytes(t if t < 256 else 0 for t in tokens)
    alone = answer(llm, text + pair[0])[0]
    behind = SamplingParams(max_tokens=1, bad_words=(pair[0] + chr(alone),) if 33 <= alone < 127 else (pair,))
    assert answer(llm, text + pair[0], behind) == [alone], "half of it stands in the prompt"
    one = SamplingParams(max_tokens=6, bad_words=pair[1], ignore_eos=True)  # type: ignore[arg-type]
    assert free[at] not in answer(llm, text, one)


@pytest.mark.parametrize("changed", [{"logit_bias": {10**6: 1.0}}, {"allowed_token_ids": (10**6,)}], ids=repr)
def test_tokens_outside_the_vocabulary_are_refused(llm: LLM, changed: Any) -> None:
    with pytest.raises(RequestError, match="outside the vocabulary"):
        llm.generate("x", SamplingParams(**changed))


@pytest.mark.parametrize(
    "changed",
    [
        {"presence_penalty": 1.0},
        {"frequency_penalty": 1.0},
        {"logit_bias": {1: 1.0}},
        {"allowed_token_ids": (1, 2)},
        {"bad_words": ("x",)},
    ],
    ids=repr,
)
def test_a_beam_search_refuses_changed_logits(llm: LLM, changed: Any) -> None:
    with pytest.raises(RequestError, match=f"{next(iter(changed))} must keep its default with beam_width"):
        llm.generate("x", SamplingParams(beam_width=2, **changed))


def test_samples_have_their_own_counts(llm: LLM) -> None:
    """Each of n greedy samples is penalized for what it has drawn itself, as one that is alone."""
    common: dict[str, Any] = {"max_tokens": 9, "allowed_token_ids": tuple(range(40)), "frequency_penalty": 2.0}
    alone, many = llm.generate(["x", "x"], [SamplingParams(**common), SamplingParams(n=2, **common)])
    assert [o.token_ids for o in many.outputs] == [alone.outputs[0].token_ids] * 2
    assert all(token < 40 for token in alone.outputs[0].token_ids)
