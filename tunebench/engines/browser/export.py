"""A plan with its weights as a folder that other programs can run: plan.json, shaders/ and model.safetensors."""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tunebench.dtypes import DTYPES
from tunebench.engines.chunked import random_cache
from tunebench.errors import TuneBenchError
from tunebench.runtime import plan as plans
from tunebench.runtime.plan import Buffer, Plan

WEIGHTS = "model.safetensors"
Arrays = Iterable[tuple[str, np.ndarray]]


def export_plan(plan: Plan, arrays: Arrays, folder: Path) -> None:
    """Write a plan and the arrays that it names, in any order; no more than one of them is held at a time."""
    write_plan(plan, folder)
    write_weights(plan, arrays, folder)


def write_plan(plan: Plan, folder: Path) -> None:
    """Write `plan.json` and the sources; TuneBenchError where the folder cannot be written."""
    try:
        plans.write(plan, folder)
    except OSError as error:
        raise TuneBenchError(f"cannot write to {folder} ({error.strerror}).", "Name another folder.") from None


def write_weights(plan: Plan, arrays: Arrays, folder: Path) -> None:
    """Write weights, constants and what caches begin with to `model.safetensors`, each where its place is."""
    tiles = cache_tiles(plan)
    places, header = _layout([*(each for each in plan.buffers if each.kind in ("weight", "constant")), *tiles])
    left = {name: each for name, (each, _) in places.items()}
    unfinished = folder / f"{WEIGHTS}.part"
    try:
        with unfinished.open("wb") as file:
            file.write(header)
            for name, array in itertools.chain(_generated(tiles), arrays):
                if name in left:
                    _put(file, array, *places[name])
                    del left[name]
        if left:
            names = ", ".join(list(left)[:5])
            raise TuneBenchError(f"weights are missing: {names}{' ...' if len(left) > 5 else ''}.")
        unfinished.replace(folder / WEIGHTS)
    except OSError as error:
        raise TuneBenchError(f"cannot write weights to {folder} ({error.strerror}).", "Make room.") from None
    finally:
        unfinished.unlink(missing_ok=True)


def check(folder: Path) -> None:
    """Raise a TuneBenchError where no whole export is."""
    plans.read(folder)
    if not (folder / WEIGHTS).is_file():
        raise TuneBenchError(f"{folder} has no {WEIGHTS}.", "Export it again: tunebench export.")


def cache_tiles(plan: Plan) -> list[Buffer]:
    """What the caches repeat for every sequence and head, as `chunked.random_cache` does, by dtype and shape."""
    found = {}
    for each in plan.buffers:
        if each.kind == "cache":
            rows, columns = each.shape[-2:]
            size = rows * columns * np.dtype(each.dtype).itemsize
            name = f"cache.{each.dtype}.{rows}x{columns}"
            found[name] = Buffer(name, size, "constant", (rows, columns), each.dtype)
    return list(found.values())


def _generated(tiles: Iterable[Buffer]) -> Arrays:
    return ((each.name, random_cache(each.shape, np.dtype(each.dtype))) for each in tiles)


def _layout(buffers: Iterable[Buffer]) -> tuple[dict[str, tuple[Buffer, int]], bytes]:
    """Where each tensor begins in the file, and what stands before them."""
    entries: dict[str, Any] = {"__metadata__": {"format": plans.FORMAT}}
    starts: dict[str, tuple[Buffer, int]] = {}
    end = 0
    for each in buffers:
        entries[each.name] = {
            "dtype": DTYPES[each.dtype].short.upper(),
            "shape": list(each.shape),
            "data_offsets": [end, end + each.bytes],
        }
        starts[each.name] = each, end
        end += each.bytes
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    return {name: (each, len(header) + start) for name, (each, start) in starts.items()}, header


def _put(file: BinaryIO, array: np.ndarray, buffer: Buffer, start: int) -> None:
    if array.nbytes != buffer.bytes or str(array.dtype) != buffer.dtype:
        raise TuneBenchError(
            f"{buffer.name} is {array.dtype} {list(array.shape)}, and the plan has "
            f"{buffer.dtype} {list(buffer.shape)}.",
            "Use the weights of this very model and scheme.",
        )
    file.seek(start)
    file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
