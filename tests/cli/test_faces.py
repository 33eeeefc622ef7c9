"""What can be typed is frozen here: commands, arguments, options, and what each says of itself."""

import re
import shlex

import pytest
import typer

from kvfold.cli import app

MODEL_OPTIONS = "--bits --adapter --gates --dtype --device"
COMMANDS = {
    "plan": "MODEL --layers --heads --time --compression --bits --memory --kv-memory --context --batch --json",
    "convert": "SOURCE OUT --layers --heads --init --calibration --tokens --pair-heads --for --time --bits --dtype "
    "--device --json",
    "train": "RECIPE --out --sweep-lr --list --data --tokens --learning-rate --seed --set --valid --device --json",
    "retrofit": "SOURCE OUT --recipe --snapshot --adapter --lora --full --data --tokens --learning-rate --seed --set --time "
    "--start --compression --context --batch --kl --teacher --warm-start/--no-warm-start --calibrate/--no-calibrate --control "
    "--dtype --device --json",
    "calibrate": "MODEL ADAPTER OUT --compression --data --context --sequences --dtype --device --json",
    "eval": "MODEL --text --time --windows --context --batch --chunk --compare/--beside --fresh --passkey --passkey-tries "
    f"--passkey-length --tasks --task-folder --task-length --limit --peers {MODEL_OPTIONS} --out --json",
    "generate": f"MODEL PROMPT --input --output --kv-memory --max-new-tokens --temperature --seed --time {MODEL_OPTIONS} --json",
    "bench decode": "MODEL --time --batch --prompt --new --text --padding --filled --compression --compare-bits --peers "
    f"--repeats {MODEL_OPTIONS} --out --json",
    "bench prefill": f"MODEL --time --batch --prompt --call --text --repeats {MODEL_OPTIONS} --out --json",
    "bench capacity": f"MODEL --time --kv-memory --prompt --most --text {MODEL_OPTIONS} --out --json",
    "bench kernel": "--storage --tokens --spread --batch --kv-heads --group --head-dim --repeats --out --json",
    "bench gpu": "--out --json",
    "bench train": "MODEL --time --sequence --batch --repeats --train --dtype --device --out --json",
    "inspect": f"MODEL --text --time --tokens --head {MODEL_OPTIONS} --out --json",
    "serve": "MODEL --demo --method --kv-memory --host --port --api-key --served-model-name --max-model-len --max-num-seqs "
    "--max-num-batched-tokens --chat-template --generation-config --adapter --dtype --device",
    "bench serve": "URL... --clients --rate --requests --trace --text --prompt-words --max-tokens --time --model --api-key "
    "--seed --out --picture --json",
    "bench serve-offline": "MODEL --time --budget --requests --prompt --new --trace --text --temperature --peers "
    f"--repeats --seed {MODEL_OPTIONS} --out --json",
    "report": "RESULTS --out",
    "demo": "--out",
}
DEFAULTS = {
    "plan": {"context": "4k", "batch": 1},
    "convert": {"init": "mean", "tokens": "24k", "pair_heads": False, "target": "kvfold"},
    "train": {"list_": False},
    "retrofit": {"adapter": False, "full": False},
    "calibrate": {"context": "1024", "sequences": 16},
    "eval": {
        "windows": 32,
        "context": 1024,
        "batch": 32,
        "passkey": False,
        "passkey_tries": 4,
        "peers": "none",
        "fresh": False,
    },
    "generate": {"prompt": "-", "kv_memory": "2GB", "max_new_tokens": 128, "temperature": 0.0, "seed": 0},
    "bench decode": {
        "prompt": 32,
        "new": 64,
        "padding": "both",
        "filled": False,
        "peers": "transformers",
        "repeats": 5,
    },
    "bench prefill": {"batch": 8, "prompt": 1024, "repeats": 2},
    "bench capacity": {"kv_memory": "256MB", "prompt": 1024, "most": 256},
    "bench kernel": {"batch": 8, "kv_heads": 3, "group": 3, "head_dim": 64, "repeats": 30},
    "bench gpu": {},
    "bench train": {"sequence": 1024, "batch": 1, "repeats": 3, "train": "full"},
    "bench serve": {"requests": 100, "prompt_words": "20-200", "max_tokens": "16-128", "seed": 0},
    "bench serve-offline": {"requests": 16, "prompt": "128", "new": "128", "temperature": 0.0, "repeats": 1, "seed": 0},
    "inspect": {"tokens": 1024},
    "serve": {
        "demo": False,
        "kv_memory": "2GB",
        "host": "127.0.0.1",
        "port": 8000,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 512,
        "generation_config": "auto",
    },
    "report": {"results": "results", "out": "report.html"},
    "demo": {"out": "demo-out"},
}


def leaves() -> dict[str, object]:
    """Every command that does something, by the words that call it."""
    found, waiting = {}, [("", typer.main.get_command(app))]
    while waiting:
        name, command = waiting.pop()
        below = getattr(command, "commands", None)
        if below is None:
            found[name] = command
        else:
            waiting += [(f"{name} {part}".strip(), one) for part, one in below.items()]
    return found


def names_of(command) -> list[str]:
    return [
        "/".join([*one.opts, *one.secondary_opts]) if one.param_type_name == "option" else one.metavar
        for one in command.params
    ]


def test_commands_and_options_are_frozen():
    assert {name: names_of(command) for name, command in leaves().items()} == {
        name: words.split() for name, words in COMMANDS.items()
    }


def test_defaults_are_frozen():
    found = {
        name: {
            one.name: one.default for one in command.params if one.default not in (None, "") and one.name != "as_json"
        }
        for name, command in leaves().items()
    }
    shown = {
        name: {key: value if isinstance(value, int | float) else str(value) for key, value in defaults.items()}
        for name, defaults in found.items()
    }
    assert shown == DEFAULTS


def test_everything_explains_itself():
    for name, command in leaves().items():
        assert command.help and command.help.split("\n\n")[0].endswith("."), name
        for one in command.params:
            assert one.help, f"{name} {one.name}"


@pytest.mark.parametrize("name", ["", "bench", *COMMANDS])
def test_help_goes_to_stdout_and_fits_a_terminal(kvfold, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    done = kvfold(name, "--help")
    assert (done.code, done.err) == (0, "")
    assert max(map(len, done.out.splitlines())) <= 80
    for option in COMMANDS.get(name, "").replace("/", " ").split():
        assert option in done.out


def examples() -> list[str]:
    """The commands that help pages give as examples."""
    whole = typer.main.get_command(app)
    told = [one.epilog for one in (whole, *leaves().values()) if one.epilog]
    return [line for text in told for line in re.findall(r"`kvfold ([^`]+)`", text)]


@pytest.mark.parametrize("line", examples())
def test_examples_in_help_are_understood(line):
    words = shlex.split(line)
    name = next(name for name in COMMANDS if words[: len(name.split())] == name.split())
    command = leaves()[name]
    command.make_context(name, words[len(name.split()) :])


@pytest.mark.parametrize(
    "line",
    ["", "nonsense", "bench", "plan", "plan tiny --nonsense", "generate tiny hi --max-new-tokens 0", "generate tiny hi --seed -1",
     "generate tiny hi --temperature -1", "eval tiny --windows few", "eval tiny --passkey-tries 0", "report a b"],
)  # fmt: skip
def test_what_cannot_be_parsed_is_bad_usage(kvfold, line):
    done = kvfold(line)
    assert done.code == 2
    assert "Traceback" not in done.out + done.err
    assert not line or line == "bench" or done.err.startswith("Usage: ")


def test_serving_is_measured_in_process_or_over_http(kvfold):
    assert "MODEL" in kvfold("bench serve --offline --help").out and "URL" in kvfold("bench serve --help").out
