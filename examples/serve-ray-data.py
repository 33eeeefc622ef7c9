"""Answers to a file of requests, by two engines under Ray Data.

  python examples/serve-ray-data.py MODEL IN.jsonl OUT

Every line of IN is a JSON object of OpenAI's field names, such as {"prompt": "Once upon a time", "max_tokens": 32}. OUT is a
folder of JSON lines, with the answers beside what was asked. Needs `pip install 'kvfold[serve,ray]'`.
"""

import sys

import ray.data

from kvfold.integrations.ray_serve import answered_dataset


def main() -> None:
    """Read, answer, write."""
    model, source, target = sys.argv[1:]
    answered_dataset(ray.data.read_json(source, lines=True), model, engines=2).write_json(target)


if __name__ == "__main__":
    main()
