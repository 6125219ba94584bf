"""dna/dav.py on 4^4 sequences that can be enumerated: the weights of its search, what the M-step is shown, what a table
of letters learns in a round, its bound; rows, files, resumption and bad input of the whole script.
"""
import copy
import itertools
import json
import math
import types

import numpy as np
import pytest
import torch
from conftest import load, planted
from test_dna_das import LENGTH, MASK, P, R, STATES, after

dav = load("dna/dav.py")
F, KL_WEIGHT = torch.nn.functional, 0.7

class Table(torch.nn.Module):
    """Logits of every masked sequence, 0 at first."""
    def __init__(self):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(len(STATES), LENGTH, 4))
    def forward(self, x):
        return self.logits[(x * 5 ** torch.arange(LENGTH - 1, -1, -1)).sum(1)]

def small(module=dav, p=P, r=R, length=LENGTH, steps=5, **changes):
    """World and flags."""
    world = types.SimpleNamespace(name="mpsa", length=length, steps=steps, kl_weight=KL_WEIGHT, p=p, net=Table(),
                                  denoiser=module.ExactDenoiser(p), reward=module.table_reward(r),
                                  held_out=module.table_reward(p.log()))
    return world, types.SimpleNamespace(**dict(kl_weight=None, max_shift=1.0, chunk=999, children=1, kl=0.5) | changes)

def z_scores(module=dav, groups=3000, particles=6, seed=0, steps=5, **changes):
    """z of Z, of the tilted mean of the reward and of the held-out one, against the exact answer of so many steps."""
    torch.manual_seed(seed)
    out, _ = module.search(*[(w := small(module, steps=steps, **changes))[0], groups, particles, w[1]])
    q = after(steps) * (R / KL_WEIGHT).exp()
    z = out["log_w"].exp()
    if z.mean(1).std() / groups**0.5 > 0.2 * q.sum():
        return math.inf  # one group holds all the weight
    pairs = (1, q.sum()), (out["reward"], q @ R), (out["held_out"], q @ P.log())
    errors = [(z * f).mean(1) - mean for f, mean in pairs]
    return max((v.mean() / v.std() * groups**0.5).abs().item() for v in errors)

@pytest.mark.parametrize("options", [dict(), dict(particles=1, groups=20_000), dict(children=3),
                         dict(particles=1, groups=8000, children=3), dict(steps=12, children=2)], ids=str)
def test_the_search_is_right_if_its_weights_are_kept(options):
    assert z_scores(**options) < 5

BUGS = {
    "mean of the children forgotten": (" - math.log(children) - twist", " - twist"),
    "twist of the kept one left in": (" - math.log(children) - twist[kept]", " - math.log(children)"),
    "p / q forgotten": (" - letters_log_p(q, child, new)", " - letters_log_p(p, child, new)"),
    "the best child": ("share.flatten(1).T.multinomial(1)", "share.flatten(1).T.argmax(1)"),
    "another child looked at": ("child[kept][due]", "child[0][due]"),
}

@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug):
    assert z_scores(planted("dna/dav.py", BUGS[bug]), groups=2000, children=3) > 5

@pytest.mark.parametrize("shape", [(20, 100), (2000, 1)])
def test_the_elbo_is_a_lower_bound(shape):
    """Of log Z; a local search is below it, and above one that has no tilt."""
    torch.manual_seed(0)
    elbo = {shift: dav.search(*[(w := small(max_shift=shift))[0], *shape, w[1]])[0]["elbo"] for shift in (1.0, 1e-9)}
    log_z, noise = (after(5) @ (R / KL_WEIGHT).exp()).log(), 5 * elbo[1.0].std() / shape[0] ** 0.5
    assert elbo[1.0].mean() + (noise if shape[1] == 1 else -noise) < log_z
    assert shape[1] > 1 or elbo[1.0].mean() > elbo[1e-9].mean() + 0.05

def error_of_the_mean(module, children, monkeypatch):
    """Of what is shown of the first step, averaged over all pairs of children of a world of two letters, against the
    mean of the letters that the kept child has set."""
    torch.manual_seed(1)
    p, r, steps = torch.randn(16).double().softmax(0), torch.randn(16).double(), 3
    world, args = small(module, p, r, 2, steps, children=children)
    one = torch.cartesian_prod(*[torch.arange(5)] * 2)
    every = torch.tensor([*itertools.product(range(25), repeat=children)])  # (G, M)
    child = one[every].movedim(1, 0)[:, :, None]  # (M, G, 1, 2)
    was = module.unmask
    first = lambda q, x, left: (child, child != MASK) if left == steps else was(q, x, left)
    monkeypatch.setattr(module, "unmask", first)
    start = module.look(world, torch.full((1, 2), MASK), KL_WEIGHT, 99, True)
    log_q = module.tilt(start["log_p"], start["x"], start["grad"], steps, 1.0)
    chance = torch.cat([log_q[0].exp() / steps, torch.full((2, 1), 1 - 1 / steps, dtype=torch.float64)], 1)  # (2, 5)
    chance = torch.stack([chance[k][child[..., k]] for k in (0, 1)]).prod(0)[..., 0]  # (M, G)
    shown = [module.search(world, len(every), 1, args, published)[1][1][: len(every)] for published in (False, True)]
    wide = [v.expand(*child.shape, 4) for v in (start["log_p"], log_q)]
    ratio = [module.letters_log_p(v, child, child != MASK)[..., 0] for v in wide]
    x0_hat = module.forecast(wide[0], child).flatten(0, 2)
    twist = world.reward(x0_hat).view_as(ratio[0]) / KL_WEIGHT * (children > 1)
    share = (ratio[0] - ratio[1] + twist).softmax(0)
    letters = (F.one_hot(child, 5)[..., 0, :, :4] * share[..., None, None]).sum(0)  # (G, 2, 4)
    assert children > 1 or (shown[1] == letters).all()  # published: the letters themselves
    soft, exact = (((chance.prod(0)[:, None, None] * v).sum(0)) for v in (shown[0].double(), letters.double()))
    assert chance.prod(0).sum() == pytest.approx(1, abs=1e-12) and exact.sum() > 0.5
    monkeypatch.undo()
    return (soft - exact).abs().max()

SOFT_BUGS = {
    "of p": ("(x == MASK)[..., None], log_q.exp() / left", "(x == MASK)[..., None], log_p.exp() / left"),
    "all masked letters": ("log_q.exp() / left, 0)", "log_q.exp(), 0)"),
    "choice forgotten": ("soft = soft + ((share - 1 / children)", "soft = soft + (0 * (share - 1 / children)"),
    "choice counted, not its gain": ("((share - 1 / children)[", "(share["),
}

def test_soft_letters_have_the_mean_of_those_drawn(monkeypatch):
    assert max(error_of_the_mean(dav, children, monkeypatch) for children in (1, 2)) < 1e-6
    for bug in SOFT_BUGS.values():
        assert error_of_the_mean(planted("dna/dav.py", bug), 2, monkeypatch) > 1e-3

@pytest.mark.parametrize("shape", [(40, 30), (300, 1)])
def test_a_path_shows_its_letters_once_and_with_its_weight(shape):
    """All steps together: the letters of the last sequences, each as often as its weight says."""
    world, args = small(children=2)
    out, (states, goals) = dav.search(world, *shape, args, True)
    total, w = goals.view(5, *shape, LENGTH, 4).sum(0), out["log_w"].softmax(1)[..., None, None]
    assert (total - shape[1] * w * F.one_hot(out["x"], 4)).abs().max() < 1e-4
    assert ((states == MASK) | (goals.sum(2) == 0)).all() and out["log_w"].std() > 0.01

def rounds(count, shape, steps=5, lr=0.1, **options):
    """Rounds from the exact denoiser with a table of logits -> world, flags, the denoiser before the last round and
    after, what that returned."""
    torch.manual_seed(2)
    world, args = small(steps=steps)
    args.size, net = dict(mpsa=(0, *shape, 400, 1000, 5000), hepg2=None), copy.deepcopy(world.net)
    optimizer = torch.optim.Adam(net.parameters(), lr, betas=(0.9, 0.99))
    def step():
        optimizer.step()
        optimizer.zero_grad()
    for _ in range(count):
        before = dav.tuned(world, copy.deepcopy(net))
        out = dav.dav_update(world, net, args, step, **options)
    return world, args, before, dav.tuned(world, net), out

def test_a_weighted_round_is_the_exact_one():
    """In many steps: letters of one step are independent, which those of a tilted distribution are not."""
    *_, out = rounds(1, (100, 100), steps=100, lr=0.3)
    q = after(100) * (R / KL_WEIGHT).exp()
    assert abs(out["reward"].mean() - q @ R / q.sum()) < 0.06 and q @ R / q.sum() > after(100) @ R + 0.7

@pytest.mark.parametrize("kl", [False, True])
def test_a_local_round_learns_the_proposal(kl):
    """Where all is masked: q; with kl the point where q / p - kl log(p / base) is the same for all letters."""
    world, args, before, now, _ = rounds(2, (1000, 1), kl=kl)
    x = torch.full((1, LENGTH), MASK)
    model = copy.copy(world)
    model.denoiser = before
    known = dav.look(model, x, KL_WEIGHT, 99, True)
    log_q = dav.tilt(known["log_p"], x, known["grad"], 5, 1.0)
    log_p, base = now(x).detach(), world.denoiser(x)
    assert (log_p - log_q).abs().max() < 0.02 or kl
    level = (log_q - log_p).exp() - kl * args.kl * (log_p - base)
    assert (level - level.mean(2, keepdim=True)).abs().max() < 0.03 and (log_p - base).abs().max() > 0.1

def run(out, *flags):
    args = dav.parse_args(["--quick", "--steps", "4", "--out", str(out), *flags])
    args.size = dict(mpsa=(2, 2, 5, 2, 4, 4), hepg2=(2, 3, 1, 1, 2, 3))
    dav.main(args)
    return json.loads((out / "numbers.json").read_text(), parse_constant=lambda name: pytest.fail(name))["rows"]

def test_rows_and_files(tmp_path):
    rows = run(tmp_path)
    keys = [(r["problem"], r["method"], r["quantity"]) for r in rows]
    known = {"base", "search", "posterior", *(m + end for m in dav.METHODS for end in ("", "_round_1"))}
    assert len(keys) == len(set(keys)) and {k[1] for k in keys if k[0] == "mpsa"} == known
    assert all(math.isfinite(r["estimate"]) for r in rows)
    exact = {r["method"]: r["exact"] for r in rows if (r["problem"], r["quantity"]) == ("mpsa", "reward")}
    assert exact["base"] < exact["search"] == exact["dav_round_1"] < exact["dav"] < exact["posterior"]
    arrays = np.load(tmp_path / "sequences.npz")
    assert arrays["mpsa/search/x"].shape == (2, 5, 9) and arrays["hepg2/dav/x"].shape == (3, 1, 200)
    assert int.from_bytes((tmp_path / "figure.png").read_bytes()[16:20], "big") == 900

def test_a_reward_without_a_gradient_needs_children(tmp_path):
    (tmp_path / "my.py").write_text("def hard(x): return (x.argmax(2) == 1).sum(1).float()\n")
    flags = ["--reward", f"{tmp_path}/my.py:hard", "--problem", "hepg2", "--methods", "dav"]
    with pytest.raises(dav.Refused, match="--children"):
        run(tmp_path, *flags)
    assert run(tmp_path, *flags, "--children", "3")
