"""Compose Stable Diffusion models by AND: sample the product of adapters, or of prompts, whose worst KL is least.

Paper: Khalafi, Hounie, Ding and Ribeiro, "Composition and Alignment of Diffusion Models using Constrained Learning",
NeurIPS 2025, arXiv 2508.19104: the counterpart of its Fig. 5 and 6 (problem `adapters`, figure.png: how much of the
gain of each reward's own adapter is left) and of its Table 1 (problem `prompts`, prompts.png: two concepts at once).

Run    python sd/and_composition.py                      miniature model, both problems                 4 CPU minutes
       python sd/and_composition.py --quick              the same, coarse: shows nothing
       python sd/and_composition.py --quick --problem prompts      half of that                     21 CPU seconds
       python sd/and_composition.py --problem prompts --concepts cat+rose "dog+red heart+sun"     other concepts
       python sd/and_composition.py --problem adapters --lora sd/adapters/clip DIR --reward clip contrast     your own
       On a GPU (not run here): --model stable-diffusion-v1-5/stable-diffusion-v1-5 --paper --dtype bfloat16 --chunk 8
       --clip openai/clip-vit-large-patch14 --clip-eval laion/CLIP-ViT-H-14-laion2B-s32B-b79K --device cuda
       and --lora with the folders that sd/draft.py wrote, their rewards after --reward in the same order

Notation (here -> paper)
       q_i, weights -> q^i, lambda    the models: one UNet with one adapter on, or with one prompt; the multipliers,
                                      on the simplex, which are also the exponents of the product
       surrogate    -> s^lambda       the sampler of the noise prediction sum_i lambda_i eps_i
       product      -> q_AND^lambda   prod_i q_i^lambda_i / Z(lambda), here of the densities of whole sampling paths
       D(lambda)    -> D_AND          -log Z(lambda): no sampler whatever has a worst KL below it
       kl                             KL(sampler || q_i) of the paths, nats, by Lemma 1: |mean - mean_i|^2 / (2 sigma^2)
                                      at each step, averaged over prompts
       percent                        of the gain that the reward's own adapter makes over the base model

Algorithm (Algorithm 3 of the paper)
       1. draw paths at the present multipliers, one call of the UNet for each model and step       `product_paths`
       2. raise the multipliers of the models whose KL is larger     `dual_update`, `project_to_simplex`
       3. repeat with new paths; average the second half                    `ascend_dual`

`corrected` and `equal_smc` are what the paper lacks. The product of the reverse kernels is a Gaussian kernel, the
surrogate's, times a number C(x_t) <= 1; particles that carry C as weight are a sequential Monte Carlo sampler of the
product, with no further call of the UNet. It estimates D(lambda) too, and the KLs of the product, whose weighted mean
is D: where they are equal, the multipliers are the best. KLs of the surrogate do not tell that: for two models they are
lambda_2^2 and lambda_1^2 times the same number, so that Algorithm 3 returns (1/2, 1/2) for any pair.

What you should see (mean ± standard deviation over 3 seeds). Adapters: `saturation` and `contrast_strong` pull the same
way (cosine 0.40 of their shifts of the paths), `clip` does not: equal weights are 1.6, 3.2 and 4.0 nats from them and
leave 67±2, 44±3 and 38±6 percent. The constrained weights, 0.11, 0.43 and 0.46, are 2.8, 3.2 and 3.2 nats from each and
leave 55±2, 51±2 and 49±4: the worst percentage rises from 38±6 to 48±2, by 11.4, 14.3 and 6.7 points in the three
seeds (within a run it has an error of 5). D(lambda) is 3.08±0.04 nats, and the SMC row has no better percentages. A KL
is no reward: the weaker `contrast` in the place of `contrast_strong` gave +10.6 points in one run and -4.5 in another.
Prompts: the joint prompt draws neither a cat nor a butterfly (min_clip -0.19±0.01), the product butterflies in the
colours of the cat (0.34±0.03). Of cat, rose and sun the rose is furthest: constrained weights lower the largest KL from
2180±35 to 1712±9 nats, and lose the cat: min_clip 0.15±0.02 -> 0.10±0.02. A few particles cannot span a thousand nats.
To try: --guidance 1 --problem prompts --concepts cat+butterfly: how far apart are two prompts without guidance?
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
    "quick": dict(steps=4, batch=8, dual_steps=4, images=8, particles=4),
    "default": dict(steps=10, batch=16, dual_steps=8, images=24, particles=8),
    "paper": dict(steps=25, batch=48, dual_steps=20, images=64, particles=16),
}
REWARDS = ("jpeg", "saturation", "contrast", "clip", "pickscore", "aesthetic")
PROMPTS = ["a photo of a cat", "a photo of a horse", "a photo of a fish", "a photo of a butterfly"]
ADAPTERS = ["sd/adapters/saturation", "sd/adapters/contrast_strong", "sd/adapters/clip"]
CONCEPTS = ["cat+butterfly", "cat+rose+sun"]
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def parse_args(argv=None):
    parser = common_parser(__doc__)
    model_flags(parser, PROMPTS, [("saturation", 1.0), ("contrast", 1.0), ("clip", 1.0)])
    several_adapters(parser, ADAPTERS)
    parser.add_argument("--problem", nargs="+", choices=["adapters", "prompts"], default=["adapters", "prompts"])
    parser.add_argument("--concepts", type=concept_set, nargs="+", default=[concept_set(text) for text in CONCEPTS],
                        help="what is to be in one image, joined by +")
    parser.add_argument("--eta", type=positive(float), default=1.0, help="noise of the DDIM kernel, at most 1 (DDPM)")
    parser.add_argument("--dual-steps", type=positive(int), help="steps of the multipliers, at least 4")
    parser.add_argument("--dual-lr", type=positive(float), default=0.15, help="their step, in units of the mean KL")
    parser.add_argument("--batch", type=positive(int), help="paths at each dual step, over all prompts")
    parser.add_argument("--images", type=positive(int), help="images of each prompt that are measured")
    parser.add_argument("--particles", type=positive(int), help="images that interact in `corrected`")
    parser.add_argument("--ess", type=positive(float), default=0.5, help="resample below this fraction of particles")
    args = parser.parse_args(argv)
    for name, value in PRESETS["quick" if args.quick else "paper" if args.paper else "default"].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.eta > 1 or args.dual_steps < 4:
        parser.error("--eta can be at most 1, and --dual-steps must be at least 4")
    if args.images % args.particles or args.images < 2 * args.particles:
        parser.error("--images must be a multiple of --particles, at least twice: errors are those of groups")
    if args.batch % len(args.prompts) or args.batch < 2 * len(args.prompts):
        parser.error("--batch must be a multiple of the number of prompts, at least twice")
    check_adapters(parser, args)
    if len(args.lora) != len(args.reward):
        parser.error(f"--reward needs one reward for each of the {len(args.lora)} adapters, in their order")
    return args


def concept_set(text):
    """An argparse type: concepts joined by + -> list of at least two."""
    concepts = [part.strip() for part in text.split("+")]
    if len(concepts) < 2 or not all(concepts):
        raise argparse.ArgumentTypeError(f"{text!r} is not two or more concepts joined by +")
    return concepts


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


def several_adapters(parser, folders):
    """Let --lora take a list of adapters, in the place of the one of model_flags."""
    lora = next(action for action in parser._actions if action.dest == "lora")
    lora.nargs, lora.default, lora.help = "+", folders, "folders or hub ids of the adapters"


def check_adapters(parser, args):
    """End where two adapters have one name: that of the folder, which stands in the names of the rows."""
    names = [slug(pathlib.Path(folder).name) for folder in args.lora]
    if len(names) < 2 or len(set(names)) < len(names):
        parser.error(f"--lora needs two or more folders of different names, got {' '.join(names)}")


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


def attach_adapters(world, folders):
    """Load adapters onto the UNet of a world, side by side -> their names, those of the folders."""
    names = [slug(pathlib.Path(folder).name) for folder in folders]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft is surprised that there is more than one
        for name, folder in zip(names, folders):
            load_adapter(world.pipe, folder, name)
    return names


def with_adapter(unet, name, predict_noise):
    """predict_noise(x, t) of the UNet with this adapter alone on; it may hold others."""

    def adapted_noise(x, t):
        unet.set_adapters(name)
        return predict_noise(x, t)

    return adapted_noise


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


# ---- the problems ----------------------------------------------------------------------------------------------------


def make_products(world, args):
    """A namespace for each product: name, the models' names, prompts (titles of the images), predict(n), others.

    predict(n) are the models' noise predictions of latents of which n belong to each prompt, one prompt after the
    other; others {method: predict(n)} are single models to compare with; texts (m, d) are the concepts' prompts in the
    CLIP model that only evaluates, None for adapters.
    """
    found = []
    if "adapters" in args.problem:
        def policy(n):
            return prompted(world, args, torch.arange(len(args.prompts)).repeat_interleave(n), args.chunk)

        others = {"base": lambda n: without_adapter(world.unet, policy(n))}
        others |= {f"single_{name}": lambda n, name=name: with_adapter(world.unet, name, policy(n))
                   for name in world.adapters}
        found.append(types.SimpleNamespace(
            name="adapters", models=world.adapters, prompts=args.prompts, others=others, texts=None,
            predict=lambda n: [with_adapter(world.unet, name, policy(n)) for name in world.adapters]))
    return found + [concept_problem(world, args, concepts) for concepts in args.concepts if "prompts" in args.problem]


def concept_problem(world, args, concepts):
    """The problem of several concepts in one image: a model is the base model with a concept's prompt."""
    prompts = [f"a photo of a {concept}" for concept in concepts]
    policies = []
    for cond in encode_prompts(world.pipe, [*prompts, f"a photo of a {' and a '.join(concepts)}"]):
        policy = noise_predictor(world.unet, cond[None], world.uncond, args.guidance, args.chunk)
        policies.append(without_adapter(world.unet, policy) if world.adapters else policy)
    return types.SimpleNamespace(
        name="_".join(map(slug, concepts)), models=[slug(concept) for concept in concepts],
        prompts=[" + ".join(concepts)], others={"combined": lambda n: policies[-1]}, predict=lambda n: policies[:-1],
        texts=clip_text(world.judge, prompts))


# ---- the method: paths of the product --------------------------------------------------------------------------------


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


@torch.no_grad()
def product_paths(predictions, weights, noise, timesteps, abar, particles, rng, eta=1.0, ess=0.0):
    """Paths of the product of the models' reverse kernels -> samples (N, ...), KL of each model (m, N), log Z (G,).

    predictions: m functions (x (N, ...), t) -> eps; weights (m,) on the simplex; noise (T + 1, N, ...) of the start and
    of each step, N = G groups x particles, a group being contiguous; abar (T + 1,) from noise to data.
    prod_i N(x'; mean_i, sigma^2)^weights_i = C N(x'; mean, sigma^2) with mean = sum_i weights_i mean_i and
    log C = -sum_i weights_i |mean_i - mean|^2 / (2 sigma^2). ess = 0 draws from the kernel N(mean, sigma^2), the
    surrogate of Algorithm 3; its KL is that of Lemma 1. ess > 0 draws from the product of the paths: C is the weight of
    a particle, and the KL, to be averaged and less log Z, is log(C N(x'; mean) / N(x'; mean_i)) over the path. The
    average of exp(log Z) is Z for any number of particles.
    """
    groups, w, device = noise.shape[1] // particles, weights.to(noise), noise.device
    first_slot, log_z = torch.arange(groups, device=device)[:, None] * particles, noise.new_zeros(groups)
    state = dict(x=noise[0], kl=noise.new_zeros(noise.shape[1], len(w)), log_w=noise.new_zeros(noise.shape[1]))
    for i, t in enumerate(timesteps):
        log_w = state["log_w"].view(groups, particles)
        due = effective_sample_size(log_w) < ess * particles  # (G,)
        if due.any():
            ancestors = torch.where(due[:, None], resample(log_w, "systematic", rng),
                                    torch.arange(particles, device=device))
            state = gather(state, (first_slot + ancestors).flatten())
            state["log_w"] = torch.where(due[:, None], 0, log_w).flatten()
            log_z = log_z + torch.where(due, log_mean_exp(log_w), 0)
        eps, z = torch.stack([f(state["x"], t) for f in predictions]), noise[i + 1]  # (m, N, ...), (N, ...)
        means, sigma = ddim_kernel((state["x"] - (1 - abar[i]) ** 0.5 * eps) / abar[i] ** 0.5, eps, abar[i],
                                   abar[i + 1], eta)
        mean = torch.einsum("m,m...->...", w, means)
        offset = (mean - means).flatten(2) / sigma  # (m, N, d)
        cost = offset.pow(2).sum(2).T / 2  # (N, m)
        log_c = -(cost @ w)
        if ess > 0:
            cost = cost + (offset * z.flatten(1)).sum(2).T + log_c[:, None]
        state["kl"], state["log_w"] = state["kl"] + cost, state["log_w"] + log_c
        state["x"] = mean + sigma * z
    log_w = state["log_w"].view(groups, particles)
    if ess > 0:
        state = gather(state, (first_slot + resample(log_w, "systematic", rng)).flatten())
    return state["x"], state["kl"].T, log_z + log_mean_exp(log_w)


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


def ascend_dual(count, draw, args):
    """Algorithm 3: projected ascent of `count` multipliers -> average of the second half (m,), path (steps + 1, m).

    draw(weights) draws new paths -> KL of each model (m,). The unit of a step is the mean KL at the start: for models
    that differ in the mean alone, a --dual-lr of 1/4 is then the step of Newton's method for two of them.
    """
    weights = torch.full((count,), 1 / count, dtype=torch.float64)
    path, memory, unit = [weights], torch.zeros_like(weights), None
    for step in range(args.dual_steps):
        gap = draw(weights).double().cpu()
        unit = unit or max(gap.mean().item(), 1.0)
        raw, memory = dual_update(weights, gap / unit, memory, args.dual_lr)
        weights = project_to_simplex(raw)
        path.append(weights)
        progress("multipliers", step + 1, args.dual_steps)
    return torch.stack(path[len(path) // 2 :]).mean(0), torch.stack(path)


# ---- the method: what is compared ------------------------------------------------------------------------------------


def run_methods(world, problem, args, rng):
    """Every method on one problem, on the same noise -> {method: what `finish` returns}, calls of the models.

    The base model and each adapter alone come first, or the prompt that joins the concepts. Two concepts have no row
    `constrained`: Algorithm 3 leaves them at equal weights.
    """
    count, n, calls = len(problem.prompts), args.images, 0
    schedule, noise = path_schedule(world.scheduler, args.steps), path_noise(world, args, count * n, rng)
    models, size = problem.predict(n), args.batch // count
    equal = torch.full((len(models),), 1 / len(models), dtype=torch.float64)

    def finish(predictions, weights, ess=0.0, path=None):
        """Latents x (K, n, ...), kl (m, K, groups) and, of the product, the dual value: D from all groups."""
        nonlocal calls
        x, kl, log_z = product_paths(predictions, weights, noise, *schedule, args.particles, rng, args.eta, ess)
        calls += len(predictions) * args.steps * len(x)
        value = -log_mean_exp(log_z.view(count, -1).double()).mean().item() if ess else None
        kl = kl.double().cpu().view(len(weights), count, -1, args.particles).mean(3) + (value or 0.0)
        return types.SimpleNamespace(x=x.view(count, n, *world.shape), weights=weights, path=path, dual_value=value,
                                     kl=kl if len(weights) > 1 else None)

    def ascend(ess):
        """Multipliers by Algorithm 3 and their path; each step draws new paths."""
        nonlocal calls
        few = problem.predict(size)
        calls += len(few) * args.steps * args.batch * args.dual_steps

        def draw(weights):
            path = path_noise(world, args, args.batch, rng)
            _, kl, log_z = product_paths(few, weights, path, *schedule, size, rng, args.eta, ess)
            return kl.mean(1) - (log_z.mean() if ess else 0)

        return ascend_dual(len(few), draw, args)

    out = {name: finish([predict(n)], torch.ones(1, dtype=torch.float64)) for name, predict in problem.others.items()}
    out["equal"] = finish(models, equal)
    if len(models) > 2:
        weights, path = ascend(0.0)
        out["constrained"] = finish(models, weights, 0.0, path)
    out["equal_smc"] = finish(models, equal, args.ess)
    weights, path = ascend(args.ess)
    out["corrected"] = finish(models, weights, args.ess, path)
    return out, calls


# ---- the measures ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def judge_images(world, args, problem, results):
    """Add to every result images (K, n, 3, H, W), unit (K, n, d) in the CLIP model that only evaluates, and rewards.

    Rewards {name: (K, n)} in their own units; for concepts, the cosines with their prompts take that place.
    """
    for out in results.values():
        images = [world.decode(x) for x in out.x]
        out.unit = torch.stack([clip_images(world.judge, part, args.chunk) for part in images])
        if problem.texts is None:
            each = [all_rewards(world, args, k, part) for k, part in enumerate(images)]
            out.rewards = {name: torch.stack([checked(r[name], r[name].shape[:1]) for r in each]) for name in each[0]}
        else:
            out.rewards = dict(zip(problem.models, (out.unit @ problem.texts.T).unbind(2)))
        out.images = torch.stack(images).cpu()


def measure(args, problem, results):
    """The rows of a problem. Errors are those of groups of particles within a prompt, which are independent."""
    rows, name = [], problem.name

    def grouped(values):
        return values.view(len(values), -1, args.particles).double().mean(2)

    for method, out in results.items():
        label = f"{method}.{name}"
        if problem.texts is None:
            worst = []
            for model, (reward, sign) in zip(problem.models, args.reward):
                gain, full = (sign * grouped(results[key].rewards[reward] - results["base"].rewards[reward])
                              for key in (method, f"single_{model}"))
                share = (gain.mean() / full.mean()).item()  # its error is that of gain - share full, to first order
                error = paired_row("", gain, share * full)["se"] / abs(full.mean().item())
                worst.append(row(f"{label}.percent_{model}", 100 * share, 100 * error))
                rows.append(paired_row(f"{label}.reward_{model}", grouped(out.rewards[reward])))
            rows += worst if method != "base" else []
            if out.kl is not None:
                rows.append(dict(min(worst, key=lambda r: r["estimate"]), name=f"{label}.worst_percent"))
        else:
            values = torch.stack(list(out.rewards.values()))  # (m, 1, n)
            rows += [paired_row(f"{label}.clip_{model}", grouped(v)) for model, v in zip(problem.models, values)]
            rows.append(paired_row(f"{label}.min_clip", grouped(values.amin(0))))
        rows.append(row(f"{label}.diversity", pair_distance(out.unit)))
        if out.kl is not None:
            kls = [paired_row(f"{label}.kl_{model}", kl) for model, kl in zip(problem.models, out.kl)]
            rows += [*kls, dict(max(kls, key=lambda r: r["estimate"]), name=f"{label}.worst_kl")]
            rows += [row(f"{label}.dual_{model}", w) for model, w in zip(problem.models, out.weights.tolist())]
        if out.dual_value is not None:
            rows.append(row(f"{label}.dual_value", out.dual_value))
    return rows


def average_rows(rows, names):
    """Means over the sets of concepts: the rows <method>.prompts.<key> of the keys that every set has."""
    found, table = [], {r["name"]: r for r in rows}
    for method in dict.fromkeys(r["name"].split(".")[0] for r in rows):
        for key in ("min_clip", "diversity", "worst_kl", "dual_value"):
            values = [table[f"{method}.{name}.{key}"] for name in names if f"{method}.{name}.{key}" in table]
            if values and len(values) == len(names):
                errors = [r["se"] for r in values]
                se = None if None in errors else math.hypot(*errors) / len(errors)
                found.append(row(f"{method}.prompts.{key}", sum(r["estimate"] for r in values) / len(values), se))
    return found


def all_rewards(world, args, number, images):
    """{name: rewards (n,)} of images (n, 3, H, W) of prompt `number`, `chunk` images at once."""
    return {name: in_chunks(lambda part, reward=reward: reward(part, number), args.chunk, images)
            for name, reward in world.rewards.items()}


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


def checked(value, shape):
    """value, a reward or its gradient, if it has this shape and is finite."""
    if value.shape != shape or not value.isfinite().all():
        fail(f"The reward must be one finite number per sample, with a finite gradient: expected shape {tuple(shape)}, "
             f"got {tuple(value.shape)}, {int((~value.isfinite()).sum())} of them not finite.")
    return value


# ---- the figures -----------------------------------------------------------------------------------------------------

TITLES = dict(base="base", combined="joint prompt", equal="equal weights", constrained="constrained",
              equal_smc="equal weights, SMC", corrected="constrained, SMC")
COLORS = dict(combined="#999999", equal="#E69F00", constrained="#D55E00", equal_smc="#56B4E9", corrected="#0072B2")
LINES = ("#0072B2", "#D55E00", "#000000", "#CC79A7", "#E69F00")


def draw_product(path, args, problems, results, rows):
    """Images from the same noise, then bars for each method, and the multipliers.

    Adapters: percent of each adapter's gain, and the KLs. Concepts: the least of the cosines, and the largest KL; the
    constrained weights of two concepts are the equal ones.
    """
    first, adapters = problems[0], problems[0].texts is None
    value = {r["name"]: r for r in rows}
    found = [{"constrained": results[p.name]["equal"]} | results[p.name] for p in problems]
    methods = [method for method in COLORS if method in found[0]]
    shown = {method: types.SimpleNamespace(images=torch.cat([result[method].images for result in found]))
             for method in [*(method for method in results[first.name] if method not in COLORS), *methods]}
    titles = TITLES | {method: f"{method.removeprefix('single_')} alone" for method in shown if "single_" in method}
    figure = plt.figure(figsize=(10, 0.62 * len(shown) + 3.5))
    grid = figure.add_gridspec(len(shown) + 1, 3, height_ratios=[*[1] * len(shown), 4], hspace=0.25, wspace=0.28,
                               top=0.96, bottom=1.0 / (0.62 * len(shown) + 3.5), left=0.13, right=0.98)
    prompts = [prompt for p in problems for prompt in p.prompts]
    draw_lines(figure, grid, argparse.Namespace(prompts=prompts, images=args.images), shown, titles)
    panels = [figure.add_subplot(grid[len(shown), k]) for k in range(3)]
    if adapters:
        bars = [[f"adapters.percent_{model}" for model in first.models], [f"adapters.kl_{m}" for m in first.models]]
        labels = [first.models, first.models]
        names = ("percent of the adapter's own gain", "KL from each adapter, nats; D dotted")
    else:
        bars = [[f"{p.name}.{key}" for p in problems] for key in ("min_clip", "worst_kl")]
        labels = [[p.prompts[0].replace(" + ", "\n") for p in problems]] * 2
        names = ("least CLIP cosine", "largest KL, nats; D dotted")
    for ax, keys, text, title in zip(panels, bars, labels, names):
        mine = [method for method in methods if method != "combined" or "kl" not in keys[0]]
        for j, method in enumerate(mine):
            entries = [value.get(f"{method}.{key}") or value[f"equal.{key}"] for key in keys]
            where = torch.arange(len(keys)) + (j - (len(mine) - 1) / 2) * 0.8 / len(mine)
            ax.bar(where.numpy(), [r["estimate"] for r in entries], 0.8 / len(mine), color=COLORS[method],
                   yerr=[r["se"] or 0 for r in entries], error_kw=dict(linewidth=0.7), label=titles[method])
        ax.set_xticks(range(len(keys)), text, fontsize=7)
        ax.set_title(title, fontsize=8)
    panels[0].axhline(0, color="black", linewidth=0.8)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="lower center", ncols=len(methods), fontsize=8)
    for k, p in enumerate(problems):  # D at the best multipliers: no sampler's worst KL is less
        half = len(first.models) / 2 if adapters else 0.5
        centre = half - 0.5 if adapters else k
        panels[1].plot([centre - half, centre + half], [results[p.name]["corrected"].dual_value] * 2, "k:")
        for method, style in (("constrained", "--"), ("corrected", "-")):
            if method in results[p.name]:
                steps = results[p.name][method].path
                for i in range(len(p.models) if adapters else 1):
                    panels[2].plot(steps[:, i].numpy(), style, color=LINES[(i if adapters else k) % len(LINES)],
                                   linewidth=1, label=(p.models[i] if adapters else p.prompts[0])
                                   if method == "corrected" else None)
    panels[2].set_title("multipliers, SMC; dashed: surrogate" if adapters else "multiplier of the first concept",
                        fontsize=8)
    panels[2].set_xlabel("dual step", fontsize=8)
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


# ---- shared: the sampler's parts -------------------------------------------------------------------------------------


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


def ddim_kernel(x0_hat, eps, abar, abar_next, eta):
    """Mean (N, ...) and standard deviation (float) of p(x_{t-1} | x_t); eta = 1 is DDPM. DDIM (Song 2021) eq. 12."""
    sigma = eta * ((1 - abar_next) / (1 - abar) * (1 - abar / abar_next)) ** 0.5
    return abar_next**0.5 * x0_hat + max(1 - abar_next - sigma**2, 0.0) ** 0.5 * eps, sigma


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
    """Solve every problem, measure all on the same noise, write figures and numbers.json -> {row name: estimate}."""
    start, out = time.perf_counter(), results_folder(args, "sd_and_composition")
    rng = torch.Generator(args.device).manual_seed(args.seed)
    world = load_world(argparse.Namespace(**dict(vars(args), lora=None)))
    world.adapters = attach_adapters(world, args.lora) if "adapters" in args.problem else []
    problems, results, rows, calls = make_products(world, args), {}, [], 0
    for problem in problems:
        results[problem.name], more = run_methods(world, problem, args, rng)
        judge_images(world, args, problem, results[problem.name])
        rows, calls = rows + measure(args, problem, results[problem.name]), calls + more
    products = {"figure.png": [p for p in problems if p.texts is None],
                "prompts.png": [p for p in problems if p.texts is not None]}
    rows += average_rows(rows, [p.name for p in products["prompts.png"]])
    for name, group in products.items():
        if group:
            draw_product(out / name, args, group, results, rows)
    calls *= 2 if args.guidance != 1 else 1
    write_numbers(out / "numbers.json", args, rows, calls, time.perf_counter() - start)
    for problem in problems:
        keys = ["percent_{}", "kl_{}", "dual_{}"] if problem.texts is None else ["clip_{}", "kl_{}", "dual_{}"]
        print_table(rows, problem.name, [key.format(model) for key in keys for model in problem.models])
    for name in ("adapters", "prompts"):
        print_table(rows, name, ["worst_percent", "min_clip", "worst_kl", "dual_value", "diversity"])
    return {r["name"]: r["estimate"] for r in rows}


if __name__ == "__main__":
    join_processes()
    main(parse_args())
