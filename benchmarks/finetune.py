"""The whole LoRA workflow on real text, without any download: pre-train, adapt, save, load, switch, compose, merge.

A small byte-level MiniMind is pre-trained on the source code of Python's standard library and kept in checkpoints/.
`lorafx.inject` then gives it one adapter for English prose and one for a table (texts.py says what these are), each
trained with everything else frozen. Every stage is checked against the one before it, and full fine-tuning of the same
model on the same batches stands beside. Losses are held-out, in nats per byte.

    python benchmarks/finetune.py

takes one to two minutes on two CPU cores, prints one table, and writes adapters, results.json and losses.png to out/.
While an adapter trains, its state is kept in out/unfinished/; after a crash --resume goes on from there, to the same
bits.
"""

import argparse
import json
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import openmp  # noqa: F401 (before torch)
import keep
import report
import texts
import torch
import workflow
from training import Run
from workflow import Bench

# LoRA's usual 1e-4 is for thousands of steps. This run has 80, so each of them must move A and B further.
LORA_RATE = 2e-2


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def option(name: str, default: Any, text: str) -> None:
        parser.add_argument(name, type=type(default), default=default, help=f"{text} (default: {default})")

    option("--rank", 8, "rank of the adapters")
    parser.add_argument("--targets", nargs="+", default=["square"], metavar="PATTERN",
                        help="linear layers to adapt: square, linear (all), or names such as q_proj (default: square)")
    option("--rate", LORA_RATE, "learning rate of the adapters, at its highest")
    option("--steps", 80, "training steps of each fine-tuning")
    option("--pretrain-steps", 250, "training steps of the base model")
    option("--hidden", 128, "width of the base model, a multiple of 8")
    option("--layers", 3, "depth of the base model")
    option("--batch", 32, "windows of text in a step")
    option("--length", 64, "bytes in a window")
    option("--seed", 0, "of all random numbers; the same seed gives the same losses")
    option("--device", "cuda" if torch.cuda.is_available() else "cpu", "where to train")
    option("--out", Path("out"), "folder for the adapters, the numbers and the picture")
    option("--checkpoints", Path("checkpoints"), "folder of the pre-trained base model, which later runs use again")
    option("--save-every", 10, "steps after which the training of an adapter is kept, so that --resume can go on")
    parser.add_argument("--resume", action="store_true", help="go on with the adapters of a run that was stopped")
    parser.add_argument("--check-learning", action=argparse.BooleanOptionalAction, default=True,
                        help="fail unless each adapter learns its own text; turn it off for runs too short to learn")
    return parser.parse_args(argv)


def run(bench: Bench) -> tuple[list[float], dict[str, dict[str, Run]]]:
    """All stages in order: the losses of pre-training, and {text: {how it was trained: Run}}."""
    path = workflow.checkpoint(bench)
    if not path.exists():
        workflow.pretrain(bench, path)
    base = workflow.fresh_base(bench, path)
    before = workflow.snapshot(base)
    bench.add_row("base", base, path)
    model, lora = workflow.adapt(bench, base, path)
    loaded = workflow.save_and_load(bench, model, lora, path)
    workflow.compose(bench, loaded)
    workflow.merge(bench, loaded)
    full = workflow.full_finetune(bench, base)
    workflow.check_base(bench, model, base, before)
    losses = torch.load(path, map_location="cpu", weights_only=True)["losses"]
    return losses, {text: {"LoRA": lora[text], "full": full[text]} for text in lora}


def record(bench: Bench, pretraining: Sequence[float], runs: Mapping[str, Mapping[str, Run]]) -> dict[str, Any]:
    """All results as plain data."""
    return {
        "options": {name: value if isinstance(value, (int, float, list)) else str(value)
                    for name, value in vars(bench.options).items()},
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        "threads": torch.get_num_threads(),
        "models": bench.rows,
        "checks": bench.checks,
        "pretraining": list(pretraining),
        "runs": {text: {way: vars(run) for way, run in by_way.items()} for text, by_way in runs.items()},
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run everything, print the table and write the files; returns what results.json holds."""
    began = time.perf_counter()
    options = parse(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(options, {text.name: text for text in map(texts.read, (texts.prose, texts.table, texts.code))})
    if not options.resume:
        keep.forget(options)
    pretraining, runs = run(bench)
    report.draw(options.out / "losses.png", pretraining, runs)
    print(report.summary(bench.rows, options.device))
    print(workflow.check_learning(bench) if options.check_learning
          else "Whether the adapters learned was not checked (--no-check-learning).")
    results = record(bench, pretraining, runs) | {"seconds": time.perf_counter() - began}
    (options.out / "results.json").write_text(json.dumps(results, indent=1))
    keep.forget(options)
    print(f"{len(bench.checks)} checks passed. {results['seconds']:.0f} s in all. Files are in {options.out}/.")
    return results


if __name__ == "__main__":
    main()
