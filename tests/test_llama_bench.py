"""What llama-bench wrote becomes rows: of every form the same ones, with all that makes another case."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_fuzz import BENCHED, CSV, MARKDOWN

from tunebench import results
from tunebench.errors import TuneBenchError
from tunebench.report import frame, llama_bench

NO_SAMPLES = {name: value for name, value in BENCHED.items() if not name.startswith("samples")}


def read(folder: Path, text: str, encoding: str = "utf-8", model: str = "") -> list[results.Result]:
    """The rows of a file with that text."""
    (folder / "bench").write_text(text, encoding=encoding)
    return llama_bench.read(folder / "bench", model)


def test_all_fields_are_kept(tmp_path: Path) -> None:
    (row,) = read(tmp_path, json.dumps([BENCHED]))
    assert (row.model, row.scheme, row.test) == ("Qwen2.5-7B-Instruct-Q4_K_M", "Q4_K - Medium", "pp512")
    assert (row.device, row.target, row.samples_ns) == (BENCHED["gpu_info"], "cuda", BENCHED["samples_ns"])
    assert row.settings == {
        **{"n_batch": 2048, "n_ubatch": 512, "cpu_mask": "0x0", "cpu_strict": 0, "type_v": "f16"},
        **{"n_gpu_layers": -1, "flash_attn": -1, "tensor_split": "0.00"},
    }
    assert row.environment["versions"] == {"llama_cpp": "8cf427ff"}
    assert row.environment["llama_bench"]["build_number"] == 5163
    assert row.environment["llama_bench"]["cpu_info"] == BENCHED["cpu_info"]


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (json.dumps([BENCHED], indent=2), "utf-8-sig"),
        (json.dumps(BENCHED) + "\n", "utf-16"),
        (json.dumps(BENCHED) + "\n", "utf-16-le"),
        (json.dumps([BENCHED]), "utf-16-be"),
        (f"ggml_cuda_init: found 1 device {{0}}\n{json.dumps([BENCHED], indent=1)}\nllama_print: bye\n", "utf-8"),
    ],
)
def test_every_encoding_gives_the_same_row(text: str, encoding: str, tmp_path: Path) -> None:
    assert read(tmp_path, text, encoding) == read(tmp_path, json.dumps([BENCHED]))


def test_csv_is_the_same_case_with_its_mean(tmp_path: Path) -> None:
    (row,) = read(tmp_path, "loading\n" + CSV.replace("False", "0"))
    (other,) = read(tmp_path, json.dumps([BENCHED]))
    assert frame.case_key(row) == frame.case_key(other)
    assert row.samples_ns == [BENCHED["avg_ns"]]
    assert row.environment["llama_bench"]["stddev_ns"] == str(BENCHED["stddev_ns"])


def test_a_table_has_what_it_shows(tmp_path: Path) -> None:
    first, second = read(tmp_path, MARKDOWN)
    assert (first.model, first.scheme, first.test, second.test) == ("qwen2 7B", "Q4_K - Medium", "pp512", "tg128")
    assert results.tokens_per_s(first) == pytest.approx([2368.80])
    assert first.settings == {"n_gpu_layers": 99, "n_ubatch": 512, "flash_attn": 1}
    assert first.environment["versions"] == {"llama_cpp": "8cf427ff"}
    assert (first.model_size, first.model_n_params) == (round(4.36 * 2**30), 7_620_000_000)


@pytest.mark.parametrize(
    ("model_type", "scheme"),
    [
        ("llama 7B Q3_K - Small", "Q3_K - Small"),
        ("llama 7B Q5_K - Small", "Q5_K - Small"),
        ("gpt-oss 20B MXFP4 MoE", "MXFP4 MoE"),
        ("llama 7B IQ2_XXS - 2.0625 bpw", "IQ2_XXS - 2.0625 bpw"),
        ("llama 7B Q4_0", "Q4_0"),
        ("llama 7B mostly Q4_0", "Q4_0"),
        ("llama 7B Q4_0 (guessed)", "Q4_0"),
        ("llama 7B (guessed) Q4_0", "Q4_0"),
        ("llama4 17Bx16E (Scout) Q4_K - Medium", "Q4_K - Medium"),
        ("llama ?B all F32", "all F32"),
        ("qwen3 0.6B F16", "F16"),
        ("", "unknown"),
    ],
)
def test_a_scheme_keeps_its_whole_name(model_type: str, scheme: str, tmp_path: Path) -> None:
    (row,) = read(tmp_path, json.dumps({**BENCHED, "model_type": model_type}))
    assert row.scheme == scheme


@pytest.mark.parametrize(
    "change",
    [
        *({name: 7} for name in ("n_ubatch", "n_batch", "flash_attn", "n_gpu_layers", "n_threads", "n_depth")),
        *({name: "q8_0"} for name in ("type_k", "type_v", "cpu_mask", "tensor_split")),
        {"a_field_of_tomorrow": True},
        {"model_type": "qwen2 7B Q3_K - Medium"},
        {"model_filename": "finetuned/Qwen2.5-7B-Instruct-Q4_K_M.gguf"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_differs_is_another_case(change: dict[str, Any], tmp_path: Path) -> None:
    rows = read(tmp_path, json.dumps([BENCHED, {**BENCHED, **change}, {**BENCHED, "test_time": "2026"}]))
    assert frame.build(rows)["latest"].sum() == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no row"),
        ("ggml_cuda_init: no device\n", "no row"),
        ("CREATE TABLE llama_bench (n_prompt INTEGER);", "no row"),
        (json.dumps([BENCHED])[:-300], "row 1"),
        (json.dumps(BENCHED) + "\n" + json.dumps({**BENCHED, "n_gen": -1}), r"row 2 .*n_gen"),
        (json.dumps({**BENCHED, "samples_ns": [1], "n_prompt": 0}), "row 1 .*samples"),
        (CSV + '"8cf427ff","5163"\n', r"row 2 .*\(2 fields"),
        (CSV.replace(str(BENCHED["avg_ns"]), "NaN"), "row 1 .*avg_ns"),
        (MARKDOWN.replace("131.42 ± 0.59", "0.00 ± 0.00"), "row 2"),
        ('{"n_prompt": ' + "[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_damaged_is_named(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(TuneBenchError, match=words):
        read(tmp_path, text)


def test_what_is_no_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(TuneBenchError, match="it is no file"):
        llama_bench.read(tmp_path)
    (tmp_path / "latin").write_bytes(b"\xe9" + json.dumps(BENCHED).encode())
    with pytest.raises(TuneBenchError, match="is no text"):
        llama_bench.read(tmp_path / "latin")
