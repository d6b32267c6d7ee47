"""Four-bit weights whose rounding errors compensate each other: GPTQ (Frantar et al., 2022, arXiv 2210.17323).

For inputs X (tokens, inputs) the error of a rounded matrix Q is ||(W - Q) X^T||^2, whose curvature is H = X^T X.
Columns are rounded one at a time; the error of each is distributed over the remaining ones, by the rows of the upper
Cholesky factor U of H^-1 (algorithm 1):

    W[:, j+1:] -= (W[:, j] - Q[:, j]) / U[j, j] * U[j, j+1:]

Columns of a group share a scale: the largest magnitude divided by 7.5, as the codes are -8 to 7.
"""

from dataclasses import dataclass

import torch

GROUP = 128
LOWEST, HIGHEST = -8, 7
DAMPING = 0.01
"""Share of the mean curvature added to the diagonal: inputs that are always zero would make H singular."""


@dataclass(frozen=True, slots=True)
class Int4:
    """codes: int8 (outputs, inputs), from -8 to 7. scales: (outputs, inputs / GROUP)."""

    codes: torch.Tensor
    scales: torch.Tensor

    def dense(self) -> torch.Tensor:
        """Return the matrix, (outputs, inputs), in the scales' dtype."""
        groups = self.codes.unflatten(1, (-1, GROUP)).to(self.scales.dtype)
        return (groups * self.scales[..., None]).flatten(1)


@torch.no_grad()
def gptq(weight: torch.Tensor, curvature: torch.Tensor, scale_dtype: torch.dtype) -> Int4:
    """Quantize `weight` (outputs, inputs), inputs a multiple of GROUP. curvature: H (inputs, inputs), fp32."""
    left = (
        weight.float().clone()
    )  # the weights not yet rounded, with the errors of earlier columns distributed
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = []
    factor = _factor(curvature)
    for start in range(0, weight.shape[1], GROUP):
        group = slice(start, start + GROUP)
        scale = (left[:, group].abs().amax(1) / 7.5).to(scale_dtype).clamp(min=torch.finfo(scale_dtype).tiny)
        scales.append(scale)
        # Within the group errors are distributed column by column, to later groups in one product below.
        errors = torch.empty_like(left[:, group])  # (outputs, GROUP)
        for column in range(start, start + GROUP):
            code = _round(left[:, column], scale)
            codes[:, column] = code
            error = (left[:, column] - code * scale.float()) / factor[column, column]
            left[:, column + 1 : group.stop] -= error[:, None] * factor[column, column + 1 : group.stop]
            errors[:, column - start] = error
        left[:, group.stop :] -= errors @ factor[group, group.stop :]
    return Int4(codes, torch.stack(scales, 1))


def _round(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (values / scale.float()).round_().clamp_(LOWEST, HIGHEST)


def _factor(curvature: torch.Tensor) -> torch.Tensor:
    """Return U, upper triangular, with U^T U = H^-1 for the damped H."""
    damped = curvature.double()
    damped.diagonal().add_(DAMPING * damped.diagonal().mean().clamp(min=1e-10))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()
