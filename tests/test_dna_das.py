"""dna/das.py: the enumerated law of the sampler, its look-ahead and tilt, and z-scores on all sequences of five letters.

The z-scores are of unnormalised averages, mean over groups of Z_g (sum_p w_gp f(x_gp) - E[f]), which are exactly
unbiased at any number of particles, for the law of the sampler with its own number of steps; and of normalised ones,
whose bias of order 1 / particles is small beside their error at 64 groups of 256. So |z| > 5 is a bug. False alarms:
`python tests/test_dna_das.py 200` runs 200 seeds.
"""
import json
import math
import sys

import pytest
import torch
from conftest import REPOSITORY, load, planted

das, pretrain = load("dna/das.py"), load("dna/pretrain.py")
MASK, LENGTH, STEPS, KL_WEIGHT = das.MASK, 5, 6, 0.2


def generator(seed):
    return torch.Generator().manual_seed(seed)


def assert_one_sentence(end, capsys):
    text = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(text) == 1 and len(text[0]) > 15, text


def landscape():
    """A law of 4^5 sequences with strong dependence between neighbours, and a reward that is high where it is rare."""
    x = das.all_sequences(LENGTH)
    table = 1.5 * torch.randn(LENGTH - 1, 4, 4, generator=generator(0), dtype=torch.float64)
    p = sum(table[k][x[:, k], x[:, k + 1]] for k in range(LENGTH - 1)).softmax(0)
    match = (x == torch.tensor([1, 0, 1, 2, 3])).double().mean(1)
    return x, p, match + 0.1 * torch.randn(len(x), generator=generator(1), dtype=torch.float64)


X, P, R = landscape()
DENOISER, REWARD = das.ExactDenoiser(P), das.TableReward(R)
JUMPS = das.jump_laws(P)
OWN = das.sampler_law(JUMPS, STEPS)  # the law of the sampler in six steps
TARGET = (OWN.log() + R / KL_WEIGHT).softmax(0)
LOG_Z = (OWN.log() + R / KL_WEIGHT).logsumexp(0).item()
STATES = torch.cartesian_prod(*[torch.arange(5)] * LENGTH)


def number(x):
    """Tokens (n, L) -> their places in X."""
    return (x * 4 ** torch.arange(x.shape[1] - 1, -1, -1)).sum(1)


# ---- the law of the sampler ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 5, 12])
def test_jump_laws_are_the_law_of_the_sampler(steps):
    """Against the kernel matrices of the 5^3 masked states, applied step by step."""
    x = das.all_sequences(3)
    p = torch.randn(64, generator=generator(2), dtype=torch.float64).softmax(0)
    states = torch.cartesian_prod(*[torch.arange(5)] * 3)
    d, masked = das.ExactDenoiser(p)(states).exp(), states == MASK
    law = torch.zeros(len(states), dtype=torch.float64)
    law[-1] = 1
    for step in range(steps, 0, -1):
        kernel = torch.ones(len(states), len(states), dtype=torch.float64)
        for k in range(3):
            new = d[:, k][:, states[:, k].clamp(max=3)] / step
            stay = torch.full_like(new, 1 - 1 / step)
            kept = (states[:, None, k] == states[None, :, k]).double()
            kernel *= torch.where(masked[:, None, k], torch.where(masked[None, :, k], stay, new), kept)
        law = law @ kernel
    exact = law[~masked.any(1)]
    assert abs(exact.sum() - 1) < 1e-12 and len(exact) == len(x)
    assert (das.sampler_law(das.jump_laws(p), steps) - exact).abs().max() < 1e-12


def test_the_cost_of_few_steps_falls_as_one_over_steps():
    assert abs(JUMPS[-1].sum() - math.factorial(LENGTH)) < 1e-9  # orders of one letter a jump
    assert (JUMPS[-1] / math.factorial(LENGTH) - P).abs().max() < 1e-14
    distance = [0.5 * (das.sampler_law(JUMPS, n) - P).abs().sum().item() for n in (1, 32, 64, 128)]
    assert distance[0] > 0.3 and all(abs(a / b - 2) < 0.1 for a, b in zip(distance[1:], distance[2:]))


# ---- the look-ahead --------------------------------------------------------------------------------------------------


def brute_soft_value(state):
    agree = ((X == state) | (state == MASK)).all(1)
    return ((P * (R / KL_WEIGHT).exp())[agree].sum() / P[agree].sum()).log()


def test_exact_soft_values():
    look = das.exact_forecast(P, R / KL_WEIGHT)
    out = look(STATES)
    for n in range(0, len(STATES), 97):
        assert abs(out["value"][n] - brute_soft_value(STATES[n])) < 1e-10
    limit = (P.log() + R / KL_WEIGHT).logsumexp(0)
    assert abs(out["value"][-1] - limit) < 1e-12
    assert (look(X)["value"] - R / KL_WEIGHT).abs().max() < 1e-10
    tilted = das.ExactDenoiser((P.log() + R / KL_WEIGHT).softmax(0))(STATES)
    masked = STATES == MASK
    log_q = das.tilt_letters(out["log_p"], STATES, out["grad"], torch.ones(len(STATES)), 1, math.inf)
    assert (log_q - tilted)[masked].abs().max() < 1e-10


def look(kind, guided=True, module=das, reward=REWARD, rng=None, chunk=1000, denoiser=DENOISER):
    return lambda x: module.forecast(denoiser, reward, KL_WEIGHT, kind, guided, rng or generator(3), chunk, x)


def brute_mean_reward(state, place=None, letter=None):
    """The mean of R over independent letters of the denoiser; the derivative fixes one letter."""
    p = torch.where((state == MASK)[:, None], DENOISER(state[None])[0].exp(),
                    torch.nn.functional.one_hot(state.clamp(max=3), 4).double())
    if place is not None:
        p[place] = torch.eye(4, dtype=torch.float64)[letter]
    return torch.stack([p[k][X[:, k]] for k in range(LENGTH)]).prod(0) @ R


def test_mean_forecast_and_its_gradient():
    """r is linear in each letter's probabilities, so the derivative is the mean reward with that letter fixed."""
    states = STATES[40::311]
    out = look("mean")(states)
    for n, state in enumerate(states):
        assert abs(out["value"][n] - brute_mean_reward(state) / KL_WEIGHT) < 1e-5  # float32, as for networks
        for place, letter in ((0, 1), (3, 2), (4, 0)):
            expected = brute_mean_reward(state, place, letter) / KL_WEIGHT
            assert abs(out["grad"][n, place, letter] - expected) < 1e-5
    assert (out["log_p"] - DENOISER(states)).abs().max() == 0
    assert look("mean", guided=False)(states)["grad"].abs().max() == 0


def test_hard_forecasts():
    states = STATES[40::311]
    for guided in (True, False):
        out = look("argmax", guided)(states)
        filled = torch.where(states == MASK, DENOISER(states).argmax(2), states)
        assert (out["value"] - REWARD(filled) / KL_WEIGHT).abs().max() < 1e-5
    state = torch.tensor([MASK, MASK, 1, MASK, 0])
    mean, se = das.mean_and_se(look("draws", guided=False)(state.expand(20_000, -1))["value"])
    assert 0 < abs(mean - brute_mean_reward(state) / KL_WEIGHT) < 5 * se
    complete = X[::100]
    assert (look("draws")(complete)["value"] - R[::100] / KL_WEIGHT).abs().max() < 1e-5


def test_chunks_do_not_change_the_look_ahead():
    whole, parts = (look("mean", chunk=c)(STATES[::7]) for c in (1000, 17))
    assert all((whole[key] - parts[key]).abs().max() < 1e-6 for key in whole)


def test_tilt_is_normalised_and_capped():
    out = look("mean")(STATES)
    free, capped, none = (das.tilt_letters(out["log_p"], STATES, out["grad"], torch.full((len(STATES),), t), 3, cap)
                          for t, cap in ((1.0, math.inf), (1.0, 0.2), (0.0, math.inf)))
    masked = STATES == MASK
    for log_q in (free, capped, none):
        assert (log_q.exp().sum(2) - 1).abs().max() < 1e-9
    assert (none - out["log_p"])[masked].abs().max() < 1e-9
    some = masked.any(1)
    shift = torch.where(masked[:, :, None], capped - out["log_p"], 0)
    p = out["log_p"].exp()
    size = (((p * shift**2).sum(2) - (p * shift).sum(2) ** 2) * masked).sum(1).div(3).sqrt()
    assert size[some].max() < 0.2 + 1e-6 and (size > 0.2 - 1e-6).double().mean() > 0.3
    untouched = (size < 0.2 - 1e-6) & some
    assert untouched.any() and (capped - free)[masked & untouched[:, None]].abs().max() < 1e-6


def test_only_new_letters_count():
    log_p = torch.randn(3, 4, 4, generator=generator(4), dtype=torch.float64).log_softmax(2)
    log_p[0, 0] = -math.inf  # what stands at other places, mask or not, is not looked at
    x, new = torch.tensor([[0, 1, MASK, 2], [3, 3, 3, 3], [MASK] * 4]), torch.zeros(3, 4, dtype=torch.bool)
    new[0, 1] = new[0, 3] = new[1, 2] = True
    expected = [log_p[0, 1, 1] + log_p[0, 3, 2], log_p[1, 2, 3], 0.0]
    assert das.letters_log_p(log_p, x, new).tolist() == pytest.approx([float(v) for v in expected])


# ---- the sampler -----------------------------------------------------------------------------------------------------

SETTINGS = {
    "guided": dict(kind="mean"),
    "capped": dict(kind="mean", max_shift=0.3),
    "bootstrap": dict(kind="mean", guided=False),
    "argmax": dict(kind="argmax"),
    "draws, no gradient": dict(kind="draws", guided=False),
    "untempered": dict(kind="mean", temper="none", scheme="ssp"),
    "exact values": dict(kind="exact", temper="none"),
}


def run(module=das, seed=0, groups=64, particles=256, kind="mean", guided=True, steps=STEPS, reward=REWARD, denoiser=DENOISER,
        **options):
    rng = generator(seed)
    ahead = module.exact_forecast(P, R / KL_WEIGHT) if kind == "exact" else look(kind, guided, module, reward, rng,
                                                                                denoiser=denoiser)
    options = dict(ess=0.9, gamma=0.02) | options  # a high threshold forces resampling
    return module.masked_das(ahead, lambda x: reward(x) / KL_WEIGHT, groups * particles, LENGTH, steps, rng, particles,
                             guided=guided, **options)


def z_scores(out):
    """z of Z and of E[f] for some f, normalised and not, over independent groups."""
    groups, particles = out["log_w"].shape
    if (out["x"] == MASK).any():
        return [math.inf]
    z, w, index = (out["log_z"] - LOG_Z).exp(), out["log_w"].softmax(1), number(out["x"])
    values = [z - 1]
    for f in (R, (R > 0.75).double(), (X[:, 0] == 1).double(), ((X[:, 1] == 0) & (X[:, 4] == 3)).double()):
        values.append((w * f[index].view(groups, particles)).sum(1) - TARGET @ f)
        values.append(z * values[-1])
    return [(v.mean() / v.std().clamp(min=1e-12) * groups**0.5).item() for v in values]


@pytest.mark.parametrize("setting", SETTINGS)
def test_sampler_is_unbiased(setting):
    out = run(**SETTINGS[setting])
    assert setting == "exact values" or sum(share for _, _, share in out["history"]) > 1, "nothing was resampled"
    assert max(map(abs, z_scores(out))) <= 5
    assert (out["value"] - R[number(out["x"])] / KL_WEIGHT).abs().max() < 1e-12


@pytest.mark.parametrize("scheme", das.SCHEMES)
def test_sampler_is_unbiased_with_every_scheme(scheme):
    assert max(map(abs, z_scores(run(seed=1, scheme=scheme)))) <= 5


@pytest.mark.parametrize("steps", [1, 3])
def test_sampler_is_unbiased_in_few_steps(steps, monkeypatch):
    law = das.sampler_law(JUMPS, steps)
    monkeypatch.setitem(globals(), "TARGET", (law.log() + R / KL_WEIGHT).softmax(0))
    monkeypatch.setitem(globals(), "LOG_Z", (law.log() + R / KL_WEIGHT).logsumexp(0).item())
    assert max(map(abs, z_scores(run(steps=steps)))) <= 5


def test_adaptive_tempering_ends_at_one_and_is_close():
    """Weights that depend on the particles make the estimate consistent but not exactly unbiased."""
    out = run(temper="adaptive", particles=500, ess=0.7)
    log_z, se = das.log_mean_and_se(out["log_z"])
    assert abs(log_z - LOG_Z) < 5 * se + 0.01
    temper = [t for _, t, _ in out["history"]]
    assert temper == sorted(temper) and temper[0] < temper[-1] <= 1


def test_weights_are_those_of_the_whole_kernel(monkeypatch):
    """Without resampling, log w is the reward plus log p - log q of the path; here with staying masked written out."""
    path, unmask = [], das.unmask

    def recorded(log_q, x, step, rng):
        after, new = unmask(log_q, x, step, rng)
        path.append((log_q, x, after, step))
        return after, new

    monkeypatch.setattr(das, "unmask", recorded)
    out, total = run(ess=0, groups=4), 0

    def kernel(log_p, x, after, step):
        log_density = torch.zeros(len(x), dtype=torch.float64)
        for place in range(LENGTH):
            was, stays = x[:, place] == MASK, after[:, place] == MASK
            letter = log_p[torch.arange(len(x)), place, after[:, place].clamp(max=3)] - math.log(step)
            stay = math.log1p(-1 / step) if step > 1 else -math.inf
            log_density += torch.where(was, torch.where(stays, stay, letter), 0)
        return log_density

    for log_q, x, after, step in path:
        total = total + kernel(DENOISER(x), x, after, step) - kernel(log_q, x, after, step)
    assert (out["log_w"].flatten() - total - out["value"]).abs().max() < 1e-10
    assert total.abs().max() > 1


def test_no_reward_changes_nothing():
    """r = 0: no tilt, equal weights, Z = 1, and the law of the sampler."""
    out = run(reward=das.TableReward(torch.zeros_like(R)))
    assert out["log_w"].abs().max() < 1e-12 and out["log_z"].abs().max() < 1e-12
    base, _ = pretrain.sample_masked(DENOISER, len(out["x"]), LENGTH, STEPS, generator(0))
    for f in (R, P.log(), (X[:, 2] == 0).double()):
        values = f[number(out["x"])]
        assert abs(values.mean() - OWN @ f) < 5 * values.std() / len(values) ** 0.5
    assert (base == out["x"]).all()  # the same draws as the plain sampler


def test_a_constant_in_the_reward_changes_only_z():
    here, there = (run(reward=das.TableReward(R - shift), kind="argmax", guided=False) for shift in (0, 100))
    assert (here["x"] == there["x"]).all()
    assert (here["log_w"].softmax(1) - there["log_w"].softmax(1)).abs().max() < 1e-9
    assert (here["log_z"] - there["log_z"] - 100 / KL_WEIGHT).abs().max() < 1e-9


GATHER = "state = regroup(state, (first_slot + ancestors).flatten())"
CORRECTION = "+ letters_log_p(log_p, x, new) - letters_log_p(log_q, x, new)"
BUGS = {
    "twist not gathered": [(GATHER, f'{GATHER[:8]}dict({GATHER[8:]}, twist=state["twist"])')],
    "forecast not gathered": [(GATHER, f'{GATHER[:8]}dict({GATHER[8:]}, log_p=state["log_p"])')],
    "sequences not gathered": [(GATHER, f'{GATHER[:8]}dict({GATHER[8:]}, x=state["x"])')],
    "mean instead of sum of log probabilities": [("return torch.where(new, letter, 0).sum(1)",
                                                  "return torch.where(new, letter, 0).mean(1)")],
    "no proposal correction": [(CORRECTION, "")],
    "correction the wrong way round": [(CORRECTION, "- letters_log_p(log_p, x, new) + letters_log_p(log_q, x, new)")],
    "tilt not normalised in the weight": [(".log_softmax(2)\n\n\ndef masked_das", "\n\n\ndef masked_das")],
    "half tilt": [("double().mean(0) / kl_weight", "double().mean(0) / kl_weight / 2"),
                  ("checked(value(x[complete]), complete.shape).double()",
                   "checked(value(x[complete]), complete.shape).double() / 2")],
    "log Z not accumulated": [("log_z = log_z + torch.where(due, log_mean_exp(log_w), 0)", "pass")],
    "weights kept after resampling": [('state["log_w"] = torch.where(due[:, None], 0, log_w).flatten()', "pass")],
    "ancestors off by one": [("(first_slot + ancestors).flatten()",
                              "(first_slot + (ancestors + 1) % particles).flatten()")],
    "temper ends below one": [("    temper[-1] = 1\n", "")],
    "twist of the past not taken out": [('state["log_w"] - state["twist"] + letters', 'state["log_w"] + letters')],
    "complete sequences keep their forecast": [("    if len(complete):", "    if False:")],
    "the denoiser is not called again": [("due, complete = (changed & open_)", "due, complete = (changed & ~changed)")],
    "letters set too late": [("u < 1 / step", "u < 1 / (step + 1)")],
    "argmax letters": [("x[new] = invert_cdf(log_p[new].double().exp(), u)[:, 0]", "x[new] = log_p[new].argmax(1)")],
}
SEEN_AT = {"temper ends below one": dict(gamma=0.005)}  # a slow temper


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug):
    setting = SEEN_AT.get(bug, {})
    assert max(map(abs, z_scores(run(**setting)))) <= 5
    assert max(map(abs, z_scores(run(planted("dna/das.py", *BUGS[bug]), **setting)))) > 5


def test_calls_are_skipped_and_nothing_else_changes():
    outs = []
    for module in (das, planted("dna/das.py", ("changed, open_ = new.any(1), (x == MASK).any(1)",
                                               "changed, open_ = new.any(1) | True, (x == MASK).any(1)"))):
        denoiser, reward = module.CountedRows(DENOISER), module.CountedRows(REWARD)
        outs.append((run(module, particles=32, ess=0, steps=40, denoiser=denoiser, reward=reward), denoiser.rows, reward.rows))
    (lazy, calls, rewards), (eager, all_calls, all_rewards) = outs
    n = len(lazy["x"])
    assert (lazy["x"] == eager["x"]).all() and (lazy["log_w"] - eager["log_w"]).abs().max() < 1e-4
    assert 1 + n < calls <= 1 + n * (LENGTH - 1) < all_calls and rewards == calls + n < all_rewards


def test_error_falls_with_the_square_root_of_particles():
    sizes, error = [16, 64, 256, 1024], []
    for particles in sizes:
        out = run(seed=4, particles=particles)
        error.append(((out["log_z"] - LOG_Z).exp() - 1).square().mean().sqrt())
    slope = (torch.stack(error).log().diff() / torch.tensor(sizes).log().diff()).mean()
    assert -0.65 < slope < -0.35
    stale = [run(seed=4, particles=n, regroup=das.gather_without_twist)["log_z"].mean() - LOG_Z for n in sizes[:3]]
    assert stale[-1] > stale[0] > 0.5  # the published defect: a bias, and more of it with more particles


def test_slope():
    x = torch.tensor([1.0, 2.0, 4.0, 7.0]).double()
    value, se = das.slope([(a, 3 - 0.5 * a, 0.1) for a in x.tolist()])
    assert value == pytest.approx(-0.5) and se == pytest.approx(0.1 / float(((x - x.mean()) ** 2).sum() ** 0.5))


@pytest.mark.parametrize("reward, guided, text", [
    (lambda x: torch.full((len(x),), math.nan), False, "finite"),
    (lambda x: torch.zeros(len(x), 2), False, "one finite number"),
    (lambda x: x.argmax(2).double().sum(1), True, "no gradient"),
])
def test_bad_rewards_end_in_one_sentence(reward, guided, text, capsys):
    with pytest.raises(SystemExit) as end:
        look("mean", guided, reward=reward)(STATES[:5])
    message = capsys.readouterr().err
    assert end.value.code == 2 and text in message and len(message.strip().splitlines()) == 1


# ---- the script ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def jump_laws_once():
    """The enumeration of the 5^9 states takes seconds, and its answer does not depend on the run."""
    das.jump_laws, make = (lambda p, kept={}: kept.setdefault(len(p), None) if kept.get(len(p)) is not None
                           else kept.update({len(p): make(p)}) or kept[len(p)]), das.jump_laws
    yield
    das.jump_laws = make


def rows_of(folder):
    return {r["name"]: r for r in json.loads((folder / "dna_das/numbers.json").read_text())["rows"]}


def test_quick_run_of_the_enumerated_world(tmp_path):
    runs = [das.main(das.parse_args(["--world", "mpsa", "--quick", "--out", str(tmp_path / name)])) for name in "ab"]
    keys = [key for key in runs[0] if not key.endswith("per_second")]
    assert all(runs[0][key] == runs[1][key] and math.isfinite(runs[0][key]) for key in keys)
    assert (tmp_path / "a/dna_das/figure.png").read_bytes() == (tmp_path / "b/dna_das/figure.png").read_bytes()
    rows = rows_of(tmp_path / "a")
    for method in ("importance", "bootstrap", "das", "exact_values"):
        assert abs(rows[f"{method}.mpsa.log_z"]["z"]) < 5
    assert abs(rows["own.mpsa.log_z"]["estimate"] - rows["exact.mpsa.log_z"]["estimate"]) < 0.1
    assert rows["das.mpsa.mean_reward"]["estimate"] > rows["pretrained.mpsa.mean_reward"]["estimate"] + 1


def test_quick_run_of_the_real_world(tmp_path):
    numbers = das.main(das.parse_args(["--quick", "--out", str(tmp_path)]))
    assert all(math.isfinite(v) for v in numbers.values())
    for method in ("real_hepg2", "random", "pretrained", "das"):
        assert 0 <= numbers[f"{method}.hepg2.accessible"] <= 1 and 60 < numbers[f"{method}.hepg2.diversity"] < 140
        assert -320 < numbers[f"{method}.hepg2.log_likelihood"] < -200
    assert numbers["das.hepg2.activity"] > numbers["pretrained.hepg2.activity"] > numbers["random.hepg2.activity"] - 2
    assert numbers["das.hepg2.denoiser_calls"] <= 1 + 32 * 15


def write_table(path, length=40, rows=600):
    """A table in the format of the DRAKES release, whose activity in HepG2 is the number of GATA."""
    rng, lines = generator(5), ["seq,hepg2,k562,sknsh,chrom"]
    for k in range(rows):
        seq = "".join("ACGT"[v] for v in torch.randint(4, (length,), generator=rng))
        lines.append(f"{seq},{seq.count('GATA') + 0.01 * (k % 7)},0.1,{k % 3},chr{[*range(1, 23), 'X'][k % 23]}")
    path.write_text("\n".join(lines))
    return path


def test_table_of_the_papers_format(tmp_path):
    path = write_table(tmp_path / "dataset.csv")
    common = ["--data", str(path), "--quick", "--out", str(tmp_path)]
    pretrain.main(pretrain.parse_args([*common, "--steps", "3", "--judge-steps", "3"]))
    for flags in ([], ["--reward", "motifs"]):
        numbers = das.main(das.parse_args([*common, *flags]))
        assert all(math.isfinite(v) for v in numbers.values())
        assert "das.data.activity" in numbers or flags and "bootstrap.data.activity" in numbers


@pytest.mark.parametrize("flags", ["--particles 0", "--steps -3", "--world mpas", "--kl-weight 0", "--quick --paper",
                                   "--world mpsa --reward motifs", "--reward motifs --forecast mean", "--data x.csv --world mpsa",
                                   "--data missing.csv", "--checkpoints tests", "--forecast best", "--device cuda:99"])
def test_bad_flags_end_in_one_sentence(flags, capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        das.main(das.parse_args([*flags.split(), "--out", str(tmp_path / "out")]))
    assert_one_sentence(end, capsys)
    assert not list(tmp_path.glob("out/*/*"))


if __name__ == "__main__":
    scores = torch.tensor([[z_scores(run(seed=seed, **setting)) for setting in SETTINGS.values()]
                           for seed in range(1, 1 + int(sys.argv[1]))])
    print(f"{(scores.abs() > 5).sum()} of {scores.numel()} above 5, the largest {scores.abs().max():.2f}, "
          f"{(scores.abs() > 2).double().mean():.1%} above 2")
