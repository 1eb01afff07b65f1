"""A prompt as a chain of block hashes: equal hashes mean equal prefixes.

In: the bytes that identify a prompt from its beginning. Out: one hash for each whole block.
Rules here:
- Hash i covers blocks 0..i, since each is seeded with the one before it: two prompts share hash i only when they
  share everything up to there.
- The chain starts from the model that computes the cache (a LoRA adapter is one) and the client's cache salt, so
  that neither is ever shared across them.
- The trailing partial block is left out: it changes with every turn of a conversation.
Rejected: token ids (a tokenizer costs more than the decision); concatenating block and previous hash, as the
reference does (xxh3 takes the previous hash as its seed, and no bytes are copied twice).
Source: vLLM's block hash chain; llm-d approx-prefix-cache-producer.
"""

from __future__ import annotations

from xxhash import xxh3_64_intdigest

from epp.dialects.body import BYTES_PER_TOKEN


def chain_seed(model: str, salt: str) -> int:
    """Where the chain of a model and a cache salt begins, 64 bits."""
    return xxh3_64_intdigest(salt.encode(), seed=xxh3_64_intdigest(model.encode()))


def block_hashes(prompt: bytes, seed: int, block_tokens: int, most: int) -> list[int]:
    """Hash the leading whole blocks of a prompt, root first.

    Args:
        prompt: what identifies the prompt from its beginning.
        seed: from `chain_seed`.
        block_tokens: tokens a block, estimated by their bytes; at least 1.
        most: blocks after which to stop.

    Returns:
        At most `most` hashes, 64 bits each; empty when the prompt is shorter than one block.
    """
    size = block_tokens * BYTES_PER_TOKEN
    hashes: list[int] = []
    chained = seed
    for start in range(0, min(len(prompt) // size, most) * size, size):
        chained = xxh3_64_intdigest(prompt[start : start + size], seed=chained)
        hashes.append(chained)
    return hashes
