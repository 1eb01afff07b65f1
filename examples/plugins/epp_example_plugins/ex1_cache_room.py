from epp.dialects.request import Request
from epp.endpoints.table import Candidates
from epp.scheduling.plugin import NoParams, Scores, scorer
from epp.scheduling.scorers import lowest_first


@scorer("cache-room-scorer", params=NoParams, needs=("kv_usage", "kv_blocks"))
def cache_room(request: Request, candidates: Candidates, params: NoParams) -> Scores:
    """Prefer the most free blocks of KV cache, where servers have caches of different sizes."""
    usage, known = candidates.column("kv_usage")
    blocks, told = candidates.column("kv_blocks")
    return lowest_first(blocks * (usage - 1), known & told, 0.5)
