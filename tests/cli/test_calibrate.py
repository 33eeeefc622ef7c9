"""`kvfold calibrate`: an adapter at another compression, measured through the cache."""

import json

import pytest

DMS = "--adapter --time dms:8 --compression 2 --data text.txt --tokens 256 --context 64 --batch 2"
DMC = "--lora 2 --time dmc --compression 2 --data text.txt --tokens 256 --context 64 --batch 2 --learning-rate 3e-2"
"""So fast that decisions come to differ from token to token: alike ones all fall on one side."""


@pytest.mark.parametrize("train", [DMS, DMC])
def test_the_cache_holds_what_was_asked_for(kvfold, folder, train):
    assert kvfold(f"retrofit tiny first {train} --set warm_start={str(train is DMS).lower()}").code == 0
    done = kvfold("calibrate tiny first second --compression 3 --data text.txt --context 64 --sequences 6 --json")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert facts["after"] == pytest.approx(3, rel=0.03) and facts["before"] < 2.7
    read = kvfold(
        "eval tiny --time full --compare first --compare second --text text.txt --context 64 --windows 6 --json"
    )
    first, second = (row["compression"] for row in json.loads(read.out)["rows"][1:])
    assert {row["trained_tokens"] for row in json.loads(read.out)["rows"][1:]} == {256}
    assert second == pytest.approx(3, rel=0.15) and first < 2.7
    card = (folder / "second" / "README.md").read_text()
    assert card.startswith("# second\n") and "# first" in card and "3 was asked for" in card
    assert not list(folder.glob(".second*"))
    ratios = [json.loads((folder / name / "adapter.json").read_text())["kept_ratios"] for name in ("first", "second")]
    for one, compression in zip(ratios, (facts["before"], facts["after"]), strict=True):
        assert one["lengths"] == [16, 32, 64] and len(one["median"][0]) == len(one["p95"][0]) == 4
        assert sum(one["median"][-1]) / 4 == pytest.approx(1 / compression, rel=0.15)
    assert len((folder / "second" / "adapter.json").read_text().splitlines()) < 60, "a list of numbers takes one line"


def test_gates_that_stay_are_measured_anew(kvfold, folder):
    assert kvfold(f"retrofit tiny first {DMS}").code == 0
    done = kvfold("calibrate tiny first again --data text.txt --context 48 --sequences 6 --json")
    assert done.code == 0 and json.loads(done.out)["shift"] == 0.0, done.err
    first, again = (json.loads((folder / name / "adapter.json").read_text()) for name in ("first", "again"))
    assert again.pop("kept_ratios")["lengths"] == [12, 24, 48] and first.pop("kept_ratios")["time"] == "dms:8"
    assert first == again
    weights = [(folder / name / "adapter.safetensors").read_bytes() for name in ("first", "again")]
    assert weights[0] == weights[1] and (folder / "again" / "README.md").read_text().startswith("# first")


def test_an_adapter_for_some_layers_alone(kvfold, folder):
    """The others count with all that they keep, here and where it is measured."""
    train = DMS.replace("--time dms:8 --compression 2", "--time 'dms:8; 0=full' --compression 1.5")
    done = kvfold(f"retrofit tiny first {train} --set warm_start=true")
    assert done.code == 0 and "compression 1.5 at 64 tokens (4.46 by the gates alone)" in done.err, done.err
    done = kvfold("calibrate tiny first second --compression 1.3 --data text.txt --context 64 --sequences 6 --json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["after"] == pytest.approx(1.3, rel=0.03)
    read = kvfold("eval tiny --time full --compare second --text text.txt --context 64 --windows 6 --json")
    row = json.loads(read.out)["rows"][1]
    assert row["method"] == "full; 1=dms:8 of second" and row["compression"] == pytest.approx(1.3, rel=0.1)
    assert (
        "leave fewer layers without gates"
        in kvfold("calibrate tiny first third --compression 2 --data text.txt --context 64").error
    )


def test_bad_input(kvfold, folder):
    assert kvfold(f"retrofit tiny first {DMS}").code == 0
    assert kvfold(f"retrofit tiny plain {DMC.replace('--time dmc --compression 2', '')}").code == 0
    for line, said in [
        ("calibrate tiny nowhere out --compression 2", "adapter nowhere: no adapter.json there"),
        ("calibrate tiny first out --compression 0.5", "compression 0.5: it is times smaller"),
        ("calibrate tiny first out --compression 8 --context 64", "use a delay of 6 or less"),
        ("calibrate tiny first tiny --compression 2", "tiny: the folder is not empty"),
        ("calibrate tiny plain out --compression 2", "adapter plain: it has no gates to shift"),
    ]:
        assert said in kvfold(line).error, line
    assert not (folder / "out").exists()
