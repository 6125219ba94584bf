"""toy/or_composition.py and toy/constrained_alignment.py: exact multipliers, estimators, small runs, planted bugs."""
import json
import math

import pytest
import torch
from conftest import load, planted

mix, ali = load("toy/or_composition.py"), load("toy/constrained_alignment.py")
F = torch.float64

@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)

def vector(*values):
    return torch.tensor(values, dtype=F)

def double(module, *args):
    """A problem in float64 throughout."""
    torch.set_default_dtype(F)
    try:
        return module.Problem(*args)
    finally:
        torch.set_default_dtype(torch.float32)

# ---- the dual step ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("module", [mix, ali])
def test_dual_step_goes_half_way_to_the_newton_point(module):
    curvature, slack, dual = vector([2, 0.5], [0.5, 1]), vector(0.3, -0.1), vector(1, 2)
    newton = dual + torch.linalg.solve(curvature, slack)
    assert (module.dual_step(dual, slack, curvature, simplex=False) - (dual + newton) / 2).abs().max() < 1e-5

def test_dual_step_stays_in_its_set():
    for _ in range(20):
        slack, dual = 5 * torch.randn(3, dtype=F), torch.rand(3, dtype=F) + 0.1
        dual = dual / dual.sum()
        on = mix.dual_step(dual, slack, mix.curvature(dual), simplex=True)
        assert abs(on.sum() - 1) < 1e-8 and (on >= 0).all()
        assert (ali.dual_step(dual, slack, torch.eye(3, dtype=F), simplex=False) >= 0).all()

# ---- OR: exact -------------------------------------------------------------------------------------------------------
def test_exact_weights_of_the_paper():
    """Disjoint supports: kl has equal weights and log 2; elbo has weights as exp(entropy)."""
    problem = mix.Problem("paper")
    kl, elbo = mix.optimum(problem, "kl"), mix.optimum(problem, "elbo")
    assert (kl - vector(1, 1) / 2).abs().max() < 1e-5 and (elbo - vector(1, 2) / 3).abs().max() < 1e-5
    assert (problem.slack(kl, "kl") - math.log(2)).abs().max() < 1e-4
    assert (problem.slack(elbo, "elbo") - 0.24761).abs().max() < 1e-4
    assert (problem.slack(elbo, "kl") - vector(3, 1.5).log()).abs().max() < 1e-4
    entropy = math.log(2 * math.pi * math.e * 0.025)  # of one mode
    assert (problem.entropy - vector(entropy, entropy + math.log(2))).abs().max() < 1e-5  # overlap of modes

@pytest.mark.parametrize("name, objective", [("paper", "elbo"), ("overlap", "kl"), ("overlap", "elbo")])
def test_or_optimum_equals_the_slacks_and_maximises_the_dual(name, objective):
    problem = mix.Problem(name)

    def value(dual):  # kl: the generalised Jensen-Shannon divergence; elbo: the entropy of the mixture
        return dual @ problem.slack(dual, objective)

    best = mix.optimum(problem, objective)
    slack = problem.slack(best, objective)
    assert (slack - slack.mean()).abs().max() < 1e-4
    for shift in (-0.02, 0.02):
        assert value(best + vector(shift, -shift)) < value(best)

def test_slack_is_the_gradient_of_the_dual_function():
    """Along the simplex: in all, its gradient is the slacks less 1."""
    problem, dual, h = double(mix, "overlap"), vector(0.3, 0.7), 1e-5
    for objective in ("kl", "elbo"):
        up, down = (dual + e * vector(1, -1) for e in (h, -h))
        slope = (up @ problem.slack(up, objective) - down @ problem.slack(down, objective)) / (2 * h)
        assert abs(slope - problem.slack(dual, objective) @ vector(1, -1)) < 1e-8

@pytest.mark.parametrize("name", ["paper", "overlap"])
def test_curvature_bounds_the_hessian(name):
    """And is no larger than needed: on disjoint supports it is the Hessian."""
    problem = double(mix, name)
    for first in (0.1, 0.5, 0.8):
        dual = vector(first, 1 - first)
        log_mix = (problem.log_q + dual.log()[:, None]).logsumexp(0)
        u = (problem.log_q - log_mix).exp()
        hessian = (u * log_mix.exp()) @ u.T
        assert torch.linalg.eigvalsh(mix.curvature(dual) - hessian).min() > -1e-8
        if name == "paper":
            assert (mix.curvature(dual) - hessian).abs().max() < 1e-4

# ---- OR: estimates ---------------------------------------------------------------------------------------------------
class Exact:
    """The denoiser of a mixture with the interface of the network."""

    def __init__(self, mixture):
        self.mixture = mixture
    def __call__(self, x, abar):
        return self.mixture.denoise(x, abar[..., None] if torch.is_tensor(abar) else abar)

@pytest.mark.parametrize("name", ["paper", "overlap"])
@pytest.mark.parametrize("objective", ["kl", "elbo"])
def test_denoising_errors_are_nats(name, objective):
    problem, weights = mix.Problem(name), vector(0.3, 0.7)
    slack = mix.look(problem, Exact(problem.mixture(weights)), objective, 200_000)[-1].double()
    z = (slack.mean(1) - problem.slack(weights, objective)) / (slack.std(1) / 200_000**0.5)
    assert z.abs().max() < 5, z

@pytest.mark.parametrize("change", [("1.5645 * abar.sqrt() / (1 - abar) ** 1.5", "1.5645 * abar / (1 - abar) ** 2"),
                                    ("else -torch.stack", "else torch.stack")])
def test_planted_bug_in_the_nats_is_caught(change):
    bug, weights = planted("toy/or_composition.py", change), vector(0.3, 0.7)
    problem = bug.Problem("paper")
    slack = bug.look(problem, Exact(problem.mixture(weights)), "elbo", 200_000)[-1].double()
    assert ((slack.mean(1) - problem.slack(weights, "elbo")) / (slack.std(1) / 200_000**0.5)).abs().max() > 5

def test_sampler_reproduces_the_mixture():
    problem, weights, n = mix.Problem("paper"), vector(0.3, 0.7), 20_000
    x = mix.generate(Exact(problem.mixture(weights)), n, 100)
    share, squares = problem.shape(x.double(), torch.full((n,), 1 / n, dtype=F))
    true = vector(0.3, 0.35, 0.35)
    assert ((share - true) / (true * (1 - true) / n).sqrt()).abs().max() < 5
    assert abs(squares.mean() - 0.025) < 5e-4  # 100 steps add 1e-4, one standard error is 2e-4

def test_a_short_run_moves_to_the_entropy_weights():
    problem = mix.Problem("paper")
    _, path, found = mix.fit(problem, "elbo", 300, every=20)
    assert len(path) == 1 + 13 and abs(found[0] - 1 / 3) < 0.08, found  # equal weights are off by .17

def test_the_exact_score_finds_the_weights():
    problem, x = mix.Problem("overlap"), torch.randn(2, 50, 2)
    torch.manual_seed(0)
    net, path, found = mix.fit(problem, "elbo", 600, "exact", every=20)
    exact = problem.mixture(path[-1]).denoise(x, 0.4)
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(net(x, torch.full((50, 1), 0.4)), exact))
    assert abs(found[0] - mix.optimum(problem, "elbo")[0]) < 0.03, found  # .000, .003, .008, .007 for seeds 0 to 3

# ---- alignment: exact ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["linear", "competing", "inactive", "bump", "objective", "combined"])
def test_kkt_and_zero_gap(name):
    problem = ali.Problem(name)
    p, mean, _, kl, value = problem.moments(problem.best)
    assert (mean >= problem.b - 1e-4).all() and (problem.best >= 0).all()
    assert (problem.best * (mean - problem.b)).abs().max() < 1e-4  # what is not met with equality has no multiplier
    assert abs(kl - value) < 1e-4 and abs(p.sum() - 1) < 1e-12
    assert abs(kl - p @ (p.log() - problem.log_q).nan_to_num(neginf=0)) < 1e-10

def test_linear_rewards_on_a_gaussian_are_linear_algebra():
    rows, b = vector([1, 0], [-0.6, 0.8]), vector(0.6, 0.3)
    best = torch.linalg.solve(0.5 * rows @ rows.T, b)
    assert (ali.Problem("competing").best - best).abs().max() < 1e-4

def test_combined_is_the_best_worst_kl():
    """Its two KLs are equal, and its tilt is the product q_1^(1 - w) q_2^w exp(dual r) of Gaussians."""
    problem = ali.Problem("combined")
    dual, w = problem.best
    precision = (1 - w) / 0.3 + w / 0.15
    mean = vector((-0.6 * (1 - w) / 0.3 + 0.6 * w / 0.15) / precision, dual / precision)
    p, rewards, _, kl, _ = problem.moments(problem.best)
    assert (p @ problem.grid - mean).abs().max() < 1e-6 and abs(rewards[1]) < 1e-4
    apart = [((mean - vector(m, 0)) ** 2).sum() / v + 2 / precision / v - 2 + 2 * math.log(v * precision)
             for m, v in ((-0.6, 0.3), (0.6, 0.15))]
    assert abs(apart[0] - apart[1]) < 1e-3 and abs(kl - apart[0] / 2) < 1e-4

def test_moments_are_derivatives_of_the_dual_function():
    problem, dual, h = double(ali, "objective"), vector(1, 0.5, 0.2), 1e-5
    _, mean, cov, *_ = problem.moments(dual)
    for i, e in enumerate(h * torch.eye(3, dtype=F)):
        (_, mean_up, _, _, up), (_, mean_down, _, _, down) = problem.moments(dual + e), problem.moments(dual - e)
        assert abs((up - down) / (2 * h) - (problem.b - mean)[i]) < 1e-8
        assert ((mean_up - mean_down) / (2 * h) - cov[i]).abs().max() < 1e-8

def test_the_multiplier_is_the_price_of_the_threshold():
    kl = [ali.Problem("linear", [0.5 + h]).moments(ali.Problem("linear", [0.5 + h]).best)[3] for h in (-0.01, 0.01)]
    assert abs((kl[1] - kl[0]) / 0.02 - ali.Problem("linear").best[0]) < 1e-3

def test_threshold_left_out_of_the_dual_function_is_caught():
    bug = planted("toy/constrained_alignment.py", ("dual @ self.b - log_z\n", "-log_z\n")).Problem("linear")
    _, _, _, kl, value = bug.moments(bug.best)
    assert abs(kl - value) > 0.1

@pytest.mark.parametrize("flags", [["bump", "--threshold", "1.1"], ["competing", "--threshold", "5", "5"],
                                   ["competing", "--threshold", "nan", "1"], ["linear", "--threshold", "1", "2"]])
def test_thresholds_that_nothing_meets_end_in_a_sentence(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        ali.parse_args(["--out", str(tmp_path), "--problem", *flags])
    assert end.value.code == 2 and "threshold" in capsys.readouterr().err.splitlines()[-1]

# ---- alignment: paths ------------------------------------------------------------------------------------------------
def test_path_kl_of_gaussians_is_their_kl():
    """The tilt of a Gaussian by a linear reward keeps the kernels' variance: the KL of paths is the KL of x_0."""
    problem, n = ali.Problem("competing"), 20_000
    shift = 0.5 * (vector([1, -0.6], [0, 0.8]) @ problem.best).float()
    tilted = ali.Mixture(torch.zeros(1), shift[None], 0.5)
    abar = ali.signal_power(torch.linspace(1, 0, 51)).tolist()
    for hold in (False, True):
        x, kl = ali.rollout(tilted.denoise, problem.data.denoise, torch.randn(n, 2), abar, hold)
        assert abs(kl.mean() - problem.moments(problem.best)[3]) < 0.02
        assert ((x.mean(0) - shift) / (0.5 / n) ** 0.5).abs().max() < 5

@pytest.mark.parametrize("steps", [1, 200])  # in one step all of it is in the variance, in many none
def test_path_kl_counts_the_change_of_variance(steps):
    wide, narrow = (ali.Mixture(torch.zeros(1), torch.zeros(1, 2), v) for v in (0.5, 0.25))
    abar = ali.signal_power(torch.linspace(1, 0, steps + 1)).tolist()
    _, kl = ali.rollout(narrow.denoise, wide.denoise, torch.randn(20_000, 2), abar)
    assert abs(kl.mean() - (math.log(2) - 0.5)) < 0.02  # of two coordinates

# ---- runs ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("module, flags", [(mix, ["--problem", "paper"]), (ali, ["--problem", "bump"]),
                                           (ali, ["--problem", "bump", "--score", "exact"])])
def test_quick_run_writes_tidy_rows(module, flags, tmp_path, capsys):
    module.main(module.parse_args(["--quick", "--out", str(tmp_path), *flags]))
    rows = json.loads((tmp_path / "numbers.json").read_text())["rows"]
    assert len({(r["problem"], r["method"], r["quantity"]) for r in rows}) == len(rows) > 5
    assert capsys.readouterr().out.startswith("COARSE") and (tmp_path / "figure.png").stat().st_size > 10_000
