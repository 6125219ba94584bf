"""Maximise a black-box reward of images with few queries: DAS samples an optimistic surrogate that learns from them.
Paper: Kim, Kim and Park, "Test-time Alignment of Diffusion Models without Reward Over-optimization" (DAS), ICLR 2025,
arXiv 2501.05803, its online experiment. figure.png: the best image found, and the mean of a round, by queries.
Run    python sd/das_online.py                 miniature model, compressibility; 2 CPU minutes, --quick: 20 s
       python sd/das_online.py --reward my.py:function      any reward: it is only ever queried
       python sd/das_online.py --device cuda --paper --model stable-diffusion-v1-5/stable-diffusion-v1-5 --steps 50
           --reward aesthetic --clip openai/clip-vit-large-patch14 --chunk 1
Read first: Surrogate, main; das is the sampler of sd/das.py. Skip: checked, make_rewards, Diffusion, report.
Notation (here -> paper): gain, the reward in standard deviations of the base model's images of the prompt; kl_weight ->
    alpha; queries: true rewards, with noise of standard deviation 0.1, that the method has seen
Algorithm, in every round
    1. sample images of every prompt by DAS with the surrogate's optimistic guess as reward             `das`
    2. query the true reward of them, and refit the surrogate to all queries so far                     `Surrogate`
Ours: the paper's surrogate is a network without nonlinearities on CLIP features, hence affine: here in closed form.
    Beside it `random`: as many queries of the base model's own images, the baseline that costs no sampling by DAS.
What you should see (seed 0): after 28 queries a prompt the best image has a gain of 2.6 (ucb, bootstrap; se .4), of
    random images 2.1; the last round gains .5 on average, where the surrogate promises 1.2. To try: --kl-weight 0.5.
"""
import argparse, csv, io, json, math, os, pathlib, runpy, sys, time
import torch
if __name__ == "__main__": os.environ |= dict(MPLBACKEND="agg", TRANSFORMERS_VERBOSITY="error")
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from matplotlib.figure import Figure
from torch.nn import functional as F
from tqdm import trange
from transformers import CLIPModel, CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

MINI = pathlib.Path(__file__).resolve().parent / "mini"
PROMPTS = ["a photo of a cat", "a photo of a horse", "a photo of a monkey", "a photo of a fish"]
METHODS = ["ucb", "bootstrap", "random"]

def parse_args(argv=None):
    parser = common_flags(__doc__, size=(6, 4, 4), quick=(2, 2, 4), paper=(256, 4, 4))  # rounds, images, particles
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS, default=METHODS, help="kind of optimism, or no surrogate")
    add("--kl-weight", type=float, default=0.2, help="reward temperature, in standard deviations")
    add("--gamma", type=float, default=0.008, help="growth of the temper in a hundredth of the steps")
    add("--max-shift", type=float, default=0.5, help="cap of the guidance, in standard deviations of the kernel")
    parser.set_defaults(reward=["jpeg"])
    args = checked(parser, parser.parse_args(argv))
    if pathlib.Path(args.model).resolve() != MINI and MINI in pathlib.Path(args.clip).resolve().parents:
        parser.error("--model: the surrogate sees with the miniature's CLIP model; name another one by --clip")
    return args

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
    try:
        if args.prompts[0].endswith(".txt"):
            lines = pathlib.Path(args.prompts[0]).read_text(encoding="utf-8-sig").splitlines()
            args.prompts = [line.strip() for line in lines if line.strip()]
        args.weights = {name: float(weight or 1) for name, _, weight in (word.partition("=") for word in args.reward)}
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / ".writable").touch()  # or it is said now, not after all the work
    except (OSError, ValueError) as error:
        parser.error(f"--prompts, --reward or --out: {error}")
    if not 0 < len({*args.prompts}) == len(args.prompts) or len(args.weights) < len(args.reward):
        parser.error("--prompts and --reward: there are none, or one stands there twice")
    if not mini and MINI in pathlib.Path(args.clip).resolve().parents and {"clip", "aesthetic"} & {*args.weights}:
        parser.error("--clip: the miniature's CLIP model knows emoji alone; name that of the reward")
    return args

# ---- the problem: rewards of images ----------------------------------------------------------------------------------
def make_rewards(args, device):
    """Every --reward: a function of images (n, 3, H, W) in [0, 1] and the numbers of their prompts (n,) -> (n,)."""
    def jpeg(images, number):  # compressibility: minus the kilobytes at quality 95, as in DDPO; no gradient
        size = lambda image: image.save(file := io.BytesIO(), "JPEG", quality=95) or file.tell()
        return torch.tensor([-size(image) / 1000 for image in to_pil(images)], device=device)
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

def make_gain(args, accelerator, model, x):
    """gain(latents (n, C, h, w), number () or (n,)) -> (n,): the weighted sum of their images' rewards, each above its
    mean over the base model's images of the prompt, in their standard deviations; x (K, n, C, h, w): such images."""
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
    return lambda x, number: ((values(x, number) - level[number]) / spread[number] * weights).sum(1)

# ---- the method ------------------------------------------------------------------------------------------------------
class Surrogate:
    """Ridge regression of queried gains on the CLIP features of images and on their prompt, in an optimistic form: ucb
    adds the standard error of the prediction, bootstrap takes the largest of 4 fits to resampled queries."""
    def __init__(self, embed, kind, prompts):
        self.embed, self.kind, self.prompts, self.features, self.answers = embed, kind, prompts, [], []

    def look(self, images, number):
        """Images (n, 3, H, W), number () or (n,) of the prompt -> features (n, d)."""
        return torch.cat([self.embed(images), F.one_hot(torch.as_tensor(number).expand(len(images)), self.prompts)], 1)

    def add(self, images, number, answers):
        """More queried gains (n,) of images; refits."""
        self.features.append(self.look(images, number).detach())
        self.answers.append(answers)
        f, y = torch.cat(self.features), torch.cat(self.answers)
        def fit(f, y, ridge=0.1):
            inverse = torch.linalg.inv(f.T @ f + ridge * torch.eye(f.shape[1]))
            return inverse @ f.T @ y, inverse
        self.weights, self.inverse = fit(f, y)
        self.heads = torch.stack([fit(f[i], y[i])[0] for i in torch.randint(len(y), (4, len(y)))], 1)
        self.noise = (f @ self.weights - y).std()

    def __call__(self, images, number):
        """The optimistic gain of images (n, 3, H, W) -> (n,), with a gradient."""
        f = self.look(images, number)
        if self.kind == "bootstrap":
            return (f @ self.heads).amax(1)
        return f @ self.weights + self.noise * ((f @ self.inverse) * f).sum(1).clamp(min=1e-12).sqrt()

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
        if getattr(args, "dtype", "float32") != "float32":  # which a likelihood or a KL needs
            pipe.to(getattr(torch, args.dtype))
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
            for g, image in enumerate(to_pil(sheets[method][k])):
                values = (args.seed + 100 * k, f["gain"][k][pick][g].item(), w[k][pick][g].item())
                lines.append((f"images/{k}_{method}_{g}.png", prompt, method, *values))
                image.save(args.out / lines[-1][0])
    with open(args.out / "images.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)
    return {method: torch.stack(images) for method, images in sheets.items()}

def to_pil(images):
    """Images (n, 3, H, W) in [0, 1] -> list of n PIL images."""
    return VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(images.detach()))

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
    widths = [max(len(r[i]) for r in rows) for i in range(3)]
    for r in [names, *rows]:
        cells = ("" if v is None else v if r is names else f"{v:.3f}" for v in r[3:])
        print(*(word.ljust(width) for word, width in zip(r, widths)), *(f"{cell:>9}" for cell in cells))
    record = dict(args=vars(args), rows=[dict(zip(names, r)) for r in rows], seconds=round(time.time() - started, 1))
    text = json.dumps(record | {"torch": torch.__version__}, indent=1, default=str, allow_nan=False)
    part.write_text(text.replace(f"{MINI.parents[1]}/", ""))  # paths from the top folder
    part.replace(args.out / "numbers.json")  # files are whole or absent, also when two runs share a folder
    draw().savefig(part, dpi=100, format="png")
    part.replace(args.out / "figure.png")

def draw(rows, sheets):
    """Lines of images of the last round; best of all queries and mean of a round by number of queries."""
    n, figure = len(sheets), Figure(figsize=(9, 0.6 * len(sheets) + 2.6), layout="constrained")
    axes = figure.subplot_mosaic([[m] * 2 for m in sheets] + [["best", "mean"]], height_ratios=[0.6] * n + [2.6])
    for method, images in sheets.items():
        draw_images(axes[method], images, method)
        for quantity in ("best", "mean"):
            line = [(int(r[0].split("_")[0]), r[3].item()) for r in rows if r[1:3] == (method, quantity)]
            axes[quantity].plot(*zip(*line), ".-", label=method)
            axes[quantity].set_title(f"{quantity} gain, by queries of a prompt", fontsize=9)
    axes["best"].legend(fontsize=8)
    return figure

def main(args):
    started, accelerator, (rounds, images, particles) = time.time(), Accelerator(cpu=args.device == "cpu"), args.size
    model, K, rows, found = Diffusion(args, accelerator.device), len(args.prompts), [], {}
    print("COARSE: numbers mean nothing" if rounds < 5 else "best: gain of all queries of a prompt so far; mean: of a "
          "round; promised: by the surrogate; se: over prompts")
    torch.set_default_device(accelerator.device)
    base, _ = sample_prompts(args, accelerator, model, max(32, images * (rounds + 1)))
    gain = make_gain(args, accelerator, model, base)
    embed, _ = load_clip(args.clip, args.prompts, accelerator.device)
    for method in args.methods:
        surrogate, best = Surrogate(embed, method, K), torch.full((K,), -math.inf)
        guess = lambda x, number: surrogate(model.decode(x), number)
        for i in trange(rounds + 1, desc=method):
            drawn, promised = base[:, i * images : (i + 1) * images].clone(), []
            for k in range(K if i and method != "random" else 0):
                torch.manual_seed(args.seed + 100 * k + 1000 * i)
                out = das(model, guess, k, images, particles, args, args.max_shift)
                pick = torch.arange(images), out["log_w"].softmax(1).multinomial(1)[:, 0]
                drawn[k] = out["x"][pick]
                promised.append(out["gain"][pick].mean())
            with torch.no_grad():
                true = torch.stack([gain(v, k) for k, v in enumerate(drawn)])  # (K, images)
                for k, v in enumerate(drawn):
                    surrogate.add(model.decode(v), k, true[k] + 0.1 * torch.randn(images))
            best = torch.maximum(best, true.amax(1))
            values = dict(best=best, mean=true.mean(1)) | (dict(promised=torch.stack(promised)) if promised else {})
            rows += [(f"{(i + 1) * images}_queries", method, quantity, v.mean(), v.std() / K**0.5, None)
                     for quantity, v in values.items()]
        found[method] = dict(x=drawn[:, :, None], gain=true[..., None], log_w=0 * true[..., None])
    sheets = save_samples(args, model, found)
    report(args, rows, started, lambda: draw(rows, sheets))

if __name__ == "__main__":
    try:
        main(args := parse_args())
    except (Refused, torch.OutOfMemoryError) as error:  # what a user can mend, in one sentence
        print(error if type(error) is Refused else "out of memory: take a smaller --chunk", file=sys.stderr)
        sys.exit(2)
