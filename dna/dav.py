"""Align masked diffusion of DNA by expectation maximisation: a search finds rewarded paths, the model learns them.
Paper: Lee et al., "Diffusion Alignment as Variational Expectation-Maximization" (DAV), ICLR 2026, arXiv 2510.00502.
figure.png: reward and ELBO (its Fig. 4) by round, and the front of held-out reward and KL; Fig. 5 is compare.py's.
Run    python dna/dav.py                              both problems; 6 CPU minutes, --quick: 20 s, --paper: not run here
       python dna/dav.py --problem hepg2 --methods dav        or --rounds 4, --reward my.py:f --children 4
       python dna/dav.py --problem data --checkpoints out/dna_pretrain          your own table, after pretrain.py
Read first: search, dav_update. Skip: World, the networks, save_sequences, draw, checked, report.
Problems: mpsa, 5' splice sites of 9 letters, 4^9 sequences that can be enumerated; hepg2, elements of 200 letters, log
    odds of accessibility in HepG2 by oracle A; oracle B has other chromosomes, and no method sees it.
Notation (here -> paper); G groups of P particles: x (G, P, L) letters 0 to 3 or MASK, log_w (G, P)
    kl_weight -> alpha, kl -> lambda, children -> M; left: steps that remain, a masked letter is set with 1 / left
    log_twist -> Q / alpha = r(x0_hat) / kl_weight; x0_hat (G, P, L, 4) are the probabilities of the letters
    log_q -> log eta, the proposal: log_p tilted by the gradient of the twist in the letters, at most --max-shift
Algorithm, a round
    1. search: children of each state from q, one is kept in proportion to twist x p / q. Local (the paper's, hepg2):
       a path never meets another, its weight is dropped. Population (mpsa): smc weighs and resamples groups of paths
    2. dav_update: cross entropy of the letters that a step sets, the step drawn by their number, plus kl KL(p, base)
    3. the tuned model is the next round's p. The search on the last one is `posterior`
Ours: after a local search the letters are averaged over q, not drawn: the same mean without the noise of the draw; with
    several children, plus sum over c of (share of c - 1 / M) letters(c). After a population search they are those
    drawn, by the weight of their path. dav_published learns those drawn by the local search, with our q and --lr.
Exact: round k of dav samples p exp(k r / kl_weight), if the search is weighted. A local one of one child (dav on hepg2,
    dav_local) teaches its proposal. The letters of the end must not be taught to early states: a tilt orders them.
What you should see (seed 0): hepg2, oracle B by round .8, 4.7, 7.8 for dav (oracle A 7.6) at a KL of 3, 14, 30 nats,
    .1, 1.9, 3.9 for dav_published at 4, 13, 23; base -2.3, search 4.4 (A 6.0), posterior 14.0 (A 15.4); se .2 to .3.
    C + G falls from .47 to .33: a part of the gain is composition. mpsa, E[r] of dav by round 1.09, 1.76, 1.90 (exact
    1.52, 1.96, 1.99), of the last search 2.01 (exact 2.01): the M-step lags. To try: --rounds 4, --kl 0.3.
"""
import argparse, copy, functools, json, math, os, pathlib, runpy, sys, time
import numpy as np
import torch
if __name__ == "__main__": os.environ["MPLBACKEND"] = "agg"  # a notebook's may not be installed here
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F
from tqdm import trange

HERE, MASK, PROBLEMS = pathlib.Path(__file__).resolve().parent, 4, ["mpsa", "hepg2", "data"]
METHODS = dict(dav={}, dav_kl=dict(kl=True), dav_published=dict(local=True, published=True), dav_local=dict(local=True))
COLORS = dict(zip(METHODS, ("#0072B2", "#D55E00", "#009E73", "#CC79A7")))
SIZES = dict(  # rounds; groups and particles of a search; updates of an M-step, their batch; sequences that measure it
    quick=dict(mpsa=(2, 4, 50, 4, 32, 50), hepg2=(1, 8, 1, 4, 8, 8)),
    size=dict(mpsa=(3, 25, 100, 200, 128, 500), hepg2=(3, 128, 1, 100, 32, 64)),
    paper=dict(mpsa=(3, 50, 1000, 1000, 320, 10_000), hepg2=(200, 256, 1, 32, 64, 640)))

def parse_args(argv=None):
    parser = common_flags(__doc__, **SIZES)
    add = parser.add_argument
    add("--reward", default="activity", help="or my.py:function of letters (n, L, 4), probabilities of A C G T -> (n,)")
    add("--methods", nargs="+", choices=METHODS, default=[*METHODS], help="on hepg2 and data dav is dav_local")
    add("--rounds", type=int, help="of search and M-step, instead of 3")
    add("--kl-weight", type=float, help="reward temperature of a round; 0.5 for mpsa, else 0.25")
    add("--kl", type=float, default=0.1, help="lambda of dav_kl")
    add("--children", type=int, default=1, help="of each state; a reward without a gradient needs several")
    add("--max-shift", type=float, default=2.0, help="cap of the tilt: standard deviation of log p / q of a step")
    add("--lr", type=float, default=6e-3)
    return checked(parser, parser.parse_args(argv))

def common_flags(doc, size, quick, paper):
    """The flags of every script of this folder -> parser. What the tuples of sizes count is each script's own."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", dest="size", action="store_const", const=quick, default=size, help="coarse, seconds")
    add("--paper", dest="size", action="store_const", const=paper, help="the paper's sizes; needs a GPU")
    add("--seed", type=int, default=0, help="the k-th problem has the seed SEED + 100 k")
    add("--out", type=pathlib.Path, default=f"out/dna_{pathlib.Path(__file__).stem}", help="folder of results")
    add("--device", choices=["cpu", "cuda"][: 1 + torch.cuda.is_available()], default="cpu")
    add("--problem", nargs="+", choices=PROBLEMS, default=PROBLEMS[:2], help="data: a table given to pretrain.py")
    add("--checkpoints", type=pathlib.Path, default=HERE / "checkpoints", help="networks that pretrain.py made")
    add("--steps", type=int, help="of the sampler; 64 for mpsa, else 32")
    add("--chunk", type=int, default=256, help="sequences in one call, this sets the memory")
    return parser

def checked(parser, args):
    """The flags; what cannot work, as a folder that cannot be written, is said in one sentence before any work."""
    for name, value in vars(args).items():
        if type(value) in (int, float) and not 0 < value + (name == "seed") < 1e9:
            parser.error(f"--{name.replace('_', '-')}: {value} is not between 0 and 1e9")
    if len(set(args.problem)) < len(args.problem):
        parser.error("--problem names one twice")
    loaded("--out", lambda: (args.out.mkdir(parents=True, exist_ok=True), (args.out / ".writable").touch()))
    return args

# ---- the problem: model, reward, exact answer ------------------------------------------------------------------------
class World:
    """A masked diffusion model of sequences, frozen: all that a method asks of a problem. length L, steps, kl_weight:
    defaults; net: the trained MaskedDenoiser; denoiser: tokens x (n, L) -> log_p (n, L, 4), for mpsa the exact one.
    Of mpsa p, r, held_r (4^9,): distribution, inclusion and its replicate, of all sequences, from AAAAAAAAA on."""
    def __init__(self, args, name):
        self.name, self.p = name, None
        self.steps, self.kl_weight = (args.steps or 64, 0.5) if name == "mpsa" else (args.steps or 32, 0.25)
        self.net, self.length = load_network(args.checkpoints / f"{name}_base.pt", MaskedDenoiser)
        self.denoiser = self.net
        if name == "mpsa":
            table, self.length = loaded(HERE / "splice_sites.npz", np.load, HERE / "splice_sites.npz"), 9
            self.p, self.r, self.held_r = torch.tensor(np.stack([table["p"], *table["rewards"]]))
            self.denoiser = ExactDenoiser(self.p)

class Rewarded(World):
    """A world with reward and held_out: letters (n, L, 4), probabilities or one-hot, -> (n,)."""
    def __init__(self, args, name):
        super().__init__(args, name)
        if name == "mpsa":
            self.reward, self.held_out = table_reward(self.r), table_reward(self.held_r)
        else:
            files = [args.checkpoints / f"{name}_oracle_{k}.pt" for k in "ab"]
            self.reward, self.held_out = (load_network(file, Oracle)[0].score for file in files)
        if args.reward != "activity":  # your own
            path, _, own = args.reward.rpartition(":")
            self.reward = loaded(args.reward, lambda: runpy.run_path(path or own)[own])
            found = self.reward(torch.stack([torch.full((self.length, 4), 0.25), torch.eye(4)[[0] * self.length]]))
            if found.shape != (2,) or not found.isfinite().all():
                raise Refused(f"--reward {args.reward}: two sequences did not get two finite numbers")
            if name == "mpsa":
                letters = F.one_hot(torch.cartesian_prod(*[torch.arange(4)] * 9), 4).float()
                self.r = torch.cat([self.reward(part).detach() for part in letters.split(2**14)]).double()

def exact_values(world, kl_weight):
    """log Z, E[r] and held-out E[r] of p exp(r / kl_weight), by enumeration; nothing where there is none."""
    if world.p is None:
        return {}
    joint = world.p.log() + world.r / kl_weight
    w = joint.softmax(0)
    return dict(log_z=joint.logsumexp(0), reward=w @ world.r, held_out=w @ world.held_r)

class ExactDenoiser:
    """The denoiser of a distribution p (4^L,), by enumeration: x (n, L) tokens -> log p(x_0 | x) (n, L, 4), float64.
    A table holds, for all 5^L masked sequences, the probability of those that agree with them."""
    def __init__(self, p):
        length = round(math.log(len(p), 4))
        mass = p.view([4] * length)
        for axis in range(length):
            mass = torch.cat([mass, mass.sum(axis, keepdim=True)], axis)
        self.log_mass, self.place = mass.log().flatten(), 5 ** torch.arange(length - 1, -1, -1)
    def __call__(self, x):
        state = (x * self.place).sum(1)[:, None, None]
        letter = (torch.arange(4) - x[:, :, None]) * self.place[:, None]  # (n, L, 4): what it changes
        return self.log_mass[state + letter] - self.log_mass[state]

def table_reward(value):
    """A table of all sequences, value (4^L,), as a function of letters (n, L, 4): its mean, if they are independent."""
    half = round(math.log(len(value), 4)) // 2
    joint = lambda part: functools.reduce(lambda a, b: (a[:, :, None] * b[:, None]).flatten(1), part.float().unbind(1))
    def reward(letters):
        return (joint(letters[:, :half]) @ value.float().view(4**half, -1) * joint(letters[:, half:])).sum(1)
    return reward

# ---- the method ------------------------------------------------------------------------------------------------------
def systematic(log_w):
    """Ancestors of P new particles in each group, (G, P) -> (G, P): P w_n copies of n, rounded without bias."""
    cdf = log_w.double().softmax(1).cumsum(1)
    u = (torch.rand(len(cdf), 1).double() + torch.arange(cdf.shape[1])) / cdf.shape[1]
    return torch.searchsorted(cdf, u * cdf[:, -1:], right=True).clamp(max=cdf.shape[1] - 1)

def smc(step, state, steps, ess=0.5):
    """Sequential Monte Carlo in G independent groups of P particles -> state, log_w (G, P).
    state: all that is known of each particle, tensors (G, P, ...); its log_twist (G, P) forecasts the final log weight.
    step(state, i) -> the next state, log_ratio (G, P): log p - log q of a draw from q, or any other weight of the step.
    exp(log_w) averages to Z over groups, without bias for any P and twist, if the last twist is exact, no forecast."""
    log_w = state["log_twist"]
    groups, slots = torch.arange(len(log_w))[:, None], torch.arange(log_w.shape[1])
    for i in range(steps):
        due = 1 / log_w.softmax(1).square().sum(1, keepdim=True) < ess * len(slots)  # (G, 1): low effective size
        ancestors = torch.where(due, systematic(log_w), slots)
        log_w = torch.where(due, log_w.logsumexp(1, keepdim=True) - math.log(len(slots)), log_w)  # keep the mean, Z
        state = {name: value[groups, ancestors] for name, value in state.items()}  # what is known moves along
        before = state["log_twist"]
        state, log_ratio = step(state, i)
        log_w = log_w - before + log_ratio + state["log_twist"]
    return state, log_w

def unmask(log_q, x, left):
    """Set each masked token of x (..., L) with probability 1 / left, its letter from log_q (..., L, 4) -> tokens, newly
    set (..., L). In float64: Gumbel noise in float32 is cut off, which lowers the temperature (Zheng et al. 2024)."""
    new = (x == MASK) & (torch.rand(x.shape, dtype=torch.float64) < 1 / left)
    cdf = log_q[new].double().exp().cumsum(1)
    letters = (cdf <= torch.rand(len(cdf), 1, dtype=torch.float64) * cdf[:, -1:]).sum(1).clamp(max=3)
    return x.masked_scatter(new, letters), new

def letters_log_p(log_p, x, new):
    """Log probability of the letters of x (..., L) at the places `new` under log_p (..., L, 4) -> (...), a sum."""
    return torch.where(new, log_p.gather(-1, x.clamp(max=3)[..., None])[..., 0], 0).sum(-1)

def forecast(log_p, x):
    """x0_hat (..., L, 4): the letters of x that are set, and the probabilities of the masked ones."""
    return torch.where((x == MASK)[..., None], log_p.exp(), F.one_hot(x.clamp(max=3), 4)).float()

def tilt(log_p, x, shift, left, max_shift):
    """Proposal of letters: log_p + shift (..., L, 4), normalised. The shift is scaled down where the log weight of the
    step would have a standard deviation above max_shift, to first order: a masked letter is set with probability
    1 / left and then adds the variance of its shift."""
    p = log_p.exp()
    variance = (p * shift**2).sum(-1) - (p * shift).sum(-1) ** 2
    size = (torch.where(x == MASK, variance, 0).sum(-1) / left).clamp(min=1e-30).sqrt()
    return (log_p + shift * (max_shift / size).clamp(max=1)[..., None, None]).log_softmax(-1)

def look(world, x, kl_weight, chunk, guided):
    """What is known at tokens x (n, L): x, log_p (n, L, 4), value = r(x0_hat) / kl_weight (n,) and its gradient in the
    letters of x0_hat (n, L, 4), not through the denoiser: to first order, what one letter more changes."""
    parts = []
    for part in x.split(chunk):
        with torch.no_grad():
            log_p = world.denoiser(part)
        with torch.set_grad_enabled(guided):
            x0_hat = forecast(log_p, part).requires_grad_(guided)
            value = world.reward(x0_hat).double() / kl_weight
            grad = torch.autograd.grad(value.sum(), x0_hat)[0] if value.requires_grad else torch.zeros_like(x0_hat)
        parts.append([part, log_p, value.detach(), grad.to(log_p)])
    return dict(zip(("x", "log_p", "value", "grad"), map(torch.cat, zip(*parts))))

@torch.no_grad()
def search(model, groups, particles, args, published=False):
    """E-step: paths of p exp(r / kl_weight), p that of model.denoiser -> x (G, P, L), reward, held_out, log_w (G, P),
    elbo (G,): log Z of a group; and what there is to learn: states (T G P, L), letters to set there (T G P, L, 4).
    In groups of one particle the search is the paper's local one, whose weights count in the ELBO alone."""
    steps, children, kl_weight = model.steps, args.children, args.kl_weight or model.kl_weight
    drawn = published or particles > 1  # else the letters to learn are averaged
    def step(state, i):
        x, log_p, left = state["x"], state["log_p"], steps - i
        log_q = tilt(log_p, x, state["grad"], left, args.max_shift)
        old, p, q = (v.expand(children, *v.shape) for v in (x, log_p, log_q))
        child, new = unmask(q, old, left)  # (M, G, P, L)
        log_v = letters_log_p(p, child, new).double() - letters_log_p(q, child, new)
        twist = torch.zeros_like(log_v)
        if children > 1:  # with the letters of the parent: only the child that is kept is looked at
            x0_hat = forecast(p, child).flatten(0, 2).split(args.chunk)
            twist = torch.cat([model.reward(part) for part in x0_hat]).view_as(log_v).double() / kl_weight
        log_v = log_v + twist
        share = log_v.softmax(0)
        chosen = share.flatten(1).T.multinomial(1).view(groups, particles)
        kept = (chosen, torch.arange(groups)[:, None], torch.arange(particles))
        letters = F.one_hot(child.clamp(max=3), 4) * new[..., None]
        soft = torch.where((x == MASK)[..., None], log_q.exp() / left, 0)  # the mean of `letters`
        soft = soft + ((share - 1 / children)[..., None, None] * letters).sum(0)
        state["states"][:, :, i], state["letters"][:, :, i] = x, letters[kept] if drawn else soft  # smc copied them
        due = new[kept].any(2)
        for name, known in look(model, child[kept][due], kl_weight, args.chunk, True).items() if due.any() else ():
            state[name] = state[name].index_put((due,), known)
        log_ratio = log_v.logsumexp(0) - math.log(children) - twist[kept]  # of one child: log p - log q
        return state | dict(log_twist=state["value"]), log_ratio
    start = look(model, torch.full((1, model.length), MASK), kl_weight, args.chunk, True)
    if particles == children == 1 and not start["grad"].any():
        raise Refused("--reward: this one has no gradient, and a local search needs several --children")
    start = {name: v.expand(groups, particles, *v.shape[1:]) for name, v in start.items()}  # all alike
    history = (groups, particles, steps, model.length)  # of each path, which resampling copies with it
    start |= dict(states=torch.zeros(history, dtype=torch.uint8), letters=torch.zeros(*history, 4))
    state, log_w = smc(step, start | dict(log_twist=start["value"]), steps)
    letters = (particles * log_w.softmax(1)).float()[..., None, None, None] * state["letters"]
    found = scores(model, state["x"], args) | dict(log_w=log_w, elbo=log_w.logsumexp(1) - math.log(particles))
    return found, tuple(v.movedim(2, 0).flatten(0, 2) for v in (state["states"], letters))

def dav_update(world, net, args, step, kl=False, local=False, published=False):
    """A round: search, then the M-step, Adam on states of its paths -> sequences (n, 1, L) of the new model, the KL of
    their paths from the base model's (n,), and the ELBO of the search by group; nats."""
    _, groups, particles, updates, batch, samples = args.size.get(world.name, args.size["hepg2"])
    model = copy.copy(world)
    model.denoiser = tuned(world, net)
    shape = (groups * particles, 1) if local else (groups, particles)
    found, (states, goals) = search(model, *shape, args, published)
    count = goals.abs().sum((1, 2))  # of letters: in proportion to it a state is drawn
    draws, weights = count.multinomial(updates * batch, replacement=True).view(updates, batch), [*net.parameters()]
    for u, n in enumerate(draws):
        x, goal = states[n].long(), goals[n] / count[n, None, None]
        if world.p is None:  # elements have two strands: either, by the toss of a coin
            turn = torch.rand(batch) < 0.5
            x[turn], goal[turn] = torch.where(x == MASK, MASK, 3 - x).flip(1)[turn], goal.flip(1, 2)[turn]
        log_p = model.denoiser(x)
        loss = -(goal * log_p).sum((1, 2))
        if kl:
            with torch.no_grad():
                base, masked = world.denoiser(x), x == MASK
            loss = loss + args.kl * ((log_p.exp() * (log_p - base)).sum(2) * masked).sum(1) / masked.sum(1)
        loss.mean().backward()  # nats a letter
        before = [v.detach().clone() for v in weights]
        step()
        with torch.no_grad():  # a learning rate that falls to zero in every round
            [w.lerp_(b, u / updates) for w, b in zip(weights, before)]
    return sampled(world, model.denoiser, samples, args) | dict(elbo=found["elbo"])

def sampled(world, denoiser, n, args):
    """n sequences of a model -> x (n, 1, L), reward, held_out, log_w (n, 1); kl (n,) of their paths from the base's."""
    path, kl = sample_paths(world, denoiser, n, args.chunk)
    return scores(world, path[-1][:, None], args) | dict(kl=kl)

@torch.no_grad()
def scores(world, x, args):
    """Sequences x (G, P, L) with their reward and held-out reward (G, P), and log weights of 0."""
    letters = F.one_hot(x.flatten(0, 1), 4).float().split(args.chunk)
    values = {name: torch.cat([getattr(world, name)(v) for v in letters]) for name in ("reward", "held_out")}
    return dict(x=x, log_w=torch.zeros(x.shape[:2])) | {name: v.view(x.shape[:2]) for name, v in values.items()}

def tuned(world, net):
    """The denoiser of net, a trained copy of world.net: tokens x (n, L) -> log_p (n, L, 4). Of mpsa the exact denoiser
    times what the training changed, so that it starts at p itself."""
    if world.p is None:
        return net
    return lambda x: (world.denoiser(x) + net(x) - world.net(x)).log_softmax(2)

@torch.no_grad()
def sample_paths(world, denoiser, n, chunk):
    """n sampling paths -> tokens (T + 1, n, L), from all masked on, and kl (n,), nats: of the kernels from those of the
    base model, summed over the steps. A masked letter is set with probability 1 / left whatever the model."""
    x, kl = torch.full((n, world.length), MASK), torch.zeros(n, dtype=torch.float64)
    path, nets = [x], (denoiser, world.denoiser)
    log_p, base = (net(x[:1]).repeat(n, 1, 1) for net in nets)
    for left in range(world.steps, 0, -1):
        kl += torch.where(x == MASK, (log_p.exp() * (log_p - base)).sum(2), 0).sum(1) / left
        x, new = unmask(log_p, x, left)
        path.append(x)
        due = new.any(1) & (left > 1)  # where no letter was set, nothing has changed
        for known, net in zip((log_p, base), nets) if due.any() else ():
            known[due] = torch.cat([net(part) for part in x[due].split(chunk)])
    return torch.stack(path), kl

def train(args, net, name, rounds, update):
    """`rounds` times update(step, trace), which back-propagates and calls step() -> trace: what they return.
    The network net, a copy of the base trained as a whole, is saved in args.out/name.pt."""
    net.requires_grad_(True)
    optimizer, trace = torch.optim.Adam(net.parameters(), args.lr, betas=(0.9, 0.99)), []
    def step():
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for i in trange(rounds, desc=name):
        torch.manual_seed(args.seed + 1000 * (i + 1))
        trace.append(update(step, trace))
    torch.save(net.requires_grad_(False).state_dict(), args.out / f"{name}.pt")
    return trace

# ---- the networks ----------------------------------------------------------------------------------------------------
class Refused(ValueError):
    """What a user can mend, said in one sentence."""

def loaded(source, load, *args, **options):
    """load(...), where the library's own first line about a file, a folder or a hub id becomes the sentence."""
    try:
        return load(*args, **options)
    except Exception as error:  # every library raises its own
        raise Refused(f"{source}: {type(error).__name__}: {error}".splitlines()[0]) from error

class MaskedDenoiser(nn.Module):
    """Dilated residual convolutions: tokens x (n, L), or a soft one-hot of them (n, L, 5), -> log_p (n, L, 4). It means
    something at masked places alone, and the mask has no probability (SUBS). The exact one does not know the time."""
    def __init__(self, width, kernel, dilations):
        super().__init__()
        self.architecture = dict(width=width, kernel=kernel, dilations=dilations)
        self.embed, self.head = nn.Conv2d(5, width, (1, 9), padding="same"), nn.Linear(width, 4)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in [*dilations, 1])
        self.layers = nn.ModuleList(
            nn.Conv2d(width, width, (1, kernel), padding="same", dilation=(1, d)) for d in dilations)
    def forward(self, x):
        x = x if x.is_floating_point() else F.one_hot(x, 5).to(self.head.weight)
        h = self.embed(x[:, None].movedim(3, 1))  # (n, width, 1, L): on a CPU faster than in one dimension
        for norm, layer in zip(self.norms, self.layers):
            h = h + F.silu(layer(norm(h.movedim(1, 3)).movedim(3, 1)))
        return self.head(self.norms[-1](h.movedim(1, 3)[:, 0])).log_softmax(2)

class Oracle(nn.Module):
    """Convolutions and pooling: letters (n, L, 4) -> outputs (n, C) of names. kind: "classes", logits of cell types
    that exclude each other; "activity", measured values; "open", logits that each stand alone."""
    def __init__(self, names, kind, width):
        super().__init__()
        self.architecture = dict(names=names, kind=kind, width=width)
        sizes = ((4, 15), (width, 7), (width, 5))
        self.layers = nn.ModuleList(nn.Conv2d(n, width, (1, kernel), padding="same") for n, kernel in sizes)
        self.norms, self.head = nn.ModuleList(nn.BatchNorm2d(width) for _ in sizes), nn.Linear(2 * width, len(names))
    def forward(self, letters):
        h = letters[:, None].movedim(3, 1)  # (n, 4, 1, L)
        for layer, norm, window in zip(self.layers, self.norms, (4, 2, 1)):
            h = F.max_pool2d(F.silu(norm(layer(h))), (1, window))
        return self.head(torch.cat([h.mean((2, 3)), h.amax((2, 3))], 1))
    def score(self, letters, name="hepg2"):
        """A cell type's log odds against the others (n,), nats; activity or log odds of being open as they are."""
        out, k = self(letters), self.architecture["names"].index(name)
        others = [j for j in range(out.shape[1]) if j != k]
        return out[:, k] - (out[:, others].logsumexp(1) if self.architecture["kind"] == "classes" else 0)

def load_network(path, kind):
    """A MaskedDenoiser or Oracle that pretrain.py saved -> network, frozen; length of its sequences."""
    saved = loaded(path, torch.load, path, torch.get_default_device(), weights_only=True)
    net = kind(**saved["architecture"])
    net.load_state_dict(saved["weights"])
    return net.eval().requires_grad_(False), saved["settings"].get("length", 200)

# ---- files, figure, main ---------------------------------------------------------------------------------------------
def save_sequences(args, found):
    """found {(problem, method): x (G, P, L), log_w, reward and the like (G, P)} -> sequences.npz, of all particles."""
    arrays = {"/".join((*names, key)): (v.byte() if key == "x" else v).cpu().numpy()
              for names, f in found.items() for key, v in f.items()}
    np.savez_compressed(args.out / "sequences.npz", **arrays)

def report(args, rows, started, draw):
    """Print and save rows (problem, method, quantity, estimate, standard error, exact), then the figure of draw()."""
    names, part = ("problem", "method", "quantity", "estimate", "se", "exact"), args.out / f"{time.time_ns()}.part"
    rows = [(*r[:3], *(None if v is None or not math.isfinite(v) else float(v) for v in r[3:])) for r in rows]
    for r in [names, *rows]:
        cells = ("" if v is None else v if r is names else f"{v:.3f}" for v in r[3:])
        print(("{:16} {:22} {:20}" + 3 * "{:>10}").format(*r[:3], *cells))
    record = dict(args=vars(args), rows=[dict(zip(names, r)) for r in rows], seconds=round(time.time() - started, 1))
    part.write_text(json.dumps(record | {"torch": torch.__version__}, indent=1, default=str, allow_nan=False))
    part.replace(args.out / "numbers.json")  # files are whole or absent, also when two runs share a folder
    draw().savefig(part, dpi=100, format="png")
    part.replace(args.out / "figure.png")

def measure(world, method, out, k, args):
    """Rows of a method's sequences after k rounds; exact: of p exp(k r / kl_weight), or how much its log Z grew."""
    kl_weight, w = args.kl_weight or world.kl_weight, out["log_w"].softmax(1)
    exact, before = (exact_values(world, kl_weight / j if j > 0 else math.inf) for j in (k, k - 1))
    if world.p is not None:
        exact |= dict(kl=k * exact["reward"] / kl_weight - exact["log_z"], elbo=exact["log_z"] - before["log_z"])
    values = {name: (w * out[name]).sum(1) for name in ("reward", "held_out")}
    values["gc"] = (w * ((out["x"] == 1) | (out["x"] == 2)).double().mean(2)).sum(1)
    values |= {name: out[name] for name in ("kl", "elbo") if name in out}
    exact = {} if method.startswith("dav_kl") else exact  # it has another end
    return [(world.name, method, key, v.mean(), v.std() / len(v) ** 0.5, exact.get(key)) for key, v in values.items()]

def draw(args, rows):
    """Reward and ELBO by round, exact dotted; held-out reward against the KL of the rounds' paths, lines: searches."""
    number, figure = {r[:3]: r[3:] for r in rows}, Figure(figsize=(9, 3 * len(args.problem)), layout="constrained")
    for problem, axes in zip(args.problem, figure.subplots(len(args.problem), 3, squeeze=False)):
        for method in (m for m in args.methods if (problem, m, "kl") in number):
            names = [r[1] for r in rows if (r[0], r[1].partition("_round")[0], r[2]) == (problem, method, "kl")]
            line = lambda key, part=0: [float(number[problem, m, key][part] or math.nan) for m in names]
            for ax, key, first in zip(axes, ("reward", "elbo"), (number[problem, "base", "reward"][0], math.nan)):
                ax.plot([float(first), *line(key)], ".-", color=COLORS[method], label=method)
                ax.plot([math.nan, *line(key, 2)], "k:", lw=1)
            axes[2].plot(line("kl"), line("held_out"), ".-", color=COLORS[method])
        axes[2].plot(0, number[problem, "base", "held_out"][0].cpu(), "kx")
        for search, style in (("search", "--"), ("posterior", "-.")):
            if (problem, search, "held_out") in number:
                axes[2].axhline(number[problem, search, "held_out"][0].item(), color="k", lw=1, ls=style, label=search)
        titles = "reward of the model, by round", "ELBO of the search, by round", "held-out reward, by KL in nats"
        for ax, title in zip(axes, titles):
            ax.set_title(f"{problem}: {title}", fontsize=9)
            ax.xaxis.get_major_locator().set_params(integer=True)
    handles = {label: h for ax in figure.axes for h, label in zip(*ax.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=6, fontsize=8)
    return figure

def main(args):
    started, found, rows = time.time(), {}, []
    torch.set_default_device(args.device)
    torch.set_flush_denormal(True)  # numbers that small slow a backward pass on a CPU down by five
    print("COARSE: numbers mean nothing" if args.size is SIZES["quick"] else "reward, held_out (replicate 2, oracle B),"
          " gc: means; kl, of paths, and elbo: nats; se: over sequences or groups; exact: mpsa, infinitely many steps")
    for name in args.problem:
        world, sizes = Rewarded(args, name), args.size.get(name, args.size["hepg2"])
        rounds, model, outs = args.rounds or sizes[0], copy.copy(world), {}
        seed = args.seed + 100 * PROBLEMS.index(name)
        torch.manual_seed(seed)
        outs["base", 0] = sampled(world, world.denoiser, sizes[-1], args)
        torch.manual_seed(seed)
        outs["search", 1] = search(world, *sizes[1:3], args)[0]
        for method in (m for m in args.methods if world.p is not None or m != "dav_local"):
            net = copy.deepcopy(world.net)
            trace = train(args, net, f"{name}_{method}", rounds,
                          lambda step, _: dav_update(world, net, args, step, **METHODS[method]))
            for k, out in enumerate(trace, 1):
                outs[method + (f"_round_{k}" if k < rounds else ""), k] = out
            if method == "dav":
                model.denoiser = tuned(world, net)
                torch.manual_seed(seed)
                outs["posterior", rounds + 1] = search(model, *sizes[1:3], args)[0]
        for (method, k), out in outs.items():
            rows += measure(world, method, out, k, args)
            found[name, method] = out
    save_sequences(args, found)
    report(args, rows, started, lambda: draw(args, rows))

if __name__ == "__main__":
    try:
        main(parse_args())
    except (Refused, torch.OutOfMemoryError) as e:  # what a user can mend, in one sentence
        sys.exit(print("out of memory: lower --chunk" if isinstance(e, RuntimeError) else e, file=sys.stderr) or 2)
