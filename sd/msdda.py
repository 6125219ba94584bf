"""Merge adapters of Stable Diffusion, tuned for one reward each, into a model for any weighting of the rewards.
Paper: Zhang, Wang and Zou, "Step-level Denoising-time Diffusion Alignment with Multiple Objectives" (MSDDA), 2026,
arXiv 2604.14379; its text was not at hand. figure.png: a Pareto front of two opposed rewards, and the images.
Run    python sd/msdda.py                      miniature model, adapters of sd/adapters; of --sweep 0.5: 80 CPU seconds
       python sd/msdda.py --device cuda --paper --model stable-diffusion-v1-5/stable-diffusion-v1-5 --chunk 8
           --reward aesthetic clip --clip openai/clip-vit-large-patch14 --lora FOLDER FOLDER   24 GB, not run here
Read first: merge, msdda, sample. Skip: checked, make_rewards, Diffusion, save_samples, draw, report.
Notation (here -> usual symbol); G groups of P interacting particles: x (G, P, C, h, w) latents, log_w (G, P)
    weights -> w_i         of the rewards, of sum one; gain: reward in standard deviations of the base model
    mean, sigma            of a reverse kernel p_i(x_{t-1} | x_t), here DDIM with eta = 1: all have one sigma
    log_c -> log C_t       log of the integral over x_{t-1} of prod_i p_i(x_{t-1} | x_t)^w_i
Algorithm, at every step from noise to image
    1. msdda: forecast the noise with each adapter alone                                        `adapted`
    2. merge: multiply the kernels: of one variance, which the adapters do not change, the means are averaged
    3. draw x_{t-1}. Ours (row msdda_ct): smc adds log C_t to the weights, at no call of the UNet
toy/msdda.py has variances that differ, and the exact answers. soup averages the changes B A of the weights, that is
    Rewarded Soup. rgg moves the base model's mean along the reward's gradient, code keeps the best forecast of 4
    particles after every 5 steps: both see the rewards.
What you should see (seed 0, three training seeds): alone the adapters gain 5.04 and 2.82 of their own reward and lose
    2.24 and 1.92 of the other. Weighted gain at (1/2, 1/2): msdda 1.17 +- .03 in 20 calls of the UNet, soup .020 +-
    .005 more in 10; msdda_ct .04 +- .01 less (seeds 1, 2: .16, .08 more), with 3.3 of 4 particles effective; rgg .49,
    code .77 in 44 calls. To try: --sweep 0.1 0.5 0.9, or other adapters by --lora.
"""
import argparse, csv, glob, io, json, math, os, pathlib, runpy, sys, time
import torch
if __name__ == "__main__": os.environ |= dict(MPLBACKEND="agg", TRANSFORMERS_VERBOSITY="error")
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from diffusers.utils import numpy_to_pil
from matplotlib.figure import Figure
from peft import get_peft_model_state_dict
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

MINI = pathlib.Path(__file__).resolve().parent / "mini"
PROMPTS = ["a photo of a cat", "a photo of a horse", "a photo of a monkey", "a photo of a fish"]
METHODS = dict(msdda="#D55E00", msdda_ct="#0072B2", soup="#CC79A7", rgg="0.3", code="0.6")
ADAPTERS = [str(MINI.parent / "adapters" / f"{name}*") for name in ("muted", "contrast")]

def parse_args(argv=None):
    parser = common_flags(__doc__, size=(2, 4, 3), quick=(1, 2, 1), paper=(4, 16, 9))
    add = parser.add_argument
    parser.set_defaults(reward=["saturation=-1", "contrast"])
    add("--lora", nargs=2, default=ADAPTERS, metavar="ADAPTER", help="of the two --reward, in their order: folder, "
        "file or hub id; a quoted 'pattern*' stands for one a training seed")
    add("--sweep", nargs="+", type=float, default=[0.5, 0.25, 0.75], metavar="W", help="weights of the first reward")
    add("--kl-weight", type=float, default=0.5, help="reward temperature of rgg, in standard deviations")
    add("--gamma", type=float, default=0.024, help="growth of the strength of rgg in a hundredth of the steps")
    args = parser.parse_args(argv)
    if len(args.reward) != 2 or not all(0 < w < 1 for w in args.sweep):
        parser.error("--reward and --sweep: two rewards, and weights between 0 and 1")
    return checked(parser, args)

def common_flags(doc, size, quick, paper):
    """The flags of every script of this folder -> parser. What the tuples of sizes count is each script's own."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", dest="size", action="store_const", const=quick, default=size, help="coarse, seconds")
    add("--paper", dest="size", action="store_const", const=paper, help="the paper's sizes; needs a GPU")
    add("--seed", type=int, default=0, help="prompt k has the seed SEED + 100 k, process j adds j million")
    add("--out", type=pathlib.Path, default=f"out/sd_{pathlib.Path(__file__).stem}", help="folder of results")
    add("--device", choices=["cpu", "cuda"][: 1 + torch.cuda.is_available()], default="cpu")
    add("--model", default=str(MINI), help="Stable Diffusion v1 or v2: folder, .safetensors file or hub id")
    add("--prompts", nargs="+", default=PROMPTS, help="or one .txt file with a prompt a line")
    add("--reward", nargs="+", default=["clip"], metavar="NAME[=WEIGHT]", help="jpeg saturation contrast clip aesthetic"
        " or my.py:function of images (n, 3, H, W) in [0, 1] and prompts -> (n,)")
    add("--clip", default=str(MINI / "clip_reward"), help="CLIP model of the reward, also yuvalkirstain/PickScore_v1")
    add("--aesthetic-head", default="sac+logos+ava1-l14-linearMSE.pth", help="LAION's file")
    add("--steps", type=int, default=10, help="of the sampler")
    add("--guidance", type=float, default=4.0, help="classifier-free; 1 is none")
    add("--chunk", type=int, help="images in one call, this sets the memory: 64 of the miniature, else 1")
    return parser

def checked(parser, args):
    """The flags, with prompts read from a file; what cannot work is said in one sentence before any work."""
    mini = pathlib.Path(args.model).resolve() == MINI
    args.chunk = args.chunk or (64 if mini else 1)
    for name, value in vars(args).items():
        if type(value) in (int, float) and not 0 < value + (name == "seed") < 1e9:
            parser.error(f"--{name.replace('_', '-')}: {value} is not between 0 and 1e9")
    if args.prompts[0].endswith(".txt"):
        text = loaded("--prompts", pathlib.Path(args.prompts[0]).read_text, "utf-8-sig")
        args.prompts = [*filter(None, map(str.strip, text.splitlines()))]
    args.weights = {name: loaded("--reward", float, w or 1) for name, _, w in (v.partition("=") for v in args.reward)}
    loaded("--out", lambda: (args.out.mkdir(parents=True, exist_ok=True), (args.out / ".writable").touch()))
    if not 0 < len({*args.prompts}) == len(args.prompts) or len(args.weights) < len(args.reward):
        parser.error("--prompts and --reward: there are none, or one stands there twice")
    if not mini and MINI in pathlib.Path(args.clip).resolve().parents and {"clip", "aesthetic"} & {*args.weights}:
        parser.error("--clip: the miniature's CLIP model knows emoji alone; name that of the reward")
    return args

# ---- the problem: rewards of images ----------------------------------------------------------------------------------
def make_rewards(args, device):
    """Every --reward: a function of images (n, 3, H, W) in [0, 1] and the numbers of their prompts (n,) -> (n,)."""
    def jpeg(images, number):  # compressibility: minus the kilobytes at quality 95, as in DDPO; no gradient
        files = numpy_to_pil(images.detach().permute(0, 2, 3, 1).cpu().numpy())
        return images.new_tensor([v.save(f := io.BytesIO(), "JPEG", quality=95) or -f.tell() / 1000 for v in files])
    def saturation(images, number):
        return ((images.amax(1) - images.amin(1)) / (images.amax(1) + 1e-8)).mean((1, 2))
    def contrast(images, number):  # mean distance of the luminance from its Gaussian blur
        gray = torch.einsum("nchw,c->nhw", images, images.new_tensor([0.2126, 0.7152, 0.0722]))[:, None]
        line = (-torch.arange(-2.0, 3.0, device=device) ** 2 / 2).softmax(0)
        blur = torch.outer(line, line)[None, None]
        return (gray - F.conv2d(F.pad(gray, [2] * 4, mode="reflect"), blur)).abs().mean((1, 2, 3))
    def clip(images, number):  # cosine of image and prompt; PickScore is a CLIP model too
        return (embed(images) * texts[number]).sum(1)
    def aesthetic(images, number):  # LAION's head: linear layers, nothing but dropout between them
        for i in (0, 2, 4, 6, 7):
            images = F.linear(images if i else embed(images), head[f"layers.{i}.weight"], head[f"layers.{i}.bias"])
        return images[:, 0]
    known = dict(jpeg=jpeg, saturation=saturation, contrast=contrast, clip=clip, aesthetic=aesthetic)
    if {"clip", "aesthetic"} & {*args.weights}:
        embed, texts = load_clip(args.clip, args.prompts, device)
    if "aesthetic" in args.weights:
        head = loaded(args.aesthetic_head, torch.load, args.aesthetic_head, map_location=device, weights_only=True)
    for path, _, name in (word.rpartition(":") for word in args.weights if ":" in word):  # your own
        own = loaded(f"{path}:{name}", lambda: runpy.run_path(path)[name])
        known[f"{path}:{name}"] = lambda images, number, own=own: own(images, [args.prompts[k] for k in number])
    for name in args.weights:
        if name not in known:
            raise Refused(f"--reward {name}: there are {', '.join(known)} and my.py:function")
    return [known[name] for name in args.weights]

def load_clip(folder, prompts, device):
    """CLIP model of a folder or hub id -> embed: images (n, 3, H, W) -> unit vectors (n, d); texts: of the prompts."""
    net = loaded(folder, CLIPModel.from_pretrained, folder).to(device).eval().requires_grad_(False)
    words = loaded(folder, CLIPTokenizer.from_pretrained, folder)(
        prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)
    mean, std = torch.tensor([OPENAI_CLIP_MEAN, OPENAI_CLIP_STD], device=device)[..., None, None]
    size = [net.config.vision_config.image_size] * 2
    def embed(images):  # CLIPImageProcessor has no gradient
        images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
        return net(input_ids=words[:1], pixel_values=(images - mean) / std).image_embeds
    return embed, net(input_ids=words, pixel_values=torch.zeros(1, 3, *size, device=device)).text_embeds

def make_gain(args, accelerator, model, x, each=False):
    """gain(latents (n, C, h, w), number () or (n,)) -> (n,), or of each reward (n, m): weighted rewards of their images
    above the mean of the base model's of the prompt, in their standard deviations; x (K, n, C, h, w): such images."""
    rewards, weights = make_rewards(args, accelerator.device), torch.tensor([*args.weights.values()])
    def values(x, number):
        parts = zip(x.split(args.chunk), torch.as_tensor(number).expand(len(x)).split(args.chunk))
        decoded = ((model.decode(part), number) for part, number in parts)
        return torch.cat([torch.stack([reward(*part) for reward in rewards], 1) for part in decoded])
    with torch.no_grad():
        base = [accelerator.gather(values(v, k)) for k, v in enumerate(x)]
    level, spread = (torch.stack([f(v, 0) for v in base]) for f in (torch.mean, torch.std))
    if not (spread > 0).all():
        raise Refused("--reward: the base model's images of a prompt all have the same one, or one is not finite")
    gains = lambda x, number: (values(x, number) - level[number]) / spread[number] * weights
    return gains if each else lambda x, number: gains(x, number).sum(1)

# ---- the method ------------------------------------------------------------------------------------------------------
def systematic(log_w):
    """Ancestors of P new particles in each group, (G, P) -> (G, P): P w_n copies of n, rounded without bias."""
    cdf = log_w.double().softmax(1).cumsum(1)
    u = (torch.rand(len(cdf), 1).double() + torch.arange(cdf.shape[1])) / cdf.shape[1]
    return torch.searchsorted(cdf, u * cdf[:, -1:], right=True).clamp(max=cdf.shape[1] - 1)

def smc(step, state, steps, ess=0.5):
    """Sequential Monte Carlo in G independent groups of P particles -> state, log_w (G, P).
    state: all that is known of each particle, tensors (G, P, ...); its log_twist (G, P) forecasts the final log weight.
    step(state, i) -> the next state, log_ratio (G, P): log p - log q of a draw from q, or any other weight of the step.
    exp(log_w) averages to Z over groups, without bias for any P and twist, if the last twist is exact, no forecast."""
    log_w = state["log_twist"]
    groups, slots = torch.arange(len(log_w))[:, None], torch.arange(log_w.shape[1])
    for i in range(steps):
        due = 1 / log_w.softmax(1).square().sum(1, keepdim=True) < ess * len(slots)  # (G, 1): low effective size
        ancestors = torch.where(due, systematic(log_w), slots)
        log_w = torch.where(due, log_w.logsumexp(1, keepdim=True) - math.log(len(slots)), log_w)  # keep the mean, Z
        state = {name: value[groups, ancestors] for name, value in state.items()}  # what is known moves along
        before = state["log_twist"]
        state, log_ratio = step(state, i)
        log_w = log_w - before + log_ratio + state["log_twist"]
    return state, log_w

def kernel(x, eps, a, b):
    """Mean and standard deviation of p(x_{t-1} | x_t = x), signal powers a and b: DDIM with eta = 1, which is DDPM."""
    sigma = ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5
    return b**0.5 * forecast(x, eps, a) + max(1 - b - sigma**2, 0) ** 0.5 * eps, sigma

def forecast(x, eps, abar):
    """x0_hat, Tweedie's mean of x_0 given x_t = x."""
    return (x - (1 - abar) ** 0.5 * eps) / abar**0.5

def merge(mean, sigma, weights):
    """prod_i N(mean_i, sigma^2)^w_i = C N(merged, sigma^2), sum_i w_i = 1: mean (m, G, P, ...) -> merged, log C (G, P).
    For one sigma the merge is the average of the means; in general precisions add, as in toy/msdda.py."""
    w = mean.new_tensor(weights)
    merged = torch.einsum("m,m...->...", w, mean)
    return merged, -torch.einsum("m,m...->...", w, (mean - merged) ** 2).flatten(2).sum(2) / sigma**2 / 2

def adapted(model, scales, x, i, number, chunk):
    """The noise in x (G, P, C, h, w) at step i, of prompt number, () or (G P,), with LoRAs on: scales {name: scale}."""
    if scales:
        model.unet.enable_adapters()
        model.unet.set_adapters([*scales], [*scales.values()])
    elif model.unet._hf_peft_config_loaded:
        model.unet.disable_adapters()
    parts = zip(x.flatten(0, 1).split(chunk), torch.as_tensor(number).expand(x.shape[:2].numel()).split(chunk))
    return torch.cat([model.eps(part, i, k) for part, k in parts]).view_as(x)

@torch.no_grad()
def msdda(model, asked, weights, x, corrected=False, twist=None):
    """From noise x (G, P, C, h, w) -> x, log_w (G, P). asked: m functions (x, i) -> eps, a kernel each.
    corrected: C_t in log_w. twist(x, i): log twist (G, P) at level i, for CoDe."""
    def step(state, i):
        eps = torch.stack([ask(state["x"], i) for ask in asked])
        means, sigma = kernel(state["x"], eps, model.abar[i], model.abar[i + 1])
        mean, log_c = merge(means, sigma, weights)
        x = mean + sigma * torch.randn_like(mean)
        return dict(x=x, log_twist=twist(x, i + 1) if twist else 0 * log_c), log_c * corrected
    state, log_w = smc(step, dict(x=x, log_twist=torch.zeros(x.shape[:2])), len(model.times))
    return state["x"], log_w

def sample(args, model, gains, names, weights, method, k):
    """Prompt k by a method at weights (2,) of the rewards -> x, log_w, gain (G, P), and {quantity: value}: each gain,
    calls of the UNet for an image. names: of the two adapters; gains: of latents and prompt numbers."""
    (groups, particles), calls = args.size[:2], []
    def ask(scales):
        return lambda x, i: calls.append(x.shape[1]) or adapted(model, scales, x, i, k, args.chunk)
    def rewards(x):  # latents (G, P, C, h, w) -> both, and their weighted sum (3, G, P)
        both = gains(x.flatten(0, 1), k).T.unflatten(1, x.shape[:2])
        return torch.stack([*both, weights[0] * both[0] + weights[1] * both[1]])
    def guided(x, i):  # RGG: the mean moves along the gradient in x_t, of which the UNet is taken to be independent
        a, b, eps = model.abar[i], model.abar[i + 1], base(x, i)
        with torch.enable_grad():
            x0_hat = forecast(x, eps, a).requires_grad_()
            grad = torch.autograd.grad(rewards(x0_hat)[2].sum(), x0_hat)[0] / a**0.5 / args.kl_weight
        slope, sigma = kernel(0, 1, a, b)  # of the mean in eps
        return eps + min((1 + args.gamma) ** (100 * i / args.steps) - 1, 1) * sigma**2 / slope * grad
    def best(x, i):  # CoDe: after every 5 steps the particle of the best forecast takes all places of its group
        if i % 5:
            return torch.zeros(x.shape[:2])
        return 1e4 * rewards(x if i == args.steps else forecast(x, base(x, i), model.abar[i]))[2]
    base, alone = ask({}), [ask({name: 1.0}) for name in names]
    rules = dict(soup=[ask(dict(zip(names, weights)))], rgg=[guided], code=[base], base=[base])
    rules |= {word: [f] for word, f in zip(reward_words(args), alone)}
    asked = rules.get(method, alone)
    torch.manual_seed(args.seed + 100 * k)  # the same noise for all, until smc resamples
    x = torch.randn(groups, particles, *model.shape)
    x, log_w = msdda(model, asked, weights if len(asked) > 1 else [1.0], x, method == "msdda_ct",
                     best if method == "code" else None)
    with torch.no_grad():
        r, w = rewards(x), log_w.softmax(1)
    values = dict(zip([f"gain_{word}" for word in reward_words(args)] + ["weighted_gain"], (r * w).sum(2).mean(1)))
    values["calls"] = sum(calls) / (1 if method == "code" else particles)
    if method == "msdda_ct":
        values["log_z"] = log_w.logsumexp(1).mean() - math.log(particles)
        values["effective_size"] = (1 / w.square().sum(1)).mean()
    return dict(x=x, log_w=log_w, gain=r[2]), values

# ---- the model -------------------------------------------------------------------------------------------------------
class Refused(ValueError):
    """What a user can mend, said in one sentence."""

def loaded(source, load, *args, **options):
    """load(...), where the library's own first line about a file, a folder or a hub id becomes the sentence."""
    try:
        return load(*args, **options)
    except Exception as error:  # every library raises its own
        raise Refused(f"{source}: {type(error).__name__}: {error}".splitlines()[0]) from error

class Diffusion:
    """Stable Diffusion v1 or v2, frozen, with its prompts, which `number` counts, and its sampling steps.
    shape (C, h, w) of latents; times (T,) and abar (T + 1,) from noise to data."""
    def __init__(self, args, device):
        names = [path.name for path in pathlib.Path(args.model).glob("unet/*model*.[sb]*")]
        half = dict(variant="fp16") if names and all(".fp16" in name for name in names) else {}
        single = args.model.endswith(".safetensors")
        load = StableDiffusionPipeline.from_single_file if single else StableDiffusionPipeline.from_pretrained
        pipe = loaded(args.model, load, args.model, safety_checker=None, feature_extractor=None, **half)
        self.pipe, self.unet, config, schedule = pipe, pipe.unet, pipe.unet.config, pipe.scheduler.config
        self.guidance, self.velocity = args.guidance, schedule.prediction_type == "v_prediction"
        abar = getattr(pipe.scheduler, "alphas_cumprod", torch.zeros(1)).double().cpu()
        for fits, what in (
                (config.in_channels == pipe.vae.config.latent_channels, "a UNet of latents alone"),
                (not (config.time_cond_proj_dim or config.addition_embed_type), "a UNet of time and text alone"),
                (isinstance(config.sample_size, int), "square images"),
                (self.velocity or schedule.prediction_type == "epsilon", "a prediction of noise or velocity"),
                (0 < abar.min() and abar.max() < 1, "signal powers between 0 and 1"),
                (args.steps < len(abar), f"{args.steps + 1} levels, take fewer --steps")):
            if not fits:
                raise Refused(f"--model {args.model}: this needs Stable Diffusion v1 or v2, with {what}")
        loaded(args.model, pipe.to, device)
        [part.requires_grad_(False) for part in (pipe.unet, pipe.vae, pipe.text_encoder)]
        # levels even in log SNR: a step that multiplies it by more than the others dominates the KL of a path
        snr, order = (abar / (1 - abar)).log(), torch.arange(args.steps + 1).flip(0)
        wanted = torch.linspace(snr[-1].item(), snr[0].item(), args.steps + 1, dtype=torch.float64)
        times = (snr[:, None] - wanted).abs().argmin(0).maximum(order)
        self.times, self.abar = times[:-1].to(device), abar[times].tolist()
        self.shape = (config.in_channels, config.sample_size, config.sample_size)
        with torch.no_grad():
            self.cond, self.uncond = pipe.encode_prompt(args.prompts, device, 1, True)
    def eps(self, x, i, number):
        """The noise in latents x (n, C, h, w) at step i, () or (n,), for prompts number, () or (n,); float32."""
        number, t = (torch.as_tensor(v, device=x.device).expand(len(x)) for v in (number, self.times[i]))
        texts = torch.cat([self.cond[number], self.uncond[number]])
        both = self.unet(x.repeat(2, 1, 1, 1).to(texts.dtype), t.repeat(2), texts).sample.to(x.dtype)
        out = both[len(x) :] + self.guidance * (both[: len(x)] - both[len(x) :])  # classifier-free
        if self.velocity:
            abar = torch.tensor(self.abar, device=x.device)[i].view(-1, 1, 1, 1)
            out = abar.sqrt() * out + (1 - abar).sqrt() * x
        return out
    def decode(self, x):
        """Latents (n, C, h, w) -> images (n, 3, H, W) in [0, 1], float32, with a gradient."""
        x = (x / self.pipe.vae.config.scaling_factor).to(self.pipe.vae.dtype)
        return (self.pipe.vae.decode(x).sample.float() / 2 + 0.5).clamp(0, 1)

def load_adapter(model, source, name):
    """Add frozen LoRA weights of a folder, a file (diffusers or kohya) or a hub id to the UNet: all of them or none."""
    state, alphas = loaded(source, model.pipe.lora_state_dict, source)
    if not state or any(key.startswith("text_encoder") for key in state):
        raise Refused(f"{source} is empty, or changes the text encoder too, and with it the prompts of the base model")
    loaded(source, model.pipe.load_lora_into_unet, state, alphas, model.unet, adapter_name=name)
    found, wanted = get_peft_model_state_dict(model.unet, adapter_name=name), [k for k in state if "alpha" not in k]
    if len(found) != len(wanted) or not all(value.isfinite().all() for value in state.values()):
        raise Refused(f"{source}: of {len(wanted)} tensors {len(found)} fit this UNet, or one is not finite")
    model.unet.requires_grad_(False)

# ---- files, figure, main ---------------------------------------------------------------------------------------------
@torch.no_grad()
def save_samples(args, model, found):
    """found {method: x (K, G, P, C, h, w), gain and log_w (K, G, P)} -> latents.pt; images/ with one PNG a group, drawn
    by weight, in the table images.csv; returned: {method: images (K, G, 3, H, W)}."""
    torch.save({name: {k: v.cpu() for k, v in f.items()} for name, f in found.items()}, args.out / "latents.pt")
    (args.out / "images").mkdir(exist_ok=True)
    sheets, lines = {}, [("file", "prompt", "method", "seed", "gain", "weight")]
    for method, f in found.items():
        w, sheets[method] = f["log_w"].softmax(2), []
        for k, prompt in enumerate(args.prompts):
            pick = (torch.arange(w.shape[1]), w[k].multinomial(1)[:, 0])
            sheets[method].append(torch.cat([model.decode(x) for x in f["x"][k][pick].split(args.chunk)]).cpu())
            for g, image in enumerate(numpy_to_pil(sheets[method][k].permute(0, 2, 3, 1).numpy())):
                values = (args.seed + 100 * k, f["gain"][k][pick][g].item(), w[k][pick][g].item())
                lines.append((f"images/{k}_{method}_{g}.png", prompt, method, *values))
                image.save(args.out / lines[-1][0])
    with open(args.out / "images.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)
    return {method: torch.stack(images) for method, images in sheets.items()}

def draw_images(ax, images, label):
    """A line of images (K, G, 3, H, W): four of each of the first four prompts."""
    parts = [F.pad(torch.cat([*F.pad(v, [1] * 4, value=1.0)], 2), [0, 4, 0, 0], value=1.0) for v in images[:4, :4]]
    ax.imshow(torch.cat(parts, 2).permute(1, 2, 0))
    ax.set(xticks=[], yticks=[], frame_on=False)
    ax.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)

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

def reward_words(args):
    """Names of the adapters, by their rewards: less_saturation where the weight is negative."""
    return ["less_" * (weight < 0) + name.rpartition(":")[2] for name, weight in args.weights.items()]

def draw(args, rows, sheets):
    """Lines of images, merges at the first weights; both gains of every method by weight, and two standard errors."""
    figure = Figure(figsize=(9, 0.6 * len(sheets) + 3.6), layout="constrained")
    axes = figure.subplot_mosaic([[m] for m in sheets] + [["front"]], height_ratios=[0.6] * len(sheets) + [3.4])
    for method, images in sheets.items():
        draw_images(axes[method], images, method)
    ax, values, words = axes["front"], {r[:3]: r[3:5] for r in rows}, reward_words(args)
    problems = ["alone", *(f"weight_{w:g}" for w in sorted(args.sweep))]
    for method in ["base", *words, *METHODS]:
        found = [p for p in problems if (p, method, "calls") in values]
        (x, dx), (y, dy) = (zip(*(values[p, method, f"gain_{word}"] for p in found)) for word in words)
        errors = ([0 if v is None else 2 * v for v in d] for d in (dy, dx))
        ax.errorbar(x, y, *errors, "o-", c=METHODS.get(method, "k"), lw=0.8, ms=5,
                    label="_" * (method not in METHODS) + method)  # an underscore hides it
        if method not in METHODS:
            ax.annotate(method, (x[0], y[0]), (5, 5), textcoords="offset points", fontsize=9)
    ax.set(xlabel=f"gain of {words[0]}", ylabel=f"gain of {words[1]}", xmargin=0.15)
    ax.legend(fontsize=8)
    return figure

def main(args):
    started, found, sheets, accelerator = time.time(), [], {}, Accelerator(cpu=args.device == "cpu")
    torch.set_default_device(accelerator.device)
    model, words = Diffusion(args, accelerator.device), reward_words(args)
    print("COARSE: numbers mean nothing" if args.size[2] < 3 else "gain: reward in standard deviations of the base "
          "model's; se: over training seeds (rgg and code have none); change: from msdda; calls: of the UNet")
    base, prompts = [], range(len(args.prompts))
    for k in prompts:
        torch.manual_seed(args.seed + 100 * k)
        noise, ask = torch.randn(1, 64, *model.shape), lambda x, i: adapted(model, {}, x, i, k, args.chunk)
        base.append(msdda(model, [ask], [1.0], noise)[0][0])
    gains = make_gain(args, accelerator, model, base, each=True)
    folders = [sorted(glob.glob(pattern)) or [pattern] for pattern in args.lora]
    for seed, pair in enumerate(list(zip(*folders))[: args.size[2]]):
        names = [f"{word}_{seed}" for word in words]
        for folder, name in zip(pair, names):
            load_adapter(model, folder, name)
        jobs = [("alone", [0.5, 0.5], method) for method in ["base", *words]]
        jobs += [(f"weight_{w:g}", [w, 1 - w], method) for w in args.sweep for method in METHODS
                 if not seed or method not in ("rgg", "code")]  # which have no adapters
        rows, keep = {}, {}
        for problem, weights, method in jobs:
            outs, values = zip(*(sample(args, model, gains, names, weights, method, k) for k in prompts))
            values = {key: sum(float(v[key]) for v in values) / len(values) for key in values[0]}
            if problem != "alone" and method != "msdda":
                values["change"] = values["weighted_gain"] - rows[problem, "msdda", "weighted_gain"]
            rows |= {(problem, method, key): v for key, v in values.items()}
            keep.setdefault(method, {key: torch.stack([out[key] for out in outs]) for key in outs[0]})
        found.append(rows)
        sheets = sheets or save_samples(args, model, keep)
    table = {key: torch.tensor([rows[key] for rows in found if key in rows], dtype=torch.float64) for key in found[0]}
    rows = [(*key, v.mean(), v.std() / len(v) ** 0.5 if len(v) > 1 else None, None) for key, v in table.items()]
    report(args, rows, started, lambda: draw(args, rows, sheets))

if __name__ == "__main__":
    try:
        main(parse_args())
    except (Refused, torch.OutOfMemoryError) as e:  # what a user can mend, in one sentence
        sys.exit(print("out of memory: lower --chunk" if isinstance(e, RuntimeError) else e, file=sys.stderr) or 2)
