"""TVM's tracker of RPC servers, as a client: which devices it has, and the next free one of a key."""

from __future__ import annotations

import socket
import struct
import threading
from dataclasses import dataclass
from typing import Any

from tvm.rpc import base

from tunebench.errors import TuneBenchError

ANSWER_TIMEOUT_S = 5.0


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
        if not host or not port.isdigit():
            raise TuneBenchError(f"{address!r} is no tracker's address.", "Write --tracker like 192.168.1.2:9190.")
        self.address = address
        self._host, self._port = host, int(port)
        self._asking: socket.socket | None = None
        self._lock = threading.Lock()
        self._closed = False

    def devices(self, key: str) -> list[str]:
        """The servers of a key, free or not; TuneBenchError where there are none, or no tracker."""
        found = self._summary()
        names = [(str(each["key"]).partition(":")[2], each["addr"]) for each in found]
        devices = sorted(f"{addr[0]}:{addr[1]}" for name, addr in names if name == key)
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
            code, value = base.recvjson(sock)
            with self._lock:
                self._asking = None
        if code != base.TrackerCode.SUCCESS:
            raise OSError(f"the tracker refused: {value}")
        host, port, match_key = value
        return Grant(str(host), int(port), str(match_key))

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

    def _summary(self) -> list[dict[str, Any]]:
        try:
            with self._connect() as sock:
                base.sendjson(sock, [base.TrackerCode.SUMMARY])
                _, summary = base.recvjson(sock)
        except (OSError, ValueError) as error:
            raise TuneBenchError(
                f"no tracker answers at {self.address} ({error}).",
                f"Start one: python -m tvm.exec.rpc_tracker --host 0.0.0.0 --port {self._port}",
            ) from None
        servers: list[dict[str, Any]] = summary["server_info"]
        return servers
