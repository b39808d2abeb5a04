"""The order of training: a permutation of each epoch that is computed where it is asked for, and never held."""

from __future__ import annotations

import numpy as np

_ROUNDS = 12  # in small ranges fewer leave some orders more frequent than others


class KeyedPermutation:
    """A permutation of 0..n-1 by a key; `permutation(positions)` costs as much as there are positions, for any n.

    A Feistel network over pairs (l, r) of Z_a x Z_b with `a b >= n`: rounds add a keyed hash of one half to the other.
    What falls outside 0..n-1 goes through it again until it is inside ("cycle walking", Black and Rogaway, "Ciphers
    with arbitrary finite domains", 2002). `a b - n < a`, so that few do.

    Args:
        n: of the range.
        key: numbers that the permutation depends on, such as seed and epoch.

    Raises:
        ValueError: unless n is at least 1.
    """

    def __init__(self, n: int, *key: int) -> None:
        if n < 1:
            raise ValueError(f"a permutation of {n} numbers: expected at least 1")
        self.n, self._a = n, max(1, int(np.ceil(np.sqrt(n))))
        self._b = -(-n // self._a)
        self._keys = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """What stands at positions `(B,)` of 0..n-1: `(B,)` int64."""
        found = self._once(np.asarray(positions, dtype=np.int64))
        while (outside := np.flatnonzero(found >= self.n)).size:
            found[outside] = self._once(found[outside])
        return found

    def _once(self, x: np.ndarray) -> np.ndarray:
        left, right = np.divmod(x, self._b)
        for i in range(0, _ROUNDS, 2):
            left = (left + _hash(right, self._keys[i], self._a)) % self._a
            right = (right + _hash(left, self._keys[i + 1], self._b)) % self._b
        return left * self._b + right


def epoch_order(n: int, first: int, num: int, seed: int) -> np.ndarray:
    """Samples `first..first+num-1` of n samples repeated without end, each epoch in an order of its own: `(num,)`."""
    line = np.arange(first, first + num)
    epochs, positions = np.divmod(line, n)
    found = np.empty_like(line)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        found[here] = KeyedPermutation(n, seed, epoch)(positions[here])
    return found


def batch_order(n: int, step: int, batch_size: int, rank: int, world_size: int, seed: int) -> np.ndarray:
    """Which of n samples batch `step` of a rank has, `(B,)`.

    The W ranks take the samples of a line, in which they stand once in each epoch, in turn: batch `step` of a rank is
    the stretch of B from `(step W + rank) B` on. So none comes twice in an epoch, on whatever ranks.
    """
    return epoch_order(n, (step * world_size + rank) * batch_size, batch_size, seed)


def _hash(x: np.ndarray, key: np.uint64, size: int) -> np.ndarray:
    """Numbers of 0..size-1 by splitmix64 (Steele et al., 2014) of x and a key."""
    z = x.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key  # arrays of unsigned numbers wrap around
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) % np.uint64(size)).astype(np.int64)
