"""Who reads a weight decides what it gets: one table, and one function that finds the reader."""

import enum
import functools
import sys
import types
import warnings

import torch
from torch import nn


class Answer(enum.Enum):
    """What a reader gets of an adapted weight W + s B A."""

    ADAPTED = enum.auto()  # a tensor that multiplies by its parts
    SUM = enum.auto()  # a plain tensor, where no gradient needs to go through it
    PARAMETER = enum.auto()  # the registered W
    LAYER = enum.auto()  # the registered W, of a layer in which no adapter is seen


# {prefix of the name of the reader's module: answer}, the first that fits; whoever is not in here
# gets the adapted weight.
READERS: dict[str, Answer] = {
    # tensor parallelism replaces all tensors in a layer; the factors follow the weight beside them
    "torch.distributed.tensor.": Answer.LAYER,
    # libraries that put parameters in their places: shard, gather, move, offload and quantise them
    "torch.distributed.": Answer.PARAMETER,
    "accelerate.": Answer.PARAMETER,
    "torchao.": Answer.PARAMETER,
    # ties, resizes and initialises what models hold
    "transformers.modeling_utils": Answer.PARAMETER,
    # torch.func and torch.export put tensors in the place of Parameters for one call
    "torch.nn.utils._named_member_accessor": Answer.PARAMETER,
    "torch.nn.utils.stateless": Answer.PARAMETER,
    # layers that read their children's weights for a fused kernel, and ask for plain tensors
    "torch.nn.modules.activation": Answer.SUM,
    "torch.nn.modules.transformer": Answer.SUM,
}
# Functions, (module, name), that hand a model to their caller's code for it to put parameters in
# their places: whoever reads below such a call gets the answer.
PLACING = {("torch.distributed.tensor._api", "distribute_module"): Answer.LAYER}
_BY_NAME = (nn.Module.get_parameter.__code__, nn.Module.get_buffer.__code__)


def reader(through: str = "") -> types.FrameType | None:
    """Return the first frame that is not lorafx's own.

    It is not of the module `through` either, by which someone asks, nor what gets a tensor by name.
    The code of a region is the user's, whoever runs it.
    """
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        ours = frame.f_globals.get("__name__", "").startswith("lorafx.")
        ours = ours or frame.f_globals.get("__name__") == through or frame.f_code in _BY_NAME
        if not ours:
            break
        frame = frame.f_back
    return frame


def module_of(frame: types.FrameType | None) -> str:
    """Return the name of the module whose code a frame runs."""
    name: str = "" if frame is None else frame.f_globals.get("__name__", "")
    return name


def warn(message: str) -> None:
    """Warn the code that called lorafx."""
    frame = reader(torch.inference_mode.__call__.__module__)  # which decorates what it called
    if frame is not None:
        warnings.warn_explicit(message, UserWarning, frame.f_code.co_filename, frame.f_lineno)


def can_spread() -> bool:
    """True if there are processes over which somebody may spread a layer."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def answer(through: str = "") -> Answer:
    """Return what the code that asks lorafx, by way of the module `through`, gets."""
    frame = reader(through)
    found = answer_to(module_of(frame))
    if found is Answer.ADAPTED and can_spread():
        while frame is not None:
            called = module_of(frame), frame.f_code.co_name
            if called in PLACING:
                return PLACING[called]
            frame = frame.f_back
    return found


@functools.cache
def answer_to(module: str) -> Answer:
    """Return what code of this module gets."""
    for prefix, answer in READERS.items():
        if module.startswith(prefix):
            return answer
    return Answer.ADAPTED
