"""Writes the tables of benchmarks/README.md anew from what the benchmarks left in a folder.

    python benchmarks/readme.py [out]

Each section is written whose JSON files are there: finetune.py's results.json, coverage.json
(coverage.py --out), claims.json (claims.py --json), sharded.json, step.json and merge.json,
decode.json, serve.json, stream.json, qlora.json, facts.json. The picture finetune.png is
copied. Other sections stay as they are.
"""

import argparse
import importlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from common.readme import README, write

# (the section's name, the module whose `readme` makes it, the files that it is made from)
SECTIONS = (
    ("facts", "facts", ("facts.json",)),
    ("finetune", "finetune_parts.report", ("results.json",)),
    ("sharded", "sharded", ("sharded.json",)),
    ("performance", "step_parts.report", ("step.json", "merge.json")),
    ("decode", "decode", ("decode.json",)),
    ("serve", "serve_parts.report", ("serve.json",)),
    ("stream", "stream", ("stream.json",)),
    ("qlora", "qlora", ("qlora.json",)),
    ("coverage", "coverage_parts.report", ("coverage.json",)),
    ("claims", "claims", ("claims.json",)),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Write what can be written."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("out"))
    folder: Path = parser.parse_args(argv).folder
    for section, module, names in SECTIONS:
        paths = [folder / name for name in names]
        if all(path.exists() for path in paths):
            made = importlib.import_module(module).readme(
                *(json.loads(path.read_text()) for path in paths))
            write(section, made)
    if (folder / "finetune.png").exists():
        shutil.copyfile(folder / "finetune.png", README.parent / "finetune.png")


if __name__ == "__main__":
    main()
