"""A member of an archive that is marked as a folder is refused: torch would read none of it."""

import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import lorafx


def test_a_tensor_marked_as_a_folder_is_damage(tmp_path: Path) -> None:
    path, base = tmp_path / "adapter.pth", nn.Sequential(nn.Linear(4, 4))
    lorafx.save(lorafx.inject(base, rank=2), path)
    content = bytearray(path.read_bytes())
    name = content.rindex(b"archive/data/1")  # in the directory, where attributes stand before it
    assert content[name - 46:name - 42] == b"PK\x01\x02"
    content[name - 8] |= 0x10
    path.write_bytes(content)
    with pytest.raises(lorafx.FormatError, match="'archive/data/1' is marked as a folder"):
        lorafx.load(base, path)


def test_a_file_with_modes_of_another_system_is_read(tmp_path: Path) -> None:
    path, again = tmp_path / "adapter.pth", tmp_path / "again.pth"
    base = nn.Sequential(nn.Linear(4, 4))
    model = lorafx.inject(base, rank=2)
    lorafx.save(model, path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(again, "w") as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))  # with the mode 0o600
    x = torch.ones(1, 4)
    assert torch.equal(lorafx.load(base, again)(x), lorafx.load(base, path)(x))
