"""toy/ddpo.py and toy/draft.py: KL of paths, gradients of both losses, optimum that is reached, counted calls."""
import json
import math
import types

import pytest
import torch
from conftest import load, planted
from torch import nn

SCRIPTS = ["ddpo", "draft"]
ABAR = [4e-5, 0.1, 0.4, 0.8, 1.0]

class Affine(nn.Module):
    """x0_hat = gain x + shift, variance exp(log_var), with numbers of its own at every level: all in closed form."""

    def __init__(self, seed, abar=ABAR):
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        offset = torch.tensor([0.5, 0.0, -1.0])[:, None]
        numbers = offset + 0.3 * torch.randn(len(abar) - 1, 3, 2, generator=rng)
        self.numbers, self.levels, self.states = nn.Parameter(numbers.double()), torch.tensor(abar[:-1]), 0
    def forward(self, x, a):
        level = (torch.as_tensor(a)[..., None] - self.levels).abs().argmin(-1)  # (), or (T, 1, 1) for whole paths
        gain, shift, log_var = self.numbers[level[..., 0] if level.dim() else level].unbind(-2)
        self.states += x[..., 0].numel()
        return gain * x + shift, (log_var + 0 * x).exp()

def reward(x):
    return -(torch.tensor([1.0, 0.2]) * (x - 0.5) ** 2).sum(-1)

def objective(module, net, base, kl_weight):
    """KL of paths - E[r] / kl_weight of Affine networks, from mean and variance of the states; no samples."""
    mean, var, kl = torch.zeros(2).double(), torch.ones(2).double(), 0
    for a, b in zip(ABAR, ABAR[1:]):
        probe = torch.stack([torch.zeros(2), torch.ones(2)]).double()
        p, q = module.policy(net, probe, a, b), module.policy(base, probe, a, b)
        slope, gap = p.loc[1] - p.loc[0], p.loc - q.loc
        squared = (gap[0] + (gap[1] - gap[0]) * mean) ** 2 + (gap[1] - gap[0]) ** 2 * var  # E of the means' distance
        ratio = (p.scale[0] / q.scale[0]) ** 2
        kl = kl + ((ratio - 1 - ratio.log() + squared / q.scale[0] ** 2) / 2).sum()
        mean, var = p.loc[0] + slope * mean, slope**2 * var + p.scale[0] ** 2
    return kl + (torch.tensor([1.0, 0.2]) * ((mean - 0.5) ** 2 + var)).sum() / kl_weight

def gradient(value, net):
    return torch.autograd.grad(value, net.numbers)[0]

def z_of_gradient(script, module, kl_weight=0.7, groups=60, n=1000):
    """Largest z of the mean gradient of the loss on fresh paths against that of the closed form."""
    net, base = Affine(0), Affine(1).requires_grad_(False)
    exact = gradient(objective(module, net, base, kl_weight), net)
    torch.manual_seed(2)
    found = []
    for _ in range(groups):
        x = torch.randn(n, 2).double()
        loss = (module.draft(net, base, reward, x, ABAR, kl_weight)[0] if script == "draft" else
                module.ddpo(net, module.collect(net, base, reward, x, ABAR, kl_weight)))
        found.append(gradient(loss, net))
    found = torch.stack(found)
    return ((found.mean(0) - exact) / (found.std(0) / groups**0.5)).abs().max().item()

@pytest.mark.parametrize("script", SCRIPTS)
def test_objective_of_sampled_paths_is_that_of_the_closed_form(script):
    module, net, base = load(f"toy/{script}.py"), Affine(0), Affine(1)
    torch.manual_seed(0)
    with torch.no_grad():
        states, kl = module.paths(net, base, torch.randn(100_000, 2).double(), ABAR)
        values = sum(kl) - reward(states[-1]) / 0.7
        z = (values.mean() - objective(module, net, base, 0.7)) / values.std() * len(values) ** 0.5
        assert abs(z) < 5
        assert all((k > 0).all() for k in kl)
        assert sum(module.paths(net, net, torch.randn(9, 2).double(), ABAR)[1]).abs().max() < 1e-10

@pytest.mark.parametrize("script", SCRIPTS)
def test_gradient_is_that_of_the_objective(script):
    assert z_of_gradient(script, load(f"toy/{script}.py")) < 5

BUGS = [
    ("draft", "kl * of_paths - r", "kl * of_paths + r"),
    ("draft", "states.append(p.rsample())", "states.append(p.sample())"),
    ("draft", "kl_divergence(p, q)", "kl_divergence(q, p)"),
    ("draft", "reward(states[-1]) / kl_weight", "reward(states[-1])"),
    ("ddpo", "(kls.sum(0) - kls.cumsum(0))", "0 * kls"),  # as published: no KL of the steps to come
    ("ddpo", "r - kl * (kls", "r + kl * (kls"),  # as in the notebook of DAS
    ("ddpo", "log_prob(x[1:]).sum(-1) - batch", "log_prob(x[1:]).mean(-1) - batch"),
    ("ddpo", "(kl * kl_divergence(steps, batch[\"anchor\"]).sum(-1) - gain)", "(-gain)"),
]

@pytest.mark.parametrize("script, old, new", BUGS)
def test_planted_bug_is_caught(script, old, new):
    assert z_of_gradient(script, planted(f"toy/{script}.py", (old, new))) > 8

@pytest.mark.parametrize("last", [1, 3])
def test_truncated_gradient_is_the_exact_one_of_the_last_steps_alone(last):
    module, net, base, found = load("toy/draft.py"), Affine(0), Affine(1).requires_grad_(False), []
    for steps in (None, last):
        torch.manual_seed(0)
        found.append(gradient(module.draft(net, base, reward, torch.randn(50, 2).double(), ABAR, last=steps)[0], net))
    torch.testing.assert_close(found[1][-last:], found[0][-last:], atol=1e-10, rtol=1e-10)
    assert found[1][:-last].abs().max() == 0 < found[0][:-last].abs().min()

def test_full_gradient_is_that_of_finite_differences():
    module, net, base = load("toy/draft.py"), Affine(0), Affine(1).requires_grad_(False)

    def loss():
        torch.manual_seed(0)
        return module.draft(net, base, reward, torch.randn(50, 2).double(), ABAR, 0.7)[0]

    exact, h = gradient(loss(), net), 1e-5
    for i in [(0, 0, 0), (1, 1, 1), (2, 2, 0), (3, 2, 1)]:
        net.numbers.data[i] += h
        above = loss().item()
        net.numbers.data[i] -= 2 * h
        assert exact[i].item() == pytest.approx((above - loss().item()) / (2 * h), rel=1e-6, abs=1e-7)
        net.numbers.data[i] += h

@pytest.mark.parametrize("log_ratio, advantage, moves", [(0.5, 1, False), (0.5, -1, True), (-0.5, -1, False),
                                                         (-0.5, 1, True), (0.1, 1, True), (0.1, -1, True)])
def test_clip_stops_only_what_has_gone_far_enough(log_ratio, advantage, moves):
    module, net = load("toy/ddpo.py"), Affine(0)
    batch = module.collect(net, Affine(1), reward, torch.randn(20, 2).double(), ABAR)
    batch |= dict(log_p=batch["log_p"] - log_ratio, advantage=torch.full_like(batch["log_p"], float(advantage)))
    assert (gradient(module.ddpo(net, batch, clip=0.2, kl=0.0), net).abs().max() > 0) == moves

def test_advantages_have_no_mean_and_know_the_kl_to_come():
    module = load("toy/ddpo.py")
    torch.manual_seed(0)
    batch = module.collect(Affine(0), Affine(1), reward, torch.randn(200, 2).double(), ABAR)
    assert batch["advantage"].mean(1).abs().max() < 1e-10
    final = reward(batch["x"][-1])
    assert (batch["advantage"][-1] - (final - final.mean())).abs().max() < 1e-10  # nothing comes after the last step
    kl = torch.distributions.kl_divergence(module.policy(Affine(0), batch["x"][:-1], *batch["levels"]), batch["anchor"])
    assert (kl.sum(-1).sum(0) - final).mean().item() == pytest.approx(batch["objective_paths"], abs=1e-10)

@pytest.mark.parametrize("script", SCRIPTS)
def test_tuning_reaches_minus_log_z_where_gaussian_steps_can(script):
    module, a, c, weight = load(f"toy/{script}.py"), torch.tensor([1.0, 0.2]), 0.5, 0.5  # as in reward()
    data = module.Mixture(torch.zeros(1), torch.tensor([[1.0, -1.0]]), 0.5)
    tilted, log_z = data.tilt(2 * a * c / weight, 2 * a / weight)
    optimum = (a * c**2).sum().item() / weight - log_z
    nets = Affine(0), Affine(0)
    for net, mixture in zip(nets, (data, tilted)):  # the exact network of one Gaussian is affine
        for i, level in enumerate(ABAR[:-1]):
            (low, high), var = mixture.denoise(torch.stack([torch.zeros(2), torch.ones(2)]), level)
            net.numbers.data[i] = torch.stack([high - low, low, var[0].log()])
    assert objective(module, nets[1], nets[0], weight).item() == pytest.approx(optimum, abs=0.01)
    args = types.SimpleNamespace(updates=300, batch=256, abar=ABAR, steps=4, lr=0.05, reuse=4, clip=0.2)
    problem = types.SimpleNamespace(data=data, reward=reward, kl_weight=weight)
    torch.manual_seed(0)
    net, history, calls = module.run(f"{script}_kl", problem, nets[0].requires_grad_(False), args)
    reached = objective(module, net, nets[0], weight).item()
    assert optimum - 1e-4 < reached < optimum + 0.02 < history[0][2] - 0.5
    forwards = net.states + nets[0].states - 4 * 2 * 4  # less those of objective(): twice 4 steps, 2 networks, 2 states
    assert calls == forwards + 2 * 256 * 4 * 300 * (2 if script == "draft" else 1)

@pytest.mark.parametrize("script", SCRIPTS)
def test_run_is_whole_and_the_same_twice(script, tmp_path):
    module, found = load(f"toy/{script}.py"), []
    for folder in ("a", "b"):
        args = module.parse_args(["--quick", "--steps", "4", "--problem", "gmm2", "--out", str(tmp_path / folder)])
        args.size = 30, 24, 16, 200, 2
        module.main(args)
        found.append(json.loads((tmp_path / folder / "numbers.json").read_text())["rows"])
    assert (tmp_path / "a" / "figure.png").stat().st_size > 10_000 and found[0] == found[1]
    table = {(r["method"], r["quantity"]): r for r in found[0]}
    assert len(table) == len(found[0]) and {r["method"] for r in found[0]} >= {*module.METHODS, "exact", "pretrained"}
    assert table[f"{script}_kl", "objective_paths"]["exact"] == pytest.approx(2.968, abs=1e-3)
    assert all(math.isfinite(r["estimate"]) for r in found[0])
