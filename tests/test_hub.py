"""Whether the Hub answers is known within seconds; its errors are one line with the fix."""

import socket
import time
from types import SimpleNamespace

import pytest
from huggingface_hub import constants, errors

import steermoe.hub
from steermoe.errors import HubError, HubUnreachable, VectorError
from steermoe.hub import check_reachable, hub_errors, patience


def test_it_answers(hub):
    check_reachable()
    assert hub.requests == ["HEAD /"]


def test_offline_asks_nothing(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnreachable, match="HF_HUB_OFFLINE is set: unset it"):
        check_reachable()
    assert hub.requests == []


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "no address", "ftp://127.0.0.1"])
def test_nobody_answers(hub, monkeypatch, address):
    monkeypatch.setattr(constants, "ENDPOINT", address)
    with pytest.raises(HubUnreachable, match=r"^can't reach the Hub at .*: check the connection$"):
        check_reachable()


def test_one_that_accepts_and_says_nothing_costs_the_patience(hub, monkeypatch):
    monkeypatch.setattr(steermoe.hub, "PATIENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(HubUnreachable, match="can't reach the Hub"):
            check_reachable()
        assert time.monotonic() - started < 1.2


def test_the_address_is_looked_up_within_the_patience_too(hub, monkeypatch):
    def slow(*arguments, **named):
        time.sleep(5)

    monkeypatch.setattr(steermoe.hub, "PATIENCE", -0.9)  # and the second that is added
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: SimpleNamespace(head=slow))
    with pytest.raises(HubUnreachable, match="no answer in"):
        check_reachable()


def test_the_patience_is_that_of_the_library_if_it_is_set(monkeypatch):
    assert patience() == steermoe.hub.PATIENCE
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 60)
    assert patience() == 60


class Response(SimpleNamespace):
    """What the library's errors need of a response."""


def http_error(kind: type[Exception], status: int, said: str | None = None) -> Exception:
    return kind(
        f"{status}\n\nlines\nof text",
        response=Response(status_code=status, headers={}, request=None),
        server_message=said,
    )


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            http_error(errors.RepositoryNotFoundError, 401),
            HubError,
            "no 'me/pack', or it is private: check the name, or log in",
        ),
        (http_error(errors.GatedRepoError, 403), HubError, "'me/pack' is gated: ask for access"),
        (http_error(errors.RevisionNotFoundError, 404), HubError, "no revision 'v1': name a branch"),
        (http_error(errors.HfHubHTTPError, 401), HubError, r"refuses that for 'me/pack' \(401\): log in"),
        (http_error(errors.HfHubHTTPError, 403), HubError, r"refuses that for 'me/pack' \(403\): log in"),
        (http_error(errors.HfHubHTTPError, 412), HubError, "was changed by somebody else meanwhile: run the same"),
        (
            http_error(errors.HfHubHTTPError, 500, "a\x1b[2Jb"),
            HubError,
            r"answers 500 for 'me/pack' \(a\\x1b\[2Jb\): try again",
        ),
        (errors.OfflineModeIsEnabled("x"), HubUnreachable, "can't reach the Hub"),
        (errors.LocalEntryNotFoundError("x"), HubUnreachable, "can't reach the Hub"),
        (ValueError("several\nlines"), HubError, "'me/pack': several lines"),
        (OSError(28, "No space left on device"), HubError, "'me/pack': .*No space left on device"),
    ],
)
def test_errors_are_one_line(error, kind, message):
    with pytest.raises(kind, match=message) as raised, hub_errors("me/pack", "v1"):
        raise error
    assert type(raised.value) is kind
    assert "\n" not in str(raised.value)


def test_errors_of_the_connection(monkeypatch):
    from huggingface_hub.utils import get_session

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(HubUnreachable), hub_errors("me/pack"):
        get_session().get("http://127.0.0.1:9")


def test_our_own_errors_stay_what_they_are():
    with pytest.raises(VectorError, match=r"^as it is$"), hub_errors("me/pack"):
        raise VectorError("as it is")
