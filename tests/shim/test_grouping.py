"""Where containerd starts a shim for each container of a pod, all get the pod's."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sandshift.config import Config, Places
from sandshift.shim.grouping import pod_of_bundle

TYPE, SANDBOX = "io.kubernetes.cri.container-type", "io.kubernetes.cri.sandbox-id"


def bundle(folder: Path, annotations: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"ociVersion": "1.1.0", "annotations": annotations}))
    return folder / "config.json"


@pytest.mark.parametrize(
    ("annotations", "pod"),
    [
        ({TYPE: "container", SANDBOX: "pod-1"}, "pod-1"),
        ({TYPE: "sandbox", SANDBOX: "pod-1"}, ""),
        ({SANDBOX: "pod-1"}, ""),
        ({TYPE: "container"}, ""),
        (None, ""),
    ],
)
def test_a_pods_container_is_known_by_its_annotations(tmp_path: Path, annotations: object, pod: str):
    assert pod_of_bundle(bundle(tmp_path / "b", annotations)) == pod


def test_what_is_no_spec_is_no_pods(tmp_path: Path):
    assert pod_of_bundle(tmp_path / "nothing") == ""
    (tmp_path / "config.json").write_text(TYPE)
    assert pod_of_bundle(tmp_path / "config.json") == ""
    (tmp_path / "config.json").write_text(f'["{TYPE}"]')
    assert pod_of_bundle(tmp_path / "config.json") == ""


def start(tmp_path: Path, container_id: str) -> subprocess.CompletedProcess[str]:
    config = tmp_path / "config.toml"
    config.write_text(f'[places]\nrun_dir = "{tmp_path}/run"\nstate_dir = "{tmp_path}/state"\n')
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "sandshift.shim.bootstrap",
            "-namespace",
            "k8s.io",
            "-id",
            container_id,
            "start",
        ],
        cwd=tmp_path / "b",
        env={**os.environ, "SANDSHIFT_CONFIG": str(config)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def test_start_answers_the_pods_address_and_starts_nothing(tmp_path: Path):
    bundle(tmp_path / "b", {TYPE: "container", SANDBOX: "pod-1"})
    config = Config(places=Places(run_dir=f"{tmp_path}/run", state_dir=f"{tmp_path}/state"))
    path = config.shim_socket("k8s.io", "pod-1")
    refused = start(tmp_path, "web")
    assert refused.returncode == 1
    assert "the shim of pod 'pod-1' does not answer at" in refused.stderr
    path.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        answered = start(tmp_path, "web")
    assert (answered.stdout, answered.stderr) == (f"unix://{path}", "")
    assert (tmp_path / "b" / "address").read_text() == f"unix://{path}"
    assert not config.sandbox_run_dir("k8s.io", "web").exists()


def test_an_annotation_that_is_no_id_is_refused(tmp_path: Path):
    bundle(tmp_path / "b", {TYPE: "container", SANDBOX: "../../etc"})
    refused = start(tmp_path, "web")
    assert refused.returncode == 1
    assert "annotation io.kubernetes.cri.sandbox-id '../../etc' must be letters and digits" in refused.stderr
