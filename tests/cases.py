"""The shapes, formats and inputs that the tests and the benchmarks share."""

import numpy as np

from bnbq.reference import BLOCKSIZES  # noqa: F401

FORMATS = ("nf4", "fp4", "int4")

# (m, n, k): every tail of every kernel's tile sizes, and nothing that takes long in scalar code.
SMALL_SHAPES = (
    (1, 1, 64), (1, 65, 128), (2, 3, 64), (3, 64, 192), (4, 17, 256), (5, 33, 320), (7, 130, 64),
    (8, 16, 512), (15, 31, 448), (16, 64, 64), (17, 48, 1024), (33, 100, 128), (65, 20, 192),
)
# k % 64 != 0: blocks cross rows, rows may start in the middle of a byte.
FLAT_SHAPES = ((1, 1, 1), (2, 3, 5), (3, 7, 33), (4, 5, 63), (2, 9, 65), (5, 4, 100), (3, 33, 127), (1, 2, 1), (6, 1, 96))


def weight(n: int, k: int, seed: int = 0) -> np.ndarray:
    """f32[n, k] with the row-to-row scale differences of trained weights."""
    rng = np.random.default_rng((seed, n, k))
    rows = np.exp(rng.standard_normal((n, 1)) * 0.5).astype(np.float32)
    return rng.standard_normal((n, k), np.float32) * rows * np.float32(0.02)


def activations(m: int, k: int, seed: int = 1, outliers: int = 0) -> np.ndarray:
    """f32[m, k]; `outliers` elements of each row are of size 6 to 60."""
    rng = np.random.default_rng((seed, m, k))
    x = rng.standard_normal((m, k), np.float32)
    for row in x:
        columns = rng.choice(k, min(outliers, k), replace=False)
        row[columns] = rng.uniform(6, 60, columns.size) * rng.choice((-1, 1), columns.size)
    return x


def formula(count: int, seed: int = 1) -> np.ndarray:
    """f32[count] from an integer recurrence: the same numbers in any language, for golden vectors.

    A linear congruential generator (Numerical Recipes' constants); its top 24 bits are an exact
    fp32 in [-1, 1), and every 37th value is scaled up so that blocks differ in absmax.
    """
    values = np.empty(count, np.float32)
    state = seed
    for i in range(count):
        state = (state * 1664525 + 1013904223) % 2**32
        values[i] = np.float32((state >> 8) / 2**23 - 1) * np.float32(8 if i % 37 == 0 else 1)
    return values


def awkward_blocks(blocksize: int, thresholds: np.ndarray) -> np.ndarray:
    """f32[blocks, blocksize] that sit on every edge of the encoding.

    Zeros of both signs, a lone extreme, denormals, values whose absmax is 1 so that each is
    exactly a threshold or one ulp beside it, huge values, and an absmax too small to invert.
    """
    ties = np.concatenate([thresholds, np.nextafter(thresholds, np.float32(2)), np.nextafter(thresholds, np.float32(-2))])
    ties = np.clip(ties, -1, 1).astype(np.float32)
    blocks = [
        np.zeros(blocksize), -np.zeros(blocksize), np.full(blocksize, -1.0), np.full(blocksize, 3e38),
        np.full(blocksize, 1e-40), np.full(blocksize, np.finfo(np.float32).tiny),
    ]
    one = np.zeros(blocksize)
    one[blocksize // 2] = -7.5
    blocks.append(one)
    for start in range(0, ties.size, blocksize - 1):
        block = np.zeros(blocksize)
        part = ties[start:start + blocksize - 1]
        block[0] = 1
        block[1:1 + part.size] = part
        blocks.append(block)
    return np.stack(blocks).astype(np.float32)
