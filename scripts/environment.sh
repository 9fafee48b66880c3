# Sourced by the other scripts. `use_environment FILE` activates a Python environment with the packages of requirements
# file FILE: the active virtual or conda environment, else .venv. Nothing is installed twice.

use_environment() {
    if [ -z "${VIRTUAL_ENV:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" = base ]; then
        [ -f .venv/bin/activate ] || python3 -m venv .venv
        . .venv/bin/activate
    fi
    local wanted stamp
    wanted=$(cat requirements.txt "$1" | cksum)
    stamp=$(python -c 'import sys; print(sys.prefix)')/.installed-$(echo "$1" | tr / -)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "Installing $1 into $(dirname "$stamp") ..."
        python -m pip install --quiet --disable-pip-version-check -r "$1"
        echo "$wanted" >"$stamp"
    fi
}
