"""What torch and the FLOP counters have to know of every compiled operator. Names no operator: each registers itself.

FLOPs are counted by either counter's habit: fvcore counts a multiply-add once, ``torch.utils.flop_counter`` twice.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from querymask.common.ops import extension

Shape = Sequence[int]

OPERATORS: list[str] = []
"""The compiled operators and their backward passes, by their names in ``torch.ops.querymask``."""

_fvcore_handles: dict[str, Callable[[Sequence[Any], Sequence[Any]], int]] = {}
_reference_formulas: dict[Any, Callable[..., int]] = {}


def register_operator(
    name: str,
    *,
    fake: Callable[..., Tensor],
    fake_backward: Callable[..., tuple[Tensor, ...]],
    save: Callable[[Any, tuple[Any, ...], Tensor], None],
    backward: Callable[..., tuple[Tensor | None, ...]],
    multiply_adds: Callable[..., int],
    reference_formulas: Mapping[Any, Callable[..., int]] | None = None,
) -> None:
    """Registers an operator of the extension that is differentiable once.

    Where the extension has not both ``querymask::name`` and ``querymask::name_backward``, it is not used at all.

    Args:
        name: in ``torch.ops.querymask``.
        fake: output of the operator for its arguments, without values; checks them as the kernels do.
        fake_backward: the same for ``name_backward``, whose arguments are the output's gradient and then the operator's
            as far as it needs them.
        save: ``setup_context`` of ``torch.library.register_autograd``.
        backward: gradients of all arguments, from what was saved and the output's gradient.
        multiply_adds: of the operator, from its arguments with shapes for tensors, those after the last tensor with a
            gradient optional. The backward pass counts twice as many: once for each of two factors.
        reference_formulas: FLOPs of operators that the PyTorch form consists of and ``torch.utils.flop_counter`` does
            not know.
    """
    names = [name, f"{name}_backward"]
    OPERATORS.extend(names)
    _fvcore_handles[f"querymask::{name}"] = lambda inputs, outputs: multiply_adds(*map(_traced_shape, inputs))
    _reference_formulas.update(reference_formulas or {})
    if not extension.provides(names):
        return

    def refuse_second_derivative(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(f"{name} is differentiable once: it has no second derivative")

    def flops(*arguments: Any, **unused: Any) -> int:
        return 2 * multiply_adds(*arguments)

    def backward_flops(grad_output: Shape, *arguments: Any, **unused: Any) -> int:
        return 4 * multiply_adds(*arguments)

    operator, backward_operator = (f"querymask::{name}" for name in names)
    torch.library.register_fake(operator, fake)
    torch.library.register_fake(backward_operator, fake_backward)
    torch.library.register_autograd(operator, backward, setup_context=save)
    torch.library.register_autograd(backward_operator, refuse_second_derivative)
    register_flop_formula(getattr(torch.ops.querymask, names[0]))(flops)
    register_flop_formula(getattr(torch.ops.querymask, names[1]))(backward_flops)


def _traced_shape(value: Any) -> Shape | None:
    """Of an input in fvcore's trace; None if it is no tensor."""
    from fvcore.nn.jit_handles import get_shape

    return get_shape(value)


def fvcore_handles() -> dict[str, Callable[[Sequence[Any], Sequence[Any]], int]]:
    """Handles for ``fvcore.nn.FlopCountAnalysis.set_op_handle``, by the operator's name in a trace."""
    return dict(_fvcore_handles)


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """Formulas of the operators that the PyTorch forms consist of and ``torch.utils.flop_counter`` does not know.

    For ``FlopCounterMode(custom_mapping=flop_formulas())``. Those of the compiled operators are registered already.
    """
    return dict(_reference_formulas)
