"""Results of a run in a file, so that a later run can play again what failed, or what is not there yet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tests.faults.cases import CASES, Case, Promise
from tests.faults.play import Played

_CASES = {case.name: case for case in CASES}


def read(path: Path) -> list[Played]:
    """What is in the file; nothing if there is none. Cases that the matrix no longer has are left out."""
    if not path.exists():
        return []
    documents = json.loads(path.read_text())
    return [_played(document) for document in documents if document["case"] in _CASES]


def write(path: Path, played: Sequence[Played]) -> None:
    """All of them, in place of what is there."""
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_text(json.dumps([_document(each) for each in played], indent=1))
    fresh.rename(path)


def merged(earlier: Sequence[Played], later: Sequence[Played]) -> list[Played]:
    """Both, in the order of the matrix; of a case that is in both the later result."""
    newest = {each.case: each for each in (*earlier, *later)}
    return [newest[case] for case in CASES if case in newest]


def still_to_play(cases: Sequence[Case], earlier: Sequence[Played]) -> tuple[Case, ...]:
    """Those that failed, or were never played."""
    done = {each.case for each in earlier if each.good}
    return tuple(case for case in cases if case not in done)


def _document(played: Played) -> dict[str, object]:
    fields = {name: getattr(played, name) for name in played.__slots__ if name not in ("case", "came")}
    return {"case": played.case.name, "came": played.came.value if played.came else None, **fields}


def _played(document: dict[str, object]) -> Played:
    came = document.pop("came")
    case = _CASES[str(document.pop("case"))]
    return Played(case, came=Promise(came) if came else None, **document)  # type: ignore[arg-type]
