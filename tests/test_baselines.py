"""toy/guidance.py, toy/draft.py, toy/ddpo.py: gradients and KLs against closed forms on a linear-Gaussian chain.

A noise prediction that is affine in x makes the chain linear-Gaussian at any number of steps: with a quadratic reward,
E[r], the KL of the path and their derivatives follow from a recursion of means and covariances (`exact_values`), which
autograd differentiates. z-scores are over independent groups; |z| > 5 is a bug.
"""
import copy
import json
import math
import types

import pytest
import torch
from conftest import load, planted

guidance, draft, ddpo = (load(f"toy/{name}.py") for name in ("guidance", "draft", "ddpo"))
D = torch.float64
ABAR = [0.02, 0.1, 0.3, 0.6, 0.85, 0.97, 0.995]  # six steps
CENTER, CURVATURE = torch.tensor([0.5, -1.0], dtype=D), torch.tensor([[0.6, 0.2], [0.2, 0.3]], dtype=D)
MEAN, VAR = torch.tensor([0.3, -0.2], dtype=D), torch.tensor([1.5, 0.4], dtype=D)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def reward(x):
    return -torch.einsum("nd,de,ne->n", x - CENTER, CURVATURE, x - CENTER)


PROBLEM = types.SimpleNamespace(name="chain", data=types.SimpleNamespace(means=MEAN[None]), reward=reward, log_z=0.0)


class Affine(torch.nn.Module):
    """The exact noise prediction for N(MEAN, diag VAR) plus A x + b, at x (N, 2) and abar a float or (N, 1)."""

    def __init__(self, seed=None):
        super().__init__()
        A, b = torch.zeros(2, 2, dtype=D), torch.zeros(2, dtype=D)
        if seed is not None:
            A, b = 0.1 * torch.randn(2, 2, generator=generator(seed), dtype=D), torch.tensor([0.2, -0.1], dtype=D)
        self.A, self.b = torch.nn.Parameter(A), torch.nn.Parameter(b)

    def forward(self, x, abar):
        return (1 - abar) ** 0.5 * (x - abar**0.5 * MEAN) / (abar * VAR + 1 - abar) + x @ self.A.T + self.b


def posterior_step(net, a, b):
    """Matrix, offset and variance of the DDPM step, from the posterior of Ho et al. (2020) eq. 7."""
    var = a * VAR + 1 - a
    G = ((1 - a) ** 0.5 / var).diag() + net.A
    g = -((1 - a) ** 0.5) * a**0.5 * MEAN / var + net.b
    to_x0, to_x = b**0.5 * (1 - a / b) / (1 - a), (a / b) ** 0.5 * (1 - b) / (1 - a)
    eye = torch.eye(2, dtype=D)
    return (to_x0 / a**0.5 * (eye - (1 - a) ** 0.5 * G) + to_x * eye, -to_x0 / a**0.5 * (1 - a) ** 0.5 * g,
            (1 - b) / (1 - a) * (1 - a / b))


def exact_values(net, base, horizon=None):
    """E[r], KL of each step (T,), mean and covariance of x_0; derivatives of the last `horizon` steps alone."""
    mean, cov, kl, steps = torch.zeros(2, dtype=D), torch.eye(2, dtype=D), [], len(ABAR) - 1
    for i, (a, b) in enumerate(zip(ABAR, ABAR[1:])):
        with torch.set_grad_enabled(horizon is None or i >= steps - horizon):
            (M, o, var), (M0, o0, _) = posterior_step(net, a, b), posterior_step(base, a, b)
            offset = (M - M0) @ mean + o - o0
            kl.append((offset @ offset + ((M - M0) @ cov @ (M - M0).T).trace()) / (2 * var))
            mean, cov = M @ mean + o, M @ cov @ M.T + var * torch.eye(2, dtype=D)
    r = -(mean - CENTER) @ CURVATURE @ (mean - CENTER) - (CURVATURE * cov).sum()
    return r, torch.stack(kl), mean, cov


def exact_log_z(mean, cov):
    grow = torch.eye(2, dtype=D) + 2 * cov @ CURVATURE
    d = mean - CENTER
    return -0.5 * torch.linalg.slogdet(grow)[1] - d @ CURVATURE @ torch.linalg.solve(grow, d)


def exact_gradient(net, base, kl_weight, horizon=None):
    r, kl, _, _ = exact_values(net, base, horizon)
    return torch.cat([g.flatten() for g in torch.autograd.grad(kl_weight * kl.sum() - r, list(net.parameters()))])


def z_scores(values, exact):
    """values (G, k) of independent groups."""
    return ((values.mean(0) - exact) / values.std(0) * len(values) ** 0.5).tolist()


def noise(n, rng):
    return torch.randn(n, 2, generator=rng, dtype=D)


# ---- the chain and its KL --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [draft, ddpo])
def test_path_has_the_moments_and_the_kl_of_the_closed_form(module):
    net, base, rng = Affine(1), Affine(), generator(0)
    with torch.no_grad():
        r, kl, mean, cov = exact_values(net, base)
        values = []
        for _ in range(64):
            path, steps = module.sample_path(net, base, noise(256, rng), ABAR, rng)
            x = path[-1] - mean
            second = (x[:, :, None] * x[:, None, :]).mean(0).flatten()
            values.append(torch.cat([x.mean(0), second - cov.flatten(), reward(path[-1]).mean()[None] - r,
                                     steps.mean(1) - kl]))
        assert max(map(abs, z_scores(torch.stack(values), 0))) <= 5
        assert (module.sample_path(base, base, noise(64, rng), ABAR, rng)[1] == 0).all()


def test_batched_kernels_are_those_of_the_path():
    net, rng = Affine(1), generator(0)
    path, _ = ddpo.sample_path(net, net, noise(16, rng), ABAR, rng)
    mean, sigma = ddpo.kernel_means(net, path, ABAR)
    for i, (a, b) in enumerate(zip(ABAR, ABAR[1:])):
        M, o, var = posterior_step(net, a, b)
        assert (mean[i] - path[i] @ M.T - o).abs().max() < 1e-12 and abs(sigma[i].item() ** 2 - var) < 1e-14
    log_p = torch.distributions.Normal(mean, sigma[:, :, None]).log_prob(path[1:]).sum(2)
    constant = log_p - ddpo.log_density(path, mean, sigma)
    assert (constant + 2 * sigma.log() + math.log(2 * math.pi)).abs().max() < 1e-10


@pytest.mark.parametrize("seed", range(5))
def test_path_objective_is_at_least_minus_log_z(seed):
    """KL(path) - E[r] >= KL(x_0) - E[r] >= -log Z of the chain of the base, in closed form throughout."""
    net, base = Affine(seed), Affine()
    with torch.no_grad():
        r, kl, mean, cov = exact_values(net, base)
        _, _, mean0, cov0 = exact_values(base, base)
        d, ratio = mean - mean0, torch.linalg.solve(cov0, cov)
        terminal = 0.5 * (ratio.trace() + d @ torch.linalg.solve(cov0, d) - 2 - torch.linalg.slogdet(ratio)[1])
        assert kl.sum() > terminal > 0
        assert terminal - r > -exact_log_z(mean0, cov0)


# ---- DRaFT -----------------------------------------------------------------------------------------------------------


def draft_gradients(module, horizon, seed=0, groups=40, n=256, kl_weight=0.7):
    net, base, rng = Affine(1), Affine(), generator(seed)
    values = []
    for _ in range(groups):
        loss = module.draft_loss(net, base, reward, noise(n, rng), ABAR, rng, kl_weight, horizon)
        values.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))]))
    return z_scores(torch.stack(values), exact_gradient(net, base, kl_weight, horizon))


@pytest.mark.parametrize("horizon", [None, 6, 3, 1])
def test_draft_gradient_is_exact(horizon):
    """The full one, and that of a shorter horizon, which is what it says: early states held fixed."""
    assert max(map(abs, draft_gradients(draft, horizon))) <= 5


def test_draft_gradient_is_that_of_finite_differences():
    net, base = Affine(1), Affine()

    def loss():
        rng = generator(3)
        return draft.draft_loss(net, base, reward, noise(8, rng), ABAR, rng, 0.7)

    found = torch.autograd.grad(loss(), net.b)[0]
    for i in range(2):
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                net.b[i] += step
                values.append(loss())
                net.b[i] -= step
        assert abs((values[0] - values[1]) / 2e-5 - found[i]) < 1e-7 * max(1, abs(found[i]))


DRAFT_BUGS = {
    "KL sign flipped": (None, "return kl_weight * kl.sum(0).mean()", "return -kl_weight * kl.sum(0).mean()"),
    "KL averaged over the steps": (None, "return kl_weight * kl.sum(0).mean()", "return kl_weight * kl.mean(0).mean()"),
    "KL without 1 / sigma^2": (None, ".sum(1) / (2 * sigma**2))", ".sum(1) / 2)"),
    "KL blind to where the path goes": (None, "kl.append((mean - anchor)", "kl.append((mean - anchor.detach())"),
    "reward averaged with the wrong sign": (None, "kl.sum(0).mean() - checked", "kl.sum(0).mean() + checked"),
    "truncated a step too early": (3, "i >= steps - horizon", "i > steps - horizon"),
    "truncated a step too late": (3, "i >= steps - horizon", "i >= steps - horizon - 1"),
    "first steps kept instead of the last": (3, "i >= steps - horizon", "i < horizon"),
}


@pytest.mark.parametrize("bug", DRAFT_BUGS)
def test_planted_bug_of_draft_is_caught(bug):
    horizon, old, new = DRAFT_BUGS[bug]
    assert max(map(abs, draft_gradients(planted("toy/draft.py", (old, new)), horizon))) > 5


def test_truncation_that_detaches_everything_is_caught():
    broken = planted("toy/draft.py", ("i >= steps - horizon", "i >= steps"))
    with pytest.raises(RuntimeError, match="does not require grad"):
        draft_gradients(broken, 1)


# ---- DDPO ------------------------------------------------------------------------------------------------------------


def ddpo_gradients(module, seed=0, groups=64, n=512, kl_weight=0.7):
    """On the paths of the network itself, at scale 1: an unbiased estimate of the gradient, at any n above 1."""
    net, base, rng = Affine(1), Affine(), generator(seed)
    values, prompt = [], torch.zeros(n, dtype=torch.long)
    for _ in range(groups):
        with torch.no_grad():
            path, kl = module.sample_path(net, base, noise(n, rng), ABAR, rng)
            advantage, scale = module.step_advantages(reward(path[-1]), kl, prompt, kl_weight)
            old, (anchor, _) = module.kernel_means(net, path, ABAR), module.kernel_means(base, path, ABAR)
            old_log_p = module.log_density(path, *old)
        one = torch.ones_like(scale)
        loss, clipped = module.ddpo_loss(net, path, anchor, old_log_p, advantage, one, ABAR, kl_weight, 0.2)
        assert clipped == 0
        values.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))]))
    return z_scores(torch.stack(values), exact_gradient(net, base, kl_weight))


def test_ddpo_gradient_is_exact():
    assert max(map(abs, ddpo_gradients(ddpo))) <= 5


DDPO_BUGS = {
    "log-ratio averaged over dimensions": ("(path[1:] - mean).flatten(2).pow(2).sum(2)",
                                           "(path[1:] - mean).flatten(2).pow(2).mean(2)"),
    "KL sign flipped": ("(kl_weight * kl - gain)", "(-kl_weight * kl - gain)"),
    "sign of the later KL flipped": ("return others(reward - kl_weight", "return others(reward + kl_weight"),
    "later KL forgotten": ("(kl.flip(0).cumsum(0).flip(0) - kl)", "(0 * kl)"),
    "later KL is the earlier": ("(kl.flip(0).cumsum(0).flip(0) - kl)", "(kl.cumsum(0) - kl)"),
    "reward of another path": ("return others(reward - kl_weight", "return others(reward.roll(1) - kl_weight"),
    "steps averaged": ("/ scale).sum(0).mean()", "/ scale).mean(0).mean()"),
    "variance instead of twice the variance": (".flatten(2).pow(2).sum(2) / (2 * sigma**2)\n\n\ndef step_advantages",
                                               ".flatten(2).pow(2).sum(2) / sigma**2\n\n\ndef step_advantages"),
}


@pytest.mark.parametrize("bug", DDPO_BUGS)
def test_planted_bug_of_ddpo_is_caught(bug):
    assert max(map(abs, ddpo_gradients(planted("toy/ddpo.py", DDPO_BUGS[bug])))) > 5


def prompt_error(module):
    """How much the advantages of one prompt change when the rewards of the other are shifted and stretched."""
    rng = generator(5)
    r, kl = torch.randn(40, generator=rng, dtype=D), torch.rand(6, 40, generator=rng, dtype=D)
    prompt = torch.arange(40) % 3 % 2
    first, scale = module.step_advantages(r, kl, prompt, 0.7)
    second, other_scale = module.step_advantages(torch.where(prompt == 1, 10 * r - 100, r), kl, prompt, 0.7)
    mine = prompt == 0
    return max((first - second)[:, mine].abs().max().item(), (scale - other_scale)[mine].abs().max().item(),
               *(first[:, prompt == p].sum(1).abs().max().item() for p in (0, 1)))


def test_advantages_are_per_prompt():
    assert prompt_error(ddpo) < 1e-12
    whole = ("same = one_hot(prompt).to(kl)", "prompt = 0 * prompt\n    same = one_hot(prompt).to(kl)")
    assert prompt_error(planted("toy/ddpo.py", whole)) > 1


def numbers_error(module):
    """Two prompts of two and three samples and two steps, worked out by hand."""
    r, prompt = torch.tensor([1.0, 3.0, 0.0, 2.0, 7.0], dtype=D), torch.tensor([0, 0, 1, 1, 1])
    kl = torch.tensor([[9.0] * 5, [0.0, 1.0, 0.0, 0.0, 0.0]], dtype=D)
    returns = torch.tensor([[1.0, 1.0, 0.0, 2.0, 7.0], [1.0, 3.0, 0.0, 2.0, 7.0]], dtype=D)  # less 2 KL to come
    others = torch.stack([returns[:, 1], returns[:, 0], (returns[:, 3] + returns[:, 4]) / 2,
                          (returns[:, 2] + returns[:, 4]) / 2, (returns[:, 2] + returns[:, 3]) / 2], 1)
    return (module.step_advantages(r, kl, prompt, 2.0)[0] - (returns - others)).abs().max()


def test_baseline_is_the_mean_of_the_others():
    """With the sample in its own baseline the gradient would be (n - 1) / n of what it should be."""
    assert numbers_error(ddpo) < 1e-12
    assert numbers_error(planted("toy/ddpo.py", (" * count / (count - 1)", ""))) > 0.5


def clipped_gradients(module):
    """Gradient of the loss where the ratio is 2 or 1/2 and the advantage is +1 or -1, one sample each -> (4,)."""
    net, values = Affine(1), []
    for log_ratio, sign in ((0.7, 1.0), (0.7, -1.0), (-0.7, 1.0), (-0.7, -1.0)):
        rng = generator(4)
        with torch.no_grad():
            path, _ = module.sample_path(net, net, noise(1, rng), ABAR[:2], rng)
            mean, sigma = module.kernel_means(net, path, ABAR[:2])
            old = module.log_density(path, mean, sigma) - log_ratio
        one = torch.ones(1, 1, dtype=D)
        loss, share = module.ddpo_loss(net, path, mean, old, sign * one, one[0], ABAR[:2], 0.0, 0.2)
        assert share == 1
        values.append(torch.autograd.grad(loss, net.b)[0].norm().item())
    return values


def test_clipping_stops_what_has_gone_far_enough():
    """A ratio beyond the range has no gradient if the advantage pushes it further, and keeps it if it pushes back."""
    up_good, up_bad, down_good, down_bad = clipped_gradients(ddpo)
    assert up_good == down_bad == 0 and up_bad > 0 and down_good > 0
    up_good, up_bad, _, _ = clipped_gradients(planted("toy/ddpo.py", ("torch.minimum(", "torch.maximum(")))
    assert up_good > 0 and up_bad == 0


# ---- training --------------------------------------------------------------------------------------------------------


def train(name, module, base, kl_weight, problem=PROBLEM, **options):
    sizes = dict(draft=dict(iterations=10, batch=128, lr=0.02, held_out=64), ddpo=dict(batch=256, lr=0.01))[name]
    return getattr(module, name)(problem, base, ABAR, generator(0), kl_weight, **sizes | options)


@pytest.mark.parametrize("name, module", [("draft", draft), ("ddpo", ddpo)])
def test_training_reaches_the_best_policy(name, module):
    """The exact objective of the tuned network against its minimum over the six parameters, found by L-BFGS."""
    base, best = Affine(), Affine()
    optimizer = torch.optim.LBFGS(best.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def objective(net):
        r, kl, _, _ = exact_values(net, base)
        return kl.sum() - r

    def closure():
        optimizer.zero_grad()
        loss = objective(best)
        loss.backward()
        return loss

    optimizer.step(closure)
    for now in train(name, module, base, 1.0, epochs=20):
        pass
    with torch.no_grad():
        start, least, reached = objective(base), objective(best), objective(now["net"])
        _, _, mean, cov = exact_values(base, base)
        assert start > least + 0.08 and least > -exact_log_z(mean, cov)
        assert least <= reached < least + 0.02
    loss = now["kl"] - now["reward"]
    assert abs(loss.mean() - reached) < 5 * loss.std() / len(loss) ** 0.5


@pytest.mark.parametrize("name, module", [("draft", draft), ("ddpo", ddpo)])
def test_without_a_reward_the_model_stays_at_the_base(name, module):
    """Bit by bit, as the gradient is zero at the base; from elsewhere it returns, which needs the right sign."""
    zero = types.SimpleNamespace(data=PROBLEM.data, reward=lambda x: 0 * x[:, 0])
    base = Affine()
    for now in train(name, module, base, 1.0, zero, epochs=2):
        assert all((a == b).all() for a, b in zip(now["net"].parameters(), base.parameters()))
        assert (now["kl"] == 0).all()
    assert returns_to_base(name, module)
    signs = dict(draft=("return kl_weight * kl", "return -kl_weight * kl"), ddpo=("(kl_weight * kl - gain)",
                 "(-kl_weight * kl - gain)"))
    assert not returns_to_base(name, planted(f"toy/{name}.py", signs[name]))


def returns_to_base(name, module):
    """Whether steps along the gradient of the loss without a reward lower the exact KL from the base."""
    net, base, rng = Affine(1), Affine(), generator(0)
    with torch.no_grad():
        start = exact_values(net, base)[1].sum()
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    for _ in range(10):
        if name == "draft":
            loss = module.draft_loss(net, base, lambda x: 0 * x[:, 0], noise(256, rng), ABAR, rng, 1.0)
        else:
            with torch.no_grad():
                path, kl = module.sample_path(net, base, noise(256, rng), ABAR, rng)
                old = module.log_density(path, *module.kernel_means(net, path, ABAR))
                advantage, scale = module.step_advantages(0 * path[-1, :, 0], kl, torch.zeros(256, dtype=torch.long), 1.0)
                anchor, _ = module.kernel_means(base, path, ABAR)
            loss, _ = module.ddpo_loss(net, path, anchor, old, advantage, scale, ABAR, 1.0, 0.2)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    return bool(exact_values(net, base)[1].sum() < 0.9 * start)


@pytest.mark.parametrize("name, module", [("draft", draft), ("ddpo", ddpo)])
def test_training_yields_epochs_and_keeps_the_base(name, module):
    base = Affine()
    before = copy.deepcopy(base.state_dict())
    runs = []
    for _ in range(2):
        run = []
        for now in train(name, module, base, 0.0, epochs=3):
            assert torch.is_grad_enabled() and not now["x"].requires_grad and not now["kl"].requires_grad
            run.append((now["evaluations"], *(now[key].tolist() for key in ("x", "reward", "kl"))))
        runs.append(run)
    assert runs[0] == runs[1] and len(runs[0]) == 4
    assert runs[0][0][0] == 0 < runs[0][1][0] < runs[0][2][0]
    assert all((base.state_dict()[key] == before[key]).all() for key in before)


@pytest.mark.parametrize("module", [draft, ddpo])
def test_early_stop(module, capsys):
    losses, seen = [5.0, 3.0, 1.0, 1.05, 4.0, 3.0, 1.5, 0.0], []

    def run():
        net = Affine()
        for epoch, loss in enumerate(losses):
            with torch.no_grad():
                net.b[:] = epoch
            seen.append(epoch)
            kl = torch.tensor([loss - 0.1, loss + 0.1, loss - 0.1, loss + 0.1])  # standard error 0.06
            yield dict(net=net, kl=kl, reward=torch.zeros(4), evaluations=10 * epoch)

    out = module.follow("run", run(), PROBLEM, 1.0, patience=3)
    assert seen == [0, 1, 2, 3, 4, 5, 6] and out["last"].b[0] == 6
    assert out["best"].b[0] == out["best_epoch"] == 3  # within a standard error of the least, and later
    assert [h[-1] for h in out["history"]] == pytest.approx(losses[:7]) and out["history"][-1][0] == 60
    assert module.follow("run", run(), PROBLEM, 1.0)["best"].b[0] == 7
    assert "optimum" in capsys.readouterr().err


# ---- guidance --------------------------------------------------------------------------------------------------------


def guided_moments(form, strength, abar, gamma, kl_weight):
    """Mean, covariance of x_0 and the KL of the path, by the recursion for affine kernels and pushes."""
    mean, cov, total, steps = torch.zeros(2, dtype=D), torch.eye(2, dtype=D), 0.0, len(abar) - 1
    temper = guidance.temper_schedule(steps, gamma, "schedule" if form == "tempered" else "none").tolist()
    base = Affine()
    for i, (a, b) in enumerate(zip(abar, abar[1:])):
        M, o, var = posterior_step(base, a, b)
        J = (a**0.5 * VAR / (a * VAR + 1 - a)).diag()  # x0_hat = J x + j
        j = MEAN - J @ (a**0.5 * MEAN)
        factor = strength * (1.0 if form == "published" else var * temper[i + 1]) / kl_weight
        P, p = -2 * factor * J @ CURVATURE @ J, -2 * factor * J @ CURVATURE @ (j - CENTER)
        if var > 0:
            total = total + ((P @ mean + p).square().sum() + (P @ cov @ P.T).trace()) / (2 * var)
        mean, cov = (M + P) @ mean + o + p, (M + P) @ cov @ (M + P).T + var * torch.eye(2, dtype=D)
    return mean, cov, total


FORMS = {"none": 1.0, "scaled": 0.7, "tempered": 1.5, "published": 0.2}


def guided_z(module, form, abar=(*ABAR, 1.0), seed=0, groups=64, n=256):
    strength, base, rng, abar = FORMS[form], Affine().requires_grad_(False), generator(seed), list(abar)
    mean, cov, kl = guided_moments(form, strength if form != "none" else 0.0, abar, 0.01, 0.8)
    values = []
    for _ in range(groups):
        out = module.guidance(PROBLEM, lambda x, t: base(x, abar[t]), noise(n, rng), range(len(abar) - 1), abar, rng,
                              0.8, strength, form, 0.01)
        x = out["x"] - mean
        second = (x[:, :, None] * x[:, None, :]).mean(0) - cov
        values.append(torch.cat([x.mean(0), second.flatten(), out["kl"].mean()[None] - kl] if form != "none" else
                                [x.mean(0), second.flatten()]))
    return max(map(abs, z_scores(torch.stack(values), 0)))


@pytest.mark.parametrize("form", FORMS)
def test_guidance_has_the_moments_and_the_kl_of_the_closed_form(form):
    assert guided_z(guidance, form, ABAR if form == "published" else (*ABAR, 1.0)) <= 5


GUIDANCE_BUGS = {
    "sigma^2 missing": ("scaled", "push = sigma * guide(", "push = guide("),
    "sigma twice too often": ("scaled", "push = sigma * guide(", "push = sigma**2 * guide("),
    "temper forgotten": ("tempered", '"schedule" if form == "tempered" else "none"', '"none"'),
    "KL per sigma": ("scaled", "size / (2 * sigma**2)", "size / (2 * sigma)"),
    "kl_weight forgotten": ("scaled", "abar[i], kl_weight, form", "abar[i], 1.0, form"),
    "pushed away": ("scaled", "push = strength * state", "push = -strength * state"),
}


@pytest.mark.parametrize("bug", GUIDANCE_BUGS)
def test_planted_bug_of_guidance_is_caught(bug):
    form, old, new = GUIDANCE_BUGS[bug]
    assert guided_z(planted("toy/guidance.py", (old, new)), form) > 5


def test_published_form_has_no_path_kl_at_a_step_without_noise():
    base, rng, abar = Affine().requires_grad_(False), generator(0), [*ABAR, 1.0]
    x = noise(8, rng)
    out = guidance.guidance(PROBLEM, lambda x, t: base(x, abar[t]), x, range(7), abar, rng, form="published")
    assert out["x"].isfinite().all() and (out["kl"] == math.inf).all()


def test_scaled_guidance_is_exact_for_a_linear_reward():
    """N(m, V) exp(g'x) is a multiple of N(m + V g, V), and r(x0_hat) is the value but for a constant."""
    g, rng = torch.tensor([0.8, -1.2], dtype=D), generator(0)
    linear = types.SimpleNamespace(reward=lambda x: x @ g)
    base, error = Affine().requires_grad_(False), []
    for steps in (100, 200):
        abar, x = [*draft.log_snr_levels(steps, 6.0), 1.0], noise(4000, rng)
        out = guidance.guidance(linear, lambda x, t: base(x, abar[t]), x, range(steps), abar, rng, form="scaled")
        error.append((out["kl"].mean() - (VAR * g * g).sum() / 2).abs())  # the path costs no more than the result
    mean, se = out["x"].mean(0), out["x"].std(0) / 4000**0.5
    assert ((mean - MEAN - VAR * g).abs() < 5 * se + 0.02).all()
    assert (out["x"].var(0) / VAR).log().abs().max() < 0.15
    assert error[1] < 0.06 and 1.8 < error[0] / error[1] < 2.2  # O(1 / steps)


# ---- the measures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [guidance, draft, ddpo])
@pytest.mark.parametrize("name", ["gmm", "gmm2"])
def test_the_problem_is_that_of_das(module, name):
    das, mine = load("toy/das.py").make_problem(name, 0.8, "cpu"), module.make_problem(name, 0.8, "cpu")
    for key in ("log_z", "kl", "data_reward", "target_reward"):
        assert abs(getattr(das, key) - getattr(mine, key)) < 1e-12
    x = das.data.sample(100, generator(0)).double()
    assert (das.reward(x) - mine.reward(x)).abs().max() < 1e-12
    assert (das.target.log_prob(x) - mine.target.log_prob(x)).abs().max() < 1e-12


def kl_error(module, n):
    """Errors, in standard errors, of the histogram's KL for exact samples of target and data."""
    problem = module.make_problem("gmm2", 1.0, "cpu")
    far, se_far = module.terminal_kl(problem.target.sample(n, generator(0)), problem.data)
    near, se_near = module.terminal_kl(problem.data.sample(n, generator(1)), problem.data)
    return abs(far - problem.kl) / se_far, abs(near) / math.hypot(se_near, 0.01)


def test_terminal_kl():
    """Within a few standard errors; the bias of the histogram, were it left in, is 0.04 nats for 4000 samples."""
    assert max(kl_error(draft, 40_000)) < 4
    assert kl_error(draft, 4000)[1] < 3
    biased = planted("toy/draft.py", ("return mean - (len(cells) - 1) / (2 * len(x)), se", "return mean, se"))
    assert kl_error(biased, 4000)[1] > 3
    assert kl_error(planted("toy/draft.py", ("2 * math.log(cell / fine)", "math.log(cell / fine)")), 4000)[0] > 5
    away = torch.full((10, 2), 1e3)  # finite where nothing has ever been
    assert math.isfinite(draft.terminal_kl(away, draft.make_problem("gmm", 1.0, "cpu").data)[0])


def test_modes_and_their_spread():
    problem = draft.make_problem("gmm2", 1.0, "cpu")
    x, w = problem.target.sample(100_000, generator(0)).double(), torch.ones(100_000, dtype=D)
    masses = draft.mode_masses(x, w, problem.data.means)
    assert (masses - problem.masses).abs().max() < 0.01
    assert abs(draft.mode_spread(x, w, problem.data.means) - problem.spread) < 0.01
    assert draft.mode_spread(problem.data.means, torch.ones(8, dtype=D), problem.data.means) < 1e-6


# ---- the scripts -----------------------------------------------------------------------------------------------------

SCRIPTS = dict(guidance=guidance, draft=draft, ddpo=ddpo)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A quick run of each script on gmm2, with one cache -> folder, {script: numbers}."""
    out = tmp_path_factory.mktemp("out")
    flags = ["--quick", "--problem", "gmm2", "--out", str(out)]
    return out, {name: module.main(module.parse_args(flags)) for name, module in SCRIPTS.items()}


@pytest.mark.parametrize("name", SCRIPTS)
def test_quick_run_is_finite_and_in_range(quick, name):
    out, numbers = quick[0], quick[1][name]
    assert all(math.isfinite(v) for v in numbers.values())
    record = json.loads((out / f"toy_{name}" / "numbers.json").read_text())
    assert {r["name"]: r["estimate"] for r in record["rows"]} == numbers
    assert {"args", "rows", "network_evaluations", "seconds", "peak_memory_mb", "versions"} == set(record)
    assert (out / f"toy_{name}" / "figure.png").stat().st_size > 10_000
    assert len(list((out / "cache").iterdir())) == 1  # the three scripts share the network of das.py
    assert abs(numbers["pretrained.gmm2.log_z"] + 2.968) < 0.5
    assert abs(numbers["target.gmm2.terminal_kl"] - 1.628) < 0.2 and numbers["target.gmm2.modes_covered"] == 2


def test_baselines_improve_their_own_objective(quick):
    """With KL far below the start and not below -log Z; without, E[r] is higher and the objective worse."""
    numbers = quick[1]
    for name in ("draft", "ddpo"):
        start, tuned, greedy = (numbers[name][f"{method}.gmm2.path_objective"]
                                for method in ("pretrained", name, f"{name}_no_kl"))
        assert 2.8 < tuned < 0.6 * start and greedy > 2 * tuned
        assert numbers[name][f"{name}_no_kl.gmm2.mean_reward"] > -0.6 > numbers[name][f"{name}.gmm2.mean_reward"]
        assert numbers[name][f"{name}_no_kl_stopped.gmm2.path_objective"] < greedy
    objective = {key.split(".")[0]: v for key, v in numbers["guidance"].items() if key.endswith(".terminal_objective")}
    assert objective["guidance_tuned"] < objective["guidance_published"] < objective["pretrained"]


def test_same_seed_same_bytes(quick, tmp_path):
    again = guidance.main(guidance.parse_args(["--quick", "--problem", "gmm2", "--out", str(tmp_path)]))
    assert again == quick[1]["guidance"]
    assert (tmp_path / "toy_guidance/figure.png").read_bytes() == (quick[0] / "toy_guidance/figure.png").read_bytes()


BAD_FLAGS = [(name, flags) for name in SCRIPTS for flags in
             ("--steps 1", "--steps 2000", "--problem swiss_roll", "--kl-weight 0", "--kl-weight nan", "--samples 1",
              "--device cuda:99", "--no-such-flag", "--quick --paper")]
BAD_FLAGS += [("draft", "--horizon 31"), ("draft", "--horizon 0"), ("draft", "--lr -1"), ("draft", "--epochs 0"),
              ("ddpo", "--batch 4"), ("ddpo", "--ratio-clip 0"), ("ddpo", "--minibatches 0"),
              ("guidance", "--strength inf"), ("guidance", "--strength -1"), ("guidance", "--score oracle")]


@pytest.mark.parametrize("name, flags", BAD_FLAGS)
def test_bad_flags_end_in_one_sentence(name, flags, capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        SCRIPTS[name].main(SCRIPTS[name].parse_args([*flags.split(), "--out", str(tmp_path / "out")]))
    assert_one_sentence(end, capsys)
    assert not (tmp_path / "out").exists()


def assert_one_sentence(end, capsys):
    text = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(text) == 1 and len(text[0]) > 15, text


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("bad", [lambda x: x[:, 0] * math.nan, lambda x: x, lambda x: x[:3, 0]])
def test_bad_reward_ends_in_one_sentence(name, bad, capsys):
    problem, rng = types.SimpleNamespace(data=PROBLEM.data, reward=bad), generator(0)
    with pytest.raises(SystemExit) as end:
        if name == "guidance":
            guidance.guidance(problem, lambda x, t: Affine()(x, ABAR[t]), noise(8, rng), range(6), ABAR, rng)
        else:
            next(train(name, SCRIPTS[name], Affine(), 1.0, problem, epochs=1))
    assert_one_sentence(end, capsys)


@pytest.mark.parametrize("name", ["draft", "ddpo"])
def test_training_that_diverges_ends_in_one_sentence(name, capsys):
    """At an absurd step size the network overflows: no NaN is handed on."""
    with pytest.raises(SystemExit) as end:
        for _ in train(name, SCRIPTS[name], Affine(), 1.0, epochs=50, lr=1e160):
            pass
    assert_one_sentence(end, capsys)
