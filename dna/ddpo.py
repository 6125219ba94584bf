"""Fine-tune a masked diffusion model by policy gradients: DDPO with PPO clipping, on DNA.

Paper: Black et al., "Training Diffusion Models with Reinforcement Learning" (DDPO), ICLR 2024, arXiv 2305.13301,
carried over to unmasking; the baseline of Lee et al. (DAV), arXiv 2510.00502, Fig. 5. Draws the training, without and
with a KL to the base model: comparing with DDPO without one alone would not be fair.

Run    python dna/ddpo.py                           HepG2 elements, without and with KL    2.5 minutes on one CPU core
       python dna/ddpo.py --world mpsa              9-mers: the exact maximum beside       1 minute
       python dna/ddpo.py --quick                   coarse, HepG2 elements                 15 seconds
       python dna/ddpo.py --data dataset.csv        the papers' data, after pretrain.py --data
       python dna/ddpo.py --resume                  continue an interrupted run

Notation (here -> paper)
       kl_weight -> none     the objective is E[r] - kl_weight KL(p_theta || p_0), the KL being that of the paths; its
                             maximum, over all processes, is kl_weight log E_p_0[exp(r / kl_weight)]
       clip      -> epsilon  PPO's clip range of a step's likelihood ratio
       worth     -> A-hat    return of a trajectory, r - kl_weight KL, centred and scaled by its standard deviation

Algorithm (`policy_update`)
       1. sample trajectories, with the log probability of each letter when it was set          `sample_trajectories`
       2. advantage: the return less its mean, over its standard deviation
       3. `updates` times: draw states, ratio = exp(sum of log probabilities of the letters set there, new minus old),
          ascend min(ratio A, clip(ratio) A) less the KL of the letters at the state            `policy_loss`
       The log probabilities are summed, not averaged, and belong to the letters set in the step alone: whether a place
       is set does not depend on the parameters.

What you should see (3 seeds, mean and standard deviation). hepg2: without KL the reward by oracle A rises from -2.3 to
2.8±1.6 (one seed ends at 1.0, two near 3.6), oracle B, which only measures, to a median of 2.1±1.3 (real elements 1.0),
and in two of three seeds all motifs are lost and the 3-mer correlation is -0.33 (base 0.96). With KL, and the same in
every seed: A 1.2±0.1, B 0.9±0.1, 96 edits a pair (base 110, without KL 79), 3-mer correlation 0.47, A less B 0.3
instead of 0.7, FOXA2 in 34% and HNF1A in 61%, HNF4A in 7%, below the base. mpsa: E[r] / kl_weight - KL rises from -0.39
to 0.46±0.04 with KL. log Z is 1.12, 0.98 for the base network, and the exact denoiser of the target reaches 0.87 in
these 16 steps: two thirds of that rise. Without KL 4000 samples hold less than ten sequences, and the KL is 10.
To try: --world mpsa --clip 10 (no clipping: the same), --world mpsa --iterations 300 (objective 0.56: the noise of the
gradient is what limits it), --lr 2e-3 (without KL: A 4.5, B 3.8, 65 edits, no motifs).
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
import pickle
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
METHOD = "ddpo"
PRESETS = {  # what the size flags default to
    "quick": dict(iterations=3, trajectories=16, updates=2, batch=8, steps=8, samples=24, levels=2),
    "hepg2": dict(iterations=24, trajectories=48, updates=4, batch=48, steps=16, samples=256, levels=4),
    "mpsa": dict(iterations=60, trajectories=300, updates=8, batch=300, steps=16, samples=4000, levels=1),
    "paper": dict(iterations=200, trajectories=256, updates=16, batch=256, steps=128, samples=640, levels=128),
}
SETTINGS = dict(hepg2=dict(kl_weight=0.05, lr=5e-4), mpsa=dict(kl_weight=0.5, lr=4e-3))


def parse_args(argv=None):
    parser = dna_parser(__doc__)
    parser.add_argument("--kl-weight", type=positive(float), help="weight of the KL, in units of the reward")
    parser.add_argument("--iterations", type=positive(int), help="rounds of sampling and updating")
    parser.add_argument("--trajectories", type=positive(int), help="sequences sampled in an iteration")
    parser.add_argument("--updates", type=positive(int), help="gradient steps of an iteration")
    parser.add_argument("--batch", type=positive(int), help="states in a gradient step")
    parser.add_argument("--clip", type=positive(float), default=0.2, help="clip range of the likelihood ratio")
    parser.add_argument("--lr", type=positive(float), help="learning rate")
    parser.add_argument("--steps", type=positive(int), help="steps of the reverse process")
    parser.add_argument("--samples", type=positive(int), help="sequences drawn to measure each model")
    parser.add_argument("--levels", type=positive(int), help="noise levels behind the bound of each sequence")
    parser.add_argument("--bf16", action="store_true", help="run the denoiser in bfloat16")
    parser.add_argument("--resume", action="store_true", help="go on with what is in the results folder")
    args = parser.parse_args(argv)
    world = "mpsa" if args.world == "mpsa" else "hepg2"
    for name, value in (PRESETS["quick" if args.quick else "paper" if args.paper else world] | SETTINGS[world]).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if min(args.trajectories, args.samples) < 2:
        parser.error("--trajectories and --samples must be at least 2")
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


# ---- shared: masked diffusion ----------------------------------------------------------------------------------------


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


def kl_of_letters(log_p, base_log_p):
    """KL(p || base) of the letters at every place, log_p and base_log_p (n, L, 4) -> (n, L), nats."""
    return (log_p.exp() * (log_p - base_log_p)).sum(2)


def sample_trajectories(net, base, n, length, steps, rng):
    """n sequences by the reverse process of `net`, with all that their trajectories tell.

    -> x (n, L); when (n, L), the step that set each letter; log_p (n, L), its log probability then; kl (n,), the KL of
    the kernels from those of `base` at the states that were met, summed over steps, nats: its mean is the KL of the two
    processes, which is at least that of the laws of x, and the mean of log_ratio (n,), log p of the path less that by
    `base`. A masked place is set with probability 1 / step in both. And rows, the calls of `net`.
    """
    x, kl, rows = torch.full((n, length), MASK, device=rng.device), torch.zeros(n, device=rng.device), 1
    when, chosen, log_ratio = torch.zeros_like(x), torch.zeros(n, length, device=rng.device), torch.zeros_like(kl)
    log_p, base_log_p = (predict(f, x[:1]).expand(n, -1, -1) for f in (net, base))
    for step in range(steps, 0, -1):
        kl = kl + (kl_of_letters(log_p, base_log_p) * (x == MASK)).sum(1) / step
        x, new = unmask(log_p, x, step, rng)
        letter, by_base = (f.gather(2, x.clamp(max=3)[:, :, None])[:, :, 0] for f in (log_p, base_log_p))
        when, chosen = torch.where(new, step, when), torch.where(new, letter, chosen)
        log_ratio = log_ratio + ((letter - by_base) * new).sum(1)
        log_p, due = refresh(net, log_p, x, new)
        base_log_p = log_p if base is net else refresh(base, base_log_p, x, new)[0]
        rows += due
    return dict(x=x, when=when, log_p=chosen, kl=kl, log_ratio=log_ratio, rows=rows)


class InPrecision:
    """A function of sequences, in bfloat16 if that is wanted; results are at least float32."""

    def __init__(self, function, bf16):
        self.function, self.bf16 = function, bf16

    def __call__(self, x):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            out = self.function(x)
        return out.float() if out.dtype == torch.bfloat16 else out


# ---- the method ------------------------------------------------------------------------------------------------------


def policy_loss(net, base, paths, worth, place, clip, kl_weight):
    """PPO's loss, plus kl_weight times the KL, summed over the steps of trajectories: an unbiased estimate of it (n,).

    paths: x, when, log_p (n, L) as `sample_trajectories` gives them; worth (n,) their advantages. The step is that in
    which the letter at `place` (n, 1), a uniform one, was set: taken with probability (letters set in it) / L, its
    clipped objective counts L / (letters set in it). The KL at its state counts L times its mean over the masked
    places, which has the expectation of the sum over steps. At the parameters that sampled the paths, the gradient is
    that of -worth log p(path) + kl_weight KL.
    """
    x, step = paths["x"], paths["when"].gather(1, place)
    z, new = torch.where(paths["when"] > step, x, MASK), paths["when"] == step
    log_p, count = net(z), (paths["when"] == step).sum(1)
    # exercise 14: ratio and gain (n,) of the letters set in the step; compare toy/ddpo.py
    change = (log_p.gather(2, x[:, :, None])[:, :, 0] - paths["log_p"]) * new
    ratio = change.sum(1).exp()
    gain = torch.minimum(ratio * worth, ratio.clamp(1 - clip, 1 + clip) * worth)
    # end exercise
    loss = -gain * x.shape[1] / count
    if kl_weight:
        masked = z == MASK
        gap = kl_of_letters(log_p, predict(base, z))
        loss = loss + kl_weight * x.shape[1] * (gap * masked).sum(1) / masked.sum(1)
    return loss


def policy_update(net, world, args, kl_weight, optimizer, rng):
    """Sample trajectories and make `updates` gradient steps up E[r] - kl_weight KL -> the numbers of the sample."""
    run, base = (InPrecision(f, args.bf16) for f in (net, world.network))
    paths = sample_trajectories(run, base if kl_weight else run, args.trajectories, world.length, args.steps, rng)
    with torch.no_grad():
        reward = torch.cat([world.reward(part) for part in paths["x"].split(256)])
    if not reward.isfinite().all():
        fail("The reward must be one finite number per sequence.")
    worth = reward.to(paths["kl"]) - kl_weight * paths["kl"]
    spread = worth.std().clamp(min=1e-6)
    tensors = dict(x=paths["x"], when=paths["when"], log_p=paths["log_p"], worth=(worth - worth.mean()) / spread)
    for _ in range(args.updates):
        rows = torch.randint(args.trajectories, (args.batch,), generator=rng, device=rng.device)
        place = torch.randint(world.length, (args.batch, 1), generator=rng, device=rng.device)
        some = {name: value[rows] for name, value in tensors.items()}
        optimizer.zero_grad()
        loss = policy_loss(run, base, some, some["worth"], place, args.clip, kl_weight / spread)
        (loss.mean() / world.length).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    return dict(reward=reward.mean().item(), kl=paths["kl"].mean().item(), oracle_calls=len(reward),
                denoiser_calls=paths["rows"] + args.updates * args.batch)


def improve_model(update, world, args, kl_weight, folder):
    """`iterations` of `update` from the base model -> tuned network, [numbers of each].

    The learning rate falls linearly to zero: at a constant one the objective stays where the noise of the gradient
    keeps it. Every ten iterations all that is needed to go on is written to a file of `folder`, for --resume.
    """
    label = METHOD + ("_kl" if kl_weight else "")
    net, part = copy.deepcopy(world.network).requires_grad_(True), folder / f"{label}.part.pt"
    optimizer = torch.optim.Adam(net.parameters(), args.lr, betas=(0.9, 0.99))
    rng = torch.Generator(args.device).manual_seed(2 * args.seed + (kl_weight > 0))
    settings = {name: str(v) for name, v in vars(args).items() if name not in ("resume", "out", "checkpoints")}
    settings, history = json.dumps(settings, sort_keys=True), []
    if args.resume and part.exists():
        try:
            state = torch.load(part, map_location=args.device, weights_only=True)
            found, history = state["settings"], state["history"]
            if found == settings:
                net.load_state_dict(state["net"])
                optimizer.load_state_dict(state["optimizer"])
                rng.set_state(state["rng"].cpu())
        except (KeyError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            fail(f"{part} is no state of this script ({type(error).__name__}): delete it to start again.")
        if found != settings:
            fail(f"{part} was made with other settings: {found}.")
    for k in range(len(history), args.iterations):
        optimizer.param_groups[0]["lr"] = args.lr * (1 - k / args.iterations)
        numbers = update(net, world, args, kl_weight, optimizer, rng)
        if not all(math.isfinite(v) for v in numbers.values()):
            fail(f"{label} diverged in iteration {k + 1}: take a lower --lr.")
        history.append(numbers)
        if (k + 1) % 10 == 0 or k + 1 == args.iterations:
            state = dict(settings=settings, net=net.state_dict(), optimizer=optimizer.state_dict(), rng=rng.get_state(),
                         history=history)
            write_atomically(part, lambda temporary: torch.save(state, temporary))
        progress(f"{label}, reward {numbers['reward']:.3f}, KL {numbers['kl']:.2f}", k + 1, args.iterations)
    net.requires_grad_(False)
    save_network(folder / f"{label}.safetensors", net, settings)
    return net, history


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


def objective_rows(label, name, reward, kl, kl_weight, exact):
    """Rows of E[r], of the KL and of E[r] / kl_weight - KL <= log Z, for rewards and KLs (n,) of sampled paths."""
    values = dict(mean_reward=reward, kl=kl, objective=reward / kl_weight - kl)
    return [row(f"{label}.{name}.{key}", *mean_and_se(v.double()), exact.get(key)) for key, v in values.items()]


def tuned_models(update, world, args, folder):
    """The base model and those tuned without and with KL -> {label: network}, rows of the training, calls."""
    models, rows, calls = {"base": world.network}, [], dict(denoiser=0, oracle=0)
    for label, kl_weight in ((METHOD, 0.0), (f"{METHOD}_kl", args.kl_weight)):
        models[label], history = improve_model(update, world, args, kl_weight, folder)
        for k, numbers in enumerate(history):
            calls = {key: calls[key] + numbers[f"{key}_calls"] for key in calls}
            if k % max(1, len(history) // 20) == 0 or k + 1 == len(history):
                rows += [row(f"{label}_iteration_{k}.{world.name}.training_{key}", numbers[key])
                         for key in ("reward", "kl")[: 1 + (kl_weight > 0)]]  # without a KL it is not computed
    return models, rows, calls


def baseline_elements(update, world, args, folder, rng):
    """Tune, sample and measure on real elements -> rows, calls of denoiser and oracle."""
    models, rows, calls = tuned_models(update, world, args, folder)
    held = world.elements.codes[(world.elements.chrom <= 2) & world.elements.active]
    some = torch.randperm(len(held), generator=rng, device=held.device)[: args.samples]
    sets = dict(real_hepg2=held[some].long(), random=torch.randint(4, (args.samples, world.length), generator=rng,
                                                                   device=rng.device))
    base = InPrecision(world.network, args.bf16)
    for label, net in models.items():
        run = base if label == "base" else InPrecision(net, args.bf16)
        paths = sample_trajectories(run, base, args.samples, world.length, args.steps, rng)
        sets[label], calls["denoiser"] = paths["x"], calls["denoiser"] + paths["rows"]
        with torch.no_grad():
            reward = torch.cat([world.reward(part) for part in paths["x"].split(256)])
        rows += objective_rows(label, world.name, reward, paths["kl"], args.kl_weight, {})
    for label, x in sets.items():
        measures = element_measures(world, x, args.levels, rng)
        rows += [row(f"{label}.{world.name}.{key}", *value) for key, value in measures.items()]
        with torch.no_grad():
            excess = torch.cat([world.reward(part) - world.held_out(part) for part in x.split(256)])
        rows.append(row(f"{label}.{world.name}.over_optimisation", *mean_and_se(excess)))
    with torch.no_grad():
        real = torch.cat([world.held_out(part.long()) for part in held.split(256)])
    rows.append(row(f"real_hepg2.{world.name}.held_out_p90", real.quantile(0.9).item()))
    return rows, calls


def baseline_splice(update, world, args, folder, rng):
    """The enumerated world: what is reached of the objective, beside its maximum log Z -> rows, calls.

    `target` is p exp(r / kl_weight) / Z, where the objective of the exact law is log Z. `exact_denoiser` unmasks with
    the exact denoiser of that law, in the same steps: letters set together are independent, which no tuning can avoid.
    Its paths, weighted, give own_log_z, log Z of the process of the base network: a bound for all who start from there.
    """
    models, rows, calls = tuned_models(update, world, args, folder)
    log_p, (reward, held_out) = world.law.p.log(), world.law.rewards
    log_z = (log_p + reward / args.kl_weight).logsumexp(0).item()
    target = (log_p + reward / args.kl_weight - log_z).exp()
    exact = dict(mean_reward=target @ reward, held_out=target @ held_out, log_likelihood=target @ log_p,
                 kl=target @ reward / args.kl_weight - log_z, objective=torch.tensor(log_z))
    rows += [row(f"target.mpsa.{key}", v.item()) for key, v in exact.items()]
    for label, net in (models | dict(exact_denoiser=ExactDenoiser(target))).items():
        paths = sample_trajectories(net, world.network, args.samples, 9, args.steps, rng)
        calls["denoiser"] += paths["rows"]
        x, wanted = paths["x"], {key: v.item() for key, v in exact.items()} if "_" in label else {}
        rows += objective_rows(label, "mpsa", world.reward(x), paths["kl"], args.kl_weight, wanted)
        for key, f in dict(held_out=held_out, log_likelihood=log_p).items():
            rows.append(row(f"{label}.mpsa.{key}", *mean_and_se(TableReward(f)(x)), wanted.get(key)))
        rows.append(row(f"{label}.mpsa.distinct", len(x.unique(dim=0)) / len(x)))
    log_w = world.reward(x) / args.kl_weight - paths["log_ratio"]
    rows.append(row("exact_denoiser.mpsa.own_log_z", *log_mean_and_se(log_w), log_z))
    return rows, calls


# ---- the figures -----------------------------------------------------------------------------------------------------


def draw_training(path, world, rows, log_z):
    """Reward and KL by iteration; then the objective against its maximum, or activity against diversity, and motifs."""
    value, name = {r["name"]: r["estimate"] for r in rows}, world.name
    figure, axes = plt.subplots(1, 3 if log_z is not None else 4, figsize=(16 if log_z is None else 12, 3.8))
    labels = {"base": "#555555", METHOD: "#0072B2", f"{METHOD}_kl": "#D55E00"}
    for label, color in list(labels.items())[1:]:
        for ax, key in list(zip(axes, ("reward", "kl")))[: 1 + label.endswith("_kl")]:
            points = [(int(k.split(".")[0].rsplit("_", 1)[1]), v) for k, v in value.items()
                      if k.startswith(f"{label}_iteration_") and k.endswith(f".training_{key}")]
            ax.plot(*zip(*points), "o-", color=color, markersize=3, label=label.replace("_", " with "))
            ax.set(xlabel="iteration", ylabel="reward of the sample" if key == "reward" else "KL of the paths, nats")
            ax.legend(fontsize=8)
    if log_z is not None:
        bars = {label: value[f"{label}.{name}.objective"] for label in (*labels, "exact_denoiser")}
        axes[2].bar(range(4), bars.values(), color=[*labels.values(), "#009E73"])
        axes[2].axhline(log_z, color="black", linestyle=":", label=f"log Z = {log_z:.2f}")
        names = ["base", METHOD, f"{METHOD} with kl", "exact denoiser"]
        axes[2].set_xticks(range(4), [f"{k}\n{v:.2f}" for k, v in zip(names, bars.values())], fontsize=7)
        axes[2].set(ylabel="E[r] / kl_weight - KL, nats")
        axes[2].legend(fontsize=8, loc="lower right")
        axes[2].margins(y=0.15)
    else:
        for label in ("real_hepg2", "random", *labels):
            x, y = (value[f"{label}.{name}.{key}"] for key in ("diversity", "held_out"))
            axes[2].scatter(x, y, color=labels.get(label, "black"), s=20)
            axes[2].annotate(label.replace("_", " "), (x, y), (-8, -12 if label == "random" else 6),
                             textcoords="offset points", ha="center", fontsize=7)
        axes[2].axhline(value[f"real_hepg2.{name}.held_out_p90"], color="black", linestyle=":", linewidth=1)
        axes[2].set(xlabel="mean edit distance", ylabel="oracle B, median; dotted: top 10% of real")
        axes[2].margins(0.25)
        for k, label in enumerate(("real_hepg2", *labels)):
            rates = [value[f"{label}.{name}.motif_{motif.lower()}"] for motif in MOTIFS]
            axes[3].bar(np.arange(len(rates)) + (k - 1.5) * 0.2, rates, 0.2, color=labels.get(label, "black"),
                        label=label.replace("_", " "))
        axes[3].set_xticks(range(len(MOTIFS)), MOTIFS, fontsize=7)
        axes[3].set(ylabel="share with the motif (last two: controls)")
        axes[3].legend(fontsize=7)
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
    """Tune without and with KL, measure, draw and write -> {row name: estimate}."""
    start, out = time.perf_counter(), results_folder(args, f"dna_{METHOD}")
    world = open_world(args)
    rng = torch.Generator(args.device).manual_seed(args.seed)
    rows, calls = (baseline_splice if world.law else baseline_elements)(policy_update, world, args, out, rng)
    log_z = next((r["estimate"] for r in rows if r["name"] == "target.mpsa.objective"), None)
    draw_training(out / "figure.png", world, rows, log_z)
    seconds = time.perf_counter() - start
    write_numbers(out / "numbers.json", args, rows, calls["denoiser"], seconds)
    print_table(rows, world.name, ["mean_reward", "kl", "objective", "own_log_z"])
    print_table(rows, world.name, ["activity", "held_out", "held_out_p90", "over_optimisation", "accessible",
                                   "kmer3_correlation", "diversity", "distinct", "log_likelihood"])
    print_table(rows, world.name, [f"motif_{motif.lower()}" for motif in MOTIFS])
    print(f"{calls['denoiser']:,} calls of the denoiser, {calls['oracle']:,} of the oracle, {seconds:.0f} s")
    return {r["name"]: r["estimate"] for r in rows}


if __name__ == "__main__":
    main(parse_args())
