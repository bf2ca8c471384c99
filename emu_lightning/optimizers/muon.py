"""Muon for hidden layers, AdamW beside it, in one optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer

# Coefficients of the quintic that pushes singular values towards 1 (Jordan et al. 2024).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix: Tensor, num_iterations: int = 5) -> Tensor:
    """U V^T, roughly, of a matrix U S V^T: its singular values become about 1 (0.7 to 1.2).

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks". With the matrix X
    divided by its Frobenius norm, the iteration is X <- a X + (b A + c A^2) X with A = X X^T.

    Args:
        matrix: (rows, columns); computed in its precision, so bfloat16 is fast and enough.
        num_iterations: of the quintic.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix  # the smaller Gram matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(num_iterations):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(Optimizer):
    """Muon for the weights of hidden layers, AdamW for all others.

    A convolution's weight (out, in, h, w) is the matrix (out, in h w). Muon moves matrices whose smaller side
    has at least ``min_side`` rows or columns; what remains for AdamW is the first and the last layer, narrow
    embeddings, LoRA's factors, gains and biases, as its authors advise.

    Muon's step is scaled by 0.2 sqrt(max(rows, columns)), so that its entries are as large as AdamW's: one
    learning rate serves both (Liu et al. 2025, "Muon is scalable for LLM training").

    Args:
        params: parameters; groups are made here.
        lr: learning rate; the size that AdamW would have.
        weight_decay: decoupled.
        momentum: of Muon, Nesterov's.
        betas, eps: of AdamW.
        min_side: see above.

    Raises:
        ValueError: an argument is out of its range, or there are no parameters.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-4,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        min_side: int = 64,
    ) -> None:
        if lr < 0 or weight_decay < 0 or not 0 <= momentum < 1:
            raise ValueError(
                f"Muon: lr={lr}, weight_decay={weight_decay}, momentum={momentum}: the first two may not be "
                "negative, momentum lies in [0, 1)"
            )
        params = list(params)
        hidden = [each for each in params if each.ndim >= 2 and _smaller_side(each) >= min_side]
        chosen = {id(each) for each in hidden}
        others = [each for each in params if id(each) not in chosen]
        groups: list[dict[str, Any]] = [
            {"params": hidden, "use_muon": True},
            {"params": others, "use_muon": False},
        ]
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "betas": tuple(betas),
            "eps": eps,
        }
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; ``closure`` computes the gradients first where it is given, as Lightning does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moved = [each for each in group["params"] if each.grad is not None]
            if group["use_muon"]:
                self._muon(moved, group)
            elif moved:
                self._adamw(moved, group)
        return loss

    def _muon(self, params: list[nn.Parameter], group: dict[str, Any]) -> None:
        for param in params:
            assert param.grad is not None
            state = self.state[param]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(param)
            gradient, buffer = param.grad, state["momentum_buffer"]
            buffer.mul_(group["momentum"]).add_(gradient)
            direction = gradient.add(buffer, alpha=group["momentum"]).flatten(1)  # Nesterov
            update = orthogonalize(direction.bfloat16())
            scale = 0.2 * math.sqrt(max(direction.shape))
            param.mul_(1 - group["lr"] * group["weight_decay"])
            param.add_(update.to(param.dtype).view(param.shape), alpha=-group["lr"] * scale)

    def _adamw(self, params: list[nn.Parameter], group: dict[str, Any]) -> None:
        for param in params:
            state = self.state[param]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(param)
                state["exp_avg_sq"] = torch.zeros_like(param)
        states = [self.state[param] for param in params]
        adamw(
            params,  # type: ignore[arg-type]  # a list of parameters is one of tensors
            [param.grad for param in params],  # type: ignore[misc]
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _smaller_side(weight: Tensor) -> int:
    return min(weight.shape[0], weight[0].numel())
