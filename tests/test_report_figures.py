"""No figure of a report can be read wrongly: runs kept apart, one limit a device, shares of a step, named decisions."""

import csv
import re
from pathlib import Path

import pytest
from msgspec.structs import replace
from test_report import PP, TG, case, kernels, on_targets, pair, samples, table, tune, write

from tunebench.report import Report, compare, conditions, frame, metrics, sources, summary_table, words
from tunebench.report.steps import decisions, steps
from tunebench.results import Result
from tunebench.spec import Kernel

LATER = "2026-02-02T10:20:30+00:00"


def slower(row: Result, times: float, **changes: object) -> Result:
    """A row whose samples took so many times as long."""
    return replace(row, samples_ns=[round(times * ns) for ns in row.samples_ns], **changes)  # type: ignore[arg-type]


def later(row: Result, **changes: object) -> Result:
    """A row of another run, a month later."""
    return replace(row, run_id="5eed0123", test_time=LATER, **changes)  # type: ignore[arg-type]


def summary_csv(report: Report) -> list[dict[str, str]]:
    return list(csv.DictReader((report.out / "summary.csv").read_text().splitlines()))


# Runs


def test_a_later_partial_bench_keeps_the_speed_up_and_says_whose_reference_it_has(tmp_path: Path) -> None:
    default, tuned = pair()
    report = write(tmp_path, [default, tuned, later(slower(tuned, 0.5))])
    (line,) = table(report, "summary")
    assert line["over default"].endswith(", not interleaved: reference from run 2026-01-02 03:04")
    assert float(line["over default"].split("x")[0]) == pytest.approx(2 * 0.71 / 0.42, rel=0.03)
    assert [row["reference_run"] for row in summary_csv(report)] == ["", "2026-01-02 03:04"]
    assert [row["run"] for row in summary_csv(report)] == ["2026-01-02 03:04", "2026-02-02 10:20"]
    assert "speedup" not in report.charts
    svg = (report.out / "charts/throughput.svg").read_text()
    assert svg.count("(run 2026-01-02 03:04)") == svg.count("(run 2026-02-02 10:20)") == 1
    assert report.findings[0].startswith("Beside a default figure of another run, not interleaved")
    assert any("its reference is from run 2026-01-02 03:04: not interleaved" in said for said in report.warnings)
    in_terminal = next(iter(summary_table(report).columns[5].cells))
    assert str(in_terminal) == f"{line['over default'][:5]}, not interleaved"


def test_a_speed_up_within_one_run_names_that_run(tmp_path: Path) -> None:
    report = write(tmp_path, pair())
    assert [row["reference_run"] for row in summary_csv(report)] == ["", "2026-01-02 03:04"]
    assert "interleaved" not in table(report, "summary")[0]["over default"]
    assert "(run " not in (report.out / "charts/throughput.svg").read_text()


def test_earlier_rows_are_listed_beside_the_latest(tmp_path: Path) -> None:
    default, tuned = pair()
    report = write(tmp_path, [default, tuned, later(slower(default, 1.001)), later(slower(tuned, 0.5))])
    lines = {line["arm"]: line for line in table(report, "earlier")}
    assert {line["run"] for line in lines.values()} == {"2026-01-02 03:04"}
    assert lines["tuned"]["latest over it"].startswith("2.00x (")
    assert lines["tuned"]["beyond the noise floor"] == "yes, faster (1.2 %), but not interleaved"
    assert lines["default"]["beyond the noise floor"] == "no (1.2 %), but not interleaved"
    assert re.fullmatch(r"[\d.]+ ± [\d.]+ tok/s", lines["tuned"]["throughput"])
    assert len(summary_csv(report)) == 2


def test_an_earlier_row_of_a_case_that_failed_since_is_still_listed(tmp_path: Path) -> None:
    tuned = pair()[1]
    report = write(tmp_path, [tuned, later(tuned, status="failed", reason="no memory", samples_ns=[])])
    (line,) = table(report, "earlier")
    assert (line["latest over it"], line["beyond the noise floor"]) == ("-", "the latest has no figure")


def test_a_newer_default_stands_alone_beside_an_older_speed_up(tmp_path: Path) -> None:
    default, tuned = pair()
    report = write(tmp_path, [default, tuned, later(slower(default, 9.0))])
    lines = table(report, "summary")
    assert [(line["tuned"] == "-", line["over default"][:3]) for line in lines] == [(False, "1.6"), (True, "-")]
    assert lines[0]["default"] != lines[1]["default"]


def test_runs_are_named_by_their_user_or_their_start_and_told_apart(tmp_path: Path) -> None:
    first, second = pair(test=TG), pair(test=PP)
    named = [replace(row, run_name="nightly", run_id="aaaabbbb") for row in pair("llama-7b")]
    environment = {"git": {"commit": "0123456789abcdef", "modified": True}, "versions": {"tvm": "0.27", "numpy": "2"}}
    second = [replace(row, run_id="ffffeeee", environment=environment) for row in second]
    report = write(tmp_path, [*first, *second, *named])
    lines = {line["run"]: line for line in table(report, "runs")}
    assert set(lines) == {"2026-01-02 03:04 (run-)", "2026-01-02 03:04 (ffff)", "nightly"}
    other = lines["2026-01-02 03:04 (ffff)"]
    assert (other["commit"], other["versions"]) == ("01234567, modified", "tvm 0.27")
    assert (other["device"], other["rows"]) == ("cpu (llvm)", "2 benched")


def test_tuning_runs_of_one_case_are_all_listed_with_their_cost(tmp_path: Path) -> None:
    first = tune("llama-7b", "q4f16_1")
    second = replace(first, run_id="5eed0123", test_time=LATER, cost_s={"total": 60.0}, trials=10)
    report = write(tmp_path, [*pair("llama-7b"), second, first])
    lines = table(report, "tuning_cost")
    assert [line["run"] for line in lines] == ["2026-01-02 02:04", "2026-02-02 10:20"]
    assert [line["decisions"] for line in lines] == ["6 of 10 kernels promoted, 2 kept default, 2 inconclusive"] * 2
    assert [line["pays back after"] == "-" for line in lines] == [True, False]
    assert len(table(report, "kernels")) == 10
    assert "Tuning took 11.7 min and 1034 trials." in report.findings


def test_kernels_of_one_model_tuned_on_several_targets_are_told_apart(tmp_path: Path) -> None:
    runs = [replace(tune("llama-7b", "q4f16_1"), target=name, run_id=name) for name in ("dawn", "opencl")]
    report = write(tmp_path, [*runs, tune("llama-7b", "q0f16")])
    names = list(dict.fromkeys((line["model"], line["scheme"]) for line in table(report, "kernels")))
    assert names[0][0].startswith("llama-7b (dawn, 8 threads, run ")
    assert names[1][0].startswith("llama-7b (opencl, 8 threads, run ")
    assert names[2] == ("llama-7b", "q0f16")


def test_two_models_of_one_name_are_told_apart_by_their_hash(tmp_path: Path) -> None:
    rows = [replace(row, model="/a/config.json", model_id="aaaa11112222") for row in pair()]
    other = [replace(row, model="/b/config.json", model_id="bbbb11112222", run_id="other") for row in pair()]
    report = write(tmp_path, [*rows, *other, *pair("llama-7b", model_id="cccc11112222")])
    assert [line["model"] for line in table(report, "summary")] == ["config aaaa", "config bbbb", "llama-7b"]
    assert {line["model"] for line in table(report, "coverage")} == {"config aaaa", "config bbbb", "llama-7b"}


def test_only_settings_that_differ_are_in_the_label() -> None:
    row = case("llama-7b", "q4f16_1", "tuned", TG, settings={"n_ubatch": 512, "flash_attn": True})
    rows = [row, replace(row, settings={"n_ubatch": 128, "flash_attn": True}), replace(row, test="tg64")]
    built = frame.build(rows)
    assert list(built["test_label"]) == ["tg128, n_ubatch 512", "tg128, n_ubatch 128", "tg64"]
    assert built["latest"].all()  # none of them replaces another


# Limits


def test_shares_of_all_targets_of_a_device_are_of_the_best_that_a_probe_of_it_reached(tmp_path: Path) -> None:
    rows = on_targets(cuda=1.0, webgpu=0.5)
    read = metrics.evaluate(rows[0])["read_bytes_per_s"]
    assert read is not None
    probes = [{"copy_bytes_per_s": 1.1 * read, "ring_read_bytes_per_s": 1.25 * read}, {"copy_bytes_per_s": 0.4 * read}]
    names = ["NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"]
    rows = [replace(row, probe=probe, device=name) for row, probe, name in zip(rows, probes, names, strict=True)]
    elsewhere = replace(rows[0], device="another", run_id="another", probe={"copy_bytes_per_s": 9 * read})
    report = write(tmp_path, [*rows, elsewhere])
    shares = {line["model"]: line["share of machine"] for line in table(report, "summary")}
    best = words.per_s(1.25 * read, "B")
    assert shares["llama-7b (cuda, NVIDIA H100 80GB HBM3)"] == f"80.0 % of {best} (ring read, cuda)"
    assert shares["llama-7b (webgpu, nvidia-h100-80gb-hbm3)"] == f"40.0 % of {best} (ring read, cuda)"
    assert shares["llama-7b (cuda, another)"].startswith("11.1 % of ")
    limits = {(line["device"], line["probe"]): line for line in table(report, "limits")}
    assert limits["NVIDIA H100 80GB HBM3", "copy"]["other targets' best"].startswith("webgpu: ")
    assert limits["NVIDIA H100 80GB HBM3", "ring read"]["other targets' best"] == "-"
    assert all(0 < float(row["read_share"]) <= 1 for row in summary_csv(report))


def test_a_later_probe_counts_for_earlier_rows_too() -> None:
    default, tuned = pair()
    best = later(tuned, probe={"read_bytes_per_s": 108.4e9})
    built = frame.build([default, tuned, best])
    assert list(built["read_probe"]) == [108.4e9] * 3
    assert set(built["read_probe_run"]) == {"2026-02-02 10:20"}


def test_a_device_without_a_probe_has_no_share(tmp_path: Path) -> None:
    report = write(tmp_path, pair(probe={}))
    assert {line["share of machine"] for line in table(report, "summary")} == {"-"}
    assert "limits" not in {found.name for found in report.tables}


# Kernels


def chunked() -> list[Kernel]:
    """Kernels of a decode step and of two prefill chunks, one of them without any measurement."""
    found = kernels("a")
    short = [replace(kernel, chunk=16) for kernel in found if kernel.phase == "prefill"]
    why = "never measured: run `tunebench tune`"
    unknown = Kernel("attention_long", "decode", 1, 22, 0.0, "default", why)
    return [*found, *short, unknown]


def test_shares_are_of_one_step_and_sum_to_one() -> None:
    found = steps(chunked())
    assert [step.name for step in found] == ["decode step", "prefill chunk of 16", "prefill chunk of 128"]
    for step in found:
        assert sum(step.share(kernel) or 0.0 for kernel in step.kernels) == pytest.approx(1)
        assert step.coverage == pytest.approx(0.87)


def test_the_table_of_kernels_sums_to_100_per_step_and_says_what_is_unknown(tmp_path: Path) -> None:
    report = write(tmp_path, [tune("llama-7b", "q4f16_1", kernels=chunked())])
    shares: dict[str, list[str]] = {}
    for line in table(report, "kernels"):
        shares.setdefault(line["step"], []).append(line["share of step"])
    assert shares["decode step"][0] == "unknown"
    for found in shares.values():
        assert sum(float(cell.split()[0]) for cell in found if cell != "unknown") == pytest.approx(100)
    svg = (report.out / "charts/kernels.svg").read_text()
    assert ">unknown</text>" in svg
    assert svg.count("llama-7b q4f16_1, prefill chunk of") == 2


def test_coverage_with_an_unmeasured_kernel_is_unknown_and_names_it(tmp_path: Path) -> None:
    row = case("llama-7b", "q4f16_1", "tuned", TG, coverage=0.87, kernels=[k for k in chunked() if k.chunk == 1])
    report = write(tmp_path, [row])
    (line,) = table(report, "coverage")
    assert line["never measured"] == "1 of 6 kernels: attention_long: never measured: run `tunebench tune`"
    assert line["under tuned kernels"] == "87.0 %"
    assert metrics.evaluate(row)["coverage"] is None


def test_coverage_of_kernels_that_nobody_measured_is_unknown(tmp_path: Path) -> None:
    unmeasured = [replace(kernel, share=0.0, default_ns=[], tuned_ns=[]) for kernel in kernels("a")[:2]]
    report = write(tmp_path, [case("llama-7b", "q4f16_1", "tuned", TG, coverage=0.0, kernels=unmeasured)])
    (line,) = table(report, "coverage")
    assert line["under tuned kernels"] == "unknown"


def test_times_added_up_without_an_unmeasured_kernel_are_a_lower_bound() -> None:
    rows = [case("llama-7b", "q4f16_1", "tuned", test, n_threads=0, kernels=chunked()) for test in (TG, PP)]
    cells = {line[2]: line[4] for line in sources.table(frame.newest(rows, frame.build(rows))).rows}
    assert cells["1 token"].startswith("> ")
    assert not cells["128 tokens"].startswith("> ")


def test_small_shares_are_not_shown_as_nothing() -> None:
    assert [words.share(value) for value in (0.0004, 0.0006, 0.0, None)] == ["< 0.1 %", "0.1 %", "0.0 %", "unknown"]


def test_every_decision_is_counted_by_its_name(tmp_path: Path) -> None:
    before = [10**5] * 9
    reasons = {"lost": "slower", "late": "not searched before the time ran out", "odd": "no space is for it"}
    found = [
        Kernel(name, "decode", 1, 1, 0.1, "default", why, "kept default", before, before if name == "lost" else [])
        for name, why in reasons.items()
    ]
    found += [Kernel("won", "decode", 1, 1, 0.7, "tuned", "faster", "promoted", before, [10**4] * 9)]
    assert decisions(found) == "1 of 4 kernels promoted, 1 kept default, 1 not searched, 1 nothing to decide"
    report = write(tmp_path, [tune("llama-7b", "q4f16_1", kernels=found)])
    assert [line["decision"] for line in table(report, "kernels")] == [
        "promoted",
        "kept default",
        "not searched",
        "nothing to decide",
    ]
    assert f"{decisions(found)}." in report.findings
    svg = (report.out / "charts/kernels.svg").read_text()
    assert all(f">{name}</text>" in svg for name in ("not searched", "nothing to decide", "kept default"))
    assert ">inconclusive</text>" not in svg


# Comparisons


def test_a_peer_beside_apis_gets_the_lead_of_the_fastest_of_ours_on_its_device(tmp_path: Path) -> None:
    ours = [replace(row, device="One GPU") for row in on_targets(webgpu=0.5, opencl=0.8)]
    other_device = replace(on_targets(cuda=9.0)[0], device="Another GPU")
    other_run = replace(ours[0], run_id="another", samples_ns=[1] * 9)
    engine = slower(ours[1], 3.0, engine="torch", schedule="library", target="webgpu", device="one-gpu")
    report = write(tmp_path, [*ours, other_device, other_run, engine])
    (line,) = table(report, "engines")
    assert re.fullmatch(r"3\.00x \(.*\), opencl", line["tuned over it"])
    (said,) = [finding for finding in report.findings if finding.startswith("Against torch")]
    assert said.endswith("through opencl.")


@pytest.mark.parametrize(
    ("noise", "times", "expected"),
    [
        (0.01, 0.95, "faster"),
        (0.08, 0.95, "no clear difference"),
        (0.01, 1.05, "slower"),
        (0.08, 1.05, "no clear difference"),
        (None, 0.5, "noise floor unknown"),
    ],
)
def test_no_difference_within_the_noise_floor_is_called(noise: float | None, times: float, expected: str) -> None:
    first = case("llama-7b", "q4f16_1", "tuned", TG, noise=noise, samples_ns=samples(1e9, 30, "a", 0.002))
    rows = {
        "speedup": [replace(first, schedule="default"), slower(first, times)],
        "lead": [slower(first, 1.0, schedule="library", engine="torch"), slower(first, times)],
        "across": [first, slower(first, times, target="webgpu", engine="webgpu")],
        "change": [first, later(slower(first, times))],
    }
    for name, pair_of in rows.items():
        assert frame.build(pair_of)[f"{name}_effect"].dropna().iloc[-1] == expected, name


@pytest.mark.parametrize(("first", "second", "floor"), [(0.02, 0.05, 0.05), (None, 0.05, 0.05), (None, None, None)])
def test_of_two_noise_floors_the_higher_counts(first: float | None, second: float | None, floor: float | None) -> None:
    row = case("llama-7b", "q4f16_1", "tuned", TG)
    found = compare.beside(replace(row, noise=first), replace(row, noise=second))
    assert found is not None
    assert found.noise == floor


# Conditions


def test_throttled_samples_are_marked_and_warned_of(tmp_path: Path) -> None:
    default, tuned = pair()
    report = write(tmp_path, [default, replace(tuned, throttled=[0, 3, 4])])
    assert table(report, "summary")[0]["tuned"].endswith(" tok/s, 3 of 12 samples throttled")
    assert any("tuned (tvm): 3 of 12 samples taken while the device was throttled" in said for said in report.warnings)


def test_energy_and_conditions_are_shown_where_they_were_read(tmp_path: Path) -> None:
    default, tuned = pair()
    start = {"sm_clock_hz": 1_980_000_000, "temperature_c": 41, "power_w": None, "throttle_reasons": []}
    end = {"sm_clock_hz": 1_755_000_000, "temperature_c": 41, "power_w": None, "throttle_reasons": ["power cap"]}
    tuned = replace(tuned, joules_per_token=0.52, conditions={"start": start, "end": end})
    report = write(tmp_path, [default, tuned])
    (line,) = table(report, "conditions")
    assert line["energy"] == "0.52 J/token"
    assert line["start to end"] == (
        "sm clock 1.98 GHz to 1.75 GHz; temperature 41.0 °C; throttle reasons none to power cap"
    )
    assert [metrics.evaluate(row)["joules_per_token"] for row in (default, tuned)] == [None, 0.52]


@pytest.mark.parametrize("found", [{}, {"start": None, "end": None}, {"start": {"power_w": None}, "end": {}}])
def test_conditions_that_nobody_read_are_none(found: dict[str, object]) -> None:
    assert conditions.described(case("llama-7b", "q4f16_1", "tuned", TG, conditions=found)) is None


def test_peak_memory_names_its_counter(tmp_path: Path) -> None:
    report = write(tmp_path, pair())
    assert table(report, "summary")[0]["peak memory"].endswith(" MB (VmHWM)")
