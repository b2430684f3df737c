"""One weight under two names: in the checkpoint, in the adapter, or in both."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import lorafx
from tests.support.checkpoints import read_folder, save_sharded
from tests.support.command_line import main
from tests.support.internals import INDEX
from tests.support.oracle import randomise
from tests.support.peft_checkpoints import close, gpt2, last_error, llama, of_peft

pytestmark = [
    pytest.mark.usefixtures("here"),
    # what PEFT and transformers say of each other, and of what is meant here
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")]


def test_an_adapted_head_that_peft_saves_whole_too():
    wanted = of_peft(gpt2(), target_modules=["lm_head"]).state_dict()
    assert "base_model.model.lm_head.base_layer.weight" in safetensors.torch.load_file(
        "peft/adapter_model.safetensors"
    )
    assert main(["merge", "base", "peft", "-o", "out"]) == 0
    assert close(read_folder(), wanted) and not close(read_folder(), read_folder("base"))


def test_a_whole_embedding_of_peft_in_a_tied_checkpoint(capsys):
    of_peft(llama(tied=False), target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    llama(tied=True)
    arguments = ["merge", "base", "peft", "-o", "out"]
    for untie in ([], ["--untie"]):
        assert main([*arguments, *untie]) == 2
        assert (
            "The weight of 'model.embed_tokens' is tied to another that 'base' does not hold"
            in last_error(capsys)
        )
    assert main(["convert", "peft", "a.safetensors"]) == 0
    assert main(["merge", "base", "a.safetensors", "-o", "out"]) == 2
    tensors = read_folder("base")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(tensors, "base/model.safetensors", {"format": "pt"})
    assert main(arguments) == 2 and "is tied to 'lm_head.weight' in 'base'" in last_error(capsys)
    assert main([*arguments, "--untie"]) == 0
    trained = safetensors.torch.load_file("peft/adapter_model.safetensors")
    out = read_folder()
    assert torch.equal(
        out["model.embed_tokens.weight"], trained["base_model.model.model.embed_tokens.weight"]
    )
    assert torch.equal(out["lm_head.weight"], tensors["lm_head.weight"])
    assert json.loads(Path("out/config.json").read_text())["tie_word_embeddings"] is False


def test_a_whole_embedding_of_ours_is_both_of_a_tied_checkpoint():
    base = llama(tied=True)
    lorafx.save(
        randomise(lorafx.inject(base, 2, targets="q_proj", trainable="lm_head")), "a.safetensors"
    )
    trained = safetensors.torch.load_file("a.safetensors")["model.embed_tokens.weight"]
    tensors = read_folder("base")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    shutil.rmtree("base")
    save_sharded(tensors, Path("base"), 3, base.config.to_dict())
    assert main(["merge", "base", "a.safetensors", "-o", "out"]) == 0
    out = read_folder()
    assert torch.equal(out["lm_head.weight"], trained)
    assert torch.equal(out["model.embed_tokens.weight"], trained)
    assert (Path("out") / INDEX).is_file()


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
