"""Newton-Schulz iterations of Muon (Jordan et al. 2024): the orthogonal factor of a matrix, by products alone.

An iteration maps X (n, m) with n <= m to (a I + b G + c G G) X, where G = X X^T (n, n). Everything between two X is a
polynomial in G, so several iterations need only one G of n^2 m operations: G becomes Q G Q with Q = a I + b G + c G G.
Rounding errors of G grow by a^2 an iteration, so fp32 takes at most three of them before G is computed anew, and bf16
takes one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama_ds.layout.matrix_owners import EVERY_PASS, FEW_PASSES, ITERATIONS, WIDE

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # a, b, c of Jordan et al.
NORM_EPS = 1e-7
HALVED = 256  # rows from which on half of a symmetric product is copied instead of computed


def orthogonalised(matrix: Tensor) -> Tensor:
    """Return about U V^T of the singular value decomposition U S V^T of a matrix (n, m), in the matrix's dtype.

    X / |X| with the Frobenius norm has singular values in [0, 1]. An iteration maps each of them by the polynomial
    a x + b x^3 + c x^5; five leave those that were not tiny between 0.7 and 1.2.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix
    x = x / (x.norm() + NORM_EPS)
    if x.dtype != torch.float32:
        for _ in range(ITERATIONS):
            x = _iterated(x)
    else:
        for iterations in FEW_PASSES if x.shape[1] >= WIDE * x.shape[0] else EVERY_PASS:
            x = _factor(x, iterations) @ x
    return x.mT if tall else x


def _iterated(x: Tensor) -> Tensor:
    """Return X after an iteration; the largest term a X is not rounded together with the others."""
    a, b, c = COEFFICIENTS
    gram = x @ x.mT
    return a * x + (b * gram + c * gram @ gram) @ x


def _factor(x: Tensor, iterations: int) -> Tensor:
    """Return the matrix (n, n) by which `iterations` multiply X (n, m)."""
    gram = _symmetric(x, x.mT)
    product, q = None, gram
    for number in range(iterations):
        if number:
            gram = _symmetric(_symmetric(q, gram), q)
        q = _polynomial(gram)
        product = q if product is None else _symmetric(q, product)
    assert product is not None
    return product


def _polynomial(gram: Tensor) -> Tensor:
    a, b, c = COEFFICIENTS
    q = _symmetric(gram, gram).mul_(c).add_(gram, alpha=b)
    q.diagonal().add_(a)
    return q


def _symmetric(left: Tensor, right: Tensor) -> Tensor:
    """Return a product (n, n) that is symmetric, with three quarters of its operations: the rest is their mirror."""
    n = len(left)
    if n < HALVED:
        return left @ right
    half, out = n // 2, left.new_empty(n, n)
    torch.mm(left[:half], right, out=out[:half])
    torch.mm(left[half:], right[:, half:], out=out[half:, half:])
    out[half:, :half] = out[:half, half:].mT
    return out
