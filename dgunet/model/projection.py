"""Projection of features onto the subspace that learned basis vectors span (NBNet, Cheng et al., CVPR 2021)."""

from collections.abc import Callable

import torch
from torch import Tensor


def inverse_cholesky(gram: Tensor, eye: Tensor, ridge: float) -> Tensor:
    """``L^-1`` of the Cholesky factors of matrices, ``gram = L L^T`` (B, rank, rank); ``eye`` are identities like them.

    ``ridge``, a lower bound of the eigenvalues, is for the elimination that replaces this in exported networks.
    """
    factor, _ = torch.linalg.cholesky_ex(gram)
    return torch.linalg.solve_triangular(factor, eye, upper=False)


def project(
    basis: Tensor,
    features: Tensor,
    precision: torch.dtype | None = None,
    inverse_factor: Callable[[Tensor, Tensor, float], Tensor] = inverse_cholesky,
) -> Tensor:
    """Orthogonal projection of feature maps onto the span of basis maps, ``V (V^T V)^-1 V^T features``.

    The projection does not depend on the scale of a basis map, so they are scaled to unit length: a ridge on the
    diagonal of their Gram matrix then bounds its condition number, also of coinciding, constant and zero maps. (Neither
    is in the paper: docs/differences.md.) Runs in float32 whatever autocast says, the Gram matrix in ``precision``, and
    never waits for the device.

    Args:
        basis: (B, rank, H, W).
        features: (B, C, H, W), as the result.
        precision: float64 solves with the Gram matrix; float32 orthonormalises the maps by Cholesky QR, for export and
            devices without float64 (Apple's GPU); None for what the device has. Both are within 1e-3 of the exact
            projection up to a condition number of 1e5.
        inverse_factor: for float32, see `inverse_cholesky`; exported networks need another (apps/export.py).
    """
    precision = precision or gram_precision(features)
    with torch.autocast(features.device.type, enabled=False):
        whole = basis.is_contiguous() and basis.device.type == "cpu"
        V, maps = _columns(basis.float(), whole), _columns(features.float(), whole)
        if precision == torch.float64:
            solution = solve_projection(_product(V.double(), V.double()), _product(V, maps))[:, None]
        else:
            V = _orthonormalise(V, inverse_factor)
            solution = _product(V, maps)[:, None]
        projected = (solution.mT @ V.mT).mT if whole else V @ solution  # in the memory format of the maps
        projected = projected.to(features.dtype).flatten(1, 2)  # (B, HW, C)
    return projected.unflatten(1, features.shape[2:]).permute(0, 3, 1, 2)


def gram_precision(maps: Tensor) -> torch.dtype:
    """The precision for a Gram matrix of maps: float64, or float32 on a device that has no other (Apple's GPU)."""
    return torch.float32 if maps.device.type == "mps" else torch.float64


def solve_projection(gram: Tensor, cross: Tensor) -> Tensor:
    """The coefficients ``(V^T V)^-1 V^T maps`` (..., rank, C) of a projection, float32.

    ``gram`` is ``V^T V`` (..., rank, rank), in float64 where the device has it; ``cross`` is ``V^T maps``.
    """
    # The ridge keeps a Gram matrix with rounding errors positive definite.
    ridge = 1e-8 if gram.dtype == torch.float64 else 1e-5
    unit = gram.diagonal(dim1=-2, dim2=-1).clamp_min(1e-30).rsqrt()[..., None]  # (..., rank, 1): 1 / length
    gram = unit * gram * unit.mT + ridge * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    # cholesky_ex and triangular systems: cholesky and cholesky_solve would wait for the device.
    factor, _ = torch.linalg.cholesky_ex(gram)
    half = torch.linalg.solve_triangular(factor, unit * cross.to(gram.dtype), upper=False)
    return (unit * torch.linalg.solve_triangular(factor.mT, half, upper=True)).float()


def _orthonormalise(V: Tensor, inverse_factor: Callable[[Tensor, Tensor, float], Tensor]) -> Tensor:
    """An orthonormal basis of the span of columns, in float32: Cholesky QR, done twice.

    The ridge exceeds the errors of a float32 Gram matrix, 1e-6. The first pass shortens directions whose eigenvalues
    are about as small as the ridge; the second restores their unit length, except where they are rounding errors. (The
    division by 1 + ridge keeps the length of all others.)
    """
    ridge = 1e-5
    V = V / V.detach().abs().amax(dim=(1, 2), keepdim=True).clamp_min(1e-30)  # squares have twice the range
    V = V * V.square().sum(dim=(1, 2), keepdim=True).clamp_min(1e-30).rsqrt()
    for _ in range(2):
        gram = _product(V, V)
        eye = torch.eye(gram.shape[1], device=V.device).expand_as(gram)
        V = V @ inverse_factor((gram + ridge * eye) / (1 + ridge), eye, ridge).mT[:, None]
    return V


def _columns(maps: Tensor, whole: bool) -> Tensor:
    """Maps (B, C, H, W) as the columns of matrices (B, S, HW / S, C), with no copy.

    NCHW maps on a CPU stay ``whole``, S = 1. Others are cut into their H rows, which keeps more of a GPU busy.
    """
    return maps.flatten(2).mT[:, None] if whole else maps.permute(0, 2, 3, 1)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a^T b`` of columns: (B, S, N, M) and (B, S, N, C) to (B, M, C)."""
    return (a.mT @ b).sum(dim=1)
