"""The picture of the live table in README.md: python benchmarks/live_table.py docs/live-table.svg

Tunes the demo model on this machine's CPU from an empty database, as `tunebench tune --model demo` does, and keeps the
last state of the table as a terminal of 80 columns shows it.
"""

from __future__ import annotations

import argparse
import io
import re
import tempfile
from pathlib import Path

from rich.console import Console

from tunebench.cli import inputs
from tunebench.cli.progress import TuneView
from tunebench.tuning.run import run_tune
from tunebench.tuning.session import lower
from tunebench.tuning.tuner import Options, Progress

SCHEME = "q4i8f16_0"
CONTEXT, TRIALS, MINUTES = 1024, 32, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="the SVG to write")
    args = parser.parse_args()
    shown: list[Progress] = []
    with tempfile.TemporaryDirectory() as folder:
        session = inputs.open_session("llvm", 0, Path(folder), "picture")
        inputs.make_folder(session.results_path.parent)
        lowered = lower(session, inputs.workloads(["demo"], [SCHEME], 1, "128", CONTEXT)[0])
        run_tune(lowered, Options(TRIALS, MINUTES * 60.0), shown.append)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(TuneView(console, f"demo {SCHEME}").frame(shown[-1]))
    limits = f"--context {CONTEXT} --trials {TRIALS} --time-limit {MINUTES}m"
    drawn = console.export_svg(title=f"tunebench tune -m demo -q {SCHEME} {limits}", unique_id="live")
    args.out.write_text(re.sub(r"@font-face {.*?}\s*", "", drawn, flags=re.DOTALL), encoding="utf-8")  # of a web site


if __name__ == "__main__":
    main()
