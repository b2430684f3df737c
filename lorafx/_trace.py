"""The tracer: a module's forward becomes a graph only if it is straight-line tensor code, so that nothing was decided.

Ordinary symbolic tracing runs Python once and keeps what it saw: a branch taken, a length, a flag. This tracer
accepts a forward only when Python had nothing to decide. Three rules make that so:

1. A Python function called on the way must consist of the instructions in `STRAIGHT`, which can neither jump, nor
   catch, nor compare identities, nor store anywhere but in local variables (`_Watch`, a profile function, sees every
   call as it happens).
2. Any other callee, Python or C, must hand its arguments to a symbolic value, and thereby become a node, before it
   does anything else. `isinstance`, `len`, `torch.arange(4)`, `torch.is_grad_enabled()` do not.
3. All that forward can read is symbolic: its inputs and the attributes of modules (`_Self`). Globals and closures may
   hold only functions, classes and Python modules; a symbolic value refuses truth, hash, text, length and iteration.
"""

import builtins
import dataclasses
import dis
import functools
import inspect
import operator
import sys
import types
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import fx, nn
from torch.overrides import handle_torch_function

# The instructions of straight-line code, over the bytecodes of Python 3.11 and later.
STRAIGHT = frozenset("""
    RESUME NOP CACHE EXTENDED_ARG PUSH_NULL PRECALL KW_NAMES COPY_FREE_VARS POP_TOP COPY SWAP NOT_TAKEN
    LOAD_CONST LOAD_SMALL_INT LOAD_FAST LOAD_FAST_CHECK LOAD_FAST_BORROW LOAD_FAST_LOAD_FAST STORE_FAST
    LOAD_FAST_BORROW_LOAD_FAST_BORROW STORE_FAST_STORE_FAST STORE_FAST_LOAD_FAST DELETE_FAST
    LOAD_GLOBAL LOAD_DEREF LOAD_CLASSDEREF LOAD_ATTR LOAD_METHOD LOAD_SUPER_ATTR
    CALL CALL_KW CALL_FUNCTION_EX BINARY_OP BINARY_SUBSCR BINARY_SLICE COMPARE_OP UNARY_NEGATIVE UNARY_INVERT
    BUILD_TUPLE BUILD_LIST BUILD_MAP BUILD_CONST_KEY_MAP BUILD_SLICE LIST_EXTEND LIST_TO_TUPLE
    CALL_INTRINSIC_1 DICT_MERGE UNPACK_SEQUENCE RETURN_VALUE RETURN_CONST
""".split())
PRIMITIVES = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
# Types that straight-line code may call: they build a value from values and consult nothing.
BUILDERS = (super, slice, tuple, list, dict)
# What a global name may stand for: something to call, or a namespace to find it in.
CALLABLES = (types.FunctionType, types.BuiltinFunctionType, types.ModuleType)
# Attributes of the symbolic value itself, which would hide those of the value it stands for.
HIDDEN = frozenset({"node", "tracer"})


class RegionGraph(fx.Graph):
    """A graph whose `get_attr` nodes may read any attribute of a module (None, a number), not only tensors."""

    def lint(self) -> None:
        owner, self.owning_module = self.owning_module, None
        try:
            super().lint()
            for node in self.nodes if owner is not None else ():
                if node.op in ("get_attr", "call_module"):
                    operator.attrgetter(node.target)(owner)
        finally:
            self.owning_module = owner

    def __deepcopy__(self, memo: dict[Any, Any] | None = None) -> "RegionGraph":
        graph = RegionGraph(tracer_cls=self._tracer_cls)
        graph.output(graph.graph_copy(self, {} if memo is None else memo))
        return graph

    def __reduce__(self) -> tuple[Any, ...]:
        """A flat list of nodes that name their arguments: pickling the linked nodes themselves would recurse."""
        nodes = [(n.op, n.target, fx.node.map_arg((n.args, n.kwargs), lambda a: NodeName(a.name)), n.name)
                 for n in self.nodes]
        return RegionGraph._from_nodes, (nodes,)

    @staticmethod
    def _from_nodes(nodes: list[tuple[str, Any, Any, str]]) -> "RegionGraph":
        graph, made = RegionGraph(tracer_cls=_Tracer), {}
        for op, target, arguments, name in nodes:
            args, kwargs = fx.node.map_aggregate(
                arguments, lambda a: made[a.name] if isinstance(a, NodeName) else a)
            made[name] = graph.create_node(op, target, args, kwargs, name)
        return graph


@dataclasses.dataclass(frozen=True)
class NodeName:
    """A node's place among the arguments of another, in a pickle."""

    name: str


class Unsound(BaseException):
    """The forward decides something in Python. A BaseException, so that no user code catches it by accident."""


def trace(module: nn.Module) -> RegionGraph:
    """The graph of one module's own forward, every child a leaf; raises `Unsound` with the reason in words."""
    forward = inspect.getattr_static(type(module), "forward", None)
    if not isinstance(forward, types.FunctionType):
        raise Unsound("its forward is not a plain method")
    if "forward" in vars(module):
        raise Unsound("this instance has a forward of its own")
    tracer = _Tracer(RegionGraph(tracer_cls=_Tracer))
    arguments = [_placeholder(tracer, p) for p in list(inspect.signature(forward).parameters.values())[1:]]
    try:
        with _Watch():
            result = forward(_Self(module, "", tracer), *arguments)
        tracer.graph.output(_output(tracer, result))
    except Exception as error:
        raise Unsound(f"tracing raised {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    return tracer.graph


def _placeholder(tracer: "_Tracer", parameter: inspect.Parameter) -> "Value":
    if parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
        raise Unsound(f"its forward takes {parameter}, a variable or keyword-only argument")
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

    __bool__ = __hash__ = __str__ = __repr__ = __len__ = __index__ = __format__ = _refuse  # type: ignore[assignment]

    def _refuse_in_place(self, *_: Any) -> NoReturn:
        raise Unsound("it assigns in place with an operator such as `+=`")

    __iadd__ = __isub__ = __imul__ = __itruediv__ = __ifloordiv__ = __imod__ = __ipow__ = _refuse_in_place
    __iand__ = __ior__ = __ixor__ = __ilshift__ = __irshift__ = __imatmul__ = _refuse_in_place

    def __getattr__(self, name: str) -> fx.Proxy:  # type: ignore[override]
        if name.startswith("__"):
            raise AttributeError(name)
        if _loads_method(sys._getframe(1)):
            return fx.proxy.Attribute(self, name)  # called at once, as one `call_method` node
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __iter__(self) -> Iterator[Any]:
        instruction, count = _instruction(sys._getframe(1))
        if instruction != "UNPACK_SEQUENCE":
            raise Unsound("it iterates over a tensor or an attribute")
        items = self.tracer.create_proxy("call_function", unpack, (self, count), {})
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
        return tracer.create_proxy("call_module", path, args, kwargs)


class _Watch:
    """A profile function that checks each call made by traced code; the previous one is back on exit.

    `user` holds the frames whose code was checked and which are ours to follow. `asked` holds the calls that have yet
    to reach a symbolic value: {calling or called frame: why it could not be followed}; an entry goes when they do.
    """

    def __enter__(self) -> None:
        self.user: set[types.FrameType] = set()
        self.asked: dict[types.FrameType, str] = {}
        self.root = sys._getframe(1)
        self.previous = sys.getprofile()
        sys.setprofile(self._event)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self.previous)
        self.user.clear()
        self.asked.clear()

    def _event(self, frame: types.FrameType, event: str, arg: Any) -> None:
        if event == "call":
            self._called(frame)
        elif event in ("c_call", "c_return") and arg in _ASKS:
            return
        elif event == "c_call" and (frame in self.user or frame in self.asked):
            self._expect(frame, f"it calls `{arg.__name__}`, which does not become a node")
        elif event in ("return", "c_return") and frame in self.asked:
            raise Unsound(self.asked[frame])
        elif event == "return":
            self.user.discard(frame)

    def _called(self, frame: types.FrameType) -> None:
        parent, code = frame.f_back, frame.f_code
        if code in _DISPATCH:
            self.asked.pop(parent, None)
        elif parent in self.asked:
            raise Unsound(self.asked[parent])
        elif parent is self.root and code.co_filename != __file__ or parent in self.user:
            if code.co_filename in _MACHINERY:
                return
            reason = _decides(code) or _reads_globals(code, frame.f_globals) or _holds(frame)
            if reason is None:
                self.user.add(frame)
            elif parent is self.root:
                raise Unsound(reason)
            else:
                self._expect(frame, f"it calls `{code.co_qualname}`: {reason}")

    def _expect(self, frame: types.FrameType, reason: str) -> None:
        if frame in self.asked:
            raise Unsound(self.asked[frame])
        self.asked[frame] = reason


# The Python functions through which a call reaches a symbolic value, and the C functions that only ask whether it must.
_DISPATCH = frozenset({handle_torch_function.__code__, fx.Proxy.__torch_function__.__func__.__code__})
_ASKS = frozenset({torch.overrides.has_torch_function, torch.overrides.has_torch_function_unary,
                   torch.overrides.has_torch_function_variadic})
_MACHINERY = frozenset({__file__, fx.proxy.__file__})
_DECISIONS = {"JUMP": "branches or loops", "FOR_ITER": "loops", "SEND": "awaits", "IS_OP": "compares identities",
              "CONTAINS_OP": "tests membership", "STORE_ATTR": "stores an attribute", "STORE_SUBSCR": "stores an item",
              "STORE_GLOBAL": "stores a global", "IMPORT": "imports", "FORMAT": "formats text",
              "RAISE": "raises", "YIELD": "yields", "DELETE": "deletes", "MAKE_FUNCTION": "defines a function"}


@functools.lru_cache(maxsize=4096)
def _decides(code: types.CodeType) -> str | None:
    """Why this code is not straight-line, in words, or None if it is."""
    if code.co_exceptiontable:
        return f"{code.co_name} has a `try` or `with` block"
    for instruction in dis.get_instructions(code):
        name = instruction.opname
        if name not in STRAIGHT:
            what = next((words for part, words in _DECISIONS.items() if part in name), f"uses {name}")
            line = instruction.positions.lineno if instruction.positions else None
            return f"{code.co_name} {what} (line {line})"
        if name in ("LOAD_ATTR", "LOAD_METHOD") and (instruction.argval in HIDDEN or instruction.argval[:2] == "__"):
            return f"{code.co_name} reads `{instruction.argval}`"
    return None


def _reads_globals(code: types.CodeType, names: dict[str, Any]) -> str | None:
    """Why a global that this code reads is not constant, or None: functions and tensor types are, values are not."""
    instructions = list(dis.get_instructions(code))
    for i, instruction in enumerate(instructions):
        if instruction.opname != "LOAD_GLOBAL":
            continue
        path = instruction.argval
        value = names.get(path, vars(builtins).get(path))
        for follower in instructions[i + 1:]:
            if follower.opname not in ("LOAD_ATTR", "LOAD_METHOD") or not isinstance(value, (types.ModuleType, type)):
                break
            path, value = f"{path}.{follower.argval}", getattr(value, follower.argval, None)
        if value not in BUILDERS and not isinstance(value, (*CALLABLES, torch.dtype, torch.layout)):
            return f"{code.co_name} reads the global `{path}`"
    return None


def _holds(frame: types.FrameType) -> str | None:
    """Why an argument, default or closure of this call is not symbolic or constant, or None if all are."""
    for name, value in frame.f_locals.items():
        if name != "__class__" and not _constant(value):
            return f"{frame.f_code.co_name} is given `{name}`, a {type(value).__name__}"
    return None


def _constant(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(_constant, value))
    return isinstance(value, (fx.Proxy, _Self, *PRIMITIVES, *CALLABLES, types.MethodType))


def _instruction(frame: types.FrameType) -> tuple[str, int]:
    """The instruction that this frame is executing, and its argument."""
    code, at = frame.f_code.co_code, frame.f_lasti
    return dis.opname[code[at]], code[at + 1]


def _loads_method(frame: types.FrameType) -> bool:
    """Whether the attribute that this frame is reading is called right away, as in `x.view(...)`."""
    name, argument = _instruction(frame)
    return name == "LOAD_METHOD" or (name == "LOAD_ATTR" and sys.version_info >= (3, 12) and bool(argument & 1))
