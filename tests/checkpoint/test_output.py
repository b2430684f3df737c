"""Merging on a disk beside other files: what is read, replaced, carried along, and refused."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

import lorafx
from tests.support.checkpoints import SHARD, files
from tests.support.command_line import MERGE, interrupted, main, refused
from tests.support.internals import INDEX, STATE, replace_internal
from tests.support.oracle import randomise


# Weights that are not merged.

def test_a_folder_that_holds_its_weights_twice(small, capsys):
    names = [
        "adapter_config.json", "consolidated.safetensors", "flax_model.msgpack",
        "model.fp16.safetensors", "model.safetensors", "pytorch_model-00001-of-00001.bin",
        "pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5"
    ]
    for name in names:
        Path("base", name).write_bytes(b"{}")
        assert f"'base' also holds '{name}': weights that would stay as they are" in refused(
            capsys, *MERGE
        )
        Path("base", name).unlink()
    for name in names:
        Path("base", name).write_bytes(b"{}")
    assert f"also holds {', '.join(map(repr, names))}: weights" in refused(capsys, *MERGE)


def test_a_folder_of_one_file_that_holds_its_weights_twice(small, capsys):
    Path("one").mkdir()
    for name in ("model.safetensors", "model.fp16.safetensors"):
        shutil.copy("base.safetensors", Path("one", name))
    assert "'one' also holds 'model.fp16.safetensors':" in refused(
        capsys, "merge", "one", *MERGE[2:]
    )
    Path("one/sub").mkdir()
    os.rename("one/model.fp16.safetensors", "one/sub/other.safetensors")
    Path("one/config.json").write_text(
        json.dumps({"transformers_weights": "sub/other.safetensors"})
    )
    assert "'one' also holds 'sub/other.safetensors':" in refused(
        capsys, "merge", "one", *MERGE[2:]
    )
    Path("one/config.json").write_text(json.dumps({"transformers_weights": "model.safetensors"}))
    assert main(["merge", "one", *MERGE[2:]]) == 0


def test_other_files_are_carried_along(small):
    for name in (
        "2_Dense/model.safetensors",
        "onnx/model.onnx",
        "training_args.bin",
        "adapter/adapter_config.json",
    ):
        Path("base", name).parent.mkdir(exist_ok=True)
        Path("base", name).write_bytes(name.encode())
    os.rename(Path("base", SHARD), Path("base/sub", SHARD))
    index = Path("base", INDEX)
    index.write_text(index.read_text().replace(SHARD, f"sub/{SHARD}"))
    assert main(MERGE) == 0
    before, after = files(Path("base")), files(Path("out"))
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == {f"sub/{SHARD}"}


# Files that are read, and those of others.

LINKS = {
    "a shard": (f"base/{SHARD}", f"out/{SHARD}"),
    "another file": ("base/config.json", "out/config.json"),
    "a link that is in the folder": (f"base/{SHARD}", "out/link"),
    "the adapter": ("a.safetensors", "out/a.safetensors"),
    "a file of the adapter": ("peft/adapter_model.safetensors", "out/adapter_model.safetensors"),
    "a shard in what is being written": (f"base/{SHARD}", "out.partial/new/x"),
}


@pytest.mark.parametrize("case", LINKS)
def test_links_into_what_would_be_replaced(small, case, capsys):
    source, target = map(Path, LINKS[case])
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    lorafx.save(randomise(lorafx.inject(net, rank=2, targets="linear")), "peft")
    for folder in ("out", "out.partial/new"):
        Path(folder).mkdir(parents=True)
    shutil.copy("base.safetensors", "out/model.safetensors")
    os.rename(source, "kept")
    if target.name == "link":
        target.symlink_to(Path("kept").resolve())
    else:
        shutil.copy("kept", target)
    source.symlink_to(target.resolve() if target.name != "link" else target.absolute())
    adapter = "peft" if source.parent.name == "peft" else "a.safetensors"
    said = refused(capsys, "merge", "base", adapter, "-o", "out", "--force")
    assert f"'{source}' is 'out' or in it, and would be replaced" in said


IN_THE_WAY: dict[str, Callable[[Path], object]] = {
    "a file": lambda path: path.write_text("mine"),
    "a link to a file": lambda path: path.symlink_to(Path("mine").resolve()),
    "a link to nothing": lambda path: path.symlink_to(Path("none").resolve()),
    "a link to a folder": lambda path: path.symlink_to(Path("empty").resolve()),
    "a folder": lambda path: (path.mkdir(), (path / "thesis.txt").write_text("mine")),
    "a folder of a checkpoint": lambda path: shutil.copytree("base", path),
    "a link as the state": lambda path: (
        path.mkdir(), (path / STATE).symlink_to(Path("mine").resolve())
    ),
}


@pytest.mark.parametrize("base", ["base", "base.safetensors", "base.pth"])
@pytest.mark.parametrize("case", IN_THE_WAY)
def test_what_no_merge_began_is_kept(small, base, case, capsys):
    Path("mine").write_text("mine")
    Path("empty").mkdir()
    out = "out" + Path(base).suffix
    IN_THE_WAY[case](Path(out + ".partial"))
    assert f"{out}.partial' is in the way, and no merge began it" in refused(
        capsys, "merge", base, "a.safetensors", "-o", out)


def test_names_of_any_kind(small, monkeypatch):
    for name in (
        "config.json.unfinished",
        "config.json.partial",
        "unfinished",
        "new",
        "old/new",
        "sub/new",
    ):
        Path("base", name).parent.mkdir(exist_ok=True)
        Path("base", name).write_text(name)
    assert main([*MERGE[:-1], "whole"]) == 0
    assert files(Path("whole")).keys() == files(Path("base")).keys()
    for after in range(len(files(Path("base")))):
        assert interrupted(monkeypatch, after, MERGE) == after
        assert main(MERGE) == 0
        assert files(Path("out")) == files(Path("whole")) and not os.path.exists("out.partial")
        shutil.rmtree("out")


def test_files_of_odd_kinds(small, monkeypatch, capsys):
    Path("base/none").mkdir()
    os.link("base/config.json", "config.json")
    os.link("base/sub/tokenizer.json", "base/again.json")
    os.symlink("base", "linked")
    assert main(["merge", "linked", "a.safetensors", "-o", "new/folders/out"]) == 0
    before, after = files(Path("base")), files(Path("new/folders/out"))
    assert before.keys() == after.keys() and after["again.json"] == before["sub/tokenizer.json"]
    assert not os.path.exists("new/folders/out/none")
    assert os.stat("new/folders/out/again.json").st_nlink == 1

    def forbidden(path, *mode):
        if Path(path).name == "again.json":
            raise PermissionError(13, "Permission denied", str(path))
        return open(path, *mode)

    with monkeypatch.context() as patch:
        replace_internal(patch, "open", forbidden)
        assert "Permission denied: 'base/again.json'" in refused(capsys, *MERGE)
    for name in ("t.safetensors/out", "t.safetensors/new/out"):
        assert "t.safetensors', which is not a folder" in refused(capsys, *MERGE[:-1], name)
    os.mkfifo("base/pipe")
    assert "'base/pipe' is not a file that can be carried along" in refused(capsys, *MERGE)


def test_permissions_are_those_of_the_base(small):
    os.chmod("base.safetensors", 0o400)
    assert main(["merge", "base.safetensors", "a.safetensors", "-o", "out.safetensors"]) == 0
    assert os.stat("out.safetensors").st_mode & 0o777 == 0o400


@pytest.mark.parametrize("base, old", [("base", "old"), ("base.safetensors", "old.safetensors")])
def test_a_link_at_the_output(small, base, old, capsys):
    out = Path("out" + Path(base).suffix)
    assert main(["merge", base, "t.safetensors", "-o", old]) == 0
    capsys.readouterr()
    out.symlink_to(old)
    for force in ([], ["--force"]):
        said = refused(capsys, "merge", base, "a.safetensors", "-o", str(out), *force)
        assert (
            f"'{out}' is a link to '{Path(old).resolve()}', which is there already: name that"
            in said
        )
    out.unlink()
    out.symlink_to("elsewhere" + out.suffix)
    assert main(["merge", base, "a.safetensors", "-o", str(out)]) == 0
    assert out.is_symlink() and Path(os.readlink(out)).exists()
    assert not [name for name in os.listdir() if "partial" in name]


def test_an_empty_folder_may_be_there(small):
    Path("out").mkdir()
    assert main(MERGE) == 0 and main([*MERGE[:-1], "other"]) == 0
    assert files(Path("out")) == files(Path("other"))
    Path("sub/out").mkdir(parents=True)
    assert main(["merge", "base.safetensors", *MERGE[2:-1], "sub/out"]) == 2
