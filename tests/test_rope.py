"""Frequencies of rotary embedding, equal to transformers' in float32, and configs of it read alike."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tunebench.errors import TuneBenchError
from tunebench.model.rope import NEEDED, RopeScaling, read_rope, ropes

LONGEST = 16384
CONTEXTS = (4096, 2 * LONGEST)
KINDS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 8.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 4096},
    "yarn of DeepSeek": {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.8, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn of gpt-oss": {"factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096},
    "yarn with a factor": {"factor": 4.0, "attention_factor": 0.5},
    "longrope": {"original_max_position_embeddings": 4096},
    "longrope with a factor": {"original_max_position_embeddings": 4096, "attention_factor": 1.25, "factor": 2.0},
    "proportional": {"partial_rotary_factor": 0.25},
}


def test_every_kind_is_tested() -> None:
    assert {name.split()[0] for name in KINDS} == set(NEEDED)
    assert set(NEEDED) == set(ROPE_INIT_FUNCTIONS)


@pytest.mark.parametrize("theta", [1e4, 1.5e5, 1e6])
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("name", KINDS)
def test_frequencies_are_those_of_transformers(name: str, dim: int, theta: float) -> None:
    kind = name.split()[0]
    given = {"rope_type": kind, "rope_theta": theta, **KINDS[name]}
    if kind == "longrope":
        given |= {
            key: [1 + step * i for i in range(dim // 2)] for key, step in (("short_factor", 0.1), ("long_factor", 0.3))
        }
    theirs = LlamaConfig(
        hidden_size=4 * dim, num_attention_heads=4, max_position_embeddings=LONGEST, rope_parameters=dict(given)
    )
    read = read_rope(given, {"max_position_embeddings": LONGEST}, 1e4, "config.json")
    made = ropes(read["rope_theta"], dim, msgspec.convert(read["rope_scaling"], RopeScaling))
    for context in CONTEXTS:
        expected, times = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu", seq_len=context)
        found = made.of(context)
        # An ulp where torch's power is not rounded to the nearest; llama3 subtracts two of them between its bands.
        np.testing.assert_allclose(np.array(found.inv_freq, np.float32), expected.numpy(), rtol=4e-7)
        assert found.times == pytest.approx(times, rel=1e-12)


@pytest.mark.parametrize(
    ("nested", "top", "theta", "kind"),
    [
        ({}, {}, 1e4, ""),
        ({}, {"rope_theta": 5e5}, 5e5, ""),
        ({"rope_theta": 7.0}, {"rope_theta": 5e5}, 7.0, ""),
        ({"rope_theta": 7.0}, {"rope_theta": None}, 7.0, ""),
        ({"rope_theta": None}, {"rope_theta": 5e5}, 5e5, ""),
        ({"type": "linear", "factor": 1}, {}, 1e4, ""),
        ({"type": "linear", "factor": 2}, {}, 1e4, "linear"),
        ({"type": "linear", "rope_type": "default", "factor": 2}, {}, 1e4, ""),
        ({"type": "su", "factor": 2, "short_factor": [1], "long_factor": [2]}, {}, 1e4, "longrope"),
    ],
)
def test_what_is_nested_wins(nested: dict[str, Any], top: dict[str, Any], theta: float, kind: str) -> None:
    read = read_rope(nested, top, 1e4, "config.json")
    assert read["rope_theta"] == theta
    assert (read["rope_scaling"] or {}).get("rope_type", "") == kind


def test_what_stands_elsewhere_in_a_config_is_kept_with_the_rope() -> None:
    top = {"max_position_embeddings": 4096, "original_max_position_embeddings": 1024}
    given = {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
    read = read_rope(given, top, 1e4, "config.json")["rope_scaling"]
    assert (read["factor"], read["original_max_position_embeddings"]) == (4.0, 1024)
    given = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512}
    read = read_rope(given, {"max_position_embeddings": 4096}, 1e4, "config.json")["rope_scaling"]
    assert (read["factor"], read["original_max_position_embeddings"]) == (2.0, 512)


@pytest.mark.parametrize(
    ("nested", "words"),
    [
        ("linear", "rope_parameters are no object"),
        ({"rope_type": "mrope"}, "rope_type 'mrope' is not supported"),
        ({"rope_type": "llama3", "factor": 8}, "llama3 rotary embedding lacks low_freq_factor, high_freq_factor"),
    ],
)
def test_what_is_not_supported_is_named(nested: Any, words: str) -> None:
    with pytest.raises(TuneBenchError, match=words) as caught:
        read_rope(nested, {}, 1e4, "here/config.json")
    assert str(caught.value).startswith("here/config.json: ")
