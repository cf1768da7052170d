"""The engine that runs a plan in a web browser's WebGPU. It needs no TVM.

The plan is served from a folder to a page of Chromium, which Playwright drives. Steps are queued and handed over when
somebody waits, so that no decode step pays for a round trip between the processes.
"""

from __future__ import annotations

import atexit
import base64
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypedDict, TypeVar

import msgspec
import numpy as np
from msgspec import Meta, Struct

from tunebench.engines.browser.export import WEIGHTS, Arrays, write_plan, write_weights
from tunebench.engines.browser.server import PageServer
from tunebench.engines.chunked import ChunkedEngine
from tunebench.errors import TuneBenchError, brief, one_line
from tunebench.installation import install_hint
from tunebench.runtime import webgpu_common
from tunebench.runtime.plan import Plan
from tunebench.spec import Amount, Words

Checked = TypeVar("Checked")
if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

EXECUTABLES = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "microsoft-edge",
    "msedge",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "C:/Program Files/Google/Chrome/Application/chrome.exe",
    "C:/Program Files (x86)/Microsoft/Edge/Application/msedge.exe",
)
"""Browsers built on Chromium, by name on the path or by place."""
FLAGS = ("--enable-unsafe-webgpu", "--headless=new", "--disable-gpu-watchdog")
VULKAN = ("--enable-features=Vulkan", "--use-angle=vulkan", "--disable-vulkan-surface")
"""With which a GPU of Linux is used without a display; they may hang where there is none."""
SOFTWARE = ("--use-webgpu-adapter=swiftshader",)


def find_executables() -> list[str]:
    """The browsers of this machine, the preferred first."""
    return [found for name in EXECUTABLES if (found := shutil.which(name))]


class AdapterFacts(TypedDict):
    """What the page says of its adapter."""

    name: Words
    software: bool
    browser: Words
    lanes: Annotated[int, Meta(ge=0, le=1024)]  # of a subgroup; 0 where it has no one size
    features: list[Words]
    limits: dict[str, Amount | None]


class _Answer(Struct):
    """Of a call: its value, or what went wrong, with the stack where that is a bug."""

    value: Any = None
    error: str | None = None
    stack: str | None = None


class Chromium:
    """One browser process, which all pages of this process share; it ends with the last of them."""

    running: ClassVar[Chromium | None] = None

    def __init__(self) -> None:
        executable = _executable()
        from playwright.sync_api import sync_playwright

        self._playwright = sync_playwright().start()
        self._pages: list[Page] = []
        try:
            self._browser, self.facts = self._launch(executable)
        except BaseException:
            self._playwright.stop()
            raise
        Chromium.running = self
        atexit.register(self.close)

    def open(self, server: PageServer) -> Page:
        """A server's page, ready for `call`."""
        self._pages.append(_open(self._browser, server))
        return self._pages[-1]

    def leave(self, page: Page) -> None:
        """Close a page."""
        self._pages.remove(page)
        page.close()
        if not self._pages:
            self.close()

    def close(self) -> None:
        """End the browser."""
        atexit.unregister(self.close)
        Chromium.running = None
        self._browser.close()
        self._playwright.stop()

    def _launch(self, executable: str) -> tuple[Browser, dict[str, Any]]:
        """With a GPU, or else with the browser's own software adapter; and what the adapter is."""
        from playwright.sync_api import Error

        reason = ""
        for flags in (*_hardware_flags(), SOFTWARE):
            try:
                browser = self._playwright.chromium.launch(executable_path=executable, args=[*FLAGS, *flags])
            except Error as error:
                reason = str(error).strip().splitlines()[0]
                continue
            try:
                with PageServer() as server, _open(browser, server) as page:
                    return browser, read_facts(page)
            except (Error, TuneBenchError) as error:
                reason = str(error).strip().splitlines()[0]
                browser.close()
        raise TuneBenchError(f"{executable} does not run WebGPU ({reason}).", "Update it, or install Chromium.")


def _hardware_flags() -> list[tuple[str, ...]]:
    """What to start with where there may be a GPU."""
    if sys.platform != "linux":
        return [()]
    return [VULKAN] if any(Path("/dev").glob("dri/renderD*")) or any(Path("/dev").glob("nvidia[0-9]*")) else []


def _executable() -> str:
    """The browser to start; a TuneBenchError says what is missing."""
    if importlib.util.find_spec("playwright") is None:
        raise TuneBenchError("the engine browser needs playwright.", install_hint("browser"))
    found = find_executables()
    if not found:
        raise TuneBenchError(
            f"the engine browser needs a browser, and there is no {', '.join(EXECUTABLES[:4])} or the like.",
            "Install one: apt-get install chromium, or Chrome from google.com/chrome.",
        )
    return found[0]


def _open(browser: Browser, server: PageServer) -> Page:
    page = browser.new_page()
    page.goto(f"{server.url}?driven")
    page.wait_for_function("window.tunebench")
    return page


def call(page: Page, name: str, *given: object) -> Any:
    """What a function of `browser/driver.js` answers; a TuneBenchError where the page refuses."""
    answer = _checked(page.evaluate("([name, given]) => window.tunebench(name, given)", [name, list(given)]), _Answer)
    if answer.error is None and answer.stack is None:
        return answer.value
    if answer.stack:
        raise RuntimeError(f"{name} failed in the browser: {one_line(answer.stack)}")
    raise TuneBenchError(answer.error or f"{name} failed in the browser.")


def _checked(answer: object, kind: type[Checked]) -> Checked:
    """What the page answered, if it is of that type; a TuneBenchError for anything else."""
    try:
        return msgspec.convert(answer, kind)
    except (ValueError, RecursionError) as error:
        raise TuneBenchError(
            f"the page answered with something else ({brief(error)}).", "Update the browser."
        ) from None


def read_facts(page: Page) -> dict[str, Any]:
    """What a page says of its adapter; a TuneBenchError where that is not `AdapterFacts`."""
    return dict(_checked(call(page, "facts"), AdapterFacts))


def adapter_facts() -> dict[str, Any]:
    """The WebGPU adapter of this machine's browser: name, features, limits, lanes of a subgroup, whether software."""
    if Chromium.running:
        return Chromium.running.facts
    browser = Chromium()
    browser.close()
    return browser.facts


def check_dtype(facts: Mapping[str, Any], dtype: str) -> None:
    """Raise a TuneBenchError where such an adapter cannot run a scheme of this dtype."""
    if dtype == "float16" and "shader-f16" not in facts["features"]:
        raise TuneBenchError(
            f"the browser's adapter ({facts['name']}) lacks the feature shader-f16.",
            "Choose a float32 scheme, e.g. q4f32_1.",
        )


def webgpu_target(facts: Mapping[str, Any]) -> dict[str, Any]:
    """TVM's target for such an adapter, as data: the limits that its code generator asks for."""
    limits, features = facts["limits"], facts["features"]
    lanes = facts["lanes"] if "subgroups" in features else 0
    threads, shared_bytes = limits["maxComputeInvocationsPerWorkgroup"], limits["maxComputeWorkgroupStorageSize"]
    return webgpu_common.target(threads, shared_bytes, lanes, half="shader-f16" in features)


class _Tab:
    """A page with plans of one model, over one copy of its weights and cache, and the server of its files."""

    def __init__(self, folder: Path | None) -> None:
        self._temporary = None if folder else tempfile.TemporaryDirectory(prefix="tunebench-browser-")
        self.folder = folder or Path(self._temporary.name)  # type: ignore[union-attr]
        self.plans = self.users = 0
        self._queued: list[dict[str, Any]] = []
        self._browser = Chromium.running or Chromium()
        self.server = PageServer(self.folder).__enter__()
        self.page = self._browser.open(self.server)
        self.facts = self._browser.facts

    def load(self, plan: Plan, arrays: Arrays) -> int:
        """The plan's number on the page. The first one brings the weights, which are written once it has compiled."""
        name = f"beside-{self.plans}" if self.plans else ""
        write_plan(plan, self.folder / name)
        number = _checked(call(self.page, "prepare", f"plan/{name}".rstrip("/")), Amount)
        if not self.plans:
            write_weights(plan, arrays, self.folder)
        call(self.page, "fill", number, 0 if self.plans else None)
        if self._temporary:
            (self.folder / WEIGHTS).unlink(missing_ok=True)
        self.plans += 1
        return number

    def queue(self, step: dict[str, Any]) -> None:
        """A step for `flush`, which keeps the order of all engines here."""
        self._queued.append(step)

    def flush(self) -> None:
        """Hand over what is queued, and wait until the device is done."""
        queued, self._queued = self._queued, []
        call(self.page, "run", queued)

    def close(self) -> None:
        """Close the page, and the browser with the last one."""
        self._browser.leave(self.page)
        self.server.close()
        if self._temporary:
            self._temporary.cleanup()


class BrowserEngine(ChunkedEngine):
    """A plan in a page of a browser.

    `arrays` are the weights and `rope_cos_sin` by name, in any order. `folder` gets the plan and the weights, and keeps
    them; without one they go to a temporary folder, the weights only until they are loaded. An engine made `beside`
    another, for another plan of the same model, shares its weights and cache and needs no arrays.
    """

    def __init__(
        self, plan: Plan, arrays: Arrays = (), folder: Path | None = None, beside: BrowserEngine | None = None
    ) -> None:
        facts = plan.facts
        super().__init__(facts.batch, facts.context, facts.chunks)
        self.chunk_ns = facts.chunk_ns
        self.plan = plan
        self._has_run = self._closed = False
        self._tab: _Tab = beside._tab if beside else _Tab(folder)
        self._tab.users += 1
        try:
            self._number = self._tab.load(plan, arrays)
        except BaseException:
            self.close()
            raise

    @property
    def weight_bytes(self) -> int:
        """All weights in stored form."""
        return sum(buffer.bytes for buffer in self.plan.buffers if buffer.kind == "weight")

    @property
    def facts(self) -> Mapping[str, Any]:
        """Of the adapter."""
        return self._tab.facts

    def wait(self) -> None:
        """Hand over what is queued, and wait until the device is done."""
        self._tab.flush()

    def logits(self) -> np.ndarray:
        """Float32 logits [b, vocab] of the last call."""
        if not self._has_run:
            raise ValueError("nothing has been processed yet")
        self.wait()
        data = base64.b64decode(_checked(call(self._tab.page, "logits", self._number), str))
        shape = (self._batch, self.plan.facts.vocab_size)
        if len(data) != 4 * shape[0] * shape[1]:
            raise TuneBenchError(f"the page answered with {len(data)} bytes of logits, not {list(shape)} floats.")
        return np.frombuffer(data, np.float32).reshape(shape).copy()

    def close(self) -> None:
        """Close the page with the last engine on it, and the browser with its last page."""
        if not self._closed:
            self._closed = True
            self._tab.users -= 1
            if not self._tab.users:
                self._tab.close()

    def _step(self, tokens: np.ndarray, position: int, last_token: int) -> None:
        self._tab.queue(
            {
                "plan": self._number,
                "length": tokens.shape[1],
                "tokens": tokens.reshape(-1).tolist(),
                "position": position,
                "lastToken": last_token,
            }
        )
        self._has_run = True
