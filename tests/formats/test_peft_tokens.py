"""PEFT's trainable_token_indices, both ways, with PEFT itself."""

import copy
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import lorafx
from tests.support.oracle import randomise

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

IDS = torch.tensor([[1, 3, 7, 30, 5, 7]])
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SUFFIX = ".token_adapter.trainable_tokens_delta"


def qwen(tied: bool) -> nn.Module:
    config = transformers.Qwen2Config(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tied
    )
    return transformers.Qwen2ForCausalLM(config).eval()


def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


def saved_by_peft(base: nn.Module, folder: Path, indices: object, **config: object) -> nn.Module:
    settings = peft.LoraConfig(
        r=2, target_modules=["q_proj"], trainable_token_indices=indices, **config
    )
    model = peft.get_peft_model(copy.deepcopy(base), settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "indices", [[30, 7, 3], {"embed_tokens": [5, 6, 7], "lm_head": [5, 6, 7]}], ids=str
)
def test_both_ways(tmp_path: Path, tied: bool, indices: object) -> None:
    base = qwen(tied)
    theirs = saved_by_peft(base, tmp_path / "theirs", indices, bias="all")
    ours = lorafx.load(base, tmp_path / "theirs")
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-5)
    assert (logits(ours) - logits(base)).abs().max() > 0.1
    assert torch.allclose(logits(lorafx.merge(ours)), logits(theirs), atol=1e-5)
    heads = 1 if tied or isinstance(indices, list) else 2
    rows = [name for name, _ in lorafx.named_parameters(ours) if name.endswith("]")]
    assert len(rows) == heads
    lorafx.save(ours, tmp_path / "ours")
    files = [safetensors.torch.load_file(tmp_path / name / TENSORS) for name in ("theirs", "ours")]
    assert files[0].keys() == files[1].keys()
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    assert torch.allclose(logits(again), logits(theirs), atol=1e-5)
    lorafx.save(ours, tmp_path / "a.safetensors")
    assert torch.equal(logits(lorafx.load(base, tmp_path / "a.safetensors")), logits(ours))


def test_what_lorafx_trained(tmp_path: Path) -> None:
    base = qwen(True)
    model = randomise(lorafx.inject(base, 2, targets="v_proj", trainable="embed_tokens[3,5:8]"))
    lorafx.save(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["trainable_token_indices"] == {"model.embed_tokens": [3, 5, 6, 7]}
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.allclose(logits(theirs), logits(model), atol=1e-5)
    size = (tmp_path / TENSORS).stat().st_size
    assert size < base.model.embed_tokens.weight.nbytes


class Tied(nn.Module):
    """Tied by hand, of which no config tells PEFT."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.up, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9)
        self.scale = nn.Parameter(torch.ones(5, 4))

    def tie(self) -> "Tied":
        self.head.weight = self.tokens.weight
        return self

    def forward(self, ids):
        return self.head(self.up(self.tokens(ids) * self.scale[0]))


def test_where_peft_would_change_one_name_alone(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["up"], trainable_token_indices={"tokens": [1]})
    base, ids = Tied().tie(), torch.arange(9)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    theirs.save_pretrained(tmp_path / "a")
    lorafx.load(Tied(), tmp_path / "a")
    with pytest.raises(lorafx.MismatchError, match="tied to 'head.weight': load it with untie=Tru"):
        lorafx.load(base, tmp_path / "a")
    loaded = lorafx.load(base, tmp_path / "a", untie=True)
    torch.testing.assert_close(loaded(ids), theirs(ids), rtol=0, atol=1e-5)
    lorafx.save(loaded, tmp_path / "a.safetensors")
    with pytest.raises(lorafx.MismatchError, match="tied to 'head.weight': load it with untie=Tru"):
        lorafx.load(base, tmp_path / "a.safetensors")
    again = lorafx.load(base, tmp_path / "a.safetensors", untie=True)
    torch.testing.assert_close(again(ids), loaded(ids), rtol=0, atol=1e-6)
    model = lorafx.inject(Tied().tie(), targets="up", trainable="tokens[1]")
    with pytest.raises(lorafx.FormatError, match="would change rows of 'tokens' and not of 'head'"):
        lorafx.save(model, tmp_path / "b")


@pytest.mark.parametrize("trainable", ["head[1]", "scale[1]", "up.bias[0:2]"])
def test_rows_that_peft_cannot_train(tmp_path: Path, trainable: str) -> None:
    model = lorafx.inject(Tied(), targets="up", trainable=trainable)
    with pytest.raises(lorafx.FormatError, match="PEFT trains rows of embeddings, and of linear"):
        lorafx.save(model, tmp_path / "b")


@pytest.mark.parametrize(
    "indices, message",
    [([3], "for the 1 rows"), ([3, 3], "does not say which"), (None, "does not say which"),
     ([3, -1], "does not say which"), ("3", "does not say which"), ({"head": [3, 4]}, "not say"),
     ([3, 400], r"'model.embed_tokens.weight\[3,400\]' \(2, 16\), but this model has it as")],
    ids=str
)
def test_damage(tmp_path: Path, indices: object, message: str) -> None:
    base = qwen(True)
    saved_by_peft(base, tmp_path, [3, 4])
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"trainable_token_indices": indices}))
    with pytest.raises((lorafx.FormatError, lorafx.MismatchError), match=message):
        lorafx.load(base, tmp_path)


def test_rows_that_are_missing(tmp_path: Path) -> None:
    base = qwen(True)
    saved_by_peft(base, tmp_path, [3, 4])
    tensors = safetensors.torch.load_file(tmp_path / TENSORS)
    rest = {name: tensor for name, tensor in tensors.items() if not name.endswith(SUFFIX)}
    safetensors.torch.save_file(rest, tmp_path / TENSORS)
    with pytest.raises(lorafx.FormatError, match="has no rows of an embedding, which trainable_"):
        lorafx.load(base, tmp_path)
