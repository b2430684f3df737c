"""Tables as text."""

from collections.abc import Sequence


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table whose first `left` columns are set to the left, and all others to the right."""
    table = [header, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    lines = []
    for row in table:
        cells = []
        for column, (cell, width) in enumerate(zip(row, widths)):
            cells.append(cell.ljust(width) if column < left else cell.rjust(width))
        lines.append("  ".join(cells))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def size(count: float) -> str:
    """Bytes in the largest unit that leaves at least 1: 12.3 MB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def interval(found: Sequence[float] | None, digits: int = 3) -> str:
    """An estimate and its 95 % interval: 1.234 [1.201, 1.302]."""
    if found is None:
        return "-"
    middle, low, high = found
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
