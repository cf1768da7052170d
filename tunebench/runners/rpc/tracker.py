"""TVM's tracker of RPC servers, as a client: which devices it has, and the next free one of a key."""

from __future__ import annotations

import re
import socket
import struct
import threading
from dataclasses import dataclass
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Struct
from tvm.rpc import base

from tunebench.errors import TuneBenchError, brief, one_line

ANSWER_TIMEOUT_S = 5.0
ANSWER_BYTES = 1 << 20
Answer = TypeVar("Answer")
Name = Annotated[str, Meta(max_length=250)]
Port = Annotated[int, Meta(ge=0, le=65535)]


class _Server(Struct):
    """What a tracker says of a server."""

    key: Name  # `server:` and its key
    addr: tuple[Name | None, Port]


class _Summary(Struct):
    server_info: list[_Server]


@dataclass(frozen=True)
class Grant:
    """A free server that the tracker has handed out, for whoever connects with its key."""

    host: str
    port: int
    match_key: str

    @property
    def device(self) -> str:
        """How messages and results name the server."""
        return f"{self.host}:{self.port}"


class Tracker:
    """One tracker. Every call but `request` is answered at once, or fails; TuneBenchError says what to do."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        if not host or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
            raise TuneBenchError(f"{address[:80]!r} is no tracker's address.", "Write --tracker like 192.168.1.2:9190.")
        self.address = address
        self._host, self._port = host, int(port)
        self._asking: socket.socket | None = None
        self._lock = threading.Lock()
        self._closed = False

    def devices(self, key: str) -> list[str]:
        """The servers of a key, free or not; TuneBenchError where there are none, or no tracker."""
        names = [(one_line(each.key).partition(":")[2], each.addr) for each in self._summary()]
        devices = sorted(one_line(f"{host}:{port}") for name, (host, port) in names if name == key)
        if not devices:
            others = ", ".join(sorted({name for name, _ in names})) or "none"
            raise TuneBenchError(
                f"the tracker at {self.address} has no device of key {key!r} (its keys: {others}).",
                f"Start on each: python -m tvm.exec.rpc_server --tracker {self.address} --key {key}",
            )
        return devices

    def request(self, key: str) -> Grant:
        """Wait in the tracker's queue, as long as it takes; OSError where the tracker is gone, or after `close`."""
        with self._connect() as sock:
            with self._lock:
                if self._closed:
                    raise OSError("closed")
                self._asking = sock
            sock.settimeout(None)
            base.sendjson(sock, [base.TrackerCode.REQUEST, key, "", 1])
            code, value = _answer(sock, tuple[int, msgspec.Raw])
            with self._lock:
                self._asking = None
        if code != base.TrackerCode.SUCCESS:
            raise OSError(f"the tracker refused: {one_line(bytes(value).decode(errors='replace'), 200)}")
        return Grant(*_decoded(value, tuple[Name, Port, Name]))

    def close(self) -> None:
        """Leave the queue."""
        with self._lock:
            self._closed = True
            if self._asking:
                self._asking.shutdown(socket.SHUT_RDWR)

    def _connect(self) -> socket.socket:
        sock = socket.create_connection((self._host, self._port), ANSWER_TIMEOUT_S)
        try:
            sock.sendall(struct.pack("<i", base.RPC_TRACKER_MAGIC))
            (magic,) = struct.unpack("<i", base.recvall(sock, 4))
        except OSError:
            sock.close()
            raise
        if magic != base.RPC_TRACKER_MAGIC:
            sock.close()
            raise OSError("it is no tracker")
        return sock

    def _summary(self) -> list[_Server]:
        try:
            with self._connect() as sock:
                base.sendjson(sock, [base.TrackerCode.SUMMARY])
                return _answer(sock, tuple[int, _Summary])[1].server_info
        except OSError as error:
            raise TuneBenchError(
                f"no tracker answers at {self.address} ({error}).",
                f"Start one: python -m tvm.exec.rpc_tracker --host 0.0.0.0 --port {self._port}",
            ) from None


def _answer(sock: socket.socket, kind: type[Answer]) -> Answer:
    """What a tracker answers, of that type; an OSError for anything else."""
    (size,) = struct.unpack("<i", base.recvall(sock, 4))
    if not 0 <= size <= ANSWER_BYTES:
        raise OSError(f"it sent an answer of {size} bytes")
    return _decoded(base.recvall(sock, size), kind)


def _decoded(data: bytes | bytearray | msgspec.Raw, kind: type[Answer]) -> Answer:
    try:
        return msgspec.json.decode(data, type=kind)
    except (ValueError, RecursionError) as error:
        raise OSError(f"it sent what no tracker sends: {brief(error)}") from None
