"""Trials over RPC on loopback: devices that die, hang, lie or differ cost a trial each, and what is wrong is said."""

from __future__ import annotations

import faulthandler
import math
import multiprocessing
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
import tvm
import tvm_ffi
from conftest import input_of, load_model, lower, why
from test_cli import run as run_command
from test_runner import ONCE, kernel
from tvm.rpc import server, tracker

from tunebench.cli import inputs
from tunebench.compile import passes
from tunebench.devices.rpc import RpcDevice
from tunebench.devices.targets import presets
from tunebench.errors import TuneBenchError, brief
from tunebench.runners.base import Candidate, NotBuilt, Outcome, Timed, Trial, Wrong
from tunebench.runners.bench import count_sets
from tunebench.runners.rpc import client as rpc_client
from tunebench.runners.rpc import device as rpc_device
from tunebench.runners.rpc import library as rpc_library
from tunebench.runners.rpc import runner as rpc_runner
from tunebench.runners.rpc import tracker as tracker_client
from tunebench.runners.rpc.client import disagreement
from tunebench.runners.rpc.device import Lost
from tunebench.runners.rpc.runner import RpcRunner
from tunebench.runners.rpc.tracker import Tracker
from tunebench.tuning.database import Database
from tunebench.tuning.search import Trials
from tunebench.tuning.search_log import SearchLog
from tunebench.tuning.session import Session
from tunebench.tuning.tuner import Options, Progress, tune

pytestmark = pytest.mark.xdist_group("timing")

GIVEN = input_of("double", kernel("good"))
TRIAL = Trial(GIVEN, ONCE, 10**8)
resource = pytest.importorskip("resource", reason="servers are forked")

HERE = "127.0.0.1"
CLIENTS = 48
WAIT_S = 60.0  # for what must come, on a machine that is busy

Change = Callable[[], None]
Clock = Callable[[int, list[float]], list[float]]
"""What a server answers where it measured those seconds, at its how manieth measurement of a session."""


def clock(answer: Clock) -> Change:
    """A change of a server: how it measures time."""

    def change() -> None:
        true = tvm_ffi.get_global_func("runtime.RPCTimeEvaluator")
        count = 0

        def evaluator(*arguments: object) -> object:
            timer = true(*arguments)

            def timed(*tensors: object) -> bytes:
                nonlocal count
                count += 1
                found = bytes(timer(*tensors))
                layout = f"@{len(found) // 8}d"
                return bytearray(struct.pack(layout, *answer(count, list(struct.unpack(layout, found)))))

            return timed

        tvm_ffi.register_global_func("runtime.RPCTimeEvaluator", evaluator, override=True)

    return change


def patient(count: int, seconds: list[float]) -> list[float]:
    """A board that takes its time over each measurement."""
    time.sleep(0.2)
    return seconds


def _serve(pipe: multiprocessing.connection.Connection, tracker_port: int, key: str, change: Change | None) -> None:
    """A process with one server, as `python -m tvm.exec.rpc_server` makes it, without the start-up."""
    threading.excepthook = lambda failure: None  # pytest's would keep the connection of a server that failed
    faulthandler.disable()
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)  # no long account of a crash that is meant
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if change:
        change()
    made = server.PopenRPCServerState(HERE, 9700, 9790, False, (HERE, tracker_port), key, silent=True)
    pipe.send(made.port)
    threading.Event().wait()


def _track(pipe: multiprocessing.connection.Connection) -> None:
    pipe.send(tracker.PopenTrackerServerState(HERE, 9600, 9690, silent=True).port)
    threading.Event().wait()


def _fork(target: Callable[..., None], *arguments: object) -> tuple[psutil.Process, int]:
    """A process that runs that, and what it sends."""
    mine, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=target, args=(theirs, *arguments))
    process.start()
    assert mine.poll(WAIT_S)
    return psutil.Process(process.pid), mine.recv()


@dataclass
class Rack:
    """A tracker, and servers by name, each under a key."""

    port: int
    servers: dict[str, psutil.Process] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return f"{HERE}:{self.port}"

    def add(self, key: str, change: Change | None = None) -> str:
        """One more device; its name."""
        process, port = _fork(_serve, self.port, key, change)
        name = f"{HERE}:{port}"
        self.servers[name] = process
        until(lambda: name in Tracker(self.address).devices(key))
        return name

    def signal(self, name: str, number: int) -> None:
        """To a server and the process of its session."""
        process = self.servers[name]
        for each in [process, *process.children(recursive=True)]:
            each.send_signal(number)


def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds."""
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        try:
            if holds():
                return
        except TuneBenchError:
            pass
        time.sleep(0.05)
    raise AssertionError("it did not come")


@pytest.fixture(scope="module")
def rack() -> Iterator[Rack]:
    Forked.made = [Forked() for _ in range(CLIENTS)]
    process, port = _fork(_track)
    made = Rack(port)
    until(lambda: bool(Tracker(made.address)._summary() == []))
    yield made
    for client in Forked.made:
        client.kill()
    for each in [*made.servers.values(), process]:
        if each.is_running():
            for one in [*each.children(recursive=True), each]:
                one.kill()


class Forked:
    """Stands for `client.Client`: a process of this one's, which need not start and import."""

    made: ClassVar[list[Forked]] = []

    def __init__(self) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("fork").Process(target=_obey, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, timeout_s: float, function: Callable[..., Any], *args: object) -> Any:
        """As a `Client` does."""
        try:
            self._pipe.send((function, args))
            if not self._pipe.poll(timeout_s):
                raise Lost("no answer")
            answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise Lost(brief(error)) from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def stop(self) -> None:
        """At once."""
        self._process.kill()

    kill = stop


def _obey(pipe: multiprocessing.connection.Connection) -> None:
    while True:
        function, args = pipe.recv()
        try:
            answer = function(*args)
        except Lost as error:
            answer = error
        except Exception as error:
            answer = RuntimeError(str(error))
        pipe.send(answer)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds in this process, and clients that were forked before it had threads."""
    monkeypatch.setattr(rpc_runner, "Pool", lambda max_workers, timeout: ThreadPoolExecutor(max_workers))
    for module in (rpc_runner, rpc_client):
        monkeypatch.setattr(module, "Client", lambda: Forked.made.pop())


@pytest.fixture(scope="module")
def pair(rack: Rack) -> list[str]:
    """Two good devices of the key `pair`."""
    return [rack.add("pair"), rack.add("pair")]


@pytest.fixture
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds where a board gets minutes."""
    monkeypatch.setattr(rpc_runner, "RUN_TIMEOUT_S", 2.0)
    monkeypatch.setattr(rpc_runner, "SET_UP_TIMEOUT_S", 5.0)
    monkeypatch.setattr(rpc_runner, "SESSION_S", 9.0)
    monkeypatch.setattr(rpc_runner, "CONNECT_TIMEOUT_S", 5.0)
    monkeypatch.setattr(rpc_runner, "GONE_S", 2.0)


@contextmanager
def running(rack: Rack, key: str, said: list[str] | None = None) -> Iterator[RpcRunner]:
    """A runner on the devices of a key."""
    target = passes.tvm_target(presets()["llvm"], 1)
    runner = RpcRunner(target, 1, 1, rack.address, key, "ll", "", (said if said is not None else []).append)
    try:
        yield runner
    finally:
        runner.close()


def begin(runner: RpcRunner, kinds: list[str], trial: Trial = TRIAL) -> list[str]:
    """Queue kernels, all at once; their names."""
    names = [f"{i} {kind}" for i, kind in enumerate(kinds)]
    assert runner.build(trial, [Candidate(name, kernel(name.split()[1])) for name in names]) == {}
    return names


def finish(runner: RpcRunner, names: list[str]) -> list[Outcome]:
    """What became of them."""
    return [runner.time(TRIAL, name) for name in names]


def test_right_kernels_are_timed_and_wrong_ones_rejected(quick: None, rack: Rack, pair: list[str]) -> None:
    with running(rack, "pair") as runner:
        kinds = ["good", "wrong", "nan", "silent", "missing", "good", "good"]
        found = finish(runner, begin(runner, kinds))
        until(lambda: set(runner.probe_ns) == set(pair))
    for kind, outcome in zip(kinds, found, strict=True):
        if kind == "good":
            assert isinstance(outcome, Timed)
            assert len(outcome.samples_ns) == ONCE.samples
            assert min(outcome.samples_ns) > 0
        else:
            assert isinstance(outcome, NotBuilt if kind == "missing" else Wrong)


def test_input_sets_rotate_on_the_device(quick: None, rack: Rack, pair: list[str]) -> None:
    given = replace(GIVEN, name="cold", cold_bytes=3 * 2 * 64 * 4)
    assert count_sets(given, 1 << 30) == 3
    with running(rack, "pair") as runner:
        names = begin(runner, ["good", "wrong"], replace(TRIAL, given=given))
        good, wrong = (runner.time(replace(TRIAL, given=given), name) for name in names)
        slow = replace(TRIAL, given=given, limit_ns=0)
        (once,) = (runner.time(slow, name) for name in begin(runner, ["good"], slow))
        default = runner.prepare(given, ONCE)
    assert [len(each.samples_ns) for each in (once, default) if isinstance(each, Timed)] == [1, ONCE.samples]
    assert isinstance(good, Timed)
    assert isinstance(wrong, Wrong)


def test_step_calls_each_set_in_turn() -> None:
    mod = tvm.IRModule({"main": kernel("good")["main"], "step": rpc_library.step(2, 3)})
    library = tvm.compile(mod, target="llvm").mod
    turn = tvm.runtime.empty((1,), "int32").copyfrom([0])
    tensors = [tvm.runtime.empty((64,), "float32").copyfrom([float(i)] * 64) for i in range(6)]
    seen = []
    for _ in range(4):
        library["step"](turn, *tensors)
        seen.append([tensors[i].numpy()[0] == 2 * tensors[i - 1].numpy()[0] for i in (1, 3, 5)])
    first = seen[0].index(True) if True in seen[0] else 0
    assert seen[2] == seen[3] == [True, True, True]
    assert seen[0].count(True) < seen[1].count(True) < 3
    assert first != 0


def test_all_arms_of_a_comparison_are_on_one_device(quick: None, rack: Rack) -> None:
    """One of the two devices says a thousand times what it measured: no arm may come from the other."""
    slow = rack.add("uneven", clock(lambda count, seconds: [1000 * each for each in seconds]))
    fast = rack.add("uneven")
    said: list[str] = []
    with running(rack, "uneven", said) as runner:
        until(lambda: len(runner.probe_ns) == 2)
        for _ in range(2):
            arms = [Candidate("same", kernel("good")), Candidate("off", kernel("wrong"))]
            found = runner.compare(GIVEN, arms, ONCE)
            assert isinstance(found["off"], Wrong)
            times = [ns for each in found.values() if isinstance(each, Timed) for ns in each.samples_ns]
            assert set(found) == {"same", "off", "default"}
            assert max(times) < 300 * min(times)
        words = runner.disagreement()
    assert said == [words]
    assert slow in words.split(" takes ")[0]
    assert fast in words.split(" takes ")[1]


@pytest.mark.parametrize(
    ("probe_ns", "differ"),
    [({}, False), ({"a": 1.0}, False), ({"a": 1.0, "b": 1.2}, False), ({"a": 1.3, "b": 1.0}, True)],
)
def test_a_difference_in_the_probe_is_in_words(probe_ns: dict[str, float], differ: bool) -> None:
    words = disagreement("rpi4", probe_ns)
    assert bool(words) == differ
    assert not differ or ("'rpi4'" in words and "1.30x" in words)


def test_times_that_cannot_be_cost_their_trial_only(quick: None, rack: Rack) -> None:
    """After the probe: not a number, nothing, negative, then what is true."""
    lies = {2: math.nan, 3: 0.0, 4: -1.0}
    rack.add("liar", clock(lambda count, seconds: [lies.get(count, each) for each in seconds]))
    with running(rack, "liar") as runner:
        *lied, true = finish(runner, begin(runner, ["good"] * 4))
        assert runner.lost == []
    assert [why(each).count("returned a time of") for each in lied] == [1, 1, 1]
    assert isinstance(true, Timed)


def test_a_run_survives_a_device_that_dies_and_one_that_hangs(
    quick: None, rack: Rack, brisk: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc_runner, "SESSION_S", 120.0)  # no session ends by itself
    dies, hangs, stays = (rack.add("mixed", clock(patient)) for _ in range(3))
    said: list[str] = []
    with running(rack, "mixed", said) as runner:
        names = begin(runner, ["good", "wrong"] * 8)
        until(lambda: set(runner._busy) == {dies, hangs, stays} and len(runner.probe_ns) == 3)
        rack.signal(dies, signal.SIGKILL)
        rack.signal(hangs, signal.SIGSTOP)
        found = finish(runner, names)
        assert [type(each) for each in found] == [Timed, Wrong] * 8
        assert all(isinstance(each, Timed) and len(each.samples_ns) == 2 for each in found[::2])
        until(lambda: any(dies in line for line in runner.lost) and any(hangs in line for line in runner.lost))
        assert said == runner.lost
        rack.signal(hangs, signal.SIGCONT)
        until(lambda: hangs not in runner._hung)
        assert set(runner._hung) == {dies}


def test_a_candidate_that_hangs_two_devices_is_at_fault_and_they_come_back(
    quick: None, rack: Rack, pair: list[str], brisk: None
) -> None:
    with running(rack, "pair") as runner:
        until(lambda: len(runner.probe_ns) == 2)
        (endless,) = finish(runner, begin(runner, ["endless"]))
        (good,) = finish(runner, begin(runner, ["good"]))
        assert "devices were lost" in why(endless)
        assert isinstance(good, Timed)  # though no device was there for longer than a trial may take
        assert runner.queued_s > 0
        assert len(runner.lost) == 2


def test_a_candidate_that_kills_every_device_ends_the_run_in_words(quick: None, rack: Rack, brisk: None) -> None:
    rack.add("deadly"), rack.add("deadly")
    with running(rack, "deadly") as runner:
        until(lambda: len(runner.probe_ns) == 2)
        (deadly,) = finish(runner, begin(runner, ["deadly"]))
        assert "devices were lost" in why(deadly)
        with pytest.raises(TuneBenchError, match="no device of key 'deadly'"):
            finish(runner, begin(runner, ["good"]))


def test_a_device_that_somebody_else_has_is_waited_for(quick: None, rack: Rack, brisk: None) -> None:
    """For longer than a trial or a run without devices may take."""
    rack.add("shared")
    other = Tracker(rack.address)
    grant = other.request("shared")
    theirs = tvm.rpc.connect(grant.host, grant.port, grant.match_key)
    with running(rack, "shared") as runner:
        names = begin(runner, ["good"])
        release = threading.Timer(rpc_runner.RUN_TIMEOUT_S + rpc_runner.GONE_S, theirs._sess["CloseRPCConnection"])
        release.start()
        (found,) = finish(runner, names)
        assert isinstance(found, Timed)
        assert runner.queued_s > rpc_runner.RUN_TIMEOUT_S
        assert runner.lost == []


def test_a_run_that_is_left_amid_its_trials_leaves_its_devices_running(quick: None, rack: Rack, brisk: None) -> None:
    devices = [rack.add("left", clock(patient)), rack.add("left", clock(patient))]
    for _ in range(2):
        with running(rack, "left") as runner:
            until(lambda runner=runner: len(runner.probe_ns) == 2)  # type: ignore[misc]
            begin(runner, ["good"] * 6)
            until(lambda runner=runner: 0 < len(runner._queue) < 4)  # type: ignore[misc]
        time.sleep(1.0)  # a server that fails ends a moment later
    assert Tracker(rack.address).devices("left") == devices


def test_the_device_says_what_it_is(quick: None, rack: Rack, tmp_path: Path) -> None:
    """Not this machine: its CPU, its number of threads."""

    def other() -> None:
        tvm_ffi.register_global_func("target.llvm_get_system_cpu", lambda: "nehalem", override=True)
        tvm_ffi.register_global_func("runtime.NumThreads", lambda: 7, override=True)

    rack.add("other", other)
    device = RpcDevice(presets()["llvm"], rack.address, "other", 0, "", print)
    assert (device.threads, device.name) == (7, "other (nehalem)")
    assert device.target.attrs["mcpu"] == "nehalem"
    assert int(device.target.attrs["num-cores"]) == 7
    folder = Session(device, tmp_path, tmp_path / "x").database().folder.name
    assert folder == "llvm-other-nehalem-7t"
    named = RpcDevice(presets()["x86-64-v3"], rack.address, "other", 3, "", print)
    assert (named.threads, named.name) == (3, "other (x86-64-v3)")
    with pytest.raises(TuneBenchError, match=r"other.* x86_64.* aarch64"):
        RpcDevice(
            replace(presets()["llvm"], attrs=(("mtriple", "aarch64-linux-gnu"),)), rack.address, "other", 0, "", print
        )


def test_what_is_missing_is_one_line(
    rack: Rack, pair: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as unused:
        unused.bind((HERE, 0))
        nobody = f"{HERE}:{unused.getsockname()[1]}"
    for arguments, words in [
        (["--runner", "rcp"], ["unknown runner", "Did you mean 'rpc'"]),
        (["--runner", "cuda"], ["not for runner 'cuda'", "--runner local"]),
        (["--key", "pair"], ["--runner rpc"]),
        (["--runner", "rpc", "--tracker", rack.address], ["needs --key"]),
        (["--runner", "rpc", "--key", "pair"], ["needs --tracker"]),
        (["--runner", "rpc", "--key", "pair", "--tracker", "here"], ["'here' is no tracker's address"]),
        (["--runner", "rpc", "--key", "pair", "--tracker", nobody], ["no tracker answers", "tvm.exec.rpc_tracker"]),
        (
            ["--runner", "rpc", "--key", "rpi4", "--tracker", rack.address],
            ["no device of key 'rpi4'", "rpc_server", "pair"],
        ),
    ]:
        assert run_command(["tune", "-m", "demo", *arguments], monkeypatch) == 2
        printed = capsys.readouterr().err
        assert printed.count("\n") == 1
        assert [word for word in words if word not in printed] == []


def test_what_is_no_tracker_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker_client, "ANSWER_TIMEOUT_S", 0.3)
    with socket.socket() as silent:
        silent.bind((HERE, 0))
        silent.listen()
        with pytest.raises(TuneBenchError, match="no tracker answers"):
            Tracker(f"{HERE}:{silent.getsockname()[1]}").devices("pair")


def test_a_process_that_does_not_answer_is_ended() -> None:
    client = rpc_runner.Client()
    assert client.ask(WAIT_S, min, 2, 1) == 1
    with pytest.raises(Lost, match="no answer"):
        client.ask(0.5, time.sleep, WAIT_S)
    assert not client.is_alive()
    client.send(time.sleep, (WAIT_S,))
    client.stop()
    with pytest.raises(Lost):
        client.ask(WAIT_S, min, 2, 1)


def test_a_tuning_run_over_rpc(rack: Rack, pair: list[str], config: Path, tmp_path: Path) -> None:
    said: list[str] = []
    preset = replace(presets()["llvm"], runs_here=False)
    device = RpcDevice(preset, rack.address, "pair", 1, "", said.append)
    device.cold_bytes = 1 << 15
    tasks = [task for task in lower(load_model(config, "q0f32"), device.target)[1] if 1 in task.calls]
    picked = [next(task for task in tasks if task.name.startswith("matmul"))]
    session = Session(device, tmp_path, tmp_path / "x")
    options = Options(trials=4, time_limit_s=120, threads=1, depth=40, cold_bytes=device.cold_bytes)
    progress = tune(picked, session.database(), device.target, device.runner, options, lambda progress: None)
    check_run(progress, session.database())
    words = progress.ran_on["disagreement"]
    assert set(progress.ran_on["probe_ns"]) == set(device.facts()["rpc"]["devices"]) == set(pair)
    assert said == ([words] if words else [])


def check_run(progress: Progress, database: Database) -> None:
    """Every trial is accounted for and right, every task judged."""
    assert progress.trials == progress.valid == len(Trials(SearchLog(database.search_folder)).measured) > 2
    assert all(entry.decision for entry in database.entries.values())
    assert all(entry.default_ns for entry in database.entries.values())


def test_no_backend_of_this_machine_is_opened(
    quick: None, monkeypatch: pytest.MonkeyPatch, rack: Rack, pair: list[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("tunebench.devices.opening.open_device", lambda *_: pytest.fail("this machine's"))
    session = inputs.open_session("llvm", 0, tmp_path, "x", ("rpc", rack.address, "pair", ""))
    assert session.device.name.startswith("pair (")


@dataclass(frozen=True)
class Saying:
    """A session with a device that says these things of itself."""

    told: dict[str, object]
    cache: bytes = b""

    def get_function(self, name: str) -> Callable[[], object]:
        if name not in self.told:
            raise AttributeError(name)
        return lambda: self.told[name]

    def download(self, path: str) -> bytes:
        return self.cache


@pytest.mark.parametrize(
    ("cpu", "threads", "cache", "facts"),
    [
        ("cortex-a72", 4, b"1024K\n", ("cortex-a72", 4, 1 << 20)),
        ("a b", -1, b"9" * 20 + b"K", ("", 0, 0)),
        ("x" * 101, 5000, b"\xffK", ("", 0, 0)),
        ("\x1b[31m", "many", b"1M", ("", 0, 0)),
        (None, 2**70, b"\xb2K", ("None", 0, 0)),
    ],
)
def test_what_a_device_says_is_data(
    cpu: object, threads: object, cache: bytes, facts: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"target.llvm_get_system_cpu": cpu, "target.llvm_get_system_triple": "a b", "runtime.NumThreads": threads}
    monkeypatch.setattr(rpc_device._state, "session", Saying(told, cache), raising=False)
    found = rpc_device.describe()
    assert (found["cpu"], found["threads"], found["cache_bytes"]) == facts
    assert found["triple"] == ""


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf, 1e6])
def test_no_clock_measures_that(seconds: float) -> None:
    with pytest.raises(ValueError, match="returned a time of"):
        rpc_device._sane(seconds)
    assert rpc_device._sane(1e-6) == 1e-6
