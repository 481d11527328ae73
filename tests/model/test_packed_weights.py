"""Weights that stay packed: every format's values against its definition, and models against the same ones in floats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from minipaged import LLM, SamplingParams
from minipaged.cli.main import app
from minipaged.errors import InputError, ModelError
from minipaged.kernels.linear import dequantize
from minipaged.model.linear import Dense, Int4OnCPU, Packed
from minipaged.model.loading import zoo
from minipaged.model.loading.gguf_blocks import PACKABLE
from minipaged.model.loading.quantize import quantize, rounded
from minipaged.model.loading.quantized import QuantizedMatrix, stack
from minipaged.model.loading.weights import load_model, open_checkpoint
from minipaged.model.split import Part
from tests.model.tiny import dense_logits, drawn_tokens, llama, make_model, save_folder
from tests.model.tiny_gguf import stored_tensors

CPU: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
TOKENS = drawn_tokens(12, 97)


def everything(matrix: QuantizedMatrix) -> bool:
    return True


def in_both_ways(path: Path) -> tuple[Any, Any]:
    """The model in floats, and packed."""
    checkpoint = open_checkpoint(path)
    return load_model(checkpoint, **CPU), load_model(checkpoint, **CPU, stays_packed=everything)


def formats(model: Any) -> set[str]:
    return {type(linear.format).__name__ for linear, _ in model.linears()}


# GGUF


def random_blocks(kind: int, rows: int, blocks: int) -> np.ndarray:
    return np.random.default_rng(kind).integers(0, 256, (rows, blocks, PACKABLE[kind].num_bytes), dtype=np.uint8)


@pytest.mark.parametrize("kind", PACKABLE, ids=lambda kind: gguf.GGMLQuantizationType(kind).name)
def test_random_blocks_come_back_bit_for_bit(kind: int) -> None:
    raw = random_blocks(kind, 7, 6)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(raw.reshape(-1, raw.shape[2]), gguf.GGMLQuantizationType(kind)).reshape(7, -1)
    found = dequantize(PACKABLE[kind].read(torch.from_numpy(raw)).packed("cpu"), torch.float32).numpy()
    assert np.isfinite(expected).mean() > 0.5
    assert np.array_equal(found, expected, equal_nan=True)


def test_a_block_has_the_size_that_the_gguf_package_says() -> None:
    for kind, blocks in PACKABLE.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)] == (blocks.values, blocks.num_bytes)


def sound_matrix(kind: int, rows: int, inputs: int = 256) -> QuantizedMatrix:
    """Random codes and finite scales."""
    raw = random_blocks(kind, rows, inputs // PACKABLE[kind].values)
    matrix = PACKABLE[kind].read(torch.from_numpy(raw))
    return matrix._replace(scales=torch.rand(matrix.scales.shape).to(matrix.scales.dtype))


@pytest.mark.parametrize("kinds", [(2, 3), (3, 12, 14), (2, 8), (8, 14), (12, 13), (2, 14, 3)])
def test_matrices_of_several_formats_stack_without_a_change(kinds: tuple[int, ...]) -> None:
    pieces = [sound_matrix(kind, 5) for kind in kinds]
    apart = torch.cat([dequantize(piece.packed("cpu"), torch.float32) for piece in pieces])
    torch.testing.assert_close(dequantize(stack(pieces).packed("cpu"), torch.float32), apart, rtol=1e-6, atol=1e-6)


def test_rows_and_columns_are_cut_where_groups_end() -> None:
    matrix = sound_matrix(3, 8)
    whole = dequantize(matrix.packed("cpu"), torch.float32)
    part = dequantize(matrix.rows(slice(2, 5)).columns(64, 128).packed("cpu"), torch.float32)
    assert torch.equal(part, whole[2:5, 64:192])
    with pytest.raises(ValueError, match="groups of 32"):
        matrix.columns(16, 64)


@pytest.mark.parametrize(
    "mixed", [("Q4_0",), ("Q4_1",), ("Q8_0",), ("Q4_1", "Q8_0", "Q5_0", "F32"), ("Q4_0", "Q5_1")], ids="+".join
)
def test_a_packed_gguf_computes_what_it_computes_in_floats(mixed: tuple[str, ...], tmp_path: Path) -> None:
    """Rows of q and k come out of llama.cpp's order; matrices of one Linear may differ in format, and a float one makes it dense."""
    path = tmp_path / "packed.gguf"
    model = make_model(llama(**SIZES))
    write_quantized(path, model, lambda index: mixed[index % len(mixed)])
    dense, packed = in_both_ways(path)
    assert formats(packed) == ({"Packed", "Dense"} if "F32" in mixed else {"Packed"})
    assert formats(dense) == {"Dense"}
    found, expected = dense_logits(packed, TOKENS), dense_logits(dense, TOKENS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def write_quantized(path: Path, model: Any, format_of: Callable[[int], str]) -> None:
    """As write_gguf, its matrices quantized by the gguf package; the embeddings stay floats."""
    from tests.model.tiny_gguf import add_value, describe

    writer = gguf.GGUFWriter(path, "llama")
    for key, value in describe(model.config, "llama").items():
        add_value(writer, key, value)
    matrices = 0
    for name, values in stored_tensors(model, "llama").items():
        kind = "F32"
        if values.ndim == 2 and name != "token_embd.weight":
            kind = format_of(matrices)
            matrices += 1
        if kind == "F32":
            writer.add_tensor(name, np.ascontiguousarray(values))
        else:
            quantization = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(
                name, gguf.quants.quantize(np.ascontiguousarray(values), quantization), raw_dtype=quantization
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# AWQ and GPTQ


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    save_folder(llama(**SIZES), path)
    return path


def by_definition(parts: dict[str, Tensor], stem: str, form: str, group: int, less_one: bool) -> Tensor:
    """A matrix written out code by code, as AutoAWQ's WQLinear_GEMM and GPTQModel's packing lay them."""
    words, zeros, scales = (parts[f"{stem}.{part}"] for part in ("qweight", "qzeros", "scales"))
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    inputs = words.shape[0] * (1 if form == "awq" else 8)
    outputs = words.shape[1] * (8 if form == "awq" else 1)
    groups = parts.get(f"{stem}.g_idx", torch.arange(inputs) // group).tolist()
    words, zeros = words.numpy().astype(np.uint32), zeros.numpy().astype(np.uint32)
    values = np.empty((outputs, inputs), np.float32)
    for n in range(outputs):
        for k in range(inputs):
            if form == "awq":
                code = (words[k, n // 8] >> (4 * order.index(n % 8))) & 15
                zero = (zeros[groups[k], n // 8] >> (4 * order.index(n % 8))) & 15
            else:
                code = (words[k // 8, n] >> (4 * (k % 8))) & 15
                zero = ((zeros[groups[k], n // 8] >> (4 * (n % 8))) + (1 if less_one else 0)) & 15
            values[n, k] = (int(code) - int(zero)) * float(scales[groups[k], n])
    return torch.from_numpy(values)


@pytest.mark.parametrize(("form", "group"), [("awq", 32), ("awq", 64), ("gptq", 32), ("gptq", 64)])
def test_what_quantize_writes_is_read_as_its_format_defines_it(
    form: str, group: int, folder: Path, tmp_path: Path
) -> None:
    out = quantize(str(folder), tmp_path / "out", form, group)
    parts = load_file(out / "model.safetensors")
    checkpoint = open_checkpoint(out)
    original = open_checkpoint(folder)
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        expected = by_definition(parts, name, form, group, less_one=form == "gptq")
        matrix = checkpoint.read_packed(f"{name}.weight")
        assert matrix is not None
        assert torch.equal(dequantize(matrix.packed("cpu"), torch.float32), expected)
        assert torch.equal(checkpoint.read(f"{name}.weight"), expected)
        rounding = original.read(f"{name}.weight") - expected  # half a step, but where symmetric codes end at 7
        step = matrix.scales[..., 0].float().repeat_interleave(group, 1)
        assert bool((rounding.abs() <= (0.51 if form == "awq" else 1.01) * step).all())
    dense, packed = in_both_ways(out)
    assert {linear.format.__class__ for linear, pieces in packed.linears() if "lm_head" not in pieces} == {Packed}
    assert isinstance(packed.head.format, Dense)
    torch.testing.assert_close(dense_logits(packed, TOKENS), dense_logits(dense, TOKENS), rtol=1e-5, atol=1e-5)


def test_rounding_spans_what_a_group_spans() -> None:
    values = torch.tensor([[0.0, 0.75, 3.0, -0.75] + [0.0] * 28, [3.75] * 32])
    codes, scale, zero = rounded(values, 32, symmetric=False)
    assert torch.equal(scale.float() * (codes[:, :4].float() - zero.float()), values[:, :4])
    codes, scale, zero = rounded(values, 32, symmetric=True)
    assert set(zero.flatten().tolist()) == {8}
    assert codes.max() == 15


Change = Callable[[dict[str, Tensor], dict[str, Any]], None]


def changed(out: Path, target: Path, change: Change) -> Path:
    """A copy of a packed folder with other tensors or another quantization_config."""
    shutil.copytree(out, target)
    tensors = load_file(target / "model.safetensors")
    config = json.loads((target / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.fixture(scope="module")
def packed_folders(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("packed")
    return {form: quantize(str(folder), place / form, form, 32) for form in ("awq", "gptq")}


EVERY_NIBBLE = 0x11111111
DOWN = "model.layers.1.mlp.down_proj"


def as_version_2(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    for name in tensors:
        if name.endswith("qzeros"):
            tensors[name] += EVERY_NIBBLE


def named_version_2(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    as_version_2(tensors, config)
    config["checkpoint_format"] = "gptq_v2"


def with_zero_biases(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors |= {f"{DOWN}.bias": torch.zeros(64, dtype=torch.float16)}


@pytest.mark.parametrize("change", [as_version_2, named_version_2, with_zero_biases])
def test_versions_of_gptq_are_told_by_what_is_stored(
    change: Change, packed_folders: dict[str, Path], tmp_path: Path
) -> None:
    expected = dense_logits(load_model(open_checkpoint(packed_folders["gptq"]), **CPU), TOKENS)
    path = changed(packed_folders["gptq"], tmp_path / "changed", change)
    for model in in_both_ways(path):
        torch.testing.assert_close(dense_logits(model, TOKENS), expected, rtol=1e-5, atol=1e-5)


def test_asymmetric_zero_points_follow_the_version_that_the_config_names(
    packed_folders: dict[str, Path], tmp_path: Path
) -> None:
    stored = torch.arange(16, dtype=torch.uint8).repeat(4)

    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        from minipaged.model.loading.hf_quantized import pack_words

        config["sym"] = False
        tensors[f"{DOWN}.qzeros"] = pack_words(stored.expand(4, 64), "gptq")

    path = changed(packed_folders["gptq"], tmp_path / "changed", change)
    matrix = open_checkpoint(path).read_packed(f"{DOWN}.weight")
    assert matrix is not None
    assert torch.equal(matrix.scales[:, 0, 1].to(torch.uint8), (stored + 1) & 15)


def test_groups_in_another_order_are_honoured_in_floats(packed_folders: dict[str, Path], tmp_path: Path) -> None:
    order = torch.randperm(128, generator=torch.Generator().manual_seed(1)) // 32

    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        config["desc_act"] = True
        tensors[f"{DOWN}.g_idx"] = order.int()
        tensors[f"{DOWN}.scales"] *= torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None]

    path = changed(packed_folders["gptq"], tmp_path / "changed", change)
    checkpoint = open_checkpoint(path)
    expected = by_definition(load_file(path / "model.safetensors"), DOWN, "gptq", 32, less_one=True)
    assert torch.equal(checkpoint.read(f"{DOWN}.weight"), expected)
    assert checkpoint.read_packed(f"{DOWN}.weight") is None
    dense, packed = in_both_ways(path)
    assert formats(packed) == {"Packed", "Dense"}
    torch.testing.assert_close(dense_logits(packed, TOKENS), dense_logits(dense, TOKENS), rtol=1e-5, atol=1e-5)


def config_with(**fields: Any) -> Change:
    return lambda tensors, config: config.update(fields)


def without(part: str) -> Change:
    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        del tensors[f"{DOWN}.{part}"]

    return change


def some_zeros_differ(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors[f"{DOWN}.qzeros"][0, 0] = 0


def one_matrix_of_version_2(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors[f"{DOWN}.qzeros"] += EVERY_NIBBLE


def a_group_too_many(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors[f"{DOWN}.g_idx"][0] = 4


def scales_of_another_shape(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors[f"{DOWN}.scales"] = torch.ones(3, 64, dtype=torch.float16)


def a_real_bias(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors[f"{DOWN}.bias"] = torch.ones(64, dtype=torch.float16)


@pytest.mark.parametrize(
    ("form", "change", "words"),
    [
        ("awq", config_with(quant_method="bitsandbytes"), ("'bitsandbytes'", "awq and gptq")),
        ("awq", config_with(quant_method=None), ("quant_method None",)),
        ("awq", config_with(bits=3), ("bits 3", "4 is")),
        ("awq", config_with(group_size=48), ("group_size 48", "32, 64, 128")),
        ("awq", config_with(version="gemv"), ("version 'gemv'", "gemm")),
        ("gptq", config_with(checkpoint_format="marlin"), ("checkpoint_format 'marlin'",)),
        ("gptq", config_with(is_marlin_format=True), ("is_marlin_format",)),
        ("gptq", config_with(dynamic={"x": {"bits": 8}}), ("dynamic",)),
        ("gptq", config_with(group_size=64), ("do not belong together",)),
        ("awq", without("scales"), (f"{DOWN}.scales is missing",)),
        ("awq", without("qzeros"), (f"{DOWN}.qzeros is missing",)),
        ("awq", without("qweight"), (f"{DOWN}.qweight is missing",)),
        ("gptq", some_zeros_differ, (f"{DOWN}.qzeros", "symmetric")),
        ("gptq", one_matrix_of_version_2, (f"{DOWN}.qzeros", "another way")),
        ("gptq", a_group_too_many, (f"{DOWN}.g_idx", "not there")),
        ("gptq", scales_of_another_shape, (DOWN, "scales [3, 64]")),
        ("gptq", a_real_bias, (f"{DOWN}.bias", "no place")),
    ],
)
def test_folders_that_cannot_be_right_are_refused(
    form: str, change: Change, words: tuple[str, ...], packed_folders: dict[str, Path], tmp_path: Path
) -> None:
    path = changed(packed_folders[form], tmp_path / "changed", change)
    with pytest.raises(ModelError) as caught:
        load_model(open_checkpoint(path), **CPU, stays_packed=everything)
    for word in words:
        assert word in str(caught.value)


# what is kept packed, and where


def test_weights_choose_by_device_and_dtype(folder: Path, packed_folders: dict[str, Path]) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    four = QuantizedMatrix(torch.zeros(32, 64, dtype=torch.uint8), torch.ones(32, 2, 2), 4, True)
    assert zoo.choose_weights("dense", gpu, torch.bfloat16) is None
    assert zoo.choose_weights("auto", gpu, torch.float32) is None
    assert zoo.choose_weights("auto", cpu, torch.float32) is None
    for device, dtype, weights in (
        (gpu, torch.bfloat16, "auto"),
        (cpu, torch.bfloat16, "auto"),
        (cpu, torch.float32, "packed"),
    ):
        keeps = zoo.choose_weights(weights, device, dtype)
        assert keeps is not None
        assert keeps(four)
    on_cpu = zoo.choose_weights("auto", cpu, torch.bfloat16)
    assert on_cpu is not None
    assert not on_cpu(four._replace(bits=8))
    assert not on_cpu(four.rows(slice(0, 24)))
    with pytest.raises(ModelError, match="no weights that can stay packed"):
        zoo.load(str(folder), device="cpu", weights="packed")
    with pytest.raises(InputError, match="toy has no packed weights"):
        zoo.load("toy", device="cpu", weights="packed")
    with pytest.raises(InputError, match="weights must be one of auto, packed, dense"):
        LLM("toy", weights="small")  # type: ignore[arg-type]


def test_four_bits_on_a_cpu_in_bfloat16(packed_folders: dict[str, Path]) -> None:
    model = zoo.load(str(packed_folders["awq"]), device="cpu", dtype="bfloat16").model
    assert {type(linear.format) for linear, pieces in model.linears() if "lm_head" not in pieces} == {Int4OnCPU}
    exact = load_model(open_checkpoint(packed_folders["awq"]), **CPU)
    layer, expected = model.layers[0], exact.layers[0]
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    torch.testing.assert_close(
        layer.qkv(x, norm=layer.attention_norm).float(),
        expected.qkv(x.float(), norm=expected.attention_norm),
        rtol=3e-2,
        atol=6e-2,
    )
    torch.testing.assert_close(layer.gate_up.gated(x).float(), expected.gate_up.gated(x.float()), rtol=3e-2, atol=6e-2)
    assert (
        zoo.weight_bytes(open_checkpoint(packed_folders["awq"]), torch.bfloat16)
        < 0.6 * 2 * exact.config.num_parameters()
    )


def test_random_packed_weights_run(folder: Path) -> None:
    model = zoo.load("random:toy", device="cpu", dtype="float32", weights="packed").model
    assert {type(linear.format) for linear, pieces in model.linears() if "lm_head" not in pieces} == {Packed}
    weight = model.layers[0].down.format
    assert isinstance(weight, Packed)
    assert float(dequantize(weight.matrix, torch.float32).std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(("group", "dense"), [(32, set[str]()), (64, {"self_attn.o_proj"})])
def test_ranks_hold_packed_parts_cut_where_groups_end(
    group: int, dense: set[str], folder: Path, tmp_path: Path
) -> None:
    """Rank 1 of two has half of each matrix; of o_proj it would have half a group of 64, so that is in floats."""
    checkpoint = open_checkpoint(quantize(str(folder), tmp_path / "out", "awq", group))
    part = Part(1, 2)
    floats, packed = (load_model(checkpoint, **CPU, part=part, stays_packed=keep) for keep in (None, everything))
    for (expected, pieces), (found, _) in zip(floats.linears(), packed.linears(), strict=True):
        assert isinstance(expected.format, Dense)
        if "lm_head" in pieces or any(name.endswith(tuple(dense)) for name in pieces if dense):
            assert isinstance(found.format, Dense)
            assert torch.equal(found.format.weight, expected.format.weight)
        else:
            assert isinstance(found.format, Packed)
            assert torch.equal(dequantize(found.format.matrix, torch.float32), expected.format.weight)


# the command


def test_quantize_command_writes_a_folder_that_generates(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["quantize", str(folder), str(out), "--format", "gptq", "--group", "32"])
    assert result.exit_code == 0, result.output
    assert "gptq in groups of 32" in result.output
    llm = LLM(str(out), device="cpu", dtype="float32", weights="packed", num_blocks=16)
    answer = llm.generate([{"prompt_token_ids": TOKENS}], SamplingParams(max_tokens=5, ignore_eos=True))[0]
    dense = LLM(str(out), device="cpu", dtype="float32", weights="dense", num_blocks=16)
    expected = dense.generate([{"prompt_token_ids": TOKENS}], SamplingParams(max_tokens=5, ignore_eos=True))[0]
    assert answer.outputs[0].token_ids == expected.outputs[0].token_ids


def test_quantize_says_what_it_cannot_do(folder: Path, packed_folders: dict[str, Path], tmp_path: Path) -> None:
    for arguments, words in (
        ((str(folder), tmp_path / "a", "int3", 32), "format must be one of awq, gptq"),
        ((str(folder), tmp_path / "a", "awq", 48), "group must be one of 32, 64, 128"),
        ((str(folder), tmp_path / "a", "awq", 128), r"groups of 128; 32, 64 would do"),
        ((str(folder), folder, "awq", 32), "exists already"),
        ((str(packed_folders["awq"]), tmp_path / "a", "awq", 32), "is quantized already, by awq"),
    ):
        with pytest.raises(InputError, match=words):
            quantize(*arguments)
    assert not (tmp_path / "a").exists()


# SmolLM2, whose file is Q4_1

PROMPTS = (
    "The capital of France is", "Once upon a time", "def fibonacci(n):", "Water boils at", "The three primary colours are",
    "In 1969, people first", "A recipe for bread begins with", "The opposite of hot is",
)  # fmt: skip


@pytest.mark.slow
def test_smollm2_says_the_same_packed_as_in_floats(smollm2_path: Path) -> None:
    params = SamplingParams(max_tokens=64, ignore_eos=True)
    texts = []
    for weights in ("dense", "packed"):
        llm = LLM(str(smollm2_path), device="cpu", dtype="float32", weights=weights, num_blocks=128)  # type: ignore[arg-type]
        texts.append([output.outputs[0].token_ids for output in llm.generate(list(PROMPTS), params)])
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_smollm2_survives_the_way_through_a_folder(smollm2_path: Path, tmp_path: Path) -> None:
    """From GGUF to AWQ with its tokenizer and chat template; the weights take at most 0.35 of what they took in floats."""
    out = quantize(str(smollm2_path), tmp_path / "awq", "awq", 64)
    loaded, original = zoo.load(str(out), device="cpu", dtype="bfloat16"), zoo.load(str(smollm2_path), device="cpu")
    text = "Hello, world! <|im_start|>user"
    assert loaded.tokenizer.encode(text) == original.tokenizer.encode(text)
    assert loaded.tokenizer.chat_template is not None
    taken = sum(parameter.numel() * parameter.element_size() for parameter in loaded.model.parameters())
    assert taken <= 0.35 * 4 * original.config.num_parameters()
