"""toy/msdda.py: the merge as a product of densities, the theorem on Gaussian data, C_t, the soup, the rows."""
import copy
import json
import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from conftest import load, planted

m = load("toy/msdda.py")
WEIGHTS = (0.3, 0.5, 0.2)

def kernels(seed=0):
    torch.manual_seed(seed)
    return torch.randn(3, 4, 5, 2).double(), 0.2 + torch.rand(3, 4, 5, 2).double()

def levels(steps, dtype=torch.float32):
    return m.signal_power(torch.linspace(1, 0, steps + 1, dtype=dtype)).tolist()

def product_gap(module, weights=WEIGHTS):
    """Largest difference of sum_i w_i log N_i and log C + log N, at random points."""
    mean, var = kernels()
    merged, merged_var, log_c = module.merge(mean, var, weights)
    x = torch.randn(4, 5, 2).double()
    left = sum(w * Normal(a, v.sqrt()).log_prob(x).sum(-1) for w, a, v in zip(weights, mean, var))
    return (left - log_c - Normal(merged, merged_var.sqrt()).log_prob(x).sum(-1)).abs().max().item()

def test_merge_is_the_product_of_the_densities():
    assert product_gap(m) < 1e-10
    assert product_gap(m, (1.1, -0.05, -0.05)) < 1e-10

@pytest.mark.parametrize("old, new", [
    ("log_c = precision.log() +", "log_c = -precision.log() +"), ("(mean - merged) ** 2", "mean**2"),
    ("(w * mean / var).sum(0)", "(w * mean).sum(0)"), ("-log_c.sum(-1) / 2", "-log_c.sum(-1)")])
def test_a_wrong_merge_is_caught(old, new):
    assert product_gap(planted("toy/msdda.py", (old, new))) > 1e-3

def test_blend_averages_and_equals_the_merge_of_equal_variances():
    mean, var = kernels()
    for found, exact in zip(m.blend(mean, var, WEIGHTS), (sum(w * v for w, v in zip(WEIGHTS, mean)), var.mean(0))):
        assert (found - exact).abs().max() < 1e-10
    same = var[:1].expand_as(var)
    assert (m.blend(mean, same, WEIGHTS)[0] - m.merge(mean, same, WEIGHTS)[0]).abs().max() < 1e-10
    assert (m.blend(mean, var, WEIGHTS)[0] - m.merge(mean, var, WEIGHTS)[0]).abs().max() > 0.01

def ends(module, steps, weights=(0.5, 0.5), curved=True):
    tilts = module.Problem(0.4).tilts.double()
    tilts = torch.stack([tilts[0], tilts[1] * curved])
    mixed, abar = tilts.new_tensor(weights) @ tilts, [1e-20, *levels(steps, torch.float64)[1:]]  # from noise alone
    target = Normal(mixed[0] / (1 + mixed[1]), (1 + mixed[1]) ** -0.5)
    found = [module.terminal(tilts, rule, weights, abar) for rule in (module.merge, module.blend)]
    return *found, module.terminal(mixed[:, None], module.merge, [1.0], abar), target

def test_theorem_on_gaussian_data():
    kls = {}
    for steps in (5, 100, 500):
        merged, blended, optimum, target = ends(m, steps)
        assert (merged.mean - optimum.mean).abs().max() < 1e-12 and (merged.stddev - optimum.stddev).abs().max() < 1e-12
        kls[steps] = kl_divergence(blended, optimum).sum()
        assert kl_divergence(target, optimum).sum() > 0.4  # for any number of steps
    assert kls[5] > 0.05 and abs(math.log(kls[100] / kls[500]) / math.log(5) - 2) < 0.1  # it falls as 1 / steps^2
    merged, _, optimum, _ = ends(m, 20, (0.9, 0.1))
    assert kl_divergence(merged, optimum).sum() < 1e-16

def test_linear_rewards_have_no_gap():
    """Then E[r | x] and log E[exp(r) | x] differ by a constant: the step-level optimum is that of whole paths."""
    merged, blended, optimum, target = ends(m, 20, curved=False)
    assert max(kl_divergence(p, target).sum() for p in (merged, blended, optimum)) < 1e-12

def test_step_level_kernel_by_quadrature():
    """One step, then data: p(x_0 | x_1) exp(r(x_0)) from x_1 ~ N(0, 1), on a grid."""
    tilts = torch.tensor([[[1.5]], [[0.8]]], dtype=torch.float64)
    x1 = torch.linspace(-9, 9, 1201, dtype=torch.float64)
    x0, a = x1[:, None], 0.3
    log_p = Normal(a**0.5 * x1, 0 * x1 + (1 - a) ** 0.5).log_prob(x0) + 1.5 * x0 - 0.4 * x0**2
    weight = (Normal(0.0, 1.0).log_prob(x1) + log_p - log_p.logsumexp(0)).exp().sum(1)
    mean = (weight * x1).sum() / weight.sum()
    std = ((weight * x1**2).sum() / weight.sum() - mean**2).sqrt()
    found = m.terminal(tilts, m.merge, [1.0], [a, 1.0])
    assert abs(found.mean - mean) < 1e-8 and abs(found.stddev - std) < 1e-8

def gaussian_models():
    """Data N(0, 1) in 2D and its tilts: kernels are Gaussian, so that C_t makes the merge exact at any steps."""
    data = m.Mixture(torch.zeros(1), torch.zeros(1, 2), 1.0)
    slopes, curvatures = torch.tensor([[1.0, 0.2], [-0.5, 0.8]]), torch.tensor([[1.5, 0.3], [0.2, 2.0]])
    tilted = [data.tilt(*pair) for pair in zip(slopes, curvatures)]
    target, log_z = data.tilt(slopes.mean(0), curvatures.mean(0))
    return [t.denoise for t, _ in tilted], target, log_z - sum(z for _, z in tilted) / 2

def z_scores(module, corrected):
    torch.manual_seed(3)
    models, target, log_z = gaussian_models()
    x, log_w = module.msdda(models, [0.5, 0.5], torch.randn(60, 500, 2), levels(8), corrected=corrected, ess=0.98)
    w, z = log_w.softmax(1)[..., None], log_w.double().exp().mean(1)
    mean = (w * x).sum(1)
    score = (mean.mean(0) - target.mean) / mean.std(0) * len(mean) ** 0.5
    of_z = (z.mean() - math.exp(log_z)) / z.std() * len(z) ** 0.5 if corrected else 0.0
    return score.abs().max().item(), abs(float(of_z))

def test_with_c_the_merge_samples_the_target_and_without_it_misses():
    assert max(z_scores(m, True)) < 5 and z_scores(m, False)[0] > 8

@pytest.mark.parametrize("old, new", [
    (", log_c * corrected", ", -log_c * corrected"), (", log_c * corrected", ", 2 * log_c * corrected"),
    ("- before + log_ratio", "+ log_ratio - log_ratio.mean(1, keepdim=True)")])
def test_a_wrong_weight_is_caught(old, new):
    assert max(z_scores(planted("toy/msdda.py", (old, new)), True)) > 8

def test_exact_answers_of_the_problem():
    torch.manual_seed(0)
    problem = m.Problem(0.4)
    for weights in m.SWEEP:
        target, exact = problem.target(weights)
        x = target.sample((20_000,))
        r = problem.rewards(x)
        assert ((r.mean(0) - exact) / r.std(0) * len(r) ** 0.5).abs().max() < 5
        gap = target.log_prob(x[:50]) - problem.data.log_prob(x[:50]) - r[:50] @ torch.tensor(weights) / 0.4
        assert gap.std() < 1e-3  # the density is p exp(r / kl_weight) / Z

def test_soup_averages_the_weights_of_all_networks():
    torch.manual_seed(0)
    net = m.Denoiser(m.Problem(0.4).data)
    nets = [copy.deepcopy(net) for _ in range(3)]
    for k, other in enumerate(nets):
        other.mlp[2].weight.data += k
    mixed = m.soup(nets, [0.5, 1.0, -0.5])
    assert (mixed.mlp[2].weight - net.mlp[2].weight).abs().max() < 1e-5 and mixed is not nets[0]

def test_negative_weights_and_few_steps():
    """The precision of a product with a negative weight may be negative: it is cut, and samples are still numbers."""
    torch.manual_seed(0)
    assert m.merge(torch.zeros(2, 1, 2), torch.tensor([[[1.0, 1.0]], [[0.01, 2.0]]]), (1.2, -0.2))[1].min() > 0
    models = [m.Problem(0.4).target(w)[0].denoise for w in ((1.0, 0.0), (0.0, 1.0))]
    assert m.msdda(models, [1.2, -0.2], torch.randn(2, 500, 2), levels(10), m.blend)[0].isfinite().all()

def test_rows_of_a_run(tmp_path):
    flags, records = ["--quick", "--score", "exact", "--steps", "10", "--out"], []
    for name in ("a", "b"):
        m.main(m.parse_args([*flags, str(tmp_path / name)]))
        records.append(json.loads((tmp_path / name / "numbers.json").read_text())["rows"])
    assert records[0] == records[1] and (tmp_path / "a" / "figure.png").exists()
    rows = {(r["problem"], r["method"], r["quantity"]): r["estimate"] for r in records[0]}
    assert len(rows) == len(records[0])
    calls = {method: rows["ring_0.5_0.5", method, "calls"] for method in m.METHODS if method != "soup"}
    assert calls == dict(exact=0, blend=20, msdda=20, msdda_ct=20, rgg=10, code=48)  # code: 4 x (10 + 2 looks)
    assert rows["gaussian_5", "msdda", "log10_kl"] == -16 and rows["gaussian_5", "blend", "log10_kl"] > -2
