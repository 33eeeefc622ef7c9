"""What an answer cost: OpenAI's counts, and what the cache saw and kept."""

from collections.abc import Sequence

from openai.types import CompletionUsage
from openai.types.completion_usage import CompletionTokensDetails, PromptTokensDetails

from kvfold.engine.request import Usage


def usage_of(
    prompt_tokens: int, completion_tokens: int, ended: Sequence[Usage] = (), *, reasoning_tokens: int | None = None
) -> CompletionUsage:
    """`ended`: of all answers to the request that have ended. Under `kvfold`: tokens seen, tokens kept (the mean over KV
    heads) and bytes held at the end, summed over answers, and how many times fewer were kept than seen.
    """
    seen, kept = sum(one.seen_tokens for one in ended), sum(one.kept_tokens for one in ended)
    details = None if reasoning_tokens is None else CompletionTokensDetails(reasoning_tokens=reasoning_tokens)
    usage = CompletionUsage(
        prompt_tokens=prompt_tokens, completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=max((one.cached_tokens for one in ended), default=0)),
        completion_tokens_details=details,
    )  # fmt: skip
    if ended:
        usage.kvfold = {
            "seen_tokens": seen, "kept_tokens": round(kept, 2), "kv_bytes": sum(one.kv_bytes for one in ended),
            "compression": round(seen / kept, 3) if kept else None,
        }  # fmt: skip
    return usage
