"""The masks of greedy cutout: which pair is found, among what, and what the search leaves alone."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from patchproof.errors import PatchproofError
from patchproof.models import ModelSpec, build_model
from patchproof.threat import SquarePatch
from patchproof.training import GreedyMasks
from patchproof.training.masking import draw_candidates, greedy_pair

PIXELS = torch.eye(4, dtype=torch.bool).reshape(4, 2, 2)
"""Four masks of one pixel each, for images of 2x2."""


class Evidence(nn.Module):
    """Logits (evidence for class 0, 0) where the evidence is a function of the four pixels."""

    def __init__(self, redundant: bool) -> None:
        super().__init__()
        self.redundant = redundant

    def forward(self, images: Tensor) -> Tensor:
        a, b, c, d = images.flatten(1).unbind(1)
        evidence = 5 * torch.maximum(a, b) + c if self.redundant else 3 * a + b + 5 * c + 2 * d
        return torch.stack([evidence, torch.zeros_like(evidence)], 1)


def hidden(pair: Tensor) -> list[set[int]]:
    return [set(image.flatten().nonzero().flatten().tolist()) for image in pair]


class TestPair:
    images = torch.ones(1, 1, 2, 2)
    label = torch.zeros(1, dtype=torch.int64)

    def test_the_two_strongest_pieces_of_evidence_are_hidden(self) -> None:
        pair = greedy_pair(Evidence(False), self.images, self.label, PIXELS, 4, 0.0)
        assert pair.shape == (1, 1, 2, 2)
        assert pair.dtype == torch.bool
        assert hidden(pair) == [{0, 2}]

    def test_the_label_decides_what_hurts(self) -> None:
        # For class 1 every mask helps; the mask of b helps least, and once more not at all.
        labels = torch.tensor([0, 1])
        images = self.images.expand(2, -1, -1, -1)
        pair = greedy_pair(Evidence(False), images, labels, PIXELS, 4, 0.0)
        assert hidden(pair) == [{0, 2}, {1}]

    def test_it_is_greedy_where_only_two_masks_together_hurt_more(self) -> None:
        # {a, b} would take 5 away; one mask alone takes most where it hides c.
        pair = greedy_pair(Evidence(True), self.images, self.label, PIXELS, 4, 0.0)
        assert 2 in hidden(pair)[0]
        assert hidden(pair) != [{0, 1}]

    def test_masked_pixels_take_the_fill(self) -> None:
        # With a fill above the pixels, masks add evidence: the weakest masks hurt most.
        pair = greedy_pair(Evidence(False), self.images / 2, self.label, PIXELS, 4, 1.0)
        assert hidden(pair) == [{1}]

    def test_it_equals_two_rounds_of_trying_every_mask_by_itself(self) -> None:
        torch.manual_seed(0)
        network = build_model(ModelSpec("tiny-resnet", 4, 1, (8, 8), {"widths": [4, 8]}))
        images, labels = torch.rand(12, 1, 8, 8), torch.arange(12) % 4
        masks = GreedyMasks(SquarePatch(2), (4, 3)).masked((8, 8))
        assert len(masks) == 12
        expected = []
        with torch.no_grad():
            for image, label in zip(images, labels, strict=True):
                union = torch.zeros(8, 8, dtype=torch.bool)
                for _ in range(2):
                    losses = [
                        functional.cross_entropy(
                            network(torch.where(union | mask, 0.5, image).unsqueeze(0)),
                            label.unsqueeze(0),
                        )
                        for mask in masks
                    ]
                    union = union | masks[torch.stack(losses).argmax()]
                expected.append(union)
        found = greedy_pair(network, images, labels, masks, 100, 0.5)
        assert torch.equal(found.squeeze(1), torch.stack(expected))
        assert len({tuple(union.flatten().tolist()) for union in expected}) > 3


class TestCandidates:
    def test_all_masks_are_tried_where_there_are_no_more(self) -> None:
        state = torch.get_rng_state()
        for candidates in (5, 6):
            assert draw_candidates(2, 5, candidates).tolist() == [[0, 1, 2, 3, 4]] * 2
        assert torch.equal(torch.get_rng_state(), state)

    def test_each_image_has_its_own_distinct_ones(self) -> None:
        torch.manual_seed(0)
        drawn = draw_candidates(3000, 6, 2)
        assert drawn.shape == (3000, 2)
        counts = {pair: 0 for pair in product(range(6), range(6)) if pair[0] != pair[1]}
        for first, second in drawn.tolist():
            counts[first, second] += 1  # a KeyError would be one mask drawn twice
        assert min(counts.values()) > 50

    def test_the_pair_is_among_them(self) -> None:
        # Nothing is as bad as hiding pixels 2 and 0, but with one candidate a round is a draw.
        torch.manual_seed(0)
        images, labels = torch.ones(500, 1, 2, 2), torch.zeros(500, dtype=torch.int64)
        pairs = hidden(greedy_pair(Evidence(False), images, labels, PIXELS, 1, 0.0))
        assert {frozenset(pair) for pair in pairs} == {
            frozenset(pair) for pair in product(range(4), range(4))
        }


@pytest.mark.parametrize("mode", [True, False])
def test_the_search_leaves_the_network_as_it_was(mode: bool) -> None:
    torch.manual_seed(0)
    network = build_model(ModelSpec("tiny-resnet", 10, 1, (8, 8), {"widths": [4, 8]})).train(mode)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert any("running_mean" in name for name in before)
    images, labels = torch.rand(6, 1, 8, 8), torch.arange(6)
    masks = GreedyMasks(SquarePatch(2), (3, 3)).masked((8, 8))
    untouched = images.clone()
    greedy_pair(network, images, labels, masks, 4, 0.5)
    assert network.training is mode
    assert torch.equal(images, untouched)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_weights_still_learn_after_a_search_in_mixed_precision() -> None:
    torch.manual_seed(0)
    network = build_model(ModelSpec("tiny-resnet", 10, 1, (8, 8), {"widths": [4, 8]}))
    images, labels = torch.rand(6, 1, 8, 8), torch.arange(6)
    masks = GreedyMasks(SquarePatch(2), (3, 3)).masked((8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        greedy_pair(network, images, labels, masks, 4, 0.5)
        loss = functional.cross_entropy(network(images), labels)
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    assert all(bool(gradient.any()) for gradient in gradients)


def test_no_candidates_are_refused() -> None:
    with pytest.raises(PatchproofError, match="at least 1 candidate mask, got 0"):
        GreedyMasks(SquarePatch(2), candidates=0)
