"""No placement has more weight between items of one label than this: a relaxation of the whole chain.

Of two neighbouring layers, "these two items share a label" is a 0/1 matrix

    X_l = ( Y_l    Z_l   )      Y_l of layer l with itself, Z_l of layer l with l + 1; n items a layer, m = n / parts
          ( Z_l^T  Y_l+1 )      a label; rows of each quarter sum to m, the diagonal is 1

whose eigenvalues are 2m, ``parts`` times (one of them for the constant vector), and 0. The gain is Σ_l <W_l, Z_l>. Two
things are relaxed at once: eigenvalues between 0 and 2m with the right sum, and entries between 0 and 1. Because layers
are a chain, asking the first of neighbours only asks it of all (a chordal pattern). Neighbouring X share Y_l, which is
what a bound of each pair by itself lacks.

Triangles are added at a price: of three items, two pairs that share a label make the third share it, so that
X_ab + X_ac - X_bc is at most 1. They close most of the gap that eigenvalues leave.

Alternating directions (ADMM) bring both relaxations together. Any multipliers, and any prices of at least 0, give a
valid bound: with Λ on the second copy, the most of <W - Λ, X> under the eigenvalues plus the most of <Λ, X> under the
entries; the best seen is returned.
"""

from __future__ import annotations

import numpy as np

_WORK = 2e9  # of all eigenvalue problems: layers · (2n)^3 · steps
_MOST_STEPS = 500
_FIRST, _PACE = 40, 0.02  # step from which triangles are priced, and how fast
_EASY, _MOST_TRIANGLES = (
    32,
    64,
)  # items of a layer: beyond the first triangles are priced seldom, beyond the second never
_GOOD = 0.981  # of what known labels leave: then they are within 2% of the bound
_EVERY = 10  # steps from one bound to the next


def kind_of_bound(pairs: int, n: int) -> str:
    """What ``upper_bound`` relaxes for so many pairs of layers and items of a layer."""
    if _steps(pairs, n) < _EVERY:
        return "largest entries of rows and columns"
    return "eigenvalues, entries and triangles of the chain" if n <= _MOST_TRIANGLES else "eigenvalues and entries"


def _steps(pairs: int, n: int) -> int:
    return int(min(_WORK / (pairs * (2 * n) ** 3), _MOST_STEPS))


def upper_bound(weights_JNN: np.ndarray, parts: int, found: float | None = None) -> float:
    """Most weight between items of one label that any labels can have; load caps only lower it.

    Args:
        found: that of labels that are known; the bound is good enough within 2% of what they leave.
    """
    pairs, n, _ = weights_JNN.shape
    size = n // parts
    whole = float(weights_JNN.sum())
    if pairs == 0 or parts == 1:
        return whole
    steps = _steps(pairs, n)
    if steps < _EVERY:  # too large: the largest entries of each row, or column
        sides = [np.partition(weights_JNN, n - size, axis=axis) for axis in (2, 1)]
        return float(np.minimum(sides[0][:, :, n - size :].sum((1, 2)), sides[1][:, n - size :].sum((1, 2))).sum())
    scale = float(weights_JNN.mean()) * 4
    gain = np.zeros((pairs, 2 * n, 2 * n))
    gain[:, :n, n:] = weights_JNN / (2 * scale)
    gain[:, n:, :n] = gain[:, :n, n:].swapaxes(1, 2)
    basis = _complement(n)
    even = np.full((2 * n, 2 * n), size / n)
    second = np.tile(even, (pairs, 1, 1))
    dual = np.zeros_like(second)
    best, penalty = np.inf, 1.0
    plain, prices, offset = gain, None, 0.0
    pause = 1 if n <= _EASY else 4
    for step in range(steps):
        first = _with_eigenvalues(second - dual + gain / penalty, basis, even, size, parts)
        before, second = second, _with_entries(first + dual, n)
        dual += first - second
        if step % _EVERY == _EVERY - 1 or step == steps - 1:
            best = min(best, offset + _bound(gain, penalty * dual, basis, even, size, parts, n))
            if found is not None and whole - best * scale >= _GOOD * (whole - found):
                break
            apart, moved = np.linalg.norm(first - second), np.linalg.norm(second - before) * penalty
            change = 1.3 if apart > 5 * moved else 1 / 1.3 if moved > 5 * apart else 1.0
            penalty, dual = penalty * change, dual / change
        if step >= _FIRST and step % pause == 0 and n <= _MOST_TRIANGLES:
            prices = _priced(prices, first, _PACE * penalty * pause)
            gain = plain - prices.sum(3, dtype=np.float64) + prices.sum(1, dtype=np.float64) / 2
            gain, offset = (gain + gain.swapaxes(1, 2)) / 2, float(prices.sum(dtype=np.float64)) / 2
    return best * scale


def _priced(prices: np.ndarray | None, matrix: np.ndarray, pace: float) -> np.ndarray:
    """Prices [pairs, a, b, c] of "b and c share a label with a, so they share one": X_ab + X_ac - X_bc is at most 1."""
    near = matrix.astype(np.float32)
    over = near[:, :, :, None] + near[:, :, None, :]
    over -= near[:, None]
    over -= 1
    over *= pace
    if prices is not None:
        over += prices
    return np.maximum(over, 0, out=over)


def _complement(n: int) -> np.ndarray:
    """Orthonormal columns [2n, 2n - 2], both halves of each summing to 0."""
    ones = np.zeros((2 * n, 2))
    ones[:n, 0] = ones[n:, 1] = 1
    return np.linalg.qr(np.concatenate([ones, np.eye(2 * n)[:, : 2 * n - 1]], 1))[0][:, 2:]


def _inner(matrix: np.ndarray, basis: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    symmetric = (matrix + matrix.swapaxes(1, 2)) / 2
    return np.linalg.eigh(basis.T @ symmetric @ basis)


def _with_eigenvalues(matrix, basis, even, size: int, parts: int) -> np.ndarray:
    """The nearest matrices whose quarters' rows sum to m, with eigenvalues between 0 and 2m that sum as they must."""
    values, vectors = _inner(matrix, basis)
    vectors = basis @ vectors
    values = _capped(values, 2 * size, 2 * size * (parts - 1))
    return even + (vectors * values[:, None]) @ vectors.swapaxes(1, 2)


def _capped(values: np.ndarray, most: float, total: float) -> np.ndarray:
    """The nearest numbers between 0 and ``most`` that sum to ``total``, by bisection of the shift."""
    low, high = values.min(1) - most, values.max(1)
    for _ in range(50):
        middle = (low + high) / 2
        over = np.clip(values - middle[:, None], 0, most).sum(1) > total
        low, high = np.where(over, middle, low), np.where(over, high, middle)
    return np.clip(values - high[:, None], 0, most)


def _with_entries(matrix: np.ndarray, n: int) -> np.ndarray:
    """The nearest matrices with entries between 0 and 1, 1 on the diagonal, neighbours alike where they overlap."""
    found = (matrix + matrix.swapaxes(1, 2)) / 2
    shared = (found[:-1, n:, n:] + found[1:, :n, :n]) / 2
    found[:-1, n:, n:], found[1:, :n, :n] = shared, shared
    found = np.clip(found, 0, 1)
    np.einsum("jii->ji", found)[:] = 1
    return found


def _bound(gain, dual, basis, even, size: int, parts: int, n: int) -> float:
    dual = (dual + dual.swapaxes(1, 2)) / 2
    rest = gain - dual
    values, _ = _inner(rest, basis)
    spectral = (rest * even).sum() + 2 * size * values[:, -(parts - 1) :].sum()
    across = dual[:, :n, n:] + dual[:, n:, :n].swapaxes(1, 2)
    rows = np.partition(across, n - size, axis=2)[:, :, n - size :].sum((1, 2))
    columns = np.partition(across, n - size, axis=1)[:, n - size :].sum((1, 2))
    own = np.zeros((len(gain) + 1, n, n))
    own[:-1] += dual[:, :n, :n]
    own[1:] += dual[:, n:, n:]
    diagonal = np.einsum("lii->li", own)
    entries = np.minimum(rows, columns).sum() + diagonal.sum()
    if size > 1:
        others = own.copy()
        np.einsum("lii->li", others)[:] = -np.inf
        entries += np.partition(others, n - size + 1, axis=2)[:, :, n - size + 1 :].sum()
    return float(spectral + entries)
