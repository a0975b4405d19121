"""Every threat against a full adversary over the deployed ``predict``, pixels counted by hand."""

from itertools import combinations_with_replacement, pairwise

import pytest
import torch
from feature_models import SIZE, Hostile, HostileBands, mild_images
from torch import Tensor, nn

import patchproof as pp
from patchproof.aggregation import ChallengerGame, DoubleMasking
from patchproof.errors import PatchproofError
from patchproof.models.ablation import Ablation
from patchproof.results import Outputs, Verdict
from patchproof.views import MaskPairViews

# name: threat, image size, masks per side, the pixels of every patch (row * width + column)
CASES = {
    "two pixels": (
        pp.MultiplePatches(2, pp.SquarePatch(1)), (1, 6), (1, 3), [[i] for i in range(6)],
    ),
    "three pixels": (
        pp.MultiplePatches(3, pp.SquarePatch(1)), (1, 4), (1, 2), [[i] for i in range(4)],
    ),
    "two dominoes": (
        pp.MultiplePatches(2, pp.RectanglePatch(1, 2)), (1, 5), (1, 3),
        [[i, i + 1] for i in range(4)],
    ),
    "dominoes either way": (
        pp.RectanglePatches([(1, 2), (2, 1)]), (2, 4), (1, 2),
        [[r * 4 + c, r * 4 + c + 1] for r in range(2) for c in range(3)]
        + [[c, c + 4] for c in range(4)],
    ),
    "any rectangle": (
        pp.AnyRectangle(2), (2, 3), (1, 2),
        [[p] for p in range(6)] + [[0, 1], [1, 2], [3, 4], [4, 5], [0, 3], [1, 4], [2, 5]],
    ),
    "diagonal": (
        pp.StencilPatch(["#.", ".#"]), (2, 5), (1, 4), [[c, 5 + c + 1] for c in range(4)],
    ),
    "two diagonals": (
        pp.MultiplePatches(2, pp.StencilPatch(["#.", ".#"])), (2, 4), (1, 3),
        [[c, 4 + c + 1] for c in range(3)],
    ),
    "domino or diagonal": (
        pp.AnyPatch([pp.RectanglePatch(1, 2), pp.StencilPatch(["#.", ".#"])]), (2, 3), (1, 2),
        [[0, 1], [1, 2], [3, 4], [4, 5], [0, 4], [1, 5]],
    ),
    "two dominoes or gaps": (
        pp.MultiplePatches(2, pp.AnyPatch([pp.RectanglePatch(1, 2), pp.StencilPatch(["#.#"])])),
        (1, 4), (1, 2), [[0, 1], [1, 2], [2, 3], [0, 2], [1, 3]],
    ),
}  # fmt: skip


def every_table(views: int, classes: int) -> Outputs:
    """Return all tables of labels of the views, invalid labels included."""
    tables = torch.cartesian_prod(*[torch.arange(-1, classes)] * views).view(-1, views)
    return Outputs(tables, torch.ones(tables.shape), torch.ones_like(tables) > 0, classes)


def attacked_views(views: MaskPairViews, size: tuple[int, int], placed: list[list[int]]) -> Tensor:
    """Return the views that show a pixel of the patches, (V,) bool."""
    pixels = [pixel for patch in placed for pixel in patch]
    return (~views.hidden.pixels()).flatten(1)[:, pixels].any(1)


@pytest.mark.parametrize("game", [DoubleMasking, ChallengerGame])
@pytest.mark.parametrize("name", CASES)
def test_a_table_is_certified_if_and_only_if_no_choice_of_places_and_labels_beats_it(name, game):
    """Necessary for double masking alone; the challenger's certificate is sufficient."""
    threat, size, masks_per_side, patches = CASES[name]
    views = MaskPairViews(pp.MaskSet.for_threat(threat, size, masks_per_side), 0.5)
    classes = 2 if views.count > 7 else 3
    outputs = every_table(views.count, classes)
    aggregation = game(views.pair_to_view, 0.0)
    right = torch.zeros(len(outputs.labels), dtype=torch.int64)
    patterns = views.corruption(threat).patterns
    verdicts = aggregation.certify(outputs, right, patterns)
    certified = (verdicts == Verdict.HOLDS).all(1)
    wrong = (aggregation.predict(outputs)[0] != 0).float()
    weights = (classes + 1) ** torch.arange(views.count)
    truth = torch.ones(len(wrong), dtype=torch.bool)
    finite = (outputs.labels >= 0).all(1)  # else `certify` gives the attacker more
    for placed in combinations_with_replacement(patches, threat.patches):
        free = attacked_views(views, size, list(placed))
        benign = ((outputs.labels + 1) * weights * ~free).sum(1)
        _, group = benign.unique(return_inverse=True)
        beaten = torch.zeros(int(group.max()) + 1).index_add_(0, group, wrong)
        truth &= beaten[group] == 0
    assert not (certified & ~truth).any()
    assert 0 < int(certified.sum()) < len(truth)
    if game is DoubleMasking:
        assert torch.equal(certified[finite], truth[finite])
    assert not (aggregation.paper_condition(outputs, right, patterns) & ~certified).any()


class Lookup(nn.Module):
    """Scores images of the values 0, 0.5 and 1 by a table: mostly class 0."""

    def __init__(self, pixels: int, seed: int) -> None:
        super().__init__()
        draws = torch.rand(3**pixels, 3, generator=torch.Generator().manual_seed(seed))
        self.scores = draws + torch.tensor([0.75, 0.0, 0.0])
        self.weights = 3 ** torch.arange(pixels)

    def forward(self, images: Tensor) -> Tensor:
        return self.scores[((2 * images).round().long().flatten(1) * self.weights).sum(1)]


@pytest.mark.parametrize("inference", ["double", "challenger"])
@pytest.mark.parametrize("name", CASES)
def test_no_content_at_any_place_breaks_a_certificate(name, inference):
    threat, size, masks_per_side, patches = CASES[name]
    pixels = size[0] * size[1]
    images = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * pixels)
    if len(images) > 64:
        images = images[
            torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:64]
        ]
    certified = attacks = 0
    for seed in range(3):
        defense = pp.PatchCleanser(
            Lookup(pixels, seed).eval(), threat, image_size=size, inference=inference,
            masks_per_side=masks_per_side, tolerance=0.0,
        )  # fmt: skip
        labels = torch.zeros(len(images), dtype=torch.int64)
        kept = images[defense.certify(images.view(-1, 1, *size), labels).certified]
        certified += len(kept)
        for placed in combinations_with_replacement(patches, threat.patches):
            inside = sorted({pixel for patch in placed for pixel in patch})
            contents = torch.cartesian_prod(*[torch.tensor([0.0, 0.5, 1.0])] * len(inside))
            attacked = kept.repeat_interleave(len(contents), 0)
            attacked[:, inside] = contents.view(len(contents), -1).repeat(len(kept), 1)
            attacks += len(attacked)
            if len(attacked):
                assert (defense.predict(attacked.view(-1, 1, *size)) == 0).all()
    assert certified > 0
    assert attacks > 500


def test_a_second_patch_and_a_wider_choice_of_shapes_never_certify_more():
    size, images = (1, 9), torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 9).view(-1, 1, 1, 9)
    chain = [
        pp.SquarePatch(1),
        pp.RectanglePatches([(1, 1), (1, 2)]),
        pp.AnyRectangle(3),
        pp.MultiplePatches(2, pp.AnyRectangle(3)),
    ]
    masks = pp.MaskSet.for_threat(chain[-1], size, (1, 4))
    certified = [
        pp.PatchCleanser(Lookup(9, 0).eval(), threat, image_size=size, mask_set=masks)
        .certify(images, torch.zeros(len(images), dtype=torch.int64))
        .certified
        for threat in chain
    ]
    for narrower, wider in pairwise(certified):
        assert not (wider & ~narrower).any()
    assert certified[0].sum() > certified[-1].sum() > 0


KINDS = [
    pp.SquarePatch(2),
    pp.RectanglePatch(3, 1),
    pp.RectanglePatch(1, 3, "corners"),
    pp.StencilPatch(["#..", ".#.", "..#"]),
]
LINEAR = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
INDIFFERENT = {
    "bands": (pp.DerandomizedSmoothing, HostileBands(Ablation("column", 2)).eval(), {}),
    "votes": (pp.BagCert, Hostile(stride=2).eval(), {}),
    "intervals": (pp.IntervalBoundPropagation, LINEAR.eval(), {}),
    "masks": (
        pp.PatchCleanser,
        Hostile().eval(),
        {"mask_set": pp.MaskSet.for_threat(pp.AnyPatch(KINDS), SIZE, 2)},
    ),
}


@pytest.mark.parametrize("name", INDIFFERENT)
def test_a_patch_of_any_kind_is_certified_if_and_only_if_each_kind_is(name):
    """For defenses that look at the same whatever the threat is."""
    make, model, options = INDIFFERENT[name]
    torch.manual_seed(0)
    if model is LINEAR:
        nn.init.normal_(model[1].weight)
    images = mild_images(120)

    def certified(threat: pp.Threat) -> Tensor:
        defense = make(model, threat, image_size=SIZE, **options)
        return defense.certify(images, defense.predict(images)).certified

    each = torch.stack([certified(kind) for kind in KINDS])
    assert torch.equal(certified(pp.AnyPatch(KINDS)), each.all(0))
    assert 0 < each.all(0).sum() < each.sum(1).max()


class WrongUnderTheFirstTwoMasks(nn.Module):
    """Wrong if of the three thirds of a line exactly the first two are hidden."""

    def forward(self, images: Tensor) -> Tensor:
        hidden = (images.flatten(1) == 0.5).view(-1, 3, 2).all(2)
        wrong = (hidden[:, 0] & hidden[:, 1] & ~hidden[:, 2]).float()
        return torch.stack([1 - wrong, wrong], 1)


def test_a_region_of_several_patches_holds_if_it_does_with_the_others_anywhere():
    """Only patches in the first and second third are covered by no union but the wrong one."""
    image, right = torch.zeros(1, 1, 1, 6), torch.zeros(1, dtype=torch.int64)
    two = pp.PatchCleanser(
        WrongUnderTheFirstTwoMasks().eval(),
        pp.MultiplePatches(2, pp.SquarePatch(1)),
        image_size=(1, 6),
        masks_per_side=(1, 3),
    )
    result = two.certify(image, right, "never")
    assert (result.region_verdicts()[0] == Verdict.HOLDS).tolist() == [False] * 4 + [True] * 2
    assert result.vulnerability_map().tolist() == [[[1, 1, 1, 1, 0, 0]]]
    assert not result.certified
    one = pp.PatchCleanser(two.model, pp.SquarePatch(1), image_size=(1, 6), mask_set=two.mask_set)
    assert one.certify(image, right, "never").certified


def test_too_many_combinations_are_refused_with_their_number():
    with pytest.raises(PatchproofError, match=r"7,806 \(the unions of up to 3 of 36 masks\)"):
        pp.MaskSet.for_threat(pp.MultiplePatches(3, pp.SquarePatch(4)), (32, 32), 6)


@pytest.mark.parametrize(("side", "views"), [(4, 25 + 300 + 2300 + 12650), (5, 15037)])
def test_two_patches_at_five_masks_per_side_have_the_views_that_unions_make(side, views):
    """15,275 unions of up to four of 25 masks; masks moved back to the border repeat some."""
    masks = pp.MaskSet.for_threat(pp.MultiplePatches(2, pp.SquarePatch(side)), (32, 32), 5)
    assert len(masks) == 25 + 300
    assert MaskPairViews(masks, 0.5).count == views
