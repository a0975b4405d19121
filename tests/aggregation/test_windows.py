from itertools import product

import pytest
import torch

from patchproof.aggregation import Windows

SHAPES = [
    Windows(grid, size, wraps)
    for grid, size in (
        ((1, 7), (1, 1)),
        ((1, 7), (1, 5)),
        ((1, 7), (1, 7)),
        ((4, 5), (2, 3)),
        ((4, 5), (3, 1)),
        ((4, 5), (4, 2)),
        ((4, 5), (4, 5)),
    )
    for wraps in ((False, False), (False, True), (True, True))
]


@pytest.mark.parametrize("windows", SHAPES, ids=str)
def test_sums_inside_and_outside_are_those_of_the_members(windows):
    values = torch.randint(0, 100, (2, windows.grid[0] * windows.grid[1], 3)).double()
    members = windows.members.double()
    assert torch.equal(windows.inside(values).flatten(1, 2), members @ values)
    assert torch.equal(windows.outside(values).flatten(1, 2), (1 - members) @ values)


@pytest.mark.parametrize("windows", SHAPES, ids=str)
def test_windows_are_all_placements_once(windows):
    height, width = windows.size
    expected = set()
    for top, left in product(*(range(length) for length in windows.grid)):
        rows = [top + step for step in range(height)]
        columns = [left + step for step in range(width)]
        if (windows.wraps[0] or rows[-1] < windows.grid[0]) and (
            windows.wraps[1] or columns[-1] < windows.grid[1]
        ):
            inside = torch.zeros(windows.grid, dtype=torch.bool)
            for row, column in product(rows, columns):
                inside[row % windows.grid[0], column % windows.grid[1]] = True
            expected.add(tuple(inside.flatten().tolist()))
    members = [tuple(row) for row in windows.members.tolist()]
    assert len(members) == len(set(members)) == windows.positions[0] * windows.positions[1]
    assert set(members) == expected


def test_nothing_inside_a_window_is_in_the_sum_outside():
    windows = Windows((5, 6), (2, 3))
    values = torch.ones(1, 30, 1).double()
    for index, member in enumerate(windows.members):
        attacked = values.clone()
        attacked[:, member] = 1e300
        assert windows.outside(attacked).flatten()[index] == 24


def test_containing_windows_hold_every_cell():
    windows = Windows((3, 4), (2, 2))
    patterns = torch.rand(50, 12, generator=torch.Generator().manual_seed(0)) < 0.15
    expected = (~patterns[:, None] | windows.members).all(2)
    assert torch.equal(windows.containing(patterns), expected)
    assert expected.any()
