"""Straight-line code: what it may consist of, and a profile function that checks it in tracing."""

import builtins
import dis
import functools
import sys
import types
from typing import Any

import torch
from torch import fx
from torch.overrides import handle_torch_function


# The instructions of straight-line code, over the bytecodes of Python 3.11 and later.
STRAIGHT = frozenset("""
    RESUME NOP CACHE EXTENDED_ARG PUSH_NULL PRECALL KW_NAMES COPY_FREE_VARS POP_TOP COPY SWAP
    NOT_TAKEN LOAD_CONST LOAD_SMALL_INT LOAD_FAST LOAD_FAST_CHECK LOAD_FAST_BORROW
    LOAD_FAST_LOAD_FAST LOAD_FAST_BORROW_LOAD_FAST_BORROW
    STORE_FAST STORE_FAST_STORE_FAST STORE_FAST_LOAD_FAST DELETE_FAST
    LOAD_GLOBAL LOAD_DEREF LOAD_ATTR LOAD_METHOD LOAD_SUPER_ATTR
    CALL CALL_KW CALL_FUNCTION_EX BINARY_OP BINARY_SUBSCR BINARY_SLICE COMPARE_OP
    UNARY_NEGATIVE UNARY_INVERT
    BUILD_TUPLE BUILD_LIST BUILD_MAP BUILD_CONST_KEY_MAP BUILD_SLICE
    LIST_APPEND LIST_EXTEND LIST_TO_TUPLE
    CALL_INTRINSIC_1 DICT_MERGE UNPACK_SEQUENCE RETURN_VALUE RETURN_CONST
""".split())
PRIMITIVES = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout,
              torch.memory_format)

# Types that straight-line code may call: they build a value from values and consult nothing.
BUILDERS = (super, slice, tuple, list, dict)

# What a global may be called as, and what it may be used as: functions have attributes, so they may
# only be called.
_CALLED = (types.FunctionType, types.BuiltinFunctionType)
_CONSTANT = (torch.dtype, torch.layout, torch.memory_format)

# Attributes of the symbolic value itself, which would hide those of the value it stands for.
HIDDEN = frozenset({"node", "tracer"})


class Unsound(BaseException):
    """The forward decides something in Python.

    A BaseException, so that no user code catches it by accident.
    """


class Watch:
    """A profile function that checks each call made by traced code; on exit the old one is back.

    `followed` holds the frames whose code was checked. `pending` holds the calls that have yet to
    reach a symbolic value: {calling or called frame: why it could not be followed}; an entry goes
    when they do.
    """

    def __init__(self, symbolic: tuple[type, ...], machinery: tuple[str, ...]) -> None:
        self.symbolic = symbolic
        self.machinery = (*machinery, __file__)

    def __enter__(self) -> None:
        self.followed: set[types.FrameType] = set()
        self.pending: dict[types.FrameType, str] = {}
        self.root = sys._getframe(1)
        self.previous = sys.getprofile()
        sys.setprofile(self._event)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self.previous)
        self.followed.clear()
        self.pending.clear()

    def _event(self, frame: types.FrameType, event: str, arg: Any) -> None:
        if event == "call":
            self._called(frame)
        elif event in ("c_call", "c_return") and arg in _ASKS and frame not in self.followed:
            return
        elif event == "c_call" and (frame in self.followed or frame in self.pending):
            reason = f"it calls `{arg.__name__}`, which does not become a node"
            if str(getattr(arg, "__module__", None)).partition(".")[0] != "torch" or arg in _ASKS:
                raise Unsound(reason)  # before it runs: only torch's know symbolic values
            self._expect(frame, reason)
        elif event in ("return", "c_return") and frame in self.pending:
            raise Unsound(self.pending[frame])
        elif event == "return":
            self.followed.discard(frame)

    def _called(self, frame: types.FrameType) -> None:
        parent, code = frame.f_back, frame.f_code
        if parent is None:
            return
        if code in _DISPATCH:
            if code is handle_torch_function.__code__ and parent in self.pending:
                _check_handed_on(parent, frame)
            self.pending.pop(parent, None)
        elif parent in self.pending:
            raise Unsound(self.pending[parent])
        elif parent is self.root or parent in self.followed:
            if code.co_filename in self.machinery:
                return
            reason = _decides(code) or _reads_names(code, frame.f_globals) or self._argument(frame)
            if reason is None:
                self.followed.add(frame)
            elif parent is self.root:
                raise Unsound(reason)
            else:
                self._expect(frame, f"it calls `{code.co_qualname}`: {reason}")

    def _argument(self, frame: types.FrameType) -> str | None:
        """Why an argument, default or closure is neither symbolic nor constant, or None."""
        for name, value in frame.f_locals.items():
            if name != "__class__" and not self._is_constant(value):
                return f"{frame.f_code.co_name} is given `{name}`, a {type(value).__name__}"
        return None

    def _is_constant(self, value: Any) -> bool:
        if type(value) is tuple:
            return all(map(self._is_constant, value))
        return isinstance(value, self.symbolic) or type(value) in PRIMITIVES

    def _expect(self, frame: types.FrameType, reason: str) -> None:
        if frame in self.pending:
            raise Unsound(self.pending[frame])
        self.pending[frame] = reason


# How a call reaches a symbolic value: these Python functions do it, these C functions only ask
# whether it must.
_DISPATCH = frozenset({
    handle_torch_function.__code__, vars(fx.Proxy)["__torch_function__"].__func__.__code__})
_ASKS = frozenset({
    torch.overrides.has_torch_function, torch.overrides.has_torch_function_unary,
    torch.overrides.has_torch_function_variadic})

# What other instructions do, in words, by a part of their names; any other is named itself.
DECISIONS = {
    "JUMP": "branches or loops", "_ITER": "loops", "SEND": "awaits",
    "IS_OP": "compares identities", "CONTAINS_OP": "tests membership",
    "STORE_ATTR": "stores an attribute", "STORE_SUBSCR": "stores an item",
    "STORE_GLOBAL": "stores a global", "IMPORT": "imports", "FORMAT": "formats text",
    "RAISE": "raises", "YIELD": "yields", "DELETE": "deletes", "MAKE_": "defines a function",
    "SET": "builds a set", "UNPACK_EX": "unpacks with a star",
}


@functools.lru_cache(maxsize=4096)
def _decides(code: types.CodeType) -> str | None:
    """Why this code is not straight-line, in words, or None if it is."""
    if code.co_exceptiontable:
        return f"{code.co_name} has a `try` or `with` block"
    for step in dis.get_instructions(code):
        name = step.opname
        if name not in STRAIGHT:
            words = [words for part, words in DECISIONS.items() if part in name]
            what = words[0] if words else f"uses {name}"
            line = (step.positions and step.positions.lineno) or code.co_firstlineno
            return f"{code.co_name} {what} (line {line})"
        if name in ("LOAD_ATTR", "LOAD_METHOD"):
            if step.argval in HIDDEN or step.argval[:2] == "__":
                return f"{code.co_name} reads `{step.argval}`"
    return None


@functools.lru_cache(maxsize=4096)
def instructions(code: types.CodeType) -> list[dis.Instruction]:
    """The instructions of a code object, without those that only pad others."""
    return [step for step in dis.get_instructions(code) if step.opname not in _PADDING]


_PADDING = ("CACHE", "PRECALL", "EXTENDED_ARG")


def _reads_names(code: types.CodeType, names: dict[str, Any]) -> str | None:
    """Why a global or an attribute of super() that this code reads may change, or None.

    Functions that are called do not count.
    """
    steps = instructions(code)
    for i, step in enumerate(steps):
        if step.opname == "LOAD_DEREF" and steps[i + 2].opname != "LOAD_SUPER_ATTR":
            return f"{code.co_name} reads `{step.argval}` of an enclosing function"
        if step.opname == "LOAD_SUPER_ATTR" and not (step.arg or 0) & 1:
            return f"{code.co_name} reads `{step.argval}` of its base class"
        if step.opname != "LOAD_GLOBAL":
            continue
        path, called = step.argval, (step.arg or 0) & 1
        value = names.get(path, vars(builtins).get(path))
        if value is super and steps[i + 1].opname == "CALL":
            if steps[i + 2].opname != "LOAD_METHOD":
                return f"{code.co_name} reads an attribute of its base class"
        for follower in steps[i + 1:]:
            if follower.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
                break
            if not isinstance(value, (types.ModuleType, type)):
                return f"{code.co_name} reads the global `{path}.{follower.argval}`"
            path, value = f"{path}.{follower.argval}", getattr(value, follower.argval, None)
            called |= loads_method(follower.opname, follower.arg or 0)
        builds = called and any(value is builder for builder in BUILDERS)
        if not builds and not isinstance(value, _CALLED if called else _CONSTANT):
            return f"{code.co_name} reads the global `{path}`"
    return None


def _check_handed_on(asking: types.FrameType, dispatch: types.FrameType) -> None:
    """Raise unless a torch function hands all its arguments on: the node would lack the others."""
    code, passed = asking.f_code, dispatch.f_locals
    given = [id(value) for value in (*passed["args"], *passed["kwargs"].values())]
    for name in code.co_varnames[:code.co_argcount + code.co_kwonlyargcount]:
        value = asking.f_locals[name]
        if id(value) in given:
            given.remove(id(value))
        elif value is not None:
            raise Unsound(f"it calls `{code.co_qualname}`, which does not hand on its argument "
                          f"'{name}'")


def instruction(frame: types.FrameType) -> tuple[str, int]:
    """The instruction that this frame is executing, and its argument."""
    code, at = frame.f_code.co_code, frame.f_lasti
    return dis.opname[code[at]], code[at + 1]


def stored_names(frame: types.FrameType, count: int) -> list[str | None]:
    """The variables in which a frame that is unpacking `count` items stores them, or None."""
    after = [step for step in instructions(frame.f_code) if step.offset > frame.f_lasti][:count]
    return [step.argval if step.opname == "STORE_FAST" else None for step in after]


def loads_method(name: str, argument: int) -> bool:
    """True if this instruction reads an attribute to call it right away, as in `x.view(...)`."""
    if name == "LOAD_ATTR":
        return sys.version_info >= (3, 12) and bool(argument & 1)
    return name == "LOAD_METHOD"
