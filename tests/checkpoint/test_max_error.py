"""What rounding loses of a merge on disk: told after it, and refused before it, by site."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lorafx
from tests.checkpoint.test_oracle import (
    DTYPES, WEIGHTS, Model, exact_sums, read, write_adapters, write_base)
from tests.support.checkpoints import files, small_files
from tests.support.command_line import interrupted, main, refused
from tests.support.internals import internal, replace_internal, watch_sums
from tests.support.oracle import randomise

ROWS = {"qkv[q]": slice(0, 11), "qkv[0:5]": slice(0, 5), "qkv[7:20]": slice(7, 20)}
SITES = ["qkv[q]", "qkv[0:5]", "qkv[7:20]", "turned", "square", "experts", "back"]


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each merge reports."""
    made: list[Any] = []
    merge = internal("merge")

    def reporting(*arguments: Any, **options: Any) -> Any:
        made.append(merge(*arguments, **options))
        return made[-1]

    replace_internal(monkeypatch, "merge", reporting)
    return made


def arguments(base: str, out: str, *more: str) -> list[str]:
    adapters = [f"--adapter={name}.safetensors={weight}" for name, weight in WEIGHTS.items()]
    return ["merge", base, "-o", out, *adapters, *more]


def truth(base: str, out: str) -> dict[str, float]:
    """|written - (W + D)| / |D| from the files, in float64."""
    before, after, errors = read(base), read(out), {}
    sums = exact_sums(before, WEIGHTS)
    for site in SITES:
        owner, rows = site.partition("[")[0], ROWS.get(site, slice(None))
        name = owner if owner in before else f"{owner}.weight"
        total, W = sums[name][0][rows], before[name].double().numpy()[rows]
        changed = after[name].double().numpy()[rows] - total
        errors[site] = float(np.linalg.norm(changed) / np.linalg.norm(total - W))
    return errors


@pytest.mark.parametrize("kind", ["safetensors", "pth", "folder"])
@pytest.mark.parametrize("dtype, to", [
    ("float32", None), ("bfloat16", None), ("float16", None), ("float32", "bfloat16")])
def test_what_was_lost_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, reports: list[Any], kind: str,
    dtype: str, to: str | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(5)
    model = Model().to(DTYPES[dtype])
    write_adapters(model, "abc")
    base, more = write_base(dict(model.state_dict()), kind), ["--dtype", to] if to else []
    out = "out" + Path(base).suffix
    assert main(arguments(base, out, *more)) == 0
    expected, found = truth(base, out), reports[0].errors
    assert found == pytest.approx(expected, rel=0.01)
    worst = max(found, key=lambda site: found[site])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"rounding lost at most {found[worst]:.3g} of s B A, at {worst}"
    bound = 0.999 * found[worst]
    said = refused(capsys, *arguments(base, f"other{out[3:]}", *more, f"--max-error={bound}"))
    assert f"at 1 of 7 sites: {found[worst]:.3g} at '{worst}'. Nothing is merged" in said
    assert main(arguments(base, out, *more, "--force", f"--max-error={found[worst]}")) == 0
    assert reports[1].errors == found  # nothing is noted twice


def test_what_an_interrupted_merge_wrote_is_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, reports: list[Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    small_files(tmp_path)
    merge = ["merge", "base", "a.safetensors", "-o", "out"]
    assert interrupted(monkeypatch, 2, merge) == 2
    sizes = watch_sums(monkeypatch)
    assert main(merge) == 0
    assert sizes == [24, 18] and sorted(reports[0].errors) == ["0", "1"]
    sizes.clear()
    assert main([*merge[:-1], "whole"]) == 0
    assert sizes == [24, 18] and reports[1].errors == reports[0].errors
    assert files(Path("out")) == files(Path("whole"))


def test_a_model_and_a_checkpoint_lose_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reports: list[Any]
) -> None:
    """Bit for bit, of a matrix that is read in several pieces."""
    monkeypatch.chdir(tmp_path)
    base = nn.Sequential(nn.Linear(1031, 4099)).bfloat16()
    model = randomise(lorafx.inject(base, 3, targets="0"))
    lorafx.save(model, "a.safetensors")
    write_base(dict(base.state_dict()), "safetensors")
    assert main(["merge", "base.safetensors", "a.safetensors", "-o", "out.safetensors"]) == 0
    assert reports[0].errors == lorafx.merge_error(model) and reports[0].errors["0"] > 1e-4


def test_nothing_is_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    base = nn.Sequential(nn.Linear(5, 5))
    lorafx.save(lorafx.inject(base, 2), "a.safetensors")
    write_base(dict(base.state_dict()), "safetensors")
    merge = ["merge", "base.safetensors", "a.safetensors", "-o", "out.safetensors"]
    assert main([*merge, "--max-error", "0"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "rounding lost at most 0 of s B A, at 0"
    for bound in ("-1", "nan", "much"):
        assert "is not a finite number of at least 0" in refused(
            capsys, *merge, "--force", f"--max-error={bound}")


class Products(TorchDispatchMode):
    """Counts the products that are added to something in place."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.addmm_.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype, size, times", [
    (torch.bfloat16, 1.0, 1), (torch.float16, 1.0, 1), (torch.bfloat16, 1e-5, 2),
    (torch.float32, 1.0, 2)])
def test_what_was_summed_is_not_summed_again_if_its_digits_tell_what_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, size: float, times: int
) -> None:
    monkeypatch.chdir(tmp_path)
    base = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)).to(dtype)
    model = randomise(lorafx.inject(base, 2))
    with torch.no_grad():
        for B in (model[0].lora.default.B, model[1].lora.default.B):
            B.mul_(size)
    lorafx.save(model, "a.safetensors")
    write_base(dict(base.state_dict()), "safetensors")
    with Products() as products:
        assert main(["merge", "base.safetensors", "a.safetensors", "-o", "out.safetensors"]) == 0
    assert products.count == 2 * times
