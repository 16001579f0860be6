"""The strings that travel beside a Request. There are none beside a Response in ttrpc. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from ttrpc.wire.ttrpc_pb2 import KeyValue


class Metadata(Mapping[str, str]):
    """What a client sent: keys in lower case, `[key]` is the first value, `all(key)` are all of them."""

    __slots__ = ("_values",)

    def __init__(self, pairs: Iterable[tuple[str, str]] = ()) -> None:
        self._values: dict[str, list[str]] = {}
        for key, value in pairs:
            self._values.setdefault(key.lower(), []).append(value)

    @classmethod
    def received(cls, pairs: Iterable[KeyValue]) -> Metadata:
        return cls((pair.key, pair.value) for pair in pairs)

    def __getitem__(self, key: str) -> str:
        return self._values[key.lower()][0]

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and key.lower() in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def all(self, key: str) -> tuple[str, ...]:
        """Every value of a key, in the order they were sent; empty when there is none."""
        return tuple(self._values.get(key.lower(), ()))

    def __repr__(self) -> str:
        return f"Metadata({self._values!r})"


def key_values(metadata: Mapping[str, str | Sequence[str]]) -> list[KeyValue]:
    """Metadata as it goes into a Request: lower-case keys, one entry per value.

    Raises:
        TypeError: a value is neither a string nor a sequence of strings (ttrpc has no binary metadata).
    """
    pairs: list[KeyValue] = []
    source = (
        ((key, metadata.all(key)) for key in metadata) if isinstance(metadata, Metadata) else metadata.items()
    )
    for key, value in source:
        for one in (value,) if isinstance(value, str) else value:
            if not isinstance(one, str):
                raise TypeError(f"metadata {key!r}: values are strings, ttrpc has no binary metadata")
            pairs.append(KeyValue(key=key.lower(), value=one))
    return pairs
