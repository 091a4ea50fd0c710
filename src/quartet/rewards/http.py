"""An HTTP endpoint as a reward source."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence

from quartet.errors import RewardError
from quartet.rewards.check import checked_rewards
from quartet.rewards.endpoint import Endpoint, Temporary

TOKEN_VARIABLE = "QUARTET_REWARD_TOKEN"
"""Environment variable with the bearer token, sent to every reward endpoint of the run if set."""


class HttpReward:
    """Posts {"prompts": [...], "responses": [...]} as JSON and takes {"rewards": [...]}; see `Endpoint` for the rest.

    An answer of another form is asked for again, wrong rewards are not.
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
        self._endpoint = Endpoint(
            url,
            "reward endpoint",
            token_variable=TOKEN_VARIABLE,
            error=RewardError,
            timeout=timeout,
            retries=retries,
            sleep=sleep,
        )
        self.name = self._endpoint.name
        self.weight = weight

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """One reward per episode, not yet weighted.

        Raises RewardError when every attempt failed, when the endpoint refuses the request or redirects it, and when
        its answer is not one finite number per episode.
        """

        def read(answer: bytes) -> list[float]:
            return self._rewards(answer, len(responses))

        return self._endpoint.ask({"prompts": list(prompts), "responses": list(responses)}, read)

    def _rewards(self, answer: bytes, count: int) -> list[float]:
        try:
            decoded = json.loads(answer)
            values = decoded["rewards"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            said = self._endpoint.quoted(answer)
            raise Temporary(f'it answered {said} where {{"rewards": [{count} numbers]}} is wanted') from error
        return checked_rewards(values, count, self._endpoint.label)
