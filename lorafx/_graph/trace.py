"""The tracer: a module's forward becomes a graph only if it is straight-line tensor code.

Ordinary symbolic tracing runs Python once and keeps what it saw: a branch taken, a length, a flag.
This tracer accepts a forward only when Python had nothing to decide. Three rules make that so:

1. A Python function called on the way must consist of the instructions in `STRAIGHT`, which can
   neither jump, nor catch, nor compare identities, nor store anywhere but in local variables
   (`Watch`, a profile function, sees every call as it happens).
2. Any other callee, Python or C, must hand its arguments to a symbolic value, and thereby become a
   node, before it does anything else. `isinstance`, `len`, `torch.arange(4)`,
   `torch.is_grad_enabled()` do not.
3. All that forward can read is symbolic: its inputs and the attributes of modules
   (`_SymbolicModule`). A global may only be called, or be a dtype or the like, and closures are
   refused; a symbolic value refuses truth, hash, text, length and iteration.
"""

import concurrent.futures
import contextlib
import gc
import inspect
import itertools
import operator
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import fx, nn

from .._kernels.private import TorchDispatchMode
from .dispatched import is_patched
from .region_graph import RegionGraph
from .watch import HIDDEN, PRIMITIVES, Unsound, Watch, instruction, loads_method, stored_names


Tracing = Callable[[nn.Module], RegionGraph]


@contextlib.contextmanager
def tracing() -> Iterator[Tracing]:
    """The tracer, in a thread of its own, without the caller's modes, default device and profiler.

    Nor is the garbage collector, whose callbacks would look like calls of the traced code.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            yield lambda module: thread.submit(trace, module).result()
    finally:
        if collecting:
            gc.enable()


def trace(module: nn.Module) -> RegionGraph:
    """The graph of a module's own forward, every child a leaf; raises `Unsound` with the reason."""
    parameters = _parameters(module)
    graph = RegionGraph()
    tracer = _Tracer(graph)
    arguments = [_placeholder(tracer, parameter) for parameter in parameters]
    try:
        with _NoTensors(), Watch((fx.Proxy, _SymbolicModule), (__file__, fx.proxy.__file__)):
            result = type(module).forward(_SymbolicModule(module, "", tracer), *arguments)
        if isinstance(result, types.CoroutineType):
            result.close()  # else Python warns that nobody awaits it
        graph.output(tracer.create_arg(result))
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        raise Unsound(f"tracing raised {type(error).__name__}: {first_line}") from None
    _check_names(graph, {parameter.name for parameter in parameters})
    return graph


def _parameters(module: nn.Module) -> list[inspect.Parameter]:
    """What the module's own forward takes after self."""
    forward = inspect.getattr_static(type(module), "forward", None)
    if not isinstance(forward, types.FunctionType):
        raise Unsound("its forward is not a plain method")
    if is_patched(module):
        raise Unsound("this instance has a forward of its own")
    if "__signature__" in vars(forward):
        raise Unsound("its forward declares another signature than it has")
    parameters = list(inspect.signature(forward, follow_wrapped=False).parameters.values())
    for parameter in parameters:
        if parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            bare = parameter.replace(annotation=parameter.empty, default=parameter.empty)
            raise Unsound(f"its forward takes {bare}, {parameter.kind.description}")
    if not parameters:
        raise Unsound("its forward takes no self")
    return parameters[1:]


def _placeholder(tracer: "_Tracer", parameter: inspect.Parameter) -> "Value":
    if parameter.default is parameter.empty:
        return tracer.create_proxy("placeholder", parameter.name, (), {})
    if type(parameter.default) not in PRIMITIVES:
        raise Unsound(f"the default of '{parameter.name}' is a {type(parameter.default).__name__}")
    return tracer.create_proxy("placeholder", parameter.name, (parameter.default,), {})


# Names that generated code uses: of the globals that fx always defines, and of builtins.
_GENERATED = frozenset({*RegionGraph().python_code("self").globals, "self", "slice", "getattr"})


def _check_names(graph: fx.Graph, taken: set[str]) -> None:
    """Raise if generated code would give an argument and a node or global the same name."""
    names = set(_GENERATED)
    for node in graph.nodes:
        if node.op != "placeholder" or node.name != node.target:
            names.add(node.name)
    clash = taken & names
    if clash:
        raise Unsound(f"its argument '{min(clash)}' has a name that its graph needs")


class _NoTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses to compute with real tensors: that makes constants, and may draw random numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        raise Unsound(f"it calls `{func.__name__.partition('.')[0]}`, which does not become a node")


_TENSOR_METHODS = frozenset(dir(torch.Tensor))


class Value(fx.Proxy):
    """A symbolic value: what Python computes with it becomes nodes, and what it asks is refused."""

    def _refuse(self, *_: Any) -> NoReturn:
        raise Unsound("Python asks for the value of a tensor or an attribute "
                      "(truth, text, length or hash)")

    __bool__ = __hash__ = __str__ = __repr__ = __len__ = __index__ = __format__ = _refuse

    def _refuse_in_place(self, *_: Any) -> NoReturn:
        raise Unsound("it assigns in place with an operator such as `+=`")

    __iadd__ = __isub__ = __imul__ = __itruediv__ = __ifloordiv__ = __imod__ = _refuse_in_place
    __ipow__ = __iand__ = __ior__ = __ixor__ = __ilshift__ = __irshift__ = _refuse_in_place
    __imatmul__ = _refuse_in_place

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in _TENSOR_METHODS and loads_method(*instruction(sys._getframe(1))):
            return fx.proxy.Attribute(self, name)  # called at once, as one `call_method` node
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __iter__(self) -> Iterator[Any]:
        name, count = instruction(sys._getframe(1))
        if name != "UNPACK_SEQUENCE":
            raise Unsound("it iterates over a tensor or an attribute")
        create = self.tracer.create_proxy
        items: Any = create("call_function", unpack, (self, count), {})
        parts: list[Any] = []
        for number, variable in enumerate(stored_names(sys._getframe(1), count)):
            arguments = items, number
            parts.append(create("call_function", operator.getitem, arguments, {}, variable))
        return iter(parts)


def unpack(value: Any, count: int) -> tuple[Any, ...]:
    """The node for `a, b = value`: the same items, and the same error if there are not `count`."""
    items = tuple(itertools.islice(value, count + 1))
    if len(items) != count:
        which = "too many" if len(items) > count else "not enough"
        raise ValueError(f"{which} values to unpack (expected {count})")
    return items


class _Tracer(fx.proxy.GraphAppendingTracer):
    """Makes `Value`s, and takes as arguments only what generated code builds again exactly."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__(graph)
        # The lists and dicts used so far, referenced so that no new one has an old one's identity.
        self.containers: list[Any] = []

    def proxy(self, node: fx.Node) -> Value:
        return Value(node, self)

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **named: Any
    ) -> Value:
        used = len(self.containers)
        value: Any = super().create_proxy(kind, target, args, kwargs, *more, **named)
        given = len(self.containers) - used - 1  # one is the dict of keyword arguments itself
        if given and (kind == "call_module" or target == "__call__"):
            raise Unsound("it hands a list or dict to a callee that could change it")
        return value  # type: ignore[no-any-return]

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if type(a) is tuple:
            return tuple(self.create_arg(item) for item in a)
        if type(a) is slice:
            return slice(*map(self.create_arg, (a.start, a.stop, a.step)))
        if type(a) in (list, dict):
            if any(a is used for used in self.containers):
                raise Unsound(f"it uses one {type(a).__name__} twice, of which its graph would "
                              "make two")
            self.containers.append(a)
            if type(a) is list:
                return [self.create_arg(item) for item in a]
            return {_checked_key(key): self.create_arg(item) for key, item in a.items()}
        if type(a) in (*PRIMITIVES, complex, type(...)):
            return a
        raise Unsound(f"it passes on or returns a {type(a).__name__}")


def _checked_key(key: Any) -> Any:
    if type(key) in PRIMITIVES:
        return key
    raise Unsound(f"a {type(key).__name__} is a key of a dict that it makes")


class _SymbolicModule:
    """A module in its own forward, or one of its children: reads and calls become nodes."""

    def __init__(self, module: nn.Module, path: str, tracer: _Tracer) -> None:
        object.__setattr__(self, "_symbolic", (module, path, tracer))

    def __getattribute__(self, name: str) -> Any:
        """Look where Python does: data descriptors, the instance, the class, nn.Module's tables."""
        module, path, tracer = object.__getattribute__(self, "_symbolic")
        cls: Any = type(module)
        if name == "__class__":  # zero-argument super() asks for it
            return cls
        if name in HIDDEN or name.startswith("__"):
            raise Unsound(f"it reads '{name}', which is reserved")
        standard = (object.__getattribute__, nn.Module.__getattr__)
        if (cls.__getattribute__, cls.__getattr__) != standard:
            raise Unsound(f"{cls.__name__} computes its attributes")
        declared = inspect.getattr_static(cls, name, _MISSING)
        target = f"{path}.{name}" if path else name
        if isinstance(declared, property):
            return tracer.create_proxy("get_attr", target, (), {})  # computed anew at each call
        if inspect.isdatadescriptor(declared):
            raise Unsound(f"it reads '{name}', which is computed by Python")
        if name in vars(module):
            return tracer.create_proxy("get_attr", target, (), {})
        if isinstance(declared, types.FunctionType) and not path:
            return types.MethodType(declared, self)
        if declared is not _MISSING and type(declared) not in PRIMITIVES:
            raise Unsound(f"it uses '{name}' of its class or of a child's class")
        if declared is _MISSING:
            if module._modules.get(name) is not None:
                return _SymbolicModule(module._modules[name], target, tracer)
            if name not in module._parameters and name not in module._buffers:
                raise Unsound(f"it reads '{name}', which is not there")
        return tracer.create_proxy("get_attr", target, (), {})

    def __call__(self, *args: Any, **kwargs: Any) -> Value:
        _, path, tracer = object.__getattribute__(self, "_symbolic")
        if not path:
            raise Unsound("it calls itself")
        called: Value = tracer.create_proxy("call_module", path, args, kwargs)
        return called

    def _refuse(self, *_: Any) -> NoReturn:
        raise Unsound("it compares or asks something of a module")

    __eq__ = __ne__ = __hash__ = __bool__ = __str__ = __repr__ = _refuse


_MISSING = object()
