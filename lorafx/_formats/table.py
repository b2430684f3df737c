"""Adapter <-> file: each format is a row of FORMATS; a path belongs to the first that accepts it.

To add a format, write its `decode` and, if it is written too, its `encode`, and add a row.
"""

import dataclasses
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from torch import Tensor, nn

from .._adapter.adapter import Adapter, check_finite, validate
from .._errors import ConfigError, FormatError
from .._storage.durable import check_path, write_folder, write_whole
from .._storage.files import read_part, read_safetensors
from . import (
    exported, kohya, kohya_write, minimind, mlx, native, peft_folder, peft_read, peft_write,
    state_dicts, unscaled
)
from .adapter_file import INSTEAD, AdapterFile, Decoded, Destination


@dataclasses.dataclass(frozen=True)
class Format:
    """One kind of file: which paths and contents are of it, and how an adapter becomes one.

    Where several formats accept a path, it is read as the first that recognises what is in it, and
    written as the first that has an `encode`.
    """

    name: str
    form: str  # of its paths, as errors say it
    accepts: Callable[[Path], bool]
    read: Callable[[Path], tuple[Mapping[str, Tensor], Mapping[str, str]]]  # tensors and metadata
    decode: Callable[[AdapterFile], Decoded]
    # {file name: content}; None where the format is only read
    encode: Callable[[Adapter, Destination], Mapping[str, bytes]] | None = None
    recognises: Callable[[AdapterFile], bool] = lambda file: True
    # of a path and the adapter's name, the folder that all files are in; None for one file
    folder: Callable[[Path, str], Path] | None = None
    keeps_training: bool = False
    has_parts: bool = False  # of a pipeline, of which each is for a model of its own
    keeps_scale: bool = True
    # by which `save(format=...)` asks for it; not written otherwise, as its paths are another's
    asked_for_as: str = ""


def _ends_in(*endings: str) -> Callable[[Path], bool]:
    return lambda path: path.suffix.lower() in endings


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors; of a model's state_dict, what is an adapter's."""
    return read_safetensors(
        path, lambda names, metadata: state_dicts.names_in_file(names, metadata) or names)


def _read_torch_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The same of a dict in a file, and where it is found in a checkpoint that holds others."""
    tensors, keys = read_part(path, _chosen_names)
    return tensors, {_UNDER: keys}


def _chosen_names(names: Collection[str]) -> Collection[str]:
    """The names of adapters' tensors in a dict, of whatever format; none if it is no adapter's."""
    known = (unscaled.names_in, minimind.names_in, kohya.names_in)
    return state_dicts.names_in(names) or next(filter(None, (of(names) for of in known)), [])


_UNDER = "under"  # in metadata, the keys of the dict that a torch file's tensors are from


_MLX = Format("MLX", "a folder", peft_folder.is_folder, state_dicts.read_folder, mlx.decode,
              mlx.encode, recognises=mlx.recognises, folder=lambda path, adapter: path,
              asked_for_as="mlx")
_MODEL_FOLDER = Format("a model's folder", "a folder", peft_folder.is_folder,
                       state_dicts.read_folder, state_dicts.decode,
                       recognises=state_dicts.recognises)
_PEFT = Format("PEFT", "a folder", peft_folder.is_folder, state_dicts.read_folder,
               peft_read.decode, peft_write.encode, folder=peft_folder.folder_of)
_TORCH = (".pth", ".pt", ".bin", ".ckpt")

FORMATS = (
    _MLX,
    _MODEL_FOLDER,
    _PEFT,
    Format("a model's state_dict", "*.safetensors", _ends_in(".safetensors"), _read_safetensors,
           state_dicts.decode, recognises=state_dicts.recognises),
    Format("kohya-ss or diffusers", "*.safetensors", _ends_in(".safetensors"), _read_safetensors,
           kohya.decode, recognises=kohya.recognises, has_parts=True),
    Format("diffusers", "*.safetensors", _ends_in(".safetensors"), _read_safetensors,
           kohya.decode, kohya_write.diffusers, recognises=kohya.recognises, has_parts=True,
           asked_for_as="diffusers"),
    Format("kohya-ss", "*.safetensors", _ends_in(".safetensors"), _read_safetensors,
           kohya.decode, kohya_write.kohya, recognises=kohya.recognises, has_parts=True,
           asked_for_as="kohya"),
    Format("a model's state_dict", "*.pth, *.pt, *.bin or *.ckpt", _ends_in(*_TORCH),
           _read_torch_file, state_dicts.decode, recognises=state_dicts.recognises),
    Format("torchtune, litgpt or loralib", "*.pth, *.pt, *.bin, *.ckpt or *.lora",
           _ends_in(*_TORCH, ".lora"), _read_torch_file, unscaled.decode,
           recognises=unscaled.recognises, keeps_scale=False),
    Format("diffusers before 0.22", "*.bin", _ends_in(".bin"), _read_torch_file, kohya.decode,
           has_parts=True),
    Format("lorafx", "*.safetensors", _ends_in(".safetensors"), _read_safetensors,
           native.decode, native.encode, keeps_training=True),
    Format("lorafx, for exported programs", "*.safetensors", _ends_in(".safetensors"),
           _read_safetensors, native.decode, exported.encode_safetensors,
           asked_for_as="exported"),
    Format("onnxruntime", "*.onnx_adapter", _ends_in(".onnx_adapter"), exported.read_onnx,
           exported.decode_onnx, exported.encode_onnx),
    Format("MiniMind", "*.pth or *.pt", _ends_in(".pth", ".pt"), _read_torch_file,
           minimind.decode, minimind.encode),
    dataclasses.replace(_MLX, form="an existing folder of any name", accepts=Path.is_dir),
    dataclasses.replace(_MODEL_FOLDER, form="an existing folder of any name", accepts=Path.is_dir),
    dataclasses.replace(_PEFT, form="an existing folder of any name", accepts=Path.is_dir),
)


def format_of(path: Path, asked_for: str | None = None) -> Format:
    """Return the format in which a path is written, or the one asked for; else FormatError."""
    known = sorted({row.asked_for_as for row in FORMATS} - {""})
    if asked_for is not None and asked_for not in known:
        raise FormatError(f"There is no format {asked_for!r} to ask for: it is one of "
                          f"{', '.join(map(repr, known))}, or the path's ending says it.")
    written = [row for row in _accepting(path) if row.encode is not None]
    for row in written:
        if row.asked_for_as == (asked_for or ""):
            return row
    if asked_for is None:
        raise FormatError(f"'{path}' is read only: choose another ending, such as .safetensors.")
    forms = {row.form for row in FORMATS if row.asked_for_as == asked_for}
    raise FormatError(f"'{path}' cannot be a {asked_for} file: its path is {' or '.join(forms)}.")


def write_adapter(
    adapter: Adapter, path: str | os.PathLike[str], model: nn.Module | None, base: str | None,
    asked_for: str | None = None, part: str | None = None,
) -> None:
    """Save an adapter whole or not at all; `base` is its model's fingerprint, if that is known."""
    path = Path(path)
    row = format_of(path, asked_for)
    if part is not None and not row.has_parts:
        raise FormatError(f"A {row.name} file is not of a pipeline's part: leave out part=....")
    encode = row.encode
    assert encode is not None
    if adapter.training is not None and not row.keeps_training:
        raise FormatError(f"'{path}' is a {row.name} file, which keeps no optimizer and step: "
                          f"leave out optimizer=... and step=..., or {INSTEAD}.")
    try:
        validate(adapter)
        check_finite(adapter)
        if row.folder is None:
            _write_file(path, encode(adapter, Destination(path, model, base, part)))
        else:
            folder = row.folder(path, adapter.name)
            _write_folder(folder, lambda: encode(adapter, Destination(folder, model, base)))
    except ConfigError as error:
        raise FormatError(
            f"Adapter {adapter.name!r} cannot be saved to '{path}': {error}") from error


def read_adapter(
    path: str | os.PathLike[str], name: str | None = None, model: nn.Module | None = None,
    allow_nonfinite: bool = False, part: str | None = None, alpha: float | None = None,
) -> Decoded:
    """Return the adapter in a file, all of it checked, and its base's fingerprint if it is kept.

    `name` chooses among several adapters of one folder, `part` among those of a pipeline's parts;
    `model` and `alpha` help where a format does not tell all by itself.
    """
    path = Path(path)
    under = ""
    try:
        row, file = _recognised(path)
        under = file.metadata.get(_UNDER, "") if path.is_file() else ""
        file = dataclasses.replace(file, adapter=name, model=model, part=part, alpha=alpha)
        if part is not None and not row.has_parts:
            raise FormatError(f"'{path}' is a {row.name} file, of which nothing is a pipeline's "
                              f"{part!r}: leave out part=....")
        if alpha is not None and row.keeps_scale:
            raise FormatError(f"'{path}' is a {row.name} file, which says its scale itself: leave "
                              "out alpha=....")
        decoded = row.decode(file)
        validate(decoded.adapter)
        if not allow_nonfinite:
            check_finite(decoded.adapter, ", which lorafx.load lets in with allow_nonfinite=True")
    except ConfigError as error:
        where = f", under {under!r}," if under else ""
        raise FormatError(f"'{path}'{where} cannot be loaded: {error}") from error
    except FormatError as error:
        if not under:
            raise
        raise FormatError(f"Under {under!r}, {error}") from error
    return decoded


def format_read(path: Path) -> Format:
    """Return the format in which a path is read."""
    return _recognised(path)[0]


def _recognised(path: Path) -> tuple[Format, AdapterFile]:
    """The format of a path and what is in it; FormatError if that cannot be read."""
    rows = _accepting(path)
    if not path.exists():
        raise FormatError(f"There is no file '{path}'.")
    file = AdapterFile(path, *rows[0].read(path))
    return next((row for row in rows if row.recognises(file)), rows[-1]), file


def _accepting(path: Path) -> list[Format]:
    """The formats that a path may be of, which are all read as the first is; else FormatError."""
    check_path(path)
    rows = [row for row in FORMATS if row.accepts(path)]
    if not rows:
        written = [row for row in FORMATS if row.encode is not None and not row.asked_for_as]
        known = ", ".join(f"{row.form} ({row.name})" for row in written)
        raise FormatError(f"The path '{path}' names no known format by its ending: use {known}; a "
                          "folder of another name must be there already.")
    return [row for row in rows if row.read is rows[0].read]


def _write_file(path: Path, contents: Mapping[str, bytes]) -> None:
    if path.is_dir():
        raise FormatError(f"'{path}' is a folder: name a file in it.")
    if _is_in_the_way(path):
        raise FormatError(f"'{path}' is in the way, and is not a file that can be replaced.")
    content, = contents.values()
    write_whole(path, content)


def _write_folder(folder: Path, encode: Callable[[], Mapping[str, bytes]]) -> None:
    """Write the files that a format has in a folder; what they hold may depend on what is there."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"'{folder}' is in the way.")

    def contents() -> Mapping[str, bytes]:
        files = encode()
        for name in files:
            if _is_in_the_way(folder / name):
                raise ConfigError(f"'{folder / name}' is in the way.")
        return files

    write_folder(folder, contents)


def _is_in_the_way(path: Path) -> bool:
    """True if there is something else than a file, such as a folder or a device."""
    return path.exists() and not path.is_file()
