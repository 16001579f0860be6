"""Root file systems as real snapshotters hand them over."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from tests.containerd.conftest import short_folder
from tests.containerd.cri import IMAGE
from tests.containerd.daemon import INSTALLED, RUNTIME, Containerd
from tests.containerd.image import make_image
from tests.needs import needs_root

pytestmark = [pytest.mark.containerd, pytest.mark.vm, pytest.mark.timeout(300), needs_root]

SNAPSHOTTERS = ("overlayfs", "native", "blockfile", "erofs")
BLOCKFILE = """
[plugins."io.containerd.snapshotter.v1.blockfile"]
  scratch_file = "{scratch}"
  fs_type = "ext4"
  mount_options = []
"""


@pytest.fixture(scope="module")
def daemon() -> Iterator[Containerd]:
    """With the image unpacked by every one of them."""
    if not (INSTALLED / "new").exists():
        pytest.skip("needs the containerds: ./run setup containerd fetches them")
    with short_folder() as folder:
        made = Containerd("new", folder)
        try:
            made.set_up()
            scratch = folder / "scratch.ext4"
            subprocess.run(["truncate", "-s", "64M", str(scratch)], check=True)
            subprocess.run(["mkfs.ext4", "-q", "-F", str(scratch)], check=True)
            with (folder / "config.toml").open("a") as config:
                config.write(BLOCKFILE.format(scratch=scratch))
            made.start()
            archive = make_image(folder / "image.tar")
            for name in SNAPSHOTTERS:
                made.ctr("image", "import", "--local", "--snapshotter", name, archive)
            yield made
        finally:
            made.clean()


def run(daemon: Containerd, snapshotter: str, name: str, script: str) -> bytes:
    how = ("--rm", "--runtime", RUNTIME, "--snapshotter", snapshotter)
    return daemon.ctr("run", *how, IMAGE, name, "sh", "-c", script).stdout


@pytest.mark.parametrize("snapshotter", SNAPSHOTTERS)
def test_a_container_runs_on_it_and_writes_without_changing_the_image(
    daemon: Containerd, snapshotter: str
) -> None:
    script = "cat /etc/passwd; echo changed > /etc/passwd; echo more > /new; cat /etc/passwd /new"
    said = b"root:x:0:0:root:/root:/bin/sh\nchanged\nmore\n"
    assert run(daemon, snapshotter, f"first-{snapshotter}", script) == said
    assert run(daemon, snapshotter, f"second-{snapshotter}", script) == said


@pytest.mark.parametrize(("snapshotter", "kind"), [("overlayfs", b"overlay"), ("blockfile", b"ext4")])
def test_where_changes_go_is_what_the_reference_says(
    daemon: Containerd, snapshotter: str, kind: bytes
) -> None:
    said = run(daemon, snapshotter, f"root-{snapshotter}", "grep ' / ' /proc/mounts")
    assert said.split()[2] == kind
