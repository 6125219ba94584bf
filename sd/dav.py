"""Align Stable Diffusion by expectation maximisation: a search finds rewarded sampling paths, an adapter learns them.

Paper: Lee et al., "Diffusion Alignment as Variational Expectation-Maximization" (DAV), ICLR 2026, arXiv 2510.00502.
figure.png is the counterpart of its Fig. 3 (images), Fig. 2 (reward, another CLIP model's score and diversity per
round) and Fig. 4 (the ELBO with and without the search). The search is the text of toy/dav.py.

Run    python sd/dav.py                            miniature model, CLIP score of the prompt          9 CPU minutes
       python sd/dav.py --quick                    the same, coarse: shows nothing                    36 CPU seconds
       python sd/dav.py --reward jpeg --children 4 --methods dav --updates 3 --images 12
                                                   compressibility: no gradient, choice alone         1.3 CPU minutes
       python sd/dav.py --reward jpeg=-1 --children 4 --methods dav --updates 2 --images 8
                                                   incompressibility                                  1 CPU minute
       python sd/dav.py --resume                   continue after an interruption
       On a GPU (not run here): --model stable-diffusion-v1-5/stable-diffusion-v1-5 --reward aesthetic --paper
       --clip openai/clip-vit-large-patch14 --clip-eval laion/CLIP-ViT-H-14-laion2B-s32B-b79K --dtype bfloat16
       --chunk 8 --device cuda

The adapter of each method is in out/sd_dav/<method>; diffusers loads it: pipe.load_lora_weights(that folder).

Notation (here -> paper)
       kl_weight -> alpha   reward temperature of one round, against a reward in standard deviations of the base model
                            within a prompt: a round that learned all would take p to p exp(r / kl_weight) / Z
       kl        -> lambda  weight of the KL from the base model in the M-step; above zero the method is DAV-KL
       discount  -> gamma   the forecast at step t counts discount^(t - 1) / kl_weight: rows search.step_<t>.strength
       value     -> V_t     forecast of the reward at x_t, by that of the image of x0_hat, times this strength, nats
       children  -> M       candidates for x_{t-1}: M predictions of the UNet at each step, none of them repeated
       pull                 mean noise of the chosen children, in sigmas: where the M-step moves the kernel's mean
       abar      -> abar_t  signal power: x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps; x are latents

Algorithm
       1. look ahead at every state: x0_hat, its image, the reward of that and its gradient    `latent_foresight`
       2. propose children along the gradient; choose one by its weight exp(Q) p / proposal    `search`
       3. follow the chosen back; take out noise that has no mean                 `transitions`, `steady_transitions`
       4. M-step: move the kernels' means to the chosen children, and by the KL back to the base model's: the
          summed -log p of the steps plus kl times their Gaussian KL                                `learn`
       5. next round, with the new adapter as prior                                     `dav_update`, `train_adapter`
       DAV is the tuned model alone; DAV posterior is the search on it.

What differs from the paper: log ratios are sums over the latent, weights decide and not accumulated values (adding a
constant to the reward changes nothing); of a local choice the M-step learns the mean over the children, not one draw.

What you should see (± is the standard deviation over 3 seeds, gains in standard deviations of the base model's reward):
       gain: search on the base model 1.32 ± 0.03, DAV 1.97 ± 0.07, DAV posterior 3.12 ± 0.02, DAV-KL 1.10 ± 0.05
       (sd/das.py has 1.02 ± 0.04 for other prompts, 1.9 ± 0.5 for these); where the model learns its own paths, no
       search, 0.00 ± 0.08.
       Path KL, nats: DAV 83.6 ± 1.2, DAV-KL 15.3 ± 0.2, no search 27 ± 2, which is noise learnt for nothing.
       ELBO from the first round to the last, nats: DAV 5.7 ± 0.6 to 22.7 ± 0.8, no search -0.2 ± 2.7 to -0.5 ± 0.8.
       CLIP score that nobody optimised: base 0.808 ± 0.002, DAV-KL 0.784 ± 0.003, search 0.786 ± 0.005, DAV
       0.767 ± 0.006, DAV posterior 0.752 ± 0.027; diversity is 1.31 ± 0.15 of the base model's for DAV and 1.1 ± 0.3
       for DAV posterior. That is over-optimisation, of the search as of the model: it is no merit to be so diverse.
The last point of a line of figure.png is the adapter that is kept, an average over the last three rounds: as long as
rounds add up, it is behind the last one.
An M-step learns little of a pull, which differs from state to state: with --children 1 --max-shift 3, four passes over
960 states explain 19% of the pull there and 8% on new paths, so that new paths are worth more than passes. But rounds
add up: one of the default run raises the reward by 0.2.
To try (one seed each): --search smc (few paths survive: in 3 rounds the search gains 3.7 with 9% of the diversity, DAV
0.4), --children 1 (no choice, less noise to learn: in 6 rounds DAV gains 1.9, with 2 children 1.4), --children 1
--max-shift 3 --updates 12 (4.4, the other CLIP score 0.72), --gradient off --children 16, --discount 0.8, --kl 1.
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
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.utils.checkpoint import checkpoint

PRESETS = {  # what the size flags default to
    "quick": dict(updates=2, batch=8, steps=4, images=4),
    "default": dict(updates=12, batch=24, steps=10, images=32),
    "paper": dict(updates=100, batch=64, steps=50, images=64),
}
METHODS = ("dav", "dav_kl", "no_search")
REWARDS = ("jpeg", "saturation", "contrast", "clip", "pickscore", "aesthetic")
PROMPTS = ["a photo of a cat", "a photo of a horse", "a photo of a fish", "a photo of a butterfly"]
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def parse_args(argv=None):
    parser = common_parser(__doc__)
    model_flags(parser, PROMPTS, [("clip", 1.0)])
    training_flags(parser, 1e-3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--search", choices=["local", "smc", "nested"], default="local", help="the E-step")
    parser.add_argument("--children", type=positive(int), default=2, help="of each state, for local and nested")
    parser.add_argument("--gradient", choices=["on", "off"], help="of the reward in the proposals; off for jpeg")
    parser.add_argument("--max-shift", type=positive(float), default=1.0, help="cap on the guidance, in sigmas, or inf")
    parser.add_argument("--discount", type=positive(float), default=1.0, help="gamma, at most 1")
    parser.add_argument("--kl-weight", type=positive(float), default=0.1, help="reward temperature alpha")
    parser.add_argument("--kl", type=positive(float), default=0.2, help="lambda of DAV-KL")
    parser.add_argument("--epochs", type=positive(int), default=1, help="passes of an M-step over the steps found")
    parser.add_argument("--minibatch", type=positive(int), default=32, help="steps behind one step of Adam")
    args = parser.parse_args(argv)
    check_training_flags(parser, args)
    jpeg = "jpeg" in dict(args.reward)
    if jpeg and args.gradient == "on":
        parser.error("--reward jpeg has no gradient: leave out --gradient on")
    args.gradient = args.gradient or ("off" if jpeg else "on")
    if args.batch % len(args.prompts) or args.batch < 2 * len(args.prompts):
        parser.error(f"--batch must give each of the {len(args.prompts)} prompts the same number of images, 2 or more")
    if args.discount > 1 or args.steps < 2 or args.eta != 1:
        parser.error("--discount can be at most 1, --steps must be at least 2, and --eta 1: the search draws noise so")
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


# ---- shared: the search of toy/dav.py --------------------------------------------------------------------------------


def per_particle(v, x):
    """v (N,) -> (N, 1, ..., 1), to multiply x (N, ...)."""
    return v.view(-1, *[1] * (x.dim() - 1))


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


def look_ahead(predict_noise, reward, x, t, abar, kl_weight, guided, chunk):
    """What the sampler knows at x (N, ...): eps and x0_hat (N, ...), value = r(x0_hat) / kl_weight (N,), its gradient.

    The gradient goes through the network; without guidance it is zero and the reward need not be differentiable.
    """
    parts = []
    for part in x.split(chunk or len(x)):
        with torch.set_grad_enabled(guided):
            part = part.detach().requires_grad_(guided)
            eps = predict_noise(part, t)
            x0_hat = (part - (1 - abar) ** 0.5 * eps) / abar**0.5
            value = checked(reward(x0_hat), part.shape[:1]) / kl_weight
            if guided and not value.requires_grad:
                fail("The reward has no gradient: sample without guidance.")
            grad = torch.autograd.grad(value.sum(), part)[0] if guided else torch.zeros_like(part)
        parts.append([v.detach() for v in (part, eps, x0_hat, value, checked(grad, part.shape))])
    return dict(zip(("x", "eps", "x0_hat", "value", "grad"), map(torch.cat, zip(*parts))))


def checked(value, shape):
    """value, a reward or its gradient, if it has this shape and is finite."""
    if value.shape != shape or not value.isfinite().all():
        fail(f"The reward must be one finite number per sample, with a finite gradient: expected shape {tuple(shape)}, "
             f"got {tuple(value.shape)}, {int((~value.isfinite()).sum())} of them not finite.")
    return value


def ddim_kernel(x0_hat, eps, abar, abar_next, eta):
    """Mean (N, ...) and standard deviation (float) of p(x_{t-1} | x_t); eta = 1 is DDPM. DDIM (Song 2021) eq. 12."""
    sigma = eta * ((1 - abar_next) / (1 - abar) * (1 - abar / abar_next)) ** 0.5
    return abar_next**0.5 * x0_hat + max(1 - abar_next - sigma**2, 0.0) ** 0.5 * eps, sigma


def guide(grad, sigma, temper, max_shift):
    """Shift of the proposal in units of sigma: sigma temper grad, its norm capped. grad (N, ...), temper (N,).

    A shift u multiplies the second moment of the weights by exp(|u|^2) at every step; the cap keeps that finite and
    costs no exactness, because log_ratio knows the shift that was made.
    """
    shift = sigma * per_particle(temper, grad) * grad
    norm = shift.flatten(1).norm(dim=1).clamp(min=1e-30)
    return shift * per_particle((max_shift / norm).clamp(max=1), shift)


def log_ratio(shift, z):
    """log p - log q -> (N,) of x = mean + sigma (shift + z) under the kernel p and the proposal q that drew z."""
    # exercise 2: both densities are Gaussian with the same sigma: write them down, and see what is left of them
    return -(shift * z).flatten(1).sum(1) - 0.5 * (shift**2).flatten(1).sum(1)
    # end exercise


def search(look, x, abar, rng, kind="smc", children=4, discount=1.0, max_shift=0.5, ess=0.5):
    """The E-step: trajectories from x (N, d), standard normal, that follow p exp(r / kl_weight) -> dict.

    look (x, i) -> state as in `foresight`. Each state gets children (one for smc), of which one is drawn by its weight
    exp(Q) p / proposal, Q = discount V of the child. `local` stops there, as in the paper. nested and smc also carry
    log_w += log mean weight - V of the parent, which makes any values and any number of children exact on average,
    and resample the population where the effective sample size falls below ess N.
    Returns x (N, d), log_w (N,) (zero for local), log_z of E_p[exp(r / kl_weight)], elbo (nats, at discount 1), and
    steps for `transitions`. E[exp(log_z)] is exact for smc and nested; elbo is below log Z on average.
    """
    n, steps, children, log_z, trail = len(x), len(abar) - 1, 1 if kind == "smc" else children, 0.0, []
    first_child = torch.arange(n, device=x.device) * children
    state = look(x, 0)
    state["log_w"] = discount * state["value"]
    for i in range(steps):
        mean, sigma = ddim_kernel(state["x0_hat"], state["eps"], abar[i], abar[i + 1], 1.0)
        shift = guide(state["grad"], sigma, torch.ones_like(state["value"]), max_shift)
        mean, shift = mean.repeat_interleave(children, 0), shift.repeat_interleave(children, 0)
        z = torch.randn(mean.shape, generator=rng, device=x.device, dtype=x.dtype)
        child, ratio = look(mean + sigma * (shift + z), i + 1), log_ratio(shift, z)
        reach = discount if i + 1 < steps else 1.0
        log_v = (ratio + reach * child["value"]).view(n, children)
        u = torch.rand(n, 1, generator=rng, device=x.device, dtype=torch.float64)
        chosen = first_child + invert_cdf(log_v.double().softmax(1), u)[:, 0]
        log_w = state["log_w"] - state["value"] + log_mean_exp(log_v)
        if kind != "local" and i + 1 < steps and effective_sample_size(log_w[None]) < ess * n:
            ancestors = resample(log_w[None], "systematic", rng)[0]
            chosen, log_z = chosen[ancestors], log_z + log_mean_exp(log_w[None]).item()
            log_w = torch.zeros_like(log_w)
        share = ratio.exp().view(n, children) / children
        trail.append(dict(x=state["x"], eps=state["eps"], z=(shift + z).view(n, children, -1), share=share,
                          chosen=chosen))
        state = gather(child, chosen)
        state["log_w"] = log_w
    log_z += log_mean_exp(log_w[None]).item()
    elbo = log_w.mean().item() if kind == "local" else log_z
    if kind == "local":
        log_w = torch.zeros_like(log_w)
    return dict(x=state["x"], log_w=log_w, log_z=log_z, elbo=elbo, steps=trail)


def transitions(out, recentre=True):
    """What the M-step learns from a search: x, eps (T, N, d), weight (T, N), pull (T, N, d).

    Traced back from the end, every child has a weight, its share of the final weights (their mean is 1). For a kernel
    mean moved by d sigmas, -log p of the chosen children is weight |d|^2 / 2 - pull . d + const, where pull is the
    weighted sum of their noises z. The mean of share z over all children is zero whatever x is: taking it out of the
    pull (`recentre`) changes no expectation, and leaves no noise where all children are chosen alike.
    """
    weight, rows = out["log_w"].softmax(0) * len(out["x"]), []
    for step in reversed(out["steps"]):
        w = torch.zeros_like(step["share"]).flatten().index_add_(0, step["chosen"], weight).view_as(step["share"])
        pull = ((w - step["share"] if recentre else w)[:, :, None] * step["z"]).sum(1)
        weight = w.sum(1)
        rows.append((step["x"], step["eps"], weight, pull))
    return [torch.stack(column) for column in zip(*rows[::-1])]


def mean_per_noise(abar):
    """How far a kernel's mean moves, in sigmas, per unit of predicted noise -> list of T floats."""
    moves = []
    for a, b in zip(abar, abar[1:]):
        by_x0, sigma = ddim_kernel(1.0, 0.0, a, b, 1.0)
        moves.append((ddim_kernel(0.0, 1.0, a, b, 1.0)[0] - by_x0 * ((1 - a) / a) ** 0.5) / sigma)
    return moves


def search_samples(out, rng):
    """Unweighted samples from the result of a search: of the tuned model, this is DAV posterior -> (N, d)."""
    return out["x"][resample(out["log_w"][None], "systematic", rng)[0]]


# ---- the method ------------------------------------------------------------------------------------------------------


def latent_foresight(predict_noise, reward, timesteps, abar, args, guided):
    """What `search` asks of a model of latents -> the function (x (N, ...), i) -> state at signal power abar[i], and

    a list that it fills with the value (N,) and its gradient of every state it was asked for, step by step.
    The value is discount^(left - 1) r(x0_hat) / kl_weight, with `left` steps to go; at the end the reward itself.
    """
    steps, seen = len(timesteps), []

    def look(x, i):
        if i == steps:
            state = dict(x=x, value=checked(reward(x), x.shape[:1]).detach() / args.kl_weight)
        else:
            state = look_ahead(predict_noise, reward, x, timesteps[i], abar[i], args.kl_weight, guided, args.chunk)
            for name in ("value", "grad"):
                state[name] = args.discount ** (steps - i - 1) * state[name]
        seen.append({name: state[name] for name in ("value", "grad") if name in state})
        return state

    return look, seen


def start_noise(world, n, rng):
    """Where n sampling paths start (n, C, h, w)."""
    return torch.randn(n, *world.shape, generator=rng, device=rng.device)


@torch.no_grad()
def e_step(world, args, k, n, rng, searching=True):
    """The search of n paths for prompt number k under the model as it is now -> what `search` returns, and `seen`.

    The reward is the weighted sum of `gains`. searching=False takes the model's own paths instead.
    """
    timesteps, abar = path_schedule(world.scheduler, args.steps)

    def reward(x):
        number = torch.full((len(x),), k, device=x.device)
        return sum(dict(args.reward)[name] * r for name, r in gains(world, world.decode(x), number).items())

    kind, guided = (args.search, args.gradient == "on") if searching else ("smc", False)
    look, seen = latent_foresight(prompted(world, args, [k]), reward if searching else lambda x: 0 * x.flatten(1)[:, 0],
                                  timesteps, abar, args, guided)
    out = search(look, start_noise(world, n, rng), abar, rng, kind, args.children, args.discount, args.max_shift)
    if not searching:
        out["elbo"] = reward(out["x"]).mean().item() / args.kl_weight
    return dict(out, seen=seen)


def steady_transitions(out, abar, args):
    """`transitions` with the same mean and less noise -> x, eps (T, N, C, h, w), weight (T, N), pull (T, N, d).

    What pulls is a child's noise n and the shift of its proposal. n has mean zero at every state, so that its mean over
    the children is taken out: where guidance does it all, the shift is left, and no noise. In a local search the choice
    does not depend on what follows: there each child counts by its probability, whichever was drawn.
    """
    x, eps, weight, pull = transitions(out, recentre=False)
    parents = slice(None)
    for i, step in enumerate(out["steps"]):
        n, children = step["share"].shape
        grad, sigma = out["seen"][i]["grad"][parents], ddim_kernel(0.0, 0.0, abar[i], abar[i + 1], 1.0)[1]
        shift = guide(grad, sigma, torch.ones_like(weight[i]), args.max_shift).flatten(1)[:, None]  # (N, 1, d)
        noise = step["z"] - shift
        if args.search == "local":
            ratio = log_ratio(shift.expand_as(noise).flatten(0, 1), noise.flatten(0, 1)).view(n, children)
            reach = args.discount if i + 1 < len(out["steps"]) else 1.0
            share = (ratio + reach * out["seen"][i + 1]["value"].view(n, children)).softmax(1)
            pull[i] = (share[:, :, None] * step["z"]).sum(1)
        pull[i] -= noise.mean(1)
        parents = step["chosen"]
    return x, eps, weight, pull


def learn(world, args, paths, kl, rng, descend):
    """The M-step: --epochs passes over the steps of all paths, --minibatch at once -> their mean loss, nats a path.

    paths: x, eps (T, N, C, h, w), weight (T, N), pull (T, N, d), number (N,) of the prompts. For a kernel whose mean
    moved by d sigmas since the search, -log p of what was found is weight |d|^2 / 2 - pull . d + const, summed over
    latent and steps; to this comes kl times weight times the Gaussian KL of the kernel from that of the base model.
    """
    timesteps, abar = path_schedule(world.scheduler, args.steps)
    steps, n = paths.weight.shape
    device, total = paths.weight.device, 0.0
    times = torch.tensor(timesteps, device=device)
    move = torch.tensor(mean_per_noise(abar), device=device, dtype=paths.x.dtype)[:, None]
    for _ in range(args.epochs):
        for part in torch.randperm(steps * n, generator=rng, device=device).split(args.minibatch):
            for index in part.split(args.chunk):
                t, j = index // n, index % n
                x, w, policy = paths.x[t, j], paths.weight[t, j], prompted(world, args, paths.number[j])
                eps = policy(x, times[t])
                d = move[t] * (eps - paths.eps[t, j]).flatten(1)
                loss = w * d.pow(2).sum(1) / 2 - (paths.pull[t, j] * d).sum(1)
                if kl:
                    with torch.no_grad():
                        anchor = without_adapter(world.unet, policy)(x, times[t])
                    loss = loss + kl * w * (move[t] * (eps - anchor).flatten(1)).pow(2).sum(1) / 2
                (loss.sum() * steps / len(part)).backward()
                total += loss.sum().item() / (n * args.epochs)
            descend()
    return total


def dav_update(world, args, kl, searching=True):
    """The function that `train_adapter` calls for one round of E-step and M-step; its trace is of before the M-step.

    found_* is of the search (DAV posterior), the others of as many images of the model alone, from one noise for all
    rounds; calls counts predictions. Without the search the model learns its own paths, noise and all.
    """
    timesteps, abar = path_schedule(world.scheduler, args.steps)
    count = len(world.cond)
    each = args.batch // count

    def update(rng, descend, state):
        number = torch.arange(count, device=rng.device).repeat_interleave(each)
        same = torch.Generator(rng.device).manual_seed(args.seed)
        with torch.no_grad():
            x, _ = roll_out(prompted(world, args, number, args.chunk), None, path_noise(world, args, args.batch, same),
                            timesteps, abar)
        point = glance(world, args, x, number)
        outs = [e_step(world, args, k, each, rng, searching) for k in range(count)]
        x = torch.cat([search_samples(out, rng) for out in outs])
        point |= {f"found_{name}": value for name, value in glance(world, args, x, number).items()}
        point["elbo"] = sum(out["elbo"] for out in outs) / count
        found = [steady_transitions(out, abar, args) if searching else transitions(out, recentre=False) for out in outs]
        names = ("x", "eps", "weight", "pull")
        paths = types.SimpleNamespace(number=number, **dict(zip(names, (torch.cat(v, 1) for v in zip(*found)))))
        point["loss"] = learn(world, args, paths, kl, rng, descend)
        children = args.children if searching and args.search != "smc" else 1
        learned = args.epochs * (2 if kl else 1)
        point["calls"] = args.batch * (1 + (args.steps - 1) * children + args.steps * (1 + learned))
        return point

    return update


@torch.no_grad()
def glance(world, args, x, number):
    """Latents x (n, C, h, w) of the prompts number (n,), as many of each -> dict of gain, clip_eval and diversity."""
    images = world.decode(x)
    unit = clip_images(world.judge, images, args.chunk)
    gain = sum(dict(args.reward)[name] * r for name, r in gains(world, images, number).items())
    return dict(gain=gain.mean().item(), clip_eval=(unit * world.judge_texts[number]).sum(1).mean().item(),
                diversity=pair_distance(unit.view(len(number.unique()), -1, unit.shape[1])))


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


# ---- the measures ----------------------------------------------------------------------------------------------------


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


def weighted_gain(world, args, found):
    """Sum of the rewards of measured images above the base model's, in its standard deviations, weighted (K, n)."""
    return sum(weight * (found.rewards[name] - world.level[name][:, None]) / world.spread[name]
               for name, weight in args.reward)


def pair_distance(unit):
    """Unit vectors (K, k, d) -> mean of 1 - cosine over the pairs within each of the K sets."""
    k = unit.shape[1]
    return ((1 - unit @ unit.mT).sum((1, 2)) / (k * (k - 1))).mean().item()


@torch.no_grad()
def draw_found(world, args):
    """Images of every prompt by the search on the model as it is now: as `draw_images`, with elbo and without kl."""
    found, units, elbo = dict(images=[], clip_eval=[]), [], 0.0
    rewards = {name: [] for name in world.rewards}
    for k in range(len(world.cond)):
        rng = torch.Generator(args.device).manual_seed(1000 * args.seed + 500 + k)
        out = e_step(world, args, k, args.images, rng)
        images = world.decode(search_samples(out, rng))
        unit = clip_images(world.judge, images, args.chunk)
        for name, values in rewards.items():
            values.append(world.rewards[name](images, k))
        for values, value in zip(found.values(), (images.cpu(), unit @ world.judge_texts[k])):
            values.append(value)
        units.append(unit)
        elbo += out["elbo"] / len(world.cond)
        progress("search, prompt", k + 1, len(world.cond))
    stacked = {name: torch.stack(values) for name, values in rewards.items()}
    return types.SimpleNamespace(rewards=stacked, diversity=pair_distance(torch.stack(units)), elbo=elbo,
                                 **{name: torch.stack(values) for name, values in found.items()})


def dav_rows(world, args, results, traces):
    """The rows of {method: measured images}, `base` among them, of every round, and of the strength of the search.

    gain is the weighted reward above the base model's mean in its standard deviations. Adapters and base are measured
    on the same noise, and the error of their gain is that of the difference; searches have noise of their own.
    """
    rows, base = [], results["base"]
    for method, found in results.items():
        before = weighted_gain(world, args, base) if method in args.methods else None
        rows += [paired_row(f"{method}.all.gain", weighted_gain(world, args, found), before),
                 *(paired_row(f"{method}.all.{name}", values) for name, values in found.rewards.items()),
                 paired_row(f"{method}.all.clip_eval", found.clip_eval),
                 row(f"{method}.all.diversity", found.diversity),
                 row(f"{method}.all.diversity_kept", found.diversity / base.diversity)]
        if method in args.methods:
            rows.append(paired_row(f"{method}.all.kl", found.kl))
        elif method != "base":
            rows.append(row(f"{method}.all.elbo", found.elbo))
    for method, trace in traces.items():
        rows += [row(f"{method}.round_{k:03d}.{name}", value) for k, point in enumerate(trace)
                 for name, value in point.items()]
    return rows + [row(f"search.step_{t:03d}.strength", args.discount ** (t - 1) / args.kl_weight)
                   for t in range(args.steps, 0, -1)]


# ---- the figure ------------------------------------------------------------------------------------------------------

TITLES = {"base": "base", "search": "search", "no_search": "no search", "dav_kl": "DAV-KL", "dav": "DAV",
          "posterior": "DAV posterior"}
COLORS = {"dav": "#0072B2", "posterior": "#009E73", "dav_kl": "#D55E00", "no_search": "#777777"}


def draw_rounds(path, world, args, results, traces):
    """A line of images for each method; below, gain, held-out CLIP score, diversity and ELBO by round."""
    shown = {method: results[method] for method in TITLES if method in results and method != "no_search"}
    figure = plt.figure(figsize=(10, 0.72 * len(shown) + 2.8))
    grid = figure.add_gridspec(len(shown) + 1, 4, height_ratios=[1] * len(shown) + [3.4])
    draw_lines(figure, grid, args, shown, TITLES)
    panels = [figure.add_subplot(grid[-1, k]) for k in range(4)]
    curves = dict(traces, **({"posterior": traces["dav"]} if "dav" in traces else {}))
    last = {method: dict(gain=weighted_gain(world, args, found).mean().item(), diversity=found.diversity,
                         clip_eval=found.clip_eval.mean().item()) for method, found in results.items()}
    for method, trace in curves.items():
        prefix = "found_" if method == "posterior" else ""
        for ax, name in zip(panels, ("gain", "clip_eval", "diversity")):
            line = torch.tensor([point[prefix + name] for point in trace])
            if not prefix:  # of the same few noises in every round: what has changed since the base model
                line += last["base"][name] - line[0]
            ax.plot([*line, last[method][name]], color=COLORS[method], marker=".", label=TITLES[method])
        if method != "posterior":
            panels[3].plot([point["elbo"] for point in trace], color=COLORS[method], marker=".")
    for ax, name in zip(panels, ("gain", "clip_eval", "diversity")):
        ax.axhline(last["base"][name], color="black", linestyle=":", linewidth=1)
    for ax, name in zip(panels, ("gain", "CLIP score, other model", "diversity", "ELBO, nats")):
        ax.set(xlabel="round (dotted: base)" if ax is not panels[3] else "round", ylabel=name)
    panels[3].legend(*panels[0].get_legend_handles_labels(), fontsize=6, loc="upper left")
    figure.tight_layout()
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
    """Train every method, measure all, write figure and numbers.json -> {row name: estimate}."""
    start, out = time.perf_counter(), results_folder(args, "sd_dav")
    world = load_world(args)
    results, traces, cost, twice = {"base": measure_base(world, args)}, {}, [], 2 if args.guidance != 1 else 1
    results["search"] = draw_found(world, args)
    for method in args.methods:
        update = dav_update(world, args, args.kl if method == "dav_kl" else 0.0, method != "no_search")
        begun = time.process_time()
        traces[method] = train_adapter(method, world, update, args, out)
        cost += [row(f"{method}.all.calls", sum(point["calls"] for point in traces[method]) * twice),
                 row(f"{method}.all.seconds", time.process_time() - begun)]
        save_adapter(world.unet, out / method)
        results[method] = draw_images(world, args, True)
        if method == "dav":
            results["posterior"] = draw_found(world, args)
    rows = dav_rows(world, args, results, traces) + cost
    draw_rounds(out / "figure.png", world, args, results, traces)
    searches = len(results) - 1 - len(traces)
    found = 1 + (args.steps - 1) * (args.children if args.search != "smc" else 1)
    calls = args.images * len(args.prompts) * (args.steps * (1 + 2 * len(traces)) + searches * found) * twice
    calls += sum(r["estimate"] for r in cost[::2])
    write_numbers(out / "numbers.json", args, rows, calls, time.perf_counter() - start)
    print_table(rows, "all", ["gain", "clip_eval", "diversity", "diversity_kept", "kl", "elbo"])
    return {r["name"]: r["estimate"] for r in rows}


if __name__ == "__main__":
    join_processes()
    main(parse_args())
