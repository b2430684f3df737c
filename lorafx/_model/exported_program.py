"""Programs of torch.export as modules that lorafx rewrites, and what became of these as programs.

A program's graph with its weights put back, `module_of`, is a module like any other. `program_of`
writes what was done to it into the program: at each linear call the nodes of s (x A^T) B^T and of
a sum, with A and B among the parameters, and new weights. All else of the program stays as it is,
node for node: which sizes may vary, the structure of inputs and outputs, what it mutates, its
constants. Each node of a branch says so in its `meta["custom"]`, which torch keeps in files and
through decompositions; so it is known what to take away again.
"""

import copy
import dataclasses
import functools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from torch import Tensor, fx, nn

from .._adapter.adapter import Adapter, Pair
from .._adapter.config import LoRAConfig
from .._adapter.names import dotted
from .._errors import AdapterError, UnsupportedModelError
from .._graph.loaded import is_exported
from .._graph.modules import named_modules, submodule
from .._kernels.addend import Addend
from .._kernels.private import storage_key
from .attach import attach, begin_injection
from .branches import Branch, branches
from .copies import share
from .program import read_program
from .record import find_injection, refresh, set_trainable
from .trained import Trained

if TYPE_CHECKING:
    from torch.export import ExportedProgram

F = TypeVar("F", bound=Callable[..., Any])
MARK = "lorafx"  # in `meta["custom"]`: what the node belongs to


class Mark(NamedTuple):
    """What a node of a branch says: which of the program's branches it is of, and whose."""

    number: int
    site: str
    adapter: str
    pair: str  # A and B are `<pair>.A` and `<pair>.B`
    scale: float


def takes_exported(verb: F) -> F:
    """Let a function of a model take a program of torch.export too, by way of its module.

    Where it returns a model, it returns a program.
    """

    @functools.wraps(verb)
    def through_module(model: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_exported(model):
            return verb(model, *args, **kwargs)
        result = verb(module_of(model), *args, **kwargs)
        return program_of(model, result) if isinstance(result, nn.Module) else result

    return through_module  # type: ignore[return-value]


def module_of(program: "ExportedProgram") -> nn.Module:
    """A module that computes what the program does, injected if that has branches.

    The program's Parameters are not touched, whatever is done to it.
    """
    marks = {mark.pair: mark for mark, _ in _branches_in(program.graph)}
    module = _unlifted(_without_branches(program))
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
    record = find_injection(module)
    assert record is not None
    record.active = dict.fromkeys(pairs, 1.0)
    set_trainable(module)
    refresh(module)
    return module


def _unlifted(program: "ExportedProgram") -> fx.GraphModule:
    """A program with its weights put back, each node reading them under its own module's names.

    torch.export lets all that read one tensor read it under one of its names.
    """
    module: fx.GraphModule = program.module(check_guards=False)
    read = {node.target: node for node in module.graph.find_nodes(op="get_attr")}
    for names in _ties(program):
        tensor = program.state_dict[names[0]]  # of what a file held, there is one for each name
        for name in names:
            owner, _, attribute = name.rpartition(".")
            submodule(module, owner)._parameters[attribute] = tensor
        for name in names:
            for user in list(read[name].users):
                own = [other for other in names if other.rpartition(".")[0] == _module_of(user)]
                if len(own) == 1 and own[0] != name:
                    user.replace_input_with(read[name], read[own[0]])
    module.recompile()
    return module


def _ties(program: "ExportedProgram") -> list[list[str]]:
    """The names of each parameter that has several."""
    found: dict[Any, list[str]] = defaultdict(list)
    for name in program.graph_signature.parameters:
        tensor = program.state_dict[name]
        memory = storage_key(tensor.untyped_storage()), tensor.storage_offset()
        found[memory, tensor.shape, tensor.stride()].append(name)
    return [names for names in found.values() if len(names) > 1]


def _module_of(node: fx.Node) -> str:
    """The path of the module whose forward made a node; `@1` is said of its second call."""
    stack = [*node.meta.get("nn_module_stack", {}).values()]
    return re.sub(r"@\d+", "", stack[-1][0]) if stack else ""


def named_factors(
    program: "ExportedProgram", adapter: str | None
) -> Iterator[tuple[str, nn.Parameter]]:
    """(name in state_dict, tensor) of the A and B of a program, all or one adapter's."""
    adapters: dict[str, dict[str, None]] = defaultdict(dict)
    for mark, _ in _branches_in(program.graph):
        adapters[mark.adapter][mark.pair] = None
    if adapter is not None and adapter not in adapters:
        known = ", ".join(map(repr, adapters)) or "none"
        raise AdapterError(f"This program has no adapter {adapter!r}; it has {known}.")
    for name, pairs in adapters.items():
        for pair in pairs if adapter in (None, name) else ():
            for half in "AB":
                yield f"{pair}.{half}", program.state_dict[f"{pair}.{half}"]


def program_of(program: "ExportedProgram", module: nn.Module) -> "ExportedProgram":
    """The program that computes what its module now does."""
    _check_fits(module)
    writer = _Writer(_without_branches(program))
    writer.take_tensors(module)
    writer.read_apart(module)
    record = find_injection(module)
    if record is not None:
        writer.write_branches(module, record.active)
    return writer.made()


def _check_fits(module: nn.Module) -> None:
    """Raise where a module does what no nodes of one graph say."""
    record = find_injection(module)
    for adapter, config in {} if record is None else record.configs.items():
        if adapter not in record.active:
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
            if any(_branch_calls(inner)):
                raise UnsupportedModelError(
                    f"'{path}' makes a linear call with a weight of its own in a graph inside of "
                    "the program's: exclude that site.")


def _branch_calls(module: fx.GraphModule) -> Iterator[tuple[fx.Node, Branch]]:
    """(node, the branch that it calls)."""
    for node in module.graph.find_nodes(op="call_module"):
        called = submodule(module, str(node.target))
        if isinstance(called, Branch):
            yield node, called


def _branches_in(graph: fx.Graph) -> list[tuple[Mark, list[fx.Node]]]:
    """(mark, its nodes) of all branches that were written into a graph."""
    found: dict[Mark, list[fx.Node]] = {}
    for node in graph.nodes:
        marked = node.meta.get("custom", {}).get(MARK)
        if marked is not None:
            found.setdefault(Mark(*marked), []).append(node)
    return list(found.items())


def _without_branches(program: "ExportedProgram") -> "ExportedProgram":
    """The program as it was before; the same if it has none."""
    found = _branches_in(program.graph)
    if not found:
        return program
    writer = _Writer(program)
    writer.erase_branches()
    return writer.made()


def _copied(call: Any) -> Any:
    """What a program says of the call of a submodule, whose names of nodes may be changed."""
    signature = call.signature
    if signature is not None:
        signature = dataclasses.replace(
            signature, inputs=list(map(copy.copy, signature.inputs)),
            outputs=list(map(copy.copy, signature.outputs)))
    return dataclasses.replace(call, signature=signature)


class _Writer:
    """A program that is made from another; that stays as it is."""

    def __init__(self, program: "ExportedProgram") -> None:
        self.program = program
        self.graph = copy.deepcopy(program.graph)
        for node, original in zip(self.graph.nodes, program.graph.nodes):
            node.name = original.name  # which a copy of a graph may change
        self.signature = copy.deepcopy(program.graph_signature)
        self.calls = list(map(_copied, program.module_call_graph))
        self.state: dict[str, Any] = dict(program.state_dict)
        self.constants: dict[str, Any] = dict(program.constants)
        self.branches = 0

    def made(self) -> "ExportedProgram":
        program = self.program
        return type(program)(
            program.graph_module, self.graph, self.signature, self.state,
            copy.copy(program.range_constraints), self.calls, program.example_inputs,
            self.constants, verifiers=program.verifiers)

    def take_tensors(self, module: nn.Module) -> None:
        """Hold what a module of the program has, and share no buffer with the program."""
        for name in self.state:
            owner, _, attribute = name.rpartition(".")
            held = submodule(module, owner)
            self.state[name] = {**held._parameters, **held._buffers}[attribute]
        for name, value in self.constants.items():
            self.constants[name] = value.clone() if isinstance(value, Tensor) else value

    def read_apart(self, module: Any) -> None:
        """Let nodes read what was one tensor, and now is two, under their own names."""
        nodes = self._own_nodes(module.graph)
        for names in _ties(self.program):
            placeholders = {name: self._input(name) for name in names}
            for node in module.graph.find_nodes(op="get_attr"):
                if node.target not in placeholders:
                    continue
                for name, placeholder in placeholders.items():
                    if self.state[name] is not self.state[node.target]:
                        for user in node.users:
                            nodes[user].replace_input_with(placeholder, nodes[node])

    def write_branches(self, module: Any, active: Mapping[str, float]) -> None:
        """Put nodes in the places of the calls of a module's branches."""
        sites = {branch: site for site, branch in branches(module).items()}
        paths = {inner: path for path, inner in named_modules(module)}
        written = self._own_nodes(module.graph)
        called = {branch for _, branch in _branch_calls(module)}
        for branch, site in sites.items():
            if branch not in called:
                raise UnsupportedModelError(
                    f"What this program makes of '{site}' is no linear call with one matrix: "
                    "exclude it.")
        for node, branch in _branch_calls(module):
            x, y, *reverse = node.args
            x, last = written[x], written[y]
            for adapter in active:
                for addend in branch.addends(None, {adapter: 1.0}):
                    pair = f"{paths[branch]}.{adapter}"
                    mark = Mark(self.branches, sites[branch], adapter, pair, addend.scale)
                    factors = [self._parameter(f"{pair}.A", addend.right),
                               self._parameter(f"{pair}.B", addend.left)]
                    last = self._add(addend, bool(reverse), x, last, factors, mark)
            written[node] = last

    def _own_nodes(self, graph: fx.Graph) -> dict[fx.Node, fx.Node]:
        """{node of the module's graph: the same one here}."""
        from torch.export.graph_signature import InputKind
        named = {node.name: node for node in self.graph.nodes}
        found: dict[fx.Node, fx.Node] = {}
        inputs, targets = [], {}
        for spec in self.signature.input_specs:
            node = named[spec.arg.name]
            if spec.kind is InputKind.USER_INPUT:
                inputs.append(node)
            else:
                targets[spec.target] = node
        found.update(zip(graph.find_nodes(op="placeholder"), inputs))
        for node in graph.nodes:
            if node.op == "call_function" and node.name in named:
                found[node] = named[node.name]
            elif node.op == "get_attr" and node.target in targets:
                found[node] = targets[node.target]
        return found

    def _input(self, name: str) -> fx.Node | None:
        """The input that is this tensor of the state_dict."""
        specs = self.signature.input_specs
        for spec, node in zip(specs, self.graph.find_nodes(op="placeholder")):
            if spec.target == name:
                return node
        return None

    def _parameter(self, name: str, tensor: Tensor) -> fx.Node:
        """The input that a new parameter is, the last of them."""
        from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
        known = self._input(name)
        if known is not None:
            return known
        specs = self.signature.input_specs
        inputs = self.graph.find_nodes(op="placeholder")
        place = sum(spec.kind is InputKind.PARAMETER for spec in specs)
        assert isinstance(tensor, nn.Parameter)
        with self.graph.inserting_before(inputs[place]):
            node = self.graph.placeholder("p_" + re.sub(r"\W", "_", name).lower())
        node.meta["val"] = _fake_mode(inputs).from_tensor(tensor, static_shapes=True)
        specs.insert(place, InputSpec(InputKind.PARAMETER, TensorArgument(node.name), name))
        self.state[name] = tensor
        return node

    def _add(
        self, addend: Addend, reverse: bool, x: fx.Node, y: fx.Node, factors: list[fx.Node],
        mark: Mark,
    ) -> fx.Node:
        """y + s (x A^T) B^T for all that used y."""
        def branch(x: Tensor, y: Tensor, A: Tensor, B: Tensor) -> Tensor:
            given = addend._replace(left=B, right=A, proven=None)
            return (given.transposed if reverse else given).add_to_output(y, x)

        operands = [x, y, *factors]
        traced = self._traced(branch, [node.meta["val"] for node in operands])
        copies = dict(zip(traced.find_nodes(op="placeholder"), operands))
        meta = {key: y.meta[key] for key in ("nn_module_stack", "stack_trace") if key in y.meta}
        custom = {**y.meta.get("custom", {}), MARK: list(mark)}
        new: set[fx.Node] = set()
        with self.graph.inserting_before(y.next):
            for node in traced.nodes:
                if node.op == "call_function":
                    copied = self.graph.node_copy(node, copies.__getitem__)
                    copied.meta = {**meta, "val": node.meta["val"], "custom": custom}
                    copies[node] = copied
                    new.add(copied)
        self.branches += 1
        last = copies[traced.output_node().args[0]]
        self._replace(y, last, new)
        return last

    def _traced(self, branch: Callable[..., Tensor], values: list[Any]) -> fx.Graph:
        """The operators of a branch, as those of the program are: decomposed if they are."""
        from torch.export import default_decompositions
        from torch.fx.experimental.proxy_tensor import make_fx
        if self.program.dialect == "TRAINING":
            return make_fx(branch, pre_dispatch=True)(*values).graph
        return make_fx(branch, dict(default_decompositions()))(*values).graph

    def _replace(self, old: fx.Node, new: fx.Node, but_for: set[fx.Node]) -> None:
        """Let all that used one node use another, and say so in the signatures."""
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in but_for)
        self.signature.replace_all_uses(old.name, new.name)
        for call in self.calls:
            if call.signature is not None:
                call.signature.replace_all_uses_with(old, new)

    def erase_branches(self) -> None:
        """Take away the nodes of all branches, and A and B."""
        found = _branches_in(self.graph)
        position = {node: number for number, node in enumerate(self.graph.nodes)}
        for _, nodes in found:
            given = {node for own in nodes for node in own.all_input_nodes} - set(nodes)
            y = max(given, key=position.__getitem__)  # x comes before it, and A and B are inputs
            self._replace(nodes[-1], y, set())
            for node in reversed(nodes):
                self.graph.erase_node(node)
        for pair in dict.fromkeys(mark.pair for mark, _ in found):
            for half in "AB":
                self._drop(f"{pair}.{half}")

    def _drop(self, name: str) -> None:
        node = self._input(name)
        assert node is not None
        self.graph.erase_node(node)
        specs = self.signature.input_specs
        specs[:] = [spec for spec in specs if spec.target != name]
        del self.state[name]


def _fake_mode(nodes: list[fx.Node]) -> Any:
    """Which the values of a program's tensors belong to."""
    for node in nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            return value.fake_mode  # type: ignore[attr-defined]
    raise UnsupportedModelError("This program has no input that is a tensor.")
