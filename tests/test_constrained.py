"""toy/and_composition.py, or_composition.py and constrained_alignment.py against closed forms, KKT conditions, and bugs."""
import json
import math

import pytest
import torch
from conftest import load, planted

land, lor, ali = (load(f"toy/{name}.py") for name in ("and_composition", "or_composition", "constrained_alignment"))
F = torch.float64


def generator(seed):
    return torch.Generator().manual_seed(seed)


def assert_one_sentence(end, capsys):
    text = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(text) == 1 and len(text[0]) > 15, text


def simplex_points(count, n):
    v = torch.rand(n, count, generator=generator(0), dtype=F) + 0.05
    return v / v.sum(1, keepdim=True)


# ---- simplex and multipliers -----------------------------------------------------------------------------------------


def test_projection_to_the_simplex():
    assert land.project_to_simplex(torch.tensor([0.2, 0.3, 2.0], dtype=F)).tolist() == [0, 0, 1]
    v = 2 * torch.randn(200, 4, generator=generator(1), dtype=F)
    for row in v:
        p = land.project_to_simplex(row)
        assert abs(p.sum() - 1) < 1e-12 and (p >= 0).all()
        assert (land.project_to_simplex(p) - p).abs().max() < 1e-12
        corners = torch.eye(4, dtype=F)  # the nearest point: no corner of the simplex lies on the outer side
        assert ((corners - p) @ (row - p)).max() < 1e-10


def test_box_clip_is_not_a_projection():
    """Clipping to [0, 1], which leaves the simplex, fails the test above."""
    bug = planted("toy/and_composition.py", ("return (v - excess[(top > excess).sum() - 1]).clamp(min=0)",
                                             "return v.clamp(0, 1)"))
    assert abs(bug.project_to_simplex(torch.tensor([0.2, 0.3, 2.0], dtype=F)).sum() - 1) > 0.1


def test_nupi_without_proportional_term_is_dual_ascent():
    dual, memory, gap = torch.tensor([0.3, 0.7]), torch.tensor([1.0, 2.0]), torch.tensor([0.5, -0.2])
    plain, _ = land.dual_update(dual, gap, memory, 0.1)
    assert torch.equal(land.dual_update(dual, gap, memory, 0.1, kp=0.0, nu=0.6)[0], plain)
    assert torch.equal(plain, dual + 0.1 * gap)
    damped, average = land.dual_update(dual, gap, memory, 0.1, kp=2.0, nu=0.5)
    assert torch.allclose(damped, dual + 0.1 * gap + 2 * (average - memory))


# ---- AND: exact ------------------------------------------------------------------------------------------------------


def gaussian_product(problem, weights):
    """Mean, covariance and -log Z of prod_i N(m_i, S_i)^weights_i, by adding precisions."""
    means = torch.stack([m.means[0] for m in problem.models])
    precisions = torch.stack([torch.linalg.inv(m.covs[0]) for m in problem.models])
    precision = torch.einsum("m,mde->de", weights, precisions)
    mean = torch.linalg.solve(precision, torch.einsum("m,mde,me->d", weights, precisions, means))
    quadratic = torch.einsum("m,md,mde,me->", weights, means, precisions, means) - mean @ precision @ mean
    logdet = torch.linalg.slogdet(precision)[1] - weights @ torch.linalg.slogdet(precisions)[1]
    return mean, torch.linalg.inv(precision), (quadratic + logdet) / 2


@pytest.mark.parametrize("name", ["paper", "pair", "triple"])
def test_grid_product_is_the_product_of_gaussians(name):
    problem = land.make_problem(name, "cpu")
    for weights in simplex_points(len(problem.models), 5):
        mean, cov, value = gaussian_product(problem, weights)
        got_mean, got_cov = land.product_moments(problem, weights)
        d, kl = land.dual_function(problem, weights)
        assert (got_mean - mean).abs().max() < 1e-10 and (got_cov - cov).abs().max() < 1e-10
        assert abs(d - value) < 1e-10
        for i, model in enumerate(problem.models):  # KL between Gaussians
            offset, S = mean - model.means[0], model.covs[0]
            exact = (torch.trace(torch.linalg.solve(S, cov)) - 2 + offset @ torch.linalg.solve(S, offset)
                     + torch.logdet(S) - torch.logdet(cov)) / 2
            assert abs(kl[i] - exact) < 1e-9


@pytest.mark.parametrize("name", land.PROBLEMS)
def test_and_dual_gradient_kkt_and_gap(name):
    problem = land.make_problem(name, "cpu")
    m = len(problem.models)
    for weights in simplex_points(m, 3):
        _, kl = land.dual_function(problem, weights)
        direction = torch.randn(m, generator=generator(2), dtype=F)
        direction -= direction.mean()  # along the simplex
        up, down = (land.dual_function(problem, weights + h * direction)[0] for h in (1e-4, -1e-4))
        assert abs((up - down) / 2e-4 - direction @ kl) < 1e-5 * max(1, kl.max())
    u, kl = land.dual_function(problem, problem.weights)
    counts = problem.weights > 1e-6
    assert (kl[counts] - u).abs().max() < 1e-4 and (kl - u).max() < 1e-4  # complementary slackness, no duality gap


def test_and_published_constants():
    paper, pair = land.make_problem("paper", "cpu"), land.make_problem("pair", "cpu")
    assert (paper.weights - torch.tensor([0.495, 0.2525, 0.2525], dtype=F)).abs().max() < 1e-5
    assert abs(paper.u - 10.201) < 1e-3
    assert (pair.weights - torch.tensor([0.20959, 0.79041], dtype=F)).abs().max() < 1e-5
    assert abs(pair.u - 3.63806) < 1e-5


# ---- KL lemmas and cross entropy ---------------------------------------------------------------------------------------


def gaussian_pair(name):
    problem = land.make_problem(name, "cpu")
    p, q = problem.models[:2]
    return p, q, (problem.log_q[0].exp() * (problem.log_q[0] - problem.log_q[1])).sum().item()


@pytest.mark.parametrize("name", ["paper", "pair"])
def test_pointwise_kl_is_the_kl(name):
    p, q, exact = gaussian_pair(name)
    x0 = p.sample(20_000, generator(3))
    value, se = land.mean_and_se(land.pointwise_kl(p.predict_noise, [q.predict_noise], x0, land.log_snr_levels(50),
                                                   generator(4))[0].double())
    assert abs(value - exact) < 5 * se + 0.002 * exact


@pytest.mark.parametrize("name", ["paper", "pair"])
def test_pathwise_kl_tends_to_the_kl_from_above(name):
    p, q, exact = gaussian_pair(name)
    noise = torch.randn(4000, 2, generator=generator(5))
    values = []
    for steps in (50, 400):
        levels = [*land.log_snr_levels(steps), 1.0]
        x, kl = land.pathwise_kl(p.predict_noise, [q.predict_noise], noise, levels, 1.0, generator(6))
        values.append(kl.mean().item())
    assert values[1] < values[0] or abs(values[0] / exact - 1) < 0.02
    assert 0.97 < values[1] / exact < 1.06
    half = land.pathwise_kl(p.predict_noise, [q.predict_noise], noise, levels, 0.5, generator(6))[1].mean()
    assert half > 1.3 * exact  # less noise, more KL: the same means, divided by a smaller variance


@pytest.mark.parametrize("name", ["paper", "triple", "mixtures"])
def test_cross_entropy_of_the_exact_noise_prediction(name):
    problem = land.make_problem(name, "cpu")
    x0 = problem.models[1].sample(20_000, generator(7))
    estimate = land.cross_entropy([m.predict_noise for m in problem.models], x0, land.log_snr_levels(50), generator(8))
    exact = torch.stack([-m.log_prob(x0) for m in problem.models])
    for a, b in zip(estimate.double(), exact.double()):
        assert abs(a.mean() - b.mean()) < 5 * (a - b).std() / len(x0) ** 0.5 + 0.002 * b.mean().abs()


def test_uniform_weights_of_the_lemma_are_caught():
    bug = planted("toy/and_composition.py", (
        "return [(left + right) / 2 for left, right in zip([1.0, *gaps], [*gaps, 1.0])]", "return [1.0 for _ in abar]"))
    p, q, exact = gaussian_pair("pair")
    x0 = p.sample(5000, generator(3))
    levels = land.log_snr_levels(50)
    value = bug.pointwise_kl(p.predict_noise, [q.predict_noise], x0, levels, generator(4)).mean()
    assert abs(value / exact - 1) > 0.5


# ---- AND: samplers -----------------------------------------------------------------------------------------------------


def moment_z(x, mean, cov):
    x = x.double()
    z = [((v.mean() - m) / (v.std() / len(v) ** 0.5)).item() for v, m in zip(x.T, mean)]
    squares = (x - mean) ** 2
    return z + [((v.mean() - s) / (v.std() / len(v) ** 0.5)).item() for v, s in zip(squares.T, cov.diagonal())]


def sampled(module, problem, sampler, n=8000, steps=300, **options):
    predictions = [m.predict_noise for m in problem.models]
    noise = torch.randn(n, 2, generator=generator(9))
    out = getattr(module, sampler)(predictions, problem.weights, noise, steps, generator(10), **options)
    return out if torch.is_tensor(out) else out[0]


@pytest.mark.parametrize("name", ["paper", "pair", "triple"])
def test_smc_samples_the_product(name):
    problem = land.make_problem(name, "cpu")
    mean, cov = land.product_moments(problem, problem.weights)
    x = sampled(land, problem, "sample_smc").double()
    # resampled particles are not independent: an effective tenth of them
    assert ((x.mean(0) - mean).abs() < 5 * (cov.diagonal() / 800).sqrt()).all()
    assert ((x.var(0) / cov.diagonal() - 1).abs() < 0.12).all()


def test_smc_estimates_the_dual_function():
    problem = land.make_problem("pair", "cpu")
    predictions, values = [m.predict_noise for m in problem.models], []
    for seed in range(8):
        noise = torch.randn(2000, 2, generator=generator(seed))
        values.append(-land.sample_smc(predictions, problem.weights, noise, 100, generator(100 + seed))[1])
    mean, se = land.mean_and_se(torch.tensor(values, dtype=F))
    assert abs(mean - problem.u) < 5 * se + 0.02 * problem.u


@pytest.mark.parametrize("name", ["pair", "triple"])
def test_the_summed_score_fails_on_unequal_covariances(name):
    problem = land.make_problem(name, "cpu")
    mean, cov = land.product_moments(problem, problem.weights)
    assert max(map(abs, moment_z(sampled(land, problem, "sample_ddim", steps=200), mean, cov))) > 15
    paper = land.make_problem("paper", "cpu")  # and not where all covariances are equal
    mean, cov = land.product_moments(paper, paper.weights)
    assert max(map(abs, moment_z(sampled(land, paper, "sample_ddim", steps=200), mean, cov))) < 5


def test_mala_is_stationary_and_accepts_by_chain():
    """Exact samples of the product stay so; acceptance is a share of chains, strictly between 0 and 1."""
    problem = land.make_problem("pair", "cpu")
    mean, cov = land.product_moments(problem, problem.weights)
    x, accepted = land.sample_langevin([m.predict_noise for m in problem.models], problem.weights,
                                       torch.randn(8000, 2, generator=generator(9)), 600, generator(10), metropolis=True)
    assert 0.5 < accepted < 0.999
    assert max(map(abs, moment_z(x, mean, cov))) < 5
    unadjusted = sampled(land, problem, "sample_langevin", steps=600)
    assert (unadjusted.var(0) / cov.diagonal()).min() > 1.08  # 1 / (1 - size / 2) = 1.18


AND_BUGS = {
    "whole batch accepted or rejected": ("log_ratio = ((score + score_y) / 2 * (y - x)).sum(1)",
                                         "log_ratio = ((score + score_y) / 2 * (y - x)).sum().expand(len(x))", "mala"),
    "proposal density with the wrong variance": ("(there - back) / (4 * step)", "(there - back) / (2 * step)", "mala"),
    "weights of the kernels left out": ("log_w = log_w - torch.einsum(", "log_w = log_w - 0 * torch.einsum(", "smc"),
    "weights with the wrong sign": ("log_w = log_w - torch.einsum(", "log_w = log_w + torch.einsum(", "smc"),
    "extrapolation not gathered": ("x, before, log_z = x[index], before[:, index],", "x, before, log_z = x[index], before,",
                                   "smc"),
}


@pytest.mark.parametrize("bug", AND_BUGS)
def test_planted_bug_in_a_sampler_is_caught(bug):
    old, new, sampler = AND_BUGS[bug]
    module, problem = planted("toy/and_composition.py", (old, new)), land.make_problem("pair", "cpu")
    mean, cov = land.product_moments(problem, problem.weights)
    options = dict(metropolis=True, steps=600) if sampler == "mala" else {}
    x = sampled(module, problem, "sample_langevin" if sampler == "mala" else "sample_smc", **options).double()
    off = ((x.mean(0) - mean).abs() > 5 * (cov.diagonal() / 800).sqrt()).any()
    assert off or ((x.var(0) / cov.diagonal() - 1).abs() > 0.12).any()


# ---- AND: multipliers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["paper", "pair"])
def test_dual_ascent_with_the_corrected_estimates_reaches_the_exact_multipliers(name):
    problem, args = land.make_problem(name, "cpu"), land.parse_args(["--dual-steps", "30"])
    predictions, levels, rng = [m.predict_noise for m in problem.models], land.log_snr_levels(20), generator(11)

    def draw(weights):
        return land.sample_smc(predictions, weights, torch.randn(1500, 2, generator=rng), 40, rng)[0]

    weights, path = land.dual_ascent(predictions, draw,
                                     lambda w, x: land.cross_entropy(predictions, x, levels, rng).mean(1), args)
    assert (weights - problem.weights).abs().max() < 0.01
    assert (path.sum(1) - 1).abs().max() < 1e-9


def test_dual_ascent_with_exact_kl_is_exact():
    for name in ("paper", "pair", "triple"):
        problem, args = land.make_problem(name, "cpu"), land.parse_args(["--dual-steps", "200"])
        weights, _ = land.dual_ascent(problem.models, lambda w: w, lambda w, x: land.dual_function(problem, w)[1], args)
        assert (weights - problem.weights).abs().max() < 1e-4


def test_summed_scores_in_lemma_2_give_equal_weights_to_any_pair():
    """KL_i is (1 - weight_i)^2 times the same integral: the estimate of Algorithm 3 cannot tell two models apart."""
    problem = land.make_problem("pair", "cpu")
    predictions, weights = [m.predict_noise for m in problem.models], torch.tensor([0.3, 0.7], dtype=F)
    x0 = problem.models[0].sample(2000, generator(12))
    kl = land.pointwise_kl(land.summed(predictions, weights), predictions, x0, land.log_snr_levels(20), generator(13))
    ratio = kl.mean(1)[0] / kl.mean(1)[1]
    assert abs(ratio - (0.7 / 0.3) ** 2) < 1e-3


# ---- OR ----------------------------------------------------------------------------------------------------------------


def test_or_exact_multipliers():
    problem = lor.make_problem("paper", "cpu")
    assert (lor.blahut_arimoto(problem, "elbo") - torch.tensor([1 / 3, 2 / 3], dtype=F)).abs().max() < 1e-4
    assert (lor.blahut_arimoto(problem, "kl") - torch.tensor([1 / 2, 1 / 2], dtype=F)).abs().max() < 1e-4
    assert (lor.divergences(problem, torch.tensor([0.5, 0.5], dtype=F)) - math.log(2)).abs().max() < 1e-4
    entropy = math.log(2 * math.pi * math.e * 0.025)
    assert (problem.entropy - torch.tensor([entropy, entropy + math.log(2)], dtype=F)).abs().max() < 1e-4


@pytest.mark.parametrize("name", lor.PROBLEMS)
@pytest.mark.parametrize("objective", ["elbo", "kl"])
def test_or_optimality(name, objective):
    """All data sets that count have the same value, and the dual function, concave, is highest there."""
    problem = lor.make_problem(name, "cpu")
    shift = problem.entropy if objective == "elbo" else 0
    best = lor.blahut_arimoto(problem, objective)
    values = lor.divergences(problem, best) + shift
    assert (values - values.mean()).abs().max() < 1e-9

    def dual(w):
        return (w @ (lor.divergences(problem, w) + shift)).item()

    step = torch.tensor([1e-3, -1e-3], dtype=F)
    assert dual(best) > max(dual(best + step), dual(best - step))
    gradient = (dual(best + step / 10) - dual(best - step / 10)) / 2e-4
    assert abs(gradient) < 1e-6


# ---- alignment ---------------------------------------------------------------------------------------------------------


def test_alignment_published_constants():
    for b, dual, kl in ((0.25, 0.2309, 0.0286), (0.5, 0.4864, 0.1175), (0.8, 0.8893, 0.3197), (1.0, 1.3235, 0.5371)):
        problem = ali.make_problem("linear", [b], "cpu")
        assert abs(problem.dual[1] - dual) < 1e-4 and abs(problem.value - kl) < 1e-4


def test_alignment_of_a_gaussian_is_linear_algebra():
    """Gaussian model, linear rewards: lambda = (A S A')^-1 (b - A m), KL = lambda' A S A' lambda / 2."""
    problem = ali.make_problem("competing", None, "cpu")
    A = torch.tensor([[1.0, 0.0], [-0.6, 0.8]], dtype=F)
    dual = torch.linalg.solve(0.5 * A @ A.T, problem.b)
    assert (problem.dual[1:] - dual).abs().max() < 1e-5
    assert abs(problem.value - dual @ (0.5 * A @ A.T) @ dual / 2) < 1e-9
    v = torch.tensor([1.0, 0.7, 1.3], dtype=F)
    exact = v[1:] @ problem.b - v[1:] @ (0.5 * A @ A.T) @ v[1:] / 2
    assert abs(ali.dual_function(problem, v)[0] - exact) < 1e-10


@pytest.mark.parametrize("name", ali.PROBLEMS)
def test_alignment_gradient_kkt_and_gap(name):
    problem = ali.make_problem(name, None, "cpu")
    m, dual = len(problem.models), problem.dual
    value, gradient = ali.dual_function(problem, dual)
    for i in range(m, len(dual)):
        h = torch.zeros_like(dual)
        h[i] = 1e-4
        slope = (ali.dual_function(problem, dual + h)[0] - ali.dual_function(problem, dual - h)[0]) / 2e-4
        assert abs(slope - gradient[i]) < 1e-6
    reward, kl = ali.expectations(problem, ali.tilt(problem, dual)[0])
    slack = reward - problem.b
    assert (slack > -1e-4).all() and (dual[m:] * slack).abs().max() < 1e-3  # feasible, complementary
    assert abs(kl.max() - value) < 1e-3 and abs(kl.max() - kl.min()) < 1e-3 * m
    if name == "inactive":
        assert dual[2] < 1e-6 and slack[1] > 0.1


def test_multiplier_is_the_slope_of_the_kl():
    rows = {r["name"]: r for r in ali.measure_sensitivity(None, "cpu")}
    slopes = [r for name, r in rows.items() if name.startswith("slope")]
    assert len(slopes) == 6 and all(abs(r["estimate"] - r["exact"]) < 1e-4 for r in slopes)


@pytest.mark.parametrize("name", ["linear", "competing", "inactive", "combined"])
@pytest.mark.parametrize("kind", ["ascent", "nupi"])
def test_dual_only_reaches_the_exact_multipliers(name, kind):
    problem, args = ali.make_problem(name, None, "cpu"), ali.parse_args(["--rounds", "200", "--dual", kind])
    dual, path = ali.dual_only(problem, args, generator(14))
    m = len(problem.models)
    scale = problem.dual.abs().clamp(min=0.2)
    assert ((dual - problem.dual).abs() / scale).max() < 0.05
    assert (path >= 0).all() and (path[:, :m].sum(1) - 1).abs().max() < 1e-9


def test_threshold_left_out_of_the_dual_is_caught():
    """D without + lambda' b is another function: its maximum is not the answer."""
    bug = planted("toy/constrained_alignment.py", ("return (dual[m:] @ problem.b).item() - log_z,", "return -log_z,"))
    problem = ali.make_problem("linear", None, "cpu")
    h = torch.tensor([0.0, 1e-4], dtype=F)
    _, gradient = bug.dual_function(problem, problem.dual)
    slope = (bug.dual_function(problem, problem.dual + h)[0] - bug.dual_function(problem, problem.dual - h)[0]) / 2e-4
    assert abs(slope - gradient[1]) > 0.1


def test_infeasible_thresholds(capsys, tmp_path):
    for flags in ("--problem bump --threshold 1.1", "--problem objective --threshold 0.9 0.5 -0.1",
                  "--problem linear --threshold 7"):
        with pytest.raises(SystemExit) as end:
            ali.main(ali.parse_args([*flags.split(), "--quick", "--out", str(tmp_path)]))
        text = capsys.readouterr().err
        assert end.value.code == 2 and len(text.strip().splitlines()) == 1
        assert "E[r_" in text and "short by" in text
    assert not list(tmp_path.rglob("*.png"))


def test_feasibility_says_by_how_much(capsys):
    r = torch.linspace(0, 1, 50, dtype=F)[None]
    ali.check_feasible(r, torch.tensor([0.99], dtype=F))
    with pytest.raises(SystemExit):
        ali.check_feasible(r, torch.tensor([1.25], dtype=F))
    assert "short by 0.25" in capsys.readouterr().err


# ---- the scripts -------------------------------------------------------------------------------------------------------

QUICK = {
    land: ["--problem", "pair"],
    lor: ["--problem", "paper", "--score", "exact"],
    ali: ["--problem", "linear", "combined", "--score", "exact"],
}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return out, {m: m.main(m.parse_args(["--quick", "--out", str(out), *flags])) for m, flags in QUICK.items()}


def test_quick_runs_are_finite_and_near_the_exact_answers(quick):
    out, numbers = quick
    assert all(math.isfinite(v) for run in numbers.values() for v in run.values())
    assert abs(numbers[land]["corrected.pair.dual_1"] - 0.2096) < 0.05
    assert abs(numbers[land]["primal_dual.pair.dual_1"] - 0.2096) < 0.15
    assert abs(numbers[land]["dual_only.pair.dual_1"] - 0.5) < 0.02
    assert abs(numbers[lor]["elbo.paper.dual_1"] - 1 / 3) < 0.1  # a few hundred training steps: 0.29
    assert abs(numbers[lor]["kl.paper.dual_1"] - 1 / 2) < 0.15  # 0.40
    assert abs(numbers[ali]["dual_only.linear.dual_1"] - 0.4864) < 0.15
    assert numbers[ali]["constrained.linear.violation"] < numbers[ali]["equal.linear.violation"]
    for script in ("and_composition", "or_composition", "constrained_alignment"):
        folder = out / f"toy_{script}"
        record = json.loads((folder / "numbers.json").read_text())
        assert len({r["name"] for r in record["rows"]}) == len(record["rows"])
        assert all(p.stat().st_size > 5000 for p in folder.glob("*.png")) and len(list(folder.glob("*.png"))) >= 2


def test_same_seed_same_numbers(quick, tmp_path):
    again = lor.main(lor.parse_args(["--quick", "--out", str(tmp_path), *QUICK[lor]]))
    assert again == quick[1][lor]


BAD_FLAGS = [(land, "--problem ring"), (land, "--samples 0"), (land, "--steps 5000"), (land, "--dual-steps 1"),
             (land, "--dual-lr nan"), (lor, "--rounds 3"), (lor, "--objective both"), (ali, "--threshold 1"),
             (ali, "--problem competing --threshold 1"), (ali, "--rounds 1"), (ali, "--weight 0"), (ali, "--dual pid")]


@pytest.mark.parametrize("module, flags", BAD_FLAGS)
def test_bad_flags_end_in_one_sentence(module, flags, capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        module.main(module.parse_args([*flags.split(), "--out", str(tmp_path / "out")]))
    assert_one_sentence(end, capsys)
    assert not (tmp_path / "out").exists()
