"""Compose adapters of Stable Diffusion by AND: the product of models whose worst KL from them is least.
Paper: Khalafi, Hounie, Ding and Ribeiro, "Composition and Alignment of Diffusion Models using Constrained Learning",
NeurIPS 2025, arXiv 2508.19104. figure.png: its Fig. 5 and 6. Its Table 1, products of prompts, is and_concepts.py's.
Run    python sd/and_composition.py                      miniature model; 5 CPU minutes, --quick: 30 s
       python sd/and_composition.py --device cuda --paper --model stable-diffusion-v1-5/stable-diffusion-v1-5 --chunk 8
           --reward aesthetic clip --clip openai/clip-vit-large-patch14 --lora FOLDER FOLDER     24 GB, not run here
Read first: compose, run, dual_step. Skip: checked, make_rewards, Diffusion, save_samples, draw, report.
Notation (here -> paper); G groups of P interacting particles for each of K prompts
    dual -> lambda         multipliers, of sum one: the exponents of the models q_i, each an adapter, or a prompt
    abar -> abar_t         signal power: x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps; -log_z -> D_AND, the dual function
Algorithm: 1. compose: draw by the summed score sum_i dual_i eps_i, the surrogate of the product; its KLs from the
       models are sums over steps: of paths by Lemma 1 (kl), of samples by Lemma 2 (slack of algorithm_3)
    2. dual_step: raise the multipliers of models that are far; back to 1. Half of the rounds are averaged   `run`
    equal_weights has no rounds, algorithm_3 is the paper's but for the step.
Ours: smc carries the normaliser C_t of the product of the kernels as weight, so that samples, KLs and D_AND are those
    of the product of the paths.
Of two models KL_i is (1 - dual_i)^2 times one number: algorithm_3 is equal_weights for every pair.
What you should see (seed 0, three training seeds): equal weights leave 19, 26, 18 percent of what each adapter gains
    alone, at KLs of 56, 34, 30 nats; algorithm_3 lowers the worst KL by 11.0 +- 1.1, and with it the least percentage,
    by 4.6 +- 7.5: a KL is no reward. smc: KLs 45, 36, 32, but 33, 24, -5 percent. To try: --guidance 1.
"""
import argparse, csv, glob, io, json, math, os, pathlib, runpy, sys, time
import torch
if __name__ == "__main__": os.environ |= dict(MPLBACKEND="agg", TRANSFORMERS_VERBOSITY="error")
from diffusers import StableDiffusionPipeline
from diffusers.utils import numpy_to_pil
from matplotlib.figure import Figure
from peft import get_peft_model_state_dict
from scipy.optimize import minimize
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

MINI = pathlib.Path(__file__).resolve().parent / "mini"
PROMPTS = ["a photo of a cat", "a photo of a horse", "a photo of a monkey", "a photo of a fish"]
METHODS = ["equal_weights", "algorithm_3", "smc"]
ADAPTERS = [str(MINI.parent / "adapters" / f"{name}*") for name in ("muted", "contrast", "clip")]

def parse_args(argv=None):
    parser = common_flags(__doc__, size=(3, 4, 2, 5, 3), quick=(1, 2, 1, 1, 1), paper=(4, 32, 8, 10, 9))
    parser.set_defaults(reward=["saturation=-1", "contrast", "clip"])
    parser.add_argument("--lora", nargs="+", default=ADAPTERS, help="the adapter of every --reward, in its order: "
                        "folder, file or hub id; a quoted 'pattern*' stands for one a training seed")
    args = parser.parse_args(argv)
    if len(args.lora) != len(args.reward):
        parser.error(f"--lora: there are {len(args.lora)} adapters for {len(args.reward)} rewards")
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

def judge(args, model, rewards, x):
    """Means of rewards, functions of images and prompt numbers, over latents x (K, G, P, C, h, w) -> (m, K, G, P)."""
    values = []
    for k, latents in enumerate(x.flatten(1, 2)):
        images = ((model.decode(part), torch.full((len(part),), k)) for part in latents.split(args.chunk))
        values.append(torch.cat([torch.stack([reward(*part) for reward in rewards]) for part in images], 1))
    return torch.stack(values, 1).unflatten(2, x.shape[1:3])

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
def compose(args, model, models, dual, shape, seed, weighted=False, gaps=None):
    """Samples of prod_i q_i^dual_i by the summed score, or weighted (smc). models: m pairs of scales and prompt numbers
    (K,); dual (m,); shape (G, P) -> x, log_w (K, G, P) and, means over all: log_z; kl, slack (m,); gram (m, m).
    gaps(share, x, i, eps): what slack takes for the distance of each model's noise, eps (m, ...), from the summed.
    prod_i N(mean_i, sigma^2)^dual_i = C_t N(mean, sigma^2): draws are from N, C_t(x_t) is the weight of the step."""
    share, prompts, m, noise = dual.to(torch.ones(())), len(models[0][1]), len(dual), []
    numbers = [number.repeat_interleave(shape[0] * shape[1]) for _, number in models]
    for k in range(prompts):  # the noise of each prompt is its own
        torch.manual_seed(seed + 100 * k)
        noise.append(torch.randn(len(model.times) + 1, *shape, *model.shape))
    noise, size = torch.cat(noise, 1), (prompts * shape[0], shape[1])
    def step(state, i):
        x, a, b = state["x"], model.abar[i], model.abar[i + 1]
        eps = torch.stack([adapted(model, scales, x, i, k, args.chunk) for (scales, _), k in zip(models, numbers)])
        means, sigma = kernel(x, eps, a, b)  # (m, K G, P, C, h, w)
        mean, z = torch.einsum("m,m...->...", share, means), noise[i + 1].to(x)
        apart = (means - mean).flatten(3) / sigma
        gram = torch.einsum("mgpd,ngpd->gpmn", apart, apart)
        kl = gram.diagonal(dim1=2, dim2=3) / 2  # Lemma 1
        log_q = torch.einsum("mgpd,gpd->gpm", apart, z.flatten(2)) - kl  # above log N(x; mean, sigma^2)
        gap = gaps(share, x, i, eps) if gaps else eps - torch.einsum("m,m...->...", share, eps)
        growth = math.log(b / (1 - b) / a * (1 - a))  # Lemma 2: an integral over the log SNR
        slack = gap.flatten(3).square().sum(3).movedim(0, -1) / 2 * growth
        new = {name: state[name] + v for name, v in dict(kl=kl, slack=slack, log_q=log_q, gram=gram).items()}
        return dict(state, x=mean + sigma * z, **new), -(kl @ share) * weighted
    start = {name: torch.zeros(*size, m) for name in ("kl", "slack", "log_q")}
    start |= dict(gram=torch.zeros(*size, m, m), log_twist=torch.zeros(size), x=noise[0])
    state, log_w = smc(step, start, len(model.times))
    x, log_w = (v.unflatten(0, (prompts, -1)) for v in (state.pop("x"), log_w))
    w = log_w.flatten(1).softmax(1).view(size) / prompts
    out = {name: torch.einsum("gp,gp...->...", w, value).double().cpu() for name, value in state.items()}
    log_z = log_w.double().flatten(1).logsumexp(1).mean().item() - math.log(shape[0] * shape[1])
    if weighted:  # the mean of log p - log q_i over paths of the product p
        out["kl"] = out["slack"] = dual @ out["log_q"] - out["log_q"] - log_z
    return dict(out, x=x, log_w=log_w, log_z=log_z)

def run(method, args, model, models, shape, gaps=None):
    """A method by its name -> what compose returns at its multipliers, and these, dual (m,). All end on one noise."""
    path, (paths, rounds) = [torch.full((len(models),), 1 / len(models)).double().cpu()], args.size[2:4]
    for left in reversed(range(1 if method == "equal_weights" else 1 + rounds)):
        dual = path[-1] if left else torch.stack(path[len(path) // 2 :]).mean(0)
        few, weighted = (1, 2 * paths if method == "smc" else paths), method == "smc"
        out = compose(args, model, models, dual, few if left else shape, args.seed + 1000 * left, weighted, gaps)
        path.append(dual_step(dual, out["slack"], out["gram"], simplex=True))
    return dict(out, dual=dual)

def dual_step(dual, slack, curvature, simplex):
    """Multipliers (m,) half way to the maximum of the dual function's quadratic expansion: slack (m,) is its gradient,
    -curvature (m, m) its Hessian; over dual >= 0, of sum one on the simplex. Half way halves the noise of estimates."""
    start, a, b = (v.numpy() for v in (dual, curvature, slack))
    unit = abs(a).max() + abs(b).max()  # the solver wants numbers of order one
    loss = lambda v: ((v - start) @ a @ (v - start) / 2 - (v - start) @ b) / unit
    found = minimize(loss, start, method="SLSQP", bounds=[(0, None)] * len(start), options=dict(ftol=1e-12),
                     constraints=[dict(type="eq", fun=lambda v: v.sum() - 1)] * simplex)
    return (dual + torch.from_numpy(found.x).clamp(min=0)) / 2

# ---- the comparison --------------------------------------------------------------------------------------------------
def compose_adapters(args, model, rewards, names):
    """The base model, adapters alone, names {word: name of model.unet's}, one a reward, and their products by METHODS
    -> {(method, quantity): value}, {method: samples}; percent: of the gain of a reward's own adapter."""
    number, rows, values = torch.arange(len(args.prompts)), {}, {}
    single = dict(base={}, **{word: {name: 1.0} for word, name in names.items()})
    found = {method: compose(args, model, [(scales, number)], torch.ones(1), args.size[:2], args.seed)
             for method, scales in single.items()}
    models = [({name: 1.0}, number) for name in names.values()]
    found |= {method: run(method, args, model, models, args.size[:2]) for method in METHODS}
    for method, out in found.items():
        out["gain"], w = judge(args, model, rewards, out["x"]), out["log_w"].flatten(1).softmax(1)
        values[method] = (out["gain"].flatten(2) * w).sum(2).mean(1)
    base = values["base"]
    alone = torch.stack([values[word][j] for j, word in enumerate(names)]) - base
    for method, out in found.items():
        lines = dict(percent=100 * (values[method] - base) / alone)
        lines |= {key: out[key] for key in ("dual", "kl", "slack") if method in METHODS}
        rows |= {(method, f"{key}_{word}"): v.item() for key, line in lines.items() for word, v in zip(names, line)}
        rows |= {(method, f"value_{name}"): v.item() for name, v in zip(args.weights, values[method])}
        rows[method, "least_percent"] = lines["percent"].min().item()
        out["gain"] = 100 * ((out["gain"].movedim(0, -1) - base) / alone).amin(-1)  # of an image: the least percent
        if method == "smc":  # no sampler has a worst KL below the dual value
            size = 1 / out["log_w"].softmax(2).square().sum(2)
            rows |= {(method, "dual_value"): -out["log_z"], (method, "effective_size"): size.mean().item()}
        if method in METHODS:
            rows[method, "worst_kl"] = out["kl"].max().item()
            rows |= {(method, f"{key}_change"): rows[method, key] - rows["equal_weights", key]
                     for key in ("worst_kl", "least_percent") if method != "equal_weights"}
    return rows, found

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

def average(problem, found):
    """Dicts {(method, quantity): value} -> rows: mean and standard error over the dicts, of what all of them have."""
    table = {key: torch.tensor([rows.get(key, math.nan) for rows in found], dtype=torch.float64) for key in found[0]}
    return [(problem, *key, v.mean(), v.std(correction=0) / (len(v) - 1) ** 0.5, None)
            for key, v in table.items() if not v.isnan().any()]

def draw(args, rows, sheets):
    """Lines of images; what is left of each adapter's gain and its KL, by method, with two standard errors."""
    figure = Figure(figsize=(9, 0.6 * len(sheets) + 2.2), layout="constrained")
    axes = figure.subplot_mosaic([[name] * 2 for name in sheets] + [["percent", "kl"]],
                                 height_ratios=[0.6] * len(sheets) + [2])
    for name, images in sheets.items():
        draw_images(axes[name], images, name)
    values = {r[1:3]: [math.nan if v is None else float(v) for v in r[3:5]] for r in rows}
    for quantity, title in dict(percent="percent of its gain alone", kl="KL from each adapter, nats").items():
        for k, word in enumerate(reward_words(args)):
            middle, se = zip(*(values[method, f"{quantity}_{word}"] for method in METHODS))
            axes[quantity].errorbar(middle, [j + 0.2 * k for j in range(len(METHODS))], xerr=[2 * v for v in se],
                                    fmt="os^Dv"[k % 5], color=f"C{k}", label=word)
        axes[quantity].set(yticks=range(len(METHODS)), yticklabels=METHODS, ylim=(2.7, -0.3))
        axes[quantity].set_title(title, fontsize=9)
    figure.legend(*axes["kl"].get_legend_handles_labels(), fontsize=8, ncols=5, loc="outside lower center")
    return figure

def main(args):
    started, found, sheets, trainings = time.time(), [], {}, args.size[4]
    torch.set_default_device(args.device)
    model, rewards = Diffusion(args, args.device), make_rewards(args, args.device)
    print("COARSE: numbers mean nothing" if trainings < 3 else "se: over training seeds; percent: of the gain of a "
          "reward's own adapter; kl: nats of paths, slack: what the method takes for it; change: from equal_weights")
    folders = [sorted(glob.glob(pattern)) or [pattern] for pattern in args.lora]
    for k, several in enumerate(list(zip(*folders))[:trainings]):
        names = {word: f"{word}_{k}" for word in reward_words(args)}
        for folder, name in zip(several, names.values()):
            load_adapter(model, folder, name)
        values, samples = compose_adapters(args, model, rewards, names)
        found.append(values)
        sheets = sheets or save_samples(args, model, {method: {key: out[key] for key in ("x", "gain", "log_w")}
                                                      for method, out in samples.items()})
    rows = average("adapters", found)
    report(args, rows, started, lambda: draw(args, rows, sheets))

if __name__ == "__main__":
    try:
        main(parse_args())
    except (Refused, torch.OutOfMemoryError) as e:  # what a user can mend, in one sentence
        sys.exit(print("out of memory: lower --chunk" if isinstance(e, RuntimeError) else e, file=sys.stderr) or 2)
