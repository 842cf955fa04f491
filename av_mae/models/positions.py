"""Fixed sin-cos positions (paper section 3; layout of the published weights)."""

import functools

import numpy as np

from av_mae.models.config import require


def _sin_cos_1d(coordinates: np.ndarray, width: int) -> np.ndarray:
    """[N] coordinates → [N, width], laid out [sin…, cos…] with frequencies 10000^(-k / (width / 2))."""
    require(width % 2 == 0, f"width={width} of one coordinate must be even")
    frequencies = 10000.0 ** (-np.arange(width // 2, dtype=np.float64) / (width / 2))
    angles = np.outer(coordinates.astype(np.float64), frequencies)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


@functools.lru_cache(maxsize=64)
def sin_cos_2d(grid: tuple[int, int], width: int) -> np.ndarray:
    """Positions of a (rows, columns) grid, row-major: float32 [rows · columns, width].

    The first half of the width encodes the column, the second half the row.
    """
    require(width % 4 == 0, f"{width=} must be a multiple of 4")
    row, column = (c.ravel() for c in np.meshgrid(*map(np.arange, grid), indexing="ij"))
    return np.concatenate([_sin_cos_1d(column, width // 2), _sin_cos_1d(row, width // 2)], axis=1).astype(np.float32)
