"""Classes and functions of libraries that may be there, found without importing anything."""

import sys
from typing import Any


def loaded(module: str, name: str) -> Any:
    """Return what a module has under this name; None where the module has not been loaded."""
    return getattr(sys.modules.get(module), name, None)
