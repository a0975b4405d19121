"""What once gave a false certificate, or might: each network here is bounded soundly or refused."""

import itertools
import math

import pytest
import torch
from torch import nn

from patchproof import IntervalBoundPropagation, SquarePatch
from patchproof.bounds.propagation import BoundedNetwork, patch_boxes
from patchproof.errors import PatchproofError
from patchproof.threat.regions import Regions


def patch_regions(image_size, patch):
    """Return all places of a patch."""
    (height, width), (high, wide) = image_size, patch
    parts = [
        [[top, left, high, wide]]
        for top in range(height - high + 1)
        for left in range(width - wide + 1)
    ]
    return Regions(image_size, torch.tensor(parts))


def attacked(image, region, contents):
    """Return the image, (C, H, W), with each content, (K, C, H, W), inside a region."""
    inside = torch.zeros(image.shape[1:], dtype=torch.bool)
    for top, left, height, width in region.tolist():
        inside[top : top + height, left : left + width] = True
    return torch.where(inside, contents, image)


def lead(logits, label):
    """Return how far the label leads each other class, (K,) float64; NaN leads nothing."""
    logits = logits.double()
    others = torch.cat([logits[:, :label], logits[:, label + 1 :]], 1)
    return (logits[:, label] - others.amax(1)).nan_to_num(-math.inf)


def false_bounds(network, model, images, regions, labels=None):
    """Return how many bounds some content of the patch falls below."""
    with torch.inference_mode():
        labels = model(images).argmax(1) if labels is None else labels
        bounds = network.lowest_margins(images, labels, regions).double()
        drawn = torch.rand(20, *images.shape[1:], generator=torch.Generator().manual_seed(1))
        ends = torch.zeros_like(drawn[:1]), torch.ones_like(drawn[:1])
        contents = torch.cat([drawn, drawn.round(), *ends])
        count = 0
        for image, label, row in zip(images, labels.tolist(), bounds, strict=True):
            for region, bound in zip(regions.parts, row, strict=True):
                found = lead(model(attacked(image, region, contents)), label).min()
                count += bool(bound > found)
    return count


def seeded(seed, *shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# The folded term -mean * factor + bias cancelled to almost 0, and the slack with it, while the
# network rounds its large parts.
@pytest.mark.parametrize("seed", range(6))
def test_a_batch_normalisation_whose_parts_cancel(seed):
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d(2)
    with torch.no_grad():
        norm.running_mean.fill_(1e3 * (1 + torch.rand(()).item()))
        norm.running_var.fill_(0.5 + torch.rand(()).item())
        norm.weight.fill_(1 + torch.rand(()).item())
        deviation = (norm.running_var.double() + norm.eps).sqrt()
        norm.bias.copy_(norm.running_mean.double() * norm.weight.double() / deviation)
        last = nn.Linear(50, 2, bias=False)
        last.weight.copy_(0.02 * seeded(seed, 2, 50) * torch.tensor([[1.0], [-1.0]]))
    model = nn.Sequential(norm, nn.Flatten(), last).eval()
    network = BoundedNetwork(model, (2, 5, 5))
    regions = patch_regions((5, 5), (1, 1))
    assert false_bounds(network, model, seeded(seed, 2, 2, 5, 5), regions) == 0


# Above its threshold Softplus is the identity, which is lower at a threshold that is not large.
@pytest.mark.parametrize("threshold", [-4.0, 0.0, 2.0])
def test_a_softplus_that_falls_where_it_becomes_the_identity(threshold):
    first, last = nn.Linear(4, 1, bias=False), nn.Linear(1, 2)
    middle = math.log1p(math.exp(threshold)) / 2 + threshold / 2
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0, 0.0, 0.0, threshold - 0.5]]))
        last.weight.copy_(torch.tensor([[1.0], [0.0]]))
        last.bias.copy_(torch.tensor([0.0, middle]))
    model = nn.Sequential(nn.Flatten(), first, nn.Softplus(1.0, threshold), last).eval()
    image = torch.tensor([[[[0.45, 0.0], [0.0, 1.0]]]])
    try:
        network = BoundedNetwork(model, (1, 2, 2))
    except PatchproofError:
        return
    regions = Regions((2, 2), torch.tensor([[[0, 0, 1, 1]]]))
    assert false_bounds(network, model, image, regions) == 0


class Aliased(nn.Module):
    """Clips an alias of what the last layer reads; on dark images alone."""

    def __init__(self, passed_on):
        super().__init__()
        self.sum = nn.Conv2d(1, 1, 5, bias=False)
        self.passed_on = passed_on
        self.clip = nn.Hardtanh(8.0, 100.0, inplace=True)
        self.last, self.unused = nn.Linear(1, 2), nn.Linear(1, 2)
        with torch.no_grad():
            self.sum.weight.fill_(1.0)
            self.last.weight.copy_(torch.tensor([[-1.0], [0.0]]))
            self.last.bias.copy_(torch.tensor([6.0, 0.0]))
            self.unused.weight.zero_()
            self.unused.bias.zero_()

    def forward(self, images):
        total = self.sum(images)
        clipped = self.clip(self.passed_on(total))
        return self.last(torch.flatten(total, 1)) + self.unused(torch.flatten(clipped, 1))


# Only direct uses of what is overwritten were looked at.
@pytest.mark.parametrize("passed_on", [nn.Identity(), nn.Dropout(), nn.Flatten()])
def test_a_layer_that_overwrites_an_alias_of_what_another_reads(passed_on):
    model = Aliased(passed_on).eval()
    image = torch.full((1, 1, 5, 5), 0.05)
    regions = patch_regions((5, 5), (1, 1))
    try:
        network = BoundedNetwork(model, (1, 5, 5))
        label = torch.tensor([0])
        assert false_bounds(network, model, image, regions, label) == 0
    except PatchproofError:
        return


def perceptron(features=25, classes=3, seed=0):
    """Return Flatten, Linear, ReLU, Linear with random weights."""
    torch.manual_seed(seed)
    layers = nn.Linear(features, 8), nn.ReLU(), nn.Linear(8, classes)
    return nn.Sequential(nn.Flatten(), *layers).eval()


class Shifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([[[0.5]]]))
        self.inner = perceptron()

    def forward(self, images):
        return self.inner(images - self.mean)


def other_buffer(model):
    model.mean = torch.tensor([[[-20.0]]])


def other_layer(model):
    model.inner = perceptron(seed=1)


def other_data(model):
    model.inner[1].weight.data.mul_(-3.0)


def hook(model):
    model.inner[3].register_forward_hook(lambda module, inputs, output: -3 * output)


def train_mode(model):
    model.inner.insert(2, nn.Dropout())
    model.train()


# Bounds were of the network as it had been traced.
@pytest.mark.parametrize("change", [other_buffer, other_layer, other_data, hook, train_mode])
def test_a_network_that_has_changed_since_it_was_traced(change):
    model = Shifted().eval()
    images, regions = seeded(0, 3, 1, 5, 5), patch_regions((5, 5), (1, 1))
    network = BoundedNetwork(model, (1, 5, 5))
    with torch.inference_mode():
        network.lowest_margins(images, model(images).argmax(1), regions)
    change(model)
    for label in range(3):
        try:
            assert false_bounds(network, model, images, regions, torch.tensor([label] * 3)) == 0
        except PatchproofError:
            continue


# The bounds themselves ran in bfloat16.
def test_bounds_do_not_depend_on_autocast():
    model = perceptron()
    images, regions = seeded(0, 2, 1, 5, 5), patch_regions((5, 5), (2, 2))
    network, labels = BoundedNetwork(model, (1, 5, 5)), torch.tensor([0, 1])
    expected = network.lowest_margins(images, labels, regions)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = network.lowest_margins(images, labels, regions)
    assert torch.equal(found, expected)


# And in TF32, which PyTorch allows in convolutions unless told otherwise.
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_bounds_on_a_gpu_are_computed_in_full_precision():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU()
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 144, 4)).eval()
    images, regions = seeded(0, 2, 3, 16, 16), patch_regions((16, 16), (12, 12))
    labels = model(images).argmax(1)
    expected = BoundedNetwork(model, (3, 16, 16)).lowest_margins(images, labels, regions)
    model.cuda()
    network = BoundedNetwork(model, (3, 16, 16))
    found = network.lowest_margins(images.cuda(), labels.cuda(), regions).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# The network's partial sums were infinite, and the bounds were not.
def test_a_network_whose_sums_may_overflow():
    first, last = nn.Linear(5, 2, bias=False), nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        first.weight.copy_(
            torch.tensor([[2e38, 1.9e38, -1e38, 0.0, 0.0], [0.0, 0.0, 0.0, 3e38, 0.0]])
        )
        last.weight.copy_(torch.tensor([[0.0, 1.0], [0.1, 0.0]]))
    model = nn.Sequential(nn.Flatten(), first, nn.ReLU(), last).eval()
    image = torch.tensor([[[[0.0, 1.0, 1.0, 1.0, 0.0]]]])
    try:
        network = BoundedNetwork(model, (1, 1, 5))
    except PatchproofError:
        return
    regions = patch_regions((1, 5), (1, 1))
    assert false_bounds(network, model, image, regions, torch.tensor([0])) == 0


# Products that underflow lose more than a share of themselves.
@pytest.mark.parametrize("scale", [1e-20, 1e-21, 1e-22])
def test_a_network_whose_products_underflow(scale):
    torch.manual_seed(1)
    first, last = nn.Linear(16, 8, bias=False), nn.Linear(8, 3, bias=False)
    with torch.no_grad():
        first.weight.copy_(torch.randn(8, 16) / 4 * scale)
        last.weight.copy_(torch.randn(3, 8) / 3 * scale)
    model = nn.Sequential(nn.Flatten(), first, nn.ReLU(), last).eval()
    network = BoundedNetwork(model, (1, 4, 4))
    regions = patch_regions((4, 4), (1, 1))
    assert false_bounds(network, model, seeded(0, 20, 1, 4, 4), regions) == 0


# A patch in the gaps of a stride reached no output, and windows of size 0 followed.
@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(2, 2, 1, stride=3), nn.MaxPool2d(1, 3), nn.AvgPool2d(1, 3), nn.Conv2d(2, 2, 2, 4)],
)
@pytest.mark.parametrize("last", [nn.Identity(), nn.Conv2d(2, 2, 2), nn.MaxPool2d(2)])
def test_a_patch_in_the_gaps_of_a_stride(layer, last):
    model = nn.Sequential(layer, nn.ReLU(), last, nn.Flatten()).eval()
    features = model(torch.zeros(1, 2, 9, 9)).shape[1]
    model.append(nn.Linear(features, 3))
    images = seeded(0, 2, 2, 9, 9)
    network = BoundedNetwork(model, (2, 9, 9))
    with torch.inference_mode():
        labels = model(images).argmax(1)
        for place in itertools.product(range(4), (0, 1, 6)):
            region = Regions((9, 9), torch.tensor([[[*place, 1, 1]]]))  # alone: no larger window
            bounds = network.lowest_margins(images, labels, region)
            plain = network.plain_margins(images, labels, region)
            torch.testing.assert_close(bounds, plain, rtol=1e-3, atol=1e-3)
            assert (bounds <= plain + 1e-6).all()


def call(network, **change):
    values = {
        "images": seeded(0, 2, 1, 5, 5),
        "labels": torch.tensor([0, 1]),
        "regions": patch_regions((5, 5), (2, 2)),
    }
    return network.lowest_margins(**(values | change))


# Pixels outside of [0, 1], and regions of another image size, went through unnoticed.
@pytest.mark.parametrize(
    "change",
    [
        {"images": seeded(0, 2, 1, 5, 5) - 2},
        {"images": seeded(0, 2, 1, 5, 5) * 3},
        {"images": seeded(0, 2, 1, 6, 6)},
        {"images": seeded(0, 2, 2, 5, 5)},
        {"images": seeded(0, 2, 1, 5, 5).double()},
        {"regions": patch_regions((3, 3), (2, 2))},
        {"regions": patch_regions((9, 9), (2, 2))},
        {"labels": torch.tensor([0])},
        {"labels": torch.tensor([0, 1, 2])},
        {"labels": torch.tensor([0, -1])},
        {"labels": torch.tensor([0, 3])},
    ],
)
def test_what_does_not_fit_the_network_is_refused(change):
    network = BoundedNetwork(perceptron(), (1, 5, 5))
    assert call(network).shape == (2, 16)
    with pytest.raises(PatchproofError, match="expected"):
        call(network, **change)


def test_an_image_that_holds_nan_is_not_certified():
    network, images = BoundedNetwork(perceptron(), (1, 5, 5)), seeded(0, 2, 1, 5, 5)
    images[0, 0, 2, 2] = math.nan
    try:
        assert not (call(network, images=images)[0] > 0).any()
    except PatchproofError:
        return


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(1, "weight"), (1, "bias"), (3, "weight"), (3, "bias")])
def test_weights_that_are_not_finite_certify_nothing(bad, place):
    model = perceptron()
    network = BoundedNetwork(model, (1, 5, 5))
    with torch.no_grad():
        getattr(model[place[0]], place[1]).view(-1)[0] = bad
    for label in range(3):
        try:
            assert not (call(network, labels=torch.tensor([label] * 2)) > 0).any()
        except PatchproofError:
            continue


# A first layer that works in place wrote into the caller's images.
def test_prediction_leaves_its_images_as_they_are():
    model = nn.Sequential(nn.Hardtanh(0.4, 0.6, inplace=True), perceptron()).eval()
    images = seeded(0, 2, 1, 5, 5)
    given = images.clone()
    defense = IntervalBoundPropagation(model, SquarePatch(2), image_size=(5, 5))
    defense.predict(images)
    defense.certify(images, torch.tensor([0, 1]))
    assert torch.equal(images, given)


# The ranges of features were taken for ranges of channels.
def test_sparse_attacks_on_features_that_are_normalised_one_by_one():
    norm, first, last = nn.BatchNorm1d(9), nn.Linear(9, 1), nn.Linear(1, 2)
    with torch.no_grad():
        norm.bias[0] = -20.0
        first.weight.zero_()
        first.weight[0, 0] = 1.0
        first.bias.fill_(21.0)
        last.weight.copy_(torch.tensor([[1.0], [0.0]]))
        last.bias.copy_(torch.tensor([0.0, 1.5]))
    model = nn.Sequential(nn.Flatten(), norm, first, nn.ReLU(), last).eval()
    images, labels = torch.ones(1, 1, 3, 3), torch.tensor([0])
    darker = images.clone()
    darker[0, 0, 0, 0] = 0
    try:
        bound = BoundedNetwork(model, (1, 3, 3)).sparse_margins(images, labels, 1)
    except PatchproofError:
        return
    assert bound.item() <= lead(model(darker), 0).item()


class Branching(nn.Module):
    """The image goes into two layers, or around one."""

    def __init__(self, around):
        super().__init__()
        self.one, self.other = nn.Linear(9, 9), nn.Identity() if around else nn.Linear(9, 9)
        self.last = nn.Linear(9, 3)

    def forward(self, images):
        pixels = torch.flatten(images, 1)
        return self.last(torch.relu(self.one(pixels)) + self.other(pixels))


@pytest.mark.parametrize("around", [False, True])
def test_sparse_attacks_on_more_than_one_first_layer_are_refused(around):
    network = BoundedNetwork(Branching(around).eval(), (1, 3, 3))
    with pytest.raises(PatchproofError, match="expected"):
        network.sparse_margins(seeded(0, 1, 1, 3, 3), torch.tensor([0]), 1)


def test_sparse_attacks_on_a_network_without_a_first_layer_are_refused():
    network = BoundedNetwork(nn.Sequential(nn.Flatten()).eval(), (1, 2, 2))
    with pytest.raises(PatchproofError, match="expected a network that begins with"):
        network.sparse_margins(seeded(0, 1, 1, 2, 2), torch.tensor([0]), 1)


def test_bounds_of_no_images_are_empty():
    network = BoundedNetwork(perceptron(), (1, 5, 5))
    images, labels = torch.empty(0, 1, 5, 5), torch.empty(0, dtype=torch.int64)
    assert network.sparse_margins(images, labels, 1).shape == (0,)
    assert call(network, images=images, labels=labels).shape == (0, 16)


class Residual(nn.Module):
    """Works in place after a fork, on memory of its own."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 1)
        self.relu, self.last = nn.ReLU(inplace=True), nn.Linear(18, 3)

    def forward(self, images):
        before = self.relu(self.one(images))
        after = self.relu(self.other(before))
        after += before
        return self.last(torch.flatten(self.relu(after), 1))


def test_a_network_that_works_in_place_on_memory_of_its_own_is_bounded():
    model = Residual().eval()
    network = BoundedNetwork(model, (1, 5, 5))
    images, regions = seeded(0, 2, 1, 5, 5), patch_regions((5, 5), (2, 2))
    assert false_bounds(network, model, images, regions) == 0


# The weight of an average was made in inference mode, which gradients cannot go through.
def test_margins_of_a_network_with_average_pooling_have_gradients():
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 3))
    network = BoundedNetwork(model.eval(), (1, 5, 5))
    prepared = network.prepare(seeded(0, 2, 1, 5, 5), torch.tensor([0, 1]), slack=False)
    ((_, boxes),) = patch_boxes(patch_regions((5, 5), (2, 2)))
    network.margins(prepared, boxes).sum().backward()
    assert all(parameter.grad is not None for parameter in model[0].parameters())
    assert (model[0].weight.grad != 0).any()


# Labels came from one network and bounds from another.
def test_a_defense_whose_model_is_replaced_bounds_the_new_one():
    model, other = perceptron(), perceptron()
    image = seeded(0, 1, 1, 5, 5)
    image[0, 0, :2, :2] = 0
    with torch.no_grad():
        columns = other[1].weight.view(8, 5, 5)[:, :2, :2]
        columns.copy_(50 * columns)  # the image is 0 there, and only a patch shows the difference
    defense = IntervalBoundPropagation(model, SquarePatch(1), image_size=(5, 5))
    label = defense.predict(image)
    before = defense.certify(image, label, "never").verdicts
    defense.model = other
    expected = IntervalBoundPropagation(other, SquarePatch(1), image_size=(5, 5))
    assert not torch.equal(before, expected.certify(image, label, "never").verdicts)
    try:
        found = defense.certify(image, label, "never").verdicts
    except PatchproofError:
        return
    assert torch.equal(found, expected.certify(image, label, "never").verdicts)


# Convolutions by transforms (NNPACK's Winograd, which is what PyTorch takes for large batches where
# oneDNN is off) let a huge activation disturb outputs that do not see it.
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("place", [(5, 5), (4, 5), (5, 2)])
def test_an_activation_does_not_disturb_outputs_that_do_not_see_it(sign, place):
    torch.manual_seed(0)
    huge, mixing = nn.Conv2d(1, 16, 1, bias=False), nn.Conv2d(16, 16, 3, padding=1, bias=False)
    last = nn.Linear(16 * 16 * 16, 2)
    image = torch.zeros(1, 1, 16, 16)
    image[0, 0, 1:4, 1:4] = 1e-6
    with torch.no_grad():
        huge.weight.fill_(1e6)
        last.weight.zero_()
        last.weight.view(2, 16, 16, 16)[0, 0, 2, 2] = sign
        seen = mixing(huge(image))[0, 0, 2, 2].item()
        last.bias.copy_(torch.tensor([1e-3 - sign * seen, 0.0]))
    model = nn.Sequential(huge, mixing, nn.Flatten(), last).eval()
    defense = IntervalBoundPropagation(model, SquarePatch(1), image_size=(16, 16))
    region = Regions((16, 16), torch.tensor([[[*place, 1, 1]]]))
    bound = BoundedNetwork(model, (1, 16, 16)).lowest_margins(image, torch.tensor([0]), region)
    assert bound > 0
    patched = image.repeat(32, 1, 1, 1)
    patched[:, 0, place[0], place[1]] = torch.linspace(0.3, 1, 32)
    for one_library in (True, False):
        with torch.backends.mkldnn.flags(enabled=one_library):
            assert (defense.predict(patched) == 0).all()
