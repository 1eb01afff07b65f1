"""Edges: what carries ext_proc's messages. Each drives `epp.extproc.conversation` and decides nothing."""
