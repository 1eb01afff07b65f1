"""Load for any OpenAI-compatible endpoint, and what it says of it. Edge."""

from epp.load.client import Client, Load, run_load
from epp.load.results import Result, Summary, summarize

__all__ = ["Client", "Load", "Result", "Summary", "run_load", "summarize"]
