"""toy/and_composition.py: closed forms of the product, both KL lemmas, the dual step, compose on exact Gaussians."""
import json
import math

import pytest
import torch
from conftest import load, planted

ac = load("toy/and_composition.py")
ABAR = ac.signal_power(torch.linspace(1, 0, 11)).tolist()

def make(name, positions=(0, 4, 8)):
    torch.manual_seed(0)
    return ac.Problem(name, list(positions))

def flat(found):
    """x and log_q of compose without their groups."""
    return found[0].flatten(0, 1), found[1].flatten(0, 1)

# ---- the exact answers -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, positions, dual, worst, equal", [
    ("paper", (0, 4, 8), (0.495, 0.2525, 0.2525), 10.201, 17.77778),
    ("pair", (0, 4, 8), (0.20959, 0.79041), 3.63806, 5.07537),
    ("ring", (0, 4, 8), (1 / 3, 1 / 3, 1 / 3), 80, 80), ("ring", (0, 1, 4), (0.5, 0, 0.5), 60, 86.507)])
def test_exact_multipliers_and_kls(name, positions, dual, worst, equal):
    problem = make(name, positions)
    assert (problem.dual - torch.tensor(dual).double()).abs().max() < 1e-4
    kls = problem.product(problem.dual)[1]
    assert abs(kls.max() - worst) < 2e-3
    assert (kls[problem.dual > 1e-3] - kls.max()).abs().max() < 2e-3  # all that count are equally far
    assert abs(problem.product(torch.full_like(problem.dual, 1 / len(dual)))[1].max() - equal) < 1e-3
    assert problem.name == "_".join([name, *map(str, positions)] if name == "ring" else [name])

def test_product_is_the_normalised_product_of_the_densities():
    problem, dual = make("pair"), torch.tensor([0.3, 0.7], dtype=torch.float64)
    line = torch.linspace(-6, 6, 601, dtype=torch.float64)
    grid, area = torch.cartesian_prod(line, line), (line[1] - line[0]) ** 2
    log_q = problem.gaussians.log_prob(grid[:, None]).sum(2)  # (M, m)
    z = ((log_q @ dual).exp() * area).sum()
    p, kls = problem.product(dual)
    log_p = p.log_prob(grid).sum(1)
    assert (log_q @ dual - z.log() - log_p).abs().max() < 1e-10
    assert ((log_p.exp() * area) @ (log_p[:, None] - log_q) - kls).abs().max() < 1e-10
    assert abs(dual @ kls + z.log()) < 1e-10  # the dual function is -log Z

# ---- the dual step ---------------------------------------------------------------------------------------------------
def test_dual_step_on_the_simplex_goes_half_way_to_the_maximum():
    """max of v slack - v A v / 2 around the middle, by hand: with A = 10 I the move is the centred slack over 10."""
    dual, slack = torch.full((3,), 1 / 3).double(), torch.tensor([1.0, 2.0, 3.0]).double()
    near = ac.dual_step(dual, slack, 10 * torch.eye(3).double(), True)
    assert (near - dual - torch.tensor([-0.05, 0, 0.05])).abs().max() < 1e-6
    far = ac.dual_step(dual, 100 * slack, torch.eye(3).double(), True)  # the maximum is a corner
    assert (far - torch.tensor([1 / 6, 1 / 6, 2 / 3]).double()).abs().max() < 1e-6

@pytest.mark.parametrize("name, positions", [
    ("paper", ()), ("pair", ()), *(("ring", hours) for hours in [(0, 4, 8), (0, 1, 4), (0, 1, 2), (0, 5, 7)])])
def test_sampled_rounds_find_the_multipliers(name, positions):
    """12 rounds, as in the default, of 1,000 paths with exact scores: worst KL within 0.05 + 0.5% of the best."""
    problem = make(name, positions)
    path, dual, _, _ = ac.run("smc", problem, [q.denoise for q in problem.models], ABAR, (10, 100), 12, 0)
    best = problem.product(problem.dual)[1].max()
    assert path.shape == (13, len(dual)) and (path.sum(1) - 1).abs().max() < 1e-6 and path.min() >= 0
    assert best - 1e-6 <= problem.product(dual)[1].max() < 1.005 * best + 0.05
    if name == "pair":
        assert (dual - problem.dual).abs().max() < 0.02

def test_algorithm_3_stays_at_equal_weights_for_every_pair():
    problem = make("pair")
    path, dual, x, _ = ac.run("algorithm_3", problem, [q.denoise for q in problem.models], ABAR, (10, 100), 4, 0)
    assert (path - 0.5).abs().max() < 1e-6
    assert abs(x[..., 0].mean() - problem.product(dual)[0].mean[0]) > 0.2  # and its samples are not of that product

# ---- samples of the product ------------------------------------------------------------------------------------------
def scores(module, name="pair", dual=(0.2, 0.8), groups=400):
    """z of Z, mean and variance over groups, each weighted by its Z, which makes them unbiased."""
    torch.manual_seed(1)
    problem, dual = module.Problem(name, [0, 4, 8]), torch.tensor(dual).double()
    x, _, log_z = module.compose([q.denoise for q in problem.models], dual, ABAR, (groups, 100))
    p, kls = problem.product(dual)
    z = (log_z + dual @ kls).exp()
    found = [z - 1, z * (x[..., 0] - p.mean[0]).mean(1), z * ((x[..., 0] - p.mean[0]) ** 2 - p.variance[0]).mean(1)]
    return torch.stack([(v.mean() / v.std() * groups**0.5).double() for v in found])

def test_compose_samples_the_product():
    assert scores(ac).abs().max() < 5

@pytest.mark.parametrize("old, new", [
    ("+ log_q), log_c", "+ log_q), 0 * log_c"),  # Algorithm 3 leaves the weight out
    ("(means - mean) ** 2 / vars)).sum(0)).sum(-1) / 2", "(means - mean) ** 2 / vars)).sum(0)).sum(-1)"),
    ("var = 1 / (share / vars).sum(0)", "var = (share * vars).sum(0)"),
    ("x = mean + var.sqrt()", "x = (share * means).sum(0) + var.sqrt()")])
def test_planted_bugs_are_caught(old, new):
    assert scores(planted("toy/and_composition.py", (old, new))).abs().max() > 10

def test_paths_give_the_gradient_and_hessian_of_the_dual_function():
    problem, dual = make("paper"), torch.tensor([0.5, 0.3, 0.2]).double()
    _, log_q = flat(ac.compose([q.denoise for q in problem.models], dual, ABAR, (1, 20_000)))
    gap = log_q[:, :1] - log_q[:, 1:]  # KL_i - KL_1
    z = (gap.mean(0) - (problem.product(dual)[1][1:] - problem.product(dual)[1][0])) / gap.std(0) * 20_000**0.5
    assert z.abs().max() < 5
    step = torch.tensor([-1.0, 1.0, 0.0]).double() * 1e-4  # second difference along a direction of the simplex
    values = [(v @ problem.product(v)[1]) for v in (dual - step, dual, dual + step)]
    second = (values[0] - 2 * values[1] + values[2]) / 1e-8
    assert abs(-gap[:, 0].var() / second - 1) < 0.06  # 20,000 draws: relative error 0.01

# ---- the lemmas ------------------------------------------------------------------------------------------------------
def test_lemma_1_path_kl():
    """Paths of the first model by themselves: exact kernels give the KL of the samples, DDPM's the sum of Lemma 1."""
    problem, dual = make("pair"), torch.tensor([1.0, 0.0]).double()
    first, second = (q.denoise for q in problem.models)
    _, log_q = flat(ac.compose([first, second], dual, ABAR, (1, 20_000)))
    ratio = log_q[:, 0] - log_q[:, 1]
    assert abs(ratio.mean() - problem.product(dual)[1][1]) < 5 * ratio.std() / 20_000**0.5
    models = [lambda x, a, q=q: (q.denoise(x, a)[0], torch.zeros_like(x)) for q in make("paper").models[:2]]
    _, log_q = flat(ac.compose(models, dual, ABAR[:-1], (1, 20_000)))  # the last step has no noise
    ratio, lemma = log_q[:, 0] - log_q[:, 1], 0
    for a, b in zip(ABAR[:-2], ABAR[1:-1]):  # of equal variances, the forecasts differ by the same at every x
        gap = b**0.5 * (1 - a / b) / (0.05 * a + 1 - a)  # of the means of x_{t-1}, for data one apart
        lemma += gap**2 * (2**2 + 0.2**2) / (2 * (1 - b) / (1 - a) * (1 - a / b))
    assert abs(ratio.mean() - lemma) < 5 * ratio.std() / 20_000**0.5
    assert abs(lemma - 43.313) < 1e-2 and abs(make("paper").product(torch.eye(3).double()[0])[1][1] - 40.4) < 1e-5

@pytest.mark.parametrize("name", ["paper", "pair"])
def test_lemma_2_pointwise_kl(name):
    problem = make(name)
    models, dual = [q.denoise for q in problem.models], torch.eye(len(problem.dual))[0].double()
    found = ac.pointwise_kl(models[0], models, problem.models[0].sample((20_000,)))
    exact = problem.product(dual)[1]
    assert found[0] == 0 and (found[1:] / exact[1:] - 1).abs().max() < 0.02  # what lies beyond an SNR of e^8

# ---- the command line ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("positions", ["0 0 4", "0 4 12", "-1 4 8", "0 4", "0 4 x"])
def test_bad_positions_are_one_sentence(positions, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        ac.parse_args(["--positions", *positions.split(), "--out", str(tmp_path)])
    assert stop.value.code == 2 and "--positions" in capsys.readouterr().err.splitlines()[-1]

def test_quick_run_writes_rows_and_figure(capsys, tmp_path):
    flags = "--quick --problem ring --positions 0 1 4 --score exact --out".split()
    ac.main(ac.parse_args([*flags, str(tmp_path)]))
    assert capsys.readouterr().out.startswith("COARSE")
    rows = json.loads((tmp_path / "numbers.json").read_text())["rows"]
    assert len({(r["problem"], r["method"], r["quantity"]) for r in rows}) == len(rows) == 5 * 7
    assert {r["problem"] for r in rows} == {"ring_0_1_4"} and {r["method"] for r in rows} == set(ac.METHODS)
    assert all(math.isfinite(r["estimate"]) for r in rows) and (tmp_path / "figure.png").stat().st_size > 10_000
