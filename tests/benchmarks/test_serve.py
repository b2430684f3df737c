"""The benchmark of serving adapters runs, and measures what is right."""

import json

import pytest
import serve
from serve_parts import report, rule
from serve_parts.contenders import LORAFX


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_serve(tmp_path, capsys):
    found = serve.main(["--tiny", "--json", str(tmp_path / "serve.json")])
    assert [case["name"] for case in found["serving"]] == ["layer", "decoding", "prefill"]
    for case in found["serving"]:
        assert not any(row["void"] for row in case["results"].values())
        assert all(len(row["times"]) == 3 for row in case["results"].values())
    [switching], [compiled], [step] = (
        found[kind] for kind in ("switching", "compiled", "training"))
    assert not step["void"] and len(step["results"][LORAFX]["times"]) == 3
    assert not any(compiled["void"].values()) and len(compiled["results"]) == 6
    assert {len(row["times"]) for row in switching["results"].values()} == {3}
    assert switching["bytes"] == 4 * 8 * (2 * 64 * 4 + 3 * (64 + 176))  # q k v o, gate up down
    assert json.loads((tmp_path / "serve.json").read_text()) == json.loads(json.dumps(found))
    printed = capsys.readouterr().out
    for kind, (table, legend) in report.TABLES.items():
        assert table(found[kind]) in printed and legend in printed
    section = report.readme(found)
    assert report.serving_table(found["serving"]) in section
    assert f"{found['seconds']:.0f} s" in section[0]


def test_the_rule_tells_what_lorafx_chooses():
    timing = rule.Timing(rounds=2, sample=1e-6)
    lines = rule.table(timing, [(8, 16)], widths=(16,), tokens=(1, 64)).split("\n")
    chosen = {line.partition(",")[0]: line.split()[-1] for line in lines[2:-1]}
    assert chosen == {"8 on 16 rows of 1": "stacked", "8 on 16 rows of 64": "gathered"}
