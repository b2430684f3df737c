"""A file is a function of what is saved: one adapter gives the same bytes in every process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lorafx
from tests.support.saved_files import native, two_adapters, write

ROOT = Path(__file__).parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    """{name: content} of all files below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def by_processes(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What processes saved whose hashes of strings differ."""
    folder, running = tmp_path_factory.mktemp("saved"), []
    for seed in ("1", "2"):
        command = [sys.executable, "-m", "tests.support.saved_files", str(folder / seed)]
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        running.append(subprocess.Popen(command, cwd=ROOT, env=environment))
    assert [process.wait() for process in running] == [0, 0]
    return [folder / seed for seed in ("1", "2")]


@pytest.mark.parametrize("file", [
    "native.safetensors", "unusual.safetensors", "training.safetensors", "minimind.pth",
    "peft/adapter_model.safetensors", "peft/adapter_config.json",
    "peft/french/adapter_model.safetensors", "peft/french/adapter_config.json"])
def test_in_several_processes(by_processes: list[Path], file: str) -> None:
    first, *others = (folder / file for folder in by_processes)
    for other in others:
        assert other.read_bytes() == first.read_bytes()


def test_in_one_process(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name)
    first = contents(tmp_path / "a")
    assert len(first) == 8 and contents(tmp_path / "b") == first


def test_over_another_config(tmp_path: Path) -> None:
    """The header then holds the config that was there, and the new one."""
    for name in ("a", "b"):
        lorafx.save(two_adapters(), tmp_path / name, "default")
        model = two_adapters()
        lorafx.remove(model, "default")
        lorafx.add(model, "default", 1, targets="up")
        for parameter in lorafx.parameters(model, "default"):
            parameter.data.fill_(0.5)
        lorafx.save(model, tmp_path / name, "default")
    assert b"lorafx_config_before" in (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_loaded_adapter_is_saved_as_it_was(tmp_path: Path) -> None:
    lorafx.save(native(), tmp_path / "a.safetensors")
    base = lorafx.eject(native())
    lorafx.save(lorafx.load(base, tmp_path / "a.safetensors"), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
