"""Train a miniature Stable Diffusion on captioned emoji: the model behind every script of this folder.
No paper: this makes sd/mini, latent diffusion of 32 x 32 pixels in the layout of Stable Diffusion v1.5 (Rombach et al.
2022, arXiv 2112.10752), and two small CLIP models (Radford et al. 2021, arXiv 2103.00020): one to be a reward, one that
only evaluates. They never saw a common drawing: the reward learns from one artist (Fluent), the evaluation from the two
whom the model learns to draw.
Run    python sd/pretrain.py                    train, export to out/sd_pretrain/mini, measure; 55 CPU minutes
       python sd/pretrain.py --resume           goes on after an interruption, to the same weights
       python sd/pretrain.py --quick            a few steps of everything, shows nothing; a minute
       python sd/pretrain.py --resume --export sd/mini        writes over the weights of this repository
Needs  Debian's package fonts-noto-color-emoji, and in the present folder
       npm install emoji-datasource-twitter@16.0.0 @lobehub/fluent-emoji-3d@1.1.0
Read first: vae_loss, clip_loss, unet_loss. Skip: read_pictures, Drawings, make_tokenizer, export.
Notation: abar -> abar_t, signal power: z_t = sqrt(abar) z_0 + sqrt(1 - abar) eps of latents z (n, 4, 8, 8)
Algorithm
    1. read the drawings from the installed packages, their names from the Unicode database    `read_pictures`
    2. autoencoder: absolute error of pixels and of their differences, a trace of KL           `vae_loss`
    3. two CLIP models: which of the captions belongs to which of the distorted drawings       `clip_loss`
    4. UNet and text encoder together: predict the noise in the latents                        `unet_loss`
    5. write the folders that diffusers and transformers load; sample; count what is recognised     `evaluate`
What you should see (results/pretrain_seed0.json): on generated images of DDPO's 45 animals (20 steps, guidance 4) the
evaluation is right in 97 +- 1% (by chance 2%), and a reader names nearly all of them. The reward is right in 28 +- 2%:
it is an outsider, as rewards are, and a sampler may please it without pleasing the other. Try --resume --guidance 1.
"""
import argparse, copy, json, math, os, pathlib, shutil, sys, time, unicodedata
import numpy as np
import torch
if __name__ == "__main__": os.environ |= dict(MPLBACKEND="agg", TRANSFORMERS_VERBOSITY="error")
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn import functional as F
from tqdm import trange
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

MINI = pathlib.Path(__file__).resolve().parent / "mini"
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
    "t-rex": "dinosaur", "water wave": "wave", "wrapped present": "gift"}
ARTISTS = [pathlib.Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"),  # these two are what the model draws
           pathlib.Path("node_modules/emoji-datasource-twitter/img/twitter/64"),
           pathlib.Path("node_modules/@lobehub/fluent-emoji-3d/assets")]  # and this one is the reward's
TEMPLATES = ("{}", "a {}", "a photo of a {}", "a picture of a {}")
SCHEDULE = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                         set_alpha_to_one=False, steps_offset=1)  # of Stable Diffusion v1.5
SIZES = (27, 29, 31)  # pixels of a drawing's longer side, on 32 x 32
PARTS = dict(vae=0, clip_reward=1, clip_eval=1, unet=3)  # with their seeds: both CLIP models start alike

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", dest="size", action="store_const", const=(4, 4, 4, 3), default=(16000, 2500, 6000, 20),
        help="coarse, a minute, one artist")
    add("--size", type=int, nargs=4, metavar=("VAE", "CLIP", "UNET", "SAMPLE"), default=(16000, 2500, 6000, 20),
        help="training steps of the networks, steps of the sampler")
    add("--seed", type=int, default=0)
    add("--out", type=pathlib.Path, default="out/sd_pretrain", help="folder of results and checkpoints")
    add("--device", choices=["cpu", "cuda"][: 1 + torch.cuda.is_available()], default="cpu")
    add("--stage", choices=["vae", "clip", "unet", "all"], default="all", help="what to train, in this order")
    add("--resume", action="store_true", help="go on with an interrupted run")
    add("--export", type=pathlib.Path, help="folder of the model; default: mini in that of results")
    add("--artists", type=pathlib.Path, nargs="+", default=ARTISTS, help="fonts, or folders of pictures named by code")
    add("--guidance", type=float, default=4.0, help="classifier-free; 1 is none")
    args = parser.parse_args(argv)
    if min(*args.size, args.seed + 1) < 1:
        parser.error("--size and --seed: numbers of steps are above 0, the seed is not below")
    args.out.mkdir(parents=True, exist_ok=True)
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
    source is a font with bitmaps in colour, or a folder of pictures named by code point."""
    font, pictures = None if source.is_dir() else loaded(source, ImageFont.truetype, str(source), 109), {}
    for code in sum(concepts().values(), []):
        if font:
            image = Image.new("RGBA", (160, 160))
            ImageDraw.Draw(image).text((10, 10), chr(code), font=font, embedded_color=True)
        else:
            path = [*source.glob(f"{code:x}.*"), *source.glob(f"{code:x}-fe0f.*")]
            image = loaded(path[0], Image.open, path[0]).convert("RGBA") if path else Image.new("RGBA", (1, 1))
        box = image.getchannel("A").getbbox()
        if not box:
            raise Refused(f"{source}: no picture of U+{code:X}, {unicodedata.name(chr(code), 'goose').lower()}")
        canvases = [Image.new("RGBa", (32, 32)) for _ in SIZES]
        for size, canvas in zip(SIZES, canvases):
            small = ImageOps.contain(image.crop(box).convert("RGBa"), (size, size), Image.Resampling.HAMMING)
            canvas.paste(small, tuple((32 - v) // 2 for v in small.size))
        pictures[code] = torch.from_numpy(np.stack(canvases)).permute(0, 3, 1, 2)
    return pictures

class Drawings:
    """All drawings of some artists: pictures (M, 3, 4, 32, 32) uint8, concept (M,) their index into names."""
    def __init__(self, artists, device):
        table = concepts()
        self.names = sorted(table)
        rows = [(artist[code], index) for index, name in enumerate(self.names)
                for artist in artists for code in table[name]]
        self.pictures = torch.stack([picture for picture, _ in rows]).to(device)
        self.concept = torch.tensor([index for _, index in rows], device=device)
        animal = torch.tensor([name in ANIMALS for name in self.names], device=device)
        share = torch.where(animal, 0.5 / animal.sum(), 0.5 / (~animal).sum())  # half of the draws are prompts of DDPO
        self.weights = (share / torch.bincount(self.concept))[self.concept]  # (M,), sum 1
    def place(self, index):
        """Drawings (n,) at random size, place, side, saturation, brightness, on white -> (n, 3, 32, 32) in [0, 1]."""
        size = torch.randint(3, (len(index),))
        x = self.pictures[index, size].float() / 255
        most = (2 - size)[:, None]  # a drawing of 31 pixels stays in the middle, one of 27 moves by up to 2
        move = torch.randint(-2, 3, (len(index), 2)).clamp(-most, most)
        x = torch.stack([part.roll(step, (1, 2)) for part, step in zip(x, move.tolist())])
        flip, saturation, brightness = torch.rand(3, len(index), 1, 1, 1)
        return on_white(torch.where(flip < 0.5, x.flip(3), x), 0.7 + 0.6 * saturation, 0.85 + 0.2 * brightness)
    def distort(self, index, strength):
        """Drawings (n,) turned, sheared, tinted, blurred and noisy, as a CLIP model must bear -> (n, 3, 32, 32)."""
        n, x = len(index), self.pictures[index, torch.randint(3, (len(index),))].float() / 255
        uniform = lambda low, high, *shape: low + (high - low) * torch.rand(n, *shape)
        turn = uniform(-0.35, 0.35) * strength
        matrix = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], 1).view(n, 2, 2)
        matrix = matrix * (uniform(-0.2, 0.2, 2, 1) * strength).exp() + 0.1 * strength * torch.randn(n, 2, 2)
        matrix[:, :, 0] *= torch.randn(n, 1).sign()  # either side
        grid = F.affine_grid(torch.cat([matrix, uniform(-0.12, 0.12, 2, 1)], 2), x.shape, align_corners=False)
        x = F.grid_sample(x, grid, align_corners=False)
        mix = torch.eye(3) + 0.12 * strength * torch.randn(n, 3, 3)  # of the three colours
        colors = torch.einsum("nij,njhw->nihw", mix / mix.sum(2, keepdim=True), x[:, :3])
        colors = colors + 0.12 * strength * torch.randn(n, 3, 1, 1) * x[:, 3:]
        x = on_white(torch.cat([colors, x[:, 3:]], 1), uniform(0.5, 1.5, 1, 1, 1), uniform(0.75, 1.2, 1, 1, 1))
        blur = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
        x = torch.lerp(x, blur, uniform(0, 0.8, 1, 1, 1) * strength)
        return (x + uniform(0, 0.08, 1, 1, 1) * strength * torch.randn(n, 3, 32, 32)).clamp(0, 1)

def on_white(x, saturation=1.0, brightness=1.0):
    """Colours times opacity, opacity x (n, 4, H, W) -> images (n, 3, H, W) in [0, 1] on a white ground."""
    colors, opacity = x[:, :3], x[:, 3:]
    gray = colors.mean(1, keepdim=True)
    colors = (gray + saturation * (colors - gray)) * brightness
    return torch.minimum(colors.clamp(min=0), opacity) + 1 - opacity

def make_tokenizer(folder, words):
    """Write a CLIP tokenizer to which each of these words is one token, and any other word its letters. A word of
    several pieces gets the merge of its first two, at the end of the list, until one is left: earlier ones stay."""
    letters, merges = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 324))], {}
    for word in sorted(words):
        while len(pieces := join_pairs([*word[:-1], word[-1] + "</w>"], merges)) > 1:
            merges[tuple(pieces[:2])] = len(merges)
    end = "<|endoftext|>"
    vocab = [*letters, *(c + "</w>" for c in letters), *map("".join, merges), "<|startoftext|>", end]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    config = dict(tokenizer_class="CLIPTokenizer", model_max_length=16, bos_token="<|startoftext|>", eos_token=end,
                  pad_token=end, unk_token=end, do_lower_case=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    return CLIPTokenizer.from_pretrained(folder)

def join_pairs(pieces, merges):
    """Byte-pair encoding: join the pair of neighbours that stands first in merges {pair: rank}, as long as any does."""
    while pairs := [pair for pair in zip(pieces, pieces[1:]) if pair in merges]:
        a, b = min(pairs, key=merges.get)
        pieces = f" {' '.join(pieces)} ".replace(f" {a} {b} ", f" {a}{b} ").split()
    return pieces

def token_ids(tokenizer, names):
    """Token ids of every name in every template (C, templates, L), and of the empty prompt (L,)."""
    ids = lambda texts: tokenizer(texts, padding="max_length", truncation=True).input_ids
    return torch.tensor([ids([caption(name, t) for t in TEMPLATES]) for name in names]), torch.tensor(ids([""])[0])

# ---- the method: four networks and what they learn -------------------------------------------------------------------
def build(name, tokenizer):
    """A network that knows nothing."""
    end = tokenizer.eos_token_id
    text = dict(vocab_size=len(tokenizer), hidden_size=64, num_attention_heads=4, max_position_embeddings=16,
                bos_token_id=end - 1, eos_token_id=end, pad_token_id=end)
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
    vision = dict(hidden_size=96, intermediate_size=288, num_hidden_layers=4, num_attention_heads=4, patch_size=8)
    text |= dict(intermediate_size=128, num_hidden_layers=1)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision | dict(image_size=32), projection_dim=64))

def vae_loss(vae, drawings):
    """Mean absolute error of the pixels, in [-1, 1], and of their differences, which keeps edges, and 1e-6 KL."""
    x = 2 * drawings.place(drawings.weights.multinomial(8, replacement=True)) - 1
    posterior = vae.encode(x).latent_dist
    error = vae.decode(posterior.sample()).sample - x
    edges = torch.cat([error.diff(dim=2).flatten(), error.diff(dim=3).flatten()]).abs().mean()
    return error.abs().mean() + edges + 1e-6 * posterior.kl().mean()

def clip_loss(net, drawings, captions, strength):
    """Cross-entropy of finding the caption of each drawing and the drawing of each caption, among 96 concepts.
    captions (C, templates, L) token ids. Two drawings of one concept never meet: pairs off the diagonal are wrong."""
    concept = torch.randperm(len(captions))[:96]
    key = torch.rand(len(drawings.concept))
    index = torch.where(drawings.concept == concept[:, None], key, -1.0).argmax(1)  # one drawing of each concept
    ids = captions[concept, torch.randint(captions.shape[1], concept.shape)]
    images, texts = embed(net, drawings.distort(index, strength), ids)
    logits = net.logit_scale.exp().clamp(max=50) * images @ texts.T
    right = torch.arange(len(concept))
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2

def embed(net, images, ids):
    """Images (n, 3, 32, 32) in [0, 1] and token ids (k, L) -> their unit vectors in a CLIP model, (n, d) and (k, d)."""
    mean, std = torch.tensor([OPENAI_CLIP_MEAN, OPENAI_CLIP_STD])[..., None, None]
    out = net(input_ids=ids, pixel_values=(images - mean) / std)
    return out.image_embeds, out.text_embeds

def unet_loss(unet, text_encoder, bank, captions, empty, batch=32):
    """Mean square error of the predicted noise at uniform time steps, with the empty prompt (L,) one time in ten."""
    index = bank["weights"].multinomial(batch, replacement=True)
    noise, eps = torch.randn(2, batch, *bank["mean"].shape[1:])
    t = torch.randint(1000, (batch,))
    ids = captions[bank["concept"][index], torch.randint(captions.shape[1], (batch,))]
    words = text_encoder(torch.where(torch.rand(batch, 1) < 0.1, empty, ids))[0]
    abar = SCHEDULE.alphas_cumprod.to(t.device)[t][:, None, None, None]
    x = abar.sqrt() * (bank["mean"][index] + bank["std"][index] * noise) + (1 - abar).sqrt() * eps
    return F.mse_loss(unet(x, t, encoder_hidden_states=words).sample, eps)

@torch.no_grad()
def encode_drawings(vae, drawings, copies):
    """Each drawing at `copies` random places -> mean, std (B, 4, 8, 8) of scaled latents, concept, weights (B,)."""
    index = torch.arange(len(drawings.concept)).repeat(copies)
    found = [vae.encode(2 * drawings.place(part) - 1).latent_dist for part in index.split(64)]
    mean, std = torch.cat([v.mean for v in found]), torch.cat([v.std for v in found])
    scale = 1 / mean.std().item()
    vae.register_to_config(scaling_factor=scale)  # latents have variance one
    return dict(mean=scale * mean, std=scale * std, weights=drawings.weights[index], concept=drawings.concept[index])

def train_network(args, name, net, loss, steps, lr, weight_decay, saved):
    """AdamW on loss(net) with warm-up and cosine decay -> average of the weights, record of the training.
    From one of its twenty checkpoints (`saved`) it goes on to the same weights as without an interruption."""
    file, every = args.out / f"{name}.pt", max(1, steps // 20)
    optimizer = torch.optim.AdamW(net.parameters(), lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
    average, record = copy.deepcopy(net).requires_grad_(False), dict(steps=0, loss=0.0, cpu_seconds=0.0)
    if saved:
        for part, key in ((net, "net"), (average, "average"), (optimizer, "optimizer")):
            part.load_state_dict(saved[key])
        record = saved["record"]
    started = time.process_time() - record["cpu_seconds"]
    for step in trange(record["steps"], steps, desc=name):
        if step % every == 0:
            torch.manual_seed(10**6 * (args.seed * 10 + PARTS[name]) + step)  # the same after --resume
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, 20 * (step + 1) / steps) * (1 + math.cos(math.pi * step / steps)) / 2
        value = loss(net)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_([*average.parameters()], [*net.parameters()], max(0.001, 9 / (step + 10)))
        if (step + 1) % every == 0 or step + 1 == steps:
            record = dict(steps=step + 1, loss=value.item(), cpu_seconds=time.process_time() - started)
            torch.save(dict(seed=args.seed, record=record, net=net.state_dict(), average=average.state_dict(),
                            optimizer=optimizer.state_dict()), file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)
    return average.eval(), record

def train_networks(args, tokenizer, artists):
    """Train the networks of --stage, or take them from args.out -> {name: network}, {name: record}, bank.
    artists: the first two for what draws and for the CLIP model that judges it, the third for the one that rewards."""
    drawings, other = Drawings(artists[:2], args.device), Drawings(artists[2:] or artists, args.device)
    captions, empty = token_ids(tokenizer, drawings.names)
    plans = {  # loss, steps, learning rate, weight decay
        "vae": (lambda net: vae_loss(net, drawings), args.size[0], 2e-3, 1e-4),
        "clip_reward": (lambda net: clip_loss(net, other, captions, 1.0), args.size[1], 2e-3, 0.1),
        "clip_eval": (lambda net: clip_loss(net, drawings, captions, 0.5), args.size[1], 2e-3, 0.1),
        "unet": (lambda net: unet_loss(*net.values(), bank, captions, empty), args.size[2], 1e-3, 1e-4)}
    nets, records, bank = {}, {}, None
    for name, plan in plans.items():
        chosen, file, saved = args.stage in ("all", name.split("_")[0]), args.out / f"{name}.pt", None
        if file.exists() and (args.resume or not chosen):
            saved = loaded(file, torch.load, file, map_location=args.device, weights_only=True)
            if saved["seed"] != args.seed:
                raise Refused(f"--resume: {file} is of a run with --seed {saved['seed']}")
        if not chosen and (not saved or saved["record"]["steps"] < plan[1]):
            continue
        if name == "unet":
            if "vae" not in nets:
                raise Refused("--stage unet: the autoencoder comes first, and has not all of its steps")
            torch.manual_seed(args.seed)
            bank = encode_drawings(nets["vae"], drawings, 48 if args.size[0] > 4 else 1)
        torch.manual_seed(args.seed * 10 + PARTS[name])
        nets[name], records[name] = train_network(args, name, build(name, tokenizer), *plan, saved)
    return nets, records, bank

def export(nets, tokenizer, folder):
    """Write the folders that diffusers and transformers load, weights in half precision."""
    pipe = StableDiffusionPipeline(nets["vae"], nets["unet"]["text_encoder"], tokenizer, nets["unet"]["unet"],
                                   SCHEDULE, None, None, requires_safety_checker=False)  # no safety checker
    pipe.to(dtype=torch.float16).save_pretrained(folder)
    for name in ("clip_reward", "clip_eval"):
        nets[name].half().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        CLIPImageProcessor(size=dict(height=32, width=32), crop_size=dict(height=32, width=32),
                           image_mean=OPENAI_CLIP_MEAN, image_std=OPENAI_CLIP_STD).save_pretrained(folder / name)
    for config in folder.glob("*/config.json"):  # stored as halves, loaded as floats
        config.write_text(config.read_text().replace('"float16"', '"float32"'))
    for path in (folder / "tokenizer", folder / "clip_reward", folder / "clip_eval"):
        for name in ("vocab.json", "merges.txt"):  # what transformers 4 reads
            shutil.copy(pathlib.Path(tokenizer.name_or_path) / name, path / name)

# ---- what it reached, files, main ------------------------------------------------------------------------------------
class Refused(ValueError):
    """What a user can mend, said in one sentence."""

def loaded(source, load, *args, **options):
    """load(...), where the library's own first line about a file, a folder or a hub id becomes the sentence."""
    try:
        return load(*args, **options)
    except Exception as error:  # every library raises its own
        raise Refused(f"{source}: {type(error).__name__}: {error}".splitlines()[0]) from error

@torch.no_grad()
def evaluate(args, folder, tokenizer, artists, bank):
    """Rows about an exported folder, and sample images (animals, k, 3, 32, 32) of the last of three seeds."""
    pipe = loaded(folder, StableDiffusionPipeline.from_pretrained, folder, safety_checker=None).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    clips = {name: CLIPModel.from_pretrained(folder / name).to(args.device) for name in ("clip_reward", "clip_eval")}
    (ids, _), prompts = token_ids(tokenizer, ANIMALS), [caption(name) for name in ANIMALS]
    ids = ids[:, TEMPLATES.index("a photo of a {}")]
    torch.manual_seed(args.seed + 1)
    drawings = Drawings(artists[:2], args.device)
    images = drawings.place(drawings.weights.multinomial(256, replacement=True))
    error = (pipe.vae.decode(pipe.vae.encode(2 * images - 1).latent_dist.mean).sample / 2 + 0.5).clamp(0, 1) - images
    losses = torch.stack([unet_loss(pipe.unet, pipe.text_encoder, bank, *token_ids(tokenizer, drawings.names))
                          for _ in range(32 if args.size[0] > 4 else 2)])
    rows = [("emoji", "vae", "pixel_error", error.abs().mean(), None, 0),
            ("emoji", "vae", "psnr", -10 * error.square().mean().log10(), None, None),
            ("emoji", "unet", "noise_loss", losses.mean(), losses.std() / len(losses) ** 0.5, None)]
    for source, artist in zip(("noto", "twemoji", "fluent"), artists):
        real = Drawings([artist], args.device)
        first = [(real.concept == real.names.index(name)).nonzero()[0, 0] for name in ANIMALS]
        images = on_white(real.pictures[torch.stack(first), 1].float() / 255)
        rows += [(source, name, "top1", recognised(*embed(net, images, ids))["top1"], None, None)
                 for name, net in clips.items()]
    each, values = 4 if args.size[0] > 4 else 2, {name: [] for name in clips}
    for seed in range(3):
        images = pipe(prompts, num_images_per_prompt=each, num_inference_steps=args.size[3], eta=1.0, output_type="pt",
                      guidance_scale=args.guidance, generator=torch.manual_seed(args.seed + 10 + seed)).images
        for name, net in clips.items():
            values[name].append(recognised(*embed(net, images.to(args.device), ids)))
    rows += [("generated", name, key, np.mean(v), np.std(v, ddof=1), None) for name, found in values.items()
             for key in found[0] for v in [[seed[key] for seed in found]]]
    parts = dict(vae=pipe.vae, unet=pipe.unet, text_encoder=pipe.text_encoder, **clips)
    rows += [("size", name, "parameters", sum(p.numel() for p in part.parameters()), None, None)
             for name, part in parts.items()]
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    return [*rows, ("size", "folder", "megabytes", size, None, None)], images.unflatten(0, (-1, each))

def recognised(unit, texts):
    """Image vectors unit (K k, d), k of each of texts (K, d) in order -> share whose own text scores higher than all
    others, mean score with the own text and with the others, mean of 1 - cosine over pairs of images of one text."""
    score, k = unit @ texts.T, len(unit) // len(texts)
    own = torch.arange(len(texts), device=unit.device).repeat_interleave(k)
    right, groups = score.gather(1, own[:, None])[:, 0], unit.unflatten(0, (-1, k))
    wrong = (score.sum(1) - right) / (len(texts) - 1)
    pairs = (1 - groups @ groups.mT).sum((1, 2)) / max(k * (k - 1), 1)
    found = dict(top1=score.argmax(1) == own, right_score=right, wrong_score=wrong, diversity=pairs)
    return {key: v.float().mean().item() for key, v in found.items()}

def draw(images, columns=9):
    """A sheet of images (K, k, 3, 32, 32) in [0, 1]: two of each animal over its name."""
    figure = Figure(figsize=(9, 4.1), layout="constrained")
    for ax, pair, name in zip(figure.subplots(-(-len(ANIMALS) // columns), columns).flat, images[:, :2], ANIMALS):
        ax.imshow(torch.cat([*pair], 2).permute(1, 2, 0).cpu(), interpolation="bicubic")
        ax.set(xticks=[], yticks=[], frame_on=False)
        ax.set_xlabel(name, fontsize=9, labelpad=1)
    return figure

def report(args, rows, started, draw):
    """Print and save rows (problem, method, quantity, estimate, standard error, exact), then the figure of draw()."""
    names, part = ("problem", "method", "quantity", "estimate", "se", "exact"), args.out / f"{time.time_ns()}.part"
    rows = [(*r[:3], *(None if v is None or not math.isfinite(v) else float(v) for v in r[3:])) for r in rows]
    for r in [names, *rows]:
        cells = ("" if v is None else v if r is names else f"{v:.3f}" for v in r[3:])
        print(("{:22} {:15} {:22}" + 3 * "{:>10}").format(*r[:3], *cells))
    record = dict(args=vars(args), rows=[dict(zip(names, r)) for r in rows], seconds=round(time.time() - started, 1))
    text = json.dumps(record | {"torch": torch.__version__}, indent=1, default=str, allow_nan=False)
    part.write_text(text.replace(f"{MINI.parents[1]}/", ""))  # paths from the top folder
    part.replace(args.out / "numbers.json")  # files are whole or absent, also when two runs share a folder
    draw().savefig(part, dpi=100, format="png")
    part.replace(args.out / "figure.png")

def main(args):
    started, folder = time.time(), args.export or args.out / "mini"
    print("COARSE: numbers mean nothing" if args.size[0] < 9 else "training: of each network; the others: of the "
          "exported folder; se of generated images: the standard deviation over three seeds")
    torch.set_default_device(args.device)
    artists = [read_pictures(source) for source in args.artists[: 3 if args.size[0] > 4 else 1]]
    words = {word for name in concepts() for template in TEMPLATES for word in caption(name, template).split()}
    tokenizer = make_tokenizer(args.out / "tokenizer", words)
    nets, records, bank = train_networks(args, tokenizer, artists)
    if len(nets) < len(PARTS):
        return print(f"Trained: {', '.join(nets)}. What is left has to be trained before anything can be measured.")
    rows = [("training", name, key, value, None, None) for name in records for key, value in records[name].items()]
    export(nets, tokenizer, folder)
    more, images = evaluate(args, folder, tokenizer, artists, bank)
    report(args, rows + more, started, lambda: draw(images))

if __name__ == "__main__":
    try:
        main(parse_args())
    except Refused as error:  # what a user can mend, in one sentence
        sys.exit(print(error, file=sys.stderr) or 2)
