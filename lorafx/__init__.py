"""LoRA as a torch.fx compiler pass: adds s (x A^T) B^T to linear calls, and folds it back.

A name is imported, and torch with it, when it is first used: `lorafx --help` needs none of them.
"""

import importlib as _importlib
import sys as _sys
import typing as _typing

from ._version import __version__ as __version__

if _typing.TYPE_CHECKING:
    from ._compile import compile_options as compile_options
    from ._compose import compose as compose
    from ._errors import AdaptedWeightError as AdaptedWeightError
    from ._errors import AdapterError as AdapterError
    from ._errors import ConfigError as ConfigError
    from ._errors import FormatError as FormatError
    from ._errors import LorafxError as LorafxError
    from ._errors import MismatchError as MismatchError
    from ._errors import NoSiteError as NoSiteError
    from ._errors import NotInjectedError as NotInjectedError
    from ._errors import TiedWeightError as TiedWeightError
    from ._errors import UnsupportedModelError as UnsupportedModelError
    from ._export import export as export
    from ._graph.sites import Site as Site
    from ._graph.sites import Targets as Targets
    from ._inject import InjectLoRA as InjectLoRA
    from ._inject import MergeLoRA as MergeLoRA
    from ._inject import add as add
    from ._inject import inject as inject
    from ._inject import reset_parameters as reset_parameters
    from ._inject import sites as sites
    from ._merge import eject as eject
    from ._merge import merge as merge
    from ._merge import merge_error as merge_error
    from ._pictures.draw import draw as draw
    from ._rename import rename as rename
    from ._resume import resume as resume
    from ._save import load as load
    from ._save import save as save
    from ._summary import Summary as Summary
    from ._summary import summary as summary
    from ._switch import activate as activate
    from ._switch import adapters as adapters
    from ._switch import disabled as disabled
    from ._switch import named_parameters as named_parameters
    from ._switch import parameters as parameters
    from ._switch import remove as remove
    from ._switch import rows as rows
    from ._switch import using as using
else:
    _MODULES = {  # where the names above are defined
        "_compile": "compile_options",
        "_compose": "compose",
        "_errors": "AdaptedWeightError AdapterError ConfigError FormatError LorafxError "
                   "MismatchError NoSiteError NotInjectedError TiedWeightError "
                   "UnsupportedModelError",
        "_export": "export",
        "_graph.sites": "Site Targets",
        "_inject": "InjectLoRA MergeLoRA add inject reset_parameters sites",
        "_merge": "eject merge merge_error",
        "_pictures.draw": "draw",
        "_rename": "rename",
        "_resume": "resume",
        "_save": "load save",
        "_summary": "Summary summary",
        "_switch": "activate adapters disabled named_parameters parameters remove rows using",
    }
    _MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}
    __all__ = sorted(_MODULE_OF)

    def __getattr__(name: str) -> object:
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'lorafx' has no attribute {name!r}",
                                 name=name, obj=_sys.modules[__name__])
        value = getattr(_importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
