"""Prepared sets at run time: records of shards → host batches. What a record is for those who read it."""

from typing import Any, Protocol

Record = dict[str, Any]  # the fields of a stored clip, by name (see records.FIELDS)


class Records(Protocol):
    """Random access to records, e.g. records.RecordSource."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...
