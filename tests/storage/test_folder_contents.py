"""A PEFT folder that was saved over: its two files belong together, links and permissions stay."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import PeftModel

import lorafx
from tests.support.adapter_files import Model
from tests.support.adapters_by_kind import KINDS, OLD, adapted, cut, kind_of, old_bin
from tests.support.internals import DIGEST, WHOLE, internal, replace_internal


def test_what_is_read_meanwhile_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, models = tmp_path / "x", [adapted(kind) for kind in KINDS]
    lorafx.save(models[0], path)
    read, others = internal("read_safetensors"), models[1:]

    def late(file: Path) -> Any:
        while others:
            lorafx.save(others.pop(0), path)
        return read(file)

    replace_internal(monkeypatch, "read_safetensors", late)
    assert kind_of(path) == KINDS[2]


def test_a_config_of_another_adapter(tmp_path: Path) -> None:
    path = tmp_path / "x"
    lorafx.save(adapted(KINDS[0]), path)
    lorafx.save(adapted(KINDS[1]), path)
    config = json.loads((path / "adapter_config.json").read_text())
    for change in ({"lora_alpha": 5}, {"r": 9}):
        (path / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(
            lorafx.FormatError,
            match="was not written together with the adapter_config.json beside it",
        ):
            lorafx.load(Model(8), path)
    (path / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "mine"})
    )
    assert kind_of(path) == KINDS[1]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is missing or damaged"),
        ("[", "is missing or damaged"),
        ('{"peft_type": "LOHA"}', "lorafx reads 'LORA'"),
        ('{"peft_type": "LORA", "r": 9}', "was not written together"),
    ],
)
def test_a_config_in_the_tensors_that_lies(tmp_path: Path, text: str, message: str) -> None:
    cut(tmp_path)
    with safetensors.safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        tensors, header = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    assert kind_of(tmp_path) == OLD
    safetensors.torch.save_file(
        tensors, tmp_path / "adapter_model.safetensors", header | {WHOLE: text}
    )
    with pytest.raises(lorafx.FormatError, match=message):
        lorafx.load(Model(8), tmp_path)


def test_an_older_file_beside_a_newer_adapter(tmp_path: Path) -> None:
    old_bin(tmp_path / "x")
    assert kind_of(tmp_path / "x" / "adapter_model.bin") == kind_of(tmp_path / "x") == OLD
    lorafx.save(adapted((3, 27.0, 2.0)), tmp_path / "x")
    assert kind_of(tmp_path / "x") == (3, 27.0, 2.0)
    with pytest.raises(
        lorafx.FormatError, match="bin' is of an older adapter than adapter_model.safetensors and"
    ):
        lorafx.load(Model(8), tmp_path / "x" / "adapter_model.bin")


def test_the_header_and_what_stays(tmp_path: Path) -> None:
    path = tmp_path / "x"
    lorafx.save(adapted(KINDS[0]), path)
    assert header_of(path).keys() == {"format", DIGEST}
    lorafx.save(adapted(KINDS[1]), path)
    assert header_of(path)[WHOLE] == (path / "adapter_config.json").read_text()
    base, x = Model(8), torch.randn(3, 8)
    torch.testing.assert_close(
        PeftModel.from_pretrained(copy.deepcopy(base), path)(x), lorafx.load(base, path)(x)
    )
    config = (path / "adapter_config.json").stat()
    model = adapted(KINDS[1])
    with torch.no_grad():
        model.up.lora.default.A.fill_(5.0)
    lorafx.save(model, path)
    assert header_of(path).keys() == {"format", DIGEST}
    assert (path / "adapter_config.json").stat() == config  # equal, and so not written again
    assert lorafx.load(Model(8), path).up.lora.default.A.unique() == 5.0


def header_of(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path / "adapter_model.safetensors", "pt") as file:
        return file.metadata()


def test_links_and_permissions(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "x").symlink_to(tmp_path / "far" / "real")  # to nothing
    lorafx.save(adapted(KINDS[0]), tmp_path / "x")
    assert (tmp_path / "x").is_symlink() and kind_of(tmp_path / "far" / "real") == KINDS[0]
    assert os.listdir(tmp_path / "far") == ["real"]
    tensors = tmp_path / "far" / "real" / "adapter_model.safetensors"
    tensors.rename(tmp_path / "blob")
    tensors.symlink_to(tmp_path / "blob")
    (tmp_path / "blob").chmod(0o600)
    lorafx.save(adapted(KINDS[1]), tmp_path / "x")
    assert tensors.is_symlink() and kind_of(tmp_path / "x") == KINDS[1]
    assert (tmp_path / "blob").stat().st_mode & 0o777 == 0o600
    assert sorted(os.listdir(tmp_path)) == ["blob", "far", "x"]
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(
        OSError, match="loop' cannot be written, and stays as it was: Too many levels"
    ):
        lorafx.save(adapted(KINDS[1]), tmp_path / "loop")
    assert (tmp_path / "loop").is_symlink()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_what_is_in_the_way(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(lorafx.FormatError, match=f"{name}' is in the way"):
        lorafx.save(adapted(KINDS[0]), tmp_path)
    assert os.listdir(tmp_path) == [name]
