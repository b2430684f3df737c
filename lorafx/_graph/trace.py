"""The tracer: a module's forward becomes a graph only if it is straight-line tensor code, so that nothing was decided.

Ordinary symbolic tracing runs Python once and keeps what it saw: a branch taken, a length, a flag. This tracer
accepts a forward only when Python had nothing to decide. Three rules make that so:

1. A Python function called on the way must consist of the instructions in `STRAIGHT`, which can neither jump, nor
   catch, nor compare identities, nor store anywhere but in local variables (`Watch`, a profile function, sees every
   call as it happens).
2. Any other callee, Python or C, must hand its arguments to a symbolic value, and thereby become a node, before it
   does anything else. `isinstance`, `len`, `torch.arange(4)`, `torch.is_grad_enabled()` do not.
3. All that forward can read is symbolic: its inputs and the attributes of modules (`_Self`). A global may only be
   called, or be a dtype or the like, and closures are refused; a symbolic value refuses truth, hash, text, length and
   iteration.
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
from torch.utils._python_dispatch import TorchDispatchMode

from .region_graph import RegionGraph
from .watch import HIDDEN, PRIMITIVES, Unsound, Watch, instruction, loads_method, stored_names


Tracing = Callable[[nn.Module], RegionGraph]


@contextlib.contextmanager
def tracing() -> Iterator[Tracing]:
    """The tracer, in a thread of its own: the caller's function modes, default device and profiler are not in there.

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
    """The graph of one module's own forward, every child a leaf; raises `Unsound` with the reason in words."""
    parameters = _parameters(module)
    graph = RegionGraph()
    tracer = _Tracer(graph)
    arguments = [_placeholder(tracer, parameter) for parameter in parameters]
    try:
        with _NoTensors(), Watch((fx.Proxy, _Self), (__file__, fx.proxy.__file__)):
            result = type(module).forward(_Self(module, "", tracer), *arguments)
        graph.output(tracer.create_arg(result))
    except Exception as error:
        raise Unsound(f"tracing raised {type(error).__name__}: {str(error).partition(chr(10))[0]}") from None
    _check_names(graph, {parameter.name for parameter in parameters})
    return graph


def _parameters(module: nn.Module) -> list[inspect.Parameter]:
    """What the module's own forward takes after self."""
    forward = inspect.getattr_static(type(module), "forward", None)
    if not isinstance(forward, types.FunctionType):
        raise Unsound("its forward is not a plain method")
    if "forward" in vars(module):
        raise Unsound("this instance has a forward of its own")
    if "__signature__" in vars(forward):
        raise Unsound("its forward declares another signature than it has")
    parameters = list(inspect.signature(forward, follow_wrapped=False).parameters.values())
    for parameter in parameters:
        if parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            name = parameter.replace(annotation=parameter.empty, default=parameter.empty)
            raise Unsound(f"its forward takes {name}, {parameter.kind.description}")
    if not parameters:
        raise Unsound("its forward takes no self")
    return parameters[1:]


def _placeholder(tracer: "_Tracer", parameter: inspect.Parameter) -> "Value":
    if parameter.default is parameter.empty:
        return tracer.create_proxy("placeholder", parameter.name, (), {})
    if type(parameter.default) not in PRIMITIVES:
        raise Unsound(f"the default of '{parameter.name}' is a {type(parameter.default).__name__}")
    return tracer.create_proxy("placeholder", parameter.name, (parameter.default,), {})


# What generated code calls by these names: the globals that fx always defines, and the builtins that it writes.
_GENERATED = frozenset({*RegionGraph().python_code("self").globals, "self", "slice", "getattr"})


def _check_names(graph: fx.Graph, taken: set[str]) -> None:
    """Raise if the generated code would give one name two meanings: an argument's, and a node's or a global's."""
    names = {node.name for node in graph.nodes if node.op != "placeholder" or node.name != node.target}
    clash = taken & (names | _GENERATED)
    if clash:
        raise Unsound(f"its argument '{min(clash)}' has a name that its graph needs")


class _NoTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses to compute with real tensors, before it is done: it would make constants, and could move the RNG."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise Unsound(f"it calls `{func.__name__.partition('.')[0]}`, which does not become a node")


_TENSOR_METHODS = frozenset(dir(torch.Tensor))


class Value(fx.Proxy):
    """A symbolic value that becomes nodes in the order in which Python would compute, and never answers Python."""

    def _refuse(self, *_: Any) -> NoReturn:
        raise Unsound("Python asks for the value of a tensor or an attribute (truth, text, length or hash)")

    __bool__ = __hash__ = __str__ = __repr__ = __len__ = __index__ = __format__ = _refuse

    def _refuse_in_place(self, *_: Any) -> NoReturn:
        raise Unsound("it assigns in place with an operator such as `+=`")

    __iadd__ = __isub__ = __imul__ = __itruediv__ = __ifloordiv__ = __imod__ = __ipow__ = _refuse_in_place
    __iand__ = __ior__ = __ixor__ = __ilshift__ = __irshift__ = __imatmul__ = _refuse_in_place

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
        items: Any = self.tracer.create_proxy("call_function", unpack, (self, count), {})
        names = stored_names(sys._getframe(1), count)
        return iter([self.tracer.create_proxy("call_function", operator.getitem, (items, i), {}, name)
                     for i, name in zip(range(count), names)])


def unpack(value: Any, count: int) -> tuple[Any, ...]:
    """The node for `a, b = value`: the same items, and the same error when there are not `count` of them."""
    items = tuple(itertools.islice(value, count + 1))
    if len(items) != count:
        raise ValueError(f"{'too many' if len(items) > count else 'not enough'} values to unpack (expected {count})")
    return items


class _Tracer(fx.proxy.GraphAppendingTracer):
    """Makes `Value`s, and takes as arguments only what generated code builds again exactly as it was."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__(graph)
        self.containers: list[Any] = []  # the lists and dicts used so far, kept so that no identity comes again

    def proxy(self, node: fx.Node) -> Value:
        return Value(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **named: Any) -> Value:
        used = len(self.containers)
        value: Value = super().create_proxy(kind, target, args, kwargs, *more, **named)  # type: ignore[assignment]
        given = len(self.containers) - used - 1  # one is the dict of keyword arguments itself
        if given and (kind == "call_module" or target == "__call__"):
            raise Unsound("it hands a list or dict to a callee that could change it")
        return value

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if type(a) is tuple:
            return tuple(self.create_arg(item) for item in a)
        if type(a) is slice:
            return slice(*map(self.create_arg, (a.start, a.stop, a.step)))
        if type(a) in (list, dict):
            if any(a is used for used in self.containers):
                raise Unsound(f"it uses one {type(a).__name__} twice, of which its graph would make two")
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


class _Self:
    """Stands for a module in its own forward, or for one of its children: reads become nodes, calls `call_module`."""

    def __init__(self, module: nn.Module, path: str, tracer: _Tracer) -> None:
        object.__setattr__(self, "_self", (module, path, tracer))

    def __getattribute__(self, name: str) -> Any:
        """Looks where Python looks: data descriptors, the instance, the class, then nn.Module.__getattr__'s tables."""
        module, path, tracer = object.__getattribute__(self, "_self")
        cls: Any = type(module)
        if name == "__class__":  # zero-argument super() asks for it
            return cls
        if name in HIDDEN or name.startswith("__"):
            raise Unsound(f"it reads '{name}', which is reserved")
        if cls.__getattribute__ is not object.__getattribute__ or cls.__getattr__ is not nn.Module.__getattr__:
            raise Unsound(f"{cls.__name__} computes its attributes")
        declared = inspect.getattr_static(cls, name, _MISSING)
        target = f"{path}.{name}" if path else name
        if isinstance(declared, property):
            return tracer.create_proxy("get_attr", target, (), {})  # computed by Python, again at each call
        if inspect.isdatadescriptor(declared):
            raise Unsound(f"it reads '{name}', which is computed by Python")
        if name not in vars(module) and isinstance(declared, types.FunctionType) and not path:
            return types.MethodType(declared, self)
        if name not in vars(module) and declared is not _MISSING and type(declared) not in PRIMITIVES:
            raise Unsound(f"it uses '{name}' of its class or of a child's class")
        if name not in vars(module) and declared is _MISSING:
            if module._modules.get(name) is not None:
                return _Self(module._modules[name], target, tracer)
            if name not in module._parameters and name not in module._buffers:
                raise Unsound(f"it reads '{name}', which is not there")
        return tracer.create_proxy("get_attr", target, (), {})

    def __call__(self, *args: Any, **kwargs: Any) -> Value:
        _, path, tracer = object.__getattribute__(self, "_self")
        if not path:
            raise Unsound("it calls itself")
        called: Value = tracer.create_proxy("call_module", path, args, kwargs)
        return called

    def _refuse(self, *_: Any) -> NoReturn:
        raise Unsound("it compares or asks something of a module")

    __eq__ = __ne__ = __hash__ = __bool__ = __str__ = __repr__ = _refuse


_MISSING = object()
