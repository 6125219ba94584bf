"""Merge models tuned for one reward each into a model for any weighting of the rewards, letter by letter, on DNA.

Paper: Zhang, Wang and Zou, "Step-level Denoising-time Diffusion Alignment with Multiple Objectives" (MSDDA), 2026,
arXiv 2604.14379, carried over from Gaussian kernels to categorical ones. Its text was not at hand; see toy/msdda.py.
figure.png: the Pareto front of activity and GC content (or low K562), for this merge, for the usual ones, and for a
reward-free weight that corrects the merge (not in the paper; akin to the Feynman-Kac correctors of Skreta et al. 2025).

Run    python dna/msdda.py                      200 bp elements, two fine-tuned networks          3 CPU minutes
       python dna/msdda.py --quick              the same, coarse                                  15 seconds
       python dna/msdda.py --world mpsa         9-mers, everything enumerable                     35 CPU seconds
       python dna/msdda.py --second k562        closed in K562 instead of rich in G and C         as the default
       python dna/msdda.py --resume             go on with the networks that are there
       python dna/msdda.py --data dataset.csv   the papers' data, after pretrain.py --data; --paper for its sizes

Worlds mpsa   human 5' splice sites: model i is p exp(r_i / kl_weight_i) / Z_i exactly, r_1 the measured inclusion, r_2
              the GC content.
       hepg2  model i is fine-tuned on real elements drawn with weights exp(r_i / kl_weight_i), r_1 being the log odds
              of HepG2 *accessibility* by oracle A, a stand-in for measured activity; oracle B only measures.

Notation (here -> usual symbol)
       weights -> w_i        of the rewards; the base model takes the rest, 1 - sum of the weights: the exponents
       kl_weight -> beta_i   temperatures: the merged target is p exp(sum_i w_i r_i / kl_weight_i) / Z
       log_p                 log probabilities of the four letters at every masked place, by each model
       log_c -> log C        log of the sum over letters of prod_i p_i(letter)^{w_i}, at every masked place

Algorithm (`merged_paths`)
       1. ask every model for its letters, only where something was set since it was asked      `refresh`
       2. multiply them: prod_i p_i^{w_i} / C                                                   `merge_letters`
       3. set each masked letter with probability 1 / step, the same in all models              `unmask`
       4. with particles: add log C of the letters that were set, resample                      `resample_systematic`
       Models that follow p exp(r_i / kl_weight_i) multiply as *paths*; the merged kernels of one step are normalised
       and drop C. As all models set a place with the same probability, C belongs to the letters that are set.
       What the paper calls exact is another target: kernels p exp(V_i), V_i = E[r_i / kl_weight_i | x], multiply into
       the one of the weighted reward step by step (`step_level`), but their law is not the tilted one.

What you should see (mpsa; ± is the standard deviation over 3 seeds). At weights (1/2, 1/2) the target has a mean
inclusion of 0.387 and a log mass of -0.803: with C 0.381 ± 0.008 and -0.801 ± 0.004, without 0.533 ± 0.010. The laws of
many steps, enumerated, are off by a KL of 0.029 nats (MSDDA), 0.042 (average of probabilities, which is what switching
gives too) and 0.021 (step-level optimum, with an inclusion of 0.207: it tilts too little here, on Gaussians it tilts
too much); merged step-level models are that optimum to 1e-14. With base exponent -1 MSDDA is off by 0.022, and C mends
that as well. At these temperatures the weights vary so little that groups are never resampled.
hepg2: fine-tuning is the weak part. The law of 5% of the elements has a mean activity of 3.6 (oracle A); 200 steps
towards it take the base model from -2.2 to -0.8 ± 0.2 only, so that no merge is near the reweighted elements. GC
content moves as it should: at (1/2, 1/2) it is 0.529 ± 0.015 with C and 0.518 ± 0.004 without, for the 0.543 asked
for. In activity the methods do not differ by more than their spread, 0.1 to 0.3 with 64 sequences.
To try: --weights 1,1 (both rewards at full strength, the base with exponent -1), --ess 0, --steps 8.
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
PRESETS = {  # what the size flags default to
    "quick": dict(samples=32, particles=8, steps=8, updates=4, batch=16, levels=2),
    "hepg2": dict(samples=64, particles=8, steps=24, updates=200, batch=64, levels=4),
    "mpsa": dict(samples=8000, particles=100, steps=128, updates=0, batch=0, levels=0),
    "paper": dict(samples=640, particles=16, steps=128, updates=4000, batch=128, levels=128),
}
SETTINGS = {  # temperatures of activity, of the second reward, and weights: with them 5% of the elements are effective
    "gc": (1.6, 0.055, [(0.25, 0.75), (0.5, 0.5), (0.75, 0.25)]),
    "k562": (1.6, 1.6, [(0.25, 0.75), (0.5, 0.5), (0.75, 0.25)]),
    "mpsa": (0.5, 0.1, [(0.25, 0.75), (0.5, 0.5), (0.75, 0.25), (1.0, 1.0)]),
}


def parse_args(argv=None):
    parser = dna_parser(__doc__)
    parser.add_argument("--second", choices=["gc", "k562"], default="gc", help="the other reward: GC content, low K562")
    parser.add_argument("--weights", nargs="+", type=weight_pair, help="pairs like 0.5,0.5: a weight for each reward")
    parser.add_argument("--kl-weight", type=positive(float), nargs=2, help="temperatures of the two rewards")
    parser.add_argument("--samples", type=positive(int), help="sequences of each method")
    parser.add_argument("--particles", type=positive(int), help="particles in a group of the weighted merge")
    parser.add_argument("--steps", type=positive(int), help="steps of the merge; one network gets as many more")
    parser.add_argument("--ess", type=float, default=0.5, help="resample below this fraction of particles")
    parser.add_argument("--updates", type=positive(int), help="training steps of each fine-tuned network")
    parser.add_argument("--batch", type=positive(int), help="sequences in a training step")
    parser.add_argument("--lr", type=positive(float), default=3e-3, help="highest learning rate")
    parser.add_argument("--levels", type=positive(int), help="noise levels behind the likelihood of each sequence")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="train in bfloat16")
    parser.add_argument("--resume", action="store_true", help="go on with what is in the results folder")
    args = parser.parse_args(argv)
    world = "mpsa" if args.world == "mpsa" else "hepg2"
    first, second, weights = SETTINGS["mpsa" if world == "mpsa" else args.second]
    preset = PRESETS["quick" if args.quick else "paper" if args.paper else world]
    for name, value in dict(preset, kl_weight=[first, second], weights=weights).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.samples % args.particles or args.samples < 2 * args.particles or not 0 <= args.ess <= 1:
        parser.error("--samples must be a multiple of --particles, two groups at least; --ess lies between 0 and 1")
    if world == "mpsa" and args.second == "k562":
        parser.error("--second k562 needs elements: leave --world mpsa out")
    return args


def weight_pair(text):
    """An argparse type: two finite numbers, "0.5,0.5"."""
    values = tuple(float(v) for v in text.split(","))
    if len(values) != 2 or not all(map(math.isfinite, values)):
        raise argparse.ArgumentTypeError(f"expected two numbers like 0.5,0.5, got {text}")
    return values


def weights_tag(weights):
    """A pair of weights as a word for numbers.json: (1.2, -0.2) -> w120_m20."""
    return "w" + "_".join(f"{'m' * (w < 0)}{abs(100 * w):g}".replace(".", "p") for w in weights)


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


def gc_content(x):
    """Share of G and C in x (N, L) -> (N,) float64."""
    return ((x == 1) | (x == 2)).double().mean(1)


# ---- the worlds: all 9-mers ------------------------------------------------------------------------------------------


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


def step_level(p, value):
    """The step-level optimum for value = r / kl_weight (4^L,): a model, tokens x (n, L) -> log_p (n, L, 4).

    Its letters are p(letter | x) exp(V), normalised, with V = E_p[value | x and this letter], by enumeration.
    """
    base, mass = ExactDenoiser(p), (p * value).view([4] * round(math.log(len(p), 4)))
    for axis in range(mass.dim()):
        mass = torch.cat([mass, mass.sum(axis, keepdim=True)], axis)
    mean = mass.flatten() / base.log_mass.exp()

    def letters(x):
        state = (x * base.place).sum(1)[:, None, None]
        return (base(x) + mean[state + (torch.arange(4, device=x.device) - x[:, :, None]) * base.place[:, None]]
                ).log_softmax(2)

    return letters


def limit_laws(models, rules, length):
    """Laws of x when letters are set one at a time, each at a uniform masked place: the limit of many steps.

    Each rule makes of the models' [log_p (n, k, 4)] the logarithms (n, k, 4) of the letters' probabilities, or of
    their masses, if it leaves them unnormalised -> (number of rules, 4^L).
    """
    reach = torch.zeros(len(rules), *[5] * length, dtype=torch.float64)
    reach.view(len(rules), -1)[:, -1] = 1
    for masked in sorted(itertools.product((True, False), repeat=length), key=sum, reverse=True)[:-1]:
        here = [slice(4, 5) if m else slice(0, 4) for m in masked]
        states = torch.cartesian_prod(*[torch.arange(5)[part] for part in here]).view(-1, length)
        places = [k for k in range(length) if masked[k]]
        log_ps = [model(states)[:, places].cpu() for model in models]
        for mass, rule in zip(reach, rules):
            letters = rule(log_ps).exp() * mass[tuple(here)].flatten()[:, None, None] / len(places)
            for k, block in zip(places, letters.unbind(1)):
                block = block.view(*[1 if m else 4 for m in masked], 4).transpose(k, length).squeeze(length)
                mass[(*here[:k], slice(0, 4), *here[k + 1 :])] += block
    return reach[(slice(None), *[slice(0, 4)] * length)].reshape(len(rules), -1)


# ---- the method ------------------------------------------------------------------------------------------------------


def merge_letters(log_ps, exponents):
    """The product of categoricals prod_i p_i^exponent_i: [log_p (N, L, 4)] -> log_q (N, L, 4), log_c (N, L).

    log_q is normalised by C, the sum over letters. Fails where the exponents do not sum to 1: without the rest for the
    base model the merged model would be at another temperature.
    """
    if abs(sum(exponents) - 1) > 1e-6:
        fail(f"The exponents sum to {sum(exponents):.6g} and not to 1: the merge needs the base model.")
    product = sum(w * log_p for w, log_p in zip(exponents, log_ps))
    log_c = product.logsumexp(2)
    return product - log_c[:, :, None], log_c


def merged_paths(models, exponents, n, length, steps, rng, particles=1, ess=0.0, label=None):
    """n sequences of the merged model -> x (n, L), log_w (G, P), log_z (G,), the share of groups that resampled by
    step, and rows, the calls of networks.

    models: tokens x (k, L) -> log_p (k, L, 4), an exponent each; n = groups x particles, a group being contiguous.
    Without log_w these are draws of the merged kernels. With log_w they are draws of the product of the path laws: of
    prod_i p_i^{w_i} in the limit of many steps, and E[exp(log_z)] is its mass, Z_w / prod_i Z_i^{w_i}.
    """
    groups, device = n // particles, rng.device
    first_slot = torch.arange(groups, device=device)[:, None] * particles
    log_z, history, rows = torch.zeros(groups, device=device).double(), [], n * len(models)
    x = torch.full((n, length), MASK, device=device)
    state = {f"log_p_{k}": predict(model, x) for k, model in enumerate(models)}
    state |= dict(x=x, log_w=torch.zeros(n, device=device).double())
    for step in range(steps, 0, -1):
        log_w = state["log_w"].view(groups, particles)
        due = effective_sample_size(log_w) < ess * particles  # (G,)
        if due.any():
            stay = torch.arange(particles, device=device)
            ancestors = torch.where(due[:, None], resample_systematic(log_w, rng), stay)
            state = gather(state, (first_slot + ancestors).flatten())
            state["log_w"] = torch.where(due[:, None], 0, log_w).flatten()
            log_z = log_z + torch.where(due, log_mean_exp(log_w), 0)
        history.append(due.double().mean().item())
        log_q, log_c = merge_letters([state[f"log_p_{k}"] for k in range(len(models))], exponents)
        x, new = unmask(log_q, state["x"], step, rng)
        state |= dict(x=x, log_w=state["log_w"] + torch.where(new, log_c, 0).sum(1))
        for k, model in enumerate(models):
            state[f"log_p_{k}"], called = refresh(model, state[f"log_p_{k}"], x, new)
            rows += called
        if label:
            progress(label, steps - step + 1, steps)
    log_w = state["log_w"].view(groups, particles)
    return dict(x=state["x"], log_w=log_w, log_z=log_z + log_mean_exp(log_w), history=history, rows=rows)


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


# ---- the baselines ---------------------------------------------------------------------------------------------------


def mixed_letters(log_ps, shares):
    """The average of the models' probabilities, which mixes laws instead of multiplying them."""
    return torch.stack([log_p + math.log(w) for w, log_p in zip(shares, log_ps) if w > 0]).logsumexp(0)


def mixture(models, shares):
    """A model whose letters are the average of those of the models."""
    return lambda x: mixed_letters([model(x) for model in models], shares)


def switch_models(models, shares, rng):
    """A model that asks for each sequence, whenever it is asked, one model, drawn with probabilities `shares`."""

    def letters(x):
        chosen = torch.multinomial(torch.tensor(shares, device=x.device), len(x), replacement=True, generator=rng)
        log_p = [model(x[chosen == k]) for k, model in enumerate(models)]
        order = torch.cat([(chosen == k).nonzero()[:, 0] for k in range(len(models))])
        return torch.cat(log_p)[order.argsort()]

    return letters


def average_weights(nets, shares):
    """Rewarded Soup: a network with the weighted average of the networks' weights."""
    net = copy.deepcopy(nets[0])
    states = [other.state_dict() for other in nets]
    net.load_state_dict({name: sum(w * state[name] for w, state in zip(shares, states)) for name in states[0]})
    return net


# ---- shared: networks ------------------------------------------------------------------------------------------------


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


def either_strand(x, rng):
    """Each row of x (N, L), or its reverse complement, by the toss of a coin."""
    toss = torch.rand(len(x), 1, generator=rng, device=x.device) < 0.5
    return torch.where(toss, 3 - x.flip(1), x)


def denoiser_batches(draw, batch, rng):
    """The bound, in nats a letter, on batches of draw(n) -> tokens (n, L), as a function of the network."""

    def batch_loss(net):
        x = draw(batch)
        share = (torch.arange(batch, device=x.device) + torch.rand(batch, generator=rng, device=x.device)) / batch
        z, hidden = hide(x, share, rng)
        return hidden_loss(net(z), x, hidden).mean() / x.shape[1]

    return batch_loss


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


# ---- shared: masked diffusion, particles -----------------------------------------------------------------------------


def predict(denoiser, x, chunk=256):
    """log_p (N, L, 4) at x (N, L), in chunks and without gradient."""
    with torch.no_grad():
        return torch.cat([denoiser(part) for part in x.split(chunk)])


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


def unmask(log_p, x, step, rng):
    """From time step / steps to (step - 1) / steps: each masked token of x (N, L) is set with probability 1 / step.

    log_p (N, L, 4) gives the letters. -> tokens (N, L), newly set (N, L) bool. In float64 through the inverse
    distribution function: Gumbel noise in float32 is cut off, which lowers the temperature (Zheng et al. 2024).
    """
    u = torch.rand(x.shape, generator=rng, device=x.device, dtype=torch.float64)
    new = (x == MASK) & (u < 1 / step)
    u = torch.rand(int(new.sum()), 1, generator=rng, device=x.device, dtype=torch.float64)
    x = x.clone()
    x[new] = invert_cdf(log_p[new].double().exp(), u)[:, 0]
    return x, new


def refresh(denoiser, log_p, x, new):
    """log_p (N, L, 4) after `new` tokens were set in x (N, L) -> log_p, rows that needed a call of the denoiser.

    The denoiser does not know the time, so a row changes only where something was set and something is left to set.
    """
    due = (new.any(1) & (x == MASK).any(1)).nonzero()[:, 0]
    if len(due):
        log_p = log_p.index_copy(0, due, predict(denoiser, x[due]))
    return log_p, len(due)


def invert_cdf(w, u):
    """Smallest n with w_1 + ... + w_n > u sum(w), for w (G, P) and u (G, M) in [0, 1) -> (G, M)."""
    cdf = w.cumsum(1)
    return torch.searchsorted(cdf, u * cdf[:, -1:], right=True).clamp(max=w.shape[1] - 1)


def effective_sample_size(log_w):
    """log_w (G, P) -> (sum w)^2 / sum w^2 (G,), between 1 and P."""
    return (2 * log_w.logsumexp(1) - (2 * log_w).logsumexp(1)).exp()


def log_mean_exp(log_w):
    """log_w (G, P) -> log of the mean weight (G,)."""
    return log_w.logsumexp(1) - math.log(log_w.shape[1])


def gather(state, index):
    """All per-particle state after resampling: every tensor of the dict, leading dimension N, at index (N,)."""
    return {name: value[index] for name, value in state.items()}


def resample_systematic(log_w, rng):
    """Ancestors of P new particles in each group, log_w (G, P) -> (G, P): floor(P w_n) copies of n or one more.

    One uniform in the first interval of length 1 / P, and its shifts by 1 / P, through the inverse of the cdf.
    """
    # exercise 6: one uniform number a group, in float64 from rng; torch.searchsorted inverts the distribution function
    groups, count = log_w.shape
    cdf = log_w.double().softmax(1).cumsum(1)
    u = torch.rand(groups, 1, generator=rng, dtype=cdf.dtype, device=cdf.device)
    u = (u + torch.arange(count, device=cdf.device)) / count
    return torch.searchsorted(cdf, u * cdf[:, -1:], right=True).clamp(max=count - 1)
    # end exercise


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


def run_methods(models, world, args, rng, soup):
    """Every sampler at every pair of weights, at equal calls -> {method: {weights: out}}; models: two, and the base.

    out has x (N, L), as drawn by weight where there are weights, and what `merged_paths` says.
    """
    results, n, length = {}, args.samples, world.length
    for weights in [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0), *args.weights]:
        exponents = [*weights, 1 - sum(weights)]
        used = [(f, w) for f, w in zip(models, exponents) if abs(w) > 1e-6]
        fs, ws = zip(*used)
        if len(fs) == 1:
            name = "base" if weights == (0.0, 0.0) else "single"
            methods = {name: ((fs[0],), (1.0,), {})}
        else:
            methods = dict(msdda=(fs, ws, {}), msdda_smc=(fs, ws, dict(particles=args.particles, ess=args.ess)))
            if min(ws) > 0:
                methods["mixture"] = (mixture(fs, ws),), (1.0,), {}
                methods["switch"] = (switch_models(fs, ws, rng),), (1.0,), {}
            if soup:
                methods["soup"] = (average_weights(fs, ws),), (1.0,), {}
        for method, (asked, powers, options) in methods.items():
            start, each = time.perf_counter(), len(fs) if method == "mixture" else 1
            steps = args.steps * (len(fs) if method in ("switch", "soup") else 1 if len(fs) > 1 else 2)
            label = f"{method} {weights_tag(weights)}"
            out = merged_paths(asked, powers, n, length, steps, rng, label=label, **options)
            if options:
                groups, drawn = len(out["log_w"]), resample_systematic(out["log_w"], rng)
                first_slot = torch.arange(groups, device=rng.device)[:, None] * args.particles
                out["drawn"] = out["x"][(first_slot + drawn).flatten()]
            out.update(calls=out["rows"] * each, seconds=time.perf_counter() - start)
            results.setdefault(method, {})[weights] = out
    return results


def result_rows(world, results, rewards, exact):
    """Rows of E[r_1] and E[r_2] by method and weights, of log Z, and of the calls; exact: {(key, weights): value}."""
    rows, name = [], world.name
    for method, outs in results.items():
        for weights, out in outs.items():
            w, tag = out["log_w"].softmax(1) if "drawn" in out else None, weights_tag(weights)
            for key, reward in rewards.items():
                r = reward(out["x"])
                r = r if w is None else (w * r.view_as(w)).sum(1)
                rows.append(row(f"{method}.{name}.{key}_{tag}", *mean_and_se(r.double()), exact.get((key, weights))))
            if w is not None:
                rows.append(row(f"{method}.{name}.log_z_{tag}", *log_mean_and_se(out["log_z"]),
                                exact.get(("log_z", weights))))
                rows.append(row(f"{method}.{name}.resamplings_{tag}", sum(out["history"])))
        rows.append(row(f"{method}.{name}.network_calls", sum(out["calls"] for out in outs.values())))
    return rows


def splice_rewards(world, args):
    """The enumerated world: values (2, 4^9) of the rewards over their temperatures, r_1 and r_2 (2, 4^9)."""
    r = torch.stack([world.law.rewards[0], gc_content(all_sequences(9)).to(world.law.p)])
    return r / torch.tensor(args.kl_weight, dtype=r.dtype, device=r.device)[:, None], r


def splice_rows(world, args, rng):
    """The enumerated world -> rows, calls of models, and for the figure the fronts {method: (K, 2)}."""
    p, (values, r) = world.law.p, splice_rewards(world, args)
    tilt = lambda weights: (p.log() + torch.tensor(weights).to(p) @ values).log_softmax(0)
    log_zs = [(p.log() + v).logsumexp(0) for v in values]
    models = [ExactDenoiser(tilt(w).exp()) for w in ((1.0, 0.0), (0.0, 1.0), (0.0, 0.0))]
    rows, exact, rules, keys = [], {}, [], []
    for weights in args.weights:
        target, exponents = tilt(weights), [*weights, 1 - sum(weights)]
        log_z = (p.log() + torch.tensor(weights).to(p) @ values).logsumexp(0)
        numbers = dict(reward_1=target.exp() @ r[0], reward_2=target.exp() @ r[1], log_target=target.exp() @ target,
                       log_z=log_z - sum(w * z for w, z in zip(weights, log_zs)))
        exact |= {(key, weights): v.item() for key, v in numbers.items()}
        rows += [row(f"exact.mpsa.{key}_{weights_tag(weights)}", v.item()) for key, v in numbers.items()]
        rules += [lambda log_ps, e=exponents: merge_letters(log_ps, e)[0]]
        keys += [("msdda_limit", weights)]
        if min(exponents) >= 0:
            rules += [lambda log_ps, e=exponents: mixed_letters(log_ps, e)]
            keys += [("mixture_limit", weights)]
    for method, law in zip(keys, limit_laws(models, rules, 9)):
        rows += law_rows(*method, law.to(p), tilt(method[1]), r, exact)
    weights = min(args.weights, key=lambda w: abs(w[0] - 0.5) + abs(w[1] - 0.5))
    steps = [step_level(p, v) for v in (*values, torch.tensor(weights).to(p) @ values)]
    exponents = [*weights, 1 - sum(weights)]
    pair = limit_laws([*steps, models[2]], [lambda log_ps: merge_letters([*log_ps[:2], log_ps[3]], exponents)[0],
                                            lambda log_ps: log_ps[2]], 9)
    rows += law_rows("step_level", weights, pair[1].to(p), tilt(weights), r, exact)
    rows.append(row(f"step_level_merged.mpsa.error_{weights_tag(weights)}", (pair[0] - pair[1]).abs().sum().item(),
                    exact=0.0))
    results = run_methods(models, world, args, rng, soup=False)
    for (name, weights) in (("single", (1.0, 0.0)), ("single", (0.0, 1.0)), ("base", (0.0, 0.0))):
        exact |= {(f"reward_{k + 1}", weights): (tilt(weights).exp() @ r[k]).item() for k in range(2)}
    rewards = {f"reward_{k + 1}": TableReward(r[k]) for k in range(2)}
    rows += result_rows(world, results, rewards, exact)
    for weights, out in results["msdda_smc"].items():
        w = out["log_w"].softmax(1)
        log_target = TableReward(tilt(weights))(out["x"]).view_as(w)
        rows.append(row(f"msdda_smc.mpsa.log_target_{weights_tag(weights)}", *mean_and_se((w * log_target).sum(1)),
                        exact["log_target", weights]))
    return rows, results, [tilt((k / 20, 1 - k / 20)).exp() @ r.T for k in range(21)]


def law_rows(method, weights, law, log_target, r, exact):
    """Rows of an enumerated law (4^9,): its mean rewards, and its KL from the target, nats."""
    name, tag = f"{method}.mpsa", weights_tag(weights)
    rows = [row(f"{name}.{key}_{tag}", (law @ r[k]).item(), exact=exact[key, weights])
            for k, key in enumerate(("reward_1", "reward_2"))]
    kl = (law * (law.clamp(min=1e-300).log() - log_target)).sum().item()
    return [*rows, row(f"{name}.kl_{tag}", kl, exact=0.0)]


def element_rows(world, args, folder, rng):
    """Real elements: tune, sample, measure -> rows, results, for the figure the rewards of reweighted elements.

    `reweighted` are the training elements themselves with weights exp(sum_i w_i r_i / kl_weight_i): what a model that
    learned their law without error would give.
    """
    second = gc_content if args.second == "gc" else lambda x: -world.oracle_a.score(x, "k562").double()
    rewards = dict(reward_1=lambda x: world.reward(x).double(), reward_2=second)
    rewards = {key: lambda x, f=f: in_parts(f, x) for key, f in rewards.items()}
    train = world.elements.codes[chromosome_split(world.elements.chrom)["training"]]
    r = torch.stack([f(train) for f in rewards.values()])
    values, rows, nets = r / torch.tensor(args.kl_weight).to(r)[:, None], [], []
    for k, value in enumerate(values):
        share = value.softmax(0)
        rows.append(row(f"tuned_{k + 1}.{world.name}.effective_share", 1 / (len(share) * (share**2).sum().item())))
        nets.append(fit_weighted(world, share, f"tuned_{k + 1}", args, folder))
    results = run_methods([*nets, world.network], world, args, rng, soup=True)
    rows += result_rows(world, results, rewards, {})
    front = [(torch.tensor([k / 10, 1 - k / 10]).to(r) @ values).softmax(0) @ r.T for k in range(11)]
    for weights in [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0), *args.weights]:
        share = (torch.tensor(weights).to(r) @ values).softmax(0)
        rows += [row(f"reweighted.{world.name}.{key}_{weights_tag(weights)}", (share @ v).item())
                 for key, v in zip(rewards, r)]
    held = world.elements.codes[(world.elements.chrom <= 2) & world.elements.active]
    some = torch.randperm(len(held), generator=rng, device=held.device)[: args.samples]
    sets = {"real_hepg2": held[some]} | {f"{method}_{weights_tag(weights)}": out.get("drawn", out["x"])
                                         for method, outs in results.items() for weights, out in outs.items()}
    for label, x in sets.items():
        measures = dict(element_measures(world, x, args.levels, rng), gc=mean_and_se(gc_content(x)))
        excess = in_parts(lambda part: world.reward(part) - world.held_out(part), x)
        measures["over_optimisation"] = mean_and_se(excess.double())
        rows += [row(f"{label}.{world.name}.{key}", *value) for key, value in measures.items()]
    return rows, results, front


def in_parts(f, x):
    """f of tokens x (N, L) in parts and without gradient -> (N,)."""
    with torch.no_grad():
        return torch.cat([f(part.long()) for part in x.split(256)])


# ---- the figures -----------------------------------------------------------------------------------------------------

STYLES = {  # method -> label, colour (Okabe and Ito), marker
    "base": ("base model", "#999999", "X"),
    "single": ("single-reward models", "#000000", "x"),
    "soup": ("Rewarded Soup", "#D55E00", "s"),
    "switch": ("switch", "#56B4E9", "D"),
    "mixture": ("average of probabilities", "#E69F00", "v"),
    "msdda": ("MSDDA", "#0072B2", "o"),
    "msdda_smc": ("MSDDA + C", "#009E73", "*"),
}


def draw_front(ax, world, rows, results, front, second):
    """Mean rewards of every method, weights by weights, over those of the exact laws or of reweighted elements."""
    value = {r["name"]: r["estimate"] for r in rows}
    label = "exact laws" if world.law else "reweighted elements"
    ax.plot(*torch.stack(front).T.cpu(), color="black", linewidth=1, label=label)
    exact = "exact" if world.law else "reweighted"
    for method, (label, color, marker) in STYLES.items():
        tags = [weights_tag(w) for w in results.get(method, {})]
        points = [[value[f"{method}.{world.name}.reward_{k}_{tag}"] for tag in tags] for k in (1, 2)]
        if tags:
            ax.plot(*points, marker, color=color, markersize=6, label=label)
        for tag, x, y in zip(tags, *points):
            if f"{exact}.{world.name}.reward_1_{tag}" in value:
                ends = [value[f"{exact}.{world.name}.reward_{k}_{tag}"] for k in (1, 2)]
                ax.plot((ends[0], x), (ends[1], y), color=color, linewidth=0.6)
                ax.plot(*ends, "o", color="black", markersize=9, fillstyle="none", zorder=0)
    ax.set(xlabel="inclusion, log10 percent" if world.law else "HepG2 log odds, oracle A",
           ylabel="GC content" if second == "gc" else "minus K562 log odds", title="mean rewards; circles: asked for")
    ax.legend(fontsize=7)


def draw_laws(path, world, rows, results, front, args):
    """The front; the KL of the laws of many steps from the target; what the weights say of Z."""
    table, tags = {r["name"]: r for r in rows}, [weights_tag(w) for w in args.weights]
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.4))
    draw_front(axes[0], world, rows, results, front, args.second)
    kinds = dict(msdda_limit=("MSDDA", "#0072B2"), mixture_limit=("average of probabilities", "#E69F00"),
                 step_level=("step-level optimum", "#CC79A7"))
    for shift, (method, (label, color)) in enumerate(kinds.items()):
        points = [(k, table[f"{method}.mpsa.kl_{tag}"]["estimate"]) for k, tag in enumerate(tags)
                  if f"{method}.mpsa.kl_{tag}" in table]
        axes[1].bar([k + 0.25 * shift - 0.25 for k, _ in points], [v for _, v in points], 0.25, color=color,
                    label=label)
    axes[1].set(ylabel="KL of the law from the target, nats", title="many steps, enumerated")
    exact = [table[f"exact.mpsa.log_z_{tag}"]["estimate"] for tag in tags]
    found = [table[f"msdda_smc.mpsa.log_z_{tag}"] for tag in tags]
    axes[2].plot(exact, "o", color="black", markersize=9, fillstyle="none", label="exact")
    axes[2].errorbar(range(len(tags)), [r["estimate"] for r in found], [2 * r["se"] for r in found], fmt="*",
                     color=STYLES["msdda_smc"][1], capsize=3, label="MSDDA + C, 2 standard errors")
    axes[2].set(title="log of the mass of the product")
    for ax in axes[1:]:
        ax.set_xticks(range(len(tags)), [f"{w[0]:g}, {w[1]:g}" for w in args.weights])
        ax.set_xlabel("weights of the rewards")
        ax.legend(fontsize=7)
    figure.tight_layout()
    save_figure(figure, path)


def draw_networks(path, world, rows, results, front, args):
    """The front by oracle A; medians of oracle B and likelihoods of the same sequences."""
    value, name = {r["name"]: r["estimate"] for r in rows}, world.name
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.4))
    draw_front(axes[0], world, rows, results, front, args.second)
    for method, (label, color, marker) in STYLES.items():
        tags = [weights_tag(w) for w in results.get(method, {})]
        for ax, key in zip(axes[1:], ("held_out", "log_likelihood")):
            points = [[value[f"{method}_{tag}.{name}.{k}"] for tag in tags] for k in ("gc", key)]
            ax.plot(*points, marker, color=color, markersize=6, label=label)
    for ax, key, text in zip(axes[1:], ("held_out", "log_likelihood"),
                             ("median by oracle B, which no model saw", "bound on log p under the base model, nats")):
        ax.plot(value[f"real_hepg2.{name}.gc"], value[f"real_hepg2.{name}.{key}"], "P", color="black",
                label="real HepG2 elements")
        ax.set(xlabel="GC content", ylabel=text)
    axes[1].legend(fontsize=7)
    figure.tight_layout()
    save_figure(figure, path)


# ---- shared: command line and files ----------------------------------------------------------------------------------


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
    """Merge, compare, draw and write -> {row name: estimate}."""
    start, out = time.perf_counter(), results_folder(args, "dna_msdda")
    world = open_world(args)
    rng = torch.Generator(args.device).manual_seed(args.seed)
    rows, results, front = splice_rows(world, args, rng) if world.law else element_rows(world, args, out, rng)
    (draw_laws if world.law else draw_networks)(out / "figure.png", world, rows, results, front, args)
    calls = sum(run["calls"] for outs in results.values() for run in outs.values())
    write_numbers(out / "numbers.json", args, rows, calls, time.perf_counter() - start)
    for key in ("reward_1", "reward_2", "kl", "log_z", "log_target", "error"):
        print_table(rows, world.name, [f"{key}_{weights_tag(w)}" for w in args.weights])
    print_table(rows, world.name, [f"{key}_{tag}" for tag in ("w100_0", "w0_100", "w0_0")
                                   for key in ("reward_1", "reward_2")])
    print_table(rows, world.name, ["effective_share", "network_calls"])
    print_table(rows, world.name, ["activity", "held_out", "over_optimisation", "gc", "accessible", "kmer3_correlation",
                                   "diversity", "log_likelihood"])
    return {r["name"]: r["estimate"] for r in rows}


if __name__ == "__main__":
    main(parse_args())
