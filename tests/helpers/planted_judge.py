"""A model, an SAE and a judge of which all is known: latent i fires on the tokens of TRUTH[i], and only there."""

import functools
import json
import re

import torch

import saewb
from helpers import tiny_models
from saewb.explanations import Scripted
from saewb.features import build_index
from saewb.sae.sae import SAE, SAEConfig

HOOK = "blocks.0.hook_resid_pre"
TRUTH = [{5: 10, 6: 5}, {7: 10}, {8: 10, 9: 10}, {10: 5, 11: 10}, {12: 10, 13: 5}, {14: 10}]  # token id: activation


@functools.cache
def model():
    """Its residual stream before the first block is the one-hot vector of the token."""
    import copy

    from transformer_lens.model_bridge import TransformerBridge
    from transformers import LlamaConfig, LlamaForCausalLM

    config = copy.deepcopy(tiny_models.hf_llama(1).config)
    hf = LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), "hidden_size": tiny_models.VOCAB, "head_dim": 8})).eval()
    with torch.no_grad():
        hf.model.embed_tokens.weight.copy_(torch.eye(tiny_models.VOCAB))
    tokenizer = tiny_models.tokenizer()
    return TransformerBridge.boot_transformers("planted", hf_model=hf, tokenizer=tokenizer, device="cpu")


@functools.cache
def sae():
    result = SAE(SAEConfig(d_in=tiny_models.VOCAB, d_sae=len(TRUTH), hook=HOOK))
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.zero_()
        for latent, tokens in enumerate(TRUTH):
            for token, act in tokens.items():
                result.W_enc[token, latent] = act
                result.W_dec[latent, token] = 1.0
    return result


def rows(n, seed):
    return tiny_models.tokens(n, 16, seed=seed)


@functools.cache
def index():
    return build_index(model(), sae(), rows(150, 1), window=4, n_top=20)


def held_out():
    return rows(150, 2)


def word(token):
    return f"w{token - 4}"


WORDS = [{word(token): act for token, act in tokens.items()} for tokens in TRUTH]


def words_in(text):
    return re.findall(r"w\d+", text)


def truthful(request):
    """Explains by reading the activations, and answers by looking the words up."""
    prompt, system = request.prompt, request.messages[0][1]
    if "[EXPLANATION]" in system:
        pairs = {w: int(a) for w, a in re.findall(r'"\s*(w\d+)" (\d+)', prompt)}
        return "[EXPLANATION]: " + " ".join(f"{w}={a}" for w, a in sorted(pairs.items()))
    if "odd text" in system:
        marked = [set(words_in(" ".join(re.findall("<<(.*?)>>", line)))) for line in prompt.splitlines()]
        fits = [sum(m <= set(words) for m in marked) for words in WORDS]
        known = set(WORDS[fits.index(max(fits))])
        return json.dumps([next(n for n, m in enumerate(marked, 1) if not m <= known)])
    known = {w: int(a) for w, a in re.findall(r"(w\d+)=(\d+)", prompt.partition("\n")[0])}
    if "sets of tokens" in system:
        sets = [line.partition(": ")[2] for line in prompt.splitlines() if line.startswith("Set ")]
        own = [likelier(i) for i, words in enumerate(WORDS) if set(words) == set(known)]
        return json.dumps([next((n for n, one in enumerate(sets, 1) if one in own), 1)])
    if "Tokens: " in prompt:
        return json.dumps([known.get(t.strip(), 0) for t in json.loads(prompt.partition("Tokens: ")[2])])
    lines = [line.partition(": ")[2] for line in prompt.splitlines() if line.startswith("Text ")]
    if "numbers of these texts" in system:
        return json.dumps([n for n, line in enumerate(lines, 1) if known.keys() & set(words_in(line))])
    if "<< and >>" in system:
        return json.dumps([int(_marks_all(line, known)) for line in lines])
    return json.dumps([int(bool(known.keys() & set(words_in(line)))) for line in lines])


def _marks_all(line, known):
    """Whether the marked words are just those that are known; weak ones are marked too, being above .3."""
    marked = set(words_in(" ".join(re.findall("<<(.*?)>>", line))))
    return marked == known.keys() & set(words_in(line))


def likelier(latent):
    """What a latent makes likelier, as it is written in a request."""
    return ", ".join(json.dumps(logit.token) for logit in index().latent(latent).logits_top)


def embed(texts):
    """How often each word is in a text: an explanation is near the texts that have its words."""
    return [[float(words_in(text).count(word(token))) for token in range(4, tiny_models.VOCAB)] for text in texts]


def judge(answer=truthful, **how):
    return Scripted(answer, **{"embed": embed, **how})


def explained():
    return saewb.explain(index(), judge(), range(len(TRUTH)), method="examples")
