"""How text is written where each letter has its place, as in a terminal: how wide, and cut."""

import unicodedata


def counted(number: int, noun: str) -> str:
    """Return "1 site" or "2,000 sites"."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def width(text: str) -> int:
    """Return how many places text takes: two of a wide letter, none of a mark on the one before."""
    places = 0
    for letter in text:
        if unicodedata.category(letter) not in ("Mn", "Me", "Cf"):
            places += 2 if unicodedata.east_asian_width(letter) in "WF" else 1
    return places


def padded(text: str, places: int, to_the_right: bool = False) -> str:
    """Return text with spaces up to so many places."""
    spaces = " " * (places - width(text))
    return spaces + text if to_the_right else text + spaces


def elided(text: str, places: int) -> str:
    """Return text of so many places at the most, its middle left out: both ends tell names apart.
    """
    if width(text) <= places:
        return text
    head, tail = text, text
    while width(head) > places // 2:
        head = head[:-1]
    while width(tail) > places - 1 - width(head):
        tail = tail[1:]
    return f"{head}…{tail}"
