"""Models from settings, from disk, from the hub, and from other models' weights."""

import json
import shutil
from fnmatch import fnmatch

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import load_file, save_file

import caddf.text_model
from caddf import InputError, TextModel, load
from caddf.checkpoint import load_tensors
from caddf.interface import AnyOrder, Block, Infill
from caddf.model_settings import ModelSettings
from caddf.models.backbone import DualBranch
from caddf.models.causal_model import CausalConfig, CausalModel
from caddf.models.config import BranchConfig
from caddf.text_model import initialise_from, model_folder
from caddf.tokenizer import Tokenizer

BYTES = Tokenizer.plain_bytes()


def dual_branch(**settings):
    return DualBranch(ModelSettings(size="debug", **settings).dual(BYTES.vocab_size, BYTES.eos_id))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return TextModel(dual_branch(), BYTES, {"method": "caddf-lambda-dce"})


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    model.save_pretrained(folder := tmp_path_factory.mktemp("experiment") / "model")
    return folder


def equal(one, other):
    """Whether two models are the same bit for bit."""
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Saved and loaded.


def test_loaded_is_saved_bit_for_bit(model, saved):
    again = load(saved)
    assert equal(again.model, model.model) and again.model.config == model.model.config
    assert again.tokenizer.fingerprint == BYTES.fingerprint and again.about["method"] == "caddf-lambda-dce"
    assert not again.model.training and not any(p.requires_grad for p in again.model.parameters())
    assert again.device == torch.device("cpu") and again.context == 32


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", torch.float64])
def test_loaded_in_another_dtype(model, saved, dtype):
    again = load(saved, dtype=dtype).model
    kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    x = torch.arange(32)[None]
    states, _ = again(x, x, AnyOrder())
    log_q = again.log_probs(states, torch.ones_like(x, dtype=torch.bool))
    assert {p.dtype for p in again.parameters()} == {kind}
    assert log_q.dtype == (torch.float64 if kind == torch.float64 else torch.float32)  # float32 or better
    torch.testing.assert_close(log_q.exp().sum(-1), torch.ones(32, dtype=log_q.dtype))


def test_a_folder_that_exists_is_not_written_to(model, saved):
    with pytest.raises(InputError, match="exists"):
        model.save_pretrained(saved)


def test_tokenizer_and_model_must_have_one_vocabulary(model):
    with pytest.raises(InputError, match="the tokenizer has 257 tokens, the model 300"):
        TextModel(DualBranch(ModelSettings(size="debug").dual(300, 0)), BYTES)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: truncate(folder / "model.safetensors"), "is truncated or no safetensors file"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be read"),
        (lambda folder: save_file({"a": torch.zeros(1)}, folder / "model.safetensors"), "does not fit the model"),
        (lambda folder: truncate(folder / "config.json"), "is not whole JSON"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'), "a caddf model of format 1"),
        (lambda folder: truncate(folder / "tokenizer.json"), "is not a byte-level BPE tokenizer"),
        (lambda folder: (folder / "config.json").unlink(), "is no model folder"),
        (lambda folder: spoil(folder / "model.safetensors"), "holds numbers in .* that are not finite"),
    ],
)
def test_damaged_and_foreign_folders_are_refused(saved, tmp_path, damage, sentence):
    damage(shutil.copytree(saved, tmp_path / "model"))
    with pytest.raises(InputError, match=sentence):
        load(tmp_path / "model")


def spoil(path):
    tensors = load_file(path)
    next(tensor for tensor in tensors.values() if tensor.is_floating_point()).view(-1)[-1] = torch.inf
    save_file(tensors, path)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"dtype": "float8"}, "dtype is float8; it must be one of float32, bfloat16, float64"),
        ({"device": "abacus"}, "device is abacus, which this machine does not have"),
    ],
)
def test_devices_and_dtypes_that_are_not_there(saved, settings, sentence):
    with pytest.raises(InputError, match=sentence):
        load(saved, **settings)


# The hub.


class Hub:
    """What `push_to_hub` asks of `HfApi`; repositories are folders."""

    def __init__(self, root, token=None):
        self.root, self.token, self.created = root, token, {}

    def create_repo(self, repo_id, private, exist_ok):
        self.created[repo_id] = (private, exist_ok)

    def upload_folder(self, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, self.root / repo_id)
        return f"https://huggingface.co/{repo_id}"

    def download(self, name, revision, token, allow_patterns):
        if not (self.root / name).is_dir():
            raise RepositoryNotFoundError(
                "no such repository", response=type("R", (), {"headers": {}, "request": None})()
            )
        files = [path.name for path in (self.root / name).iterdir()]
        assert all(any(fnmatch(file, pattern) for pattern in allow_patterns) for file in files)
        return str(self.root / name)


def test_pushed_to_the_hub_and_loaded_from_it(model, tmp_path, monkeypatch):
    hub = Hub(tmp_path)
    monkeypatch.setattr(caddf.text_model, "HfApi", lambda token: hub)
    monkeypatch.setattr(caddf.text_model, "snapshot_download", hub.download)
    assert model.push_to_hub("someone/model", private=True, token="t") == "https://huggingface.co/someone/model"
    assert hub.created == {"someone/model": (True, True)}
    monkeypatch.chdir(tmp_path / "someone")  # where no folder has the repository's name
    assert equal(load("someone/model").model, model.model)
    assert equal(load("hf:someone/model").model, model.model)
    with pytest.raises(InputError, match="other/model does not exist here, and is not to be had from the hub"):
        load("other/model")


def test_a_name_that_is_neither_path_nor_repository():
    with pytest.raises(InputError, match="nowhere does not exist; give a run, a model folder, or OWNER/NAME"):
        model_folder("nowhere")


# Weights of other models.


def test_weights_of_another_run(model, saved):
    other = dual_branch(block_size=4, fusion="none", exchange="one_way")
    fresh = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    kept = initialise_from(other, saved, BYTES)
    own = model.model.state_dict()
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, fresh[name] if name in kept else own[name]), name
    assert kept and all(name.startswith("fusion") for name in kept)
    assert initialise_from(twin := dual_branch(), saved, BYTES) == [] and equal(twin, model.model)


@torch.inference_mode()
def test_a_token_shift_and_the_fusions_own_state_begin_as_none(model, saved, tmp_path):
    TextModel(plain := dual_branch(token_shift=False, own_state=False), BYTES).save_pretrained(tmp_path / "plain")
    grown = dual_branch()
    anew = initialise_from(grown, tmp_path / "plain", BYTES)
    assert anew == ["causal.shifted.map", "chain.shifted.map", "fusion.mixer.own.weight"]
    x0 = torch.arange(64).view(2, 32)
    for pattern in (Infill(), Block(8)):
        one, other = (network(x0, torch.full_like(x0, network.mask_id), pattern)[0] for network in (plain, grown))
        assert torch.equal(one.fused, other.fused) and torch.equal(one.draft, other.draft)
    with pytest.raises(InputError, match=r"token_shift=True.*; this model's is BranchConfig.*token_shift=False"):
        initialise_from(plain, saved, BYTES)
    alone = CausalModel(CausalConfig(BYTES.vocab_size, 32, BranchConfig(2, 32, 2, token_shift=True)))
    TextModel(alone, BYTES, {"architecture": "causal"}).save_pretrained(tmp_path / "alone")
    with pytest.raises(InputError, match=r"whose causal branch is .*token_shift=True"):
        initialise_from(plain, tmp_path / "alone", BYTES)


def test_weights_that_do_not_fit(saved, tmp_path):
    with pytest.raises(InputError, match=r"whose causal branch is BranchConfig.*; this model's is BranchConfig"):
        initialise_from(dual_branch(bias=True), saved, BYTES)
    with pytest.raises(InputError, match="has another tokenizer than the data; prepare them with --tokenizer"):
        initialise_from(dual_branch(), saved, Tokenizer.train("bpe:260", ["some text, some more text"] * 3))
    TextModel(dual_branch(context=48, positions="learned"), BYTES).save_pretrained(tmp_path / "longer")
    with pytest.raises(InputError, match=r"causal.table.weight has shape \(48, 32\); this model's has \(32, 32\)"):
        initialise_from(dual_branch(positions="learned"), tmp_path / "longer", BYTES)


GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 257, "n_positions": 40}


def random_gpt2():
    """GPT-2's weights by the names of `transformers`: matrices are [in, out]."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator) * 0.3  # noqa: E731
    width = GPT2["n_embd"]
    weights = {"wte.weight": draw(GPT2["vocab_size"], width), "wpe.weight": draw(GPT2["n_positions"], width)}
    for i in range(GPT2["n_layer"]):
        shapes = {
            "attn.c_attn": (width, 3 * width),
            "attn.c_proj": (width, width),
            "mlp.c_fc": (width, 4 * width),
            "mlp.c_proj": (4 * width, width),
        }
        for name, shape in shapes.items():
            weights |= {f"h.{i}.{name}.weight": draw(*shape), f"h.{i}.{name}.bias": draw(shape[1])}
        for name in ("ln_1", "ln_2"):
            weights |= {f"h.{i}.{name}.weight": 1 + draw(width), f"h.{i}.{name}.bias": draw(width)}
    return weights | {"ln_f.weight": 1 + draw(width), "ln_f.bias": draw(width)}


def gpt2_log_probs(w, tokens):
    """GPT-2 as it is published: pre-norm, tanh GELU, learned positions, tied head."""
    w = {name: tensor.double() for name, tensor in w.items()}
    length, heads = len(tokens), GPT2["n_head"]
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])  # noqa: E731
    linear = lambda x, name: x @ w[f"{name}.weight"] + w[f"{name}.bias"]  # noqa: E731
    x = w["wte.weight"][tokens] + w["wpe.weight"][:length]
    for i in range(GPT2["n_layer"]):
        q, k, v = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").chunk(3, -1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(0, 1) for part in (q, k, v))
        scores = q @ k.transpose(1, 2) / k.shape[-1] ** 0.5
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
        x = x + linear(mixed.transpose(0, 1).flatten(1), f"h.{i}.attn.c_proj")
        x = x + linear(
            F.gelu(linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"), approximate="tanh"), f"h.{i}.mlp.c_proj"
        )
    return (norm(x, "ln_f") @ w["wte.weight"].T).log_softmax(-1)


def gpt2_folder(folder, weights, prefix="", file="model.safetensors", **config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(GPT2 | config))
    named = {prefix + name: tensor for name, tensor in weights.items()}
    if file == "model.safetensors":
        save_file(named, folder / file)
    else:
        torch.save(named, folder / file)
    return folder


@pytest.mark.parametrize(
    ("file", "prefix"), [("model.safetensors", ""), ("model.safetensors", "transformer."), ("pytorch_model.bin", "")]
)
def test_gpt2_starts_the_causal_branch(tmp_path, file, prefix):
    weights = random_gpt2()
    folder = gpt2_folder(tmp_path / "gpt2", weights, prefix, file)
    torch.manual_seed(1)
    model = dual_branch(positions="learned", bias=True).double()
    rows = model.causal.embedding.weight.detach().clone()
    kept = initialise_from(model, folder, BYTES)
    assert kept and not any(name.startswith("causal.") for name in kept)
    x = torch.randint(257, (1, 32), generator=torch.Generator().manual_seed(0))
    states, _ = model(x, torch.full_like(x, model.mask_id), Infill())
    log_p = model.log_probs(states, torch.ones_like(x, dtype=torch.bool), "causal")
    # <|endoftext|> is what GPT-2 reads before the first token.
    torch.testing.assert_close(log_p, gpt2_log_probs(weights, torch.cat([torch.tensor([BYTES.eos_id]), x[0, :-1]])))
    assert torch.equal(model.causal.embedding.weight[257:], rows[257:])  # [M] and the rows of no token


@pytest.mark.parametrize(
    ("config", "settings", "sentence"),
    [
        ({}, {}, r"learned positions and biases \(model.positions learned, model.bias true\)"),
        ({}, {"causal": "off", "bias": True}, "needs a causal branch"),
        ({"n_layer": 3}, {}, "a GPT-2 whose n_layer is 3; this model's is 2"),
        ({"n_head": 4}, {}, "n_head is 4; this model's is 2"),
        ({"n_embd": 64}, {}, "n_embd is 64; this model's is 32"),
        ({"vocab_size": 50257}, {}, "vocab_size is 50257; this model's is 257"),
        ({}, {"context": 48}, "a GPT-2 of 40 positions; the context is 48: set model.context"),
    ],
)
def test_a_gpt2_that_does_not_fit(tmp_path, config, settings, sentence):
    folder = gpt2_folder(tmp_path / "gpt2", random_gpt2(), **config)
    like_gpt2 = {} if sentence.startswith("learned") else {"positions": "learned", "bias": True}
    with pytest.raises(InputError, match=sentence):
        initialise_from(dual_branch(**like_gpt2 | settings), folder, BYTES)


def test_a_gpt2_that_is_truncated(tmp_path):
    weights = random_gpt2()
    like_gpt2 = dual_branch(positions="learned", bias=True)
    del weights["h.1.mlp.c_fc.bias"]
    folder = gpt2_folder(tmp_path / "lacking", weights)
    with pytest.raises(InputError, match=r"misses h\.1\.mlp\.c_fc\.bias"):
        initialise_from(like_gpt2, folder, BYTES)
    truncate(folder / "model.safetensors")
    with pytest.raises(InputError, match="is truncated or no safetensors file"):
        initialise_from(like_gpt2, folder, BYTES)
    folder = gpt2_folder(tmp_path / "pickled", random_gpt2(), file="pytorch_model.bin")
    truncate(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="is truncated or no file of weights"):
        initialise_from(like_gpt2, folder, BYTES)


# Settings.


def test_saved_weights_are_the_models_own(model, saved):
    assert load_tensors(saved / "model.safetensors").keys() == model.model.state_dict().keys()
