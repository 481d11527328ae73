"""`minipaged quantize`: a model's matrices rounded to four bits and written as AWQ or GPTQ folders hold them.

Plain rounding: each group of weights is spread over the sixteen codes. AWQ gets a zero point a group, so that the codes span what the group
spans; GPTQ's codes are symmetric, with the middle one for 0. Neither method's own search for better codes is done, so these files are for
learning and testing: what the real ones gain over them is that search. The embeddings, norms and head stay floats.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from minipaged.config import Progress, check_choice
from minipaged.errors import InputError
from minipaged.model.loading import zoo
from minipaged.model.loading.hf_config import read_json
from minipaged.model.loading.hf_folder import CONFIG, FolderCheckpoint
from minipaged.model.loading.hf_quantized import MIDDLE, pack_words
from minipaged.model.loading.hub_shape import hub_config
from minipaged.model.loading.quantization_config import GROUPS
from minipaged.model.loading.subword_tokenizer import SubwordTokenizer
from minipaged.model.loading.weights import Checkpoint, open_checkpoint

FORMATS = ("awq", "gptq")
TOP = 15  # the largest code
BESIDE_WEIGHTS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)


def quantize(model: str, out: Path, form: str, group: int, progress: Progress | None = None) -> Path:
    """Write `model` (a file, a folder or a name that stands for one) to the folder `out`. InputError where it cannot be done."""
    check_choice("format", form, FORMATS)
    check_choice("group", group, GROUPS)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists already; name a folder that does not")
    checkpoint = open_checkpoint(zoo.find(model, progress))
    if isinstance(checkpoint, FolderCheckpoint) and checkpoint.quantization is not None:
        raise InputError(f"{checkpoint.path}: is quantized already, by {checkpoint.quantization.method}")
    shapes = checkpoint.shapes()
    matrices = [name for name in shapes if name.endswith("_proj.weight")]
    for name in matrices:
        if shapes[name][1] % group or shapes[name][0] % 8:
            fitting = [size for size in GROUPS if all(shapes[other][1] % size == 0 for other in matrices)]
            raise InputError(
                f"{name} is {list(shapes[name])}: its rows cannot be cut in groups of {group}"
                + (f"; {', '.join(map(str, fitting))} would do" if fitting else "")
            )
    tensors: dict[str, Tensor] = {}
    for done, name in enumerate(shapes):
        if progress is not None:
            progress("quantizing", done, len(shapes))
        values = checkpoint.read(name)
        if name in matrices:
            tensors |= {
                f"{name.removesuffix('weight')}{part}": of for part, of in parts_of(values.float(), form, group).items()
            }
        else:
            tensors[name] = sixteen_bits(values)
    out.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors", {"format": "pt"}
    )
    _write_surroundings(checkpoint, out, form, group)
    if progress is not None:
        progress("quantizing", len(shapes), len(shapes))
    return out


def rounded(values: Tensor, group: int, *, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [outputs, inputs], scales float16 [outputs, groups] and zero points uint8 [outputs, groups] of a float32 matrix."""
    groups = values.view(values.shape[0], -1, group)
    if symmetric:
        scale = groups.abs().amax(-1) / (TOP / 2)
        zero = torch.full(scale.shape, MIDDLE, dtype=torch.uint8)
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = (high - low) / TOP
    scale = scale.clamp(min=torch.finfo(torch.float16).tiny).half()  # rounded first: the codes are for what is stored
    if not symmetric:
        zero = (-low / scale.float()).round().clamp(0, TOP).to(torch.uint8)
    codes = (groups / scale.float()[..., None]).round() + zero[..., None].float()
    return codes.clamp(0, TOP).to(torch.uint8).view(values.shape), scale, zero


def parts_of(values: Tensor, form: str, group: int) -> dict[str, Tensor]:
    """The tensors that stand for a matrix [outputs, inputs] in a folder: qweight, qzeros, scales, and GPTQ's g_idx."""
    codes, scale, zero = rounded(values, group, symmetric=form == "gptq")
    parts = {
        "scales": scale.t(),
        "qzeros": pack_words(zero.t() - (1 if form == "gptq" else 0), form),
    }  # GPTQ's first version
    if form == "awq":
        return parts | {"qweight": pack_words(codes.t(), form)}
    order = torch.arange(values.shape[1], dtype=torch.int32) // group
    return parts | {"qweight": pack_words(codes, form).t(), "g_idx": order}


def sixteen_bits(values: Tensor) -> Tensor:
    """In float16, or bfloat16 where that cannot hold them; as they are if they have sixteen bits already."""
    if values.element_size() == 2:
        return values
    half = values.half()
    return half if bool(half.isfinite().all()) else values.bfloat16()


def _write_surroundings(checkpoint: Checkpoint, out: Path, form: str, group: int) -> None:
    """config.json with its quantization_config, and the tokenizer."""
    told: dict[str, Any] = {"quant_method": form, "bits": 4, "group_size": group}
    if form == "awq":
        told |= {"zero_point": True, "version": "gemm"}
    else:
        told |= {"sym": True, "desc_act": False, "checkpoint_format": "gptq"}
    if isinstance(checkpoint, FolderCheckpoint):
        config = read_json(checkpoint.path / CONFIG)
        for name in BESIDE_WEIGHTS:
            if (checkpoint.path / name).exists():
                shutil.copyfile(checkpoint.path / name, out / name)
    else:
        config = hub_config(checkpoint.config)
        tokenizer = zoo.tokenizer_of(checkpoint)
        if isinstance(tokenizer, SubwordTokenizer):
            tokenizer.save(out)
    config |= {"quantization_config": told, "torch_dtype": "float16"}
    (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
