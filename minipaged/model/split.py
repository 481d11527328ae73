"""What one rank holds of a model that several share, and the sums that make the ranks' parts one model again.

Pipeline parallel (GPipe, Huang et al. 2019): the layers are cut into stages, and the hidden states go from each to the next.

Tensor parallel (Megatron-LM, Shoeybi et al. 2019): heads and the MLP's inner dimension are split, so the projections into them are cut by
rows and those out of them by columns; each rank's product of the latter is a part of a sum. The vocabulary is split too. A rank's part is
a Llama of a smaller config: nothing in the network, the KV pool or the kernels need know that it is a part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from minipaged.config import ModelConfig
from minipaged.errors import InputError
from minipaged.kernels.checks import COLDEST
from minipaged.kernels.sampling import draw_tokens
from minipaged.model.linear import Format, RMSNorm
from minipaged.model.llama import INITIAL_STD, Llama, draw_parameters

BELOW_ONE = 1.0 - 2.0**-53
MOST_ROWS = 2**24  # of a rank's vocabulary: row numbers travel as float32 beside their logits


class Collectives(Protocol):
    """What ranks do together. Every rank calls the same methods in the same order, with tensors of the same shape."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, bit for bit the same on all. `x` may be changed, and the sum is good until the next call: a rank may go on
        writing in it, and give it to that call, but not read it afterwards.
        """
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """What every rank has: [ranks, *x.shape]."""
        ...

    def exchange(self, x: Tensor) -> Tensor:
        """As all_gather, for a few float32 numbers; a CUDA graph can hold it."""
        ...


@dataclass(frozen=True, slots=True)
class Part:
    """One of `ranks` equal parts of every layer of one of the `stages`."""

    rank: int
    ranks: int
    stage: int = 0
    stages: int = 1

    def share(self, config: ModelConfig) -> ModelConfig:
        """The config of this part. InputError where the model cannot be split into so many."""
        ranks = self.ranks
        for name in ("num_heads", "intermediate_size"):
            if getattr(config, name) % ranks:
                raise InputError(
                    f"tensor_parallel={ranks} does not divide {config.name}'s {name}, {getattr(config, name)}: "
                    f"take a number that does"
                )
        if config.num_kv_heads % ranks and ranks % config.num_kv_heads:
            raise InputError(
                f"tensor_parallel={ranks} and {config.name}'s num_kv_heads, {config.num_kv_heads}: one must divide the other"
            )
        first, last = self.vocabulary(config)
        if last <= first or last - first > MOST_ROWS:
            raise InputError(f"tensor_parallel={ranks} cannot split {config.name}'s vocabulary of {config.vocab_size}")
        start, end = self.layers(config)
        if config.num_layers < self.stages:
            raise InputError(
                f"pipeline_parallel={self.stages} cannot split {config.name}, which has {config.num_layers} layers"
            )
        return replace(
            config,
            num_layers=end - start,
            unrotated_layers=tuple(layer - start for layer in config.unrotated_layers if start <= layer < end),
            full_layers=tuple(layer - start for layer in config.full_layers if start <= layer < end),
            num_heads=config.num_heads // ranks,
            num_kv_heads=max(1, config.num_kv_heads // ranks),
            intermediate_size=config.intermediate_size // ranks,
            vocab_size=last - first,
        )

    def layers(self, config: ModelConfig) -> tuple[int, int]:
        """[first, last) layer of this stage."""
        return self.stage * config.num_layers // self.stages, (self.stage + 1) * config.num_layers // self.stages

    def build(self, config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> Llama:
        """This part of the network, to be filled."""
        first, last = self.stage == 0, self.stage == self.stages - 1
        return Llama(self.share(config), dtype=dtype, device=device, embeds=first, draws=last)

    def slots(self, model: Llama, config: ModelConfig) -> dict[str, Tensor]:
        """This part's slots, by the names that the whole model's tensors have."""
        start, _ = self.layers(config)
        return {_renumbered(name, start): slot for name, slot in model.slots().items() if not slot.is_meta}

    def vocabulary(self, config: ModelConfig) -> tuple[int, int]:
        """[first, last) token id whose embedding and head row are here. The last rank may have fewer than the others."""
        rows = -(-config.vocab_size // self.ranks)
        return self.rank * rows, min((self.rank + 1) * rows, config.vocab_size)

    def piece(self, config: ModelConfig, name: str) -> tuple[int, int, int] | None:
        """Which part of one of the whole model's matrices is here, named as in a checkpoint: (0 for rows or 1 for columns, first, count).

        None for all of it.
        """
        *_, module, _ = name.split(".")
        match module:
            case "embed_tokens" | "lm_head":
                first, last = self.vocabulary(config)
                return 0, first, last - first
            case "q_proj":
                size = config.num_heads * config.head_dim // self.ranks
                return 0, self.rank * size, size
            case "k_proj" | "v_proj":
                # Fewer KV heads than ranks: each head lies on several ranks, those whose query heads read it.
                parts = min(self.ranks, config.num_kv_heads)
                size = config.num_kv_heads * config.head_dim // parts
                return 0, self.rank * parts // self.ranks * size, size
            case "gate_proj" | "up_proj" | "down_proj":
                size = config.intermediate_size // self.ranks
                return int(module == "down_proj"), self.rank * size, size
            case "o_proj":
                size = config.num_heads * config.head_dim // self.ranks
                return 1, self.rank * size, size
        return None

    def cut(self, config: ModelConfig, name: str, values: Tensor) -> Tensor:
        """This part of one of the whole model's tensors, named as in a checkpoint."""
        piece = self.piece(config, name)
        if piece is None:
            return values
        dim, first, count = piece
        if values.dim() == 1 and dim == 1:  # the bias of a product that is summed over ranks: the sum has it once
            return values if self.rank == 0 else torch.zeros_like(values)
        return values.narrow(dim, first, count)

    def random(
        self, config: ModelConfig, seed: int, dtype: torch.dtype, device: torch.device | str, std: float = INITIAL_STD
    ) -> Llama:
        """This part of Llama.random(config, seed, …): every rank draws each tensor whole, one at a time, and keeps its own."""
        with torch.device("meta"):
            whole = Llama(config, dtype=dtype, device="meta")
        model = self.build(config, dtype, device)
        slots = self.slots(model, config)
        pieces: dict[
            int, list[tuple[str, Tensor]]
        ] = {}  # the whole model's slots, by the parameter that they are rows of
        for name, view in whole.slots().items():
            pieces.setdefault(id(view if view._base is None else view._base), []).append((name, view))
        parameters = dict(whole.named_parameters())
        for name, values in draw_parameters(parameters, seed, dtype, device, std):
            for slot, view in pieces[id(parameters[name])]:
                if slot not in slots:
                    continue  # of another stage
                first = view.storage_offset() // view.stride(0)
                slots[slot].copy_(self.cut(config, slot, values[first : first + len(view)]))
        return model

    def connect(self, model: Llama, config: ModelConfig, collectives: Collectives) -> None:
        """Make a filled (and packed) part one model with the others'. config: the whole model's."""
        if self.ranks == 1:
            return
        for layer in model.layers:
            for linear in (layer.output, layer.down):
                linear.format = Summed(linear.format, collectives, adds_residual=self.rank == 0)
        model.split = SplitVocabulary(self, config, collectives)


def _renumbered(name: str, first_layer: int) -> str:
    """A tensor's name in the whole model, whose layer `first_layer` is the first here."""
    words = name.split(".")
    if words[:2] == ["model", "layers"]:
        words[2] = str(int(words[2]) + first_layer)
    return ".".join(words)


class Summed(nn.Module):
    """A format whose weight is cut by columns: its product is one part of a sum over ranks. One rank's part has the residual in it."""

    def __init__(self, inner: Format, collectives: Collectives, *, adds_residual: bool) -> None:
        super().__init__()
        self.inner = inner
        self.collectives = collectives
        self.adds_residual = adds_residual

    def multiply(self, x: Tensor, bias: Tensor | None, norm: RMSNorm | None, residual: Tensor | None) -> Tensor:
        part = self.inner.multiply(x, bias, norm, residual if self.adds_residual else None)
        return self.collectives.all_reduce(part)

    def multiply_gated(self, x: Tensor, bias: Tensor | None, norm: RMSNorm | None) -> Tensor:
        raise NotImplementedError("a gate is split by rows, not summed")

    def rows(self, first: int, count: int) -> Tensor:
        return self.inner.rows(first, count)


class SplitVocabulary:
    """Embedding, head and draws where each rank has some rows of the vocabulary (llama.Vocabulary)."""

    def __init__(self, part: Part, config: ModelConfig, collectives: Collectives) -> None:
        self.collectives = collectives
        self.rank = part.rank
        self.first, self.last = part.vocabulary(config)
        self.vocab_size = config.vocab_size
        self.rows = -(-config.vocab_size // part.ranks)  # of every rank but the last, which may have fewer

    def embed(self, table: Tensor, token_ids: Tensor) -> Tensor:
        here = (token_ids >= self.first) & (token_ids < self.last)
        found = functional.embedding(torch.where(here, token_ids - self.first, 0), table)
        return self.collectives.all_reduce(found.mul_(here[:, None]))

    def whole(self, logits: Tensor) -> Tensor:
        padded = functional.pad(logits, (0, self.rows - logits.shape[1]), value=float("-inf"))
        gathered = self.collectives.all_gather(padded.contiguous())
        return gathered.permute(1, 0, 2).reshape(len(logits), -1)[:, : self.vocab_size].contiguous()

    def most_likely(self, logits: Tensor) -> Tensor:
        ranks = self.collectives.exchange(torch.stack(self._best(logits)))  # [ranks, 2, rows]
        return self._winners(ranks[:, 0], ranks[:, 1])

    def draw(self, logits: Tensor, temperature: Tensor, uniform: Tensor) -> Tensor:
        """The number is looked up in the ranks' shares of the probability first, then by the rank that has it in its own part."""
        warm = temperature.float() >= COLDEST
        scaled = logits.float() / temperature.where(warm, 1.0).float()[:, None]
        largest = scaled.amax(dim=-1)
        weight = (scaled - largest[:, None]).exp_().sum(dim=-1, dtype=torch.float64)
        told = torch.stack((*self._best(logits), largest, weight.float()))
        values, rows, largests, weights = self.collectives.exchange(told).unbind(1)  # [ranks, rows] each
        shares = weights.double() * (largests - largests.amax(dim=0)).double().exp()
        ends = shares.cumsum(dim=0)
        goal = uniform * ends[-1]
        owner = (ends <= goal).sum(dim=0, keepdim=True).clamp(max=len(ends) - 1)
        here = (goal - ends[self.rank] + shares[self.rank]) / shares[self.rank]
        drawn = draw_tokens(logits, temperature, here.nan_to_num(0.0).clamp(0.0, BELOW_ONE))
        everybodys = self.collectives.exchange(drawn.float())
        ids = everybodys.gather(0, owner).squeeze(0).long() + owner.squeeze(0) * self.rows
        likeliest = self._winners(values, rows)
        return ids.where(warm & (likeliest >= 0), likeliest)

    def _best(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The largest logit of each row here, and which it is, float32 [rows] each; NaN where nothing can be drawn, so that nobody does."""
        drawn = draw_tokens(logits)
        best = logits.gather(1, drawn.clamp(min=0)[:, None]).squeeze(1)
        return best.float().masked_fill(drawn < 0, float("nan")), drawn.float()

    def _winners(self, values: Tensor, rows: Tensor) -> Tensor:
        """The token of the largest of all ranks' values, [ranks, rows] each; -1 where one of them is NaN."""
        winner = values.argmax(
            dim=0, keepdim=True
        )  # of equals the first rank, so the smallest token id, as without ranks
        ids = rows.gather(0, winner).squeeze(0).long() + winner.squeeze(0) * self.rows
        return ids.where(values.gather(0, winner).squeeze(0).isfinite(), -1)
