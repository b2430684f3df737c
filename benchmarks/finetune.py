"""The whole LoRA workflow on real text, without any download.

A small byte-level MiniMind is pre-trained on the source code of Python's standard library and kept
in checkpoints/. `lorafx.inject` then gives it one adapter for English prose and one for a table
(finetune_parts/texts.py says what these are), each trained with everything else frozen. They are
saved, loaded, switched, composed and merged. Every stage is checked against the one before it, and
full fine-tuning of the same model on the same batches stands beside. Losses are held-out, in nats
per byte.

    python benchmarks/finetune.py

takes one to two minutes on two CPU cores, prints one table, and writes adapters, results.json and
finetune.png to out/. While an adapter trains, its state is kept in out/unfinished/; after a crash
--resume goes on from there, to the same bits.

    torchrun --nproc-per-node 2 benchmarks/finetune.py --parallel fsdp2

does it in two processes, which share each batch, and prints the same losses: with ddp (the default)
each has the whole model, with fsdp2 a part of each weight.
"""

import argparse
import datetime
import json
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import common.kineto  # noqa: F401 (before torch)
import common.openmp  # noqa: F401 (before torch)
import torch

from finetune_parts import keep, picture, report, stages, texts
from finetune_parts.bench import Bench, checkpoint, fresh_base, snapshot
from finetune_parts.ranks import WAYS, together
from finetune_parts.training import Run

# LoRA's usual 1e-4 is for thousands of steps. This run has 80, so each must move A and B further.
LORA_RATE = 2e-2
Runs = dict[str, dict[str, Run]]  # {text: {"LoRA" or "full": Run}}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)

    def option(name: str, default: Any, text: str) -> None:
        parser.add_argument(name, type=type(default), default=default,
                            help=f"{text} (default: {default})")

    option("--rank", 8, "rank of the adapters")
    parser.add_argument("--targets", nargs="+", default=["square"], metavar="PATTERN",
                        help="linear layers to adapt: square, linear (all), or names such as "
                             "q_proj (default: square)")
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
    option("--checkpoints", Path("checkpoints"),
           "folder of the pre-trained base model, which later runs use again")
    option("--save-every", 10,
           "steps after which the training of an adapter is kept, so that --resume can go on")
    parser.add_argument("--parallel", choices=WAYS, default=WAYS[0],
                        help="how processes that torchrun starts train one model: each with all of "
                             "it, or each with a part of its weights (default: %(default)s)")
    parser.add_argument("--resume", action="store_true",
                        help="go on with the adapters of a run that was stopped")
    parser.add_argument("--check-learning", action=argparse.BooleanOptionalAction, default=True,
                        help="fail unless each adapter learns its own text; turn it off for runs "
                             "too short to learn")
    return parser.parse_args(argv)


def run(bench: Bench) -> tuple[list[float], Runs]:
    """All stages in order: the losses of pre-training, and the runs."""
    path = checkpoint(bench)
    bench.ranks.first_does(lambda: None if path.exists() else stages.pretrain(bench, path))
    base = fresh_base(bench, path)
    before = snapshot(base)
    bench.add_row("base", base, path)
    model, lora = stages.adapt(bench, base, path)
    loaded = stages.save_and_load(bench, model, lora, path)
    stages.compose(bench, loaded)
    stages.merge(bench, loaded)
    full = stages.full_finetune(bench, base)
    stages.check_base(bench, model, base, before)
    losses = torch.load(path, map_location="cpu", weights_only=True)["losses"]
    return losses, {text: {"LoRA": lora[text], "full": full[text]} for text in lora}


def record(bench: Bench, pretraining: Sequence[float],
           runs: Mapping[str, Mapping[str, Run]]) -> dict[str, Any]:
    """All results as plain data."""
    options, plain = {}, {}
    for name, value in vars(bench.options).items():
        options[name] = value if isinstance(value, (int, float, list)) else str(value)
    for text, by_method in runs.items():
        plain[text] = {method: vars(run) for method, run in by_method.items()}
    return {
        "options": options,
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        "date": str(datetime.date.today()),
        "processes": bench.ranks.count,
        "threads": bench.ranks.threads(),
        "models": bench.rows,
        "checks": bench.checks,
        "pretraining": list(pretraining),
        "runs": plain,
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run everything, print the table and write the files; returns what results.json holds."""
    began = time.perf_counter()
    options = parse(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    read = [texts.read(write) for write in (texts.prose, texts.table, texts.code)]
    with together(options.parallel, options.device, options.batch) as ranks:
        bench = Bench(options, {text.name: text for text in read}, ranks)
        if not options.resume:
            ranks.first_does(lambda: keep.forget(options))
        results = record(bench, *run(bench))
        results["seconds"] = time.perf_counter() - began
        ranks.first_does(lambda: write(bench, results))
    return results


def write(bench: Bench, results: dict[str, Any]) -> None:
    """Print the table, write the picture and the numbers; what was kept is not needed any more."""
    options = bench.options
    picture.draw(options.out / "finetune.png", results)
    print(report.summary(bench.rows, options.device))
    print(stages.check_learning(bench) if options.check_learning
          else "Whether the adapters learned was not checked (--no-check-learning).")
    (options.out / "results.json").write_text(json.dumps(results, indent=1))
    keep.forget(options)
    print(f"{len(bench.checks)} checks passed. {results['seconds']:.0f} s in all. "
          f"Files are in {options.out}/.")


if __name__ == "__main__":
    main()
