# Every target is one line that also runs without make: python3 .ci/tasks.py TARGET
# LAB_ARGS="--no-browser --port=9999" are options of JupyterLab for `make lab`.
# TORCH=cpu takes torch's CPU wheels when .venv is made; NB=04_losses limits `make notebooks`.
PYTHON ?= python3
TARGETS := setup demo test test-all docs lab readme check notebooks torture device-check

.DEFAULT_GOAL := help
.PHONY: help $(TARGETS)
export TORCH NB DEVICE LAB_ARGS

help:
	@$(PYTHON) .ci/tasks.py --help

$(TARGETS):
	@$(PYTHON) .ci/tasks.py $@
