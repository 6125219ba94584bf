"""All methods on the same problems at stated budgets: what each reaches, what it costs, and what is lost on the way.

Papers: figure.png is the comparison of Kim, Kim and Park (DAS), arXiv 2501.05803, Fig. 1; dynamics.png the toy
counterpart of Lee et al. (DAV), arXiv 2510.00502, Fig. 2. Every problem has an exact target, so that a method is judged
by its distance from it and not by its reward alone: the highest reward of all belongs to methods that have collapsed.

Run    python toy/compare.py               four problems, three seeds      14 CPU minutes, 7 minutes on 2 cores
       python toy/compare.py --quick       one seed, coarse                20 seconds
       python toy/compare.py --problem gmm2 --seeds 1                      1 minute

Problems  gmm, gmm2        the mixtures and quadratic rewards of DAS, kl_weight 1
          equal, unequal   eight modes on a ring, four of them rewarded, kl_weight 1/2: what eight rounds of DAV at
                           kl_weight 4 tend to as well, p_0 exp(8 r / 4)

Methods   pretrained, target (exact samples: the floor of the EMD); guidance (one particle, form and strength chosen by
          its own objective); DAS (tempered SMC); DDPO and DRaFT with the KL term, tuned to approach their optimum
          -log Z, and without, as published: DRaFT-1 differentiates the last step alone; DAV, DAV-KL (whose fixed point
          is another law, with less reward) and DAV posterior (the search on the tuned model)

Table     E[r]; emd between 500 samples and 500 exact ones; modes: how many of those with 1% of the target's mass have
          at least half of it; coverage: the mass that samples and target have in common, mode by mode, 1 is right and
          what is left of it after a collapse is the share of the modes that survive; spread: standard deviation within
          a mode; evaluations of the network at one point, training and sampling; seconds of one core

What you should see (± is the standard deviation over three seeds): on gmm2 the EMD is 0.27 for exact samples, 0.29 for
DAS, 0.5 for guidance, 0.6 and 1.0±0.7 for DDPO and DRaFT with KL, 3.1 without, where all samples end in one point
between the modes. On the ring DDPO and DRaFT without KL pass the target's reward and lose modes and spread; DAV and
DAV posterior stop at the target: coverage 0.93±0.02 and 0.97±0.01 on `unequal`, E[r] 3.48 and 3.56 (exact 3.58). DDPO
with KL comes close; DRaFT with KL does not on the ring: its gradient through 30 steps rarely sees the other modes.
To try: --problem unequal --seeds 1, then look at what DDPO without KL does to the smallest mode, epoch by epoch.
"""
import concurrent.futures
import contextlib
import copy
import io
import math
import multiprocessing
import os
import sys
import time
import types

import das
import dav
import ddpo
import draft
import guidance
import matplotlib.pyplot as plt
import torch

PRESETS = {
    "quick": dict(seeds=1, samples=1000, subsamples=4, train_steps=300, das=["--quick"], guidance=["--quick"],
                  ddpo=dict(epochs=4, batch=128), draft=dict(epochs=3, iterations=4, batch=64, held_out=256),
                  dav=dict(rounds=2, trajectories=1000, updates=40), steps=16),
    "default": dict(seeds=3, samples=4000, subsamples=20, train_steps=2000, das=[], guidance=[],
                    ddpo={}, draft={}, dav={}, steps=30),
    "paper": dict(seeds=3, samples=20000, subsamples=100, train_steps=5000, das=["--groups", "400"], guidance=[],
                  ddpo=dict(epochs=100, batch=2048), draft=dict(epochs=40, batch=1024),
                  dav=dict(trajectories=32768, updates=600), steps=100),
}
TITLES = {"pretrained": "pretrained", "target": "exact target", "ddpo_no_kl": "DDPO", "ddpo": "DDPO + KL",
          "draft_no_kl": "DRaFT", "draft": "DRaFT + KL", "draft_1": "DRaFT-1", "guidance": "guidance", "das": "DAS",
          "dav": "DAV", "dav_kl": "DAV-KL", "posterior": "DAV posterior"}
COLORS = {"ddpo_no_kl": "#D55E00", "ddpo": "#E69F00", "draft_no_kl": "#CC79A7", "draft": "#999999",
          "draft_1": "#882255", "das": "black", "dav": "#0072B2", "dav_kl": "#56B4E9", "posterior": "#009E73"}
PROBLEMS = ("gmm", "gmm2", "equal", "unequal")


def parse_args(argv=None):
    parser = das.common_parser(__doc__)
    parser.add_argument("--problem", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--seeds", type=das.positive(int), help="runs with seeds --seed, --seed + 1, ...")
    parser.add_argument("--samples", type=das.positive(int), help="samples behind each number, at least 500")
    parser.add_argument("--subsamples", type=das.positive(int), help="EMDs (500 against 500 points) behind each mean")
    parser.add_argument("--train-steps", type=das.positive(int), help="training steps of the pretrained network")
    parser.add_argument("--steps", type=das.positive(int), help="sampling steps of the trained methods, at least 2")
    parser.add_argument("--jobs", type=das.positive(int), default=os.cpu_count(), help="processes of one thread each")
    args = parser.parse_args(argv)
    for name, value in preset(args).items():
        if name in vars(args) and getattr(args, name) is None:
            setattr(args, name, value)
    if args.samples < 500 or args.steps < 2:
        parser.error("--samples must be at least 500 and --steps at least 2")
    return args


def preset(args):
    """The sizes that a size flag stands for."""
    return PRESETS["quick" if args.quick else "paper" if args.paper else "default"]


# ---- the problems ----------------------------------------------------------------------------------------------------


def make_problem(name, device):
    """A problem of DAS or DAV with what the measures need: data, reward, target, log_z, kl_weight, masses, spread."""
    if name in ("gmm", "gmm2"):
        problem = ddpo.make_problem(name, 1.0, device)
        return types.SimpleNamespace(**vars(problem), kl_weight=1.0)
    problem, kl_weight = dav.make_problem(name, device), 0.5
    target = dav.tilted_law(problem, 1 / kl_weight)
    facts = dict(target=target, log_z=dav.log_expectation(problem.law, problem.r / kl_weight), kl_weight=kl_weight,
                 masses=target.masses, spread=target.spread, target_reward=target.mean_reward)
    return types.SimpleNamespace(**vars(problem) | facts)


def measures(problem, x):
    """E[r], modes, coverage and spread of samples x (N, 2) -> dict of numbers."""
    x, w = x.double(), torch.ones(len(x), dtype=torch.float64, device=x.device)
    masses, due = das.mode_masses(x, w, problem.data.means), problem.masses > 0.01
    return dict(mean_reward=problem.reward(x).mean().item(), modes=int((masses >= problem.masses / 2)[due].sum()),
                coverage=torch.minimum(masses, problem.masses).sum().item(),
                spread=ddpo.mode_spread(x, w, problem.data.means))


# ---- the methods -----------------------------------------------------------------------------------------------------


def run_methods(problem, net, args, rng):
    """Every method on one problem -> {method: dict(x (N, 2), evaluations, seconds, curve)}.

    A curve is a list of (evaluations so far, measures), epoch by epoch; methods without training have one point.
    """
    sizes, results, clock = preset(args), {}, [time.process_time()]
    ring = problem.name in dav.REWARDS
    levels = ddpo.log_snr_levels(args.steps + 1, 5.0)

    def done(method, x, evaluations, curve=None):
        now = time.process_time()
        results[method] = dict(x=x.float().cpu(), evaluations=evaluations, seconds=now - clock[0],
                               curve=curve or [(evaluations, measures(problem, x))])
        clock[0] = time.process_time()

    def train(method, run, kl_weight):
        """With a KL term, the epoch with the least of its own objective is taken, else the last."""
        curve, least = [], math.inf
        for now in run:
            curve.append((now["evaluations"], measures(problem, now["x"])))
            objective = (now["kl"] - now["reward"] / kl_weight).mean().item() if kl_weight else -len(curve)
            if objective < least:
                least, best = objective, copy.deepcopy(now["net"])
        noise = torch.randn(args.samples, 2, generator=rng, device=rng.device)
        with torch.no_grad():
            path, _ = ddpo.sample_path(best, net, noise, levels, rng)
        done(method, path[-1], now["evaluations"] + args.samples * args.steps, curve)

    noise = torch.randn(args.samples, 2, generator=rng, device=rng.device)
    done("pretrained", dav.ancestral(net, noise, levels, rng), args.samples * args.steps)
    done("target", problem.target.sample(args.samples, rng), 0)

    options = das.parse_args([*sizes["das"], "--kl-weight", str(problem.kl_weight)])
    out = das.sample(problem, net, options, rng, options.groups * options.particles, options.particles,
                     max_shift=options.max_shift, ess=options.ess)
    drawn = das.resample(out["log_w"], "systematic", rng) + torch.arange(options.groups)[:, None].to(
        out["log_w"].device) * options.particles
    done("das", out["x"][drawn.flatten()], out["evaluations"])
    if not ring:
        options = guidance.parse_args([*sizes["guidance"], "--samples", str(args.samples)])
        out, sweep = guidance.run_methods(problem, net, options, rng)
        tried = len(sweep) * options.sweep + args.samples
        done("guidance", out["guidance_tuned"]["x"], tried * options.steps)

    for method, kl_weight in dict(ddpo=problem.kl_weight, ddpo_no_kl=0.0).items():
        train(method, ddpo.ddpo(problem, net, levels, rng, kl_weight, **sizes["ddpo"]), kl_weight)
    for method, (kl_weight, horizon) in dict(draft=(problem.kl_weight, None), draft_no_kl=(0.0, None),
                                             draft_1=(0.0, 1)).items():
        if ring or method != "draft_1":
            lr = dict(lr=2e-3) if ring and kl_weight else {}  # the higher rate leaves modes behind on the ring
            train(method, draft.draft(problem, net, levels, rng, kl_weight, horizon, **sizes["draft"], **lr), kl_weight)
    levels = dav.search_levels(args.steps + 1)
    for method, kl in dict(dav=0.0, dav_kl=0.3).items() if ring else ():
        curve, search_curve = [], []
        for k, tuned, out in dav.dav(net, problem.reward, levels, rng, kl=kl, **sizes["dav"]):
            noise = torch.randn(args.samples, 2, generator=rng, device=rng.device)
            x, found = dav.ancestral(tuned, noise, levels, rng), dav.search_samples(out, rng)
            trained = out["evaluations"] - len(found) * args.steps  # before this search
            curve.append((trained, measures(problem, x)))
            search_curve.append((out["evaluations"], measures(problem, found)))
        done(method, x, trained + args.samples * args.steps, curve)
        if method == "dav":
            done("posterior", found, out["evaluations"], search_curve)
    return results


def run_job(args, name, seed):
    """`run_methods` on one problem with one seed, on one thread of a process of its own, and the EMD of each result."""
    torch.set_num_threads(1)
    with contextlib.redirect_stderr(io.StringIO()) as said:  # several jobs would write over each other
        try:
            return job_results(args, name, seed)
        except SystemExit:
            print(said.getvalue().splitlines()[-1], file=sys.__stderr__)
            raise


def job_results(args, name, seed):
    """What `run_job` returns: {method: dict(x (N, 2) array, emd, evaluations, seconds, curve)}."""
    rng, problem = torch.Generator(args.device).manual_seed(seed), make_problem(name, args.device)
    settings = dict(problem="ring" if name in dav.REWARDS else name, steps=args.train_steps, seed=seed)
    net = das.cached_denoiser(args.out / "cache", settings, problem.data.sample, das.noise_levels(), args.device)
    results = run_methods(problem, net, args, rng)
    for out in results.values():
        out["x"] = out["x"][torch.randperm(len(out["x"]), generator=torch.Generator().manual_seed(seed))]  # from groups
        w = torch.ones(len(out["x"]))
        out["emd"] = das.emd_to_target(out["x"], w, problem.target, rng, args.subsamples)[0]
        out["x"] = out["x"].numpy()
    return results


def collect(args):
    """All problems and seeds, several at a time -> {problem: {method: list of results, by seed}}."""
    jobs = [(name, args.seed + k) for k in range(args.seeds) for name in args.problem]
    found = {}
    workers = min(args.jobs, len(jobs)) if args.device == "cpu" else 1
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        print(f"{len(jobs)} problems and seeds, {workers} at a time", file=sys.stderr)
        waiting = {pool.submit(run_job, args, *job): job for job in jobs}
        for done, future in enumerate(concurrent.futures.as_completed(waiting)):
            found[waiting[future]] = future.result()
            das.progress("problems and seeds", done + 1, len(jobs))
    return {name: {method: [found[name, args.seed + k][method] for k in range(args.seeds)]
                   for method in found[name, args.seed]} for name in args.problem}


def measure(problem, results):
    """Rows of one problem: means over seeds, and as se the standard deviation over seeds."""
    rows = []
    exact = dict(mean_reward=problem.target_reward, modes=int((problem.masses > 0.01).sum()), coverage=1.0,
                 spread=problem.spread)
    for method, runs in results.items():
        values = [dict(measures(problem, torch.as_tensor(run["x"])), **run) for run in runs]
        for key in ("mean_reward", "emd", "modes", "coverage", "spread", "evaluations", "seconds"):
            v = torch.tensor([value[key] for value in values]).double()
            sd = v.std().item() if len(v) > 1 else None
            mean = round(v.mean().item()) if key == "evaluations" else v.mean().item()
            rows.append(dict(das.row(f"{method}.{problem.name}.{key}", mean, sd, exact.get(key)), z=None))
    return rows


# ---- the figures -----------------------------------------------------------------------------------------------------


def draw_panels(path, problems, results, rows):
    """DAS Fig. 1: samples of the first seed over contours of the exact target, a line a problem."""
    value = {r["name"]: r["estimate"] for r in rows}
    methods = ("pretrained", "target", "ddpo_no_kl", "ddpo", "draft_no_kl", "draft", "guidance", "das")
    figure, axes = plt.subplots(len(problems), len(methods), squeeze=False, layout="constrained",
                                figsize=(1.85 * len(methods), 2.3 * len(problems)))
    span = torch.linspace(-6.5, 6.5, 181)
    for line, problem in zip(axes, problems):
        log_p = problem.target.log_prob(torch.cartesian_prod(span, span).to(problem.masses.device).float())
        for ax, method in zip(line, methods):
            x = results[problem.name][method][0]["x"][:1500]
            ax.contour(span, span, log_p.view(181, 181).T.cpu(), [-9, -6, -3], colors="black", linewidths=0.4,
                       linestyles="solid")
            ax.scatter(*x.T, s=2, c="#555555" if method == "target" else "#0072B2", alpha=0.5, linewidths=0)
            numbers = [value[f"{method}.{problem.name}.{key}"] for key in ("mean_reward", "emd")]
            ax.set_title(f"{TITLES[method]}\nE[r] {numbers[0]:.2f}   EMD {numbers[1]:.2f}", fontsize=9)
            ax.set(xticks=[], yticks=[], aspect="equal", xlim=(-6.5, 6.5), ylim=(-6.5, 6.5))
        line[0].set_ylabel(problem.name)
    das.save_figure(figure, path)


def draw_dynamics(path, problems, results):
    """DAV Fig. 2: reward against coverage and against spread, over training; the end of each seed is marked."""
    figure, axes = plt.subplots(len(problems), 3, squeeze=False, figsize=(12.5, 3.4 * len(problems) + 0.5),
                                layout="constrained")
    for line, problem in zip(axes, problems):
        exact = (None, problem.target_reward, 1.0, problem.spread)
        for method, color in COLORS.items():
            for k, run in enumerate(results[problem.name][method]):
                curve = [(n / 1e6, v["mean_reward"], v["coverage"], v["spread"]) for n, v in run["curve"]]
                for ax, x, y in zip(line, (0, 1, 1), (1, 2, 3)):
                    if k == 0 and len(curve) > 1:
                        ax.plot([p[x] for p in curve], [p[y] for p in curve], color=color, linewidth=1)
                    ax.plot(curve[-1][x], curve[-1][y], "D" if method == "das" else "o", color=color, markersize=4,
                            label=TITLES[method] if k == 0 else None)
        line[0].axhline(exact[1], color="black", linestyle=":", label="exact target")
        for ax, y in zip(line[1:], (2, 3)):
            ax.plot(exact[1], exact[y], "k*", markersize=12, label="exact target")
        line[0].set(xlabel="network evaluations, millions", ylabel=f"{problem.name}: E[r]")
        line[1].set(xlabel="E[r]", ylabel="coverage of the target's modes")
        line[2].set(xlabel="E[r]", ylabel="spread within modes")
    figure.legend(*axes[0, 1].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    das.save_figure(figure, path)


# ---- main ------------------------------------------------------------------------------------------------------------


def main(args):
    """Run all problems and seeds, draw both figures, write numbers.json -> {row name: estimate}."""
    start, out = time.perf_counter(), das.results_folder(args, "toy_compare")
    results, problems = collect(args), [make_problem(name, "cpu") for name in args.problem]
    rows = [r for problem in problems for r in measure(problem, results[problem.name])]
    mixtures, rings = ([p for p in problems if (p.name in dav.REWARDS) == ring] for ring in (False, True))
    if mixtures:
        draw_panels(out / "figure.png", mixtures, results, rows)
    if rings:
        draw_dynamics(out / "dynamics.png", rings, results)
    evaluations = sum(run["evaluations"] for found in results.values() for runs in found.values() for run in runs)
    das.write_numbers(out / "numbers.json", args, rows, evaluations, time.perf_counter() - start)
    for problem in problems:
        das.print_table(rows, problem.name, ["mean_reward", "emd", "modes", "coverage", "spread", "evaluations",
                                             "seconds"])
    return {r["name"]: r["estimate"] for r in rows}


if __name__ == "__main__":
    main(parse_args())
