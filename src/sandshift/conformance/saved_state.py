"""The saved state as somebody on the way could change it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, Final

from google.protobuf import any_pb2

from sandshift.wire.sandshift import state_pb2

FIRST_PID: Final = 4001


def altered(config: any_pb2.Any, **changes: Any) -> any_pb2.Any:
    """The saved state with single fields of its envelope changed."""
    envelope = state_pb2.SavedState.FromString(config.value)
    for name, value in changes.items():
        setattr(envelope, name, value)
    return any_pb2.Any(type_url=config.type_url, value=envelope.SerializeToString())


def repacked(config: any_pb2.Any, payload: state_pb2.SavedSandbox) -> any_pb2.Any:
    """The saved state with another payload, sealed as its writer would have."""
    data = payload.SerializeToString(deterministic=True)
    return altered(config, payload=data, sha256=hashlib.sha256(data).digest())


def payload_of(config: any_pb2.Any) -> state_pb2.SavedSandbox:
    return state_pb2.SavedSandbox.FromString(state_pb2.SavedState.FromString(config.value).payload)


def with_containers(config: any_pb2.Any, names: Iterable[str]) -> any_pb2.Any:
    """The saved state as that of a sandbox with these containers too, which run; their pids count from FIRST_PID."""
    payload = payload_of(config)
    for number, name in enumerate(names):
        container = payload.sandbox.containers.add(
            guest_id=name, container_id=name, pid=FIRST_PID + number, started=True
        )
        container.processes.add(process_id=f"{name}:", pid=container.pid, started=True)
    return repacked(config, payload)
