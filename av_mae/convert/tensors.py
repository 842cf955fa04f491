"""Tensors that still lie in their file: checked when the file is opened, read when they are asked for."""

import dataclasses
import math
import pathlib
import sys

import ml_dtypes
import numpy as np

from av_mae.errors import UserError

LONGEST = 80  # characters of a name in a message


class Refused(Exception):
    """A rule that the file breaks: place and cause, in one line."""


def shown(value: object) -> str:
    """A value out of a file for a message: on one line, and of a length that the file does not decide."""
    if isinstance(value, str | bytes):
        return repr(value) if len(value) <= LONGEST else f"{value[:LONGEST]!r}…"
    if isinstance(value, int) and abs(value) >= 2**64 or not isinstance(value, int | float | None):
        return f"an object of type {type(value).__name__}"
    return repr(value)


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
MAX_DIMENSIONS = 8  # weights have 5 at most
LIMIT = 2**63  # sizes and offsets are signed 64-bit numbers in every format here


@dataclasses.dataclass(slots=True)
class Storage:
    """A run of bytes in a file. `dtype` is None where the bytes have no type of their own.

    `offset` is where they start; the legacy format tells it only after the tensors.
    """

    path: pathlib.Path
    dtype: np.dtype | None
    nbytes: int
    offset: int = 0
    byteorder: str = "little"


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file: `offset` and `strides` count elements of `dtype` (native byte order) in its storage."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    storage: Storage
    offset: int
    strides: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in memory once it is read."""
        return self.size * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """Its values: C-contiguous, in memory of their own, native byte order. Reads no other bytes of the file.

        Raises:
          UserError: the file cannot be read any more, or has become shorter since it was opened.
        """
        if self.size == 0:
            return np.empty(self.shape, self.dtype)
        try:
            values = self._read_run() if self._is_run() else self._read_strided()
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.storage.path}: tensor {shown(self.name)} cannot be read, though it was there when "
                f"the file was opened: {error}"
            ) from error
        if self.storage.byteorder != sys.byteorder and self.dtype.itemsize > 1:
            values.view(f"u{self.dtype.itemsize}").byteswap(inplace=True)
        if self.dtype == np.bool_:
            return values.view(np.uint8) != 0  # any byte but 0 and 1 would be neither true nor false to NumPy
        return values

    def _start(self) -> int:
        return self.storage.offset + self.offset * self.dtype.itemsize

    def _is_run(self) -> bool:
        """Whether the elements lie in the file one after another in the order of the shape."""
        expected = 1
        for length, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if length > 1 and stride != expected:
                return False
            expected *= length
        return True

    def _read_run(self) -> np.ndarray:
        values = np.fromfile(self.storage.path, np.uint8, self.nbytes, offset=self._start())
        if len(values) < self.nbytes:
            raise OSError(f"{len(values)} bytes are left of its {self.nbytes}")
        return values.view(self.dtype).reshape(self.shape)

    def _read_strided(self) -> np.ndarray:
        """Through a memory map: the elements in between are never in memory of this process."""
        strides = tuple(stride if length > 1 else 0 for length, stride in zip(self.shape, self.strides, strict=True))
        span = 1 + sum((length - 1) * stride for length, stride in zip(self.shape, strides, strict=True))
        width = self.dtype.itemsize
        mapped = np.memmap(self.storage.path, np.uint8, "r", self._start(), (span * width,))
        view = np.ndarray(self.shape, self.dtype, mapped, strides=tuple(stride * width for stride in strides))
        return view.copy(order="C")


def stored_tensor(
    storage: Storage, dtype: np.dtype, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> StoredTensor:
    """A tensor without a name. Raises Refused unless its shape is sound and every element lies in its storage."""
    if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
        raise Refused(
            f"a tensor needs as many strides as dimensions, at most {MAX_DIMENSIONS}; it has {len(shape)} "
            f"dimensions and {len(strides)} strides"
        )
    for number in (offset, *shape, *strides):
        if type(number) is not int or not 0 <= number < LIMIT:
            raise Refused(
                "offset, shape and strides of a tensor must be whole numbers from 0 to 2^63 - 1, "
                f"one is {shown(number)}"
            )
    if math.prod(max(length, 1) for length in shape) * dtype.itemsize >= LIMIT:
        raise Refused(f"the shape {shape} of a tensor overflows 2^63 bytes")
    last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    if 0 not in shape and last >= storage.nbytes // dtype.itemsize:
        raise Refused(
            f"a tensor of shape {shape}, strides {strides} and offset {offset} reaches element {last} of a "
            f"storage that has {storage.nbytes // dtype.itemsize}"
        )
    return StoredTensor("", shape, dtype, storage, offset, strides)
