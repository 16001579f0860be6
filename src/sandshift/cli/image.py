"""`sandshift image`: guest images, built from the distribution's own packages."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from sandshift.cli.frame import Frame, existing_file, framed
from sandshift.cli.sizes import show_bytes
from sandshift.cli.table import table
from sandshift.errors import NotFound

if TYPE_CHECKING:
    from sandshift.image.store import GuestImage

_ID_SHOWN: Final = 12


@click.group(short_help="Build and list guest images.")
def image() -> None:
    """The guest image: kernel, initramfs and a read-only root. The same inputs give the same bytes."""


@image.command("build")
@click.option("--refresh", is_flag=True, help="Ask the package archive for newer packages.")
@click.option(
    "--sources",
    metavar="FILE",
    callback=existing_file,
    help="An apt source list to use in place of this machine's.",
)
@framed
def image_build(frame: Frame, *, refresh: bool, sources: Path | None) -> None:
    """Build the guest image for this installation, if it is not there yet.

    The first time fetches some packages and takes about half a minute; afterwards only what changed is made again.
    """
    from sandshift.image.build import build  # noqa: PLC0415 - help needs none of it

    cache_dir = Path(frame.host().config.places.cache_dir)
    began_s = time.monotonic()
    built = build(
        cache_dir, refresh=refresh, sources=sources, progress=lambda line: frame.say(f"image: {line} ...")
    )
    took_ms = round((time.monotonic() - began_s) * 1e3)
    frame.emit(
        {**_document(built), "took_ms": took_ms},
        f"{built.id[:_ID_SHOWN]}   {built.folder}   {took_ms / 1e3:.1f} s",
    )


@image.command("ls")
@framed
def image_ls(frame: Frame) -> None:
    """List the guest images in this host's cache, the newest first."""
    from sandshift.image.build import find  # noqa: PLC0415
    from sandshift.image.store import published  # noqa: PLC0415

    cache_dir = Path(frame.host().config.places.cache_dir)
    images = published(cache_dir)
    current = find(cache_dir)
    documents = [
        {**_document(each), "current": current is not None and each.id == current.id} for each in images
    ]
    rows = [
        [
            each.id[:_ID_SHOWN],
            each.description.distribution,
            each.description.kernel_release,
            show_bytes(each.description.root_bytes),
            "current" if document["current"] else "",
        ]
        for each, document in zip(images, documents, strict=True)
    ]
    frame.emit(documents, table(["ID", "FROM", "KERNEL", "ROOT", "USED"], rows))


@image.command("verify")
@framed
def image_verify(frame: Frame) -> None:
    """Read every image in the cache and compare it with its digests."""
    from sandshift.image.store import published  # noqa: PLC0415

    cache_dir = Path(frame.host().config.places.cache_dir)
    images = published(cache_dir)
    if not images:
        raise NotFound(f"there is no guest image in {cache_dir}: build one with 'sandshift image build'")
    for each in images:
        each.verify()
    frame.emit([_document(each) for each in images], f"{len(images)} whole")


def _document(built: GuestImage) -> dict[str, object]:
    described = built.description
    return {
        "id": built.id,
        "folder": str(built.folder),
        "distribution": described.distribution,
        "kernel_release": described.kernel_release,
        "kernel_sha256": described.kernel_sha256,
        "initramfs_sha256": described.initramfs_sha256,
        "root_sha256": described.root_sha256,
        "root_bytes": described.root_bytes,
        "python": described.python,
        "agent_version": described.agent_version,
    }
