"""A client of CRI, as kubelet is one: messages from cri.proto, loaded into a pool of their own, over gRPC."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, Final

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parents[1]
SERVICE: Final = "runtime.v1.RuntimeService"
CALL_S: Final = 90.0
IMAGE: Final = "localhost/busybox:1"
METHODS: Final = (
    "Status",
    "RunPodSandbox",
    "StopPodSandbox",
    "RemovePodSandbox",
    "PodSandboxStatus",
    "CreateContainer",
    "StartContainer",
    "StopContainer",
    "RemoveContainer",
    "ContainerStatus",
    "ExecSync",
)


@cache
def pool() -> descriptor_pool.DescriptorPool:
    """What protoc makes of cri.proto: the tests' own, so that nothing of it is in what we ship."""
    with tempfile.NamedTemporaryFile(suffix=".pb") as found:
        command = [Path(sys.executable).parent / "protoc", f"-Isandshift/wire={ROOT / 'proto'}", f"-I{HERE}"]
        command += ["--include_imports", f"--descriptor_set_out={found.name}", "cri.proto"]
        subprocess.run(command, check=True, cwd=HERE)
        files = descriptor_pb2.FileDescriptorSet.FromString(Path(found.name).read_bytes())
    made = descriptor_pool.DescriptorPool()
    for file in files.file:
        made.Add(file)
    return made


def message(name: str, **fields: Any) -> Any:
    """A message of CRI by its name."""
    return message_factory.GetMessageClass(pool().FindMessageTypeByName(f"runtime.v1.{name}"))(**fields)


class Cri:
    """`cri.run_pod_sandbox(config=..., runtime_handler=...)`: a call by its name in snake case, fields by keyword."""

    def __init__(self, socket: Path) -> None:
        self._channel = grpc.insecure_channel(f"unix://{socket}")
        self._methods = {_snake(name): name for name in METHODS}

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("_") or attribute not in self._methods:
            raise AttributeError(attribute)
        name = self._methods[attribute]
        call = self._channel.unary_unary(
            f"/{SERVICE}/{name}",
            request_serializer=lambda request: request.SerializeToString(),
            response_deserializer=type(message(f"{name}Response")).FromString,
        )

        def ask(**fields: Any) -> Any:
            return call(message(f"{name}Request", **fields), timeout=CALL_S, wait_for_ready=True)

        return ask

    def close(self) -> None:
        self._channel.close()


def _snake(name: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")


def pod_config(name: str, *, logs: Path, **more: Any) -> Any:
    """A pod as kubelet describes one."""
    metadata = {"name": name, "uid": f"uid-{name}", "namespace": "default"}
    return message("PodSandboxConfig", metadata=metadata, log_directory=str(logs), **more)


def container_config(name: str, command: list[str], **more: Any) -> Any:
    return message(
        "ContainerConfig",
        metadata={"name": name},
        image={"image": IMAGE},
        command=command,
        log_path=f"{name}.log",
        **more,
    )
