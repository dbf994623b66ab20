# make demo   an LLM learns to hear: speech is made, a projector trained, sentences recognised and scored
# make test   style, then the tests
# Each sets up .venv by itself. They need Python 3.11 or newer and make; the tests under DeepSpeed need g++ too.
PYTHON ?= python3
INSTALLED = .venv/installed

demo: $(INSTALLED)
	.venv/bin/python demo/run.py

test: $(INSTALLED)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python -m pytest -n 2

$(INSTALLED): requirements.txt demo/requirements.txt tests/requirements.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: Python 3.11 or newer is needed")'
	@echo "Installing into .venv (torch and the rest; minutes, once)"
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -r requirements.txt -r demo/requirements.txt -r tests/requirements.txt
	@touch $@

.PHONY: demo test
