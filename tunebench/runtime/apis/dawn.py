"""WebGPU as Chrome has it: Dawn, through its module for Node.js, in a process of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import secrets
import shutil
import socket
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tunebench.errors import TuneBenchError
from tunebench.runtime import webgpu_common
from tunebench.runtime.apis import Api, ApiDevice, Buffer, Call
from tunebench.runtime.plan import Shader

SCRIPT = Path(__file__).with_name("dawn.mjs")
PACKAGE = "webgpu"  # of npm
INSTALL = "Install Node.js, then in the folder that you run from: npm install webgpu"
TOGGLES = ("allow_unsafe_apis", "vulkan_enable_f16_on_nvidia", "disable_robustness", "disable_workgroup_init")
OPTIONS = (f"enable-dawn-features={','.join(TOGGLES)}", "disable-dawn-features=timestamp_quantization")
MATRICES = "chromium-experimental-subgroup-matrix"
MATRIX = {"in": "f16", "out": "f32", "shape": [16, 16, 16]}  # that templates multiply
PART = 32 << 20  # bytes of a message
PATIENCE_S = 60  # for Node.js to start
ENDED = "Dawn's process has ended"
HEAD = struct.Struct("<II")


class DawnDevice:
    """Dawn's preferred adapter, with all of its limits."""

    def __init__(self, node: str, package: Path, options: Sequence[str] = OPTIONS) -> None:
        self._socket, self.process = _start([node, str(SCRIPT), str(package), json.dumps(options)])
        weakref.finalize(self, _end, self._socket, self.process)
        self._answers = self._socket.makefile("rb")
        self._numbers = itertools.count()
        self._dropped: list[int] = []
        try:
            found = self.ask("open")
        except RuntimeError as error:
            raise TuneBenchError(f"Dawn has no WebGPU adapter ({error}).", "Install a Vulkan driver.") from None
        self._limits: dict[str, int] = found.pop("limits")
        self.name = str(found["name"] or found["description"] or found["vendor"])
        self.features = frozenset(found["features"])
        fixed = "subgroups" in self.features and found["subgroupMinSize"] == found["subgroupMaxSize"]
        self.lanes = int(found["subgroupMinSize"]) if fixed else 0
        self.facts: Mapping[str, Any] = {
            "api": "WebGPU of Dawn",
            "driver": f"{found['vendor']} {found['description']}".strip(),
            "dawn": json.loads((package / "package.json").read_text())["version"],
            "toggles": list(TOGGLES),
            "features": sorted(self.features),
            "matrices": found["matrices"],
        }
        self.free_bytes = self.cache_bytes = 0

    def tell(self, name: str, *given: object, data: memoryview | bytes = b"") -> None:
        """Send a message that is not answered."""
        if self._dropped and name != "free":
            dropped = self._dropped[:]
            del self._dropped[: len(dropped)]
            self.tell("free", dropped)
        words = json.dumps([name, *given]).encode()
        try:
            self._socket.sendall(HEAD.pack(len(words), len(data)) + words)
            if data:
                self._socket.sendall(data)
        except OSError:
            raise RuntimeError(ENDED) from None

    def ask(self, name: str, *given: object) -> Any:
        """A question's answer: its value, or its bytes where there are any. RuntimeError with Dawn's words."""
        self.tell(name, *given)
        length, rest = HEAD.unpack(self._take(HEAD.size))
        answer, data = json.loads(self._take(length)), self._take(rest)
        if "error" in answer:
            raise RuntimeError(" ".join(str(answer["error"]).split())[:400])
        return data if data else answer["value"]

    def _take(self, size: int) -> bytes:
        try:
            data = self._answers.read(size)
        except OSError:
            data = b""
        if len(data) < size:
            raise RuntimeError(ENDED)
        return data

    def new(self) -> _Handle:
        """A number for something over there, which is freed with the handle."""
        handle = _Handle(next(self._numbers))
        weakref.finalize(handle, self._dropped.append, handle.number)
        return handle

    def target(self) -> dict[str, Any]:
        """TVM's target: the limits that its code generator asks for."""
        half, limits = "shader-f16" in self.features, self._limits
        matrix = self.lanes == webgpu_common.LANES and MATRICES in self.features and MATRIX in self.facts["matrices"]
        threads, shared_bytes = limits["maxComputeInvocationsPerWorkgroup"], limits["maxComputeWorkgroupStorageSize"]
        return webgpu_common.target(threads, shared_bytes, self.lanes, half=half, pairs=half, matrix16=matrix)

    def allocate(self, size_bytes: int) -> Buffer:
        """New storage; TuneBenchError where a shader could not be given as much."""
        most = min(self._limits["maxBufferSize"], self._limits["maxStorageBufferBindingSize"])
        webgpu_common.check_size(self.name, size_bytes, most)
        handle = self.new()
        self.tell("allocate", handle.number, size_bytes)
        return handle

    def write(self, buffer: Buffer, array: np.ndarray) -> None:
        """Copy an array to a buffer."""
        data = webgpu_common.words(array)
        for at in range(0, data.size, PART):
            self.tell("write", buffer.number, at, data=data[at : at + PART].data)

    def copy(self, to: Buffer, source: Buffer, size_bytes: int) -> None:
        """Copy between buffers."""
        self.tell("copy", to.number, source.number, size_bytes)

    def read(self, buffer: Buffer, size_bytes: int) -> np.ndarray:
        """A buffer's first bytes."""
        return np.frombuffer(self.ask("read", buffer.number, size_bytes), np.uint8).copy()

    def compile(self, shader: Shader) -> Any:
        """A pipeline; bindings are the buffers in order, then TVM's uniform with the number of blocks."""
        needs = "subgroup" in shader.source and "enable subgroups;" not in shader.source
        handle = self.new()
        try:
            source = "enable subgroups;\n" * needs + shader.source
            self.ask("compile", handle.number, source, shader.entry, list(shader.writes))
        except RuntimeError as error:
            raise RuntimeError(f"WGSL: {error}") from None
        return handle

    def record(self, calls: Sequence[Call], times: int = 1) -> DawnRecording:
        """Bind groups made once, over there."""
        return DawnRecording(self, calls, times)

    def wait(self) -> None:
        """Until the queue is empty."""
        self.ask("wait")


class _Handle:
    """Something of Dawn's process, by number."""

    def __init__(self, number: int) -> None:
        self.number = number


class DawnRecording:
    """Launches of one compute pass. It keeps what they use."""

    def __init__(self, device: DawnDevice, calls: Sequence[Call], times: int) -> None:
        self._device, self._calls, self._handle = device, list(calls), device.new()
        every = [[call.kernel.number, [each.number for each in call.buffers], list(call.blocks)] for call in calls]
        device.tell("record", self._handle.number, every, times)

    def run(self) -> None:
        """Encode and submit, over there."""
        self._device.tell("run", self._handle.number)

    def elapsed_ns(self) -> int:
        """By the timestamps at the beginning and end of the pass."""
        return int(self._device.ask("elapsed", self._handle.number))


def _start(command: Sequence[str]) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Run the script, which ends with the connection to it. It is not spoken to on its output, where Dawn complains."""
    token = secrets.token_hex(16)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        port = server.getsockname()[1]
        quiet = subprocess.DEVNULL
        process = subprocess.Popen(
            [*command, str(port), token], stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True
        )
        connection = _accept(server, process)
        if connection:
            connection.settimeout(None)
            if connection.recv(len(token), socket.MSG_WAITALL).decode() == token:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return connection, process
    process.kill()
    process.wait()
    raise TuneBenchError("Dawn's process does not start.", "Try: node -e 'import(\"webgpu\")'")


def _accept(server: socket.socket, process: subprocess.Popen[bytes]) -> socket.socket | None:
    """The process's connection; None where it ends without one, or takes longer than `PATIENCE_S`."""
    until_s = time.monotonic() + PATIENCE_S
    while process.poll() is None and time.monotonic() < until_s:
        with contextlib.suppress(TimeoutError):
            return server.accept()[0]
    return None


def _end(connection: socket.socket, process: subprocess.Popen[bytes]) -> None:
    """Close the connection, which ends the script."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
    try:
        process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def find_node() -> str | None:
    """Node.js: on the path, or the one that Playwright brings."""
    found = importlib.util.find_spec("playwright")
    driver = Path(found.origin).parent / "driver" if found and found.origin else None
    return shutil.which("node") or (shutil.which("node", path=driver) if driver else None)


def find_package() -> Path | None:
    """npm's package: in this folder or one above it, or in that of this Python."""
    places = [
        *(folder / "node_modules" for folder in (Path.cwd(), *Path.cwd().parents)),
        Path(sys.prefix, "node_modules"),
    ]
    return next((place / PACKAGE for place in places if (place / PACKAGE / "package.json").exists()), None)


def find() -> tuple[str, Path]:
    """Node.js and Dawn's package; TuneBenchError where one is missing."""
    node, package = find_node(), find_package()
    if node is None or package is None:
        raise TuneBenchError(f"dawn needs {'Node.js' if node is None else 'the npm package webgpu'}.", INSTALL)
    return node, package


def open_device() -> ApiDevice:
    """Dawn in a process of its own."""
    return DawnDevice(*find())


APIS = (Api("dawn", "wgsl", "Dawn, Chrome's WebGPU, on Node.js", (), open_device),)
