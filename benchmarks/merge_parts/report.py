"""How the merge benchmark shows its results: speeds, roundings, the merged model's own speed."""

from collections.abc import Mapping, Sequence
from typing import Any

from common.machine import in_words
from common.tables import aligned, interval
from merge_parts.run import CLONE, COPY, LORAFX, PEFT

LEGEND = """\
GB/s: each adapted weight read once and written once, over the median time. x PEFT, of clone, of
copy_: medians over rounds of ratios of speeds, with 95 % intervals. Forward is timed in the same
rounds as the untouched base's."""


def table(cases: Sequence[dict[str, Any]]) -> str:
    """The speeds of merging, a line for each case."""
    body, void = [], []
    for case in cases:
        rows = case["rows"]
        speeds = [f"{rows[name]['rate'] / 1e9:.2f}" for name in (CLONE, COPY, PEFT, LORAFX)]
        body.append([case["label"], *speeds, interval(case["faster_than_peft"], 2),
                     interval(case["of_clone"], 2), f"{case['of_copy'][0]:.2f}"])
        for name, row in rows.items():
            if row.get("void"):
                void.append(f"{case['label']}: {name} is void, {row['void']}")
    header = ["GB/s", "clone", "copy_", "PEFT", "lorafx", "x PEFT", "of clone", "of copy_"]
    return "\n".join([aligned(header, body), *void])


def rounding(cases: Sequence[dict[str, Any]]) -> str:
    """How merged weights are rounded, a line for each case in a narrow dtype."""
    body = []
    for case in cases:
        if case["dtype"] != "float32":
            shares = [case["rows"][name]["not_nearest"] for name in (PEFT, LORAFX)]
            body.append([case["label"], *(f"{100 * share:.2f} %" for share in shares)])
    return aligned(["entries not rounded to nearest", "PEFT", "lorafx"], body)


def inference_table(cases: Sequence[dict[str, Any]]) -> str:
    """The merged model's forward over the base's, a line for each case in which it was timed."""
    body = []
    for case in cases:
        if case["inference"]:
            body.append([case["label"], *(interval(found) for found in case["inference"].values())])
    return aligned(["forward over the untouched base's", "a copy of the base", "merged"], body)


def tables(cases: Sequence[dict[str, Any]]) -> str:
    """All three."""
    return f"{table(cases)}\n\n{rounding(cases)}\n\n{inference_table(cases)}"


def readme(results: Mapping[str, Any]) -> list[str]:
    """The paragraphs and tables about merging, from what the benchmark's JSON file holds."""
    return [f"`benchmarks/merge.py` folds adapters into the weights. "
            f"{in_words(results['machine'], 'peft')}:",
            tables(results["rows"]), " ".join(LEGEND.split())]
