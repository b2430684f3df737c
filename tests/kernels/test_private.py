"""Where torch lacks a private name that it uses, lorafx is imported, and right or clear."""

import json
import subprocess
import sys
from pathlib import Path

import lorafx
from lorafx._kernels import private

ESSENTIAL = {"torch:Tensor._make_wrapper_subclass", "torch._C:DisableTorchFunctionSubclass"}


def test_this_torch_has_every_name():
    assert all(private.AVAILABLE.values()), private.AVAILABLE


def test_without_each_name_in_turn():
    """The results are the same, but Python that reads a weight needs two names, and says so."""
    script = Path(__file__).with_name("without_names.py")
    command = [sys.executable, "-W", "ignore", str(script)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert not ran.returncode, ran.stderr
    said = json.loads(ran.stdout)
    assert said.keys() == ESSENTIAL
    for name, message in said.items():
        name = name.replace(":", ".")
        assert f"has no {name}, which lorafx needs for Python that reads" in message


def test_no_other_file_uses_private_modules_of_torch():
    """Beside attributes of its objects, which are looked up where they are used."""
    folder = Path(lorafx.__file__).parent
    for path in folder.rglob("*.py"):
        if path != Path(private.__file__):
            text = path.read_text().replace("torch._inductor.aoti_", "")  # what torch documents
            for name in ("torch._C", "torch._ops", "torch._inductor.", "torch.utils._", "_cdata",
                         "torch.ops.aten._", "Tensor._make", "forward_ad", "torch._grouped",
                         "_any_global"):
                assert name not in text, f"{path}: {name}"
