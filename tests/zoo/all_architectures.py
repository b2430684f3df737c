"""All of transformers' architectures in one table, the rare ones after the usual."""

from transformers import logging

import tests.zoo.rare_texts  # noqa: F401 (adds its rows to the table)
import tests.zoo.rare_vision_and_sound  # noqa: F401 (adds its rows to the table)
from tests.zoo.architectures import ROWS

__all__ = ["ROWS"]
logging.set_verbosity_error()  # which kernels are not installed
