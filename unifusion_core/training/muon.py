"""Muon with all matrices of one shape orthogonalised together, in fp32.

torch.optim.Muon goes matrix by matrix in bfloat16; on a CPU without bfloat16 units that took 3.5 s for a step of the
micro VLM, against 0.1 s here (LOG.md). On a GPU torch's own is as good. Keller Jordan, "Muon", 2024; the factor
0.2·sqrt(max(rows, columns)) that gives updates the size of AdamW's is from Liu et al., arXiv:2502.16982.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, distributed, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class BatchedMuon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised by Newton-Schulz, with decoupled weight decay; for 2-D parameters only."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            odd = [tuple(p.shape) for p in group["params"] if p.ndim != 2]
            if odd:
                raise ValueError(f"BatchedMuon takes matrices only, got shapes {odd}")

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                self._step_shape(shape, parameters, group)

    def _step_shape(self, shape: torch.Size, parameters: list[nn.Parameter], group: dict) -> None:
        gradients = [p.grad for p in parameters]
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        buffers = [self.state[p]["momentum"] for p in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        ahead = torch.stack(torch._foreach_lerp(gradients, buffers, group["momentum"]))
        updates = _shared(ahead).mul_(-group["lr"] * 0.2 * max(shape) ** 0.5)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, list(updates.unbind()))


def _shared(matrices: Tensor) -> Tensor:
    """`orthogonalize`, each process of a group taking its share: gradients, and so momenta, are equal in all."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return orthogonalize(matrices)
    share = math.ceil(len(matrices) / distributed.get_world_size())
    start = share * distributed.get_rank()
    mine = matrices.new_zeros(share, *matrices.shape[1:])
    if start < len(matrices):
        done = orthogonalize(matrices[start : start + share])
        mine[: len(done)] = done
    parts = [torch.empty_like(mine) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, mine)
    return torch.cat(parts)[: len(matrices)]


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """[n, rows, columns] → about the nearest semi-orthogonal matrices (singular values in 0.7..1.2)."""
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
