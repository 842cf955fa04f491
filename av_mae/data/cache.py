"""Records of small sets kept in memory, their sounds decoded."""

import io
from collections.abc import Sequence
from typing import Any

import soundfile


class Cached:
    """Records as they are read the first time, kept until `limit` bytes are taken; later ones are read each time.

    Sounds are kept as 16-bit WAV: decoding FLAC costs five times as much as reading that. Each process that reads has
    a cache of its own.
    """

    def __init__(self, records: Sequence[dict[str, Any]], limit: float):
        self._records, self._limit = records, limit
        self._kept: dict[int, dict[str, Any]] = {}
        self._bytes = 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": {}, "_bytes": 0}

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self._kept:
            return self._kept[index]
        record = self._records[index]
        if self._bytes < self._limit:
            record = record | {"sound": _decoded(record["sound"])}
            self._bytes += _size(record)
            if self._bytes <= self._limit:
                self._kept[index] = record
        return record


def _decoded(encoded: bytes) -> bytes:
    """A sound of up to 16 bits as WAV; any other, or one that cannot be decoded, as it is."""
    try:
        with soundfile.SoundFile(io.BytesIO(encoded)) as file:
            if file.subtype != "PCM_16":
                return encoded
            samples, rate = file.read(dtype="int16"), file.samplerate
            if len(samples) < file.frames:
                return encoded
    except soundfile.LibsndfileError:
        return encoded
    decoded = io.BytesIO()
    soundfile.write(decoded, samples, rate, format="WAV", subtype="PCM_16")
    return decoded.getvalue()


def _size(record: dict[str, Any]) -> int:
    """Bytes of a record's pictures and sounds."""
    return sum(map(len, [record["sound"], *record["frames"], *record.get("masks", ()), *record.get("sources", ())]))
