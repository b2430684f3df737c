"""The tracer: a module's forward becomes a graph only if it is straight-line tensor code, so that nothing was decided.

Ordinary symbolic tracing runs Python once and keeps what it saw: a branch taken, a length, a flag. This tracer
accepts a forward only when Python had nothing to decide. Three rules make that so:

1. A Python function called on the way must consist of the instructions in `STRAIGHT`, which can neither jump, nor
   catch, nor compare identities, nor store anywhere but in local variables (`Watch`, a profile function, sees every
   call as it happens).
2. Any other callee, Python or C, must hand its arguments to a symbolic value, and thereby become a node, before it
   does anything else. `isinstance`, `len`, `torch.arange(4)`, `torch.is_grad_enabled()` do not.
3. All that forward can read is symbolic: its inputs and the attributes of modules (`_Self`). Globals and closures may
   hold only functions, classes and Python modules; a symbolic value refuses truth, hash, text, length and iteration.
"""

import inspect
import sys
import types
from collections.abc import Iterator
from typing import Any, NoReturn

from torch import fx, nn

from ._graph import RegionGraph
from ._watch import HIDDEN, PRIMITIVES, Unsound, Watch, instruction, loads_method


def trace(module: nn.Module) -> RegionGraph:
    """The graph of one module's own forward, every child a leaf; raises `Unsound` with the reason in words."""
    forward = inspect.getattr_static(type(module), "forward", None)
    if not isinstance(forward, types.FunctionType):
        raise Unsound("its forward is not a plain method")
    if "forward" in vars(module):
        raise Unsound("this instance has a forward of its own")
    if "__signature__" in vars(forward):
        raise Unsound("its forward declares another signature than it has")
    _, *parameters = inspect.signature(forward, follow_wrapped=False).parameters.values()
    graph = RegionGraph()
    tracer = _Tracer(graph)
    arguments = [_placeholder(tracer, parameter) for parameter in parameters]
    try:
        with Watch((fx.Proxy, _Self), (__file__, fx.proxy.__file__)):
            result = forward(_Self(module, "", tracer), *arguments)
        graph.output(_output(tracer, result))
    except Exception as error:
        raise Unsound(f"tracing raised {type(error).__name__}: {str(error).partition(chr(10))[0]}") from None
    return graph


def _placeholder(tracer: "_Tracer", parameter: inspect.Parameter) -> "Value":
    if parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
        name = parameter.replace(annotation=parameter.empty, default=parameter.empty)
        raise Unsound(f"its forward takes {name}, {parameter.kind.description}")
    if parameter.default is parameter.empty:
        return tracer.create_proxy("placeholder", parameter.name, (), {})
    if not isinstance(parameter.default, PRIMITIVES):
        raise Unsound(f"the default of '{parameter.name}' is a {type(parameter.default).__name__}")
    return tracer.create_proxy("placeholder", parameter.name, (parameter.default,), {})


def _output(tracer: "_Tracer", result: Any) -> Any:
    """The returned value as a graph argument; a container's exact type must be one that a graph can rebuild."""
    if type(result) in (tuple, list):
        return type(result)(_output(tracer, item) for item in result)
    if type(result) is dict:
        return {key: _output(tracer, item) for key, item in result.items()}
    if isinstance(result, (Value, *PRIMITIVES)):
        return tracer.create_arg(result)
    raise Unsound(f"it returns a {type(result).__name__}")


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
        if loads_method(sys._getframe(1)):
            return fx.proxy.Attribute(self, name)  # called at once, as one `call_method` node
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __iter__(self) -> Iterator[Any]:
        name, count = instruction(sys._getframe(1))
        if name != "UNPACK_SEQUENCE":
            raise Unsound("it iterates over a tensor or an attribute")
        items: Any = self.tracer.create_proxy("call_function", unpack, (self, count), {})
        return iter([items[i] for i in range(count)])


def unpack(value: Any, count: int) -> tuple[Any, ...]:
    """The node for `a, b = value`: the same items, and the same error when there are not `count` of them."""
    items = tuple(value)
    if len(items) != count:
        raise ValueError(f"{'too many' if len(items) > count else 'not enough'} values to unpack (expected {count})")
    return items


class _Tracer(fx.proxy.GraphAppendingTracer):
    """Makes `Value`s."""

    def proxy(self, node: fx.Node) -> Value:
        return Value(node, self)

    def create_proxy(self, *args: Any, **kwargs: Any) -> Value:
        value: Value = super().create_proxy(*args, **kwargs)  # type: ignore[assignment]
        return value


class _Self:
    """Stands for a module in its own forward, or for one of its children: reads become nodes, calls `call_module`."""

    def __init__(self, module: nn.Module, path: str, tracer: _Tracer) -> None:
        object.__setattr__(self, "_self", (module, path, tracer))

    def __getattribute__(self, name: str) -> Any:
        module, path, tracer = object.__getattribute__(self, "_self")
        if name == "__class__":  # zero-argument super() asks for it
            return type(module)
        child = module._modules.get(name)
        target = f"{path}.{name}" if path else name
        if child is not None and name not in vars(module):
            return _Self(child, target, tracer)
        stored = any(name in held for held in (vars(module), module._parameters, module._buffers))
        declared = inspect.getattr_static(type(module), name, None)
        if not stored and isinstance(declared, types.FunctionType):
            return types.MethodType(declared, self)
        if not stored and not isinstance(declared, PRIMITIVES[:4]):
            raise Unsound(f"it reads '{name}', which is computed by Python or absent")
        if name in HIDDEN or name.startswith("__"):
            raise Unsound(f"it reads '{name}', which is reserved")
        return tracer.create_proxy("get_attr", target, (), {})

    def __call__(self, *args: Any, **kwargs: Any) -> Value:
        _, path, tracer = object.__getattribute__(self, "_self")
        if not path:
            raise Unsound("it calls itself")
        called: Value = tracer.create_proxy("call_module", path, args, kwargs)
        return called
