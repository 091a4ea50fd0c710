"""The HTTP reward source against a server on 127.0.0.1 that answers well, late, too much or nonsense."""

import socket
import ssl
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from quartet.errors import RewardError
from quartet.rewards import HttpReward
from quartet.rewards import endpoint as transport

PROMPTS, RESPONSES = ["p", "q\u2028\ud800"], ["", "ä"]
TOKEN = "secret-4711"


class Sleeps(list[float]):
    """Stands in for time.sleep and keeps what it was asked for."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


@pytest.fixture
def sleeps() -> Sleeps:
    return Sleeps()


def score(url: str, sleeps: Sleeps, **keys: Any) -> list[float]:
    return HttpReward(url, sleep=sleeps, **keys).score(PROMPTS, RESPONSES)


def test_good_answer(endpoint, sleeps: Sleeps) -> None:
    endpoint.rewards(1, -2.5)
    assert score(endpoint.url, sleeps) == [1.0, -2.5]
    assert endpoint.bodies == [{"prompts": PROMPTS, "responses": RESPONSES}]
    assert endpoint.headers[0]["Content-Type"] == "application/json"
    assert "Authorization" not in endpoint.headers[0]
    assert sleeps == []


def test_weight_and_name_without_the_query(endpoint) -> None:
    source = HttpReward(endpoint.url + "?model=abc", weight=-2.0)
    assert (source.name, source.weight) == (endpoint.url, -2.0)
    endpoint.rewards(0, 0)
    assert source.score(PROMPTS, RESPONSES) == [0.0, 0.0]


def test_token_is_sent(endpoint, sleeps: Sleeps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUARTET_REWARD_TOKEN", f" {TOKEN}\n")
    endpoint.rewards(1, 2)
    score(endpoint.url, sleeps)
    assert endpoint.headers[0]["Authorization"] == f"Bearer {TOKEN}"


def test_server_error_and_then_good(endpoint, sleeps: Sleeps) -> None:
    endpoint.answer(500, "busy")
    endpoint.answer(503, "busy")
    endpoint.rewards(1, 2)
    assert score(endpoint.url, sleeps) == [1.0, 2.0]
    assert sleeps == [0.5, 1.0]
    assert endpoint.bodies == [{"prompts": PROMPTS, "responses": RESPONSES}] * 3


def test_server_errors_without_end(endpoint, sleeps: Sleeps) -> None:
    endpoint.answer(500, "out of memory")
    with pytest.raises(
        RewardError, match="failed 4 times, at last because it answered status 500 with 'out of memory'"
    ):
        score(endpoint.url, sleeps)
    assert sleeps == [0.5, 1.0, 2.0]


def test_connection_refused(sleeps: Sleeps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("http_proxy", raising=False)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/"
        with pytest.raises(RewardError, match=r"failed 3 times, at last because the connection failed \(.*refused\)"):
            score(url, sleeps, retries=2)
    assert sleeps == [0.5, 1.0]


@pytest.mark.parametrize("sent", [b"", b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"])
def test_connection_that_breaks_is_tried_again(endpoint, sleeps: Sleeps, sent: bytes) -> None:
    def cut(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(sent)
        handler.close_connection = True

    endpoint.script.append(cut)
    endpoint.rewards(1, 2)
    assert score(endpoint.url, sleeps) == [1.0, 2.0]
    assert sleeps == [0.5]


def test_slow_answer(endpoint, sleeps: Sleeps) -> None:
    endpoint.script.append(lambda handler: endpoint.release.wait(60) and None)
    with pytest.raises(RewardError, match=r"failed 2 times, at last because it gave no answer within 0\.05 s"):
        score(endpoint.url, sleeps, timeout=0.05, retries=1)
    assert len(endpoint.bodies) == 2


def test_answer_that_drips(endpoint, sleeps: Sleeps, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each wait is within the limit, the answer as a whole is not."""
    monkeypatch.setattr(transport, "_GRACE", 0.0)

    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(50):
            endpoint.release.wait(0.02)
            handler.wfile.write(b" ")
        handler.wfile.write(b'{"rewards": [1, 2]}')

    endpoint.script.append(drip)
    with pytest.raises(RewardError, match=r"at last because it gave no answer within 0\.2 s"):
        score(endpoint.url, sleeps, timeout=0.2, retries=0)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirect_is_refused_at_once(endpoint, sleeps: Sleeps, status: int) -> None:
    endpoint.answer(status, "", Location=endpoint.url + "/elsewhere")
    with pytest.raises(RewardError, match=r"redirects to .*/score/elsewhere, which is refused; give the final url"):
        score(endpoint.url, sleeps)
    assert len(endpoint.bodies) == 1


def test_redirect_to_what_is_no_address_is_refused_too(endpoint, sleeps: Sleeps) -> None:
    endpoint.answer(302, "", Location="http://[bad/")
    with pytest.raises(RewardError, match=r"redirects to http://\[bad/, which is refused"):
        score(endpoint.url, sleeps)


def test_a_host_that_only_the_client_finds_impossible(sleeps: Sleeps) -> None:
    """The client takes percent signs out of a host's name before it asks for the host."""
    with pytest.raises(RewardError, match="failed 1 times, at last because the connection failed"):
        score("http://a%2e%2eb/", sleeps, retries=0)


@pytest.mark.parametrize("status", [400, 401, 404, 422, 429])
def test_refusal_is_not_tried_again(endpoint, sleeps: Sleeps, status: int) -> None:
    endpoint.answer(status, "no\nsuch thing")
    with pytest.raises(RewardError, match=rf"refused the request with status {status} and 'no\\nsuch thing'; check"):
        score(endpoint.url, sleeps)
    assert (len(endpoint.bodies), sleeps) == (1, [])


@pytest.mark.parametrize(
    "body", [b"", b"<html>hello", b"\xff\x00", b"[1, 2]", b'"rewards"', b"3", b'{"scores": [1, 2]}', b"[" * 100_000]
)
def test_garbage_is_quoted(endpoint, sleeps: Sleeps, body: bytes) -> None:
    endpoint.answer(200, body)
    with pytest.raises(RewardError, match=r'answered \'.* where \{"rewards": \[2 numbers\]\} is wanted') as caught:
        score(endpoint.url, sleeps)
    quoted = repr(body.decode(errors="replace")[:200])
    assert f"answered {quoted} where" in str(caught.value)
    assert (len(endpoint.bodies), sleeps) == (4, [0.5, 1.0, 2.0])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('{"rewards": [1]}', "returned 1 rewards for 2 episodes"),
        ('{"rewards": [1, null]}', "returned None for episode 1 of the batch"),
        ('{"rewards": [NaN, 1]}', "returned nan for episode 0"),
        ('{"rewards": [1, -Infinity]}', "returned -inf for episode 1"),
        ('{"rewards": [1, 1e999]}', "returned inf for episode 1"),
        ('{"rewards": "12"}', "returned a str; return a list of 2 numbers"),
        ('{"rewards": {"0": 1, "1": 2}}', "returned a dict"),
    ],
)
def test_rewards_that_are_no_numbers(endpoint, sleeps: Sleeps, body: str, message: str) -> None:
    endpoint.answer(200, body)
    with pytest.raises(RewardError, match=f"^reward endpoint {endpoint.url} {message}"):
        score(endpoint.url, sleeps)


def test_answer_that_is_too_large(endpoint, sleeps: Sleeps, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while not endpoint.release.is_set():
            handler.wfile.write(b" " * 1000)

    assert transport.MAX_ANSWER_BYTES == 16 * 1024 * 1024
    monkeypatch.setattr(transport, "MAX_ANSWER_BYTES", 1000)
    endpoint.answer(200, b'{"rewards": [1, 2]}'.ljust(1000))
    endpoint.answer(200, b'{"rewards": [1, 2]}'.ljust(1001))
    endpoint.script.append(endless)
    assert score(endpoint.url, sleeps) == [1.0, 2.0]
    for _ in range(2):
        with pytest.raises(RewardError, match="answered more than 1000 bytes"):
            score(endpoint.url, sleeps, timeout=5.0, retries=0)


@pytest.mark.parametrize("status", [200, 302, 403, 500])
def test_token_echoed_by_the_server_is_not_shown(
    endpoint, sleeps: Sleeps, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setenv("QUARTET_REWARD_TOKEN", TOKEN)
    # The token lies across the place where the quotation is cut.
    endpoint.answer(status, "x" * 195 + TOKEN, Location=f"http://127.0.0.1/{TOKEN}")
    with pytest.raises(RewardError) as caught:
        score(endpoint.url, sleeps, retries=0)
    assert "***" in str(caught.value)
    error: BaseException | None = caught.value
    while error is not None:
        assert "secr" not in str(error)
        error = error.__cause__


@pytest.mark.parametrize("token", ["two words", "line\nbreak", "sécret"])
def test_token_that_no_header_can_hold(monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv("QUARTET_REWARD_TOKEN", token)
    with pytest.raises(RewardError, match="QUARTET_REWARD_TOKEN holds a character that a header cannot") as caught:
        HttpReward("http://127.0.0.1/")
    assert token not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        *("file:///etc/passwd", "ftp://host/x", "host:80/x", "http://", "http://host:99999/", "http://[::1/"),
        *("http://a b/", "http://a..b/x", f"http://{'a' * 64}.com/x"),
    ],
)
def test_address_that_is_none(url: str) -> None:
    with pytest.raises(RewardError, match="url"):
        HttpReward(url)


def test_password_in_the_address_is_refused_and_not_shown() -> None:
    with pytest.raises(RewardError, match="user name or password; leave it out and set QUARTET_REWARD_TOKEN") as caught:
        HttpReward("https://me:hunter2@host/score")
    assert "hunter2" not in str(caught.value)


def test_certificates_are_verified() -> None:
    """The opener's TLS context checks certificate and host name."""
    opener = HttpReward("https://127.0.0.1/")._endpoint.opener
    contexts = [handler._context for handler in opener.handlers if hasattr(handler, "_context")]
    assert [context.verify_mode for context in contexts if context] == [ssl.CERT_REQUIRED]
    assert all(context.check_hostname for context in contexts if context)


@pytest.mark.parametrize(
    "name",
    [
        *("key", "api_key", "access_token", "sig", "X-Amz-Signature", "password", "auth", "client_secret"),
        *("apikey", "APIKEY", "AWSAccessKeyId", "X-Amz-Credential", "authToken", "token2", "userpasswd", "oauth_token"),
    ],
)
def test_a_secret_in_the_url_is_refused_and_not_shown(endpoint, name: str) -> None:
    """The url is written to config.yaml."""
    with pytest.raises(RewardError, match=rf"holds a secret \({name}=\.\.\.\).* set QUARTET_REWARD_TOKEN") as caught:
        HttpReward(f"{endpoint.url}?model=x&{name}=hunter2")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("name", ["max_tokens", "tokenizer", "author", "keyboard", "passive", "design", "monkey"])
def test_a_word_that_only_holds_one_for_secrets_is_none(name: str) -> None:
    assert HttpReward(f"http://127.0.0.1:9/score?{name}=5").name == "http://127.0.0.1:9/score"


def test_a_page_of_a_proxy_is_tried_again(endpoint, sleeps: Sleeps) -> None:
    endpoint.answer(200, "<html>starting up")
    endpoint.rewards(1.0, 2.0)
    assert score(endpoint.url, sleeps) == [1.0, 2.0]
    assert sleeps == [0.5]
