"""How prompts are cut: by expected times where they are known, by a rule where not."""

from __future__ import annotations

import itertools

import pytest

from tunebench.engines.chunked import Chunk, split_prompt

H100 = {1: 2.4e6, 16: 24e6, 512: 14e6}  # nanoseconds, where 512 is tuned and 16 is not


@pytest.mark.parametrize(
    ("n", "position", "times", "cut"),
    [
        (128, 0, H100, [Chunk(512, 128)]),  # not eight untuned ones of 16
        (513, 0, H100, [Chunk(512, 512), Chunk(1, 1)]),
        (3, 0, H100, [Chunk(1, 1)] * 3),
        (128, 1920, H100, [Chunk(16, 16)] * 8),  # 512 would end beyond the context
        (128, 0, {**H100, 16: 1e6}, [Chunk(16, 16)] * 8),
        (17, 0, {**H100, 16: 1e6}, [Chunk(16, 16), Chunk(16, 1)]),
        (128, 0, {1: 2.4e6, 512: 14e6}, [Chunk(16, 16)] * 8),  # not known of 16
        (300, 0, {}, [Chunk(512, 300)]),
        (20, 0, {}, [Chunk(16, 16)] + [Chunk(1, 1)] * 4),
    ],
)
def test_a_prompt_is_cut(n: int, position: int, times: dict[int, float], cut: list[Chunk]) -> None:
    assert split_prompt(n, position, (16, 512), 2048, times) == cut


@pytest.mark.parametrize("times", [(3, 7, 11), (1, 9, 9), (5, 6, 30), (10, 1, 1)])
@pytest.mark.parametrize("position", [0, 9])
def test_no_cut_is_expected_to_be_faster(times: tuple[float, ...], position: int) -> None:
    """Against every cut there is, in a context of 16."""
    sizes = (1, 3, 5)
    each = dict(zip(sizes, times, strict=True))
    for n in range(1, 17 - position):
        found = split_prompt(n, position, sizes[1:], 16, each)
        assert sum(chunk.valid for chunk in found) == n
        assert all(chunk.valid == chunk.size for chunk in found[:-1])
        assert position + sum(chunk.size for chunk in found) <= 16
        best = min(
            sum(each[size] for size in cut)
            for count in range(1, n + 1)
            for cut in itertools.combinations_with_replacement(sizes, count)
            if n <= sum(cut) <= 16 - position
        )
        assert sum(each[chunk.size] for chunk in found) == best
