"""What each weight format costs in quality, and how long it takes to quantize: perplexity of a text.

    python benchmarks/rounding.py FOLDER MODEL.gguf

The weights of every matrix are quantized and dequantized, and PyTorch computes in float32: rounding alone is seen, not
the arithmetic of kernels. The text is this interpreter's own documentation.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunebench.model import quantization
from tunebench.spec import WeightFormat

TOKENS = 1024
WINDOW = 256
Change = Callable[[np.ndarray], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", help="of the model")
    parser.add_argument("file", nargs="?", help="its GGUF in that folder, where it is no Hugging Face folder")
    parser.add_argument("--scheme", action="append", help="default: all that round")
    args = parser.parse_args()
    given = {"gguf_file": args.file} if args.file else {}
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32, **given).eval()
    tokens = AutoTokenizer.from_pretrained(args.folder, **given)(_text(), return_tensors="pt").input_ids[:, :TOKENS]
    floats = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.ndim == 2}
    print(f"{'weights':24s} {'bits':>6s} {'perplexity':>10s} {'error':>8s} {'s per G weights':>16s}")
    print(f"{'as they are':24s} {'':6s} {_perplexity(model, tokens):10.3f}", flush=True)
    for name, (bits, change) in _changes(args.scheme).items():
        errors, seconds = [], 0.0
        for part, weight in model.named_parameters():
            if part in floats:
                before, start = floats[part].numpy(), time.perf_counter()
                after = change(before)
                seconds += time.perf_counter() - start
                errors.append(np.linalg.norm(after - before) / np.linalg.norm(before))
                weight.data.copy_(torch.from_numpy(after))
        rate = seconds / sum(weight.numel() for weight in floats.values()) * 1e9
        found = _perplexity(model, tokens)
        print(f"{name:24s} {bits:6.3f} {found:10.3f} {np.mean(errors):8.4f} {rate:16.1f}", flush=True)


def _text() -> str:
    modules = [argparse, time, np, torch.nn.functional]
    return "\n\n".join(str(module.__doc__) for module in modules) + (open(argparse.__file__).read())


def _changes(names: list[str] | None) -> dict[str, tuple[float, Change]]:
    """What is tried, by name: bits a weight, and weights -> what is left of them."""
    changes: dict[str, tuple[float, Change]] = {}
    if not names:
        changes["ggml's Q4_0"] = 4.5, _ggml(gguf.GGMLQuantizationType.Q4_0)
        changes["ggml's Q4_1"] = 5.0, _ggml(gguf.GGMLQuantizationType.Q4_1)
        changes["largest over 7"] = 4.5, _largest_over_seven
    seen: set[WeightFormat] = set()
    for name, scheme in sorted(quantization.schemes().items()):
        form = quantization.by_rows(scheme.weight)
        if name in names if names else form.group and form not in seen and scheme.activations == "float":
            changes[name] = quantization.stored_bits(form), _ours(form)
            seen.add(form)
    return changes


def _ours(form: WeightFormat) -> Change:
    kind = quantization.kind_of(form)
    return lambda weight: kind.dequantize(form, kind.quantize(form, weight))[:, : weight.shape[1]]


def _ggml(kind: gguf.GGMLQuantizationType) -> Change:
    return lambda weight: gguf.dequantize(gguf.quantize(weight, kind), kind)


def _largest_over_seven(weight: np.ndarray) -> np.ndarray:
    """Round to nearest with the largest magnitude of a group of 32 as 7 steps, as MLC LLM does."""
    groups = weight.reshape(len(weight), -1, 32)
    scale = (np.abs(groups).max(-1, keepdims=True) / np.float32(7)).astype(np.float16).astype(np.float32)
    steps = np.divide(groups, scale, out=np.zeros_like(groups), where=scale > 0)
    return np.asarray(np.clip(np.rint(steps), -7, 7) * scale).reshape(weight.shape)


def _perplexity(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """Of the second half of each window, whose first half is its context."""
    losses = []
    with torch.no_grad():
        for start in range(0, tokens.shape[1] - WINDOW + 1, WINDOW // 2):
            window = tokens[:, start : start + WINDOW]
            logits = model(window).logits[0, WINDOW // 2 - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, window[0, WINDOW // 2 :]))
    return float(torch.stack(losses).mean().exp())


if __name__ == "__main__":
    main()
