"""What a snapshotter hands over, as disks."""

from sandshift.rootfs.packer import Packer
from sandshift.rootfs.plan import DiskFile, RootfsPlan, wants_scratch

__all__ = ["DiskFile", "Packer", "RootfsPlan", "wants_scratch"]
