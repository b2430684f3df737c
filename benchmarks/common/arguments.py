"""The arguments of commands that print rows and may write them to a file."""

import argparse
from collections.abc import Sequence
from pathlib import Path


def json_file(about: str | None, argv: Sequence[str] | None) -> Path | None:
    """Parse a command's arguments; return the file that --json names."""
    parser = argparse.ArgumentParser(description=about,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file too")
    path: Path | None = parser.parse_args(argv).json
    return path
