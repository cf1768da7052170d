"""What `tunebench list` shows: (column names, rows of words). Needs no TVM."""

import json

from tunebench import installation
from tunebench.devices import support, targets
from tunebench.engines import baselines
from tunebench.engines.base import OWN
from tunebench.model import quantization
from tunebench.report import charts, metrics
from tunebench.spec import EngineName
from tunebench.tuning import spaces

Listing = tuple[list[str], list[list[str]]]


def models() -> Listing:
    """The workloads that come with TuneBench."""
    rows = []
    for path in sorted(installation.workloads().glob("*.json")):
        data = json.loads(path.read_text())
        data = {**data, **data.get("text_config", {})}
        heads = f"{data['num_attention_heads']}/{data.get('num_key_value_heads', data['num_attention_heads'])}"
        shape = [data["num_hidden_layers"], data["hidden_size"], data["intermediate_size"], heads, data["vocab_size"]]
        rows.append([path.stem, data["model_type"], *(str(value) for value in shape)])
    return ["model", "architecture", "layers", "hidden", "intermediate", "heads/KV", "vocabulary"], rows


def schemes() -> Listing:
    """The quantization schemes."""
    rows = []
    for scheme in sorted(quantization.schemes().values(), key=lambda s: s.name):
        weight = scheme.weight
        layout = {"NK": "N-major", "KN": "K-major", "N16": "tiles of 16"}[weight.layout]
        products = scheme.activations if scheme.activations != "float" else "float32"
        bits = f"{quantization.stored_bits(weight):.4g}"
        rows.append([scheme.name, weight.words, bits, layout, scheme.dtype, products])
    return ["scheme", "weights", "bits a weight", "layout", "activations", "multiplied as"], rows


def targets_() -> Listing:
    """The target presets, and what this machine can do for each."""
    rows = []
    for preset in targets.presets().values():
        found = support.of(preset)
        rows.append([preset.name, preset.summary, *("yes" if a in found.can else "-" for a in support.ACTIONS)])
        rows[-1].append(found.words)
    return ["target", "what", *support.ACTIONS, "on, or why not"], rows


def spaces_() -> Listing:
    """The search spaces."""
    return ["space", "device", "what varies"], [[s.name, s.device, s.summary] for s in spaces.spaces().values()]


def engines_() -> Listing:
    """The engines that `bench` measures."""
    rows = [[peer.name, peer.summary, ", ".join(peer.packages)] for peer in baselines.peers().values()]
    own = [[name, words, "playwright" if name is EngineName.BROWSER else ""] for name, words in OWN.items()]
    return ["engine", "what", "packages"], [*own, *rows]


def metrics_() -> Listing:
    """The metrics."""
    rows = [[m.name, m.unit, "higher" if m.higher_is_better else "lower", m.summary] for m in metrics.load().values()]
    return ["metric", "unit", "better", "what"], rows


def charts_() -> Listing:
    """The charts."""
    return ["chart", "what"], [[c.name, c.title] for c in charts.load().values()]


LISTINGS = {
    "models": models,
    "schemes": schemes,
    "targets": targets_,
    "spaces": spaces_,
    "engines": engines_,
    "metrics": metrics_,
    "charts": charts_,
}
