"""dna/das.py and the world of dna/: the sampler on a distribution of 4^4 sequences, whose distribution after any number of
steps follows from the kernel matrices of all 5^4 masked states; exact denoiser, rewards, files. smc is tested in toy/.
"""
import json
import math
import re
import types

import numpy as np
import pytest
import torch
from conftest import SOURCE, load, planted

das = load("dna/das.py")
F, MASK, LENGTH = torch.nn.functional, 4, 4
X = torch.cartesian_prod(*[torch.arange(4)] * LENGTH)
STATES = torch.cartesian_prod(*[torch.arange(5)] * LENGTH)

def small_world():
    """Strong dependence between neighbours, and a reward that needs all letters."""
    torch.manual_seed(0)
    table = 1.5 * torch.randn(LENGTH - 1, 4, 4, dtype=torch.float64)
    p = sum(table[k][X[:, k], X[:, k + 1]] for k in range(LENGTH - 1)).softmax(0)
    return p, torch.randn(4**LENGTH, dtype=torch.float64)

P, R = small_world()

def after(steps):
    """The distribution (4^4,) of the sampler, step by step over all masked states."""
    d = das.ExactDenoiser(P)(STATES).exp()  # (S, 4, 4)
    masked, letter = STATES == MASK, STATES.clamp(max=3)
    weight = torch.ones(len(STATES), len(STATES), dtype=torch.float64)
    for k in range(LENGTH):
        new, same = d[:, k][:, letter[:, k]], (STATES[:, None, k] == STATES[None, :, k]).double()
        weight *= torch.where(masked[:, None, k] & ~masked[None, :, k], new, same)
    left = masked.sum(1)[None].double()
    newly = masked.sum(1)[:, None] - left
    now = torch.zeros(len(STATES), dtype=torch.float64)
    now[-1] = 1  # all masked
    for step in range(steps, 0, -1):
        now = now @ (weight * (newly >= 0) * (1 / step) ** newly.clamp(min=0) * (1 - 1 / step) ** left)
    return now[~masked.any(1)]

def z_scores(module=das, steps=5, groups=3000, particles=6, seed=0, **options):
    """z of Z, of the tilted mean of the reward and of the held-out one, against the exact answer of so many steps."""
    world = types.SimpleNamespace(length=LENGTH, steps=steps, kl_weight=0.7, denoiser=module.ExactDenoiser(P),
                                  reward=module.table_reward(R), held_out=module.table_reward(P.log()))
    torch.manual_seed(seed)
    out = module.das(world, groups, particles, types.SimpleNamespace(kl_weight=None, gamma=0.005, max_shift=1.0, chunk=999),
                     **options)
    q = after(steps) * (R / 0.7).exp()
    z, zs = out["log_w"].exp(), []
    if out["log_w"].exp().mean(1).std() / groups**0.5 > 0.2 * q.sum():
        return math.inf  # one group holds all the weight
    for f, mean in ((1, q.sum()), (out["reward"], q @ R), (out["held_out"], q @ P.log())):
        v = (z * f).mean(1)
        zs.append(((v.mean() - mean) / (v.std() / groups**0.5)).abs().item())
    return max(zs)

OPTIONS = [dict(), dict(ess=1.1), dict(guided=False, ess=1.1), dict(guided=False, ess=0), dict(max_shift=math.inf),
           dict(max_shift=0.2, ess=1.1), dict(steps=1), dict(steps=12, particles=3, ess=1.1)]

@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_sampler_is_right_at_any_number_of_steps(options):
    assert z_scores(**options) < 5

RATIO = "letters_log_p(log_p, x, new) - letters_log_p(log_q, x, new)"
BUGS = {
    "p / q inverted": (RATIO, "letters_log_p(log_q, x, new) - letters_log_p(log_p, x, new)"),
    "p / q forgotten": (RATIO, "0 * letters_log_p(log_p, x, new)"),
    "p / q of all letters": ("torch.where(new, log_p.gather(-1, x.clamp(max=3)[..., None])[..., 0], 0).sum(-1)",
                             "log_p.gather(-1, x.clamp(max=3)[..., None])[..., 0].sum(-1)"),
    "proposal not normalised": ("[..., None, None]).log_softmax(-1)", "[..., None, None])"),
    "last letter not looked at": ("state[name] = state[name].index_put((due,), known)",
                                  "state[name] = state[name] if name[0] + str(left) == 'v1' else state[name].index_put((due,), known)"),
    "temper of the old step": ("log_twist=temper[i + 1] * state", "log_twist=temper[i] * state"),
    "letters by argmax": ("letters = (cdf <= torch.rand(len(cdf), 1, dtype=torch.float64) * cdf[:, -1:]).sum(1)",
                          "letters = cdf.diff(dim=1, prepend=0 * cdf[:, :1]).argmax(1)"),
    "rows mixed up": ("index_put((due,), known)", "index_put((due,), known.flip(0))"),
    "set too early": ("< 1 / left)", "< min(1, 3 / left))"), "set too late": ("< 1 / left)", "< 1 / (left + 1))"),
    "forecast of the mask": ("F.one_hot(x.clamp(max=3), 4)).float()", "F.one_hot((x + 1) % 4, 4)).float()"),
}

@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug):
    module = planted("dna/das.py", BUGS[bug])
    if bug == "set too late":
        with pytest.raises(RuntimeError, match="num_classes"):  # masks are left
            z_scores(module)
    else:
        assert z_scores(module, ess=1.1) > 5

def test_rows_without_a_new_letter_are_not_looked_at_again():
    found, rows = [], []
    for module in (das, planted("dna/das.py", ("due = new.any(2)", "due = new.any(2) | True"))):
        calls, exact = 0, module.ExactDenoiser(P)
        def denoiser(x):
            nonlocal calls
            calls += len(x)
            return exact(x)
        world = types.SimpleNamespace(length=LENGTH, steps=32, kl_weight=0.7, denoiser=denoiser, reward=module.table_reward(R),
                                      held_out=module.table_reward(R))
        args = types.SimpleNamespace(kl_weight=None, gamma=0.008, max_shift=1.0, chunk=64)
        torch.manual_seed(3)
        found.append(module.das(world, 20, 10, args))
        rows.append(calls)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert rows[1] == 1 + 32 * 200 and rows[0] <= 1 + LENGTH * 200

def test_tilt_is_capped_and_normalised():
    torch.manual_seed(0)
    log_p, x = torch.randn(50, 9, 4, dtype=torch.float64).log_softmax(2), torch.randint(5, (50, 9))
    x[:, 0], shift = MASK, 3 * torch.randn(50, 9, 4, dtype=torch.float64)
    for cap in (0.1, 1.0, math.inf):
        log_q = das.tilt(log_p, x, shift, 4, cap)
        assert log_q.logsumexp(2).abs().max() < 1e-12
        made = (log_q - log_p) - ((log_q - log_p) * log_p.exp()).sum(2, keepdim=True)  # the shift, up to a constant
        size = (torch.where(x == MASK, (log_p.exp() * made**2).sum(2), 0).sum(1) / 4).sqrt()
        assert (size < cap + 1e-10).all() and (cap > 0.1 or (size > cap - 1e-10).all())
    assert (log_q - (log_p + shift).log_softmax(2)).abs().max() < 1e-12

# ---- the world -------------------------------------------------------------------------------------------------------
def test_exact_denoiser_is_the_conditional_distribution():
    log_p = das.ExactDenoiser(P)(STATES)
    for state, ours in zip(STATES[::7], log_p[::7]):
        agree = ((X == state) | (state == MASK)).all(1)
        for k in (k for k in range(LENGTH) if state[k] == MASK):
            brute = torch.stack([P[agree & (X[:, k] == v)].sum() for v in range(4)]) / P[agree].sum()
            assert (ours[k].exp() - brute).abs().max() < 1e-12

def test_table_reward_is_the_mean_over_independent_letters():
    value, x = torch.randn(4**3), torch.cartesian_prod(*[torch.arange(4)] * 3)
    reward, p = das.table_reward(value), torch.randn(5, 3, 4).softmax(2).requires_grad_()
    assert (reward(F.one_hot(x, 4)) - value).abs().max() < 1e-6
    brute = torch.stack([sum(value[n] * q[0, a] * q[1, b] * q[2, c] for n, (a, b, c) in enumerate(x.tolist())) for q in p])
    assert (reward(p) - brute).abs().max() < 1e-5
    ours, theirs = (torch.autograd.grad(v.sum(), p)[0] for v in (reward(p), brute))
    assert (ours - theirs).abs().max() < 1e-5

def test_exact_numbers_of_mpsa(tmp_path):
    world = das.Rewarded(das.parse_args(["--out", str(tmp_path)]), "mpsa")
    exact = {key: v.item() for key, v in das.exact_values(world, 0.5).items()}
    assert exact == pytest.approx(dict(log_z=1.12448, reward=1.52391, held_out=1.44498), abs=1e-5)
    x = torch.cartesian_prod(*[torch.arange(4)] * 9)
    assayed = (x[:, 3] == 2) & (x[:, 4] % 2 == 1)
    assert assayed.sum() == 32768 and abs(world.p[assayed].sum() - 0.99125) < 1e-12 and world.p.min() > 0
    assert (world.r[~assayed] == world.r.min()).all()
    letters = F.one_hot(x[::5001], 4).float()
    assert (world.reward(letters) - world.r[::5001]).abs().max() < 1e-5 and world.length == 9

def test_elements_have_known_networks(tmp_path):
    world = das.Rewarded(das.parse_args(["--out", str(tmp_path)]), "hepg2")
    data = np.load(SOURCE / "dna/elements.npz")
    x = torch.tensor(data["codes"][data["chrom"] == 2][:64]).long()
    letters = F.one_hot(x, 4).float()
    assert world.reward(letters).mean().item() == pytest.approx(-3.2835, abs=1e-3)  # of the record of the training
    assert world.held_out(letters).mean().item() == pytest.approx(-3.1515, abs=1e-3)
    oracle, _ = das.load_network(SOURCE / "dna/checkpoints/hepg2_oracle_a.pt", das.Oracle)
    odds = oracle(letters).log_softmax(1)
    for k, name in enumerate(["gm12878", "hepg2", "k562", "hesc"]):
        assert torch.allclose(oracle.score(letters, name), torch.logit(odds[:, k].exp()), atol=1e-2)
    with torch.no_grad():
        log_p = world.denoiser(torch.where(torch.rand(x.shape) < 0.5, MASK, x))
    assert (log_p.exp().sum(2) - 1).abs().max() < 1e-5 and das.exact_values(world, 0.25) == {}

OWN = "import torch\ndef gc(x): return x[..., 1:3].sum((1, 2))\ndef hard(x): return (x.argmax(2) == 1).sum(1).float()\n"
OWN += "def wrong(x): return x.sum()\ndef infinite(x): return x[:, 0, 0] / 0\n"

def tiny(tmp_path, *flags):
    args = das.parse_args(["--problem", "mpsa", "--steps", "4", "--quick", "--out", str(tmp_path), *flags])
    args.size = (6, 5, 3, 2)
    das.main(args)
    return json.loads((tmp_path / "numbers.json").read_text(), parse_constant=lambda name: pytest.fail(name))["rows"]

def test_same_seed_same_numbers_and_files(tmp_path):
    one, two, other = (tiny(tmp_path, "--seed", seed) for seed in "001")
    assert one == two != other and (tmp_path / "figure.png").stat().st_size > 5000
    keys = [(r["problem"], r["method"], r["quantity"]) for r in one]
    assert len(keys) == len(set(keys)) and {k[1] for k in keys} == set(das.METHODS)
    arrays = np.load(tmp_path / "sequences.npz")
    assert arrays["mpsa/das/x"].shape == (6, 5, 9) and arrays["mpsa/das/x"].max() < 4
    assert arrays["mpsa/das/log_w"].shape == arrays["mpsa/das/reward"].shape == (6, 5)

def test_your_own_reward(tmp_path):
    (tmp_path / "my.py").write_text(OWN)
    for name in ("gc", "hard"):
        rows = {(r["method"], r["quantity"]): r for r in tiny(tmp_path, "--reward", f"{tmp_path}/my.py:{name}")
                if r["problem"] == "mpsa"}
        p = torch.tensor(np.load(SOURCE / "dna/splice_sites.npz")["p"])
        x = torch.cartesian_prod(*[torch.arange(4)] * 9)
        r = ((x == 1) | (x == 2)).sum(1).double() if name == "gc" else (x == 1).sum(1).double()
        joint = p.log() + r / 0.5
        assert rows["das", "log_z"]["exact"] == pytest.approx(joint.logsumexp(0).item(), abs=1e-6)
        assert rows["das", "reward"]["exact"] == pytest.approx((joint.softmax(0) @ r).item(), abs=1e-6)

@pytest.mark.parametrize("name", ["my.py:wrong", "my.py:infinite", "my.py:absent", "no.py:f", "motif"])
def test_a_bad_reward_is_one_sentence(name, tmp_path):
    (tmp_path / "my.py").write_text(OWN)
    with pytest.raises(das.Refused) as error:
        tiny(tmp_path, "--reward", f"{tmp_path}/{name}")
    assert len(str(error.value).splitlines()) == 1 and name in str(error.value)

BAD = """das --steps 0; das --problem mpas; das --kl-weight nan; das --device cuda:9; das --out README.md
das --problem mpsa mpsa; draft --temperature 0; draft --back -1; draft --kl-weight nan; ddpo --states 0
ddpo --methods draft; dav --rounds 0; dav --children -1; dav --methods dave; dav --lr nan
constrained_alignment --threshold 1 0.5; constrained_alignment --problem mpsa --threshold nan 1
or_composition --cells hepg2; or_composition --cells k562 k562; or_composition --objective or""".replace("\n", "; ").split("; ")

@pytest.mark.parametrize("line", BAD)
def test_bad_flags_are_one_sentence(line, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(SOURCE)
    script, *flags = line.split()
    module = load(f"dna/{script}.py")
    with pytest.raises((SystemExit, module.Refused)) as end:
        module.parse_args([*flags, *["--out", str(tmp_path)] * ("--out" not in flags)])
    text = capsys.readouterr().err.strip().splitlines() or str(end.value).splitlines()
    assert getattr(end.value, "code", 2) == 2 and re.search("|".join(v for v in flags if v[:2] == "--"), text[-1])

@pytest.mark.parametrize("name", ["hepg2", "mpsa", "data"])
def test_missing_networks_are_one_sentence(name, tmp_path):
    with pytest.raises(das.Refused, match=f"{name}_base") as error:
        das.World(das.parse_args(["--out", str(tmp_path), "--checkpoints", str(tmp_path)]), name)
    assert len(str(error.value).splitlines()) == 1
