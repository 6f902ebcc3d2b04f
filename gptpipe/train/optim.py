"""Optimizers: AdamW for everything, or Muon for the matrices inside the blocks and AdamW for the rest."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gptpipe.model.device import gather, shard_like
from gptpipe.model.gpt import GPT, qkv_rows
from gptpipe.train.params import TrainParams

# Quintic Newton-Schulz coefficients and their use: Jordan et al., 2024, kellerjordan.github.io/posts/muon
_A, _B, _C = 3.4445, -4.7750, 2.0315
_NEWTON_SCHULZ_STEPS = 5
_MOMENTUM = 0.95


def orthogonalise(matrices: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrices, roughly: singular values of (M, rows, columns) moved to about 1.

    Works in bfloat16 on a GPU and in float32 on a CPU, where bfloat16 would be emulated.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if x.shape[-1] > 2 * x.shape[-2] and not x.is_cuda:  # fewer multiplications, but needs float32
        x = _product_of_polynomials(x @ x.mT) @ x
    else:
        for _ in range(_NEWTON_SCHULZ_STEPS):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return (x.mT if tall else x).to(matrices.dtype)


def _product_of_polynomials(gram: Tensor) -> Tensor:
    """p_5(G) ... p_1(G), the factor that the steps put before X, from the first G = X X^T alone.

    p(G) X has the Gram matrix p(G) G p(G), and polynomials of one matrix commute.
    """
    product = polynomial = _polynomial(gram)
    for _ in range(_NEWTON_SCHULZ_STEPS - 1):
        gram = polynomial @ gram @ polynomial
        polynomial = _polynomial(gram)
        product = polynomial @ product
    return product


def _polynomial(gram: Tensor) -> Tensor:
    """A I + B G + C G^2."""
    polynomial = torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)
    polynomial.diagonal(dim1=-2, dim2=-1).add_(_A)
    return polynomial


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: every direction of a weight matrix moves equally far.

    The update is scaled by 0.2 * sqrt(max(rows, columns)), which gives it AdamW's root mean square, so that one
    learning rate and weight decay serve both (Liu et al., 2025, arXiv:2502.16982, eq. 4). Matrices of one shape
    are updated together. A parameter may be several matrices, one below the other: `heights` has the rows of
    each.
    """

    def __init__(
        self,
        params: list[Tensor],
        lr: float,
        weight_decay: float,
        heights: dict[Tensor, list[int]] | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self._heights = heights or {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[Tensor]] = {}
            for parameter in group["params"]:
                heights = self._heights.get(parameter, [len(parameter)])
                heights = heights[:1] if len(set(heights)) == 1 else heights
                shape = (*heights, parameter.shape[1])
                by_shape.setdefault(shape, []).append(parameter)
            for (*heights, _), parameters in by_shape.items():
                gradients: list[Tensor] = [
                    parameter.grad for parameter in parameters if parameter.grad is not None
                ]
                for parameter in parameters:
                    if not self.state[parameter]:
                        self.state[parameter]["momentum"] = torch.zeros_like(parameter)
                buffers = [self.state[parameter]["momentum"] for parameter in parameters]
                torch._foreach_lerp_(buffers, gradients, 1 - _MOMENTUM)
                nesterov = [gather(x) for x in torch._foreach_lerp(gradients, buffers, _MOMENTUM)]
                updates = list(map(shard_like, _updates(nesterov, heights), parameters))
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, updates, alpha=-group["lr"])


def _updates(nesterov: list[Tensor], heights: list[int]) -> Sequence[Tensor]:
    """Scaled directions for matrices of these heights, one below the other; a single height repeats."""
    if len(heights) == 1:
        directions = _scaled(torch.cat(nesterov).view(-1, heights[0], nesterov[0].shape[1]))
        return torch.split(directions.flatten(0, 1), [len(x) for x in nesterov])
    parts = [_scaled(part) for part in torch.split(torch.stack(nesterov), heights, dim=1)]
    return torch.cat(parts, dim=1).unbind()


def _scaled(matrices: Tensor) -> Tensor:
    """Directions of (M, rows, columns) with AdamW's root mean square."""
    return 0.2 * math.sqrt(max(matrices.shape[1:])) * orthogonalise(matrices)


def build_optimizers(model: GPT, params: TrainParams) -> list[torch.optim.Optimizer]:
    """The optimizers that together update every parameter once.

    Weight decay is for matrices, not for vectors.
    """
    named = dict(model.named_parameters())  # tied weights appear once
    hidden = {name: p for name, p in named.items() if p.dim() == 2 and name.startswith("blocks.")}
    muon = hidden if params.optimizer == "muon" else {}
    rest = {name: p for name, p in named.items() if name not in muon}
    scales = _lr_scales(model, params)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}  # one group is one fused update
    for name, parameter in rest.items():
        decay = params.weight_decay if parameter.dim() == 2 else 0.0
        groups.setdefault((scales.get(name, 1.0), decay), []).append(parameter)
    param_groups = [
        {"params": members, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), members in groups.items()
    ]
    adamw = torch.optim.AdamW(param_groups, lr=params.lr, betas=params.betas, fused=True)
    optimizers: list[torch.optim.Optimizer] = [adamw]
    if muon:
        heights: dict[Tensor, list[int]] = {
            p: qkv_rows(model.params) for name, p in muon.items() if "qkv" in name
        }
        optimizers.append(Muon(list(muon.values()), params.lr, params.weight_decay, heights))
    set_lr(optimizers, params.lr)
    return optimizers


def _lr_scales(model: GPT, params: TrainParams) -> dict[str, float]:
    """Factors of the learning rate, by parameter name.

    With Muon, an untied input embedding takes larger steps than the matrices inside the blocks, and the output
    matrix smaller ones: the embedding's weights are about 1, not 0.02 (see `GPT._initialise`), and a row is
    updated only when its token occurs. Learning rates by the role of a matrix: Yang et al., 2022,
    arXiv:2203.03466, table 3; of embeddings: Hayou and Liu, 2025, arXiv:2506.15025.
    """
    starts_large = (
        model.params.architecture != "gpt2" and not model.params.tie_embeddings and params.init_from is None
    )
    if params.optimizer != "muon" or not starts_large:
        return {}
    return {"embedding.weight": params.embedding_lr_scale, "head.weight": params.head_lr_scale}


def set_lr(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    """Give each group of parameters its share of the learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
