"""Programs of torch.export as modules that lorafx rewrites, and what became of these as programs.

A program's graph with its weights put back, `_module_of`, is a module like any other. `_program_of`
writes what was done to it into the program. All else of that stays as it is, node for node: which
sizes may vary, the structure of inputs and outputs, what is mutated, constants.
"""

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import fx, nn
from torch.export import ExportedProgram

from .._adapter.adapter import Adapter, Pair
from .._adapter.config import LoRAConfig
from .._errors import AdapterError, UnsupportedModelError
from .._graph.modules import named_modules, submodule
from .attach import attach, begin_injection
from .copies import share
from .program import read_program
from .program_writer import ProgramWriter, branch_calls, branches_in, ties
from .record import find_injection, set_trainable
from .trained import Trained

F = TypeVar("F", bound=Callable[..., Any])


def takes_exported(verb: F) -> F:
    """Let a function of a model take a program of torch.export too, by way of its module.

    Where it returns a model, it returns a program.
    """

    @functools.wraps(verb)
    def through_module(model: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(model, ExportedProgram):
            return verb(model, *args, **kwargs)
        bare = _without_branches(model)
        result = verb(_module_of(model, bare), *args, **kwargs)
        return _program_of(bare, result) if isinstance(result, nn.Module) else result

    return through_module  # type: ignore[return-value]


def _module_of(program: ExportedProgram, bare: ExportedProgram) -> nn.Module:
    """A module that computes what the program does, injected if that has branches.

    `bare` is the program without these. A and B are the program's own Parameters, which optimizers
    know; the others are not touched, whatever is done to it.
    """
    marks = {mark.pair: mark for mark, _ in branches_in(program.graph)}
    module = _unlifted(bare)
    if not marks:
        return module
    module = share(module)
    pairs: dict[str, dict[str, Pair]] = defaultdict(dict)
    for pair, mark in marks.items():
        A, B = (program.state_dict[f"{pair}.{half}"].detach() for half in "AB")
        pairs[mark.adapter][mark.site] = Pair(A, B, mark.scale)
    begin_injection(read_program(module))
    for adapter, by_site in pairs.items():
        rank = max(pair.A.shape[-2] for pair in by_site.values())
        config = LoRAConfig(rank, targets=[*by_site])
        attach(read_program(module), Adapter(adapter, config, by_site))
    for pair in marks:
        for half in "AB":
            submodule(module, pair)._parameters[half] = program.state_dict[f"{pair}.{half}"]
    record = find_injection(module)
    assert record is not None
    record.active = dict.fromkeys(pairs, 1.0)
    set_trainable(module)
    return module


def _unlifted(program: ExportedProgram) -> fx.GraphModule:
    """A program with its weights put back, each node reading them under its own module's names.

    torch.export lets all that read one tensor read it under one of its names.
    """
    module: fx.GraphModule = program.module(check_guards=False)
    module.meta = {}  # where torch.export.unflatten leaves a whole module
    read = {node.target: node for node in module.graph.find_nodes(op="get_attr")}
    for names in ties(program):
        tensor = program.state_dict[names[0]]  # of what a file held, there is one for each name
        for name in names:
            owner, _, attribute = name.rpartition(".")
            submodule(module, owner)._parameters[attribute] = tensor
        for name in names:
            for user in list(read[name].users):
                own = [other for other in names if other.rpartition(".")[0] == _owner_of(user)]
                if len(own) == 1 and own[0] != name:
                    user.replace_input_with(read[name], read[own[0]])
    module.recompile()
    return module


def _owner_of(node: fx.Node) -> str:
    """The path of the module whose forward made a node; `@1` is said of its second call."""
    stack = [*node.meta.get("nn_module_stack", {}).values()]
    return re.sub(r"@\d+", "", stack[-1][0]) if stack else ""


def named_factors(
    program: ExportedProgram, adapter: str | None
) -> Iterator[tuple[str, nn.Parameter]]:
    """(name in state_dict, tensor) of the A and B of a program, all or one adapter's."""
    owners = {mark.pair: mark.adapter for mark, _ in branches_in(program.graph)}
    if adapter is not None and adapter not in owners.values():
        known = ", ".join(map(repr, dict.fromkeys(owners.values()))) or "none"
        raise AdapterError(f"This program has no adapter {adapter!r}; it has {known}.")
    for name in program.graph_signature.parameters:
        owner = owners.get(name.rpartition(".")[0])
        if owner is not None and adapter in (None, owner):
            yield name, program.state_dict[name]


def _program_of(bare: ExportedProgram, module: nn.Module) -> ExportedProgram:
    """The program that computes what its module now does; `bare` is it without branches."""
    _check_fits(module)
    writer = ProgramWriter(bare)
    writer.take_tensors(module)
    writer.read_apart(module)
    record = find_injection(module)
    if record is not None:
        writer.write_branches(module, record.active)
    return writer.made()


def _check_fits(module: nn.Module) -> None:
    """Raise where a module does what no nodes of one graph say."""
    record = find_injection(module)
    configs = {} if record is None else record.configs
    for adapter, config in configs.items():
        if record is not None and adapter not in record.active:
            raise AdapterError(
                f"An exported program computes with all adapters that it holds, and {adapter!r} "
                "would come second: lorafx.eject the program, or lorafx.merge it, first.")
        if config.dropout:
            raise UnsupportedModelError(
                "An exported program computes the same in training and in eval, so that it cannot "
                "drop out: use dropout=0.")
    for path, inner in named_modules(module):
        if isinstance(inner, Trained):
            raise UnsupportedModelError(
                f"'{path.removesuffix('trained').removesuffix('.')}' would be trained whole, and "
                "an exported program gets A and B alone: let the parameter of program.module() "
                "require grad.")
        if inner is not module and isinstance(inner, fx.GraphModule):
            if any(branch_calls(inner)):
                raise UnsupportedModelError(
                    f"'{path}' makes a linear call with a weight of its own in a graph inside of "
                    "the program's: exclude that site.")


def _without_branches(program: ExportedProgram) -> ExportedProgram:
    """The program as it was before; the same if it has none."""
    found = branches_in(program.graph)
    if not found:
        return program
    writer = ProgramWriter(program)
    writer.erase_branches()
    return writer.made()
