"""Names of adapters and paths of files that would lead elsewhere."""

from pathlib import Path

import pytest
from torch import nn

import lorafx
from tests.support.adapter_files import Model, edit, edit_about, injected


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "a\\b", "c:", "a\nb", "a\x00", "x" * 300, "", ".", "_x", "train"]
)
def test_names_that_lead_elsewhere(tmp_path: Path, name: str) -> None:
    lorafx.save(injected(), tmp_path / "a.safetensors")
    for call in (lambda: lorafx.inject(Model(), adapter=name),
                 lambda: lorafx.load(Model(), tmp_path / "a.safetensors", name)):
        with pytest.raises(lorafx.ConfigError, match="cannot name an adapter"):
            call()
    edit(tmp_path / "a.safetensors", edit_about(name=name))
    with pytest.raises(lorafx.FormatError, match="cannot name an adapter"):
        lorafx.load(Model(), tmp_path / "a.safetensors")


@pytest.mark.parametrize("act", [lorafx.save, lorafx.load])
@pytest.mark.parametrize("ending", [".safetensors", ".pth", ""])
def test_a_path_with_a_nul(act: object, ending: str) -> None:
    model = lorafx.inject(nn.Linear(4, 4), rank=2)
    with pytest.raises(lorafx.FormatError, match=r"No path has a NUL character, as 'a\\x00b.* has"):
        act(model, "a\0b" + ending)
