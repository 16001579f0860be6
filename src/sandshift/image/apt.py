"""The distribution's packages, through the host's own apt sources and keys, in a private apt root.

Nothing of the host's apt state is read or changed but its sources, preferences and keyrings. The private root believes
that nothing is installed, so apt names every package that is needed.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from sandshift.errors import NoRoom, NotSupported, SandshiftError, Unavailable

UPDATE_S: Final = 300.0
DOWNLOAD_S: Final = 1800.0
_QUERY_S: Final = 60.0
_COMPLAINT_CHARS_MAX: Final = 300
_HOOK: Final = re.compile(r"\S*(Invoke|Pre-Install-Pkgs|Hooks)|Dir::Etc::(main|parts)\b", re.IGNORECASE)
_PROXIES: Final = ("http_proxy", "https_proxy", "no_proxy")
_ENVIRONMENT: Final = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
}
_URI_LINE: Final = re.compile(r"^'([^']+)' (\S+) (\d+)", re.MULTILINE)


@dataclass(frozen=True, slots=True, order=True)
class Package:
    """One package file as the archive names it."""

    file_name: str
    """"runc_1.1.5+ds1-1+deb12u1_amd64.deb"; an epoch's colon is written %3a, as apt does."""
    size_bytes: int

    @property
    def name(self) -> str:
        return self.file_name.split("_", 1)[0]

    @property
    def version(self) -> str:
        return unquote(self.file_name.split("_")[1])

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


class Apt:
    """A private apt root in `root`. Calls block and run apt-get; each may raise:

    Unavailable: the archive cannot be reached, or apt is not installed.
    NoRoom: no disk space.
    NotSupported: a package does not exist in the sources.
    """

    def __init__(self, root: Path, *, sources: Path | None = None) -> None:
        """Make the root's folders. `sources`: a source list to use in place of the host's."""
        self._root = root
        for folder in ("lists/partial", "cache/archives/partial", "state"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        (root / "state" / "status").write_text("")
        self._options = [
            f"Dir::State={root}/state",
            f"Dir::State::status={root}/state/status",
            f"Dir::State::lists={root}/lists",
            f"Dir::Cache={root}/cache",
            "APT::Sandbox::User=",
            "APT::Architecture=amd64",
            "APT::Architectures=amd64",
            "APT::Install-Recommends=0",
            "Acquire::Languages=none",
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false",
            "Acquire::IndexTargets::deb::CNF::DefaultEnabled=false",
            "Acquire::Retries=2",
            "APT::Update::Error-Mode=any",
        ]
        if sources is not None:
            self._options += [f"Dir::Etc::sourcelist={sources}", "Dir::Etc::sourceparts=/dev/null"]
        self._configuration = root / "apt.conf"
        self._configuration.write_text(without_hooks(self._execute(["apt-config", "dump"], _QUERY_S, {})))

    def update(self) -> None:
        """Fetch the archive's lists, as far as they have changed."""
        self._run(["apt-get", "update", "-q"], UPDATE_S)

    def resolve(self, names: Sequence[str]) -> list[Package]:
        """`names` and all that they depend on, sorted."""
        return self._packages(["apt-get", "install", "--print-uris", "-qq", *names])

    def resolve_alone(self, names: Sequence[str]) -> list[Package]:
        """`names` without what they depend on, sorted."""
        return self._packages(["apt-get", "download", "--print-uris", "-qq", *names])

    def dependencies(self, name: str) -> list[str]:
        """The names of packages that `name` depends on, directly."""
        text = self._run(["apt-cache", "depends", "--no-recommends", "--no-suggests", name], _QUERY_S)
        return re.findall(r"^ +\|?Depends: ([a-z0-9][a-z0-9.+-]+)$", text, re.MULTILINE)

    def download(self, names: Sequence[str], folder: Path) -> None:
        """Put the package files of exactly `names` into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        self._run(["apt-get", "download", "-q", *names], DOWNLOAD_S, folder)

    def _packages(self, command: Sequence[str]) -> list[Package]:
        found = _URI_LINE.findall(self._run(command, _QUERY_S))
        return sorted({Package(file_name, int(size)) for _, file_name, size in found})

    def _run(self, command: Sequence[str], bound_s: float, folder: Path | None = None) -> str:
        options = [word for option in self._options for word in ("-o", option)]
        line = [command[0], *options, *command[1:]]
        return self._execute(line, bound_s, {"APT_CONFIG": str(self._configuration)}, folder)

    @staticmethod
    def _execute(
        command: Sequence[str], bound_s: float, variables: Mapping[str, str], folder: Path | None = None
    ) -> str:
        proxies = {name: value for name in _PROXIES if (value := os.environ.get(name))}
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                env={**_ENVIRONMENT, **proxies, **variables},
                capture_output=True,
                text=True,
                timeout=bound_s,
                check=False,
            )
        except FileNotFoundError as error:
            raise NotSupported(
                f"{command[0]} is not on this host: the guest image is made from Debian or Ubuntu packages"
            ) from error
        except subprocess.TimeoutExpired as error:
            raise Unavailable(
                f"{command[0]} did not end in {bound_s:.0f} s: check the network, then try again"
            ) from error
        if done.returncode != 0:
            raise explain(command[0], done.stderr)
        return done.stdout


def without_hooks(dumped: str) -> str:
    """A configuration that is the host's, proxies and all, but runs none of its hooks. Pure.

    Distributions hook programs into every update, and containers' images one that empties the host's package cache.
    """
    kept = [line for line in dumped.splitlines() if not _HOOK.match(line)]
    return "\n".join([*kept, 'Dir::Etc::main "/dev/null";', 'Dir::Etc::parts "/dev/null";', ""])


def explain(what: str, complaint: str) -> SandshiftError:
    """The error to raise for what apt wrote on stderr. Pure."""
    lines = [line.removeprefix("E: ").strip() for line in complaint.splitlines() if line.startswith("E: ")]
    said = (
        "; ".join(lines)[:_COMPLAINT_CHARS_MAX]
        or complaint.strip()[-_COMPLAINT_CHARS_MAX:]
        or "no reason given"
    )
    if "No space left" in complaint or "enough free space" in complaint:
        return NoRoom(
            f"guest image: {what} has no disk space for the packages (400 MB are needed): free some, or set places.cache_dir"
        )
    if "Unable to locate package" in complaint or "no installation candidate" in complaint:
        return NotSupported(
            f"guest image: {said}; the host's apt sources must be Debian 12 or 13, or Ubuntu 25.04 or newer"
        )
    if re.search(
        r"Failed to fetch|Could not resolve|Temporary failure|Could not connect|Connection (failed|timed)",
        complaint,
    ):
        return Unavailable(
            f"guest image: the package archive cannot be reached, check network and apt sources: {said}"
        )
    return Unavailable(f"guest image: {what} failed: {said}")
