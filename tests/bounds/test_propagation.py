"""The fast algorithm against the plain one, and bounds against what patches really do."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional

from patchproof.bounds import BoundedNetwork, PatchBoxes, operators, patch_boxes
from patchproof.bounds.windows import distinct_pairs
from patchproof.errors import PatchproofError
from patchproof.models import ModelSpec, SmallResNet, build_model
from patchproof.threat import RectanglePatches, SquarePatch, StencilPatch
from patchproof.threat.regions import Regions


class Skipping(nn.Module):
    """A fully connected layer of which both an activation and the sum after it take the outputs."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(144, 16)
        self.last = nn.Linear(16, 3)

    def forward(self, images):
        hidden = self.enter(images.flatten(1))
        return self.last(torch.relu(hidden) + hidden)


class Residual(nn.Module):
    """Two branches whose windows differ in size, and a global mean."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.inner = nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Linear(4, 3)

    def forward(self, images):
        features = torch.relu(self.norm(self.enter(images - 0.5)))
        features = features + torch.tanh(self.inner(features))
        return self.last(features.mean((2, 3)))


class Extremes(nn.Module):
    """Maxima of maps that keep their shape, the axes counted from either end."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Conv2d(2, 5, 3)
        self.last = nn.Linear(5, 3)

    def forward(self, images):
        maxima = torch.amax(self.enter(images), dim=(-1, 2), keepdim=True)
        return self.last(torch.flatten(maxima, 1))


def networks():
    """Return networks for images (2, 9, 8) that use every operator."""
    torch.manual_seed(3)
    norm = nn.BatchNorm2d(3)
    with torch.no_grad():
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
    return {
        "perceptron": nn.Sequential(nn.Flatten(), nn.Linear(144, 9), nn.ReLU(), nn.Linear(9, 3)),
        "linear": nn.Sequential(nn.Flatten(), nn.Linear(144, 3)),
        "convolutions": nn.Sequential(
            nn.Conv2d(2, 3, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(3, 4, 3, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4 * 2 * 2, 8),
            nn.ReLU(),
            nn.Linear(8, 3),
        ),
        "pools": nn.Sequential(
            nn.Conv2d(2, 3, 2, dilation=2),
            norm,
            nn.LeakyReLU(0.2),
            nn.MaxPool2d(3, 2, 1),
            nn.AvgPool2d(2, 1),
            nn.Flatten(),
            nn.ELU(),
            nn.Linear(3 * 3 * 2, 3),
        ),
        "groups": nn.Sequential(
            nn.Conv2d(2, 4, 3, groups=2),
            nn.Sigmoid(),
            nn.Conv2d(4, 4, (1, 3), stride=(1, 2)),
            nn.Hardtanh(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 3),
        ),
        "scores": nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        ),
        "maxima": nn.Sequential(
            nn.Conv2d(2, 5, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(5, 3)
        ),
        "extremes": Extremes(),
        "residual": Residual(),
        "small-resnet": SmallResNet(3, 2, (2, 3), stem_stride=1),
    }


THREATS = {
    "square": SquarePatch(3),
    "rectangles": RectanglePatches([(1, 4), (4, 1)]),
    "diamond": StencilPatch([[0, 1, 0], [1, 1, 1], [0, 1, 0]]),
}


def examples(count=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 2, 9, 8, generator=generator)
    return images, torch.randint(0, 3, (count,), generator=generator)


@pytest.mark.parametrize("threat", THREATS)
@pytest.mark.parametrize("name", networks())
def test_the_fast_algorithm_gives_the_margins_of_the_plain_one(name, threat):
    network = BoundedNetwork(networks()[name].eval(), (2, 9, 8))
    images, labels = examples()
    regions = THREATS[threat].regions((9, 8))
    fast = network.lowest_margins(images, labels, regions)
    plain = network.plain_margins(images, labels, regions)
    assert (fast <= plain + 1e-6).all()  # it leaves room for rounding
    torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["perceptron", "convolutions"])
@pytest.mark.parametrize(
    "options",
    [
        {"memory_budget": 2**14},
        {"screen": 2},
        {"screen": 4},
        {"stop": True},
        {"stop": True, "screen": 3},
    ],
)
def test_verdicts_do_not_depend_on_how_regions_are_taken_together(name, options):
    model = networks()[name].eval()
    network = BoundedNetwork(model, (2, 9, 8))
    images, _ = examples(30)
    labels = torch.zeros(30, dtype=torch.int64)
    regions = SquarePatch(1).regions((9, 8))
    with torch.no_grad():  # half of the places hold
        model[-1].bias[0] -= network.lowest_margins(images, labels, regions).median()
    expected = network.lowest_margins(images, labels, regions)
    assert 0 < (expected > 0).float().mean() < 1  # some hold, some do not
    found = network.lowest_margins(images, labels, regions, **options)
    computed = ~found.isnan()
    assert torch.equal((found > 0)[computed], (expected > 0)[computed])
    assert torch.equal((found > 0).all(1), (expected > 0).all(1))
    assert (found <= expected + 1e-5)[computed].all()


@pytest.mark.parametrize("name", ["convolutions", "pools", "groups", "residual"])
def test_margins_and_gradients_do_not_depend_on_products_row_by_row(name, monkeypatch):
    images, labels = examples()
    boxes = patch_boxes(SquarePatch(2).regions((9, 8)))[0][1]
    found = []
    for worth in (0, 2**40):
        monkeypatch.setattr(operators, "_WORTH_BANDS", worth)
        torch.manual_seed(0)
        model = networks()[name].eval()
        network = BoundedNetwork(model, (2, 9, 8))
        margins = network.margins(network.prepare(images, labels, slack=False), boxes)
        functional.softplus(-margins).sum().backward()
        found.append([margins, *(parameter.grad for parameter in model.parameters())])
    assert all(gradient.abs().sum() > 0 for gradient in found[0][1:])
    for by_rows, whole in zip(*found, strict=True):
        torch.testing.assert_close(by_rows, whole, rtol=1e-4, atol=1e-4)


def test_margins_of_an_image_do_not_depend_on_the_other_images():
    network = BoundedNetwork(networks()["convolutions"].eval(), (2, 9, 8))
    images, labels = examples(20)
    regions = SquarePatch(2).regions((9, 8))
    together = network.lowest_margins(images, labels, regions)
    for number in range(20):
        alone = network.lowest_margins(images[number, None], labels[number, None], regions)
        torch.testing.assert_close(together[number, None], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", networks())
def test_no_content_of_a_patch_falls_below_the_bounds(name):
    model = networks()[name].eval()
    network = BoundedNetwork(model, (2, 9, 8))
    images, labels = examples(3)
    regions = SquarePatch(2).regions((9, 8))
    bounds = network.lowest_margins(images, labels, regions)
    corners = torch.tensor(list(product([0.0, 1.0], repeat=8))).reshape(-1, 2, 2, 2)
    drawn = torch.rand(50, 2, 2, 2, generator=torch.Generator().manual_seed(1))
    contents = torch.cat([corners, drawn])
    with torch.inference_mode():
        for number in range(0, len(regions), 3):
            top, left, height, width = regions.parts[number, 0].tolist()
            for image, label, bound in zip(images, labels, bounds[:, number], strict=True):
                attacked = image.repeat(len(contents), 1, 1, 1)
                attacked[:, :, top : top + height, left : left + width] = contents
                logits = model(attacked)
                lead = logits[:, label] - logits.scatter(
                    1, label.expand(len(contents), 1), -torch.inf
                ).amax(1)
                assert lead.min() >= bound


def test_a_linear_network_is_bounded_exactly():
    model = networks()["linear"]
    network = BoundedNetwork(model, (2, 9, 8))
    images, labels = examples()
    regions = Regions((9, 8), torch.tensor([[[2, 3, 2, 1]]]))
    bound = network.lowest_margins(images, labels, regions)[:, 0]
    weight, bias = model[1].weight, model[1].bias
    for image, label, found in zip(images, labels.tolist(), bound, strict=True):
        leads = []
        for other in {0, 1, 2} - {label}:
            difference = (weight[label] - weight[other]).reshape(2, 9, 8)
            worst = image.clone()
            worst[:, 2:4, 3:4] = (difference[:, 2:4, 3:4] < 0).float()
            leads.append((difference * worst).sum() + bias[label] - bias[other])
        torch.testing.assert_close(found, torch.stack(leads).min(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["perceptron", "convolutions", "pools", "residual"])
@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_regions_of_each_image_get_the_margins_that_all_regions_get(name, epsilon):
    network = BoundedNetwork(networks()[name].eval(), (2, 9, 8))
    images, labels = examples()
    (_, boxes) = patch_boxes(SquarePatch(3).regions((9, 8)))[0]
    boxes = replace(boxes, epsilon=epsilon)
    prepared = network.prepare(images, labels, slack=False)
    everywhere = network.margins(prepared, boxes)  # (L, N, classes)
    chosen = torch.randint(0, len(boxes.starts), (5, 7))
    pairs = replace(boxes.choose(chosen.flatten()), each=7)
    found = network.margins(prepared, pairs).reshape(5, 7, 3)
    expected = everywhere[chosen, torch.arange(5)[:, None]]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if epsilon == 0:
        logits = network.model(images)
        leads = logits.gather(1, labels[:, None]) - logits
        torch.testing.assert_close(found, leads[:, None].expand(-1, 7, -1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("places", [42, 3], ids=["many-places", "few-places"])
@pytest.mark.parametrize("name", ["perceptron", "convolutions"])
def test_regions_of_each_image_have_the_gradients_that_all_regions_have(name, places):
    model = networks()[name].eval()
    network = BoundedNetwork(model, (2, 9, 8))
    images, labels = examples()
    (_, boxes) = patch_boxes(SquarePatch(3).regions((9, 8)))[0]
    chosen = torch.randint(0, places, (5, 7))
    prepared = network.prepare(images, labels, slack=False)
    everywhere = network.margins(prepared, boxes)[chosen, torch.arange(5)[:, None]]
    wanted = torch.autograd.grad(everywhere.square().sum(), list(model.parameters()))
    pairs = replace(boxes.choose(chosen.flatten()), each=7)
    margins = network.margins(network.prepare(images, labels, slack=False), pairs)
    found = torch.autograd.grad(margins.square().sum(), list(model.parameters()))
    for gradient, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["convolutions", "pools"])
def test_margins_have_gradients_after_they_were_found_without(name):
    model = networks()[name].eval()
    network = BoundedNetwork(model, (2, 9, 8))
    images, labels = examples()
    ((_, boxes),) = patch_boxes(SquarePatch(2).regions((9, 8)))
    with torch.inference_mode():
        network.margins(network.prepare(images, labels, slack=False), boxes)
    prepared = network.prepare(images, labels, slack=False)
    with network.keeping():
        kept = network.margins(prepared, boxes)
    found = network.margins(prepared, boxes)
    torch.testing.assert_close(found, kept, rtol=1e-4, atol=1e-5)
    wanted = network.margins(network.prepare(images, labels, slack=False), boxes)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(found.square().sum(), parameters)
    expected = torch.autograd.grad(wanted.square().sum(), parameters)
    for gradient, of_new in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, of_new)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
def test_the_matrix_of_a_window_is_the_convolution(groups, dilation):
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, (3, 2), (2, 1), dilation=dilation, groups=groups, bias=False)
    operator = operators.Convolution(
        lambda: layer.weight, lambda: None, (2, 1), (0, 0), (dilation, dilation), groups
    )
    windows = torch.randn(5, 3, 4, 4)  # (P, h, C, w)
    matrix = operator._matrix(windows[None], (2, -1), (9, 5))
    maps = torch.zeros(5, 4, 9, 5)
    maps[:, :, 2:5, :3] = windows.transpose(1, 2)[..., 1:]
    expected = layer(maps).transpose(1, 2).flatten(1)
    torch.testing.assert_close(windows.flatten(1) @ matrix, expected)


def test_an_activation_leaves_what_others_take_of_an_affine_layer():
    torch.manual_seed(0)
    model = Skipping().eval()
    network = BoundedNetwork(model, (2, 9, 8))
    images, labels = examples()
    regions = SquarePatch(3).regions((9, 8))
    margins = network.lowest_margins(images, labels, regions)
    plain = network.plain_margins(images, labels, regions)
    torch.testing.assert_close(margins, plain, rtol=1e-3, atol=1e-3)


def test_boxes_that_stick_out_of_the_image_end_at_its_border():
    model = networks()["convolutions"].eval()
    network = BoundedNetwork(model, (2, 9, 8))
    prepared = network.prepare(*examples(), slack=False)
    out = network.margins(prepared, PatchBoxes(torch.tensor([[-1, 6]]), (3, 3)))
    inside = network.margins(prepared, PatchBoxes(torch.tensor([[0, 6]]), (2, 2)))
    torch.testing.assert_close(out, inside, rtol=1e-4, atol=1e-5)


def test_distinct_pairs_are_those_of_unique_rows():
    torch.manual_seed(0)
    pairs = torch.randint(-4, 5, (50, 2))
    expected, places = torch.unique(pairs, dim=0, return_inverse=True)
    distinct, which = distinct_pairs(pairs)
    assert torch.equal(distinct, expected)
    assert torch.equal(which, places)


@pytest.mark.parametrize("name", ["convolutions", "perceptron"])
def test_regions_bounded_together_hold_only_where_each_does(name):
    network = BoundedNetwork(networks()[name].eval(), (2, 9, 8))
    images, labels = examples()
    (_, boxes) = patch_boxes(SquarePatch(2).regions((9, 8)))[0]
    prepared = network.prepare(images, labels, slack=False)
    alone = network.margins(prepared, boxes)
    groups = torch.arange(len(boxes.starts)).reshape(-1, 4)
    joined = replace(
        boxes.choose(groups.flatten()), joined=(2, 2) if name != "perceptron" else (4,)
    )
    together = network.margins(prepared, joined)
    assert together.shape == (len(groups), 5, 3)
    assert (together <= alone[groups].amin(1) + 1e-5).all()
    same = replace(boxes.choose(torch.tensor([3, 3])), joined=(2,))
    torch.testing.assert_close(network.margins(prepared, same)[0], alone[3], rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_plain_algorithm():
    model = networks()["convolutions"]
    network = BoundedNetwork(model.eval(), (2, 9, 8))
    images, labels = examples()
    starts = torch.tensor([[0, 0], [3, 2], [6, 5]])
    margins = network.margins(
        network.prepare(images, labels, slack=False), PatchBoxes(starts, (3, 3))
    )
    margins.square().sum().backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for top, left in starts.tolist():
        lower, upper = images.clone(), images.clone()
        lower[:, :, top : top + 3, left : left + 3] = 0
        upper[:, :, top : top + 3, left : left + 3] = 1
        network._plain((lower, upper), labels).square().sum().backward()
    for parameter, gradient in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["ibp-mlp", "ibp-conv2", "ibp-conv4"])
def test_networks_of_the_paper_have_equal_margins_by_both_algorithms(name):
    torch.manual_seed(0)
    model = build_model(ModelSpec(name, 4, 1, (12, 12)))
    network = BoundedNetwork(model, (1, 12, 12))
    images = torch.rand(3, 1, 12, 12)
    labels = torch.tensor([0, 3, 1])
    regions = SquarePatch(5).regions((12, 12))
    fast = network.lowest_margins(images, labels, regions)
    plain = network.plain_margins(images, labels, regions)
    torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (nn.GELU(), "GELU"),
        (nn.LeakyReLU(-0.5), "LeakyReLU"),
        (nn.Conv2d(2, 2, 3, padding_mode="circular"), "circular"),
        (nn.MaxPool2d(2, ceil_mode=True), "ceil_mode"),
        (nn.LayerNorm(8), "LayerNorm"),
    ],
)
def test_an_operator_without_a_rule_is_named_with_the_way_out(layer, named):
    model = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(3)).eval()
    model(torch.zeros(1, 2, 9, 8))
    with pytest.raises(PatchproofError, match=named) as raised:
        BoundedNetwork(model, (2, 9, 8))
    assert "PatchCleanser" in str(raised.value)


class Reshaping(nn.Module):
    """Flattens by ``view`` or ``reshape``, and by the batch's size in many ways."""

    def __init__(self, flatten):
        super().__init__()
        self.enter, self.last = nn.Conv2d(2, 3, 3), nn.Linear(126, 3)
        self.flatten = flatten

    def forward(self, images):
        return self.last(self.flatten(torch.relu(self.enter(images))))


@pytest.mark.parametrize(
    "flatten",
    [
        lambda values: values.view(values.size(0), -1),
        lambda values: values.reshape(values.shape[0], -1),
        lambda values: values.view(-1, 126),
        lambda values: values.view(values.size()[0], 3 * 7 * 6),
    ],
)
def test_the_ways_to_flatten_are_one(flatten):
    torch.manual_seed(0)
    model, (images, labels) = Reshaping(flatten).eval(), examples()
    plain = nn.Sequential(model.enter, nn.ReLU(), nn.Flatten(), model.last).eval()
    regions = SquarePatch(2).regions((9, 8))
    found, expected = (
        BoundedNetwork(network, (2, 9, 8)).lowest_margins(images, labels, regions)
        for network in (model, plain)
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("flatten", "named"),
    [
        (lambda values: values.view(values.size(0), 3, -1).sum(2), "view"),
        (lambda values: values.flatten(1)[:, :126] * values.size(0), "no rule for"),
        (lambda values: values.flatten(1) + values.size(0), "no rule for size here"),
        (lambda values: values.chunk(2)[0].flatten(1), "no rule for chunk here"),
    ],
)
def test_what_else_is_done_with_sizes_and_parts_is_refused(flatten, named):
    model = Reshaping(flatten).eval()
    model.last = nn.LazyLinear(3)
    model(torch.zeros(1, 2, 9, 8))
    with pytest.raises(PatchproofError, match=named):
        BoundedNetwork(model, (2, 9, 8))


@pytest.mark.parametrize("screen", [1, 4, 8])
def test_no_layer_takes_more_than_its_share_of_the_budget(screen, monkeypatch):
    largest, propagate = 0, operators.Convolution.propagate

    def measured(self, clean, *inputs):
        nonlocal largest
        found = propagate(self, clean, *inputs)
        largest = max(largest, found.shift.numel() * found.shift.element_size())
        return found

    layers = (nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 72, 3)).eval()
    network, (images, labels) = BoundedNetwork(model, (2, 9, 8)), examples()
    monkeypatch.setattr(operators.Convolution, "propagate", measured)
    budget = 2**17
    network.lowest_margins(
        images, labels, SquarePatch(1).regions((9, 8)), screen=screen, memory_budget=budget
    )
    assert 0 < largest <= budget / 8


def test_a_budget_too_small_for_one_region_is_refused():
    network = BoundedNetwork(networks()["perceptron"], (2, 9, 8))
    images, labels = examples()
    with pytest.raises(PatchproofError, match="memory_budget: expected at least"):
        network.lowest_margins(images, labels, SquarePatch(2).regions((9, 8)), memory_budget=100)
