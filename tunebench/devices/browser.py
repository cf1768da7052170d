"""The WebGPU of a web browser."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tvm

from tunebench.compile.build import Compiled, compile_plan
from tunebench.devices.base import Arrays, Device, Records
from tunebench.engines.base import Engine
from tunebench.engines.browser import engine as browser_engine
from tunebench.errors import TuneBenchError
from tunebench.model.workload import Model, with_rope
from tunebench.runners.base import Runner
from tunebench.spec import EngineName, TargetPreset


class BrowserDevice(Device):
    """The WebGPU of this machine's web browser, which runs plans in a page."""

    engine = EngineName.BROWSER
    default_chunks = (16, 128)  # its kernels are not tuned, and a page must stay responsive

    def __init__(self, preset: TargetPreset) -> None:
        self.target_name = preset.name
        self._facts = browser_engine.adapter_facts()
        self.name = str(self._facts["name"])
        self.target = tvm.target.Target(browser_engine.webgpu_target(self._facts))

    def facts(self) -> dict[str, Any]:
        """The adapter, its features and limits."""
        return {"api": {"api": "WebGPU in a browser", **self._facts}}

    def runner(self) -> Runner:
        """Raises: trials are measured without a browser."""
        raise TuneBenchError("kernels are not tuned in a browser.", "Tune --target webgpu without --engine browser.")

    def compile(self, mod: tvm.IRModule, model: Model, records: Records, folder: Path) -> Compiled:
        """A plan; TuneBenchError where the adapter lacks what the scheme needs."""
        browser_engine.check_dtype(self._facts, model.workload.scheme.dtype)
        return compile_plan(mod, model, self.target, records)

    def engines(self, model: Model, compiled: Mapping[str, Compiled], weights: Arrays) -> dict[str, Engine]:
        """Plans on one page, over one copy of the weights."""
        arrays = with_rope(model, weights)
        made: dict[str, Engine] = {}
        first: browser_engine.BrowserEngine | None = None
        for name, each in compiled.items():
            if each.plan:
                made[name] = engine = browser_engine.BrowserEngine(each.plan, () if first else arrays, beside=first)
                first = first or engine
        return made
