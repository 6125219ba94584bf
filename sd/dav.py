"""Align Stable Diffusion by expectation maximisation: a search finds rewarded sampling paths, an adapter learns them.
Paper: Lee et al., "Diffusion Alignment as Variational Expectation-Maximization" (DAV), ICLR 2026, arXiv 2510.00502.
figure.png: images (its Fig. 3), reward (Fig. 2) and ELBO (Fig. 4) by round; compare.py has the rest of Fig. 2.
Run    python sd/dav.py                       miniature model, CLIP score of the prompt; 7 CPU minutes, --quick: 60 s
       python sd/dav.py --methods dav              or --resume, --rounds 3, --reward jpeg --children 4
       python sd/dav.py --device cuda --paper --model stable-diffusion-v1-5/stable-diffusion-v1-5 --reward aesthetic
           --clip openai/clip-vit-large-patch14 --chunk 1              24 GB; `accelerate launch`: several
The adapter of each method is in out/sd_dav/<method>; diffusers loads it: pipe.load_lora_weights(that folder).
Read first: search, dav_update. Skip: Diffusion, make_rewards, save_samples, draw, checked, report.
Notation (here -> paper): kl_weight -> alpha, against the gain; kl -> lambda; children -> M; discount -> gamma
    log_twist -> Q/alpha   gain(x0_hat) / kl_weight: x0_hat is the forecast E[x_0 | x_t]
Algorithm, a round
    1. draw children of each state from the kernel shifted along the gradient of the twist; keep one     `search`
    2. ours: D_t, what shift and choice change in the forecasts from t on, against the same noise without them, gives
       the target eps - sqrt(abar / (1 - abar)) D_t: none, where nothing is found; published: the step as drawn
    3. pull the adapter's noise at the states towards the target, in nats, plus kl KL(p, base)       `dav_update`
    4. the adapter is the next round's p. The search on the last one is `posterior`
dav_published has the paper's M-step, -log p of one drawn child of two, but our --max-shift, --lr and --discount 1.
What you should see (seed 0): dav gains 2.83 (se .10) for a KL of 75 nats and its posterior 3.57 (.13), where the search
    on the base model has 1.44 (.19); dav_kl 1.70 (.07) for 24, dav_children_2 3.36 (.11) for 124, dav_published 1.49
    (.09) for 156. Gain is paid for in KL. To try: --max-shift 1 --lr 1e-3 --rounds 9, smaller rounds.
"""
import argparse, csv, io, json, math, os, pathlib, runpy, sys, time
import torch
if __name__ == "__main__": os.environ |= dict(MPLBACKEND="agg", TRANSFORMERS_VERBOSITY="error")
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from diffusers.utils import numpy_to_pil
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch.nn import functional as F
from tqdm import trange
from transformers import CLIPModel, CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

MINI = pathlib.Path(__file__).resolve().parent / "mini"
PROMPTS = ["a photo of a cat", "a photo of a horse", "a photo of a monkey", "a photo of a fish"]
METHODS = dict(dav={}, dav_kl=dict(kl=True), dav_children_2=dict(children=2),
               dav_published=dict(children=2, published=True))

def parse_args(argv=None):
    parser = common_flags(__doc__, size=(7, 24, 32), quick=(1, 4, 4), paper=(100, 64, 64))
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--rounds", type=int, help="of search and M-step, instead of 7")
    add("--kl-weight", type=float, default=0.1, help="reward temperature of the search, in standard deviations")
    add("--kl", type=float, default=0.2, help="lambda of dav_kl")
    add("--children", type=int, default=1, help="of dav and dav_kl; a reward without a gradient needs several")
    add("--discount", type=float, default=1.0, help="of a forecast, by step; the paper's is 0.9")
    add("--max-shift", type=float, default=2.0, help="cap of the guidance, in standard deviations of the kernel")
    add("--passes", type=int, default=2, help="of the M-step over the steps of the paths")
    add("--rank", type=int, default=8, help="of the adapter")
    add("--lr", type=float, default=2e-3)
    add("--resume", action="store_true", help="go on with an interrupted run")
    return checked(parser, parser.parse_args(argv))

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

@torch.no_grad()
def search(model, gain, number, args, children=1, published=False):
    """E-step: a path of p exp(gain / kl_weight) for each prompt, number (n,) -> x (n, 1, C, h, w), gain, log_w (n, 1);
    learn: states and the noise to predict there (steps, n, C, h, w). A path keeps one of its children and never meets
    another: groups of one particle, where log_w counts in the ELBO alone."""
    steps, pairs, trail = args.steps, torch.arange(len(number))[:, None], []
    def look(x, i, rewarded=True):  # (n, M, C, h, w): a state of each path, or its M children
        found, guided, number_of = [], rewarded and i < steps, number.repeat_interleave(x.shape[1])
        for x_t, k in zip(x.flatten(0, 1).split(args.chunk), number_of.split(args.chunk)):
            with torch.set_grad_enabled(guided):
                x_t = x_t.requires_grad_(guided)
                eps = model.eps(x_t, i, k) if i < steps else torch.zeros_like(x_t)
                x0_hat = forecast(x_t, eps, model.abar[i]) if i < steps else x_t
                twist = gain(x0_hat, k) * args.discount ** (steps - i) / args.kl_weight if rewarded else eps[:, 0, 0, 0]
                if guided and children == 1 and not twist.requires_grad:
                    raise Refused("--reward: this one has no gradient, and the search needs several --children")
                grad = torch.autograd.grad(twist.sum(), x_t)[0] if twist.requires_grad else torch.zeros_like(x_t)
            found.append([v.detach() for v in (x_t, eps, x0_hat, grad, twist)])
        found = (torch.cat(v).view(*x.shape[:2], *v[0].shape[1:]) for v in zip(*found))
        return dict(zip(("x", "eps", "x0_hat", "grad", "log_twist"), found))
    def step(state, i):
        mean, sigma = kernel(state["x"], state["eps"], model.abar[i], model.abar[i + 1])
        shift, z = sigma * state["grad"], torch.randn(len(number), children, *model.shape)
        length = shift.flatten(2).norm(dim=2)[..., None, None, None].clamp(min=1e-30)
        shift = shift * (args.max_shift / length).clamp(max=1)
        child = look(mean + sigma * (shift + z), i + 1)
        log_v = child["log_twist"] - (shift * (z + shift / 2)).flatten(2).sum(2)  # twist x p / q, (n, M)
        share = log_v.softmax(1)
        chosen = share.multinomial(1)
        new = {name: value[pairs, chosen] for name, value in child.items()}
        if published:  # the noise whose kernel has its mean at x_{t-1}
            change = (new["x"] - mean) / kernel(0, 1, model.abar[i], model.abar[i + 1])[0]
        else:  # of the forecast, by shift and choice: that of the same z without them is subtracted
            found = (share[..., None, None, None] * child["x0_hat"]).sum(1, keepdim=True)
            change = found - look(mean + sigma * z, i + 1, rewarded=False)["x0_hat"].mean(1, keepdim=True)
        trail.append((state["x"], state["eps"], change))
        return new, log_v.logsumexp(1, keepdim=True) - math.log(children) - new["log_twist"]
    state, log_w = smc(step, look(torch.randn(len(number), 1, *model.shape), 0), steps)
    x, eps, change = (torch.stack(v)[:, :, 0] for v in zip(*trail))
    if not published:  # all changes in the rest of the path, as noise
        snr = torch.tensor([a / (1 - a) for a in model.abar[:-1]])[:, None, None, None, None]
        change = -(snr**0.5) * change.flip(0).cumsum(0).flip(0)
    return dict(x=state["x"], gain=state["log_twist"] * args.kl_weight, log_w=log_w, learn=(x, eps + change))

def dav_update(args, model, gain, step, paths, children, published, kl):
    """A round: search, then the M-step, passes over the steps, all paths at once -> mean gain found, ELBO and its se.
    Descends |kernel's mean - that of the target|^2 / (2 sigma^2) + kl KL(p, base); published: the first is -log p."""
    number = torch.arange(paths) % len(args.prompts)
    out = search(model, gain, number, args, children, published)
    for i in torch.cat([torch.randperm(args.steps) for _ in range(args.passes)]).tolist():
        mean, sigma = kernel(0, 1, model.abar[i], model.abar[i + 1])
        for x, target, k in zip(*(v.split(args.chunk) for v in (out["learn"][0][i], out["learn"][1][i], number))):
            eps = model.eps(x, i, k)
            loss = (mean / sigma) ** 2 * (eps - target).flatten(1).square().sum(1) / 2
            loss = loss + args.kl * step_kl(model, x, i, k, eps) if kl else loss
            (loss.sum() / paths).backward()
        step()
    return out["gain"].mean().item(), out["log_w"].mean().item(), out["log_w"].std().item() / paths**0.5

def step_kl(model, x, i, number, eps):
    """KL of the step at x (n, ...) with noise eps from the base model's -> (n,), nats: equal variances, means apart."""
    model.unet.disable_adapters()
    apart = eps - model.eps(x, i, number)
    model.unet.enable_adapters()
    mean, sigma = kernel(0, 1, model.abar[i], model.abar[i + 1])
    return (mean / sigma) ** 2 * apart.flatten(1).square().sum(1) / 2

def train(args, accelerator, model, name, rounds, update):
    """A fresh adapter; `rounds` times update(step, trace), which back-propagates and calls step() -> trace, what these
    return. The adapter is left on, and saved in args.out/name for pipe.load_lora_weights."""
    unet, file = model.unet, args.out / f"{name}_{accelerator.process_index}.pt"
    unet.delete_adapters([*getattr(unet, "peft_config", {})])
    torch.manual_seed(args.seed)
    unet.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, init_lora_weights="gaussian",
                                target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    weights = [p for p in unet.parameters() if p.requires_grad]
    optimizer, trace = torch.optim.Adam(weights, args.lr, betas=(0.9, 0.99)), []
    flags = str(vars(args) | dict(resume=False))
    if args.resume and file.exists():
        saved = torch.load(file, map_location=accelerator.device, weights_only=True)
        if saved["flags"] != flags:
            raise Refused(f"--resume: {file} is of a run with other flags")
        trace = saved["trace"]
        set_peft_model_state_dict(unet, saved["adapter"])
        optimizer.load_state_dict(saved["optimizer"])
    def step():
        for p in weights:
            p.grad = accelerator.reduce(p.grad, "mean")
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for i in trange(len(trace), rounds, desc=name, disable=not accelerator.is_main_process):
        torch.manual_seed(args.seed + 1000 * (i + 1) + 10**6 * accelerator.process_index)  # the same after --resume
        trace.append(update(step, trace))
        torch.save(dict(flags=flags, trace=trace, adapter=get_peft_model_state_dict(unet),
                        optimizer=optimizer.state_dict()), file.with_suffix(".part"))
        file.with_suffix(".part").replace(file)
    if accelerator.is_main_process:
        StableDiffusionPipeline.save_lora_weights(args.out / name, get_peft_model_state_dict(unet))
    return trace

@torch.no_grad()
def as_groups(accelerator, gain, x, kl):
    """Latents x (K, n, C, h, w), KL (K, n) of this process -> x, gain, kl, log_w of all: n groups of one particle."""
    out = dict(x=x, kl=kl, gain=torch.stack([gain(v, k) for k, v in enumerate(x)]), log_w=0 * kl)
    return {key: torch.stack([accelerator.gather(v) for v in value])[:, :, None] for key, value in out.items()}

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

@torch.no_grad()
def sample_prompts(args, accelerator, model, n, step_kl=None):
    """n images of every prompt in this process, of noise that is the same at every call -> latents (K, n, C, h, w), and
    the KL of their paths from the base model's (K, n), nats, where step_kl is given."""
    done = []
    for k in trange(len(args.prompts), desc="samples", disable=not accelerator.is_main_process):
        torch.manual_seed(args.seed + 100 * k + 10**6 * accelerator.process_index)
        for z in torch.randn(args.steps + 1, n, *model.shape).split(args.chunk, 1):
            x, kl = z[0], torch.zeros(len(z[0]))
            for i, (a, b) in enumerate(zip(model.abar, model.abar[1:])):
                eps = model.eps(x, i, k)
                kl += step_kl(model, x, i, k, eps) if step_kl else 0
                mean, sigma = kernel(x, eps, a, b)
                x = mean + sigma * z[i + 1]
            done.append((x, kl))
    return [torch.cat(v).unflatten(0, (len(args.prompts), n)) for v in zip(*done)]

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

def draw(found, sheets, traces):
    """Lines of images, one a method; gain and ELBO by round; the gain of each last model against its KL."""
    figure = Figure(figsize=(9, 0.6 * len(sheets) + 3), layout="constrained")
    axes = figure.subplot_mosaic([[m] * 3 for m in sheets] + [["gain", "elbo", "kl"]],
                                 height_ratios=[0.6] * len(sheets) + [2.2])
    for method, images in sheets.items():
        draw_images(axes[method], images, method)
    for method, trace in traces.items():
        gains, elbos, _ = zip(*trace)
        color = axes["gain"].plot(range(1, len(trace) + 1), gains, ".-", label=method)[0].get_color()
        axes["elbo"].plot(range(1, len(trace) + 1), elbos, ".-", color=color)
        axes["kl"].plot(found[method]["kl"].mean().cpu(), found[method]["gain"].mean().cpu(), "o", color=color)
    axes["kl"].plot(0, 0, "kx")
    for name, title in dict(gain="gain of the paths found,\nby round", elbo="ELBO, nats,\nby round",
                            kl="gain of base (x) and last models\nagainst the KL of their paths, nats").items():
        axes[name].set_title(title, fontsize=9)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    return figure

def main(args):
    started, accelerator, (rounds, paths, images) = time.time(), Accelerator(cpu=args.device == "cpu"), args.size
    model, traces, rows = Diffusion(args, accelerator.device), {}, []
    accelerator.print("COARSE: numbers mean nothing" if paths < 9 else "gain: reward in standard deviations of the "
                      "base model's, adapters: above its images of the same noise; se: over images; kl, elbo: nats")
    torch.set_default_device(accelerator.device)
    base = sample_prompts(args, accelerator, model, images)
    gain = make_gain(args, accelerator, model, base[0])
    def searched():  # images of every prompt, by the search on the model as it is now
        outs = []
        for k in trange(len(args.prompts), desc="search", disable=not accelerator.is_main_process):
            torch.manual_seed(args.seed + 100 * k + 10**6 * accelerator.process_index)
            outs.append(search(model, gain, torch.full((max(images // 4, 2),), k), args, args.children))
        return {key: torch.stack([accelerator.gather(out[key]) for out in outs]) for key in ("x", "gain", "log_w")}
    found = dict(base=as_groups(accelerator, gain, *base), search=searched())
    for name in args.methods:
        options = dict(children=args.children, published=False, kl=False) | METHODS[name]
        traces[name] = train(args, accelerator, model, name, args.rounds or rounds,
                             lambda step, _: dav_update(args, model, gain, step, paths, **options))
        found[name] = as_groups(accelerator, gain, *sample_prompts(args, accelerator, model, images, step_kl))
        found |= dict(posterior=searched()) if name == "dav" else {}
    for name, out in list(found.items())[1:]:
        r, z = out["gain"] - (found["base"]["gain"] if name in traces else 0), out["log_w"]
        rows.append(("all", name, "gain", r.mean(), (r.var(1).mean() / r.numel()).sqrt(), None))
        if name in traces:
            rows += [("all", name, "kl", out["kl"].mean(), None, None),
                     ("all", name, "elbo_first_round", *traces[name][0][1:], None),
                     ("all", name, "elbo_last_round", *traces[name][-1][1:], None)]
        else:
            rows.append(("all", name, "elbo", z.mean(), z.std() / z.numel() ** 0.5, None))
    if accelerator.is_main_process:
        report(args, rows, started, lambda: draw(found, save_samples(args, model, found), traces))

if __name__ == "__main__":
    try:
        main(parse_args())
    except (Refused, torch.OutOfMemoryError) as e:  # what a user can mend, in one sentence
        sys.exit(print("out of memory: lower --chunk" if isinstance(e, RuntimeError) else e, file=sys.stderr) or 2)
