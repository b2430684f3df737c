"""JSON files that can be written again."""

import json
from pathlib import Path
from typing import Any

from .._errors import FormatError


_DEEPEST = 100  # objects and lists in each other, in JSON


def read_json(path: Path) -> dict[str, Any]:
    """The dict in a JSON file, of which every text can be written again, and which recursion can walk."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        _check_depth(value)
        json.dumps(value, ensure_ascii=False).encode()  # halves of surrogate pairs, which no text may have, raise
    except (ValueError, RecursionError) as error:
        raise FormatError(f"'{path}' is no JSON that can be read: {error}.") from error
    if not isinstance(value, dict):
        raise FormatError(f"'{path}' does not hold a JSON object.")
    return value


def _check_depth(value: Any) -> None:
    """ValueError if objects and lists are nested deeper than any config is."""
    level = [value]
    for _ in range(_DEEPEST):
        level = [inner for outer in level if isinstance(outer, (dict, list))
                 for inner in (outer.values() if isinstance(outer, dict) else outer)]
        if not level:
            return
    raise ValueError(f"it is nested more than {_DEEPEST} deep")
