"""Draws the picture on the first page: a feed-forward block of MiniMind 26M, as it is rewritten.

    python benchmarks/draw.py [FILE.svg]
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import lorafx
from common.minimind import Config, MiniMind

PICTURE = Path(__file__).with_name("block.svg")


def main(argv: Sequence[str] | None = None) -> None:
    """Write it, by default in the place of the one that is shown."""
    paths = sys.argv[1:] if argv is None else argv
    with torch.device("meta"):
        base = MiniMind(Config(hidden=512, layers=8, heads=8, kv_heads=2, vocabulary=6400))
    model = lorafx.inject(base, rank=8, alpha=16, targets="linear", exclude="head")
    lorafx.draw(model, paths[0] if paths else PICTURE, "layers.0.feed_forward")


if __name__ == "__main__":
    main()
