"""dna/and_composition.py and dna/msdda.py: products of masked models against enumeration, KLs, multipliers, rows."""
import itertools, json, math, types
import numpy as np
import pytest
import torch
from conftest import load, planted
from test_dna_das import LENGTH, MASK, STATES, P, R, X

ac, ms = load("dna/and_composition.py"), load("dna/msdda.py")
TILTS = torch.stack([1.6 * R, (X == 2).sum(1) * 0.6, 0 * R])  # two models and P itself
LOG_Q = (P.log() + TILTS).log_softmax(1)
MODELS = [ac.ExactDenoiser(q.exp()) for q in LOG_Q]
WORLD = types.SimpleNamespace(length=LENGTH, steps=3)

def chain(log_d, steps):
    """What all paths of so many steps bring to each sequence (4^4,), for factors log_d (S, L, 4) of the letters."""
    d, masked, letter = log_d.exp(), STATES == MASK, STATES.clamp(max=3)
    weight = torch.ones(len(STATES), len(STATES), dtype=torch.float64)
    for k in range(LENGTH):
        new, same = d[:, k][:, letter[:, k]], (STATES[:, None, k] == STATES[None, :, k]).double()
        weight = weight * torch.where(masked[:, None, k] & ~masked[None, :, k], new, same)
    left = masked.sum(1)[None].double()
    newly = masked.sum(1)[:, None] - left
    now = torch.eye(len(STATES), dtype=torch.float64)[-1]  # all masked
    for step in range(steps, 0, -1):
        now = now @ (weight * (newly >= 0) * (1 / step) ** newly.clamp(min=0) * (1 - 1 / step) ** left)
    return now[~masked.any(1)]

def product(dual, steps=3):
    """Mass (4^4,) of the product of the paths, KL of these from each model: log Z has the derivatives E[log_q]."""
    dual = torch.tensor(dual, dtype=torch.float64, requires_grad=True)
    mass = chain(sum(v * q(STATES) for v, q in zip(dual, MODELS)), steps)
    slope = torch.autograd.grad(mass.sum().log(), dual)[0]
    return mass.detach(), dual.detach() @ slope - slope - mass.sum().log().detach()

def z_of(values, exact):
    """z of a mean over groups (G,); infinite where one group holds all the weight."""
    se = values.std() / len(values) ** 0.5 + 1e-12
    return abs(float((values.mean() - exact) / se)) if se < 0.3 * (1 + abs(exact)) else math.inf

def moments(out, mass):
    z, r = out["log_w"].exp(), R[(out["x"] * torch.tensor([64, 16, 4, 1])).sum(2)]
    return [z_of(z.mean(1), mass.sum()), z_of((z * r).mean(1), mass @ R)]

def scores(module, dual=(0.3, 0.7), weighted=True):
    torch.manual_seed(1)
    mass, kls = product(dual)
    out = module.compose(WORLD, MODELS[:2], torch.tensor(dual).double(), (150, 1000), 999, weighted)
    return [*moments(out, mass), *(z_of(v, k) for v, k in zip(out["kl"].T, kls))]

def test_compose_samples_the_product_of_the_paths():
    assert max(scores(ac)) < 5 and max(scores(ac, (0.9, 0.1))) < 5
    found = ac.compose(WORLD, MODELS[:2], torch.tensor([1.0, 0.0]).double(), (60, 1000), 999, weighted=False)
    assert z_of(found["kl"][:, 1], product((1.0, 0.0))[1][1]) < 5 and found["kl"][:, 0].abs().max() < 1e-10

@pytest.mark.parametrize("old, new", [
    ("torch.where(new, log_c, 0).sum(2) * weighted", "torch.where(x == x, log_c, 0).sum(2) * weighted"),
    ("torch.where(new, log_c, 0).sum(2) * weighted", "0 * log_c.sum(2)"),
    ("new[:, :, None])\n", "(x == x)[:, :, None])\n"),
    ("noise = gap - log_w[..., None] - kl", "noise = gap - kl"), (".sum(3) / left", ".sum(3)"),
    ("log_p = joint - log_c[..., None]", "log_p = log_p_i[:, :, 0]"),
    ("index_put((due,), ask(x[due]))", "index_put((due,), ask(x[due]).flip(0))")])
def test_planted_bugs_are_caught(old, new):
    assert max(scores(planted("dna/and_composition.py", (old, new)))) > 8

def test_rounds_find_the_multipliers_and_algorithm_3_does_not():
    dual = torch.full((2,), 0.5).double()
    for _ in range(40):  # the best for the product of the sequences, of infinitely many steps
        log_p = (dual @ LOG_Q[:2]).log_softmax(0)
        kls = (log_p - LOG_Q[:2]) @ log_p.exp()
        dual = ac.dual_step(dual, kls, LOG_Q[:2].cov(correction=0, aweights=log_p.exp()), simplex=True)
    assert abs(kls[0] - kls[1]) < 1e-4 and abs(dual[0] - 0.5) > 0.05
    world = types.SimpleNamespace(length=LENGTH, steps=60)
    parts = types.SimpleNamespace(names=["a", "b"], denoisers=MODELS[:2])
    found = {m: ac.run(m, world, parts, types.SimpleNamespace(chunk=999), (2, 500, 8, 6), 0) for m in (*ac.METHODS, "b")}
    assert (found["smc"]["dual"] - dual).abs().max() < 0.01 and found["smc"]["path"].shape == (7, 2)
    assert (found["algorithm_3"]["dual"] - dual).abs().max() > 0.015 and not found["algorithm_3"]["log_w"].any()

def test_exact_numbers_of_mpsa(tmp_path):
    parts = ac.Parts(args := ac.parse_args(["--out", str(tmp_path)]), ac.World(args, "mpsa"))
    best = [parts.best[key].item() for key in ("dual_included", "dual_gc_rich", "worst_kl")]
    assert best == pytest.approx([0.414, 0.586, 1.4513], abs=1e-3)
    kls, _, rows = parts.product(torch.tensor([0.5, 0.5]).double())
    assert kls.tolist() == pytest.approx([0.729, 2.053], abs=1e-3) and abs(rows["dual_value"] - kls.mean()) < 1e-12
    assert abs(rows["dual_value"] + parts.log_q.mean(0).logsumexp(0)) < 1e-10 and abs(rows["gc"] - 4.961) < 1e-3

def test_merge_is_the_product_and_blend_the_average():
    log_p = torch.randn(3, 5, 7, 4).double().log_softmax(-1)
    for weights in ((0.3, 0.5, 0.2), (1.0, 1.0, -1.0)):
        found, log_c = ms.merge(log_p, weights)
        gap = found + log_c[..., None] - sum(w * v for w, v in zip(weights, log_p))
        assert max(gap.abs().max(), found.logsumexp(-1).abs().max()) < 1e-12
    mean = sum(w * v.exp() for w, v in zip((0.3, 0.5, 0.2), log_p))
    assert (ms.blend(log_p, (0.3, 0.5, 0.2))[0].exp() - mean).abs().max() < 1e-12

@pytest.mark.parametrize("rule, weights", [("merge", (0.5, 0.5, 0)), ("merge", (1, 1, -1)), ("blend", (0.4, 0.4, 0.2))])
def test_letter_by_letter_is_the_mean_over_all_orders(rule, weights):
    denoiser, total = (lambda x: getattr(ms, rule)(torch.stack([q(x) for q in MODELS]), weights)[0]), 0
    for order in itertools.permutations(range(LENGTH)):
        x, log_p = torch.full_like(X, MASK), torch.zeros(len(X)).double()
        for k in order:
            log_p, x[:, k] = log_p + denoiser(x)[torch.arange(len(X)), k, X[:, k]], X[:, k]
        total = total + log_p.exp() / 24
    found = ms.letter_by_letter(denoiser, LENGTH)
    assert (found - total).abs().max() < 1e-12 and abs(found.sum() - 1) < 1e-12
    assert (ms.letter_by_letter(MODELS[2], LENGTH) - P).abs().max() < 1e-12

def test_step_level_models_merge_exactly_but_not_to_the_target():
    weights = (0.7, 0.4, -0.1)
    log_p = torch.stack([ms.step_level(P, value)(STATES) for value in TILTS])
    mixed, masked = sum(w * v for w, v in zip(weights, TILTS)), STATES == MASK
    optimum = ms.step_level(P, mixed)
    assert (ms.merge(log_p, weights)[0] - optimum(STATES))[masked].abs().max() < 1e-12
    assert (ms.letter_by_letter(optimum, LENGTH) - (P.log() + mixed).softmax(0)).abs().sum() > 0.05
    for state, ours in zip(STATES[masked.any(1)][::40], optimum(STATES[masked.any(1)][::40])):  # V by brute force
        k = (state == MASK).nonzero()[0, 0]
        agree = [((X == state) | (state == MASK)).all(1) & (X[:, k] == v) for v in range(4)]
        brute = torch.stack([P[rows].sum().log() + P[rows] @ mixed[rows] / P[rows].sum() for rows in agree])
        assert (ours[k] - brute.log_softmax(0)).abs().max() < 1e-10

def merge_scores(module, weights=(1.0, 1.0, -1.0), corrected=True, ess=0.9):
    torch.manual_seed(2)
    joint = sum(w * q(STATES) for w, q in zip(weights, MODELS))
    mass = chain(joint if corrected else joint.log_softmax(2), 3)
    out = module.msdda(WORLD, MODELS, weights, (3000, 6), 999, corrected=corrected, ess=ess)
    return moments(out, mass)[not corrected :]

def test_with_c_the_merge_samples_the_product_and_without_it_its_kernels():
    assert max(merge_scores(ms) + merge_scores(ms, (0.5, 0.5, 0.0), ess=0) + merge_scores(ms, corrected=False)) < 5

@pytest.mark.parametrize("old, new", [
    (".sum(2) * corrected", ".sum(2) * -corrected"), ("torch.where(new, log_c, 0)", "torch.where(x == x, log_c, 0)"),
    ("joint.log_softmax(-1), joint.logsumexp(-1)", "joint.log_softmax(-1), joint.logsumexp(-1) / 2")])
def test_a_wrong_weight_is_caught(old, new):
    assert max(merge_scores(planted("dna/msdda.py", (old, new)))) > 8

def test_soup_averages_all_parameters():
    nets = [ms.MaskedDenoiser(8, 3, [1, 2]) for _ in range(3)]
    for key, value in ms.soup(nets, [0.5, 1.0, -0.5]).state_dict().items():
        assert (value - sum(w * n.state_dict()[key] for w, n in zip([0.5, 1.0, -0.5], nets))).abs().max() < 1e-6

@pytest.mark.parametrize("module, size", [(ac, (4, 5, 2, 2, 2, 2, 1, 1)), (ms, (4, 5, 2, 2, 1))])
def test_rows_and_files_of_a_run(module, size, tmp_path, monkeypatch):
    monkeypatch.setattr(ms, "letter_by_letter", lambda denoiser, length: torch.full((4**9,), 4.0**-9).double())
    runs = []
    for seed in "001":
        args = module.parse_args(["--quick", "--steps", "3", "--seed", seed, "--out", str(tmp_path)])
        args.size = size
        module.main(args)
        runs.append(json.loads((tmp_path / "numbers.json").read_text())["rows"])
    assert runs[0] == runs[1] != runs[2] and (tmp_path / "figure.png").stat().st_size > 5000
    keys = [(r["problem"], r["method"], r["quantity"]) for r in runs[0]]
    assert len({*keys}) == len(keys) and all(math.isfinite(r["estimate"]) for r in runs[0])
    arrays = np.load(tmp_path / "sequences.npz")
    for problem, method, length in (("mpsa", "included", 9), ("hepg2", "k562", 200)):
        shape = arrays[f"{problem}/{method}/log_w"].shape
        assert arrays[f"{problem}/{method}/x"].shape == (*shape, length) and arrays[f"{problem}/{method}/x"].max() < 4

@pytest.mark.parametrize("module", [ac, ms])
def test_bad_cells_are_one_sentence(module, tmp_path, capsys):
    flags = ["--problem", "hepg2", "--quick", "--out", str(tmp_path), "--cells", "hepg2"]
    with pytest.raises(SystemExit):
        module.parse_args([*flags, "hepg2"])
    assert "--cells" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(module.Refused, match="hepg2_cell_liver"):
        module.main(module.parse_args([*flags, "liver"]))
