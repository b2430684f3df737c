"""A model as a program of its inputs and of an adapter's tensors, which torch.export traces."""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from .._adapter.adapter import Adapter, Pair
from .._adapter.config import LoRAConfig, factor_dtype
from .._adapter.names import dotted, split_block
from .._errors import AdapterError, UnsupportedModelError
from .._kernels.private import is_namedtuple, tree_structure
from .attach import attach, begin_injection
from .branches import branches, factors_at
from .factors import Factors
from .places import places_of, tensor_at
from .program import read_program
from .program_writer import ProgramWriter
from .record import injection, trained_modules

ADAPTER = "inputs"  # the name of the only adapter in such a program
_VALUES = (Tensor, int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
RANK = 2  # of the example: torch.export takes sizes of 0 and 1 for constants


class WithAdapterInputs(nn.Module):
    """f(adapter, ...) = model(...) with A and B of `adapter`, {`<site>.lora.A`: tensor, ...}.

    `model` holds ADAPTER only, without tensors of its own: those of the mapping stand in their
    places during a call.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.adapter: dict[str, Tensor] = {}  # the base: zeros
        self.places: dict[str, tuple[Factors, str]] = {}
        for site, branch in branches(model).items():
            factors = factors_at(branch, ADAPTER)
            assert factors is not None
            for half in "AB":
                name = dotted(site, f"lora.{half}")
                self.adapter[name] = torch.zeros_like(factors._parameters[half])  # type: ignore
                self.places[name] = factors, half
                factors._parameters[half] = None

    def run(self, adapter: Mapping[str, Tensor], args: Any, kwargs: Any) -> Any:
        """model(*args, **kwargs) with this adapter, in dicts, lists and tuples."""
        try:
            for name, (factors, half) in self.places.items():
                held: dict[str, Any] = factors._parameters
                held[half] = adapter[name]
            return plain(self.model(*args, **kwargs))
        finally:
            for factors, half in self.places.values():
                factors._parameters[half] = None


def with_adapter_inputs(
    model: nn.Module, base: nn.Module, keywords: Iterable[str]
) -> WithAdapterInputs:
    """Return the program of an injected model; `base`, its original, becomes a part of it.

    The program's forward takes the adapter, and then what the model's takes, by the same names:
    `keywords` are those of its arguments that are given by name.
    """
    dtypes, shapes = input_dtypes(model), input_shapes(model, RANK)
    program = read_program(base)
    pairs: dict[str, Pair] = {}
    for name, both in shapes.items():
        site = program.site(name)  # if it is none any more, `attach` says so
        device = None if site is None else program.home(site, has_values=True)
        A, B = (torch.zeros(shape, dtype=dtypes[name], device=device) for shape in both)
        pairs[name] = Pair(A, B, 1.0)
    begin_injection(program, group=False, recompute=False)
    attach(program, Adapter(ADAPTER, LoRAConfig(RANK, targets=[*pairs]), pairs))
    injection(base).choice.choose({ADAPTER: 1.0})
    with contextlib.suppress(NotImplementedError):  # of a program's module, which is in no mode
        base.eval()
    base.requires_grad_(False)

    def forward(self: WithAdapterInputs, adapter: Any, *args: Any, **kwargs: Any) -> Any:
        return self.run(adapter, args, kwargs)

    forward.__signature__ = _signature(base.forward, keywords)  # type: ignore[attr-defined]
    cls = type("WithAdapterInputs", (WithAdapterInputs,), {"forward": forward})
    made: WithAdapterInputs = cls(base)
    return made


def _signature(forward: Callable[..., Any], keywords: Iterable[str]) -> inspect.Signature:
    """(self, adapter, ...) of a program, with the names that `**kwargs` would take among them.

    torch.export lets no sizes vary in what has no name of its own.
    """
    taken = inspect.signature(forward).parameters
    first = "adapter"
    while first in taken:
        first += "_"
    positional = inspect.Parameter.POSITIONAL_ONLY
    parameters = [inspect.Parameter(name, positional) for name in ("self", first)]
    parameters += [each for each in taken.values() if each.kind is not each.VAR_KEYWORD]
    for name in keywords:
        if name not in taken:
            parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY))
    return inspect.Signature(parameters)


def by_keyword(program: ExportedProgram) -> ExportedProgram:
    """f(..., **adapter) = program(adapter, ...).

    AOTInductor takes the tensors of a dict in the order in which they come, whatever their names
    are, but keyword arguments by their names.
    """
    writer = ProgramWriter(program)
    (adapter, *args), kwargs = program.example_inputs
    given = tuple(args), {**kwargs, **adapter}
    specs, nodes = writer.signature.input_specs, writer.graph.find_nodes(op="placeholder")
    first = [spec.kind for spec in specs].index(InputKind.USER_INPUT)
    after, last = nodes[-1].next, first + len(adapter)
    for node in nodes[first:last]:
        after.prepend(node)
    specs[:] = specs[:first] + specs[last:] + specs[first:last]
    root = writer.calls[0]
    names = [f"_{number}" for number in range(len(args) + len(given[1]))]
    call = dataclasses.replace(
        root.signature, in_spec=tree_structure(given), forward_arg_names=names)
    writer.calls[0] = dataclasses.replace(root, signature=call)
    made = writer.made()
    made.example_inputs = given
    return made


def plain(output: Any) -> Any:
    """What a model returns without the classes of its code: named fields are a dict's, if any.

    Raises UnsupportedModelError of what is no tensor and no number.
    """
    if is_namedtuple(output):
        output = output._asdict()
    if isinstance(output, Mapping):
        return {key: plain(value) for key, value in output.items() if value is not None}
    if isinstance(output, (tuple, list)):
        kind = list if isinstance(output, list) else tuple
        return kind(map(plain, output))
    if output is None or isinstance(output, _VALUES):
        return output
    raise UnsupportedModelError(
        f"The model returns a {type(output).__name__}, and an exported program returns tensors and "
        "numbers, in dicts, lists and tuples: let args and kwargs be such that it does not (those "
        "of transformers take use_cache=False), or wrap it in a module that returns its tensors.")


def input_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """{site: dtype of A and B as inputs} of all sites that have some: W's own, at least float32."""
    places, config = places_of(model), LoRAConfig()
    dtypes: dict[str, torch.dtype] = {}
    for site, _ in _factors(model):
        dtypes[site] = factor_dtype(config, tensor_at(places[split_block(site)[0]]))
    return dtypes


def input_shapes(
    model: nn.Module, rank: int
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """{site: shapes of A and B as inputs} of the same sites, for a rank."""
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for site, factors in _factors(model):
        (*stack, _, inputs), (*_, outputs, _) = factors.shapes
        shapes[site] = (*stack, rank, inputs), (*stack, outputs, rank)
    return shapes


def _factors(model: nn.Module) -> Iterator[tuple[str, Factors]]:
    """(site, the factors of some adapter) at each site that has adapters'."""
    for site, branch in branches(model).items():
        for held in branch._modules.values():
            if isinstance(held, Factors):
                yield site, held
                break


def check_takes_inputs(model: nn.Module) -> None:
    """Raise unless a model has adapters, all of them of A and B alone."""
    if not injection(model).configs:
        raise AdapterError("This model has no adapter, so that nothing says which sites take one "
                           "as inputs: lorafx.add one.")
    for path, _, trained in trained_modules(model):
        for adapter, copies in trained.sets().items():
            raise UnsupportedModelError(
                f"Adapter {adapter!r} trains '{dotted(path, next(iter(copies.holders())))}' whole, "
                "and only A and B can be inputs of an exported program: lorafx.merge it, and "
                "export what that returns.")
