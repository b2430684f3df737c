"""Square matrices of which no file says how they are stored: merged as in memory, or refused."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from torch import nn

import lorafx
from tests.support.checkpoints import Turned, read_folder, same
from tests.support.command_line import error, main
from tests.support.oracle import randomise
from tests.support.peft_checkpoints import close, gpt2, last_error, of_peft

pytestmark = [
    pytest.mark.usefixtures("here"),
    # what PEFT and transformers say of each other, and of what is meant here
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")]


@pytest.mark.parametrize("targets", [["attn.c_proj"], ["c_attn", "c_proj"]])
def test_square_matrices_that_peft_says_are_turned(targets):
    model = gpt2()
    wanted = of_peft(model, target_modules=targets).state_dict()
    assert main(["merge", "base", "peft", "-o", "out"]) == 0
    base = transformers.GPT2LMHeadModel.from_pretrained("base")
    loaded = lorafx.load(base, "peft")
    assert same(
        read_folder(), {name: lorafx.merge(loaded).state_dict()[name] for name in read_folder()}
    )
    assert close(read_folder(), wanted) and not close(read_folder(), base.state_dict())
    lorafx.save(loaded, "ours")
    assert json.loads(Path("ours/adapter_config.json").read_text())["fan_in_fan_out"] is True
    assert main(["convert", "peft", "a.safetensors"]) == 0
    for adapter in ("ours", "a.safetensors"):
        assert main(["merge", "base", adapter, "-o", "out", "--force"]) == 0
        assert close(read_folder(), wanted)


def test_square_matrices_that_nothing_tells_are_refused(capsys):
    says = "does not say whether the square weight of 'transformer.h.0.attn.c_proj'"
    of_peft(gpt2(), target_modules=["attn.c_proj"])
    config = json.loads(Path("peft/adapter_config.json").read_text())
    for value in (False, None):
        Path("peft/adapter_config.json").write_text(json.dumps({**config, "fan_in_fan_out": value}))
        assert main(["merge", "base", "peft", "-o", "out"]) == 2 and says in last_error(capsys)
    # PEFT's word is of the last, and the others contradict it
    of_peft(gpt2(), target_modules=["lm_head", "attn.c_proj"])
    assert main(["merge", "base", "peft", "-o", "out"]) == 2 and says in last_error(capsys)
    factors = {f"transformer.h.0.attn.c_proj.lora.{name}.weight": torch.ones(*shape)
               for name, shape in (("A", (2, 8)), ("B", (8, 2)))}
    torch.save(factors, "a.pth")
    assert main(["merge", "base", "a.pth", "-o", "out"]) == 2 and says in last_error(capsys)
    injected = lorafx.inject(gpt2(), 2, targets="c_proj")
    with pytest.raises(
        lorafx.FormatError,
        match="cannot say that the square weight of 'transformer.h.0.attn.c_proj'",
    ):
        lorafx.save(injected, "a.pth")


def test_experts():
    """A stack of square matrices is told by others of the file alone."""
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Parameter(torch.randn(3, 6, 5)), nn.Parameter(
                torch.randn(3, 6, 6)
            )

        def forward(self, x):
            return torch.bmm(torch.bmm(x, self.up.mT), self.down.mT)

    base = nn.Sequential(Experts())
    safetensors.torch.save_file(base.state_dict(), "base.safetensors")
    for targets, code in ((["0.down"], 2), (["0.down", "0.up"], 0)):
        model = randomise(lorafx.inject(base, 2, targets=targets))
        lorafx.save(model, "a.pth")
        assert main(["merge", "base.safetensors", "a.pth", "-o", "out.safetensors"]) == code
    assert same(
        safetensors.torch.load_file("out.safetensors"),
        lorafx.merge(lorafx.load(base, "a.pth")).state_dict(),
    )


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
