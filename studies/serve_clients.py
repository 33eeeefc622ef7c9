"""Other people's clients, unchanged, against `kvfold serve`: litellm, lm-evaluation-harness, and schemathesis.

    python -m venv CLIENTS && CLIENTS/bin/pip install litellm schemathesis 'lm-eval[api]' transformers
    python studies/serve_clients.py CLIENTS/bin/python litellm,lm-eval,schemathesis [results/serve/clients.json]

The server is `kvfold serve --demo` with the uncompressed method first, for schemathesis a tiny random model. litellm asks for
completions, chats, streams, tools, a JSON schema and responses. lm-eval scores the same small tasks through both of its API
models and in process, with kvfold's own model for it: log-likelihoods must agree. schemathesis draws requests from the
OpenAPI schema and looks for a status 500.
"""

import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvfold.record import made

NAME = "demo"
EXAMPLES = 30
"""Requests that schemathesis draws for an endpoint in each of its phases."""
SENTENCES = [
    ("The capital of France is", " Paris"), ("Two and two make", " four"), ("The opposite of hot is", " cold"),
    ("Bees make", " honey"), ("The sun rises in the", " east"), ("Water freezes at zero degrees", " Celsius"),
    ("The first month of the year is", " January"), ("A triangle has three", " sides"), ("Cows give", " milk"),
    ("The sea is", " blue"), ("Shakespeare wrote", " Hamlet"), ("The moon goes around the", " earth"),
]  # fmt: skip
LITELLM = """
import json, sys, litellm
from litellm import completion, embedding, responses, text_completion
url, name = sys.argv[1:3]
messages = [{"role": "user", "content": "Name a colour."}]
seen = {}
for kind in ("openai", "hosted_vllm"):
    common = {"model": f"{kind}/{name}", "api_base": url + "/v1", "api_key": "none", "temperature": 0, "max_tokens": 12}
    whole = completion(messages=messages, **common)
    pieces = [chunk for chunk in completion(messages=messages, stream=True, stream_options={"include_usage": True}, **common)]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in pieces if chunk.choices)
    assert text == whole.choices[0].message.content and text, (text, whole)
    assert [c.usage for c in pieces if getattr(c, "usage", None)][-1].completion_tokens == whole.usage.completion_tokens
    seen[kind + " chat, whole and streamed"] = text
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {
        "city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"], "additionalProperties": False}}}
    called = completion(messages=messages, tools=[tool], tool_choice="required", **(common | {"max_tokens": 80}))
    call = called.choices[0].message.tool_calls[0].function
    # For vLLM, litellm leaves out additionalProperties, so that a small model may add some until its tokens are over.
    whole_call = called.choices[0].finish_reason == "tool_calls"
    assert call.name == "weather" and (not whole_call or json.loads(call.arguments)["city"] in ("Oslo", "Rome"))
    assert whole_call or kind == "hosted_vllm", called
    seen[kind + " tool"] = call.arguments
    schema = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"],
              "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "colour", "schema": schema, "strict": True}}
    formed = completion(messages=messages, response_format=form, **(common | {"max_tokens": 60}))
    assert json.loads(formed.choices[0].message.content)["colour"] in ("red", "blue")
    seen[kind + " JSON schema"] = formed.choices[0].message.content
    ours = completion(messages=messages, extra_body={"kvfold": {"time": "h2o:87+88"}}, **common)
    seen[kind + " method of a request"] = ours.choices[0].message.content
common = {"api_base": url + "/v1", "api_key": "none"}
plain = text_completion(model=f"text-completion-openai/{name}", prompt="The sea is", max_tokens=6, temperature=0, **common)
seen["text completion"] = plain.choices[0].text
answer = responses(model=f"openai/{name}", input="Name a colour.", max_output_tokens=12, temperature=0, **common)
seen["responses"] = answer.output[0].content[0].text
events = [event.type for event in responses(model=f"openai/{name}", input="Hi", max_output_tokens=8, stream=True, **common)]
seen["responses, streamed"] = str(events[-1])
for wrong, fault in ((lambda: completion(model=f"openai/{name}", messages=messages, temperature=-1, **common), "BadRequestError"),
                     (lambda: completion(model="openai/other", messages=messages, **common), "NotFoundError"),
                     (lambda: embedding(model=f"openai/{name}", input="a", **common), "BadRequestError"),
                     (lambda: completion(model=f"openai/{name}", messages=[{"role": "user", "content": "a " * 20000}], **common),
                      "ContextWindowExceededError")):
    try:
        wrong()
    except litellm.exceptions.APIError as error:
        seen["refused: " + fault] = type(error).__name__
    except Exception as error:
        seen["refused: " + fault] = type(error).__name__
print("FOUND " + json.dumps(seen))
"""


@contextmanager
def server(*options: str) -> Iterator[str]:
    """The address of a server; `options`: what it serves, first of all."""
    command = [
        sys.executable,
        "-c",
        "from kvfold.cli import app; app()",
        "serve",
        "--served-model-name",
        NAME,
    ]
    command += ["--method", "full", "--method", "h2o:87+88", "--kv-memory", "500MB", "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        found = next(filter(None, (re.search(r"at (http://[\d.:]+)/v1", line) for line in process.stderr)), None)
        if found is None:
            raise SystemExit("the server did not start")
        threading.Thread(target=lambda: [None for _ in process.stderr], daemon=True).start()
        yield found[1]
    finally:
        process.terminate()
        process.wait(60)


def run(command: list[str]) -> str:
    """What a command prints. Raises `SystemExit` with its last lines where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[:4]} failed: {(done.stdout + done.stderr)[-2000:]}")
    return done.stdout


def ask_litellm(clients: str, url: str) -> dict[str, str]:
    """What each of its calls gave."""
    printed = run([clients, "-W", "ignore", "-c", LITELLM, url, NAME])
    found = json.loads(printed.rpartition("FOUND ")[2])
    wrong = {name: kind for name, kind in found.items() if name.startswith("refused: ") and name[9:] != kind}
    return {"calls": found, "refused in another way": wrong}


def write_tasks(folder: Path) -> None:
    """A task of log-likelihoods and one of free answers, over the same sentences."""
    rows = "".join(json.dumps({"text": text, "target": target}) + "\n" for text, target in SENTENCES)
    (folder / "rows.jsonl").write_text(rows)
    data = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / 'rows.jsonl'}\ntest_split: test\n"
    likelihood = "metric_list:\n  - metric: acc\n  - metric: perplexity\n"
    free = "generation_kwargs:\n  until: ['.']\n  max_gen_toks: 12\n  do_sample: false\nmetric_list:\n  - metric: exact_match\n"
    for name, kind, more in (("scored", "loglikelihood", likelihood), ("written", "generate_until", free)):
        form = "doc_to_text: '{{text}}'\ndoc_to_target: '{{target}}'\ntarget_delimiter: ''\n"
        (folder / f"{name}.yaml").write_text(f"task: {name}\noutput_type: {kind}\n{data}{form}{more}")


def answers(out: Path, task: str) -> list:
    """Of each sentence, in order, what a run of lm-eval logged."""
    path = next(out.rglob(f"samples_{task}_*.jsonl"))
    rows = sorted(map(json.loads, path.read_text().splitlines()), key=lambda row: row["doc_id"])
    return [row["filtered_resps"] for row in rows]


def ask_lm_eval(clients: str, url: str, folder: Path) -> dict[str, object]:
    """Both API models beside kvfold's own in process."""
    from kvfold.demo import bundled_model
    from kvfold.models.load import load_tokenizer

    source = bundled_model()
    load_tokenizer(source).save_pretrained(folder / "tokenizer")
    write_tasks(folder)
    address = f"model={NAME},num_concurrent=4,max_retries=1,tokenizer={folder / 'tokenizer'},base_url={url}/v1"

    def evaluate(out: str, tasks: str, command: list[str], *more: str) -> Path:
        run(
            [
                *command,
                "--include_path",
                str(folder),
                "--tasks",
                tasks,
                "--log_samples",
                "--output_path",
                str(folder / out),
                *more,
            ]
        )
        return folder / out

    api = [clients, "-m", "lm_eval", "--model"]
    texts = evaluate("api", "scored,written", [*api, "local-completions", "--model_args", f"{address}/completions"])
    chats = evaluate(
        "chat",
        "written",
        [*api, "local-chat-completions", "--model_args", f"{address}/chat/completions"],
        "--apply_chat_template",
    )
    ours = [sys.executable, "-m", "kvfold.eval.lm_eval", "--model", "kvfold", "--model_args", f"pretrained={source}"]
    here = evaluate("here", "scored,written", [*ours, "--device", "cpu"])
    pairs = list(zip(answers(texts, "scored"), answers(here, "scored"), strict=True))
    numbers = [[float(str(side[0][0] if isinstance(side[0], list) else side[0])) for side in pair] for pair in pairs]
    return {
        "sentences": len(SENTENCES),
        "largest difference of a log-likelihood": max(abs(one - other) for one, other in numbers),
        "same free answers": sum(
            a == b for a, b in zip(answers(texts, "written"), answers(here, "written"), strict=True)
        ),
        "chat answers": [str(one[0])[:60] for one in answers(chats, "written")][:3],
    }


def ask_schemathesis(clients: str, url: str) -> dict[str, object]:
    """What its own checks found: none may be a status of 500 or more."""
    command = [
        str(Path(clients).parent / "schemathesis"), "run", f"{url}/openapi.json", "--checks",
        "not_a_server_error,status_code_conformance,content_type_conformance", "--max-examples", str(EXAMPLES), "--seed", "1",
        "--request-timeout", "60", "--no-color", "--exclude-path", "/kvfold/live",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    start = next((at for at, line in enumerate(lines) if "SUMMARY" in line), -12)
    return {
        "exit_code": done.returncode, "server_errors": done.stdout.count("Server error"),
        "summary": lines[start + 1 :], "findings": [line for line in lines if line.startswith("- ")][:20],
    }  # fmt: skip


def write_tiny(folder: Path) -> str:
    """A checkpoint of two small random layers with the demo's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from kvfold.demo import bundled_model
    from kvfold.models.load import load_tokenizer

    tokenizer = load_tokenizer(bundled_model())
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def main(clients: str, which: list[str], out: Path) -> None:
    """Each client against its server; what the file has of others stays."""
    result: dict[str, object] = json.loads(out.read_text()) if out.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        for name in which:
            began = time.monotonic()
            with server(*((write_tiny(Path(folder)),) if name == "schemathesis" else ("--demo",))) as url:
                if name == "litellm":
                    result[name] = ask_litellm(clients, url)
                elif name == "lm-eval":
                    result[name] = ask_lm_eval(clients, url, Path(folder))
                else:
                    result[name] = ask_schemathesis(clients, url)
            version = run([clients, "-c", f"import importlib.metadata as m; print(m.version({name!r}))"]).strip()
            result[name] = {"version": version, "seconds": time.monotonic() - began} | result[name]
            result["made"] = made(None, "float32")
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(result, indent=1) + "\n")
            print(name, json.dumps(result[name], indent=1))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2].split(","), Path(sys.argv[3] if len(sys.argv) > 3 else "results/serve/clients.json"))
