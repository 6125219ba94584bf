"""Compose masked diffusion models by AND: the law closest to HepG2 and to K562 elements at once, in the worst case.

Paper: Khalafi, Hounie, Ding and Ribeiro, "Composition and Alignment of Diffusion Models using Constrained Learning",
NeurIPS 2025, arXiv 2508.19104, carried over to masked diffusion. Same multipliers as toy/and_composition.py; where that
sums scores, this one multiplies the probabilities of the four letters.

Run    python dna/and_composition.py                       HepG2 and K562, 200 bp          4 minutes, one CPU core
       python dna/and_composition.py --quick               the same, coarse                20 seconds
       python dna/and_composition.py --world mpsa          9-mers, everything enumerable   30 seconds
       python dna/and_composition.py --cells hepg2 k562 gm12878        of three cell types
       python dna/and_composition.py --resume              with the cell types' models that the last run trained
       python dna/and_composition.py --paper --device cuda             one letter a step, more of everything

Worlds mpsa   two laws of 5' splice sites: the base law times exp(inclusion / 0.25), and times exp(GC letters / 2). Two
              properties that strong splice sites cannot both have, and tilts of different strength: equal weights are
              far from right. The product is the base law times the exponential of the weighted mean of the tilts.
       hepg2  the base model, fine-tuned on the training elements of each cell type. Labels are cell-type-specific
              *accessibility*, a stand-in for the papers' measured activity.

Notation (here -> paper)
       q_i, weights -> q^i, lambda    the models; multipliers, which are also the exponents of the product
       product      -> q_AND^lambda   prod_i q_i^lambda_i / Z(lambda), lambda on the simplex
       D(lambda)    -> D_AND          the dual function -log Z(lambda); concave, its gradient is KL(product || q_i)
       u                              min over p of max_i KL(p || q_i) = D(lambda*)
       letters      -> surrogate      at each masked place prod_i p_i(letter)^lambda_i / C: the product of a step's
                                      categoricals, which is not the reverse process of the product
       log_q, log_w                   log probability of a path under each model; log weight of the path

Algorithm
       1. multiply the letters' probabilities of all models, place by place    `product_letters`
       2. set some of the masked letters from them                             `set_letters`
       3. weight the path by their normalisers C, resample where weights differ    `sample_product`, `resample`
       4. KL to each model along the paths: of the letters at the states met, or of the weighted paths     `path_kl`
       5. raise the multiplier of the larger ones, repeat, average the second half   `dual_ascent`, `dual_update`
       6. the cell types' own models: maximum likelihood on the elements of one                   `fit_weighted`

Why 3 is exact: a model that sets one letter after the other gives a path the probability of its sequence, whatever the
order. So the product of the models' path laws is the law of the order times prod_i q_i(x)^lambda_i, and the weights of
the paths, prod C, average to Z(lambda). With several letters a step, or with networks, whose orders do not agree, the
same holds of path laws. Without weights (`constrained`, as in the paper's Algorithm 3) all are those of another law.

What you should see: mpsa: at equal weights the product is 0.73 nats from one law and 2.05 from the other; at (0.414,
0.586) it is 1.451 from both, which is -log Z. SMC finds these weights to 1e-3, and log Z to its error of 0.003. By the
letters' KLs without weights they are (0.390, 0.610), and what is sampled there differs from the product by a total
variation of 0.15: it is 1.51 nats from the worse law, and its paths 1.63. hepg2: the labels, cell-type-specific
accessibility, tell little to models tuned that briefly: the two are 0.7 ± 0.1 nats apart, for sequences of 264 nats,
and their product is 0.17 ± 0.03 nats from each of them at equal weights already. Constrained weights are the same
within their error (0.503 ± 0.003), SMC hardly changes what is sampled, and hardly any sequence is open in both cell
types by the classifier, as in real elements.
To try: --world mpsa --steps 3: several letters at once; --ess 0: importance weights alone; --updates 1000.
"""
import argparse
import copy
import csv
import gzip
import hashlib
import importlib.metadata
import io
import itertools
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
from torch.nn.functional import conv1d, one_hot, silu

MASK = 4  # the token after A, C, G, T
MOTIFS = {  # JASPAR 2026 (CC BY 4.0), letters per thousand sites: rows A, C, G, T; DATA.md gives the identifiers
    "HNF4A": ("32 932 865 930 15 20 60 29 788", "891 27 29 12 20 15 813 910 60",
              "27 23 78 41 936 47 39 14 63", "51 19 28 17 29 918 88 46 89"),
    "FOXA2": ("358 72 14 930 851 947 9 941", "47 11 8 36 86 13 751 12",
              "147 901 7 10 25 11 14 11", "448 16 971 24 39 30 226 36"),
    "HNF1A": ("459 23 147 982 934 80 236 934 45 3 815 878 86",
              "27 64 110 0 42 27 265 1 1 16 14 43 822",
              "472 55 28 17 1 0 321 22 54 0 77 68 38",
              "42 858 715 1 24 893 178 43 900 981 94 11 53"),
    "CEBPA": ("688 11 13 117 15 790 77 910 952 57", "92 10 4 12 951 45 779 72 13 205",
              "162 9 30 733 9 85 20 4 17 93", "58 969 954 138 26 80 124 14 18 645"),
    "GATA1": ("55 18 692 940 31 36 103", "869 8 10 18 17 918 42",
              "38 9 12 14 9 20 11", "38 964 286 28 943 26 844"),
    "SPI1": ("632 782 774 82 855 39 19 970 946 72 162 95 220",
             "65 55 22 116 25 5 8 10 9 67 35 58 110",
             "217 101 97 760 92 945 964 10 17 847 49 793 548",
             "86 62 106 42 29 12 9 10 27 13 754 55 121"),
}
SCHEMES = ("systematic", "stratified", "multinomial", "residual", "ssp")
TILTS = {"included": (4.0, 0.0), "gc_rich": (0.0, 0.5)}  # of the mpsa world: per log10 percent, per letter G or C
PRESETS = {  # what the size flags default to
    ("hepg2", "quick"): dict(updates=3, batch=8, steps=8, groups=8, particles=2, dual_steps=4, dual_groups=4, levels=2),
    ("hepg2", "default"): dict(updates=150, batch=64, steps=32, groups=64, particles=4, dual_steps=6, dual_groups=8,
                               levels=8),
    ("hepg2", "paper"): dict(updates=2000, batch=256, steps=200, groups=640, particles=16, dual_steps=50,
                             dual_groups=64, levels=128),
    ("mpsa", "quick"): dict(updates=1, batch=1, steps=9, groups=20, particles=100, dual_steps=10, dual_groups=20,
                            levels=1),
    ("mpsa", "default"): dict(updates=1, batch=1, steps=9, groups=40, particles=1000, dual_steps=20, dual_groups=20,
                              levels=1),
    ("mpsa", "paper"): dict(updates=1, batch=1, steps=9, groups=100, particles=1000, dual_steps=100, dual_groups=100,
                            levels=1),
}
DUAL_LR = dict(hepg2=0.5, mpsa=0.15)  # about one over how fast the KLs part with the multipliers


def parse_args(argv=None):
    parser = dna_parser(__doc__)
    parser.add_argument("--cells", nargs="+", default=["hepg2", "k562"], help="cell types whose models to compose")
    parser.add_argument("--updates", type=positive(int), help="gradient steps from the base model to a cell type's")
    parser.add_argument("--batch", type=positive(int), help="elements in a gradient step")
    parser.add_argument("--lr", type=positive(float), default=2e-3, help="learning rate of them")
    parser.add_argument("--steps", type=positive(int), help="sampling steps, at most one a letter")
    parser.add_argument("--groups", type=positive(int), help="independent groups of particles, at least 2")
    parser.add_argument("--particles", type=positive(int), help="particles in a group")
    parser.add_argument("--ess", type=positive(float), default=0.5, help="resample below this fraction of particles")
    parser.add_argument("--resampling", choices=SCHEMES, default="systematic")
    parser.add_argument("--dual-steps", type=positive(int), help="steps of the multipliers, at least 4")
    parser.add_argument("--dual-groups", type=positive(int), help="groups of particles at each of them")
    parser.add_argument("--dual-lr", type=positive(float), help="their step, for KLs one unit apart")
    parser.add_argument("--levels", type=positive(int), help="noise levels behind the likelihood of each sequence")
    parser.add_argument("--bf16", action="store_true", help="networks in bfloat16")
    parser.add_argument("--resume", action="store_true", help="go on with the networks that are in the results folder")
    args = parser.parse_args(argv)
    for name, value in PRESETS[args.world, "quick" if args.quick else "paper" if args.paper else "default"].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.dual_lr = args.dual_lr or DUAL_LR[args.world]
    if args.dual_steps < 4 or args.groups < 2 or len(set(args.cells)) < 2 or len(set(args.cells)) < len(args.cells):
        parser.error("--dual-steps must be at least 4, --groups at least 2, and --cells at least two different ones")
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


# ---- the worlds: all 9-mers, their products, and the walk of the per-step product ------------------------------------


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


def product_law(log_q, weights):
    """prod_i q_i^weights_i of laws log_q (m, M), normalised -> log p (M,), log Z."""
    log_p = weights.to(log_q) @ log_q
    log_z = log_p.logsumexp(0)
    return log_p - log_z, log_z.item()


def dual_function(log_q, weights):
    """D(weights) = -log Z, and KL(product || q_i) (m,), its gradient along the simplex."""
    log_p, log_z = product_law(log_q, weights)
    return -log_z, (log_p - log_q) @ log_p.exp()


def walk(step, length):
    """The sampler of one random letter a step by enumeration: its law (4^L,) and the mean of a cost over its paths.

    step(states (n, L)) -> log p of the letters (n, L, 4), costs of setting a letter (n, m, L). Unnormalised letters
    give masses instead of a law: those of a product, without C, give prod_i q_i^weights_i.
    """
    reach, total = None, 0
    for masked in sorted(itertools.product((True, False), repeat=length), key=sum, reverse=True)[:-1]:
        letters, cost = step(torch.cartesian_prod(*[torch.arange(4, 5) if m else torch.arange(4) for m in masked])
                             .view(-1, length))
        if reach is None:  # the mass that comes by each state
            reach = torch.zeros([5] * length).to(letters)
            reach.view(-1)[-1] = 1
        here = [slice(4, 5) if m else slice(0, 4) for m in masked]
        mass, p = reach[tuple(here)].reshape(-1, 1) / sum(masked), letters.exp()
        for k in range(length):
            if masked[k]:
                there = [slice(0, 4) if place == k else part for place, part in enumerate(here)]
                moved = (mass * p[:, k]).view(*[1 if m else 4 for m in masked], 4)
                reach[tuple(there)] += moved.movedim(-1, k).squeeze(k + 1)
                total = total + mass[:, 0] @ cost[:, :, k]
    return reach[(slice(0, 4),) * length].flatten(), total


def surrogate_numbers(denoisers, weights, length):
    """What the per-step product samples, one letter a step, without weights -> its law (4^L,), KL of paths (m,)."""

    def step(x):
        log_p = predict_all(denoisers, x)
        letters = product_letters(log_p, weights)[0]
        return letters, letters_kl(letters[:, None], log_p)

    return walk(step, length)


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


def dual_ascent(predictions, draw, kl, args):
    """Algorithm 3: projected ascent of the multipliers -> average of the second half (m,), path (steps + 1, m).

    draw(weights) -> samples of the product; kl(weights, samples) -> KL of each model, up to a common constant.
    """
    weights = torch.full((len(predictions),), 1 / len(predictions), dtype=torch.float64)
    path, memory, unit = [weights], torch.zeros_like(weights), None
    for step in range(args.dual_steps):
        gap = kl(weights, draw(weights)).double().cpu()
        unit = unit or spread(gap)
        raw, memory = dual_update(weights, gap / unit, memory, args.dual_lr)
        weights = project_to_simplex(raw)
        path.append(weights)
        progress("multipliers", step + 1, args.dual_steps)
    return torch.stack(path[len(path) // 2 :]).mean(0), torch.stack(path)


def spread(kl):
    """The unit of the multipliers' steps: how far the KLs (m,) are apart at the start, at least one nat."""
    return max((kl.max() - kl.min()).item(), 1.0)


# ---- shared: weights -------------------------------------------------------------------------------------------------


def effective_sample_size(log_w):
    """log_w (G, P) -> (sum w)^2 / sum w^2 (G,), between 1 and P."""
    return (2 * log_w.logsumexp(1) - (2 * log_w).logsumexp(1)).exp()


def log_mean_exp(log_w):
    """log_w (G, P) -> log of the mean weight (G,)."""
    return log_w.logsumexp(1) - math.log(log_w.shape[1])


def resample(log_w, scheme, rng):
    """Ancestors of P new particles in each group, log_w (G, P) -> indices (G, P); E[copies of n] = P w_n.

    multinomial: P independent uniforms through the inverse distribution function; stratified: one uniform in each
    interval of length 1/P; systematic: the same uniform in all of them; residual: floor(P w_n) copies for certain,
    multinomial for the rest; ssp (Gerber, Chopin and Whiteley 2019): floor or floor + 1 copies by the pivotal method.
    """
    groups, count = log_w.shape
    w = log_w.double().softmax(1)
    u = torch.rand(groups, 1 if scheme == "systematic" else count, generator=rng, dtype=w.dtype, device=w.device)
    if scheme in ("systematic", "stratified"):
        u = (u + torch.arange(count, device=w.device)) / count
    if scheme in ("residual", "ssp"):
        copies = (count * w).floor()  # (G, P), and the rest is shared out by the fractional parts
        part = count * w - copies
        if scheme == "ssp":
            copies += pivotal(part, u)
        else:
            left = count - copies.sum(1, keepdim=True)
            drawn = invert_cdf(part, u)  # the first `left` of these count
            use = (torch.arange(count, device=w.device) < left).to(w)
            copies.scatter_add_(1, drawn, use)
        slots = torch.arange(count, device=w.device).repeat(groups)
        return slots.repeat_interleave(copies.round().long().flatten()).view(groups, count)
    return invert_cdf(w, u)


def invert_cdf(w, u):
    """Smallest n with w_1 + ... + w_n > u sum(w), for w (G, P) and u (G, M) in [0, 1) -> (G, M)."""
    cdf = w.cumsum(1)
    return torch.searchsorted(cdf, u * cdf[:, -1:], right=True).clamp(max=w.shape[1] - 1)


def pivotal(part, u):
    """Round probabilities part (G, P), whose sums are integers, to 0 or 1 with those means, keeping the sums.

    Two undecided entries play at a time: while they sum to less than 1, one takes all; else one becomes 1 and the
    other keeps the excess. Deville and Tille (1998); u (G, P) are uniforms.
    """
    taken = torch.zeros_like(part)
    last = torch.zeros(len(part), 1, dtype=torch.long, device=part.device)  # the entry still undecided, and its value
    a = part[:, :1]
    for n in range(1, part.shape[1]):
        b = part[:, n : n + 1]
        both = a + b
        merge = both < 1
        wins = u[:, n : n + 1] < torch.where(merge, a / both.clamp(min=1e-300), (1 - b) / (2 - both).clamp(min=1e-300))
        new = torch.full_like(last, n)
        winner, loser = torch.where(wins, last, new), torch.where(wins, new, last)
        taken.scatter_add_(1, winner, (~merge).to(part))
        last, a = torch.where(merge, winner, loser), torch.where(merge, both, both - 1)
    return taken.scatter_add_(1, last, a.round())


def gather(state, index):
    """All per-particle state after resampling: every tensor of the dict, leading dimension N, at index (N,)."""
    return {name: value[index] for name, value in state.items()}


# ---- the method ------------------------------------------------------------------------------------------------------


def predict_all(denoisers, x):
    """log_p of every model at tokens x (N, L) -> (N, m, L, 4)."""
    return torch.stack([predict(denoiser, x, 100_000 // x.shape[1]) for denoiser in denoisers], 1)


def product_letters(log_p, weights):
    """Product of the models' categoricals, log_p (N, m, L, 4), weights (m,) -> normalised (N, L, 4), log C (N, L)."""
    summed = torch.einsum("m,nmlv->nlv", weights.to(log_p), log_p)
    log_c = summed.logsumexp(2)
    return summed - log_c[:, :, None], log_c


def letters_kl(log_p, log_q):
    """KL of letters with log probabilities log_p from log_q (..., L, 4) -> (..., L), nats."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


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


def sample_product(denoisers, weights, groups, particles, length, steps, rng, ess=0.5, scheme="systematic"):
    """Paths of the per-step product and their weights for the product of the path laws: SMC in independent groups.

    The models' kernels have the same places to set, so that their product is the kernel of `product_letters` times the
    C of the letters that are set. Returns x (N, L), N = groups x particles, log_w (G, P), log_z (G,) with
    E[exp(log_z)] = Z, log_q (N, m), and kl (N, m), the letters' KL to each model summed over the states met; with ess=0
    nothing is resampled, and these without weights are the paths of the surrogate. luck (G, m): how far the letters
    drawn exceeded their mean in weights . log_q - log_q_i, a number whose mean is zero, see `path_kl`.
    """
    n, device = groups * particles, rng.device
    first_slot = torch.arange(groups, device=device)[:, None] * particles
    x = torch.full((1, length), MASK, device=device)
    log_p = predict_all(denoisers, x)
    state = {name: value.expand(n, *value.shape[1:]) for name, value in dict(x=x, log_p=log_p).items()}
    state |= {name: torch.zeros(n, len(denoisers), device=device).double() for name in ("log_q", "kl")}
    state["log_w"], log_z, luck, history = torch.zeros(n, device=device).double(), 0, 0, []
    for count in letter_counts(length, steps):
        log_w = state["log_w"].view(groups, particles)
        size = effective_sample_size(log_w)
        due = size < ess * particles  # (G,)
        if due.any():
            ancestors = torch.where(due[:, None], resample(log_w, scheme, rng), torch.arange(particles, device=device))
            state = gather(state, (first_slot + ancestors).flatten())
            state["log_w"] = torch.where(due[:, None], 0, log_w).flatten()
            log_z = log_z + torch.where(due, log_mean_exp(log_w), 0)
        history.append((size.mean().item(), due.double().mean().item()))

        log_p, masked = state["log_p"], state["x"] == MASK
        letters, log_c = product_letters(log_p, weights)
        share = (masked / masked.sum(1, keepdim=True))[:, None]  # which places are set is random: the mean over them
        apart = (letters_kl(letters[:, None], log_p) * share).sum(2)  # (N, m)
        x, new = set_letters(letters, state["x"], count, rng)
        own = torch.stack([letters_log_p(model, x, new) for model in log_p.unbind(1)], 1)
        surprise = (own @ weights.to(own))[:, None] - own - count * (apart + (log_c[:, None] * share).sum(2))
        luck = luck + (state["log_w"].view(groups, particles).softmax(1)[:, :, None]
                       * surprise.view(groups, particles, -1)).sum(1)
        state["kl"], state["log_q"] = state["kl"] + count * apart, state["log_q"] + own
        state["log_w"] = state["log_w"] + torch.where(new, log_c, 0).sum(1)
        state["x"] = x
        if (x[0] == MASK).any():
            state["log_p"] = predict_all(denoisers, x)
    log_w = state["log_w"].view(groups, particles)
    return dict(state, log_w=log_w, log_z=log_z + log_mean_exp(log_w), luck=luck, history=history)


def path_kl(out, weights, corrected):
    """KL of what `sample_product` returned from each model, in every group (G, m): average them.

    corrected: E[weights . log_q - log_q_i] - log Z over the weighted paths, less the luck of the letters drawn, which
    costs no exactness and most of the spread; the estimate of Z, one for all groups, enters each by its first-order
    share, so that the groups' spread is the standard error. Else: the letters' KL.
    """
    log_w, log_z = out["log_w"], out["log_z"]
    if not corrected:
        return out["kl"].view(*log_w.shape, -1).mean(1)
    gap = (out["log_q"] @ weights.to(log_w))[:, None] - out["log_q"]  # (N, m)
    gap = (log_w.softmax(1)[:, :, None] * gap.view(*log_w.shape, -1)).sum(1)
    total = log_mean_exp(log_z[None])
    return gap - out["luck"] - total - ((log_z - total).exp() - 1)[:, None]


def constrained_weights(denoisers, length, args, rng, corrected):
    """Multipliers at which the KLs of the sampled law are equal, as far as they count -> (m,), path (steps + 1, m)."""

    def draw(weights):
        groups, particles = (args.dual_groups, args.particles) if corrected else (args.dual_groups * args.particles, 1)
        return sample_product(denoisers, weights, groups, particles, length, args.steps, rng,
                              args.ess if corrected else 0, args.resampling)

    return dual_ascent(denoisers, draw, lambda weights, out: path_kl(out, weights, corrected).mean(0), args)


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


def log_mean_and_se(log_values):
    """Independent unbiased estimates of Z, as logarithms (G,) -> log of their mean, its standard error."""
    top = log_values.max().item()
    mean, se = mean_and_se((log_values.double() - top).exp())
    return top + math.log(mean), se and se / mean


def median_and_se(values):
    """Independent values (N,) -> their median and half the distance of the order statistics sqrt(N) / 2 around it."""
    ranked, n = values.sort().values, len(values)
    low, high = (min(max(round(n / 2 + sign * n**0.5 / 2), 0), n - 1) for sign in (-1, 1))
    return values.median().item(), (ranked[high] - ranked[low]).item() / 2


def kmer_counts(x, k):
    """How often each of the 4^k words stands in x (N, L) -> (4^k,) float64."""
    words = (x.unfold(1, k, 1).long() * 4 ** torch.arange(k - 1, -1, -1, device=x.device)).sum(2)
    return torch.bincount(words.flatten(), minlength=4**k).double()


def kmer_correlation(x, y, k=3):
    """Pearson correlation of the counts of all words of k letters in x (N, L) and y (M, L): DRAKES' naturalness."""
    return torch.corrcoef(torch.stack([kmer_counts(x, k), kmer_counts(y, k)]))[0, 1].item()


def levenshtein(x, y):
    """Edit distances of x (N, A) and y (N, B), row by row -> (N,) int array.

    Bit-sliced: 64 rows a machine word. Neighbours in the table of distances differ by -1, 0 or 1 (Hyyro 2003), so that
    a cell takes eight logical operations; the cells of an anti-diagonal are independent of each other.
    """
    n, a, b = len(x), x.shape[1], y.shape[1]
    letters = [np.pad(codes.cpu().numpy().astype(np.uint8), ((0, -n % 64), (0, 0))).T for codes in (x, y)]
    planes = [np.ascontiguousarray(np.packbits(codes >> bit & 1, axis=1)).view(np.uint64)
              for codes in letters for bit in (0, 1)]
    up, down = np.full_like(planes[0], 2**64 - 1), np.zeros_like(planes[0])  # along columns: row i minus row i - 1
    more, less = np.full_like(planes[2], 2**64 - 1), np.zeros_like(planes[2])  # along rows: column j minus column j - 1
    for diagonal in range(a + b - 1):
        first, last = max(0, diagonal - b + 1), min(a, diagonal + 1)
        i, j = slice(first, last), np.arange(diagonal - first, diagonal - last, -1)
        equal = ~((planes[0][i] ^ planes[2][j]) | (planes[1][i] ^ planes[3][j]))
        u, d, m, e = up[i], down[i], more[j], less[j]
        zero = equal | d | e  # no dearer than the cell up and left
        up[i], down[i], more[j], less[j] = e | ~(zero | m), zero & m, d | ~(zero | u), zero & u
    bits = [np.unpackbits(v.view(np.uint8), axis=1)[:, :n].sum(0, dtype=np.int64) for v in (more, less)]
    return a + bits[0] - bits[1]


def diversity(x):
    """Mean edit distance over all pairs of x (N, L), a unit each for insertion, deletion and substitution."""
    i, j = torch.triu_indices(len(x), len(x), 1, device=x.device)
    return float(levenshtein(x[i], x[j]).mean())


def motif_scores(name):
    """Log odds of a motif of MOTIFS against uniform letters, and the score of a hit -> (4, width) long, int; centinats.

    The score that a word of uniform letters reaches with probability 2e-4 at most: one random 200 bp element in 13 has
    a hit. The distribution of scores is the convolution of those of the columns.
    """
    odds = torch.tensor([[float(v) for v in line.split()] for line in MOTIFS[name]], dtype=torch.float64) + 2.5
    odds = ((odds / odds.sum(0) * 4).log() * 100).round().long()
    share = torch.ones(1, dtype=torch.float64)  # of words by score, the lowest possible first
    for column in (odds - odds.amin(0)).T.tolist():
        spread = torch.zeros(len(share) + max(column), dtype=torch.float64)
        for value in column:
            spread[value : value + len(share)] += share / 4
        share = spread
    above = share.flip(0).cumsum(0).flip(0)  # probability of this score or a higher one
    return odds, int((above > 2e-4).sum() + odds.amin(0).sum())


def motif_hits(x):
    """Which of MOTIFS stand in x (N, L), on either strand -> {name: (N,) bool}."""
    hits, letters = {}, one_hot(x.long(), 4).float().transpose(1, 2)
    for name in MOTIFS:
        odds, threshold = motif_scores(name)
        both = torch.stack([odds, odds.flip(0, 1)]).float().to(x.device)
        hits[name] = conv1d(letters, both).amax((1, 2)) >= threshold
    return hits


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


def element_measures(world, x, levels, rng):
    """What the tables say about a set of elements x (N, L) -> {key: (estimate, standard error or None)}.

    activity and held_out: median reward by oracles A and B; accessible: share open in HepG2; kmer3_correlation with the
    top real HepG2 elements; diversity: mean edit distance of pairs, letters; log_likelihood: minus the bound under the
    base model, nats; motif_*: share with a hit.
    """
    x = x.long()
    with torch.no_grad():
        scores = dict(activity=world.reward, held_out=world.held_out)
        values = {key: median_and_se(torch.cat([f(part) for part in x.split(256)])) for key, f in scores.items()}
        if world.accessible:
            values["accessible"] = mean_and_se(torch.cat([world.accessible(p) > 0.5 for p in x.split(256)]).double())
    values["kmer3_correlation"] = kmer_correlation(x, world.elements.codes[world.elements.top]), None
    values["diversity"] = diversity(x), None
    values["log_likelihood"] = mean_and_se(-masked_bound(world.denoiser, x, levels, rng).mean(1))
    return values | {f"motif_{name.lower()}": mean_and_se(hit.double()) for name, hit in motif_hits(x).items()}


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


def product_rows(label, name, weights, out, corrected, exact=None):
    """Rows of a composition: multipliers, KL to each model, the worst of them, log Z."""
    exact = exact or dict(dual=[None] * len(weights), kl=[None] * len(weights), log_z=None)
    kl = path_kl(out, weights, corrected)
    rows = [row(f"{label}.{name}.dual_{i + 1}", w, exact=e)
            for i, (w, e) in enumerate(zip(weights.tolist(), exact["dual"]))]
    for i, value in enumerate(kl.T):
        rows.append(row(f"{label}.{name}.kl_{i + 1}", *mean_and_se(value), exact["kl"][i]))
    worst = int(kl.mean(0).argmax())
    rows.append(row(f"{label}.{name}.worst_kl", *mean_and_se(kl[:, worst])))
    if corrected:
        rows.append(row(f"{label}.{name}.log_z", *log_mean_and_se(out["log_z"]), exact["log_z"]))
        rows.append(row(f"{label}.{name}.resamplings", sum(share for _, share in out["history"])))
    return rows


def compose_splice(world, args, rng):
    """The enumerated world: every composition against its law -> rows, what the figure needs, calls of the models."""
    log_q = splice_models(world.law)
    models = [CountRows(ExactDenoiser(log_p.exp())) for log_p in log_q]
    best = maximise_dual(lambda w: dual_function(log_q, w), len(log_q), len(log_q))
    u, kl = dual_function(log_q, best)
    x = all_sequences(9)
    properties = dict(mean_reward=world.law.rewards[0], mean_gc=((x == 1) | (x == 2)).double().sum(1).to(log_q))
    target = product_law(log_q, best)[0].exp()
    laws = dict(product=target)
    rows = [row("exact.mpsa.u", u), row("exact.mpsa.log_z", -u)]
    rows += [row(f"exact.mpsa.dual_{i + 1}", v) for i, v in enumerate(best.tolist())]
    rows += [row(f"exact.mpsa.kl_{i + 1}", v) for i, v in enumerate(kl.tolist())]
    rows += [row(f"exact.mpsa.{key}", (target @ f).item()) for key, f in properties.items()]
    for i, (name, p) in enumerate(zip(TILTS, log_q.exp())):
        own = dual_function(log_q, torch.eye(len(log_q)).to(log_q)[i])[1]
        rows += [row(f"model_{name}.mpsa.kl_{k + 1}", v) for k, v in enumerate(own.tolist())]
        rows += [row(f"model_{name}.mpsa.worst_kl", own.max().item(), exact=u)]
        rows += [row(f"model_{name}.mpsa.{key}", (p @ f).item()) for key, f in properties.items()]
    equal, paths = torch.full((len(log_q),), 1 / len(log_q), dtype=torch.float64), {}
    jobs = {"equal": (equal, False), "equal_smc": (equal, True)}
    for label, corrected in (("constrained", False), ("constrained_smc", True)):
        weights, paths[label] = constrained_weights(models, 9, args, rng, corrected)
        jobs[label] = weights, corrected
    for label, (weights, corrected) in jobs.items():
        out = sample_product(models, weights, args.groups, args.particles, 9, args.steps, rng,
                             args.ess if corrected else 0, args.resampling)
        product, log_z = product_law(log_q, weights)
        law, law_kl = product.exp(), dual_function(log_q, weights)[1]
        path_exact = law_kl
        if not corrected:
            law, path_exact = surrogate_numbers(models, weights, 9)
            law_kl, laws[label] = (law.log() - log_q) @ law, law
        exact = dict(dual=best.tolist(), kl=path_exact.tolist(), log_z=log_z)
        rows += product_rows(label, "mpsa", weights, out, corrected, exact)
        rows += [row(f"{label}.mpsa.law_worst_kl", law_kl.max().item(), exact=u),
                 row(f"{label}.mpsa.tv_to_product", 0.5 * (law - product.exp()).abs().sum().item(), exact=0.0)]
        w = out["log_w"].softmax(1) if corrected else torch.full_like(out["log_w"], 1 / args.particles)
        for key, f in properties.items():
            values = (w * TableReward(f)(out["x"]).view_as(w)).sum(1)
            rows.append(row(f"{label}.mpsa.{key}", *mean_and_se(values), (target @ f).item(), ((law @ f).item(), 0.0)))
        progress("compositions", len([r for r in rows if r["name"].endswith("tv_to_product")]), len(jobs))
    figure = dict(log_q=log_q, best=best, u=u, paths=paths, models=models, laws=laws, properties=properties)
    return rows, figure, sum(model.rows for model in models)


def compose_cells(world, args, folder, rng):
    """Cell types' models, their compositions, real and random elements -> rows, what the figure needs, calls."""
    data, name, rows, paths = world.elements, world.name, [], {}
    models = [CountRows(net, args.bf16) for net in cell_models(world, args, folder)]
    count, length = len(models), world.length
    one_hots = torch.eye(count, dtype=torch.float64)
    jobs = {f"model_{cell}": (one_hots[i], False) for i, cell in enumerate(args.cells)}
    equal = torch.full((count,), 1 / count, dtype=torch.float64)
    jobs |= {"equal": (equal, False)}
    for label, corrected in (("constrained", False), ("constrained_smc", True)):
        weights, paths[label] = constrained_weights(models, length, args, rng, corrected)
        jobs[label] = weights, corrected
    held, sets = data.chrom <= 2, {}
    for cell in args.cells:
        codes = data.codes[held & members(data, cell)]
        sets[f"real_{cell}"] = codes[torch.randperm(len(codes), generator=rng, device=rng.device)[: args.groups]].long()
    sets["random"] = torch.randint(4, (args.groups, length), generator=rng, device=rng.device)
    for done, (label, (weights, corrected)) in enumerate(jobs.items()):
        out = sample_product(models, weights, args.groups, args.particles if corrected else 1, length, args.steps, rng,
                             args.ess if corrected else 0, args.resampling)
        rows += product_rows(label, name, weights, out, corrected)
        drawn = torch.multinomial(out["log_w"].softmax(1), 1, generator=rng)[:, 0]
        sets[label] = out["x"].view(*out["log_w"].shape, -1)[torch.arange(args.groups, device=rng.device), drawn]
        progress("compositions", done + 1, len(jobs))
    scores = {}
    for label, x in sets.items():
        rows += [row(f"{label}.{name}.{key}", *value) for key, value in
                 element_measures(world, x, args.levels, rng).items()]
        more, scores[label] = cell_rows(world, label, x, args.cells)
        rows += more
    return rows, dict(scores=scores, paths=paths, cells=args.cells), sum(model.rows for model in models)


def cell_rows(world, label, x, cells):
    """Rows of elements x (N, L) by cell type: oracle B of each, shares open in each and all -> rows, scores (m, N)."""
    with torch.no_grad():
        scores = torch.stack([torch.cat([world.oracle_b.score(part, cell) for part in x.split(256)]) for cell in cells])
        rows = [row(f"{label}.{world.name}.oracle_b_{cell}", *median_and_se(v)) for cell, v in zip(cells, scores)]
        if world.classifier and set(cells) <= set(world.classifier.architecture["names"]):
            open_in = torch.stack([world.classifier.score(x, cell) > 0 for cell in cells]).double()
            rows += [row(f"{label}.{world.name}.open_{c}", *mean_and_se(v)) for c, v in zip(cells, open_in)]
            rows.append(row(f"{label}.{world.name}.open_all", *mean_and_se(open_in.prod(0))))
    return rows, scores.cpu()


# ---- the figures -----------------------------------------------------------------------------------------------------

COLORS = {"equal": "#E69F00", "constrained": "#D55E00", "constrained_smc": "#0072B2", "model_hepg2": "#009E73",
          "model_k562": "#CC79A7", "real_hepg2": "#333333", "real_k562": "#999999"}
TITLES = {"equal": "equal", "constrained": "constrained", "constrained_smc": "constrained, SMC"}


def draw_duals(ax, paths, best=None):
    """The first multiplier against the dual step."""
    for label, path in paths.items():
        ax.plot(path[:, 0].numpy(), color=COLORS[label], label=TITLES[label])
    if best is not None:
        ax.axhline(best[0].item(), color="black", linestyle=":", label="exact")
    ax.set(xlabel="dual step", ylabel="first multiplier", ylim=(0, 1))
    ax.legend(fontsize=7)


def draw_splice_product(path, found, args, rng):
    """Enumerated: the dual function, the KLs by weights, the multipliers, and the law of the reward."""
    log_q = found["log_q"]
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.8))
    grid = torch.linspace(0, 1, 41, dtype=torch.float64)
    values, kls = zip(*(dual_function(log_q, torch.stack([a, 1 - a])) for a in grid))
    axes[0].plot(grid.numpy(), values, color="black", linewidth=1, label="-log Z, exact")
    axes[0].plot(found["best"][0], found["u"], "k*", markersize=10)
    for k, name in enumerate(TILTS):
        axes[1].plot(grid.numpy(), [kl[k].item() for kl in kls], color=("#009E73", "#CC79A7")[k],
                     label=f"product from {name.replace('_', ' ')}, exact")
    for a in torch.linspace(0.1, 0.9, 5, dtype=torch.float64):
        weights = torch.stack([a, 1 - a])
        for label, corrected in (("constrained", False), ("constrained_smc", True)):
            out = sample_product(found["models"], weights, 20, args.particles, 9, args.steps, rng,
                                 args.ess if corrected else 0)
            for kl in path_kl(out, weights, corrected).mean(0).tolist():
                axes[1].plot(a, kl, "o" if corrected else "x", color=COLORS[label], markersize=5)
            if corrected:
                axes[0].plot(a, -log_mean_and_se(out["log_z"])[0], "o", color=COLORS[label], markersize=5)
    axes[0].plot([], [], "o", color=COLORS["constrained_smc"], label="SMC")
    axes[1].plot([], [], "o", color=COLORS["constrained_smc"], label="SMC")
    axes[1].plot([], [], "x", color=COLORS["constrained"], label="letters without weights")
    axes[0].set(xlabel="weight of included", ylabel="dual function, nats")
    axes[1].set(xlabel="weight of included", ylabel="KL, nats")
    draw_duals(axes[2], found["paths"], found["best"])
    reward = found["properties"]["mean_reward"]
    bins = np.linspace(reward.min().item(), reward.max().item(), 31)
    laws = {name.replace("_", " "): (p, color, "-")
            for name, p, color in zip(TILTS, log_q.exp(), ("#009E73", "#CC79A7"))}
    laws["product, exact"] = found["laws"]["product"], "black", "-"
    for label in ("equal", "constrained"):
        laws[f"{TITLES[label]} without weights"] = found["laws"][label], COLORS[label], "--"
    for label, (p, color, style) in laws.items():
        axes[3].hist(reward.cpu(), bins, weights=p.cpu(), histtype="step", color=color, linestyle=style, label=label)
    axes[3].set(xlabel="reward: log10 percent spliced in", ylabel="share")
    for ax in (axes[0], axes[1], axes[3]):
        ax.legend(fontsize=7)
    figure.tight_layout()
    save_figure(figure, path)


def draw_cell_product(path, world, rows, found):
    """KL to each model, the multipliers, oracle B of two cell types, and motifs."""
    table = {r["name"]: r for r in rows}
    figure, axes = plt.subplots(1, 4, figsize=(16, 4), width_ratios=[1.1, 0.8, 1.1, 1.2])
    name, cells, scores = world.name, found["cells"], found["scores"]
    labels = [key for key in scores if f"{key}.{name}.kl_1" in table]
    for k, cell in enumerate(cells):
        kl = [table[f"{label}.{name}.kl_{k + 1}"] for label in labels]
        axes[0].bar(np.arange(len(kl)) + (k - len(cells) / 2 + 0.5) * 0.8 / len(cells), [r["estimate"] for r in kl],
                    0.8 / len(cells), yerr=[2 * r["se"] for r in kl], label=f"from the model of {cell}", capsize=2,
                    color=("#009E73", "#CC79A7", "#56B4E9", "#999999")[k % 4])
    titles = [label.replace("_smc", " SMC").replace("model_", "") for label in labels]
    axes[0].set_xticks(range(len(labels)), titles, rotation=20, fontsize=8)
    axes[0].set(ylabel="KL of paths, nats (2 standard errors)")
    axes[0].legend(fontsize=7)
    draw_duals(axes[1], found["paths"])
    for label in [f"real_{cell}" for cell in cells[:2]] + ["constrained_smc"]:
        axes[2].scatter(*scores[label][:2], s=8, linewidths=0, alpha=0.7, color=COLORS.get(label, "#56B4E9"),
                        label=label.replace("_", " "))
    axes[2].set(xlabel=f"oracle B, log odds of {cells[0]}", ylabel=f"oracle B, log odds of {cells[1]}")
    axes[2].legend(fontsize=7)
    shown = [label for label in (*[f"real_{cell}" for cell in cells[:2]], "equal", "constrained_smc")]
    for k, label in enumerate(shown):
        rates = [table[f"{label}.{name}.motif_{motif.lower()}"]["estimate"] for motif in MOTIFS]
        axes[3].bar(np.arange(len(rates)) + 0.2 * k - 0.3, rates, 0.2, color=COLORS.get(label, "#56B4E9"),
                    label=label.replace("_", " "))
    axes[3].set_xticks(range(len(MOTIFS)), MOTIFS, fontsize=7)
    axes[3].set(ylabel="share of elements with the motif")
    axes[3].legend(fontsize=7)
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
    start, out = time.perf_counter(), results_folder(args, "dna_and_composition")
    world, rng = open_world(args), torch.Generator(args.device).manual_seed(args.seed)
    if world.law:
        rows, found, calls = compose_splice(world, args, rng)
        draw_splice_product(out / "figure.png", found, args, rng)
    else:
        rows, found, calls = compose_cells(world, args, out, rng)
        draw_cell_product(out / "figure.png", world, rows, found)
    write_numbers(out / "numbers.json", args, rows, calls, time.perf_counter() - start)
    many = range(len(TILTS if world.law else args.cells))
    print_table(rows, world.name, [f"{key}_{i + 1}" for key in ("dual", "kl") for i in many] + ["worst_kl", "log_z"])
    print_table(rows, world.name, ["law_worst_kl", "tv_to_product", "mean_reward", "mean_gc"])
    if not world.law:
        print_table(rows, world.name, [f"oracle_b_{cell}" for cell in args.cells]
                    + [f"open_{cell}" for cell in args.cells] + ["open_all"])
        print_table(rows, world.name, ["kmer3_correlation", "diversity", "log_likelihood"])
        print_table(rows, world.name, [f"motif_{motif.lower()}" for motif in MOTIFS])
    return {r["name"]: r["estimate"] for r in rows}


if __name__ == "__main__":
    main(parse_args())
