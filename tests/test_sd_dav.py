"""sd/dav.py: the search, the M-step and whole rounds on a UNet with known answers; adapters, resumption, bad input.

The double gives the exact noise of Gaussian latents plus an offset for each time step, which is its adapter. Rewards
are linear, so that every law is Gaussian, the forecast of the search is exact, and a round is known in closed form.
z-scores are of unnormalised averages over independent populations, unbiased at any size of the population.
"""
import json
import math
import types

import pytest
import torch
from conftest import SOURCE, load, planted
from test_sd_training import GUIDANCE, LOOK, VAR, assert_one_sentence, generator, make_double

dav = load("sd/dav.py")
F = torch.float64
STEPS = 4
TINY = "--prompts cat tiger --updates 2 --batch 4 --steps 3 --images 3 --children 2 --epochs 1".split()


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(SOURCE)


# ---- a model with known answers --------------------------------------------------------------------------------------


class OffsetUNet:
    """Exact noise of latents N(mean, VAR), mean (4,) the first token; its adapter adds offset[i] at step i."""

    def __init__(self, scheduler):
        self.levels, self.on = scheduler.alphas_cumprod.double(), True
        self.step = torch.zeros(1000, dtype=torch.long)
        self.step[dav.path_schedule(scheduler, STEPS)[0]] = torch.arange(STEPS)
        self.offset = torch.zeros(STEPS, 4, dtype=F, requires_grad=True)

    def parameters(self):
        return iter([self.offset])

    def disable_adapters(self):
        self.on = False

    def enable_adapters(self):
        self.on = True

    def __call__(self, x, t, encoder_hidden_states):
        a, mean = self.levels[t][:, None, None, None], encoder_hidden_states[:, 0, :, None, None]
        eps = (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * VAR + 1 - a)
        return types.SimpleNamespace(sample=eps + self.on * self.offset[self.step[t]][:, :, None, None])


def make_world(offset=0.0):
    world = make_double()
    world.unet = OffsetUNet(world.scheduler)
    with torch.no_grad():
        world.unet.offset += offset * torch.randn(STEPS, 4, generator=generator(9), dtype=F)
    return world


def flags(**changes):
    base = dict(steps=STEPS, guidance=GUIDANCE, eta=1.0, batch=128, chunk=10_000, reward=[("one", 1.0), ("two", -0.5)],
                device="cpu", search="smc", children=4, gradient="on", max_shift=2.0, discount=1.0, kl_weight=3.0,
                epochs=1, minibatch=10**6, images=8, seed=0)
    return types.SimpleNamespace(**base | changes)


def double_script(*changes):
    """sd/dav.py, perhaps with a bug, that draws noise in float64 and does not look at images on the way."""
    script = planted("sd/dav.py", *changes)
    script.start_noise = lambda world, n, rng: torch.randn(n, *world.shape, generator=rng, dtype=F)
    script.path_noise = lambda world, args, n, rng: torch.randn(args.steps + 1, n, *world.shape, generator=rng, dtype=F)
    script.glance = lambda world, args, x, number: dict(gain=0.0)
    return script


def linear_reward(world, k):
    """The reward of flags() for prompt k in the latents: its value at zero, and its slope (4,)."""
    r = sum(w * (world.rewards[name]((0.5 + LOOK @ torch.cat([torch.zeros(1, 4), torch.eye(4)]).to(F).T).T.reshape(
        5, 3, 2, 2), k) - world.level[name][k]) / world.spread[name] for name, w in (("one", 1.0), ("two", -0.5)))
    return r[0], r[1:] - r[0]


def tilted(world, k, args):
    """log Z of exp(r / kl_weight) under the sampler for prompt k, mean (4,) of the tilted law, and E[r] there."""
    abar = dav.path_schedule(world.scheduler, STEPS)[1]
    target = world.uncond[0, 0] + GUIDANCE * (world.cond[k, 0] - world.uncond[0, 0])
    mean, var = torch.zeros(4, dtype=F), 1.0
    for i, (a, b) in enumerate(zip(abar, abar[1:])):
        sigma = ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5
        c = max(1 - b - sigma**2, 0.0) ** 0.5 - ((1 - a) * b / a) ** 0.5
        slope = (1 - a) ** 0.5 / (a * VAR + 1 - a)
        mean = (b / a) ** 0.5 * mean + c * (slope * (mean - a**0.5 * target) + world.unet.offset[i].detach())
        var = ((b / a) ** 0.5 + c * slope) ** 2 * var + sigma**2
    zero, slope = linear_reward(world, k)
    tilt = slope / args.kl_weight
    log_z = (zero / args.kl_weight + tilt @ mean + var * tilt @ tilt / 2).item()
    return log_z, mean + var * tilt, (zero + slope @ (mean + var * tilt)).item()


# ---- the search ------------------------------------------------------------------------------------------------------


def z_scores(script, populations=64, n=64, **changes):
    """z of Z, of the means of x_0 and of E[r] over independent populations, for the second prompt."""
    args, world, rng, rows = flags(**changes), make_world(offset=0.1), generator(4), []
    log_z, mean, reward = tilted(world, 1, args)
    zero, slope = linear_reward(world, 1)
    for _ in range(populations):
        out = script.e_step(world, args, 1, n, rng)
        w, z, x = out["log_w"].softmax(0), math.exp(min(out["log_z"] - log_z, 50)), out["x"].flatten(1)
        rows.append([z - 1, *(z * (w @ x - mean)), z * (w @ (zero + x @ slope) - reward)])
    rows = torch.tensor(rows, dtype=F)
    return (rows.mean(0) / rows.std(0) * len(rows) ** 0.5).abs().max().item(), out


@pytest.mark.parametrize("kind", ["smc", "nested"])
@pytest.mark.parametrize("gradient", ["on", "off"])
def test_search_is_unbiased(kind, gradient, monkeypatch):
    z, out = z_scores(double_script(("discount=1.0, max_shift=0.5, ess=0.5", "discount=1.0, max_shift=0.5, ess=0.999")),
                      search=kind, gradient=gradient)
    assert any(len(set(step["chosen"].tolist())) < 64 for step in out["steps"]), "resampling must happen"
    assert z <= 5


SEARCH_BUGS = {
    "log ratio averaged": ("on", ("-(shift * z).flatten(1).sum(1) - 0.5 * (shift**2).flatten(1).sum(1)",
                                  "-(shift * z).flatten(1).mean(1) - 0.5 * (shift**2).flatten(1).mean(1)")),
    "x0_hat not gathered": ("off", ("        state = gather(child, chosen)\n",
                                    "        state = gather(child, chosen)\n"
                                    "        state |= {k: child[k][first_child] for k in child if k == 'x0_hat'}\n")),
    "weights inverted": ("off", ("log_v = (ratio + reach * child", "log_v = (ratio - reach * child")),
    "no proposal correction": ("on", ("log_v = (ratio + reach", "log_v = (0 * ratio + reach")),
    "value of the parent not taken out": ("off", ('state["log_w"] - state["value"] + log_mean',
                                                  'state["log_w"] + log_mean')),
    "reward temperature ignored": ("off", ("x.shape[:1]).detach() / args.kl_weight)", "x.shape[:1]).detach())")),
    "first prompt for all": ("off", ("prompted(world, args, [k]), reward if", "prompted(world, args, [0]), reward if")),
    "noise of another step": ("off", ("reward, x, timesteps[i], abar[i]", "reward, x, timesteps[i - 1], abar[i]")),
    "adapter off in the search": ("off", ("latent_foresight(prompted(world, args, [k]), reward if", "latent_foresight("
                                          "without_adapter(world.unet, prompted(world, args, [k])), reward if")),
}


@pytest.mark.parametrize("bug", SEARCH_BUGS)
def test_planted_bug_in_the_search_is_caught(bug):
    gradient, change = SEARCH_BUGS[bug]
    resampling = ("discount=1.0, max_shift=0.5, ess=0.5", "discount=1.0, max_shift=0.5, ess=0.999")
    assert not z_scores(double_script(change, resampling), gradient=gradient)[0] <= 5


def test_local_choice_tends_to_the_exact_law():
    """The forecast is exact here: the error of the mean falls with the number of children, without bias left."""
    world, script = make_world(), double_script()

    def error(n, **changes):
        args = flags(search="local", gradient="off", **changes)
        return (script.e_step(world, args, 0, n, generator(2))["x"].flatten(1).mean(0)
                - tilted(world, 0, args)[1]).norm().item()

    few, some, many = (error(400_000 // m, children=m) for m in (1, 4, 64))
    assert few > 2 * some > 4 * many


@pytest.mark.parametrize("discount", [1.0, 0.7])
def test_discount(discount):
    """The optimum: a child's value is discounted once a step, the first state's once more; the last not at all."""
    world, args = make_world(), flags(discount=discount, kl_weight=1.5)
    abar = dav.path_schedule(world.scheduler, STEPS)[1]
    target = world.uncond[0, 0] + GUIDANCE * (world.cond[0, 0] - world.uncond[0, 0])
    tilt, look = linear_reward(world, 0)[1] / args.kl_weight, []
    for a in abar:  # x0_hat = look x + const
        look.append((1 - (1 - a) / (a * VAR + 1 - a)) / a**0.5)
    look[-1] = 1.0  # the reward is that of the result, noisy as it is
    mean = discount**STEPS * look[0] * tilt
    for i, (a, b) in enumerate(zip(abar, abar[1:])):
        sigma = ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5
        c = max(1 - b - sigma**2, 0.0) ** 0.5 - ((1 - a) * b / a) ** 0.5
        mean = (b / a) ** 0.5 * mean + c * (1 - a) ** 0.5 / (a * VAR + 1 - a) * (mean - a**0.5 * target)
        mean = mean + sigma**2 * discount ** (STEPS - i - 1) * look[i + 1] * tilt

    def z(script):
        rows = []
        for seed in range(64):
            out = script.e_step(world, args, 0, 64, generator(seed))
            rows.append(math.exp(out["log_z"] - 5) * (out["log_w"].softmax(0) @ out["x"].flatten(1) - mean))
        rows = torch.stack(rows)
        return (rows.mean(0) / rows.std(0) * 8).abs().max().item()

    assert z(double_script()) <= 5
    if discount < 1:
        for change in (("args.discount ** (steps - i - 1) * state[name]", "args.discount ** (steps - i) * state[name]"),
                       ("        reach = discount if i + 1 < steps else 1.0\n", "        reach = discount\n")):
            assert z(double_script(change)) > 5


ACCUMULATED = (  # the value of a state is the sum over its visits, and the best one is the next
    "        chosen = first_child + invert_cdf(log_v.double().softmax(1), u)[:, 0]\n",
    "        drawn = invert_cdf(log_v.double().softmax(1), u)\n"
    "        visited = log_v.scatter_add(1, drawn, log_v.gather(1, drawn))\n"
    "        chosen = first_child + visited.argmax(1)\n")


@pytest.mark.parametrize("kind", ["local", "smc", "nested"])
@pytest.mark.parametrize("gradient", ["on", "off"])
def test_a_constant_in_the_reward_changes_nothing(kind, gradient):
    """r - 100, negative everywhere, finds the same paths and the same pulls from the same seed."""
    def found(script, constant):
        world, args = make_world(offset=0.1), flags(search=kind, gradient=gradient)
        world.level["one"] = world.level["one"] + constant * world.spread["one"]
        out = script.e_step(world, args, 0, 30, generator(3))
        return out, script.steady_transitions(out, dav.path_schedule(world.scheduler, STEPS)[1], args)[3]

    script = double_script()
    (same, pull), (moved, other) = found(script, 0.0), found(script, 100.0)
    assert (same["x"] - moved["x"]).abs().max() < 1e-9 and (pull - other).abs().max() < 1e-8
    assert (same["log_w"].softmax(0) - moved["log_w"].softmax(0)).abs().max() < 1e-9
    assert abs(same["elbo"] - moved["elbo"] - 100 / 3) < 1e-8
    if kind == "local":
        bug = double_script(ACCUMULATED)
        assert (found(bug, -100.0)[0]["x"] - found(bug, 100.0)[0]["x"]).abs().max() > 1e-3


def test_without_the_search_it_is_the_plain_sampler():
    world, args, script = make_world(offset=0.1), flags(children=3), double_script()
    out = script.e_step(world, args, 1, 6, generator(5), searching=False)
    rng = generator(5)
    noise = [torch.randn(6, 4, 1, 1, generator=rng, dtype=F)]
    for _ in range(STEPS):
        noise.append(torch.randn(6, 4, 1, 1, generator=rng, dtype=F))
        torch.rand(6, 1, generator=rng, dtype=F)  # of the choice
    with torch.no_grad():
        x, _ = script.roll_out(script.prompted(world, args, [1]), None, torch.stack(noise),
                               *script.path_schedule(world.scheduler, STEPS))
    zero, slope = linear_reward(world, 1)
    assert (x - out["x"]).abs().max() < 1e-12
    assert abs((zero + x.flatten(1) @ slope).mean().item() / args.kl_weight - out["elbo"]) < 1e-10


def test_elbo_is_a_lower_bound_and_the_search_raises_it():
    world, script = make_world(), double_script()
    for kind in ("local", "smc", "nested"):
        args = flags(search=kind, gradient="off")
        elbo = torch.tensor([script.e_step(world, args, 0, 32, generator(s))["elbo"] for s in range(30)])
        plain = torch.tensor([script.e_step(world, args, 0, 32, generator(s), False)["elbo"] for s in range(30)])
        se = elbo.std().item() / 30**0.5
        assert plain.mean() + 3 * se < elbo.mean() < tilted(world, 0, args)[0] + 3 * se


def test_chunks_do_not_change_the_search():
    world, script, outs = make_world(offset=0.1), double_script(), []
    for chunk in (7, 1000):
        outs.append(script.e_step(world, flags(search="nested", chunk=chunk), 0, 10, generator(6)))
    for name in ("x", "log_w"):
        torch.testing.assert_close(outs[0][name], outs[1][name], rtol=0, atol=1e-10)


# ---- what the M-step learns ------------------------------------------------------------------------------------------


def pulls(script, world, args, n, rng):
    """The steady pull of one population, that of `transitions` as it is, their weights and states."""
    out = script.e_step(world, args, 0, n, rng)
    abar = script.path_schedule(world.scheduler, STEPS)[1]
    x, _, weight, pull = script.steady_transitions(out, abar, args)
    return pull, script.transitions(out, recentre=False)[3], weight, x


def steady_z(script, kind, gradient="on"):
    """z of the difference of the pulls, alone and times the state, and the noise that is left, of what there was.

    The reward is curved, so that states differ in their gradients.
    """
    world, args, rng, rows, left = make_world(offset=0.1), flags(search=kind, gradient=gradient), generator(2), [], []
    world.rewards["two"] = lambda images, number: 200 * ((images - 0.5) ** 2).mean((1, 2, 3))
    for _ in range(400):
        steady, plain, _, x = pulls(script, world, args, 32, rng)
        change = steady - plain
        rows.append(torch.cat([change.mean(1).flatten(), (change * x.flatten(2)).mean(1).flatten()]))
        left.append((steady.var() / plain.var()).item())
    rows = torch.stack(rows)
    return (rows.mean(0) / rows.std(0) * len(rows) ** 0.5).abs().max().item(), sum(left) / len(left)


@pytest.mark.parametrize("kind, most", [("local", 0.35), ("smc", 0.75), ("nested", 0.9)])
@pytest.mark.parametrize("gradient", ["on", "off"])
def test_steady_pulls_have_the_same_mean_and_less_noise(kind, most, gradient):
    z, left = steady_z(double_script(), kind, gradient)
    assert z <= 5 and left < most


STEADY_BUGS = {
    "shift forgotten": ("smc", ("pull[i] -= noise.mean(1)", 'pull[i] -= step["z"].mean(1)')),
    "choice without the ratio": ("local", ("share = (ratio + reach", "share = (0 * ratio + reach")),
    "value of the parents, not of the children": ("local", ('reach * out["seen"][i + 1]["value"].view(n, children)',
                                                            'out["seen"][i]["value"][parents][:, None]')),
}


@pytest.mark.parametrize("bug", STEADY_BUGS)
def test_planted_bug_in_the_pulls_is_caught(bug):
    kind, change = STEADY_BUGS[bug]
    assert steady_z(double_script(change), kind)[0] > 5


def noise_taken_out(script, kind):
    """How far what is taken out of the pulls is from the noise of the children, with the gradient computed anew."""
    world, args = make_world(offset=0.1), flags(search=kind)
    world.rewards["two"] = lambda images, number: 200 * ((images - 0.5) ** 2).mean((1, 2, 3))
    out, wrong = script.e_step(world, args, 0, 20, generator(1)), 0.0
    timesteps, abar = script.path_schedule(world.scheduler, STEPS)
    left = script.transitions(out, recentre=False)[3] - script.steady_transitions(out, abar, args)[3]
    for i, step in enumerate(out["steps"]):
        x = step["x"].clone().requires_grad_()
        eps = script.prompted(world, args, [0])(x, timesteps[i])
        images = world.decode((x - (1 - abar[i]) ** 0.5 * eps) / abar[i] ** 0.5)
        r = script.gains(world, images, torch.zeros(20, dtype=torch.long))
        (grad,) = torch.autograd.grad((r["one"] - 0.5 * r["two"]).sum() / args.kl_weight, x)
        sigma = script.ddim_kernel(0.0, 0.0, abar[i], abar[i + 1], 1.0)[1]
        shift = script.guide(grad, sigma, torch.ones(20, dtype=F), args.max_shift).flatten(1)
        wrong = max(wrong, (left[i] - step["z"].mean(1) + shift).abs().max().item())
    return wrong


@pytest.mark.parametrize("kind", ["smc", "nested"])
def test_what_is_taken_out_is_the_noise_of_the_children(kind):
    assert noise_taken_out(double_script(), kind) < 1e-10
    for change in (('        parents = step["chosen"]\n', "        parents = torch.arange(n) * children\n"),
                   ("pull[i] -= noise.mean(1)", 'pull[i] -= step["z"].mean(1)')):
        assert kind == "smc" or noise_taken_out(double_script(change), kind) > 1e-3  # without siblings all follow


@pytest.mark.parametrize("kind", ["local", "smc"])
@pytest.mark.parametrize("kl", [0.0, 0.5])
def test_a_round_without_reward_is_the_identity(kind, kl):
    """No pull at all, and no gradient at the base model, with the KL or without."""
    nothing = [("one", 0.0), ("two", 0.0)]
    world, args, script = make_world(), flags(search=kind, reward=nothing), double_script()
    steady, plain, _, _ = pulls(script, world, args, 20, generator(1))
    assert steady.abs().max() < 1e-12 < plain.abs().max()
    script.dav_update(world, flags(search=kind, reward=nothing, batch=8), kl)(generator(), lambda: None, {})
    assert world.unet.offset.grad.abs().max() < 1e-10


def test_a_nested_round_without_reward_is_the_identity_in_expectation():
    world, script, found = make_world(), double_script(), []
    args = flags(search="nested", reward=[("one", 0.0), ("two", 0.0)], batch=32)
    for seed in range(50):
        world.unet.offset.grad = None
        script.dav_update(world, args, 0.0)(generator(seed), lambda: None, {})
        found.append(world.unet.offset.grad.flatten())
    found = torch.stack(found)
    assert (found.mean(0) / found.std(0) * 50**0.5).abs().max() <= 5


# ---- the M-step ------------------------------------------------------------------------------------------------------


def paths_of(script, world, args, n=60):
    """Paths of both prompts as dav_update joins them, with the pulls of their chosen children as they are."""
    outs = [script.e_step(world, args, k, n, generator(k)) for k in (0, 1)]
    x, eps, weight, pull = (torch.cat(v, 1) for v in zip(*(script.transitions(out, recentre=False) for out in outs)))
    return outs, types.SimpleNamespace(x=x, eps=eps, weight=weight, pull=pull,
                                       number=torch.tensor([0, 1]).repeat_interleave(n))


def optimal_offset(world, args, outs, kl):
    """The offsets that put each kernel's mean at (E[x_{t-1}] + kl mean_0) / (1 + kl), from the paths themselves.

    mean_0 is linear in the offset, c offset above that of the base model; E is over descendants, counted by weight.
    """
    timesteps, abar = dav.path_schedule(world.scheduler, STEPS)
    best = torch.zeros(STEPS, 4, dtype=F)
    for i, (a, b) in enumerate(zip(abar, abar[1:])):
        sigma = ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5
        c, above, total = max(1 - b - sigma**2, 0.0) ** 0.5 - ((1 - a) * b / a) ** 0.5, 0, 0
        for k, out in enumerate(outs):
            states = [step["x"] for step in out["steps"]] + [out["x"]]
            alive = torch.arange(len(out["x"]))
            for step in out["steps"][:i:-1]:  # of each survivor, the ancestor after step i
                alive = step["chosen"][alive]
            parent = out["steps"][i]["chosen"][alive]  # one child each
            w = out["log_w"].softmax(0)
            world.unet.on = False
            with torch.no_grad():
                eps = dav.prompted(world, args, [k])(states[i][parent], timesteps[i])
            world.unet.on = True
            mean, _ = dav.ddim_kernel((states[i][parent] - (1 - a) ** 0.5 * eps) / a**0.5, eps, a, b, 1.0)
            above, total = above + w @ (states[i + 1][alive] - mean).flatten(1), total + w.sum()
        best[i] = above / total / (1 + kl) / c
    return best


def gradient_at_the_optimum(script, kl, **changes):
    """Of `learn` at the optimum of its loss, of what it is at zero: zero if and only if that is the optimum."""
    world, args = make_world(offset=0.1), flags(**changes)
    outs, paths = paths_of(double_script(), world, args)
    sizes = []
    for offset in (optimal_offset(world, args, outs, kl), torch.zeros(STEPS, 4, dtype=F)):
        with torch.no_grad():
            world.unet.offset.copy_(offset)
        world.unet.offset.grad = None
        script.learn(world, args, paths, kl, generator(), lambda: None)
        sizes.append(world.unet.offset.grad.clone())
    return (sizes[0].abs() / sizes[1].abs().amax(1, keepdim=True)).max().item()


@pytest.mark.parametrize("kl", [0.0, 0.5])
def test_m_step_finds_the_mean_between_found_and_base(kl):
    assert gradient_at_the_optimum(dav, kl) < 1e-10
    assert gradient_at_the_optimum(dav, kl, minibatch=7, chunk=3) < 0.3  # the sum of unequal parts: the last is smaller


M_BUGS = {
    "KL from itself": ("anchor = without_adapter(world.unet, policy)(x", "anchor = policy(x"),
    "KL not halved": ("(move[t] * (eps - anchor).flatten(1)).pow(2).sum(1) / 2",
                      "(move[t] * (eps - anchor).flatten(1)).pow(2).sum(1)"),
    "KL as an error of the noise": ("(move[t] * (eps - anchor).flatten(1)).pow(2).sum(1) / 2",
                                    "(eps - anchor).flatten(1).pow(2).mean(1)"),
    "mean instead of sum of log-probabilities": ("w * d.pow(2).sum(1) / 2 -", "w * d.pow(2).mean(1) / 2 -"),
    "pull of the wrong sign": ("/ 2 - (paths.pull[t, j] * d)", "/ 2 + (paths.pull[t, j] * d)"),
    "noise of another path": ("(eps - paths.eps[t, j])", "(eps - paths.eps[t, j - 1])"),
    "first prompt for all": ("prompted(world, args, paths.number[j])", "prompted(world, args, 0 * paths.number[j])"),
    "steps not told apart": ("policy(x, times[t])", "policy(x, times[0 * t])"),
}


@pytest.mark.parametrize("bug", M_BUGS)
def test_planted_bug_in_the_m_step_is_caught(bug):
    assert not gradient_at_the_optimum(planted("sd/dav.py", M_BUGS[bug]), 0.5) < 1e-3


def learned_gradient(script, **changes):
    world, args = make_world(offset=0.1), flags(**changes)
    _, paths = paths_of(double_script(), world, args, 10)
    with torch.no_grad():
        world.unet.offset += 0.1
    loss = script.learn(world, args, paths, 0.5, generator(), lambda: None)
    return torch.cat([world.unet.offset.grad.flatten(), torch.tensor([loss], dtype=F)])


def test_chunks_do_not_change_the_m_step():
    whole = learned_gradient(dav)
    assert (learned_gradient(dav, chunk=7) - whole).abs().max() < 1e-10 * whole.abs().max()
    bug = planted("sd/dav.py", ("(loss.sum() * steps / len(part)).backward()", "(loss.mean() * steps).backward()"))
    assert (learned_gradient(bug, chunk=7) - whole).abs().max() > 0.1 * whole.abs().max()


# ---- whole rounds ----------------------------------------------------------------------------------------------------


def rounds_on_the_double(script, kl, rounds=3, **changes):
    """Offsets (T, 4) after some rounds, every M-step solved by one exact Newton step; and what one round alone adds,

    with very many children: sigma times the slope of the forecast at the child, whatever the state.
    """
    world = make_world()
    args = flags(search="local", batch=32, children=1000, **changes)
    _, abar = dav.path_schedule(world.scheduler, STEPS)
    move = torch.tensor(dav.mean_per_noise(abar), dtype=F)[:, None]

    def newton():
        with torch.no_grad():
            world.unet.offset -= world.unet.offset.grad / ((1 + kl) * move**2)
        world.unet.offset.grad = None

    update = script.dav_update(world, args, kl)
    for _ in range(rounds):
        update(generator(), newton, {})
    tilt, added = sum(linear_reward(world, k)[1] for k in (0, 1)) / 2 / args.kl_weight, []
    for i, (a, b) in enumerate(zip(abar, abar[1:])):
        sigma = ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5
        look = 1.0 if i + 1 == STEPS else (1 - (1 - b) / (b * VAR + 1 - b)) / b**0.5  # x0_hat = look x + const
        added.append(sigma * look * tilt / move[i])
    return world.unet.offset.detach(), torch.stack(added)


@pytest.mark.parametrize("kl", [0.0, 0.4])
def test_rounds_add_up(kl):
    """Each round adds the same to the drift; with the KL the sum is divided by 1 + kl each time: limit 1 / kl."""
    for rounds in (1, 4):
        offset, added = rounds_on_the_double(double_script(), kl, rounds)
        factor = sum((1 + kl) ** -j for j in range(1, rounds + 1))
        assert (offset - factor * added).norm() < 0.03 * (factor * added).norm()
    if kl:  # the M-step of a model that forgot the base model would go on
        bug = double_script(("anchor = without_adapter(world.unet, policy)(x", "anchor = policy(x"))
        assert (rounds_on_the_double(bug, kl, 4)[0] - factor * added).norm() > 0.1 * (factor * added).norm()


# ---- adapters and whole runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run -> folder of results, numbers, its words."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(SOURCE)
        out = tmp_path_factory.mktemp("out")
        words = [*TINY, "--out", str(out)]
        return out / "sd_dav", dav.main(dav.parse_args(words)), words


def test_short_run(finished):
    folder, numbers, _ = finished
    assert all(math.isfinite(value) for value in numbers.values())
    assert (folder / "figure.png").stat().st_size > 10_000
    record = json.loads((folder / "numbers.json").read_text())
    assert [r["name"] for r in record["rows"]] == list(numbers) and record["args"]["gradient"] == "on"
    assert numbers["dav.all.kl"] > 0 and numbers["base.all.diversity_kept"] == 1
    assert numbers["search.step_003.strength"] == 10.0 and "search.step_004.strength" not in numbers
    paths = 4 * (1 + 2 * 2)  # of an E-step; at the end of a path there is no prediction
    rounds = 2 * (3 * 4 * 3 + 2 * paths + 4 * 3 + 3 * 4 * 3 + 4 * 3)  # looks, searches, own paths, M-steps, base
    images = 6 * (3 * (1 + 2 * 3) + 2 * (1 + 2 * 2))
    assert record["network_evaluations"] == 2 * (rounds + images)


def test_an_interrupted_run_gives_the_same_bytes(finished, tmp_path, monkeypatch):
    folder, numbers, words = finished
    words, calls, real = [*words[:-1], str(tmp_path)], [], dav.learn

    def interrupted(*values):
        calls.append(1)
        if len(calls) == 4:  # the second round of the second method
            raise KeyboardInterrupt
        return real(*values)

    monkeypatch.setattr(dav, "learn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dav.main(dav.parse_args(words))
    monkeypatch.setattr(dav, "learn", real)
    resumed = dav.main(dav.parse_args([*words, "--resume"]))
    assert all(resumed.pop(k) == v for k, v in numbers.items() if not k.endswith(".seconds"))
    assert all(k.endswith(".seconds") for k in resumed)
    for file in [*folder.glob("*/*.safetensors"), folder / "figure.png"]:
        assert file.read_bytes() == (tmp_path / "sd_dav" / file.relative_to(folder)).read_bytes()


def test_plain_diffusers_loads_the_adapters(finished):
    from diffusers import StableDiffusionPipeline
    plain = StableDiffusionPipeline.from_pretrained(SOURCE / "sd/mini", safety_checker=None)
    x, cond = torch.randn(2, 4, 8, 8, generator=generator()), torch.randn(2, 16, 64, generator=generator(1))
    with torch.no_grad():
        before = plain.unet(x, 501, cond).sample
        plain.load_lora_weights(finished[0] / "dav")
        loaded = plain.unet(x, 501, cond).sample
        own = dav.load_pipeline(SOURCE / "sd/mini")
        average = torch.load(finished[0] / "dav.pt", weights_only=True)["average"]
        for key, value in dav.fresh_adapter(own.unet, 4, generator()).items():
            value.copy_(average[key])
        torch.testing.assert_close(own.unet(x, 501, cond).sample, loaded, rtol=0, atol=1e-6)
    assert (before - loaded).abs().max() > 1e-5


@pytest.mark.parametrize("sign", ["1", "-1"])
def test_jpeg_up_and_down(sign):
    """A reward without gradient, of either sign, all of it below zero or above: the search raises it."""
    args = dav.parse_args(["--prompts", "cat", "--reward", f"jpeg={sign}", "--steps", "3", "--batch", "8", "--children",
                           "4", "--kl-weight", "0.2"])
    world = dav.load_world(args)
    world.level, world.spread = {"jpeg": torch.zeros(1)}, {"jpeg": 0.1}
    found = {}
    for args.kl_weight in (0.2, 1e6):  # the second chooses at random
        found[args.kl_weight] = dav.jpeg_reward(world.decode(dav.e_step(world, args, 0, 16, generator())["x"])).mean()
    assert args.gradient == "off" and float(sign) * (found[0.2] - found[1e6]) > 0.01  # kB, of a spread of 0.05


def test_chunks_on_the_miniature():
    args = dav.parse_args([*TINY, "--chunk", "3"])
    world, outs = dav.load_world(args), []
    world.level, world.spread = {"clip": torch.zeros(2)}, {"clip": 0.1}
    for args.chunk in (3, 64):
        outs.append(dav.e_step(world, args, 1, 4, generator()))
    torch.testing.assert_close(outs[0]["x"], outs[1]["x"], rtol=1e-3, atol=1e-3)


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words, sentence", [
    ("--reward jpeg --gradient on", "jpeg has no gradient"),
    ("--batch 6", "--batch must give each"),
    ("--batch 4", "2 or more"),
    ("--discount 1.5", "--discount can be at most 1"),
    ("--eta 0.5", "--eta 1"),
    ("--steps 1", "--steps must be at least 2"),
    ("--children 0", "above zero"),
    ("--search best", "invalid choice"),
    ("--kl -1", "above zero"),
    ("--kl-weight nan", "above zero"),
    ("--images 1", "at least 2"),
    ("--reward beauty", "no reward 'beauty'"),
    ("--device cuda:77", "no device of this machine"),
])
def test_bad_flags(words, sentence, capsys):
    with pytest.raises(SystemExit) as end:
        dav.parse_args(words.split())
    assert_one_sentence(end, capsys, sentence)


def test_bad_input(capsys, finished, tmp_path):
    with pytest.raises(SystemExit) as end:
        dav.main(dav.parse_args(["--model", str(tmp_path / "none"), "--out", str(tmp_path)]))
    assert_one_sentence(end, capsys, "no Stable Diffusion model")
    with pytest.raises(SystemExit) as end:
        dav.main(dav.parse_args([*finished[2], "--resume", "--kl-weight", "0.7"]))
    assert "trained with other settings" in capsys.readouterr().err and end.value.code == 2
    world, args = make_world(), flags()
    world.rewards = dict(world.rewards, one=lambda images, number: torch.full((len(images),), math.nan))
    with pytest.raises(SystemExit) as end:
        double_script().e_step(world, args, 0, 4, generator())
    assert_one_sentence(end, capsys, "finite")
    world.rewards["one"] = lambda images, number: images.detach().mean((1, 2, 3))
    world.rewards["two"] = world.rewards["one"]
    with pytest.raises(SystemExit) as end:
        double_script().e_step(world, args, 0, 4, generator())
    assert_one_sentence(end, capsys, "no gradient")
