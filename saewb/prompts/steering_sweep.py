"""Does steering work: a sweep over strengths, with controls, intervals and a strength chosen on other prompts.

1. Arms: the latent, and what it has to beat: random directions of its norm, latents of like density, a difference of
   means, and a prompt that asks for the concept.
2. For each prompt all strengths of all arms are rows of one batch, beside a row without steering; they write together.
3. Figures of each text (`saewb.prompts.steered_texts`), how often the latent fires in it, and a judge's ratings.
4. The strength of each arm is chosen on some of the prompts, and reported on the others.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saewb._display import html_table
from saewb._indices import index_of
from saewb.data.chats import is_chat
from saewb.data.tokens import check_context, prompt_ids
from saewb.errors import explain, near
from saewb.explanations.figures import mean_interval
from saewb.explanations.instructions import quoted
from saewb.explanations.judge import Judge
from saewb.interventions.site import Site
from saewb.interventions.steering import How, LatentChange, Positions, When, latents_at, steer_rows
from saewb.models import hook_points
from saewb.models.active import check_unmodified
from saewb.models.capture import capture, capturing, eval_mode
from saewb.models.tokenizer import single_texts, special_ids, special_mask
from saewb.probing.directions import difference_of_means
from saewb.probing.directions import directions as directions_sae
from saewb.prompts.steered_texts import compare_rows, repetition, write_rows
from saewb.prompts.steering_judge import RATINGS, harmonic_mean, rating_requests, read_rating
from saewb.prompts.steering_scores import N_WORDS, direction_words, random_directions

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from saewb.features import FeatureIndex

MULTIPLES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5)
"""Default strengths, in units of the median norm of the activation over that of the direction."""
CONTROLS = ("random direction", "latent of like density", "difference of means", "prompting")
FIGURES = ("kl", "fluency", "repetition", "concept_latent", "concept_words")
UNSTEERED, TARGET = "unsteered", "latent"
_BATCH_NUMBERS = 2**26  # logits of one pass held at a time (256 MiB in float32); two passes are compared
_N_LIKE = 8  # latents of like density, one for each prompt in turn
_COLORS = {TARGET: "#d9480f", UNSTEERED: "#868e96", CONTROLS[0]: "#1c7ed6", CONTROLS[1]: "#2b8a3e"}
_COLORS |= {CONTROLS[2]: "#9c36b5", CONTROLS[3]: "#e8590c"}


@dataclass(frozen=True, eq=False, repr=False)
class Sweep:
    """Steering at several strengths beside its controls: the result of `saewb.steering_sweep`."""

    samples: pd.DataFrame
    """A row per prompt, arm and strength: prompt, half ("choose", "report" or "both"), arm, strength, text, figures."""
    about: Mapping[str, Any]
    """What was steered: name, hook, how, concept, words, median_norm, direction_norm, largest, judge."""
    n_prompts: int
    """Prompts asked for; `samples` has fewer if the sweep was interrupted."""
    max_fluency: float
    """Of the choice of a strength without a judge, in nats per token."""

    @property
    def is_complete(self) -> bool:
        """Whether all prompts were run."""
        return self.samples.prompt.nunique() == self.n_prompts

    @property
    def figures(self) -> tuple[str, ...]:
        """Names of the figures there are."""
        return tuple(name for name in (*FIGURES, *RATINGS, "harmonic") if name in self.samples)

    def to_frame(self) -> pd.DataFrame:
        """A row per arm and strength; for each figure its mean over prompts, `_low` and `_high` (95 %), and `_n`.

        arm, strength, of_norm (times the direction's norm, over the median norm of the activation), of_max (over the
        latent's largest activation on text; nan without an index). Intervals are Student's t over prompts.
        """
        return self._aggregate(self.samples)

    @property
    def choice(self) -> pd.DataFrame:
        """The strength of each arm, chosen on the prompts to choose with, and its figures on the others.

        With a judge the strength with the largest mean harmonic mean; without one, of those whose fluency is at most
        `max_fluency`, that with the largest mean of concept_latent and concept_words, or else the least fluent loss.
        One prompt, or `held_out=0`, chooses and reports on the same (half "both"), which flatters every arm.
        """
        import pandas as pd

        halves = self.samples.half
        choose, report = self.samples[halves != "report"], self.samples[halves != "choose"]
        chosen = []
        for arm, rows in self._aggregate(choose).groupby("arm", sort=False):
            best = rows.iloc[_best(rows, self.max_fluency)]
            of_arm = self._aggregate(
                report[(report.arm == arm) & (report.strength.eq(best.strength) | rows.strength.isna().all())]
            )
            chosen.append(of_arm)
        table = pd.concat(chosen, ignore_index=True)
        return table.assign(half="both" if (halves == "both").any() else "report")

    def matched(self, kl: float | None = None) -> pd.DataFrame:
        """Figures of every arm at the strength at which it moves the model as far as this, on average over prompts.

        Directions differ in how far one unit moves the model; at equal KL the concept may be compared. Linear
        interpolation, prompt by prompt, between the two strengths around the first one whose mean reaches it; nan where
        none does. Columns as `to_frame`.

        Args:
            kl: nats per token; None takes that of the latent at its chosen strength.
        """
        import numpy as np
        import pandas as pd

        table, units = self.to_frame(), ("strength", "of_norm", "of_max")
        if kl is None:
            chosen = self.choice
            kl = float(chosen[chosen.arm == TARGET].kl.iloc[0])
        figures = [*units, *self.figures]
        clean = self._by_prompt(UNSTEERED, math.nan).assign(**dict.fromkeys(units, 0.0))
        rows = []
        for arm, of_arm in table[table.strength.notna()].groupby("arm", sort=False):
            strengths = sorted(of_arm.strength)
            path = [self._by_prompt(arm, s) for s in strengths if s > 0 or self.about["how"] != "add"]
            path = [clean, *path] if self.about["how"] == "add" else path
            kls = np.array([step.kl.mean() for step in path])
            reached = np.flatnonzero(kls >= kl)
            if not len(reached) or (reached[0] == 0 and kls[0] > kl):
                values = pd.DataFrame(math.nan, index=clean.index, columns=figures)
            elif reached[0] == 0:
                values = path[0][figures]
            else:
                low, high = path[reached[0] - 1], path[reached[0]]
                share = (kl - kls[reached[0] - 1]) / (kls[reached[0]] - kls[reached[0] - 1])
                values = low[figures] + share * (high[figures] - low[figures])
            row = {"arm": arm, **{name: values[name].mean() for name in units}}
            for name in self.figures:
                row |= _with_interval(name, values[name])
            rows.append(row)
        return pd.DataFrame(rows)

    def plot(self) -> go.Figure:
        """Every figure against the strength, a line for each arm, with intervals; arms without a strength as lines."""
        from plotly.subplots import make_subplots

        table, names = self.to_frame(), self.figures
        figure = make_subplots(rows=len(names), cols=1, shared_xaxes=True, vertical_spacing=0.03, subplot_titles=names)
        for arm, rows in table.groupby("arm", sort=False):
            color = _COLORS[arm]
            for row, name in enumerate(names, 1):
                style = {"legendgroup": arm, "name": arm, "showlegend": row == 1, "row": row, "col": 1}
                if rows.strength.isna().all():
                    ends = [table.of_norm.min(), table.of_norm.max()]
                    y = [rows[name].iloc[0]] * 2
                    figure.add_scatter(x=ends, y=y, mode="lines", line={"color": color, "dash": "dash"}, **style)
                    continue
                error = {"type": "data", "array": rows[f"{name}_high"] - rows[name], "thickness": 1, "color": color}
                figure.add_scatter(
                    x=rows.of_norm,
                    y=rows[name],
                    error_y=error,
                    mode="lines+markers",
                    line={"color": color},
                    customdata=rows[["strength", f"{name}_n"]],
                    hovertemplate="strength %{customdata[0]:.3g}, %{y:.3g}, n = %{customdata[1]}",
                    **style,
                )
        figure.update_xaxes(title_text="strength / median norm of the activation", row=len(names), col=1)
        layout = {"width": 700, "height": 160 * len(names) + 120, "margin": {"l": 60, "r": 10, "t": 60, "b": 50}}
        return figure.update_layout(title=f"Steering {self.about['name']}", **layout)

    def __repr__(self) -> str:
        done = self.samples.prompt.nunique()
        stopped = "" if self.is_complete else f" of {self.n_prompts} (stopped)"
        n = self.samples[self.samples.arm == TARGET].strength.nunique()
        judge = f", judged by {self.about['judge']}" if self.about["judge"] else ""
        about = self.about
        head = (
            f"Sweep({about['how']} {about['name']} at {about['hook']}, {n} strengths, {done}{stopped} prompts{judge})"
        )
        return "\n".join([head, *("  " + "  ".join(row) for row in _aligned([_head(self), *_rows(self)]))])

    def _repr_html_(self) -> str:
        head = _head(self)
        return html_table(repr(self).partition("\n")[0], _rows(self), head, ("left", *["right"] * (len(head) - 1)))

    def _by_prompt(self, arm: str, strength: float) -> pd.DataFrame:
        """Figures of one arm at one strength by prompt, with the strength in its units."""
        rows = self.samples[self.samples.arm == arm]
        rows = rows[rows.strength.isna() if math.isnan(strength) else rows.strength == strength].set_index("prompt")
        about = self.about
        of_norm = strength * about["direction_norm"] / about["median_norm"]
        return rows[list(self.figures)].assign(strength=strength, of_norm=of_norm, of_max=strength / about["largest"])

    def _aggregate(self, samples: pd.DataFrame) -> pd.DataFrame:
        import pandas as pd

        rows, about = [], self.about
        for (arm, strength), group in samples.groupby(["arm", "strength"], sort=False, dropna=False):
            of_norm = strength * about["direction_norm"] / about["median_norm"]
            row = {"arm": arm, "strength": strength, "of_norm": of_norm, "of_max": strength / about["largest"]}
            for name in self.figures:
                row |= _with_interval(name, group[name])
            rows.append(row)
        order = {name: i for i, name in enumerate((TARGET, UNSTEERED, *CONTROLS))}
        table = pd.DataFrame(rows)
        return table.sort_values(
            ["arm", "strength"], key=lambda c: c.map(order) if c.name == "arm" else c, kind="stable"
        ).reset_index(drop=True)


def _with_interval(name: str, values: Any) -> dict[str, Any]:
    mean, low, high, n = mean_interval(values)
    return {name: mean, f"{name}_low": low, f"{name}_high": high, f"{name}_n": n}


def _best(rows: pd.DataFrame, max_fluency: float) -> int:
    """Position of the row to choose: see `Sweep.choice`."""
    if "harmonic" in rows and rows.harmonic.notna().any():
        return int(rows.harmonic.fillna(-1.0).to_numpy().argmax())
    concept = rows[["concept_latent", "concept_words"]].mean(axis=1).fillna(0.0).to_numpy()
    fluent = (rows.fluency <= max_fluency).to_numpy()
    return int((concept * fluent + fluent).argmax()) if fluent.any() else int(rows.fluency.to_numpy().argmin())


def _head(sweep: Sweep) -> list[str]:
    return ["arm", "strength", *sweep.figures, "n"]


def _rows(sweep: Sweep) -> list[list[str]]:
    """The chosen strength of each arm with its figures on held-out prompts, as text."""
    rows = []
    for _, row in sweep.choice.iterrows():
        strength = "-" if math.isnan(row.strength) else f"{row.strength:.3g}"
        cells = [_cell(row, name) for name in sweep.figures]
        rows.append([row.arm, strength, *cells, str(int(row.kl_n))])
    return rows


def _cell(row: Any, name: str) -> str:
    mean, half = row[name], row[f"{name}_high"] - row[name]
    return "-" if math.isnan(mean) else f"{mean:.3g}" if math.isnan(half) else f"{mean:.3g} ± {half:.2g}"


def _aligned(rows: list[list[str]]) -> list[list[str]]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [[row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:], strict=True))] for row in rows]


# -- the sweep ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """One row of a batch: an arm at a strength, or without steering."""

    arm: str
    strength: float | None
    """None without steering."""
    latent: int = 0
    direction: Tensor | None = field(default=None, compare=False)


@dataclass(frozen=True, eq=False)
class _Plan:
    """Everything a prompt's run needs."""

    model: nn.Module
    site: Site
    latent: int
    how: How
    words: Int[Tensor, " words"]
    where: Mapping[str, Any]
    """positions, skip_special_tokens and when, of `saewb.steer`."""
    sampling: Mapping[str, Any]
    batch_rows: int | None


def steering_sweep(
    model: nn.Module,
    sae: nn.Module,
    latent_or_vector: int | Float[Tensor, " d_out"],
    prompts: Sequence[Any],
    strengths: Sequence[float] | None = None,
    how: How = "add",
    n_new_tokens: int = 64,
    judge: Judge | None = None,
    held_out: float = 0.5,
    *,
    index: FeatureIndex | None = None,
    concept: str | None = None,
    controls: Sequence[str] | None = None,
    examples: tuple[Any, Any] | None = None,
    positions: Positions = None,
    skip_special_tokens: bool | Sequence[int] = True,
    when: When = None,
    temperature: float = 0.0,
    max_fluency: float = 1.0,
    batch_rows: int | None = None,
    budget_tokens: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Sweep:
    """Steer at several strengths, and measure what it does to texts beside controls.

    ============== ================================================================================================
    kl             KL(steered || clean) of the next token, mean over the prompt's end and the clean continuation
    fluency        nats per token by which the clean model finds the steered text less likely than its own
    repetition     1 - distinct trigrams / trigrams
    concept_latent share of written tokens on which the latent fires when the clean model reads the text
    concept_words  share of written tokens among the 20 whose logits the latent raises most
    concept        a judge's rating from 0 to 2; so are instruction and fluent
    harmonic       harmonic mean of the three ratings, 0 if one is 0
    ============== ================================================================================================

    `concept_latent` and `concept_words` are of the latent in every arm: a control that scores as high does as well.
    Controls: `"random direction"` of the same norm, another one for each prompt; `"latent of like density"`, up to
    eight of them in turn (with `index`); `"difference of means"` of the same norm (with `examples`); `"prompting"`,
    "You must mention ..." before the prompt (texts and chats). Strengths are of the latent's activation; a control of
    the same norm gets the same ones. With "clamp" and "scale", random directions are written in the latent's place,
    where and as strongly as it is.

    All strengths and arms of a prompt are one batch, as large as `batch_rows` allows. Interrupted (Ctrl-C), it returns
    the prompts that are done; `is_complete` is then False.

    Args:
        model: a TransformerBridge or HookedTransformer, without steering on it.
        sae: SAE or transcoder of the latent, or directions (`saewb.directions`, `difference_of_means`); for a vector,
            any SAE at the hook point it is for.
        latent_or_vector: index of the latent; or a vector `[d_out]` in the model's units, which fires where the
            activation's component along it is positive.
        prompts: texts, chats (lists of messages) or token ids; ten or more for intervals that say something.
        strengths: in units of the latent's activation. None: .05, .1, .2, .3, .5, .7, 1, 1.5 times the median norm of
            the activation on the prompts, over that of the direction; needed for "scale".
        how: "add", "clamp" or "scale", as for `saewb.steer`.
        n_new_tokens: length of each text.
        judge: `saewb.Chat` or `saewb.LocalChat`, for ratings: three short requests for each text.
        held_out: share of the prompts that the figures of `choice` are reported on; the others choose the strength.
        index: a FeatureIndex of the SAE: for the latent's label and largest activation, and latents of like density.
        concept: what the latent stands for, in words. None: its label in `index`, or else its five likeliest words.
        controls: names, see above; None takes those that can be had.
        examples: two sets of texts, with and without the concept, for the difference of means.
        positions: as for `saewb.steer`.
        skip_special_tokens: as for `saewb.steer`, but True by default: steering the BOS token breaks many models.
        when: as for `saewb.steer`.
        temperature: 0 writes the likeliest tokens; else all arms draw with the same random numbers.
        max_fluency: nats per token, for the choice of a strength without a judge.
        batch_rows: rows run at a time; None takes as many as have 2^26 logits (256 MiB in float32, of which two are
            held).
        budget_tokens: of the judge: the ratings do not start if they may take more, and stop once it counts more.
        seed: of random directions, the split of the prompts, and sampling.
        progress: whether to show progress bars.

    Returns:
        A Sweep: `.choice`, `.to_frame()`, `.matched()`, `.plot()`, `.samples` with the texts.

    Raises:
        ValueError: for a latent, prompt, control or strength that does not work; if the model is steered already; for a
            concept that is neither given nor known, where a judge or a prompt needs it.
        TypeError: for prompts that are one text.

    References:
        Wu et al. 2025, arXiv:2501.17148 (AxBench: ratings, half of the prompts chooses); Turner et al. 2023,
        arXiv:2308.10248 (adding vectors).

    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
        >>> how = {"n_new_tokens": 8, "progress": False}
        >>> sweep = saewb.steering_sweep(model, sae, 972, ["It is a", "She was"], [0, 16], **how)
        >>> table = sweep.to_frame().set_index(["arm", "strength"])
        >>> float(table.kl["latent", 0.0]), float(table.kl["latent", 16.0]) > 0, int(table.kl_n["latent", 16.0])
        (0.0, True, 2)
    """
    import pandas as pd
    from tqdm.auto import tqdm

    sae, latent = _target(model, sae, latent_or_vector)
    site = Site.of(model, sae)
    check_unmodified(model, site.points)
    if isinstance(prompts, (str, bytes)) or not len(prompts):
        raise TypeError(explain("steering_sweep got no list of prompts.", want="several", fix='["I think", "It is"]'))
    if (n_new := index_of(n_new_tokens, "n_new_tokens")) < 1 or not 0 <= held_out < 1:
        what = f"steering_sweep got n_new_tokens={n_new_tokens}, held_out={held_out}."
        raise ValueError(explain(what, want="1 or more, and a share in [0, 1)"))
    if index is not None:
        index.check_sae(sae)
    ids = [prompt_ids(model, prompt) for prompt in prompts]
    longest = max(one.shape[1] for one in ids) + n_new
    check_context(model, longest, f"a prompt and {n_new} new tokens, {longest:,} in all", "n_new_tokens=32")

    with torch.no_grad():
        norm = float(sae.W_dec[latent].cpu().double().norm())
        median = _median_norm(model, site, ids)
        words = _words(model, site, latent)
    values = _strengths(strengths, how, median / norm)
    concept = _concept(concept, index, latent, model, words)
    has_text = [isinstance(prompt, str) or is_chat(prompt) for prompt in prompts]
    names = _controls(controls, index, examples, all(has_text), concept)
    if judge is not None and (concept is None or not all(has_text)):
        what = f"a judge has to know the concept and the prompts; concept is {concept!r}."
        raise ValueError(explain(what, want="texts, and a concept in words", fix='concept="rivers and lakes"'))
    others = _directions(model, site, latent, names, index, examples, len(prompts), seed, progress)
    halves = _halves(len(prompts), held_out, seed)

    where = {"positions": positions, "skip_special_tokens": skip_special_tokens, "when": when}
    sampling = {"max_new_tokens": n_new, "temperature": temperature, "seed": seed}
    sampling["use_past_kv_cache"] = not sae.looks_back
    plan = _Plan(model, site, latent, how, words, where, sampling, batch_rows)
    samples: list[dict[str, Any]] = []
    bar = tqdm(total=len(prompts), desc="steering", unit="prompt", leave=False, disable=not progress)
    try:
        with bar, torch.no_grad():
            for p, prompt in enumerate(prompts):
                target = [_Row(TARGET, value, latent, sae.W_dec[latent]) for value in values]
                controls_of = [
                    _Row(name, value, *others[name](p)) for name in names if name in others for value in values
                ]
                done = _run(plan, ids[p], [*target, *controls_of])
                if "prompting" in names:
                    done.append(_prompted(plan, ids[p], _asking(model, prompt, concept), done[0]))
                samples += [{"prompt": p, "half": halves[p], **one} for one in done]
                bar.update(1)
    except KeyboardInterrupt:
        if not samples:
            raise
    table = pd.DataFrame(samples)
    if judge is not None:
        table = _judge(table, judge, concept, [_shown(prompt) for prompt in prompts], budget_tokens, progress)
    largest = math.nan if index is None else abs(float(index.largest[latent]))
    name = (sae.cfg.metadata.get("latent_names") or {latent: f"latent {latent}"})[latent]
    about = {"name": name, "hook": site.name, "how": how, "concept": concept, "median_norm": median}
    about |= {"words": _texts(model, words), "direction_norm": norm, "largest": largest or math.nan}
    about |= {"judge": None if judge is None else judge.name, "controls": names}
    return Sweep(table, about, len(prompts), max_fluency)


def _target(model: nn.Module, sae: Any, latent_or_vector: Any) -> tuple[Any, int]:
    """SAE and latent to steer; for a vector, an SAE of that one direction at the point where `sae` writes."""
    vector = torch.as_tensor(latent_or_vector) if not isinstance(latent_or_vector, int) else None
    if vector is None or vector.ndim == 0:
        return sae, index_of(latent_or_vector, "latent", sae.cfg.d_sae, of=sae)
    site = Site.of(model, sae)
    if tuple(vector.shape) != (site.d_out,) or site.head is not None:
        what = f"a vector of shape {tuple(vector.shape)} for {site.hook_name_out!r}, which has {site.d_out}."
        raise ValueError(explain(what, want=f"[{site.d_out}], in the model's units"))
    return directions_sae({"vector": vector}, site.hook_name_out).to(sae.W_dec), 0


def _words(model: nn.Module, site: Site, latent: int) -> Int[Tensor, " words"]:
    """The latent's words; none where its point does not add to the residual stream."""
    try:
        return direction_words(model, site, site.sae.W_dec[latent][None], N_WORDS)[0].cpu()
    except ValueError:
        return torch.zeros(0, dtype=torch.long)


def _texts(model: nn.Module, ids: Tensor) -> list[str]:
    if getattr(model, "tokenizer", None) is None:
        return [f"<{i}>" for i in ids.tolist()]
    texts = single_texts(model.tokenizer, ids.tolist())
    return [texts.get(i, f"<{i}>") for i in ids.tolist()]


@torch.no_grad()
def _median_norm(model: nn.Module, site: Site, ids: Sequence[Tensor]) -> float:
    """Median norm of the activation at the write point, over the tokens of the prompts that are not special."""
    special = special_ids(model, True) if getattr(model, "tokenizer", None) is not None else ()
    norms = []
    with hook_points.lock(model), eval_mode(model):
        for one in ids:
            target = site.read_target(capture(model, one, [site.hook_name_out])[site.hook_name_out])[0]
            plain = ~special_mask(one[0], special).to(target.device)
            norms.append(target.float().norm(dim=-1)[plain if bool(plain.any()) else slice(None)].cpu())
    return float(torch.cat(norms).median())


def _strengths(strengths: Sequence[float] | None, how: str, unit: float) -> list[float]:
    if strengths is None and how == "scale":
        raise ValueError(explain("how='scale' needs strengths.", want="factors", fix="strengths=[0, 0.5, 2, 4]"))
    values = [m * unit for m in MULTIPLES] if strengths is None else [float(s) for s in strengths]
    if not values or not all(map(math.isfinite, values)) or len(set(values)) < len(values):
        raise ValueError(explain(f"steering_sweep got strengths={strengths!r}.", want="finite numbers, each once"))
    return values


def _concept(
    concept: str | None, index: FeatureIndex | None, latent: int, model: nn.Module, words: Tensor
) -> str | None:
    if concept is not None:
        return concept
    if index is not None and index.labels.get(latent):
        return index.labels[latent]
    return "one of the words " + ", ".join(map(quoted, _texts(model, words[:5]))) if len(words) else None


def _controls(
    names: Sequence[str] | None, index: Any, examples: Any, has_text: bool, concept: str | None
) -> tuple[str, ...]:
    """Names of the controls; those that can be had, or those asked for."""
    lacks = {
        "latent of like density": None if index is not None else "an index: index=saewb.build_index(model, sae, texts)",
        "difference of means": None if examples is not None else "examples=(texts_with, texts_without)",
        "prompting": None if has_text and concept else "prompts that are texts or chats, and concept=",
    }
    if names is None:
        return tuple(name for name in CONTROLS if lacks.get(name) is None)
    for name in (names := [names] if isinstance(names, str) else list(names)):
        if name not in CONTROLS:
            what = f"steering_sweep got the control {name!r}."
            raise ValueError(explain(what, near=near(name, CONTROLS), want=", ".join(CONTROLS)))
        if lacks.get(name) is not None:
            raise ValueError(explain(f"the control {name!r} lacks something.", want=lacks[name]))
    return tuple(name for name in CONTROLS if name in names)


def _directions(
    model: nn.Module,
    site: Site,
    latent: int,
    names: Sequence[str],
    index: FeatureIndex | None,
    examples: Any,
    n: int,
    seed: int,
    progress: bool,
) -> dict[str, Callable[[int], tuple[int, Tensor]]]:
    """For each control that steers, a function from the number of a prompt to its latent and direction."""
    own, result = site.sae.W_dec[latent].detach(), {}
    if CONTROLS[0] in names:
        rows = random_directions(own[None], n, seed)
        result[CONTROLS[0]] = lambda p: (latent, rows[p])
    if CONTROLS[1] in names:
        density = index.density
        distance = (density.clamp_min(1e-12).log() - density[latent].clamp_min(1e-12).log()).abs()
        distance[latent] = distance[density == 0] = torch.inf
        near_ones = distance.argsort(stable=True)[: min(_N_LIKE, int(distance.isfinite().sum()))].tolist()
        if not near_ones:
            raise ValueError(explain("no other latent of this index fires.", want="an index of more text"))
        result[CONTROLS[1]] = lambda p: (j := near_ones[p % len(near_ones)], site.sae.W_dec[j].detach())
    if CONTROLS[2] in names:
        v = difference_of_means(model, *examples, site.hook_name_out, progress=progress).W_dec[0].to(own)
        if v.shape != own.shape:
            what = f"the difference of means has {v.numel()} numbers, the latent's direction {own.numel()}."
            raise ValueError(explain(what, want="an SAE on a whole activation, without heads"))
        v = v / v.norm() * own.norm()
        result[CONTROLS[2]] = lambda p: (latent, v)
    return result


def _halves(n: int, held_out: float, seed: int) -> list[str]:
    """Half of each prompt, "choose" or "report", at least one of each; "both" for a single one or without a split."""
    if n == 1 or held_out == 0:
        return ["both"] * n
    order = list(range(n))
    random.Random(seed).shuffle(order)
    report = set(order[: min(n - 1, max(1, round(n * held_out)))])
    return ["report" if i in report else "choose" for i in range(n)]


def _run(plan: _Plan, ids: Int[Tensor, "1 pos"], rows: Sequence[_Row]) -> list[dict[str, Any]]:
    """Texts and figures of the unsteered row and of these, some at a time, each time beside an unsteered one."""
    length = ids.shape[1] + plan.sampling["max_new_tokens"]
    n_rows = plan.batch_rows or max(2, _BATCH_NUMBERS // (length * plan.model.cfg.d_vocab))
    step, done = max(1, n_rows - 1), []
    for begin in range(0, len(rows), step):
        batch = [_Row(UNSTEERED, None, plan.latent, plan.site.sae.W_dec[plan.latent]), *rows[begin : begin + step]]
        texts = write_rows(plan.model, ids, len(batch), lambda b=batch: _steer(plan, b), **plan.sampling)
        figures = _measure(plan, ids, texts, lambda b=batch: _steer(plan, b))
        named = [
            {"arm": row.arm, "strength": math.nan if row.strength is None else row.strength, **one}
            for row, one in zip(batch, figures, strict=True)
        ]
        done += named if not begin else named[1:]
    return done


def _steer(plan: _Plan, rows: Sequence[_Row]) -> Any:
    n = len(rows)
    values: list[Any] = [[row.strength if r == i else None for r in range(n)] for i, row in enumerate(rows)]
    directions = torch.stack([row.direction for row in rows])
    change = LatentChange(plan.site, [row.latent for row in rows], values, plan.how, directions)
    return steer_rows(plan.model, change, **plan.where)


def _measure(plan: _Plan, ids: Tensor, texts: Sequence[Sequence[int]], intervene: Any) -> list[dict[str, Any]]:
    """Figures of each text of a batch whose first row is unsteered."""
    activations: dict[str, Tensor] = {}

    @contextmanager
    def reading() -> Any:
        with capturing(plan.model, [plan.site.hook_name]) as captured:
            yield
        activations.update(captured)

    kl, clean_nll, nll = compare_rows(plan.model, ids, texts[0], texts, intervene, reading)
    x = plan.site.read_input(activations[plan.site.hook_name])
    fires = latents_at(plan.site, x, [plan.latent])[..., 0] > 0
    words = set(plan.words.tolist())
    return [
        {
            "text": _text(plan.model, text),
            "n_tokens": len(text),
            "kl": float(kl[r]),
            "fluency": float(nll[r] - clean_nll[r]),
            "repetition": repetition(text),
            "concept_latent": float(fires[r, ids.shape[1] : ids.shape[1] + len(text)].float().mean()),
            "concept_words": sum(i in words for i in text) / len(text) if words else math.nan,
        }
        for r, text in enumerate(texts)
    ]


def _prompted(plan: _Plan, ids: Tensor, asking: Tensor, unsteered: Mapping[str, Any]) -> dict[str, Any]:
    """The text that the clean model writes when it is asked for the concept, measured as the others."""
    n_new = plan.sampling["max_new_tokens"]
    n = asking.shape[1] + n_new
    check_context(plan.model, n, f"a prompt that asks for the concept, {n:,} tokens", "controls=['random direction']")
    (text,) = write_rows(plan.model, asking, 1, None, **plan.sampling)
    (clean,) = write_rows(plan.model, ids, 1, None, **plan.sampling)
    figures = _measure(plan, ids, [clean, text], _no_steering)[1]
    with hook_points.lock(plan.model), eval_mode(plan.model):
        tail = torch.tensor([clean], device=ids.device)
        p, q = (plan.model(torch.cat([one, tail], 1))[0, one.shape[1] - 1 :] for one in (asking, ids))
    log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
    kl = float((log_p.exp() * (log_p - log_q)).sum(-1).cpu().double().mean())
    return {"arm": "prompting", "strength": math.nan, **figures, "kl": kl}


@contextmanager
def _no_steering() -> Any:
    yield


def _asking(model: nn.Module, prompt: Any, concept: str | None) -> Int[Tensor, "1 pos"]:
    """The prompt with the request to mention the concept before it; in a chat, in the last message of the user."""
    ask = f"You must mention {concept}."
    if not is_chat(prompt):
        return prompt_ids(model, f"{ask} {prompt}")
    last = max((i for i, m in enumerate(prompt) if m["role"] == "user"), default=0)
    messages = [{**m, "content": f"{ask} {m['content']}"} if i == last else m for i, m in enumerate(prompt)]
    return prompt_ids(model, messages)


def _text(model: nn.Module, ids: Sequence[int]) -> str:
    if getattr(model, "tokenizer", None) is None:
        return " ".join(f"<{i}>" for i in ids)
    return model.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _shown(prompt: Any) -> str:
    return "\n".join(f"{m['role']}: {m['content']}" for m in prompt) if is_chat(prompt) else str(prompt)


def _judge(
    table: pd.DataFrame, judge: Judge, concept: Any, prompts: Sequence[str], budget_tokens: int | None, progress: bool
) -> pd.DataFrame:
    """The table with the judge's ratings; nan where it gave none, or was interrupted before."""
    per_text = [rating_requests(concept, prompts[p], text) for p, text in zip(table.prompt, table.text, strict=True)]
    requests = [request for three in per_text for request in three]
    judge.cost(requests).check_budget(budget_tokens, "the ratings of steering_sweep")
    ratings = [math.nan] * len(requests)
    try:
        with closing(judge.ask(requests, budget_tokens=budget_tokens, progress=progress)) as stream:
            for position, answer in stream:
                ratings[position] = read_rating(answer.text)
    except KeyboardInterrupt:
        if all(map(math.isnan, ratings)):
            raise
    threes = [ratings[i : i + 3] for i in range(0, len(ratings), 3)]
    columns = {name: [three[i] for three in threes] for i, name in enumerate(RATINGS)}
    return table.assign(**columns, harmonic=[harmonic_mean(three) for three in threes])
