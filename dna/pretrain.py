"""Train what the scripts of this folder steer and measure with: a masked diffusion model of DNA and its judges.

Paper: Sahoo et al., "Simple and Effective Masked Diffusion Language Models" (MDLM), NeurIPS 2024, arXiv 2406.07524, for
the model; Wang et al., "Fine-Tuning Discrete Diffusion Models via Reward Optimization" (DRAKES), ICLR 2025, arXiv
2410.13643, for the experiment that Lee et al. (DAV), arXiv 2510.00502, Fig. 5 repeats. Writes the networks, figure.png
and numbers.json; the networks in dna/checkpoints were made by the first and the third command (DATA.md).

Run    python dna/pretrain.py                       200 bp elements of four cell types       45 minutes on one CPU core
       python dna/pretrain.py --quick               the same, untrained in all but name      10 seconds
       python dna/pretrain.py --world mpsa          9-mers, everything enumerable            3 minutes
       python dna/pretrain.py --data dataset.csv    the papers' data, if you have it (columns seq, hepg2, k562, sknsh,
                                                    chrom); --paper --device cuda for the papers' sizes
       python dna/pretrain.py --resume              continue an interrupted run
       python dna/pretrain.py --resume --checkpoints dna/checkpoints   measure what is there  5 minutes

Worlds mpsa   human 5' splice sites, 4^9 = 262,144 sequences, with the measured inclusion as reward: exact law, exact
              denoiser, exact tilts. `splice_law` says what the law is and what unmeasured sequences get.
       hepg2  47,872 human regulatory elements. The reward is cell-type-specific *accessibility*, a stand-in for the
              papers' measured HepG2 activity.

Notation (here -> paper)
       x         -> x, z_t   tokens, 0 to 3 for A C G T, and MASK = 4
       log_p     -> log x_theta(z_t)   log-probabilities of the four letters at every position; they mean something
                                       at masked positions only, all others keep their letter (SUBS)
       step, steps -> t = step / steps   the log-linear schedule: at time t a token is masked with probability t
       bound     -> L_NELBO  an upper bound on -log p(x), in nats

Algorithm
       1. hide a random number of tokens, uniform on 1..L, at random places                         `hide`
       2. cross entropy at the hidden ones, times L / number hidden, averages to the bound          `hidden_loss`
       3. descend, keep a moving average of the weights                                             `fit_network`
       4. sample: from step to step - 1 each masked token is set with probability 1 / step          `unmask`
       5. judges: two oracles on disjoint chromosomes and a classifier, all convolutional           `Oracle`
       Step 2 is MDLM's continuous-time bound, the integral over t of 1/t times the cross entropy of the tokens hidden
       at t, with t integrated out: the integral of Binomial(k; L, t) / t over t is 1 / k.

What you should see: the base model's bound on chromosome 2, which it never saw, is 1.321 nats a letter, where Markov
chains of order 0, 3 and 5 have 1.384, 1.334 and 1.329 (each above it by more than 15 standard errors); words of three
letters in its samples correlate with those of the training set by 0.993. On chromosomes 1 and 2 oracle A tells HepG2
elements from others with an AUC of 0.937, oracle B with 0.936; the two correlate by 0.90, and neither saw a chromosome
of the other. The classifier has 0.924, Markov sequences among the others, and calls 61% of HepG2 elements open there.
All labels are accessibility. mpsa: the exact denoiser's bound is the entropy, 10.046 nats; the network's is 10.079.
To try: --width 32 --steps 500; --resume after an interruption gives the same weights as a run without one.
"""
import argparse
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
from torch.nn.functional import binary_cross_entropy_with_logits, conv1d, cross_entropy, mse_loss, one_hot, silu

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
    "quick": dict(width=16, layers=3, steps=30, batch=16, judge_steps=30, samples=64, sample_steps=32, levels=4,
                  bf16=False),
    "hepg2": dict(width=64, layers=8, steps=16000, batch=64, judge_steps=1200, samples=640, sample_steps=128, levels=8,
                  bf16=True),
    "mpsa": dict(width=64, layers=3, steps=5000, batch=256, judge_steps=0, samples=640, sample_steps=128, levels=9,
                 bf16=False),
    "paper": dict(width=128, layers=20, steps=131500, batch=512, judge_steps=6000, samples=640, sample_steps=128,
                  levels=128, bf16=True),
}
DILATIONS = {3: [1, 1, 4], 8: [1, 1, 2, 4, 8, 16, 32, 64], 20: [1] * 8 + [4] * 4 + [16] * 4 + [64] * 4}


def parse_args(argv=None):
    parser = common_parser(__doc__)
    parser.add_argument("--world", choices=["hepg2", "mpsa"], default="hepg2")
    parser.add_argument("--data", type=pathlib.Path, help="table with columns seq, hepg2, k562, sknsh, chrom")
    parser.add_argument("--checkpoints", type=pathlib.Path, help="folder of the networks; default: that of the results")
    parser.add_argument("--resume", action="store_true", help="go on with what is in the folder of the networks")
    parser.add_argument("--width", type=positive(int), help="channels of the denoiser")
    parser.add_argument("--layers", type=int, choices=sorted(DILATIONS), help="residual layers of the denoiser")
    parser.add_argument("--steps", type=positive(int), help="training steps of the denoiser")
    parser.add_argument("--batch", type=positive(int), help="sequences in a training step of the denoiser")
    parser.add_argument("--lr", type=positive(float), default=3e-3, help="highest learning rate of all networks")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction,
                        help="train in bfloat16: twice as fast where a CPU has it, slower where it has not")
    parser.add_argument("--judge-steps", type=positive(int), help="training steps of oracles and classifier, batch 128")
    parser.add_argument("--samples", type=positive(int), help="sequences drawn to measure the denoiser")
    parser.add_argument("--sample-steps", type=positive(int), help="steps of the reverse process")
    parser.add_argument("--levels", type=positive(int), help="noise levels behind the bound of each sequence")
    args = parser.parse_args(argv)
    preset = PRESETS["quick" if args.quick else "paper" if args.paper else args.world]
    for name, value in preset.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.data and args.world != "hepg2":
        parser.error("--data is a world of its own: leave --world out")
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


def sample_masked(denoiser, n, length, steps, rng):
    """n sequences by the reverse process in `steps` steps -> tokens (n, length), calls of the denoiser (rows)."""
    x = torch.full((n, length), MASK, device=rng.device)
    log_p, calls = predict(denoiser, x[:1]).expand(n, -1, -1), 1
    for step in range(steps, 0, -1):
        x, new = unmask(log_p, x, step, rng)
        log_p, rows = refresh(denoiser, log_p, x, new)
        calls += rows
        progress("sampling", steps - step + 1, steps)
    return x, calls


def invert_cdf(w, u):
    """Smallest n with w_1 + ... + w_n > u sum(w), for w (G, P) and u (G, M) in [0, 1) -> (G, M)."""
    cdf = w.cumsum(1)
    return torch.searchsorted(cdf, u * cdf[:, -1:], right=True).clamp(max=w.shape[1] - 1)


# ---- shared: measures ------------------------------------------------------------------------------------------------


def mean_and_se(values):
    """Independent values (G,) -> their mean and its standard error (None for a single one)."""
    return values.mean().item(), values.std().item() / len(values) ** 0.5 if len(values) > 1 else None


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


def auc(score, positive):
    """Probability that a positive scores above a negative, score (N,), positive (N,) bool."""
    ranked = score[~positive].sort().values
    wins = torch.searchsorted(ranked, score[positive]) + torch.searchsorted(ranked, score[positive], right=True)
    return (wins.double().mean() / (2 * len(ranked))).item()


# ---- baselines -------------------------------------------------------------------------------------------------------


class MarkovChain:
    """Chain of some order, with counts of x (N, L) plus one; the first letters have the chains of lower orders."""

    def __init__(self, x, order):
        counts = [kmer_counts(x, k + 1).view(-1, 4) + 1 for k in range(order + 1)]
        self.order, self.log_p = order, [(c / c.sum(1, keepdim=True)).log() for c in counts]  # (4^k, 4) each

    def bound(self, x):
        """-log p(x) of x (N, L), nats -> (N,)."""
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for place in range(x.shape[1]):
            k = min(place, self.order)
            past = (x[:, place - k : place].long() * 4 ** torch.arange(k - 1, -1, -1, device=x.device)).sum(1)
            total -= self.log_p[k][past, x[:, place].long()]
        return total

    def sample(self, n, length, rng):
        """n sequences -> (n, length) long."""
        x = torch.empty(n, 0, dtype=torch.long, device=rng.device)
        for place in range(length):
            k = min(place, self.order)
            past = (x[:, place - k :] * 4 ** torch.arange(k - 1, -1, -1, device=x.device)).sum(1)
            u = torch.rand(n, 1, generator=rng, dtype=torch.float64, device=x.device)
            x = torch.cat([x, invert_cdf(self.log_p[k][past].exp(), u)], 1)
        return x


def both_strands(x):
    """x (N, L) and its reverse complements -> (2 N, L)."""
    return torch.cat([x, 3 - x.flip(1)])


# ---- the method: training --------------------------------------------------------------------------------------------


def denoiser_batches(draw, batch, rng):
    """The bound, in nats a letter, on batches of draw(n) -> tokens (n, L), as a function of the network."""

    def batch_loss(net):
        x = draw(batch)
        share = (torch.arange(batch, device=x.device) + torch.rand(batch, generator=rng, device=x.device)) / batch
        z, hidden = hide(x, share, rng)
        return hidden_loss(net(z), x, hidden).mean() / x.shape[1]

    return batch_loss


def judge_batches(codes, targets, kind, rng, batch=128):
    """The loss of an oracle on random rows of codes (N, L), targets (N, C), as a function of the network.

    Either strand, turned by up to 8 letters, a tenth of the letters blank: without that it learns its rows by heart.
    """
    loss = dict(classes=cross_entropy, activity=mse_loss, open=binary_cross_entropy_with_logits)[kind]

    def batch_loss(net):
        rows = torch.randint(len(codes), (batch,), generator=rng, device=rng.device)
        shift = int(torch.randint(-8, 9, (1,), generator=rng, device=rng.device))
        x = either_strand(codes[rows].long(), rng).roll(shift, 1)
        seen = torch.rand(x.shape, generator=rng, device=rng.device) > 0.1
        return loss(net(one_hot(x, 4) * seen[:, :, None].float()), targets[rows])

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


def train_elements(data, args, folder, world):
    """The base model, both oracles and (where the labels are cell types) the accessibility classifier, into `folder`.

    Each network has a generator of its own, so that one does not depend on what was trained before it.
    """
    parts = chromosome_split(data.chrom)
    common = dict(seed=args.seed, lr=args.lr, bf16=args.bf16, data=data.digest)
    rngs = [torch.Generator(args.device).manual_seed(4 * args.seed + k) for k in range(4)]
    codes = data.codes[parts["training"]]

    def draw(n):
        rows = torch.randint(len(codes), (n,), generator=rngs[0], device=codes.device)
        return either_strand(codes[rows].long(), rngs[0])

    net = MaskedDenoiser(args.width, 9, DILATIONS[args.layers], rngs[0]).to(args.device)
    fit_network(net, denoiser_batches(draw, args.batch, rngs[0]), args.steps, args.lr, args.bf16, rngs[0],
                folder / f"{world}_base.safetensors", dict(common, batch=args.batch, **net.architecture), args.resume)
    jobs = {part: (data.codes[parts[part]], data.targets[parts[part]], data.kind) for part in ("oracle_a", "oracle_b")}
    if data.kind == "classes":  # and sequences with the words of three letters of the real ones, open nowhere
        closed = MarkovChain(both_strands(codes), 2).sample(len(codes) // 4, codes.shape[1], rngs[3])
        targets = data.targets[parts["training"]]
        jobs["accessibility"] = (torch.cat([codes, closed.to(codes)]),
                                 torch.cat([targets, torch.zeros_like(targets[: len(closed)])]), "open")
    for (name, (rows, targets, kind)), rng in zip(jobs.items(), rngs[1:]):
        net = Oracle(data.names, kind, 96, rng)
        fit_network(net, judge_batches(rows, targets, kind, rng), args.judge_steps, args.lr, args.bf16, rng,
                    folder / f"{world}_{name}.safetensors", common, args.resume)


def train_splice(law, args, folder):
    """A network on draws from the enumerated law, into `folder`: for the methods that fine-tune weights."""
    rng = torch.Generator(args.device).manual_seed(args.seed)
    letters, cdf = all_sequences(9).to(args.device), law.p[None]

    def draw(n):
        return letters[invert_cdf(cdf, torch.rand(1, n, generator=rng, dtype=cdf.dtype, device=cdf.device))[0]]

    net = MaskedDenoiser(args.width, 9, DILATIONS[args.layers], rng)
    fit_network(net, denoiser_batches(draw, args.batch, rng), args.steps, args.lr, args.bf16, rng,
                folder / "mpsa_base.safetensors", dict(seed=args.seed, lr=args.lr, bf16=args.bf16, batch=args.batch,
                                                       **net.architecture), args.resume)


# ---- the worlds, loaded ----------------------------------------------------------------------------------------------


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


# ---- measuring -------------------------------------------------------------------------------------------------------


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


def measure_elements(world, args, rng):
    """Rows of the base model's bound beside Markov chains, of the judges, and of real, random and sampled elements."""
    name, data, rows, curves = world.name, world.elements, [], {}
    parts = chromosome_split(data.chrom)
    train, held = data.codes[parts["training"]], parts["validation"] | parts["test"]
    chains = {order: MarkovChain(both_strands(train), order) for order in (0, 3, 5)}
    for part, label in (("validation", "chr2"), ("test", "chr1")):
        x = data.codes[parts[part]].long()
        x = x[:200] if args.quick else x
        curves[label] = masked_bound(world.denoiser, x, args.levels, rng) / x.shape[1]
        bound = curves[label].mean(1)
        rows.append(row(f"base.{name}.bound_{label}", *mean_and_se(bound)))
        for order, chain in chains.items():
            other = chain.bound(x) / x.shape[1]
            rows.append(row(f"markov{order}.{name}.bound_{label}", *mean_and_se(other)))
            rows.append(row(f"markov{order}.{name}.above_base_{label}", *mean_and_se(other - bound)))
    rows += measure_judges(world, train, rng)

    x, calls = sample_masked(world.denoiser, args.samples, world.length, args.sample_steps, rng)
    for k in (1, 3, 6):
        rows.append(row(f"base.{name}.kmer{k}_training", kmer_correlation(x, train, k)))
    real = {"real_hepg2": data.codes[held & data.active], "real_other": data.codes[held & ~data.active]}
    sets = {key: rows_[torch.randperm(len(rows_), generator=rng, device=x.device)[: args.samples]]
            for key, rows_ in real.items()}
    sets |= dict(random=torch.randint(4, x.shape, generator=rng, device=x.device), base=x)
    for key, elements in sets.items():
        values = element_measures(world, elements, args.levels, rng)
        rows += [row(f"{key}.{name}.{measure}", *value) for measure, value in values.items()]
    with torch.no_grad():
        scores = torch.cat([world.held_out(part.long()) for part in real["real_hepg2"].split(256)])
    rows.append(row(f"real_hepg2.{name}.held_out_p90", scores.quantile(0.9).item()))
    return rows, dict(curves=curves, x=x, train=train), calls


def measure_judges(world, train, rng):
    """Rows of oracles and classifier on the chromosomes that none of them saw."""
    name, data, rows = world.name, world.elements, []
    held = data.chrom <= 2
    x, targets = data.codes[held].long(), data.targets[held]
    with torch.no_grad():
        a, b = (torch.cat([score(part) for part in x.split(256)]) for score in (world.reward, world.held_out))
        rows.append(row(f"oracles.{name}.correlation", torch.corrcoef(torch.stack([a, b]))[0, 1].item()))
        for oracle, score in (("oracle_a", a), ("oracle_b", b)):
            if data.kind == "classes":
                rows.append(row(f"{oracle}.{name}.auc", auc(score, targets[:, data.names.index("hepg2")] == 1)))
            else:
                both = torch.stack([score, targets[:, data.names.index("hepg2")]])
                rows.append(row(f"{oracle}.{name}.correlation", torch.corrcoef(both)[0, 1].item()))
        if world.accessible and data.kind == "classes":
            closed = MarkovChain(both_strands(train), 2).sample(1000, world.length, rng)
            open_, shut = (torch.cat([world.accessible(part) for part in y.split(256)]) for y in (x, closed))
            hepg2 = targets[:, data.names.index("hepg2")] == 1
            score, positive = torch.cat([open_, shut]), torch.cat([hepg2, torch.zeros_like(shut, dtype=torch.bool)])
            rows.append(row(f"accessibility.{name}.auc", auc(score, positive)))
            for key, share in (("hepg2", open_[hepg2]), ("other", open_[~hepg2]), ("markov2", shut)):
                rows.append(row(f"accessibility.{name}.share_{key}", *mean_and_se((share > 0.5).double())))
    return rows


def fixed_batch_measures(world):
    """Means over 64 fixed sequences, by which files of networks are known to be those of a record -> {key: float}."""
    if world.law:
        x = all_sequences(world.length)[:: 4**world.length // 64]
    else:
        x = world.elements.codes[world.elements.chrom == 2][:64].long()
    rng = torch.Generator(x.device).manual_seed(0)
    functions = dict(activity=world.reward, held_out=world.held_out, accessible=world.accessible)
    values = {key: f(x).mean().item() for key, f in functions.items() if f}
    return dict(bound=masked_bound(world.network, x, 8, rng).mean().item(), **values)


def measure_splice(world, args, rng):
    """Rows of the enumerated world: its exact numbers, and what exact and trained denoiser make of them."""
    p, rewards, measured = world.law.p, world.law.rewards, world.law.measured
    both = measured.all(0)
    entropy = -(p * p.log()).sum().item()
    exact = dict(entropy=entropy, mass_measured=p[measured[0]].sum().item(), mean_reward=(p @ rewards[0]).item(),
                 mean_held_out=(p @ rewards[1]).item(), measured=int(measured[0].sum()),
                 replicates_correlation=torch.corrcoef(rewards[:, both])[0, 1].item())
    rows = [row(f"exact.mpsa.{key}", value) for key, value in exact.items()]
    letters = all_sequences(9).to(p.device)

    def draw(n):
        u = torch.rand(1, n, generator=rng, dtype=p.dtype, device=p.device)
        return letters[invert_cdf(p[None], u)[0]]

    curves = {}
    for name, denoiser in (("exact_denoiser", world.denoiser), ("network", world.network)):
        curves[name] = masked_bound(denoiser, draw(100 * args.samples), 9, rng)
        rows.append(row(f"{name}.mpsa.bound", *mean_and_se(curves[name].double().mean(1)), entropy))
    single = [p.view(4**k, 4, -1).sum((0, 2)) for k in range(9)]
    rows.append(row("independent.mpsa.bound", -sum((q * q.log()).sum() for q in single).item(), exact=entropy))
    calls = 0
    for steps in (1, 2, 4, 8, 16, 32, 64, 128):
        x, rows_ = sample_masked(world.denoiser, 20 * args.samples, 9, steps, rng)
        calls += rows_
        rows.append(row(f"steps_{steps}.mpsa.mean_reward", *mean_and_se(world.reward(x)), exact["mean_reward"]))
        rows.append(row(f"steps_{steps}.mpsa.cross_entropy", *mean_and_se(-TableReward(p.log())(x)), entropy))
    return rows, dict(curves=curves), calls


# ---- the figures -----------------------------------------------------------------------------------------------------


def draw_elements(path, world, rows, shown, rng):
    """Bound by noise level, words of the samples, the two oracles on held-out elements, motifs."""
    value = {r["name"]: r["estimate"] for r in rows}
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.7))
    curve = shown["curves"]["chr2"].mean(0).cpu()
    axes[0].plot((torch.arange(len(curve)) + 0.5) / len(curve), curve, "o-", color="#0072B2", markersize=4,
                 label="base model")
    mean = value[f"base.{world.name}.bound_chr2"]
    axes[0].axhline(mean, color="#0072B2", linewidth=0.8, label=f"its mean, the bound: {mean:.4f}")
    for order, style in ((0, ":"), (3, "--"), (5, "-.")):
        level = value[f"markov{order}.{world.name}.bound_chr2"]
        axes[0].axhline(level, color="black", linestyle=style, linewidth=1, label=f"Markov, order {order}: {level:.4f}")
    axes[0].set(xlabel="share of letters hidden", ylabel="nats per letter, chromosome 2")
    axes[0].legend(fontsize=7)
    counts = [kmer_counts(x, 3).cpu() for x in (shown["train"], shown["x"])]
    axes[1].loglog(*(c / c.sum() for c in counts), "o", markersize=3, color="#0072B2")
    line = [float((counts[0] / counts[0].sum()).min()), float((counts[0] / counts[0].sum()).max())]
    axes[1].plot(line, line, color="black", linewidth=0.6)
    axes[1].set(xlabel="share of 3-letter word, training set", ylabel="in samples of the base model")
    for axis in (axes[1].xaxis, axes[1].yaxis):
        axis.set_ticks([0.003, 0.01, 0.03], ["0.3%", "1%", "3%"])
        axis.set_ticks([], minor=True)
    axes[1].set_title(f"r = {value[f'base.{world.name}.kmer3_training']:.4f}", fontsize=9)
    held = (world.elements.chrom <= 2).nonzero()[:, 0]
    held = held[torch.randperm(len(held), generator=rng, device=held.device)[:1500]]
    with torch.no_grad():
        a, b = (score(world.elements.codes[held].long()).cpu() for score in (world.reward, world.held_out))
    active = world.elements.active[held].cpu()
    for rows_, color, label in ((~active, "#999999", "others"), (active, "#D55E00", "HepG2")):
        axes[2].scatter(a[rows_], b[rows_], s=3, color=color, label=label, linewidths=0)
    axes[2].set(xlabel="oracle A", ylabel="oracle B")
    axes[2].set_title(f"real elements, r = {value[f'oracles.{world.name}.correlation']:.3f}", fontsize=9)
    axes[2].legend(fontsize=7, markerscale=3)
    colors = dict(real_hepg2="#D55E00", real_other="#999999", base="#0072B2", random="#DDDDDD")
    for shift, (key, color) in enumerate(colors.items()):
        rates = [value[f"{key}.{world.name}.motif_{motif.lower()}"] for motif in MOTIFS]
        axes[3].bar(np.arange(len(rates)) + 0.2 * shift - 0.3, rates, 0.2, color=color, label=key.replace("_", " "))
    axes[3].set_xticks(range(len(MOTIFS)), MOTIFS, fontsize=8)
    axes[3].set(ylabel="share of elements with the motif")
    axes[3].legend(fontsize=7)
    figure.tight_layout()
    save_figure(figure, path)


def draw_splice(path, world, rows, shown):
    """The bound by number of hidden letters, the two replicates, and what few sampling steps cost."""
    table = {r["name"]: r for r in rows}
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 3.7))
    for name, color in (("exact_denoiser", "black"), ("network", "#0072B2")):
        values = shown["curves"][name].mean(0).cpu() / 9
        axes[0].plot(range(1, 10), values, "o-", color=color, markersize=4,
                     label=f"{name.replace('_', ' ')}: bound {table[f'{name}.mpsa.bound']['estimate']:.3f} nats")
    axes[0].axhline(table["exact.mpsa.entropy"]["estimate"] / 9, color="black", linestyle=":", label="entropy / 9")
    axes[0].set(xlabel="hidden letters", ylabel="nats per letter")
    axes[0].legend(fontsize=8)
    both = world.law.measured.all(0).cpu()
    first, second = world.law.rewards[:, both].cpu()
    axes[1].hexbin(first, second, bins="log", cmap="Greys", gridsize=60, linewidths=0)
    r = table["exact.mpsa.replicates_correlation"]["estimate"]
    axes[1].set(xlabel="replicate 1: the reward", ylabel="replicate 2: held out")
    axes[1].set_title(f"log10 percent spliced in, r = {r:.3f}", fontsize=9)
    steps = [1, 2, 4, 8, 16, 32, 64, 128]
    lines = [table[f"steps_{n}.mpsa.cross_entropy"] for n in steps]
    axes[2].errorbar(steps, [r["estimate"] for r in lines], [2 * r["se"] for r in lines], color="#0072B2", marker="o",
                     markersize=4, capsize=2)
    axes[2].axhline(lines[0]["exact"], color="black", linestyle=":", label="entropy of the law")
    axes[2].set(xscale="log", xlabel="sampling steps, exact denoiser", ylabel="mean of -log p(sample), nats")
    axes[2].legend(fontsize=8)
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
    """Train (or load) the networks of a world, measure them -> {row name: estimate}."""
    start, out = time.perf_counter(), results_folder(args, "dna_pretrain")
    folder, name = args.checkpoints or out, "data" if args.data else args.world
    if folder.exists() and not folder.is_dir():
        fail(f"{folder} is a file, not a folder of networks.")
    if name == "mpsa":
        train_splice(splice_law(args.device), args, folder)
    else:
        train_elements(read_elements(args.data, args.device), args, folder, name)
    world, rng = dna_world(name, args.data, folder, args.device), torch.Generator(args.device).manual_seed(args.seed)
    if name == "mpsa":
        rows, shown, calls = measure_splice(world, args, rng)
        draw_splice(out / "figure.png", world, rows, shown)
    else:
        rows, shown, calls = measure_elements(world, args, rng)
        draw_elements(out / "figure.png", world, rows, shown, rng)
    rows += [row(f"check.{name}.{key}", value) for key, value in fixed_batch_measures(world).items()]
    write_numbers(out / "numbers.json", args, rows, calls, time.perf_counter() - start)
    lines = [r for r in rows if not r["name"].startswith("check.")]
    for part in ("chr2", "chr1"):
        print_table(lines, name, [f"bound_{part}", f"above_base_{part}"])
    print_table(lines, name, ["bound"])
    print_table(lines, name, ["mean_reward", "cross_entropy"])
    print_table(lines, name, ["auc", "correlation", "share_hepg2", "share_other", "share_markov2"])
    print_table(lines, name, ["activity", "held_out", "held_out_p90", "accessible", "kmer3_correlation",
                              "kmer3_training", "diversity", "log_likelihood"])
    print_table(lines, name, [f"motif_{motif.lower()}" for motif in MOTIFS])
    return {r["name"]: r["estimate"] for r in rows}


if __name__ == "__main__":
    main(parse_args())
