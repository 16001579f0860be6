# shellcheck shell=sh
# Python and its packages: a virtual environment in .cache/, made again when the pinned requirements change.

VENV=.cache/venv
PYTHON_MINOR_MIN=11

python_new_enough() {
    "$1" -I -c "import sys; sys.exit(sys.version_info < (3, $PYTHON_MINOR_MIN))" 2>/dev/null
}

# Sets $python: the distribution's own where it will do (one that a version switcher put in front may vanish), else another.
find_python() {
    for python in /usr/bin/python3 python3 python3.14 python3.13 python3.12 python3.11; do
        has "$python" && python_new_enough "$python" && return
    done
    install_packages python3 python3-venv
    hash -r
    python=/usr/bin/python3
    python_new_enough "$python" || die "Python 3.$PYTHON_MINOR_MIN or newer is needed and $python is $("$python" -V 2>&1)"
}

# python_environment dev|bench: brings .cache/venv to exactly requirements/$1.txt (bench holds all of dev) and the project.
python_environment() {
    environment_file=requirements/$1.txt
    environment_stamp=$VENV/.sandshift-$1-$(cat "$environment_file" scripts/setup/python.sh | sha256sum | cut -c1-16)
    project_stamp=$VENV/.sandshift-project-$(sha256sum <pyproject.toml | cut -c1-16)
    if [ -e "$environment_stamp" ] && [ -e "$project_stamp" ] && "$VENV/bin/python" -I -c '' 2>/dev/null; then return; fi
    # A checkout that was moved has the old folder in every script of its environment.
    if [ -e "$VENV/.sandshift-place" ] && [ "$(cat "$VENV/.sandshift-place")" != "$PWD" ]; then rm -rf "$VENV"; fi
    "$VENV/bin/python" -I -c '' 2>/dev/null || make_environment
    [ -e "$environment_stamp" ] || install_requirements "$1"
    [ -e "$project_stamp" ] || install_project
}

make_environment() {
    find_python
    "$python" -I -c 'import ensurepip, venv' 2>/dev/null || install_packages "$(venv_package)"
    room_for "$PWD" 800 "the Python environment"
    say "making a Python environment in $VENV ($("$python" -V 2>&1))"
    rm -rf "$VENV"
    quietly "$STATE/venv.log" "the Python environment could not be made with $python" "$python" -m venv "$VENV"
    printf '%s' "$PWD" >"$VENV/.sandshift-place"
}

# Debian splits venv off; the package carries the version of the interpreter, python3-venv that of the default one.
venv_package() {
    if [ "$python" = /usr/bin/python3 ]; then
        printf python3-venv
    else
        "$python" -I -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2], end="")'
    fi
}

install_requirements() {
    say "installing the pinned Python packages of $environment_file"
    quietly "$STATE/pip-$1.log" \
        "pip could not install $environment_file; check the network and pip's configuration, then run this again" \
        "$VENV/bin/python" -I -m pip install --disable-pip-version-check --quiet --require-hashes --no-deps -r "$environment_file"
    rm -f "$VENV/.sandshift-$1"-*
    : >"$environment_stamp"
}

# Needs no network: the build backend is among the pinned packages (it looks for its program in PATH).
install_project() {
    quietly "$STATE/pip-project.log" "the project itself could not be installed into $VENV" \
        env "PATH=$PWD/$VENV/bin:$PATH" "$VENV/bin/python" -I -m pip install --disable-pip-version-check --quiet --no-index --no-deps --no-build-isolation --editable .
    # pip's own launcher takes longer than containerd's `start` may.
    quietly "$STATE/launcher.log" "the shim's launcher could not be written into $VENV/bin" \
        env PYTHONPATH=src "$VENV/bin/python" -m sandshift.shim.launcher "$VENV/bin"
    rm -f "$VENV"/.sandshift-project-*
    : >"$project_stamp"
}
