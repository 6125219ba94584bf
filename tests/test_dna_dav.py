"""dna/dav.py on enumerated laws: E-step, M-step, exact rounds, the script.

The reverse process on 4^5 sequences is known for any number of steps through the kernel matrices of its 5^5 masked
states; on 4^3 sequences every trajectory of three steps is listed. z-scores of the weighted samplers are of mean over
groups of Z_g (mean of f in the group - E[f]), unbiased at any number of particles; |z| > 5 is a bug.
"""
import itertools
import json
import math

import pytest
import torch
from conftest import load, planted

dav = load("dna/dav.py")
MASK, LENGTH, STEPS = dav.MASK, 5, 6


def generator(seed):
    return torch.Generator().manual_seed(seed)


def assert_one_sentence(end, capsys):
    text = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(text[-1]) > 15 and not any("Traceback" in line for line in text), text


# ---- a landscape of 4^5 sequences ------------------------------------------------------------------------------------


def landscape(length):
    """A mixture of three motifs and the uniform law, and the share of letters in common with two of the motifs."""
    x = dav.all_sequences(length)
    motifs = torch.tensor([[3, 0, 3, 0, 1], [2, 1, 0, 3, 2], [1, 1, 2, 0, 0]])[:, :length]
    match = (x[:, None] == motifs).double()  # (4^L, 3, L)
    p = (0.7 * match + 0.1 * (1 - match)).prod(2) @ torch.tensor([0.5, 0.3, 0.1]).double() + 0.1 / len(x)
    return p / p.sum(), match[:, 1:].mean(2).amax(1)


SMALL, SMALL_STEPS = 3, 3
(P, R), (SMALL_P, SMALL_R) = landscape(LENGTH), landscape(SMALL)
X = dav.all_sequences(LENGTH)
ALPHA = 0.25
DENOISER = dav.ExactDenoiser(P)
STATES = torch.cartesian_prod(*[torch.arange(5)] * LENGTH)
DONE = ~(STATES == MASK).any(1)


OPTION = torch.cartesian_prod(*[torch.arange(9)] * LENGTH)  # 9^5 moves: at a place, keep a letter, set it, stay masked
BEFORE, AFTER = (torch.tensor(digits)[OPTION] for digits in ([0, 1, 2, 3, 4, 4, 4, 4, 4], [0, 1, 2, 3, 0, 1, 2, 3, 4]))
PLACE = 5 ** torch.arange(LENGTH - 1, -1, -1)
SOURCE, GOAL = (BEFORE * PLACE).sum(1), (AFTER * PLACE).sum(1)
NEW, LEFT = (BEFORE == MASK) & (AFTER != MASK), (AFTER == MASK).sum(1)


def kernels(log_p, steps=STEPS):
    """Probability of every move, step by step, for a table of letters log_p (5^5, 5, 4) -> (9^5,) each."""
    letter = log_p[SOURCE].gather(2, AFTER.clamp(max=3)[:, :, None])[:, :, 0].exp()
    weight = torch.where(NEW, letter, 1.0).prod(1)
    for step in range(steps, 0, -1):
        yield weight * (1 / step) ** NEW.sum(1).double() * (1 - 1 / step) ** LEFT.double()


def onward(law, kernel):
    return torch.zeros_like(law).index_add_(0, GOAL, law[SOURCE] * kernel)


def chain_law(log_p, steps=STEPS):
    """The law (4^5,) of the reverse process with this table of letters."""
    law = torch.zeros(len(STATES), dtype=torch.float64)
    law[-1] = 1
    for kernel in kernels(log_p, steps):
        law = onward(law, kernel)
    return law[DONE]


P_T = chain_law(DENOISER(STATES))
TARGET, LOG_Z = dav.tilt_law(P_T.log(), R / ALPHA)


def test_kernels_and_soft_values():
    value = torch.zeros(len(STATES), dtype=torch.float64)
    value[DONE] = (R / ALPHA).exp()
    for kernel in reversed(list(kernels(DENOISER(STATES)))):
        assert (torch.zeros_like(value).index_add_(0, SOURCE, kernel) - 1).abs().max() < 1e-12
        value = torch.zeros_like(value).index_add_(0, SOURCE, kernel * value[GOAL])
    assert abs(P_T.sum() - 1) < 1e-12 and abs(value[-1].log() - LOG_Z) < 1e-10
    assert 0.02 < (P_T - P).abs().sum() / 2 < 0.2  # several letters a step: not the law itself


def discounted_reward(gamma, steps):
    """E[r] of the exact optimum for a discount: V_t = log E[exp(gamma V_{t-1})], V_1 = log E[exp(r / alpha)]."""
    value = torch.full((len(STATES),), -math.inf, dtype=torch.float64)
    value[DONE] = R / ALPHA
    chosen, law = [], torch.zeros(len(STATES), dtype=torch.float64)
    for step, kernel in enumerate(reversed(list(kernels(DENOISER(STATES), steps)))):
        scale = 1.0 if step == 0 else gamma
        tilted = kernel * (scale * value).exp()[GOAL]
        total = torch.zeros_like(value).index_add_(0, SOURCE, tilted)
        chosen.append(tilted / total[SOURCE].clamp(min=1e-300))
        value = total.log()
    law[-1] = 1
    for kernel in reversed(chosen):
        law = onward(law, kernel)
    return (law[DONE] @ R).item()


def test_discount_changes_the_exact_target():
    rewards = [discounted_reward(gamma, 4) for gamma in (1.0, 0.9, 0.5)]
    p = chain_law(DENOISER(STATES), 4)
    assert abs(rewards[0] - dav.tilt_law(p.log(), R / ALPHA)[0].exp() @ R) < 1e-10
    assert rewards[0] > rewards[1] + 0.01 > rewards[2] + 0.02 and rewards[2] > p @ R


# ---- exact answers ---------------------------------------------------------------------------------------------------


def exact_twist(p, value):
    """log E_p[exp(value) | x] of all 5^L masked states: the soft value as the number of steps goes to infinity."""
    law, log_z = dav.tilt_law(p.log(), value)
    return dav.ExactDenoiser(law.exp()).log_mass + log_z - dav.ExactDenoiser(p).log_mass


def test_local_search_with_exact_values_is_exact():
    selected = dav.selection_law(DENOISER, exact_twist(P, R / ALPHA), LENGTH)
    assert (selected - dav.tilt_law(P.log(), R / ALPHA)[0].exp()).abs().max() < 1e-12
    assert (dav.selection_law(DENOISER, torch.zeros(5**LENGTH).double(), LENGTH) - P).abs().max() < 1e-12


def test_local_search_with_forecasts_is_biased():
    """With infinitely many children the argmax forecast of the official code misses by far more than sampling noise."""
    target = dav.tilt_law(P.log(), R / ALPHA)[0].exp()
    likely = torch.where(STATES == MASK, DENOISER(STATES).argmax(2), STATES)
    selected = dav.selection_law(DENOISER, dav.TableReward(R)(likely) / ALPHA, LENGTH)
    assert abs(selected.sum() - 1) < 1e-12 and (selected - target).abs().sum() / 2 > 0.03


def test_rounds_without_kl_tilt_further():
    for k, (log_p, log_z, _) in enumerate(dav.exact_rounds(DENOISER, R, ALPHA, 0.0, 4)):
        wanted, _ = dav.tilt_law(P.log(), k * R / ALPHA)
        assert (log_p - wanted).abs().max() < 1e-10
        assert abs(log_z - (log_p + R / ALPHA).logsumexp(0)) < 1e-10


@pytest.mark.parametrize("kl", [0.03, 0.3, 1.0, 5.0])
def test_kl_step_against_a_numerical_optimum(kl):
    target, base = dav.tilt_law(SMALL_P.log(), SMALL_R / ALPHA)[0], SMALL_P.log()
    q = dav.kl_projection(target, base, kl)
    c = 1 - kl * (q.exp() * (q - base)).sum()
    assert abs(q.exp().sum() - 1) < 1e-12
    assert (kl * q.exp() * (q - base) + c * q.exp() - target.exp()).abs().max() < 1e-12  # stationary, with that c
    if kl < 0.1:  # too steep for the optimiser
        return
    free = q.detach().clone() + 0.3 * torch.randn(len(q), generator=generator(0), dtype=torch.float64)
    free.requires_grad_()
    optimizer = torch.optim.LBFGS([free], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        log_q = free.log_softmax(0)
        loss = -(target.exp() * log_q).sum() + kl * (log_q.exp() * (log_q - base)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert (free.detach().softmax(0) - q.exp()).abs().sum() / 2 < 1e-5


def test_kl_rounds_tend_to_their_fixed_point():
    """p* in proportion to p_0 exp(w / kl), w = exp(r / alpha) / E_p*[exp(r / alpha)]."""
    log_p = P.log()
    for _ in range(150):
        target, log_z = dav.tilt_law(log_p, R / 0.5)
        log_p = dav.kl_projection(target, P.log(), 0.7)
    wanted, _ = dav.tilt_law(P.log(), (R / 0.5 - log_z).exp() / 0.7)
    assert (log_p.exp() - wanted.exp()).abs().max() < 1e-9


# ---- E-step ----------------------------------------------------------------------------------------------------------


def run_search(module, seed, n, children, particles, gamma=1.0, ess=0.9, guided=False, kind="mean", reward=None,
               denoiser=DENOISER, steps=STEPS):
    rng, reward = generator(seed), reward or module.TableReward(R)
    return module.search_paths(denoiser, module.forecaster(reward, kind, rng), n, LENGTH, steps, rng, ALPHA, children,
                               particles, gamma, ess, reward if guided else None)


def index(x):
    return (x * 4 ** torch.arange(LENGTH - 1, -1, -1)).sum(1)


FUNCTIONS = torch.stack([torch.ones_like(R), R, (R == 1).double(), (X[:, 0] == 2).double(), (X[:, 4] == 0).double()])


def search_z(module, seed, **options):
    """z-scores of Z and of E[f] under the target."""
    particles = options.get("particles", 1)
    out = run_search(module, seed, **options)
    z = (out["log_z"] - LOG_Z).exp()
    f = FUNCTIONS[:, index(out["x"])] - (FUNCTIONS @ TARGET.exp())[:, None]
    if particles == 1:  # a group is one trajectory and keeps its weight
        products = z * f
    else:
        products = z * f.view(len(FUNCTIONS), -1, particles).mean(2)
    products[0] = z - 1
    scores = products.mean(1) / (products.std(1) / len(z) ** 0.5)
    return scores.nan_to_num(math.inf).tolist()


CASES = {
    "one child, one particle": dict(n=20_000, children=1, particles=1),
    "local": dict(n=6000, children=4, particles=1),
    "smc": dict(n=12_800, children=1, particles=16),
    "nested": dict(n=6400, children=4, particles=16),
    "nested, guided": dict(n=3200, children=3, particles=16, guided=True),
    "nested, argmax": dict(n=6400, children=4, particles=16, kind="argmax"),
    "nested, discounted": dict(n=6400, children=4, particles=16, gamma=0.8),
    "smc, draws": dict(n=12_800, children=1, particles=16, kind="draws"),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_are_proper(case):
    """Unbiased for the law of the discretised sampler, with any forecast, discount, proposal and number of children."""
    assert max(map(abs, search_z(dav, 11, **CASES[case]))) <= 5


SEARCH_BUGS = {
    "weights are summed, not averaged": ("log_w = state[\"log_w\"] + log_mean_exp(w) - state[\"twist\"]",
                                         "log_w = state[\"log_w\"] + w.logsumexp(1) - state[\"twist\"]"),
    "the parent's twist stays": ("log_mean_exp(w) - state[\"twist\"]", "log_mean_exp(w)"),
    "best child": ("invert_cdf(w.softmax(1), u)[:, 0]", "w.argmax(1)"),
    "the survivor's own weight": ("log_w = state[\"log_w\"] + log_mean_exp(w)",
                                  "log_w = state[\"log_w\"] + w.flatten()[pick]"),
    "no correction of the proposal": ("w = (log_ratio + child", "w = (0 * log_ratio + child"),
    "weights kept after resampling": ("torch.where(due[:, None], 0, log_w).flatten()", "log_w.flatten()"),
    "log Z not accumulated": ("log_z = log_z + torch.where(due, log_mean_exp(log_w), 0)", "pass"),
    "worth of the parent": ("child[\"worth\"].index_copy(0, due, forecast(child[\"log_p\"][due], x[due]))",
                            "child[\"worth\"]"),
    "denoiser of the parent": ("child[\"log_p\"] = refresh(denoiser, child[\"log_p\"], x, new)[0]", "pass"),
    "survivors of the neighbour": ("pick = torch.arange(n, device=rng.device) * children",
                                   "pick = torch.arange(n, device=rng.device).roll(1) * children"),
}


@pytest.mark.parametrize("bug", SEARCH_BUGS)
def test_planted_bug_of_the_search_is_caught(bug):
    module = planted("dna/dav.py", SEARCH_BUGS[bug])
    options = dict(CASES["nested, guided" if "proposal" in bug else "nested"])
    if "denoiser" in bug:  # the forecast is then that of the parent too, which is no error; the letters are
        assert max(map(abs, search_z(module, 11, **CASES["one child, one particle"]))) > 5
    else:
        assert max(map(abs, search_z(module, 11, **options))) > 5


@pytest.mark.parametrize("guided", [False, True])
def test_log_weights_are_those_of_the_trajectory(guided):
    """log p - log q + r / alpha, recomputed from the sequence and the steps that set it; the masked stay out of it."""
    out = run_search(dav, 3, 200, 1, 1, gamma=0.9, guided=guided)
    reward, total = dav.TableReward(R), out["reward"] / ALPHA
    for step in range(STEPS, 0, -1):
        z = torch.where(out["when"] > step, out["x"], MASK)
        log_p = DENOISER(z)
        if guided:
            soft = torch.where((z == MASK)[:, :, None], log_p.exp(), torch.eye(5)[z][:, :, :4].double())
            soft.requires_grad_()
            grad = torch.autograd.grad(reward(soft).sum(), soft)[0]
            shift = 0.9 ** (step - 1) / ALPHA * (grad - (soft.detach() * grad).sum(2, keepdim=True))
            log_q = log_p + shift.clamp(-2, 2)
            log_q = log_q - log_q.logsumexp(2, keepdim=True)
            for k in range(LENGTH):
                rows = (out["when"][:, k] == step).nonzero()[:, 0]
                total[rows] += (log_p - log_q)[rows, k, out["x"][rows, k]]
    assert (total - out["log_w"][:, 0]).abs().max() < 1e-10
    assert (out["reward"] - R[index(out["x"])]).abs().max() < 1e-12
    assert out["when"].min() >= 1 and out["when"].max() <= STEPS


def total_variation(x, law):
    return (torch.bincount(index(x), minlength=len(law)).double() / len(x) - law).abs().sum().item() / 2


def test_local_search_converges_with_its_children():
    """Exact values: the error falls to that of sampling; the argmax forecast does not get there."""
    twist, place = exact_twist(P, R / ALPHA), 5 ** torch.arange(LENGTH - 1, -1, -1)
    target = dav.tilt_law(chain_law(DENOISER(STATES), 24).log(), R / ALPHA)[0].exp()
    errors = []
    for children in (1, 4, 32):
        out = dav.search_paths(DENOISER, lambda _, x: ALPHA * twist[(x * place).sum(1)], 3000, LENGTH, 24, generator(5),
                               ALPHA, children)
        errors.append(total_variation(out["x"], target))
    floor = total_variation(X[torch.multinomial(target, 3000, replacement=True, generator=generator(6))], target)
    assert errors[0] > errors[1] + 0.1 > errors[2] + 0.15 and errors[2] < floor + 0.04
    argmax = run_search(dav, 5, 3000, 32, 1, kind="argmax", steps=24)
    assert total_variation(argmax["x"], target) > errors[2] + 0.02


def test_discounted_local_search_tilts_less():
    rewards = [run_search(dav, 7, 2000, 16, 1, gamma=gamma)["reward"].mean() for gamma in (1.0, 0.7, 0.2)]
    assert rewards[0] > rewards[1] + 0.01 > rewards[2] + 0.02


def test_a_constant_added_to_the_reward_changes_nothing():
    """The official search keeps its survivor only where rewards are positive."""
    plain, lowered = (run_search(dav, 8, 400, 4, 8, reward=dav.TableReward(R - shift)) for shift in (0.0, 100.0))
    assert (plain["x"] == lowered["x"]).all() and (plain["when"] == lowered["when"]).all()
    assert (plain["log_z"] - lowered["log_z"] - 100 / ALPHA).abs().max() < 1e-9


def test_resampling_happens_and_calls_are_skipped():
    denoiser, reward = dav.CountRows(DENOISER), dav.CountRows(dav.TableReward(R))
    out = run_search(dav, 9, 1600, 2, 16, denoiser=denoiser, reward=reward, steps=50)
    assert out["resampled"] > 1.5  # once at the end
    assert denoiser.rows < 1 + 1600 * 2 * LENGTH and reward.rows < 1 + 1600 * 2 * LENGTH  # of 1600 x 2 x 50


def test_without_reward_the_search_is_the_sampler():
    for options in CASES.values():
        n, children, particles = options["n"], options["children"], options["particles"]
        out = run_search(dav, 10, n, children, particles, reward=dav.TableReward(torch.zeros_like(R)))
        assert out["log_z"].abs().max() < 1e-10 and out["resampled"] == (particles > 1)
        f = FUNCTIONS[1:, index(out["x"])]
        z = (f.mean(1) - FUNCTIONS[1:] @ P_T) / ((FUNCTIONS[1:] ** 2 @ P_T - (FUNCTIONS[1:] @ P_T) ** 2) / n).sqrt()
        assert z.abs().max() <= 5
    assert dav.letter_probabilities(DENOISER(STATES), STATES)[~(STATES == MASK)].amax(1).min() == 1


# ---- M-step ----------------------------------------------------------------------------------------------------------


class Table(torch.nn.Module):
    """A denoiser with a free law for every place of every masked state."""

    def __init__(self, log_p):
        super().__init__()
        self.logits, self.length = torch.nn.Parameter(log_p.clone()), log_p.shape[1]

    def forward(self, x):
        return self.logits[(x * 5 ** torch.arange(self.length - 1, -1, -1)).sum(1)].log_softmax(2)


def finite(log_p):
    """The table of an exact denoiser: where a place is known its letters are not asked for."""
    return log_p.nan_to_num(0.0, 0.0, 0.0)


SMALL_STATES = torch.cartesian_prod(*[torch.arange(5)] * SMALL)


def small_paths(value):
    """Every trajectory of three steps on 4^3 sequences: x, when (64 * 27, 3), and its weight under p exp(value) / Z."""
    when = torch.tensor(list(itertools.product(range(1, SMALL_STEPS + 1), repeat=SMALL)))
    x, when = dav.all_sequences(SMALL).repeat_interleave(len(when), 0), when.repeat(4**SMALL, 1)
    denoiser, log_w = dav.ExactDenoiser(SMALL_P), torch.zeros(len(x), dtype=torch.float64)
    for step in range(SMALL_STEPS, 0, -1):
        z, new, left = torch.where(when > step, x, MASK), when == step, when < step
        log_p = finite(denoiser(z)).gather(2, x[:, :, None])[:, :, 0]
        log_w += (log_p * new).sum(1) - new.sum(1).double() * math.log(step)
        log_w += left.sum(1).double() * math.log(max(1 - 1 / step, 1e-300))
    assert abs(log_w.exp().sum() - 1) < 1e-12
    return x, when, (log_w + value[(x * 4 ** torch.arange(SMALL - 1, -1, -1)).sum(1)]).softmax(0)


def mean_path_loss(module, net, base, x, when, w, kl):
    """The M-step's loss, averaged over trajectories and places."""
    places = (torch.full((len(x), 1), k) for k in range(SMALL))
    return sum((w * module.path_loss(net, base, x, when, place, kl)).sum() for place in places) / SMALL


def optimal_table(x, when, w):
    """Shares of the letters that trajectories set, for every state and place: the maximum of their likelihood."""
    table = torch.full((5**SMALL, SMALL, 4), 1e-300, dtype=torch.float64)
    for step in range(SMALL_STEPS, 0, -1):
        z, new = torch.where(when > step, x, MASK), when == step
        state = (z * 5 ** torch.arange(SMALL - 1, -1, -1)).sum(1)
        for k in range(SMALL):
            table.index_put_((state[new[:, k]], torch.tensor(k), x[new[:, k], k]), w[new[:, k]], accumulate=True)
    return (table / table.sum(2, keepdim=True)).log()


def test_loss_is_the_likelihood_of_the_steps():
    """On all trajectories: its value is -log p of the letters set, and its minimum is where they are reproduced."""
    for value in (torch.zeros(4**SMALL).double(), SMALL_R / ALPHA):
        x, when, w = small_paths(value)
        base = Table(finite(dav.ExactDenoiser(SMALL_P)(SMALL_STATES)))
        total = torch.zeros(len(x), dtype=torch.float64)
        for step in range(SMALL_STEPS, 0, -1):
            z, new = torch.where(when > step, x, MASK), when == step
            total -= (base(z).gather(2, x[:, :, None])[:, :, 0] * new).sum(1)
        assert abs(mean_path_loss(dav, base, None, x, when, w, 0.0) - w @ total) < 1e-10
        net = Table(optimal_table(x, when, w))
        mean_path_loss(dav, net, None, x, when, w, 0.0).backward()
        assert net.logits.grad.abs().max() < 1e-12
        if value.abs().max() == 0:  # without reward a round is the identity
            masked = SMALL_STATES == MASK
            assert (net(SMALL_STATES) - base(SMALL_STATES))[masked].abs().max() < 1e-10


TARGETS = "loss = hidden_loss(log_p, x, when == step)"
LOSS_BUGS = {
    "argmax targets": (TARGETS, "loss = hidden_loss(log_p, torch.where(z == MASK, log_p.argmax(2), x), z == MASK)"),
    "all letters of the end": (TARGETS, "loss = hidden_loss(log_p, x, z == MASK)"),
    "inverted weight": (TARGETS, "loss = hidden_loss(log_p, x, when == step) * (when == step).sum(1) ** 2"),
    "no weight": (TARGETS, "loss = hidden_loss(log_p, x, when == step) * (when == step).sum(1)"),
    "the letters are seen": ("z = torch.where(when > step, x, MASK)", "z = torch.where(when >= step, x, MASK)"),
    "the letters of the steps before": (TARGETS, "loss = hidden_loss(log_p, x, when >= step)"),
}


@pytest.mark.parametrize("bug", LOSS_BUGS)
def test_planted_bug_of_the_loss_is_caught(bug):
    module = planted("dna/dav.py", LOSS_BUGS[bug])
    x, when, w = small_paths(SMALL_R / ALPHA)
    net = Table(optimal_table(x, when, w))
    loss = mean_path_loss(module, net, None, x, when, w, 0.0)
    loss.backward()
    right = mean_path_loss(dav, net, None, x, when, w, 0.0)
    assert not (abs(loss - right) < 1e-6 and net.logits.grad.abs().max() < 1e-6)
    if bug != "the letters are seen":
        assert not net.logits.grad.nan_to_num(1.0).abs().max() < 1e-4


def test_kl_of_the_loss_is_that_of_the_kernels():
    """Without reward, the sum over steps and masked places of 1 / step times the KL of the letters, to 1e-10."""
    x, when, w = small_paths(torch.zeros(4**SMALL).double())
    base = Table(finite(dav.ExactDenoiser(SMALL_P)(SMALL_STATES)))
    net = Table(base.logits.detach() + torch.randn(base.logits.shape, generator=generator(1), dtype=torch.float64))
    exact = 0.0
    for step in range(SMALL_STEPS, 0, -1):
        z = torch.where(when > step, x, MASK)
        gap = (net(z).exp() * (net(z) - base(z))).sum(2) * (z == MASK)
        exact += (w @ gap.sum(1)) / step
    ours = mean_path_loss(dav, net, base, x, when, w, 1.0) - mean_path_loss(dav, net, base, x, when, w, 0.0)
    assert exact > 0.3 and abs(ours - exact) < 1e-10


@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_exact_rounds_are_the_minima_of_the_loss(kl):
    """Two rounds of minimising the loss over all trajectories of one letter at a time, by a table, to 1e-6."""
    when = torch.tensor(list(itertools.permutations(range(1, SMALL + 1))))
    x, when = dav.all_sequences(SMALL).repeat_interleave(len(when), 0), when.repeat(4**SMALL, 1)
    denoiser = dav.ExactDenoiser(SMALL_P)
    base = Table(finite(denoiser(SMALL_STATES)))
    net, exact = Table(base.logits.detach()), dav.exact_rounds(denoiser, SMALL_R, 0.5, kl, 2)

    def trajectories():
        log_p = sum((net(torch.where(when > step, x, MASK)).gather(2, x[:, :, None])[:, :, 0] * (when == step)).sum(1)
                    for step in range(1, SMALL + 1)).detach()
        return log_p - math.log(math.factorial(SMALL))

    for k in range(3):
        log_p = trajectories()
        law = log_p.exp().view(4**SMALL, -1).sum(1)
        assert (law - exact[k][0].exp()).abs().max() < 1e-6
        tilted, log_z = dav.tilt_law(log_p, SMALL_R.repeat_interleave(math.factorial(SMALL)) / 0.5)
        assert abs(log_z - exact[k][1]) < 1e-6
        assert (tilted.exp().view(4**SMALL, -1).sum(1) - exact[k][2].exp()).abs().max() < 1e-6
        optimizer = torch.optim.LBFGS(net.parameters(), max_iter=400, tolerance_grad=1e-12, tolerance_change=0,
                                      line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            loss = mean_path_loss(dav, net, base, x, when, tilted.exp(), kl)
            loss.backward()
            return loss

        optimizer.step(closure)


def rounds(module, reward, rounds, seed=0, updates=150, kl=0.0, children=8):
    """E- and M-steps on tables -> E[r] and entropy of the exact law of the model's chain after every round."""
    base, rng, out = Table(finite(DENOISER(STATES)).float()), generator(seed), []
    net = Table(base.logits.detach())
    for k in range(rounds + 1):
        law = chain_law(net(STATES).detach().double())
        out.append(((law @ R).item(), -(law * law.log()).sum().item()))
        if k < rounds:
            forecast = module.forecaster(reward, "mean", rng)
            paths = module.search_paths(net, forecast, 4000, LENGTH, STEPS, rng, 1.0, children)
            module.fit_paths(net, base, paths["x"], paths["when"], kl, updates, 1000, 0.2, rng)
    return out


NOTHING = dav.TableReward(torch.zeros_like(R))


def test_without_reward_rounds_change_little():
    law = rounds(dav, NOTHING, 3, children=1)
    assert all(abs(entropy - law[0][1]) < 0.25 and abs(mean - law[0][0]) < 0.03 for mean, entropy in law[1:])


def test_argmax_targets_collapse_without_reward():
    law = rounds(planted("dna/dav.py", LOSS_BUGS["argmax targets"]), NOTHING, 3, children=1)
    assert law[3][1] < law[0][1] - 1.5


def test_rounds_follow_the_exact_ones():
    """E[r] after k rounds against p_0 exp(k r): local search with 8 children lags behind by a little."""
    exact = [(dav.tilt_law(P_T.log(), k * R / 1.0)[0].exp() @ R).item() for k in range(4)]
    ours = rounds(dav, dav.TableReward(R), 3)
    for k in range(1, 4):
        assert abs(ours[k][0] - exact[k]) < 0.2 * (exact[k] - exact[0]) + 0.01
    with_kl = rounds(dav, dav.TableReward(R), 3, kl=3.0)
    assert exact[0] + 0.01 < with_kl[3][0] < ours[3][0] - 0.02


def test_discarded_gradients_are_caught():
    module = planted("dna/dav.py", ("        loss.backward()\n", "        loss.backward(); optimizer.zero_grad()\n"))
    law = rounds(module, dav.TableReward(R), 1)
    assert abs(law[1][0] - law[0][0]) < 1e-6  # where the right one rises by a fifth of the distance at least
    exact = [(dav.tilt_law(P_T.log(), k * R)[0].exp() @ R).item() for k in range(2)]
    assert rounds(dav, dav.TableReward(R), 1)[1][0] - law[1][0] > 0.5 * (exact[1] - exact[0])


def test_noise_level_at_training_only_is_caught():
    """A network that is told the step in the M-step but not at sampling forgets what it knew; ours keeps its bound."""
    told = "log_p = net(one_hot(z, 5) + 5 * (step / when.max())[:, :, None] * torch.eye(5)[0])"
    sigma = planted("dna/dav.py", ("log_p = net(z)", told))
    rng = generator(1)
    start = dav.MaskedDenoiser(16, 5, [1, 1], rng)
    x = X[torch.multinomial(P, 4000, replacement=True, generator=rng)]
    when = torch.randint(1, STEPS + 1, x.shape, generator=rng)
    dav.fit_paths(start, None, x, when, 0.0, 400, 128, 1e-2, generator(2))
    bounds = [dav.masked_bound(start, x[:2000], LENGTH, generator(3)).mean().item()]
    for module in (dav, sigma):
        net = dav.copy.deepcopy(start)
        module.fit_paths(net, None, x, when, 0.0, 200, 128, 1e-2, generator(4))
        bounds.append(dav.masked_bound(net, x[:2000], LENGTH, generator(3)).mean().item())
    assert bounds[1] < bounds[0] + 0.02 and bounds[2] > bounds[0] + 0.08


# ---- the script ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """A folder of untrained networks of both worlds."""
    folder, rng = tmp_path_factory.mktemp("networks"), generator(0)
    for world in ("mpsa", "hepg2"):
        dav.save_network(folder / f"{world}_base.safetensors", dav.MaskedDenoiser(8, 3, [1, 2], rng), "{}")
    cells = ["gm12878", "hepg2", "k562", "hesc"]
    for name, kind in (("oracle_a", "classes"), ("oracle_b", "classes"), ("accessibility", "open")):
        dav.save_network(folder / f"hepg2_{name}.safetensors", dav.Oracle(cells, kind, 8, rng), "{}")
    return folder


def run_script(networks, out, *flags):
    return dav.main(dav.parse_args(["--quick", "--checkpoints", str(networks), "--out", str(out), *flags]))


@pytest.mark.parametrize("flags", [["--world", "mpsa"], ["--search", "nested"]])
def test_quick_run(flags, networks, tmp_path):
    """Finite, in range, and the same numbers when it is interrupted and resumed."""
    first = run_script(networks, tmp_path / "a", *flags)
    assert all(math.isfinite(v) for v in first.values())
    if "mpsa" in flags:
        assert first["selection_exact.mpsa.total_variation"] < 1e-12
        assert first["selection_argmax.mpsa.total_variation"] > 0.01
        return
    assert all(0 <= v <= 1 for k, v in first.items() if ".motif_" in k) and 0 < first["dav.hepg2.diversity"] < 200
    folder = tmp_path / "a/dna_dav"
    assert {p.name for p in folder.iterdir()} == {"dav.safetensors", "dav_kl.safetensors", "dav.part.pt",
                                                  "dav_kl.part.pt", "figure.png", "numbers.json"}
    interrupt, calls = dav.fit_paths, []

    def fit_paths(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return interrupt(*args)

    dav.fit_paths = fit_paths
    try:
        with pytest.raises(KeyboardInterrupt):
            run_script(networks, tmp_path / "c", *flags)
    finally:
        dav.fit_paths = interrupt
    assert {p.name for p in (tmp_path / "c/dna_dav").iterdir()} == {"dav.part.pt"}
    assert run_script(networks, tmp_path / "c", "--resume", *flags) == first
    rows = {r["name"] for r in json.loads((folder / "numbers.json").read_text())["rows"]}
    assert {"dav.hepg2.held_out", "dav_posterior.hepg2.over_optimisation", "dav_round_1.hepg2.elbo"} <= rows


def test_other_settings_are_not_resumed(networks, tmp_path, capsys):
    part = tmp_path / "out/dna_dav/dav.part.pt"
    part.parent.mkdir(parents=True)
    for content in ({"settings": "other", "history": [], "calls": {}, "net": dav.load_network(
            networks / "mpsa_base.safetensors", "cpu")[0].state_dict(), "rng": generator(0).get_state()}, {"a": 1}):
        torch.save(content, part)
        with pytest.raises(SystemExit) as end:
            run_script(networks, tmp_path / "out", "--world", "mpsa", "--resume")
        assert_one_sentence(end, capsys)
        assert not (part.parent / "numbers.json").exists()


@pytest.mark.parametrize("flags", ["--children 0", "--kl-weight -1", "--gamma 1.5", "--search beam", "--samples 1",
                                   "--data x.csv --world mpsa", "--data missing.csv", "--checkpoints nowhere",
                                   "--device cuda:99"])
def test_bad_flags_end_in_one_sentence(flags, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        dav.main(dav.parse_args([*flags.split(), "--out", str(tmp_path / "out")]))
    assert_one_sentence(end, capsys)


def test_rewards_that_are_not_finite_end_the_search(capsys):
    with pytest.raises(SystemExit) as end:
        run_search(dav, 1, 8, 2, 1, reward=dav.TableReward(torch.full_like(R, math.nan)))
    assert_one_sentence(end, capsys)
    with pytest.raises(SystemExit) as end:
        run_search(dav, 1, 8, 2, 1, guided=True, reward=lambda x: torch.zeros(len(x)).double(), kind="argmax")
    assert_one_sentence(end, capsys)
