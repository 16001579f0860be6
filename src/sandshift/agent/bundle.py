"""The spec that runc is given: the one that came, with what only the agent knows. Pure."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from sandshift.agent import cgroup

POD_PID_NAMESPACE: Final = "/run/sandshift/pod/pid"
"""How a spec asks for the process namespace that the pod's containers share."""
POD_VOLUMES: Final = "/run/sandshift/pod/volumes"
"""Folders below it are made when a spec binds them."""
SHARED: Final = ("/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/dev/shm")  # noqa: S108
"""Of the guest; bound into every container that brings none of its own."""


class BadSpec(Exception):
    """It cannot be run; says why."""


@dataclass(frozen=True, slots=True)
class Known:
    """What only the agent knows of a container."""

    container_id: str
    root: str
    terminal: bool
    sources: Mapping[str, str]
    """By destination: where what came for it lies in the guest."""
    read_only: frozenset[str]
    """Of these destinations: those that may not be written."""


def parse(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object. Raises BadSpec."""
    try:
        parsed = json.loads(data)
    except ValueError as error:
        raise BadSpec(f"{what} is no JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise BadSpec(f"{what} is no JSON object")
    return parsed


def process_of(data: bytes, *, terminal: bool) -> dict[str, Any]:
    """The OCI process of an exec session. Raises BadSpec."""
    return _process(parse(data, "the process"), terminal=terminal)


def compose(spec: dict[str, Any], known: Known) -> dict[str, Any]:
    """The whole spec. Its kernel settings are taken out: they are the pod's, so `sysctls_of` sets them.

    Raises:
        BadSpec: a section is not what it should be, or a bind has no source.
    """
    linux = {**_section(spec, "linux"), "cgroupsPath": cgroup.path_of(known.container_id)}
    linux.pop("sysctl", None)
    return {
        **spec,
        "process": _process(_section(spec, "process"), terminal=known.terminal),
        "root": {**_section(spec, "root"), "path": known.root},
        "mounts": _mounts(spec, known),
        "linux": linux,
    }


def sysctls_of(spec: dict[str, Any]) -> dict[str, str]:
    """The kernel settings that it asks for."""
    return {name: str(value) for name, value in _section(_section(spec, "linux"), "sysctl").items()}


def volumes_of(spec: dict[str, Any]) -> list[str]:
    """The shared folders that it binds."""
    sources = [str(mount.get("source", "")) for mount in spec["mounts"]]
    return [source for source in sources if source.startswith(f"{POD_VOLUMES}/")]


def pid_namespace_of(spec: dict[str, Any]) -> dict[str, str] | None:
    """Its namespace of processes if that is another's: the entry, to be changed in place."""
    listed = _section(spec, "linux").get("namespaces") or []
    return next((one for one in listed if one.get("type") == "pid" and one.get("path")), None)


def _process(process: dict[str, Any], *, terminal: bool) -> dict[str, Any]:
    args = process.get("args")
    if not isinstance(args, list) or not args:
        raise BadSpec("the process names no program")
    return {**process, "terminal": terminal}


def _mounts(spec: dict[str, Any], known: Known) -> list[dict[str, Any]]:
    listed = spec.get("mounts") or []
    if not isinstance(listed, list) or not all(
        isinstance(one, dict) and isinstance(one.get("destination"), str) for one in listed
    ):
        raise BadSpec("mounts is no list of mounts")
    mounts = [_sourced(one, known) for one in listed]
    there = {os.path.normpath(one["destination"]) for one in mounts}
    mounts += [_bind(place, source, known) for place, source in known.sources.items() if place not in there]
    there |= known.sources.keys()
    return mounts + [_bind(place, place, known) for place in SHARED if place not in there]


def _sourced(mount: dict[str, Any], known: Known) -> dict[str, Any]:
    if mount.get("type") != "bind" or mount.get("source"):
        return mount
    destination = os.path.normpath(mount["destination"])
    if (source := known.sources.get(destination)) is None:
        raise BadSpec(f"nothing came for the mount at {mount['destination']}")
    options = list(mount.get("options") or ["rbind"])
    if destination in known.read_only and "ro" not in options:
        options = [*(word for word in options if word != "rw"), "ro"]
    return {**mount, "source": source, "options": options}


def _bind(destination: str, source: str, known: Known) -> dict[str, Any]:
    options = ["rbind", "rprivate", "ro" if destination in known.read_only else "rw"]
    return {"destination": destination, "type": "bind", "source": source, "options": options}


def _section(spec: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = spec.get(name) or {}
    if not isinstance(section, dict):
        raise BadSpec(f"{name} is no JSON object")
    return section
