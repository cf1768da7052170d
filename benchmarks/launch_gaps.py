"""How much of a decode step's time its kernels take: python benchmarks/launch_gaps.py -m llama-7b -q q4f16_1

Needs a tuned database (`tunebench tune --target cuda`) and PyTorch, whose profiler (CUPTI) tells when each kernel
ran. Busy time is the union of the kernels' intervals, as programmatic launches let them overlap. The wall clock is
taken in a run of its own, without the profiler.
"""

import argparse
import time
from pathlib import Path

import numpy as np

from tunebench.bench.arms import Plan, load_arms
from tunebench.cli import benching, inputs

TOKENS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-m", "--model", default="llama-7b")
    parser.add_argument("-q", "--scheme", default="q4f16_1")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--prompt", default="512")
    parser.add_argument("--work-dir", type=Path, default=Path("tunebench-work"))
    args = parser.parse_args()

    session = inputs.open_session("cuda", 0, args.work_dir, "gaps")
    load = inputs.workloads([args.model], [args.scheme], 1, args.prompt, args.context)[0]
    lowered = benching.lowered(session, load)
    plan = Plan((), schedules=("tuned",))
    engine = load_arms([lowered], plan, lambda words: None)["tuned"].loaded
    tokens = np.random.default_rng(0).integers(0, lowered.model.config.vocab_size, (1, TOKENS), np.int32)

    def decode() -> None:
        for i in range(TOKENS):
            engine.decode(tokens[:, i : i + 1], i)
        engine.wait()

    decode()
    walls = []
    for _ in range(5):
        start = time.perf_counter()
        decode()
        walls.append((time.perf_counter() - start) / TOKENS * 1e6)
    busy, kernels = _busy_us(decode)
    wall = float(np.median(walls))
    print(
        f"{args.model} {args.scheme}: {wall:.0f} us of wall clock a token, {busy / TOKENS:.0f} us with a kernel running"
    )
    print(f"({busy / TOKENS / wall:.1%}), {kernels / TOKENS:.0f} kernels a token")


def _busy_us(work) -> tuple[float, int]:  # type: ignore[no-untyped-def]
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
    events = [
        event for event in profiler.events() if event.device_type == DeviceType.CUDA and "mem" not in event.name.lower()
    ]
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)
    busy, end = 0.0, 0.0
    for first, last in spans:
        busy += max(0.0, last - max(first, end))
        end = max(end, last)
    return busy, len(spans)


if __name__ == "__main__":
    main()
