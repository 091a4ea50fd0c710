"""An HTTP endpoint as a reward source, over the standard library's client."""

from __future__ import annotations

import http.client
import json
import os
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from urllib.parse import SplitResult, parse_qsl, urlsplit

from quartet.errors import RewardError
from quartet.rewards.check import checked_rewards
from quartet.rewards.deadline import DeadlineExceeded, call_within

TOKEN_VARIABLE = "QUARTET_REWARD_TOKEN"
"""Environment variable with the bearer token, sent to every endpoint of the run if set."""
MAX_ANSWER_BYTES = 16 * 1024**2
_SECRET = re.compile(r"key|token|secret|passw|credential|signature|^sig$|^auth", re.IGNORECASE)
_QUOTED = 200
_FIRST_PAUSE = 0.5
_GRACE = 1.0


class HttpReward:
    """Posts {"prompts": [...], "responses": [...]} as JSON and takes {"rewards": [...]}.

    TLS certificates are verified, redirects are refused (the token would follow them), an answer may have 16 MiB.
    A refused or broken connection, a timeout, a status of 500 and above or an answer of another form (such as a proxy's
    page) is tried again after 0.5, 1, 2 ... s; a status of 400 to 499 and wrong rewards are not.
    """

    def __init__(
        self,
        url: str,
        *,
        weight: float = 1.0,
        timeout: float = 60.0,
        retries: int = 3,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`timeout` is in seconds, for one attempt at one batch; `retries` are the attempts after the first.

        Raises RewardError for an address that is not plain http(s) and for a token that no header can hold.
        """
        parts = _checked_address(url)
        # Without the query, which may hold a key.
        self.name = f"{parts.scheme}://{parts.netloc}{parts.path}"
        self.weight = weight
        self._url = url
        self._timeout = timeout
        self._retries = retries
        self._sleep = sleep
        self._label = f"reward endpoint {self.name}"
        self._token = _token()
        self._opener = urllib.request.build_opener(
            _NoRedirect(), urllib.request.HTTPSHandler(context=ssl.create_default_context())
        )

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """One reward per episode, not yet weighted.

        Raises RewardError when every attempt failed, when the endpoint refuses the request or redirects it, and when
        its answer is not one finite number per episode.
        """
        body = json.dumps({"prompts": list(prompts), "responses": list(responses)}).encode()
        for attempt in range(self._retries + 1):
            if attempt:
                self._sleep(_FIRST_PAUSE * 2.0 ** (attempt - 1))
            try:
                # The limit inside counts each wait for the network; the one outside ends an answer that drips.
                return self._rewards(call_within(self._timeout + _GRACE, lambda: self._post(body)), len(responses))
            except _Temporary as error:
                problem = str(error)
            except DeadlineExceeded:
                problem = self._too_slow()
        raise RewardError(
            f"{self._label} failed {self._retries + 1} times, at last because {problem}; check the server"
        )

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "quartet"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        request = urllib.request.Request(self._url, data=body, headers=headers, method="POST")
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                answer: bytes = response.read(MAX_ANSWER_BYTES + 1)
                declared = response.headers.get("Content-Length", "")
        except urllib.error.HTTPError as error:
            with error:
                self._refuse(error)
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise RewardError(
                    f"{self._label} has a certificate that cannot be verified ({reason.verify_message}); "
                    "install its authority's certificate or set SSL_CERT_FILE"
                ) from error
            if isinstance(reason, TimeoutError):
                raise _Temporary(self._too_slow()) from error
            raise _Temporary(
                f"the connection failed ({self._quotable(str(reason) or type(reason).__name__)})"
            ) from error
        if len(answer) > MAX_ANSWER_BYTES:
            raise RewardError(f"{self._label} answered more than {MAX_ANSWER_BYTES} bytes; return the rewards alone")
        if declared.isdigit() and len(answer) < int(declared):
            # `read` with a size returns what came before the connection broke and raises nothing.
            raise _Temporary(f"the connection broke after {len(answer)} of {declared} bytes")
        return answer

    def _refuse(self, error: urllib.error.HTTPError) -> None:
        """Raise for a status that is not a success: _Temporary from 500 on, else RewardError."""
        try:
            said = self._quoted(error.read(4 * _QUOTED))
        except (OSError, http.client.HTTPException):
            said = "nothing"
        if error.code >= 500:
            raise _Temporary(f"it answered status {error.code} with {said}") from error
        if 300 <= error.code < 400:
            target = self._quotable(str(error.headers.get("Location")))
            raise RewardError(f"{self._label} redirects to {target}, which is refused; give the final url") from error
        raise RewardError(
            f"{self._label} refused the request with status {error.code} and {said}; check the url, and "
            f"{TOKEN_VARIABLE} if it wants a token"
        ) from error

    def _rewards(self, answer: bytes, count: int) -> list[float]:
        try:
            decoded = json.loads(answer)
            values = decoded["rewards"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise _Temporary(
                f'it answered {self._quoted(answer)} where {{"rewards": [{count} numbers]}} is wanted'
            ) from error
        return checked_rewards(values, count, self._label)

    def _too_slow(self) -> str:
        return f"it gave no answer within {self._timeout:g} s"

    def _quoted(self, answer: bytes) -> str:
        """The first characters of an answer as a literal."""
        return repr(self._quotable(answer[: 8 * _QUOTED].decode("utf-8", errors="replace")))

    def _quotable(self, text: str) -> str:
        """Cut, and without the token: a server may echo the headers it was sent."""
        return (text.replace(self._token, "***") if self._token else text)[:_QUOTED]


class _Temporary(Exception):
    """An attempt failed in a way that the next one may not; the text completes `failed because`."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Leaves redirects as HTTPError."""

    def redirect_request(self, *_arguments: object) -> None:
        return None


def _checked_address(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        raise RewardError("a reward endpoint's url has a host or port that cannot be read; correct it") from None
    if parts.username is not None:
        raise RewardError(
            f"the url of reward endpoint {parts.hostname} holds a user name or password; leave it out and set "
            f"{TOKEN_VARIABLE} instead"
        )
    secret = [name for name, _ in parse_qsl(parts.query, keep_blank_values=True) if _SECRET.search(name)]
    if secret:
        raise RewardError(
            f"the url of reward endpoint {parts.hostname} holds a secret ({secret[0]}=...), which would be written to "
            f"config.yaml; leave it out and set {TOKEN_VARIABLE} instead"
        )
    if not usable or any(character <= " " or character > "~" for character in url):
        raise RewardError(
            f"{parts.scheme}://{parts.netloc}{parts.path} is no url of a reward endpoint; write "
            "http(s)://host[:port]/path without spaces"
        )
    return parts


def _token() -> str:
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if any(not "!" <= character <= "~" for character in token):
        # Checked here because the client's own error would quote the header.
        raise RewardError(f"{TOKEN_VARIABLE} holds a character that a header cannot; set it to the token alone")
    return token
