"""From a network to the operators that bounds go through, by tracing it."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from patchproof.bounds.operators import (
    Affine,
    Convolution,
    Flatten,
    Linear,
    Maximum,
    MaximumPool,
    Mean,
    Monotone,
    Operator,
    Scale,
    Sum,
)
from patchproof.errors import PatchproofError

_WAY_OUT = (
    "build the network of Conv2d, Linear, monotone activations, BatchNorm, average and max "
    "pooling, Flatten and sums; or use a defense that asks nothing of it, such as PatchCleanser"
)

_PIECEWISE_LINEAR: tuple[type[nn.Module], ...] = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU)
_SMOOTH: tuple[type[nn.Module], ...] = (
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.Softplus,
    nn.Tanh,
    nn.Sigmoid,
    nn.LogSigmoid,
    nn.Softsign,
    nn.Hardsigmoid,
)
_NEVER_NEGATIVE = (nn.ReLU, nn.ReLU6, nn.Softplus, nn.Sigmoid, nn.Hardsigmoid)
_UNCHANGED: tuple[type[nn.Module], ...] = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)
_LAYERS: tuple[type[nn.Module], ...] = (
    nn.Conv2d,
    nn.Linear,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.Flatten,
)
_MODULES = {*_PIECEWISE_LINEAR, *_SMOOTH, *_UNCHANGED, *_LAYERS}
_RELUS: tuple[Any, ...] = (torch.relu, torch.relu_, functional.relu, functional.relu_)
_SMOOTH_FUNCTIONS: tuple[Any, ...] = (torch.tanh, torch.sigmoid, functional.tanh)
_OF_MAPS: tuple[Any, ...] = (torch.mean, Tensor.mean, torch.amax, Tensor.amax)


@dataclass(frozen=True, eq=False)
class Step:
    """One operator of a network.

    Attributes:
        name: of the layer, for messages.
        operator: None where the input is passed on.
        inputs: which earlier steps it takes; -1 is the image.
    """

    name: str
    operator: Operator | None
    inputs: tuple[int, ...]


def trace(model: nn.Module, image_shape: tuple[int, int, int]) -> list[Step]:
    """Return the operators of a network in order; the last gives the logits.

    Args:
        model: from images (N, C, H, W) to logits (N, classes).
        image_shape: (C, H, W).

    Raises:
        PatchproofError: an operator without bounds, or a network that cannot be traced.
    """
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise PatchproofError(
                f"bounds: expected layers without hooks, got one on {name or 'the model'}: remove "
                "it, or fold what it does into the weights"
            )
    tracer = _Tracer()
    try:
        graph = tracer.trace(model)
        module = fx.GraphModule(model, graph)
        shapes = _Shapes(module)
        with torch.no_grad():
            shapes.run(torch.zeros(2, *image_shape, device=_device(model)))
    except PatchproofError:
        raise
    except Exception as error:  # tracing runs the user's code, which may fail in any way
        first_line = str(error).partition("\n")[0]
        raise PatchproofError(
            f"bounds: expected a network for {image_shape} images whose layers can be traced by "
            f"torch.fx, got {type(model).__name__}: {first_line}: {_WAY_OUT}"
        ) from error
    steps: list[Step] = []
    number: dict[fx.Node, int] = {}
    for node in graph.nodes:
        match node.op:
            case "placeholder":
                if number:
                    raise PatchproofError(
                        f"bounds: expected a network of one input, got {node.name} as well"
                    )
                number[node] = -1
            case "output":
                (result,) = node.args
                if not isinstance(result, fx.Node) or number.get(result) != len(steps) - 1:
                    raise PatchproofError("bounds: expected a network of one output, the logits")
            case "get_attr":
                continue
            case _ if node not in shapes.found:  # a size, which reshaping asks for
                continue
            case _:
                taken = tuple(arg for arg in node.all_input_nodes if arg in number)
                made = _operator(node, module, shapes.found)
                number[node] = len(steps)
                steps.append(Step(_name(node), made, tuple(number[arg] for arg in taken)))
    if not steps:
        raise PatchproofError("bounds: expected a network with a layer, got none")
    uses = Counter(place for step in steps for place in step.inputs)
    for step in steps:
        if isinstance(step.operator, Monotone):
            (place,) = step.inputs
            given = steps[place].operator if place >= 0 else None
            step.operator.alone = uses[place] == 1 and isinstance(given, Affine)
    return steps


class _Tracer(fx.Tracer):
    """Stops at the layers that have a rule; own modules are traced into."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if type(m) in _MODULES:
            return True
        containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
        return m.__module__.startswith("torch.nn") and not isinstance(m, containers)


class _Shapes(fx.Interpreter):
    """Runs the network and keeps the shape of every value."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[fx.Node, torch.Size] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.found[n] = value.shape
        return value


def _device(model: nn.Module) -> torch.device:
    held = next(model.parameters(), None)
    return torch.device("cpu") if held is None else held.device


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op in ("call_module", "call_method") else node.name


def _refuse(node: fx.Node, what: str) -> PatchproofError:
    return PatchproofError(f"bounds: no rule for {what} (layer {_name(node)}): {_WAY_OUT}")


def _operator(
    node: fx.Node, root: fx.GraphModule, shapes: dict[fx.Node, torch.Size]
) -> Operator | None:
    """Return the rule of one node, or raise."""
    values = [arg for arg in node.all_input_nodes if arg.op != "get_attr"]
    if node.op == "call_method" and node.target in ("view", "reshape"):
        before, after = shapes[values[0]], shapes[node]
        if after != (before[0], before[1:].numel()):
            raise _refuse(node, f"{node.target} that is not Flatten")
        return _flatten(node, root)
    for arg in values:
        if arg not in shapes:  # a size, or several tensors
            what = getattr(arg.target, "__name__", arg.target)
            raise _refuse(arg, f"{what} here")
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        if len(node.args) != 1 or node.kwargs or len(values) != 1:
            raise _refuse(node, f"{type(module).__name__} of other arguments than one tensor")
        if getattr(module, "inplace", False):
            _refuse_in_place(node, values[0], root)
        return _of_module(node, module, root, shapes[values[0]])
    if node.op == "call_method":
        found: Any = getattr(torch.Tensor, str(node.target), None)
    else:
        found = node.target
    return _of_function(node, found, values, root, shapes)


def _refuse_in_place(node: fx.Node, changed: fx.Node, root: fx.GraphModule) -> None:
    """Raise if an input that is overwritten has another use, which would see other values.

    So has what passes its input on, or shows the same memory in another shape.
    """
    while True:
        if len(changed.users) > 1:
            raise PatchproofError(
                f"bounds: expected no layer that overwrites what others use, got {_name(node)}: "
                "make it inplace=False"
            )
        if not _shares_memory(changed, root):
            return
        changed = changed.all_input_nodes[0]


def _shares_memory(node: fx.Node, root: fx.GraphModule) -> bool:
    """Tell whether the output of a node may be its input: passed on, reshaped or overwritten."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        passes = type(module) in {*_UNCHANGED, nn.Flatten}
        return passes or bool(getattr(module, "inplace", False))
    return node.op in ("call_function", "call_method") and bool(node.all_input_nodes)


def _of_module(
    node: fx.Node, module: nn.Module, root: fx.GraphModule, shape: torch.Size
) -> Operator | None:
    kind = type(module)
    if kind in _UNCHANGED:
        if module.training and kind is not nn.Identity:
            raise PatchproofError(
                f"bounds: expected eval mode, got {_name(node)} ({kind.__name__}) in train mode"
            )
        return None
    if kind in _PIECEWISE_LINEAR or kind in _SMOOTH:
        if isinstance(module, nn.LeakyReLU) and module.negative_slope < 0:
            raise _refuse(node, "a LeakyReLU that falls")
        if isinstance(module, nn.ELU | nn.CELU) and module.alpha < 0:
            raise _refuse(node, f"an {kind.__name__} that falls")
        if isinstance(module, nn.Softplus) and (module.beta <= 0 or module.threshold < 15):
            raise _refuse(node, "a Softplus that falls, as where its threshold is below 15")
        return Monotone(
            _out_of_place(module),
            exact=kind in _PIECEWISE_LINEAR,
            never_negative=kind in _NEVER_NEGATIVE,
        )
    match module:
        case nn.Conv2d() if kind is nn.Conv2d:
            if module.padding_mode != "zeros":
                raise _refuse(node, f"padding_mode={module.padding_mode!r}")
            padding = module.padding
            if isinstance(padding, str):
                if padding == "same" and any(
                    d * (k - 1) % 2
                    for d, k in zip(module.dilation, module.kernel_size, strict=True)
                ):
                    raise _refuse(node, "padding='same' of an even kernel")
                padding = (
                    tuple(
                        d * (k - 1) // 2
                        for d, k in zip(module.dilation, module.kernel_size, strict=True)
                    )
                    if padding == "same"
                    else (0, 0)
                )
            return Convolution(
                lambda: module.weight,
                lambda: module.bias,
                _pair(module.stride),
                _pair(padding),
                _pair(module.dilation),
                module.groups,
            )
        case nn.Linear() if kind is nn.Linear:
            if len(shape) != 2:
                raise _refuse(node, f"Linear on values of {len(shape)} dimensions")
            return Linear(lambda: module.weight, lambda: module.bias)
        case nn.BatchNorm1d() | nn.BatchNorm2d():
            if module.training or module.running_mean is None:
                raise PatchproofError(
                    f"bounds: expected eval mode and running statistics, got {_name(node)} "
                    "(BatchNorm) without: it would mix the images of a batch"
                )
            return Scale(lambda: _batch_norm(module)[:2], lambda: _batch_norm(module)[2])
        case nn.MaxPool2d():
            if module.ceil_mode or module.return_indices:
                raise _refuse(node, "MaxPool2d with ceil_mode or indices")
            return MaximumPool(
                _pair(module.kernel_size),
                _pair(module.stride),
                _pair(module.padding),
                _pair(module.dilation),
            )
        case nn.AvgPool2d():
            kernel = _pair(module.kernel_size)
            padded = any(_pair(module.padding)) and not module.count_include_pad
            if module.ceil_mode or padded or module.divisor_override is not None:
                raise _refuse(
                    node, "AvgPool2d with ceil_mode, a divisor, or count_include_pad=False"
                )
            channels = shape[1]
            with torch.inference_mode(False):  # else it could not be trained through
                weight = torch.full((channels, 1, *kernel), 1 / (kernel[0] * kernel[1]))
                weight = weight.to(_device(root))
            return Convolution(
                lambda: weight,
                lambda: None,
                _pair(module.stride),
                _pair(module.padding),
                groups=channels,
            )
        case nn.AdaptiveAvgPool2d() | nn.AdaptiveMaxPool2d():
            if module.output_size not in (1, (1, 1)):
                raise _refuse(node, f"{kind.__name__} to other sizes than 1")
            if isinstance(module, nn.AdaptiveAvgPool2d):
                return Mean(True, shape[2] * shape[3])
            if module.return_indices:
                raise _refuse(node, "AdaptiveMaxPool2d with indices")
            return Maximum(True)
        case nn.Flatten():
            if module.start_dim != 1 or module.end_dim not in (-1, len(shape) - 1):
                raise _refuse(node, "Flatten of other dimensions than all but the first")
            return _flatten(node, root)
    raise _refuse(node, kind.__name__)


def _of_function(
    node: fx.Node,
    function: Any,
    values: list[fx.Node],
    root: fx.GraphModule,
    shapes: dict[fx.Node, torch.Size],
) -> Operator | None:
    plain_call = not node.kwargs or set(node.kwargs) <= {"inplace"}
    if plain_call and len(values) == 1 and len(node.args) == 1:
        in_place = node.kwargs.get("inplace") or function in (torch.relu_, functional.relu_)
        if function in _RELUS or function in (Tensor.relu, Tensor.relu_):
            if in_place or function is Tensor.relu_:
                _refuse_in_place(node, values[0], root)
            return Monotone(torch.relu, exact=True, never_negative=True)
        if function in _SMOOTH_FUNCTIONS or function in (Tensor.tanh, Tensor.sigmoid):
            smooth = (
                torch.tanh if "tanh" in str(getattr(function, "__name__", "")) else torch.sigmoid
            )
            return Monotone(smooth, exact=False, never_negative=smooth is torch.sigmoid)
    if function in (torch.flatten, Tensor.flatten) and (node.args[1:], dict(node.kwargs)) in (
        ((1,), {}),
        ((), {"start_dim": 1}),
        ((1, -1), {}),
    ):
        return _flatten(node, root)
    if function is Tensor.contiguous:
        return None
    if function in _OF_MAPS and len(shapes[values[0]]) == 4:
        axes = node.args[1] if len(node.args) == 2 else node.kwargs.get("dim")
        rest = set(node.kwargs) - {"dim", "keepdim"}
        if isinstance(axes, tuple | list) and sorted(a % 4 for a in axes) == [2, 3] and not rest:
            keep, shape = bool(node.kwargs.get("keepdim", False)), shapes[values[0]]
            mean = function in (torch.mean, Tensor.mean)
            return Mean(keep, shape[2] * shape[3]) if mean else Maximum(keep)
    arithmetic = _ARITHMETIC.get(function)
    if arithmetic is not None and len(node.args) == 2 and not node.kwargs:
        name, in_place = arithmetic
        if in_place:
            _refuse_in_place(node, values[0], root)
        if len(values) == 2 and name == "add":
            if shapes[values[0]] != shapes[values[1]]:
                raise _refuse(node, "a sum of two shapes")
            return Sum()
        if len(values) == 1 and node.args.count(values[0]) == 1:
            return _with_constant(node, name, root, shapes[values[0]])
        if name == "add" and node.args == (values[0], values[0]):
            return Scale(lambda: (torch.tensor(2.0), torch.tensor(0.0)))
    what = getattr(function, "__name__", None) or str(node.target)
    raise _refuse(node, f"{what} here")


_ARITHMETIC: dict[Any, tuple[str, bool]] = {
    operator.add: ("add", False),
    torch.add: ("add", False),
    Tensor.add: ("add", False),
    operator.iadd: ("add", True),
    operator.sub: ("sub", False),
    torch.sub: ("sub", False),
    Tensor.sub: ("sub", False),
    operator.mul: ("mul", False),
    torch.mul: ("mul", False),
    Tensor.mul: ("mul", False),
    operator.truediv: ("div", False),
    torch.div: ("div", False),
    Tensor.div: ("div", False),
}


def _with_constant(node: fx.Node, name: str, root: fx.GraphModule, shape: torch.Size) -> Scale:
    """Return the rule of a sum, difference, product or quotient with a value per channel."""
    first, second = node.args
    swapped = not (isinstance(first, fx.Node) and first.op != "get_attr")
    other = first if swapped else second

    def constant() -> Tensor:
        if isinstance(other, fx.Node):
            held: Any = root
            for part in str(other.target).split("."):
                held = getattr(held, part)
            return torch.as_tensor(held)
        return torch.as_tensor(other, dtype=torch.float32)

    found = constant()
    per_channel = (
        found.ndim in (len(shape), len(shape) - 1)
        and found.numel() == shape[1]
        and (found.shape[found.ndim - len(shape) + 1] == shape[1])
    )
    if found.numel() != 1 and not per_channel:
        raise _refuse(node, f"{name} of a constant that is not one value per channel")
    if name == "div" and swapped:
        raise _refuse(node, "a constant divided by values")

    def factor_and_term() -> tuple[Tensor, Tensor]:
        value = constant().flatten()
        one, zero = torch.ones_like(value), torch.zeros_like(value)
        match name:
            case "add":
                return one, value
            case "sub":
                return (-one, value) if swapped else (one, -value)
            case "mul":
                return value, zero
        return one / value, zero

    return Scale(factor_and_term)


def _flatten(node: fx.Node, root: fx.GraphModule) -> Flatten:
    linear = [
        user.op == "call_module" and type(root.get_submodule(str(user.target))) is nn.Linear
        for user in node.users
    ]
    return Flatten(before_linear=all(linear) and bool(linear))


def _batch_norm(module: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor, Tensor]:
    """Return factor, term and the magnitude of what the term is the sum of, (C,) each."""
    assert module.running_mean is not None
    assert module.running_var is not None
    factor = (module.running_var + module.eps).rsqrt()
    if module.weight is not None:
        factor = factor * module.weight
    term = -module.running_mean * factor
    magnitude = term.abs()
    if module.bias is not None:
        term, magnitude = term + module.bias, magnitude + module.bias.abs()
    return factor, term, magnitude


def _out_of_place(module: nn.Module) -> Callable[[Tensor], Tensor]:
    if type(module) is nn.ReLU:
        return torch.relu
    if not getattr(module, "inplace", False):
        return module
    return lambda values: module(values.clone())


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))
