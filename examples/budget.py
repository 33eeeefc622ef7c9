"""Plan a memory budget, give it to a cache, and see what happens when a call doesn't fit.

  python examples/budget.py MODEL

The budget is what 100 tokens take without compression. 120 tokens don't fit; with a window of 64 tokens they do.
"""

import sys

import torch

import kvfold


def main() -> None:
    """The same call and the same budget under two methods."""
    model = kvfold.load(sys.argv[1])
    budget = kvfold.plan(model, time="full").bytes([100])
    ids = torch.randint(model.config.vocab_size, (1, 120))
    for time in ("full", "window:60+4"):
        plan = kvfold.plan(model, time=time)
        print(f"{time}: planned {plan.bytes([120]):,} of {budget:,} bytes")
        cache = model.new_cache(rows=1, time=time, memory_bytes=budget)
        try:
            with torch.no_grad():
                model(ids, past_key_values=cache)
            print(f"  read {cache.seen_tokens.item()} tokens; {cache.allocated_bytes:,} bytes allocated")
        except kvfold.CacheFull as error:  # raised before anything is written: the cache is as it was
            print(f"  refused: {error}")
        cache.free()


if __name__ == "__main__":
    main()
