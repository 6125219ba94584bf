"""Merge adapters of Stable Diffusion, each tuned for one reward, into a model for any weighting of the rewards.

Paper: Zhang, Wang and Zou, "Step-level Denoising-time Diffusion Alignment with Multiple Objectives" (MSDDA), 2026,
arXiv 2604.14379. Its text was not at hand: symbols are reconstructed. toy/msdda.py derives and checks the merge, which
acts here on LoRA adapters of one UNet; the figure is a Pareto front of two rewards, at equal calls of the UNet.

Run    python sd/msdda.py                            miniature model, adapters of sd/adapters      9 CPU minutes
       python sd/msdda.py --quick                    the same, coarse: shows nothing
       python sd/msdda.py --reward saturation clip             another pair of adapters
       python sd/msdda.py --weights 0.5,0.5 1,1                stronger than any adapter was tuned
       On a GPU (not run here): --model stable-diffusion-v1-5/stable-diffusion-v1-5 --reward aesthetic clip --adapters
       out/sd_draft/one out/sd_draft/other --guidance 7.5 --paper --dtype bfloat16 --chunk 4 --device cuda

Notation (here -> usual symbol)
       weights  -> w_i       of the rewards; the model without adapters takes the rest, 1 - sum w_i, where there is one
       abar     -> abar_t    signal power: x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps; x are latents
       mean, sigma           of a reverse kernel p_i(x_{t-1} | x_t) = N(mu_i, sigma^2), here DDIM with eta = 1
       log_c    -> log C_t   log of the integral over x_{t-1} of the product of the p_i(x_{t-1} | x_t)^{w_i}

Algorithm (`merged_ddim`)
       1. predict the noise with each adapter alone, guidance included                       `with_adapters`
       2. multiply the kernels: precisions add, means are averaged by precision              `merge`
       3. draw x_{t-1}; with particles, add log C_t to their log weights and resample        `resample_systematic`
The baselines ask one model at a step and get as many times the steps: all use the same number of calls of the UNet.

What is exact. An adapter changes the noise prediction and not the variance of the sampler. With equal variances the
merge *is* the average of the noise predictions (Diffusion Blend): one row stands for both, `blend.all.difference` is
what rounding leaves between them. The variances of toy/msdda.py, d x0_hat / d x, have no meaning under guidance, where
the prediction is no conditional mean. Then log C_t = -sum_i w_i |mu_i - mu_w|^2 / (2 sigma^2): the weights take paths
on which the adapters agree. They make draws of the product of the path laws p_i(x_0, ..., x_T)^{w_i}; were an adapter
p exp(r_i / kl_weight), that would be p exp(sum_i w_i r_i / kl_weight). Adapters of draft.py are that only roughly.

What you should see (mean ± standard deviation over 3 seeds, reward in standard deviations of the base model, mean over
the five weightings): MSDDA with C_t 0.56±0.05 and without 0.56±0.05; Rewarded Soup 0.60±0.05 and switching 0.59±0.04
are as good within the error of 0.05, the soup of factors is behind by 0.15±0.06. The two adapters are so near each
other that the weights do next to nothing (effective sample size 15.9 of 16), and log Z = -0.58±0.01 agrees with the
estimate from paths of one adapter. RGG, which sees the rewards and their gradients, has 1.26±0.23, CoDe with 5
candidates 0.12±0.05. The held-out CLIP score stays between 0.812 and 0.820; GAMMA of RGG was not tuned for these
rewards.
To try: --steps 20; --weights 1,1; --ess 0 (weights without resampling); --reward contrast clip.
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
    "quick": dict(images=4, particles=2, steps=5, weights=[(0.5, 0.5)]),
    "default": dict(images=32, particles=16, steps=10, weights=None),
    "paper": dict(images=32, particles=16, steps=50, weights=None),
}
REWARDS = ("jpeg", "saturation", "contrast", "clip", "pickscore", "aesthetic")
PROMPTS = ["a photo of a cat", "a photo of a horse", "a photo of a fish", "a photo of a butterfly"]
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SWEEP = [(0.0, 1.0), (0.2, 0.8), (0.5, 0.5), (0.8, 0.2), (1.0, 0.0)]
CANDIDATES, BLOCK = 5, 5  # CoDe: of 5 candidates at every 5th step, 2 calls a step; published are 20
GAMMA = 0.024  # RGG: growth of its strength in 1/100 of the run


def parse_args(argv=None):
    parser = common_parser(__doc__)
    model_flags(parser, PROMPTS, [("saturation", 1.0), ("contrast", 1.0)])
    parser.add_argument("--adapters", nargs=2, help="folders, one a reward; default: sd/adapters/<name of the reward>")
    parser.add_argument("--weights", nargs="+", type=weight_pair, help="pairs like 0.5,0.5: a weight for each reward")
    parser.add_argument("--images", type=positive(int), help="images of each prompt, at least two groups of particles")
    parser.add_argument("--particles", type=positive(int), help="particles in a group of the weighted merge")
    parser.add_argument("--ess", type=float, default=0.9, help="resample below this fraction of particles")
    parser.add_argument("--kl-weight", type=positive(float), default=0.5, help="reward temperature of RGG")
    args = parser.parse_args(argv)
    for name, value in PRESETS["quick" if args.quick else "paper" if args.paper else "default"].items():
        if getattr(args, name) is None:
            setattr(args, name, value or SWEEP)
    names = [name for name, _ in args.reward]
    if len(names) != 2 or len(set(names)) != 2 or any(weight != 1 for _, weight in args.reward):
        parser.error("--reward takes two names, without weights: those are swept, by --weights")
    if args.images % args.particles or args.images < 2 * args.particles:
        parser.error(f"--images {args.images} must be a multiple of --particles {args.particles}, at least twice that")
    if args.steps % BLOCK or args.steps > 300 or not 0 <= args.ess <= 1:
        parser.error(f"--steps must be a multiple of {BLOCK} and at most 300, --ess lies between 0 and 1")
    if all(sorted(w) == [0, 1] for w in args.weights):
        parser.error("at --weights 1,0 and 0,1 nothing is merged: give another pair too")
    args.adapters = args.adapters or [f"sd/adapters/{name}" for name in names]
    return args


def weight_pair(text):
    """An argparse type: two finite numbers, "0.5,0.5"."""
    values = tuple(float(v) for v in text.split(","))
    if len(values) != 2 or not all(map(math.isfinite, values)):
        raise argparse.ArgumentTypeError(f"expected two numbers like 0.5,0.5, got {text}")
    return values


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


def gains(world, images, number):
    """Rewards of images (n, 3, H, W) of the prompts number (n,) -> {name: (n,)}.

    Each is the excess over the base model's mean for its prompt, in the base model's standard deviations.
    """
    raw = {name: checked(reward(images, number), number.shape) for name, reward in world.rewards.items()}
    return {name: (value - world.level[name][number]) / world.spread[name] for name, value in raw.items()}


# ---- the method ------------------------------------------------------------------------------------------------------


def merge(means, variances, weights, mean_ref=None, variance_ref=None, kl_ratio=1.0):
    """The Gaussian prod_i N(means_i, variances_i)^{w_i}, up to C -> mean, variance (N, ...), log C (N,).

    means: a list of tensors (N, ...); variances: numbers or tensors that broadcast to them; weights (m,) times kl_ratio
    (beta_i / beta, a number or (m,)) are the exponents, and the reference takes 1 - their sum: without it the merged
    model would be at another temperature. Fails where the merged precision is not positive, or without a reference.
    """
    kind = dict(dtype=means[0].dtype, device=means[0].device)
    weights = torch.as_tensor(weights, **kind) * torch.as_tensor(kl_ratio, **kind)
    rest = 1 - weights.sum()
    if mean_ref is not None:
        means, variances = [*means, mean_ref], [*variances, variance_ref]
        weights = torch.cat([weights, rest[None]])
    elif abs(rest) > 1e-6:
        fail(f"The exponents sum to {weights.sum():.6g} and not to 1: the merge needs the reference model.")
    w = weights.view(-1, *[1] * means[0].dim())
    means = torch.stack(list(means))  # (m, N, ...)
    variances = torch.stack([torch.as_tensor(v, **kind).expand_as(means[0]) for v in variances])
    precision = (w / variances).sum(0)
    if not (precision > 0).all():
        fail(f"The merged precision is not positive (down to {precision.min():.3g}): a model wider than the reference "
             "has too large a weight, or a narrower one a negative weight, and the product is no distribution.")
    # exercise 7: complete the square in prod_i N(x; means_i, variances_i)^w_i; the w_i sum to one. precision is known
    mean, variance = (w * means / variances).sum(0) / precision, 1 / precision
    log_c = variance.log() - (w * variances.log()).sum(0) - (w * (means - mean) ** 2 / variances).sum(0)
    return mean, variance, log_c.flatten(1).sum(1) / 2
    # end exercise


def resample_systematic(log_w, rng):
    """Ancestors of P new particles in each group, log_w (G, P) -> (G, P): floor(P w_n) copies of n or one more.

    One uniform in the first interval of length 1 / P, and its shifts by 1 / P, through the inverse of the cdf.
    """
    # exercise 6: one uniform number a group, in float64 from rng; torch.searchsorted inverts the distribution function
    groups, count = log_w.shape
    cdf = log_w.double().softmax(1).cumsum(1)
    u = torch.rand(groups, 1, generator=rng, dtype=cdf.dtype, device=cdf.device)
    u = (u + torch.arange(count, device=cdf.device)) / count
    return torch.searchsorted(cdf, u * cdf[:, -1:], right=True).clamp(max=count - 1)
    # end exercise


def effective_sample_size(log_w):
    """log_w (G, P) -> (sum w)^2 / sum w^2 (G,), between 1 and P."""
    return (2 * log_w.logsumexp(1) - (2 * log_w).logsumexp(1)).exp()


def log_mean_exp(log_w):
    """log_w (G, P) -> log of the mean weight (G,)."""
    return log_w.logsumexp(1) - math.log(log_w.shape[1])


def gather(state, index):
    """All per-particle state after resampling: every tensor of the dict, leading dimension N, at index (N,)."""
    return {name: value[index] for name, value in state.items()}


def merged_ddim(models, weights, x, timesteps, abar, rng, reference=None, particles=1, ess=0.0):
    """Samples of the merged model: x (N, ...), log_w (G, P), log_z (G,), the share of groups that resampled by step.

    `msdda` of toy/msdda.py for models that share the variance of the DDIM kernel. models: functions (n, ...), t -> eps,
    one a weight; reference: the one without adapters, needed where the weights do not sum to 1; x (N, ...) standard
    normal, N = groups x particles, a group being contiguous; timesteps (T,), abar (T + 1,). Without log_w these are
    draws of the merged kernels, with it of the product of the path laws, whose integral is E[exp(log_z)].
    """
    groups = len(x) // particles
    first_slot = torch.arange(groups, device=x.device)[:, None] * particles
    log_z, history, everyone = torch.zeros(groups, device=x.device), [], [*models, *([reference] if reference else [])]
    state = dict(x=x, log_w=torch.zeros_like(x.flatten(1)[:, 0]))
    for i, t in enumerate(timesteps):
        log_w = state["log_w"].view(groups, particles)
        due = effective_sample_size(log_w) < ess * particles  # (G,)
        if due.any():
            stay = torch.arange(particles, device=x.device)
            ancestors = torch.where(due[:, None], resample_systematic(log_w, rng), stay)
            state = gather(state, (first_slot + ancestors).flatten())
            state["log_w"] = torch.where(due[:, None], 0, log_w).flatten()
            log_z = log_z + torch.where(due, log_mean_exp(log_w), 0)
        history.append(due.double().mean().item())
        means = []
        for model in everyone:
            eps = model(state["x"], t)
            x0_hat = (state["x"] - (1 - abar[i]) ** 0.5 * eps) / abar[i] ** 0.5
            mean, sigma = ddim_kernel(x0_hat, eps, abar[i], abar[i + 1], 1.0)
            means.append(mean)
        variances = [sigma**2] * len(means)
        last = (means[-1], variances[-1]) if reference else ()
        mean, _, log_c = merge(means[: len(models)], variances[: len(models)], weights, *last)
        z = torch.randn(mean.shape, generator=rng, device=x.device, dtype=mean.dtype)
        state = dict(x=mean + sigma * z, log_w=state["log_w"] + log_c)
    log_w = state["log_w"].view(groups, particles)
    return dict(x=state["x"], log_w=log_w, log_z=log_z + log_mean_exp(log_w), history=history)


def path_ratio(model, other, x, timesteps, abar, rng):
    """x (N, ...) standard normal -> log p_other - log p_model of sampling paths of `model` (N,), nats.

    The mean of exp(w times this) is the integral of p_model^{1 - w} p_other^w: an estimate of Z without any merge.
    """
    total = torch.zeros_like(x.flatten(1)[:, 0])
    for i, t in enumerate(timesteps):
        eps = torch.stack([model(x, t), other(x, t)])
        x0_hat = (x - (1 - abar[i]) ** 0.5 * eps) / abar[i] ** 0.5
        (mean, away), sigma = ddim_kernel(x0_hat, eps, abar[i], abar[i + 1], 1.0)
        z = torch.randn(mean.shape, generator=rng, device=x.device, dtype=mean.dtype)
        shift = (away - mean) / sigma
        total = total + (shift * z - 0.5 * shift**2).flatten(1).sum(1)
        x = mean + sigma * z
    return total


# ---- adapters and baselines ------------------------------------------------------------------------------------------


def load_adapters(world, args):
    """Load one adapter a reward under the reward's name, and one more, `factors`, for their average, if ranks agree."""
    if args.lora:  # a part of the base model from now on
        world.unet.fuse_lora()
        world.unet.unload_lora()
    world.calls, world.names = 0, [name for name, _ in args.reward]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft says that there are several
        for name, folder in zip([*world.names, "factors"], [*args.adapters, args.adapters[0]]):
            load_adapter(world.pipe, folder, name)
    shapes = [{key.replace(f".{name}.", "."): value.shape for key, value in world.unet.named_parameters()
               if f".{name}." in key} for name in world.names]
    world.can_average = shapes[0] == shapes[1]


def with_adapters(world, args, number, scales):
    """predict_noise(x, t) for prompt `number` of the UNet with adapters times scales {name: scale}, summed.

    Scales (w_1, w_2) make W + w_1 B_1 A_1 + w_2 B_2 A_2, a Rewarded Soup; of zero the base model. Counts the latents.
    """
    plain = noise_predictor(world.unet, world.cond[number : number + 1], world.uncond, args.guidance, args.chunk)

    def predict_noise(x, t):
        if not len(x):  # of a model that no sample asks, in `switch`
            return x
        world.unet.set_adapters(list(scales), list(scales.values()))
        world.calls += len(x)
        return plain(x, t)

    return predict_noise


def average_factors(world, weights):
    """Fill the adapter `factors` with the averages of the factors A and of B: W + (sum w_i B_i) (sum w_i A_i).

    What scripts make that average checkpoints: w_i^2 B_i A_i and terms B_i A_j instead of sum w_i B_i A_i.
    """
    parts = dict(world.unet.named_parameters())
    for key in parts:
        if world.can_average and ".factors." in key:
            parts[key].data = sum(w * parts[key.replace(".factors.", f".{k}.")] for w, k in zip(weights, world.names))


def blend(models, weights):
    """Diffusion Blend: the weighted average of the noise predictions (with a common variance, the merge itself)."""
    return lambda x, t: sum(w * model(x, t) for w, model in zip(weights, models))


def switch(models, weights, rng):
    """Per-step switching: every sample asks one model, drawn with probabilities `weights`, at every step."""

    def predict_noise(x, t):
        chosen = torch.multinomial(torch.tensor(weights, device=x.device), len(x), replacement=True, generator=rng)
        eps = torch.empty_like(x)
        for k, model in enumerate(models):
            eps[chosen == k] = model(x[chosen == k], t)
        return eps

    return predict_noise


def sample_ddpm(predict_noise, x, timesteps, abar, rng, pull=None, score=None):
    """Plain DDPM sampling x (N, ...) -> (N, ...), and two ways to use rewards r_w at test time.

    pull (x0_hat) -> grad r_w / kl_weight: reward-gradient guidance, RGG; the gradient skips the network, which leaves
    1 / sqrt(abar). score (x0_hat) -> r_w: CoDe, which every BLOCK steps draws CANDIDATES of x_{t-1} and keeps the one
    with the best forecast.
    """
    for i, t in enumerate(timesteps):
        eps = predict_noise(x, t)
        x0_hat = (x - (1 - abar[i]) ** 0.5 * eps) / abar[i] ** 0.5
        mean, sigma = ddim_kernel(x0_hat, eps, abar[i], abar[i + 1], 1.0)
        if pull:
            strength = min((1 + GAMMA) ** (100 * i / len(timesteps)) - 1, 1.0)
            mean = mean + strength * sigma**2 * pull(x0_hat) / abar[i] ** 0.5
        copies = CANDIDATES if score and i % BLOCK == 0 and sigma > 0 else 1
        mean = mean.repeat_interleave(copies, 0)
        x = mean + sigma * torch.randn(mean.shape, generator=rng, device=x.device, dtype=mean.dtype)
        if copies > 1:
            eps = predict_noise(x, timesteps[i + 1])
            best = score((x - (1 - abar[i + 1]) ** 0.5 * eps) / abar[i + 1] ** 0.5).view(-1, copies).argmax(1)
            x = x[torch.arange(len(best), device=x.device) * copies + best]
    return x


# ---- the comparison --------------------------------------------------------------------------------------------------


def weights_tag(weights):
    """A pair of weights as a word for numbers.json: (1.2, -0.2) -> w120_m20."""
    return "w" + "_".join(f"{'m' * (w < 0)}{abs(100 * w):g}".replace(".", "p") for w in weights)


def weighted_reward(world, number, weights):
    """The function latents (n, C, h, w) of prompt `number` -> sum of w_k times the rewards of `gains` (n,)."""

    def reward(latents):
        found = gains(world, world.decode(latents), torch.full((len(latents),), number, device=latents.device))
        return sum(w * found[name] for w, name in zip(weights, world.names))

    return reward


def methods_at(world, args, number, weights, rng):
    """{method: function of noise (N, C, h, w) -> latents, or a dict with weights}, at equal calls of the UNet.

    At (1, 0) and (0, 1) every merge is one adapter alone, `single`.
    """
    rest = 1 - sum(weights)
    alone = [{name: 1.0} for name in world.names]
    base = with_adapters(world, args, number, dict.fromkeys(world.names, 0.0))
    models = [with_adapters(world, args, number, scales) for scales in alone]
    everyone, shares = [*models, base][: 2 + (abs(rest) > 1e-6)], [*weights, rest]
    grid = dict(zip(("timesteps", "abar"), path_schedule(world.scheduler, args.steps)), rng=rng)
    long = dict(zip(("timesteps", "abar"), path_schedule(world.scheduler, args.steps * len(everyone))), rng=rng)
    merged = dict(grid, reference=base if len(everyone) > 2 else None)
    reward, shares = weighted_reward(world, number, weights), shares[: len(everyone)]

    def pull(x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(reward(x).sum(), x)[0] / args.kl_weight

    soup = with_adapters(world, args, number, dict(zip(world.names, weights)))
    factors = with_adapters(world, args, number, {"factors": 1.0})
    methods = {
        "single": lambda x: sample_ddpm(soup, x, **long),
        "soup_factor": lambda x: sample_ddpm(factors, x, **long),
        "soup": lambda x: sample_ddpm(soup, x, **long),
        "switch": lambda x: sample_ddpm(switch(everyone, shares, rng), x, **long),
        "msdda": lambda x: merged_ddim(models, weights, x, **merged)["x"],
        "msdda_smc": lambda x: merged_ddim(models, weights, x, particles=args.particles, ess=args.ess, **merged),
        "rgg": lambda x: sample_ddpm(base, x, pull=lambda v: in_chunks(pull, args.chunk, v), **long),
        "code": lambda x: sample_ddpm(base, x, score=lambda v: in_chunks(reward, args.chunk, v), **grid),
    }
    left_out = {"single"}
    if sorted(weights) == [0, 1]:
        left_out = {"soup_factor", "soup", "switch", "msdda", "msdda_smc"}
    elif min(shares) < 0:
        left_out |= {"switch"}  # these are no probabilities
    if not world.can_average:
        left_out |= {"soup_factor"}
    if "jpeg" in world.names:
        left_out |= {"rgg"}  # it has no gradient
    return {name: method for name, method in methods.items() if name not in left_out}


def draw(world, args, number, method, rng, noise):
    """One method for one prompt -> a dict of its images (n, 3, H, W), drawn by weight where it has weights; the means

    over each group (G,) of every reward, in its own units, and of clip_eval; each {reward: (n,)}; diversity, 1 - cosine
    of images of two groups; calls, seconds, and what merged_ddim gives.
    """
    calls, begun, groups = world.calls, time.perf_counter(), len(noise) // args.particles
    out = method(noise)
    out = out if isinstance(out, dict) else dict(x=out, log_w=torch.zeros(groups, args.particles, device=noise.device))
    w, images = out["log_w"].softmax(1), world.decode(out["x"])
    unit = clip_images(world.judge, images, args.chunk)
    each = {name: in_chunks(lambda part, reward=reward: reward(part, number), args.chunk, images)
            for name, reward in world.rewards.items()}
    values = each | dict(clip_eval=unit @ world.judge_texts[number])
    first_slot = torch.arange(groups, device=noise.device)[:, None] * args.particles
    return dict(out, each=each, diversity=diversity(w, unit), calls=world.calls - calls,
                ess=effective_sample_size(out["log_w"]).mean().item(), resampled=sum(out.get("history", ())),
                images=images[(first_slot + resample_systematic(out["log_w"], rng)).flatten()].cpu(),
                seconds=time.perf_counter() - begun,
                **{name: (w * checked(value, noise.shape[:1]).view_as(w)).sum(1) for name, value in values.items()})


def diversity(w, unit):
    """Weights w (G, P) with sums 1, unit vectors (G P, d) -> mean 1 - cosine of images drawn from different groups."""
    mean = torch.einsum("gp,gpd->gd", w, unit.view(*w.shape, -1))
    products = mean @ mean.T
    groups = len(mean)
    return (1 - (products.sum() - products.diagonal().sum()) / (groups * (groups - 1))).item()


@torch.no_grad()
def run_methods(world, args):
    """All methods -> {weights: {method: list over prompts of what `draw` gives}}, log ratios, error of the blend.

    Weights "base" are the model without adapters, `base_short` in as few steps as the merge; the images of `base` set
    world.level {name: (K,)} and world.spread {name: float}, see `gains`. All methods start from the same noise. The log
    ratios, for each of the two adapters a list over prompts of tensors (n,), are those of path_ratio to the other one;
    the error is the largest difference of latents between the merge and the blend.
    """
    rng, results, ratios = torch.Generator(args.device), {"base": {}}, ([], [])
    short, long = (path_schedule(world.scheduler, steps) for steps in (args.steps, 2 * args.steps))

    def noise(number, count=args.images):
        rng.manual_seed(1000 * args.seed + number)
        return torch.randn(count, *world.shape, generator=rng, device=args.device)

    def model(number, *scales):
        return with_adapters(world, args, number, dict(zip(world.names, scales)))

    for number in range(len(args.prompts)):
        for name, grid in (("base", long), ("base_short", short)):
            plain = lambda x: sample_ddpm(model(number, 0.0, 0.0), x, *grid, rng)
            results["base"].setdefault(name, []).append(draw(world, args, number, plain, rng, noise(number)))
        models = [model(number, 1.0, 0.0), model(number, 0.0, 1.0)]
        for k in (0, 1):
            ratios[k].append(path_ratio(models[k], models[1 - k], noise(number), *short, rng))
        progress("base", number + 1, len(args.prompts))
    raw = {name: torch.stack([out["each"][name] for out in results["base"]["base"]]) for name in world.names}
    world.level = {name: values.mean(1) for name, values in raw.items()}
    world.spread = {name: values.var(1).mean().sqrt().item() for name, values in raw.items()}
    if not all(world.spread.values()):
        fail(f"The base model's images all have the same reward: {world.spread}.")
    models, half = [model(0, 1.0, 0.0), model(0, 0.0, 1.0)], (0.5, 0.5)
    pair = [sample(noise(0, args.particles)) for sample in (
        lambda x: merged_ddim(models, half, x, *short, rng)["x"],
        lambda x: sample_ddpm(blend(models, half), x, *short, rng))]
    for done, weights in enumerate(args.weights):
        results[weights] = {}
        average_factors(world, weights)
        for number in range(len(args.prompts)):
            for name, method in methods_at(world, args, number, weights, rng).items():
                out = draw(world, args, number, method, rng, noise(number))
                results[weights].setdefault(name, []).append(out)
        progress("weights", done + 1, len(args.weights))
    return results, ratios, (pair[0] - pair[1]).abs().max().item()


def measure(world, args, results, ratios, error):
    """The rows method.weights.key, and method.all.key on average over the weights at which the merges differ.

    A reward is in standard deviations of the base model above its mean, `weighted` the sum of both times the weights,
    `behind` how far a method's lies behind that of msdda_smc. log_z is the mean over prompts, its reference that of
    path_ratio from the adapter with the larger weight. Errors are those of the groups, which are few.
    """
    rows = [row("blend.all.difference", error, exact=0.0)]
    totals = {}  # {method: list over weights}
    for weights, outs in results.items():
        tag = "all" if weights == "base" else weights_tag(weights)
        for method, found in outs.items():
            values = {key: torch.stack([out[key] for out in found]) for key in (*world.names, "clip_eval")}  # (K, G)
            if weights != "base":
                values |= {k: (values[k] - world.level[k][:, None]) / world.spread[k] for k in world.names}
                values["weighted"] = sum(w * values[k] for w, k in zip(weights, world.names))
            rows += [paired_row(f"{method}.{tag}.{key}", value) for key, value in values.items()]
            sums = {key: sum(out[key] for out in found) for key in ("diversity", "calls", "seconds")}
            rows.append(row(f"{method}.{tag}.diversity", sums["diversity"] / len(found)))
            if "msdda_smc" in outs:
                totals.setdefault(method, []).append(values | sums)
            if method != "msdda_smc":
                continue
            rows += [row(f"{method}.{tag}.{key}", sum(out[key] for out in found) / len(found))
                     for key in ("ess", "resampled")]
            estimate, exact = ([log_mean_and_se(log_z) for log_z in logs] for logs in (
                [out["log_z"] for out in found], [min(weights) * ratio for ratio in ratios[weights[0] < weights[1]]]))
            estimate, exact = ((sum(v for v, _ in pairs) / len(pairs), math.hypot(*(e for _, e in pairs)) / len(pairs))
                               for pairs in (estimate, exact))
            rows.append(row(f"{method}.{tag}.log_z", *estimate, None, exact if abs(sum(weights) - 1) < 1e-6 else None))
    for method, found in totals.items():
        mean = {key: sum(values[key] for values in found) / len(found) for key in found[0]}
        smc = sum(values["weighted"] for values in totals["msdda_smc"]) / len(found)
        rows += [paired_row(f"{method}.all.{key}", mean[key]) for key in ("weighted", "clip_eval")]
        if method != "msdda_smc":
            rows.append(paired_row(f"{method}.all.behind", smc - mean["weighted"]))
        rows += [row(f"{method}.all.diversity", mean["diversity"] / len(args.prompts)),
                 row(f"{method}.all.calls", sum(values["calls"] for values in found)),
                 row(f"{method}.all.seconds", round(sum(values["seconds"] for values in found), 2))]
    return rows


def paired_row(name, values, before=None, exact=None):
    """A row of the mean of values (K, n), with its standard error within prompts.

    before (K, n), the base model's from the same noise, is known in the mean: the error is that of the difference.
    """
    spread = (values if before is None else values - before).var(1).mean()
    return row(name, values.mean().item(), (spread / values.numel()).sqrt().item(), exact)


def log_mean_and_se(log_values):
    """Independent unbiased estimates of Z, as logarithms (G,) -> log of their mean, its standard error."""
    top = log_values.max().item()
    mean, se = mean_and_se((log_values.double() - top).exp())
    return top + math.log(mean), se and se / mean


def mean_and_se(values):
    """Independent values (G,) -> their mean and its standard error (None for a single one)."""
    return values.mean().item(), values.std().item() / len(values) ** 0.5 if len(values) > 1 else None


# ---- the figure ------------------------------------------------------------------------------------------------------

STYLES = {  # method -> label, colour (Okabe and Ito), marker
    "base": ("base", "#555555", "s"),
    "rgg": ("RGG", "#999999", "v"),
    "code": ("CoDe", "#000000", "^"),
    "soup_factor": ("soup of factors", "#CC79A7", "P"),
    "soup": ("Rewarded Soup", "#D55E00", "s"),
    "switch": ("switch", "#56B4E9", "D"),
    "msdda": ("MSDDA = blend", "#0072B2", "o"),
    "msdda_smc": ("MSDDA + C$_t$", "#009E73", "*"),
}


def draw_panels(path, args, world, rows, results):
    """A line of images a method at the weights nearest to (1/2, 1/2); the front; reward against what may be lost."""
    value = {r["name"]: (r["estimate"], r["se"] or 0) for r in rows}
    interior = [w for w in results if "msdda_smc" in results[w]]
    middle = min(interior, key=lambda w: abs(w[0] - 0.5) + abs(w[1] - 0.5))
    shown = {name: types.SimpleNamespace(images=[out["images"] for out in outs])
             for name, outs in (results["base"] | results[middle]).items()}
    shown = {name: shown[name] for name in STYLES if name in shown}
    figure = plt.figure(figsize=(10, 0.72 * len(shown) + 4))
    grid = figure.add_gridspec(len(shown) + 1, 3, height_ratios=[1] * len(shown) + [4.8])
    draw_lines(figure, grid, args, shown, {name: label for name, (label, _, _) in STYLES.items()})
    front, *others = (figure.add_subplot(grid[-1, k]) for k in range(3))
    for name in shown:
        label, color, marker = STYLES[name]
        style = dict(color=color, marker=marker, markersize=5, linewidth=0.8)
        points = [(0.0, 0.0)] if name == "base" else [
            [value[f"{name if name in results[weights] else 'single'}.{weights_tag(weights)}.{k}"][0]
             for k in world.names] for weights in args.weights]
        front.plot(*zip(*points), **style)
        for ax, key in zip(others, ("clip_eval", "diversity")):
            gain, other = value.get(f"{name}.all.weighted", (0.0, 0.0)), value[f"{name}.all.{key}"]
            ax.errorbar(gain[0], other[0], 2 * other[1], 2 * gain[1], capsize=2, label=label,
                        **style | dict(linestyle="none"))
    front.set(xlabel=f"{world.names[0]}, base standard deviations", ylabel=world.names[1], title="Pareto front")
    for ax, key in zip(others, ("CLIP score, the other model", "diversity (1 - cosine)")):
        ax.set(xlabel="weighted reward, mean over weights", ylabel=key)
    others[1].legend(fontsize=7)
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
    """Run every method, write the figure and numbers.json -> {row name: estimate}."""
    start, out = time.perf_counter(), results_folder(args, "sd_msdda")
    world = load_world(args)
    load_adapters(world, args)
    results, ratios, error = run_methods(world, args)
    rows = measure(world, args, results, ratios, error)
    draw_panels(out / "figure.png", args, world, rows, results)
    evaluations = world.calls * (2 if args.guidance != 1 else 1)
    write_numbers(out / "numbers.json", args, rows, evaluations, time.perf_counter() - start)
    for weights in args.weights:
        print_table(rows, weights_tag(weights), [*world.names, "weighted", "clip_eval", "diversity", "ess", "log_z"])
    print_table(rows, "all", ["weighted", "behind", "clip_eval", "diversity", "calls", "seconds", "difference"])
    return {r["name"]: r["estimate"] for r in rows}


if __name__ == "__main__":
    join_processes()
    main(parse_args())
