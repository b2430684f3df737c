"""JSON: texts in which no key stands twice, and files that can be written again."""

import json
from pathlib import Path
from typing import Any

from .._errors import FormatError


_DEEPEST = 100  # objects and lists in each other, in JSON


def parse_json(text: str) -> Any:
    """Return what JSON holds; ValueError if an object has a key twice: one would be lost."""
    return json.loads(text, object_pairs_hook=_distinct)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"{key[:80]!r} stands twice in one JSON object")
        values[key] = value
    return values


def read_json(path: Path) -> dict[str, Any]:
    """Return the dict in a JSON file, every text of which can be written again."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        _check_depth(value)
        json.dumps(value, ensure_ascii=False).encode()  # halves of surrogate pairs raise
    except (ValueError, RecursionError) as error:
        raise FormatError(f"'{path}' is not JSON that can be read: {error}.") from error
    if not isinstance(value, dict):
        raise FormatError(f"'{path}' does not hold a JSON object.")
    return value


def _check_depth(value: Any) -> None:
    """ValueError if objects and lists are nested deeper than any config is."""
    level = [value]
    for _ in range(_DEEPEST):
        below: list[Any] = []
        for outer in level:
            if isinstance(outer, dict):
                below.extend(outer.values())
            elif isinstance(outer, list):
                below.extend(outer)
        if not below:
            return
        level = below
    raise ValueError(f"it is nested more than {_DEEPEST} deep")
