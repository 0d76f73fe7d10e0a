"""No placement has more weight between items of one label than this: a relaxation of the whole chain.

Of two neighbouring layers, "these two items share a label" is a 0/1 matrix

    X_l = ( Y_l    Z_l   )      Y_l of layer l with itself, Z_l of layer l with l + 1; n items a layer, m = n / parts
          ( Z_l^T  Y_l+1 )      a label; rows of each quarter sum to m, the diagonal is 1

whose eigenvalues are 2m, ``parts`` times (one of them for the constant vector), and 0. The gain is Σ_l <W_l, Z_l>. Two
things are relaxed at once: eigenvalues between 0 and 2m with the right sum, and entries between 0 and 1. Because layers
are a chain, asking the first of neighbours only asks it of all (a chordal pattern). Neighbouring X share Y_l, which is
what a bound of each pair by itself lacks.

Triangles are added at a price: of three items, two pairs that share a label make the third share it, so that
X_ab + X_ac - X_bc is at most 1. They close most of the gap that eigenvalues leave. Those broken most are taken in, of
millions, and stay until their price is 0. A price rises by what its triangle is broken by, over the
number of triangles with the same entries: as fast as can be without overshooting.

Alternating directions (ADMM, over-relaxed) bring both relaxations together. Any multipliers, and any prices of at least
0, give a valid bound: with Λ on the second copy, the most of <W - Λ, X> under the eigenvalues plus the most of <Λ, X>
under the entries; the best seen is returned.
"""

from __future__ import annotations

import numpy as np

_WORK, _MOST_STEPS = 5e9, 500  # of all eigenvalue problems: layers · (2n)^3 · steps; and steps of small ones
_GOOD, _STALLS = 0.019, 0.005  # of what is left out: so near to known labels, or so little gained by _LATELY bounds
_EVERY, _LATELY = 10, 5  # steps from one bound to the next
_PENALTY, _RELAX = 2.0, 1.5
_FIRST, _SEARCH = 5, 5  # step from which there are triangles, and steps until more are looked for
_ADDED, _BROKEN, _PACE = 8, 0.02, 4.0  # triangles more for each item, broken by so much; pace of their prices
_CHUNK = 1 << 24  # entries of one array of triangles


def kind_of_bound(pairs: int, n: int, work: float = 1.0) -> str:
    """What ``upper_bound`` relaxes for so many pairs of layers and items of a layer."""
    if _steps(pairs, n, work) < _EVERY:
        return "largest entries of rows and columns"
    return "a semidefinite relaxation of the chain, with triangles"


def _steps(pairs: int, n: int, work: float) -> int:
    return int(min(_WORK / (pairs * (2 * n) ** 3), _MOST_STEPS) * work)


def upper_bound(weights_JNN: np.ndarray, parts: int, found: float | None = None, work: float = 1.0) -> float:
    """Most weight between items of one label that any labels can have; load caps only lower it.

    Args:
        found: that of labels that are known; the bound is good enough within 2% / ``work`` of what they leave.
        work: how many times the usual number of steps, which take seconds.
    """
    pairs, n, _ = weights_JNN.shape
    size, whole = n // parts, float(weights_JNN.sum())
    if whole == 0 or parts == 1:
        return whole
    steps = _steps(pairs, n, work)
    if steps < _EVERY:  # too large: the largest entries of each row, or column
        sides = [np.partition(weights_JNN, n - size, axis=axis) for axis in (2, 1)]
        return float(np.minimum(sides[0][:, :, n - size :].sum((1, 2)), sides[1][:, n - size :].sum((1, 2))).sum())
    scale = float(weights_JNN.mean()) * 4
    plain = np.zeros((pairs, 2 * n, 2 * n))
    plain[:, :n, n:] = weights_JNN / (2 * scale)
    plain[:, n:, :n] = plain[:, :n, n:].swapaxes(1, 2)
    basis, even = _complement(n), np.full((2 * n, 2 * n), size / n)
    second = np.tile(even, (pairs, 1, 1))
    dual, gain, triangles = np.zeros_like(second), plain, _Triangles(second.shape)
    left: list[float] = []  # what no labels keep, by the best bound so far
    penalty, lately = _PENALTY, max(int(_LATELY * work), 1)
    for step in range(steps):
        first = _with_eigenvalues(second - dual + gain / penalty, basis, even, size, parts)
        mixed, before = _RELAX * first + (1 - _RELAX) * second, second
        second = _with_entries(mixed + dual, n)
        dual += mixed - second
        if step % _EVERY == _EVERY - 1 or step == steps - 1:
            now = triangles.prices_K.sum() + _bound(gain, penalty * dual, basis, even, size, parts, n)
            left.append(max([whole - now * scale, *left[-1:]]))
            stalls = len(left) > lately and left[-1] - left[-1 - lately] < _STALLS * abs(left[-1])
            if stalls or (found is not None and left[-1] >= (1 - _GOOD / work) * (whole - found)):
                break
            apart, moved = np.linalg.norm(first - second), np.linalg.norm(second - before) * penalty
            change = 1.3 if apart > 5 * moved else 1 / 1.3 if moved > 5 * apart else 1.0
            penalty, dual = penalty * change, dual / change
        if step >= _FIRST:
            if step % _SEARCH == 0:
                triangles.search(second)
            gain = plain - triangles.priced(second, penalty)
    return whole - left[-1]


class _Triangles:
    """X_ab + X_ac - X_bc is at most 1, for some a, b and c of a matrix, at a price.

    entries_3K: numbers of the three entries in [pairs, 2n, 2n], above the diagonal.
    prices_K: at least 0.
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = shape
        self.entries_3K, self.prices_K, self.pace_K = np.zeros((3, 0), np.int64), np.zeros(0), np.zeros(0)

    def search(self, matrix: np.ndarray) -> None:
        """Drops those without a price and takes in the ones that ``matrix`` breaks most."""
        paid_K = self.prices_K > 0
        old_3K, new_3K = self.entries_3K[:, paid_K], np.concatenate(list(self._broken(matrix)), 1)
        # two entries name a triangle: the third has the items that these do not share
        names_K, new_names_K = (x[:2].min(0) * matrix.size + x[:2].max(0) for x in (old_3K, new_3K))
        new_3K = new_3K[:, ~np.isin(new_names_K, names_K)]
        self.entries_3K = np.concatenate([old_3K, new_3K], 1)
        self.prices_K = np.concatenate([self.prices_K[paid_K], np.zeros(new_3K.shape[1])])
        share_K = np.bincount(self.entries_3K.ravel(), minlength=matrix.size)[self.entries_3K].sum(0)
        self.pace_K = _PACE / np.maximum(share_K, 1)

    def _broken(self, matrix: np.ndarray):
        pairs, both, _ = self.shape
        for pair, near in enumerate(matrix.astype(np.float32)):
            for centres in np.array_split(np.arange(both), -(-(both**3) // _CHUNK)):
                over = near[centres, :, None] + near[centres, None]
                over -= near
                a, b, c = np.unravel_index(np.flatnonzero(over > 1 + _BROKEN), over.shape)
                # those within a layer that the next pair has as well are left to it
                kept = (b < c) & ((pair == pairs - 1) | (np.minimum(centres[a], b) < both // 2))
                a, b, c = a[kept], b[kept], c[kept]
                most = _ADDED * len(centres)
                if len(a) > most:
                    worst = np.argpartition(-over[a, b, c], most)[:most]
                    a, b, c = a[worst], b[worst], c[worst]
                a = centres[a]
                ends = [(a, b), (a, c), (b, c)]
                yield np.array([(pair * both + np.minimum(x, y)) * both + np.maximum(x, y) for x, y in ends])

    def priced(self, matrix: np.ndarray, penalty: float) -> np.ndarray:
        """Raises the prices of those that are broken, lowers the others', and gives what entries cost at them."""
        ab, ac, bc = matrix.ravel()[self.entries_3K]
        self.prices_K = np.maximum(0, self.prices_K + penalty * self.pace_K * (ab + ac - bc - 1))
        each = np.concatenate([self.prices_K, self.prices_K, -self.prices_K]) / 2
        cost = np.bincount(self.entries_3K.ravel(), each, matrix.size).reshape(self.shape)
        return cost + cost.swapaxes(1, 2)


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
