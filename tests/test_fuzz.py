"""Every reader of files, options and answers takes damaged ones: it accepts, or says in a line what is wrong.

A reader is one entry of `READERS`: what it reads undamaged, and how. Some inputs of each are tried always, and more
than 20,000 with `-m slow`; none may raise anything but a TuneBenchError, wait, or take half a gigabyte.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
from conftest import LLAMA, load_model, write_config
from gguf import GGMLQuantizationType, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save
from test_results import ROW, TUNE
from tvm.rpc import base

from tunebench import registry, results
from tunebench.cli import options
from tunebench.engines.browser import engine as browser_engine
from tunebench.engines.browser import export as browser_export
from tunebench.engines.browser.server import PageServer
from tunebench.errors import NOT_TEXT, TuneBenchError
from tunebench.model import quantization, sources, weights
from tunebench.model import workload as workloads
from tunebench.model.workload import Model
from tunebench.report import llama_bench, write_report
from tunebench.runners.rpc.tracker import Tracker
from tunebench.runtime import plan as plans
from tunebench.runtime.plan import Buffer, Facts, Launch, Plan, Shader, Step
from tunebench.spec import Workload
from tunebench.tuning import cost_model, records, vetting
from tunebench.tuning.database import PROVENANCE, VERDICTS, Database, Provenance
from tunebench.tuning.lock import _described
from tunebench.tuning.records import FILES, RECORDS, WORKLOADS

MEMORY_BYTES = 1 << 29  # more than any reader may take
PATIENCE_S = 60  # for one input of a few kilobytes: far more than any takes
FEW, MANY = 60, 1500  # inputs for each reader

BENCHED: dict[str, Any] = {
    "build_commit": "8cf427ff",
    "build_number": 5163,
    "cpu_info": "AMD Ryzen 7 7800X3D 8-Core Processor",
    "gpu_info": "NVIDIA GeForce RTX 4080",
    "backends": "CUDA",
    "model_filename": "models/Qwen2.5-7B-Instruct-Q4_K_M.gguf",
    "model_type": "qwen2 7B Q4_K - Medium",
    "model_size": 4677120000,
    "model_n_params": 7615616512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_threads": 8,
    "cpu_mask": "0x0",
    "cpu_strict": False,
    "type_k": "f16",
    "type_v": "f16",
    "n_gpu_layers": -1,
    "flash_attn": -1,
    "tensor_split": "0.00",
    "n_prompt": 512,
    "n_gen": 0,
    "n_depth": 0,
    "test_time": "2025-04-24T11:58:50Z",
    "avg_ns": 72135640,
    "stddev_ns": 1453752,
    "avg_ts": 7100.002165,
    "stddev_ts": 140.34152,
    "samples_ns": [74601900, 71632900, 71745200],
    "samples_ts": [6863.1, 7147.55, 7136.37],
}
WITHOUT_SAMPLES = {name: value for name, value in BENCHED.items() if not name.startswith("samples")}
CSV = ",".join(WITHOUT_SAMPLES) + "\n" + ",".join(f'"{value}"' for value in WITHOUT_SAMPLES.values()) + "\n"
MARKDOWN = """ggml_cuda_init: found 1 CUDA devices:
| model                  |       size |     params | backend    | ngl | n_ubatch | fa |   test |              t/s |
| ---------------------- | ---------: | ---------: | ---------- | --: | -------: | -: | -----: | ---------------: |
| qwen2 7B Q4_K - Medium |   4.36 GiB |     7.62 B | CUDA       |  99 |      512 |  1 |  pp512 |  2368.80 ± 93.24 |
| qwen2 7B Q4_K - Medium |   4.36 GiB |     7.62 B | CUDA       |  99 |      512 |  1 |  tg128 |    131.42 ± 0.59 |

build: 8cf427ff (5163)
"""
PLAN = Plan(
    "wgsl",
    Facts("tiny", "q0f32", 1, 32, (16,), 128),
    (Buffer("w", 64, "weight", (4, 4), "float32"), Buffer("logits", 512, "output")),
    {"add": Shader("main", "fn main() {}", (1, 1, 1), (False, True))},
    {1: Step((Launch("add", (0, 1), (1, 1, 1)),), 1)},
)
ADAPTER = {"name": "llvmpipe", "software": True, "browser": "Chromium", "lanes": 8, "features": ["subgroups"]}
ODD = (
    *(None, True, -1, 0, 0.5, 2**31, 2**62, 2**63, 10**30, 1e308, -1e308, 5e-324, float("nan"), float("inf")),
    *("", "0", "x" * 100_000, "\ud800", "\x00", "\x1b[31mred\x1b[0m", "\u202egnp", "../../../etc/passwd", "/dev/zero"),
    *("$\\frac$", "=1+1", "<b>|`*_[x](y)", "a\nb\rc", [], {}, [[]], {"": {}}, [1] * 2000, ["x"], {"model": 1}),
    *("@deep@", "@digits@", "@exponent@"),
)
"""In place of a value; the last ones stand for what Python would not write."""
PIECES = (
    b"",
    b"\0",
    b"\n",
    b"}{",
    b'"',
    b"[" * 50_000,
    b"9" * 5000,
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b",",
    b"-",
    b"NaN",
    b"|",
)


@dataclass(frozen=True)
class Reader:
    """What reads `seed`, damaged; `read` gets the path of a file in a folder of its own."""

    name: str
    seed: bytes
    read: Callable[[Path], object]
    file: str = "input"
    share: float = 1.0  # of the inputs; less for a reader that is slow


def swapped(draw: st.DrawFn, text: str) -> str:
    """JSON with one of its values swapped for an odd one."""
    root = [json.loads(text)]
    places: list[tuple[Any, Any]] = []
    left: list[Any] = [root]
    while left:
        value = left.pop()
        names = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        places += [(value, name) for name in names]
        left += [value[name] for name in names]
    holder, name = draw(st.sampled_from(places))
    holder[name] = draw(st.sampled_from(ODD))
    text = json.dumps(root[0])
    for word, stands_for in (("deep", "[" * 50_000 + "]" * 50_000), ("digits", "9" * 5000), ("exponent", "1e400")):
        text = text.replace(f'"@{word}@"', stands_for)
    return text


@st.composite
def damaged(draw: st.DrawFn, seed: bytes) -> bytes:
    """Odd values in its JSON, if it has any; bits that are flipped, slices that are cut, doubled or put in."""
    lines = seed.decode(errors="replace").split("\n")
    jsons = [index for index, line in enumerate(lines) if line.startswith(("{", "["))]
    data = seed
    if jsons and draw(st.booleans()):
        index = draw(st.sampled_from(jsons))
        lines[index] = swapped(draw, lines[index])
        data = "\n".join(lines).encode(errors="surrogatepass")
    for _ in range(draw(st.integers(int(data == seed), 3))):
        data = hurt(draw, data)
    return data


def hurt(draw: st.DrawFn, data: bytes) -> bytes:
    """One place is."""
    at = draw(st.integers(0, max(0, len(data) - 1)))
    end = min(len(data), at + draw(st.sampled_from((1, 2, 7, 40, 1000))))
    how = draw(st.sampled_from(("flip", "cut", "delete", "double", "put", "replace")))
    piece = draw(st.sampled_from(PIECES))
    if how == "flip":
        return data[:at] + bytes(byte ^ (1 << draw(st.integers(0, 7))) for byte in data[at : at + 1]) + data[at + 1 :]
    kept = {"cut": b"", "delete": data[end:], "double": data[at:end] + data[at:], "put": piece + data[at:]}
    return data[:at] + kept.get(how, piece + data[end:])


def read_results(path: Path) -> None:
    """What is read can be written, and then is read again."""
    rows, warnings = results.read(path)
    assert not any(NOT_TEXT.search(warning) or "\n" in warning for warning in warnings)
    for row in rows:
        results.check(row)


def read_llama_bench(path: Path) -> None:
    """As `import` does."""
    rows = llama_bench.read(path)
    copy = path.with_name("results.jsonl")
    copy.unlink(missing_ok=True)
    results.append(copy, *rows)
    assert results.read(copy) == (rows, [])


def read_config(path: Path) -> None:
    """As every command with a model does."""
    workloads.load_model(Workload(str(path), quantization.schemes()["q4f16_1"], chunks=(16,), context=128))


def read_options(path: Path) -> None:
    """The words that options take."""
    words = path.read_bytes().decode(errors="surrogateescape")
    for option in words.split("\n"):
        for function in (lambda text: options.numbers(text, "-p"), options.seconds, options.phases, Tracker):
            with contextlib.suppress(TuneBenchError):
                function(option)
        with contextlib.suppress(TuneBenchError):
            options.tests(option, option, "0", 1 << 20)
        with contextlib.suppress(TuneBenchError):
            registry.pick({"llvm": 1}, option, "target")
    options.schedules([words])


def tiny_model() -> Model:
    """With few and small weights."""
    with tempfile.TemporaryDirectory() as folder:
        return load_model(write_config(Path(folder), num_hidden_layers=1, vocab_size=64), "q4f16_1")


TINY = tiny_model()


def tiny_weights() -> bytes:
    """Of that model, as safetensors."""
    shapes = {name: (vector.length,) for name, vector in TINY.vectors.items()}
    for matrix in TINY.matrices.values():
        shapes |= dict.fromkeys(matrix.sources, (matrix.n if len(matrix.sources) == 1 else 0, matrix.k))
    rows = {"q_proj": 64, "k_proj": 32, "v_proj": 32, "gate_proj": 96, "up_proj": 96}
    sized = {name: (rows[name.split(".")[-2]], *shape[1:]) if not shape[0] else shape for name, shape in shapes.items()}
    return save({name: np.full(shape, 0.5, np.float16) for name, shape in sized.items()})


def read_weights(path: Path) -> None:
    """Every parameter of the tiny model."""
    for _, array in weights.read(TINY, sources.open_weights(path.parent)):
        assert array.dtype.kind in "iu" or np.isfinite(array).all()


def read_gguf(path: Path) -> None:
    """Every parameter of whatever model it says, and its tokenizer."""
    checkpoint = sources.find(str(path)).open()
    assert checkpoint
    for name, tensor in checkpoint.tensors.items():
        checkpoint.floats(name, 0, tensor.shape[0])
    checkpoint.tokenizer()


def small_gguf() -> bytes:
    """A llama with a layer of one matrix, and a tokenizer of five tokens."""
    with tempfile.TemporaryDirectory() as folder:
        writer = GGUFWriter(Path(folder) / "it.gguf", "llama")
        writer.add_block_count(1)
        writer.add_embedding_length(32)
        writer.add_head_count(2)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(["a", "b", "c", "ab", "<s>"])
        writer.add_token_types([1, 1, 1, 1, 3])
        writer.add_token_merges(["a b"])
        writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
        writer.add_tensor("blk.0.attn_q.weight", np.zeros((4, 18), np.uint8), raw_dtype=GGMLQuantizationType.Q4_0)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return (Path(folder) / "it.gguf").read_bytes()


def read_index(path: Path) -> None:
    """Beside good weights, with a file outside."""
    (path.parent / "model.safetensors").write_bytes(tiny_weights())
    read_weights(path)


def read_plan(path: Path) -> None:
    """As `browse` does."""
    plans.write(PLAN, path.parent / "other")
    (path.parent / "shaders").mkdir(exist_ok=True)
    (path.parent / "shaders" / "add.wgsl").write_text("fn main() {}")
    (path.parent / "model.safetensors").touch()
    browser_export.check(path.parent)


def plan_text() -> bytes:
    """The plan as it is written."""
    with tempfile.TemporaryDirectory() as folder:
        plans.write(PLAN, Path(folder))
        return (Path(folder) / "plan.json").read_bytes()


def read_facts(path: Path) -> None:
    """What a page says, as Playwright hands it over."""
    try:
        answer = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return
    facts = browser_engine.read_facts(Page(answer))  # type: ignore[arg-type]
    assert set(facts) == {*ADAPTER, "limits"}


@dataclass(frozen=True)
class Page:
    """A page that answers with the same to every question."""

    answer: object

    def evaluate(self, code: str, given: object) -> object:
        return self.answer


def ask_server(path: Path) -> None:
    """A request, all of it; the server answers, or hangs up."""
    with serving() as (server, errors):
        address = server.url.split("/")[2]
        request = path.read_bytes().replace(b"HOST", address.encode())
        answer = exchange(address, request)
        assert errors == []
        assert b"secret" not in answer


@contextlib.contextmanager
def serving() -> Iterator[tuple[PageServer, list[object]]]:
    """A page server, and what went wrong in it."""
    errors: list[object] = []
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(socketserver.BaseServer, "handle_error", lambda *given: errors.append(sys.exc_info()))
        (Path(folder) / "plan").mkdir()
        (Path(folder) / "secret").write_text("secret")
        (Path(folder) / "plan" / "file").write_text("0123456789")
        with PageServer(Path(folder) / "plan") as server:
            yield server, errors


def exchange(address: str, request: bytes) -> bytes:
    """What is answered until the end of the connection."""
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), PATIENCE_S) as sock, contextlib.suppress(ConnectionError):
        sock.sendall(request)
        sock.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: sock.recv(1 << 16), b""))
    return b""


def ask_tracker(path: Path) -> None:
    """A tracker that answers with whatever the file holds."""
    data = path.read_bytes()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            sock, _ = server.accept()
            with sock, contextlib.suppress(OSError):
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(1 << 16):
                    pass

        threading.Thread(target=answer, daemon=True).start()
        Tracker(f"127.0.0.1:{server.getsockname()[1]}").devices("pi")


def tracker_answer() -> bytes:
    """Of a tracker with one device."""
    summary = {"queue_info": {}, "server_info": [{"key": "server:pi", "addr": ["127.0.0.1", 9090]}]}
    text = json.dumps([base.TrackerCode.SUCCESS, summary]).encode()
    return struct.pack("<ii", base.RPC_TRACKER_MAGIC, len(text)) + text


def rows_text() -> bytes:
    """Three rows as they are written."""
    with tempfile.TemporaryDirectory() as folder:
        results.append(Path(folder) / "results.jsonl", ROW, TUNE, ROW)
        return (Path(folder) / "results.jsonl").read_bytes()


def small_database() -> dict[str, bytes]:
    """The files of a database that comes with TuneBench, of its kernels with the shortest texts."""
    files = {path.name: path.read_bytes() for path in DATABASE.glob("*.json")}
    files[PROVENANCE] = json.dumps(json.loads(files[PROVENANCE])).encode()
    kernels, trials = (files[name].splitlines() for name in FILES)
    fewest = sorted(range(len(kernels)), key=lambda place: len(kernels[place]))[:KERNELS]
    found = {place: [json.loads(line) for line in trials if json.loads(line)[0] == place] for place in fewest}
    files[WORKLOADS] = records.text(kernels[place] for place in fewest)
    files[RECORDS] = records.text(
        json.dumps([place, each]).encode() for place, of in enumerate(found.values()) for _, each in of[:2]
    )
    verdicts = json.loads(files[VERDICTS])
    files[VERDICTS] = json.dumps(dict(list(verdicts.items())[:KERNELS])).encode()
    return files


def read_database(path: Path) -> None:
    """A database with one of its files damaged, as `bench` does and then `tune`, which sets aside what is no good."""
    folder = path.with_name("database")
    shutil.rmtree(folder, ignore_errors=True)
    search = folder / "search"
    search.mkdir(parents=True)
    for name, data in SMALL.items():
        (folder / name).write_bytes(data)
    for name in FILES:
        (search / name).write_bytes(SMALL[name])
    for place in (folder, search) if path.name in FILES else (folder,):
        shutil.copyfile(path, place / path.name)
    made = msgspec.json.decode(SMALL[PROVENANCE], type=Provenance)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(path.parent / "cache"))
        patch.setattr(subprocess, "run", in_a_fork)
        database = Database(folder, made)
        database.promoted()
        said = database.warnings
        database.open_for_writing()
        said += database.warnings
        database.close()
        assert not any(NOT_TEXT.search(words) or "\n" in words or len(words) > 5000 for words in said)
        again = Database(folder, made)
        assert set(again.promoted()) == set(database.promoted())
        assert again.entries == database.entries
        again.open_for_writing()
        again.close()
        assert again.warnings == []


def in_a_fork(command: list[str], input: bytes, timeout: float, **given: Any) -> subprocess.CompletedProcess[bytes]:
    """What checks records in another process, without the seconds that a new one takes to import TVM."""
    assert "vetting.main()" in command[-1]
    with tempfile.TemporaryFile() as asked, tempfile.TemporaryFile() as said:
        asked.write(input)
        asked.seek(0)
        child = os.fork()
        if not child:
            answer(asked.fileno(), said.fileno())
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        return subprocess.CompletedProcess(command, code, said.read())


def answer(asked: int, said: int) -> None:
    """In that process; it does not return."""
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(PATIENCE_S)
        for file, place in ((asked, 0), (said, 1), (os.open(os.devnull, os.O_WRONLY), 2)):
            os.dup2(file, place)
        sys.stdin = open(0)  # noqa: SIM115
        vetting.main()
        os._exit(0)
    finally:
        os._exit(1)


def read_cost_model(path: Path) -> None:
    """As `tune` does."""
    cost_model.load(path, of_decisions=True)


def learned() -> bytes:
    """What is kept of a few samples."""
    rows = [(7, sample, 0.5 + sample, np.full(cost_model.FEATURES, sample)) for sample in range(3)]
    file = io.BytesIO()
    np.save(file, np.array(rows, cost_model._row(cost_model.FEATURES)))
    return file.getvalue()


def read_lock(path: Path) -> None:
    """As a second run does, of what the first wrote down."""
    words = _described(path.read_bytes())
    raise TuneBenchError(f"{path} is being written by {words}.")


def read_note(path: Path) -> None:
    """As a run does, of what an earlier one knew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vetting, "_note", lambda home: path)
        assert not vetting.is_known(records.Lines(path.parent, digests={WORKLOADS: (1, "1")}), path.parent)


KERNELS = 2
SLOW_SHARE = 0.2
DATABASE = Path(__file__).parent.parent / "tuning_logs/llvm-amd-epyc-znver5-2t"
SMALL = small_database()
HOLDER = b'{"pid": 1, "host": "here", "since": "2026-01-01T00:00:00+00:00", "command": "tunebench tune"}'
NOTE = json.dumps({name: [4, "0" * 64] for name in FILES}).encode()
REQUEST = b"GET /plan/file?x=1 HTTP/1.1\r\nHost: HOST\r\nRange: bytes=2-5\r\nAccept: */*\r\n\r\n"
INDEX = json.dumps({"metadata": {}, "weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}).encode()
YARN = {"type": "yarn", "factor": 4.0, "beta_fast": 32, "mscale": 1.0, "original_max_position_embeddings": 64}
LONG = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
TWO_KINDS = {
    "model_type": "gemma3",
    "text_config": {
        **LLAMA,
        "model_type": "gemma3_text",
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"full_attention": LONG, "sliding_attention": {"rope_theta": 1e4}},
    },
}
OPTIONS = b"128,512\n90s\nboth\n0\nllvm\n1.5h\n192.168.1.2:9190"
READERS = (
    Reader("results", rows_text(), read_results),
    Reader("llama-bench json", json.dumps([BENCHED, BENCHED]).encode(), read_llama_bench),
    Reader("llama-bench json, lines of a log", f"loading\n{json.dumps([BENCHED])}\nend\n".encode(), read_llama_bench),
    Reader("llama-bench jsonl", (json.dumps(BENCHED) + "\n").encode() * 2, read_llama_bench),
    Reader("llama-bench csv", CSV.encode(), read_llama_bench),
    Reader("llama-bench md", MARKDOWN.encode(), read_llama_bench),
    Reader("llama-bench utf-16", (json.dumps(BENCHED) + "\n").encode("utf-16"), read_llama_bench),
    Reader("config", json.dumps(LLAMA).encode(), read_config, "config.json"),
    Reader("config of layers of two kinds", json.dumps(TWO_KINDS).encode(), read_config, "config.json"),
    Reader(
        "config of a long context", json.dumps({**LLAMA, "rope_scaling": YARN}).encode(), read_config, "config.json"
    ),
    Reader("options", OPTIONS, read_options),
    Reader("safetensors", tiny_weights(), read_weights, "model.safetensors"),
    Reader("gguf", small_gguf(), read_gguf, "it.gguf"),
    Reader("safetensors index", INDEX, read_index, "model.safetensors.index.json"),
    Reader("plan", plan_text(), read_plan, "plan.json"),
    Reader("page", json.dumps({"value": {**ADAPTER, "limits": {"maxBufferSize": 1 << 30}}}).encode(), read_facts),
    Reader("request", REQUEST, ask_server),
    Reader("tracker", tracker_answer(), ask_tracker),
    *(Reader(name, data, read_database, name, SLOW_SHARE) for name, data in SMALL.items()),
    Reader("cost model", learned(), read_cost_model, "cost_model.npy"),
    Reader("lock", HOLDER, read_lock),
    Reader("note", NOTE, read_note),
)
EACH = [pytest.param(reader, id=reader.name) for reader in READERS]


@pytest.fixture
def bounded() -> Iterator[None]:
    """Half a gigabyte more than this process has, and no more; no input may take a minute."""

    def late(number: int, frame: object) -> None:
        raise AssertionError(f"an input took more than {PATIENCE_S} s")

    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + MEMORY_BYTES, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def survives(reader: Reader, data: bytes, folder: Path) -> None:
    """The reader accepts the input, or refuses it in one line that a terminal may show."""
    (folder / reader.file).write_bytes(data)
    signal.alarm(PATIENCE_S)
    said = ""
    try:
        reader.read(folder / reader.file)
    except TuneBenchError as error:
        said = str(error)
    finally:
        signal.alarm(0)
    assert "\n" not in said
    assert len(said) < 5000
    assert not NOT_TEXT.search(said)


def fuzz(reader: Reader, folder: Path, count: int) -> None:
    """So many damaged inputs, the same ones each time; `pytest -rP` shows how many each reader got."""
    tried = 0

    @settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(damaged(reader.seed))
    def run(data: bytes) -> None:
        nonlocal tried
        tried += 1
        survives(reader, data, folder)

    run()
    print(f"{reader.name}: {tried} inputs")
    assert tried >= count


@pytest.mark.parametrize("reader", EACH)
def test_what_is_whole_is_accepted(reader: Reader, tmp_path: Path) -> None:
    (tmp_path / reader.file).write_bytes(reader.seed)
    with contextlib.suppress(TuneBenchError) if reader.name in ("options", "lock") else contextlib.nullcontext():
        reader.read(tmp_path / reader.file)


@pytest.mark.parametrize("reader", EACH)
def test_what_is_damaged_is_refused_in_a_line(reader: Reader, tmp_path: Path, bounded: None) -> None:
    fuzz(reader, tmp_path, round(FEW * reader.share))


@pytest.mark.slow
@pytest.mark.parametrize("reader", EACH)
def test_whatever_is_damaged_is_refused_in_a_line(reader: Reader, tmp_path: Path, bounded: None) -> None:
    fuzz(reader, tmp_path, round(MANY * reader.share))


def read_report(path: Path) -> None:
    """The whole report of a damaged row among whole ones."""
    write_report([path], path.parent / "report")


@pytest.mark.slow
def test_no_row_that_is_read_stops_a_report(tmp_path: Path, bounded: None) -> None:
    fuzz(Reader("report", rows_text(), read_report), tmp_path, 150)
