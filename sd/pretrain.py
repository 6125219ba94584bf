"""Train a miniature Stable Diffusion on captioned emoji: the model behind every script of this folder.

No paper: this makes sd/mini/, a text-to-image latent diffusion model of 32 x 32 pixels in the layout of Stable
Diffusion v1.5 (Rombach et al. 2022, arXiv 2112.10752), so small that the methods run on a CPU in minutes, and two
small CLIP models (Radford et al. 2021, arXiv 2103.00020): one to be a reward, one that only evaluates. They never saw
a common drawing: the reward learns from one artist (Fluent), the evaluation from the two whom the model learns to draw.

Run    python sd/pretrain.py                    train, export to out/sd_pretrain/mini, measure   55 minutes, one core
       python sd/pretrain.py --resume           continue after an interruption
       python sd/pretrain.py --quick            the same with a few steps: shows nothing         under a minute
       python sd/pretrain.py --resume --export sd/mini        write over the weights of this repository

Needs  Debian's package fonts-noto-color-emoji, and in the present folder
       npm install emoji-datasource-twitter@16.0.0 @lobehub/fluent-emoji-3d@1.1.0

Notation (here -> paper)
       latents -> z         (n, 4, 8, 8): what the autoencoder makes of images (n, 3, 32, 32), times scaling_factor
       abar    -> abar_t    signal power: z_t = sqrt(abar) z_0 + sqrt(1 - abar) eps; Stable Diffusion's 1000 levels
       guidance             eps = eps(empty prompt) + guidance (eps(prompt) - eps(empty prompt)), Ho and Salimans 2022

Steps  1. read the drawings from the installed packages, their names from the Unicode database    `read_pictures`
       2. autoencoder: absolute error of pixels and of their differences, a trace of KL           `vae_loss`
       3. two CLIP models: which of the captions belongs to which of the distorted drawings       `clip_loss`
       4. UNet and text encoder together: predict the noise in the latents                        `unet_loss`
       5. write the folders that diffusers and transformers load; sample; count what is recognised        `measure`

What you should see: on generated images of DDPO's 45 animals (20 steps, guidance 4) the evaluation is right in 97 +- 1%
(by chance 2%), and a reader names nearly all of them. The reward is right in 28 +- 2%: it is an outsider, as rewards
are, and a sampler may please it without pleasing the other. The autoencoder's images are off by 1.6% (28.5 dB).
To try: python sd/pretrain.py --resume --guidance 1   how much of the likeness does guidance make?
"""
import argparse
import copy
import importlib.metadata
import json
import math
import os
import pathlib
import pickle
import resource
import shutil
import sys
import time
import types
import unicodedata

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.utils.checkpoint import checkpoint

PRESETS = {  # what the size flags default to
    "quick": dict(vae_steps=4, clip_steps=4, unet_steps=4, steps=3),
    "default": dict(vae_steps=16000, clip_steps=2500, unet_steps=6000, steps=20),
}
MODULES = {"vae": 0, "clip_reward": 1, "clip_eval": 1, "unet": 3}  # their seeds: both CLIP models start alike
ANIMALS = """cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard
beetle ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee pig turkey fly
llama camel bat gorilla hedgehog kangaroo""".split()  # the prompts of DDPO (arXiv 2305.13301)
PICTURES = """1f400-1f43c 1f43f 1f54a 1f577 1f980-1f99f 1f9a1-1f9a9 1f9ab-1f9ad 1fab0-1fab3 1fabf
1f331-1f335 1f337-1f33d 1f340 1f341 1f344 1f32d-1f32f 1f336 1f345-1f355 1f35e 1f35f 1f363 1f364 1f366-1f36d 1f36f 1f370
1f377-1f37a 1f37f 1f950-1f956 1f95a 1f95d 1f95e 1f965 1f966 1f968 1f96a 1f96d 1f96f 1f9c0 1f9c1 1f9c7 1fad0
1f308 1f30a 1f30b 1f319 1f31e 1f31f 1f680-1f682 1f68c 1f691-1f693 1f695 1f697 1f69a 1f69c 1f6a2 1f6b2 1f6f8 2708
26bd 1f3c0 1f4a1 1f511 1f525 1f451 1f381 1f388 23f0 1f3e0 1f3b8 1f4f7 1f4d5 1f4d7-1f4d9
2764 1f499-1f49c 1f5a4 1f90d 1f90e 1f9e1 1f534 1f535 1f7e0-1f7eb"""  # animals, food and plants, things, coloured shapes
WORDS = {  # plainer than the Unicode database
    "aubergine": "eggplant", "automobile": "car", "baby chick": "chick", "bactrian camel": "camel",
    "baguette bread": "baguette", "basketball and hoop": "basketball", "cheese wedge": "cheese", "chipmunk": "squirrel",
    "closed book": "red book", "deciduous tree": "tree", "delivery truck": "truck", "doughnut": "donut",
    "dove of peace": "dove", "dromedary camel": "camel", "ear of maize": "corn", "electric light bulb": "light bulb",
    "evergreen tree": "tree", "fire engine": "fire truck", "flying saucer": "ufo", "french fries": "fries",
    "front-facing baby chick": "chick", "glowing star": "star", "hatching chick": "chick",
    "heavy black heart": "red heart", "honeybee": "bee", "house building": "house", "kiwifruit": "kiwi",
    "lady beetle": "ladybug", "sauropod": "dinosaur", "shortcake": "cake", "slice of pizza": "pizza",
    "soft ice cream": "ice cream", "spouting whale": "whale", "steam locomotive": "train", "sun with": "sun",
    "t-rex": "dinosaur", "water wave": "wave", "wrapped present": "gift",
}
TEMPLATES = ("{}", "a {}", "a photo of a {}", "a picture of a {}")
SIZES = (27, 29, 31)  # pixels of a drawing's longer side, on 32 x 32
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def parse_args(argv=None):
    parser = common_parser(__doc__)
    parser.add_argument("--stage", choices=["vae", "clip", "unet", "all"], default="all")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoints in the folder of results")
    parser.add_argument("--export", type=pathlib.Path, help="folder of the model; default: mini in that of results")
    parser.add_argument("--font", type=pathlib.Path,
                        default=pathlib.Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"))
    parser.add_argument("--twemoji", type=pathlib.Path,
                        default=pathlib.Path("node_modules/emoji-datasource-twitter/img/twitter/64"))
    parser.add_argument("--fluent", type=pathlib.Path,
                        default=pathlib.Path("node_modules/@lobehub/fluent-emoji-3d/assets"))
    parser.add_argument("--vae-steps", type=positive(int), help="training steps of the autoencoder, batch 8")
    parser.add_argument("--clip-steps", type=positive(int), help="training steps of each CLIP, batch 96")
    parser.add_argument("--unet-steps", type=positive(int), help="training steps of UNet and text encoder, batch 32")
    parser.add_argument("--steps", type=positive(int), help="sampling steps of the measured images")
    parser.add_argument("--guidance", type=positive(float), default=4.0, help="1 is none")
    args = parser.parse_args(argv)
    if args.paper:
        parser.error("--paper: no paper has this model, there is only one size")
    for name, value in PRESETS["quick" if args.quick else "default"].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


# ---- the problem: captioned drawings ---------------------------------------------------------------------------------


def concepts():
    """{name: code points} of the drawings, such as cat: [U+1F408, U+1F431 (cat face)], by the Unicode database."""
    found = {}
    for part in PICTURES.split():
        first, last = (int(code, 16) for code in (part.split("-") * 2)[:2])
        for code in range(first, last + 1):
            name = unicodedata.name(chr(code), {0x1FABF: "goose"}.get(code)).lower()  # the goose is of Unicode 15
            name = name.removeprefix("large ").removesuffix(" face")
            found.setdefault(WORDS.get(name, name), []).append(code)
    return found


def caption(name, template="a photo of a {}"):
    """A prompt, with the right article."""
    return template.replace("a {}", "an {}" if name[0] in "aeio" else "a {}").format(name)


def read_pictures(source):
    """{code point: (3, 4, 32, 32) uint8}: a drawing in the three SIZES, colours times opacity, then opacity.

    source is a font with bitmaps in colour or a folder of pictures named by code point. A missing drawing is an error.
    """
    try:
        font = None if source.is_dir() else ImageFont.truetype(str(source), 109)
    except OSError:
        fail(f"{source} is neither a font nor a folder of pictures: install it as the head of sd/pretrain.py says.")
    pictures = {}
    for code in sum(concepts().values(), []):
        if font:
            image = Image.new("RGBA", (160, 160))
            ImageDraw.Draw(image).text((10, 10), chr(code), font=font, embedded_color=True)
        else:
            paths = [source / f"{code:x}{end}" for end in (".png", "-fe0f.png", ".webp", "-fe0f.webp")]
            path = next((path for path in paths if path.exists()), None)
            image = Image.open(path).convert("RGBA") if path else Image.new("RGBA", (1, 1))
        box = image.getchannel("A").getbbox()
        if not box:
            fail(f"{source} has no picture of U+{code:X}, {unicodedata.name(chr(code), 'goose').lower()}.")
        pictures[code] = torch.stack([fit(image.crop(box), size) for size in SIZES])
    return pictures


def fit(image, size):
    """An RGBA image scaled to `size` pixels in the middle of 32 x 32 -> (4, 32, 32) uint8, colours times opacity."""
    scale = size / max(image.size)
    image = image.convert("RGBa").resize([max(1, round(scale * v)) for v in image.size], Image.Resampling.HAMMING)
    canvas = np.zeros((32, 32, 4), np.uint8)
    x, y = ((32 - v) // 2 for v in image.size)
    canvas[y : y + image.height, x : x + image.width] = np.asarray(image)
    return torch.from_numpy(canvas).permute(2, 0, 1)


class Drawings:
    """All drawings of some artists: pictures (M, 3, 4, 32, 32) uint8, concept (M,) their index into names."""

    def __init__(self, artists, device):
        table = concepts()
        self.names = sorted(table)
        rows = [(artist[code], index) for index, name in enumerate(self.names)
                for artist in artists for code in table[name]]
        self.pictures = torch.stack([picture for picture, _ in rows]).to(device)
        self.concept = torch.tensor([index for _, index in rows], device=device)
        counts = torch.bincount(self.concept)
        animal = torch.tensor([name in ANIMALS for name in self.names], device=device)
        share = torch.where(animal, 0.5 / animal.sum(), 0.5 / (~animal).sum())  # half of the draws are prompts of DDPO
        self.weights = (share / counts)[self.concept]  # (M,), sum 1

    def choose(self, n, rng):
        """n indices of drawings: a concept, then one of its drawings."""
        return torch.multinomial(self.weights, n, replacement=True, generator=rng)

    def place(self, index, rng):
        """Drawings (n,) at random size, place, side, saturation, brightness, on white -> (n, 3, 32, 32) in [0, 1]."""
        n, device = len(index), index.device
        size = torch.randint(3, (n,), generator=rng, device=device)
        x = self.pictures[index, size].float() / 255
        most = (2 - size)[:, None]  # a drawing of 31 pixels stays in the middle, one of 27 moves by up to 2
        move = torch.randint(-2, 3, (n, 2), generator=rng, device=device).clamp(-most, most)
        x = torch.stack([part.roll(step, (1, 2)) for part, step in zip(x, move.tolist())])
        flip, saturation, brightness = torch.rand(3, n, 1, 1, 1, generator=rng, device=device)
        x = torch.where(flip < 0.5, x.flip(3), x)
        return on_white(x, 0.7 + 0.6 * saturation, 0.85 + 0.2 * brightness)

    def distort(self, index, strength, rng):
        """Drawings (n,) turned, sheared, tinted, blurred and noisy, as a CLIP model must bear -> (n, 3, 32, 32)."""
        n, device = len(index), index.device

        def uniform(low, high, *shape):
            return low + (high - low) * torch.rand(n, *shape, generator=rng, device=device)

        def normal(*shape):
            return torch.randn(n, *shape, generator=rng, device=device)

        size = torch.randint(3, (n,), generator=rng, device=device)
        x = self.pictures[index, size].float() / 255
        turn = uniform(-0.35, 0.35) * strength
        matrix = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], 1).view(n, 2, 2)
        matrix = matrix * (uniform(-0.2, 0.2, 2, 1) * strength).exp() + 0.1 * strength * normal(2, 2)
        matrix = matrix * torch.stack([torch.where(uniform(0, 1) < 0.5, -1.0, 1.0), torch.ones_like(turn)], 1)[:, None]
        grid = torch.cat([matrix, uniform(-0.12, 0.12, 2, 1)], 2)
        x = F.grid_sample(x, F.affine_grid(grid, x.shape, align_corners=False), align_corners=False)
        mix = torch.eye(3, device=device) + 0.12 * strength * normal(3, 3)  # of the three colours
        colors = torch.einsum("nij,njhw->nihw", mix / mix.sum(2, keepdim=True), x[:, :3])
        colors = colors + 0.12 * strength * normal(3, 1, 1) * x[:, 3:]
        x = on_white(torch.cat([colors, x[:, 3:]], 1), uniform(0.5, 1.5, 1, 1, 1), uniform(0.75, 1.2, 1, 1, 1))
        blur = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
        x = torch.lerp(x, blur, uniform(0, 0.8, 1, 1, 1) * strength)
        return (x + uniform(0, 0.08, 1, 1, 1) * strength * normal(3, 32, 32)).clamp(0, 1)


def on_white(x, saturation=1.0, brightness=1.0):
    """Colours times opacity, opacity x (n, 4, H, W) -> images (n, 3, H, W) in [0, 1] on a white ground."""
    colors, opacity = x[:, :3], x[:, 3:]
    gray = colors.mean(1, keepdim=True)
    colors = (gray + saturation * (colors - gray)) * brightness
    return torch.minimum(colors.clamp(min=0), opacity) + 1 - opacity


def make_tokenizer(folder, words):
    """Write a CLIP tokenizer to which each of these words is one token, and any other word its letters.

    Byte-pair encoding applies the earliest possible merge. A word that falls into several pieces under the merges so
    far gets the merge of its first two at the end of the list, until one piece is left; earlier words do not change.
    """
    from transformers import CLIPTokenizer
    letters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    merges = {}
    for word in sorted(words):
        while len(pieces := join_pairs([*word[:-1], word[-1] + "</w>"], merges)) > 1:
            merges[tuple(pieces[:2])] = len(merges)
    vocab = [*letters, *(c + "</w>" for c in letters), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    end = "<|endoftext|>"
    config = dict(tokenizer_class="CLIPTokenizer", model_max_length=16, bos_token="<|startoftext|>", eos_token=end,
                  pad_token=end, unk_token=end, do_lower_case=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    return CLIPTokenizer.from_pretrained(folder)


def join_pairs(pieces, merges):
    """Byte-pair encoding: join the pair of neighbours that stands first in merges {pair: rank}, as long as any does."""
    while pairs := [pair for pair in zip(pieces, pieces[1:]) if pair in merges]:
        best, joined = min(pairs, key=merges.get), []
        for piece in pieces:
            if joined and (joined[-1], piece) == best:
                joined[-1] += piece
            else:
                joined.append(piece)
        pieces = joined
    return pieces


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


def ddim_schedule(scheduler, steps):
    """Time steps (T,) from noise to data, and signal powers abar (T + 1,) there and of the result, as in diffusers."""
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.tolist()
    levels = scheduler.alphas_cumprod.double().tolist()
    return timesteps, [*(levels[t] for t in timesteps), float(scheduler.final_alpha_cumprod)]


def ddim_kernel(x0_hat, eps, abar, abar_next, eta):
    """Mean (N, ...) and standard deviation (float) of p(x_{t-1} | x_t); eta = 1 is DDPM. DDIM (Song 2021) eq. 12."""
    sigma = eta * ((1 - abar_next) / (1 - abar) * (1 - abar / abar_next)) ** 0.5
    return abar_next**0.5 * x0_hat + max(1 - abar_next - sigma**2, 0.0) ** 0.5 * eps, sigma


@torch.no_grad()
def ddim_sample(predict_noise, x, timesteps, abar, rng, eta=1.0):
    """x (N, ...) standard normal -> a sample of the model at abar[-1]; timesteps and abar from noise to data."""
    for i, t in enumerate(timesteps):
        eps = predict_noise(x, t)
        x, sigma = ddim_kernel((x - (1 - abar[i]) ** 0.5 * eps) / abar[i] ** 0.5, eps, abar[i], abar[i + 1], eta)
        x = x + sigma * torch.randn(x.shape, generator=rng, device=x.device, dtype=x.dtype)
    return x


# ---- the method: four networks and what they learn -------------------------------------------------------------------


def build(name, tokenizer, seed):
    """A network that knows nothing, the same for the same seed."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel
    end = tokenizer.eos_token_id
    text = dict(vocab_size=len(tokenizer), hidden_size=64, num_attention_heads=4, max_position_embeddings=16,
                bos_token_id=end - 1, eos_token_id=end, pad_token_id=end)
    with torch.random.fork_rng():  # the libraries' constructors draw from the global generator and take no other
        torch.manual_seed(seed)
        if name == "vae":
            return AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
                                 block_out_channels=(16, 32, 64), latent_channels=4, norm_num_groups=8, sample_size=32)
        if name == "unet":
            unet = UNet2DConditionModel(
                sample_size=8, in_channels=4, out_channels=4, block_out_channels=(48, 96), layers_per_block=1,
                down_block_types=["CrossAttnDownBlock2D"] * 2, up_block_types=["CrossAttnUpBlock2D"] * 2,
                cross_attention_dim=64, attention_head_dim=4, norm_num_groups=16)
            words = CLIPTextModel(CLIPTextConfig(**text, intermediate_size=256, num_hidden_layers=2))
            return torch.nn.ModuleDict(dict(unet=unet, text_encoder=words))
        vision = dict(hidden_size=96, intermediate_size=288, num_hidden_layers=4, num_attention_heads=4, image_size=32,
                      patch_size=8)
        text |= dict(intermediate_size=128, num_hidden_layers=1)
        return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def differences(images):
    """All differences of neighbouring pixels, down and right, of images (n, C, H, W), in one row."""
    return torch.cat([images.diff(dim=2).flatten(), images.diff(dim=3).flatten()])


def vae_loss(vae, drawings, rng):
    """Mean absolute error of the pixels, in [-1, 1], and of their differences, which keeps edges, and 1e-6 KL."""
    x = 2 * drawings.place(drawings.choose(8, rng), rng) - 1
    posterior = vae.encode(x).latent_dist
    y = vae.decode(posterior.sample(rng)).sample
    edges = (differences(y) - differences(x)).abs().mean()
    return (y - x).abs().mean() + edges + 1e-6 * posterior.kl().mean()


def clip_loss(net, drawings, captions, strength, rng):
    """Cross-entropy of finding the caption of each drawing and the drawing of each caption, among 96 concepts.

    captions (C, templates, L) token ids. Two drawings of one concept never meet: every pair off the diagonal is wrong.
    """
    concept = torch.randperm(len(captions), generator=rng, device=rng.device)[:96]
    key = torch.rand(len(drawings.concept), generator=rng, device=rng.device)
    index = torch.where(drawings.concept == concept[:, None], key, -1.0).argmax(1)  # one drawing of each concept
    template = torch.randint(captions.shape[1], concept.shape, generator=rng, device=rng.device)
    clip = types.SimpleNamespace(net=net)
    images = clip_images(clip, drawings.distort(index, strength, rng))
    ids = captions[concept, template]
    words = F.normalize(net.text_projection(net.text_model(input_ids=ids).pooler_output), dim=1)
    logits = net.logit_scale.exp().clamp(max=50) * images @ words.T
    right = torch.arange(len(concept), device=rng.device)
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


def unet_loss(nets, bank, captions, empty, levels, rng, batch=32):
    """Mean square error of the predicted noise at uniform time steps; one caption in ten is left out.

    bank: namespace of means and stds (B, 4, 8, 8) of scaled latents, their concept (B,), their weights (B,);
    captions (C, templates, L) and empty (L,) token ids; levels (1000,) signal powers.
    """
    device = rng.device
    index = torch.multinomial(bank.weights, batch, replacement=True, generator=rng)
    noise, eps = torch.randn(2, batch, *bank.means.shape[1:], generator=rng, device=device)
    t = torch.randint(len(levels), (batch,), generator=rng, device=device)
    template = torch.randint(captions.shape[1], (batch,), generator=rng, device=device)
    drop = torch.rand(batch, 1, generator=rng, device=device) < 0.1
    words = nets["text_encoder"](torch.where(drop, empty, captions[bank.concept[index], template]))[0]
    abar = levels[t][:, None, None, None]
    x = abar.sqrt() * (bank.means[index] + bank.stds[index] * noise) + (1 - abar).sqrt() * eps
    return F.mse_loss(nets["unet"](x, t, encoder_hidden_states=words).sample, eps)


@torch.no_grad()
def encode_drawings(vae, drawings, copies, rng):
    """The bank of unet_loss: each drawing at `copies` random places. Sets the autoencoder's scaling_factor from it."""
    index = torch.arange(len(drawings.concept), device=rng.device).repeat(copies)
    means, stds = [], []
    for done, part in enumerate(index.split(64), 1):
        posterior = vae.encode(2 * drawings.place(part, rng) - 1).latent_dist
        means.append(posterior.mean)
        stds.append(posterior.std)
        progress("latents", done, -(-len(index) // 64))
    means, stds, weights = torch.cat(means), torch.cat(stds), drawings.weights[index]
    scale = 1 / means.std().item()
    vae.register_to_config(scaling_factor=scale)
    return types.SimpleNamespace(means=scale * means, stds=scale * stds, weights=weights,
                                 concept=drawings.concept[index])


def train(name, net, loss, steps, lr, weight_decay, args, folder, rng, resume):
    """Adam on loss(net, rng) with warm-up and cosine decay -> (average of the weights, record of the training).

    Twenty times it leaves a checkpoint, with the state of all that is random: --resume gives the same bytes as a run
    that was never interrupted, and returns at once where the training is finished. With another number of steps it
    goes on at the learning rate that this number has at the present step.
    """
    path, settings = folder / f"{name}.pt", json.dumps([name, lr, weight_decay, args.seed, args.quick])
    optimizer = torch.optim.AdamW(net.parameters(), lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
    average, first, record = copy.deepcopy(net).requires_grad_(False), 0, dict(steps=steps, cpu_seconds=0.0)
    if resume and path.exists():
        state = read_checkpoint(path, settings, args.device)
        net.load_state_dict(state["net"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        rng.set_state(state["rng"].cpu())
        first, record = state["step"], state["record"]
    begin, clock, before = time.perf_counter(), time.process_time(), record["cpu_seconds"]
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, 20 * (step + 1) / steps) * (1 + math.cos(math.pi * step / steps)) / 2
        value = loss(net, rng)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        keep = min(0.999, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - keep)
        done = step + 1
        if done % max(1, steps // 20) == 0 or done == steps:
            left = (time.perf_counter() - begin) / (done - first) * (steps - done) / 60
            record = dict(steps=steps, loss=value.item(), cpu_seconds=before + time.process_time() - clock)
            state = dict(settings=settings, step=done, net=net.state_dict(), average=average.state_dict(),
                         optimizer=optimizer.state_dict(), rng=rng.get_state(), record=record)
            write_atomically(path, lambda part: torch.save(state, part))
            progress(f"{name}: loss {value.item():.4f}, {left:.1f} min left, step", done, steps)
    return average.eval(), record


def finished(folder, name, steps, device):
    """Whether the folder has the last checkpoint of a training; one that cannot be read is seen by train."""
    path = folder / f"{name}.pt"
    return path.exists() and torch.load(path, map_location=device, weights_only=True)["step"] == steps


def read_checkpoint(path, settings, device):
    """The checkpoint of a training with these settings."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        if state["settings"] != settings:
            fail(f"{path} was trained with other settings ({state['settings']}): delete it, or run without --resume.")
    except (KeyError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        fail(f"{path} is no checkpoint of this script ({type(error).__name__}): delete it to train again.")
    return state


def train_networks(args, folder, tokenizer, artists):
    """Train the networks of --stage, or take them from the folder -> ({name: network}, {name: record}, bank).

    artists: the first two for what draws and for the CLIP model that judges it, the third for the one that rewards.
    """
    drawings, other = Drawings(artists[:2], args.device), Drawings(artists[2:] or artists, args.device)
    captions, empty = caption_tokens(tokenizer, drawings.names, args.device)
    levels = noise_schedule().alphas_cumprod.to(args.device)
    plans = {  # loss, steps, learning rate, weight decay
        "vae": (lambda net, rng: vae_loss(net, drawings, rng), args.vae_steps, 2e-3, 1e-4),
        "clip_reward": (lambda net, rng: clip_loss(net, other, captions, 1.0, rng), args.clip_steps, 2e-3, 0.1),
        "clip_eval": (lambda net, rng: clip_loss(net, drawings, captions, 0.5, rng), args.clip_steps, 2e-3, 0.1),
        "unet": (lambda net, rng: unet_loss(net, bank, captions, empty, levels, rng), args.unet_steps, 1e-3, 1e-4),
    }
    nets, records, bank = {}, {}, None
    for name, seed in MODULES.items():
        loss, steps, lr, weight_decay = plans[name]
        net = build(name, tokenizer, args.seed * 10 + seed).to(args.device)
        rng = torch.Generator(args.device).manual_seed(args.seed * 10 + seed)
        chosen = args.stage in ("all", name.split("_")[0])
        if name == "unet" and "vae" in nets:
            copies = 1 if args.quick else 48
            bank = encode_drawings(nets["vae"], drawings, copies, torch.Generator(args.device).manual_seed(args.seed))
        elif name == "unet" and chosen:
            fail("--stage unet needs a finished autoencoder: run with --stage vae first.")
        if chosen or finished(folder, name, steps, args.device):
            nets[name], records[name] = train(name, net, loss, steps, lr, weight_decay, args, folder, rng,
                                              resume=args.resume or not chosen)
    return nets, records, bank


def caption_tokens(tokenizer, names, device):
    """Token ids of every name in every template (C, templates, L), and of the empty prompt (L,)."""
    ids = [tokenize(tokenizer, [caption(name, template) for template in TEMPLATES]) for name in names]
    return torch.tensor(ids, device=device), torch.tensor(tokenize(tokenizer, [""])[0], device=device)


def noise_schedule():
    """The schedule of Stable Diffusion v1.5."""
    from diffusers import DDIMScheduler
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                         set_alpha_to_one=False, steps_offset=1)


def export(nets, tokenizer, folder):
    """Write the folders that diffusers and transformers load, weights in half precision."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPImageProcessor
    part = folder.with_name(f"part-{folder.name}")
    shutil.rmtree(part, ignore_errors=True)
    pipe = StableDiffusionPipeline(nets["vae"], nets["unet"]["text_encoder"], tokenizer, nets["unet"]["unet"],
                                   noise_schedule(), safety_checker=None, feature_extractor=None,
                                   requires_safety_checker=False)
    copy.deepcopy(pipe).to(dtype=torch.float16).save_pretrained(part)
    for name in ("clip_reward", "clip_eval"):
        copy.deepcopy(nets[name]).half().save_pretrained(part / name)
        tokenizer.save_pretrained(part / name)
        size = dict(height=32, width=32)
        CLIPImageProcessor(size=size, crop_size=size, image_mean=CLIP_MEAN, image_std=CLIP_STD).save_pretrained(
            part / name)
    for config in part.glob("*/config.json"):  # stored as halves, loaded as floats
        config.write_text(config.read_text().replace('"float16"', '"float32"'))
    for path in [part / "tokenizer", part / "clip_reward", part / "clip_eval"]:
        for name in ("vocab.json", "merges.txt"):  # what transformers 4 reads
            shutil.copy(pathlib.Path(tokenizer.name_or_path) / name, path / name)
    try:
        shutil.copytree(part, folder, dirs_exist_ok=True)
    except OSError as error:
        fail(f"{folder} cannot be written: {error}")
    shutil.rmtree(part)


# ---- what it reached -------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(args, folder, tokenizer, artists, bank):
    """Rows about an exported folder, and sample images (animals, k, 3, 32, 32) of the last of three seeds.

    An image is recognised where a CLIP model gives the caption of its animal a higher score than those of the 44
    others. In the rows of generated images, se is the standard deviation over three seeds.
    """
    device, rows = args.device, []
    pipe = load_pipeline(folder, device)
    clips = {name: load_clip(folder / name, device) for name in ("clip_reward", "clip_eval")}
    prompts = [caption(name) for name in ANIMALS]
    texts = {name: clip_text(clip, prompts) for name, clip in clips.items()}

    drawings = Drawings(artists[:2], device)
    rng = torch.Generator(device).manual_seed(args.seed + 1)
    images = drawings.place(drawings.choose(256, rng), rng)
    latents = pipe.vae.encode(2 * images - 1).latent_dist.mean * pipe.vae.config.scaling_factor
    error = image_decoder(pipe.vae, 64)(latents) - images
    rows.append(row("vae.emoji.pixel_error", error.abs().mean().item(), exact=0.0))
    rows.append(row("vae.emoji.psnr", -10 * error.pow(2).mean().log10().item()))
    nets = dict(unet=pipe.unet, text_encoder=pipe.text_encoder)
    captions, empty = caption_tokens(tokenizer, drawings.names, device)
    levels = noise_schedule().alphas_cumprod.to(device)
    losses = [unet_loss(nets, bank, captions, empty, levels, rng).item() for _ in range(2 if args.quick else 32)]
    rows.append(row("unet.emoji.noise_loss", *mean_and_se(torch.tensor(losses))))

    for source, artist in zip(("noto", "twemoji", "fluent"), artists):
        real = Drawings([artist], device)
        first = [(real.concept == real.names.index(name)).nonzero()[0, 0] for name in ANIMALS]
        images = on_white(real.pictures[torch.stack(first), 1].float() / 255)
        for name, clip in clips.items():
            rows.append(row(f"{name}.{source}.top1", recognised(clip_images(clip, images), texts[name])[0]))

    cond, uncond = encode_prompts(pipe, prompts), encode_prompts(pipe, [""])
    timesteps, abar = ddim_schedule(pipe.scheduler, args.steps)
    each, values = 2 if args.quick else 4, {}
    for seed in range(3):
        rng = torch.Generator(device).manual_seed(args.seed + 10 + seed)
        predict_noise = noise_predictor(pipe.unet, cond.repeat_interleave(each, 0), uncond, args.guidance, 64)
        x = torch.randn(len(cond) * each, *bank.means.shape[1:], generator=rng, device=device)
        images = image_decoder(pipe.vae, 64)(ddim_sample(predict_noise, x, timesteps, abar, rng))
        for name, clip in clips.items():
            unit = clip_images(clip, images, 256)
            keys = ("top1", "right_score", "wrong_score")
            for key, value in zip(keys, recognised(unit, texts[name])):
                values.setdefault(f"{name}.generated.{key}", []).append(value)
            values.setdefault(f"{name}.generated.diversity", []).append(pair_distance(unit.unflatten(0, (-1, each))))
        progress("sampling", seed + 1, 3)
    rows += [row(name, float(np.mean(seeds)), float(np.std(seeds, ddof=1))) for name, seeds in values.items()]

    parts = dict(vae=pipe.vae, **nets, **{name: clip.net for name, clip in clips.items()})
    rows += [row(f"{name}.size.parameters", sum(p.numel() for p in part.parameters())) for name, part in parts.items()]
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    rows.append(row("folder.size.megabytes", round(size / 1e6, 2)))
    return rows, images.unflatten(0, (-1, each)), 2 * 3 * len(x) * args.steps


def recognised(unit, texts):
    """Image vectors unit (K k, d), k of each of texts (K, d) in order -> share whose own text scores highest, mean

    score with the own text, and with the others.
    """
    score = unit @ texts.T
    own = torch.arange(len(texts), device=unit.device).repeat_interleave(len(unit) // len(texts))
    right = score.gather(1, own[:, None])[:, 0]
    wrong = (score.sum(1) - right) / (len(texts) - 1)
    return [v.float().mean().item() for v in (score.argmax(1) == own, right, wrong)]


def pair_distance(unit):
    """Unit vectors (K, k, d) -> mean of 1 - cosine over the pairs within each of the K sets."""
    k = unit.shape[1]
    return ((1 - unit @ unit.mT).sum((1, 2)) / (k * (k - 1))).mean().item()


def draw_sheet(path, images, names, columns=9):
    """images (K, k, 3, 32, 32) in [0, 1]: two of each, twice their size, over its name, in rows of `columns` names."""
    width, height = 2 * 64 + 8, 64 + 16
    sheet = Image.new("RGB", (columns * width, -(-len(names) // columns) * height), "white")
    pixels = (images * 255).round().byte().permute(0, 1, 3, 4, 2).cpu().numpy()
    for i, name in enumerate(names):
        x, y = i % columns * width, i // columns * height
        for j in (0, 1):
            picture = Image.fromarray(pixels[i, j]).resize((64, 64), Image.Resampling.BICUBIC)
            sheet.paste(picture, (x + 64 * j, y))
        ImageDraw.Draw(sheet).text((x + 64, y + 65), name, fill="black", anchor="ma")
    write_atomically(path, lambda part: sheet.quantize(256).save(part, optimize=True))


def mean_and_se(values):
    """Independent values (G,) -> their mean and its standard error (None for a single one)."""
    return values.mean().item(), values.std().item() / len(values) ** 0.5 if len(values) > 1 else None


# ---- shared: command line and files ----------------------------------------------------------------------------------


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
    """Train, export, measure, write numbers.json and the sample sheet -> {row name: estimate}."""
    start, out = time.perf_counter(), results_folder(args, "sd_pretrain")
    folder = args.export or out / "mini"
    sources = [args.font] if args.quick else [args.font, args.twemoji, args.fluent]
    artists = [read_pictures(source) for source in sources]
    words = {word for name in concepts() for template in TEMPLATES for word in caption(name, template).split()}
    tokenizer = make_tokenizer(out / "tokenizer", words)
    nets, records, bank = train_networks(args, out, tokenizer, artists)
    rows = [row(f"{name}.training.{key}", value) for name, record in records.items() for key, value in record.items()]
    missing = [name for name in MODULES if name not in nets]
    if missing:
        print(f"Trained: {', '.join(nets)}. Still to train before anything can be measured: {', '.join(missing)}.")
        return {r["name"]: r["estimate"] for r in rows}
    export(nets, tokenizer, folder)
    measured, images, evaluations = measure(args, folder, tokenizer, artists, bank)
    rows += measured
    draw_sheet(out / "figure.png", images, ANIMALS)
    write_numbers(out / "numbers.json", args, rows, evaluations, time.perf_counter() - start)
    print_table(rows, "training", ["steps", "loss", "cpu_seconds"])
    print_table(rows, "emoji", ["pixel_error", "psnr", "noise_loss"])
    for source in ("noto", "twemoji", "fluent"):
        print_table(rows, source, ["top1"])
    print_table(rows, "generated", ["top1", "right_score", "wrong_score", "diversity"])
    print_table(rows, "size", ["parameters", "megabytes"])
    return {r["name"]: r["estimate"] for r in rows}


if __name__ == "__main__":
    main(parse_args())
