"""Prompt or template to frames: what comes out, what ends it, and what is refused before anything is decoded."""

import dataclasses
import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from over_bytes import text_model

from caddf import InputError, TextModel, generate
from caddf.categorical import RowGenerators, Warp
from caddf.decoding import DECODERS, Autoregressive, FirstHitting, Speculative, Task
from caddf.decoding.task import DecodingError
from caddf.denoiser import as_model
from caddf.models.backbone import DualBranch
from caddf.models.config import BranchConfig, ModelConfig
from caddf.snapshots import StopWords, settled
from caddf.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def model():
    return text_model(scale=3.0)


@pytest.fixture(scope="module")
def broken():
    """Both branches give no numbers."""
    model = text_model(scale=3.0)
    for layer in (*model.model.causal.layers, *model.model.diffusion.layers):
        layer.mlp.up.weight.fill_(torch.nan)
    return model


def last(*arguments, **settings):
    *_, frame = generate(*arguments, **settings)
    return frame


@pytest.mark.parametrize("decoder", sorted(DECODERS.keys() - {"d3pm_absorbing", "d3pm_uniform", "gaussian"}))
def test_frames_fill_the_prompt_and_then_the_template(model, decoder):
    frames = list(generate(model, "ab", decoder=decoder, max_new_tokens=6, seed=3))
    assert [frame.texts[0] == frame.text for frame in frames] == [True] * len(frames)
    (result,) = frames[-1].results()
    assert result["text"] == frames[-1].text and result["prompt"] == "ab" and result["seed"] == 3
    assert result["tokens"] <= 6 and result["tokens_per_second"] > 0 and result["tokens_per_evaluation"] > 0
    assert 0 <= result["cache_hit_rate"] < 1
    assert result["evaluations"]["causal"] + result["evaluations"]["diffusion"] > 0

    filled = last(model, template="ab[MASK:5]cd[MASK]", decoder=decoder)
    raw = filled.frame.tokens[0].tolist()
    assert raw[:2] == [*b"ab"] and raw[7:9] == [*b"cd"] and len(raw) == 10
    assert model.model.mask_id not in raw and model.tokenizer.eos_id not in raw
    assert filled.results()[0]["tokens"] == 6


@pytest.mark.parametrize("decoder", sorted(DECODERS.keys() - {"d3pm_absorbing", "d3pm_uniform", "gaussian"}))
def test_a_row_gets_what_it_would_get_alone(model, decoder):
    prompts = ["a", "a longer one"]
    batch = last(model, prompts, decoder=decoder, max_new_tokens=9, seed=5)
    alone = [last(model, prompt, decoder=decoder, max_new_tokens=9, seed=5 + r) for r, prompt in enumerate(prompts)]
    assert batch.texts == [frame.text for frame in alone]
    for row, frame in zip(batch.results(), alone, strict=True):
        (single,) = frame.results()
        for key in ("tokens", "evaluations", "rounds", "cache_hit_rate", "seed"):
            assert row[key] == single[key], key


@pytest.mark.parametrize("decoder", ["speculative", "confidence"])
def test_rows_may_have_seeds_and_lengths_of_their_own(model, decoder):
    prompts, new, seeds = ["a", "bc", "a"], [3, 11, 7], [9, 2**40, 9]
    batch = last(model, prompts, decoder=decoder, max_new_tokens=new, seed=seeds)
    for r, (prompt, many, seed) in enumerate(zip(prompts, new, seeds, strict=True)):
        assert batch.texts[r] == last(model, prompt, decoder=decoder, max_new_tokens=many, seed=seed).text
        assert batch.results()[r]["seed"] == seed


def test_it_is_told_when_a_row_has_ended_and_by_what(model):
    frames = list(generate(model, ["ab", "c"], max_new_tokens=[2, 20], seed=1))
    reasons = [[result["ended_by"] for result in frame.results()] for frame in frames]
    assert reasons[-1] == ["length", "length"] and ["length", None] in reasons
    assert all([end is not None for end in row] == frame.ended for row, frame in zip(reasons, frames, strict=True))
    text = frames[-1].texts[1]
    stopped = last(model, ["ab", "c"], max_new_tokens=[2, 20], seed=1, stop=text[5:8])
    assert stopped.results()[1]["ended_by"] == "stop" and stopped.texts[1] == text[: text.index(text[5:8])]


@pytest.mark.parametrize("target", ["causal", "fused"])
@pytest.mark.parametrize("prompt", ["", "x", "def f(self):"])
def test_greedy_speculation_writes_what_autoregression_writes(model, target, prompt):
    same = dict(target=target, temperature=0.0, max_new_tokens=20)
    drafted = last(model, prompt, decoder="speculative", **same)
    assert drafted.text == last(model, prompt, decoder="autoregressive", **same).text
    assert drafted.text == last(model, prompt, decoder="speculative", seed=9, **same).text


def test_end_of_text_ends_a_row(model):
    longest = last(model, "x", decoder="autoregressive", max_new_tokens=200, seed=1)
    raw = longest.frame.tokens[0].tolist()[1:]
    assert model.tokenizer.eos_id in raw  # 1 in 257 a token, and the seed is one that has it
    end = raw.index(model.tokenizer.eos_id)
    assert longest.results()[0]["tokens"] == end and set(raw[end + 1 :]) <= {model.model.mask_id}


@given(st.lists(st.text("ab\u00e9", min_size=1, max_size=3), min_size=1, max_size=3), st.randoms())
def test_stop_strings_are_looked_for_in_what_is_new(stop, random):
    tokenizer, tokens = Tokenizer.plain_bytes(), []
    words = StopWords(tuple(stop), tokenizer)
    for _ in range(12):
        if random.random() < 0.2:
            tokens = tokens[: random.randrange(len(tokens) + 1)]  # a decoder took some back
        tokens = tokens + [i for _ in range(random.randrange(3)) for i in tokenizer.encode(random.choice("ab\u00e9c"))]
        text = tokenizer.decode(tokens)
        assert words.met(list(tokens)) == any(word in text for word in stop)


def test_stop_ends_a_row_and_is_cut_off(model):
    whole = last(model, "x", decoder="autoregressive", max_new_tokens=20).text
    stop = whole[7:9]
    for decoder in ("autoregressive", "speculative"):
        stopped = last(model, "x", decoder=decoder, max_new_tokens=20, stop=["never", stop], seed=0)
        assert stop not in stopped.text and "never" not in stopped.text
    cut = last(model, "x", decoder="autoregressive", max_new_tokens=20, stop=stop)
    assert cut.text == whole[: whole.index(stop)] and cut.results()[0]["tokens"] < 20


def test_pieces_say_what_became_of_each_token(model):
    frames = [each for seed in range(3) for each in generate(model, "ab", max_new_tokens=12, seed=seed)]
    kinds = {kind for frame in frames for _, kind in frame.pieces()}
    assert kinds == {"given", "open", "kept", "fresh", "corrected", "rejected"}  # a random model's drafts are rejected
    for frame in frames:
        shown = [piece for piece, kind in frame.pieces() if kind != "rejected"]
        assert len(shown) == 14 and shown[:2] == ["a", "b"]
        assert shown.count("_") >= sum(kind == "open" for _, kind in frame.pieces())


def test_left_to_right_goes_beyond_the_context(model):
    assert last(model, "x", decoder="autoregressive", max_new_tokens=50, seed=2).frame.tokens.shape == (1, 51)


@pytest.mark.parametrize("target", ["causal", "fused"])
@pytest.mark.parametrize("decoder", ["autoregressive", "speculative"])
def test_a_prompt_may_be_longer_than_the_context(model, decoder, target):
    """What it says of the text behind it does not depend on caches, nor on whether it was given or drawn."""
    settings = {"decoder": decoder, "target": target, "temperature": 0.0}
    drawn = last(model, "ab", max_new_tokens=60, **settings)
    tokens, mask = drawn.frame.tokens, model.model.mask_id
    begun = torch.where(torch.arange(tokens.shape[1]) < 45, tokens, mask)
    assert (tokens[:, :45] != mask).all()
    task = Task(begun, torch.tensor([tokens.shape[1]]), mask, RowGenerators(0, 1), Warp(0.0), drawn.task.finished)
    with torch.inference_mode():
        *_, again = DECODERS[decoder](target=target)(model.model, task)
    assert torch.equal(again.tokens, tokens)
    prompt = ["the old man " * 6, "x"]
    one, other = (last(model, prompt, max_new_tokens=12, cache=cache, **settings) for cache in (True, False))
    assert torch.equal(one.frame.tokens, other.frame.tokens)


def test_texts_grow_and_take_nothing_back(model):
    """Left to right, with stop strings that begin over and over, and characters of several tokens."""
    assert settled("abc", ("cd", "bcd")) == "a" and settled("abc", ("abc", "x")) == "abc"
    assert settled("ab\ufffd", ()) == "ab" and settled("", ("a",)) == "" and settled("ccc", ("cccd",)) == ""
    vowels = [a + b for a in "aeiou \x00\x01" for b in "0123456789"]
    for seed in range(6):
        given = {"max_new_tokens": 30, "seed": seed, "stop": vowels, "temperature": 1.3}
        texts = [frame.text for frame in generate(model, "日本 é", **given)]
        assert all(later.startswith(text) for text, later in itertools.pairwise(texts))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({}, "give either a prompt or a template"),
        ({"prompt": "a", "template": "b[MASK]"}, "give either a prompt or a template"),
        ({"prompt": []}, "no prompt is given"),
        ({"template": "no hole"}, r"no \[MASK\] to fill"),
        ({"template": "[MASK:0]"}, "it must lie between 1 and 32"),
        ({"template": "[MASK:2]", "max_new_tokens": 3}, "max_new_tokens is set, beside a template, whose holes say"),
        ({"template": "[MASK:2]", "stop": "x"}, "stop is set, beside a template"),
        ({"template": "[MASK:2]", "target": "causal"}, "target is causal, beside a template"),
        ({"template": f"[MASK:{10**12}]"}, "it must lie between 1 and 32"),
        ({"template": "[MASK:30]abc"}, "the template has 33 tokens; it must fit the context, 32"),
        ({"prompt": "a" * 32, "decoder": "block"}, "has 32 tokens; with this decoder and model it must be shorter"),
        (
            {"prompt": "a", "decoder": "ancestral", "max_new_tokens": 32},
            "make 33; with this decoder and model they must fit",
        ),
        ({"prompt": "a", "decoder": "beam"}, "decoder is beam; it must be one of ancestral"),
        ({"prompt": "a", "steps": 3}, "steps is set, but the decoder speculative has no such setting; it has target"),
        ({"prompt": "a", "batch": 2}, "batch is set, .* and all decoders have max_new_tokens, temperature, top_k"),
        ({"prompt": "a", "block_size": 33}, "block_size is 33; it must lie between 1 and the context, 32"),
        ({"prompt": "a", "block_size": 0}, "block_size is 0; it must lie between 1"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens is 0; it must be 1 or more"),
        ({"prompt": ["a", "b"], "max_new_tokens": [3, 0]}, "max_new_tokens holds 0; each must be 1 or more"),
        ({"prompt": "a", "max_new_tokens": [3, 4]}, "max_new_tokens has 2 values for 1 rows; give one for all, or one"),
        ({"prompt": ["a", "b"], "seed": [3]}, "seed has 1 values for 2 rows; give one for all, or one for each"),
        ({"prompt": ["a", "b"], "seed": [3, -1]}, "seed is -1; it must be 0 or more"),
        ({"prompt": "a", "stop": ["x", ""]}, "stop holds an empty string"),
        ({"prompt": "a", "seed": -1}, "seed is -1; it must be 0 or more"),
        ({"prompt": "a", "seed": 2**63}, "seed is 9223372036854775808"),
        ({"prompt": "a", "temperature": float("nan")}, "temperature is nan"),
        ({"prompt": "a", "top_p": 0.0}, "top_p is 0.0"),
        ({"prompt": "a\udc80"}, "lone surrogate"),
    ],
)
def test_bad_input_is_refused_before_the_first_frame(model, given, sentence):
    with pytest.raises(InputError, match=sentence):
        generate(model, given.pop("prompt", None), **given)


def test_without_a_causal_branch_nothing_reads_left_to_right():
    model = text_model(scale=3.0, causal="off")
    assert last(model, "a", decoder="ancestral", max_new_tokens=4).results()[0]["evaluations"]["causal"] == 0
    with pytest.raises(InputError, match="this model does not read left to right"):
        last(model, "a", decoder="speculative", max_new_tokens=4)
    assert last(model, "a", max_new_tokens=4).text == last(model, "a", decoder="ancestral", max_new_tokens=4).text


@pytest.mark.parametrize("decoder", [Autoregressive(), Speculative(target="fused", block_size=2), FirstHitting()])
def test_a_plain_function_is_decoded_from(decoder):
    """Token v follows v - 1: the function is sure of it, so every decoder writes the same."""

    def counting(x_t):
        guess = (torch.arange(x_t.shape[1]) % 5).expand_as(x_t)
        return torch.nn.functional.one_hot(guess, 5).double().log()

    task = Task(torch.full((1, 7), 5), torch.tensor([7]), 5, RowGenerators(0, 1))
    *_, frame = decoder(as_model(counting, 5), task)
    assert frame.tokens.tolist() == [[0, 1, 2, 3, 4, 0, 1]]


def test_a_hole_that_is_none_is_named(model):
    with pytest.raises(InputError, match=re.escape("the template's [MASK:x] is no hole; write [MASK], or [MASK:24]")):
        generate(model, template="a[MASK:4] b[MASK:x] c")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"prompt": "a", "decoder": "d3pm_uniform"}, "d3pm_uniform, which is for models of D3PM's uniform chain alone"),
        ({"prompt": "a", "decoder": "gaussian"}, "gaussian, which is PLAID's alone"),
        (
            {"prompt": "a", "decoder": "ancestral", "schedule": "linear"},
            "schedule is linear; it must be one of loglinear",
        ),
        ({"prompt": "a", "target": "fusd"}, "target is fusd; it must be one of causal, fused"),
        (
            {"prompt": "a", "decoder": "first_hitting", "until": 0.5},
            "until is set, .* it has none, and all decoders have",
        ),
        (
            {"prompt": "a", "temperature": 1e-309},
            "temperature is 1e-309; it must be 0 .greedy., or finite and at least 1e-06",
        ),
    ],
)
def test_another_methods_decoder_is_refused(model, given, sentence):
    with pytest.raises(InputError, match=sentence):
        generate(model, **given)


def test_more_drafts_than_a_block_has(model):
    with pytest.raises(InputError, match="drafts is 5; it must be at most the block size, which is 4"):
        generate(model, "a", block_size=4, drafts=5)


def test_a_model_that_reads_left_to_right_alone_says_so():
    gpt2 = text_model("gpt2", context=24)
    with pytest.raises(
        InputError, match="a template is given to a model that reads left to right alone; give a prompt"
    ):
        generate(gpt2, template="a[MASK:4]")
    with pytest.raises(InputError, match="nothing to draft with but its text: this gpt2 model's own decoder is auto"):
        generate(gpt2, "a", decoder="speculative", lookup=0)
    *_, last = generate(gpt2, "abcabcabc", decoder="speculative", max_new_tokens=6, temperature=0.0)
    *_, plain = generate(gpt2, "abcabcabc", max_new_tokens=6, temperature=0.0)
    assert last.text == plain.text and last.results()[0]["copied_rounds"] > 0


def filled(model, *arguments, **settings):
    tokens = last(model, *arguments, **settings).frame.tokens
    return bool((tokens != model.model.mask_id).all())


@pytest.mark.parametrize(
    "method", ["gpt2", "d3pm-absorbing", "d3pm-uniform", "sedd-scaled", "sedd-uniform", "radd-ao", "plaid"]
)
def test_what_is_not_refused_before_the_first_frame_is_done(method):
    """By every decoder, the model's own among them; what is refused names the decoder, and the one that fits."""
    model, done = text_model(method), []
    for name, kind in DECODERS.items():
        settings = {"steps": 2} if "steps" in {each.name for each in dataclasses.fields(kind)} else {}
        try:
            frames = generate(model, "a", decoder=name, max_new_tokens=3, **settings)
        except InputError as error:
            assert str(error).startswith(f"decoder is {name}")
            assert f"this {method} model's own decoder is {model.decoder}" in str(error) or "gaussian" in str(error)
        else:
            assert list(frames)
            done.append(name)
    assert model.decoder in done and len(done) < len(DECODERS)


def test_what_a_methods_model_cannot_do_is_refused_before_the_first_frame():
    with pytest.raises(InputError, match="decoder is hybrid; this model does not fill in left to right over a canvas"):
        generate(text_model("radd-ao"), "a", decoder="hybrid")
    assert filled(text_model("radd-ao"), "a", decoder="hybrid", anchor=0.0, max_new_tokens=5)
    with pytest.raises(InputError, match="decoder is ancestral, which starts from masks, of which this model knows"):
        generate(text_model("d3pm-uniform"), "a", decoder="ancestral")
    gpt2 = text_model("gpt2", context=24, positions="learned")
    assert filled(gpt2, "ab", max_new_tokens=22)
    with pytest.raises(InputError, match="max_new_tokens 23 make 25; with this decoder and model they must fit"):
        generate(gpt2, "ab", max_new_tokens=23)  # learned positions end there


def test_a_character_of_several_tokens_is_shown_whole(model):
    done = last(model, template="é[MASK]ü€", seed=1)
    assert [text for text, kind in done.pieces() if kind == "given"] == ["", "é", "", "ü", "", "", "€"]
    done = last(model, template="ab[MASK]c", seed=1)
    cut = torch.tensor([[ord("a"), 0xC3, model.model.mask_id, ord("c")]])
    half = dataclasses.replace(done, frame=dataclasses.replace(done.frame, tokens=cut, drafts=None))
    assert [text for text, _ in half.pieces()] == ["a", "\ufffd", "_", "c"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("decoder", sorted(DECODERS.keys() - {"d3pm_uniform", "gaussian"}))
def test_weights_that_are_no_numbers_end_decoding(broken, decoder, temperature):
    with pytest.raises(DecodingError, match="probabilities are not numbers"):
        last(broken, "ab", decoder=decoder, max_new_tokens=3, temperature=temperature)


@pytest.mark.parametrize("decoder", ["confidence", "margin", "entropy_bound"])
def test_places_that_look_the_same_are_filled_as_they_are_alone(decoder):
    """A network without a clock is as sure of every place of an all-masked canvas, up to rounding."""
    templates, tokenizer = ["bacba[MASK:4]z", "[MASK:10]"], Tokenizer.plain_bytes()
    torch.manual_seed(838)
    branch = BranchConfig(1, 32, 2, alibi=True)
    network = DualBranch(ModelConfig(257, 24, branch, None, bos_id=256, fusion="late", exchange="mutual"))
    model = TextModel(network.double().eval().requires_grad_(False), tokenizer)
    for parameter in model.model.parameters():
        parameter.mul_(8.0 if parameter.ndim == 2 else 1.0)
    for seed in range(8):
        batch = last(model, template=templates, decoder=decoder, seed=seed)
        alone = last(model, template=templates[1], decoder=decoder, seed=seed + 1)
        assert torch.equal(batch.frame.tokens[1, :10], alone.frame.tokens[0])
