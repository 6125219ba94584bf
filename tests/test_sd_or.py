"""sd/or_composition.py: densities, KLs and shares of paths in closed form, the update, a run on the miniature."""
import json
import math
import types

import numpy as np
import pytest
import torch
from conftest import SOURCE, load, planted

land = load("sd/or_composition.py")
MEANS, VAR = torch.tensor([[1.0, 0.0], [-0.6, 0.8], [0.0, -1.2]], dtype=torch.float64), 0.4
ABAR = [0.005, 0.1, 0.4, 0.8, 0.97]
DUAL = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)

@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)

def gaussian_eps(x, i, k):
    """Exact noise of latents N(MEANS[k], VAR), x (n, 2, 1, 1) at step i, () or (n,)."""
    a = torch.tensor(ABAR)[i].view(-1, 1, 1, 1)
    return (1 - a).sqrt() * (x - a.sqrt() * MEANS[k].view(-1, 2, 1, 1)) / (a * VAR + 1 - a)

MODEL = types.SimpleNamespace(abar=ABAR, times=range(4), shape=(2, 1, 1))
PREDICT = [lambda x, i, k=k: gaussian_eps(x, i, k) for k in range(3)]
ARGS = types.SimpleNamespace(seed=0, chunk=1000, steps=4)
ONE = types.SimpleNamespace(process_index=0, reduce=lambda v, how: v)

def paths(module, k, n):
    return module.draw_paths(ARGS, ONE, MODEL, PREDICT, k, n, 100 * k)

def gaussian_kl(module, x, i, eps, other):
    """KL of step i from that with other noise, by torch.distributions (n,)."""
    (m, s), (q, r) = (module.kernel(x, e, ABAR[i], ABAR[i + 1]) for e in (eps, other))
    normal = torch.distributions.Normal
    return torch.distributions.kl_divergence(normal(m, s), normal(q, r)).flatten(1).sum(1)

# ---- paths, densities, KL --------------------------------------------------------------------------------------------
def test_cost_is_the_kl_of_a_step():
    x, eps, other = torch.randn(3, 5, 2, 1, 1)
    for i in range(4):
        wanted = gaussian_kl(land, x, i, eps, other)
        torch.testing.assert_close(land.cost(MODEL, i) * (eps - other).flatten(1).square().sum(1), wanted, rtol=1e-10,
                                   atol=0)

def test_shares_are_those_of_the_densities_and_posterior_mean_uses_the_past_alone(module=land):
    """Shares and KL of reference against torch.distributions."""
    k, (x, eps) = 1, paths(module, 1, 6)
    share, kl = module.reference(MODEL, x, eps, DUAL, k)
    log_w = DUAL.log()[:, None] + torch.zeros(3, 6)
    for i in range(4):
        best = (log_w.softmax(0)[:, :, None, None, None] * eps[i]).sum(0)
        torch.testing.assert_close(kl[i], gaussian_kl(land, x[i], i, eps[i, k], best), rtol=1e-10, atol=1e-12)
        for j in range(3):
            mean, sigma = land.kernel(x[i], eps[i, j], ABAR[i], ABAR[i + 1])
            log_w[j] += torch.distributions.Normal(mean, sigma).log_prob(x[i + 1]).flatten(1).sum(1)
    torch.testing.assert_close(share, log_w.softmax(0), rtol=1e-10, atol=1e-12)

def share_z(module, n=4000):
    """z-scores: a path drawn from the mixture is of model j with probability DUAL[j], whatever a path says of it."""
    shares = [module.reference(MODEL, *paths(module, k, n), DUAL, k)[0] for k in range(3)]  # m times (m, n)
    mean = sum(w * v.mean(1) for w, v in zip(DUAL, shares))
    se = sum(w**2 * v.var(1) / n for w, v in zip(DUAL, shares)).sqrt()
    return ((mean - DUAL) / se).abs().max().item()

BUGS = {"density upside down": ("log_w = log_w - ((x[i + 1]", "log_w = log_w + ((x[i + 1]"),
        "no half": (".square().sum(2) / 2", ".square().sum(2)"),
        "density where it stood": ("((x[i + 1] - mean) / sigma)", "((x[i] - mean) / sigma)"),
        "equal weights": ("dual.log().to(x)", "(0 * dual).to(x)"),
        "another model leads": ("eps[i][lead], a, b)", "eps[i][0], a, b)")}

def test_shares_average_to_the_weights():
    assert share_z(land) < 5

@pytest.mark.parametrize("change", BUGS.values(), ids=BUGS)
def test_planted_bugs_are_seen(change):
    bug = planted("sd/or_composition.py", change)
    if share_z(bug) < 5:  # an average hides it
        with pytest.raises(AssertionError):
            test_shares_are_those_of_the_densities_and_posterior_mean_uses_the_past_alone(bug)

def test_no_sampler_of_one_prediction_a_step_is_nearer_than_posterior_mean():
    found = dict(best=0.0, mean=0.0, first=0.0)
    for k, w in enumerate(DUAL):
        x, eps = paths(land, k, 500)
        share, kl = land.reference(MODEL, x, eps, DUAL, k)
        cost = land.cost(MODEL, torch.arange(4))[:, None]
        apart = lambda e: (cost * (e - eps[:, k]).flatten(2).square().sum(2)).sum(0).mean()
        found["best"] += w * kl.sum(0).mean()
        found["mean"] += w * apart(torch.einsum("m,tmnchw->tnchw", DUAL, eps))
        found["first"] += w * apart(eps[:, 0])
        mixture = (share[k] / DUAL[k]).log()
        assert -4 * mixture.std() / 500**0.5 < mixture.mean() < -DUAL[k].log()  # at most log of one over its weight
    assert found["best"] < 0.9 * min(found["mean"], found["first"])

# ---- the update ------------------------------------------------------------------------------------------------------
class Student:
    """A model that predicts one linear map of x for all steps."""
    abar, times = ABAR, range(4)
    def __init__(self):
        self.weight = torch.zeros(2, requires_grad=True)
    def eps(self, x, i, number):
        return self.weight.view(2, 1, 1) * x

@pytest.mark.parametrize("chunk", [1000, 5])
def test_cover_has_the_gradient_of_the_weighted_kl_and_raises_the_worst(chunk):
    student, found = Student(), [paths(land, k, 400) for k in range(3)]
    data = torch.stack([x[:-1] for x, _ in found]), torch.stack([eps[:, k] for k, (_, eps) in enumerate(found)])
    args = types.SimpleNamespace(prompts="abc", size=(1, 2000 if chunk > 5 else 4), every=1, steps=4, chunk=chunk)
    def whole():  # all steps of all paths
        cost = land.cost(MODEL, torch.arange(4))[:, None]
        return torch.stack([(cost * (student.weight.view(2, 1, 1) * x - eps).flatten(2).square().sum(2)).sum(0).mean()
                            for x, eps in zip(*data)])
    torch.manual_seed(0)
    dual, slack = land.cover(args, ONE, student, data, DUAL, True, lambda: None)
    if chunk > 5:  # a large batch: the estimates have small errors
        wanted = torch.autograd.grad(DUAL @ whole(), student.weight)[0]
        torch.testing.assert_close(student.weight.grad, wanted, rtol=0.1, atol=0.1 * wanted.abs().max().item())
        torch.testing.assert_close(torch.tensor(slack), whole().detach(), rtol=0.1, atol=0)
    assert sum(dual) == pytest.approx(1) and min(dual) >= 0
    worst = int(np.argmax(slack))
    assert dual[worst] > DUAL[worst]
    assert land.cover(args, ONE, student, data, DUAL, False, lambda: None)[0] == DUAL.tolist()

def test_dual_steps_even_out_what_a_weight_can_move():
    """KLs that fall with the own weight as those of a mixture do, some hundred times larger: the steps do not swing."""
    offset, dual = torch.tensor([20.0, 0.0, 60.0]), torch.full((3,), 1 / 3)
    for _ in range(60):
        slack = 300 + offset - 250 * dual
        dual = land.dual_step(dual, slack, land.curvature(dual, slack), simplex=True)
    assert (300 + offset - 250 * dual).std() < 0.5

# ---- the miniature ---------------------------------------------------------------------------------------------------
def run(out, *flags):
    torch.set_default_dtype(torch.float32)
    args = land.parse_args(["--quick", "--steps", "2", "--out", str(out), "--rank", "2", *flags])
    args.size, args.every = (2, 1, 4, 4), 1
    land.main(args)
    rows = json.loads((out / "numbers.json").read_text())["rows"]
    table = {(r["problem"], r["method"], r["quantity"]): r["estimate"] for r in rows}
    assert len(table) == len(rows) and all(math.isfinite(value) for value in table.values())
    return table

def test_run_again_and_the_base_model_of_plain_diffusers(tmp_path):
    whole = run(tmp_path / "a")
    assert whole == run(tmp_path / "b")
    assert whole["a photo of a cat", "mixture", "kl"] == pytest.approx(math.log(3), abs=1e-3)
    total = {method: sum(whole[prompt, method, "kl"] for prompt in land.PROMPTS) for method in ("base", *land.METHODS)}
    assert max(total["equal_weights"], total["constrained"]) < total["base"]
    assert len(list((tmp_path / "a/images").iterdir())) == 6 * 4
    pipe = land.StableDiffusionPipeline.from_pretrained(SOURCE / "sd/mini", safety_checker=None)
    model = land.Diffusion(land.parse_args(["--steps", "2", "--out", str(tmp_path)]), "cpu")
    x = torch.randn(2, *model.shape)
    with torch.no_grad():
        base = land.alone(model).eps(x, 1, 0)
        plain = pipe.unet(x, model.times[1], pipe.encode_prompt([""], "cpu", 2, False)[0]).sample
        torch.testing.assert_close(base, plain, rtol=1e-4, atol=1e-5)
