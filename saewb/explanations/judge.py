"""Language models that explain and score: an endpoint with OpenAI's interface, one on this machine, or a function.

1. A `Request` is a short chat; `Judge.ask` answers many, several at a time, in the order in which they come.
2. Every answer is cached on disk under the sha256 of its request, so what was interrupted or repeated costs nothing.
3. `Judge.cost` says before a run how many calls and tokens it takes.

An endpoint's key is read from the environment for each request. It is in no attribute, file or message.
"""

from __future__ import annotations

import abc
import hashlib
import json
import math
import os
import re
import threading
import urllib.parse
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from saewb._files import read_json, write_text
from saewb._http import HTTPRefusal, request_json
from saewb.errors import FormatError, explain
from saewb.models import hook_points
from saewb.models.capture import eval_mode
from saewb.models.forward import KVCachedText
from saewb.models.load import cache_folder, load_model
from saewb.models.tokenizer import end_ids, token_strings, tokenizer_of

N_TOP = 5
"""Likeliest tokens of which an answer gives log probabilities."""
_MAX_BYTES = 8 << 20  # of an endpoint's answer
_BYTES_PER_TOKEN = 3  # of English: fewer than any common tokenizer has, so that a cost is rather too high
_ENV_NAME = re.compile(r"[A-Z_][A-Z0-9_]*")  # capitals only: most keys are not, and none may be printed
_LONGEST_WAIT_S = 300.0  # that a server may ask for


@dataclass(frozen=True)
class Request:
    """A chat that a judge is to continue."""

    messages: tuple[tuple[str, str], ...]
    """Role ("system", "user" or "assistant") and text of each message."""
    max_tokens: int
    """Tokens of the answer, at most."""
    logprobs: bool = False
    """Whether log probabilities of the answer's tokens are wanted."""
    embeds: bool = False
    """Whether a vector of each message is wanted, and no answer."""

    @property
    def prompt(self) -> str:
        """Text of the last message."""
        return self.messages[-1][1]

    @property
    def sha(self) -> str:
        """Start of the sha256 of the chat."""
        return hashlib.sha256(json.dumps(self.messages).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class AnswerToken:
    """A token of an answer, and what else it might have been."""

    text: str
    """Text of the token."""
    top: tuple[tuple[str, float], ...]
    """Likeliest tokens in its place, each with its log probability."""


@dataclass(frozen=True)
class Answer:
    """What a judge answered."""

    text: str
    """Text of the answer; "" for a refusal."""
    tokens: tuple[AnswerToken, ...] = ()
    """Its tokens with log probabilities; empty if the judge gives none."""
    n_tokens: int = 0
    """Tokens read and written, as the judge counts them; 0 if it does not say, or if the answer was cached."""
    vectors: tuple[tuple[float, ...], ...] = ()
    """Embedding of each message, for a request that wants them."""


@dataclass(frozen=True)
class Cost:
    """What a run asks of a judge, counted before it starts.

    Example:
        >>> Cost(n_calls=20, n_cached=5, tokens_in=41_000, tokens_out=1_500)
        Cost(20 calls, about 41,000 tokens to read and at most 1,500 to write; 5 more in the cache)
    """

    n_calls: int
    """Requests to send."""
    n_cached: int
    """Requests whose answers are in the cache."""
    tokens_in: int
    """Tokens to read: exact for a model on this machine, else from the length of the text, rather too high."""
    tokens_out: int
    """Tokens to write, at most."""

    def __repr__(self) -> str:
        cached = f"; {self.n_cached:,} more in the cache" if self.n_cached else ""
        about = f"about {self.tokens_in:,} tokens to read and at most {self.tokens_out:,} to write"
        return f"Cost({self.n_calls:,} calls, {about}{cached})"

    def check_budget(self, budget_tokens: int | None, what: str) -> None:
        """Raise a ValueError if the run may take more tokens than this.

        Args:
            budget_tokens: tokens to read and write; None for any number.
            what: that is to run, for the message.
        """
        if budget_tokens is not None and self.tokens_in + self.tokens_out > budget_tokens:
            message = f"{what} would take {self!r}, budget_tokens is {budget_tokens:,}."
            raise ValueError(explain(message, want="fewer latents or examples, or a larger budget_tokens"))


class Judge(abc.ABC):
    """A language model that explains latents and scores explanations; see `Chat`, `LocalChat` and `Scripted`."""

    def __init__(self, name: str, n_parallel: int, cache: str | Path | None) -> None:
        if type(n_parallel) is not int or n_parallel < 1:
            raise ValueError(explain(f"got n_parallel={n_parallel!r}.", want="a number of 1 or more"))
        self.name, self.n_parallel = name, n_parallel
        self._cache = None if cache is None else Path(cache).expanduser()

    @abc.abstractmethod
    def _complete(self, request: Request, stop: threading.Event) -> Answer:
        """Answer one request; after `stop` is set, waiting is over."""

    def _identity(self) -> Mapping[str, Any]:
        """What the answer depends on besides the request, as plain values."""
        return {"name": self.name}

    @property
    def can_embed(self) -> bool:
        """Whether it answers requests for embeddings."""
        return False

    def count_tokens(self, request: Request) -> int:
        """Tokens of a request, estimated from its length in bytes; rather too many.

        Args:
            request: not sent.
        """
        return math.ceil(sum(len(text.encode()) for _, text in request.messages) / _BYTES_PER_TOKEN)

    def cost(self, requests: Sequence[Request]) -> Cost:
        """Count calls and tokens of a run, without any call.

        Args:
            requests: not sent.
        """
        distinct = list(dict.fromkeys(requests))
        new = [request for request in distinct if self._read_cached(request) is None]
        tokens_in, tokens_out = sum(map(self.count_tokens, new)), sum(request.max_tokens for request in new)
        return Cost(len(new), len(distinct) - len(new), tokens_in, tokens_out)

    def ask(
        self, requests: Sequence[Request], *, budget_tokens: int | None = None, progress: bool = False
    ) -> Generator[tuple[int, Answer], None, None]:
        """Answer requests, `n_parallel` at a time; equal ones once.

        Args:
            requests: to answer.
            budget_tokens: stop when the judge has counted more tokens than this, read and written.
            progress: whether to show a progress bar.

        Returns:
            An iterator of (position among the requests, answer), in the order in which they come. Answers are cached
            before they are given; where it stops early, the others are neither asked nor waited for.

        Raises:
            ConnectionError: if the endpoint refuses or cannot be reached, after 5 tries where another may help.
            FormatError: if it answers in another format.
            RuntimeError: if `budget_tokens` are used up.
        """
        from tqdm.auto import tqdm

        places: dict[Request, list[int]] = {}
        for position, request in enumerate(requests):
            places.setdefault(request, []).append(position)
        stop, used, pool = threading.Event(), 0, ThreadPoolExecutor(self.n_parallel)
        bar = tqdm(total=len(requests), desc=self.name, unit="answer", leave=False, disable=not progress)
        try:
            futures: dict[Future[Answer], Request] = {
                pool.submit(self._answer, request, stop): request for request in places
            }
            for future in as_completed(futures):
                answer = future.result()
                for position in places[futures[future]]:
                    yield position, answer
                    bar.update(1)
                used += answer.n_tokens
                if budget_tokens is not None and used > budget_tokens:
                    what = f"{self.name} has used {used:,} tokens, budget_tokens is {budget_tokens:,}."
                    raise RuntimeError(explain(what, want="a larger budget_tokens; answers so far are in the cache"))
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            bar.close()

    def _answer(self, request: Request, stop: threading.Event) -> Answer:
        if (cached := self._read_cached(request)) is not None:
            return cached
        answer = self._complete(request, stop)
        if (file := self._cache_file(request)) is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            values = {"text": answer.text, "tokens": [[token.text, token.top] for token in answer.tokens]}
            values |= {"vectors": answer.vectors} if answer.vectors else {}
            write_text(file, json.dumps(values, ensure_ascii=True))
        return answer

    def _cache_file(self, request: Request) -> Path | None:
        if self._cache is None:
            return None
        key = json.dumps([dict(self._identity()), asdict(request)], sort_keys=True)
        sha = hashlib.sha256(key.encode()).hexdigest()
        return self._cache / sha[:2] / f"{sha}.json"

    def _read_cached(self, request: Request) -> Answer | None:
        """A cached answer; None if there is none, or the file is damaged."""
        if (file := self._cache_file(request)) is None or not file.is_file():
            return None
        try:
            values = read_json(file)
            tokens = tuple(_token(text, top) for text, top in values["tokens"])
            return Answer(_text(values["text"]), tokens, vectors=_vectors(values.get("vectors", [])))
        except (FormatError, KeyError, TypeError, ValueError):
            return None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _token(text: Any, top: Any) -> AnswerToken:
    return AnswerToken(_text(text), tuple((_text(other), float(logprob)) for other, logprob in top))


def _vectors(values: Any) -> tuple[tuple[float, ...], ...]:
    vectors = tuple(tuple(map(float, vector)) for vector in values)
    if len(set(map(len, vectors))) > 1:
        raise ValueError("vectors of different lengths")
    return vectors


def _default_cache(cache: str | Path | bool) -> Path | None:
    """Folder of a judge's answers: True is saewb's own."""
    if isinstance(cache, bool):
        return cache_folder() / "answers" if cache else None
    return Path(cache).expanduser()


class Chat(Judge):
    """A language model behind an endpoint with OpenAI's chat interface, on this machine or elsewhere.

    Args:
        base_url: address of the interface, without "/chat/completions".
        model: name of the model, as the endpoint knows it.
        key_env: name of the environment variable that holds the key; None sends none. The key itself is read for each
            request, and is in no attribute, file or message.
        embedding_model: name of the endpoint's model for embeddings, for the score "embedding"; None for none.
        n_parallel: requests at a time.
        seed: sent with each request.
        timeout: seconds for each request.
        tries: requests are sent this often while the endpoint is busy (429), broken (5xx) or out of reach; between them
            it waits as long as the endpoint says, or else 1, 2, 4, ... seconds.
        options: further fields of a request, such as `{"top_p": 0.9}`; None leaves a field out, as for models that want
            `{"max_tokens": None, "max_completion_tokens": 400, "temperature": None}`.
        cache: folder of the answers; True is `answers` in saewb's cache folder, False caches none.

    Raises:
        ValueError: if `base_url` is no address, or holds a password or a key; if `key_env` is no name of a variable.

    Example:
        >>> judge = Chat("http://localhost:8000/v1", model="qwen2.5-7b", key_env="OPENAI_API_KEY")
        >>> judge
        Chat('http://localhost:8000/v1', model='qwen2.5-7b', key_env='OPENAI_API_KEY')
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        key_env: str | None = None,
        *,
        embedding_model: str | None = None,
        n_parallel: int = 8,
        seed: int = 0,
        timeout: float = 120.0,
        tries: int = 5,
        options: Mapping[str, Any] = MappingProxyType({}),
        cache: str | Path | bool = True,
    ) -> None:
        url = urllib.parse.urlsplit(base_url)
        if url.scheme not in ("http", "https") or not url.hostname or url.query or url.username or url.password:
            want = "http://host/v1 or https://host/v1; a key goes into an environment variable"
            fix = 'saewb.Chat("https://host/v1", model="...", key_env="OPENAI_API_KEY")'
            raise ValueError(explain("base_url is no plain address of an endpoint.", want=want, fix=fix))
        if key_env is not None and not _ENV_NAME.fullmatch(key_env):
            fix = 'os.environ["JUDGE_KEY"] = getpass.getpass(); saewb.Chat(..., key_env="JUDGE_KEY")'
            what = "key_env is no name of an environment variable in capitals."  # it may be the key itself
            raise ValueError(explain(what, want="the name of the variable that holds the key", fix=fix))
        super().__init__(model, n_parallel, _default_cache(cache))
        self.base_url, self.model, self.key_env = base_url.rstrip("/"), model, key_env
        self.seed, self.timeout, self.tries, self.options = seed, timeout, tries, dict(options)
        self.embedding_model = embedding_model

    def __repr__(self) -> str:
        key = "" if self.key_env is None else f", key_env={self.key_env!r}"
        return f"Chat({self.base_url!r}, model={self.model!r}{key})"

    def _identity(self) -> Mapping[str, Any]:
        values = {"url": self.base_url, "model": self.model, "seed": self.seed, "options": self.options}
        return values | {"embedding_model": self.embedding_model}

    @property
    def can_embed(self) -> bool:
        """Whether it has an `embedding_model`."""
        return self.embedding_model is not None

    def _complete(self, request: Request, stop: threading.Event) -> Answer:
        if request.embeds:
            texts = [text for _, text in request.messages]
            body = {"model": self.embedding_model, "input": texts}
            return self._try("/embeddings", body, lambda values: _parse_vectors(values, len(texts)), stop)
        messages = [{"role": role, "content": text} for role, text in request.messages]
        body: dict[str, Any] = {"model": self.model, "messages": messages, "temperature": 0}
        body |= {"max_tokens": request.max_tokens, "seed": self.seed}
        body |= {"logprobs": True, "top_logprobs": N_TOP} if request.logprobs else {}
        body = {name: value for name, value in (body | self.options).items() if value is not None}
        return self._try("/chat/completions", body, _parse_answer, stop)

    def _try(
        self,
        path: str,
        body: Mapping[str, Any],
        parse: Callable[[Mapping[str, Any]], Answer],
        stop: threading.Event,
    ) -> Answer:
        """Send a request until it is answered, `tries` times at most."""
        for attempt in range(self.tries):
            try:
                return parse(self._post(path, body))
            except HTTPRefusal as error:
                if _is_filtered(error):
                    return Answer("")
                if (error.code != 429 and error.code < 500) or attempt == self.tries - 1:
                    raise
                wait = 2.0**attempt if error.retry_after is None else min(error.retry_after, _LONGEST_WAIT_S)
            except ConnectionError:
                if attempt == self.tries - 1:
                    raise
                wait = 2.0**attempt
            if stop.wait(wait):
                break
        raise ConnectionError(f"{self.base_url} was not asked again: the run has stopped")

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        key = "" if self.key_env is None else os.environ.get(self.key_env, "").strip()
        if self.key_env is not None and not key:
            fix = f'os.environ["{self.key_env}"] = getpass.getpass()'
            raise ValueError(explain(f"the environment variable {self.key_env} is not set.", want="a key", fix=fix))
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        how: dict[str, Any] = {"site": self.base_url, "max_bytes": _MAX_BYTES, "secret": key}
        return request_json(self.base_url + path, self.timeout, body, headers, **how)


def _is_filtered(error: HTTPRefusal) -> bool:
    """Whether an endpoint refused one text for what it says, and not the request for its form."""
    return error.code == 400 and re.search(r"content.{0,20}(filter|policy)", error.words, re.IGNORECASE) is not None


def _parse_answer(values: Mapping[str, Any]) -> Answer:
    """An answer of OpenAI's interface; one without content is a refusal.

    Raises:
        FormatError: if it is none.
    """
    try:
        choice = values["choices"][0]
        text = choice["message"].get("content") or ""
        tokens = (choice.get("logprobs") or {}).get("content") or []
        tops = [[(other["token"], other["logprob"]) for other in token["top_logprobs"]] for token in tokens]
        parsed = tuple(_token(token["token"], top) for token, top in zip(tokens, tops, strict=True))
        n_tokens = (values.get("usage") or {}).get("total_tokens")
        return Answer(_text(text), parsed, n_tokens if type(n_tokens) is int else 0)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        what = f"the endpoint's answer is none of OpenAI's chat interface ({type(error).__name__}: {error})."
        raise FormatError(explain(what, want='{"choices": [{"message": {"content": "..."}}]}')) from error


def _parse_vectors(values: Mapping[str, Any], n: int) -> Answer:
    """Embeddings of OpenAI's interface, in the order of the texts.

    Raises:
        FormatError: if they are none, or not `n`.
    """
    try:
        rows = sorted(values["data"], key=lambda row: row["index"])
        vectors = _vectors(row["embedding"] for row in rows)
        if [row["index"] for row in rows] != list(range(n)):
            raise ValueError(f"{len(rows)} of {n}")
        n_tokens = (values.get("usage") or {}).get("total_tokens")
        return Answer("", (), n_tokens if type(n_tokens) is int else 0, vectors)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        what = f"the endpoint's answer has no embeddings of OpenAI's interface ({type(error).__name__}: {error})."
        raise FormatError(explain(what, want='{"data": [{"index": 0, "embedding": [...]}]}')) from error


class LocalChat(Judge):
    """A chat model on this machine, one request at a time; the likeliest token each time.

    Args:
        model: what `saewb.load_model` takes, such as a folder or "smollm2-135m"; or a model that it has loaded.
        cache: folder of the answers; True is `answers` in saewb's cache folder, False caches none. True caches none of
            a model passed as an object, which has no name of its own.
        load: options of `saewb.load_model`, such as `dtype` and `device`.

    Raises:
        ValueError: if the model's tokenizer has no chat template.

    Example:
        >>> LocalChat("tiny", device="cpu")
        Traceback (most recent call last):
        ...
        ValueError: tiny has no chat template: it does not answer, it continues texts.
          want: a chat model
          fix:  saewb.LocalChat("smollm2-135m")
    """

    def __init__(self, model: Any, *, cache: str | Path | bool = True, **load: Any) -> None:
        is_object = isinstance(model, torch.nn.Module)
        self._model = model if is_object and not load else load_model(model, **load)
        name = str(self._model.cfg.model_name)
        self._tokenizer = tokenizer_of(self._model)
        if not getattr(self._tokenizer, "chat_template", None):
            what = f"{name} has no chat template: it does not answer, it continues texts."
            raise ValueError(explain(what, want="a chat model", fix='saewb.LocalChat("smollm2-135m")'))
        super().__init__(name, 1, None if is_object and cache is True else _default_cache(cache))
        source = name if is_object else str(model)
        self._source = f"{source} {next(self._model.parameters()).dtype}"

    def __repr__(self) -> str:
        return f"LocalChat({self.name!r})"

    def _identity(self) -> Mapping[str, Any]:
        return {"local": self._source}

    def _ids(self, request: Request) -> list[int]:
        messages = [{"role": role, "content": text} for role, text in request.messages]
        how = {"tokenize": False, "add_generation_prompt": True}
        text = self._tokenizer.apply_chat_template(messages, **how)
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def count_tokens(self, request: Request) -> int:
        """Tokens of a request, exactly.

        Args:
            request: not sent.
        """
        return len(self._ids(request))

    def _complete(self, request: Request, stop: threading.Event) -> Answer:
        ids, model = self._ids(request), self._model
        if len(ids) + request.max_tokens > model.cfg.n_ctx:
            what = f"a request of {len(ids):,} tokens and {request.max_tokens:,} for the answer, for {self.name}."
            raise ValueError(explain(what, want=f"{model.cfg.n_ctx:,} at most: fewer or shorter examples"))
        device = next(model.parameters()).device
        text, ends = KVCachedText(model, torch.tensor([ids], device=device)), end_ids(model)
        new: list[int] = []
        tops: list[tuple[list[float], list[int]]] = []
        with hook_points.lock(model), eval_mode(model), torch.no_grad():
            while len(new) < request.max_tokens and not stop.is_set():
                values, tokens = text.logits().float().log_softmax(-1).topk(N_TOP)
                best = int(tokens[0])
                if best in ends:
                    break
                new.append(best)
                text.append(best)
                if request.logprobs:
                    tops.append((values.tolist(), tokens.tolist()))
        if stop.is_set():
            raise RuntimeError(f"{self.name} was stopped")
        strings = token_strings(self._tokenizer, new)
        return Answer("".join(strings), self._answer_tokens(strings, tops), len(ids) + len(new))

    def _answer_tokens(self, strings: list[str], tops: list[tuple[list[float], list[int]]]) -> tuple[AnswerToken, ...]:
        texts = {i: self._tokenizer.decode([i]) for i in {i for _, ids in tops for i in ids}}
        pairs = zip(strings, tops, strict=bool(tops))
        return tuple(
            AnswerToken(text, tuple((texts[i], value) for value, i in zip(values, ids, strict=True)))
            for text, (values, ids) in pairs
        )


class Scripted(Judge):
    """A function in place of a language model: for tests, and to see what is asked without any cost.

    Args:
        answer: gets a Request and returns the text of the answer, or an Answer.
        embed: gets texts and returns a vector of each; None embeds none.
        name: of the judge in records.
        n_parallel: requests at a time.
        cache: folder of the answers; None caches none.

    Example:
        >>> judge = Scripted(lambda request: request.prompt.upper())
        >>> dict(judge.ask([Request((("user", "say it"),), max_tokens=5)]))[0].text
        'SAY IT'
    """

    def __init__(
        self,
        answer: Callable[[Request], str | Answer],
        name: str = "scripted",
        *,
        embed: Callable[[Sequence[str]], Sequence[Sequence[float]]] | None = None,
        n_parallel: int = 1,
        cache: str | Path | None = None,
    ) -> None:
        super().__init__(name, n_parallel, cache)
        self._function, self._embed = answer, embed

    def __repr__(self) -> str:
        return f"Scripted({self.name!r})"

    @property
    def can_embed(self) -> bool:
        """Whether it has a function `embed`."""
        return self._embed is not None

    def _complete(self, request: Request, stop: threading.Event) -> Answer:
        if request.embeds and self._embed is not None:
            return Answer("", vectors=_vectors(self._embed([text for _, text in request.messages])))
        answer = self._function(request)
        return answer if isinstance(answer, Answer) else Answer(_text(answer))
