"""How coverage is shown: a line for each architecture, and the numbers of all."""

import datetime
import importlib.metadata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from common.tables import aligned
from coverage_parts.checks import Adapted
from coverage_parts.rows import Row

VERSIONS = ("torch", "transformers", "peft", "lorafx")
HEADER = ("architecture", "sites", "adapted", "skipped", "regions", "breaks", "unused", "identity",
          "no silent", "PEFT: layers", "unused", "identity", "no silent", "s", "note")


def table(rows: Sequence[Row]) -> str:
    """A line for each architecture that was built."""
    body = []
    for row in rows:
        if row.built:
            own = row.lorafx
            counts = (own.sites, own.layers, len(own.skipped), own.regions, len(own.breaks))
            body.append([row.name, *map(shown, counts), *judged(own), shown(row.peft.layers),
                         *judged(row.peft), f"{row.seconds:.1f}", row.note()])
    return aligned(HEADER, body)


def judged(found: Adapted) -> tuple[str, str, str]:
    """How many layers the model does not use, and whether the library passed."""
    return str(len(found.unused)), verdict(found.identical()), verdict(found.no_silent())


def shown(count: int | None) -> str:
    """A number, or what stands for none."""
    return "-" if count is None else str(count)


def verdict(passed: bool | None) -> str:
    """pass, FAIL, or what stands for neither."""
    return {None: "-", True: "pass", False: "FAIL"}[passed]


def of(verdicts: Iterable[bool | None]) -> str:
    """How many passed, of those that were found out."""
    known = [passed for passed in verdicts if passed is not None]
    return f"{sum(known)} of {len(known)}"


def numbers(rows: Sequence[Row]) -> str:
    """How many architectures came how far, and how many of them either library passed."""
    built = [row for row in rows if row.built]
    run = [row for row in rows if row.stage == "run"]
    without_class = sum(row.stage == "no class" for row in rows)
    larger = sum(row.size != "tiny" for row in built)
    body = []
    for index, name in enumerate(("lorafx", "PEFT")):
        made = [row.libraries[index][1] for row in built]
        found = [row.libraries[index][1] for row in run]
        body.append([name, str(sum(one.layers or 0 for one in made)),
                     str(sum(one.layers or 0 for one in found)),
                     str(sum(bool(one.error) for one in found)),
                     of(one.identical() for one in found), of(one.no_silent() for one in found),
                     str(sum(len(one.silent) for one in found)),
                     str(sum(len(one.unused) for one in found))])
    header = ["", "adapted: of built", "of run", "raised", "identity", "no silent layer",
              "silent layers", "unused layers"]
    return "\n".join([
        f"{len(rows):5} architectures have a config in transformers",
        f"{without_class:5} of them are parts that no Auto class makes a model of",
        f"{len(built):5} built, {larger} of them less small than the others",
        f"{len(run):5} run", "", aligned(header, body)])


def summary(rows: Sequence[Row]) -> str:
    """The numbers, and each failure in one line."""
    built = [row for row in rows if row.built]
    lines = [numbers(rows), ""]
    late = []
    for index, name in enumerate(("lorafx", "PEFT")):
        failed = []
        for row in built:
            found = row.libraries[index][1]
            failed += [(row.name, problem) for problem in found.problems()]
            if not found.finished and not found.error:
                late.append(f"  {row.name}: {name}")
        lines.append(f"{name} failed on {len({row for row, _ in failed})} architectures:")
        lines += [f"  {row}: {problem}" for row, problem in failed]
        lines.append("")
    lines += ["not all checks made within the time limit:", *late, ""]
    for stage, title in (("built", "built, not run"), ("not built", "not built")):
        reasons = [f"  {row.name}: {row.reason}" for row in rows if row.stage == stage]
        lines += [f"{title}:", *reasons, ""]
    return "\n".join([*lines, f"{versions()}; {datetime.date.today()}"])


def versions() -> str:
    """The libraries' versions, in words."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in VERSIONS)


NOTE = """\
Compared are the architectures with something to adapt that give the same output twice; a layer is
unused if moving its weight changes nothing. With gradients the original is frozen, or trains the
adapted weights: ATen picks kernels by the flag of a weight, and by whether an attention mask
requires a gradient."""


def readme(results: Mapping[str, Any]) -> list[str]:
    """The section of benchmarks/README.md, from what the JSON file holds."""
    rows = []
    for values in results["rows"]:
        adapted = {name: Adapted(**values[name]) for name in ("lorafx", "peft")}
        rows.append(Row(**{**values, **adapted}))
    raised = []
    for row in rows:
        if row.lorafx.error:
            raised.append(f"{row.name} ({row.lorafx.error.partition(':')[0]})")
    why = f"lorafx raised on {len(raised)}: {', '.join(raised)}. " if raised else ""
    return ["`benchmarks/coverage.py` builds every architecture that transformers can make from a "
            "small config, injects into all linear calls with lorafx and with PEFT's `all-linear`, "
            "and checks that the output before training is the original's bit for bit (in eval, in "
            "train, and in train with gradients), and that every adapter at a weight that the "
            "model uses changes the output and gets a gradient. "
            f"In {results['seconds'] / 60:.0f} minutes, on {results['date']}, with "
            f"{results['versions']}:", numbers(rows), why + " ".join(NOTE.split())]
