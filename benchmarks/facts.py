"""What PEFT and lorafx do in the same small cases; this is the table on the project's first page.

In most cases the right result is known: the base model with W + s B A in the place of W. Measured
is how much of what the adapter should change is wrong, |y - y_true| / |y_true - y_base|: 100 %
means that the adapter has no effect at all. All numbers are seeded, none is a time.

    python benchmarks/facts.py [--json FILE]
"""

import json
import warnings
from collections.abc import Mapping, Sequence

import peft

from common.arguments import json_file
from common.tables import aligned
from facts_parts.cases import CASES


def rows() -> list[dict[str, str]]:
    """Each case: what it is, what is measured, what PEFT and lorafx give."""
    found = []
    for case in CASES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT warns of is measured
            theirs, ours = case.measure()
        found.append({"case": case.name, "measured": case.measured, "PEFT": theirs, "lorafx": ours})
    return found


def table(found: Sequence[Mapping[str, str]]) -> str:
    """The rows as text."""
    header = ["", "measured", f"PEFT {peft.__version__}", "lorafx"]
    body = [[row["case"], row["measured"], row["PEFT"], row["lorafx"]] for row in found]
    return aligned(header, body, left=2)


def readme(found: Sequence[Mapping[str, str]]) -> list[str]:
    """The section of benchmarks/README.md, from what the JSON file holds."""
    return ["`benchmarks/facts.py` puts adapters through PEFT and lorafx where the right result is "
            "known, the base model with W + s B A in the place of W. The error is "
            "|y - y_true| / |y_true - y_base|: at 100 % the adapter has no effect.", table(found)]


def main(argv: Sequence[str] | None = None) -> list[dict[str, str]]:
    """Measure and print; returns the rows."""
    path = json_file(__doc__, argv)
    found = rows()
    print(table(found))
    if path is not None:
        path.write_text(json.dumps(found, indent=1))
    return found


if __name__ == "__main__":
    main()
