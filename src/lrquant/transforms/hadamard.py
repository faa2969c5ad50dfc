"""Orthogonal matrices that spread outliers over all channels: randomised Hadamard matrices, and random ones.

A row of activations h becomes h R. Where R is a Hadamard matrix over √n, every new channel is a sum of all old
ones with signs, so that no channel stands out (QuaRot §3, SpinQuant §3); random signs before it make R differ
from seed to seed. Hadamard matrices are built here for every order 2ᵏ·m where m is 1 or one of Paley's: q + 1
for a prime q ≡ 3 (mod 4), 2(q + 1) for a prime or the square of a prime q ≡ 1 (mod 4).

A LayerNorm subtracts the mean, and that commutes with R exactly when R leaves the direction of all ones where it
is. `keeping_mean` gives an R this property by one reflection, which moves its entries by about 1/n.
"""

import math

import torch
from torch import Tensor


def hadamard(order: int) -> Tensor | None:
    """A matrix (order, order) of ±1 with H Hᵀ = order · I, float64; None: no construction here gives this order.

    For powers of two it is Sylvester's, which is symmetric.
    """
    for doublings in range(order.bit_length() - 1, -1, -1):
        core, rest = divmod(order, 1 << doublings)
        matrix = _paley(core) if rest == 0 else None
        if matrix is not None:
            for _ in range(doublings):
                matrix = torch.kron(_TWO, matrix)
            return matrix
    return None


_TWO = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)


def _paley(order: int) -> Tensor | None:
    """Paley's Hadamard matrix of this order, or the one of order 1."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    residues = _quadratic_residues(order - 1) if order % 4 == 0 else None
    if residues is not None:  # q ≡ 3 (mod 4): χ(i − j) is antisymmetric
        return torch.eye(order, dtype=torch.float64) + _bordered(residues, -1.0)
    residues = _quadratic_residues(order // 2 - 1) if order % 4 == 0 and order // 2 % 4 == 2 else None
    if residues is not None:  # q ≡ 1 (mod 4): symmetric
        turned = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(_bordered(residues, 1.0), _TWO) + torch.kron(torch.eye(order // 2).double(), turned)
    return None


def _bordered(residues: Tensor, left: float) -> Tensor:
    """`residues` with a row of ones above, a column of `left` beside, and zero in the corner."""
    matrix = torch.zeros(residues.shape[0] + 1, residues.shape[0] + 1, dtype=torch.float64)
    matrix[1:, 1:], matrix[0, 1:], matrix[1:, 0] = residues, 1.0, left
    return matrix


def _quadratic_residues(q: int) -> Tensor | None:
    """χ(i − j) for i, j in the field of q elements, (q, q): 1 for squares, −1 for the others, 0 for zero.

    The field of p² elements is a + b√n with n no square modulo p; such a number is a square there exactly when its
    norm a² − n b² is one modulo p. None: q is neither a prime nor the square of one.
    """
    root = math.isqrt(q)
    p = root if root * root == q else q
    if p < 3 or any(p % divisor == 0 for divisor in range(2, math.isqrt(p) + 1)):
        return None
    character = torch.full((p,), -1.0, dtype=torch.float64)
    character[torch.arange(p) ** 2 % p] = 1.0
    character[0] = 0.0
    elements = torch.arange(q)
    if p == q:
        return character[(elements[:, None] - elements) % p]
    no_square = int((character < 0).nonzero()[0])
    first = (elements[:, None] // p - elements // p) % p
    second = (elements[:, None] % p - elements % p) % p
    return character[(first**2 - no_square * second**2) % p]


def orthogonal_matrix(size: int, kind: str, generator: torch.Generator, keep_mean: bool = False) -> Tensor:
    """R, (size, size), float64, R Rᵀ = I: `hadamard` with random signs, or `random` (uniform over all).

    Where no Hadamard matrix of the size is known here, both are random. With `keep_mean` R is right for LayerNorm.
    """
    known = hadamard(size) if kind == "hadamard" else None
    if known is not None:
        signs = torch.randint(0, 2, (size, 1), generator=generator).double() * 2 - 1
        matrix = signs * known / math.sqrt(size)
    else:
        matrix, upper = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
        matrix = matrix * upper.diagonal().sign()  # by which it is uniform (Mezzadri 2007, §5)
    return keeping_mean(matrix) if keep_mean else matrix


def keeping_mean(matrix: Tensor) -> Tensor:
    """R' = R (I − 2 v vᵀ / vᵀv) with v = Rᵀe − e for e = (1, …, 1)/√n: orthogonal, and e R' = e."""
    ones = torch.full((matrix.shape[0],), matrix.shape[0] ** -0.5, dtype=matrix.dtype)
    v = ones @ matrix - ones
    length = v @ v
    return matrix if length < 1e-24 else matrix - torch.outer(matrix @ v, v) * (2 / length)
