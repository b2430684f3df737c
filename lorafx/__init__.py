"""LoRA as a torch.fx compiler pass: rewrite a model so that chosen linear calls add s (x A^T) B^T, and fold it back."""

from ._compile import compile_options as compile_options
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
from ._inject import InjectLoRA as InjectLoRA
from ._inject import MergeLoRA as MergeLoRA
from ._inject import add as add
from ._inject import inject as inject
from ._inject import sites as sites
from ._merge import eject as eject
from ._merge import merge as merge
from ._summary import summary as summary
from ._resume import resume as resume
from ._save import load as load
from ._save import save as save
from ._switch import activate as activate
from ._switch import adapters as adapters
from ._switch import compose as compose
from ._switch import disabled as disabled
from ._switch import named_parameters as named_parameters
from ._switch import parameters as parameters
from ._switch import remove as remove

__version__ = "0.1.0"
