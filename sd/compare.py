"""Every method as a front: what it gains on one reward, and what another CLIP model and the diversity of images lose.
Papers: the counterparts of Kim et al. (DAS), arXiv 2501.05803, Fig. 2, and Lee et al. (DAV), arXiv 2510.00502, Fig. 2.
The reward is the score of one small CLIP model; the other one, trained on other drawings, only measures.
Run    python sd/compare.py                    runs das, draft, ddpo and dav at three points each; 25 CPU minutes
       python sd/compare.py --quick            coarse, 80 seconds
A run that stands in --out with the same flags is read and not repeated: an interrupted comparison goes on.
Read first: RUNS, other_clip, measure. Skip: watch, draw.
Fronts: importance, guidance and DAS over kl_weight; DRaFT and DDPO over the weight of their KL; DAV and its posterior
    (the search on the tuned model) over rounds. All at the same steps and prompts.
Table: gain, the reward above the base model's in its standard deviations; held_out, the change of the cosine with the
    prompt under the other CLIP model, and per unit of gain; diversity, mean 1 - cosine of two images of a prompt there,
    as a share of the base model's; calls of the UNet on a latent, a backward pass counted as two, for the training
    and for an image afterwards.
What you should see (three seeds): for each standard deviation gained the other score falls by .021, .022, .020 (DAV,
    seven rounds), .014, .017, .014 (DAS at a gain of 2.8), .012, .032, .021 (DRaFT with KL), each +- .003 to .005; DDPO
    ends at a gain of 1. A DAS image costs 480 calls, one of a tuned model 10 after 17,000 (DAV) to 31,000 (DDPO), of
    the posterior 39: training pays after some 40 images.
"""
import argparse, json, os, pathlib, sys, time
import torch
if __name__ == "__main__": os.environ |= dict(MPLBACKEND="agg", TRANSFORMERS_VERBOSITY="error")
import das
import dav
import ddpo
import draft
from matplotlib.figure import Figure

RUNS = [  # script, flag, its values, flags of all: a point of each front is a run
    (das, "--kl-weight", (1.0, 0.3, 0.1), "--methods importance guidance das"),
    (draft, "--kl-weight", (0.15, 0.05, 0.015), "--methods draft_kl"),
    (ddpo, "--kl-weight", (0.03, 0.01, 0.003), "--methods ddpo_kl"),
    (dav, "--rounds", (3, 5, 7), "--methods dav")]
COLORS = dict(importance="k", guidance="#999999", das="#0072B2", draft_kl="#CC79A7", ddpo_kl="#E69F00", dav="#009E73",
              posterior="#D55E00")

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="coarse, one point of each front")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default="out/sd_compare", help="folder of the runs and results")
    parser.add_argument("--clip-eval", default=None, help="CLIP model that only measures; default: the miniature's")
    args = parser.parse_args(argv)
    if not 0 <= args.seed < 1e9:
        parser.error(f"--seed: {args.seed} is not between 0 and 1e9")
    das.loaded("--out", args.out.mkdir, parents=True, exist_ok=True)
    return args

# ---- the runs --------------------------------------------------------------------------------------------------------
def watch(module, calls):
    """Count latents that the UNet sees, in `calls` by the name of the function of `module` that asks for them."""
    eps, inside = module.Diffusion.eps, []
    def counted(self, x, *rest):
        out = eps(self, x, *rest)
        label = inside[-1] if inside else "other"
        calls[label] = calls.get(label, 0) + len(x) * (3 if out.requires_grad else 1)
        return out
    module.Diffusion.eps, restore = counted, [(module.Diffusion, "eps", eps)]
    for name in {"das", "search", "train"} & set(vars(module)):
        def named(*args, name=name, function=getattr(module, name), **options):
            inside.append("guidance" if name == "das" and args[4] == 1 else name if not inside else inside[0])
            try:
                return function(*args, **options)
            finally:
                inside.pop()
        restore.append((module, name, getattr(module, name)))
        setattr(module, name, named)
    return lambda: [setattr(*old) for old in restore]

def point(args, module, flag, value, options):
    """The folder of a run, made unless it stands there with the same flags."""
    flags = [*options.split(), flag, str(value), "--seed", str(args.seed)] + ["--quick"] * args.quick
    out, calls = args.out / f"{module.__name__}_{value}", {}
    done = out / "calls.json"
    if not done.exists() or json.loads(done.read_text())["flags"] != flags:
        print(module.__name__, *flags, flush=True)
        restore = watch(module, calls)
        try:
            module.main(module.parse_args([*flags, "--out", str(out)]))
        finally:
            restore()
        done.write_text(json.dumps(dict(flags=flags, calls=calls)))
    return out

# ---- the measures ----------------------------------------------------------------------------------------------------
def other_clip(args):
    """Function of latents (K, G, P, C, h, w) -> unit vectors (K, G, P, d) of their images; the prompts' (K, d)."""
    world = das.parse_args(["--out", str(args.out)])
    model = das.Diffusion(world, "cpu")
    embed, texts = das.load_clip(args.clip_eval or str(das.MINI / "clip_eval"), world.prompts, "cpu")
    @torch.no_grad()
    def units(x):
        parts = [embed(model.decode(part)) for part in x.flatten(0, 2).split(world.chunk)]
        return torch.cat(parts).unflatten(0, x.shape[:3])
    return units, texts

def measure(found, units, texts):
    """x, gain, log_w of a method -> gain, score of the other model (K, G), diversity of two groups of a prompt."""
    w, unit = found["log_w"].softmax(2), units(found["x"])
    score = (w * torch.einsum("kgpd,kd->kgp", unit, texts)).sum(2)
    mean = torch.einsum("kgp,kgpd->kgd", w, unit)
    n, products = mean.shape[1], mean @ mean.mT
    off = products.sum((1, 2)) - products.diagonal(dim1=1, dim2=2).sum(1)
    return (w * found["gain"]).sum(2), score, (1 - off / (n * (n - 1))).mean()

def rows_of(args, module, flag, value, options, units, texts):
    """The tidy rows of a run: its methods at this point of their fronts."""
    out, rows = point(args, module, flag, value, options), []
    found, calls = torch.load(out / "latents.pt"), json.loads((out / "calls.json").read_text())["calls"]
    _, base, kept = measure(found["base"], units, texts)
    steps, problem = 10, f"{flag.strip('-').replace('-', '_')}_{value}"
    for method in found:
        if method not in COLORS:
            continue
        gain, score, diversity = measure(found[method], units, texts)
        K, G, P = found[method]["gain"].shape
        label = dict(das="das", guidance="guidance", posterior="search").get(method)
        per_image = calls[label] / (K * G) if label in calls else P * steps
        per_image /= 1 + (label == "search")  # which is made of the base model too
        se = lambda v: (v.var(1).mean() / v.numel()).sqrt()
        held = score.mean() - base.mean()
        rows += [(problem, method, "gain", gain.mean(), se(gain), None),
                 (problem, method, "held_out", held, (se(score) ** 2 + se(base) ** 2) ** 0.5, None),
                 (problem, method, "held_out_per_gain", held / gain.mean(), None, None),
                 (problem, method, "diversity", diversity / kept, None, None),
                 (problem, method, "image_calls", torch.tensor(per_image), None, None)]
        if module is not das:
            rows.append((problem, method, "training_calls", torch.tensor(calls["train"]), None, None))
    return rows

# ---- figure, main ----------------------------------------------------------------------------------------------------
def draw(rows):
    """Held-out score and diversity against gain, and what n images at a gain near 2 cost."""
    value = {r[:3]: float(r[3]) for r in rows}
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = dict(zip(("held_out", "diversity", "calls"), figure.subplots(1, 3)))
    for method, color in COLORS.items():
        points = [p for p, m, q in value if m == method and q == "gain"]
        gains = [value[p, method, "gain"] for p in points]
        for quantity in ("held_out", "diversity"):
            axes[quantity].plot(gains, [value[p, method, quantity] for p in points], ".-", color=color, label=method)
        if points:
            p = min(points, key=lambda p: abs(value[p, method, "gain"] - 2))
            n, image = torch.logspace(0, 4, 50), value[p, method, "image_calls"]
            total = value.get((p, method, "training_calls"), 0) + image * n
            axes["calls"].loglog(n, total, color=color)
            text = f"{value[p, method, 'gain']:.1f}"
            axes["calls"].text(0.8, total[0], text, fontsize=8, color=color, va="center", ha="right")
    axes["held_out"].set_title("score of the other CLIP model, change", fontsize=9)
    axes["diversity"].set_title("diversity, share of the base model's", fontsize=9)
    axes["calls"].set_title("calls for n images; numbers: gain", fontsize=9)
    axes["calls"].set_xlim(left=0.2)
    for quantity in ("held_out", "diversity"):
        axes[quantity].set_xlabel("gain, standard deviations", fontsize=9)
        axes[quantity].axhline(0 if quantity == "held_out" else 1, color="k", linewidth=0.5)
    figure.legend(*axes["held_out"].get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=8)
    return figure

def main(args):
    started, rows, (units, texts) = time.time(), [], other_clip(args)
    for module, flag, values, options in RUNS:
        for value in values[-1:] if args.quick else values:
            rows += rows_of(args, module, flag, value, options, units, texts)
    print("COARSE: numbers mean nothing" if args.quick else "se: over images; of das and importance: over groups")
    das.report(args, rows, started, lambda: draw(rows))

if __name__ == "__main__":
    try:
        main(parse_args())
    except das.Refused as error:
        sys.exit(print(error, file=sys.stderr) or 2)
