"""Every private name of torch that lorafx uses: why it does, and what happens where torch lacks it.

A name is looked up once, when lorafx is imported, so that lorafx can be imported whatever torch
has. In the place of what is missing stands something public, or the answer on which what is slower
and always right is done, or what says so when it is used. Not listed are the attributes of torch's
objects (`_parameters`, `_version`, `_is_view()`).
"""

import contextlib
import operator
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from types import NoneType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.jit import is_tracing as is_jit_tracing  # type: ignore[attr-defined]

AVAILABLE: dict[str, bool] = {}  # {private name: whether torch has it}


def _optional(name: str, instead: Any) -> Any:
    """What torch has under this name, `package.module:attribute`, or what stands in its place."""
    try:
        value = pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        value = None
    AVAILABLE[name] = value is not None
    return instead if value is None else value


def _lacking(name: str, needed_for: str) -> Callable[..., NoReturn]:
    """What stands in the place of a name without which something cannot be done."""

    def fail(*_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(
            f"This torch, {torch.__version__}, has no {name}, which lorafx needs for {needed_for}: "
            "use a torch that lorafx was tested with.")

    return fail


# What runs around an operator: transforms, tracers, checkpoints, autocast.

# A Function's backward pass cannot be mapped over or differentiated forward.
# Without them: every call is taken for one inside a transform, and plain operators compute it.
# Asked in this way, a compiler answers it, and puts no question into what it captures.
_functorch_transform: Callable[[], Any] = _optional(
    "torch._C:_functorch.peek_interpreter_stack", lambda: 0)
_forward_level: int | None = _optional("torch.autograd.forward_ad:_current_level", None)


def is_transforming() -> bool:
    """True if a functorch transform or forward-mode differentiation is under way."""
    if not isinstance(_functorch_transform(), NoneType) or _forward_level is None:
        return True
    return forward_ad._current_level >= 0


# The vectorised backward pass of torch.autograd.grad(is_grads_batched=True) takes no in-place
# operators. Without it: the gradients are always computed by operators that can be mapped over.
is_legacy_batched: Callable[[Tensor], bool] = _optional(
    "torch._C:_functorch.is_legacy_batchedtensor", lambda tensor: True)

# torch.jit.trace must see operators. Without it: torch.jit.is_tracing asks the same in more time.
_jit_state: Callable[[], Any] = _optional(
    "torch._C:_get_tracing_state",
    lambda: is_jit_tracing() or None)  # type: ignore[no-untyped-call]

# make_fx must see operators, and selective checkpointing keeps what they return, which therefore
# must not be written into; both are dispatch modes. Without one of these: any dispatch mode is
# taken for such a one.
_mode_count: Callable[[], int] = _optional("torch._C:_len_torch_dispatch_stack", lambda: 1)
_modes: Callable[[], list[Any]] = _optional(
    "torch.utils._python_dispatch:_get_current_dispatch_mode_stack",
    lambda: [None] * _mode_count())
_mode_of: Callable[[Any], Any] = _optional(
    "torch._C:_get_dispatch_mode", lambda key: _mode_count() or None)
_PROXY: Any = _optional("torch._C:_TorchDispatchModeKey.PROXY", None)
_CACHING: Any = (
    _optional("torch.utils.checkpoint:_CachingTorchDispatchMode", object),
    _optional("torch.utils.checkpoint:_CachedTorchDispatchMode", object))


def is_tracing() -> bool:
    """True if torch.jit or make_fx is noting down operators."""
    if _jit_state() is not None:
        return True
    return (_mode_count() > 0 if _PROXY is None else _mode_of(_PROXY) is not None)


def is_caching() -> bool:
    """True if selective checkpointing keeps what operators return: it must not change."""
    if _mode_count() == 0:
        return False
    return any(mode is None or isinstance(mode, _CACHING) for mode in _modes())


def runs_as_called() -> bool:
    """True if no transform, tracer or selective checkpoint asks for operators of a kind."""
    if _functorch_transform() is not None or _jit_state() is not None or _forward_level is None:
        return False
    if forward_ad._current_level >= 0:
        return False
    return _mode_count() == 0 or not (is_tracing() or is_caching())


# One question for all kinds of devices. Without it: torch.is_autocast_enabled(kind) is always
# asked.
any_autocast: Callable[[], bool] = _optional("torch._C:_is_any_autocast_enabled", lambda: True)


@contextlib.contextmanager
def _no_autocast() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for kind in ("cpu", "cuda", "xpu"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


# A context without autocast. Without it: torch.autocast(kind, enabled=False), in more time.
no_autocast: Callable[[], contextlib.AbstractContextManager[None]] = _optional(
    "torch._C:_DisableAutocast", _no_autocast)


# What autograd keeps. Somebody's hooks, as checkpoints and offloading set them, make of a kept
# tensor what they like: it is not asked for then. Without a name: there may be hooks.
_saved_tensor_hook: Any = _optional("torch._C._autograd:SavedTensor.unpack_hook", None)
saved_tensors_hooks: Callable[[bool], Any] = _optional(
    "torch._C._autograd:_top_saved_tensors_default_hooks", lambda ignore_tracing: True)


def has_unpack_hook(saved: Any) -> bool:
    """True if a hook was set on a kept tensor, as a node's `_raw_saved_` attributes give it."""
    return _saved_tensor_hook is None or saved.unpack_hook is not None


def is_keeping_by_hooks() -> bool:
    """True if hooks are set on all that is kept from now on."""
    return saved_tensors_hooks(False) is not None


# What a call of a checkpointed function keeps. Without it: none is known.
CheckpointFrame: Any = _optional("torch.utils.checkpoint:_CheckpointFrame", ())


# What is made in a backward pass for several nodes is freed at its end. Without a name: each node
# makes it for itself.
_task_id: Callable[[], int] = _optional("torch._C:_current_graph_task_id", lambda: -1)
_engine: Any = _optional("torch.autograd.variable:Variable._execution_engine", None)


def is_in_backward() -> bool:
    """True in what a backward pass calls."""
    return _task_id() != -1


def at_end_of_backward(callback: Callable[[], None]) -> bool:
    """Have this called when the backward pass that is under way ends; False if none is."""
    if _engine is None or not is_in_backward():
        return False
    _engine.queue_callback(callback)
    return True


# Tensors.

# A view that autograd does not take for one, so that it may be returned from a Function and written
# into. Without it: a copy.
unsafe_view: Callable[[Tensor, Iterable[int]], Tensor] = _optional(
    "torch:ops.aten._unsafe_view.default", lambda tensor, shape: tensor.reshape(shape).clone())

# An AdaptedWeight has a shape but no memory. Without it: such weights cannot be read by Python.
wrapper_subclass: Callable[..., Any] = _optional(
    "torch:Tensor._make_wrapper_subclass",
    _lacking("torch.Tensor._make_wrapper_subclass", "Python that reads an adapted weight"))

# A function of torch runs on an AdaptedWeight as on a plain tensor. Without it: it says so.
without_torch_function: Callable[[], contextlib.AbstractContextManager[None]] = _optional(
    "torch._C:DisableTorchFunctionSubclass",
    _lacking("torch._C.DisableTorchFunctionSubclass", "Python that reads an adapted weight"))


def _subclass(cls: type[Tensor], data: Tensor, requires_grad: bool) -> Tensor:
    return data.detach().as_subclass(cls).requires_grad_(requires_grad)


# A Parameter of the caller's class on other data. Without it: Tensor.as_subclass, which calls its
# __torch_function__.
make_subclass: Callable[[type[Any], Tensor, bool], Any] = _optional(
    "torch:Tensor._make_subclass", _subclass)

# The kernel of stacks of experts, which their Python calls by this name. Without it: nobody can.
grouped_mm: Any = _optional("torch:_grouped_mm", object())

# What tells one storage from another. Without it: the id of its object, which lives as long.
storage_key: Callable[[torch.UntypedStorage], int] = operator.attrgetter("_cdata")
if _optional("torch:UntypedStorage._cdata", None) is None:
    storage_key = id


def writes(overload: Any) -> bool:
    """True if an operator of torch.ops writes into an argument. Without a schema: by its name."""
    schema = getattr(overload, "_schema", None)
    if schema is None:
        return str(overload.__name__).partition(".")[0].endswith("_")
    return bool(schema.is_mutable)


def apply_of(function: type[torch.autograd.Function]) -> Any:
    """Function.apply without its questions about transforms. Without that: Function.apply."""
    return getattr(super(torch.autograd.Function, function), "apply", function.apply)


# Trees of arguments: tuples, lists and dicts. Without them: fx's own.

def _tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    return fx.node.map_aggregate(tree, function)


def _tree_iter(tree: Any) -> Iterable[Any]:
    leaves: list[Any] = []
    _tree_map(leaves.append, tree)
    return leaves


tree_map: Callable[..., Any] = _optional("torch.utils._pytree:tree_map", _tree_map)
tree_iter: Callable[[Any], Iterable[Any]] = _optional("torch.utils._pytree:tree_iter", _tree_iter)
tree_structure: Callable[[Any], Any] = _optional(
    "torch.utils._pytree:tree_structure", _lacking("torch.utils._pytree", "AOTInductor"))
# Without it: a named tuple is a tuple.
is_namedtuple: Callable[[Any], bool] = _optional(
    "torch.utils._pytree:is_namedtuple_instance", lambda value: False)


# Modules.

# A module to which nothing is hooked is computed without being called.
# Without it: each is called, one by one.
any_global_hook: Callable[[], bool] = _optional(
    "torch.nn.modules.module:_has_any_global_hook", lambda: True)


def compiled_call(module: nn.Module) -> Any:
    """What module.compile() made, which copies lack, or None. Without that attribute: None."""
    return getattr(module, "_compiled_call_impl", None)


def composable_keys() -> tuple[str, ...]:
    """The attributes in which `fully_shard` keeps what it knows of a module.

    Without them: none are known, and a model cannot be taken out of FSDP.
    """
    try:
        from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
    except ImportError:
        return ()
    return STATE_KEY, REGISTRY_KEY


# Tracing and compiling.

class _NoDispatchMode:
    __enter__ = _lacking("torch.utils._python_dispatch.TorchDispatchMode", "tracing")

    def __exit__(self, *_: object) -> None:
        pass


if TYPE_CHECKING:
    from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
else:
    # Tracing refuses to compute with real tensors.
    # Without it: nothing can be traced, and every module is a graph break.
    TorchDispatchMode = _optional(
        "torch.utils._python_dispatch:TorchDispatchMode", _NoDispatchMode)


def compiler_pass() -> tuple[Any, Callable[..., bytes]]:
    """Return the class of a pass for inductor, and what hashes its source files.

    It imports the compiler, which takes a second. Without them: `lorafx.compile_options` says so.
    """
    try:
        from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
    except ImportError:
        _lacking("torch._inductor.custom_graph_pass", "lorafx.compile_options")()
    return CustomGraphPass, get_hash_for_files


# Where a compiler shall not start, and in which order it looks for programs. Without: as it does.
compiler_frames: Any = _optional("torch._C._dynamo:eval_frame", None)
