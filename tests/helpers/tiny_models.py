"""A language model of random weights, small enough to be run thousands of times, as each kind of model."""

import functools

import torch

from saewb.sae.sae import SAE, SAEConfig

LAYERS, D_MODEL, HEADS, D_MLP, VOCAB, BOS = 3, 16, 4, 24, 32, 1


@functools.cache
def hf_llama(layers=LAYERS):
    """The same in each process; nobody may change it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=D_MODEL,
        intermediate_size=D_MLP,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=D_MODEL // HEADS,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=2,
        attn_implementation="eager",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        for parameter in model.parameters():  # far from the near-zero start, so that every part of it matters
            torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim == 2 else torch.nn.init.uniform_(
                parameter, 0.5, 1.5
            )
    return model


@functools.cache
def tokenizer():
    """Words w0 ... and <bos>, <eos>, <pad>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {
        word: i for i, word in enumerate(["<unk>", "<bos>", "<eos>", "<pad>", *(f"w{i}" for i in range(VOCAB - 4))])
    }
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    result = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    result.init_kwargs.update(name_or_path="small", add_bos_token=True)  # or transformer-lens loads it again, by name
    return result


def new_bridge(dtype=torch.float32, layers=LAYERS):
    """A Bridge of its own (the cached one is shared)."""
    import copy

    from transformer_lens.model_bridge import TransformerBridge

    hf = copy.deepcopy(hf_llama(layers)).to(dtype)
    model = TransformerBridge.boot_transformers("small", hf_model=hf, tokenizer=tokenizer(), device="cpu", dtype=dtype)
    model.run_with_cache(tokens())  # the first one leaves traces of its own
    return model


def kinds():
    """The kinds of model that this transformer-lens has."""
    from helpers.transformer_lens_3 import has_hooked_transformer

    return ["bridge", "hooked"] if has_hooked_transformer() else ["bridge"]


def new_hooked(layers=LAYERS):
    """A HookedTransformer of its own, of the same weights, on transformer-lens 3.x."""
    from helpers.transformer_lens_3 import hooked_transformer

    return hooked_transformer(hf_llama(layers), tokenizer())


@functools.cache
def bridge():
    return new_bridge()


@functools.cache
def hooked():
    return new_hooked()


def tokens(rows=2, length=7, seed=0):
    ids = torch.randint(4, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = BOS
    return ids


def sae(hook, activation="relu", d_in=D_MODEL, d_sae=40, seed=0, **fields):
    """An SAE with non-zero biases and decoder rows of different norms."""
    result = SAE(SAEConfig(d_in=d_in, d_sae=d_sae, activation=activation, hook=hook, **fields), seed=seed)
    rng = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng), alpha=0.1)
            if name == "threshold":
                parameter.abs_()
    return result


def snapshot(model):
    """Everything attach might disturb: points, their identity, the hooks on them, torch's hooks on modules, modes."""
    points = [
        (name, id(point), [id(h) for h in point.fwd_hooks], [id(h) for h in point.bwd_hooks])
        for name, point in sorted(model.hook_dict.items())
    ]
    modules = [
        (
            name,
            id(module),
            type(module),
            tuple(module._forward_hooks),
            tuple(module._forward_pre_hooks),
            tuple(module._backward_hooks),
        )
        for name, module in model.named_modules()
    ]
    attributes = [sorted(vars(point)) for _, point in sorted(model.hook_dict.items())]
    return (
        points,
        modules,
        attributes,
        sorted(name for name, _ in model.named_parameters()),
        model.training,
        type(model),
    )
