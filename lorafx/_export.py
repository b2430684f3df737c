"""`export`: one program that runs without the model's Python, its adapters' A and B as inputs."""

import dataclasses
import inspect
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument

from ._errors import ConfigError, FormatError, UnsupportedModelError
from ._kernels.private import tree_iter
from ._merge import eject
from ._model.adapter_inputs import (
    WithAdapterInputs, by_keyword, check_takes_inputs, with_adapter_inputs
)
from ._storage.durable import check_path, write_folder, write_whole


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of program: the ending of its path, and what writes it, to a folder of its own."""

    name: str
    ending: str
    write: Callable[[ExportedProgram, WithAdapterInputs, Path], None]


def export(
    model: nn.Module, path: str | os.PathLike[str], args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Mapping[str, Any] | Sequence[Any] | None = None,
) -> None:
    """Write one program for the base and all of its adapters, which runs without its Python.

    It computes `program(adapter, *args, **kwargs)`, the model's output in eval with, at each site,
    y = x W^T + b + (x A^T) B^T, where `adapter` is {"<site>.lora.A": A (rank, in), "<site>.lora.B":
    s B (out, rank)}: the scale s travels in B. Sites are those at which the model has adapters.
    A and B are as wide as the weight, at least float32, and of any rank from 0 on at each site.
    Outputs come in dicts (with the names of the model's own classes), lists and tuples.
    `lorafx.save(model, "french.safetensors", format="exported")` writes such an adapter, to be read
    by `safetensors.torch.load_file`.

    Args:
        model: an injected model; which of its adapters are active is of no account.
        path: its ending says the kind. `.pt2`: of `torch.export.load(path)`, `.module()` is the
            program, and `.example_inputs[0][0]` an adapter of zeros, the base. `.onnx`: names of
            inputs are those of A and B, and of forward's arguments; without an adapter it is the
            base (onnxruntime warns of each default); `lorafx.save(model, "french.onnx_adapter")`
            writes what onnxruntime's LoraAdapter loads. `.aoti.pt2`: compiled for this machine's
            kind, to be loaded by `torch._inductor.aoti_load_package` and called as
            `program(*args, **kwargs, **adapter)`; its inputs can have no default, and the base is
            the adapter of rank 0 whose shapes and dtypes `.get_metadata()["adapter"]` tells in
            JSON. Missing folders are made.
        args, kwargs: an example of what forward takes.
        dynamic_shapes: {argument: what may vary, as for `torch.export.export`}, or what may for
            each argument in turn; by default each size above 1 that the model lets vary.

    Raises:
        FormatError: no such kind, or a package that writes it is not installed.
        NotInjectedError, AdapterError: the model has no adapter.
        ConfigError: forward cannot be called with args and kwargs, or dynamic_shapes has others.
        UnsupportedModelError: torch cannot trace the model, it returns what is no tensor and no
            number, or the kind has no such operator or, as ONNX, no state that forward writes.
        OSError: the disk failed. The file is written whole or, after any error, not at all.

    Example:
        >>> import tempfile, torch, lorafx
        >>> path, x = tempfile.mkdtemp() + "/model.pt2", torch.randn(2, 4)
        >>> model = lorafx.inject(torch.nn.Linear(4, 4), rank=3)
        >>> lorafx.export(model, path, (x,))
        >>> program = torch.export.load(path).module()
        >>> french = {"lora.A": torch.ones(8, 4), "lora.B": torch.ones(4, 8)}
        >>> torch.allclose(program(french, x), model(x) + 8 * x.sum(1, keepdim=True), atol=1e-5)
        True
    """
    path, kwargs = Path(path), {} if kwargs is None else kwargs
    kind = _kind_of(path)
    check_takes_inputs(model)
    base = eject(model)
    _check_example(base, args, kwargs)
    program = with_adapter_inputs(model, base, kwargs)
    exported = _traced(program, tuple(args), dict(kwargs), dynamic_shapes)
    files = _files(kind, exported, program, path)
    if len(files) == 1:
        write_whole(path, files[path.name])
    else:
        write_folder(path.parent, lambda: files)


def _files(
    kind: Kind, exported: ExportedProgram, program: WithAdapterInputs, path: Path
) -> dict[str, bytes]:
    """{name: content} of the program, after what it reads beside it."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            kind.write(exported, program, Path(folder, path.name))
        except FormatError:
            raise
        except Exception as error:
            raise UnsupportedModelError(
                f"'{path}' cannot be a program of {kind.name}: {_reason(error)}") from error
        written = sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name)
        return {file.name: file.read_bytes() for file in written}


def _kind_of(path: Path) -> Kind:
    check_path(path)
    for kind in KINDS:
        if path.name.endswith(kind.ending):
            if path.is_dir():
                raise FormatError(f"'{path}' is a folder: name a file in it.")
            return kind
    known = ", ".join(f"{kind.ending} ({kind.name})" for kind in KINDS)
    raise FormatError(f"The path '{path}' names no kind of program by its ending: use {known}.")


def _check_example(base: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise unless forward can be called with these."""
    if not isinstance(args, (tuple, list)) or not isinstance(kwargs, Mapping):
        raise ConfigError(
            "args is a tuple and kwargs a dict of what forward takes, such as (x,), not a "
            f"{type(args).__name__} and a {type(kwargs).__name__}.")
    try:
        inspect.signature(base.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise ConfigError(
            f"args and kwargs are an example of what the forward of this {type(base).__name__} "
            f"takes, and it cannot be called with these: {error}.") from error


def _traced(
    program: WithAdapterInputs, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any,
) -> ExportedProgram:
    """The program that torch.export traces, of any rank at each site."""
    given = program.adapter, *args
    try:
        shapes = _sizes(program, given, kwargs, dynamic_shapes)
        with torch.no_grad():
            return torch.export.export(program, given, kwargs, dynamic_shapes=shapes, strict=False)
    except (ConfigError, UnsupportedModelError):
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"torch.export cannot trace this {type(program.model).__name__}: "
            f"{_reason(error)}") from error


def _sizes(
    program: WithAdapterInputs, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any,
) -> dict[str, Any]:
    """{argument of the program: which of its sizes may vary}, as torch.export takes it."""
    first, *names = inspect.signature(program.forward).bind(*args, **kwargs).arguments
    if dynamic_shapes is None:
        collection: Any = ShapesCollection()  # type: ignore[no-untyped-call]
        for value in tree_iter((args[1:], kwargs)):
            if isinstance(value, Tensor) and value.ndim:
                collection[value] = {axis: Dim.AUTO for axis in range(value.ndim)}
        shapes = collection.dynamic_shapes(program, args, kwargs)
    elif isinstance(dynamic_shapes, Mapping):
        shapes = {name: dynamic_shapes[name] for name in names if name in dynamic_shapes}
    else:
        shapes = dict(zip(names, dynamic_shapes))
    if dynamic_shapes is not None and not len(shapes) == len(names) == len(dynamic_shapes):
        raise ConfigError("dynamic_shapes says of each argument which sizes vary, or None: those "
                          f"that args and kwargs give are {', '.join(names) or 'none'}.")
    return {**shapes, first: _ranks(program.adapter)}


def _ranks(adapter: Mapping[str, Tensor]) -> dict[str, dict[int, Any]]:
    """{name: {axis: Dim}}: A and B of a site share one, which is any number from 0 on."""
    shapes: dict[str, dict[int, Any]] = {}
    for number, name in enumerate(adapter):
        if name.endswith("A"):
            rank, ndim = Dim(f"lora_rank_{number}", min=0), adapter[name].ndim
            shapes[name], shapes[name[:-1] + "B"] = {ndim - 2: rank}, {ndim - 1: rank}
    return shapes


def _reason(error: BaseException) -> str:
    """What went wrong at first, in a line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _write_pt2(exported: ExportedProgram, program: WithAdapterInputs, path: Path) -> None:
    torch.export.save(exported, path)


def _write_aoti(exported: ExportedProgram, program: WithAdapterInputs, path: Path) -> None:
    """Not with A and B as constants: torch would read those of another rank as of the first."""
    import torch._inductor
    adapter = {}
    for name, ranks in _ranks(program.adapter).items():
        zeros = program.adapter[name]
        shape = [0 if axis in ranks else size for axis, size in enumerate(zeros.shape)]
        adapter[name] = {"shape": shape, "dtype": str(zeros.dtype)[len("torch."):]}
    torch._inductor.aoti_compile_and_package(
        by_keyword(exported), package_path=str(path),
        inductor_configs={"aot_inductor.metadata": {"adapter": json.dumps(adapter)}})


def _write_onnx(exported: ExportedProgram, program: WithAdapterInputs, path: Path) -> None:
    try:
        import onnx
        import onnx_ir
        import onnxscript
    except ImportError as error:
        raise FormatError(f"A program of ONNX is written by onnx and onnxscript, not all of which "
                          f"are installed: {error}: pip install 'lorafx[export]'.") from error
    del onnx, onnxscript  # what torch.onnx imports
    given = []
    for spec in exported.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT and isinstance(spec.arg, TensorArgument):
            given.append(spec.arg.name)
    names = [*program.adapter, *given[len(program.adapter):]]
    made = torch.onnx.export(exported, input_names=names, output_names=_output_names(exported),
                             dynamo=True, verbose=False)
    assert made is not None and made.exported_program is not None
    for output in made.exported_program.graph_signature.output_specs:
        if output.kind is not OutputKind.USER_OUTPUT:
            raise ValueError(f"forward writes into '{output.target or output.arg.name}', which "
                             "would be lost after each call")
    graph = made.model.graph
    for value in graph.inputs:
        if value.name in program.adapter:  # an input that has a default is an initializer too
            zeros = program.adapter[value.name].cpu().numpy()
            value.const_value = onnx_ir.tensor(zeros, name=value.name)
            graph.initializers[value.name] = value
    made.save(path)


def _output_names(exported: ExportedProgram) -> list[str]:
    """The path of each output in the dicts, lists and tuples that the program returns."""
    outputs: Any = exported.call_spec.out_spec.unflatten(exported.graph_signature.user_outputs)
    return [*_paths(outputs, "")]


def _paths(outputs: Any, path: str) -> Iterator[str]:
    items = outputs.items() if isinstance(outputs, dict) else enumerate(outputs)
    for key, value in items:
        below = f"{path}.{key}" if path else str(key)
        if isinstance(value, (dict, list, tuple)):
            yield from _paths(value, below)
        elif isinstance(value, str):  # the name of a tensor; None is no output
            yield below
        elif value is not None:
            raise ValueError(f"forward returns the number {value}, and ONNX has tensors alone")


KINDS = (
    Kind("AOTInductor", ".aoti.pt2", _write_aoti),
    Kind("torch.export", ".pt2", _write_pt2),
    Kind("ONNX", ".onnx", _write_onnx),
)
