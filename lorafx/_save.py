"""`load` and `save`: an adapter, its A and B at each site, from a file into a model and back."""

import dataclasses
import os
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn
from torch.export import ExportedProgram

from ._adapter.adapter import Adapter
from ._adapter.names import check_name
from ._formats.table import read_adapter, write_adapter
from ._model.attach import attach, begin_injection, check_new_name
from ._model.copies import share
from ._model.exported_program import takes_exported
from ._model.extract import extract
from ._model.guard import check_model
from ._model.known import read_and_fit
from ._model.older_names import adapter_of_today
from ._model.program import Program
from ._model.record import check_adapter, find_injection, injection, used_here
from ._model.replacing import check_replaced, replace as put_in_place
from ._model.together import first_of_all
from ._model.training import capture
from ._model.untie import untie as untie_in
from ._switch import activate, only_one


M = TypeVar("M", bound=nn.Module | ExportedProgram)


@takes_exported
@torch.inference_mode(False)
def load(
    model: M, path: str | os.PathLike[str], adapter: str | None = None, *, part: str | None = None,
    untie: bool = False, alpha: float | None = None, allow_nonfinite: bool = False,
    replace: bool = False,
) -> M:
    """Return the model with the adapter in a file or folder, of whatever known format.

    A base is left as it is and a new, injected model is returned, with the adapter active. An
    injected model gets it added, inactive until `activate`, or with `replace` in the place of
    another, while other threads may use the model. Nothing changes on failure.

    Args:
        model: a base model, or an injected one.
        path: a file of `lorafx.save`, MiniMind, kohya-ss, diffusers, torchtune, litgpt, loralib or
            onnxruntime; a folder of PEFT or MLX; or an injected model's state_dict, in a file (also
            as `{"model": state_dict}`) or a folder of a Trainer or `save_pretrained`.
        adapter: the name to give it, by default the file's; of several in one, which one.
        part: of a file for several models of a diffusion pipeline, which one this is, as diffusers
            names them: "unet", "transformer", "text_encoder", "text_encoder_2", "prior".
        untie: of a base model that ties what the file has apart, as PEFT trains a head and an
            embedding, give each a Parameter of its own, on the same memory.
        alpha: of a file that does not keep it (torchtune's, litgpt's, loralib's), nor the
            adapter_config.json or hyperparameters.yaml beside it: s is alpha / rank.
        allow_nonfinite: let A, B and trained weights hold NaN and infinity, otherwise an error.
        replace: put it in the place of an adapter of that name, of whatever rank and sites, active
            if that is: calls of the model and contexts that began before use the old one to their
            end. Its tensors are new ones, which an optimizer has to be given.

    Raises:
        FormatError: the file is missing or damaged.
        MismatchError: it was made for another model.
        AdapterError: the model holds an adapter of that name, and `replace` is false, or none, and
            it is true; or what it trains whole another active one trains too.
        UnsupportedModelError: DistributedDataParallel reduces gradients of what it would replace.

    Example:
        >>> import tempfile, torch, lorafx
        >>> base = torch.nn.Linear(4, 4)
        >>> path = tempfile.mkdtemp() + "/adapter.safetensors"
        >>> lorafx.save(lorafx.inject(base), path)
        >>> lorafx.adapters(lorafx.load(base, path))
        ['default']
    """
    assert not isinstance(model, ExportedProgram)  # takes_exported saw to that
    found, made_for = read_adapter(path, adapter, model, allow_nonfinite, part, alpha)
    found = dataclasses.replace(found, name=found.name if adapter is None else adapter)
    record = find_injection(model)
    put = _way_in(model, record is None, found.name, replace)
    found = adapter_of_today(found, model)
    twin, source = share(model) if record is None else model, f"'{os.fspath(path)}'"
    untied = untie_in(twin, found, source) if untie else False
    program, fitted = read_and_fit(twin, found, source, made_for)
    if record is None:
        begin_injection(program).untied = untied
    put(program, fitted)
    if record is None:
        activate(twin, found.name)
    return twin


def _way_in(
    model: nn.Module, fresh: bool, name: str, replace: bool
) -> Callable[[Program, Adapter], None]:
    """What puts an adapter of this name into a model; raises where nothing can."""
    check_name(name)
    if fresh:
        check_model(model)
    elif replace:
        check_adapter(model, name)
        check_replaced(model, name)
        return put_in_place
    else:
        check_new_name(model, name)
    return attach


@takes_exported
def save(
    model: nn.Module | ExportedProgram,
    path: str | os.PathLike[str],
    adapter: str | None = None,
    *,
    format: str | None = None,
    part: str | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    step: int | None = None,
) -> None:
    """Write one adapter, and nothing of the base, to a file: all of it or, on failure, nothing.

    Where the model's tensors are spread over processes (FSDP, tensor parallelism, stages that were
    cut from an injected model), each of them calls this: A and B are gathered, never the base, the
    first process writes, and all return when it is done, or raise what it raises. A stage that was
    injected after it was cut is a model of its own.

    Args:
        model: an injected model.
        path: its ending says the format: `.safetensors` (lorafx's own, all of the adapter), `.pth`
            or `.pt` (MiniMind's: float16, the scale folded into B), `.onnx_adapter` (onnxruntime's,
            likewise in float32), or none: PEFT's folder. Missing folders are made.
        adapter: which one; by default the only one that forward uses here: within `lorafx.using`
            the one that was chosen, elsewhere the active one.
        format: "diffusers", "kohya" or "exported" (`.safetensors`; the last is what the programs of
            `lorafx.export` take), "mlx" (a folder), where the ending does not say it.
        part: for these, which part of a pipeline the model is, as for `lorafx.load`: its name is
            put before each module's (kohya takes "unet" by default).
        optimizer, step: of a training run that `lorafx.resume` shall continue, kept with the states
            of the random generators; only lorafx's own format has a place for them.

    Raises:
        FormatError: no such format, or the format cannot hold this.
        AdapterError: unknown, or not the only one.
        ConfigError: the optimizer has other parameters than this adapter's.
        OSError: the disk failed.

    Example:
        >>> import tempfile, torch, lorafx
        >>> model = lorafx.inject(torch.nn.Linear(4, 4))
        >>> lorafx.save(model, tempfile.mkdtemp() + "/out/lora/demo_4.pth")
    """
    assert not isinstance(model, ExportedProgram)  # takes_exported saw to that
    active = used_here(model, "What to save") if adapter is None else ()
    adapter = only_one(model, adapter, active, "save writes one adapter")
    found = extract(model, adapter)
    if optimizer is not None or step is not None:
        found = dataclasses.replace(found, training=capture(model, adapter, optimizer, step))
    fingerprint = injection(model).fingerprint
    first_of_all(
        model, lambda: write_adapter(found, path, model, fingerprint, format, part))
