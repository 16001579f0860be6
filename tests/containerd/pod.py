"""A pod and its containers on a real containerd, as kubelet sees them."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from typing import Any

import grpc

from tests.containerd.cri import Cri, container_config
from tests.containerd.daemon import Containerd, eventually

RUNNING, EXITED = 1, 2
READY, NOT_READY = 0, 1


@dataclass
class Pod:
    daemon: Containerd
    cri: Cri
    config: Any
    id: str = ""
    containers: list[str] = field(default_factory=list)

    def begin(self) -> None:
        self.id = self.cri.run_pod_sandbox(config=self.config, runtime_handler="sandshift").pod_sandbox_id

    def make(self, name: str, *command: str, **more: Any) -> str:
        """A container that is not started: CRI calls Task.Create and Task.Start together."""
        config = container_config(name, list(command), **more)
        request = {"pod_sandbox_id": self.id, "config": config, "sandbox_config": self.config}
        container: str = self.cri.create_container(**request).container_id
        self.containers.append(container)
        return container

    def run(self, name: str, *command: str, **more: Any) -> str:
        container = self.make(name, *command, **more)
        self.cri.start_container(container_id=container)
        return container

    def status(self, container: str) -> Any:
        return self.cri.container_status(container_id=container).status

    def state(self) -> int:
        """READY or NOT_READY; -1: containerd cannot say, as in the moment after its shim has died."""
        try:
            found: int = self.cri.pod_sandbox_status(pod_sandbox_id=self.id).status.state
        except grpc.RpcError:
            return -1
        return found

    def ended(self, container: str) -> int:
        """Its exit code, once it has one."""
        eventually(lambda: self.status(container).state == EXITED)
        code: int = self.status(container).exit_code
        return code

    def ask(self, container: str, *command: str) -> Any:
        return self.cri.exec_sync(container_id=container, cmd=list(command), timeout=20)

    def log(self, name: str) -> list[tuple[str, str]]:
        """Stream and text of each line, as kubelet reads them."""
        text = (self.daemon.folder / "logs" / f"{name}.log").read_text()
        return [(line.split(" ", 3)[1], line.split(" ", 3)[3]) for line in text.splitlines()]

    def info(self) -> dict[str, str]:
        """What our shim says beside the state."""
        return dict(self.cri.pod_sandbox_status(pod_sandbox_id=self.id, verbose=True).info)

    def address(self) -> str:
        found: str = self.cri.pod_sandbox_status(pod_sandbox_id=self.id).status.network.ip
        return found

    def shim_pid(self) -> int:
        path = self.daemon.folder / "s" / "k8s.io" / self.id / "shim.pid"
        return int(json.loads(path.read_text())["pid"])

    def vm_pid(self) -> int:
        path = self.daemon.folder / "s" / "k8s.io" / self.id / "vm" / "vm.pid"
        return int(json.loads(path.read_text())["pid"])

    def end(self) -> None:
        if not self.id:
            return
        for container in self.containers:
            with contextlib.suppress(grpc.RpcError):
                self.cri.stop_container(container_id=container, timeout=0)
            # One whose shim has died is known to have ended only when its root file system could be unmounted.
            eventually(lambda one=container: self.status(one).state != RUNNING)
            self.cri.remove_container(container_id=container)
        self.cri.stop_pod_sandbox(pod_sandbox_id=self.id)
        self.cri.remove_pod_sandbox(pod_sandbox_id=self.id)
