"""JSON over HTTP: one deadline for all of an answer, a limit on its size, no redirect to another site."""

from __future__ import annotations

import email.utils
import http.client
import json
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from saewb.errors import FormatError, explain


class HTTPRefusal(ConnectionError):
    """The site answered with an HTTP error.

    Args:
        message: one line, with the code and the site's words.
        code: HTTP status code.
        words: what the site says about it, on one line; "" if it is not in its format.
        retry_after: seconds that the site asks to wait; None if it does not say.
    """

    def __init__(self, message: str, code: int, words: str, retry_after: float | None) -> None:
        super().__init__(message)
        self.code, self.words, self.retry_after = code, words, retry_after


def request_json(
    url: str,
    timeout: float,
    body: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] = MappingProxyType({}),
    *,
    site: str,
    max_bytes: int,
    secret: str = "",
) -> dict[str, Any]:
    """Send one GET, or a POST of JSON, and read a JSON object.

    Args:
        url: http or https.
        timeout: seconds for all of it, however slowly the answer comes.
        body: plain values to post; None for a GET.
        headers: besides those for JSON.
        site: name of the site, for error messages.
        max_bytes: of the answer.
        secret: a key that the request sends; wherever the site repeats it, "***" is read.

    Raises:
        HTTPRefusal: for an HTTP error.
        ConnectionError: in one line, if there is no answer.
        FormatError: if the answer is no JSON object, or longer than `max_bytes`.
        ValueError: if `url` is no address of a site.
    """
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(explain(f"{url!r} is no address of a site.", want="https://..."))
    all_headers = {"Accept": "application/json", "Content-Type": "application/json", "User-Agent": "saewb", **headers}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers=all_headers)
    content = _answer(request, timeout, site, max_bytes, secret, url)
    try:
        answer = json.loads(_hide(content.decode(), secret)) if len(content) <= max_bytes else None
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise FormatError(explain(f"{url} answered something that is no JSON object.", want="a JSON object"))
    return answer


def put_bytes(url: str, content: bytes, timeout: float, *, site: str) -> None:
    """Send one PUT of JSON to a signed address, without any key, and take no notice of the answer's text.

    Args:
        url: http or https; what is behind its "?" is its signature, and is in no error message.
        content: the JSON.
        timeout: seconds for all of it.
        site: name of the site, for error messages.

    Raises:
        HTTPRefusal, ConnectionError, ValueError: as `request_json`.
    """
    shown = url.partition("?")[0]
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(explain(f"{shown!r} is no address of a site.", want="https://..."))
    headers = {"Content-Type": "application/json", "User-Agent": "saewb"}
    request = urllib.request.Request(url, data=content, headers=headers, method="PUT")
    _answer(request, timeout, site, 2**20, url.partition("?")[2], shown)


def _answer(
    request: urllib.request.Request, timeout: float, site: str, max_bytes: int, secret: str, shown: str
) -> bytes:
    """The body of the answer; errors name the address as `shown`, and the secret nowhere."""
    outcome: list[bytes | BaseException] = []
    deadline = time.monotonic() + timeout
    # A socket's timeout is for each read, and a server may send a byte at a time: the caller waits no longer.
    thread = threading.Thread(target=lambda: outcome.append(_read_answer(request, deadline, max_bytes)), daemon=True)
    thread.start()
    thread.join(timeout)
    content = outcome[0] if outcome else TimeoutError("timed out")
    if isinstance(content, urllib.error.HTTPError):
        words = _hide(_words(content), secret)
        why = f"HTTP {content.code}" + (f": {words}" if words else "")
        wait = _retry_after(content.headers.get("Retry-After"))
        # `from None`: an HTTPError holds the answer's headers and body, which may repeat a key.
        raise HTTPRefusal(f"{site} did not answer ({why}): {shown}", content.code, words, wait) from None
    if isinstance(content, BaseException):
        why = _hide(str(getattr(content, "reason", content)), secret)
        raise ConnectionError(f"{site} did not answer ({why}): {shown}") from None
    return content


def _hide(text: str, secret: str) -> str:
    return text.replace(secret, "***") if secret else text


def _read_answer(request: urllib.request.Request, deadline: float, max_bytes: int) -> bytes | BaseException:
    """The body of an answer, at most a byte more than the limit; or the error."""
    parts: list[bytes] = []
    try:
        opener = urllib.request.build_opener(_SameSite)
        with opener.open(request, timeout=max(0.001, deadline - time.monotonic())) as response:
            while sum(map(len, parts)) <= max_bytes and (part := response.read1(2**16)):
                parts.append(part)
                if time.monotonic() > deadline:
                    raise TimeoutError("timed out")
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a damaged address in a redirect
        return error
    return b"".join(parts)


def _words(error: urllib.error.HTTPError) -> str:
    """What the site says about a refusal, on one line; empty if it is not in its format."""
    try:
        answer = json.loads(error.read(2**16))
    except (OSError, ValueError, RecursionError, http.client.HTTPException):
        return ""
    words = answer.get("error") or answer.get("message") if isinstance(answer, dict) else None
    words = words.get("message") if isinstance(words, dict) else words  # OpenAI's: {"error": {"message": ...}}
    return " ".join(words.split())[:200] if isinstance(words, str) else ""


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which is a number or a date."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


class _SameSite(urllib.request.HTTPRedirectHandler):
    """Follows redirects within a site, or from its http to its https; urllib would send all headers to any host."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        before, after = urllib.parse.urlsplit(req.full_url), urllib.parse.urlsplit(newurl)
        is_same = (after.scheme, after.netloc) == (before.scheme, before.netloc)
        if not is_same and (after.scheme, after.netloc) != ("https", before.hostname):
            raise urllib.error.URLError(f"it redirects to {after.scheme}://{after.netloc}, another site")
        return super().redirect_request(req, fp, code, msg, headers, newurl)
