"""Generate text with a cache that evicts, and print what the cache held.

  python examples/quickstart.py MODEL ["Once upon a time"]

MODEL is a checkpoint's folder, a hub name or a .gguf file. H2O keeps the newest tokens and those that were attended to most.
"""

import sys

import kvfold


def main() -> None:
    """Load, generate 100 tokens, count."""
    source = sys.argv[1]
    prompt = sys.argv[2] if len(sys.argv) > 2 else "Once upon a time"
    model = kvfold.load(source, time="h2o:32+32")
    tokenizer = kvfold.load_tokenizer(source)
    inputs = tokenizer(prompt, return_tensors="pt")
    cache = model.new_cache(rows=1)
    out = model.generate(**inputs, past_key_values=cache, max_new_tokens=100, min_new_tokens=100, do_sample=False)
    print(tokenizer.decode(out[0], skip_special_tokens=True))
    print(f"seen: {cache.seen_tokens.item()} tokens")
    print(f"kept: at most {cache.kept_tokens.max().item()} tokens in each KV head")
    print(f"held: {cache.allocated_bytes:,} bytes; uncompressed: {cache.full_bytes:,} bytes")


if __name__ == "__main__":
    main()
