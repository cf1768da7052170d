"""Plans in a web browser: what is exported, what is served, and the same tokens as on the CPU."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import itertools
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from conftest import cpu_target, load_model, lower, need, relative_error
from msgspec.structs import replace
from safetensors import safe_open

from tunebench.cli import app
from tunebench.compile import passes
from tunebench.compile.build import compile_model, compile_plan
from tunebench.engines.baselines import Engine
from tunebench.engines.browser import engine as browser_engine
from tunebench.engines.browser import export as browser_export
from tunebench.engines.browser.engine import BrowserEngine, call
from tunebench.engines.browser.server import PAGE, PageServer
from tunebench.engines.chunked import random_cache, split_prompt
from tunebench.engines.tvm import TvmEngine, load
from tunebench.errors import TuneBenchError
from tunebench.model import workload as workloads
from tunebench.model.workload import Model
from tunebench.runtime import plan as plans
from tunebench.runtime.apis import webgpu
from tunebench.runtime.plan import Plan

pytestmark = pytest.mark.xdist_group("browser")

SCHEME = "q4f32_1"  # a software adapter has no float16
LIMITS = {"maxComputeInvocationsPerWorkgroup": 256, "maxComputeWorkgroupStorageSize": 16384}
PLAIN: dict[str, Any] = {"name": "plain", "lanes": 0, "features": [], "limits": LIMITS}
PROMPT = 53  # a chunk of 32, one of 16, and five tokens
SEED = 3


def make_plan(config: Path, facts: Mapping[str, Any], scheme: str = SCHEME) -> tuple[Model, Plan]:
    """The tiny model under default schedules, for an adapter."""
    target = tvm.target.Target(browser_engine.webgpu_target(facts))
    model = load_model(config, scheme, device_kind="gpu")
    plan = compile_plan(passes.prefix(workloads.build_module(model), target), model, target, {}).plan
    assert plan
    return model, plan


def arrays_of(model: Model) -> list[tuple[str, np.ndarray]]:
    """Random weights, and what else a plan wants."""
    return list(workloads.with_rope(model, workloads.random_weights(model, SEED)))


@pytest.fixture(scope="module")
def made(config: Path) -> tuple[Model, Plan]:
    """The tiny model for an adapter that promises nothing."""
    return make_plan(config, PLAIN)


@pytest.fixture(scope="module")
def engine(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowserEngine]:
    """The tiny model in this machine's browser."""
    model, plan = make_plan(config, need(browser_engine.adapter_facts))
    with contextlib.closing(BrowserEngine(plan, arrays_of(model), tmp_path_factory.mktemp("plan"))) as engine:
        yield engine


@pytest.fixture(scope="module")
def cpu(config: Path) -> TvmEngine:
    """The same weights and contents of the cache on the CPU, whose keys lie in blocks of positions."""
    model, target = load_model(config, SCHEME), cpu_target()
    executable = compile_model(lower(model, target)[0], target, {}).executable
    loaded = load(model, workloads.random_weights(model, SEED), tvm.cpu())
    on_gpu = load_model(config, SCHEME, device_kind="gpu").caches[0]
    keys, values = (random_cache(shape, np.dtype("float32")) for shape, _ in on_gpu)
    (b, heads, _, dim, lanes), _ = model.caches[0][0]
    keys = keys.reshape(b, heads, -1, lanes, dim).swapaxes(3, 4)
    for i in range(len(loaded.keys)):
        loaded.keys[i].copyfrom(np.ascontiguousarray(keys))
        loaded.values[i].copyfrom(values)
    return TvmEngine(model, executable, loaded, tvm.cpu())


def greedy(engine: Engine, steps: int) -> tuple[list[int], list[np.ndarray]]:
    """Tokens after a prompt, and the logits that they were chosen from."""
    prompt = np.random.default_rng(1).integers(0, 128, (1, PROMPT)).astype(np.int32)
    engine.prefill(prompt, 0)
    logits = [engine.logits()]
    for position in range(PROMPT, PROMPT + steps):
        engine.decode(logits[-1].argmax(-1).astype(np.int32)[:, None], position)
        logits.append(engine.logits())
    return [int(each.argmax()) for each in logits], logits


def test_tokens_are_those_of_the_cpu(engine: BrowserEngine, cpu: TvmEngine) -> None:
    ours, logits = greedy(engine, 16)
    theirs, reference = greedy(cpu, 16)
    assert ours == theirs
    assert len(set(ours)) > 3, "nearly constant tokens would show little"
    assert relative_error(np.stack(logits), np.stack(reference)) < 1e-4


def test_queued_steps_run_in_order(engine: BrowserEngine, cpu: TvmEngine) -> None:
    tokens = np.random.default_rng(2).integers(0, 128, (1, 20)).astype(np.int32)
    for each in (engine, cpu):
        each.prefill(tokens[:, :16], 90)  # attends to what caches begin with, too
        for i in range(16, 20):
            each.decode(tokens[:, i : i + 1], 90 + i)
        each.wait()
    assert relative_error(engine.logits(), cpu.logits()) < 1e-4


def test_plans_share_weights_and_cache(engine: BrowserEngine) -> None:
    engine.prefill(np.full((1, 16), 5, np.int32), 0)
    with contextlib.closing(BrowserEngine(engine.plan, beside=engine)) as other:
        token = np.array([[7]], np.int32)
        other.decode(token, 16)
        engine.decode(token, 16)
        np.testing.assert_array_equal(other.logits(), engine.logits())
    assert engine.logits().shape == (1, 128)  # the page is still there


def test_the_page_agrees_on_pieces_and_grids(engine: BrowserEngine) -> None:
    page = engine._tab.page
    prompts = ((1, 0, 128), (9, 0, 128), (53, 70, 128), (53, 75, 128), (100, 0, 128), (128, 0, 128))
    times: tuple[dict[int, float], ...] = ({}, {1: 5, 16: 20, 32: 24}, {1: 1, 16: 90, 32: 10})
    for (n, position, context), chunk_ns in itertools.product(prompts, times):
        found = call(page, "chunks", n, position, [16, 32], context, chunk_ns)
        assert [(each["chunk"], each["valid"]) for each in found] == [
            (each.size, each.valid) for each in split_prompt(n, position, (16, 32), context, chunk_ns)
        ]
    for blocks in ((1, 2, 3), (65535, 1, 1), (65536, 1, 1), (400001, 2, 1)):
        assert tuple(call(page, "spread", list(blocks))) == webgpu._spread(blocks)


def test_the_page_serves_people(engine: BrowserEngine) -> None:
    engine.prefill(np.array([[5, 6, 7]], np.int32), 0)
    tokens = []
    for position in range(3, 9):
        tokens.append(int(engine.logits().argmax()))
        engine.decode(np.array([tokens[-1:]], np.int32), position)
    page = engine._tab._browser._browser.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(engine._tab.server.url)
    page.wait_for_selector("#greedy button:enabled")
    for form, fields in (
        ("greedy", {"tokens": "5, 6 7", "generated": "6"}),
        ("bench", {"prompt": "20", "generated": "4", "samples": "2"}),
    ):
        for name, value in fields.items():
            page.fill(f"#{form} [name={name}]", value)
        page.click(f"#{form} button")
        page.wait_for_selector(f"#{form} button:enabled")
    assert page.locator("#tokens span").all_inner_texts() == [str(token) for token in tokens]
    rows = [row.split("\t") for row in page.locator("#results tbody tr").all_inner_texts()]
    assert [row[0] for row in rows] == ["pp20", "tg4"]
    assert all(float(row[1].replace(",", "")) > 0 and row[-1] == "2" for row in rows)
    assert page.inner_text("#title") == f"tiny in {SCHEME}"
    page.fill("#greedy [name=tokens]", "1, 128")
    page.click("#greedy button")
    page.wait_for_selector("#error:visible")
    assert "“128” is no token id" in page.inner_text("#error")
    page.close()
    assert not problems


def test_steps_are_timed(engine: BrowserEngine) -> None:
    step = {"length": 1, "tokens": [3], "position": 0, "lastToken": 0}
    times = call(engine._tab.page, "measure", 0, [step] * 4)
    assert times["wallMs"] > 0
    if "timestamp-query" in engine.facts["features"]:
        assert 0 < times["deviceMs"] <= times["wallMs"]


def test_what_the_adapter_cannot_is_refused(engine: BrowserEngine, config: Path, tmp_path: Path) -> None:
    shader = next(iter(engine.plan.shaders.values()))
    most = int(engine.facts["limits"]["maxStorageBuffersPerShaderStage"])
    wrong = {
        f"takes {most + 1} storage buffers": replace(shader, writes=(True,) * (most + 1)),
        "blocks of 4096 threads": replace(shader, threads=(4096, 1, 1)),
        "does not compile: line 1": replace(shader, source="fn main( {"),
    }
    if "shader-f16" not in engine.facts["features"]:
        wrong["lacks the feature shader-f16"] = replace(shader, source="enable f16;\n" + shader.source)
        with pytest.raises(TuneBenchError, match="shader-f16"):
            browser_engine.check_dtype(engine.facts, "float16")
    for words, broken in wrong.items():
        plan = replace(engine.plan, shaders={**engine.plan.shaders, "broken": broken})
        with pytest.raises(TuneBenchError, match=f"kernel broken .*{words}"):
            BrowserEngine(plan, beside=engine)
    with pytest.raises(TuneBenchError, match="in opencl"):
        BrowserEngine(replace(engine.plan, language="opencl"), beside=engine)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("attribute", "value", "words"),
    [
        ("EXECUTABLES", ("no-such-browser",), "no no-such-browser"),
        ("importlib", None, r"needs playwright. Install it: .*\[browser\]"),
    ],
)
def test_what_is_missing_is_said(
    attribute: str, value: object, words: str, monkeypatch: pytest.MonkeyPatch, made: tuple[Model, Plan]
) -> None:
    if attribute == "importlib":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    elif importlib.util.find_spec("playwright") is None:
        pytest.skip("playwright is what is missing")
    else:
        monkeypatch.setattr(browser_engine, attribute, value)
    monkeypatch.setattr(browser_engine.Chromium, "running", None)
    for _ in range(2):
        with pytest.raises(TuneBenchError, match=words):
            BrowserEngine(made[1], ())


_NO_BROWSER = """
import sys
from tunebench.engines.browser import engine
engine.EXECUTABLES = (sys.executable,)
for _ in range(2):
    try:
        engine.adapter_facts()
    except engine.TuneBenchError as error:
        print(error)
"""


def test_what_is_no_browser_is_the_same_line_twice() -> None:
    pytest.importorskip("playwright")
    done = subprocess.run([sys.executable, "-c", _NO_BROWSER], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert "does not run WebGPU" in first
    assert first == second


def test_an_adapter_decides_the_target() -> None:
    facts = {**PLAIN, "limits": {"maxComputeInvocationsPerWorkgroup": 2048, "maxComputeWorkgroupStorageSize": 32768}}
    target = browser_engine.webgpu_target({**facts, "features": ["subgroups"], "lanes": 32})
    assert (target["max_num_threads"], target["max_shared_memory_per_block"]) == (1024, 32768)
    assert target["supports_subgroups"]
    assert not browser_engine.webgpu_target({**facts, "features": ["subgroups"], "lanes": 4})["supports_subgroups"]
    assert not browser_engine.webgpu_target({**facts, "features": [], "lanes": 32})["supports_subgroups"]


def test_an_export_is_read_as_safetensors(made: tuple[Model, Plan], tmp_path: Path) -> None:
    model, plan = made
    browser_export.export_plan(plan, reversed(arrays_of(model)), tmp_path)
    assert plans.read(tmp_path) == plan
    wanted = dict(arrays_of(model))
    with safe_open(tmp_path / browser_export.WEIGHTS, framework="numpy") as file:
        tiles = {name for name in file.keys() if name.startswith("cache.")}  # noqa: SIM118  (not a mapping)
        assert set(file.keys()) - tiles == set(wanted)
        for name, array in wanted.items():
            np.testing.assert_array_equal(file.get_tensor(name), array)
        (tile,) = tiles
        shape, _ = model.caches[0][0]
        np.testing.assert_array_equal(
            np.broadcast_to(file.get_tensor(tile), shape), random_cache(shape, np.dtype("float32"))
        )


def test_an_export_lacks_nothing(made: tuple[Model, Plan], tmp_path: Path) -> None:
    model, plan = made
    with pytest.raises(TuneBenchError, match="weights are missing: rope_cos_sin"):
        browser_export.export_plan(plan, workloads.random_weights(model, SEED), tmp_path)
    wrong = [("rope_cos_sin", np.zeros(3, np.float32)), *arrays_of(model)]
    with pytest.raises(TuneBenchError, match=r"rope_cos_sin is float32 \[3\], and the plan has float32 \[2, 128, 8\]"):
        browser_export.export_plan(plan, wrong, tmp_path)
    with pytest.raises(TuneBenchError, match=r"has no model\.safetensors"):
        browser_export.check(tmp_path)


def run(arguments: Sequence[str | Path], monkeypatch: pytest.MonkeyPatch) -> int:
    """`tunebench` with these arguments; its exit code."""
    monkeypatch.setattr(sys, "argv", ["tunebench", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        app.main()
    return int(caught.value.code or 0)


def test_the_command_exports(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(browser_engine, "adapter_facts", lambda: PLAIN)
    given = ["export", tmp_path / "out", "-m", config, "--browser", "--prompt", "32", "--context", "128"]
    assert run([*given, "-q", "q4f16_1"], monkeypatch) == 2
    assert "lacks the feature shader-f16. Choose a float32 scheme" in capsys.readouterr().err
    assert run([*given, "--format", "plans"], monkeypatch) == 2
    assert "Did you mean 'plan'" in capsys.readouterr().err
    assert run([*given, "--schedule", "tuned"], monkeypatch) == 2
    assert "not tuned in a browser" in capsys.readouterr().err
    assert run(["browse", tmp_path / "out"], monkeypatch) == 2
    assert "Make one: tunebench export" in capsys.readouterr().err
    assert run([*given, "-q", SCHEME], monkeypatch) == 0
    browser_export.check(tmp_path / "out")
    assert plans.read(tmp_path / "out").facts.scheme == SCHEME


@pytest.fixture
def served(tmp_path: Path) -> Iterator[PageServer]:
    """A folder with a file of ten bytes, and a secret beside it."""
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "model.safetensors").write_bytes(b"0123456789")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "plan" / "link").symlink_to(tmp_path / "secret")
    with PageServer(tmp_path / "plan") as server:
        yield server


def ask(server: PageServer, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes, Mapping[str, str]]:
    """The status, body and headers of an answer; the path is sent as it is."""
    place = server.url.removeprefix("http://").rstrip("/")
    with contextlib.closing(http.client.HTTPConnection(place, timeout=10)) as connection:
        connection.request(method, path, headers={key.capitalize(): value for key, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers


@pytest.mark.parametrize(
    "path",
    [
        "/plan/../secret",
        "/plan/%2e%2e/secret",
        "/plan/..%2fsecret",
        "/plan//etc/passwd",
        "/plan/link",
        "/../cli.py",
        "/%2e%2e/cli.py",
        "//etc/passwd",
        "/plan/",
        "/plan",
        "/plan/%00",
        "//[",
        "/plan/" + "a" * 5000,
        "/plan/%ff%fe",
        "/nothing.js",
    ],
)
def test_nothing_outside_is_served(path: str, served: PageServer) -> None:
    status, body, _ = ask(served, path)
    assert status == 404
    assert b"secret" not in body
    assert b"root:" not in body


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "TRACE", "x"])
def test_other_methods_are_refused(method: str, served: PageServer) -> None:
    assert ask(served, "/plan/model.safetensors", method)[0] == 501


@dataclass(frozen=True)
class Page:
    """A page that answers with the same to every question."""

    answer: object

    def evaluate(self, code: str, given: object) -> object:
        return self.answer


FACTS = {
    **{"name": "llvmpipe", "software": True, "browser": "Chromium", "lanes": 8, "features": ["subgroups"]},
    "limits": {"maxBufferSize": 1 << 30, "maxStorageBufferBindingSize": None},
}


@pytest.mark.parametrize(
    "answer",
    [
        None,
        [],
        {"error": 1},
        {"value": {"name": "x"}},
        {"value": {**FACTS, "lanes": -1}},
        {"value": {**FACTS, "limits": {"maxBufferSize": "1"}}},
    ],
)
def test_what_a_page_says_is_checked(answer: object) -> None:
    with pytest.raises(TuneBenchError, match="answered with something else"):
        browser_engine.read_facts(Page(answer))  # type: ignore[arg-type]
    assert browser_engine.read_facts(Page({"value": FACTS})) == FACTS  # type: ignore[arg-type]


def test_other_sites_are_not_answered(served: PageServer) -> None:
    assert ask(served, "/plan/model.safetensors", host="example.org:80")[0] == 404


@pytest.mark.parametrize(
    ("asked", "status", "body", "content_range"),
    [
        ("", 200, b"0123456789", None),
        ("bytes=0-3", 206, b"0123", "bytes 0-3/10"),
        ("bytes=7-", 206, b"789", "bytes 7-9/10"),
        ("bytes=-2", 206, b"89", "bytes 8-9/10"),
        ("bytes=8-99", 206, b"89", "bytes 8-9/10"),
        ("bytes=10-12", 416, b"", "bytes */10"),
        ("bytes=5-2", 416, b"", "bytes */10"),
        ("bytes=-", 416, b"", "bytes */10"),
        ("lines=1-2", 416, b"", "bytes */10"),
        ("bytes=" + "9" * 5000 + "-", 416, b"", "bytes */10"),
        ("bytes=2-" + "9" * 30, 206, b"23456789", "bytes 2-9/10"),
        ("bytes=0-1,3-4", 416, b"", "bytes */10"),
        ("bytes= 1-2", 416, b"", "bytes */10"),
        ("bytes=-0", 416, b"", "bytes */10"),
        ("\xb2", 416, b"", "bytes */10"),
    ],
)
def test_ranges(asked: str, status: int, body: bytes, content_range: str | None, served: PageServer) -> None:
    headers = {"range": asked} if asked else {}
    found, text, answered = ask(served, "/plan/model.safetensors", **headers)
    assert (found, text, answered.get("Content-Range")) == (status, body, content_range)
    assert answered["Content-Length"] == str(len(body))


def test_the_page_is_served(served: PageServer) -> None:
    types = {"index.html": "text/html", "app.js": "text/javascript", "style.css": "text/css"}
    for name, kind in types.items():
        status, body, headers = ask(served, f"/{name}")
        assert (status, body) == (200, (PAGE / name).read_bytes())
        assert headers["Content-Type"].startswith(kind)
    assert ask(served, "/")[1] == (PAGE / "index.html").read_bytes()
    status, body, headers = ask(served, "/app.js", method="HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["Content-Length"]) == (PAGE / "app.js").stat().st_size


def test_a_port_in_use_is_said(served: PageServer) -> None:
    with pytest.raises(TuneBenchError, match="--port"):
        PageServer(PAGE, int(served.url.rstrip("/").rpartition(":")[2]))
