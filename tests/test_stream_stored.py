"""Merging on a disk where the file does not say how weights are stored, or what is tied: as in memory, or refused."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from oracle import randomise
from stream_files import error, read_folder, same, save_sharded
from test_stream import Turned
from torch import nn

import lorafx
from lorafx import _checkpoint, _merge, _shards
from lorafx.__main__ import main

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = [  # what PEFT and transformers say of each other, and of what is meant here
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def gpt2(tied: bool = False) -> nn.Module:
    """A model whose matrices are stored as (in, out), but for its head; saved in base."""
    config = transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, n_positions=8, bos_token_id=0,
                                     eos_token_id=0, tie_word_embeddings=tied)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained("base")
    return model


def llama(tied: bool) -> nn.Module:
    config = transformers.LlamaConfig(hidden_size=8, intermediate_size=12, num_hidden_layers=1, vocab_size=11,
                                      num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tied)
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained("base")
    return model


def last_error(capsys) -> str:
    """The last line on stderr, after what others say there."""
    return capsys.readouterr().err.splitlines()[-1]


def of_peft(model: nn.Module, **config) -> nn.Module:
    """The model that PEFT merges, from a folder `peft`."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=3, **config))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_()
    wrapped.save_pretrained("peft")
    return wrapped.merge_and_unload()


def close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() <= second.keys() and all(torch.allclose(first[n], second[n], atol=1e-5) for n in first)


@pytest.mark.parametrize("targets", [["attn.c_proj"], ["c_attn", "c_proj"]])
def test_square_matrices_that_peft_says_are_turned(targets):
    model = gpt2()
    wanted = of_peft(model, target_modules=targets).state_dict()
    assert main(["merge", "base", "peft", "-o", "out"]) == 0
    base = transformers.GPT2LMHeadModel.from_pretrained("base")
    loaded = lorafx.load(base, "peft")
    assert same(read_folder(), {name: lorafx.merge(loaded).state_dict()[name] for name in read_folder()})
    assert close(read_folder(), wanted) and not close(read_folder(), base.state_dict())
    lorafx.save(loaded, "ours")
    assert json.loads(Path("ours/adapter_config.json").read_text())["fan_in_fan_out"] is True
    assert main(["convert", "peft", "a.safetensors"]) == 0
    for adapter in ("ours", "a.safetensors"):
        assert main(["merge", "base", adapter, "-o", "out", "--force"]) == 0 and close(read_folder(), wanted)


def test_square_matrices_that_nothing_tells_are_refused(capsys):
    says = "does not say whether the square weight of 'transformer.h.0.attn.c_proj'"
    of_peft(gpt2(), target_modules=["attn.c_proj"])
    config = json.loads(Path("peft/adapter_config.json").read_text())
    for value in (False, None):
        Path("peft/adapter_config.json").write_text(json.dumps({**config, "fan_in_fan_out": value}))
        assert main(["merge", "base", "peft", "-o", "out"]) == 2 and says in last_error(capsys)
    of_peft(gpt2(), target_modules=["lm_head", "attn.c_proj"])  # PEFT's word is of the last, and others gainsay it
    assert main(["merge", "base", "peft", "-o", "out"]) == 2 and says in last_error(capsys)
    factors = {f"transformer.h.0.attn.c_proj.lora.{name}.weight": torch.ones(*shape)
               for name, shape in (("A", (2, 8)), ("B", (8, 2)))}
    torch.save(factors, "a.pth")
    assert main(["merge", "base", "a.pth", "-o", "out"]) == 2 and says in last_error(capsys)
    injected = lorafx.inject(gpt2(), 2, targets="c_proj")
    with pytest.raises(lorafx.FormatError, match="cannot say that the square weight of 'transformer.h.0.attn.c_proj'"):
        lorafx.save(injected, "a.pth")


def test_an_adapted_head_that_peft_saves_whole_too():
    wanted = of_peft(gpt2(), target_modules=["lm_head"]).state_dict()
    assert "base_model.model.lm_head.base_layer.weight" in safetensors.torch.load_file("peft/adapter_model.safetensors")
    assert main(["merge", "base", "peft", "-o", "out"]) == 0
    assert close(read_folder(), wanted) and not close(read_folder(), read_folder("base"))


def test_experts():
    """A stack of square matrices is told by others of the file alone."""
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Parameter(torch.randn(3, 6, 5)), nn.Parameter(torch.randn(3, 6, 6))

        def forward(self, x):
            return torch.bmm(torch.bmm(x, self.up.mT), self.down.mT)

    base = nn.Sequential(Experts())
    safetensors.torch.save_file(base.state_dict(), "base.safetensors")
    for targets, code in ((["0.down"], 2), (["0.down", "0.up"], 0)):
        model = randomise(lorafx.inject(base, 2, targets=targets))
        lorafx.save(model, "a.pth")
        assert main(["merge", "base.safetensors", "a.pth", "-o", "out.safetensors"]) == code
    assert same(safetensors.torch.load_file("out.safetensors"), lorafx.merge(lorafx.load(base, "a.pth")).state_dict())


# What goes by one name alone.

def test_a_whole_embedding_of_peft_in_a_tied_checkpoint(capsys):
    of_peft(llama(tied=False), target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    llama(tied=True)
    arguments = ["merge", "base", "peft", "-o", "out"]
    for untie in ([], ["--untie"]):
        assert main([*arguments, *untie]) == 2
        assert "The weight of 'model.embed_tokens' is tied to another that 'base' does not hold" in last_error(capsys)
    assert main(["convert", "peft", "a.safetensors"]) == 0
    assert main(["merge", "base", "a.safetensors", "-o", "out"]) == 2
    tensors = read_folder("base")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(tensors, "base/model.safetensors", {"format": "pt"})
    assert main(arguments) == 2 and "is tied to 'lm_head.weight' in 'base'" in last_error(capsys)
    assert main([*arguments, "--untie"]) == 0
    trained = safetensors.torch.load_file("peft/adapter_model.safetensors")
    out = read_folder()
    assert torch.equal(out["model.embed_tokens.weight"], trained["base_model.model.model.embed_tokens.weight"])
    assert torch.equal(out["lm_head.weight"], tensors["lm_head.weight"])
    assert json.loads(Path("out/config.json").read_text())["tie_word_embeddings"] is False


def test_a_whole_embedding_of_ours_is_both_of_a_tied_checkpoint():
    base = llama(tied=True)
    lorafx.save(randomise(lorafx.inject(base, 2, targets="q_proj", trainable="lm_head")), "a.safetensors")
    trained = safetensors.torch.load_file("a.safetensors")["model.embed_tokens.weight"]
    tensors = read_folder("base")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    shutil.rmtree("base")
    save_sharded(tensors, Path("base"), 3, base.config.to_dict())
    assert main(["merge", "base", "a.safetensors", "-o", "out"]) == 0
    out = read_folder()
    assert torch.equal(out["lm_head.weight"], trained) and torch.equal(out["model.embed_tokens.weight"], trained)
    assert (Path("out") / _checkpoint.INDEX).is_file()


def test_a_tensor_of_torch_save_with_two_names(capsys):
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    of_peft(net, target_modules=["0"], modules_to_save=["1"])
    state = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)).state_dict()
    old = state["2.weight"] = state["1.weight"]
    torch.save(state, "base.pth")
    assert main(["merge", "base.pth", "peft", "-o", "out.pth"]) == 2
    assert "'1.weight' of 'base.pth' is tied to '2.weight'" in last_error(capsys)
    assert main(["merge", "base.pth", "peft", "-o", "out.pth", "--untie"]) == 0
    out = torch.load("out.pth")
    assert torch.equal(out["2.weight"], old) and not torch.equal(out["1.weight"], old)


def test_a_folder_of_peft(tmp_path, capsys):
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6))
    model = randomise(lorafx.inject(net, 2, alpha=3, targets=["0", "2[1:4]"]))
    safetensors.torch.save_file(net.state_dict(), tmp_path / "base.safetensors")
    lorafx.save(model, tmp_path / "peft")
    assert main(["merge", *(str(tmp_path / name) for name in ("base.safetensors", "peft")),
                 "-o", str(tmp_path / "out.safetensors")]) == 0
    assert same(safetensors.torch.load_file(tmp_path / "out.safetensors"),
                lorafx.merge(lorafx.load(net, tmp_path / "peft")).state_dict())
    assert main(["show", str(tmp_path / "peft")]) == 0 and "'default' (PEFT), 2 sites" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "peft"), str(tmp_path / "a.safetensors")]) == 0
    assert main(["diff", str(tmp_path / "peft"), str(tmp_path / "a.safetensors")]) == 0
    assert main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "new")]) == 2
    assert "PEFT's format depends on the model" in capsys.readouterr().err


def test_minimind_files_say_no_orientation(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 6), Turned(6, 5), Turned(5, 5))
    model = randomise(lorafx.inject(base, rank=2, targets=["0", "1"]))
    lorafx.save(model, "a.pth")
    lorafx.save(randomise(lorafx.inject(base, rank=2, targets=["0", "2"])), "b.pth")
    torch.save(base.state_dict(), "base.pth")
    assert main(["merge", "base.pth", "a.pth", "-o", "out.pth"]) == 0
    assert same(torch.load("out.pth"), dict(lorafx.merge(lorafx.load(base, "a.pth")).state_dict()))
    assert main(["merge", "base.pth", "b.pth", "-o", "no.pth"]) == 2
    assert "whether the square weight of '0' is stored as (out, in) or, as others" in error(capsys)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_torch_save_wrote_is_summed_some_rows_at_a_time(monkeypatch, dtype):
    """And the archive is whole: every checksum is right, every storage where a mapping of the file wants it."""
    base = nn.Sequential(nn.Linear(1009, 5003), nn.Linear(5003, 1511), nn.Embedding(3, 1009)).bfloat16()
    lorafx.save(randomise(lorafx.inject(base, rank=5, targets=["0[700:4900]", "1"])), "a.safetensors")
    state = base.state_dict()
    state.update({"part": state["0.weight"].view(-1)[5:9], "turned": state["1.weight"].T, "none": torch.empty(0, 3)})
    torch.save(state, "base.pth")
    largest, summed = [], _shards.summed

    def watched(matrix, *arguments):
        largest.append(matrix.numel())
        return summed(matrix, *arguments)

    monkeypatch.setattr(_shards, "summed", watched)
    assert main(["merge", "base.pth", "a.safetensors", "-o", "out.pth", "--dtype", dtype, "--untie"]) == 0
    assert 0 < max(largest) <= _shards._BLOCKS * _merge._BLOCK < state["0.weight"].numel()
    wanted = lorafx.load(base.to(getattr(torch, dtype)), "a.safetensors")
    wanted = {**{name: tensor.to(getattr(torch, dtype)) for name, tensor in state.items()},
              **lorafx.merge(wanted).state_dict()}
    assert torch.load("out.pth")._metadata == state._metadata
    assert same(torch.load("out.pth"), wanted) and same(torch.load("out.pth", mmap=True), wanted)
    with zipfile.ZipFile("out.pth") as archive:
        assert archive.testzip() is None
