"""A quantized checkpoint runs in the form that it has, each matrix in its own."""

from pathlib import Path

import numpy as np
import pytest
import tvm
from conftest import CHUNKS, CONTEXT, cpu_target, relative_error
from test_checkpoints import tiny_gguf

from tunebench.cli import inputs
from tunebench.compile import passes
from tunebench.compile.build import compile_model
from tunebench.engines.tvm import TvmEngine, load
from tunebench.errors import TuneBenchError
from tunebench.model import native, quantization, sources, weights
from tunebench.model import workload as workloads
from tunebench.model.checkpoints.ggml import BLOCKS
from tunebench.model.workload import Model
from tunebench.spec import Scheme, Workload

MIXED = {"": "Q4_0", "attn_q": "Q4_K", "attn_k": "Q4_K", "attn_v": "Q6_K", "ffn_down": "Q5_0", "token_embd": "Q8_0"}
"""As llama.cpp's mixtures, with as many types as one layer holds."""
QKV = "model.layers.0.self_attn.qkv_proj"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tiny_gguf(tmp_path / "tiny.Q4_K_M.gguf", MIXED)


def model_in(path: Path, scheme: str | Scheme, device: str = "cpu") -> Model:
    """The file's model in a scheme, by name or as it is."""
    if isinstance(scheme, str) and native.is_native(scheme):
        scheme = native.scheme(scheme, sources.find(str(path)).open())
    scheme = quantization.schemes()[scheme] if isinstance(scheme, str) else scheme
    return workloads.load_model(Workload(str(path), scheme, 1, CHUNKS, CONTEXT, device))


def logits(model: Model) -> np.ndarray:
    """Of a prompt and a token after it, under default schedules."""
    target = cpu_target()
    executable = compile_model(passes.prefix(workloads.build_module(model), target), target, {}).executable
    assert model.checkpoint
    engine = TvmEngine(model, executable, load(model, weights.read(model, model.checkpoint), tvm.cpu()), tvm.cpu())
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, 17), np.int32)
    engine.prefill(tokens[:, :16], 0)
    engine.decode(tokens[:, 16:], 16)
    return engine.logits()


@pytest.mark.parametrize(("scheme", "bound"), [("nativef32", 1e-4), ("nativef16", 5e-3), ("native", 5e-2)])
def test_it_computes_what_its_floats_do(scheme: str, bound: float, path: Path) -> None:
    """float16 rounds activations, and products of bytes round them to 8 bits."""
    error = relative_error(logits(model_in(path, scheme)), logits(model_in(path, "q0f32")))
    assert bound / 1e5 < error < bound


def test_every_matrix_keeps_its_form(path: Path) -> None:
    model = model_in(path, "nativef32")
    forms = {
        piece.name.removeprefix("model.layers.0."): model.scheme_of(piece).weight
        for matrix in model.matrices.values()
        for piece in model.pieces(matrix)
    }
    assert forms == {
        "model.embed_tokens": BLOCKS["Q8_0"].form,
        "self_attn.qkv_proj.0": BLOCKS["Q4_K"].form,
        "self_attn.qkv_proj.1": BLOCKS["Q6_K"].form,
        "self_attn.o_proj": BLOCKS["Q4_0"].form,
        "mlp.gate_up_proj": BLOCKS["Q4_0"].form,
        "mlp.down_proj": BLOCKS["Q5_0"].form,
        "lm_head": BLOCKS["Q8_0"].form,
    }
    checkpoint = model.checkpoint
    assert checkpoint
    stored = dict(weights.read(model, checkpoint))
    assert {name: (array.shape, array.dtype.name) for name, array in stored.items()} == model.param_shapes
    for suffix, part in checkpoint.parts("model.layers.0.self_attn.v_proj.weight", 0, 128).items():
        assert np.array_equal(stored[f"{QKV}.1.{suffix}"], part)
    made_up = dict(workloads.random_weights(model, 0))
    assert {name: (array.shape, array.dtype.name) for name, array in made_up.items()} == model.param_shapes


def test_products_of_bytes_read_the_same_integers(path: Path) -> None:
    model = model_in(path, "native")
    (down,) = (matrix for matrix in model.matrices.values() if matrix.name.endswith("down_proj"))
    scheme = model.scheme_of(down)
    assert (scheme.weight.layout, scheme.activations) == ("N16", "int8")
    checkpoint = model.checkpoint
    assert checkpoint
    stored = {name.rpartition(".")[2]: each for name, each in weights.read(model, checkpoint) if "down_proj" in name}
    found = quantization.kind_of(scheme.weight).dequantize(scheme.weight, stored)
    assert np.array_equal(found, checkpoint.floats("model.layers.0.mlp.down_proj.weight", 0, down.n))
    on_gpu = model_in(path, "native", "gpu")
    assert (on_gpu.workload.scheme.name, on_gpu.scheme_of(down).activations) == ("Q4_0f16", "float")


def test_the_name_says_format_and_activations(path: Path) -> None:
    checkpoint = sources.find(str(path)).open()
    named = {name: native.scheme(name, checkpoint).name for name in ("native", "nativef16", "nativef32", "nativei8f32")}
    assert list(named.values()) == ["Q4_0i8f16", "Q4_0f16", "Q4_0f32", "Q4_0i8f32"]


def test_native_of_floats_is_their_own_type(tmp_path: Path) -> None:
    kinds = {"F16": "q0f16", "BF16": "q0bf16", "F32": "q0f32"}
    for kind, name in kinds.items():
        path = tiny_gguf(tmp_path / f"{kind}.gguf", {"": kind})
        assert native.scheme("native", sources.find(str(path)).open()).name == name
    with pytest.raises(TuneBenchError, match="there are none"):
        native.scheme("native", None)


def test_a_quantized_checkpoint_is_taken_as_it_is_and_a_second_rounding_said(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [each.native for each in inputs.schemes(str(path), [])] == [True]
    assert [each.name for each in inputs.schemes("demo", [])] == ["q4f16_1"]
    assert "rounds" not in capsys.readouterr().out
    assert [each.name for each in inputs.schemes(str(path), ["q4f16_1", "q0f32"])] == ["q4f16_1", "q0f32"]
    assert "q4f16_1 rounds them again" in capsys.readouterr().out.replace("\n", " ")
