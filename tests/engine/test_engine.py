"""The engine on a tiny model: every answer is that of its request alone, memory is given back, errors are one request's own."""

import asyncio
import random
import threading
import time

import pytest
import torch

from byte_tokenizer import EOS
from kvfold.engine.engine import Engine
from tiny import TOKENIZER, differences, tiny_model

METHODS = ["full", "dms:8", "h2o:16+16"]
GREEDY = {"temperature": 0, "max_tokens": 8}


def new_engine(*, methods=METHODS, kv_memory="400kB", model=None, **options) -> Engine:
    options = {"page_slots": 4, "poison": True, "max_running": 16} | options
    return Engine(model or tiny_model(), TOKENIZER, kv_memory, methods, **options)


def assert_all_free(engine):
    engine.close()
    stats = engine.stats()
    assert stats["free_bytes"] == stats["pool_bytes"] and not stats["running"] and not stats["waiting"]
    for store in engine._runner.stores.values():
        assert store.num_sequences == 0


def draw_requests(number, *, seed=0, methods=METHODS, longest=60):
    rng = random.Random(seed)
    shared = [rng.randrange(250) for _ in range(80)]
    requests = []
    for _ in range(number):
        prompt = shared[: rng.choice([0, 0, 70])] + [rng.randrange(250) for _ in range(rng.randint(1, longest))]
        requests.append({
            "prompt": prompt, "max_tokens": rng.randint(1, 20), "time": rng.choice(methods), "seed": rng.randrange(999),
            "temperature": rng.choice([0, 0, 1.0]), "priority": rng.randrange(3), "ignore_eos": rng.random() < 0.5,
        })  # fmt: skip
    return requests


@pytest.mark.parametrize(
    ("number", "methods", "gates", "options"),
    [
        (100, METHODS, "dms", {"kv_memory": "150kB", "prefill_tokens": 32}),
        (14, ["dmc:4", "tova:20", "window:16+4"], "dmc", {"kv_memory": "150kB", "prefill_tokens": 32}),
        (18, ["full", "dms:8"], "dms", {"kv_memory": "60kB", "prefill_tokens": 64, "estimate_scale": 0.25}),
        (18, ["full", "fold:8+8@0.3"], "fold", {"kv_memory": "60kB", "prefill_tokens": 32, "estimate_scale": 0.25}),
    ],
)
def test_every_answer_is_that_of_its_request_alone(number, methods, gates, options):
    requests = draw_requests(number, methods=methods)
    with new_engine(methods=methods, model=tiny_model(gates), **options) as engine:
        answers = engine.generate(requests)
        assert [one.error for one in answers] == [None] * len(answers)
        excused, wrong = differences(tiny_model(gates), requests, answers, grid=options["prefill_tokens"])
        assert wrong == 0 and excused <= 1
        stats = engine.stats()
        assert stats["most_running"] > 2 and stats["finished"] == len(requests)
        if "estimate_scale" in options:
            assert stats["preemptions"] > 0
        assert_all_free(engine)


def test_cancelled_ones_free_their_pages_and_the_others_are_unharmed():
    requests = draw_requests(16, seed=1)
    with new_engine(prefill_tokens=64) as engine:
        jobs, pieces, done = [], [[] for _ in requests], threading.Semaphore(0)

        def deliver_to(place):
            def deliver(piece):
                pieces[place].append(piece)
                if place % 3 == 0 and len(pieces[place]) == 2:
                    engine.cancel(jobs[place])
                if piece.finish_reason:
                    done.release()

            return deliver

        for place, request in enumerate(requests):
            jobs.append(engine.submit(request, deliver_to(place)))
        for _ in requests:
            assert done.acquire(timeout=60)
        reasons = [found[-1].finish_reason for found in pieces]
        assert set(reasons) <= {"stop", "length", "abort"} and "abort" in reasons
        kept = [place for place, reason in enumerate(reasons) if reason != "abort"]
        ids = [[token for piece in pieces[place] for token in piece.token_ids] for place in range(len(requests))]
        answers = [type("Answer", (), {"token_ids": ids[place], "finish_reason": reasons[place]}) for place in kept]
        assert differences(tiny_model(), [requests[place] for place in kept], answers, grid=64)[1] == 0
        assert_all_free(engine)


def test_errors_are_one_requests_own():
    asked = {
        "fine": GREEDY | {"prompt": "hello"},
        "empty": {"prompt": ""},
        "no ids": {"prompt": []},
        "too long": {"prompt": [1] * 512},
        "unknown field": {"prompt": "a", "max_token": 3},
        "unknown method": {"prompt": "a", "time": "window:9+1"},
        "bad method": {"prompt": "a", "time": "windw"},
        "bad number": {"prompt": "a", "temperature": -1},
        "no tokens": {"prompt": "a", "max_tokens": 0},
        "no entries": {"prompt": "a", "time": "h2o:0+0"},
        "foreign id": {"prompt": [9999]},
        "schema": {"prompt": "a", "structured_outputs": {"json": {"type": "string", "minLength": 3, "maxLength": 1}}},
        "nothing left": {"prompt": "a", "allowed_token_ids": [5], "logit_bias": {}, "bad_words": [[5]]},
        "not an object": 7,
        "stop of 10 kB": GREEDY | {"prompt": "hello", "stop": "x" * 10_000},
        "long stop": GREEDY | {"prompt": "hello", "stop": "x" * 4096},
    }
    with new_engine() as engine:
        answers = dict(zip(asked, engine.generate(asked.values()), strict=True))
        errors = {name: one.error for name, one in answers.items() if one.error}
        assert errors.keys() == asked.keys() - {"fine", "long stop"}
        for name, error in errors.items():
            assert "\n" not in error and len(error) < 500 and answers[name].finish_reason == "error", name
        assert "at most 4,096 characters, got one of 10,000" in errors["stop of 10 kB"]
        assert "did you mean 'max_tokens'" in errors["unknown field"]
        assert "minLength" in errors["schema"] and "no token is left" in errors["nothing left"]
        assert answers["fine"].token_ids == answers["long stop"].token_ids and len(answers["fine"].token_ids) == 8
        assert_all_free(engine)


def test_no_memory_is_refused_in_one_line():
    for memory, said in (
        ("0GB", "memory '0GB'"),
        (0, "kv_memory must be at least 1 byte"),
        (400, "kv_memory must hold"),
    ):
        with pytest.raises(ValueError, match=said):
            new_engine(kv_memory=memory)


def test_one_that_can_never_fit_is_refused_at_submission():
    with new_engine(methods=["full"], kv_memory="40kB") as engine:
        bad, fine = engine.generate([{"prompt": [1] * 400, "max_tokens": 64}, GREEDY | {"prompt": [1] * 20}])
        assert bad.error.startswith("prompt and answer of 464 tokens must fit") and len(fine.token_ids) == 8
        unbounded = engine.generate([{"prompt": [1] * 20, "max_tokens": None, "ignore_eos": True}])[0]
        assert unbounded.finish_reason == "length" and 8 < len(unbounded.token_ids) < 492
        assert_all_free(engine)


def test_a_call_that_fails_ends_its_requests_alone():
    with new_engine() as engine:
        forward = engine._runner.forward

        def failing(method, *args, **options):
            if method == "dms:8":
                raise RuntimeError("out of\nmemory")
            return forward(method, *args, **options)

        engine._runner.forward = failing
        bad, fine = engine.generate([GREEDY | {"prompt": "hello", "time": "dms:8"}, GREEDY | {"prompt": "hello"}])
        assert bad.error == "the model failed: RuntimeError: out of memory" and len(fine.token_ids) == 8
        assert_all_free(engine)


def test_a_tokenizer_that_fails_ends_its_answer_alone(monkeypatch):
    def failing(self, token, **options):
        if token == first.token_ids[0]:
            raise RuntimeError("invalid\nprefix")
        return ""

    asked = [{"prompt": text, "temperature": 0, "max_tokens": 3} for text in ("hello", "world")]
    with new_engine() as engine:
        first, second = engine.generate(asked)
        assert first.token_ids[0] not in second.token_ids
        monkeypatch.setattr("kvfold.engine.answers.TextStream.add", failing)
        bad, fine = engine.generate(asked)
        assert bad.error == "RuntimeError: invalid prefix" and fine.token_ids == second.token_ids
        assert_all_free(engine)


def test_requests_sent_while_it_stops_are_answered():
    """Nobody waits for ever: an answer comes, or the engine says that it takes nothing."""
    engine, said = new_engine(), []

    def ask():
        try:
            said.append([one.finish_reason for one in engine.generate([GREEDY | {"prompt": "hello"}] * 3)])
        except RuntimeError as error:
            said.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    engine.close()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()
    assert len(said) == 6 and engine.stats()["free_bytes"] == engine.stats()["pool_bytes"]
    with pytest.raises(RuntimeError, match="can't take requests: it is closed"):
        engine.generate(["hello"])


def test_an_engine_that_breaks_tells_everybody():
    engine = new_engine()
    engine._scheduler.plan = lambda now: 1 / 0
    assert engine.generate([GREEDY | {"prompt": "hello"}])[0].error == "ZeroDivisionError: division by zero"
    with pytest.raises(RuntimeError, match="can't take requests: ZeroDivisionError"):
        engine.generate(["hello"])


def test_questions_about_one_text_read_it_once():
    text = torch.randint(3, 250, (256,), generator=torch.Generator().manual_seed(5)).tolist()
    requests = [GREEDY | {"prompt": [*text, 7, place, 9], "time": "dms:8"} for place in range(16)]
    with new_engine(prefill_tokens=128) as engine, new_engine(prefill_tokens=128) as cold:
        answers = engine.generate(requests)
        assert engine.stats()["prompt_tokens"] < 1.2 * (256 + 16 * 3)
        assert [one.usage.cached_tokens for one in answers] == [0] + [257] * 15  # the text, and the token after it
        for request, answer in zip(requests[:4], answers, strict=False):
            # One after the other, so that nothing is there to be reused.
            cold._scheduler.drop_prefixes()
            assert cold.generate([request])[0].token_ids == answer.token_ids
        assert_all_free(engine)


@pytest.mark.parametrize("time", ["full", "dms:8"])
def test_a_second_turn_goes_on_from_kept_state(time):
    first = GREEDY | {"prompt": list(range(3, 103)), "time": time}
    with new_engine() as engine, new_engine() as cold:
        answer = engine.generate([first])[0]
        second = GREEDY | {"prompt": [*first["prompt"], *answer.token_ids, 60, 61], "time": time}
        warm = engine.generate([second])[0]
        assert warm.usage.cached_tokens == 107 and engine.stats()["prefix_hits"] == 1
        assert warm.token_ids == cold.generate([second])[0].token_ids


def test_stop_strings_and_ids_end_an_answer():
    with new_engine() as engine:
        whole = engine.generate([GREEDY | {"prompt": "hello", "max_tokens": 24}])[0]
        text = TOKENIZER.decode(whole.token_ids)
        assert whole.text == text
        stop = text[10:12]
        at = text.find(stop)
        last = whole.token_ids[6]
        before = whole.token_ids[: whole.token_ids.index(last)]
        cases = [
            ({"stop": stop}, text[:at]),
            ({"stop": [stop], "include_stop_str_in_output": True}, text[: at + 2]),
            ({"stop_token_ids": [last]}, TOKENIZER.decode(before)),
        ]
        for more, expected in cases:
            answer = engine.generate([GREEDY | {"prompt": "hello", "max_tokens": 24} | more])[0]
            assert answer.text == expected and answer.finish_reason == "stop"


def test_logprobs_of_prompt_and_answer():
    prompt = list(range(40, 80))
    with new_engine(prefill_tokens=16) as engine:
        engine.generate([GREEDY | {"prompt": prompt}])  # leaves a prefix, which must not be used
        answer = engine.generate([GREEDY | {"prompt": prompt, "logprobs": 2, "prompt_logprobs": 1}])[0]
    with torch.no_grad():
        ids = [*prompt, *answer.token_ids]
        expected = torch.log_softmax(tiny_model()(torch.tensor([ids])).logits[0], dim=-1)
    found = [*answer.prompt_logprobs, *answer.logprobs]
    assert [one.token for one in found] == ids[1:] and len(answer.prompt_logprobs) == 39
    for place, one in enumerate(found):
        assert one.logprob == pytest.approx(float(expected[place, ids[place + 1]]), abs=1e-3)
        assert one.top[0][1] == pytest.approx(float(expected[place].max()), abs=1e-3)
        assert len(one.top) == (1 if place < 39 else 2)


def test_several_answers_to_one_prompt():
    asked = {"prompt": "hello", "max_tokens": 6, "seed": 5, "n": 3, "ignore_eos": True}
    with new_engine() as engine:
        answer = engine.generate([asked])[0]
        alone = [engine.generate([asked | {"n": 1, "seed": 5 + place}])[0] for place in range(3)]
    group = [answer, *answer.others]
    assert [one.token_ids for one in group] == [one.token_ids for one in alone]
    assert len({tuple(one.token_ids) for one in group}) == 3


def test_structured_answers_and_choices():
    with new_engine() as engine:
        asked = [
            {"prompt": "a", "structured_outputs": {"choice": ["red", "green"]}, "seed": 3},
            {"prompt": "a", "structured_outputs": {"regex": "[0-9]{3}"}, "seed": 3},
            {"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": [17]}}}},
        ]
        answers = engine.generate(asked)
    assert [one.finish_reason for one in answers] == ["stop"] * 3
    assert answers[0].text in ("red", "green") and answers[1].text.isdigit() and answers[2].text == "17"


def test_deadline():
    with new_engine() as engine:
        answer = engine.generate([{"prompt": "hello", "max_tokens": 400, "ignore_eos": True, "timeout": 0.2}])[0]
        assert answer.finish_reason == "timeout" and answer.error is None and len(answer.token_ids) < 400


def test_streams_side_by_side_and_left_early():
    async def read(engine, request, most=None):
        ids = []
        async for piece in engine.stream(request):
            ids += piece.token_ids
            if most is not None and len(ids) >= most:
                return ids, None
        return ids, piece.finish_reason

    async def both(engine):
        request = GREEDY | {"prompt": "hello", "max_tokens": 30, "ignore_eos": True}
        return await asyncio.gather(read(engine, request), read(engine, request | {"max_tokens": 300}, most=4))

    with new_engine() as engine:
        (whole, reason), (part, none) = asyncio.run(both(engine))
        assert reason == "length" and len(whole) == 30 and part == whole[:4] and none is None
        deadline = time.monotonic() + 20
        while engine.stats()["running"] and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not engine.stats()["running"], "a stream that was left is cancelled"
        with pytest.raises(ValueError, match="temperature"):
            asyncio.run(read(engine, {"prompt": "a", "temperature": "hot"}))
        assert_all_free(engine)


def test_ends_are_left_out_of_the_text():
    with new_engine() as engine:
        answer = engine.generate([{"prompt": "hello", "logit_bias": {EOS: 100}, "temperature": 0}])[0]
        assert answer.token_ids == [EOS] and answer.text == "" and answer.finish_reason == "stop"
        later = engine.generate([{"prompt": "hello", "logit_bias": {EOS: 100}, "temperature": 0, "min_tokens": 3}])[0]
        assert len(later.token_ids) == 4 and later.token_ids[-1] == EOS
