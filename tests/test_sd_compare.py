"""sd/compare.py: what it reads from the scripts' rows, and the whole run in small, made once and then read."""
import json

import pytest
import torch
from conftest import load

compare = load("sd/compare.py")


def rows_of(name, **values):
    return {f"{label}.all.{key}": dict(estimate=v) for label, group in ((name, values), ("base", dict(
        gain=0.0, clip_eval=0.8, diversity=0.2))) for key, v in group.items()}


def test_measures_are_those_of_the_rows():
    args = dict(steps=10, guidance=4.0, particles=16, children=3, search="local")
    rows = rows_of("full", gain=1.5, clip_eval=0.7, diversity=0.1, kl=30.0, calls=900, seconds=20.0)
    found = compare.measures(rows, args, "full", "draft")
    assert found == dict(gain=1.5, kl=30.0, calls=900, seconds=20.0, held_out=pytest.approx(-0.1), image_calls=20,
                         diversity_kept=0.5)
    rows = rows_of("das", gain=1.0, clip_eval=0.8, diversity=0.2, seconds=9.0)
    assert compare.measures(rows, args, "das", "das") == dict(gain=1.0, held_out=0.0, diversity_kept=1.0,
                                                              image_calls=320)
    rows = rows_of("search", gain=1.0, clip_eval=0.8, diversity=0.2)
    assert compare.measures(rows, args, "search", "dav")["image_calls"] == 2 * (1 + 9 * 3)
    assert compare.measures(rows, args | dict(search="smc"), "search", "dav")["image_calls"] == 20


def test_spread_is_over_seeds():
    row = compare.measure({"dav": [dict(gain=1.0), dict(gain=2.0), dict(gain=6.0)]})[0]
    assert row["name"] == "dav.all.gain" and row["estimate"] == 3.0 and abs(row["se"] - 7**0.5) < 1e-12


def test_quick_run_is_made_once_and_then_read(tmp_path, monkeypatch, capsys):
    small = dict(updates=2, batch=8, steps=3, images=2)
    for name, module in compare.SCRIPTS.items():
        presets = dict(groups=2, particles=2, steps=3, reference=4) if name == "das" else small
        monkeypatch.setattr(module, "PRESETS", {"quick": module.PRESETS["quick"] | presets})
    args = compare.parse_args(["--quick", "--out", str(tmp_path)])
    numbers = compare.main(args)
    assert all(torch.tensor(float(v)).isfinite() for v in numbers.values())
    assert {name.split(".")[0] for name in numbers} == set(compare.SETS)
    assert {name for name in numbers if name.endswith(".calls")} == {
        f"{name}.all.calls" for name in ("ddpo", "ddpo_kl", "draft_1", "truncated", "draft", "draft_kl", "dav", "dav_kl")}
    assert (tmp_path / "sd_compare" / "figure.png").stat().st_size > 10_000
    capsys.readouterr()
    assert compare.main(args) == numbers
    assert capsys.readouterr().err.count("is read from") == len(compare.SCRIPTS)
    path = tmp_path / "seed0" / "sd_das" / "numbers.json"
    other = json.loads(path.read_text())
    other["args"]["kl_weight"] *= 2
    path.write_text(json.dumps(other))
    assert compare.recorded("das", args, 0)[1]["args"] != other["args"]


@pytest.mark.parametrize("flags", [["--seeds", "0"], ["--steps", "1"]])
def test_bad_flags_end_in_one_sentence(flags, capsys):
    with pytest.raises(SystemExit) as error:
        compare.parse_args(flags)
    assert error.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1
