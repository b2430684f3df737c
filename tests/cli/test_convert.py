"""`convert` between all formats: each pair of what is read and written gives the same adapter."""

import itertools
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import lorafx
from tests.support.command_line import error, main
from tests.support.oracle import randomise


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.to_q(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[1](self.layers[0](x))


# {format: its path, and the options that ask for it}
WRITTEN = {
    "lorafx": ("a.safetensors", []), "PEFT": ("folder", []), "MiniMind": ("a.pth", []),
    "MLX": ("mlx", ["--format", "mlx"]), "kohya": ("k.safetensors", ["--format", "kohya"]),
    "diffusers": ("d.safetensors", ["--format", "diffusers", "--part", "unet"]),
}
READ = {"a model's state_dict": ("model.pth", []), "litgpt": ("lit.pth.lora", ["--alpha", "6"])}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module, nn.Module]:
    """A folder with a base, and one adapter in each format that is not written by `convert`."""
    folder, net = tmp_path_factory.mktemp("convert"), Net()
    safetensors.torch.save_file(net.state_dict(), folder / "base.safetensors")
    model = randomise(lorafx.inject(net, rank=2, alpha=6, targets="to_q"))
    torch.save(model.state_dict(), folder / "model.pth")
    factors = {name.replace("lora.default.", "lora_"): tensor.detach().clone()
               for name, tensor in lorafx.named_parameters(model)}
    torch.save({"model": factors}, folder / "lit.pth.lora")
    for name, (path, options) in WRITTEN.items():
        part = "unet" if "--part" in options else None
        asked = options[1] if options else None
        lorafx.save(model, folder / path, format=asked, part=part)
    return folder, net, model


@pytest.mark.parametrize("read, written", [*itertools.product({**WRITTEN, **READ}, WRITTEN)])
def test_every_pair(
    made: tuple[Path, nn.Module, nn.Module], tmp_path: Path, read: str, written: str
) -> None:
    folder, net, model = made
    (source, given), (target, asked) = {**WRITTEN, **READ}[read], WRITTEN[written]
    alpha = given if "--alpha" in given else []
    part = ["--part", "unet"] if {read, written} & {"diffusers", "kohya"} else []
    asked = [*asked, *([] if "--part" in asked else part)]
    assert main(["convert", str(folder / source), str(tmp_path / target), "--base",
                 str(folder / "base.safetensors"), *alpha, *asked]) == 0
    part_read = "unet" if written in ("diffusers", "kohya") else None
    loaded, x = lorafx.load(net, tmp_path / target, part=part_read), torch.randn(3, 8)
    tolerance = 3e-3 if "MiniMind" in (read, written) else 1e-6
    torch.testing.assert_close(loaded(x), model(x), rtol=tolerance, atol=tolerance)
    assert not torch.allclose(loaded(x), net(x), atol=0.1)


def test_what_is_kept_and_what_is_asked_for(
    made: tuple[Path, nn.Module, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _, _ = made
    base = str(folder / "base.safetensors")

    def convert(*arguments: str) -> int:
        return main(["convert", *(str(folder / arguments[0]), str(tmp_path / arguments[1])),
                     *arguments[2:]])

    assert convert("k.safetensors", "a.safetensors") == 2
    assert "that only the model tells" in error(capsys)
    assert convert("a.safetensors", "b", "--part", "unet") == 2
    assert "is of a pipeline: leave out --part" in error(capsys)
    assert convert("lit.pth.lora", "a.safetensors") == 2
    assert "without their scale" in error(capsys)
    assert convert("a.safetensors", "m", "--format", "nothing") == 2
    assert "no format 'nothing'" in error(capsys)
    assert convert("a.safetensors", "half.safetensors", "--base", base) == 0
    first, second = (safetensors.torch.load_file(path) for path in (
        folder / "a.safetensors", tmp_path / "half.safetensors"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = {"layers.0.to_q.weight": torch.zeros(3, 8), "c.weight": torch.zeros(8, 24),
             "c.bias": torch.zeros(24)}
    safetensors.torch.save_file(other, tmp_path / "other.safetensors")
    assert convert("a.safetensors", "b", "--base", str(tmp_path / "other.safetensors")) == 2
    assert "stores weights as (in, out)" in error(capsys)
    assert convert("a.safetensors", "b", "--base", str(folder / "a.pth")) == 2
    assert "is not a base that names layers" in error(capsys)
    assert main(["show", str(folder / "model.pth")]) == 0
    assert "(a model's state_dict), 2 sites" in capsys.readouterr().out


@pytest.mark.parametrize("trained", ["embed_tokens", "lm_head", "embed_tokens[3:5]"])
def test_what_a_base_ties_is_one(tmp_path: Path, trained: str) -> None:
    """A Hugging Face folder holds a tied tensor once; its config says that it has two names."""
    transformers = pytest.importorskip("transformers")
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=True)).eval()
    base.save_pretrained(tmp_path / "base")
    model = randomise(lorafx.inject(base, 2, targets="q_proj", trainable=trained))
    lorafx.save(model, tmp_path / "0.safetensors")
    ids, last = torch.arange(11)[None], "0.safetensors"
    for output in ("1", "2", "3.safetensors"):
        assert main(["convert", str(tmp_path / last), str(tmp_path / output), "--base",
                     str(tmp_path / "base")]) == 0
        assert torch.equal(lorafx.load(base, tmp_path / output)(ids).logits, model(ids).logits)
        last = output
    written = [safetensors.torch.load_file(tmp_path / path / "adapter_model.safetensors")
               for path in ("1", "2")]
    lorafx.save(model, tmp_path / "live")
    live = safetensors.torch.load_file(tmp_path / "live" / "adapter_model.safetensors")
    assert live.keys() == written[0].keys() == written[1].keys()
