"""What a result file says of its rows' origin."""

import json

from kvfold.record import made, with_record, write_result

FIELDS = {"git_commit", "kvfold", "torch", "cpu", "threads", "dtype", "when"}


def test_every_row_of_a_written_result_has_its_record(tmp_path):
    payload = {"rows": [{"a": 1}, {"a": 2}], "passkey": [{"b": 1}], "environment": {"threads": 3, "dtype": "float32"}}
    data = json.loads(write_result(tmp_path / "one.json", "quality", payload, "a command").read_text())
    for row in [*data["rows"], *data["passkey"]]:
        assert set(row["made"]) == FIELDS - ({"git_commit"} if data["git_commit"] is None else set())
        assert (row["made"]["threads"], row["made"]["dtype"], row["made"]["torch"]) == (
            3,
            "float32",
            data["environment"]["torch"],
        )
    assert payload["rows"] == [{"a": 1}, {"a": 2}], "what the caller gave stays as it was"


def test_a_row_of_an_earlier_run_keeps_its_record(tmp_path):
    earlier = {"git_commit": "an earlier one", "threads": 1}
    rows = [{"a": 1, "made": earlier}, {"a": 2}]
    payload = {"rows": rows, "environment": {"threads": 2, "dtype": "float32"}}
    first, second = json.loads(write_result(tmp_path / "one.json", "quality", payload, "").read_text())["rows"]
    assert {name: first["made"][name] for name in earlier} == earlier and first["made"]["dtype"] == "float32"
    assert second["made"]["threads"] == 2 and second["made"].get("git_commit") != "an earlier one"


def test_a_record_leaves_out_what_is_not_known():
    assert "threads" not in made(None) and "dtype" not in made(1)
    assert with_record([{"a": 1, "made": None}], {"threads": 1}) == [{"a": 1, "made": {"threads": 1}}]
