"""Align Stable Diffusion under reward constraints: the least KL from the base model that meets every threshold.

Paper: Khalafi, Hounie, Ding and Ribeiro, "Composition and Alignment of Diffusion Models using Constrained Learning",
NeurIPS 2025, arXiv 2508.19104: the counterpart of its Fig. 3 (problem `learned`: a learned reward in the objective,
saturation and local contrast constrained) and Fig. 4 (`several`: every reward constrained).

Run    python sd/constrained_alignment.py                miniature model, both problems                   16 CPU minutes
       python sd/constrained_alignment.py --quick        the same, coarse: shows nothing            20 CPU seconds
       python sd/constrained_alignment.py --resume       continue after an interruption
       python sd/constrained_alignment.py --problem learned --threshold 0.5 0.25     looser thresholds
       On a GPU (not run here): --model stable-diffusion-v1-5/stable-diffusion-v1-5 --reward aesthetic pickscore
       --clip openai/clip-vit-large-patch14 --clip-eval laion/CLIP-ViT-H-14-laion2B-s32B-b79K --paper --dtype bfloat16
       --chunk 1 --device cuda

The adapters are in out/sd_constrained_alignment/<problem>_<method>; diffusers loads them: pipe.load_lora_weights(...).

Notation (here -> paper)
       q, p            -> q, p        base and aligned model
       r_i, threshold  -> r_i, b_i    E_p[r_i] >= b_i; a reward counts from the base model's mean for the prompt, in the
                                      base model's standard deviations within a prompt
       dual            -> lambda      multipliers >= 0, nats per standard deviation
       objective       -> E_p[r_0]    what is maximised, less the KL; its weight is that of --reward
       kl                             of the whole paths, sum_t beta_t^2 / (2 sigma_t^2) |s_p - s_q|^2 (Lemma 1), nats
       tilt                           q exp(objective + dual' r) / Z per prompt, the best of all models at given dual

Algorithm (Algorithm 1 of the paper, by back-propagation through the sampler)
       1. draw latents with the adapter; at each step, predict with the adapter off as well           `roll_out`
       2. decode, reward, descend KL - objective - sum_i dual_i r_i           `lagrangian_update`, `gains`
       3. raise dual_i where r_i is below its threshold, lower it where above; answer to its change as well, since the
          adapter follows the multipliers some rounds late                                    `dual_update`
       4. repeat; what is returned are averages over the last half, of adapter and multipliers        `train_adapter`
       `equal` gives every reward the same weight, as a penalty method does, of the same sum.

What you should see (mean ± standard deviation over 3 seeds, thresholds all 1): the multipliers overshoot, turn back
within some 15 rounds, and wander from then on, as a round has 12 images. `learned`: saturation 1.03±0.04 and contrast
1.05±0.03, by multipliers of 1.8±0.5 and 6.0±1.7; equal weights have 1.21±0.22 and 0.77±0.05, too much and too little.
`several`: CLIP 1.01±0.11, saturation 1.04±0.04, contrast 1.08±0.04, for 7.8±0.7 nats; equal weights 0.71±0.06,
1.98±0.14 and 1.18±0.05 for 9.2±1.2. Five of the six runs meet every threshold within 2%, the sixth misses CLIP by 11%
(± 5); equal weights miss one by 18 to 35%.
The dotted lines are the best of all models (row tilt): an adapter pays two to five times its nats.
To try: --dual ascent, the paper's: wider swings; --problem learned --threshold 4 4: more than the base model's images do.
"""
import argparse
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
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from scipy.optimize import linprog, minimize
from torch.utils.checkpoint import checkpoint

PRESETS = {  # what the size flags default to
    "quick": dict(updates=4, batch=4, steps=4, images=16),
    "default": dict(updates=64, batch=12, steps=10, images=64),
    "paper": dict(updates=40, batch=64, steps=15, images=64),
}
THRESHOLDS = {"learned": {"saturation": 1.0, "contrast": 1.0}, "several": {"saturation": 1.0, "contrast": 1.0}}
REWARDS = ("jpeg", "saturation", "contrast", "clip", "pickscore", "aesthetic")
PROMPTS = ["a photo of a cat", "a photo of a horse", "a photo of a fish", "a photo of a butterfly"]
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def parse_args(argv=None):
    parser = common_parser(__doc__)
    model_flags(parser, PROMPTS, [("clip", 1.0)])
    training_flags(parser, 1e-3)
    parser.add_argument("--problem", nargs="+", choices=list(THRESHOLDS), default=list(THRESHOLDS))
    parser.add_argument("--threshold", nargs="+", type=positive(float), help="those of the one --problem, in its order")
    parser.add_argument("--dual", choices=["ascent", "nupi"], default="nupi", help="ascent is the paper's, and circles")
    parser.add_argument("--dual-lr", type=positive(float), default=0.5, help="step of the multipliers")
    parser.add_argument("--dual-start", type=positive(float), default=4.0, help="the multipliers at first: an adapter "
                        "pays far more nats for a standard deviation than the best of all models")
    parser.add_argument("--weight", type=positive(float), help="of every reward in the row `equal`; default: same sum")
    args = parser.parse_args(argv)
    check_training_flags(parser, args)
    if {"jpeg", "saturation", "contrast"} & set(dict(args.reward)):
        parser.error("--reward takes the learned rewards here: clip, pickscore, aesthetic")
    if args.threshold and (len(args.problem) > 1 or len(args.threshold) != len(make_problem(
            args.problem[0], argparse.Namespace(reward=args.reward, threshold=None)).thresholds)):
        parser.error("--threshold needs one --problem, and as many values as it has constraints")
    return args


# ---- shared: flags, models and rewards of every script of this folder ------------------------------------------------


def model_flags(parser, prompts, rewards):
    """Add the flags that say which model draws what for which rewards; prompts and rewards are the defaults."""
    parser.add_argument("--model", default="sd/mini", help="folder in the layout of diffusers, or hub id")
    parser.add_argument("--lora", help="folder or hub id of an adapter to load")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--prompts", type=prompt_list, nargs="+", action=Joined, default=prompts,
                        help="prompts, or a .txt file with one a line")
    parser.add_argument("--reward", type=weighted_name, nargs="+", default=rewards, help="NAME or NAME=WEIGHT, of "
                        f"{', '.join(REWARDS)}; jpeg is compressibility, jpeg=-1 incompressibility")
    parser.add_argument("--clip", default="sd/mini/clip_reward", help="CLIP model of the rewards clip and aesthetic")
    parser.add_argument("--clip-eval", default="sd/mini/clip_eval", help="CLIP model that only evaluates")
    parser.add_argument("--pickscore", default="yuvalkirstain/PickScore_v1", help="CLIP model of that reward")
    parser.add_argument("--aesthetic", default="sac+logos+ava1-l14-linearMSE.pth", help="file of LAION's head")
    parser.add_argument("--steps", type=positive(int), help="sampling steps, at most 1000")
    parser.add_argument("--guidance", type=positive(float), default=4.0, help="classifier-free guidance, 1 is none")
    parser.add_argument("--chunk", type=positive(int), default=64,
                        help="images in one call, of all processes together: this sets the memory")


class Joined(argparse.Action):
    """The lists that a flag's type makes of its words, joined into one."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, sum(values, []))


def prompt_list(text):
    """An argparse type: a prompt, or a .txt file of prompts -> list of prompts."""
    if not text.endswith(".txt"):
        lines = [text]
    else:
        try:
            lines = pathlib.Path(text).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise argparse.ArgumentTypeError(f"{text} cannot be read ({type(error).__name__})") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise argparse.ArgumentTypeError(f"{text!r} holds no prompt")
    return prompts


def weighted_name(text):
    """An argparse type: NAME or NAME=WEIGHT of a reward -> (name, weight)."""
    name, _, weight = text.partition("=")
    if name not in REWARDS:
        raise argparse.ArgumentTypeError(f"there is no reward {name!r}, only {', '.join(REWARDS)}")
    try:
        weight = float(weight or 1)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise argparse.ArgumentTypeError(f"the weight of {text!r} is no number")
    return name, weight


def load_world(args):
    """The models of model_flags: a namespace of pipe, unet, scheduler, decode (latents -> images), shape (C, h, w),

    the embeddings cond (K, L, d) of the K prompts and uncond (1, L, d) of the empty one; rewards, see load_rewards;
    judge, the CLIP model that only evaluates, and judge_texts (K, d), unit vectors of the prompts there.
    """
    dtype = getattr(torch, args.dtype)
    pipe = load_pipeline(args.model, args.device, dtype)
    if args.lora:
        load_adapter(pipe, args.lora)
    judge, size = load_clip(args.clip_eval, args.device, dtype), pipe.unet.config.sample_size
    return types.SimpleNamespace(
        pipe=pipe, unet=pipe.unet, scheduler=pipe.scheduler, decode=image_decoder(pipe.vae, args.chunk),
        shape=(pipe.unet.config.in_channels, size, size), cond=encode_prompts(pipe, args.prompts),
        uncond=encode_prompts(pipe, [""]), rewards=load_rewards([name for name, _ in args.reward], args),
        judge=judge, judge_texts=clip_text(judge, args.prompts))


def load_rewards(names, args):
    """{name: function of images (n, 3, H, W) in [0, 1] and the number of their prompt -> rewards (n,), float32}.

    The number counts args.prompts: an integer for all images, or a tensor (n,). All but jpeg have a gradient.
    """
    dtype = getattr(torch, args.dtype)
    plain = dict(jpeg=jpeg_reward, saturation=saturation_reward, contrast=contrast_reward)
    clip = load_clip(args.clip, args.device, dtype) if {"clip", "aesthetic"} & set(names) else None
    if "aesthetic" in names:
        plain["aesthetic"] = aesthetic_reward(clip, args.aesthetic)
    rewards = {name: lambda images, number, reward=reward: reward(images) for name, reward in plain.items()}
    if "clip" in names:
        rewards["clip"] = clip_reward(clip, args.prompts)
    if "pickscore" in names:
        net = load_clip(args.pickscore, args.device, dtype)
        rewards["pickscore"] = clip_reward(net, args.prompts, net.net.logit_scale.exp().item())  # about 20
    return {name: rewards[name] for name in names}


def jpeg_reward(images):
    """Compressibility: minus the kilobytes of a JPEG file of quality 95 (DDPO), (n, 3, H, W) -> (n,). No gradient."""
    sizes = []
    for pixels in (images_in_range(images.detach()) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="JPEG", quality=95)
        sizes.append(-file.tell() / 1000)
    return torch.tensor(sizes, device=images.device)


def saturation_reward(images):
    """Mean of (max - min) / max over the colours of a pixel, images (n, 3, H, W) in [0, 1] -> (n,)."""
    high, low = images_in_range(images).amax(1), images.amin(1)
    return ((high - low) / (high + 1e-8)).mean((1, 2))


def contrast_reward(images):
    """Local contrast: mean distance of the luminance from its Gaussian blur (5 x 5, sigma 1), (n, 3, H, W) -> (n,)."""
    gray = torch.einsum("nchw,c->nhw", images_in_range(images), torch.tensor([0.2126, 0.7152, 0.0722]).to(images))
    line = torch.exp(-0.5 * torch.arange(-2.0, 3.0).to(images) ** 2)
    kernel = torch.outer(line, line) / line.sum() ** 2
    blur = F.conv2d(F.pad(gray[:, None], (2, 2, 2, 2), mode="reflect"), kernel[None, None])[:, 0]
    return (gray - blur).abs().mean((1, 2))


def clip_reward(clip, prompts, scale=1.0):
    """The function: images (n, 3, H, W) in [0, 1] and the number of their prompt -> cosine with it times scale (n,)."""
    texts = scale * clip_text(clip, prompts)
    return lambda images, number: (clip_images(clip, images) * texts[number]).sum(1)


def aesthetic_reward(clip, path):
    """The function: images (n, 3, H, W) in [0, 1] -> LAION's aesthetic score (n,), about 1 to 10.

    Its five linear layers have nothing between them but dropout: they are one, their product, on CLIP ViT-L/14.
    """
    try:
        state = torch.load(path, map_location=clip.net.device, weights_only=True)
        weight = torch.eye(clip.net.config.projection_dim, device=clip.net.device)
        bias = torch.zeros(len(weight), device=clip.net.device)
        for layer in (0, 2, 4, 6, 7):
            matrix, offset = (state[f"layers.{layer}.{part}"].float() for part in ("weight", "bias"))
            weight, bias = matrix @ weight, matrix @ bias + offset
    except (OSError, KeyError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        fail(f"The reward aesthetic needs LAION's file sac+logos+ava1-l14-linearMSE.pth, from "
             f"github.com/christophschuhmann/improved-aesthetic-predictor, by --aesthetic, and --clip "
             f"openai/clip-vit-large-patch14: {path} does not fit ({type(error).__name__}).")
    return lambda images: clip_images(clip, images) @ weight[0] + bias


# ---- the problem -----------------------------------------------------------------------------------------------------


def make_problem(name, args):
    """A namespace of name, objective {reward: weight} and thresholds {reward: threshold}, in standard deviations.

    `learned` has the rewards of --reward in the objective and constrains the colours; `several` constrains them all.
    """
    rewards = dict(args.reward)
    thresholds = THRESHOLDS[name] if name == "learned" else {key: 1.0 for key in rewards} | THRESHOLDS[name]
    if args.threshold:
        thresholds = dict(zip(thresholds, args.threshold))
    return types.SimpleNamespace(name=name, objective=rewards if name == "learned" else {}, thresholds=thresholds)


def best_tilt(problem, r):
    """What the best of all models does, by importance sampling from rewards r {name: (K, n)} of the base model.

    -> the multipliers (k,) that maximise D(dual) = dual' b - mean over prompts of log E_base[exp(objective + dual' r)],
    and the weights (K, n) of the images there. Ends with one sentence where no weights at all meet the thresholds.
    """
    b = torch.tensor(list(problem.thresholds.values()), dtype=torch.float64)
    values = torch.stack([r[name] for name in problem.thresholds]).double().cpu()  # (k, K, n)
    fixed = sum((w * r[name].double().cpu() for name, w in problem.objective.items()), torch.zeros_like(values[0]))
    check_feasible(values.flatten(1), b)

    def energy(dual):
        return fixed + torch.einsum("k,kpn->pn", dual, values)

    def dual_function(dual):
        mean = torch.einsum("pn,kpn->k", energy(dual).softmax(1), values) / values.shape[1]
        return (dual @ b - log_mean_exp(energy(dual)).mean()).item(), b - mean

    dual = maximise_dual(dual_function, len(b), 0)
    return dual, energy(dual).softmax(1)


def check_feasible(r, b):
    """End with one sentence where no distribution over the points has E[r_i] >= b_i: r (k, M), b (k,).

    max over p of min_i (E_p[r_i] - b_i) is a linear program. Where it is negative, its multipliers w >= 0 show a ray
    on which D(t w) grows without bound: those dual variables would diverge.
    """
    k, count = r.shape
    cost = np.zeros(count + 1)
    cost[-1] = -1  # the last variable is the worst slack
    rows = np.hstack([-r.cpu().numpy(), np.ones((k, 1))])
    total = np.hstack([np.ones((1, count)), [[0]]])
    found = linprog(cost, rows, -b.numpy(), total, [1], [(0, None)] * count + [(None, None)])
    slack, share = -found.fun, -found.ineqlin.marginals
    if slack < 0:
        names = " and ".join(f"E[r_{i + 1}] >= {b[i]:g}" for i in range(k) if share[i] > 1e-6)
        fail(f"No model meets {names}: the best is short by {-slack:.3g}, and the multiplier would grow for ever;"
             " lower the threshold.")


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


def log_mean_exp(log_w):
    """log_w (G, P) -> log of the mean weight (G,)."""
    return log_w.logsumexp(1) - math.log(log_w.shape[1])


# ---- the method ------------------------------------------------------------------------------------------------------


def dual_update(dual, gap, memory, ki, kp=0.0, nu=0.0):
    """One step of nuPI (Sohrabi et al. 2024) on the multipliers (m,), before projection -> dual, memory.

    dual + ki gap + kp (change of the moving average nu memory + (1 - nu) gap); kp = 0 is dual ascent.
    """
    average = nu * memory + (1 - nu) * gap
    return dual + ki * gap + kp * (average - memory), average


def lagrangian_update(world, problem, args, fixed=None):
    """The function that `train_adapter` calls for one round of Algorithm 1; its state holds dual and memory (k,).

    Descends KL - objective - sum_i dual_i r_i through the whole roll-out, so that no term of the gradient of the KL is
    left out; then raises dual_i where r_i was below its threshold, lowers it where above. From r_i is taken what the
    base model gets from the same noise, zero in the mean: that leaves less noise in the multipliers. fixed {reward:
    weight} takes the place of objective and multipliers, which is the penalty method.
    """
    timesteps, abar = path_schedule(world.scheduler, args.steps)
    b = torch.tensor(list(problem.thresholds.values()), dtype=torch.float64, device=args.device)
    damping = dict(kp=4 * args.dual_lr, nu=0.5) if args.dual == "nupi" else {}

    def update(rng, descend, state):
        dual = {name: value.item() for name, value in zip(problem.thresholds, state["dual"])}
        weight = fixed or problem.objective | dual
        number, totals = draw_prompts(len(world.cond), args.batch, args.batch, rng), dict.fromkeys(world.spread, 0.0)
        noise = path_noise(world, args, args.batch, rng)
        for part, z in zip(number.split(args.chunk), noise.split(args.chunk, 1)):
            policy = prompted(world, args, part)
            base = without_adapter(world.unet, policy)
            x, kl = roll_out(policy, base, z, timesteps, abar, args.eta, None, args.chunk < args.batch)
            r = gains(world, world.decode(x), part)
            r0 = {}
            if fixed is None:
                with torch.no_grad():
                    r0 = gains(world, world.decode(roll_out(base, None, z, timesteps, abar, args.eta)[0]), part)
            ((kl - sum(value * r[name] for name, value in weight.items())).sum() / args.batch).backward()
            for name, value in dict(r, kl=kl).items():
                excess = value.detach() - r0.get(name, torch.zeros_like(kl))
                totals[name] = totals.get(name, 0.0) + excess.sum().item() / args.batch
        descend()
        if fixed is None:
            gap = b - b.new_tensor([totals[name] for name in problem.thresholds])
            dual_now, state["memory"] = dual_update(state["dual"], gap, state["memory"], args.dual_lr, **damping)
            state["dual"] = dual_now.clamp(min=0)
        return totals | ({} if fixed else {f"dual_{name}": value for name, value in dual.items()})

    return update


def run_methods(world, problem, args, out):
    """The constrained adapter, then one with equal weights -> {method: measured images}, {method: trace}, {dual: ...}.

    The multipliers are averages over the last half, as the adapter is. The equal weights have the same sum as the
    multipliers and the objective have: what differs is how it is shared out.
    """
    results, traces, late = {}, {}, args.updates // 2
    for method in ("constrained", "equal"):
        fixed = None
        if method == "equal":
            weights = list((problem.objective | dual).values())
            fixed = dict.fromkeys(problem.objective | dual, args.weight or sum(weights) / len(weights))
        start = torch.full((len(problem.thresholds),), args.dual_start, dtype=torch.float64, device=args.device)
        update = lagrangian_update(world, problem, args, fixed)
        traces[method] = train_adapter(f"{problem.name}_{method}", world, update, args, out,
                                       dict(dual=start, memory=torch.zeros_like(start)), averaged=0.5)
        dual = {name: sum(point[f"dual_{name}"] for point in traces[method][late:]) / (args.updates - late)
                for name in problem.thresholds} if fixed is None else dual
        save_adapter(world.unet, out / f"{problem.name}_{method}")
        results[method] = draw_images(world, args, True)
    return results, traces, dict(constrained=dual, equal=fixed)


# ---- the measures ----------------------------------------------------------------------------------------------------


def normalised(world, found):
    """Rewards of measured images as `gains` counts them {name: (K, n)}."""
    return {k: (v - world.level[k][:, None]) / world.spread[k] for k, v in found.rewards.items()}


def measure(world, problem, args, base, results, duals):
    """The rows of a problem; `exact` is what the best of all models does, estimated from the base model's images."""
    name, rows, r0 = problem.name, [], normalised(world, base)
    used = {key: r0[key] for key in problem.objective | problem.thresholds}
    dual, w = best_tilt(problem, r0)
    exact = {key: (w.to(value) * value).sum(1).mean().item() for key, value in used.items()}
    exact["kl"] = (w * (w * w.shape[1]).clamp(min=1e-300).log()).sum(1).mean().item()
    exact |= {f"dual_{key}": value for key, value in zip(problem.thresholds, dual.tolist())}
    exact["ess"] = (1 / (w**2).sum(1)).mean().item()
    if any(exact[key] < b - 0.01 for key, b in problem.thresholds.items()):
        exact = {}  # no weights of so few images meet the thresholds for every prompt
    rows += [row(f"tilt.{name}.{key}", value) for key, value in exact.items()]
    rows += [row(f"threshold.{name}.{key}", value) for key, value in problem.thresholds.items()]
    for method, found in {"base": base, **results}.items():
        r = normalised(world, found)
        rows += [paired_row(f"{method}.{name}.{key}", r[key], before) for key, before in used.items()]
        rows += [row(f"{method}.{name}.dual_{key}", value, exact=exact.get(f"dual_{key}") if method == "constrained"
                     else None) for key, value in duals.get(method, {}).items()]
        short = max((b - r[key].mean().item()) / b for key, b in problem.thresholds.items())
        rows += [row(f"{method}.{name}.violation", max(short, 0.0)),  # the worst, as a share of the threshold
                 paired_row(f"{method}.{name}.kl", found.kl),
                 paired_row(f"{method}.{name}.clip_eval_change", found.clip_eval - base.clip_eval),
                 row(f"{method}.{name}.diversity", found.diversity)]
    return rows


@torch.no_grad()
def draw_images(world, args, adapted):
    """Images of every prompt, from the same noise for every adapter, and what is measured on them -> a namespace of

    images (K, n, 3, H, W), rewards {name: (K, n)} in their own units, kl (K, n), clip_eval (K, n), and diversity, the
    mean of 1 - cosine between two images of a prompt under the CLIP model that only evaluates.
    """
    timesteps, abar = path_schedule(world.scheduler, args.steps)
    found, units = dict(images=[], kl=[], clip_eval=[]), []
    rewards = {name: [] for name in world.rewards}
    for k in range(len(world.cond)):
        rng = torch.Generator(args.device).manual_seed(1000 * args.seed + k)
        policy = prompted(world, args, [k], args.chunk)
        noise = path_noise(world, args, args.images, rng)
        base = without_adapter(world.unet, policy) if adapted else None
        x, kl = roll_out(policy, base, noise, timesteps, abar, args.eta)
        images = world.decode(x)
        unit = clip_images(world.judge, images, args.chunk)
        for name, values in rewards.items():
            values.append(checked(world.rewards[name](images, k), kl.shape))
        for values, value in zip(found.values(), (images.cpu(), kl, unit @ world.judge_texts[k])):
            values.append(value)
        units.append(unit)
        progress("images of prompt", k + 1, len(world.cond))
    stacked = {name: torch.stack(values) for name, values in rewards.items()}
    return types.SimpleNamespace(rewards=stacked, diversity=pair_distance(torch.stack(units)),
                                 **{name: torch.stack(values) for name, values in found.items()})


def measure_base(world, args):
    """Images of the base model; sets world.level {name: (K,)} and world.spread {name: float}, see `gains`."""
    if args.lora:  # a part of the base model from now on
        world.unet.fuse_lora()
        world.unet.unload_lora()
    base = draw_images(world, args, False)
    world.level = {name: values.mean(1) for name, values in base.rewards.items()}
    world.spread = {name: values.var(1).mean().sqrt().item() for name, values in base.rewards.items()}
    if not all(world.spread.values()):
        fail(f"The base model's images all have the same reward: {world.spread}.")
    return base


def paired_row(name, values, before=None, exact=None):
    """A row of the mean of values (K, n), with its standard error within prompts.

    before (K, n), the base model's from the same noise, is known in the mean: the error is that of the difference.
    """
    spread = (values if before is None else values - before).var(1).mean()
    return row(name, values.mean().item(), (spread / values.numel()).sqrt().item(), exact)


def pair_distance(unit):
    """Unit vectors (K, k, d) -> mean of 1 - cosine over the pairs within each of the K sets."""
    k = unit.shape[1]
    return ((1 - unit @ unit.mT).sum((1, 2)) / (k * (k - 1))).mean().item()


# ---- the figure ------------------------------------------------------------------------------------------------------

TITLES = {"base": "base", "constrained": "constrained", "equal": "equal weights"}
COLORS = ("#0072B2", "#D55E00", "#000000", "#CC79A7", "#E69F00")


def draw_problems(path, args, problems, base, results, traces, rows):
    """For every problem: images from the same noise; rewards with their thresholds, multipliers and KL in training."""
    value = {r["name"]: r["estimate"] for r in rows}
    colors = dict(zip(dict.fromkeys(key for p in problems for key in p.thresholds | p.objective), COLORS))
    figure = plt.figure(figsize=(10, 4.7 * len(problems)))
    for part, problem in zip(figure.subfigures(len(problems), 1, squeeze=False)[:, 0], problems):
        grid = part.add_gridspec(4, 3, height_ratios=[1, 1, 1, 3], hspace=0.3, top=0.93, bottom=0.12, left=0.1,
                                 right=0.98)
        draw_lines(part, grid, args, {"base": base, **results[problem.name]}, TITLES)
        panels = [part.add_subplot(grid[3, k]) for k in range(3)]
        for key in problem.thresholds | problem.objective:
            color = colors[key]
            for method, style in (("equal", "--"), ("constrained", "-")):
                panels[0].plot(smoothed(traces[problem.name][method], key, 9), style, color=color, linewidth=1)
            if key in problem.thresholds:
                panels[0].axhline(problem.thresholds[key], color=color, linestyle=":")
                panels[1].plot(smoothed(traces[problem.name]["constrained"], f"dual_{key}", 1), color=color)
                panels[1].axhline(value.get(f"tilt.{problem.name}.dual_{key}", math.nan), color=color, linestyle=":")
            panels[0].plot([], [], color=color, label=key)
        for method, style in (("equal", "--"), ("constrained", "-")):
            panels[2].plot(smoothed(traces[problem.name][method], "kl", 9), style, color="#555555", linewidth=1)
        panels[2].axhline(value.get(f"tilt.{problem.name}.kl", math.nan), color="#555555", linestyle=":")
        panels[0].legend(fontsize=7)
        for ax, title in zip(panels, ("rewards: equal dashed, threshold dotted", "multipliers, best model's dotted",
                                      "KL, nats: equal dashed, least dotted")):
            ax.set_title(f"{problem.name}: {title}", fontsize=8)
            ax.set_xlabel("round", fontsize=8)
    save_figure(figure, path)


# ---- shared: training of adapters ------------------------------------------------------------------------------------


def training_flags(parser, lr):
    """Add the flags of the scripts that train an adapter; lr is the default step of Adam."""
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoints in the folder of results")
    parser.add_argument("--rank", type=positive(int), default=4, help="of the LoRA adapter")
    parser.add_argument("--lr", type=positive(float), default=lr, help="step of Adam")
    parser.add_argument("--updates", type=positive(int), help="rounds of training of each method")
    parser.add_argument("--batch", type=positive(int), help="images of one round")
    parser.add_argument("--eta", type=positive(float), default=1.0, help="noise of the DDIM kernel, at most 1 (DDPM)")
    parser.add_argument("--images", type=positive(int), help="images of each prompt that are measured, at least 2")


def check_training_flags(parser, args):
    """Fill in the sizes of the preset; end where the flags make no sense."""
    for name, value in PRESETS["quick" if args.quick else "paper" if args.paper else "default"].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.steps > 1000 or args.eta > 1:
        parser.error("--steps can be at most 1000 and --eta at most 1")
    if args.images < 2:
        parser.error("--images must be at least 2: diversity is that of two images")
    if args.batch < processes()[0]:
        parser.error(f"--batch {args.batch} cannot be shared out to {processes()[0]} processes")


def fresh_adapter(unet, rank, rng):
    """A new LoRA adapter W + B A on the attention of a UNet -> {name: weight}, float32; A is normal, B zero.

    At first it changes nothing. lora_alpha is the rank, so that a file of the weights alone tells everything.
    """
    import peft
    if getattr(unet, "peft_config", None):
        unet.delete_adapters(list(unet.peft_config))
    unet.add_adapter(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    weights = {name: value for name, value in unet.named_parameters() if "lora_" in name}
    for name, value in weights.items():
        value.data = torch.zeros_like(value, dtype=torch.float32)
        if "lora_A" in name:
            torch.nn.init.normal_(value, std=1 / rank, generator=rng)
    return weights


def save_adapter(unet, folder):
    """Write the adapter as diffusers does: pipe.load_lora_weights(folder) loads it onto the base model."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet, adapter_name="default"))
    write_atomically(folder / "pytorch_lora_weights.safetensors",
                     lambda part: StableDiffusionPipeline.save_lora_weights(part.parent, layers, weight_name=part.name))


def without_adapter(unet, predict_noise):
    """predict_noise(x, t) of the base model: the adapter is off during each call, also one that is made again."""

    def base_noise(x, t):
        unet.disable_adapters()
        try:
            return predict_noise(x, t)
        finally:
            unet.enable_adapters()

    return base_noise


def prompted(world, args, number, chunk=None):
    """predict_noise(x, t) of the UNet with its adapter, for latents of the prompts number (n,), or (1,) for all."""
    return noise_predictor(world.unet, world.cond[number], world.uncond, args.guidance, chunk)


def roll_out(policy, base, noise, timesteps, abar, eta=1.0, back=None, recompute=False):
    """noise (T + 1, N, ...), that of the start first -> samples (N, ...), KL of their paths from the base (N,), nats.

    Lemma 1: kernels of one variance differ by their means, so that a step costs |mean_p - mean_q|^2 / (2 sigma^2).
    base None: no KL. The gradient of the samples runs through the last `back` steps (None: all); before, x is cut off,
    and only the KL of a step has one. recompute: predict again in the backward pass.
    """
    steps, grad, x = len(timesteps), torch.is_grad_enabled(), noise[0]
    cut, kl = steps - (back or steps), torch.zeros_like(x.flatten(1)[:, 0])

    def kernel(predict, x, i):
        eps = (checkpoint(predict, x, timesteps[i], use_reentrant=False) if recompute and torch.is_grad_enabled()
               else predict(x, timesteps[i]))
        return ddim_kernel((x - (1 - abar[i]) ** 0.5 * eps) / abar[i] ** 0.5, eps, abar[i], abar[i + 1], eta)

    for i in range(steps):
        x = x.detach() if i <= cut else x
        with torch.set_grad_enabled(grad and (i >= cut or base is not None)):
            mean, sigma = kernel(policy, x, i)
            if base is not None:
                kl = kl + (mean - kernel(base, x, i)[0]).flatten(1).pow(2).sum(1) / (2 * sigma**2)
        x = mean + sigma * noise[i + 1]
    return x, kl


def path_noise(world, args, n, rng):
    """The noise of n sampling paths: at the start, then of each step (T + 1, n, C, h, w)."""
    return torch.randn(args.steps + 1, n, *world.shape, generator=rng, device=rng.device)


def draw_prompts(count, batch, most, rng):
    """Numbers of the prompts of a batch, sorted (batch,): at most `most` of the `count` at random, in equal shares."""
    chosen = torch.randperm(count, generator=rng, device=rng.device)[:most]
    return chosen[torch.arange(batch, device=rng.device) % len(chosen)].sort()[0]


def gains(world, images, number):
    """Rewards of images (n, 3, H, W) of the prompts number (n,) -> {name: (n,)}.

    Each is the excess over the base model's mean for its prompt, in the base model's standard deviations.
    """
    raw = {name: checked(reward(images, number), number.shape) for name, reward in world.rewards.items()}
    return {name: (value - world.level[name][number]) / world.spread[name] for name, value in raw.items()}


def train_adapter(name, world, update, args, folder, state=None, averaged=0.25):
    """A fresh adapter trained by args.updates calls of update(rng, descend, state) -> trace, a list of dicts of floats.

    update leaves gradients and calls descend() for a step of Adam; state is a dict of tensors of its own. At the end
    the adapter holds the average of its weights over the last quarter, or the part `averaged`. Twenty times there is a
    checkpoint, with the state of all that is random: --resume gives the same bytes as a run without interruption.
    """
    other = ("out", "resume", "methods", "problem", "images", "chunk", "device")
    settings = json.dumps([name, {key: value for key, value in vars(args).items() if key not in other}])
    path, rng = folder / f"{name}.pt", torch.Generator(args.device).manual_seed(args.seed)
    weights, trace, first, state = fresh_adapter(world.unet, args.rank, rng), [], 0, state or {}
    average = {key: torch.zeros_like(value) for key, value in weights.items()}
    optimizer = torch.optim.Adam(weights.values(), args.lr, betas=(0.9, 0.99))
    if args.resume and path.exists():
        stored = read_checkpoint(path, settings, args.device)
        first, trace, average = stored["step"], stored["trace"], stored["average"]
        optimizer.load_state_dict(stored["optimizer"])
        rng.set_state(stored["rng"].cpu())
        state.update(stored["state"])
        for key, value in weights.items():
            value.data.copy_(stored["weights"][key])

    def descend():
        for value in weights.values():
            value.grad = process_sum(value.grad)  # each process has that of its share of the batch
        if not torch.nn.utils.clip_grad_norm_(weights.values(), 1.0).isfinite():
            fail(f"{name}: the gradient is not finite; lower --lr, or try --dtype bfloat16 or float32.")
        optimizer.step()
        optimizer.zero_grad()

    late = int(args.updates * (1 - averaged))
    for step in range(first, args.updates):
        trace.append(update(rng, descend, state))
        if step >= late:
            for key, value in weights.items():
                average[key] += value.detach() / (args.updates - late)
        if (step + 1) % max(1, args.updates // 20) == 0 or step + 1 == args.updates:
            record = dict(settings=settings, step=step + 1, trace=trace, average=average, state=state,
                          optimizer=optimizer.state_dict(), rng=rng.get_state(),
                          weights={key: value.detach() for key, value in weights.items()})
            write_atomically(path, lambda part: torch.save(record, part))
            now = ", ".join(f"{key} {value:.2f}" for key, value in trace[-1].items())
            progress(f"{name}: {now}; update", step + 1, args.updates)
    for key, value in weights.items():
        value.data.copy_(average[key])
    return trace


def read_checkpoint(path, settings, device):
    """The checkpoint of a training with these settings."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        if state["settings"] != settings:
            fail(f"{path} was trained with other settings ({state['settings']}): delete it, or run without --resume.")
    except (KeyError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        fail(f"{path} is no checkpoint of this script ({type(error).__name__}): delete it to train again.")
    return state


def draw_lines(figure, grid, args, results, titles):
    """A line of images for each method of {method: measured images}, from the same noise; the prompts above."""
    shown, per = min(4, len(args.prompts)), min(4, args.images)
    for line, (method, found) in enumerate(results.items()):
        ax = figure.add_subplot(grid[line, :])
        images = [F.pad(torch.cat(list(prompt[:per]), 2), (2, 2, 2, 2), value=1.0) for prompt in found.images[:shown]]
        ax.imshow(torch.cat(images, 2).permute(1, 2, 0).numpy(), interpolation="bicubic")
        ax.set(xticks=[], yticks=[])
        ax.set_ylabel(titles[method], rotation=0, ha="right", va="center")
        for side in ax.spines.values():
            side.set_visible(False)
        for k, prompt in enumerate(args.prompts[:shown] if line == 0 else ()):
            ax.text((k + 0.5) * images[0].shape[2], -4, prompt, ha="center", va="bottom", fontsize=8)


def smoothed(trace, key, width=5):
    """The moving average of one quantity of a trace, a list of dicts -> (rounds,)."""
    curve = torch.tensor([point[key] for point in trace])
    half = min(width, len(curve)) // 2
    return F.avg_pool1d(F.pad(curve[None], (half, half), mode="replicate"), 2 * half + 1, 1)[0]


# ---- shared: a Stable Diffusion model from a folder or the hub -------------------------------------------------------


def load_pipeline(model, device="cpu", dtype=torch.float32):
    """A frozen StableDiffusionPipeline with the DDIM form of its schedule: Stable Diffusion v1.x or the miniature.

    model is a folder in the layout of diffusers or a hub id. Other kinds of models end in one sentence.
    """
    import diffusers
    import transformers
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    try:
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(str(model), safety_checker=None,
                                                                 requires_safety_checker=False)
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    except Exception as error:  # every library below raises its own
        fail(f"{model} is no Stable Diffusion model: neither a folder with model_index.json, unet, vae, text_encoder, "
             f"tokenizer and scheduler, nor an id that the hub gives now ({type(error).__name__}). Where there is a "
             f"network: hf download {model}.")
    if pipe.scheduler.config.prediction_type != "epsilon" or pipe.unet.config.in_channels != 4:
        fail(f"{model} does not predict the noise of 4 latent channels, as Stable Diffusion v1.x does.")
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False).to(device, dtype).eval()
    return pipe


def load_adapter(pipe, folder, name="default"):
    """Load frozen LoRA weights, as diffusers saves them for a pipeline, onto the UNet under a name; switch them on."""
    try:
        pipe.load_lora_weights(str(folder), adapter_name=name, weight_name="pytorch_lora_weights.safetensors")
    except Exception as error:  # every library below raises its own
        fail(f"{folder} holds no LoRA weights of this UNet in a file pytorch_lora_weights.safetensors "
             f"({type(error).__name__}).")
    pipe.unet.requires_grad_(False).to(pipe.unet.device, pipe.unet.dtype)


def load_clip(model, device="cpu", dtype=torch.float32):
    """A frozen CLIPModel (OpenAI, LAION, PickScore, or one of the miniature's) -> namespace of net and tokenizer."""
    import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        net = transformers.CLIPModel.from_pretrained(str(model)).requires_grad_(False).to(device, dtype).eval()
        return types.SimpleNamespace(net=net, tokenizer=transformers.CLIPTokenizer.from_pretrained(str(model)))
    except Exception as error:  # every library below raises its own
        fail(f"{model} is no CLIP model: neither a folder with config.json, model.safetensors and a tokenizer, nor an "
             f"id that the hub gives now ({type(error).__name__}). Where there is a network: hf download {model}.")


def processes():
    """How many processes work together, see `join_processes`, and the number of this one."""
    return (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)


def process_sum(x):
    """The sum of a tensor over the processes."""
    if processes()[0] > 1:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
    return x


def over_processes(function):
    """function of tensors (n, ...) whose rows are independent -> (n, ...), each process working out a share of the n.

    All processes get all rows, and the whole gradient of the tensors; that of a weight is the one of their share.
    """

    def shared(*tensors):
        (count, number), n = processes(), len(tensors[0])
        if count == 1:
            return function(*tensors)
        size = -(-n // count)  # where count does not divide n, the last row is worked out again
        mine = torch.arange(number * size, number * size + size, device=tensors[0].device).clamp(max=n - 1)
        tensors = [tensor.view_as(tensor) for tensor in tensors]
        for tensor in tensors:
            if tensor.requires_grad:
                tensor.register_hook(process_sum)
        own = function(*(tensor[mine] for tensor in tensors))
        parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(count)]
        dist.all_gather(parts, own.detach().contiguous())
        parts[number] = own  # the same numbers, with a gradient
        return torch.cat(parts)[:n]

    return shared


def in_chunks(function, chunk, *tensors):
    """function of the tensors (n, ...) in slices of `chunk` (None: all at once) -> its results (n, ...) joined.

    Where a gradient is wanted, each slice is computed again in the backward pass: memory is that of one slice.
    """
    if (chunk or processes()[0]) < processes()[0]:
        fail(f"--chunk {chunk} is less than the {processes()[0]} processes, and counts the images of all of them.")
    parts = list(zip(*(tensor.split(chunk or len(tensor)) for tensor in tensors)))
    if len(parts) > 1 and torch.is_grad_enabled():
        return torch.cat([checkpoint(function, *part, use_reentrant=False) for part in parts])
    return torch.cat([function(*part) for part in parts])


def tokenize(tokenizer, prompts):
    """K prompts -> token ids (K, L) of the tokenizer's full length, the rest cut off."""
    length = tokenizer.model_max_length
    return tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True).input_ids


@torch.no_grad()
def encode_prompts(pipe, prompts):
    """K prompts -> their embeddings (K, L, d) by the text encoder; of [""] the unconditional one."""
    ids = torch.tensor(tokenize(pipe.tokenizer, prompts), device=pipe.text_encoder.device)
    return pipe.text_encoder(ids)[0]


def noise_predictor(unet, cond, uncond=None, guidance=1.0, chunk=None):
    """The function predict_noise(x, t) -> eps of a UNet and prompts, with classifier-free guidance.

    cond (1, L, d), one prompt for all, or (n, L, d), one for each; uncond (1, L, d). predict_noise takes latents x
    (n, C, h, w) and a time step t (int) or (n,), gives eps (n, C, h, w) in the dtype of x, and runs the UNet on
    `chunk` latents at once: eps = eps(uncond) + guidance (eps(cond) - eps(uncond)), without uncond at guidance 1.
    """
    dtype = next(unet.parameters()).dtype

    @over_processes
    def plain(x, t, cond):
        return unet(x.to(dtype), t, encoder_hidden_states=cond.to(dtype)).sample.to(x.dtype)

    def guided(x, t, cond):
        eps, free = plain(x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([cond, uncond.expand_as(cond)])).chunk(2)
        return free + guidance * (eps - free)

    def predict_noise(x, t):
        if len(cond) not in (1, len(x)):
            raise ValueError(f"{len(cond)} prompts for {len(x)} latents")
        t = torch.as_tensor(t, device=x.device).expand(len(x))
        return in_chunks(plain if guidance == 1 else guided, chunk, x, t, cond.expand(len(x), -1, -1))

    return predict_noise


def image_decoder(vae, chunk=None):
    """The function decode(latents (n, C, h, w)) -> images (n, 3, H, W) in [0, 1], float32, with a gradient."""
    dtype = next(vae.parameters()).dtype

    @over_processes
    def part(latents):
        return (vae.decode((latents / vae.config.scaling_factor).to(dtype)).sample.float() / 2 + 0.5).clamp(0, 1)

    return lambda latents: in_chunks(part, chunk, latents)


def images_in_range(images):
    """images (n, 3, H, W), if they lie in [0, 1]: what every reward takes, and asserts."""
    assert images.dim() == 4 and images.shape[1] == 3, f"images have shape {tuple(images.shape)}"
    low, high = images.detach().aminmax()
    assert 0 <= low and high <= 1, f"images reach from {low.item():.3g} to {high.item():.3g}, not within [0, 1]"
    return images


@torch.no_grad()
def clip_text(clip, prompts):
    """K prompts -> unit vectors (K, d), float32."""
    ids = torch.tensor(tokenize(clip.tokenizer, prompts), device=clip.net.device)
    return F.normalize(clip.net.text_projection(clip.net.text_model(input_ids=ids).pooler_output).float(), dim=1)


def clip_images(clip, images, chunk=None):
    """images (n, 3, H, H) in [0, 1] -> unit vectors (n, d), float32, with a gradient; with clip_text: the CLIP score.

    One preprocessing, that of OpenAI's models: bicubic scaling to the model's size, then CLIP_MEAN and CLIP_STD.
    """
    size = clip.net.config.vision_config.image_size
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))

    @over_processes
    def part(images):
        if images.shape[2:] != (size, size):
            images = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        pixels = ((images - mean) / std).to(clip.net.dtype)
        return F.normalize(clip.net.visual_projection(clip.net.vision_model(pixels).pooler_output).float(), dim=1)

    return in_chunks(part, chunk, images_in_range(images))


def path_schedule(scheduler, steps):
    """Time steps (T,) and signal powers (T + 1,) of a sampling path: the result has the schedule's least noise."""
    times, abar = snr_levels(scheduler, steps + 1)
    return times[:-1], abar


def snr_levels(scheduler, count):
    """`count` levels of the model's schedule, evenly spaced in log SNR from noise to data -> time steps, abar, lists.

    Where a step multiplies the SNR by the same factor everywhere, none of them dominates the KL of the paths. The
    steps of diffusers are even in t: the last but one multiplies it by 80 in 10 steps. Where two levels would be the
    same, near the data, they are one time step apart.
    """
    snr = (scheduler.alphas_cumprod.double() / (1 - scheduler.alphas_cumprod.double())).log()
    wanted = torch.linspace(snr[-1].item(), snr[0].item(), count, dtype=torch.float64)
    times = (snr[:, None] - wanted).abs().argmin(0).maximum(torch.arange(count).flip(0))
    if count > len(snr) or times.unique().numel() < count:
        fail(f"The model's schedule has no {count} different levels: take fewer steps.")
    return times.tolist(), scheduler.alphas_cumprod.double()[times].tolist()


def ddim_kernel(x0_hat, eps, abar, abar_next, eta):
    """Mean (N, ...) and standard deviation (float) of p(x_{t-1} | x_t); eta = 1 is DDPM. DDIM (Song 2021) eq. 12."""
    sigma = eta * ((1 - abar_next) / (1 - abar) * (1 - abar / abar_next)) ** 0.5
    return abar_next**0.5 * x0_hat + max(1 - abar_next - sigma**2, 0.0) ** 0.5 * eps, sigma


def checked(value, shape):
    """value, a reward or its gradient, if it has this shape and is finite."""
    if value.shape != shape or not value.isfinite().all():
        fail(f"The reward must be one finite number per sample, with a finite gradient: expected shape {tuple(shape)}, "
             f"got {tuple(value.shape)}, {int((~value.isfinite()).sum())} of them not finite.")
    return value


# ---- shared: command line and files ----------------------------------------------------------------------------------


def join_processes():
    """Under `accelerate launch`, become one of its processes, with the GPU of its number; the first writes and speaks.

    Every process runs the whole script from the same seeds: all of them draw all the noise and have every particle,
    path, reward and multiplier, so that no method need know of the others. What takes the time, a network on a batch,
    is shared out (`over_processes`), and the gradients of the weights are summed (`train_adapter`).
    """
    count, gpus = int(os.environ.get("WORLD_SIZE", 1)), torch.cuda.device_count()
    if count > 1 and not dist.is_initialized():
        if 0 < gpus <= int(os.environ["LOCAL_RANK"]):
            fail(f"{count} processes need as many GPUs, and here are {gpus}: start fewer, or hide the GPUs.")
        if gpus:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
    if processes()[1]:
        silent = dict.fromkeys(("progress", "write_atomically", "write_numbers", "print_table"), lambda *_: None)
        globals().update(silent, fail=lambda _: sys.exit(2))


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
    """Solve every problem, measure all on the same noise, write figure and numbers.json -> {row name: estimate}."""
    start, out = time.perf_counter(), results_folder(args, "sd_constrained_alignment")
    problems = [make_problem(name, args) for name in args.problem]
    world = load_world(args)
    names = list(dict.fromkeys(key for problem in problems for key in problem.objective | problem.thresholds))
    world.rewards = load_rewards(names, args)
    base, results, traces, rows = measure_base(world, args), {}, {}, []
    for problem in problems:
        best_tilt(problem, normalised(world, base))  # ends here where a threshold is out of reach
    for problem in problems:
        results[problem.name], traces[problem.name], duals = run_methods(world, problem, args, out)
        rows += measure(world, problem, args, base, results[problem.name], duals)
    draw_problems(out / "figure.png", args, problems, base, results, traces, rows)
    calls = args.images * len(args.prompts) * (1 + 4 * len(problems)) + 4 * len(problems) * args.updates * args.batch
    calls = calls * args.steps * (2 if args.guidance != 1 else 1)
    write_numbers(out / "numbers.json", args, rows, calls, time.perf_counter() - start)
    for problem in problems:
        keys = list(problem.objective | problem.thresholds)
        keys += [f"dual_{key}" for key in keys]
        print_table(rows, problem.name, [*keys, "kl", "violation", "clip_eval_change", "diversity"])
    return {r["name"]: r["estimate"] for r in rows}


if __name__ == "__main__":
    join_processes()
    main(parse_args())
