"""Every way in which a file can be wrong: an error that says it, and nothing is half done."""

import os
from pathlib import Path

import pytest
import torch

import lorafx
from tests.support.adapter_files import Model, edit, edit_about, injected

DAMAGE = {
    "missing half": (
        lambda t, h: t.pop("up.lora.A"), lorafx.FormatError,
        "has 'up.lora.B' but not its other half"
    ),
    "extra key": (
        lambda t, h: t.update(x=torch.zeros(1)), lorafx.FormatError,
        "has a tensor 'x', which is neither"
    ),
    "substring key": (
        lambda t, h: t.update({"up.lora.A.x": torch.zeros(1)}), lorafx.FormatError, "'up.lora.A.x'"
    ),
    "no tensors": (lambda t, h: t.clear(), lorafx.FormatError, "holds no adapter"),
    "nan": (
        lambda t, h: t["up.lora.A"].fill_(float("nan")), lorafx.FormatError,
        "'up.lora.A' has NaN or infinite"
    ),
    "ranks differ": (
        lambda t, h: t.update({"up.lora.A": torch.zeros(3, 5)}), lorafx.FormatError,
        r"at 'up', A \(3, 5\) and B \(5, 2\) are not \(rank, in\) and \(out, rank\)"
    ),
    "dtype": (
        lambda t, h: t.update({"up.lora.A": torch.zeros(2, 5, dtype=torch.int8)}),
        lorafx.FormatError, "int8"
    ),
    "shape": (
        lambda t, h: t.update({"up.lora.A": torch.zeros(2, 7)}), lorafx.MismatchError,
        "maps 7 to 5 features at 'up', but this model 5 to 5"
    ),
    "other site": (
        lambda t, h: (
            t.update({"upp.lora.A": t.pop("up.lora.A"), "upp.lora.B": t.pop("up.lora.B")}),
            h.update(adapter=h["adapter"].replace('"up"', '"upp"'))
        ),
        lorafx.MismatchError,
        "has an adapter at 'upp', but in this model there is no such site; near it: 'up'"
    ),
    "no header": (
        lambda t, h: h.clear(), lorafx.FormatError, "not written by lorafx.*header's format is None"
    ),
    "version": (
        lambda t, h: h.update(version="9"), lorafx.FormatError,
        "has format version '9', not 1: update lorafx"
    ),
    "header": (
        lambda t, h: h.update(adapter="{"), lorafx.FormatError, "The header of .* is damaged"
    ),
    "config": (
        edit_about(config={"dropuot": 1}), lorafx.FormatError, "holds 'dropuot', which this lorafx"
    ),
    "rank": (
        edit_about(config={"rank": 0, "dtype": None}), lorafx.FormatError,
        "rank must be an integer of at least"
    ),
    "scale": (
        edit_about(scales={"up": float("nan"), "head": 1.0}), lorafx.FormatError,
        "at 'up', the scale is nan"
    ),
    "no scale": (
        edit_about(scales={}), lorafx.FormatError, "The header of .* is damaged: KeyError"
    ),
    "name": (edit_about(name="../x"), lorafx.FormatError, "'../x' cannot name an adapter"),
    "trained": (
        lambda t, h: (
            t.update({"upp.weight": torch.zeros(5, 5)}), edit_about(trained=["upp.weight"])(t, h)
        ),
        lorafx.MismatchError, r"has a trained 'upp.weight' \(5, 5\), but this model has 'up.weight'"
    ),
    "trained shape": (
        lambda t, h: (
            t.update({"up.weight": torch.zeros(5, 4)}), edit_about(trained=["up.weight"])(t, h)
        ),
        lorafx.MismatchError, r"'up.weight' \(5, 4\), but this model has it as \(5, 5\)"
    ),
    "site missing": (
        lambda t, h: (t.pop("up.lora.A"), t.pop("up.lora.B")), lorafx.FormatError,
        "has 'up' in only one of its header and its tensors"
    ),
    "scale text": (
        edit_about(scales={"up": "2", "head": 1.0}), lorafx.FormatError, "at 'up', the scale is '2'"
    ),
    "other targets": (
        lambda t, h: h.update(adapter=h["adapter"].replace('["up", "head"]', '["up", "hat"]')),
        lorafx.FormatError, "has 'hat' in only one of"
    ),
    "deep header": (
        lambda t, h: h.update(adapter="[" * 10**5), lorafx.FormatError, "is damaged: RecursionError"
    ),
    "name type": (edit_about(name=5), lorafx.FormatError, "5 cannot name an adapter"),
}


class TestDamaged:
    @pytest.mark.parametrize("change, error, message", DAMAGE.values(), ids=DAMAGE)
    @pytest.mark.parametrize("live", [False, True], ids=["fresh", "live"])
    def test_nothing_is_half_done(
        self, tmp_path: Path, change: object, error: type, message: str, live: bool
    ) -> None:
        path = tmp_path / "a.safetensors"
        lorafx.save(injected(), path)
        edit(path, change)
        model = injected(adapter="here") if live else Model()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(error, match=message):
            lorafx.load(model, path)
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        assert before.keys() == model.state_dict().keys()

    @pytest.mark.parametrize("ending", [".safetensors", ".pth"])
    def test_truncated_or_missing(self, tmp_path: Path, ending: str) -> None:
        path = tmp_path / f"a{ending}"
        with pytest.raises(lorafx.FormatError, match="There is no file"):
            lorafx.load(Model(), path)
        lorafx.save(injected(), path)
        whole = path.read_bytes()
        for size in (0, 1, 7, 100, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.raises(lorafx.FormatError, match="damaged"):
                lorafx.load(Model(), path)

    def test_minimind_contents(self, tmp_path: Path) -> None:
        path = tmp_path / "a.pth"
        for content, message in [
            (torch.zeros(3), "holds a Tensor, not a dict of named tensors"),
            ({1: torch.zeros(3)}, "holds 1, a Tensor, where only named tensors are read"),
            ({"up.lora.A.weight": 3}, "holds 'up.lora.A.weight', a int, where only named"),
            ({}, "holds no adapter"),
            ({"up.weight": torch.zeros(5, 5)}, "has a tensor 'up.weight', which is neither"),
            (Model(), "damaged or holds more than tensors"),
        ]:
            torch.save(content, path)
            with pytest.raises(lorafx.FormatError, match=message):
                lorafx.load(Model(), path)

    def test_another_model_is_named_by_its_fingerprint(self, tmp_path: Path) -> None:
        lorafx.save(injected(), tmp_path / "a.safetensors")
        with pytest.raises(
            lorafx.MismatchError, match="made for another model: the fingerprint of its sites is"
        ):
            lorafx.load(Model(7), tmp_path / "a.safetensors")

    def test_unknown_endings(self, tmp_path: Path) -> None:
        path = tmp_path / "a.weights"
        for call in (lambda: lorafx.save(injected(), path), lambda: lorafx.load(Model(), path)):
            with pytest.raises(
                lorafx.FormatError, match="names no known format by its ending: use a folder .PEFT"
            ):
                call()
        (tmp_path / "a.pth").mkdir()
        with pytest.raises(lorafx.FormatError, match="is a folder: name a file in it"):
            lorafx.save(injected(), tmp_path / "a.pth")

    def test_a_failed_save_keeps_the_old_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "a.safetensors"
        lorafx.save(injected(), path)
        before = path.read_bytes()
        bad = injected()
        with torch.no_grad():
            bad.up.lora.default.B.fill_(float("inf"))
        with pytest.raises(
            lorafx.FormatError, match="cannot be saved to .*'up.lora.B' has NaN or infinite values"
        ):
            lorafx.save(bad, path)

        def broken(*_: object) -> None:
            raise OSError("disk full")

        monkeypatch.setattr(os, "fsync", broken)
        with pytest.raises(OSError, match="disk full"):
            lorafx.save(injected(), path)
        assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.safetensors"]

    def test_two_names_of_one_weight(self, tmp_path: Path) -> None:
        class Twice(Model):
            def __init__(self) -> None:
                super().__init__()
                self.again = self.up

        lorafx.save(lorafx.inject(Model(), targets="up"), tmp_path / "a.pth")
        stored = torch.load(tmp_path / "a.pth")
        torch.save(
            {**stored, **{k.replace("up", "again"): v for k, v in stored.items()}},
            tmp_path / "a.pth",
        )
        with pytest.raises(lorafx.MismatchError, match="has two adapters for the weight of 'up'"):
            lorafx.load(Twice(), tmp_path / "a.pth")
