"""`minipaged generate`: several prompts at once, streamed, with a line of statistics at the end."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import Any

from minipaged.api import LLM, Prompt
from minipaged.cli.progress import status_line
from minipaged.cli.terminal import complain, json_text, note
from minipaged.config import SamplingParams, check_int
from minipaged.errors import InputError, RequestError
from minipaged.scheduling.request import CompletionOutput, RequestOutput
from minipaged.text.safe import printable


def load(model: str, settings: dict[str, Any]) -> LLM:
    """The model behind an LLM, with its progress on the screen."""
    check_int("block_size", settings.get("block_size", 16), 1, 256)
    with status_line() as progress:
        return LLM(model, progress=progress, **settings)


def load_beside(model: str, settings: dict[str, Any], own: LLM) -> LLM:
    """The same with minipaged's own block manager and as large a pool, to compare the user's with."""
    return load(model, settings | {"block_manager": None, "num_blocks": own.engine.scheduler.manager.usage().total})


def generate(
    model: str,
    texts: list[str],
    params: SamplingParams,
    settings: dict[str, Any],
    *,
    system: str | None = None,
    raw: bool = False,
    as_json: bool = False,
) -> int:
    """Run the prompts; returns the exit code: 2 if any of them could not be served."""
    for text in texts:
        if not text.strip():
            raise RequestError("the prompt is empty: give some text")
    if params.logprobs is not None and not as_json:
        raise InputError("--logprobs needs --json: text has no place for them")
    if system is not None and raw:
        raise InputError("--system needs the model's chat template: leave --raw out")
    warn_of_idle_flags(params)
    llm = load(model, settings)
    if system is not None or (not raw and llm.tokenizer.chat_template is not None):
        told = [{"role": "system", "content": system}] if system is not None else []
        prompts: list[Prompt] = [llm.chat_prompt([*told, {"role": "user", "content": text}]) for text in texts]
    else:
        prompts = list(texts)
    meter = Meter(llm)
    if as_json:
        outputs = meter.run(lambda: llm.generate(prompts, params))
        print(json_text(_document(texts, outputs, meter)))
    else:
        outputs = meter.run(lambda: _stream(llm, texts, prompts, params))
        note(meter.line())
        if settings.get("block_manager") is not None:
            beside = Meter(load_beside(model, settings, llm))
            again = beside.run(lambda: beside.llm.generate(prompts, params))
            note(compared(beside, [_texts(output) for output in again] == [_texts(output) for output in outputs]))
    llm.close()
    for text, output in zip(texts, outputs, strict=True):
        if output.error:
            complain(f"prompt {text[:40]!r}: {output.error}")
    return 2 if any(output.error for output in outputs) else 0


def compared(beside: Meter, same: bool) -> str:
    """The line of the same run under minipaged's own block manager, and whether it wrote the same."""
    return f"minipaged's manager, {'the same text' if same else 'ANOTHER TEXT'}: {beside.line()}"


def _texts(output: RequestOutput) -> list[str]:
    return [completion.text for completion in output.outputs]


def warn_of_idle_flags(params: SamplingParams) -> None:
    """Say in one line which of the flags that were given change nothing."""
    drawn = {"--seed": params.seed is not None}
    if params.beam_width is not None:
        idle, why = drawn, "a beam search draws nothing"
    elif params.greedy:
        cuts = {"--top-p": params.top_p != 1.0, "--top-k": params.top_k != 0, "--min-p": params.min_p != 0.0}
        idle, why = {"--n": params.n > 1, **cuts, **drawn}, "at temperature 0 the most likely token is always taken"
    else:
        return
    names = [name for name, given in idle.items() if given]
    if names:
        complain(f"{' and '.join(names)} {'change' if names[1:] else 'changes'} nothing: {why}", "yellow")


def _stream(llm: LLM, texts: list[str], prompts: list[Prompt], params: SamplingParams) -> list[RequestOutput]:
    """Print answers as they grow: the first unfinished answer streams, the others follow whole as their turn comes."""
    ids: dict[int, RequestOutput] = {}
    printer = _Printer(texts, params.n)
    for output in llm.stream(prompts, params):
        ids[output.request_id] = output
        printer.update(ids)
    printer.update(ids)
    return [ids[key] for key in sorted(ids)]


class _Printer:
    """Writes the answers in the prompts' order, each as far as it is certain."""

    def __init__(self, texts: list[str], n: int) -> None:
        self._texts = texts
        self._n = n
        self._turn = 0  # which answer is being written: prompt * n + sample
        self._written = 0

    def update(self, outputs: dict[int, RequestOutput]) -> None:
        order = sorted(outputs)
        while self._turn < len(self._texts) * self._n:
            prompt, sample = divmod(self._turn, self._n)
            if len(order) <= prompt:
                return
            output = outputs[order[prompt]]
            if output.error:
                self._turn += self._n - sample
                continue
            answers = output.outputs
            if len(answers) <= sample:
                return
            settled = output.finished or (self._n == 1 and output.request.params.num_sequences == 1)
            sequence = output.request.sequences[0]
            if not self._written and self._turn and settled:
                print()
            if not self._written and settled and (len(self._texts) > 1 or self._n > 1):
                number = f" · sample {sample + 1}" if self._n > 1 else ""
                print(f"── {printable(' '.join(self._texts[prompt].split())[:60])}{number}")
            if not settled:
                return
            text = answers[sample].text if output.finished else sequence.text[: sequence.stable_text]
            sys.stdout.write(printable(text[self._written :]))
            sys.stdout.flush()
            self._written = max(len(text), 1)
            if not output.finished:
                return
            print()
            self._turn += 1
            self._written = 0


class Meter:
    """What a run cost: measured from the counters of the engine that ran it."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._before = replace(llm.engine.scheduler.counters)  # an engine's counters go on from run to run
        self._peak_blocks = 0
        self._waste: list[float] = []
        self.seconds = 0.0

    def run(self, work: Any) -> list[RequestOutput]:
        """Run `work` with this meter listening to the trace."""
        stop = self.llm.engine.trace.subscribe(self._listen)
        started = time.perf_counter()
        try:
            outputs: list[RequestOutput] = work()
        finally:
            self.seconds = time.perf_counter() - started
            stop()
        return outputs

    def _listen(self, delta: Any) -> None:
        stats = delta.stats
        used = stats.total_blocks - 1 - stats.free_blocks
        self._peak_blocks = max(self._peak_blocks, used)
        if used:
            self._waste.append(stats.tail_slots / (used * stats.block_size))

    def figures(self) -> dict[str, float | int]:
        """The statistics as values."""
        counters, before = self.llm.engine.scheduler.counters, self._before
        generated = counters.generated_tokens - before.generated_tokens
        usage = self.llm.engine.scheduler.manager.usage()
        return {
            "generated_tokens": generated,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(generated / self.seconds, 2) if self.seconds else 0.0,
            "peak_blocks": self._peak_blocks,
            "total_blocks": usage.total - 1,
            "waste_percent": round(100 * sum(self._waste) / len(self._waste), 1) if self._waste else 0.0,
            "copies": counters.copies - before.copies,
            "hit_tokens": counters.hit_tokens - before.hit_tokens,
            "preemptions": counters.preemptions - before.preemptions,
        }

    def line(self) -> str:
        """The statistics as one line."""
        f = self.figures()
        return (
            f"{f['generated_tokens']} tokens in {f['seconds']:.1f} s · {f['tokens_per_second']:.1f} tok/s · "
            f"at most {f['peak_blocks']}/{f['total_blocks']} blocks · waste {f['waste_percent']} % · {f['copies']} copies · "
            f"{f['hit_tokens']} tokens from the prefix cache · {f['preemptions']} preemptions"
        )


def _document(texts: list[str], outputs: list[RequestOutput], meter: Meter) -> dict[str, Any]:
    answers = [
        {"prompt": text, "error": output.error, "outputs": [_answer(one) for one in output.outputs]}
        for text, output in zip(texts, outputs, strict=True)
    ]
    return {"answers": answers, "statistics": meter.figures()}


def _answer(output: CompletionOutput) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "index": output.index,
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
    }
    if output.logprobs is not None:
        answer["cumulative_logprob"] = output.cumulative_logprob
        answer["logprobs"] = [
            {token: {"logprob": known.logprob, "rank": known.rank} for token, known in row.items()}
            for row in output.logprobs
        ]
    return answer
