"""How far a scheme's logits are from float32's, on random weights of a model's shape.

    python benchmarks/scheme_error.py --model demo

Two errors: of the whole scheme, against float32 with the weights as they were, and of its arithmetic alone (rounded
activations, int8 products), against float32 with the very weights that the scheme holds. Both are root mean squares
over all logits of a decode from an empty cache, relative to the spread of the float32 logits.
"""

from __future__ import annotations

import argparse

import numpy as np
import tvm

from tunebench import environment
from tunebench.compile import passes
from tunebench.compile.build import compile_model
from tunebench.devices.targets import presets
from tunebench.engines.tvm import TvmEngine, load
from tunebench.model import quantization
from tunebench.model import workload as workloads
from tunebench.spec import Workload

TOKENS = 48
CHUNKS = (16,)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--scheme", action="append", help="default: all")
    args = parser.parse_args()
    threads = environment.usable_cores()
    environment.set_threads(threads)
    target = passes.tvm_target(presets()["llvm"], threads)
    dense = dict(workloads.random_weights(_model(args.model, "q0f32"), 0))
    exact = _logits(_model(args.model, "q0f32"), dense, target)
    print(f"{'scheme':10s} {'whole scheme':>13s} {'arithmetic':>11s}   same first choice")
    for name in args.scheme or sorted(quantization.schemes()):
        model = _model(args.model, name)
        held, back = _stored(model, dense)
        found = _logits(model, held, target)
        same_weights = _logits(_model(args.model, "q0f32"), back, target)
        agree = np.mean(found.argmax(-1) == same_weights.argmax(-1))
        print(f"{name:10s} {_error(found, exact):13.2%} {_error(found, same_weights):11.3%}   {agree:.0%}", flush=True)


def _model(name: str, scheme: str) -> workloads.Model:
    return workloads.load_model(Workload(name, quantization.schemes()[scheme], 1, CHUNKS, 64))


def _stored(
    model: workloads.Model, dense: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Float32 weights in a scheme's form, and what they are worth in float32."""
    held, back = {}, {}
    for name in model.vectors:
        held[name] = dense[name].astype(model.param_shapes[name][1])
        back[name] = held[name].astype(np.float32)
    for name, matrix in model.matrices.items():
        weight = model.scheme_of(matrix).weight
        kind = quantization.kind_of(weight)
        parts = kind.quantize(weight, dense[f"{name}.weight"])
        held |= {f"{name}.{suffix}": part for suffix, part in parts.items()}
        back[f"{name}.weight"] = kind.dequantize(weight, parts)
    return held, back


def _logits(model: workloads.Model, weights: dict[str, np.ndarray], target: tvm.target.Target) -> np.ndarray:
    """Logits [tokens, vocab] of a decode."""
    mod = passes.prefix(workloads.build_module(model), target)
    engine = TvmEngine(
        model, compile_model(mod, target, {}).executable, load(model, weights.items(), tvm.cpu()), tvm.cpu()
    )
    tokens = np.random.default_rng(1).integers(0, model.config.vocab_size, TOKENS, np.int32)
    rows = []
    for position, token in enumerate(tokens):
        engine.decode(np.array([[token]], np.int32), position)
        rows.append(engine.logits()[0])
    return np.stack(rows)


def _error(found: np.ndarray, reference: np.ndarray) -> float:
    return float(np.sqrt(np.mean((found - reference) ** 2)) / reference.std())


if __name__ == "__main__":
    main()
