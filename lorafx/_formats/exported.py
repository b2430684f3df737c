"""An adapter as the inputs of a program of `lorafx.export`: A and s B by name, the scale in B.

`.onnx_adapter` is onnxruntime's own format, which holds named tensors and no more. In
`.safetensors` it is a file of lorafx's own format whose scales are 1, with zeros at the sites that
only other adapters of the model have: exactly what such a program takes.
"""

import dataclasses
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._adapter.adapter import Adapter, Pair, all_finite
from .._adapter.config import LoRAConfig
from .._adapter.names import dotted
from .._errors import ConfigError, FormatError
from .._model.adapter_inputs import input_dtypes, input_shapes
from . import native
from .adapter_file import INSTEAD, AdapterFile, Decoded, Destination
from .pairs import pairs_of


def encode_safetensors(adapter: Adapter, destination: Destination) -> dict[str, bytes]:
    """Return {file name: content}; ConfigError where a program cannot take the adapter."""
    pairs = _inputs(adapter, destination)
    if destination.model is not None:
        dtypes = input_dtypes(destination.model)
        for site, (in_shape, out_shape) in input_shapes(destination.model, rank=1).items():
            if site not in pairs:
                A, B = (torch.zeros(shape, dtype=dtypes[site]) for shape in (in_shape, out_shape))
                pairs[site] = Pair(A, B, 1.0)
    config = dataclasses.replace(
        adapter.config, alpha=None, alpha_pattern={}, rslora=False, targets=[*pairs])
    folded = dataclasses.replace(adapter, config=config, pairs=pairs, training=None)
    return native.encode(folded, destination)


def encode_onnx(adapter: Adapter, destination: Destination) -> dict[str, bytes]:
    """Return {file name: content}; ConfigError where the format cannot hold the adapter."""
    runtime = _onnxruntime(destination.path, "written")
    parameters = {}
    for site, (A, B, _) in _inputs(adapter, destination).items():
        for half, factor in (("A", A), ("B", B)):
            value = runtime.OrtValue.ortvalue_from_numpy(factor.contiguous().cpu().numpy())
            parameters[dotted(site, f"lora.{half}")] = value
    file = runtime.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(1)
    file.set_parameters(parameters)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "adapter.onnx_adapter")
        file.export_adapter(str(path))
        return {destination.path.name: path.read_bytes()}


def read_onnx(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a file by name, and no metadata."""
    runtime = _onnxruntime(path, "read")
    try:
        values = runtime.AdapterFormat.read_adapter(str(path)).get_parameters()
        tensors = {name: torch.from_numpy(value.numpy().copy()) for name, value in values.items()}
    except Exception as error:  # damaged bytes make it raise anything
        reason = str(error).partition("\n")[0]
        raise FormatError(
            f"'{path}' is damaged or not an adapter of onnxruntime: {reason}.") from error
    return tensors, {}


def decode_onnx(file: AdapterFile) -> Decoded:
    """Return the adapter in a file, whose scales are 1."""
    scales: defaultdict[str, float] = defaultdict(lambda: 1.0)
    pairs = pairs_of(file.tensors, "lora.A", "lora.B", file.path, scales)
    rank = max(pair.A.shape[-2] for pair in pairs.values())
    return Decoded(Adapter("default", LoRAConfig(rank=rank, targets=list(pairs)), pairs))


def _inputs(adapter: Adapter, destination: Destination) -> dict[str, Pair]:
    """A and s B at each site, in the dtype of the program's inputs."""
    for name in adapter.trained:
        raise ConfigError(f"an exported program takes A and B, and no other tensors such as the "
                          f"trained '{name}'; {INSTEAD}.")
    dtypes = {} if destination.model is None else input_dtypes(destination.model)
    pairs = {}
    for site, (A, B, scale) in adapter.pairs.items():
        dtype = dtypes.get(site, torch.promote_types(A.dtype, torch.float32))
        scaled = (scale * B.to(torch.float64)).to(dtype)
        if not all_finite(scaled):
            raise ConfigError(f"at '{site}', {scale:g} B exceeds the range of {dtype}; {INSTEAD}.")
        pairs[site] = Pair(A.to(dtype), scaled, 1.0)
    return pairs


def _onnxruntime(path: Path, done: str) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise FormatError(f"'{path}' is {done} by onnxruntime, which is not installed: pip install "
                          "'lorafx[export]'.") from error
    return onnxruntime
