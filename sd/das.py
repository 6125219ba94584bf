"""Sample images from p(x) exp(r(x) / kl_weight) / Z at test time: sequential Monte Carlo (SMC) with Stable Diffusion.
Paper: Kim, Kim and Park, "Test-time Alignment of Diffusion Models without Reward Over-optimization" (DAS), ICLR 2025,
arXiv 2501.05803. figure.png: images and rewards of its Fig. 2; compare.py measures what nobody optimised.
Run    python sd/das.py                        miniature model, CLIP score of the prompt; 3 CPU minutes, --quick: 20 s
       python sd/das.py --reward jpeg          no gradient: SMC without guidance
       python sd/das.py --device cuda --dtype bfloat16 --paper --model stable-diffusion-v1-5/stable-diffusion-v1-5
           --reward aesthetic --clip openai/clip-vit-large-patch14 --chunk 2      24 GB; `accelerate launch`: several
Read first: smc, das. Skip: checked, make_rewards, Diffusion, save_samples, draw, report. Your own reward: --reward.
Notation (here -> paper); G groups of P interacting particles, one image each: x (G, P, C, h, w) latents, log_w (G, P)
    kl_weight -> alpha     reward temperature, against the gain: the reward in standard deviations of the base model
    abar -> abar_t         signal power: x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps
    temper -> lambda_t     from 0 (noise) to 1 (image): the log twist is temper r(x0_hat) / kl_weight
Algorithm, at every step from noise to image
    1. look: the forecast x0_hat = E[x_0 | x_t], the reward of its image, the gradient through decoder and UNet
    2. smc: weight by the twist; resample the groups whose effective sample size is low: all that is known moves along
    3. step: draw x_{t-1} from q, the DDIM kernel p with its noise shifted by sigma times the tempered gradient
    4. smc: divide the old twist out, multiply by the new one and p / q. The last twist is the reward of the image
Ours: the shift is capped (p / q knows: no bias) and the image drawn by weight; das_published has neither.
What you should see (seed 0): DAS gains 1.53 (se .10), the target 1.51, importance 1.27 (.08), best of 16 1.68 (.08),
    guidance alone .47 (.10), das_published 1.95 (.12). To try: --kl-weight 0.1, where importance cannot follow.
"""
import argparse, csv, io, json, math, os, pathlib, runpy, sys, time
import torch
if __name__ == "__main__": os.environ |= dict(MPLBACKEND="agg", TRANSFORMERS_VERBOSITY="error")
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from diffusers.utils import numpy_to_pil
from matplotlib.figure import Figure
from peft import get_peft_model_state_dict
from torch.nn import functional as F
from tqdm import trange
from transformers import CLIPModel, CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

MINI = pathlib.Path(__file__).resolve().parent / "mini"
PROMPTS = ["a photo of a cat", "a photo of a horse", "a photo of a monkey", "a photo of a fish"]
METHODS = ["importance", "best_of_n", "guidance", "das", "das_published"]

def parse_args(argv=None):
    parser = common_flags(__doc__, size=(8, 16), quick=(2, 4), paper=(8, 16))
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS, default=METHODS, help="beside the base model")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the networks")
    add("--lora", help="adapter of the base model: folder, file (diffusers or kohya) or hub id")
    add("--kl-weight", type=float, default=0.5, help="reward temperature, in standard deviations")
    add("--gamma", type=float, default=0.008, help="growth of the temper in a hundredth of the steps")
    add("--max-shift", type=float, default=0.5, help="cap of the guidance, in standard deviations of the kernel")
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

def das(model, gain, number, groups, particles, args, max_shift):
    """Weighted particles of p exp(gain / kl_weight) for one prompt -> x (G, P, C, h, w), gain and log_w (G, P).
    One particle is guidance alone; a reward without a gradient makes it the bootstrap filter."""
    steps = len(model.times)
    temper = [min((1 + args.gamma) ** (100 * i / steps) - 1, 1) for i in range(steps)] + [1]
    def look(x, i):
        parts = []
        for part in x.flatten(0, 1).split(args.chunk):
            with torch.set_grad_enabled(i < steps):
                x = part.requires_grad_(i < steps)
                eps = model.eps(x, i, number) if i < steps else torch.zeros_like(x)
                value = gain(forecast(x, eps, model.abar[i]) if i < steps else x, number) / args.kl_weight
                grad = torch.autograd.grad(value.sum(), x)[0] if value.requires_grad else torch.zeros_like(x)
            parts.append([v.detach() for v in (x, eps, grad, temper[i] * value)])
        parts = (torch.cat(v).unflatten(0, (groups, particles)) for v in zip(*parts))
        return dict(zip(("x", "eps", "grad", "log_twist"), parts))
    def step(state, i):
        mean, sigma = kernel(state["x"], state["eps"], model.abar[i], model.abar[i + 1])
        shift = sigma * temper[i + 1] * state["grad"]
        length = shift.flatten(2).norm(dim=2)[..., None, None, None].clamp(min=1e-30)
        shift, z = shift * (max_shift / length).clamp(max=1), torch.randn_like(mean)
        log_ratio = -(shift * (z + shift / 2)).flatten(2).sum(2)  # log p - log q
        return look(mean + sigma * (shift + z), i + 1), log_ratio
    state, log_w = smc(step, look(torch.randn(groups, particles, *model.shape), 0), steps)
    return dict(x=state["x"], gain=state["log_twist"] * args.kl_weight, log_w=log_w)

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

def draw(args, rows, sheets):
    """Lines of images; the gain of every method beside that of the target."""
    gains, n = {r[1]: r[3:5] for r in rows if r[2] == "gain"}, len(sheets)
    figure = Figure(figsize=(9, 0.6 * n + 2), layout="constrained")
    axes = figure.subplot_mosaic([[m] for m in sheets] + [["gain"]], height_ratios=[0.6] * n + [1.8])
    for method, images in sheets.items():
        draw_images(axes[method], images, method)
    axes["gain"].axvline(gains.pop("target")[0], color="k", linestyle=":")
    for method, (value, se) in gains.items():
        axes["gain"].errorbar(value, method, xerr=2 * se, fmt="o", color="#0072B2", capsize=3)
    axes["gain"].set_title("gain, and two standard errors; dotted: the target", fontsize=9)
    axes["gain"].invert_yaxis()
    return figure

def main(args):
    started, accelerator, (groups, particles), rows = time.time(), Accelerator(cpu=args.device == "cpu"), args.size, []
    model, groups = Diffusion(args, accelerator.device), -(-groups // accelerator.num_processes)
    if args.lora:
        load_adapter(model, args.lora, "lora")
    if args.dtype != "float32":  # which a likelihood or a KL needs
        model.pipe.to(dtype := getattr(torch, args.dtype))
        model.cond, model.uncond = model.cond.to(dtype), model.uncond.to(dtype)
    accelerator.print("COARSE: numbers mean nothing" if particles < 9 else "gain: reward in standard deviations of the "
                      "base model's; se: over groups; target: all images of the base model, by weight")
    torch.set_default_device(accelerator.device)
    x, _ = sample_prompts(args, accelerator, model, groups * particles)
    gain = make_gain(args, accelerator, model, x)
    r = torch.stack([gain(v, k) for k, v in enumerate(x)]).detach()
    x, r = x.unflatten(1, (groups, particles)), r.unflatten(1, (groups, particles))
    weights = dict(base=0, importance=1 / args.kl_weight, best_of_n=1e9)  # on images of the base model
    found = {m: dict(x=x, gain=r, log_w=weights[m] * r) for m in weights if m in ["base", *args.methods]}
    for method in (m for m in args.methods if m not in weights):
        shape, outs = (4 * groups, 1) if method == "guidance" else (groups, particles), []
        for k in trange(len(args.prompts), desc=method, disable=not accelerator.is_main_process):
            torch.manual_seed(args.seed + 100 * k + 10**6 * accelerator.process_index)
            outs.append(das(model, gain, k, *shape, args, args.max_shift if method == "das" else math.inf))
            outs[k]["log_w"] *= dict(das=1, guidance=0, das_published=1e9)[method]  # published: the heaviest particle
        found[method] = {key: torch.stack([out[key] for out in outs]) for key in outs[0]}
    for method, out in found.items():
        found[method] = out = {key: torch.stack([accelerator.gather(v) for v in value]) for key, value in out.items()}
        r = (out["log_w"].softmax(2) * out["gain"]).sum(2)  # (K, G)
        rows.append(("all", method, "gain", r.mean(), (r.var(1).mean() / r.numel()).sqrt(), None))
    r = found["base"]["gain"].flatten(1)  # (K, n)
    w = (r / args.kl_weight).softmax(1)
    rows.append(("all", "target", "gain", (w * r).sum(1).mean(), None, None))
    rows += [(prompt, "target", "effective_size", 1 / (v @ v), None, None) for prompt, v in zip(args.prompts, w)]
    log_w = {m: found[m]["log_w"] for m in ("importance", "das") if m in found}
    log_w["target"] = r[..., None] / args.kl_weight
    rows += [(prompt, method, "log_z", z.mean().log(), z.std() / z.mean() / len(z) ** 0.5, None)  # z: of each group
             for method in log_w for prompt, z in zip(args.prompts, log_w[method].double().exp().mean(2))]
    if accelerator.is_main_process:
        report(args, rows, started, lambda: draw(args, rows, save_samples(args, model, found)))

if __name__ == "__main__":
    try:
        main(parse_args())
    except (Refused, torch.OutOfMemoryError) as e:  # what a user can mend, in one sentence
        sys.exit(print("out of memory: lower --chunk" if isinstance(e, RuntimeError) else e, file=sys.stderr) or 2)
