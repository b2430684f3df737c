"""Help, the version and mistakes in arguments need no torch, whose import takes seconds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lorafx

CODE = """if True:
    import sys
    from lorafx._cli.main import main
    code = main(sys.argv[1:])
    print("torch" in sys.modules)
    raise SystemExit(code)"""


@pytest.mark.parametrize("arguments, code", [
    ("--help", 0), ("--version", 0), ("merge --help", 0), ("", 2), ("fold", 2), ("show", 2),
    ("merge base a.safetensors -o out --dtype int8", 2), ("diff a b --tolerance x", 2)])
def test_torch_is_not_imported(arguments, code):
    environment = os.environ | {"PYTHONPATH": str(Path(lorafx.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", CODE, *arguments.split()], env=environment,
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (code, "False"), done.stderr
