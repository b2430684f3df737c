"""Files of torchtune, litgpt and loralib against what their documented layouts compute."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorafx


class Attention(nn.Module):
    """Layers that join q, k and v, named as litgpt, GPT-2 and torchtune name theirs."""

    def __init__(self, joined: str, out: int, width: int = 6) -> None:
        super().__init__()
        self.attn = nn.Module()
        self.attn.add_module(joined, nn.Linear(width, out))
        self.attn.q_proj = nn.Linear(width, 5)
        self.joined = joined

    def forward(self, x: Tensor) -> Tensor:
        return self.attn.get_submodule(self.joined)(x).sum(-1) + self.attn.q_proj(x).sum(-1)


def with_delta(net: nn.Module, path: str, delta: Tensor) -> nn.Module:
    truth = copy.deepcopy(net)
    with torch.no_grad():
        truth.get_submodule(path).weight += delta
    return truth


def torchtune(rank: int = 3) -> dict[str, Tensor]:
    return {"attn.q_proj.lora_a.weight": torch.randn(rank, 6),
            "attn.q_proj.lora_b.weight": torch.randn(5, rank)}


@pytest.mark.parametrize("beside", [False, True])
def test_torchtune(tmp_path: Path, beside: bool) -> None:
    """y = W x + (alpha / rank) lora_b(lora_a(x)); its recipes write PEFT's config beside."""
    tensors, net, x = torchtune(), Attention("qkv", 7), torch.randn(2, 6)
    torch.save(tensors, tmp_path / "adapter_0.pt")
    if beside:
        config = {"r": 3, "lora_alpha": 12, "target_modules": ["q_proj"], "peft_type": "LORA"}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    loaded = lorafx.load(net, tmp_path / "adapter_0.pt", alpha=None if beside else 12)
    a, b = tensors.values()
    torch.testing.assert_close(loaded(x), with_delta(net, "attn.q_proj", 4 * b @ a)(x))


def test_what_torchtune_writes_for_peft(tmp_path: Path) -> None:
    """A folder in PEFT's layout, of as few settings as its recipes write."""
    net, x = Attention("qkv", 7), torch.randn(2, 6)
    A, B = torch.randn(2, 6), torch.randn(5, 2)
    stem = "base_model.model.attn.q_proj.lora"
    torch.save({f"{stem}_A.weight": A, f"{stem}_B.weight": B}, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text(json.dumps({
        "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "peft_type": "LORA",
        "base_model_name_or_path": "some/base"}))
    loaded = lorafx.load(net, tmp_path)
    torch.testing.assert_close(loaded(x), with_delta(net, "attn.q_proj", 2 * B @ A)(x))


def grouped(x: Tensor, A: Tensor, B: Tensor, sizes: list[int]) -> list[Tensor]:
    """What each adapted one of q, k, v gets: its own rank rows of A, and of B."""
    rank = B.shape[1]
    inner = (x @ A.T).split(rank, -1)
    return [part @ rows.T for part, rows in zip(inner, B.split(sizes), strict=True)]


HEADS, GROUPS, SIZE, RANK = 4, 2, 3, 2
OF_EACH = {"query": HEADS * SIZE, "key": GROUPS * SIZE, "value": GROUPS * SIZE}
OUT = sum(OF_EACH.values())


def litgpt(folder: Path, joined: str, enabled: dict[str, bool]) -> dict[str, Tensor]:
    sizes = [size for name, size in OF_EACH.items() if enabled[name]]
    tensors = {f"attn.{joined}.lora_A": torch.randn(RANK * len(sizes), 6),
               f"attn.{joined}.lora_B": torch.randn(sum(sizes), RANK)}
    torch.save({"model": tensors}, folder / "lit_model.pth.lora")
    flags = "".join(f"lora_{name}: {str(on).lower()}\n" for name, on in enabled.items())
    (folder / "hyperparameters.yaml").write_text(
        f"checkpoint_dir: some/base\nlora_r: {RANK}\nlora_alpha: 16  # alpha\n{flags}train:\n"
        "  lora_r: 9\n")
    (folder / "model_config.yaml").write_text(
        f"bias: false\nn_head: {HEADS}\nn_query_groups: {GROUPS}\nhead_size: {SIZE}\n"
        "name: a name\nrope_base: 1e4\n")
    return tensors


@pytest.mark.parametrize("adapted", ["query value", "key", "query key value"])
@pytest.mark.parametrize("joined", ["qkv", "attn"])
def test_litgpt(tmp_path: Path, joined: str, adapted: str) -> None:
    """q, k and v one after the other in `attn.qkv`; by groups of heads in the older `attn.attn`."""
    enabled = {name: name in adapted for name in OF_EACH}
    A, B = litgpt(tmp_path, joined, enabled).values()
    net, x = Attention(joined, OUT), torch.randn(2, 6)
    layer = lorafx.load(net, tmp_path / "lit_model.pth.lora").attn.get_submodule(joined)
    parts = iter(grouped(x, A, B, [size for name, size in OF_EACH.items() if enabled[name]]))
    q, k, v = (next(parts) if enabled[name] else torch.zeros(2, size)
               for name, size in OF_EACH.items())
    if joined == "qkv":
        delta = torch.cat([q, k, v], -1)
    else:
        by_group = [part.view(2, GROUPS, -1) for part in (q, k, v)]
        delta = torch.cat(by_group, -1).flatten(1)
    torch.testing.assert_close(layer(x), net.attn.get_submodule(joined)(x) + 8 * delta)


class Joined(nn.Module):
    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.c_attn = Conv1D(18, 6) if transposed else nn.Linear(6, 18)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_attn(x)


@pytest.mark.parametrize("transposed", [False, True])
def test_loralib(tmp_path: Path, transposed: bool) -> None:
    """MergedLinear of which all parts are adapted, a bias that was trained too."""
    net, x = Joined(transposed), torch.randn(2, 6)
    tensors = {"c_attn.lora_A": torch.randn(6, 6), "c_attn.lora_B": torch.randn(18, 2),
               "c_attn.bias": torch.randn(18)}
    torch.save(tensors, tmp_path / "ckpt_lora.pt")
    loaded = lorafx.load(net, tmp_path / "ckpt_lora.pt", alpha=6)
    delta = torch.cat(grouped(x, tensors["c_attn.lora_A"], tensors["c_attn.lora_B"], [6] * 3), -1)
    expected = net(x) - net.c_attn.bias + tensors["c_attn.bias"] + 3 * delta
    torch.testing.assert_close(loaded(x), expected)


def test_a_config_of_another_adapter_beside_it_says_nothing(tmp_path: Path) -> None:
    torch.save({"c_attn.lora_A": torch.ones(2, 6), "c_attn.lora_B": torch.ones(18, 2)},
               tmp_path / "a.pt")
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 4}')
    with pytest.raises(lorafx.FormatError, match="without their scale"):
        lorafx.load(Joined(False), tmp_path / "a.pt")


def test_a_state_dict_of_loralib_in_a_checkpoint(tmp_path: Path) -> None:
    tensors = {"c_attn.lora_A": torch.randn(2, 6), "c_attn.lora_B": torch.randn(18, 2)}
    torch.save({"step": 1, "lora": tensors}, tmp_path / "a.ckpt")
    loaded = lorafx.load(Joined(False), tmp_path / "a.ckpt", alpha=2)
    assert lorafx.summary(loaded).sites[0].scales == {"default": 1}


REFUSED: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "no alpha": (torchtune(), {}, r"without their scale, .*: name the alpha .* load\(..., alpha="),
    "DoRA": ({**torchtune(), "attn.q_proj.magnitude": torch.ones(5)}, {"alpha": 1},
             "a tensor 'attn.q_proj.magnitude', which is no half of a pair"),
    "a half": ({"attn.q_proj.lora_A": torch.ones(2, 6)}, {"alpha": 1}, "has only A of 'attn.q_p"),
    "some of q, k, v": (
        {"attn.c.lora_A": torch.ones(4, 6), "attn.c.lora_B": torch.ones(14, 2)}, {"alpha": 1},
        "the A and B of 2 of the matrices that it joins, 14 rows in all, and does not say which"),
    "litgpt's, by itself": (
        {"attn.qkv.lora_A": torch.ones(6, 6), "attn.qkv.lora_B": torch.ones(21, 2)}, {"alpha": 1},
        "keep litgpt's hyperparameters.yaml and model_config.yaml beside it"),
    "shapes": ({"attn.q_proj.lora_A": torch.ones(3, 6), "attn.q_proj.lora_B": torch.ones(5, 2)},
               {"alpha": 1}, r"are not \(rank, in\) and \(out, rank\)"),
    "no pair": ({"attn.q_proj.lora_A": torch.ones(0, 6), "attn.q_proj.lora_B": torch.ones(5, 0)},
                {"alpha": 1}, r"are not \(rank, in\) and \(out, rank\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(tmp_path: Path, case: str) -> None:
    tensors, options, message = REFUSED[case]
    torch.save(tensors, tmp_path / "a.pt")
    with pytest.raises(lorafx.FormatError, match=message):
        lorafx.load(Attention("c", 21), tmp_path / "a.pt", **options)


def test_an_alpha_where_the_file_has_its_own(tmp_path: Path) -> None:
    model = lorafx.inject(Joined(False), targets="linear")
    lorafx.save(model, tmp_path / "a.safetensors")
    with pytest.raises(lorafx.FormatError, match="is a lorafx file, which says its scale itself"):
        lorafx.load(Joined(False), tmp_path / "a.safetensors", alpha=2)


@pytest.mark.parametrize("line", ["n_head: 0", "n_head: 99999999", "n_query_groups: 3",
                                  "head_size: x", "head_size: 9999999"])
def test_settings_that_cannot_be(tmp_path: Path, line: str) -> None:
    litgpt(tmp_path, "qkv", dict.fromkeys(OF_EACH, True))
    path = tmp_path / "model_config.yaml"
    name = line.partition(":")[0]
    lines = [line if old.startswith(name) else old for old in path.read_text().splitlines()]
    path.write_text("\n".join(lines))
    with pytest.raises(lorafx.FormatError, match="model_config.yaml' has"):
        lorafx.load(Attention("qkv", OUT), tmp_path / "lit_model.pth.lora")
