"""dna/msdda.py and dna/constrained_alignment.py: identities and z-scores on all sequences of four letters, KKT, bugs.

The z-scores of the weighted merge are of unnormalised averages, mean over groups of Z_g (sum_p w_gp f(x_gp) - E[f]),
exactly unbiased for the product of the path laws in the same number of steps, which matrices of all 5^4 masked states
give.
"""
import json
import math

import pytest
import torch
from conftest import load, planted

msdda, ali = (load(f"dna/{name}.py") for name in ("msdda", "constrained_alignment"))
MASK, LENGTH, STEPS, F = msdda.MASK, 4, 5, torch.float64
WEIGHTS = (0.7, 0.8)
EXPONENTS = [*WEIGHTS, 1 - sum(WEIGHTS)]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def assert_one_sentence(end, capsys):
    text = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(text) == 1 and len(text[0]) > 15, text


def landscape():
    """A law of 4^4 sequences with dependence between neighbours, and two values r_i / kl_weight_i."""
    x = msdda.all_sequences(LENGTH)
    table = torch.randn(LENGTH - 1, 4, 4, generator=generator(0), dtype=F)
    p = sum(table[k][x[:, k], x[:, k + 1]] for k in range(LENGTH - 1)).softmax(0)
    match = torch.stack([(x == torch.tensor(word)).sum(1).double() for word in ((1, 0, 1, 2), (3, 0, 2, 2))])
    return x, p, 1.5 * match + 0.5 * torch.randn(2, len(x), generator=generator(1), dtype=F)


X, P, V = landscape()
LOGS = [(P.log() + v).log_softmax(0) for v in V] + [P.log()]
MODELS = [msdda.ExactDenoiser(log_p.exp()) for log_p in LOGS]
PRODUCT = sum(w * log_p for w, log_p in zip(EXPONENTS, LOGS))  # log masses
TARGET = PRODUCT.softmax(0)
STATES = torch.cartesian_prod(*[torch.arange(5)] * LENGTH)


def number(x):
    return (x * 4 ** torch.arange(x.shape[1] - 1, -1, -1)).sum(1)


def brute_law(letters, steps):
    """Masses (4^4,) of what `steps` steps make, from kernel matrices; letters (5^4, L, 4), perhaps not normalised."""
    masked, law = STATES == MASK, torch.zeros(len(STATES), dtype=F)
    law[-1] = 1
    for step in range(steps, 0, -1):
        kernel = torch.ones(len(STATES), len(STATES), dtype=F)
        for k in range(LENGTH):
            new = letters[:, k][:, STATES[:, k].clamp(max=3)] / step
            stay = torch.full_like(new, 1 - 1 / step)
            kept = (STATES[:, None, k] == STATES[None, :, k]).double()
            kernel *= torch.where(masked[:, None, k], torch.where(masked[None, :, k], stay, new), kept)
        law = law @ kernel
    return law[~masked.any(1)]


LOG_Q, LOG_C = msdda.merge_letters([model(STATES) for model in MODELS], EXPONENTS)
PATHS = brute_law((LOG_Q + LOG_C[:, :, None]).exp(), STEPS)  # of the product of the path laws
MERGED = brute_law(LOG_Q.exp(), STEPS)
FUNCTIONS = torch.stack([V[0], V[1], P.log(), (X[:, 2] == 0).double()])


# ---- MSDDA: the merge ------------------------------------------------------------------------------------------------


def test_merge_is_the_product_of_categoricals():
    p = [model(STATES).exp() for model in MODELS]
    for state, place in ((24, 2), (124, 3), (624, 2)):
        product = [math.prod(float(f[state, place, letter]) ** w for f, w in zip(p, EXPONENTS)) for letter in range(4)]
        assert abs(LOG_C[state, place].exp() - sum(product)) < 1e-10
        assert max(abs(LOG_Q[state, place, k].exp() - v / sum(product)) for k, v in enumerate(product)) < 1e-10
    equal, log_c = msdda.merge_letters([MODELS[0](STATES)] * 2, [0.3, 0.7])
    masked = STATES == MASK
    assert (equal - MODELS[0](STATES))[masked].abs().max() < 1e-10 and log_c[masked].abs().max() < 1e-10


def test_exponents_must_sum_to_one(capsys):
    with pytest.raises(SystemExit) as end:
        msdda.merge_letters([model(STATES[:3]) for model in MODELS[:2]], WEIGHTS)
    assert_one_sentence(end, capsys)


def test_laws_of_many_steps():
    """One letter at a time: a denoiser gives its law, unnormalised products give the product of the laws."""
    rules = [lambda p: p[0], lambda p: p[2], lambda p: sum(w * f for w, f in zip(EXPONENTS, p)),
             lambda p: msdda.merge_letters(p, EXPONENTS)[0], lambda p: msdda.mixed_letters(p, [0.2, 0.5, 0.3])]
    laws = msdda.limit_laws(MODELS, rules, LENGTH)
    assert (laws[0] - LOGS[0].exp()).abs().max() < 1e-12 and (laws[1] - P).abs().max() < 1e-12
    assert (laws[2] - PRODUCT.exp()).abs().max() < 1e-12
    tilted = (P.log() + WEIGHTS[0] * V[0] + WEIGHTS[1] * V[1]).softmax(0)
    assert (laws[2] / laws[2].sum() - tilted).abs().max() < 1e-12
    log_z = lambda value: (P.log() + value).logsumexp(0)
    mass = log_z(WEIGHTS[0] * V[0] + WEIGHTS[1] * V[1]) - sum(w * log_z(v) for w, v in zip(WEIGHTS, V))
    assert abs(laws[2].sum().log() - mass) < 1e-10
    assert abs(laws[3].sum() - 1) < 1e-12 and abs(laws[4].sum() - 1) < 1e-12
    assert 0.02 < 0.5 * (laws[3] - tilted).abs().sum() < 0.5  # what the merge misses


def test_laws_of_many_steps_are_the_limit():
    limit = msdda.limit_laws(MODELS, [lambda p: msdda.merge_letters(p, EXPONENTS)[0]], LENGTH)[0]
    distance = [(brute_law(LOG_Q.exp(), steps) - limit).abs().sum() for steps in (20, 40)]
    assert 1.8 < distance[0] / distance[1] < 2.2


def test_step_level_models_multiply_exactly():
    kernels = [msdda.step_level(P, v) for v in (*V, WEIGHTS[0] * V[0] + WEIGHTS[1] * V[1])]
    masked = STATES == MASK
    merged, _ = msdda.merge_letters([kernels[0](STATES), kernels[1](STATES), MODELS[2](STATES)], EXPONENTS)
    assert (merged - kernels[2](STATES))[masked].abs().max() < 1e-10
    for state, place in ((STATES[-1], 0), (torch.tensor([1, MASK, 2, MASK]), 3), (torch.tensor([MASK, 0, 1, 2]), 0)):
        raw = []
        for letter in range(4):
            there = state.clone()
            there[place] = letter
            agree = ((X == there) | (there == MASK)).all(1)
            mass = P[agree].sum()
            raw.append(mass.log() + P[agree] @ V[0][agree] / mass)
        exact = torch.stack(raw).log_softmax(0)
        assert (kernels[0](state[None])[0, place] - exact).abs().max() < 1e-10


def run(module=msdda, seed=0, groups=256, particles=64, ess=1.0, models=MODELS, exponents=EXPONENTS):
    return module.merged_paths(models, exponents, groups * particles, LENGTH, STEPS, generator(seed), particles, ess)


def z_scores(out):
    log_w, z = out["log_w"], out["log_z"].exp().clamp(max=10 * PATHS.sum())  # a bug must not drown in its own variance
    f = FUNCTIONS[:, number(out["x"])].view(len(FUNCTIONS), *log_w.shape)
    centred = ((f * log_w.softmax(1)).sum(2) - (FUNCTIONS @ PATHS / PATHS.sum())[:, None]) * z
    scores = torch.cat([centred, z[None] - PATHS.sum()])
    return (scores.mean(1) / scores.std(1) * len(z) ** 0.5).tolist()


@pytest.mark.parametrize("ess", [0.0, 1.0])
def test_weighted_merge_is_unbiased(ess):
    out = run(ess=ess)
    assert ess == 0 or sum(out["history"]) > 1, "nothing was resampled"
    assert max(map(abs, z_scores(out))) <= 5


def test_merge_without_weights_has_its_own_law():
    x = run(seed=1, particles=1)["x"]
    assert (x < MASK).all()
    x = torch.cat([x, run(seed=2, groups=20000, particles=1, ess=0.0)["x"]])
    for f in FUNCTIONS:
        values, exact = f[number(x)], MERGED @ f
        assert abs(values.mean() - exact) < 5 * values.std() / len(values) ** 0.5
    gaps = [abs(FUNCTIONS[k] @ (MERGED - PATHS / PATHS.sum())) for k in range(4)]
    assert max(gaps) > 0.02


GATHER = "state = gather(state, (first_slot + ancestors).flatten())"
WEIGHT = 'log_w=state["log_w"] + torch.where(new, log_c, 0).sum(1)'
BUGS = {
    "no log C": [(WEIGHT, 'log_w=state["log_w"]')],
    "C of all places": [(WEIGHT, 'log_w=state["log_w"] + log_c.sum(1)')],
    "C the wrong way round": [(WEIGHT, WEIGHT.replace("+ torch", "- torch"))],
    "letters not gathered": [(GATHER, GATHER.replace("gather(", "dict(gather(")
                              + ', log_p_0=state["log_p_0"])')],
    "sequences not gathered": [(GATHER, GATHER.replace("gather(", "dict(gather(") + ', x=state["x"])')],
    "weights kept after resampling": [('state["log_w"] = torch.where(due[:, None], 0, log_w).flatten()', "pass")],
    "log Z not accumulated": [("log_z = log_z + torch.where(due, log_mean_exp(log_w), 0)", "pass")],
    "ancestors off by one": [("(first_slot + ancestors).flatten()",
                              "(first_slot + (ancestors + 1) % particles).flatten()")],
    "mean of the letters' C": [(WEIGHT, WEIGHT.replace(".sum(1)", ".mean(1)"))],
    "a model left behind": [("for k, model in enumerate(models):\n            state[f",
                             "for k, model in enumerate(models[:-1]):\n            state[f")],
    "product not normalised": [("return product - log_c[:, :, None], log_c", "return product, log_c * 0")],
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_in_the_merge_is_caught(bug):
    assert max(map(abs, z_scores(run(planted("dna/msdda.py", *BUGS[bug]))))) > 5


def test_base_left_out_is_caught():
    """Without the base, and exponents scaled to one, the merge is at another temperature."""
    scaled = [w / sum(WEIGHTS) for w in WEIGHTS]
    assert max(map(abs, z_scores(run(models=MODELS[:2], exponents=scaled)))) > 5


def test_calls_are_counted_and_skipped():
    calls = []
    counted = [lambda x, model=model: calls.append(len(x)) or model(x) for model in MODELS]
    out = run(models=counted, groups=20, particles=5)
    assert out["rows"] == sum(calls) < 3 * 100 * (LENGTH + 1)


# ---- MSDDA: the baselines --------------------------------------------------------------------------------------------


def test_mixture_and_switch():
    shares = [0.2, 0.5, 0.3]
    p = torch.stack([model(STATES).exp() for model in MODELS])
    average = (torch.tensor(shares, dtype=F)[:, None, None, None] * p).sum(0)
    assert (msdda.mixture(MODELS, shares)(STATES).exp() - average).abs().max() < 1e-12
    letters = msdda.switch_models(MODELS, shares, generator(0))(STATES[-1:].expand(20000, -1))[:, 1].exp()
    whose = (letters[:, None] - p[:, -1, 1][None]).abs().sum(2).argmin(1)
    assert (letters - p[:, -1, 1][whose]).abs().max() < 1e-12  # always one of the models
    counts = torch.bincount(whose, minlength=3) / 20000
    assert (counts - torch.tensor(shares)).abs().max() < 5 * (0.25 / 20000) ** 0.5


def test_soup_averages_weights():
    nets = [msdda.MaskedDenoiser(8, 3, [1], generator(k)) for k in range(3)]
    soup = msdda.average_weights(nets, [0.5, 0.75, -0.25]).state_dict()
    for name, value in soup.items():
        a, b, c = (net.state_dict()[name] for net in nets)
        assert (value - (0.5 * a + 0.75 * b - 0.25 * c)).abs().max() < 1e-6
    corner, x = msdda.average_weights(nets, [0.0, 1.0, 0.0]), STATES[:50]
    assert (corner(x) - nets[1](x)).abs().max() < 1e-6 and (corner(x) - nets[0](x)).abs().max() > 1e-3


# ---- constrained alignment: rewards and multipliers ------------------------------------------------------------------

CHAIN = ali.MarkovChain(torch.randint(4, (500, 30), generator=generator(3)) // torch.tensor([1, 2, 1] * 10), 2)


def test_naturalness():
    x = torch.randint(4, (7, 12), generator=generator(4))
    exact = -CHAIN.bound(x) / 12
    assert (ali.naturalness(CHAIN, x) - exact).abs().max() < 1e-10
    assert (ali.naturalness(CHAIN, torch.nn.functional.one_hot(x, 4).double()) - exact).abs().max() < 1e-10
    p = torch.rand(LENGTH, 4, generator=generator(5), dtype=F).requires_grad_()
    mean = torch.stack([p[k][X[:, k]] for k in range(LENGTH)]).prod(0) @ (-CHAIN.bound(X) / LENGTH)
    q = p / p.sum(1, keepdim=True)  # the mean is over normalised letters
    mean = torch.stack([q[k][X[:, k]] for k in range(LENGTH)]).prod(0) @ (-CHAIN.bound(X) / LENGTH)
    value = ali.naturalness(CHAIN, q[None])[0]
    assert abs(value - mean) < 1e-10
    both = [torch.autograd.grad(v, p, retain_graph=True)[0] for v in (value, mean)]
    assert (both[0] - both[1]).abs().max() < 1e-10


def small_problem(b, module=ali):
    """Two rewards of four letters, as make_problem has them."""
    problem = module.types.SimpleNamespace(codes=X, log_q=P.log(), b=torch.tensor(b, dtype=F),
                                           r=torch.stack([V[0], -CHAIN.bound(X) / LENGTH]))
    problem.mean = problem.r @ P
    problem.scale = ((problem.r - problem.mean[:, None]) ** 2 @ P).sqrt()
    dual = module.maximise_dual(lambda v: module.dual_function(problem, v), 2, 0)
    problem.dual = module.newton(problem, dual)
    return problem


BOTH, INACTIVE = (2.4, -1.5), (2.4, -3.0)


@pytest.mark.parametrize("b", [BOTH, INACTIVE])
def test_multipliers_meet_kkt_without_gap(b):
    problem = small_problem(b)
    p, log_z = ali.aligned_law(problem, problem.dual)
    value, gradient = ali.dual_function(problem, problem.dual)
    assert (gradient <= 1e-10).all() and (problem.dual >= 0).all()  # every threshold is met
    assert (problem.dual * gradient).abs().max() < 1e-10
    assert (problem.dual > 1e-12).tolist() == [True, b is BOTH]  # SLSQP of scipy 1.15 leaves a rounding of 0
    kl = (p * (p / P).log()).sum()
    assert abs(kl - value) < 1e-10
    other = ali.aligned_law(problem, problem.dual + torch.tensor([0.3, -0.2 * problem.dual[1]]))[0]
    met = (problem.r @ other >= problem.b).all()
    assert not met or (other * (other / P).log()).sum() > kl
    for i in range(2):  # the gradient, by differences
        step = 1e-5 * torch.eye(2, dtype=F)[i]
        around = [ali.dual_function(problem, problem.dual + s * step)[0] for s in (1, -1)]
        assert abs((around[0] - around[1]) / 2e-5 - gradient[i]) < 1e-8


def test_the_same_law_is_the_most_active_within_its_kl():
    """max E[r_1] with KL <= KL* and r_2 above its threshold is b_1: no mixture or other tilt in the family beats it."""
    problem = small_problem(BOTH)
    best = ali.dual_function(problem, problem.dual)[0]
    price, more = 1 / problem.dual[0], problem.dual[1] / problem.dual[0]
    log_z = (P.log() + (problem.r[0] + more * problem.r[1]) / price).logsumexp(0)
    bound = price * (log_z + best) - more * problem.b[1]  # the dual of that problem, at these multipliers
    assert abs(bound - problem.b[0]) < 1e-10
    up = small_problem((BOTH[0] + 1e-4, BOTH[1]))
    assert abs((ali.dual_function(up, up.dual)[0] - best) / 1e-4 - problem.dual[0]) < 1e-2  # the price of the threshold


ARGS = ali.parse_args(["--world", "mpsa", "--dual-lr", "0.2"])


@pytest.mark.parametrize("b", [BOTH, INACTIVE])
def test_dual_ascent_reaches_the_exact_multipliers(b):
    problem = small_problem(b)
    assert (ali.exact_ascent(problem, ARGS)[-1] - problem.dual).abs().max() < 1e-3


UPDATE = "dual_update(dual, (problem.b - reward) / problem.scale.cpu() ** 2, memory"
ASCENT_BUGS = {
    "wrong sign of the dual step": [(UPDATE, UPDATE.replace("problem.b - reward", "reward - problem.b"))],
    "threshold left out": [(UPDATE, UPDATE.replace("problem.b - reward", "-reward"))],
    "multipliers not projected": [("return dual.clamp(min=0), memory", "return dual, memory")],
    "rewards of the base law": [("dual, memory = raise_duals(problem, path[-1], (problem.r @ p).cpu()",
                                 "dual, memory = raise_duals(problem, path[-1], problem.mean")],
    "tilt the wrong way": [("log_p = problem.log_q + dual", "log_p = problem.log_q - dual")],
}


@pytest.mark.parametrize("bug", ASCENT_BUGS)
def test_planted_bug_in_the_ascent_is_caught(bug):
    module = planted("dna/constrained_alignment.py", *ASCENT_BUGS[bug])
    worst = []
    for b in (BOTH, INACTIVE):
        problem = small_problem(b)
        worst.append((module.exact_ascent(problem, ARGS)[-1] - problem.dual).abs().max())
    assert max(worst) > 1e-2


def test_feasible_thresholds(capsys):
    r = torch.randn(2, 300, generator=generator(6), dtype=F)
    few = ali.undominated(r)
    for point in r.T:
        assert (few.T >= point).all(1).any()
    for point in few.T:
        assert not ((r.T >= point).all(1) & (r.T > point).any(1)).any()
    ali.check_feasible(few, few[:, len(few[0]) // 2] - 1e-6)
    with pytest.raises(SystemExit) as end:
        ali.check_feasible(few, few.max(1).values - torch.tensor([1e-3, 1e-3]).double())
    assert_one_sentence(end, capsys)


def path_kl(module):
    """(mean KL of the paths of the tilted model from the base, its standard error), in many steps."""
    tilted = module.ExactDenoiser(LOGS[0].exp())
    kl = module.sample_trajectories(tilted, module.ExactDenoiser(P), 4000, LENGTH, 64, generator(7))["kl"]
    return kl.mean().item(), kl.std().item() / 4000**0.5


def test_kl_of_the_paths():
    """Of many steps, hence nearly that of the laws, which it exceeds."""
    p = LOGS[0].exp()
    exact = (p * (p / P).log()).sum().item()
    mean, se = path_kl(ali)
    assert abs(mean - exact) < 5 * se + 0.02 * exact
    for bug in ([("(log_p.exp() * (log_p - base_log_p)).sum(2)", "(base_log_p.exp() * (base_log_p - log_p)).sum(2)")],
                [("(log_p.exp() * (log_p - base_log_p)).sum(2)", "(log_p.exp() * (log_p - base_log_p)).mean(2)")]):
        mean, se = path_kl(planted("dna/constrained_alignment.py", *bug))
        assert abs(mean - exact) > 5 * se + 0.02 * exact


# ---- the scripts -----------------------------------------------------------------------------------------------------

MPSA = {"msdda": "--world mpsa --quick --weights 0.5,0.5", "constrained_alignment": "--world mpsa --quick"}
HEPG2 = {"msdda": "--quick --weights 0.5,0.5 --samples 16 --updates 2",
         "constrained_alignment": "--quick --samples 16 --batch 4 --steps 6 --truncate 2"}
MODULES = {"msdda": msdda, "constrained_alignment": ali}


def rows_of(folder, script):
    return {r["name"]: r for r in json.loads((folder / f"dna_{script}/numbers.json").read_text())["rows"]}


def main(script, flags, folder):
    return MODULES[script].main(MODULES[script].parse_args([*flags.split(), "--out", str(folder)]))


def test_quick_merge_of_the_enumerated_world(tmp_path):
    numbers = main("msdda", MPSA["msdda"], tmp_path)
    assert all(math.isfinite(v) for v in numbers.values())
    rows = rows_of(tmp_path, "msdda")
    assert rows["step_level_merged.mpsa.error_w50_50"]["estimate"] < 1e-10
    assert abs(rows["msdda_smc.mpsa.log_z_w50_50"]["z"]) < 5
    assert rows["msdda_limit.mpsa.kl_w50_50"]["estimate"] > 0.01
    assert rows["mixture_limit.mpsa.kl_w50_50"]["estimate"] > 0.01


def test_quick_constraints_of_the_enumerated_world_and_resume(tmp_path, monkeypatch):
    whole = main("constrained_alignment", MPSA["constrained_alignment"] + " --rounds 20", tmp_path / "a")
    assert all(math.isfinite(v) for v in whole.values())
    assert abs(whole["dual_only.mpsa.dual_1"] - whole["exact.mpsa.dual_1"]) < 1e-3
    assert abs(whole["dual_only.mpsa.dual_2"] - whole["exact.mpsa.dual_2"]) < 1e-3
    assert abs(whole["exact.mpsa.dual_value"] - whole["exact.mpsa.kl"]) < 1e-10
    assert whole["exact_equal.mpsa.reward_1"] < whole["threshold.mpsa.reward_1"] - 0.1  # the penalty misses one
    progress = ali.progress

    def interrupted(label, done, total):
        if label.startswith("constrained") and done == 13:
            raise KeyboardInterrupt
        progress(label, done, total)

    monkeypatch.setattr(ali, "progress", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main("constrained_alignment", MPSA["constrained_alignment"] + " --rounds 20", tmp_path / "b")
    monkeypatch.setattr(ali, "progress", progress)
    again = main("constrained_alignment", MPSA["constrained_alignment"] + " --rounds 20 --resume", tmp_path / "b")
    assert again == whole
    figures = [tmp_path / f"{k}/dna_constrained_alignment/figure.png" for k in "ab"]
    assert figures[0].read_bytes() == figures[1].read_bytes()
    with pytest.raises(SystemExit) as end:
        main("constrained_alignment", MPSA["constrained_alignment"] + " --rounds 30 --resume", tmp_path / "b")
    assert end.value.code == 2


@pytest.mark.parametrize("script", MODULES)
def test_quick_run_of_the_real_world(script, tmp_path):
    numbers = main(script, HEPG2[script], tmp_path)
    assert all(math.isfinite(v) for v in numbers.values())
    for label in ("real_hepg2", *(["base_w0_0", "msdda_smc_w50_50"] if script == "msdda" else ["base", "constrained"])):
        assert 0 <= numbers[f"{label}.hepg2.accessible"] <= 1 and 60 < numbers[f"{label}.hepg2.diversity"] < 140
    if script == "msdda":
        assert 0.05 <= numbers["tuned_1.hepg2.effective_share"] < 1 > numbers["tuned_2.hepg2.effective_share"] >= 0.05


def test_weights_of_elements_must_fit(tmp_path, capsys):
    world = msdda.types.SimpleNamespace(elements=msdda.types.SimpleNamespace(
        codes=torch.zeros(6, 8, dtype=torch.uint8), chrom=torch.tensor([1, 2, 3, 4, 5, 6])))
    for bad in (torch.ones(3), torch.tensor([1.0, 1, math.nan, 1]), torch.zeros(4)):
        with pytest.raises(SystemExit) as end:
            msdda.fit_weighted(world, bad, "bad", msdda.parse_args([]), tmp_path)
        assert_one_sentence(end, capsys)


@pytest.mark.parametrize("script, flags", [
    ("msdda", "--weights 0.5"), ("msdda", "--weights nan,1"), ("msdda", "--samples 30"), ("msdda", "--ess 2"),
    ("msdda", "--world mpsa --second k562"), ("msdda", "--second atac"), ("msdda", "--kl-weight 1 0"),
    ("msdda", "--data missing.csv"), ("constrained_alignment", "--threshold 1"),
    ("constrained_alignment", "--threshold nan 1"), ("constrained_alignment", "--rounds 3"),
    ("constrained_alignment", "--truncate 90"), ("constrained_alignment", "--world mpsa --threshold 2.4 -1.4"),
    ("constrained_alignment", "--primal reinforce"), ("constrained_alignment", "--checkpoints tests"),
    ("constrained_alignment", "--device cuda:99")])
def test_bad_flags_end_in_one_sentence(script, flags, capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        main(script, flags, tmp_path / "out")
    assert_one_sentence(end, capsys)
    assert not list(tmp_path.glob("out/*/*"))
