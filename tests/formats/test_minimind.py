"""MiniMind's format: its keys, its dtype, and what it cannot hold."""

from pathlib import Path

import pytest
import torch

import lorafx
from tests.support.adapter_files import Model, injected


class TestMiniMind:
    def test_keys_dtype_and_folded_scale(self, tmp_path: Path) -> None:
        model = injected(alpha=6.0)
        lorafx.save(model, tmp_path / "out" / "lora" / "x_5.pth")
        stored = torch.load(tmp_path / "out" / "lora" / "x_5.pth", weights_only=True)
        assert set(stored) == {f"{s}.lora.{f}.weight" for s in ("up", "head") for f in "AB"}
        assert all(t.dtype == torch.float16 for t in stored.values())
        assert torch.equal(stored["up.lora.A.weight"], model.up.lora.default.A.half())
        assert torch.equal(
            stored["up.lora.B.weight"], (3.0 * model.up.lora.default.B.double()).half()
        )

    @pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module."])
    def test_a_file_saved_from_a_wrapped_model(self, tmp_path: Path, prefix: str) -> None:
        lorafx.save(injected(), tmp_path / "a.pth")
        torch.save(
            {prefix + k: v for k, v in torch.load(tmp_path / "a.pth").items()}, tmp_path / "b.pth"
        )
        base, x = Model(), torch.randn(4, 5)
        assert torch.equal(
            lorafx.load(base, tmp_path / "b.pth")(x), lorafx.load(base, tmp_path / "a.pth")(x)
        )

    def test_trains_on_in_the_base_precision(self, tmp_path: Path) -> None:
        lorafx.save(injected(), tmp_path / "a.pth")
        assert {p.dtype for p in lorafx.parameters(lorafx.load(Model(), tmp_path / "a.pth"))} == {
            torch.float32
        }

    def test_what_the_format_cannot_hold(self, tmp_path: Path) -> None:
        model = injected()
        with torch.no_grad():
            model.up.lora.default.A.fill_(70000.0)
        with pytest.raises(
            lorafx.FormatError, match=r"'up.lora.A.weight' exceeds float16's 65504; save to .*safe"
        ):
            lorafx.save(model, tmp_path / "a.pth")
        with pytest.raises(
            lorafx.FormatError, match="holds no base weights, such as the trained 'head.weight'"
        ):
            lorafx.save(lorafx.inject(Model(), trainable="head"), tmp_path / "a.pth")
        assert not list(tmp_path.iterdir())
