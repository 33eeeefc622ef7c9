"""Whatever can't be loaded says so in one line that names the file, the rule and the remedy."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from kvfold.layout.kvlayout import KVLayout
from kvfold.models.load import load, load_tokenizer


@pytest.fixture
def folder(pair, tmp_path):
    pair("llama")[1].save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def ours_folder(pair, tmp_path):
    pair("llama")[0].save_pretrained(tmp_path / "ours")
    return tmp_path / "ours"


def refusal(source, function=load, **settings) -> str:
    with pytest.raises(ValueError) as caught:
        function(source, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_settings(folder):
    assert "no adapter.json there" in refusal(folder, adapter="x")
    assert "storage 'int9'" in refusal(folder, bits="int9")
    assert "lru" in refusal(folder, time="lru:4")
    assert "dtype 'int3': weights are held as float32, bfloat16, float16" in refusal(folder, dtype="int3")
    assert "device 'gpu'" in refusal(folder, device="gpu")
    if not torch.cuda.is_available():
        assert "torch sees no GPU on this machine" in refusal(folder, device="cuda")


def test_paths(tmp_path, folder):
    assert "there is no such file or folder" in refusal(tmp_path / "nowhere")
    assert "there is no such file or folder" in refusal(str(tmp_path / "nowhere"))
    assert "there is no such file or folder" in refusal("nowhere.gguf")
    assert "no folder here, and no config.json came from the hub" in refusal("nobody-at-all/nothing")
    assert "a single file is read as GGUF only" in refusal(folder / "model.safetensors")
    (tmp_path / "empty").mkdir()
    assert "no config.json there" in refusal(tmp_path / "empty")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but no more")
    assert "broken.gguf" in refusal(tmp_path / "broken.gguf")


def test_configs(folder):
    whole = (folder / "config.json").read_text()
    edit_config(folder, model_type="mixtral")
    assert "model family 'mixtral': kvfold has no decoder for it: it knows gemma" in refusal(folder)
    edit_config(folder, model_type="llama", quantization_config={"quant_method": "gptq", "bits": 4})
    assert "its weights are quantised by gptq" in refusal(folder)
    edit_config(folder, quantization_config=None, hidden_size="wide")
    assert "its config can't be understood" in refusal(folder)
    newer = KVLayout.plain(2, 2, 16).to_json() | {"format": 99}
    edit_config(folder, model_type="kvfold", hidden_size=64, layout=newer)
    assert refusal(folder).endswith("understood: layout format 99: this kvfold reads format 1: update kvfold")
    (folder / "config.json").write_text(whole[:60])
    assert "config.json: can't be read as JSON" in refusal(folder)
    (folder / "config.json").write_text("[1]")
    assert "holds a list, not an object" in refusal(folder)


def test_files_of_weights(folder):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert f"{weights}: can't be read" in refusal(folder)
    weights.write_bytes(b"")
    assert f"{weights}: can't be read" in refusal(folder)
    weights.unlink()
    assert "kvfold reads safetensors only" in refusal(folder)
    torch.save({}, folder / "pytorch_model.bin")
    assert "kvfold reads safetensors only" in refusal(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}))
    assert "model-00001-of-00001.safetensors: can't be read" in refusal(folder)
    index.write_text("{}")
    assert "it has no weight_map" in refusal(folder)


@pytest.mark.parametrize("kind", ["folder", "ours_folder"])
def test_weights_that_do_not_fit(kind, request):
    folder = request.getfixturevalue(kind)
    path = folder / "model.safetensors"
    whole = load_file(path)
    lacking = {name: weight for name, weight in whole.items() if "q_proj" not in name}
    save_file(lacking, path, {"format": "pt"})
    assert "the checkpoint lacks 4 weights, the first is model.layers.0.self_attn.q_proj.weight" in refusal(folder)
    save_file(whole | {"model.norm.weight": torch.ones(3)}, path, {"format": "pt"})
    assert "has in another shape 1 weights, the first is model.norm.weight" in refusal(folder)
    save_file(whole, path, {"format": "pt"})
    edit_config(folder, intermediate_size=100)
    assert "has in another shape 12 weights" in refusal(folder)


def test_weights_beyond_our_own_model(ours_folder):
    path = ours_folder / "model.safetensors"
    save_file(load_file(path) | {"model.layers.0.self_attn.fold_proj.weight": torch.ones(3)}, path, {"format": "pt"})
    assert "has beyond the model 1 weights, the first is model.layers.0.self_attn.fold_proj.weight" in refusal(
        ours_folder
    )


def test_a_layout_that_is_not_the_models(ours_folder):
    layout = json.loads((ours_folder / "config.json").read_text())["layout"]
    edit_config(ours_folder, layout=layout | {"format": 7})
    assert "layout format 7" in refusal(ours_folder)


def test_tokenizers(folder):
    assert "no tokenizer can be read there" in refusal(folder, load_tokenizer)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "one": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    assert load_tokenizer(folder)("one").input_ids == [1]


def test_loading_is_quiet_and_leaves_the_settings_of_transformers_alone(folder, capfd):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load(folder)
    refusal(folder.parent / "nowhere")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")


class Fitting:
    """Raises in the middle of loading."""

    def __init__(self, error: BaseException):
        self.error = error

    def __call__(self, *args, **kwargs):
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["python", "a GPU", "a CPU"],
)
def test_too_little_memory_is_no_fault_of_the_checkpoint(folder, ours_folder, monkeypatch, error):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", Fitting(error))
    monkeypatch.setattr("kvfold.models.load.FoldForCausalLM.from_pretrained", Fitting(error))
    for source in (folder, ours_folder):
        with pytest.raises(type(error)) as caught:
            load(source)
        assert caught.value is error


def test_a_slip_of_ours_is_not_blamed_on_the_checkpoint(folder, ours_folder, monkeypatch):
    def slip(*args, **kwargs):
        return {}["a name of ours"]

    monkeypatch.setattr("kvfold.models.load.fold_weights", slip)
    with pytest.raises(KeyError, match="a name of ours"):
        load(folder)
    slip = eval("lambda *args, **kwargs: {}['a name of ours']", {"__name__": "kvfold.models.blocks"})
    monkeypatch.setattr("kvfold.models.blocks.FoldMLP.__init__", slip)
    with pytest.raises(KeyError, match="a name of ours"):
        load(ours_folder)


def test_a_key_that_a_file_lacks_is_the_files(folder, monkeypatch):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", Fitting(KeyError("weight_map")))
    assert "the weights can't be read ('weight_map'): fetch the checkpoint again" in refusal(folder)
