"""Guided backpropagation (Springenberg et al., 2015): gradients of what speaks for an output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class GuidedReLUs(TorchFunctionMode):
    """While it is entered, ReLUs pass on positive gradients only.

    It finds ``torch.relu``, ``Tensor.relu``, ``functional.relu`` and ``nn.ReLU``. The gradients of
    other activations, of ``relu_`` and of networks that were compiled stay as they are.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Replace ReLUs, and do all else as it is."""
        if func in _RELUS and args:
            return _GuidedReLU.apply(args[0])
        return func(*args, **(kwargs or {}))


_RELUS = (torch.relu, Tensor.relu, functional.relu)


class _GuidedReLU(torch.autograd.Function):
    """A ReLU through which only positive gradients pass."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        """Return the values above 0, and 0 for others."""
        result = values.clamp(min=0)
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Return the positive gradients where the values are above 0, and 0 elsewhere."""
        (result,) = ctx.saved_tensors
        passed: Tensor = gradients[0].clamp(min=0) * (result > 0)
        return passed
