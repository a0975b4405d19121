"""Backward linear bounds hold for the float32 network, and are never looser than intervals."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchproof.bounds.backward import AffineLayer, backward_margins, rounding_share
from patchproof.errors import PatchproofError


def random_case(seed, sizes=(4, 6, 5), classes=4, pairs=3, scale=1.0, per_pair=False):
    """Return a box, the layers, and the logits' weight and bias of random pairs, float32."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=random)

    centre, radius = normal(pairs, sizes[0]), torch.rand(pairs, sizes[0], generator=random) * scale
    shape = (pairs,) if per_pair else ()
    layers = [
        AffineLayer(normal(*shape, out, given), normal(*shape, out) / 2)
        for given, out in itertools.pairwise(sizes)
    ]
    return centre - radius, centre + radius, layers, normal(classes, sizes[-1]), normal(classes)


def margins(weight, bias, pairs):
    """Return the weights and biases of class 0 minus each other class, in float64."""
    weight, bias = weight.double(), bias.double()
    return (weight[:1] - weight[1:]).repeat(pairs, 1, 1), (bias[:1] - bias[1:]).repeat(pairs, 1)


def interval_margins(lower, upper, layers, margin_weight, margin_bias):
    """Return the interval bound, written plainly, in float64 without any slack."""
    lower, upper = lower.double(), upper.double()

    def bounds(weight, bias):
        ends = weight.double() * lower[:, None], weight.double() * upper[:, None]
        return torch.minimum(*ends).sum(2) + bias, torch.maximum(*ends).sum(2) + bias

    for layer in layers:
        low, high = bounds(layer.weight, layer.bias.double())
        lower, upper = low.clamp(min=0), high.clamp(min=0)
    return bounds(margin_weight, margin_bias)[0]


def hidden(layers, points, pair):
    """Return what the last hidden ReLU gives in the dtype of the points, (K, F)."""
    for layer in layers:
        weight = layer.weight if layer.weight.dim() == 2 else layer.weight[pair]
        bias = layer.bias if layer.bias.dim() == 1 else layer.bias[pair]
        affine = torch.nn.functional.linear(points, weight.to(points), bias.to(points))
        points = affine.relu()
    return points


def computed_margins(layers, weight, bias, points, pair):
    """Return the margins of class 0 as the float32 logits have them, (K, classes - 1)."""
    logits = torch.nn.functional.linear(hidden(layers, points, pair), weight, bias).double()
    return logits[:, :1] - logits[:, 1:]


def last_slack(high, weight, bias):
    """Return the rounding of the logits' own layer on features up to high, (P, classes - 1)."""
    each = high.double() @ weight.double().abs().T + bias.double().abs()
    return rounding_share(weight.shape[1]) * (each[:, :1] + each[:, 1:])


def bounds_of(case, **options):
    lower, upper, layers, weight, bias = case
    rows, offset = margins(weight, bias, len(lower))
    high = torch.maximum(lower.abs(), upper.abs()).double()
    for layer in layers:
        high = (layer.weight.double().abs() @ high[..., None]).squeeze(-1) + layer.bias.abs()
    slack = last_slack(1.01 * high, weight, bias)
    return backward_margins(lower, upper, layers, rows, offset, slack, **options)


def corners(lower, upper):
    """Return all corners of one box, (2^F, F)."""
    return torch.cartesian_prod(*torch.stack([lower, upper], 1))


def worst_points(layers, weight, bias, lower, upper, pair, steps=20):
    """Return points of one box where descent has made each margin small, (classes - 1, F)."""
    other = torch.arange(1, len(weight))
    points = ((lower + upper) / 2).repeat(len(other), 1)
    for _ in range(steps):
        points.requires_grad_(True)
        logits = hidden(layers, points, pair) @ weight.T + bias
        loss = (logits[:, 0] - logits.gather(1, other[:, None])[:, 0]).sum()
        (gradient,) = torch.autograd.grad(loss, points)
        points = points.detach() - gradient.sign() * (upper - lower) / 8
        points = torch.minimum(torch.maximum(points, lower), upper)
    return points


@pytest.mark.parametrize("intermediate", [False, True])
@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    scale=st.sampled_from([0.0, 0.05, 0.5, 3.0]),
    per_pair=st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_no_point_of_the_box_has_a_smaller_margin(intermediate, seed, sizes, scale, per_pair):
    case = random_case(seed, sizes, scale=scale, per_pair=per_pair)
    lower, upper, layers, weight, bias = case
    bounds = bounds_of(case, intermediate=intermediate)
    assert bounds.isfinite().all()
    for pair, (low, high) in enumerate(zip(lower, upper, strict=True)):
        drawn = torch.rand(200, sizes[0], generator=torch.Generator().manual_seed(seed))
        drawn = torch.minimum(torch.maximum(low + drawn * (high - low), low), high)
        ends = corners(low, high).reshape(-1, sizes[0])
        found = worst_points(layers, weight, bias, low, high, pair)
        points = torch.cat([ends, drawn, found])
        assert (computed_margins(layers, weight, bias, points, pair) >= bounds[pair]).all()


@pytest.mark.parametrize("intermediate", [False, True])
@pytest.mark.parametrize("seed", range(30))
def test_bounds_are_never_looser_than_intervals_and_mostly_tighter(seed, intermediate):
    lower, upper, layers, weight, bias = random_case(seed, (5, 8, 8, 6), scale=0.2)
    rows, offset = margins(weight, bias, len(lower))
    nothing = torch.zeros(offset.shape)
    bounds = backward_margins(
        lower, upper, layers, rows, offset, nothing, intermediate=intermediate
    )
    plain = interval_margins(lower, upper, layers, rows, offset)
    assert (bounds >= plain - 1e-3).all()
    assert (bounds > plain + 1e-3).double().mean() > 0.5


def test_backward_bounds_of_hidden_layers_help():
    gains = []
    for seed in range(10):
        case = random_case(seed, (5, 8, 8, 6), scale=0.2)
        gains.append((bounds_of(case, intermediate=True) - bounds_of(case)).mean())
    assert torch.stack(gains).mean() > 0.1


def one_by_one(values):
    return torch.tensor(values)[None]


def test_a_bound_worked_out_by_hand():
    # x in [-1, 3]: relu(x + 2) = x + 2, and relu(x) <= 3/4 (x + 1), so that their difference is at
    # least x/4 + 5/4 >= 1, which x = -1 attains. Intervals give 1 - 3 = -2.
    layer = AffineLayer(torch.tensor([[1.0], [1.0]]), torch.tensor([2.0, 0.0]))
    box = one_by_one([-1.0]), one_by_one([3.0])
    bound = backward_margins(
        *box, [layer], one_by_one([[1.0, -1.0]]), one_by_one([0.0]), one_by_one([0.0])
    )
    assert bound.item() == pytest.approx(1.0, abs=1e-5)
    # With slack 1 it is not certified.
    bound = backward_margins(
        *box, [layer], one_by_one([[1.0, -1.0]]), one_by_one([0.0]), one_by_one([1.0])
    )
    assert bound.item() <= 0


@pytest.mark.parametrize(("lower", "upper"), [(-1.0, 2.0), (-2.0, 1.0)])
def test_the_lower_line_leaves_the_smaller_area(lower, upper):
    # relu(x) >= x where upper >= -lower, else relu(x) >= 0; relu(x + 2) = x + 2 counts -1/2: at
    # least x/2 - 1 >= -1.5 for x >= -1, and -x/2 - 1 >= -1.5 for x <= 1.
    layer = AffineLayer(torch.tensor([[1.0], [1.0]]), torch.tensor([0.0, 2.0]))
    bound = backward_margins(
        one_by_one([lower]),
        one_by_one([upper]),
        [layer],
        one_by_one([[1.0, -0.5]]),
        one_by_one([1.0]),
        one_by_one([0.0]),
    )
    assert bound.item() == pytest.approx(-0.5, abs=1e-5)


def test_without_layers_the_bound_is_the_interval_bound():
    bound = backward_margins(
        one_by_one([-1.0, 0.0]),
        one_by_one([2.0, 5.0]),
        [],
        one_by_one([[3.0, -1.0]]),
        one_by_one([10.0]),
        one_by_one([0.5]),
    )
    assert bound.item() == pytest.approx(-3 - 5 + 10 - 0.5, abs=1e-6)


def test_a_pair_is_bounded_as_if_it_were_alone():
    case = random_case(5, per_pair=True)
    lower, upper, layers, weight, bias = case
    together = bounds_of(case, intermediate=True)
    for pair in range(len(lower)):
        one = slice(pair, pair + 1)
        alone = [AffineLayer(layer.weight[pair], layer.bias[pair]) for layer in layers]
        bounds = bounds_of((lower[one], upper[one], alone, weight, bias), intermediate=True)
        torch.testing.assert_close(bounds, together[one], rtol=1e-12, atol=1e-12)


def cancelling_case(seed, layers):
    """Return a case of one point whose huge weights cancel, so that float32 is far off."""
    random = torch.Generator().manual_seed(seed)
    features = 256
    point = torch.rand(1, features, generator=random)
    steps = []
    for _ in range(layers):
        huge = torch.randn(features, features // 2, generator=random) * 1e4
        weight = torch.cat([huge, -huge * (1 + 1e-5)], 1)
        weight = weight[:, torch.randperm(features, generator=random)]
        steps.append(AffineLayer(weight, torch.randn(features, generator=random)))
    weight = torch.randn(3, features, generator=random)
    return point, point, steps, weight, torch.zeros(3)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_what_float32_rounds_is_inside_the_bound(layers, seed):
    case = cancelling_case(seed, layers)
    point, _, steps, weight, bias = case
    computed = computed_margins(steps, weight, bias, point, 0)
    rows, offset = margins(weight, bias, 1)
    exact = hidden(steps, point.double(), 0) @ rows[0].T
    slack = last_slack(1.1 * hidden(steps, point, 0), weight, bias)
    bounds = backward_margins(point, point, steps, rows, offset, slack)
    assert not torch.allclose(computed, exact, rtol=1e-9)
    assert (bounds <= torch.minimum(computed, exact)).all()


@pytest.mark.parametrize(
    ("weight", "bias", "sign", "offset"),
    [([1e8, 1.0, -1e8], 0.0, 1.0, 0.0), ([1e8, -3.0, -1e8], 1.0, -1.0, 0.5)],
)
def test_a_margin_that_exists_in_exact_arithmetic_only_is_not_certified(weight, bias, sign, offset):
    # 1e8 takes in neither 1 nor -3 in float32: 0 for 1, and 1 for -2, which is another side of 0.
    first, second, third = (torch.tensor(value) for value in weight)
    computed = sign * (first + second + third + bias).relu() + offset
    exact = sign * max(sum(weight) + bias, 0.0) + offset
    assert computed <= 0 < exact
    layer = AffineLayer(torch.tensor([weight]), torch.tensor([bias]))
    point, rows = torch.ones(1, 3), one_by_one([[sign]])
    bound = backward_margins(point, point, [layer], rows, one_by_one([offset]), one_by_one([0.0]))
    assert bound.item() <= 0


def test_what_a_bias_sums_up_counts_as_rounding():
    # The window is one pixel; the rest of the image cancels to 1 inside the bias.
    def bound(**known):
        layer = AffineLayer(torch.ones(1, 1), torch.ones(1), **known)
        rows = one_by_one([[1.0]])
        return backward_margins(
            torch.zeros(1, 1), torch.ones(1, 1), [layer], rows, torch.zeros(1, 1), torch.zeros(1, 1)
        )

    assert bound().item() > 0.99
    assert bound(bias_magnitude=torch.tensor([2e8]), terms=3).item() <= 0
    assert bound(terms=10**6).item() < 0.95


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["lower", "upper", "weight", "bias", "rows", "offset", "slack"])
@pytest.mark.parametrize("intermediate", [False, True])
def test_what_is_not_finite_is_not_certified(bad, place, intermediate):
    lower, upper = torch.zeros(2, 2), torch.ones(2, 2)
    weight, bias = torch.ones(2, 3, 2), torch.ones(2, 3)
    rows, offset, slack = torch.ones(2, 4, 3), torch.ones(2, 4), torch.zeros(2, 4)
    tensors = (lower, upper, weight, bias, rows, offset, slack)
    names = ("lower", "upper", "weight", "bias", "rows", "offset", "slack")
    dict(zip(names, tensors, strict=True))[place].view(2, -1)[0, 0] = bad
    layers = [AffineLayer(weight, bias), AffineLayer(torch.eye(3), torch.zeros(3))]

    def bounds():
        return backward_margins(
            lower, upper, layers, rows, offset, slack, intermediate=intermediate
        )

    if (lower > upper).any():
        with pytest.raises(PatchproofError, match="lower <= upper"):
            bounds()
        return
    broken = bounds()[0, :1] if place in ("rows", "offset", "slack") else bounds()[0]
    assert not (broken > 0).any()
    assert (bounds()[1] > 0).all()


def test_a_network_that_may_overflow_is_not_certified():
    layers = [
        AffineLayer(torch.full((1, 1), 1e20), torch.zeros(1)),
        AffineLayer(torch.full((1, 1), 1e20), torch.zeros(1)),
    ]
    box = torch.ones(1, 1), torch.ones(1, 1)
    rows, offset = torch.ones(1, 1, 1), torch.ones(1, 1)
    zero = torch.zeros(1, 1)
    assert backward_margins(*box, layers[:1], rows, offset, zero).item() > 0
    assert backward_margins(*box, layers, rows, offset, zero).item() == -math.inf
    # Nor where the infinite feature counts nothing: 0 times infinity is not a number.
    assert backward_margins(*box, layers, 0 * rows, offset, zero).item() == -math.inf


def test_no_pairs_and_no_margins_give_no_bounds():
    for pairs, others in ((0, 3), (2, 0)):
        bounds = backward_margins(
            torch.zeros(pairs, 2),
            torch.ones(pairs, 2),
            [AffineLayer(torch.ones(4, 2), torch.ones(4))],
            torch.ones(pairs, others, 4),
            torch.ones(pairs, others),
            torch.zeros(pairs, others),
            intermediate=True,
        )
        assert bounds.shape == (pairs, others)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"upper": torch.ones(2, 3)}, r"lower and upper \(P, F_0\)"),
        ({"upper": -torch.ones(2, 2)}, "lower <= upper"),
        ({"layers": [AffineLayer(torch.ones(4, 3), torch.ones(4))]}, "layer 1"),
        ({"layers": [AffineLayer(torch.ones(3, 4, 2), torch.ones(4))]}, "layer 1"),
        ({"margin_weight": torch.ones(2, 3, 5)}, "margin_weight"),
        ({"slack": torch.zeros(2, 1)}, "margin_bias and slack"),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(change, message):
    values = {
        "lower": torch.zeros(2, 2),
        "upper": torch.ones(2, 2),
        "layers": [AffineLayer(torch.ones(4, 2), torch.ones(4))],
        "margin_weight": torch.ones(2, 3, 4),
        "margin_bias": torch.ones(2, 3),
        "slack": torch.zeros(2, 3),
    }
    with pytest.raises(PatchproofError, match=message):
        backward_margins(**(values | change))


@pytest.mark.parametrize(
    "parts",
    [
        {"weight": torch.ones(2), "bias": torch.ones(2)},
        {"weight": torch.ones(2, 3), "bias": torch.ones(3)},
        {"weight": torch.ones(2, 3), "bias": torch.ones(2), "bias_magnitude": torch.ones(3)},
        {"weight": torch.ones(2, 3), "bias": torch.ones(2), "terms": 2},
    ],
)
def test_a_layer_of_the_wrong_shape_is_refused(parts):
    with pytest.raises(PatchproofError, match="expected"):
        AffineLayer(**parts)
