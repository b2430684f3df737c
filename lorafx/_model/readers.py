"""Who reads a weight decides what it gets: one table, and one function that finds the reader."""

import enum
import functools
import sys
import types


class Answer(enum.Enum):
    """What a reader gets of an adapted weight W + s B A."""

    ADAPTED = enum.auto()  # a tensor that multiplies by its parts
    SUM = enum.auto()  # a plain tensor, where no gradient needs to go through it
    PARAMETER = enum.auto()  # the registered W


# {prefix of the name of the reader's module: answer}; whoever is not in here gets the adapted
# weight.
READERS: dict[str, Answer] = {
    # layers that read their children's weights for a fused kernel, and ask for plain tensors
    "torch.nn.modules.activation": Answer.SUM,
    "torch.nn.modules.transformer": Answer.SUM,
}
GENERATED = "<lorafx "  # how the file names of generated code begin


def reader() -> types.FrameType | None:
    """Return the first frame that is neither lorafx's own nor code that it generated."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        ours = frame.f_globals.get("__name__", "").startswith("lorafx.")
        if not ours and not frame.f_code.co_filename.startswith(GENERATED):
            break
        frame = frame.f_back
    return frame


def module_of(frame: types.FrameType | None) -> str:
    """Return the name of the module whose code a frame runs."""
    name: str = "" if frame is None else frame.f_globals.get("__name__", "")
    return name


@functools.cache
def answer_to(module: str) -> Answer:
    """Return what code of this module gets."""
    for prefix, answer in READERS.items():
        if module.startswith(prefix):
            return answer
    return Answer.ADAPTED
