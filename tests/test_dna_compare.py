"""dna/compare.py: what it reads from the scripts' rows, and the whole run in small, made once and then read."""
import json
import subprocess
import sys

import conftest
import pytest
import torch
from conftest import load

compare = load("dna/compare.py")


def test_measures_are_those_of_the_rows():
    motifs = {f"motif_{name.lower()}": 0.1 * k for k, name in enumerate(compare.das.MOTIFS)}
    values = dict(activity=3.0, held_out=1.0, accessible=0.5, kmer3_correlation=0.9, diversity=100.0,
                  log_likelihood=-260.0, **motifs)
    rows = {f"dav.hepg2.{key}": dict(estimate=v) for key, v in values.items()}
    found = compare.measures(rows, "hepg2", "dav")
    assert found["over_optimisation"] == 2.0 and abs(found["wanted"] - 0.15) < 1e-12
    assert abs(found["unwanted"] - 0.45) < 1e-12 and found["diversity"] == 100.0


def test_spread_is_over_seeds():
    found = {"dav": [dict(held_out=1.0), dict(held_out=2.0), dict(held_out=6.0)]}
    row = compare.measure(found, 4.0, "hepg2")[1]
    assert row["name"] == "dav.hepg2.held_out" and row["estimate"] == 3.0 and abs(row["se"] - 7**0.5) < 1e-12


def test_quick_run_is_made_once_and_then_read(tmp_path):
    words = [sys.executable, "dna/compare.py", "--quick", "--out", str(tmp_path)]
    run = subprocess.run(words, cwd=conftest.SOURCE, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    numbers = tmp_path / "dna_compare" / "numbers.json"
    rows = {r["name"]: r["estimate"] for r in json.loads(numbers.read_text())["rows"]}
    assert all(torch.tensor(float(v)).isfinite() for v in rows.values())
    assert {name.split(".")[0] for name in rows} == set(compare.SETS)
    assert (tmp_path / "dna_compare" / "figure.png").stat().st_size > 10_000
    again = subprocess.run(words, cwd=conftest.SOURCE, capture_output=True, text=True)
    assert again.stderr.count("is read from") == len(compare.SCRIPTS)
    assert {r["name"]: r["estimate"] for r in json.loads(numbers.read_text())["rows"]} == rows
    record = tmp_path / "seed0" / "dna_das" / "numbers.json"
    other = json.loads(record.read_text())
    other["args"]["kl_weight"] *= 2
    record.write_text(json.dumps(other))
    assert compare.recorded("das", compare.parse_args(["--quick", "--out", str(tmp_path)]), 0)[1]["args"] != other["args"]


def test_every_method_runs_on_a_table_of_the_papers_format(tmp_path):
    """Short sequences whose activity in HepG2 is the number of GATA, in the columns of the DRAKES release."""
    rng, lines = torch.Generator().manual_seed(5), ["seq,hepg2,k562,sknsh,chrom"]
    for k in range(600):
        seq = "".join("ACGT"[v] for v in torch.randint(4, (40,), generator=rng))
        chrom = [*range(1, 23), "X"][k % 23]
        lines.append(f"{seq},{seq.count('GATA') + 0.01 * (k % 7)},{seq.count('CA')},{k % 3},chr{chrom}")
    (tmp_path / "dataset.csv").write_text("\n".join(lines))
    common = ["--data", str(tmp_path / "dataset.csv"), "--quick", "--out", str(tmp_path)]
    pretrain = load("dna/pretrain.py")
    pretrain.main(pretrain.parse_args([*common, "--steps", "3", "--judge-steps", "3"]))
    numbers = compare.main(compare.parse_args(common))  # das, dav, draft, ddpo
    assert all(torch.tensor(float(v)).isfinite() for v in numbers.values()) and "dav_posterior.data.held_out" in numbers
    for script in ("constrained_alignment", "msdda"):
        module = load(f"dna/{script}.py")
        numbers = module.main(module.parse_args(common))
        assert all(torch.tensor(float(v)).isfinite() for v in numbers.values())


@pytest.mark.parametrize("flags", [["--seeds", "0"], ["--steps", "1"]])
def test_bad_flags_end_in_one_sentence(flags, capsys):
    with pytest.raises(SystemExit) as error:
        compare.parse_args(flags)
    assert error.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1
