"""All methods on one reward: what they gain, and what another CLIP model and the diversity of the images say to it.

Papers: the counterparts of Kim et al. (DAS), arXiv 2501.05803, Fig. 2, and Lee et al. (DAV), arXiv 2510.00502, Fig. 2.
The reward is the score of one small CLIP model; the other one, trained on other drawings, only measures.

Run    python sd/compare.py                  runs das, dav, draft and ddpo with three seeds    80 CPU minutes, by parts
       python sd/compare.py --quick          one seed, coarse                                  90 CPU seconds

A run of a method that stands under out/seed<k> with the same flags is read and not repeated, so that an interrupted
comparison goes on where it was; that of das takes the prompts and the steps of the others.

Methods   test time: guidance (one particle), best of 16, importance resampling and DAS, all at the same calls (das.py);
          the search of DAV on the base model (`search`). Tuned: DRaFT through the last step, the last three and all,
          and all with KL (draft.py), DDPO without and with KL (ddpo.py), DAV, DAV-KL (dav.py). Both: DAV posterior.

Table     gain: the reward above the base model's, in its standard deviations within a prompt; held_out: the change of
          the score by the other CLIP model; diversity_kept: mean 1 - cosine of two images of a prompt there, as a share
          of the base model's; kl: nats of the whole sampling paths, of tuned models; calls: of the UNet to train;
          image_calls: of the UNet for one image afterwards; seconds: CPU time of one core for the training

What you should see (mean ± standard deviation over three seeds): DAV posterior gains 3.12±0.02, then come best of 16
with 2.06±0.18, DAV 1.97±0.07, DAS 1.86±0.46, importance resampling 1.63±0.19 and DAV-KL 1.10±0.05. As in the paper the
posterior leads; DAV and DAS are within the spread of DAS, after 12 rounds of 24 images (--paper: 100 of 64).
The more is gained, the more of the other CLIP model's score is lost, to 0.11 of 0.81 (DRaFT, 3.4). Around a gain of 2 no
method is better beyond the spread: best of 16 loses 0.02±0.02, DAS and DAV 0.04±0.01, DDPO 0.06±0.05. Around 3 it is
DAV posterior, with 0.06±0.03, where DRaFT loses 0.09±0.02 to 0.11±0.06. Diversity says little here: off the base model's
images two images of a prompt differ more (1.1 to 1.5), before they collapse (DRaFT 0.75±0.41). With KL, DRaFT pays 16
nats for 1.6 standard deviations, DAV-KL 15 for 1.1 and DDPO 53 for 0.9.
To try: --seeds 1 after changing a default in dav.py: only that script runs again.
"""
import json
import sys
import time

import das
import dav
import ddpo
import draft
import matplotlib.pyplot as plt
import torch

SCRIPTS = dict(das=das, dav=dav, draft=draft, ddpo=ddpo)
SETS = {  # row of the table: script, its name for it, title
    "base": ("dav", "base", "base model"), "guidance": ("das", "guidance", "guidance"),
    "best_of_n": ("das", "best_of_n", "best of 16"), "importance": ("das", "importance", "importance"),
    "das": ("das", "das", "DAS"), "search": ("dav", "search", "search on base"),
    "ddpo": ("ddpo", "ddpo", "DDPO"), "ddpo_kl": ("ddpo", "ddpo_kl", "DDPO + KL"),
    "draft_1": ("draft", "draft_1", "DRaFT-1"), "truncated": ("draft", "truncated", "DRaFT, last 3"),
    "draft": ("draft", "full", "DRaFT"), "draft_kl": ("draft", "full_kl", "DRaFT + KL"),
    "dav": ("dav", "dav", "DAV"), "dav_kl": ("dav", "dav_kl", "DAV-KL"),
    "dav_posterior": ("dav", "posterior", "DAV posterior"),
}
PLACES = {  # of titles that would stand on others: points to the right, up, alignment
    "search": (0, 6, "center"), "dav_kl": (-5, -3, "right"), "importance": (5, -8, "left"), "das": (-2, -14, "center"),
    "draft_kl": (0, -13, "center"), "dav": (6, -4, "left"),
}
COLORS = {"das": "#000000", "dav": "#0072B2", "draft": "#CC79A7", "ddpo": "#E69F00"}


def parse_args(argv=None):
    parser = das.common_parser(__doc__)
    parser.add_argument("--seeds", type=das.positive(int), help="runs with seeds --seed, --seed + 1, ...")
    args = parser.parse_args(argv)
    args.seeds = args.seeds or (1 if args.quick else 3)
    return args


def flags(args, script, seed):
    """The command line of a method's script with this seed, its results under a folder of the seed."""
    words = ["--quick"] if args.quick else ["--paper"] if args.paper else []
    words += ["--seed", str(seed), "--out", str(args.out / f"seed{seed}"), "--device", args.device]
    if script == "das":
        words += ["--prompts", *dav.PROMPTS, "--steps", str(dav.parse_args(words).steps)]
    return words


def recorded(script, args, seed):
    """Rows {name: row} and record of a script's run with this seed: read where it has the same flags, else made."""
    module, words = SCRIPTS[script], flags(args, script, seed)
    path = args.out / f"seed{seed}" / f"sd_{script}" / "numbers.json"
    settings = vars(module.parse_args(words))
    wanted = json.loads(json.dumps({name: v for name, v in settings.items() if name not in ("out", "resume")}))
    if path.exists():
        record = json.loads(path.read_text())
        if {name: v for name, v in record["args"].items() if name not in ("out", "resume")} == wanted:
            print(f"seed {seed}: {script} is read from {path}", file=sys.stderr)
            return {r["name"]: r for r in record["rows"]}, record
    print(f"seed {seed}: {script}", file=sys.stderr)
    module.main(module.parse_args([*words, *([] if script == "das" else ["--resume"])]))
    record = json.loads(path.read_text())
    return {r["name"]: r for r in record["rows"]}, record


def measures(rows, args, name, script):
    """What the table says of a method in the rows of its script, which ran with these args -> {key: number}."""
    value = {key: rows[f"{name}.all.{key}"]["estimate"] for key in ("gain", "kl", "calls", "seconds")
             if f"{name}.all.{key}" in rows and not (script == "das" and key == "seconds")}
    for key in ("clip_eval", "diversity"):
        now, before = (rows[f"{label}.all.{key}"]["estimate"] for label in (name, "base"))
        value |= dict(held_out=now - before) if key == "clip_eval" else dict(diversity_kept=now / before)
    each = args["steps"] * (2 if args["guidance"] != 1 else 1)
    if script == "das" and name not in ("base", "guidance"):
        each *= args["particles"]
    if name in ("search", "posterior"):
        each += (each - each // args["steps"]) * ((args["children"] if args["search"] != "smc" else 1) - 1)
    return value | dict(image_calls=each)


def training_curve(out, script, name, rows):
    """(rounds, 2) of a tuned model: the calls of the UNet so far, the gain of the images drawn, smoothed."""
    stored = torch.load(out / f"sd_{script}" / f"{name}.pt", weights_only=True)["trace"]
    each = rows[f"{name}.all.calls"]["estimate"] / len(stored)
    return torch.stack([each * torch.arange(len(stored)), draft.smoothed(stored, "gain")], 1)


def collect(args):
    """All scripts and seeds -> {set: list of measures, by seed}, {set: list of curves}, calls."""
    found, curves, calls = {name: [] for name in SETS}, {}, 0
    for seed in range(args.seed, args.seed + args.seeds):
        runs = {}
        for script in SCRIPTS:
            runs[script], record = recorded(script, args, seed)
            calls += record["network_evaluations"]
            for name, (own, label, _) in SETS.items():
                if own == script:
                    found[name].append(measures(runs[script], record["args"], label, script))
                    if f"{label}.all.calls" in runs[script]:
                        curves.setdefault(name, []).append(
                            training_curve(args.out / f"seed{seed}", script, label, runs[script]))
    return found, curves, calls


def measure(found):
    """Rows: the mean over seeds, and as se their standard deviation."""
    rows = []
    for name, runs in found.items():
        for key in runs[0]:
            v = torch.tensor([run[key] for run in runs], dtype=torch.float64)
            rows.append(das.row(f"{name}.all.{key}", v.mean().item(), v.std().item() if len(v) > 1 else None))
    return rows


def draw_panels(path, found, curves):
    """Gain against the held-out score (DAS Fig. 2), against diversity (DAV Fig. 2), and over the training."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.8), layout="constrained")
    keys = {"held_out": "change of the held-out CLIP score", "diversity_kept": "diversity, share of the base model's"}
    colors = {name: "#777777" if name == "base" else COLORS[script] for name, (script, _, _) in SETS.items()}
    for ax, (key, text) in zip(axes, keys.items()):
        for name, (script, _, title) in SETS.items():
            x, y = (torch.tensor([run[k] for run in found[name]]) for k in ("gain", key))
            tuned = "kl" in found[name][0]
            ax.scatter(x, y, s=8, color=colors[name], marker="o" if tuned else "^", alpha=0.5, linewidths=0)
            ax.scatter(x.mean(), y.mean(), s=36, color=colors[name], marker="o" if tuned else "^")
            right, up, align = PLACES.get(name, (4, 4, "left"))
            ax.annotate(title, (x.mean(), y.mean()), (right, up), textcoords="offset points", fontsize=7, ha=align,
                        color=colors[name])
        ax.axhline(0.0 if key == "held_out" else 1.0, color="black", linestyle=":", linewidth=0.8)
        ax.set(xlabel="reward, standard deviations of the base model (small: seeds)", ylabel=text)
        low, high = ax.get_xlim()
        ax.set_xlim(low, high + 0.12 * (high - low))
    for name, lines in curves.items():
        mean = torch.stack(lines).mean(0)
        style = "--" if name.endswith("_kl") else ":" if name in ("draft_1", "truncated") else "-"
        axes[2].plot(*mean[1:].T, color=colors[name], linestyle=style, linewidth=1, label=SETS[name][2])
    das_gain = sum(run["gain"] for run in found["das"]) / len(found["das"])
    axes[2].axhline(das_gain, color="black", linewidth=0.8, label="DAS, no training")
    axes[2].set(xlabel="calls of the UNet in training", ylabel="reward of the images drawn", xscale="log")
    axes[2].legend(fontsize=7)
    draft.save_figure(figure, path)


def main(args):
    """Run or read every method with every seed, draw, write numbers.json -> {row name: estimate}."""
    start, out = time.perf_counter(), das.results_folder(args, "sd_compare")
    found, curves, calls = collect(args)
    rows = measure(found)
    draw_panels(out / "figure.png", found, curves)
    das.write_numbers(out / "numbers.json", args, rows, calls, time.perf_counter() - start)
    das.print_table(rows, "all", ["gain", "held_out", "diversity_kept", "kl", "calls", "image_calls", "seconds"])
    return {r["name"]: r["estimate"] for r in rows}


if __name__ == "__main__":
    main(parse_args())
