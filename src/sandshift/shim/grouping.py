"""Which shim a container of a pod belongs to, where containerd starts one for each: 1.6, and newer ones without the Sandbox API.

Loads nothing that is slow: `start` asks before anything else.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os

TYPE_ANNOTATION = "io.kubernetes.cri.container-type"
SANDBOX_ANNOTATION = "io.kubernetes.cri.sandbox-id"
SPEC_BYTES_MAX = 4 << 20


def pod_of_bundle(spec_file: str | os.PathLike[str]) -> str:
    """The sandbox id of the pod that the container of this OCI spec is in; empty: it is none of a pod's, or the pod's own
    sandbox container, whose shim is the pod's.
    """
    try:
        with open(spec_file, "rb") as file:  # noqa: PTH123 - pathlib takes longer than the rest
            data = file.read(SPEC_BYTES_MAX)
    except OSError:
        return ""
    if TYPE_ANNOTATION.encode() not in data:
        return ""
    import json  # noqa: PLC0415 - only pods pay for it

    try:
        annotations = json.loads(data).get("annotations") or {}
    except (ValueError, AttributeError):
        return ""
    if annotations.get(TYPE_ANNOTATION) != "container":
        return ""
    return str(annotations.get(SANDBOX_ANNOTATION) or "")
