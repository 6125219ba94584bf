"""sd/and_composition.py, or_composition.py: KLs, products and multipliers against Gaussian paths; whole small runs.

A double with the call signature of the UNet gives the exact noise of Gaussian latents; the adapter that is on changes
it to (1 + stretch) noise + shift. Then a sampling path is a linear Gaussian chain, whose joint mean and precision are
built here: products of paths, their normalisation and all KLs follow from linear algebra.
"""
import argparse
import json
import math
import types

import pytest
import torch
from conftest import SOURCE, load, planted

both = {name: load(f"sd/{name}_composition.py") for name in ("and", "or")}
land, lor = both["and"], both["or"]
maximise_dual = load("sd/constrained_alignment.py").maximise_dual
F = torch.float64
STEPS, GUIDANCE, VAR = 6, 2.0, 0.6


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(SOURCE)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_one_sentence(end, capsys, words):
    text = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(text) == 1 and words in text[0], text


# ---- a model with known answers --------------------------------------------------------------------------------------

ADAPTERS = {"a": (0.1, (0.3, -0.4, 0.1, 0.2)), "b": (-0.15, (0.35, -0.3, 0.2, 0.1)),
            "c": (0.05, (-0.5, 0.2, -0.1, 0.6))}


class GaussianUNet:
    """Exact noise of latents N(mean, VAR), the mean (4,) being the first token of the prompt; calls as of a UNet."""

    def __init__(self, levels, adapters=ADAPTERS):
        self.levels, self.adapters, self.active, self.on = levels, adapters, None, True
        self.weight = torch.zeros((), dtype=F)

    def parameters(self):
        return iter([self.weight])

    def set_adapters(self, name):
        self.active = name

    def disable_adapters(self):
        self.on = False

    def enable_adapters(self):
        self.on = True

    def __call__(self, x, t, encoder_hidden_states):
        a, mean = self.levels[t][:, None, None, None], encoder_hidden_states[:, 0, :, None, None]
        stretch, shift = self.adapters[self.active] if self.on and self.active else (0.0, (0.0,) * 4)
        eps = (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * VAR + 1 - a)
        return types.SimpleNamespace(sample=(1 + stretch) * eps + torch.tensor(shift, dtype=F)[:, None, None])


def make_double(adapters=ADAPTERS):
    """A world of two prompts; latents (4, 1, 1)."""
    from diffusers import DDIMScheduler
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
                              steps_offset=1, set_alpha_to_one=False)
    return types.SimpleNamespace(
        unet=GaussianUNet(scheduler.alphas_cumprod.double(), adapters), scheduler=scheduler, shape=(4, 1, 1),
        adapters=list(adapters), cond=torch.tensor([[[0.5, -0.3, 0.2, 0.1]], [[-0.4, 0.3, 0.6, -0.2]]], dtype=F),
        uncond=torch.tensor([[[0.1, 0.1, -0.2, 0.0]]], dtype=F))


def chain(world, prompt, adapter, eta=1.0):
    """Coefficients of the chain x' = scale x + offset + sigma z of a prompt and an adapter (None: base) -> three lists.

    The offsets are (4,).
    """
    _, abar = land.path_schedule(world.scheduler, flags().steps)
    target = world.uncond[0, 0] + GUIDANCE * (world.cond[prompt, 0] - world.uncond[0, 0])
    stretch, shift = world.unet.adapters[adapter] if adapter else (0.0, (0.0,) * 4)
    found = [], [], []
    for a, b in zip(abar, abar[1:]):
        sigma = eta * ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5
        c = max(1 - b - sigma**2, 0.0) ** 0.5 - ((1 - a) * b / a) ** 0.5  # what the noise prediction is times
        slope = (1 + stretch) * (1 - a) ** 0.5 / (a * VAR + 1 - a)
        found[0].append((b / a) ** 0.5 + c * slope)
        found[1].append(c * (torch.tensor(shift, dtype=F) - slope * a**0.5 * target))
        found[2].append(sigma)
    return found


def mixed(chains, weights):
    """The chain of the surrogate, with the weighted means of the kernels."""
    scales, offsets, sigmas = zip(*chains)
    w = weights.tolist()
    return ([sum(v * s for v, s in zip(w, step)) for step in zip(*scales)],
            [sum(v * s for v, s in zip(w, step)) for step in zip(*offsets)], sigmas[0])


def path_law(scales, offsets, sigmas):
    """Mean (4, T + 1) and precision (T + 1, T + 1), the same for every coordinate, of all points of a path."""
    mean, precision = torch.zeros(4, len(scales) + 1, dtype=F), torch.zeros(len(scales) + 1, len(scales) + 1, dtype=F)
    precision[0, 0] = 1
    for i, (s, o, sigma) in enumerate(zip(scales, offsets, sigmas)):
        row = torch.zeros(len(precision), dtype=F)
        row[i], row[i + 1] = -s, 1
        precision += torch.outer(row, row) / sigma**2
        mean[:, i + 1] = s * mean[:, i] + o
    return mean, precision


def kl(p, q):
    """KL of two path laws, nats."""
    (mp, lp), (mq, lq) = p, q
    shift = mp - mq
    trace = torch.trace(torch.linalg.solve(lp, lq)) - len(lp)
    return (2 * (trace + lp.logdet() - lq.logdet()) + torch.einsum("dt,ts,ds->", shift, lq, shift) / 2).item()


def product(laws, weights):
    """The normalised product of the laws' densities to these weights -> law, D = -log Z."""
    precision = sum(w * l for w, (_, l) in zip(weights, laws))
    linear = sum(w * m @ l for w, (m, l) in zip(weights, laws))
    mean = torch.linalg.solve(precision, linear.T).T
    energy = sum(w * torch.einsum("dt,ts,ds->", m, l, m) for w, (m, l) in zip(weights, laws))
    energy = energy - torch.einsum("dt,ts,ds->", mean, precision, mean)
    volume = precision.logdet() - sum(w * l.logdet() for w, (_, l) in zip(weights, laws))
    return (mean, precision), (energy / 2 + 4 * volume / 2).item()


def exact(world, weights, prompt, surrogate=False, eta=1.0):
    """KL of every adapter (m,), D, and the mean of the last point (4,), of the product or of the surrogate."""
    chains = [chain(world, prompt, name, eta) for name in world.adapters]
    laws = [path_law(*c) for c in chains]
    law, value = product(laws, weights)
    law = path_law(*mixed(chains, weights)) if surrogate else law
    return torch.tensor([kl(law, q) for q in laws], dtype=F), value, law[0][:, -1]


def best(world):
    """The multipliers that maximise the mean of D over the prompts, and the KLs there (m,)."""
    def dual(weights):
        found = [exact(world, weights, k) for k in range(len(world.cond))]
        return sum(f[1] for f in found) / len(found), torch.stack([f[0] for f in found]).mean(0)

    weights = maximise_dual(dual, len(world.adapters), len(world.adapters))
    return weights, dual(weights)


def flags(**changes):
    base = dict(steps=STEPS, guidance=GUIDANCE, eta=1.0, batch=64, chunk=None, device="cpu", images=32, particles=16,
                dual_steps=20, dual_lr=0.2, ess=0.5, prompts=["one", "two"], problem=["adapters"], concepts=[], seed=0)
    return argparse.Namespace(**base | changes)


@pytest.fixture(autouse=True, scope="module")
def noise_in_float64():
    """The double's noise in float64, where the scripts draw float32."""
    with pytest.MonkeyPatch.context() as patch:
        for script in both.values():
            patch.setattr(script, "path_noise", double_noise)
        yield


real_noise = land.path_noise


def double_noise(world, args, n, rng):
    noise = real_noise(world, args, n, rng)
    return noise.double() if isinstance(world.unet, GaussianUNet) else noise


# ---- AND: the product of paths ---------------------------------------------------------------------------------------

WEIGHTS = torch.tensor([0.2, 0.3, 0.5], dtype=F)


def drawn(script, world, weights, groups, particles, ess, eta=1.0, chunk=None, seed=5):
    """product_paths for the double's second prompt."""
    problem, = script.make_products(types.SimpleNamespace(**{**vars(world), "cond": world.cond[1:]}),
                                    flags(prompts=["two"], chunk=chunk))
    noise = torch.randn(STEPS + 1, groups * particles, 4, 1, 1, generator=generator(seed), dtype=F)
    return script.product_paths(problem.predict(groups * particles), weights, noise,
                                *script.path_schedule(world.scheduler, flags().steps), particles, generator(6), eta, ess)


def scores(values):
    """Independent values (groups, k) whose exact mean is zero -> the largest |z|."""
    return (values.mean(0) / (values.std(0) / len(values) ** 0.5).clamp(min=1e-10)).abs().max().item()


def smc_z(script, ess=0.95, groups=64, particles=64, eta=1.0):
    """z of Z, of the last point and of the KLs; weighted by Z, all are unbiased for any number of particles."""
    world = make_double()
    truth, value, mean = exact(world, WEIGHTS, 1, eta=eta)
    x, found, log_z = drawn(script, world, WEIGHTS, groups, particles, ess, eta)
    z = (log_z + value).exp()[:, None]
    x = x.view(groups, particles, 4).mean(1)
    found = found.T.view(groups, particles, 3).mean(1)
    return scores(torch.cat([z - 1, z * (x - mean), z * (found - (truth - value))], 1))


def surrogate_z(script, eta=1.0):
    world = make_double()
    truth, _, mean = exact(world, WEIGHTS, 1, surrogate=True, eta=eta)
    x, found, _ = drawn(script, world, WEIGHTS, 64, 64, 0.0, eta)
    x, found = x.view(64, 64, 4).mean(1), found.T.view(64, 64, 3).mean(1)
    return scores(torch.cat([found - truth, x - mean], 1))


@pytest.mark.parametrize("eta", [1.0, 0.6])
def test_smc_of_the_product_is_unbiased(eta, monkeypatch):
    calls, real = [], land.resample
    monkeypatch.setattr(land, "resample", lambda *values: calls.append(1) or real(*values))
    assert smc_z(land, eta=eta) <= 5
    assert len(calls) > 2, "resampling must happen before the end, or nothing is tested"


@pytest.mark.parametrize("eta", [1.0, 0.6])
def test_kl_of_the_surrogate(eta):
    assert surrogate_z(land, eta) <= 5


def test_the_surrogate_is_not_the_product():
    world = make_double()
    (kls, value, mean), (other, _, wrong) = (exact(world, WEIGHTS, 1, surrogate) for surrogate in (False, True))
    assert (WEIGHTS @ kls).item() == pytest.approx(value, rel=1e-10) and (WEIGHTS @ other).item() > value + 0.02
    assert (mean - wrong).abs().max() > 0.01


def test_identities_of_every_path():
    """Weighted log ratios of a product's path sum to zero; a single model is itself; two KLs are in proportion."""
    world = make_double()
    _, found, log_z = drawn(land, world, WEIGHTS, 2, 8, 0.9)
    assert (WEIGHTS @ found).abs().max() < 1e-10 and (log_z < 0).all()
    for ess in (0.0, 0.9):
        _, found, log_z = drawn(land, world, torch.tensor([0, 1, 0], dtype=F), 2, 8, ess)
        assert found[1].abs().max() < 1e-10 and log_z.abs().max() < 1e-10 and found[0].abs().min() > 1e-3
    pair = make_double({name: ADAPTERS[name] for name in "ac"})
    _, found, _ = drawn(land, pair, torch.tensor([0.3, 0.7], dtype=F), 2, 8, 0.0)
    torch.testing.assert_close(found[0] / 0.7**2, found[1] / 0.3**2, rtol=1e-10, atol=0)


def test_chunks_and_seeds_change_nothing():
    world = make_double()
    whole, again, parts = (drawn(land, world, WEIGHTS, 4, 8, 0.9, chunk=chunk) for chunk in (None, None, 5))
    for a, b, c in zip(whole, again, parts):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=0, atol=1e-12)


AND_BUGS = {
    "KL averaged over the latent": ("offset.pow(2).sum(2).T / 2", "offset.pow(2).mean(2).T / 2"),
    "KL without its half": ("offset.pow(2).sum(2).T / 2", "offset.pow(2).sum(2).T"),
    "KL not in units of sigma": ("(mean - means).flatten(2) / sigma", "(mean - means).flatten(2)"),
    "KL the other way": ("(offset * z.flatten(1)).sum(2).T", "-(offset * z.flatten(1)).sum(2).T"),
    "noise forgotten in the KL": ("cost = cost + (offset * z.flatten(1)).sum(2).T + log_c", "cost = cost + log_c"),
    "normalisation forgotten in the KL": (".sum(2).T + log_c[:, None]", ".sum(2).T"),
    "weights kept after resampling": ('torch.where(due[:, None], 0, log_w).flatten()', 'log_w.flatten()'),
    "log Z not accumulated": ("log_z = log_z + torch.where(due, log_mean_exp(log_w), 0)", "pass"),
    "KL not gathered": ("return {name: value[index] for", 'return {name: value if name == "kl" else value[index] for'),
    "ancestors of another group": ("(first_slot + ancestors).flatten()", "(0 * first_slot + ancestors).flatten()"),
    "weights the wrong way": ("log_c = -(cost @ w)", "log_c = cost @ w"),
    "equal weights in the mean": ('torch.einsum("m,m...->...", w, means)', "means.mean(0)"),
    "last resampling left out": ('(first_slot + resample(log_w, "systematic", rng)).flatten()',
                                 "(first_slot + torch.arange(particles)).flatten()"),
    "every model with the first adapter": ("        unet.set_adapters(name)\n", '        unet.set_adapters("a")\n'),
}


@pytest.mark.parametrize("change", AND_BUGS.values(), ids=AND_BUGS)
def test_planted_bugs_in_the_paths_are_seen(change):
    script = planted("sd/and_composition.py", change)
    assert any(z > 5 for z in (smc_z(script), surrogate_z(script), smc_z(script, 1e-9)))


# ---- AND: the multipliers --------------------------------------------------------------------------------------------


def solved(script, adapters=ADAPTERS, **changes):
    world, args = make_double(adapters), flags(**changes)
    problem, = script.make_products(world, args)
    return script.run_methods(world, problem, args, generator(3)), world, args


def test_multipliers_of_the_product():
    script = planted("sd/and_composition.py")
    script.path_noise = double_noise
    (results, calls), world, args = solved(script, batch=512)
    weights, (u, kls) = best(world)
    assert weights.max() > 0.45  # two of the three adapters are alike
    found = results["corrected"]
    assert (found.weights - weights).abs().max() < 0.03 and found.dual_value == pytest.approx(u, rel=0.25)
    assert found.path[0].tolist() == [1 / 3] * 3 and found.path.sum(1).sub(1).abs().max() < 1e-12
    worst = [exact(world, w, 0)[0].max() + exact(world, w, 1)[0].max() for w in (results["equal"].weights,
                                                                             found.weights)]
    assert worst[1] < 0.9 * worst[0]
    surrogate = results["constrained"]
    truth = sum(exact(world, surrogate.weights, k, surrogate=True)[0] for k in (0, 1)) / 2
    counts = surrogate.weights > 0.02
    assert truth[counts].max() - truth[counts].min() < 0.1 * truth.max() and truth.max() == truth[counts].max()
    n = args.images * 2
    assert calls == STEPS * (n * (1 + 3 + 4 * 3) + 2 * 3 * args.batch * args.dual_steps)


def test_algorithm_3_leaves_two_models_at_equal_weights():
    script = planted("sd/and_composition.py", ("if len(models) > 2:", "if True:"))
    script.path_noise = double_noise
    (results, _), world, _ = solved(script, {name: ADAPTERS[name] for name in "ac"}, dual_steps=4)
    assert (results["constrained"].path - 0.5).abs().max() < 1e-10
    assert (best(world)[0] - 0.5).abs().max() > 0.003


DUAL_BUGS = {
    "multipliers the wrong way": ("dual + ki * gap", "dual - ki * gap"),
    "no projection": ("weights = project_to_simplex(raw)", "weights = raw"),
    "equal weights for the paths": ("gap = draw(weights).double()", "gap = draw(path[0]).double()"),
}


@pytest.mark.parametrize("change", DUAL_BUGS.values(), ids=DUAL_BUGS)
def test_planted_bugs_in_the_multipliers_are_seen(change):
    script = planted("sd/and_composition.py", change)
    script.path_noise = double_noise
    (results, _), world, _ = solved(script, batch=512)
    assert not (results["corrected"].weights - best(world)[0]).abs().max() <= 0.06


# ---- OR: losses ------------------------------------------------------------------------------------------------------


def teacher_paths(script, world, name, n, seed=1):
    """draw_paths of an adapter for the double's second prompt, and the policy of a name, which it is compared with."""
    number = torch.ones(n, dtype=torch.long)
    policy = script.prompted(world, flags(), number)
    noise = torch.randn(STEPS + 1, n, 4, 1, 1, generator=generator(seed), dtype=F)
    timesteps, abar = script.path_schedule(world.scheduler, flags().steps)
    drawn = script.draw_paths(script.with_adapter(world.unet, name, policy), noise, timesteps, abar)
    return drawn, lambda other: script.with_adapter(world.unet, other, policy), timesteps, script.step_costs(abar)


def path_loss_z(script, n=6400):
    """z of the samples' mean, and of the KL by one random step of each path."""
    world = make_double()
    (points, eps, x), policy, timesteps, costs = teacher_paths(script, world, "a", n)
    truth = kl(path_law(*chain(world, 1, "a")), path_law(*chain(world, 1, "b")))
    mean = path_law(*chain(world, 1, "a"))[0][:, -1]
    step = torch.randint(STEPS, (n,), generator=generator(2))
    found = script.kernel_loss(policy("b"), points, eps, step, timesteps, costs)
    return scores(torch.cat([found[:, None] - truth, x.view(n, 4) - mean], 1).view(64, -1, 5).mean(1))


def test_path_loss_is_the_kl_of_the_paths():
    assert path_loss_z(lor) <= 5
    (points, eps, x), policy, timesteps, costs = teacher_paths(lor, make_double(), "a", 5)
    steps = [lor.kernel_loss(policy("a"), points, eps, torch.full((5,), i), timesteps, costs) for i in range(STEPS)]
    assert torch.stack(steps).abs().max() < 1e-10 and len(costs) == STEPS and (costs > 0).all()


def denoising_error(script, shift=0.3, n=4000, count=25):
    """Cross entropy of Gaussian samples by denoising, less the exact value, over the exact value."""
    world = make_double()
    mean = world.cond[1, 0]
    x0 = (mean + shift + VAR**0.5 * torch.randn(n, 4, generator=generator(3), dtype=F)).view(n, 4, 1, 1)
    times, abar = script.snr_levels(world.scheduler, count)
    predict = script.noise_predictor(world.unet, world.cond[1:])  # no adapter, no guidance
    level = torch.arange(n) % count
    found = script.denoising_loss(predict, x0, level, times, abar, generator(4)).mean().item()
    truth = 2 * math.log(2 * math.pi * VAR) + 2 + 4 * shift**2 / VAR / 2
    return abs(found / truth - 1)


def test_denoising_loss_is_the_cross_entropy():
    assert denoising_error(lor) < 0.03
    world, count = make_double(), 7
    times, abar = lor.snr_levels(world.scheduler, count)
    predict = lor.noise_predictor(world.unet, world.cond[1:])
    x0, at = torch.randn(50, 4, 1, 1, generator=generator(), dtype=F), dict(zip(abar, times))
    rng = generator(1)
    found = sum(lor.denoising_loss(predict, x0, torch.full((50,), i), times, abar, rng) for i in range(count)) / count
    whole, rng = x0.flatten(1).shape[1] / 2 * math.log(2 * math.pi), generator(1)
    for a, weight in zip(abar, lor.log_snr_rule(abar)):  # 1/2 int (E |eps - eps_hat|^2 - abar^2 |eps|^2) d log SNR
        eps = torch.randn(x0.shape, generator=rng)
        error = eps - predict(a**0.5 * x0 + (1 - a) ** 0.5 * eps, at[a])
        whole = whole + weight * (error.flatten(1).pow(2).sum(1) - a**2 * eps.flatten(1).pow(2).sum(1))
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=0)  # that one multiplies its noise in float32


def covered(script, method="kl", updates=120):
    """Primal-dual training of a policy that adds theta to the noise, teachers that add their shifts -> weights, theta.

    KL_i is |shift_i - theta|^2 times the sum of the costs: the best theta is the centre of the smallest ball.
    """
    world = make_double({name: (0.0, shift) for name, (_, shift) in ADAPTERS.items()})
    theta = torch.zeros(4, dtype=F, requires_grad=True)
    args = flags(updates=updates, primal_steps=4, batch=16, levels=8, dual_lr=0.1)
    data = [teacher_paths(script, world, name, 16)[0] for name in world.adapters]
    timesteps, abar = script.path_schedule(world.scheduler, args.steps)

    def policy(number):
        base = script.without_adapter(world.unet, script.prompted(world, args, number + 1))
        return lambda x, t: base(x, t) + theta[:, None, None]

    problem = types.SimpleNamespace(models=world.adapters, prompts=["two"], policy=policy)
    update = script.cover_update(world, problem, data, args, method)
    optimizer = torch.optim.SGD([theta], 0.1 / script.step_costs(abar).sum().item())
    state = dict(weights=torch.full((3,), 1 / 3, dtype=F), memory=torch.zeros(3, dtype=F),
                 unit=torch.zeros((), dtype=F), round=torch.zeros(()))
    rng, trace = generator(), []
    for _ in range(updates):
        trace.append(update(rng, lambda: (optimizer.step(), optimizer.zero_grad()), state))
    late = trace[updates // 2 :]
    return torch.tensor([sum(p[f"dual_{n}"] for p in late) / len(late) for n in "abc"], dtype=F), theta.detach(), trace


def ball():
    """The multipliers and the centre of the smallest ball around the shifts of the adapters."""
    shifts = torch.tensor([shift for _, shift in ADAPTERS.values()], dtype=F)

    def dual(w):
        square = (shifts - w @ shifts).pow(2).sum(1)
        return w @ square, square

    weights = maximise_dual(dual, 3, 3)
    return weights, weights @ shifts


def cover_error(script):
    (weights, theta, _), (exact_weights, centre) = covered(script), ball()
    return max((weights - exact_weights).abs().max().item(), (theta - centre).abs().max().item())


def test_multipliers_of_the_mixture():
    assert cover_error(lor) < 0.03 and ball()[0].max() > 0.45
    weights, theta, trace = covered(lor, "equal", 30)
    assert weights.tolist() == pytest.approx([1 / 3] * 3) and trace[5]["dual_a"] == trace[0]["dual_a"]
    shifts = torch.tensor([shift for _, shift in ADAPTERS.values()], dtype=F)
    assert (theta - shifts.mean(0)).abs().max() < 0.02


OR_BUGS = {
    "KL averaged over the latent": (path_loss_z, "eps[step, at]).flatten(1).pow(2).sum(1)",
                                    "eps[step, at]).flatten(1).pow(2).mean(1)"),
    "KL without its half": (path_loss_z, "factor**2 / (2 * sigma**2)", "factor**2 / sigma**2"),
    "one step for all": (path_loss_z, "return len(costs) * costs.to(error)[step]", "return costs.to(error)[step]"),
    "time of another step": (path_loss_z, "device=step.device)[step]", "device=step.device)[0 * step]"),
    "noise left out of the paths": (path_loss_z, "x = mean + sigma * noise[i + 1]", "x = mean"),
    "signal power once": (denoising_error, "(error - a**2 * size)", "(error - a * size)"),
    "no rule": (denoising_error, "len(abar) * rule *", "rule *"),
    "volume left out": (denoising_error, "return x0[0].numel() / 2 *", "return 0 *"),
    "multipliers the wrong way": (cover_error, "dual + ki * gap", "dual - ki * gap"),
    "multipliers left out of the loss": (cover_error, "(weights.to(loss) @ loss).backward()", "loss.mean().backward()"),
    "no projection": (cover_error, 'state["weights"] = project_to_simplex(raw)', 'state["weights"] = raw'),
    "data of the first model": (cover_error, "eps[:, index], step", "data[0][1][:, index], step"),
}


@pytest.mark.parametrize("value, old, new", OR_BUGS.values(), ids=OR_BUGS)
def test_planted_bugs_in_the_mixture_are_seen(value, old, new):
    limit = {path_loss_z: 5, denoising_error: 0.1, cover_error: 0.06}[value]
    assert not value(planted("sd/or_composition.py", (old, new))) <= limit


def test_shares():
    centres = torch.eye(3, dtype=F)[None, :2].repeat(2, 1, 1)
    unit = torch.eye(3, dtype=F)[torch.tensor([[0, 0, 0, 1], [1, 1, 0, 1]])]
    assert lor.model_shares(unit, centres).tolist() == [0.5, 0.5]


# ---- whole runs ------------------------------------------------------------------------------------------------------

TINY = "--prompts cat tiger --steps 3".split()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two adapters of draft.py, after a few updates, on rewards that are easy to raise -> their folders."""
    draft, folders = load("sd/draft.py"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(SOURCE)
        world = draft.load_world(draft.parse_args(TINY))
        for name in ("saturation", "contrast"):
            args = draft.parse_args([*TINY, "--reward", name, *"--updates 4 --batch 4 --images 2 --lr 0.03".split()])
            world.rewards = draft.load_rewards([name], args)
            world.level, world.spread = {name: torch.zeros(2)}, {name: 0.1}
            folder = tmp_path_factory.mktemp("lora") / name
            draft.train_adapter(name, world, draft.draft_update(world, args, 0.0, 1), args, folder)
            draft.save_adapter(world.unet, folder)
            folders.append(str(folder))
    return folders


def run_words(name, adapters, out):
    extra = {"and": "--dual-steps 4 --batch 4 --images 4 --particles 2 --concepts cat+sun cat+sun+rose",
             "or": "--methods equal kl elbo --concepts cat sun --updates 4 --batch 3 --images 4 --primal-steps 1 --data 3 "
                   "--levels 4"}[name]
    reward = ["--reward", "saturation", "contrast"] if name == "and" else []
    return [*TINY, *extra.split(), "--lora", *adapters, *reward, "--out", str(out)]


@pytest.fixture(scope="module")
def finished(adapters, tmp_path_factory):
    """A short run of each script -> {name: (folder of results, numbers, words)}."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(SOURCE)
        for name, script in both.items():
            out = tmp_path_factory.mktemp(name)
            words = run_words(name, adapters, out)
            found[name] = out / f"sd_{name}_composition", script.main(script.parse_args(words)), words
    return found


@pytest.mark.parametrize("name", both)
def test_short_runs(name, finished):
    folder, numbers, _ = finished[name]
    assert all(math.isfinite(value) for value in numbers.values())
    assert all((folder / f"{figure}.png").stat().st_size > 10_000 for figure in ("figure", "prompts"))
    record = json.loads((folder / "numbers.json").read_text())
    assert [r["name"] for r in record["rows"]] == list(numbers) and record["network_evaluations"] > 0
    if name == "and":
        assert numbers["single_contrast.adapters.percent_contrast"] == pytest.approx(100)
        assert {f"{m}.cat_sun_rose.min_clip" for m in land.COLORS} <= set(numbers)
        assert "constrained.cat_sun.min_clip" not in numbers and "corrected.prompts.min_clip" in numbers
        kls = [numbers[f"equal.cat_sun.kl_{concept}"] for concept in ("cat", "sun")]
        assert kls[0] == pytest.approx(kls[1], rel=1e-3) and kls[0] > 1
    else:
        duals = [numbers[f"kl.prompts.dual_{concept}"] for concept in ("cat", "sun")]
        assert sum(duals) == pytest.approx(1) and numbers["equal.prompts.dual_cat"] == pytest.approx(0.5)
        assert sum(numbers[f"kl.adapters.share_{name}"] for name in ("saturation", "contrast")) == pytest.approx(1)


def test_each_adapter_is_itself_among_others(adapters):
    """Several adapters side by side predict what each does alone, and the base model what it did before."""
    args = land.parse_args([*TINY, "--images", "2", "--particles", "1", "--batch", "4", "--lora", *adapters, "--reward",
                            "saturation", "contrast"])
    world = land.load_world(argparse.Namespace(**dict(vars(args), lora=None)))
    x = torch.randn(4, *world.shape, generator=generator())
    before = land.prompted(world, args, torch.tensor([0, 0, 1, 1]))(x, 500)
    world.adapters = land.attach_adapters(world, args.lora)
    problem = land.make_products(world, args)[0]
    found = [f(x, 500) for f in problem.predict(2)]
    assert torch.equal(problem.others["base"](2)(x, 500), before)
    for folder, eps in zip(adapters, found):
        alone = land.load_world(argparse.Namespace(**dict(vars(args), lora=folder)))
        torch.testing.assert_close(land.prompted(alone, args, torch.tensor([0, 0, 1, 1]))(x, 500), eps)
        assert (eps - before).abs().max() > 1e-3
    torch.testing.assert_close(problem.others["single_contrast"](2)(x, 500), found[1])


def test_the_same_seed_gives_the_same_bytes(finished, adapters, tmp_path):
    for name, script in both.items():
        words = [*run_words(name, adapters, tmp_path), "--chunk", "64"]
        assert script.main(script.parse_args(words)) == finished[name][1]
    for file in finished["or"][0].glob("*/*.safetensors"):
        assert file.read_bytes() == (tmp_path / "sd_or_composition" / file.parent.name / file.name).read_bytes()


def test_an_interrupted_run_gives_the_same_bytes(finished, adapters, tmp_path, monkeypatch):
    words, calls, real = run_words("or", adapters, tmp_path), [], lor.dual_update

    def interrupted(*values):
        calls.append(1)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return real(*values)

    monkeypatch.setattr(lor, "dual_update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lor.main(lor.parse_args(words))
    monkeypatch.setattr(lor, "dual_update", real)
    assert lor.main(lor.parse_args([*words, "--resume"])) == finished["or"][1]


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, words, sentence", [
    ("and", "--reward clip", "one reward for each"),
    ("and", "--concepts cat", "two or more concepts"),
    ("and", "--images 20 --particles 16", "multiple of --particles"),
    ("and", "--batch 3", "multiple of the number of prompts"),
    ("and", "--dual-steps 2", "at least 4"),
    ("and", "--lora a/x b/x --reward clip contrast", "different names"),
    ("and", "--lora a --reward clip", "two or more"),
    ("or", "--concepts cat", "two or more"),
    ("or", "--levels 1", "at least 2"),
    ("or", "--primal-steps 0", "above zero"),
    ("or", "--images 6", "multiple of 4"),
])
def test_bad_flags(name, words, sentence, capsys):
    with pytest.raises(SystemExit) as end:
        both[name].parse_args(words.split())
    assert_one_sentence(end, capsys, sentence)


@pytest.mark.parametrize("name, words, sentence", [
    ("and", "--quick --lora none/a none/b --reward clip contrast", "holds no LoRA weights"),
    ("or", "--quick --lora none/a none/b", "holds no LoRA weights"),
    ("and", "--quick --problem prompts --concepts cat+sun --steps 1000", "take fewer steps"),
])
def test_bad_input(name, words, sentence, capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        both[name].main(both[name].parse_args([*words.split(), "--out", str(tmp_path)]))
    assert_one_sentence(end, capsys, sentence)
