"""Checkpoints as their authors publish them: read, logit by logit, as a forward pass over their own tensors says."""

import json
import math
import shutil
from fnmatch import fnmatch

import pytest
import torch
import yaml
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import save_file
from torch import nn

import caddf
import caddf.text_model
from caddf import InputError, TextModel, load
from caddf.cli import main
from caddf.concrete_score import log_scores
from caddf.evaluation import EvaluationConfig
from caddf.interface import AnyOrder, Infill
from caddf.tokenizer import Tokenizer

BYTES = Tokenizer.plain_bytes()
V, LENGTH, WIDTH, HEADS, LAYERS, LEVEL_WIDTH = 257, 12, 16, 2, 2, 6
SIGMAS = torch.tensor([1e-3, 0.3, 2.0, 6.9], dtype=torch.float64)


# Configurations, as the authors' code writes them.

DDIT = {
    "name": "small",
    "type": "ddit",
    "hidden_size": WIDTH,
    "cond_dim": LEVEL_WIDTH,
    "length": LENGTH,
    "n_blocks": LAYERS,
    "n_heads": HEADS,
    "scale_by_sigma": True,
    "dropout": 0.1,
}
SEDD = {
    "ngpus": 8,
    "tokens": V,
    "training": {"batch_size": 512, "ema": 0.9999},
    "graph": {"type": "absorb", "file": "data", "report_all": False},
    "noise": {"type": "loglinear", "sigma_min": 1e-4, "sigma_max": 20},
    "model": DDIT,
}
RADD = {
    "ngpus": 4,
    "tokens": V,
    "training": {"batch_size": 512, "ema": 0.9999, "loss_type": "t_DCE"},
    "noise": {"type": "loglinear", "sigma_min": 1e-4, "sigma_max": 20},
    "model": {
        **{name: value for name, value in DDIT.items() if name != "scale_by_sigma"},
        "type": "ddit_wot",
        "use_checkpoint": False,
        "dtype": "float16",
    },
}
CONFIGS = {
    "gpt2": {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "n_layer": LAYERS,
        "n_embd": WIDTH,
        "n_head": HEADS,
        "n_positions": LENGTH,
        "n_ctx": LENGTH,
        "vocab_size": V,
        "bos_token_id": 256,
    },
    "sedd-scaled": SEDD,
    "sedd-unscaled": {
        **SEDD,
        "model": {**DDIT, "scale_by_sigma": False},
        "noise": {"type": "geometric", "sigma_min": 1e-4, "sigma_max": 20},
    },
    "sedd-uniform": {**SEDD, "graph": {"type": "uniform"}, "model": {**DDIT, "scale_by_sigma": False}},
    "radd-t-dce": RADD,
    "mdlm": {
        "model_type": "mdlm",
        "architectures": ["MDLM"],
        "vocab_size": V + 1,
        "model_length": LENGTH,
        "hidden_dim": WIDTH,
        "cond_dim": LEVEL_WIDTH,
        "n_blocks": LAYERS,
        "n_heads": HEADS,
        "dropout": 0.1,
        "time_conditioning": False,
    },
}
MASKED = [name for name in CONFIGS if name != "gpt2"]


# Random tensors under their names, as `state_dict()` lists them.


def gpt2_weights(rows: int = V) -> dict[str, torch.Tensor]:
    """Matrices are [in, out]; the masks are there because older versions stored them."""
    shapes = {"wte.weight": (rows, WIDTH), "wpe.weight": (LENGTH, WIDTH)}
    for i in range(LAYERS):
        shapes |= {f"h.{i}.ln_1.weight": (WIDTH,), f"h.{i}.ln_1.bias": (WIDTH,)}
        shapes |= {f"h.{i}.attn.bias": (1, 1, LENGTH, LENGTH)}
        shapes |= {f"h.{i}.attn.c_attn.weight": (WIDTH, 3 * WIDTH), f"h.{i}.attn.c_attn.bias": (3 * WIDTH,)}
        shapes |= {f"h.{i}.attn.c_proj.weight": (WIDTH, WIDTH), f"h.{i}.attn.c_proj.bias": (WIDTH,)}
        shapes |= {f"h.{i}.ln_2.weight": (WIDTH,), f"h.{i}.ln_2.bias": (WIDTH,)}
        shapes |= {f"h.{i}.mlp.c_fc.weight": (WIDTH, 4 * WIDTH), f"h.{i}.mlp.c_fc.bias": (4 * WIDTH,)}
        shapes |= {f"h.{i}.mlp.c_proj.weight": (4 * WIDTH, WIDTH), f"h.{i}.mlp.c_proj.bias": (WIDTH,)}
    return drawn(shapes | {"ln_f.weight": (WIDTH,), "ln_f.bias": (WIDTH,)})


def ddit_weights(rows: int, time: bool, prefix: str = "", seed: int = 0) -> dict[str, torch.Tensor]:
    """With `time` SEDD's and MDLM's, without it RADD's."""
    norm = {"weight": (WIDTH,)} if time else {"weight": (WIDTH,), "bias": (WIDTH,)}
    shapes = {"vocab_embed.embedding": (rows, WIDTH)}
    if time:
        shapes |= {"sigma_map.mlp.0.weight": (LEVEL_WIDTH, 256), "sigma_map.mlp.0.bias": (LEVEL_WIDTH,)}
        shapes |= {"sigma_map.mlp.2.weight": (LEVEL_WIDTH, LEVEL_WIDTH), "sigma_map.mlp.2.bias": (LEVEL_WIDTH,)}
    shapes |= {"rotary_emb.inv_freq": (WIDTH // HEADS // 2,)}
    for i in range(LAYERS):
        block = f"blocks.{i}"
        shapes |= {f"{block}.norm1.{kind}": shape for kind, shape in norm.items()}
        shapes |= {f"{block}.attn_qkv.weight": (3 * WIDTH, WIDTH), f"{block}.attn_out.weight": (WIDTH, WIDTH)}
        shapes |= {f"{block}.norm2.{kind}": shape for kind, shape in norm.items()}
        shapes |= {f"{block}.mlp.0.weight": (4 * WIDTH, WIDTH), f"{block}.mlp.0.bias": (4 * WIDTH,)}
        shapes |= {f"{block}.mlp.2.weight": (WIDTH, 4 * WIDTH), f"{block}.mlp.2.bias": (WIDTH,)}
        if time:
            shapes |= {f"{block}.adaLN_modulation.weight": (6 * WIDTH, LEVEL_WIDTH)}
            shapes |= {f"{block}.adaLN_modulation.bias": (6 * WIDTH,)}
    shapes |= {f"output_layer.norm_final.{kind}": shape for kind, shape in norm.items()}
    shapes |= {"output_layer.linear.weight": (rows, WIDTH), "output_layer.linear.bias": (rows,)}
    if time:
        shapes |= {"output_layer.adaLN_modulation.weight": (2 * WIDTH, LEVEL_WIDTH)}
        shapes |= {"output_layer.adaLN_modulation.bias": (2 * WIDTH,)}
    weights = drawn(shapes, seed)
    size = WIDTH // HEADS
    weights["rotary_emb.inv_freq"] = 1 / 10_000 ** (torch.arange(0, size, 2).float() / size)
    return {prefix + name: tensor for name, tensor in weights.items()}


def drawn(shapes, seed: int = 0) -> dict[str, torch.Tensor]:
    """Large enough for all that reaches the output to show."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.4 for name, shape in shapes.items()}


def weights_of(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    if name == "gpt2":
        return gpt2_weights()
    rows = V if name == "sedd-uniform" else V + 1
    return ddit_weights(rows, not name.startswith("radd"), "backbone." if name == "mdlm" else "", seed)


# Their forward passes, from the papers and the layouts, over their own tensors in float64.


def normed(x, weight, bias=None, eps=1e-5):
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    return y if bias is None else y + bias


def gelu(x):
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + torch.exp(-x))


def turned(x):
    """Rotary: channel c of each half are a complex number, turned by position * 10000^(-2c/d)."""
    *_, length, size = x.shape
    angle = torch.outer(
        torch.arange(length, dtype=torch.float64),
        10_000 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size),
    )
    z = torch.complex(x[..., : size // 2], x[..., size // 2 :]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], -1)


def attended(q, k, v, turn, hidden=None):
    """Attention of heads that lie one after the other in the channels."""
    out = []
    for head in range(HEADS):
        part = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
        a, b = turn(q[..., part]), turn(k[..., part])
        scores = a @ b.transpose(-1, -2) / math.sqrt(WIDTH // HEADS)
        if hidden is not None:
            scores = scores.masked_fill(hidden, -math.inf)
        out.append(scores.softmax(-1) @ v[..., part])
    return torch.cat(out, -1)


def gpt2_logits(weights, tokens):
    w = {name: tensor.double() for name, tensor in weights.items()}
    length = tokens.shape[1]
    x = w["wte.weight"][tokens] + w["wpe.weight"][:length]
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    for i in range(LAYERS):
        p = f"h.{i}."
        h = (
            normed(x, w[p + "ln_1.weight"], w[p + "ln_1.bias"]) @ w[p + "attn.c_attn.weight"]
            + w[p + "attn.c_attn.bias"]
        )
        mixed = attended(h[..., :WIDTH], h[..., WIDTH : 2 * WIDTH], h[..., 2 * WIDTH :], lambda x: x, hidden)
        x = x + mixed @ w[p + "attn.c_proj.weight"] + w[p + "attn.c_proj.bias"]
        h = normed(x, w[p + "ln_2.weight"], w[p + "ln_2.bias"]) @ w[p + "mlp.c_fc.weight"] + w[p + "mlp.c_fc.bias"]
        x = x + gelu(h) @ w[p + "mlp.c_proj.weight"] + w[p + "mlp.c_proj.bias"]
    return normed(x, w["ln_f.weight"], w["ln_f.bias"]) @ w["wte.weight"].T


def ddit_logits(weights, tokens, sigma=None):
    """SEDD's and MDLM's network at `sigma`, or RADD's."""
    w = {name.removeprefix("backbone."): tensor.double() for name, tensor in weights.items()}
    x = w["vocab_embed.embedding"][tokens]
    if sigma is not None:
        angle = sigma[:, None] * torch.exp(-math.log(10_000) * torch.arange(128, dtype=torch.float64) / 128)
        c = torch.cat([angle.cos(), angle.sin()], -1) @ w["sigma_map.mlp.0.weight"].T + w["sigma_map.mlp.0.bias"]
        c = silu(silu(c) @ w["sigma_map.mlp.2.weight"].T + w["sigma_map.mlp.2.bias"])

    def modulation(module):
        out = c @ w[f"{module}.adaLN_modulation.weight"].T + w[f"{module}.adaLN_modulation.bias"]
        return out[:, None].split(WIDTH, -1)

    def norm(name, x, shift, scale):
        y = normed(x, w[f"{name}.weight"], w.get(f"{name}.bias"))
        return y * (1 + scale) + shift

    for i in range(LAYERS):
        p = f"blocks.{i}"
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (0, 0, 1, 0, 0, 1) if sigma is None else modulation(p)
        q, k, v = (norm(f"{p}.norm1", x, shift, scale) @ w[f"{p}.attn_qkv.weight"].T).split(WIDTH, -1)
        x = x + gate * (attended(q, k, v, turned) @ w[f"{p}.attn_out.weight"].T)
        h = norm(f"{p}.norm2", x, mlp_shift, mlp_scale) @ w[f"{p}.mlp.0.weight"].T + w[f"{p}.mlp.0.bias"]
        x = x + mlp_gate * (gelu(h) @ w[f"{p}.mlp.2.weight"].T + w[f"{p}.mlp.2.bias"])
    shift, scale = (0, 0) if sigma is None else modulation("output_layer")
    x = norm("output_layer.norm_final", x, shift, scale)
    return x @ w["output_layer.linear.weight"].T + w["output_layer.linear.bias"]


def sedd_log_scores(name, weights, tokens, sigma):
    """What SEDD's network returns: log scores, 0 at the token that stands there."""
    out = ddit_logits(weights, tokens, sigma)
    if name == "sedd-scaled":
        out = out - torch.log(sigma.exp() - 1)[:, None, None] - math.log(out.shape[-1] - 1)
    return out.scatter(-1, tokens[..., None], 0.0)


# Folders.


def write(folder, name, weights=None, config=None, file="model.safetensors", tokenizer=True):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config or CONFIGS[name]))
    store(folder / file, weights or weights_of(name))
    if tokenizer:
        BYTES.save(folder)
    return folder


def store(path, weights):
    """One file, or shards with an index where the file is one."""
    if path.suffix != ".json":
        save_file(weights, path) if path.suffix == ".safetensors" else torch.save(weights, path)
        return
    whole = path.name.removesuffix(".index.json")
    names, shard_of = list(weights), {}
    for n, part in enumerate((names[::2], names[1::2]), 1):
        stem, _, suffix = whole.rpartition(".")
        shard = f"{stem}-{n:05}-of-00002.{suffix}"
        store(path.parent / shard, {name: weights[name] for name in part})
        shard_of |= dict.fromkeys(part, shard)
    path.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": shard_of}))


FILES = [
    "model.safetensors",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    return {name: write(root / name, name) for name in CONFIGS}


def canvas(rows=4, masked=True):
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(V, (rows, LENGTH), generator=generator)
    return torch.where(torch.rand(x.shape, generator=generator) < 0.5, V, x) if masked else x


def log_q(model, x, level=None):
    """log q at the masked positions."""
    states, _ = model.model(x, x, AnyOrder(level))
    return model.model.log_probs(states, x == V, model.model.denoiser)


def exactly(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


# Logit by logit.


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_gpt2(tmp_path, file, prefix):
    weights = gpt2_weights()
    stored = {prefix + name: tensor for name, tensor in weights.items()}
    if prefix:
        stored["lm_head.weight"] = weights["wte.weight"].clone()
    model = load(write(tmp_path / "gpt2", "gpt2", stored, file=file), dtype="float64")
    x = canvas(masked=False)
    states, _ = model.model(x, x, Infill())
    log_p = model.model.log_probs(states, torch.ones_like(x, dtype=torch.bool)).view(*x.shape, V)
    before = torch.cat([torch.full_like(x[:, :1], 256), x[:, :-1]], 1)
    exactly(log_p, gpt2_logits(weights, before).log_softmax(-1))
    assert (
        model.context == LENGTH and model.method.source == "Radford et al. 2019" and model.decoder == "autoregressive"
    )


def test_gpt2_is_that_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**CONFIGS["gpt2"], eos_token_id=256)).double().eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.4)
    theirs.save_pretrained(tmp_path / "gpt2")
    BYTES.save(tmp_path / "gpt2")
    model = load(tmp_path / "gpt2", dtype="float64")
    x = canvas(masked=False)
    states, _ = model.model(x, x, Infill())
    log_p = model.model.log_probs(states, torch.ones_like(x, dtype=torch.bool)).view(*x.shape, V)
    before = torch.cat([torch.full_like(x[:, :1], 256), x[:, :-1]], 1)
    with torch.no_grad():
        exactly(log_p, theirs(before).logits.log_softmax(-1))


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("name", ["sedd-scaled", "sedd-unscaled"])
def test_sedd(tmp_path, name, file):
    weights = weights_of(name)
    model, x = load(write(tmp_path / name, name, weights, file=file), dtype="float64"), canvas()
    states, _ = model.model(x, x, AnyOrder(SIGMAS))
    theirs = sedd_log_scores(name, weights, x, SIGMAS)[x == V]
    assert (theirs[:, V] == 0).all()  # the row of [M] is 1, and no score here
    exactly(log_scores(model.model, states, x == V, SIGMAS), theirs[:, :V])
    assert model.method.decoder == "tau_leaping" and model.about["method"] == name and model.context == LENGTH
    assert model.about["objective"]["schedule"] == CONFIGS[name]["noise"]["type"]


def test_sedd_uniform(folders):
    model, x = load(folders["sedd-uniform"], dtype="float64"), canvas(masked=False)
    states, _ = model.model(x, x, AnyOrder(SIGMAS))
    ours = log_scores(model.model, states, torch.ones_like(x, dtype=torch.bool), SIGMAS)
    exactly(ours.view(*x.shape, V), sedd_log_scores("sedd-uniform", weights_of("sedd-uniform"), x, SIGMAS))


@pytest.mark.parametrize("file", FILES)
def test_radd(tmp_path, file):
    """Its output is the log softmax over all rows but the last."""
    weights = weights_of("radd-t-dce")
    model, x = load(write(tmp_path / "radd", "radd-t-dce", weights, file=file), dtype="float64"), canvas()
    exactly(log_q(model, x), ddit_logits(weights, x)[x == V][:, :-1].log_softmax(-1))
    assert model.about["method"] == "radd-t-dce" and model.decoder == "ancestral" and model.context == LENGTH


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_mdlm(tmp_path, file, prefix):
    """sbar is 0 whatever the time, and the logit of `[M]` -1e6 (SUBS)."""
    weights = ddit_weights(V + 1, True, prefix)
    model, x = load(write(tmp_path / "mdlm", "mdlm", weights, file=file), dtype="float64"), canvas()
    logits = ddit_logits(weights, x, torch.zeros(len(x), dtype=torch.float64))[x == V]
    logits[:, -1] -= 1e6
    exactly(log_q(model, x), (logits - logits.logsumexp(-1, keepdim=True))[:, :-1])
    assert model.about["method"] == "mdlm" and model.decoder == "ancestral" and model.context == LENGTH


@pytest.mark.parametrize(
    ("loss", "method"),
    [("t_DSE", "radd-dse"), ("lambda_DCE", "radd-lambda-dce"), ("k_DCE", "radd-ao"), (None, "radd-lambda-dce")],
)
def test_radd_says_how_it_was_trained(tmp_path, loss, method):
    config = {**RADD, "training": {"loss_type": loss}}
    assert load(write(tmp_path / "radd", "radd-t-dce", config=config)).about["method"] == method


def test_half_precision_files(tmp_path):
    """All are read, in the precision that is asked for, rotary frequencies as coarse as they are stored too."""
    for name in CONFIGS:
        weights = {key: tensor.bfloat16() for key, tensor in weights_of(name).items()}
        model = load(write(tmp_path / name, name, weights))
        assert {p.dtype for p in model.model.parameters()} == {torch.float32}


class Nested(nn.Module, PyTorchModelHubMixin):
    """Any state as a module that the hub's mixin saves, as SEDD and RADD are saved."""

    def __init__(self, config):
        super().__init__()
        for name, tensor in weights_of("sedd-scaled").items():
            *path, last = name.split(".")
            module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_parameter(last, nn.Parameter(tensor))


def test_saved_by_the_hubs_mixin(tmp_path):
    Nested(SEDD).save_pretrained(tmp_path / "sedd")
    BYTES.save(tmp_path / "sedd")
    model, x = load(tmp_path / "sedd", dtype="float64"), canvas()
    states, _ = model.model(x, x, AnyOrder(SIGMAS))
    theirs = sedd_log_scores("sedd-scaled", weights_of("sedd-scaled"), x, SIGMAS)[x == V]
    exactly(log_scores(model.model, states, x == V, SIGMAS), theirs[:, :V])


@pytest.mark.parametrize("name", ["sedd-scaled", "radd-t-dce"])
def test_a_training_run_gives_its_averaged_weights(tmp_path, name):
    raw, average = weights_of(name), weights_of(name, seed=1)
    shadow = [tensor for key, tensor in average.items() if key != "rotary_emb.inv_freq"]
    state = {
        "optimizer": {"state": {}, "param_groups": [{"lr": 3e-4}]},
        "model": raw,
        "ema": {"decay": 0.9999, "num_updates": 10, "shadow_params": shadow},
        "step": 10,
    }
    run = tmp_path / "run"
    for folder in (".hydra", "checkpoints-meta"):
        (run / folder).mkdir(parents=True)
    (run / ".hydra" / "config.yaml").write_text(yaml.safe_dump(CONFIGS[name]))
    torch.save(state, run / "checkpoints-meta" / "checkpoint.pth")
    BYTES.save(run)
    model, x = load(run, dtype="float64"), canvas()
    if name == "radd-t-dce":
        exactly(log_q(model, x), ddit_logits(average, x)[x == V][:, :-1].log_softmax(-1))
    else:
        states, _ = model.model(x, x, AnyOrder(SIGMAS))
        exactly(
            log_scores(model.model, states, x == V, SIGMAS), sedd_log_scores(name, average, x, SIGMAS)[x == V][:, :V]
        )
    del state["ema"]["shadow_params"][0]
    torch.save(state, run / "checkpoints-meta" / "checkpoint.pth")
    with pytest.raises(InputError, match=r"holds no average of the weights that fits them; ema\.shadow_params"):
        load(run)


# Padded vocabularies.


def test_rows_that_are_no_token_get_no_probability(tmp_path):
    loud = {name: tensor.clone() for name, tensor in gpt2_weights(V + 7).items()}
    loud["wte.weight"][V:] = 100
    model = load(write(tmp_path / "gpt2", "gpt2", loud, {**CONFIGS["gpt2"], "vocab_size": V + 7}), dtype="float64")
    x = canvas(masked=False)
    states, _ = model.model(x, x, Infill())
    log_p = model.model.log_probs(states, torch.ones_like(x, dtype=torch.bool)).view(*x.shape, V)
    before = torch.cat([torch.full_like(x[:, :1], 256), x[:, :-1]], 1)
    exactly(log_p, gpt2_logits(loud, before)[..., :V].log_softmax(-1))
    exactly(log_p.exp().sum(-1), torch.ones(x.shape, dtype=torch.float64))

    padded = {name: tensor.clone() for name, tensor in ddit_weights(V + 5, True, "backbone.").items()}
    padded["backbone.output_layer.linear.bias"][V:] = 100
    folder = write(tmp_path / "mdlm", "mdlm", padded, {**CONFIGS["mdlm"], "vocab_size": V + 5})
    model, x = load(folder, dtype="float64"), canvas()
    theirs = torch.where(x == V, V + 4, x)  # their [M] is the last row
    logits = ddit_logits(padded, theirs, torch.zeros(len(x), dtype=torch.float64))[x == V][:, :V]
    exactly(log_q(model, x), logits.log_softmax(-1))


# What is loaded is a model like any other.


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_from_here_and_loaded_again(folders, name, tmp_path):
    model = load(folders[name])
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    one, other = model.model.state_dict(), again.model.state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert again.model.config == model.model.config and again.tokenizer.fingerprint == model.tokenizer.fingerprint
    assert again.decoder == model.decoder and (again.bound is None) == (model.bound is None)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["method"] == name
    again.model.train().requires_grad_(True)  # and it can be trained on


@pytest.mark.parametrize("name", CONFIGS)
def test_its_own_bound_and_decoder_fit(folders, name):
    model = load(folders[name])
    settings = EvaluationConfig(nfe=(2,), paths=0)
    windows = canvas(2, masked=False)
    likelihoods = caddf.evaluate(model, windows, settings=settings)["likelihoods"]
    kind = "causal" if name == "gpt2" else "diffusion"
    assert 0 < likelihoods[kind]["nll"] < math.inf
    assert (len(likelihoods) == 1) == (name == "gpt2" or name.startswith("sedd"))
    *_, last = caddf.generate(model, "a", max_new_tokens=6, seed=3)
    assert (last.frame.tokens < V).all() and last.results()[0]["prompt"] == "a"
    if name != "gpt2":
        *_, last = caddf.generate(model, template="a[MASK:5]b", seed=3)
        assert last.text.startswith("a") and last.text.endswith("b")


@pytest.mark.parametrize("name", ["radd-t-dce", "mdlm"])
@pytest.mark.parametrize("decoder", ["ancestral", "first_hitting", "confidence", "tau_leaping", "euler", "block"])
def test_a_timeless_denoiser_has_the_decoders_of_any_order(folders, name, decoder):
    *_, last = caddf.generate(load(folders[name]), "ab", max_new_tokens=5, decoder=decoder, seed=1)
    assert (last.frame.tokens < V).all()


def test_a_timeless_denoiser_reads_whole_rows(folders):
    with pytest.raises(InputError, match="block size is 4 in a row of 7"):
        list(caddf.generate(load(folders["radd-t-dce"]), "ab", max_new_tokens=5, decoder="block", block_size=4))


@pytest.mark.parametrize("name", CONFIGS)
def test_info_needs_no_weights(folders, name, tmp_path, capsys):
    folder = shutil.copytree(folders[name], tmp_path / name)
    (folder / "model.safetensors").unlink()
    assert main(["info", str(folder), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    model = load(folders[name]).model
    assert said["parameters"]["total"] == sum(p.numel() for p in model.parameters()) and said["method"] == name
    assert main(["info", str(folder)]) == 0


# The hub.


def fake_hub(root, asked):
    def download(name, revision, token, allow_patterns):
        """What `snapshot_download` does: the files that match, into one folder for all calls."""
        asked.append(allow_patterns)
        target = root / "cache" / name
        target.mkdir(parents=True, exist_ok=True)
        for path in (root / name).iterdir():
            if any(fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, target)
        return str(target)

    return download


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("source", ["hf:{}", "{}"])
def test_from_the_hub(tmp_path, monkeypatch, file, source):
    (tmp_path / "louaaron").mkdir()
    write(tmp_path / "louaaron" / "sedd-small", "sedd-scaled", file=file, tokenizer=False)
    asked: list[list[str]] = []
    monkeypatch.setattr(caddf.text_model, "snapshot_download", fake_hub(tmp_path, asked))
    monkeypatch.setattr(Tokenizer, "gpt2", classmethod(lambda cls: BYTES))
    model = load(source.format("louaaron/sedd-small"))
    assert isinstance(model, TextModel) and model.about["method"] == "sedd-scaled" and model.tokenizer is BYTES
    assert len(asked) == 1 + file.startswith("pytorch")  # pickles are fetched only where there is nothing else


def test_the_tokenizer_may_lie_beside_the_weights_in_two_files(tmp_path):
    folder = write(tmp_path / "radd", "radd-t-dce", tokenizer=False)
    (folder / "vocab.json").write_text(json.dumps(BYTES.vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    assert load(folder).tokenizer.fingerprint == BYTES.fingerprint


def test_without_a_tokenizer(tmp_path, monkeypatch):
    def away(cls):
        raise InputError("no network")

    monkeypatch.setattr(Tokenizer, "gpt2", classmethod(away))
    with pytest.raises(InputError, match=r"holds no tokenizer, and GPT-2's .* put vocab\.json and merges\.txt"):
        load(write(tmp_path / "radd", "radd-t-dce", tokenizer=False))


def test_with_the_tokenizer_of_another(tmp_path):
    folder = write(tmp_path / "radd", "radd-t-dce", tokenizer=False)
    Tokenizer.train("bpe:300", ["some text, and some more text of that kind"] * 3).save(folder)
    with pytest.raises(InputError, match=r"the tokenizer has \d+ tokens, the model 257"):
        load(folder)


# What is not of a layout is refused.


def changed(name, **parts):
    """A configuration with other values, of parts too."""
    config = json.loads(json.dumps(CONFIGS[name]))
    for key, value in parts.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    return config


@pytest.mark.parametrize(
    ("name", "config", "sentence"),
    [
        (
            "gpt2",
            changed("gpt2", activation_function="relu"),
            "is 'relu'; this project's networks have 'gelu_new' or",
        ),
        ("gpt2", changed("gpt2", layer_norm_epsilon=1e-6), "layer_norm_epsilon is 1e-06"),
        ("gpt2", changed("gpt2", n_inner=24), "n_inner is 24"),
        ("gpt2", changed("gpt2", tie_word_embeddings=False), "tie_word_embeddings is False"),
        ("gpt2", changed("gpt2", n_layer="two"), "n_layer is 'two'; it must be a whole number of 1 or more"),
        ("gpt2", changed("gpt2", n_head=3), "width 16 over 3 heads"),
        ("gpt2", changed("gpt2", n_positions=LENGTH + 1), r"another shape for wpe\.weight"),
        ("sedd-scaled", changed("sedd-scaled", model={"n_heads": None}), r"model\.n_heads is None"),
        ("sedd-scaled", changed("sedd-scaled", graph={"type": "tree"}), r"graph\.type is 'tree'"),
        ("sedd-scaled", changed("sedd-scaled", noise={"type": "cosine"}), r"noise\.type is 'cosine'"),
        (
            "sedd-unscaled",
            changed("sedd-unscaled", noise={"sigma_max": 10}),
            r"noise\.sigma_max is 10; this project's networks have 20",
        ),
        ("sedd-uniform", changed("sedd-uniform", model={"scale_by_sigma": True}), r"model\.scale_by_sigma is True"),
        ("sedd-scaled", changed("sedd-scaled", model={"cond_dim": 8}), r"another shape for sigma_map"),
        (
            "sedd-scaled",
            changed("sedd-scaled", model={"n_blocks": 3}),
            r"misses blocks\.2",
        ),
        ("sedd-scaled", changed("sedd-scaled", tokens=V + 3), "tokens is 260; its tokenizer has 257"),
        ("radd-t-dce", changed("radd-t-dce", model={"n_blocks": 1}), r"has unexpected blocks\.1"),
        ("radd-t-dce", changed("radd-t-dce", tokens=V + 3), r"another shape for vocab_embed\.embedding"),
        ("radd-t-dce", changed("radd-t-dce", model={"n_heads": 4}), r"rotary_emb\.inv_freq is not that of base 10,000"),
        (
            "mdlm",
            changed("mdlm", time_conditioning=True),
            "time_conditioning is True; this project's",
        ),
        ("mdlm", changed("mdlm", hidden_dim=-1), "hidden_dim is -1"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, name, config, sentence):
    with pytest.raises(InputError, match=sentence):
        load(write(tmp_path / name, name, config=config))


def without(weights, name):
    return {key: tensor for key, tensor in weights.items() if key != name}


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("gpt2", lambda w: without(w, "h.1.mlp.c_fc.bias"), r"misses h\.1\.mlp\.c_fc\.bias"),
        ("gpt2", lambda w: w | {"extra": torch.zeros(1)}, "has unexpected extra"),
        ("gpt2", lambda w: w | {"lm_head.weight": w["wte.weight"] + 1}, r"has unexpected lm_head\.weight"),
        (
            "gpt2",
            lambda w: w | {"ln_f.bias": torch.zeros(3)},
            r"another shape for ln_f\.bias \(\(3,\)",
        ),
        ("sedd-scaled", lambda w: without(w, "sigma_map.mlp.2.bias"), r"misses sigma_map\.mlp\.2\.bias"),
        ("sedd-scaled", lambda w: w | {"blocks.0.norm1.bias": torch.zeros(16)}, r"unexpected blocks\.0\.norm1\.bias"),
        ("sedd-scaled", lambda w: w | {"rotary_emb.inv_freq": torch.ones(4)}, "is not that of base 10,000"),
        ("radd-t-dce", lambda w: without(w, "blocks.0.norm1.bias"), r"misses blocks\.0\.norm1\.bias"),
        ("mdlm", lambda w: without(w, "backbone.output_layer.linear.bias"), r"misses output_layer\.linear\.bias"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, name, change, sentence):
    with pytest.raises(InputError, match=sentence):
        load(write(tmp_path / name, name, change(weights_of(name))))


class Trap:
    """What a pickle could run."""

    def __reduce__(self):
        return (pytest.fail, ("code in the checkpoint was run",))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: torch.save({"a": Trap()}, folder / "pytorch_model.bin"), "could run code and is not loaded"),
        (lambda folder: torch.save([1, 2], folder / "pytorch_model.bin"), "no file of weights; names with tensors"),
        (lambda folder: torch.save({"a": 1}, folder / "pytorch_model.bin"), "no file of weights; names with tensors"),
        (lambda folder: (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04 half"), "is truncated or no file"),
        (lambda folder: (folder / "pytorch_model.bin").write_bytes(b""), "is truncated or no file"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"{"), "is truncated or no safetensors file"),
        (lambda folder: (folder / "pytorch_model.bin.index.json").write_text("{}"), "it needs a weight_map"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}'),
            "does not say which files beside it",
        ),
        (lambda folder: None, "holds no weights; model.safetensors or pytorch_model.bin"),
    ],
)
def test_files_that_are_damaged_or_could_run_code(tmp_path, damage, sentence):
    folder = write(tmp_path / "radd", "radd-t-dce")
    (folder / "model.safetensors").unlink()
    damage(folder)
    with pytest.raises(InputError, match=sentence):
        load(folder)


def test_a_run_whose_settings_are_no_yaml(tmp_path):
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "config.yaml").write_text("model: [")
    with pytest.raises(InputError, match="is not YAML"):
        load(tmp_path)
