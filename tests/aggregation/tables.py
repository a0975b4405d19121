"""Small tables of scores, and everything that an attacker can make of them."""

from itertools import product

import torch

from patchproof.results import Outputs

CLASSES = 2


def recorded(scores):
    """Return outputs that know all scores, (N, V, C)."""
    images, views, classes = scores.shape
    outputs = Outputs.empty(images, views, classes, keep_scores=True)
    places = torch.arange(views).expand(images, -1)
    outputs.record(torch.arange(images)[:, None].expand_as(places), places, scores.float())
    return outputs


def boxes(grid, size, wraps=(False, False)):
    """Return the boxes of cells of one size, (P, V) bool, of a patch that may leave the grid."""
    found = set()
    for top, left in product(range(1 - size[0], grid[0]), range(1 - size[1], grid[1])):
        cells = [
            (row % grid[0], column % grid[1])
            for row in range(top, top + size[0])
            for column in range(left, left + size[1])
            if (wraps[0] or 0 <= row < grid[0]) and (wraps[1] or 0 <= column < grid[1])
        ]
        inside = torch.zeros(grid, dtype=torch.bool)
        inside[tuple(torch.tensor(cells).T)] = True
        found.add(tuple(inside.flatten().tolist()))
    return torch.tensor(sorted(found))


def attacked(scores, pattern, choices):
    """Return every table that the attacker can make of (N, V, C) scores, (N, T, V, C)."""
    cells = pattern.nonzero().squeeze(1)
    contents = torch.tensor(list(product(choices, repeat=CLASSES)))
    tables = torch.cartesian_prod(*[torch.arange(len(contents))] * len(cells)).view(-1, len(cells))
    made = scores[:, None].repeat(1, len(tables), 1, 1)
    made[:, :, cells] = contents[tables]
    return made


def integer_scores(cells, images=60, seed=0, low=-1, high=4):
    """Return scores of which half lean to class 0, (N, V, C)."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(low, high, (images, cells, CLASSES), generator=generator).float()
    scores[::2, :, 0] += 2
    return scores
