"""Where a prompt is sent: to whom its beginning was sent before, unless that one is crowded."""

import json

from hypothesis import given
from hypothesis import strategies as st

from kvfold.integrations.replicas import MOST_BLOCKS, PrefixMemory, chain, prompt_bytes, ranked

CHAT = "/v1/chat/completions"


def chat(*texts, **fields) -> bytes:
    messages = [{"role": "user", "content": text} for text in texts]
    return json.dumps({"model": "any", "messages": messages, **fields}).encode()


@given(st.binary(max_size=300), st.binary(max_size=300), st.integers(1, 40))
def test_chains_agree_as_far_as_prompts_do(one, other, block):
    first, second = chain(one, block), chain(other, block)
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    agreeing = sum(1 for a, b in zip(first, second, strict=False) if a == b)
    assert agreeing == same // block or min(len(one), len(other)) < block or one == other


def test_a_long_prompt_is_looked_at_only_so_far():
    assert len(chain(b"x" * 10**6)) == MOST_BLOCKS
    assert chain(b"") == () and len(chain(b"short")) == 1


def test_a_conversation_that_goes_on_begins_with_the_same_bytes():
    first, more = prompt_bytes(CHAT, chat("a" * 50)), prompt_bytes(CHAT, chat("a" * 50, "b", "c"))
    assert more.startswith(first) and more != first
    assert not prompt_bytes(CHAT, chat("a" * 50, kvfold={"time": "full"})).startswith(first)


def test_prompts_of_text_and_of_ids_and_lists_of_prompts():
    def told(prompt):
        return prompt_bytes("/v1/completions", json.dumps({"prompt": prompt}).encode())

    assert told("abcdef").startswith(told("abc"))
    assert told([5, 6, 7]).startswith(told([5, 6]))
    assert told(["abc", "xyz"]) == told("abc")
    assert told([[5, 6], [9]]) == told([5, 6])


def test_what_is_no_request_has_no_prompt():
    assert prompt_bytes(CHAT, b"{") == prompt_bytes(CHAT, b"[1]") == b""
    assert prompt_bytes(CHAT, b"\xff") == b""
    assert prompt_bytes("/v1/responses", b'{"input": "hello"}') != b""


def test_the_longest_beginning_wins():
    memory, text = PrefixMemory(), bytes(range(256)) * 4
    memory.note(chain(text[:300]), "a")
    memory.note(chain(text[:700]), "b")
    loads = {"a": 0, "b": 3, "c": 0}
    assert ranked(chain(text), memory, loads, slack=4)[0] == "b"
    assert memory.matched(chain(text), "c") == 0


def test_a_crowded_replica_is_the_last_choice():
    memory, prompt = PrefixMemory(), chain(b"y" * 500)
    memory.note(prompt, "a")
    assert ranked(prompt, memory, {"a": 7, "b": 0}, slack=8) == ["a", "b"]
    assert ranked(prompt, memory, {"a": 8, "b": 0}, slack=8) == ["b", "a"]


def test_strangers_agree_and_spread():
    """Routers that have sent nothing yet choose alike, and different prompts go to different replicas."""
    loads = dict.fromkeys("abcd", 0)
    chosen = [ranked(chain(f"{number:04d}".encode() * 50), PrefixMemory(), loads, 8)[0] for number in range(64)]
    again = [
        ranked(chain(f"{number:04d}".encode() * 50), PrefixMemory(), dict(reversed(loads.items())), 8)[0]
        for number in range(64)
    ]
    assert chosen == again and set(chosen) == set("abcd")


def test_without_a_prompt_load_decides():
    assert ranked((), PrefixMemory(), {"a": 2, "b": 1, "c": 3}, slack=8)[0] == "b"


def test_replicas_that_are_gone_are_forgotten_and_memory_is_bounded():
    memory = PrefixMemory(remembered=10)
    memory.note(chain(b"z" * 128 * 30), "a")
    assert len(memory) == 10 and memory.matched(chain(b"z" * 128 * 30), "a") == 10
    memory.note(chain(b"z" * 128 * 3), "b")
    memory.keep_only(["b"])
    assert len(memory) == 3 and memory.matched(chain(b"z" * 128 * 30), "a") == 0
