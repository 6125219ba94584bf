"""Compose masked diffusion models by OR: one model that covers the elements of every cell type, the worst one best.

Paper: Khalafi, Hounie, Ding and Ribeiro, "Composition and Alignment of Diffusion Models using Constrained Learning",
NeurIPS 2025, arXiv 2508.19104, carried over to masked diffusion. Same problem and multipliers as toy/or_composition.py.

Run    python dna/or_composition.py                        three cell types, 200 bp        4 minutes, one CPU core
       python dna/or_composition.py --quick                the same, coarse                20 seconds
       python dna/or_composition.py --world mpsa           9-mers, everything enumerable   30 seconds
       python dna/or_composition.py --cells hepg2 k562 gm12878 hesc        of all four: equal weights are the base model
       python dna/or_composition.py --resume               with the networks that the last run trained
       python dna/or_composition.py --paper --device cuda          longer training, more elements

Worlds mpsa   two laws of 5' splice sites: the base law times exp(2 inclusion), and times exp(GC letters). The first has
              1.5 nats less entropy: equal weights are far from right for `elbo`, and a little wrong for `kl`.
       hepg2  the elements of each cell type, and the base model fine-tuned on them. Labels are cell-type-specific
              *accessibility*, a stand-in for the papers' measured activity.

Notation (here -> paper)
       q_i, weights -> q^i, lambda     the laws; multipliers, which are also the shares of the mixture
       mixture      -> q_mix^lambda    sum_i lambda_i q_i, lambda on the simplex: the best model at these multipliers
       kl           -> (UF-C)          min over p of max_i KL(q_i || p): the problem as written
       elbo         -> eq. 70          min over p of max_i -E_{q_i}[log p], cross entropies: the problem that is solved
       log_q        -> log q^i(path)   log probability of the letters set so far under each model
       regret                          bound on -log p(x) under a model minus that under the cell type's own

The two objectives differ by the entropy of q_i: `elbo` gives more weight to laws with more entropy, and all of it to
one whose entropy alone is above the cross entropies of the others.

Algorithm
       1. a model for each cell type: maximum likelihood on its elements                       `fit_weighted`
       2. log probabilities under all the models of paths to its elements (mpsa: to samples)   `mixture_paths`
       3. the mixture of models in closed form: letters by the posterior weights of the models, given the letters set so
          far; from the paths of 2, KL and cross entropy of every cell type for it    `mixture_letters`, `mixture_gap`
       4. raise the multiplier of the larger ones, repeat, average the second half     `primal_dual`, `dual_update`
       5. one network, fine-tuned on elements drawn with these multipliers            `fit_weighted`

What you should see: mpsa: weights within 1e-3 of (0.094, 0.906) for `elbo`, where both cross entropies are 9.403 nats
(equal weights: 8.27 and 9.82), and of (0.487, 0.513) for `kl`, where both KLs are 0.444 (equal: 0.425 and 0.462).
hepg2 (± over 3 seeds): the cell types' models differ by 0.1 to 0.8 nats of 264 on the held-out chromosome 2, so that the
regret of any mixture is small: in the worst case 0.24 ± 0.04 nats for equal weights and 0.20 ± 0.06 for `kl`, which is
no difference. `kl` gives GM12878, which the models of the other two cover, the least, 0.08 ± 0.10; `elbo` gives all to
the cell type whose elements have the largest entropy, which half a nat and the seed decide, and then loses 0.46 ± 0.06
elsewhere. Shares by oracle B do not tell the models apart.
To try: --world mpsa --draws 1000; --cells hepg2 hesc; --objective elbo --dual-lr 0.5.
"""
import argparse
import copy
import csv
import gzip
import hashlib
import importlib.metadata
import io
import json
import math
import os
import pathlib
import resource
import sys
import time
import types

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import safetensors
import safetensors.torch
import torch
from PIL import Image
from scipy.optimize import minimize
from torch.nn.functional import one_hot, silu

MASK = 4  # the token after A, C, G, T
TILTS = {"included": (2.0, 0.0), "gc_rich": (0.0, 1.0)}  # of the mpsa world: per log10 percent, per letter G or C
PRESETS = {  # what the size flags default to
    ("hepg2", "quick"): dict(updates=3, batch=8, steps=8, draws=8, dual_steps=20, levels=2),
    ("hepg2", "default"): dict(updates=100, batch=64, steps=32, draws=64, dual_steps=200, levels=4),
    ("hepg2", "paper"): dict(updates=2000, batch=256, steps=200, draws=1000, dual_steps=200, levels=128),
    ("mpsa", "quick"): dict(updates=1, batch=1, steps=9, draws=5000, dual_steps=100, levels=1),
    ("mpsa", "default"): dict(updates=1, batch=1, steps=9, draws=100_000, dual_steps=200, levels=1),
    ("mpsa", "paper"): dict(updates=1, batch=1, steps=9, draws=1_000_000, dual_steps=200, levels=1),
}


def parse_args(argv=None):
    parser = dna_parser(__doc__)
    parser.add_argument("--cells", nargs="+", default=["hepg2", "k562", "gm12878"], help="cell types to cover")
    parser.add_argument("--objective", nargs="+", choices=["elbo", "kl"], default=["elbo", "kl"])
    parser.add_argument("--updates", type=positive(int), help="gradient steps from the base model to each other one")
    parser.add_argument("--batch", type=positive(int), help="elements in a gradient step")
    parser.add_argument("--lr", type=positive(float), default=2e-3, help="learning rate of them")
    parser.add_argument("--steps", type=positive(int), help="steps of a path, at most one a letter")
    parser.add_argument("--draws", type=positive(int), help="elements, or samples, of each cell type; at least 4")
    parser.add_argument("--dual-steps", type=positive(int), help="steps of the multipliers, at least 4")
    parser.add_argument("--dual-lr", type=positive(float), default=0.1, help="their step, per nat")
    parser.add_argument("--levels", type=positive(int), help="noise levels behind the bound of each sequence")
    parser.add_argument("--bf16", action="store_true", help="networks in bfloat16")
    parser.add_argument("--resume", action="store_true", help="go on with the networks that are in the results folder")
    args = parser.parse_args(argv)
    for name, value in PRESETS[args.world, "quick" if args.quick else "paper" if args.paper else "default"].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.dual_steps < 4 or args.draws < 4 or len(set(args.cells)) < 2 or len(set(args.cells)) < len(args.cells):
        parser.error("--dual-steps and --draws must be at least 4, and --cells at least two different ones")
    return args


# ---- the worlds: real elements ---------------------------------------------------------------------------------------


def read_arrays(name):
    """The arrays of a file that prepare_data.py writes beside this script -> dict."""
    path = pathlib.Path(__file__).parent / name
    if not path.exists():
        fail(f"{path} is missing: make it with python dna/prepare_data.py.")
    with np.load(path) as arrays:
        return dict(arrays)


def unpack(packed, length):
    """Two bits a letter, packed (N, ceil(length / 4)) uint8 -> codes (N, length) uint8, 0 to 3 for A C G T."""
    return (packed[:, :, None] >> np.array([6, 4, 2, 0], np.uint8) & 3).reshape(len(packed), -1)[:, :length]


def encode(sequences, length):
    """Strings of ACGT (or U) -> codes (N, length) uint8, 0 to 3; ends at a sequence that is anything else."""
    codes = np.full(256, 4, np.uint8)
    codes[np.frombuffer(b"ACGTU", np.uint8)] = [0, 1, 2, 3, 3]
    for sequence in sequences:
        if len(sequence) != length or set(sequence) - set("ACGTU"):
            fail(f"Expected {length} letters of ACGT, got {sequence[:60]!r}.")
    return codes[np.frombuffer("".join(sequences).encode(), np.uint8)].reshape(-1, length)


def read_elements(path, device):
    """Elements with their labels: dhs.npz (path None), or a table (csv, csv.gz) in the format of the DRAKES release.

    -> a namespace of codes (N, L) uint8, targets (N, C) float32, names (C), chrom (N,) uint8, and of kind: "classes",
    targets one-hot over the cell types, or "activity", targets measured. active (N,) are the HepG2 elements, the
    highest tenth by activity; top (N,) those open in the fewest other samples, the highest thousandth by activity;
    digest tells one data set from another.
    """
    if path is None:
        arrays = read_arrays("dhs.npz")
        names, codes = [str(cell).lower() for cell in arrays["cells"]], unpack(arrays["sequences"], 200)
        targets, chrom, kind = np.eye(len(names), dtype=np.float32)[arrays["cell"]], arrays["chrom"], "classes"
        active = targets[:, names.index("hepg2")] == 1
        top = active & (arrays["others"] <= np.quantile(arrays["others"][active], 0.1))
    else:
        names, kind = ["hepg2", "k562", "sknsh"], "activity"
        table = read_csv(path, ["seq", *names, "chrom"])
        numbers = {str(c): n + 1 for n, c in enumerate([*range(1, 23), "X", "Y"])}
        try:
            chrom = np.array([numbers[line["chrom"].removeprefix("chr")] for line in table], np.uint8)
            targets = np.array([[float(line[name]) for name in names] for line in table], np.float32)
        except (KeyError, ValueError) as error:
            fail(f"{path} holds a chromosome or an activity that is none: {error}.")
        if not np.isfinite(targets).all():
            fail(f"{path} holds an activity that is not finite.")
        codes = encode([line["seq"] for line in table], len(table[0]["seq"]))
        active, top = (targets[:, 0] >= np.quantile(targets[:, 0], q) for q in (0.9, 0.999))
    arrays = dict(codes=codes, targets=targets, chrom=chrom, active=active, top=top)
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(v).tobytes() for v in arrays.values())).hexdigest()[:12]
    arrays = {name: torch.from_numpy(np.ascontiguousarray(value)).to(device) for name, value in arrays.items()}
    data = types.SimpleNamespace(names=names, kind=kind, digest=digest, **arrays)
    for part, rows in chromosome_split(data.chrom).items():
        if not rows.any():
            fail(f"{path} has no sequence for {part.replace('_', ' ')}: chromosome 1 is for testing, 2 for validation, "
                 "other odd ones are for the reward, other even ones and X for its evaluation.")
    return data


def read_csv(path, columns):
    """The rows of a table with a header that names these columns -> list of dicts."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", newline="") as file:
            reader = csv.DictReader(file)
            missing = set(columns) - set(reader.fieldnames or [])
            table = list(reader) if not missing else []
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        fail(f"{path} cannot be read: {error}.")
    if missing:
        fail(f"{path} lacks the columns {', '.join(sorted(missing))}.")
    if not table or any(line[column] is None for line in table for column in columns):
        fail(f"{path} has no rows, or a row without all of {', '.join(columns)}.")
    return table


def chromosome_split(chrom):
    """chrom (N,), 1 to 24 -> rows (N,) of each part. Chromosomes 1 and 2 are held out from all that is trained."""
    train, odd = chrom > 2, (chrom % 2 == 1) & (chrom < 23)
    return dict(test=chrom == 1, validation=chrom == 2, training=train, oracle_a=train & odd, oracle_b=train & ~odd)


# ---- the worlds: all 9-mers, and the exact mixture -------------------------------------------------------------------


def all_sequences(length):
    """Every sequence, in the order of its number in base 4 -> (4^length, length) long."""
    return torch.cartesian_prod(*[torch.arange(4)] * length)


def splice_law(device):
    """The mpsa world: law p (4^9,) and rewards (2, 4^9) of all 9-mers, float64; measured (2, 4^9) bool.

    The law is that of the assayed library: 99% in proportion to its sequencing reads in both replicates plus one, on
    the 32,768 sequences NNNGYNNNN, and 1% uniform on all 4^9, so that every state has a denoiser. The reward is the
    measured log10 percent spliced in; an unmeasured NNNGYNNNN gets the additive least-squares fit to the measured
    ones, kept within their range; every other sequence, which lacks the G or the pyrimidine at the junction and was not
    assayed, the smallest measured value. Replicate 1 is the reward, replicate 2 the held-out one.
    """
    arrays, x = read_arrays("mpsa.npz"), all_sequences(9)
    index = (torch.from_numpy(unpack(arrays["sequences"], 9)).long() * 4 ** torch.arange(8, -1, -1)).sum(1)
    assayed = (x[:, 3] == 2) & (x[:, 4] % 2 == 1)  # G, then C or T
    reads = torch.zeros(len(x), dtype=torch.float64)
    reads[index] = torch.from_numpy(arrays["reads"].astype(np.float64)).sum(1)
    p = (reads + 1) * assayed
    p = 0.99 * p / p.sum() + 0.01 / len(p)
    features = one_hot(x, 4).flatten(1).double()
    rewards, measured = torch.empty(2, len(x), dtype=torch.float64), torch.zeros(2, len(x), dtype=torch.bool)
    for k in range(2):
        psi = torch.from_numpy(arrays["psi"][:, k].astype(np.float64))
        there, values = index[~psi.isnan()], psi[~psi.isnan()]
        fit = features @ torch.linalg.lstsq(features[there], values[:, None], driver="gelsd").solution[:, 0]
        rewards[k] = torch.where(assayed, fit.clamp(values.min(), values.max()), values.min())
        rewards[k, there], measured[k, there] = values, True
    return types.SimpleNamespace(p=p.to(device), rewards=rewards.to(device), measured=measured.to(device))


class ExactDenoiser:
    """The denoiser of a law p (4^L,) by enumeration: x (n, L) tokens -> log p(x_0 at l = v | x) (n, L, 4), float64.

    One table holds, for all 5^L masked states, the probability of the sequences that agree with them.
    """

    def __init__(self, p):
        length = round(math.log(len(p), 4))
        mass = p.view([4] * length)
        for axis in range(length):
            mass = torch.cat([mass, mass.sum(axis, keepdim=True)], axis)
        self.log_mass, self.place = mass.log().flatten(), 5 ** torch.arange(length - 1, -1, -1, device=p.device)

    def __call__(self, x):
        state = (x * self.place).sum(1)
        letter = (torch.arange(4, device=x.device) - x[:, :, None]) * self.place[:, None]  # (n, L, 4)
        return self.log_mass[state[:, None, None] + letter] - self.log_mass[state][:, None, None]


class TableReward:
    """A table over all sequences, value (4^L,), as a function of tokens x (n, L) or of letter probabilities (n, L, 4).

    With probabilities it is the mean over independent letters: linear in each, exact at one-hot, differentiable.
    """

    def __init__(self, value):
        self.value, self.length = value, round(math.log(len(value), 4))

    def __call__(self, x):
        if not x.is_floating_point():
            return self.value[(x * 4 ** torch.arange(self.length - 1, -1, -1, device=x.device)).sum(1)]
        halves = []
        for letters in x.tensor_split([self.length // 2], 1):
            joint = torch.ones(len(x), 1).to(x)
            for k in range(letters.shape[1]):
                joint = (joint[:, :, None] * letters[:, k, None]).flatten(1)
            halves.append(joint)  # (n, 4^(L / 2))
        return (halves[0] @ self.value.to(x).view(halves[0].shape[1], -1) * halves[1]).sum(1)


def splice_models(law):
    """The models of the mpsa world, log_q (m, 4^9): the base law times exp of each line of TILTS, normalised."""
    x = all_sequences(9).to(law.p.device)
    gc = ((x == 1) | (x == 2)).double().sum(1)
    return torch.stack([(law.p.log() + a * law.rewards[0] + b * gc).log_softmax(0) for a, b in TILTS.values()])


def divergences(problem, weights):
    """KL(q_i || mixture) (m,) by quadrature; with the entropies added, the cross entropies."""
    log_mix = (problem.log_q + weights.log()[:, None]).logsumexp(0)
    return (problem.log_q.exp() * (problem.log_q - log_mix)).sum(1)


def exact_weights(problem, objective):
    """The multipliers of the best mixture of problem.log_q (m, M): where D, whose gradient is below, is largest."""

    def dual(weights):
        gain = divergences(problem, weights.to(problem.log_q)) + (problem.entropy if objective == "elbo" else 0)
        return weights.to(gain) @ gain, gain

    return maximise_dual(dual, len(problem.log_q), len(problem.log_q))


# ---- shared: multipliers ---------------------------------------------------------------------------------------------


def maximise_dual(dual, count, on_simplex):
    """Maximum of a concave dual function over `count` multipliers >= 0, the first `on_simplex` of which sum to one.

    dual(v) -> value, gradient (count,). By sequential quadratic programming (scipy's SLSQP), to about 1e-7.
    """
    start = torch.ones(count, dtype=torch.float64)
    start[:on_simplex] /= max(on_simplex, 1)

    def negative(v):
        value, gradient = dual(torch.as_tensor(v))
        return -float(value), -gradient.cpu().numpy()

    rows = [dict(type="eq", fun=lambda v: v[:on_simplex].sum() - 1)] if on_simplex else []
    found = minimize(negative, start.numpy(), jac=True, method="SLSQP", bounds=[(0, None)] * count, constraints=rows,
                     options=dict(ftol=1e-15, maxiter=500))
    return torch.as_tensor(found.x)


def project_to_simplex(v):
    """The nearest point (Euclidean) to v (m,) with entries >= 0 that sum to one.

    It is max(v - c, 0); c follows from the largest k entries of v that stay above it (Held, Wolfe, Crowder 1974).
    """
    # exercise 4: how large is c if the largest k entries stay above it? and which k is right?
    top = v.sort(descending=True)[0]
    excess = (top.cumsum(0) - 1) / torch.arange(1, len(v) + 1, device=v.device)
    return (v - excess[(top > excess).sum() - 1]).clamp(min=0)
    # end exercise


def dual_update(dual, gap, memory, ki, kp=0.0, nu=0.0):
    """One step of nuPI (Sohrabi et al. 2024) on the multipliers (m,), before projection -> dual, memory.

    dual + ki gap + kp (change of the moving average nu memory + (1 - nu) gap); kp = 0 is dual ascent.
    """
    average = nu * memory + (1 - nu) * gap
    return dual + ki * gap + kp * (average - memory), average


# ---- the method ------------------------------------------------------------------------------------------------------


def predict_all(denoisers, x):
    """log_p of every model at tokens x (N, L) -> (N, m, L, 4)."""
    return torch.stack([predict(denoiser, x, 100_000 // x.shape[1]) for denoiser in denoisers], 1)


def letter_counts(length, steps):
    """How many letters each of the steps sets, as evenly as can be -> list of int; one each where steps >= length."""
    steps = min(steps, length)
    return [(i + 1) * length // steps - i * length // steps for i in range(steps)]


def set_letters(log_p, x, count, rng):
    """Set `count` random ones of the masked tokens of each row of x (N, L) from log_p (N, L, 4) -> tokens, new (N, L).

    All rows have equally many masked. One at a time the law is that of the denoiser without an error of steps, which
    `unmask`, with a random number of letters in a step, has in the limit of many.
    """
    order = torch.rand(x.shape, generator=rng, device=x.device).masked_fill(x != MASK, 2).argsort(1)
    new = torch.zeros_like(x, dtype=torch.bool).scatter_(1, order[:, :count], True)
    u = torch.rand(int(new.sum()), 1, generator=rng, device=x.device, dtype=torch.float64)
    x = x.clone()
    x[new] = invert_cdf(log_p[new].double().exp(), u)[:, 0]
    return x, new


def letters_log_p(log_p, x, new):
    """Log probability of the letters of x (N, L) at the places `new` (N, L) under log_p (N, L, 4) -> (N,), a sum."""
    # exercise 11: x may hold masks, which no log probability belongs to: keep them away from gather
    letter = log_p.gather(2, x.clamp(max=3)[:, :, None])[:, :, 0]
    return torch.where(new, letter, 0).sum(1)
    # end exercise


def invert_cdf(w, u):
    """Smallest n with w_1 + ... + w_n > u sum(w), for w (G, P) and u (G, M) in [0, 1) -> (G, M)."""
    cdf = w.cumsum(1)
    return torch.searchsorted(cdf, u * cdf[:, -1:], right=True).clamp(max=w.shape[1] - 1)


def mixture_letters(log_p, log_q, weights):
    """The mixture's letters: the models' (N, m, L, 4) by their posterior, from log_q (N, m) -> log_p (N, L, 4)."""
    posterior = (weights.log().to(log_q) + log_q).log_softmax(1)
    return (posterior[:, :, None, None] + log_p).logsumexp(1)


def mixture_paths(denoisers, weights, n, length, steps, rng, x0=None):
    """Paths of the mixture sum_i weights_i q_i of the models' path laws; with x0 (n, L), those that end there.

    -> a dict of x (n, L), log_q (n, m), the log probability of the letters under each model, and entropy (n,), that of
    the mixture's letters at the states met: an estimate of -log p(x) with less spread than that itself.
    """
    x = torch.full((n, length), MASK, device=rng.device)
    log_p = predict_all(denoisers, x[:1]).expand(n, -1, -1, -1)
    log_q, entropy = torch.zeros(n, len(denoisers), device=rng.device).double(), 0
    for count in letter_counts(length, steps):
        masked, letters = x == MASK, mixture_letters(log_p, log_q, weights)
        surprise = torch.where(masked[:, :, None], -letters.exp() * letters, 0).sum((1, 2))
        entropy = entropy + count * surprise / masked.sum(1)
        x, new = set_letters(letters, x, count, rng)
        if x0 is not None:
            x = torch.where(new, x0, x)
        log_q = log_q + torch.stack([letters_log_p(own, x, new) for own in log_p.unbind(1)], 1)
        if (x[0] == MASK).any():
            log_p = predict_all(denoisers, x)
    return dict(x=x, log_q=log_q, entropy=entropy.double())


def pooled_tables(log_q, entropy):
    """Tables for `mixture_gap` from draws of every law, log_q (m, N, m), entropy (m): all draws serve each of the laws.

    Their shares are those of importance sampling from the mean of the laws, in proportion to q_i / sum_j q_j: bounded,
    and with a third of the error that the law's own draws leave.
    """
    pooled = log_q.flatten(0, 1)
    return [(pooled, (own - pooled.logsumexp(1)).softmax(0), h) for own, h in zip(pooled.T, entropy)]


def mixture_gap(tables, weights, objective):
    """KL(q_i || mixture), or cross entropy, of every law -> list of (N,), to be averaged.

    tables: for each law q_i, log_q (N, m) of some draws, the shares with which they stand for the law (N,), sum one,
    and an estimate of its entropy. The mean of the result is the weighted mean; its spread has the error of that.
    """
    gaps = []
    for i, (log_q, share, entropy) in enumerate(tables):
        kl = log_q[:, i] - (weights.log().to(log_q) + log_q).logsumexp(1)
        mean = share @ kl
        gaps.append(mean + len(share) * share * (kl - mean) + (entropy if objective == "elbo" else 0))
    return gaps


def primal_dual(tables, objective, args):
    """Raise multipliers of the worse laws; the mixture is the primal solution -> weights (m,), path (steps + 1, m)."""
    weights = torch.full((len(tables),), 1 / len(tables), dtype=torch.float64)
    path, memory = [weights], torch.zeros_like(weights)
    for _ in range(args.dual_steps):
        gap = torch.stack([values.mean() for values in mixture_gap(tables, weights, objective)]).cpu()
        raw, memory = dual_update(weights, gap, memory, args.dual_lr)
        weights = project_to_simplex(raw)
        path.append(weights)
    return torch.stack(path[len(path) // 2 :]).mean(0), torch.stack(path)


# ---- shared: models of cell types ------------------------------------------------------------------------------------


def fit_weighted(world, weights, label, args, folder):
    """Fine-tune the base model to the law in which training element k has the probability weights[k] -> network.

    The maximum likelihood model of the elements drawn with those weights: for 0 and 1 the model of a part of them, for
    exp(r / kl_weight) the optimum of a reward under KL, p exp(r / kl_weight) / Z, of the elements' own law p.
    """
    codes = world.elements.codes[chromosome_split(world.elements.chrom)["training"]]
    rng = torch.Generator(args.device).manual_seed(args.seed)
    if len(weights) != len(codes) or not (weights.isfinite().all() and weights.sum() > 0):
        fail(f"{label} needs one finite weight for each training element.")

    def draw(n):
        rows = torch.multinomial(weights, n, replacement=True, generator=rng)
        return either_strand(codes[rows].long(), rng)

    net = copy.deepcopy(world.network).requires_grad_(True)
    return fit_network(net, denoiser_batches(draw, args.batch, rng), args.updates, args.lr, args.bf16, rng,
                       folder / f"{label}.safetensors", dict(seed=args.seed, lr=args.lr, batch=args.batch), args.resume)


def denoiser_batches(draw, batch, rng):
    """The bound, in nats a letter, on batches of draw(n) -> tokens (n, L), as a function of the network."""

    def batch_loss(net):
        x = draw(batch)
        share = (torch.arange(batch, device=x.device) + torch.rand(batch, generator=rng, device=x.device)) / batch
        z, hidden = hide(x, share, rng)
        return hidden_loss(net(z), x, hidden).mean() / x.shape[1]

    return batch_loss


def either_strand(x, rng):
    """Each row of x (N, L), or its reverse complement, by the toss of a coin."""
    toss = torch.rand(len(x), 1, generator=rng, device=x.device) < 0.5
    return torch.where(toss, 3 - x.flip(1), x)


def fit_network(net, batch_loss, steps, lr, bf16, rng, path, settings, resume):
    """Minimise batch_loss(net) by Adam with clipped gradients -> the moving average of the weights.

    The learning rate is constant after a warm-up and falls to zero over the last quarter, so that a run may be resumed
    with another number of steps. Writes the network to `path` and, every hundred steps, all that is needed to go on to
    a file beside it; with `resume`, goes on from there, or returns what is finished. Ends if that was made with other
    settings, or if the loss is not finite.
    """
    text, label, part = json.dumps(settings, sort_keys=True), path.stem, path.with_suffix(".part.pt")
    if resume and path.exists():
        net, found = load_network(path, rng.device)
        if found != json.dumps(dict(settings, steps=steps), sort_keys=True):
            fail(f"{path} was trained with other settings: {found}.")
        return net
    optimizer = torch.optim.Adam(net.train().parameters(), lr, betas=(0.9, 0.99), fused=True)
    values = [v for v in net.state_dict().values() if v.is_floating_point()]  # weights, and statistics of BatchNorm
    average, first, recent = [v.clone() for v in values], 0, []
    if resume and part.exists():
        state = torch.load(part, map_location=rng.device, weights_only=True)
        if state["settings"] != text:
            fail(f"{part} was trained with other settings: {state['settings']}.")
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        rng.set_state(state["rng"].cpu())
        average, first = state["average"], state["step"]
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 200, (steps - step) / (0.25 * steps))
        with torch.autocast(rng.device.type, torch.bfloat16, enabled=bf16):
            loss = batch_loss(net)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        torch._foreach_lerp_(average, values, 1 - min(0.999, (step + 1) / (step + 10)))
        recent = [*recent[-99:], loss.detach()]
        if (step + 1) % 100 == 0 or step + 1 == steps:
            if not torch.stack(recent).isfinite().all():
                fail(f"The training of {label} diverged before step {step + 1}: take a lower --lr.")
            state = dict(settings=text, net=net.state_dict(), optimizer=optimizer.state_dict(), average=average,
                         rng=rng.get_state(), step=step + 1)
            write_atomically(part, lambda temporary: torch.save(state, temporary))
        progress(f"{label}, loss {torch.stack(recent).mean():.4f}" if (step + 1) % 20 == 0 else label, step + 1, steps)
    for value, mean in zip(values, average):
        value.copy_(mean)
    save_network(path, net, json.dumps(dict(settings, steps=steps), sort_keys=True))
    part.unlink(missing_ok=True)
    return net.eval().requires_grad_(False)


def members(data, name):
    """Which elements are those of a cell type (N,) bool: by label, or the highest tenth by activity in it."""
    if name not in data.names:
        fail(f"There is no cell type {name} in this data: choose from {', '.join(data.names)}.")
    value = data.targets[:, data.names.index(name)]
    return value == 1 if data.kind == "classes" else value >= value.double().quantile(0.9)


def cell_models(world, args, folder):
    """A model of each of the cell types args.cells, fine-tuned on its training elements -> list of networks."""
    training = chromosome_split(world.elements.chrom)["training"]
    chosen = {cell: members(world.elements, cell)[training].float() for cell in args.cells}
    return [fit_weighted(world, share, f"{world.name}_{cell}", args, folder) for cell, share in chosen.items()]


# ---- measuring -------------------------------------------------------------------------------------------------------


def mean_and_se(values):
    """Independent values (G,) -> their mean and its standard error (None for a single one)."""
    return values.mean().item(), values.std().item() / len(values) ** 0.5 if len(values) > 1 else None


def hide(x, share, rng):
    """Mask 1 + floor(share L) random tokens of each row of x (N, L), share (N,) in [0, 1) -> tokens, hidden (N, L)."""
    count = 1 + (share * x.shape[1]).long()
    rank = torch.rand(x.shape, generator=rng, device=x.device).argsort(1).argsort(1)
    hidden = rank < count[:, None]
    return torch.where(hidden, MASK, x), hidden


def hidden_loss(log_p, x, hidden):
    """L times the mean of -log p at the hidden tokens (N,), nats; its mean over uniform counts is the bound.

    MDLM's loss is the integral over t of 1/t times the cross entropy of tokens hidden with probability t. The counts k
    are then Binomial(L, t), and the integral of Binomial(k; L, t) / t is 1 / k for every k from 1 to L.
    """
    nll = -log_p.gather(2, x[:, :, None])[:, :, 0]
    return x.shape[1] * (nll * hidden).sum(1) / hidden.sum(1)


def predict(denoiser, x, chunk=256):
    """log_p (N, L, 4) at x (N, L), in chunks and without gradient."""
    with torch.no_grad():
        return torch.cat([denoiser(part) for part in x.split(chunk)])


def masked_bound(denoiser, x, levels, rng):
    """Estimate of the bound on -log p(x) of x (N, L), nats -> (N, levels), one noise level a column: average them.

    The number of hidden tokens is drawn from one interval a level, so that all levels together cover 1 to L evenly.
    """
    columns = []
    for level in range(levels):
        share = (level + torch.rand(len(x), generator=rng, device=x.device, dtype=torch.float64)) / levels
        z, hidden = hide(x, share, rng)
        columns.append(hidden_loss(predict(denoiser, z), x, hidden))
    return torch.stack(columns, 1)


class CountRows:
    """A function of sequences that counts the rows it is asked for, in bfloat16 if that is wanted."""

    def __init__(self, function, bf16=False):
        self.function, self.bf16, self.rows = function, bf16, 0

    def __call__(self, x):
        self.rows += len(x)
        if not self.bf16:
            return self.function(x)
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.function(x).float()


def gap_rows(label, name, tables, weights, exact_kl=None, exact_ce=None):
    """Rows of a mixture: multipliers, KL and cross entropy of every law by its draws."""
    rows = []
    for key, exact, objective in (("kl", exact_kl, "kl"), ("ce", exact_ce, "elbo")):
        gaps = mixture_gap(tables, weights, objective)
        values = [mean_and_se(gap) for gap in gaps]
        for i, value in enumerate(values):
            rows.append(row(f"{label}.{name}.{key}_{i + 1}", value[0], value[1] if key == "kl" else None,
                            exact[i].item() if exact is not None else None))
        rows.append(row(f"{label}.{name}.worst_{key}", max(value[0] for value in values)))
    return rows


def mix_splice(world, args, rng):
    """The enumerated world: multipliers and mixtures against the exact ones -> rows, for the figure, calls."""
    log_q = splice_models(world.law)
    count, x = len(log_q), all_sequences(9)
    problem = types.SimpleNamespace(log_q=log_q, entropy=-(log_q.exp() * log_q).sum(1))
    models = [CountRows(ExactDenoiser(p)) for p in log_q.exp()]
    properties = dict(mean_reward=world.law.rewards[0], mean_gc=((x == 1) | (x == 2)).double().sum(1).to(log_q))
    draws, rows, paths, exact = [], [], {}, {}
    for i, one in enumerate(torch.eye(count, dtype=torch.float64)):
        parts = [mixture_paths(models, one, min(20_000, args.draws - k), 9, args.steps, rng)
                 for k in range(0, args.draws, 20_000)]
        entropy = torch.cat([part["entropy"] for part in parts])
        draws.append((torch.cat([part["log_q"] for part in parts]), entropy.mean()))
        rows.append(row(f"model_{list(TILTS)[i]}.mpsa.entropy", *mean_and_se(entropy), problem.entropy[i].item()))
        progress("paths of the models", i + 1, count)
    draws = [torch.stack(values) for values in zip(*draws)]
    tables = pooled_tables(*draws)
    weights = dict(equal=torch.full((count,), 1 / count, dtype=torch.float64))
    for objective in args.objective:
        weights[objective], paths[objective] = primal_dual(tables, objective, args)
        exact[objective] = exact_weights(problem, objective)
    for label, w in weights.items():
        best = exact.get(label, w)
        kl = divergences(problem, best.to(log_q))
        if label != "equal":
            rows += [row(f"exact_{label}.mpsa.dual_{i + 1}", v) for i, v in enumerate(best.tolist())]
            rows += [row(f"exact_{label}.mpsa.{key}_{i + 1}", v) for key, values in
                     (("kl", kl), ("ce", kl + problem.entropy)) for i, v in enumerate(values.tolist())]
        rows += [row(f"{label}.mpsa.dual_{i + 1}", a, exact=None if label == "equal" else b)
                 for i, (a, b) in enumerate(zip(w.tolist(), best.tolist()))]
        rows += gap_rows(label, "mpsa", tables, w, kl, kl + problem.entropy)
        out = mixture_paths(models, w, min(args.draws, 20_000), 9, args.steps, rng)
        law, target = ((weight.log()[:, None].to(log_q) + log_q).logsumexp(0).exp() for weight in (w, best))
        rows.append(row(f"{label}.mpsa.entropy", *mean_and_se(out["entropy"]), -(target * target.log()).sum().item(),
                        (-(law * law.log()).sum().item(), 0.0)))
        for key, f in properties.items():
            rows.append(row(f"{label}.mpsa.{key}", *mean_and_se(TableReward(f)(out["x"])), (target @ f).item(),
                            ((law @ f).item(), 0.0)))
    return rows, dict(paths=paths, exact=exact, draws=draws), sum(m.rows for m in models)


def mix_cells(world, args, folder, rng):
    """Real elements: cell types' models, multipliers, one network for each -> rows, calls."""
    data, name, cells, count = world.elements, world.name, args.cells, len(args.cells)
    training, of = chromosome_split(data.chrom)["training"], [members(data, cell) for cell in args.cells]
    networks = {f"model_{cell}": net for cell, net in zip(cells, cell_models(world, args, folder))}
    models = [CountRows(net, args.bf16) for net in networks.values()]
    tables, rows = [], []

    def some(rows_of, n):
        codes = data.codes[rows_of]
        return codes[torch.randperm(len(codes), generator=rng, device=rng.device)[:n]].long()

    for i, model in enumerate(models):
        x = some(training & of[i], args.draws)
        out = mixture_paths(models, torch.full((count,), 1 / count), len(x), world.length, args.steps, rng, x)
        entropy = mean_and_se(masked_bound(model, some(training & of[i], 16 * args.draws), 1, rng)[:, 0])
        tables.append((out["log_q"], torch.full_like(out["log_q"][:, 0], 1 / len(x)), entropy[0]))
        rows.append(row(f"model_{cells[i]}.{name}.entropy", *entropy))
        progress("paths to elements", i + 1, count)
    weights = dict(equal=torch.full((count,), 1 / count, dtype=torch.float64))
    for objective in args.objective:
        weights[objective] = primal_dual(tables, objective, args)[0]
    shares = torch.stack([(part[training] / part[training].sum()).double() for part in of])
    for label, w in weights.items():
        rows += [row(f"{label}.{name}.dual_{i + 1}", v) for i, v in enumerate(w.tolist())]
        rows += gap_rows(label, name, tables, w)
        tag = "_".join(f"{cell}{100 * v:.0f}" for cell, v in zip(cells, w.tolist()))
        networks[label] = fit_weighted(world, (w.to(shares) @ shares).float(), f"{name}_{tag}", args, folder)
    held = [some((data.chrom == 2) & part, 2 * args.draws) for part in of]
    bounds = {}
    for label, net in dict(base=world.network, **networks).items():
        rngs = [torch.Generator(rng.device).manual_seed(args.seed + i) for i in range(count)]
        bounds[label] = [masked_bound(CountRows(net, args.bf16), x, args.levels, own).mean(1)
                         for x, own in zip(held, rngs)]
        progress("bounds", len(bounds), 1 + len(networks))
    for label, values in bounds.items():  # the same hidden letters for all models: regrets are paired
        regrets = [v - bounds[f"model_{cell}"][i] for i, (cell, v) in enumerate(zip(cells, values))]
        for key, parts in (("bound", values), ("regret", regrets)):
            rows += [row(f"{label}.{name}.{key}_{cell}", *mean_and_se(v)) for cell, v in zip(cells, parts)]
            rows.append(row(f"{label}.{name}.worst_{key}", max(v.mean().item() for v in parts)))
    sets = {f"real_{cell}": x for cell, x in zip(cells, held)}
    for label, net in networks.items():
        one = torch.ones(1, dtype=torch.float64)
        sets[label] = mixture_paths([CountRows(net, args.bf16)], one, args.draws, world.length, args.steps, rng)["x"]
    for label, w in weights.items():
        sets[f"mixture_{label}"] = mixture_paths(models, w, args.draws, world.length, args.steps, rng)["x"]
    for label, x in sets.items():
        with torch.no_grad():
            best = torch.cat([world.oracle_b(part) for part in x.split(256)]).argmax(1)
        rows += [row(f"{label}.{name}.share_{cell}", *mean_and_se((best == k).double()))
                 for k, cell in enumerate(world.oracle_b.architecture["names"])]
    return rows, sum(m.rows for m in models)


# ---- the figures -----------------------------------------------------------------------------------------------------

COLORS = dict(elbo="#0072B2", kl="#009E73", equal="#E69F00")
LAWS = {"hepg2": "#009E73", "k562": "#CC79A7", "gm12878": "#56B4E9", "hesc": "#999999", "sknsh": "#999999",
        "included": "#009E73", "gc rich": "#CC79A7"}


def draw_duals(ax, found):
    """The first multiplier against the dual step, and its exact value."""
    for objective, path in found["paths"].items():
        ax.plot(path[:, 0].numpy(), color=COLORS[objective], label=objective)
        ax.axhline(found["exact"][objective][0].item(), color=COLORS[objective], linestyle=":")
    ax.set(xlabel="dual step", ylabel="first multiplier, exact dotted", ylim=(0, 0.6))
    ax.legend(fontsize=7)


def draw_bars(ax, rows, labels, keys, names, ylabel):
    """Bars of the estimates of `labels` side by side, a group for each of the keys, with 2 standard errors."""
    table = {r["name"]: r for r in rows}
    for k, (key, name) in enumerate(zip(keys, names)):
        values, shift = [table[f"{label}.{key}"] for label in labels], (k - len(keys) / 2 + 0.5) * 0.8 / len(keys)
        ax.bar(np.arange(len(labels)) + shift, [r["estimate"] for r in values], 0.8 / len(keys), label=name,
               yerr=[2 * (r["se"] or 0) for r in values], error_kw=dict(linewidth=0.8), color=LAWS.get(name, "#56B4E9"))
        for place, r in enumerate(values):
            if r["exact"] is not None:
                ax.plot(place + shift, r["exact"], "k_", markersize=9)
    titles = [label.split(".")[0].replace("model_", "model of ").replace("_", " ") for label in labels]
    ax.set_xticks(range(len(labels)), titles, rotation=30, ha="right", fontsize=8)
    ax.set(ylabel=ylabel)
    ax.legend(fontsize=7)


def draw_splice_mixture(path, rows, found, args):
    """Enumerated: KL and cross entropy of every law, the multipliers, and their error against the number of draws."""
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.8))
    labels, laws = [f"{label}.mpsa" for label in ("equal", *args.objective)], [n.replace("_", " ") for n in TILTS]
    for ax, key, text in ((axes[0], "kl", "KL(law || mixture), nats"), (axes[1], "ce", "cross entropy, nats")):
        draw_bars(ax, rows, labels, [f"{key}_{i + 1}" for i in range(len(laws))], laws, text + "; line: exact at best")
    axes[1].set(ylim=(7, None))
    draw_duals(axes[2], found)
    sizes = [int(args.draws / 4**k) for k in range(5) if args.draws / 4**k >= 20]
    for objective in args.objective:
        errors = []
        for size in sizes:
            log_q, entropy = found["draws"]
            parts = [pooled_tables(log_q[:, k * size : (k + 1) * size], entropy)
                     for k in range(min(4, args.draws // size))]
            errors.append(np.mean([(primal_dual(part, objective, args)[0] - found["exact"][objective])[0] ** 2
                                   for part in parts]) ** 0.5)
        axes[3].loglog(sizes, errors, "o-", color=COLORS[objective], label=objective)
    axes[3].loglog(sizes, [errors[-1] * (sizes[-1] / size) ** 0.5 for size in sizes], ":", color="black",
                   label="N$^{-1/2}$")
    axes[3].set(xlabel="draws N of each law", ylabel="error of the first multiplier, root mean square")
    axes[3].legend(fontsize=7)
    figure.tight_layout()
    save_figure(figure, path)


def draw_cell_mixture(path, world, rows, args):
    """Regret on held-out elements by model, the multipliers, and cell types of the samples by oracle B."""
    figure, axes = plt.subplots(1, 3, figsize=(16, 4.2), width_ratios=[1.3, 0.6, 2])
    every = list(dict.fromkeys(r["name"].rsplit(".", 1)[0] for r in rows))
    having = {key: [label for label in every if any(r["name"] == f"{label}.{key}_{args.cells[0]}" for r in rows)]
              for key in ("regret", "share")}
    draw_bars(axes[0], rows, having["regret"], [f"regret_{cell}" for cell in args.cells], args.cells,
              "bound minus that of the own model, nats")
    draw_bars(axes[1], rows, [f"{label}.{world.name}" for label in ("equal", *args.objective)],
              [f"dual_{i + 1}" for i in range(len(args.cells))], args.cells, "multipliers")
    names = world.oracle_b.architecture["names"]
    draw_bars(axes[2], rows, having["share"], [f"share_{cell}" for cell in names], names,
              "share by oracle B")
    axes[2].set(ylim=(0, 1))
    figure.tight_layout()
    save_figure(figure, path)


# ---- shared: the world and its networks ------------------------------------------------------------------------------


def initialise(net, rng):
    """PyTorch's own initialisation of convolutions and linear layers, from our generator; -> net."""
    for layer in net.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            bound = layer.weight[0].numel() ** -0.5
            for value in layer.parameters():
                torch.nn.init.uniform_(value, -bound, bound, generator=rng)
    return net


class SequenceConv(torch.nn.Conv2d):
    """Convolution along the sequence, x (n, L, C) -> (n, L, C').

    In two dimensions with the channels last: on a CPU up to four times as fast as Conv1d where it is dilated.
    """

    def __init__(self, inputs, outputs, kernel, dilation=1):
        super().__init__(inputs, outputs, (1, kernel), padding=(0, kernel // 2 * dilation), dilation=(1, dilation))

    def forward(self, x):
        return super().forward(x[:, None].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)[:, 0]


class MaskedDenoiser(torch.nn.Module):
    """Dilated residual convolutions: tokens x (n, L), 0 to 4, or a soft one-hot of them (n, L, 5) -> log_p (n, L, 4).

    SUBS parameterisation: the mask has no output, and what stands at unmasked positions is to be ignored. Without the
    time: for absorbing noise the exact denoiser does not depend on it.
    """

    def __init__(self, width, kernel, dilations, rng):
        super().__init__()
        self.architecture = dict(width=width, kernel=kernel, dilations=dilations)
        self.embed = SequenceConv(5, width, 9)
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(width) for _ in [*dilations, 1])
        self.layers = torch.nn.ModuleList(SequenceConv(width, width, kernel, d) for d in dilations)
        self.head = torch.nn.Linear(width, 4)
        initialise(self.to(rng.device), rng)

    def forward(self, x):
        h = self.embed(x if x.is_floating_point() else one_hot(x, 5).to(self.head.weight))
        for norm, layer in zip(self.norms, self.layers):
            h = h + silu(layer(norm(h)))
        return self.head(self.norms[-1](h)).log_softmax(2)


class Oracle(torch.nn.Module):
    """Convolutions and pooling: tokens x (n, L), 0 to 3, or letter probabilities (n, L, 4) -> outputs (n, C).

    kind says what the outputs of `names` are: "classes", logits of cell types that exclude each other; "activity",
    regressed values; "open", logits that each stand alone.
    """

    def __init__(self, names, kind, width, rng):
        super().__init__()
        self.architecture = dict(names=names, kind=kind, width=width)
        self.layers = torch.nn.ModuleList(
            [SequenceConv(4, width, 15), SequenceConv(width, width, 7), SequenceConv(width, width, 5)])
        self.norms = torch.nn.ModuleList(torch.nn.BatchNorm1d(width) for _ in self.layers)
        self.head = torch.nn.Linear(2 * width, len(names))
        initialise(self.to(rng.device), rng)

    def forward(self, x):
        h = (x if x.is_floating_point() else one_hot(x, 4)).to(self.head.weight)
        for layer, norm, window in zip(self.layers, self.norms, (4, 2, 1)):
            h = silu(norm(layer(h).flatten(0, 1)).unflatten(0, (len(x), -1)))
            h = h[:, : h.shape[1] // window * window].unflatten(1, (-1, window)).amax(2)
        return self.head(torch.cat([h.mean(1), h.amax(1)], 1))

    def score(self, x, name):
        """One output as a reward (n,): log odds against the other classes, activity, or log odds of being open."""
        out, k = self(x), self.architecture["names"].index(name)
        if self.architecture["kind"] != "classes":
            return out[:, k]
        return out[:, k] - torch.cat([out[:, :k], out[:, k + 1 :]], 1).logsumexp(1)


def save_network(path, net, settings):
    """Weights, architecture and the settings of the training (text) in one safetensors file."""
    metadata = dict(kind=type(net).__name__, architecture=json.dumps(net.architecture), settings=settings)
    write_atomically(path, lambda part: safetensors.torch.save_file(net.state_dict(), part, metadata))


def load_network(path, device):
    """A MaskedDenoiser or Oracle that `save_network` wrote -> (network without gradients, its settings)."""
    try:
        with safetensors.safe_open(path, "pt", device=str(device)) as file:
            metadata, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
        kind = dict(MaskedDenoiser=MaskedDenoiser, Oracle=Oracle)[metadata["kind"]]
        net = kind(**json.loads(metadata["architecture"]), rng=torch.Generator()).to(device)
        net.load_state_dict(state)
    except FileNotFoundError:
        fail(f"{path} is missing: make it with python dna/pretrain.py, or name its folder with --checkpoints.")
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        fail(f"{path} is no network of this folder ({type(error).__name__}).")
    return net.eval().requires_grad_(False), metadata["settings"]


def dna_world(name, data, checkpoints, device):
    """What the methods work with, from the networks in a folder -> a namespace of length and functions of sequences.

    name is "mpsa", "hepg2" or "data" (then `data` is its table). denoiser: tokens x (n, L) -> log_p (n, L, 4), exact
    for mpsa; network: the same as a MaskedDenoiser. reward and held_out: x (n, L), or letter probabilities (n, L, 4)
    -> (n,); accessible: x -> probability of being open in HepG2 (n,), or None. elements or law: the data behind them.
    oracle_a, oracle_b and classifier are the networks behind the rewards, with a score for every cell type, or None.
    """
    network = load_network(checkpoints / f"{name}_base.safetensors", device)[0]
    if name == "mpsa":
        law = splice_law(device)
        reward, held_out = (TableReward(value) for value in law.rewards)
        return types.SimpleNamespace(name=name, length=9, denoiser=ExactDenoiser(law.p), network=network, reward=reward,
                                     held_out=held_out, accessible=None, elements=None, law=law, oracle_a=None,
                                     oracle_b=None, classifier=None)
    elements = read_elements(data, device)
    a, b = (load_network(checkpoints / f"{name}_oracle_{k}.safetensors", device)[0] for k in "ab")
    classifier = accessible = None
    if elements.codes.shape[1] == 200:  # the classifier comes from this folder's elements, whatever the data
        folder = checkpoints if name == "hepg2" else pathlib.Path(__file__).parent / "checkpoints"
        classifier = load_network(folder / "hepg2_accessibility.safetensors", device)[0]
        accessible = lambda x: classifier.score(x, "hepg2").sigmoid()
    return types.SimpleNamespace(name=name, length=elements.codes.shape[1], denoiser=network, network=network,
                                 reward=lambda x: a.score(x, "hepg2"), held_out=lambda x: b.score(x, "hepg2"),
                                 accessible=accessible, elements=elements, law=None, oracle_a=a, oracle_b=b,
                                 classifier=classifier)


# ---- shared: command line and files ----------------------------------------------------------------------------------


def dna_parser(doc):
    """common_parser with the flags of this folder's worlds."""
    parser = common_parser(doc)
    parser.add_argument("--world", choices=["hepg2", "mpsa"], default="hepg2")
    parser.add_argument("--data", type=pathlib.Path, help="table with columns seq, hepg2, k562, sknsh, chrom")
    parser.add_argument("--checkpoints", type=pathlib.Path, help="folder of the networks that pretrain.py made")
    return parser


def open_world(args):
    """The world that the flags name -> `dna_world`; its networks are this folder's own, those of --data under --out."""
    if args.data and args.world != "hepg2":
        fail("--data is a world of its own: leave --world out.")
    default = args.out / "dna_pretrain" if args.data else pathlib.Path(__file__).parent / "checkpoints"
    return dna_world("data" if args.data else args.world, args.data, args.checkpoints or default, args.device)


def common_parser(doc):
    """The flags that every script has, in the same order; a bad flag ends in one sentence and exit code 2."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{parser.prog}: {message}")
    parser.add_argument("--seed", type=int, default=0)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="coarse, in seconds")
    size.add_argument("--paper", action="store_true", help="the paper's sizes")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="folder of results and caches")
    parser.add_argument("--device", type=device, default="cpu", help="cpu or cuda")
    return parser


def device(text):
    """An argparse type: a device of PyTorch that this machine has."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no device of this machine") from error
    return text


def results_folder(args, script):
    """The folder of a script's results, `out`/<folder>_<script>; made now, so that a bad path costs no work."""
    path = args.out / script
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"{path} cannot be made: {error.strerror}")
    return path


def positive(kind):
    """An argparse type: a number of this kind (int or float) above zero."""

    def parse(text):
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be above zero, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


def fail(message):
    """End with one sentence on stderr and exit code 2."""
    print(message, file=sys.stderr)
    raise SystemExit(2)


def progress(label, done, total):
    """A line on stderr that counts up."""
    if done == total or done % max(1, total // 20) == 0:
        print(f"\r{label} {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


def write_atomically(path, write):
    """Call write(path of a temporary file), then rename: an interrupted run leaves no half-written file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"part-{path.name}")  # the suffix stays, matplotlib reads the format from it
    write(part)
    os.replace(part, path)


def save_figure(figure, path, dpi=100):
    """Write a figure as a PNG with a palette of 128 colours, which is a third of the size, and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi)
    plt.close(figure)
    picture = Image.open(buffer).convert("RGB").quantize(128)
    write_atomically(path, lambda part: picture.save(part, optimize=True))


def row(name, estimate, se=None, exact=None, reference=None):
    """A line of numbers.json. z is against `reference` (value, standard error) where there is one, else `exact`."""
    value, value_se = reference or (exact, 0.0)
    z = (estimate - value) / math.hypot(se, value_se) if se and value is not None else None
    return dict(name=name, estimate=estimate, se=se, exact=exact, reference=reference and reference[0], z=z)


def write_numbers(path, args, rows, evaluations, seconds):
    """numbers.json: the arguments, the rows and what the run cost."""
    args = {name: str(value) if isinstance(value, pathlib.Path) else value for name, value in vars(args).items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "scipy", "matplotlib")}
    record = dict(args=args, rows=rows, network_evaluations=evaluations, seconds=round(seconds, 1),
                  peak_memory_mb=round(peak), versions=dict(python=sys.version.split()[0], **versions))
    write_atomically(path, lambda part: part.write_text(json.dumps(record, indent=1) + "\n"))
    print(f"results: {path.parent}", file=sys.stderr)


def print_table(rows, problem, keys):
    """The rows named method.problem.key: a line a method, a column a key; estimate±se, and z in brackets."""
    table = {r["name"]: r for r in rows}
    methods = list(dict.fromkeys(name.split(".")[0] for name in table if name.split(".")[1] == problem))

    def cell(r):
        if r is None:
            return ""
        text = f"{r['estimate']:,}" if isinstance(r["estimate"], int) else f"{r['estimate']:.3f}"
        return text + (f"±{r['se']:.3f}" if r["se"] else "") + (f" ({r['z']:+.1f})" if r["z"] is not None else "")

    lines = [[m, *(cell(table.get(f"{m}.{problem}.{key}")) for key in keys)] for m in methods]
    lines = [[problem, *keys]] + [line for line in lines if any(line[1:])]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines if len(lines) > 1 else []:
        print(line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:])), sep="  ")
    print()


# ---- main ------------------------------------------------------------------------------------------------------------


def main(args):
    """Compose, measure, draw and write -> {row name: estimate}."""
    start, out = time.perf_counter(), results_folder(args, "dna_or_composition")
    world, rng = open_world(args), torch.Generator(args.device).manual_seed(args.seed)
    if world.law:
        rows, found, calls = mix_splice(world, args, rng)
        draw_splice_mixture(out / "figure.png", rows, found, args)
    else:
        rows, calls = mix_cells(world, args, out, rng)
        draw_cell_mixture(out / "figure.png", world, rows, args)
    write_numbers(out / "numbers.json", args, rows, calls, time.perf_counter() - start)
    many = range(len(TILTS if world.law else args.cells))
    print_table(rows, world.name, [f"{key}_{i + 1}" for key in ("dual", "kl") for i in many] + ["worst_kl"])
    print_table(rows, world.name, [f"ce_{i + 1}" for i in many] + ["worst_ce", "entropy", "mean_reward", "mean_gc"])
    if not world.law:
        for key in ("bound", "regret"):
            print_table(rows, world.name, [*(f"{key}_{cell}" for cell in args.cells), f"worst_{key}"])
        print_table(rows, world.name, [f"share_{cell}" for cell in world.oracle_b.architecture["names"]])
    return {r["name"]: r["estimate"] for r in rows}


if __name__ == "__main__":
    main(parse_args())
