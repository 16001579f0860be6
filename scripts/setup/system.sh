# shellcheck shell=sh
# shellcheck disable=SC2154 # `command` is set by ../../run, which sources this
# What comes from the distribution: which one it is, root, packages. Says what it installs; quick when nothing is missing.

OS_RELEASE=${SANDSHIFT_OS_RELEASE:-/etc/os-release} # tests put another file here
SUPPORTED="Debian 12 (with backports), Debian 13 and newer, Ubuntu 25.04 and newer"
QEMU_MAJOR_MIN=9 # QEMU before 9.0 loses guest writes in a live migration under TCG, without a word
STATE=.cache/setup
APT_LOCK_WAIT_S=300
LOCK_WAIT_S=900

distribution() {
    [ -r "$OS_RELEASE" ] || die "$OS_RELEASE cannot be read, so the distribution is unknown; supported are $SUPPORTED"
    # shellcheck disable=SC2046,SC1090 # split on purpose; the file is the distribution's
    set -- $(. "$OS_RELEASE" && printf '%s %s %s' "${ID:-unknown}" "${VERSION_ID:-0}" "${VERSION_CODENAME:-unknown}")
    distribution_id=$1
    distribution_version=$2
    distribution_codename=$3
    case $distribution_id in
    debian) version_at_least "$distribution_version" 12 && return ;;
    ubuntu) version_at_least "$distribution_version" 25.04 && return ;;
    esac
    # Debian testing and unstable carry no VERSION_ID.
    [ "$distribution_id" = debian ] && [ "$distribution_version" = 0 ] && return
    die "$distribution_id $distribution_version is not supported; supported are $SUPPORTED"
}

# version_at_least HAVE WANT, each "N" or "N.M".
version_at_least() {
    awk -v have="$1" -v want="$2" 'BEGIN {
        split(have, h, "."); split(want, w, ".")
        exit !(h[1] + 0 > w[1] + 0 || (h[1] + 0 == w[1] + 0 && h[2] + 0 >= w[2] + 0))
    }'
}

# Sets $sudo to what makes a command root: nothing when we are.
find_root() {
    [ -z "${root_found:-}" ] || return 0
    root_found=1
    sudo=
    [ "$(id -u)" -ne 0 ] || return 0
    has sudo || die "$1 needs root and there is no sudo: run it as root"
    if [ -t 0 ] && [ -t 2 ]; then
        sudo -v || die "$1 needs root: sudo refused"
    else
        sudo -n true 2>/dev/null || die "$1 needs root, and sudo would ask for a password: run it as root"
    fi
    sudo=sudo
}

run_here() {
    PATH="$PWD/$VENV/bin:$PATH"
    export PATH
    export SANDSHIFT_VENV="$VENV" PYTHONPATH="$PWD" VIRTUAL_ENV="$PWD/$VENV"
    exec "$@" 3>&-
}

run_as_root() {
    find_root "./run $command"
    [ -n "$sudo" ] || run_here "$@"
    exec sudo env "PATH=$PWD/$VENV/bin:$PATH" "SANDSHIFT_VENV=$VENV" "PYTHONPATH=$PWD" "VIRTUAL_ENV=$PWD/$VENV" "CI=${CI:-}" "$@" 3>&-
}

# A bench is what can be run: a module that ends in a call of its main.
benches() {
    for bench_file in $(grep -l '__main__' bench/*.py 2>/dev/null) bench/*/__main__.py; do
        case $bench_file in
        *'*'*) ;;
        */__main__.py) basename "$(dirname "$bench_file")" ;;
        bench/_*.py) ;;
        *) basename "$bench_file" .py ;;
        esac
    done | sort | tr '\n' ' '
}

# need WHAT...: `fast` (Python and its packages), `bench` (with the peers we measure against), `vm`, `vm-tests`, `containerd`, `go`.
need() {
    distribution
    { mkdir -p "$STATE" && : >>"$STATE/lock"; } 2>/dev/null ||
        die "$STATE cannot be written here (did root make it?): run this as root, or remove $PWD/$STATE"
    if has flock && [ -z "${setup_locked:-}" ]; then
        setup_locked=1
        exec 9>"$STATE/lock"
        flock -n 9 || {
            say "another ./run is installing something here: waiting"
            flock -w "$LOCK_WAIT_S" 9 || die "another ./run has held $STATE/lock for $LOCK_WAIT_S s: end it and try again"
        }
    fi
    for need_what in "$@"; do
        case $need_what in
        fast) python_environment dev ;;
        bench) python_environment bench ;;
        vm) vm_packages ;;
        vm-tests) test_packages ;;
        containerd) containerds ;;
        go) go_toolchain ;;
        go-if-there) find_go || say "no Go 1.$GO_MINOR_MIN or newer: the interop tests are skipped (./run setup go installs it)" ;;
        *) die "setup knows fast, vm, vm-tests, containerd, go and bench, not \"$need_what\"" ;;
        esac
    done
    exec 9>&- # the lock is for the set-up only
    setup_locked=
}

# The same for a command that will run as root: says so before anything is installed.
need_as_root() {
    distribution
    find_root "./run $command"
    need "$@"
}

# missing_packages PROBE:PACKAGE...: prints each PACKAGE whose PROBE (a command, or a file when it starts with /) is not there.
missing_packages() {
    for missing_pair in "$@"; do
        missing_probe=${missing_pair%%:*}
        case $missing_probe in
        /*) [ -e "$missing_probe" ] || printf '%s ' "${missing_pair#*:}" ;;
        *) has "$missing_probe" || PATH="$PATH:/usr/sbin:/sbin" has "$missing_probe" || printf '%s ' "${missing_pair#*:}" ;;
        esac
    done
}

apt_get() {
    # shellcheck disable=SC2086
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get -q -o "DPkg::Lock::Timeout=$APT_LOCK_WAIT_S" "$@"
}

apt_update() {
    [ -z "${apt_updated:-}" ] || return 0
    say "reading the package lists (apt-get update)"
    quietly "$STATE/apt-update.log" \
        "apt-get update failed; check the network and the sources in /etc/apt, then run this again" apt_get update
    # apt-get update ends well when it could not reach anybody; then there is nothing to install from either.
    if grep -q '^[WE]: .*Failed to fetch' "$STATE/apt-update.log" && ! grep -qE '^(Get|Hit):' "$STATE/apt-update.log"; then
        die "the package archive cannot be reached: check the network and the sources in /etc/apt, then run this again"
    fi
    apt_updated=1
}

# install_packages [-t SUITE] PACKAGE...
install_packages() {
    find_root "installing packages"
    has apt-get || die "apt-get is missing: install these yourself: $*"
    room_for /var/cache/apt 500 "installing packages"
    apt_update
    say "installing $*"
    quietly "$STATE/apt-install.log" "apt-get install $* failed; mend what it names, then run this again" \
        apt_get install -y --no-install-recommends "$@"
}

vm_packages() {
    [ "$(uname -m)" = x86_64 ] || die "sandboxes are x86-64 machines and this is $(uname -m): use an x86-64 host"
    find_root "./run $command"
    vm_missing=$(missing_packages ip:iproute2 mkfs.erofs:erofs-utils mkfs.ext4:e2fsprogs zstd:zstd)
    # shellcheck disable=SC2086
    [ -z "$vm_missing" ] || install_packages $vm_missing
    qemu_package
    [ -c /dev/net/tun ] || $sudo modprobe tun 2>/dev/null || true
    [ -c /dev/net/tun ] ||
        die "/dev/net/tun is missing and the sandboxes' network cards need it: modprobe tun, or start this container with that device"
}

# What the tests need beyond the commands: a tiny guest of their own is made with these.
test_packages() {
    test_missing=$(missing_packages cpio:cpio /usr/share/doc/busybox-static:busybox-static)
    # shellcheck disable=SC2086
    [ -z "$test_missing" ] || install_packages $test_missing
}

qemu_major() { qemu-system-x86_64 --version 2>/dev/null | sed -n 's/^QEMU emulator version \([0-9]*\).*/\1/p'; }

qemu_package() {
    if has qemu-system-x86_64 && [ "$(qemu_major)" -ge "$QEMU_MAJOR_MIN" ] 2>/dev/null; then
        has qemu-img || install_packages qemu-utils
        return
    fi
    if [ "$distribution_codename" = bookworm ]; then
        backports_source
        install_packages -t bookworm-backports qemu-system-x86 qemu-utils
    else
        install_packages qemu-system-x86 qemu-utils
    fi
    hash -r
    qemu_found=$(qemu_major)
    [ "${qemu_found:-0}" -ge "$QEMU_MAJOR_MIN" ] ||
        die "QEMU $QEMU_MAJOR_MIN.0 or newer is needed (older ones lose guest writes under TCG) and $(command -v qemu-system-x86_64 || echo none) is \"$qemu_found\": install a newer qemu-system-x86"
}

# suite_source FROM TO FILE: writes FILE with the source of suite TO in the archive from which this machine takes suite FROM.
# Sets $suite_kind (sources or list, which FILE's name must end in for apt) and $suite_from (where it was found). 1: nowhere.
suite_source() {
    for suite_from in /etc/apt/sources.list.d/*.sources; do
        [ -r "$suite_from" ] || continue
        suite_kind=sources
        if awk -v from="$1" -v to="$2" -f scripts/setup/suite-deb822.awk "$suite_from" >"$3"; then return 0; fi
    done
    for suite_from in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
        [ -r "$suite_from" ] || continue
        suite_kind=list
        if awk -v from="$1" -v to="$2" -f scripts/setup/suite-oneline.awk "$suite_from" >"$3"; then return 0; fi
    done
    return 1
}

# Debian 12: adds the backports of whatever archive this machine already uses. They are chosen only when asked for by name.
backports_source() {
    apt_lists=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources 2>/dev/null |
        grep -v '^[[:space:]]*#' || true)
    case $apt_lists in *bookworm-backports*) return 0 ;; esac
    find_root "adding bookworm-backports"
    mkdir -p "$STATE"
    if suite_source bookworm bookworm-backports "$STATE/backports"; then
        backports_add "$suite_kind" "$suite_from"
        return
    fi
    die "no source of Debian bookworm was found under /etc/apt to take bookworm-backports from: add that suite yourself (QEMU $QEMU_MAJOR_MIN.0 is in it)"
}

backports_add() {
    say "adding bookworm-backports, taken from $2, as /etc/apt/sources.list.d/sandshift-backports.$1 (QEMU is newer there)"
    $sudo cp "$STATE/backports" "/etc/apt/sources.list.d/sandshift-backports.$1"
    $sudo chmod 0644 "/etc/apt/sources.list.d/sandshift-backports.$1"
    apt_updated=
}
