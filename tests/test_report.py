"""The report half over made-up rows: no device, no TVM."""

import csv
import math
import random
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from matplotlib.text import Text
from msgspec.structs import replace
from rich.console import Console

from tunebench import results, spec
from tunebench.errors import TuneBenchError
from tunebench.report import Report, charts, frame, metrics, render, sources, summary_table, words, write_report
from tunebench.results import Quality, Result, TuneResult
from tunebench.spec import Count, Kernel

MODELS = {"tinyllama-1.1b": 1.1e9, "llama-7b": 6.7e9, "qwen2-0.5b": 0.5e9}
BITS = {"q4f16_1": 4.5, "q3f16_1": 3.6, "q0f16": 16.0, "q0f32": 32.0}
PROBE = {"read_bytes_per_s": 54.2e9, "flops_per_s": 310e9}
TASKS = (
    "fused_dequantize_matmul_gate_up",
    "fused_dequantize_matmul_down",
    "attention_decode",
    "matmul_lm_head",
    "rms_norm",
)
SPEED = {
    ("decode", "default"): 0.42,
    ("decode", "tuned"): 0.71,
    ("prefill", "default"): 0.22,
    ("prefill", "tuned"): 0.55,
}


def samples(median_ns: float, count: int, seed: str, spread: float = 0.01) -> list[int]:
    """Times around a median, the same for the same seed."""
    generator = random.Random(seed)
    return [round(median_ns * math.exp(generator.gauss(0, spread))) for _ in range(count)]


def case(model: str, scheme: str, schedule: str, test: spec.Test, **changes: object) -> Result:
    """One plausible row: decode is bound by the probe's bandwidth, prefill by its matrix rate."""
    weights = MODELS[model] * BITS[scheme] / 8
    flops = 2 * MODELS[model]
    share = SPEED[test.phase, schedule]
    if test.phase == "decode":
        median_ns = 1e9 * test.n_gen * weights / (PROBE["read_bytes_per_s"] * share)
    else:
        median_ns = 1e9 * test.n_prompt * flops / (PROBE["flops_per_s"] * share)
    row = Result(
        model=model,
        scheme=scheme,
        schedule=schedule,
        engine="tvm",
        target="llvm",
        device="cpu",
        test=test.name,
        n_prompt=test.n_prompt,
        n_gen=test.n_gen,
        n_depth=test.n_depth,
        batch=1,
        n_threads=8,
        status="ok",
        run_id="run-1",
        test_time="2026-01-02T03:04:05+00:00",
        samples_ns=samples(median_ns, 12, f"{model}{scheme}{schedule}{test.name}"),
        warmup_ns=[round(median_ns * 1.2)],
        model_size=round(weights),
        flops_per_token=round(flops),
        bytes_per_token=round(weights),
        memory={
            "weights": Count(round(weights), "array sizes"),
            "kv_cache": Count(46_000_000, "array sizes"),
            "peak": Count(round(weights * 1.15 + 1e8), "VmHWM"),
        },
        coverage=0.93 if schedule == "tuned" else 0.0,
        kernels=kernels(model) if schedule == "tuned" else [],
        probe=PROBE,
        noise=0.012,
        weights="real",
        quality=judged(BITS[scheme]),
        environment={"cpu": "Example CPU, 8 cores", "versions": {"tvm": "0.27.0"}, "load": 0.1 * len(scheme)},
    )
    return replace(row, **changes)  # type: ignore[arg-type]


def judged(bits: float) -> Quality:
    """What a scheme of so many bits loses."""
    kl = 0.3 / bits
    return Quality(
        text="prose 0123456789ab",
        tokens=1000,
        perplexity=14.3 * (1 + kl),
        reference_perplexity=14.3,
        kl=kl,
        same_top=1 - kl,
        decode_perplexity=15.1,
        decode_prefill_perplexity=15.2,
        perplexity_interval=[13.0, 16.0],
        kl_interval=[kl / 2, 2 * kl],
        same_top_interval=[0.5, 1.0],
    )


def kernels(seed: str) -> list[Kernel]:
    """Kernels of both phases: most promoted, one kept, one inconclusive."""
    found = []
    for phase, chunk in (("decode", 1), ("prefill", 128)):
        for index, (task, gain) in enumerate(zip(TASKS, (1.9, 1.6, 1.25, 0.97, 1.01), strict=True)):
            spread = 0.08 if index == 4 else 0.015
            before = samples(4e5 / (index + 1), 12, f"{seed}{task}{phase}d", spread)
            after = samples(4e5 / (index + 1) / gain, 12, f"{seed}{task}{phase}t", spread)
            promoted = index < 3
            reason = "faster" if promoted else "slower in fresh samples" if index == 3 else "the interval includes 1"
            name, share = "tuned" if promoted else "default", (0.46, 0.27, 0.14, 0.08, 0.05)[index]
            decision = "promoted" if promoted else "kept default" if index == 3 else "inconclusive"
            found.append(Kernel(task, phase, chunk, 22, share, name, reason, decision, before, after))
    return found


def tune(model: str, scheme: str, **changes: object) -> TuneResult:
    """One plausible tuning run."""
    scale = MODELS[model] / 1e9
    curve = [
        {
            "wall_s": 40.0 * step,
            "trials": 64.0 * step,
            "decode_ns": 3e7 * scale * (0.08 * len(scheme) + 0.45 * math.exp(-step / (2 + len(scheme)))),
            "prefill_ns": 9e8 * scale * (0.4 + 0.6 * math.exp(-step / 4)),
        }
        for step in range(17)
    ]
    row = TuneResult(
        model=model,
        scheme=scheme,
        target="llvm",
        device="cpu",
        batch=1,
        n_threads=8,
        run_id="run-1",
        test_time="2026-01-02T02:04:05+00:00",
        trials=1024,
        valid_trials=987,
        cost_s={"search": 90.0, "build": 260.0, "run": 240.0, "model": 30.0, "verify": 20.0, "total": 640.0},
        curve=curve,
        kernels=kernels(model),
        ranking={"matmul": 0.87},
        environment={"cpu": "Example CPU, 8 cores"},
    )
    return replace(row, **changes)  # type: ignore[arg-type]


TG, PP = spec.Test(n_gen=128), spec.Test(n_prompt=512)


def pair(
    model: str = "tinyllama-1.1b", scheme: str = "q4f16_1", test: spec.Test = TG, **changes: object
) -> list[Result]:
    """The default row and the tuned row of one case."""
    return [case(model, scheme, schedule, test, **changes) for schedule in ("default", "tuned")]


def peer(model: str = "tinyllama-1.1b", test: spec.Test = TG) -> Result:
    """A row of another engine, with its own scheme."""
    row = case(model, "q4f16_1", "tuned", test)
    return replace(row, engine="llama_cpp", scheme="Q4_0", schedule="library", kernels=[], coverage=None, memory={})


def full(models: Iterable[str], schemes: Iterable[str]) -> list[Result | TuneResult]:
    """Everything a sweep leaves: cases, peers, tuning runs, a failure and a case that was not run."""
    schemes = list(schemes)
    rows: list[Result | TuneResult] = []
    for model in models:
        rows += [row for scheme in schemes for test in (PP, TG) for row in pair(model, scheme, test)]
        rows += [peer(model, PP), peer(model, TG), *(tune(model, scheme) for scheme in schemes[:2])]
    lost = case(
        "llama-7b", "q0f32", "default", TG, status="failed", reason="needs 26.8 GB, 16 GB are free", samples_ns=[]
    )
    return [*rows, lost, replace(lost, target="cuda", device="cuda", status="not_run", reason="no CUDA device here")]


def write(folder: Path, rows: Iterable[Result | TuneResult]) -> Report:
    """The report over `rows`."""
    path = folder / "results.jsonl"
    for row in rows:
        results.append(path, row)
    return write_report([path], folder / "out")


def table(report: Report, name: str) -> list[dict[str, str]]:
    """The lines of one table of the report, by column."""
    found = next(table for table in report.tables if table.name == name)
    return [dict(zip(found.columns, row, strict=True)) for row in found.rows]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return write(tmp_path_factory.mktemp("full"), full(("tinyllama-1.1b", "llama-7b"), ("q4f16_1", "q0f16")))


def test_every_file_is_written(report: Report) -> None:
    assert {path.name for path in report.out.iterdir()} == {"report.md", "report.html", "summary.csv", "charts"}
    assert {path.name for path in (report.out / "charts").iterdir()} == {f"{name}.svg" for name in charts.load()}


def test_the_markdown_and_the_page_show_every_chart(report: Report) -> None:
    page = (report.out / "report.html").read_text()
    linked = re.findall(r"!\[.+\]\((.+)\)", (report.out / "report.md").read_text())
    assert sorted(linked) == sorted(f"charts/{name}.svg" for name in charts.load())
    assert all((report.out / link).is_file() for link in linked)
    assert page.count("<svg ") == len(linked)


def test_charts_are_text_and_the_same_for_the_same_rows(report: Report, tmp_path: Path) -> None:
    rows = report.out.parent / "results.jsonl"
    write_report([rows], tmp_path)
    for path in (report.out / "charts").iterdir():
        assert path.read_bytes() == (tmp_path / "charts" / path.name).read_bytes()
    assert ">tg128</text>" in (tmp_path / "charts/throughput.svg").read_text()


def test_summary_compares_tuned_with_default(report: Report) -> None:
    line = next(line for line in table(report, "summary") if line["test"] == "tg128" and line["scheme"] == "q4f16_1")
    assert re.fullmatch(r"\d+\.\d+ ± [\d.]+ tok/s", line["default"])
    gain, low, high = map(float, re.findall(r"[\d.]+", line["over default"]))
    assert low < gain < high
    assert gain == pytest.approx(0.71 / 0.42, rel=0.03)
    assert line["share of machine"].endswith("% of 54.2 GB/s (read, llvm, 8 threads)")
    assert float(line["share of machine"].split()[0]) == pytest.approx(71, rel=0.03)


def test_failures_peers_and_decisions_are_shown(report: Report) -> None:
    text = (report.out / "report.html").read_text()
    for words_of in (
        "no CUDA device here",
        "needs 26.8 GB, 16 GB are free",
        "llama_cpp",
        "Q4_0",
        "Example CPU, 8 cores",
    ):
        assert words_of in text
        assert words_of in (report.out / "report.md").read_text()
    assert {line["decision"] for line in table(report, "kernels")} == {"promoted", "kept default", "inconclusive"}
    assert {line["peak"].split("(")[1] for line in table(report, "memory") if "(" in line["peak"]} == {"VmHWM)"}


def test_each_scheme_has_its_quality_beside_its_speed(report: Report) -> None:
    line = next(line for line in table(report, "schemes") if line["scheme"] == "q4f16_1")
    assert line["perplexity"] == "15.3 (13 to 16)"
    assert line["KL"] == "0.0667 (0.0333 to 0.133)"
    assert line["same top"] == "93.3 %"
    assert line["decode"] == "15.1 (15.2)"
    assert re.fullmatch(r"[\d.]+ tok/s \(tg128, tuned\)", line["decode speed"])
    assert re.fullmatch(r"[\d.]+ tok/s \(pp512, tuned\)", line["prompt speed"])
    assert {"perplexity", "kl", "same_top", "reference_perplexity", "decode_perplexity"} <= set(report.frame)


def alone(row: Result) -> Result:
    """A row beside whose quality nothing was timed."""
    return replace(row, test="quality", n_gen=0, samples_ns=[])


def test_a_quality_that_was_measured_alone_belongs_to_the_rows_of_its_scheme(tmp_path: Path) -> None:
    timed = [replace(row, quality=None, weights="real") for row in pair()]
    old = alone(case("tinyllama-1.1b", "q4f16_1", "tuned", TG, quality=judged(4)))
    new = replace(old, quality=judged(8), test_time="2026-02-02")
    other = replace(old, scheme="q0f16")
    report = write(tmp_path, [*timed, new, old, other])
    kl = {line["scheme"]: (line["KL"].split()[0], line["decode speed"] != "-") for line in table(report, "schemes")}
    assert kl == {"q4f16_1": ("0.0375", True), "q0f16": ("0.075", False)}
    assert len(report.frame) == 2  # what was not timed is no case
    assert report.frame["kl"].tolist() == pytest.approx([0.3 / 8] * 2)


def test_random_weights_have_no_quality(tmp_path: Path) -> None:
    rows = [alone(case("llama-7b", "q4f16_1", "tuned", TG))]
    rows += pair("llama-7b", weights="random", quality=None)
    rows += pair("qwen2-0.5b", weights="real", quality=None)
    rows += pair("tinyllama-1.1b", weights="", quality=None)
    report = write(tmp_path, rows)
    said = {line["model"]: line["perplexity"] for line in table(report, "schemes")}
    assert said == {"llama-7b": "random weights", "qwen2-0.5b": "not measured"}
    assert report.frame["kl"].isna().all()
    assert "schemes" not in report.charts


def test_a_lead_needs_one_run_and_one_scheme(tmp_path: Path) -> None:
    rows = pair()
    other = replace(rows[1], engine="llama_cpp", schedule="library", samples_ns=[2 * ns for ns in rows[1].samples_ns])
    elsewhere = replace(other, run_id="another", model="llama-7b")
    report = write(tmp_path, [*rows, other, elsewhere, replace(other, scheme="Q4_0")])
    leads = {(line["model"], line["scheme"]): line["tuned over it"] for line in table(report, "engines")}
    assert leads.pop(("tinyllama-1.1b", "q4f16_1")).startswith("2.00x (")
    assert set(leads.values()) == {"-"}
    (said,) = [finding for finding in report.findings if finding.startswith("Against")]
    assert "llama_cpp: tinyllama-1.1b q4f16_1 tg128 2.00x (" in said
    assert "llama-7b" not in said


def test_the_headline_says_what_tuning_gained(report: Report) -> None:
    assert report.findings[0].startswith("Decode: 4 of 4 are faster with tuning over default, at the median 1.")
    assert "24 of 40 kernels promoted, 8 kept default, 8 inconclusive." in report.findings


def test_coverage_names_the_misses_of_its_phase(report: Report) -> None:
    for line in table(report, "coverage"):
        assert line["under tuned kernels"] == "87.0 %"
        assert line["never measured"] == "none"
        assert re.fullmatch(
            r"matmul_lm_head 8.0 %: slower.*; rms_norm 5.0 %: the interval includes 1", line["largest misses"]
        )


def test_tuning_pays_back_after_some_tokens(report: Report) -> None:
    line = next(line for line in table(report, "tuning_cost") if line["model"] == "tinyllama-1.1b (llvm, 8 threads)")
    assert re.fullmatch(r"[\d.]+ k tokens of tg128", line["pays back after"])


def test_the_page_refers_to_nothing_outside(report: Report) -> None:
    text = (report.out / "report.html").read_text()
    references = re.findall(r'(?:\bsrc|\bhref|\baction|\bdata|\bposter)\s*=\s*"([^"]*)"|url\(([^)]*)\)', text)
    assert references  # the charts refer to their own parts
    assert {(link or target).strip("'\"")[0] for link, target in references} == {"#"}
    assert not re.search(r"@import|<link|<script|<iframe|<!DOCTYPE svg|<\?xml", text)
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


def test_ids_in_the_page_that_are_referred_to_exist(report: Report) -> None:
    text = (report.out / "report.html").read_text()
    wanted = set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text))
    found = re.findall(r'\bid="([^"]+)"', text)
    assert wanted <= set(found)
    assert len(found) == len(set(found))


def test_every_figure_in_a_table_has_a_unit(report: Report) -> None:
    free = {"model", "scheme", "test", "target", "reason", "largest misses", "value", "of the run", "kernel"}
    free |= {"run", "started", "step", "perplexity", "float32"}
    cells = [
        cell
        for found in report.tables
        for row in found.rows
        for column, cell in zip(found.columns, row, strict=True)
        if column not in free
    ]
    assert len(cells) > 100
    assert [cell for cell in cells if re.fullmatch(r"[-+\d.,\s]*\d", cell)] == []


def test_the_csv_holds_base_units(report: Report) -> None:
    lines = (report.out / "summary.csv").read_text().splitlines()
    assert len(lines) == 1 + int(report.frame["latest"].sum())
    assert {"tokens_per_s", "read_share", "peak_bytes", "speedup_low", "run_id"} <= set(lines[0].split(","))


def test_the_terminal_shows_the_summary(report: Report) -> None:
    console = Console(width=200, record=True, file=sys.stderr)
    console.print(summary_table(report))
    text = console.export_text()
    assert "over default" in text
    assert "tok/s" in text


def test_rows_without_a_run_are_not_compared(tmp_path: Path) -> None:
    assert write(tmp_path, pair(run_id="")).frame["speedup"].isna().all()


def test_the_reference_is_of_the_same_run_even_when_a_newer_one_exists(tmp_path: Path) -> None:
    default, tuned = pair()
    newer = replace(default, run_id="run-2", test_time="2026-02-02", samples_ns=[9 * ns for ns in default.samples_ns])
    report = write(tmp_path, [newer, default, tuned])
    assert report.frame["speedup"].max() == pytest.approx(0.71 / 0.42, rel=0.03)
    assert report.frame.loc[report.frame["latest"], "run_id"].tolist() == ["run-1", "run-2"]


@pytest.mark.parametrize(
    "change",
    [{"scheme": "q0f16"}, {"batch": 4}, {"n_threads": 2}, {"target": "cuda"}, {"test": "tg64"}, {"model": "x"}],
)
def test_only_the_same_case_is_a_reference(change: dict[str, object]) -> None:
    default, tuned = pair()
    assert frame.build([default, replace(tuned, **change)])["speedup"].isna().all()  # type: ignore[arg-type]


def test_the_newest_row_of_a_case_is_shown(tmp_path: Path) -> None:
    old = case("tinyllama-1.1b", "q4f16_1", "default", TG)
    new = replace(old, run_id="run-2", test_time="2026-05-01", samples_ns=[10**9] * 10)
    report = write(tmp_path, [new, old])
    assert [line["default"] for line in table(report, "summary")] == ["128 ± 0 tok/s"]
    assert len(report.frame) == 2


def test_no_difference_is_called_none(tmp_path: Path) -> None:
    default, tuned = pair()
    same = [replace(row, samples_ns=samples(1e9, 12, row.schedule)) for row in (default, tuned)]
    report = write(tmp_path, same)
    assert table(report, "summary")[0]["over default"].endswith("no clear difference")
    assert "no case of 1 is clearly faster" in report.findings[0]


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_samples_are_said(tmp_path: Path, count: int) -> None:
    report = write(tmp_path, [replace(row, samples_ns=row.samples_ns[:count]) for row in pair()])
    assert table(report, "summary")[0]["over default"].endswith("too few samples")
    assert report.findings[0].endswith("and not called a difference: too few samples.")
    assert any("too few samples" in warning for warning in report.warnings)


def test_only_failures_still_make_a_report(tmp_path: Path) -> None:
    report = write(
        tmp_path, [case("llama-7b", "q0f32", "default", TG, status="failed", reason="no <memory>", samples_ns=[])]
    )
    assert report.charts == []
    assert "no &lt;memory&gt;" in (report.out / "report.html").read_text()
    assert summary_table(report).title == "Failed and not run"


def test_only_a_tuning_run_makes_a_report(tmp_path: Path) -> None:
    report = write(tmp_path, [tune("tinyllama-1.1b", "q4f16_1")])
    assert report.charts == ["kernels", "tuning_cost"]
    assert (report.out / "summary.csv").is_file()


def test_a_torn_line_is_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    results.append(path, pair()[0])
    path.write_text(path.read_text() + '{"schema_version": 1, "kind"')
    assert any("results.jsonl:2" in warning for warning in write_report([path], tmp_path / "out").warnings)


def test_no_rows_is_an_error_of_the_user(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text("\n")
    with pytest.raises(TuneBenchError, match="no result rows"):
        write_report([path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", sorted(charts.load()))
def test_a_chart_without_rows_is_none(name: str) -> None:
    chart = charts.load()[name]
    assert chart.title
    assert charts.render(chart, frame.build([]), []) is None


@pytest.mark.parametrize("name", sorted(charts.load()))
@pytest.mark.parametrize("count", [1, 4])
def test_a_chart_draws_any_number_of_groups(name: str, count: int) -> None:
    rows = full(list(MODELS)[: max(1, count - 1)], list(BITS)[:count])
    cases = [row for row in rows if isinstance(row, Result)]
    figure = charts.render(
        charts.load()[name], frame.build(cases), [row for row in rows if isinstance(row, TuneResult)]
    )
    assert figure is not None
    assert figure.axes


@pytest.mark.parametrize("name", sorted(metrics.load()))
@pytest.mark.parametrize(
    "row",
    [*pair(), *pair(test=PP), *pair(n_prompt=32), *pair(samples_ns=[])],
    ids=lambda row: f"{row.schedule} {len(row.samples_ns)}",
)
def test_a_metric_is_a_finite_number_or_none(name: str, row: Result) -> None:
    metric = metrics.load()[name]
    bare = replace(row, probe={}, memory={}, coverage=None, bytes_per_token=0, flops_per_token=0)
    for value in (metric.compute(row), metric.compute(bare)):
        assert value is None or math.isfinite(value)
    assert metric.unit
    assert metric.summary


def test_metrics_of_decode() -> None:
    row = case("tinyllama-1.1b", "q4f16_1", "tuned", TG, samples_ns=[2 * 10**9] * 10, batch=4, bytes_per_token=10**9)
    found = metrics.evaluate(row)
    assert found["tokens_per_s"] == pytest.approx(256)
    assert found["tpot_s"] == pytest.approx(2 / 128)
    assert found["read_bytes_per_s"] == pytest.approx(64e9)  # 64 steps a second, whatever the batch
    assert found["read_share"] == pytest.approx(64 / 54.2)
    assert found["ttft_s"] is None
    assert found["matrix_share"] is None


def test_metrics_of_prefill() -> None:
    row = case("tinyllama-1.1b", "q4f16_1", "tuned", PP, samples_ns=[2 * 10**9] * 10, flops_per_token=10**9)
    found = metrics.evaluate(row)
    assert found["ttft_s"] == pytest.approx(2)
    assert found["matrix_flops_per_s"] == pytest.approx(256e9)
    assert found["matrix_share"] == pytest.approx(256 / 310)
    assert found["read_share"] is None
    assert found["weights_bytes"] == row.memory["weights"].bytes


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (words.seconds(3e-5), "30.0 us"),
        (words.seconds(0.0213), "21.3 ms"),
        (words.seconds(95), "95.0 s"),
        (words.seconds(640), "10.7 min"),
        (words.seconds(36000), "10.0 h"),
        (words.size(1.234e9), "1.23 GB"),
        (words.size(None), "-"),
        (words.percent(0.424), "42.4 %"),
        (words.ratio(1.42, 1.38, 1.47), "1.42x (1.38 to 1.47)"),
        (words.ratio(1.42, 0.0, math.inf), "1.42x"),
        (words.rate(10.62, 0.21), "10.6 ± 0.2 tok/s"),
        (words.rate(math.nan), "-"),
        (words.count(1.2e6, "tokens"), "1.20 M tokens"),
        (words.count(850.0, "tokens"), "850 tokens"),
    ],
)
def test_words(shown: str, expected: str) -> None:
    assert shown == expected


def test_batches_stand_apart_in_charts_and_in_order(tmp_path: Path) -> None:
    rows = [case("llama-7b", "q4f16_1", "tuned", TG, batch=batch) for batch in (16, 1, 4)]
    figure = charts.render(charts.load()["memory"], frame.build(rows), [])
    assert figure is not None
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["q4f16_1", "q4f16_1 · batch 4", "q4f16_1 · batch 16"]
    assert [line["test"] for line in table(write(tmp_path, rows), "summary")] == [
        "tg128",
        "tg128, batch 4",
        "tg128, batch 16",
    ]


def test_a_phase_that_was_not_tuned_has_no_panel_of_kernels() -> None:
    run = tune("llama-7b", "q4f16_1")
    unknown = [replace(kernel, default_ns=[], tuned_ns=[]) for kernel in run.kernels if kernel.phase == "prefill"]
    decode = [kernel for kernel in run.kernels if kernel.phase == "decode"]
    run = replace(run, kernels=decode + unknown, batch=4)
    figure = charts.render(charts.load()["kernels"], frame.build([]), [run])
    assert figure is not None
    titles = [title for axes in figure.axes if (title := axes.get_title(loc="left"))]
    assert titles == ["llama-7b q4f16_1, batch 4, decode step"]


def test_runs_on_several_targets_are_told_apart() -> None:
    runs = [replace(tune("llama-7b", "q4f16_1"), target=target) for target in ("dawn", "opencl")]
    for name in ("kernels", "tuning_cost"):
        figure = charts.render(charts.load()[name], frame.build([]), runs)
        assert figure is not None
        figure.canvas.draw()
        words = [text.get_text() for text in figure.findobj(Text)]
        for target in ("dawn", "opencl"):
            assert any(word.startswith(f"llama-7b q4f16_1, {target}") for word in words), (name, target)


def sources_of(rows: list[Result]) -> list[tuple[str, ...]]:
    """The lines of the table of sources over `rows`."""
    return list(sources.table(frame.newest(rows, frame.build(rows))).rows)


def test_a_table_shows_each_source_alone() -> None:
    def kernel(task: str, schedule: str, before: int, after: int, **others: int) -> Kernel:
        by_source = {name: [value] * 9 for name, value in others.items()}
        return Kernel(task, "prefill", 512, 2, 0.5, schedule, "", "promoted", [before] * 9, [after] * 9, by_source)

    found = [
        kernel("matmul", "library", 400_000, 100_000, library=100_000, tuned=200_000),
        kernel("rms_norm", "tuned", 20_000, 5_000),
        kernel("attention", "tuned", 9_000_000, 9_000),
        replace(kernel("take", "default", 1_000, 2_000), decision="kept default"),
    ]
    (line,) = sources_of([case("llama-7b", "q4f16_1", "tuned", PP, kernels=found)])
    assert line[2:4] == ("512 tokens", "1 default, 2 tuned, 1 library")
    assert line[4:8] == ("18.8 ms", "430 us", "18.2 ms", "230 us")
    assert line[8] == "3.99x"  # 4x and 4x, and 1x of a kernel of little time
    assert not sources_of([case("llama-7b", "q4f16_1", "tuned", PP)])


def on_targets(**speeds: float) -> list[Result]:
    """One case on several targets of one run, each so many times as fast as it would be."""
    rows = []
    for name, speed in speeds.items():
        row = case("llama-7b", "q4f16_1", "tuned", TG, target=name, device=f"a {name} device", n_threads=0)
        engine = "tvm" if name == "cuda" else name
        rows.append(replace(row, engine=engine, samples_ns=[round(ns / speed) for ns in row.samples_ns]))
    return rows


def test_targets_of_a_run_stand_beside_its_first(tmp_path: Path) -> None:
    report = write(tmp_path, [*on_targets(cuda=1.0, webgpu=0.5, opencl=0.8), *pair(run_id="another")])
    lines = {line["target"]: line["over the reference"] for line in table(report, "targets")}
    assert list(lines) == ["cuda (a cuda device)", "opencl (a opencl device)", "webgpu (a webgpu device)"]
    assert lines["cuda (a cuda device)"] == "reference"
    assert lines["webgpu (a webgpu device)"].startswith("0.50x (")
    assert lines["webgpu (a webgpu device)"].endswith(" of cuda")
    assert lines["opencl (a opencl device)"].startswith("0.80x (")
    assert (tmp_path / "out/charts/targets.svg").exists()
    assert {line["model"] for line in table(report, "summary")} >= {"llama-7b (webgpu)", "llama-7b (cuda)"}


def test_targets_of_different_runs_are_not_compared(tmp_path: Path) -> None:
    rows = [replace(row, run_id=row.target) for row in on_targets(cuda=1.0, webgpu=0.5)]
    report = write(tmp_path, rows)
    assert "targets" not in {each.name for each in report.tables}
    assert not (tmp_path / "out/charts/targets.svg").exists()


def test_a_browser_is_told_from_its_target() -> None:
    rows = on_targets(webgpu=1.0) + [replace(row, engine="browser", device="chrome") for row in on_targets(webgpu=0.1)]
    assert sorted(frame.build(rows)["place"]) == ["webgpu", "webgpu in a browser"]


def test_sources_of_several_targets_name_each(tmp_path: Path) -> None:
    lines = sources_of(on_targets(webgpu=1.0, opencl=1.0))
    assert {line[0] for line in lines} == {"llama-7b (webgpu)", "llama-7b (opencl)"}


NASTY = "<img src=x onerror=alert(1)>|`a` $\\frac$ [b](javascript:c)\r\n# d \x1b[31m\u202e*e* &lt; \\"


def test_names_are_shown_as_text(tmp_path: Path) -> None:
    rows = [replace(row, model=f"- {NASTY}", device=NASTY) for row in pair()]
    lost = replace(rows[0], scheme="=1+1", status="failed", reason=NASTY, samples_ns=[])
    report = write(tmp_path, [*rows, lost, replace(tune("llama-7b", "q0f32"), model=NASTY)])
    text = (report.out / "report.md").read_text()
    assert re.search(r"(?<!\\)[<`\[\]$]", re.sub(r"!\[[^\]]*\]\(charts/\w+\.svg\)|tunebench \w+", "", text)) is None
    table_lines = [line for line in text.splitlines() if "onerror" in line and line.startswith("|")]
    assert len(table_lines) >= 4
    for line in text.splitlines():
        assert not line.startswith("# d")
    for name in ("report.md", "report.html", "summary.csv", *(f"charts/{chart}.svg" for chart in report.charts)):
        shown = (report.out / name).read_bytes().decode()
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", shown), name
        assert not re.search(r"(?<!\\)<img", shown) or name == "summary.csv"
    with (report.out / "summary.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert {line["scheme"] for line in read} == {"q4f16_1", "'=1+1"}
    assert all(line["model"].startswith("'- <img") for line in read)


def test_a_list_of_findings_stays_one(tmp_path: Path) -> None:
    text = render.markdown("t", ["# a", "- b", "1. c", "2) d", "===", "+ e", "_f_ g_1"], [], [], [])
    assert [line for line in text.splitlines() if line][1:] == [
        r"- \# a",
        r"- \- b",
        r"- 1\. c",
        r"- 2\) d",
        r"- \===",
        r"- \+ e",
        r"- \_f\_ g_1",
    ]


def test_kernels_without_times_have_no_gain() -> None:
    kernel = Kernel("matmul", "decode", 1, 1, 0.5, "tuned", "", "promoted", [20, 20], [10, 10])
    untimed = [replace(kernel, tuned_ns=[]), replace(kernel, default_ns=[0]), replace(kernel, tuned_ns=[0, 0])]
    assert sources.over_default([kernel, *untimed]) == pytest.approx(2.0)
    assert sources.over_default(untimed) == 1.0
