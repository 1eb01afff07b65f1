"""An endpoint picker for LLM inference: Envoy asks, the best model server answers.

A request walks through the rooms in this order, once, and does not come back until its response does:

    extproc/     What did Envoy say, what do we answer?     pure, but for transport/
    dialects/    What does the body mean?                   pure
    scheduling/  Where should it run?                       pure
    prefix/      Who already holds its prefix?              pure
    endpoints/   What do we know of each server?            pure
    signals/     How do we come to know it?                 edge
    discovery/   Which servers are there?                   edge
    config/      What did the operator ask for?             pure but for reading the file
    telemetry/   What do we tell?                           edge
    sim/         What would happen if?                      pure, but for serve/
    load/        How does it do under load?                 edge
    demo/        Can I see it move?                         edge
    picker.py    the pure whole: scheduling + prefix + endpoints
    server.py    the composition root.   cli.py: the commands.   errors.py: every refusal and its status
"""
