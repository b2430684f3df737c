"""Asserts that a wheel holds the package, all of its sub-packages and its marker of types, and nothing else."""

import sys
import zipfile
from pathlib import Path

checkout = Path(__file__).parents[1]
wanted = {str(path.relative_to(checkout)) for path in checkout.glob("lorafx/**/*.py")} | {"lorafx/py.typed"}
held = {name for name in zipfile.ZipFile(sys.argv[1]).namelist() if ".dist-info/" not in name}
assert held == wanted, f"too much: {sorted(held - wanted)}, too little: {sorted(wanted - held)}"
