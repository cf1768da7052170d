"""What a line of a database must look like before TVM is given it: records from elsewhere are data, not instructions.

TVM's own readers crash on some of what does not fit, load whatever an object's type names, and a schedule may carry
source code in its annotations. So everything here is a list of what is allowed, and the rest is refused.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterable
from typing import Any

import msgspec

DEEPEST = 24  # lists within lists
LONGEST_TEXT = 1 << 16
LARGEST = 2**53  # of an integer
OURS = "tunebench."

KINDS: dict[str, tuple[int, int | None, str, int | None]] = {
    # instruction: fewest and most inputs, a letter of ATTRIBUTES each, outputs; None: as many as there are
    "AddUnitLoop": (1, 1, "", 1),
    "Annotate": (2, 2, "s", 0),
    "Bind": (1, 1, "s", 0),
    "Blockize": (1, 1, "i", 1),
    "CacheIndex": (1, 1, "si", None),
    "CacheInplace": (1, 1, "is", None),
    "CacheRead": (1, None, "is", 1),
    "CacheWrite": (1, None, "is", 1),
    "ComputeAt": (2, 2, "ii", 0),
    "ComputeInline": (1, 1, "", 0),
    "DecomposePadding": (2, 2, "", 1),
    "DecomposeReduction": (2, 2, "", 1),
    "EnterPostproc": (0, 0, "", 0),
    "Fuse": (1, None, "i", 1),
    "GetChildBlocks": (1, 1, "", None),
    "GetConsumers": (1, 1, "", None),
    "GetLoops": (1, 1, "", None),
    "GetOutputBlocks": (0, 0, "ss", None),
    "GetProducers": (1, 1, "", None),
    "GetSBlock": (0, 0, "ss", 1),
    "LoopPartition": (2, None, "i", None),
    "Merge": (1, None, "", 1),
    "PadEinsum": (1, 1, "l", 0),
    "Parallel": (1, 1, "", 0),
    "RFactor": (1, 1, "i", 1),
    "ReIndex": (1, 1, "ii", 1),
    "Reorder": (1, None, "", 0),
    "ReorderBlockIterVar": (1, 1, "l", 0),
    "ReverseComputeAt": (2, 2, "ii", 0),
    "ReverseComputeInline": (1, 1, "", 0),
    "RollingBuffer": (1, 1, "ii", 0),
    "SampleCategorical": (0, 0, "ll", 1),
    "SampleComputeLocation": (1, 1, "", 1),
    "SamplePartitionedTile": (1, 1, "iii", None),
    "SamplePerfectTile": (1, 1, "ii", None),
    "SetAxisSeparator": (1, 1, "iil", 0),
    "SetScope": (1, 1, "is", 0),
    "Split": (2, None, "ii", None),
    "StorageAlign": (1, 1, "iiii", 0),
    "Tensorize": (1, 1, "si", 0),
    "TransformBlockLayout": (1, 1, "m", 0),
    "TransformLayout": (2, 2, "iini", 0),
    "Unannotate": (1, 1, "s", 0),
    "Unroll": (1, 1, "", 0),
    "Vectorize": (1, 1, "", 0),
}
ATTRIBUTES: dict[str, type] = {"s": str, "i": int, "l": list, "n": type(None), "m": str}
VALUES_FROM = {"Annotate": 1, "Split": 1, "TransformLayout": 1}  # the input from which on they need not be variables
ANNOTATIONS = re.compile(
    r"tunebench\.(template|decision\.\w+)|meta_schedule\.[\w.]+|pragma_(auto_unroll_max_step|unroll_explicit)"
    r"|warp_execution|software_pipeline_\w+|double_buffer_scope|tirx?\.manifest_shared_memory_local_stage"
)
"""Keys that schedule; other pragmas bring source code of their own into a kernel."""
VARIABLE = re.compile(r"[A-Za-z_]\w*")
DTYPE = re.compile(r"[a-z]+[0-9a-z_]*(x\d+)?")
NODES = re.compile(
    r"None|bool|int|float|DataType|ffi\.(String|Array|Map|List|Dict|Shape)|(ir|prim|tirx|s_tir|relax)\.[\w.]+"
)
"""Types of a module's graph; others load libraries and functions."""
NOT_IN_INDICES = ("ir.Call", "ir.Op")
OPERATORS = re.compile(r"tirx\.(?!\w*(call|extern|packed|tvm_|asm|ptx|lookup|import))\w+")

Instruction = tuple[str, list[Any], list[Any], list[str]]
Record = tuple[
    int,
    tuple[
        tuple[list[Instruction], list[tuple[int, Any]]],
        list[float] | None,
        dict[str, Any] | None,
        list[tuple[str, str, list[int]]] | None,
    ],
]
_RECORD = msgspec.json.Decoder(Record)
_WORKLOAD = msgspec.json.Decoder(tuple[str, str])
_GRAPH = msgspec.json.Decoder(dict[str, Any])


def check_workload(line: bytes) -> None:
    """ValueError where a line is no workload: a hash, and the length and graph of a module as base64."""
    digest, text = _WORKLOAD.decode(line)
    _need(digest.isdigit() and int(digest) < 2**64, "its hash is no number of 64 bits")
    data = base64.b64decode(text, validate=True)
    _need(int.from_bytes(data[:8], "little") == len(data) - 8, "its module has another length than it says")
    check_graph(data[8:])


def check_graph(text: bytes, forbidden: Iterable[str] = ()) -> None:
    """ValueError where JSON is no graph of TVM's objects, or holds others than expressions, loops and buffers."""
    graph = _GRAPH.decode(text)
    nodes, root = graph.get("nodes"), graph.get("root_index")
    nodes = nodes if isinstance(nodes, list) else []
    _need(type(root) is int and 0 <= root < len(nodes), "its module has no root")
    for node in nodes:
        kind = node.get("type") if isinstance(node, dict) else None
        _need(isinstance(kind, str) and NODES.fullmatch(kind) and kind not in forbidden, f"a node of type {kind!r:.60}")
        if kind == "ir.Op":
            name = node.get("data")
            _need(isinstance(name, str) and OPERATORS.fullmatch(name), f"a call of {name!r:.60}")
        _check_value(node.get("data"))


def check_record(line: bytes) -> int:
    """The line number of a record's workload, from 0; ValueError where it is no tuning record."""
    record: Record = _RECORD.decode(line)
    workload, ((instructions, decisions), run_secs, target, arguments) = record
    _need(0 <= workload < LARGEST, "its workload has no number")
    known: set[str] = set()
    for each in instructions:
        _check_instruction(each, known)
    _check_decisions(instructions, decisions)
    _need(all(math.isfinite(value) and value > 0 for value in run_secs or ()), "its time is no time")
    _check_value(target)
    for tag, dtype, shape in arguments or ():
        _need(tag == "TENSOR" and DTYPE.fullmatch(dtype), "its arguments are no tensors")
        _need(all(0 <= extent < LARGEST for extent in shape), "an argument's shape is no shape")
    return workload


def _check_instruction(instruction: Instruction, known: set[str]) -> None:
    kind, inputs, attributes, outputs = instruction
    _need(kind in KINDS, f"an instruction {kind!r:.60} that TuneBench does not know")
    fewest, most, letters, n_outputs = KINDS[kind]
    fits = fewest <= len(inputs) <= (len(inputs) if most is None else most) and len(attributes) == len(letters)
    _need(fits and len(outputs) == (len(outputs) if n_outputs is None else n_outputs), f"{kind} of another length")
    for place, value in enumerate(inputs):
        if place < VALUES_FROM.get(kind, len(inputs)):
            variables = value if isinstance(value, list) else [value]
            _need(all(isinstance(name, str) and name in known for name in variables), f"{kind} of what nothing defined")
        else:
            _check_input(kind, value, known)
    for letter, value in zip(letters, attributes, strict=True):
        _check_value(value)
        _need(isinstance(value, ATTRIBUTES[letter]), f"{kind} with an attribute of another type")
        if letter == "m":  # an index map
            check_graph(value.encode(), NOT_IN_INDICES)
    if kind in ("Annotate", "Unannotate"):
        key = attributes[0]
        _need(isinstance(key, str) and ANNOTATIONS.fullmatch(key), f"an annotation {key!r:.60}")
    if kind == "SampleCategorical":
        _check_candidates(*attributes)
    for name in outputs:
        _need(VARIABLE.fullmatch(name) and name not in known, f"{kind} defines {name!r:.60} again")
        known.add(name)


def _check_input(kind: str, value: Any, known: set[str]) -> None:
    """A variable defined before, a quoted text, a number, nothing, or lists of them; for a layout, its index map."""
    _check_value(value)
    if isinstance(value, list):
        for each in value:
            _check_input(kind, each, known)
    elif isinstance(value, str):
        if value.startswith("{"):
            _need(kind == "TransformLayout", f"{kind} of an object")
            check_graph(value.encode(), NOT_IN_INDICES)
        else:
            quoted = len(value) > 1 and value[0] == value[-1] == '"'
            _need(quoted or value == "None" or value in known, f"{kind} of {value!r:.60}, which nothing defined")
    else:
        _need(value is None or isinstance(value, int | float), f"{kind} of a value of another kind")


def _check_candidates(candidates: Any, chances: Any) -> None:
    fits = isinstance(candidates, list) and isinstance(chances, list) and len(candidates) == len(chances) > 0
    _need(fits and all(type(value) is int for value in candidates), "a choice without candidates")
    _need(all(isinstance(value, int | float) and 0 <= value <= 1 for value in chances), "a choice without chances")


def _check_decisions(instructions: list[Instruction], decisions: list[tuple[int, Any]]) -> None:
    for place, decision in decisions:
        _need(0 <= place < len(instructions), "a decision of no instruction")
        kind, _, attributes, _ = instructions[place]
        _need(kind.startswith("Sample"), f"a decision of {kind}")
        values = decision if isinstance(decision, list) else [decision]
        _need(all(type(value) is int and abs(value) < LARGEST for value in values), f"a decision {decision!r:.60}")
        if kind == "SampleCategorical":
            _need(type(decision) is int and 0 <= decision < len(attributes[0]), "a decision for no candidate")


def _check_value(value: Any, depth: int = 0) -> None:
    """ValueError for JSON that is too deep, or has numbers or texts of no size that a schedule could have."""
    _need(depth < DEEPEST, "lists within lists within lists")
    if isinstance(value, str):
        _need(len(value) < LONGEST_TEXT, "a text of no end")
    elif isinstance(value, int | float):
        _need(math.isfinite(value) and (isinstance(value, float) or abs(value) < 2**64), "a number of no size")
    elif isinstance(value, list | dict):
        for each in value.values() if isinstance(value, dict) else value:
            _check_value(each, depth + 1)


def _need(holds: object, words: str) -> None:
    if not holds:
        raise ValueError(words)
