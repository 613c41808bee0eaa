"""The 64-bit keyed hash behind everything random about data: our own, so that no library can change an order.

Where the same values are hashed for several purposes the last key tells these apart: 1 and 2 the order of an epoch,
101 the order of shards, 102 the order inside a window of shards; augmentations have numbers of their own.
"""

from __future__ import annotations

import functools

import numpy as np

__all__ = ["GOLDEN", "keyed_hash", "keyed_hash_int", "mix"]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1


# Arrays, which NumPy takes in half the time of its scalars.
_30, _27, _31 = (np.array(bits, dtype=np.uint64) for bits in (30, 27, 31))
_FIRST, _SECOND = (np.array(word, dtype=np.uint64) for word in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: a bijection of 64-bit words in which every input bit flips half the output."""
    values = (values ^ (values >> _30)) * _FIRST
    values = (values ^ (values >> _27)) * _SECOND
    return values ^ (values >> _31)


def keyed_hash(values: np.ndarray, *keys: int) -> np.ndarray:
    """A 64-bit hash of each value under integer keys (any size; taken modulo 2^64). Same shape, uint64."""
    state = _state(keys)
    return mix(mix(np.asarray(values).astype(np.uint64) + state) ^ state)


@functools.lru_cache(maxsize=256)  # for a few values it would take longer than the hashing itself
def _state(keys: tuple[int, ...]) -> np.ndarray:
    state = np.zeros(1, dtype=np.uint64)
    for key in keys:
        state = mix((state ^ np.uint64(key & _MASK)) + GOLDEN)
    state.flags.writeable = False
    return state


def keyed_hash_int(value: int, *keys: int) -> int:
    """`keyed_hash` of one integer, as a Python integer below 2^64."""
    return int(keyed_hash(np.array([value & _MASK], dtype=np.uint64), *keys)[0])
