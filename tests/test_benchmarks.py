"""The benchmarks: MiniMind is a sound model that the tracer meets in the wild, and the scripts do what they say."""

import json
import os
import pickle
import re
import signal
import time

import claims
import coverage
import finetune
import pytest
import stream
import torch
from minimind import Config, MiniMind
from oracle import frozen, randomise
from safetensors.torch import load_file
from test_durable import child

import lorafx

CONFIGS = {
    "dense": Config(hidden=24, layers=2, heads=3, kv_heads=1, vocabulary=31, max_length=32, dropout=0.1),
    "no flash": Config(hidden=24, layers=2, heads=3, kv_heads=1, vocabulary=31, max_length=32, flash=False),
    "experts": Config(hidden=24, layers=2, heads=3, kv_heads=3, vocabulary=31, max_length=32, experts=3),
}
TOKENS = torch.randint(31, (2, 7), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def model(request):
    return MiniMind(request.param).eval()


def test_a_cache_changes_nothing(model):
    for mask in (None, MASK):
        with_cache, without = (model.generate(TOKENS, 9, mask=mask, use_cache=use) for use in (True, False))
        assert torch.equal(with_cache, without) and with_cache.shape == (2, 16)


def test_padding_changes_nothing(model):
    padded = model(TOKENS, MASK).logits[1, 2:]
    alone = model(TOKENS[1:, 2:]).logits[0]
    # Its positions are shifted by the padding, and rotary embeddings see differences of positions only.
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)


def test_the_tracer_meets_it(model):
    injected, base = lorafx.inject(model, rank=2, targets="linear"), frozen(model)
    for training in (False, True):
        for call in (lambda m: m(TOKENS), lambda m: m(TOKENS, MASK, use_cache=True),
                     lambda m: m(TOKENS[:, :1], cache=base(TOKENS, use_cache=True).cache)):
            outputs = []
            for m in (injected.train(training), base.train(training)):
                torch.manual_seed(2)
                outputs.append(call(m).logits)
            assert torch.equal(*outputs)
    assert torch.equal(injected.eval().generate(TOKENS, 5), base.eval().generate(TOKENS, 5))
    projections = 7 if not model.config.experts else 4 + 1 + 3 * (3 + 1)
    assert len(lorafx.summary(injected).sites) == 2 * projections + 1
    assert not any("proj" in name for name in lorafx.summary(injected).skipped)


def test_no_silent_site_and_merge(model):
    injected = lorafx.inject(model, rank=2, targets="linear")
    before = injected(TOKENS).logits
    before.sum().backward()
    for name, parameter in lorafx.named_parameters(injected):
        if name.endswith(".B"):
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
            with torch.no_grad():
                parameter.normal_()
            assert not torch.equal(injected(TOKENS).logits, before), name
            with torch.no_grad():
                parameter.zero_()
    randomise(injected)
    merged = lorafx.merge(injected, untie=True)
    torch.testing.assert_close(merged(TOKENS).logits, injected(TOKENS).logits, rtol=1e-4, atol=1e-5)
    twin = pickle.loads(pickle.dumps(injected))
    assert torch.equal(twin(TOKENS).logits, injected(TOKENS).logits)


def test_finetune(tmp_path, capsys):
    options = ["--hidden", "16", "--layers", "1", "--steps", "3", "--pretrain-steps", "3", "--batch", "4", "--length",
               "16", "--out", str(tmp_path / "out"), "--checkpoints", str(tmp_path / "checkpoints"), "--device", "cpu",
               "--no-check-learning"]
    first, second = finetune.main(options), finetune.main(options)
    assert [row["loss"] for row in first["models"].values()] == [row["loss"] for row in second["models"].values()]
    assert len(first["checks"]) >= 18 and first["checks"] == second["checks"]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["models"] == second["models"]
    assert (tmp_path / "out" / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (tmp_path / "out" / "lora").iterdir()} == {
        "prose_16.safetensors", "prose_16.pth", "table_16.safetensors", "table_16.pth", "both_16.safetensors"}
    assert "LoRA on prose" in capsys.readouterr().out


def killed_when(path, options):
    """Run finetune in another process, and kill that when a file appears."""
    pid, late = child(lambda: finetune.main(options)), time.monotonic() + 120
    while not path.exists() and time.monotonic() < late:
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "it ended by itself"
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    assert path.exists(), "it stands still"
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_finetune_goes_on_after_a_kill(tmp_path, capsys):
    options = ["--hidden", "16", "--layers", "1", "--steps", "60", "--pretrain-steps", "3", "--batch", "4", "--length",
               "16", "--checkpoints", str(tmp_path / "checkpoints"), "--device", "cpu", "--no-check-learning",
               "--save-every", "7"]
    whole, out = finetune.main([*options, "--out", str(tmp_path / "whole")]), tmp_path / "out"
    options += ["--out", str(out)]
    killed_when(out / "unfinished" / "prose.safetensors", options)
    killed_when(out / "unfinished" / "table.safetensors", [*options, "--resume"])
    with pytest.raises(SystemExit, match="was trained with rate = 0.02, not 0.5: resume with the options of the run"):
        finetune.main([*options, "--resume", "--rate", "0.5"])
    capsys.readouterr()
    resumed = finetune.main([*options, "--resume"])
    steps = dict(re.findall(r"Resumed (\w+) after step (\d+)", capsys.readouterr().out))
    assert steps["prose"] == "60" and 0 < int(steps["table"]) < 60
    for results in (whole, resumed):
        for run in (run for runs in results["runs"].values() for run in runs.values()):
            assert run.pop("seconds") > 0
    assert resumed["runs"] == whole["runs"] and resumed["checks"] == whole["checks"]
    for path in (tmp_path / "whole" / "lora").glob("*.safetensors"):
        one, other = load_file(path), load_file(out / "lora" / path.name)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert not (out / "unfinished").exists()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_coverage(capsys):
    rows = {row.name: row for row in coverage.main(["--only", "llama", "siglip", "mixtral", "rwkv", "--jobs", "2"])}
    for name, layers in (("llama", 2 * 7), ("siglip", 31)):
        assert rows[name].lorafx.identical() and rows[name].lorafx.no_silent() and rows[name].lorafx.layers >= layers
    assert rows["siglip"].peft.silent and "AdaptedWeightError" in rows["rwkv"].lorafx.error
    assert "1 silent, such as vision_model.head.attention.out_proj" in capsys.readouterr().out


def test_stream(tmp_path, capsys):
    found = stream.main(["--tiny", "--no-peft", "--folder", str(tmp_path), "--json", str(tmp_path / "stream.json")])
    assert found["sites"] == 105 and found["shards"] > 2 and len(found["ratios"]) == 1
    assert json.loads((tmp_path / "stream.json").read_text()) == found
    assert "was left out: --no-peft" in capsys.readouterr().out


def test_claims(tmp_path, capsys):
    rows = {(row.model, row.reading): row for row in claims.main(["--json", str(tmp_path / "claims.json")])}
    square = rows["40B decoder", "square: q, o"]
    assert (square.base, square.sites, square.trainable) == (40_010_439_168, 116, 58 * 2 * 2 * 8 * 8192)
    assert rows["BERT-large", "q, k, v, o"].trainable == 24 * 4 * 2 * 8 * 1024 == 1_572_864
    assert rows["BERT-large", "q, v"].trainable == 786_432
    assert all(row.seconds < 30 and row.float32_bytes == 4 * row.trainable for row in rows.values())
    assert "no reading gives it" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "claims.json").read_text())) == len(rows)
