"""dna/constrained_alignment.py and dna/or_composition.py: multipliers, gradients and KLs against closed forms, small runs,
planted bugs. The closed forms are of independent letters, where the gradient of the letters is exact."""
import inspect
import json
import math
import types

import numpy as np
import pytest
import torch
from conftest import load, planted

ali, mix, das = (load(f"dna/{name}.py") for name in ("constrained_alignment", "or_composition", "das"))
LENGTH, F64 = 3, torch.float64
X = torch.cartesian_prod(*[torch.arange(4)] * LENGTH)

def product(seed):
    """A distribution (4^3,) of independent letters, and its log probabilities (3, 4)."""
    torch.manual_seed(seed)
    log_p = torch.randn(LENGTH, 4, dtype=F64).log_softmax(1)
    return log_p[torch.arange(LENGTH), X].sum(1).exp(), log_p

# ---- constrained alignment -------------------------------------------------------------------------------------------
def test_multipliers_of_the_optimum():
    (p, _), h = product(0), 1e-5
    torch.manual_seed(1)
    log_q, r, b = p.log(), torch.randn(2, 64, dtype=F64), torch.tensor([0.4, 0.1], dtype=F64)
    dual = ali.best_multipliers(log_q, r, b)
    log_p, mean, covariance, kl, log_z = ali.moments(log_q, r, dual)
    assert ((mean - b) * dual).abs().max() < 1e-5 and (b - mean).max() < 1e-5 and dual.min() >= 0
    w = log_p.softmax(0)
    assert abs((w * (w.log() - log_q)).sum() - kl) < 1e-10 and abs(dual @ b - log_z - kl) < 1e-5  # no duality gap
    for i, e in enumerate(h * torch.eye(2, dtype=F64)):
        up, down = ali.moments(log_q, r, dual + e), ali.moments(log_q, r, dual - e)
        assert abs((up[4] - down[4]) / (2 * h) - mean[i]) < 1e-8
        assert ((up[1] - down[1]) / (2 * h) - covariance[i]).abs().max() < 1e-8
    equal = ali.equal_weights(log_q, r, kl)
    assert abs(ali.moments(log_q, r, equal)[3] - kl) < 1e-8
    unit = ali.moments(log_q, r, 0 * b)[2].diag().sqrt()
    assert abs(equal[0] * unit[0] - equal[1] * unit[1]) < 1e-10

def test_thresholds_that_nothing_meets_end_in_a_sentence():
    with pytest.raises(ali.Refused, match="64 sequences"):
        ali.best_multipliers(product(0)[0].log(), torch.randn(1, 64, dtype=F64), torch.tensor([9.0], dtype=F64))

def gradient_z(module, n=20_000):
    """Largest z of the gradient of the Lagrangian in a shift of the letters' log probabilities (3, 4)."""
    (p, log_p), value = product(0), torch.randn(2, LENGTH, 4)
    world = types.SimpleNamespace(p=p, denoiser=das.ExactDenoiser(p), length=LENGTH, steps=5,
                                  reward=lambda letters: (letters * value[0]).sum((1, 2)))
    dual, shift = torch.tensor([1.5, 4.0], dtype=F64), torch.nn.Parameter(0.5 * torch.randn(LENGTH, 4, dtype=F64))
    denoiser, found = lambda x: (das.ExactDenoiser(p)(x) + shift).log_softmax(2), []
    q = (log_p + shift).log_softmax(1)
    r = (q.exp() * value[0]).sum(), q.exp()[:, 1:3].sum() / LENGTH
    exact = torch.autograd.grad((q.exp() * (q - log_p)).sum() - dual[0] * r[0] - dual[1] * r[1], shift)[0]
    args = types.SimpleNamespace(updates=1, chunk=10**6)
    for _ in range(40):
        shift.grad = None
        _, kl = module.lagrangian_update(args, world, denoiser, dual, lambda: found.append(shift.grad), n // 40)
    found = torch.stack(found)
    assert abs(kl.mean() - (q.exp() * (q - log_p)).sum()) < 5 * kl.std() / len(kl) ** 0.5
    return ((found.mean(0) - exact) / (found.std(0) / len(found) ** 0.5)).abs().max()

def test_the_gradient_is_that_of_the_lagrangian():
    assert gradient_z(ali) < 5

@pytest.mark.parametrize("old, new", [("- base - gain[n]", "- base + gain[n]"), ("- base - gain[n]", "- gain[n]"),
                                      ("/ (world.steps - t)", "/ (world.steps - 0 * t)"), ("x = path[t, n]", "x = path[-1 - t, n]"),
                                      ("gain = torch.autograd.grad((r @ dual", "gain = torch.autograd.grad((r @ dual.flip(0)")])
def test_a_planted_bug_of_the_gradient_is_caught(old, new):
    text = inspect.getsource(ali)
    assert text.count(old) == 1
    assert gradient_z(planted("dna/constrained_alignment.py", (old, new))) > 5

def run(module, out, *flags, size):
    args = module.parse_args(["--problem", "mpsa", "--steps", "6", "--quick", "--out", str(out), *flags])
    args.size = size
    module.main(args)
    rows = json.loads((out / "numbers.json").read_text(), parse_constant=lambda name: pytest.fail(name))["rows"]
    assert len({(r["problem"], r["method"], r["quantity"]) for r in rows}) == len(rows)
    return rows

RUNS = [(ali, (3, 8, 300) * 2, "mpsa_constrained"), (mix, (3, 4, 20, 30) * 2, "mpsa_kl")]

@pytest.mark.parametrize("module, size, name", RUNS, ids=["alignment", "or"])
def test_same_seed_same_numbers(module, size, name, tmp_path, capsys):
    whole = run(module, tmp_path, size=size)
    assert capsys.readouterr().out.startswith("COARSE") and (tmp_path / "figure.png").stat().st_size > 10_000
    arrays = np.load(tmp_path / "sequences.npz")
    assert {key.split("/")[2] for key in arrays.files} >= {"x", "log_w"}
    assert run(module, tmp_path, size=size) == whole and (tmp_path / f"{name}.pt").exists()
    assert run(module, tmp_path, "--seed", "1", size=size) != whole

def test_exact_multipliers_of_mpsa(tmp_path):
    rows = {(r["method"], r["quantity"]): r for r in run(ali, tmp_path, size=(2, 4, 300) * 2)}
    exact = {key: rows["constrained", key]["exact"] for key in ("multiplier_activity", "multiplier_gc", "activity", "kl")}
    assert exact == pytest.approx(dict(multiplier_activity=1.7259, multiplier_gc=4.7171, activity=1.2, kl=1.5332), abs=1e-3)

# ---- OR --------------------------------------------------------------------------------------------------------------
def test_weights_of_disjoint_models():
    """kl: as many as models; elbo: in proportion to exp(entropy)."""
    q = torch.full((2, 64), 1e-30, dtype=F64)
    q[0, :4], q[1, 4:16] = 1 / 4, 1 / 12
    tables, entropy = [(q.log(), w) for w in q], torch.tensor([math.log(4), math.log(12)], dtype=F64)
    assert (mix.optimum(tables) - 0.5).abs().max() < 1e-4
    assert (mix.optimum(tables, entropy) - torch.tensor([0.25, 0.75], dtype=F64)).abs().max() < 1e-4
    assert (mix.slacks(tables, torch.tensor([0.25, 0.75], dtype=F64)) - torch.tensor([math.log(4), math.log(4 / 3)])).abs().max() < 1e-6

def path_errors(module, n=3000):
    """Of independent letters: the log probability of a path, and the KL of every path, are those of the sequence."""
    (p, _), (q, _) = product(0), product(3)
    world = types.SimpleNamespace(length=LENGTH, steps=4)
    torch.manual_seed(0)
    x, letters, both = module.draw_paths(world, [das.ExactDenoiser(q), das.ExactDenoiser(p)], 0, n, 500)
    index = (x[-1] * 4 ** torch.arange(LENGTH - 1, -1, -1)).sum(1)
    errors = [(both - torch.stack([q[index], p[index]], 1).log()).abs().max()]
    kl = torch.stack([module.step_kl(world, das.ExactDenoiser(p)(v), log_v, v, torch.full((n,), t))
                      for t, (v, log_v) in enumerate(zip(x, letters))]).mean(0)
    exact = (q * (q / p).log()).sum()
    errors.append(((kl.mean() - exact) / (kl.std() / n**0.5)).abs() / 5)
    counts = torch.bincount(index, minlength=64) / n
    return errors + [((counts - q) / (q / n).sqrt()).abs().max() / 5]

def test_paths_and_their_kl():
    errors = path_errors(mix)
    assert errors[0] < 1e-5 and max(errors[1:]) < 1

@pytest.mark.parametrize("old, new", [("(log_q.exp() * (log_q - log_p))", "(log_p.exp() * (log_p - log_q))"),
                                      ("return kl * (world.steps / (world.steps - t))", "return kl * (world.steps / (world.steps - t + 1))"),
                                      ("unmask(known[lead], x, left)", "unmask(known[-1], x, left)")])
def test_a_planted_bug_of_the_paths_is_caught(old, new):
    errors = path_errors(planted("dna/or_composition.py", (old, new)))
    assert errors[0] > 1e-5 or max(errors[1:]) > 1
