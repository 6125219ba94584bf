"""One Stable Diffusion adapter for several prompts (OR): it covers all of them, weighted for the one covered worst.
Paper: Khalafi, Hounie, Ding and Ribeiro, "Composition and Alignment of Diffusion Models using Constrained Learning",
NeurIPS 2025, arXiv 2508.19104, appendix E, which has it in 2D alone (toy/or_composition.py): images are ours.
Run    python sd/or_composition.py              miniature model, three prompts; 2 CPU minutes, --quick: 20 s
       python sd/or_composition.py --device cuda --paper --model stable-diffusion-v1-5/stable-diffusion-v1-5 --chunk 2
The adapters, for the empty prompt without guidance, are in out/sd_or_composition/<method>.
Read first: cover, reference, dual_step. Skip: Diffusion, train, checked, save_samples, draw, report.
Notation (here -> paper); kl, of whole sampling paths, nats (Lemma 1), is min over p of max_i KL(q_i || p) -> (UF-C)
    q_i, dual -> q^i, lambda  the model with prompt i and guidance, as a sampler; multipliers, shares of the mixture
Algorithm 1. draw_paths: paths of every q_i, and the noise that it predicts there
          2. cover: descend on the KLs, each times its multiplier; p is the UNet with an adapter and the empty prompt
          3. dual_step: raise the multipliers of the prompts covered worse, on the simplex; repeat
What can be reached: `mixture` picks a prompt by weight and keeps it, log 3 nats. A UNet has one Gaussian step a level:
`posterior_mean` predicts the mean of the models' noise, weighted by the density of the path so far under each. It is
the best even of those that remember their path: its KL, averaged by the weights, bounds that of any adapter.
What you should see (seed 0): base 566, 762, 668 nats; equal_weights 112, 209, 137; constrained 145, 208, 156, no
better: its weights (.06, .82, .12) follow what is not trained yet; posterior_mean 9, 3, 17, nearly all in the first
of 10 steps. The rest is training, not rank: with prompts cat, butterfly, fish, after 50 CPU seconds, attention alone
had 215, 274, 217 at rank 4, 193, 245, 191 at 32; LAYERS 123, 132, 113 at 16; all weights free 118, 120, 102.
"""
import argparse, copy, csv, json, math, os, pathlib, sys, time, types, peft
import torch
if __name__ == "__main__": os.environ |= dict(MPLBACKEND="agg", TRANSFORMERS_VERBOSITY="error")
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from diffusers.utils import numpy_to_pil
from matplotlib.figure import Figure
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from scipy.optimize import minimize
from torch.nn import functional as F
from tqdm import trange

MINI = pathlib.Path(__file__).resolve().parent / "mini"
PROMPTS = ["a photo of a cat", "a photo of a horse", "a photo of a fish"]  # your own
METHODS = ["equal_weights", "constrained"]  # the second moves its weights
LAYERS = "ff.net.0.proj ff.net.2 proj_in proj_out conv1 conv2 conv conv_shortcut time_emb_proj".split()

def parse_args(argv=None):
    parser = common_flags(__doc__, size=(20, 8, 96, 24), quick=(1, 2, 4, 4), paper=(1000, 16, 1000, 64))
    parser.set_defaults(reward=["jpeg"])  # none is used
    add = parser.add_argument  # size: rounds, batch, paths of each prompt to train on and to measure with
    add("--methods", nargs="+", choices=METHODS, default=METHODS)
    add("--rank", type=int, default=16, help="of the adapter")
    add("--lr", type=float, default=4e-3)
    add("--every", type=int, default=10, help="updates in a round, after which the multipliers move")
    add("--resume", action="store_true", help="go on with an interrupted run")
    args = checked(parser, parser.parse_args(argv))
    if len(args.prompts) < 2:
        parser.error("--prompts: a mixture is of two or more")
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

# ---- the problem: paths of the models --------------------------------------------------------------------------------
def alone(model):
    """The model at the empty prompt without guidance, at half the price: two equal predictions need one call."""
    student, second = copy.copy(model), lambda v: v[len(v) // 2 :]
    student.unet = lambda *both: types.SimpleNamespace(sample=model.unet(*map(second, both)).sample.repeat(2, 1, 1, 1))
    return student

@torch.no_grad()
def draw_paths(args, accelerator, model, predict, lead, n, seed):
    """n paths led by one of the functions predict[j](x, i) -> x (T + 1, n, ...), eps (T, m, n, ...) by all of them."""
    torch.manual_seed(args.seed + seed + 10**6 * accelerator.process_index)
    done = []
    for z in torch.randn(args.steps + 1, n, *model.shape).split(args.chunk, 1):
        x, eps = [z[0]], []
        for i, (a, b) in enumerate(zip(model.abar, model.abar[1:])):
            eps.append(torch.stack([function(x[i], i) for function in predict]))
            mean, sigma = kernel(x[i], eps[i][lead], a, b)
            x.append(mean + sigma * z[i + 1])
        done.append((torch.stack(x), torch.stack(eps)))
    return torch.cat([x for x, _ in done], 1), torch.cat([eps for _, eps in done], 2)

def reference(model, x, eps, dual, k):
    """Paths x (T + 1, n, ...), predictions eps (T, m, n, ...) of all q_i, multipliers dual (m,) -> the share of each
    q_i in a path's density (m, n); KL(q_k || posterior_mean) by step (T, n), nats, if these are paths of q_k."""
    log_w, kl = dual.log().to(x)[:, None].expand(-1, x.shape[1]), []  # (m, n): weight times density of the path
    for i, (a, b) in enumerate(zip(model.abar, model.abar[1:])):
        best = torch.einsum("mn,mnchw->nchw", log_w.softmax(0), eps[i])
        kl.append(cost(model, i) * (best - eps[i, k]).flatten(1).square().sum(1))
        mean, sigma = kernel(x[i], eps[i], a, b)
        log_w = log_w - ((x[i + 1] - mean) / sigma).flatten(2).square().sum(2) / 2
    return log_w.softmax(0), torch.stack(kl)

def cost(model, i):
    """What |eps_q - eps_p|^2 costs at step i, () or (n,), nats: |mean_q - mean_p|^2 / (2 sigma^2), Lemma 1."""
    mean, sigma = torch.tensor([kernel(0, 1, a, b) for a, b in zip(model.abar, model.abar[1:])]).T
    return ((mean / sigma) ** 2 / 2)[i]

# ---- the method ------------------------------------------------------------------------------------------------------
def dual_step(dual, slack, curvature, simplex):
    """Multipliers (m,) half way to the maximum of the dual function's quadratic expansion: slack (m,) is its gradient,
    -curvature (m, m) its Hessian; over dual >= 0, of sum one on the simplex. Half way halves the noise of estimates."""
    start, a, b = (v.numpy() for v in (dual, curvature, slack))
    unit = abs(a).max() + abs(b).max()  # the solver wants numbers of order one
    loss = lambda v: ((v - start) @ a @ (v - start) / 2 - (v - start) @ b) / unit
    found = minimize(loss, start, method="SLSQP", bounds=[(0, None)] * len(start), options=dict(ftol=1e-12),
                     constraints=[dict(type="eq", fun=lambda v: v.sum() - 1)] * simplex)
    return (dual + torch.from_numpy(found.x).clamp(min=0)) / 2

def curvature(dual, slack):
    """Minus the dual function's Hessian, from above: diag(1 / dual) for a model that is the mixture. One that cannot
    tell the prompts apart has KLs many times larger, and so many times larger a curvature."""
    return (slack.mean() / dual.clamp(min=1e-3)).diag()

def path_kl(student, i, x, eps):
    """KL of a q_k from the adapter's model, by one step i (n,) of its paths, x and eps (n, ...) there -> (n,), nats."""
    apart = student.eps(x, i, 0) - eps
    return len(student.times) * cost(student, i) * apart.flatten(1).square().sum(1)

def cover(args, accelerator, student, data, dual, move, step):
    """A round: args.every descents of sum_i dual_i KL_i on batches, then, if they may move, a step of the multipliers.
    data: x, eps (m, T, n, ...) -> multipliers and KLs, two lists."""
    (x, eps), m, batch, slack = data, len(args.prompts), args.size[1] * len(args.prompts), 0.0
    for _ in range(args.every):
        at, found = [torch.arange(batch) % m, *(torch.randint(v, (batch,)) for v in x.shape[1:3])], []
        for k, i, n in zip(*(v.split(args.chunk) for v in at)):
            kl = path_kl(student, i, x[k, i, n], eps[k, i, n])
            (dual.to(kl)[k] @ kl / args.size[1]).backward()
            found.append(kl.detach())
        step()
        slack = slack + accelerator.reduce(torch.cat(found).view(-1, m).mean(0), "mean").double().cpu() / args.every
    dual = dual_step(dual, slack, curvature(dual, slack), simplex=True) if move else dual
    return dual.tolist(), slack.tolist()

def LoraConfig(target_modules, **options):
    """peft's, of the attention, which train asks for, and of the layers that hold most of the weights."""
    return peft.LoraConfig(target_modules=target_modules + LAYERS, **options)

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

# ---- the model -------------------------------------------------------------------------------------------------------
def kernel(x, eps, a, b):
    """Mean and standard deviation of p(x_{t-1} | x_t = x), signal powers a and b: DDIM with eta = 1, which is DDPM."""
    sigma = ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5
    return b**0.5 * forecast(x, eps, a) + max(1 - b - sigma**2, 0) ** 0.5 * eps, sigma

def forecast(x, eps, abar):
    """x0_hat, Tweedie's mean of x_0 given x_t = x."""
    return (x - (1 - abar) ** 0.5 * eps) / abar**0.5

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

def draw(args, sheets, steps, paths):
    """Lines of images; KL by step, the mean over prompts; the path of the multipliers."""
    figure = Figure(figsize=(9, 0.45 * len(sheets) + 2.6), layout="constrained")
    axes = figure.subplot_mosaic([[m] * 2 for m in sheets] + [["kl", "dual"]], height_ratios=[0.45] * len(sheets) + [2])
    for method, images in sheets.items():
        label = args.prompts[int(method[7:])] if method.startswith("prompt_") else method
        draw_images(axes[method], images[0, :16].unflatten(0, (4, -1)), label)  # of one prompt, more fit on a line
    for method, kl in steps.items():
        axes["kl"].plot(torch.stack(kl).mean(0).tolist(), ":" if method == "posterior_mean" else "-", label=method)
    for prompt, line in zip(args.prompts, zip(*paths.get("constrained", []))):
        axes["dual"].plot(line, label=prompt)
    axes["kl"].set_yscale("symlog")
    axes["dual"].set_ylim(0, 1)
    for name, title in dict(kl="KL of each step, nats, mean over prompts", dual="multipliers by round").items():
        axes[name].set_title(title, fontsize=9)
        axes[name].legend(fontsize=8, loc="center right" if name == "kl" else "upper left")
    return figure

def main(args):
    started, accelerator, (rounds, _, trained, measured) = time.time(), Accelerator(cpu=args.device == "cpu"), args.size
    model, m, rows, steps, paths = Diffusion(args, accelerator.device), len(args.prompts), [], {}, {}
    accelerator.print("COARSE: numbers mean nothing" if rounds < 9 else "kl: of a prompt's paths from the method's, "
                      "nats; se: over paths; exact: of posterior_mean at the same weights, or the weight as share")
    torch.set_default_device(accelerator.device)
    student, equal = alone(model), torch.full((m,), 1 / m, dtype=torch.float64, device="cpu")
    predict = [lambda x, i, k=k: model.eps(x, i, k) for k in range(m)]
    fresh = [draw_paths(args, accelerator, model, predict, k, measured, 100 * k) for k in range(m)]
    data = [draw_paths(args, accelerator, model, predict[k : k + 1], 0, trained, 100 * k + 50) for k in trange(m)]
    data = torch.stack([x[:-1] for x, _ in data]), torch.stack([eps[:, 0] for _, eps in data])
    found = {f"prompt_{k}": x[-1] for k, (x, _) in enumerate(fresh)}
    at = torch.arange(args.steps).repeat_interleave(measured).split(args.chunk)
    @torch.no_grad()
    def look(method, dual):
        """Rows of the UNet as it is, its KL by step, its images."""
        x, eps = draw_paths(args, accelerator, model, [lambda x, i: student.eps(x, i, 0)], 0, measured, 99)
        model.unet.disable_adapters() if method in args.methods else None  # q_i are the base model's
        eps = torch.stack([torch.stack([f(v, i) for f in predict]) for i, v in enumerate(x[:-1])])
        model.unet.enable_adapters() if method in args.methods else None
        share, found[method] = reference(model, x, eps, equal, 0)[0], x[-1]
        for k, prompt in enumerate(args.prompts):
            parts = zip(at, *(v.flatten(0, 1).split(args.chunk) for v in (fresh[k][0][:-1], fresh[k][1][:, k])))
            kl = torch.cat([path_kl(student, *part) / args.steps for part in parts]).view(args.steps, -1)
            own, best = reference(model, *fresh[k], dual, k)
            kl, best, own, drawn = map(accelerator.gather, (kl.T.contiguous(), best.T.contiguous(), own[k], share[k]))
            rows.extend((prompt, method, quantity, v.mean(), v.std() / len(v) ** 0.5, exact) for quantity, v, exact in (
                ("kl", kl.sum(1), best.sum(1).mean()), ("share", drawn, dual[k])))
            steps.setdefault(method, []).append(kl.mean(0).cpu())
            if method == "base":  # at equal weights
                rows.append((prompt, "mixture", "kl", (own / dual[k]).log().mean(), None, None))
                steps.setdefault("posterior_mean", []).append(best.mean(0).cpu())
    look("base", equal)
    for name in args.methods:
        def update(step, trace):
            dual = torch.tensor(trace[-1][0], dtype=torch.float64, device="cpu") if trace else equal
            # a network that has just begun is further from some prompts than from others for no other reason
            move = name == "constrained" and len(trace) + 1 > rounds / 6
            return cover(args, accelerator, student, data, dual, move, step)
        paths[name] = [dual for dual, _ in train(args, accelerator, model, name, rounds, update)]
        look(name, torch.tensor(paths[name][-1 - rounds // 4 :], dtype=torch.float64, device="cpu").mean(0))
    found = {name: accelerator.gather(x)[None, :, None] for name, x in found.items()}
    if accelerator.is_main_process:
        none = torch.zeros(found["base"].shape[:3])  # no reward, no weights
        sheets = save_samples(argparse.Namespace(**vars(args) | dict(prompts=[""])), model,
                              {name: dict(x=x, gain=none, log_w=none) for name, x in found.items()})
        report(args, rows, started, lambda: draw(args, sheets, steps, paths))

if __name__ == "__main__":
    try:
        main(parse_args())
    except (Refused, torch.OutOfMemoryError) as e:  # what a user can mend, in one sentence
        sys.exit(print("out of memory: lower --chunk" if isinstance(e, RuntimeError) else e, file=sys.stderr) or 2)
