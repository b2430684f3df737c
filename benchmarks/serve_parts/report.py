"""How the benchmark of serving shows its results: a table for each kind of case."""

from collections.abc import Mapping, Sequence
from typing import Any

from common.contenders import BASE, LORAFX, PEFT
from common.machine import in_words
from common.tables import aligned, interval, size
from serve_parts.compiled import COMPILED, EAGER, WAYS
from serve_parts.contenders import LOOP
from serve_parts.training import ONE

Cases = Sequence[Mapping[str, Any]]

SERVING = """\
Tokens a second are by medians. / PEFT and / loop are medians over rounds of their time over
lorafx's, with 95 % intervals; of PEFT's is what lorafx adds to the base's time as a share of what
PEFT adds. No way that computes the base first can be more than PEFT / base times as fast as PEFT,
which is the last column."""
SWITCHING = """\
Milliseconds of single calls, with two adapters in turn; `lorafx.using` is entered and left. What
the first forward after a switch takes more than the second is the median of differences, with its
95 % interval; the compiled one is what dynamo captures, run operator by operator."""
COMPILING = "Compiled / as it is are medians over rounds of ratios of tokens a second."


def rate(case: Mapping[str, Any], name: str) -> str:
    """A contender's tokens a second."""
    return f"{case['rows'] * case['tokens'] / case['results'][name]['median']:,.0f}"


def serving_table(cases: Cases) -> str:
    """A line for each batch that is served."""
    body, void = [], []
    for case in cases:
        results, faster = case["results"], case["faster"]
        rates = [rate(case, name) for name in (BASE, PEFT, LOOP, LORAFX)]
        most = results[PEFT]["median"] / results[BASE]["median"]
        body.append([case["label"], *rates, interval(faster[PEFT], 2), interval(faster[LOOP], 2),
                     interval(case["of_peft"], 2), f"{most:.2f}"])
        for name, row in results.items():
            if row["void"]:
                void.append(f"{case['label']}: {name} is void, {row['void']}")
    header = ["tokens a second", "base", "PEFT", "loop", "lorafx", "/ PEFT", "/ loop", "of PEFT's",
              "at most"]
    return "\n".join([aligned(header, body), *void])


def switching_table(cases: Cases) -> str:
    """A line for each verb, and what forwards take after a switch."""
    blocks = []
    for case in cases:
        body = [[name, f"{1000 * row['p50']:.3f}", f"{1000 * row['p99']:.3f}"]
                for name, row in case["results"].items()]
        lines = [f"{case['label']}, two adapters of {size(case['bytes'])}",
                 aligned(["ms", "p50", "p99"], body)]
        found = case["forwards"]
        more = interval([1000 * end for end in found["more"]], 3)
        lines.append(f"A forward takes {1000 * found['forward']:.1f} ms, and the first after a "
                     f"switch {more} more.")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def compiled_table(cases: Cases) -> str:
    """A line for each way to run a case."""
    body, void = [], []
    for case in cases:
        for way in WAYS:
            rates = [rate(case, f"{way}, {kind}") for kind in (EAGER, COMPILED)]
            body.append([f"{case['label']}: {way}", *rates, interval(case["faster"][way], 2)])
            if case["void"][way]:
                void.append(f"{case['label']}: {way} is void, {case['void'][way]}")
    header = ["tokens a second", EAGER, COMPILED, f"{COMPILED} / {EAGER}"]
    return "\n".join([aligned(header, body), *void])


def training_table(cases: Cases) -> str:
    """A line for each training step."""
    body, void = [], []
    for case in cases:
        least = [f"{1000 * case['results'][name]['least']:.1f}" for name in (ONE, LORAFX)]
        body.append([case["label"], *least, interval(case["over_one"], 2)])
        if case["void"]:
            void.append(f"{case['label']} is void, {case['void']}")
    return "\n".join([aligned(["ms", "one adapter", "all", "all / one"], body), *void])


# {kind of case: its table, and what is said of it}
TABLES = {"serving": (serving_table, SERVING), "switching": (switching_table, SWITCHING),
          "compiled": (compiled_table, COMPILING), "training": (training_table, "")}


def readme(results: Mapping[str, Any]) -> list[str]:
    """The section of benchmarks/README.md, from what the JSON file holds."""
    found = results["machine"]
    parts = [
        "`benchmarks/serve.py` takes the rows of a batch through adapters of their own: one token "
        "after 32 others, a prompt, one layer by itself, a training step; and it switches adapters "
        f"of a live model. {in_words(found, 'peft')}, in one thread, by its processor time, in "
        f"{results['seconds']:.0f} s, beside a load of {found['load_before']:.1f}:"]
    for kind, (table, legend) in TABLES.items():
        if results[kind]:
            parts += [table(results[kind]), " ".join(legend.split())]
    return [part for part in parts if part]
