"""Roles found in dataflow are those that were read in the source of 126 architectures, by hand.

The tables say one of each linear call: q, k, v, o for attention's query, key, value and output, m
for a feed-forward block, h for the head, several letters for a fused one, and - for none. They go
by what the words mean in `lorafx/_model/README.md`, and where that leaves a question:

- Where one projection is two calls, with nothing between that is not linear, both have its role:
  factors of low rank, or a second call before the residual connection.
- A mixer without a softmax over products of queries and keys has no role in any part: state
  spaces, linear attention, correlations, attention to sampled points.
- A router, a gate, what multiplies positions, an embedding's projection, a pooler, a projection
  that is multiplied with another one's, and all layers of a classifier but the last have none.
- A head's result is returned as it is, scaled or capped. Through a sigmoid or a tanh it is a
  feature, as a pooler's and as the places of boxes are.
"""

import re

import pytest

from lorafx._model.program import read_program
from lorafx._model.roles import find_roles
from tests.zoo.all_architectures import ROWS
from tests.zoo.roles_of_decoders import DECODERS, EXPERT, MIXERS
from tests.zoo.roles_of_encoders import ENCODERS, TRANSLATORS
from tests.zoo.roles_of_senses import SERIES, SEVERAL, SOUND, VISION

TRUTH = {**DECODERS, **EXPERT, **MIXERS, **ENCODERS, **TRANSLATORS, **VISION, **SEVERAL, **SOUND,
         **SERIES}
LETTERS = {"q": "attention.query", "k": "attention.key", "v": "attention.value",
           "o": "attention.output", "m": "mlp", "h": "head"}
# Linear layers whose weights are tables here, of which rows are looked up.
UNDECIDED = {"layoutlmv3": {"encoder.rel_pos_bias", "encoder.rel_pos_x_bias",
                            "encoder.rel_pos_y_bias"}}
BUILT = {row.name: row for row in ROWS}


class Given(Exception):
    """Carries the arguments with which a row calls its model."""


def inputs_of(row):
    def call(**kwargs):
        raise Given(kwargs)

    with pytest.raises(Given) as raised:
        row.run(call)
    return raised.value.args[0]


def written(table):
    """(pattern of names, role, "" for none) of "a.*(b=q c(d=kv e=-))": a.*.b, a.*.c.d, a.*.c.e."""
    within, found = [], []
    for word in re.findall(r"[^\s()]+\(|\)|[^\s()]+", table):
        if word.endswith("("):
            within.append(re.escape(word[:-1]))
        elif word == ")":
            within.pop()
        else:
            name, letters = word.split("=")
            pattern = r"\.".join([*within, re.escape(name)]).replace(r"\*", r"[^.]+")
            found.append((pattern, "+".join(LETTERS[letter] for letter in letters.strip("-"))))
    return found


@pytest.mark.parametrize("name", TRUTH)
def test_roles_are_those_written_by_hand(name):
    row, table = BUILT[name], written(TRUTH[name])
    truth, used = {}, set()
    program = read_program(row.build())
    for site in program.sites:
        [(pattern, role)] = [(pattern, role) for pattern, role in table
                             if re.fullmatch(pattern, site.name)]
        truth[site.name] = role
        used.add(pattern)
    assert used == {pattern for pattern, _ in table}
    found = find_roles(program, inputs_of(row))
    assert set(found.undecided) == UNDECIDED.get(name, set())
    assert {site: found.named().get(site, "") for site in truth} == truth
