"""toy/compare.py: its problems and measures against exact answers, and the whole run in small."""
import json
import subprocess
import sys

import conftest
import pytest
import torch
from conftest import load

compare = load("toy/compare.py")


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", compare.PROBLEMS)
def test_measures_of_exact_samples_are_exact(name):
    problem = compare.make_problem(name, "cpu")
    found = compare.measures(problem, problem.target.sample(40_000, generator(0)))
    assert abs(found["mean_reward"] - problem.target_reward) < 0.02
    assert found["modes"] == (problem.masses > 0.01).sum() and found["coverage"] > 0.985
    assert abs(found["spread"] - problem.spread) < 0.01


@pytest.mark.parametrize("name", compare.PROBLEMS)
def test_measures_of_a_collapse(name):
    """All samples at one mode: the coverage is that mode's mass, nothing is spread."""
    problem = compare.make_problem(name, "cpu")
    k = int(problem.masses.argmax())
    found = compare.measures(problem, problem.data.means[k].float().expand(1000, 2))
    assert found["modes"] == 1 and abs(found["coverage"] - problem.masses[k]) < 1e-5 and found["spread"] < 1e-3


def test_every_method_has_the_same_target():
    """What DAV tends to after eight rounds at kl_weight 4, and what the others have at kl_weight 1/2."""
    for name in ("equal", "unequal"):
        problem = compare.make_problem(name, "cpu")
        log_p = problem.log_p + 8 * problem.r / 4
        assert (problem.target.log_p - log_p.log_softmax(0)).abs().max() < 1e-10
        assert abs(problem.log_z - log_p.logsumexp(0).item()) < 1e-10


def test_quick_run_writes_figures_and_finite_numbers(tmp_path):
    command = [sys.executable, "toy/compare.py", "--quick", "--problem", "gmm2", "unequal", "--out", str(tmp_path)]
    run = subprocess.run(command, cwd=conftest.SOURCE, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = {r["name"]: r["estimate"] for r in json.loads((tmp_path / "toy_compare/numbers.json").read_text())["rows"]}
    assert all(torch.tensor(float(v)).isfinite() for v in rows.values())
    for problem, methods in dict(gmm2=8, unequal=11).items():
        assert len({name.split(".")[0] for name in rows if name.split(".")[1] == problem}) == methods
        assert rows[f"target.{problem}.emd"] < rows[f"das.{problem}.emd"] < rows[f"pretrained.{problem}.emd"]
    for figure in ("figure.png", "dynamics.png"):
        assert (tmp_path / "toy_compare" / figure).stat().st_size > 10_000


@pytest.mark.parametrize("flags", [["--samples", "100"], ["--seeds", "0"], ["--steps", "1"], ["--problem", "roll"]])
def test_bad_flags_end_in_one_sentence(flags, capsys):
    with pytest.raises(SystemExit) as error:
        compare.parse_args(flags)
    assert error.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1
