"""Requests to an HTTP endpoint of JSON over the standard library's client, for whatever part of a run talks to one."""

from __future__ import annotations

import http.client
import json
import os
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import IO, NoReturn, TypeVar
from urllib.parse import SplitResult, parse_qsl, urlsplit

from quartet.errors import QuartetError, shown
from quartet.rewards.deadline import DeadlineExceeded, call_within

T = TypeVar("T")
MAX_ANSWER_BYTES = 16 * 1024**2
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_SECRET = re.compile(
    r"(access|api|auth|client|private|refresh|secret|session|subscription|user)*"
    r"(keys?|token|secrets?|pass|passw(or)?d|passphrase|pwd|credentials?|signature|sig|o?auth|auth(enticat|orizat)ion)",
    re.IGNORECASE,
)
"""One word of a parameter's name; whole, because `tokenizer`, `max_tokens` and `author` are none."""
_QUOTED = 200
_FIRST_PAUSE = 0.5
_GRACE = 1.0


class Temporary(Exception):
    """An attempt failed in a way that the next one may not; the text completes `failed because`."""


class Endpoint:
    """An address that takes and answers JSON.

    TLS certificates are verified, redirects are refused (the token would follow them), an answer may have 16 MiB.
    A refused or broken connection, a timeout, a status of 500 and above or an answer of another form (such as a proxy's
    page) is tried again after 0.5, 1, 2 ... s; a status of 400 to 499 is not.
    """

    def __init__(
        self,
        url: str,
        kind: str,
        *,
        token_variable: str,
        error: type[QuartetError],
        timeout: float,
        retries: int = 3,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`kind` is what messages call it, `token_variable` the environment variable with the bearer token, `error` what is
        raised; `timeout` is in seconds, for one attempt; `retries` are the attempts after the first.

        Raises `error` for an address that is not plain http(s) and for a token that no header can hold.
        """
        self.error = error
        self._kind, self._token_variable = kind, token_variable
        parts = self._checked_address(url)
        # Without the query, which may hold a key.
        self.name = f"{parts.scheme}://{parts.netloc}{parts.path}"
        self.label = f"{kind} {self.name}"
        self._url = url
        self._timeout = timeout
        self._retries = retries
        self._sleep = sleep
        self._token = self._read_token()
        self.opener = urllib.request.build_opener(
            _NoRedirect(), urllib.request.HTTPSHandler(context=ssl.create_default_context())
        )

    def ask(self, content: object, read: Callable[[bytes], T], *, path: str = "") -> T:
        """What `read` makes of the answer; `content` is posted as JSON, None asks by GET.

        Args:
            read: raises Temporary for an answer that another attempt may better.
            path: appended to the url.

        Raises the endpoint's error when every attempt failed and when the endpoint refuses the request or redirects it.
        """
        body = None if content is None else json.dumps(content).encode()
        for attempt in range(self._retries + 1):
            if attempt:
                self._sleep(_FIRST_PAUSE * 2.0 ** (attempt - 1))
            try:
                # The limit inside counts each wait for the network; the one outside ends an answer that drips.
                return read(call_within(self._timeout + _GRACE, lambda: self._send(path, body)))
            except Temporary as error:
                problem = str(error)
            except DeadlineExceeded:
                problem = self._too_slow()
        raise self.error(f"{self.label} failed {self._retries + 1} times, at last because {problem}; check the server")

    def _send(self, path: str, body: bytes | None) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "quartet"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        method = "GET" if body is None else "POST"
        request = urllib.request.Request(self._url + path, data=body, headers=headers, method=method)
        try:
            with self.opener.open(request, timeout=self._timeout) as response:
                answer: bytes = response.read(MAX_ANSWER_BYTES + 1)
                declared = response.headers.get("Content-Length", "")
        except urllib.error.HTTPError as error:
            with error:
                self._refuse(error, path)
        except (OSError, ValueError, http.client.HTTPException) as error:
            # ValueError: what the client makes of some headers that nobody should send.
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise self.error(
                    f"{self.label} has a certificate that cannot be verified ({reason.verify_message}); "
                    "install its authority's certificate or set SSL_CERT_FILE"
                ) from error
            if isinstance(reason, TimeoutError):
                raise Temporary(self._too_slow()) from error
            raise Temporary(
                f"the connection failed ({self._quotable(str(reason) or type(reason).__name__)})"
            ) from error
        if len(answer) > MAX_ANSWER_BYTES:
            raise self.error(f"{self.label} answered more than {MAX_ANSWER_BYTES} bytes, which no right answer has")
        if declared.isdigit() and len(answer) < int(declared):
            # `read` with a size returns what came before the connection broke and raises nothing.
            raise Temporary(f"the connection broke after {len(answer)} of {declared} bytes")
        return answer

    def _refuse(self, error: urllib.error.HTTPError, path: str) -> NoReturn:
        """Raise for a status that is not a success: Temporary from 500 on, else the endpoint's error."""
        try:
            said = self.quoted(error.read(4 * _QUOTED))
        except (OSError, http.client.HTTPException):
            said = "nothing"
        if error.code >= 500:
            raise Temporary(f"it answered status {error.code} with {said}") from error
        if 300 <= error.code < 400:
            target = self._quotable(str(error.headers.get("Location")))
            raise self.error(f"{self.label} redirects to {target}, which is refused; give the final url") from error
        request = f"the request {path}" if path else "the request"
        raise self.error(
            f"{self.label} refused {request} with status {error.code} and {said}; check the url, and "
            f"{self._token_variable} if it wants a token"
        ) from error

    def _too_slow(self) -> str:
        return f"it gave no answer within {self._timeout:g} s"

    def quoted(self, answer: bytes) -> str:
        """The first characters of an answer as a literal."""
        return repr(self._quotable(answer[: 8 * _QUOTED].decode("utf-8", errors="replace")))

    def _quotable(self, text: str) -> str:
        """Cut, and without the token: a server may echo the headers it was sent."""
        return (text.replace(self._token, "***") if self._token else text)[:_QUOTED]

    def _checked_address(self, url: str) -> SplitResult:
        try:
            parts = urlsplit(url)
            usable = (
                parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
            )
            # As the socket will: empty labels and those of over 63 characters raise.
            (parts.hostname or "").encode("idna")
        except ValueError:
            raise self.error(f"a {self._kind}'s url has a host or port that cannot be read; correct it") from None
        if parts.username is not None:
            raise self.error(
                f"the url of {self._kind} {parts.hostname} holds a user name or password; leave it out and set "
                f"{self._token_variable} instead"
            )
        secret = [name for name, _ in parse_qsl(parts.query, keep_blank_values=True) if _is_secret(name)]
        if secret:
            raise self.error(
                f"the url of {self._kind} {parts.hostname} holds a secret ({secret[0]}=...), which would be written to "
                f"config.yaml; leave it out and set {self._token_variable} instead"
            )
        if not usable or any(character <= " " or character > "~" for character in url):
            raise self.error(
                f"{shown(url.partition('?')[0].rpartition('@')[2])} is no url of a {self._kind}; write "
                "http(s)://host[:port]/path without spaces"
            )
        return parts

    def _read_token(self) -> str:
        token = os.environ.get(self._token_variable, "").strip()
        if any(not "!" <= character <= "~" for character in token):
            # Checked here because the client's own error would quote the header.
            raise self.error(
                f"{self._token_variable} holds a character that a header cannot; set it to the token alone"
            )
        return token


def _is_secret(name: str) -> bool:
    return any(map(_SECRET.fullmatch, _WORD.findall(name)))


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Leaves redirects as HTTPError, whatever their target looks like."""

    def http_error_302(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: http.client.HTTPMessage
    ) -> None:
        return None

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302
