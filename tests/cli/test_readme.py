"""The command line's output in the README is what these commands print."""

import re
import shlex
from pathlib import Path

import pytest
import torch

import lorafx
from tests.support.command_line import main

transformers = pytest.importorskip("transformers")
README = Path(lorafx.__file__).parent / "_checkpoint" / "README.md"


def make_files() -> None:
    """A small Llama with a tied head in the folder base, and adapters for it."""
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, vocab_size=640,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True
    )
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(config)
    base.save_pretrained("base", max_shard_size="3MB")
    torch.manual_seed(1)
    for name, targets in (
        ("french", ["q_proj", "v_proj"]),
        ("law", ["q_proj", "v_proj"]),
        ("head", ["lm_head"]),
    ):
        model = lorafx.inject(base, alpha=16, targets=targets, adapter=name)
        with torch.no_grad():
            for parameter in lorafx.parameters(model):
                parameter.normal_(std=0.02)
        lorafx.save(model, f"{name}.safetensors")


def printed(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command prints."""
    main(shlex.split(command.removeprefix("$ lorafx ")))
    return "".join(capsys.readouterr())


def steady(text: str) -> str:
    """What every machine prints: no times and rates, nor where float32 loses its last bits."""
    text = re.sub(r"in [\d.]+ s \([^)]*/s\)", "in SOME TIME", text)
    return re.sub(r"at most [\d.]+e-0[78] of s B A, at \S+", "at most NOTHING", text)


def test_commands_in_the_readme(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_files()
    capsys.readouterr()
    blocks = re.findall(r"```console\n(.*?)```", README.read_text(), re.S)
    commands = [
        part for block in blocks for part in re.split(r"^(?=\$ lorafx )", block, flags=re.M) if part
    ]
    assert len(commands) >= 6
    for part in commands:
        command, _, said = part.partition("\n")
        assert steady(printed(command, capsys)) == steady(said)
