"""The Hub, huggingface.co or $HF_ENDPOINT: whether it answers, known within seconds, and its errors in one line.

Knows no vectors and no models. The client is huggingface_hub's; alone it waits and retries for half a minute.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

from steermoe.errors import HubError, HubUnreachable, SteerMoEError, quoted, reason

PATIENCE = 5.0
"""Seconds to wait for an answer, unless HF_HUB_ETAG_TIMEOUT gives another number."""
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def endpoint() -> str:
    """The address of the Hub."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def patience() -> float:
    """Seconds to wait for an answer of the Hub."""
    from huggingface_hub import constants

    is_set = constants.HF_HUB_ETAG_TIMEOUT != constants.DEFAULT_ETAG_TIMEOUT
    return float(constants.HF_HUB_ETAG_TIMEOUT) if is_set else PATIENCE


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE is set, so that the Hub's client uses its cache alone, and at once."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def check_reachable() -> None:
    """Ask the Hub for anything, once. The time to look up its address counts too, which no library limits.

    Raises:
        HubUnreachable: no answer within `patience()`, or HF_HUB_OFFLINE is set.
    """
    from huggingface_hub.utils import get_session

    if is_offline():
        raise HubUnreachable("the Hub is not asked, since HF_HUB_OFFLINE is set: unset it to connect")
    seconds = patience()
    outcome: list[Exception | None] = []

    def ask() -> None:
        try:
            get_session().head(endpoint(), timeout=seconds, follow_redirects=False)
            outcome.append(None)
        except Exception as error:  # whatever makes it impossible, such as an address that is none
            outcome.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds + 1)
    error = outcome[0] if outcome else TimeoutError(f"no answer in {seconds:g} s")
    if error is not None:
        raise HubUnreachable(_unreachable(reason(error)))


def listing(repo: str, revision: str = "", token: str | None = None) -> Any:
    """What the Hub says about a repository, its files with sizes and hashes: huggingface_hub's `ModelInfo`.

    As `HfApi.model_info`, which raises TypeError for some keys of a card, such as `self`; the card is left out here.
    Raises what the client raises.
    """
    from huggingface_hub import ModelInfo
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    address = f"{endpoint()}/api/models/{repo}" + (f"/revision/{quote(revision, safe='')}" if revision else "")
    headers = build_hf_headers(token=token)
    answer = get_session().get(address, headers=headers, timeout=patience(), params={"blobs": True})
    hf_raise_for_status(answer)
    return ModelInfo(**{**answer.json(), "cardData": None})


def is_there(repo: str, token: str | None = None) -> bool:
    """Whether the Hub has a repository; raises what the client raises."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        listing(repo, token=token)
    except GatedRepoError:  # it is one of the errors below
        return True
    except RepositoryNotFoundError:
        return False
    return True


def _unreachable(why: str) -> str:
    return f"can't reach the Hub at {quoted(endpoint())} ({why}): check the connection"


@contextmanager
def hub_errors(repo: str = "", revision: str = "", *, what: str = "") -> Iterator[None]:
    """Turn whatever the Hub's client raises into one line.

    Args:
        repo: the repository that is read or written, for the message.
        revision: the one that was asked for, if any.
        what: in words, such as "the search", where it is no repository; messages do not quote it.

    Raises:
        HubError: with the reason and the fix.
    """
    try:
        yield
    except SteerMoEError:
        raise
    except Exception as error:  # the client's, of its two HTTP libraries, or of the disk
        raise _explained(error, what or f"'{quoted(repo)}'", revision) from error


def _explained(error: Exception, name: str, revision: str) -> HubError:
    from huggingface_hub import errors as known

    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):  # of an upload in a thread
        error = error.__cause__
    if isinstance(error, known.GatedRepoError):
        return HubError(f"{name} is gated: ask for access on its page on the Hub, then {LOG_IN}")
    if isinstance(error, known.RepositoryNotFoundError):
        return HubError(f"the Hub has no {name}, or it is private: check the name, or {LOG_IN}")
    if isinstance(error, known.RevisionNotFoundError):
        return HubError(f"{name} has no revision '{quoted(revision)}': name a branch, a tag or a commit that it has")
    if isinstance(error, known.OfflineModeIsEnabled | known.LocalEntryNotFoundError) or _is_of_connection(error):
        return HubUnreachable(_unreachable(reason(error, 120)))
    if not isinstance(error, known.HfHubHTTPError):
        return HubError(f"{name}: {reason(error)}")
    status, said = error.response.status_code, error.server_message or "it says no more"
    if status in (401, 403):
        return HubError(f"the Hub refuses that for {name} ({status}): {LOG_IN}, with a token that is allowed to do it")
    if status in (409, 412):
        return HubError(f"{name} was changed by somebody else meanwhile: run the same command again")
    return HubError(f"the Hub answers {status} for {name} ({quoted(said)}): try again later")


def _is_of_connection(error: Exception) -> bool:
    """Whether an error is of the HTTP library itself (httpx or its successor), not the Hub's answer."""
    from huggingface_hub.errors import HfHubHTTPError

    library = type(error).__module__.partition(".")[0]
    return library.startswith(("httpx", "httpcore")) and not isinstance(error, HfHubHTTPError)
