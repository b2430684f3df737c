"""How one value is computed again: a tree of rows, from the tensors that autograd keeps anyway."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from .private import has_unpack_hook
from .rows import ROWS, Operand
from .tensors import PLAIN

MOST_NODES = 32  # of one recipe


class NoRecipe(Exception):
    """A value cannot be had again by the rows, or something watches what is kept."""


class Step(NamedTuple):
    """A node in the tree of a recipe, and all that tells it from others."""

    node: str
    constants: tuple[Any, ...]
    operands: tuple["Step | int | None", ...]  # a number is that of a kept tensor


class Recipe:
    """The tree of a value, and where the tensors are kept that it begins with.

    `key` is the same for values that are computed by the same functions of tensors alike. Only
    nodes before the value's own are held, which hold what they keep until they are run.
    """

    def __init__(self, value: Tensor) -> None:
        self.places: list[tuple[Any, str]] = []
        self.left = MOST_NODES
        self.tree = self._step(value.grad_fn, value.output_nr)
        alike = tuple([_kind(tensor) for tensor in self.tensors()])
        self.key = self.tree, alike, _kind(value)
        self.shape, self.stride = value.shape, value.stride()

    def tensors(self) -> list[Tensor]:
        """What is kept; RuntimeError if it was changed since, or freed."""
        tensors = [getattr(node, f"_saved_{name}") for node, name in self.places]
        check_memory(tensors)
        return tensors

    def computed(self, tensors: list[Tensor], guess: float | None = None) -> Tensor:
        """The value from these tensors, laid out as it was; perhaps by a guessed number."""
        value = _computed(self.tree, tensors, guess)
        if value.stride() != self.stride:
            value = value.new_empty_strided(self.shape, self.stride).copy_(value)
        return value

    @property
    def guesses(self) -> bool:
        """True if another value may come out for a guessed number."""
        return any([ROWS[name].guess is not None for name in _names(self.tree)])

    def _step(self, node: Any, output: int) -> Step:
        name = type(node).__name__
        row = ROWS.get(name)
        self.left -= 1
        if row is None or self.left < 0 or output and ".output" not in row.constants:
            raise NoRecipe
        operands = tuple([self._operand(node, operand) for operand in row.operands])
        constants = tuple([_constant(node, output, constant) for constant in row.constants])
        return Step(name, constants, operands)

    def _operand(self, node: Any, operand: Operand) -> Step | int | None:
        if operand.kept is not None:
            if has_unpack_hook(getattr(node, f"_raw_saved_{operand.kept}")):
                raise NoRecipe
            tensor = getattr(node, f"_saved_{operand.kept}")
            if tensor is not None:
                if type(tensor) not in PLAIN:
                    raise NoRecipe
                self.places.append((node, operand.kept))
                return len(self.places) - 1
            if operand.edge is None:
                return None
        return self._step(*node.next_functions[operand.edge])


def recipe_of(value: Tensor) -> Recipe | None:
    """The recipe of a value that has a gradient, if there is one."""
    try:
        return Recipe(value)
    # RuntimeError: something wrote into a tensor that is kept, or it was freed.
    # AttributeError: this torch's node has no such attribute.
    except (NoRecipe, RuntimeError, AttributeError):
        return None


def check_memory(tensors: Iterable[Tensor]) -> None:
    """RuntimeError for one whose memory is let go of, as FSDP does with a norm's weight."""
    for tensor in tensors:
        if not tensor.untyped_storage().nbytes() and tensor.numel():
            raise RuntimeError(
                f"the memory of a {tensor.dtype} tensor of shape {tuple(tensor.shape)}, from which "
                "the input of an adapted linear call is computed again, was freed before the "
                "backward pass: free it later, or keep that input: inject(..., recompute=False).")


def _names(tree: Step) -> Iterator[str]:
    yield tree.node
    for operand in tree.operands:
        if isinstance(operand, Step):
            yield from _names(operand)


def _computed(step: Step, tensors: list[Tensor], guess: float | None) -> Tensor:
    row = ROWS[step.node]
    operands: list[Tensor | None] = []
    for operand in step.operands:
        if isinstance(operand, Step):
            operands.append(_computed(operand, tensors, guess))
        else:
            operands.append(None if operand is None else tensors[operand])
    if guess is not None and row.guess is not None:
        return row.guess(guess, *operands, *step.constants)
    if row.out:
        for operand, value in zip(step.operands, operands):
            if isinstance(operand, Step) and not ROWS[operand.node].arranges:
                assert value is not None
                if all([_fits(other, value) for other in operands]):
                    return row.function(*operands, *step.constants, out=value)
    return row.function(*operands, *step.constants)


def _fits(operand: Tensor | None, target: Tensor) -> bool:
    """True if what an operator makes of the target and this operand can stand in the target."""
    if operand is None or operand.ndim and operand.dtype != target.dtype:
        return False
    longest = max(operand.ndim, target.ndim)
    shapes = [(1,) * (longest - tensor.ndim) + tuple(tensor.shape) for tensor in (operand, target)]
    return all([length in (1, goal) for length, goal in zip(*shapes)])


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


_MANY = 1 << 63  # a node shows a negative number as one of 64 bits without a sign


def _constant(node: Any, output: int, name: str) -> Any:
    if name == ".output":
        return output
    if name.startswith("."):
        value = getattr(node._input_metadata[output], name[1:])
    else:
        value = getattr(node, f"_saved_{name}")
    if isinstance(value, (list, tuple)):
        return tuple([_signed(number) for number in value])
    return _signed(value)


def _signed(value: Any) -> Any:
    return value - 2 * _MANY if isinstance(value, int) and value >= _MANY else value
