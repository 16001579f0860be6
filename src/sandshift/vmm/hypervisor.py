"""What the QEMU of this host can do, as it says itself, and what follows from it. Pure: see host.py for the asking.

A machine type's alias and a CPU model's alias mean another thing in every QEMU, so only concrete names leave here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import msgspec

from sandshift.errors import Blocker, PeerProtocolError
from sandshift.sandbox.preflight import TCG_VERSION_MIN

MACHINE_FAMILY: Final = "pc-q35"
TCG_CPU_MODEL: Final = "max"
"""All that TCG can give: the guest's Python starts 0.7 s sooner than with qemu64 (measured)."""
TCG_FEATURES_OFF: Final = ("erms", "fsrm")
"""With these a guest copies by `rep movsb`, which TCG does byte by byte: a guest's boot costs 5.0 s of CPU in place of 6.8, a
copy of 128 KiB 80 to 170 us in place of 300, 50 MB of a process's output 1.4 s in place of 2.7 (measured)."""
KVM_CPU_MODELS: Final = (
    "EPYC-Genoa",
    "EPYC-Milan",
    "EPYC-Rome",
    "EPYC",
    "SapphireRapids",
    "Icelake-Server",
    "Cascadelake-Server",
    "Skylake-Server",
    "Broadwell",
    "Haswell",
    "IvyBridge",
    "SandyBridge",
    "Westmere",
    "Nehalem",
    "qemu64",
)
"""Named models, the most able first. A host gets the first that it can give whole."""
_VERSIONED: Final = re.compile(rf"{MACHINE_FAMILY}-(\d+)\.(\d+)(\.\d+)?")
_CPU_FLAGS: Final = re.compile(r"^flags\s*:(.*)$", re.MULTILINE)


class CpuModel(msgspec.Struct, frozen=True):
    name: str
    """Concrete: "EPYC-v1", never "EPYC"."""
    known_as: str = ""
    """The alias, if it has one."""
    complete: bool = True
    """The host lacks none of its features."""


class Hypervisor(msgspec.Struct, frozen=True):
    """One QEMU with one accelerator on one host."""

    version: str
    """"10.0.2"."""
    accelerator: str
    machine_types: tuple[str, ...]
    """Versioned, not deprecated, the newest first."""
    cpu_models: tuple[CpuModel, ...]
    cpu_model: str
    """What a sandbox gets that asks for nothing."""
    cpu_features: tuple[str, ...]
    """What that model gives to a guest, sorted."""
    cpu_features_most: tuple[str, ...]
    """What this host could give at most, sorted: a guest from elsewhere may need others than ours get."""
    drivers: tuple[str, ...]
    """Devices that it has, sorted."""

    @property
    def cpu_model_names(self) -> frozenset[str]:
        return frozenset(
            {model.name for model in self.cpu_models} | {m.known_as for m in self.cpu_models} - {""}
        )


def machine_types(answer: object) -> tuple[str, ...]:
    """query-machines -> the versioned types of our family, the newest first."""
    found = {}
    for machine in _list(answer):
        name = str(machine.get("name"))
        if (match := _VERSIONED.fullmatch(name)) and not machine.get("deprecated"):
            found[name] = (int(match[1]), int(match[2]))
    return tuple(sorted(found, key=lambda name: found[name], reverse=True))


def cpu_models(answer: object) -> tuple[CpuModel, ...]:
    """query-cpu-definitions -> models by their concrete names, sorted."""
    models = {}
    for definition in _list(answer):
        name = str(definition["name"])
        concrete = str(definition.get("alias-of") or name)
        known_as = name if name != concrete else ""
        if concrete not in models or known_as:
            complete = not definition.get("unavailable-features")
            models[concrete] = CpuModel(name=concrete, known_as=known_as, complete=complete)
    return tuple(models[name] for name in sorted(models))


def cpu_features(answer: object) -> tuple[str, ...]:
    """query-cpu-model-expansion (static) -> the features that are on, sorted."""
    model = answer.get("model") if isinstance(answer, Mapping) else None
    properties = model.get("props") if isinstance(model, Mapping) else None
    if not isinstance(properties, Mapping):
        raise PeerProtocolError("QEMU's answer to query-cpu-model-expansion has no properties")
    return tuple(sorted(str(name) for name, value in properties.items() if value is True))


def default_cpu_model(accelerator: str, models: Iterable[CpuModel]) -> str:
    """The model for a sandbox that asks for none. Under KVM a named one, so that another host can have it too."""
    if accelerator == "tcg":
        return TCG_CPU_MODEL
    complete = {
        known: model.name for model in models if model.complete for known in (model.name, model.known_as)
    }
    return next((complete[name] for name in KVM_CPU_MODELS if name in complete), "qemu64")


def has_virtualisation(cpuinfo: str) -> bool:
    """Whether /proc/cpuinfo shows a CPU with hardware virtualisation. /dev/kvm alone proves nothing."""
    return any({"vmx", "svm"} & set(flags.split()) for flags in _CPU_FLAGS.findall(cpuinfo))


def version_blockers(version: tuple[int, ...], accelerator: str) -> list[Blocker]:
    """QEMU before 9.0 under TCG loses guest writes during a live migration, without any error (measured)."""
    if accelerator != "tcg" or tuple(version) >= TCG_VERSION_MIN:
        return []
    text = ".".join(str(part) for part in version)
    return [
        Blocker(
            "qemu.version",
            f"QEMU {text} without KVM silently loses guest memory when a sandbox moves",
            "install QEMU 9.0 or newer (Debian 12: qemu-system-x86 from bookworm-backports)",
        )
    ]


def parse_version(text: str) -> tuple[int, int, int]:
    """The number in what `qemu-system-x86_64 --version` prints.

    Raises:
        PeerProtocolError: there is none.
    """
    if (match := re.search(r"version (\d+)\.(\d+)\.(\d+)", text)) is None:
        raise PeerProtocolError(f"this does not print a QEMU version: {text[:100]!r}")
    return int(match[1]), int(match[2]), int(match[3])


def _list(answer: object) -> Sequence[Mapping[str, object]]:
    if not isinstance(answer, list):
        raise PeerProtocolError("QEMU's answer is not a list")
    return [item for item in answer if isinstance(item, Mapping)]
