"""Fine-tune Stable Diffusion on any reward by policy gradients, with and without KL: no gradient of the reward.

Papers: Black, Janner, Du, Kostrikov and Levine, "Training Diffusion Models with Reinforcement Learning" (DDPO), ICLR
2024, arXiv 2305.13301; the KL as in Fan et al. (DPOK), arXiv 2305.16381. The baseline of Fig. 2 of DAS (arXiv
2501.05803): what training gains, and what it loses.

Run    python sd/ddpo.py                                 miniature model, CLIP score of the prompt  8.5 CPU minutes
       python sd/ddpo.py --quick                         the same, coarse: shows nothing            12 CPU seconds
       python sd/ddpo.py --reward jpeg                   compressibility, as in the paper           about 9 CPU minutes
       python sd/ddpo.py --reward jpeg=-1                incompressibility                          about 9 CPU minutes
       python sd/ddpo.py --resume                        continue after an interruption
       On a GPU (not run here): --model stable-diffusion-v1-5/stable-diffusion-v1-5 --reward aesthetic --paper
       --clip openai/clip-vit-large-patch14 --clip-eval laion/CLIP-ViT-H-14-laion2B-s32B-b79K --dtype bfloat16
       --chunk 8 --device cuda

The adapter of each method is in out/sd_ddpo/<method>; diffusers loads it: pipe.load_lora_weights(that folder).

Notation (here -> papers)
       path      -> x_T..x_0 the whole sampling path: its steps are the actions, their kernels the policy
       log_p     -> log p    of one step, nats: the sum over the latent, on which the ratio of PPO rests
       advantage -> A        reward less the KL of later steps, centred and scaled per prompt
       kl_weight -> beta     weight of KL(p || base) against a reward in standard deviations of the base model, within
                             a prompt: the objective is that of sd/das.py, E[r] - kl_weight KL, at a weight that suits
                             an adapter, which pays far more nats for a standard deviation than the exact tilt
       abar      -> abar_t   signal power: x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps; x are latents

Algorithm
       1. draw paths with the adapter; with KL, ask the base model at the same points          `sample_paths`
       2. rewards of the images; advantages, per prompt and per step                        `gains`, `advantages`
       3. in parts of the batch: ascend min(ratio A, clip(ratio) A) - kl_weight KL      `step_loss`, `log_prob`
       4. Adam on the LoRA weights; what is returned is their average over the last quarter     `train_adapter`
       The gradient of the KL is whole: that of each step's mean, and, by 2., that of how often its points are visited.

What you should see (mean ± standard deviation over 3 seeds): without KL the reward rises by 2.3±0.4 standard deviations
of the base model's, for 509±81 nats; the CLIP score that nobody optimised falls by 0.06±0.05 and diversity is 1.1±0.3
of the base model's. With KL, at a third of the step of Adam, it is 0.90±0.06 for 53±5 nats and 0.014±0.003 of that
score; the objective is 0.37±0.07, of at least 2.8 that the exact tilt has. A policy gradient of 32 images is mostly
noise, and what it drifts costs nats: DRaFT, which has the gradient of the reward, gains 1.6 for 16 (sd/draft.py).
To try: --clip-range 1e-4, the paper's, which averages log_p over the latent: what share is clipped (numbers.json)?
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
    "default": dict(updates=50, batch=32, steps=10, images=64),
    "paper": dict(updates=200, batch=256, steps=50, images=64),
}
METHODS = ("ddpo", "ddpo_kl")
REWARDS = ("jpeg", "saturation", "contrast", "clip", "pickscore", "aesthetic")
PROMPTS = ["a photo of a cat", "a photo of a horse", "a photo of a fish", "a photo of a butterfly"]
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def parse_args(argv=None):
    parser = common_parser(__doc__)
    model_flags(parser, PROMPTS, [("clip", 1.0)])
    training_flags(parser, 3e-3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--kl-weight", type=positive(float), default=0.01, help="of the method with KL")
    parser.add_argument("--kl-lr", type=positive(float), default=1e-3, help="step of Adam of the method with KL")
    parser.add_argument("--per-prompt", type=positive(int), default=8, help="images of a prompt in a batch, or more")
    parser.add_argument("--minibatches", type=positive(int), default=2, help="optimiser steps of one round")
    parser.add_argument("--fraction", type=positive(float), default=0.5, help="of the steps that an update looks at")
    parser.add_argument("--clip-range", type=positive(float), default=0.2, help="the clip of PPO")
    args = parser.parse_args(argv)
    check_training_flags(parser, args)
    if args.batch % args.per_prompt or args.per_prompt < 2:
        parser.error("--batch must be a multiple of --per-prompt, and that at least 2: it is compared with the others")
    if args.fraction > 1 or args.minibatches > args.batch:
        parser.error("--fraction can be at most 1 and --minibatches at most --batch")
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


# ---- the method ------------------------------------------------------------------------------------------------------


def log_prob(x, mean, sigma):
    """Log density of the DDIM kernel at x (N, ...) -> (N,), nats: summed over the latent, not averaged."""
    return -((x - mean) ** 2).flatten(1).sum(1) / (2 * sigma**2) - mean[0].numel() * math.log(
        sigma * math.sqrt(2 * math.pi))


def step_kernel(predict_noise, x, i, timesteps, abar, eta):
    """Mean (N, ...) and sigma of step i of the DDIM sampler from x (N, ...)."""
    eps = predict_noise(x, timesteps[i])
    return ddim_kernel((x - (1 - abar[i]) ** 0.5 * eps) / abar[i] ** 0.5, eps, abar[i], abar[i + 1], eta)


@torch.no_grad()
def sample_paths(policy, base, noise, timesteps, abar, eta=1.0):
    """noise (T + 1, N, ...), that of the start first -> a namespace of the paths x (T + 1, N, ...), their log_p (T, N)

    step by step, the means anchor (T, N, ...) that the base model has there, and kl (T, N), nats; without a base zeros.
    """
    x, path = noise[0], dict(x=[noise[0]], log_p=[], anchor=[], kl=[])
    for i in range(len(timesteps)):
        mean, sigma = step_kernel(policy, x, i, timesteps, abar, eta)
        anchor = mean if base is None else step_kernel(base, x, i, timesteps, abar, eta)[0]
        x = mean + sigma * noise[i + 1]
        path["x"].append(x)
        path["anchor"].append(anchor)
        path["log_p"].append(log_prob(x, mean, sigma))
        path["kl"].append((mean - anchor).flatten(1).pow(2).sum(1) / (2 * sigma**2))
    return types.SimpleNamespace(**{name: torch.stack(values) for name, values in path.items()})


def advantages(r, kl, number, kl_weight):
    """Rewards r (N,) and kl (T, N) of paths of the prompts number (N,) -> advantage of each step (T, N), spread (N,).

    What a step is answerable for is the reward less kl_weight times the KL of the steps after it. From this the mean
    over the paths of the same prompt is taken off, and it is counted in their standard deviations of the reward.
    """
    later = kl.flip(0).cumsum(0).flip(0) - kl
    value, spread = r - kl_weight * later, torch.empty_like(r)
    for k in number.unique():
        mine = number == k
        value[:, mine] -= value[:, mine].mean(1, keepdim=True)
        spread[mine] = r[mine].std().clamp(min=1e-3)
    return value / spread, spread


def step_loss(policy, path, i, index, advantage, kl_scale, timesteps, abar, eta, clip):
    """Minus the clipped objective of step i plus the KL there times kl_scale, of the paths index (n,) -> (n,), clipped.

    PPO (Schulman et al. 2017): min(ratio A, clip(ratio, 1 - clip, 1 + clip) A), ratio = p_now / p_then; the second
    result is the share of paths that the clip keeps still.
    """
    mean, sigma = step_kernel(policy, path.x[i, index], i, timesteps, abar, eta)
    ratio = (log_prob(path.x[i + 1, index], mean, sigma) - path.log_p[i, index]).exp()
    a = advantage[i, index]
    kl = (mean - path.anchor[i, index]).flatten(1).pow(2).sum(1) / (2 * sigma**2)
    gain = torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a)
    return kl_scale * kl - gain, ((ratio - 1).abs() > clip).float().mean()


def ddpo_update(world, args, kl_weight):
    """The function that `train_adapter` calls for one round: draws paths, then ascends in --minibatches parts of them.

    Every part takes a random share --fraction of the steps, each path the same; a part larger than `chunk` goes in
    pieces, and every step leaves its gradient at once: memory is that of one prediction of one piece.
    """
    timesteps, abar = path_schedule(world.scheduler, args.steps)
    weight = dict(args.reward)

    def update(rng, descend, state):
        number = draw_prompts(len(world.cond), args.batch, args.batch // args.per_prompt, rng)
        policy = prompted(world, args, number, args.chunk)
        base = without_adapter(world.unet, policy) if kl_weight else None
        path = sample_paths(policy, base, path_noise(world, args, args.batch, rng), timesteps, abar, args.eta)
        with torch.no_grad():
            r = sum(weight[name] * value for name, value in gains(world, world.decode(path.x[-1]), number).items())
        advantage, spread = advantages(r, path.kl, number, kl_weight)
        order, clipped = torch.randperm(args.batch, generator=rng, device=rng.device), []
        for part in order.chunk(args.minibatches):
            steps = torch.randperm(args.steps, generator=rng, device=rng.device)
            steps = steps[: max(1, round(args.fraction * args.steps))]
            for i in steps.tolist():
                for index in part.split(args.chunk):
                    found = step_loss(prompted(world, args, number[index]), path, i, index, advantage,
                                      kl_weight / spread[index], timesteps, abar, args.eta, args.clip_range)
                    (found[0].sum() / len(part) * args.steps / len(steps)).backward()
                    clipped.append(found[1].item())
            descend()
        return dict(gain=r.mean().item(), kl=path.kl.sum(0).mean().item(), clipped=sum(clipped) / len(clipped))

    return update


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


# ---- shared: measures of adapters ------------------------------------------------------------------------------------


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


def adapter_rows(world, args, results):
    """The rows of {method: measured images}, `base` among them, and `bound`, what no model of any kind can exceed.

    objective = gain - kl_weight KL <= kl_weight log E_base[exp(gain / kl_weight)], the value of the exact tilt
    (Donsker and Varadhan), here by importance sampling from the base model's images: too low where bound.all.ess, the
    effective number of them per prompt, is small.
    """
    rows, base = [], results["base"]
    gain = {method: weighted_gain(world, args, found) for method, found in results.items()}
    for method, found in results.items():
        rows += [paired_row(f"{method}.all.gain", gain[method], gain["base"]),
                 *(paired_row(f"{method}.all.{name}", values, base.rewards[name] if method != "base" else None)
                   for name, values in found.rewards.items()),
                 paired_row(f"{method}.all.clip_eval", found.clip_eval),
                 paired_row(f"{method}.all.clip_eval_change", found.clip_eval - base.clip_eval),
                 row(f"{method}.all.diversity", found.diversity),
                 paired_row(f"{method}.all.kl", found.kl),
                 paired_row(f"{method}.all.objective", gain[method] - args.kl_weight * found.kl)]
    logs = [log_mean_and_se(r / args.kl_weight) for r in gain["base"]]
    rows.append(row("bound.all.objective", args.kl_weight * sum(value for value, _ in logs) / len(logs),
                    args.kl_weight * math.hypot(*(se for _, se in logs)) / len(logs)))
    w = (gain["base"] / args.kl_weight).softmax(1)
    rows.append(row("bound.all.ess", (1 / (w**2).sum(1)).mean().item()))
    return rows


def pair_distance(unit):
    """Unit vectors (K, k, d) -> mean of 1 - cosine over the pairs within each of the K sets."""
    k = unit.shape[1]
    return ((1 - unit @ unit.mT).sum((1, 2)) / (k * (k - 1))).mean().item()


def log_mean_and_se(log_values):
    """Independent unbiased estimates of Z, as logarithms (G,) -> log of their mean, its standard error."""
    top = log_values.max().item()
    mean, se = mean_and_se((log_values.double() - top).exp())
    return top + math.log(mean), se and se / mean


def mean_and_se(values):
    """Independent values (G,) -> their mean and its standard error (None for a single one)."""
    return values.mean().item(), values.std().item() / len(values) ** 0.5 if len(values) > 1 else None


# ---- the figure ------------------------------------------------------------------------------------------------------

TITLES = {"base": "base", "ddpo": "DDPO", "ddpo_kl": "DDPO, KL"}
COLORS = {"base": "#555555", "ddpo": "#D55E00", "ddpo_kl": "#0072B2"}


def draw_adapters(path, args, world, rows, results, traces):
    """A line of images for each method, from the same noise; training curves; gain against KL and what is lost."""
    value = {r["name"]: (r["estimate"], r["se"] or 0) for r in rows}
    figure = plt.figure(figsize=(10, 0.72 * len(results) + 2.8))
    grid = figure.add_gridspec(len(results) + 1, 4, height_ratios=[1] * len(results) + [3.4])
    draw_lines(figure, grid, args, results, TITLES)
    panels = [figure.add_subplot(grid[-1, k]) for k in range(4)]
    for method, trace in traces.items():
        panels[0].plot(smoothed(trace, "gain"), color=COLORS[method], linewidth=1)
    for method, marker in zip(results, "osD^v*"):
        gain = value[f"{method}.all.gain"]
        for ax, key in zip(panels[1:], ("kl", "clip_eval", "diversity")):
            other = value[f"{method}.all.{key}"]
            ax.errorbar(gain[0], other[0], 2 * other[1], 2 * gain[1], marker=marker, color=COLORS[method], capsize=2,
                        label=TITLES[method], linestyle="none")
    base = weighted_gain(world, args, results["base"])
    tilts = [(base * scale).softmax(1) for scale in torch.linspace(0, 3, 31)]
    curve = [((w * base).sum(1).mean().item(), (w * (w * args.images).log()).sum(1).mean().item()) for w in tilts]
    panels[1].plot(*zip(*curve), color="black", linestyle=":")
    panels[0].set(xlabel="update", ylabel="gain")
    for ax, key in zip(panels[1:], ("KL, nats (dotted: the least)", "CLIP score, other model", "diversity")):
        ax.set(xlabel="gain", ylabel=key)
    panels[3].legend(fontsize=6)
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
    """Train every method, measure all on the same noise, write figure and numbers.json -> {row name: estimate}."""
    start, out = time.perf_counter(), results_folder(args, "sd_ddpo")
    world = load_world(args)
    results, traces, cost = {"base": measure_base(world, args)}, {}, []
    drawn, twice = args.images * len(args.prompts) * args.steps, 2 if args.guidance != 1 else 1
    for method in args.methods:
        kl_weight = args.kl_weight if method == "ddpo_kl" else 0.0
        begun = time.process_time()
        own = argparse.Namespace(**vars(args) | dict(lr=args.kl_lr if kl_weight else args.lr))
        traces[method] = train_adapter(method, world, ddpo_update(world, own, kl_weight), own, out)
        looked = args.steps * (2 if kl_weight else 1) + max(1, round(args.fraction * args.steps))
        cost += [row(f"{method}.all.calls", args.updates * args.batch * looked * twice),
                 row(f"{method}.all.seconds", time.process_time() - begun)]
        save_adapter(world.unet, out / method)
        results[method] = draw_images(world, args, True)
    rows = adapter_rows(world, args, results) + cost
    rows += [row(f"{method}.all.clipped", sum(point["clipped"] for point in trace) / len(trace))
             for method, trace in traces.items()]
    draw_adapters(out / "figure.png", args, world, rows, results, traces)
    calls = sum(r["estimate"] for r in cost[::2]) + drawn * twice * (1 + 2 * len(args.methods))
    write_numbers(out / "numbers.json", args, rows, calls, time.perf_counter() - start)
    print_table(rows, "all", ["gain", "clip_eval", "clip_eval_change", "diversity", "kl", "objective"])
    return {r["name"]: r["estimate"] for r in rows}


if __name__ == "__main__":
    join_processes()
    main(parse_args())
