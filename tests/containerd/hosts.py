"""Two containerds in two network namespaces that are two hosts, and pods of one address on both."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.containerd.cri import Cri, pod_config
from tests.containerd.daemon import Containerd, containerd, short_folder
from tests.containerd.network import bridged
from tests.containerd.pod import Pod

ADDRESS = "10.78.0.50"
DESTINATION = {"io.sandshift.migration.destination": "true"}
SOURCE = "io.microsoft.migration.source-container-id"


@dataclass
class Host:
    daemon: Containerd
    cri: Cri

    def pod(self, name: str, **more: object) -> Pod:
        pod = Pod(self.daemon, self.cri, pod_config(name, logs=self.daemon.folder / "logs", **more))
        pod.begin()
        return pod


def open_host(
    name: str, namespace: str, address: str, pod_address: str
) -> contextlib.AbstractContextManager[Host]:
    @contextlib.contextmanager
    def opened() -> Iterator[Host]:
        more = f'network_namespace = "{namespace}"\nmigration_address = "{address}"'
        with (
            short_folder() as folder,
            containerd(
                "new",
                folder,
                name=name,
                network_namespace=namespace,
                cni=bridged(pod_address),
                sandshift=more,
            ) as daemon,
        ):
            client = Cri(daemon.socket)
            yield Host(daemon, client)
            client.close()

    return opened()


def migrate(source: Pod, destination: Pod, *more: str) -> subprocess.Popen[bytes]:
    """`sandshift migrate`, as a person or an operator calls it."""
    command = [str(Path(sys.executable).parent / "sandshift")]
    command += ["migrate", source.id, "--config", str(source.daemon.folder / "sandshift.toml")]
    command += ["--to", str(destination.daemon.folder / "sandshift.toml"), "--namespace", "k8s.io"]
    command += ["--as", destination.id, "--keep-shim", *more]
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
