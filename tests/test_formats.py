"""Files: the two formats, what each keeps, and every way in which a file can be wrong."""

import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from oracle import randomise
from torch import nn

import lorafx


class Model(nn.Module):
    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.up = nn.Linear(width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.up(x)))


def injected(**config: object) -> nn.Module:
    return randomise(lorafx.inject(Model(), rank=2, targets="linear", **config))


class TestNative:
    def test_all_of_the_adapter_is_kept(self, tmp_path: Path) -> None:
        model = randomise(lorafx.inject(Model(), 4, targets="up", alpha=8, rank_pattern={"up": 3}, trainable="head",
                                        adapter="french"))
        lorafx.save(model, tmp_path / "a.safetensors")
        base = Model()
        loaded, x = lorafx.load(base, tmp_path / "a.safetensors"), torch.randn(4, 5)
        assert lorafx.adapters(loaded) == ["french"]
        assert loaded.up.lora.french.scale == 8 / 3
        assert torch.equal(loaded.head.weight, model.head.weight)
        assert not torch.equal(base.head.weight, model.head.weight)
        base.load_state_dict({k: v for k, v in lorafx.eject(model).state_dict().items()})
        assert torch.equal(loaded(x), model(x))
        lorafx.save(loaded, tmp_path / "b.safetensors")
        first, second = (safetensors.safe_open(tmp_path / f"{name}.safetensors", "pt") for name in "ab")
        assert first.metadata() == second.metadata()
        assert all(torch.equal(first.get_tensor(key), second.get_tensor(key)) for key in first.keys())

    def test_keys_and_header(self, tmp_path: Path) -> None:
        lorafx.save(injected(), tmp_path / "a.safetensors")
        with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
            assert sorted(file.keys()) == ["head.lora.A", "head.lora.B", "up.lora.A", "up.lora.B"]
            assert file.metadata()["format"] == "lorafx"
            assert json.loads(file.metadata()["adapter"])["config"]["targets"] == ["up", "head"]

    def test_only_the_adapter_is_written(self, tmp_path: Path) -> None:
        lorafx.save(injected(), tmp_path / "new" / "folder" / "a.safetensors")
        stored = safetensors.torch.load_file(tmp_path / "new" / "folder" / "a.safetensors")
        assert sum(t.numel() for t in stored.values()) == 2 * (5 + 5) + 2 * (5 + 3)
        assert os.listdir(tmp_path / "new" / "folder") == ["a.safetensors"]

    def test_a_model_that_is_one_linear(self, tmp_path: Path) -> None:
        base = nn.Linear(4, 4)
        model, x = randomise(lorafx.inject(base)), torch.randn(2, 4)
        for name in ("a.safetensors", "a.pth"):
            lorafx.save(model, tmp_path / name)
        assert torch.equal(lorafx.load(base, tmp_path / "a.safetensors")(x), model(x))
        assert set(torch.load(tmp_path / "a.pth")) == {"lora.A.weight", "lora.B.weight"}


class TestMiniMind:
    def test_keys_dtype_and_folded_scale(self, tmp_path: Path) -> None:
        model = injected(alpha=6.0)
        lorafx.save(model, tmp_path / "out" / "lora" / "x_5.pth")
        stored = torch.load(tmp_path / "out" / "lora" / "x_5.pth", weights_only=True)
        assert set(stored) == {f"{s}.lora.{f}.weight" for s in ("up", "head") for f in "AB"}
        assert all(t.dtype == torch.float16 for t in stored.values())
        assert torch.equal(stored["up.lora.A.weight"], model.up.lora.default.A.half())
        assert torch.equal(stored["up.lora.B.weight"], (3.0 * model.up.lora.default.B.double()).half())

    @pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module."])
    def test_a_file_saved_from_a_wrapped_model(self, tmp_path: Path, prefix: str) -> None:
        lorafx.save(injected(), tmp_path / "a.pth")
        torch.save({prefix + k: v for k, v in torch.load(tmp_path / "a.pth").items()}, tmp_path / "b.pth")
        base, x = Model(), torch.randn(4, 5)
        assert torch.equal(lorafx.load(base, tmp_path / "b.pth")(x), lorafx.load(base, tmp_path / "a.pth")(x))

    def test_trains_on_in_the_base_precision(self, tmp_path: Path) -> None:
        lorafx.save(injected(), tmp_path / "a.pth")
        assert {p.dtype for p in lorafx.parameters(lorafx.load(Model(), tmp_path / "a.pth"))} == {torch.float32}

    def test_what_the_format_cannot_hold(self, tmp_path: Path) -> None:
        model = injected()
        with torch.no_grad():
            model.up.lora.default.A.fill_(70000.0)
        with pytest.raises(lorafx.FormatError, match=r"'up.lora.A.weight' exceeds float16's 65504; save to .*safe"):
            lorafx.save(model, tmp_path / "a.pth")
        with pytest.raises(lorafx.FormatError, match="holds no base weights, such as the trained 'head.weight'"):
            lorafx.save(lorafx.inject(Model(), trainable="head"), tmp_path / "a.pth")
        assert not list(tmp_path.iterdir())


def edit(path: Path, change: object) -> None:
    """Rewrite a native file with its tensors and header passed through a function."""
    with safetensors.safe_open(path, "pt") as file:
        tensors, header = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    change(tensors, header)
    safetensors.torch.save_file(tensors, path, header)


def edit_about(**values: object) -> object:
    def change(tensors: dict, header: dict) -> None:
        about = json.loads(header["adapter"])
        about.update(values)
        header["adapter"] = json.dumps(about)
    return change


DAMAGE = {
    "missing half": (lambda t, h: t.pop("up.lora.A"), lorafx.FormatError, "has 'up.lora.B' but not its other half"),
    "extra key": (lambda t, h: t.update(x=torch.zeros(1)), lorafx.FormatError, "has a tensor 'x', which is neither"),
    "substring key": (lambda t, h: t.update({"up.lora.A.x": torch.zeros(1)}), lorafx.FormatError, "'up.lora.A.x'"),
    "no tensors": (lambda t, h: t.clear(), lorafx.FormatError, "holds no adapter"),
    "nan": (lambda t, h: t["up.lora.A"].fill_(float("nan")), lorafx.FormatError, "'up.lora.A' has NaN or infinite"),
    "ranks differ": (lambda t, h: t.update({"up.lora.A": torch.zeros(3, 5)}), lorafx.FormatError,
                     r"at 'up', A \(3, 5\) and B \(5, 2\) are not \(rank, in\) and \(out, rank\)"),
    "dtype": (lambda t, h: t.update({"up.lora.A": torch.zeros(2, 5, dtype=torch.int8)}), lorafx.FormatError, "int8"),
    "shape": (lambda t, h: t.update({"up.lora.A": torch.zeros(2, 7)}), lorafx.MismatchError,
              "maps 7 to 5 features at 'up', but this model 5 to 5"),
    "other site": (lambda t, h: (t.update({"upp.lora.A": t.pop("up.lora.A"), "upp.lora.B": t.pop("up.lora.B")}),
                                 h.update(adapter=h["adapter"].replace('"up"', '"upp"'))), lorafx.MismatchError,
                   "has an adapter at 'upp', but in this model there is no such site; near it: 'up'"),
    "no header": (lambda t, h: h.clear(), lorafx.FormatError, "not written by lorafx.*header's format is None"),
    "version": (lambda t, h: h.update(version="9"), lorafx.FormatError, "has format version '9', not 1: update lorafx"),
    "header": (lambda t, h: h.update(adapter="{"), lorafx.FormatError, "The header of .* is damaged"),
    "config": (edit_about(config={"dropuot": 1}), lorafx.FormatError, "holds 'dropuot', which this lorafx"),
    "rank": (edit_about(config={"rank": 0, "dtype": None}), lorafx.FormatError, "rank must be an integer of at least"),
    "scale": (edit_about(scales={"up": float("nan"), "head": 1.0}), lorafx.FormatError, "at 'up', the scale is nan"),
    "no scale": (edit_about(scales={}), lorafx.FormatError, "The header of .* is damaged: KeyError"),
    "name": (edit_about(name="../x"), lorafx.FormatError, "'../x' cannot name an adapter"),
    "trained": (lambda t, h: (t.update({"upp.weight": torch.zeros(5, 5)}), edit_about(trained=["upp.weight"])(t, h)),
                lorafx.MismatchError, r"has a trained 'upp.weight' \(5, 5\), but this model has 'up.weight'"),
    "trained shape": (lambda t, h: (t.update({"up.weight": torch.zeros(5, 4)}),
                                    edit_about(trained=["up.weight"])(t, h)),
                      lorafx.MismatchError, r"'up.weight' \(5, 4\), but this model has it as \(5, 5\)"),
    "site missing": (lambda t, h: (t.pop("up.lora.A"), t.pop("up.lora.B")), lorafx.FormatError,
                     "has 'up' in only one of its header and its tensors"),
    "scale text": (edit_about(scales={"up": "2", "head": 1.0}), lorafx.FormatError, "at 'up', the scale is '2'"),
    "other targets": (lambda t, h: h.update(adapter=h["adapter"].replace('["up", "head"]', '["up", "hat"]')),
                      lorafx.FormatError, "has 'hat' in only one of"),
    "deep header": (lambda t, h: h.update(adapter="[" * 10**5), lorafx.FormatError, "is damaged: RecursionError"),
    "name type": (edit_about(name=5), lorafx.FormatError, "5 cannot name an adapter"),
}


class TestDamaged:
    @pytest.mark.parametrize("change, error, message", DAMAGE.values(), ids=DAMAGE)
    @pytest.mark.parametrize("live", [False, True], ids=["fresh", "live"])
    def test_nothing_is_half_done(self, tmp_path: Path, change: object, error: type, message: str, live: bool) -> None:
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
        for content, message in [(torch.zeros(3), "does not hold a dict"), ({1: torch.zeros(3)}, "not hold a dict"),
                                 ({"up.lora.A.weight": 3}, "does not hold a dict"), ({}, "holds no adapter"),
                                 ({"up.weight": torch.zeros(5, 5)}, "has a tensor 'up.weight', which is neither"),
                                 (Model(), "damaged or holds more than tensors")]:
            torch.save(content, path)
            with pytest.raises(lorafx.FormatError, match=message):
                lorafx.load(Model(), path)

    def test_another_model_is_named_by_its_fingerprint(self, tmp_path: Path) -> None:
        lorafx.save(injected(), tmp_path / "a.safetensors")
        with pytest.raises(lorafx.MismatchError, match="made for another model: the fingerprint of its sites is"):
            lorafx.load(Model(7), tmp_path / "a.safetensors")

    def test_unknown_endings(self, tmp_path: Path) -> None:
        path = tmp_path / "a.bin"
        for call in (lambda: lorafx.save(injected(), path), lambda: lorafx.load(Model(), path)):
            with pytest.raises(lorafx.FormatError, match="names no known format by its ending: use a folder .PEFT"):
                call()
        (tmp_path / "a.pth").mkdir()
        with pytest.raises(lorafx.FormatError, match="is a folder: name a file in it"):
            lorafx.save(injected(), tmp_path / "a.pth")

    def test_a_failed_save_keeps_the_old_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "a.safetensors"
        lorafx.save(injected(), path)
        before = path.read_bytes()
        bad = injected()
        with torch.no_grad():
            bad.up.lora.default.B.fill_(float("inf"))
        with pytest.raises(lorafx.FormatError, match="cannot be saved to .*'up.lora.B' has NaN or infinite values"):
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
        torch.save({**stored, **{k.replace("up", "again"): v for k, v in stored.items()}}, tmp_path / "a.pth")
        with pytest.raises(lorafx.MismatchError, match="has two adapters for the weight of 'up'"):
            lorafx.load(Twice(), tmp_path / "a.pth")
