"""Writes the branches and weights of a program's module into a copy of the program of torch.export.

At each linear call come the nodes of s (x A^T) B^T and of a sum, and A and B come among the
parameters. Each such node says so in its `meta["custom"]`, which torch keeps in files and through
decompositions: so it is known what to take away again.
"""

import copy
import dataclasses
import functools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, fx, nn
from torch.export import ExportedProgram, default_decompositions
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from .._errors import UnsupportedModelError
from .._graph.modules import named_modules, submodule
from .._kernels.addend import Addend
from .._kernels.private import storage_key
from .branches import Branch, branches

MARK = "lorafx"  # in `meta["custom"]`: what the node belongs to


class Mark(NamedTuple):
    """What a node of a branch says: which of the program's branches it is of, and whose."""

    number: int
    site: str
    adapter: str
    pair: str  # A and B are `<pair>.A` and `<pair>.B`
    scale: float


def branches_in(graph: fx.Graph) -> list[tuple[Mark, list[fx.Node]]]:
    """(mark, its nodes) of all branches that were written into a graph."""
    found: dict[Mark, list[fx.Node]] = {}
    for node in graph.nodes:
        marked = node.meta.get("custom", {}).get(MARK)
        if marked is not None:
            found.setdefault(Mark(*marked), []).append(node)
    return list(found.items())


def branch_calls(module: fx.GraphModule) -> Iterator[tuple[fx.Node, Branch]]:
    """(node, the branch that it calls)."""
    for node in module.graph.find_nodes(op="call_module"):
        called = submodule(module, str(node.target))
        if isinstance(called, Branch):
            yield node, called


def ties(program: ExportedProgram) -> list[list[str]]:
    """The names of each parameter that has several."""
    found: dict[Any, list[str]] = defaultdict(list)
    for name in program.graph_signature.parameters:
        tensor = program.state_dict[name]
        memory = storage_key(tensor.untyped_storage()), tensor.storage_offset()
        found[memory, tensor.shape, tensor.stride()].append(name)
    return [names for names in found.values() if len(names) > 1]


def _copied(call: Any) -> Any:
    """What a program says of the call of a submodule, whose names of nodes may be changed."""
    signature = call.signature
    if signature is not None:
        signature = dataclasses.replace(
            signature, inputs=list(map(copy.copy, signature.inputs)),
            outputs=list(map(copy.copy, signature.outputs)))
    return dataclasses.replace(call, signature=signature)


class ProgramWriter:
    """A program that is made from another; that stays as it is."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.graph = copy.deepcopy(program.graph)
        for node, original in zip(self.graph.nodes, program.graph.nodes):
            node.name = original.name  # which a copy of a graph may change
        self.signature = copy.deepcopy(program.graph_signature)
        self.calls = list(map(_copied, program.module_call_graph))
        self.state: dict[str, Any] = dict(program.state_dict)
        self.constants: dict[str, Any] = dict(program.constants)
        self.branches = 0
        inputs = zip(self.signature.input_specs, self.graph.find_nodes(op="placeholder"))
        self.inputs = {spec.target: node for spec, node in inputs if spec.target is not None}

    def made(self) -> ExportedProgram:
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
        for names in ties(self.program):
            placeholders = {name: self.inputs[name] for name in names}
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
        called = {branch for _, branch in branch_calls(module)}
        for branch, site in sites.items():
            if branch not in called:
                raise UnsupportedModelError(
                    f"What this program makes of '{site}' is no linear call with one matrix: "
                    "exclude it.")
            for adapter in active:
                for addend in branch.addends(None, {adapter: 1.0}):
                    self._parameter(f"{paths[branch]}.{adapter}.A", addend.right)
                    self._parameter(f"{paths[branch]}.{adapter}.B", addend.left)
        for node, branch in branch_calls(module):
            given: Any = node.args  # x, y and, of a call of the transpose, True
            x, last = written[given[0]], written[given[1]]
            for adapter in active:
                for addend in branch.addends(None, {adapter: 1.0}):
                    pair = f"{paths[branch]}.{adapter}"
                    mark = Mark(self.branches, sites[branch], adapter, pair, addend.scale)
                    last = self._add(addend, len(given) > 2, x, last, mark)
            written[node] = last

    def _own_nodes(self, graph: fx.Graph) -> dict[fx.Node, fx.Node]:
        """{node of the module's graph: the same one here}."""
        named = {node.name: node for node in self.graph.nodes}
        users = [named[spec.arg.name] for spec in self.signature.input_specs
                 if spec.kind is InputKind.USER_INPUT]
        found = dict(zip(graph.find_nodes(op="placeholder"), users))
        for node in graph.nodes:
            if node.op == "call_function" and node.name in named:
                found[node] = named[node.name]
            elif node.op == "get_attr" and node.target in self.inputs:
                found[node] = self.inputs[node.target]
        return found

    def _parameter(self, name: str, tensor: Tensor) -> None:
        """A new input, the last of those that are parameters."""
        specs, inputs = self.signature.input_specs, self.graph.find_nodes(op="placeholder")
        place = sum(spec.kind is InputKind.PARAMETER for spec in specs)
        with self.graph.inserting_before([*inputs, inputs[-1].next][place]):
            node = self.graph.placeholder("p_" + re.sub(r"\W", "_", name).lower())
        node.meta["val"] = _fake_mode(inputs).from_tensor(tensor, static_shapes=True)
        specs.insert(place, InputSpec(InputKind.PARAMETER, TensorArgument(node.name), name))
        self.state[name], self.inputs[name] = tensor, node

    def _add(
        self, addend: Addend, reverse: bool, x: fx.Node, y: fx.Node, mark: Mark
    ) -> fx.Node:
        """y + s (x A^T) B^T for all that used y."""
        def branch(x: Tensor, y: Tensor, A: Tensor, B: Tensor) -> Tensor:
            given = addend._replace(left=B, right=A, proven=None)
            return (given.transposed if reverse else given).add_to_output(y, x)

        operands = [x, y, self.inputs[f"{mark.pair}.A"], self.inputs[f"{mark.pair}.B"]]
        traced = self._traced(branch, [node.meta["val"] for node in operands])
        copies: dict[Any, fx.Node] = dict(zip(traced.find_nodes(op="placeholder"), operands))
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
        from torch.fx.experimental.proxy_tensor import make_fx
        pre_dispatch = self.program.dialect == "TRAINING"
        table = None if pre_dispatch else self._decompositions
        return make_fx(branch, table, pre_dispatch=pre_dispatch)(*values).graph

    @functools.cached_property
    def _decompositions(self) -> dict[Any, Any]:
        return dict(default_decompositions())

    def _replace(self, old: fx.Node, new: fx.Node, but_for: set[fx.Node]) -> None:
        """Let all that used one node use another, and say so in the signatures."""
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in but_for)
        self.signature.replace_all_uses(old.name, new.name)
        for call in self.calls:
            if call.signature is not None:
                call.signature.replace_all_uses_with(old, new)

    def erase_branches(self) -> None:
        """Take away the nodes of all branches, and A and B."""
        found = branches_in(self.graph)
        position = {node: number for number, node in enumerate(self.graph.nodes)}
        for _, nodes in found:
            given = {node for own in nodes for node in own.all_input_nodes} - set(nodes)
            y = max(given, key=position.__getitem__)  # x comes before it, and A and B are inputs
            self._replace(nodes[-1], y, set())
            for node in reversed(nodes):
                self.graph.erase_node(node)
        for pair in dict.fromkeys(mark.pair for mark, _ in found):
            for half in "AB":
                name = f"{pair}.{half}"
                self.graph.erase_node(self.inputs.pop(name))
                del self.state[name]
        specs = self.signature.input_specs
        specs[:] = [spec for spec in specs if spec.target is None or spec.target in self.inputs]


def _fake_mode(nodes: list[fx.Node]) -> Any:
    """Which the values of a program's tensors belong to."""
    for node in nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            return value.fake_mode  # type: ignore[attr-defined]
    raise UnsupportedModelError("This program has no input that is a tensor.")
