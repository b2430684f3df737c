"""Random changes to files, a seed each."""

import io
import json
import random
import zipfile
from typing import Any

import torch

SEED = 5
NUMBERS = [
    0, 1, 2, 3, 5, 7, 8, 9, 64, 255, 256, 65535, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63,
    2**64 - 1, -1
]
VALUES = [
    None, True, "", "x", "up", "F64", "I8", "BOOL", "C64", "F4", [], {}, [[]], {"a": 1}, 1.5, -0.0,
    float("nan"), float("inf"), 10**400, "\x00", "\ud800", "../x", "a/b", "up.lora.A",
    "__metadata__", [2**62, 4], *NUMBERS
]


class Dice(random.Random):
    """The random numbers of one mutation."""

    def cut(self, data: bytes) -> bytes:
        """A part from the beginning."""
        return data[:self.randrange(len(data))]

    def flip(self, data: bytes) -> bytes:
        """One to three bytes changed."""
        changed = bytearray(data)
        for _ in range(self.randint(1, 3)):
            changed[self.randrange(len(data))] ^= self.randint(1, 255)
        return bytes(changed)

    def splice(self, data: bytes) -> bytes:
        """A part repeated, dropped, moved or overwritten by another."""
        a, b, c = sorted(self.randrange(len(data) + 1) for _ in range(3))
        return self.choice(
            [
                data[:b] + data[a:], data[:a] + data[b:],
                data[:a] + data[b:c] + data[a:b] + data[c:],
                data[:b] + data[a:b] + data[b + (b - a):], data + data[a:b]
            ]
        )

    def number(self, data: bytes) -> bytes:
        """A field of 1, 2, 4 or 8 bytes set to a telling value."""
        width = self.choice([1, 2, 4, 8])
        at = self.randrange(max(1, len(data) - width))
        return (
            data[:at]
            + (self.choice(NUMBERS) % 256**width).to_bytes(width, "little")
            + data[at + width:]
        )

    def bytes_of(self, data: bytes) -> bytes:
        """Any of these."""
        return self.choice([self.cut, self.flip, self.splice, self.number])(data) if data else b"x"

    def json(self, value: Any) -> Any:
        """A copy of a JSON value with one place in it changed, added, renamed or removed."""
        places = [(value, key) for key in (value if isinstance(value, dict) else range(len(value)))]
        if not places or self.random() < 0.02:
            return self.choice(VALUES)
        _, key = self.choice(places)
        copy = value.copy()
        if isinstance(copy[key], (dict, list)) and copy[key] and self.random() < 0.8:
            copy[key] = self.json(copy[key])
        elif isinstance(copy, list):
            copy[key:key + 1] = self.choice([[], [copy[key]] * 2, [self.choice(VALUES)]])
        else:
            self.choice([lambda: copy.pop(key), lambda: copy.update({key: self.choice(VALUES)}),
                         lambda: copy.update({self.text(): copy.pop(key)}),
                         lambda: copy.update({self.text(): copy[key]}),
                         lambda: copy.update({key: copy[self.choice(places)[1]]})])()
        return copy

    def text(self) -> str:
        """A key that may mean something."""
        return self.choice(
            [value for value in VALUES if isinstance(value, str)]
            + ["head.lora.B", "targets", "head"]
        )


def twice(text: str, dice: Dice) -> str:
    """The same JSON with one key given twice."""
    at = text.find('"', dice.randrange(len(text)))
    end = text.find('": ', at)
    return (
        text[:at] + text[at:end] + '": 0, ' + text[at:]
        if 0 <= at < end and text[at - 1] in "{ "
        else text
    )


def mutate_native(data: bytes, dice: Dice) -> bytes:
    """Change bytes anywhere, or the header or JSON in it, so that what is around still fits."""
    if dice.random() < 0.3:
        return dice.bytes_of(data)
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8:8 + length]), data[8 + length:]
    kind = dice.random()
    if kind < 0.45:
        about = dice.json(json.loads(header["__metadata__"]["adapter"]))
        header["__metadata__"]["adapter"] = json.dumps(about)
    elif kind < 0.8:
        header = dice.json(header)
    elif kind < 0.9:
        body = dice.bytes_of(body)
    text = json.dumps(header)
    text = twice(text, dice) if kind > 0.95 else text
    content = dice.bytes_of(text.encode()) if 0.9 < kind <= 0.95 else text.encode()
    length = len(content) if dice.random() < 0.98 else dice.choice(NUMBERS) % 2**64
    return length.to_bytes(8, "little") + content + body


def mutate_safetensors(data: bytes, dice: Dice, names: list[str]) -> bytes:
    """Change bytes anywhere, a place in the header or a name, so that what is around still fits."""
    if dice.random() < 0.2:
        return dice.bytes_of(data)
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8:8 + length]), data[8 + length:]
    if dice.random() < 0.5:
        header[dice.choice(names)] = header.pop(
            dice.choice([name for name in header if name != "__metadata__"])
        )
    else:
        header = dice.json(header)
    if dice.random() < 0.2:
        body = dice.bytes_of(body)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def mutate_zip(data: bytes, dice: Dice) -> bytes:
    """Change bytes anywhere, or those of one member under a right checksum, or the members."""
    if dice.random() < 0.3:
        return dice.bytes_of(data)
    source, buffer = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    names = source.namelist()
    target = dice.choice([names[0]] * 12 + names)
    how = dice.random()
    with zipfile.ZipFile(buffer, "w") as made:
        for name in names:
            content = source.read(name)
            if name == target and how < 0.8:
                content = dice.bytes_of(content)
            if name == target and 0.8 <= how < 0.85:
                continue
            renamed = f"{dice.text()}/{name}" if name == target and 0.85 <= how < 0.9 else name
            packed = zipfile.ZIP_DEFLATED if name == target and how >= 0.95 else zipfile.ZIP_STORED
            made.writestr(
                renamed.encode(errors="replace").decode().replace("\0", "_"), content, packed
            )
        if 0.9 <= how < 0.95:
            made.writestr("archive/more", b"0" * 10**6, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of a model's tensors."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
