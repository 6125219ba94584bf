"""toy/das.py: closed forms, resampling, and z-scores of the sampler on a chain whose answer is known.

The z-scores are of unnormalised averages, mean over groups of Z_g (sum_p w_gp f(x_gp) - E[f]), which are exactly
unbiased at any number of particles; so |z| > 5 is a bug and not an asymptotic effect. False alarms, measured by
`python tests/test_das.py 300` over 300 seeds x 4 settings x 4 z-scores: 0 of 4800, the largest
|z| is 4.49, and 4.9% exceed 2, as they should.
"""
import json
import math
import sys

import pytest
import torch
from conftest import load, planted

das = load("toy/das.py")


def generator(seed):
    return torch.Generator().manual_seed(seed)


# ---- closed forms ----------------------------------------------------------------------------------------------------


def grid_2d(half=11.0, n=441):
    """Points of a square grid and the area of a cell: the trapezoid rule is exact to round-off for Gaussians."""
    line = torch.linspace(-half, half, n, dtype=torch.float64)
    return torch.cartesian_prod(line, line), (line[1] - line[0]).item() ** 2


@pytest.mark.parametrize("name", ["gmm", "gmm2"])
@pytest.mark.parametrize("kl_weight", [0.5, 1.0, 3.0])
def test_exact_target_is_the_tilted_density(name, kl_weight):
    problem = das.make_problem(name, kl_weight, "cpu")
    x, area = grid_2d()
    p = problem.data.log_prob(x).exp() * area
    r = problem.reward(x)
    tilted = p * (r / kl_weight).exp()
    z = tilted.sum()
    assert abs(p.sum() - 1) < 1e-10
    assert abs(z.log() - problem.log_z) < 1e-10
    assert abs((p * r).sum() - problem.data_reward) < 1e-10
    assert abs((tilted * r).sum() / z - problem.target_reward) < 1e-10
    kl = (tilted / z * (r / kl_weight - z.log())).sum()
    assert abs(kl - problem.kl) < 1e-10
    assert ((tilted / z - problem.target.log_prob(x).exp() * area).abs() < 1e-12).all()
    mean, cov = problem.target.moments()
    assert (mean - tilted @ x / z).abs().max() < 1e-10
    assert (cov - (x - mean).T @ ((tilted / z)[:, None] * (x - mean))).abs().max() < 1e-10


def test_published_constants():
    """The closed forms of the two problems, worked out by hand from the definitions."""
    gmm, gmm2 = (das.make_problem(name, 1.0, "cpu") for name in ("gmm", "gmm2"))
    assert [round(v, 5) for v in (gmm.log_z, gmm.target_reward, gmm.data_reward)] == [-1.43969, -0.29072, -11.07633]
    assert [round(v, 5) for v in (gmm2.log_z, gmm2.target_reward, gmm2.data_reward)] == [-2.96780, -1.34004, -9.23000]


def full_mixture():
    root = torch.randn(4, 2, 2, generator=generator(1), dtype=torch.float64)
    covs = root @ root.mT + 0.1 * torch.eye(2, dtype=torch.float64)
    weights = torch.rand(4, generator=generator(2), dtype=torch.float64)
    means = 2 * torch.randn(4, 2, generator=generator(3), dtype=torch.float64)
    return das.GaussianMixture(weights / weights.sum(), means, covs)


@pytest.mark.parametrize("abar", [1.0, 0.6, 1e-3])
def test_noise_prediction_is_the_score(abar):
    mixture, x = full_mixture(), 3 * torch.randn(50, 2, generator=generator(4), dtype=torch.float64)
    x.requires_grad_()
    score = torch.autograd.grad(mixture.log_prob(x, abar).sum(), x)[0]
    assert (mixture.predict_noise(x, abar) + (1 - abar) ** 0.5 * score).abs().max() < 1e-10
    grid, area = grid_2d(30.0, 1201)
    assert abs(mixture.log_prob(grid, abar).exp().sum() * area - 1) < 1e-10


def test_full_covariance_tilt_is_exact():
    mixture = full_mixture()
    root = torch.randn(2, 2, generator=generator(5), dtype=torch.float64)
    curvature, center = root @ root.T, torch.tensor([0.3, -1.0], dtype=torch.float64)
    tilted, log_z = mixture.tilt(curvature, center, 0.7)
    x, area = grid_2d(30.0, 1201)
    r = -torch.einsum("nd,de,ne->n", x - center, curvature, x - center)
    density = mixture.log_prob(x).exp() * (r / 0.7).exp() * area
    assert abs(density.sum().log() - log_z) < 1e-10
    assert (density / density.sum() - tilted.log_prob(x).exp() * area).abs().max() < 1e-12


def test_mixture_samples_have_its_moments():
    mixture = full_mixture()
    x = mixture.sample(200_000, generator(6)).double()
    mean, cov = mixture.moments()
    assert ((x.mean(0) - mean) / (cov.diagonal() / len(x)).sqrt()).abs().max() < 5
    product = (x - mean)[:, :, None] * (x - mean)[:, None, :]
    assert ((product.mean(0) - cov) / (product.std(0) / len(x) ** 0.5)).abs().max() < 5


def test_swiss_roll_lattice_is_the_roll():
    """The paper's roll (uniform along it, blurred by 0.3) reweighted by rejection, against the closed form."""
    problem, rng, n = das.make_problem("swiss_roll", 1.0, "cpu"), generator(7), 1_000_000
    u, v = torch.rand(2, n, generator=rng, dtype=torch.float64)
    t = 3 * math.pi * (0.5 + u)
    x = torch.stack([t * t.cos() / 2, t * t.sin() / 2, 6 * v - 3], 1)
    x = x + 0.3 * torch.randn(n, 3, generator=rng, dtype=torch.float64)
    r = problem.reward(x)
    accept = torch.rand(n, generator=rng, dtype=torch.float64) < r.exp()  # r <= 0
    rate, se = das.mean_and_se(accept.double())
    assert abs(rate - math.exp(problem.log_z)) < 4 * se
    mean, se = das.mean_and_se(r[accept])
    assert abs(mean - problem.target_reward) < 4 * se
    mean, se = das.mean_and_se(r)
    assert abs(mean - problem.data_reward) < 4 * se
    assert ((x[accept].var(0) / problem.target.moments()[1].diagonal()).log().abs() < 0.02).all()


# ---- resampling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", das.SCHEMES)
def test_resampling_is_unbiased(scheme):
    """E[copies] = N w; systematic and ssp are within one of N w, residual above N w - 1, stratified within two."""
    log_w = 2 * torch.randn(1, 13, generator=generator(8), dtype=torch.float64)
    index = das.resample(log_w.expand(40_000, 13), scheme, generator(9))
    assert index.shape == (40_000, 13)
    copies = torch.nn.functional.one_hot(index, 13).sum(1).double()
    expected = 13 * log_w.softmax(1)
    assert ((copies.mean(0) - expected) / (copies.std(0) / 200).clamp(min=1e-12)).abs().max() < 5
    if scheme in ("systematic", "ssp"):
        assert (copies - expected).abs().max() < 1
    if scheme == "stratified":
        assert (copies - expected).abs().max() < 2
    if scheme == "residual":
        assert (copies - expected).min() > -1


@pytest.mark.parametrize("scheme", das.SCHEMES)
def test_resampling_of_degenerate_weights(scheme):
    log_w = torch.full((2, 6), -math.inf)
    log_w[0, 4], log_w[1, 0] = -900.0, 700.0
    assert das.resample(log_w, scheme, generator(0)).tolist() == [[4] * 6, [0] * 6]


def test_gather_takes_everything_along():
    state = {name: torch.arange(6) * scale for name, scale in (("x", 1), ("twist", 10), ("anything", 100))}
    index = torch.tensor([3, 3, 0, 5, 5, 1])
    assert all((das.gather(state, index)[name] == value[index]).all() for name, value in state.items())


def test_adaptive_temper_hits_the_effective_sample_size():
    value, log_w = 5 * torch.randn(3, 200, generator=generator(1)), torch.zeros(3, 200)
    temper = das.adapt_temper(log_w, value, torch.zeros(3), 100.0)
    assert ((das.effective_sample_size(temper[:, None] * value) - 100).abs() < 0.1).all()
    assert (das.adapt_temper(log_w, 0.01 * value, torch.zeros(3), 100.0) == 1).all()


# ---- the sampler on a linear-Gaussian chain --------------------------------------------------------------------------


class Chain:
    """DDPM of six steps on Gaussian data, tilted by a quadratic reward: everything is exact at six steps.

    Noise prediction, kernel means and rewards' Tweedie means are linear in x, so x_0 is Gaussian under the sampler:
    its mean and covariance follow by recursion, and the tilt by completing the square.
    """

    timesteps, abar, kl_weight = list(range(6)), [0.02, 0.15, 0.4, 0.65, 0.85, 0.97, 1.0], 0.5

    def __init__(self):
        self.mean = torch.tensor([0.5, -0.3], dtype=torch.float64)
        self.cov = torch.tensor([[0.8, 0.3], [0.3, 0.5]], dtype=torch.float64)
        self.curvature = torch.tensor([[0.35, 0.1], [0.1, 0.5]], dtype=torch.float64)
        self.center = torch.tensor([1.2, 0.9], dtype=torch.float64)
        mean, cov = torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
        for i, t in enumerate(self.timesteps):
            a, b = self.abar[i], self.abar[i + 1]
            sigma2 = (1 - b) / (1 - a) * (1 - a / b)

            def step(x):
                eps = self.predict_noise(x[None], t)[0]
                return b**0.5 * (x - (1 - a) ** 0.5 * eps) / a**0.5 + max(1 - b - sigma2, 0) ** 0.5 * eps

            offset = step(torch.zeros(2, dtype=torch.float64))
            A = torch.stack([step(e) - offset for e in torch.eye(2, dtype=torch.float64)], 1)
            mean, cov = A @ mean + offset, A @ cov @ A.T + sigma2 * torch.eye(2, dtype=torch.float64)
        B = 2 * self.curvature / self.kl_weight
        grow = torch.eye(2, dtype=torch.float64) + cov @ B
        self.target_mean = self.center + torch.linalg.solve(grow, mean - self.center)
        self.target_cov = torch.linalg.solve(grow, cov)
        d = mean - self.center
        self.log_z = (-0.5 * torch.linalg.slogdet(grow)[1] - 0.5 * d @ B @ torch.linalg.solve(grow, d)).item()
        d = self.target_mean - self.center
        self.mean_reward = -(d @ self.curvature @ d + (self.curvature * self.target_cov).sum()).item()

    def predict_noise(self, x, t):
        a = self.abar[t]
        cov = a * self.cov + (1 - a) * torch.eye(2, dtype=torch.float64)
        return (1 - a) ** 0.5 * torch.linalg.solve(cov, (x - a**0.5 * self.mean).T).T

    def reward(self, x):
        return -torch.einsum("nd,de,ne->n", x - self.center, self.curvature, x - self.center)


CHAIN = Chain()
SETTINGS = {
    "guided": dict(gamma=0.02),
    "capped": dict(gamma=0.02, max_shift=0.3),
    "bootstrap": dict(gamma=0.02, guided=False),
    "untempered": dict(temper="none", scheme="ssp"),
}


def run_chain(module, seed, groups=64, particles=128, **setting):
    rng = generator(seed)
    x = torch.randn(groups * particles, 2, generator=rng, dtype=torch.float64)
    options = dict(ess=0.9) | setting  # a high threshold forces resampling
    return module.das(CHAIN.predict_noise, CHAIN.reward, x, CHAIN.timesteps, CHAIN.abar, rng, particles,
                      CHAIN.kl_weight, **options)


def z_scores(out):
    """z of log Z, both means and E[r]: independent groups, unnormalised averages."""
    groups, particles = out["log_w"].shape
    z = (out["log_z"] - CHAIN.log_z).exp()
    w = out["log_w"].softmax(1)
    x = torch.einsum("gp,gpd->gd", w, out["x"].view(groups, particles, -1))
    r = (w * out["reward"].view(groups, particles)).sum(1)
    values = [z - 1, *(z[:, None] * (x - CHAIN.target_mean)).T, z * (r - CHAIN.mean_reward)]
    return [(v.mean() / v.std() * groups**0.5).item() for v in values]


@pytest.mark.parametrize("setting", SETTINGS)
def test_sampler_is_unbiased(setting):
    out = run_chain(das, 0, **SETTINGS[setting])
    assert sum(share for _, _, share in out["history"]) > 1.5, "resampling must happen, or nothing is tested"
    assert max(map(abs, z_scores(out))) <= 5


@pytest.mark.parametrize("scheme", das.SCHEMES)
def test_sampler_is_unbiased_with_every_scheme(scheme):
    assert max(map(abs, z_scores(run_chain(das, 1, gamma=0.02, scheme=scheme)))) <= 5


def test_importance_weights_without_resampling():
    out = run_chain(das, 2, guided=False, ess=0)
    assert max(map(abs, z_scores(out))) <= 5
    weight = (out["reward"] / CHAIN.kl_weight).view(64, 128)
    assert (out["log_w"] - weight).abs().max() < 1e-10  # telescoped: the reward alone


def test_adaptive_tempering_ends_at_one_and_is_close():
    """Weights that depend on the particles make the estimate consistent but not exactly unbiased."""
    out = run_chain(das, 3, temper="adaptive", particles=1000, ess=0.7)
    log_z, se = das.log_mean_and_se(out["log_z"])
    assert abs(log_z - CHAIN.log_z) < 5 * se + 0.01
    temper = [t for _, t, _ in out["history"]]
    assert temper == sorted(temper) and temper[0] < temper[1] < temper[-1] == 1


BUGS = {
    "x0 not gathered": [("state = regroup(state, (first_slot + ancestors).flatten())",
                         'state = dict(regroup(state, (first_slot + ancestors).flatten()), x0_hat=state["x0_hat"])')],
    "twist not gathered": [("state = regroup(state, (first_slot + ancestors).flatten())",
                            'state = dict(regroup(state, (first_slot + ancestors).flatten()), twist=state["twist"])')],
    "mean instead of sum of log density": [("-(shift * z).flatten(1).sum(1) - 0.5 * (shift**2).flatten(1).sum(1)",
                                            "-(shift * z).flatten(1).mean(1) - 0.5 * (shift**2).flatten(1).mean(1)")],
    "no proposal correction": [('state["log_w"] - state["twist"] + log_ratio(shift, z)',
                                'state["log_w"] - state["twist"]')],
    "half tilt": [("value=checked(reward(x), x.shape[:1]).detach() / kl_weight",
                   "value=checked(reward(x), x.shape[:1]).detach() / (2 * kl_weight)"),
                  ('reward=state["value"] * kl_weight', 'reward=state["value"] * 2 * kl_weight')],
    "log Z not accumulated": [("log_z = log_z + torch.where(due, log_mean_exp(log_w), 0)", "pass")],
    "weights kept after resampling": [('state["log_w"] = torch.where(due[:, None], 0, log_w).flatten()', "pass")],
    "ancestors off by one": [("(first_slot + ancestors).flatten()",
                              "(first_slot + (ancestors + 1) % particles).flatten()")],
    "proposal std 0.8x": [("x = mean + sigma * (shift + z)", "x = mean + sigma * (shift + 0.8 * z)")],
    "temper ends below one": [("    temper[-1] = 1\n", "")],
    "groups that were not due resampled": [
        ("torch.where(due[:, None], resample(log_w, scheme, rng), torch.arange(particles, device=device))",
         "resample(log_w, scheme, rng)")],
    "twist of the past not taken out": [('state["log_w"] - state["twist"] + log_ratio', 'state["log_w"] + log_ratio')],
}
SEEN_AT = {  # settings in which the two show: a slow temper, and groups that differ in who is due
    "temper ends below one": dict(gamma=0.005),
    "groups that were not due resampled": dict(gamma=0.02, groups=512, particles=16, ess=0.85),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug):
    setting = SEEN_AT.get(bug, dict(gamma=0.02))
    assert max(map(abs, z_scores(run_chain(das, 0, **setting)))) <= 5
    assert max(map(abs, z_scores(run_chain(planted("toy/das.py", *BUGS[bug]), 0, **setting)))) > 5


def test_error_falls_with_the_square_root_of_particles():
    sizes = [16, 64, 256, 1024]
    error = [((run_chain(das, 4, particles=n, gamma=0.02)["log_z"] - CHAIN.log_z).exp() - 1).square().mean().sqrt()
             for n in sizes]
    slope = (torch.stack(error).log().diff() / torch.tensor(sizes).log().diff()).mean()
    assert -0.65 < slope < -0.35
    stale = [run_chain(das, 4, particles=n, gamma=0.02, regroup=das.gather_without_twist)["log_z"].mean() - CHAIN.log_z
             for n in sizes]
    assert stale[-1] > stale[0] > 0.05  # the published defect: a bias, and more of it with more particles


def test_exact_score_converges_on_a_toy_problem():
    """gmm2 with its exact score: E[r] and log Z agree with importance weighting of the same discretised sampler."""
    problem, args = das.make_problem("gmm2", 1.0, "cpu"), das.parse_args(["--quick"])
    noise = problem.data.predict_noise
    base = das.sample(problem, noise, args, generator(0), 40_000, 1, guided=False, ess=0)
    out = das.sample(problem, noise, args, generator(1), 40 * 1000, 1000, max_shift=0.5, ess=0.5)
    own, se = das.log_mean_and_se(base["log_z"])
    log_z, log_z_se = das.log_mean_and_se(out["log_z"])
    assert abs(log_z - own) < 5 * math.hypot(se, log_z_se) and log_z_se < 0.05
    own, se = das.tilted_mean_and_se(base["log_z"], base["reward"])
    mean, mean_se = das.mean_and_se((out["log_w"].softmax(1) * out["reward"].view(40, 1000)).sum(1))
    assert abs(mean - own) < 5 * math.hypot(se, mean_se) and mean_se < 0.05


def test_chunks_do_not_change_the_answer():
    whole, parts = (run_chain(das, 5, groups=4, particles=32, gamma=0.02, chunk=c) for c in (None, 17))
    assert (whole["x"] - parts["x"]).abs().max() < 1e-12


def test_images_and_scalars_are_sampled_alike():
    """Nothing in the sampler knows the shape of a particle: (N, 2) and (N, 1, 2, 1) give the same numbers."""
    rng, x = generator(6), torch.randn(64, 2, generator=generator(6), dtype=torch.float64)
    flat = das.das(CHAIN.predict_noise, CHAIN.reward, x, CHAIN.timesteps, CHAIN.abar, rng, 16, max_shift=0.3)
    shape, rng = (-1, 1, 2, 1), generator(6)
    image = das.das(lambda x, t: CHAIN.predict_noise(x.flatten(1), t).view(shape), lambda x: CHAIN.reward(x.flatten(1)),
                    x.view(shape), CHAIN.timesteps, CHAIN.abar, rng, 16, max_shift=0.3)
    assert (flat["x"] - image["x"].flatten(1)).abs().max() < 1e-12
    assert (flat["log_z"] - image["log_z"]).abs().max() < 1e-12


# ---- the script ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Two quick runs with one seed: the second finds the cached network."""
    out = tmp_path_factory.mktemp("out")
    return out, [das.main(das.parse_args(["--quick", "--problem", "gmm2", "--out", str(out)])) for _ in range(2)]


def test_same_seed_same_numbers_with_and_without_the_cache(quick):
    first, second = ({k: v for k, v in run.items() if not k.endswith("seconds")} for run in quick[1])
    assert first == second


def test_quick_run_is_finite_and_in_range(quick):
    out, (_, numbers) = quick
    assert all(math.isfinite(v) for v in numbers.values())
    assert abs(numbers["das.gmm2.log_z"] - numbers["exact.gmm2.log_z"]) < 0.5
    assert abs(numbers["das.gmm2.mean_reward"] - numbers["exact.gmm2.mean_reward"]) < 0.4
    assert numbers["das.gmm2.emd"] < 1 < 2.5 < numbers["pretrained.gmm2.emd"]
    assert numbers["network.gmm2.eps_error_t999"] < 0.01 and numbers["network.gmm2.eps_error_t100"] < 0.45
    record = json.loads((out / "toy_das" / "numbers.json").read_text())
    assert {r["name"]: r["estimate"] for r in record["rows"]} == numbers
    assert {"name", "estimate", "se", "exact", "z"} <= set(record["rows"][0])
    assert {"args", "rows", "network_evaluations", "seconds", "peak_memory_mb", "versions"} == set(record)
    assert all((out / "toy_das" / name).stat().st_size > 10_000 for name in ("figure.png", "convergence.png"))


def test_network_does_not_explode_at_high_noise(quick):
    settings = dict(problem="gmm2", steps=das.PRESETS["quick"]["train_steps"], seed=0)
    net = das.cached_denoiser(quick[0] / "cache", settings, None, None, "cpu")
    abar, x = das.noise_levels()[999], torch.randn(1000, 2, generator=generator(1))
    x0_hat = (x - (1 - abar) ** 0.5 * net(x, abar)) / abar**0.5
    assert x0_hat.norm(dim=1).max() < 1.5


def test_same_seed_same_bytes(tmp_path):
    runs = [das.main(das.parse_args(["--quick", "--problem", "gmm", "--score", "exact", "--out", str(tmp_path / name)]))
            for name in "ab"]
    keep = [{k: v for k, v in run.items() if not k.endswith("seconds")} for run in runs]
    assert keep[0] == keep[1]
    assert (tmp_path / "a/toy_das/figure.png").read_bytes() == (tmp_path / "b/toy_das/figure.png").read_bytes()


BAD_FLAGS = ["--particles 0", "--steps 0", "--steps 2000", "--groups -3", "--problem gmm3", "--score oracle",
             "--kl-weight 0", "--kl-weight nan", "--eta 2", "--resampling best", "--device cuda:99", "--quick --paper",
             "--particles many", "--no-such-flag"]


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_end_in_one_sentence(flags, capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        das.main(das.parse_args([*flags.split(), "--out", str(tmp_path / "out")]))
    assert_one_sentence(end, capsys)
    assert not (tmp_path / "out").exists()


def assert_one_sentence(end, capsys):
    text = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(text) == 1 and len(text[0]) > 15, text


def test_folder_that_cannot_be_made(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as end:
        das.main(das.parse_args(["--out", str(tmp_path / "file")]))
    assert_one_sentence(end, capsys)


@pytest.mark.parametrize("reward", [lambda x: x[:, 0] * math.nan, lambda x: x, lambda x: x.sum(), lambda x: x[:3, 0]])
def test_bad_reward_ends_in_one_sentence(reward, capsys):
    x = torch.randn(8, 2, generator=generator(0), dtype=torch.float64)
    with pytest.raises(SystemExit) as end:
        das.das(CHAIN.predict_noise, reward, x, CHAIN.timesteps, CHAIN.abar, generator(0), 4)
    assert_one_sentence(end, capsys)


def test_reward_without_gradient(capsys):
    x = torch.randn(8, 2, generator=generator(0), dtype=torch.float64)
    args = (lambda x: -x.detach()[:, 0].abs(), x, CHAIN.timesteps, CHAIN.abar, generator(0), 4)
    with pytest.raises(SystemExit) as end:
        das.das(CHAIN.predict_noise, *args)
    assert_one_sentence(end, capsys)
    assert das.das(CHAIN.predict_noise, *args, guided=False)["log_z"].isfinite().all()


@pytest.mark.parametrize("content", ["other settings", "other file", "cut short", "other network"])
def test_cached_network_of_other_settings(content, capsys, tmp_path):
    problem, settings = das.make_problem("gmm", 1.0, "cpu"), dict(problem="gmm", steps=2, seed=0)
    args = (tmp_path, settings, problem.data.sample, das.noise_levels(), "cpu")
    das.cached_denoiser(*args)
    (path,) = tmp_path.iterdir()
    stored = torch.load(path, weights_only=True)
    if content == "other settings":
        torch.save(dict(stored, settings=json.dumps(dict(settings, steps=3))), path)
    elif content == "other file":
        torch.save({"weights": torch.zeros(3)}, path)
    elif content == "cut short":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        stored["state"].pop("mlp.2.bias")
        torch.save(stored, path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        das.cached_denoiser(*args)
    assert_one_sentence(end, capsys)


if __name__ == "__main__":
    seeds = int(sys.argv[1])
    worst = [[z_scores(run_chain(das, seed, **setting)) for setting in SETTINGS.values()] for seed in range(seeds)]
    worst = torch.tensor(worst).abs()
    print(f"{seeds} seeds x {len(SETTINGS)} settings: share of |z| > 5 is {(worst > 5).double().mean():.5f}"
          f" of {worst.numel()}, largest |z| {worst.max():.2f}, share of |z| > 2 is {(worst > 2).double().mean():.4f}")
    for name, values in zip(SETTINGS, worst.transpose(0, 1)):
        print(f"{name}: largest |z| {values.max():.2f}, false alarms {(values.amax(1) > 5).sum()} of {seeds}")


@pytest.mark.parametrize("steps", [1, 2, 20])
def test_a_few_training_steps_are_enough_to_run(steps):
    net = das.train_denoiser(das.make_problem("gmm", 1.0, "cpu").data.sample, das.noise_levels(), steps, generator(0))
    assert net(torch.zeros(3, 2), 0.5).isfinite().all()
