"""Small sets kept in memory."""

import io
from typing import Any

import soundfile

from av_mae.data import Record, Records


class Cached:
    """Records as they are read the first time, kept until `limit` bytes are taken; later ones are read each time.

    Audio is kept as 16-bit WAV: decoding FLAC costs five times as much as reading that. Each process that reads has a
    cache of its own.
    """

    def __init__(self, records: Records, limit: float):
        self._records, self._limit = records, limit
        self._kept: dict[int, Record] = {}
        self._bytes = 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": {}, "_bytes": 0}

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        if index in self._kept:
            return self._kept[index]
        record = self._records[index]
        if self._bytes < self._limit:
            record = record | {"sound": _decoded(record["sound"])}
            encoded = [record["sound"], *record["frames"], *record.get("masks", ()), *record.get("sources", ())]
            self._bytes += sum(map(len, encoded))
            if self._bytes <= self._limit:
                self._kept[index] = record
        return record


def _decoded(encoded: bytes) -> bytes:
    """Audio of up to 16 bits as WAV; any other, or one that cannot be decoded, as it is."""
    try:
        with soundfile.SoundFile(io.BytesIO(encoded)) as file:
            samples, rate = file.read(dtype="int16"), file.samplerate
            if file.subtype != "PCM_16" or len(samples) < file.frames:
                return encoded
    except soundfile.LibsndfileError:
        return encoded
    decoded = io.BytesIO()
    soundfile.write(decoded, samples, rate, format="WAV", subtype="PCM_16")
    return decoded.getvalue()
