"""The Python API: LLM(model).generate(prompts, SamplingParams). Puts a model, a pool and an engine together and runs them to the end."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self

from minipaged.config import (
    DEFAULT_MODEL,
    WEIGHTS,
    CacheConfig,
    EngineConfig,
    KVCacheDType,
    SamplingParams,
    Weights,
    check_bool,
    check_choice,
    check_int,
    check_real,
    parse_offload,
    plain_value,
)
from minipaged.engine import Engine
from minipaged.errors import RequestError
from minipaged.memory.retention import Retention
from minipaged.scheduling.request import RequestOutput

if TYPE_CHECKING:
    from minipaged.page.recording import Recording

# Text, token ids, or a mapping: {"prompt": text}, or {"prompt_token_ids": [...]} with the text beside it or not.
Prompt = str | Sequence[int] | Mapping[str, Any]
Prompts = Prompt | Sequence[Prompt]
Params = SamplingParams | Sequence[SamplingParams]
Message = Mapping[str, str]

MOST_RANKS = 64


class LLM:
    """A model ready to generate.

    - model: a name of the zoo, a Hugging Face folder, a GGUF file or `hf:org/name`.
    - device: auto, cpu, cuda or cuda:N.
    - dtype: auto, float32, float16 or bfloat16.
    - weights: packed keeps matrices that the file holds as codes of 4 to 8 bits, dense makes floats of them, auto packs where that is
      faster (a GPU, or a CPU in bfloat16).
    - offload_weights: GB of the layers' weights that stay in host memory and are copied to the device in each step, auto for what the
      device has no room for, which is said with the speed to expect.
    - kv_cache_dtype: what keys and values are kept as, auto (dtype), int8 or fp8, which take about half the memory of sixteen bits
      (fp8 is e4m3; each token and KV head has a scale).
    - num_blocks: blocks of the KV pool, None to measure what fits.
    - num_host_blocks: blocks of host memory, for swapped requests, and the rest for cached prefixes that leave the pool and come back
      on a hit.
    - disk_cache: a folder where full blocks are kept, up to disk_gb GB (1e9 bytes), for this process and later ones (it holds
      prompts).
    - preemption: auto, recompute or swap (to host memory).
    - policy: fcfs, or priority, under which the smaller SamplingParams.priority is served first and running requests make way for a
      more urgent one that waits.
    - retention: which tokens stay in memory, `all`, `window:W`, `h2o:HEAVY+RECENT` (heavy hitters) or `sinks:S+window:W`
      (StreamingLLM: max_model_len may be beyond the model's context), None for what the model's own windows allow.
    - block_manager: a class of the user's in place of BlockManager, or FILE.py:CLASS, whose failures raise BlockManagerError.
    - overlap: steps in flight beside the one being committed, auto is 1 on a GPU and 0 on a CPU.
    - graphs: replay decode steps as CUDA graphs where there is a GPU.
    - warm_up: compile the kernels there at the start, so that no request waits for one (those of packed weights, windows, heavy
      hitters and several ranks are still compiled when they are first used).
    - tensor_parallel: processes that share the model, each on a GPU of its own, or all on the CPU.
    - pipeline_parallel: stages that the layers are cut into, each of so many processes. This process starts the others, unless
      torchrun has started all of them: then each makes the same LLM, and only rank 0 comes back from it (execution/README.md).
    - trace: record every step from the start, for the attribute `trace`.

    Raises InputError naming the value that does not work.

    Names of vLLM that mean the same here: gpu_memory_utilization, the share of a GPU's memory, as it is free once the weights are loaded,
    that the pool is given where num_blocks is None; enforce_eager=True for graphs=False; tensor_parallel_size for
    tensor_parallel; trust_remote_code, which is ignored with a warning, since no code of a model is ever run.
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        device: str = "auto",
        dtype: str = "auto",
        weights: Weights = "auto",
        offload_weights: str | float = "none",
        kv_cache_dtype: KVCacheDType = "auto",
        block_size: int = 16,
        num_blocks: int | None = None,
        num_host_blocks: int = 0,
        disk_cache: str | None = None,
        disk_gb: float = 10.0,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2048,
        max_model_len: int | None = None,
        enable_prefix_caching: bool = True,
        retention: str | None = None,
        block_manager: str | type | None = None,
        watermark: float = 0.01,
        preemption: Literal["auto", "recompute", "swap"] = "auto",
        policy: Literal["fcfs", "priority"] = "fcfs",
        overlap: Literal["auto"] | int = "auto",
        graphs: bool = True,
        warm_up: bool = True,
        seed: int = 0,
        tensor_parallel: int = 1,
        pipeline_parallel: int = 1,
        progress: Callable[[str, int, int], None] | None = None,
        trace: bool = False,
        gpu_memory_utilization: float = 0.9,
        enforce_eager: bool = False,
        tensor_parallel_size: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        arguments = {
            name: value
            for name, value in locals().items()
            if name not in ("self", "progress", "block_manager", "trace")
        }
        check_choice("dtype", dtype, ("auto", "float32", "float16", "bfloat16"))
        check_choice("weights", weights, WEIGHTS)
        if overlap != "auto":
            check_int("overlap", overlap, 0, 1)
        if num_blocks is not None:
            check_int("num_blocks", num_blocks, 2)
        if max_model_len is not None:
            check_int("max_model_len", max_model_len, 2)
        check_real("gpu_memory_utilization", gpu_memory_utilization, 0.0, 1.0, open_low=True)
        check_bool("enforce_eager", enforce_eager)
        check_bool("warm_up", warm_up)
        check_bool("trace", trace)
        ranks = check_int("tensor_parallel", tensor_parallel, 1, MOST_RANKS)
        if tensor_parallel_size is not None:
            ranks = check_int("tensor_parallel_size", tensor_parallel_size, ranks, MOST_RANKS)
        if trust_remote_code:
            warnings.warn("trust_remote_code is ignored: no code of a model is ever run", stacklevel=2)
        if retention is not None:
            Retention.parse(retention)
        parse_offload(offload_weights)
        manager_class = None
        if block_manager is not None:
            from minipaged.memory.own_manager import find_class

            manager_class = find_class(block_manager)
        # every number is checked before the model is fetched
        cache = CacheConfig(
            *(
                block_size,
                num_blocks or 2,
                num_host_blocks,
                enable_prefix_caching,
                watermark,
                kv_cache_dtype,
                retention,
            ),
            disk_cache=disk_cache,
            disk_gb=disk_gb,
        )
        config = EngineConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len or 1,
            policy=policy,
            preemption=preemption,
            seed=seed,
        )
        from minipaged.assembly import assemble  # torch is imported only once the arguments are known to be good

        self._parts = assemble(
            model,
            cache,
            config,
            device=device,
            dtype=dtype,
            weights=weights,
            num_blocks=num_blocks,
            max_model_len=max_model_len,
            progress=progress,
            overlap=None if overlap == "auto" else overlap,
            graphs=graphs and not enforce_eager,
            gpu_share=gpu_memory_utilization,
            warm_up=warm_up,
            tensor_parallel=ranks,
            pipeline_parallel=check_int("pipeline_parallel", pipeline_parallel, 1, MOST_RANKS),
            arguments=arguments,
            manager_class=manager_class,
            offload=offload_weights,
        )
        self.engine: Engine = self._parts.engine
        self.tokenizer = self._parts.tokenizer
        self.model_config = self._parts.model_config
        self._recording: Recording | None = None
        if trace:
            self._begin_recording()

    @property
    def trace(self) -> Recording:
        """What was done, step by step: a notebook shows it as a page that plays, `save(path)` writes it to a file.

        Recorded from the start with LLM(..., trace=True), else from when this is first read: what was done before is not in it.
        """
        return self._begin_recording() if self._recording is None else self._recording

    def _begin_recording(self) -> Recording:
        from minipaged.page.recording import Recording
        from minipaged.trace.file import header_of

        self._recording = Recording(self.engine.trace.subscribe, partial(header_of, self.engine))
        return self._recording

    def close(self) -> None:
        """End the other ranks and write what the disk cache still has to, where there are any. Nothing can be generated afterwards.

        `with LLM(...) as llm:` does it at the end. Without it the ranks end, and what the disk cache's thread was given is written, when
        the LLM is no longer used, at the latest as this process ends."""
        if self.engine.scheduler.disk is not None:
            self.engine.scheduler.disk.close()
        if self._parts.ranks is not None:
            self._parts.ranks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(
        self,
        prompts: Prompts,
        params: Params | None = None,
        use_tqdm: object = False,
        *,
        sampling_params: Params | None = None,
    ) -> list[RequestOutput]:
        """Answer every prompt; the outputs stand in the prompts' order.

        prompts: one or a list; a list of whole numbers is one prompt of token ids, and so is an array of them. params, or sampling_params:
        one for all, or one a prompt. use_tqdm is taken and ignored: nothing is drawn.

        A request that cannot be served comes back with `error` set and the others go on; if none can be, RequestError is raised. Several
        threads may call it at once, and it may be called while a stream is read: each gets all of its own.
        """
        outputs = self._submit_all(prompts, _one_of(params, sampling_params))
        if all(output.error for output in outputs):
            raise RequestError(outputs[0].error or "no request can be served")
        try:
            for output in outputs:
                self.engine.run_until(partial(_has_ended, output))
        except BaseException:
            self.engine.abandon(outputs)
            raise
        return outputs

    def stream(
        self,
        prompts: Prompts,
        params: Params | None = None,
        *,
        sampling_params: Params | None = None,
    ) -> Iterator[RequestOutput]:
        """Yield a request's output each time it has grown, as it was then. Requests with `error` set come first.

        Every change comes, also where others step: streams that are read by turns, a `generate` in between, other threads.
        """
        changes: deque[RequestOutput] = deque()
        outputs = self._submit_all(prompts, _one_of(params, sampling_params), changes)
        refused = [output for output in outputs if output.error]
        growing = {output.request_id for output in outputs}.difference(output.request_id for output in refused)
        try:
            yield from refused
            while growing:
                self.engine.run_until(lambda: bool(changes))
                output = changes.popleft()
                if output.finished:
                    growing.discard(output.request_id)
                yield output
        finally:
            self.engine.abandon(outputs)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: Params | None = None,
        use_tqdm: object = False,
        *,
        sampling_params: Params | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several, written out by the model's chat template. The rest is as for `generate`."""
        prompts = [self.chat_prompt(c) for c in _conversations(messages)]
        return self.generate(prompts, params, use_tqdm, sampling_params=sampling_params)

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes, but for those on disk. False, and nothing changed, while a request holds a block."""
        return self.engine.reset_prefix_cache()

    def chat_prompt(self, messages: Sequence[Message]) -> Prompt:
        """The prompt that the model's chat template makes of a conversation. The template writes the special tokens itself."""
        text = self.tokenizer.chat([dict(message) for message in messages])
        return {"prompt_token_ids": self.tokenizer.encode(text, add_special=False), "prompt": text}

    def _submit_all(
        self,
        prompts: Prompts,
        params: Params | None,
        mailbox: deque[RequestOutput] | None = None,
    ) -> list[RequestOutput]:
        listed = _prompts_of(prompts)
        if not listed:
            raise RequestError("there is no prompt: give at least one")
        if params is None or isinstance(params, SamplingParams):
            each = [params or SamplingParams()] * len(listed)
        else:
            each = _list_of(params, "params must be SamplingParams or a list of them")
        if len(each) != len(listed):
            raise RequestError(f"{len(listed)} prompts need one SamplingParams or {len(listed)}, not {len(each)}")
        for prompt, p in zip(listed, each, strict=True):  # all of them, before one is queued
            if not (isinstance(prompt, str) or _is_token_ids(prompt)) and not (
                isinstance(prompt, Mapping) and ("prompt_token_ids" in prompt or "prompt" in prompt)
            ):
                raise RequestError(f"a prompt is text, token ids or {{'prompt_token_ids': [...]}}, not {prompt!r}")
            if not isinstance(p, SamplingParams):
                raise RequestError(f"params must be SamplingParams, one or one a prompt, not {p!r}")
        return [self._submit(prompt, p, mailbox) for prompt, p in zip(listed, each, strict=True)]

    def _submit(self, prompt: Prompt, params: SamplingParams, mailbox: deque[RequestOutput] | None) -> RequestOutput:
        if not isinstance(prompt, Mapping):
            return self.engine.ask(prompt, params, mailbox=mailbox)
        text = prompt.get("prompt")
        return self.engine.ask(prompt.get("prompt_token_ids", text), params, text=text, mailbox=mailbox)


def _one_of(params: Params | None, sampling_params: Params | None) -> Params | None:
    """What was given under either name."""
    if params is not None and sampling_params is not None:
        raise RequestError("params and sampling_params are the same: give one of them")
    return sampling_params if params is None else params


def _prompts_of(prompts: Any) -> list[Any]:
    """One prompt, or several, as a list. A sequence of whole numbers is one prompt; rows of an array of them are one each."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    listed = _list_of(plain_value(prompts), "prompts must be one or a list of them")
    return [listed] if listed and _is_token_ids(listed) else listed


def _is_token_ids(prompt: Any) -> bool:
    """Whether this is a sequence of whole numbers, numpy's and tensors included."""
    tokens = plain_value(prompt)
    return isinstance(tokens, list | tuple | range) and all(type(plain_value(token)) is int for token in tokens)


def _has_ended(output: RequestOutput) -> bool:
    return output.finished


def _conversations(messages: Any) -> list[Sequence[Message]]:
    listed = _list_of(messages, "messages must be a list of {'role': ..., 'content': ...}")
    if not listed:
        raise RequestError("the conversation is empty: give at least one message")
    conversations = [listed] if isinstance(listed[0], Mapping) else listed
    for conversation in conversations:
        for message in _list_of(conversation, "a conversation must be a list of messages"):
            if not isinstance(message, Mapping):
                raise RequestError(f"a message is {{'role': ..., 'content': ...}}, not {message!r}")
    return conversations


def _list_of(values: Any, wanted: str) -> list[Any]:
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        raise RequestError(f"{wanted}, not {values!r}")
    return list(values)
