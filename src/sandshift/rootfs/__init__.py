"""What a snapshotter hands over, as disks. Its modules are named where they are used: the packer is loaded late."""
