"""sd/dav.py: its search on a chain where log Z is known, what the M-step learns, adapters, resumption, bad input.

The double has noise predictions that are linear in the latents and a linear reward: latents stay Gaussian along the
chain, and Z and E[r] of the tilted distribution are a recursion of means and variances.
"""
import json
import math
import types

import pytest
import torch
from conftest import load, planted

dav = load("sd/dav.py")
KL_WEIGHT, TINY = 0.4, "--quick --rounds 2 --prompts cat tiger --steps 2 --passes 1 --methods".split()

@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)

class Double:
    """Latents (2, 1, 1) of two prompts: eps = slope x + offset of the prompt, plus theta of the adapter."""
    abar, shape = [0.05, 0.3, 0.7, 0.99], (2, 1, 1)
    def __init__(self):
        self.slope, self.reward = torch.tensor([0.9, 0.7, 0.4]), torch.tensor([0.4, -0.3])
        self.offset, self.unet, self.on = torch.tensor([[0.2, -0.1], [-0.9, 0.8]]), self, True
        self.theta = torch.zeros(3, 2, requires_grad=True)
    def enable_adapters(self):
        self.on = True
    def disable_adapters(self):
        self.on = False
    def eps(self, x, i, number):
        return self.slope[i] * x + (self.offset[number] + self.on * self.theta[i])[..., None, None]
    def gain(self, x, number):
        return x.flatten(1) @ self.reward
    def exact(self):
        """E_p[exp(r / kl_weight)] and E_p[r exp(r / kl_weight)] over both prompts (2,)."""
        mean, var = torch.zeros(2, 2), torch.tensor(1.0)
        for i, (a, b) in enumerate(zip(self.abar, self.abar[1:])):
            sigma2 = (1 - b) / (1 - a) * (1 - a / b)
            move = (1 - b - sigma2) ** 0.5 - (b * (1 - a) / a) ** 0.5  # what the noise prediction is times
            keep = (b / a) ** 0.5 + move * self.slope[i]
            mean, var = keep * mean + move * (self.offset + self.theta[i].detach()), keep**2 * var + sigma2
        r, spread = mean @ self.reward, var * self.reward @ self.reward
        z = (r / KL_WEIGHT + spread / KL_WEIGHT**2 / 2).exp()
        return z, z * (r + spread / KL_WEIGHT)

def flags(**changes):
    return types.SimpleNamespace(**dict(steps=3, chunk=7000, kl_weight=KL_WEIGHT, discount=1.0, max_shift=0.6, passes=1,
                                        kl=0.5, prompts=["one", "two"]) | changes)

# ---- the search ------------------------------------------------------------------------------------------------------
def search(module=dav, n=20_000, seed=0, children=3, published=False, gain=None, **changes):
    torch.manual_seed(seed)
    world, number = Double(), torch.arange(n) % 2
    return world, module.search(world, gain or world.gain, number, flags(**changes), children, published)

def z_score(*args, **options):
    """Of Z and of E[r] times Z, worst over both prompts."""
    world, out = search(*args, **options)
    w, r = out["log_w"][:, 0].exp(), out["gain"][:, 0]
    errors = [v[k::2] - e[k] for v, e in zip((w, w * r), world.exact()) for k in (0, 1)]
    return max(abs(e.mean() / e.std() * len(e) ** 0.5).item() for e in errors)

@pytest.mark.parametrize("options", [dict(children=1), dict(), dict(max_shift=1e-9), dict(discount=0.5),
                                     dict(chunk=900)], ids=str)
def test_the_search_is_unbiased(options, double):
    assert z_score(**options) < 5

BUGS = {
    "mean of the children forgotten": (" - math.log(children)", ""),
    "twist of the kept one left in": (' - math.log(children) - new["log_twist"]', " - math.log(children)"),
    "half of p / q": ("(z + shift / 2)", "(z + shift)"),
    "p / q forgotten": (" - (shift * (z + shift / 2)).flatten(2).sum(2)", ""),
    "the best child": ("share.multinomial(1)", "share.argmax(1, keepdim=True)"),
    "prompts of other children": ("number.repeat_interleave(x.shape[1])", "number.repeat(x.shape[1])"),
    "kl_weight ignored": (" / args.kl_weight if", " if"),
    "a child for each tensor": ("value[pairs, chosen]", "value[pairs, share.multinomial(1)]"),
}

@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug, double):
    assert z_score(planted("sd/dav.py", BUGS[bug])) > 5

@pytest.mark.parametrize("children", [1, 3])
def test_the_elbo_is_a_lower_bound(children, double):
    """Below log Z, above E_p[r] / kl_weight, which is that of a search that finds nothing."""
    elbo = {shift: search(children=children, max_shift=shift)[1]["log_w"] for shift in (0.6, 1e-9)}
    log_z = Double().exact()[0].log().mean()
    assert all(v.mean() + 5 * v.std() / len(v) ** 0.5 < log_z for v in elbo.values())
    assert elbo[0.6].mean() > elbo[1e-9].mean() + 0.05

# ---- the M-step ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("children", [1, 2])
def test_nothing_found_is_nothing_learnt(children, double):
    """Where neither shift nor choice does anything the target is the model's own noise, to the last bit."""
    world, out = search(n=50, children=children, gain=lambda x, number: 0 * x.sum((1, 2, 3)))
    x, target = out["learn"]
    number = torch.arange(50) % 2
    own = torch.stack([world.eps(x[i], i, number) for i in range(3)]).detach()
    assert (target == own).all() and x[1:].std() > 0.1
    _, out = search(n=50, children=children, published=True, gain=lambda x, number: 0 * x.sum((1, 2, 3)))
    assert (out["learn"][1] - own).abs().min() > 1e-6  # the published one learns the noise of the path

def test_the_published_target_is_the_likelihood_of_the_step(double):
    """The kernel with the target as its noise has its mean at x_{t-1}; the squared distance is then -log p."""
    _, out = search(n=50, published=True)
    x, target = out["learn"]
    means = [dav.kernel(x[i], target[i], a, b)[0] for i, (a, b) in enumerate(zip(Double.abar, Double.abar[1:]))]
    assert (torch.stack(means) - torch.cat([x[1:], out["x"][None, :, 0]])).abs().max() < 1e-10

def test_the_target_carries_what_the_rest_of_the_path_changed(double):
    """One child, a linear world: a forecast is `factor` times the state, so that D is a sum of known shifts."""
    world, out = search(n=40, children=1)
    x, target = out["learn"]
    total, factor = torch.zeros(2), 1.0  # of the changes from a step on; of the last forecast in x, x itself
    for i, (a, b) in reversed(list(enumerate(zip(Double.abar, Double.abar[1:])))):
        sigma = dav.kernel(0, 1, a, b)[1]
        shift = sigma * world.reward * (1 - (1 - a) ** 0.5 * world.slope[i]) / a**0.5 / KL_WEIGHT  # in sigmas
        shift = shift * (0.6 / shift.norm()).clamp(max=1)
        total, factor = total + factor * sigma * shift, (1 - (1 - a) ** 0.5 * world.slope[i]) / a**0.5
        change = (world.eps(x[i], i, torch.arange(40) % 2) - target[i]).flatten(1) * ((1 - a) / a) ** 0.5
        assert (change - total).abs().max() < 1e-10 and total.norm() > 0.01

@pytest.mark.parametrize("kl", [False, True])
def test_the_m_step_is_known_in_closed_form(kl, double):
    """theta of a step goes to the mean difference of target and noise, with the KL over 1 + kl of it."""
    torch.manual_seed(1)
    world, seen = Double(), {}
    learnt, search_was = {}, dav.search
    dav.search = lambda *args: learnt.setdefault("out", search_was(*args))  # every round has the paths of the first
    optimizer = torch.optim.SGD([world.theta], 1.0)

    def step():
        i = world.theta.grad.abs().sum(1).argmax().item()  # of one step alone
        mean, sigma = dav.kernel(0, 1, world.abar[i], world.abar[i + 1])
        world.theta.grad /= (mean / sigma) ** 2 * (1.5 if kl else 1)  # Newton's step
        optimizer.step()
        optimizer.zero_grad()
        seen[i] = True

    try:
        dav.dav_update(flags(), world, world.gain, step, 500, 1, False, kl)
    finally:
        dav.search = search_was
    x, target = learnt["out"]["learn"]
    world.disable_adapters()
    for i in range(3):
        apart = (target[i] - world.eps(x[i], i, torch.arange(500) % 2)).mean(0).flatten()
        assert len(seen) == 3 and (world.theta[i] - apart / (1.5 if kl else 1)).abs().max() < 1e-10
        assert apart.abs().max() > 0.01

# ---- the whole script ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("dav")
    dav.main(dav.parse_args([*TINY, "dav", "--out", str(out)]))
    return out, json.loads((out / "numbers.json").read_text())

def test_rows_are_tidy_and_files_are_there(run):
    out, record = run
    keys = [(r["problem"], r["method"], r["quantity"]) for r in record["rows"]]
    assert len(keys) == len(set(keys)) == 4 + 2 * 2 and all(math.isfinite(r["estimate"]) for r in record["rows"])
    assert set(torch.load(out / "latents.pt")) == {"base", "search", "dav", "posterior"}
    assert int.from_bytes((out / "figure.png").read_bytes()[16:20], "big") == 900

def test_a_reward_without_a_gradient_needs_a_choice(tmp_path, double):
    with pytest.raises(dav.Refused, match="--children"):
        search(n=4, children=1, gain=lambda x, number: x.detach().sum((1, 2, 3)))
    _, out = search(n=400, children=4, gain=lambda x, number: x.detach().sum((1, 2, 3)))
    assert out["gain"].mean() > search(n=400, children=1)[1]["x"].sum((1, 2, 3, 4)).mean()
