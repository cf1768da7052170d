"""What options say, as values: lengths, durations and tests. A TuneBenchError says how to write them."""

from __future__ import annotations

import re

from tunebench import registry
from tunebench.errors import TuneBenchError
from tunebench.spec import Phase, Schedule, Test

SMALLEST_CHUNK = 16  # of those that prompts are cut into: there is always one of so many tokens
MOST_TOKENS = 1 << 20  # of a prompt, a generation or a context
MOST_NUMBERS = 64  # in a list
MOST_SECONDS = 30 * 24 * 3600


def tests(prompts: str, generated: str, depths: str, context: int) -> tuple[Test, ...]:
    """Prompts and generations at each depth, of lists of lengths; all must fit into the context."""
    found = []
    for depth in numbers(depths, "-d"):
        found += [Test(n_prompt=n, n_depth=depth) for n in numbers(prompts, "-p") if n]
        found += [Test(n_gen=n, n_depth=depth) for n in numbers(generated, "-n") if n]
    if not found:
        raise TuneBenchError("no test is left with -p 0 and -n 0.", "Name at least one length.")
    for test in found:
        if test.n_depth + test.n_tokens > context:
            raise TuneBenchError(
                f"{test.name} needs {test.n_depth + test.n_tokens} positions, and the context has {context}.",
                "Raise --context, or choose shorter tests.",
            )
    return tuple(found)


def numbers(text: str, option: str) -> list[int]:
    """Whole numbers written like 128,512, up to `MOST_NUMBERS` of up to `MOST_TOKENS`."""
    if not re.fullmatch(r"[0-9]+(,[0-9]+)*", text):
        raise TuneBenchError(f"{option} {_short(text)} is not a list of whole numbers.", "Write it like 128,512.")
    parts = text.split(",")
    found = [int(part) for part in parts if len(part.lstrip("0")) < 10]
    if len(parts) > MOST_NUMBERS or len(found) < len(parts) or max(found) > MOST_TOKENS:
        raise TuneBenchError(
            f"{option} {_short(text)} is out of range.",
            f"Write at most {MOST_NUMBERS} numbers, each from 0 to {MOST_TOKENS:,}.",
        )
    return found


def chunk_sizes(text: str) -> tuple[int, ...]:
    """The chunks that prompts are cut into: those named and the smallest; none where none is named."""
    return tuple(sorted({SMALLEST_CHUNK, *numbers(text, "--prompt")})) if text else ()


def phases(text: str) -> tuple[Phase, ...]:
    """The phases that decode, prefill or both names."""
    both: tuple[Phase, ...] = ("decode", "prefill")
    if text not in (*both, "both"):
        raise TuneBenchError(f"there is no phase {_short(text)}.", "Write decode, prefill or both.")
    return tuple(phase for phase in both if text in (phase, "both"))


def schedules(names: list[str]) -> tuple[Schedule, ...]:
    """The schedules that TuneBench's own engines run under, each once."""
    known: dict[str, Schedule] = {"default": "default", "tuned": "tuned"}
    return tuple(dict.fromkeys(registry.pick(known, name, "schedule") for name in names))


def seconds(text: str) -> float:
    """A duration written like 90s, 20m or 1h."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([smh]?)", text.strip())
    if not match:
        raise TuneBenchError(f"{_short(text)} is no duration.", "Write it like 90s, 20m or 1h.")
    found = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]
    if found > MOST_SECONDS:
        raise TuneBenchError(f"{_short(text)} is too long.", f"Write at most {MOST_SECONDS // 3600}h.")
    return found


def _short(text: str) -> str:
    return repr(text if len(text) <= registry.LONGEST else f"{text[: registry.LONGEST]}…")
