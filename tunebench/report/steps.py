"""The kernels of one step: a decode step, or a prefill chunk of one size. Shares are of a step, and add up to 1."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from tunebench import stats
from tunebench.report import words
from tunebench.spec import Decision, Kernel, Phase


@dataclass(frozen=True)
class Step:
    """One size of chunk and its kernels, those without any measurement first, and then the heaviest."""

    chunk: int
    kernels: Sequence[Kernel]

    @property
    def phase(self) -> Phase:
        """The phase of every kernel of the step."""
        return self.kernels[0].phase

    @property
    def name(self) -> str:
        """The step in words."""
        return "decode step" if self.phase == "decode" else f"prefill chunk of {self.chunk}"

    def share(self, kernel: Kernel) -> float | None:
        """Share (0..1) of the step's measured time; None of a kernel that nobody measured."""
        return kernel.share / sum(each.share for each in self.kernels) if kernel.share else None

    @property
    def unknown(self) -> list[Kernel]:
        """The kernels without any measurement."""
        return [kernel for kernel in self.kernels if not kernel.share]

    @property
    def coverage(self) -> float | None:
        """Share (0..1) of the measured time that is not under the default schedule; None where nothing is measured."""
        shares = [(kernel.schedule, self.share(kernel) or 0.0) for kernel in self.kernels]
        return sum(share for name, share in shares if name != "default") if any(share for _, share in shares) else None


def steps(kernels: Sequence[Kernel]) -> list[Step]:
    """The steps that `kernels` are of, decode first, then the shortest chunk."""
    chunks = sorted({(kernel.phase, kernel.chunk) for kernel in kernels})
    ordered = sorted(kernels, key=lambda kernel: (bool(kernel.share), -kernel.share))
    return [Step(chunk[1], [k for k in ordered if (k.phase, k.chunk) == chunk]) for chunk in chunks]


def decisions(kernels: Sequence[Kernel]) -> str:
    """What was decided, as `34 of 36 kernels promoted, 1 kept default, 1 not searched`; empty where there are none."""
    found = Counter(stats.kernel_decision(kernel).decision for kernel in kernels)
    others = [f", {found[name]} {name}" for name in get_args(Decision)[1:] if found[name]]
    return f"{found['promoted']} of {words.whole(len(kernels), 'kernel')} promoted{''.join(others)}" if kernels else ""
