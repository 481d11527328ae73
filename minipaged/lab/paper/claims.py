"""Claims that circulate about paged attention, each beside what is computed here.

Each function runs the sum or the simulation that speaks to one claim. A figure that only a device can give is read from
the results that came with this version (measured.py), or the command that measures it is named.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from minipaged.baselines.systems import PAGED
from minipaged.config import Progress
from minipaged.lab.advise.calculators import Deployment, Load, capacity
from minipaged.lab.paper import measured
from minipaged.lab.simulation.hardware import GIB, find_gpu
from minipaged.lab.simulation.offload import against_batch, against_published
from minipaged.lab.simulation.roofline import roofline
from minipaged.lab.simulation.servers import paper_server
from minipaged.lab.simulation.simulate import simulate
from minipaged.lab.simulation.workloads import make_workload
from minipaged.memory.retention import KEEP_ALL, Retention
from minipaged.model.loading.shapes import shape


@dataclass(frozen=True, slots=True)
class Claim:
    """What is said, whether it holds, and the numbers."""

    claim: str
    verdict: str  # holds, does not hold, half true, to be measured
    evidence: str


def contiguous_waste() -> Claim:
    """Fig. 2 again: everything but token state."""
    server, load = paper_server("opt-13b"), make_workload("sharegpt", rate=2.0, count=4000)
    waste = [100 * (1 - simulate(s, load, server).shares["token"]) for s in ("orca-oracle", "orca-max")]
    return Claim(
        "contiguous caches waste 85 %",
        "half true",
        f"simulated (OPT-13B, ShareGPT): {waste[0]:.1f} % (oracle) to {waste[1]:.1f} % (maximum) of the pool is not token state; "
        "the paper measured 61.8 to 79.6 %, and part of it is reserved for tokens that will come" + _measured_waste(),
    )


def _measured_waste() -> str:
    found = measured.newest("system")
    held = {} if found is None else measured.shares(found)
    wasted = [f"{100 * (1 - held[name]):.0f} % {name}" for name in ("orca-max", "orca-oracle", PAGED) if name in held]
    return f". Measured ({measured.origin(found)}): {', '.join(wasted)}" if found is not None and wasted else ""


def kernel_cost() -> Claim:
    """From the results of a GPU: one kernel over consecutive and over shuffled blocks, and torch's over dense tensors."""
    said, paper = "paging costs 0 to 5 % in the kernel", "20 to 26 % in the paper's 2023 kernel (Fig. 18a)"
    ablation, kernels = measured.newest("section"), measured.newest("kernel")
    parts: list[str] = []
    verdict = "to be measured"
    if kernels is not None and (ratios := measured.against_dense(kernels)):
        middle = ratios[len(ratios) // 2]
        verdict = _at_most_five_percent(middle - 1)
        parts.append(
            f"measured ({measured.origin(kernels)}): this project's paged decode takes {ratios[0]:.2f} to {ratios[-1]:.2f} times as long "
            f"as torch's dense attention over {len(ratios)} shapes, {middle:.2f} in the middle"
        )
    cost = measured.layout_cost(ablation) if ablation is not None else None
    if ablation is not None and cost is not None:
        verdict = _at_most_five_percent(cost)
        parts.append(
            f"one kernel, shuffled against consecutive blocks ({measured.origin(ablation)}): {100 * cost:+.1f} %"
        )
    else:
        parts.append("shuffled against consecutive blocks under one kernel: minipaged lab ablate, on a GPU")
    return Claim(said, verdict, "; ".join((paper, *parts)))


def _at_most_five_percent(cost: float) -> str:
    return "holds today" if cost <= 0.05 else "does not hold"


def over_tgi() -> Claim:
    """Throughput over the batch-at-a-time baseline and over two generations of TGI."""
    server, load = paper_server("llama-13b"), make_workload("sharegpt", rate=math.inf, count=3000)
    speed = {s: simulate(s, load, server).tokens_per_second for s in ("static", "tgi-early", "tgi-paged", PAGED)}
    ratio = {s: speed[PAGED] / v for s, v in speed.items()}
    return Claim(
        "24 times the throughput of TGI",
        "does not hold",
        "24x was against Hugging Face Transformers, at most 3.5x against TGI. Simulated (LLaMA-13B, ShareGPT, memory alone differs): "
        f"{ratio['static']:.1f}x static batches, {ratio['tgi-early']:.1f}x early TGI, {ratio['tgi-paged']:.1f}x paged TGI"
        + _measured_speeds(),
    )


def _measured_speeds() -> str:
    found = measured.newest("system")
    if found is None:
        return ""
    speed = measured.speeds(found)
    names = ("static", "tgi-paged", "transformers generate", "transformers continuous")
    ratios = [f"{speed[PAGED] / speed[name]:.1f}x {name}" for name in names if speed.get(name)]
    return (
        f". Measured with one engine's kernels ({measured.origin(found)}): {', '.join(ratios)}"
        if PAGED in speed and ratios
        else ""
    )


def factors_multiply() -> Claim:
    """Amdahl: attention is a part of the step, and the two factors act on different things."""
    config, gpu = shape("llama-13b"), find_gpu("a100-40")
    clock = roofline(config, gpu)
    context = 330
    small, large = 7, 34

    def rate(rows: int, faster: float) -> float:
        attention = clock.decode_slope() * rows * context
        return rows / (clock.decode_base(rows) + attention / faster)

    base = rate(small, 1)
    flash, paged, both = rate(small, 3) / base, rate(large, 1) / base, rate(large, 3) / base
    return Claim(
        "FlashAttention 3x times PagedAttention 6x is 18x",
        "does not hold",
        f"LLaMA-13B on an A100, contexts of {context}: attention made 3x faster gives {flash:.2f}x at batch {small}; paging lets the batch "
        f"grow to {large}: {paged:.2f}x; both: {both:.2f}x. Attention is one operator; paging buys batch size"
        + _measured_factors(),
    )


def _measured_factors() -> str:
    found = measured.newest("section")
    factors = measured.factors(found) if found is not None else None
    if found is None or factors is None:
        return ""
    attention, batch, both = factors
    return (
        f". Measured ({measured.origin(found)}): {attention:.2f}x by attention alone, {batch:.2f}x by the batch alone, "
        f"{both:.2f}x together; the product would be {attention * batch:.2f}x"
    )


def kv_sizes() -> Claim:
    """Bytes a token."""
    config = shape("llama-13b")
    sizes = {heads: replace(config, num_kv_heads=heads).kv_bytes_per_token() for heads in (40, 8, 1)}
    return Claim(
        "LLaMA-13B holds 819 KB a token with GQA, 20 KB with MQA: 40x",
        "half true",
        f"40 KV heads, which is MHA: {sizes[40]:,} B; one KV head: {sizes[1]:,} B ({sizes[40] / sizes[1]:.0f}x); "
        f"8 KV heads, as GQA models have: {sizes[8]:,} B ({sizes[40] / sizes[8]:.0f}x)",
    )


def falcon() -> Claim:
    """Heads of Falcon-40B; paging's factor is that of the batch, simulated."""
    config = shape("falcon-40b")
    server, load = paper_server("opt-13b"), make_workload("sharegpt", rate=math.inf, count=2000)
    batch = {system: simulate(system, load, server).mean_batch for system in ("orca-max", "orca-oracle", PAGED)}
    low, high = (batch[PAGED] / batch[system] for system in ("orca-oracle", "orca-max"))
    return Claim(
        "Falcon-40B is MQA: 240x in all",
        "does not hold",
        f"{config.num_kv_heads} KV heads for {config.num_heads} query heads: {config.group_size}x less KV. Paging's own factor is "
        f"{low:.1f}x to {high:.1f}x of batch (simulated, OPT-13B, ShareGPT, over reservations), and the two do not multiply where "
        "arithmetic is the limit",
    )


def quantized_batch() -> Claim:
    """INT4 weights and INT8 KV on 40 GB."""
    deployment = Deployment(shape("llama-13b"), find_gpu("a100-40"), kv_dtype="int8", weight_bits=4.5, utilization=0.92)
    fits = capacity(deployment, Load(161, 338))
    return Claim(
        "13B with INT4 weights and INT8 KV: batch 260 on 40 GB",
        "does not hold",
        f"weights {deployment.weights / GIB:.1f} GiB, {deployment.kv_bytes:,} B a token: {fits.slots:,} tokens. "
        f"{fits.full_sequences} ShareGPT requests at full length, {fits.mean_sequences} when they are at all ages",
    )


def streaming() -> Claim:
    """What a window with sinks keeps of a long text."""
    sinks, window, text = 4, 1020, 100_000
    kept = (sinks + window) / text
    return Claim(
        "StreamingLLM gives infinite context",
        "does not hold",
        f"a cache of {sinks} sinks and {window} recent tokens behind a text of {text:,} reads {100 * kept:.1f} % of it; the middle is "
        "lost. Memory is bounded, the window is not extended",
    )


def heavy_hitters() -> Claim:
    """What H2O saves of a pool, on requests as they are: the prompt is held in whole until it has been read."""
    config, heavy, prompt, answer = shape("llama-13b"), 0.2, 161, 338
    text, bare = prompt + answer, config.kv_bytes_per_token()
    marks = config.kv_bytes_per_token(heavy_hitters=True) / bare
    policy = Retention(heavy=int(heavy * text / 2), recent=int(heavy * text / 2))
    most = policy.most_blocks_of_request(prompt, answer, 1, 16)
    later = policy.most_blocks(policy.budget, 16)
    whole = KEEP_ALL.most_blocks(text, 16)
    return Claim(
        "H2O saves 50-80 % of the memory",
        "half true",
        f"at a budget of {100 * heavy:.0f} % a ShareGPT request of {prompt} + {answer} tokens holds {later} of {whole} blocks while it "
        f"answers ({100 * (1 - later * marks / whole):.0f} % less, with scores and positions, {100 * (marks - 1):.1f} % more a token), and "
        f"{most} while its prompt is read ({100 * (1 - most * marks / whole):.0f} % less), which the pool must have; samples and prefixes "
        "share nothing any more",
    )


def unlimited() -> Claim:
    """FlexGen: a model larger than the card, streamed, at batch 1 and at the largest batch that it may grow to."""
    config, gpu = shape("llama-70b"), find_gpu("h100")
    one, many = (found for found in against_batch(config, gpu, (1, 64), 512, 32) if found is not None)
    theirs = [(row, found) for row, found in against_published() if row.system == "FlexGen"]
    return Claim(
        "FlexGen: models of unlimited size on one GPU",
        "half true",
        f"what host memory and disk hold does run, at the speed of the link. Simulated, LLaMA-70B in 16 bits on an H100: "
        f"{one.streamed_bytes / 1e9:.0f} GB streamed a step, {one.tokens_per_second:.2g} tok/s at batch 1 and "
        f"{many.tokens_per_second:.2g} at 64: a batch buys throughput, and no answer is faster than {one.step_seconds:.1f} s a token. "
        f"The same sums give {', '.join(f'{found.tokens_per_second:.3g}' for _, found in theirs)} tok/s for FlexGen's own table "
        f"(OPT-6.7B, 30B and 175B on a T4), which says {', '.join(f'{row.tokens_per_second:.3g}' for row, _ in theirs)}: lab offload",
    )


def short_requests() -> Claim:
    """Alpaca is short and still gains."""
    server, load = paper_server("opt-13b"), make_workload("alpaca", rate=math.inf, count=4000)
    ours, oracle = (simulate(s, load, server).mean_batch for s in (PAGED, "orca-oracle"))
    return Claim(
        "skip paging below 50 tokens",
        "does not hold",
        f"Alpaca (78 tokens on average) batches {ours / oracle:.1f}x what Orca (Oracle) does in the same memory "
        f"({ours:.0f} against {oracle:.0f} requests); the paper measured 1.8x",
    )


def one_manager() -> Claim:
    """How tensor parallel works here."""
    config = shape("llama-13b")
    shares = ", ".join(f"{config.num_kv_heads // tp} of {config.num_kv_heads}" for tp in (2, 4, 8))
    return Claim(
        "each GPU manages its own blocks",
        "does not hold",
        f"one manager, and the same block ids on every rank: a rank holds its heads ({shares} at tp 2, 4, 8) of every block; "
        "law L61",
    )


CLAIMS: tuple[Callable[[], Claim], ...] = (
    contiguous_waste,
    kernel_cost,
    over_tgi,
    factors_multiply,
    kv_sizes,
    falcon,
    quantized_batch,
    streaming,
    heavy_hitters,
    unlimited,
    short_requests,
    one_manager,
)


def all_claims(progress: Progress) -> list[Claim]:
    """Every claim, computed now."""
    found = []
    for i, make in enumerate(CLAIMS):
        progress(make.__name__.replace("_", " "), i, len(CLAIMS))
        found.append(make())
    return found
