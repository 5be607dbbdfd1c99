"""The scheduler's numbers: from its parts to the message that the text actor and the fronts get."""

from .grammar_store import GrammarStore
from .messages import Stats
from .schedule import Schedule


def stats_of(
    s: Schedule, grammars: GrammarStore, executor_up: bool, down: str, weights: str, dp_rank: int, paused: bool
) -> Stats:
    """Return the present state and the totals; `down`, `weights`, `dp_rank`, `paused`: see Stats."""
    c, g = s.counters, grammars.counters
    return Stats(
        waiting=len(s.waiting) + grammars.waiting,
        running=s.slots.size - len(s.slots.free),
        pages_total=s.pool.num_pages,
        pages_free=s.pool.num_free,
        pages_tree=s.tree.num_pages,
        pages_running=s.pages_running,
        prompt_tokens=c.prompt_tokens,
        cached_tokens=c.cached_tokens,
        prefilled_tokens=c.prefilled_tokens,
        generated_tokens=c.generated_tokens,
        retractions=c.retractions,
        windows=c.windows,
        steps=c.steps,
        step_us=s.step_us,
        executor_up=executor_up,
        forced_tokens=c.forced_tokens,
        jumps=c.jumps,
        grammar_waiting=grammars.waiting,
        grammar_hits=g.hits,
        grammars_compiled=g.compiled,
        grammars_failed=g.failed,
        grammar_seconds=g.seconds,
        down=down,
        weights=weights,
        dp_rank=dp_rank,
        paused=paused,
    )
