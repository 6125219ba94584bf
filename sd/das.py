"""Sample images from p(x) exp(r(x) / kl_weight) at test time: tempered SMC over Stable Diffusion's sampler.

Paper: Kim, Kim and Park, "Test-time Alignment of Diffusion Models without Reward Over-optimization" (DAS), ICLR 2025,
arXiv 2501.05803. Draws the counterpart of its Fig. 2: the reward that is optimised against a reward that is not and
against diversity. The sampler, from `per_particle` to `das`, is the text of toy/das.py; only the world differs.

Run    python sd/das.py                                  miniature model, CLIP score of the prompt    5 CPU minutes
       python sd/das.py --quick                          the same, coarse                           15 CPU seconds
       python sd/das.py --reward jpeg                    compressibility: no gradient, plain SMC
       python sd/das.py --reward saturation=1 contrast=0.5             several rewards, weighted
       python sd/das.py --online ucb --reward jpeg       black box: a surrogate learned from queries
On a GPU, not run for want of one: --model stable-diffusion-v1-5/stable-diffusion-v1-5 --device cuda --dtype bfloat16
--paper --reward aesthetic --clip openai/clip-vit-large-patch14 --clip-eval laion/CLIP-ViT-H-14-laion2B-s32B-b79K

Notation (here -> paper)
       kl_weight -> alpha    reward temperature. The flag counts in standard deviations of the reward under the base
                             model, within a prompt, so that one value suits every reward
       abar      -> abar_t   signal power: x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps; x are latents
       x0_hat    -> x0hat_t  Tweedie mean E[x_0 | x_t]; its reward is that of the decoded image
       temper    -> lambda_t from 0 (noise) to 1 (sample); the twist at t is exp(temper r(x0_hat) / kl_weight)
       shift                 what guidance adds to the noise, in units of sigma: sigma temper grad r(x0_hat) / kl_weight
       log_w, log_z          log weights of the particles; log of the estimate of Z = E_p[exp(r / kl_weight)]

Algorithm (`das`; the particles of a group interact and give one image, groups are independent)
       1. start from noise and look ahead: eps, x0_hat, its reward, the gradient of that     `look_ahead`
       2. where the effective sample size is low, resample: gather all per-particle state    `resample`, `gather`
       3. propose x_{t-1} from the DDIM kernel, its noise shifted towards higher reward      `ddim_kernel`, `guide`
       4. raise the temper, by schedule or as far as the weights allow        `temper_schedule`, `adapt_temper`
       5. weight: log_w += new twist - old twist + log p - log q                             `log_ratio`
       6. the last twist is the reward of x_0 itself: exact in the limit of many particles

What you should see (± is the standard deviation over 3 seeds): DAS raises the reward by 1.02 ± 0.04 standard deviations
of the base model's, guidance alone by 0.30 ± 0.04, importance resampling by 0.99 ± 0.09; the target has 1.09 ± 0.02, and
best of 16 goes beyond it, 1.50 ± 0.10. The CLIP score that nobody optimised stays, 0.811 ± 0.003 against 0.802 ± 0.003.
Diversity is 89 ± 4% of the base model's, where the target itself has 87 ± 1%: it prefers some of the images.
log Z agrees with that of 128 base images within 2 standard errors in 23 of 24 prompts and seeds, the last one misses by
3.7 (the errors are from 4 groups).
With seed 0, --reward jpeg (no gradient) gains 1.10, where the target has 1.39; --reward saturation=1 contrast=0.5 gains
1.42 (1.46); --online ucb --reward jpeg after 192 queries 0.4 ± 0.2, where its surrogate promises 0.6. Further from the
base model SMC earns its keep: with --kl-weight 0.2 DAS gains 1.71, importance resampling 1.33 and best of 16 1.43.
To try: --kl-weight 0.1 (over-optimisation?), --max-shift inf (the paper's proposal), --particles 4, --temper adaptive.
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

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.nn.functional import one_hot
from torch.utils.checkpoint import checkpoint

PRESETS = {  # what the size flags default to
    "quick": dict(groups=2, particles=4, steps=5, reference=16, rounds=2),
    "default": dict(groups=4, particles=16, steps=16, reference=128, rounds=6),
    "paper": dict(groups=8, particles=16, steps=100, reference=512, rounds=256),
}
SCHEMES = ("systematic", "stratified", "multinomial", "residual", "ssp")
REWARDS = ("jpeg", "saturation", "contrast", "clip", "pickscore", "aesthetic")
PROMPTS = [f"a photo of a {a}" for a in "cat dog horse monkey rabbit zebra spider bird".split()]  # DDPO's first eight
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def parse_args(argv=None):
    parser = common_parser(__doc__)
    model_flags(parser, PROMPTS, [("clip", 1.0)])
    parser.add_argument("--groups", type=positive(int), help="images of each prompt")
    parser.add_argument("--particles", type=positive(int), help="particles of which one image is drawn")
    parser.add_argument("--kl-weight", type=positive(float), default=0.6, help="reward temperature alpha")
    parser.add_argument("--eta", type=positive(float), default=1.0, help="noise of the DDIM kernel, at most 1 (DDPM)")
    parser.add_argument("--temper", choices=["schedule", "adaptive", "none"], default="schedule")
    parser.add_argument("--gamma", type=positive(float), default=0.008, help="growth of the temper in 1/100 of the run")
    parser.add_argument("--max-shift", type=positive(float), default=0.5, help="cap on the norm of the shift, or inf")
    parser.add_argument("--ess", type=positive(float), default=0.5, help="resample below this fraction of particles")
    parser.add_argument("--resampling", choices=SCHEMES, default="systematic")
    parser.add_argument("--select", choices=["draw", "argmax"], default="draw", help="argmax is biased towards modes")
    parser.add_argument("--reference", type=positive(int), help="base samples of each prompt, for exact values")
    parser.add_argument("--online", choices=["off", "ucb", "bootstrap"], default="off",
                        help="treat the reward as a black box, with this kind of optimism")
    parser.add_argument("--rounds", type=positive(int), help="rounds of queries of --online")
    args = parser.parse_args(argv)
    for name, value in PRESETS["quick" if args.quick else "paper" if args.paper else "default"].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.steps > 1000 or args.eta > 1:
        parser.error("--steps can be at most 1000 and --eta at most 1")
    if args.groups < 2:
        parser.error("--groups must be at least 2: diversity is that of two images")
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


@torch.no_grad()
def ddim_sample(predict_noise, x, timesteps, abar, rng, eta=1.0):
    """x (N, ...) standard normal -> a sample of the model at abar[-1]; timesteps and abar from noise to data."""
    for i, t in enumerate(timesteps):
        eps = predict_noise(x, t)
        x, sigma = ddim_kernel((x - (1 - abar[i]) ** 0.5 * eps) / abar[i] ** 0.5, eps, abar[i], abar[i + 1], eta)
        x = x + sigma * torch.randn(x.shape, generator=rng, device=x.device, dtype=x.dtype)
    return x


# ---- shared: the sampler ---------------------------------------------------------------------------------------------


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


def temper_schedule(steps, gamma, kind):
    """temper before each step and after the last -> (steps + 1,). DAS: min((1 + gamma)^i - 1, 1), i in 1/100 runs.

    Counting i in hundredths of the run makes one gamma serve any number of steps: the paper's 0.008 for 100 steps is
    then about its 0.1 for 8.
    """
    if kind == "none":
        return torch.ones(steps + 1)
    # exercise 1: the schedule of the docstring, which is 0 at first and 1 at the end, for any gamma
    temper = ((1 + gamma) ** (torch.arange(steps + 1) * 100 / steps) - 1).clamp(max=1)
    temper[-1] = 1
    return temper
    # end exercise


def adapt_temper(log_w, value, temper, enough):
    """The largest temper, from the present one (G,) up to 1, that leaves an effective sample size of `enough`.

    log_w (G, P) are the weights without a twist, value (G, P) the rewards over kl_weight. By bisection; the result
    lies just beyond the root, so that resampling follows.
    """
    low, high = temper, torch.ones_like(temper)
    all_the_way = effective_sample_size(log_w + value) >= enough
    # exercise 3: halve the interval 30 times; the effective sample size of log_w + temper value falls with the temper
    for _ in range(30):
        middle = (low + high) / 2
        fine = effective_sample_size(log_w + middle[:, None] * value) >= enough
        low, high = torch.where(fine, middle, low), torch.where(fine, high, middle)
    # end exercise
    return torch.where(all_the_way, 1.0, high)


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


def das(predict_noise, reward, x, timesteps, abar, rng, particles, kl_weight=1.0, eta=1.0, temper="schedule",
        gamma=0.008, guided=True, max_shift=math.inf, ess=0.5, scheme="systematic", chunk=None, regroup=gather):
    """Weighted particles for p(x) exp(r(x) / kl_weight): tempered SMC with guided proposals.

    predict_noise (n, ...), t -> (n, ...); reward (n, ...) -> (n,); x (N, ...) standard normal, N = groups x particles,
    a group being contiguous; timesteps (T,) from noise to data; abar (T + 1,) their signal powers and that of the
    result. guided=False is the bootstrap filter, ess=0 never resamples: then the weights are plain importance weights.
    Returns x (N, ...), reward (N,), log_w (G, P), log_z (G,), and of each step the mean ess and temper, and the share
    of groups that resampled. E[exp(log_z)] is the Z of the discretised sampler, for any number of particles.
    """
    groups, steps, device = len(x) // particles, len(timesteps), x.device
    schedule = temper_schedule(steps, gamma, temper).to(x)
    first_slot = torch.arange(groups, device=device)[:, None] * particles
    lam, log_z, history = schedule[0].expand(groups), torch.zeros(groups, device=device), []
    state = look_ahead(predict_noise, reward, x, timesteps[0], abar[0], kl_weight, guided, chunk)
    state["twist"] = lam.repeat_interleave(particles) * state["value"]
    state["log_w"] = state["twist"].clone()
    for i in range(steps):
        log_w = state["log_w"].view(groups, particles)
        size = effective_sample_size(log_w)
        due = size < ess * particles  # (G,)
        if due.any():
            ancestors = torch.where(due[:, None], resample(log_w, scheme, rng), torch.arange(particles, device=device))
            state = regroup(state, (first_slot + ancestors).flatten())
            state["log_w"] = torch.where(due[:, None], 0, log_w).flatten()
            log_z = log_z + torch.where(due, log_mean_exp(log_w), 0)
        history.append((size.mean().item(), lam.mean().item(), due.float().mean().item()))

        mean, sigma = ddim_kernel(state["x0_hat"], state["eps"], abar[i], abar[i + 1], eta)
        ahead = lam if temper == "adaptive" else schedule[i + 1].expand(groups)
        shift = guide(state["grad"], sigma, ahead.repeat_interleave(particles), max_shift)
        z = torch.randn(mean.shape, generator=rng, device=device, dtype=mean.dtype)
        x = mean + sigma * (shift + z)
        log_w = state["log_w"] - state["twist"] + log_ratio(shift, z)

        if i + 1 < steps:
            state = look_ahead(predict_noise, reward, x, timesteps[i + 1], abar[i + 1], kl_weight, guided, chunk)
        else:  # the sample itself takes the place of its forecast
            state = dict(x=x, value=checked(reward(x), x.shape[:1]).detach() / kl_weight)
        if temper == "adaptive" and i + 1 < steps:
            lam = adapt_temper(log_w.view(groups, -1), state["value"].view(groups, -1), lam, ess * particles)
        else:
            lam = schedule[i + 1].expand(groups)
        state["twist"] = lam.repeat_interleave(particles) * state["value"]
        state["log_w"] = log_w + state["twist"]
    log_w = state["log_w"].view(groups, particles)
    return dict(x=x, reward=state["value"] * kl_weight, log_w=log_w, log_z=log_z + log_mean_exp(log_w), history=history)


# ---- the methods and their measures ----------------------------------------------------------------------------------


def selection_weights(log_w, how):
    """Weights within each group, log_w (G, P) -> (G, P) with sums 1: to draw from the particles, or their argmax."""
    return log_w.softmax(1) if how == "draw" else one_hot(log_w.argmax(1), log_w.shape[1]).to(log_w)


def mean_and_se(values):
    """Independent values (G,) -> their mean and its standard error (None for a single one)."""
    return values.mean().item(), values.std().item() / len(values) ** 0.5 if len(values) > 1 else None


def log_mean_and_se(log_values):
    """Independent unbiased estimates of Z, as logarithms (G,) -> log of their mean, its standard error."""
    top = log_values.max().item()
    mean, se = mean_and_se((log_values.double() - top).exp())
    return top + math.log(mean), se and se / mean


def tilted_mean_and_se(log_w, values):
    """Self-normalised importance sampling: independent log_w (N,) and values (N,) -> mean, standard error."""
    w = (log_w.double() - log_w.max()).exp()
    mean = (w * values).sum() / w.sum()
    return mean.item(), ((w * (values - mean)).pow(2).sum().sqrt() / w.sum()).item()


def total_reward(world, number, levels, scales):
    """The function images -> their rewards above levels {name: value}, times scales {name: value}, summed -> (n,)."""
    return lambda images: sum(scale * (world.rewards[k](images, number) - levels[k]) for k, scale in scales.items())


def all_rewards(world, args, number, images):
    """{name: rewards (n,)} of images (n, 3, H, W) of prompt `number`, `chunk` images at once."""
    return {name: in_chunks(lambda part, reward=reward: reward(part, number), args.chunk, images)
            for name, reward in world.rewards.items()}


def sample_base(world, args, number, n, rng):
    """n latents of the base model for prompt `number`, plain DDIM -> (n, C, h, w)."""
    cond = world.cond[number : number + 1]
    predict_noise = noise_predictor(world.unet, cond, world.uncond, args.guidance, args.chunk)
    x = torch.randn(n, *world.shape, generator=rng, device=args.device)
    return ddim_sample(predict_noise, x, *path_schedule(world.scheduler, args.steps), rng, args.eta)


def sample_aligned(world, args, number, reward, groups, particles, rng, **options):
    """`das` on groups x particles latents for prompt `number` with a reward of images; adds evaluations and seconds."""
    start = time.perf_counter()
    predict_noise = noise_predictor(world.unet, world.cond[number : number + 1], world.uncond, args.guidance)
    noise = torch.randn(groups * particles, *world.shape, generator=rng, device=args.device)
    out = das(predict_noise, lambda latents: reward(world.decode(latents)), noise,
              *path_schedule(world.scheduler, args.steps), rng, particles, args.kl_weight, args.eta, args.temper,
              args.gamma, chunk=args.chunk, scheme=args.resampling, **options)
    return dict(out, evaluations=len(noise) * args.steps, seconds=time.perf_counter() - start)


@torch.no_grad()
def run_methods(world, args, rng):
    """Every sampler on every prompt -> ({method: list over prompts of outputs}, levels, scales of total_reward).

    Best-of-N, importance resampling and `reference`, what DAS tends to, weigh samples of the base model: the twists
    telescope, so that the weight of one is exp(r / kl_weight), whatever the temper.
    """
    n, total = args.groups * args.particles, max(args.reference, args.groups * args.particles)
    base, raw = [], []
    start = time.perf_counter()
    for number in range(len(args.prompts)):
        x = sample_base(world, args, number, total, rng)
        images = world.decode(x)
        raw.append({k: checked(v, images.shape[:1]) for k, v in all_rewards(world, args, number, images).items()})
        base.append(dict(x=x, evaluations=total * args.steps))
        progress("base", number + 1, len(args.prompts))
    seconds = (time.perf_counter() - start) / len(args.prompts)
    spread = {name: torch.stack([r[name] for r in raw]).var(1).mean().sqrt().item() for name, _ in args.reward}
    if not all(spread.values()):
        fail(f"The base model's images all have the same reward: {spread}.")
    scales = {name: weight / spread[name] for name, weight in args.reward}
    levels = [{name: value.mean() for name, value in values.items()} for values in raw]
    results = {method: [] for method in ("reference", "base", "best_of_n", "importance", "guidance", "das")}
    smooth = "jpeg" not in scales
    for number, out in enumerate(base):
        reward = total_reward(world, number, levels[number], scales)
        r = sum(scale * (raw[number][name] - levels[number][name]) for name, scale in scales.items())
        log_w = r / args.kl_weight
        results["reference"].append(dict(out, reward=r, log_w=log_w[None], w=log_w[None].softmax(1), seconds=seconds))
        mine = dict(x=out["x"][:n], reward=r[:n], evaluations=n * args.steps, seconds=seconds * n / total)
        grouped = log_w[:n].view(args.groups, -1)
        for method, w in dict(base=torch.full_like(grouped, 1 / args.particles), best_of_n=selection_weights(
                grouped, "argmax"), importance=selection_weights(grouped, "draw")).items():
            results[method].append(dict(mine, w=w, log_z=log_mean_exp(grouped)))
        if smooth:
            out = sample_aligned(world, args, number, reward, n, 1, rng, ess=0, max_shift=math.inf)
            w = torch.full_like(grouped, 1 / args.particles)
            results["guidance"].append(dict(out, w=w))
        out = sample_aligned(world, args, number, reward, args.groups, args.particles, rng, guided=smooth,
                             max_shift=args.max_shift, ess=args.ess)
        results["das"].append(dict(out, w=selection_weights(out["log_w"], args.select)))
        progress("guidance and das" if smooth else "das", number + 1, len(base))
    return {method: outs for method, outs in results.items() if outs}, levels, scales


def diversity(w, unit):
    """Weights w (G, P) with sums 1, unit vectors (G P, d) -> mean 1 - cosine of images drawn from different groups."""
    mean = torch.einsum("gp,gpd->gd", w, unit.view(*w.shape, -1))
    products = mean @ mean.T
    groups = len(mean)
    return (1 - (products.sum() - products.diagonal().sum()) / (groups * (groups - 1))).item()


def target_diversity(w, unit):
    """The same of two independent draws from the law that weights w (n,), sum 1, make of unit vectors (n, d)."""
    w, unit = w.double(), unit.double()  # the pairs of an image with itself are 0, and left out
    return ((1 - (w @ unit).square().sum()) / (1 - w @ w).clamp(min=1e-9)).item()


def truncated_entropy(unit, count=20):
    """Entropy of the Gaussian with the largest `count` eigenvalues of the covariance of unit (n, d), nats (TCE)."""
    assert len(unit) > count, f"truncated entropy needs more than {count} samples"
    values = torch.linalg.eigvalsh(torch.cov(unit.double().T))[-count:]
    return 0.5 * (count * math.log(2 * math.pi * math.e) + values.log().sum()).item()


@torch.no_grad()
def measure(world, args, results, rng):
    """The rows of all methods: means over prompts and groups, and log Z of each prompt.

    `gain` is the reward above the base model's mean in standard deviations; `clip_eval` the cosine with the prompt
    under the CLIP model that only evaluates; `diversity` the mean of 1 - cosine between two images of a prompt there;
    `entropy` that of all drawn images there, where they are more than 20.
    """
    rows = []
    for method, outs in results.items():
        values, spreads, drawn = {}, [], []
        for number, out in enumerate(outs):
            w = out["w"]
            images = world.decode(out["x"])
            unit = clip_images(world.judge, images, args.chunk)
            each = all_rewards(world, args, number, images)
            each |= dict(gain=out["reward"], clip_eval=unit @ world.judge_texts[number])
            for name, value in each.items():
                values.setdefault(name, []).append((w * value.view_as(w)).sum(1))
            if method == "reference":
                spreads.append(target_diversity(w[0], unit))
            else:
                spreads.append(diversity(w, unit))
                first = torch.arange(len(w), device=w.device) * w.shape[1]
                index = first + torch.multinomial(w, 1, generator=rng)[:, 0]
                out["images"] = images[index].cpu()
                drawn.append(unit[index])
        for name, value in values.items():
            value = torch.stack(value)  # (prompts, groups)
            se = (value.var(1).mean() / value.numel()).sqrt().item() if value.shape[1] > 1 else None
            if name == "gain" and method == "reference":
                errors = [tilted_mean_and_se(out["log_w"][0], out["reward"])[1] for out in outs]
                se = math.hypot(*errors) / len(errors)
            rows.append(row(f"{method}.all.{name}", value.mean().item(), se))
        rows.append(row(f"{method}.all.diversity", sum(spreads) / len(spreads)))
        if method == "reference":
            own = [log_mean_and_se(out["log_w"][0]) for out in outs]
            for prompt, (value, se), out in zip(args.prompts, own, outs):
                rows.append(row(f"reference.{slug(prompt)}.log_z", value, se))
                rows.append(row(f"reference.{slug(prompt)}.ess", effective_sample_size(out["log_w"]).item()))
            continue
        if args.groups * len(outs) > 20:
            rows.append(row(f"{method}.all.entropy", truncated_entropy(torch.cat(drawn))))
        if method in ("importance", "das"):
            for prompt, out, reference in zip(args.prompts, outs, own):
                rows.append(row(f"{method}.{slug(prompt)}.log_z", *log_mean_and_se(out["log_z"]), None, reference))
        for key in ("evaluations", "seconds"):
            rows.append(row(f"{method}.all.{key}", round(sum(out[key] for out in outs), 2)))
    for i, step in enumerate(zip(*(out["history"] for out in results["das"]))):
        size, temper, due = (sum(v) / len(v) for v in zip(*step))
        rows += [row(f"das.step_{i:03d}.{key}", value) for key, value in dict(ess=size, temper=temper, due=due).items()]
    return rows


def slug(prompt):
    """A prompt as part of a row's name."""
    return re.sub(r"[^a-z0-9]+", "_", prompt.lower()).strip("_")[:40]


# ---- the reward as a black box ---------------------------------------------------------------------------------------


class Surrogate:
    """Ridge regression of queried rewards on the CLIP features of images, and an optimistic form of it.

    The published surrogate is a network without nonlinearities on CLIP features, hence affine: here it is fitted in
    closed form. ucb adds the standard error of the prediction; bootstrap takes the largest of 4 fits to resampled data.
    """

    def __init__(self, clip, kind, rng, ridge=0.1):
        self.clip, self.kind, self.rng, self.ridge, self.features, self.labels = clip, kind, rng, ridge, [], []

    def embed(self, images):
        """images (n, 3, H, W) -> features (n, d + 1), of norm near 1, the last one constant."""
        unit = clip_images(self.clip, images)
        return torch.cat([unit, torch.ones_like(unit[:, :1])], 1)

    def add(self, images, labels):
        """Queries and their answers; refits."""
        self.features.append(self.embed(images).detach())
        self.labels.append(labels)
        f, y = torch.cat(self.features), torch.cat(self.labels)
        index = torch.randint(len(y), (4, len(y)), generator=self.rng, device=y.device)
        self.weights, self.inverse = self.fit(f, y)
        self.heads = torch.stack([self.fit(f[i], y[i])[0] for i in index], 1)  # (d + 1, 4)
        self.noise = (f @ self.weights - y).std()

    def fit(self, f, y):
        """Features (n, d), labels (n,) -> weights (d,), inverse of f'f + ridge (d, d)."""
        inverse = torch.linalg.inv(f.T @ f + self.ridge * torch.eye(f.shape[1], device=f.device))
        return inverse @ f.T @ y, inverse

    def __call__(self, images):
        """The optimistic reward of images (n, 3, H, W) -> (n,), with a gradient."""
        f = self.embed(images)
        if self.kind == "bootstrap":
            return (f @ self.heads).amax(1)
        return f @ self.weights + self.noise * ((f @ self.inverse) * f).sum(1).clamp(min=1e-12).sqrt()


@torch.no_grad()
def run_online(world, args, levels, scales, results, rng):
    """Rounds of: draw images with DAS on the surrogate, query the true reward of them (with noise 0.1), refit -> rows.

    The true reward, a sum over its standard deviations, is only ever queried: it need not be differentiable.
    """
    clip = load_clip(args.clip, args.device, getattr(torch, args.dtype))
    surrogate, rows, queries = Surrogate(clip, args.online, rng), [], 0
    for turn in range(args.rounds + 1):
        true, guess, seen, judged, spread = [], [], [], [], []
        for number in range(len(args.prompts)):
            if turn == 0:
                images = world.decode(results["base"][number]["x"][: args.groups])
            else:
                out = sample_aligned(world, args, number, surrogate, args.groups, 4, rng, max_shift=args.max_shift,
                                     ess=args.ess)
                drawn = torch.multinomial(out["log_w"].softmax(1), 1, generator=rng)[:, 0]
                images = world.decode(out["x"][drawn + 4 * torch.arange(args.groups, device=args.device)])
                guess.append(surrogate(images))
            true.append(total_reward(world, number, levels[number], scales)(images))
            unit = clip_images(world.judge, images, args.chunk)
            judged.append(unit @ world.judge_texts[number])
            spread.append(diversity(torch.ones(args.groups, 1, device=args.device), unit))
            seen.append(images)
        true = torch.cat(true)
        rows += [row(f"round_{turn:03d}.online.gain", *mean_and_se(true)),
                 row(f"round_{turn:03d}.online.clip_eval", torch.cat(judged).mean().item()),
                 row(f"round_{turn:03d}.online.diversity", sum(spread) / len(spread)),
                 row(f"round_{turn:03d}.online.queries", queries)]
        if guess:
            rows.append(row(f"round_{turn:03d}.online.promised", *mean_and_se(torch.cat(guess))))
        surrogate.add(torch.cat(seen), true + 0.1 * torch.randn(len(true), generator=rng, device=args.device))
        queries += len(true)
        progress("online", turn + 1, args.rounds + 1)
    return rows


# ---- the figure ------------------------------------------------------------------------------------------------------

TITLES = {"base": "base", "best_of_n": "best of {}", "guidance": "guidance", "das": "DAS"}  # a line of images each
MARKS = {"base": ("#555555", "s"), "best_of_n": ("#009E73", "^"), "importance": ("#CC79A7", "v"),
         "guidance": ("#E69F00", "D"), "das": ("#0072B2", "o"), "reference": ("#D55E00", "*")}


def draw_panels(path, args, rows, results):
    """A line of images a method, four of each prompt; then reward against the other measures, and the traces of DAS."""
    value = {r["name"]: (r["estimate"], r["se"] or 0) for r in rows}
    methods, shown, per = [m for m in TITLES if m in results], min(4, len(args.prompts)), min(4, args.groups)
    figure = plt.figure(figsize=(10, 0.62 * len(methods) * 4 / per / shown * 4 + 3.4))
    grid = figure.add_gridspec(2, 3, height_ratios=[0.62 * len(methods) * 16 / per / shown, 2.6])
    lines = [torch.cat([F.pad(torch.cat(list(out["images"][:per]), 2), (3, 3, 1, 1), value=1.0)
                        for out in results[method][:shown]], 2) for method in methods]
    height, width = lines[0].shape[1], lines[0].shape[2] / shown
    ax = figure.add_subplot(grid[0, :])
    ax.imshow(torch.cat(lines, 1).permute(1, 2, 0).numpy(), interpolation="bicubic")
    titles = [TITLES[method].format(args.particles) for method in methods]
    ax.set_yticks([(k + 0.5) * height for k in range(len(methods))], titles)
    ax.set_xticks([(k + 0.5) * width for k in range(shown)], args.prompts[:shown])
    ax.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
    for side in ax.spines.values():
        side.set_visible(False)
    left, middle, right = (figure.add_subplot(grid[1, k]) for k in range(3))
    names = dict(TITLES, importance="importance", reference="target, by base images")
    for method, (color, mark) in MARKS.items():
        if method in results:
            gain = value[f"{method}.all.gain"]
            for ax, key in ((left, "clip_eval"), (middle, "diversity")):
                other = value[f"{method}.all.{key}"]
                ax.errorbar(gain[0], other[0], 2 * other[1], 2 * gain[1], marker=mark, color=color, capsize=2,
                            label=names[method].format(args.particles), linestyle="none")
    for ax, key in ((left, "CLIP score, the other model"), (middle, "diversity (1 - cosine)")):
        ax.set(xlabel="reward, base standard deviations", ylabel=key)
    left.legend(fontsize=7)
    steps = range(len(results["das"][0]["history"]))
    for key, label, color, scale in (("ess", "effective sample size / particles", "#0072B2", 1 / args.particles),
                                     ("temper", "temper", "#D55E00", 1)):
        right.plot(steps, [scale * value[f"das.step_{i:03d}.{key}"][0] for i in steps], color=color, label=label)
    right.set(xlabel="step", ylim=(0, 1.05))
    right.legend(fontsize=7)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    plt.close(figure)
    picture = Image.open(buffer).convert("RGB").quantize(256)  # twice the palette of plain figures, for the images
    write_atomically(path, lambda part: picture.save(part, optimize=True))


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
    start, out = time.perf_counter(), results_folder(args, "sd_das")
    rng = torch.Generator(args.device).manual_seed(args.seed)
    world = load_world(args)
    results, levels, scales = run_methods(world, args, rng)
    rows = measure(world, args, results, rng)
    if args.online != "off":
        rows += run_online(world, args, levels, scales, results, rng)
    draw_panels(out / "figure.png", args, rows, results)
    calls = 2 if args.guidance != 1 else 1  # of the UNet on a latent, at each step
    counted = ("reference", "guidance", "das")  # the other rows reuse the samples of the reference
    evaluations = calls * sum(o["evaluations"] for method in counted for o in results.get(method, []))
    write_numbers(out / "numbers.json", args, rows, evaluations, time.perf_counter() - start)
    print_table(rows, "all", ["gain", *scales, "clip_eval", "diversity", "evaluations", "seconds"])
    for prompt in args.prompts:
        print_table(rows, slug(prompt), ["log_z", "ess"])
    print_table(rows, "online", ["queries", "promised", "gain", "clip_eval", "diversity"])
    return {r["name"]: r["estimate"] for r in rows}


if __name__ == "__main__":
    join_processes()
    main(parse_args())
