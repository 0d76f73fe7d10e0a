"""How the server listens, and how much it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from mixtralkit.config.options import Count, NotNegative, Options, Positive, Rule, Variable

Port = Annotated[int, Rule("in 0 … 65535", lambda port: 0 <= port <= 65535)]


@dataclass(frozen=True)
class ServerOptions(Options):
    """How the server listens, and how much it takes.

    Attributes:
        host: Address to listen on; 0.0.0.0 is every one that the machine has.
        port: Port to listen on; 0 takes a free one, which the first line on stderr tells.
        api_key: Key that every request but GET /health must bring, as a bearer token or as the password that a browser
            asks for.
        served_model_name: What the model is called in requests and answers; left out, its folder's name.
        max_body_mb: Largest body of a request, in 10^6 bytes; a larger one is answered 413.
        max_prompts: Most prompts of a request.
        max_n: Most answers to a prompt.
        max_waiting: Answers that may wait for their turn; what would make it more is answered 429.
        drain_s: Seconds that running answers have after SIGTERM; torchrun itself leaves 30.
        rank_timeout_s: Seconds after which a rank that says nothing is taken for dead.
        step_timeout_s: Seconds after which a step that does not end is taken for stuck; kernels may be built in one.
        expert_load: Count which experts rows choose, for the page and the metrics; prompts pay for it in the last
            layer, where otherwise only their last rows are computed.
    """

    host: str = "127.0.0.1"
    port: Port = 8000
    api_key: Annotated[str | None, Variable("MIXTRALKIT_API_KEY")] = None
    served_model_name: str | None = None
    max_body_mb: Positive = 8.0
    max_prompts: Count = 256
    max_n: Count = 64
    max_waiting: Count = 1024
    drain_s: NotNegative = 25.0
    rank_timeout_s: Positive = 5.0
    step_timeout_s: Positive = 600.0
    expert_load: bool = True
