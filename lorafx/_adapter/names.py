"""Names: of sites, blocks of rows, branches and adapters, and how those in a file become a model's."""

import difflib
import fnmatch
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from .._errors import ConfigError
from .config import shown


LONGEST_NAME = 200  # characters of an adapter's name


def check_name(name: str) -> None:
    """Raise ConfigError unless this can name an adapter: it names a submodule, and in PEFT's format a folder."""
    if (not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= LONGEST_NAME or name[0] == "_"
            or any(mark in name for mark in "./\\:") or name in dir(nn.Module())):
        raise ConfigError(f"{shown(name)} cannot name an adapter: use a word without dots, slashes and colons that is "
                          "no attribute of nn.Module and does not begin with an underscore.")


def dotted(prefix: str, name: str) -> str:
    """A dotted name below a prefix, which is empty for the model itself."""
    return f"{prefix}.{name}" if prefix else name


def split_block(name: str) -> tuple[str, str]:
    """A site's name without its block, and the block: ("attn.qkv", "[q]")."""
    base, bracket, block = name.partition("[")
    return base, bracket + block


def name_matches(pattern: str, name: str) -> bool:
    """Whether a pattern is this dotted name, a dotted suffix of it, or a glob that fits it."""
    return name == pattern or name.endswith("." + pattern) or fnmatch.fnmatchcase(name, pattern)


# What data-parallel and compile wrappers, and models around a model, put before every name.
WRAPPERS = ("module.", "_orig_mod.", "model.")


def renamed(names: Sequence[str], known: Collection[str]) -> Callable[[str], str]:
    """How these names become known ones: as they are, or by wrappers' prefixes, if one way alone fits them all."""
    if all(name in known for name in names):
        return lambda name: name
    fits = {tuple(map(rename, names)): rename for rename in renamings(names, known)
            if all(rename(name) in known for name in names)}
    return next(iter(fits.values())) if len(fits) == 1 else lambda name: name


def renamings(names: Sequence[str], known: Iterable[str]) -> Iterator[Callable[[str], str]]:
    """Names as they are, then each way to take a wrapper's prefix from all of them and to put a known one before."""
    for old in sorted(_prefixes(names), key=len):
        for new in sorted(_prefixes(known), key=len):
            if all(name.startswith(old) for name in names):
                yield functools.partial(_renamed, old, new)


def base_renamings(names: Iterable[str], known: Iterable[str]) -> Iterator[Callable[[str], str]]:
    """Each way to take one first part, which no known name has, from all names, or to put one before all of them.

    So transformers finds a base model (`h.0`) in a file of a model around it (`transformer.h.0`), and the reverse.
    """
    firsts, parts = ({name.partition(".")[0] for name in some} for some in (names, known))
    if firsts.isdisjoint(parts):
        if len(firsts) == 1:
            yield functools.partial(_renamed, f"{min(firsts)}.", "")
        for part in sorted(parts):
            yield functools.partial(_renamed, "", f"{part}.")


def _renamed(old: str, new: str, name: str) -> str:
    return new + name.removeprefix(old)


def _prefixes(names: Iterable[str]) -> set[str]:
    """What wrappers may have put before these names: '', 'module.', 'module.model.', ..."""
    found = {""}
    for name in names:
        prefix = ""
        while (more := next((p for p in WRAPPERS if name.startswith(p, len(prefix))), None)) is not None:
            prefix += more
            found.add(prefix)
    return found


def near(pattern: Any, names: Iterable[str], count: int = 3) -> str:
    """The names most like the pattern, by their last parts too, quoted; the first ones where none is alike."""
    names = list(dict.fromkeys(names))
    found: list[str] = []
    if isinstance(pattern, str):
        last = pattern.rpartition(".")[2]
        by_last: dict[str, str] = {}
        for name in names:
            by_last.setdefault(name.rpartition(".")[2], name)
        found = difflib.get_close_matches(pattern, names, count)
        found += [by_last[part] for part in difflib.get_close_matches(last, by_last, count)]
        found = list(dict.fromkeys(found))
    return ", ".join(map(repr, (found or names)[:count]))


def branch_name(attribute: str, block: str = "") -> str:
    """The name of the branch of a module's tensor: `lora` for its weight, `lora_w1` for another, w1, `lora[q]`."""
    return ("lora" if attribute == "weight" else f"lora_{attribute}") + block


def site_name(owner: str, attribute: str) -> str:
    """The name of a site: its owner's path, or the tensor's own where that is not called weight."""
    return owner if attribute == "weight" else dotted(owner, attribute)
