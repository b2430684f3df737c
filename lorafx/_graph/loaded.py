"""Classes and functions of libraries that may be there, found without importing anything."""

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def loaded(module: str, name: str) -> Any:
    """Return what a module has under this name; None where the module has not been loaded."""
    return getattr(sys.modules.get(module), name, None)


def is_exported(model: Any) -> TypeGuard["ExportedProgram"]:
    """True for a program of torch.export."""
    found = loaded("torch.export.exported_program", "ExportedProgram")
    return found is not None and isinstance(model, found)
