#!/bin/sh
# Makes .venv with the newest Python that Dagster supports (or the one given) and a current pip. Used by the Makefile.
set -eu

supported='import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 15))'
version='import platform; print(platform.python_version())'

tried=
for python in ${1:-python3.14 python3.13 python3.12 python3.11 python3.10 python3 python}; do
  # A version manager's shim exists without working, so each is asked rather than looked up.
  found=$("$python" -c "$version" 2>/dev/null) || continue
  if ! "$python" -c "$supported" 2>/dev/null; then
    tried="$tried
  $python is $found"
  elif ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
    tried="$tried
  $python is $found but lacks the modules venv and ensurepip (Debian, Ubuntu: apt-get install python3-venv)"
  else
    echo "Making .venv with Python $found."
    rm -rf .venv
    "$python" -m venv .venv
    # A current pip installs the rest in two thirds of the time that the one inside Python needs.
    .venv/bin/pip install -qq --no-compile --upgrade pip
    exit 0
  fi
done

echo "Python 3.10 to 3.14 with the modules venv and ensurepip is needed.${tried:-
  No Python was found${1:+ at $1}.}
Install one, or name it: make PYTHON=/path/to/python3.12 ..." >&2
exit 1
