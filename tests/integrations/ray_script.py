"""What test_ray_cluster.py runs in a process of its own, in a Ray of its own: python ray_script.py FOLDER."""

import importlib.util
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from kvfold.integrations.ray_serve import answered_dataset, build

PATIENCE_S = 300
"""Until a part counts as failed: a busy machine is slow, which is no failure."""
NEW_TOKENS = 1500
"""Of a long answer: seconds of work even for a small model."""

_SPEC = importlib.util.spec_from_file_location("study", Path(__file__).parents[2] / "studies" / "ray_serve.py")
study = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(study)


def main(folder: Path) -> None:
    """Says a word for each part that went well."""
    study.write_model(folder / "tiny")
    model, port = str(folder / "tiny"), study._free_port()
    try:
        study.start_serve(port)
        serve.run(build({"model": model, "kv_memory": "8MB", "cpus": 0.5}), name="kvfold", route_prefix="/")
        leaves(f"http://127.0.0.1:{port}")
        print("left")
        refused(f"http://127.0.0.1:{port}")
        print("refused")
        serve.delete("kvfold")
        scaled(model, f"http://127.0.0.1:{port}")
        print("scaled")
        serve.delete("kvfold")
        batches(model)
        print("answered")
    finally:
        ray.shutdown()


def leaves(url: str) -> None:
    """A client that closes its stream early: soon after, the engine has no request left and its pages are free."""
    body = {"prompt": "a" * 100, "max_tokens": NEW_TOKENS, "ignore_eos": True, "stream": True}
    handle = serve.get_deployment_handle("Replica", "kvfold")
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=PATIENCE_S) as response:
        # The name matters: httpx closes the connection when an iterator over its lines is thrown away.
        lines = response.iter_lines()
        assert response.status_code == 200 and next(lines).startswith("data: ")
        assert httpx.get(f"{url}/health", timeout=PATIENCE_S).status_code == 200
        assert _about(handle)["running"] == 1 and _use(handle) > 0
    deadline = time.monotonic() + PATIENCE_S
    while _about(handle)["running"] or _use(handle):
        assert time.monotonic() < deadline, "the engine still works for a client that is gone"
        time.sleep(0.05)
    assert _about(handle)["completion_tokens"] < NEW_TOKENS, "the engine went on to the end"


def _about(handle: DeploymentHandle) -> dict:
    """Where the one replica's engine stands."""
    return handle.about.remote().result(timeout_s=PATIENCE_S)


def _use(handle: DeploymentHandle) -> float:
    """The share of the pool that its requests hold or wait for."""
    return handle.record_autoscaling_stats.remote().result(timeout_s=PATIENCE_S)["pool_use"]


def refused(url: str) -> None:
    """What the front and the application refuse, in OpenAI's form."""
    assert httpx.get(f"{url}/metrics", timeout=PATIENCE_S).status_code == 404
    assert httpx.get(f"{url}/v1/models", headers={"host": "elsewhere.example"}, timeout=PATIENCE_S).status_code == 403
    answer = httpx.post(f"{url}/v1/completions", json={"prompt": "a" * 4000, "max_tokens": 4}, timeout=PATIENCE_S)
    assert answer.status_code == 400 and "context" in answer.json()["error"]["message"]
    answer = httpx.post(f"{url}/v1/completions", content=b"x" * (9 << 20), timeout=PATIENCE_S)
    assert answer.status_code == 413, answer.status_code


def scaled(model: str, url: str) -> None:
    """Requests that want more KV memory than one replica has bring a second one."""
    args = {"model": model, "kv_memory": "2MB", "cpus": 0.5, "max_replicas": 2}
    serve.run(build(args), name="kvfold", route_prefix="/")
    body = {"prompt": "a" * 100, "max_tokens": NEW_TOKENS, "ignore_eos": True}
    deadline = time.monotonic() + PATIENCE_S
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=PATIENCE_S) for _ in range(6)]
        while _running() < 2:
            assert time.monotonic() < deadline, f"still {_running()} replica"
            time.sleep(0.2)
        assert all(one.result().status_code == 200 for one in asked)


def _running() -> int:
    return serve.status().applications["kvfold"].deployments["Replica"].replica_states.get("RUNNING", 0)


def batches(model: str) -> None:
    """Rows with and without a mistake, through two batches."""
    rows = [{"prompt": f"row {number}", "max_tokens": 4 + number % 2} for number in range(6)]
    rows.append({"prompt": "x" * 5000, "max_tokens": 4})
    found = answered_dataset(ray.data.from_items(rows), model, batch_rows=4, kv_memory="8MB", cpus=0.5).take_all()
    by_prompt = {row["prompt"]: row for row in found}
    assert len(found) == 7 and all(by_prompt[row["prompt"]]["max_tokens"] == row["max_tokens"] for row in rows)
    assert "context" in by_prompt["x" * 5000]["error"] and by_prompt["x" * 5000]["text"] == ""
    good = [row for row in found if row["error"] is None]
    assert len(good) == 6 and all(1 <= row["completion_tokens"] <= row["max_tokens"] for row in good)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
