"""dna/and_composition.py and or_composition.py against enumeration on all sequences of five letters, KKT, and bugs.

The z-scores of AND are of unnormalised averages, mean over groups of Z_g (sum_p w_gp f(x_gp) - E[f]), which are exactly
unbiased at any number of particles, and of the KLs and of the surrogate's, over 64 independent groups. So |z| > 5 is a
bug. False alarms: `python tests/test_dna_composition.py 100` runs 100 seeds.
"""
import itertools
import json
import math
import sys
import types

import pytest
import torch
from conftest import load, planted

land, lor = load("dna/and_composition.py"), load("dna/or_composition.py")
MASK, LENGTH, F = land.MASK, 5, torch.float64


def generator(seed):
    return torch.Generator().manual_seed(seed)


def assert_one_sentence(end, capsys):
    text = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(text) == 1 and len(text[0]) > 15, text


def two_laws(length):
    """Two laws of all sequences with dependence between neighbours, the second flatter -> log_q (2, 4^length)."""
    x, laws = land.all_sequences(length), []
    for seed, strength in ((0, 2.5), (3, 1.5)):
        table = strength * torch.randn(length - 1, 4, 4, generator=generator(seed), dtype=F)
        laws.append(sum(table[k][x[:, k], x[:, k + 1]] for k in range(length - 1)).log_softmax(0))
    return torch.stack(laws)


X, LOG_Q = land.all_sequences(LENGTH), two_laws(LENGTH)
MODELS = [land.ExactDenoiser(p) for p in LOG_Q.exp()]
STATES = torch.cartesian_prod(*[torch.arange(5)] * LENGTH)
BEST = land.maximise_dual(lambda w: land.dual_function(LOG_Q, w), 2, 2)
WEIGHTS = [torch.tensor([a, 1 - a], dtype=F) for a in (0.3, 0.5, 0.8)]
HERE = WEIGHTS[0]  # where the sampler is tested: the KLs differ
FEATURES = [(X[:, 0] == 1).to(F), ((X[:, 1] == 0) & (X[:, 4] == 3)).to(F), LOG_Q[0], (X == 2).to(F).sum(1)]


def number(x):
    """Tokens (n, L) -> their places in X."""
    return (x * 4 ** torch.arange(x.shape[1] - 1, -1, -1)).sum(1)


def z_score(values, exact):
    return ((values.mean() - exact) / values.std().clamp(min=1e-12) * len(values) ** 0.5).item()


# ---- the parts -------------------------------------------------------------------------------------------------------


def test_letter_counts():
    for length, steps in ((9, 9), (9, 4), (200, 64), (5, 100), (7, 1)):
        counts = land.letter_counts(length, steps)
        assert sum(counts) == length and len(counts) == min(steps, length)
        assert max(counts) - min(counts) <= 1 <= min(counts)


def test_set_letters_sets_so_many_from_the_letters():
    log_p = torch.randn(1, LENGTH, 4, generator=generator(2), dtype=F).log_softmax(2).expand(40_000, -1, -1)
    x = torch.tensor([[MASK, 2, MASK, MASK, 0]]).expand(len(log_p), -1)
    y, new = land.set_letters(log_p, x, 2, generator(3))
    assert (new.sum(1) == 2).all() and not new[:, [1, 4]].any() and (y[~new] == x[~new]).all() and (y[new] < 4).all()
    for place in (0, 2, 3):
        assert abs(z_score(new[:, place].to(F), 2 / 3)) < 5
        for letter in range(4):
            assert abs(z_score((y[new[:, place], place] == letter).to(F), log_p[0, place, letter].exp())) < 5


def test_product_letters():
    log_p = land.predict_all(MODELS, STATES[::7])
    for weights in WEIGHTS:
        letters, log_c = land.product_letters(log_p, weights)
        masked = STATES[::7] == MASK
        assert (letters.exp().sum(2) - 1).abs().max() < 1e-10 and log_c[masked].max() < 1e-10  # Hoelder: C is at most 1
        brute = (log_p[:, 0].exp() ** weights[0] * log_p[:, 1].exp() ** weights[1]).log()
        assert (letters + log_c[:, :, None] - brute)[masked].abs().max() < 1e-10
    one = land.product_letters(log_p, torch.tensor([0.0, 1.0], dtype=F))
    assert (one[0] - log_p[:, 1])[masked].abs().max() < 1e-10 and one[1][masked].abs().max() < 1e-10


def test_letters_kl():
    a, b = torch.randn(2, 3, 4, generator=generator(4), dtype=F).log_softmax(2)
    exact = torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=v) for v in (a, b)))
    assert (land.letters_kl(a, b) - exact).abs().max() < 1e-12


# ---- AND: exact ------------------------------------------------------------------------------------------------------


def test_paths_without_normaliser_are_the_product():
    """The identity behind the weights: letters prod_i p_i^weights_i, not normalised, lead to prod_i q_i^weights_i."""
    for weights in [*WEIGHTS, BEST]:

        def unnormalised(x):
            letters, log_c = land.product_letters(land.predict_all(MODELS, x), weights)
            return letters + log_c[:, :, None], torch.zeros(len(x), 1, LENGTH, dtype=F)

        masses = land.walk(unnormalised, LENGTH)[0]
        log_p, log_z = land.product_law(LOG_Q, weights)
        assert (masses.log() - log_p - log_z).abs().max() < 1e-10
        assert abs(masses.sum().log() - log_z) < 1e-10


def test_surrogate_numbers_against_all_orders():
    log_q = two_laws(3)
    models, x = [land.ExactDenoiser(p) for p in log_q.exp()], land.all_sequences(3)
    for weights in WEIGHTS:
        law, kl = torch.zeros(64, dtype=F), torch.zeros(2, dtype=F)
        for order in itertools.permutations(range(3)):
            state, log_p, own = torch.full_like(x, MASK), torch.zeros(64, dtype=F), torch.zeros(2, 64, dtype=F)
            for place in order:
                p = torch.stack([model(state)[:, place] for model in models])  # (2, 64, 4)
                letters = torch.einsum("m,mnv->nv", weights, p).log_softmax(1)
                pick = x[:, place, None]
                log_p, own = log_p + letters.gather(1, pick)[:, 0], own + p.gather(2, pick.expand(2, -1, -1))[:, :, 0]
                state[:, place] = x[:, place]
            law += log_p.exp() / 6
            kl += (log_p - own) @ log_p.exp() / 6
        found, path_kl = land.surrogate_numbers(models, weights, 3)
        assert (found - law).abs().max() < 1e-12 and (path_kl - kl).abs().max() < 1e-12
        assert (path_kl >= (law.log() - log_q) @ law - 1e-12).all()  # of paths, not less than of what they lead to
        assert (law - land.product_law(log_q, weights)[0].exp()).abs().sum() > 0.01  # the surrogate is another law


def test_surrogate_of_one_model_is_that_model():
    law, kl = land.surrogate_numbers(MODELS, torch.tensor([1.0, 0.0], dtype=F), LENGTH)
    assert (law - LOG_Q[0].exp()).abs().max() < 1e-12
    assert abs(kl[0]) < 1e-12 and abs(kl[1] - LOG_Q[0].exp() @ (LOG_Q[0] - LOG_Q[1])) < 1e-10


def test_dual_function_gradient_kkt_and_gap():
    for weights in WEIGHTS:
        up, down = (land.dual_function(LOG_Q, weights + torch.tensor([h, -h], dtype=F))[0] for h in (1e-5, -1e-5))
        kl = land.dual_function(LOG_Q, weights)[1]
        assert abs((up - down) / 2e-5 - (kl[0] - kl[1])) < 1e-6
        p = land.product_law(LOG_Q, weights)[0].exp()
        assert (kl - torch.stack([(p * (p.log() - q)).sum() for q in LOG_Q])).abs().max() < 1e-10
    u, kl = land.dual_function(LOG_Q, BEST)
    assert (kl - u).abs().max() < 1e-6 and abs(BEST[0] - 0.5) > 0.02  # and equal weights are not the answer


# ---- AND: the sampler ------------------------------------------------------------------------------------------------


def sampled(module=land, seed=0, weights=HERE, corrected=True, steps=LENGTH, groups=64, particles=128, ess=0.97):
    return module.sample_product(MODELS, weights, groups, particles, LENGTH, steps, generator(seed),
                                 ess if corrected else 0)


def and_scores(module=land, seed=0, steps=LENGTH):
    """z of Z, of E[f] and of the KLs for the weighted paths, then of the surrogate's law and KLs."""
    log_p, log_z = land.product_law(LOG_Q, HERE)
    target, product_kl = log_p.exp(), land.dual_function(LOG_Q, HERE)[1]
    out = sampled(module, seed)
    exact = (out["log_q"] - LOG_Q[:, number(out["x"].clamp(max=3))].T).abs().max().item()  # of a path, its sequence's
    z, w = (out["log_z"] - log_z).exp(), out["log_w"].softmax(1)
    values = [z - 1] + [z * ((w * f[number(out["x"].clamp(max=3))].view_as(w)).sum(1) - target @ f) for f in FEATURES]
    values += list((module.path_kl(out, HERE, True) - product_kl).T)
    law, kl = SURROGATE
    out = sampled(module, seed + 1000, corrected=False, particles=512)
    values += [f[number(out["x"])].view(64, -1).mean(1) - law @ f for f in FEATURES]
    values += list((module.path_kl(out, HERE, False) - kl).T)
    values += list((module.path_kl(out, HERE, True) - product_kl).T)  # by importance weights
    out = sampled(module, seed + 2000, corrected=False, steps=2)  # at any number of steps: the mean of log q / q_i
    ratio = (out["log_q"] @ HERE)[:, None] - out["log_w"].view(-1, 1) - out["log_q"]
    values += list((out["kl"] - ratio).view(64, -1, 2).mean(1).T)
    return [z_score(v, 0) for v in values] + [exact * 1e8]


SURROGATE = land.surrogate_numbers(MODELS, HERE, LENGTH)


def test_sampler_is_unbiased():
    assert max(map(abs, and_scores())) <= 5
    out = sampled()
    assert sum(share for _, share in out["history"]) > 1, "nothing was resampled"
    assert not (out["x"] == MASK).any()
    flat = [land.ExactDenoiser((0.3 * log_q).softmax(0)) for log_q in LOG_Q]
    out = land.sample_product(flat, HERE, 64, 128, LENGTH, LENGTH, generator(4))
    kl = land.path_kl(out, HERE, True)
    assert (kl.std(0) < 0.6 * (kl + out["luck"]).std(0)).all()  # what the luck of the letters is there for


def test_sampler_in_one_step():
    """All letters at once: the product of the models' independent letters, whose Z is a product over places."""
    first = land.predict_all(MODELS, STATES[-1:])[0]  # (2, L, 4)
    for weights in WEIGHTS:
        log_z = torch.einsum("m,mlv->lv", weights, first).logsumexp(1).sum()
        out = sampled(weights=weights, steps=1, groups=4, particles=50)
        assert (out["log_z"] - log_z).abs().max() < 1e-10 and out["log_w"].std() < 1e-10


GATHER = "state = gather(state, (first_slot + ancestors).flatten())"
WEIGHT = 'state["log_w"] = state["log_w"] + torch.where(new, log_c, 0).sum(1)'
AND_BUGS = {
    "no normaliser in the weight": [(WEIGHT, "pass")],
    "mean instead of sum of the normalisers": [(WEIGHT, WEIGHT.replace("sum(1)", "mean(1)"))],
    "the normaliser of all masked places": [(WEIGHT, WEIGHT.replace("new,", "masked,"))],
    "the inverse normaliser": [(WEIGHT, WEIGHT.replace("log_c,", "-log_c,"))],
    "letters not normalised": [("return summed - log_c[:, :, None], log_c", "return summed, log_c")],
    "weights kept after resampling": [('state["log_w"] = torch.where(due[:, None], 0, log_w).flatten()', "pass")],
    "log Z not accumulated": [("log_z = log_z + torch.where(due, log_mean_exp(log_w), 0)", "pass")],
    "ancestors off by one": [("(first_slot + ancestors).flatten()",
                              "(first_slot + (ancestors + 1) % particles).flatten()")],
    "log_q not gathered": [(GATHER, f'{GATHER[:8]}dict({GATHER[8:]}, log_q=state["log_q"])')],
    "letters' log_p not gathered": [(GATHER, f'{GATHER[:8]}dict({GATHER[8:]}, log_p=state["log_p"])')],
    "the models are not called again": [('if (x[0] == MASK).any():\n            state["log_p"]',
                                         'if False:\n            state["log_p"]')],
    "KL of the letters the wrong way round": [("return (log_p.exp() * (log_p - log_q)).sum(-1)",
                                               "return (log_q.exp() * (log_q - log_p)).sum(-1)")],
    "mean of the letters' KL, not of so many": [('state["kl"] + count * apart, ', 'state["kl"] + apart, ')],
    "KL without log Z": [('return gap - out["luck"] - total - ', 'return gap - out["luck"] - ')],
    "luck without the normalisers": [("(apart + (log_c[:, None] * share).sum(2))", "apart")],
    "KL the wrong way round": [('[:, None] - out["log_q"]  # (N, m)', '[:, None] * -1 + out["log_q"]')],
    "KL without weights": [("gap = (log_w.softmax(1)", "gap = (torch.zeros_like(log_w).softmax(1)")],
}


@pytest.mark.parametrize("bug", AND_BUGS)
def test_planted_bug_of_and_is_caught(bug):
    assert max(map(abs, and_scores(planted("dna/and_composition.py", *AND_BUGS[bug])))) > 5


def dual_args(**options):
    return types.SimpleNamespace(**(dict(dual_steps=16, dual_groups=10, particles=1000, dual_lr=0.05, steps=LENGTH,
                                         ess=0.5, resampling="systematic") | options))


def test_multipliers_of_and():
    """By weighted paths those of the product, by the surrogate's KLs those at which its own are equal."""
    weights, path = land.constrained_weights(MODELS, LENGTH, dual_args(), generator(5), True)
    spread = (land.product_law(LOG_Q, BEST)[0].exp() @ (LOG_Q[0] - LOG_Q[1]) ** 2).sqrt().item()
    assert (weights - BEST).abs().max() < 4 / spread / (8 * 10_000 * 0.5) ** 0.5 < 6e-3 and len(path) == 17
    weights, _ = land.constrained_weights(MODELS, LENGTH, dual_args(), generator(6), False)
    kl = land.surrogate_numbers(MODELS, weights, LENGTH)[1]
    assert abs(kl[0] - kl[1]) < 0.1 and (weights - BEST).abs().max() > 0.02


# ---- OR --------------------------------------------------------------------------------------------------------------


def test_mixture_letters_are_the_denoiser_of_the_mixture():
    masses = torch.stack([model.log_mass[(STATES * model.place).sum(1)] for model in MODELS], 1)
    for weights in WEIGHTS:
        exact = lor.ExactDenoiser(weights @ LOG_Q.exp())(STATES)
        found = lor.mixture_letters(land.predict_all(MODELS, STATES), masses, weights)
        assert (found - exact)[STATES == MASK].abs().max() < 1e-10


def mixture_scores(module=lor, seed=0, steps=LENGTH):
    """z of the mixture's law and entropy, and whether log_q is that of the sequences."""
    weights = WEIGHTS[2]
    law = weights @ LOG_Q.exp()
    out = module.mixture_paths(MODELS, weights, 10_000, LENGTH, steps, generator(seed))
    index = number(out["x"].clamp(max=3))
    values = [f[index] - law @ f for f in FEATURES] + [out["entropy"] + law @ law.log()]
    exact = (out["log_q"] - LOG_Q[:, index].T).abs().max().item()
    return [z_score(v, 0) for v in values] + [exact * 1e8]


def test_mixture_paths():
    assert max(map(abs, mixture_scores())) <= 5
    x0 = X[::3]
    out = lor.mixture_paths(MODELS, WEIGHTS[0], len(x0), LENGTH, LENGTH, generator(1), x0)
    assert (out["x"] == x0).all() and (out["log_q"] - LOG_Q[:, ::3].T).abs().max() < 1e-10
    corner = lor.mixture_paths(MODELS, torch.tensor([0.0, 1.0], dtype=F), 5000, LENGTH, LENGTH, generator(2))
    assert abs(z_score(corner["entropy"], -LOG_Q[1].exp() @ LOG_Q[1])) < 5
    assert corner["entropy"].std() < 0.7 * corner["log_q"][:, 1].std()  # less spread than -log q itself


OR_BUGS = {
    "weights instead of their posterior": [("(weights.log().to(log_q) + log_q).log_softmax(1)",
                                            "(weights.log().to(log_q) + 0 * log_q).log_softmax(1)")],
    "posterior of the logarithms": [("return (posterior[:, :, None, None] + log_p).logsumexp(1)",
                                     "return (posterior.exp()[:, :, None, None] * log_p).sum(1).log_softmax(2)")],
    "log_q not accumulated": [("log_q = log_q + torch.stack(", "log_q = torch.stack(")],
    "entropy of all places": [("entropy = entropy + count * surprise / masked.sum(1)",
                               "entropy = entropy + count * surprise / x.shape[1]")],
    "the models are not called again": [("if (x[0] == MASK).any():\n            log_p",
                                         "if False:\n            log_p")],
}


@pytest.mark.parametrize("bug", OR_BUGS)
def test_planted_bug_of_or_is_caught(bug):
    assert max(map(abs, mixture_scores(planted("dna/or_composition.py", *OR_BUGS[bug])))) > 5


def exact_problem(log_q=LOG_Q):
    return types.SimpleNamespace(log_q=log_q, entropy=-(log_q.exp() * log_q).sum(1), data=[None] * len(log_q))


def tables(log_q=LOG_Q, n=10_000):
    """log_q at evenly spaced quantiles of every law: its mean but for 1 / n."""
    found = []
    for p, entropy in zip(log_q.exp(), exact_problem(log_q).entropy):
        index = lor.invert_cdf(p[None], ((torch.arange(n, dtype=F) + 0.5) / n)[None])[0]
        found.append((log_q[:, index].T, torch.full((n,), 1 / n, dtype=F), entropy.item()))
    return found


THREE = torch.cat([LOG_Q, ((LOG_Q[0].exp() + LOG_Q[1].exp()) / 2).log()[None]])  # whose third is superfluous


@pytest.mark.parametrize("objective", ["kl", "elbo"])
@pytest.mark.parametrize("log_q", [LOG_Q, THREE], ids=["two", "three"])
def test_multipliers_of_or(log_q, objective):
    """Exact ones: KKT, and the fixed point of Blahut and Arimoto; those by ascent on tables within 1e-3."""
    problem = exact_problem(log_q)
    exact = lor.exact_weights(problem, objective)
    gain = lor.divergences(problem, exact) + (problem.entropy if objective == "elbo" else 0)
    assert (gain[exact > 1e-4] - gain.max()).abs().max() < 1e-4
    if len(log_q) == 2:
        weights = torch.full_like(exact, 0.5)
        for _ in range(20_000):  # Blahut and Arimoto
            rise = lor.divergences(problem, weights) + (problem.entropy if objective == "elbo" else 0)
            weights = (weights.log() + rise).softmax(0)
        assert (exact - weights).abs().max() < 1e-4
        args = dual_args(dual_steps=100, dual_lr=0.1)
        weights, path = lor.primal_dual(tables(log_q), objective, args)
        assert (weights - exact).abs().max() < 1e-3 and len(path) == 101
        swapped = planted("dna/or_composition.py", ("kl = log_q[:, i] - (weights", "kl = -log_q[:, i] + (weights"))
        assert (swapped.primal_dual(tables(log_q), objective, args)[0] - exact).abs().max() > 0.01


def pooled(n=20_000):
    """Draws of both laws, each of which serves both."""
    index = torch.multinomial(LOG_Q.exp(), n, replacement=True, generator=generator(9))
    return lor.pooled_tables(LOG_Q.T[index], exact_problem().entropy)


def test_draws_of_all_laws_serve_each():
    for weights in WEIGHTS:
        kl = lor.divergences(exact_problem(), weights)
        for i, gap in enumerate(lor.mixture_gap(pooled(), weights, "kl")):
            assert abs(z_score(gap, kl[i])) < 5
            own = LOG_Q[i] - (weights @ LOG_Q.exp()).log()  # the error of as many draws of the law itself
            assert gap.std() / len(gap) ** 0.5 < 0.8 * (LOG_Q[i].exp() @ (own - kl[i]) ** 2 / 20_000) ** 0.5
    weights, _ = lor.primal_dual(pooled(), "kl", dual_args(dual_steps=100, dual_lr=0.1))
    assert (weights - lor.exact_weights(exact_problem(), "kl")).abs().max() < 0.01


def test_gaps_are_kl_and_cross_entropy():
    problem, weights = exact_problem(), WEIGHTS[0]
    kl = lor.divergences(problem, weights)
    cross = [-(q.exp() @ (weights @ LOG_Q.exp()).log()).item() for q in LOG_Q]
    for i, (a, b) in enumerate(zip(*(lor.mixture_gap(tables(), weights, objective) for objective in ("kl", "elbo")))):
        assert abs(a.mean() - kl[i]) < 2e-3 and abs(b.mean() - cross[i]) < 2e-3


# ---- models of cell types --------------------------------------------------------------------------------------------


def tiny_world():
    """Elements of two kinds, rich in A and T or in G and C, and a small network that knows neither."""
    rng = generator(7)
    codes = torch.cat([torch.randint(2, (300, 20), generator=rng) * 3, 1 + torch.randint(2, (300, 20), generator=rng)])
    elements = types.SimpleNamespace(codes=codes.byte(), chrom=torch.full((600,), 5, dtype=torch.uint8), kind="classes",
                                     names=["at", "gc"], targets=torch.eye(2).repeat_interleave(300, 0))
    net = land.MaskedDenoiser(16, 5, [1], rng).requires_grad_(False)
    return types.SimpleNamespace(name="tiny", elements=elements, network=net)


def tiny_args(**options):
    return types.SimpleNamespace(**(dict(device="cpu", seed=0, batch=16, updates=60, lr=0.02, bf16=False, resume=False,
                                         cells=["at", "gc"]) | options))


def test_cell_models_learn_their_elements(tmp_path, capsys):
    world, args = tiny_world(), tiny_args()
    before = [p.clone() for p in world.network.parameters()]
    at, gc = land.cell_models(world, args, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, world.network.parameters()))
    x = world.elements.codes[::30].long()
    bounds = [land.masked_bound(net, x, 4, generator(8)).mean(1) for net in (at, gc)]
    assert (bounds[0] - bounds[1])[:10].max() < -5 and (bounds[1] - bounds[0])[10:].max() < -5
    both = lor.fit_weighted(world, torch.ones(600), "both", args, tmp_path)
    assert max(lor.masked_bound(both, x, 4, generator(8)).mean(1)) < min(bounds[1][:10].min(), bounds[0][10:].min())
    again = land.cell_models(world, tiny_args(resume=True), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again[0].parameters(), at.parameters()))
    capsys.readouterr()
    for bad, text in ((lambda: land.cell_models(world, tiny_args(resume=True, lr=0.5), tmp_path), "other settings"),
                      (lambda: land.fit_weighted(world, torch.ones(5), "bad", args, tmp_path), "one finite weight"),
                      (lambda: land.members(world.elements, "liver"), "no cell type")):
        with pytest.raises(SystemExit) as end:
            bad()
        message = capsys.readouterr().err
        assert end.value.code == 2 and text in message and len(message.strip().splitlines()) == 1


def test_members():
    data = types.SimpleNamespace(names=["a", "b"], kind="activity", targets=torch.arange(200.0).view(100, 2))
    assert land.members(data, "b").sum() == 10 and land.members(data, "b")[-10:].all()


# ---- the scripts -----------------------------------------------------------------------------------------------------


def rows_of(folder, script):
    return {r["name"]: r for r in json.loads((folder / f"dna_{script}/numbers.json").read_text())["rows"]}


def test_quick_runs_of_the_enumerated_world(tmp_path):
    numbers = land.main(land.parse_args(["--world", "mpsa", "--quick", "--out", str(tmp_path)]))
    rows = rows_of(tmp_path, "and_composition")
    assert all(math.isfinite(v) for v in numbers.values())
    assert abs(rows["constrained_smc.mpsa.log_z"]["z"]) < 5 and abs(rows["equal_smc.mpsa.log_z"]["z"]) < 5
    assert abs(numbers["constrained_smc.mpsa.dual_1"] - numbers["exact.mpsa.dual_1"]) < 0.01
    assert numbers["constrained_smc.mpsa.law_worst_kl"] < numbers["constrained.mpsa.law_worst_kl"] \
        < numbers["equal.mpsa.law_worst_kl"] < numbers["model_included.mpsa.worst_kl"]
    runs = [lor.main(lor.parse_args(["--world", "mpsa", "--quick", "--out", str(tmp_path / k)])) for k in "ab"]
    assert runs[0] == runs[1] and all(math.isfinite(v) for v in runs[0].values())
    for objective in ("kl", "elbo"):
        assert abs(runs[0][f"{objective}.mpsa.dual_1"] - runs[0][f"exact_{objective}.mpsa.dual_1"]) < 0.02
        assert runs[0][f"{objective}.mpsa.worst_{'kl' if objective == 'kl' else 'ce'}"] \
            < runs[0][f"equal.mpsa.worst_{'kl' if objective == 'kl' else 'ce'}"]


def test_quick_runs_of_the_real_world(tmp_path):
    numbers = land.main(land.parse_args(["--quick", "--out", str(tmp_path)]))
    assert all(math.isfinite(v) for v in numbers.values())
    for label in ("model_hepg2", "equal", "constrained", "constrained_smc"):
        assert numbers[f"{label}.hepg2.dual_1"] + numbers[f"{label}.hepg2.dual_2"] == pytest.approx(1)
        assert -320 < numbers[f"{label}.hepg2.log_likelihood"] < -200
    assert numbers["real_hepg2.hepg2.oracle_b_hepg2"] > numbers["real_k562.hepg2.oracle_b_hepg2"]
    numbers = lor.main(lor.parse_args(["--quick", "--cells", "hepg2", "k562", "--out", str(tmp_path)]))
    assert all(math.isfinite(v) for v in numbers.values())
    for label in ("base", "model_hepg2", "equal", "kl", "elbo"):
        assert 230 < numbers[f"{label}.hepg2.bound_k562"] < 310
    assert sum(numbers[f"kl.hepg2.share_{cell}"] for cell in ("hepg2", "k562", "gm12878", "hesc")) == pytest.approx(1)


@pytest.mark.parametrize("module", [land, lor])
@pytest.mark.parametrize("flags", ["--cells hepg2", "--cells hepg2 hepg2", "--cells hepg2 liver", "--dual-steps 2",
                                   "--steps 0", "--world mpas", "--quick --paper", "--updates -1", "--device cuda:99",
                                   "--data x.csv --world mpsa", "--data missing.csv", "--checkpoints tests"])
def test_bad_flags_end_in_one_sentence(module, flags, capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        module.main(module.parse_args([*flags.split(), "--out", str(tmp_path / "out")]))
    assert_one_sentence(end, capsys)
    assert not list(tmp_path.glob("out/*/*"))


if __name__ == "__main__":
    scores = torch.tensor([[*and_scores(seed=seed)[:-1], *mixture_scores(seed=seed)[:-1]]
                           for seed in range(1, 1 + int(sys.argv[1]))])
    print(f"{(scores.abs() > 5).sum()} of {scores.numel()} above 5, the largest {scores.abs().max():.2f}, "
          f"{(scores.abs() > 2).double().mean():.1%} above 2")
