"""Names of sites, blocks of rows, branches and adapters, and how a file's become a model's."""

import difflib
import fnmatch
import functools
import re
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from .._errors import ConfigError
from .config import short_repr


LONGEST_ADAPTER_NAME = 200  # characters


def check_name(name: str) -> None:
    """Raise ConfigError unless this can name a submodule, and a folder, as adapters do."""
    sound = isinstance(name, str) and name.isprintable() and 0 < len(name) <= LONGEST_ADAPTER_NAME
    if sound:
        sound = name[0] != "_" and not set("./\\:") & set(name) and name not in dir(nn.Module())
    if not sound:
        raise ConfigError(f"{short_repr(name)} cannot name an adapter: use a word without dots, "
                          "slashes and colons that is not an attribute of nn.Module and does not "
                          "begin with an underscore.")


def dotted(prefix: str, name: str) -> str:
    """Return a dotted name below a prefix, which is empty for the model itself."""
    return f"{prefix}.{name}" if prefix else name


def split_block(name: str) -> tuple[str, str]:
    """Return a site's name without its block, and the block: ("attn.qkv", "[q]")."""
    base, bracket, block = name.partition("[")
    return base, bracket + block


_RANGE = r"\d{1,18}(?::\d{1,18})?"


def ranges_of(block: str) -> tuple[range, ...]:
    """Return the rows that a block means, as written: `[5,100:103]`; none for any other block."""
    if not re.fullmatch(rf"\[{_RANGE}(,{_RANGE})*\]", block):
        return ()
    ranges: list[range] = []
    for part in block[1:-1].split(","):
        start, colon, stop = part.partition(":")
        ranges.append(range(int(start), int(stop) if colon else int(start) + 1))
    return tuple(ranges) if all(ranges) else ()


def block_of(ranges: Iterable[range]) -> str:
    """Return the one name of a set of rows: `[5,100:103]`."""
    joined: list[range] = []
    for rows in sorted(ranges, key=lambda rows: rows.start):
        if joined and rows.start <= joined[-1].stop:
            joined[-1] = range(joined[-1].start, max(joined[-1].stop, rows.stop))
        else:
            joined.append(rows)
    parts = [f"{rows.start}:{rows.stop}" if len(rows) > 1 else str(rows.start) for rows in joined]
    return f"[{','.join(parts)}]"


def stands_for(shape: Sequence[int], block: str, whole: Sequence[int]) -> bool:
    """True if a tensor of this shape can take the place of a whole one, or of a block of its rows.

    The rows must be named as by `block_of`.
    """
    if not block:
        return tuple(shape) == tuple(whole)
    ranges = ranges_of(block)
    if not ranges or block_of(ranges) != block or not shape or not whole:
        return False
    fits = ranges[-1].stop <= whole[0] and sum(map(len, ranges)) == shape[0]
    return fits and tuple(shape[1:]) == tuple(whole[1:])


def have_rows_in_common(first: str, second: str) -> bool:
    """True if two names are of one tensor, and not of rows of it that differ."""
    (name, block), (other, other_block) = split_block(first), split_block(second)
    if name != other or not block or not other_block:
        return name == other
    for rows in ranges_of(block):
        for more in ranges_of(other_block):
            if max(rows.start, more.start) < min(rows.stop, more.stop):
                return True
    return False


def name_matches(pattern: str, name: str) -> bool:
    """True if a pattern is this dotted name, a dotted suffix of it, or a glob that fits it."""
    if name == pattern or name.endswith("." + pattern):
        return True
    return fnmatch.fnmatchcase(name, pattern)


# What data-parallel and compile wrappers, and models around a model, put before every name.
WRAPPERS = ("module.", "_orig_mod.", "model.")

Rename = Callable[[str], str]


def renaming(names: Sequence[str], known: Collection[str]) -> Rename:
    """Return how these names become known ones: as they are unless one other renaming fits."""
    if all(name in known for name in names):
        return lambda name: name

    def known_names(rename: Rename) -> tuple[str, ...] | None:
        renamed = tuple(map(rename, names))
        return renamed if all(name in known for name in renamed) else None

    fitting = fitting_renamings(names, known, known_names)
    return fitting[0] if len(fitting) == 1 else lambda name: name


def fitting_renamings(
    names: Sequence[str], known: Iterable[str], outcome: Callable[[Rename], Hashable | None],
    base_models: bool = True,
) -> list[Rename]:
    """Return the renamings that fit, one for each outcome; of several, none is to be preferred.

    `outcome` is what the names become, or None if a renaming does not fit. Names that fit as they
    are stay so, whatever else would fit. A base model is found in a model around it, and the
    reverse, if `base_models` says so.
    """
    fitting: dict[Hashable, Rename] = {}
    for number, rename in enumerate(_renamings(names, known, base_models)):
        result = outcome(rename)
        if result is not None:
            fitting.setdefault(result, rename)
        if fitting and number == 0:
            break
    return list(fitting.values())


def _renamings(
    names: Sequence[str], known: Iterable[str], base_models: bool
) -> Iterator[Rename]:
    """Names as they are, then with one prefix taken from all of them and another put before them.

    First the prefixes of wrappers, then one first part that no known name has, or that all names
    lack: so transformers finds a base model (`h.0`) in a file of a model around it
    (`transformer.h.0`), and the reverse.
    """
    known = list(known)
    for old in sorted(_prefixes(names), key=len):
        for new in sorted(_prefixes(known), key=len):
            if all(name.startswith(old) for name in names):
                yield functools.partial(_with_prefix, old, new)
    first_parts = {name.partition(".")[0] for name in names}
    known_parts = {name.partition(".")[0] for name in known}
    if base_models and first_parts.isdisjoint(known_parts):
        if len(first_parts) == 1:
            yield functools.partial(_with_prefix, f"{min(first_parts)}.", "")
        for part in sorted(known_parts):
            yield functools.partial(_with_prefix, "", f"{part}.")


def _with_prefix(old: str, new: str, name: str) -> str:
    return new + name.removeprefix(old)


def _prefixes(names: Iterable[str]) -> set[str]:
    """What wrappers may have put before these names: '', 'module.', 'module.model.', ..."""
    found = {""}
    for name in names:
        prefix = ""
        while True:
            more = [wrapper for wrapper in WRAPPERS if name.startswith(wrapper, len(prefix))]
            if not more:
                break
            prefix += more[0]
            found.add(prefix)
    return found


def closest_names(pattern: Any, names: Iterable[str], count: int = 3) -> str:
    """Return the names most like a pattern, by their last parts too, or the first ones, quoted."""
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
    """Return the name of a tensor's branch: `lora` for a weight, `lora_w1` for w1, `lora[q]`."""
    return ("lora" if attribute == "weight" else f"lora_{attribute}") + block


def site_name(owner: str, attribute: str) -> str:
    """Return a site's name: its owner's path, or the tensor's own if it is not called weight."""
    return owner if attribute == "weight" else dotted(owner, attribute)
