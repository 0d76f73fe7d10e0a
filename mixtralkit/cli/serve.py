"""``mixtralkit serve``: many requests at once, over HTTP as OpenAI's."""

from __future__ import annotations

from collections.abc import Callable

from mixtralkit.cli.run import command
from mixtralkit.cli.running import UpdateOptions
from mixtralkit.config import EngineConfig, LimitOptions, ServerOptions
from mixtralkit.config.ranks import rank_of
from mixtralkit.distributed import RankContext
from mixtralkit.engine.expert_rows import ExpertRows
from mixtralkit.engine.generation import Engine
from mixtralkit.mixtral import Mixtral


@command
def serve(
    *,
    server: ServerOptions,
    engine: EngineConfig = EngineConfig(limits=LimitOptions(max_batch_size=64)),
    updates: UpdateOptions,
) -> None:
    """Answers requests over HTTP, as OpenAI's server does, and shows what the experts do.

    Ends with code 0 after SIGTERM or Ctrl-C, once running answers have ended or drain_s are over.
    """
    try:
        from mixtralkit.server.run import serve_first, serve_other
    except ImportError as error:
        raise RuntimeError(f"serve needs the package {error.name}: pip install 'mixtralkit[serve]'") from None

    def load() -> tuple[Engine, Callable[[], None]]:
        mixtral = Mixtral.load(engine, RankContext.start(engine.limits.device))
        if server.expert_load:
            mixtral.engine.expert_rows = ExpertRows(mixtral.model)
        mixtral.engine.plan_manager = updates.manager(mixtral, engine.parallel.hardware)
        return mixtral.engine, mixtral.close

    if rank_of() == 0:
        name = server.served_model_name or engine.source.model.resolve().name
        serve_first(name, server, load)
    else:
        serve_other(server, load)
