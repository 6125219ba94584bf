"""All methods on one problem, each as a front over its temperature, strength, rounds or stopping time.
Counterpart of DAS Fig. 1 (Kim et al., arXiv 2501.05803) and DAV Fig. 2 (Lee et al., arXiv 2510.00502). figure.png:
samples; fronts; what more particles do in the published code of DAS. It alone of all scripts imports the others.
Run    python toy/compare.py                    4 minutes; --quick: 1, coarse
       python toy/compare.py --problem gmm      the grid instead of the ring
Read first: tilt_with, settings, left_behind.
A reward says little alone: going on raises it and narrows the samples. What is best at a given E[r] is known: the tilt
p exp(r / a) whose E[r] it is keeps nearest to p. So each setting of a method is compared with the tilt of its *own*
mean reward (`tilt_with`), not with one target that suits one method:
    coverage    sum over modes of min(mass of the samples, mass of that tilt); 1 is right
    emd         earth mover's distance from that tilt; its floor is that of exact draws, row exact
    calls       network calls in millions, training and 10,000 samples together; a backward pass counts as two
DAS, guidance: kl_weight and strength. DDPO, DRaFT with KL: kl_weight; without: the number of updates. DAV: rounds.
What you should see (gmm2, seed 0): das, importance and ddpo_kl stay on the front (coverage .98 or more); draft_kl and
    dav lose up to .06, guidance .12 where both modes count. ddpo and draft without KL leave it on their way (.86, .76);
    they come back when the tilt is narrow too. The published code's E[r] rises from -1.43 to -0.94 with particles.
"""
import argparse, math, pathlib, time

import das
import dav
import ddpo
import draft
import torch
from das import Figure, Problem, checked, emd, pretrain, report, signal_power

COLORS = {"das": "#0072B2", "guidance": "#E69F00", "importance": "k", "dav": "#009E73", "ddpo_kl": "#CC79A7",
          "draft_kl": "#56B4E9", "ddpo": "#882255", "draft": "#D55E00"}
STYLES = {"ddpo": "s--", "draft": "^--"}  # no KL: settings are stopping times
PARTICLES = (4, 16, 64, 256, 1024, 4096)

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="coarse, a minute")
    add("--paper", action="store_true", help="ten times the samples and four times the training; not recorded")
    add("--seed", type=int, default=0)
    add("--out", type=pathlib.Path, default="out/toy_compare", help="folder of figure.png and numbers.json")
    add("--device", choices=["cpu", "cuda"][: 1 + torch.cuda.is_available()], default="cpu")
    add("--problem", choices=["gmm", "gmm2"], default="gmm2")
    return checked(parser, parser.parse_args(argv))

def tilt_with(name, reward):
    """The problem whose target p exp(r / a) has this mean reward: a by bisection, between 0.01 and 1000."""
    low, high = math.log(0.01), math.log(1000.0)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if Problem(name, math.exp(middle)).mean_reward > reward else (low, middle)
    return Problem(name, math.exp(low))

def samples_of(net, n, steps):
    """Plain samples of a network -> (n, 2)."""
    abar = signal_power(torch.linspace(1, 0, steps + 1)).tolist()
    return das.das(net, lambda x: 0 * x.sum(-1), torch.randn(n, 1, 2), abar, guided=False, ess=0)[0][:, 0]

def settings(args, net, n):
    """Every method at every setting: yields method, setting, samples (N, 2), weights (N,), calls."""
    problem, one, steps = Problem(args.problem, 1.0), torch.full((n,), 1 / n), 50
    yield "pretrained", 0, samples_of(net, n, steps), one, n * steps
    for kl_weight in (4.0, 2.0, 1.0, 0.5, 0.25):
        for method in ("importance", "das"):
            bench = argparse.Namespace(groups=n // 100, particles=100, gamma=None, ddpm=False, steps=steps)
            x, w, _ = das.measure(method, Problem(args.problem, kl_weight), net, bench)
            yield method, kl_weight, x, w, n * steps * (3 if method == "das" else 1)
    for strength in (0.5, 1.0, 1.4, 2.0, 4.0):  # from 8 on some paths run away
        abar = signal_power(torch.linspace(1, 0, steps + 1)).tolist()
        x = das.das(net, problem.reward, torch.randn(n, 1, 2), abar, strength=strength, **das.METHODS["guidance"])[0]
        yield "guidance", strength, x[:, 0], one, 3 * n * steps
    for script, name in ((ddpo, "ddpo"), (draft, "draft")):
        tune = script.parse_args(["--out", str(args.out), "--problem", args.problem])
        whole, tune.batch = tune.size[1] // (8 if args.quick else 1), tune.size[2]
        tune.abar = signal_power(torch.linspace(1, 0, tune.steps + 1)).tolist()
        choices = [*((f"{name}_kl", k) for k in (4.0, 2.0, 1.0, 0.5)), *((name, k) for k in (16, 8, 4, 1))]
        for method, setting in choices:
            tune.updates = whole if "kl" in method else max(whole // setting, 4)
            goal = Problem(args.problem, setting if "kl" in method else 1.0)
            tuned, _, calls = script.run(method, goal, net, tune)
            setting = setting if "kl" in method else tune.updates
            yield method, setting, samples_of(tuned, n, tune.steps), one, calls + n * tune.steps
    tune = argparse.Namespace(kl_weight=4.0, rounds=8, particles=n * 4 // 10, updates=30 if args.quick else 80)
    abar = signal_power(torch.linspace(1, 0, 33)).tolist()
    for k, (tuned, _) in enumerate(dav.dav(net, problem.reward, abar, tune)):
        if k in (1, 2, 4, 8):  # calls: an E-step's, and 3 for each of the 1024 transitions of an update
            yield "dav", k, samples_of(tuned, n, 32), one, k * (32 * tune.particles + 3072 * tune.updates) + n * 32

def measure(problem, reward, method, setting, x, w, calls, subsamples):
    """Rows of one setting against the tilt of its own mean reward."""
    value = (w * reward(x)).sum().item()
    target = tilt_with(problem, value).target
    mode = (target.component_distribution.log_prob(x[:, None]) + target.log_w).softmax(1)  # (N, K)
    distance = emd(x, w, target, subsamples)
    rows = [("mean_reward", value, None), ("coverage", torch.minimum(w @ mode, target.log_w.exp()).sum(), None),
            ("emd", distance.mean(), distance.std() / subsamples**0.5), ("calls", calls / 1e6, None)]
    return [(problem, f"{method}_{setting:g}", *row, None) for row in rows]

def left_behind(kl_weight=1.0, total=8192):
    """E[r] on the ring with the exact score, by number of particles: the published sampler with and without its bug.

    The published code resamples particles but leaves their twists in the slots, and so divides out the twist of another
    particle. Here it is added back to the weights of the right sampler.
    """
    problem, smc, rows = Problem("gmm2", kl_weight), das.smc, []
    abar = signal_power(torch.linspace(1, 0, 101)).tolist()

    def careless(step, state, steps, ess=0.5):
        slots = {}

        def stale(state, i):
            new, log_ratio = step(state, i)
            log_ratio = log_ratio + state["log_twist"] - slots.get("log_twist", state["log_twist"])
            slots.update(new)
            return new, log_ratio

        return smc(stale, state, steps, ess)

    for particles in PARTICLES:
        for method, sampler in (("das_published", smc), ("twist_left_behind", careless)):
            das.smc = sampler
            noise = torch.randn(total // particles, particles, 2)
            x, log_w = das.das(problem.data.denoise, problem.reward, noise, abar, gamma=0.008, ddpm=True)
            r = (log_w.softmax(1) * problem.reward(x)).sum(1)
            rows.append((f"particles_{particles}", method, "mean_reward", r.mean(), r.std() / len(r) ** 0.5,
                         problem.mean_reward))
    das.smc = smc
    return rows

def draw(args, samples, rows):
    """Samples of the settings nearest to the target at kl_weight 1; fronts; the published code by particles."""
    number, exact = {r[:3]: r[3] for r in rows}, Problem(args.problem, 1.0)
    figure = Figure(figsize=(9, 7), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[3.6, 3.2])
    half = 1.5 * exact.data.means.max().item()
    grid = torch.stack(torch.meshgrid(*2 * [torch.linspace(-half, half, 161)], indexing="ij"), 2)
    for ax, method in zip(top.subplots(2, 4).flat, COLORS):
        ours = [key for key in samples if key[0] == method]  # the setting whose E[r] is nearest to that of the target
        value = {key: number[args.problem, f"{key[0]}_{key[1]:g}", "mean_reward"] for key in ours}
        best = min(ours, key=lambda key: abs(value[key] - exact.mean_reward))
        x, w = samples[best]
        x = x[torch.multinomial(w, 1500, replacement=True)].cpu()
        ax.scatter(x[:, 0], x[:, 1], s=2, c=COLORS[method], alpha=0.5, linewidths=0)
        levels = dict(levels=[-9, -6, -3], colors="k", linewidths=0.5, linestyles="solid")
        ax.contour(*grid.movedim(2, 0).cpu(), exact.target.log_prob(grid).cpu(), **levels)
        distance = number[args.problem, f"{best[0]}_{best[1]:g}", "emd"]
        ax.set_title(f"{method} at {best[1]:g}\nE[r] {value[best]:.2f}, EMD {distance:.2f}", fontsize=8)
        ax.set(xticks=[], yticks=[], aspect="equal", xlim=(-half, half), ylim=(-half, half))
    panels = bottom.subplots(1, 3)
    for method, color in COLORS.items():
        keys = sorted((key for key in samples if key[0] == method), key=lambda key: key[1])
        for ax, quantity in zip(panels, ("coverage", "emd")):
            points = [[number[args.problem, f"{m}_{s:g}", q] for m, s in keys] for q in ("mean_reward", quantity)]
            ax.plot(*points, STYLES.get(method, "o-"), color=color, label=method, markersize=3, linewidth=1)
            ax.set_title(f"{quantity} against E[r]", fontsize=8)
    floor = number[args.problem, "exact_1", "emd"]
    panels[1].axhline(floor, color="k", linestyle="dotted")
    panels[0].axhline(1, color="k", linestyle="dotted")
    for method, color in (("das_published", "#0072B2"), ("twist_left_behind", "#D55E00")):
        found = [number[f"particles_{n}", method, "mean_reward"] for n in PARTICLES]
        panels[2].semilogx(PARTICLES, found, ".-", color=color, label=method)
    panels[2].axhline(Problem("gmm2", 1.0).mean_reward.item(), color="k", linestyle="dotted")
    panels[2].set_title("E[r] of DAS as published, by particles", fontsize=8)
    for ax in panels:
        ax.tick_params(labelsize=8)
    bottom.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize=8)
    panels[2].legend(fontsize=8)
    return figure

def main(args):
    started, samples, rows = time.time(), {}, []
    torch.manual_seed(args.seed)
    torch.set_default_device(args.device)
    n, train, subsamples = (1000, 300, 4) if args.quick else (100_000, 10_000, 40) if args.paper else (10_000, 2500, 20)
    print("COARSE: numbers mean nothing" if args.quick else "se: of emd over subsamples, of particles_... over groups")
    problem = Problem(args.problem, 1.0)
    for method, setting, x, w, calls in settings(args, pretrain(problem.data, train), n):
        samples[method, setting] = x, w
        rows += measure(args.problem, problem.reward, method, setting, x, w, calls, subsamples)
    exact = problem.target.sample((n,)), torch.full((n,), 1 / n)
    rows += measure(args.problem, problem.reward, "exact", 1, *exact, 0, subsamples) + left_behind()
    report(args, rows, started, lambda: draw(args, samples, rows))

if __name__ == "__main__":
    main(parse_args())
