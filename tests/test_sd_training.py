"""sd/draft.py, ddpo.py and constrained_alignment.py: gradients and KL against known answers, adapters, resumption.

A double with the call signature of the UNet gives the exact noise of Gaussian latents; its adapter changes the noise to
(1 + stretch) noise + shift. Then every step is linear, x stays Gaussian, and rewards, KL and their gradients follow
from the means and variances, propagated here with the coefficients of the DDIM kernel.
"""
import argparse
import json
import math
import types

import pytest
import torch
from conftest import SOURCE, load, planted

draft, ddpo, ali = (load(f"sd/{name}.py") for name in ("draft", "ddpo", "constrained_alignment"))
F = torch.float64
MINI = SOURCE / "sd/mini"
STEPS, GUIDANCE, VAR = 4, 2.0, 0.6
TINY = "--prompts cat tiger --updates 4 --batch 4 --steps 3 --images 3".split()


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(SOURCE)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_one_sentence(end, capsys, words):
    text = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(text) == 1 and words in text[0], text


# ---- a model with known answers --------------------------------------------------------------------------------------


class GaussianUNet:
    """Exact noise of latents N(mean, VAR), the mean (4,) being the first token of the prompt; calls as of a UNet."""

    def __init__(self, levels, stretch=0.1, shift=(0.1, -0.2, 0.05, 0.15)):
        self.levels, self.on = levels, True
        self.stretch = torch.tensor(stretch, dtype=F, requires_grad=True)
        self.shift = torch.tensor(shift, dtype=F, requires_grad=True)

    def parameters(self):
        return iter([self.shift])

    def disable_adapters(self):
        self.on = False

    def enable_adapters(self):
        self.on = True

    def __call__(self, x, t, encoder_hidden_states):
        a, mean = self.levels[t][:, None, None, None], encoder_hidden_states[:, 0, :, None, None]
        eps = (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * VAR + 1 - a)
        if self.on:
            eps = (1 + self.stretch) * eps + self.shift[:, None, None]
        return types.SimpleNamespace(sample=eps)


LOOK = 0.02 * torch.randn(12, 4, generator=generator(1), dtype=F)  # pixels of a latent


def make_double(**adapter):
    """A world of two prompts: latents (4, 1, 1), images (3, 2, 2) around 0.5, rewards linear in the pixels."""
    from diffusers import DDIMScheduler
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
                              steps_offset=1)
    rewards = {"one": lambda images, number: 5 * images[:, 0].mean((1, 2)) - 2 * images[:, 2, 0, 0],
               "two": lambda images, number: 4 * images[:, 1, 0, 1] - images[:, 0, 1, 0]}
    return types.SimpleNamespace(
        unet=GaussianUNet(scheduler.alphas_cumprod.double(), **adapter), scheduler=scheduler, rewards=rewards,
        decode=lambda x: (0.5 + (x.flatten(1) @ LOOK.T).view(-1, 3, 2, 2)).clamp(0, 1), shape=(4, 1, 1),
        cond=torch.tensor([[[0.5, -0.3, 0.2, 0.1]], [[-0.4, 0.3, 0.6, -0.2]]], dtype=F),
        uncond=torch.tensor([[[0.1, 0.1, -0.2, 0.0]]], dtype=F),
        level={"one": torch.tensor([1.5, 1.4], dtype=F), "two": torch.tensor([1.5, 1.6], dtype=F)},
        spread={"one": 0.1, "two": 0.08})


def exact(world, weights, back=STEPS):
    """Mean over prompts of the gain with these weights {name: weight}, and of the KL, with a gradient.

    It runs through x in the last `back` steps; before, the distribution of x is cut off.
    """
    timesteps, abar = draft.path_schedule(world.scheduler, STEPS)
    gain, kl, unet = 0, 0, world.unet
    for k, cond in enumerate(world.cond):
        target = world.uncond[0, 0] + GUIDANCE * (cond[0] - world.uncond[0, 0])
        mean, var = torch.zeros(4, dtype=F), torch.ones((), dtype=F)
        for i, (a, b) in enumerate(zip(abar, abar[1:])):
            if i <= STEPS - back:
                mean, var = mean.detach(), var.detach()
            sigma = ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5
            c = max(1 - b - sigma**2, 0.0) ** 0.5 - ((1 - a) * b / a) ** 0.5  # what the noise prediction is times
            slope = (1 - a) ** 0.5 / (a * VAR + 1 - a)
            eps = slope * (mean - a**0.5 * target)  # of the base model, in the mean; its variance is slope^2 var
            square = ((unet.stretch * eps + unet.shift) ** 2).sum() + 4 * (unet.stretch * slope) ** 2 * var
            kl = kl + c**2 / (2 * sigma**2) * square / 2
            mean = (b / a) ** 0.5 * mean + c * ((1 + unet.stretch) * eps + unet.shift)
            var = ((b / a) ** 0.5 + c * (1 + unet.stretch) * slope) ** 2 * var + sigma**2
        images = (0.5 + LOOK @ mean).view(1, 3, 2, 2)
        for name, weight in weights.items():
            gain = gain + weight * (world.rewards[name](images, k)[0] - world.level[name][k]) / world.spread[name] / 2
    return gain, kl


def gradient(value, unet):
    """d value / d (stretch, shift) (5,)."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, [unet.stretch, unet.shift])])


def flags(**changes):
    """Arguments of the update functions."""
    base = dict(steps=STEPS, guidance=GUIDANCE, eta=1.0, batch=200, chunk=1000, reward=[("one", 1.0), ("two", -0.5)],
                minibatches=1, fraction=1.0, per_prompt=100, clip_range=0.2, dual="ascent", dual_lr=0.1,
                device="cpu")
    return argparse.Namespace(**base | changes)


@pytest.fixture(autouse=True, scope="module")
def noise_in_float64():
    """The double's noise in float64, where the scripts draw float32."""
    with pytest.MonkeyPatch.context() as patch:
        for script in (draft, ddpo, ali):
            patch.setattr(script, "path_noise", double_noise)
        yield


real_noise = draft.path_noise


def double_noise(world, args, n, rng):
    noise = real_noise(world, args, n, rng)
    return noise.double() if isinstance(world.unet, GaussianUNet) else noise


def gradients(update, world, groups):
    """The gradients that an update leaves, of independent batches (groups, 5), and its traces."""
    found, traces, rng, unet = [], [], generator(3), world.unet

    def take():
        found.append(torch.cat([unet.stretch.grad.view(1), unet.shift.grad]))
        unet.stretch.grad = unet.shift.grad = None

    for _ in range(groups):
        traces.append(update(rng, take, {}))
    return torch.stack(found), traces


def z_score(values, truth):
    """Independent values (groups, ...) against their exact mean -> the largest |z|."""
    se = (values.std(0) / len(values) ** 0.5).clamp(min=1e-10)
    return ((values.mean(0) - truth).abs() / se).max().item()


# ---- the KL ----------------------------------------------------------------------------------------------------------


def rolled(script, world, n=4000, **options):
    args, number = flags(), torch.tensor([0, 1]).repeat_interleave(n // 2)
    policy = script.prompted(world, args, number)
    base = script.without_adapter(world.unet, policy)
    noise = torch.randn(STEPS + 1, n, 4, 1, 1, generator=generator(5), dtype=F)
    return script.roll_out(policy, base, noise, *script.path_schedule(world.scheduler, STEPS), **options)


def test_kl_of_a_shift_is_that_of_lemma_1():
    """Without stretch the KL is a number: sum_t beta_t^2 / (2 sigma_t^2) |s_p - s_q|^2, in the scores of the paper."""
    world, truth = make_double(stretch=0.0), 0.0
    _, abar = draft.path_schedule(world.scheduler, STEPS)
    for a, b in zip(abar, abar[1:]):
        sigma = ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5
        beta = (b / a) ** 0.5 * (1 - a) - ((1 - b - sigma**2) * (1 - a)) ** 0.5
        truth += beta**2 / (2 * sigma**2) * (world.unet.shift**2).sum().item() / (1 - a)  # score: -eps / sqrt(1 - a)
    kl = rolled(draft, world, 6)[1]
    assert (kl / truth - 1).abs().max() < 1e-10
    assert exact(world, {"one": 1.0})[1].item() == pytest.approx(truth, rel=1e-10)


def test_kl_and_samples():
    world = make_double()
    with torch.no_grad():
        x, kl = rolled(draft, world)
        gain, truth = exact(world, {"one": 1.0})
        number = torch.tensor([0, 1]).repeat_interleave(2000)
        r = draft.gains(world, world.decode(x), number)["one"]
    assert z_score(kl.view(2, 40, 50).mean((0, 2)), truth) < 5
    assert z_score(r.view(2, 40, 50).mean((0, 2)), gain) < 5
    with torch.no_grad():
        alone = draft.roll_out(draft.prompted(world, flags(), [0]), None, torch.zeros(5, 1, 4, 1, 1, dtype=F),
                               *draft.path_schedule(world.scheduler, STEPS))
    assert alone[1].tolist() == [0]


# ---- direct back-propagation -----------------------------------------------------------------------------------------


def draft_z(script, back, kl_weight, **changes):
    world, args = make_double(), flags(**changes)
    found, _ = gradients(script.draft_update(world, args, kl_weight, back), world, 40)
    gain, kl = exact(world, dict(args.reward), back)
    return z_score(found, gradient(kl_weight * kl - gain, world.unet))


@pytest.mark.parametrize("back", [1, 2, STEPS])
@pytest.mark.parametrize("kl_weight", [0.0, 0.7])
def test_draft_gradient(back, kl_weight):
    assert draft_z(draft, back, kl_weight) < 5


def test_the_cut_changes_the_gradient():
    world = make_double()
    whole, one = (gradient(exact(world, {"one": 1.0}, back)[0], world.unet) for back in (STEPS, 1))
    assert (whole - one).abs().max() > 0.3 * whole.abs().max()


DRAFT_BUGS = {
    "KL sign": (STEPS, ("((kl_weight * kl - r).sum()", "((-kl_weight * kl - r).sum()")),
    "adapter not disabled for the base": (STEPS, ("        unet.disable_adapters()\n", "        pass\n")),
    "KL averaged over the latent": (STEPS, (".pow(2).sum(1) / (2 * sigma**2)", ".pow(2).mean(1) / (2 * sigma**2)")),
    "KL without its factor": (STEPS, ("/ (2 * sigma**2)\n        x = mean", "/ sigma**2\n        x = mean")),
    "squared error of the means instead": (STEPS, ("/ (2 * sigma**2)\n        x = mean", "\n        x = mean")),
    "base not differentiated": (STEPS, ("kernel(base, x, i)[0])", "kernel(base, x, i)[0].detach())")),
    "not cut at the first step with a gradient": (2, ("x.detach() if i <= cut", "x.detach() if i < cut")),
    "one step too many": (1, ("cut, kl = steps - (back or steps)", "cut, kl = steps - 1 - (back or steps)")),
}


@pytest.mark.parametrize("back, change", DRAFT_BUGS.values(), ids=DRAFT_BUGS)
def test_planted_bugs_in_draft_are_seen(back, change):
    script = planted("sd/draft.py", change)
    script.path_noise = double_noise
    assert draft_z(script, back, 0.7) > 5


@pytest.mark.parametrize("back", [2, STEPS])
def test_memory_of_a_chunk_gives_the_same_gradient(back):
    """Chunks predict again in the backward pass: also what the base model, with the adapter off, predicted."""
    worlds = [make_double(), make_double()]
    found = [gradients(draft.draft_update(world, flags(batch=6, chunk=chunk), 0.7, back), world, 1)
             for world, chunk in zip(worlds, (6, 4))]
    assert (found[0][0] - found[1][0]).abs().max() < 1e-10
    assert found[0][1][0] == pytest.approx(found[1][1][0], rel=1e-5)
    assert all(world.unet.on for world in worlds)


def mini_gradient(script, chunk):
    """The gradient of one update of the miniature, whose adapter is not zero, in chunks."""
    args = script.parse_args([*TINY, "--batch", "2", "--chunk", str(chunk)])
    world = script.load_world(args)
    world.level, world.spread = {"clip": torch.zeros(2)}, {"clip": 0.1}
    weights, found = script.fresh_adapter(world.unet, 4, generator()), []
    for value in weights.values():
        torch.nn.init.normal_(value, std=0.1, generator=generator(1))
    script.draft_update(world, args, 0.01, None)(
        generator(2), lambda: found.extend(v.grad.flatten() for v in weights.values()), {})
    return torch.cat(found)


def test_recomputing_the_base_with_the_adapter_on_is_seen():
    """If only the UNet, not the switch, stood inside the checkpoint, the backward pass would meet another model."""
    script = planted("sd/draft.py", ("            return predict_noise(x, t)\n        finally:",
                                     "            return checkpoint(predict_noise, x, t, use_reentrant=False)\n"
                                     "        finally:"))
    whole = mini_gradient(draft, 2)
    assert (mini_gradient(draft, 1) - whole).norm() < 1e-3 * whole.norm()
    try:
        assert (mini_gradient(script, 2) - whole).norm() > 1e-2 * whole.norm()
    except torch.utils.checkpoint.CheckpointError:
        pass


# ---- policy gradients ------------------------------------------------------------------------------------------------


def test_log_prob_is_that_of_a_normal():
    x, mean = torch.randn(2, 3, 4, 8, 8, generator=generator(), dtype=F)
    truth = torch.distributions.Normal(mean, 0.3).log_prob(x).flatten(1).sum(1)
    assert (ddpo.log_prob(x, mean, 0.3) / truth - 1).abs().max() < 1e-10


def ddpo_z(script, kl_weight=0.0, groups=40, **changes):
    """|z| of the policy gradient, of paths and advantages with a spread of one, so that the mean is known."""
    world, args = make_double(), flags(**changes)
    timesteps, abar = script.path_schedule(world.scheduler, STEPS)
    n, rng, found = 4000, generator(8), []
    number = torch.tensor([0, 1]).repeat_interleave(n // 2)
    unet = world.unet
    for _ in range(groups):
        policy = script.prompted(world, args, number)
        base = script.without_adapter(unet, policy)
        noise = torch.randn(STEPS + 1, n, 4, 1, 1, generator=rng, dtype=F)
        path = script.sample_paths(policy, base, noise, timesteps, abar)
        r = sum(w * v for w, v in zip((1, -0.5), script.gains(world, world.decode(path.x[-1]), number).values()))
        advantage, spread = script.advantages(r, path.kl, number, kl_weight)
        for i in range(STEPS):
            loss, _ = script.step_loss(policy, path, i, torch.arange(n), advantage * spread, kl_weight, timesteps, abar,
                                       1.0, args.clip_range)
            loss.mean().backward()
        found.append(torch.cat([unet.stretch.grad.view(1), unet.shift.grad]))
        unet.stretch.grad = unet.shift.grad = None
    gain, kl = exact(world, {"one": 1.0, "two": -0.5})
    return z_score(torch.stack(found), gradient(kl_weight * kl - gain, unet))


@pytest.mark.parametrize("kl_weight", [0.0, 3.0])
def test_policy_gradient(kl_weight):
    assert ddpo_z(ddpo, kl_weight) < 5


DDPO_BUGS = {
    "log-probabilities averaged": (0.0, ("-((x - mean) ** 2).flatten(1).sum(1)",
                                         "-((x - mean) ** 2).flatten(1).mean(1)")),
    "KL sign": (3.0, ("return kl_scale * kl - gain", "return -kl_scale * kl - gain")),
    "adapter not disabled for the base": (3.0, ("        unet.disable_adapters()\n", "        pass\n")),
    "KL is added to the reward": (3.0, ("value, spread = r - kl_weight * later", "value, spread = r + 30 * later")),
    "ratio upside down": (0.0, ("- path.log_p[i, index]).exp()", "- path.log_p[i, index]).neg().exp()")),
}


@pytest.mark.parametrize("kl_weight, change", DDPO_BUGS.values(), ids=DDPO_BUGS)
def test_planted_bugs_in_ddpo_are_seen(kl_weight, change):
    assert not ddpo_z(planted("sd/ddpo.py", change), kl_weight) < 5


def advantage_statistics(script):
    """Means and standard deviations of the advantages within each of three prompts of very different reward."""
    number = torch.tensor([0, 1, 2]).repeat_interleave(8)
    r = torch.randn(24, generator=generator(2), dtype=F) * torch.tensor([1.0, 5.0, 0.2])[number] + 10 * number
    value = script.advantages(r, torch.zeros(3, 24, dtype=F), number, 1.0)[0].view(3, 3, 8)
    return torch.cat([value.mean(2), value.std(2) - 1])


def test_advantages_are_per_prompt():
    assert advantage_statistics(ddpo).abs().max() < 1e-10
    bug = planted("sd/ddpo.py", ("mine = number == k", "mine = number >= 0"))
    assert advantage_statistics(bug).abs().max() > 0.5


def test_kl_of_earlier_steps_does_not_count():
    number, kl = torch.zeros(2, dtype=torch.long), torch.tensor([[1.0, 0], [2, 0], [4, 0]], dtype=F)
    value, spread = ddpo.advantages(torch.tensor([1.0, -1], dtype=F), kl, number, 0.5)
    assert torch.allclose((value * spread)[:, 0], torch.tensor([1 - 3 / 2, 1 - 2 / 2, 1.0], dtype=F))


def test_the_clip_stops_what_went_far_enough():
    world, args = make_double(), flags()
    timesteps, abar = ddpo.path_schedule(world.scheduler, STEPS)
    policy = ddpo.prompted(world, args, [0])
    noise = torch.randn(5, 300, 4, 1, 1, generator=generator(4), dtype=F)
    path = ddpo.sample_paths(policy, None, noise, timesteps, abar)
    with torch.no_grad():
        world.unet.shift += 0.15
    index, one = torch.arange(300), torch.ones(STEPS, 300, dtype=F)
    mean, sigma = ddpo.step_kernel(policy, path.x[1], 1, timesteps, abar, 1.0)
    ratio = (ddpo.log_prob(path.x[2], mean, sigma) - path.log_p[1]).exp().detach()
    for sign in (1, -1):
        loss, share = ddpo.step_loss(policy, path, 1, index, sign * one, 0.0, timesteps, abar, 1.0, 0.2)
        still = ratio > 1.2 if sign == 1 else ratio < 0.8
        assert 0.1 < still.double().mean() < 0.9
        assert torch.allclose(loss, torch.where(still, torch.full_like(ratio, -1 - sign * 0.2 if sign == 1 else 0.8),
                                                -sign * ratio))
        assert share == ((ratio - 1).abs() > 0.2).float().mean()
        assert torch.autograd.grad(loss[still].sum(), world.unet.shift, retain_graph=True)[0].abs().max() == 0


def test_a_share_of_the_steps_and_chunks_has_the_same_mean():
    """Half of the steps, drawn anew, and chunks of 100: the mean gradient is that of all steps."""
    both = []
    for changes in (dict(), dict(fraction=0.5, chunk=100)):
        world = make_double()
        both.append(gradients(ddpo.ddpo_update(world, flags(batch=300, per_prompt=150, **changes), 0.5), world, 150)[0])
    se = (sum(v.var(0) / len(v) for v in both)).sqrt()
    assert ((both[0].mean(0) - both[1].mean(0)).abs() / se).max() < 5
    bug = planted("sd/ddpo.py", (" / len(part) * args.steps / len(steps)", " / len(part)"))
    bug.path_noise = double_noise
    wrong = gradients(bug.ddpo_update(world, flags(batch=300, per_prompt=150, fraction=0.5), 0.5), world, 150)[0]
    assert ((both[0].mean(0) - wrong.mean(0)).abs() / se).max() > 5


def test_prompts_of_a_batch():
    number = ddpo.draw_prompts(45, 64, 8, generator())
    values, counts = number.unique(return_counts=True)
    assert len(values) == 8 and (counts == 8).all() and (number.diff() >= 0).all()
    assert ddpo.draw_prompts(4, 16, 16, generator()).tolist() == [k for k in range(4) for _ in range(4)]


# ---- constraints -----------------------------------------------------------------------------------------------------


def solve_double(script, thresholds, fixed=None, rounds=200):
    """The primal-dual method on the double, stretch and noise zero -> multiplier, trace, their exact values: of the

    multiplier before it is cut off at zero, and of the reward of the objective.

    KL = q |shift|^2, the rewards exceed the base model's by slope' shift: the best shift is slope' weights / (2 q).
    """
    world = make_double(stretch=0.0, shift=(0.0, 0.0, 0.0, 0.0))
    problem = types.SimpleNamespace(name="double", objective={"one": 3.0}, thresholds=thresholds)
    values = {name: exact(world, {name: 1.0})[0] for name in ("one", "two")}
    slope = torch.stack([gradient(v, world.unet)[1:] for v in values.values()])
    with torch.no_grad():
        world.unet.shift += 1
        q = exact(world, {"one": 1.0})[1].item() / 4
        world.unet.shift -= 1
    gram = slope @ slope.T / (2 * q)
    dual = ((thresholds["two"] - 3 * gram[1, 0]) / gram[1, 1]).item()
    script.path_noise = lambda world, args, n, rng: torch.zeros(STEPS + 1, n, 4, 1, 1, dtype=F)
    update = script.lagrangian_update(world, problem, flags(batch=2, dual_lr=0.2 / gram[1, 1].item()), fixed)
    optimizer = torch.optim.SGD([world.unet.shift], 0.25 / q)
    state = dict(dual=torch.zeros(1, dtype=F), memory=torch.zeros(1, dtype=F))
    for _ in range(rounds):
        trace = update(generator(), lambda: (optimizer.step(), optimizer.zero_grad()), state)
    one = (3 * gram[0, 0] + max(dual, 0) * gram[0, 1]).item()
    return state["dual"].item(), trace, dual, one


def test_multipliers_and_rewards_of_the_double():
    script = planted("sd/constrained_alignment.py")
    dual, trace, truth, one = solve_double(script, {"two": 1.5})
    assert truth > 0.1 and dual == pytest.approx(truth, rel=1e-6) and trace["two"] == pytest.approx(1.5, abs=1e-6)
    assert trace["one"] == pytest.approx(one, rel=1e-6)
    dual, trace, truth, _ = solve_double(script, {"two": -9.0})  # met by the base model: no multiplier
    assert truth < 0 and dual == 0 and trace["two"] > -9


ALI_BUGS = {
    "gap the wrong way": ("gap = b - b.new_tensor(", "gap = -b + b.new_tensor("),
    "multipliers below zero": ("dual_now.clamp(min=0)", "dual_now"),
    "KL sign": ("((kl - sum(", "((-0.5 * kl - sum("),
    "adapter not disabled for the base": ("        unet.disable_adapters()\n", "        pass\n"),
    "rewards of the base model left in": ("value.detach() - r0.get(name, torch.zeros_like(kl))", "value.detach()"),
    "objective left out": ("weight = fixed or problem.objective | dual", "weight = fixed or dual"),
}


@pytest.mark.parametrize("change", ALI_BUGS.values(), ids=ALI_BUGS)
def test_planted_bugs_in_the_constraints_are_seen(change):
    script, wrong = planted("sd/constrained_alignment.py", change), []
    for threshold in (1.5, -9.0):
        dual, trace, truth, one = solve_double(script, {"two": threshold}, rounds=100)
        wrong.append(not (abs(dual - max(truth, 0)) < 0.02 * abs(truth) and abs(trace["one"] - one) < 0.02 * abs(one)))
    assert any(wrong)


def test_fixed_weights_stay():
    script = planted("sd/constrained_alignment.py")
    dual, trace, _, _ = solve_double(script, {"two": 1.5}, {"one": 0.3, "two": 0.2})
    assert dual == 0 and "dual_two" not in trace


def test_best_tilt_of_gaussian_rewards():
    """q normal, r linear: the multipliers solve a linear system, KL = dual' covariance dual / 2."""
    r = torch.randn(3, 3, 20000, generator=generator(7), dtype=F)
    rewards = {"a": r[0], "b": 0.6 * r[0] + 0.8 * r[1], "c": r[2]}
    problem = types.SimpleNamespace(objective={"a": 0.3}, thresholds={"b": 0.5, "c": 0.4})
    dual, w = ali.best_tilt(problem, rewards)
    assert dual.tolist() == pytest.approx([0.5 - 0.3 * 0.6, 0.4], abs=0.05)
    for name, b in problem.thresholds.items():  # optimality on the samples themselves
        assert (w * rewards[name]).sum(1).mean().item() == pytest.approx(b, abs=1e-5)
    assert ali.best_tilt(types.SimpleNamespace(objective={"a": 0.9}, thresholds={"b": 0.2}), rewards)[0].item() == 0


# ---- adapters and whole runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run of each script -> {script name: (folder of results, numbers, arguments)}."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(SOURCE)
        for name, script, extra in (("draft", draft, "--methods truncated_kl --back 2"),
                                    ("ddpo", ddpo, "--methods ddpo_kl --reward jpeg --per-prompt 2"),
                                    ("constrained_alignment", ali, "--problem learned --threshold 0.3 0.2")):
            out = tmp_path_factory.mktemp(name)
            words = [*TINY, *extra.split(), "--out", str(out)]
            found[name] = out / f"sd_{name}", script.main(script.parse_args(words)), words
    return found


@pytest.mark.parametrize("name", ["draft", "ddpo", "constrained_alignment"])
def test_short_runs(name, finished):
    folder, numbers, _ = finished[name]
    assert all(math.isfinite(value) for value in numbers.values())
    assert (folder / "figure.png").stat().st_size > 10_000
    record = json.loads((folder / "numbers.json").read_text())
    assert [r["name"] for r in record["rows"]] == list(numbers) and record["network_evaluations"] > 0
    kl = {"draft": "truncated_kl.all.kl", "ddpo": "ddpo_kl.all.kl", "constrained_alignment": "constrained.learned.kl"}
    assert numbers[kl[name]] > 0


@pytest.mark.parametrize("averaged, first", [(0.25, 3), (0.5, 2)])
def test_the_adapter_is_the_average_of_the_last_updates(averaged, first, tmp_path):
    args = draft.parse_args([*TINY, "--updates", "5"])
    world, seen = draft.load_world(args), []

    def update(rng, descend, state):
        weights = {name: value for name, value in world.unet.named_parameters() if "lora_" in name}
        for value in weights.values():
            value.grad = torch.randn(value.shape, generator=rng)
        descend()
        seen.append({name: value.detach().clone() for name, value in weights.items()})
        return {}

    draft.train_adapter("adapter", world, update, args, tmp_path, averaged=averaged)
    for name, value in world.unet.named_parameters():
        if "lora_" in name:
            mean = torch.stack([weights[name] for weights in seen[first:]]).mean(0)
            torch.testing.assert_close(value.detach(), mean, rtol=0, atol=1e-6)  # a step is 1e-3


def test_the_multipliers_are_averaged_as_the_adapter_is(finished):
    folder, numbers, _ = finished["constrained_alignment"]
    trace = torch.load(folder / "learned_constrained.pt", weights_only=True)["trace"]
    for name in ("saturation", "contrast"):
        late = [point[f"dual_{name}"] for point in trace[len(trace) // 2 :]]
        assert numbers[f"constrained.learned.dual_{name}"] == pytest.approx(sum(late) / len(late), rel=1e-9)


@pytest.mark.parametrize("name, method", [("draft", "truncated_kl"), ("ddpo", "ddpo_kl"),
                                          ("constrained_alignment", "learned_equal")])
def test_plain_diffusers_loads_the_adapters(name, method, finished):
    from diffusers import StableDiffusionPipeline
    folder = finished[name][0]
    plain = StableDiffusionPipeline.from_pretrained(MINI, safety_checker=None)
    x, cond = torch.randn(2, 4, 8, 8, generator=generator()), torch.randn(2, 16, 64, generator=generator(1))
    with torch.no_grad():
        before = plain.unet(x, 501, cond).sample
        plain.load_lora_weights(folder / method)
        loaded = plain.unet(x, 501, cond).sample
        own = draft.load_pipeline(MINI)
        average = torch.load(folder / f"{method}.pt", weights_only=True)["average"]
        for key, value in draft.fresh_adapter(own.unet, 4, generator()).items():
            value.copy_(average[key])
        torch.testing.assert_close(own.unet(x, 501, cond).sample, loaded, rtol=0, atol=1e-6)
    assert (before - loaded).abs().max() > 1e-5


def test_adapter_as_a_part_of_the_base_model(finished, tmp_path):
    """--lora: the base model of a run is then the one that the adapter of another run made."""
    folder, _, words = finished["draft"]
    args = draft.parse_args(words)
    world = draft.load_world(args)
    base = draft.measure_base(world, args)
    draft.load_adapter(world.pipe, folder / "truncated_kl")
    adapted = draft.draw_images(world, args, True)
    args.lora = str(folder / "truncated_kl")
    other = draft.load_world(args)
    fused = draft.measure_base(other, args)
    torch.testing.assert_close(fused.images, adapted.images, rtol=0, atol=1e-4)
    assert (base.images - fused.images).abs().max() > 1e-3
    draft.fresh_adapter(other.unet, 4, generator())
    assert draft.draw_images(other, args, True).kl.abs().max() == 0  # a fresh one changes nothing


def test_a_fresh_adapter_is_random_only_by_the_generator():
    own = draft.load_pipeline(MINI)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(found))
        weights = draft.fresh_adapter(own.unet, 2, generator(seed))
        assert {v.dtype for v in weights.values()} == {torch.float32} and all(v.requires_grad for v in weights.values())
        assert sum(p.requires_grad for p in own.unet.parameters()) == len(weights)
        found.append(torch.cat([v.flatten() for v in weights.values()]))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize("name, script", [("ddpo", ddpo), ("constrained_alignment", ali)])
def test_an_interrupted_run_gives_the_same_bytes(name, script, finished, tmp_path, monkeypatch):
    folder, numbers, words = finished[name]
    words = [*words[:-1], str(tmp_path)]
    calls, real = [], script.gains

    def interrupted(*values):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return real(*values)

    monkeypatch.setattr(script, "gains", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.main(script.parse_args(words))
    monkeypatch.setattr(script, "gains", real)
    resumed = script.main(script.parse_args([*words, "--resume"]))
    assert all(resumed.pop(k) == v for k, v in numbers.items() if not k.endswith(".seconds"))
    assert all(k.endswith(".seconds") for k in resumed)
    for file in folder.glob("*/*.safetensors"):
        assert file.read_bytes() == (tmp_path / f"sd_{name}" / file.parent.name / file.name).read_bytes()


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script, flags, words", [
    (draft, "--reward jpeg", "jpeg has no gradient"),
    (draft, "--steps 5 --back 6", "--back can be at most"),
    (draft, "--images 1", "at least 2"),
    (draft, "--rank 0", "above zero"),
    (draft, "--reward beauty", "no reward 'beauty'"),
    (draft, "--device cuda:77", "no device of this machine"),
    (ddpo, "--batch 9", "multiple of --per-prompt"),
    (ddpo, "--fraction 1.5", "--fraction"),
    (ddpo, "--eta 2", "--eta"),
    (ali, "--reward saturation", "learned rewards"),
    (ali, "--threshold 0.5", "needs one --problem"),
    (ali, "--problem learned --threshold 0.5", "as many values"),
])
def test_bad_flags(script, flags, words, capsys):
    with pytest.raises(SystemExit) as end:
        script.parse_args(flags.split())
    assert_one_sentence(end, capsys, words)


def test_bad_input(capsys, finished, tmp_path):
    with pytest.raises(SystemExit) as end:
        draft.main(draft.parse_args(["--model", str(tmp_path / "none"), "--out", str(tmp_path)]))
    assert_one_sentence(end, capsys, "no Stable Diffusion model")
    folder, _, words = finished["draft"]
    with pytest.raises(SystemExit) as end:
        draft.main(draft.parse_args([*words, "--resume", "--lr", "0.5"]))
    assert "trained with other settings" in capsys.readouterr().err and end.value.code == 2
    (tmp_path / "truncated_kl.pt").write_text("nothing")
    with pytest.raises(SystemExit) as end:
        draft.read_checkpoint(tmp_path / "truncated_kl.pt", "", "cpu")
    assert_one_sentence(end, capsys, "no checkpoint")
    world = make_double()
    world.rewards = {"one": lambda images, number: torch.full((len(images),), math.nan)}
    world.spread = {"one": 1.0}
    with pytest.raises(SystemExit) as end:
        draft.gains(world, torch.zeros(2, 3, 2, 2), torch.tensor([0, 1]))
    assert_one_sentence(end, capsys, "finite")
    r = {"a": torch.randn(2, 50, generator=generator(), dtype=F)}
    with pytest.raises(SystemExit) as end:
        ali.best_tilt(types.SimpleNamespace(objective={}, thresholds={"a": 9.0}), r)
    assert_one_sentence(end, capsys, "lower the threshold")
