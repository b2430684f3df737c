"""The benchmark of batches whose rows use adapters of their own runs, and measures what is right.
"""

import json

import pytest
import serve
from serve_parts import rule
from serve_parts.contenders import LORAFX


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_serve(tmp_path, capsys):
    found = serve.main(["--tiny", "--json", str(tmp_path / "serve.json")])
    assert [case["name"] for case in found["serving"]] == ["layer", "decoding", "prefill"]
    for case in found["serving"]:
        assert not any(row["void"] for row in case["rows"].values())
        assert all(len(row["times"]) == 3 for row in case["rows"].values())
    [step] = found["training"]
    assert not step["void"] and len(step["rows"][LORAFX]["times"]) == 3
    assert json.loads((tmp_path / "serve.json").read_text()) == json.loads(json.dumps(found))
    printed = capsys.readouterr().out
    assert serve.serving_table(found["serving"]) in printed
    assert serve.training_table(found["training"]) in printed


def test_the_rule_tells_what_lorafx_chooses():
    timing = rule.Timing(rounds=2, sample=1e-6)
    lines = rule.table(timing, [(8, 16)], widths=(16,), tokens=(1, 64)).split("\n")
    chosen = {line.partition(",")[0]: line.split()[-1] for line in lines[2:-1]}
    assert chosen == {"8 on 16 rows of 1": "stacked", "8 on 16 rows of 64": "gathered"}
