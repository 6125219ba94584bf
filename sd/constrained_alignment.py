"""Align Stable Diffusion under reward constraints: multipliers weigh the rewards until each meets its threshold.
Paper: Khalafi, Hounie, Ding and Ribeiro, "Composition and Alignment of Diffusion Models using Constrained Learning",
NeurIPS 2025, arXiv 2508.19104. figure.png: its Fig. 3 (`learned`: the CLIP score is the objective, saturation and
contrast have thresholds) and Fig. 4 (`several`: all have), with the multipliers by round; equal weights beside.
Run    python sd/constrained_alignment.py      miniature model; 4 CPU minutes, --quick: 20 s; --resume goes on
       python sd/constrained_alignment.py --device cuda --paper --model stable-diffusion-v1-5/stable-diffusion-v1-5
           --reward aesthetic saturation contrast --clip openai/clip-vit-large-patch14 --chunk 1       24 GB
The adapters are in out/sd_constrained_alignment/<problem>_<threshold>_<method>: pipe.load_lora_weights(that folder).
Read first: lagrangian_update, align, dual_step. Skip: Diffusion, make_rewards, save_samples, draw, checked, report.
Notation (here -> paper)
    b -> b_i               thresholds of E[r_i]; r: every reward in standard deviations of the base model (gain)
    weights -> lambda      of the rewards with a threshold the multipliers >= 0, nats (of KL) per standard deviation
    kl_weight              `learned` maximises E[r_0] - kl_weight KL: the first --reward has the weight 1 / kl_weight
Algorithm 1. lagrangian_update: draw latents with the adapter, descend KL - weights' r through all of their paths
          2. align: from the mean rewards, dual_step raises the multipliers of those below their thresholds; repeat
equal_weights, as a penalty method: the same sum of weights as constrained found in its second half, evenly shared.
Ours: Newton steps of the multipliers (published: of one size); the whole gradient of the KL (there: at fixed x_t).
What you should see (seed 0): in `learned` the gains of clip, saturation and contrast are 1.20 +- .11, 1.02 +- .06 and
1.16 +- .07 for 12.9 nats, by multipliers of .5 and 9.9; equal weights (6.8) have .80, 3.63 and 1.33 for 20.3 nats, most
of it for saturation beyond its threshold. In `several` .97, .81 and .98 for 7.2 nats: saturation is a fifth short.
What thresholds cost: at .5 for 1 the objective is 1.33 +- .10 for 1.20 +- .11. The score of sd/mini/clip_eval, which
nobody optimises, falls by .023 +- .007 in `learned`, equal weights .008: they ask less of the CLIP score. Try --lag 2.
"""
import argparse, csv, functools, io, json, math, os, pathlib, runpy, sys, time
import torch
if __name__ == "__main__": os.environ |= dict(MPLBACKEND="agg", TRANSFORMERS_VERBOSITY="error")
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from diffusers.utils import numpy_to_pil
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from scipy.optimize import minimize
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import trange
from transformers import CLIPModel, CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

MINI = pathlib.Path(__file__).resolve().parent / "mini"
PROMPTS = ["a photo of a cat", "a photo of a horse", "a photo of a monkey", "a photo of a fish"]
METHODS = ["constrained", "equal_weights"]

def parse_args(argv=None):
    parser = common_flags(__doc__, size=(16, 12, 16), quick=(1, 4, 2), paper=(40, 64, 64))
    parser.set_defaults(reward=["clip", "saturation", "contrast"])
    add = parser.add_argument
    add("--problem", nargs="+", choices=["learned", "several"], default=["learned", "several"])
    add("--threshold", nargs="+", type=float, default=[1.0, 0.5], help="the first of every --problem, others of one")
    add("--kl-weight", type=float, default=0.1, help="of the KL against the first --reward in `learned`")
    add("--lag", type=float, default=0.5, help="divides the steps of the multipliers")
    add("--rank", type=int, default=8, help="of the adapter")
    add("--lr", type=float, default=2e-3)
    add("--resume", action="store_true", help="go on with an interrupted run")
    args = checked(parser, parser.parse_args(argv))
    if "jpeg" in args.weights:
        parser.error("--reward jpeg has no gradient, which this method needs; sd/ddpo.py needs none")
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
def kernel(x, eps, a, b):
    """Mean and standard deviation of p(x_{t-1} | x_t = x), signal powers a and b: DDIM with eta = 1, which is DDPM."""
    sigma = ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5
    return b**0.5 * forecast(x, eps, a) + max(1 - b - sigma**2, 0) ** 0.5 * eps, sigma

def forecast(x, eps, abar):
    """x0_hat, Tweedie's mean of x_0 given x_t = x."""
    return (x - (1 - abar) ** 0.5 * eps) / abar**0.5

def dual_step(dual, slack, curvature, simplex):
    """Multipliers (m,) half way to the maximum of the dual function's quadratic expansion: slack (m,) is its gradient,
    -curvature (m, m) its Hessian; over dual >= 0, of sum one on the simplex. Half way halves the noise of estimates."""
    start, a, b = (v.numpy() for v in (dual, curvature, slack))
    unit = abs(a).max() + abs(b).max()  # the solver wants numbers of order one
    loss = lambda v: ((v - start) @ a @ (v - start) / 2 - (v - start) @ b) / unit
    found = minimize(loss, start, method="SLSQP", bounds=[(0, None)] * len(start), options=dict(ftol=1e-12),
                     constraints=[dict(type="eq", fun=lambda v: v.sum() - 1)] * simplex)
    return (dual + torch.from_numpy(found.x).clamp(min=0)) / 2

def lagrangian_update(args, accelerator, model, gains, step, batch, weights):
    """A step down KL - E[weights' r], weights (m,), through all of `batch` paths -> rewards (batch, m), KL (batch,)."""
    number, found = torch.arange(batch) % len(args.prompts), []
    noise, few = torch.randn(args.steps + 1, batch, *model.shape), batch <= args.chunk  # else x alone is kept
    predict = model.eps if few else functools.partial(checkpoint, model.eps, use_reentrant=False)
    for z, k in zip(noise.split(args.chunk, 1), number.split(args.chunk)):
        x, kl = z[0], 0.0
        for i in range(args.steps):
            eps = predict(x, i, k)
            kl = kl + step_kl(model, x, i, k, eps)
            mean, sigma = kernel(x, eps, model.abar[i], model.abar[i + 1])
            x = mean + sigma * z[i + 1]
        r = gains(x, k)
        ((kl - r @ weights.to(r)).sum() / batch).backward()
        found.append((r.detach(), kl.detach()))
    step()
    return [accelerator.gather(torch.cat(v)).double().cpu() for v in zip(*found)]

def align(args, accelerator, model, gains, name, weights, b):
    """Algorithm 1 for a fresh adapter -> weights and mean rewards (rounds, m), KL (rounds,). Of the weights (m,), those
    of rewards with a threshold b (m,) > -inf are multipliers, the others stay."""
    (rounds, batch, _), active = args.size, b.isfinite()
    def update(step, trace):
        dual = trace[-1][0].clone() if trace else weights.clone()
        r, kl = lagrangian_update(args, accelerator, model, gains, step, batch, dual)
        if active.any():  # the step counts on a model that follows at once; an adapter takes some rounds
            curvature = args.lag * torch.cov(r.T[active]).view(2 * [active.sum()])
            dual[active] = dual_step(dual[active], (b - r.mean(0))[active], curvature, simplex=False)
        return dual, r.mean(0), kl.mean()
    return [torch.stack(v) for v in zip(*train(args, accelerator, model, name, rounds, update))]

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

def draw(args, sheets, traces):
    """Of every problem, at the first threshold: images, weights by round, gains by round."""
    first, layout, colors = args.threshold[0], [["base"] * 2], ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000"]
    for p in args.problem:
        layout += [[f"{p}_{first:g}_{method}"] * 2 for method in METHODS] + [[f"{p} weights", f"{p} gains"]]
    figure = Figure(figsize=(9, 0.6 + 3.6 * len(args.problem)), layout="constrained")
    axes = figure.subplot_mosaic(layout, height_ratios=[0.6 if left == right else 2.4 for left, right in layout])
    for name in axes.keys() & sheets.keys():
        draw_images(axes[name], sheets[name], name.replace("_weights", "").replace("_", " ", 1).replace("_", "\n"))
    for p in args.problem:
        for panel in (f"{p} weights", f"{p} gains"):
            axes[panel].set_title(f"{panel} by round; dashed: equal weights", fontsize=9)
            for method, style in zip(METHODS, ("-", "--")):
                axes[panel].set_prop_cycle(color=colors)
                axes[panel].plot(traces[f"{p}_{first:g}", method][panel.endswith("gains")], style)
        axes[f"{p} gains"].axhline(first, color="k", linestyle=":")
    lines = axes[f"{p} gains"].lines[: len(args.weights)]
    figure.legend(lines, args.weights, loc="outside lower center", ncols=len(lines), fontsize=9)
    return figure

def main(args):
    started, accelerator, (rounds, _, images) = time.time(), Accelerator(cpu=args.device == "cpu"), args.size
    model, names, traces, rows = Diffusion(args, accelerator.device), [*args.weights], {}, []
    accelerator.print("COARSE: numbers mean nothing" if rounds < 9 else "gain_*: rewards in standard deviations of the "
                      "base model's, above its images of the same noise; se: over images; kl: of paths, nats")
    torch.set_default_device(accelerator.device)
    base = sample_prompts(args, accelerator, model, images)
    gains = make_gain(args, accelerator, model, base[0], each=True)
    found = dict(base=as_groups(accelerator, gains, *base))
    first, *others = args.threshold
    for problem, threshold in [(p, first) for p in args.problem] + [(p, b) for p in args.problem[:1] for b in others]:
        name, start = f"{problem}_{threshold:g}", torch.zeros(len(names), dtype=torch.float64, device="cpu")
        b = start + threshold
        if problem == "learned":  # the first reward has a weight, no threshold
            start[0], b[0] = 1 / args.kl_weight, -math.inf
        for method in METHODS[: 1 + (threshold == first)]:
            trace = align(args, accelerator, model, gains, f"{name}_{method}", start, b)
            weights = trace[0][rounds // 2 :].mean(0)  # over the second half
            out = as_groups(accelerator, gains, *sample_prompts(args, accelerator, model, images, step_kl))
            traces[name, method], found[f"{name}_{method}"] = trace, out
            change = (out["gain"] - found["base"]["gain"])[:, :, 0]  # (K, n, m)
            se = (change.var(1).mean(0) / change[..., 0].numel()).sqrt()
            for i, word in enumerate(names):
                rows += [(name, method, f"gain_{word}", change[..., i].mean(), se[i], None),
                         (name, method, f"weight_{word}", weights[i], None, None)]
            rows.append((name, method, "kl", out["kl"].mean(), None, None))
            start, b = 0 * weights + weights.mean(), b - math.inf  # equal weights have the sum of what was found
    if accelerator.is_main_process:
        for out in found.values():
            out["gain"] = out["gain"].sum(-1)
        report(args, rows, started, lambda: draw(args, save_samples(args, model, found), traces))

if __name__ == "__main__":
    try:
        main(parse_args())
    except (Refused, torch.OutOfMemoryError) as e:  # what a user can mend, in one sentence
        sys.exit(print("out of memory: lower --chunk" if isinstance(e, RuntimeError) else e, file=sys.stderr) or 2)
