"""Bounds of random networks and regions against interval arithmetic written plainly, in float64."""

import random

import pytest
import torch
from torch import nn
from torch.nn import functional

from patchproof.bounds import operators
from patchproof.bounds.propagation import BoundedNetwork, PatchBoxes
from patchproof.threat.regions import Regions

PERCEPTRON = 4
"""The ending of a random network for which there are backward bounds."""


class Residual(nn.Module):
    """A convolution around which something else goes."""

    def __init__(self, channels, side, around, convolution_first=True):
        super().__init__()
        self.convolution_first = convolution_first
        self.convolution = nn.Conv2d(channels, channels, side, padding=side // 2)
        self.around = around

    def forward(self, images):
        if self.convolution_first:
            return self.convolution(images) + self.around(images)
        return self.around(images) + self.convolution(images)


def pair(draw, low, high):
    return draw.randint(low, high), draw.randint(low, high)


def random_layer(draw, channels):
    """Return a layer for maps of so many channels, of any stride, padding and dilation."""
    kernel = pair(draw, 1, 4)
    half = tuple(draw.randint(0, side // 2) for side in kernel)
    match draw.randint(0, 7):
        case 0 | 1 | 2:
            groups = draw.choice([1, 1, channels])
            return nn.Conv2d(
                channels,
                groups * draw.randint(1, 3),
                kernel,
                pair(draw, 1, 4),
                pair(draw, 0, 3),
                pair(draw, 1, 3),
                groups,
                bias=draw.random() < 0.7,
            )
        case 3:
            around = [nn.Identity(), nn.MaxPool2d(3, 1, 1), nn.Conv2d(channels, channels, 1)]
            return Residual(
                channels, draw.choice([1, 3, 5]), draw.choice(around), draw.random() < 0.5
            )
        case 4:
            return nn.MaxPool2d(kernel, draw.choice([None, 1, 2, 3]), half, draw.randint(1, 2))
        case 5:
            return nn.AvgPool2d(kernel, draw.choice([None, 1, 2, 3]), half)
        case 6:
            return nn.BatchNorm2d(channels)
    return draw.choice([nn.LeakyReLU(0.2), nn.Tanh(), nn.ReLU6(), nn.Sigmoid()])


def random_network(seed, ending=None):
    """Return a network in eval mode, the shape of its images, and what goes on drawing."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    shape = draw.randint(1, 3), *pair(draw, 4, 11)
    layers, maps = [], torch.zeros(2, *shape)
    for _ in range(draw.randint(1, 4)):
        layer = random_layer(draw, maps.shape[1]).eval()
        try:
            maps = layer(maps)
        except RuntimeError:  # the maps are too small for it
            continue
        layers.append(layer)
        if draw.random() < 0.6:
            layers.append(nn.ReLU())
    match draw.randint(0, 4) if ending is None else ending:
        case 0:
            layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(maps.shape[1], 3)]
        case 1:
            layers += [nn.Conv2d(maps.shape[1], 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        case 2:
            layers += [nn.Flatten(), nn.Linear(maps[0].numel(), 4)]
        case 3:
            layers += [nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(maps.shape[1], 3)]
        case _:
            hidden = nn.Linear(maps[0].numel(), 6), nn.ReLU(), nn.Linear(6, 3)
            layers += [nn.Flatten(), *hidden]
    model = nn.Sequential(*layers).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.3, 2)
    return model, shape, draw


def random_regions(draw, height, width):
    """Return all places of a rectangle, or unions of boxes anywhere."""
    if draw.random() < 0.5:
        high, wide = draw.randint(1, min(4, height)), draw.randint(1, min(4, width))
        parts = [
            [[top, left, high, wide]]
            for top in range(height - high + 1)
            for left in range(width - wide + 1)
        ]
        return Regions((height, width), torch.tensor(parts))
    parts = torch.zeros(6, 3, 4, dtype=torch.int64)
    for region in parts:
        used = torch.zeros(height, width, dtype=torch.bool)
        for box in region:
            top, left = draw.randrange(height), draw.randrange(width)
            high, wide = draw.randint(1, height - top), draw.randint(1, width - left)
            if not used[top : top + high, left : left + wide].any():
                used[top : top + high, left : left + wide] = True
                box.copy_(torch.tensor([top, left, high, wide]))
        region.copy_(region[region[:, 2].argsort(descending=True, stable=True)])
    return Regions((height, width), parts)


def through(module, lower, upper):
    """Return the bounds after a module, in float64."""
    match module:
        case nn.Sequential():
            for layer in module:
                lower, upper = through(layer, lower, upper)
            return lower, upper
        case Residual():
            sides = [through(part, lower, upper) for part in module.children()]
            return sides[0][0] + sides[1][0], sides[0][1] + sides[1][1]
        case nn.Conv2d() | nn.Linear():

            def apply(values, weight):
                if isinstance(module, nn.Linear):
                    return functional.linear(values, weight)
                options = module.stride, module.padding, module.dilation, module.groups
                return functional.conv2d(values, weight, None, *options)

            weight = module.weight.double()
            above, below = weight.clamp(min=0), weight.clamp(max=0)
            ends = (
                apply(lower, above) + apply(upper, below),
                apply(upper, above) + apply(lower, below),
            )
            if module.bias is None:
                return ends
            bias = module.bias.double().reshape(-1, *[1] * (ends[0].ndim - 2))
            return ends[0] + bias, ends[1] + bias
        case nn.BatchNorm2d():
            parts = module.weight, module.bias, module.running_mean, module.running_var
            weight, bias, mean, variance = (part.double()[:, None, None] for part in parts)
            factor = weight / (variance + module.eps).sqrt()
            ends = lower * factor, upper * factor
            term = bias - mean * factor
            return torch.minimum(*ends) + term, torch.maximum(*ends) + term
    return module(lower), module(upper)


def plain_margins(model, lower, upper, labels):
    """Return lower bounds of the margins (K, classes) of K boxes, 0 for the label."""
    last = model[-1]
    if not isinstance(last, nn.Linear):
        low, high = through(model, lower, upper)
        margins = low.gather(1, labels[:, None]) - high
    else:
        low, high = through(model[:-1], lower, upper)
        weight, bias = last.weight.double(), last.bias.double()
        rows = weight[labels][:, None] - weight
        margins = rows.clamp(min=0) @ low[:, :, None] + rows.clamp(max=0) @ high[:, :, None]
        margins = margins[:, :, 0] + bias[labels][:, None] - bias
    return margins.scatter(1, labels[:, None], 0.0)


def inside(regions):
    """Return the pixels of each region, (R, H, W) bool."""
    pixels = torch.zeros(len(regions), *regions.image_size, dtype=torch.bool)
    for region, boxes in zip(pixels, regions.parts.tolist(), strict=True):
        for top, left, height, width in boxes:
            region[top : top + height, left : left + width] = True
    return pixels


def expected_margins(model, images, labels, regions):
    """Return the lowest margins, (N, R) float64."""
    patch = inside(regions)[None, :, None]
    pixels = images.double()[:, None]
    lower, upper = (torch.where(patch, end, pixels).flatten(0, 1) for end in (0.0, 1.0))
    of_pairs = labels.repeat_interleave(len(regions))
    margins = plain_margins(model, lower, upper, of_pairs)
    lowest = margins.scatter(1, of_pairs[:, None], torch.inf).amin(1)
    return lowest.unflatten(0, (len(images), len(regions)))


def attacked_margins(model, images, labels, regions, drawn=12):
    """Return the least margin that random contents of each region leave, (N, R) float64."""
    contents = torch.rand(drawn, *images.shape[1:])
    contents = torch.cat([contents, contents.round(), contents[:1] * 0, contents[:1] * 0 + 1])
    attacked = torch.where(inside(regions)[:, None, None], contents, images[:, None, None])
    logits = model(attacked.flatten(0, 2)).double()
    own = labels.repeat_interleave(len(regions) * len(contents))[:, None]
    others = logits.scatter(1, own, -torch.inf).amax(1)
    margins = logits.gather(1, own).squeeze(1) - others
    return margins.unflatten(0, (len(images), len(regions), -1)).amin(2)


def bounded(seed, ending=None):
    """Return a random network, its bounds, images, labels, and what goes on drawing."""
    model, shape, draw = random_network(seed, ending)
    images = torch.rand(draw.choice([1, 2, 5]), *shape)
    if draw.random() < 0.3:
        images = images.round()
    labels = model(images).argmax(1) if draw.random() < 0.7 else torch.randint(3, (len(images),))
    return model, BoundedNetwork(model, shape), images, labels, draw


@pytest.mark.parametrize("seed", range(24))
def test_bounds_are_those_of_interval_arithmetic_and_a_little_less(seed, monkeypatch):
    monkeypatch.setattr(operators, "_WORTH_BANDS", 0 if seed % 2 else 2**13)
    with torch.no_grad():
        model, network, images, labels, draw = bounded(seed)
        regions = random_regions(draw, *images.shape[2:])
        expected = expected_margins(model, images, labels, regions)
        budget = 10 ** draw.choice([7, 8])
        found = network.lowest_margins(images, labels, regions, memory_budget=budget).double()
        slack = expected - found
        assert (slack >= 0).all()
        assert (slack <= 0.01 * (1 + expected.abs())).all()
        holds = found > 0
        for screen, stop in ((2, False), (3, True), (1, True)):
            other = network.lowest_margins(images, labels, regions, screen=screen, stop=stop)
            assert torch.equal((other > 0).all(1), holds.all(1))
            assert ((other.double() <= expected) | other.isnan()).all()
            if not stop:
                assert torch.equal(other > 0, holds)


def test_padding_is_lower_than_any_value_to_a_maximum():
    torch.manual_seed(0)
    convolution = nn.Conv2d(1, 2, 3, padding=1)
    with torch.no_grad():
        convolution.bias.fill_(-5)
        pool = nn.MaxPool2d((3, 2), (1, 2), (1, 1))
        model = nn.Sequential(convolution, pool, nn.Flatten(), nn.Linear(36, 3)).eval()
        images, labels = torch.rand(2, 1, 6, 5), torch.tensor([0, 1])
        regions = random_regions(random.Random(1), 6, 5)
        expected = expected_margins(model, images, labels, regions)
        found = BoundedNetwork(model, (1, 6, 5)).lowest_margins(images, labels, regions).double()
    assert (found <= expected).all()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("seed", range(15))
def test_backward_bounds_are_no_looser_and_sound(seed):
    with torch.no_grad():
        model, network, images, labels, draw = bounded(seed, PERCEPTRON)
        regions = random_regions(draw, *images.shape[2:])
        found = network.lowest_margins(images, labels, regions, method="backward").double()
        intervals = network.lowest_margins(images, labels, regions).double()
        assert (found >= intervals).all()
        reached = attacked_margins(model, images, labels, regions)
        assert (found <= reached).all()


@pytest.mark.parametrize("seed", range(12))
def test_margins_to_train_on_and_their_gradients_are_those_of_interval_arithmetic(seed):
    model, network, images, labels, draw = bounded(seed)
    height, width = images.shape[2:]
    high, wide = draw.randint(1, min(4, height)), draw.randint(1, min(4, width))
    each = draw.choice([None, 1, 3])
    count = 4 if each is None else len(images) * each
    tops, lefts = (torch.randint(end, (count,)) for end in (height - high + 1, width - wide + 1))
    epsilon = draw.choice([1.0, 0.3])
    boxes = PatchBoxes(torch.stack([tops, lefts], 1), (high, wide), each=each, epsilon=epsilon)
    found = network.margins(network.prepare(images, labels, slack=False), boxes)

    pixels = images.double()
    lower, upper, of_boxes = [], [], []
    for number, (top, left) in enumerate(boxes.starts.tolist()):
        for image in range(len(images)) if each is None else [number // each]:
            patch = (slice(None), slice(top, top + high), slice(left, left + wide))
            for ends, sign in ((lower, -1), (upper, 1)):
                end = pixels[image].clone()
                end[patch] = (end[patch] + sign * epsilon).clamp(0, 1)
                ends.append(end)
            of_boxes.append(labels[image])
    expected = plain_margins(
        model, torch.stack(lower), torch.stack(upper), torch.stack(of_boxes)
    ).view_as(found)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)
    weights = torch.randn_like(expected)
    gradients = [
        torch.autograd.grad((margins * weights).sum(), list(model.parameters()), allow_unused=True)
        for margins in (found.double(), expected)
    ]
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)
