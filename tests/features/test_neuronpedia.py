"""Links, embedded pages, explanations and lists, against a stand-in for the site; and the JSON its users know."""

import json
import threading
import time
import urllib.parse
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers import tiny_models
from helpers.graphs import large

import saewb
from saewb.errors import FormatError
from saewb.features import build_index, neuronpedia
from saewb.features.labels import Explanation, Explanations
from saewb.sae.sae import SAE, SAEConfig

SOURCE = "gpt2-small/6-res-jb"


class StandIn(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        latent = self.path.rsplit("/", 1)[-1]
        if latent == "5":
            time.sleep(1.5)
        if latent == "404":
            self.send_error(404)
            return
        if latent == "12":
            self.answer(b'{"error": "The feature you specified is not available."}', 404)
            return
        if latent == "13":
            self.answer(b'{"error": "slow\\n down"}', 429)
            return
        if latent in ("14", "15"):
            self.redirect(self.server.elsewhere if latent == "14" else f"/api/feature/{SOURCE}/1")
            return
        if latent == "16":
            self.send_response(200)
            self.end_headers()
            for _ in range(40):
                self.wfile.write(b" ")
                time.sleep(0.05)
            return
        result = {"index": latent, "explanations": [{"description": f"about {latent}", "explanationModelName": "m"}]}
        answers = {"6": b"<html>", "7": b"[]", "8": b'{"explanations": 3}', "9": b'{"index": "9"}'}
        self.answer(answers.get(latent, json.dumps(result).encode()))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers["x-api-key"], body))
        if self.headers["x-api-key"] == "redirected":
            self.redirect(self.server.elsewhere)
            return
        if self.path == "/api/graph/signed-put" and self.headers["x-api-key"] in ("mine", "third"):
            path = "/bucket/graph.json?signature=s3cret" if self.headers["x-api-key"] == "mine" else "/full?s=s3cret"
            url = f"http://127.0.0.1:{self.server.server_port}{path}"
            self.answer(json.dumps({"url": url, "putRequestId": "put 1"}).encode())
            return
        result = {"url": "https://there/list/1"} if self.headers["x-api-key"] == "mine" else {"message": "wrong key"}
        self.answer(json.dumps(result).encode())

    def do_PUT(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, self.headers["x-api-key"], content))
        if self.path.startswith("/full"):
            self.answer(b'{"error": "no room for s=s3cret"}', 507)
            return
        self.answer(b"")

    def redirect(self, address):
        self.send_response(302)
        self.send_header("Location", address)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, body, code=200):
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def site():
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def sae(**metadata):
    return SAE(SAEConfig(4, 8, hook="blocks.1.hook_resid_post", metadata=metadata))


@pytest.mark.parametrize("of", [sae(neuronpedia_id=SOURCE), sae(neuronpedia=SOURCE)])
def test_a_page_by_what_the_sae_names(of):
    page = neuronpedia.page(of, 7)
    assert page.url == f"https://www.neuronpedia.org/{SOURCE}/7"
    shown = page._repr_html_()
    assert f'<iframe src="{page.url}?embed=true&amp;' in shown
    assert f'<a href="{page.url}"' in shown


def test_an_sae_without_a_page_says_what_to_type():
    with pytest.raises(ValueError, match=r"names no page(.|\n)*source='gpt2-small/6-res-jb'"):
        neuronpedia.page(sae(), 7)
    assert neuronpedia.page(sae(), 7, source=SOURCE).latent == 7
    for wrong in ("x", 'a/b"><script>', "a/b/c", "../..", "a/..", "./b", "a/b\n"):
        with pytest.raises(ValueError, match="no source of Neuronpedia"):
            neuronpedia.page(None, 7, source=wrong)
    for wrong in (-1, 1.5):
        with pytest.raises(ValueError, match="want: (an index|a whole number)"):
            neuronpedia.page(None, wrong, source=SOURCE)


def test_explanations_are_fetched_once(site, tmp_path):
    how = {"source": SOURCE, "site": site.url, "cache": tmp_path}
    result = neuronpedia.explanations(None, [1, 2], **how)
    assert result == Explanations(Explanation(i, f"about {i}", "neuronpedia", "m") for i in (1, 2))
    assert result.labels() == {1: "about 1", 2: "about 2"}
    assert site.asked == [f"/api/feature/{SOURCE}/{i}" for i in (1, 2)]
    assert set(neuronpedia.explanations(None, [2, 1], **how)) == set(result)
    assert len(site.asked) == 2
    neuronpedia.explanations(None, [1], **how, max_age_days=0)
    assert len(site.asked) == 3
    assert len(neuronpedia.explanations(None, [9], **how)) == 0


def test_an_explanation_on_disk_is_of_the_address_asked_for(site, tmp_path):
    how = {"source": SOURCE, "cache": tmp_path}
    for n, address in enumerate([site.url, f"{site.url}/mirror"], 1):  # both are of one folder
        neuronpedia.explanations(None, [1], site=address, **how)
        assert len(site.asked) == n
    (file,) = tmp_path.rglob("1.json")
    before = json.loads(file.read_text())
    assert before["url"] == f"{site.url}/mirror/api/feature/{SOURCE}/1"
    for content in ({**before, "url": "https://elsewhere/1"}, {"explanations": [{"description": "of 0.1.0"}]}):
        file.write_text(json.dumps(content))
        n_asked = len(site.asked)
        found = neuronpedia.explanations(None, [1], site=site.url, **how)
        assert (found.of(1)[0].text, len(site.asked)) == ("about 1", n_asked + 1)


def test_offline_says_so_in_one_line_and_the_cache_still_answers(site, tmp_path):
    how = {"source": SOURCE, "cache": tmp_path}
    result = neuronpedia.explanations(None, [1], site=site.url, **how)
    url = site.url
    site.shutdown()
    site.server_close()
    assert neuronpedia.explanations(None, [1], site=url, max_age_days=0, **how) == result
    with pytest.raises(ConnectionError, match=r"Neuronpedia did not answer \(.*\): http://127") as error:
        neuronpedia.explanations(None, [2], site=url, **how)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(("latent", "error"), [(5, ConnectionError), (404, ConnectionError), (6, saewb.FormatError)])
def test_answers_late_absent_or_strange(site, tmp_path, latent, error):
    started = time.monotonic()
    with pytest.raises(error):
        neuronpedia.explanations(None, [latent], source=SOURCE, site=site.url, cache=tmp_path, timeout=0.3)
    assert time.monotonic() - started < 1.2
    assert not list(tmp_path.rglob("*.json"))


def test_a_latent_without_a_page_does_not_lose_the_others(site, tmp_path):
    how = {"source": SOURCE, "site": site.url, "cache": tmp_path}
    found = neuronpedia.explanations(None, [12, 1], **how)
    assert list(found) == [Explanation(1, "about 1", "neuronpedia", "m")]
    assert neuronpedia.explanations(None, [12], **how).of(12) == ()
    assert len(site.asked) == 2
    with pytest.raises(ConnectionError, match=r"HTTP 429: slow down\)"):  # in the site's own words, on one line
        neuronpedia.explanations(None, [13], **how)


def test_a_redirect_to_another_site_is_not_followed(site, tmp_path):
    thief = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    thief.asked, site.elsewhere = [], f"http://localhost:{thief.server_port}/1"
    thread = threading.Thread(target=thief.serve_forever)
    thread.start()
    try:
        with pytest.raises(ConnectionError, match="redirects to http://localhost"):
            neuronpedia.make_list(None, {7: "seven"}, "mine", "redirected", source=SOURCE, site=site.url)
        with pytest.raises(ConnectionError, match="another site"):
            neuronpedia.explanations(None, [14], source=SOURCE, site=site.url, cache=tmp_path)
        assert thief.asked == []
    finally:
        thief.shutdown()
        thief.server_close()
        thread.join()
    assert (
        neuronpedia.explanations(None, [15], source=SOURCE, site=site.url, cache=tmp_path).of(15)[0].text == "about 1"
    )
    with pytest.raises(ValueError, match="no address of a site"):
        neuronpedia.explanations(None, [1], source=SOURCE, site="file:///etc", cache=tmp_path)


def test_the_timeout_is_for_the_whole_answer(site, tmp_path):
    started = time.monotonic()
    with pytest.raises(ConnectionError, match="timed out"):
        neuronpedia.explanations(None, [16], source=SOURCE, site=site.url, cache=tmp_path, timeout=0.3)
    assert time.monotonic() - started < 1.2


@pytest.mark.parametrize("damage", ["{", "[]", '{"explanations": 3}', "[" * 5000, "\x00"])
def test_a_damaged_answer_in_the_cache_is_requested_again(damage, site, tmp_path):
    how = {"source": SOURCE, "site": site.url, "cache": tmp_path}
    found = neuronpedia.explanations(None, [1], **how)
    (kept,) = tmp_path.rglob("1.json")
    kept.write_text(damage)
    assert neuronpedia.explanations(None, [1], **how) == found
    assert len(site.asked) == 2


@pytest.mark.parametrize("latent", [7, 8])
def test_answers_that_are_no_feature(site, tmp_path, latent):
    with pytest.raises(saewb.FormatError, match="no JSON object|not a feature"):
        neuronpedia.explanations(None, [latent], source=SOURCE, site=site.url, cache=tmp_path)


def test_quick_lists_and_lists(site):
    url = neuronpedia.quick_list(None, [7, 9], "A & B", source=SOURCE)
    asked = urllib.parse.parse_qs(urllib.parse.urlsplit(url).query)
    assert asked["name"] == ["A & B"]
    want = [{"modelId": "gpt2-small", "layer": "6-res-jb", "index": i} for i in ("7", "9")]
    assert json.loads(asked["features"][0]) == want
    result = neuronpedia.make_list(None, {7: "seven"}, "mine", "mine", source=SOURCE, site=site.url)
    assert result == "https://there/list/1"
    path, key, body = site.asked[-1]
    assert (path, key, body["name"]) == ("/api/list/new-with-features", "mine", "mine")
    assert body["features"] == [{"modelId": "gpt2-small", "layer": "6-res-jb", "index": 7, "description": "seven"}]
    with pytest.raises(saewb.FormatError, match="wrong key"):
        neuronpedia.make_list(None, [7], "mine", "yours", source=SOURCE, site=site.url)
    with pytest.raises(ValueError, match=r"got 151 latents[\s\S]*fix: .*make_list"):
        neuronpedia.quick_list(None, range(151), "many", source=SOURCE)
    for call in (neuronpedia.quick_list, neuronpedia.make_list):
        with pytest.raises(ValueError, match="no latents"):
            call(None, [], "x", *(["k"] if call is neuronpedia.make_list else []), source=SOURCE)


def test_an_index_in_the_layout_of_the_site(model, tmp_path):
    index = build_index(model, tiny_models.sae("blocks.1.hook_resid_post"), tiny_models.tokens(6, 8), n_top=3)
    path = neuronpedia.export_json(index, tmp_path / "x" / "features.json", [3, 5], source=SOURCE)
    read = json.loads(path.read_text())
    assert [f["index"] for f in read] == ["3", "5"]
    latent, first = index.latent(3), read[0]
    assert (first["modelId"], first["layer"]) == ("gpt2-small", "6-res-jb")
    assert first["pos_str"] == [w.token for w in latent.logits_top]
    assert first["neg_values"] == [w.effect for w in latent.logits_bottom]
    assert first["frac_nonzero"] == latent.density
    assert sum(first["freq_hist_data_bar_heights"]) == latent.n_active
    assert len(first["freq_hist_data_bar_values"]) == len(first["freq_hist_data_bar_heights"])
    activation, context = first["activations"][0], latent.top[0]
    assert activation["tokens"] == list(context.tokens)
    assert activation["maxValue"] == max(activation["values"]) == context.value
    assert activation["values"][activation["maxValueTokenIndex"]] == activation["maxValue"]
    assert [a["binMin"] for a in first["activations"]].count(-1) == len(latent.top)
    assert all((a["binContains"] == -1) == (a["binMin"] == -1) for a in first["activations"])
    assert all(a["minValue"] == min(a["values"]) for a in first["activations"])
    assert len(first["activations"]) == len(latent.top) + sum(map(len, latent.quantiles))
    assert len(json.loads(neuronpedia.export_json(index, tmp_path / "all.json").read_text())) == len(index)
    assert json.loads(neuronpedia.export_json(index, tmp_path / "none.json", []).read_text()) == []


def test_an_index_knows_its_page(model, tmp_path):
    index = build_index(model, tiny_models.sae("blocks.1.hook_resid_post"), tiny_models.tokens(), neuronpedia=SOURCE)
    index.save(tmp_path / "i")
    assert neuronpedia.page(saewb.load_index(tmp_path / "i"), 2).url.endswith(f"{SOURCE}/2")
    with pytest.raises(ValueError, match="names no page"):
        neuronpedia.page(replace(index, info=replace(index.info, neuronpedia=None)), 2)


def test_a_graph_is_put_where_the_site_says_and_then_entered(site, tmp_path, monkeypatch):
    monkeypatch.setenv("SAEWB_CACHE", str(tmp_path))
    graph = large(60).pruned()
    address = neuronpedia.upload_graph(graph, "sixty-nodes", "mine", scan="gpt2-small", site=site.url)
    assert address == "https://there/list/1"
    first, put, last = site.asked
    content = graph.to_json(slug="sixty-nodes", scan="gpt2-small").encode()
    body = {"filename": "sixty-nodes.json", "contentLength": len(content), "contentType": "application/json"}
    assert first == ("/api/graph/signed-put", "mine", body)
    assert put == ("/bucket/graph.json?signature=s3cret", None, content)  # without the key
    assert last == ("/api/graph/save-to-db", "mine", {"putRequestId": "put 1"})
    assert json.loads(content)["metadata"]["scan"] == "gpt2-small"
    assert list(tmp_path.rglob("*")) == []


def test_a_graph_that_is_refused(site, monkeypatch):
    graph = large(60).pruned()
    with pytest.raises(FormatError, match="answered without an address to put to: 'wrong key'"):
        neuronpedia.upload_graph(graph, "sixty", "yours", site=site.url)
    with pytest.raises(ConnectionError, match="HTTP 507: no room") as refused:
        neuronpedia.upload_graph(graph, "sixty", "third", site=site.url)
    assert "s3cret" not in str(refused.value)
    assert [request[0] for request in site.asked].count("/api/graph/save-to-db") == 0
    site.elsewhere = "http://localhost:9/list"
    with pytest.raises(ConnectionError, match="another site"):
        neuronpedia.upload_graph(graph, "sixty", "redirected", site=site.url)
    n = len(site.asked)
    monkeypatch.setattr(neuronpedia, "_MAX_GRAPH", 1000)
    with pytest.raises(ValueError, match="at most 0 MB"):
        neuronpedia.upload_graph(graph, "sixty", "mine", site=site.url)
    with pytest.raises(ValueError, match="slug='sixty-nodes'"):
        neuronpedia.upload_graph(graph, "Sixty nodes", "mine", site=site.url)
    assert len(site.asked) == n
