"""Kernels for float32 on a CPU that need less memory or less time than those of torch.

They serve eager mode only; a compiled model uses torch's own operations.
"""

import math
from typing import Any

import torch
from torch import Tensor


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float) -> Tensor:
    """Sum of the cross entropies of targets (R,), in nats; logits: `hidden @ weight.T`, (R, D) and (V, D).

    The gradient includes `z_loss` times the sum of squared log normalizers; the value does not.
    """
    total: Tensor = LinearCrossEntropy.apply(hidden, weight, targets, z_loss)  # type: ignore[no-untyped-call]
    return total


def tanh_gelu(x: Tensor) -> Tensor:
    """GELU in GPT-2's tanh form, elementwise (Hendrycks and Gimpel, 2016, arXiv:1606.08415)."""
    y: Tensor = TanhGELU.apply(x)  # type: ignore[no-untyped-call]
    return y


class LinearCrossEntropy(torch.autograd.Function):
    """See `linear_cross_entropy`. The forward pass also computes the gradients.

    Only `ROWS` rows of the logits are in memory at a time. A plain loss keeps all (R, V) logits, their log
    softmax and the gradients of both (Wijmans et al., 2024, arXiv:2411.09009).
    """

    ROWS = 1024  # a quarter of this saves memory, but costs an eighth of the speed

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float) -> Tensor:
        hidden_gradient, weight_gradient = torch.empty_like(hidden), torch.empty_like(weight)
        total = hidden.new_zeros(())
        for start in range(0, len(hidden), LinearCrossEntropy.ROWS):
            rows = slice(start, start + LinearCrossEntropy.ROWS)
            target = targets[rows, None]  # (r, 1)
            logits = hidden[rows] @ weight.T  # (r, V)
            gradient = logits.softmax(-1)
            # The largest probability is 1 / sum(exp(logits - max)). Unlike that of the target, it cannot
            # underflow.
            log_sum = logits.amax(-1) - gradient.amax(-1).log()
            total += log_sum.sum() - logits.gather(-1, target).sum()
            if z_loss:
                gradient *= (1 + 2 * z_loss * log_sum)[:, None]
            gradient.scatter_add_(-1, target, -gradient.new_ones(target.shape))
            torch.mm(gradient, weight, out=hidden_gradient[rows])
            weight_gradient.addmm_(gradient.T, hidden[rows], beta=float(start > 0))
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return hidden_gradient * gradients[0], weight_gradient * gradients[0], None, None


class TanhGELU(torch.autograd.Function):
    """See `tanh_gelu`. The forward pass also computes the derivative.

    0.5 x (1 + tanh(z / 2)) is x sigmoid(z), with z = sqrt(8 / pi) (x + 0.044715 x^3). On a CPU this takes 60%
    of the time of torch's kernel, whose tanh is slow. The tensor is processed in parts that fit in the cache.
    """

    LINEAR, CUBIC = math.sqrt(8 / math.pi), 0.044715 * math.sqrt(8 / math.pi)
    PART = 1 << 18  # elements

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        linear = x.new_tensor(TanhGELU.LINEAR)
        y, derivative = torch.empty_like(x), torch.empty_like(x)
        parts = (torch.split(tensor.view(-1), TanhGELU.PART) for tensor in (x, y, derivative))
        for x_part, y_part, derivative_part in zip(*parts, strict=True):
            sigmoid = torch.addcmul(linear, x_part, x_part, value=TanhGELU.CUBIC).mul_(x_part).sigmoid_()
            torch.mul(x_part, sigmoid, out=y_part)
            dz_dx = torch.addcmul(linear, x_part, x_part, value=3 * TanhGELU.CUBIC)
            y_slope = torch.addcmul(y_part, y_part, sigmoid, value=-1)  # dy / dz
            torch.addcmul(sigmoid, y_slope, dz_dx, out=derivative_part)
        ctx.save_for_backward(derivative)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        derivative: Tensor = ctx.saved_tensors[0]
        return gradients[0] * derivative
