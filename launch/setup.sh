# shellcheck shell=bash
# Sourced by the other launchers: changes to the repository's root and defines set_up and run_here.

CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." || exit

# set_up [EXTRA]: creates the virtual environment .venv if there is none, and installs the requirements, with an extra of
# setup.cfg if one is given. Does nothing if that has been done, so that no network is needed then.
# PYTHON selects the interpreter of a new environment (python3 by default).
set_up() {
  local extra=${1:-} base=${PYTHON:-python3} quiet=-q began=$SECONDS
  if ! .venv/bin/python -V >/dev/null 2>&1; then
    if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      echo "error: $base is not Python 3.11 or newer: name one that is, as in PYTHON=python3.11 bash $0" >&2
      exit 2
    fi
    "$base" -m venv --clear .venv
  fi
  if _described | cmp -s - ".venv/.installed$extra"; then
    return
  fi
  echo 'Installing into .venv (4 to 5 GB on disk); the first time this takes minutes.' >&2
  if [ -t 1 ]; then
    quiet=
  fi
  .venv/bin/python -c 'import pip' 2>/dev/null || .venv/bin/python -m ensurepip  # its creation was interrupted
  rm -f .venv/.installed*  # an interrupted installation must not count as finished
  _install $quiet -r requirements.txt
  if [ -n "$extra" ]; then
    _install $quiet -c requirements.txt -e ".[train,$extra]"
  else
    _install $quiet --no-deps -e .
  fi
  _install $quiet --no-deps -r requirements-demo.txt
  [ -z "$extra" ] || _described > ".venv/.installed$extra"
  _described > .venv/.installed
  echo "Installed in $((SECONDS - began)) s." >&2
}

# run_here EXTRA [--dry-run] OPTION ...: runs main.py on this machine, with the extra installed, and restarts it as long as
# it exits with 75 (preempted), 76 (stalled) or 134 (JAX aborts when another process is lost): the same command then
# continues from the checkpoint. Returns its last exit code.
run_here() {
  local extra=$1 code=75 run=()
  shift
  if [ "${1:-}" = --dry-run ]; then
    run=(echo)
    shift
  else
    set_up "$extra"
  fi
  export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/.venv/cache/jax}
  while [[ "$code" =~ ^(75|76|134)$ ]]; do
    code=0
    "${run[@]}" .venv/bin/python main.py "$@" || code=$?
  done
  return "$code"
}

# Modules are compiled when they are first imported: most of those in 5 GB never are.
_install() {
  .venv/bin/python -m pip --disable-pip-version-check install --no-compile "$@"
}

# Everything that determines an installation.
_described() {
  echo "$PWD"
  .venv/bin/python -V
  cat requirements.txt requirements-demo.txt setup.cfg pyproject.toml
}
