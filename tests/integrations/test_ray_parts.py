"""What of the Ray integration needs Ray installed but no cluster: settings, the policy, what clients are told."""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest

if find_spec("ray") is None:
    pytest.skip("Ray is not installed here: `make test-integrations`", allow_module_level=True)

import tomllib
from pathlib import Path

import yaml
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError

from kvfold.integrations import ray_serve
from kvfold.integrations.ray_serve import RaySettings, lost
from kvfold.integrations.replicas import FreePages
from kvfold.models.config import FoldConfig
from kvfold.models.decoder import FoldForCausalLM

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({}, "need a model"),
        ({"model": "m", "replica": 2}, "replica: extra inputs are not permitted: use adapter, cpus"),
        ({"model": "m", "replicas": 0}, "replicas must be at least 1"),
        ({"model": "m", "replicas": 3, "max_replicas": 2}, "at most max_replicas, got 3 and 2"),
        ({"model": "m", "target_use": 0}, "target_use must be over 0"),
        ({"model": "m", "gpus": 2}, "gpus must be 0 or 1"),
        ({"model": "m", "slack": 0}, "slack must be at least 1"),
        ({"model": "m", "kv_memory": "much"}, "much"),
        ({"model": "m", "replicas": "two"}, "replicas: input should be a valid integer, got 'two'"),
        ({"model": "m", "replicas": True}, "replicas: input should be a valid integer, got True"),
        ({"model": "m", "max_replicas": 1.5}, "max_replicas: input should be a valid integer, got 1.5"),
        ({"model": "m", "methods": 3}, "methods: input should be a valid tuple, got 3"),
        ({"model": "m", "server": "127.0.0.1"}, "server: input should be a valid dictionary, got '127.0.0.1'"),
        (
            {"model": "m", "server": {"hosts": "x"}},
            "hosts: extra inputs are not permitted: use allowed_origins, api_keys",
        ),
        ({"model": "m", "server": {"max_queue": "all"}}, "max_queue: input should be a valid integer, got 'all'"),
        ({"model": "m", "server": {"max_queue": -1}}, "max_queue must be at least 0"),
    ],
)
def test_settings_that_cannot_be_meant(args, said):
    with pytest.raises(ValueError) as error:
        RaySettings.parse(args)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_settings_are_read_as_a_file_gives_them():
    args = {
        "model": "a/b/",
        "methods": ["full", "tova:64"],
        "cpus": 2,
        "server": {"api_keys": "secret", "body_timeout_s": 5},
    }
    settings = RaySettings.parse(args)
    assert settings.methods == ("full", "tova:64") and settings.cpus == 2 and settings.server["api_keys"] == "secret"
    assert settings.server_settings().api_keys == ("secret",) and settings.server_settings().model_names == ("b",)
    assert RaySettings.parse({"model": "m", "methods": "full"}).methods == ("full",)


def test_an_adapter_that_is_not_there_is_refused_before_anything_starts(tmp_path):
    FoldForCausalLM(FoldConfig(hidden_size=64, num_hidden_layers=2, vocab_size=32)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"adapter nowhere: no adapter\.json there"):
        ray_serve.build({"model": str(tmp_path), "adapter": "./nowhere"})


def test_a_model_that_is_not_there_is_refused_before_anything_starts():
    with pytest.raises(ValueError, match="no such file or folder"):
        ray_serve.build({"model": "./nowhere/at/all"})


def test_the_example_is_read():
    (application,) = yaml.safe_load((ROOT / "examples" / "serve-ray.yaml").read_text())["applications"]
    assert application["import_path"] == f"{ray_serve.__name__}:build"
    settings = RaySettings.parse(application["args"])
    assert settings.server_settings().model_names == ("my-model",)


def test_the_tested_range_is_what_is_installed_and_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    low, high = ray_serve.TESTED
    assert project["optional-dependencies"]["ray"] == [f"ray[serve,data]>={low},<{high}"]
    assert f"Ray {low}" in (ROOT / "docs" / "vllm-and-ray.md").read_text()


def context(uses, target=2):
    return SimpleNamespace(
        aggregated_metrics={"pool_use": uses} if uses is not None else {}, target_num_replicas=target
    )


@pytest.mark.parametrize(
    ("uses", "wanted"),
    [
        (None, 2),
        ({}, 2),
        ({"a": 0.0, "b": 0.0}, 1),
        ({"a": 0.7, "b": 0.7}, 2),
        ({"a": 0.9, "b": 0.9}, 3),
        ({"a": 5.0}, 8),
    ],
)
def test_replicas_follow_the_use_of_kv_memory(uses, wanted):
    assert FreePages(0.7)(context(uses))[0] == wanted


def test_what_clients_are_told():
    died = lost(ActorDiedError())
    assert (died.status, died.code, died.headers["Retry-After"]) == (503, "replica_lost", "1")
    assert lost(BackPressureError(num_queued_requests=1, max_queued_requests=1)).status == 429
