"""Runs exported programs, in a process that knows neither their models nor lorafx.

Of each folder in the arguments: the program, `inputs.pt` with what it is called with, and the
adapters; `outputs.pt` gets {adapter or "base": outputs for each input}.
"""

import functools
import json
import sys
from pathlib import Path

import safetensors.torch
import torch


def torch_program(folder):
    """{adapter: a function of the arguments}."""
    if (folder / "model.aoti.pt2").exists():
        from torch._inductor import aoti_load_package

        program = aoti_load_package(str(folder / "model.aoti.pt2"))
        described = json.loads(program.get_metadata()["adapter"]).items()
        zeros = {name: torch.zeros(tensor["shape"], dtype=getattr(torch, tensor["dtype"]))
                 for name, tensor in described}
        run = lambda adapter, given: program(**given, **adapter)  # noqa: E731
    else:
        loaded = torch.export.load(folder / "model.pt2")
        program, zeros = loaded.module(), loaded.example_inputs[0][0]
        run = lambda adapter, given: program(adapter, **given)  # noqa: E731
    adapters = {"base": zeros}
    for path in folder.glob("*.safetensors"):
        adapters[path.stem] = safetensors.torch.load_file(path)
    return {name: functools.partial(run, adapter) for name, adapter in adapters.items()}


def onnx_program(folder):
    """The same with onnxruntime, whose outputs come by their names."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of each input that has a default
    session = onnxruntime.InferenceSession(folder / "model.onnx", options)
    names = [output.name for output in session.get_outputs()]

    def run(given, adapter=None):
        chosen = onnxruntime.RunOptions()
        if adapter is not None:
            chosen.add_active_adapter(adapter)
        arrays = {name.replace(".", "_"): tensor.numpy() for name, tensor in flat(given).items()}
        outputs = session.run(names, arrays, chosen)
        return dict(zip(names, map(torch.from_numpy, outputs)))

    calls = {"base": run}
    for path in folder.glob("*.onnx_adapter"):
        adapter = onnxruntime.LoraAdapter()
        adapter.Load(str(path))
        calls[path.stem] = lambda given, adapter=adapter: run(given, adapter)
    return calls


def flat(tree, path=""):
    """{path: tensor} of dicts, lists and tuples."""
    if isinstance(tree, torch.Tensor):
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    found = {}
    for key, value in items:
        if isinstance(value, (torch.Tensor, dict, list, tuple)):
            found |= flat(value, f"{path}.{key}" if path else str(key))
    return found


def main():
    torch.set_num_threads(1)
    for folder in map(Path, sys.argv[1:]):
        inputs = torch.load(folder / "inputs.pt")
        onnx = (folder / "model.onnx").exists()
        calls = onnx_program(folder) if onnx else torch_program(folder)
        with torch.no_grad():
            outputs = {name: [flat(call(given)) for given in inputs["calls"]]
                       for name, call in calls.items()}
        torch.save(outputs, folder / "outputs.pt")
    assert not {"lorafx", "transformers", "common"} & sys.modules.keys()


if __name__ == "__main__":
    main()
