"""`minipaged generate`: several prompts at once, streamed, with a line of statistics at the end."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from typing import Any

from rich.console import Console

from minipaged.api import LLM, Prompt
from minipaged.cli.progress import status_line
from minipaged.config import SamplingParams, check_int
from minipaged.errors import RequestError
from minipaged.scheduling.request import RequestOutput
from minipaged.text.safe import printable


def load(model: str, settings: dict[str, Any]) -> LLM:
    """The model behind an LLM, with its progress on the screen."""
    check_int("block_size", settings.get("block_size", 16), 1, 256)
    with status_line() as progress:
        return LLM(model, progress=progress, **settings)


def generate(
    model: str, texts: list[str], params: SamplingParams, settings: dict[str, Any], *, raw: bool, as_json: bool
) -> int:
    """Run the prompts; returns the exit code: 2 if any of them could not be served."""
    for text in texts:
        if not text.strip():
            raise RequestError("the prompt is empty: give some text")
    llm = load(model, settings)
    templated = not raw and llm.tokenizer.chat_template is not None
    prompts: list[Prompt] = [llm.chat_prompt([{"role": "user", "content": t}]) if templated else t for t in texts]
    meter = Meter(llm)
    if as_json:
        outputs = meter.run(lambda: llm.generate(prompts, params))
        print(json.dumps(_document(texts, outputs, meter), ensure_ascii=False, indent=2))
    else:
        outputs = meter.run(lambda: _stream(llm, texts, prompts, params))
        Console(stderr=True, highlight=False).print(meter.line(), style="dim")
    for text, output in zip(texts, outputs, strict=True):
        if output.error:
            print(f"minipaged: prompt {printable(text[:40])!r}: {output.error}", file=sys.stderr)
    return 2 if any(output.error for output in outputs) else 0


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
        self._llm = llm
        self._before = replace(llm.engine.scheduler.counters)  # an engine's counters go on from run to run
        self._peak_blocks = 0
        self._waste: list[float] = []
        self.seconds = 0.0

    def run(self, work: Any) -> list[RequestOutput]:
        """Run `work` with this meter listening to the trace."""
        stop = self._llm.engine.trace.subscribe(self._listen)
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
        counters, before = self._llm.engine.scheduler.counters, self._before
        generated = counters.generated_tokens - before.generated_tokens
        usage = self._llm.engine.scheduler.manager.usage()
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
        {
            "prompt": text,
            "error": output.error,
            "outputs": [
                {"index": o.index, "text": o.text, "token_ids": o.token_ids, "finish_reason": o.finish_reason}
                for o in output.outputs
            ],
        }
        for text, output in zip(texts, outputs, strict=True)
    ]
    return {"answers": answers, "statistics": meter.figures()}
