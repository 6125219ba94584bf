"""Compose Stable Diffusion models by OR: one adapter that draws what several adapters, or several prompts, draw.

Paper: Khalafi, Hounie, Ding and Ribeiro, "Composition and Alignment of Diffusion Models using Constrained Learning",
NeurIPS 2025, arXiv 2508.19104: its mixture composition (Appendix E, Fig. 2), which it shows in 2D alone. Problem
`prompts` (prompts.png): with an empty prompt, draw any of several concepts. Problem `adapters` (figure.png): with one
adapter, draw what each of several adapters draws.

Run    python sd/or_composition.py                       miniature model, both problems      about 3.5 CPU minutes
       python sd/or_composition.py --methods equal kl elbo           with the losses by denoising too
       python sd/or_composition.py --quick               the same, coarse: shows nothing      less than 70 CPU seconds
       python sd/or_composition.py --resume              continue after an interruption
       python sd/or_composition.py --problem prompts --concepts dog rose "red heart"     other concepts
       On a GPU (not run here): --model stable-diffusion-v1-5/stable-diffusion-v1-5 --paper --dtype bfloat16 --chunk 4
       --clip-eval laion/CLIP-ViT-H-14-laion2B-s32B-b79K --device cuda, and --lora with the folders of sd/draft.py

The adapters are in out/sd_or_composition/<problem>_<method>; diffusers loads them: pipe.load_lora_weights(...).

Notation (here -> paper)
       q_i, p       -> q^i, p        the models, as samplers, and the one that is trained
       weights      -> lambda        multipliers on the simplex, the shares of the mixture
       kl           -> (UF-C)        min over p of max_i KL(q_i || p), of whole sampling paths, nats (Lemma 1): paths of
                                     q_i are drawn, and p's noise prediction is compared with that of q_i
       elbo         -> eq. 70        min over p of max_i of the cross entropy -E log p of samples of q_i, by denoising
       share                         of the images that the CLIP model that only evaluates takes for those of a model

Algorithm
       1. draw paths of every model and keep what it predicts                                   `draw_paths`
       2. train one adapter on the losses of all models, weighted by the multipliers   `kernel_loss`, `denoising_loss`
       3. raise the multipliers of the models that are covered worst           `dual_update`, `project_to_simplex`
       4. repeat; what is returned are averages over the last quarter, of adapter and multipliers     `train_adapter`
       `equal` has the loss of `kl` and equal weights; `elbo` is left out by default. For models that share no image,
       log m nats are enough, the KL from their mixture.

What you should see (mean ± standard deviation over 3 seeds). Adapters: with equal weights the one adapter is 1.1±0.2,
1.2±0.1 and 2.8±0.1 nats from `saturation`, `contrast` and `clip`, with the constrained ones, 0.23, 0.28 and 0.48 (each
± 0.04), 1.7±0.3, 1.7±0.1 and 2.0±0.1: the two that pull the same way share half of the weight. That is near the centre
of the smallest ball around the adapters, and not log 3 = 1.1, the bound of a mixture: by eye and by CLIP the adapters can
hardly be told apart. Prompts: cat, butterfly and fish can, and their KLs fall from 562±4, 842±31 and 669±5 nats to
224±7, 296±25 and 252±5, by constrained weights to 272±18, 275±30 and 251±12: even on average, but hundreds of nats above
log 3, and the worst of a run hardly changes (-5 to +2%). The training is brief: three times the steps, three times as
large, leave 162, 189 and 172 (seed 0). So far off, multipliers do not rule the shares: 73±7% of the images are taken for
butterflies, at a weight of 0.49±0.04.
To try: --problem prompts --updates 72 --lr 6e-3: nearer, but are the shares more even?
"""
import argparse
import importlib.metadata
import io
import json
import math
import os
import pathlib
import pickle
import re
import resource
import sys
import time
import types
import warnings

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.utils.checkpoint import checkpoint

PRESETS = {  # what the size flags default to
    "quick": dict(updates=4, batch=4, steps=4, images=16, primal_steps=2, data=4, levels=5),
    "default": dict(updates=24, batch=8, steps=10, images=32, primal_steps=4, data=32, levels=20),
    "paper": dict(updates=200, batch=32, steps=25, images=64, primal_steps=10, data=256, levels=25),
}
PROMPTS = ["a photo of a cat", "a photo of a butterfly"]
ADAPTERS = ["sd/adapters/saturation", "sd/adapters/contrast", "sd/adapters/clip"]
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def parse_args(argv=None):
    parser = common_parser(__doc__)
    world_flags(parser)
    training_flags(parser, 2e-3)
    parser.add_argument("--problem", nargs="+", choices=["adapters", "prompts"], default=["adapters", "prompts"])
    parser.add_argument("--methods", nargs="+", choices=["equal", "kl", "elbo"], default=["equal", "kl"])
    parser.add_argument("--concepts", nargs="+", default=["cat", "butterfly", "fish"], help="two or more")
    parser.add_argument("--common", default="", help="the prompt that is to draw all of them")
    parser.add_argument("--dual-lr", type=positive(float), default=0.1, help="step of the multipliers")
    parser.add_argument("--primal-steps", type=positive(int), help="training steps between them")
    parser.add_argument("--data", type=positive(int), help="paths of each model and prompt to train on")
    parser.add_argument("--levels", type=positive(int), help="noise levels of the cross entropy, at least 2")
    args = parser.parse_args(argv)
    check_training_flags(parser, args)
    if args.levels < 2 or args.images % 4:
        parser.error("--levels must be at least 2, and --images a multiple of 4")
    if len(set(map(slug, args.concepts))) < max(2, len(args.concepts)):
        parser.error("--concepts needs two or more different ones")
    check_adapters(parser, args)
    return args


# ---- the models ------------------------------------------------------------------------------------------------------


def world_flags(parser):
    """Add the flags that say which models are composed: those of the other scripts that have to do without a reward."""
    parser.add_argument("--model", default="sd/mini", help="folder in the layout of diffusers, or hub id")
    parser.add_argument("--lora", nargs="+", default=ADAPTERS, help="folders or hub ids of the adapters")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--prompts", type=prompt_list, nargs="+", action=Joined, default=PROMPTS,
                        help="prompts of the problem adapters, or a .txt file with one a line")
    parser.add_argument("--clip-eval", default="sd/mini/clip_eval", help="CLIP model that only evaluates")
    parser.add_argument("--steps", type=positive(int), help="sampling steps, some 30 at most")
    parser.add_argument("--guidance", type=positive(float), default=4.0, help="classifier-free guidance, 1 is none")
    parser.add_argument("--chunk", type=positive(int), default=64,
                        help="images in one call, of all processes together: this sets the memory")


def load_models(args):
    """The models of world_flags, as load_world of the other scripts has them, without rewards; the adapters' names."""
    dtype = getattr(torch, args.dtype)
    pipe = load_pipeline(args.model, args.device, dtype)
    size = pipe.unet.config.sample_size
    world = types.SimpleNamespace(
        pipe=pipe, unet=pipe.unet, scheduler=pipe.scheduler, decode=image_decoder(pipe.vae, args.chunk),
        shape=(pipe.unet.config.in_channels, size, size), cond=encode_prompts(pipe, args.prompts),
        uncond=encode_prompts(pipe, [""]), judge=load_clip(args.clip_eval, args.device, dtype))
    world.adapters = attach_adapters(world, args.lora) if "adapters" in args.problem else []
    return world


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


def check_adapters(parser, args):
    """End where two adapters have one name: that of the folder, which stands in the names of the rows."""
    names = [slug(pathlib.Path(folder).name) for folder in args.lora]
    if len(names) < 2 or len(set(names)) < len(names):
        parser.error(f"--lora needs two or more folders of different names, got {' '.join(names)}")


def attach_adapters(world, folders):
    """Load adapters onto the UNet of a world, side by side -> their names, those of the folders."""
    names = [slug(pathlib.Path(folder).name) for folder in folders]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft is surprised that there is more than one
        for name, folder in zip(names, folders):
            load_adapter(world.pipe, folder, name)
    return names


def load_adapter(pipe, folder, name="default"):
    """Load frozen LoRA weights, as diffusers saves them for a pipeline, onto the UNet under a name; switch them on."""
    try:
        pipe.load_lora_weights(str(folder), adapter_name=name, weight_name="pytorch_lora_weights.safetensors")
    except Exception as error:  # every library below raises its own
        fail(f"{folder} holds no LoRA weights of this UNet in a file pytorch_lora_weights.safetensors "
             f"({type(error).__name__}).")
    pipe.unet.requires_grad_(False).to(pipe.unet.device, pipe.unet.dtype)


def with_adapter(unet, name, predict_noise):
    """predict_noise(x, t) of the UNet with this adapter alone on; it may hold others."""

    def adapted_noise(x, t):
        unet.set_adapters(name)
        return predict_noise(x, t)

    return adapted_noise


# ---- the problems ----------------------------------------------------------------------------------------------------


def make_mixtures(world, args):
    """A namespace for each mixture: name, the models' names, prompts (K), and the functions

    teachers(number), noise predictions of the models q_i for latents of the prompts number (n,), and policy(number),
    that of the UNet with whatever adapter it has; texts (m, d), the concepts' prompts in the CLIP model that only
    evaluates, None for adapters.
    """
    found = []
    if "adapters" in args.problem:
        def teachers(number):
            policy = prompted(world, args, number, args.chunk)
            return [with_adapter(world.unet, name, policy) for name in world.adapters]

        found.append(types.SimpleNamespace(name="adapters", models=world.adapters, prompts=args.prompts, texts=None,
                                           teachers=teachers,
                                           policy=lambda number: prompted(world, args, number, args.chunk)))
    if "prompts" in args.problem:
        prompts = [f"a photo of a {concept}" for concept in args.concepts]
        found.append(concept_mixture(world, args, prompts))
    return found


def concept_mixture(world, args, prompts):
    """The problem of one prompt for several concepts; the policy has no guidance: it learns what guidance did."""
    own, common = encode_prompts(world.pipe, prompts), encode_prompts(world.pipe, [args.common])
    policies = [noise_predictor(world.unet, cond[None], world.uncond, args.guidance, args.chunk) for cond in own]
    if world.adapters:
        policies = [without_adapter(world.unet, policy) for policy in policies]
    return types.SimpleNamespace(name="prompts", models=list(map(slug, args.concepts)), prompts=[args.common],
                                 teachers=lambda number: policies, texts=clip_text(world.judge, prompts),
                                 policy=lambda number: noise_predictor(world.unet, common, chunk=args.chunk))


# ---- the method: losses ----------------------------------------------------------------------------------------------


@torch.no_grad()
def draw_paths(predict, noise, timesteps, abar, eta=1.0):
    """Paths of a model -> where it stood (T, N, ...), the noise it predicted there (T, N, ...), samples (N, ...).

    noise (T + 1, N, ...), that of the start first.
    """
    x, points, found = noise[0], [], []
    for i, t in enumerate(timesteps):
        eps = predict(x, t)
        points.append(x)
        found.append(eps)
        mean, sigma = ddim_kernel((x - (1 - abar[i]) ** 0.5 * eps) / abar[i] ** 0.5, eps, abar[i], abar[i + 1], eta)
        x = mean + sigma * noise[i + 1]
    return torch.stack(points), torch.stack(found), x


def step_costs(abar, eta=1.0):
    """What |eps_q - eps_p|^2 costs at each step, nats (T,): |mean_q - mean_p|^2 / (2 sigma^2), Lemma 1."""
    kernels = [ddim_kernel(-(((1 - a) / a) ** 0.5), 1.0, a, b, eta) for a, b in zip(abar, abar[1:])]
    return torch.tensor([factor**2 / (2 * sigma**2) for factor, sigma in kernels], dtype=torch.float64)


def kernel_loss(predict, points, eps, step, timesteps, costs):
    """KL(q || p) of paths, of which one step each is looked at -> unbiased estimates (n,), nats.

    points, eps (T, n, ...) as of draw_paths, step (n,) uniform on 0 ... T - 1.
    """
    at = torch.arange(len(step), device=step.device)
    times = torch.tensor(timesteps, device=step.device)[step]
    error = (predict(points[step, at], times) - eps[step, at]).flatten(1).pow(2).sum(1)
    return len(costs) * costs.to(error)[step] * error


def denoising_loss(predict, x0, level, times, abar, rng):
    """-log p(x0) (n,), nats, from the denoising error at one of the levels each -> unbiased but for the rule's error.

    d/2 log 2 pi + 1/2 int (E |eps - eps_p|^2 - abar^2 |eps|^2) d log SNR (Guo, Shamai and Verdu 2005), as
    cross_entropy of toy/or_composition.py: an upper bound where the prediction is not that of a diffusion. level (n,)
    uniform on the L levels, of times (L,) and signal powers abar (L,).
    """
    rule, a = (torch.tensor(v, dtype=torch.float64, device=x0.device).to(x0)[level] for v in (log_snr_rule(abar), abar))
    eps = torch.randn(x0.shape, generator=rng, device=rng.device).to(x0)
    x = a.sqrt().view(-1, 1, 1, 1) * x0 + (1 - a).sqrt().view(-1, 1, 1, 1) * eps
    error = (predict(x, torch.tensor(times, device=x0.device)[level]) - eps).flatten(1).pow(2).sum(1)
    size = eps.flatten(1).pow(2).sum(1)
    return x0[0].numel() / 2 * math.log(2 * math.pi) + len(abar) * rule * (error - a**2 * size)


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


def log_snr_rule(abar):
    """Weights of the trapezoid rule for 1/2 int f d log(abar / (1 - abar)) at the levels abar -> list of float.

    Outside of the levels, f falls as abar (noise) and as 1 - abar (data), whose integrals are f at the ends.
    """
    snr = [math.log(a / (1 - a)) for a in abar]
    gaps = [abs(s - t) / 2 for s, t in zip(snr, snr[1:])]
    return [(left + right) / 2 for left, right in zip([1.0, *gaps], [*gaps, 1.0])]


# ---- the method: multipliers -----------------------------------------------------------------------------------------


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


def spread(kl):
    """The unit of the multipliers' steps: how far the KLs (m,) are apart at the start, at least one nat."""
    return max((kl.max() - kl.min()).item(), 1.0)


def cover_update(world, problem, data, args, method):
    """The function that `train_adapter` calls for one round; its state holds weights and memory (m,), unit and round.

    args.primal_steps descents of sum_i weights_i loss_i, then a step of the multipliers by the round's mean losses,
    after a first sixth of the rounds at equal weights: an untrained adapter is further from some models than from
    others. `equal` never moves them.
    """
    timesteps, abar = path_schedule(world.scheduler, args.steps)
    times, levels = snr_levels(world.scheduler, args.levels)
    costs = step_costs(abar, args.eta)

    def losses(rng):
        """Mean loss of every model on a batch (m,), with a gradient."""
        found = []
        for points, eps, x0 in data:
            index = torch.randint(len(x0), (args.batch,), generator=rng, device=rng.device)
            predict = problem.policy(index // (len(x0) // len(problem.prompts)))
            if method == "elbo":
                level = torch.randint(len(levels), (args.batch,), generator=rng, device=rng.device)
                value = denoising_loss(predict, x0[index], level, times, levels, rng)
            else:
                step = torch.randint(args.steps, (args.batch,), generator=rng, device=rng.device)
                value = kernel_loss(predict, points[:, index], eps[:, index], step, timesteps, costs)
            found.append(value.mean())
        return torch.stack(found)

    def update(rng, descend, state):
        weights, gap = state["weights"], 0
        for _ in range(args.primal_steps):
            loss = losses(rng)
            (weights.to(loss) @ loss).backward()
            descend()
            gap = gap + loss.detach().double() / args.primal_steps
        state["round"] += 1
        if method != "equal" and state["round"] > args.updates // 6:
            if state["unit"] == 0:
                state["unit"] += spread(gap)
            raw, state["memory"] = dual_update(weights, gap / state["unit"], state["memory"], args.dual_lr)
            state["weights"] = project_to_simplex(raw)
        found = {f"dual_{name}": w for name, w in zip(problem.models, weights.tolist())}
        return found | {f"loss_{name}": v for name, v in zip(problem.models, gap.tolist())}

    return update


def run_methods(world, problem, data, fresh, args, out):
    """Every method's adapter -> {method: namespace of weights, trace and what `look_at` finds}."""
    results, late = {}, args.updates * 3 // 4
    for method in args.methods:
        equal = torch.full((len(data),), 1 / len(data), dtype=torch.float64, device=args.device)
        state = dict(weights=equal, memory=torch.zeros_like(equal), unit=equal.new_zeros(()), round=equal.new_zeros(()))
        update = cover_update(world, problem, data, args, method)
        trace = train_adapter(f"{problem.name}_{method}", world, update, args, out, state)
        save_adapter(world.unet, out / f"{problem.name}_{method}")
        found = look_at(world, problem, fresh, args, problem.policy)
        found.weights = [sum(point[f"dual_{name}"] for point in trace[late:]) / len(trace[late:])
                         for name in problem.models]
        found.trace, results[method] = trace, found
    return results


# ---- the measures ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def look_at(world, problem, fresh, args, policy):
    """What a policy draws, and how far it is from the models on fresh paths of theirs -> a namespace of

    images (K, n, 3, H, W), unit (K, n, d) in the CLIP model that only evaluates, kl and, where `elbo` is a method, ce,
    lists over models of (K, n'), nats.
    """
    timesteps, abar = path_schedule(world.scheduler, args.steps)
    times, levels = snr_levels(world.scheduler, args.levels)
    rng, costs = torch.Generator(args.device).manual_seed(1000 + args.seed), step_costs(abar, args.eta)
    count, kl, ce = len(problem.prompts), [], []
    number = torch.arange(count, device=args.device).repeat_interleave(args.images)
    x = draw_paths(policy(number), path_noise(world, args, len(number), rng), timesteps, abar, args.eta)[2]
    for points, eps, x0 in fresh:
        predict = policy(torch.arange(count, device=args.device).repeat_interleave(len(x0) // count))
        steps = [kernel_loss(predict, points, eps, torch.full((len(x0),), i, device=args.device), timesteps, costs)
                 for i in range(args.steps)]
        kl.append(torch.stack(steps).mean(0).view(count, -1))
        if "elbo" in args.methods:
            steps = [denoising_loss(predict, x0, torch.full((len(x0),), i, device=args.device), times, levels, rng)
                     for i in range(len(levels))]
            ce.append(torch.stack(steps).mean(0).view(count, -1))
    images, unit = judged(world, args, x, count)
    return types.SimpleNamespace(images=images, unit=unit, kl=kl, ce=ce)


def judged(world, args, x, count):
    """Latents (K n, ...) -> images (K, n, 3, H, W), unit vectors in the CLIP model that only evaluates (K, n, d)."""
    images = world.decode(x)
    unit = clip_images(world.judge, images, args.chunk)
    return images.view(count, -1, *images.shape[1:]).cpu(), unit.view(count, -1, unit.shape[1])


def model_shares(unit, centres):
    """Share of the unit vectors (K, n, d) that is nearest to each of the centres (K, m, d) -> (m,)."""
    equal = torch.ones(unit.shape[1], device=unit.device)
    return torch.stack([mode_masses(u, equal, c) for u, c in zip(unit, centres)]).mean(0).double().cpu()


def measure(problem, results, units, fresh_units):
    """The rows of a problem. `exact` of a share is that of the mixture of the models at the weights of the method.

    Centres are the concepts' texts, or each adapter's mean image of a prompt, from the data (units), lists over models
    of (K, n, d); what of a model's fresh images is taken for which model is counted, too.
    """
    name, count = problem.name, len(problem.prompts)
    centres = (problem.texts.expand(count, -1, -1) if problem.texts is not None else
               F.normalize(torch.stack([u.mean(1) for u in units], 1), dim=2))
    taken = torch.stack([model_shares(u, centres) for u in fresh_units])  # (m, m)
    rows = [row(f"bound.{name}.worst_kl", math.log(len(problem.models)))]
    rows += [row(f"{model}.{name}.share_{other}", value) for model, line in zip(problem.models, taken.tolist())
             for other, value in zip(problem.models, line)]
    for method, out in results.items():
        label, shares = f"{method}.{name}", model_shares(out.unit, centres)
        for key in ("kl", "ce") if out.ce else ("kl",):
            found = [paired_row(f"{label}.{key}_{model}", v) for model, v in zip(problem.models, getattr(out, key))]
            rows += [*found, dict(max(found, key=lambda r: r["estimate"]), name=f"{label}.worst_{key}")]
        exact = [None] * len(shares)
        if out.weights is not None:
            rows += [row(f"{label}.dual_{model}", w) for model, w in zip(problem.models, out.weights)]
            exact = (torch.tensor(out.weights, dtype=torch.float64) @ taken).tolist()
        for model, share, truth in zip(problem.models, shares.tolist(), exact):
            se = (truth * (1 - truth) / out.unit[..., 0].numel()) ** 0.5 if truth is not None else None
            rows.append(row(f"{label}.share_{model}", share, se, truth))
        rows.append(row(f"{label}.diversity", pair_distance(out.unit)))
    return rows


def mode_masses(x, w, means):
    """Share of the weighted points x (N, d), w (N,) that is nearest to each of means (K, d) -> (K,)."""
    nearest = torch.cdist(x, means.to(x)).argmin(1)
    return torch.zeros(len(means)).to(w).index_add_(0, nearest, w) / w.sum()


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


def slug(prompt):
    """A prompt as part of a row's name."""
    return re.sub(r"[^a-z0-9]+", "_", prompt.lower()).strip("_")[:40]


# ---- the figures -----------------------------------------------------------------------------------------------------

TITLES = dict(base="base", equal="equal weights", kl="constrained, kl", elbo="constrained, elbo")
COLORS = dict(base="#999999", equal="#E69F00", kl="#0072B2", elbo="#D55E00")
LINES = ("#0072B2", "#D55E00", "#000000", "#CC79A7", "#E69F00")


def draw_mixture(path, args, problem, results, shown, rows):
    """Images of the models, then of each method; KLs, shares (the mixture's as black dashes) and multipliers."""
    value = {r["name"]: r for r in rows}
    shown = {name: images for name, images in shown.items()} | {m: out.images for m, out in results.items()}
    if len(problem.prompts) == 1:  # more of them fit on a line
        shown = {name: images[0, : len(images[0]) // 4 * 4].unflatten(0, (4, -1)) for name, images in shown.items()}
    prompts = problem.prompts if len(problem.prompts) > 1 else [""] * 4
    figure = plt.figure(figsize=(10, 0.62 * len(shown) + 3.5))
    grid = figure.add_gridspec(len(shown) + 1, 3, height_ratios=[*[1] * len(shown), 4], hspace=0.25, wspace=0.28,
                               top=0.96, bottom=0.9 / (0.62 * len(shown) + 3.5), left=0.13, right=0.98)
    drawn = {name: types.SimpleNamespace(images=images) for name, images in shown.items()}
    least = min(images.shape[1] for images in shown.values())
    draw_lines(figure, grid, argparse.Namespace(prompts=prompts, images=least), drawn,
               {name: TITLES.get(name, f"{name}") for name in shown})
    panels = [figure.add_subplot(grid[len(shown), k]) for k in range(3)]
    for ax, key, title in zip(panels, ("kl", "share"), ("KL of each model from the adapter, nats",
                                                        "share of the images, mixture dashed")):
        for j, method in enumerate(results):
            entries = [value[f"{method}.{problem.name}.{key}_{model}"] for model in problem.models]
            where = torch.arange(len(entries)) + (j - (len(results) - 1) / 2) * 0.8 / len(results)
            ax.bar(where.numpy(), [r["estimate"] for r in entries], 0.8 / len(results), color=COLORS[method],
                   label=TITLES[method])
            for x, r in zip(where.tolist(), entries):
                if r["exact"] is not None:
                    ax.plot([x - 0.4 / len(results), x + 0.4 / len(results)], [r["exact"]] * 2, "k--", linewidth=1)
        ax.set_xticks(range(len(problem.models)), problem.models, fontsize=7)
        ax.set_title(title, fontsize=8)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="lower center", ncols=len(results), fontsize=8)
    for method, style in (("kl", "-"), ("elbo", "--")):
        for i, model in enumerate(problem.models if method in results else ()):
            panels[2].plot([point[f"dual_{model}"] for point in results[method].trace], style, linewidth=1,
                           color=LINES[i % len(LINES)], label=model if style == "-" else None)
    panels[2].set_title("multipliers" + ": kl, elbo dashed" * ("elbo" in results), fontsize=8)
    panels[2].set_xlabel("round", fontsize=8)
    if "kl" in results:
        panels[2].legend(fontsize=6)
    save_figure(figure, path)


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


def path_noise(world, args, n, rng):
    """The noise of n sampling paths: at the start, then of each step (T + 1, n, C, h, w)."""
    return torch.randn(args.steps + 1, n, *world.shape, generator=rng, device=rng.device)


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


def ddim_kernel(x0_hat, eps, abar, abar_next, eta):
    """Mean (N, ...) and standard deviation (float) of p(x_{t-1} | x_t); eta = 1 is DDPM. DDIM (Song 2021) eq. 12."""
    sigma = eta * ((1 - abar_next) / (1 - abar) * (1 - abar / abar_next)) ** 0.5
    return abar_next**0.5 * x0_hat + max(1 - abar_next - sigma**2, 0.0) ** 0.5 * eps, sigma


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
    """Draw from the models, train every method, write figures and numbers.json -> {row name: estimate}."""
    start, out = time.perf_counter(), results_folder(args, "sd_or_composition")
    rng = torch.Generator(args.device).manual_seed(args.seed)
    world = load_models(args)
    schedule, rows, calls, drawn = path_schedule(world.scheduler, args.steps), [], 0, {}
    problems = make_mixtures(world, args)
    for problem in problems:  # before any adapter of our own takes the place of theirs
        sets = []
        for n in (args.data, args.images):
            number = torch.arange(len(problem.prompts), device=args.device).repeat_interleave(n)
            sets.append([draw_paths(teacher, path_noise(world, args, len(number), rng), *schedule, args.eta)
                         for teacher in problem.teachers(number)])
            progress(f"paths of {problem.name}", len(sets), 2)
        judged_sets = [[judged(world, args, x, len(problem.prompts)) for _, _, x in paths] for paths in sets]
        base = (lambda number, policy=problem.policy: without_adapter(world.unet, policy(number))
                ) if world.adapters else problem.policy
        drawn[problem.name] = *sets, *judged_sets, look_at(world, problem, sets[1], args, base)
    for problem in problems:
        data, fresh, seen, fresh_seen, base = drawn[problem.name]
        base.weights = None
        results = {"base": base} | run_methods(world, problem, data, fresh, args, out)
        rows += measure(problem, results, [unit for _, unit in seen], [unit for _, unit in fresh_seen])
        images = dict(zip(problem.models, (images for images, _ in fresh_seen)))
        draw_mixture(out / ("figure.png" if problem.name == "adapters" else "prompts.png"), args, problem, results,
                     images, rows)
        count, models = len(problem.prompts), len(problem.models)
        levels = args.levels if "elbo" in args.methods else 0
        look_up = count * args.images * (args.steps + models * (args.steps + levels))
        calls += models * count * (args.data + args.images) * args.steps + look_up * (1 + len(args.methods))
        calls += len(args.methods) * args.updates * args.primal_steps * args.batch * models
    write_numbers(out / "numbers.json", args, rows, calls, time.perf_counter() - start)
    for problem in problems:
        for keys in (("kl", "ce"), ("dual", "share")) if "elbo" in args.methods else (("kl", "dual", "share"),):
            print_table(rows, problem.name, [f"{key}_{model}" for key in keys for model in problem.models])
        print_table(rows, problem.name, ["worst_kl", *["worst_ce"] * ("elbo" in args.methods), "diversity"])
    return {r["name"]: r["estimate"] for r in rows}


if __name__ == "__main__":
    join_processes()
    main(parse_args())
