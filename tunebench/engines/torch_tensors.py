"""Stored weights as PyTorch's tensors: moved as they are stored, and dequantized where they are computed with.

The numbers are those of each kind's own `dequantize`, bit for bit: the same operations in the same order, in float32.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from tunebench.model import quantization
from tunebench.model.quantization import ORDER, Array, Arrays, codes, integer
from tunebench.spec import WHOLE_ROW, WeightFormat

BLOCK = 1 << 22  # weights that are dequantized at a time


def tensor(array: Array, device: str) -> Any:
    """An array on a device; words of 32 bits as int32, as PyTorch shifts no others."""
    import torch

    array = np.ascontiguousarray(array)
    if array.dtype.name == "bfloat16":  # numpy's bfloat16 is not torch's, but has the same bits
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(array.view(np.int32) if array.dtype == np.uint32 else array).to(device)


def dequantized(form: WeightFormat, parts: Arrays, n: int, k: int, dtype: Any, device: str) -> Any:
    """The parts of a matrix [n, k] -> the matrix in a float type of PyTorch's, on a device."""
    import torch

    if form.kind not in FLOATS:
        whole = parts["weight"] if form.kind == "float" else quantization.kind_of(form).dequantize(form, parts)
        return tensor(whole[:n, :k], device).to(dtype)
    rows: dict[str, Any] = {
        name: integer.by_row(form, tensor(part, device)) for name, part in parts.items() if name != ORDER
    }
    if form.rows > 1:
        rows["q_scale"] = rows["q_scale"].repeat_interleave(form.rows, 0)
    columns = tensor(np.argsort(parts[ORDER]), device) if form.ordered else slice(k)
    found = torch.empty((n, k), dtype=dtype, device=device)
    step = max(BLOCK // k, 1)
    for start in range(0, n, step):
        place = slice(start, min(start + step, n))
        floats = FLOATS[form.kind](form, {name: part[place] for name, part in rows.items()})
        found[place] = floats[:, columns]
    return found


def _unpacked(form: WeightFormat, words: Any, first: int = 0) -> Any:
    """Words [N, K / per word] -> unsigned integers, int32 [N, K]; their lowest bit becomes bit `first`."""
    import torch

    shifts = integer.shift_of(form, torch.arange(32 // form.bits, dtype=torch.int32, device=words.device))
    found = ((words[..., None] >> shifts) & ((1 << form.bits) - 1)).flatten(1)
    return found << first if first else found


def _integers(form: WeightFormat, rows: dict[str, Any]) -> Any:
    """Parts by row of integers -> float32 [N, K]."""
    planes = [_unpacked(plane, rows[name], first) for name, (first, plane) in integer.planes_of(form).items()]
    shortest = min(plane.shape[1] for plane in planes)
    steps = functools.reduce(operator.or_, [plane[:, :shortest] for plane in planes]).float()
    groups = rows["q_scale"].shape[1]
    steps = _in_groups(steps, groups, form)

    def of(name: str) -> Any:
        values = rows[name].float()
        if form.super_group:
            shared = rows[integer.SUPER_PARTS[name]].float().repeat_interleave(form.super_group // form.group, 1)
            values = shared[:, :groups] * values
        return values[..., None]

    if form.zero == "minimum":
        return (steps * of("q_scale") + of("q_min")).flatten(1)
    zero = of("q_zero") if form.zero == "zero_point" else float(form.zero_point)
    return ((steps - zero) * of("q_scale")).flatten(1)


def _codes(form: WeightFormat, rows: dict[str, Any]) -> Any:
    """Parts by row of codes -> float32 [N, K]."""
    scale = rows["q_scale"]
    scale = _decoded(scale, 8, form.dtype) if scale.element_size() == 1 else scale.float()
    scale = scale / rows["q_super"] if form.super_group else scale
    steps = _decoded(_unpacked(form, rows["q_weight"]), form.bits, form.code)
    return (_in_groups(steps, scale.shape[1], form) * scale[..., None]).flatten(1)


def _decoded(found: Any, bits: int, name: str) -> Any:
    """Unsigned integers of so many bits -> the float32 that each is the code of."""
    return tensor(codes.decoded(np.arange(1 << bits), name), found.device)[found.int()]


def _in_groups(steps: Any, groups: int, form: WeightFormat) -> Any:
    """[N, K] -> [N, groups, group], without what pads the last word."""
    group = steps.shape[1] if form.group == WHOLE_ROW else form.group
    return steps[:, : groups * group].unflatten(1, (groups, group))


FLOATS: dict[str, Callable[[WeightFormat, dict[str, Any]], Any]] = {"integer": _integers, "codes": _codes}
"""By kind, what a device dequantizes; the host does the others."""
