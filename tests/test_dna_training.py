"""dna/draft.py and ddpo.py on 4^3 sequences, whose sampling paths of three steps are all listed: means over the sampler
are sums. Tables of letters, one for every masked state, stand for networks: gradients compare entry by entry, in float64.
"""
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import load, planted

draft, ddpo = load("dna/draft.py"), load("dna/ddpo.py")
F, MASK, LENGTH, STEPS, KL_WEIGHT = torch.nn.functional, 4, 3, 3, 0.7

class Table(torch.nn.Module):
    """A denoiser with free letters for every place of every masked state; soft states are read as mixtures."""
    def __init__(self, seed):
        super().__init__()
        logits = torch.randn(5**LENGTH, LENGTH, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        self.logits = torch.nn.Parameter(1.2 * logits)
    def forward(self, x):
        x = x if x.is_floating_point() else F.one_hot(x, 5)
        weight = torch.einsum("na,nb,nc->nabc", *x.double().unbind(1)).flatten(1)
        return torch.einsum("ns,slv->nlv", weight, self.logits).log_softmax(2).to(x if x.is_floating_point() else weight)

NET, BASE = Table(1).requires_grad_(False), Table(2).requires_grad_(False)
WHEN = torch.tensor(list(itertools.product(range(1, STEPS + 1), repeat=LENGTH)))  # states in which a place is masked
X = torch.cartesian_prod(*[torch.arange(4)] * LENGTH).repeat_interleave(len(WHEN), 0)
WHEN = WHEN.repeat(4**LENGTH, 1)
PATHS = torch.stack([torch.where(WHEN > i, MASK, X) for i in range(STEPS + 1)])  # (4, 1728, 3)
VALUE = torch.randn(4**LENGTH, generator=torch.Generator().manual_seed(3))
R = VALUE.double()[(X * 4 ** torch.arange(2, -1, -1)).sum(1)]
WORLD = SimpleNamespace(length=LENGTH, steps=STEPS, p=None, net=BASE, denoiser=BASE, reward=draft.table_reward(VALUE))

def listed(net):
    """log p and the sum of the kernels' KLs from BASE of every path (1728,), with a gradient."""
    log_p, kl = -LENGTH * math.log(STEPS), 0.0  # of the order: uniform
    for i in range(STEPS):
        p, base = net(PATHS[i]), BASE(PATHS[i])
        log_p = log_p + torch.where(WHEN == i + 1, p.gather(2, X[:, :, None])[:, :, 0], 0).sum(1)
        kl = kl + torch.where(WHEN > i, (p.exp() * (p - base)).sum(2), 0).sum(1) / (STEPS - i)
    return log_p, kl

def exact_gradient(kl_weight):
    log_p, kl = listed(net := Table(1))
    (log_p.exp() @ (kl_weight * kl - R)).backward()
    return net.logits.grad

def z_of(sample, mean):
    return ((sample.mean() - mean).abs() / (sample.std() / len(sample) ** 0.5)).item()

def sampled_z(module):
    """z of the KL, the reward and log p of the paths that sample_paths draws."""
    torch.manual_seed(0)
    (path, kl), (log_p, exact_kl) = module.sample_paths(WORLD, NET, 60_000, 9999), listed(NET)
    powers = torch.arange(2, -1, -1)
    number = (path[-1] * 4**powers).sum(1) * 27 + (((path == MASK).sum(0) - 1) * 3**powers).sum(1)
    assert (PATHS[:, number] == path).all()
    return max(z_of(v, log_p.exp() @ f) for v, f in ((kl, exact_kl), (R[number], R), (log_p[number], log_p)))

def step_z(module, left=2, n=40_000):
    """z of every token's share after a step from a half-masked state; all that comes out is one-hot."""
    torch.manual_seed(4)
    x = F.one_hot(torch.tensor([[MASK, 2, MASK]]).expand(n, -1), 5).double()
    after, new = module.straight_through(NET(x), x, left, 0.1)
    assert ((after == 0) | (after == 1)).all() and (after.sum(2) == 1).all()
    wanted = torch.cat([NET(x[:1])[0].exp() / left, torch.full((LENGTH, 1), 1 - 1 / left)], 1)
    wanted[1] = torch.eye(5)[2]
    return ((after.mean(0) - wanted).abs() / (wanted * (1 - wanted) / n).sqrt().clamp(min=1e-9)).max().item()

def kl_z(module, last=2):
    """z of the KL that draft_paths returns, with a gradient through the last steps."""
    torch.manual_seed(1)
    values = [module.draft_paths(WORLD, NET, 100, last / STEPS, 1.0, kl=True)[1].mean().double() for _ in range(80)]
    return z_of(torch.stack(values), listed(NET)[0].exp() @ listed(NET)[1])

def gradient_error(module, kl_weight=0, temperature=0.3):
    """Distance of the gradient of an update of draft.py from that of the objective, over the length of the latter."""
    net, exact, options = Table(1), exact_gradient(kl_weight), dict(back=1.0, temperature=temperature, kl=kl_weight > 0)
    torch.manual_seed(6)
    module.draft_update(WORLD, net, lambda: None, 20_000, kl_weight, **options)
    return ((net.logits.grad - exact).norm() / exact.norm()).item()

def loss_of_all(module, net, behind, worth, weight=0.0):
    """The mean loss over all paths of the sampler of `behind` and all places; that if ratios are clipped by hand."""
    x, after, number = module.states_of(PATHS, LENGTH)
    old = module.letters_log_p(behind(x), after, x != after).detach()
    loss, ratio = module.policy_loss(net(x), BASE(x), old, x, after, worth[number], 0.2, weight)
    clipped = torch.where(worth[number] > 0, ratio.clamp(max=1.2), ratio.clamp(min=0.8)) * worth[number]
    return (listed(behind)[0].exp()[number] @ v / LENGTH for v in (loss, -LENGTH * clipped / (x != after).sum(1)))

def policy_error(module, weight=KL_WEIGHT):
    """Largest distance of the gradient of DDPO's loss from the exact one."""
    net, worth = Table(1), R - weight * listed(NET)[1]
    next(loss_of_all(module, net, NET, worth - worth.mean(), weight)).backward()
    return (net.logits.grad - exact_gradient(weight)).abs().max().item()

def update_error(module):
    """Distance of the mean gradient of updates of ddpo.py from that of the objective, over the length of the latter."""
    args, net, exact = SimpleNamespace(chunk=900, states=2, parts=1, clip_ratio=0.2), Table(1), exact_gradient(KL_WEIGHT)
    torch.manual_seed(2)
    for _ in range(30):
        module.ddpo_update(args, WORLD, net, lambda: None, 1000, KL_WEIGHT)
    return ((net.logits.grad / 30 - exact).norm() / exact.norm()).item()

def test_everything_is_as_listed():
    (log_p, kl), by_base = listed(NET), listed(BASE)[0]
    assert abs(log_p.exp().sum() - 1) < 1e-12 and abs(log_p.exp() @ (log_p - by_base - kl)) < 1e-12
    assert sampled_z(draft) < 5 and sampled_z(ddpo) < 5 and step_z(draft) < 5 and step_z(draft, left=1) < 5
    for last in (1, 2, 3):
        assert kl_z(draft, last) < 5 and draft.draft_paths(WORLD, BASE, 50, last / 3, 1.0, kl=True)[1].abs().max() < 1e-6
    for weight in (0, KL_WEIGHT):
        assert policy_error(ddpo, weight) < 1e-10 < 0.01 < exact_gradient(weight).abs().max()
    ours, by_hand = loss_of_all(ddpo, Table(4), NET, torch.where(R > 0, 1.0, -1.0).double())
    assert abs(ours - by_hand) < 1e-10 and update_error(ddpo) < 0.1
    # straight-through gradients are biased, the more the warmer
    assert gradient_error(draft) < min(0.35, gradient_error(draft, 0, 1.0)) and gradient_error(draft, KL_WEIGHT) < 0.35

BUGS = [  # script, text, instead of it, what shows it and from where on
    ("draft", "2), 0).sum(1) / left", "2), 0).sum(1)", sampled_z, 5),
    ("draft", "where(x == MASK, (log_p.exp()", "where(x == MASK, (base.exp()", sampled_z, 5),
    ("draft", "< 1 / left)\n    noisy", "< 1 / (left + 1))\n    noisy", step_z, 5),
    ("draft", "letter = F.one_hot(noisy", "letter = F.one_hot(log_p", step_z, 5),
    ("draft", "+ apart / left", "+ apart", kl_z, 5), ("draft", "* before / chosen", "/ chosen", lambda draft: kl_z(draft, 1), 5),
    ("draft", "torch.where((left == chosen)", "torch.where((left < chosen)", kl_z, 5),
    ("draft", "return (x[:, :, MASK] * (log_p", "return ((1 - x[:, :, MASK]) * (log_p", kl_z, 5),
    ("draft", "new = step(log_p, x, left", "new = step(log_p, x.detach(), left", gradient_error, 0.5),
    ("draft", "(soft - soft.detach())", "0 * soft", gradient_error, 0.5),
    ("ddpo", "/ new.sum(1)  #", "#", policy_error, 1e-3), ("ddpo", "- gain), ratio", "+ gain), ratio", policy_error, 1e-3),
    ("ddpo", "- old).exp()", "- old).div(new.sum(1)).exp()", policy_error, 1e-3),
    ("ddpo", "0).sum(1) / masked.sum(1)", "0).sum(1)", policy_error, 1e-3),
    ("ddpo", "path[when - 1, number]", "path[(when - 2).clamp(min=0), number]", policy_error, 1e-3),
    ("ddpo", "torch.where(masked, (log_p", "torch.where(~masked, (log_p", policy_error, 1e-3),
    ("ddpo", "r - weight * kl", "r + weight * kl", update_error, 0.2), ("ddpo", "/ len(part))", "/ len(k))", update_error, 0.2),
    ("ddpo", "(worth - worth.mean())[number]", "(worth - worth.mean())[number.flip(0)]", update_error, 0.2)]

@pytest.mark.parametrize("script, old, new, shown, least", BUGS)
def test_a_planted_bug_is_caught(script, old, new, shown, least):
    assert not shown(planted(f"dna/{script}.py", (old, new))) < least

def test_the_published_kl_is_zero_where_it_should_not_be():
    hard = F.one_hot(PATHS[1], 5).double()
    p, base, soft = NET(hard), BASE(hard), draft.published_step(NET(hard), hard, 2, 1.0)[0]
    assert draft.published_gap(p, base, hard).abs().max() == 0 and draft.gap(p, base, hard).max() > 0.1
    assert (soft.sum(2) - 1).abs().max() < 1e-6 and (soft[:, :, :MASK][hard[:, :, MASK] == 0].amax(1) == 1).all()
    assert (draft.published_gap(NET(soft), BASE(soft), soft) > 0).any() and (soft > 0).sum(2).max() == 5
    letters = draft.draft_paths(WORLD, NET, 500, 1.0, 1.0, kl=True, published=True)[0]
    assert ((letters == 0) | (letters == 1)).all() and (letters.sum(2) == 1).all()

# ---- training, files, flags ------------------------------------------------------------------------------------------
def test_the_tuned_model_of_an_enumerated_world_starts_at_the_exact_one():
    apart = [(ddpo.tuned(SimpleNamespace(p=1, net=BASE, denoiser=NET), Table(k))(X) - NET(X)).abs().max() for k in (2, 3)]
    assert apart[0] < 1e-12 and apart[1] > 0.1

@pytest.mark.parametrize("name", ["draft", "ddpo"])
def test_a_whole_run_and_the_same_again(name, tmp_path, capsys):
    module, rows = load(f"dna/{name}.py"), []
    for i in range(2):
        args = module.parse_args(["--steps", "3", "--out", str(tmp_path / str(i))])
        args.size = (2, 4, 4, 1, 2, 3)
        module.main(args)
        rows.append(json.loads((args.out / "numbers.json").read_text(), parse_constant=pytest.fail)["rows"])
    keys = {(r["problem"], r["method"], r["quantity"]): r["exact"] for r in rows[0]}
    assert rows[0] == rows[1] and len(keys) == len(rows[0]) and capsys.readouterr().out.startswith("COARSE")
    assert {k[1] for k in keys} == {*module.METHODS} and (args.out / "figure.png").stat().st_size > 5000
    arrays = module.np.load(args.out / "sequences.npz")
    assert arrays[f"hepg2/{name}/x"].shape == (3, 1, 200) and arrays[f"mpsa/{name}_kl/log_w"].tolist() == [[0]] * 4
    assert keys["mpsa", f"{name}_kl", "objective"] == pytest.approx(1.12448, abs=1e-5)

def test_a_reward_without_a_gradient_is_one_sentence_or_no_matter():
    world = SimpleNamespace(**vars(WORLD) | dict(reward=lambda x: x.argmax(2).sum(1).float()))
    with pytest.raises(draft.Refused, match="gradient"):
        draft.draft_update(world, Table(1), lambda: None, 4, 0, back=1.0, temperature=1.0)
    ddpo.ddpo_update(SimpleNamespace(chunk=9, states=1, parts=1, clip_ratio=1), world, Table(1), lambda: None, 4, 0)
