"""dna/draft.py and dna/ddpo.py: gradients, KL and likelihoods on enumerated laws, what training reaches, the scripts.

On 4^3 sequences every trajectory of three steps is listed, so that means over the reverse process are sums. Tables of
letters, one for every masked state, stand in for networks: their gradients can be compared entry by entry.
"""
import itertools
import json
import math
import types

import pytest
import torch
from conftest import load, planted

draft, ddpo = load("dna/draft.py"), load("dna/ddpo.py")
MASK, LENGTH, STEPS = draft.MASK, 3, 3
PLACE = 5 ** torch.arange(LENGTH - 1, -1, -1)
X = draft.all_sequences(LENGTH)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def assert_one_sentence(end, capsys):
    text = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(text[-1]) > 15 and not any("Traceback" in line for line in text), text


# ---- laws that are known ---------------------------------------------------------------------------------------------


class Table(torch.nn.Module):
    """A denoiser with a free law for every place of every masked state; relaxed states are read as mixtures."""

    def __init__(self, log_p):
        super().__init__()
        self.logits = torch.nn.Parameter(log_p.clone())

    def forward(self, x):
        if not x.is_floating_point():
            return self.logits[(x * PLACE).sum(1)].log_softmax(2)
        weight = x[:, 0, :, None, None] * x[:, 1, None, :, None] * x[:, 2, None, None, :]
        return torch.einsum("ns,slv->nlv", weight.flatten(1), self.logits).log_softmax(2)


def law_of(seed):
    return (1.5 * torch.randn(4**LENGTH, generator=generator(seed), dtype=torch.float64)).softmax(0)


def table_of(seed):
    """The exact denoiser of a random law, as a table."""
    states = torch.cartesian_prod(*[torch.arange(5)] * LENGTH)
    return Table(draft.ExactDenoiser(law_of(seed))(states).nan_to_num(0.0, 0.0, 0.0))


R = torch.randn(4**LENGTH, generator=generator(3), dtype=torch.float64)
NET, BASE, REWARD = table_of(1), table_of(2), draft.TableReward(R)


def every_path():
    """x, when (64 * 27, 3) of every trajectory of three steps."""
    when = torch.tensor(list(itertools.product(range(1, STEPS + 1), repeat=LENGTH)))
    return X.repeat_interleave(len(when), 0), when.repeat(4**LENGTH, 1)


REWARD_OF_PATHS = REWARD(every_path()[0])


def path_log_p(net):
    """log p of every trajectory (64 * 27,), the log probabilities of its letters (64 * 27, 3), with gradient."""
    x, when = every_path()
    chosen, log_p = torch.zeros(x.shape, dtype=torch.float64), torch.zeros(len(x), dtype=torch.float64)
    for step in range(STEPS, 0, -1):
        letter = net(torch.where(when > step, x, MASK)).gather(2, x[:, :, None])[:, :, 0]
        chosen = torch.where(when == step, letter, chosen)
        log_p = log_p - (when == step).sum(1).double() * math.log(step)
        log_p = log_p + (when < step).sum(1).double() * math.log(max(1 - 1 / step, 1e-300))
    return log_p + chosen.sum(1), chosen


def path_kl(net, base):
    """The sum over steps of the KL of the kernels, at the states of every trajectory (64 * 27,), with gradient."""
    (x, when), kl = every_path(), 0.0
    for step in range(STEPS, 0, -1):
        z = torch.where(when > step, x, MASK)
        kl = kl + ((net(z).exp() * (net(z) - base(z))).sum(2) * (z == MASK)).sum(1) / step
    return kl


def test_listed_trajectories_are_all():
    log_p = path_log_p(NET)[0]
    assert abs(log_p.exp().sum() - 1) < 1e-12
    ratio = log_p - path_log_p(BASE)[0]  # the mean of the log ratio is that of the KLs of the steps
    assert abs(log_p.exp() @ (ratio - path_kl(NET, BASE))) < 1e-12


@pytest.mark.parametrize("module", [draft, ddpo], ids=["draft", "ddpo"])
def test_sampled_paths(module):
    """Law, log probabilities and KL of sample_trajectories, against the list."""
    out = module.sample_trajectories(NET, BASE, 20_000, LENGTH, STEPS, generator(0))
    (x, when), (log_p, chosen) = every_path(), path_log_p(NET)
    powers = torch.arange(2, -1, -1)
    number = (out["x"] * 4**powers).sum(1) * 27 + ((out["when"] - 1) * 3**powers).sum(1)
    assert (x[number] == out["x"]).all() and (when[number] == out["when"]).all()
    assert (chosen[number] - out["log_p"]).abs().max() < 1e-6
    assert (path_kl(NET, BASE)[number] - out["kl"]).abs().max() < 1e-5
    p = log_p.exp().detach()
    for f in (REWARD_OF_PATHS, path_kl(NET, BASE).detach(), (when[:, 0] == 1).double()):
        mean = p @ f
        assert abs(f[number].mean() - mean) / ((p @ f**2 - mean**2) / len(number)).sqrt() < 5
    assert out["rows"] < 1 + 20_000 * STEPS


# ---- DRAKES ----------------------------------------------------------------------------------------------------------


def relaxed_z(module, soft, step=2, n=40_000):
    """z-scores of the share of every letter, and of the mask, after one step from half-masked states."""
    z = torch.tensor([[MASK, 2, MASK]]).expand(n, -1)
    log_p = NET(z).detach()
    x = module.relaxed_step(log_p, torch.nn.functional.one_hot(z, 5).double(), step, 1.0, soft, generator(4))
    wanted = torch.cat([log_p[0].exp() / step, torch.full((LENGTH, 1), 1 - 1 / step)], 1)
    wanted[1] = torch.eye(5)[2]
    assert (x[:, 1] == wanted[1]).all() and (x.sum(2) - 1).abs().max() < 1e-9
    if not soft:
        assert ((x - x.round()).abs() < 1e-9).all()
        return (((x.mean(0) - wanted) / (wanted * (1 - wanted) / n).sqrt().clamp(min=1e-9)).abs().max()).item()


def test_relaxed_step_has_the_law_of_unmasking():
    assert relaxed_z(draft, False) <= 5 and relaxed_z(draft, False, step=1) <= 5
    relaxed_z(draft, True)


RELAXED_BUGS = {
    "no chance to stay": ("math.log(1 - 1 / step) if step > 1 else -math.inf", "-math.inf"),
    "chance of a step before": ("noisy = torch.cat([log_p - math.log(step), stay], 2)",
                                "noisy = torch.cat([log_p - math.log(step + 1), stay], 2)"),
    "one Gumbel for all": ("(-u.log()).log().to(log_p)", "(-u[:, :, :1].log()).log().to(log_p)"),
    "Gumbel of the other sign": (" - (-u.log()).log().to(log_p)", " + (-u.log()).log().to(log_p)"),
}


@pytest.mark.parametrize("bug", RELAXED_BUGS)
def test_planted_bug_of_the_relaxed_step_is_caught(bug):
    assert relaxed_z(planted("dna/draft.py", RELAXED_BUGS[bug]), False) > 5


def relaxed(module, truncate, kl_weight, n, seed, net=NET, base=BASE, soft=False):
    args = types.SimpleNamespace(steps=STEPS, truncate=truncate, temperature=1.0, soft=soft)
    return module.relaxed_paths(net, base, n, LENGTH, args, kl_weight, generator(seed))


def relaxed_kl_z(module, truncate):
    """The estimate of the KL of the paths, however many steps carry a gradient."""
    values = []
    for seed in range(60):
        kl = relaxed(module, truncate, 1.0, 100, seed)[1]
        values.append(torch.as_tensor(kl).detach().double().mean() if torch.is_tensor(kl) else torch.zeros(()).double())
    mean, se = draft.mean_and_se(torch.stack(values))
    return abs(mean - (path_log_p(NET)[0].exp() @ path_kl(NET, BASE)).item()) / max(se, 1e-9)


@pytest.mark.parametrize("truncate", [1, 2, 3])
def test_kl_is_that_of_the_paths(truncate):
    assert relaxed_kl_z(draft, truncate) <= 5
    assert relaxed(draft, truncate, 1.0, 50, 1, net=BASE)[1].abs().max() < 1e-9  # none from itself


KL_BUGS = {
    "the official one: places that are set": ("base(x)) * x[:, :, MASK]",
                                              "base(x)) * (1 - x[:, :, MASK]) * x[:, :, MASK]"),
    "steps without gradient left out": ("kl + hard * (gap", "kl + 0 * (gap"),
    "their number left out": ("kl + hard * (gap", "kl + (gap"),
    "the chance of being set left out": ("* x[:, :, MASK]).sum(1) / step", "* x[:, :, MASK]).sum(1)"),
}


@pytest.mark.parametrize("bug", KL_BUGS)
def test_planted_bug_of_the_kl_is_caught(bug):
    assert relaxed_kl_z(planted("dna/draft.py", KL_BUGS[bug]), 3 if "chance" in bug else 1) > 5


def test_gradient_reaches_the_steps_it_should():
    """The states that only the last step meets, one masked letter, get a gradient at any truncation; the first, all
    masked, only when all steps carry one."""
    first, last = (torch.full((1, LENGTH), MASK) * PLACE).sum(), (torch.tensor([0, MASK, 1]) * PLACE).sum()
    for truncate in (1, 2, 3):
        net = table_of(1)
        x, _, _ = relaxed(draft, truncate, 0.0, 4000, 5, net=net)
        assert ((x - x.round()).abs() < 1e-6).all() and (x.sum(2) - 1).abs().max() < 1e-6
        REWARD(x).mean().backward()
        assert net.logits.grad[last].abs().max() > 0
        # at step 3 of 3 everything is masked: with truncate 1 and 2 that state is met again only by waiting
        assert truncate < 3 or net.logits.grad[first].abs().max() > 0


def gradient_error(module, kl_weight, temperature=0.3):
    """Distance of the mean gradient from that of E[r] - kl_weight KL, over the length of the latter."""
    net, exact = table_of(1), table_of(1)
    args = types.SimpleNamespace(steps=STEPS, truncate=STEPS, temperature=temperature, soft=False)
    x, kl, _ = module.relaxed_paths(net, BASE, 20_000, LENGTH, args, kl_weight, generator(6))
    (REWARD(x) - kl_weight * kl).mean().backward()
    p = path_log_p(exact)[0].exp()
    (p @ (REWARD_OF_PATHS - kl_weight * path_kl(exact, BASE))).backward()
    return ((net.logits.grad - exact.logits.grad).norm() / exact.logits.grad.norm()).item()


def test_gradient_is_nearly_that_of_the_objective():
    """Straight-through gradients are biased, the more so the higher the temperature; without those through the states
    that are met, they would be far off."""
    cold, warm = gradient_error(draft, 0.0), gradient_error(draft, 0.0, temperature=1.0)
    assert cold < 0.3 and cold + 0.05 < warm < 0.45 and gradient_error(draft, 1.0) < 0.3
    assert gradient_error(planted("dna/draft.py", ("relaxed_step(log_p, x, step, args",
                                                   "relaxed_step(log_p, x.detach(), step, args")), 0.0) > 0.6


# ---- DDPO ------------------------------------------------------------------------------------------------------------


def mean_policy_loss(module, net, worth, clip=0.2, kl_weight=0.0, behind=None):
    """The loss, averaged over all trajectories of the sampler and all places."""
    (x, when), (log_p, chosen) = every_path(), path_log_p(behind or net)
    paths = dict(x=x, when=when, log_p=chosen.detach())
    loss = sum(module.policy_loss(net, BASE, paths, worth, torch.full((len(x), 1), k), clip, kl_weight)
               for k in range(LENGTH))
    return log_p.exp().detach() @ loss / LENGTH


def policy_gradients(module, kl_weight):
    """The gradient of the loss, and the exact one of -(E[r] - kl_weight KL), at the parameters that sampled."""
    x = every_path()[0]
    reward = REWARD_OF_PATHS
    net, exact = table_of(1), table_of(1)
    worth = reward - kl_weight * path_kl(NET, BASE).detach()
    mean_policy_loss(module, net, worth - worth.mean(), kl_weight=kl_weight).backward()
    p = path_log_p(exact)[0].exp()
    (-(p @ reward) + kl_weight * p @ path_kl(exact, BASE)).backward()
    return net.logits.grad, exact.logits.grad


@pytest.mark.parametrize("kl_weight", [0.0, 0.7])
def test_policy_gradient_is_exact(kl_weight):
    """Score function of the penalised return plus the KL's own gradient: on the listed law, to 1e-10.

    Without weights on the masked places: L times the mean over them has the expectation of the sum over steps."""
    ours, exact = policy_gradients(ddpo, kl_weight)
    assert exact.abs().max() > 0.01 and (ours - exact).abs().max() < 1e-10


POLICY_BUGS = {
    "averaged log probabilities": ("ratio = change.sum(1).exp()", "ratio = (change.sum(1) / count).exp()"),
    "all letters of the end": ("- paths[\"log_p\"]) * new", "- paths[\"log_p\"]) * (z == MASK)"),
    "steps of many letters count more": ("loss = -gain * x.shape[1] / count", "loss = -gain * x.shape[1]"),
    "the letters are seen": ("z, new = torch.where(paths[\"when\"] > step, x, MASK)",
                             "z, new = torch.where(paths[\"when\"] >= step, x, MASK)"),
    "downhill": ("loss = -gain", "loss = gain"),
    "no KL": ("loss = loss + kl_weight *", "loss = loss + 0 * kl_weight *"),
    "KL of places that are set": ("masked = z == MASK", "masked = z != MASK"),
}


@pytest.mark.parametrize("bug", POLICY_BUGS)
def test_planted_bug_of_the_policy_loss_is_caught(bug):
    ours, exact = policy_gradients(planted("dna/ddpo.py", POLICY_BUGS[bug]), 0.7)
    assert not (ours - exact).abs().max() < 1e-3


def test_clipping_stops_where_it_should():
    """Away from the parameters that sampled: the gain is min(ratio A, clip(ratio) A), of one step's summed ratio."""
    net, (x, when) = table_of(4), every_path()
    worth = torch.randn(len(x), generator=generator(7), dtype=torch.float64)
    ours = mean_policy_loss(ddpo, net, worth, behind=NET)
    (log_p, old), wanted = path_log_p(NET), 0.0
    new = path_log_p(net)[1]
    for step in range(STEPS, 0, -1):
        some = (when == step).any(1)
        ratio = ((new - old) * (when == step)).sum(1).exp()
        gain = torch.minimum(ratio * worth, ratio.clamp(0.8, 1.2) * worth)
        wanted = wanted - log_p.exp() @ (gain * some)
    assert abs(ours - wanted) < 1e-10
    unclipped = mean_policy_loss(ddpo, net, worth, clip=100.0, behind=NET)
    assert abs(unclipped - ours) > 1e-3


# ---- what training reaches -------------------------------------------------------------------------------------------


def trained(module, kl_weight, iterations, lr, **options):
    """Iterations on a table, the rate falling as in `improve_model` -> E[r] and KL of the listed paths after it."""
    net = Table(BASE.logits.detach().float())
    world = types.SimpleNamespace(network=Table(BASE.logits.detach().float()), length=LENGTH, reward=REWARD)
    args = types.SimpleNamespace(steps=STEPS, bf16=False, **options)
    optimizer, rng = torch.optim.Adam(net.parameters(), lr, betas=(0.9, 0.99)), generator(8)
    for k in range(iterations):
        optimizer.param_groups[0]["lr"] = lr * (1 - k / iterations)
        numbers = getattr(module, UPDATE[module.METHOD])(net, world, args, kl_weight, optimizer, rng)
    assert set(numbers) == {"reward", "kl", "denoiser_calls", "oracle_calls"}
    with torch.no_grad():
        p = path_log_p(net)[0].double().exp()
        return (p @ REWARD_OF_PATHS).item(), (p @ path_kl(net, BASE)).item()


UPDATE = dict(draft="drakes_update", ddpo="policy_update")
DRAKES = dict(batch=200, truncate=STEPS, temperature=0.3, soft=False)
METHODS = {  # with the shares of the best rise between which training must end
    "draft": (draft, 0.93, 1, 120, 0.15, DRAKES),
    "draft, soft": (draft, 0.92, 1, 120, 0.15, DRAKES | dict(soft=True)),
    "draft, warm": (draft, 0.75, 0.92, 120, 0.15, DRAKES | dict(temperature=1.0)),
    "draft, truncated": (draft, 0.5, 0.8, 120, 0.15, DRAKES | dict(truncate=1)),
    "ddpo": (ddpo, 0.93, 1, 50, 0.1, dict(trajectories=500, updates=4, batch=500, clip=0.2)),
}


@pytest.fixture(scope="module")
def objectives():
    """E[r] - KL of the base process; the highest of denoisers, by exact gradients; and log Z, of all processes."""
    net, p = table_of(2), path_log_p(BASE)[0].exp().detach()
    optimizer = torch.optim.Adam(net.parameters(), 0.1)
    for _ in range(100):
        optimizer.zero_grad()
        objective = path_log_p(net)[0].exp() @ (REWARD_OF_PATHS - path_kl(net, BASE))
        (-objective).backward()
        optimizer.step()
    assert net.logits.grad.abs().max() < 1e-3
    return (p @ REWARD_OF_PATHS).item(), objective.item(), (p @ REWARD_OF_PATHS.exp()).log().item()


@pytest.mark.parametrize("method", METHODS)
def test_objective_comes_close_to_its_maximum(method, objectives):
    """log Z is out of reach: letters that are set in one step are independent, and when they are set is fixed. Of what
    denoisers can gain, nearly all is gained, but for the bias of a high temperature and of truncation."""
    (start, best, log_z), (module, low, high, iterations, lr, options) = objectives, METHODS[method]
    assert 0.7 < (best - start) / (log_z - start) < 0.8
    mean, kl = trained(module, 1.0, iterations, lr, **options)
    share = (mean - kl - start) / (best - start)
    assert low < share < high, share
    freely, far = trained(module, 0.0, iterations, lr, **options)
    assert freely > mean + 0.1 and far > kl


@pytest.mark.parametrize("method", ["draft", "ddpo"])
def test_discarded_gradients_are_caught(method):
    module, _, _, _, lr, options = METHODS[method]
    wrong = planted(f"dna/{method}.py", ("torch.nn.utils.clip_grad_norm_",
                                         "optimizer.zero_grad(); torch.nn.utils.clip_grad_norm_"))
    start = (path_log_p(BASE)[0].exp().detach() @ REWARD_OF_PATHS).item()
    assert abs(trained(wrong, 0.0, 5, lr, **options)[0] - start) < 1e-6
    assert abs(trained(module, 0.0, 5, lr, **options)[0] - start) > 1e-2


# ---- the scripts -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """A folder of untrained networks of both worlds."""
    folder, rng = tmp_path_factory.mktemp("networks"), generator(0)
    for world in ("mpsa", "hepg2"):
        draft.save_network(folder / f"{world}_base.safetensors", draft.MaskedDenoiser(8, 3, [1, 2], rng), "{}")
    cells = ["gm12878", "hepg2", "k562", "hesc"]
    for name, kind in (("oracle_a", "classes"), ("oracle_b", "classes"), ("accessibility", "open")):
        draft.save_network(folder / f"hepg2_{name}.safetensors", draft.Oracle(cells, kind, 8, rng), "{}")
    return folder


def run_script(module, networks, out, *flags):
    return module.main(module.parse_args(["--quick", "--checkpoints", str(networks), "--out", str(out), *flags]))


@pytest.mark.parametrize("name", ["draft", "ddpo"])
def test_quick_runs(name, networks, tmp_path):
    """Finite and in range in both worlds; interrupted and resumed, the same numbers."""
    module = load(f"dna/{name}.py")
    first = run_script(module, networks, tmp_path / "a", "--world", "mpsa", "--iterations", "12")
    assert all(math.isfinite(v) for v in first.values())
    assert first["target.mpsa.objective"] > first[f"{name}_kl.mpsa.objective"]
    assert 0 < first[f"{name}.mpsa.distinct"] <= 1
    update, calls = getattr(module, UPDATE[name]), []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return update(*args)

    setattr(module, UPDATE[name], interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_script(module, networks, tmp_path / "b", "--world", "mpsa", "--iterations", "12")
    finally:
        setattr(module, UPDATE[name], update)
    assert {p.name for p in (tmp_path / f"b/dna_{name}").iterdir()} == {f"{name}.part.pt"}
    assert run_script(module, networks, tmp_path / "b", "--world", "mpsa", "--iterations", "12", "--resume") == first
    real = run_script(module, networks, tmp_path / "c")
    assert all(math.isfinite(v) for v in real.values()) and 0 < real[f"{name}.hepg2.diversity"] < 200
    rows = {r["name"] for r in json.loads((tmp_path / f"c/dna_{name}/numbers.json").read_text())["rows"]}
    assert {f"{name}_kl.hepg2.held_out", f"{name}.hepg2.over_optimisation", "real_hepg2.hepg2.held_out_p90"} <= rows


@pytest.mark.parametrize("name, flags", [(name, flags) for name in ("draft", "ddpo") for flags in (
    "--iterations 0", "--kl-weight -1", "--data x.csv --world mpsa", "--data missing.csv", "--checkpoints nowhere",
    "--samples 1", "--steps 4 --truncate 5" if name == "draft" else "--trajectories 1")])
def test_bad_flags_end_in_one_sentence(name, flags, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = load(f"dna/{name}.py")
    with pytest.raises(SystemExit) as end:
        module.main(module.parse_args([*flags.split(), "--out", str(tmp_path / "out")]))
    assert_one_sentence(end, capsys)


def test_rewards_without_gradient_or_not_finite(capsys):
    with pytest.raises(SystemExit) as end:
        world = types.SimpleNamespace(network=BASE, length=LENGTH, reward=lambda x: x.detach().sum((1, 2)))
        args = types.SimpleNamespace(steps=3, truncate=2, temperature=1.0, soft=False, bf16=False, batch=4)
        net = table_of(1)
        draft.drakes_update(net, world, args, 0.0, torch.optim.Adam(net.parameters()), generator(0))
    assert_one_sentence(end, capsys)
    with pytest.raises(SystemExit) as end:
        world = types.SimpleNamespace(network=BASE, length=LENGTH, reward=lambda x: torch.full((len(x),), math.nan))
        args = types.SimpleNamespace(steps=3, updates=1, clip=0.2, bf16=False, batch=4, trajectories=4)
        ddpo.policy_update(table_of(1), world, args, 0.0, None, generator(0))
    assert_one_sentence(end, capsys)
