"""Ties that the files or the config of a checkpoint show."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import lorafx
from tests.support.checkpoints import same
from tests.support.command_line import error, main
from tests.support.oracle import randomise


def test_a_tied_head(tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, vocab_size=31,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True
    )
    base = transformers.LlamaForCausalLM(config).eval()
    base.save_pretrained("base")
    capsys.readouterr()
    model = randomise(lorafx.inject(base, rank=2, targets=["q_proj", "lm_head"]))
    lorafx.save(model, "a.safetensors")
    assert main(["merge", "base", "a.safetensors", "-o", "out"]) == 2
    assert "'lm_head' is tied to 'model.embed_tokens.weight'" in error(capsys)
    assert (
        main(["merge", "base/model.safetensors", "a.safetensors", "-o", "o.safetensors", "--untie"])
        == 2
    )
    assert "merge the folder 'base'" in error(capsys)
    assert main(["merge", "base", "a.safetensors", "-o", "out", "--untie"]) == 0
    read = transformers.LlamaForCausalLM.from_pretrained("out")
    assert not read.config.tie_word_embeddings
    assert same(read.state_dict(), lorafx.merge(model, untie=True).state_dict())
    assert main(["merge", "out", "a.safetensors", "-o", "again"]) == 0


def test_config_says_tied(small, capsys):
    def says(config):
        Path("base/config.json").write_text(json.dumps(config))
        shutil.rmtree("out", ignore_errors=True)
        return [
            main(["merge", "base", "a.safetensors", "-o", "out", *untie])
            for untie in ([], ["--untie"])
        ]

    # which other is not known
    assert says({"tie_word_embeddings": True, "vocab_size": 6}) == [2, 2]
    assert "is tied to another that 'base' does not hold" in capsys.readouterr().err
    assert says({"vocab_size": 6}) == [2, 2] and "may be tied to another" in capsys.readouterr().err
    assert says({"text": {"tie_word_embeddings": False}, "vocab_size": 6})[0] == 0
    assert says({"tie_word_embeddings": True, "vocab_size": 7})[0] == 0


@pytest.mark.parametrize("whole", [False, True])
def test_memory_that_tensors_of_torch_save_share(small, whole, capsys):
    flat = torch.randn(24 + 18 + 3)
    torch.save(
        {
            "0.weight": flat[:24].view(6, 4),
            "0.bias": torch.ones(6),
            "1.weight": flat[24:42].view(3, 6),
            "1.bias": flat[42:],
            "tied": flat[24:42].view(3, 6),
        },
        "tied.pth",
    )
    arguments = [
        "merge", "tied.pth", "h.safetensors" if whole else "a.safetensors", "-o", "out.pth"
    ]
    if not whole:
        assert main(arguments) == 2
        assert "'1.weight' of 'tied.pth' is tied to 'tied'" in error(capsys)
        arguments.append("--untie")
    assert main(arguments) == 0
    out = torch.load("out.pth")
    assert torch.equal(out["tied"], flat[24:42].view(3, 6)) is not whole
    assert (out["tied"].data_ptr() == out["1.weight"].data_ptr()) is whole
    assert (
        main(["merge", "tied.pth", "t.safetensors", "-o", "cast.pth", "--dtype", "bfloat16"]) == 0
    )
    out = torch.load("cast.pth")
    assert out["tied"].data_ptr() == out["1.weight"].data_ptr()
    assert out["tied"].dtype == torch.bfloat16
