"""The local replacement model of one prompt: sources, targets, and how each target depends on each source.

1. `ReplacementModel.of` freezes the model on the prompt, encodes it, and splits what is written at each site into
   latents, reconstruction and error.
2. A pass of the frozen model records, at each site, what the encoder reads, as a function of what is written
   earlier: a tensor of zeros is added at every site, by which gradients are taken. Of long prompts there are passes
   over some prefixes too, for targets that no later token reaches.
3. `ReplacementModel.rows` takes gradients of a batch of targets and contracts them with the vectors of all sources.
   The work is proportional to the layers below and the positions before; `batches` puts targets together accordingly.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from saewb._finite import check_finite
from saewb.circuits.frozen import FINAL, STREAM, FrozenModel, mlp_point, quiet, record_frozen
from saewb.errors import explain
from saewb.interventions.site import Site
from saewb.models import hook_points
from saewb.models.active import check_unmodified
from saewb.models.capture import capturing, eval_mode
from saewb.models.unembed import logit_scale
from saewb.sae.base import SparseCoder
from saewb.sae.cross_layer import CrossLayerTranscoder
from saewb.sae.sae import SAE

_MLP_OUT = re.compile(r"blocks\.\d+\.(hook_mlp_out|mlp\.hook_out|ln2_post\.\w+)")
_GRADIENT_BYTES = 2**28
"""Gradients of a batch of targets at all sites, about."""
_CPU_GRADIENT_BYTES = 2**25
"""The same on a CPU: those of one layer fit into its cache, where sums and products are faster."""
_PREFIX_STEP = 8
"""Positions by which the lengths of two prefixes differ, at least: shorter passes save too little."""
_MAX_PREFIXES = 4
"""Lengths of prefixes, the whole prompt among them: each holds the activations of a pass."""


@dataclass(frozen=True, eq=False)
class SourceLayer:
    """One layer of sources: a site, or an MLP without a transcoder, whose whole output is an error."""

    layer: int
    """Transformer block."""
    point: str
    """Canonical name of the point it writes to."""
    site: Site | None

    @property
    def is_one_point(self) -> bool:
        """Whether its latents are read where they are written."""
        return self.site is not None and self.site.is_one_point


@dataclass(frozen=True, eq=False)
class SourceVectors:
    """Vectors written at one point, position by position, and the source that each belongs to."""

    column: Int[Tensor, "pos most"]
    """Index of the source; the number of sources where a position has fewer vectors than another."""
    vector: Float[Tensor, "pos most d"]


@dataclass(frozen=True, eq=False)
class Targets:
    """A batch of targets of one kind: directions at what one encoder, or the unembedding, reads."""

    layer: int
    """Index of the source layer whose encoder reads it; the number of these for the unembedding."""
    position: Int[Tensor, " targets"]
    direction: Float[Tensor, "targets d"]


@dataclass(frozen=True, eq=False)
class _Pass:
    """A pass of the frozen model over a prefix, with gradients."""

    added: list[Tensor]
    """Zeros added at each source layer, and last at the start."""
    read: list[Tensor | None]
    """What each encoder, and last the unembedding, reads."""


class ReplacementModel:
    """A frozen model with latents, errors and tokens as its sources. Positions and latents are those of one prompt."""

    def __init__(self, frozen: FrozenModel, layers: Sequence[SourceLayer], n_zero: int) -> None:
        """Encode the prompt; `of` resolves the arguments."""
        self.frozen, self.layers, self.n_zero = frozen, tuple(layers), n_zero
        self.model, self.n_pos = frozen.model, frozen.tokens.shape[1]
        self.is_exact = not any(layer.is_one_point for layer in layers)
        with torch.no_grad():
            self._encode()
        n_prefixes = max(1, min(_MAX_PREFIXES, self.n_pos // _PREFIX_STEP)) if frozen.is_causal else 1
        self._prefixes = [-(-self.n_pos * k // n_prefixes) for k in range(1, n_prefixes + 1)]
        self._passes: dict[int, _Pass] = {}
        self.read = [None if read is None else read.detach() for read in self._pass(self.n_pos).read]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        tokens: Int[Tensor, "1 pos"],
        coders: SparseCoder | Iterable[SparseCoder],
        n_zero: int,
        *,
        frozen: FrozenModel | None = None,
    ) -> ReplacementModel:
        """Resolve the sites and freeze the model.

        Args:
            model: a TransformerBridge or HookedTransformer.
            tokens: the prompt.
            coders: transcoders of MLPs, one for each layer or some; a cross-layer transcoder; or SAEs of the stream.
            n_zero: positions at the start without latents and errors.
            frozen: of the same prompt, if there is one.

        Raises:
            TypeError: for SAEs whose pre-activations are no affine function of their input.
            ValueError: for a mix of SAEs and transcoders, two at one layer, points that do not fit, or to which
                something that is attached writes.
        """
        layers = source_layers(model, coders)
        read = [layer.site.read for layer in layers if layer.site is not None]
        check_unmodified(model, [*read, *(layer.point for layer in layers)])
        with eval_mode(model, *{layer.site.sae for layer in layers if layer.site}):
            return cls(frozen or record_frozen(model, tokens), layers, n_zero)

    # -- sources -------------------------------------------------------------------------------------------------------

    def _encode(self) -> None:
        """Latents, errors and constants at every site."""
        sites = [layer.site for layer in self.layers if layer.site is not None]
        names = {name for site in sites for name in (site.read.name, site.write.name)}
        names |= {layer.point for layer in self.layers}
        with capturing(self.model, names) as clean:
            self.model(self.frozen.tokens)
        self.inputs: list[Tensor | None] = []
        dense, targets = [], []
        for layer in self.layers:
            site = layer.site
            activation = clean[layer.point].detach()
            x = None if site is None else site.read_input(clean[site.read.name].detach()).to(site.sae.dtype)
            targets.append(activation if site is None else site.read_target(activation))
            self.inputs.append(x)
            check_finite(f"activations at {layer.point!r}", targets[-1])
            dense.append(None if x is None else site.encode(x))
        errors, kept = [], []
        for i, layer in enumerate(self.layers):
            recons = 0 if layer.site is None else _reconstruct(layer.site, dense, self.layers, i, self.inputs[i])
            target = targets[i].float()
            errors.append((target - recons)[0])
            passed = 0 if layer.site is None else passthrough(layer.site.sae, self.inputs[i], layer.site.clt_layer)
            kept.append(target - passed)
        self.errors: Float[Tensor, "layer pos d"] = torch.stack(errors).float()
        self.errors[:, : self.n_zero] = 0
        self.kept = kept
        device = self.errors.device
        entries = []
        for acts in dense:
            acts = torch.zeros(self.n_pos, 0, device=device) if acts is None else acts[0].clone()
            acts[: self.n_zero] = 0
            position, latent = acts.nonzero(as_tuple=True)
            entries.append((torch.full_like(position, len(entries)), position, latent, acts[position, latent].float()))
        layer, position, latent, activation = (torch.cat(parts) for parts in zip(*entries, strict=True))
        self.layer: Int[Tensor, " active"] = layer
        self.position: Int[Tensor, " active"] = position
        self.latent: Int[Tensor, " active"] = latent
        self.activation: Float[Tensor, " active"] = activation
        self._starts = [0, *accumulate(len(part[0]) for part in entries)]

    @property
    def n_active(self) -> int:
        """Number of active latents, position by position."""
        return len(self.latent)

    @property
    def n_sources(self) -> int:
        """Active latents, an error for each layer and position, a token for each position: in this order."""
        return self.n_active + (len(self.layers) + 1) * self.n_pos

    @cached_property
    def vectors(self) -> list[SourceVectors]:
        """At each source layer, and last at the start of the stream, what the sources write there."""
        result = [self._vectors_at(i) for i in range(len(self.layers))]
        first_token = self.n_active + len(self.layers) * self.n_pos
        column = torch.arange(first_token, first_token + self.n_pos, device=self.latent.device)[:, None]
        return [*result, SourceVectors(column, self.frozen.stream[0][:, None].float())]

    def written_by(self, source: int) -> list[int]:
        """Indices of the source layers that latents of one write to: itself; of a cross-layer transcoder later ones."""
        if self.layers[source].site.clt_layer is None:
            return [source]
        return [i for i in range(source, len(self.layers)) if self.layers[i].site is not None]

    def _vectors_at(self, i: int) -> SourceVectors:
        first_error = self.n_active + i * self.n_pos
        device = self.latent.device
        columns = [torch.arange(first_error, first_error + self.n_pos, device=device)]
        positions, vectors = [torch.arange(self.n_pos, device=device)], [self.errors[i]]
        sources = [source for source in range(i + 1) if self.layers[source].site is not None]
        for source in (source for source in sources if i in self.written_by(source)):
            part = slice(self._starts[source], self._starts[source + 1])
            directions = self.directions(source, i, self.latent[part], self.position[part])
            columns.append(torch.arange(part.start, part.stop, device=device))
            positions.append(self.position[part])
            vectors.append(self.activation[part, None] * directions)
        column, position, vector = torch.cat(columns), torch.cat(positions), torch.cat(vectors)
        order = position.argsort(stable=True)
        sizes = torch.bincount(position, minlength=self.n_pos).tolist()
        return SourceVectors(
            pad_sequence(column[order].split(sizes), batch_first=True, padding_value=self.n_sources),
            pad_sequence(vector[order].split(sizes), batch_first=True),
        )

    def directions(self, source: int, write: int, latents: Tensor, positions: Tensor) -> Float[Tensor, "latents d"]:
        """What an activation of 1 of latents of one layer writes at another (for an SAE, the same), in model units."""
        site = self.layers[source].site
        sae = site.sae
        if isinstance(sae, CrossLayerTranscoder):
            first, last = site.clt_layer, self.layers[write].site.clt_layer
            W_dec = sae.W_dec[first]
            return W_dec[latents.to(W_dec.device), last - first].to(sae.dtype).float()
        directions = sae.W_dec[latents].detach().float()
        return directions * decoder_scale(sae, self.inputs[source])[0, positions].float()

    # -- the frozen pass -----------------------------------------------------------------------------------------------

    def _pass(self, n_pos: int) -> _Pass:
        """The pass over a prefix; each is run once, when it is first needed."""
        if n_pos not in self._passes:
            written = [*self.kept, self.frozen.stream]
            added = [torch.zeros_like(value[:, :n_pos], requires_grad=True) for value in written]
            with torch.enable_grad():
                self._passes[n_pos] = _Pass(added, self.run(added))
        return self._passes[n_pos]

    def run(self, added: Sequence[Tensor]) -> list[Tensor | None]:
        """Run the frozen model with tensors added to what each source layer writes and, last, to the start.

        Args:
            added: `[1, pos, d]` for each source layer, and last for the stream's start; of a prefix if it is causal.

        Returns:
            What the encoder of each source layer reads, normalized and centered as it does, and last what the
            unembedding reads: `[1, pos, d]`; None for layers without an encoder.
        """
        n_pos = added[-1].shape[1]
        frozen = self.frozen if n_pos == self.n_pos else self.frozen.prefix(n_pos)
        read: list[Tensor | None] = [None] * (len(self.layers) + 1)
        raw: dict[int, Tensor] = {}

        def reading(i: int) -> hook_points.Edit:
            site = self.layers[i].site

            def edit(activation: Tensor) -> None:
                raw[i] = site.read_input(activation).to(site.sae.dtype)
                read[i] = self.encoder_input(i, raw[i])

            return edit

        def writing(i: int) -> hook_points.Edit:
            site = self.layers[i].site

            def edit(activation: Tensor) -> Tensor:
                out = self.kept[i][:, :n_pos] + added[i]
                if site is None:
                    return out.to(activation.dtype)
                out = out + passthrough(site.sae, raw[i], site.clt_layer)
                return site.write_output(out.to(activation.dtype), activation)

            return edit

        def start(stream: Tensor) -> Tensor:
            return (frozen.stream + added[-1]).to(stream.dtype)

        def end(final: Tensor) -> None:
            read[-1] = final

        edits = frozen.edits(mlps=False) | self.edits(reading, writing, start, end)
        with quiet(), eval_mode(self.model), hook_points.editing(self.model, edits):
            self.model(frozen.tokens)
        return read

    def edits(
        self,
        reading: Callable[[int], hook_points.Edit],
        writing: Callable[[int], hook_points.Edit],
        start: hook_points.Edit,
        end: hook_points.Edit,
    ) -> dict[str, hook_points.Edit]:
        """Edits of a pass by hook point: at each site, in the order in which they belong.

        Args:
            reading: the edit where the encoder of a source layer reads.
            writing: the edit where a source layer writes.
            start: the edit where the stream begins.
            end: the edit where the unembedding reads.
        """
        steps: dict[str, list[tuple[int, hook_points.Edit]]] = {}

        def at(name: str, order: int, edit: hook_points.Edit) -> None:
            steps.setdefault(name, []).append((order, edit))

        for i, layer in enumerate(self.layers):
            if layer.site is not None:
                at(layer.site.read.name, 0 if layer.is_one_point else 2, reading(i))
            at(layer.point, 1, writing(i))
        at(hook_points.resolve(self.model, STREAM).name, -1, start)
        at(hook_points.resolve(self.model, FINAL).name, 2, end)
        return {name: hook_points.in_order(edits) for name, edits in steps.items()}

    def encoder_input(self, i: int, x: Float[Tensor, "1 pos d_in"]) -> Float[Tensor, "1 pos d_in"]:
        """What the encoder matrix of a source layer multiplies, for an input `x` beside the prompt's own."""
        return encoder_input(self.layers[i].site.sae, x, self.inputs[i][:, : x.shape[1]])

    @cached_property
    @torch.no_grad()
    def without_sources(self) -> list[Tensor]:
        """What each encoder and the unembedding read where all sources are 0: the constants of the frozen model."""
        pairs = zip(self.vectors, [*self.kept, self.frozen.stream], strict=True)
        return self.run([-vectors.vector.sum(1)[None].to(written) for vectors, written in pairs])

    def release(self) -> None:
        """Free the vectors of sources, and the activations of passes; whatever needs them computes them anew."""
        self._passes.clear()
        for name in ("vectors", "without_sources"):
            self.__dict__.pop(name, None)

    # -- targets -------------------------------------------------------------------------------------------------------

    def latent_targets(self, nodes: Int[Tensor, " targets"]) -> list[Targets]:
        """Pre-activations of active latents, one batch per layer; the nodes must be ascending."""
        result = []
        for i in self.layer[nodes].unique().tolist():
            some = nodes[self.layer[nodes] == i]
            site = self.layers[i].site
            W_enc = site.sae.W_enc if site.clt_layer is None else site.sae.W_enc[site.clt_layer]
            direction = W_enc[:, self.latent[some].to(W_enc.device)].detach().to(site.sae.dtype).T
            result.append(Targets(i, self.position[some], direction))
        return result

    def values(self, targets: Targets, read: Sequence[Tensor | None]) -> Float[Tensor, " targets"]:
        """Values of targets in a pass in which this was read (`read`, `without_sources`, `run`), less their biases."""
        read = read[targets.layer].detach()
        return (read[0, targets.position].float() * targets.direction.float()).sum(-1)

    def latent_biases(self, nodes: Int[Tensor, " targets"]) -> Float[Tensor, " targets"]:
        """Encoder bias of each latent."""
        biases = torch.zeros(len(nodes), device=self.latent.device)
        for i in self.layer[nodes].unique().tolist():
            site, mask = self.layers[i].site, self.layer[nodes] == i
            b_enc = site.sae.b_enc if site.clt_layer is None else site.sae.b_enc[site.clt_layer]
            biases[mask] = b_enc[self.latent[nodes[mask]]].detach().float()
        return biases

    def batches(self, nodes: Int[Tensor, " nodes"], most: int) -> list[Int[Tensor, " some"]]:
        """Divide active latents into batches for `rows`: of similar positions and layers, those of late layers first.

        Args:
            nodes: on any device.
            most: latents per batch, at most; fewer where their gradients would not fit into memory.

        Returns:
            Ascending nodes, on the CPU.
        """
        nodes = nodes.cpu().sort().values
        position, layer = self.position.cpu()[nodes], self.layer.cpu()[nodes]
        prefix = torch.searchsorted(torch.tensor(self._prefixes), position + 1)
        result: list[tuple[int, Tensor]] = []
        for i, n_pos in enumerate(self._prefixes):
            some = (prefix == i).nonzero()[:, 0]
            while len(some):
                highest = int(layer[some[-1]])
                batch = some[-self.batch_size(most, highest, n_pos) :]
                result.append((highest, nodes[batch]))
                some = some[: -len(batch)]
        return [batch for _, batch in sorted(result, key=lambda pair: -pair[0])]

    def batch_size(self, most: int, layer: int, n_pos: int) -> int:
        """How many targets of a source layer, or earlier ones, have gradients that fit into memory; `most` at most."""
        row = 4 * n_pos * sum(value.shape[-1] for value in [*self.kept[:layer], self.frozen.stream])
        fit = _CPU_GRADIENT_BYTES if self.latent.device.type == "cpu" else _GRADIENT_BYTES
        return max(1, min(most, fit // row))

    def rows(self, batches: Sequence[Targets]) -> Float[Tensor, "targets sources"]:
        """How each target of some batches depends on each source: A[t, s], on the CPU."""
        n = sum(len(batch.position) for batch in batches)
        highest = max(batch.layer for batch in batches)
        last = max(int(batch.position.max()) for batch in batches)
        n_pos = next(length for length in self._prefixes if length > last)
        of_prefix = self._pass(n_pos)
        leaves = [*of_prefix.added[:highest], of_prefix.added[-1]]  # a layer is read before it is written
        begin, outputs, seeds = 0, [], []
        for batch in batches:
            read = of_prefix.read[batch.layer]
            seed = torch.zeros(n, *read.shape, dtype=read.dtype, device=read.device)
            index = torch.arange(begin, begin + len(batch.position), device=read.device)
            seed[index, 0, batch.position] = batch.direction.to(seed)
            outputs.append(read)
            seeds.append(seed)
            begin += len(batch.position)
        gradients = torch.autograd.grad(
            outputs, leaves, seeds, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
        result = torch.zeros(self.n_sources + 1, n, device=self.latent.device)
        for vectors, gradient in zip([*self.vectors[:highest], self.vectors[-1]], gradients, strict=True):
            if gradient is not None:
                slope = gradient[:, 0].transpose(0, 1).to(vectors.vector)  # [pos, targets, d]
                effects = vectors.vector[:n_pos] @ slope.transpose(1, 2)  # [pos, most, targets]
                result.index_add_(0, vectors.column[:n_pos].flatten(), effects.flatten(0, 1))
        return result[:-1].T.contiguous().cpu()

    # -- the unembedding -----------------------------------------------------------------------------------------------

    @cached_property
    def logit_factor(self) -> float:
        """Factor between the unembedding's output and the logits."""
        return logit_scale(self.model)

    def logit_directions(
        self, tokens: Int[Tensor, " tokens"]
    ) -> tuple[Float[Tensor, "tokens d"], Float[Tensor, " tokens"]]:
        """Direction of each logit less the mean logit at what the unembedding reads, and its bias."""
        W_U = self.model.W_U.detach()
        directions = (W_U[:, tokens].float() - W_U.float().mean(1, keepdim=True)).T * self.logit_factor
        b_U = getattr(self.model, "b_U", None)
        if b_U is None:
            return directions, torch.zeros(len(tokens), device=W_U.device)
        b_U = b_U.detach().float()
        return directions, (b_U[tokens] - b_U.mean()) * self.logit_factor


def source_layers(model: nn.Module, coders: SparseCoder | Iterable[SparseCoder]) -> list[SourceLayer]:
    """Resolve the sites of transcoders or SAEs, in the order of the model; MLPs without a transcoder are errors."""
    coders = [coders] if isinstance(coders, SparseCoder) else list(coders)
    if not coders:
        raise ValueError(explain("got no transcoder.", fix="saewb.attribution_graph(model, prompt, transcoders)"))
    sites: list[Site] = []
    for coder in coders:
        if isinstance(coder, CrossLayerTranscoder) and coder.cfg.is_transcoder:
            sites += Site.of_layers(model, coder)
            continue
        if isinstance(coder, SparseCoder) and not isinstance(coder, SAE):
            what = f"{coder!r}: its latents have no pre-activation that is affine in its input."
            want = "SAEs, transcoders (activation relu, jumprelu, topk, ...), or a cross-layer transcoder"
            raise TypeError(explain(what, want=want))
        sites.append(Site.of(model, coder))
    if len(coders) > 1 and any(site.clt_layer is not None for site in sites):
        raise ValueError(explain(f"got {coders!r}.", want="one cross-layer transcoder, and nothing beside it"))
    by_layer: dict[int, Site] = {}
    for site in sites:
        if site.write.layer is None or site.write.layer in by_layer:
            other = by_layer.get(site.write.layer)
            what = f"{site.sae!r} writes to {site.hook_name_out!r}" + (f", as does {other.sae!r}." if other else ".")
            raise ValueError(explain(what, want="points in the blocks of the model, one SAE or transcoder per block"))
        by_layer[site.write.layer] = site
    one_point = {site.is_one_point for site in sites}
    if one_point == {True}:
        return [SourceLayer(layer, site.write.name, site) for layer, site in sorted(by_layer.items())]
    for site in sites:
        if site.is_one_point or not any(_MLP_OUT.fullmatch(name) for name in site.write.names):
            what = f"{site.sae!r} writes to {site.hook_name_out!r}, which is no output of an MLP."
            want = "transcoders of MLPs (hook_out='blocks.4.hook_mlp_out'), or SAEs alone"
            raise ValueError(explain(what, want=want))
    result = []
    for layer in range(model.cfg.n_layers):
        site = by_layer.get(layer)
        write = hook_points.resolve(model, mlp_point(layer)) if site is None else site.write
        result.append(SourceLayer(layer, write.name, site))
    return result


def encoder_input(sae: SparseCoder, x: Float[Tensor, "1 pos d_in"], clean: Tensor) -> Float[Tensor, "1 pos d_in"]:
    """What the encoder matrix multiplies, with the scale of a per-token normalization held at that of `clean`."""
    if isinstance(sae, CrossLayerTranscoder):
        return x
    normalization = sae.cfg.normalization
    if normalization in ("layer_norm", "centered"):
        x, clean = x - x.mean(-1, keepdim=True), clean - clean.mean(-1, keepdim=True)
    if normalization == "layer_norm":
        x = x / (clean.std(-1, keepdim=True) + 1e-5)
    if normalization == "constant_norm":
        x = x * (x.shape[-1] ** 0.5 / clean.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny))
    return x if sae.b_pre is None else x - sae.b_pre


def decoder_scale(sae: SAE, x: Float[Tensor, "1 pos d_in"]) -> Float[Tensor, "1 pos 1"]:
    """Factor of the decoder directions that undoes a per-token normalization of `x`."""
    if sae.cfg.normalization == "layer_norm":
        return x.std(-1, keepdim=True)
    if sae.cfg.normalization == "constant_norm":
        return x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
    return torch.ones_like(x[..., :1])


def passthrough(sae: SparseCoder, x: Float[Tensor, "1 pos d_in"], clt_layer: int | None) -> Tensor | float:
    """What the output has of the input itself: `x @ W_skip`, and the mean that a normalization puts back."""
    total: Tensor | float = 0.0
    if sae.cfg.skip:
        W_skip = sae.W_skip if clt_layer is None else sae.W_skip[clt_layer].to(sae.dtype)
        total = x @ W_skip.detach()
    if getattr(sae.cfg, "normalization", "none") in ("layer_norm", "centered"):
        total = total + x.mean(-1, keepdim=True)
    return total


def _reconstruct(
    site: Site, dense: Sequence[Tensor | None], layers: Sequence[SourceLayer], i: int, x: Tensor
) -> Tensor:
    if site.clt_layer is None:
        return site.sae.decode(dense[i], x).float()
    by_clt_layer = {layer.site.clt_layer: acts for layer, acts in zip(layers, dense, strict=True) if layer.site}
    below = [by_clt_layer[j] for j in range(site.clt_layer + 1)]
    return site.sae.decode_layer(below, site.clt_layer, x).float()
