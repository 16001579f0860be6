"""docs/reference/configuration.md against the code: every key, its default, nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from sandshift.config import Config

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "configuration.md"


def keys_of(struct: msgspec.Struct, prefix: str = "") -> dict[str, object]:
    """Dotted key -> default, as the TOML file would write it."""
    found: dict[str, object] = {}
    for name in struct.__struct_fields__:
        value = getattr(struct, name)
        if isinstance(value, msgspec.Struct):
            found |= keys_of(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def documented() -> dict[str, object]:
    rows = re.findall(r"^\| `([\w.]+)` \| `([^`]*)` \| (\S.*) \|$", PAGE.read_text(), re.MULTILINE)
    return {key: msgspec.json.decode(default) for key, default, _ in rows}


def test_every_key_is_documented_with_its_default_and_no_other_key_is() -> None:
    assert documented() == keys_of(Config())


def test_keys_stand_in_the_page_in_the_order_of_the_file() -> None:
    assert list(documented()) == list(keys_of(Config()))
