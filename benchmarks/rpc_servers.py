"""Trials per second with two servers over one, through TVM's tracker and servers on loopback.

    python benchmarks/rpc_servers.py --trials 24 --rounds 5

It measures the runner, not kernels: a server here waits `--wait` seconds at each measurement, which costs no CPU, as a
board does that is slow or cools down, and one trial has `--samples` of them and one more. What is left to the runner is
to keep every server busy: builds, uploads, checks, messages and the queue. Rounds with one and with two servers
alternate; a ratio is of neighbours.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence

import tvm
from tvm.script import tirx as T

from tunebench import environment, stats
from tunebench.compile import passes
from tunebench.devices.targets import presets
from tunebench.errors import TuneBenchError
from tunebench.runners.base import Candidate, Failed, MeasureInput, Trial
from tunebench.runners.rpc.runner import RpcRunner
from tunebench.runners.rpc.tracker import Tracker
from tunebench.timing import Protocol

SERVER = """
import sys, time, threading, tvm_ffi
from tvm.rpc.server import PopenRPCServerState
wait_s, port, key = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
true = tvm_ffi.get_global_func("runtime.RPCTimeEvaluator")
def evaluator(*arguments):
    timer = true(*arguments)
    def timed(*tensors):
        time.sleep(wait_s)
        return timer(*tensors)
    return timed
tvm_ffi.register_global_func("runtime.RPCTimeEvaluator", evaluator, override=True)
PopenRPCServerState("127.0.0.1", 9100, 9199, False, ("127.0.0.1", port), key, silent=True)
threading.Event().wait()
"""  # TVM's server, with a slow clock
TRACKER_PORT = 9290
KEYS = {"one": 1, "two": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=24, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--wait", type=float, default=0.1, help="seconds a server waits at each measurement")
    parser.add_argument("--samples", type=int, default=5, help="of a trial")
    args = parser.parse_args()
    address = f"127.0.0.1:{TRACKER_PORT}"
    tracker = ["-m", "tvm.exec.rpc_tracker", "--host", "127.0.0.1", f"--port={TRACKER_PORT}", "--silent"]
    processes = [_start([*tracker, f"--port-end={TRACKER_PORT + 1}"])]
    for key, count in KEYS.items():
        processes += [_start(["-c", SERVER, str(args.wait), str(TRACKER_PORT), key]) for _ in range(count)]
    runners = {}
    try:
        _await(address)
        target = passes.tvm_target(presets()["llvm"], 1)
        builders = max(1, environment.usable_cores() - 1)
        runners = {key: RpcRunner(target, 1, builders, address, key, "ll", "", _say) for key in KEYS}
        protocol = Protocol(warmups=0, samples=args.samples, least_samples=args.samples)
        rates: dict[str, list[float]] = {key: [] for key in KEYS}
        for number in range(args.rounds + 1):  # the first starts the processes, and is not counted
            for key in KEYS if number % 2 else reversed(KEYS):
                rate = _round(runners[key], args.trials, protocol, f"{number}")
                if number:
                    rates[key].append(rate)
                    print(f"round {number}, {key}: {rate:.2f} trials/s", file=sys.stderr, flush=True)
        bound = 1 / (args.wait * (args.samples + 1))
        _show(rates, bound)
    finally:
        for runner in runners.values():
            runner.close()
        for process in processes:
            process.kill()


def _start(arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def _await(address: str) -> None:
    """Until every server is at the tracker."""
    while True:
        try:
            if all(len(Tracker(address).devices(key)) == count for key, count in KEYS.items()):
                return
        except TuneBenchError:
            pass
        time.sleep(0.5)


def _kernel(factor: float) -> tvm.IRModule:
    @T.prim_func(s_tir=True)
    def scale(a: T.Buffer((4096,), "float32"), out: T.Buffer((4096,), "float32")):
        for i in range(4096):
            with T.sblock("scale"):
                v = T.axis.spatial(4096, i)
                out[v] = a[v] * T.float32(factor)

    return tvm.IRModule({"main": scale.with_attr("global_symbol", "main").with_attr("tirx.noalias", True)})


def _round(runner: RpcRunner, trials: int, protocol: Protocol, label: str) -> float:
    """Trials a second, builds included; each must be right."""
    candidate = Candidate("scale", _kernel(2.0))
    trial = Trial(MeasureInput("scale", candidate.json, 0, 1), protocol, 10**9)
    names = [f"{label} {i}" for i in range(trials)]
    start = time.monotonic()
    runner.build(trial, [Candidate(name, candidate.mod) for name in names])
    outcomes = [runner.time(trial, name) for name in names]
    took_s = time.monotonic() - start
    failed = [outcome.reason for outcome in outcomes if isinstance(outcome, Failed)]
    if failed:
        raise SystemExit(f"{len(failed)} of {trials} trials failed: {failed[0]}")
    return trials / took_s


def _show(rates: dict[str, list[float]], bound: float) -> None:
    ratios = [two / one for one, two in zip(rates["one"], rates["two"], strict=True)]
    print("| servers | trials/s, median (range) | share of what the waits allow |")
    print("|---|---|---|")
    for key, count in KEYS.items():
        found = rates[key]
        middle = stats.median(found)
        print(f"| {count} | {middle:.2f} ({min(found):.2f} to {max(found):.2f}) | {middle / (count * bound):.0%} |")
    spread = f"range of {len(ratios)} rounds: {min(ratios):.2f} to {max(ratios):.2f}"
    print(f"\n2 over 1: {stats.median(ratios):.2f}x ({spread})")


if __name__ == "__main__":
    main()
